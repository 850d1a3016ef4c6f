"""Drop torch from what pip-compile wrote and explain on top: finish_lock.py NEW LOCK."""

import re
import sys
from pathlib import Path

HEAD = """\
# Everything the host side and the tests install, pinned, with hashes (Linux, Python 3.11).
# torch is left out on purpose: its CPU build comes from another place than its CUDA build and
# so has another hash; the Makefile installs torch==2.13.0 by itself.
# Made by "make lock"; installed with: pip install --no-deps --require-hashes -r requirements.lock
"""

new, lock = map(Path, sys.argv[1:])
entries = re.split(r"\n(?=\S)", new.read_text().strip())
kept = [entry.rstrip() for entry in entries if "==" in entry and not entry.startswith("torch==")]
lock.write_text(HEAD + "\n".join(kept) + "\n")
new.unlink()

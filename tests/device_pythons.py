"""
Pythons that have the device side's packages in versions of a test's choice, and this checkout.

The packages are fetched once for each recipe and kept below ~/.cache/edgeexit/tests, in a folder
named by the recipe's digest. torch, asyncssh and all else that this Python has are not there.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
BASE = getattr(sys, "_base_executable", sys.executable)


def device_python(folder: Path, packages: Sequence[str]) -> Path:
    """A Python in *folder* with *packages*; skips the test where they cannot be had."""
    env = folder / "env"
    subprocess.run([BASE, "-m", "venv", "--without-pip", env], check=True)
    (library,) = env.glob("lib/python3*/site-packages")
    (library / "theirs.pth").write_text(f"{_site(sorted(packages))}\n{CHECKOUT}\n")
    return env / "bin" / "python"


def _site(packages: Sequence[str]) -> Path:
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version != "3.11":
        pytest.skip(f"these old packages have no wheels for Python {version}")
    recipe = " ".join([*packages, version])
    place = Path.home() / ".cache/edgeexit/tests" / hashlib.sha256(recipe.encode()).hexdigest()[:16]
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".site.", dir=place.parent) as folder:
            fresh = Path(folder) / "site"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(fresh)]
            done = subprocess.run([*pip, *packages], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"needs the package registry: {done.stderr[-200:]}")
            (fresh / "recipe.txt").write_text(recipe)
            if not place.is_dir():
                shutil.move(fresh, place)
    return place


def run(
    python: Path, *argv: str, folder: Path = CHECKOUT, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run *python* in *folder*, with nothing of this process's environment that matters."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    return subprocess.run(
        [python, "-P", *argv],
        cwd=folder,
        env={**kept, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )

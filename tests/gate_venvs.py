"""
Environments for the gates whose packages do not go with this one's: made once, kept in the cache.

`make gates` runs the slow tests that use them.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "bench" / "arm"))

from root import layer  # noqa: E402

PYTHONS = {"onnx": (3, 12), "onnx-tensorflow": (3, 12), "tensorflow": (3, 11)}


def gate_python(extra: str) -> Path:
    """A Python that has what edgeexit[*extra*] asks for (and pytest), but not edgeexit itself."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"][extra], "pytest>=8.3"]
    python = _interpreter(*PYTHONS[extra])
    recipe = [json.dumps(PYTHONS[extra]), *sorted(wanted)]

    def build(folder: Path) -> None:
        subprocess.run([python, "-m", "venv", str(folder)], check=True)
        pip = (str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet")
        subprocess.run([*pip, "--disable-pip-version-check", *wanted], check=True)

    return layer(f"gate-{extra}", recipe, build) / "bin" / "python"


def onnx_export() -> Path:
    """A folder with what the extra `onnx-export` adds to an environment with torch."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [*project["optional-dependencies"]["onnx-export"], "onnx-ir"]

    def build(folder: Path) -> None:
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
        subprocess.run([*pip, "--no-deps", "--target", str(folder), *wanted], check=True)

    return layer("onnx-export", [sys.version, *wanted], build)


def run_in(extra: str, *arguments: str | Path, cwd: Path, check: bool = True):
    """Run Python with *arguments* in that environment, where this checkout can be imported."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [str(gate_python(extra)), "-P", *map(str, arguments)],
        cwd=cwd,
        check=False,
        capture_output=True,
        text=True,
        env=environment,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def _interpreter(major: int, minor: int) -> str:
    if sys.version_info[:2] == (major, minor):
        return sys.executable
    name = f"python{major}.{minor}"
    known = sorted(
        (Path.home() / ".pyenv" / "versions").glob(f"{major}.{minor}.*/bin/python"),
        key=lambda path: [int(part) for part in re.findall(r"\d+", path.parts[-3])],
    )
    for python in (name, *map(str, known)):
        try:
            subprocess.run([python, "-c", ""], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return python
    pytest.skip(f"needs Python {major}.{minor}")

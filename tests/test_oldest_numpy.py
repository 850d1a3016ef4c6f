"""
The device side with numpy 1.24, which Debian 12 and so camera boards have.

All other tests run with the newest numpy. Here the same tests of what runs on a board run again,
in a Python that has only the device side's packages: torch or asyncssh are not even there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
PYTHON = getattr(sys, "_base_executable", sys.executable)
OLDEST = "1.24.4"
# numpy apart, what `pip install edgeexit` brings; then what the tests need.
PACKAGES = ("ai-edge-litert==2.3.0", "click", "pillow", "psutil", "pytest", "hypothesis")
TESTS = ("runtime", "run", "policy", "bundle", "preprocess", "evaluate")


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the packages, the oldest numpy and this checkout, and nothing else."""
    env = tmp_path_factory.mktemp("oldest") / "env"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", env], check=True)
    (library,) = env.glob("lib/python3*/site-packages")
    (library / "theirs.pth").write_text(f"{_packages()}\n{CHECKOUT}\n")
    return env / "bin" / "python"


def _packages() -> Path:
    """A folder with the packages, filled once for each version of Python."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version != "3.11":
        pytest.skip(f"numpy {OLDEST} has no wheels for Python {version}")
    name = f"numpy-{OLDEST}-{PACKAGES[0]}-python-{version}"
    place = Path.home() / ".cache" / "edgeexit" / "tests" / name
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=place.parent) as folder:
            fresh = Path(folder) / "site"
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(fresh)]
            done = subprocess.run(
                [*pip, f"numpy=={OLDEST}", *PACKAGES], capture_output=True, text=True
            )
            if done.returncode:
                pytest.skip(f"needs the package registry: {done.stderr[-200:]}")
            if not place.is_dir():
                shutil.move(fresh, place)
    return place


def run(python: Path, *argv: str) -> "subprocess.CompletedProcess[str]":
    """Run *python* in this checkout, with nothing of this process's environment that matters."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    return subprocess.run(
        [python, "-P", *argv],
        cwd=CHECKOUT,
        env={**kept, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_the_versions_are_those_that_are_meant(python: Path) -> None:
    code = (
        "import importlib.util as u, numpy\n"
        "from edgeexit.interpreter import runtime_name\n"
        "print(numpy.__version__, runtime_name(), u.find_spec('torch'))"
    )

    assert run(python, "-c", code).stdout.split("\n")[0] == f"{OLDEST} ai-edge-litert 2.3.0 None"


def test_the_shipped_example_answers_as_it_did_where_it_was_made(python: Path) -> None:
    done = run(python, "-m", "edgeexit", "run", "examples/fashion.edgeexit", "--json")

    assert done.returncode == 0, done.stderr
    assert '"differing": 0' in done.stdout


def test_what_runs_on_a_board_passes_its_tests_with_the_oldest_numpy(python: Path) -> None:
    files = [f"tests/test_{name}.py" for name in TESTS]

    done = run(python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files)

    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout

"""
The device side with numpy 1.24, which Debian 12 and so camera boards have.

All other tests run with the newest numpy. Here the same tests of what runs on a board run again,
in a Python that has only the device side's packages: torch or asyncssh are not even there.
"""

from pathlib import Path

import pytest
from device_pythons import device_python, run

OLDEST = "1.24.4"
# numpy apart, what `pip install edgeexit` brings; then what the tests need.
PACKAGES = ("ai-edge-litert==2.3.0", "click", "pillow", "psutil", "pytest", "hypothesis")
TESTS = ("runtime", "run", "policy", "bundle", "preprocess", "evaluate")


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the packages, the oldest numpy and this checkout, and nothing else."""
    return device_python(tmp_path_factory.mktemp("oldest"), (f"numpy=={OLDEST}", *PACKAGES))


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

"""Where nothing may be missing, a test that skips for want of something has failed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import conftest

TESTS = """
import pytest

@pytest.mark.slow
def test_slow(): ...

def test_want(): pytest.skip("there is no ARM processor")

@pytest.mark.xfail(reason="known")
def test_known(): assert False
"""


def outcome(folder: Path, tests: str, value: str) -> "tuple[int, str]":
    (folder / "test_some.py").write_text(tests)
    shutil.copy(conftest.__file__, folder / "conftest.py")
    # Not this project's settings: only its conftest.
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = slow\n host\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:anyio"],
        cwd=folder,
        env={**os.environ, conftest.NO_SKIPS: value},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_skip_for_want_of_something_is_a_failure_only_where_asked(tmp_path: Path) -> None:
    assert outcome(tmp_path, TESTS, "")[0] == 0
    code, said = outcome(tmp_path, TESTS, "1")

    assert code == 1
    assert "there is no ARM processor" in said
    assert "1 failed, 1 skipped, 1 xfailed" in said


def test_a_module_that_skips_as_a_whole_is_a_failure_too(tmp_path: Path) -> None:
    tests = "import pytest\npytest.importorskip('nowhere_to_be_found')\n"

    assert outcome(tmp_path, tests, "")[0] == 5
    code, said = outcome(tmp_path, tests, "1")
    assert code == 2
    assert "nowhere_to_be_found" in said

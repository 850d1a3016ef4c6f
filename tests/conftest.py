"""Options and markers shared by all tests."""

import os
import tempfile
from collections.abc import Generator
from importlib.util import find_spec

import pytest

# Tests run in as many processes as there are cores (make test): more threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What passed on this machine is not tried again by the next process; nothing of it at home.
os.environ.setdefault("EDGEEXIT_HOME", f"{tempfile.gettempdir()}/edgeexit-tests-{os.getuid()}")

# Where it is set nothing may be missing: a test that skips for any other reason has failed.
NO_SKIPS = "EDGEEXIT_NO_SKIPS"
SLOW = "slow: run with --slow"
BY_DESIGN = (SLOW, "not read by this command", "root may write anywhere", "no longer floats here")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Host tests need the `torch` extra; slow ones need --slow."""
    without_host = find_spec("torch") is None or find_spec("litert_torch") is None
    for item in items:
        if without_host and "host" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs edgeexit[torch]"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason=SLOW))


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if not report.skipped or hasattr(report, "wasxfail") or not os.environ.get(NO_SKIPS):
        return
    place = report.longrepr
    reason = str(place[2] if isinstance(place, tuple) else place).removeprefix("Skipped: ")
    if reason not in BY_DESIGN:
        report.outcome = "failed"
        report.longrepr = f"skipped, and {NO_SKIPS} says that nothing is missing here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _refuse_skip(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Modules that skip as a whole, for a package that is not installed."""
    report = yield
    _refuse_skip(report)
    return report

"""Options and markers shared by all tests."""

import os
from importlib.util import find_spec

import pytest

# Tests run in as many processes as there are cores (make test): more threads only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Host tests need the `torch` extra; slow ones need --slow."""
    without_host = find_spec("torch") is None or find_spec("litert_torch") is None
    for item in items:
        if without_host and "host" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs edgeexit[torch]"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))

"""Facts about refusals: each kind has one exit code, and each code one kind."""

import pytest

from edgeexit.errors import KINDS, DeviceError, EdgeExitError, kind_of


class Foreign(EdgeExitError):
    """A refusal that somebody else derived."""


def test_a_kind_is_found_by_its_exit_code() -> None:
    assert [kind_of(code) for code in KINDS] == list(KINDS.values())
    assert sorted(KINDS) == list(range(2, 12))


@pytest.mark.parametrize("code", [0, 1, 12, -1, "3", None, [], {}])
def test_what_no_refusal_has_is_the_device_s_fault(code: object) -> None:
    assert kind_of(code) is DeviceError

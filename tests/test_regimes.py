"""Regimes: the phases share the epochs that there are."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from edgeexit.errors import BadFile
from edgeexit.host.recipe import TrainingPart
from edgeexit.host.regimes import plan

pytestmark = pytest.mark.host

PART = TrainingPart(epochs=1, learning_rate=0.1)


@settings(max_examples=25, deadline=None)
@given(
    epochs=st.integers(0, 200),
    shares=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
)
def test_the_phases_share_the_epochs(epochs: int, shares: list[int]) -> None:
    part = replace(PART, regime="mixed", epochs=epochs, phase_shares=tuple(map(float, shares)))
    used = [share for share in shares if share]
    if 0 < epochs < len(used):
        with pytest.raises(BadFile, match="phases"):
            plan(part, "r")
        return

    counts = [count for _, count in plan(part, "r")]

    assert sum(counts) == epochs
    wanted = [epochs * share / sum(used) for share in used]
    if epochs and min(wanted) >= 1:
        assert all(abs(a - b) < 1 for a, b in zip(counts, wanted, strict=True))
    assert all(count >= 1 for count in counts)

"""Material: what was held out once stays held out, whatever the checkpoint remembers of it."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

from edgeexit.errors import BadFile
from edgeexit.host.material import Origin, gather
from edgeexit.host.recipe import Augmentation, DataPart
from edgeexit.preprocess import Preprocess

pytestmark = pytest.mark.host

ROWS = Preprocess(kind="array", layout="as-is")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of an npz of 100 rows."""
    path = tmp_path_factory.mktemp("material") / "rows.npz"
    samples = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)
    np.savez(path, samples=samples, labels=np.arange(100) % 2)
    return str(path)


@settings(max_examples=25, deadline=None)
@given(
    holdout=st.one_of(st.none(), st.integers(1, 99)),
    seed=st.one_of(st.none(), st.integers(0, 9)),
    later=st.integers(0, 9),
)
def test_a_record_finds_the_same_split_again(
    rows: str, holdout: int | None, seed: int | None, later: int
) -> None:
    facts: dict[str, Any] = {"preprocess": ROWS, "input_shape": (1, 4)}
    part = DataPart(path=rows, holdout=holdout, seed=seed, class_names=("a", "b"))
    first, origin = gather(part, Augmentation(noise=0.1), seed=3, **facts)

    before = Origin.of(origin.to_metadata(), "m.pt")
    again, other = gather(
        DataPart(class_names=("a", "b")), None, before=before, seed=later, **facts
    )

    assert before == origin == other
    assert np.array_equal(again.training, first.training)
    assert np.array_equal(again.holdout, first.holdout)
    assert again.augmentation == first.augmentation
    assert not set(first.training) & set(first.holdout)
    assert len(first.holdout) == (holdout or 10)


def test_what_was_trained_before_there_was_a_record_is_split_as_then() -> None:
    assert Origin.of({"holdout": 30, "seed": 5}, "m.pt") == Origin(holdout=30, seed=5)
    assert Origin.of({"holdout": "many", "data": "mine"}, "m.pt") == Origin()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": 3},
        {"kind": "idx", "path": "d", "count": 9, "holdout": -1, "seed": 0, "augmentation": {}},
        {"kind": "idx", "path": "d", "count": 9, "holdout": 1, "seed": 0, "augmentation": {"x": 1}},
    ],
)
def test_a_forged_record_is_refused(data: dict[str, Any]) -> None:
    with pytest.raises(BadFile, match=r"m\.pt: metadata"):
        Origin.of({"data": data}, "m.pt")

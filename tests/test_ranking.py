"""What is said of an exit's confidence: AUROC by its definition, bins of equal mass, ties whole."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.errors import UsageError
from edgeexit.ranking import auroc, rankings, reliability

# Few distinct values: ties are the hard case.
SAMPLES = st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=60)


def arrays(samples: list[tuple[int, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([value / 6 for value, _ in samples]),
        np.array([is_right for _, is_right in samples]),
    )


@given(SAMPLES)
def test_auroc_is_the_share_of_pairs_in_the_right_order_ties_half(
    samples: list[tuple[int, bool]],
) -> None:
    confidence, correct = arrays(samples)
    pairs = [np.sign(a - b) / 2 + 0.5 for a in confidence[correct] for b in confidence[~correct]]

    found = auroc(confidence, correct)

    assert found == pytest.approx(np.mean(pairs)) if pairs else found is None


@given(SAMPLES, st.randoms(use_true_random=False))
def test_neither_order_nor_a_rising_rescaling_changes_auroc(
    samples: list[tuple[int, bool]], random: object
) -> None:
    confidence, correct = arrays(samples)
    order = np.random.default_rng(random.randrange(2**32)).permutation(len(samples))

    assert auroc(confidence, correct) == auroc(np.exp(5 * confidence[order]), correct[order])


@given(SAMPLES, st.integers(1, 12))
@settings(deadline=None)
def test_bins_hold_every_sample_once_and_never_part_equals(
    samples: list[tuple[int, bool]], bins: int
) -> None:
    confidence, correct = arrays(samples)

    found = reliability(confidence, correct, bins=bins)

    assert found.samples.sum() == len(samples)
    assert len(found.samples) <= min(bins, len(np.unique(confidence)))
    assert (found.accuracy * found.samples).sum() == pytest.approx(correct.sum())
    assert (found.confidence * found.samples).sum() == pytest.approx(confidence.sum())
    assert (found.low <= found.accuracy + 1e-9).all()
    assert (found.high >= found.accuracy - 1e-9).all()
    assert (np.diff(found.confidence) > 0).all()


def test_bins_have_equal_mass_without_ties() -> None:
    found = reliability(np.linspace(0, 1, 100), np.ones(100, bool), bins=10)

    assert found.samples.tolist() == [10] * 10


def test_the_calibration_error_of_an_honest_exit_is_small_and_of_a_boaster_large() -> None:
    random = np.random.default_rng(0)
    confidence = random.random(20_000)
    honest = random.random(20_000) < confidence
    seen = np.stack([confidence, np.full(20_000, 0.9)], axis=1)
    correct = np.stack([honest, honest], axis=1)

    calm, boaster = rankings(seen, correct, ("calm", "boaster"))

    assert calm.reliability.error == pytest.approx(0.0, abs=0.02)
    assert boaster.reliability.error == pytest.approx(0.4, abs=0.02)
    assert calm.auroc == pytest.approx(5 / 6, abs=0.01)
    assert boaster.auroc == 0.5


def test_a_measure_that_is_no_probability_has_no_calibration_error() -> None:
    seen, correct = np.array([[3.0], [7.0]]), np.array([[False], [True]])

    (row,) = rankings(seen, correct, ("exit0",), measure="peak")

    assert row.to_document() == {
        "samples": 2,
        "accuracy": 0.5,
        "auroc": 1.0,
        "calibration_error": None,
    }


@pytest.mark.parametrize("is_right", [True, False])
def test_without_both_kinds_of_answer_there_is_nothing_to_rank(is_right: bool) -> None:
    (row,) = rankings(np.ones((4, 1)), np.full((4, 1), is_right), ("exit0",))

    assert row.auroc is None
    assert row.accuracy == is_right


def test_other_shapes_and_nan_are_refused() -> None:
    with pytest.raises(UsageError, match=r"expected \(N, 1\)"):
        rankings(np.ones((4, 2)), np.ones((4, 2), bool), ("exit0",))
    with pytest.raises(UsageError, match="NaN"):
        rankings(np.full((4, 1), np.nan), np.ones((4, 1), bool), ("exit0",))

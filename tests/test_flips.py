"""What flips claims: smooth chances that hold for other samples, whatever the measure's scale."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from populations import synthetic

from edgeexit.decision import Record
from edgeexit.flips import chances


def seen(record: Record) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    return record.confidence.T[:-1], record.loss.T > 0


def surprise(chance: NDArray[np.float64], harm: NDArray[np.bool_]) -> float:
    """Mean log loss, chances kept off 0 and 1."""
    kept = np.clip(chance, 1e-3, 1 - 1e-3)
    return float(-np.where(harm, np.log(kept), np.log(1 - kept)).mean())


def test_on_average_as_many_flips_are_expected_as_happened() -> None:
    confidence, harm = seen(synthetic(4000, 1))

    found = chances(confidence, harm)

    assert found.shape == harm.shape
    assert found.mean(axis=1) == pytest.approx(harm.mean(axis=1), rel=0.02)
    assert (found[-1] == 0.0).all()  # the full network is its own reference


def test_known_chances_are_found_again() -> None:
    random = np.random.default_rng(0)
    first, second = random.random((2, 20_000))
    logits = np.log(first / (1 - first)) * np.sqrt(3) / np.pi
    truth = 1 / (1 + np.exp(2.0 + 1.5 * logits))
    harm = np.array([random.random(20_000) < truth, np.zeros(20_000, np.bool_)])

    found = chances(first[None], harm)

    assert np.abs(found[0] - truth).max() < 0.03
    # A measure that knows nothing gives everyone the mean.
    blind = chances(second[None], harm)[0]
    assert np.abs(blind - harm[0].mean()).max() < 0.03


def test_they_tell_more_about_fresh_samples_than_the_mean_does() -> None:
    confidence, harm = seen(synthetic(1000, 1))
    fresh, later = seen(synthetic(20_000, 2))
    found = chances(confidence, harm)
    for k in range(3):
        order = np.argsort(confidence[k])
        guessed = np.interp(fresh[k], confidence[k][order], found[k][order])
        mean = np.full(len(fresh[k]), harm[k].mean())
        assert surprise(guessed, later[k]) < 0.95 * surprise(mean, later[k])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(1, 4), st.sampled_from([0, 1, 3]), st.integers(0, 10**6))
def test_shares_that_neither_scale_nor_order_change(
    samples: int, early: int, levels: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    confidence: NDArray[np.floating] = random.random((early, samples)).astype(np.float32)
    if levels:
        confidence = np.rint(confidence * levels).astype(np.float32) / levels
    harm = random.random((early + 1, samples)) < random.random((early + 1, 1))
    shuffled = random.permutation(samples)

    found = chances(confidence, harm)

    assert ((found >= 0) & (found <= 1)).all()
    assert (chances(7 * confidence - 3, harm) == found).all()
    moved = chances(confidence[:, shuffled], harm[:, shuffled])
    assert moved == pytest.approx(found[:, shuffled], abs=2e-6)


def test_equals_have_equal_chances() -> None:
    random = np.random.default_rng(3)
    confidence = random.integers(0, 4, (2, 300)).astype(np.float32)
    harm = random.random((3, 300)) < 0.2

    found = chances(confidence, harm)

    for pair in {tuple(column) for column in confidence.T}:
        alike = (confidence == np.array(pair)[:, None]).all(axis=0)
        assert len(np.unique(found[1][alike])) == 1


def test_without_a_flip_there_is_no_chance_of_one() -> None:
    confidence = np.random.default_rng(0).random((2, 50))

    assert (chances(confidence, np.zeros((3, 50), np.bool_)) == 0.0).all()

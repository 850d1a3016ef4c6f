"""What choose makes of arrays: the same policy from equal samples, and odd ones refused."""

from dataclasses import replace

import numpy as np
import pytest

from edgeexit.choice import choose
from edgeexit.decision import Costs, Policy, Record
from edgeexit.errors import OutOfReach, UsageError


def arrays(
    samples: int = 600,
    exits: int = 3,
    seed: int = 0,
    classes: int = 4,
    kind: type = np.float32,
    constant: bool = False,
) -> Record:
    rng = np.random.default_rng(seed)
    confidence = np.full((samples, exits), 0.5) if constant else rng.random((samples, exits))
    label = rng.integers(0, classes, samples)
    right = rng.random((samples, exits)) < 0.5 + confidence / 2
    wrong = (label[:, None] + 1) % classes
    return Record(
        confidence.astype(kind),
        np.where(right, label[:, None], wrong),
        label,
        seed * 10**6 + np.arange(samples),
    )


def costs(value: float, exits: int = 3) -> Costs:
    return Costs(*(np.full(exits, value) for _ in range(3)))


def chosen(tuning: Record, certificate: Record, at: Costs | None = None) -> Policy:
    return choose(
        tuning, certificate, costs(1.0, tuning.exits) if at is None else at, max_accuracy_drop=0.05
    )


def test_costs_at_either_end_make_a_policy_or_are_refused() -> None:
    pair = arrays(), arrays(seed=1)
    usual = chosen(*pair)

    for value in (2.0**-9, 2.0**90, 2.0**600):
        assert chosen(*pair, costs(value)).thresholds == usual.thresholds
    assert chosen(*pair, costs(0.0)).certificate["position"] >= 0
    for value in (1e201, 1e308):
        with pytest.raises(UsageError, match="expected at most 1e"):
            chosen(*pair, costs(value))
    for value in (-1.0, np.nan, np.inf):
        with pytest.raises(UsageError, match="finite numbers of 0 or more"):
            costs(value)


def test_odd_records_make_a_policy_or_are_refused() -> None:
    tuning, certificate = arrays(), arrays(seed=1)

    same = chosen(arrays(constant=True), arrays(seed=1, constant=True))
    assert same.certificate["drop"] <= 0.05
    single = chosen(arrays(classes=1), arrays(seed=1, classes=1))
    assert single.mean_cost(certificate, costs(1.0)) <= costs(1.0).full
    double = chosen(arrays(kind=np.float64), arrays(seed=1, kind=np.float64))
    assert double.certificate["drop"] <= 0.05
    assert chosen(arrays(exits=1), arrays(exits=1, seed=1)).thresholds == ()
    with pytest.raises(UsageError, match="tuning: no samples"):
        chosen(arrays(0), certificate)
    with pytest.raises(OutOfReach, match="labels are missing"):
        chosen(tuning, arrays(0, seed=1))
    with pytest.raises(OutOfReach, match="labels are missing"):
        chosen(arrays(exits=1), arrays(0, exits=1, seed=1))
    with pytest.raises(UsageError, match="expected the same number"):
        chosen(arrays(exits=2), certificate)
    with pytest.raises(UsageError, match="NaN"):
        replace(tuning, confidence=np.where(tuning.confidence < 0.5, np.nan, 0.1))


def shuffled(record: Record, seed: int) -> Record:
    return record.take(np.random.default_rng(seed).permutation(len(record)))


@pytest.mark.parametrize("spread", [1e-15, 1e300])
def test_float64_confidences_may_be_finer_and_greater_than_those_of_float32(spread: float) -> None:
    pair = [arrays(seed=seed, kind=np.float64) for seed in (0, 1)]
    pair = [replace(one, confidence=0.5 + spread * one.confidence) for one in pair]
    usual = chosen(*pair)
    for seed in range(3):
        assert vars(chosen(*(shuffled(one, seed) for one in pair))) == vars(usual)
    assert usual.certificate["position"] > 0


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_all_finite_confidences_make_a_policy(kind: type) -> None:
    ends = np.array([np.finfo(kind).min, -1.0, 0.0, np.finfo(kind).tiny, np.finfo(kind).max])
    pair = [arrays(seed=seed, kind=kind) for seed in (0, 1)]
    pair = [replace(one, confidence=ends[(5 * one.confidence).astype(int)]) for one in pair]
    usual = chosen(*pair)
    assert not np.isnan(usual.thresholds).any()
    assert vars(chosen(*(shuffled(one, 0) for one in pair))) == vars(usual)


def test_an_answer_never_given_on_tuning_has_the_threshold_of_all_answers() -> None:
    tuning, certificate = arrays(classes=3), arrays(seed=1, classes=6)

    policy = choose(tuning, certificate, costs(1.0), max_accuracy_drop=0.3, method="class")
    assert policy.class_offsets is not None
    assert policy.class_offsets.shape == (2, 3)
    loss = certificate.loss[np.arange(len(certificate)), policy.exits(certificate)]
    assert policy.certificate["harmful"] == (loss > 0).sum()
    padded = replace(policy, class_offsets=np.pad(policy.class_offsets, ((0, 0), (0, 3))))
    assert (padded.exits(certificate) == policy.exits(certificate)).all()

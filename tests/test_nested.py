import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from populations import ORACLE_SAVING, SYNTHETIC_COSTS, synthetic

from edgeexit import certify
from edgeexit.decision import Costs, Family, Record
from edgeexit.nested import learn

GOAL = {"level": 0.01, "samples": 1000, "delta": 0.05}


def random_record(n: int, exits: int, seed: int, levels: int = 0) -> Record:
    rng = np.random.default_rng(seed)
    seen = rng.normal(0.5 * np.arange(exits), 1.0, (n, exits)) + rng.normal(size=(n, 1))
    confidence = 1 / (1 + np.exp(-seen))
    if levels:
        confidence = np.rint(confidence * levels) / levels
    label = rng.integers(0, 4, n)
    wrong = rng.normal(0, 0.7, seen.shape) > seen + 1.0
    return Record(confidence.astype(np.float32), (label[:, None] + wrong) % 4, label, np.arange(n))


def flat_costs(exits: int) -> Costs:
    head = np.full(exits, 0.05)
    return Costs(np.ones(exits), head, np.append(head[1:], 0.0))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 300), st.integers(1, 5), st.sampled_from([0, 1, 5]), st.integers(0, 10**6))
def test_thresholds_only_fall_from_the_full_network_on(
    n: int, exits: int, levels: int, seed: int
) -> None:
    record = random_record(n, exits, seed, levels)

    family = learn(record, flat_costs(exits), **GOAL)

    rows = family.thresholds
    assert family.name == "path"
    assert (rows[0] == np.inf).all()
    assert (rows[1:] <= rows[:-1]).all()
    assert (rows[1:] < rows[:-1]).any(axis=1).all()
    for k in range(exits - 1):
        assert not np.isin(rows[:, k], record.confidence[:, k]).any()
    tally = family.tally(record)
    assert tally.rates.sum(axis=1) == pytest.approx(np.ones(len(rows)) if n else 0.0)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 300), st.sampled_from([0, 5]), st.integers(0, 10**6))
def test_neither_order_nor_names_of_classes_matter(n: int, levels: int, seed: int) -> None:
    record, costs = random_record(n, 4, seed, levels), flat_costs(4)
    shuffled = record.take(np.random.default_rng(seed).permutation(n))
    names = np.array([9, 2, 5, 3])
    renamed = Record(record.confidence, names[record.predicted], names[record.label], record.ids)

    path = learn(record, costs, **GOAL).thresholds

    assert (learn(shuffled, costs, **GOAL).thresholds == path).all()
    assert (learn(renamed, costs, **GOAL).thresholds == path).all()


def test_more_samples_than_are_searched_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeexit.nested._SEARCHED", 900)
    monkeypatch.setattr("edgeexit.nested._SCOUTED", 300)
    record = synthetic(2000, 3)
    shuffled = record.take(np.random.default_rng(0).permutation(2000))

    path = learn(record, SYNTHETIC_COSTS, **GOAL).thresholds

    assert len(path) > 50
    assert (learn(shuffled, SYNTHETIC_COSTS, **GOAL).thresholds == path).all()


def test_the_path_reaches_from_strict_to_loose_in_small_steps() -> None:
    tuning = synthetic(2000, 1)

    family = learn(tuning, SYNTHETIC_COSTS, **GOAL)

    tally = family.tally(tuning)
    assert 60 <= len(family) <= 250
    assert tally.harmful[1] <= 2
    assert tally.drop[-1] > 0.1
    steps = np.diff(tally.harmful) / 2000
    assert steps.max() < 0.05
    assert steps[tally.drop[1:] < 0.05].max() < 0.01


def test_an_exit_whose_head_eats_its_saving_is_left_out() -> None:
    tuning = synthetic(2000, 2)
    dear = Costs([1.0] * 4, [0.1, 1.5, 0.06, 0.03], [0.03, 0.03, 0.03, 0.0])

    kept = np.isfinite(learn(tuning, dear, **GOAL).thresholds).any(axis=0)

    assert kept.tolist() == [True, False, True]


def test_exits_that_know_nothing_leave_the_full_network() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 10, 1500)
    guesses = np.column_stack([rng.integers(0, 10, (1500, 2)), label])
    record = Record(rng.random((1500, 3), np.float32), guesses, label, np.arange(1500))

    family = learn(record, flat_costs(3), **GOAL)

    tally = family.tally(record)
    passed = certify.p_values(tally, 0.01, 0.05, tally)
    last = certify.last_certified(passed, 0.05)
    best = int(family.mean_costs(tally, flat_costs(3))[: last + 1].argmin())
    assert tally.rates[best, -1] > 0.95


@pytest.mark.parametrize(("samples", "bar"), [(1000, 0.74), (10_000, 0.90)])
def test_certified_saving_against_the_oracle(samples: int, bar: float) -> None:
    savings, broken, draws = [], 0, 12
    world = synthetic(60_000, 0)
    for seed in range(draws):
        tuning = synthetic(samples, 2 * seed + 1)
        certificate = synthetic(samples, 2 * seed + 2)
        family = learn(tuning, SYNTHETIC_COSTS, level=0.01, samples=samples, delta=0.05)
        prior = family.tally(tuning)
        passed = certify.p_values(family.tally(certificate), 0.01, 0.05, prior)
        last = certify.last_certified(passed, 0.05)
        both = family.tally(tuning.joined(certificate))
        place = int(family.mean_costs(both, SYNTHETIC_COSTS)[: last + 1].argmin())
        taken = Family(name="taken", thresholds=family.thresholds[[0, place]])
        truth = taken.tally(world)
        savings.append(1 - taken.mean_costs(truth, SYNTHETIC_COSTS)[1] / SYNTHETIC_COSTS.full)
        broken += int(truth.drop[1] > 0.01)

    assert np.mean(savings) >= bar * ORACLE_SAVING
    assert broken <= 3


def test_on_one_path_a_tighter_level_is_never_cheaper() -> None:
    tuning, certificate = synthetic(1000, 1), synthetic(1000, 2)
    family = learn(tuning, SYNTHETIC_COSTS, **GOAL)
    tally = family.tally(certificate)
    means = family.mean_costs(tally, SYNTHETIC_COSTS)
    least = []
    for level in (0.004, 0.006, 0.01, 0.02, 0.05):
        last = certify.last_certified(certify.p_values(tally, level, 0.05), 0.05)
        least.append(means[: last + 1].min())

    assert least == sorted(least, reverse=True)

import math
from dataclasses import replace

import numpy as np
import pytest
from small import DIGEST, EXITS, made_profile, made_record, small_bundle

from edgeexit import bounds, tune
from edgeexit.errors import BadFile, OutOfReach, UsageError
from edgeexit.overlap import Bloom
from edgeexit.policy import DROPPED, Confidence, Policy
from edgeexit.search import leaves_at


def harmful_on(record, policy: Policy, split: str) -> int:
    rows = record.rows(split)
    scores = np.stack(
        [
            Confidence(policy.measure, spec).many(record.logits[rows, k])
            for k, spec in enumerate(record.specs[:-1])
        ],
        axis=1,
    )
    leaves = leaves_at(scores, policy.thresholds)
    right = record.correct()[rows]
    return int((right[:, -1] & ~right[np.arange(len(rows)), leaves]).sum())


def test_the_policy_keeps_its_bound_on_tuning_and_saves_time() -> None:
    record = made_record()
    policy = tune.choose(record, made_profile(), 0.01)
    harmful = harmful_on(record, policy, "tuning")
    assert harmful <= 12
    assert bounds.upper_bound(harmful, 2000) <= 0.01
    assert policy.check["harmful"] == harmful_on(record, policy, "certificate")
    assert policy.check["kind"] == "checked"
    assert policy.expected["speed_up_full"] > 1.2
    assert sum(policy.expected["exit_rates"]) == pytest.approx(1.0)


def test_equal_inputs_give_equal_policies_in_any_order_of_samples() -> None:
    record, profile = made_record(), made_profile()
    order = np.random.default_rng(3).permutation(len(record))
    shuffled = replace(
        record,
        **{n: getattr(record, n)[order] for n in ("logits", "labels", "ids", "digests", "splits")},
    )
    first, second = tune.choose(record, profile, 0.01), tune.choose(shuffled, profile, 0.01)
    assert first.thresholds == second.thresholds
    assert first == tune.choose(record, profile, 0.01)


def test_a_tighter_target_is_never_cheaper() -> None:
    record, profile = made_record(4000), made_profile()
    costs = [
        tune.choose(record, profile, drop).provenance["tuning"]["mean_ms"]
        for drop in (0.002, 0.005, 0.01, 0.02)
    ]
    assert costs == sorted(costs, reverse=True)


def test_trying_all_measures_is_at_least_as_good_as_each() -> None:
    record, profile = made_record(), made_profile()

    def cost(measure: str | None) -> float:
        policy = tune.choose(record, profile, 0.01, measure)
        return float(policy.provenance["tuning"]["mean_ms"])

    assert cost(None) == min(cost(name) for name in ("max_prob", "margin", "peak"))


def test_exits_that_do_not_pay_are_dropped() -> None:
    # Segment 1 costs nothing beyond its head: leaving at exit 0 saves nothing against exit 1.
    policy = tune.choose(made_record(), made_profile((100e3, 1.0, 100e3), head=20e3), 0.01)
    assert DROPPED in policy.thresholds
    assert len(policy.kept) < 3


def test_a_network_whose_exits_save_nothing_runs_to_the_end() -> None:
    policy = tune.choose(made_record(skill=(0.0, 0.0, 7.0)), made_profile(head=90e3), 0.01)
    assert policy.kept == EXITS[-1:]
    assert policy.thresholds == (math.inf, math.inf)
    assert policy.expected["speed_up_full"] == pytest.approx(1.0)


def test_the_best_static_rival_is_the_cheapest_single_exit_within_the_budget() -> None:
    policy = tune.choose(made_record(skill=(0.0, 9.0, 9.0)), made_profile(), 0.3)
    assert tune.best_static_exit(policy) == "exit1"
    assert tune.best_static_exit(tune.choose(made_record(), made_profile(), 0.01)) == "exit2"


def test_too_few_labels_say_how_many_are_missing() -> None:
    with pytest.raises(OutOfReach, match="199 labels are missing"):
        tune.choose(made_record(100, 100), made_profile(), 0.01)


def test_a_failing_check_is_out_of_reach() -> None:
    with pytest.raises(OutOfReach, match="failed its check"):
        tune.choose(made_record(shift=0.2), made_profile(), 0.01)


def test_a_record_without_certificate_is_refused() -> None:
    with pytest.raises(UsageError, match="no samples of the split 'certificate'"):
        tune.choose(made_record(2000, 0), made_profile(), 0.01)


@pytest.mark.parametrize("drop", [0.0, 1.0, math.nan, -1.0])
def test_a_senseless_target_is_refused(drop: float) -> None:
    with pytest.raises(UsageError, match="accuracy drop"):
        tune.choose(made_record(), made_profile(), drop)


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(UsageError, match="no confidence measure named 'maxprob'"):
        tune.choose(made_record(), made_profile(), 0.01, "maxprob")


def test_record_and_profile_of_different_bundles_are_refused() -> None:
    with pytest.raises(BadFile, match="the profile of"):
        tune.choose(made_record(), made_profile(bundle_digest="c" * 64), 0.01)


def test_inputs_of_something_else_or_used_before_are_refused(tmp_path) -> None:
    record, profile = made_record(), made_profile()
    bloom = Bloom.of(record.digests[:500]).to_bytes()
    plain = small_bundle(tmp_path / "plain")
    ranged = small_bundle(tmp_path / "ranged", ranges_digests=record.digests[5:8])
    trained = small_bundle(tmp_path / "trained", training_bloom=bloom)

    def check(bundle, record=record, profile=profile, device="host") -> None:
        fit = replace(record, bundle_digest=bundle.digest)
        tune.check_inputs(bundle, fit, replace(profile, bundle_digest=bundle.digest), device)

    check(plain)
    with pytest.raises(BadFile, match=f"the record is of bundle {DIGEST[:12]}"):
        tune.check_inputs(plain, record, profile, "host")
    with pytest.raises(BadFile, match="measured on 'host', expected 'rpi4'"):
        check(plain, device="rpi4")
    with pytest.raises(BadFile, match="3 samples were already used for the activation ranges"):
        check(ranged)
    with pytest.raises(BadFile, match="were used for training"):
        check(trained)
    twice = np.array(record.digests)
    twice[2000:2007] = twice[:7]
    with pytest.raises(BadFile, match="7 samples are in both"):
        check(plain, record=replace(record, digests=twice))

import math
from dataclasses import replace

import numpy as np
import pytest
from small import DIGEST, EXITS, made_energy, made_profile, made_record, record_of, small_bundle

from edgeexit import tune
from edgeexit.cli import entry
from edgeexit.decision import leaves_at
from edgeexit.errors import BadFile, Disturbed, OutOfReach, UsageError
from edgeexit.ledger import Entry
from edgeexit.overlap import Bloom
from edgeexit.policy import DROPPED, Confidence, Policy
from edgeexit.request import Request, check_inputs, check_verdict
from edgeexit.state import Reading
from edgeexit.targets import quantile_ns


def tuned(record, profile, drop: float, measure: str | None = None, **more: object) -> Policy:
    request = asked(measure, max_accuracy_drop=drop)
    return tune.tune(record, profile, request, **more).policy


def asked(measure: str | None = None, **target: object) -> Request:
    return Request(target=tune.Target(**target), measure=measure)


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


def test_the_certificate_counts_what_the_policy_does_and_it_saves_time() -> None:
    record = made_record()
    policy = tuned(record, made_profile(), 0.01)
    held = policy.certificate

    assert held["harmful"] == harmful_on(record, policy, "certificate")
    assert held["p_value"] <= held["delta"] == pytest.approx(0.05)
    assert held["path"][held["position"]] == [
        t if math.isfinite(t) else str(t) for t in policy.thresholds
    ]
    assert policy.expected["worth"]["early_exit_pays"]
    assert sum(policy.expected["exit_rates"]) == pytest.approx(1.0)


def test_equal_inputs_give_equal_policies_in_any_order_of_samples() -> None:
    record, profile = made_record(), made_profile()
    order = np.random.default_rng(3).permutation(len(record))
    shuffled = replace(
        record,
        **{n: getattr(record, n)[order] for n in ("logits", "labels", "ids", "digests", "splits")},
    )
    first, second = tuned(record, profile, 0.01), tuned(shuffled, profile, 0.01)
    assert first.thresholds == second.thresholds
    assert first == tuned(record, profile, 0.01)


def test_a_tighter_target_is_never_cheaper() -> None:
    record, profile = made_record(4000, 4000), made_profile()
    costs = [
        tuned(record, profile, drop).expected["mean_ms"] for drop in (0.002, 0.005, 0.01, 0.02, 0.1)
    ]
    assert costs == sorted(costs, reverse=True)


def test_of_all_measures_one_is_taken_and_named() -> None:
    policy = tuned(made_record(), made_profile(), 0.01)

    assert policy == replace(
        tuned(made_record(), made_profile(), 0.01, policy.measure), provenance=policy.provenance
    )
    assert policy.provenance["measures_tried"] == ["max_prob", "margin", "peak"]


def test_each_class_of_the_network_has_an_offset_whether_it_was_seen_on_tuning_or_not() -> None:
    record = made_record(100, 400, classes=12)
    record.logits[record.rows("tuning"), :, 10:] = -128
    request = Request(target=tune.Target(max_accuracy_drop=0.3), method="class")

    policy = tune.tune(record, made_profile(), request).policy
    assert policy.class_offsets
    assert {len(row) for row in policy.class_offsets.values()} == {12}


def test_exits_that_do_not_pay_are_dropped() -> None:
    # Segment 1 costs nothing beyond its head: leaving at exit 0 saves nothing against exit 1.
    policy = tuned(made_record(), made_profile((100e3, 1.0, 100e3), head=20e3), 0.01)
    assert DROPPED in policy.thresholds
    assert len(policy.kept) < 3


def test_a_network_whose_exits_save_nothing_runs_to_the_end() -> None:
    policy = tuned(made_record(skill=(0.0, 0.0, 7.0)), made_profile(head=90e3), 0.01)
    assert policy.kept == EXITS[-1:]
    assert policy.thresholds == (math.inf, math.inf)
    assert policy.expected["mean_ms"] == pytest.approx(policy.expected["full_ms"])
    assert not policy.expected["worth"]["early_exit_pays"]


def test_the_best_static_rival_is_the_cheapest_single_exit_within_the_budget() -> None:
    policy = tuned(made_record(skill=(0.0, 9.0, 9.0)), made_profile(), 0.3)
    assert tune.best_static_exit(policy) == "exit1"
    assert tune.best_static_exit(tuned(made_record(), made_profile(), 0.01)) == "exit2"


@pytest.mark.parametrize(("level", "needed"), [(0.01, 299), (0.005, 598)])
def test_too_few_labels_say_how_many_are_missing(level: float, needed: int) -> None:
    with pytest.raises(OutOfReach, match=f"{needed - 100} labels are missing"):
        tuned(made_record(100, 100), made_profile(), level)
    tuned(made_record(100, needed), made_profile(), level)


def test_a_first_use_of_a_ledger_needs_more_labels() -> None:
    use = Entry(use=1, request="0" * 64, at="", facts={}, digest="")
    with pytest.raises(OutOfReach, match="248 labels are missing"):
        tuned(made_record(100, 100), made_profile(), 0.01, use=use)
    with pytest.raises(OutOfReach, match="597 labels are missing"):
        tuned(made_record(100, 100), made_profile(), 0.005, use=use)


def test_samples_that_are_worse_than_tuning_cost_savings_not_the_promise() -> None:
    record = made_record(shift=0.2)
    policy = tuned(record, made_profile(), 0.01)
    rows = record.rows("certificate")

    assert harmful_on(record, policy, "certificate") <= 0.01 * len(rows)


def test_a_record_without_certificate_is_refused() -> None:
    with pytest.raises(UsageError, match="no samples of the split 'certificate'"):
        tuned(made_record(2000, 0), made_profile(), 0.01)


@pytest.mark.parametrize("drop", [0.0, 1.0, math.nan, -1.0])
def test_a_senseless_target_is_refused(drop: float) -> None:
    with pytest.raises(UsageError, match="accuracy drop"):
        tuned(made_record(), made_profile(), drop)


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(UsageError, match="no confidence measure named 'maxprob'"):
        tuned(made_record(), made_profile(), 0.01, "maxprob")


def test_record_and_profile_of_different_bundles_are_refused() -> None:
    with pytest.raises(BadFile, match="the profile of"):
        tuned(made_record(), made_profile(bundle_digest="c" * 64), 0.01)


def test_inputs_of_something_else_or_used_before_are_refused(tmp_path) -> None:
    record, profile = made_record(classes=4), made_profile()
    bloom = Bloom.of(record.digests[:500]).to_bytes()
    plain = small_bundle(tmp_path / "plain")
    ranged = small_bundle(tmp_path / "ranged", ranges_digests=record.digests[5:8])
    trained = small_bundle(tmp_path / "trained", training_bloom=bloom)

    def check(bundle, record=record, profile=profile, device="host") -> None:
        fit = replace(record, bundle_digest=bundle.digest, specs=bundle.logits)
        check_inputs(bundle, fit, replace(profile, bundle_digest=bundle.digest), device)

    check(plain)
    with pytest.raises(BadFile, match=f"the record is of bundle {DIGEST[:12]}"):
        check_inputs(plain, record, profile, "host")
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


# ---------------------------------------------------------------- sets that were not timed

SIX = ("a", "b", "c", "d", "e", "f")
SKILL = (0.0, 4.0, 0.0, 5.5, 0.0, 8.0)


def six_exits():
    """A record of 600 tuning samples, and a profile of costs that add up."""
    record = made_record(600, 600, exits=SIX, skill=SKILL)
    return record, made_profile([60e3] * 6, head=8e3, exits=SIX)


def test_with_many_exits_sets_that_were_not_timed_are_priced_and_marked() -> None:
    record, profile = six_exits()
    policy = tuned(record, profile, 0.02, "max_prob")
    costs = policy.provenance["costs"]

    assert policy.kept not in profile.kept_sets()
    assert costs["origin"] == "fitted"
    assert costs["kept"] == list(policy.kept)
    assert costs["worst_residual"] < 1e-6
    for name, ms in policy.expected["exit_ms"].items():
        heads = policy.kept.index(name) + 1
        assert ms == pytest.approx((60e3 * (SIX.index(name) + 1) + 8e3 * heads) / 1e6)


def test_sets_that_were_timed_are_marked_so() -> None:
    policy = tuned(made_record(), made_profile(), 0.01)

    assert policy.provenance["costs"] == {"origin": "measured", "kept": list(policy.kept)}


def test_a_profile_of_the_full_set_alone_still_makes_a_policy() -> None:
    # As in paced mode: nothing else can be priced from it.
    profile = made_profile(sets=[EXITS, EXITS[-1:]])
    policy = tuned(made_record(), profile, 0.01)

    assert policy.kept in (EXITS, EXITS[-1:])
    assert policy.provenance["costs"]["origin"] == "measured"


# ---------------------------------------------------------------- budgets


def test_a_latency_budget_takes_the_most_accurate_policy_within_it() -> None:
    record, profile = made_record(), made_profile()
    drops = []
    for budget in (0.2, 0.24, 0.28, 0.32):
        found = tune.tune(record, profile, asked(latency_budget_ms=budget))
        assert found.policy.expected["mean_ms"] <= budget
        drops.append(found.policy.certificate["drop"])
    assert drops == sorted(drops, reverse=True)


def test_a_budget_below_the_first_exit_is_out_of_reach() -> None:
    with pytest.raises(OutOfReach, match="no policy is certified"):
        tune.tune(made_record(), made_profile(), asked(latency_budget_ms=0.06))


def test_a_policy_that_loses_much_has_rivals_that_lose_as_much() -> None:
    """Where only a budget was asked for, an exit alone may lose what the policy loses."""
    found = tune.tune(made_record(), made_profile(), asked(latency_budget_ms=0.28))
    everyone = tune.Policy(thresholds=(0.0,) + (math.inf,) * (len(EXITS) - 2))
    assert found.certificate.loss[:, 0].mean() > 0.01

    target = asked(latency_budget_ms=0.28).target
    worth = tune.contest(everyone, found.certificate, made_profile(), target)

    assert EXITS[0] in [row.name for row in worth.rows if row.kind == "static"]
    assert not worth.pays


def test_two_targets_hold_together_and_share_the_risk() -> None:
    request = asked(max_accuracy_drop=0.02, latency_budget_ms=0.29)
    policy = tune.tune(made_record(), made_profile(), request).policy
    assert policy.certificate["delta"] == pytest.approx(0.025)
    assert policy.expected["mean_ms"] <= 0.29
    tight = asked(max_accuracy_drop=0.001, latency_budget_ms=0.12)
    with pytest.raises(OutOfReach):
        tune.tune(made_record(4000, 4000), made_profile(), tight)


def test_a_p95_keeps_the_share_of_late_answers_within_five_per_cent() -> None:
    # Leaving at exit1 takes 0.21 ms, at the end 0.31: at most 5 % may get there.
    profile = made_profile(blocks=40)  # so many calls that 1 % late ones would show
    policy = tune.tune(made_record(), profile, asked(p95_ms=0.25)).policy
    assert policy.expected["exit_rates"][2] < 0.05


@pytest.mark.parametrize(
    ("rates", "ms"),
    [((0.96, 0.02, 0.02), 0.105), ((0.94, 0.03, 0.03), 0.21), ((0.5, 0.44, 0.06), 0.315)],
)
def test_the_p95_of_a_policy_is_the_time_that_so_many_answers_keep(
    rates: tuple[float, ...], ms: float
) -> None:
    found = quantile_ns(made_profile(), EXITS, np.array(rates), 0.95)
    assert found == pytest.approx(ms * 1e6)
    assert quantile_ns(made_profile(), EXITS, np.array([0.0, 0.0, 1.0]), 0.95) >= found


def test_an_energy_budget_needs_joules() -> None:
    with pytest.raises(UsageError, match="no joules"):
        tune.tune(made_record(), made_profile(), asked(energy_budget_mj=3.0))


def test_energy_follows_time_at_one_power() -> None:
    plain = made_profile()
    pairs = [*((EXITS, name) for name in EXITS), *(((name,), name) for name in EXITS)]
    profile = replace(plain, energy=made_energy(plain, pairs, power_mw=3000.0))
    by_time = tuned(made_record(), profile, 0.01)
    request = asked(max_accuracy_drop=0.01, minimize="energy")
    by_energy = tune.tune(made_record(), profile, request).policy
    assert by_energy.thresholds == by_time.thresholds


# ---------------------------------------------------------------- what a profile is worth

THROTTLED = {"after": Reading(at_ns=9 * 10**9, throttled=4)}


def test_a_disturbed_profile_is_refused_with_its_reason_unless_accepted() -> None:
    record, profile = made_record(), made_profile(**THROTTLED)

    with pytest.raises(Disturbed, match="throttled") as caught:
        tuned(record, profile, 0.01)
    assert f"edgeexit profile --device {profile.device};" in caught.value.hint
    assert "--accept-disturbed" in caught.value.hint
    policy = tuned(record, profile, 0.01, accept_disturbed=True)
    assert policy.provenance["profile_verdict"]["status"] == "disturbed"


def test_what_the_profile_says_of_itself_does_not_count() -> None:
    # made_profile carries the verdict "clean", whatever its readings say.
    assert made_profile(**THROTTLED).verdict.status == "clean"
    with pytest.raises(Disturbed):
        check_verdict(made_profile(**THROTTLED))


def test_an_emulated_machine_is_never_accepted_and_sends_to_the_board() -> None:
    profile = made_profile(device="rpi4", emulated="qemu-user runs this program")

    for accept_disturbed in (False, True):
        with pytest.raises(Disturbed, match="qemu-user") as caught:
            check_verdict(profile, accept_disturbed=accept_disturbed)
        assert "on the board itself" in caught.value.hint
        assert caught.value.hint.endswith(f"edgeexit profile --device {profile.device}")


def test_a_profile_that_has_not_converged_is_noted_in_the_policy() -> None:
    policy = tuned(made_record(), made_profile(jitter=0.05, drift=0.05), 0.01)
    verdict = policy.provenance["profile_verdict"]

    assert verdict["status"] == "not converged"
    assert verdict["reasons"]


def test_the_command_refuses_warns_and_writes(tmp_path, capsys) -> None:
    bundle = small_bundle(tmp_path)
    record_of(bundle).save(tmp_path / "r.npz")
    profile = made_profile(bundle_digest=bundle.digest, **THROTTLED)
    profile.save(tmp_path / "p.json")
    command = ["tune", str(bundle.path), "--device", "host", "--measure", "margin"]
    command += [
        "--ledger",
        str(tmp_path / "l.json"),
        "--record",
        str(tmp_path / "r.npz"),
        "--profile",
        str(tmp_path / "p.json"),
    ]

    assert entry(command) == Disturbed.exit_code
    assert "DISTURBED" in capsys.readouterr().err
    assert bundle.policy_for("host") is None
    assert entry([*command, "--accept-disturbed"]) == 0
    said = capsys.readouterr()
    assert "p.json: DISTURBED" in said.err
    assert "DISTURBED" in said.out
    assert bundle.policy_for("host") is not None


def test_the_command_takes_no_profile_of_an_emulated_machine(tmp_path, capsys) -> None:
    bundle = small_bundle(tmp_path)
    record_of(bundle).save(tmp_path / "r.npz")
    emulated = made_profile(bundle_digest=bundle.digest, emulated="qemu-user runs this program")
    emulated.save(tmp_path / "p.json")
    names = {"record": "r.npz", "profile": "p.json", "ledger": "l.json"}
    files = [f"--{what}={tmp_path / name}" for what, name in names.items()]
    command = ["tune", str(bundle.path), "--device", "host", *files, "--accept-disturbed"]

    assert entry(command) == Disturbed.exit_code
    assert "qemu-user" in capsys.readouterr().err
    assert bundle.policy_for("host") is None
    assert not (tmp_path / "l.json").exists()


# ---------------------------------------------------------------- joules


def test_joules_of_the_profile_reach_the_policy_with_their_label() -> None:
    plain = made_profile()
    pairs = [*((EXITS, name) for name in EXITS), (EXITS[-1:], EXITS[-1])]
    profile = replace(plain, energy=made_energy(plain, pairs, power_mw=3000.0, label="partial"))
    expected = tuned(made_record(), profile, 0.01).expected

    # At the same power everywhere, joules follow the time: 3 W times ms is mJ / 3.
    assert expected["energy_label"] == "partial"
    assert expected["full_mj"] == pytest.approx(3 * expected["full_ms"], rel=0.01)
    assert expected["mean_mj"] == pytest.approx(3 * expected["mean_ms"], rel=0.01)


def test_a_smaller_set_takes_its_time_at_the_power_of_the_same_exits() -> None:
    plain = made_profile((100e3, 1.0, 100e3), head=20e3)
    pairs = [*((EXITS, name) for name in EXITS), (EXITS[-1:], EXITS[-1])]
    profile = replace(plain, energy=made_energy(plain, pairs))
    policy = tuned(made_record(), profile, 0.01)

    assert policy.kept != EXITS
    assert policy.expected["energy_origin"] == "fitted"
    assert policy.expected["mean_mj"] == pytest.approx(3 * policy.expected["mean_ms"], rel=0.01)


def test_without_joules_of_the_whole_network_none_are_promised() -> None:
    plain = made_profile()
    energy = made_energy(plain, [(EXITS, name) for name in EXITS])
    expected = tuned(made_record(), replace(plain, energy=energy), 0.01).expected

    assert "mean_mj" not in expected
    assert "mean_mj" not in tuned(made_record(), plain, 0.01).expected

"""
Choose exits and thresholds, with a promise: records, a profile and a target in, a policy out.

Callers see choose, which works on arrays alone, and tune, which does the same with the files of a
bundle. Both are pure: the same inputs give the same policy. A method makes a family of policies
from the split `tuning` alone; one pass over `certificate` then tells which of them keep the
target, all at once; among those the cheapest is taken. Hidden here: which samples may decide what.
Measure, method and family are fixed before the certificate is looked at, and all statements made
about it share one risk of being wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__, certify, families, ledger, policy
from edgeexit.blocks import DISTURBED, EMULATED, Verdict
from edgeexit.bundle import Bundle
from edgeexit.decision import Costs, Family, Floats, Policy, Record, Tally
from edgeexit.errors import BadFile, Disturbed, OutOfReach, UsageError
from edgeexit.evaluate import Record as RecordFile
from edgeexit.families import METHODS, Goal, Method
from edgeexit.files import Table, digest_of, json_bytes
from edgeexit.names import choose as choose_name
from edgeexit.overlap import SIGNIFICANCE, Bloom, overlap_count
from edgeexit.policy import MEASURES, Confidence
from edgeexit.prices import Prices
from edgeexit.profile import Profile
from edgeexit.targets import ENERGY, Target, late_p_values, mean_p_values, share_later
from edgeexit.verdict import judge
from edgeexit.worth import MJ, MS, Rival, Worth, judge_worth

__all__ = ["Costs", "OutOfReach", "Policy", "Record", "Target", "choose", "tune"]

TUNING, CERTIFICATE = "tuning", "certificate"
FIXED = "fixed"

# Without a cap on the accuracy drop, families for these are looked at on tuning.
_LEVELS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)

# kept, bool (E,) -> what leaving at each exit costs, float64 (E,); NaN where it cannot be left.
Pricing = Callable[[NDArray[np.bool_]], Floats]


# ---------------------------------------------------------------- on arrays


def choose(
    tuning: Record,
    certificate: Record,
    costs: Costs,
    *,
    max_accuracy_drop: float,
    confidence: float = 0.95,
    method: str | Method = "path",
    seed: int = 0,
) -> Policy:
    """
    The cheapest policy whose accuracy drop is certified to be at most *max_accuracy_drop*.

    With probability *confidence* over independent draws of *certificate*, the reference's accuracy
    less the policy's is at most that on samples drawn alike (unless the method's promise says
    otherwise). *method* is a name in METHODS or a Method. PATH-FST: a nested path of policies is
    learned on *tuning* and tested in sequence on all of *certificate* (Angelopoulos et al., arXiv
    2110.01052). Ties, order and numbering of samples do not matter; *seed* is only written down,
    since nothing is drawn. UsageError for targets, records and costs that do not fit, samples that
    are in both splits included; OutOfReach with the number of labels that are missing.
    """
    target = Target(max_accuracy_drop=max_accuracy_drop, confidence=confidence)
    name, made = _method(method)
    if tuning.exits != certificate.exits or len(costs.backbone) != tuning.exits:
        raise UsageError(
            f"{tuning.exits} exits in tuning, {certificate.exits} in certificate, "
            f"{len(costs.backbone)} in costs: expected the same number"
        )
    if len(tuning) == 0:
        raise UsageError("tuning: no samples, expected at least one")
    shared = np.intersect1d(tuning.ids.astype(str), certificate.ids.astype(str))
    if len(shared):
        raise UsageError(
            f"{len(shared)} sample ids are in both tuning and certificate (the first: {shared[0]})",
            hint="make disjoint splits",
        )
    check_feasible(len(certificate), target, 1.0 - confidence)
    if tuning.exits == 1:
        return Policy(thresholds=())
    found = _decide(made, tuning, certificate, costs, costs.at, target, 1.0 - confidence)
    return replace(
        found.policy, certificate={"method": name, **found.certificate(target, seed, made)}
    )


def check_feasible(samples: int, target: Target, delta: float) -> None:
    """OutOfReach, with the number of labels missing, if so few can never show *target*."""
    if target.max_accuracy_drop is None:
        return
    level, share = target.max_accuracy_drop, delta / target.caps
    needed = certify.fewest_samples(level, share)
    if samples < needed:
        raise OutOfReach(
            f"{samples} certificate samples cannot certify a drop of at most {level:g} at "
            f"{1 - share:.4g} confidence: {needed - samples} labels are missing (at least "
            f"{needed} needed)",
            hint="label more samples, or allow a larger --max-accuracy-drop",
        )


def _method(method: str | Method) -> tuple[str, Method]:
    if isinstance(method, Method):
        return FIXED, method
    return method, choose_name(method, METHODS, "method")


@dataclass(frozen=True, kw_only=True, eq=False)
class _Decision:
    """The row *place* of *family*, of which first..last are certified."""

    family: Family
    place: int
    first: int
    last: int
    tuning: Tally
    certificate_tally: Tally
    costs: Floats  # (S,), mean over tuning and certificate
    p_values: Floats | None
    delta: float

    @property
    def policy(self) -> Policy:
        return self.family.policy(self.place)

    def certificate(self, target: Target, seed: int, method: Method) -> dict[str, Any]:
        rows, tally = self.family.thresholds[self.first : self.last + 1], self.certificate_tally
        level = target.max_accuracy_drop
        return {
            "family": self.family.name,
            "promise": method.promise if level is not None else "budgets alone",
            "level": level,
            "delta": self.delta,
            "confidence": target.confidence,
            "statements": target.caps,
            "test": None if level is None else certify.test_for(tally.samples),
            "samples": tally.samples,
            "tuning_samples": self.tuning.samples,
            "seed": seed,
            "path": [[t if math.isfinite(t) else str(t) for t in row] for row in rows.tolist()],
            "path_costs": self.costs[self.first : self.last + 1].tolist(),
            "certified": self.last - self.first,
            "position": self.place - self.first,
            "harmful": int(tally.harmful[self.place]),
            "helpful": int(tally.helpful[self.place]),
            "drop": float(tally.drop[self.place]),
            "p_value": None if self.p_values is None else float(self.p_values[self.place]),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class _Budgets:
    """What caps the cost: rows of p-values, float64 (S,), each of "this row breaks the cap"."""

    tests: tuple[Callable[[Family, Tally], Floats], ...] = ()

    def first_kept(self, family: Family, tally: Tally, delta: float) -> int:
        """The strictest row from which on, seen from the loosest, all caps are certified."""
        first = 0
        for test in self.tests:
            failing = np.flatnonzero(test(family, tally) > delta)
            first = max(first, int(failing[-1]) + 1 if len(failing) else 0)
        return first


_NO_BUDGETS = _Budgets()


def _row_costs(family: Family, pricing: Pricing) -> Floats:
    """What leaving at each exit costs under each policy, float64 (S, E)."""
    seen: dict[bytes, Floats] = {}
    rows = []
    for place in range(len(family)):
        kept = family.policy(place).kept
        if kept.tobytes() not in seen:
            seen[kept.tobytes()] = pricing(kept)
        rows.append(seen[kept.tobytes()])
    return np.array(rows)


def _kept_matrix(family: Family) -> NDArray[np.bool_]:
    """Which exits each policy computes, bool (S, E)."""
    final = np.ones((len(family), 1), np.bool_)
    return np.hstack([family.thresholds < np.inf, final])


def _means(rates: Floats, prices: Floats) -> Floats:
    return np.asarray((rates * np.where(rates > 0, prices, 0.0)).sum(axis=1))


def _decide(
    method: Method,
    tuning: Record,
    certificate: Record,
    costs: Costs,
    pricing: Pricing,
    target: Target,
    delta: float,
    budgets: _Budgets = _NO_BUDGETS,
) -> _Decision:
    """Family from *tuning*, tests on *certificate*, then the best of what is certified."""
    share = delta / target.caps
    family = _family(method, tuning, costs, target, share, len(certificate), budgets)
    tally = family.tally(certificate)
    seen = family.tally(tuning)
    prices = _row_costs(family, pricing)
    first, last, p_values = budgets.first_kept(family, tally, share), len(family) - 1, None
    level = target.max_accuracy_drop
    if level is not None:
        goal = Goal(level, share, len(certificate))
        certified = method.rule(family, certificate, tuning, goal)
        p_values = certify.p_values(tally, level, share, seen)
        # The full network is its own reference: it loses nothing, by definition.
        floor = 0 if certificate.reference_correct is None else -1
        last = floor if certified is None else certified
        if last < 0:
            raise OutOfReach(
                f"even the full network loses more than {level:g} against the reference, or too "
                f"few samples show otherwise: {int(tally.harmful[0])} of {len(certificate)} "
                f"became wrong, {int(tally.helpful[0])} right",
                hint="allow a larger --max-accuracy-drop, or leave --reference out",
            )
    if first > last:
        cheapest = float(np.min(_means(tally.rates, np.nan_to_num(prices, nan=np.inf))))
        raise OutOfReach(
            "no policy is certified to keep all that was asked for: "
            + (f"with the accuracy kept, up to row {last}; " if level is not None else "")
            + f"the budget from row {first} of {len(family)} on (the least mean cost of all is "
            + (f"{cheapest:.4g} mJ)" if target.minimize == ENERGY else f"{cheapest / 1e6:.4g} ms)"),
            hint="allow a larger budget or accuracy drop, or take a smaller network",
        )
    both = _pooled(seen, tally)
    # Sets of exits that the profile cannot price are not taken.
    unpriced = np.isnan(prices) & _kept_matrix(family)
    means = np.where(unpriced.any(axis=1), np.inf, _means(both, np.nan_to_num(prices)))
    rows = np.arange(first, last + 1)
    if level is not None:
        place = int(rows[means[rows].argmin()])
    else:
        lost = seen.harmful - seen.helpful + tally.harmful - tally.helpful
        place = int(min(rows, key=lambda row: (lost[row], means[row])))
    return _Decision(
        family=family,
        place=place,
        first=first,
        last=last,
        tuning=seen,
        certificate_tally=tally,
        costs=means,
        p_values=p_values,
        delta=share,
    )


def _pooled(a: Tally, b: Tally) -> Floats:
    return np.asarray((a.rates * a.samples + b.rates * b.samples) / (a.samples + b.samples))


def _family(
    method: Method,
    tuning: Record,
    costs: Costs,
    target: Target,
    delta: float,
    samples: int,
    budgets: _Budgets,
) -> Family:
    """The method's family for the target; without a level the one that keeps most on tuning."""
    if target.max_accuracy_drop is not None:
        return method.family(tuning, costs, Goal(target.max_accuracy_drop, delta, samples))
    best: tuple[float, Family] | None = None
    for level in _LEVELS:
        family = method.family(tuning, costs, Goal(level, delta, samples))
        seen = family.tally(tuning)
        first = budgets.first_kept(family, seen, delta)
        lost = float(seen.drop[first:].min(initial=math.inf))
        if best is None or lost < best[0]:
            best = (lost, family)
    assert best is not None
    return best[1]


# ---------------------------------------------------------------- on files


def seen_through(
    record: RecordFile,
    measure: str,
    rows: NDArray[np.int64],
    reference: NDArray[np.bool_] | None = None,
) -> Record:
    """The samples *rows* of *record* as the confidence *measure* sees them."""
    logits = record.logits[rows]
    columns = [Confidence(measure, spec).many(logits[:, k]) for k, spec in enumerate(record.specs)]
    return Record(
        np.stack(columns, axis=1),
        logits.argmax(axis=2),
        record.labels[rows],
        record.ids[rows],
        reference_correct=None if reference is None else reference[rows],
    )


def choose_measure(
    views: Mapping[str, Record],
    costs: Costs,
    target: Target,
    delta: float,
    samples: int,
    *,
    method: Method,
) -> str:
    """
    The confidence measure that promises the cheapest certified policy, judged on tuning alone.

    *views* are the tuning samples through each measure; the certificate is played with tuning's
    own rates at *samples* samples. The first of equals wins.
    """
    best: tuple[float, str] | None = None
    for name, view in views.items():
        level = target.max_accuracy_drop if target.max_accuracy_drop is not None else 0.01
        goal = Goal(level, delta / target.caps, samples)
        family = method.family(view, costs, goal)
        seen = family.tally(view)
        scale = samples / seen.samples
        played = replace(
            seen,
            harmful=np.ceil(seen.harmful * scale).astype(np.int64),
            helpful=np.floor(seen.helpful * scale).astype(np.int64),
            samples=samples,
        )
        p_values = certify.p_values(played, level, goal.delta, seen)
        last = max(0, certify.last_certified(p_values, goal.delta))
        cost = float(family.mean_costs(seen, costs)[: last + 1].min())
        if best is None or cost < best[0] * (1 - 1e-9):
            best = (cost, name)
    assert best is not None
    return best[1]


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """
    A policy, the verdict about it, and what it was chosen from.

    *family* holds all policies that were looked at, of which first..certified keep the target and
    *position* was taken; *tuning* and *certificate* are the samples as its measure sees them,
    *costs_ns* and *costs_mj* the parts (None: the profile holds no joules).
    """

    policy: policy.Policy
    worth: Worth
    method: Method
    goal: Goal
    family: Family
    first: int
    certified: int
    position: int
    tuning: Record
    certificate: Record
    costs_ns: Costs
    costs_mj: Costs | None


def tune(
    record: RecordFile,
    profile: Profile,
    target: Target,
    *,
    method: str = "path",
    thresholds: Sequence[float] | None = None,
    measure: str | None = None,
    reference: RecordFile | None = None,
    use: ledger.Entry | None = None,
    digests: Mapping[str, str | None] | None = None,
    seed: int = 0,
    accept_disturbed: bool = False,
) -> Tuned:
    """
    The best policy for *target* from the files of one bundle.

    *method* is a name in METHODS, or "fixed" with *thresholds*. *measure* is a name in MEASURES;
    None takes the one that does best on tuning. *reference* is a record of another network on the
    same samples, whose final exit the accuracy is compared with (None: the final exit of this
    one). *use* is the ledger's entry for this use of the certificate samples, which lowers what it
    may risk; None counts as the only use. *digests* are those of the files (None: as they would
    be saved now). OutOfReach if it cannot be certified, UsageError for a
    senseless target or a missing split, BadFile for files that do not fit together, Disturbed as
    check_verdict.
    """
    verdict = check_verdict(profile, accept_disturbed=accept_disturbed)
    check_request(
        record,
        profile,
        target,
        method=method,
        thresholds=thresholds,
        measure=measure,
        reference=reference,
    )
    made = families.fixed(thresholds) if thresholds is not None else _method(method)[1]
    names = list(MEASURES) if measure is None else [measure]
    rows, checks = _rows(record, TUNING), _rows(record, CERTIFICATE)
    delta = 1.0 - target.confidence
    if use is not None:
        delta = ledger.share(delta, use.use)
    check_feasible(len(checks), target, delta)
    right = None if reference is None else reference_correct(record, reference)
    prices = Prices(profile)
    costs, pricing, budgets = _costs(prices, target)
    views = {name: seen_through(record, name, rows, right) for name in names}
    chosen = names[0]
    if len(names) > 1:
        chosen = choose_measure(views, costs, target, delta, len(checks), method=made)
    tuning = views[chosen]
    certificate = seen_through(record, chosen, checks, right)
    found = _decide(made, tuning, certificate, costs, pricing, target, delta, budgets)
    worth = contest(found.policy, certificate, profile, target)
    held = {
        "method": method,
        "split": CERTIFICATE,
        **found.certificate(target, seed, made),
        "digests": dict(digests or input_digests(record, profile, reference)),
        "ledger": None
        if use is None
        else {"split": ledger.split_key(record.digests[checks]), **use.to_document()},
    }
    kept = _kept_names(record.exits, found.policy.kept)
    offsets = found.policy.class_offsets
    made_policy = policy.Policy(
        device=profile.device,
        bundle_digest=record.bundle_digest,
        measure=chosen,
        exits=record.exits,
        thresholds=found.policy.thresholds,
        class_offsets=None
        if offsets is None
        else {
            name: tuple(map(float, row))
            for name, row in zip(record.exits[:-1], offsets, strict=True)
            if name in kept
        },
        target=target.to_document(),
        expected=_expected(found.policy, kept, certificate, prices, worth),
        certificate=held,
        provenance={
            "made_by": __version__,
            "measure_asked": measure,
            "thresholds_asked": None if thresholds is None else list(map(str, thresholds)),
            "measures_tried": names,
            "calibration_set": {"name": record.set_name, "digest": record.set_digest},
            "reference": "the full int8 network" if reference is None else reference.bundle_digest,
            "profile_verdict": verdict.to_document(),
            "runtime": profile.runtime,
            "threads": profile.threads,
            "mode": str(profile.mode),
            "costs": prices.origin(kept),
        },
    )
    level = target.max_accuracy_drop
    return Tuned(
        policy=made_policy,
        worth=worth,
        method=made,
        goal=Goal(0.01 if level is None else level, delta / target.caps, len(checks)),
        family=found.family,
        first=found.first,
        certified=found.last,
        position=found.place,
        tuning=tuning,
        certificate=certificate,
        costs_ns=prices.parts_ns(),
        costs_mj=None if profile.energy is None else prices.parts_mj(),
    )


def contest(
    made: Policy,
    certificate: Record,
    profile: Profile,
    target: Target,
    rival: Rival | None = None,
) -> Worth:
    """
    The policy beside the static networks that it has to beat, on the certificate samples.

    An exit alone is a rival if the accuracy seen there drops by no more than the target allows
    (1 % if it allows anything): without a certificate, which is lenient towards rivals.
    """
    leaves = made.exits(certificate)
    right = int(certificate.correct[np.arange(len(certificate)), leaves].sum())
    counts = certificate.correct.sum(axis=0)
    level = 0.01 if target.max_accuracy_drop is None else target.max_accuracy_drop
    lost = certificate.loss.mean(axis=0)
    exits = profile.exits
    return judge_worth(
        np.bincount(leaves, minlength=len(exits)) / len(certificate),
        _kept_names(exits, made.kept),
        len(certificate),
        (right, len(certificate)),
        {
            name: (int(counts[k]), len(certificate))
            for k, name in enumerate(exits[:-1])
            if lost[k] <= level
        },
        (int(counts[-1]), len(certificate)),
        profile,
        rival,
        rate_hz=target.rate_hz,
        by=MJ if target.minimize == ENERGY else MS,
    )


def recompute(
    made: policy.Policy,
    record: RecordFile,
    profile: Profile,
    reference: RecordFile | None,
    use: ledger.Entry | None,
    digests: Mapping[str, str | None],
) -> policy.Policy:
    """
    The policy that tune makes again from the files, asked for what *made* says it was asked for.

    *use* and *digests* as in tune. BadFile if the policy does not say what it was asked for.
    """
    table = Table(made.to_document(), "policy")
    held, told = table.table("certificate"), table.table("provenance")
    method = held.get("method", str)
    measure = None if told.values.get("measure_asked") is None else told.get("measure_asked", str)
    return tune(
        record,
        profile,
        Target.from_document(table.table("target")),
        method=method,
        thresholds=thresholds_asked(told),
        measure=measure,
        reference=reference,
        use=use,
        digests=digests,
        seed=held.get("seed", int),
        accept_disturbed=True,
    ).policy


def thresholds_asked(provenance: Table) -> list[float] | None:
    """The thresholds that tune was given, None if it was given none. BadFile if they are none."""
    if provenance.values.get("thresholds_asked") is None:
        return None
    try:
        return [float(text) for text in provenance.list_of("thresholds_asked", str)]
    except ValueError as error:
        raise BadFile(f"{provenance.where}: thresholds_asked: expected numbers") from error


def input_digests(
    record: RecordFile, profile: Profile, reference: RecordFile | None
) -> dict[str, str | None]:
    """The digests of all that a policy is made of, as hexadecimal SHA-256."""
    return {
        "record": digest_of(record.to_bytes()),
        "reference": None if reference is None else digest_of(reference.to_bytes()),
        "bundle": record.bundle_digest,
        "profile": digest_of(json_bytes(profile.to_document())),
    }


def reference_correct(record: RecordFile, reference: RecordFile) -> NDArray[np.bool_]:
    """
    Whether the final exit of *reference* is right about each sample of *record*, bool (N,).

    Samples are found again by their digests. BadFile if one is missing or labelled otherwise.
    """
    places = {row.tobytes(): k for k, row in enumerate(reference.digests)}
    found = np.array([places.get(row.tobytes(), -1) for row in record.digests], np.int64)
    if (found < 0).any():
        raise BadFile(
            f"the reference's record lacks {int((found < 0).sum())} of {len(record)} samples",
            hint="make it of the same samples: edgeexit evaluate REFERENCE SET:tuning+certificate "
            "--policy none --record FILE.npz",
        )
    if (reference.labels[found] != record.labels).any():
        raise BadFile("the reference's record has other labels for the same samples")
    right: NDArray[np.bool_] = reference.correct()[found, -1]
    return right


def _check_pair(record: RecordFile, profile: Profile) -> None:
    if record.bundle_digest != profile.bundle_digest or record.exits != profile.exits:
        raise BadFile(
            f"the record is of bundle {record.bundle_digest[:12]}, "
            f"the profile of {profile.bundle_digest[:12]}",
            hint="make both with the same bundle",
        )
    if len(record.exits) == 1:
        raise UsageError(
            f"the bundle has one exit ({record.exits[0]!r}): nothing to choose",
            hint="edgeexit attach gives a network more exits",
        )


def _rows(record: RecordFile, split: str) -> NDArray[np.int64]:
    rows = record.rows(split)
    if not len(rows):
        have = ", ".join(sorted(set(map(str, record.splits)))) or "none"
        raise UsageError(
            f"the record has no samples of the split {split!r} (has: {have})",
            hint="edgeexit evaluate BUNDLE SET:tuning+certificate --record FILE.npz makes one",
        )
    return rows


def _kept_names(exits: Sequence[str], kept: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(name for name, is_kept in zip(exits, kept, strict=True) if is_kept)


def _costs(prices: Prices, target: Target) -> tuple[Costs, Pricing, _Budgets]:
    """Parts for the search, prices for the choice, and the tests of the budgets."""
    profile = prices.profile
    exits = profile.exits

    def latency(kept: NDArray[np.bool_]) -> Floats:
        names = _kept_names(exits, kept)
        found = prices.costs_ns(names)
        costs = dict(zip(names, found or [], strict=bool(found)))
        return np.array([costs.get(name, np.nan) for name in exits])

    def energy(kept: NDArray[np.bool_]) -> Floats:
        return np.array([prices.energy_mj(_kept_names(exits, kept), name) for name in exits])

    parts = prices.parts_ns()

    def mean_test(pricing: Pricing, budget: float) -> Callable[[Family, Tally], Floats]:
        return lambda family, tally: mean_p_values(
            tally.rates, tally.samples, _row_costs(family, pricing), budget
        )

    tests: list[Callable[[Family, Tally], Floats]] = []
    if target.latency_budget_ms is not None:
        tests.append(mean_test(latency, target.latency_budget_ms * 1e6))
    if target.energy_budget_mj is not None:
        tests.append(mean_test(energy, target.energy_budget_mj))
    if target.p95_ms is not None:
        limit_ns = target.p95_ms * 1e6

        def late(kept: NDArray[np.bool_]) -> Floats:
            names = _kept_names(exits, kept)
            shares = [
                share_later(profile, names, name, limit_ns) if is_kept else 1.0
                for name, is_kept in zip(exits, kept, strict=True)
            ]
            return np.array(shares)

        tests.append(
            lambda family, tally: late_p_values(
                tally.rates, tally.samples, _row_costs(family, late)
            )
        )
    pricing = energy if target.minimize == ENERGY else latency
    return parts, pricing, _Budgets(tests=tuple(tests))


def _expected(
    found: Policy,
    kept: tuple[str, ...],
    checked: Record,
    prices: Prices,
    worth: Worth,
) -> dict[str, Any]:
    """What to expect on new samples, read off the certificate split, costs off the profile."""
    profile = prices.profile
    exits = profile.exits
    leaves = found.exits(checked)
    rates = np.bincount(leaves, minlength=len(exits)) / len(checked)
    costs = dict(zip(kept, prices.costs_ns(kept) or [], strict=True))
    mean_ns = float(sum(rates[exits.index(name)] * cost for name, cost in costs.items()))
    full_ns = profile.value_ns(profile.full)
    return {
        "split": CERTIFICATE,
        "samples": len(checked),
        "accuracy": worth.rows[0].accuracy.value,
        "accuracy_full": float(checked.correct[:, -1].mean()),
        "accuracy_reference": float(checked.reference.mean()),
        "exit_accuracy": checked.correct.mean(axis=0).tolist(),
        "exit_rates": rates.tolist(),
        "exit_ms": {name: cost / 1e6 for name, cost in costs.items()},
        "mean_ms": mean_ns / 1e6,
        "full_ms": full_ns / 1e6,
        **prices.energy(costs, dict(zip(exits, rates.tolist(), strict=True))),
        "worth": worth.to_document(),
    }


def best_static_exit(made: policy.Policy) -> str:
    """The cheapest single exit within the budget, as tune found it."""
    return str(made.expected["worth"]["static_exit"])


# ---------------------------------------------------------------- inputs that must fit


def check_verdict(profile: Profile, *, accept_disturbed: bool = False) -> Verdict:
    """
    What the values of *profile*, judged anew, say about it; what it says itself is not asked.

    Disturbed if the machine was not itself meanwhile or is emulated, unless *accept_disturbed*.
    A profile that has not converged passes: its costs are right, but less sure than asked for.
    """
    verdict = judge(profile)
    if verdict.status in (DISTURBED, EMULATED) and not accept_disturbed:
        where = (
            f"on the {profile.device} itself"
            if verdict.status == EMULATED
            else "while nothing else runs"
        )
        raise Disturbed(
            f"the profile of {profile.bundle_name} cannot be trusted: {verdict}",
            hint=f"measure again {where} with: edgeexit profile; or take it as it is with "
            "--accept-disturbed",
        )
    return verdict


def check_request(
    record: RecordFile,
    profile: Profile,
    target: Target,
    *,
    method: str = "path",
    thresholds: Sequence[float] | None = None,
    measure: str | None = None,
    reference: RecordFile | None = None,
) -> None:
    """
    Refuse what tune cannot do whatever the samples say, so that no use of them is counted for it.

    UsageError or BadFile, as tune.
    """
    _check_pair(record, profile)
    if (method == FIXED) != (thresholds is not None):
        raise UsageError("thresholds: expected with the method 'fixed', and only there")
    if method != FIXED:
        _method(method)
    for name in MEASURES if measure is None else [measure]:
        choose_name(name, MEASURES, "confidence measure")
        for spec in record.specs:
            Confidence(name, spec)
    if thresholds is not None:
        if measure is None:
            raise UsageError(
                "thresholds: belong to one confidence measure",
                hint=f"give --measure: {list(MEASURES)}",
            )
        if len(thresholds) != len(record.exits) - 1 or any(map(math.isnan, thresholds)):
            raise UsageError(
                f"thresholds: {list(thresholds)}, expected {len(record.exits) - 1} numbers or inf: "
                "one for each exit but the final one"
            )
    for split in (TUNING, CERTIFICATE):
        _rows(record, split)
    wants_energy = target.minimize == ENERGY or target.energy_budget_mj is not None
    if wants_energy and profile.energy is None:
        raise UsageError(
            "the profile holds no joules",
            hint="measure them with: edgeexit profile --meter ... (edgeexit meters lists them)",
        )
    if reference is not None:
        reference_correct(record, reference)


def check_inputs(bundle: Bundle, record: RecordFile, profile: Profile, device: str) -> None:
    """
    Refuse (BadFile) a record or profile of something else, and samples that were used before.

    A policy tuned on samples from training or activation ranges promises too much; so does one
    checked on those it was tuned on.
    """
    for what, digest in (("record", record.bundle_digest), ("profile", profile.bundle_digest)):
        if digest != bundle.digest:
            raise BadFile(
                f"the {what} is of bundle {digest[:12]}, this bundle is {bundle.digest[:12]}",
                hint=f"make a {what} of this bundle",
            )
    if record.exits != bundle.exits or profile.exits != bundle.exits:
        raise BadFile(f"record or profile: other exits than the bundle's {list(bundle.exits)}")
    if profile.device != device:
        raise BadFile(
            f"the profile was measured on {profile.device!r}, expected {device!r}",
            hint=f"edgeexit profile --device {device}",
        )
    tuning, certificate = (
        {row.tobytes() for row in record.digests[record.rows(split)]}
        for split in (TUNING, CERTIFICATE)
    )
    if tuning & certificate:
        raise BadFile(
            f"{len(tuning & certificate)} samples are in both tuning and certificate",
            hint="make disjoint splits with: edgeexit calibration make",
        )
    ranges = bundle.ranges_digests
    if ranges is not None:
        shared = (tuning | certificate) & {row.tobytes() for row in ranges}
        if shared:
            raise BadFile(
                f"{len(shared)} samples were already used for the activation ranges",
                hint="choose samples that the conversion has not seen",
            )
    data = bundle.training_bloom
    if data is not None:
        used = record.digests[np.isin(record.splits, (TUNING, CERTIFICATE))]
        hits, tested, chance = overlap_count(Bloom.from_bytes(data), used)
        if hits and chance < SIGNIFICANCE:
            raise BadFile(
                f"{hits} of {tested} tuning and certificate samples were used for training",
                hint="choose a set of samples that the network has never seen",
            )

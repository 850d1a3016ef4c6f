"""
Choose exits and thresholds, with a promise: records, a profile and a target in, a policy out.

Callers see tune, which works on the files of a bundle and does with them what choose does with
arrays (edgeexit.choice). It is pure: the same inputs give the same policy. spend counts beforehand
what it will ask of the certificate samples. Hidden here: what the
profile says about sets of exits that were never timed, how a budget becomes a test, and what is
written down about a policy so that edgeexit.verify can make it again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__, ledger, policy
from edgeexit.choice import (
    Cap,
    Pricing,
    check_feasible,
    choose,
    decide,
    learn,
    mean_costs,
    row_costs,
)
from edgeexit.decision import Costs, Family, Floats, Policy, Record, Tally
from edgeexit.errors import OutOfReach
from edgeexit.evaluate import Record as RecordFile
from edgeexit.families import Goal, Method
from edgeexit.files import digest_of, json_bytes
from edgeexit.policy import Confidence
from edgeexit.prices import Prices
from edgeexit.profile import Profile
from edgeexit.request import (
    CERTIFICATE,
    TUNING,
    Request,
    check_verdict,
    reference_correct,
    rows_of,
)
from edgeexit.targets import (
    ENERGY,
    Target,
    late_p_values,
    mean_p_values,
    quantile_ns,
    share_later,
)
from edgeexit.worth import MJ, MS, Rival, Worth, check_rival, judge_worth

__all__ = [
    "Costs",
    "OutOfReach",
    "Policy",
    "Record",
    "Request",
    "Target",
    "check_feasible",
    "choose",
    "tune",
]


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
    request: Request,
    *,
    reference: RecordFile | None = None,
    use: ledger.Entry | None = None,
    digests: Mapping[str, str | None] | None = None,
    accept_disturbed: bool = False,
) -> Tuned:
    """
    The best policy for *request* from the files of one bundle.

    *reference* is a record of another network on the same samples, whose final exit the accuracy
    is compared with (None: the final exit of this one). *use* is the ledger's entry for this use
    of the certificate samples, which lowers what it may risk; None counts as the only use.
    *digests* are those of the files (None: as they would be saved now). OutOfReach if it cannot
    be certified, else as Request.check and check_verdict.
    """
    verdict = check_verdict(profile, accept_disturbed=accept_disturbed)
    request.check(record, profile, reference)
    target, method = request.target, request.way
    rows, checks = rows_of(record, TUNING), rows_of(record, CERTIFICATE)
    delta = 1.0 - target.confidence
    if use is not None:
        delta = ledger.share(delta, use.use)
    check_feasible(len(checks), target, delta)
    right = None if reference is None else reference_correct(record, reference)
    prices = Prices(profile)
    costs, pricing, caps = _costs(prices, target)
    views = {name: seen_through(record, name, rows, right) for name in request.measures}
    chosen, family = learn(views, costs, target, delta, len(checks), method=method, caps=caps)
    tuning, certificate = views[chosen], seen_through(record, chosen, checks, right)
    found = decide(*(family, tuning, certificate, pricing, target, delta), method=method, caps=caps)
    worth = contest(found.policy, certificate, profile, target)
    held = {
        "method": request.method,
        "split": CERTIFICATE,
        **found.certificate(target, request.seed, method),
        "digests": dict(digests or input_digests(record, profile, reference)),
        "ledger": None
        if use is None
        else {"split": ledger.split_key(record.digests[checks]), **use.to_document()},
    }
    kept = _kept_names(record.exits, found.policy.kept)
    offsets, classes = found.policy.class_offsets, record.logits.shape[2]
    made = policy.Policy(
        device=profile.device,
        bundle_digest=record.bundle_digest,
        measure=chosen,
        exits=record.exits,
        thresholds=found.policy.thresholds,
        class_offsets=None
        if offsets is None
        else {
            name: (*map(float, row), *[0.0] * (classes - len(row)))
            for name, row in zip(record.exits[:-1], offsets, strict=True)
            if name in kept
        },
        target=target.to_document(),
        expected=_expected(found.policy, kept, certificate, prices, worth),
        certificate=held,
        provenance={
            "made_by": __version__,
            **request.provenance(),
            "measures_tried": list(request.measures),
            "calibration_set": {"name": record.set_name, "digest": record.set_digest},
            "reference": _full_network(record) if reference is None else reference.bundle_digest,
            "profile_verdict": verdict.to_document(),
            "runtime": profile.runtime,
            "threads": profile.threads,
            "mode": str(profile.mode),
            "costs": prices.origin(kept),
        },
    )
    return Tuned(
        policy=made,
        worth=worth,
        method=method,
        goal=Goal(_level(target), found.delta, len(checks)),
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
    (if it allows anything: 1 %, or as much as the policy's own): without a certificate, which is
    lenient towards rivals.
    """
    leaves, rows = made.exits(certificate), np.arange(len(certificate))
    right = int(certificate.correct[rows, leaves].sum())
    counts = certificate.correct.sum(axis=0)
    level = _level(target, float(certificate.loss[rows, leaves].mean()))
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
        by=_by(target),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Challenger:
    """A network of the user's own to compare with: its profile, and its *answers* as a record."""

    name: str
    profile: Profile
    answers: RecordFile

    def check(self, record: RecordFile, profile: Profile, request: Request) -> None:
        """Refuse (UsageError, BadFile) one that against could not compare."""
        reference_correct(record, self.answers, f"the record of rival {self.name}")
        check_rival(self.name, profile, self.profile, by=_by(request.target))

    def against(
        self, found: Tuned, record: RecordFile, profile: Profile, request: Request
    ) -> Worth:
        """The verdict about *found* once more, with this network beside the others."""
        rows = rows_of(record, CERTIFICATE)
        right = reference_correct(record, self.answers)[rows]
        chosen, seen = found.family.policy(found.position), found.certificate
        lost = float(seen.reference.mean()) - float(right.mean())
        own = float(seen.loss[np.arange(len(seen)), chosen.exits(seen)].mean())
        rival = Rival(
            name=self.name,
            profile=self.profile,
            accuracy=(int(right.sum()), len(rows)),
            within_budget=lost <= _level(request.target, own),
        )
        return contest(chosen, seen, profile, request.target, rival)


def _by(target: Target) -> str:
    return MJ if target.minimize == ENERGY else MS


def _level(target: Target, own: float = 0.0) -> float:
    """What may be lost to be compared with; where anything may, 1 % or what the policy does."""
    return max(0.01, own) if target.max_accuracy_drop is None else target.max_accuracy_drop


def spend(
    record: RecordFile,
    request: Request,
    path: Path,
    digests: Mapping[str, str | None],
    *,
    bundle: str,
    device: str,
) -> ledger.Entry:
    """
    Count *request*'s use of *record*'s certificate samples in the ledger *path*, unless in vain.

    *digests* are those of all inputs, *bundle* and *device* names for people. OutOfReach, and
    nothing counted, if so few samples can never show what is asked for at what this use may risk;
    else what ledger.spend raises.
    """
    certificate = record.rows(CERTIFICATE)
    key, asked = ledger.split_key(record.digests[certificate]), request.digest(digests)
    number, target = ledger.next_use(path, key, asked), request.target
    try:
        check_feasible(len(certificate), target, ledger.share(1.0 - target.confidence, number))
    except OutOfReach as error:
        if number > 1:
            error.hint = (
                f"this would be use {number} of these samples, which risks less than the first: "
                "label others, or allow a larger --max-accuracy-drop"
            )
        raise
    facts = {"level": target.max_accuracy_drop, "method": request.method, "bundle": bundle}
    return ledger.spend(path, key, asked, {**facts, "device": device})


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


def _kept_names(exits: Sequence[str], kept: NDArray[np.bool_]) -> tuple[str, ...]:
    return tuple(name for name, is_kept in zip(exits, kept, strict=True) if is_kept)


def _costs(prices: Prices, target: Target) -> tuple[Costs, Pricing, tuple[Cap, ...]]:
    """Parts for the search, prices for the choice, and the budgets."""
    profile = prices.profile
    exits = profile.exits

    def latency(kept: NDArray[np.bool_]) -> Floats:
        names = _kept_names(exits, kept)
        found = prices.costs_ns(names)
        costs = dict(zip(names, found or [], strict=bool(found)))
        return np.array([costs.get(name, np.nan) for name in exits])

    def energy(kept: NDArray[np.bool_]) -> Floats:
        return np.array([prices.energy_mj(_kept_names(exits, kept), name) for name in exits])

    caps = []
    if target.latency_budget_ms is not None:
        caps.append(_mean_cap("mean latency", target.latency_budget_ms, "ms", latency, 1e6))
    if target.energy_budget_mj is not None:
        caps.append(_mean_cap("mean energy", target.energy_budget_mj, "mJ", energy, 1.0))
    if target.p95_ms is not None:
        caps.append(_late_cap(profile, target.p95_ms))
    pricing = energy if target.minimize == ENERGY else latency
    return prices.parts_ns(), pricing, tuple(caps)


def _mean_cap(what: str, limit: float, unit: str, pricing: Pricing, per_unit: float) -> Cap:
    """A mean of at most *limit* units; *pricing* counts *per_unit* in each."""

    def least(family: Family, tally: Tally) -> float:
        prices = np.nan_to_num(row_costs(family, pricing), nan=np.inf)
        return float(mean_costs(tally.rates, prices).min()) / per_unit

    return Cap(
        what=what,
        limit=limit,
        unit=unit,
        test=lambda family, tally: mean_p_values(
            tally.rates, tally.samples, row_costs(family, pricing), limit * per_unit
        ),
        least=least,
    )


def _late_cap(profile: Profile, p95_ms: float) -> Cap:
    exits, limit_ns = profile.exits, p95_ms * 1e6

    def late(kept: NDArray[np.bool_]) -> Floats:
        names = _kept_names(exits, kept)
        shares = [
            share_later(profile, names, name, limit_ns) if is_kept else 1.0
            for name, is_kept in zip(exits, kept, strict=True)
        ]
        return np.array(shares)

    def least(family: Family, tally: Tally) -> float:
        return 1e-6 * min(
            quantile_ns(profile, _kept_names(exits, family.policy(row).kept), rates, 0.95)
            for row, rates in enumerate(tally.rates)
        )

    return Cap(
        what="p95",
        limit=p95_ms,
        unit="ms",
        test=lambda family, tally: late_p_values(
            tally.rates, tally.samples, row_costs(family, late)
        ),
        least=least,
    )


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


def _full_network(record: RecordFile) -> str:
    dtype = record.specs[-1].dtype
    return f"the full {'float' if dtype == 'float32' else dtype} network"


def best_static_exit(made: policy.Policy) -> str:
    """The cheapest single exit within the budget, as tune found it."""
    return str(made.expected["worth"]["static_exit"])

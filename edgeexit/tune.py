"""
Choose exits and thresholds: a record and a profile in, a policy out.

Callers see choose, check_verdict and check_inputs. choose is pure: it picks on the split `tuning`
the cheapest policy whose rate of harmful flips (answers that are wrong where the full network is
right) is shown to lie within the target, and then checks it once on the split `certificate`. That
is a check, not a guarantee: the search has looked at many policies before. Hidden here: which
sets of exits are worth a search.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__, bounds
from edgeexit.blocks import DISTURBED, EMULATED, Kept, Verdict
from edgeexit.bundle import Bundle
from edgeexit.errors import BadFile, Disturbed, OutOfReach, UsageError
from edgeexit.evaluate import Record
from edgeexit.files import digest_of, json_bytes
from edgeexit.names import choose as choose_name
from edgeexit.overlap import SIGNIFICANCE, Bloom, overlap_count
from edgeexit.policy import ALWAYS, DROPPED, MEASURES, Confidence, Policy
from edgeexit.prices import Prices
from edgeexit.profile import Profile
from edgeexit.search import cheapest, leaves_at
from edgeexit.verdict import judge

TUNING, CERTIFICATE = "tuning", "certificate"

# All sets of kept exits are searched as long as there are so few early exits.
_ALL_SETS_UP_TO = 5
# With more, those with so many early exits, and the best of them as long as one more pays.
_PAIRS = 2


@dataclass(frozen=True, kw_only=True)
class _Choice:
    kept: Kept  # whose costs were used
    thresholds: tuple[float, ...]  # of the kept exits but the last
    measure: str
    cost_ns: float
    proven: bool


def choose(
    record: Record,
    profile: Profile,
    max_accuracy_drop: float,
    measure: str | None = None,
    *,
    confidence: float = 0.95,
    accept_disturbed: bool = False,
) -> Policy:
    """
    The cheapest policy on `tuning` within *max_accuracy_drop*, checked on `certificate`.

    Within means: the one-sided upper bound (exact binomial, at *confidence*) of the rate of
    harmful flips. *measure* is a name in MEASURES; None tries all and takes the cheapest. Sets of
    exits that the profile did not time are priced from the parts of those it did; the policy's
    provenance says which ("measured" or "fitted"), and what the profile's verdict was. OutOfReach
    if there are too few samples or the check fails, UsageError for a senseless target or a missing
    split, BadFile if record and profile are not of one bundle, Disturbed as check_verdict.
    """
    bounds.check_rate(max_accuracy_drop)
    names = list(MEASURES) if measure is None else [measure]
    for name in names:
        choose_name(name, MEASURES, "confidence measure")
    if record.bundle_digest != profile.bundle_digest or record.exits != profile.exits:
        raise BadFile(
            f"the record is of bundle {record.bundle_digest[:12]}, "
            f"the profile of {profile.bundle_digest[:12]}",
            hint="make both with the same bundle",
        )
    verdict = check_verdict(profile, accept_disturbed=accept_disturbed)
    tuning, certificate = _rows(record, TUNING), _rows(record, CERTIFICATE)
    allowed = bounds.most_allowed(len(tuning), max_accuracy_drop, confidence)
    if allowed < 0:
        needed = bounds.fewest_samples(max_accuracy_drop, confidence)
        raise OutOfReach(
            f"{len(tuning)} tuning samples cannot show a drop of at most {max_accuracy_drop:g}: "
            f"{needed - len(tuning)} labels are missing (at least {needed} needed)",
            hint="label more samples, or allow a larger --max-accuracy-drop",
        )
    correct = record.correct()
    harmful = correct[:, -1:] & ~correct
    best, prices = _full(profile), Prices(profile)
    for name in names:
        scores = _confidences(record, name)[tuning]
        found = _cheapest(scores, harmful[tuning], prices, allowed, name)
        if found is not None and found.cost_ns < best.cost_ns * (1 - 1e-9):
            best = found
    # The full network needs no confidence; name one that exists.
    thresholds = _spread(record.exits, best)
    leaves = leaves_at(_confidences(record, best.measure), thresholds)
    flips = harmful[np.arange(len(record)), leaves]
    check = _check(flips[certificate], max_accuracy_drop, confidence)
    if check["harmful_rate"] > max_accuracy_drop:
        raise OutOfReach(
            f"the chosen policy failed its check: {check['harmful']} of {len(certificate)} "
            f"certificate samples became wrong ({check['harmful_rate']:.2%}), allowed are "
            f"{max_accuracy_drop:.2%}; no policy written",
            hint="tuning and certificate samples differ, or are few: label more samples",
        )
    static = _best_static(harmful[tuning], prices, allowed)
    expected = _expected(prices, thresholds, leaves[certificate], correct[certificate], static)
    return Policy(
        device=profile.device,
        bundle_digest=record.bundle_digest,
        measure=best.measure,
        exits=record.exits,
        thresholds=thresholds,
        target={"max_accuracy_drop": max_accuracy_drop, "confidence": confidence},
        expected=expected,
        check=check,
        provenance={
            "made_by": __version__,
            "method": "cheapest within an exact binomial bound on tuning, checked on certificate",
            "measures_tried": names,
            "search_proven": best.proven,
            "tuning": {
                "samples": len(tuning),
                "harmful": int(flips[tuning].sum()),
                "harmful_allowed": allowed,
                "harmful_rate_upper_bound": bounds.upper_bound(
                    int(flips[tuning].sum()), len(tuning), confidence
                ),
                "mean_ms": best.cost_ns / 1e6,
            },
            "calibration_set": {"name": record.set_name, "digest": record.set_digest},
            "record": digest_of(record.to_bytes()),
            "costs": prices.origin(tuple(expected["exit_ms"])),
            "profile": digest_of(json_bytes(profile.to_document())),
            "profile_verdict": verdict.to_document(),
            "runtime": profile.runtime,
            "threads": profile.threads,
            "mode": str(profile.mode),
        },
    )


def _rows(record: Record, split: str) -> NDArray[np.int64]:
    rows = record.rows(split)
    if not len(rows):
        have = ", ".join(sorted(set(map(str, record.splits)))) or "none"
        raise UsageError(
            f"the record has no samples of the split {split!r} (has: {have})",
            hint="edgeexit evaluate BUNDLE SET:tuning+certificate --record FILE.npz makes one",
        )
    return rows


def _confidences(record: Record, measure: str) -> NDArray[np.float32]:
    """Confidences float32 (N, E - 1) of all exits but the final one."""
    columns = [
        Confidence(measure, spec).many(record.logits[:, k])
        for k, spec in enumerate(record.specs[:-1])
    ]
    return np.stack(columns, axis=1) if columns else np.empty((len(record), 0), np.float32)


def _full(profile: Profile) -> _Choice:
    return _Choice(
        kept=profile.exits[-1:],
        thresholds=(),
        measure="max_prob",
        cost_ns=profile.value_ns(profile.full),
        proven=True,
    )


def _cheapest(
    scores: NDArray[np.float32],
    harmful: NDArray[np.bool_],
    prices: Prices,
    allowed: int,
    measure: str,
) -> _Choice | None:
    """The cheapest choice over all sets that keep the final exit and one more."""
    exits = prices.profile.exits
    tried: dict[Kept, _Choice | None] = {}

    def search(early: Iterable[str]) -> _Choice | None:
        chosen = set(early)
        kept = tuple(name for name in exits if name in chosen or name == exits[-1])
        if kept not in tried:
            tried[kept] = _best_of(kept, scores, harmful, prices, allowed, measure)
        return tried[kept]

    names = exits[:-1]
    is_small = len(names) <= _ALL_SETS_UP_TO
    for size in range(1, (len(names) if is_small else _PAIRS) + 1):
        for early in itertools.combinations(names, size):
            search(early)
    best = _least(tried.values())
    while best is not None and not is_small:
        better = _least([best, *(search([*best.kept, name]) for name in names)])
        if better is best:
            break
        best = better
    return best


def _least(choices: Iterable[_Choice | None]) -> _Choice | None:
    """The cheapest of *choices*, the first of equals."""
    found = [choice for choice in choices if choice is not None]
    return min(found, key=lambda choice: choice.cost_ns, default=None)


def _best_of(
    kept: Kept,
    scores: NDArray[np.float32],
    harmful: NDArray[np.bool_],
    prices: Prices,
    allowed: int,
    measure: str,
) -> _Choice | None:
    """The best thresholds for the *kept* exits; None if they have no price, or pay nothing."""
    costs = prices.costs_ns(kept)
    # An exit that costs as much as a later one pays nothing: the set without it is looked at too,
    # and the search wants rising costs.
    if costs is None or any(b <= a for a, b in itertools.pairwise(costs)):
        return None
    columns = [prices.profile.exits.index(name) for name in kept[:-1]]
    found = cheapest(scores[:, columns], harmful[:, columns], costs, allowed)
    return _Choice(
        kept=kept,
        thresholds=found.thresholds,
        measure=measure,
        cost_ns=found.cost,
        proven=found.proven,
    )


def _spread(exits: Sequence[str], choice: _Choice) -> tuple[float, ...]:
    """The choice's thresholds in the bundle's order, DROPPED for the exits it does without."""
    given = dict(zip(choice.kept, choice.thresholds, strict=False))
    return tuple(given.get(name, DROPPED) for name in exits[:-1])


def _check(flips: NDArray[np.bool_], target: float, confidence: float) -> dict[str, Any]:
    harmful = int(flips.sum())
    return {
        "split": CERTIFICATE,
        "kind": "checked",
        "samples": len(flips),
        "harmful": harmful,
        "harmful_rate": harmful / len(flips),
        "harmful_rate_upper_bound": bounds.upper_bound(harmful, len(flips), confidence),
        "confidence": confidence,
        "allowed_rate": target,
    }


def _best_static(harmful: NDArray[np.bool_], prices: Prices, allowed: int) -> tuple[str, float]:
    """
    The cheapest single exit, cut out alone, that is itself within the budget; its ns.

    Where the profile does not tell what an exit costs alone, it is what leaving there costs with
    all exits kept: a little too much.
    """
    profile = prices.profile
    found = (profile.exits[-1], profile.value_ns(profile.full))
    together = prices.costs_ns(profile.exits)
    for k, name in enumerate(profile.exits[:-1]):
        alone = prices.costs_ns((name,))
        costs = alone if alone is not None or together is None else together[k : k + 1]
        if costs and int(harmful[:, k].sum()) <= allowed and costs[0] < found[1]:
            found = (name, costs[0])
    return found


def _expected(
    prices: Prices,
    thresholds: Sequence[float],
    leaves: NDArray[np.int64],
    correct: NDArray[np.bool_],
    static: tuple[str, float],
) -> dict[str, Any]:
    """What to expect on new samples, read off the certificate split, costs off the profile."""
    profile = prices.profile
    exits = profile.exits
    rates = np.bincount(leaves, minlength=len(exits)) / len(leaves)
    # An exit that nobody leaves at may have been dropped after the search: a smaller set.
    pairs = zip(exits, (*thresholds, ALWAYS), strict=True)
    kept = tuple(name for name, threshold in pairs if threshold < DROPPED)
    costs = dict(zip(kept, prices.costs_ns(kept) or [], strict=True))
    mean_ns = float(sum(rates[exits.index(name)] * cost for name, cost in costs.items()))
    right = correct[np.arange(len(leaves)), leaves]
    full_ns = profile.value_ns(profile.full)
    return {
        "split": CERTIFICATE,
        "samples": len(leaves),
        "accuracy": float(right.mean()),
        "accuracy_interval": list(bounds.interval(int(right.sum()), len(right))),
        "accuracy_full": float(correct[:, -1].mean()),
        "accuracy_static": float(correct[:, exits.index(static[0])].mean()),
        "exit_accuracy": correct.mean(axis=0).tolist(),
        "exit_rates": rates.tolist(),
        "exit_ms": {name: cost / 1e6 for name, cost in costs.items()},
        "mean_ms": mean_ns / 1e6,
        "full_ms": full_ns / 1e6,
        "best_static_exit": static[0],
        "best_static_ms": static[1] / 1e6,
        "static_exits_priced": [name for name in exits if prices.costs_ns((name,)) is not None],
        "speed_up_full": full_ns / mean_ns,
        "speed_up_static": static[1] / mean_ns,
        **prices.energy(costs, dict(zip(exits, rates.tolist(), strict=True))),
    }


def best_static_exit(policy: Policy) -> str:
    """The cheapest single exit within the budget, as choose found it."""
    return str(policy.expected["best_static_exit"])


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


def check_inputs(bundle: Bundle, record: Record, profile: Profile, device: str) -> None:
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

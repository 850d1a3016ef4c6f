"""
Choose exits and thresholds: a record and a profile in, a policy out.

Callers see choose and check_inputs. choose is pure: it picks on the split `tuning` the cheapest
policy whose rate of harmful flips (answers that are wrong where the full network is right) is
shown to lie within the target, and then checks it once on the split `certificate`. That is a
check, not a guarantee: the search has looked at many policies before.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__, bounds
from edgeexit.bundle import Bundle
from edgeexit.errors import BadFile, OutOfReach, UsageError
from edgeexit.evaluate import Record
from edgeexit.files import digest_of, json_bytes
from edgeexit.names import choose as choose_name
from edgeexit.overlap import SIGNIFICANCE, Bloom, overlap_count
from edgeexit.policy import ALWAYS, DROPPED, MEASURES, Confidence, Policy
from edgeexit.profile import Kept, Profile
from edgeexit.search import cheapest, leaves_at

TUNING, CERTIFICATE = "tuning", "certificate"


@dataclass(frozen=True, kw_only=True)
class _Choice:
    kept: Kept  # whose measured costs were used
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
) -> Policy:
    """
    The cheapest policy on `tuning` within *max_accuracy_drop*, checked on `certificate`.

    Within means: the one-sided upper bound (exact binomial, at *confidence*) of the rate of
    harmful flips. *measure* is a name in MEASURES; None tries all and takes the cheapest. Only
    sets of exits that the profile measured are looked at. OutOfReach if there are too few
    samples or the check fails, UsageError for a senseless target or a missing split, BadFile if
    record and profile are not of one bundle.
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
    best = _full(profile)
    scores: dict[str, NDArray[np.float32]] = {}
    for name in names:
        scores[name] = _confidences(record, name)
        found = _cheapest(scores[name][tuning], harmful[tuning], profile, allowed, name)
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
    static = _best_static(harmful[tuning], profile, allowed)
    expected = _expected(
        profile, best, thresholds, leaves[certificate], correct[certificate], static
    )
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
            "profile": digest_of(json_bytes(profile.to_document())),
            "runtime": profile.runtime,
            "threads": profile.threads,
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
        cost_ns=profile.full.value_ns,
        proven=True,
    )


def _cheapest(
    scores: NDArray[np.float32],
    harmful: NDArray[np.bool_],
    profile: Profile,
    allowed: int,
    measure: str,
) -> _Choice | None:
    """The cheapest choice over all measured sets that keep the final exit and one more."""
    best: _Choice | None = None
    for kept in profile.kept_sets():
        costs = profile.costs_ns(kept)
        if kept[-1] != profile.exits[-1] or len(kept) < 2 or costs is None:
            continue
        # An exit that costs as much as a later one pays nothing: the set without it is looked
        # at too, and the search wants rising costs.
        if any(b <= a for a, b in itertools.pairwise(costs)):
            continue
        columns = [profile.exits.index(name) for name in kept[:-1]]
        found = cheapest(scores[:, columns], harmful[:, columns], costs, allowed)
        if best is None or found.cost < best.cost_ns:
            best = _Choice(
                kept=kept,
                thresholds=found.thresholds,
                measure=measure,
                cost_ns=found.cost,
                proven=found.proven,
            )
    return best


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


def _best_static(harmful: NDArray[np.bool_], profile: Profile, allowed: int) -> tuple[str, float]:
    """The cheapest single exit, cut out alone, that is itself within the budget; its ns."""
    found = (profile.exits[-1], profile.full.value_ns)
    for k, name in enumerate(profile.exits[:-1]):
        case = profile.case((name,), name)
        if case is None or int(harmful[:, k].sum()) > allowed:
            continue
        if case.value_ns < found[1]:
            found = (name, case.value_ns)
    return found


def _expected(
    profile: Profile,
    choice: _Choice,
    thresholds: Sequence[float],
    leaves: NDArray[np.int64],
    correct: NDArray[np.bool_],
    static: tuple[str, float],
) -> dict[str, Any]:
    """What to expect on new samples, read off the certificate split, costs off the profile."""
    exits = profile.exits
    rates = np.bincount(leaves, minlength=len(exits)) / len(leaves)
    # An exit that nobody leaves at may have been dropped after the search: a smaller set.
    pairs = zip(exits, (*thresholds, ALWAYS), strict=True)
    kept = tuple(name for name, threshold in pairs if threshold < DROPPED)
    priced = kept if profile.costs_ns(kept) is not None else choice.kept
    costs = dict(zip(priced, profile.costs_ns(priced) or [], strict=True))
    mean_ns = float(sum(rates[exits.index(name)] * cost for name, cost in costs.items()))
    right = correct[np.arange(len(leaves)), leaves]
    full_ns = profile.full.value_ns
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
        "speed_up_full": full_ns / mean_ns,
        "speed_up_static": static[1] / mean_ns,
    }


def best_static_exit(policy: Policy) -> str:
    """The cheapest single exit within the budget, as choose found it."""
    return str(policy.expected["best_static_exit"])


# ---------------------------------------------------------------- inputs that must fit


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

"""
Which policy is taken, on arrays alone: a family from one split, tests and a choice on another.

Callers see choose, and what it is made of for those who hold files: learn and decide, with Caps
for budgets. A method makes a family of policies from the tuning samples alone; one pass over the
certificate then tells which of them keep the target, all at once; among those the cheapest is
taken. Hidden here: which samples may decide what. Measure, method and family are fixed before the
certificate is looked at, and all statements made about it share one risk of being wrong.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgeexit import certify
from edgeexit.decision import Bools, Costs, Family, Floats, Policy, Record, Tally
from edgeexit.errors import OutOfReach, UsageError
from edgeexit.families import METHODS, Goal, Method
from edgeexit.names import choose as choose_name
from edgeexit.targets import Target

FIXED = "fixed"

# Without a cap on the accuracy drop, families for these are looked at on tuning.
_LEVELS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
# Costs are multiplied by the prices of flips and added up over samples.
_MOST_COST = 1e200

# kept, bool (E,) -> what leaving at each exit costs, float64 (E,); NaN where it cannot be left.
Pricing = Callable[[Bools], Floats]


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
    if isinstance(method, Method):
        name, made = FIXED, method
    else:
        name, made = method, choose_name(method, METHODS, "method")
    if tuning.exits != certificate.exits or len(costs.backbone) != tuning.exits:
        raise UsageError(
            f"{tuning.exits} exits in tuning, {certificate.exits} in certificate, "
            f"{len(costs.backbone)} in costs: expected the same number"
        )
    if len(tuning) == 0:
        raise UsageError("tuning: no samples, expected at least one")
    parts = np.concatenate([costs.backbone, costs.head, costs.handover])
    if (parts > _MOST_COST).any():
        raise UsageError(
            f"costs: {parts.max():g}, expected at most {_MOST_COST:g}: they are added up",
            hint="give them in a larger unit",
        )
    shared = np.intersect1d(tuning.ids.astype(str), certificate.ids.astype(str))
    if len(shared):
        raise UsageError(
            f"{len(shared)} sample ids are in both tuning and certificate (the first: {shared[0]})",
            hint="make disjoint splits",
        )
    delta = 1.0 - confidence
    check_feasible(len(certificate), target, delta)
    if tuning.exits == 1:
        return Policy(thresholds=())
    _, family = learn({"": tuning}, costs, target, delta, len(certificate), method=made)
    found = decide(family, tuning, certificate, costs.at, target, delta, method=made)
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


# ---------------------------------------------------------------- budgets


@dataclass(frozen=True, kw_only=True, eq=False)
class Cap:
    """
    A budget: *what* ("mean latency") may be at most *limit*, in *unit*.

    test(family, tally) gives p-values, float64 (S,), of "this policy breaks it"; least(family,
    tally) the least that any policy of the family needs.
    """

    what: str
    limit: float
    unit: str
    test: Callable[[Family, Tally], Floats]
    least: Callable[[Family, Tally], float]

    def first_kept(self, family: Family, tally: Tally, delta: float) -> int:
        """The strictest row from which on, seen from the loosest, the cap is certified."""
        failing = np.flatnonzero(self.test(family, tally) > delta)
        return int(failing[-1]) + 1 if len(failing) else 0


def _first_kept(caps: Sequence[Cap], family: Family, tally: Tally, delta: float) -> int:
    return max((cap.first_kept(family, tally, delta) for cap in caps), default=0)


def row_costs(family: Family, pricing: Pricing) -> Floats:
    """What leaving at each exit costs under each policy, float64 (S, E)."""
    seen: dict[bytes, Floats] = {}
    rows = []
    for place in range(len(family)):
        kept = family.policy(place).kept
        if kept.tobytes() not in seen:
            seen[kept.tobytes()] = pricing(kept)
        rows.append(seen[kept.tobytes()])
    return np.array(rows)


def mean_costs(rates: Floats, prices: Floats) -> Floats:
    """The mean of *prices* (S, E) at *rates* (S, E), float64 (S,); what nobody pays is nothing."""
    return np.asarray((rates * np.where(rates > 0, prices, 0.0)).sum(axis=1))


# ---------------------------------------------------------------- on tuning alone


def learn(
    views: Mapping[str, Record],
    costs: Costs,
    target: Target,
    delta: float,
    samples: int,
    *,
    method: Method,
    caps: Sequence[Cap] = (),
) -> tuple[str, Family]:
    """
    The confidence measure, and the family seen through it, that promise most on tuning alone.

    *views* are the tuning samples through each measure. With an accuracy drop to keep, the
    cheapest policy counts that would be certified if *samples* certificate samples were like
    tuning's; without one, the least drop within the *caps*, over families for several levels. The
    first of equals wins.
    """
    share = delta / target.caps
    levels = _LEVELS if target.max_accuracy_drop is None else (target.max_accuracy_drop,)
    is_settled = len(views) * len(levels) == 1
    best: tuple[float, str, Family] | None = None
    for name, view in views.items():
        for level in levels:
            goal = Goal(level, share, samples)
            family = method.family(view, costs, goal)
            if is_settled:
                return name, family
            if target.max_accuracy_drop is None:
                price = _least_drop(family, view, share, caps)
            else:
                price = certify.promised_cost(
                    *(family, family.tally(view), costs),
                    level=level,
                    delta=share,
                    samples=samples,
                )
            if best is None or _is_less(price, best[0]):
                best = (price, name, family)
    if best is None:
        raise UsageError("measures: none given, expected at least one")
    return best[1:]


def _is_less(a: float, b: float) -> bool:
    return a < b and not math.isclose(a, b, rel_tol=1e-9)


def _least_drop(family: Family, view: Record, share: float, caps: Sequence[Cap]) -> float:
    seen = family.tally(view)
    return float(seen.drop[_first_kept(caps, family, seen, share) :].min(initial=math.inf))


# ---------------------------------------------------------------- on the certificate


@dataclass(frozen=True, kw_only=True, eq=False)
class Decision:
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
        """The policy taken, without its certificate."""
        return self.family.policy(self.place)

    def certificate(self, target: Target, seed: int, method: Method) -> dict[str, Any]:
        """What is promised about it and why, as JSON values."""
        rows, tally = self.family.thresholds[self.first : self.last + 1], self.certificate_tally
        level = target.max_accuracy_drop
        tests = certify.tests(tally.samples, self.tuning, len(self.family))
        is_tested = level is not None and method.is_tested
        return {
            "family": self.family.name,
            "promise": method.promise if level is not None else "budgets alone",
            "level": level,
            "delta": self.delta,
            "confidence": target.confidence,
            "statements": target.caps,
            "test": tests[self.place] if is_tested else None,
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


def decide(
    family: Family,
    tuning: Record,
    certificate: Record,
    pricing: Pricing,
    target: Target,
    delta: float,
    *,
    method: Method,
    caps: Sequence[Cap] = (),
) -> Decision:
    """
    The best of what *certificate* certifies of *family*, which *method* learned on *tuning*.

    The cheapest if an accuracy drop is to be kept, else the most accurate within the *caps*.
    OutOfReach if nothing is certified.
    """
    share = delta / target.caps
    tally = family.tally(certificate)
    seen = family.tally(tuning)
    prices = row_costs(family, pricing)
    first, last = _first_kept(caps, family, tally, share), len(family) - 1
    p_values = None
    level = target.max_accuracy_drop
    if level is not None:
        goal = Goal(level, share, len(certificate))
        certified = method.rule(family, certificate, tuning, goal)
        if method.is_tested:
            p_values = certify.p_values(tally, level, share, seen)
        # The full network is its own reference: it loses nothing, by definition.
        floor = 0 if certificate.reference_correct is None else -1
        last = floor if certified is None else certified
        if last < 0:
            raise OutOfReach(
                f"even the full network loses more than {level:g} against the reference, or too "
                f"few samples show otherwise: {int(tally.harmful[0])} of {len(certificate)} "
                f"became wrong, {int(tally.helpful[0])} right",
                hint="allow a larger --max-accuracy-drop, take samples that were asked less often, "
                "or leave --reference out",
            )
    if first > last:
        raise _no_row(family, tally, share, caps, None if level is None else last)
    both = _pooled(seen, tally)
    # Sets of exits that the profile cannot price are not taken.
    unpriced = np.isnan(prices) & family.kept
    means = np.where(unpriced.any(axis=1), np.inf, mean_costs(both, np.nan_to_num(prices)))
    rows = np.arange(first, last + 1)
    if level is not None:
        place = int(rows[means[rows].argmin()])
    else:
        lost = seen.harmful - seen.helpful + tally.harmful - tally.helpful
        place = int(min(rows, key=lambda row: (lost[row], means[row])))
    return Decision(
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


def _no_row(
    family: Family, tally: Tally, share: float, caps: Sequence[Cap], last: int | None
) -> OutOfReach:
    """No row keeps all *caps* and (up to the row *last*, unless None) the accuracy."""
    most = len(family) - 1 if last is None else last
    of = f"of {len(family)} policies"
    kept = [] if last is None else [f"the accuracy by the {last + 1} strictest {of}"]
    is_only_unshown = True
    for cap in caps:
        first = cap.first_kept(family, tally, share)
        if first > most:
            least = cap.least(family, tally)
            is_only_unshown &= first == len(family) and least <= cap.limit
            rows, why = f"by the {len(family) - first} loosest {of}", ""
            if first == len(family):
                rows = "by none"
                if least <= cap.limit:
                    why = ", but too few samples, or single calls in the profile, show it"
            kept.append(
                f"a {cap.what} of {cap.limit:g} {cap.unit} {rows} "
                f"(the least of all is {least:.4g} {cap.unit}{why})"
            )
    return OutOfReach(
        f"no policy is certified to keep all that was asked for: {'; '.join(kept)}",
        hint="label more samples, profile with more --processes, or allow a larger budget"
        if is_only_unshown
        else "allow a larger budget or accuracy drop, or take a smaller network",
    )


def _pooled(a: Tally, b: Tally) -> Floats:
    return np.asarray((a.rates * a.samples + b.rates * b.samples) / (a.samples + b.samples))

"""
Networks and policies beside each other: shared-out pictures, paired accuracies, bars.

Callers see Ask (a policy that is wanted), parts_of (which pictures are for what), best_alone,
Answers, policy_row and bars. On arrays and plain values alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from common import spread
from numpy.typing import NDArray
from seeds.curves import class_mean

from edgeexit.calibration import SHARES
from edgeexit.decision import Costs
from edgeexit.files import digest_of
from edgeexit.race import Race

TUNING, CERTIFICATE, REPORT = "tuning", "certificate", "report"
STATIC = "static"
# The final exit's int8 accuracy on all test pictures that is wanted.
FINAL = 0.924
# A static point this much below a policy is still a rival of it.
WITHIN = 0.003


@dataclass(frozen=True, kw_only=True)
class Ask:
    """
    A policy asked for: at most *level* less accurate than *reference*.

    That is a pretrained network's key, STATIC for the best exit alone, "" for the network's own
    final exit. *ratio* is how many times faster than it the policy has to be (0: no bar), *goal*
    how many times would be better still.
    """

    key: str
    reference: str
    level: float
    ratio: float = 0.0
    goal: float = 0.0


def parts_of(ids: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """
    Which of the pictures *ids* are for what: split -> their positions, rising.

    Half is `report`; the other half is tuning and certificate, shared out as calibration sets
    share them. The digest of its id decides, so that nothing depends on order or chance.
    """
    order = sorted(range(len(ids)), key=lambda k: digest_of(str(ids[k]).encode()))
    choose = len(order) // 2
    tuning = round(choose * SHARES[TUNING] / (SHARES[TUNING] + SHARES[CERTIFICATE]))
    cuts = {TUNING: order[:tuning], CERTIFICATE: order[tuning:choose], REPORT: order[choose:]}
    return {name: np.array(sorted(places), np.int64) for name, places in cuts.items()}


def best_alone(
    accuracies: Sequence[float], costs: Sequence[float], floor: float | None = None
) -> int:
    """
    The cheapest network of at least the accuracy *floor* (None: WITHIN below the best).

    The most accurate one where none reaches it.
    """
    best = max(accuracies)
    level = best - WITHIN if floor is None else min(floor, best)
    able = [k for k, accuracy in enumerate(accuracies) if accuracy >= level]
    return min(able, key=lambda k: costs[k])


@dataclass(frozen=True, eq=False)
class Answers:
    """Which test pictures each network or policy has *right*, bool (N,), by key; *labels* (N,)."""

    right: Mapping[str, NDArray[np.bool_]]
    labels: NDArray[np.int64]
    parts: Mapping[str, NDArray[np.int64]]

    def accuracy(self, key: str, *parts: str) -> float:
        """The class mean of *key* on *parts* (none: on all pictures)."""
        rows = np.concatenate([self.parts[part] for part in parts or self.parts])
        return class_mean(self.right[key][rows], self.labels[rows])

    def lead(self, key: str, rival: str) -> dict[str, float]:
        """
        How much more accurate *key* is than *rival* on `report`, paired, with a standard error.

        Class means; every class is a sample of its own.
        """
        rows = self.parts[REPORT]
        gain = self.right[key][rows].astype(float) - self.right[rival][rows]
        found = [gain[self.labels[rows] == label] for label in np.unique(self.labels[rows])]
        doubt = sum(one.var(ddof=1) / len(one) for one in found if len(one) > 1)
        return {
            "lead": float(np.mean([one.mean() for one in found])),
            "error": float(np.sqrt(doubt)) / len(found),
        }


def policy_row(
    row: Mapping[str, Any],
    taken: NDArray[Any] | None,
    exits: Sequence[str],
    networks: Sequence[Mapping[str, Any]],
    answers: Answers,
    races: Sequence[Race],
    costs: Costs,
) -> dict[str, Any]:
    """The row of a policy, with what it does on `report` beside every network."""
    if taken is None:
        return dict(row)
    key = row["key"]
    there = taken[answers.parts[REPORT]]
    kept = np.array([name in row["kept"] for name in exits])
    choose = answers.accuracy(key, TUNING, CERTIFICATE)
    alone = [one for one in networks if one["is_exit"]]
    best = best_alone(
        [one["choose"] for one in alone],
        [one["ms"]["median"] for one in alone],
        choose - WITHIN,
    )
    return {
        **row,
        "rates": (np.bincount(there, minlength=len(exits)) / len(there)).tolist(),
        "report": answers.accuracy(key, REPORT),
        "choose": choose,
        "ms": spread([race.latency_ms(key) for race in races]),
        "macs": float(costs.at(kept)[there].mean()),
        "best_static": alone[best]["key"],
        "beside": {
            one["key"]: {
                **answers.lead(key, one["key"]),
                "faster": spread([race.speed_up(key, one["key"]) for race in races]),
            }
            for one in networks
        },
    }


def bars(
    asks: Sequence[Ask],
    networks: Sequence[Mapping[str, Any]],
    policies: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """
    What was wanted, and whether it was reached.

    The first is the final exit's accuracy. Each of the others is judged by the policy that was
    asked for it, first the certified one, then the one without a certificate: its ratio is the
    median over processes, its lead that on `report`. short are what is missing, None if nothing.
    """
    final = [one for one in networks if one["is_exit"]][-1]
    found: list[dict[str, Any]] = [
        {
            "ask": "final",
            "accuracy": final["accuracy"],
            "wanted": FINAL,
            "reached": final["accuracy"] >= FINAL,
            "short": max(0.0, FINAL - final["accuracy"]) or None,
        }
    ]
    for ask in asks:
        if not ask.ratio:
            continue
        tried = [held_against(ask, one) for one in policies if one["ask"] == ask.key]
        judged = [one for one in tried if one["policy"] is not None]
        reached = [one for one in judged if one["reached"]]
        found.append((reached or judged or tried)[0] | {"refused": _refusal(ask, policies)})
    return found


def _refusal(ask: Ask, policies: Sequence[Mapping[str, Any]]) -> str | None:
    """Why there is no certificate for *ask*; None if there is one."""
    rows = [one for one in policies if one["ask"] == ask.key and one["certified"]]
    return None if rows[0]["refused"] is None else str(rows[0]["refused"])


def held_against(ask: Ask, policy: Mapping[str, Any]) -> dict[str, Any]:
    """One *policy*, whoever asked for it, held against what *ask* wants."""
    told: dict[str, Any] = {"ask": ask.key, "level": ask.level, "wanted": ask.ratio}
    told |= {"goal": ask.goal, "policy": None, "reached": False, "samples": policy["samples"]}
    if policy["refused"] is not None:
        return told
    rival = policy["best_static"] if ask.reference == STATIC else ask.reference
    beside = policy["beside"][rival]
    ratio = beside["faster"]["median"]
    short = {
        "ratio": max(0.0, ask.ratio - ratio) or None,
        "accuracy": max(0.0, -beside["lead"] - ask.level) or None,
    }
    return told | {
        "policy": policy["key"],
        "certified": policy["certified"],
        "rival": rival,
        **beside,
        "short": short,
        "reached": not any(short.values()),
        "goal_reached": not any(short.values()) and ratio >= ask.goal,
    }

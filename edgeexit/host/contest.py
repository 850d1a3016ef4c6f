"""
Which scheme answers fastest, here or on a board, and still as the float network does.

Callers see pick, here, decide, Held, Trial, Choice and the rule's numbers. Hidden: every candidate
becomes a bundle that the project's own instrument measures, in turns that go forth and back; it
is compared with the others in turns of the yardstick loop that ran beside it, so that a machine
that slows down meanwhile slows all of them. Answers are compared on samples that gave no
activation ranges.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeexit import instrument
from edgeexit.blocks import CLEAN, STATUSES
from edgeexit.bundle import Bundle
from edgeexit.collect import Limits
from edgeexit.device import HOST, find_device
from edgeexit.errors import Unsupported
from edgeexit.host.answers import RealSamples, tflite_logits
from edgeexit.host.lowered import Lowered
from edgeexit.host.quantize import Quantized, agreement, real_logits
from edgeexit.host.schemes import SCHEMES
from edgeexit.profile import Estimate, Profile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CANDIDATES = ("int8", "int8-matmul", "dynamic", "float16", "float")
AGREEMENT = 0.99  # of the float network's answers, at every exit
POINTS = 0.005  # or this much accuracy may be lost at an exit
CLOSE = 1.03  # what is at most so much slower than the fastest counts as equally fast
LIMITS = Limits(processes=5, precision=0.02, time_cap_s=6.0, block_ms=5.0)

Measure = Callable[[Bundle], Profile]
Write = Callable[[Path, str, Quantized], Bundle]
Step = Callable[[float], None]


@dataclass(frozen=True, kw_only=True)
class Held:
    """Samples that gave no activation ranges: *labels* int64 (N,), None if there are none."""

    reals: RealSamples
    labels: "NDArray[np.int64] | None"
    name: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """
    One candidate: what it weighs, how it answers and what it costs.

    *agreement* and *accuracy* (None without labels) are shares at each exit. *latency* is in ns
    at each exit; *cost* is the mean over the exits in turns of the yardstick. *refused* says why
    the network could not be made so (then nothing else is known), *verdict* what the instrument
    found of the machine.
    """

    scheme: str
    refused: str | None = None
    model_bytes: int = 0
    agreement: Mapping[str, float] | None = None
    accuracy: Mapping[str, float] | None = None
    latency: Mapping[str, Estimate] | None = None
    cost: float = 0.0
    outside_xnnpack: Mapping[str, int] | None = None
    verdict: str = CLEAN

    def is_right(self, of_float: Mapping[str, float] | None) -> bool:
        """Whether it answers as the float network, whose accuracy is *of_float*, at every exit."""
        if self.agreement is None:
            return False
        return all(
            share >= AGREEMENT
            or (
                of_float is not None
                and self.accuracy is not None
                and self.accuracy[name] >= of_float[name] - POINTS
            )
            for name, share in self.agreement.items()
        )


@dataclass(frozen=True, kw_only=True)
class Choice:
    """
    The *scheme* that was picked and *why*, with every trial.

    *accuracy* is the float network's at each exit on the *count* samples called *samples* (None
    without labels).
    """

    scheme: str
    why: str
    device: str
    samples: str
    count: int
    accuracy: Mapping[str, float] | None
    trials: tuple[Trial, ...]

    def to_document(self) -> dict[str, Any]:
        """The choice as a JSON object; latencies in ms."""
        return {
            "scheme": self.scheme,
            "why": self.why,
            "device": self.device,
            "held_out": {"samples": self.samples, "count": self.count},
            "rule": {"agreement": AGREEMENT, "points": POINTS, "close": CLOSE},
            "float_accuracy": _rounded(self.accuracy),
            "candidates": [self._row(trial) for trial in self.trials],
        }

    def _row(self, trial: Trial) -> dict[str, Any]:
        if trial.refused is not None:
            return {"scheme": trial.scheme, "refused": trial.refused}
        latency = trial.latency or {}
        return {
            "scheme": trial.scheme,
            "model_bytes": trial.model_bytes,
            "agreement": _rounded(trial.agreement),
            "accuracy": _rounded(trial.accuracy),
            "is_right": trial.is_right(self.accuracy),
            "ms": {
                name: {key: round(ns / 1e6, 6) for key, ns in asdict(found).items()}
                for name, found in latency.items()
            },
            "times_fastest": round(trial.cost / self.fastest, 4),
            "outside_xnnpack": dict(trial.outside_xnnpack or {}),
            "verdict": trial.verdict,
        }

    @property
    def fastest(self) -> float:
        """The least cost of all trials that were measured, right or not."""
        return min(trial.cost for trial in self.trials if trial.refused is None)


def pick(
    lowered: Lowered,
    fit: RealSamples,
    held: Held,
    measure: Measure,
    write: Write,
    on_step: Step = lambda done: None,
) -> Choice:
    """
    Make every candidate of *lowered* with the samples *fit*, try it on those *held* back, and
    *measure* it.

    *write* makes a bundle of a candidate in a folder that is gone in the end. What cannot be made
    is told in its trial; what comes out as the same bytes as an earlier one is left out.
    """
    wanted = tflite_logits(lowered.data, lowered.exits, held.reals)
    made: dict[str, Quantized] = {}
    refused: dict[str, str] = {}
    for place, name in enumerate(CANDIDATES):
        try:
            found = SCHEMES[name](lowered, fit, None)
        except Unsupported as error:
            refused[name] = str(error)
            continue
        finally:
            on_step(0.3 * (place + 1) / len(CANDIDATES))
        if all(found.data != other.data for other in made.values()):
            made[name] = found
    with tempfile.TemporaryDirectory() as folder:
        bundles = {
            name: write(Path(folder) / f"{name}.edgeexit", name, one) for name, one in made.items()
        }
        profiles = _measured(bundles, measure, lambda done: on_step(0.3 + 0.7 * done))
    trials = []
    for name, one in made.items():
        answers = real_logits(one.data, one.exits, held.reals)
        trials.append(
            Trial(
                scheme=name,
                model_bytes=len(one.data),
                agreement={exit: agreement(wanted[exit], answers[exit]) for exit in wanted},
                accuracy=_accuracy(answers, held.labels),
                outside_xnnpack=one.outside_xnnpack,
                **_costs(profiles[name]),
            )
        )
    trials += [Trial(scheme=name, refused=why) for name, why in refused.items()]
    of_float = _accuracy(wanted, held.labels)
    best, why = decide(trials, of_float)
    return Choice(
        scheme=best.scheme,
        why=why,
        device=next(iter(profiles.values())).device,
        samples=held.name,
        count=len(held.reals),
        accuracy=of_float,
        trials=tuple(trials),
    )


def decide(trials: list[Trial], of_float: Mapping[str, float] | None) -> tuple[Trial, str]:
    """
    The trial to take, and why: of those that answer right the fastest.

    What is at most 3 % slower counts as equally fast, and of those the smallest file wins. The
    float network is always right, so there is one.
    """
    tried = [trial for trial in trials if trial.refused is None]
    right = [trial for trial in tried if trial.is_right(of_float)]
    limit = CLOSE * min(trial.cost for trial in right)
    fast = [trial for trial in right if trial.cost <= limit]
    best = min(fast, key=lambda trial: (trial.model_bytes, trial.cost))
    why = "the fastest" if len(fast) == 1 else "the smallest of the fastest"
    slower = [trial for trial in right if trial not in fast]
    if slower:
        rival = min(slower, key=lambda trial: trial.cost)
        why += f": {rival.scheme} takes {rival.cost / best.cost:.2f} times as long"
    astray = [trial.scheme for trial in tried if trial not in right and trial.cost < best.cost]
    if astray:
        why += f"; {', '.join(astray)}: faster, but too many answers differ"
    return best, why


def here(device: str = HOST) -> Measure:
    """Measures on this machine, which must be the *device*; DeviceError as instrument.measure."""
    kind = find_device(device)

    def measure(bundle: Bundle) -> Profile:
        return instrument.measure(
            bundle,
            device,
            threads=kind.threads,
            cores=kind.pin,
            limits=LIMITS,
            sets=[bundle.exits],
        )

    return measure


def _measured(bundles: Mapping[str, Bundle], measure: Measure, step: Step) -> dict[str, Profile]:
    """The profile of each bundle; the second turn goes backwards, its processes join the first."""
    found: dict[str, Profile] = {}
    turns = [*bundles, *reversed(list(bundles))]
    for done, name in enumerate(turns):
        profile = measure(bundles[name])
        if name in found:
            first = found[name]
            verdict = max(first.verdict, profile.verdict, key=lambda v: _GRAVITY[v.status])
            processes = (*first.processes, *profile.processes)
            profile = replace(first, processes=processes, verdict=verdict)
        found[name] = profile
        step((done + 1) / len(turns))
    return found


_GRAVITY = {status: place for place, status in enumerate(STATUSES)}


def _costs(profile: Profile) -> dict[str, Any]:
    cases = {exit: profile.case(profile.exits, exit) for exit in profile.exits}
    known = {exit: case for exit, case in cases.items() if case is not None}
    return {
        "latency": {exit: profile.latency(case) for exit, case in known.items()},
        "cost": sum(map(profile.in_yardsticks, known.values())) / len(known),
        "verdict": profile.verdict.status,
    }


def _accuracy(
    logits: "Mapping[str, NDArray[Any]]", labels: "NDArray[np.int64] | None"
) -> dict[str, float] | None:
    if labels is None:
        return None
    return {exit: float((rows.argmax(axis=1) == labels).mean()) for exit, rows in logits.items()}


def _rounded(shares: Mapping[str, float] | None) -> dict[str, float] | None:
    return None if shares is None else {name: round(v, 6) for name, v in shares.items()}

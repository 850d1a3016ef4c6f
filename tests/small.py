"""A tiny bundle on disk, and records and profiles made of numbers instead of runs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tiny import tiny_model

from edgeexit.blocks import CLEAN, Block, Case, Kept, Mode, Process, Verdict
from edgeexit.bundle import Bundle, write_bundle
from edgeexit.dissect import Dissection, SegmentCost
from edgeexit.energy import FEWEST_WINDOWS, IDLE, Energy, Trace, Window
from edgeexit.evaluate import Record
from edgeexit.meters import MeterInfo, Sample
from edgeexit.paths import kept_sets
from edgeexit.policy import Policy
from edgeexit.preprocess import Preprocess
from edgeexit.profile import Profile
from edgeexit.samples import Samples
from edgeexit.state import Reading
from edgeexit.tflite import TensorSpec

EXITS = ("exit0", "exit1", "exit2")
DIGEST = "b" * 64


def small_bundle(folder: Path, exits: int = 3, *, quantized: bool = True, **more: object) -> Bundle:
    """A three-exit bundle for 12 x 10 grey pictures and four classes."""
    model = tiny_model(exits=exits, quantized=quantized)
    return write_bundle(
        folder / "small.edgeexit",
        name="small",
        model_data=model.data,
        exits=model.exits,
        class_names=("a", "b", "c", "d"),
        preprocess=small_preprocess(),
        selftest=pictures(4).samples,
        scheme="int8" if quantized else "float",
        provenance={},
        **more,  # type: ignore[arg-type]
    )


def small_preprocess() -> Preprocess:
    """What becomes of the pictures that the small bundle answers."""
    return Preprocess(
        kind="image",
        size=(12, 10),
        color="gray",
        scale=1 / 255,
        mean=(0.0,),
        std=(1.0,),
        layout="nhwc",
    )


def pictures(count: int, name: str = "small:tuning", seed: int = 0) -> Samples:
    """Random pictures with random labels."""
    rng = np.random.default_rng(seed)
    return Samples(
        samples=rng.integers(0, 256, (count, 12, 10, 1), np.uint8),
        labels=rng.integers(0, 4, count),
        ids=np.array([f"{name}/{k}" for k in range(count)]),
        name=name,
    )


def made_record(
    tuning: int = 2000,
    certificate: int = 2000,
    *,
    seed: int = 0,
    skill: tuple[float, ...] = (3.0, 5.0, 7.0),
    shift: float = 0.0,
    exits: Sequence[str] = EXITS,
    classes: int = 10,
) -> Record:
    """
    Int8 logits of *exits* on *classes* classes; later exits know more, hard samples less.

    The certificate repeats the logits of tuning, so that its check cannot fail by bad luck; with
    *shift* that share of it is confidently wrong at all but the final exit.
    """
    rng = np.random.default_rng(seed)
    count = tuning + certificate
    repeated = np.arange(count) % tuning
    labels = rng.integers(0, classes, tuning)[repeated]
    hardness = rng.uniform(0, 1, tuning)[repeated]
    late = np.arange(count) >= tuning
    logits = rng.normal(0, 8, (tuning, len(skill), classes))[repeated]
    for k, value in enumerate(skill):
        easy = np.clip(value * 18 * (1 - hardness), 0, 70) + 6 * k
        if k < len(skill) - 1:
            wrong = late & (rng.random(count) < shift)
            logits[wrong, k, (labels[wrong] + 1) % classes] += 90
        logits[np.arange(count), k, labels] += easy
    return Record(
        logits=np.clip(np.rint(logits), -128, 127).astype(np.int8),
        labels=labels,
        ids=np.array([str(k) for k in range(count)]),
        digests=rng.integers(0, 256, (count, 16), np.uint8),
        splits=np.array(["tuning"] * tuning + ["certificate"] * certificate),
        exits=tuple(exits),
        specs=tuple(
            TensorSpec(name=f"l{k}", shape=(1, classes), dtype="int8", scale=0.1, zero_point=0)
            for k in range(len(skill))
        ),
        bundle_digest=DIGEST,
        set_name="made",
    )


def record_of(bundle: Bundle, tuning: int = 2000, certificate: int = 2000) -> Record:
    """A made record that could be one of *bundle*."""
    made = made_record(tuning, certificate, classes=len(bundle.class_names))
    return replace(made, bundle_digest=bundle.digest, specs=bundle.logits)


def made_cases(exits: Sequence[str] = EXITS, sets: Iterable[Kept] | None = None) -> list[Case]:
    """The paths of a bundle in which every exit hands the same tensors over, whoever is next."""
    found: dict[tuple[Kept, bool], list[tuple[Kept, str]]] = {}
    for kept in kept_sets(exits) if sets is None else sets:
        for k, exit in enumerate(kept):
            found.setdefault((kept[: k + 1], exit == kept[-1]), []).append((kept, exit))
    return [Case(kept=p[0][0], exit=p[0][1], also=tuple(p[1:])) for p in found.values()]


def made_profile(
    segments: Sequence[float] = (100e3, 100e3, 100e3),
    head: float | Sequence[float] = 5e3,
    *,
    exits: Sequence[str] = EXITS,
    sets: Iterable[Kept] | None = None,
    device: str = "host",
    bundle_digest: str = DIGEST,
    jitter: float = 0.0,
    drift: float = 0.0,
    slow: Mapping[int, float] | None = None,
    surplus: Mapping[Kept, float] | None = None,
    handover: float | None = None,
    processes: int = 3,
    blocks: int = 9,
    seed: int = 0,
    **more: object,
) -> Profile:
    """
    Costs that add up: the segments on the way, and a head for each kept exit on it.

    Each block is off by *jitter* (a share, normal), each case of each process by *drift*, whole
    processes by a factor in *slow*; paths of a kept set in *surplus* cost so much more. With
    *handover* (ns) there is a dissection that saw it at each exit, and an input stage of 2 us.
    """
    rng = np.random.default_rng(seed)
    heads = [head] * len(exits) if isinstance(head, float | int) else head
    cases = made_cases(exits, sets)
    costs = []
    for case in cases:
        place, way = list(exits).index(case.exit), case.kept[: case.kept.index(case.exit) + 1]
        on_the_way = sum(heads[list(exits).index(name)] for name in way)
        costs.append(sum(segments[: place + 1]) + on_the_way + (surplus or {}).get(case.kept, 0.0))
    dissection = None
    if handover is not None:
        seen = [
            SegmentCost(
                exit=name, load_ns=10**6, first_ns=10**5, memory_bytes=4096, handover_ns=handover
            )
            for name in exits
        ]
        dissection = Dissection(preprocess_ns=2e3, after_idle_ns=10**6, segments=tuple(seen))
    made = []
    for process in range(processes):
        luck = (slow or {}).get(process, 1.0) * (1 + drift * rng.normal(size=len(cases)))
        values = [
            (case, float(costs[case] * luck[case] * (1 + jitter * rng.normal())))
            for _ in range(blocks)
            for case in range(len(cases))
        ]
        made.append(
            Process(
                seed=seed + process,
                began_ns=process * 10**9,
                ended_ns=process * 10**9 + 9 * 10**8,
                warmup_ns=((9, 8),) * len(cases),
                settled=(1,) * len(cases),
                blocks=tuple(
                    Block(
                        case=case,
                        at_ns=process * 10**9 + k * 10**5,
                        calls=10,
                        mean_ns=value,
                        cpu_ns=value,
                        yardstick_ns=20e3,
                        calls_ns=(round(value),) * 5,
                    )
                    for k, (case, value) in enumerate(values)
                ),
                dissection=dissection,
            )
        )
    facts: dict[str, object] = {
        "mode": Mode(),
        "runtime": "none",
        "delegate": None,
        "precision": 0.02,
        "machine": {},
        "verdict": Verdict(status=CLEAN),
        "before": Reading(at_ns=0),
        "after": Reading(at_ns=processes * 10**9),
        **more,
    }
    return Profile(
        device=device,
        bundle_digest=bundle_digest,
        bundle_name="made",
        exits=tuple(exits),
        threads=1,
        cores=(),
        seed=seed,
        time_cap_s=20.0,
        cases=tuple(cases),
        processes=tuple(made),
        **facts,  # type: ignore[arg-type]
    )


def made_energy(
    profile: Profile,
    pairs: Iterable[tuple[Kept, str]],
    power_mw: float = 3000.0,
    idle_mw: float = 1000.0,
    label: str = "external",
) -> Energy:
    """Joules of the paths (kept, exit) in *pairs*, at the same power for all, in windows of 4 s."""
    cases = [profile.case(kept, exit) for kept, exit in pairs]
    places = [IDLE, *(profile.cases.index(case) for case in cases if case is not None)]
    windows, samples, now_s = [], [], 1.0
    for place in [*places * FEWEST_WINDOWS, IDLE]:
        call_ns = 0.0 if place == IDLE else profile.value_ns(profile.cases[place])
        windows.append(
            Window(
                case=place,
                began_ns=int(now_s * 1e9),
                ended_ns=int((now_s + 4) * 1e9),
                calls=0 if place == IDLE else round(4e9 / call_ns),
            )
        )
        mw = idle_mw if place == IDLE else power_mw
        times_s = [now_s + k / 20 for k in range(80)]
        samples += [Sample(at_ns=int(t * 1e9), power_mw=mw) for t in times_s]
        now_s += 4
    info = MeterInfo(kind="made", label=label, instrument="none", boundary="all of it", rate_hz=20)
    return Energy(info=info, trace=Trace.of(samples), windows=tuple(windows))


def made_policy(**more: Any) -> Policy:
    """What tune chooses from the made record and profile."""
    from edgeexit.tune import Request, Target, tune

    record = made_record(**more)
    return tune(record, made_profile(), Request(target=Target(max_accuracy_drop=0.01))).policy


def policy_with(bundle: Bundle, thresholds: tuple[float, ...]) -> Policy:
    """A policy of *bundle* by hand, for any device."""
    return Policy(
        device="any",
        bundle_digest=bundle.digest,
        measure="max_prob",
        exits=bundle.exits,
        thresholds=thresholds,
    )

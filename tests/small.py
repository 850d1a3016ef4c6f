"""A tiny bundle on disk, and records and profiles made of numbers instead of runs."""

from pathlib import Path

import numpy as np
from tiny import tiny_model

from edgeexit.bundle import Bundle, write_bundle
from edgeexit.evaluate import Record
from edgeexit.policy import Policy
from edgeexit.preprocess import Preprocess
from edgeexit.profile import Case, Profile, kept_sets
from edgeexit.samples import Samples
from edgeexit.tflite import TensorSpec

EXITS = ("exit0", "exit1", "exit2")
DIGEST = "b" * 64


def small_bundle(folder: Path, exits: int = 3, **more: object) -> Bundle:
    """A three-exit bundle for 12 x 10 grey pictures and four classes."""
    model = tiny_model(exits=exits)
    preprocess = Preprocess(
        kind="image",
        size=(12, 10),
        color="gray",
        scale=1 / 255,
        mean=(0.0,),
        std=(1.0,),
        layout="nhwc",
    )
    return write_bundle(
        folder / "small.edgeexit",
        name="small",
        model_data=model.data,
        exits=model.exits,
        class_names=("a", "b", "c", "d"),
        preprocess=preprocess,
        selftest=pictures(4).samples,
        scheme="int8",
        provenance={},
        **more,  # type: ignore[arg-type]
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
) -> Record:
    """
    Int8 logits of three exits on ten classes; later exits know more, hard samples less.

    The certificate repeats the logits of tuning, so that its check cannot fail by bad luck; with
    *shift* that share of it is confidently wrong at all but the final exit.
    """
    rng = np.random.default_rng(seed)
    count = tuning + certificate
    repeated = np.arange(count) % tuning
    labels = rng.integers(0, 10, tuning)[repeated]
    hardness = rng.uniform(0, 1, tuning)[repeated]
    late = np.arange(count) >= tuning
    logits = rng.normal(0, 8, (tuning, len(skill), 10))[repeated]
    for k, value in enumerate(skill):
        easy = np.clip(value * 18 * (1 - hardness), 0, 70) + 6 * k
        if k < len(skill) - 1:
            wrong = late & (rng.random(count) < shift)
            logits[wrong, k, (labels[wrong] + 1) % 10] += 90
        logits[np.arange(count), k, labels] += easy
    return Record(
        logits=np.clip(np.rint(logits), -128, 127).astype(np.int8),
        labels=labels,
        ids=np.array([str(k) for k in range(count)]),
        digests=rng.integers(0, 256, (count, 16), np.uint8),
        splits=np.array(["tuning"] * tuning + ["certificate"] * certificate),
        exits=EXITS,
        specs=tuple(
            TensorSpec(name=f"l{k}", shape=(1, 10), dtype="int8", scale=0.1, zero_point=0)
            for k in range(len(skill))
        ),
        bundle_digest=DIGEST,
        set_name="made",
    )


def made_profile(
    segments: tuple[float, ...] = (100e3, 100e3, 100e3),
    head: float = 5e3,
    *,
    device: str = "host",
    bundle_digest: str = DIGEST,
    jitter: float = 0.0,
) -> Profile:
    """Costs that add up: the segments on the way, and a head for each kept exit on it."""
    rng = np.random.default_rng(0)
    cases = []
    for kept in kept_sets(EXITS):
        for exit in kept:
            depth = EXITS.index(exit)
            cost = sum(segments[: depth + 1]) + head * (kept.index(exit) + 1)
            rows = [[cost * (1 + jitter * rng.normal()) for _ in range(9)] for _ in range(3)]
            cases.append(
                Case(
                    kept=kept,
                    exit=exit,
                    warmup_ns=((9, 8),) * 3,
                    calls=(10,) * 3,
                    blocks_ns=tuple(map(tuple, rows)),
                )
            )
    return Profile(
        device=device,
        bundle_digest=bundle_digest,
        bundle_name="made",
        exits=EXITS,
        runtime="none",
        threads=1,
        seed=0,
        cases=tuple(cases),
        before={},
        after={},
    )


def made_policy(**more: object) -> Policy:
    """What tune chooses from the made record and profile."""
    from edgeexit.tune import choose

    return choose(made_record(**more), made_profile(), 0.01)  # type: ignore[arg-type]

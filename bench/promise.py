"""
How often what is promised is broken, and what it saves: many redraws of whole populations.

    python bench/promise.py [--redraws N] [--cifar RECORD.npz] [--processes N] [--finish]

Populations: the synthetic network of four exits, all samples of the shipped Fashion-MNIST record,
and (--cifar) those of a record that bench/cifar_record.py makes. `tuning` (2,000) and
`certificate` are drawn from one with replacement; every method gets the same draws; path, shared
and ltt search the confidence measure, too. A policy breaks the promise if it loses more than the
level on the whole population. Redraws are made in blocks over all cells, kept in
bench/results/promise.partial.json: a later call goes on from there, and --finish makes
bench/results/promise.json of the blocks that are there.
"""

import argparse
import itertools
import json
import sys
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from common import CHECKOUT, RESULTS, save

from edgeexit import bounds
from edgeexit.decision import Costs
from edgeexit.errors import OutOfReach

sys.path.insert(0, str(CHECKOUT / "tests"))

from redraws import (
    Way,
    World,
    best_on_calibration,
    greedy,
    ours,
    recorded_world,
    synthetic_world,
)

PARTIAL = RESULTS / "promise.partial.json"
TUNING, DELTA, BLOCK = 2000, 0.05, 50
LEVELS, SAMPLES = (0.01, 0.005, 0.02), (500, 1000, 2000, 5000)
WAYS: dict[str, Way] = {
    "path": ours("path"),
    "shared": ours("shared"),
    "ltt": ours("ltt"),
    "crc": ours("crc", is_measure_searched=False),
    "pareto": ours("pareto", is_measure_searched=False),
    "best": best_on_calibration,
    "greedy": greedy,
}
# ResNet-20 with exits after its first and second stage: operations in millions, a head about 0.1.
CIFAR_COSTS = Costs(
    backbone=[14.6, 13.0, 13.0],
    head=[0.1, 0.1, 0.01],
    handover=[0.3, 0.3, 0.0],
)


def world_of(name: str, cifar: str) -> World:
    """The population *name*."""
    if name == "synthetic":
        return synthetic_world()
    if name == "fashion":
        return recorded_world()
    return recorded_world(Path(cifar), CIFAR_COSTS)


Counts = dict[str, dict[str, float]]


def block(name: str, cifar: str, level: float, samples: int, first: int) -> Counts:
    """What each way does in redraws *first* and following: promises broken, cost shares saved."""
    world = world_of(name, cifar)
    found = {way: {"broken": 0.0, "saved": 0.0, "refused": 0.0} for way in WAYS}
    for draw in range(first, first + BLOCK):
        tuning, certificate = world.draw(TUNING, 2 * draw), world.draw(samples, 2 * draw + 1)
        for way, chosen in WAYS.items():
            try:
                measure, policy = chosen(tuning, certificate, world.costs, level, DELTA)
            except OutOfReach:
                found[way]["refused"] += 1
                continue
            found[way]["broken"] += world.loss(measure, policy) > level
            found[way]["saved"] += world.saving(measure, policy)
    return found


def added(blocks: dict[str, Counts]) -> list[dict[str, Any]]:
    """One entry for each population, level and number of samples: rates over all its redraws."""
    cells: dict[str, list[Counts]] = {}
    for key, counts in sorted(blocks.items()):
        cells.setdefault(key.rpartition(" ")[0], []).append(counts)
    rows = []
    for key, parts in cells.items():
        name, level, samples = key.split()
        redraws = BLOCK * len(parts)
        ways = {}
        for way in WAYS:
            broken, saved, refused = (
                sum(part[way][what] for part in parts) for what in ("broken", "saved", "refused")
            )
            ways[way] = {
                "broken": broken / redraws,
                "broken_at_most": bounds.upper_bound(int(broken), redraws),
                "saved": saved / redraws,
                "refused": refused / redraws,
            }
        rows.append(
            {
                "population": name,
                "level": float(level),
                "samples": int(samples),
                "redraws": redraws,
                "ways": ways,
            }
        )
    return sorted(rows, key=lambda row: (row["population"], row["level"], row["samples"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--redraws", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--cifar", default="")
    parser.add_argument("--finish", action="store_true")
    chosen = parser.parse_args()
    done: dict[str, Counts] = json.loads(PARTIAL.read_text()) if PARTIAL.exists() else {}
    populations = ["synthetic", "fashion"] + (["cifar"] if chosen.cifar else [])
    jobs: dict[Future[Counts], str] = {}
    if not chosen.finish:
        with ProcessPoolExecutor(chosen.processes) as pool:
            for first, level, samples, name in itertools.product(
                range(0, chosen.redraws, BLOCK), LEVELS, SAMPLES, populations
            ):
                key = f"{name} {level} {samples} {first}"
                if key not in done:
                    jobs[pool.submit(block, name, chosen.cifar, level, samples, first)] = key
            for job in as_completed(jobs):
                done[jobs[job]] = job.result()
                PARTIAL.write_text(json.dumps(done, sort_keys=True))
                print(f"  {jobs[job]}: {len(done)} blocks", file=sys.stderr, flush=True)
    cells = added(done)
    command = f"python bench/promise.py --redraws {max(cell['redraws'] for cell in cells)}"
    save(
        "promise",
        command + (" --cifar RECORD.npz" if any(c["population"] == "cifar" for c in cells) else ""),
        {"delta": DELTA, "tuning": TUNING, "cells": cells},
    )


if __name__ == "__main__":
    main()

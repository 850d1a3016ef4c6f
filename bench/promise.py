"""
How often what is promised is broken, and what it saves: many redraws of whole populations.

    python bench/promise.py [--redraws N] [--cifar RECORD.npz] [--processes N] [--finish]

Populations: the synthetic network of four exits, all samples of the shipped Fashion-MNIST record,
and (--cifar) those of a record that bench/cifar_record.py makes. `tuning` (2,000) and
`certificate` are drawn from one with replacement; every method gets the same draws; path, shared
and ltt search the confidence measure, too. A policy breaks the promise if it loses more than the
level on the whole population. One redraw of `tuning` serves all levels and sizes of `certificate`.
Redraws are made in blocks, kept in bench/results/promise.partial.json: a later call goes on from
there, and --finish makes bench/results/promise.json of the blocks that are there.
"""

import argparse
import itertools
import json
import math
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
TUNING, DELTA, BLOCK = 2000, 0.05, 20
COUNTED = ("broken", "saved", "saved_squared", "refused")
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


# cell -> way -> what happened -> how often (saved: the sum of shares of the cost)
Counts = dict[str, dict[str, dict[str, float]]]


def block(name: str, cifar: str, first: int) -> Counts:
    """What each way does in redraws *first* and following, at every level and size."""
    world = world_of(name, cifar)
    cells = list(itertools.product(LEVELS, SAMPLES))
    found: Counts = {
        f"{level} {samples}": {way: dict.fromkeys(COUNTED, 0.0) for way in WAYS}
        for level, samples in cells
    }
    for draw in range(first, first + BLOCK):
        tuning = world.draw(TUNING, 2 * draw)
        certificates = {samples: world.draw(samples, 2 * draw + 1) for samples in SAMPLES}
        for (level, samples), (way, chosen) in itertools.product(cells, WAYS.items()):
            counts = found[f"{level} {samples}"][way]
            try:
                measure, policy = chosen(tuning, certificates[samples], world.costs, level, DELTA)
            except OutOfReach:
                counts["refused"] += 1
                continue
            saved = world.saving(measure, policy)
            counts["broken"] += world.loss(measure, policy) > level
            counts["saved"] += saved
            counts["saved_squared"] += saved**2
    return found


def added(blocks: dict[str, Counts]) -> list[dict[str, Any]]:
    """One entry for each population, level and number of samples: rates over all its redraws."""
    parts: dict[tuple[str, str], list[dict[str, dict[str, float]]]] = {}
    for key, counts in sorted(blocks.items()):
        for cell, ways in counts.items():
            parts.setdefault((key.split()[0], cell), []).append(ways)
    rows = []
    for (name, cell), found in parts.items():
        level, samples = cell.split()
        redraws = BLOCK * len(found)
        ways = {}
        for way in WAYS:
            broken, saved, squared, refused = (
                sum(part[way][what] for part in found) for what in COUNTED
            )
            mean = saved / redraws
            ways[way] = {
                "broken": broken / redraws,
                "broken_at_most": bounds.upper_bound(int(broken), redraws),
                "saved": mean,
                "saved_error": math.sqrt(max(0.0, squared / redraws - mean**2) / redraws),
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
            firsts = range(0, chosen.redraws, BLOCK)
            for first, name in itertools.product(firsts, populations):
                key = f"{name} {first}"
                if key not in done:
                    jobs[pool.submit(block, name, chosen.cifar, first)] = key
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

"""
What the instrument costs and how far it can be trusted, on this machine.

    python bench/instrument.py [--processes 10] [--pairs 10]

The loop: a block of calls that do nothing against a bare loop over the same samples, in turns.
The sampler: a chip's files for 20 s, as often as the meter reads them by default. The profile:
`edgeexit profile` with its default settings on a bundle of four exits, wall-clock. The pairs: two
profiles of the shipped bundle one after the other, compared; and one of it against one whose calls
were made 3 % longer.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from common import CHECKOUT, HERE, save, spread

CALLS, BLOCKS = 1000, 200
SAMPLER_S = 20.0
SLOWER = 0.03


def worker(seed: int) -> dict[str, float]:
    """Nanoseconds for each call that a timed block takes beside the call, and the bare loop."""
    from edgeexit.timing import time_block

    samples = list(range(8))
    order = random.Random(seed)

    def nothing(_: object) -> None:
        pass

    def bare() -> float:
        queue = [samples[k % 8] for k in range(CALLS)]
        start = perf_counter_ns()
        for sample in queue:
            nothing(sample)
        return (perf_counter_ns() - start) / CALLS

    def block() -> float:
        return time_block(nothing, samples, CALLS)[1] / CALLS

    times: dict[Any, list[float]] = {bare: [], block: []}
    for _ in range(BLOCKS):
        for which in order.sample([bare, block], 2):
            times[which].append(which())
    medians = {which: statistics.median(values) for which, values in times.items()}
    return {"bare_ns": medians[bare], "added_ns": medians[block] - medians[bare]}


def sampler_share(folder: Path) -> float:
    """The share of one core that reading a chip behind hwmon takes."""
    from edgeexit.sampler import Sampler

    place = folder / "sys/class/hwmon/hwmon0"
    place.mkdir(parents=True)
    texts = {"name": "ina219", "in1_input": "5100", "curr1_input": "620", "in0_input": "62"}
    texts |= {"power1_input": "3162000", "shunt_resistor": "100000"}
    for name, text in texts.items():
        (place / name).write_text(f"{text}\n")
    with Sampler("ina219,shunt=0.1", folder, "rpi4") as sampler:
        began = time.monotonic_ns()
        time.sleep(SAMPLER_S)
        sampler.samples_between(began, time.monotonic_ns())
        share = sampler.cpu_share
        assert share is not None
        return share


def profile_seconds(folder: Path, count: int) -> dict[str, Any]:
    """How long `edgeexit profile` takes with its default settings, and what it says."""
    from nets import bundle_of

    from edgeexit.profile import Profile

    bundle = bundle_of("resnet20", folder, exits=(2, 4, 6))
    out = folder / "four.json"
    command = [sys.executable, "-m", "edgeexit", "profile", str(bundle.path), "-o", str(out)]
    seconds, verdicts, found = [], [], None
    for _ in range(count):
        began = time.monotonic()
        subprocess.run(command, check=False, capture_output=True, cwd=folder)
        seconds.append(time.monotonic() - began)
        found = Profile.load(out)
        verdicts.append(found.verdict.status)
        print(f"  profile: {seconds[-1]:.1f} s, {found.verdict}", file=sys.stderr)
    assert found is not None
    return {
        "exits": len(found.exits),
        "paths": len(found.cases),
        "seconds": spread(seconds),
        "verdicts": {name: verdicts.count(name) for name in sorted(set(verdicts))},
    }


def pairs(count: int) -> dict[str, Any]:
    """How often two profiles of one bundle differ, and how often 3 % more is found."""
    from dataclasses import replace

    from edgeexit.bundle import load_bundle
    from edgeexit.collect import Limits
    from edgeexit.compare import Comparison, compare
    from edgeexit.instrument import measure
    from edgeexit.profile import Profile

    bundle = load_bundle(CHECKOUT / "examples" / "fashion.edgeexit")
    limits = Limits(processes=10, precision=0.01, time_cap_s=15)
    sets = [bundle.exits]

    def slower(profile: Profile) -> Profile:
        made = [
            replace(
                process,
                blocks=tuple(
                    replace(block, mean_ns=block.mean_ns * (1 + SLOWER)) for block in process.blocks
                ),
            )
            for process in profile.processes
        ]
        return replace(profile, processes=tuple(made))

    def differs(found: Comparison) -> bool:
        return any(found.is_different(row) for row in found.rows)

    same, found, verdicts = 0, 0, []
    for number in range(count):
        a, b = (measure(bundle, limits=limits, sets=sets, seed=2 * number + k) for k in range(2))
        verdicts += [a.verdict.status, b.verdict.status]
        same += not differs(compare(a, b))
        found += differs(compare(a, slower(b)))
        print(f"  pair {number + 1}/{count}: {verdicts[-2:]}", file=sys.stderr)
    return {
        "pairs": count,
        "no_difference": same,
        "three_percent_found": found,
        "verdicts": {name: verdicts.count(name) for name in sorted(set(verdicts))},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        print(json.dumps(worker(given.worker)))
        return
    command = [sys.executable, str(HERE / "instrument.py"), "--worker"]
    made = [
        json.loads(subprocess.run([*command, str(k)], check=True, capture_output=True).stdout)
        for k in range(given.processes)
    ]
    figures: dict[str, Any] = {
        name: spread([values[name] for values in made]) for name in ("bare_ns", "added_ns")
    }
    with tempfile.TemporaryDirectory() as folder:
        figures["sampler_share"] = sampler_share(Path(folder) / "board")
        figures["profile"] = profile_seconds(Path(folder), 3)
    figures["compare"] = pairs(given.pairs)
    save("instrument", "python bench/instrument.py", figures)


if __name__ == "__main__":
    main()

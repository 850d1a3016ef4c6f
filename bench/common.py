"""
What every measurement shares: fresh worker processes, medians with a spread, results as JSON.

A single process is not a measurement on a shared machine (its median differs by up to ±20 %
from the next one's), so every ratio is taken inside a process and the spread is over processes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from edgeexit.errors import EdgeExitError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
CHECKOUT = HERE.parent


def in_processes(count: int, script: str, *args: str) -> list[dict[str, Any]]:
    """
    Run `bench/SCRIPT --worker ARGS` in *count* fresh processes, one after another.

    What one of them refuses, or the last line of one that ends otherwise, is raised as its error.
    """
    answers = []
    for index in range(count):
        command = [sys.executable, str(HERE / script), "--worker", *args, "--seed", str(index)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise _failed(f"{script}, process {index + 1}/{count}", done)
        answers.append(json.loads(done.stdout.splitlines()[-1]))
        print(f"  process {index + 1}/{count}", file=sys.stderr)
    return answers


def _failed(place: str, done: "subprocess.CompletedProcess[str]") -> EdgeExitError:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line.removeprefix("Error: ") for line in lines if line.startswith("Error: ")]
    error = EdgeExitError(f"{place}: {(said or lines or ['it was ended'])[-1]}")
    error.exit_code = max(1, done.returncode)  # below zero: by a signal
    return error


def options(description: str) -> argparse.Namespace:
    """The options of a measurement over processes; `--worker BUNDLE` is how it starts one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--processes", type=int, default=10)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def profiled(bundle: Any, time_cap_s: float) -> Any:
    """The profile of *bundle* here: ten processes at least, short blocks, half a percent wanted."""
    from edgeexit.collect import Limits
    from edgeexit.instrument import measure

    limits = Limits(processes=10, precision=0.005, time_cap_s=time_cap_s, block_ms=4.0)
    found = measure(bundle, "host", limits=limits)
    print(f"  profile of {bundle.name}: {found.verdict}", file=sys.stderr)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of *values*, and how many there are."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "processes": len(values),
    }


def machine() -> dict[str, Any]:
    """What this was measured on, without anything that names the machine itself."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.now(UTC).date().isoformat(),
    }


def save(name: str, command: str, figures: Mapping[str, Any]) -> None:
    """Write bench/results/NAME.json: the figures, the command that made them, the machine."""
    document = {"command": command, "machine": machine(), **figures}
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))

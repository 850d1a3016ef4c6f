"""
Whether costs add up: kept sets that were not used in the fit, priced from their parts.

    python bench/parts.py

Three nets: the shipped one (three exits) and two of the zoo with four exits each, random weights.
Every kept set is cut out and timed; parts are fitted from the full set and from each exit alone;
every other path is then priced and compared with what it took: in wall-clock time, and in the
process's CPU time, which other programs reach less. A profile that was disturbed is measured
again, at most twice; of those the one with the narrowest intervals counts.
"""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import profiled, save

NETS = {"resnet20": (2, 4, 6), "mobilenet": (1, 3, 6)}
TIME_CAP_S = 40
ATTEMPTS = 3


def calmest(bundle: Any) -> Any:
    from edgeexit.blocks import DISTURBED
    from edgeexit.verdict import watched

    found = []
    for _ in range(ATTEMPTS):
        found.append(profiled(bundle, TIME_CAP_S))
        if found[-1].verdict.status != DISTURBED:
            break
    return min(found, key=lambda p: max(p.latency(case).half_width for case in watched(p)))


def in_cpu_time(profile: Any) -> Any:
    """The profile as if blocks had taken their CPU time only."""
    processes = []
    for process in profile.processes:
        blocks = tuple(replace(block, mean_ns=block.cpu_ns) for block in process.blocks)
        processes.append(replace(process, blocks=blocks))
    return replace(profile, processes=tuple(processes))


def priced(profile: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The parts from the full set and each exit alone, and every other path beside its price."""
    from edgeexit.parts import fit

    exits = profile.exits
    pairs = [*((exits, name) for name in exits), *(((name,), name) for name in exits)]
    parts = fit(profile, pairs)
    paths = []
    for case in profile.cases:
        if (case.kept, case.exit) in parts.used:
            continue
        measured, price = profile.latency(case), parts.price(case.kept, case.exit)
        assert price is not None
        paths.append(
            {
                "kept": list(case.kept),
                "exit": case.exit,
                "measured_us": measured.value / 1e3,
                "half_width": measured.half_width,
                "priced_us": price.value / 1e3,
                "off": price.value / measured.value - 1,
            }
        )
    return parts, paths


def figures_of(bundle: Any) -> dict[str, Any]:
    from edgeexit.parts import fit

    profile = calmest(bundle)
    exits = profile.exits
    parts, paths = priced(profile)
    cpu_paths = priced(in_cpu_time(profile))[1]
    return {
        "profile": str(profile.verdict),
        "processes": len(profile.processes),
        "exits": len(exits),
        "fitted_from": len(parts.used),
        "priced": len(paths),
        "worst_off": max(abs(path["off"]) for path in paths),
        "median_off": statistics.median(abs(path["off"]) for path in paths),
        "worst_off_cpu": max(abs(path["off"]) for path in cpu_paths),
        "worst_half_width": max(path["half_width"] for path in paths),
        "all_paths_worst_residual": fit(profile).worst_residual,
        "backbone_us": [parts.backbone_ns(name).value / 1e3 for name in exits],
        "head_us": [parts.head_ns(name).value / 1e3 for name in exits[:-1]],
        "handover_us": [parts.handover_ns(name).value / 1e3 for name in exits],
        "paths": paths,
        "cpu_paths": cpu_paths,
    }


def main() -> None:
    from nets import bundle_of

    from edgeexit import demo

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        shipped = demo.copy_of_shipped_bundle(Path(folder))
        figures["shipped"] = figures_of(shipped)
        for name, exits in NETS.items():
            figures[name] = figures_of(bundle_of(name, Path(folder), exits))
    save("parts", "python bench/parts.py", figures)


if __name__ == "__main__":
    main()

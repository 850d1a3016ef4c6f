"""
Whether costs add up: kept sets that were not used in the fit, priced from their parts.

    python bench/parts.py

Three nets: the shipped one (three exits) and two of the zoo with four exits each, random weights.
Every kept set is cut out and timed; parts are fitted from the full set and from each exit alone;
every other path is then priced and compared with what it took. A profile that was disturbed is
measured again, at most four times.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import profiled, save

NETS = {"resnet20": (2, 4, 6), "mobilenet": (1, 3, 6)}
TIME_CAP_S = 40
ATTEMPTS = 5


def figures_of(bundle: Any) -> dict[str, Any]:
    from edgeexit.blocks import DISTURBED
    from edgeexit.parts import fit

    for _ in range(ATTEMPTS):
        profile = profiled(bundle, TIME_CAP_S)
        if profile.verdict.status != DISTURBED:
            break
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
                "fitted_us": price.value / 1e3,
                "off": price.value / measured.value - 1,
            }
        )
    heads = [parts.head_ns(name) for name in exits[:-1]]
    return {
        "profile": profile.verdict.status,
        "processes": len(profile.processes),
        "exits": len(exits),
        "fitted_from": len(parts.used),
        "predicted": len(paths),
        "worst_off": max(abs(path["off"]) for path in paths),
        "median_off": statistics.median(abs(path["off"]) for path in paths),
        "worst_half_width": max(path["half_width"] for path in paths),
        "backbone_us": [parts.backbone_ns(name).value / 1e3 for name in exits],
        "head_us": [head.value / 1e3 for head in heads],
        "handover_us": [parts.handover_ns(name).value / 1e3 for name in exits],
        "all_paths_worst_residual": fit(profile).worst_residual,
        "paths": paths,
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

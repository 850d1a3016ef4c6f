"""
Run every measurement and write docs/results.md from the JSON of all that have been run.

    python bench/run.py [--table-only] [NAME...]
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from common import CHECKOUT, HERE, RESULTS

HEAD = """\
# Results

Measured by `bench/`; each table names its command, machine and date. A shared two-core x86 machine
is not a board: read ratios, not milliseconds. Ratios are taken inside a process and shown as median
(smallest .. largest) over fresh processes.
"""


def _spread(figure: Mapping[str, Any], digits: int = 2) -> str:
    low, high = (f"{figure[key]:.{digits}f}" for key in ("min", "max"))
    return f"{figure['median']:.{digits}f} ({low} .. {high})"


def _early_exit(found: Mapping[str, Any]) -> list[list[str]]:
    names = {
        "full": "full network, every exit computed",
        "static": "same network without exits",
        "best_static": f"best static network within the budget ({found['best_static_exit']})",
    }
    rows = [["rival", "µs a sample", "policy is faster by"]]
    for key, name in names.items():
        ratio = _spread(found[f"faster_than_{key}"]) + "x"
        rows.append([name, _spread(found[f"{key}_us"], 1), ratio])
    rates = " / ".join(f"{rate:.1%}" for rate in found["exit_rates"])
    rows.append(
        [
            f"the policy: accuracy {found['accuracy_policy']:.2%} against "
            f"{found['accuracy_full']:.2%}, leaving {rates}",
            _spread(found["policy_us"], 1),
            "",
        ]
    )
    expected = " / ".join(f"{rate:.1%}" for rate in found["exit_rates_expected"])
    before, after = found["expected_us"]
    shares = " and ".join(f"{share:.1%}" for share in found["expected_share"])
    rows.append(
        [
            f"expected by tune, from profiles before and after the runs: leaving {expected}, and "
            f"{shares} of the time without exits",
            f"{before:.1f} and {after:.1f}",
            f"share taken over share expected: {_spread(found['share_over_expected'], 3)}",
        ]
    )
    return rows


def _cutting(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["net, 3 exits", "chain / uncut", "added segment, µs", "confidence and decision, µs"]]
    for name, figures in found.items():
        rows.append(
            [
                name,
                _spread(figures["ratio"], 3),
                _spread(figures["added_segment_us"]),
                _spread(figures["decision_us"]),
            ]
        )
    return rows


def _training(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["net", "epoch of " + str(found["samples"]) + " samples in float32", "times faster"]]
    for name, f in found["nets"].items():
        seconds = f["float32_seconds"]["median"]
        rows.append([name, f"{seconds:.2f} s", _spread(f["times_faster"])])
    return rows


def _conversion(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["net", "seconds", "peak memory, GB"]]
    return rows + [[n, str(f["seconds"]), str(f["peak_gb"])] for n, f in found.items()]


def _accuracy(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["exit", "float", "int8", "share of the whole's cost"]]
    for name, figures in found.items():
        if isinstance(figures, dict):
            rows.append(
                [
                    name,
                    f"{figures['float_accuracy']:.2%}",
                    f"{figures['int8_accuracy']:.2%}",
                    f"{figures['share_of_whole']:.1%}",
                ]
            )
    return rows


def _zoo(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["net", "exits", "real samples", "differing bytes", "peak memory of `run`, MB"]]
    for name, f in found.items():
        peak = str(f.get("run_peak_mb", ""))
        rows.append([name, str(f["exits"]), str(f["samples"]), str(f["differing_bytes"]), peak])
    return rows


def _parts(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["net", "exits", "fitted from", "paths priced", "off by at most", "median"]]
    rows[0] += ["in CPU time", "± of the timed", "profile"]
    for name, f in found.items():
        counts = [str(f[key]) for key in ("exits", "fitted_from", "priced")]
        keys = ("worst_off", "median_off", "worst_off_cpu", "worst_half_width")
        cells = [f"{f[key]:.1%}" for key in keys]
        rows.append([name, *counts, *cells, f["profile"].partition(":")[0].lower()])
    return rows


def _pruned(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "dense", "pruned"]]
    for key, name in (("full", "every exit computed"), ("policy", "with its policy")):
        cells = [_spread(found[f"{net}_{key}_us"], 1) for net in ("dense", "pruned")]
        ratio = _spread(found[f"{key}_faster"]) + "x faster"
        rows.append([f"{name}, µs a sample", cells[0], f"{cells[1]}: {ratio}"])
    own = _spread(found["policy_faster_than_own_full"]) + "x"
    rows.append(["policy faster than its own whole network", "", own])
    accuracies = [
        " / ".join(f"{a:.2%}" for a in found[f"{net}_exit_accuracies"])
        for net in ("dense", "pruned")
    ]
    rows.append(["int8 accuracy of each exit on `report`", *accuracies])
    policies = [f"{found[f'{net}_policy_accuracy']:.2%}" for net in ("dense", "pruned")]
    rows.append(["accuracy of the policy", *policies])
    macs = [f"{found[f'macs_{when}'] / 1e6:.2f}" for when in ("before", "after")]
    rows.append(["million MACs, all exits", *macs])
    return rows


def _instrument(found: Mapping[str, Any]) -> list[list[str]]:
    profile, pairs = found["profile"], found["compare"]
    verdicts = ", ".join(f"{n} {name}" for name, n in profile["verdicts"].items())
    seconds = _spread(profile["seconds"], 1)
    compared = ", ".join(f"{n} {name}" for name, n in pairs["verdicts"].items())
    return [
        ["what", "measured", "bar"],
        ["a timed block, ns a call besides the call", _spread(found["added_ns"], 1), "200"],
        ["a bare Python loop over the same samples, ns a call", _spread(found["bare_ns"], 1), ""],
        [
            "reading an INA219's files 25 times a second, of one core",
            f"{found['sampler_share']:.2%}",
            "1 %",
        ],
        [
            f"`edgeexit profile`, {profile['exits']} exits, {profile['paths']} paths, default "
            f"settings, s ({verdicts})",
            seconds,
            "60",
        ],
        [
            f"pairs of profiles of one bundle in which `compare` saw no difference ({compared})",
            f"{pairs['no_difference']} of {pairs['pairs']}",
            "19 of 20",
        ],
        [
            "the same pairs, one made 3 % slower: difference found",
            f"{pairs['three_percent_found']} of {pairs['pairs']}",
            "19 of 20",
        ],
    ]


def _promise(found: Mapping[str, Any]) -> list[list[str]]:
    names = {
        "path": "path",
        "shared": "shared threshold, path's tests",
        "ltt": "shared, LTT (Hoeffding-Bentkus)",
        "crc": "shared, CRC (an average only)",
        "pareto": "Pareto Testing",
        "best": "best on calibration",
        "greedy": "earlyon's greedy search",
    }
    rows = [["population, drop, labels, redraws", *(names[way] for way in names)]]
    for cell in found["cells"]:
        title = (
            f"{cell['population']}, {cell['level']:.1%}, {cell['samples']:,}, {cell['redraws']:,}"
        )
        cells = []
        for way in names:
            figures = cell["ways"][way]
            if figures["refused"] == 1.0:
                cells.append("refused")
            else:
                saved = f"{figures['saved']:.1%} ± {figures['saved_error']:.1%} saved"
                cells.append(f"{saved}, {figures['broken']:.1%} broken")
        rows.append([title, *cells])
    return rows


def _choosing(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["samples, exits", "learning s", "certifying s", "peak GB", "growth over n log n"]]
    for row in found["curve"]:
        rows.append(
            [
                f"{row['samples']:,}, {row['exits']}",
                f"{row['learn_s']:.2f}",
                f"{row['certify_s']:.2f}",
                f"{row['peak_gb']:.2f}",
                f"{row['growth']:.2f}" if "growth" in row else "-",
            ]
        )
    return rows


def _arm_cost(found: Mapping[str, Any]) -> list[list[str]]:
    counts, cpus = found["instructions"], list(found["instructions"])
    rows = [["million instructions a call, or a ratio of them", *cpus]]
    for net in counts[cpus[0]]:
        for exit in counts[cpus[0]][net]:
            cells = [f"{counts[cpu][net][exit] / 1e6:.3f}" for cpu in cpus]
            rows.append([f"{net}, {exit}", *cells])
    for net, bar in found["cutting_bars"].items():
        cells = [f"{found['cutting'][cpu][net]:.4f}" for cpu in cpus]
        rows.append([f"{net}: chain of all segments over uncut (bar {bar})", *cells])
    for pair, exits in found["pairs"][cpus[0]].items():
        cells = [
            " / ".join(f"{found['pairs'][cpu][pair][exit]:.3f}" for exit in exits) for cpu in cpus
        ]
        rows.append([f"{pair}: {' / '.join(exits)}", *cells])
    apart = [f"{found['apart'][cpu]:.4%}" for cpu in cpus]
    rows.append([f"the same exit in {found['runs']} boots differs by at most", *apart])
    return rows


def _fleet(found: Mapping[str, Any]) -> list[list[str]]:
    boards, broken = found["boards"], len(found["broken"])
    size = f"{found['bytes'] / 1e6:g} MB"
    longest = found["board_longest_s"]
    return [
        ["what", "seconds", "bar"],
        [f"{size} to {boards} boards, {found['limit']} at a time", f"{found['all_s']:.1f}", "60"],
        [
            "one of these boards, median and longest",
            f"{found['board_median_s']:.1f}, {longest:.1f}",
            "",
        ],
        ["the same command again: nothing to do", f"{found['again_s']:.1f}", ""],
        [
            f"the next release with {broken} boards broken, which are named",
            f"{found['with_broken_s']:.1f}",
            "",
        ],
        [f"again when they are mended: {broken} done", f"{found['mended_s']:.1f}", ""],
    ]


def _gates(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["net", "float answers apart", "int8: torch", "int8: ONNX", "operators"]]
    rows[0] += ["more by way of ONNX", "latency over torch's: int8", "float"]
    for name, f in found["nets"].items():
        figures = f.get("int8_accuracy", f["int8_agreement"])
        what = "accuracy" if "int8_accuracy" in f else "as float"
        cells = [" / ".join(f"{share:.1%}" for share in figures[g]) for g in ("torch", "onnx")]
        counts = f["int8_operators"]
        more = ", ".join(f"{n:+d} {kind}" for kind, n in f["int8_more_by_onnx"].items())
        rows.append(
            [
                f"{name} ({what})",
                f"{max(f['float_error']):.0e}",
                *cells,
                f"{counts['torch']} and {counts['onnx']}",
                more or "none",
                *(_spread(f[f"{scheme}_latency"], 3) for scheme in ("int8", "float")),
            ]
        )
    return rows


def _ready(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["file", "scheme", "published, %", "by `run`, %", "exits put on, %", "samples"]]
    rows[0] += ["bytes unlike uncut", "answers unlike the file's"]
    for name, f in found.items():
        early = " / ".join(f"{value:.1f}" for value in f["exits"].values())
        rows.append(
            [
                f"{name} (`{f['file']}`)",
                f["scheme"],
                f"{f['published']:.2f}",
                f"{f['by_run']:.2f}",
                early,
                str(f["samples"]),
                str(f["bytes_that_differ_from_uncut"]),
                str(f["answers_that_differ_from_file"]),
            ]
        )
    return rows


def _schemes(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["net", "scheme", "times the fastest", "ms, last exit (95 % interval)"]]
    rows[0] += ["as float, worst exit", "bytes", "outside XNNPACK", "profile"]
    for name, f in found.items():
        for k, one in enumerate(f["candidates"]):
            taken = " (taken)" if one["scheme"] == f["scheme"] else ""
            cells = [name if k == 0 else "", one["scheme"] + taken]
            if "refused" in one:
                rows.append([*cells, one["refused"], *[""] * 5])
                continue
            ms = list(one["ms"].values())[-1]
            rows.append(
                [
                    *cells,
                    f"{one['times_fastest']:.2f}",
                    f"{ms['value']:.3g} ({ms['low']:.3g} .. {ms['high']:.3g})",
                    f"{min(one['agreement'].values()):.1%}",
                    f"{one['model_bytes']:,}",
                    str(sum(one["outside_xnnpack"].values())),
                    one["verdict"],
                ]
            )
    return rows


# Papers' tables (bench/seeds): a section of their own each, and a figure; run by their own command.
PAPERS = {
    "seeds-worth": "Is it worth it? Pruning and early exit on CIFAR-10",
    "seeds-gormez": "Pruning and early exit, by Görmez & Koyuncu's two strategies",
    "seeds-everything": "Blocks or filters, by Pruning Everything, Everywhere, All at Once",
    "seeds-nepenthe": "Fewer layers by state entropy, by EGP and NEPENTHE",
}
SETTINGS = {"": "small setting", "-full": "the paper's schedule"}


def _paper(name: str) -> Any:
    """The module of bench/seeds that makes, describes and draws the table *name*."""
    return importlib.import_module(name.replace("seeds-", "seeds."))


def _papers() -> dict[str, tuple[str, str]]:
    """Result file -> (paper, title), of those that are there."""
    return {
        name + suffix: (name, f"{title}: {setting}")
        for name, title in PAPERS.items()
        for suffix, setting in SETTINGS.items()
        if (RESULTS / f"{name}{suffix}.json").exists()
    }


Table = Callable[[Mapping[str, Any]], list[list[str]]]
BENCHES: dict[str, tuple[str, Table]] = {
    "early_exit": ("What early exit saves on the shipped network", _early_exit),
    "pruned": ("What pruning adds: the shipped network and its pruned form", _pruned),
    "accuracy": ("The shipped network, exit by exit, on `report`", _accuracy),
    "cutting": ("What cutting costs", _cutting),
    "parts": ("Paths priced from their parts against the same paths timed", _parts),
    "training": ("What an epoch of training costs in bfloat16 beside float32", _training),
    "conversion": ("What converting costs, imports included", _conversion),
    "gates": ("The same networks by way of torch and by way of ONNX", _gates),
    "ready": ("Ready `.tflite` files of MLPerf Tiny with exits put on", _ready),
    "schemes": ("Which scheme `--scheme auto` takes for which network", _schemes),
    "instrument": ("What the instrument costs, and whether it agrees with itself", _instrument),
    "choosing": ("What choosing costs: learning a path, testing it, one core", _choosing),
    "promise": (
        "How often the promise is broken (95 % confidence: at most 5 %), and what it saves "
        "(fashion's and cifar's costs are rough: microseconds, operations)",
        _promise,
    ),
    "arm/cost": (
        "What an exit costs on ARM code: instructions, counted on an emulated core; no latency",
        _arm_cost,
    ),
    "fleet": ("Deploying to many boards, all of them on this machine", _fleet),
    "zoo": ("Chain of segments against the uncut int8 model (random weights)", _zoo),
}

NEEDS = {"gates": "EDGEEXIT_ONNX_PYTHON"}
"""Bench -> the variable without which it is left out, unless it is named."""


def page() -> str:
    parts = [HEAD]
    for name, (title, table) in BENCHES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        where = _where(found.pop("machine"), found.pop("command"))
        rows = table(found)
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(rows[0]))
        parts.append(f"## {title}\n\n{where}:\n\n" + "\n".join(lines) + "\n")
    for name, (paper, title) in _papers().items():
        found = json.loads((RESULTS / f"{name}.json").read_text())
        where = _where(found["machine"], found["command"])
        parts.append(f"## {title}\n\n{where}.\n\n{_paper(paper).page(found)}")
    return "\n".join(parts)


def _where(machine: Mapping[str, Any], command: str) -> str:
    return f"`{command}` on {machine['cpu']}, {machine['cores']} cores, {machine['date']}"


def draw() -> None:
    """Draw the papers' figures into docs/img; says so where matplotlib is missing."""
    if importlib.util.find_spec("matplotlib") is None:
        print('no figures: pip install "edgeexit[plot]"', file=sys.stderr)
        return
    for name, (paper, _) in _papers().items():
        found = json.loads((RESULTS / f"{name}.json").read_text())
        _paper(paper).draw(found, CHECKOUT / "docs" / "img")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run benches, and put all results into docs.")
    parser.add_argument(
        "--table-only", action="store_true", help="run nothing, write the docs anew"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all of bench/")
    asked = parser.parse_args()
    unknown = sorted(set(asked.names) - set(BENCHES))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(BENCHES)}")
    if not asked.table_only:
        for name in asked.names or [
            name for name in BENCHES if NEEDS.get(name, "PATH") in os.environ
        ]:
            print(f"{name} ...", file=sys.stderr)
            subprocess.run([sys.executable, str(HERE / f"{name}.py")], check=True)
    (CHECKOUT / "docs" / "results.md").write_text(page())
    draw()


if __name__ == "__main__":
    main()

"""
What each exit costs on ARM code, in instructions: a number that repeats, and so a gate.

    python bench/arm/cost.py [--update] [--runs 2] [--cpu CPU]... [--net NET]...

The timing process of `edgeexit profile` runs in a virtual machine whose clock advances by one
nanosecond for every instruction and by nothing else (machine.py), so that what it takes for
nanoseconds are instructions: of the call that `run` makes, Python's included. This is a count of
instructions of an emulated core, no latency: caches, memory and dual issue are not in it, and it
never becomes a profile. It is compared with budget.json, which --update writes: an exit that grew
by more than 1 % is an error, one that shrank is told.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit.errors import BadFile, EdgeExitError

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
BUDGET = HERE / "budget.json"
FORMAT = 1

CPUS = ("cortex-a72", "cortex-a76")  # without and with dot products: their kernels differ
SHIPPED = ("fashion", "fashion-pruned")
ZOO = {"resnet8": "int8", "resnet8-float": "float", "resnet56": "int8"}  # net -> scheme
UNCUT = "-uncut"  # the same network as one file, every exit computed
NETS = (*SHIPPED, *ZOO, *(name + UNCUT for name in ("resnet8", "resnet56")))
# The chain of all segments over the uncut network, at most.
CUTTING = {"resnet8": 1.05, "resnet56": 1.02}
# What is shown beside what: the first over the second.
PAIRS = (("fashion-pruned", "fashion"), ("resnet8", "resnet8-float"))
GROWTH = 0.01  # of an exit's instructions: more is an error, a shrinkage by as much is told
SPREAD = 0.001  # two runs of the same code agree at least as well
_BLOCK_MS = 20.0  # million instructions: the timer's interrupts even out
_ROUNDS = 3  # now and then the kernel does something in the middle of one
_TIMEOUT_S = 1800.0

Counts = Mapping[str, Mapping[str, Mapping[str, int]]]  # cpu -> net -> exit -> instructions


class OverBudget(EdgeExitError):
    """An exit costs more instructions than it may, or nobody said how many it may cost."""


# ---------------------------------------------------------------- counting


def worker(folder: Path) -> None:
    """In the machine: print, for each bundle in *folder*, a line with the instructions a call."""
    for path in sorted(folder.iterdir(), key=lambda path: path.stem):
        print(json.dumps({"net": path.stem, "exits": _counted(path)}), flush=True)


def _counted(path: Path) -> dict[str, int]:
    """Instructions of one call that leaves at each exit, and without exits: medians of blocks."""
    from edgeexit.bundle import load_bundle
    from edgeexit.paths import paths
    from edgeexit.sitting import Child
    from edgeexit.verdict import NO_EXITS

    bundle = load_bundle(path)
    cases = paths(bundle, [bundle.exits])
    plan = {
        "folder": str(path),
        "bundle": bundle.digest,
        "cases": [case.to_document() for case in cases],
        **{"threads": 1, "cores": [], "block_ms": _BLOCK_MS, "rate_hz": None, "dissect": False},
    }
    order = list(range(len(cases)))
    with Child(plan) as child:
        blocks = [
            block for turn in range(_ROUNDS) for block in child.round(order[:: 1 - turn % 2 * 2])
        ]
    found = {}
    for place, case in enumerate(cases):
        name = case.exit if case.kept == bundle.exits else NO_EXITS
        means = [block.mean_ns for block in blocks if block.case == place]
        found[name] = round(statistics.median(means))
    return found


def count(cpus: Sequence[str], nets: Path, folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    """
    Instructions a call of every bundle in the folder *nets* on each of *cpus*.

    *folder* takes the machines' logs. CannotBuild, MachineFailed.
    """
    found = {}
    for cpu in cpus:
        began = time.monotonic()
        found[cpu] = parse(_said(cpu, nets, folder, "/mnt/code/cost.py --worker /mnt/nets"))
        seconds = time.monotonic() - began
        print(f"  {cpu}: {len(found[cpu])} nets in {seconds:.0f} s", file=sys.stderr)
    return found


def profile(cpu: str, nets: Path, name: str, folder: Path) -> Any:
    """
    What `edgeexit profile` itself measures in such a machine, for the bundle *name* in *nets*.

    Its nanoseconds are instructions, and its verdict says that no board is behind it.
    """
    from edgeexit.files import parse_json
    from edgeexit.profile import Profile

    words = f"profile /mnt/nets/{name}.edgeexit --processes 5 --precision 50% -o /tmp/p.json --json"
    return Profile.from_document(
        parse_json(_said(cpu, nets, folder, f"-m edgeexit {words}", 6).encode(), name)
    )


def _said(cpu: str, nets: Path, folder: Path, words: str, code: int = 0) -> str:
    """What a counting machine's Python prints that is given *words*, and ends with *code*."""
    from machine import Machine
    from root import SITE, compile_python

    files = folder / "files"
    shutil.rmtree(files, ignore_errors=True)
    shutil.copytree(nets, files / "nets")
    unwanted = shutil.ignore_patterns("__pycache__", "host")
    shutil.copytree(CHECKOUT / "edgeexit", files / "code" / "edgeexit", ignore=unwanted)
    shutil.copytree(CHECKOUT / "devices", files / "code" / "devices")
    shutil.copy(__file__, files / "code")
    compile_python(files / "code", files, "/mnt")
    settings = f"PYTHONPATH=/mnt/code:/{SITE} PYTHONHASHSEED=0 PYTHONDONTWRITEBYTECODE=1"
    job = files / "job"
    job.write_text(f"#!/bin/sh\n{settings} python3.11 {words}\n[ $? = {code} ]\n")
    job.chmod(0o755)
    return Machine(cpu, folder / cpu, counting=True).batch(
        files,
        timeout_s=_TIMEOUT_S,
        on_line=lambda line: print(f"  {cpu}: {line[:90]}", file=sys.stderr),
    )


def parse(said: str) -> dict[str, dict[str, int]]:
    """What worker printed: net -> exit -> instructions. BadFile if it is anything else."""
    from edgeexit.files import parse_json

    found = {}
    for number, line in enumerate(said.splitlines(), 1):
        table = parse_json(line.encode(), f"the machine's line {number}")
        table.only("net", "exits")
        found[table.get("net", str)] = _exits(table.table("exits"))
    if not found:
        raise BadFile("the machine said nothing, expected counts")
    return found


def _exits(table: Any) -> dict[str, int]:
    found = {exit: table.get(exit, int) for exit in table.values}
    if not found or min(found.values()) < 1:
        raise BadFile(f"{table.where}: expected instructions, each more than 0, found {found}")
    return found


# ---------------------------------------------------------------- nets


def make_nets(names: Iterable[str], folder: Path) -> None:
    """Put NAME.edgeexit of each of *names* into *folder*; those of the zoo are converted once."""
    from edgeexit.bundle import load_bundle

    for name in names:
        plain = name.removesuffix(UNCUT)
        source = (
            CHECKOUT / "examples" / f"{plain}.edgeexit"
            if plain in SHIPPED
            else _converted() / f"{plain}.edgeexit"
        )
        if name == plain:
            shutil.copytree(source, folder / f"{name}.edgeexit")
        else:
            write_uncut(load_bundle(source), folder / f"{name}.edgeexit")


def _converted() -> Path:
    """A layer with the zoo's bundles, made anew when what may change them has changed."""
    import hashlib

    from root import layer

    sources = [
        *sorted((CHECKOUT / "edgeexit" / "host").glob("*.py")),
        *(CHECKOUT / "edgeexit" / f"{name}.py" for name in ("bundle", "cut", "tflite")),
        *(CHECKOUT / "edgeexit" / f"{name}.py" for name in ("preprocess", "samples")),
        *(HERE.parent / "nets.py", CHECKOUT / "requirements.lock"),
    ]
    recipe = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    return layer("zoo", [*recipe, str(ZOO)], _convert)


def _convert(folder: Path) -> None:
    sys.path.insert(0, str(HERE.parent))
    from nets import checkpoint_of

    from edgeexit.host.convert import convert

    with tempfile.TemporaryDirectory() as made:
        for name, scheme in ZOO.items():
            path, data = checkpoint_of(name.removesuffix("-float"), Path(made))
            convert(path, folder / f"{name}.edgeexit", data, scheme)


def write_uncut(bundle: Any, target: Path) -> None:
    """
    *bundle* as one segment: a call computes every exit, and decides once, at the final one.

    Against it the chain of all segments shows what cutting costs.
    """
    from edgeexit.files import digest_of, json_bytes, npz_bytes

    document = json.loads((bundle.path / "bundle.json").read_text())
    answers, model = bundle.selftest(), bundle.model_data()
    last = {"samples": answers.samples, "inputs": answers.inputs, "logits": answers.logits[:, -1:]}
    files = {"model.tflite": model, "selftest.npz": npz_bytes(last)}
    entries = {
        name: {"sha256": digest_of(data), "bytes": len(data)} for name, data in files.items()
    }
    segment = {
        "file": "segment-0.tflite",
        "exit": bundle.exits[-1],
        **entries["model.tflite"],
        "inputs": [document["input"]],
        "outputs": document["logits"][::-1],
    }
    document |= {
        "exits": [bundle.exits[-1]],
        "logits": document["logits"][-1:],
        "segments": [segment],
        "files": entries,
    }
    target.mkdir()
    files |= {"segment-0.tflite": model, "bundle.json": json_bytes(document)}
    for name, data in files.items():
        (target / name).write_bytes(data)


# ---------------------------------------------------------------- the budget


@dataclass(frozen=True, kw_only=True)
class Change:
    """One exit in the budget and now; None where it is not in one of them."""

    cpu: str
    net: str
    exit: str
    before: int | None
    now: int | None

    @property
    def share(self) -> float:
        """By how much it grew, as a share of what it was (0.01: one percent)."""
        return self.now / self.before - 1 if self.now and self.before else 0.0

    @property
    def is_over(self) -> bool:
        """Whether this is an error: more than allowed, or only in one of the two."""
        return self.now is None or self.before is None or self.share > GROWTH

    @property
    def is_under(self) -> bool:
        """Whether it shrank so much that the budget should follow."""
        return self.share < -GROWTH

    def __str__(self) -> str:
        place = f"{self.cpu}, {self.net}, {self.exit}"
        if self.before is None and self.now is None:
            return f"{self.cpu}, {self.net}: neither counted nor in the budget"
        if self.before is None:
            return f"{place}: {self.now:,} instructions, not in the budget"
        if self.now is None:
            return f"{place}: {self.before:,} instructions in the budget, not counted now"
        return f"{place}: {self.before:,} -> {self.now:,} instructions ({self.share:+.2%})"


def changes(budget: Counts, found: Counts, nets: Sequence[str] = NETS) -> Iterator[Change]:
    """All exits of *nets*, on the cpus of *found*, that are in *budget* or in *found*."""
    for cpu in found:
        for net in nets:
            before, now = budget.get(cpu, {}).get(net, {}), found[cpu].get(net, {})
            for exit in dict.fromkeys([*before, *now]) or [""]:
                yield Change(
                    cpu=cpu, net=net, exit=exit, before=before.get(exit), now=now.get(exit)
                )


def check(budget: Counts, found: Counts, nets: Sequence[str] = NETS) -> list[str]:
    """What is worth telling; OverBudget, with every exit that is over, if one is."""
    told = list(changes(budget, found, nets))
    over = [change for change in told if change.is_over]
    if over:
        raise OverBudget(
            "; ".join(map(str, over)),
            hint="if it is meant: python bench/arm/cost.py --update",
        )
    return [f"{c}: less; --update keeps it so" for c in told if c.is_under]


def read_budget(path: Path = BUDGET) -> dict[str, dict[str, dict[str, int]]]:
    """The budget in the file *path*; an empty one if there is none. BadFile."""
    from edgeexit.files import read_json

    if not path.exists():
        return {}
    table = read_json(path)
    table.expect_format(FORMAT)
    table.only("format", "unit", "instructions")
    cpus = table.table("instructions")
    return {
        cpu: {net: _exits(cpus.table(cpu).table(net)) for net in cpus.table(cpu).values}
        for cpu in cpus.values
    }


def write_budget(found: Counts, path: Path = BUDGET) -> None:
    """Put the counts *found* into the budget; what was not counted stays."""
    from edgeexit.files import json_bytes, write_file

    budget = read_budget(path)
    for cpu, nets in found.items():
        for net, exits in nets.items():
            budget.setdefault(cpu, {})[net] = dict(exits)
    ordered = {cpu: dict(sorted(nets.items())) for cpu, nets in sorted(budget.items())}
    document = {"format": FORMAT, "unit": "instructions a call", "instructions": ordered}
    write_file(path, json_bytes(document))


# ---------------------------------------------------------------- laws


def apart(runs: Sequence[Counts]) -> dict[str, float]:
    """cpu -> by how much two of *runs* differ at most at one exit, as a share."""
    return {
        cpu: max(
            max(run[cpu][net][exit] for run in runs) / min(run[cpu][net][exit] for run in runs) - 1
            for net, exits in nets.items()
            for exit in exits
        )
        for cpu, nets in runs[0].items()
    }


def check_apart(runs: Sequence[Counts]) -> None:
    """OverBudget if two of *runs* differ by more than SPREAD at one exit."""
    for cpu, share in apart(runs).items():
        if share > SPREAD:
            raise OverBudget(
                f"{cpu}: two runs are {share:.3%} apart, expected at most {SPREAD:.1%}"
            )


def cutting(found: Counts) -> dict[str, dict[str, float]]:
    """cpu -> net -> instructions of the chain of all segments over those of the uncut network."""
    return {
        cpu: {
            net: _final(nets[net]) / _final(nets[net + UNCUT])
            for net in CUTTING
            if net in nets and net + UNCUT in nets
        }
        for cpu, nets in found.items()
    }


def _final(exits: Mapping[str, int]) -> int:
    return [n for name, n in exits.items() if name != "without exits"][-1]


def check_cutting(found: Counts) -> None:
    """OverBudget if the chain of segments costs more than CUTTING allows."""
    for cpu, ratios in cutting(found).items():
        for net, ratio in ratios.items():
            if ratio > CUTTING[net]:
                raise OverBudget(
                    f"{cpu}, {net}: chain over uncut is {ratio:.3f}, expected {CUTTING[net]}"
                )


# ---------------------------------------------------------------- the command


def figures(runs: Sequence[Counts]) -> dict[str, Any]:
    """What goes into bench/results: counts and ratios, nothing of them a time."""
    found = runs[0]
    pairs = {
        cpu: {
            f"{one} / {other}": {
                exit: nets[one][exit] / nets[other][exit]
                for exit in nets[one]
                if exit in nets[other]
            }
            for one, other in PAIRS
            if one in nets and other in nets
        }
        for cpu, nets in found.items()
    }
    return {
        "unit": "instructions a call, of an emulated core; no latency",
        "instructions": found,
        "cutting": cutting(found),
        "cutting_bars": CUTTING,
        "pairs": pairs,
        "runs": len(runs),
        "apart": apart(runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write budget.json")
    parser.add_argument("--runs", type=int, default=1, help="boot and count so many times")
    parser.add_argument("--cpu", action="append", choices=CPUS)
    parser.add_argument("--net", action="append", choices=NETS)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.worker)
        return
    cpus, nets = given.cpu or CPUS, given.net or NETS
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "nets").mkdir()
        make_nets(nets, folder / "nets")
        runs = [count(cpus, folder / "nets", folder) for _ in range(max(1, given.runs))]
    found = runs[0]
    for cpu, counted in found.items():
        for net, exits in counted.items():
            row = ", ".join(f"{name} {n:,}" for name, n in exits.items())
            print(f"{cpu}  {net}: {row}")
    check_apart(runs)
    check_cutting(found)
    if len(runs) > 1 and not given.cpu and not given.net:
        sys.path.insert(0, str(HERE.parent))
        from common import save

        save("arm/cost", f"python bench/arm/cost.py --runs {len(runs)}", figures(runs))
    if given.update:
        write_budget(found)
    for line in check(read_budget(), found, nets):
        print(line)


if __name__ == "__main__":
    try:
        main()
    except EdgeExitError as error:
        hint = f"\n{error.hint}" if error.hint else ""
        sys.exit(f"Error: {error}{hint}")

"""
A table as a list of steps: what each is, running what is left, and listing it.

Callers see Step, Job, Table, run_steps and run_table. A step has a folder of its own below the work
folder, with what it makes and a `step.json` that says what it was made of and what came out. That
file is written last: a step without it is run again, and goes on where edgeexit's own state files
say.
A step whose task, or whatever it needs, has changed is refused, never silently mixed in.
"""

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
from common import RESULTS, machine

from edgeexit import __version__
from edgeexit.cli import guarded
from edgeexit.errors import BadFile, UsageError, hinting
from edgeexit.files import check_output, digest_of, json_bytes, read_json, write_file
from edgeexit.locks import hold

FORMAT = 1
RUNS = RESULTS.parents[1] / "runs" / "seeds"
PACKAGES = ("torch", "numpy", "ai-edge-litert", "litert-torch", "ai-edge-quantizer")
# Billions of MACs a second in training, forward counted once, until steps of one's own tell: two
# cores of the machine this was written on.
FIRST_RATE = 20.0
_WRITE_CLOCK_S = 5.0
_MOST_S = 1e9
# What two runs with one seed need not agree in.
_PASSING = ("wall_s", "machine", "measured")


class Job:
    """
    One step being run: its *folder*, what it needs, and its clock.

    A step calls tell now and then: it shows what is going on, and keeps the clock over a kill.
    """

    def __init__(self, step: "Step", work: Path) -> None:
        self.step, self.work, self.folder = step, work, work / step.name
        self._clock = self.folder / ".seconds"
        self._started, self._written = time.monotonic(), -_WRITE_CLOCK_S
        try:
            before = float(self._clock.read_text())
        except (OSError, ValueError):
            before = 0.0
        self._before = before if 0 <= before < _MOST_S else 0.0

    def of(self, name: str) -> Path:
        """The folder of the step *name*, which this one must need."""
        if name not in self.step.needs:
            raise UsageError(f"{self.step.name}: does not say that it needs {name}")
        return self.work / name

    def result_of(self, name: str) -> dict[str, Any]:
        """What came out of the step *name*, which this one must need."""
        return dict(read_json(self.of(name) / "step.json").values["result"])

    @property
    def seconds(self) -> float:
        """Wall time of the step so far, its interrupted runs included."""
        return self._before + time.monotonic() - self._started

    def tell(self, text: str = "") -> None:
        """Show *text*, if there is any, and write the clock down."""
        if text:
            click.echo(f"    {text}", err=True)
        if self.seconds - self._written >= _WRITE_CLOCK_S:
            self._written = self.seconds
            write_file(self._clock, f"{self.seconds:.1f}".encode())

    def stop(self) -> float:
        """The seconds, for good."""
        self._clock.unlink(missing_ok=True)
        return round(self.seconds, 1)


@dataclass(frozen=True, kw_only=True)
class Step:
    """
    One thing to do once. *name* is its folder below the work folder; *needs* are other steps.

    *task* holds, as plain values, everything besides these that the result depends on. *gmacs*
    and *extra_s* say how long it takes: forward MACs in billions, and seconds that do not depend
    on the machine's speed. What *is_timing* wants the machine for itself: it comes after all
    others, and none of those needs it. *run* returns the result as plain values; what it says
    under "measured" need not agree between two runs.
    """

    name: str
    needs: tuple[str, ...] = ()
    task: Mapping[str, Any] = field(default_factory=dict)
    gmacs: float = 0.0
    extra_s: float = 1.0
    is_timing: bool = False
    run: Callable[[Job], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """
    One table: *name* of its result file, the steps in order, and *facts* of the setting.

    *figures* makes what is shown out of the steps' results (name -> result) and the work folder.
    """

    name: str
    facts: Mapping[str, Any]
    steps: Sequence[Step]
    figures: Callable[[Mapping[str, Any], Path], dict[str, Any]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", sorted(self.steps, key=lambda step: step.is_timing))


def lasting(document: Mapping[str, Any]) -> dict[str, Any]:
    """*document* without what two runs with one seed need not agree in: times, the machine."""
    return {
        key: lasting(value) if isinstance(value, Mapping) else value
        for key, value in document.items()
        if key not in _PASSING
    }


def _plan(step: Step, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a step's result is made of, as its step.json says it."""
    needs = {name: digest_of(json_bytes(lasting(done[name]))) for name in step.needs}
    plan: dict[str, Any] = json.loads(
        json_bytes({"format": FORMAT, "step": step.name, "task": dict(step.task), "needs": needs})
    )
    return plan


def _finished(
    step: Step, work: Path, done: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The document of a *step* that is done, None if it is not."""
    path = work / step.name / "step.json"
    if not path.exists() or not all(name in done for name in step.needs):
        return None
    again = f"remove {path.parent} to make it again, or name another folder with --work"
    with hinting(again):
        read = read_json(path)
        document = dict(read.values)
        plan = _plan(step, done)
        differs = [key for key, value in plan.items() if document.get(key) != value]
        if differs:
            raise BadFile(f"{path}: made by another plan ({', '.join(differs)} differs)")
        read.table("result")
        wall_s = read.get("wall_s", float)
        if not 0 <= wall_s < _MOST_S:
            raise BadFile(f"{path}: wall_s: found {wall_s:g}, expected seconds, 0 or more")
    return document


def _versions() -> dict[str, str]:
    found = {name: version(name) for name in PACKAGES}
    return {"edgeexit": __version__, "python": platform.python_version(), **found}


def _run(step: Step, work: Path, done: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    import torch

    path = work / step.name / "step.json"
    check_output(path)
    job = Job(step, work)
    job.tell()
    result = step.run(job)
    document = {
        **_plan(step, done),
        "versions": _versions(),
        "threads": torch.get_num_threads(),
        "result": json.loads(json_bytes(result)),
        "wall_s": job.stop(),
        "machine": machine(),
    }
    write_file(path, json_bytes(document))
    return document


def run_steps(table: Table, work: Path, *, is_timed: bool = True) -> dict[str, dict[str, Any]]:
    """
    Run what is left of *table* in the folder *work*; the documents of its steps by name.

    Not *is_timed*, the steps that time something are left for another call. Busy if another
    process is at it; BadFile if a step there was made by another plan; else what the steps raise.
    An interrupted run goes on when it is called again.
    """
    done: dict[str, dict[str, Any]] = {}
    with hold(work / ".lock", f"the steps in {work.name}"):
        for number, step in enumerate(table.steps, start=1):
            if step.is_timing and not is_timed:
                continue
            found = _finished(step, work, done)
            if found is None:
                click.echo(f"{number}/{len(table.steps)} {step.name}", err=True)
                found = _run(step, work, done)
            done[step.name] = found
    return done


def run_table(table: Table, work: Path) -> dict[str, Any]:
    """Run what is left of *table* as run_steps does, and return its document."""
    done = run_steps(table, work)
    results = {name: document["result"] for name, document in done.items()}
    return {
        **table.facts,
        "wall_s": round(sum(document["wall_s"] for document in done.values()), 1),
        **table.figures(results, work),
        "steps": done,
    }


# ---------------------------------------------------------------- what is left


def listing(table: Table, work: Path) -> str:
    """One line for each step: what it took, or what it may take, and what is left in all."""
    done: dict[str, dict[str, Any]] = {}
    for step in table.steps:
        found = _finished(step, work, done)
        if found is not None:
            done[step.name] = found
    rate = _rate(table.steps, done)
    lines, left = [], 0.0
    for step in table.steps:
        if step.name in done:
            lines.append(f"done  {_clock(done[step.name]['wall_s']):>9}  {step.name}")
            continue
        guess = step.gmacs / rate + step.extra_s
        left += guess
        has_begun = (work / step.name / ".seconds").exists()
        lines.append(f"{'begun' if has_begun else 'left '} ~{_clock(guess):>8}  {step.name}")
    count = len(table.steps) - len(done)
    lines.append(f"{len(done)} steps done, {count} left: about {_clock(left)} on this machine")
    return "\n".join(lines)


def _rate(steps: Sequence[Step], done: Mapping[str, Mapping[str, Any]]) -> float:
    """Billions of MACs a second that the finished steps had, or the first guess."""
    counted = [step for step in steps if step.name in done and step.gmacs > 0]
    seconds = sum(max(0.1, done[step.name]["wall_s"] - step.extra_s) for step in counted)
    return sum(step.gmacs for step in counted) / seconds if counted else FIRST_RATE


def _clock(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- the command


_FOLDER = click.Path(file_okay=False, path_type=Path)
# (--full, --seeds, --data) -> what is to be done
Make = Callable[[bool, int | None, Path | None], Table]


def of_settings(table: Callable[..., Table], name: str, small: Any, full: Any) -> Make:
    """*table* with the setting *full* at --full and *small* else, dataclasses with seeds."""

    def make(is_full: bool, seeds: int | None, data: Path | None) -> Table:
        setting = full if is_full else small
        if seeds is not None:
            setting = replace(setting, seeds=seeds)
        more = {} if data is None else {"data": data}
        return table(setting, name=f"{name}-full" if is_full else name, **more)

    return make


def command(doc: str, script: str, make: Make) -> click.Command:
    """
    The command of a paper's table. *make* gets --full, --seeds and --data, and returns the table.
    """

    # click keeps the lines of a paragraph that begins so as they are.
    told = doc.replace("\n\n    python", "\n\n\b\n    python")

    @click.command(help=told, context_settings={"help_option_names": ["-h", "--help"]})
    @click.option("--full", is_flag=True, help="the paper's schedule: --steps says how long")
    @click.option("--steps", is_flag=True, help="only list what is done and what is left")
    @click.option("--later", is_flag=True, help="leave the timing for a call on a quiet machine")
    @click.option("--seeds", type=click.IntRange(1, 100), help="how many seeds")
    @click.option("--data", type=_FOLDER, help="folder of cifar10/ and its list")
    @click.option("--work", type=_FOLDER, help=f"default {RUNS}/NAME")
    def called(
        full: bool,
        steps: bool,
        later: bool,
        seeds: int | None,
        data: Path | None,
        work: Path | None,
    ) -> None:
        table = make(full, seeds, data)
        # Trainings remember where their samples lie: however it is spelt, it is one folder.
        folder = (work or RUNS / table.name).absolute()
        if steps:
            click.echo(listing(table, folder))
            return
        said = " ".join(["python", script, *(["--full"] if full else [])])
        said += f" --seeds {seeds}" if seeds else ""
        if later:
            run_steps(table, folder, is_timed=False)
            places = {"--data": data, "--work": work}
            rest = [f" {name} {place}" for name, place in places.items() if place is not None]
            click.echo(f"all but the timing is done; on a quiet machine: {said}{''.join(rest)}")
            return
        document = run_table(table, folder)
        whole = {"command": said, "machine": machine(), **document}
        target = RESULTS / f"{table.name}.json"
        write_file(target, (json.dumps(whole, indent=1) + "\n").encode())
        click.echo(f"{target}: {len(table.steps)} steps; python bench/run.py --table-only shows it")

    return called


def main(called: click.Command, args: Sequence[str] | None = None) -> int:
    """Run the command; the exit code, as the product's own."""
    return guarded(lambda: called.main(args=args, standalone_mode=False))

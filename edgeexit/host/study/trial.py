"""
One trial of a search: a folder with a job goes in, a pruned network and a result stand in it.

Callers see run_job; `python -m edgeexit.host.study.trial FOLDER` is it as a process. Hidden here:
run_job depends on nothing but the folder and what its job names by digest, so that any executor
may run it, as often as it likes. A lock lets one process at a time in; what was begun is gone on
with; the result appears by rename.
"""

import hashlib
import importlib.metadata
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__
from edgeexit.errors import (
    BadFile,
    EdgeExitError,
    OutOfReach,
    ParityError,
    Unsupported,
    UsageError,
    printable,
)
from edgeexit.files import Table, digest_of, json_bytes, read_bytes, write_file
from edgeexit.host.answers import RealSamples, spread
from edgeexit.host.checkpoint import MAX_CHECKPOINT_BYTES, Checkpoint, load_checkpoint
from edgeexit.host.fit import holdout_accuracies
from edgeexit.host.graph import Graph, analyse, parameters
from edgeexit.host.material import Material
from edgeexit.host.prune.engine import Progress, prune, training_half
from edgeexit.host.prune.recipe import prune_recipe
from edgeexit.host.recipe import DataPart
from edgeexit.host.study.job import JOB, MODEL, RESULT, Chain, Interval, Job, Leaving, Result
from edgeexit.locks import hold
from edgeexit.policy import Confidence, Policy

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle

LOCK = "lock"
UNPRUNED = "unpruned.edgeexit"
MEASURING = "measuring.lock"
RACED = 200  # samples at most
PASSES = (5, 40, 1000)  # at least, by choice, at most
PACKAGES = ("torch", "numpy", "litert-torch", "ai-edge-quantizer", "ai-edge-litert")
# What follows from the job itself; everything else is an accident, and no result.
REFUSALS = (OutOfReach, Unsupported, ParityError, UsageError)


def tools() -> dict[str, str]:
    """The versions of everything that a result depends on."""
    found = {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}
    return {"edgeexit": __version__, **found}


def digest_of_arrays(*arrays: NDArray[Any]) -> str:
    """SHA-256 over dtypes, shapes and values."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(f"{array.dtype.str} {array.shape};".encode())
        total.update(np.ascontiguousarray(array).data)
    return total.hexdigest()


def digest_of_material(material: Material) -> str:
    """SHA-256 of samples, labels and which of them are held out."""
    return digest_of_arrays(material.data.samples, material.data.labels, material.holdout)


def run_job(folder: Path) -> Result:
    """
    Do what the job in *folder* says, or what is left of it; its result is also written there.

    A job that is done is not run again. What the job itself makes impossible is a result as
    well (*refused*). Busy if another process runs it; UsageError, BadFile, DeviceError or
    StorageError if something around it is wrong, and then there is no result.
    """
    job = Job.load(folder)
    with hold(folder / LOCK, "this job"):
        done = Result.load(folder)
        if done is not None:
            return done
        if dict(job.tools) != tools():
            raise UsageError(
                f"{folder / JOB}: made for other versions of edgeexit's tools than installed",
                hint="search again in another folder, or install those",
            )
        started = monotonic()
        result = _Run(job, folder).run(started)
        write_file(folder / RESULT, json_bytes(result.to_document()))
        return result


class _Run:
    """One job under way: what it names has been found, and is what it was."""

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        self.start_path = self._place("model")
        if digest_of(read_bytes(self.start_path, limit_bytes=MAX_CHECKPOINT_BYTES)) != job.model:
            raise BadFile(f"{self.start_path}: is not the network that {folder / JOB} names")
        self.start = load_checkpoint(self.start_path, arch=job.arch)
        self.data = DataPart(path=str(self._place("data")), kind=job.places.get("kind"))
        self.material, _ = training_half(self.start, str(self.start_path), self.data)
        if digest_of_material(self.material) != job.data:
            raise BadFile(
                f"{self.data.path}: other samples than when the search began",
                hint="bring them back, or search again in another folder",
            )
        self.reals: RealSamples | None = None
        if job.judge.int8:
            from edgeexit.host.assess import ranges_of

            self.reals = ranges_of(self.start, self.material, job.places.get("ranges"))
            if digest_of_arrays(self.reals.samples) != job.ranges:
                raise BadFile(
                    f"{job.places.get('ranges')}: other samples than when the search began"
                )
        # Which held-out samples judge is fixed by the data alone.
        some = np.sort(spread(len(self.material.holdout))[: job.judge.samples])
        self.judged = self.material.holdout[some]

    def _place(self, key: str) -> Path:
        place = self.job.places.get(key)
        if place is None:
            raise BadFile(f"{self.folder / JOB}: places.{key}: missing")
        return self.folder / place

    def run(self, started: float) -> Result:
        job = self.job
        try:
            pruned = None if job.recipe is None else self._prune(job.recipe)
            facts = self._judge(pruned)
        except REFUSALS as error:
            if f"{MODEL}.state" in str(error):
                raise  # of the files, not of the job
            reason = f"{type(error).__name__}: {error}"
            return Result(job=job.digest, refused=reason, seconds=monotonic() - started)
        return Result(
            job=job.digest,
            checkpoint=None if pruned is None else pruned.digest,
            samples=len(self.judged),
            seconds=monotonic() - started,
            **facts,
        )

    def _prune(self, document: Mapping[str, Any]) -> Checkpoint:
        recipe = prune_recipe(Table(dict(document), "trial"))
        recipe = replace(recipe, data=self.data)
        out = self.folder / MODEL
        prune(self.start_path, recipe, out, arch=self.job.arch, on_step=_say)
        return load_checkpoint(out, arch=self.job.arch)

    # ------------------------------------------------------------ judging

    def _judge(self, pruned: Checkpoint | None) -> dict[str, Any]:
        found = self.start if pruned is None else pruned
        kept = self.job.kept
        for name in kept:
            if name not in found.exits:
                raise UsageError(f"kept: the network has no exit {name!r}")
        graph = analyse(found.model, found.input_shape)
        floats = holdout_accuracies(found.model, self.material, self.judged)
        macs = _macs(graph, kept)
        timed: dict[str, Any] = {}
        if self.reals is not None:
            timed = self._as_int8(found, pruned is None)
        exits = tuple(
            Leaving(
                name=name,
                float_accuracy=floats[name],
                int8_accuracy=timed["accuracies"][name] if timed else None,
                macs=macs[k],
                ms=timed["ms"][name] if timed else None,
                ratio=timed["ratios"][name] if timed else None,
            )
            for k, name in enumerate(kept)
        )
        return {
            "macs": macs[-1],
            "parameters": parameters(found.model),
            "exits": exits,
            "chain": timed.get("chain"),
            "yardstick_ms": timed.get("yardstick_ms"),
            "cpu": timed.get("cpu", ""),
        }

    def _as_int8(self, found: Checkpoint, is_unpruned: bool) -> dict[str, Any]:
        """Accuracies by the files that would be deployed, and a race against the yardstick."""
        from edgeexit.bundle import load_bundle
        from edgeexit.machine import this_machine
        from edgeexit.state import machine_facts

        with tempfile.TemporaryDirectory() as scratch:
            if is_unpruned:
                bundle = yardstick = self._bundle(found, self.folder / UNPRUNED)
            else:
                bundle = self._bundle(found, Path(scratch) / "pruned.edgeexit")
                place = self._place("yardstick")
                if place.is_dir():
                    yardstick = load_bundle(place)
                else:
                    yardstick = self._bundle(self.start, Path(scratch) / UNPRUNED)
            right, sure = self._answers(bundle)
            with hold(self.folder.parent / MEASURING, "the measuring", wait=True):
                ratios, ms, yardstick_ms = self._raced(bundle, yardstick)
        kept = self.job.kept
        taken = np.column_stack([sure[:, :-1], np.ones(len(sure), bool)]).argmax(axis=1)
        rates = np.bincount(taken, minlength=len(kept)) / len(taken)
        chain = Chain(
            accuracy=float(right[np.arange(len(taken)), taken].mean()),
            rates=tuple(rates.tolist()),
            ms=float(sum(rate * ms[n] for n, rate in zip(kept, rates, strict=True))),
            ratio=float(sum(rate * ratios[n][0] for n, rate in zip(kept, rates, strict=True))),
        )
        accuracies = dict(zip(kept, right.mean(axis=0).tolist(), strict=True))
        return {
            "accuracies": accuracies,
            "ratios": ratios,
            "ms": ms,
            "yardstick_ms": yardstick_ms,
            "chain": chain,
            "cpu": str(machine_facts(this_machine())["cpu"] or ""),
        }

    def _bundle(self, found: Checkpoint, folder: Path) -> "Bundle":
        from edgeexit.host.assess import int8_bundle

        assert self.reals is not None
        return int8_bundle(
            found.model,
            input_shape=found.input_shape,
            preprocess=found.preprocess,
            class_names=found.class_names,
            reals=self.reals,
            folder=folder,
        )

    def _answers(self, bundle: "Bundle") -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Of each judged sample: is each kept exit right, and is it sure (N, kept)."""
        from edgeexit.runtime import Runner

        samples = self.material.data.samples[self.judged]
        labels = self.material.data.labels[self.judged]
        with Runner(bundle, policy=None) as runner:
            logits = np.stack([runner.raw_logits(sample) for sample in samples])
        places = [bundle.exits.index(name) for name in self.job.kept]
        sure = [
            Confidence("max_prob", bundle.logits[k]).many(logits[:, k]) >= self.job.judge.sure
            for k in places
        ]
        right = logits[:, places].argmax(axis=2) == labels[:, None]
        return np.asarray(right), np.column_stack(sure)

    def _raced(
        self, bundle: "Bundle", yardstick: "Bundle"
    ) -> tuple[dict[str, Interval], dict[str, float], float]:
        """Leaving at each kept exit in turns with the yardstick: ratios, milliseconds, its own."""
        from edgeexit.race import race
        from edgeexit.runtime import Runner

        kept, final = self.job.kept, yardstick.exits[-1]
        runners = {
            f"exit {name}": Runner(bundle, Policy.forced(bundle, name, kept), preload=True)
            for name in kept
        }
        runners["yardstick"] = Runner(
            yardstick, Policy.forced(yardstick, final, (final,)), preload=True
        )
        samples = list(self.material.data.samples[self.judged[:RACED]])
        try:
            trial = race(runners, samples[:2], passes=1)
            each_s = sum(trial.latency_ms(name) for name in runners) / 1e3
            answers = self.job.judge.seconds / each_s  # of each runner
            least, wanted, most = PASSES
            count = max(2, min(len(samples), int(answers / wanted)))
            passes = max(least, min(most, int(answers / count)))
            found = race(runners, samples[:count], passes=passes, stretch=10)
        finally:
            for runner in runners.values():
                runner.close()
        ratios: dict[str, Interval] = {}
        for name in kept:
            pairs = zip(found.mean_ns[f"exit {name}"], found.mean_ns["yardstick"], strict=True)
            ratios[name] = _median([ours / theirs for ours, theirs in pairs])
        ms = {name: found.latency_ms(f"exit {name}") for name in kept}
        return ratios, ms, found.latency_ms("yardstick")


def _median(values: Sequence[float]) -> Interval:
    """The median and its 95 % interval, the order statistics that the binomial law names."""
    ordered = sorted(values)
    reach = 0.98 * len(ordered) ** 0.5
    low = max(0, int(np.floor(len(ordered) / 2 - reach)))
    high = min(len(ordered) - 1, int(np.ceil(len(ordered) / 2 + reach)) - 1)
    return float(np.median(ordered)), ordered[low], ordered[high]


def _macs(graph: Graph, kept: Sequence[str]) -> list[int]:
    """MACs to leave at each of the *kept* exits, the kept ones before it on the way."""
    costs = graph.layer_macs()
    found = []
    for k in range(len(kept)):
        on_the_way = set(kept[: k + 1])
        layers = sum(cost for n, cost in costs.items() if on_the_way & set(graph.layers[n].exits))
        found.append(layers + sum(cost for cost, exits in graph.others if on_the_way & set(exits)))
    return found


def _say(progress: Progress) -> None:
    """One line for each epoch and step, for log.txt."""
    step = progress.fit
    if progress.row is not None:
        _write(f"step {progress.done}/{progress.total}: {progress.row['macs']} MACs")
    elif step is not None and step.accuracies is not None:
        figures = "  ".join(f"{name} {value:.2%}" for name, value in step.accuracies.items())
        _write(f"{progress.action}: epoch {step.epoch}/{step.epochs}  {figures}")


def _write(line: str) -> None:
    sys.stderr.write(f"{printable(line)}\n")
    sys.stderr.flush()


def main(arguments: Sequence[str]) -> int:
    """Run the jobs in the folders *arguments*; the exit code is that of the first refusal."""
    try:
        for folder in arguments:
            run_job(Path(folder))
    except EdgeExitError as error:
        _write(f"Error: {error}")
        if error.hint:
            _write(f"Hint: {error.hint}")
        return error.exit_code
    except KeyboardInterrupt:
        _write("Error: interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

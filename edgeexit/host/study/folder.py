"""
The folder of a search: what is searched, the journal of its trials, and their jobs.

Callers see Study and Row. Hidden here: Optuna chooses what to try next and a journal remembers
it; what a trial made lies in content-addressed job folders beside it. Whoever asks or tells
holds the study's lock, so that a process that is killed leaves at most half a line behind, which
the next one cuts off.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from edgeexit.errors import BadFile, EdgeExitError, UsageError, storage
from edgeexit.files import digest_of, json_bytes, parse_json, read_bytes, read_json, write_file
from edgeexit.host.checkpoint import MAX_CHECKPOINT_BYTES, load_checkpoint
from edgeexit.host.prune.engine import training_half
from edgeexit.host.recipe import DataPart
from edgeexit.host.study.job import MODEL, Job, Result
from edgeexit.host.study.space import Space, Value
from edgeexit.host.study.trial import (
    UNPRUNED,
    digest_of_arrays,
    digest_of_material,
    tools,
)
from edgeexit.locks import hold

FORMAT = 1
NAME = "search"
OWN = {"study.lock", "models"}  # what stands before study.json does


@dataclass(frozen=True, kw_only=True)
class Row:
    """
    One trial: its *values*, the exits that it *kept*, the folder of its job and its result.

    *state* is "done", "refused" (*reason* says why), "failed" (its process died again and
    again) or "running". The network before is number -1.
    """

    number: int
    state: str
    values: Mapping[str, Value]
    kept: tuple[str, ...]
    folder: Path | None
    result: Result | None
    reason: str = ""

    @property
    def checkpoint(self) -> Path | None:
        """The pruned network, if there is one."""
        is_there = self.folder is not None and self.result is not None and self.result.checkpoint
        return self.folder / MODEL if self.folder is not None and is_there else None

    @property
    def what(self) -> str:
        """The values in short."""
        if self.number < 0:
            return "unpruned"
        words = []
        for name, value in sorted(self.values.items()):
            if not name.startswith("exits."):
                text = f"{value:.3g}" if isinstance(value, float) else str(value)
                words.append(f"{name.rpartition('.')[2]}={text}")
        return " ".join(words)


# ---------------------------------------------------------------- values of a result


def accuracy_and_cost(result: Result, cost: str) -> tuple[float, float]:
    """What a result is worth (0..1) and what it costs, as Judge.cost says; lower is better."""
    best = result.best
    if cost == "macs":
        return best.accuracy, float(best.macs)
    if cost == "best-exit":
        assert best.ratio is not None
        return best.accuracy, best.ratio[0]
    assert result.chain is not None
    return result.chain.accuracy, result.chain.ratio


class _Held(JournalFileOpenLock):
    """The journal is only touched under the study's lock."""

    def acquire(self) -> bool:
        """Nothing to do."""
        return True

    def release(self) -> None:
        """Nothing to do."""


class Study:
    """The folder: what is searched, the journal, and the jobs."""

    def __init__(
        self,
        model: Path,
        space: Space,
        out: Path,
        data: str | None,
        calibration: str | None,
        arch: str | None,
        max_drop: float | None,
    ) -> None:
        self.space, self.folder, self.max_drop = space, out, max_drop
        self.journal = out / "journal.log"
        self.jobs = out / "jobs"
        bytes_ = read_bytes(model, limit_bytes=MAX_CHECKPOINT_BYTES)
        start = load_checkpoint(model, arch=arch)
        self.exits = start.exits
        if space.sampler == "grid":
            self.points = int(np.prod([len(v) for v in space.grid(self.exits).values()]))
        else:
            space.dimensions(self.exits)
        material, origin = training_half(start, str(model), DataPart(path=data))
        source = _resolved(calibration or start.calibration_set)
        ranges = None
        if space.judge.int8:
            from edgeexit.host.assess import ranges_of

            ranges = digest_of_arrays(ranges_of(start, material, source).samples)
        self.facts: dict[str, Any] = {
            "model": digest_of(bytes_),
            "arch": arch,
            "data": digest_of_material(material),
            "ranges": ranges,
        }
        self.places: dict[str, str | None] = {
            "model": f"../../models/{self.facts['model']}.pt",
            "data": str(Path(str(origin.path)).resolve()),
            "kind": origin.kind,
            "ranges": source if ranges is not None else None,
        }
        self._claim(bytes_)

    def _claim(self, model: bytes) -> None:
        """Note in the folder what is searched; refuse a folder of another search."""
        document = {
            "format": FORMAT,
            **self.facts,
            "space": digest_of(json.dumps(self.space.document, sort_keys=True).encode()),
            "max_drop": self.max_drop,
            "tools": tools(),
        }
        path = self.folder / "study.json"
        if self.folder.exists() and not path.exists():
            there = {child.name for child in self.folder.iterdir() if child.name[0] != "."}
            if there - OWN:
                raise UsageError(
                    f"{self.folder}: is there already and holds no search",
                    hint="name another folder with -o",
                )
        with hold(self.folder / "study.lock", "this search", wait=True):
            if not path.exists():
                write_file(self.folder / "models" / f"{self.facts['model']}.pt", model)
                write_file(path, json_bytes(document))
                return
            table = read_json(path)
            table.expect_format(FORMAT)
            table.only(*document)
            other = [key for key, value in document.items() if table.values.get(key) != value]
        if other:
            raise UsageError(
                f"{self.folder}: holds another search: {', '.join(other)} differ",
                hint="undo the change to go on, or name another folder with -o",
            )

    # ------------------------------------------------------------ the journal

    @contextmanager
    def open(self) -> Iterator[optuna.Study]:
        """The study as it stands, nobody else touching it meanwhile. BadFile if damaged."""
        with hold(self.folder / "study.lock", "this search", wait=True):
            self._check_journal()
            directions = [StudyDirection.MINIMIZE]
            if self.max_drop is None:
                directions.append(StudyDirection.MAXIMIZE)
            optuna.logging.set_verbosity(optuna.logging.ERROR)
            path = str(self.journal)
            try:
                backend = JournalFileBackend(path, lock_obj=_Held(path))
                study = optuna.create_study(
                    study_name=NAME,
                    storage=JournalStorage(backend),
                    directions=directions,
                    sampler=optuna.samplers.RandomSampler(seed=0),
                    load_if_exists=True,
                )
                _ = study.trials
            except (OSError, EdgeExitError):
                raise
            except Exception as error:  # Optuna has no contract for damaged journals
                raise self._damaged(f"not a sound journal ({type(error).__name__})") from error
            yield study

    def _check_journal(self) -> None:
        """Cut off what a killed process left half written; BadFile for anything else unsound."""
        if not self.journal.exists():
            return
        data = read_bytes(self.journal)
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            with storage(self.journal):
                os.truncate(self.journal, whole)
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                table = parse_json(line, f"{self.journal}: line {number}")
                is_sound = table.get("op_code", int) >= 0 and table.find("study_id", int, 0) == 0
            except BadFile:
                is_sound = False
            if not is_sound:
                raise self._damaged(f"line {number} is damaged")

    def _damaged(self, what: str) -> BadFile:
        return BadFile(
            f"{self.journal}: {what}",
            hint="remove the journal to begin the study anew; jobs that are done are not run again",
        )

    # ------------------------------------------------------------ jobs

    def job(self, values: Mapping[str, Value] | None) -> Job:
        """The job for *values*, None for the network before. UsageError as Space.recipe."""
        recipe, kept, places = None, self.exits, dict(self.places)
        if values is not None:
            recipe = self.space.recipe(values, self.exits).to_document()
            kept = self.space.kept(values, self.exits)
            if self.space.judge.int8:
                places["yardstick"] = f"../{self.job(None).digest}/{UNPRUNED}"
        return Job(
            **self.facts,
            recipe=recipe,
            kept=kept,
            judge=self.space.judge,
            tools=tools(),
            places=places,
        )

    def prepared(self, values: Mapping[str, Value] | None) -> Path:
        """The folder of the job for *values*, with its job.json."""
        job = self.job(values)
        folder = self.jobs / job.digest
        job.save(folder)
        return folder

    def ask(self, study: optuna.Study, begun: FrozenTrial | None, worker: str) -> FrozenTrial:
        """
        A new trial with values and a job, or with the reason why it has none.

        *begun* is one whose process died between asking and noting the job.
        """
        number = len(study.trials) if begun is None else begun.number
        study.sampler = self._sampler(number)
        try:
            trial = study.ask() if begun is None else optuna.Trial(study, begun._trial_id)
            values = {one.name: one.suggest(trial) for one in self.space.dimensions(self.exits)}
        finally:
            # Grid's wants to stop a loop that is not there when a trial ends.
            study.sampler = optuna.samplers.RandomSampler(seed=0)
        trial.set_user_attr("worker", worker)
        try:
            trial.set_user_attr("job", self.prepared(values).name)
        except UsageError as error:
            trial.set_user_attr("refused", str(error))
        return study.trials[trial.number]

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Of one trial: what it draws depends on the seed and what has been told, on no process."""
        seed = int(np.random.default_rng([self.space.seed, number]).integers(2**31))
        if self.space.sampler == "grid":
            grid = self.space.grid(self.exits)
            return optuna.samplers.GridSampler(grid, seed=self.space.seed)
        if self.space.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        return optuna.samplers.TPESampler(seed=seed)

    def values_of(self, result: Result, before: Result) -> list[float]:
        """What the study is told."""
        accuracy, cost = accuracy_and_cost(result, self.space.judge.cost)
        start, most = accuracy_and_cost(before, self.space.judge.cost)
        if self.space.judge.cost == "macs":
            cost, most = cost / most, 1.0
        if self.max_drop is None:
            return [cost, accuracy]
        beyond = start - self.max_drop / 100 - accuracy
        # Whatever loses too much is worse than whatever does not.
        return [cost if beyond <= 0 else max(1.0, most, cost) + beyond]

    # ------------------------------------------------------------ what is there

    def row(self, trial: FrozenTrial) -> Row:
        """A trial with what its job's folder holds."""
        digest = trial.user_attrs.get("job")
        folder = None if digest is None else self.jobs / str(digest)
        if digest is not None and self.job(trial.params).digest != digest:
            raise self._damaged(f"trial {trial.number} names another job than its values make")
        result = None if folder is None else Result.load(folder)
        reason = str(trial.user_attrs.get("refused") or trial.user_attrs.get("failed") or "")
        if result is not None and result.refused is not None:
            reason = result.refused
        state = "running"
        if trial.state is TrialState.COMPLETE:
            state = "done"
            if result is None or result.refused is not None:
                raise BadFile(
                    f"{folder}: trial {trial.number} is done, but its result is not there",
                    hint=f"bring the folder back, or remove {self.journal}",
                )
        elif trial.state.is_finished():
            state = "failed" if "failed" in trial.user_attrs else "refused"
        return Row(
            number=trial.number,
            state=state,
            values=dict(trial.params),
            kept=self.space.kept(trial.params, self.exits),
            folder=folder,
            result=result,
            reason=reason,
        )


def _resolved(source: str | None) -> str | None:
    """*source* so that it is found from anywhere: a set's folder, or an absolute path."""
    from edgeexit.samples import find_set, is_set

    if source is None:
        return None
    if is_set(source):
        return str(find_set(source).folder.resolve())
    return str(Path(source).resolve()) if Path(source).exists() else source

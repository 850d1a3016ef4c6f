"""
Search for smaller forms of a network: many trials, several processes, one folder.

Callers see search and Found. Hidden here: every running trial names a process whose lock is free
as soon as it dies, so that a trial whose process was killed is found and gone on with by the
next one that looks.
"""

import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep

import optuna
from optuna.trial import TrialState

from edgeexit.errors import EdgeExitError, UsageError
from edgeexit.host.study.executor import Running
from edgeexit.host.study.folder import Row, Study, accuracy_and_cost
from edgeexit.host.study.job import Result
from edgeexit.host.study.space import Space
from edgeexit.locks import hold, is_held

LOOK_S = 1.0  # how often an idle process looks for what others left
POLL_S = 0.05
WORTH = 1.0  # points: a network this much worse than the one before may still be the best


@dataclass(frozen=True, kw_only=True)
class Found:
    """
    What a search has found so far: the network *before*, all *rows*, and the Pareto *front*.

    The front is sorted by cost; *best* is its fastest row within *max_drop* points of the
    network before (1 point if none was given), None if there is none. *cost* names what the
    cost is, *gains* how many rows of the front the network before does not beat itself.
    """

    folder: Path
    cost: str
    max_drop: float | None
    before: Row
    rows: tuple[Row, ...]
    front: tuple[Row, ...]
    gains: int
    best: Row | None


def search(
    model: Path,
    space: Space,
    out: Path,
    *,
    trials: int,
    jobs: int = 1,
    data: str | None = None,
    calibration: str | None = None,
    arch: str | None = None,
    max_drop: float | None = None,
    on_row: Callable[[Row, int], None] | None = None,
) -> Found:
    """
    Search *space* for smaller forms of the checkpoint *model* until there are *trials* trials.

    Everything lies in the folder *out*: the same call goes on with it, also beside others that
    are under way. *jobs* trials run at once, each in a process of its own. *on_row* hears of
    each trial that ends, with how many have ended. With *max_drop* (points) the one aim is the
    least cost within it, else cost and accuracy are both aimed at.

    UsageError, BadFile or Unsupported for what cannot be searched, or another search in *out*;
    StorageError and DeviceError as they come.
    """
    study = Study(model, space, out, data, calibration, arch, max_drop)
    worker = _Worker(study, trials, jobs, on_row or (lambda row, ended: None))
    worker.run()
    return _found(study, worker.before)


def _found(study: Study, before: Row) -> Found:
    """Everything so far."""
    with study.open() as journal:
        rows = [study.row(trial) for trial in journal.trials]
    assert before.result is not None
    kind = study.space.judge.cost
    done = [row for row in rows if row.state == "done"]
    points = [accuracy_and_cost(row.result, kind) for row in done if row.result is not None]
    front = [done[k] for k in pareto(points)]
    accuracies = dict(zip((row.number for row in done), points, strict=True))
    drop = WORTH if study.max_drop is None else study.max_drop
    unpruned = accuracy_and_cost(before.result, kind)
    least = unpruned[0] - drop / 100
    gains = sum(
        accuracies[row.number][0] > unpruned[0] or accuracies[row.number][1] < unpruned[1]
        for row in front
    )
    good = [row for row in front if accuracies[row.number][0] >= least - 1e-12]
    return Found(
        folder=study.folder,
        cost=kind,
        max_drop=study.max_drop,
        before=before,
        rows=tuple(rows),
        front=tuple(front),
        gains=gains,
        best=good[0] if good else None,
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """
    Positions of the (accuracy, cost) that no other beats in one without losing in the other.

    Sorted by cost; of equal points the first.
    """
    order = sorted(range(len(points)), key=lambda k: (points[k][1], -points[k][0], k))
    found: list[int] = []
    for k in order:
        if not found or points[k][0] > points[found[-1]][0]:
            found.append(k)
    return found


class _Worker:
    """One process at work on a study, with up to *jobs* children."""

    def __init__(
        self, study: Study, trials: int, jobs: int, tell: Callable[[Row, int], None]
    ) -> None:
        self.study, self.jobs, self.tell = study, jobs, tell
        self.trials = trials
        if study.space.sampler == "grid":
            self.trials = min(trials, study.points)
        self.name = uuid.uuid4().hex[:12]
        self.running: dict[int, Running] = {}
        self.looked = -LOOK_S
        self.others = False  # whether other processes run trials of this study

    def run(self) -> None:
        """Work until there is nothing left to do, here or elsewhere."""
        path = self._lock(self.name)
        with ExitStack() as stack:
            stack.enter_context(hold(path, "this search"))
            stack.callback(path.unlink, missing_ok=True)
            stack.callback(self._stop)
            self.before = self._run_before()
            while True:
                while len(self.running) < self.jobs and self._take():
                    pass
                if not self.running and not self.others:
                    break
                sleep(POLL_S)
                for number, running in list(self.running.items()):
                    self._look_at(number, running)

    def _lock(self, name: str) -> Path:
        return self.study.folder / "workers" / name

    def _stop(self) -> None:
        for running in self.running.values():
            running.stop()

    def _run_before(self) -> Row:
        """The network as it is, judged like all others."""
        running = Running(self.study.prepared(None), self.jobs)
        self.running[-1] = running
        while not running.is_over():
            sleep(POLL_S)
        del self.running[-1]
        if running.failure is not None:
            raise EdgeExitError(f"the unpruned network: {running.failure}")
        result = Result.load(running.folder)
        assert result is not None
        if result.refused is not None:
            raise UsageError(f"the unpruned network: {result.refused}")
        return Row(
            number=-1,
            state="done",
            values={},
            kept=self.study.exits,
            folder=running.folder,
            result=result,
        )

    def _take(self) -> bool:
        """Begin with a trial: one that was left by a dead process, or a new one; False if none."""
        if monotonic() - self.looked < LOOK_S:
            return False
        with self.study.open() as study:
            everything = study.trials
            left = [t for t in everything if t.state is TrialState.RUNNING]
            left = [t for t in left if t.number not in self.running]
            dead = [t for t in left if not is_held(self._lock(str(t.user_attrs.get("worker"))))]
            self.others = len(dead) < len(left)
            if not dead and len(everything) >= self.trials:
                self.looked = monotonic()
                return False
            trial = dead[0] if dead else None
            if trial is None or not {"job", "refused"} & set(trial.user_attrs):
                trial = self.study.ask(study, trial, self.name)
            else:
                optuna.Trial(study, trial._trial_id).set_user_attr("worker", self.name)
            if "refused" in trial.user_attrs:
                study.tell(trial.number, state=TrialState.FAIL)
                self._ended(study, trial.number)
                return True
            if dead:
                # Whoever made the folder may have died before it held anything.
                self.study.prepared(trial.params)
            folder = self.study.jobs / str(trial.user_attrs["job"])
        siblings = [one for one in self.running.values() if one.folder == folder]
        self.running[trial.number] = Running(folder, self.jobs, waits=bool(siblings))
        return True

    def _look_at(self, number: int, running: Running) -> None:
        """Tell the study if the trial *number* is over."""
        if not running.is_over():
            return
        with self.study.open() as study:
            result = Result.load(running.folder)
            if running.failure is not None:
                trial = optuna.Trial(study, study.trials[number]._trial_id)
                trial.set_user_attr("failed", running.failure)
            before = self.before.result
            assert before is not None
            if result is None or result.refused is not None:
                study.tell(number, state=TrialState.FAIL)
            else:
                study.tell(number, values=self.study.values_of(result, before))
            del self.running[number]
            self._ended(study, number)
        self.looked = -LOOK_S

    def _ended(self, study: optuna.Study, number: int) -> None:
        ended = sum(trial.state.is_finished() for trial in study.trials)
        self.tell(self.study.row(study.trials[number]), ended)

"""A search: strict spaces, a journal that survives any end, several processes on one study."""

import json
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
optuna = pytest.importorskip("optuna")

from edgeexit.cli import entry  # noqa: E402
from edgeexit.errors import BadFile, DeviceError, UsageError  # noqa: E402
from edgeexit.files import json_bytes, write_file  # noqa: E402
from edgeexit.host.study import executor, trial  # noqa: E402
from edgeexit.host.study.executor import Running  # noqa: E402
from edgeexit.host.study.folder import Study, accuracy_and_cost  # noqa: E402
from edgeexit.host.study.job import Job, Leaving, Result  # noqa: E402
from edgeexit.host.study.search import Found, pareto, search  # noqa: E402
from edgeexit.host.study.space import Space, read_space  # noqa: E402
from edgeexit.host.study.trial import run_job  # noqa: E402
from tests import searched  # noqa: E402

pytestmark = pytest.mark.host

TWO = {"target": {"macs": {"choices": [0.5, 0.7]}}}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return searched.network(tmp_path)


def made_up(job: Job) -> Result:
    """The more MACs remain, the better; the network before is right nine times out of ten."""
    share = 1.0
    if job.recipe is not None:
        share = job.recipe["prune"]["target"]["macs"]
        share -= 0.01 * (job.recipe["prune"]["criterion"] == "random")
    leaving = Leaving(
        name="exit1",
        float_accuracy=0.9 * share,
        int8_accuracy=None,
        macs=round(10_000 * share),
        ms=None,
        ratio=None,
    )
    checkpoint = None if job.recipe is None else "f" * 64
    return Result(
        job=job.digest, checkpoint=checkpoint, samples=30, macs=leaving.macs, exits=(leaving,)
    )


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs are done at once, by made_up; their names as they begin."""
    begun: list[str] = []

    def start(running: Running) -> None:
        begun.append(running.folder.name)
        result = made_up(Job.load(running.folder))
        write_file(running.folder / "result.json", json_bytes(result.to_document()))

    monkeypatch.setattr(Running, "_start", start)
    monkeypatch.setattr("edgeexit.host.study.search.POLL_S", 0.001)
    return begun


def targets(found: Found) -> list[Any]:
    return [(r.values["prune.target.macs"], r.values["prune.criterion"]) for r in found.rows]


# ---------------------------------------------------------------- the space


def test_the_default_space_is_sound_and_varies_what_it_promises() -> None:
    space = read_space(None)

    names = {one.name.rpartition(".")[2] for one in space.dimensions(("a", "b"))}
    assert {"macs", "criterion", "allocator", "selector", "learning_rate", "a"} <= names
    assert "b" not in names
    first = {one.name: one.ends[0] for one in space.varied}
    recipe = space.recipe(first)
    assert recipe.finetune is not None
    assert recipe.finetune.learning_rate == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("table", "change", "words"),
    [
        ("studies", {}, "studies: unknown key"),
        ("study", {"samplers": "tpe"}, "samplers: unknown key"),
        ("study", {"seed": -1}, "seed: found -1"),
        ("study", {"sampler": "best"}, "no tiny: study.sampler named 'best'"),
        ("judge", {"speed": 1}, "speed: unknown key"),
        ("judge", {"sure": 2.0}, "sure: found 2"),
        ("judge", {"samples": 0}, "samples: found 0"),
        ("judge", {"cost": "best-exit"}, "without int8 nothing can be timed"),
        ("exits", {"kept": "all"}, "kept: unknown key"),
        ("exits", {"keep": "some"}, "exits.keep named 'some'"),
        ("prune", {"share": 0.5}, "share: unknown key"),
        ("prune", {"criterion": {"choices": ["l1", "l7"]}}, "no criterion named 'l7'"),
        ("prune", {"allocator": "globel"}, "no allocator named 'globel'"),
        ("prune", {"target": {"macs": {"low": 0.0, "high": 0.5}}}, "macs: found 0"),
        ("prune", {"target": {"watts": {"low": 0.1, "high": 0.5}}}, "watts: unknown key"),
        ("prune", {"target": {"macs": 0.5, "params": 0.5}}, "expected one target"),
        ("prune", {"steps": {"low": 1, "high": 5000}}, "steps: found 5000"),
        ("prune", {"steps": {"low": 1}}, "high: missing"),
        ("prune", {"steps": {"low": 3, "high": 2}}, "low 3, high 2"),
        ("prune", {"steps": {"low": 1, "high": 2, "mid": 1}}, "mid: unknown key"),
        ("prune", {"steps": {"choices": [1, "2"]}}, "steps.choices: expected"),
        ("prune", {"steps": {"choices": [1, 1]}}, "steps.choices: expected"),
        ("prune", {"steps": {"choices": [1], "low": 1}}, "low: unknown key"),
        ("prune", {"phase_options": {"x": date(2026, 1, 1)}}, "no dates"),
        ("training", {"weight_decay": float("nan")}, "finite numbers"),
        ("final", {"epoch": 1}, "epoch: unknown key"),
        ("final", {"epochs": {"low": 1, "high": 2, "step": 0}}, "step: expected above 0"),
        ("training", {"learning_rate": {"low": 0.0, "high": 1.0, "log": True}}, "with log"),
        ("training", {"learning_rate": {"low": 0.1, "high": 900.0}}, "learning_rate: found 900"),
        ("training", {"batch": {"low": 1.5, "high": 9.0}}, "batch: expected int"),
    ],
)
def test_a_space_is_read_strictly(table: str, change: dict[str, Any], words: str) -> None:
    with pytest.raises((BadFile, UsageError), match=words):
        searched.space(**{table: change})


def test_a_space_in_which_nothing_varies_is_refused() -> None:
    fixed = {"target": {"macs": 0.5}, "criterion": "l1"}

    with pytest.raises(BadFile, match="nothing varies"):
        searched.space(prune=fixed)

    assert searched.space(prune=fixed, exits={"keep": "any"}).dimensions(("a", "b"))


@given(
    low=st.integers(1, 50),
    count=st.integers(2, 30),
    step=st.sampled_from([1, 2, 3, 0.05, 0.1, 0.25]),
)
@settings(max_examples=25, deadline=None)
def test_a_grid_has_every_step_and_both_ends(low: int, count: int, step: float) -> None:
    high = low + step * (count - 1)
    kind = int if isinstance(step, int) else float
    ends = {"low": kind(low), "high": kind(high), "step": kind(step)}
    space = searched.space(prune={"steps": 1}, training={"momentum": None})
    one = type(space.varied[0])(name="x", **ends)

    points = one.points("here")

    assert len(points) == count
    assert points[0] == low
    assert points[-1] == pytest.approx(high)


# ---------------------------------------------------------------- the front


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
@settings(max_examples=25, deadline=None)
def test_nothing_beats_the_front_and_something_on_it_beats_the_rest(
    points: list[tuple[float, float]],
) -> None:
    front = pareto(points)

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] >= other[0] and one[1] <= other[1]

    chosen = [points[k] for k in front]
    assert not any(beats(a, b) for a in points for b in chosen)
    assert all(p in chosen or any(beats(c, p) for c in chosen) for p in points)
    assert chosen == sorted(set(chosen), key=lambda p: p[1])


def test_each_cost_goes_with_the_accuracy_of_the_same_thing() -> None:
    early, late = (
        Leaving(name=name, float_accuracy=0.1, int8_accuracy=a, macs=m, ms=1.0, ratio=(r, r, r))
        for name, a, m, r in (("a", 0.8, 10, 0.5), ("b", 0.7, 20, 1.0))
    )
    chain = trial.Chain(accuracy=0.75, rates=(0.5, 0.5), ms=1.0, ratio=0.75)
    result = Result(job="", exits=(early, late), chain=chain)

    assert accuracy_and_cost(result, "macs") == (0.8, 10.0)
    assert accuracy_and_cost(result, "best-exit") == (0.8, 0.5)
    assert accuracy_and_cost(result, "expected") == (0.75, 0.75)


# ---------------------------------------------------------------- the search


def test_a_grid_is_visited_once_and_equal_jobs_are_run_once(
    tmp_path: Path, model: Path, runs: list[str]
) -> None:
    space = searched.space(study={"sampler": "grid"}, prune=TWO)

    found = search(model, space, tmp_path / "out", trials=50, jobs=3)

    assert sorted(targets(found)) == [(a, c) for a in (0.5, 0.7) for c in ("l1", "random")]
    assert len(runs) == len(set(runs)) == 5  # and the network before
    assert [row.values["prune.criterion"] for row in found.front] == ["random", "l1"] * 2
    random = searched.space(prune=TWO)
    again = search(model, random, tmp_path / "many", trials=12)
    assert len(again.rows) == 12
    assert len(runs) == len(set(runs[5:])) + 5 <= 10


def test_a_search_goes_on_as_if_it_had_never_stopped(
    tmp_path: Path, model: Path, runs: list[str]
) -> None:
    space = searched.space(study={"sampler": "tpe"})
    whole = search(model, space, tmp_path / "whole", trials=14)

    def stop(row: Any, ended: int) -> None:
        if ended == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(model, space, tmp_path / "broken", trials=14, on_row=stop)
    heard: list[int] = []
    broken = search(
        model, space, tmp_path / "broken", trials=14, on_row=lambda row, ended: heard.append(ended)
    )

    assert heard == list(range(6, 15))
    assert targets(broken) == targets(whole)
    assert len(set(targets(whole))) > 5
    begun = len(runs)
    search(model, space, tmp_path / "broken", trials=14)
    assert len(runs) == begun
    other = searched.space(study={"sampler": "tpe", "seed": 7})
    assert targets(search(model, other, tmp_path / "other", trials=14)) != targets(whole)


def test_a_greatest_drop_asks_for_the_least_cost_within_it(
    tmp_path: Path, model: Path, runs: list[str]
) -> None:
    space = searched.space(study={"sampler": "grid"})

    found = search(model, space, tmp_path / "out", trials=99, max_drop=30.0)

    # 0.9 x share may fall to 0.6: shares of 0.67 and more.
    assert found.best is not None
    assert found.best.values == {"prune.target.macs": 0.7, "prune.criterion": "random"}
    study = Study(model, space, tmp_path / "out", None, None, None, 30.0)
    with study.open() as journal:
        told = {t.number: t.value for t in journal.trials}
        best = journal.best_trial.number
    assert best == found.best.number
    good = {n for n, v in told.items() if v is not None and v < 1}
    assert good == {r.number for r in found.rows if r.values["prune.target.macs"] >= 0.7}
    assert search(model, space, tmp_path / "two", trials=99, max_drop=5.0).best is None


def test_choices_that_do_not_go_together_are_refused_trials(
    tmp_path: Path, model: Path, runs: list[str]
) -> None:
    # cka scores blocks only.
    space = searched.space(
        study={"sampler": "grid"}, prune={**TWO, "criterion": {"choices": ["l1", "cka"]}}
    )

    found = search(model, space, tmp_path / "out", trials=99)

    states = {row.values["prune.criterion"]: row.state for row in found.rows}
    assert states == {"l1": "done", "cka": "refused"}
    assert all("scores no filters" in r.reason for r in found.rows if r.state == "refused")


def test_a_folder_of_another_search_is_refused(
    tmp_path: Path, model: Path, runs: list[str]
) -> None:
    out = tmp_path / "out"
    search(model, searched.space(), out, trials=1)

    with pytest.raises(UsageError, match="another search: space differ"):
        search(model, searched.space(study={"seed": 4}), out, trials=1)
    with pytest.raises(UsageError, match="another search: max_drop differ"):
        search(model, searched.space(), out, trials=1, max_drop=1.0)
    (out / "study.json").write_text("{}")
    with pytest.raises(BadFile, match=r"study\.json"):
        search(model, searched.space(), out, trials=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").touch()
    with pytest.raises(UsageError, match="holds no search"):
        search(model, searched.space(), tmp_path / "mine", trials=1)


@pytest.mark.parametrize(
    "line",
    [
        b"garbage\n",
        b"{}\n",
        b'{"op_code": "4"}\n',
        b'{"op_code":4,"worker_id":"w","study_id":77,"datetime_start":"2026"}\n',
        b'{"op_code":99,"worker_id":"w","study_id":0}\n',
        b"\xff\xfe\n",
        b"[]\n",
    ],
)
def test_a_damaged_journal_is_refused(
    tmp_path: Path, model: Path, runs: list[str], line: bytes
) -> None:
    out = tmp_path / "out"
    search(model, searched.space(), out, trials=2)
    journal = out / "journal.log"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines[:4], line, *lines[4:]]))

    with pytest.raises(BadFile, match=r"journal\.log") as caught:
        search(model, searched.space(), out, trials=3)

    assert "remove the journal" in str(caught.value.hint)
    journal.unlink()
    begun = len(runs)
    assert len(search(model, searched.space(), out, trials=2).rows) == 2
    assert len(runs) == begun


def test_a_journal_whose_values_were_altered_is_refused(
    tmp_path: Path, model: Path, runs: list[str]
) -> None:
    out = tmp_path / "out"
    found = search(model, searched.space(), out, trials=1)
    journal = out / "journal.log"
    data = journal.read_bytes()
    share = found.rows[0].values["prune.target.macs"]
    other = 0.4 if share != 0.4 else 0.5
    old = f'"param_value_internal":{share}'.encode()
    assert old in data
    journal.write_bytes(data.replace(old, f'"param_value_internal":{other}'.encode()))

    with pytest.raises(BadFile, match="another job than its values make"):
        search(model, searched.space(), out, trials=1)


def test_every_end_of_a_killed_process_is_gone_on_from(
    tmp_path: Path, model: Path, runs: list[str]
) -> None:
    space = searched.space(study={"sampler": "grid"}, prune=TWO)
    whole = search(model, space, tmp_path / "whole", trials=4)
    data = (tmp_path / "whole" / "journal.log").read_bytes()
    ends = [k + 1 for k, byte in enumerate(data) if byte == ord("\n")]
    cut = sorted({*ends[:: max(1, len(ends) // 8)], ends[2] + 7, ends[-2] + 20, ends[-1]})
    out = tmp_path / "broken"
    search(model, space, out, trials=1)
    for length in cut:
        (out / "journal.log").write_bytes(data[:length])

        found = search(model, space, out, trials=4)

        assert targets(found) == targets(whole), length
        assert {row.state for row in found.rows} == {"done"}
    assert len(set(runs)) == 5


def test_a_trial_whose_result_is_gone_or_damaged_is_refused(
    tmp_path: Path, model: Path, runs: list[str]
) -> None:
    out = tmp_path / "out"
    found = search(model, searched.space(), out, trials=1)
    folder = found.rows[0].folder
    assert folder is not None
    (folder / "result.json").write_text("{")
    with pytest.raises(BadFile, match=r"result\.json"):
        search(model, searched.space(), out, trials=1)
    (folder / "result.json").unlink()
    with pytest.raises(BadFile, match="its result is not there"):
        search(model, searched.space(), out, trials=1)


# ---------------------------------------------------------------- processes


def test_two_processes_share_a_study_and_one_is_killed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is killed in its second epoch, after the second process has begun its own."""
    out, space = tmp_path / "out", searched.space()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    study = Study(model, space, out, None, None, None, None)
    run_job(study.prepared(None))
    code = f"""
import os, signal, time, torch
from pathlib import Path
torch.set_num_threads(1)
from edgeexit.host.study import executor, search, trial
from tests import searched
journal = Path({str(out)!r}) / "journal.log"
def kill(progress):
    if progress.fit is not None and progress.fit.epoch == 2:
        while journal.read_bytes().count(b'"op_code":4') < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGKILL)
trial._say = kill
executor.Running._start = lambda running: trial.run_job(running.folder)
search.search(Path({str(model)!r}), searched.space(), Path({str(out)!r}), trials=2)
"""
    begin = Running._start

    def start(running: Running) -> None:
        if (running.folder / "model.pt.state").exists():
            begin(running)
        else:
            run_job(running.folder)  # a process for it would only cost time

    monkeypatch.setattr(Running, "_start", start)
    first = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    try:
        while not list(out.glob("jobs/*/model.pt.state")):
            assert first.poll() is None
            time.sleep(0.02)
        found = search(model, space, out, trials=2)
        assert first.wait(timeout=60) == -signal.SIGKILL
    finally:
        first.kill()

    assert [row.state for row in found.rows] == ["done", "done"]
    folder = found.rows[0].folder
    assert folder is not None
    log = (folder / "log.txt").read_text()
    assert "epoch 1/3" not in log
    assert "epoch 2/3" in log
    assert not list(out.glob("jobs/*/*.state"))
    whole = Study(model, space, tmp_path / "whole", None, None, None, None)
    expected = run_job(whole.prepared(found.rows[0].values))
    result = found.rows[0].result
    assert result is not None
    assert result.checkpoint == expected.checkpoint
    assert result.exits == expected.exits


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Children run this code instead of a job; it knows its *folder*."""
    real = subprocess.Popen

    def becomes(code: str) -> None:

        def popen(command: list[str], **rest: Any) -> Any:
            folder = Path(command[-1])
            text = f"from pathlib import Path; folder = Path({str(folder)!r})\n{code}"
            return real([sys.executable, "-S", "-c", text], **rest)

        monkeypatch.setattr(executor.subprocess, "Popen", popen)

    return becomes


def over(running: Running) -> Running:
    deadline = time.monotonic() + 60
    while not running.is_over():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return running


def test_a_killed_child_is_started_again_but_not_for_ever(tmp_path: Path, child: Any) -> None:
    child("import os; os.kill(os.getpid(), 9)")

    running = over(Running(tmp_path, 1))

    assert running.starts == 3
    assert running.failure is not None
    assert "killed 3 times" in running.failure
    child(
        "import os; seen = folder / 'seen'\n"
        "if seen.exists(): (folder / 'result.json').touch()\n"
        "else: seen.touch(); os.kill(os.getpid(), 9)"
    )
    assert over(Running(tmp_path, 1)).failure is None


def test_what_a_child_refuses_is_refused_here(tmp_path: Path, child: Any) -> None:
    child("import sys; sys.stderr.write('Error: no disk\\nHint: buy one\\n'); sys.exit(5)")
    with pytest.raises(DeviceError, match="no disk") as caught:
        over(Running(tmp_path, 1))
    assert caught.value.hint == "buy one"
    child("import sys; sys.exit(130)")
    with pytest.raises(KeyboardInterrupt):
        over(Running(tmp_path, 1))


def test_a_busy_job_is_waited_for(
    tmp_path: Path, child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "RETRY_S", 0.01)
    child(
        "import os, sys; count = len(list(folder.glob('seen*')))\n"
        "(folder / f'seen{count}').touch()\n"
        "if count < 4: sys.exit(8)\n"
        "if count < 6: os.kill(os.getpid(), 9)\n"
        "(folder / 'result.json').touch()"
    )

    assert over(Running(tmp_path, 1)).failure is None


# ---------------------------------------------------------------- the command


def space_file(folder: Path, space: Space | None = None) -> Path:
    path = folder / "space.toml"
    path.write_text(
        """
format = 1
study = {sampler = "grid"}
judge = {cost = "macs", int8 = false}
exits = {keep = "all"}
[prune]
criterion = {choices = ["l1", "random"]}
target = {macs = {low = 0.5, high = 0.9, step = 0.2}}
"""
    )
    return path


def test_the_command_prints_the_front_and_the_best(
    tmp_path: Path, model: Path, runs: list[str], capsys: Any
) -> None:
    args = ["search", str(model), str(space_file(tmp_path)), "-o", str(tmp_path / "out")]

    assert entry([*args, "--trials", "6"]) == 0

    captured = capsys.readouterr()
    table = captured.out.splitlines()
    assert "unpruned" in table[2]
    assert "criterion=l1 macs=0.9" in captured.out
    assert "6 of 6 trials are beaten by no other" in captured.out
    assert "No trial is within 1 point of" in captured.out
    assert captured.err.count("trial ") == 6
    assert "(6/6)" in captured.err
    assert entry([*args, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["trials"]) == 6
    assert len(document["front"]) == 6
    assert document["best"] is None
    assert document["before"]["result"]["exits"][0]["float_accuracy"] == 0.9


def test_ctrl_c_and_refusals_of_the_command(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def interrupted(*args: Any) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(Running, "is_over", interrupted)
    args = ["search", str(model), str(space_file(tmp_path)), "-o", str(tmp_path / "out")]
    assert entry(args) == 130
    assert "The same command goes on" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "workers").iterdir())
    assert entry(["search", str(tmp_path / "none.pt")]) == 2
    assert entry([*args, "--max-drop", "nan"]) == 2
    assert entry(["search", "--show-space"]) == 0
    assert "[prune.target]" in capsys.readouterr().out

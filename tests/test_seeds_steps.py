"""The papers' tables: killed steps go on, seeds repeat, changed plans and bad data are one line."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from cifar import Cifar, manifest_digest  # noqa: E402
from seeds import gormez, kinds, steps  # noqa: E402
from seeds.steps import Job, Step, Table  # noqa: E402

from edgeexit.errors import BadFile, Busy, UsageError  # noqa: E402
from edgeexit.files import digest_of, npz_bytes  # noqa: E402
from edgeexit.locks import hold  # noqa: E402

pytestmark = pytest.mark.host

PICTURES, RANGES, TEST = 160, 20, 100
NET = kinds.Net(depth=8, blocks=(1, 2))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One mosaic of each split, each picture mostly of its class's colour; every 50th a JPEG."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "cifar10").mkdir()
    random = np.random.default_rng(0)
    labels = np.arange(1000) % 10
    source = np.where(np.arange(1000) % 50 == 49, 0, 1).astype(np.uint8)
    for split in ("train", "test"):
        noise = random.integers(0, 120, (1000, 32, 32, 3))
        tiles = noise + random.integers(0, 20, 3) + 12 * labels[:, None, None, None]
        grid = tiles.astype(np.uint8).reshape(25, 40, 32, 32, 3).swapaxes(1, 2)
        pixels = grid.reshape(25 * 32, 40 * 32, 3)
        Image.fromarray(pixels).save(
            folder / "cifar10" / f"{split}_00.webp", lossless=True, quality=0, method=0
        )
        packed = npz_bytes({"labels": labels, "source": source})
        (folder / "cifar10" / f"{split}_labels.npz").write_bytes(packed)
    write_manifest(folder)
    return folder


def write_manifest(folder: Path) -> None:
    names = sorted(path.name for path in (folder / "cifar10").iterdir())
    rows = ["path\tbytes\tsha256"]
    for name in names:
        content = (folder / "cifar10" / name).read_bytes()
        rows.append(f"cifar10/{name}\t{len(content)}\t{digest_of(content)}")
    (folder / "MANIFEST.tsv").write_text("\n".join(rows) + "\n")


def listed(folder: Path) -> str:
    rows = [line.split("\t") for line in (folder / "MANIFEST.tsv").read_text().splitlines()]
    return manifest_digest({row[0]: row[2] for row in rows[1:]})


def small_table(folder: Path, *, seed: int = 0) -> Table:
    """Data, a start, a training, a pruning and its answers."""
    cifar = Cifar(folder, listed=listed(folder))
    part = {"batch": 32, "learning_rate": 0.05, "seed": seed}
    return Table(
        name="small",
        facts={},
        steps=[
            kinds.data_step(cifar, training=PICTURES, ranges=RANGES, test=TEST),
            kinds.start_step(NET, seed=seed),
            kinds.train_step(
                f"{seed}/dense",
                f"{seed}/start",
                NET,
                pictures=PICTURES,
                augmentation={"flip": True, "shift": 2},
                training={**part, "epochs": 3},
            ),
            kinds.prune_step(
                f"{seed}/pruned",
                f"{seed}/dense",
                NET,
                pictures=PICTURES,
                epochs=2,
                extra_s=1.0,
                recipe={
                    "prune": {"criterion": "magnitude", "target": {"weights": 0.5}, "steps": 2},
                    "finetune": {**part, "epochs": 1},
                },
            ),
            kinds.answers_step(f"{seed}/answers", f"{seed}/pruned", NET, pictures=TEST),
        ],
        figures=lambda results, work: {},
    )


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What lasts of the small table, run without an interruption, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return steps.lasting(steps.run_table(small_table(data), folder)), folder


def told(work: Path, table: Table, capsys: pytest.CaptureFixture[str]) -> tuple[Any, list[str]]:
    """The document's lasting part, and the lines that a run showed."""
    capsys.readouterr()
    document = steps.run_table(table, work)
    return steps.lasting(document), capsys.readouterr().err.splitlines()


KILLED = f"""
import os, signal, sys
sys.path[:0] = [{str(BENCH)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
import test_seeds_steps as made
from seeds import steps
shown, tell = 0, steps.Job.tell

def counted(job, text=""):
    global shown
    shown += bool(text)
    if shown == 2:  # the second epoch is over, its state not yet written
        os.kill(os.getpid(), signal.SIGKILL)
    tell(job, text)

steps.Job.tell = counted
steps.run_table(made.small_table(Path(sys.argv[1])), Path(sys.argv[2]))
"""


def test_a_killed_step_goes_on_and_two_runs_of_one_seed_agree(
    data: Path,
    whole: tuple[dict[str, Any], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    killed = tmp_path / "killed"
    argv = [sys.executable, "-c", KILLED, str(data), str(killed)]
    done = subprocess.run(argv, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (killed / "0/dense/step.json").exists()
    assert "begun" in steps.listing(small_table(data), killed)

    resumed, lines = told(killed, small_table(data), capsys)
    assert sum("epoch" in line for line in lines) == 2  # of three: one is lost, no more
    assert resumed == whole[0]

    again, lines = told(killed, small_table(data), capsys)
    assert lines == []
    assert again == whole[0]


def test_what_comes_out_is_what_the_networks_are(whole: tuple[dict[str, Any], Path]) -> None:
    document, folder = whole
    done = document["steps"]
    assert done["data"]["result"]["training"]["pictures"] == PICTURES
    assert set(done["0/dense"]["versions"]) >= {"edgeexit", "torch", "numpy"}
    assert "wall_s" not in done["0/dense"]
    found = done["0/answers"]["result"]
    assert found["zeros"] == pytest.approx(0.5, abs=0.001)
    costs = kinds.as_curve_costs(found)
    assert (np.diff(costs) > 0).all()
    # Half of the weights are zero: of the dense MACs less remains, all heads on the way counted.
    assert (costs < [1.01 * macs for macs in found["dense_macs"].values()]).all()
    record = kinds.answers_of(folder / "0/answers")
    assert record.exits == NET.exits
    assert len(record) == TEST
    assert "test-00049" not in record.ids  # a JPEG
    right = record.correct.mean(axis=0)
    assert found["accuracy"] == pytest.approx(right.tolist(), abs=0.02)


def test_seeds_differ(data: Path, tmp_path: Path) -> None:
    weights = []
    for seed in (0, 1):
        table = small_table(data, seed=seed)
        run = steps.run_table(replace(table, steps=table.steps[:2]), tmp_path)
        weights.append(run["steps"][f"{seed}/start"]["result"]["weights"])
    assert weights[0] != weights[1]


# ---------------------------------------------------------------- steps that train nothing


def plain(name: str, run: Callable[[Job], dict[str, Any]] | None = None, **facts: Any) -> Step:
    return Step(name=name, run=run or (lambda job: {"name": job.step.name}), **facts)


def plain_table(*some: Step) -> Table:
    return Table(
        name="plain", facts={}, steps=some, figures=lambda results, work: {"results": results}
    )


def test_a_changed_plan_is_refused_and_so_is_what_was_made_of_it(tmp_path: Path) -> None:
    first, second = plain("a", task={"epochs": 1}), plain("b", needs=("a",))
    steps.run_table(plain_table(first, second), tmp_path)
    changed = plain("a", task={"epochs": 2})
    with pytest.raises(BadFile, match=r"a/step\.json: made by another plan \(task differs\)"):
        steps.run_table(plain_table(changed, second), tmp_path)
    (tmp_path / "a/step.json").unlink()
    with pytest.raises(BadFile, match=r"b/step\.json: made by another plan \(needs differs\)"):
        steps.run_table(plain_table(changed, second), tmp_path)


def test_wall_times_and_latencies_need_not_agree(tmp_path: Path) -> None:
    def timed(number: int) -> Table:
        run = plain("a", lambda job: {"measured": {"ms": number}, "accuracy": 0.5})
        return plain_table(run)

    ones = [steps.lasting(steps.run_table(timed(k), tmp_path / str(k))) for k in (1, 2)]
    assert ones[0] == ones[1]
    assert ones[0]["steps"]["a"]["result"] == {"accuracy": 0.5}


def test_a_step_reads_only_what_it_needs(tmp_path: Path) -> None:
    greedy = plain("b", lambda job: job.result_of("a"))
    with pytest.raises(UsageError, match="b: does not say that it needs a"):
        steps.run_table(plain_table(plain("a"), greedy), tmp_path)


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock", "a test"), pytest.raises(Busy):
        steps.run_table(plain_table(plain("a")), tmp_path)


def test_the_list_says_what_is_done_and_how_long_the_rest_takes(tmp_path: Path) -> None:
    def fails(job: Job) -> dict[str, Any]:
        raise UsageError("no")

    some = (plain("a"), plain("b", fails, gmacs=steps.FIRST_RATE * 600, extra_s=0.0), plain("c"))
    with pytest.raises(UsageError):
        steps.run_table(plain_table(*some), tmp_path)
    lines = steps.listing(plain_table(*some), tmp_path).splitlines()
    assert [line.split()[0] for line in lines] == ["done", "begun", "left", "1"]
    assert "10 min" in lines[1]
    assert lines[-1].startswith("1 steps done, 2 left: about 10 min")


def test_timing_comes_last_and_can_be_left_for_later(tmp_path: Path) -> None:
    table = plain_table(plain("a"), plain("a-timed", needs=("a",), is_timing=True), plain("b"))
    assert list(steps.run_steps(table, tmp_path, is_timed=False)) == ["a", "b"]
    assert not (tmp_path / "a-timed").exists()
    assert list(steps.run_table(table, tmp_path)["results"]) == ["a", "b", "a-timed"]


def test_the_clock_goes_on_after_an_interruption(tmp_path: Path) -> None:
    step = plain("a")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.seconds").write_text("100.0")
    found = steps.run_table(plain_table(step), tmp_path)
    assert 100 <= found["wall_s"] < 110
    assert not (tmp_path / "a/.seconds").exists()


@pytest.mark.parametrize("clock", ["nan", "inf", "-5", "1e400", "soon", ""])
def test_a_damaged_clock_starts_anew(tmp_path: Path, clock: str) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/.seconds").write_text(clock)
    assert 0 <= steps.run_table(plain_table(plain("a")), tmp_path)["wall_s"] < 10


def test_a_folder_however_it_is_spelt_is_one(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before a training's step was written down, it is not trained again."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(steps, "RESULTS", tmp_path)
    table = small_table(data)
    table = replace(table, steps=table.steps[:3])
    made = steps.command("A table.", "bench/x.py", lambda *_: table)
    name = "w \N{GRINNING FACE}"  # stands in a recipe, too
    assert steps.main(made, ["--work", name]) == 0
    (tmp_path / name / "0/dense/step.json").unlink()
    assert steps.main(made, ["--work", str(tmp_path / name)]) == 0


# ---------------------------------------------------------------- one line


def refused(
    capsys: pytest.CaptureFixture[str], make: Callable[..., Table], *args: str
) -> tuple[int, str]:
    """The exit code of the command, and the one line that it says before its hint."""
    code = steps.main(steps.command("A table.", "bench/x.py", make), args)
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("Error: ")]
    others = [line for line in said if not line.startswith(("Error: ", "Hint: ", "1/"))]
    assert len(errors) == 1
    assert others == []
    return code, errors[0]


def test_missing_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def make(full: bool, seeds: int | None, folder: Path | None) -> Table:
        return gormez.table(gormez.SMALL, data=folder or Path("elsewhere"))

    code, line = refused(capsys, make, "--data", str(tmp_path))
    assert code == 2
    assert f"{tmp_path}/MANIFEST.tsv: no such file" in line


def test_wrong_digests_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = refused(capsys, lambda *_: gormez.table(gormez.SMALL, data=data))
    assert code == 3
    assert "lists other files" in line

    copy = tmp_path / "data"
    (copy / "cifar10").mkdir(parents=True)
    for path in (*data.glob("*.tsv"), *data.glob("cifar10/*")):
        (copy / path.relative_to(data)).write_bytes(path.read_bytes())
    mosaic = copy / "cifar10/train_00.webp"
    mosaic.write_bytes(mosaic.read_bytes()[:-1])
    code, line = refused(capsys, lambda *_: small_table(copy), "--work", str(tmp_path / "work"))
    assert code == 3
    assert f"{mosaic}: digest" in line

    mosaic.unlink()
    code, line = refused(capsys, lambda *_: small_table(copy), "--work", str(tmp_path / "work"))
    assert code == 2
    assert str(mosaic) in line


def test_too_few_pictures_are_one_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cifar = Cifar(data, listed=listed(data))
    many = kinds.data_step(cifar, training=980, ranges=1, test=None)
    code, line = refused(capsys, lambda *_: plain_table(many), "--work", str(tmp_path))
    assert code == 2
    assert "980 lossless pictures, 1 behind the first 980" in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (None, "not valid JSON"),
        ({"format": 2}, "made by another plan (format differs)"),
        ({"wall_s": "long"}, "wall_s: expected float"),
        ({"wall_s": -1.0}, "wall_s: found -1, expected seconds"),
        ({"wall_s": 1e300}, "wall_s: found 1e+300, expected seconds"),
        ({"result": [1]}, "result: expected dict"),
    ],
)
@pytest.mark.parametrize("only_listed", [False, True])
def test_a_damaged_step_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any] | None,
    says: str,
    only_listed: bool,
) -> None:
    table = plain_table(plain("a", gmacs=1.0))
    steps.run_table(table, tmp_path)
    path = tmp_path / "a/step.json"
    whole = path.read_text()
    path.write_text(
        whole[:-20] if changes is None else json.dumps({**json.loads(whole), **changes})
    )
    args = ["--steps"] if only_listed else []
    capsys.readouterr()
    made = steps.command("A table.", "bench/x.py", lambda *_: table)
    assert steps.main(made, [*args, "--work", str(tmp_path)]) == 3
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith(f"Error: {path}: ")
    assert says in error
    assert hint.startswith(f"Hint: remove {path.parent} to make it again")


def test_a_file_in_the_place_of_the_work_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_text("")
    for args in ([], ["--steps"], ["--later"]):
        place = ["--work", str(tmp_path / "x")]
        code, line = refused(capsys, lambda *_: plain_table(plain("a")), *args, *place)
        assert code == 2
        assert "--work" in line


def test_the_call_that_is_left_is_told_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = steps.command("A table.", "bench/x.py", lambda *_: plain_table(plain("a")))
    assert steps.main(made, ["--full", "--seeds", "2", "--later", "--work", str(tmp_path)]) == 0
    said = capsys.readouterr().out.strip()
    assert said.endswith(f": python bench/x.py --full --seeds 2 --work {tmp_path}")


def test_a_full_disk_is_one_line(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, line = refused(capsys, lambda *_: small_table(data), "--work", str(tmp_path))
    assert code == 11
    assert "No space left on device" in line
    monkeypatch.undo()
    assert steps.listing(small_table(data), tmp_path).startswith("left")


def test_the_command_writes_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "RESULTS", tmp_path / "results")
    made = steps.command("A table.", "bench/x.py", lambda *_: plain_table(plain("a")))
    work = str(tmp_path / "work")
    assert steps.main(made, ["--steps", "--work", work]) == 0
    assert "0 steps done, 1 left" in capsys.readouterr().out
    assert steps.main(made, ["--seeds", "2", "--work", work]) == 0
    found = json.loads((tmp_path / "results/plain.json").read_text())
    assert found["command"] == "python bench/x.py --seeds 2"
    assert found["results"] == {"a": {"name": "a"}}
    assert found["steps"]["a"]["wall_s"] >= 0
    assert steps.main(made, ["--nonsense"]) == 2


def test_both_strategies_train_equally_long() -> None:
    """Epochs of S1 and S2 agree, and the twins' too, in the recipes that are really run."""
    for setting in (gormez.SMALL, gormez.FULL):
        made = {step.name: step.task for step in gormez._seed_steps(setting, 0)}
        total = {}
        for name, stages in (("s1", 1), ("s2", 2)):
            recipe = made[f"0/{name}"]["recipe"]
            total[name] = stages * recipe["prune"]["steps"] * recipe["finetune"]["epochs"]
            assert made[f"0/{name}-dense"]["training"]["epochs"] == setting.dense
        assert total["s1"] == total["s2"]
        one, other = (made[f"0/{name}-filters"]["recipe"] for name in ("s1", "s2"))
        count = setting.filter_steps
        # S2's heads have no filters: one fine-tuning stands for their steps.
        first = count * one["finetune"]["epochs"] + one["final"]["epochs"]
        assert first == (count + 1) * other["finetune"]["epochs"] + other["final"]["epochs"]


def test_a_mosaic_that_is_no_picture_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    for path in data.glob("cifar10/*"):
        (tmp_path / path.relative_to(data)).write_bytes(path.read_bytes())
    (tmp_path / "cifar10/test_00.webp").write_bytes(b"no picture")
    write_manifest(tmp_path)
    with pytest.raises(BadFile, match="not a picture"):
        Cifar(tmp_path, listed=listed(tmp_path)).pictures("test", 10)

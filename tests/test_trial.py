"""A trial is a folder: run once, gone on with after any end, and read back strictly."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("optuna")

from edgeexit.bundle import load_bundle  # noqa: E402
from edgeexit.errors import BadFile, Busy, EdgeExitError, UsageError  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint  # noqa: E402
from edgeexit.host.feed import split_holdout, to_input  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.prune.engine import Progress  # noqa: E402
from edgeexit.host.study import trial  # noqa: E402
from edgeexit.host.study.folder import Study  # noqa: E402
from edgeexit.host.study.job import Job, Result  # noqa: E402
from edgeexit.host.study.space import Judge  # noqa: E402
from edgeexit.host.study.trial import main, run_job  # noqa: E402
from edgeexit.locks import hold, is_held  # noqa: E402
from edgeexit.policy import Policy  # noqa: E402
from edgeexit.preprocess import real_values  # noqa: E402
from edgeexit.runtime import Runner  # noqa: E402
from tests import searched  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def study(folder: Path, name: str = "found", **changes: Any) -> Study:
    if not (folder / "net.pt").exists():
        searched.network(folder)
    model, space = folder / "net.pt", searched.space(**changes)
    return Study(model, space, folder / name, None, None, None, None)


def job(folder: Path, name: str = "found", **changes: Any) -> Path:
    return study(folder, name, **changes).prepared(searched.VALUES)


def stop_at_epoch_2(progress: Progress) -> None:
    if progress.fit is not None and progress.fit.epoch == 2:
        raise KeyboardInterrupt


def test_a_job_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job(tmp_path)

    result = run_job(folder)

    found = load_checkpoint(folder / "model.pt")
    graph = analyse(found.model, found.input_shape)
    start = load_checkpoint(tmp_path / "net.pt")
    assert result.checkpoint == found.digest
    assert [one.name for one in result.exits] == list(searched.EXITS)
    assert result.macs == graph.macs()
    assert result.exits[0].macs == graph.exit_macs()["exit0"]
    assert graph.macs() <= 0.6 * analyse(start.model, start.input_shape).macs()
    assert result.samples == 30
    assert not (folder / "model.pt.state").exists()
    monkeypatch.setattr(trial, "_Run", None)
    assert run_job(folder) == result
    assert main([str(folder)]) == 0


def test_a_job_that_is_under_way_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, refused = job(tmp_path), []

    def again(progress: Progress) -> None:
        if not refused:
            assert is_held(folder / "lock")
            with pytest.raises(Busy, match="another process") as caught:
                run_job(folder)
            refused.append(caught.value)

    monkeypatch.setattr(trial, "_say", again)

    run_job(folder)

    assert refused
    assert not is_held(folder / "lock")


def test_an_interrupted_job_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = job(tmp_path, "whole"), job(tmp_path, "broken")
    assert whole.name == broken.name
    run_job(whole)
    with monkeypatch.context() as patch:
        patch.setattr(trial, "_say", stop_at_epoch_2)
        assert main([str(broken)]) == 130
    assert not (broken / "result.json").exists()
    epochs: list[int] = []
    monkeypatch.setattr(
        trial, "_say", lambda progress: epochs.append(progress.fit.epoch if progress.fit else 0)
    )

    result = run_job(broken)

    assert set(epochs) == {2, 3}
    assert (broken / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()
    expected = Result.load(whole)
    assert expected is not None
    assert replace(result, seconds=0.0) == replace(expected, seconds=0.0)


def test_what_the_job_makes_impossible_is_a_result(tmp_path: Path) -> None:
    folder = job(tmp_path, prune={"round_to": 1024})

    result = run_job(folder)

    assert result.refused is not None
    assert result.refused.startswith("OutOfReach: ")
    assert Result.load(folder) == result


def test_what_is_wrong_around_a_job_is_no_result(tmp_path: Path, capfd: Any) -> None:
    folder = job(tmp_path)
    with np.load(tmp_path / "data.npz") as found:
        arrays = dict(found)
    arrays["samples"][0, 0, 0] ^= 1
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(BadFile, match="other samples"):
        run_job(folder)
    (tmp_path / "data.npz").unlink()
    assert main([str(folder)]) == UsageError.exit_code
    assert "Error: " in capfd.readouterr().err
    (model,) = (tmp_path / "found" / "models").glob("*.pt")
    model.write_bytes(model.read_bytes()[:-1])
    with pytest.raises(BadFile, match="not the network"):
        run_job(folder)

    assert not (folder / "result.json").exists()


def test_a_job_of_other_tools_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job(tmp_path)
    monkeypatch.setattr(trial, "__version__", "0.0.0")

    with pytest.raises(UsageError, match="other versions"):
        run_job(folder)


def test_a_dropped_exit_weighs_nothing_and_costs_nothing(tmp_path: Path) -> None:
    found = study(tmp_path, exits={"keep": "any"})
    both, one = (found.job({**searched.VALUES, "exits.exit0": keep}) for keep in (True, False))

    assert both.recipe is not None
    assert one.recipe is not None
    assert not any(both.recipe["final"]["exit_weights"])
    assert one.recipe["final"]["exit_weights"] == [0.0, 1.0]
    assert one.kept == ("exit1",)
    result = run_job(found.prepared({**searched.VALUES, "exits.exit0": False}))
    pruned = load_checkpoint(found.jobs / one.digest / "model.pt")
    graph = analyse(pruned.model, pruned.input_shape)
    assert [e.name for e in result.exits] == ["exit1"]
    assert result.macs == graph.exit_macs()["exit1"] < graph.macs()


# ---------------------------------------------------------------- the documents


def damaged(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


JOB_DAMAGE: list[Callable[[dict[str, Any]], object]] = [
    lambda d: d["identity"].update(model="0" * 64),
    lambda d: d["identity"]["recipe"]["final"].update(epochs=4),
    lambda d: d["identity"].update(more=1),
    lambda d: d["identity"].update(kept="exit1"),
    lambda d: d["identity"]["judge"].update(sure="much"),
    lambda d: d["places"].update(data=1),
    lambda d: d.update(format=2),
    lambda d: d.pop("places"),
    lambda d: d.update(extra=None),
]


def test_an_altered_job_is_refused(tmp_path: Path) -> None:
    folder = job(tmp_path)
    whole = (folder / "job.json").read_text()
    for change in JOB_DAMAGE:
        (folder / "job.json").write_text(whole)
        damaged(folder / "job.json", change)
        with pytest.raises(BadFile):
            Job.load(folder)
    (folder / "job.json").write_text(whole[:-9])
    with pytest.raises(BadFile, match=r"job\.json"):
        Job.load(folder)
    (folder / "job.json").unlink()
    with pytest.raises(UsageError, match="no such file"):
        run_job(folder)


RESULT_DAMAGE: list[Callable[[dict[str, Any]], object]] = [
    lambda d: d.update(job="0" * 64),
    lambda d: d.update(macs="many"),
    lambda d: d.update(more=1),
    lambda d: d.update(exits=[]),
    lambda d: d["exits"][0].update(ratio=[1.0, 1.0]),
    lambda d: d["exits"][0].pop("macs"),
    lambda d: d.update(chain={"accuracy": 1.0}),
    lambda d: d.update(format=9),
]


def some_result(job: str = "0" * 64) -> Result:
    exits = (
        trial.Leaving(
            name="a", float_accuracy=0.5, int8_accuracy=0.75, macs=3, ms=0.5, ratio=(1.0, 0.9, 1.1)
        ),
        trial.Leaving(
            name="b", float_accuracy=0.9, int8_accuracy=None, macs=9, ms=None, ratio=None
        ),
    )
    chain = trial.Chain(accuracy=0.8, rates=(0.5, 0.5), ms=0.7, ratio=0.9)
    return Result(job=job, macs=9, parameters=7, exits=exits, chain=chain, samples=4, seconds=1.5)


def test_a_result_comes_back_as_it_was_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 64)
    folder.mkdir()
    assert Result.load(folder) is None
    result = some_result(folder.name)
    whole = json.dumps(result.to_document())
    path = folder / "result.json"
    path.write_text(whole)
    assert Result.load(folder) == result
    for change in RESULT_DAMAGE:
        path.write_text(whole)
        damaged(path, change)
        with pytest.raises(BadFile) as caught:
            Result.load(folder)
        assert "run the job again" in str(caught.value.hint)
    for text in (whole[:-20], "", "[]", whole.replace("0.75", "NaN")):
        path.write_text(text)
        with pytest.raises(BadFile):
            Result.load(folder)


PLAIN = Job(
    model="m",
    arch=None,
    data="d",
    ranges=None,
    recipe={"a": 1},
    kept=("x",),
    judge=Judge(),
    tools={"t": "1"},
    places={"model": "p"},
)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["model", "arch", "data", "ranges", "recipe", "kept", "tools", "judge"]),
    st.text(min_size=1, max_size=5),
)
def test_whatever_changes_a_job_changes_its_name_and_no_place_does(key: str, text: str) -> None:
    values: dict[str, Any] = {
        "recipe": {"a": text},
        "kept": (f"{text}.",),
        "tools": {"t": f"{text}."},
        "judge": replace(PLAIN.judge, samples=len(text) + 5000),
    }
    other = replace(PLAIN, **{key: values.get(key, f"{text}.")})

    assert other.digest != PLAIN.digest
    assert replace(other, places={"model": text}).digest == other.digest


def test_a_lock_is_free_again_however_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    assert not is_held(path)
    with pytest.raises(EdgeExitError, match="went wrong"), hold(path, "it"):
        assert is_held(path)
        with pytest.raises(Busy, match="holds it"), hold(path, "it"):
            pass
        raise EdgeExitError("went wrong")

    with hold(path, "it"):
        pass


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=60))
@settings(max_examples=25, deadline=None)
def test_the_interval_of_a_median_holds_it(values: list[float]) -> None:
    middle, low, high = trial._median(values)

    assert min(values) <= low <= middle <= high <= max(values)
    assert trial._median(values[::-1]) == (middle, low, high)


# ---------------------------------------------------------------- as int8


def test_a_trial_is_judged_as_int8_beside_the_network_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("litert_torch")
    start = load_checkpoint(searched.network(tmp_path))
    with np.load(tmp_path / "data.npz") as data, torch.no_grad():
        reals = to_input(real_values(data["samples"], searched.GRAY), searched.GRAY)
        sure_of = exit_outputs(start.model, reals)["exit0"].softmax(1).amax(1)
    middle = float(sure_of.median())  # of the early exit's confidences
    found = study(
        tmp_path,
        judge={"int8": True, "cost": "expected", "seconds": 0.2, "sure": middle},
        final={"epochs": 1},
    )
    before = run_job(found.prepared(None))
    bundle = load_bundle(found.prepared(None) / "unpruned.edgeexit")
    # The pruned one is not converted a second time: what it answers is then known.
    monkeypatch.setattr(trial._Run, "_bundle", lambda *given: bundle)
    after = run_job(found.prepared(searched.VALUES))

    assert (before.checkpoint is None, after.checkpoint is None) == (True, False)
    assert after.macs < before.macs
    with Runner(bundle, Policy.full(bundle)) as runner, np.load(tmp_path / "data.npz") as data:
        split = split_holdout(90, 30, 0)[1]
        logits = np.stack([runner.logits(one) for one in data["samples"][split]])
        labels = data["labels"][split]
    right = (logits.argmax(axis=2) == labels[:, None]).mean(axis=0)
    for result in (before, after):
        assert result.chain is not None
        assert result.yardstick_ms is not None
        assert 0 < result.yardstick_ms < 1000
        assert [one.int8_accuracy for one in result.exits] == right.tolist()
        rates = result.chain.rates
        assert 0.1 < rates[0] < 0.9
        shares = np.exp(logits - logits.max(axis=2, keepdims=True))
        sure = (shares.max(axis=2) / shares.sum(axis=2))[:, 0] >= middle
        assert rates == pytest.approx((sure.mean(), 1 - sure.mean()))
        ratios = [one.ratio[0] for one in result.exits if one.ratio is not None]
        assert result.chain.ratio == pytest.approx(np.dot(rates, ratios))
        answers = np.where(sure, *logits.argmax(axis=2).T)
        assert result.chain.accuracy == pytest.approx((answers == labels).mean())

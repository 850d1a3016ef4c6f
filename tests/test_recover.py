"""Recovering: what the real int8 file loses is brought back, and nothing worse is kept."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.cli.train import command  # noqa: E402
from edgeexit.errors import Unsupported, UsageError  # noqa: E402
from edgeexit.host import assess as assess_room  # noqa: E402
from edgeexit.host import recover as room  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from edgeexit.host.fakequant import Simulated  # noqa: E402
from edgeexit.host.fit import holdout_accuracies  # noqa: E402
from edgeexit.host.recipe import TrainingPart  # noqa: E402
from edgeexit.host.recover import quantization_aware, recover, typical  # noqa: E402
from tests import trained  # noqa: E402

PART = TrainingPart(epochs=2, batch=32, learning_rate=0.003)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def recovered(model, **changes) -> room.Recovery:
    given = {"input_shape": trained.SHAPE, "where": "test", **changes}
    part = given.pop("part", PART)
    return recover(model, trained.material(), part, trained.reals(), **given)


def test_what_a_hostile_network_loses_by_int8_is_brought_back() -> None:
    model = trained.net()
    trained.make_hostile(model, 1000.0)
    heard: list[str] = []
    found = recovered(model, on_attempt=heard.append)
    first = found.attempts[0]
    assert found.loss(first) > 0.2
    assert found.loss(found.best) < 0.2 * found.loss(first)
    assert heard == [attempt.name for attempt in found.attempts]
    text = found.text()
    assert "equalise channels" in text
    assert f"({100 * found.loss(first):.2f} before)" in text
    assert found.to_document()["attempts"][0]["int8_accuracies"] == dict(first.accuracies)
    # The float network has not paid for it.
    now = holdout_accuracies(model, trained.material())
    assert all(now[name] > value - 0.02 for name, value in found.floats.items())


def test_a_fine_tune_as_int8_makes_the_simulated_network_better() -> None:
    model = trained.net()
    trained.make_hostile(model, 200.0)
    norm = model.blocks[0].first[1]
    statistics = norm.running_mean.clone()
    simulated = Simulated(model, typical(trained.reals()))
    before = sum(holdout_accuracies(simulated, trained.material()).values())
    part = TrainingPart(epochs=3, batch=32, learning_rate=1e-6)
    assert quantization_aware(model, trained.material(), part, trained.reals(), where="test")
    simulated.calibrate()
    after = sum(holdout_accuracies(simulated, trained.material()).values())
    assert after > before + 0.05
    torch.testing.assert_close(norm.running_mean, statistics, rtol=0, atol=0)


def test_a_fine_tune_that_diverges_leaves_the_network_as_it_was() -> None:
    model = trained.net()
    before = copy.deepcopy(model.state_dict())
    wild = TrainingPart(epochs=1, batch=64, learning_rate=99.0, momentum=0.99)
    given = (trained.material(), wild, trained.reals())
    assert not quantization_aware(model, *given, where="test")
    assert same(before, model.state_dict())
    large = TrainingPart(epochs=1, batch=4096, learning_rate=0.1)
    with pytest.raises(UsageError, match="found 4096"):
        quantization_aware(trained.net(), given[0], large, given[2], where="test")


def test_a_learning_rate_that_is_too_high_is_cut() -> None:
    model = trained.net()
    trained.make_hostile(model, 200.0)
    rates = []

    class Watched(room.Fit):
        def __init__(self, model, material, part, **rest) -> None:
            rates.append(part.learning_rate)
            super().__init__(model, material, part, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "Fit", Watched)
        part = TrainingPart(epochs=2, batch=32, learning_rate=1e-4)
        assert quantization_aware(model, trained.material(), part, trained.reals(), where="test")
    assert rates[:2] == pytest.approx([1e-4, 1e-5])


@dataclass
class Scripted:
    """Stands in for the int8 files: their accuracies are read off a list."""

    accuracies: list[float]
    judged: list = field(default_factory=list)

    def bundle(self, model, **_given):
        self.judged.append(copy.deepcopy(model.state_dict()))
        return self

    @property
    def provenance(self) -> dict:
        return {"ranges": {"chosen": "minmax"}}

    def answers(self, _bundle, _samples, _labels) -> dict:
        value = self.accuracies[len(self.judged) - 1]
        return {"exit0": value, "exit1": value}


def scripted(monkeypatch, accuracies: list[float]) -> Scripted:
    found = Scripted(accuracies)
    monkeypatch.setattr(room, "int8_bundle", found.bundle)
    monkeypatch.setattr(room, "int8_accuracies", found.answers)
    return found


def same(one, other) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_only_what_the_int8_file_gains_by_is_kept(monkeypatch) -> None:
    files = scripted(monkeypatch, [0.3, 0.2, 0.4, 0.35])
    model = trained.net()
    found = recovered(model)
    assert [(a.name, a.is_kept) for a in found.attempts] == [
        ("as it is", True),
        ("equalise channels", False),
        ("correct biases", True),
        ("fine-tune as int8", False),
    ]
    assert found.best.name == "correct biases"
    assert same(files.judged[2], model.state_dict())


def checkpoint_in(folder: Path) -> tuple[Path, list[str]]:
    """A hostile network's checkpoint, and the options that name its samples."""
    model = trained.net()
    trained.make_hostile(model, 1000.0)
    found = trained.material()
    np.savez(folder / "some.npz", samples=found.data.samples, labels=found.data.labels)
    save_checkpoint(
        folder / "net.pt",
        model=model,
        arch="edgeexit.host.zoo:resnet",
        kwargs=trained.KWARGS,
        input_shape=trained.SHAPE,
        class_names=found.data.class_names,
        preprocess=trained.PREPROCESS,
    )
    return folder / "net.pt", ["--recover", "--data", str(folder / "some.npz"), "--holdout", "300"]


def test_the_command_writes_the_best_weights(monkeypatch, tmp_path) -> None:
    files = scripted(monkeypatch, [0.3, 0.9, 0.2, 0.1])
    path, said = checkpoint_in(tmp_path)
    done = CliRunner().invoke(command, [str(path), *said, "--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    assert document["checkpoint"] == str(tmp_path / "net-recovered.pt")
    assert document["attempts"][1] == {
        "name": "equalise channels",
        "int8_accuracies": {"exit0": 0.9, "exit1": 0.9},
        "kept": True,
    }
    assert "int8, equalise channels ..." in done.stderr
    written = load_checkpoint(tmp_path / "net-recovered.pt")
    assert same(files.judged[1], written.model.state_dict())
    assert written.metadata["recovery"]["attempts"] == document["attempts"]
    assert written.metadata["recovered_from"] == load_checkpoint(path).digest
    assert written.training_bloom is not None
    again = CliRunner().invoke(command, [str(path), *said])
    assert isinstance(again.exception, UsageError)
    assert "--again" in again.exception.hint


def test_a_recipe_or_a_regime_has_nothing_to_recover(tmp_path) -> None:
    path, said = checkpoint_in(tmp_path)
    for wrong in ([str(path), *said, "--regime", "joint"], [str(tmp_path / "some.toml"), *said]):
        result = CliRunner().invoke(command, wrong)
        assert isinstance(result.exception, UsageError)
        assert "expected a checkpoint and no --regime" in str(result.exception)


def test_training_shows_what_came_out_as_int8(monkeypatch, tmp_path, tmp_path_factory) -> None:
    bundle = trained.assessed(tmp_path_factory).bundle
    latencies = dict.fromkeys(bundle.exits, (1.5, 1.25, 1.75))
    monkeypatch.setattr(assess_room, "int8_bundle", lambda *_args, **_given: bundle)
    monkeypatch.setattr(assess_room, "measured", lambda *_args, **_given: latencies)
    path, said = checkpoint_in(tmp_path)
    words = [str(path), *said[1:], "--epochs", "1", "--regime", "frozen", "--batch", "32"]
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.stdout.count("1.50 (1.25 .. 1.75)") == 4
    assert done.stdout.count(" before ") >= 2
    assert "right of 300 held-out training samples" in done.stdout
    assert "after: judge" in done.stderr
    found = CliRunner().invoke(command, [*words, "--json"], catch_exceptions=False)
    assert len(json.loads(found.stdout)["worth"]["after"]["exits"]) == 2
    monkeypatch.setattr(assess_room, "int8_bundle", _refuse)
    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0
    assert "Not measured: cannot be lowered" in done.stderr
    assert "% of the held-out samples right" in done.stdout


def _refuse(*_args, **_kwargs) -> None:
    raise Unsupported("cannot be lowered")


def test_nothing_is_touched_where_int8_costs_little(monkeypatch) -> None:
    model = trained.net()
    before = copy.deepcopy(model.state_dict())
    scripted(monkeypatch, [min(holdout_accuracies(model, trained.material()).values())] * 4)
    found = recovered(model, threshold=0.5)
    assert [attempt.name for attempt in found.attempts] == ["as it is"]
    assert same(before, model.state_dict())


def test_a_diverged_fine_tune_leaves_the_best_weights(monkeypatch) -> None:
    files = scripted(monkeypatch, [0.3, 0.4, 0.35])
    model = trained.net()
    wild = TrainingPart(epochs=1, batch=64, learning_rate=99.0, momentum=0.99)
    found = recovered(model, part=wild)
    assert found.best.name == "equalise channels"
    assert found.attempts[-1].accuracies == {}
    assert "no better" in found.text()
    assert same(files.judged[1], model.state_dict())

"""Assessing: a network in memory becomes the bundle that convert would make, and is measured."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeexit.errors import UsageError

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.bundle import Bundle  # noqa: E402
from edgeexit.host.answers import RealSamples, tflite_logits  # noqa: E402
from edgeexit.host.assess import (  # noqa: E402
    Assessment,
    exit_parameters,
    held_out,
    int8_bundle,
    measured,
    tail_hint,
)
from edgeexit.host.checkpoint import save_checkpoint  # noqa: E402
from edgeexit.host.convert import convert  # noqa: E402
from edgeexit.host.fit import holdout_accuracies  # noqa: E402
from edgeexit.host.graph import analyse, parameters  # noqa: E402
from edgeexit.preprocess import InputStage  # noqa: E402
from tests import trained  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def bundle_of(model: torch.nn.Module, reals: RealSamples, folder: Path) -> Bundle:
    return int8_bundle(
        model,
        input_shape=trained.SHAPE,
        preprocess=trained.PREPROCESS,
        class_names=trained.CLASSES,
        reals=reals,
        folder=folder,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Assessment:
    return trained.assessed(tmp_path_factory)


def test_the_bundle_is_the_one_that_convert_makes(made, tmp_path) -> None:
    save_checkpoint(
        tmp_path / "net.pt",
        model=trained.net(),
        arch="edgeexit.host.zoo:resnet",
        kwargs=trained.KWARGS,
        input_shape=trained.SHAPE,
        class_names=trained.CLASSES,
        preprocess=trained.PREPROCESS,
    )
    reals = trained.reals()
    np.savez(tmp_path / "some.npz", samples=reals.samples, labels=np.arange(len(reals)) % 4)
    converted = convert(tmp_path / "net.pt", tmp_path / "net.edgeexit", tmp_path / "some.npz")
    assert made.bundle.model_data() == converted.model_data()
    assert made.bundle.segments == converted.segments


def test_accuracies_are_those_of_torch_and_of_the_uncut_file(made) -> None:
    samples, labels = held_out(trained.material(), 120)
    assert made.samples == len(labels) == 120
    rights = [samples[k].tobytes() for k in range(120)]
    chosen = [
        k
        for k in trained.material().holdout
        if trained.material().data.samples[k].tobytes() in rights
    ]
    floats = holdout_accuracies(trained.net(), trained.material(), np.array(chosen))
    bundle = made.bundle
    spec = bundle.input
    stage = InputStage(bundle.preprocess, spec.shape, spec.dtype, spec.scale, spec.zero_point)
    inputs = [stage(sample)[0].copy() for sample in samples]
    answers = tflite_logits(bundle.model_data(), bundle.exit_tensors, inputs)
    assert [row.name for row in made.rows] == ["exit0", "exit1"]
    for row in made.rows:
        assert row.float_accuracy == floats[row.name]
        assert row.int8_accuracy == (answers[row.name].argmax(1) == labels).mean()
        assert row.int8_accuracy > 0.7


def test_costs_are_the_graphs_and_grow_from_exit_to_exit(made) -> None:
    model = trained.net()
    graph = analyse(model, trained.SHAPE)
    macs = graph.exit_macs()
    sizes = [segment.bytes for segment in made.bundle.segments]
    first, last = made.rows
    assert [row.macs for row in made.rows] == [macs["exit0"], macs["exit1"]]
    assert [first.int8_bytes, last.int8_bytes] == [sizes[0], sum(sizes)]
    assert made.macs == graph.macs() > last.macs > first.macs
    early_head = parameters(model.heads["1"])
    assert last.parameters == parameters(model) - early_head == made.parameters - early_head
    rest = [model.stem, model.blocks[0], model.heads["1"]]
    assert first.parameters == sum(map(parameters, rest))


def test_counting_leaves_frozen_parameters_frozen() -> None:
    model = trained.net()
    counts = exit_parameters(model, trained.SHAPE)
    model.stem.requires_grad_(False)
    assert exit_parameters(model, trained.SHAPE) == counts
    assert not next(model.stem.parameters()).requires_grad


def test_every_exit_is_measured_and_later_ones_cost_more(made) -> None:
    found = measured(made.bundle, seconds=1)
    assert list(found) == list(made.bundle.exits)
    for value, low, high in found.values():
        assert 0 < low <= value <= high < 1000
    first, last = (found[name] for name in made.bundle.exits)
    assert first[0] < last[0]
    rows = tuple(replace(row, latency_ms=found[row.name]) for row in made.rows)
    document = replace(made, rows=rows).to_document()
    assert document["exits"][1]["latency_ms"]["value"] == last[0]


def test_the_table_says_what_its_figures_are(made) -> None:
    text = made.text()
    assert "120 held-out training samples" in text
    assert f"{made.rows[0].int8_accuracy:.2%}" in text
    assert made.device in text
    assert made.to_document()["exits"][0]["latency_ms"] is None


def test_a_tail_that_answers_worse_is_pointed_out(made) -> None:
    def with_accuracies(*values: float) -> Assessment:
        pairs = zip(made.rows, values, strict=True)
        return replace(made, rows=tuple(replace(row, int8_accuracy=v) for row, v in pairs))

    assert tail_hint(with_accuracies(0.8, 0.9)) is None
    assert tail_hint(with_accuracies(0.9, 0.9)) is None
    hint = tail_hint(with_accuracies(0.91, 0.9))
    assert hint is not None
    assert "final exit (90.00%) is no better here than 'exit0' (91.00%)" in hint
    assert f"{(made.rows[1].macs - made.rows[0].macs) / 1e6:.4f} M MACs" in hint
    assert hint in with_accuracies(0.91, 0.9).text()


def test_too_few_samples_for_ranges_are_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match="5 samples for activation ranges"):
        bundle_of(trained.net(), trained.reals().first(5), tmp_path / "net")
    assert not (tmp_path / "net").exists()

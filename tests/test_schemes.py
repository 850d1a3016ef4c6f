"""Facts about every scheme: what it makes, that it is cut exactly, and that all else takes it."""

import json

import numpy as np
import pytest

from edgeexit.errors import BadFile, EdgeExitError, UsageError

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("ai_edge_quantizer")

from edgeexit import cut, tflite  # noqa: E402
from edgeexit.bundle import write_bundle  # noqa: E402
from edgeexit.evaluate import Record, record  # noqa: E402
from edgeexit.host import lower, zoo  # noqa: E402
from edgeexit.host.convert import check_chain  # noqa: E402
from edgeexit.host.quantize import Quantized, by_recipe, finished  # noqa: E402
from edgeexit.host.schemes import MATMULS, SCHEMES, _entry, find_scheme  # noqa: E402
from edgeexit.labelled import Samples  # noqa: E402
from edgeexit.policy import Confidence, Policy  # noqa: E402
from edgeexit.runtime import Runner  # noqa: E402
from edgeexit.selftest import run_selftest  # noqa: E402
from tests import host_nets  # noqa: E402

ENDS = {
    "int8": "int8",
    "float": "float32",
    "dynamic": "float32",
    "float16": "float32",
    "int8-matmul": "float32",
    "int16x8": "int16",
}


@pytest.fixture(scope="module")
def net():
    return host_nets.conv_net(count=60, seed=1)


@pytest.fixture(scope="module")
def lowered(net):
    return lower.from_torch(net[0], (1, 1, 12, 12), host_nets.GRAY)


@pytest.fixture(scope="module")
def made(net, lowered):
    return {name: scheme(lowered, net[1], None) for name, scheme in SCHEMES.items()}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_scheme_keeps_names_and_answers_and_is_cut_exactly(name, made, lowered, net) -> None:
    inputs, outputs = cut.model_io(made[name].data)

    assert [spec.dtype for spec in (*inputs, *outputs)] == [ENDS[name]] * 4
    assert [spec.name for spec in inputs] == ["input"]
    assert {spec.name for spec in outputs} == set(lowered.exits.values())
    assert min(made[name].agreement.values()) >= 0.9
    check_chain(made[name].data, made[name].exits, net[1])


@pytest.mark.parametrize("name", SCHEMES)
def test_bundle_runner_record_and_policy_take_what_a_scheme_makes(name, made, tmp_path) -> None:
    samples = host_nets.pictures(60)
    bundle = write_bundle(
        tmp_path / "net.edgeexit",
        name="net",
        model_data=made[name].data,
        exits=made[name].exits,
        class_names=list("abcde"),
        preprocess=host_nets.GRAY,
        selftest=samples[:8],
        scheme=name,
        provenance={"outside_xnnpack": dict(made[name].outside_xnnpack)},
    )

    taken = Samples(
        samples=samples[:12],
        labels=np.arange(12) % 5,
        ids=np.array([f"{k}" for k in range(12)]),
        name="some",
    )
    made_record = record(bundle, [taken])
    made_record.save(tmp_path / "record.npz")
    found = Record.load(tmp_path / "record.npz")

    run_selftest(bundle)
    assert (found.logits.dtype, found.logits.shape) == (ENDS[name], (12, 3, 5))
    assert found.specs == bundle.logits
    for k, exit in enumerate(bundle.exits):
        confidences = Confidence("max_prob", bundle.logits[k]).many(found.logits[:, k])
        with Runner(bundle, Policy.forced(bundle, exit, (exit,))) as runner:
            answers = [runner(sample) for sample in taken.samples]
        assert [answer.label for answer in answers] == found.logits[:, k].argmax(axis=1).tolist()
        assert [answer.confidence for answer in answers] == confidences.tolist()


def test_sizes_are_as_the_weights_say(made) -> None:
    size = {name: len(result.data) for name, result in made.items()}

    assert size["int8"] < size["float16"] < size["float"]
    assert size["dynamic"] < size["float16"]


def test_floats_come_between_where_only_layers_with_weights_are_integers(made, net) -> None:
    torch.manual_seed(0)
    small = zoo.vit(channels=1, classes=5, size=(12, 12), width=8, heads=2, blocks=1, exits=())
    lowered = lower.from_torch(small.eval(), (1, 1, 12, 12), host_nets.GRAY)
    mixed = SCHEMES["int8-matmul"](lowered, net[1].first(16), None)
    model = tflite.read_model(mixed.data)
    types = {
        (op.kind, model.tensors[op.outputs[0]].dtype)
        for op in model.operators
        if op.kind in (*MATMULS, "GELU", "SOFTMAX", "BATCH_MATMUL")
    }

    assert types >= {("FULLY_CONNECTED", "int8"), ("GELU", "float32"), ("SOFTMAX", "float32")}
    assert not types & {("GELU", "int8"), ("SOFTMAX", "int8")}
    check_chain(mixed.data, mixed.exits, net[1].first(16))


def test_a_recipe_may_mix_and_is_cut_exactly_where_integers_meet_floats(lowered, net) -> None:
    floats = [
        {"regex": ".*", "operation": kind, "algorithm_key": "no_quantize"}
        for kind in ("FULLY_CONNECTED", "OUTPUT")
    ]
    found = by_recipe([_entry((8, "INT"), 8), *floats])(lowered, net[1], None)
    plans = cut.cut(found.data, found.exits)

    assert [[spec.dtype for spec in plan.inputs] for plan in plans] == [["int8"]] * 3
    assert [plan.outputs[0].dtype for plan in plans] == ["float32"] * 3
    check_chain(found.data, found.exits, net[1])


def test_equal_samples_give_equal_bytes(made, lowered, net) -> None:
    for name in ("dynamic", "float16", "int8-matmul"):
        assert SCHEMES[name](lowered, net[1], None).data == made[name].data


def test_a_recipe_in_a_file_does_what_it_does_in_the_table(tmp_path, made, lowered, net) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps([_entry((8, "INT"))]))

    assert find_scheme(str(path))(lowered, net[1], None).data == made["dynamic"].data


RECIPE = [_entry((16, "FLOAT"))]
NUMBER = 3


def halves(lowered, reals, advance) -> Quantized:
    return finished(lowered, lowered.data, reals)


def broken(lowered, reals, advance) -> Quantized:
    raise ZeroDivisionError("no")


def test_a_module_names_a_recipe_or_a_function(made, lowered, net) -> None:
    here = __name__

    assert find_scheme(f"{here}:RECIPE")(lowered, net[1], None).data == made["float16"].data
    assert find_scheme(f"{here}:halves")(lowered, net[1], None).data == lowered.data
    with pytest.raises(UsageError, match="ZeroDivisionError: no"):
        find_scheme(f"{here}:broken")(lowered, net[1], None)


REFUSED = {
    "int-8": (UsageError, "no scheme named 'int-8'"),
    f"{__name__}:NUMBER": (UsageError, "neither a recipe"),
    f"{__name__}:none": (UsageError, "no attribute of"),
    "none_such_module:x": (UsageError, "cannot import"),
    "absent.json": (EdgeExitError, "absent.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_is_no_scheme_is_refused(name) -> None:
    kind, words = REFUSED[name]
    with pytest.raises(kind, match=words) as refusal:
        find_scheme(name)
    if name == "int-8":
        assert refusal.value.hint == "did you mean 'int8'?"


@pytest.mark.parametrize(
    "text",
    ['{"a": 1}', "[1]", "[]", '[{"regex": 1}]', '[{"regex": ".*"}]', '[],"x":[]', "[NaN]", "["],
)
def test_a_file_that_is_no_recipe_is_refused(text, tmp_path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)

    with pytest.raises(BadFile, match=r"bad\.json"):
        find_scheme(str(path))


@pytest.mark.parametrize(
    "change",
    [
        {"regex": "("},
        {"operation": "CONVOLVE"},
        {"algorithm_key": "x"},
        {"op_config": 1},
        {"op_config": {}},
    ],
)
def test_a_recipe_that_the_quantizer_does_not_take_is_refused(
    change, lowered, net, tmp_path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(json.dumps([{**_entry((8, "INT")), **change}]))

    with pytest.raises(EdgeExitError) as refusal:
        find_scheme(str(path))(lowered, net[1], None)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code in (2, 3, 4)

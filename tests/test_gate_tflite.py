"""Facts about ready .tflite files: they are cut as they are, and may be given exits."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from edgeexit.cli import convert as cli
from edgeexit.cli.steps import Steps
from edgeexit.errors import BadFile, EdgeExitError, Unsupported, UsageError
from edgeexit.host import fitted
from edgeexit.host.convert import convert
from edgeexit.host.gates import Asked, open_model
from edgeexit.interpreter import open_interpreter
from edgeexit.preprocess import Preprocess
from edgeexit.runtime import Runner
from edgeexit.tflite import read_model
from tests.endings import Head, network
from tests.graphs import finish
from tests.tiny import tiny_model

GRAY = Preprocess(kind="image", size=(12, 10), color="gray", scale=1 / 255, layout="nhwc")
ROW = Preprocess(kind="array", layout="as-is")
CLASSES = ("dark", "dim", "light", "bright")
EXITS = ("map0", "map1", "logits2")


def shades(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy pictures uint8 (count, 12, 10, 1) and their class, told by brightness."""
    rng = np.random.default_rng(5)
    labels = np.arange(count) % 4
    middle = 30 + 60 * labels[:, None, None, None]
    noise = rng.normal(0, 25, (count, 12, 10, 1))
    return np.clip(middle + noise, 0, 255).astype(np.uint8), labels


def asked(calibration: Path | None = None, **changes) -> Asked:
    given = {"labels": CLASSES, "preprocess": GRAY, "calibration": calibration}
    return Asked(**{**given, **changes})


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tflite")
    samples, labels = shades(200)
    np.savez(folder / "some.npz", samples=samples, labels=labels)
    np.savez(folder / "bare.npz", samples=samples)
    rows = np.random.default_rng(0).normal(0, 2, (64, 8)).astype(np.float32)
    np.savez(folder / "rows.npz", samples=rows, labels=np.arange(64) % 4)
    (folder / "labels.txt").write_text("\n".join(CLASSES))
    for name, preprocess in (("gray", GRAY), ("row", ROW)):
        lines = [f"{k} = {json.dumps(v)}" for k, v in preprocess.to_document().items()]
        (folder / f"{name}.toml").write_text("\n".join(lines))
    for name, quantized in (("int8", True), ("float", False)):
        (folder / f"{name}.tflite").write_bytes(tiny_model(quantized=quantized).data)
    for dtype in ("int8", "uint8", "float32"):
        heads = {"early": Head(4, ("SOFTMAX",)), "final": Head(4, ("SOFTMAX",))}
        (folder / f"rows-{dtype}.tflite").write_bytes(network(heads, dtype))
    return folder


def make(work: Path, name: str, out: Path, **changes):
    given = {
        "calibration": work / "some.npz",
        "labels": work / "labels.txt",
        "preprocess": work / "gray.toml",
    }
    return convert(work / f"{name}.tflite", out, **{**given, **changes})


@pytest.fixture(scope="module")
def fitted_int8(work):
    return make(work, "int8", work / "fitted.edgeexit", exits=EXITS)


# ---------------------------------------------------------------- files as they are


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float32"])
def test_a_ready_file_becomes_a_bundle_that_says_what_the_file_says(
    dtype: str, work, tmp_path
) -> None:
    name = f"rows-{dtype}"
    changes = {"calibration": work / "rows.npz", "preprocess": work / "row.toml"}
    scheme = "float" if dtype == "float32" else None

    bundle = make(work, name, tmp_path / "b.edgeexit", scheme=scheme, **changes)

    assert bundle.scheme == (scheme or dtype)
    assert bundle.exits == ("early", "final")
    assert bundle.input.dtype == bundle.logits[0].dtype == dtype
    whole = open_interpreter((work / f"{name}.tflite").read_bytes())
    with Runner(bundle, policy=None) as runner:
        for sample in np.load(work / "rows.npz")["samples"]:
            logits = runner.logits(sample).astype(np.float64)
            powers = np.exp(logits - logits.max(axis=1, keepdims=True))
            found = powers / powers.sum(axis=1, keepdims=True)
            whole.inputs["samples"][...] = runner.input_tensor(sample)
            whole.invoke()
            lowest = {"int8": -128.0, "uint8": 0.0}.get(dtype)
            for k, exit_name in enumerate(bundle.exits):
                said = whole.outputs[exit_name][0].astype(np.float64)
                said = said if lowest is None else (said - lowest) / 256
                assert np.abs(found[k] - said).max() <= (1e-6 if lowest is None else 1 / 256)


def test_no_more_than_a_boards_packages_is_needed(work) -> None:
    code = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        if root in ("torch", "tensorflow", "litert_torch", "ai_edge_quantizer", "jax", "onnx",
                    "scipy", "matplotlib", "keras"):
            raise ModuleNotFoundError(name)
import importlib.util as u
real = u.find_spec
sys.meta_path.insert(0, Wall())
def find_spec(name, *rest):
    try:
        return real(name, *rest)
    except ModuleNotFoundError:
        return None
u.find_spec = find_spec
from edgeexit.cli import entry
common = ["--labels", "labels.txt", "--preprocess", "gray.toml", "--calibration", "some.npz"]
codes = [
    entry(["convert", "int8.tflite", "--exits", "map0,logits2", "-o", "w1.edgeexit", *common]),
    entry(["convert", "float.tflite", "--scheme", "float", "-o", "w2.edgeexit", *common]),
    entry(["convert", "float.tflite", "-o", "w3.edgeexit", *common]),
]
assert codes == [0, 0, 2], codes
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert 'pip install "edgeexit[quantize]"' in done.stderr
    assert not (work / "w3.edgeexit").exists()


def unpacked(data: bytes) -> schema.ModelT:
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))


def with_signature(data: bytes, names: dict[str, str]) -> bytes:
    """*data* with a signature: name -> name of the output tensor."""
    model = unpacked(data)
    graph = model.subgraphs[0]
    places = {tensor.name.decode(): index for index, tensor in enumerate(graph.tensors)}
    model.signatureDefs = [
        schema.SignatureDefT(
            signatureKey="serving",
            inputs=[],
            outputs=[
                schema.TensorMapT(name=name, tensorIndex=places[tensor])
                for name, tensor in names.items()
            ],
        )
    ]
    return finish(model)


def renamed(data: bytes, old: str, new: str) -> bytes:
    model = unpacked(data)
    for tensor in model.subgraphs[0].tensors:
        if tensor.name.decode() == old:
            tensor.name = new
    return finish(model)


def exits_of(path: Path, data: bytes, **changes) -> list[str]:
    path.write_bytes(data)
    return list(open_model(path, asked(**changes)).lower().exits)


def test_exits_are_called_as_the_signature_or_the_user_says(tmp_path, work) -> None:
    path, data = tmp_path / "net.tflite", tiny_model().data
    signed = with_signature(data, {"b": "logits2", "c": "logits1", "a": "logits0"})
    one = tiny_model(exits=1).data
    joined = renamed(data, "logits1", "relu;dense/BiasAdd")

    assert exits_of(path, data) == ["logits0", "logits1", "logits2"]
    assert exits_of(path, signed) == ["a", "c", "b"]
    assert exits_of(path, signed, exits=("c", "logits2")) == ["c", "logits2"]
    assert exits_of(path, one, exits=("final",)) == ["final"]
    assert exits_of(path, joined, exits=("dense/BiasAdd", "logits2")) == [
        "dense/BiasAdd",
        "logits2",
    ]


def test_the_class_names_may_lie_in_the_files_archive(tmp_path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("labels.txt", "w\nx\ny\nz\n")
    path = tmp_path / "net.tflite"
    path.write_bytes(tiny_model().data + packed.getvalue())

    assert open_model(path, asked(labels=None)).class_names == ("w", "x", "y", "z")
    assert open_model(path, asked()).class_names == CLASSES


# ---------------------------------------------------------------- exits on inner maps


def test_inner_maps_get_int8_exits_that_know_the_classes(fitted_int8, work) -> None:
    bundle = fitted_int8
    heads = bundle.provenance["heads"]

    assert bundle.exits == EXITS
    assert bundle.scheme == "int8"
    assert bundle.provenance["float_agreement"] == {}
    assert heads["at"] == {"map0": "map0", "map1": "map1"}
    assert (heads["fitted_on"], heads["held_out"]) == (160, 40)
    assert heads["held_out_accuracy"]["map0"] > 0.85
    assert heads["held_out_accuracy"]["map1"] > 0.85
    model = read_model(bundle.model_data())
    assert {model.tensors[t].dtype for op in model.operators for t in op.outputs} == {"int8"}
    samples, labels = shades(400)
    with Runner(bundle, policy=None) as runner:
        logits = np.stack([runner.logits(sample) for sample in samples[200:]])
    right = (logits.argmax(axis=2) == labels[200:, None]).mean(axis=0)
    assert right[0] > 0.8
    assert right[1] > 0.8
    assert "fitted exits         2, on 160 samples; right on 40 others: map0 " in cli._table(
        bundle, Steps()
    )


def test_the_uncut_files_own_answer_is_left_as_it_was(fitted_int8, work) -> None:
    whole = open_interpreter((work / "int8.tflite").read_bytes())
    with Runner(fitted_int8, policy=None) as runner:
        for sample in shades(40)[0]:
            whole.inputs["input"][...] = runner.input_tensor(sample)
            whole.invoke()
            assert runner.raw_logits(sample)[2].tobytes() == whole.outputs["logits2"].tobytes()


def test_int8_exits_answer_as_float_ones_would(work) -> None:
    given = asked(work / "some.npz", exits=EXITS)
    found = {}
    for name in ("int8", "float"):
        opened = open_model(work / f"{name}.tflite", given)
        found[name] = opened.provenance["heads"]["held_out_accuracy"]

    assert abs(found["int8"]["map0"] - found["float"]["map0"]) <= 0.05


@pytest.mark.host
def test_a_float_files_new_exits_are_quantized_with_it(work, tmp_path) -> None:
    bundle = make(work, "float", tmp_path / "b.edgeexit", exits=EXITS)

    assert bundle.scheme == "int8"
    assert {spec.dtype for spec in bundle.logits} == {"int8"}
    assert min(bundle.provenance["float_agreement"].values()) > 0.9
    samples, labels = shades(400)
    with Runner(bundle, policy=None) as runner:
        logits = np.stack([runner.logits(sample) for sample in samples[200:]])
    assert (logits[:, 0].argmax(axis=1) == labels[200:]).mean() > 0.8


def test_two_conversions_give_the_same_bytes(fitted_int8, work, tmp_path) -> None:
    again = make(work, "int8", tmp_path / "fitted.edgeexit", exits=EXITS)

    assert again.digest == fitted_int8.digest


def test_the_fit_ends_where_the_loss_is_flat() -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 3, 300)
    features = (rng.normal(0, 1, (3, 5))[labels] + rng.normal(0, 1, (300, 5))).astype(np.float32)

    weights, bias = fitted.fit(features, labels, 3)

    logits = features @ weights.T + bias
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    errors = powers / powers.sum(axis=1, keepdims=True) - np.eye(3)[labels]
    spread = features.std()
    slope = errors.T @ features / 300 + fitted.DECAY * weights * spread**2
    assert np.abs(slope).max() < 1e-4
    assert np.abs(errors.mean(axis=0)).max() < 1e-4
    assert (logits.argmax(axis=1) == labels).mean() > 0.6


# ---------------------------------------------------------------- what is refused


def _batch(data: bytes, count: int) -> bytes:
    model = unpacked(data)
    for tensor in model.subgraphs[0].tensors:
        if tensor.buffer == 0:
            tensor.shape = np.array([count, *tensor.shape[1:]], np.int32)
    return finish(model)


def _custom(data: bytes, name: str) -> bytes:
    model = unpacked(data)
    for code in model.operatorCodes:
        code.builtinCode, code.customCode = schema.BuiltinOperator.CUSTOM, name
    return finish(model)


def _cycle(data: bytes) -> bytes:
    model = unpacked(data)
    first, *_, last = model.subgraphs[0].operators
    first.inputs = np.array([last.outputs[0], *first.inputs[1:]], np.int32)
    return finish(model)


def _wild_signature(data: bytes) -> bytes:
    model = unpacked(with_signature(data, {"a": "logits0"}))
    model.signatureDefs[0].outputs[0].tensorIndex = 999
    return finish(model)


def _two_inputs(data: bytes) -> bytes:
    model = unpacked(data)
    graph = model.subgraphs[0]
    graph.inputs = np.array([*graph.inputs, len(graph.tensors)], np.int32)
    graph.tensors.append(schema.TensorT(shape=np.array([1, 4], np.int32), name="more"))
    return finish(model)


DATA = tiny_model().data
REFUSED = {
    "neither labels nor set": (DATA, {"labels": None}, UsageError, "does not say which classes"),
    "no preprocessing": (DATA, {"preprocess": None}, UsageError, "does not say which inputs"),
    "another shape": (
        DATA,
        {"preprocess": Preprocess(kind="image", size=(9, 9), color="gray", layout="nhwc")},
        UsageError,
        r"takes \[1, 12, 10, 1\], its preprocessing makes \[1, 9, 9, 1\]",
    ),
    "a batch of two": (_batch(DATA, 2), {}, Unsupported, "expected one sample"),
    "a batch of any size": (_batch(DATA, -1), {}, Unsupported, "no fixed size"),
    "a cycle": (_cycle(DATA), {}, BadFile, "before it is made"),
    "a wild signature": (_wild_signature(DATA), {}, BadFile, "names tensor 999"),
    "two inputs": (_two_inputs(DATA), {}, Unsupported, "2 inputs"),
    "no common road": (
        network({"a": Head(4), "b": Head(4)}, "int8", apart=True),
        {"preprocess": ROW},
        Unsupported,
        "shares no operator",
    ),
    "a map beside logits": (
        network({"a": Head(4), "b": Head(12, ("PLACES",))}, "int8"),
        {"preprocess": ROW},
        Unsupported,
        "segmentation",
    ),
    "cut short": (DATA[:-400], {}, BadFile, "damaged"),
    "not a .tflite": (b"PK" * 99, {}, BadFile, "not a .tflite"),
    "unknown exit": (DATA, {"exits": ("map7",)}, UsageError, "no output or inner tensor"),
    "exit twice": (DATA, {"exits": ("map0", "map0")}, UsageError, "twice"),
    "no samples for a head": (DATA, {"exits": ("map0", "logits2")}, UsageError, "to fit one on"),
    "boxes": (_custom(DATA, "TFLite_Detection_PostProcess"), {}, Unsupported, "detection"),
    "own operator": (_custom(DATA, "MyOp"), {}, Unsupported, "operator CUSTOM MyOp"),
    "map as the output": (
        network({"final": Head(12, ("PLACES",))}, "float32"),
        {"preprocess": ROW},
        Unsupported,
        "segmentation",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_taken_is_refused_in_one_line(case: str, tmp_path) -> None:
    data, changes, kind, words = REFUSED[case]
    (tmp_path / "net.tflite").write_bytes(data)

    with pytest.raises(kind, match=words) as refusal:
        open_model(tmp_path / "net.tflite", asked(**changes))

    assert "\n" not in str(refusal.value)


def test_unlabelled_samples_fit_no_head(work) -> None:
    with pytest.raises(EdgeExitError, match="labels"):
        open_model(work / "int8.tflite", asked(work / "bare.npz", exits=EXITS))


@pytest.mark.parametrize("exits", [(), EXITS])
def test_a_network_that_answers_nan_is_refused(exits: tuple[str, ...], work, tmp_path) -> None:
    data = (work / "float.tflite").read_bytes()
    held = (t.constant for t in read_model(data, "net").tensors if t.dtype == "float32")
    weights = next(values.tobytes() for values in held if values is not None)
    nan = np.full(len(weights) // 4, np.nan, np.float32).tobytes()
    (tmp_path / "nan.tflite").write_bytes(data.replace(weights, nan))

    with pytest.raises(BadFile, match="NaN or infinity"):
        make(
            tmp_path,
            "nan",
            tmp_path / "b.edgeexit",
            scheme="float",
            exits=exits,
            **{
                "calibration": work / "some.npz",
                "labels": work / "labels.txt",
                "preprocess": work / "gray.toml",
            },
        )
    assert not (tmp_path / "b.edgeexit").exists()


def test_a_quantized_file_takes_no_other_scheme(work, tmp_path) -> None:
    with pytest.raises(Unsupported, match=r"is quantized already \(int8\)"):
        make(work, "int8", tmp_path / "b.edgeexit", scheme="float")


def test_the_file_and_its_exit_are_named_where_classes_are_miscounted(work, tmp_path) -> None:
    (tmp_path / "few.txt").write_text("a\nb\nc\nd\ne")

    wanted = r"int8\.tflite: exit '.*' answers with 4 classes, but there are 5 class names"
    with pytest.raises(Unsupported, match=wanted):
        make(work, "int8", tmp_path / "b.edgeexit", labels=tmp_path / "few.txt")


def test_one_number_for_four_classes_is_regression(work, tmp_path) -> None:
    (tmp_path / "one.tflite").write_bytes(network({"final": Head(1)}, "int8"))

    with pytest.raises(Unsupported, match="regression"):
        convert(
            tmp_path / "one.tflite",
            tmp_path / "b.edgeexit",
            work / "rows.npz",
            labels=work / "labels.txt",
            preprocess=work / "row.toml",
        )

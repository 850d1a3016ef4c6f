"""
Ask TensorFlow about a Keras file or a SavedModel: run by apart.run only, in a process of its own.

The parent sees lower and answer. Hidden here: how TensorFlow is told apart from what a file may
smuggle in (code in a Keras file, file and Python operators in a SavedModel), how any model
becomes one function of one sample, and that variables are made constants first: the converter
leaves some of Keras' own as state, which cannot be cut.
"""

import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before TensorFlow is imported: no banner, no GPU, sums in one order.
os.environ |= {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "CUDA_VISIBLE_DEVICES": "-1",
    "TF_ENABLE_ONEDNN_OPTS": "0",
    "KERAS_BACKEND": "tensorflow",
}

import keras
import numpy as np
import tensorflow as tf

from edgeexit.errors import BadFile, Unsupported, UsageError
from edgeexit.names import choose, load_attribute

LITE = "net.tflite"
SAMPLES = "samples.npy"
ANSWERS = "answers.npz"
_FIXED = "fixed"

# Operators that reach beyond the network.
_OUTSIDE = frozenset(
    {
        *("PyFunc", "PyFuncStateless", "EagerPyFunc", "NumpyFunction"),
        *("ReadFile", "WriteFile", "MatchingFiles", "PrintV2", "Print", "Save", "SaveSlices"),
        *("TFRecordReader", "TFRecordReaderV2", "TFRecordDataset", "TFRecordDatasetV2"),
        *("TextLineReader", "TextLineReaderV2", "TextLineDataset", "FixedLengthRecordDataset"),
        *("WholeFileReader", "WholeFileReaderV2", "FixedLengthRecordReaderV2", "IdentityReader"),
        *("CreateSummaryFileWriter", "CreateSummaryDbWriter", "RpcCall", "DataServiceDataset"),
        *("SqlDataset", "SnapshotDataset", "CacheDataset", "CacheDatasetV2", "SaveDataset"),
    }
)


@dataclass(frozen=True, kw_only=True)
class _Network:
    """*call* maps float32 (1, ...) of *shape* to the exits, by name; *owner* holds its weights."""

    call: Callable[[Any], dict[str, Any]]
    shape: tuple[int, ...]
    exits: tuple[str, ...]
    owner: Any


def lower(folder: Path, **told: Any) -> dict[str, Any]:
    """
    Write the float .tflite of *told*'s network into *folder*.

    Returns its "shape" and "exits", exit name -> output name of the file's signature.
    """
    network = _open(folder, **told)
    keys = _keys(network)

    def answers(x: Any) -> dict[str, Any]:
        return {keys[name]: values for name, values in network.call(x).items()}

    spec = tf.TensorSpec(network.shape, tf.float32, name="input")
    try:
        traced = tf.function(answers, input_signature=[spec]).get_concrete_function()
        _write(traced, sorted(keys.values()), spec, folder / _FIXED)
        made = tf.lite.TFLiteConverter.from_saved_model(
            str(folder / _FIXED), signature_keys=["serving_default"]
        ).convert()
    except Exception as error:  # MLIR, TensorFlow and Keras errors without a common base
        operator = re.search(r"(?:'|\b)(tf\.[\w.]+)'? op", str(error))
        what = f"operator {operator[1]}" if operator else "the network"
        why = "" if operator else f": {_first(error)}"
        raise Unsupported(
            f"{told['where']}: {what} cannot be lowered to TFLite{why}",
            hint="replace it in the network by operators that TFLite has",
        ) from error
    (folder / LITE).write_bytes(made)
    return {"shape": network.shape, "exits": keys}


def answer(folder: Path, **told: Any) -> dict[str, str]:
    """
    Write the network's answers to SAMPLES (N, ...), asked one at a time, into ANSWERS.

    Returns exit name -> array name.
    """
    network = _open(folder, **told)
    keys = _keys(network)
    rows: dict[str, list[Any]] = {name: [] for name in network.exits}
    for sample in np.load(folder / SAMPLES, allow_pickle=False):
        for name, values in network.call(tf.constant(sample[None])).items():
            rows[name].append(np.asarray(values, np.float32)[0])
    with (folder / ANSWERS).open("wb") as file:
        arrays: dict[str, Any] = {key: np.stack(rows[name]) for name, key in keys.items()}
        np.savez(file, **arrays)
    return keys


def _keys(network: _Network) -> dict[str, str]:
    """Exit name -> a name that survives in signatures and archives."""
    return {name: f"exit_{k}" for k, name in enumerate(network.exits)}


def _write(traced: Any, names: Sequence[str], spec: Any, folder: Path) -> None:
    # With constants instead of variables, and outputs under names that survive the converter.
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    frozen = convert_variables_to_constants_v2(traced)
    module = tf.Module()
    module.answers = tf.function(
        lambda x: dict(zip(names, frozen(x), strict=True)), input_signature=[spec]
    )
    tf.saved_model.save(module, str(folder), signatures={"serving_default": module.answers})


def _open(
    folder: Path,
    *,
    name: str,
    where: str,
    exits: Sequence[str],
    arch: str | None,
    home: str,
    is_trusted: bool,
) -> _Network:
    path = folder / name
    if path.is_dir():
        return _open_saved(path, where, exits, is_trusted)
    return _open_keras(path, where, exits, _custom(arch, home), is_trusted)


# ---------------------------------------------------------------- Keras files


def _custom(arch: str | None, home: str) -> dict[str, Any]:
    """The user's own class, and by the import of its module all that are registered there."""
    if arch is None:
        return {}
    sys.path.insert(0, home)
    found = load_attribute(arch, "--arch")
    return {getattr(found, "__name__", arch.rpartition(":")[2]): found}


def _open_keras(
    path: Path, where: str, exits: Sequence[str], custom: dict[str, Any], is_trusted: bool
) -> _Network:
    try:
        model = keras.saving.load_model(
            path, custom_objects=custom, compile=False, safe_mode=not is_trusted
        )
    except Exception as error:  # zip, HDF5, JSON and Keras' own errors
        raise _not_loaded(error, where, is_trusted) from error
    if not isinstance(model, keras.Model):
        raise BadFile(f"{where}: holds a {type(model).__name__}, expected a model")
    if exits and getattr(model, "inputs", None):  # subclassed models have no graph
        model = _answering_at(model, exits, where)
    shape = _keras_shape(model, where)
    names = _names(model(np.zeros(shape, np.float32), training=False), model, where)
    chosen = {exit: choose(exit, {n: n for n in names}, "exit") for exit in exits or names}

    def call(x: Any) -> dict[str, Any]:
        found = _flat(model(x, training=False))
        answers = dict(zip(names, found, strict=True))
        return {exit: answers[exit] for exit in chosen}

    return _Network(call=call, shape=shape, exits=tuple(chosen), owner=model)


def _not_loaded(error: Exception, where: str, is_trusted: bool) -> Exception:
    text = str(error)
    if not is_trusted and ("safe_mode" in text or "unsafe" in text.lower()):
        return BadFile(
            f"{where}: holds Python code (a Lambda layer, or an object that names a function): "
            "reading it would run it",
            hint="if you trust it: --trust-pickle; else write the layer as a class and name its "
            "module with --arch module:Class",
        )
    if found := re.search(r"Could not locate \w+ '([^']+)'", text):
        return UsageError(
            f"{where}: holds {found[1]}, which is none of Keras' own",
            hint="name its class, in the folder where its module lies: --arch module:Class",
        )
    return BadFile(f"{where}: Keras does not read it: {_first(error)}", hint="save it again")


def _answering_at(model: Any, exits: Sequence[str], where: str) -> Any:
    """*model* with layers among its outputs if *exits* name such."""
    outputs = dict(zip(_names(model.output, model, where), _flat(model.output), strict=True))
    layers = {layer.name: layer for layer in model.layers}
    if all(exit in outputs for exit in exits):
        return model
    chosen = {exit: choose(exit, {**layers, **outputs}, "output or layer") for exit in exits}
    tensors = {exit: getattr(found, "output", found) for exit, found in chosen.items()}
    return keras.Model(model.inputs, tensors)


def _keras_shape(model: Any, where: str) -> tuple[int, ...]:
    inputs = getattr(model, "inputs", None)
    if inputs:
        if len(inputs) != 1:
            listed = ", ".join(one.name for one in inputs)
            raise Unsupported(f"{where}: takes {len(inputs)} inputs ({listed}), expected one")
        return _fixed(inputs[0].shape, inputs[0].dtype, inputs[0].name, where)
    built = model.get_build_config() or {}
    shape = built.get("input_shape")
    if shape is None or any(isinstance(axis, list | tuple | dict) for axis in shape):
        raise Unsupported(
            f"{where}: does not say the shape of its one input",
            hint="call the model once on a sample before saving it",
        )
    return _fixed(shape, "float32", "input", where)


def _fixed(shape: Sequence[int | None], dtype: str, name: str, where: str) -> tuple[int, ...]:
    """*shape* for one sample; Unsupported unless all but the first axis are known."""
    if dtype != "float32":
        raise Unsupported(f"{where}: input {name!r} takes {dtype}, expected float32")
    if len(shape) < 2 or any(length is None for length in shape[1:]):
        raise Unsupported(
            f"{where}: input {name!r} has the shape {list(shape)}, expected fixed lengths",
            hint="save it with the one size that the board will see",
        )
    if shape[0] not in (None, 1):
        raise Unsupported(f"{where}: input {name!r} takes {shape[0]} samples at once, expected 1")
    return (1, *(int(length) for length in shape[1:] if length is not None))


def _flat(outputs: Any) -> list[Any]:
    if isinstance(outputs, Mapping):
        return list(outputs.values())
    return list(outputs) if isinstance(outputs, list | tuple) else [outputs]


def _names(outputs: Any, model: Any, where: str) -> list[str]:
    """The exits' names: a dict's keys, the layers' that answer, or exit0, exit1, ..."""
    found = _flat(outputs)
    if any(isinstance(one, Mapping | list | tuple) for one in found):
        raise Unsupported(f"{where}: its outputs are nested, expected a list or a dict of logits")
    if isinstance(outputs, Mapping):
        return [str(key) for key in outputs]
    known = getattr(model, "output_names", None) or []
    if len(known) == len(found) == len(set(known)):
        return list(known)
    return [f"exit{k}" for k in range(len(found))]


# ---------------------------------------------------------------- SavedModel


def _open_saved(path: Path, where: str, exits: Sequence[str], is_trusted: bool) -> _Network:
    if not is_trusted:
        _refuse_outside(path, where)
    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:  # TensorFlow's errors share no base with Python's
        raise BadFile(
            f"{where}: TensorFlow does not read it: {_first(error)}", hint="save it again"
        ) from error
    signatures = dict(getattr(loaded, "signatures", {}))
    if not signatures:
        raise Unsupported(
            f"{where}: has no signature to call", hint="save it with signatures=, or model.export"
        )
    if len(signatures) > 1 and "serving_default" not in signatures:
        raise Unsupported(
            f"{where}: has the signatures {', '.join(signatures)}, expected serving_default"
        )
    signature = signatures.get("serving_default") or next(iter(signatures.values()))
    inputs = signature.structured_input_signature[1]
    if len(inputs) != 1:
        raise Unsupported(
            f"{where}: takes {len(inputs)} inputs ({', '.join(inputs)}), expected one"
        )
    ((key, spec),) = inputs.items()
    if spec.shape.rank is None:
        raise Unsupported(f"{where}: input {key!r} has no fixed number of axes")
    shape = _fixed(spec.shape.as_list(), spec.dtype.name, key, where)
    names = {name: name for name in sorted(signature.structured_outputs)}  # else in any order
    chosen = [choose(exit, names, "exit") for exit in exits or names]

    def call(x: Any) -> dict[str, Any]:
        found = signature(**{key: x})
        return {exit: found[exit] for exit in chosen}

    return _Network(call=call, shape=shape, exits=tuple(chosen), owner=loaded)


def _refuse_outside(path: Path, where: str) -> None:
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

    document = SavedModel()
    try:
        document.ParseFromString((path / "saved_model.pb").read_bytes())
    except DecodeError as error:
        raise BadFile(f"{where}: saved_model.pb is damaged", hint="save it again") from error
    found = set()
    for graph in document.meta_graphs:
        found |= {node.op for node in graph.graph_def.node}
        for function in graph.graph_def.library.function:
            found |= {node.op for node in function.node_def}
    if outside := sorted(found & _OUTSIDE):
        raise BadFile(
            f"{where}: its graph reaches beyond the network ({', '.join(outside)}): opening it "
            "could read or write files, or run code",
            hint="if you trust it: --trust-pickle",
        )


def _first(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

"""
What must touch an ONNX file: read it, lower it, ask it. Runs in a child process of its own.

Callers (edgeexit.host.gates.onnx) see look, lower and answer, which speak through the files of one
folder. Hidden here: protobuf, onnxruntime and onnx2tf. They are given files that nobody vouches
for, may crash, and the last one prints a lot and overwrites what it reads; so all of them work on
copies, where they do no harm. Names of tensors are written anew in the copy, because onnx2tf
changes some ("/a:0" becomes "wa/a__0"), and the order of its outputs means nothing.
"""

import hashlib
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgeexit.errors import BadFile, EdgeExitError, Unsupported, UsageError
from edgeexit.files import npz_bytes
from edgeexit.names import unknown

GIVEN, WHOLE, FLOAT = "given.onnx", "whole.onnx", "float.tflite"
INPUTS, ANSWERS = "inputs.npy", "answers.npz"
MAX_BYTES = 2**31 - 1  # protobuf reads no more
MAX_INPUT_VALUES = 1 << 26
OWN_DOMAINS = ("", "ai.onnx")
CONTROL_FLOW = ("If", "Loop", "Scan", "SequenceMap")


def look(
    folder: Path, where: str, exits: Sequence[str], external_from: str | None
) -> dict[str, Any]:
    """
    Check the model in *folder*/given.onnx and write whole.onnx, whose outputs are the exits.

    *where* names the file in errors; *exits* names outputs or inner tensors (none: all outputs,
    by depth); *external_from* is the folder with its external data, None where that is not
    allowed. Returns {"input", "shape", "exits": {name: shape}, "ir", "opset", "producer",
    "external": the SHA-256 of the data that lay in other files, None if there is none}; the exits
    are called exit_0, exit_1, ... in the new file, in that order.
    """
    model = _parse((folder / GIVEN).read_bytes(), where)
    taken = _take_in_external(model, where, external_from)
    _check_sound(model, where)
    name, shape = _only_input(model, where)
    _check_numbers(model, where)
    chosen = _choose(model, exits, where)
    _write_anew(model, name, shape, chosen)
    (folder / WHOLE).write_bytes(model.SerializeToString(deterministic=True))
    shapes = _try_out(folder / WHOLE, shape, where)
    _describe(model, [shapes[f"exit_{k}"] for k in range(len(chosen))])
    (folder / WHOLE).write_bytes(model.SerializeToString(deterministic=True))
    return {
        "input": name,
        "shape": list(shape),
        "exits": {one: list(shapes[f"exit_{k}"]) for k, one in enumerate(chosen)},
        "ir": int(model.ir_version),
        "opset": max(int(o.version) for o in model.opset_import if o.domain in OWN_DOMAINS),
        "external": taken,
        "producer": f"{model.producer_name} {model.producer_version}".strip()[:100],
    }


def lower(folder: Path, where: str, is_shape_kept: bool, backend: str) -> None:
    """
    Make float.tflite of *folder*/whole.onnx with onnx2tf.

    Inputs of three axes and more come out channels-last unless *is_shape_kept*. *backend* is
    onnx2tf's word for who writes the file: "flatbuffer_direct" itself, "tf_converter" TensorFlow.
    """
    _forbid_network()
    _provide_onnxsim(folder)
    import onnx2tf

    work = folder / "onnx2tf"
    work.mkdir()
    shutil.copyfile(folder / WHOLE, work / "net.onnx")
    try:
        onnx2tf.convert(
            input_onnx_file_path=str(work / "net.onnx"),
            output_folder_path=str(work / "out"),
            keep_shape_absolutely_input_names=["input"] if is_shape_kept else None,
            tflite_backend=backend,
            output_signaturedefs=True,  # names for the outputs, whose order TensorFlow changes
            non_verbose=True,
        )
        made = (work / "out" / "net_float32.tflite").read_bytes()
    except (Exception, SystemExit) as error:  # onnx2tf raises whatever its parts raise
        raise Unsupported(
            f"{where}: onnx2tf cannot lower it: {_first(error)}",
            hint="replace the operator in the network by one that TFLite has",
        ) from error
    (folder / FLOAT).write_bytes(made)


def answer(folder: Path, where: str) -> None:
    """What onnxruntime answers with whole.onnx to each row of inputs.npy, into answers.npz."""
    rows = np.load(folder / INPUTS, mmap_mode="r")
    session = _session(folder / WHOLE, where)
    names = [output.name for output in session.get_outputs()]
    found: dict[str, list[Any]] = {name: [] for name in names}
    for row in rows:
        for name, values in zip(names, session.run(names, {"input": row[None]}), strict=True):
            found[name].append(values[0])
    (folder / ANSWERS).write_bytes(
        npz_bytes({name: np.stack(values) for name, values in found.items()})
    )


def _parse(data: bytes, where: str) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(data)
    except (DecodeError, ValueError) as error:
        raise BadFile(
            f"{where}: no sound ONNX file: truncated, damaged, or of another kind",
            hint="copy or export it again",
        ) from error
    if not (model.ir_version and model.opset_import and model.graph.node):
        raise BadFile(f"{where}: no ONNX file, or one without a graph, expected a network")
    if model.ir_version > onnx.IR_VERSION:
        raise Unsupported(
            f"{where}: written in version {model.ir_version} of ONNX's format, "
            f"expected {onnx.IR_VERSION} or older",
            hint=f"export it with onnx {onnx.__version__} or older",
        )
    newest = onnx.defs.onnx_opset_version()
    for own in model.opset_import:
        if own.domain in OWN_DOMAINS and own.version > newest:
            raise Unsupported(
                f"{where}: its operators are of opset {own.version}, expected {newest} or older",
                hint="export it with opset 17 or 20",
            )
    if model.functions:
        from onnx.inliner import inline_local_functions

        try:
            return inline_local_functions(model)
        except Exception as error:  # what C++ throws
            raise BadFile(f"{where}: damaged ONNX file: {_first(error)}") from error
    return model


def _check_sound(model: Any, where: str) -> None:
    import onnx

    for node in _nodes(model.graph):
        if node.domain not in OWN_DOMAINS:
            raise Unsupported(
                f"{where}: operator {node.op_type} is of the domain {node.domain!r}, expected "
                "operators of ONNX itself",
                hint="export the network without operators of your own or of one runtime",
            )
        if node.op_type in CONTROL_FLOW:
            raise Unsupported(
                f"{where}: operator {node.op_type} (control flow) cannot be cut",
                hint="export the network for one fixed shape, without branches and loops",
            )
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # the checker's own class, and what C++ throws
        raise BadFile(
            f"{where}: damaged ONNX file: {_first(error)}", hint="copy or export it again"
        ) from error


def _only_input(model: Any, where: str) -> tuple[str, tuple[int, ...]]:
    """The one input's name and shape; a batch axis without a length counts as 1."""
    from onnx import TensorProto

    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        names = ", ".join(value.name for value in inputs)
        raise Unsupported(f"{where}: the network has {len(inputs)} inputs ({names}), expected one")
    (value,) = inputs
    place, kind = f"{where}: input {value.name!r}", value.type.tensor_type
    if kind.elem_type != TensorProto.FLOAT:
        found = TensorProto.DataType.Name(kind.elem_type).lower()
        raise Unsupported(
            f"{place} takes {found}, expected float (float32)",
            hint="export the network from its first float tensor on: edgeexit does the rest "
            "(preprocessing)",
        )
    lengths = [axis.dim_value for axis in kind.shape.dim]
    if lengths and lengths[0] == 0:
        lengths[0] = 1
    known = [str(axis.dim_value or axis.dim_param or "?") for axis in kind.shape.dim]
    if not lengths or any(length < 1 for length in lengths):
        shape = ",".join(str(length) if length > 0 else "N" for length in lengths) or "1,3,224,224"
        raise Unsupported(
            f"{place} has the shape [{', '.join(known)}], expected one fixed size",
            hint="python -m onnxruntime.tools.make_dynamic_shape_fixed --input_name "
            f"{value.name} --input_shape {shape} {Path(where).name} fixed.onnx"
            + (" (put numbers in place of N)" if "N" in shape else ""),
        )
    if lengths[0] != 1:
        raise Unsupported(
            f"{place} has the shape [{', '.join(known)}], expected a batch of 1",
            hint="export it again for one sample, or with a batch axis of any length",
        )
    if math.prod(lengths) > MAX_INPUT_VALUES:
        raise Unsupported(f"{place} has {math.prod(lengths)} values, more than {MAX_INPUT_VALUES}")
    return value.name, tuple(lengths)


def _check_numbers(model: Any, where: str) -> None:
    from onnx import numpy_helper

    for tensor in _tensors(model.graph):
        try:
            values = numpy_helper.to_array(tensor)
        except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
            raise BadFile(f"{where}: tensor {tensor.name!r}: damaged: {_first(error)}") from error
        if values.dtype.kind == "f" and np.isnan(values).any():
            raise BadFile(
                f"{where}: tensor {tensor.name!r} holds NaN, expected numbers",
                hint="the training diverged: train again",
            )


def _choose(model: Any, exits: Sequence[str], where: str) -> list[str]:
    from onnx import TensorProto

    outputs = {value.name: value.type.tensor_type.elem_type for value in model.graph.output}
    inner = dict.fromkeys(name for node in model.graph.node for name in node.output if name)
    chosen = list(exits) or _by_depth(model.graph, list(outputs))
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"{where}: --exits names one tensor twice: {', '.join(chosen)}")
    for name in chosen:
        if name not in inner:
            raise unknown(name, inner, f"tensor in {where}")
        if outputs.get(name, TensorProto.FLOAT) != TensorProto.FLOAT:
            found = TensorProto.DataType.Name(outputs[name]).lower()
            raise Unsupported(
                f"{where}: output {name!r} gives {found}, expected float logits",
                hint=f"name the outputs to answer at: --exits NAME,NAME (have: {', '.join(inner)})"
                if len(inner) < 20
                else "name the outputs to answer at: --exits NAME,NAME",
            )
    return chosen


def _by_depth(graph: Any, outputs: list[str]) -> list[str]:
    """*outputs* earliest first: by the nodes shared with others, then by all that they need."""
    maker = {name: k for k, node in enumerate(graph.node) for name in node.output}
    needs: dict[str, set[int]] = {}
    for output in outputs:
        found, names = needs.setdefault(output, set()), [output]
        while names:
            k = maker.get(names.pop())
            if k is not None and k not in found:
                found.add(k)
                names.extend(graph.node[k].input)
    counts = Counter(k for found in needs.values() for k in found)
    shared = {output: sum(counts[k] > 1 for k in found) for output, found in needs.items()}
    return sorted(outputs, key=lambda output: (shared[output], len(needs[output])))


def _write_anew(model: Any, source: str, shape: Sequence[int], exits: Sequence[str]) -> None:
    """Call the input "input" and the exits exit_0, ... in *model*; make them its only outputs."""
    from onnx import TensorProto, helper

    fresh = {source: "input"} | {name: f"exit_{k}" for k, name in enumerate(exits)}
    taken = {name for node in model.graph.node for name in (*node.input, *node.output)}
    taken |= {tensor.name for tensor in model.graph.initializer}
    for name in set(fresh.values()) & taken - set(fresh):
        fresh[name] = _unused(name, taken)

    for node in _nodes(model.graph):
        for names in (node.input, node.output):
            for k, name in enumerate(names):
                names[k] = fresh.get(name, name)
    for tensor in model.graph.initializer:
        tensor.name = fresh.get(tensor.name, tensor.name)
    # Shapes that were written down for another batch would contradict the new one.
    del model.graph.value_info[:], model.graph.input[:], model.graph.output[:]
    del model.metadata_props[:]
    model.graph.input.append(helper.make_tensor_value_info("input", TensorProto.FLOAT, shape))
    for k in range(len(exits)):
        model.graph.output.append(
            helper.make_tensor_value_info(f"exit_{k}", TensorProto.FLOAT, None)
        )


def _unused(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _describe(model: Any, shapes: Sequence[Sequence[int]]) -> None:
    from onnx import TensorProto, helper

    for output, shape in zip(model.graph.output, shapes, strict=True):
        output.CopyFrom(helper.make_tensor_value_info(output.name, TensorProto.FLOAT, shape))


def _session(path: Path, where: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    # The network as it stands: what is compared with must not have been optimized.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has a dozen classes without a common base
        raise Unsupported(
            f"{where}: onnxruntime does not take it: {_first(error)}",
            hint="export it again with opset 17, which every converter knows",
        ) from error


def _try_out(path: Path, shape: Sequence[int], where: str) -> dict[str, tuple[int, ...]]:
    """The shapes of all outputs, found by running the network once on zeros."""
    session = _session(path, where)
    names = [output.name for output in session.get_outputs()]
    try:
        found = session.run(names, {"input": np.zeros(shape, np.float32)})
    except Exception as error:
        raise Unsupported(f"{where}: onnxruntime fails at it: {_first(error)}") from error
    return {name: tuple(values.shape) for name, values in zip(names, found, strict=True)}


# ---------------------------------------------------------------- data in other files


def external_path(folder: Path, location: str, where: str) -> Path:
    """
    The file of external data at *location*, as the model in *folder* names it.

    BadFile unless it is a regular file inside *folder*, whatever links lie on the way.
    """
    place = f"{where}: external data {location!r}"
    base = folder.resolve()
    if not location or "\0" in location or Path(location).is_absolute():
        raise BadFile(f"{place}: expected a file below the model's own folder")
    try:
        path = (base / location).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise BadFile(f"{place}: no such file beside the model", hint="copy it there") from error
    if not path.is_relative_to(base) or not path.is_file():
        raise BadFile(f"{place}: leads out of the model's folder, or is no file")
    return path


def _take_in_external(model: Any, where: str, folder: str | None) -> str | None:
    """
    Put what lies in other files into *model* itself: nobody else shall open a path of it.

    Returns the SHA-256 of all of it, None if there is none.
    """
    from onnx import TensorProto

    total_bytes, sha = 0, hashlib.sha256()
    for tensor in _tensors(model.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        location = told.get("location", "")
        if folder is None:
            raise UsageError(
                f"{where}: keeps weights in another file ({location!r}), expected all in one",
                hint="if you trust it: --allow-external-data (files below its folder only)",
            )
        path = external_path(Path(folder), location, where)
        place = f"{where}: tensor {tensor.name!r}: external data"
        try:
            offset = int(told.get("offset", 0))
            length = int(told.get("length", path.stat().st_size - offset))
        except ValueError as error:
            raise BadFile(f"{place}: offset or length is no number") from error
        if offset < 0 or length < 0 or offset + length > path.stat().st_size:
            raise BadFile(f"{place}: bytes {offset}..{offset + length} are not in {location!r}")
        total_bytes += length
        if total_bytes > MAX_BYTES:
            raise Unsupported(f"{where}: more than {MAX_BYTES} bytes of weights")
        with path.open("rb") as file:
            file.seek(offset)
            tensor.raw_data = file.read(length)
        sha.update(tensor.raw_data)
        del tensor.external_data[:]
        tensor.data_location = TensorProto.DEFAULT
    return sha.hexdigest() if total_bytes else None


# ---------------------------------------------------------------- walking through a graph


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _tensors(graph: Any) -> Iterator[Any]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("sparse_tensor"):
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            for inner in (attribute.g, *attribute.graphs):
                yield from _tensors(inner)


def _provide_onnxsim(folder: Path) -> None:
    # onnx2tf calls a program of this name, and goes on with a worse graph where there is none.
    program = folder / "bin" / "onnxsim"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m onnxsim "$@"\n')
    program.chmod(0o700)
    os.environ["PATH"] = os.pathsep.join([str(program.parent), os.environ.get("PATH", "")])


def _forbid_network() -> None:
    def refuse(event: str, _arguments: Any) -> None:
        if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
            raise PermissionError("a conversion needs no network")

    sys.addaudithook(refuse)


def _first(error: BaseException) -> str:
    if isinstance(error, EdgeExitError):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300]

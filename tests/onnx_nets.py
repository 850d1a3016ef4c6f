"""
ONNX files for tests, written by a Python that has the package onnx:

    python tests/onnx_nets.py FOLDER

Each is one network (three convolutions, a head behind each) changed in one way.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 5
SIZE = 16


def net(
    outputs: tuple[str, ...] = ("final", "first", "second"),
    shape: tuple[Any, ...] = (1, 3, SIZE, SIZE),
    opset: int = 17,
    ir: int = 8,
) -> onnx.ModelProto:
    """Exits "first", "second" and "final" of depth 1, 2 and 3."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []

    def constant(name: str, values: np.ndarray) -> str:
        stored.append(numpy_helper.from_array(values.astype(np.float32), name))
        return name

    inputs, maps = 3, "image"
    for exit, width, stride in (("first", 8, 1), ("second", 12, 2), ("final", 16, 2)):
        w = constant(f"{exit}_w", rng.normal(size=(width, inputs, 3, 3)) * 0.5 / inputs**0.5)
        b = constant(f"{exit}_b", rng.normal(size=width) * 0.1)
        how = {"strides": [stride, stride], "pads": [1, 1, 1, 1]}
        nodes.append(helper.make_node("Conv", [maps, w, b], [f"{exit}_conv"], **how))
        maps, inputs = f"{exit}_map", width
        nodes.append(helper.make_node("Relu", [f"{exit}_conv"], [maps]))
        w = constant(f"{exit}_v", rng.normal(size=(width, CLASSES)) * 3 / width**0.5)
        b = constant(f"{exit}_c", rng.normal(size=CLASSES))
        nodes.append(helper.make_node("GlobalAveragePool", [maps], [f"{exit}_mean"]))
        nodes.append(helper.make_node("Flatten", [f"{exit}_mean"], [f"{exit}_flat"]))
        nodes.append(helper.make_node("Gemm", [f"{exit}_flat", w, b], [exit]))
    floats = [helper.make_tensor_value_info("image", TensorProto.FLOAT, list(shape))]
    if ir < 4:  # there every constant is an input, too
        floats += [
            helper.make_tensor_value_info(t.name, TensorProto.FLOAT, list(t.dims)) for t in stored
        ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [shape[0], CLASSES])
        for name in outputs
    ]
    graph = helper.make_graph(nodes, "net", floats, ends, stored)
    imports = [helper.make_opsetid("", opset)]
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def _ends(kind: str, name: str, **how: Any) -> onnx.ModelProto:
    model = net(("final", "first"))
    model.graph.node.append(helper.make_node(kind, ["final"], [name], **how))
    model.graph.output[0].name = name
    return model


def _channels_last() -> onnx.ModelProto:
    model = net()
    del model.graph.input[:]
    model.graph.input.append(
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, SIZE, SIZE, 3])
    )
    turn = helper.make_node("Transpose", ["pixels"], ["image"], perm=[0, 3, 1, 2])
    model.graph.node.insert(0, turn)
    return model


def _two_inputs() -> onnx.ModelProto:
    model = net()
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1, CLASSES]))
    model.graph.node.append(helper.make_node("Add", ["final", "more"], ["sum"]))
    model.graph.output[0].name = "sum"
    return model


def _bytes() -> onnx.ModelProto:
    model = net()
    model.graph.input[0].name = "pixels"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    model.graph.node.insert(
        0, helper.make_node("Cast", ["pixels"], ["image"], to=TensorProto.FLOAT)
    )
    return model


def _not_a_number() -> onnx.ModelProto:
    model = net()
    values = numpy_helper.to_array(model.graph.initializer[0]).copy()
    values.flat[3] = np.nan
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(values, "first_w"))
    return model


def _odd_operator() -> onnx.ModelProto:
    model = net(("final", "first"))
    shape = numpy_helper.from_array(np.array([16, 4, 4], np.int64), "shape")
    model.graph.initializer.append(shape)
    model.graph.node.append(helper.make_node("Reshape", ["final_map", "shape"], ["squares"]))
    model.graph.node.append(helper.make_node("Det", ["squares"], ["determinants"]))
    model.graph.node.append(helper.make_node("ReduceSum", ["determinants"], ["one"], keepdims=1))
    model.graph.node.append(helper.make_node("Add", ["final", "one"], ["moved"]))
    model.graph.output[0].name = "moved"
    return model


def _own_operator() -> onnx.ModelProto:
    model = _ends("Acme", "odd", domain="com.acme")
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    return model


def _cyclic() -> onnx.ModelProto:
    model = net()
    model.graph.node[0].input[0] = "final_map"
    return model


def _branch() -> onnx.ModelProto:
    model = net(("final", "first"))
    out = helper.make_tensor_value_info("then", TensorProto.FLOAT, [1, CLASSES])
    then = helper.make_graph([helper.make_node("Neg", ["final"], ["then"])], "a", [], [out])
    also = helper.make_graph([helper.make_node("Abs", ["final"], ["then"])], "b", [], [out])
    yes = numpy_helper.from_array(np.array(True), "yes")
    model.graph.initializer.append(yes)
    node = helper.make_node("If", ["yes"], ["chosen"], then_branch=then, else_branch=also)
    model.graph.node.append(node)
    model.graph.output[0].name = "chosen"
    return model


def _odd_names() -> onnx.ModelProto:
    """Names that onnx2tf writes otherwise, and those that the gate itself gives."""
    model = net()
    fresh = {"final": "/head/out:0", "first": "exit_1", "second": "input", "final_map": "exit_0"}
    for node in model.graph.node:
        node.input[:] = [fresh.get(name, name) for name in node.input]
        node.output[:] = [fresh.get(name, name) for name in node.output]
    for value in model.graph.output:
        value.name = fresh[value.name]
    return model


def _number() -> onnx.ModelProto:
    model = _ends("ArgMax", "class", axis=1, keepdims=1)
    model.graph.output[0].CopyFrom(
        helper.make_tensor_value_info("class", TensorProto.INT64, [1, 1])
    )
    return model


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "plain": net,
    "one_output": lambda: net(("final",)),
    "any_batch": lambda: net(shape=("N", 3, SIZE, SIZE)),
    "channels_last": _channels_last,
    "softmax": lambda: _ends("Softmax", "shares", axis=1),
    "odd_names": _odd_names,
    "old": lambda: net(opset=9, ir=3),
    "newer": lambda: net(ir=99),
    "newer_operators": lambda: net(opset=99),
    "any_height": lambda: net(shape=(1, 3, "height", SIZE)),
    "eight": lambda: net(shape=(8, 3, SIZE, SIZE)),
    "two_inputs": _two_inputs,
    "bytes": _bytes,
    "not_a_number": _not_a_number,
    "odd_operator": _odd_operator,
    "own_operator": _own_operator,
    "cyclic": _cyclic,
    "branch": _branch,
    "number": _number,
}


def write(folder: Path) -> None:
    for name, make in NETS.items():
        onnx.save(make(), folder / f"{name}.onnx")
    whole = (folder / "plain.onnx").read_bytes()
    (folder / "truncated.onnx").write_bytes(whole[: len(whole) // 2])
    (folder / "text.onnx").write_text("not a network\n" * 20)
    (folder / "empty.onnx").write_bytes(b"")
    for name, location in (("beside", "weights.bin"), ("outside", "../weights.bin")):
        model = net()
        for tensor in model.graph.initializer:
            _move_out(tensor, location, folder)
        (folder / f"{name}.onnx").write_bytes(model.SerializeToString())


def _move_out(tensor: onnx.TensorProto, location: str, folder: Path) -> None:
    path = folder / location
    offset = path.stat().st_size if path.exists() else 0
    with path.open("ab") as file:
        file.write(tensor.raw_data)
    told = {"location": location, "offset": offset, "length": len(tensor.raw_data)}
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in told.items():
        tensor.external_data.add(key=key, value=str(value))


if __name__ == "__main__":
    write(Path(sys.argv[1]))

"""
Open a .tflite file with the runtime that this machine has: LiteRT, else tflite-runtime.

Callers see open_interpreter, runtime_name, try_first and check_loads: no file is opened here
that was not tried out before. An opened file shows its inputs and outputs as arrays that stay
the same for its whole life: fill the inputs, call invoke, read the outputs. Hidden here: which
package is installed, and how the arrays are reached.

There are two ways. Direct keeps numpy views of the tensors inside the runtime's own memory and
calls its inner invoke, for the public one refuses to run while views exist. That is safe because
these files have fixed shapes: memory is laid out once, by allocate_tensors (checked after the
first invoke). Copying uses public calls only and keeps arrays of its own; it serves runtimes that
have no such inner object. Handing 12 KB over costs 0.2 us (views) against 0.8 us (public calls).
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import BadFile, DeviceError, Unsupported, UsageError
from edgeexit.runtimes import RUNTIMES, TFLITE, for_programs, pointer_bits
from edgeexit.tflite import TensorSpec, read_model
from edgeexit.vetting import TIMEOUT_S, Held, Suspect, perturb, vet


class Interpreter(Protocol):
    """
    One opened .tflite file, for one thread at a time.

    inputs and outputs map tensor names to arrays that never move: write inputs, call invoke,
    read outputs. Their contents last until the next invoke. invoke raises RuntimeError.
    """

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[Any]]
    invoke: Callable[[], None]


class _Direct:
    """Views of the runtime's own memory, and its inner invoke."""

    def __init__(self, opened: Any, where: str) -> None:
        self._opened, self._where = opened, where
        self._inner = opened._interpreter
        self._indices = {
            "inputs": _indices(opened.get_input_details()),
            "outputs": _indices(opened.get_output_details()),
        }
        self.inputs = self._views("inputs")
        self.outputs = self._views("outputs")
        self.invoke: Callable[[], None] = self._first_invoke

    def _views(self, side: str) -> dict[str, NDArray[Any]]:
        inner = self._inner
        return {name: inner.tensor(inner, i) for name, i in self._indices[side].items()}

    def _first_invoke(self) -> None:
        self._inner.Invoke()
        for before, side in ((self.inputs, "inputs"), (self.outputs, "outputs")):
            for name, view in self._views(side).items():
                if view.ctypes.data != before[name].ctypes.data or view.shape != before[name].shape:
                    raise Unsupported(f"{self._where}: tensor {name!r} moves while the net runs")
        self.invoke = self._inner.Invoke


class _Copying:
    """Arrays of our own, carried over by the runtime's public calls."""

    def __init__(self, opened: Any, where: str) -> None:
        self._opened = opened
        self.inputs = {d["name"]: np.zeros(d["shape"], d["dtype"]) for d in self._details("input")}
        self.outputs = {
            d["name"]: np.zeros(d["shape"], d["dtype"]) for d in self._details("output")
        }
        self._in = [(i, self.inputs[name]) for name, i in _indices(self._details("input")).items()]
        self._out = [
            (i, self.outputs[name]) for name, i in _indices(self._details("output")).items()
        ]
        self.invoke: Callable[[], None] = self._invoke

    def _details(self, side: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = getattr(self._opened, f"get_{side}_details")()
        return found

    def _invoke(self) -> None:
        for index, array in self._in:
            self._opened.set_tensor(index, array)
        self._opened.invoke()
        for index, array in self._out:
            np.copyto(array, self._opened.get_tensor(index))


def _indices(details: list[dict[str, Any]]) -> dict[str, int]:
    return {detail["name"]: int(detail["index"]) for detail in details}


@cache
def _runtime() -> tuple[Any, str]:
    """The Interpreter class of the runtime that is installed, and what to call it."""
    for runtime in RUNTIMES:
        try:
            module = importlib.import_module(runtime.module)
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise DeviceError(f"{runtime.name} is installed but does not load: {error}") from error
        return module.Interpreter, f"{runtime.name} {importlib.metadata.version(runtime.name)}"
    bits = pointer_bits()
    raise DeviceError(
        f"no TFLite runtime for these {bits}-bit programs "
        f"(looked for {' and '.join(runtime.name for runtime in RUNTIMES)})",
        hint=for_programs(bits).install,
    )


def runtime_name() -> str:
    """Name and version of the runtime in use, such as "ai-edge-litert 2.3.0"."""
    return _runtime()[1]


def open_interpreter(
    data: bytes, threads: int = 1, *, where: str = "model", is_own: bool = False
) -> Interpreter:
    """
    Open the .tflite *data* and lay out its memory; *where* names it in errors.

    What never passed here is tried out in a child process first, unless it *is_own*: just made
    here of known parts. BadFile if the runtime refuses it, Unsupported if it cannot be opened
    safely, DeviceError if there is no runtime that works.
    """
    if threads < 1:
        raise UsageError(f"threads: expected at least 1, found {threads}")
    if not is_own:
        try_first([Held(data, where)])
    make, name = _runtime()
    try:
        opened = make(model_content=data, num_threads=threads)
        opened.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise BadFile(f"{where}: {name} refuses it: {_one_line(error)}") from error
    except SystemError as error:
        # tflite-runtime 2.14 was built for numpy 1 and fails so under numpy 2.
        raise DeviceError(
            f"{name} does not work with numpy {np.__version__}",
            hint='python3 -m pip install "numpy<2"',
        ) from error
    if name.startswith(TFLITE.name):
        _refuse_wrong(opened, name, where)
    inner = getattr(opened, "_interpreter", None)
    way = _Direct if hasattr(inner, "tensor") and hasattr(inner, "Invoke") else _Copying
    try:
        return way(opened, where)
    except ValueError as error:
        raise BadFile(f"{where}: a tensor has no place in memory: {_one_line(error)}") from error


def _refuse_wrong(opened: Any, name: str, where: str) -> None:
    """
    Unsupported for what tflite-runtime computes wrongly without a word.

    It knows one scale only for the weights of a FULLY_CONNECTED that reads floats, and takes the
    first where each output has its own: 1 answer in 8 was right.
    """
    tensors = {detail["index"]: detail for detail in opened.get_tensor_details()}
    for operator in opened._get_ops_details():
        if operator["op_name"] != "FULLY_CONNECTED":
            continue
        values, weights = (tensors.get(int(index)) for index in operator["inputs"][:2])
        if values is None or weights is None or values["dtype"] is not np.float32:
            continue
        if len(weights["quantization_parameters"]["scales"]) > 1:
            raise Unsupported(
                f"{where}: {name} computes FULLY_CONNECTED wrongly where float values meet weights "
                "with several scales",
                hint="convert with --scheme int8 or float16, or use a 64-bit system with LiteRT",
            )


def check_edges(
    opened: Interpreter, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], where: str
) -> None:
    """BadFile unless *opened* reads and makes what was said of it: a file may contradict itself."""
    for arrays, specs in ((opened.inputs, inputs), (opened.outputs, outputs)):
        expected = {spec.name: (spec.shape, spec.dtype) for spec in specs}
        have = {name: (array.shape, str(array.dtype)) for name, array in arrays.items()}
        if have != expected:
            raise BadFile(f"{where}: the runtime finds tensors {have}, expected {expected}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---------------------------------------------------------------- trying a file out


def try_first(suspects: Sequence[Suspect], *, timeout_s: float = TIMEOUT_S) -> None:
    """
    Try out, in one child process, those of *suspects* that never passed on this machine.

    Whoever opens several files calls this first: one child costs less than one for each. Errors
    as open_interpreter.
    """
    vet(suspects, runtime_name(), timeout_s=timeout_s)


def check_loads(data: bytes, where: str = "model.tflite", *, timeout_s: float = TIMEOUT_S) -> None:
    """
    Try out the new .tflite *data* in a child process, where it does no harm.

    Unsupported, in one line, if it does not load, crashes, runs longer than *timeout_s* or takes
    too much memory.
    """
    try:
        try_first([Held(data, where)], timeout_s=timeout_s)
    except BadFile as error:
        raise Unsupported(str(error), hint=error.hint) from error


# Of these any value may come; of others, which may be indices, only 0 is sure to be sound.
_ANY_VALUE = ("float16", "float32", "int8", "uint8", "int16")
_FILLS = ("zeros", "zeros", "random", "lowest", "highest")


def try_out(data: bytes, where: str, is_late: Callable[[], bool]) -> None:
    """
    Open *data* twice in memory that is filled differently, and run it; once only if *is_late*.

    BadFile or Unsupported if that fails, or if answers depend on what lay in memory before.
    """
    # What is read beyond the lists of a file differs between processes: found by reading alone.
    with suppress(DeviceError):  # tflite-runtime brings no schema
        read_model(data, where)
    answers = []
    for byte, fills in ((0x5A, _FILLS), (0xA5, ("random",))):
        perturb(byte)
        opened = open_interpreter(data, where=where, is_own=True)
        for fill in fills:
            for array in opened.inputs.values():
                _fill(array, fill)
            try:
                opened.invoke()
            except RuntimeError as error:
                raise BadFile(f"{where}: {runtime_name()} fails: {_one_line(error)}") from error
            if fill == "random":
                answers.append([array.tobytes() for array in opened.outputs.values()])
            if is_late():
                return
    if answers[0] != answers[1]:
        raise Unsupported(f"{where}: its answers depend on what else lies in memory")


def _fill(array: NDArray[Any], fill: str) -> None:
    if fill == "zeros" or array.dtype.name not in _ANY_VALUE:
        array[...] = 0
        return
    kind, rng = array.dtype, np.random.default_rng(0)
    if kind.kind == "f":
        ends: tuple[float, float] = (-1e4, 1e4)
        random: NDArray[Any] = rng.normal(size=array.shape)
    else:
        ends = (np.iinfo(kind).min, np.iinfo(kind).max)
        random = rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, array.shape)
    array[...] = {"random": random, "lowest": ends[0], "highest": ends[1]}[fill]


def delegate(data: bytes) -> str | None:
    """
    Who computes the .tflite *data* here: "XNNPACK", "XNNPACK in part" or "built-in kernels".

    None if this runtime does not say. XNNPACK has all of it when one delegate node reads the
    inputs, writes the outputs and needs nothing that another node computes.
    """
    opened = open_interpreter(data)
    inner = getattr(opened, "_inner", None)
    if inner is None or not hasattr(inner, "NodeName"):
        return None
    nodes = range(inner.NumNodes())
    taken = [k for k in nodes if inner.NodeName(k) == "DELEGATE"]
    if not taken:
        return "built-in kernels"
    others = {int(i) for k in nodes if k not in taken for i in inner.NodeOutputs(k)}
    reads = {int(i) for i in inner.NodeInputs(taken[0])}
    writes = {int(i) for i in inner.NodeOutputs(taken[0])}
    whole = (
        len(taken) == 1
        and set(map(int, inner.InputIndices())) <= reads
        and set(map(int, inner.OutputIndices())) <= writes
        and not reads & others
    )
    return "XNNPACK" if whole else "XNNPACK in part"

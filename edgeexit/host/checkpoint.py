"""
The checkpoint file: a network's weights and what is needed to use them.

Callers see save_checkpoint, load_checkpoint and save_again. Hidden here: in which order a network
is made again (the factory's, exits attached, parts taken out, weights), and that every word of
the file is held to a range. An own net is built without memory first, so that a forged file
cannot ask for a huge one.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.files import Table, digest_of, json_bytes, read_bytes, write_file
from edgeexit.host import zoo
from edgeexit.host.factories import OWN_FACTORIES, build_network
from edgeexit.host.model import attach, exit_outputs
from edgeexit.host.purpose import Purpose
from edgeexit.host.surgery import replay
from edgeexit.host.torchfile import finite_state, is_whole, unpack
from edgeexit.overlap import Bloom
from edgeexit.preprocess import Preprocess

# 1: first format.
CHECKPOINT_FORMAT = 1
MAX_CHECKPOINT_BYTES = 4 << 30
MAX_INPUT_VALUES = 1 << 26
PROBES = 2
PROBE_TOLERANCE = 1e-3  # other processors and kernels add up in another order
MAX_ATTACHED = 64
MAX_HEAD_CONVS = 8


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """
    A network read from a file, in eval mode, with what the file says about it.

    input_shape is (1, ...) in the network's own layout; training_bloom are the (sound) bytes of
    a Bloom filter over the samples that it was trained on. attached says which exits the plain
    network of *arch* was given: {"at": modules, "head": kind, "widths": a list for each exit},
    and "surgery" if something was taken out of it before; surgery what was taken out afterwards
    (edgeexit.host.surgery).
    """

    model: nn.Module
    arch: str
    kwargs: dict[str, Any]
    input_shape: tuple[int, ...]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    calibration_set: str | None
    training_bloom: bytes | None
    metadata: dict[str, Any]
    digest: str
    exits: tuple[str, ...]
    attached: dict[str, Any] | None = None
    surgery: tuple[dict[str, Any], ...] = ()


def save_checkpoint(
    path: Path | str,
    *,
    model: nn.Module | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    arch: str,
    kwargs: Mapping[str, Any] | None = None,
    input_shape: Sequence[int],
    class_names: Sequence[str],
    preprocess: Preprocess | Mapping[str, Any],
    calibration_set: str | None = None,
    training_digests: bytes | None = None,
    attached: Mapping[str, Any] | None = None,
    surgery: Sequence[Mapping[str, Any]] = (),
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """
    Write the weights of *model* (or *state_dict*) so that load_checkpoint can read them.

    *preprocess* may also be the plain object of docs/formats.md.
    *arch* is "package.module:factory", which called with *kwargs* gives the same network, or the
    backbone of one whose exits are *attached* (as in Checkpoint); with *surgery* done to it the
    *model* itself is needed: its answers to two probes are kept, and must come out again;
    *training_digests* are the bytes of a samples.Bloom over what it was trained on. The bytes
    depend on the arguments only. BadFile if what would be written could not be read back.
    """
    if not isinstance(preprocess, Preprocess):
        preprocess = Preprocess.from_table(Table(preprocess, "preprocess"))
    weights = state_dict if model is None else model.state_dict()
    if weights is None:
        raise UsageError("save_checkpoint: neither model nor state_dict is given")
    document = {
        "edgeexit": CHECKPOINT_FORMAT,
        "arch": arch,
        "kwargs": _plain(dict(kwargs or {})),
        # Contiguous clones: a view would carry the whole tensor behind it into the file.
        "state_dict": {
            name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            for name, tensor in weights.items()
        },
        "input_shape": [int(length) for length in input_shape],
        "class_names": [str(name) for name in class_names],
        "preprocess": preprocess.to_document(),
        "calibration_set": calibration_set,
        "training_digests": None
        if training_digests is None
        else torch.frombuffer(bytearray(training_digests), dtype=torch.uint8),
        "metadata": _plain(dict(metadata or {})),
    }
    if attached is not None:
        document["attached"] = _plain(dict(attached))
    if surgery:
        document["surgery"] = _plain({"surgery": [dict(entry) for entry in surgery]})["surgery"]
    if surgery or (attached or {}).get("surgery"):
        if model is None:
            raise UsageError("save_checkpoint: surgery needs the model, not its state_dict alone")
        document["probe"] = probe_of(model, input_shape)
    buffer = io.BytesIO()
    torch.save(document, buffer)
    data = buffer.getvalue()
    if arch in OWN_FACTORIES:
        _read(data, str(path))
    write_file(Path(path), data)


def save_again(path: Path | str, checkpoint: Checkpoint, model: nn.Module, **changes: Any) -> None:
    """
    Write *model*, a changed form of *checkpoint*'s, with everything else that *checkpoint* says.

    *changes* replace arguments of save_checkpoint; "metadata" is merged into the checkpoint's
    own, and a value of None takes its key out.
    """
    merged = {**checkpoint.metadata, **changes.pop("metadata", {})}
    facts: dict[str, Any] = {
        "arch": checkpoint.arch,
        "kwargs": checkpoint.kwargs,
        "input_shape": checkpoint.input_shape,
        "class_names": checkpoint.class_names,
        "preprocess": checkpoint.preprocess,
        "calibration_set": checkpoint.calibration_set,
        "training_digests": checkpoint.training_bloom,
        "attached": checkpoint.attached,
        "surgery": checkpoint.surgery,
        "metadata": {key: value for key, value in merged.items() if value is not None},
    }
    save_checkpoint(path, model=model, **{**facts, **changes})


def probe_of(model: nn.Module, input_shape: Sequence[int]) -> dict[str, Any]:
    """Two inputs (2, ...), drawn at random, and *model*'s logits of each exit (2, classes)."""
    shape = (PROBES, *tuple(input_shape)[1:])
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(PROBES)).half()
    model.eval()
    with torch.no_grad():
        outputs = exit_outputs(model, inputs.float())
    return {"inputs": inputs, "logits": {name: one.clone() for name, one in outputs.items()}}


def _check_probe(model: nn.Module, probe: object, input_shape: tuple[int, ...], where: str) -> None:
    """BadFile unless the network, operated on as the file says, answers as the file says."""
    try:
        assert isinstance(probe, dict)
        inputs, logits = probe["inputs"], probe["logits"]
        # Of another size it could ask for any amount of memory.
        _check_numbers(inputs, (PROBES, *input_shape[1:]))
        with torch.no_grad():
            found = exit_outputs(model.eval(), inputs.float())
        assert list(found) == list(logits)
        for name, one in found.items():
            _check_numbers(logits[name], tuple(one.shape))
        worst = max(
            float((found[name] - logits[name]).abs().max() / logits[name].abs().max())
            for name in found
        )
    except (
        *(AssertionError, KeyError, TypeError, ValueError, AttributeError, RuntimeError),
        *(IndexError, EdgeExitError),
    ) as error:
        raise BadFile(
            f"{where}: probe: missing or not fitting the network: a pruned network cannot be "
            "checked without it",
            hint="prune again, or copy the file again",
        ) from error
    if not worst <= PROBE_TOLERANCE:
        raise BadFile(
            f"{where}: the pruned network answers its probe differently by {worst:.1e} of the "
            f"largest logit, expected at most {PROBE_TOLERANCE:.0e}: its surgery or weights were "
            "altered",
            hint="copy the file again, or prune again",
        )


def _check_numbers(tensor: object, shape: tuple[int, ...]) -> None:
    """ValueError unless *tensor* has *shape* and holds finite floats, all of them in the file."""
    is_sound = (
        isinstance(tensor, torch.Tensor)
        and tensor.shape == shape
        and tensor.is_floating_point()
        and is_whole(tensor)
        and bool(torch.isfinite(tensor).all())
    )
    if not is_sound:
        raise ValueError("not the numbers that were expected")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """*values* made anew: equal ones give equal bytes, whichever of their texts are one object."""
    try:
        plain: dict[str, Any] = json.loads(json_bytes(values))
    except (TypeError, ValueError) as error:
        raise UsageError(f"checkpoint: expected plain values (JSON): {error}") from error
    return plain


def load_checkpoint(
    path: Path | str, *, arch: str | None = None, purpose: Purpose | None = None
) -> Checkpoint:
    """
    Read a checkpoint, or a plain state_dict if *arch* and *purpose* say what it is.

    *arch* ("package.module:factory") runs that code, which may lie in the current folder. Without
    it only edgeexit's own networks are built. UsageError if the file is absent, or *arch* or
    *purpose* is wrong or missing; BadFile if the file is damaged, holds code, or asks for
    foreign code. *purpose* is ignored where the file speaks for itself.
    """
    path = Path(path)
    return _read(read_bytes(path, limit_bytes=MAX_CHECKPOINT_BYTES), str(path), arch, purpose)


def _read(
    data: bytes, where: str, arch: str | None = None, purpose: Purpose | None = None
) -> Checkpoint:
    document = unpack(data, where)
    if "edgeexit" not in document:
        return _plain_state(document, data, where, arch, purpose)
    number = document["edgeexit"]
    if type(number) is not int or number != CHECKPOINT_FORMAT:
        raise BadFile(
            f"{where}: edgeexit: found {number!r}, this version reads {CHECKPOINT_FORMAT}",
            hint="made by a newer edgeexit? upgrade, or save the checkpoint again",
        )
    table = Table(document, where)
    named = table.get("arch", str)
    kwargs = dict(table.find("kwargs", dict, {}))
    preprocess = Preprocess.from_table(table.table("preprocess"))
    input_shape = _input_shape(table, preprocess)
    class_names = tuple(table.list_of("class_names", str))
    if not class_names or len(set(class_names)) != len(class_names):
        raise BadFile(f"{where}: class_names: expected different names, at least one")
    # torch hands state_dicts out as OrderedDict: any dict will do, unlike in Table.get.
    stored = document.get("state_dict")
    if not isinstance(stored, dict):
        raise BadFile(f"{where}: state_dict: missing, or not a dict")
    state = finite_state(stored, where)
    metadata = dict(table.find("metadata", dict, {}))
    for key, values in (("kwargs", kwargs), ("metadata", metadata)):
        try:
            json_bytes(values)
        except (TypeError, ValueError) as error:
            raise BadFile(f"{where}: {key}: expected plain values (JSON): {error}") from error
    attached = _attached(table)
    entries = _optional(table, "surgery", list) or []
    model = _with_weights(named, arch, kwargs, state, where, attached, input_shape, entries)
    if entries or (attached or {}).get("surgery"):
        _check_probe(model, document.get("probe"), input_shape, where)
    found = _probe(model, input_shape, len(class_names), where)
    return Checkpoint(
        model=model,
        arch=named,
        kwargs=kwargs,
        input_shape=input_shape,
        class_names=class_names,
        preprocess=preprocess,
        calibration_set=_optional(table, "calibration_set", str),
        training_bloom=_bloom(_optional(table, "training_digests", torch.Tensor), where),
        metadata=metadata,
        digest=digest_of(data),
        exits=found,
        attached=attached,
        surgery=tuple(entries),
    )


def _attached(table: Table) -> dict[str, Any] | None:
    """The checked value of "attached"; whether its names exist shows when the net is built."""
    if table.values.get("attached") is None:
        return None
    inner = table.table("attached")
    inner.only("at", "head", "widths", "surgery")
    at, head = inner.list_of("at", str), inner.get("head", str)
    rows = inner.list_of("widths", list)
    if not 1 <= len(at) <= MAX_ATTACHED or len(rows) != len(at):
        raise BadFile(
            f"{inner.where}: found {len(at)} modules and {len(rows)} lists of widths, expected "
            f"as many of one as of the other, 1 to {MAX_ATTACHED}"
        )
    for row in rows:
        is_sound = len(row) <= MAX_HEAD_CONVS and all(
            type(width) is int and 1 <= width <= zoo.MAX_WIDTH for width in row
        )
        if not is_sound:
            raise BadFile(
                f"{inner.where}.widths: expected up to {MAX_HEAD_CONVS} numbers in "
                f"1..{zoo.MAX_WIDTH} for each exit"
            )
    before = inner.find("surgery", list, [])
    return {"at": at, "head": head, "widths": rows, **({"surgery": before} if before else {})}


def _optional(table: Table, key: str, kind: type[Any]) -> Any:
    return None if table.values.get(key) is None else table.get(key, kind)


def _bloom(stored: torch.Tensor | None, where: str) -> bytes | None:
    if stored is None:
        return None
    if stored.dtype != torch.uint8 or stored.ndim != 1 or not is_whole(stored):
        raise BadFile(f"{where}: training_digests: expected bytes")
    data = stored.numpy().tobytes()
    Bloom.from_bytes(data, f"{where}: training_digests")
    return data


def _plain_state(
    document: dict[str, Any], data: bytes, where: str, arch: str | None, purpose: Purpose | None
) -> Checkpoint:
    """A state_dict without a word about its network, bare or under the key "state_dict"."""
    inner = document.get("state_dict", document)
    if not isinstance(inner, dict) or not inner or not _all_tensors(inner):
        raise BadFile(
            f"{where}: neither an edgeexit checkpoint nor a state_dict",
            hint="write it with edgeexit.host.checkpoint.save_checkpoint",
        )
    if arch is None:
        raise UsageError(
            f"{where}: a plain state_dict does not say which network it belongs to",
            hint="name the function that makes it, and a set that says what it is for: "
            "--arch package.module:factory --calibration SET",
        )
    if purpose is None:
        raise UsageError(
            f"{where}: a plain state_dict does not say which classes and inputs it is for",
            hint="name a calibration set, which does: --calibration SET",
        )
    input_shape = purpose.input_shape
    if input_shape is None:
        input_shape = _image_shape(purpose.preprocess)
    model = _with_weights(arch, arch, {}, finite_state(inner, where), where, None, input_shape)
    return Checkpoint(
        model=model,
        arch=arch,
        kwargs={},
        input_shape=input_shape,
        class_names=purpose.class_names,
        preprocess=purpose.preprocess,
        calibration_set=purpose.calibration_set,
        training_bloom=None,
        metadata={},
        digest=digest_of(data),
        exits=_probe(model, input_shape, len(purpose.class_names), where),
    )


def _image_shape(preprocess: Preprocess) -> tuple[int, ...]:
    """The network's input shape that an image *preprocess* makes; UsageError for arrays."""
    height, width, channels = preprocess.sample_shape
    shapes = {"nchw": (1, channels, height, width), "nhwc": (1, height, width, channels)}
    return shapes[preprocess.layout]


def _all_tensors(values: dict[Any, Any]) -> bool:
    return all(isinstance(value, torch.Tensor) for value in values.values())


def _input_shape(table: Table, preprocess: Preprocess) -> tuple[int, ...]:
    shape = tuple(table.list_of("input_shape", int))
    values = 1
    for length in shape:
        values *= length
    if len(shape) < 2 or shape[0] != 1 or min(shape) < 1 or values > MAX_INPUT_VALUES:
        raise BadFile(f"{table.where}: input_shape: found {list(shape)}, expected [1, ...]")
    if preprocess.kind == "image" and shape != _image_shape(preprocess):
        raise BadFile(
            f"{table.where}: input_shape: found {list(shape)}, preprocess makes "
            f"{list(_image_shape(preprocess))}"
        )
    return shape


# ---------------------------------------------------------------- the network


def _with_weights(
    named: str,
    arch: str | None,
    kwargs: dict[str, Any],
    state: dict[str, torch.Tensor],
    where: str,
    attached: dict[str, Any] | None,
    input_shape: tuple[int, ...],
    entries: object = (),
) -> nn.Module:
    """The network that the file names, with its weights, in eval mode."""
    # Foreign code may not work without memory; own code may be asked for too much of it.
    with torch.device("meta" if named in OWN_FACTORIES else "cpu"):
        model = build_network(named, kwargs, where, arch=arch)
    if attached is not None:
        replay(model, attached.get("surgery", []), f"{where}: attached.surgery")
        model = _with_exits(model, attached, input_shape, where)
    if entries:
        replay(model, entries, f"{where}: surgery")
    expected = model.state_dict()
    _compare(expected, state, where)
    cast = {name: state[name].to(expected[name].dtype) for name in expected}
    model.load_state_dict(cast, assign=True)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise UsageError(f"--arch {named}: leaves {name} without memory")
    return model.eval()


def _with_exits(
    backbone: nn.Module, attached: dict[str, Any], input_shape: tuple[int, ...], where: str
) -> nn.Module:
    try:
        return attach(
            backbone,
            attached["at"],
            input_shape=input_shape,
            head=attached["head"],
            widths=attached["widths"],
            device="meta",  # the file may claim any size; the weights come next
        )
    except EdgeExitError as error:
        raise BadFile(f"{where}: attached: {error}", hint=error.hint) from error
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise BadFile(f"{where}: attached: the network refuses its input: {error}") from error


def _compare(
    expected: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], where: str
) -> None:
    missing = [name for name in expected if name not in state]
    extra = [name for name in state if name not in expected]
    for names, word in ((missing, "lacks"), (extra, "has unknown")):
        if names:
            some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            raise BadFile(f"{where}: state_dict: {word} {len(names)} of the network's: {some}")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise BadFile(
                f"{where}: state_dict: {name}: shape {list(state[name].shape)}, "
                f"the network's is {list(tensor.shape)}"
            )


def _probe(
    model: nn.Module, input_shape: tuple[int, ...], classes: int, where: str
) -> tuple[str, ...]:
    """Names of the exits, found by one pass over zeros."""
    try:
        with torch.no_grad():
            outputs = exit_outputs(model, torch.zeros(input_shape))
    except EdgeExitError:
        raise
    except Exception as error:  # a forward of the user's may raise anything
        raise BadFile(f"{where}: the network refuses input {list(input_shape)}: {error}") from error
    for name, logits in outputs.items():
        if tuple(logits.shape) != (1, classes):
            raise BadFile(
                f"{where}: exit {name} gives {list(logits.shape)}, expected [1, {classes}] for "
                f"{classes} class_names"
            )
    return tuple(outputs)

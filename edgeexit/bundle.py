"""
The bundle folder: everything a board needs to classify, with a digest of every byte.

Callers see Bundle, load_bundle and write_bundle. Hidden here: names in the manifest cannot
lead out of the folder, a file that was altered is never used, the folder appears complete or
not at all, and equal arguments give equal bytes. The bundle's own digest is that of
bundle.json, which holds the digests of all other files; policies/ stands outside of it,
because a policy is chosen for a finished bundle.
"""

import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit import __version__
from edgeexit.cut import SegmentPlan, cut, model_io
from edgeexit.errors import BadFile, Unsupported, UsageError, is_plain, storage
from edgeexit.files import (
    Arrays,
    Table,
    digest_of,
    json_bytes,
    new_folder,
    npz_bytes,
    parse_json,
    parse_npz,
    read_bytes,
)
from edgeexit.interpreter import check_edges, open_interpreter, try_first
from edgeexit.names import unknown
from edgeexit.policy import Parent, Policy
from edgeexit.preprocess import InputStage, Preprocess
from edgeexit.tflite import TensorSpec
from edgeexit.vetting import Held

# 1: first version.
# 2: parent. Version 1 is read as a bundle without one.
FORMAT = 2

MANIFEST = "bundle.json"
MODEL = "model.tflite"
SELFTEST = "selftest.npz"
BLOOM = "training.bloom"
RANGES = "ranges.npz"
POLICIES = "policies"

_KEYS = (
    *("format", "name", "made_by", "scheme", "exits", "class_names", "preprocess", "input"),
    *("logits", "model", "segments", "files", "calibration_set", "provenance"),
    "parent",
)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,120}")
_MAX_FILE_BYTES = 2**31
_MAX_TENSOR_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class SegmentFile:
    """One segment's entry in bundle.json; outputs[0] are the logits of *exit*."""

    file: str
    exit: str
    sha256: str
    bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Digest and length of one other file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Link:
    """One segment of a chain; load fetches its bytes, whose SHA-256 digest is."""

    exit: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    load: Callable[[], bytes]
    digest: str
    where: str


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """
    Samples with the answers that the converting machine got.

    samples (N, ...) as a calibration set holds them; inputs (N, 1, H, W, C): the input tensors;
    logits (N, exits, classes), stored integers (float32 for a float bundle), of the uncut model.
    """

    samples: NDArray[Any]
    inputs: NDArray[Any]
    logits: NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """
    A bundle folder that was read and checked.

    exits are names, earliest first; logits holds one spec per exit. calibration_set is
    {"name", "digest"} or None. digest is the SHA-256 of bundle.json in hexadecimal. parent is the
    bundle that this one was cut out of, None if it was converted.
    """

    path: Path
    name: str
    digest: str
    made_by: str
    scheme: str
    exits: tuple[str, ...]
    class_names: tuple[str, ...]
    preprocess: Preprocess
    input: TensorSpec
    logits: tuple[TensorSpec, ...]
    segments: tuple[SegmentFile, ...]
    model: str
    files: Mapping[str, FileEntry]
    calibration_set: Mapping[str, str] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    parent: Parent | None = None

    @property
    def exit_tensors(self) -> dict[str, str]:
        """Each exit's name with the name of its logits tensor, as the cut wants them."""
        return {name: spec.name for name, spec in zip(self.exits, self.logits, strict=True)}

    def read_file(self, name: str) -> bytes:
        """The bytes of one file of the bundle; BadFile if they are not those that were written."""
        entries: dict[str, FileEntry] = {
            segment.file: FileEntry(sha256=segment.sha256, bytes=segment.bytes)
            for segment in self.segments
        }
        entry = {**self.files, **entries}[name]
        path = self.path / name
        if not path.is_file():
            raise BadFile(f"{path}: missing", hint="copy the whole folder again")
        data = read_bytes(path, limit_bytes=_MAX_FILE_BYTES)
        if len(data) != entry.bytes or digest_of(data) != entry.sha256:
            fact = (
                f"{len(data)} bytes, expected {entry.bytes}"
                if len(data) != entry.bytes
                else f"digest {digest_of(data)[:12]}, expected {entry.sha256[:12]}"
            )
            raise BadFile(f"{path}: altered ({fact})", hint="copy the whole folder again")
        return data

    def model_data(self) -> bytes:
        """The uncut model."""
        return self.read_file(self.model)

    def chain(self, kept: Sequence[str] | None = None) -> list[Link]:
        """
        The segments of the *kept* exits (None: all), earliest first.

        All exits: the bundle's files, each read when it is needed. Fewer: the uncut model, cut
        anew in memory. UsageError for unknown or no names.
        """
        wanted = self.exits if kept is None else tuple(kept)
        for name in wanted:
            if name not in self.exits:
                raise unknown(name, self.exits, "exit")
        if not wanted:
            raise UsageError(f"{self.path}: no exit kept, expected at least one")
        if set(wanted) == set(self.exits):
            return [
                Link(
                    exit=segment.exit,
                    inputs=segment.inputs,
                    outputs=segment.outputs,
                    load=_reader(self, segment.file),
                    digest=segment.sha256,
                    where=str(self.path / segment.file),
                )
                for segment in self.segments
            ]
        where = str(self.path / self.model)
        try:
            plans = cut(self.model_data(), self.exit_tensors, wanted, where=where)
        except UsageError as error:  # the names are the bundle's own
            raise BadFile(f"{error}, which {MANIFEST} names") from error
        _check_links(self, plans, f"{where}: segments")
        return [
            Link(
                exit=plan.exit,
                inputs=plan.inputs,
                outputs=plan.outputs,
                load=_holder(plan.data),
                digest=digest_of(plan.data),
                where=f"{where}, cut for {plan.exit!r}",
            )
            for plan in plans
        ]

    def segment_data(self, kept: Sequence[str] | None = None) -> list[SegmentPlan]:
        """As chain, with the bytes of every segment read at once."""
        return [
            SegmentPlan(
                data=link.load(),
                exit=link.exit,
                inputs=link.inputs,
                outputs=link.outputs,
                operators=(),
            )
            for link in self.chain(kept)
        ]

    def policy_for(self, device: str) -> Policy | None:
        """The policy of the kind of board *device*, None if the bundle has none for it."""
        path = self.policy_path(device)
        if not path.is_file():
            return None
        policy = Policy.load(path)
        policy.check_bundle(self, str(path))
        return policy

    def policy_path(self, device: str) -> Path:
        """Where the policy of *device* lies, or would lie."""
        if not _SAFE_NAME.fullmatch(device):
            raise UsageError(f"device {device!r}: not a name that a file can have")
        return self.path / POLICIES / f"{device}.json"

    def policy_devices(self) -> list[str]:
        """The devices for which the bundle has a policy, sorted."""
        return sorted(
            path.stem
            for path in (self.path / POLICIES).glob("*.json")
            if _SAFE_NAME.fullmatch(path.stem) and path.is_file()
        )

    def selftest(self) -> SelfTest:
        """The self-test's samples and answers. BadFile if they do not fit the bundle."""
        where = str(self.path / SELFTEST)
        arrays = parse_npz(self.read_file(SELFTEST), where)
        shape = arrays.get("samples", kinds="iuf").shape
        if len(shape) < 2 or 0 in shape:
            raise BadFile(f"{where}: samples: shape {shape}, expected (N, ...) with N > 0")
        found = SelfTest(
            samples=arrays.get("samples"), inputs=arrays.get("inputs"), logits=arrays.get("logits")
        )
        count, classes = len(found.samples), len(self.class_names)
        expected = {
            "inputs": ((count, *self.input.shape), self.input.dtype),
            "logits": ((count, len(self.exits), classes), self.logits[0].dtype),
        }
        for name, (shape, dtype) in expected.items():
            array = getattr(found, name)
            if array.shape != shape or array.dtype != dtype:
                raise BadFile(
                    f"{where}: {name}: {array.dtype} {array.shape}, expected {dtype} {shape}"
                )
        return found

    @property
    def ranges_digests(self) -> NDArray[np.uint8] | None:
        """
        Digests, uint8 (N, 16), of the samples that the activation ranges were computed from.

        None if they came from a calibration set, whose splits are disjoint anyway.
        """
        if RANGES not in self.files:
            return None
        arrays: Arrays = parse_npz(self.read_file(RANGES), str(self.path / RANGES))
        digests: NDArray[np.uint8] = arrays.get("digests", kinds="u", ndim=2)
        return digests

    @property
    def training_bloom(self) -> bytes | None:
        """The checkpoint's filter of training samples' digests, None if it had none."""
        return self.read_file(BLOOM) if BLOOM in self.files else None


def _reader(bundle: Bundle, name: str) -> Callable[[], bytes]:
    return lambda: bundle.read_file(name)


def _holder(data: bytes) -> Callable[[], bytes]:
    return lambda: data


# ---------------------------------------------------------------- reading


def load_bundle(path: Path | str, verify: bool = True) -> Bundle:
    """
    Read the bundle folder *path*; with *verify* every file is compared with its digest.

    Files are compared again whenever they are used. UsageError if there is no such folder,
    BadFile if anything in it is missing, altered, of another format or does not fit together.
    """
    path = Path(path)
    if not path.exists():
        raise UsageError(f"{path}: no such bundle", hint="edgeexit convert MODEL.pt makes one")
    if not path.is_dir():
        raise UsageError(f"{path}: is a file, expected a bundle folder (NAME.edgeexit)")
    if not (path / MANIFEST).is_file():
        raise BadFile(f"{path}: no {MANIFEST} in it: not a bundle")
    data = read_bytes(path / MANIFEST)
    bundle = _from_document(parse_json(data, str(path / MANIFEST)), path, digest_of(data))
    if verify:
        for name in (*bundle.files, *(segment.file for segment in bundle.segments)):
            bundle.read_file(name)
    return bundle


def _from_document(table: Table, path: Path, digest: str) -> Bundle:
    number = table.expect_format(1, FORMAT)
    table.only(*(_KEYS[:-1] if number == 1 else _KEYS))
    is_set = table.values.get("calibration_set") is not None
    bundle = Bundle(
        path=path,
        digest=digest,
        name=table.get("name", str),
        made_by=table.get("made_by", str),
        scheme=table.get("scheme", str),
        exits=tuple(table.list_of("exits", str)),
        class_names=tuple(table.list_of("class_names", str)),
        preprocess=Preprocess.from_table(table.table("preprocess")),
        input=TensorSpec.from_table(table.table("input")),
        logits=tuple(map(TensorSpec.from_table, table.tables("logits"))),
        segments=tuple(map(_segment, table.tables("segments"))),
        model=table.get("model", str),
        files={
            _safe(name, table.where): _entry(table.table("files").table(name))
            for name in table.get("files", dict)
        },
        calibration_set=_set(table.table("calibration_set")) if is_set else None,
        provenance=table.table("provenance").values,
        parent=None if number == 1 else _parent(table),
    )
    _check(bundle, table.where)
    return bundle


def _segment(table: Table) -> SegmentFile:
    table.only("file", "exit", "sha256", "bytes", "inputs", "outputs")
    digests = {key: table.values[key] for key in ("sha256", "bytes") if key in table}
    entry = _entry(Table(digests, table.where))
    return SegmentFile(
        file=_safe(table.get("file", str), f"{table.where}.file"),
        exit=table.get("exit", str),
        sha256=entry.sha256,
        bytes=entry.bytes,
        inputs=tuple(map(TensorSpec.from_table, table.tables("inputs"))),
        outputs=tuple(map(TensorSpec.from_table, table.tables("outputs"))),
    )


def _entry(table: Table) -> FileEntry:
    table.only("sha256", "bytes")
    entry = FileEntry(sha256=table.get("sha256", str), bytes=table.get("bytes", int))
    if not re.fullmatch("[0-9a-f]{64}", entry.sha256) or entry.bytes < 0:
        raise BadFile(f"{table.where}: sha256 and bytes: expected a digest and a length")
    return entry


def _set(table: Table) -> dict[str, str]:
    table.only("name", "digest")
    return {"name": table.get("name", str), "digest": table.get("digest", str)}


def _parent(manifest: Table) -> Parent | None:
    if "parent" in manifest and manifest.values["parent"] is None:
        return None
    table = manifest.table("parent")
    table.only("digest", "exits")
    return Parent(digest=table.get("digest", str), exits=tuple(table.list_of("exits", str)))


def _safe(name: str, where: str) -> str:
    if not _SAFE_NAME.fullmatch(name) or name == MANIFEST:
        raise BadFile(f"{where}: {name[:60]!r} is not a plain file name")
    return name


def _check(bundle: Bundle, where: str) -> None:
    """Refuse a manifest whose parts do not fit together: a chain must never meet a surprise."""
    exits, classes = bundle.exits, len(bundle.class_names)
    if not exits or len(set(exits)) != len(exits):
        raise BadFile(f"{where}: exits: expected different names, found {list(exits)}")
    for text in (bundle.name, bundle.made_by, *exits, *bundle.class_names):
        if not is_plain(text):
            raise BadFile(f"{where}: {text[:60]!r}: control characters, expected plain text")
    if classes == 0:
        raise BadFile(f"{where}: class_names: expected at least one")
    for name in (MODEL, SELFTEST):
        if name not in bundle.files:
            raise BadFile(f"{where}: files: {name} is missing")
    if bundle.model != MODEL:
        raise BadFile(f"{where}: model: expected {MODEL}, found {bundle.model!r}")
    if tuple(segment.exit for segment in bundle.segments) != exits or len(bundle.logits) != len(
        exits
    ):
        raise BadFile(f"{where}: segments and logits: expected one per exit, in their order")
    if bundle.parent is not None and (
        not set(exits) < set(bundle.parent.exits)
        or not re.fullmatch("[0-9a-f]{64}", bundle.parent.digest)
    ):
        raise BadFile(f"{where}: parent: expected a digest, and exits that include {list(exits)}")
    names = [*bundle.files, *(segment.file for segment in bundle.segments)]
    if len(set(names)) != len(names):
        raise BadFile(f"{where}: segments: a file is named twice")
    values = _check_links(bundle, bundle.segments, f"{where}: segments")
    for spec in bundle.logits:
        if math.prod(spec.shape) != classes or spec.dtype != bundle.logits[0].dtype:
            raise BadFile(
                f"{where}: logits {spec.name!r}: {spec.dtype} {spec.shape}, expected one number "
                f"for each of {classes} classes, of one dtype at all exits"
            )
    for spec in values.values():
        if spec.size_bytes > _MAX_TENSOR_BYTES:
            raise BadFile(f"{where}: tensor {spec.name!r}: {spec.size_bytes} bytes are too many")


def _check_links(
    bundle: Bundle, links: Sequence["SegmentFile | SegmentPlan"], where: str
) -> dict[str, TensorSpec]:
    """All tensors at the edges of *links*, by name; BadFile if one gets what it cannot take."""
    values = {bundle.input.name: bundle.input}
    logits = dict(zip(bundle.exits, bundle.logits, strict=True))
    for k, link in enumerate(links):
        place = f"{where}[{k}]"
        for spec in link.inputs:
            if values.get(spec.name) != spec:
                raise BadFile(f"{place}: input {spec.name!r} is no earlier segment's output")
        if not link.inputs or not link.outputs or link.outputs[0] != logits[link.exit]:
            raise BadFile(f"{place}: outputs[0]: expected the logits of exit {link.exit!r}")
        for spec in link.outputs:
            if spec.name in values:
                raise BadFile(f"{place}: output {spec.name!r} is made twice")
            values[spec.name] = spec
    return values


# ---------------------------------------------------------------- writing


def check_target(path: Path) -> None:
    """UsageError if *path* holds something that a new bundle must not replace."""
    if (
        path.exists()
        and not (path / MANIFEST).is_file()
        and (path.is_file() or any(path.iterdir()))
    ):
        raise UsageError(f"{path}: exists and is not a bundle", hint="choose another -o")


def write_bundle(
    path: Path | str,
    *,
    name: str,
    model_data: bytes,
    exits: Mapping[str, str],
    class_names: Sequence[str],
    preprocess: Preprocess,
    selftest: NDArray[Any] | SelfTest,
    scheme: str,
    provenance: Mapping[str, Any],
    calibration_set: Mapping[str, str] | None = None,
    ranges_digests: NDArray[np.uint8] | None = None,
    training_bloom: bytes | None = None,
    parent: Parent | None = None,
    policies: Mapping[str, bytes] | None = None,
) -> Bundle:
    """
    Cut *model_data* and write the bundle folder *path*: complete or not at all.

    *exits* maps exit names to logits tensors; *selftest* are raw samples (N, ...), N >= 1,
    whose inputs and logits are computed here with the uncut model, or comes with its answers. A
    bundle that stands there is replaced; its policies are kept only if the new one has the same
    digest. *policies* maps devices to policy files that come with the new one. UsageError if
    something else stands there, Unsupported if the model cannot be served, StorageError.
    """
    path = Path(path)
    check_target(path)
    plans = cut(model_data, exits)
    inputs, outputs = model_io(model_data)
    if len(inputs) != 1:
        raise Unsupported(f"{name}: {len(inputs)} inputs, expected one")
    pieces = (model_data, *(plan.data for plan in plans))
    try_first([Held(data, f"{name}: {MODEL}") for data in pieces])
    specs = {spec.name: spec for spec in outputs}
    logits = [plan.outputs[0] for plan in plans]
    contents = {
        MODEL: model_data,
        SELFTEST: npz_bytes(
            {name: getattr(selftest, name) for name in ("samples", "inputs", "logits")}
            if isinstance(selftest, SelfTest)
            else _answers(model_data, (inputs[0], outputs), logits, preprocess, selftest)
        ),
    }
    if ranges_digests is not None:
        contents[RANGES] = npz_bytes({"digests": np.asarray(ranges_digests, np.uint8)})
    if training_bloom is not None:
        contents[BLOOM] = training_bloom
    document = {
        "format": FORMAT,
        "name": name,
        "made_by": f"edgeexit {__version__}",
        "scheme": scheme,
        "exits": [plan.exit for plan in plans],
        "class_names": list(class_names),
        "preprocess": preprocess.to_document(),
        "input": inputs[0].to_document(),
        "logits": [specs.get(spec.name, spec).to_document() for spec in logits],
        "model": MODEL,
        "segments": [
            {
                "file": f"segment-{k}.tflite",
                "exit": plan.exit,
                **_entry_of(plan.data),
                "inputs": [spec.to_document() for spec in plan.inputs],
                "outputs": [spec.to_document() for spec in plan.outputs],
            }
            for k, plan in enumerate(plans)
        ],
        "files": {file: _entry_of(data) for file, data in contents.items()},
        "calibration_set": dict(calibration_set) if calibration_set is not None else None,
        "provenance": dict(provenance),
        "parent": None
        if parent is None
        else {"digest": parent.digest, "exits": list(parent.exits)},
    }
    contents |= {f"segment-{k}.tflite": plan.data for k, plan in enumerate(plans)}
    contents[MANIFEST] = json_bytes(document)
    _check_writable(contents[MANIFEST], path)
    with new_folder(path, keep=_keep_policies) as folder, storage(path):
        for file, data in contents.items():
            (folder / file).write_bytes(data)
        for device, data in (policies or {}).items():
            (folder / POLICIES).mkdir(exist_ok=True)
            (folder / POLICIES / f"{device}.json").write_bytes(data)
    return load_bundle(path)


def _entry_of(data: bytes) -> dict[str, Any]:
    return {"sha256": digest_of(data), "bytes": len(data)}


def _check_writable(data: bytes, path: Path) -> None:
    try:
        _from_document(parse_json(data, MANIFEST), path, digest_of(data))
    except BadFile as error:
        raise Unsupported(f"{path.name}: cannot be a bundle: {error}", hint=error.hint) from error


def _keep_policies(old: Path, new: Path) -> None:
    same = (old / MANIFEST).is_file() and (
        read_bytes(old / MANIFEST) == (new / MANIFEST).read_bytes()
    )
    if not same or not (old / POLICIES).is_dir():
        return
    (new / POLICIES).mkdir(exist_ok=True)
    for path in sorted((old / POLICIES).iterdir()):
        if path.is_file() and not (new / POLICIES / path.name).exists():
            shutil.copy2(path, new / POLICIES / path.name)


def _answers(
    model_data: bytes,
    edges: tuple[TensorSpec, Sequence[TensorSpec]],
    logits: Sequence[TensorSpec],
    preprocess: Preprocess,
    samples: NDArray[Any],
) -> dict[str, NDArray[Any]]:
    spec, outputs = edges
    stage = InputStage(preprocess, spec.shape, spec.dtype, spec.scale, spec.zero_point)
    model = open_interpreter(model_data, where=MODEL)
    check_edges(model, [spec], outputs, MODEL)
    if len(samples) == 0:
        raise UsageError("selftest: no samples, expected at least one")
    inputs, answers = [], []
    for sample in samples:
        tensor = stage(sample)
        model.inputs[spec.name][...] = tensor
        model.invoke()
        inputs.append(tensor.copy())
        answers.append([model.outputs[out.name].reshape(-1).copy() for out in logits])
    return {
        "samples": np.asarray(samples),
        "inputs": np.array(inputs),
        "logits": np.array(answers),
    }

"""
Damaged .tflite files: a sound one with a few bytes or numbers exchanged.

Where the numbers of a file lie is found by reading it once with the schema's own classes and
writing down what they look at: offsets, lengths, shapes, indices, types, options, scales.

Run as a program this is a warmed-up process whose forks meet the mutants, as `edgeexit` would,
and that prints a line of JSON for each. The child in which a file is tried out is a fork, too:
a fresh interpreter takes a quarter of a second.
"""

import contextlib
import gc
import io
import json
import os
import select
import shutil
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import flatbuffers.encode
import flatbuffers.table
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from graphs import CLASSES, LAYERS, Recipe, build
from PIL import Image
from small import pictures, small_bundle, small_preprocess
from tiny import tiny_model

from edgeexit import cli, interpreter, vetting
from edgeexit.bundle import Bundle, load_bundle, write_bundle
from edgeexit.cut import model_io
from edgeexit.errors import EdgeExitError
from edgeexit.files import digest_of, json_bytes
from edgeexit.names import data_folder
from edgeexit.policy import Policy
from edgeexit.preprocess import Preprocess
from edgeexit.tflite import read_model

_TEMPTING = (0, 1, 2, 3, 7, 8, 16, 127, 128, 255, 256, 32767, 65535, 1 << 20, (1 << 31) - 1)


@dataclass(frozen=True)
class Seed:
    """A sound file that mutants are made of."""

    name: str
    data: bytes

    @cached_property
    def numbers(self) -> "tuple[list[tuple[int, str]], list[tuple[int, str]]]":
        """
        (position, struct letter) of the file's numbers: those that mean something to a network,
        then those that hold the file together. Constants are left out.
        """
        meant: set[tuple[int, str]] = set()
        every: set[tuple[int, str]] = set()
        get, vector = flatbuffers.encode.Get, flatbuffers.table.Table.GetVectorAsNumpy
        read = flatbuffers.table.Table.Get

        def noted(packer: Any, data: Any, at: int) -> Any:
            every.add((int(at), packer.format.lstrip("<")))
            return get(packer, data, at)

        def noted_read(table: Any, flags: Any, at: int) -> Any:
            meant.add((int(at), flags.packer_type.format.lstrip("<")))
            return read(table, flags, at)

        def noted_vector(table: Any, flags: Any, at: int) -> Any:
            # A constant of a few numbers says where and how far: axes, paddings, shapes, indices.
            values = vector(table, flags, at)
            letter = flags.packer_type.format.lstrip("<")
            if flags.__name__ == "Uint8Flags":
                letter = "i" if len(values) % 4 == 0 else "b"
            size, many = struct.calcsize(letter), len(values) * values.itemsize
            if flags.__name__ != "Uint8Flags" or many <= 64:
                start = table.Vector(at)
                meant.update((start + k, letter) for k in range(0, min(many, 256), size))
            return values

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(flatbuffers.encode, "Get", noted)
            patch.setattr(flatbuffers.table.Table, "Get", noted_read)
            patch.setattr(flatbuffers.table.Table, "GetVectorAsNumpy", noted_vector)
            schema.ModelT.InitFromObj(schema.Model.GetRootAs(self.data, 0))
        return sorted(meant), sorted(every - meant)


def mutants(seed: Seed, count: int, key: int = 0) -> Iterator[bytes]:
    """
    *count* mutants of *seed*; equal keys give equal ones.

    A fifth are plain byte flips. Of the others most are drawn anew until our own reader takes
    them, or nearly all would end there and the runtime would never see one.
    """
    rng = np.random.default_rng([key, *seed.name.encode()])
    for number in range(count):
        data = _drawn(seed, number % 5 == 0, rng)
        for _ in range(20 if number % 5 > 1 else 0):
            if _is_readable(data):
                break
            data = _drawn(seed, False, rng)
        yield data


def _drawn(seed: Seed, is_flip: bool, rng: np.random.Generator) -> bytes:
    data = bytearray(seed.data)
    for _ in range(int(rng.choice([1, 1, 2, 4]))):
        if is_flip:
            data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        else:
            _exchange(data, seed, rng)
    return bytes(data) if data != seed.data else _drawn(seed, is_flip, rng)


def _is_readable(data: bytes) -> bool:
    try:
        read_model(data)
    except EdgeExitError:
        return False
    return True


def _exchange(data: bytearray, seed: Seed, rng: np.random.Generator) -> None:
    numbers = seed.numbers[int(rng.random() < 0.1)]
    at, letter = numbers[rng.integers(len(numbers))]
    size = struct.calcsize(letter)
    (old,) = struct.unpack_from(f"<{letter}", data, at)
    if letter in "fd":
        new = rng.choice([0.0, -old, np.nan, np.inf, 1e-30, 1e30, old * 1000])
        struct.pack_into(f"<{letter}", data, at, new)
        return
    how = rng.integers(5)
    if how == 0:
        new = int(_TEMPTING[rng.integers(len(_TEMPTING))])
    elif how == 1:
        new = -int(_TEMPTING[rng.integers(len(_TEMPTING))])
    elif how == 2:
        new = old + int(rng.integers(-4, 5))
    elif how == 3:
        other, _ = numbers[rng.integers(len(numbers))]
        new = int.from_bytes(data[other : other + size], "little")
    else:
        new = int(rng.integers(0, 1 << min(8 * size, 62)))
    data[at : at + size] = (new % (1 << 8 * size)).to_bytes(size, "little")


# ---------------------------------------------------------------- meeting them

PARENT_S = 30.0
CHILD_S = 3.0
# Of so many one process meets one after the other: forks are dear, and damage may add up.
BATCH = 20

# How the trial in the child can end.
READING, REFUSED, CRASHED, HUNG, PASSED = "reading", "refused", "crashed", "hung", "passed"
REACHED = (REFUSED, CRASHED, HUNG, PASSED)


@dataclass
class Met:
    """
    What came of one mutant.

    *codes* are the exit codes of the commands, *errors* what they said; *ends* how trials in
    children ended; *changed* the files that should be as before; *status* is 0 if the process
    lives, else how it ended (negative: signal, None: it hung).
    """

    name: str
    status: int | None
    codes: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    seconds: float = 0.0


def forked_trial(ends: list[str]) -> Callable[..., tuple[int | None, bytes, bytes]]:
    """What stands in for vetting._run: the same child, by fork; notes how it ended in *ends*."""

    def run(letter: bytes, timeout_s: float, count: int) -> tuple[int | None, bytes, bytes]:
        mine, its = os.pipe()
        child = os.fork()
        if child == 0:
            code = 99
            try:
                os.close(mine)
                vetting.attempt(letter, interpreter.try_out, CHILD_S, os.fdopen(its, "w"))
                code = 0
            finally:
                os._exit(code)
        os.close(its)
        with os.fdopen(mine, "rb") as pipe:
            said = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        last = json.loads(said.splitlines()[-1])
        if "refused" in last:
            by_runtime = (
                interpreter.runtime_name() in last["refused"] or "memory" in last["refused"]
            )
            ends.append(REFUSED if by_runtime else READING)
        elif "ok" in last and code == 0:
            ends.append(PASSED)
        else:
            ends.append(HUNG if -code in (signal.SIGALRM, signal.SIGXCPU) else CRASHED)
        return code, said, b""

    return run


def meet(jobs: Sequence[tuple["Target", bytes]], folder: Path) -> Iterator[Met]:
    """
    Meet the mutants of *jobs* in one fork of this process, one after the other.

    It ends early where that process dies or hangs. Nothing below *folder* may change but what
    the target's own command writes.
    """
    mine, its = os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.close(mine)
            _meet_here(jobs, folder, its)
            code = 0
        finally:
            os._exit(code)
    os.close(its)
    with os.fdopen(mine, "rb") as pipe:
        for met_by, _ in jobs:
            name = met_by.seed.name
            ready, _, _ = select.select([pipe], [], [], PARENT_S)
            line = pipe.readline() if ready else b""
            if not line.endswith(b"\n"):
                break
            yield Met(**json.loads(line))
        else:
            os.waitpid(child, 0)
            return
    os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    yield Met(name=name, status=status if ready else None)


def _meet_here(jobs: Sequence[tuple["Target", bytes]], folder: Path, answer: int) -> None:
    ends: list[str] = []
    vetting._run = forked_trial(ends)
    vetting._CHILD_MEMORY_BYTES = 3 << 30
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 2)  # what the runtime itself says
    for target, data in jobs:
        target.place(data)
        before, began = snapshot(folder), time.monotonic()
        met = Met(name=target.seed.name, status=0)
        ends.clear()
        for words in target.commands:
            told = io.StringIO()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
                met.codes.append(cli.entry(words))
            met.errors.append(told.getvalue()[-2000:])
        met.ends, met.seconds = list(ends), time.monotonic() - began
        changed = {path for path, _ in before.items() ^ snapshot(folder).items()}
        changed -= {str(folder / "home" / "vetted")}
        if met.codes == [0]:
            changed = {path for path in changed if OUT not in Path(path).parts}
        met.changed = sorted(changed)
        os.write(answer, f"{json.dumps(asdict(met))}\n".encode())


def replace_file(bundle: Path, name: str, data: bytes) -> None:
    """Put *data* in the place of a bundle's file, with digests that fit."""
    (bundle / name).write_bytes(data)
    manifest = bundle / "bundle.json"
    document = json.loads(manifest.read_bytes())
    entries = [document["files"].get(name), *document["segments"]]
    for entry in entries:
        if entry is not None and entry.get("file", name) == name:
            entry.update(sha256=digest_of(data), bytes=len(data))
    manifest.write_bytes(json_bytes(document))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below *folder*."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@dataclass(frozen=True, kw_only=True)
class Target:
    """
    Where mutants go: *place* puts one there, *commands* then meet it.

    The sound file itself must pass through all of them with exit code 0.
    """

    seed: Seed
    place: Callable[[bytes], object]
    commands: tuple[tuple[str, ...], ...]
    weight: int = 1


def bundle_targets(bundle: Bundle, name: str, *, recut: bool = False) -> Iterator[Target]:
    """Every segment of *bundle*, by inspect and the self-test; with *recut* the model, cut anew."""
    path = str(bundle.path)
    looks = ("inspect", path)
    for segment in bundle.segments:
        yield _target(bundle, f"{name}/{segment.file}", segment.file, (looks, ("run", path)))
    if recut:
        sample, policy = (str(bundle.path.parent / name) for name in ("sample.png", "policy.json"))
        cut_anew = ("run", path, sample, "--policy", policy)
        yield _target(bundle, f"{name}/model", bundle.model, (looks, cut_anew, ("run", path)))


def _target(bundle: Bundle, name: str, file: str, commands: tuple[tuple[str, ...], ...]) -> Target:
    recut, policy_path = file == bundle.model, bundle.path.parent / "policy.json"
    sound = {f: bundle.read_file(f) for f in (*bundle.files, *(s.file for s in bundle.segments))}
    sound["bundle.json"] = (bundle.path / "bundle.json").read_bytes()

    def place(data: bytes) -> None:
        for other, content in sound.items():
            (bundle.path / other).write_bytes(content)
        replace_file(bundle.path, file, data)
        if recut:
            policy = Policy.forced(load_bundle(bundle.path), "exit1", ("exit1",))
            policy_path.write_bytes(json_bytes(policy.to_document()))

    return Target(seed=Seed(name, sound[file]), place=place, commands=commands)


OUT = "out.edgeexit"


def targets(folder: Path, key: int) -> list[Target]:
    """Bundles made in *folder* of int8 and float networks; *key* chooses kinds of operators."""
    found: list[Target] = []
    for quantized in (True, False):
        home = folder / ("int8" if quantized else "float")
        home.mkdir()
        bundle = small_bundle(home, 2, quantized=quantized)
        Image.fromarray(pictures(1).samples[0, ..., 0]).save(home / "sample.png")
        found += bundle_targets(bundle, home.name, recut=True)
    for number, precision in enumerate(("int8", "float") * 2):
        found += bundle_targets(graph_bundle(folder, precision, 4 * key + number), f"graph{number}")
    shutil.copytree(data_folder("examples") / "fashion.edgeexit", folder / "fashion.edgeexit")
    found += list(bundle_targets(load_bundle(folder / "fashion.edgeexit"), "fashion"))[-1:]
    found += [convert_target(folder, quantized=quantized) for quantized in (True, False)]
    return found


def convert_target(folder: Path, *, quantized: bool) -> Target:
    """A ready .tflite, through convert."""
    home = folder / f"convert-{quantized}"
    home.mkdir()
    net, out = home / "net.tflite", home / OUT
    samples = pictures(16)
    np.savez(home / "samples.npz", samples=samples.samples, labels=samples.labels)
    (home / "labels.txt").write_text("a\nb\nc\nd\n")
    document = small_preprocess().to_document()
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in document.items()]
    (home / "preprocess.toml").write_text("".join(lines))

    def place(data: bytes) -> None:
        net.write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)

    words = ["convert", str(net), "-o", str(out), "--calibration", str(home / "samples.npz")]
    words += ["--labels", str(home / "labels.txt"), "--preprocess", str(home / "preprocess.toml")]
    words += [] if quantized else ["--scheme", "float"]
    seed = Seed(home.name, tiny_model(exits=2, quantized=quantized).data)
    return Target(seed=seed, place=place, commands=(tuple(words),), weight=3)


def graph_bundle(folder: Path, precision: str, number: int) -> Bundle:
    """A bundle of a network with layers of all kinds, chosen by chance."""
    rng = np.random.default_rng(number)
    while True:
        kinds = rng.choice(sorted(LAYERS), 12)
        steps = [(str(k), *map(int, rng.integers((4, 9, 12)))) for k in kinds]
        recipe = Recipe(
            steps=(*steps[:6], ("head", 0, 0, 0), *steps[6:], ("head", 0, 0, 0)),
            precision=precision,
            seed=int(rng.integers(1000)),
            inputs=1,
            exits=tuple(range(10)),
            outside=False,
        )
        graph = build(recipe)
        shapes = {spec.name: spec.shape for spec in model_io(graph.alive)[1]}
        exits = {name: t for name, t in graph.exits.items() if shapes.get(t) == (1, CLASSES)}
        exits = dict(list(exits.items())[-2:])
        if len(graph.inputs) == 1 and len(exits) > 1:
            break
    return write_bundle(
        folder / f"graph{number}.edgeexit",
        name="graph",
        model_data=graph.alive,
        exits=exits,
        class_names=[str(k) for k in range(CLASSES)],
        preprocess=Preprocess(kind="array", scale=1.0, mean=(0.0,), std=(1.0,), layout="as-is"),
        selftest=rng.normal(size=(2, 6, 6, 2)).astype(np.float32),
        scheme=precision,
        provenance={},
    )


def main(folder: Path, count: int, key: int) -> None:
    """Meet *count* mutants, spread over all targets; a line of JSON for each."""
    os.environ["EDGEEXIT_HOME"] = str(folder / "home")
    os.chdir(folder)
    chosen = targets(folder, key)
    for target in chosen:
        target.place(target.seed.data)
        for words in target.commands:  # what is imported now need not be in every fork
            with contextlib.redirect_stdout(io.StringIO()):
                assert cli.entry(words) == 0, words
        for met in meet([(target, target.seed.data)], folder):
            assert met.codes == [0] * len(target.commands), met
    gc.freeze()  # or each fork would copy most of the memory, only to count references
    for target in chosen:
        share = round(count * target.weight / sum(other.weight for other in chosen))
        jobs = [(target, data) for data in mutants(target.seed, share, key)]
        while jobs:
            for met in meet(jobs[:BATCH], folder):
                sys.stdout.write(json.dumps(asdict(met)) + "\n")
            jobs = jobs[BATCH:]


if __name__ == "__main__":
    sys.dont_write_bytecode = True
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

"""Files that would take the process down with them are found in a child, once for each machine."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from small import small_bundle
from tiny import tiny_model

from edgeexit import interpreter, vetting
from edgeexit.errors import BadFile, DeviceError, Unsupported
from edgeexit.interpreter import check_loads, open_interpreter, try_first
from edgeexit.runtime import Runner
from edgeexit.tflite import read_model
from edgeexit.vetting import Held

SOUND = tiny_model(exits=1).data


def with_wrong_options(data: bytes) -> bytes:
    """A file that can be read, and that kills the runtime: a mean that is called a split."""
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(data, 0))
    code = model.operatorCodes[model.subgraphs[0].operators[1].opcodeIndex]
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.SPLIT
    builder = flatbuffers.Builder(1 << 12)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


DEADLY = with_wrong_options(SOUND)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that has seen no file yet."""
    monkeypatch.setenv("EDGEEXIT_HOME", str(tmp_path / "home"))
    forget(monkeypatch)
    return tmp_path / "home"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process that starts now does not know."""
    monkeypatch.setattr(vetting, "_passed", set())


def child_is(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(vetting, "_CHILD", code)


def test_the_deadly_file_is_one() -> None:
    """It reads as sound, and a process that opens it dies."""
    read_model(DEADLY)
    code = (
        "import sys\nfrom edgeexit.interpreter import open_interpreter\n"
        "open_interpreter(sys.stdin.buffer.read(), is_own=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=DEADLY, capture_output=True, check=False
    )
    assert done.returncode < 0


def test_a_process_that_is_there_to_try_things_out_starts_no_other(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_is(monkeypatch, "raise SystemExit('nobody should start me')")
    with pytest.raises(DeviceError, match="nobody should start me"):
        try_first([Held(SOUND, "x.tflite")])
    monkeypatch.setattr(vetting, "_is_expendable", False)
    vetting.expendable()

    try_first([Held(SOUND, "x.tflite")])

    assert not home.exists()


@pytest.mark.parametrize("open_it", [check_loads, open_interpreter])
def test_a_deadly_file_is_refused_and_we_live(open_it: Callable[..., Any], home: Path) -> None:
    for _ in range(2):
        with pytest.raises(Unsupported, match=r"^x\.tflite: the runtime crashes on it \(signal"):
            open_it(DEADLY, where="x.tflite")
    assert not home.exists()


@pytest.mark.parametrize("broken", [SOUND[:500], b"", b"x" * 1000, b"TFL3" * 100])
def test_what_the_runtime_refuses_is_refused(broken: bytes) -> None:
    with pytest.raises(Unsupported, match=r"^model\.tflite: "):
        check_loads(broken)
    with pytest.raises(BadFile, match=r"^x: "):
        open_interpreter(broken, where="x")


def test_of_several_files_the_one_is_named() -> None:
    files = [Held(SOUND, "a"), Held(DEADLY, "b"), Held(SOUND[:500], "c")]
    with pytest.raises(Unsupported, match=r"^b: the runtime crashes"):
        try_first(files)
    with pytest.raises(BadFile, match=r"^c: "):
        try_first([files[0], files[2]])


def test_what_passed_is_not_tried_again(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_loads(SOUND)
    assert len((home / "vetted").read_text().split()) == 1
    child_is(monkeypatch, "import os; os.abort()")
    check_loads(SOUND)
    forget(monkeypatch)
    check_loads(SOUND)
    monkeypatch.setattr(interpreter, "runtime_name", lambda: "ai-edge-litert 99")
    with pytest.raises(DeviceError, match=r"no process to try model\.tflite out"):
        check_loads(SOUND)


def test_a_home_that_takes_nothing_is_no_obstacle(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text("a file, where a folder should be")
    check_loads(SOUND)
    forget(monkeypatch)
    with pytest.raises(Unsupported):
        check_loads(DEADLY)
    check_loads(SOUND)


def test_the_memory_does_not_grow_without_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_MOST_BYTES", 1000)
    for number in range(40):
        vetting._remember([f"{number:064}"])
    kept = (home / "vetted").read_text().splitlines()
    assert kept[-1] == f"{39:064}"
    assert all(len(line) == 64 for line in kept)
    assert 5 < len(kept) < 17


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        ("raise SystemExit('torn installation')", DeviceError, "torn installation"),
        ("print('{\"at\": 0}', flush=True); import os; os.abort()", Unsupported, "signal 6"),
        ("print('{\"at\": 0}', flush=True)", Unsupported, "crashes on it .code 0"),
        ("print('{\"at\": 7}')", Unsupported, "garbles"),
        ("print('[]')", Unsupported, "garbles"),
        ("print(b'\\xff')", Unsupported, "garbles"),
        (
            "print('{\"at\": 0}', flush=True); import os; os.kill(os.getpid(), 14)",
            Unsupported,
            "hangs on it",
        ),
    ],
)
def test_however_the_child_ends_it_is_one_line(
    code: str, error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child_is(monkeypatch, code)
    with pytest.raises(error, match=words) as caught:
        check_loads(SOUND)
    assert str(caught.value).isprintable()


TRIES = """
from edgeexit import vetting
def try_out(data, where, is_late):
    %s
vetting.child(try_out)
"""


@pytest.mark.parametrize(
    ("deed", "error", "words"),
    [
        ("while True: pass", Unsupported, r"hangs on it \(over 0.5 s\)"),
        ("__import__('time').sleep(30)", Unsupported, "hangs on it"),
        ("bytearray(7 << 30)", Unsupported, "too much memory"),
        ("import pathlib; pathlib.Path(%r).write_text('x')", Unsupported, "crashes on it"),
        ("open('/dev/stdout', 'w').write('{\\n' * 9); 1 / 0", Unsupported, "crashes on it"),
        ("raise vetting.BadFile(f'{where}\\n{len(data)}')", BadFile, r"^f\\n7$"),
        ("pass", None, ""),
    ],
)
def test_the_child_has_limits(
    deed: str,
    error: type[Exception] | None,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = tmp_path / "written"
    child_is(monkeypatch, TRIES % (deed.replace("%r", repr(str(target)))))
    files = [Held(b"7 bytes", "f")]
    if error is None:
        vetting.vet(files, "r", timeout_s=0.5)
    else:
        with pytest.raises(error, match=words):
            vetting.vet(files, "r", timeout_s=0.5)
    assert not target.exists() or target.stat().st_size == 0


def test_answers_that_depend_on_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Opened:
        def __init__(self) -> None:
            self.inputs = {"x": np.zeros(3, np.int8)}
            self.outputs = {"y": np.full(3, len(made), np.int8)}
            made.append(self)

        def invoke(self) -> None:
            pass

    monkeypatch.setattr(interpreter, "open_interpreter", lambda *_, **__: Opened())
    with pytest.raises(Unsupported, match=r"^f: its answers depend on what else lies in memory"):
        interpreter.try_out(SOUND, "f", lambda: False)
    assert (made[0].inputs["x"] == np.iinfo(np.int8).max).all()
    interpreter.try_out(SOUND, "slow", lambda: True)
    assert len(made) == 3


def test_a_runner_tries_all_its_segments_in_one_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small_bundle(tmp_path)
    (tmp_path / "home" / "vetted").unlink()
    forget(monkeypatch)
    ran = vetting._run
    counts: list[int] = []

    def counted(letter: bytes, timeout_s: float, count: int) -> Any:
        counts.append(count)
        return ran(letter, timeout_s, count)

    monkeypatch.setattr(vetting, "_run", counted)
    for _ in range(2):
        with Runner(bundle, None) as runner:
            runner(bundle.selftest().samples[0])
    assert counts == [3]

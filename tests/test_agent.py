"""What a board answers: one order in, JSON lines out, and an end whenever the link ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from small import small_bundle

from edgeexit import __version__, children, cli
from edgeexit.agent import MOST_LINE_BYTES, PROTOCOL, Talk, profiling
from edgeexit.errors import EdgeExitError, StorageError
from edgeexit.files import Table
from edgeexit.manifest import Manifest

GREETING = {"agent": PROTOCOL, "edgeexit": __version__}


class Agent:
    """An agent's process, and what it said so far."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
        )

    def send(self, document: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(document).encode() + b"\n")
        self.process.stdin.flush()

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        found = json.loads(self.process.stdout.readline())
        assert isinstance(found, dict)
        return found

    def until(self, key: str) -> Any:
        """What the next line with *key* holds; an end before it is an error that shows it."""
        while True:
            line = self.line()
            if key in line:
                return line[key]
            assert not {"result", "error"} & set(line), line

    def drop(self) -> None:
        """The link goes: nobody writes to it any more, or reads what it says."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()

    def ended(self, timeout_s: float = 10.0) -> int:
        return self.process.wait(timeout_s)


@contextmanager
def agent(*command: str, **environment: str) -> Iterator[Agent]:
    made = Agent(*command, **environment)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        for pipe in (made.process.stdin, made.process.stdout, made.process.stderr):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


def serving(work: str) -> tuple[str, str]:
    """The command of an agent that does nothing but *work*, the body of its answer."""
    body = "\n".join(f"    {line}" for line in work.splitlines())
    code = (
        "import os, subprocess, sys, time\n"
        "from pathlib import Path\n"
        "from edgeexit import agent, cli\n"
        f"def answer(order, talk):\n{body}\n"
        "sys.exit(agent.serve(lambda: answer, cli.explained))\n"
    )
    return "-c", code


# ---------------------------------------------------------------- the conversation


def test_a_greeting_comes_first_and_one_result_last() -> None:
    with agent(*serving("talk.progress(done=0.5)\nreturn {'sum': order.get('a', int) + 1}")) as it:
        it.send({"a": 1})
        assert [it.line() for _ in range(3)] == [
            GREETING,
            {"progress": {"done": 0.5}},
            {"result": {"sum": 2}},
        ]
        assert it.process.stdout is not None
        assert it.process.stdout.read() == b""
        assert it.ended() == 0


@pytest.mark.parametrize(
    ("work", "code", "says"),
    [
        ("raise agent.UsageError('a: b')", 2, "a: b"),
        ("order.get('a', int)", 3, "order: a: missing"),
        ("return 1 / 0", 1, "a bug in edgeexit: ZeroDivisionError"),
        ("open('/nowhere/x')", 2, "/nowhere/x: No such file"),
        ("raise OSError(28, 'No space left on device')", 11, "No space left"),
        ("raise MemoryError", 5, "out of memory"),
        ("return {'x': object()}", 1, "a bug in edgeexit: TypeError"),
        ("raise SystemExit(7)", 1, "a bug in edgeexit: SystemExit"),
        ("talk.progress(x=float('nan'))", 1, "a bug in edgeexit: ValueError"),
    ],
)
def test_whatever_is_raised_is_the_error_line(work: str, code: int, says: str) -> None:
    with agent(*serving(work)) as it:
        it.send({})
        assert it.line() == GREETING
        error = it.line()["error"]
        assert (it.ended(), error["exit_code"]) == (code, code)
        assert says in error["message"]
        assert "\n" not in error["message"]
        assert it.process.stdout is not None
        assert it.process.stdout.read() == b""


def test_what_libraries_print_stays_out_of_the_protocol() -> None:
    work = "os.write(1, b'!')\nsubprocess.run(['echo', 'world'])\nprint('hello')\nreturn {}"
    with agent(*serving(work)) as it:
        it.send({})
        assert [it.line(), it.line()] == [GREETING, {"result": {}}]
        assert it.process.stderr is not None
        assert sorted(it.process.stderr.read().split()) == [b"!world", b"hello"]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (b"{\n", 3, "not valid JSON"),
        (b"[]\n", 3, "expected a JSON object"),
        (b"\xff\n", 3, "not valid JSON"),
        (b"\n", 3, "not valid JSON"),
        (b"x" * (MOST_LINE_BYTES + 1), 3, f"more than {MOST_LINE_BYTES} bytes"),
        (b"", 130, "interrupted"),
        (b'{"a": 1}', 130, "interrupted"),
    ],
)
def test_what_is_no_order_is_refused(line: bytes, code: int, says: str) -> None:
    with agent(*serving("return {}")) as it:
        assert it.process.stdin is not None
        it.process.stdin.write(line)
        it.process.stdin.flush()
        if code == 130:
            it.process.stdin.close()
        assert it.line() == GREETING
        error = it.line()["error"]
        assert (error["exit_code"], it.ended()) == (code, code)
        assert says in error["message"]


def test_what_is_needed_is_asked_for_and_answered_line_by_line() -> None:
    work = """
first = talk.need(blobs=['a']).get('n', int)
second = talk.need(fetch='b').get('n', int)
return {'n': [first, second]}"""
    with agent(*serving(work.strip())) as it:
        it.send({})
        assert it.line() == GREETING
        assert it.line() == {"need": {"blobs": ["a"]}}
        it.send({"n": 1})
        assert it.line() == {"need": {"fetch": "b"}}
        it.send({"n": 2})
        assert it.line() == {"result": {"n": [1, 2]}}


BUSY = {
    "sleeps": "time.sleep(60)",
    "calculates": "sum(k for k in range(10**12))",
    "waits for a child": "subprocess.run(['sleep', '60'])",
    "waits for an answer": "talk.need(x=1)",
}


def cleaning(work: str, mark: Path) -> tuple[str, str]:
    return serving(
        f"talk.progress(begun=1)\ntry:\n    {work}\n"
        f"except KeyboardInterrupt:\n    Path({str(mark)!r}).write_text('cleaned')\n    raise"
    )


@pytest.mark.parametrize("work", BUSY.values(), ids=BUSY.keys())
def test_the_end_of_stdin_ends_the_work_as_ctrl_c_does(work: str, tmp_path: Path) -> None:
    with agent(*cleaning(work, tmp_path / "mark")) as it:
        it.send({})
        it.until("progress")
        time.sleep(0.1)
        it.drop()
        assert it.ended() == 130
    assert (tmp_path / "mark").read_text() == "cleaned"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_end_the_work_too_and_are_told(number: signal.Signals, tmp_path: Path) -> None:
    with agent(*cleaning("time.sleep(60)", tmp_path / "mark")) as it:
        it.send({})
        it.until("progress")
        time.sleep(0.1)
        it.process.send_signal(number)
        assert it.until("error")["exit_code"] == it.ended() == 130
    assert (tmp_path / "mark").read_text() == "cleaned"


def test_a_reader_that_went_away_ends_the_work(tmp_path: Path) -> None:
    work = "while True:\n        talk.progress(x=1)\n        time.sleep(0.01)"
    with agent(*cleaning(work, tmp_path / "mark")) as it:
        it.send({})
        it.until("progress")
        assert it.process.stdout is not None
        it.process.stdout.close()
        assert it.ended() == 130
    assert (tmp_path / "mark").read_text() == "cleaned"


def test_a_reader_that_stands_still_holds_nothing_up(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    work = f"""
for k in range(5000):
    talk.progress(k=k, text='x' * 1000)
talk.progress(text='x' * 5000)
Path({str(mark)!r}).write_text('done')
return {{}}"""
    with agent(*serving(work.strip())) as it:
        it.send({})
        deadline = time.monotonic() + 20
        while not mark.exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        # What was sent is whole lines; what was not is left out.
        assert it.line() == GREETING
        numbers = []
        while "progress" in (line := it.line()):
            numbers.append(line["progress"]["k"])
        assert line == {"result": {}}
        assert numbers == sorted(numbers)
        assert 10 < len(numbers) < 5000


# ---------------------------------------------------------------- the command


def test_people_are_not_shown_the_command_but_it_explains_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.entry(["--help"]) == 0
    assert "agent" not in capsys.readouterr().out
    assert cli.entry(["agent", "--help"]) == 0
    assert "JSON" in capsys.readouterr().out


def test_an_unknown_subcommand_is_an_error_line_too() -> None:
    with agent("-m", "edgeexit", "agent", "helo") as it:
        it.send({})
        assert it.line() == GREETING
        error = it.line()["error"]
        assert error["exit_code"] == it.ended() == 2
        assert error["hint"] == "did you mean 'hello'?"


def hello(order: dict[str, Any], **environment: str) -> dict[str, Any]:
    with agent("-m", "edgeexit", "agent", "hello", **environment) as it:
        it.send(order)
        found = it.until("result")
        assert it.ended() == 0
    assert isinstance(found, dict)
    return found


def test_a_board_says_what_it_is_and_that_its_runtime_works(tmp_path: Path) -> None:
    home = tmp_path / "not" / "there"
    found = hello({}, EDGEEXIT_HOME=str(home))

    assert found["device"] == "host"
    assert found["edgeexit"] == __version__
    assert found["machine"]["machine"] == os.uname().machine
    assert found["machine"]["userland_bits"] == 64
    assert found["home"] == str(home)
    assert found["free_bytes"] > 0
    assert abs(found["clock_s"] - time.time()) < 60
    assert found["state"]["at_ns"] > 0
    assert found["runtime"] in ("ai-edge-litert", "tflite-runtime")
    assert found["trial"]["runtime"] == f"{found['runtime']} {found['runtime_version']}"
    assert found["trial"]["delegate"] == "XNNPACK"
    assert not home.exists()


def test_the_quick_answer_tries_nothing_and_loads_no_numpy(tmp_path: Path) -> None:
    assert hello({"quick": True})["trial"] is None
    code = "import sys, edgeexit.agent.hello as h; assert 'numpy' not in sys.modules; print(1)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_replayed_board_says_who_it_is_and_that_it_is_not_real(tmp_path: Path) -> None:
    model = tmp_path / "proc" / "device-tree" / "model"
    model.parent.mkdir(parents=True)
    model.write_text("Raspberry Pi 4 Model B Rev 1.4\0")
    found = hello({"quick": True}, EDGEEXIT_SYSROOT=str(tmp_path))

    assert (found["device"], found["model"]) == ("rpi4", "Raspberry Pi 4 Model B Rev 1.4")
    assert "EDGEEXIT_SYSROOT" in found["emulated"]


def test_a_system_that_shows_no_processes_is_asked_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psutil

    me = subprocess.Popen([sys.executable, "-m", "timeit", "-n1", "import time; time.sleep(30)"])
    try:
        assert children.running("timeit") == [me.pid]
        monkeypatch.setattr(psutil, "PROCFS_PATH", "/nowhere")
        assert children.running("timeit") == []
        monkeypatch.setattr(psutil._psplatform.os, "listdir", lambda path: [])
        assert children.running("timeit") == []
    finally:
        me.kill()
        me.wait()


def test_an_order_with_unknown_words_is_refused() -> None:
    with agent("-m", "edgeexit", "agent", "hello") as it:
        it.send({"quik": True})
        assert "quik" in it.until("error")["message"]
        assert it.ended() == 3


# ---------------------------------------------------------------- profile: what is refused


def order_for(folder: Path, **changes: Any) -> dict[str, Any]:
    bundle = small_bundle(folder, exits=2)
    return {
        "manifest": Manifest.from_folder(bundle.path).to_document(),
        "device": "host",
        "device_toml": None,
        "mode": "burst",
        "rate_hz": None,
        "threads": 1,
        "cores": [],
        "processes": 5,
        "precision": 0.5,
        "time_cap_s": 1.0,
        "meter": None,
        "resume": False,
        **changes,
    }


class Silent(Talk):
    """The other side of a conversation in which nothing may be asked for."""

    def __init__(self) -> None:
        pass

    def progress(self, **facts: Any) -> None:
        raise AssertionError(facts)

    def need(self, **facts: Any) -> Table:
        raise AssertionError(facts)


HOSTILE = {"format": 1, "files": [{"path": "../x", "size_bytes": 1, "sha256": "0" * 64}]}
MINE = 'format = 2\nname = "mine"\ntitle = "Mine"\nmodels = ["Fruit 7 *"]\n'


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"device": "rpi4"}, 5, "this machine is 'host', expected the Raspberry Pi 4"),
        ({"device": "mine", "device_toml": MINE}, 5, "expected the Mine"),
        ({"device": "mine", "device_toml": "x"}, 3, "not valid TOML"),
        ({"manifest": HOSTILE}, 3, "'../x' is not a plain path"),
        ({"mode": "fast"}, 2, "no mode named 'fast'"),
        ({"rate_hz": 5.0}, 2, "a rate belongs to 'paced'"),
        ({"processes": 2}, 2, "processes: expected 5"),
        ({"time_cap_s": 1e9}, 2, "time cap: expected"),
        ({"threads": "1"}, 3, "threads: expected int"),
        ({"resume": True}, 2, "no unfinished measurement with these options"),
        ({"seed": 1}, 3, "seed: unknown key"),
    ],
)
def test_an_order_that_cannot_be_carried_out_leaves_nothing_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], code: int, says: str
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("EDGEEXIT_HOME", str(home))
    with pytest.raises(EdgeExitError) as caught:
        profiling.profile(Table(order_for(tmp_path, **changes), "order"), Silent())
    assert says in str(caught.value)
    assert caught.value.exit_code == code
    assert not list(home.glob("results/*/"))


def test_what_decides_about_the_values_names_the_measurement(tmp_path: Path) -> None:
    def name(**changes: Any) -> str:
        order = order_for(tmp_path, **changes)
        return profiling._Order.from_table(Table(order, "order")).id

    known = name()
    # More time or another precision goes on with the same measurement, as it does here.
    assert name(processes=9, precision=0.1, time_cap_s=9.0, resume=True) == known
    others = [
        *(name(threads=2), name(cores=[0]), name(meter="pmic"), name(device="rpi4")),
        *(name(mode="sustained"), name(mode="paced", rate_hz=5.0), name(device_toml=MINE)),
    ]
    assert len({known, *others}) == 1 + len(others)
    (tmp_path / "small.edgeexit" / "policies").mkdir()
    (tmp_path / "small.edgeexit" / "policies" / "host.json").write_text("{}")
    order = order_for(tmp_path)
    order["manifest"] = Manifest.from_folder(tmp_path / "small.edgeexit").to_document()
    assert profiling._Order.from_table(Table(order, "order")).id == known


def test_a_home_that_takes_nothing_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setenv("EDGEEXIT_HOME", str(tmp_path / "home"))
    with pytest.raises(StorageError, match="cannot write: Not a directory"):
        profiling.profile(Table(order_for(tmp_path), "order"), Silent())


def test_a_dead_link_that_is_waited_for_locks_nobody_out(tmp_path: Path) -> None:
    order = order_for(tmp_path)
    home = {"EDGEEXIT_HOME": str(tmp_path / "home")}
    with (
        agent("-m", "edgeexit", "agent", "profile", **home) as dead,
        agent("-m", "edgeexit", "agent", "profile", **home) as living,
    ):
        dead.send(order)
        assert dead.until("need")["blobs"]
        living.send(order)
        assert living.until("need")["blobs"]

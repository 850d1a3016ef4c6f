"""What the service manager hears, and that it hears nothing from a process that stands still."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from test_runtime import make_bundle

from edgeexit.notify import Notifier

HERE = Path(__file__).parent


class Ear:
    """A service manager's socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.address = address.replace("\0", "@")

    def hear(self, within_s: float) -> list[str]:
        """All that is said within this time."""
        said, until_s = [], time.monotonic() + within_s
        while (left_s := until_s - time.monotonic()) > 0:
            self.socket.settimeout(left_s)
            try:
                said.append(self.socket.recv(4096).decode())
            except TimeoutError:
                break
        return said

    def wait_for(self, text: str, within_s: float = 30) -> list[str]:
        """All that is said until *text*."""
        said, until_s = [], time.monotonic() + within_s
        while not any(text in line for line in said):
            assert time.monotonic() < until_s, f"{text} never came, but {said}"
            said += self.hear(0.05)
        return said


@pytest.fixture
def ear(tmp_path: Path) -> Iterator[Ear]:
    made = Ear(str(tmp_path / "notify"))
    yield made
    made.socket.close()


def test_ready_alive_and_stopping_are_heard(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", ear.address)
    monkeypatch.setenv("WATCHDOG_USEC", "200000")
    notifier = Notifier()
    notifier.ready("tiny answers")
    for _ in range(1000):
        notifier.alive()
    notifier.stopping()

    # Four times in its period is often enough.
    assert ear.hear(0.1) == ["READY=1\nSTATUS=tiny answers", "WATCHDOG=1", "STOPPING=1"]
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & set(os.environ), "no child speaks for us"


def test_an_abstract_address_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ear = Ear(f"\0edgeexit-test-{os.getpid()}")
    monkeypatch.setenv("NOTIFY_SOCKET", ear.address)
    Notifier().ready("x")
    said = ear.hear(0.1)
    ear.socket.close()

    assert said == ["READY=1\nSTATUS=x"]


@pytest.mark.parametrize("address", ["", "/absent/socket", "@absent", "relative", "vsock:2:1"])
def test_nobody_listening_is_no_error(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    notifier = Notifier()
    notifier.ready("x")
    notifier.alive()


def test_a_watchdog_of_another_process_is_not_fed(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", ear.address)
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", "1")
    Notifier().alive()

    assert ear.hear(0.05) == []


def test_a_full_socket_does_not_stop_the_loop(ear: Ear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", ear.address)
    notifier = Notifier()
    began_s = time.monotonic()
    for _ in range(5000):
        notifier.status("x" * 1000)

    assert time.monotonic() - began_s < 5


# ---------------------------------------------------------------- the whole command

PERIOD_S = 0.3


class Running:
    """`edgeexit run` as a service manager starts it, in a folder with a bundle."""

    def __init__(self, ear: Ear, folder: Path, *arguments: str, before: str = "") -> None:
        make_bundle(folder)
        code = (
            f"import sys\nfrom edgeexit.cli import entry\n{before}\nsys.exit(entry(sys.argv[1:]))"
        )
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "NOTIFY_SOCKET": ear.address,
            "WATCHDOG_USEC": str(round(PERIOD_S * 1e6)),
        }
        self.errors = (folder / "errors").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, "run", "--json", *arguments],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            start_new_session=True,
        )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        # As systemd does with what a service leaves: a stopped child cannot see its parent go.
        left: list[psutil.Process] = []
        with suppress(psutil.Error):
            left = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        for child in left:
            with suppress(psutil.Error):
                child.kill()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.wait()
        self.errors.close()


def beats(said: list[str]) -> int:
    return sum("WATCHDOG=1" in line for line in said)


def test_a_stopped_process_feeds_no_watchdog(ear: Ear, tmp_path: Path) -> None:
    with Running(ear, tmp_path, "cameras:steady:50") as running:
        first = ear.wait_for("WATCHDOG=1")
        assert first[0].startswith("READY=1\nSTATUS=tiny answers cameras:steady:50")
        assert beats(ear.hear(4 * PERIOD_S)) >= 4, "a healthy loop feeds it"
        running.process.send_signal(signal.SIGSTOP)
        ear.hear(0.2)
        assert ear.hear(3 * PERIOD_S) == []
        running.process.send_signal(signal.SIGCONT)
        ear.wait_for("WATCHDOG=1")


# Each makes the runner stand still after its 30th answer, in another way.
STALLS = {
    "dead lock": "lock.acquire(); lock.acquire()",
    "endless model": "\n            while True: pass",
    "endless sleep": "time.sleep(1000)",
}


@pytest.mark.parametrize("stall", STALLS)
def test_a_loop_that_stands_still_feeds_no_watchdog(ear: Ear, tmp_path: Path, stall: str) -> None:
    before = f"""
import threading, time
from edgeexit.runtime import Runner
lock, original, count = threading.Lock(), Runner.__call__, [0]
def call(self, sample):
    count[0] += 1
    if count[0] > 30:
        {STALLS[stall]}
    return original(self, sample)
Runner.__call__ = call
"""
    with Running(ear, tmp_path, "cameras:steady:50", before=before):
        ear.wait_for("WATCHDOG=1")
        time.sleep(1.0)
        ear.hear(0.05)
        assert ear.hear(3 * PERIOD_S) == []


def test_a_camera_without_frames_feeds_no_watchdog(ear: Ear, tmp_path: Path) -> None:
    with Running(ear, tmp_path, f"cameras:hanging:{tmp_path}"):
        ear.wait_for("WATCHDOG=1")
        ear.hear(0.5)
        assert ear.hear(3 * PERIOD_S) == []


def test_a_source_that_proves_idle_feeds_the_watchdog(ear: Ear, tmp_path: Path) -> None:
    (tmp_path / "incoming").mkdir()
    with Running(ear, tmp_path, "watch:incoming"):
        ear.wait_for("WATCHDOG=1")
        assert beats(ear.hear(4 * PERIOD_S)) >= 3


def test_a_release_that_fails_its_self_test_is_never_ready(ear: Ear, tmp_path: Path) -> None:
    before = """
from edgeexit import selftest
from edgeexit.errors import SelfTestError
def refuse(*_): raise SelfTestError("logits differ")
selftest.run_selftest = refuse
"""
    with Running(ear, tmp_path, "cameras:steady:50", before=before) as running:
        assert running.process.wait(30) == 10
        assert ear.hear(0.1) == []


@pytest.mark.parametrize("times", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_the_terminating_signal_ends_the_run_whenever_it_comes(
    ear: Ear, tmp_path: Path, times: int
) -> None:
    for attempt in range(times):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        with Running(ear, folder, "cameras:steady:200", "--log", "log.jsonl") as running:
            ear.wait_for("READY=1")
            time.sleep(1.0 * attempt / times)
            running.process.terminate()
            began_s = time.monotonic()
            assert running.process.wait(5) == 143
            assert time.monotonic() - began_s < 5
            assert running.process.stdout is not None
            shown = running.process.stdout.read().splitlines()
        logged = (folder / "log.jsonl").read_bytes().splitlines()
        assert [json.loads(line) for line in logged] == [json.loads(line) for line in shown]
        # A single answer needs no summary.
        assert b"answered" in (folder / "errors").read_bytes() or len(shown) < 2
        ear.hear(0.05)

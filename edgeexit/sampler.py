"""
The process that reads a meter while other processes are measured, and the handle to it.

Callers see Sampler. `python -P -m edgeexit.sampler` is the process: it reads a plan (a line of
JSON) on stdin, opens the meter and writes lines of JSON: "meter" with what it is (again if it has
learnt more), every sample as a list, "pong" for each "ping" on stdin, "failed" with an error. It
keeps off the cores that are measured, ignores Ctrl-C (whoever started it decides) and ends when
stdin closes, so it never outlives its parent; a meter on another host is this process over there.
The parent reads the pipe only between windows, so that nothing wakes up in it inside one; what
does not fit into the pipe waits here.
"""

import bisect
import contextlib
import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

from edgeexit import errors
from edgeexit.children import command, environment
from edgeexit.errors import DeviceError, EdgeExitError, printable
from edgeexit.meters import MeterInfo, Sample

# Counted up when a line changes its meaning; both ends of a connection must agree.
PROTOCOL = 1
_NICE = 5
_PIPE_BYTES = 1 << 20
_MOST_LINE_BYTES = 1 << 20
_START_S = 60.0
_END_S = 3.0
_PATIENCE_S = 5.0
_PATIENCE_PERIODS = 10


class Sampler:
    """
    A meter read by a process of its own; a context manager that starts and stops it.

    *spec*, *root* and *device_name* say which meter, as meters.open_meter takes them (no device
    name: whatever this machine is). The process keeps off *cores* if there are others. Entering
    raises what opening the meter raises: UsageError or DeviceError.
    """

    info: MeterInfo

    def __init__(
        self,
        spec: str,
        root: Path | str = "/",
        device_name: str | None = None,
        cores: Sequence[int] = (),
    ) -> None:
        self._plan = {
            "protocol": PROTOCOL,
            "spec": spec,
            "root": str(root),
            "device": device_name,
            "cores": list(cores),
        }
        self._process: subprocess.Popen[bytes] | None = None
        self._complaints: IO[bytes] | None = None
        self._rest = b""
        self._at_ns: list[int] = []
        self._samples: list[Sample] = []
        self._failure: EdgeExitError | None = None
        self._ended = False
        self._cost_ms = self._began_cost_ms = 0.0
        self._began_ns = self._seen_ns = 0

    def __enter__(self) -> "Sampler":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> MeterInfo:
        """Start the process, wait until the meter is open, and say what it is."""
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command("-m", "edgeexit.sampler"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            bufsize=0,
            env=environment(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        # A bigger pipe is a convenience: without it more waits in the process.
        with contextlib.suppress(OSError):
            fcntl.fcntl(self._process.stdout.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        try:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps(self._plan).encode() + b"\n")
            self._open()
        except BaseException:
            self.stop()
            raise
        self._began_cost_ms, self._began_ns = self._own_cost_ms(), time.monotonic_ns()
        self._cost_ms = self._began_cost_ms
        return self.info

    def _open(self) -> None:
        deadline = time.monotonic() + _START_S
        while not hasattr(self, "info"):
            self._read(deadline - time.monotonic())
            if not hasattr(self, "info") and (self._ended or time.monotonic() > deadline):
                raise self._failure or DeviceError(
                    f"meter {self._plan['spec']}: did not open within {_START_S:g} s"
                )

    def samples_between(self, began_ns: int, ended_ns: int) -> list[Sample]:
        """
        The samples from just before *began_ns* to just after *ended_ns*, waiting for the last.

        What ended the meter is raised as it was raised there (DeviceError when the sensor
        vanished) if it ended before *ended_ns*, DeviceError if it fell silent.
        """
        patience_s = max(_PATIENCE_S, _PATIENCE_PERIODS / self.info.rate_hz)
        self._read(0)
        heard = len(self._samples), time.monotonic()
        while not self._samples or self._at_ns[-1] < ended_ns:
            if self._ended:
                raise self._failure or DeviceError("meter: it was stopped before the window ended")
            self._read(0.5)
            if len(self._samples) > heard[0]:
                heard = len(self._samples), time.monotonic()
            elif time.monotonic() > heard[1] + patience_s:
                raise DeviceError(
                    f"meter {self._plan['spec']}: no sample for {patience_s:.3g} s",
                    hint="is it still plugged in?",
                )
        first = bisect.bisect_left(self._at_ns, began_ns)
        last = bisect.bisect_right(self._at_ns, ended_ns)
        return self._samples[max(0, first - 1) : last + 1]

    @property
    def samples(self) -> tuple[Sample, ...]:
        """All samples so far."""
        self._read(0)
        return tuple(self._samples)

    @property
    def rate_hz(self) -> float | None:
        """Samples a second that really came; None before there are two."""
        if len(self._at_ns) < 2 or self._at_ns[-1] <= self._at_ns[0]:
            return None
        return (len(self._at_ns) - 1) * 1e9 / (self._at_ns[-1] - self._at_ns[0])

    @property
    def cpu_share(self) -> float | None:
        """
        What reading the meter took since it was opened, as a share of one core.

        Programs that the process runs are in it, as far as they live or have ended.
        """
        if self._process is not None and self._process.poll() is None:
            self._cost_ms = max(self._cost_ms, self._own_cost_ms())
            self._seen_ns = time.monotonic_ns()
        passed_ms = (self._seen_ns - self._began_ns) / 1e6
        return (self._cost_ms - self._began_cost_ms) / passed_ms if passed_ms > 0 else None

    def stop(self) -> None:
        """End the process and wait for it; may be called twice. What it said before is kept."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if not self._process.stdin.closed:
            if hasattr(self, "info"):
                _ = self.cpu_share
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            deadline = time.monotonic() + _END_S
            while not self._ended and time.monotonic() < deadline:
                self._read(deadline - time.monotonic())
            try:
                self._process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process.stdout.close()
            if self._complaints is not None:
                self._complaints.close()
            self._ended = True

    def _own_cost_ms(self) -> float:
        """CPU time of the process and those below it."""
        import psutil

        assert self._process is not None
        total_s = 0.0
        with contextlib.suppress(psutil.Error):
            mine = psutil.Process(self._process.pid)
            times = mine.cpu_times()
            total_s += times.children_user + times.children_system
            for process in [mine, *mine.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total_s += sum(process.cpu_times()[:2])
        return 1e3 * total_s

    def _read(self, wait_s: float) -> None:
        """Take in what the process has written, waiting for something for *wait_s*."""
        if self._process is None or self._ended:
            return
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, wait_s))
        while ready:
            data = self._process.stdout.read(1 << 16)
            if data is None:
                return
            if not data:
                self._end()
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(line)

    def _take(self, line: bytes) -> None:
        if self._failure is not None:
            return
        try:
            said = json.loads(line)
            if isinstance(said, list):
                sample = Sample.from_row(said)
                if self._at_ns and sample.at_ns <= self._at_ns[-1]:
                    raise DeviceError("meter: a sample is not after the one before it")  # noqa: TRY301
                self._at_ns.append(sample.at_ns)
                self._samples.append(sample)
                return
        except (ValueError, DeviceError) as error:
            self._failure = DeviceError(f"meter {self._plan['spec']}: {error}")
            self._end()
            return
        if "meter" in said:
            self.info = MeterInfo(**said["meter"])
        if "failed" in said:
            kind, message, hint = said["failed"]
            self._failure = getattr(errors, kind, DeviceError)(message, hint=hint)

    def _end(self) -> None:
        """Remember how it ended; a process that says nothing was killed, or died."""
        self._ended = True
        assert self._process is not None
        if self._failure is not None:
            return
        try:
            code = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return
        if code:
            how = f"signal {-code}" if code < 0 else f"code {code}"
            self._failure = DeviceError(
                f"meter {self._plan['spec']}: its process ended with {how}{self._last_words()}"
            )

    def _last_words(self) -> str:
        assert self._complaints is not None
        size = self._complaints.seek(0, os.SEEK_END)
        self._complaints.seek(max(0, size - 2000))
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return f": {printable(lines[-1])[:200]}" if lines else ""


class _Stop(BaseException):
    """Somebody asked this process to end."""


class _Lines:
    """Lines on stdout that never make this process wait: what does not fit is kept for later."""

    def __init__(self) -> None:
        os.set_blocking(1, False)
        self._waiting = bytearray()
        # The thread that answers pings writes, too.
        self._lock = threading.RLock()

    def waiting(self, said: dict[str, Any] | list[Any]) -> None:
        """Put a line at the end of what is to be written."""
        with self._lock:
            self._waiting += json.dumps(said).encode() + b"\n"

    def say(self, said: dict[str, Any] | list[Any]) -> None:
        """Write a line, now if the reader takes it."""
        self.waiting(said)
        self.flush()

    def flush(self) -> None:
        """Write what the reader takes now."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while self._waiting:
                del self._waiting[: os.write(1, self._waiting)]

    def finish(self) -> None:
        """Give the reader a while to take the rest."""
        deadline = time.monotonic() + _END_S
        while self._waiting and time.monotonic() < deadline:
            select.select([], [1], [], 0.1)
            self.flush()


def _listen(rest: bytes, lines: _Lines) -> None:
    """Answer pings until stdin closes, then end this process; runs in a thread of its own."""
    while True:
        *asked, rest = rest.split(b"\n")
        for line in asked:
            if line.startswith(b"ping "):
                now_ns = time.monotonic_ns()
                with contextlib.suppress(OSError):
                    lines.say({"pong": [line[5:40].decode(errors="replace"), now_ns]})
        data = b""
        with contextlib.suppress(OSError):
            data = os.read(0, 4096)
        if not data or len(rest) > _MOST_LINE_BYTES:
            break
        rest += data
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
    time.sleep(_END_S)
    # The meter does not let go: a device that hangs in the kernel's hands, say.
    os._exit(0)


def _stop(_number: int, _frame: FrameType | None) -> None:
    # Once: a second request must not interrupt closing the meter.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _Stop


def _keep_off(cores: Sequence[int]) -> None:
    """Stay behind the others, and on cores that are not measured if there are any."""
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    others = os.sched_getaffinity(0) - set(cores)
    if others:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, others)


def _sample(plan: dict[str, Any], lines: _Lines) -> None:
    """Write the meter's samples until it fails or this process is told to end."""
    from edgeexit.device import find_device, this_device
    from edgeexit.machine import Machine
    from edgeexit.meters import open_meter

    if plan["protocol"] != PROTOCOL:
        raise DeviceError(
            f"sampler: speaks version {PROTOCOL}, was asked for {plan['protocol']}",
            hint="install the same version of edgeexit on both hosts",
        )
    machine = Machine(plan["root"])
    device = find_device(plan["device"] or this_device(machine))
    meter = open_meter(plan["spec"], machine, device)
    try:
        info = meter.info
        lines.say({"meter": info.to_document(), "protocol": PROTOCOL})
        for sample in meter.samples():
            lines.say(sample.to_row())
            # One that learns more of itself on the way (how far a clock drifts) has a new one.
            if meter.info is not info and meter.info != info:
                info = meter.info
                lines.say({"meter": info.to_document()})
        raise DeviceError(f"meter {plan['spec']}: its samples came to an end")
    finally:
        meter.close()


def main() -> int:
    """Read the meter that the plan on stdin asks for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    lines = _Lines()
    try:
        _obey(lines)
    except _Stop:
        pass
    except EdgeExitError as error:
        lines.waiting({"failed": [type(error).__name__, str(error), error.hint]})
    except BrokenPipeError:
        # Nobody listens any more; stdin says so, too.
        return 0
    except Exception as error:
        # The one door to other people's meters: what they raise is not ours to know.
        text = f"meter: {type(error).__name__}: {error}"
        lines.waiting({"failed": ["DeviceError", text, "this is a fault of the meter's code"]})
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with contextlib.suppress(BrokenPipeError):
        lines.finish()
    return 0


def _obey(lines: _Lines) -> None:
    heard = b""
    while b"\n" not in heard:
        data = os.read(0, 4096)
        if not data or len(heard) > _MOST_LINE_BYTES:
            return
        heard += data
    first, _, rest = heard.partition(b"\n")
    plan: dict[str, Any] = json.loads(first)
    threading.Thread(target=_listen, args=(rest, lines), daemon=True).start()
    _keep_off(plan["cores"])
    _sample(plan, lines)


if __name__ == "__main__":
    sys.exit(main())

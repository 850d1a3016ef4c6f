"""
The process that takes frames from a source while another one computes, and the handle to it.

Callers see Capture, Taken, Bad and Over. `python -P -m edgeexit.capture` is the process: a line
of JSON on stdin says which source and how frames become samples; then each line is a request,
answered by a line of JSON and, for a frame, its sample's bytes. One thread takes frames as they
come and keeps the newest alone (of a source that is not live: waits); the other turns the one
that is asked for into a sample, so only small arrays cross. Cameras hang in ways that no thread
can end, which is why this is a process: it leads a group of its own (ffmpeg is in it), the
parent kills all of it, and it kills itself when its parent is gone.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeexit.children import command, environment
from edgeexit.errors import BadFile, DeviceError, EdgeExitError, UsageError, kind_of, printable
from edgeexit.files import Table, parse_json
from edgeexit.pictures import MAX_PIXELS
from edgeexit.preprocess import Preprocess, fit_sample, load_image
from edgeexit.sources import Frame, Frames, find, open_source

# Counted up when a line changes its meaning.
PROTOCOL = 1
_MOST_LINE_BYTES = 1 << 16
_MOST_SAMPLE_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 18
_END_S = 1.0


class NoFrame(DeviceError):
    """The source said nothing within its time: it hangs, or it is slower than that."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """
    A frame as a sample. *number* counts captured frames from 1, *at_ns* is when it came, by
    time.monotonic_ns().

    A live source has given the very same pixels since frame *same_since*, for *same_s* seconds;
    of others that is not looked at.
    """

    number: int
    name: str | None
    sample: NDArray[Any]
    at_ns: int
    same_since: int
    same_s: float


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A frame that is none: damaged, or of a shape that the network does not take."""

    number: int
    name: str | None
    error: EdgeExitError


@dataclass(frozen=True, kw_only=True)
class Over:
    """The source has ended, or was stopped, after *captured* frames."""

    captured: int


class Capture:
    """
    A source in a process of its own. Call next() for frames, then close().

    *spec* as sources.find takes it. DeviceError if it does not open within *open_s* seconds, and
    whatever opening it raises. *is_live* says whether older frames are dropped for newer ones.
    """

    def __init__(
        self, spec: str, preprocess: Preprocess, shape: tuple[int, ...], *, open_s: float
    ) -> None:
        self.spec, self.is_live = str(find(spec)), True
        self._buffer = bytearray()
        self._process = subprocess.Popen(
            command("-m", "edgeexit.capture"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("EDGEEXIT_DEBUG") == "1" else subprocess.DEVNULL,
            bufsize=0,
            env=environment(),
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._out = self._process.stdout.fileno()
        os.set_blocking(self._out, False)
        try:
            self._send({"protocol": PROTOCOL, "source": spec, **_fitting(preprocess, shape)})
            with self._named(f"did not open within {open_s:g} s"):
                opened = self._line(time.monotonic() + open_s)
            self._refuse(opened)
            self.is_live = opened.get("live", bool)
        except BaseException:
            self.kill()
            raise

    def next(self, within_s: float) -> Taken | Bad | Over | None:
        """
        The newest frame that was not given yet (or the next one), waiting for it.

        None if the source says that it is well and has nothing now. NoFrame if it says nothing
        within *within_s* seconds; whatever ended the source is raised as it was there.
        """
        self._send({"do": "next"})
        deadline = time.monotonic() + within_s
        with self._named(f"no frame for {within_s:g} s"):
            return self._answer(deadline)

    def refit(self, preprocess: Preprocess, shape: tuple[int, ...]) -> None:
        """Make samples for another network from the next frame on."""
        self._send({"do": "fit", **_fitting(preprocess, shape)})

    def _answer(self, deadline: float) -> Taken | Bad | Over | None:
        line = self._line(deadline)
        if "idle" in line:
            return None
        if "over" in line:
            return Over(captured=line.get("over", int))
        number, name = line.find("number", int, 0), line.find("name", str, "") or None
        if "bad" in line:
            error = _error(line.table("bad"))
            return Bad(number=number, name=name, error=error)
        self._refuse(line)
        dtype, shape = np.dtype(line.get("dtype", str)), tuple(line.list_of("shape", int))
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        if dtype.kind not in "uif" or min(shape, default=0) < 1 or size > _MOST_SAMPLE_BYTES:
            raise DeviceError(f"{self.spec}: a sample {dtype} {shape}")
        return Taken(
            number=number,
            name=name,
            sample=np.frombuffer(self._bytes(size, deadline), dtype).reshape(shape),
            at_ns=line.get("at_ns", int),
            same_since=line.get("same_since", int),
            same_s=line.get("same_s", float),
        )

    def _refuse(self, line: Table) -> None:
        if "error" in line:
            raise _error(line.table("error"))

    @contextlib.contextmanager
    def _named(self, what: str) -> Any:
        try:
            yield
        except TimeoutError as error:
            raise NoFrame(f"{self.spec}: {what}") from error

    def _line(self, deadline: float) -> Table:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MOST_LINE_BYTES:
                raise DeviceError(f"{self.spec}: the capture process speaks in riddles")
            self._more(deadline)
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            return parse_json(line, "frame")
        except BadFile as error:
            raise DeviceError(f"{self.spec}: capture process: {error}") from error

    def _bytes(self, count: int, deadline: float) -> bytes:
        while len(self._buffer) < count:
            self._more(deadline)
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _more(self, deadline: float) -> None:
        ready, _, _ = select.select([self._out], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        data = os.read(self._out, _CHUNK_BYTES)
        if not data:
            raise self._ended()
        self._buffer += data

    def _ended(self) -> DeviceError:
        code = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self._process.wait(_END_S)
        how = f" by {signal.Signals(-code).name}" if code is not None and code < 0 else ""
        return DeviceError(
            f"{self.spec}: the capture process ended{how}",
            hint="EDGEEXIT_DEBUG=1 shows what it prints",
        )

    def _send(self, request: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        # If nobody reads any more, the answer says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request).encode() + b"\n")

    def close(self) -> int | None:
        """End the source in good order, else by kill; how many frames it gave, if it says so."""
        captured = None
        self._send({"do": "stop"})
        with contextlib.suppress(EdgeExitError, TimeoutError):
            deadline = time.monotonic() + _END_S
            # An answer to an earlier request may come first.
            while not isinstance(said := self._answer(deadline), Over):
                pass
            captured = said.captured
        self.kill()
        return captured

    def kill(self) -> bool:
        """End the process and its kin at once. False if the kernel will not let it go."""
        process = self._process
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()
        # It leads its group, and is not reaped yet: the number is still its own.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return False
        return True


def _fitting(preprocess: Preprocess, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"preprocess": preprocess.to_document(), "shape": list(shape)}


def _error(told: Table) -> EdgeExitError:
    """A refusal arrives as what it was."""
    return kind_of(told.get("code", int))(
        told.get("message", str), hint=told.find("hint", str, "") or None
    )


# ---------------------------------------------------------------- the process


class _Slot:
    """What the two threads share: one frame, and how the source is."""

    def __init__(self, is_live: bool) -> None:
        self.is_live = is_live
        self.changed = threading.Condition()
        self.frame: Frame | None = None
        self.number = 0
        self.at_ns = 0
        self.same_since, self.same_s = 1, 0.0
        self.idle_times = 0
        self.is_over = False
        self.failure: BaseException | None = None

    def fill(self, items: Frames) -> None:
        """Take all frames of *items*; runs in a thread of its own."""
        last: Frame | None = None
        since_ns = 0
        try:
            for item in items:
                frame = item if isinstance(item, Frame) or item is None else Frame(item)
                is_same = self.is_live and frame is not None and _are_equal(last, frame)
                with self.changed:
                    if self.is_over:
                        break
                    if frame is None:
                        self.idle_times += 1
                        self.changed.notify_all()
                        continue
                    now_ns = time.monotonic_ns()
                    self.number += 1
                    if not is_same:
                        self.same_since, since_ns = self.number, now_ns
                    last = frame
                    self.frame, self.at_ns = frame, now_ns
                    self.same_s = (now_ns - since_ns) / 1e9
                    self.changed.notify_all()
                    while not self.is_live and self.frame is not None and not self.is_over:
                        self.changed.wait()
        except BaseException as error:
            # Anything may come out of a driver; it is told where the frame is asked for.
            self.failure = error
        finally:
            with contextlib.suppress(Exception):
                cast(Any, items).close()
            with self.changed:
                self.is_over = True
                self.changed.notify_all()


def _are_equal(a: Frame | None, b: Frame) -> bool:
    if a is None:
        return False
    if isinstance(a.data, np.ndarray) and isinstance(b.data, np.ndarray):
        return a.data is not b.data and np.array_equal(a.data, b.data)
    return type(a.data) is type(b.data) and a.data == b.data


class _Server:
    """Answers requests on stdin out of a slot."""

    def __init__(self, order: Table, out: IO[bytes]) -> None:
        self._out = out
        self._fit(order)
        self._spec = find(order.get("source", str))
        if self._spec is None:
            raise UsageError(f"{order.get('source', str)}: is no live source")
        items, is_live = open_source(self._spec)
        self._slot = _Slot(is_live)
        self._thread = threading.Thread(target=self._slot.fill, args=(items,), daemon=True)
        self._say({"live": is_live})
        self._thread.start()

    def _fit(self, order: Table) -> None:
        self._preprocess = Preprocess.from_table(order.table("preprocess"))
        self._shape = tuple(order.list_of("shape", int))

    def serve(self, requests: IO[bytes]) -> None:
        """Answer until stdin ends or "stop" comes."""
        while line := requests.readline(_MOST_LINE_BYTES):
            order = parse_json(line, "request")
            if order.get("do", str) == "fit":
                self._fit(order)
            elif order.get("do", str) == "next":
                self._next()
            else:
                self._stop()
                self._say({"over": self._slot.number})
                return
        self._stop()

    def _stop(self) -> None:
        with self._slot.changed:
            self._slot.is_over = True
            self._slot.changed.notify_all()
        self._thread.join(_END_S / 2)

    def _next(self) -> None:
        slot = self._slot
        with slot.changed:
            idle_times = slot.idle_times
            while slot.frame is None and not slot.is_over and slot.idle_times == idle_times:
                slot.changed.wait()
            frame, number = slot.frame, slot.number
            facts = {"at_ns": slot.at_ns, "same_since": slot.same_since, "same_s": slot.same_s}
            slot.frame = None
            slot.changed.notify_all()
        if frame is not None:
            told = {"number": number, "name": frame.name or ""}
            try:
                sample = self._sample(frame)
            except EdgeExitError as error:
                self._say({**told, "bad": _told(error)})
                return
            form = {"dtype": str(sample.dtype), "shape": list(sample.shape)}
            self._say({**told, **facts, **form}, sample)
        elif slot.failure is not None:
            raise slot.failure
        elif slot.is_over:
            self._say({"over": number})
        else:
            self._say({"idle": True})

    def _sample(self, frame: Frame) -> NDArray[Any]:
        data, preprocess = frame.data, self._preprocess
        if isinstance(data, bytes | Path):
            if preprocess.kind == "array":
                raise UsageError("frame: a picture, this bundle takes arrays")
            return load_image(data, preprocess)
        values = np.asarray(data)
        if values.size > 4 * MAX_PIXELS:
            raise BadFile(f"frame: shape {values.shape}, expected at most {MAX_PIXELS} pixels")
        is_rgb = values.ndim == 3 and values.shape[2] == 3 and not frame.is_sample
        if preprocess.kind == "image" and preprocess.color == "bgr" and is_rgb:
            values = values[..., ::-1]
        return np.ascontiguousarray(fit_sample(values, preprocess, self._shape))

    def _say(self, told: Mapping[str, Any], sample: NDArray[Any] | None = None) -> None:
        _write(self._out, told, sample)


def _write(out: IO[bytes], told: Mapping[str, Any], sample: NDArray[Any] | None = None) -> None:
    out.write(json.dumps(told).encode() + b"\n")
    if sample is not None:
        out.write(sample.tobytes())
    out.flush()


def _told(error: BaseException) -> dict[str, Any]:
    if isinstance(error, EdgeExitError):
        return {"message": str(error), "hint": error.hint or "", "code": error.exit_code}
    message = f"{type(error).__name__}: {printable(' '.join(str(error).split()))}"
    return {"message": message[:2000], "code": DeviceError.exit_code}


def main() -> None:
    """The process. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Whatever a driver prints must not get between the frames.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    name = "frame"
    try:
        order = parse_json(requests.readline(_MOST_LINE_BYTES), "order")
        name = str(find(order.get("source", str)))
        _Server(order, out).serve(requests)
    except BrokenPipeError:
        pass
    except BaseException as error:
        told = _told(error)
        if not isinstance(error, EdgeExitError):
            told["message"] = f"{printable(name)}: {told['message']}"
        with contextlib.suppress(OSError):
            _write(out, {"error": told})
    # A thread in a driver's hands cannot be ended, and ffmpeg may wait for ever.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()

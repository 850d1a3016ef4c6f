"""
Live input for `run`: a source that is kept running, whatever its camera does.

Callers see Live, Patience and Terminated with ending. Hidden here: when a source counts as hung,
as stuck (the same pixels for ever) or as lost, that it is then killed and opened anew with
growing waits, what of that is told and how often, and that every captured frame is counted as
answered, bad or dropped. Memory does not grow: one frame waits in the capture process, one here.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

from edgeexit.capture import Bad, Capture, Over, Taken
from edgeexit.errors import DeviceError
from edgeexit.inputs import Item
from edgeexit.preprocess import Preprocess
from edgeexit.sources import find


@dataclass(frozen=True, kw_only=True)
class Patience:
    """
    How long a live source may take, in seconds.

    open_s to open, frame_s from one good frame to the next. Then it is killed and, if it ever gave
    a frame, opened anew, *tries* times at most, after waits that double from first_wait_s to
    longest_wait_s. After still_s of the very same pixels it is opened anew once. One complaint
    in quiet_s is told.
    """

    open_s: float = 15.0
    frame_s: float = 5.0
    tries: int = 8
    first_wait_s: float = 0.2
    longest_wait_s: float = 2.0
    still_s: float = 10.0
    quiet_s: float = 10.0

    def wait_s(self, attempt: int) -> float:
        """How long to wait before the *attempt*-th opening anew, counted from 1."""
        return float(min(self.longest_wait_s, self.first_wait_s * 2 ** (attempt - 1)))

    @property
    def longest_s(self) -> float:
        """The longest time without a frame before Live gives up."""
        waits = (self.wait_s(attempt) for attempt in range(1, self.tries + 1))
        return self.frame_s + sum(waits) + self.tries * (self.open_s + self.frame_s)


class Live:
    """
    The samples of a source, one by one, as inputs.read_inputs gives them; None if there is none.

    "None" is said by the source itself: it is well, and has nothing now. Bad frames of a live
    source are told and counted; of another one they come as errors.

    *spec* is what sources.find takes, *tell* hears one line at a time of what goes wrong.
    *rate_hz* limits how many frames a second are asked for. Iterating opens the source; what
    cannot get better by itself is raised (UsageError, BadFile), and a DeviceError after
    patience.tries openings without a frame, at once if there never was one or if the source is
    not live. close() ends the capture process.
    """

    def __init__(
        self,
        spec: str,
        preprocess: Preprocess,
        shape: tuple[int, ...],
        *,
        tell: Callable[[str], object],
        rate_hz: float | None = None,
        patience: Patience | None = None,
        sleep_s: Callable[[float], object] = time.sleep,
    ) -> None:
        self._spec, self._preprocess, self._shape = spec, preprocess, shape
        self._name = str(find(spec))
        self._tell, self._sleep_s = tell, sleep_s
        self._period_s = 0.0 if rate_hz is None else 1 / rate_hz
        self._patience = Patience() if patience is None else patience
        self._capture: Capture | None = None
        self._held: list[Capture] = []
        self._last = self._before = 0
        self._due_s = self._good_s = self._told_s = 0.0
        self._attempts = self._unsaid = 0
        self._at_ns = 0
        self._is_still, self._is_live = False, True
        self.dropped = self.bad = self.reopened = 0

    def __iter__(self) -> Iterator[Item | None]:
        """Samples until the source ends."""
        while True:
            self._sleep_s(max(0.0, self._due_s - time.monotonic()))
            try:
                taken = self._ask()
            except DeviceError as error:
                self._anew(error)
                continue
            if taken is None:
                yield None
                continue
            if isinstance(taken, Over):
                self.dropped += taken.captured - self._last
                self._last = taken.captured
                return
            self._due_s = max(self._due_s + self._period_s, time.monotonic())
            self.dropped += taken.number - self._last - 1
            self._last = taken.number
            name = taken.name or f"{self._name}[{self._before + taken.number}]"
            if isinstance(taken, Taken):
                self._good(taken)
                yield name, taken.sample
            elif self._is_live:
                self._complain(f"{name}: {taken.error}")
                self.bad += 1
                if time.monotonic() > self._good_s + self._patience.frame_s:
                    self._anew(DeviceError(f"nothing but bad frames: {taken.error}"))
            else:
                yield name, taken.error

    def _ask(self) -> Taken | Bad | Over | None:
        patience = self._patience
        if self._capture is None:
            self._before, self._last = self._before + self._last, 0
            self._capture = Capture(
                self._spec, self._preprocess, self._shape, open_s=patience.open_s
            )
            self._is_live = self._capture.is_live
            self._good_s = time.monotonic()
        # A source that is opened has its pixels still to come: a camera adapts to the light.
        return self._capture.next(patience.frame_s if self._last else patience.open_s)

    def _good(self, taken: Taken) -> None:
        now_s = time.monotonic()
        if self._attempts:
            self._tell(f"{self._name}: frames again")
        self._attempts, self._good_s, self._at_ns = 0, now_s, taken.at_ns
        if taken.same_s > self._patience.still_s and not self._is_still:
            self._is_still = True
            self._end()
            self.reopened += 1
            self._tell(f"{self._name}: the very same pixels for {taken.same_s:.0f} s; opened anew")
        elif taken.same_since > 1 and self._is_still:
            self._is_still = False
            self._tell(f"{self._name}: the pixels change again")

    def _complain(self, text: str) -> None:
        now_s = time.monotonic()
        if self._told_s and now_s < self._told_s + self._patience.quiet_s:
            self._unsaid += 1
            return
        more = f" (and {self._unsaid} more like it)" if self._unsaid else ""
        self._tell(text + more)
        self._told_s, self._unsaid = now_s, 0

    def _anew(self, error: DeviceError) -> None:
        """Kill what is there and wait, so that the next question opens it; or give up."""
        can_come_back = self._is_live and self._at_ns > 0
        if self._capture is not None and not self._capture.kill():
            self._held.append(self._capture)
            self._tell(f"{self._name}: its driver holds the capture process, which lives on")
        self._capture = None
        self._attempts += 1
        patience = self._patience
        if not can_come_back:
            raise error
        if self._attempts > patience.tries:
            raise DeviceError(
                f"{error}; opened {patience.tries} times more, no frame came",
                hint=error.hint or "unplug it and plug it in again; a service restarts by itself",
            ) from error
        self.reopened += 1
        if self._attempts == 1:
            self._tell(f"{error}; opening it anew, {patience.tries} times at most")
        self._sleep_s(patience.wait_s(self._attempts))

    def refit(self, preprocess: Preprocess, shape: tuple[int, ...]) -> None:
        """Make samples for another network from the next frame on."""
        self._preprocess, self._shape = preprocess, shape
        if self._capture is not None:
            self._capture.refit(preprocess, shape)

    def _end(self) -> None:
        capture, self._capture = self._capture, None
        if capture is not None and (captured := capture.close()) is not None:
            self.dropped += captured - self._last
            self._last = captured

    def close(self) -> None:
        """End the capture process; frames that nobody asked for are counted as dropped."""
        self._end()

    @property
    def has_begun(self) -> bool:
        """Whether a frame has ever come."""
        return self._before + self._last > 0

    def facts(self) -> dict[str, Any]:
        """What an answer says of its frame: its age now, and how many were dropped so far."""
        return {"age_ms": (time.monotonic_ns() - self._at_ns) / 1e6, "dropped": self.dropped}

    def text(self) -> str:
        """What became of the frames that were not answered, as one line."""
        return (
            f"{self._name}: {self.dropped} dropped, {self.bad} bad, {self.reopened} times reopened"
        )


class Terminated(BaseException):
    """SIGTERM came: end now, in good order."""

    exit_code = 143


class Ending:
    """
    Turns SIGTERM into Terminated, but never in the middle of a frame. A second one kills.

    Use it around the loop, and frame() around each answer.
    """

    def __init__(self) -> None:
        self._is_busy = self._is_asked = False
        self._previous: Any = None

    def __enter__(self) -> "Ending":
        self._previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._is_asked = True
        if not self._is_busy:
            raise Terminated

    @contextlib.contextmanager
    def frame(self) -> Iterator[None]:
        """Within this block SIGTERM waits."""
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False
        if self._is_asked:
            raise Terminated

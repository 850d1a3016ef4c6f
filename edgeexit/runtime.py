"""
Run a bundle on this machine, stopping at the first exit that is sure enough.

Callers see Runner and Prediction. Hidden here: segments are opened when an input first gets as
far as them, the boundary bytes are copied straight from one segment's memory into the next
one's, and the arrays for that are found once, not per call.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.bundle import Bundle, Link
from edgeexit.device import this_device
from edgeexit.errors import Busy, DeviceError, UsageError
from edgeexit.interpreter import (
    Interpreter,
    check_edges,
    check_loads,
    open_interpreter,
    runtime_name,
    try_first,
)
from edgeexit.policy import Confidence, Policy
from edgeexit.preprocess import InputStage
from edgeexit.tflite import TensorSpec

__all__ = [
    "Prediction",
    "Runner",
    "Segment",
    "check_loads",
    "open_interpreter",
    "runtime_name",
]

AUTO = "auto"


class Prediction:
    """
    One answer. Read it, do not change it.

    label is an index into the bundle's class_names and class_name that name. confidence is in
    the unit of the policy's measure (max_prob: 0..1), exit the index (from 0) of the exit taken
    in the bundle's order, exit_name its name. latency_ns is the time from the call of the
    runner to the decision, preprocessing included. logits are the taken exit's, float32
    (classes,), made out of the stored integers when they are asked for.
    """

    __slots__ = (
        "_spec",
        "_stored",
        "class_name",
        "confidence",
        "exit",
        "exit_name",
        "label",
        "latency_ns",
    )

    def __init__(
        self,
        label: int,
        class_name: str,
        confidence: float,
        exit: int,
        exit_name: str,
        latency_ns: int,
        stored: bytes,
        spec: TensorSpec,
    ) -> None:
        self.label, self.class_name, self.confidence = label, class_name, confidence
        self.exit, self.exit_name, self.latency_ns = exit, exit_name, latency_ns
        self._stored, self._spec = stored, spec

    @property
    def logits(self) -> NDArray[np.float32]:
        """The real logits, float32 (classes,), of the exit that was taken."""
        return real_logits(np.frombuffer(self._stored, self._spec.dtype), self._spec)

    def __repr__(self) -> str:
        return (
            f"Prediction(label={self.label}, class_name={self.class_name!r}, "
            f"confidence={self.confidence:.6g}, exit={self.exit}, latency_ns={self.latency_ns})"
        )


def real_logits(stored: NDArray[Any], spec: TensorSpec) -> NDArray[np.float32]:
    """Stored logits, any shape, as float32 real numbers: scale * (q - zero_point)."""
    if spec.scale == 0:
        return stored.astype(np.float32)
    return (stored.astype(np.float32) - np.float32(spec.zero_point)) * np.float32(spec.scale)


class Segment:
    """
    One link of the chain: fetches its boundary bytes, runs, and holds its exit's logits.

    advance() does all of that; the first call opens the file. fetch() is its first part alone, for
    whoever times it. *values* maps the names of all
    tensors made so far to their bytes in memory, and grows by this segment's outputs. After
    advance, `logits` is a memoryview of the stored logits, typed as they are. *limits* hold, for
    each class, the confidence from which on an answer of that class is taken.
    """

    __slots__ = (
        "_copies",
        "_invoke",
        "_link",
        "_opened",
        "_threads",
        "_values",
        "advance",
        "index",
        "limits",
        "logits",
        "name",
        "read",
    )

    def __init__(
        self,
        link: Link,
        values: dict[str, memoryview],
        *,
        index: int,
        limits: tuple[float, ...],
        read: Callable[[memoryview], tuple[int, float]],
        threads: int,
    ) -> None:
        self._link, self._values, self._threads = link, values, threads
        self.name, self.index, self.limits, self.read = link.exit, index, limits, read
        self._opened: Interpreter | None = None
        self._copies: tuple[tuple[memoryview, memoryview], ...] = ()
        self._invoke: Callable[[], None] = _not_open
        self.logits = memoryview(b"")
        self.advance: Callable[[], None] = self._open_and_advance

    @property
    def is_open(self) -> bool:
        """Whether the file has been opened, which costs time and memory."""
        return self._opened is not None

    def open(self) -> None:
        """Open the file now. BadFile if its tensors are not those that the bundle lists."""
        if self._opened is not None:
            return
        link = self._link
        opened = open_interpreter(link.load(), self._threads, where=link.where)
        check_edges(opened, link.inputs, link.outputs, link.where)
        self._copies = tuple(
            (_bytes(opened.inputs[spec.name]), self._values[spec.name]) for spec in link.inputs
        )
        for spec in link.outputs:
            self._values[spec.name] = _bytes(opened.outputs[spec.name])
        self.logits = opened.outputs[link.outputs[0].name].reshape(-1).data
        self._opened, self._invoke = opened, opened.invoke
        self.advance = self._first_advance

    def fetch(self) -> None:
        """Copy the boundary bytes in, and nothing more."""
        for target, source in self._copies:
            target[:] = source

    def close(self) -> None:
        """Give the memory back; it cannot be used again."""
        self.logits, self._copies, self._invoke = memoryview(b""), (), _not_open
        for spec in self._link.outputs:
            self._values.pop(spec.name, None)
        self._opened = None
        self.advance = _not_open

    def _open_and_advance(self) -> None:
        self.open()
        self.advance()

    def _first_advance(self) -> None:
        self._advance()
        # The first invoke has checked that tensors stay where they are: from now on the bare one.
        assert self._opened is not None
        self._invoke = self._opened.invoke
        self.advance = self._advance

    def _advance(self) -> None:
        for target, source in self._copies:
            target[:] = source
        self._invoke()


def _not_open() -> None:
    raise DeviceError("segment is not open")


def _bytes(array: NDArray[Any]) -> memoryview:
    # Slice assignment between memoryviews of bytes is the cheapest copy there is in Python:
    # 12 KB take 0.2 us, against 0.6 us for numpy.copyto or ctypes.memmove.
    view: memoryview = array.reshape(-1).view(np.uint8).data
    return view


class Runner:
    """
    Classifies samples with a bundle, stopping as its policy says.

    *policy* is "auto" (the bundle's policy for the kind of board that this is, or that *device*
    names), None (the full network: every exit is computed, the final one answers), a Policy, or
    the path of a policy file. If "auto" finds none, the full network runs and *notice* says so.
    *threads* is what the runtime may use within each segment. Segments are opened when a sample
    first gets as far as them, with *preload* all at once.

    Thread rule: one Runner serves one thread at a time (Busy if two calls overlap); for more
    threads make more Runners. Use it as a context manager, or call close(), to give the memory
    back early.
    """

    def __init__(
        self,
        bundle: Bundle,
        policy: Policy | Path | str | None = AUTO,
        threads: int = 1,
        preload: bool = False,
        *,
        device: str | None = None,
    ) -> None:
        if not isinstance(bundle, Bundle):
            raise UsageError(
                f"Runner: expected a Bundle, found {type(bundle).__name__}",
                hint="Runner(edgeexit.load_bundle(path))",
            )
        self.bundle = bundle
        self.notice: str | None = None
        self.policy, self.policy_origin = self._choose_policy(policy, device)
        self.threads = threads
        if threads < 1:
            raise UsageError(f"threads: expected at least 1, found {threads}")
        self._class_names = bundle.class_names
        spec = bundle.input
        stage = InputStage(bundle.preprocess, spec.shape, spec.dtype, spec.scale, spec.zero_point)
        # One sample of zeros shows which array the input stage fills: it is always the same.
        dtype = np.uint8 if bundle.preprocess.kind == "image" else np.float32
        tensor = stage(np.zeros(stage.sample_shape, dtype))
        self._fill: Callable[[Any], NDArray[Any]] = stage
        self._segments = self._make_segments({spec.name: _bytes(tensor)})
        self._running = False
        self._all_exits: Runner | None = None
        if preload:
            self.preload()

    def _choose_policy(
        self, policy: Policy | Path | str | None, device: str | None
    ) -> tuple[Policy, str]:
        bundle = self.bundle
        if policy is None:
            return Policy.full(bundle), "none"
        if isinstance(policy, Policy):
            policy.check_bundle(bundle)
            return policy, "given"
        if policy == AUTO:
            device = this_device() if device is None else device
            found = bundle.policy_for(device)
            if found is not None:
                return found, str(bundle.policy_path(device))
            if len(bundle.exits) == 1:  # nothing to decide
                return Policy.full(bundle), "none"
            have = ", ".join(bundle.policy_devices()) or "none"
            self.notice = (
                f"{bundle.path}: no policy for device {device!r} (has: {have}): "
                "the full network runs, no early exit is taken"
            )
            return Policy.full(bundle), "none"
        found = Policy.load(policy)
        found.check_bundle(bundle, str(policy))
        return found, str(policy)

    def _make_segments(self, values: dict[str, memoryview]) -> list[Segment]:
        bundle, policy = self.bundle, self.policy
        segments, links = [], bundle.chain(policy.kept)
        try_first(links)
        for link in links:
            index = bundle.exits.index(link.exit)
            confidence = Confidence(policy.measure, bundle.logits[index])
            segments.append(
                Segment(
                    link,
                    values,
                    index=index,
                    limits=policy.limits(link.exit, len(bundle.class_names)),
                    read=confidence.read,
                    threads=self.threads,
                )
            )
        return segments

    def __call__(self, sample: Any) -> Prediction:
        """
        Classify one sample: an image uint8 (H, W, C) of any size, or a float array.

        UsageError if the sample does not fit, Busy if another call is under way, DeviceError
        if the runtime fails.
        """
        start = perf_counter_ns()
        if self._running:
            raise _overlap()
        self._running = True
        try:
            self._fill(sample)
            for segment in self._segments:
                segment.advance()
                label, confidence = segment.read(segment.logits)
                # NaN cannot come: read makes 0.0 of it. The last limits are -inf.
                if confidence >= segment.limits[label]:
                    break
            index = segment.index
            return Prediction(
                label,
                self._class_names[label],
                confidence,
                index,
                segment.name,
                perf_counter_ns() - start,
                bytes(segment.logits),
                self.bundle.logits[index],
            )
        except RuntimeError as error:
            raise _failed(self.bundle, error) from error
        finally:
            self._running = False

    def adopt(self, policy: Policy) -> None:
        """
        Decide by *policy* from the next call on; nothing is opened or closed.

        UsageError unless it computes the same exits with the same measure.
        """
        policy.check_bundle(self.bundle)
        if (policy.kept, policy.measure) != (self.policy.kept, self.policy.measure):
            raise UsageError(
                f"policy with {policy.measure} at {list(policy.kept)}, this Runner has "
                f"{self.policy.measure} at {list(self.policy.kept)}",
                hint="make a new Runner for it",
            )
        for segment in self._segments:
            segment.limits = policy.limits(segment.name, len(self._class_names))
        self.policy = policy

    def stream(self, samples: Iterable[Any]) -> Iterator[Prediction]:
        """Answers to *samples*, one by one as they come; all segments are opened first."""
        self.preload()
        for sample in samples:
            yield self(sample)

    def preload(self) -> None:
        """Open all segments now, so that no later call pays for it."""
        for segment in self._segments:
            segment.open()

    def logits(self, sample: Any) -> NDArray[np.float32]:
        """The real logits, float32 (exits, classes), of every exit: nothing is stopped."""
        stored = self.raw_logits(sample)
        pairs = zip(stored, self.bundle.logits, strict=True)
        return np.stack([real_logits(row, spec) for row, spec in pairs])

    def raw_logits(self, sample: Any) -> NDArray[Any]:
        """
        As logits, but stored integers (float32 in a float bundle).

        Where the policy dropped exits, a second chain with all of them answers.
        """
        if len(self._segments) < len(self.bundle.exits):
            if self._all_exits is None:
                self._all_exits = Runner(self.bundle, None, self.threads)
            return self._all_exits.raw_logits(sample)
        if self._running:
            raise _overlap()
        self._running = True
        try:
            self._fill(sample)
            rows = []
            for segment in self._segments:
                segment.advance()
                rows.append(np.array(segment.logits))
            return np.stack(rows)
        except RuntimeError as error:
            raise _failed(self.bundle, error) from error
        finally:
            self._running = False

    def input_tensor(self, sample: Any) -> NDArray[Any]:
        """A copy of the input tensor that *sample* makes, of the bundle's input spec."""
        return self._fill(sample).copy()

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The links of the chain, for whoever times them one by one; not to be closed."""
        return tuple(self._segments)

    @property
    def opened(self) -> list[str]:
        """The exits whose segments are open."""
        return [segment.name for segment in self._segments if segment.is_open]

    def close(self) -> None:
        """Give all memory back; later calls are refused (UsageError)."""
        for segment in self._segments:
            segment.close()
        self._segments = []
        self._fill = _closed
        if self._all_exits is not None:
            self._all_exits.close()

    def __enter__(self) -> "Runner":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _closed(sample: Any) -> NDArray[Any]:
    raise UsageError("this Runner is closed", hint="make a new one")


def _overlap() -> Busy:
    return Busy(
        "this Runner is answering another call: two threads must not share one",
        hint="make a Runner for each thread",
    )


def _failed(bundle: Bundle, error: RuntimeError) -> DeviceError:
    return DeviceError(f"{bundle.path}: {runtime_name()} failed: {' '.join(str(error).split())}")

"""
Cameras for tests, named `cameras:NAME:ADDRESS` as a foreign package's sources are.

Gray frames of 12 x 10, the size of the tests' bundle, so that a sample is the frame itself: its
first four pixels hold its number, counted from 1. ADDRESS is a folder in which a camera notes
how often it was opened.
"""

import io
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SHAPE = (12, 10, 1)


def numbered(number: int) -> np.ndarray:
    pixels = np.zeros(SHAPE, np.uint8)
    pixels[0, :4, 0] = np.frombuffer(number.to_bytes(4, "little"), np.uint8)
    return pixels


def number_of(sample: np.ndarray) -> int:
    return int.from_bytes(sample[0, :4, 0].tobytes(), "little")


def opened(folder: str) -> int:
    """How often a camera was opened, this time included."""
    path = Path(folder) / "opened"
    count = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(count))
    return count


def at(rate_hz: float, count: int | None = None) -> Iterator[np.ndarray]:
    for number in itertools.count(1) if count is None else range(1, count + 1):
        yield numbered(number)
        time.sleep(1 / rate_hz)


def steady(address: str) -> Iterator[np.ndarray]:
    """ADDRESS frames a second, for ever."""
    return at(float(address or 100))


def fast(address: str) -> Iterator[np.ndarray]:
    """ADDRESS frames as fast as they can be made."""
    for number in range(1, int(address) + 1):
        yield numbered(number)


def vanishing(address: str) -> Iterator[np.ndarray]:
    """Gone after 5 frames, each time; every second time it is not there at all."""
    if opened(address) % 2 == 0:
        raise OSError(19, "No such device")
    yield from at(100, 5)
    raise OSError(19, "No such device")


def gone(address: str) -> Iterator[np.ndarray]:
    """Gone for good after 5 frames."""
    if opened(address) > 1:
        raise OSError(19, "No such device")
    yield from at(100, 5)
    raise OSError(19, "No such device")


def hanging(address: str) -> Iterator[np.ndarray]:
    """Its whole process stops after 5 frames, the first two times."""
    count = opened(address)
    yield from at(100, 5)
    if count < 3:
        os.kill(os.getpid(), signal.SIGSTOP)
    yield from at(100)


def stuck(address: str) -> Iterator[np.ndarray]:
    """Gives one frame for ever; moves again when the file "moves" is there."""
    opened(address)
    while not (Path(address) / "moves").exists():
        yield numbered(1)
        time.sleep(0.01)
    yield from at(100)


def garbage(address: str) -> Iterator[object]:
    """Of ten frames nine are damaged, each in its way; ADDRESS rounds of them."""
    buffer = io.BytesIO()
    Image.fromarray(numbered(1)[..., 0]).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    for number in range(1, int(address) + 1):
        for frame in (
            b"",
            b"garbage" * 100,
            jpeg[: len(jpeg) // 2],
            np.zeros((0, 10, 3), np.uint8),
            np.zeros((12, 10, 7), np.uint8),
            np.zeros(5, np.uint8),
            np.zeros((12, 10), np.float64),
            "text",
            np.array([None]),
            numbered(number),
        ):
            yield frame
            time.sleep(0.002)


garbage.is_live = False


def rotten(address: str) -> Iterator[object]:
    """A good frame, then nothing but bad ones; once opened anew it is well."""
    count = opened(address)
    yield numbered(1)
    time.sleep(0.2)
    while count == 1:
        yield b"garbage"
        time.sleep(0.01)
    yield from at(100)


def chatty(address: str) -> Iterator[np.ndarray]:
    """Prints between its frames, to Python's stdout and to the file descriptor."""
    for number in range(1, 6):
        sys.stdout.write("hello\n")
        sys.stdout.flush()
        os.write(1, b'{"number": 1}\n')
        yield numbered(number)


chatty.is_live = False


def idle(address: str) -> Iterator[np.ndarray | None]:
    """Has nothing, and says so; one frame after every 5 times."""
    for number in itertools.count(1):
        for _ in range(5):
            yield None
            time.sleep(0.02)
        yield numbered(number)


idle.is_live = False


def crashing(address: str) -> Iterator[np.ndarray]:
    yield numbered(1)
    os.kill(os.getpid(), signal.SIGSEGV)


def slow_to_open(address: str) -> Iterator[np.ndarray]:
    time.sleep(60)
    return at(1)


def counted(address: str) -> Iterator[np.ndarray]:
    """A hundred frames a second; notes in ADDRESS that it was opened."""
    opened(address)
    return at(100)


def every(address: str) -> Iterator[np.ndarray]:
    """ADDRESS frames, each of which is waited for."""
    return fast(address)


every.is_live = False

"""
Where live frames come from: cameras, video files, a folder that fills, recordings.

Callers see Spec, find and open_source; SOURCES names the kinds. A source is a function from a
Spec to an iterator of frames: uint8 (H, W, 3) RGB arrays, encoded pictures as bytes, picture
files as Path, each perhaps with a name (Frame), or None for "I am well, and there is nothing
now". Whatever an iterator raises ends it. Hidden here: picamera2 is imported when a camera is
opened and nowhere else, and what v4l2 and video containers are, which is ffmpeg's business: it
hands over pixels as a stream of PPM pictures, each of which tells its own size.
"""

import collections
import math
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import BadFile, DeviceError, EdgeExitError, UsageError, printable
from edgeexit.files import parse_npy, read_bytes, read_npz
from edgeexit.labelled import pictures_in
from edgeexit.names import load_attribute, unknown
from edgeexit.pictures import MAX_PIXELS, SUFFIXES

VIDEO_SUFFIXES = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".ts", ".mpg", ".h264", ".mjpeg")
FOREIGN = "module"
POLL_S = 0.2
_HINT = "KIND[:ADDRESS][,key=value...], such as camera:0,size=640x480,fps=30"
_OPTION = re.compile(r",([A-Za-z_]+)=([^,]*)$")
_ATTRIBUTE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*(:.*)?", re.DOTALL)
_SIZE = re.compile(r"(\d{1,5})x(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Frame:
    """
    One frame and its name. *data* is an array, an encoded picture or the path of one.

    Arrays of three channels are RGB, unless *is_sample*: then they are as a calibration set
    holds them.
    """

    data: "NDArray[Any] | bytes | Path"
    name: str | None = None
    is_sample: bool = False


Frames = Iterator["Frame | NDArray[Any] | bytes | Path | None"]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """
    One kind of source. Of a live one the newest frame counts, and older ones are dropped; one
    that is not live waits until each frame was taken.

    *devices* are the device classes that a sandbox must let it use, *is_path* says that its
    address is a file or folder that must be readable there.
    """

    open: "Callable[[Spec], Frames]"
    is_live: bool
    options: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    is_path: bool = False


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A parsed spec: *kind* (a name in SOURCES, or FOREIGN), *address* and *options*."""

    kind: str
    address: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.address] * bool(self.address)
        parts += [f"{key}={value}" for key, value in self.options.items()]
        named = "" if self.kind == FOREIGN else f"{self.kind}:"
        return printable(named + ",".join(parts))

    def path(self, what: str) -> Path:
        """The address as a path. UsageError unless it is there."""
        if not self.address:
            raise UsageError(f"{self}: expected {what} after the colon", hint=_HINT)
        path = Path(self.address)
        if not path.exists():
            raise UsageError(f"{self}: no such file or folder")
        return path

    def number(self, key: str, low: float, high: float, default: float) -> float:
        """The option *key* as a number from *low* to *high*."""
        text = self.options.get(key)
        if text is None:
            return default
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise UsageError(
                f"{self}: {key}: expected a number from {low:g} to {high:g}, found {text!r}"
            )
        return value

    def size(self) -> tuple[int, int] | None:
        """The option "size", WIDTHxHEIGHT in pixels; None if it is not given."""
        text = self.options.get("size")
        if text is None:
            return None
        match = _SIZE.fullmatch(text)
        width, height = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 0 < width * height <= MAX_PIXELS:
            raise UsageError(f"{self}: size: expected WIDTHxHEIGHT, found {text!r}")
        return width, height


def find(name: str) -> Spec | None:
    """
    The source that *name* spells, or None if it is the name of a file, folder or pattern.

    `KIND[:ADDRESS][,key=value...]`, the path of a video, or `module:attribute[:ADDRESS]` for a
    source of another package. UsageError for a kind or option that does not exist.
    """
    kind, colon, rest = name.partition(":")
    if not colon:
        if name in SOURCES and not Path(name).exists():
            raise UsageError(f"{name}: no such file", hint=f"the source has a colon: {name}:")
        is_video = name.lower().endswith(VIDEO_SUFFIXES) and not Path(name).is_dir()
        return Spec(kind="video", address=name) if is_video else None
    if kind not in SOURCES:
        if _ATTRIBUTE.fullmatch(name) and not Path(name).exists():
            return Spec(kind=FOREIGN, address=name)
        if re.fullmatch("[a-z][a-z0-9]*", kind) and not Path(name).exists():
            raise unknown(kind, SOURCES, "input source")
        return None
    options: dict[str, str] = {}
    while match := _OPTION.search(rest if rest.startswith(",") else f",{rest}"):
        key, value = match.groups()
        if key not in SOURCES[kind].options:
            if not SOURCES[kind].options:
                break  # a comma is no mistake in a path
            raise unknown(key, SOURCES[kind].options, f"option of {kind}:")
        if key in options:
            raise UsageError(f"{name}: {key} stands twice")
        options[key] = value
        rest = rest[: max(0, len(rest) - len(match[0]))]
    return Spec(kind=kind, address=rest, options=dict(reversed(options.items())))


def open_source(spec: Spec) -> tuple[Frames, bool]:
    """
    The frames of *spec*, and whether they are live. Runs foreign code if *spec* names some.

    A foreign source is called with the text behind its second colon; its attribute is_live is
    taken as True if it has none. UsageError if there is no such thing.
    """
    if spec.kind != FOREIGN:
        kind = SOURCES[spec.kind]
        return kind.open(spec), kind.is_live
    module, attribute, address = (*spec.address.split(":", 2), "")[:3]
    factory = load_attribute(f"{module}:{attribute}", "input source")
    if not callable(factory):
        raise UsageError(f"{spec}: {type(factory).__name__}, expected something to call")
    return iter(factory(address)), bool(getattr(factory, "is_live", True))


# ---------------------------------------------------------------- the kinds


def _camera(spec: Spec) -> Frames:
    number = spec.address or "0"
    if not re.fullmatch(r"\d{1,2}", number):
        raise UsageError(f"{spec}: expected the camera's number, found {number!r}", hint=_HINT)
    # libcamera tells its life story on stderr.
    os.environ.setdefault("LIBCAMERA_LOG_LEVELS", "*:ERROR")
    try:
        from picamera2 import Picamera2
    except ImportError as error:
        raise UsageError(
            f"{spec}: picamera2 is not installed here",
            hint="sudo apt install python3-picamera2, then from the laptop: "
            "edgeexit setup NAME --camera (a USB camera: v4l2:/dev/video0)",
        ) from error
    camera = Picamera2(int(number))
    try:
        # picamera2 names formats backwards: what it calls BGR888 lies in memory as R, G, B.
        main = {"format": "BGR888", "size": spec.size() or (640, 480)}
        rate = spec.number("fps", 0.5, 1000, 0)
        controls = {"FrameRate": rate} if rate else {}
        camera.configure(camera.create_video_configuration(main=main, controls=controls))
        camera.start()
        while True:
            yield camera.capture_array("main")
    finally:
        camera.close()


def _v4l2(spec: Spec) -> Frames:
    device = spec.address or "/dev/video0"
    if not Path(device).exists():
        raise DeviceError(
            f"{spec}: no {device} here", hint="v4l2-ctl --list-devices shows what is plugged in"
        )
    arguments = ["-fflags", "nobuffer", "-f", "v4l2"]
    if "fps" in spec.options:
        arguments += ["-framerate", f"{spec.number('fps', 0.5, 1000, 0):g}"]
    if size := spec.size():
        arguments += ["-video_size", "{}x{}".format(*size)]
    if layout := spec.options.get("format"):
        arguments += ["-input_format", layout]
    yield from _ffmpeg(spec, [*arguments, "-i", device])
    raise DeviceError(f"{spec}: the camera went away")


def _video(spec: Spec) -> Frames:
    path = spec.path("the path of a video")
    if path.is_dir():
        raise UsageError(f"{spec}: is a folder, expected a video")
    # file: keeps a name like "concat:..." from being read as one of ffmpeg's protocols.
    for index, pixels in enumerate(_ffmpeg(spec, ["-i", f"file:{path}"], BadFile)):
        yield Frame(pixels, f"{path}[{index}]")


def _replay(spec: Spec) -> Frames:
    path = spec.path("a folder, an array file or a video")
    period_s = 1 / spec.number("fps", 0.5, 100_000, 10)
    due_s = time.monotonic()
    for _ in range(round(spec.number("times", 1, 1e9, 1))):
        for frame in _recorded(spec, path):
            time.sleep(max(0.0, due_s - time.monotonic()))
            due_s = max(due_s + period_s, time.monotonic())
            yield frame


def _recorded(spec: Spec, path: Path) -> Iterator[Frame]:
    if path.is_dir():
        found = pictures_in(path)
        if not found:
            raise UsageError(f"{spec}: no pictures in this folder")
        yield from (Frame(picture, str(picture)) for picture in found)
    elif path.suffix.lower() in SUFFIXES:
        yield Frame(path, str(path))
    elif path.suffix.lower() in (".npy", ".npz"):
        is_npz = path.suffix.lower() == ".npz"
        samples = (
            read_npz(path).get("samples", kinds="iuf")
            if is_npz
            else parse_npy(read_bytes(path), str(path))
        )
        if samples.ndim < 2 or samples.dtype.kind not in "iuf":
            raise BadFile(f"{path}: {samples.dtype} {samples.shape}, expected a batch of numbers")
        for index, sample in enumerate(samples):
            yield Frame(sample, f"{path}[{index}]", is_sample=True)
    else:
        yield from cast(Iterator[Frame], _video(replace(spec, options={})))


def _watch(spec: Spec) -> Frames:
    """
    Pictures that come into a folder from now on, in the order of their change, each once.

    A file counts when nothing about it changed from one look to the next. What is remembered of
    a file is forgotten when it leaves the folder.
    """
    folder = spec.path("a folder")
    if not folder.is_dir():
        raise UsageError(f"{spec}: is no folder")
    taken = _looked(spec, folder)
    before: dict[str, tuple[int, ...]] = {}
    while True:
        now = _looked(spec, folder)
        fresh = {name: mark for name, mark in now.items() if taken.get(name) != mark}
        # ctime_ns leads the mark.
        ready = sorted((mark, name) for name, mark in fresh.items() if before.get(name) == mark)
        for mark, name in ready:
            taken[name] = mark
            yield Frame(folder / name, str(folder / name))
        before = fresh
        for name in taken.keys() - now.keys():
            del taken[name]
        if not ready:
            yield None
        time.sleep(POLL_S)


def _looked(spec: Spec, folder: Path) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or not entry.name.lower().endswith(SUFFIXES):
                    continue
                with suppress(FileNotFoundError):
                    stat = entry.stat()
                    found[entry.name] = (stat.st_ctime_ns, stat.st_size, stat.st_ino)
    except OSError as error:
        raise DeviceError(f"{spec}: {error.strerror}") from error
    return found


SOURCES: dict[str, Kind] = {
    "camera": Kind(
        open=_camera,
        is_live=True,
        options=("size", "fps"),
        devices=("char-video4linux", "char-media", "char-dma_heap"),
    ),
    "v4l2": Kind(
        open=_v4l2,
        is_live=True,
        options=("size", "fps", "format"),
        devices=("char-video4linux",),
    ),
    "video": Kind(open=_video, is_live=False, is_path=True),
    "watch": Kind(open=_watch, is_live=False, is_path=True),
    "replay": Kind(open=_replay, is_live=True, options=("fps", "times"), is_path=True),
}


# ---------------------------------------------------------------- ffmpeg


def _ffmpeg(
    spec: Spec, arguments: list[str], failure: type[EdgeExitError] = DeviceError
) -> Iterator[NDArray[Any]]:
    """
    The pictures of what ffmpeg reads with the input *arguments*, none doubled or left out.

    *failure* is raised for what it cannot read, with its own last words.
    """
    program = shutil.which("ffmpeg")
    if program is None:
        raise UsageError(f"{spec}: needs ffmpeg", hint="sudo apt install ffmpeg")
    process = subprocess.Popen(
        [
            *(program, "-hide_banner", "-nostdin", "-loglevel", "error", "-threads", "1"),
            *(*arguments, "-an", "-sn", "-dn", *_each_frame_once(program)),
            *("-f", "image2pipe", "-c:v", "ppm", "pipe:1"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    # A broken camera may complain at every frame, for months.
    words: collections.deque[bytes] = collections.deque(maxlen=3)
    listener = threading.Thread(target=_listen, args=(process.stderr, words), daemon=True)
    listener.start()
    try:
        while (pixels := _ppm(process.stdout, spec, failure)) is not None:
            yield pixels
        if process.wait():
            listener.join(1)
            said = b" ".join(words).decode(errors="replace")
            raise failure(f"{spec}: ffmpeg: {printable(' '.join(said.split())) or 'no reason'}")
    finally:
        process.kill()
        process.wait()
        listener.join(1)
        process.stdout.close()
        process.stderr.close()


def _each_frame_once(program: str) -> list[str]:
    # The option has another name before 5.1, and the old name is on its way out.
    told = subprocess.run([program, "-version"], capture_output=True, text=True, check=False)
    old = re.match(r"ffmpeg version (?:[1-4]\.|5\.0)", told.stdout)
    return ["-vsync" if old else "-fps_mode", "passthrough"]


def _listen(stream: IO[bytes], words: "collections.deque[bytes]") -> None:
    while line := stream.readline(4096):
        words.append(line)


def _ppm(stream: IO[bytes], spec: Spec, failure: type[EdgeExitError]) -> NDArray[Any] | None:
    """The next P6 picture of *stream* as uint8 (H, W, 3); None at its end."""
    magic = stream.readline(8)
    if not magic:
        return None
    size, deepest = stream.readline(32).split(), stream.readline(8)
    if (
        magic != b"P6\n"
        or deepest != b"255\n"
        or len(size) != 2
        or not all(map(bytes.isdigit, size))
    ):
        raise failure(f"{spec}: expected a stream of PPM pictures, found {magic!r}")
    width, height = map(int, size)
    if not 0 < width * height <= MAX_PIXELS:
        raise failure(f"{spec}: frame of {width} x {height}, expected at most {MAX_PIXELS} pixels")
    pixels = np.empty((height, width, 3), np.uint8)
    rest = pixels.reshape(-1).data
    while rest:
        count = cast(Any, stream).readinto(rest)
        if not count:
            raise failure(f"{spec}: ended within a frame")
        rest = rest[count:]
    return pixels

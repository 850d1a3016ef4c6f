"""The capture process: every frame accounted for, and nothing of it left behind."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from cameras import SHAPE, number_of, numbered
from PIL import Image

from edgeexit.capture import Bad, Capture, NoFrame, Over, Taken
from edgeexit.errors import BadFile, DeviceError, EdgeExitError, UsageError
from edgeexit.preprocess import Preprocess, load_image
from edgeexit.sources import SOURCES, find, open_source

GRAY = Preprocess(kind="image", size=(12, 10), color="gray")
COLOUR = Preprocess(kind="image", size=(12, 10))
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _cameras_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE))


def capture(spec: str, preprocess: Preprocess = GRAY, open_s: float = 30) -> Capture:
    return Capture(spec, preprocess, preprocess.sample_shape, open_s=open_s)


def everything(source: Capture) -> Iterator[Taken | Bad | None]:
    try:
        while not isinstance(taken := source.next(20), Over):
            yield taken
        yield Taken(  # the end, as a frame of its number
            number=taken.captured, name="over", sample=np.empty(0), at_ns=0, same_since=0, same_s=0
        )
    finally:
        source.close()


def need_ffmpeg() -> str:
    program = shutil.which("ffmpeg")
    if program is None:
        pytest.skip("LOUDLY: ffmpeg is not installed, v4l2 and videos are not tested")
    return program


def test_of_a_source_that_is_too_fast_each_frame_is_given_or_skipped_and_none_doubled() -> None:
    source = capture("cameras:fast:3000")
    frames = []
    for taken in everything(source):
        assert isinstance(taken, Taken)
        frames.append(taken)
        time.sleep(0.001)
    *given, over = frames

    assert over.number == 3000
    assert 1 < len(given) < 3000
    assert [number_of(taken.sample) for taken in given] == [taken.number for taken in given]
    numbers = [taken.number for taken in given]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 3000, "the last frame is not lost"


def test_of_a_source_that_is_not_live_every_frame_is_given_and_bad_ones_are_named() -> None:
    found = list(everything(capture("cameras:garbage:3")))[:-1]

    good = [taken.number for taken in found if isinstance(taken, Taken)]
    bad = [taken for taken in found if isinstance(taken, Bad)]
    assert good == [10, 20, 30]
    assert len(bad) == 27
    assert {type(taken.error) for taken in bad} == {BadFile, UsageError}


def test_what_a_driver_prints_does_no_harm() -> None:
    found = list(everything(capture("cameras:chatty")))[:-1]

    assert [number_of(taken.sample) for taken in found if isinstance(taken, Taken)] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_idle_is_said_by_the_source_itself() -> None:
    source = capture("cameras:idle")
    found = [source.next(20) for _ in range(30)]
    source.close()

    assert None in found
    assert any(isinstance(taken, Taken) for taken in found)


def test_a_stopped_process_is_no_frame_and_kill_ends_it() -> None:
    source = capture("cameras:steady:50")
    assert isinstance(source.next(20), Taken)
    child = psutil.Process(source._process.pid)
    child.suspend()
    with pytest.raises(NoFrame, match=r"cameras:steady:50: no frame for 0\.3 s"):
        while True:
            source.next(0.3)

    assert source.kill()
    assert not child.is_running()


def test_close_tells_how_many_frames_there_were_in_all() -> None:
    source = capture("cameras:fast:500")
    first = source.next(20)
    assert isinstance(first, Taken)
    time.sleep(0.5)

    assert source.close() == 500
    assert source._process.returncode is not None


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        ("cameras:crashing", DeviceError, "ended by SIGSEGV"),
        ("cameras:gone:{}", DeviceError, "cameras:gone:.*: OSError: .* No such device"),
        ("absent.mp4", UsageError, "absent.mp4: no such file"),
    ],
)
def test_what_ends_a_source_arrives_as_what_it_was(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spec: str,
    kind: type[EdgeExitError],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgeExitError, match=said) as caught:
        list(everything(capture(spec.format(tmp_path))))

    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("cameras:absent", "no attribute of cameras named 'absent'"),
        ("no_such_module:camera", "cannot import no_such_module"),
        ("camera:7", "picamera2 is not installed here"),
        ("camera:left", "expected the camera's number"),
        ("v4l2:/dev/video77", "no /dev/video77"),
        ("watch:absent", "no such file or folder"),
        ("replay:", "expected a folder"),
        ("replay:.,fps=0", "fps: expected a number from"),
    ],
)
def test_a_source_that_cannot_be_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    found = find(spec)
    assert found is not None
    with pytest.raises(EdgeExitError, match=said):
        next(open_source(found)[0])


def test_a_source_that_does_not_open_is_given_up_and_killed() -> None:
    with pytest.raises(NoFrame, match=r"did not open within 0\.01 s"):
        capture("cameras:steady", open_s=0.01)


def test_nothing_survives_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from test_capture import capture\n"
        "source = capture('cameras:steady')\n"
        "source.next(20)\n"
        "print(source._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()

    psutil.wait_procs([child], timeout=5)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("color", ["rgb", "bgr", "gray"])
def test_a_camera_s_pixels_become_the_sample_that_a_picture_of_them_becomes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, color: str
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "pixels.py").write_text(
        "import numpy as np\n"
        "from PIL import Image\n"
        "def source(address):\n"
        "    yield np.asarray(Image.open(address))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    preprocess = Preprocess(kind="image", size=(12, 10), color=color)

    source = capture(f"pixels:source:{tmp_path / 'a.png'}", preprocess)
    taken = source.next(20)
    source.close()

    assert isinstance(taken, Taken)
    assert np.array_equal(taken.sample, load_image(tmp_path / "a.png", preprocess))


def test_refit_makes_samples_for_another_network() -> None:
    source = capture("cameras:steady:50")
    assert isinstance(first := source.next(20), Taken)
    source.refit(COLOUR, COLOUR.sample_shape)
    assert isinstance(second := source.next(20), Taken)
    source.close()

    assert (first.sample.shape, second.sample.shape) == (SHAPE, (12, 10, 3))


def test_a_folder_s_new_pictures_are_given_once_each_and_none_half_written(tmp_path: Path) -> None:
    Image.fromarray(numbered(1)[..., 0]).save(tmp_path / "old.png")
    source = capture(f"watch:{tmp_path}")
    assert source.next(20) is None
    Image.fromarray(numbered(2)[..., 0]).save(tmp_path / "new.png")
    data = (tmp_path / "new.png").read_bytes()
    found = []
    with (tmp_path / "slow.png").open("wb") as file:
        for byte in range(len(data)):
            file.write(data[byte : byte + 1])
            file.flush()
            if byte % 10 == 0:
                found.append(source.next(20))
    (tmp_path / ".hidden.png").write_bytes(data)
    (tmp_path / "notes.txt").write_text("no picture")
    shutil.copy(tmp_path / "new.png", tmp_path / "overwritten.png")
    found += [source.next(20) for _ in range(6)]
    shutil.copy(tmp_path / "old.png", tmp_path / "overwritten.png")
    found += [source.next(20) for _ in range(6)]
    source.close()

    # A file that stands still half-written is bad, and given once it is whole.
    names = [Path(taken.name or "").name for taken in found if isinstance(taken, Taken)]
    assert sorted(names) == ["new.png", "overwritten.png", "overwritten.png", "slow.png"]


def test_replay_plays_at_its_rate_and_as_often_as_it_is_told(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.stack([numbered(k) for k in (1, 2, 3)]))
    began_s = time.monotonic()
    source = capture(f"replay:{tmp_path / 'a.npy'},fps=20,times=2")
    found = list(everything(source))

    assert [number_of(taken.sample) for taken in found[:-1]] == [1, 2, 3, 1, 2, 3]  # type: ignore[union-attr]
    assert time.monotonic() - began_s > 5 / 20


# ---------------------------------------------------------------- spelling


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("camera:", "camera:"),
        ("camera:1,size=640x480,fps=30", "camera:1,size=640x480,fps=30"),
        ("camera:size=640x480", "camera:size=640x480"),
        ("v4l2:/dev/video2,format=mjpeg", "v4l2:/dev/video2,format=mjpeg"),
        ("watch:a,b=c", "watch:a,b=c"),
        ("clip.MP4", "video:clip.MP4"),
        ("package.module:Source:/dev/x,y=z", "package.module:Source:/dev/x,y=z"),
        ("image.png", "None"),
        ("-", "None"),
        ("photos/*.png", "None"),
    ],
)
def test_spelling(name: str, shown: str) -> None:
    found = find(name)
    assert str(found) == shown
    assert found is None or find(shown) == found


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("camera", "camera: no such file"),
        ("kamera:", "no input source named 'kamera'"),
        ("camera:0,sise=1x1", "no option of camera: named 'sise'"),
        ("camera:fps=1,fps=2", "fps stands twice"),
        ("http://host/a.png", "no input source named 'http'"),
    ],
)
def test_a_wrong_word_is_refused(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        find(name)


def test_a_file_of_such_a_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:name").write_text("")

    assert find("odd:name") is None


def test_only_cameras_ask_for_devices() -> None:
    assert {name for name, kind in SOURCES.items() if kind.devices} == {"camera", "v4l2"}


# ---------------------------------------------------------------- ffmpeg and picamera2


def make_video(path: Path, *arguments: str) -> Path:
    command = [need_ffmpeg(), "-hide_banner", "-loglevel", "error", "-y", *arguments, str(path)]
    subprocess.run(command, check=True)
    return path


def test_every_frame_of_a_video_is_answered_once_whatever_its_clock(tmp_path: Path) -> None:
    source = "testsrc=size=64x48:rate=25:duration=2"
    even = make_video(tmp_path / "even.mp4", "-f", "lavfi", "-i", source)
    # Of 50 frames every third stays, with its own time: a variable rate.
    sparse = make_video(
        *(tmp_path / "sparse.mkv", "-f", "lavfi", "-i", source),
        *("-vf", "select=not(mod(n\\,3))", "-fps_mode", "passthrough"),
    )

    assert [len(list(everything(capture(str(path))))) - 1 for path in (even, sparse)] == [50, 17]


def test_a_video_cut_short_gives_its_frames_and_garbage_is_a_bad_file(tmp_path: Path) -> None:
    whole = make_video(
        tmp_path / "a.ts", "-f", "lavfi", "-i", "testsrc=size=64x48:rate=25:duration=2"
    )
    (tmp_path / "cut.ts").write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    (tmp_path / "bad.mp4").write_bytes(b"\0garbage" * 1000)

    cut = [taken for taken in everything(capture(str(tmp_path / "cut.ts")))]
    assert 1 < len(cut) < 50
    with pytest.raises(BadFile, match=r"video:.*bad\.mp4: ffmpeg: "):
        list(everything(capture(str(tmp_path / "bad.mp4"))))


def test_ffmpeg_dies_with_its_capture_process(tmp_path: Path) -> None:
    path = make_video(
        tmp_path / "a.mkv", "-f", "lavfi", "-i", "testsrc=size=640x480:rate=25:duration=4"
    )
    source = capture(str(path))
    assert isinstance(source.next(20), Taken)
    kin = psutil.Process(source._process.pid).children(recursive=True)
    assert [child.name() for child in kin] == ["ffmpeg"]

    source.kill()
    _, alive = psutil.wait_procs(kin, timeout=5)
    assert not [child for child in alive if child.status() != psutil.STATUS_ZOMBIE]


FAKE_FFMPEG = """#!/bin/sh
if [ "$1" = -version ]; then echo "ffmpeg version {version} Copyright"; exit; fi
echo "$@" >> "{folder}/arguments"
printf 'P6\\n2 1\\n255\\nabcdef'
printf 'P6\\n2 1\\n255\\nghijkl'
{end}
"""


@pytest.mark.parametrize(
    ("version", "option"), [("4.3.6", "-vsync"), ("5.1.9-0", "-fps_mode"), ("N-1", "-fps_mode")]
)
def test_v4l2_asks_ffmpeg_for_each_frame_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, option: str
) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, version, "exit 0")
    source = capture("v4l2:/dev/null,size=640x480,fps=30,format=mjpeg", COLOUR)
    with pytest.raises(DeviceError, match="the camera went away"):
        list(everything(source))

    said = (tmp_path / "arguments").read_text()
    assert "-f v4l2 -framerate 30 -video_size 640x480 -input_format mjpeg -i /dev/null" in said
    assert f"{option} passthrough -f image2pipe -c:v ppm pipe:1" in said


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("printf 'P6\\n2 1\\n255\\nabc'; exit 0", "ended within a frame"),
        ("printf 'P7\\n'; exit 0", "expected a stream of PPM pictures"),
        ("printf 'P6\\n99999 99999\\n255\\n'; exit 0", "frame of 99999 x 99999"),
        ("echo 'device is busy' >&2; exit 1", "ffmpeg: device is busy"),
    ],
)
def test_a_broken_stream_of_a_camera_is_a_device_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, said: str
) -> None:
    fake_ffmpeg(tmp_path, monkeypatch, "7.1", end)
    with pytest.raises(DeviceError, match=said):
        list(everything(capture("v4l2:/dev/null", COLOUR)))


def fake_ffmpeg(folder: Path, monkeypatch: pytest.MonkeyPatch, version: str, end: str) -> None:
    program = folder / "ffmpeg"
    program.write_text(FAKE_FFMPEG.format(version=version, folder=folder, end=end))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_without_ffmpeg_the_hint_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match="needs ffmpeg") as caught:
        list(everything(capture("v4l2:/dev/null")))

    assert caught.value.hint == "sudo apt install ffmpeg"


PICAMERA2 = """
import numpy as np, os
class Picamera2:
    def __init__(self, number): self.number, self.log = number, open(os.environ["CAMERA_LOG"], "w")
    def create_video_configuration(self, **wanted): return wanted
    def configure(self, wanted): print(wanted, file=self.log, flush=True)
    def start(self): self.row = 0
    def capture_array(self, stream):
        self.row += 1
        # As the real one: "BGR888" is R, G, B in memory.
        return np.full((48, 64, 3), (200, 100, self.row), np.uint8)
    def close(self): print("closed", file=self.log, flush=True)
"""


def test_the_boards_own_camera_is_opened_and_closed_by_picamera2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "picamera2.py").write_text(PICAMERA2)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CAMERA_LOG", str(tmp_path / "log"))
    source = capture("camera:1,size=64x48,fps=15", COLOUR)
    taken = source.next(20)
    source.close()

    assert isinstance(taken, Taken)
    assert tuple(taken.sample[0, 0, :2]) == (200, 100)
    assert (tmp_path / "log").read_text().splitlines() == [
        "{'main': {'format': 'BGR888', 'size': (64, 48)}, 'controls': {'FrameRate': 15.0}}",
        "closed",
    ]
    assert "picamera2" not in sys.modules


def test_signals_of_the_terminal_do_not_reach_the_camera() -> None:
    source = capture("cameras:steady:50")
    assert isinstance(source.next(20), Taken)
    assert os.getpgid(source._process.pid) != os.getpgid(0)
    os.kill(source._process.pid, signal.SIGINT)
    for _ in range(3):
        assert isinstance(source.next(20), Taken)
    source.close()

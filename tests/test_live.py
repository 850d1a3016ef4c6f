"""Live input: whatever a camera does, frames come back, each is accounted for, nothing grows."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import psutil
import pytest
from cameras import number_of
from test_capture import GRAY
from test_capture import _cameras_are_importable as _cameras_are_importable
from test_runtime import make_bundle

from edgeexit.errors import DeviceError, EdgeExitError
from edgeexit.inputs import Item
from edgeexit.live import Ending, Live, Patience, Terminated

QUICK = Patience(
    open_s=30, frame_s=1.5, tries=4, first_wait_s=0.02, longest_wait_s=0.1, still_s=0.3, quiet_s=60
)


def frames(live: Live, wanted: Callable[[int], bool]) -> list[Item]:
    """Items until *wanted* (of how many came) says no; then the source is closed."""
    found: list[Item] = []
    try:
        for item in live:
            if item is not None:
                found.append(item)
            if not wanted(len(found)):
                break
    finally:
        live.close()
    return found


def make(spec: str, said: list[str], patience: Patience = QUICK, **options: object) -> Live:
    return Live(spec, GRAY, GRAY.sample_shape, tell=said.append, patience=patience, **options)  # type: ignore[arg-type]


def numbers(items: list[Item]) -> list[int]:
    return [number_of(sample) for _, sample in items if not isinstance(sample, EdgeExitError)]


def openings(given: list[int]) -> list[list[int]]:
    """Frames' numbers, cut where a camera begins to count anew."""
    found: list[list[int]] = []
    for number in given:
        if not found or number <= found[-1][-1]:
            found.append([])
        found[-1].append(number)
    return found


@pytest.mark.parametrize("rounds", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_a_camera_that_goes_away_and_comes_back_is_opened_anew(tmp_path: Path, rounds: int) -> None:
    said: list[str] = []
    live = make(f"cameras:vanishing:{tmp_path}", said)
    found = frames(live, lambda count: live.reopened < 2 * rounds)

    # It is there every second time, and gives five frames then; the last one always arrives.
    given = openings(numbers(found))
    assert [one[-1] for one in given[:rounds]] == [5] * rounds
    assert sum(map(len, given[:rounds])) + live.dropped >= 5 * rounds
    assert int((tmp_path / "opened").read_text()) >= 2 * rounds
    assert said[0].endswith("No such device; opening it anew, 4 times at most")
    assert said[1] == f"cameras:vanishing:{tmp_path}: frames again"
    assert len(said) == 2 * rounds, "each outage is told once, and its end"


def test_a_camera_that_hangs_is_killed_and_opened_anew(tmp_path: Path) -> None:
    said: list[str] = []
    began_s = time.monotonic()
    live = make(f"cameras:hanging:{tmp_path}", said)
    found = frames(live, lambda count: live.reopened < 2 or count < 15)

    assert len(openings(numbers(found))) == 3
    assert live.reopened == 2
    assert time.monotonic() - began_s < 60
    assert not [p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE]


def test_a_camera_that_stays_away_ends_in_an_error_that_a_supervisor_can_act_on(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    live = make(f"cameras:gone:{tmp_path}", said)
    with pytest.raises(DeviceError, match="opened 4 times more, no frame came") as caught:
        frames(live, lambda count: True)

    assert (tmp_path / "opened").read_text() == "5"
    assert caught.value.hint
    assert len(said) == 1


def test_a_camera_that_never_was_there_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "opened").write_text("1")
    live = make(f"cameras:gone:{tmp_path}", [])
    with pytest.raises(DeviceError, match=r"No such device$"):
        frames(live, lambda count: True)

    assert (tmp_path / "opened").read_text() == "2"


def test_the_same_pixels_for_ever_are_told_and_opened_anew_once(tmp_path: Path) -> None:
    said: list[str] = []
    live = make(f"cameras:stuck:{tmp_path}", said)
    seen_s = time.monotonic()

    def wanted(count: int) -> bool:
        nonlocal seen_s
        if live.reopened == 1 and time.monotonic() - seen_s > 2.5:
            (tmp_path / "moves").touch()
        return len(said) < 2

    found = frames(live, wanted)

    assert said[0].endswith("the very same pixels for 0 s; opened anew")
    assert said[1].endswith("the pixels change again")
    assert (tmp_path / "opened").read_text() == "2"
    assert len(found) > 5, "what it gives is answered all the same"


def test_a_camera_that_gives_only_garbage_is_opened_anew(tmp_path: Path) -> None:
    said: list[str] = []
    live = make(f"cameras:rotten:{tmp_path}", said)
    found = frames(live, lambda count: count < 3)

    assert numbers(found)[0] == 1
    assert (live.reopened, live.bad > 10) == (1, True)
    assert "not a picture" in said[0]
    assert "nothing but bad frames" in said[1]
    assert len(said) == 3, "of the bad frames one is told"


def test_every_frame_is_answered_or_dropped_across_all_rates(tmp_path: Path) -> None:
    live = make("cameras:fast:20000", [])
    found = frames(live, lambda count: True)

    assert numbers(found)[-1] == 20000
    assert len(found) + live.dropped == 20000
    assert live.dropped > 0
    dropped = [b - a - 1 for a, b in zip([0, *numbers(found)], numbers(found), strict=False)]
    assert sum(dropped) == live.dropped


def test_frames_that_nobody_asked_for_are_dropped_at_the_end() -> None:
    live = make("cameras:fast:500", [])
    [(name, sample)] = list(islice(live, 1))
    time.sleep(0.5)
    live.close()

    assert not isinstance(sample, EdgeExitError)
    assert name == f"cameras:fast:500[{number_of(sample)}]"
    assert live.dropped == 499


def test_rate_limits_how_often_a_frame_is_asked_for() -> None:
    live = make("cameras:steady:200", [], rate_hz=20)
    began_s = time.monotonic()
    found = frames(live, lambda count: count < 1 or time.monotonic() < began_s + 2)

    assert 1 < len(found) <= 42
    assert live.dropped > len(found)


def test_memory_does_not_grow(tmp_path: Path) -> None:
    live = make("cameras:steady:20000", [])
    me, seen = psutil.Process(), []

    def wanted(count: int) -> bool:
        if count in (500, 2500):
            kin = me.children()
            seen.append([process.memory_info().rss for process in (me, *kin)])
        return count < 2500

    frames(live, wanted)
    (mine, childs), (mine_later, childs_later) = seen
    assert mine_later - mine < 2 << 20
    assert childs_later - childs < 2 << 20


@pytest.mark.parametrize("count", [1500, pytest.param(300_000, marks=pytest.mark.slow)])
def test_the_whole_command_does_not_grow_either(tmp_path: Path, count: int) -> None:
    make_bundle(tmp_path)
    source = f"cameras:every:{count}"
    log = tmp_path / "answers"
    with log.open("wb") as answers:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeexit", "run", source, "--json"],
            cwd=tmp_path,
            stdout=answers,
            stderr=subprocess.DEVNULL,
        )
    seen: list[list[int]] = []
    try:
        for share in (0.2, 0.8):
            while log.read_bytes().count(b"\n") < share * count:
                assert process.poll() is None
                time.sleep(0.02)
            kin = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
            seen.append([one.memory_info().rss for one in kin] + [kin[0].num_fds()])
        assert process.wait(600) == 0
    finally:
        process.kill()
        process.wait()

    (mine, childs, files), (mine_later, childs_later, files_later) = seen
    assert mine_later - mine < 1 << 20
    assert childs_later - childs < 1 << 20
    assert files_later == files
    assert log.read_bytes().count(b"\n") == count


def test_a_driver_that_will_not_let_go_does_not_stop_the_next_opening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uninterruptible sleep cannot be had in a test: here the signal does not arrive."""
    said: list[str] = []
    stopped: list[int] = []
    original = os.killpg

    def deaf(group: int, number: int) -> None:
        stopped.append(group)
        if len(stopped) > 1:
            original(group, number)

    monkeypatch.setattr(os, "killpg", deaf)
    live = make(f"cameras:hanging:{tmp_path}", said)
    try:
        found = frames(live, lambda count: live.reopened < 1 or count < 10)
    finally:
        assert live._held[0].kill()

    assert len(openings(numbers(found))) >= 2
    assert any("its driver holds the capture process" in line for line in said)


def test_the_terminating_signal_waits_for_the_frame() -> None:
    before = signal.getsignal(signal.SIGTERM)
    done = []
    with pytest.raises(Terminated), Ending() as ending, ending.frame():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        done.append(1)

    assert done == [1]
    with pytest.raises(Terminated), Ending():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_capture_that_crashes_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="SIGSEGV"):
        frames(make("cameras:crashing", [], Patience(tries=0)), lambda count: True)

    assert not psutil.Process().children()

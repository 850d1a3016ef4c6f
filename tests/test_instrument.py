"""Measuring for real: fresh processes, a notebook that survives, refusals in one line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest
from small import EXITS, small_bundle

from edgeexit import instrument
from edgeexit.blocks import Block, Mode
from edgeexit.bundle import load_bundle
from edgeexit.collect import Limits, Progress
from edgeexit.errors import BadFile, DeviceError, StorageError, UsageError
from edgeexit.machine import Machine
from edgeexit.profile import Profile

FAST = Limits(processes=5, precision=0.5, time_cap_s=1.0, block_ms=0.2)


def test_a_real_profile_of_a_tiny_bundle(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    seen: list[Progress] = []

    found = instrument.measure(bundle, limits=FAST, on_step=seen.append)

    assert len(found.processes) >= 5
    assert len({process.seed for process in found.processes}) == len(found.processes)
    # Every exit of every set that could pay is answered by some path.
    assert found.kept_sets()[0] == EXITS
    assert all(found.costs_ns(kept) for kept in found.kept_sets())
    for process in found.processes:
        counts = [len(process.values(k)) for k in range(len(found.cases))]
        assert min(counts) == max(counts) >= 4
        assert process.dissection is not None
        assert len(process.warmup_ns) == len(found.cases)
        # A pair of rounds goes there and back again.
        order = [block.case for block in process.blocks]
        size = len(found.cases)
        assert order[:size] == order[size : 2 * size][::-1]
    assert found.bundle_digest == bundle.digest
    assert found.delegate == "XNNPACK"
    assert found.machine["python"]
    assert found.before.at_ns < found.processes[0].began_ns < found.after.at_ns
    assert [step.done for step in seen] == sorted(step.done for step in seen)
    assert seen[-1].exits is not None
    found.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json").to_document() == found.to_document()


def test_a_path_that_is_the_same_files_is_timed_once(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    found = instrument.measure(bundle, limits=FAST)
    first = found.case(EXITS, "exit0")
    assert first is not None
    assert found.case(("exit0", "exit2"), "exit0") == first
    assert found.case(("exit1", "exit2"), "exit2") != found.case(EXITS, "exit2")


def test_paced_calls_sleep_in_between_and_price_the_full_set(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    found = instrument.measure(bundle, mode=Mode(name="paced", rate_hz=500.0), limits=FAST)
    assert {kept for case in found.cases for kept, _ in case.stands_for} == {EXITS, EXITS[-1:]}
    assert str(found.mode) == "paced at 500 Hz"
    process = found.processes[0]
    block = process.blocks[0]
    assert block.calls == len(block.calls_ns) == 3
    later = process.blocks[1]
    assert later.at_ns - block.at_ns >= 3 * 2_000_000
    assert block.mean_ns < 2_000_000


def test_the_timing_processes_are_pinned_and_threads_are_told(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    core = min(os.sched_getaffinity(0))
    found = instrument.measure(bundle, limits=FAST, cores=(core,), threads=2)
    assert (found.cores, found.threads) == ((core,), 2)
    with pytest.raises(UsageError, match="cores: 4000 cannot be used here"):
        instrument.measure(bundle, limits=FAST, cores=(4000,))


@pytest.mark.parametrize(
    "wrong",
    [
        {"processes": 4},
        {"processes": 1000},
        {"precision": 0.0},
        {"precision": float("nan")},
        {"time_cap_s": float("inf")},
        {"time_cap_s": 0.0},
        {"block_ms": -1.0},
    ],
)
def test_senseless_limits_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        Limits(**wrong)


def test_a_bundle_that_vanishes_is_refused_in_the_timing_process(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    for path in bundle.path.glob("segment-1.tflite"):
        path.write_bytes(b"altered")
    with pytest.raises(BadFile, match="altered"):
        instrument.measure(bundle, limits=FAST)


def test_another_board_cannot_be_measured_here(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="this machine is 'host'"):
        instrument.check_device("rpi4", Machine(tmp_path))
    with pytest.raises(UsageError):
        instrument.check_device("rpi44")


def test_a_board_of_ones_own_is_measured_where_its_model_text_stands(tmp_path: Path) -> None:
    described = tmp_path / "mine.toml"
    described.write_text(
        'format = 2\nname = "mine"\ntitle = "Mine"\nmodels = ["Fruit 7 *"]\n', encoding="utf-8"
    )
    firmware = tmp_path / "proc" / "device-tree" / "model"
    firmware.parent.mkdir(parents=True)
    firmware.write_text("Fruit 7 Rev 1\0", encoding="utf-8")
    assert instrument.check_device(str(described), Machine(tmp_path)) == "mine"
    firmware.write_text("Fruit 8 Rev 1\0", encoding="utf-8")
    with pytest.raises(DeviceError, match="this machine is 'host'"):
        instrument.check_device(str(described), Machine(tmp_path))


def test_a_bundle_that_is_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)

    def replace(_: Progress) -> None:
        shutil.rmtree(bundle.path)
        small_bundle(tmp_path, exits=2)

    with pytest.raises(BadFile, match=r"small\.edgeexit: was changed while it was measured"):
        instrument.measure(bundle, limits=FAST, on_step=replace)


def test_a_timing_process_that_was_killed_says_by_what(tmp_path: Path) -> None:
    pids: list[int] = []

    class Killed(instrument.Child):
        def round(self, order: Sequence[int]) -> list[Block]:
            os.kill(self.pid, signal.SIGKILL)
            pids.append(self.pid)
            return super().round(order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instrument, "Child", Killed)
        with pytest.raises(DeviceError, match=r"ended with signal 9$") as caught:
            instrument.measure(small_bundle(tmp_path), limits=FAST)
    assert "memory" in (caught.value.hint or "")
    assert len(pids) == 1


SCRIPT = """
import sys
from pathlib import Path
from edgeexit import instrument
from edgeexit.bundle import load_bundle
from edgeexit.collect import Limits
limits = Limits(processes=30, precision=0.001, time_cap_s=60, block_ms=2)
instrument.measure(load_bundle(sys.argv[1]), limits=limits, notebook=Path(sys.argv[2]))
"""


def interrupted(bundle: Path, notebook: Path, how: signal.Signals, processes: int = 2) -> list[int]:
    """Start a measurement, stop it by *how* when some processes are finished; its children."""
    command = [sys.executable, "-c", SCRIPT, str(bundle), str(notebook)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        text = notebook.read_text() if notebook.exists() else ""
        if text.count('"ended_ns"') >= processes and text.endswith("}\n"):
            break
        time.sleep(0.02)
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(child.pid)], capture_output=True, text=True, check=False
    )
    # Python drops an interrupt that falls into a destructor: whoever types Ctrl-C types it again.
    for _ in range(10):
        child.send_signal(how)
        with suppress(subprocess.TimeoutExpired):
            child.wait(2)
            break
    assert child.returncode is not None
    if child.stderr is not None:
        child.stderr.close()
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_measurement_goes_on_where_it_was(tmp_path: Path, how: signal.Signals) -> None:
    bundle, book = small_bundle(tmp_path), tmp_path / "p.json.part"
    children = interrupted(bundle.path, book, how)
    lines = [json.loads(line) for line in book.read_text().splitlines() if line.endswith("}")]
    before = [line["seed"] for line in lines if "seed" in line]
    assert len(before) >= 2
    saved: list[Profile] = []

    limits = Limits(processes=len(before) + 3, precision=0.5, time_cap_s=1.0, block_ms=2)
    found = instrument.measure(
        load_bundle(bundle.path), limits=limits, notebook=book, resume=True, save=saved.append
    )

    assert saved == [found]
    assert not book.exists()
    finished = sum("ended_ns" in line for line in lines)
    assert [p.seed for p in found.processes][:finished] == before[:finished]
    assert found.processes[0].blocks[0].at_ns == lines[3]["round"][0][1]
    assert len({process.seed for process in found.processes}) == len(found.processes)
    # Nobody goes on burning the board.
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/stat").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_profile_that_cannot_be_saved_leaves_its_notebook(tmp_path: Path) -> None:
    bundle, book = small_bundle(tmp_path), tmp_path / "p.json.part"

    def full(_: Profile) -> None:
        raise StorageError("p.json: cannot write: No space left on device")

    with pytest.raises(StorageError):
        instrument.measure(bundle, limits=FAST, notebook=book, save=full)
    began = time.monotonic()
    found = instrument.measure(bundle, limits=FAST, notebook=book, resume=True)
    assert len(found.processes) >= 5
    assert time.monotonic() - began < 30


def test_a_step_of_the_wall_clock_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small_bundle(tmp_path)
    times = iter([2e9, 0.0, 4e9] * 1000)
    monkeypatch.setattr(time, "time", lambda: next(times))
    found = instrument.measure(bundle, limits=FAST)
    assert all(
        later.at_ns > earlier.at_ns
        for process in found.processes
        for earlier, later in zip(process.blocks, process.blocks[1:], strict=False)
    )

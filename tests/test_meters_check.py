"""The test with a known load: what it takes for plausible, and that no busy core stays behind."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.cli import entry
from edgeexit.device import find_device
from edgeexit.errors import DeviceError
from edgeexit.machine import ENVIRONMENT
from edgeexit.meters import MeterInfo, Sample
from edgeexit.meters.check import LoadTest, busy_cores, load_test, machine_busy_s
from tests.trees import tree

RPI4 = find_device("rpi4")
HOST = find_device("host")


class Board:
    """A board with a meter: watts follow the load, time jumps from sample to sample."""

    def __init__(
        self,
        *,
        idle_mw: float = 1600.0,
        step_mw: float = 2600.0,
        noise_mw: float = 5.0,
        rate_hz: float = 50.0,
        label: str = "external",
        is_counter: bool = False,
        drop: Callable[[int], bool] = lambda k: False,
        drift_mw: float = 0.0,
        dies_at: int = 10**9,
        pace: float = 1.0,
    ) -> None:
        self.info = MeterInfo(
            kind="toy", label=label, instrument="a toy", boundary="the board", rate_hz=rate_hz
        )
        self.idle_mw, self.step_mw, self.noise_mw = idle_mw, step_mw, noise_mw
        self.is_counter, self.drop, self.drift_mw = is_counter, drop, drift_mw
        self.dies_at, self.pace = dies_at, pace
        self.is_busy, self.loads = False, 0
        self.busy_s = self.other_load = 0.0

    @contextmanager
    def load(self, most_s: float) -> Iterator[None]:
        self.is_busy, self.loads = True, self.loads + 1
        try:
            yield
        finally:
            self.is_busy = False

    def samples(self) -> Iterator[Sample]:
        period_s, total_mj = self.pace / self.info.rate_hz, 0.0
        for k in range(10**6):
            if k == self.dies_at:
                raise DeviceError("toy/power1_input: No such device")
            power_mw = self.idle_mw + self.drift_mw * k * period_s
            power_mw += self.step_mw * self.is_busy + self.noise_mw * ((7 * k) % 5 - 2)
            total_mj += power_mw * period_s
            self.busy_s += self.other_load * period_s * (os.cpu_count() or 1)
            at_ns = 10**9 + round(k * period_s * 1e9)
            if self.drop(k):
                continue
            if self.is_counter:
                yield Sample(at_ns=at_ns, energy_mj=total_mj)
            else:
                yield Sample(at_ns=at_ns, power_mw=power_mw)

    def close(self) -> None: ...

    def tested(self, seconds: float = 6.0, device: str = "rpi4") -> LoadTest:
        return load_test(
            self,
            find_device(device),
            seconds=seconds,
            load=self.load,
            busy_s=lambda: self.busy_s,
        )


def kinds(test: LoadTest) -> list[str]:
    return [finding.kind for finding in test.findings]


@pytest.mark.parametrize("is_counter", [False, True])
def test_a_sound_meter_is_plausible_and_its_step_is_the_loads(is_counter: bool) -> None:
    board = Board(is_counter=is_counter)

    test = board.tested()

    assert test.is_plausible
    assert not test.findings
    assert board.loads == 1
    assert test.step_mw == pytest.approx(2600, abs=5)
    assert test.power_mw["idle"] == pytest.approx(1600, abs=5)
    assert test.rate_hz == pytest.approx(50)
    assert test.jitter_ms == pytest.approx(0, abs=1e-6)
    assert test.missing == 0


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_shunt_that_is_ten_times_wrong_shows(factor: float) -> None:
    test = Board(idle_mw=1600 * factor, step_mw=2600 * factor, noise_mw=0.5).tested()

    assert not test.is_plausible
    assert set(kinds(test)) == {"watts"}
    assert "is the shunt right?" in test.findings[0].text
    assert "1.6 W idle" in test.findings[0].text


@given(st.floats(0.5, 2.0), st.floats(0.4, 1.5))
def test_other_boards_of_the_kind_and_other_loads_are_plausible(idle: float, step: float) -> None:
    published_mw = 1e3 * ((RPI4.busy_w or 0) - (RPI4.idle_w or 0))

    assert Board(idle_mw=1600 * idle, step_mw=published_mw * step).tested(3).is_plausible


@pytest.mark.parametrize("step_mw", [0.0, -400.0, 3.0])
def test_a_meter_that_does_not_follow_the_load_is_implausible(step_mw: float) -> None:
    test = Board(step_mw=step_mw).tested()

    assert not test.is_plausible
    assert "no step" in kinds(test)


def test_rails_may_take_less_than_the_board_but_not_more() -> None:
    assert Board(idle_mw=200, step_mw=300, label="partial").tested().is_plausible
    assert not Board(idle_mw=9000, step_mw=300, label="partial").tested().is_plausible
    assert not Board(idle_mw=900, step_mw=30000, label="partial").tested().is_plausible


def test_a_model_is_not_held_against_the_numbers_it_is_made_of() -> None:
    assert Board(idle_mw=9000, step_mw=9000, label="modelled").tested().is_plausible


def test_of_an_unknown_board_only_the_absurd_is_refused() -> None:
    assert Board(idle_mw=60000, step_mw=40000).tested(device="host").is_plausible
    assert not Board(idle_mw=2, step_mw=40, noise_mw=0).tested(device="host").is_plausible


def test_gaps_and_a_slow_pace_are_said() -> None:
    gappy = Board(drop=lambda k: k % 4 == 3).tested()
    slow = Board(pace=1.5).tested()

    assert gappy.missing == pytest.approx(0.25, abs=0.02)
    assert kinds(gappy) == ["slow", "gaps"]
    assert kinds(slow) == ["slow"]
    assert gappy.is_plausible
    assert slow.is_plausible


def test_a_drifting_idle_is_said() -> None:
    test = Board(drift_mw=50).tested()

    assert kinds(test) == ["drift"]
    assert test.step_mw == pytest.approx(2600, abs=10)


@pytest.mark.parametrize(("other_load", "said"), [(0.1, []), (0.5, ["load"])])
def test_a_machine_that_was_not_idle_is_said(other_load: float, said: list[str]) -> None:
    board = Board()
    board.other_load = other_load

    test = board.tested()

    assert kinds(test) == said
    assert test.other_load == pytest.approx(other_load, rel=0.05)


def test_this_machines_busy_time_goes_on() -> None:
    before_s = machine_busy_s()
    with busy_cores(0.1):
        time.sleep(0.1)

    assert machine_busy_s() >= before_s > 0


def test_a_meters_own_warning_is_repeated() -> None:
    board = Board()
    board.info = MeterInfo(
        kind="toy",
        label="external",
        instrument="",
        boundary="",
        rate_hz=50,
        details={"warning": "the driver believes in 0.01 Ohm"},
    )

    assert [finding.text for finding in board.tested().findings] == [
        "the driver believes in 0.01 Ohm"
    ]


@given(st.floats(0.3, 4.0))
def test_a_meter_too_slow_for_the_test_says_how_long_would_do(rate_hz: float) -> None:
    try:
        Board(rate_hz=rate_hz).tested(3.0)
    except DeviceError as error:
        needed_s = float(str(error.hint).rpartition(" ")[2])
        Board(rate_hz=rate_hz).tested(needed_s)


@pytest.mark.parametrize("dies_at", [0, 5, 150, 250])
def test_a_sensor_that_vanishes_ends_the_load_as_well(dies_at: int) -> None:
    board = Board(dies_at=dies_at)

    with pytest.raises(DeviceError, match="toy/power1_input"):
        board.tested()
    assert not board.is_busy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_sample_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(DeviceError, match="expected a number"):
        Board(idle_mw=value).tested()


def test_samples_that_go_back_in_time_are_refused() -> None:
    with pytest.raises(DeviceError, match="not after the one before"):
        Board(pace=1e-9).tested()


def test_a_test_is_kept_with_its_raw_readings() -> None:
    document = json.loads(json.dumps(Board().tested(3).to_document(), allow_nan=False))

    assert document["verdict"] == "plausible"
    assert document["meter"]["kind"] == "toy"
    assert document["samples"][1][0] == pytest.approx(20)
    assert len(document["samples"]) == pytest.approx(150, abs=5)


# ---------------------------------------------------------------- busy cores


def test_every_core_is_busy_until_the_block_ends_however_it_ends() -> None:
    before = set(psutil.Process().children())

    with pytest.raises(ZeroDivisionError), busy_cores(30):
        children = set(psutil.Process().children()) - before
        assert len(children) == len(os.sched_getaffinity(0))
        raise ZeroDivisionError

    assert not [child for child in children if child.is_running()]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_no_busy_core_outlives_the_test(sign: signal.Signals) -> None:
    code = (
        "import time\n"
        "from edgeexit.meters.check import busy_cores\n"
        "with busy_cores(60):\n"
        "    print('busy', flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert parent.stdout
    assert parent.stdout.readline() == b"busy\n"
    children = psutil.Process(parent.pid).children()
    assert children

    parent.send_signal(sign)
    parent.wait()
    parent.stdout.close()

    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_a_busy_core_is_over_in_time_by_itself() -> None:
    began_s = time.monotonic()
    before = set(psutil.Process().children())
    with busy_cores(0.05):
        children = set(psutil.Process().children()) - before
        _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert time.monotonic() > began_s


# ---------------------------------------------------------------- the command


def recorded(folder: Path, *, step_w: float) -> Path:
    path = folder / "power.csv"
    rows = [f"{k / 50:.2f},{2.8 + (step_w if 0.3 <= k / 50 < 0.72 else 0):.3f}" for k in range(500)]
    path.write_text("\n".join(["at_s,power_w", *rows, ""]))
    return path


def test_the_meters_of_a_board_are_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path, "rpi5")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))

    assert entry(["meters"]) == 0
    text = capsys.readouterr().out
    assert entry(["meters", "list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)

    assert "pmic                            partial, 10 Hz:" in text
    assert document["device"] == "rpi5"
    assert [(one["spec"], one["is_usable"]) for one in document["meters"]] == [
        ("pmic", True),
        ("modelled", True),
    ]
    assert document["meters"][0]["info"]["label"] == "partial"


def test_what_is_missing_is_said_with_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = "sys/class/hwmon/hwmon7"
    files = {f"{place}/name": "ina219", f"{place}/shunt_resistor": "10000"}
    tree(tmp_path, "rpi-zero2w", files=files)
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))

    assert entry(["meters", "list"]) == 0
    out, err = capsys.readouterr()

    assert "ina219,shunt=OHM" in out
    assert "nothing here measures this machine's power as it stands" in err


def test_what_a_donated_tree_calls_its_rails_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    label = "sys/class/hwmon/hwmon1/in1_label"
    tree(tmp_path, "jetson-orin-nano", files={label: "VDD\x1b[2J\nIN"})
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))

    assert entry(["meters", "list"]) == 0
    out, err = capsys.readouterr()

    assert "\x1b" not in out + err
    assert "VDD" in out


def test_a_recording_is_tested_and_saved_for_replay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, copy = recorded(tmp_path, step_w=2.0), tmp_path / "again.csv"

    assert entry(["meters", "test", f"replay:{path}", "--seconds", "1", "-o", str(copy)]) == 0
    text = capsys.readouterr().out

    assert "label      modelled" in text
    assert "verdict    plausible" in text
    assert copy.read_text().startswith("at_ms,power_mw\n0.000,2800.000\n20.000,2800.000\n")


def test_an_implausible_meter_is_exit_code_5_with_the_document_all_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recorded(tmp_path, step_w=0.0)

    code = entry(["meters", "test", f"replay:{path}", "--seconds", "1", "--json"])
    out, err = capsys.readouterr()

    assert code == 5
    assert json.loads(out)["verdict"] == "implausible"
    assert 1 <= err.count("\n") <= 2  # a busy machine is told in a hint
    assert "implausible: all cores busy" in err


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["ina219:0x40"], 5),
        (["nonsense"], 2),
        (["none"], 2),
        (["modelled", "--device", "nonsense"], 2),
        (["modelled", "--device", "host"], 5),
        (["modelled", "--seconds", "nan"], 2),
        (["replay:absent.csv"], 2),
    ],
)
def test_what_cannot_be_tested_is_one_line_and_a_code(
    arguments: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert entry(["meters", "test", *arguments]) == code

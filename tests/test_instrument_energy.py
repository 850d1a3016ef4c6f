"""Joules of a measurement: windows in rounds, a meter that fails, a stop in the middle."""

from pathlib import Path

import pytest
from small import EXITS, small_bundle

from edgeexit import instrument
from edgeexit.collect import Limits
from edgeexit.energy import IDLE, Window
from edgeexit.errors import DeviceError, UsageError
from edgeexit.meters import MeterInfo, Sample
from edgeexit.profile import Profile
from tests.test_meters_hwmon import wired

FAST = Limits(processes=5, precision=0.5, time_cap_s=1.0, block_ms=0.2)
IDLE_MW, CALL_MW, CALL_NS = 2000.0, 5000.0, 1_000_000


class Board:
    """A board of known power, its meter and its timing process, on a clock of its own."""

    info = MeterInfo(
        kind="known", label="external", instrument="known", boundary="the board", rate_hz=10.0
    )
    cpu_share = 0.004

    def __init__(self, fails_after: int | None = None) -> None:
        self.now_ns = 10**9
        self.windows: list[Window] = []
        self.fails_after = fails_after

    def child(self, plan: dict) -> "Board":
        return self

    def sampler(self, spec: str, root: Path, device: str, cores: list[int]) -> "Board":
        return self

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stop(self) -> None:
        pass

    def window(self, case: int, seconds: float) -> Window:
        began = self.now_ns
        cost = CALL_NS * (1 + case)
        calls = 0 if case == IDLE else round(seconds * 1e9 / cost)
        self.now_ns += round(seconds * 1e9) if case == IDLE else calls * cost
        made = Window(case=case, began_ns=began, ended_ns=self.now_ns, calls=calls)
        self.windows.append(made)
        self.now_ns += 1_000_000
        return made

    def power_mw(self, at_ns: int) -> float:
        at = [w for w in self.windows if w.began_ns <= at_ns <= w.ended_ns]
        return IDLE_MW if not at or at[0].case == IDLE else CALL_MW

    def samples_between(self, began_ns: int, ended_ns: int) -> list[Sample]:
        if self.fails_after is not None and len(self.windows) > self.fails_after:
            raise DeviceError("/sys/class/hwmon/hwmon1/power1_input: vanished")
        step = 10_000_000
        first = began_ns // step * step - step
        return [
            Sample(at_ns=at, power_mw=self.power_mw(at))
            for at in range(first, ended_ns + 2 * step, step)
        ]


def energy(board: Board, book: Path, monkeypatch: pytest.MonkeyPatch, bundle, **more) -> Profile:
    """Measure with *board* in place of the timing process and the sampler of the energy part."""
    real = instrument.Child

    def child(plan: dict) -> object:
        return real(plan) if plan["dissect"] else board

    monkeypatch.setattr(instrument, "Child", child)
    monkeypatch.setattr(instrument, "Sampler", board.sampler)
    return instrument.measure(bundle, limits=FAST, meter="known", notebook=book, **more)


def test_joules_of_a_known_board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, board = small_bundle(tmp_path, exits=2), Board()
    found = energy(board, tmp_path / "p.part", monkeypatch, bundle)
    assert found.energy is not None
    assert found.energy_failure is None
    cases = found.energy.cases
    assert {found.cases[k].exit for k in cases} == {"exit0", "exit1"}
    for k in cases:
        gross = CALL_MW * CALL_NS * (1 + k) / 1e9
        net = (CALL_MW - IDLE_MW) * CALL_NS * (1 + k) / 1e9
        assert found.energy.gross_mj(k).value == pytest.approx(gross, rel=0.01)
        assert found.energy.net_mj(k).value == pytest.approx(net, rel=0.01)
        assert found.energy.gross_mj(k).label == "external"
    order = [window.case for window in found.energy.windows]
    rounds = " ".join(map(str, order)).split("-1")
    # An idle window before and behind every round of all cases.
    assert [sorted(map(int, part.split())) for part in rounds[1::2]] == [cases] * 5
    assert not any(part.split() for part in rounds[::2])
    found.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json").energy == found.energy


def test_a_sensor_that_vanishes_costs_the_joules_and_not_the_latencies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = small_bundle(tmp_path, exits=2)
    found = energy(Board(fails_after=9), tmp_path / "p.part", monkeypatch, bundle)
    assert found.energy is None
    assert found.energy_failure is not None
    assert "vanished" in found.energy_failure
    assert found.latency(found.full).value > 0


def test_a_stopped_energy_part_goes_on_with_the_round_that_was_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, book, first = small_bundle(tmp_path, exits=2), tmp_path / "p.part", Board()
    count = 0

    def stop(progress) -> None:
        nonlocal count
        count += progress.what == "energy"
        if count == 10:  # in the third round
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        energy(first, book, monkeypatch, bundle, on_step=stop)
    monkeypatch.undo()
    second = Board()
    second.now_ns = first.now_ns + 10**10
    found = energy(second, book, monkeypatch, bundle, resume=True)
    assert found.energy is not None
    assert len(second.windows) == 4 * 5
    assert [window.case for window in found.energy.windows].count(IDLE) == 10
    assert not book.exists()


def test_a_meter_that_does_not_exist_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    bundle = small_bundle(tmp_path)
    for meter in ("ina219:0x40,shunt=0.1", "nonsense", "ina219:0x40"):
        with pytest.raises((DeviceError, UsageError)):
            instrument.measure(bundle, limits=FAST, meter=meter, notebook=tmp_path / "p.part")
        assert not (tmp_path / "p.part").exists()


@pytest.mark.slow
def test_constant_power_times_time_for_real(tmp_path: Path) -> None:
    """A chip that always says 3.162 W, real processes and a real sampler: about a minute."""
    bundle = small_bundle(tmp_path, exits=2)
    machine = wired(tmp_path / "board")
    found = instrument.measure(
        bundle, limits=FAST, machine=machine, device="host", meter="ina219:0x40,shunt=0.1"
    )
    assert found.energy is not None
    assert found.exits == EXITS[:2]
    for k in found.energy.cases:
        windows = [w for w in found.energy.windows if w.case == k]
        per_call_s = sum(w.duration_s for w in windows) / sum(w.calls for w in windows)
        assert found.energy.gross_mj(k).value == pytest.approx(3162.0 * per_call_s, rel=0.05)
    assert any("no more than idling" in reason for reason in found.energy.reasons())
    assert found.energy.sampler_share is not None
    assert found.energy.sampler_share < 0.05

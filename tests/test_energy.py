"""Joules from samples: right to a per cent with any usable meter, refused with any other."""

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated_meters import Board, Load, SimulatedMeter, measured

from edgeexit.energy import IDLE, Energy, Trace, Window, joules, window_s
from edgeexit.errors import BadFile, DeviceError, UsageError
from edgeexit.files import Table, json_bytes, parse_json
from edgeexit.meters import Sample

STEADY = Board(
    idle_mw=2700, loads=[Load(power_mw=4000, call_s=0.01), Load(power_mw=5000, call_s=0.02)]
)
FINE = SimulatedMeter(rate_hz=20, averaging_s=0.04, lsb=2, noise=0.005, jitter_s=0.01)


def any_board(rng: np.random.Generator) -> Board:
    """From a Zero 2 W to a big board; exits of 5 to 50 ms with memory-bound and busy parts."""
    idle_mw = rng.uniform(500, 5000)
    return Board(
        idle_mw=idle_mw,
        loads=[
            Load(
                power_mw=idle_mw * rng.uniform(1.3, 3.5),
                call_s=math.exp(rng.uniform(math.log(0.005), math.log(0.05))),
                ripple=rng.uniform(0, 0.2),
            )
            for _ in range(2)
        ],
        idle_drift=rng.uniform(-0.04, 0.04),
    )


def averaging(rate_hz: float, rng: np.random.Generator) -> SimulatedMeter:
    """
    A power meter that integrates between readings, as an INA219 or 226 set up well does.

    Its moments wander as those of meters.paced do, for some calls have a length of half a period.
    """
    return SimulatedMeter(
        rate_hz=rate_hz,
        averaging_s=min(0.068, 0.9 / rate_hz),
        lsb=float(rng.choice([1, 2, 10, 25])),
        noise=rng.uniform(0, 0.02),
        jitter_s=0.3 / rate_hz,
        drop=rng.uniform(0, 0.05),
    )


def counting(rate_hz: float, rng: np.random.Generator) -> SimulatedMeter:
    """A counter that wraps around every minute or so, and knows it."""
    return SimulatedMeter(
        rate_hz=rate_hz,
        is_counter=True,
        lsb=float(rng.choice([0.061, 1, 15])),
        jitter_s=0.01,
        drop=rng.uniform(0, 0.05),
        wrap_mj=65536.0,
    )


@functools.cache
def seen(rate_hz: float, make: Callable[..., SimulatedMeter]) -> list[tuple[Any, float]]:
    """(figure, truth) of gross and net, many boards each: [gross, net, gross, net, ...]."""
    found = []
    for seed in range(25):
        rng = np.random.default_rng(seed)
        energy, truth = measured(any_board(rng), make(rate_hz, rng), seed)
        for case, (gross_mj, net_mj) in enumerate(truth):
            found += [(energy.gross_mj(case), gross_mj), (energy.net_mj(case), net_mj)]
    return found


METERS = [
    (10.0, averaging),
    (20.0, averaging),
    (100.0, averaging),
    (10.0, counting),
    (50.0, counting),
]


@pytest.mark.parametrize(("rate_hz", "make"), METERS)
def test_energy_is_right_to_one_per_cent_from_10_hz_on(
    rate_hz: float, make: Callable[..., SimulatedMeter]
) -> None:
    found = seen(rate_hz, make)
    gross, net = found[::2], found[1::2]

    assert max(abs(figure.value / truth - 1) for figure, truth in gross) <= 0.01
    # Net is a difference: to one per cent of what it is taken from, and mostly of itself.
    assert (
        max(
            abs(mine.value - truth) / whole
            for (mine, truth), (_, whole) in zip(net, gross, strict=True)
        )
        <= 0.01
    )
    assert np.mean([abs(figure.value / truth - 1) <= 0.01 for figure, truth in net]) >= 0.9


@pytest.mark.parametrize(("rate_hz", "make"), METERS)
def test_intervals_hold_the_truth(rate_hz: float, make: Callable[..., SimulatedMeter]) -> None:
    found = seen(rate_hz, make)

    assert np.mean([f.low <= truth <= f.high for f, truth in found]) >= 0.9


def test_a_meter_that_reads_moments_has_wide_intervals_instead_of_wrong_ones() -> None:
    """Between its readings it sees nothing; what it misses must show in the interval."""
    board = dataclasses.replace(STEADY, loads=[Load(power_mw=4000, call_s=0.037, ripple=0.3)])
    inside, widths = [], []
    for seed in range(40):
        energy, truth = measured(board, SimulatedMeter(rate_hz=10, jitter_s=0.01), seed)
        figure = energy.gross_mj(0)
        inside.append(figure.low <= truth[0][0] <= figure.high)
        widths.append(figure.half_width)

    assert np.mean(inside) >= 0.85
    assert np.median(widths) > 0.02


def test_a_slow_meter_is_right_with_the_windows_that_it_needs() -> None:
    meter = SimulatedMeter(rate_hz=1, averaging_s=0.9, lsb=10, noise=0.01, jitter_s=0.05)
    energy, truth = measured(STEADY, meter, 3)

    assert window_s(1) == 40
    for case, (gross_mj, _) in enumerate(truth):
        assert energy.gross_mj(case).value == pytest.approx(gross_mj, rel=0.01)


@pytest.mark.parametrize("rate_hz", [0.1, 1, 5, 8])
def test_a_meter_too_slow_for_the_window_is_refused_with_the_one_that_would_do(
    rate_hz: float,
) -> None:
    with pytest.raises(DeviceError, match=r"expected at least 30") as refusal:
        meter = SimulatedMeter(rate_hz=rate_hz, averaging_s=0.05, noise=0.005)
        measured(STEADY, meter, 0, seconds=3.5)

    assert f"windows of {window_s(rate_hz):.3g} s" in str(refusal.value.hint)


def test_the_window_that_was_named_does() -> None:
    for rate_hz in (0.5, 3.0, 7.0, 11.0):
        meter = SimulatedMeter(rate_hz=rate_hz, averaging_s=0.05, noise=0.005)
        measured(STEADY, meter, 0, seconds=window_s(rate_hz))


@pytest.mark.parametrize("noise", [0.002, 0.01])
def test_asking_a_slow_meter_often_does_not_make_it_fast(noise: float) -> None:
    meter = SimulatedMeter(rate_hz=20, averaging_s=0.4, held_s=0.5, noise=noise)
    with pytest.raises(DeviceError, match="expected at least 30") as refusal:
        measured(STEADY, meter, 1)

    assert "at this meter's 2 a second windows of 20 s" in str(refusal.value.hint)


def test_asking_a_slow_counter_often_does_not_make_it_fast() -> None:
    meter = SimulatedMeter(rate_hz=20, is_counter=True, held_s=1.0)
    with pytest.raises(DeviceError, match="counter steps"):
        measured(STEADY, meter, 1)


def test_a_coarse_value_is_no_slow_meter() -> None:
    """25 mW steps at 500 mW: many equal neighbours, but of no regular length."""
    board = Board(idle_mw=500, loads=[Load(power_mw=700, call_s=0.01)])
    for seed in range(5):
        meter = SimulatedMeter(rate_hz=10, averaging_s=0.05, lsb=25, noise=0.01)
        energy, _ = measured(board, meter, seed)
        assert energy.rate_hz == pytest.approx(10, rel=0.01)


def test_windows_below_three_seconds_are_refused() -> None:
    with pytest.raises(DeviceError, match="expected at least 3 s"):
        measured(STEADY, FINE, 0, seconds=2.5)


def trace(seconds: float = 10.0, rate_hz: float = 20.0, power_mw: float = 1000.0) -> list[Sample]:
    count = int(seconds * rate_hz)
    return [Sample(at_ns=10**9 + round(k * 1e9 / rate_hz), power_mw=power_mw) for k in range(count)]


WINDOW = Window(case=0, began_ns=3 * 10**9, ended_ns=8 * 10**9, calls=100)


def test_a_gap_is_refused_and_a_lost_sample_is_not() -> None:
    samples = trace()

    assert joules(Trace.of(samples[:50] + samples[51:60] + samples[61:]), WINDOW) == pytest.approx(
        5e3
    )
    with pytest.raises(DeviceError, match=r"no samples during 1\.05 s of 5 s"):
        joules(Trace.of(samples[:60] + samples[80:]), WINDOW)


@pytest.mark.parametrize("part", [slice(0, 100), slice(80, 400)])
def test_a_window_that_the_samples_do_not_cover_is_refused(part: slice) -> None:
    with pytest.raises(DeviceError, match="no samples during"):
        joules(Trace.of(trace()[part]), WINDOW)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_value_that_is_no_number_is_refused(value: float) -> None:
    samples = trace()
    samples[7] = Sample(at_ns=samples[7].at_ns, power_mw=value)

    with pytest.raises(DeviceError, match="sample 7"):
        Trace.of(samples)


@pytest.mark.parametrize("shift_ns", [-60_000_000, -50_000_000])
def test_samples_out_of_order_are_refused(shift_ns: int) -> None:
    samples = trace()
    samples[7] = Sample(at_ns=samples[7].at_ns + shift_ns, power_mw=1.0)

    with pytest.raises(DeviceError, match="sample 7 is not after"):
        Trace.of(samples)


def test_a_counter_that_falls_is_refused() -> None:
    with pytest.raises(DeviceError, match=r"fell from 65\d+"):
        measured(
            STEADY, SimulatedMeter(rate_hz=20, is_counter=True, wrap_mj=65536.0, unwrapped=False), 0
        )


@pytest.mark.parametrize(
    "samples", [[], trace()[:1], [*trace(), Sample(at_ns=10**12, energy_mj=1.0)]]
)
def test_what_is_no_stream_of_one_kind_is_refused(samples: list[Sample]) -> None:
    with pytest.raises(DeviceError):
        Trace.of(samples)


@settings(max_examples=50, deadline=None)
@given(
    factor=st.floats(0.01, 100),
    shift_s=st.integers(0, 10**6),
    power=st.lists(st.floats(100, 10_000), min_size=200, max_size=200),
)
def test_joules_scale_with_power_and_do_not_depend_on_the_clock(
    factor: float, shift_s: int, power: list[float]
) -> None:
    samples = [dataclasses.replace(s, power_mw=p) for s, p in zip(trace(), power, strict=True)]
    moved = [
        Sample(at_ns=s.at_ns + shift_s * 10**9, power_mw=(s.power_mw or 0) * factor)
        for s in samples
    ]
    window = dataclasses.replace(
        WINDOW,
        began_ns=WINDOW.began_ns + shift_s * 10**9,
        ended_ns=WINDOW.ended_ns + shift_s * 10**9,
    )

    found_mj = joules(Trace.of(samples), WINDOW)

    assert joules(Trace.of(moved), window) == pytest.approx(found_mj * factor, rel=1e-3)
    assert min(power) * 5 <= found_mj * 1.001
    assert found_mj <= max(power) * 5 * 1.001


@settings(max_examples=30, deadline=None)
@given(power=st.lists(st.floats(100, 10_000), min_size=200, max_size=200))
def test_a_counter_says_the_same_as_the_power_that_it_counts(power: list[float]) -> None:
    samples = [dataclasses.replace(s, power_mw=p) for s, p in zip(trace(), power, strict=True)]
    counted = np.concatenate(([0.0], np.cumsum((np.array(power)[1:] + power[:-1]) / 2 / 20)))
    counter = [Sample(at_ns=s.at_ns, energy_mj=c) for s, c in zip(samples, counted, strict=True)]

    assert joules(Trace.of(counter), WINDOW) == pytest.approx(
        joules(Trace.of(samples), WINDOW), rel=1e-4
    )


def test_net_is_gross_less_the_idle_power_of_that_time() -> None:
    energy, _ = measured(dataclasses.replace(STEADY, idle_drift=0.03), FINE, 5)

    assert energy.gross_mj(0).value == pytest.approx(4000 * 0.01, rel=0.01)
    assert energy.net_mj(0).value == pytest.approx((4000 - 2700 * 1.015) * 0.01, rel=0.02)
    assert energy.ratio(0, 1).value == pytest.approx(0.4, rel=0.01)
    assert energy.power_mw(1).value == pytest.approx(5000, rel=0.01)


def test_every_figure_carries_the_label() -> None:
    energy, _ = measured(STEADY, FINE, 5)
    for figure in (energy.gross_mj(0), energy.net_mj(0), energy.saving(0, 1), energy.ratio(0, 1)):
        assert figure.label == energy.label == energy.info.label == "external"


def test_a_paced_saving_is_the_share_of_the_boards_energy() -> None:
    """5 inputs a second: exits save most of the calls' energy, and little of the board's."""
    paced = Board(
        idle_mw=2700,
        loads=[
            Load(power_mw=2700 + 5 * 4.0, call_s=0.2),
            Load(power_mw=2700 + 5 * 10.0, call_s=0.2),
        ],
    )
    energy, _ = measured(paced, SimulatedMeter(rate_hz=20, averaging_s=0.05, noise=0.001), 2)
    saving = energy.saving(0, 1)

    assert saving.value == pytest.approx(1 - 2720 / 2750, abs=0.001)
    assert saving.low <= 1 - 2720 / 2750 <= saving.high
    assert energy.ratio(0, 1, net=True).value == pytest.approx(0.4, abs=0.1)


def test_a_quiet_measurement_has_no_reasons() -> None:
    quiet = [measured(STEADY, FINE, seed)[0].reasons() for seed in range(20)]

    assert sum(map(bool, quiet)) <= 1


def test_an_idle_that_drifts_disturbs() -> None:
    energy, _ = measured(dataclasses.replace(STEADY, idle_drift=0.08), FINE, 0)

    assert any("idle power drifted" in reason for reason in energy.reasons())


def test_a_meter_that_lags_disturbs() -> None:
    late, _ = measured(STEADY, dataclasses.replace(FINE, delay_s=0.3), 0)

    assert any("the meter lags" in reason for reason in late.reasons())


def test_a_meter_slower_than_it_says_disturbs() -> None:
    energy, _ = measured(STEADY, FINE, 0)
    boasting = dataclasses.replace(energy, info=dataclasses.replace(energy.info, rate_hz=50))

    assert any("expected 50" in reason for reason in boasting.reasons())


def test_a_costly_sampler_disturbs() -> None:
    energy, _ = measured(STEADY, FINE, 0)

    assert dataclasses.replace(energy, sampler_share=0.01).reasons() == energy.reasons()
    assert any(
        "8.0% of a core" in r for r in dataclasses.replace(energy, sampler_share=0.08).reasons()
    )


def test_an_idle_that_was_not_idle_disturbs() -> None:
    """Another program ran whenever the calls did not: net energy is below zero."""
    board = Board(idle_mw=2700, loads=[Load(power_mw=2600, call_s=0.01)])
    energy, _ = measured(board, FINE, 0)

    assert any("case 0 drew no more than idling" in reason for reason in energy.reasons())
    assert any("exit0 drew no more" in reason for reason in energy.reasons("exit{}".format))


def test_windows_without_idle_ones_around_them_are_refused() -> None:
    energy, _ = measured(STEADY, FINE, 0)
    for windows in (energy.windows[1:], energy.windows[:-1], energy.windows[:1], ()):
        with pytest.raises(DeviceError):
            dataclasses.replace(energy, windows=windows)


def test_too_few_windows_of_a_case_are_refused() -> None:
    with pytest.raises(DeviceError, match="4 windows of case 0, expected at least 5"):
        measured(dataclasses.replace(STEADY, rounds=4), FINE, 0)


def test_windows_that_overlap_or_count_wrongly_are_refused() -> None:
    energy, _ = measured(STEADY, FINE, 0)
    first, second, *rest = energy.windows
    for wrong in (
        dataclasses.replace(second, began_ns=first.ended_ns - 1),
        dataclasses.replace(second, calls=0),
        dataclasses.replace(second, case=-2),
        dataclasses.replace(second, case=IDLE),
    ):
        with pytest.raises(DeviceError):
            dataclasses.replace(energy, windows=(first, wrong, *rest))


def test_a_case_that_was_not_measured_is_a_usage_error() -> None:
    energy, _ = measured(STEADY, FINE, 0)

    with pytest.raises(UsageError, match="case 7 was not measured"):
        energy.gross_mj(7)


@functools.cache
def document() -> dict[str, Any]:
    energy, _ = measured(STEADY, FINE, 0)
    return dataclasses.replace(energy, sampler_share=0.004, pace_hz=5.0).to_document()


def read(values: dict[str, Any]) -> Energy:
    return Energy.from_document(parse_json(json_bytes(values), "profile.json"))


@pytest.mark.parametrize("make", [averaging, counting])
def test_a_document_gives_the_same_energy_back(make: Callable[..., SimulatedMeter]) -> None:
    energy, _ = measured(STEADY, make(20.0, np.random.default_rng(0)), 4)
    again = read(energy.to_document())

    assert again == energy
    assert again.gross_mj(1) == energy.gross_mj(1)
    assert again.to_document() == energy.to_document()
    assert read(document()).to_document() == document()


HOSTILE = st.sampled_from(
    [None, True, "x", "", -1, 0, 2**63, 10**400, 1e308, -1e308, 0.5, [], [0], {}, {"a": 1}, [[[]]]]
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_hostile_document_is_refused_or_harmless(data: st.DataObject) -> None:
    values = copy.deepcopy(document())
    place: Any = values
    while True:
        keys = sorted(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        is_leaf = not isinstance(place[key], dict | list) or not place[key]
        if is_leaf or data.draw(st.booleans()):
            place[key] = data.draw(HOSTILE)
            break
        place = place[key]

    try:
        energy = Energy.from_document(Table(values, "profile.json"))
    except BadFile as refusal:
        assert str(refusal).startswith("profile.json")
        assert "\n" not in str(refusal)
    else:
        energy.reasons()
        json.dumps(energy.to_document(), allow_nan=False)


def test_a_document_of_wrong_use_is_a_bad_file() -> None:
    values = copy.deepcopy(document())
    values["samples"]["steps_ns"] = [10 * step for step in values["samples"]["steps_ns"]]

    with pytest.raises(BadFile, match="expected at least 30"):
        read(values)


def test_a_window_for_a_meter_without_a_rate_is_a_usage_error() -> None:
    for rate_hz in (0, -1, math.nan, math.inf):
        with pytest.raises(UsageError):
            window_s(rate_hz)

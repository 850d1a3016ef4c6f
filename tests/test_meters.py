"""How meters are named, found and paced; and numbers in sysfs that are read again and again."""

import os
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgeexit.meters as meters
from edgeexit.device import Device, find_device
from edgeexit.errors import DeviceError, EdgeExitError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import METERS, Sample, Spec, find_meters, open_meter, paced, parse_spec
from edgeexit.meters.sysfs import Kept, Polled
from tests.trees import BOARDS, put, tree

HOST = find_device("host")


# ---------------------------------------------------------------- specs


@pytest.mark.parametrize(
    ("text", "kind", "address", "options"),
    [
        ("pmic", "pmic", None, {}),
        ("ina219:0x40,shunt=0.1", "ina219", "0x40", {"shunt": "0.1"}),
        ("iio:2,shunt=0.1,rate=20", "iio", "2", {"shunt": "0.1", "rate": "20"}),
        ("jetson,rails=VDD_IN", "jetson", None, {"rails": "VDD_IN"}),
        ("replay:/a b/c,d.csv", "replay", "/a b/c,d.csv", {}),
        ("command:read -a 1,2,unit=mW", "command", "read -a 1,2", {"unit": "mW"}),
        ("command:'read a,b=c',unit=W", "command", "read a,b=c", {"unit": "W"}),
        ('command:"read a,b=c"', "command", "read a,b=c", {}),
        ("ssh:me@far/ina219:0x40,shunt=0.1", "ssh", "me@far/ina219:0x40,shunt=0.1", {}),
    ],
)
def test_a_spec_is_kind_address_and_options(
    text: str, kind: str, address: str | None, options: dict[str, str]
) -> None:
    assert parse_spec(text) == Spec(kind=kind, address=address, options=options)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        ",shunt=1",
        "INA219",
        "ina219:",
        "ina219,0x40",
        "ina219:0x40,0.1",
        "ina219:0x40,shunt=0.1,shunt=0.2",
        "ina219 0x40",
        "command:'never closed",
        "command:''",
        "pmic\n",
        "ina219:0x40\0",
        "x" * 5000,
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_spec(text)

    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 300


@given(st.text(max_size=60))
def test_whatever_is_typed_is_a_meter_or_a_refusal(text: str) -> None:
    try:
        spec = parse_spec(text)
    except UsageError:
        return
    assert spec.kind
    assert spec.kind in text


@given(
    st.sampled_from(["ina219", "pmic", "x-y_9"]),
    st.none() | st.from_regex(r"[a-zA-Z0-9/._-]{1,20}", fullmatch=True),
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True),
        st.from_regex(r"[a-zA-Z0-9.+-]{0,8}", fullmatch=True),
        max_size=3,
    ),
)
def test_a_spec_reads_back_as_it_is_written(
    kind: str, address: str | None, options: dict[str, str]
) -> None:
    spec = Spec(kind=kind, address=address, options=options)

    assert parse_spec(str(spec)) == spec


@pytest.mark.parametrize(
    "text", ["", "nan", "inf", "-1", "1e3", "0", "1e999999999", "0x1", "\uff11"]
)
def test_an_option_that_is_no_plain_number_in_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="shunt"):
        Spec(kind="ina219", options={"shunt": text}).number("shunt", "0.00001", "100")


def test_an_unknown_kind_is_told_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no meter named 'modeled'") as refusal:
        open_meter("modeled", tree(tmp_path, "rpi4"), HOST)

    assert "modelled" in str(refusal.value.hint)


def test_none_is_no_meter_to_open(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no meter"):
        open_meter("none", tree(tmp_path, "rpi4"), HOST)


@pytest.mark.parametrize("kind", [k for k in METERS if k not in ("command", "ssh", "replay")])
def test_no_kind_takes_an_option_that_it_does_not_know(kind: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="option of the meter"):
        open_meter(f"{kind},colour=red", tree(tmp_path, "rpi5"), HOST)


@pytest.mark.parametrize("kind", [k for k in METERS if k not in ("command", "ssh", "replay")])
def test_on_an_empty_machine_every_kind_is_one_line_and_a_code(kind: str, tmp_path: Path) -> None:
    with pytest.raises(EdgeExitError) as refusal:
        open_meter(kind, Machine(tmp_path), HOST)

    assert refusal.value.exit_code in (2, 5)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------- other people's meters


class Foreign:
    """A meter of another package."""

    info = meters.MeterInfo(
        kind="toy", label="external", instrument="a toy", boundary="nothing", rate_hz=1
    )

    def samples(self) -> list[Sample]:
        return []

    def close(self) -> None: ...


def open_toy(spec: Spec, machine: Machine, device: Device) -> Foreign:
    if spec.options:
        raise ZeroDivisionError("toys break")
    return Foreign()


def with_toy(monkeypatch: pytest.MonkeyPatch, kind: str = "toy") -> None:
    entry = EntryPoint(name=kind, value="tests.test_meters:open_toy", group=meters.GROUP)
    monkeypatch.setattr(meters, "entry_points", lambda group: [entry])


def test_another_package_adds_a_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_toy(monkeypatch)

    assert open_meter("toy", Machine(tmp_path), HOST).info.instrument == "a toy"
    assert "toy" in [found.spec for found in find_meters(Machine(tmp_path), HOST)]


def test_another_package_cannot_take_a_kind_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_toy(monkeypatch, "rapl")

    assert open_meter("rapl", tree(tmp_path, "host"), HOST).info.kind == "rapl"


def test_what_another_package_raises_is_a_device_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_toy(monkeypatch)

    with pytest.raises(DeviceError, match="ZeroDivisionError: toys break"):
        open_meter("toy,x=1", Machine(tmp_path), HOST)


# ---------------------------------------------------------------- what a machine has


@pytest.mark.parametrize(
    ("board", "usable"),
    [
        ("rpi-zero2w", []),
        ("rpi4", ["modelled"]),
        ("rpi5", ["pmic", "modelled"]),
        ("jetson-orin-nano", ["jetson"]),
        ("rock5b", ["modelled"]),
        ("host", ["battery:BAT0", "rapl"]),
    ],
)
def test_what_can_be_read_on_a_board_is_found_and_opens(
    board: str, usable: list[str], tmp_path: Path
) -> None:
    machine, device = tree(tmp_path, board), find_device(board)

    found = find_meters(machine, device)

    assert [one.spec for one in found if one.info] == usable
    for one in found:
        assert (one.info is None) == (one.reason is not None)
        if one.info:
            meter = open_meter(one.spec, machine, device)
            assert meter.info == one.info
            assert next(iter(meter.samples())).at_ns > 0
            meter.close()
            meter.close()


@pytest.mark.parametrize("board", BOARDS)
def test_every_label_is_a_known_one_and_says_what_it_sees(board: str, tmp_path: Path) -> None:
    for found in find_meters(tree(tmp_path, board), find_device(board)):
        if found.info:
            assert found.info.label in meters.LABELS
            assert found.info.boundary
            assert meters.MeterInfo.from_document(
                meters.Table(found.info.to_document(), "info")
            ) == (found.info)


# ---------------------------------------------------------------- the pace


class Time:
    """A clock that stands still unless something takes time."""

    def __init__(self) -> None:
        self.now_ns = 5_000_000_000
        self.takes_ns: list[int] = []

    def clock_ns(self) -> int:
        return self.now_ns

    def sleep_s(self, seconds: float) -> None:
        assert seconds >= 0
        self.now_ns += round(seconds * 1e9)

    def read(self) -> float:
        self.now_ns += self.takes_ns.pop(0) if self.takes_ns else 0
        return 1.0


@given(st.lists(st.integers(0, 350_000_000), min_size=2, max_size=12))
def test_samples_lie_on_a_fixed_grid_however_long_reading_takes(takes_ns: list[int]) -> None:
    time = Time()
    time.takes_ns = list(takes_ns)
    stream = paced(
        time.read, 10.0, clock_ns=time.clock_ns, sleep_s=time.sleep_s, wander=lambda: 0.0
    )

    samples = [next(stream) for _ in takes_ns]

    for sample, took_ns in zip(samples, takes_ns, strict=True):
        began_ns = sample.at_ns - took_ns // 2
        assert abs((began_ns - 5_000_000_000) % 100_000_000) <= 1
    # Those that were missed are left out: never two in one period.
    periods = [(s.at_ns - t // 2) // 100_000_000 for s, t in zip(samples, takes_ns, strict=True)]
    assert len(set(periods)) == len(periods)


def test_a_slow_reader_of_the_samples_loses_some_and_gets_no_burst() -> None:
    time = Time()
    stream = paced(
        time.read, 10.0, clock_ns=time.clock_ns, sleep_s=time.sleep_s, wander=lambda: 0.0
    )
    first = next(stream)
    time.now_ns += 1_230_000_000

    second, third = next(stream), next(stream)

    assert second.at_ns - first.at_ns == 1_300_000_000
    assert third.at_ns - second.at_ns == 100_000_000


def test_moments_wander_within_their_periods_so_that_no_call_is_met_at_one_place() -> None:
    time = Time()
    stream = paced(time.read, 10.0, clock_ns=time.clock_ns, sleep_s=time.sleep_s)
    first = next(stream).at_ns
    places = [(next(stream).at_ns - first) / 1e8 for _ in range(200)]

    assert [int(place) for place in places] == list(range(1, 201))
    assert max(place % 1 for place in places) < 0.31
    assert max(place % 1 for place in places) - min(place % 1 for place in places) > 0.2


def test_a_reading_that_says_nothing_is_left_out() -> None:
    time = Time()
    values = iter([1.0, None, 3.0])
    stream = paced(
        lambda: next(values), 1.0, is_counter=True, clock_ns=time.clock_ns, sleep_s=time.sleep_s
    )

    assert [next(stream).energy_mj, next(stream).energy_mj] == [1.0, 3.0]


# ---------------------------------------------------------------- files that stay open


def kept(tmp_path: Path, text: str) -> tuple[Machine, Kept]:
    machine = Machine(tmp_path)
    put(machine, {"sys/x": text})
    return machine, Kept(machine, "sys/x")


def test_a_file_is_read_anew_and_followed_when_it_is_replaced(tmp_path: Path) -> None:
    machine, file = kept(tmp_path, "7\n")
    assert file.number() == 7
    machine.path("sys/x").write_text("-8\n")
    assert file.number() == -8
    put(machine, {"sys/x": "9"})
    assert file.number() == 9


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    machine, file = kept(tmp_path, "7\n")
    put(machine, {"sys/x": None})

    with pytest.raises(DeviceError, match=r"sys/x: .*No such file"):
        file.number()


@pytest.mark.parametrize("text", ["", "seven", "7.5", "0x7", "7 8", "nan", "9" * 30])
def test_a_file_without_a_whole_number_is_named(tmp_path: Path, text: str) -> None:
    _, file = kept(tmp_path, text)

    with pytest.raises(DeviceError, match="sys/x: expected a whole number"):
        file.number()


def test_an_error_of_the_bus_is_a_missing_sample_and_many_are_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = kept(tmp_path, "7")

    def refuse(*_: object) -> bytes:
        raise OSError(121, "Remote I/O error")

    monkeypatch.setattr(os, "pread", refuse)
    assert [file.number() for _ in range(9)] == [None] * 9
    with pytest.raises(DeviceError, match="Remote I/O error"):
        file.number()


@pytest.mark.parametrize(
    ("board", "spec"),
    [
        ("host", "rapl"),
        ("host", "battery"),
        ("rpi4", "modelled"),
        ("jetson-orin-nano", "jetson"),
        ("jetson-orin-nano", "ina3221,rails=VDD_SOC"),
        ("rpi4", "ina219,shunt=0.1"),
        ("rpi4", "ina220,shunt=0.1"),
        ("rpi4", "ina228,shunt=0.1"),
        ("rpi4", "iio,shunt=0.1"),
    ],
)
def test_a_file_that_refuses_just_now_is_a_missing_sample_to_every_kind(
    board: str, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = tree(tmp_path, board)
    for number, (name, has) in enumerate(
        {"ina219": "power1_input", "ina220": "in1_input", "ina228": "energy1_input"}.items(), 7
    ):
        place = f"sys/class/hwmon/hwmon{number}"
        files = {"name": name, has: "100", "curr1_input": "62", "shunt_resistor": "10000"}
        files["in1_input"] = "5000"
        put(machine, {f"{place}/{key}": text for key, text in files.items()})
    iio = "sys/bus/iio/devices/iio:device0"
    for key, text in {"name": "ina226", "in_shunt_resistor": "0.1"}.items():
        put(machine, {f"{iio}/{key}": text})
    for key in ("in_power2_raw", "in_power2_scale"):
        put(machine, {f"{iio}/{key}": "1"})
    meter = open_meter(spec, machine, find_device(board))
    assert isinstance(meter, Polled)
    assert meter.read() is not None

    monkeypatch.setattr(Kept, "text", lambda self: None)

    assert meter.read() is None


def test_a_device_that_is_unplugged_is_the_end_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, file = kept(tmp_path, "7")

    def gone(*_: object) -> bytes:
        raise OSError(19, "No such device")

    monkeypatch.setattr(os, "pread", gone)
    with pytest.raises(DeviceError, match="sys/x"):
        file.number()

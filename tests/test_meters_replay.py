"""Recordings: two file formats, their errors by line, and how they are mapped on now."""

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import find_device
from edgeexit.errors import BadFile, DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import MeterInfo, open_meter
from edgeexit.meters.replay import Recording, Replay, read_recording

HOST = find_device("host")
INFO = MeterInfo(kind="replay", label="modelled", instrument="x", boundary="", rate_hz=10)


def written(folder: Path, text: str, name: str = "power.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


class Time:
    def __init__(self) -> None:
        self.now_ns = 10**12

    def clock_ns(self) -> int:
        return self.now_ns

    def sleep_s(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1e9)


def played(recording: Recording, *, is_looped: bool = False) -> Replay:
    time = Time()
    return Replay(
        INFO, recording, is_looped=is_looped, clock_ns=time.clock_ns, sleep_s=time.sleep_s
    )


@pytest.mark.parametrize(
    "text",
    [
        "at_s,power_w\n100.5,2.8\n100.6,2.9\n100.75,3\n",
        "# by hand\nat_ms, power_mw\n100500,2800\n\n100600, 2900.0\n100750,3000\n",
        "at_ns,power_w\n1763719200100500000,2.8\n1763719200200500000,2.9\n1763719200350500000,3\n",
        "power_w,at_us\r\n2.8,100500000\r\n2.9,100600000\r\n3,100750000\r\n",
        '{"at_ns": 100500000000, "power_mw": 2800}\n'
        '{"power_mw": 2.9e3, "at_ns": 100600000000}\n{"at_ns": 100750000000, "power_mw": 3000}\n',
    ],
)
def test_both_formats_and_all_units_say_the_same(text: str, tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path, text))

    assert recording == Recording(
        after_ns=(0, 100_000_000, 250_000_000), values=(2800, 2900, 3000), is_counter=False
    )


def test_a_counter_is_read_as_a_counter(tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path, "at_s,energy_j\n0,5\n1,7.5\n2,7.5\n"))

    assert recording.is_counter
    assert recording.values == (5000, 7500, 7500)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("", "0 samples"),
        ("at_s,power_w\n", "0 samples"),
        ("at_s,power_w\n0,1\n", "1 samples"),
        ("0,1\n1,2\n", ":1: unknown column '0'"),
        ("at_s,watts\n0,1\n1,2\n", ":1: unknown column 'watts'"),
        ("at_s,at_ms\n0,1\n", ":1: expected a time"),
        ("at_s,power_w,power_mw\n0,1,1\n", ":1: expected a time"),
        ("at_s,at_s\n0,1\n", ":1: a column stands twice"),
        ("at_s,power_w\n0,1\n1\n", ":3: expected 2 cells, found 1"),
        ("at_s,power_w\n0,1\n1,nan\n", ":3: power_w: expected a plain decimal number"),
        ("at_s,power_w\n0,1\n1,1e400\n", ":3: power_w: expected"),
        ("at_s,power_w\n0,1\n1,\x1b[2J\n", ":3: power_w: expected"),
        ("at_s,power_w\n0,1\n0,2\n", ":3: at_s: expected times that rise"),
        ("at_s,energy_j\n0,2\n1,1\n", ":3: energy_j: expected a counter that never falls"),
        ('{"at_s": 0, "power_w": 1}\n{"at_s": 1, "power_w": NaN}\n', ":2: not valid JSON"),
        ('{"at_s": 0, "power_w": 1}\n{"at_s": 1, "power_w": "2"}\n', ":2: power_w: expected a"),
        ('{"at_s": 0, "power_w": 1}\n{"at_s": 1, "power_w": true}\n', ":2: power_w: expected a"),
        ('{"at_s": 0, "power_w": 1}\n{"at_s": 1, "energy_j": 1}\n', ":2: expected at_s and"),
        ('{"at_s": 0, "power_w": 1}\n{"at_s": 1, "power', ":2: not valid JSON"),
        ('{"at_s": 0}\n', ":1: expected a time"),
    ],
)
def test_a_wrong_recording_is_refused_by_its_line(text: str, where: str, tmp_path: Path) -> None:
    with pytest.raises(BadFile) as refusal:
        read_recording(written(tmp_path, text))

    assert where in str(refusal.value)
    assert "power.csv" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


@given(st.binary(max_size=300))
def test_whatever_a_file_holds_it_is_a_recording_or_a_refusal(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(data)
    with suppress(BadFile):
        assert len(read_recording(path).values) > 1


def test_samples_come_at_their_time_and_then_it_is_over(tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path, "at_s,power_w\n5,1\n5.1,2\n5.3,3\n"))
    samples = []

    with pytest.raises(DeviceError, match=r"it ends after 0.3 s"):
        for sample in played(recording).samples():
            samples.append(sample)

    assert [(s.at_ns - 10**12, s.power_mw) for s in samples] == [
        (0, 1000),
        (100_000_000, 2000),
        (300_000_000, 3000),
    ]


def test_a_loop_goes_on_in_time_and_a_counter_never_falls(tmp_path: Path) -> None:
    recording = read_recording(written(tmp_path, "at_s,energy_j\n0,10\n1,11\n2,13\n"))
    stream = played(recording, is_looped=True).samples()

    samples = [next(stream) for _ in range(7)]

    assert [(s.at_ns - 10**12) // 10**9 for s in samples] == list(range(7))
    # From the last to the first again it grows as it did just before.
    assert [s.energy_mj for s in samples] == [
        value * 1000 for value in (10, 11, 13, 15, 16, 18, 20)
    ]


def test_it_is_nothing_measured_now(tmp_path: Path) -> None:
    path = written(tmp_path, "at_s,power_w\n0,1\n0.1,1\n0.2,1\n", "a,b=c d.csv")
    info = open_meter(f"replay:'{path}',loop=yes", Machine(tmp_path), HOST).info

    assert info.label == "modelled"
    assert info.rate_hz == 10
    assert info.details == {"samples": 3, "length_s": 0.2, "loop": True}


def test_json_lines_of_small_numbers_are_read(tmp_path: Path) -> None:
    lines = [json.dumps({"at_s": k / 100, "power_w": 1e-7 * k}) for k in range(3)]

    recording = read_recording(written(tmp_path, "\n".join(lines)))

    assert recording.values == pytest.approx((0, 1e-4, 2e-4))


@pytest.mark.parametrize("spec", ["replay", "replay:absent.csv", "replay:x.csv,loop=maybe"])
def test_a_spec_without_a_file_is_refused(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path, "at_s,power_w\n0,1\n1,1\n", "x.csv")

    with pytest.raises(UsageError):
        open_meter(spec, Machine(tmp_path), HOST)

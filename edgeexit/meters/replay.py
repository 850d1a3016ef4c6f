"""
A recording of a meter, played again: for tests, demonstrations and meters that only write files.

Hidden here: two file formats, and how moments of the past become moments of now.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from edgeexit.device import Device
from edgeexit.errors import BadFile, DeviceError, UsageError
from edgeexit.files import parse_json, read_bytes
from edgeexit.machine import Machine
from edgeexit.meters import Found, MeterInfo, Sample, Spec
from edgeexit.meters.sysfs import exact

_KIND = "replay"
_MOST_BYTES = 64 << 20
# Column -> what one unit is, in nanoseconds, milliwatts or millijoules.
_TIMES = {"at_ns": 1, "at_us": 1_000, "at_ms": 1_000_000, "at_s": 1_000_000_000}
_POWERS = {"power_mw": 1, "power_w": 1000}
_ENERGIES = {"energy_mj": 1, "energy_j": 1000}
_COLUMNS = (*_TIMES, *_POWERS, *_ENERGIES)
_EXPECTED = f"a time ({', '.join(_TIMES)}) and one of {', '.join((*_POWERS, *_ENERGIES))}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """after_ns since the first sample, and milliwatts or, with is_counter, millijoules."""

    after_ns: tuple[int, ...]
    values: tuple[float, ...]
    is_counter: bool

    @property
    def rate_hz(self) -> float:
        """Samples a second by the median distance: a gap does not count."""
        steps = sorted(b - a for a, b in zip(self.after_ns, self.after_ns[1:], strict=False))
        return 1e9 / steps[len(steps) // 2]


def read_recording(path: Path) -> Recording:
    """
    The samples in *path*: CSV with a header line, or one JSON object a line, with the same names.

    BadFile names the line: times must rise, numbers be finite, a counter must not fall.
    """
    text = read_bytes(path, limit_bytes=_MOST_BYTES).decode(errors="replace")
    rows = _json_rows(path, text) if text.lstrip()[:1] == "{" else _csv_rows(path, text)
    times: list[int] = []
    values: list[float] = []
    columns: tuple[str, str] | None = None
    for line, row in rows:
        where = f"{path}:{line}"
        found = _columns(row, where)
        if columns is not None and found != columns:
            raise BadFile(f"{where}: expected {' and '.join(columns)} as above")
        columns = found
        at, value = (_number(row[name], f"{where}: {name}") for name in found)
        scaled = float(value * (_POWERS | _ENERGIES)[found[1]])
        times.append(round(at * _TIMES[found[0]]))
        values.append(scaled)
        if len(times) > 1 and times[-1] <= times[-2]:
            raise BadFile(f"{where}: {found[0]}: expected times that rise")
        if len(values) > 1 and found[1] in _ENERGIES and values[-1] < values[-2]:
            raise BadFile(f"{where}: {found[1]}: expected a counter that never falls")
    if columns is None or len(times) < 2:
        raise BadFile(f"{path}: {len(times)} samples, expected at least 2 rows of {_EXPECTED}")
    return Recording(
        after_ns=tuple(at - times[0] for at in times),
        values=tuple(values),
        is_counter=columns[1] in _ENERGIES,
    )


class Replay:
    """
    Samples come when their time has come, counted from when samples() began, gaps and all.

    at_ns is that time exactly, however late the reader is, so that a run can be repeated. It
    is nothing measured now: the label is "modelled", whatever the recording's was. With loop=yes
    it starts again at its end (a counter goes on from there), else the end is a DeviceError.
    """

    def __init__(
        self,
        info: MeterInfo,
        recording: Recording,
        *,
        is_looped: bool,
        clock_ns: Callable[[], int] = time.monotonic_ns,
        sleep_s: Callable[[float], object] = time.sleep,
    ) -> None:
        self._info, self._recording, self._is_looped = info, recording, is_looped
        self._clock_ns, self._sleep_s = clock_ns, sleep_s

    @property
    def info(self) -> MeterInfo:
        """What this meter is."""
        return self._info

    def samples(self) -> Iterator[Sample]:
        """The recording's samples, each at its time. DeviceError at the end unless looped."""
        recording = self._recording
        start_ns, base_mj = self._clock_ns(), 0.0
        # From the last sample of one round to the first of the next: one period.
        round_ns = recording.after_ns[-1] + round(1e9 / recording.rate_hz)
        growth_mj = recording.values[-1] - recording.values[-2]
        while True:
            for after_ns, value in zip(recording.after_ns, recording.values, strict=True):
                at_ns = start_ns + after_ns
                self._sleep_s(max(0, at_ns - self._clock_ns()) / 1e9)
                if recording.is_counter:
                    yield Sample(at_ns=at_ns, energy_mj=base_mj + value)
                else:
                    yield Sample(at_ns=at_ns, power_mw=value)
            if not self._is_looped:
                raise DeviceError(
                    f"{self._info.instrument}: it ends after {recording.after_ns[-1] / 1e9:.1f} s",
                    hint="a longer recording, or loop=yes",
                )
            start_ns += round_ns
            base_mj += recording.values[-1] - recording.values[0] + growth_mj

    def close(self) -> None:
        """Nothing to give back."""


def open_meter(spec: Spec, machine: Machine, device: Device) -> Replay:
    """The recording that *spec* names: `replay:FILE[,loop=yes]`."""
    spec.only("loop", address=True)
    if spec.address is None:
        raise UsageError(f"meter {spec}: expected a file, as in replay:power.csv")
    recording = read_recording(Path(spec.address))
    is_looped = spec.choice("loop", ("yes", "no"), "no") == "yes"
    info = MeterInfo(
        kind=_KIND,
        label="modelled",
        instrument=f"a recording, {Path(spec.address).name}",
        boundary="whatever the recording saw; nothing of this run",
        rate_hz=recording.rate_hz,
        details={
            "samples": len(recording.values),
            "length_s": recording.after_ns[-1] / 1e9,
            "loop": is_looped,
        },
    )
    return Replay(info, recording, is_looped=is_looped)


def find(machine: Machine, device: Device) -> list[Found]:
    """Nothing: a recording exists once somebody names it."""
    return []


def _columns(row: dict[str, str], where: str) -> tuple[str, str]:
    for name in row:
        if name not in _COLUMNS:
            raise BadFile(f"{where}: unknown column {name[:40]!r}, expected {_EXPECTED}")
    times = [name for name in row if name in _TIMES]
    values = [name for name in row if name not in _TIMES]
    if len(times) != 1 or len(values) != 1:
        raise BadFile(f"{where}: expected {_EXPECTED}, found {', '.join(row)[:80] or 'nothing'}")
    return times[0], values[0]


def _number(text: str, where: str) -> Fraction:
    number = exact(text.strip())
    if number is None:
        raise BadFile(f"{where}: expected a plain decimal number, found {text.strip()[:40]!r}")
    return number


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    header: list[str] | None = None
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip() or content.startswith("#"):
            continue
        cells = [cell.strip() for cell in content.split(",")]
        if header is None:
            header = cells
            if len(set(header)) != len(header):
                raise BadFile(f"{path}:{line}: a column stands twice")
            _columns(dict.fromkeys(header, ""), f"{path}:{line}")
        elif len(cells) != len(header):
            raise BadFile(
                f"{path}:{line}: expected {len(header)} cells, found {len(cells)}: cut off?"
            )
        else:
            yield line, dict(zip(header, cells, strict=True))


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        table = parse_json(content.encode(errors="replace"), f"{path}:{line}")
        for key, value in table.values.items():
            if type(value) not in (int, float):
                raise BadFile(f"{path}:{line}: {key[:40]}: expected a number")
        # repr() of a float may hold an exponent; a plain decimal is as exact as the file was.
        yield line, {key: _plain(value) for key, value in table.values.items()}


def _plain(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.12f}"

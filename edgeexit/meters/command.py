"""
Any program that prints watts or joules, as a meter: a USB meter's own tool, a smart plug's script.

    command:'PROGRAM ARGS'[,unit=W][,key=NAME | ,column=N][,every=SECONDS][,rate=HZ]
        [,delay=SECONDS][,timeout=SECONDS][,label=external][,boundary=WORDS]

The program runs once and prints a value a line, or with every= it runs once for each value. A
line is a number ("5.12", "5.12 W"), with key= also "NAME=5.12", "NAME: 5.12 W" or a JSON object
(a.b looks inside), with column= a field of CSV by its number from 1 or its name in the header.
unit= says what the numbers are: W, mW, uW, or as a counter J, mJ, uJ, Wh, mWh, kWh. There is no
shell. Hidden here: limits on everything that a foreign program can do. A value counts from when
its line arrives, less delay=; whatever the instrument itself takes shifts it unseen.
"""

import itertools
import json
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePath
from typing import Any

from edgeexit.device import Device
from edgeexit.errors import DeviceError, UsageError, printable
from edgeexit.machine import Machine
from edgeexit.meters import LABELS, MeterInfo, Sample, Spec, paced

# What one of it is in mW.
POWERS = {"W": 1e3, "mW": 1.0, "uW": 1e-3}
# What one of it is in mJ.
ENERGIES = {"J": 1e3, "mJ": 1.0, "uJ": 1e-3, "Wh": 3.6e6, "mWh": 3.6e3, "kWh": 3.6e9}
_UNITS = (*POWERS, *ENERGIES)
_OPTIONS = ("unit", "key", "column", "every", "rate", "delay", "timeout", "label", "boundary")
_TIMEOUT_S = "10"
_MOST_LINE_BYTES = 1 << 16
_MOST_SAID_BYTES = 2000
# At least and at most so many values tell the rate, in about so long.
_RATE_VALUES = (3, 11)
_RATE_NS = 3 * 10**9
# A header, a banner, a hiccup are no harm; more than this is no meter.
_MOST_BAD_IN_A_ROW = 20
_MOST_BAD_SHARE = 0.2
_LINES_TO_JUDGE = 50
_BURST = 5
_MOST_FAILURES = 3
_HINT_UNIT = "say what the numbers are with unit=, and where they stand with key= or column="


class Program:
    """
    A running program whose output is taken line by line; *what* names it in errors.

    It gets a session of its own, so that Ctrl-C reaches it only through close. DeviceError if it
    cannot be started.
    """

    def __init__(self, argv: Sequence[str], what: str, *, has_input: bool = False) -> None:
        self._what = what
        self._rest = b""
        self._said = b""
        try:
            self.process = subprocess.Popen(
                list(argv),
                stdin=subprocess.PIPE if has_input else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
                env={**os.environ, "LC_ALL": "C", "PYTHONUNBUFFERED": "1"},
            )
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise DeviceError(
                f"meter {what}: cannot start {printable(argv[0])!r}: {reason}",
                hint="name a program on the PATH, or by its whole path",
            ) from error
        self._selector = selectors.DefaultSelector()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            self._selector.register(stream, selectors.EVENT_READ)

    def say(self, line: str) -> None:
        """Write a line to the program; nothing if it does not listen any more."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(line.encode() + b"\n")

    def lines(self, wait_s: float) -> tuple[int, list[str]]:
        """
        The lines that came together, within *wait_s*, and time.monotonic_ns() of their arrival.

        No lines if none came. DeviceError if the program ended, or prints without line ends.
        """
        deadline = time.monotonic() + wait_s
        while True:
            ready = self._selector.select(max(0.0, deadline - time.monotonic()))
            at_ns = time.monotonic_ns()
            for key, _ in ready:
                data: bytes | None = key.fileobj.read(1 << 16)  # type: ignore[union-attr]
                if key.fileobj is self.process.stderr:
                    self._said = (self._said + (data or b""))[-_MOST_SAID_BYTES:]
                    if data == b"":
                        self._selector.unregister(key.fileobj)
                    continue
                if data == b"":
                    if self._rest:
                        last, self._rest = self._rest, b""
                        return at_ns, [last.decode(errors="replace")]
                    raise self._ended()
                *lines, self._rest = (self._rest + (data or b"")).split(b"\n")
                if len(self._rest) > _MOST_LINE_BYTES:
                    raise DeviceError(
                        f"meter {self._what}: printed {len(self._rest)} bytes without a line end",
                        hint="a meter's program prints one value a line",
                    )
                if lines:
                    return at_ns, [line.decode(errors="replace") for line in lines]
            if time.monotonic() >= deadline:
                return at_ns, []

    def _ended(self) -> DeviceError:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        code = self.process.poll()
        if code is None:
            return DeviceError(f"meter {self._what}: the program closed its output")
        self._drain()
        if code == 0:
            return DeviceError(
                f"meter {self._what}: the program ended{self.last_words()}",
                hint="one that prints a value and ends needs every=SECONDS",
            )
        how = f"signal {-code}" if code < 0 else f"code {code}"
        return DeviceError(
            f"meter {self._what}: the program ended with {how}{self.last_words()}",
            hint="run it by hand; it must print until it is stopped",
        )

    def _drain(self) -> None:
        assert self.process.stderr is not None
        with suppress(OSError, ValueError):
            self._said = (self._said + (self.process.stderr.read() or b""))[-_MOST_SAID_BYTES:]

    def last_words(self) -> str:
        """ ": " and the last line that it printed on stderr; empty if there was none."""
        lines = self._said.decode(errors="replace").strip().splitlines()
        return f": {printable(lines[-1])[:200]}" if lines else ""

    def close(self) -> None:
        """End the program, and whatever it started; may be called twice."""
        if self.process.stdin is not None:
            with suppress(OSError):
                self.process.stdin.close()
        for number, wait_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 5.0)):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(wait_s)
                break
        self._selector.close()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


class Values:
    """
    Finds the value in a line, and refuses a program most of whose lines hold none.

    Values come out in mW, of a counter (is_counter) in mJ.
    """

    def __init__(self, options: Mapping[str, str], what: str) -> None:
        self._unit = options.get("unit", "W")
        self._key, self._column = options.get("key"), options.get("column")
        self._what = what
        self.is_counter = self._unit in ENERGIES
        self._scale = {**POWERS, **ENERGIES}[self._unit]
        self.lines = self.bad = self._in_a_row = 0

    def value(self, line: str) -> float | None:
        """The value in *line*; None if it holds none. DeviceError if too many hold none."""
        if not line.strip():
            return None
        self.lines += 1
        found = self._find(line.strip())
        if isinstance(found, float):
            self._in_a_row = 0
            return found * self._scale
        self.bad += 1
        self._in_a_row += 1
        if self._in_a_row > _MOST_BAD_IN_A_ROW or (
            self.lines >= _LINES_TO_JUDGE and self.bad > _MOST_BAD_SHARE * self.lines
        ):
            raise DeviceError(
                f"meter {self._what}: {self.bad} of {self.lines} lines hold no value, such as "
                f"{printable(line.strip())[:60]!r}: {found}",
                hint=_HINT_UNIT,
            )
        return None

    def _find(self, line: str) -> float | str:
        """The number in the line, or why there is none."""
        if self._column is not None:
            return self._field(line)
        if line.startswith("{"):
            return self._member(line)
        if self._key is None:
            return self._number(line)
        place = line.find(self._key)
        while place >= 0:
            rest = line[place + len(self._key) :].lstrip()
            is_whole = place == 0 or not (line[place - 1].isalnum() or line[place - 1] == "_")
            if is_whole and rest[:1] in ("=", ":"):
                return self._number(rest[1:])
            place = line.find(self._key, place + 1)
        return f"no {self._key}= or {self._key}:"

    def _field(self, line: str) -> float | str:
        assert self._column is not None
        comma = next((mark for mark in ",;\t" if mark in line), None)
        fields = [field.strip(" \"'") for field in line.split(comma)]
        if not self._column.isdecimal():
            if self._column not in fields:
                return f"no column {self._column!r} in the header"
            self._column = str(fields.index(self._column) + 1)
            return "the header"
        number = int(self._column)
        if number > len(fields):
            return f"no column {number}"
        return self._number(fields[number - 1])

    def _member(self, line: str) -> float | str:
        try:
            found: Any = json.loads(line)
        except (ValueError, RecursionError):
            return "not valid JSON"
        if self._key is None:
            numbers = [v for v in found.values() if type(v) in (int, float)]
            if len(numbers) != 1:
                return f"{len(numbers)} numbers, name one with key="
            return self._number(str(numbers[0]))
        for name in [self._key] if self._key in found else self._key.split("."):
            if not isinstance(found, dict) or name not in found:
                return f"no {self._key}"
            found = found[name]
        if type(found) not in (int, float, str):
            return f"{self._key} is no number"
        return self._number(str(found))

    def _number(self, text: str) -> float | str:
        words = text.replace(";", " ").split()
        # "power=5,volts=5" goes on after the comma; "5,125" may be a decimal comma.
        first, comma, after = words[0].partition(",") if words else ("", "", "")
        if comma and after[:1].isdigit():
            return "not a number: is that comma a decimal point?"
        digits = first.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")
        unit = first[len(digits) :]
        if not unit and len(words) > 1 and words[1].rstrip(",") in _UNITS:
            unit = words[1].rstrip(",")
        try:
            value = float(digits)
        except ValueError:
            return "not a number"
        if "_" in digits or not abs(value) < 1e12:
            return "not a number"
        if unit not in ("", self._unit):
            return f"in {unit[:10]}, expected {self._unit}"
        return value if value >= 0 else "below zero: is the meter the right way round?"


class Stream:
    """A meter made of a program that prints values as long as it runs."""

    def __init__(self, argv: Sequence[str], spec: Spec, what: str) -> None:
        self._what = what
        self._timeout_s = float(spec.number("timeout", "0.1", "3600") or _TIMEOUT_S)
        self._delay_ns = round(float(spec.number("delay", "0", "60") or 0) * 1e9)
        self._values = Values(spec.options, what)
        self._bursts = 0
        self._program = Program(argv, what)
        try:
            rate_hz = spec.number("rate", "0.01", "1000")
            first_ns, _ = self._next()
            self.info = _info(
                argv, spec, float(rate_hz) if rate_hz else self._rate_hz(first_ns), self._delay_ns
            )
        except BaseException:
            self.close()
            raise

    def _rate_hz(self, first_ns: int) -> float:
        """Values a second by the median distance of the first few."""
        times_ns = [first_ns]
        while len(times_ns) < _RATE_VALUES[1] and (
            len(times_ns) < _RATE_VALUES[0] or times_ns[-1] - first_ns < _RATE_NS
        ):
            times_ns.append(self._next()[0])
        steps_ns = sorted(b - a for a, b in itertools.pairwise(times_ns))
        return round(1e9 / steps_ns[len(steps_ns) // 2], 3)

    def _next(self) -> tuple[int, float]:
        """The next value, and when it came; of several that came together the mean (or last)."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            at_ns, lines = self._program.lines(deadline - time.monotonic())
            found = [value for value in map(self._values.value, lines) if value is not None]
            if found:
                self._bursts = self._bursts + 1 if len(found) >= _BURST else 0
                if self._bursts >= _BURST:
                    raise DeviceError(
                        f"meter {self._what}: prints in bursts of {len(found)} lines, so that "
                        "nobody can tell when each was true",
                        hint="it buffers its output: try stdbuf -oL PROGRAM, or python -u",
                    )
                return at_ns, found[-1] if self._values.is_counter else sum(found) / len(found)
            if time.monotonic() >= deadline:
                raise DeviceError(
                    f"meter {self._what}: no value for {self._timeout_s:g} s"
                    f"{self._program.last_words()}",
                    hint="is it still plugged in? a slow one needs timeout=SECONDS",
                )

    def samples(self) -> Iterator[Sample]:
        """Samples as lines arrive. DeviceError when the program ends, hangs or prints nonsense."""
        last_ns, last_mj = 0, -1.0
        while True:
            at_ns, value = self._next()
            at_ns -= self._delay_ns
            if at_ns <= last_ns:
                continue
            last_ns = at_ns
            if not self._values.is_counter:
                yield Sample(at_ns=at_ns, power_mw=value)
                continue
            if value < last_mj:
                raise DeviceError(
                    f"meter {self._what}: its counter fell from {last_mj:g} mJ to {value:g} mJ",
                    hint="it wrapped around or started anew; measure again",
                )
            last_mj = value
            yield Sample(at_ns=at_ns, energy_mj=value)

    def close(self) -> None:
        """End the program."""
        self._program.close()


class Repeated:
    """A meter made of a program that prints one value and ends, run again for each."""

    def __init__(self, argv: Sequence[str], spec: Spec, what: str) -> None:
        self._argv, self._what = argv, what
        every_s = spec.number("every", "0.01", "3600")
        assert every_s is not None
        self._rate_hz = float(1 / every_s)
        self._timeout_s = float(spec.number("timeout", "0.1", "3600") or _TIMEOUT_S)
        self._delay_ns = round(float(spec.number("delay", "0", "60") or 0) * 1e9)
        self._values = Values(spec.options, what)
        if spec.options.get("column", "1").isdecimal() is False:
            raise UsageError(f"meter {what}: column: expected a number from 1 with every=")
        self._program: Program | None = None
        self._failures = 0
        self._run()
        self.info = _info(argv, spec, self._rate_hz, self._delay_ns)

    def _read(self) -> float | None:
        """One value; None if this run failed, which may happen now and then."""
        try:
            value = self._run()
        except DeviceError:
            self._failures += 1
            if self._failures > _MOST_FAILURES:
                raise
            return None
        self._failures = 0
        return value

    def _run(self) -> float:
        self._program = Program(self._argv, self._what)
        deadline = time.monotonic() + self._timeout_s
        found: float | None = None
        try:
            while time.monotonic() < deadline:
                try:
                    _, lines = self._program.lines(deadline - time.monotonic())
                except DeviceError:
                    if self._program.process.poll() == 0 and found is not None:
                        return found
                    raise
                for value in map(self._values.value, lines):
                    found = found if value is None else value
        finally:
            self._program.close()
        raise DeviceError(
            f"meter {self._what}: did not end within {self._timeout_s:g} s",
            hint="without every= it may go on printing",
        )

    def samples(self) -> Iterator[Sample]:
        """A sample for each run. DeviceError when runs fail, hang or print nonsense."""
        last_mj = -1.0
        for sample in paced(self._read, self._rate_hz, is_counter=self._values.is_counter):
            at_ns = sample.at_ns - self._delay_ns
            if sample.energy_mj is not None:
                if sample.energy_mj < last_mj:
                    raise DeviceError(f"meter {self._what}: its counter fell")
                last_mj = sample.energy_mj
            yield Sample(at_ns=at_ns, power_mw=sample.power_mw, energy_mj=sample.energy_mj)

    def close(self) -> None:
        """End the program if it runs just now."""
        if self._program is not None:
            self._program.close()


def open_meter(spec: Spec, machine: Machine, device: Device) -> Stream | Repeated:
    """The meter that the program in *spec* is, once it has printed a value."""
    spec.only(*_OPTIONS, address=True)
    what = spec.kind
    try:
        argv = shlex.split(spec.address or "")
    except ValueError as error:
        raise UsageError(f"meter {spec}: {error}") from error
    if not argv:
        raise UsageError(f"meter {spec}: expected a program", hint="command:'PROGRAM ARGS',unit=W")
    spec.choice("unit", _UNITS, "W")
    spec.choice("label", LABELS, "external")
    column = spec.options.get("column")
    if column is not None and ("key" in spec.options or column in ("", "0")):
        raise UsageError(f"meter {spec}: expected key=NAME, or column=NAME or a number from 1")
    if spec.options.get("key") == "":
        raise UsageError(f"meter {spec}: key: expected a name")
    if "every" in spec.options:
        if "rate" in spec.options:
            raise UsageError(f"meter {spec}: every= already says the rate")
        return Repeated(argv, spec, what)
    return Stream(argv, spec, what)


def _info(argv: Sequence[str], spec: Spec, rate_hz: float, delay_ns: int) -> MeterInfo:
    # Only names: arguments hold addresses, paths hold people.
    names = [PurePath(word).name for word in argv[:2]]
    name = printable(" ".join(names if names[-1].endswith((".py", ".sh")) else names[:1]))
    return MeterInfo(
        kind=spec.kind,
        label=spec.options.get("label", "external"),
        instrument=f"what the program {name} prints, in {spec.options.get('unit', 'W')}",
        boundary=spec.options.get("boundary")
        or f"whatever {name} looks at; its user knows (say it with boundary=)",
        rate_hz=rate_hz,
        details={
            "program": name,
            "unit": spec.options.get("unit", "W"),
            "timestamps": "when a line arrived",
            "delay_s": delay_ns / 1e9,
        },
    )

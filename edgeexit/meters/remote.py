"""
A meter that another host reads, over the system's ssh: the usual way for a board with no sensor.

    ssh:HOST/SPEC        such as ssh:pi@meter.local/ina219:0x40,shunt=0.1

HOST is whatever `ssh HOST` takes; the other host runs edgeexit.sampler with SPEC and nothing is
asked on the way (BatchMode: keys, an agent or a config do the login). EDGEEXIT_SSH_CONFIG names a
config file for ssh -F, EDGEEXIT_SSH_PYTHON the Python over there that has edgeexit (python3).
Hidden here: two clocks. Of many round trips the shortest says how far the other clock is ahead,
to half that trip; it is measured again all the time, so that a clock that drifts is followed.
"""

import json
import os
import shlex
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from edgeexit.device import Device
from edgeexit.errors import BadFile, DeviceError, UsageError, printable
from edgeexit.files import Table
from edgeexit.machine import Machine
from edgeexit.meters import NONE, MeterInfo, Sample, Spec, parse_spec
from edgeexit.meters.command import Program

CONFIG = "EDGEEXIT_SSH_CONFIG"
PYTHON = "EDGEEXIT_SSH_PYTHON"
# As edgeexit.sampler counts it.
_PROTOCOL = 1
# These look at the machine that they run on, which is not the one that is measured.
_OWN = ("pmic", "rapl", "battery", "jetson", "modelled")
_OPTIONS = (
    *("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=5", "ServerAliveCountMax=3"),
    *("ControlMaster=no", "ForwardAgent=no", "ForwardX11=no", "RequestTTY=no"),
)
_OPEN_S = 45.0
_SILENCE_S = 15.0
_SILENCE_PERIODS = 10
_FIRST_TRIPS = 10
_TRIP_EVERY_S = 2.0
# The shortest of the last minute or so is believed: at 100 ppm the clocks part by 6 ms in it.
_TRIPS_BELIEVED = 30
_MOST_NOISE_LINES = 200
_HINTS = {
    "Permission denied": "let a key log in without a question: ssh-copy-id HOST",
    "Host key verification failed": "log in once by hand (ssh HOST) and accept its key",
    "Could not resolve": "is HOST spelt as in: ssh HOST ?",
    "No module named": f"install edgeexit there, and name its Python with {PYTHON}",
    "not found": f"install edgeexit there, and name its Python with {PYTHON}",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trip:
    """One round trip: when (this clock), how long, and how far the other clock was ahead."""

    at_ns: int
    took_ns: int
    ahead_ns: int

    @classmethod
    def of(cls, sent_ns: int, there_ns: int, back_ns: int) -> "Trip":
        """A trip that was sent and came back at those moments here, and was there at that one."""
        middle_ns = (sent_ns + back_ns) // 2
        return cls(at_ns=middle_ns, took_ns=back_ns - sent_ns, ahead_ns=there_ns - middle_ns)


class Alignment:
    """How another host's monotonic clock maps to this one's."""

    def __init__(self) -> None:
        self._recent: deque[Trip] = deque(maxlen=_TRIPS_BELIEVED)
        self._early: list[Trip] = []

    def add(self, trip: Trip) -> None:
        """Take a round trip into account."""
        self._recent.append(trip)
        if len(self._early) < _FIRST_TRIPS:
            self._early.append(trip)

    @property
    def best(self) -> Trip:
        """The shortest of the latest trips."""
        return min(self._recent, key=lambda trip: trip.took_ns)

    def here_ns(self, there_ns: int) -> int:
        """This clock's time of a moment on the other clock."""
        return there_ns - self.best.ahead_ns

    def details(self) -> dict[str, float]:
        """What is known of it, for a profile: all of it is small if all is well."""
        best = self.best
        found = {
            "round_trip_ms": round(best.took_ns / 1e6, 3),
            "clock_uncertainty_ms": round(best.took_ns / 2e6, 3),
        }
        first, last = (
            min(trips, key=lambda trip: trip.took_ns)
            for trips in (self._early, list(self._recent)[-_FIRST_TRIPS:])
        )
        passed_ns, both_ns = last.at_ns - first.at_ns, last.took_ns + first.took_ns
        # Sooner, the uncertainty of the two trips would be read as drift.
        if passed_ns > max(1e9, 20 * both_ns):
            drift = (last.ahead_ns - first.ahead_ns) / passed_ns
            found["clock_drift_ppm"] = round(1e6 * drift, 1)
            found["clock_drift_uncertainty_ppm"] = round(5e5 * both_ns / passed_ns, 1)
        return found


class RemoteMeter:
    """The meter *spec* of the host *host*, read by a sampler over there."""

    def __init__(self, host: str, spec: str) -> None:
        self._what = f"ssh:{host}"
        self._alignment = Alignment()
        self._asked: dict[str, int] = {}
        self._trips = 0
        self._next_trip_ns = 0
        self._far: MeterInfo | None = None
        self._noise = 0
        self._program = Program(_argv(host), self._what, has_input=True)
        try:
            self._open(host, spec)
        except BaseException:
            self.close()
            raise

    def _open(self, host: str, spec: str) -> None:
        plan = {"protocol": _PROTOCOL, "spec": spec, "root": "/", "device": None, "cores": []}
        self._program.say(json.dumps(plan))
        deadline = time.monotonic() + _OPEN_S
        for trips in range(_FIRST_TRIPS + 1):
            if trips:
                self._ping()
            while self._far is None if not trips else self._asked:
                wait_s = deadline - time.monotonic()
                if wait_s <= 0:
                    raise DeviceError(f"meter {self._what}: no answer within {_OPEN_S:g} s")
                self._heard(host, wait_s)
        self.info = self._described()

    def samples(self) -> Iterator[Sample]:
        """Samples on this machine's clock. DeviceError when the meter or the connection fails."""
        silence_s = max(_SILENCE_S, _SILENCE_PERIODS / self.info.rate_hz)
        last_ns, heard_s = 0, time.monotonic()
        while True:
            now_s = time.monotonic()
            if now_s * 1e9 >= self._next_trip_ns:
                self._ping()
            if now_s - heard_s > silence_s:
                raise DeviceError(
                    f"meter {self._what}: no sample for {silence_s:.3g} s",
                    hint="is the other host, or the network to it, still there?",
                )
            wait_s = max(0.0, self._next_trip_ns / 1e9 - now_s)
            for sample in self._heard("", wait_s):
                heard_s = time.monotonic()
                at_ns = self._alignment.here_ns(sample.at_ns)
                # A better trip may put a moment before the last one; one sample less is no harm.
                if at_ns > last_ns:
                    last_ns = at_ns
                    yield replace(sample, at_ns=at_ns)

    def close(self) -> None:
        """End the connection, and with it the sampler over there."""
        self._program.close()

    def _ping(self) -> None:
        self._trips += 1
        # What has not come back by now never will.
        self._asked = {str(self._trips): time.monotonic_ns()}
        self._program.say(f"ping {self._trips}")
        self._next_trip_ns = time.monotonic_ns() + round(_TRIP_EVERY_S * 1e9)

    def _heard(self, host: str, wait_s: float) -> list[Sample]:
        """The samples that come within *wait_s*, on the other clock; all else is dealt with."""
        try:
            at_ns, lines = self._program.lines(wait_s)
        except DeviceError as error:
            last = self._program.last_words()
            hint = next((hint for text, hint in _HINTS.items() if text in last), None)
            raise DeviceError(
                str(error),
                hint=(hint or "try it by hand: ssh HOST").replace("HOST", host or "HOST"),
            ) from error
        samples = []
        for line in filter(str.strip, lines):
            said = self._parsed(line)
            if isinstance(said, list):
                samples.append(Sample.from_row(said))
            elif "pong" in said:
                self._came_back(said["pong"], at_ns)
            elif "failed" in said:
                raise self._failure(said["failed"])
            elif "meter" in said:
                self._take(said)
        return samples

    def _parsed(self, line: str) -> list[Any] | dict[str, Any]:
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if isinstance(said, list | dict):
            return said
        # Shells greet: what comes before the sampler speaks is none of its.
        self._noise += 1
        if self._far is None and self._noise <= _MOST_NOISE_LINES:
            return {}
        raise DeviceError(
            f"meter {self._what}: expected a sampler, it says {printable(line)[:60]!r}",
            hint="a login script that prints, or another version of edgeexit over there?",
        )

    def _take(self, said: Mapping[str, Any]) -> None:
        if said.get("protocol", _PROTOCOL) != _PROTOCOL:
            raise DeviceError(
                f"meter {self._what}: its sampler speaks version {str(said['protocol'])[:20]}, "
                f"expected {_PROTOCOL}",
                hint="install the same version of edgeexit on both hosts",
            )
        try:
            self._far = MeterInfo.from_document(Table(said, self._what).table("meter"))
        except BadFile as error:
            raise DeviceError(f"meter {error}") from error

    def _came_back(self, pong: object, back_ns: int) -> None:
        match pong:
            case [str(token), int(there_ns)] if token in self._asked and abs(there_ns) < 1 << 62:
                self._alignment.add(Trip.of(self._asked.pop(token), there_ns, back_ns))
                if self._far is not None:
                    self.info = self._described()
            case _:
                # Of a ping that was given up, or nonsense: neither says anything.
                pass

    def _failure(self, failed: object) -> DeviceError | UsageError:
        match failed:
            case [str(kind), str(message), str() | None as hint]:
                text = f"meter {self._what}: {printable(message)[:500]}"
                error = UsageError if kind == "UsageError" else DeviceError
                return error(text, hint=None if hint is None else printable(hint)[:500])
            case _:
                return DeviceError(f"meter {self._what}: failed without a word")

    def _described(self) -> MeterInfo:
        far = self._far
        assert far is not None
        details = {**self._alignment.details(), "meter": far.to_document()}
        if self._alignment.best.took_ns / 2e9 > 1 / far.rate_hz:
            details["warning"] = (
                "the other host's clock is known to "
                f"{details['clock_uncertainty_ms']} ms only, more than a sample takes"
            )
        elif "warning" in far.details:
            details["warning"] = far.details["warning"]
        return MeterInfo(
            kind="ssh",
            label=far.label,
            instrument=f"{far.instrument}, read on another host over ssh",
            boundary=far.boundary,
            rate_hz=far.rate_hz,
            details=details,
        )


def open_meter(spec: Spec, machine: Machine, device: Device) -> RemoteMeter:
    """The meter on another host that *spec* names, its clock aligned with this machine's."""
    spec.only(address=True)
    host, slash, inner = (spec.address or "").partition("/")
    if not host or not slash or not inner:
        raise UsageError(
            f"meter {spec}: expected ssh:HOST/SPEC", hint="ssh:pi@meter/ina219,shunt=0.1"
        )
    # A host that begins with a dash would be an option of ssh.
    if host.startswith("-") or not host.isprintable() or " " in host:
        raise UsageError(f"meter {spec}: {host!r} is no name of a host")
    kind = parse_spec(inner).kind
    if kind in (NONE, "ssh"):
        raise UsageError(f"meter {spec}: {kind} cannot be read over ssh")
    if kind in _OWN:
        raise UsageError(
            f"meter {spec}: {kind} would tell the power of that host, not of this machine",
            hint="over ssh only a sensor in this machine's supply makes sense, such as ina219",
        )
    return RemoteMeter(host, inner)


def _argv(host: str) -> list[str]:
    config = os.environ.get(CONFIG)
    python = os.environ.get(PYTHON) or "python3"
    return [
        "ssh",
        *(("-F", config) if config else ()),
        *(word for option in _OPTIONS for word in ("-o", option)),
        "--",
        host,
        f"exec {shlex.quote(python)} -P -m edgeexit.sampler",
    ]

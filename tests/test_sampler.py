"""The process that reads a meter: it says what the meter says, costs little and outlives nobody."""

import fcntl
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edgeexit.errors import DeviceError, UsageError
from edgeexit.sampler import PROTOCOL, Sampler

WATTS = "command:sh -c 'while :; do echo 2.5; sleep 0.02; done',rate=50"


@pytest.fixture
def chip(tmp_path: Path) -> Path:
    """A tree with an INA226 behind 10 mOhm that says 3.21 W."""
    folder = tmp_path / "sys/class/hwmon/hwmon0"
    folder.mkdir(parents=True)
    values = {"name": "ina226", "power1_input": 3210000, "in1_input": 5000, "curr1_input": 642}
    for name, value in {**values, "shunt_resistor": 10000}.items():
        (folder / name).write_text(f"{value}\n")
    return tmp_path


def test_samples_of_a_window_reach_beyond_it_on_both_sides(chip: Path) -> None:
    with Sampler("ina226,shunt=0.01,rate=20", chip, "rpi4") as sampler:
        time.sleep(0.2)
        began_ns = time.monotonic_ns()
        time.sleep(0.4)
        ended_ns = time.monotonic_ns()
        samples = sampler.samples_between(began_ns, ended_ns)

    assert sampler.info.kind == "ina226"
    assert sampler.info.label == "external"
    assert samples[0].at_ns < began_ns < samples[1].at_ns
    assert samples[-2].at_ns < ended_ns < samples[-1].at_ns
    assert {sample.power_mw for sample in samples} == {3210.0}


def test_the_cost_and_the_rate_are_stated(chip: Path) -> None:
    with Sampler("ina226,shunt=0.01,rate=20", chip, "rpi4") as sampler:
        now_ns = time.monotonic_ns()
        sampler.samples_between(now_ns, now_ns + 500_000_000)
        during = sampler.cpu_share

    assert during is not None
    assert 0 <= during < 0.2
    assert sampler.cpu_share is not None
    assert sampler.cpu_share >= 0
    assert sampler.rate_hz == pytest.approx(20, rel=0.3)


def test_the_cost_of_a_meters_program_is_in_it() -> None:
    busy = (
        "command:sh -c 'while :; do echo 1; i=0; while [ $i -lt 9999 ]; do i=$((i+1)); done; done'"
    )
    with Sampler(busy + ",rate=100") as sampler:
        now_ns = time.monotonic_ns()
        sampler.samples_between(now_ns, now_ns + 700_000_000)
        share = sampler.cpu_share

    assert share is not None
    assert share > 0.1


def test_a_counter_stays_a_counter() -> None:
    script = (
        "command:sh -c 'i=0; while :; do echo $i; i=$((i+1)); sleep 0.02; done',unit=mJ,rate=50"
    )
    with Sampler(script) as sampler:
        now_ns = time.monotonic_ns()
        samples = sampler.samples_between(now_ns, now_ns + 200_000_000)

    assert samples[0].power_mw is None
    assert samples[-1].energy_mj == samples[0].energy_mj + len(samples) - 1


def test_a_sensor_that_vanishes_keeps_its_kind_and_what_was_measured_before(chip: Path) -> None:
    with Sampler("ina226,shunt=0.01,rate=50", chip, "rpi4") as sampler:
        began_ns = time.monotonic_ns()
        before = sampler.samples_between(began_ns, began_ns + 100_000_000)
        for path in (chip / "sys/class/hwmon/hwmon0").iterdir():
            path.unlink()
        time.sleep(0.1)

        assert sampler.samples_between(began_ns, began_ns + 100_000_000) == before
        with pytest.raises(DeviceError, match="power1_input"):
            sampler.samples_between(began_ns, time.monotonic_ns() + 10**9)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("ina226", UsageError),
        ("ina226,shunt=0.01", DeviceError),
        ("none", UsageError),
        ("inna226", UsageError),
        ("command:false", DeviceError),
    ],
)
def test_a_meter_that_cannot_be_opened_is_refused_as_it_is_without_a_process(
    tmp_path: Path, spec: str, kind: type[Exception], chip: Path
) -> None:
    root = chip if spec == "ina226" else tmp_path / "empty"
    with pytest.raises(kind) as refusal, Sampler(spec, root, "rpi4"):
        pass

    assert "\n" not in str(refusal.value)


def test_a_process_that_is_killed_is_a_device_error() -> None:
    with Sampler(WATTS) as sampler:
        assert sampler._process is not None
        sampler._process.kill()
        with pytest.raises(DeviceError, match="ended with signal 9"):
            sampler.samples_between(0, time.monotonic_ns() + 10**9)


def test_a_meter_that_falls_silent_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeexit.sampler._PATIENCE_S", 0.3)
    silent = "command:sh -c 'echo 1; sleep 1000',rate=50"
    with (
        Sampler(silent) as sampler,
        pytest.raises(DeviceError, match=r"no sample for 0\.3 s"),
    ):
        sampler.samples_between(0, time.monotonic_ns())


def test_it_ends_at_once_and_takes_its_programs_along() -> None:
    sampler = Sampler(WATTS)
    sampler.start()
    assert sampler._process is not None
    family = psutil.Process(sampler._process.pid).children(recursive=True)
    sampler.stop()
    sampler.stop()

    assert sampler._process.returncode == 0
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert (sampler.rate_hz is None) == (len(sampler.samples) < 2)


def test_samples_wait_in_the_process_when_nobody_reads(chip: Path) -> None:
    """A pipe of 4 KiB is full after 80 samples; none may get lost and none come late."""
    with Sampler("ina226,shunt=0.01,rate=200", chip, "rpi4") as sampler:
        assert sampler._process is not None
        assert sampler._process.stdout is not None
        fcntl.fcntl(sampler._process.stdout.fileno(), fcntl.F_SETPIPE_SZ, 4096)
        began_ns = time.monotonic_ns()
        time.sleep(1.0)
        samples = sampler.samples_between(began_ns, time.monotonic_ns())

    steps_ms = [(b.at_ns - a.at_ns) / 1e6 for a, b in itertools.pairwise(samples)]
    assert len(samples) > 100
    assert sorted(steps_ms)[len(steps_ms) // 2] < 10


def child(plan: dict[str, object]) -> subprocess.Popen[bytes]:
    """The process itself, without the handle, in a group of its own."""
    found = subprocess.Popen(
        [sys.executable, "-P", "-m", "edgeexit.sampler"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert found.stdin is not None
    found.stdin.write(json.dumps(plan).encode() + b"\n")
    found.stdin.flush()
    return found


def plan(spec: str, **others: object) -> dict[str, object]:
    return {"protocol": PROTOCOL, "spec": spec, "root": "/", "device": "host", "cores": []} | others


def said(process: subprocess.Popen[bytes], what: type) -> object:
    """The next line that is a list, or an object."""
    assert process.stdout is not None
    while not isinstance(line := json.loads(process.stdout.readline()), what):
        pass
    return line


def test_ctrl_c_to_the_group_does_not_stop_it_and_a_closed_stdin_does() -> None:
    process = child(plan(WATTS))
    assert process.stdin is not None
    assert process.stdout is not None
    first = said(process, list)
    os.killpg(process.pid, signal.SIGINT)
    for _ in range(20):
        assert said(process, list) > first
    process.stdin.close()
    rest = process.stdout.read().splitlines()
    process.stdout.close()

    assert process.wait(10) == 0
    assert all(isinstance(json.loads(line), list) for line in rest)


def test_it_answers_pings_with_its_clock_and_keeps_sampling() -> None:
    process = child(plan(WATTS))
    with process:
        assert process.stdin is not None
        said(process, list)
        before_ns = time.monotonic_ns()
        process.stdin.write(b"ping 7\nnonsense\n")
        process.stdin.flush()
        while "pong" not in (line := said(process, dict)):
            pass
        assert isinstance(line, dict)
        token, at_ns = line["pong"]
        said(process, list)
        process.stdin.close()
        assert process.stdout is not None
        process.stdout.read()

    assert token == "7"
    assert before_ns < at_ns < time.monotonic_ns()


def test_it_ends_when_nobody_reads_it_any_more() -> None:
    process = child(plan(WATTS))
    said(process, list)
    family = psutil.Process(process.pid).children(recursive=True)
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.close()

    assert process.wait(10) == 0
    process.stdin.close()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive


def test_another_version_is_refused() -> None:
    process = child(plan(WATTS, protocol=PROTOCOL + 1))
    with process:
        line = said(process, dict)
        assert process.stdin is not None
        process.stdin.close()

    assert isinstance(line, dict)
    assert line["failed"][0] == "DeviceError"


def test_it_stays_off_the_cores_that_are_measured() -> None:
    cores = sorted(os.sched_getaffinity(0))
    with Sampler(WATTS, cores=cores[:1]) as sampler:
        assert sampler._process is not None
        used = psutil.Process(sampler._process.pid).cpu_affinity()
        niceness = psutil.Process(sampler._process.pid).nice()

    assert set(used or ()) == set(cores[1:] or cores)
    assert niceness > 0

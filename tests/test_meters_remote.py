"""A meter on another host: a real sshd on loopback, and clocks that disagree."""

import itertools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import find_device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import EnergyMeter, Sample, open_meter
from edgeexit.meters.remote import Alignment, Trip
from edgeexit.sampler import Sampler

HOST = find_device("host")
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))
WATTS = "command:sh -c 'while :; do echo 2.5; sleep 0.02; done',rate=50"


def taken(spec: str, count: int) -> tuple[EnergyMeter, list[Sample]]:
    meter = open_meter(spec, Machine(), HOST)
    try:
        return meter, list(itertools.islice(meter.samples(), count))
    finally:
        meter.close()


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


# A Python that begins with some lines of its own, then becomes the sampler it is asked for.
PYTHON = """#!/bin/sh
exec {python} -P -c "
{before}
import runpy, sys
sys.argv = ['sampler']
runpy.run_module('edgeexit.sampler', run_name='__main__')
"
"""


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes an `ssh` that runs the sampler here, after some lines of Python."""

    def make(before: str) -> Path:
        text = PYTHON.format(python=sys.executable, before=before)
        found = script(tmp_path / "bin" / "ssh", text)
        monkeypatch.setenv("PATH", f"{found.parent}{os.pathsep}{os.environ['PATH']}")
        return found

    return make


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A throw-away sshd with throw-away keys; yields a client's config that reaches it."""
    if SSHD is None:
        pytest.skip("sshd is not installed (apt-get install openssh-server)")
    folder = tmp_path_factory.mktemp("sshd")
    for name in ("host", "user", "stranger"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True
        )
    (folder / "authorized").write_text((folder / "user.pub").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
        f"AuthorizedKeysFile {folder}/authorized\nPidFile {folder}/pid\n"
        "PasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nStrictModes no\n"
        "PermitRootLogin prohibit-password\n"
    )
    host_key = (folder / "host.pub").read_text()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {host_key}")
    base = (
        f"HostName 127.0.0.1\n Port {port}\n IdentitiesOnly yes\n IdentityAgent none\n"
        f" GlobalKnownHostsFile /dev/null\n"
    )
    known, empty = f" UserKnownHostsFile {folder}/known\n", " UserKnownHostsFile /dev/null\n"
    (folder / "ssh_config").write_text(
        f"Host meter\n {base}{known} IdentityFile {folder}/user\n"
        f"Host stranger\n {base}{known} IdentityFile {folder}/stranger\n"
        f"Host unknown\n {base}{empty} IdentityFile {folder}/user\n"
        f"Host closed\n HostName 127.0.0.1\n Port 1\n"
    )
    # Where privileges are separated the daemon wants this folder, which packages make at boot.
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    daemon = subprocess.Popen(
        [SSHD, "-D", "-E", str(folder / "log"), "-f", str(folder / "sshd_config")],
        stdin=subprocess.DEVNULL,
    )
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        else:
            pytest.skip(f"sshd does not start here: {(folder / 'log').read_text()[-200:]}")
        yield folder / "ssh_config"
    finally:
        daemon.terminate()
        daemon.wait(10)


@pytest.fixture
def config(sshd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEEXIT_SSH_CONFIG", str(sshd))
    monkeypatch.setenv("EDGEEXIT_SSH_PYTHON", sys.executable)
    return sshd


def test_samples_come_over_a_real_ssh_on_this_clock(config: Path) -> None:
    began_ns = time.monotonic_ns()
    meter, samples = taken(f"ssh:meter/{WATTS}", 20)
    ended_ns = time.monotonic_ns()

    assert {sample.power_mw for sample in samples} == {2500.0}
    assert began_ns < samples[0].at_ns
    assert samples[-1].at_ns < ended_ns
    assert all(a.at_ns < b.at_ns for a, b in itertools.pairwise(samples))
    # Both ends are this machine, so the clocks agree to within the uncertainty.
    info = meter.info
    assert (info.kind, info.label, info.rate_hz) == ("ssh", "external", 50)
    assert "over ssh" in info.instrument
    assert 0 < info.details["round_trip_ms"] < 5000
    assert info.details["clock_uncertainty_ms"] == pytest.approx(
        info.details["round_trip_ms"] / 2, abs=0.002
    )
    assert info.details["meter"]["kind"] == "command"
    assert "127.0.0.1" not in str(info)


def test_a_sampler_reads_a_meter_over_a_real_ssh_and_leaves_nothing_behind(
    config: Path, tmp_path: Path
) -> None:
    note = tmp_path / "pid"
    spec = (
        f"ssh:meter/command:sh -c 'echo $$ > {note}; while :; do echo 1; sleep 0.02; done',rate=50"
    )
    with Sampler(spec) as sampler:
        now_ns = time.monotonic_ns()
        samples = sampler.samples_between(now_ns, now_ns + 400_000_000)
        far = int(note.read_text())
        assert Path(f"/proc/{far}").exists()

    assert samples[0].at_ns < now_ns + 100_000_000
    assert sampler.info.kind == "ssh"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{far}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{far}").exists()


def test_what_the_other_host_refuses_is_refused_here(config: Path) -> None:
    with pytest.raises(DeviceError, match="ssh:meter: meter command: the program ended"):
        open_meter("ssh:meter/command:false,rate=1", Machine(), HOST)
    with pytest.raises(UsageError, match="ssh:meter"):
        open_meter("ssh:meter/inna219", Machine(), HOST)
    with pytest.raises(DeviceError, match="ended with code 3"):
        taken("ssh:meter/command:sh -c 'echo 1; sleep 0.3; exit 3',rate=10", 99)


@pytest.mark.parametrize(
    ("host", "hint"),
    [("stranger", "ssh-copy-id stranger"), ("unknown", "ssh unknown"), ("closed", "ssh closed")],
)
def test_a_host_that_lets_nobody_in_is_a_device_error_with_a_hint(
    config: Path, host: str, hint: str
) -> None:
    with pytest.raises(DeviceError, match="ended with code 255") as refusal:
        open_meter(f"ssh:{host}/{WATTS}", Machine(), HOST)

    assert hint in str(refusal.value.hint)


def test_a_host_without_edgeexit_is_a_device_error_with_a_hint(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXIT_SSH_PYTHON", "no such python")
    with pytest.raises(DeviceError, match="ended with code 127") as refusal:
        open_meter(f"ssh:meter/{WATTS}", Machine(), HOST)

    assert "EDGEEXIT_SSH_PYTHON" in str(refusal.value.hint)


SHIFTED = """
import time
real = time.monotonic_ns
time.monotonic_ns = lambda: real() * (1000000 + {ppm}) // 1000000 + {ahead_s} * 10**9
"""


@pytest.mark.parametrize("ahead_s", [-5000, 86400])
def test_a_clock_that_is_ahead_is_set_right(fake_ssh: Callable[[str], Path], ahead_s: int) -> None:
    since_start_s = int(time.monotonic())  # before which no clock of this kind is
    fake_ssh(SHIFTED.format(ppm=0, ahead_s=max(ahead_s, -since_start_s // 2)))
    began_ns = time.monotonic_ns()
    meter, samples = taken(f"ssh:anywhere/{WATTS}", 10)

    assert began_ns < samples[0].at_ns
    assert samples[-1].at_ns < time.monotonic_ns()
    assert meter.info.details["clock_uncertainty_ms"] < 1000


def test_a_clock_that_drifts_is_followed_and_said(
    fake_ssh: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 % fast: after two seconds the first offset would be 20 ms wrong."""
    monkeypatch.setattr("edgeexit.meters.remote._TRIP_EVERY_S", 0.05)
    monkeypatch.setattr("edgeexit.meters.remote._TRIPS_BELIEVED", 3)
    fake_ssh(SHIFTED.format(ppm=10_000, ahead_s=77))
    meter = open_meter(f"ssh:anywhere/{WATTS}", Machine(), HOST)
    try:
        lateness_ms = [
            (time.monotonic_ns() - sample.at_ns) / 1e6
            for sample in itertools.islice(meter.samples(), 100)
        ]
    finally:
        meter.close()

    assert abs(np.median(lateness_ms[-20:]) - np.median(lateness_ms[:20])) < 10
    assert meter.info.details["clock_drift_ppm"] == pytest.approx(10_000, rel=0.3)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("print('Welcome!\\n' * 9999); raise SystemExit", "expected a sampler"),
        ("print('[1, NaN, null]'); input()", "a sample says"),
        ("print('[1, 2, 3]'); input()", "expected a sample"),
        ("print('{\\\"meter\\\": {}}'); input()", "missing"),
        ('print(\'{\\"meter\\": {}, \\"protocol\\": 99}\'); input()', "speaks version 99"),
        ("print('{\\\"failed\\\": 1}'); input()", "failed without a word"),
        ("print('[' * 30000); raise SystemExit", "the program ended"),
        ("print('x' * 10**6, end='', flush=True); input(); input()", "without a line end"),
        ("raise SystemExit(4)", "ended with code 4"),
    ],
)
def test_a_hostile_host_is_a_device_error(
    fake_ssh: Callable[[str], Path], before: str, message: str
) -> None:
    fake_ssh(before)
    with pytest.raises(DeviceError, match=message) as refusal:
        open_meter(f"ssh:anywhere/{WATTS}", Machine(), HOST)

    assert "\n" not in str(refusal.value)


def test_a_login_script_may_greet(fake_ssh: Callable[[str], Path]) -> None:
    fake_ssh("print('Welcome to meter', '', 'Have a nice day', sep=chr(10), flush=True)")

    assert len(taken(f"ssh:anywhere/{WATTS}", 3)[1]) == 3


def test_a_host_that_falls_silent_is_a_device_error(
    fake_ssh: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeexit.meters.remote._SILENCE_S", 0.3)
    fake_ssh("")
    with pytest.raises(DeviceError, match=r"no sample for 0\.3 s"):
        taken("ssh:anywhere/command:sh -c 'echo 1; sleep 1000',rate=50", 9)


@pytest.mark.parametrize(
    "spec",
    [
        "ssh",
        "ssh:meter",
        "ssh:meter/",
        "ssh:/ina219",
        "ssh:-oProxyCommand=reboot/ina219",
        "ssh:a b/ina219",
        "ssh:meter/none",
        "ssh:meter/ssh:other/ina219",
        "ssh:meter/rapl",
        "ssh:meter/pmic",
        "ssh:meter/modelled",
        "ssh:meter/,",
    ],
)
def test_a_wrong_spec_is_a_usage_error(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError):
        open_meter(spec, Machine(), HOST)


def test_a_machine_without_ssh_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(DeviceError, match="cannot start 'ssh'"):
        open_meter("ssh:meter/ina219,shunt=0.1", Machine(), HOST)


def test_drift_is_told_as_well_as_it_is_known() -> None:
    """30 ppm over five minutes of trips of 1 to 3 ms."""
    alignment, rng = Alignment(), np.random.default_rng(0)
    for now_ns in range(0, 300 * 10**9, 2 * 10**9):
        there_ns, back_ns = rng.integers(500_000, 1_500_000, 2)
        arrived_ns = now_ns + int(there_ns)
        alignment.add(
            Trip.of(now_ns, arrived_ns + arrived_ns * 30 // 10**6, arrived_ns + int(back_ns))
        )
    found = alignment.details()

    assert abs(found["clock_drift_ppm"] - 30) <= found["clock_drift_uncertainty_ppm"] < 10


@given(
    ahead_ns=st.integers(-(10**15), 10**15),
    ways_ns=st.lists(
        st.tuples(st.integers(1000, 10**8), st.integers(1000, 10**8)), min_size=1, max_size=30
    ),
)
def test_the_clock_is_known_to_half_the_shortest_round_trip(
    ahead_ns: int, ways_ns: list[tuple[int, int]]
) -> None:
    """However unequal the two ways are."""
    alignment, now_ns = Alignment(), 10**12
    for there_ns, back_ns in ways_ns:
        arrived_ns = now_ns + there_ns
        alignment.add(Trip.of(now_ns, arrived_ns + ahead_ns, arrived_ns + back_ns))
        now_ns = arrived_ns + back_ns + 10**9
    error_ns = alignment.here_ns(now_ns + ahead_ns) - now_ns

    assert abs(error_ns) <= min(map(sum, ways_ns)) // 2 + 1
    assert alignment.details()["clock_uncertainty_ms"] * 1e6 + 1000 >= abs(error_ns)

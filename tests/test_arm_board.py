"""
From a board with nothing but Python to a release that answers, taken back: real commands, real
sshd, real ARM code. The board is emulated: its programs by qemu-user, or with --slow the whole
machine, whose kernel and sshd are then ARM code, too. Its network leads nowhere.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import answers
import arm
import numpy as np
import pytest
from board import Board, layers, register
from login import Login
from machine import Machine

from edgeexit.bundle import load_bundle
from edgeexit.profile import Profile
from edgeexit.recut import recut
from edgeexit.samples import find_set

pytest.importorskip("asyncssh")

EXAMPLES = arm.CHECKOUT / "examples"
# Small enough for a processor that is not there.
TINY = Path(__file__).with_name("golden") / "bundle-1.edgeexit"
Done = subprocess.CompletedProcess[str]


@dataclass(frozen=True)
class Place:
    """Where ARM programs run: how to log in there, what it says of itself, its network devices."""

    login: Callable[[Path], AbstractContextManager[Login]]
    device: str
    emulated: str
    network: tuple[str, ...]


PLACES = {
    "programs": Place(
        login=lambda folder: Board("rpi5", folder, ready=False).login(),
        device="rpi5",
        emulated="qemu-user (qemu-aarch64-static)",
        network=("lo",),
    ),
    # Its second device leads to this machine's ssh client and nowhere else: qemu's restrict=on.
    "machine": Place(
        login=lambda folder: Machine("cortex-a76", folder, ready=False).login(),
        device="host",
        emulated="qemu-system's virt board (device tree linux,dummy-virt)",
        network=("lo", "eth0"),
    ),
}


@dataclass(frozen=True)
class Laptop:
    """A home folder with the key to the board in it, where commands are typed."""

    home: Path
    place: Place
    login: Login

    def type(self, *argv: object) -> Done:
        """`edgeexit ARGV` on the laptop."""
        return self._run([sys.executable, "-m", "edgeexit", *map(str, argv)])

    def on_board(self, *argv: str, stdin: bytes | None = None) -> Done:
        """A command on the board, by plain ssh."""
        login = self.login
        ssh = ["ssh", "-F", str(login.config), "-p", str(login.port), login.address]
        return self._run([*ssh, shlex.join(argv)], stdin)

    def _run(self, argv: list[str], stdin: bytes | None = None) -> Done:
        left_out = ("SSH_AUTH_SOCK", "EDGEEXIT_HOSTS", "XDG_CACHE_HOME")
        environment = {key: text for key, text in os.environ.items() if key not in left_out}
        environment["HOME"] = str(self.home)
        done = subprocess.run(
            argv,
            cwd=self.home,
            env=environment,
            capture_output=True,
            input=stdin or b"",
            check=False,
            timeout=1200,
        )
        return subprocess.CompletedProcess(
            argv, done.returncode, done.stdout.decode(), done.stderr.decode()
        )


@pytest.fixture(
    scope="module", params=["programs", pytest.param("machine", marks=pytest.mark.slow)]
)
def laptop(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Laptop]:
    folder, place = tmp_path_factory.mktemp("journey"), PLACES[request.param]
    home = folder / "laptop"
    (home / ".ssh").mkdir(parents=True, mode=0o700)
    with ExitStack() as stack:
        with arm.or_skip():
            login = stack.enter_context(place.login(folder / "board"))
        shutil.copy(login.key, home / ".ssh" / "id_ed25519")
        yield Laptop(home, place, login)


def bundle_with_policy(name: str, device: str, folder: Path) -> Path:
    """The shipped bundle *name*, called fashion, with a policy for *device*."""
    path = folder / name / "fashion.edgeexit"
    shutil.copytree(EXAMPLES / f"{name}.edgeexit", path)
    bundle = load_bundle(path)
    samples = find_set("fashion-mnist").split("certificate").samples[:50]
    (path / "policies").mkdir()
    answers.policy_for(bundle, samples, device).save(path / "policies" / f"{device}.json")
    return path


@pytest.fixture(scope="module")
def said(laptop: Laptop, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Done]:
    """The whole way, one command each, and what each of them said."""
    folder, device = tmp_path_factory.mktemp("bundles"), laptop.place.device
    first, second = (
        bundle_with_policy(name, device, folder) for name in ("fashion", "fashion-pruned")
    )
    samples = folder / "samples.npy"
    np.save(samples, find_set("fashion-mnist").split("certificate").samples[:10])
    # Two exits of three: a third of the paths to time.
    small = recut(load_bundle(TINY), ["exit0", "exit2"], folder / "tiny.edgeexit").path
    login = laptop.login
    key = ["ssh-keygen", "-lf", str(login.key.with_name("host.pub"))]
    fingerprint = subprocess.run(key, capture_output=True, text=True, check=True).stdout.split()[1]
    address = f"{login.user}@{login.address}:{login.port}"
    edgeexit = ".local/share/edgeexit/env/current/bin/edgeexit"
    run = (edgeexit, "run", "--app", "fashion", "samples.npy", "--json")
    # By the board's kind where it has one: hosts.toml says which board that is.
    on = ("--host", "pi") if device == "host" else ("--device", device)
    few = ("--processes", "5", "--time-cap", "1", "--precision", "50%")

    said = {
        "python": laptop.on_board("python3", "-c", "import numpy"),
        "hosts": laptop.type(
            "hosts", "add", "pi", address, "--device", device, "--fingerprint", fingerprint
        ),
        "setup": laptop.type("setup", "pi", "--json"),
        "profile": laptop.type("profile", small, *on, *few, "-o", "profile.json"),
        "deploy": laptop.type("deploy", first, "--host", "pi", "--json"),
        "samples": laptop.on_board("dd", "of=samples.npy", stdin=samples.read_bytes()),
        "run first": laptop.on_board(*run),
        "deploy second": laptop.type("deploy", second, "--host", "pi", "--json"),
        "run second": laptop.on_board(*run),
        "rollback": laptop.type("rollback", "--host", "pi", "--app", "fashion", "--json"),
        "run back": laptop.on_board(*run),
        "network": laptop.on_board("cat", "/proc/net/dev", "/proc/net/route"),
    }
    for name, bundle in (("first", first), ("second", second)):
        policy = ("--policy", bundle / "policies" / f"{device}.json")
        said[f"{name} here"] = laptop.type("run", bundle, samples, *policy, "--json")
    return said


def row(done: Done) -> Any:
    """The row of the only board in a command's document."""
    assert done.returncode == 0, done.stdout + done.stderr
    (only,) = json.loads(done.stdout)["boards"]
    return only


def answered(done: Done) -> list[dict[str, Any]]:
    """The answers in `run --json`'s lines, without what differs between machines and runs."""
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return [{k: v for k, v in line.items() if k not in ("latency_ms", "input")} for line in lines]


def test_one_that_is_started_by_hand_tells_how_to_log_in_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    with arm.or_skip():
        layers(ready=False)
        register()
    program = subprocess.Popen(
        [sys.executable, str(arm.CHECKOUT / "bench/arm/board.py"), "rpi4", "bare"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with program:
        assert program.stdout is not None
        ssh, agent, add, key = (program.stdout.readline().strip() for _ in range(4))
        logged_in = subprocess.run([*shlex.split(ssh), "true"], check=False)
        program.send_signal(signal.SIGTERM)
    assert (logged_in.returncode, program.returncode) == (0, 0)
    assert f"ssh-add {tmp_path}/" in agent
    assert add.startswith("edgeexit hosts add rpi4 pi@127.0.0.1:")
    assert key.startswith("its host key: SHA256:")
    assert not list(tmp_path.iterdir())


def test_the_board_had_nothing_but_python(said: dict[str, Done]) -> None:
    assert "No module named 'numpy'" in said["python"].stderr


def test_setup_puts_edgeexit_there(said: dict[str, Done]) -> None:
    assert said["hosts"].returncode == 0, said["hosts"].stderr
    assert row(said["setup"])["status"] == "done"


def test_a_profile_comes_back_and_says_that_the_board_is_emulated(
    said: dict[str, Done], laptop: Laptop
) -> None:
    profile = Profile.load(laptop.home / "profile.json")

    assert said["profile"].returncode == 6, said["profile"].stderr
    assert profile.device == laptop.place.device
    assert profile.emulated == laptop.place.emulated
    assert profile.verdict.status == "emulated"
    assert set(laptop.on_board("ls", ".local/share/edgeexit/results").stdout.split()) <= {"lock"}


def test_what_is_deployed_runs_and_answers_as_on_the_laptop(said: dict[str, Done]) -> None:
    assert row(said["deploy"])["status"] == "done"
    assert answered(said["run first"]) == answered(said["first here"])
    assert {line["exit"] for line in answered(said["run first"])} > {0}


def test_the_next_release_runs_until_it_is_taken_back(said: dict[str, Done]) -> None:
    assert row(said["deploy second"])["status"] == "done"
    assert answered(said["run second"]) == answered(said["second here"])
    assert row(said["rollback"])["status"] == "done"
    assert answered(said["run back"]) == answered(said["first here"])
    assert answered(said["first here"]) != answered(said["second here"])


def test_the_board_has_no_way_to_the_internet(said: dict[str, Done], laptop: Laptop) -> None:
    devices, _, routes = said["network"].stdout.partition("Iface")
    names = tuple(line.split(":")[0].strip() for line in devices.splitlines()[2:])

    assert set(names) <= {*laptop.place.network, "sit0"}
    assert "lo" in names
    if laptop.place.network == ("lo",):
        assert len(routes.splitlines()) == 1

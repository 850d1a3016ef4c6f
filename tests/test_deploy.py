"""`edgeexit deploy` and `rollback` as they are typed: rows, documents, exit codes, second runs."""

import getpass
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from small import small_bundle
from sshd import Board, boards, laptop
from test_remote_delivery import not_set_up
from test_remote_profiling import install

pytest.importorskip("asyncssh")

from faulty_link import FaultyLink

from edgeexit.agent.delivery import LOCK
from edgeexit.bundle import Bundle
from edgeexit.children import environment
from edgeexit.cli import entry
from edgeexit.locks import hold
from edgeexit.policy import Policy
from edgeexit.releases import Releases

__all__ = ["boards", "laptop"]

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))
import fleet as bench

Captured = pytest.CaptureFixture[str]
Make = Callable[..., Board]


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """A bundle with a policy, the only one in the current folder."""
    monkeypatch.chdir(tmp_path)
    made = small_bundle(tmp_path)
    Policy.forced(made, exit="exit0", kept=made.exits).save(made.policy_path("host"))
    return made


@pytest.fixture
def fleet(boards: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Board]:
    """Three boards of the label lab, in hosts.toml."""
    found = {f"pi{k}": install(boards()) for k in range(3)}
    lines = ["format = 1"]
    for name, board in found.items():
        lines += [f"[hosts.{name}]", 'host = "127.0.0.1"', f"port = {board.port}"]
        lines += [f'user = "{getpass.getuser()}"', f'host_key = "{board.key}"', 'labels = ["lab"]']
    (tmp_path / "hosts.toml").write_text("\n".join(lines) + "\n")
    return found


def asked(capsys: Captured, *argv: str) -> tuple[int, dict[str, Any]]:
    """The exit code and the document of a command."""
    code = entry([*argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def statuses(document: dict[str, Any]) -> list[str]:
    return [row["status"] for row in document["boards"]]


def running(boards: Sequence[Board]) -> set[str | None]:
    return {Releases(board.home, "small").current_id() for board in boards}


def test_one_command_serves_all_boards_and_a_second_only_those_that_failed(
    bundle: Bundle, fleet: dict[str, Board], capsys: Captured
) -> None:
    not_set_up(fleet["pi1"])

    assert entry(["deploy", "--label", "lab"]) == 5
    said = capsys.readouterr()
    rows = {line.split()[0]: line for line in said.out.splitlines()}
    assert {name: row.split()[1] for name, row in rows.items()} == {
        "pi0": "done",
        "pi1": "failed",
        "pi2": "done",
    }
    assert "policy host" in rows["pi0"] and "none of " in rows["pi0"]
    assert "not installed" in rows["pi1"] and "pi1: edgeexit setup pi1" in said.err
    assert "3 boards: 2 done, 1 failed" in said.err

    (fleet["pi1"].home / "env" / "current").symlink_to("1")
    code, document = asked(capsys, "deploy", "--label", "lab")
    assert code == document["exit_code"] == 0
    assert statuses(document) == ["unchanged", "done", "unchanged"]
    assert running(list(fleet.values())) == {document["release"]}
    assert document["app"] == "small"

    code, document = asked(capsys, "deploy", "--status", "--label", "lab")
    assert code == 0
    assert [row["facts"]["apps"][0]["app"] for row in document["boards"]] == ["small"] * 3
    assert entry(["deploy", "--status", "--host", "pi0"]) == 0
    assert "small " in capsys.readouterr().out

    assert entry(["rollback", "--app", "small", "--host", "pi0"]) == 2
    said = capsys.readouterr()
    assert "small: no previous release" in said.out


def test_a_canary_that_fails_leaves_the_others_alone(
    bundle: Bundle, fleet: dict[str, Board], capsys: Captured
) -> None:
    with hold(fleet["pi0"].home / LOCK, "this board"):
        code, document = asked(capsys, "deploy", "--label", "lab", "--canary", "1")

    assert code == 8
    assert statuses(document) == ["failed", "skipped", "skipped"]
    assert running(list(fleet.values())) == {None}


def test_too_many_failures_stop_what_has_not_begun(
    bundle: Bundle, fleet: dict[str, Board], capsys: Captured
) -> None:
    for name in ("pi0", "pi1"):
        not_set_up(fleet[name])

    argv = ["deploy", "--label", "lab", "--limit", "1", "--max-failures"]
    assert statuses(asked(capsys, *argv, "0")[1]) == ["failed", "skipped", "skipped"]
    assert statuses(asked(capsys, *argv, "34%")[1]) == ["failed", "failed", "skipped"]
    code, document = asked(capsys, *argv, "2")
    assert (code, statuses(document)) == (5, ["failed", "failed", "done"])


def test_a_tampered_bundle_is_refused_before_any_board_is_asked(
    bundle: Bundle, fleet: dict[str, Board], capsys: Captured
) -> None:
    path = bundle.path / "model.tflite"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    assert entry(["deploy", "--label", "lab"]) == 3
    assert "altered" in capsys.readouterr().err
    assert "Accepted" not in "".join(board.log for board in fleet.values())


def test_deploy_and_rollback_on_this_very_machine(
    bundle: Bundle, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXIT_HOME", str(tmp_path / "board"))
    usual = signal.getsignal(signal.SIGINT)
    code, first = asked(capsys, "deploy", "--here")
    assert signal.getsignal(signal.SIGINT) is usual
    assert (code, statuses(first)) == (0, ["done"])
    bundle.policy_path("host").unlink()
    code, second = asked(capsys, "deploy", "--here", "--dry-run")
    assert (code, statuses(second)) == (0, ["done"]) and second["dry_run"]
    assert asked(capsys, "deploy", "--here")[0] == 0

    code, back = asked(capsys, "rollback", "--here", "--app", "small")

    assert code == 0
    assert back["boards"][0]["facts"]["release"] == first["release"]
    assert Releases(tmp_path / "board", "small").current_id() == first["release"]


def test_a_dry_run_without_boards_tells_what_the_bundle_is(
    bundle: Bundle, capsys: Captured
) -> None:
    code, document = asked(capsys, "deploy", "--dry-run", "--app", "door")

    assert code == 0
    assert (document["app"], document["devices"]) == ("door", ["host"])
    assert len(document["release"]) == 16
    assert entry(["deploy", "--dry-run"]) == 0
    assert document["release"] in capsys.readouterr().out


def interrupted(command: Sequence[str], begun: Callable[[], bool]) -> int:
    """The exit code of `edgeexit COMMAND` that gets Ctrl-C once *begun*."""
    argv = [sys.executable, "-P", "-m", "edgeexit", *command]
    with subprocess.Popen(argv, env=environment()) as process:
        deadline = time.monotonic() + 30
        while not begun() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        return process.wait(20)


def test_ctrl_c_frees_the_board_and_the_same_command_goes_on(
    bundle: Bundle, fleet: dict[str, Board], capsys: Captured, tmp_path: Path
) -> None:
    big = str(small_bundle(tmp_path / "big", training_bloom=os.urandom(300_000)).path)
    home = fleet["pi0"].home
    with FaultyLink(fleet["pi0"].port) as link:
        link.rate = 50_000
        key, user = fleet["pi0"].key, getpass.getuser()
        text = f'[hosts.slow]\nhost = "127.0.0.1"\nport = {link.port}\nuser = "{user}"\n'
        with Path("hosts.toml").open("a") as hosts:
            hosts.write(f'{text}host_key = "{key}"\n')
        command = ["deploy", big, "--host", "slow"]

        def is_a_third_there() -> bool:
            with suppress(FileNotFoundError):  # a small one that is whole meanwhile
                return any(part.stat().st_size > 100_000 for part in home.glob("blobs/*.part"))
            return False

        assert interrupted(command, is_a_third_there) == 130

    deadline = time.monotonic() + 20
    while (code := entry(["deploy", big, "--host", "pi0"])) == 8:
        assert time.monotonic() < deadline
    assert code == 0
    assert "sent 0.3 MB" not in capsys.readouterr().out


def test_ctrl_c_in_the_selftest_of_this_machine_is_no_failed_selftest(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    home = tmp_path / "board"
    monkeypatch.setenv("EDGEEXIT_HOME", str(home))
    state = home / "apps" / "small" / "state.json"

    def is_tested() -> bool:
        return state.exists() and '"what": "check"' in state.read_text()

    assert interrupted(["deploy", str(bundle.path), "--here"], is_tested) == 130
    assert not Releases(home, "small").status().bad
    assert entry(["deploy", "--here"]) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "no board named"),
        (["--host", "pi9"], "no host named 'pi9'"),
        (["--label", "attic"], "no label named 'attic'"),
        (["--here", "--host", "pi0"], "--here is this machine"),
        (["--status", "--force", "--here"], "--status only looks"),
        (["--host", "a@b", "--max-failures", "some"], "'some': expected a count"),
        (["--app", "../x", "--host", "pi0"], "not a name that a folder can have"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    bundle: Bundle,
    laptop: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    said: str,
) -> None:
    (Path.cwd() / "hosts.toml").write_text('format = 1\n[hosts.pi0]\nhost = "pi"\n')
    monkeypatch.setenv("EDGEEXIT_HOME", str(Path.cwd() / "board"))

    assert entry(["deploy", *argv]) == 2
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
    assert not (Path.cwd() / "board").exists()


def test_a_board_needs_no_ssh_package_to_deploy_on_itself(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And on a laptop without them the next step is told."""
    monkeypatch.setenv("EDGEEXIT_HOME", str(tmp_path / "board"))
    code = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("asyncssh", "tomlkit"):
            raise ModuleNotFoundError("no module named " + name, name=name)
sys.meta_path.insert(0, Wall())
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name: None if name in ("asyncssh", "tomlkit") else real(name)
from edgeexit.cli import entry
assert entry(["deploy", "--here"]) == 0
assert entry(["deploy", "--here", "--status"]) == 0
for words in ("setup", "uninstall", "doctor --host", "service status --host", "deploy --host"):
    assert entry([*words.split(), "pi@nowhere"]) == 2
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    for command_path in ("setup", "uninstall", "doctor", "service status", "deploy"):
        assert f"edgeexit {command_path} needs ssh" in done.stderr
    assert done.stderr.count('pip install "edgeexit[ssh]"') == 5


def test_no_key_material_is_ever_shown(
    bundle: Bundle, fleet: dict[str, Board], laptop: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Not in rows, documents, hints or a debugged run; of keys only fingerprints may be seen."""
    hosts = Path("hosts.toml")
    hosts.write_text(hosts.read_text().replace(fleet["pi0"].key, fleet["pi1"].key))
    os.environ["EDGEEXIT_DEBUG"] = "1"
    try:
        for more in ([], ["--json"], ["--dry-run"], ["--status"]):
            words = ["deploy", "--label", "lab", *more]
            assert entry(words) == 5
    finally:
        del os.environ["EDGEEXIT_DEBUG"]
    captured = capfd.readouterr()
    shown = captured.out + captured.err

    assert "pi0" in shown and "PRIVATE" not in shown
    for path in (laptop / ".ssh").glob("id_*"):
        for line in path.read_text().splitlines():
            words = [word for word in line.split() if len(word) > 20]
            assert not any(word in shown for word in words), path


def test_with_two_of_three_boards_broken_the_other_is_served_and_the_two_are_named(
    tmp_path: Path,
) -> None:
    """The bench in small: it asserts on rows and exit codes of all its runs."""
    figures = bench.measure(3, 8, 2, tmp_path)

    assert list(figures["broken"]) == ["board01", "board02"]


@pytest.mark.slow
def test_every_fault_has_its_row_and_its_exit_code(tmp_path: Path) -> None:
    figures = bench.measure(2 + len(bench.FAULTS), 8, len(bench.FAULTS), tmp_path)

    assert len(figures["broken"]) == len(bench.FAULTS)

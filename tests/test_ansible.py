"""The Ansible role, run by the real ansible-playbook against real sshd on loopback."""

import getpass
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small import small_bundle
from sshd import Board, boards, laptop
from test_agent_delivery import with_other_answers

pytest.importorskip("ansible")

__all__ = ["boards", "laptop"]

ROLE = Path(__file__).parent.parent / "ansible"
Play = Callable[..., "Played"]


class Played:
    """How a play ended: its exit code, its text, and the counts of its recap by board."""

    def __init__(self, code: int, text: str) -> None:
        self.code, self.text = code, text
        recap = text.rpartition("PLAY RECAP")[2]
        self.counts = {
            line.split()[0]: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", line)}
            for line in recap.splitlines()
            if "ok=" in line
        }


@pytest.fixture
def play(laptop: Path, boards: Callable[..., Board], tmp_path: Path) -> Iterator[Play]:
    """Run ansible/deploy.yml with a bundle on two boards of which each has its own folder."""
    fleet = {"board0": boards()}
    program = shutil.which("edgeexit", path=str(Path(sys.executable).parent))
    known = laptop / ".ssh" / "known_hosts"
    known.write_text("".join(f"[127.0.0.1]:{b.port} {b.key}\n" for b in fleet.values()))
    inventory = tmp_path / "inventory.ini"
    rows = [
        f"{name} ansible_host=127.0.0.1 ansible_port={board.port} ansible_user={getpass.getuser()}"
        for name, board in fleet.items()
    ]
    options = {
        "ansible_ssh_private_key_file": laptop / ".ssh" / "id_ed25519",
        "ansible_ssh_common_args": f"'-o UserKnownHostsFile={known}'",
        "ansible_python_interpreter": sys.executable,
        "edgeexit_command": program,
        "edgeexit_controller_command": program,
    }
    settings = [f"{key}={value}" for key, value in options.items()]
    inventory.write_text("\n".join(["[boards]", *rows, "[boards:vars]", *settings, ""]))

    # Short: a path below pytest's folders is too long for a socket.
    sockets = tempfile.mkdtemp(prefix="edgeexit-", dir="/tmp")

    def run(bundle: Path, *more: str) -> Played:
        command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", str(inventory)]
        command += [str(ROLE / "deploy.yml"), "-e", f"edgeexit_bundle={bundle}", *more]
        command += ["-e", '{"edgeexit_serial": 2}']
        # Into a file: the kept connections would hold a pipe open.
        with (tmp_path / "played.txt").open("w+b") as out:
            code = subprocess.call(
                command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=tmp_path,
                env={
                    **os.environ,
                    "LC_ALL": "C.UTF-8",
                    "ANSIBLE_SSH_CONTROL_PATH_DIR": sockets,
                    "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=20",
                    "ANSIBLE_PIPELINING": "1",
                    "ANSIBLE_HOME": str(tmp_path / "ansible"),
                    "ANSIBLE_NOCOLOR": "1",
                    "ANSIBLE_DEPRECATION_WARNINGS": "0",
                },
            )
        return Played(code, (tmp_path / "played.txt").read_text())

    run.fleet = fleet  # type: ignore[attr-defined]
    yield run
    shutil.rmtree(sockets, ignore_errors=True)


def tree(folder: Path) -> dict[str, object]:
    """Every file, link and time below *folder*."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in folder.rglob("*")
    }


def test_check_changes_nothing_a_run_deploys_a_second_one_changes_nothing(
    play: Play, tmp_path: Path
) -> None:
    bundle = small_bundle(tmp_path)
    fleet = play.fleet  # type: ignore[attr-defined]

    checked = play(bundle.path, "--check")
    assert checked.code == 0, checked.text
    assert all(counts["changed"] for counts in checked.counts.values())
    assert not any(board.home.exists() for board in fleet.values())

    done = play(bundle.path)
    assert done.code == 0, done.text
    for board in fleet.values():
        current = board.home / "apps" / "small" / "current"
        assert (current / "bundle.json").read_bytes() == (bundle.path / "bundle.json").read_bytes()
        assert not list((board.home / "incoming").iterdir())

    before = {name: tree(board.home) for name, board in fleet.items()}
    again = play(bundle.path)
    assert again.code == 0, again.text
    assert [counts["changed"] for counts in again.counts.values()] == [0]
    assert {name: tree(board.home) for name, board in fleet.items()} == before
    assert (
        json.loads((fleet["board0"].home / "apps/small/state.json").read_text())["intent"] is None
    )


@pytest.mark.slow
def test_a_board_that_fails_the_selftest_keeps_what_ran_and_says_why(
    play: Play, tmp_path: Path
) -> None:
    bundle = small_bundle(tmp_path)
    board = play.fleet["board0"]  # type: ignore[attr-defined]
    assert play(bundle.path).code == 0
    before = (board.home / "apps" / "small" / "current").resolve()
    with_other_answers(bundle)

    failed = play(bundle.path)

    assert failed.code != 0
    assert failed.counts["board0"]["failed"] == 1
    assert "logits differ by" in failed.text, failed.text
    assert (board.home / "apps" / "small" / "current").resolve() == before
    assert not list((board.home / "incoming").iterdir())


@pytest.mark.slow
def test_a_tampered_bundle_stops_the_play_on_the_controller(play: Play, tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    path = bundle.path / "model.tflite"
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    failed = play(bundle.path)

    assert failed.code != 0 and "altered" in failed.text
    assert not play.fleet["board0"].home.exists()  # type: ignore[attr-defined]

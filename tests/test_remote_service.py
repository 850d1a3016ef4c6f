"""`edgeexit service --host` over real sshd: as root, as a user, by sudo, or a line to type."""

import asyncio
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("asyncssh")

from edgeexit.cli import entry
from edgeexit.errors import DeviceError
from edgeexit.remote.service import ask
from tests.sshd import Board, boards, laptop

__all__ = ["boards", "laptop"]

Boards = Callable[..., Board]
ECHO = 'echo "$EDGEEXIT_HOME $*"'


def test_root_is_asked_as_it_is_and_its_exit_code_is_ours(boards: Boards) -> None:
    board = boards()
    board.program(f"{ECHO}; exit 5")
    done = asyncio.run(ask(board.host(), ["status", "--app", "a b"], as_root=True))

    assert (done.code, done.out) == (5, f"{board.home} service status --app a b\n".encode())


def test_a_user_s_unit_needs_no_sudo(boards: Boards) -> None:
    board = boards(user="pi")
    board.program(ECHO)
    words = ["install", "--user-unit", "camera:"]

    done = asyncio.run(ask(board.host(), words, as_root=False))
    assert done.out == f"{board.home} service install --user-unit camera:\n".encode()


def test_where_sudo_wants_a_password_the_hint_is_the_line_that_asks_for_it(boards: Boards) -> None:
    board = boards(user="pi")
    board.program(ECHO)
    sudo = board.folder / "bin" / "sudo"
    sudo.parent.mkdir()
    sudo.write_text("#!/bin/sh\necho 'sudo: a password is required' >&2; exit 1\n")
    sudo.chmod(0o755)
    (board.folder / ".bashrc").write_text(f"PATH={sudo.parent}:$PATH\n")
    words = ["install", "watch:/srv/my pictures", "--", "--rate", "5"]
    with pytest.raises(DeviceError, match="pi: sudo wants a password there") as caught:
        asyncio.run(ask(board.host(), words, as_root=True))

    typed = shlex.split(caught.value.hint or "")
    assert typed[:5] == ["ssh", "-t", "-p", str(board.port), "pi@127.0.0.1"]
    program = str(board.home / "env" / "current" / "bin" / "edgeexit")
    named = ["sudo", "env", f"EDGEEXIT_HOME={board.home}", program, "service", *words]
    assert shlex.split(typed[5]) == named


def test_a_board_without_sudo_is_told_so(boards: Boards) -> None:
    board = boards(user="pi")
    board.program(ECHO)
    programs = board.folder / "bin"
    programs.mkdir()
    for name in ("sh", "bash", "id", "env", "cat", "readlink", "test", "printf"):
        (programs / name).symlink_to(f"/bin/{name}")
    (board.folder / ".bashrc").write_text(f"PATH={programs}\n")
    with pytest.raises(DeviceError, match="pi: no sudo there, and pi is not root") as caught:
        asyncio.run(ask(board.host(), ["install", "camera:"], as_root=True))

    assert "--user-unit" in (caught.value.hint or "")


def test_a_board_without_edgeexit_is_told_so(boards: Boards) -> None:
    with pytest.raises(DeviceError, match="edgeexit is not installed there") as caught:
        asyncio.run(ask(boards().host(), ["status"], as_root=False))

    assert caught.value.hint == "edgeexit setup pi"


def test_what_the_board_refuses_is_shown(
    boards: Boards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    board = boards()
    board.program("echo 'Error: no app named x' >&2; exit 2")
    hosts = tmp_path / "hosts.toml"
    hosts.write_text(
        f'format = 1\n[hosts.pi]\nhost = "127.0.0.1"\nuser = "{board.user}"\n'
        f'port = {board.port}\nhost_key = "{board.key}"\n'
    )
    hosts.chmod(0o600)
    monkeypatch.setenv("EDGEEXIT_HOSTS", str(hosts))

    assert entry(["service", "uninstall", "--app", "x", "--host", "pi"]) == 2
    assert "Error: pi: no app named x" in capsys.readouterr().err

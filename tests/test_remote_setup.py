"""
From only Python to a board that answers, over real ssh on loopback; and what can be in the way.

The wheels are real and come from the registry (once for this file); the board is this machine.
ARM boards: tests/test_arm_setup.py.
"""

import asyncio
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("asyncssh")

from faulty_link import FaultyLink
from sshd import Board, boards, laptop
from test_remote_onboard import tree

from edgeexit.cli import entry
from edgeexit.errors import DeviceError, EdgeExitError
from edgeexit.remote import setup, wheelhouse
from edgeexit.remote.fan import Outcome
from edgeexit.remote.hosts import Host
from edgeexit.remote.link import LinkLost
from edgeexit.remote.setup import Stock, Wish, set_up
from edgeexit.remote.wheelhouse import Wheel, own_wheel

__all__ = ["boards", "laptop"]

Boards = Callable[..., Board]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of wheels for all tests of this file."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ours(kept: Path) -> Wheel:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(kept))
        return own_wheel()


@pytest.fixture(autouse=True)
def cache(kept: Path, ours: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    monkeypatch.setattr(wheelhouse, "own_wheel", lambda on_step: ours)


def host_of(board: Board, **changes: Any) -> Host:
    values = {
        "name": "pc",
        "address": "127.0.0.1",
        "user": board.user,
        "port": board.port,
        "host_key": board.key,
        **changes,
    }
    return Host(**values)


def run(host: Host, wish: Wish | None = None) -> Outcome:
    async def work() -> Outcome:
        return await set_up(host, Stock(wish or Wish()))

    return asyncio.run(work())


def hosts_toml(folder: Path, **made: Board) -> dict[str, str]:
    """A hosts.toml with these boards, as the environment that names it."""
    lines = ["format = 1"]
    for name, board in made.items():
        lines += [f"[hosts.{name}]", 'host = "127.0.0.1"', f'user = "{board.user}"']
        lines += [f"port = {board.port}", 'labels = ["lab"]', f'host_key = "{board.key}"']
    path = folder / "hosts.toml"
    path.write_text("\n".join(lines) + "\n")
    return {"EDGEEXIT_HOSTS": str(path)}


def test_a_pc_is_set_up_once_asked_mended_and_cleared(
    boards: Boards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    board = boards()
    for name, value in hosts_toml(tmp_path, pc=board).items():
        monkeypatch.setenv(name, value)

    def edgeexit(*arguments: str) -> tuple[int, Any]:
        code = entry(arguments)
        out, err = capfd.readouterr()
        assert "a bug" not in err
        return code, json.loads(out) if out.startswith("{") else out + err

    code, text = edgeexit("doctor", "--host", "pc")
    assert (code, "edgeexit setup pc" in text) == (DeviceError.exit_code, True)

    # The link breaks in the upload: nothing is there but uploads, and the next call goes on.
    with FaultyLink(board.port) as link:
        link.cut_after = 12_000_000
        with pytest.raises(LinkLost):
            run(host_of(board, port=link.port))
    assert not (board.home / "env").exists()
    code, first = edgeexit("setup", "pc", "--json")
    row = first["boards"][0]
    assert (code, row["status"], row["error"]) == (0, "done", None)
    total_mb = sum(path.stat().st_size for path in (board.home / "blobs").iterdir()) / 1e6
    assert 1 < row["facts"]["sent_mb"] < total_mb - 8
    assert row["facts"]["runtime"].startswith("ai-edge-litert 2.")
    assert row["facts"]["selftest"].startswith("ok, ")
    assert row["facts"]["doctor"]["problems"] >= 0
    env = board.home / "env" / row["facts"]["environment"]
    before = tree(env)

    # It needs nothing of this machine's environment.
    program = board.home / "env/current/bin/edgeexit"
    argv = [program, "devices", "which", "--json"]
    done = subprocess.run(argv, env={}, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert "emulated" in json.loads(done.stdout)

    code, text = edgeexit("setup", "--label", "lab")
    assert (code, "unchanged" in text) == (0, True), text
    assert tree(env) == before

    code, document = edgeexit("doctor", "--host", "pc", "--quick", "--json")
    assert {f["name"] for f in document["findings"]} >= {"runtime", "numpy", "wall clock"}
    assert code in (0, DeviceError.exit_code)

    (damaged,) = env.glob("lib/python*/site-packages/edgeexit/runtime.py")
    damaged.write_bytes(damaged.read_bytes()[:100])
    code, again = edgeexit("setup", "pc", "--json")
    assert (code, again["boards"][0]["status"]) == (0, "done")
    assert again["boards"][0]["facts"]["sent_mb"] == 0
    assert len(damaged.read_bytes()) > 100

    code, text = edgeexit("uninstall", "pc", "--all", "--json")
    assert (code, "--yes" in text) == (2, True)
    code, text = edgeexit("uninstall", "pc", "--all")
    assert (code, "no terminal to ask" in text) == (2, True)
    code, text = edgeexit("uninstall", "pc", "--all", "--dry-run")
    assert (code, " in blobs" in text, "env/current" in text) == (0, True, True), text
    code, document = edgeexit("uninstall", "pc", "--all", "--yes", "--json")
    assert (code, document["boards"][0]["status"]) == (0, "done")
    assert not board.home.exists()
    code, document = edgeexit("uninstall", "pc", "--all", "--yes", "--json")
    assert (code, document["boards"][0]["status"]) == (0, "unchanged")


def refusal(board: Board, wish: Wish | None = None) -> EdgeExitError:
    with pytest.raises(EdgeExitError) as refused:
        run(host_of(board), wish)
    assert str(refused.value).startswith("pc: ")
    assert str(refused.value).isprintable()
    assert refused.value.hint
    return refused.value


def test_a_file_where_the_folder_should_be_is_a_clear_refusal(boards: Boards) -> None:
    board = boards()
    board.home.write_text("mine")

    assert refusal(board).exit_code in (DeviceError.exit_code, 11)
    assert board.home.read_text() == "mine"


@pytest.mark.parametrize(
    ("shell", "said"),
    [
        ("echo This account is closed.; exit 1", "This account is closed."),
        ("exit 0", "it said nothing"),
    ],
)
def test_a_board_whose_shell_is_none_is_quoted(boards: Boards, shell: str, said: str) -> None:
    refused = refusal(boards(settings=(f"ForceCommand {shell}",)))

    assert said in str(refused)
    assert refused.exit_code == DeviceError.exit_code


def test_without_a_registry_the_way_by_a_folder_is_shown(
    boards: Boards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_RETRIES", "1")

    assert "--wheels DIR" in str(refusal(boards()).hint)


def test_many_boards_share_one_fetching_and_broken_ones_stop_none(
    boards: Boards,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    made = {"sound": boards(), "deaf": boards(sftp=None), "gone": boards()}
    made["gone"].stop()
    for name, value in hosts_toml(tmp_path, **made).items():
        monkeypatch.setenv(name, value)
    fetched = []
    real = setup.wheels_for
    monkeypatch.setattr(setup, "wheels_for", lambda *a, **k: fetched.append(a) or real(*a, **k))

    code = entry(["setup", "--label", "lab", "--json"])

    out, err = capfd.readouterr()
    rows = {row["host"]: row for row in json.loads(out)["boards"]}
    assert {name: row["status"] for name, row in rows.items()} == {
        "sound": "done",
        "deaf": "failed",
        "gone": "failed",
    }
    assert "no sftp there" in rows["deaf"]["error"]
    assert "sshd_config" in err
    assert code == DeviceError.exit_code
    assert len(fetched) == 1

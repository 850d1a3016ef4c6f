"""Facts about hosts.toml, names on the command line, pinned keys, and `edgeexit hosts`."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tomlkit")
pytest.importorskip("asyncssh")

import edgeexit
from edgeexit import cli
from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.remote.hosts import Host, Hosts, chosen, fingerprint, parse_address
from tests.sshd import Board, boards, laptop, make_key, public

__all__ = ["boards", "laptop"]

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl"
GOOD = f"""
# our boards
format = 1

[hosts.rpi4]  # the one on the shelf
host = "raspberrypi.local"
user = "pi"
port = 22
device = "rpi4"
labels = ["lab", "all"]
host_key = "{KEY}"

[hosts.zero]
host = "10.0.0.7"
labels = ["all"]
"""


def written(folder: Path, text: str) -> Hosts:
    path = folder / "hosts.toml"
    path.write_text(text)
    return Hosts.read(path)


def test_a_file_is_read_with_all_it_says(tmp_path: Path) -> None:
    found = written(tmp_path, GOOD)

    assert found.all == (
        Host(
            name="rpi4",
            address="raspberrypi.local",
            user="pi",
            port=22,
            device="rpi4",
            labels=("lab", "all"),
            host_key=KEY,
        ),
        Host(name="zero", address="10.0.0.7", labels=("all",)),
    )
    assert found.find("zero").destination == "10.0.0.7"
    assert found.find("rpi4").destination == "-p 22 pi@raspberrypi.local"


def test_no_file_means_no_boards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEEXIT_HOSTS", str(tmp_path / "mine.toml"))

    assert Hosts.read().all == ()
    assert Hosts.read().path == tmp_path / "mine.toml"


def test_adding_and_removing_keep_comments_and_the_file_private(tmp_path: Path) -> None:
    found = written(tmp_path, GOOD)

    added = found.add(Host(name="pi5", address="pi5.lan", port=2222, labels=("lab",)))
    text = found.path.read_text()

    assert [host.name for host in added.all] == ["rpi4", "zero", "pi5"]
    assert "# our boards" in text
    assert "# the one on the shelf" in text
    assert stat.S_IMODE(found.path.stat().st_mode) == 0o600
    assert added.remove("pi5").remove("zero").all == found.all[:1]
    assert "# the one on the shelf" in found.path.read_text()


def test_adding_a_known_name_puts_it_in_the_place_of_the_old_one(tmp_path: Path) -> None:
    found = written(tmp_path, GOOD)

    changed = found.add(Host(name="rpi4", address="elsewhere"))

    assert changed.all == (Host(name="rpi4", address="elsewhere"), found.all[1])


def test_the_first_board_makes_the_file(tmp_path: Path) -> None:
    board = Host(name="a", address="1.2.3.4", host_key=KEY)

    Hosts.read(tmp_path / "new" / "hosts.toml").add(board)

    assert Hosts.read(tmp_path / "new" / "hosts.toml").all == (board,)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["hosts.toml"]


def test_what_another_command_added_meanwhile_stays(tmp_path: Path) -> None:
    early = Hosts.read(tmp_path / "hosts.toml")
    early.add(Host(name="a", address="1.2.3.4"))

    assert [host.name for host in early.add(Host(name="b", address="1.2.3.4")).all] == ["a", "b"]


HOSTILE = {
    "truncated": GOOD[:80],
    "no TOML": "hosts = [",
    "binary": "\x00\x01",
    "no format": "[hosts]",
    "later format": "format = 2",
    "format is text": 'format = "1"',
    "hosts is a list": "format = 1\nhosts = []",
    "host is a text": 'format = 1\n[hosts]\na = "pi@b"',
    "no address": "format = 1\n[hosts.a]\nuser = 'pi'",
    "address is a number": "format = 1\n[hosts.a]\nhost = 7",
    "misspelt key": "format = 1\n[hosts.a]\nhost = 'b'\nusr = 'pi'",
    "unknown table": "format = 1\n[boards.a]\nhost = 'b'",
    "twice": "format = 1\n[hosts.a]\nhost = 'b'\n[hosts.a]\nhost = 'c'",
    "port 0": "format = 1\n[hosts.a]\nhost = 'b'\nport = 0",
    "port too large": "format = 1\n[hosts.a]\nhost = 'b'\nport = 65536",
    "port is true": "format = 1\n[hosts.a]\nhost = 'b'\nport = true",
    "labels is a text": "format = 1\n[hosts.a]\nhost = 'b'\nlabels = 'lab'",
    "labels of numbers": "format = 1\n[hosts.a]\nhost = 'b'\nlabels = [1]",
    "an option as address": "format = 1\n[hosts.a]\nhost = '-oProxyCommand=x'",
    "a shell in the address": "format = 1\n[hosts.a]\nhost = 'b;reboot'",
    "an option as user": "format = 1\n[hosts.a]\nhost = 'b'\nuser = '-l'",
    "a blank in the user": "format = 1\n[hosts.a]\nhost = 'b'\nuser = 'p i'",
    "a path as name": "format = 1\n[hosts.'../a']\nhost = 'b'",
    "a cursor in the name": 'format = 1\n[hosts."\\u001b[2J"]\nhost = "b"',
    "a folder as device": "format = 1\n[hosts.a]\nhost = 'b'\ndevice = '/etc/passwd'",
    "key: one word": "format = 1\n[hosts.a]\nhost = 'b'\nhost_key = 'AAAA'",
    "key: no base64": "format = 1\n[hosts.a]\nhost = 'b'\nhost_key = 'ssh-ed25519 ä'",
    "key: cut off": f"format = 1\n[hosts.a]\nhost = 'b'\nhost_key = '{KEY[:28]}'",
    "key: other kind": f"format = 1\n[hosts.a]\nhost = 'b'\nhost_key = 'ssh-rsa {KEY[12:]}'",
    "private key": "format = 1\n[hosts.a]\nhost = 'b'\nhost_key = '''-----BEGIN\nOPENSSH'''",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_wrong_file_is_refused_in_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    with pytest.raises(BadFile) as caught:
        written(tmp_path, HOSTILE[case])

    assert str(caught.value).startswith(str(tmp_path / "hosts.toml"))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("target", ["nowhere.toml", "hosts.toml"])
def test_a_link_to_nothing_is_no_absent_file(tmp_path: Path, target: str) -> None:
    (tmp_path / "hosts.toml").symlink_to(target)

    with pytest.raises(UsageError, match=r"hosts\.toml"):
        Hosts.read(tmp_path / "hosts.toml")


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="at most"):
        written(tmp_path, "#" * (5 << 20))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_file_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(data)
    try:
        Hosts.read(path)
    except EdgeExitError as error:
        assert str(error)


ADDRESSES = {
    "pi@raspberrypi.local": ("pi", "raspberrypi.local", None),
    "pi@10.0.0.7:2222": ("pi", "10.0.0.7", 2222),
    "alias": (None, "alias", None),
    "pi@[fe80::1%eth0]:22": ("pi", "fe80::1%eth0", 22),
    "pi@[::1]": ("pi", "::1", None),
    "pi@::1": ("pi", "::1", None),
    "corp\\me@host": ("corp\\me", "host", None),
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_an_address_is_taken_apart(text: str) -> None:
    assert parse_address(text) == ADDRESSES[text]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "pi@",
        "pi@h:0",
        "pi@h:x",
        "pi@h:99999",
        "pi@h:",
        "pi@[::1]:",
        "pi@h:1_0",
        "pi@h:٢",
        "p i@h",
        "pi@-h",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_address(text)


def test_boards_are_chosen_by_name_label_or_address_each_once(tmp_path: Path) -> None:
    hosts = written(tmp_path, GOOD)

    assert [host.name for host in chosen(["zero"], ["lab"], hosts)] == ["zero", "rpi4"]
    assert [host.name for host in chosen(["rpi4", "rpi4"], ["all"], hosts)] == ["rpi4", "zero"]
    assert chosen(["me@there:24"], [], hosts) == [
        Host(name="me@there:24", address="there", user="me", port=24)
    ]


@pytest.mark.parametrize("text", ["pi@raspberrypi.local", "pi@raspberrypi.local:22"])
def test_the_address_of_a_known_board_is_that_board_with_its_pinned_key(
    tmp_path: Path, text: str
) -> None:
    hosts = written(tmp_path, GOOD)

    assert chosen([text], [], hosts) == [hosts.find("rpi4")]
    assert chosen(["root@raspberrypi.local"], [], hosts)[0].host_key is None


@pytest.mark.parametrize(
    ("names", "labels", "hint"),
    [
        (["rpi5"], [], "rpi4"),
        ([], ["lap"], "lab"),
        ([], [], "--host"),
        (["other"], [], "edgeexit hosts add other"),
        (["10.0.0.1"], [], "USER@ADDRESS"),
        ([], ["nobody"], "edgeexit hosts add NAME --label nobody"),
    ],
)
def test_an_unknown_name_or_label_is_told_with_the_next_step(
    tmp_path: Path, names: list[str], labels: list[str], hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        chosen(names, labels, written(tmp_path, GOOD))

    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("kind", ["ed25519", "ecdsa"])
def test_a_fingerprint_is_what_openssh_shows(tmp_path: Path, kind: str) -> None:
    key = make_key(tmp_path / "key", kind=kind)
    shown = subprocess.run(
        ["ssh-keygen", "-lf", str(key)], check=True, capture_output=True, text=True
    )

    assert fingerprint(public(key)) == shown.stdout.split()[1]


# `edgeexit hosts` on real servers


@pytest.fixture
def hosts_file(tmp_path: Path, laptop: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEEXIT_HOSTS", str(tmp_path / "hosts.toml"))
    return tmp_path / "hosts.toml"


def typed(capfd: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.entry(list(argv))
    out, err = capfd.readouterr()
    return code, out, err


def test_a_board_is_added_with_its_fingerprint_listed_checked_and_removed(
    boards: Callable[..., Board], hosts_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    board = boards()
    shown = fingerprint(board.key)
    where = f"127.0.0.1:{board.port}"

    added = typed(capfd, "hosts", "add", "pi", where, "--fingerprint", shown, "--label", "lab")
    listed = typed(capfd, "hosts", "list", "--json")
    checked = typed(capfd, "hosts", "check", "--json")
    removed = typed(capfd, "hosts", "remove", "pi")

    assert added == (0, f"pi: written into {hosts_file}, host key {shown}\n", "")
    assert json.loads(listed[1])["format"] == 1
    (entry,) = json.loads(listed[1])["hosts"]
    assert (entry["name"], entry["fingerprint"], entry["labels"]) == ("pi", shown, ["lab"])
    assert checked[0] == 0
    (row,) = json.loads(checked[1])["boards"]
    assert (row["status"], row["facts"]["key"]) == ("done", "pinned")
    assert row["facts"]["python"].startswith("3.")
    assert row["facts"]["edgeexit"] is None
    assert "edgeexit setup pi" in checked[2]
    assert removed[0] == 0
    assert Hosts.read(hosts_file).all == ()


def test_another_fingerprint_than_expected_writes_nothing(
    boards: Callable[..., Board], hosts_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    board, other = boards(), fingerprint(KEY)

    code, _, err = typed(
        capfd, "hosts", "add", "pi", f"127.0.0.1:{board.port}", "--fingerprint", other
    )

    assert code == 5
    assert fingerprint(board.key) in err
    assert other in err
    assert not hosts_file.exists()


def test_without_a_terminal_nothing_is_trusted_and_the_line_to_type_is_told(
    boards: Callable[..., Board],
    hosts_file: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = boards()
    monkeypatch.setattr(sys, "stdin", open(os.devnull))  # noqa: PTH123, SIM115

    words = ("pi", f"127.0.0.1:{board.port}", "--device", "rpi4", "--label", "lab")

    code, _, err = typed(capfd, "hosts", "add", *words)
    sys.stdin.close()

    assert code == 2
    line = f"edgeexit hosts add {' '.join(words)} --fingerprint {fingerprint(board.key)}"
    assert line in err
    assert not hosts_file.exists()


def test_a_key_that_ssh_knows_already_is_taken_and_another_shown_beside_it(
    boards: Callable[..., Board],
    hosts_file: Path,
    laptop: Path,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    board, other = boards(), public(make_key(tmp_path / "other"))
    known = laptop / ".ssh" / "known_hosts"
    known.write_text(f"[127.0.0.1]:{board.port} {other}\n")

    code, text = on_a_terminal(["hosts", "add", "pi", f"127.0.0.1:{board.port}"], "n")
    known.write_text(f"[127.0.0.1]:{board.port} {board.key}\n@revoked * {board.key}\n")
    revoked = typed(capfd, "hosts", "add", "pi", f"127.0.0.1:{board.port}")
    known.write_text(f"[127.0.0.1]:{board.port} {board.key}\n")
    taken = typed(capfd, "hosts", "add", "pi", f"127.0.0.1:{board.port}")

    assert code == 2
    assert f"known_hosts has: {fingerprint(other)}" in text
    assert revoked[0] == 2 and "is not confirmed" in revoked[2]
    assert taken[0] == 0
    assert Hosts.read(hosts_file).find("pi").host_key == board.key


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("n", 2), ("", 2)])
def test_on_a_terminal_it_asks(
    boards: Callable[..., Board], hosts_file: Path, answer: str, code: int
) -> None:
    board = boards()

    found, text = on_a_terminal(["hosts", "add", "pi", f"127.0.0.1:{board.port}"], answer)

    assert found == code
    assert fingerprint(board.key) in text
    assert hosts_file.exists() == (code == 0)


def on_a_terminal(argv: list[str], answer: str) -> tuple[int, str]:
    """Exit code and output of `edgeexit ARGV` whose user types *answer*."""
    import pty

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeexit", *argv], stdin=theirs, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    os.write(ours, answer.encode() + b"\n")
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:
        pass  # the other end is closed
    os.close(ours)
    return process.wait(20), text.decode()


def test_a_known_name_is_looked_at_anew_and_a_changed_key_shown_beside_the_old(
    boards: Callable[..., Board],
    hosts_file: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = boards()
    where, old = f"127.0.0.1:{board.port}", fingerprint(board.key)
    typed(capfd, "hosts", "add", "pi", where, "--fingerprint", old, "--label", "lab")
    same = typed(capfd, "hosts", "add", "pi", "--device", "rpi4")
    again = typed(capfd, "hosts", "add", "pi", where)

    board.stop()
    board.host_keys = (make_key(tmp_path / "another"),)
    board.start()
    new = fingerprint(board.key)
    refused = typed(capfd, "hosts", "check")
    code, text = on_a_terminal(["hosts", "add", "pi"], "y")

    assert same[0] == 0
    assert (again[0], "already" in again[2]) == (2, True)
    assert refused[0] == 5
    assert old in refused[1]
    assert new in refused[1]
    assert "edgeexit hosts add pi" in refused[2]
    assert (code, old in text, new in text) == (0, True, True)
    (host,) = Hosts.read(hosts_file).all
    assert (host.host_key, host.device, host.labels) == (board.key, "rpi4", ("lab",))


def test_a_board_that_takes_only_passwords_is_added_with_the_next_step(
    boards: Callable[..., Board], hosts_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    board = boards(settings=("PasswordAuthentication yes", "PubkeyAuthentication no"))

    code, out, err = typed(
        capfd,
        *("hosts", "add", "pi", f"root@127.0.0.1:{board.port}", "--json"),
        *("--fingerprint", fingerprint(board.key)),
    )

    document = json.loads(out)
    assert (code, document["login"]) == (0, False)
    assert document["hint"] == f"ssh-copy-id -p {board.port} root@127.0.0.1"
    assert "ssh-copy-id" in err


def test_an_unknown_device_is_refused_before_anything_is_connected_to(
    hosts_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, _, err = typed(capfd, "hosts", "add", "pi", "127.0.0.1:1", "--device", "rpi44")

    assert (code, "rpi4" in err) == (2, True)


def test_a_board_with_edgeexit_says_what_it_is(
    boards: Callable[..., Board], hosts_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    board, hosts = boards(), Hosts.read(hosts_file)
    package = Path(edgeexit.__file__).parent.parent
    board.program(f'PYTHONPATH={package} exec {sys.executable} -P -m edgeexit "$@"')
    hosts.add(Host(**{**vars(board.host()), "device": "rpi4"}))

    code, out, err = typed(capfd, "hosts", "check", "--json")

    (row,) = json.loads(out)["boards"]
    assert (code, row["status"]) == (0, "done")
    assert row["facts"]["edgeexit"] == edgeexit.__version__
    assert row["facts"]["device"] == "host"
    assert "hosts.toml calls it a rpi4, it is a host" in err


def test_of_several_boards_the_broken_one_is_named_and_the_others_answer(
    boards: Callable[..., Board], hosts_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    board, hosts = boards(), Hosts.read(hosts_file)
    hosts.add(Host(name="good", address="127.0.0.1", port=board.port, host_key=board.key))
    hosts.add(Host(name="gone", address="127.0.0.1", port=1, host_key=board.key))

    code, out, err = typed(capfd, "hosts", "check")

    assert code == 5
    rows = {line.split()[0]: line.split()[1] for line in out.splitlines()}
    assert rows == {"good": "done", "gone": "failed"}
    assert "Hint: gone" in err


def test_no_board_at_all_is_refused_with_words_that_every_command_knows() -> None:
    with pytest.raises(UsageError, match="no board named") as caught:
        chosen([], [], Hosts(Path("hosts.toml"), ()))
    # setup and uninstall take names as arguments, deploy and rollback behind --host.
    assert caught.value.hint == (
        "NAME or USER@ADDRESS (deploy and rollback: --host NAME), or --label LABEL"
    )

"""Facts about a link to a board, shown on real sshd on loopback."""

import asyncio
import gc
import json
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

pytest.importorskip("asyncssh")

from edgeexit import cli
from edgeexit.errors import (
    BadFile,
    Busy,
    DeviceError,
    EdgeExitError,
    SelfTestError,
    StorageError,
)
from edgeexit.remote.hosts import Host, fingerprint
from edgeexit.remote.link import Link, LinkLost, connect
from tests.faulty_link import FaultyLink
from tests.sshd import Board, boards, laptop, make_key, public

__all__ = ["boards", "laptop"]

T = TypeVar("T")
Boards = Callable[..., Board]


def over(host: Host, work: Callable[[Link], Awaitable[T]], *, timeout_s: float = 15) -> T:
    """What *work* makes of a link to *host*."""

    async def linked() -> T:
        async with connect(host, timeout_s=timeout_s) as link:
            return await work(link)

    return asyncio.run(linked())


async def nothing(link: Link) -> None:
    pass


def refused(host: Host, work: Callable[[Link], Awaitable[Any]] = nothing) -> EdgeExitError:
    """The refusal that *work* or already the link ends with: one printable line."""
    with pytest.raises(EdgeExitError) as caught:
        over(host, work)
    assert str(caught.value).isprintable()
    return caught.value


def configured(laptop: Path, text: str) -> None:
    (laptop / ".ssh" / "config").write_text(text)


def trusted(laptop: Path, *boards: Board) -> None:
    lines = [f"[127.0.0.1]:{board.port} {board.key}\n" for board in boards]
    (laptop / ".ssh" / "known_hosts").write_text("".join(lines))


# Whom we trust


def test_a_key_that_nobody_knows_is_refused_with_its_fingerprint(boards: Boards) -> None:
    board = boards()

    error = refused(board.host(host_key=None))
    ad_hoc = refused(board.host(host_key=None, name=f"root@127.0.0.1:{board.port}"))

    assert fingerprint(board.key) in str(error)
    assert (error.exit_code, error.hint) == (5, "edgeexit hosts add pi")
    assert ad_hoc.hint == f"edgeexit hosts add NAME root@127.0.0.1:{board.port}"


@pytest.mark.parametrize("is_hashed", [False, True])
def test_a_key_of_known_hosts_is_trusted(boards: Boards, laptop: Path, is_hashed: bool) -> None:
    board = boards()
    trusted(laptop, board)
    if is_hashed:
        known = str(laptop / ".ssh" / "known_hosts")
        subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)

    over(board.host(host_key=None), nothing)


def test_a_changed_key_is_told_with_both_fingerprints_and_what_to_do(
    boards: Boards, laptop: Path, tmp_path: Path
) -> None:
    board, old = boards(), make_key(tmp_path / "old")
    known = f"[127.0.0.1]:{board.port} {public(old)}\n"
    (laptop / ".ssh" / "known_hosts").write_text(known)

    of_known_hosts = refused(board.host(host_key=None))
    of_hosts_toml = refused(board.host(host_key=public(old)))

    for error in (of_known_hosts, of_hosts_toml):
        assert fingerprint(board.key) in str(error)
        assert fingerprint(public(old)) in str(error)
        assert error.exit_code == 5
    assert f"ssh-keygen -R '[127.0.0.1]:{board.port}'" in (of_known_hosts.hint or "")
    assert "edgeexit hosts add pi" in (of_hosts_toml.hint or "")


def test_a_pinned_key_counts_alone_whatever_known_hosts_says(
    boards: Boards, laptop: Path, tmp_path: Path
) -> None:
    board = boards()
    trusted(laptop, board)

    error = refused(board.host(host_key=public(make_key(tmp_path / "other"))))

    assert "hosts.toml" in str(error)


@pytest.mark.parametrize(
    "lines",
    [
        "StrictHostKeyChecking no",
        "StrictHostKeyChecking accept-new",
        "UserKnownHostsFile none",
        "UserKnownHostsFile /dev/null",
        "UserKnownHostsFile /nowhere/at/all",
    ],
)
def test_no_line_of_the_ssh_config_makes_us_trust_silently(
    boards: Boards, laptop: Path, lines: str
) -> None:
    board = boards()
    configured(laptop, f"Host *\n  {lines}\n")

    assert "is not known" in str(refused(board.host(host_key=None)))


def test_a_revoked_key_is_refused(boards: Boards, laptop: Path) -> None:
    board = boards()
    known = laptop / ".ssh" / "known_hosts"
    trusted(laptop, board)
    known.write_text(known.read_text() + f"@revoked * {board.key}\n")

    assert "revoked" in str(refused(board.host(host_key=None)))


def test_of_several_host_keys_the_pinned_kind_is_asked_for(
    boards: Boards, laptop: Path, tmp_path: Path
) -> None:
    keys = (make_key(tmp_path / "k0"), make_key(tmp_path / "k1", kind="ecdsa"))
    board = boards(host_keys=keys)
    (laptop / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{board.port} {public(keys[1])}\n")

    over(board.host(host_key=public(keys[1])), nothing)
    over(board.host(host_key=None), nothing)


def test_a_kind_of_key_that_the_board_has_no_longer_is_a_changed_key(
    boards: Boards, tmp_path: Path
) -> None:
    board, old = boards(), make_key(tmp_path / "old", kind="ecdsa")

    error = refused(board.host(host_key=public(old)))

    assert "has changed" in str(error)
    assert fingerprint(board.key) in str(error)


# The user's ssh configuration


def test_name_port_user_and_key_of_the_ssh_config_are_taken(
    boards: Boards, laptop: Path, tmp_path: Path
) -> None:
    key = make_key(tmp_path / "special")
    board = boards(client_key=key)
    trusted(laptop, board)
    configured(
        laptop,
        f"Host lab-pi\n  HostName 127.0.0.1\n  Port {board.port}\n"
        f"  User {board.user}\n  IdentityFile {key}\n  IdentitiesOnly yes\n",
    )

    done = over(Host(name="lab-pi", address="lab-pi"), lambda link: link.run(["echo", "here"]))

    assert done.out == b"here\n"


def test_a_command_terminal_or_agent_that_the_config_asks_for_is_left_out(
    boards: Boards, laptop: Path, agent: None
) -> None:
    board = boards()
    configured(laptop, "Host *\n  RemoteCommand false\n  RequestTTY force\n  ForwardAgent yes\n")

    done = over(board.host(), lambda link: link.run(["sh", "-c", "tty; echo $SSH_AUTH_SOCK"]))

    assert done.out == b"not a tty\n\n"


@pytest.mark.parametrize(
    "text", ["Host *\n  Port many\n", "Host *\n  IdentityFile\n", "Match wrong\n", "Host 'a\n"]
)
def test_a_config_that_cannot_be_read_is_told(laptop: Path, text: str) -> None:
    configured(laptop, text)

    error = refused(Host(name="pi", address="127.0.0.1", port=1))

    assert (error.exit_code, "ssh configuration" in str(error)) == (3, True)


def test_a_jump_host_leads_to_the_board_and_both_keys_are_checked(
    boards: Boards, laptop: Path
) -> None:
    jump, board = boards(), boards()
    configured(
        laptop,
        f"Host bastion\n  HostName 127.0.0.1\n  Port {jump.port}\n"
        f"Host far\n  HostName localhost\n  Port {board.port}\n"
        "Host *\n  ProxyJump bastion\n",
    )
    far = Host(name="far", address="far", host_key=board.key)

    unknown = refused(far)
    trusted(laptop, jump)
    done = over(far, lambda link: link.run(["echo", "here"]))
    changed = refused(Host(name="far", address="far", host_key=jump.key))

    assert str(unknown).startswith("bastion: its host key")
    assert "ssh bastion" in (unknown.hint or "")
    assert done.out == b"here\n"
    assert "Accepted publickey" in jump.log
    assert str(changed).startswith("far: its host key has changed")


def test_jump_hosts_may_stand_in_a_row(boards: Boards, laptop: Path) -> None:
    first, second, board = boards(), boards(), boards()
    trusted(laptop, first, second)
    hops = f"127.0.0.1:{first.port},{second.user}@127.0.0.1:{second.port}"
    configured(laptop, f"Host 127.0.0.1\n  ProxyJump {hops}\n")

    over(board.host(), nothing)

    assert "Accepted publickey" in first.log
    assert "Accepted publickey" in second.log


def test_a_board_that_the_jump_host_cannot_reach_is_told(boards: Boards, laptop: Path) -> None:
    jump = boards()
    trusted(laptop, jump)
    configured(laptop, f"Host far\n  HostName 127.0.0.1\n  ProxyJump 127.0.0.1:{jump.port}\n")

    error = refused(Host(name="far", address="far", port=1))

    assert "far: 127.0.0.1:1 cannot be reached from the jump host" in str(error)


@pytest.fixture
def agent(laptop: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A running ssh-agent that holds the laptop's key."""
    place = str(laptop / "agent")
    running = subprocess.Popen(["ssh-agent", "-D", "-a", place], stdout=subprocess.DEVNULL)
    while not Path(place).exists():
        time.sleep(0.01)
    monkeypatch.setenv("SSH_AUTH_SOCK", place)
    key = str(laptop / ".ssh" / "id_ed25519")
    subprocess.run(["ssh-add", "-q", key], check=True, stderr=subprocess.DEVNULL)
    yield
    running.terminate()
    running.wait(10)


def test_keys_of_a_running_agent_are_used(boards: Boards, laptop: Path, agent: None) -> None:
    board = boards()
    (laptop / ".ssh" / "id_ed25519").unlink()

    over(board.host(), nothing)


# asyncssh does not wait for the end of a proxy command that it has killed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_proxy_command_leads_to_the_board_whose_key_is_checked(
    boards: Boards, laptop: Path
) -> None:
    board = boards()
    relay = "bash -c 'exec 3<>/dev/tcp/%h/%p; cat <&3 & cat >&3; kill $!'"
    configured(laptop, f"Host far\n  HostName 127.0.0.1\n  ProxyCommand {relay}\n")

    over(board.host(address="far"), nothing)
    error = refused(board.host(address="far", host_key=None))
    gc.collect()

    assert "is not known" in str(error)


@pytest.mark.parametrize("lines", ["IdentityFile ~/.ssh/absent", "IdentityAgent ~/absent"])
def test_what_the_config_names_and_is_not_there_is_left_out(
    boards: Boards, laptop: Path, lines: str
) -> None:
    configured(laptop, f"Host *\n  {lines}\n  IdentityFile ~/.ssh/id_ed25519\n")

    over(boards().host(), nothing)


def test_an_agent_that_has_gone_does_no_harm(
    boards: Boards, laptop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSH_AUTH_SOCK", str(laptop / "gone"))

    over(boards().host(), nothing)


# Why there is no link


def test_who_refuses_the_connection_is_told() -> None:
    error = refused(Host(name="pi", address="127.0.0.1", port=1))

    assert str(error) == "pi: 127.0.0.1:1 refused the connection"
    assert error.exit_code == 5
    assert "systemctl enable --now ssh" in (error.hint or "")


def test_a_name_that_is_unknown_is_told() -> None:
    error = refused(Host(name="pi", address="nowhere.invalid"))

    assert "nowhere.invalid:22 is no name" in str(error)
    assert error.exit_code == 5


def test_a_board_that_says_nothing_is_given_up(boards: Boards) -> None:
    board = boards()
    with FaultyLink(board.port) as link, pytest.raises(DeviceError, match=r"within 0\.5 s"):
        link.stall_after = -1
        over(board.host(port=link.port), nothing, timeout_s=0.5)


@pytest.fixture
def strange() -> Iterator[tuple[int, list[bytes]]]:
    """A server that says what is put into the list, and hangs up."""
    words: list[bytes] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                taken, _ = listening.accept()
            except OSError:
                return
            with taken:
                taken.sendall(b"".join(words))
                time.sleep(0.1)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listening.getsockname()[1], words
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join(5)


@pytest.mark.parametrize(
    "said", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-1.0-old\r\n", b"SSH-2.0-x\r\nnoise"]
)
def test_what_is_no_ssh_server_is_told(strange: tuple[int, list[bytes]], said: bytes) -> None:
    strange[1].append(said)

    error = refused(Host(name="pi", address="127.0.0.1", port=strange[0]))

    assert error.exit_code == 5
    assert error.hint


def test_who_takes_passwords_but_not_our_key_gets_the_hint_ssh_copy_id(
    boards: Boards, laptop: Path, tmp_path: Path
) -> None:
    other = make_key(tmp_path / "other")
    open_to_all = boards(client_key=other, settings=("PasswordAuthentication yes",))
    keys_only = boards(client_key=other)

    by_password, by_key = refused(open_to_all.host()), refused(keys_only.host())

    where = f"-p {open_to_all.port} {open_to_all.user}@127.0.0.1"
    assert by_password.hint == f"ssh-copy-id {where}"
    assert str(by_password).endswith("is not let in by key; it takes: publickey, password")
    assert "authorized_keys" in (by_key.hint or "")
    assert {by_password.exit_code, by_key.exit_code} == {5}


def test_without_any_key_the_hint_is_to_make_one(boards: Boards, laptop: Path) -> None:
    (laptop / ".ssh" / "id_ed25519").unlink()

    assert "ssh-keygen -t ed25519" in (refused(boards().host()).hint or "")


def test_no_secret_is_in_any_output_when_the_key_is_locked(
    boards: Boards,
    laptop: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    key, hosts = laptop / ".ssh" / "id_ed25519", laptop / "hosts.toml"
    monkeypatch.setenv("EDGEEXIT_HOSTS", str(hosts))
    monkeypatch.setenv("EDGEEXIT_DEBUG", "1")
    caplog.set_level(logging.DEBUG)
    board = boards(settings=("PasswordAuthentication yes",))
    private = key.read_text()
    locking = ["ssh-keygen", "-q", "-p", "-N", "open sesame", "-f", str(key)]
    subprocess.run(locking, check=True, capture_output=True)
    locked = key.read_text()

    where = f"127.0.0.1:{board.port}"
    shown = fingerprint(board.key)
    codes = [
        cli.entry(["hosts", "add", "x", f"{board.user}:letmein@{where}"]),
        cli.entry(
            ["hosts", "add", "pi", f"{board.user}@{where}", "--fingerprint", shown, "--json"]
        ),
        cli.entry(["hosts", "check", "--json"]),
        cli.entry(["hosts", "list", "--json"]),
    ]
    out, err = capfd.readouterr()
    everything = "\n".join([out, err, caplog.text, hosts.read_text()])

    assert codes == [2, 0, 5, 0]
    assert f"ssh-add ~/.ssh/{key.name}" in err
    assert "asyncssh" in caplog.text
    assert "open sesame" not in everything
    assert "letmein" not in everything
    assert "PRIVATE" not in everything
    for text in (private, locked):
        secret = "".join(text.splitlines()[1:-1])[200:]  # the public half stands before it
        pieces = {secret[k : k + 24] for k in range(len(secret) - 23)}
        assert not [piece for piece in pieces if piece in everything]


# Commands


def test_a_command_gets_its_input_and_its_end_is_told(boards: Boards) -> None:
    big = os.urandom(3 << 20)
    script = "cat; echo wrong >&2; exit 7"

    done = over(boards().host(), lambda link: link.run(["sh", "-c", script], stdin=big))

    assert (done.code, done.out == big, done.err) == (7, True, "wrong\n")


def test_words_arrive_as_they_are(boards: Boards) -> None:
    words = ["a b", "it's", "$HOME", "a\nb", "`x`", "ä", "", "*", "\\", '"', "-n", "!x", "~"]

    done = over(boards().host(), lambda link: link.run(["printf", "%s|", *words]))

    assert done.out.decode() == "".join(f"{word}|" for word in words)


def test_a_command_that_takes_too_long_is_ended_there(boards: Boards) -> None:
    board = boards(user="pi")
    script = f"echo $$ > {board.folder}/pid; exec sleep 60"

    error = refused(board.host(), lambda link: link.run(["sh", "-c", script], timeout_s=0.5))

    assert "not done within 0.5 s" in str(error)
    assert_gone(int((board.folder / "pid").read_text()))


def assert_gone(pid: int) -> None:
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline, "still there"
        time.sleep(0.02)


def test_endless_output_ends_and_endless_errors_do_no_harm(
    boards: Boards, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeexit.remote.link.MAX_OUT_BYTES", 1 << 20)
    board = boards()

    error = refused(board.host(), lambda link: link.run(["cat", "/dev/zero"]))
    noisy = "head -c 9000000 /dev/zero | tr '\\0' x >&2; echo end >&2"
    done = over(board.host(), lambda link: link.run(["sh", "-c", noisy]))

    assert "more than" in str(error)
    assert done.err.endswith("xend\n")
    assert len(done.err) == 64 << 10


def test_a_command_that_a_signal_ended_is_told(boards: Boards) -> None:
    error = refused(boards().host(), lambda link: link.run(["sh", "-c", "kill -9 $$"]))

    assert (error.exit_code, "signal KILL" in str(error)) == (5, True)
    assert "out of memory" in (error.hint or "")


def test_the_home_is_found_behind_a_shell_that_prints(boards: Boards) -> None:
    board = boards(user="pi")
    (board.folder / ".bashrc").write_text("echo Welcome; echo edgeexit-home:no; echo oops >&2\n")

    assert over(board.host(), lambda link: link.home()) == str(board.home)


def test_a_board_that_opens_no_further_session_is_told(boards: Boards) -> None:
    async def twice(link: Link) -> None:
        async with link.talk(["cat"], "first"):
            await link.run(["true"])

    error = refused(boards(settings=("MaxSessions 1",)).host(), twice)

    assert (error.exit_code, "MaxSessions" in (error.hint or "")) == (5, True)
    assert not isinstance(error, LinkLost)


# The agent


def speaking(*lines: object) -> str:
    """A shell script that reads an order and answers in *lines*."""
    shown = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    text = "\n".join([json.dumps({"agent": 1, "edgeexit": "1.2.3"}), *shown])
    return f"read -r order\ncat <<'END'\n{text}\nEND\n"


def test_the_agent_is_told_its_order_and_answers_with_progress_and_result(boards: Boards) -> None:
    board, seen = boards(), []
    board.program(
        'echo "Hello there"; echo \'{"no": 1}\'; echo "$@" >"$0.argv"\n'
        + speaking({"progress": {"done": 1}}, {"result": {"a": [1.5]}})
        + 'printf "%s" "$order" >"$0.order"'
    )

    async def ask(link: Link) -> tuple[dict[str, Any], str | None]:
        return await link.agent("hello", {"x": "é"}, on_progress=seen.append), link.version

    assert over(board.host(), ask) == ({"a": [1.5]}, "1.2.3")
    assert seen == [{"done": 1}]
    program = board.home / "env" / "current" / "bin" / "edgeexit"
    assert program.with_name("edgeexit.argv").read_text() == "agent hello\n"
    assert json.loads(program.with_name("edgeexit.order").read_text()) == {"x": "é"}


def test_what_the_agent_needs_is_brought_over_the_same_link(boards: Boards) -> None:
    board = boards()
    said = '{"agent": 1, "edgeexit": "1"}'
    board.program(
        f"read order; echo '{said}'; echo '{{\"need\": {{\"size\": 3}}}}'; read answer\n"
        'echo "{\\"result\\": $answer}"'
    )

    async def ask(link: Link) -> dict[str, Any]:
        async def bring(need: dict[str, Any]) -> dict[str, Any]:
            done = await link.run(["printf", "x" * need["size"]])
            return {"got": done.out.decode()}

        return await link.agent("profile", {}, on_need=bring)

    assert over(board.host(), ask) == {"got": "xxx"}


@pytest.mark.parametrize(
    ("code", "kind"),
    [(3, BadFile), (8, Busy), (10, SelfTestError), (11, StorageError), (1, DeviceError)],
)
def test_a_refusal_of_the_board_keeps_its_kind(
    boards: Boards, code: int, kind: type[EdgeExitError]
) -> None:
    board = boards()
    board.program(speaking({"error": {"message": "no\x1b[2J", "hint": "do", "exit_code": code}}))

    error = refused(board.host(), lambda link: link.agent("install", {}))

    assert (type(error), error.hint) == (kind, "do")
    assert str(error) == "pi: no\\x1b[2J"


BROKEN = {
    "nothing": ("read order; exit 3", "ended with code 3"),
    "its last word": ("read order; echo it is broken >&2; exit 1", "it is broken"),
    "only a head": (speaking(), "without an answer"),
    "no JSON": (speaking("Traceback"), "expected a line of JSON"),
    "a need that nobody expects": (speaking({"need": {}}), "asks for what nobody brings"),
    "half a line": (speaking('{"result": {"a'), "expected a line of JSON"),
    "a list": (speaking("[1]"), "expected a line of JSON"),
    "deep": (speaking("[" * 100_000), "expected a line of JSON"),
    "result is text": (speaking({"result": "x"}), "result"),
    "error is text": (speaking({"error": "x"}), "error"),
    "error of no kind": (speaking({"error": {"message": 1}}), "refuses without a reason"),
    "too chatty": ("read order; yes '{}' | head -c 90000", "prints more than 64 KiB"),
    "one endless line": ("read order; head -c 90000 /dev/zero", "a line of more than"),
    "another protocol": (
        'read order; echo \'{"agent": 2, "edgeexit": "9.9"}\'; cat',
        "edgeexit 9.9 there speaks protocol 2",
    ),
    "killed": ("read order; kill -9 $$", "signal KILL"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_agent_is_a_device_error_that_says_how(boards: Boards, case: str) -> None:
    board, (program, expected) = boards(), BROKEN[case]
    board.program(program)

    error = refused(board.host(), lambda link: link.agent("hello", {}))

    assert error.exit_code == 5
    assert expected in str(error)


def test_a_board_without_edgeexit_gets_the_hint_setup(boards: Boards) -> None:
    error = refused(boards().host(), lambda link: link.agent("hello", {}))

    assert (error.exit_code, error.hint) == (5, "edgeexit setup pi")


@pytest.mark.parametrize("user", [None, "pi"])
def test_cancelling_ends_the_work_over_there(boards: Boards, user: str | None) -> None:
    board = boards(**({"user": user} if user else {}))
    # As root sshd passes no signals on: the closed standard input is enough.
    board.program(
        f'echo $$ >{board.folder}/pid; echo \'{{"agent": 1, "edgeexit": "1"}}\'\ncat >/dev/null'
    )

    async def give_up(link: Link) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(link.agent("profile", {}), 0.5)

    over(board.host(), give_up)

    assert_gone(int((board.folder / "pid").read_text()))


def test_a_link_that_is_cut_ends_the_work_on_both_sides(boards: Boards) -> None:
    board = boards()
    board.program(
        f'echo $$ >{board.folder}/pid; echo \'{{"agent": 1, "edgeexit": "1"}}\'\n'
        "echo '{\"progress\": {}}'; cat >/dev/null"
    )
    with FaultyLink(board.port) as faulty:

        async def ask(link: Link) -> None:
            await link.agent("profile", {}, on_progress=lambda said: faulty.cut())

        error = refused(board.host(port=faulty.port), ask)

    assert isinstance(error, LinkLost)
    assert "again" in (error.hint or "")
    assert_gone(int((board.folder / "pid").read_text()))


def test_a_link_that_goes_silent_is_noticed(
    boards: Boards, monkeypatch: pytest.MonkeyPatch
) -> None:
    timing = {"keepalive_interval": 0.2, "keepalive_count_max": 3}
    monkeypatch.setattr("edgeexit.remote.login._KEEPALIVE", timing)
    board = boards()
    with FaultyLink(board.port) as faulty:

        async def wait(link: Link) -> None:
            faulty.stall_after = 0
            await link.run(["sleep", "60"])

        began = time.monotonic()
        error = refused(board.host(port=faulty.port), wait)

    assert isinstance(error, LinkLost)
    assert time.monotonic() - began < 10


def test_silence_of_fifteen_seconds_is_the_limit() -> None:
    from edgeexit.remote.login import _KEEPALIVE

    assert _KEEPALIVE == {"keepalive_interval": 5, "keepalive_count_max": 3}


# Files


def test_a_file_is_fetched_whole_or_refused(boards: Boards) -> None:
    board, data = boards(), os.urandom(200_000)
    path = board.folder / "result"
    path.write_bytes(data)

    whole = over(board.host(), lambda link: link.fetch(str(path), limit_bytes=200_000))
    large = refused(board.host(), lambda link: link.fetch(str(path), limit_bytes=199_999))
    absent = refused(board.host(), lambda link: link.fetch("/no/such", limit_bytes=9))

    assert whole == data
    assert (type(large), type(absent)) == (BadFile, DeviceError)
    assert "no such file" in str(absent)


@pytest.mark.parametrize(
    ("sftp", "expected"),
    [(None, "Subsystem sftp"), ("/bin/false", ""), ("/bin/echo Welcome to this board", ".bashrc")],
)
def test_a_board_without_sound_sftp_is_told(
    boards: Boards, sftp: str | None, expected: str
) -> None:
    board = boards(sftp=sftp)

    error = refused(board.host(), lambda link: link.fetch("/x", limit_bytes=9))

    assert error.exit_code == 5
    assert not isinstance(error, LinkLost)
    assert expected in (error.hint or "")

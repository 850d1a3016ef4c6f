"""What a board does with a bundle: tested before it runs, one deploy at a time, all or nothing."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import small_bundle

from edgeexit import __version__
from edgeexit.agent import delivery
from edgeexit.agent.parcel import Parcel, pack
from edgeexit.bundle import Bundle, load_bundle
from edgeexit.errors import (
    BadFile,
    Busy,
    DeviceError,
    EdgeExitError,
    SelfTestError,
    StorageError,
    UsageError,
)
from edgeexit.files import Table, digest_of, npz_bytes
from edgeexit.locks import hold
from edgeexit.policy import Policy
from edgeexit.releases import Releases


class Talk:
    """The laptop's half of the conversation: brings what is needed out of the parcel's folder."""

    def __init__(self, parcel: Parcel, home: Path, fails: BaseException | None = None) -> None:
        self.parcel, self.releases = parcel, Releases(home, parcel.app)
        self.fails = fails
        self.needs: list[dict[str, Any]] = []
        self.steps: list[str] = []

    def progress(self, **facts: Any) -> None:
        self.steps.append(facts["step"])

    def need(self, **facts: Any) -> Table:
        self.needs.append(facts)
        if self.fails is not None:
            raise self.fails
        for entry in self.parcel.manifest.files:
            if entry.sha256 in facts["blobs"]:
                self.releases.add(entry, self.parcel.path / entry.path)
        return Table({"uploaded": True}, "answer")


class Here:
    """A board in this process: its folder, and orders to it."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def deploy(
        self,
        parcel: Parcel,
        *,
        fails: BaseException | None = None,
        changes: dict[str, Any] | None = None,
        **more: Any,
    ) -> tuple[dict[str, Any], Talk]:
        talk = Talk(parcel, self.home, fails)
        order = json.loads(json.dumps(parcel.order(**more))) | (changes or {})
        return dict(delivery.deploy(Table(order, "order"), talk)), talk  # type: ignore[arg-type]

    def ask(self, answer: Callable[..., Any], **order: Any) -> dict[str, Any]:
        return dict(answer(Table(order, "order"), None))

    @property
    def running(self) -> str | None:
        return Releases(self.home, "small").current_id()


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    monkeypatch.setenv("EDGEEXIT_HOME", str(tmp_path / "board"))
    return Here(tmp_path / "board")


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the self-test's process where it is not what is looked at."""
    monkeypatch.setattr(delivery, "check", lambda folder: {"selftest": "spared"})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("made"))


@pytest.fixture
def bundle(made: Bundle, tmp_path: Path) -> Bundle:
    """A bundle of our own, which may be changed."""
    return load_bundle(shutil.copytree(made.path, tmp_path / made.path.name))


def with_policy(bundle: Bundle, device: str = "host") -> Parcel:
    """The bundle as another release: with a policy for *device*."""
    policy = Policy.forced(bundle, exit="exit0", kept=bundle.exits)
    policy.save(bundle.policy_path(device))
    return pack(bundle.path)


def with_other_answers(bundle: Bundle) -> Parcel:
    """The bundle as another release that no machine can pass."""
    path = bundle.path / "selftest.npz"
    arrays = dict(np.load(path))
    path.write_bytes(npz_bytes(arrays | {"logits": ~arrays["logits"]}))
    document = json.loads((bundle.path / "bundle.json").read_text())
    entry = {"sha256": digest_of(path.read_bytes()), "bytes": path.stat().st_size}
    document["files"]["selftest.npz"] = entry
    (bundle.path / "bundle.json").write_text(json.dumps(document))
    return pack(bundle.path)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in folder.rglob("*")
    }


# ---------------------------------------------------------------- deploy


def test_what_is_missing_is_needed_once_and_the_second_time_nothing_changes(
    board: Here, bundle: Bundle
) -> None:
    parcel = pack(bundle.path)

    first, talk = board.deploy(parcel)
    again, silent = board.deploy(parcel)

    assert first["changed"] and first["was"] is None
    assert first["release"] == board.running == parcel.manifest.id
    assert first["selftest"]["differing"] == 0 and first["selftest"]["logits"] > 0
    (need,) = talk.needs
    assert set(need["blobs"]) == {entry.sha256 for entry in parcel.manifest.files}
    assert need["bytes"] == parcel.manifest.size_bytes
    assert talk.steps == ["install", "self-test"]
    assert not again["changed"] and again["selftest"] is None
    assert not silent.needs and not silent.steps


@pytest.mark.usefixtures("untested")
def test_only_the_files_that_differ_are_needed_for_the_next_release(
    board: Here, bundle: Bundle
) -> None:
    first, _ = board.deploy(pack(bundle.path))
    shutil.rmtree(board.home / "blobs")  # what is installed counts, too

    second, talk = board.deploy(with_policy(bundle))

    assert len(talk.needs[0]["blobs"]) == 1
    assert second["was"] == first["release"] != second["release"] == board.running
    assert second["policy"] == "host" and not second["warnings"]


def test_a_release_that_fails_its_selftest_never_runs(board: Here, bundle: Bundle) -> None:
    first, _ = board.deploy(pack(bundle.path))
    wrong = with_other_answers(bundle)

    for said in ("differ", "refused before"):
        with pytest.raises(SelfTestError, match=said):
            board.deploy(wrong)
        assert board.running == first["release"]
    with pytest.raises(SelfTestError, match="differ"):
        board.deploy(wrong, force=True)
    assert board.running == first["release"]
    assert wrong.manifest.id in board.ask(delivery.status)["apps"][0]["bad"]


def test_a_policy_that_the_board_cannot_use_is_no_less_refused(
    board: Here, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    parcel = with_policy(bundle)
    path = bundle.policy_path("host")
    document = json.loads(path.read_text()) | {"format": 99}
    path.write_text(json.dumps(document))
    newer = Parcel(
        path=parcel.path,
        app=parcel.app,
        manifest=type(parcel.manifest).from_folder(bundle.path),
        devices=parcel.devices,
    )

    with pytest.raises(BadFile, match="format: found 99"):
        board.deploy(newer)
    assert board.running is None


@pytest.mark.parametrize(
    ("end", "error", "said", "is_bad"),
    [
        ("os.kill(os.getpid(), 11)", SelfTestError, r"dies of the self-test \(SIGSEGV\)", True),
        ("os.abort()", SelfTestError, r"\(SIGABRT\)", True),
        ("os.kill(os.getpid(), 9)", DeviceError, "ended with code -9: no word", False),
        ("import absent", DeviceError, "ModuleNotFoundError: No module named 'absent'", False),
        ("print('{}')", DeviceError, "ended with code 0", False),
    ],
)
def test_only_a_crash_of_the_runtime_is_the_releases_fault(
    board: Here,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    end: str,
    error: type[EdgeExitError],
    said: str,
    is_bad: bool,
) -> None:
    code = f"import os; {end}"
    monkeypatch.setattr(delivery, "command", lambda *_: [sys.executable, "-c", code])

    with pytest.raises(error, match=said) as caught:
        board.deploy(pack(bundle.path))
    assert caught.value.hint
    assert board.running is None
    assert bool(board.ask(delivery.status)["apps"][0]["bad"]) == is_bad


def test_a_selftest_that_never_ends_is_ended(
    board: Here, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "CHECK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(delivery, "command", lambda *_: ["sleep", "60"])

    with pytest.raises(SelfTestError, match=r"still ran after 0\.2 s"):
        board.deploy(pack(bundle.path))


@pytest.mark.usefixtures("untested")
def test_while_one_deploys_the_other_is_busy_and_asks_for_nothing(
    board: Here, bundle: Bundle
) -> None:
    board.deploy(pack(bundle.path))
    talk = Talk(with_policy(bundle), board.home)

    with hold(board.home / delivery.LOCK, "this board"):
        with pytest.raises(Busy):
            delivery.deploy(Table(talk.parcel.order(), "order"), talk)  # type: ignore[arg-type]
        with pytest.raises(Busy):
            board.ask(delivery.rollback, app="small")
    assert not talk.needs


@pytest.mark.usefixtures("untested")
def test_whoever_only_looks_at_the_releases_makes_no_deploy_fail(
    board: Here, bundle: Bundle
) -> None:
    board.deploy(pack(bundle.path))
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom edgeexit.releases import Releases\n"
        "with Releases(Path(sys.argv[1]), 'small').locked():\n"
        "    print('held', flush=True); time.sleep(0.5)\n"
    )
    command = [sys.executable, "-c", code, str(board.home)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None and reader.stdout.readline() == b"held\n"
        found, _ = board.deploy(with_policy(bundle))

    assert found["changed"]


@pytest.mark.parametrize("end", [KeyboardInterrupt(), DeviceError("the link is gone")])
@pytest.mark.usefixtures("untested")
def test_an_upload_that_ends_early_leaves_the_board_free_and_as_it_was(
    board: Here, bundle: Bundle, end: BaseException
) -> None:
    first, _ = board.deploy(pack(bundle.path))
    parcel = with_policy(bundle)

    with pytest.raises(type(end)):
        board.deploy(parcel, fails=end)

    assert board.running == first["release"]
    assert board.deploy(parcel)[0]["changed"]


@pytest.mark.usefixtures("untested")
def test_a_laptop_that_fell_asleep_does_not_keep_the_board_busy(
    board: Here, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "STALL_S", 0.3)
    talk = Talk(pack(bundle.path), board.home)
    monkeypatch.setattr(talk, "need", lambda **_: time.sleep(60))

    with pytest.raises(DeviceError, match=r"nothing has come for 0\.3 s"):
        delivery.deploy(Table(talk.parcel.order(), "order"), talk)  # type: ignore[arg-type]
    assert board.deploy(talk.parcel)[0]["changed"]


def test_what_was_altered_on_the_board_is_mended(board: Here, bundle: Bundle) -> None:
    parcel = pack(bundle.path)
    board.deploy(parcel)
    path = board.home / "apps" / "small" / "current" / "segment-0.tflite"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-1] + b"?")

    assert parcel.manifest.id in board.ask(delivery.status)["apps"][0]["bad"]
    found, _ = board.deploy(parcel)

    assert found["changed"] and found["selftest"]["selftest"] == "ok"
    assert not board.ask(delivery.status)["apps"][0]["bad"]
    assert board.running == parcel.manifest.id


def test_force_tests_again_what_runs_already(board: Here, bundle: Bundle) -> None:
    parcel = pack(bundle.path)
    board.deploy(parcel)

    found, _ = board.deploy(parcel, force=True)

    assert found["changed"] and found["selftest"]["selftest"] == "ok"


@pytest.mark.parametrize(
    ("fact", "error", "said"),
    [
        ({"runtime": None}, DeviceError, "no TFLite runtime"),
        ({"free_bytes": 1000}, StorageError, "0.0 MB free, expected"),
    ],
)
def test_a_board_that_cannot_use_it_is_refused_before_anything_is_sent(
    board: Here,
    bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    fact: dict[str, object],
    error: type[EdgeExitError],
    said: str,
) -> None:
    real = delivery.facts
    monkeypatch.setattr(delivery, "facts", lambda machine: real(machine) | fact)
    talk = Talk(pack(bundle.path), board.home)

    for dry_run in (True, False):
        with pytest.raises(error, match=said) as caught:
            delivery.deploy(
                Table(talk.parcel.order(dry_run=dry_run), "order"),
                talk,  # type: ignore[arg-type]
            )
        assert caught.value.hint
    assert not talk.needs


def test_what_is_odd_but_no_obstacle_is_a_warning(board: Here, bundle: Bundle) -> None:
    changes = {"edgeexit": "99.0", "clock_s": 3 * 3600}

    found, _ = board.deploy(pack(bundle.path), dry_run=True, changes=changes)

    policy, version, clock = found["warnings"]
    assert "no policy for host" in policy
    assert version == f"edgeexit {__version__} here, 99.0 there"
    assert clock.startswith("the clock is ") and clock.endswith(" h ahead")


@pytest.mark.usefixtures("untested")
def test_old_releases_that_cannot_be_removed_do_not_undo_a_deploy(
    board: Here, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collect(self: Releases, *, keep: int) -> list[str]:
        raise StorageError(f"{keep}: cannot write: Input/output error")

    monkeypatch.setattr(Releases, "collect", collect)
    found, _ = board.deploy(pack(bundle.path), keep=7)

    assert found["changed"] and board.running == found["release"]
    assert "old releases stay: 7: cannot write" in found["warnings"][-1]


@pytest.mark.usefixtures("untested")
def test_a_dry_run_tells_and_writes_nothing(board: Here, bundle: Bundle) -> None:
    parcel = pack(bundle.path)
    assert board.deploy(parcel, dry_run=True)[0]["changed"]
    assert not board.home.exists()

    board.deploy(parcel)
    before = tree(board.home)
    assert not board.deploy(parcel, dry_run=True)[0]["changed"]
    found, talk = board.deploy(with_policy(bundle), dry_run=True)

    assert found["changed"] and found["was"] == parcel.manifest.id
    assert not talk.needs
    assert tree(board.home) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"app": "../x"},
        {"app": ""},
        {"app": 7},
        {"manifest": {}},
        {"manifest": {"format": 1, "files": [{"path": "../x", "size_bytes": 1, "sha256": "0"}]}},
        {"keep": "all"},
        {"force": 1},
        {"surprise": True},
    ],
)
def test_a_hostile_order_is_refused(
    board: Here, bundle: Bundle, changes: dict[str, object]
) -> None:
    with pytest.raises((BadFile, UsageError)):
        board.deploy(pack(bundle.path), changes=changes)
    assert board.running is None


# ---------------------------------------------------------------- the others


@pytest.mark.usefixtures("untested")
def test_rollback_swaps_the_two_and_an_unknown_application_is_named(
    board: Here, bundle: Bundle
) -> None:
    first, _ = board.deploy(pack(bundle.path))
    with pytest.raises(UsageError, match="no previous release"):
        board.ask(delivery.rollback, app="small")
    second, _ = board.deploy(with_policy(bundle))

    back = board.ask(delivery.rollback, app="small")

    assert (back["release"], back["was"]) == (first["release"], second["release"])
    assert board.running == first["release"]
    with pytest.raises(UsageError, match="smal") as caught:
        board.ask(delivery.rollback, app="smal")
    assert caught.value.hint == "did you mean 'small'?"


@pytest.mark.usefixtures("untested")
def test_status_tells_every_application_and_writes_nothing_on_an_empty_board(
    board: Here, bundle: Bundle
) -> None:
    assert board.ask(delivery.status)["apps"] == []
    assert not board.home.exists()
    for app in ("one", "two"):
        delivery.deploy_here(pack(bundle.path, app))

    found = board.ask(delivery.status)

    assert [app["app"] for app in found["apps"]] == ["one", "two"]
    assert {app["current"] for app in found["apps"]} == {pack(bundle.path).manifest.id}
    assert found["device"] == "host" and found["free_bytes"] > 0
    assert len(board.ask(delivery.status, app="two")["apps"]) == 1
    assert board.ask(delivery.status, app="three")["apps"] == []


@pytest.mark.usefixtures("untested")
def test_the_process_that_holds_the_lock_loads_no_numpy(board: Here, bundle: Bundle) -> None:
    """A board would otherwise pay for it twice: the self-test has a process of its own."""
    parcel = pack(bundle.path)
    delivery.deploy_here(parcel)
    code = (
        "import json, sys\nfrom edgeexit.agent import Talk, delivery\n"
        "from edgeexit.files import Table\n"
        "found = delivery.deploy(Table(json.load(sys.stdin), 'order'), Talk(0, 1))\n"
        "print(found['changed'], 'numpy' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(parcel.order()),
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["False", "False"]


def test_the_agent_gives_the_board_free_when_stdin_ends(board: Here, bundle: Bundle) -> None:
    parcel = pack(bundle.path)
    command = [sys.executable, "-P", "-m", "edgeexit", "agent", "deploy"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent
    ) as agent:
        assert agent.stdin is not None and agent.stdout is not None
        agent.stdin.write(json.dumps(parcel.order()).encode() + b"\n")
        agent.stdin.flush()
        lines = [json.loads(agent.stdout.readline()) for _ in range(2)]
        assert len(lines[1]["need"]["blobs"]) == len(parcel.manifest.files)
        with pytest.raises(Busy):
            board.deploy(parcel)
        agent.stdin.close()
        end = json.loads(agent.stdout.readline())

    assert end["error"]["exit_code"] == agent.returncode == 128 + signal.SIGINT
    assert board.deploy(parcel)[0]["changed"]


# ---------------------------------------------------------------- what is sent


def test_nothing_is_packed_that_is_not_whole(bundle: Bundle) -> None:
    path = bundle.path / "segment-1.tflite"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadFile, match="altered"):
        pack(bundle.path)
    path.unlink()
    with pytest.raises(BadFile, match="missing"):
        pack(bundle.path)


def test_no_policy_is_packed_that_does_not_fit_and_no_file_of_somebody_else(
    bundle: Bundle, tmp_path: Path
) -> None:
    parcel = with_policy(bundle, "rpi4")
    assert parcel.devices == ("rpi4",)
    assert (parcel.app, pack(bundle.path, "door").app) == ("small", "door")
    path = bundle.policy_path("rpi4")
    document = json.loads(path.read_text()) | {"bundle_digest": "0" * 64}
    path.write_text(json.dumps(document))
    with pytest.raises(EdgeExitError):
        pack(bundle.path)
    path.unlink()

    (bundle.path / "id_ed25519").write_text("secret")
    with pytest.raises(UsageError, match="id_ed25519 belongs to no bundle"):
        pack(bundle.path)
    (bundle.path / "id_ed25519").unlink()
    (bundle.path / "aside").symlink_to("/etc/passwd")
    with pytest.raises(BadFile, match="aside is a link"):
        pack(bundle.path)

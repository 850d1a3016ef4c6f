"""Releases on a board: what they promise, one by one, and against a model of a few lines."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from shelves import APP, A, B, C, contents, fails, is_sound, passes, process, spoil, write_folder

from edgeexit.blobs import MAX_AGE_S, Blobs
from edgeexit.errors import (
    BadFile,
    Busy,
    DeviceError,
    EdgeExitError,
    SelfTestError,
    StorageError,
    UsageError,
)
from edgeexit.files import Table
from edgeexit.intents import Intent, Links, State
from edgeexit.locks import hold
from edgeexit.manifest import MAX_FILES, RECORD, Entry, Manifest
from edgeexit.names import board_home
from edgeexit.releases import MOST_REPAIRS, MOST_TRIES, Releases, applications
from edgeexit.shelf import Shelf


class Desk:
    """A board, and releases by letter (a, b and c are shelves.A, B and C) that may be brought."""

    def __init__(self, root: Path) -> None:
        self.root, self.home, self.lines = root, root / "home", list[str]()
        self.board = Releases(self.home, APP, tell=self.lines.append)
        self.shelf = Shelf(self.home / "apps" / APP)

    def install(self, letter: str) -> str:
        folder = self.root / letter
        manifest = write_folder(folder, contents(letter))
        for entry in self.board.missing(manifest):
            self.board.add(entry, folder / entry.path)
        return self.board.install(manifest)

    def deploy(self, *letters: str) -> None:
        for letter in letters:
            self.board.activate(self.install(letter), passes)

    def links(self) -> tuple[str | None, str | None]:
        links = self.shelf.links()
        return links.current, links.previous


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(tmp_path)


# ---------------------------------------------------------------- manifests


def entry(path: str, size_bytes: int = 1, sha256: str = "0" * 64) -> Entry:
    return Entry(path=path, size_bytes=size_bytes, sha256=sha256)


@pytest.mark.parametrize(
    "path",
    [
        *("../evil", "a/../../evil", "/etc/passwd", "", ".", "..", "a//b", "a/", "./a", "a\\b"),
        *(".release.json", "policies/.hidden", "a\0b", "a\nb", "ä", "-rf", "a" * 200, "a/b/c/d/e"),
    ],
)
def test_a_manifest_that_leads_elsewhere_is_refused(path: str) -> None:
    with pytest.raises(BadFile):
        Manifest((entry(path),))


@pytest.mark.parametrize(
    "entries",
    [
        (),
        (entry("a"), entry("a")),
        (entry("a"), entry("A")),
        (entry("a"), entry("a/b")),
        (entry("B/x"), entry("b/y")),
        (entry("a", -1),),
        (entry("a", 2**40),),
        (entry("a", sha256="0" * 63),),
        (entry("a", sha256="G" * 64),),
        tuple(entry(f"f{k}") for k in range(MAX_FILES + 1)),
    ],
    ids=range(10),
)
def test_a_manifest_that_cannot_be_is_refused(entries: tuple[Entry, ...]) -> None:
    with pytest.raises(BadFile):
        Manifest(entries)


def test_as_many_files_as_allowed_are_taken() -> None:
    assert len(Manifest(tuple(entry(f"f{k}") for k in range(MAX_FILES))).files) == MAX_FILES


def test_a_manifest_is_read_back_and_its_name_tells_every_byte(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path, contents("a"))

    assert Manifest.from_document(Table(manifest.to_document(), "m")) == manifest
    assert len(manifest.id) == 16
    others = {manifest.id}
    for name in contents("a"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(b"?" + data[1:])
        others.add(Manifest.from_folder(tmp_path).id)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "bundle.json").rename(tmp_path / "other.json")
    others.add(Manifest.from_folder(tmp_path).id)
    assert len(others) == len(contents("a")) + 2


@pytest.mark.parametrize(
    "document",
    [
        {"format": 2, "files": []},
        {"format": 1, "files": [], "more": 1},
        {"format": 1, "files": [{"path": "a", "size_bytes": 1}]},
        {"format": 1, "files": [{"path": "a", "size_bytes": "1", "sha256": "0" * 64}]},
        {"format": 1, "files": {"a": 1}},
    ],
)
def test_a_document_that_is_no_manifest_is_refused(document: dict[str, object]) -> None:
    with pytest.raises(BadFile):
        Manifest.from_document(Table(document, "order"))


def test_hidden_files_are_no_part_of_a_release_and_links_are_refused(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "m", contents("a"))
    (tmp_path / "m" / ".DS_Store").write_text("x")
    assert Manifest.from_folder(tmp_path / "m") == manifest

    (tmp_path / "m" / "link").symlink_to("bundle.json")
    with pytest.raises(BadFile, match="link"):
        Manifest.from_folder(tmp_path / "m")


def test_a_folder_that_is_not_there_or_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        Manifest.from_folder(tmp_path / "none")
    with pytest.raises(BadFile, match="no files"):
        Manifest.from_folder(tmp_path)


# ---------------------------------------------------------------- blobs


def test_a_folder_is_built_of_blobs_whole_or_not_at_all(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "m", contents("a"))
    blobs = Blobs(tmp_path / "home")
    assert {e.path for e in blobs.missing(manifest)} == set(contents("a"))
    for part in manifest.files[:-1]:
        blobs.add(part, tmp_path / "m" / part.path)
    with pytest.raises(BadFile, match="has not come"):
        blobs.build(manifest, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [e.path for e in blobs.missing(manifest)] == [manifest.files[-1].path]

    blobs.add(manifest.files[-1], tmp_path / "m" / manifest.files[-1].path)
    blobs.build(manifest, tmp_path / "out")

    manifest.check_folder(tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"home", "m", "out"}


def test_an_altered_blob_is_refused_and_asked_for_again(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path / "m", contents("a"))
    blobs = Blobs(tmp_path / "home")
    for part in manifest.files:
        blobs.add(part, tmp_path / "m" / part.path)
    path = blobs.path(manifest.files[1].sha256)
    path.write_bytes(b"?" + path.read_bytes()[1:])

    with pytest.raises(BadFile, match="altered"):
        blobs.build(manifest, tmp_path / "out")

    assert blobs.missing(manifest) == [manifest.files[1]]


def test_a_file_that_is_not_what_it_should_be_is_not_brought(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    blobs = Blobs(tmp_path / "home")

    with pytest.raises(BadFile, match="altered"):
        blobs.add(entry("file"), tmp_path / "file")

    assert list(blobs.folder.iterdir()) == []


def test_old_blobs_are_collected_and_those_that_just_came_stay(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.folder.mkdir()
    for name, age_s in (("new", 1.0), ("old", MAX_AGE_S + 9), ("to-come", -MAX_AGE_S - 9)):
        (blobs.folder / name).touch()
        now = (blobs.folder / name).stat().st_mtime
        os.utime(blobs.folder / name, (now - age_s, now - age_s))

    assert sorted(blobs.collect()) == ["old", "to-come"]


# ---------------------------------------------------------------- the road


def test_a_release_is_installed_activated_and_gone_back_from(desk: Desk) -> None:
    desk.deploy("a", "b")
    assert desk.links() == (B, A)
    assert is_sound(desk.board.open(), B)

    change = desk.board.rollback()

    assert (change.was, change.current, change.previous) == (B, A, B)
    assert desk.board.current_id() == A
    assert desk.board.rollback().current == B
    assert desk.lines == []


def test_what_runs_already_is_not_activated_again_unless_forced(desk: Desk) -> None:
    desk.deploy("a", "b")
    tried: list[Path] = []

    change = desk.board.activate(B, tried.append)
    assert (change.was, change.current, tried) == (B, B, [])
    change = desk.board.activate(B, tried.append, force=True)
    assert (change.was, change.current) == (B, B)
    assert [path.name for path in tried] == [B]
    assert desk.links() == (B, A)


def test_files_that_another_release_holds_need_not_come(desk: Desk) -> None:
    desk.deploy("a")
    shutil.rmtree(desk.home / "blobs")
    manifest = write_folder(desk.root / "b", contents("b"))

    assert {e.path for e in desk.board.missing(manifest)} == {"bundle.json", "model.tflite"}
    desk.deploy("b")
    assert is_sound(desk.board.open(), B)


@pytest.mark.parametrize("refusal", [BadFile, SelfTestError])
def test_a_release_that_fails_its_check_is_not_tried_again_without_force(
    desk: Desk, refusal: type[EdgeExitError]
) -> None:
    desk.deploy("a", "b")

    def check(folder: Path) -> None:
        raise refusal("exit 2 strays")

    with pytest.raises(refusal, match="exit 2 strays"):
        desk.board.activate(desk.install("c"), check)
    assert desk.links() == (B, A)
    with pytest.raises(SelfTestError, match="refused before: exit 2 strays") as caught:
        desk.board.activate(desk.install("c"), passes)
    assert "--force" in str(caught.value.hint)
    assert C in desk.board.status().bad

    desk.board.activate(C, passes, force=True)
    assert desk.links() == (C, B)
    assert desk.board.status().bad == {}


@pytest.mark.parametrize("refusal", [DeviceError, StorageError, KeyboardInterrupt])
def test_what_is_not_the_releases_fault_does_not_mark_it(
    desk: Desk, refusal: type[BaseException]
) -> None:
    desk.deploy("a")

    def check(folder: Path) -> None:
        raise refusal("no runtime")

    with pytest.raises(refusal):
        desk.board.activate(desk.install("b"), check)
    assert desk.board.status().bad == {}
    assert desk.board.status().pending is None
    desk.deploy("b")
    assert desk.links() == (B, A)


def test_a_check_that_is_killed_again_and_again_is_not_tried_for_ever(desk: Desk) -> None:
    desk.deploy("a")
    desk.install("b")
    for tried in range(MOST_TRIES):
        assert tried == desk.shelf.state()[0].tries.get(B, 0)
        links = desk.shelf.links()
        intent = Intent(what="check", release=B, before=links, after=links)
        desk.shelf.write(State(intent=intent, staged=B, tries=desk.shelf.state()[0].tries))
        desk.board.repair()

    with pytest.raises(SelfTestError, match="did not come to an end 3 times"):
        desk.board.activate(B, passes)
    desk.board.activate(B, passes, force=True)
    assert desk.links() == (B, A)


def test_a_repair_that_never_ends_is_given_up_and_the_board_runs(desk: Desk) -> None:
    desk.deploy("a", "b")
    links = desk.shelf.links()
    intent = Intent(what="activate", release=C, before=links, after=Links(current=C, previous=B))
    desk.shelf.write(State(intent=intent))

    class Killed(BaseException):
        pass

    def killed(links: Links) -> None:
        raise Killed

    desk.board._shelf.point = killed  # type: ignore[method-assign]
    for _ in range(MOST_REPAIRS):
        with pytest.raises(Killed):
            desk.board.open()
    assert desk.board.open().name == B
    assert "given up" in desk.lines[-1]


def test_the_previous_release_survives_retries_and_a_damaged_current(desk: Desk) -> None:
    """A retry never replaces what would be gone back to by what just failed."""
    desk.deploy("a", "b")
    for _ in range(3):
        with pytest.raises(SelfTestError):
            desk.board.activate(desk.install("c"), fails, force=True)
    assert desk.links() == (B, A)

    spoil(desk.root, B)
    desk.board.activate(C, passes, force=True)
    assert desk.links() == (C, A)


def test_there_must_be_something_to_go_back_to(desk: Desk) -> None:
    with pytest.raises(UsageError, match="no app on this board named"):
        desk.board.rollback()
    desk.deploy("a")
    with pytest.raises(UsageError, match="no previous release"):
        desk.board.rollback()


def test_what_is_not_installed_is_not_activated(desk: Desk) -> None:
    with pytest.raises(UsageError, match="no app on this board"):
        desk.board.activate(A, passes)
    assert not desk.home.exists()
    desk.deploy("a")

    with pytest.raises(UsageError, match="no release of app named"):
        desk.board.activate(B, passes)


def test_an_app_that_nobody_knows_has_no_releases_and_none_runs(desk: Desk) -> None:
    assert desk.board.status().releases == ()
    assert desk.board.collect() == []
    desk.board.repair()
    with pytest.raises(UsageError, match="no app on this board"):
        desk.board.open()
    assert not desk.home.exists()

    desk.install("a")
    assert applications(desk.home) == [APP]
    with pytest.raises(UsageError, match="no release was activated"):
        desk.board.open()


@pytest.mark.parametrize("app", ["", "..", "a/b", ".hidden", "a b", "x" * 65, "a\n"])
def test_an_app_has_a_plain_name(app: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a name"):
        Releases(tmp_path, app)


def test_the_board_folder_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEEXIT_HOME", "/srv/x")
    assert board_home() == Path("/srv/x")
    monkeypatch.delenv("EDGEEXIT_HOME")
    assert board_home() == Path.home() / ".local/share/edgeexit"


# ---------------------------------------------------------------- rubbish


def test_rubbish_goes_and_what_is_needed_stays(desk: Desk) -> None:
    desk.deploy("a", "b", "c")
    staged = desk.install("d")

    assert desk.board.collect() == [f"apps/{APP}/releases/{A}"]
    assert set(desk.board.installed()) == {B, C, staged}
    assert desk.board.collect() == []
    desk.board.rollback()
    desk.board.activate(staged, passes)
    assert desk.links() == (staged, B)


def test_more_old_releases_may_be_kept(desk: Desk) -> None:
    desk.deploy("a", "b", "c", "d")

    assert desk.board.collect(keep=99) == desk.board.collect(keep=4) == []
    assert desk.board.collect(keep=3) == []
    assert desk.board.collect(keep=2) == [f"apps/{APP}/releases/{A}"]
    assert desk.board.collect(keep=0) == [f"apps/{APP}/releases/{B}"]


def test_what_an_intent_means_stays(desk: Desk) -> None:
    desk.deploy("a", "b", "c")
    links = desk.shelf.links()
    intent = Intent(what="rollback", release=A, before=links, after=Links(current=A, previous=C))
    desk.shelf.write(State(intent=intent))

    assert desk.board.collect() == []
    assert desk.links() == (A, C)


def test_room_is_made_on_a_full_disk(tmp_path: Path) -> None:
    """No byte is free, and an intent waits to be cleared: rubbish goes all the same."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small file system")
    (tmp_path / "home").mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path / "home")]
    subprocess.run(small, check=True)
    try:
        desk = Desk(tmp_path)
        desk.deploy("a", "b", "c")
        for path in (desk.home / "blobs").iterdir():
            os.utime(path, (1, 1))
        links = desk.shelf.links()
        desk.shelf.write(State(intent=Intent(what="check", release=C, before=links, after=links)))
        with (desk.home / "full").open("wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(b"x" * 4096)
        with pytest.raises(StorageError):
            desk.board.rollback()
        assert desk.board.open().name == C
        assert "degraded" in desk.lines[-1]

        assert f"apps/{APP}/releases/{A}" in desk.board.collect()

        assert desk.board.rollback().current == B
    finally:
        subprocess.run(["umount", str(tmp_path / "home")], check=True)


# ---------------------------------------------------------------- two at once


def test_two_at_once_is_one_too_many(desk: Desk) -> None:
    desk.deploy("a", "b")
    manifest = Manifest.from_folder(desk.root / "b")
    orders: list[Callable[[], object]] = [
        lambda: desk.board.install(manifest),
        lambda: desk.board.activate(A, passes),
        desk.board.rollback,
        desk.board.collect,
        desk.board.repair,
    ]
    with hold(desk.shelf.lock, "it"):
        for order in orders:
            with pytest.raises(Busy) as caught:
                order()
            assert caught.value.exit_code == 8
        # Whoever only wants to run or look need not wait.
        assert desk.board.open().name == B
        assert desk.board.status().current == B
    assert desk.links() == (B, A)


def test_the_lock_is_kept_over_several_calls_and_free_afterwards(desk: Desk) -> None:
    other = Releases(desk.home, APP)
    with desk.board.locked():
        desk.deploy("a")
        with pytest.raises(Busy):
            other.collect()
        with desk.board.locked():
            desk.deploy("b")
        with pytest.raises(Busy):
            other.collect()
    assert other.collect() == []


def test_a_killed_holder_locks_nobody_out(desk: Desk) -> None:
    desk.deploy("a")
    (desk.root / "brought").mkdir()
    words = process(desk.root, "churn", "", "0")
    with subprocess.Popen(words, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()

    desk.board.repair()
    desk.deploy("b")
    assert desk.board.current_id() == B


# ---------------------------------------------------------------- tampering


def damages() -> dict[str, Callable[[Path], object]]:
    def byte(folder: Path) -> None:
        (folder / "model.tflite").chmod(0o644)
        with (folder / "model.tflite").open("r+b") as file:
            file.seek(7)
            file.write(b"!")

    def link(folder: Path) -> None:
        (folder / "bundle.json").rename(folder.parent / "elsewhere")
        (folder / "bundle.json").symlink_to("../elsewhere")

    def pipe(folder: Path) -> None:
        (folder / "bundle.json").unlink()
        os.mkfifo(folder / "bundle.json")

    def listed(folder: Path) -> None:
        (folder / "more").write_text("x")
        document = json.loads((folder / RECORD).read_text())
        more = Manifest.from_folder(folder).to_document()
        assert document != more
        (folder / RECORD).write_text(json.dumps(more))

    return {
        "byte": byte,
        "cut": lambda folder: os.truncate(folder / "model.tflite", 10),
        "grown": lambda folder: os.truncate(folder / "model.tflite", 1 << 40),
        "missing": lambda folder: (folder / "policies/rpi4.json").unlink(),
        "extra": lambda folder: (folder / "sitecustomize.py").write_text("boom"),
        "hidden": lambda folder: (folder / ".hidden").write_text("x"),
        "folder": lambda folder: (folder / "more").mkdir(),
        "link": link,
        "pipe": pipe,
        "record": lambda folder: (folder / RECORD).write_text("{}"),
        "no record": lambda folder: (folder / RECORD).unlink(),
        "long record": lambda folder: os.truncate(folder / RECORD, 1 << 30),
        "garbage": lambda folder: (folder / RECORD).write_bytes(b"\xff\0"),
        "forged": listed,
        "gone": shutil.rmtree,
        "emptied": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
        "a file": lambda folder: [shutil.rmtree(folder), folder.write_text("x")],
    }


@pytest.mark.parametrize("kind", damages())
def test_a_tampered_release_is_refused_and_the_previous_one_runs(desk: Desk, kind: str) -> None:
    desk.deploy("a", "b")
    damages()[kind](desk.shelf.release(B))

    assert is_sound(desk.board.open(), A)

    assert len(desk.lines) == 1
    assert B in desk.lines[0] and A in desk.lines[0] and "\n" not in desk.lines[0]
    assert desk.links() == (A, None)
    assert B in desk.board.status().bad
    with pytest.raises(UsageError):
        desk.board.rollback()
    # Deployed again it is put together anew, and whole.
    desk.deploy("b")
    assert desk.links() == (B, A)
    assert is_sound(desk.board.open(), B)
    assert desk.board.status().bad == {}


def test_every_single_byte_counts(desk: Desk) -> None:
    desk.deploy("a", "b")
    folder = desk.shelf.release(B)
    for name in ("bundle.json", "policies/rpi4.json", RECORD):
        data = (folder / name).read_bytes()
        (folder / name).chmod(0o644)
        for k in range(len(data)):
            (folder / name).write_bytes(data[:k] + bytes([data[k] ^ 1]) + data[k + 1 :])
            assert desk.shelf.fault(B) is not None, (name, k)
        (folder / name).write_bytes(data)
    assert desk.shelf.fault(B) is None


def test_where_no_release_is_sound_none_runs(desk: Desk) -> None:
    desk.deploy("a", "b")
    for release in (A, B):
        spoil(desk.root, release)

    with pytest.raises(BadFile, match="no sound release to run") as caught:
        desk.board.open()
    assert "deploy" in str(caught.value.hint)
    assert len(desk.lines) == 2


def test_a_tampered_previous_release_is_not_gone_back_to(desk: Desk) -> None:
    desk.deploy("a", "b")
    spoil(desk.root, A)

    with pytest.raises(BadFile, match=r"model\.tflite was altered"):
        desk.board.rollback()
    assert desk.links() == (B, A)
    assert desk.board.open().name == B


@pytest.mark.parametrize("target", ["/etc", "../../..", "releases/../..", "releases", "x", B])
def test_a_link_that_leads_elsewhere_is_none(desk: Desk, target: str) -> None:
    desk.deploy("a", "b")
    (desk.shelf.path / "current").unlink()
    (desk.shelf.path / "current").symlink_to(target)

    assert desk.board.open().name == A


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"format": 9}', "\0" * 77, '{"format": 1}'),
        '{"format": 1, "intent": {"what": "rm"}, "staged": null, "bad": {}, "tries": {}}',
        '{"format": 1, "intent": null, "staged": "../..", "bad": {}, "tries": {}}',
    ],
    ids=range(8),
)
def test_a_damaged_state_stops_nothing(desk: Desk, text: str) -> None:
    desk.deploy("a", "b")
    staged = desk.install("c")
    (desk.shelf.path / "state.json").write_text(text)

    assert desk.board.open().name == B
    assert "what was noted is lost" in desk.lines[0]
    assert desk.board.collect() == []
    desk.board.activate(staged, passes)
    assert desk.links() == (C, B)


# ---------------------------------------------------------------- storage that cannot be written


def test_on_read_only_storage_it_runs_and_says_so(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system read-only")
    (tmp_path / "home").mkdir()
    home = str(tmp_path / "home")
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", home], check=True)
    try:
        desk = Desk(tmp_path)
        desk.deploy("a", "b")
        subprocess.run(["mount", "-o", "remount,ro", home], check=True)
        assert desk.board.open().name == B
        assert desk.lines == [f"degraded: {desk.shelf.lock}: cannot write: Read-only file system"]
        assert desk.board.status().current == B
        for order in (desk.board.rollback, desk.board.collect, desk.board.repair):
            with pytest.raises(StorageError):
                order()

        subprocess.run(["mount", "-o", "remount,rw", home], check=True)
        spoil(desk.root, B)
        subprocess.run(["mount", "-o", "remount,ro", home], check=True)
        assert desk.board.open().name == A
        assert desk.links() == (B, A)
    finally:
        subprocess.run(["umount", home], check=True)


# ---------------------------------------------------------------- against a model


class Model(RuleBasedStateMachine):
    """
    Any sequence of orders and mishaps; beside it what the board should be, in a few variables.

    bad maps releases to "check" or "altered"; a killed order has not happened, or, if it is a
    rollback, has.
    """

    letters = st.sampled_from("abcde")

    @initialize()
    def begin(self) -> None:
        import tempfile

        self.root = Path(tempfile.mkdtemp())
        self.desk = Desk(self.root)
        self.current: str | None = None
        self.previous: str | None = None
        self.staged: str | None = None
        self.installed: set[str] = set()
        self.spoilt: set[str] = set()
        self.bad: set[str] = set()
        self.ids: dict[str, str] = {}

    def teardown(self) -> None:
        if hasattr(self, "root"):
            shutil.rmtree(self.root)

    def sound(self, release: str | None) -> bool:
        return release in self.installed - self.spoilt

    @rule(letter=letters)
    def install(self, letter: str) -> None:
        release = self.desk.install(letter)
        self.ids[letter] = release
        self.installed.add(release)
        self.spoilt.discard(release)
        self.staged = None if release in (self.current, *self.bad) else release

    def _settle(self, current: str, previous: str | None) -> None:
        self.current, self.previous = current, previous
        self.staged = None if self.staged == current else self.staged

    def _activated(self, release: str) -> None:
        self.bad.discard(release)
        if release != self.current:
            self._settle(release, self.current if self.sound(self.current) else self.previous)

    @precondition(lambda self: self.installed)
    @rule(data=st.data(), force=st.booleans(), is_well=st.booleans())
    def activate(self, data: st.DataObject, force: bool, is_well: bool) -> None:
        release = data.draw(st.sampled_from(sorted(self.installed)))
        refusal = None
        try:
            self.desk.board.activate(release, passes if is_well else fails, force=force)
        except EdgeExitError as error:
            refusal = error
        if release in self.spoilt:
            assert isinstance(refusal, BadFile)
            self.staged = None if self.staged == release else self.staged
        elif release in self.bad and not force:
            assert isinstance(refusal, SelfTestError)
        elif release == self.current and not force:
            assert refusal is None
        elif is_well:
            assert refusal is None
            self._activated(release)
        else:
            assert isinstance(refusal, SelfTestError)
            self.bad.add(release)
            self.staged = None if self.staged == release else self.staged

    @precondition(lambda self: self.installed)
    @rule(is_killed=st.booleans())
    def rollback(self, is_killed: bool) -> None:
        can = self.previous is not None and self.sound(self.previous)
        if is_killed and can:
            self._kill(self.desk.board.rollback)
        else:
            try:
                self.desk.board.rollback()
                assert can
            except (UsageError, BadFile) as error:
                assert isinstance(error, BadFile if self.previous else UsageError)
                assert not can
                if self.previous == self.staged:
                    self.staged = None
        if can:
            assert self.previous is not None
            self._settle(self.previous, self.current if self.sound(self.current) else None)

    def _kill(self, order: Callable[[], object]) -> None:
        """Give the order to one who is killed between the two links."""

        class Killed(BaseException):
            pass

        shelf = self.desk.board._shelf
        whole = shelf.point

        def half(links: Links) -> None:
            whole(Links(current=self.desk.board.current_id(), previous=links.previous))
            raise Killed

        shelf.point = half  # type: ignore[method-assign]
        try:
            with pytest.raises(Killed):
                order()
        finally:
            shelf.point = whole  # type: ignore[method-assign]

    @precondition(lambda self: self.installed - self.spoilt - self.bad - {self.current})
    @rule(data=st.data())
    def activate_and_be_killed(self, data: st.DataObject) -> None:
        choices = self.installed - self.spoilt - self.bad - {self.current}
        release = data.draw(st.sampled_from(sorted(choices)))
        is_undone = self.current is None or self.sound(self.current)
        self._kill(lambda: self.desk.board.activate(release, passes))
        if not is_undone:
            self._activated(release)

    @rule()
    def collect(self) -> None:
        self.desk.board.collect(keep=0)
        self.installed &= {self.current, self.previous, self.staged}
        self.spoilt &= self.installed

    @precondition(lambda self: self.installed - self.spoilt)
    @rule(data=st.data())
    def tamper(self, data: st.DataObject) -> None:
        release = data.draw(st.sampled_from(sorted(self.installed - self.spoilt)))
        spoil(self.root, release)
        self.spoilt.add(release)

    @precondition(lambda self: self.installed)
    @rule()
    def run(self) -> None:
        try:
            found = self.desk.board.open().name
        except UsageError:
            assert (self.current, self.previous) == (None, None)
            return
        except BadFile:
            assert not self.sound(self.current)
            assert not self.sound(self.previous)
            for release in (self.current, self.previous):
                self.staged = None if self.staged == release else self.staged
            return
        if self.sound(self.current):
            assert found == self.current
        else:
            assert found == self.previous
            if self.staged == self.current:
                self.staged = None
            self._settle(found, None)

    @invariant()
    def the_board_is_as_it_should_be(self) -> None:
        if not hasattr(self, "desk"):
            return
        status = self.desk.board.status()
        assert (status.current, status.previous) == (self.current, self.previous)
        assert set(status.releases) == self.installed
        assert status.staged == self.staged
        assert status.pending is None
        assert self.bad <= set(status.bad)
        assert {r for r in self.installed - self.bad if r not in self.spoilt}.isdisjoint(status.bad)
        assert self.spoilt <= set(status.bad)


class LongModel(Model):
    """The same, for longer."""


for model, examples in ((Model, 25), (LongModel, 500)):
    model.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=20,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
test_any_sequence_of_orders_and_mishaps_is_as_the_model_says = Model.TestCase
test_so_are_many_more = pytest.mark.slow(LongModel.TestCase)

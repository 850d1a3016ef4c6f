"""
Boards on which crashes are staged: what lies there, what is done, and what must hold afterwards.

A scenario is prepared in a folder that holds home/ (the board's folder) and brought/ (the release
that is new). Its operation runs in a process of its own (board_process.py) that strace watches,
kills or lets fail at any system call that writes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from edgeexit.errors import EdgeExitError, SelfTestError, UsageError
from edgeexit.intents import Links
from edgeexit.manifest import RECORD, Manifest
from edgeexit.releases import Releases

CHECKOUT = Path(__file__).resolve().parents[1]
PROCESS = Path(__file__).with_name("board_process.py")
APP = "app"

# Every system call that changes what lies on the storage.
WRITING = (
    *("openat", "open", "creat", "write", "pwrite64", "writev", "pwritev2", "fallocate"),
    *("fsync", "fdatasync", "sync_file_range", "ftruncate", "truncate", "sendfile"),
    *("copy_file_range", "rename", "renameat", "renameat2", "link", "linkat", "symlink"),
    *("symlinkat", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "mknodat"),
    *("chmod", "fchmod", "fchmodat", "fchown", "fchownat", "utimensat"),
)
_CREATING = ("O_CREAT", "O_WRONLY", "O_RDWR", "O_TRUNC")


def contents(letter: str) -> dict[str, bytes]:
    """The files of one release; no two releases share bundle.json."""
    return {
        "bundle.json": f'{{"name": "{letter}"}}'.encode(),
        "model.tflite": letter.encode() * 3000,
        "policies/rpi4.json": b'{"exits": ["a"]}',
    }


def write_folder(folder: Path, files: Mapping[str, bytes]) -> Manifest:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return Manifest.from_folder(folder)


def bring(root: Path, letter: str) -> Manifest:
    """Put a release into brought/ as what is new."""
    manifest = write_folder(root / "brought" / "files", contents(letter))
    (root / "brought" / "manifest.json").write_text(json.dumps(manifest.to_document()))
    return manifest


def upload(root: Path, board: Releases, manifest: Manifest) -> None:
    for entry in board.missing(manifest):
        board.add(entry, root / "brought" / "files" / entry.path)


def passes(folder: Path) -> None:
    """The check of a sound release."""


def fails(folder: Path) -> None:
    raise SelfTestError("logits differ by 9")


def _ids() -> dict[str, str]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return {x: write_folder(Path(folder) / x, contents(x)).id for x in "zabc"}


# z is old and forgotten, a ran before b, b runs, c is new.
IDS = _ids()
Z, A, B, C = IDS["z"], IDS["a"], IDS["b"], IDS["c"]
FILES = {IDS[x]: contents(x) for x in "zabc"}


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """
    An operation on a prepared board; the links before it and after it; what is damaged there.

    *also* are links that a call which is cut short may lead to, *new* is the release brought.
    """

    operation: str
    before: Links
    after: Links
    prepare: Callable[[Path, Releases], object]
    damaged: frozenset[str] = frozenset()
    also: tuple[Links, ...] = ()
    new: str = C
    exit_code: int = 0
    repeat: Callable[[Path, Releases], object] = field(default=lambda root, board: None)

    def stage(self, root: Path) -> None:
        """Prepare the board in the folder *root*."""
        board = Releases(root / "home", APP)
        if self.before != Links():
            for letter in "zab":
                manifest = bring(root, letter)
                upload(root, board, manifest)
                board.install(manifest)
                board.activate(manifest.id, passes)
            shutil.rmtree(root / "home" / "blobs")
            shutil.rmtree(root / "brought")
        bring(root, "c")
        self.prepare(root, board)


def _nothing(root: Path, board: Releases) -> None:
    pass


def _uploaded(root: Path, board: Releases) -> None:
    upload(root, board, Manifest.from_folder(root / "brought" / "files"))


def _installed(root: Path, board: Releases) -> None:
    _uploaded(root, board)
    board.install(Manifest.from_folder(root / "brought" / "files"))


def spoil(root: Path, release: str) -> None:
    """Change one byte of an installed release."""
    path = root / "home" / "apps" / APP / "releases" / release / "model.tflite"
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.seek(1234)
        file.write(b"!")


def _spoilt_new(root: Path, board: Releases) -> None:
    _installed(root, board)
    spoil(root, C)


def _spoilt_current(root: Path, board: Releases) -> None:
    spoil(root, B)


def _spoilt_and_brought(root: Path, board: Releases) -> None:
    spoil(root, B)
    bring(root, "b")
    _uploaded(root, board)


class _Killed(BaseException):
    pass


def _half(operation: Callable[[Path, Releases], object]) -> Callable[[Path, Releases], None]:
    """Whoever did it was killed when one of the two links was exchanged."""

    def prepare(root: Path, board: Releases) -> None:
        _installed(root, board)
        whole = board._shelf.point

        def half(links: Links) -> None:
            whole(Links(current=board.current_id(), previous=links.previous))
            raise _Killed

        board._shelf.point = half  # type: ignore[method-assign]
        with suppress(_Killed):
            operation(root, board)

    return prepare


def _old_upload(root: Path, board: Releases) -> None:
    _uploaded(root, board)
    for path in (root / "home" / "blobs").iterdir():
        os.utime(path, (1, 1))


def _install(root: Path, board: Releases) -> None:
    _uploaded(root, board)
    board.install(Manifest.from_folder(root / "brought" / "files"))


def _activate(root: Path, board: Releases) -> None:
    board.activate(C, passes)


def _deploy(root: Path, board: Releases) -> None:
    _install(root, board)
    _activate(root, board)


def _mend(root: Path, board: Releases) -> None:
    _install(root, board)
    board.activate(B, passes, force=True)


def _rollback(root: Path, board: Releases) -> None:
    board.rollback()


def _refused(root: Path, board: Releases) -> None:
    with pytest.raises(SelfTestError):
        board.activate(C, fails)


AB, BA = Links(current=B, previous=A), Links(current=A, previous=B)
CB, NEW = Links(current=C, previous=B), Links(current=C)
SCENARIOS = {
    "first": Scenario(
        operation="deploy", before=Links(), after=NEW, prepare=_nothing, repeat=_deploy
    ),
    "begin": Scenario(
        operation="install", before=Links(), after=Links(), prepare=_uploaded, repeat=_install
    ),
    "deploy": Scenario(operation="deploy", before=AB, after=CB, prepare=_nothing, repeat=_deploy),
    "install": Scenario(
        operation="install", before=AB, after=AB, prepare=_uploaded, repeat=_install
    ),
    "replace": Scenario(
        operation="install",
        before=AB,
        after=AB,
        prepare=_spoilt_new,
        damaged=frozenset({C}),
        repeat=_install,
    ),
    "mend": Scenario(
        operation="install",
        before=AB,
        after=AB,
        also=(Links(current=A),),
        new=B,
        prepare=_spoilt_and_brought,
        damaged=frozenset({B}),
        repeat=_mend,
    ),
    "activate": Scenario(
        operation="activate", before=AB, after=CB, prepare=_installed, repeat=_activate
    ),
    "fail": Scenario(
        operation="fail", before=AB, after=AB, prepare=_installed, exit_code=10, repeat=_refused
    ),
    "rollback": Scenario(
        operation="rollback", before=AB, after=BA, prepare=_nothing, repeat=_rollback
    ),
    "collect": Scenario(operation="collect", before=AB, after=AB, prepare=_old_upload),
    "open": Scenario(
        operation="open",
        before=AB,
        after=Links(current=A),
        prepare=_spoilt_current,
        damaged=frozenset({B}),
    ),
    "undo": Scenario(operation="repair", before=AB, after=AB, prepare=_half(_activate)),
    "finish": Scenario(operation="repair", before=AB, after=BA, prepare=_half(_rollback)),
}


# ---------------------------------------------------------------- what must hold


def is_sound(folder: Path, release: str) -> bool:
    """Whether the folder holds just the files of *release*: by comparison, not by digests."""
    found = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    found.pop(RECORD, None)
    return found == FILES[release]


def examine(scenario: Scenario, root: Path, acknowledged: Sequence[str]) -> list[str]:
    """What does not hold on the board in *root* after its operation ended somewhere."""
    return [*_at_rest(scenario, root), *_at_work(scenario, root, acknowledged)]


def _at_rest(scenario: Scenario, root: Path) -> list[str]:
    """What whoever only reads would stumble over."""
    folder, wrong = root / "home" / "apps" / APP, []
    ends = (scenario.before, scenario.after)
    allowed = {
        "current": {end.current for end in ends},
        # It is exchanged first.
        "previous": {*(end.previous for end in ends), scenario.before.current},
    }
    for name, targets in allowed.items():
        if not (folder / name).is_symlink():
            if all(getattr(end, name) for end in ends):
                wrong.append(f"there is no {name}")
            continue
        target = str((folder / name).readlink()).removeprefix("releases/")
        if target not in targets:
            wrong.append(f"{name} is {target}")
        elif target not in scenario.damaged and not is_sound(folder / name, target):
            wrong.append(f"{name} is not whole")
    for path in (folder / "releases").glob("[!.]*"):
        if path.name not in scenario.damaged and not is_sound(path, path.name):
            wrong.append(f"release {path.name} is not whole")
    if (folder / "state.json").exists():
        try:
            json.loads((folder / "state.json").read_text())
        except ValueError:
            wrong.append("state.json is not whole")
    return wrong


def _at_work(scenario: Scenario, root: Path, acknowledged: Sequence[str]) -> list[str]:
    folder, wrong = root / "home" / "apps" / APP, []
    board = Releases(root / "home", APP)
    done = scenario.operation in acknowledged or "activate" in acknowledged
    ends = [scenario.after] if done else [scenario.before, scenario.after, *scenario.also]
    try:
        runs = board.open()
        if not is_sound(runs, runs.name):
            wrong.append(f"{runs.name} would be run, and is not whole")
        if runs.name not in {end.current for end in ends}:
            wrong.append(f"{runs.name} would be run")
    except UsageError as error:
        if Links() not in ends:
            wrong.append(f"nothing would be run: {error}")
    except EdgeExitError as error:
        wrong.append(f"nothing would be run: {error}")
    board.repair()
    state, links = board.status(), board._shelf.links()
    # A spoilt release is left behind by the first who looks at it.
    if links not in ends and links.current not in {end.current for end in ends if scenario.damaged}:
        wrong.append(f"links are {links}")
    if state.pending is not None:
        wrong.append(f"{state.pending} is still pending")
    if folder.exists() and any((*folder.glob(".*"), *folder.glob("releases/.*"))):
        wrong.append("rubbish stays")
    if "install" in acknowledged and (
        scenario.new not in state.releases or scenario.new not in (state.staged, links.current)
    ):
        wrong.append("the installed release is lost")
    try:
        if scenario.exit_code or links != scenario.after or scenario.after == scenario.before:
            scenario.repeat(root, board)
        kept = {*vars_of(board._shelf.links()), board.status().staged}
        board.collect()
    except EdgeExitError as error:
        return [*wrong, f"cannot be repeated: {error}"]
    if board._shelf.links() != scenario.after:
        wrong.append(f"repeated: links are {board._shelf.links()}")
    for release in kept - {None}:
        assert release is not None
        if not is_sound(folder / "releases" / release, release):
            wrong.append(f"repeated: {release} is not whole")
    return wrong


def vars_of(links: Links) -> tuple[str | None, str | None]:
    return links.current, links.previous


# ---------------------------------------------------------------- processes


def need(command: str) -> None:
    if shutil.which(command, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None:
        pytest.skip(f"needs {command}")


def process(root: Path, operation: str, *words: str) -> list[str]:
    """The command line of a process that works on the board in *root*."""
    home = str(root / "home")
    return [sys.executable, "-S", "-B", "-E", str(PROCESS), str(CHECKOUT), home, operation, *words]


def work(
    root: Path,
    operation: str,
    *words: str,
    inject: str | None = None,
    log: Path | None = None,
    text_bytes: int = 32,
) -> "subprocess.CompletedProcess[str]":
    """Run *operation* under strace: *inject* is its way to kill or fail; *log* what was called."""
    calls = ",".join(f"?{name}" for name in WRITING)
    return subprocess.run(
        [
            *("strace", "-f", "-y", "-xx", "-s", str(text_bytes), "-e", f"trace={calls}"),
            *("-o", str(log or os.devnull)),
            # A filter in the kernel saves time, but nothing is injected behind one.
            *(("-e", f"inject={inject}") if inject else ("--seccomp-bpf",)),
            *process(root, operation, *words),
        ],
        capture_output=True,
        text=True,
        check=False,
    )


def acknowledged(done: "subprocess.CompletedProcess[str]") -> list[str]:
    return done.stdout.split()


@dataclass(frozen=True)
class Call:
    """The *nth* call of the system call *name*, as strace prints it."""

    name: str
    nth: int
    line: str


def calls(log: Path, root: Path) -> list[Call]:
    """The calls that change something below *root*, in their order."""
    counts: dict[str, int] = {}
    found = []
    for line in log.read_text().splitlines():
        match = re.match(r"\d+\s+(\w+)\(", line)
        if match is None:
            continue
        name = match[1]
        counts[name] = counts.get(name, 0) + 1
        text = decoded(line)
        is_ours = f"{root}/home" in text and " = -1 " not in line
        if is_ours and (not name.startswith("open") or any(flag in line for flag in _CREATING)):
            found.append(Call(name, counts[name], text))
    return found


def decoded(line: str) -> str:
    """A line of strace with its \\x escapes turned into letters."""
    return re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), line)


@contextmanager
def copied(template: Path, target: Path) -> Any:
    """A copy of a prepared board that vanishes at the end."""
    shutil.copytree(template, target, symlinks=True)
    try:
        yield target
    finally:
        shutil.rmtree(target)

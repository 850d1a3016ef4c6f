"""
A process that works on a board's releases and can be killed at any moment: python -S -B FILE.

Arguments: the checkout, HOME, the name of an operation, and optionally what is wrong with the
code: a name of MUTANTS, or a place that forgets to call os.fsync ("" for none: stderr then says
which places there are); for churn also the number of its first release. One line on stdout
acknowledges each step.
"""

import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path


def place(handle: int) -> str:
    """Who wants *handle* on the storage: "function kind line", helpers left out."""
    frame = sys._getframe(2)
    while frame.f_code.co_name in ("sync_folder", "_sync"):
        assert frame.f_back is not None
        frame = frame.f_back
    code = frame.f_code
    kind = "folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file"
    return f"{code.co_name} {kind} {frame.f_lineno}"


def watch(forgotten: str) -> None:
    """Tell on stderr who calls fsync; let it do nothing where it is called from *forgotten*."""
    real = os.fsync

    def fsync(handle: int) -> None:
        here = place(handle)
        sys.stderr.write(f"fsync {here}\n")
        if here != forgotten:
            real(handle)

    os.fsync = fsync


def link_before_intent() -> None:
    """The links are exchanged before it is noted that they shall be."""
    from edgeexit.releases import Intent, Links, Releases, State

    def switch(self: Releases, state: State, what: str, after: Links) -> None:
        before = self._shelf.links()
        self._shelf.point(after)
        assert after.current is not None
        intent = Intent(what=what, release=after.current, before=before, after=after)
        self._settle(self._shelf.write(replace(state, intent=intent)), after)

    Releases._switch = switch  # type: ignore[method-assign]


def links_without_rename() -> None:
    """A link is removed and made anew."""
    from edgeexit import shelf

    def point(path: Path, target: str | None) -> None:
        path.unlink(missing_ok=True)
        if target is not None:
            path.symlink_to(target)
        shelf.sync_folder(path.parent)

    shelf.point = point


def release_in_place() -> None:
    """A release is put together under its own name."""
    from edgeexit import blobs

    @contextmanager
    def new_folder(path: Path) -> Iterator[Path]:
        path.mkdir()
        yield path

    blobs.new_folder = new_folder  # type: ignore[assignment]


def appears_before_it_is_synced() -> None:
    """A release gets its name, and is waited for afterwards."""
    from edgeexit import blobs, files

    @contextmanager
    def new_folder(path: Path) -> Iterator[Path]:
        temporary = path.with_name(f".{path.name}.part")
        temporary.mkdir()
        yield temporary
        temporary.rename(path)
        for child in (*path.rglob("*"), path, path.parent):
            files._sync(child)

    blobs.new_folder = new_folder  # type: ignore[assignment]


def state_in_place() -> None:
    """state.json is written over."""
    from edgeexit import shelf

    def write_file(path: Path, data: bytes) -> None:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        shelf.sync_folder(path.parent)

    shelf.write_file = write_file  # type: ignore[assignment]


def no_fsync() -> None:
    """Nothing is waited for."""
    os.fsync = lambda handle: None


def no_intent() -> None:
    """Nothing is noted before the links are exchanged."""
    from edgeexit.releases import Links, Releases, State

    def switch(self: Releases, state: State, what: str, after: Links) -> None:
        self._settle(state, after)

    Releases._switch = switch  # type: ignore[method-assign]


def collects_what_is_gone_back_to() -> None:
    """The previous release is rubbish, too."""
    from edgeexit.releases import Releases

    def collect(self: Releases, *, keep: int = 1) -> list[str]:
        current = self._shelf.links().current
        with self.locked():
            self._shelf.remove([name for name in self._shelf.names() if name != current])
        return []

    Releases.collect = collect  # type: ignore[method-assign]


def removes_in_place() -> None:
    """A release is removed file by file under its own name."""
    from edgeexit.shelf import Shelf

    def remove(self: Shelf, names: Sequence[str]) -> None:
        for name in names:
            shutil.rmtree(self.release(name))

    Shelf.remove = remove  # type: ignore[method-assign]


MUTANTS: dict[str, Callable[[], None]] = {
    work.__name__: work
    for work in (
        link_before_intent,
        links_without_rename,
        release_in_place,
        appears_before_it_is_synced,
        state_in_place,
        no_fsync,
        no_intent,
        collects_what_is_gone_back_to,
        removes_in_place,
    )
}


def main() -> None:
    checkout, home, operation, *rest = sys.argv[1:]
    sys.path.insert(0, checkout)
    if rest:
        MUTANTS.get(rest[0], lambda: watch(rest[0]))()
    from edgeexit.errors import EdgeExitError, SelfTestError
    from edgeexit.files import read_json
    from edgeexit.manifest import Manifest
    from edgeexit.releases import Releases

    board = Releases(Path(home), "app")
    brought = Path(home).parent / "brought"  # the release that is new
    if operation != "churn":
        manifest = Manifest.from_document(read_json(brought / "manifest.json"))

    def passes(folder: Path) -> None:
        """The check of a sound release."""

    def fails(folder: Path) -> None:
        raise SelfTestError("logits differ by 9")

    def done(step: str) -> None:
        os.write(1, f"{step}\n".encode())

    def deploy() -> None:
        with board.locked():
            for entry in board.missing(manifest):
                board.add(entry, brought / "files" / entry.path)
            board.install(manifest)
            done("install")
            board.activate(manifest.id, passes)
            done("activate")
            board.collect()

    def churn() -> None:
        """Deploy one release after the other; say what is about to be true, and what is."""
        number, status = int(rest[1]), board.status()
        current, previous = status.current, status.previous

        def step(word: Callable[[], object], *state: str | None) -> None:
            line = " ".join(name or "-" for name in state)
            os.write(1, f"begin {line}\n".encode())
            word()
            os.write(1, f"done {line}\n".encode())

        step(board.repair, current, previous, status.staged)
        while True:
            folder = brought / str(number)
            folder.mkdir()
            (folder / "bundle.json").write_text(str(number))
            (folder / "model.tflite").write_bytes(str(number).encode() * 20000)
            new = Manifest.from_folder(folder)
            for entry in board.missing(new):
                board.add(entry, folder / entry.path)
            step(lambda m=new: board.install(m), current, previous, new.id)  # type: ignore[misc]
            step(lambda m=new: board.activate(m.id, passes), new.id, current, None)  # type: ignore[misc]
            current, previous = new.id, current
            if number % 3 == 0 and previous:
                current, previous = previous, current
                step(board.rollback, current, previous, None)
            step(board.collect, current, previous, None)
            number += 1

    operations: dict[str, Callable[[], object]] = {
        "churn": churn,
        "install": lambda: board.install(manifest),
        "activate": lambda: board.activate(manifest.id, passes),
        "fail": lambda: board.activate(manifest.id, fails),
        "rollback": board.rollback,
        "collect": board.collect,
        "open": board.open,
        "repair": board.repair,
        "deploy": deploy,
    }
    try:
        operations[operation]()
    except EdgeExitError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)
    done(operation)


if __name__ == "__main__":
    main()

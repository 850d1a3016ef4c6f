"""
A file system that loses at a power cut whatever it is allowed to lose.

It is fed with system calls as strace printed them, and keeps of every file and folder what the
processes see and what is on the storage. Only fsync moves something from the one to the other.
images() are the trees that may be found after a power cut at this moment: any subset of the names
that changed since their folder was synced, and of a file only what was synced.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# So many changes of names may be pending for all subsets of them to be looked at.
_ALL_SUBSETS = 6
_CALL = re.compile(r"\d+\s+(\w+)\((.*)\)\s+= (\d+)(?:<(.*)>)?$")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_HANDLE = re.compile(r"^(?:AT_FDCWD|\d+)<([^>]*)>")


@dataclass(eq=False)
class File:
    seen: bytes = b""
    kept: bytes = b""


@dataclass(eq=False)
class Link:
    target: str


@dataclass(eq=False)
class Folder:
    """*kept* are the names on the storage, *pending* what happened to them since, in order."""

    seen: dict[str, "Node"] = field(default_factory=dict)
    kept: dict[str, "Node"] = field(default_factory=dict)
    pending: list["Change"] = field(default_factory=list)


Node = File | Link | Folder
Image = dict[str, bytes | str | None]
"""Paths below the root: bytes of a file, target of a link, None for a folder."""


@dataclass(eq=False)
class Change:
    """In *folder* *gone* vanishes, if anything, and *name* becomes *node*, if anything."""

    folder: Folder
    gone: str | None = None
    name: str | None = None
    node: Node | None = None

    def apply(self, names: dict[str, Node]) -> None:
        if self.gone is not None:
            names.pop(self.gone, None)
        if self.name is not None and self.node is not None:
            names[self.name] = self.node


class Storage:
    """The tree below *root*, which is all on the storage at first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._tree = _read(root)
        self.said: list[str] = []  # what was written to stdout

    def feed(self, line: str) -> bool:
        """Do what a line of strace says; whether a power cut now may leave something new."""
        match = _CALL.match(line)
        if match is None:
            return False
        name, words, _, _ = match.groups()
        texts = [_unescaped(text) for text in _TEXT.findall(words)]
        paths = [text.decode() for text in texts]
        at = _HANDLE.match(words)
        handle = _unescaped(at[1]).decode() if at else ""
        if name == "write" and words.startswith("1<"):
            self.said += paths[0].split()
            return True
        if name in ("openat", "open"):
            return self._open(_joined(handle, paths[0]), words)
        if name == "write":
            return self._append(handle, texts[0])
        if name in ("fsync", "fdatasync"):
            return self._sync(handle)
        if name in ("mkdir", "mkdirat"):
            return self._change(_joined(handle, paths[0]), node=Folder())
        if name == "symlink":
            return self._change(paths[1], node=Link(paths[0]))
        if name == "rename":
            return self._rename(paths[0], paths[1])
        if name in ("unlink", "rmdir", "unlinkat"):
            return self._change(_joined(handle, paths[0]), is_gone=True)
        assert name in ("chmod", "fchmod", "fchmodat", "utimensat"), f"{name} is not known here"
        return False

    def _find(self, path: str) -> tuple[Folder, str] | None:
        """The folder and the name of *path*, None if it is not ours."""
        if not Path(path).is_relative_to(self.root) or Path(path) == self.root:
            return None
        *parents, name = Path(path).relative_to(self.root).parts
        folder: Node = self._tree
        for parent in parents:
            assert isinstance(folder, Folder)
            folder = folder.seen[parent]
        assert isinstance(folder, Folder)
        return folder, name

    def _open(self, path: str, words: str) -> bool:
        place = self._find(path)
        if place is None:
            return False
        folder, name = place
        if "O_CREAT" in words and name not in folder.seen:
            return self._change(path, node=File())
        if "O_TRUNC" in words:
            file = folder.seen[name]
            assert isinstance(file, File)
            file.seen = file.kept = b""
            return True
        return False

    def _append(self, path: str, data: bytes) -> bool:
        place = self._find(path)
        if place is None:
            return False
        file = place[0].seen[place[1]]
        assert isinstance(file, File)
        file.seen += data
        return True

    def _sync(self, path: str) -> bool:
        place = self._find(path)
        if place is None:
            node: Node = self._tree
        else:
            node = place[0].seen[place[1]]
        if isinstance(node, File):
            node.kept = node.seen
        elif isinstance(node, Folder):
            node.kept, node.pending = dict(node.seen), []
        return True

    def _change(self, path: str, *, node: Node | None = None, is_gone: bool = False) -> bool:
        place = self._find(path)
        if place is None:
            return False
        folder, name = place
        change = Change(folder, gone=name if is_gone else None, name=name, node=node)
        change.apply(folder.seen)
        folder.pending.append(change)
        return True

    def _rename(self, old: str, new: str) -> bool:
        place, target = self._find(old), self._find(new)
        if place is None or target is None:
            assert place is target is None
            return False
        folder, name = place
        assert folder is target[0], "moved to another folder"
        change = Change(folder, gone=name, name=target[1], node=folder.seen[name])
        change.apply(folder.seen)
        folder.pending.append(change)
        return True

    # ------------------------------------------------------------ what a power cut leaves

    def images(self) -> Iterator[Image]:
        """Trees that a power cut at this moment may leave."""
        pending = [change for folder in self._folders(self._tree) for change in folder.pending]
        if len(pending) <= _ALL_SUBSETS:
            sizes = range(len(pending) + 1)
            subsets = [c for size in sizes for c in itertools.combinations(pending, size)]
        else:
            subsets = [
                *(tuple(pending[:count]) for count in range(len(pending) + 1)),
                *((change,) for change in pending),
                *(tuple(c for c in pending if c is not lost) for lost in pending),
            ]
        for survivors in subsets:
            yield dict(self._image(self._tree, survivors, ""))

    def _folders(self, folder: Folder) -> Iterator[Folder]:
        """All folders that are seen or on the storage."""
        waiting: list[Folder] = [folder]
        known: set[int] = set()
        while waiting:
            here = waiting.pop()
            if id(here) in known:
                continue
            known.add(id(here))
            yield here
            changed = [change.node for change in here.pending]
            nodes = (*here.seen.values(), *here.kept.values(), *changed)
            waiting += [node for node in nodes if isinstance(node, Folder)]

    def _image(
        self, folder: Folder, survivors: tuple[Change, ...], prefix: str
    ) -> Iterator[tuple[str, bytes | str | None]]:
        names = dict(folder.kept)
        for change in survivors:
            if change.folder is folder:
                change.apply(names)
        for name, node in sorted(names.items()):
            if isinstance(node, File):
                yield prefix + name, node.kept
            elif isinstance(node, Link):
                yield prefix + name, node.target
            else:
                yield prefix + name, None
                yield from self._image(node, survivors, f"{prefix}{name}/")


def build(image: Image, root: Path) -> None:
    """Make the tree *image* below the empty folder *root*."""
    for name, content in image.items():
        if content is None:
            (root / name).mkdir()
        elif isinstance(content, str):
            (root / name).symlink_to(content)
        else:
            (root / name).write_bytes(content)


def _read(path: Path) -> Folder:
    names: dict[str, Node] = {}
    for child in path.iterdir():
        if child.is_symlink():
            names[child.name] = Link(str(child.readlink()))
        elif child.is_dir():
            names[child.name] = _read(child)
        else:
            data = child.read_bytes()
            names[child.name] = File(data, data)
    return Folder(seen=dict(names), kept=names)


def _joined(folder: str, path: str) -> str:
    return str(Path(folder) / path)


def _unescaped(text: str) -> bytes:
    """Bytes out of strace's \\x escapes; what is not escaped stays."""
    return re.sub(
        rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), text.encode("latin-1")
    )

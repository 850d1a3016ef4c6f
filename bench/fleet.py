"""
Deploy 1 MB to many boards at once, all sound and with a tenth of them broken.

    python bench/fleet.py [--boards 50] [--limit 8]

A board is a real sshd on loopback with its own host key and its own folder; its edgeexit is this
one. All servers share the cores with the laptop's side. Needs OpenSSH's server, and root for the
board whose disk is full.
"""

import argparse
import getpass
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from common import CHECKOUT, save

sys.path.insert(0, str(CHECKOUT / "tests"))

from faulty_link import FaultyLink
from sshd import Board, make_key

from edgeexit.agent.delivery import LOCK
from edgeexit.bundle import load_bundle, write_bundle
from edgeexit.children import environment
from edgeexit.locks import hold

BYTES = 1_000_000
EXAMPLE = CHECKOUT / "examples" / "fashion.edgeexit"


class Fleet:
    """Boards of our own below *folder*, the laptop's hosts.toml and keys, and `edgeexit` there."""

    def __init__(self, folder: Path, count: int, stack: ExitStack) -> None:
        self.folder, self._stack = folder, stack
        self.laptop = folder / "laptop"
        (self.laptop / ".ssh").mkdir(parents=True, mode=0o700)
        self.key = make_key(self.laptop / ".ssh" / "id_ed25519")
        self.boards = {f"board{k:02}": self._board(f"board{k:02}") for k in range(count)}
        self.ports = {name: board.port for name, board in self.boards.items()}
        self.keys = {name: board.key for name, board in self.boards.items()}

    def _board(self, name: str) -> Board:
        board = Board(folder=self.folder / name, client_key=self.key).start()
        self._stack.callback(board.stop)
        self.install(board)
        return board

    def install(self, board: Board) -> None:
        """Let this very package be the board's."""
        program = board.home / "env" / "1" / "bin" / "edgeexit"
        program.parent.mkdir(parents=True, exist_ok=True)
        path = environment()["PYTHONPATH"]
        program.write_text(
            f'#!/bin/sh\nPYTHONPATH={path} exec {sys.executable} -P -m edgeexit "$@"\n'
        )
        program.chmod(0o755)
        if not (board.home / "env" / "current").is_symlink():
            (board.home / "env" / "current").symlink_to("1")

    def run(self, *argv: str) -> tuple[int, dict[str, Any], float, str]:
        """Exit code, document and seconds of `edgeexit ARGV --json` on the laptop; its stderr."""
        lines = ["format = 1"]
        for name in self.boards:
            lines += [f"[hosts.{name}]", 'host = "127.0.0.1"', f'user = "{getpass.getuser()}"']
            lines += [f"port = {self.ports[name]}", f'host_key = "{self.keys[name]}"']
            lines += ['labels = ["fleet"]']
        (self.folder / "hosts.toml").write_text("\n".join(lines) + "\n")
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-P", "-m", "edgeexit", *argv, "--label", "fleet", "--json"],
            capture_output=True,
            text=True,
            check=False,
            env={
                **environment(),
                "HOME": str(self.laptop),
                "EDGEEXIT_HOSTS": str(self.folder / "hosts.toml"),
            },
        )
        seconds = time.monotonic() - began
        document = json.loads(done.stdout) if done.stdout else {}
        return done.returncode, document, seconds, done.stderr

    # Each fault breaks a board and is mended again when its block ends.

    @contextmanager
    def cut(self, name: str) -> Iterator[None]:
        """The link breaks in the middle of the upload."""
        with FaultyLink(self.boards[name].port) as link:
            link.cut_after = BYTES // 10  # most files are there already
            self.ports[name] = link.port
            yield
        self.ports[name] = self.boards[name].port

    @contextmanager
    def other_key(self, name: str) -> Iterator[None]:
        """The board shows another host key than the one that was pinned."""
        self.keys[name], key = self.boards[next(iter(self.boards))].key, self.keys[name]
        yield
        self.keys[name] = key

    @contextmanager
    def without_edgeexit(self, name: str) -> Iterator[None]:
        """Nobody has set the board up."""
        current = self.boards[name].home / "env" / "current"
        current.unlink()
        yield
        current.symlink_to("1")

    @contextmanager
    def other_processor(self, name: str) -> Iterator[None]:
        """The board's environment was made for another architecture."""
        program = self.boards[name].home / "env" / "1" / "bin" / "edgeexit"
        # An ELF header for a machine that does not exist.
        program.write_bytes(b"\x7fELF\x02\x01\x01" + bytes(9) + b"\x02\x00\xff\xff" + bytes(44))
        yield
        self.install(self.boards[name])

    @contextmanager
    def busy(self, name: str) -> Iterator[None]:
        """Somebody else deploys there."""
        with hold(self.boards[name].home / LOCK, "this board"):
            yield

    @contextmanager
    def full(self, name: str) -> Iterator[None]:
        """The board's disk has no room for three times the bundle."""
        home = self.boards[name].home
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={2 * BYTES}", "none", str(home)], check=True
        )
        try:
            self.install(self.boards[name])
            yield
        finally:
            subprocess.run(["umount", "-l", str(home)], check=True)


# The exit code that each fault has, in the order in which boards get them.
FAULTS: dict[Callable[[Fleet, str], Any], int] = {
    Fleet.cut: 5,
    Fleet.other_key: 5,
    Fleet.without_edgeexit: 5,
    Fleet.busy: 8,
    **({Fleet.full: 11} if os.geteuid() == 0 else {}),
    Fleet.other_processor: 5,
}


def bundle_of(size_bytes: int, path: Path) -> Path:
    """The shipped example, enlarged to *size_bytes*."""
    old = load_bundle(EXAMPLE)
    more = size_bytes - sum(file.stat().st_size for file in EXAMPLE.iterdir())
    write_bundle(
        path,
        name=old.name,
        model_data=old.model_data(),
        exits=old.exit_tensors,
        class_names=old.class_names,
        preprocess=old.preprocess,
        selftest=old.selftest(),
        scheme=old.scheme,
        provenance=old.provenance,
        calibration_set=old.calibration_set,
        ranges_digests=old.ranges_digests,
        training_bloom=(old.training_bloom or b"") + os.urandom(more),
    )
    return path


def by_status(document: dict[str, Any]) -> dict[str, list[str]]:
    """The boards' names by how they ended; what failed is shown."""
    found: dict[str, list[str]] = {}
    for row in document["boards"]:
        found.setdefault(row["status"], []).append(row["host"])
        if row["error"]:
            print(f"  {row['error']}", file=sys.stderr)
    return found


def measure(count: int, limit: int, broken_count: int, folder: Path) -> dict[str, Any]:
    """Deploy to *count* boards, again, and another bundle with *broken_count* of them broken."""
    with ExitStack() as stack:
        fleet = Fleet(folder, count, stack)
        first, second = (bundle_of(BYTES, folder / f"{name}.edgeexit") for name in ("one", "two"))
        names, options = list(fleet.boards), ("--limit", str(limit), "--app", "fleet")

        code, document, seconds, said = fleet.run("deploy", str(first), *options)
        assert code == 0 and by_status(document) == {"done": names}, said
        took = sorted(row["seconds"] for row in document["boards"])
        code, document, again_s, said = fleet.run("deploy", str(first), *options)
        assert code == 0 and by_status(document) == {"unchanged": names}, said

        broken = dict(
            zip(names[1 : 1 + broken_count], itertools.cycle(FAULTS.items()), strict=False)
        )
        with ExitStack() as faulty:
            for name, (fault, _) in broken.items():
                faulty.enter_context(fault(fleet, name))
            code, document, broken_s, said = fleet.run("deploy", str(second), *options)
        found = by_status(document)
        assert found["failed"] == list(broken), said
        assert found["done"] == [name for name in names if name not in broken], said
        rows = {row["host"]: row for row in document["boards"]}
        for name, (_, expected) in broken.items():
            assert rows[name]["exit_code"] == expected and name in rows[name]["error"], rows[name]
        codes = {expected for _, expected in broken.values()}
        assert code == (codes.pop() if len(codes) == 1 else 5), code

        code, document, mended_s, said = fleet.run("deploy", str(second), *options)
        assert code == 0 and by_status(document)["done"] == list(broken), said
        return {
            "boards": count,
            "limit": limit,
            "bytes": BYTES,
            "all_s": round(seconds, 2),
            "board_median_s": round(took[len(took) // 2], 2),
            "board_longest_s": round(took[-1], 2),
            "again_s": round(again_s, 2),
            "with_broken_s": round(broken_s, 2),
            # Nothing that names this machine.
            "broken": {name: rows[name]["error"].replace(str(folder), "...") for name in broken},
            "mended_s": round(mended_s, 2),
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boards", type=int, default=50)
    parser.add_argument("--limit", type=int, default=8)
    wanted = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="edgeexit-fleet-"))
    try:
        figures = measure(wanted.boards, wanted.limit, wanted.boards // 10, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    command = "python bench/fleet.py"
    if wanted.boards != 50 or wanted.limit != 8:
        command += f" --boards {wanted.boards} --limit {wanted.limit}"
    save("fleet", command, figures)


if __name__ == "__main__":
    main()

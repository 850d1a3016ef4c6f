"""
A process that works on a board's releases and can be killed at any moment: python -S -B FILE.

Arguments: the checkout, HOME, the name of an operation of OPERATIONS, and optionally a place
"file.py:line" whose calls of os.fsync do nothing. One line on stdout acknowledges each step.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path


def forget(place: str) -> None:
    """Let fsync called from *place*, directly or not, do nothing."""
    real = os.fsync

    def fsync(handle: int) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            if f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" == place:
                return
            frame = frame.f_back  # type: ignore[assignment]
        real(handle)

    os.fsync = fsync


def main() -> None:
    checkout, home, operation, *rest = sys.argv[1:]
    sys.path.insert(0, checkout)
    if rest:
        forget(rest[0])
    from edgeexit.errors import EdgeExitError, SelfTestError
    from edgeexit.files import read_json
    from edgeexit.manifest import Manifest
    from edgeexit.releases import Releases

    board = Releases(Path(home), "app")
    brought = Path(home).parent / "brought"  # the release that is new
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

    operations: dict[str, Callable[[], object]] = {
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

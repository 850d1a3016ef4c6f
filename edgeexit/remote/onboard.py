"""
What runs on a board that has only Python: makes, tries and removes edgeexit's environments there.

Sent over ssh as a program and run by the board's own Python (3.11 or newer) with one argument, the
order as JSON; it answers with one line of JSON, {"result": ...} or {"error": ...}. So it imports
nothing of edgeexit, only the standard library, and `installer` out of its wheel.

An environment appears by rename and is tried before env/current points at it; whatever was begun
and not finished lies under a name with a dot and goes with the next call. Nothing outside of
HOME, and nothing in it that is not named as edgeexit names its own, is ever removed.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETUP = "setup.json"
_WHEELS = "wheels.json"
_ID = re.compile(r"[0-9a-f]{16}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{16}\.(part|old)|\.(current|previous)\.part")
_BLOB = re.compile(r"[0-9a-f]{64}((\.\d+)?\.part)?|\.probe")
_LOCKED_S = 10.0
_CHECK_S = 900.0
_FULL = "free some space on the board: du -xh --max-depth=2 / shows what is large"

Order = dict[str, Any]


class Refused(Exception):
    """What the caller is told: a message, the exit code it stands for, and the next step."""

    def __init__(self, message: str, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message)
        self.exit_code, self.hint = exit_code, hint


def answer(text: str) -> str:
    """The line that answers the order *text*."""
    try:
        order = json.loads(text)
        return json.dumps({"result": _WORKS[order["do"]](order)})
    except Refused as error:
        said = {"message": str(error), "hint": error.hint, "exit_code": error.exit_code}
    except OSError as error:
        place = error.filename if isinstance(error.filename, str) else "HOME"
        said = {"message": f"{place}: {error.strerror or error}", "hint": _FULL, "exit_code": 11}
    except Exception as error:  # an environment can be damaged in any way
        said = {"message": f"{type(error).__name__}: {error}"[:500], "hint": None, "exit_code": 5}
    return json.dumps({"error": said})


# ---------------------------------------------------------------- environments


def install(order: Order) -> dict[str, Any]:
    """
    Make the environment *id* of *wheels* (unless it stands), try it, and let current point at it.

    With *again* it is made anew though it stands. The result tells if it was built, if current
    changed, what was collected, and what the self-test said.
    """
    envs = Path(order["home"], "env")
    envs.mkdir(parents=True, exist_ok=True)
    with _locked(envs):
        _sweep(envs)
        built = order["again"] or not _is_whole(envs / order["id"])
        if built:
            _build(order, envs)
        said = _check(envs / order["id"], camera=order["camera"])
        changed = _activate(envs, order["id"])
        removed = _collect(envs)
        _drop_blobs(envs)
    return {"built": built, "changed": changed, "removed": removed, **said}


def check(order: Order) -> dict[str, Any]:
    """Try the environment *id* as it stands; current must point at it."""
    envs = Path(order["home"], "env")
    if _target(envs / "current") != order["id"] or not _is_whole(envs / order["id"]):
        raise Refused("env/current: points elsewhere", 5)
    return _check(envs / order["id"], camera=order["camera"])


@contextmanager
def _locked(envs: Path) -> Iterator[None]:
    handle = os.open(envs / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        end = time.monotonic() + _LOCKED_S
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise Refused("another setup is at work on this board", 8, "wait") from None
                time.sleep(0.2)
        yield
    finally:
        os.close(handle)


def _sweep(envs: Path) -> None:
    for path in envs.iterdir():
        if _UNFINISHED.fullmatch(path.name):
            _remove(path)


def _is_whole(env: Path) -> bool:
    return (env / SETUP).is_file() and (env / "bin" / "python").exists()


def _build(order: Order, envs: Path) -> None:
    try:
        import venv
    except ImportError:
        raise Refused(
            f"{sys.executable} has no module venv", 4, "sudo apt install -y python3-venv"
        ) from None
    final, part = envs / order["id"], envs / f".{order['id']}.part"
    try:
        venv.EnvBuilder(system_site_packages=order["sees_system"], symlinks=True).create(part)
        for path in (part / "bin").glob("[Aa]ctivate*"):
            path.unlink()  # they name a folder that is about to be renamed
        _unpack(order, part, final)
        (part / SETUP).write_text(json.dumps(order["setup"]) + "\n")
        os.sync()
        if final.is_symlink() or final.exists():
            old = envs / f".{order['id']}.old"
            final.rename(old)
            part.rename(final)
            _remove(old)
        else:
            part.rename(final)
        _sync(envs)
    except BaseException:
        _remove(part)
        raise


def _unpack(order: Order, part: Path, final: Path) -> None:
    blobs, held = Path(order["home"], "blobs"), part / "wheels"
    held.mkdir()
    for wheel in (*order["wheels"], order["installer"]):
        blob = blobs / wheel["sha256"]
        if not blob.is_file() or _digest(blob) != wheel["sha256"]:
            blob.unlink(missing_ok=True)
            raise Refused(f"{wheel['name']}: did not stay on the board as it came", 11, "try again")
        (held / wheel["name"]).symlink_to(blob)
    sys.path.insert(0, str(held / order["installer"]["name"]))
    from installer import install as unpack
    from installer.destinations import SchemeDictionaryDestination
    from installer.sources import WheelFile

    site = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
    places = {"purelib": site, "platlib": site, "scripts": "bin", "data": "", "headers": "include"}
    for wheel in order["wheels"]:
        with WheelFile.open(held / wheel["name"]) as source:
            destination = SchemeDictionaryDestination(
                {name: str(part / place) for name, place in places.items()},
                interpreter=str(final / "bin" / "python"),
                script_kind="posix",
                overwrite_existing=True,
            )
            unpack(source, destination, {"INSTALLER": b"edgeexit setup\n"})
    shutil.rmtree(held)


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _check(env: Path, *, camera: bool) -> dict[str, Any]:
    """What the self-test and the camera's library say in *env*; Refused if the former fails."""
    (bundle,) = env.glob("lib/python3*/site-packages/edgeexit/_data/examples/fashion.edgeexit")
    done = _run(str(env / "bin" / "edgeexit"), "run", str(bundle), "--json")
    if done.returncode < 0:
        raise Refused(f"the self-test was ended by signal {-done.returncode}", 10, _AGAIN)
    if done.returncode:
        told = _error(done)
        code = done.returncode if 2 <= done.returncode <= 11 else 5
        raise Refused(f"the self-test fails: {told}", code, _AGAIN)
    said = {"selftest": json.loads(done.stdout.strip().splitlines()[-1])}
    if camera:
        done = _run(str(env / "bin" / "python"), "-c", "import picamera2")
        said["camera"] = _error(done) if done.returncode else None
    return said


def _run(*argv: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=_CHECK_S,
        check=False,
    )


def _error(done: "subprocess.CompletedProcess[str]") -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
    told = next((line for line in lines if line.startswith("Error: ")), lines[-1])
    return told.removeprefix("Error: ")[:500]


_AGAIN = "what was in use before still is; report this with `edgeexit devices record` of the board"


def _activate(envs: Path, name: str) -> bool:
    before = _target(envs / "current")
    if before == name:
        return False
    if before is not None:
        _point(envs / "previous", before)
    _point(envs / "current", name)
    return True


def _target(link: Path) -> str | None:
    try:
        found = str(link.readlink())
    except OSError:
        return None
    return found if _ID.fullmatch(found) else None


def _point(link: Path, name: str) -> None:
    part = link.with_name(f".{link.name}.part")
    part.unlink(missing_ok=True)
    part.symlink_to(name)
    part.replace(link)
    _sync(link.parent)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _collect(envs: Path) -> list[str]:
    """Remove the environments that neither a link nor a running process names."""
    kept = {_target(envs / "current"), _target(envs / "previous"), *_in_use(envs)}
    removed = []
    for path in sorted(envs.iterdir()):
        if _ID.fullmatch(path.name) and path.name not in kept:
            _remove(path)
            removed.append(path.name)
    return removed


def _in_use(envs: Path) -> dict[str, int]:
    """The environments that processes run from, with the number of one of them."""
    pattern = re.compile(re.escape(os.fsencode(envs)) + rb"/([0-9a-f]{16})/bin/")
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            match = pattern.search(path.read_bytes())
        except OSError:
            continue
        if match and int(path.parent.name) != os.getpid():
            found[match[1].decode()] = int(path.parent.name)
    return found


def _drop_blobs(envs: Path) -> None:
    """Remove wheels that were uploaded for environments which are gone."""
    now: set[str] = set()
    for path in envs.glob(f"[0-9a-f]*/{SETUP}"):
        try:
            setup = json.loads(path.read_text())
            now |= {wheel["sha256"] for wheel in (*setup["wheels"], setup["installer"])}
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged: its wheels are sent again if they are wanted
    for sha256 in _wheels(envs) - now:
        (envs.parent / "blobs" / sha256).unlink(missing_ok=True)
    part = envs / f"{_WHEELS}.part"
    part.write_text(json.dumps(sorted(now)))
    part.replace(envs / _WHEELS)


def _wheels(envs: Path) -> set[str]:
    """The digests of wheels that were uploaded for environments."""
    try:
        listed = json.loads((envs / _WHEELS).read_text())
    except (OSError, ValueError):
        return set()
    return {name for name in listed if isinstance(name, str) and _BLOB.fullmatch(name)}


def _remove(path: Path) -> None:
    """Remove *path* without following links out of it."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path)


# ---------------------------------------------------------------- uninstalling


def uninstall(order: Order) -> dict[str, Any]:
    """
    Remove the environments and their wheels, with *everything* all else that edgeexit made, too.

    With *dry* only tell what would go. The result lists what went, with its size, and what was
    left because edgeexit did not make it.
    """
    home = Path(order["home"])
    if not home.is_dir():
        return {"removed": [], "left": [], "home": str(home)}
    folders = [name for name in _OURS if name == "env" or order["everything"]]
    wheels = set() if order["everything"] else _wheels(home / "env")
    found = [home / "blobs" / sha256 for sha256 in sorted(wheels)]
    found += [home / name for name in _ALONE if order["everything"]]
    found = [path for path in found if path.is_file()]
    for place in (home / name for name in folders):
        if place.is_dir() and not place.is_symlink():
            found += sorted(path for path in place.iterdir() if _OURS[place.name](path))
    sizes = [[str(path.relative_to(home)), _size(path)] for path in found]
    if order["dry"]:
        return {"removed": sizes, "left": [], "home": str(home)}
    busy = _in_use(home / "env")
    if busy:
        raise Refused(
            f"process {min(busy.values())} runs from {home}/env",
            8,
            "stop it first (a service: systemctl --user stop, or sudo systemctl stop)",
        )
    for path in found:
        _remove(path)
    for place in (*(home / name for name in _OURS), home):
        try:
            place.rmdir()
        except OSError:
            continue
    rest = {path.name for path in home.iterdir()} if home.is_dir() else set()
    left = sorted(rest - (set() if order["everything"] else {*_OURS, *_ALONE} - {"env"}))
    return {"removed": sizes, "left": left, "home": str(home)}


def _is_environment(path: Path) -> bool:
    name = path.name
    if name in ("current", "previous"):
        return path.is_symlink()
    if name in ("lock", _WHEELS, f"{_WHEELS}.part"):
        return path.is_file()
    if _ID.fullmatch(name):
        return path.is_dir() and (path / "pyvenv.cfg").is_file()
    return bool(_UNFINISHED.fullmatch(name))


def _is_app(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (path / "releases").is_dir()


def _is_result(path: Path) -> bool:
    if path.name == "lock":
        return path.is_file()
    return bool(re.fullmatch(r"[0-9a-f]{16,64}", path.name)) and path.is_dir()


_OURS: dict[str, Callable[[Path], bool]] = {
    "env": _is_environment,
    "apps": _is_app,
    "blobs": lambda path: bool(_BLOB.fullmatch(path.name)) and path.is_file(),
    "results": _is_result,
    # Copies on their way to a deployment on the board itself.
    "incoming": lambda path: bool(_ID.fullmatch(path.name)) and path.is_dir(),
}
_ALONE = ("deploy.lock", "vetted")


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    inside = (Path(at, name) for at, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in inside)


_WORKS: dict[str, Callable[[Order], dict[str, Any]]] = {
    "install": install,
    "check": check,
    "uninstall": uninstall,
}


if __name__ == "__main__":
    sys.stdout.write(f"\n{answer(sys.argv[1])}\n")

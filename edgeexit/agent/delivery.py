"""
What a board does with a bundle that is brought to it: install, test, activate, go back, tell.

Callers see deploy, rollback and status (answers of `edgeexit agent`), and the same three on this
very machine. Hidden here: one process holds the board from the first look to the last; a release
is activated only after its self-test passed on this board, in a process of its own, because a model
may end the process that runs it; and only there is numpy imported, so that a board answers at once.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from edgeexit import __version__
from edgeexit.agent import Talk
from edgeexit.agent.hello import facts
from edgeexit.agent.parcel import POLICY, Parcel
from edgeexit.blobs import Blobs
from edgeexit.children import command, environment
from edgeexit.errors import (
    Busy,
    DeviceError,
    EdgeExitError,
    SelfTestError,
    StorageError,
    kind_of,
    printable,
)
from edgeexit.files import Table
from edgeexit.locks import hold
from edgeexit.machine import this_machine
from edgeexit.manifest import Entry, Manifest
from edgeexit.names import board_home, unknown
from edgeexit.releases import Releases, applications

# Below the board's folder: held by one deploy at a time, from its first look to its last.
LOCK = "deploy.lock"
PATIENCE_S = 10.0
STALL_S = 120.0
# Space for what comes, the release made of it, and as much again.
ROOM = 3
CHECK_TIMEOUT_S = 300.0
MAX_CLOCK_OFF_S = 3600

Bring = Callable[[Sequence[Entry]], None]
"""Has the content of these files put into the board's blobs."""


def deploy(order: Table, talk: Talk) -> Mapping[str, Any]:
    """
    Make the order's release the one that runs; nothing changes where it does already.

    Order: as Parcel.order. Needs `blobs` (digests that are not here) and tells `bytes` of them.
    Result: app, release, was (what ran before, or null), changed, device, policy (whose is used,
    or null), runtime, runtime_version, edgeexit, selftest (as `run --json`; null if nothing
    changed), collected, warnings. Busy, StorageError, DeviceError or SelfTestError before anything
    changed that runs.
    """

    def bring(missing: Sequence[Entry]) -> None:
        with _moving(missing):
            talk.need(
                blobs=[entry.sha256 for entry in missing],
                bytes=sum(entry.size_bytes for entry in missing),
            )

    return _deploy(order, bring, talk.progress)


@contextmanager
def _moving(missing: Sequence[Entry]) -> Iterator[None]:
    """
    DeviceError when nothing of *missing* comes any more within the block.

    A laptop that fell asleep closes no link, and would keep this board busy for hours.
    """
    blobs, main = Blobs(board_home()), threading.main_thread().ident or 0
    paths = [blobs.path(entry.sha256) for entry in missing]
    paths += [path.with_name(f"{path.name}.part") for path in paths]
    is_over, stands = threading.Event(), threading.Event()

    def size(path: Path) -> int:
        try:
            return path.stat().st_size
        except OSError:
            return -1

    def watch() -> None:
        found, since = list(map(size, paths)), time.monotonic()
        while not is_over.wait(min(1.0, STALL_S / 4)):
            last, found = found, list(map(size, paths))
            if found != last:
                since = time.monotonic()
            elif time.monotonic() - since > STALL_S:
                stands.set()
                signal.pthread_kill(main, signal.SIGINT)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except KeyboardInterrupt:
        if not stands.is_set():
            raise
        raise DeviceError(
            f"nothing has come for {STALL_S:g} s", hint="the same command goes on where it was"
        ) from None
    finally:
        is_over.set()


def deploy_here(
    parcel: Parcel, *, keep: int = 1, force: bool = False, dry_run: bool = False
) -> Mapping[str, Any]:
    """As deploy, on this machine, with the files of the parcel's own folder."""
    order = parcel.order(keep=keep, force=force, dry_run=dry_run)
    releases = Releases(board_home(), parcel.app)

    def bring(missing: Sequence[Entry]) -> None:
        for entry in missing:
            releases.add(entry, parcel.path / entry.path)

    return _deploy(Table(order, "order"), bring, lambda **_: None)


def _deploy(order: Table, bring: Bring, progress: Callable[..., None]) -> Mapping[str, Any]:
    order.only("app", "manifest", "keep", "force", "dry_run", "edgeexit", "clock_s")
    manifest = Manifest.from_document(order.table("manifest"))
    releases = Releases(board_home(), order.get("app", str))
    keep, is_forced = order.find("keep", int, 1), order.find("force", bool, False)
    here = facts(this_machine())
    result: dict[str, Any] = {
        "app": releases.app,
        "release": manifest.id,
        **{key: here[key] for key in ("device", "runtime", "runtime_version", "edgeexit")},
        "policy": _policy(manifest, here["device"]),
        "selftest": None,
        "collected": [],
        "warnings": _warnings(order, manifest, here),
    }
    if order.find("dry_run", bool, False):
        before, is_sound = _look(releases, manifest)
        if not is_sound:
            _check_board(manifest, here)
        return {**result, "was": before, "changed": is_forced or not is_sound}
    reports: list[Mapping[str, Any]] = []

    def check_here(folder: Path) -> None:
        progress(step="self-test")
        reports.append(check(folder))

    with _alone(releases):
        before, is_sound = _look(releases, manifest)
        if is_sound and not is_forced:
            return {**result, "was": before, "changed": False}
        _check_board(manifest, here)
        if missing := releases.missing(manifest):
            bring(missing)
        progress(step="install")
        # What runs already and was altered is mended and tested again, too.
        release = releases.install(manifest)
        releases.activate(release, check_here, force=is_forced or release == before)
        try:
            result["collected"] = releases.collect(keep=keep)
        except EdgeExitError as error:
            # What runs, runs: old files that cannot be removed are no reason to fail.
            result["warnings"].append(f"old releases stay: {error}")
    return {**result, "was": before, "changed": True, "selftest": reports[-1]}


@contextmanager
def _alone(releases: Releases) -> Iterator[None]:
    """Hold the board for a deploy or rollback: Busy at once while another one is under way."""
    with hold(board_home() / LOCK, "this board for a deploy"), ExitStack() as stack:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                # Whoever only looks at the application's releases holds them for a moment.
                stack.enter_context(releases.locked())
                break
            except Busy:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        yield


def _look(releases: Releases, manifest: Manifest) -> tuple[str | None, bool]:
    """What runs, and whether that is *manifest*, sound to the byte."""
    found = releases.status()
    return found.current, found.current == manifest.id and manifest.id not in found.bad


def _policy(manifest: Manifest, device: str) -> str | None:
    is_there = any(entry.path == POLICY.format(device) for entry in manifest.files)
    return device if is_there else None


def _warnings(order: Table, manifest: Manifest, here: Mapping[str, Any]) -> list[str]:
    found = []
    if _policy(manifest, here["device"]) is None:
        found.append(f"no policy for {here['device']} in the bundle: every exit is computed")
    if (theirs := order.find("edgeexit", str, __version__)) != __version__:
        found.append(f"edgeexit {__version__} here, {theirs} there")
    off_s = here["clock_s"] - order.find("clock_s", int, here["clock_s"])
    if abs(off_s) > MAX_CLOCK_OFF_S:
        found.append(f"the clock is {abs(off_s) / 3600:.0f} h {'ahead' if off_s > 0 else 'behind'}")
    return found


def _check_board(manifest: Manifest, here: Mapping[str, Any]) -> None:
    """Refuse before anything is brought that could not be used."""
    if here["runtime"] is None:
        raise DeviceError(
            "no TFLite runtime is installed here", hint="edgeexit setup HOST installs one"
        )
    free, wanted = here["free_bytes"], ROOM * manifest.size_bytes
    if free is not None and free < wanted:
        raise StorageError(
            f"{here['home']}: {free / 1e6:.1f} MB free, expected {wanted / 1e6:.1f} MB "
            f"({ROOM} times the bundle)",
            hint="free some space; edgeexit deploy --status --host HOST shows the releases",
        )


def rollback(order: Table, talk: Talk) -> Mapping[str, Any]:
    """
    Run the release before the current one again. Order: app. Result: app, release, was.

    UsageError if there is none.
    """
    order.only("app")
    return rollback_here(order.get("app", str))


def rollback_here(app: str) -> Mapping[str, Any]:
    """As rollback, on this machine."""
    releases = Releases(board_home(), app)
    if not releases.installed():
        raise unknown(app, applications(board_home()), "app on this board")
    with _alone(releases):
        change = releases.rollback()
    return {"app": app, "release": change.current, "was": change.was}


def status(order: Table, talk: Talk) -> Mapping[str, Any]:
    """
    What runs here. Order: app, or none for all of them; one that is not here is told as such.

    Result: device, runtime, runtime_version, edgeexit, home, free_bytes, apps (as releases.Status).
    """
    order.only("app")
    return status_here(order.find("app", str, "") or None)


def status_here(app: str | None = None) -> Mapping[str, Any]:
    """As status, on this machine."""
    home, here = board_home(), facts(this_machine())
    names = [name for name in applications(home) if app in (None, name)]
    keys = ("device", "runtime", "runtime_version", "edgeexit", "home", "free_bytes")
    apps = [{"app": name, **Releases(home, name).status().to_document()} for name in names]
    return {**{key: here[key] for key in keys}, "apps": apps}


# ---------------------------------------------------------------- the self-test's process


def check(folder: Path) -> Mapping[str, Any]:
    """
    The self-test's report of the release in *folder*, as `run --json` prints it.

    SelfTestError if answers differ or the runtime dies of it, DeviceError if the process ended
    otherwise; what the bundle or its policy has wrong as `run` tells it.
    """
    place = f"release {folder.name}"
    code = "import sys; from edgeexit.agent import delivery; delivery._child(sys.argv[1])"
    try:
        done = subprocess.run(
            command("-c", code, str(folder)),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=CHECK_TIMEOUT_S,
            check=False,
            env=environment(),
            # Ctrl-C on a terminal ends us, and we end it: it must not look like a failure.
            start_new_session=True,
        )
    except subprocess.TimeoutExpired as error:
        raise SelfTestError(
            f"{place}: the self-test still ran after {CHECK_TIMEOUT_S:g} s", hint=_OTHER
        ) from error
    except OSError as error:
        raise DeviceError(f"{place}: no process for the self-test: {error.strerror}") from error
    said: dict[str, Any] = {}
    for line in done.stdout.splitlines():
        if line.startswith(b'{"end": '):
            said = json.loads(line)["end"]
    if "error" in said:
        raise kind_of(said["exit_code"])(said["error"], hint=said["hint"])
    if not said and -done.returncode in _CRASHES:
        how = signal.Signals(-done.returncode).name
        raise SelfTestError(f"{place}: the runtime dies of the self-test ({how})", hint=_OTHER)
    if not said:
        # Killed because memory ran out, or broken by what is installed: not the release's fault.
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no word"]
        raise DeviceError(
            f"{place}: the self-test ended with code {done.returncode}: {printable(lines[-1])}",
            hint="enough memory? edgeexit doctor on the board tells more",
        )
    return said


# How a model that the runtime cannot take ends the process.
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_OTHER = "another version of the runtime? edgeexit doctor on the board tells more"


def _child(folder: str) -> None:
    """Test the release in *folder*, and that the policy of this board can be used."""
    from edgeexit.bundle import load_bundle
    from edgeexit.runtime import Runner
    from edgeexit.selftest import run_selftest

    said: dict[str, Any]
    try:
        bundle = load_bundle(folder)
        with Runner(bundle, "auto") as runner:
            policy = None if runner.policy_origin == "none" else runner.policy
            said = run_selftest(bundle, policy=policy).to_document()
            runner(bundle.selftest().samples[0])
    except EdgeExitError as error:
        said = {"error": str(error), "hint": error.hint, "exit_code": error.exit_code}
    sys.stdout.write(json.dumps({"end": said}) + "\n")

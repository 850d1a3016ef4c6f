"""
What the running Python tells: its build, the installed wheels, and whether the runtime works.

Callers see Installation, this_installation and CHECKS: a dict from the name of a finding to the
function that makes it, Installation -> Finding. A wheel for another processor or another numpy
can end the process that imports it, so the runtime is tried out in a child, step by step: what
the child said last tells what killed it.

Which fact comes from where:

userland            size of a pointer in this Python, `uname -m`, `getconf LONG_BIT` (or the ELF
                    class of /bin/sh), sys.platform
python              sys.version_info, sys.implementation, sys.abiflags
libc                os.confstr("CS_GNU_LIBC_VERSION"); what a wheel needs: the tags in its WHEEL
runtime, numpy      the child; importlib.metadata for versions
xnnpack, self-test  the child, with the bundle that comes with edgeexit
camera              a child that imports picamera2, if it is there
"""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from edgeexit.children import command, environment
from edgeexit.errors import EdgeExitError
from edgeexit.machine import Machine
from edgeexit.names import data_folder
from edgeexit.runtimes import LITERT, RUNTIMES, TFLITE, Runtime, for_programs, pointer_bits
from edgeexit.symptoms import Finding, failed, ok, shown, unknown, warning

CAMERA = "picamera2"
_64 = "install the 64-bit system (Raspberry Pi OS 64-bit)"
_OLD_TAGS = {"manylinux1": (2, 5), "manylinux2010": (2, 12), "manylinux2014": (2, 17)}
_EXAMPLE = "fashion.edgeexit"
_TIMEOUT_S = 120.0
# The self-test's words are the longest.
_SAID = 300


@dataclass(frozen=True, kw_only=True)
class Trial:
    """
    What a child process said while it tried the runtime out; None where it did not come so far.

    *delegate* as interpreter.delegate says it; *error* is the refusal that ended it, *died* how
    the process ended if it did not end by itself.
    """

    numpy: str | None = None
    runtime: str | None = None
    delegate: str | None = None
    selftest: str | None = None
    error: str | None = None
    died: str | None = None


@dataclass(frozen=True, kw_only=True)
class Installation:
    """
    The Python that runs edgeexit. Versions as texts, *libc* as (2, 36), None if it is not glibc.

    *architecture* is the kernel's, *userland_bits* the system's own programs' (None: not known).
    *installed* holds the versions of the distributions that matter, *tags* the platforms that
    the runtime's wheel was built for. *trial* is None where nobody tried. *camera* is what
    importing picamera2 said: "" if it loads, None if it is not installed or nobody tried.
    """

    system: str = "linux"
    implementation: str = "cpython"
    python: tuple[int, int] = (3, 11)
    abi_flags: str = ""
    pointer_bits: int = 64
    architecture: str = "aarch64"
    userland_bits: int | None = 64
    libc: tuple[int, int] | None = (2, 36)
    installed: Mapping[str, str] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    trial: Trial | None = None
    camera: str | None = None

    @property
    def has_runtime(self) -> bool:
        """Whether a runtime loads, or where nobody tried, is installed."""
        if self.trial is not None:
            return self.trial.runtime is not None
        return any(runtime.name in self.installed for runtime in RUNTIMES)

    @property
    def best(self) -> Runtime:
        """The runtime for programs of this size, whatever the kernel is."""
        return for_programs(self.pointer_bits)


def this_installation(machine: Machine, *, is_quick: bool = False) -> Installation:
    """What is running here; *is_quick* spares the child process."""
    installed, tags = _installed()
    return Installation(
        system=sys.platform,
        implementation=sys.implementation.name,
        python=sys.version_info[:2],
        abi_flags=sys.abiflags,
        pointer_bits=pointer_bits(),
        architecture=os.uname().machine,
        userland_bits=_userland_bits(machine),
        libc=_libc(),
        installed=installed,
        tags=tags,
        trial=None if is_quick else try_runtime(),
        camera=None if is_quick or CAMERA not in installed else _try_camera(),
    )


def _installed() -> tuple[dict[str, str], tuple[str, ...]]:
    versions: dict[str, str] = {}
    tags: tuple[str, ...] = ()
    names = tuple(runtime.name for runtime in RUNTIMES)
    for name in (*names, "numpy", CAMERA):
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        versions[name] = found.version
        if name in names and not tags:
            tags = tuple(re.findall(r"^Tag: (.+)$", found.read_text("WHEEL") or "", re.MULTILINE))
    return versions, tags


def _userland_bits(machine: Machine) -> int | None:
    said = (machine.run(["getconf", "LONG_BIT"]) or "").strip()
    if said in ("32", "64"):
        return int(said)
    # The fifth byte of an ELF file is its class.
    start = (machine.text("bin/sh") or "")[:5]
    return {"\x7fELF\x01": 32, "\x7fELF\x02": 64}.get(start)


def _libc() -> tuple[int, int] | None:
    try:
        said = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (ValueError, OSError):
        return None
    match = re.fullmatch(r"glibc (\d{1,3})\.(\d{1,3}).*", said)
    return (int(match[1]), int(match[2])) if match else None


# ---------------------------------------------------------------- the child process


def try_runtime(timeout_s: float = _TIMEOUT_S) -> Trial:
    """Import the runtime and ask the shipped bundle's self-test, in a child process."""
    died = None
    try:
        done = subprocess.run(
            command("-c", "from edgeexit.installation import _child; _child()"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
            env=environment(),
        )
        output, code = done.stdout, done.returncode
        if code:
            died = _signal(-code) if code < 0 else f"ended with code {code}{_last(done.stderr)}"
    except subprocess.TimeoutExpired as error:
        output, died = error.stdout or b"", f"still ran after {timeout_s:g} s"
    except OSError as error:
        output, died = b"", f"could not be started: {error.strerror}"
    said: dict[str, str] = {}
    for line in output.decode(errors="replace").splitlines():
        try:
            words = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if isinstance(words, dict):
            told = {key: value for key, value in words.items() if value is not None}
            said |= {key: shown(str(value), _SAID) for key, value in told.items()}
    known = {
        key: said[key]
        for key in ("numpy", "runtime", "delegate", "selftest", "error")
        if key in said
    }
    return Trial(**known, died=died)


def _try_camera(timeout_s: float = _TIMEOUT_S) -> str:
    """What importing picamera2 says in a child process, "" if nothing is wrong."""
    try:
        done = subprocess.run(
            command("-c", f"import {CAMERA}"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        return shown(f"{type(error).__name__}: {error}")
    if done.returncode < 0:
        return f"Python {_signal(-done.returncode)}"
    return _last(done.stderr).removeprefix(": ") or "it fails" if done.returncode else ""


def _signal(number: int) -> str:
    try:
        return f"was ended by {signal.Signals(number).name}"
    except ValueError:
        return f"was ended by signal {number}"


def _last(stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    return f": {shown(lines[-1])}" if lines else ""


def _child() -> None:
    """Go as far as this machine can, and say after each step what was found."""

    def say(**words: str | None) -> None:
        sys.stdout.write(json.dumps(words) + "\n")
        sys.stdout.flush()

    try:
        import numpy as np

        say(numpy=np.__version__)
        from edgeexit import vetting
        from edgeexit.interpreter import delegate, runtime_name

        vetting.expendable()
        say(runtime=runtime_name())
        from edgeexit.bundle import load_bundle
        from edgeexit.selftest import run_selftest

        bundle = load_bundle(data_folder("examples") / _EXAMPLE)
        say(delegate=delegate(bundle.model_data()))
        found = run_selftest(bundle)
        say(selftest=f"{found.samples} samples, {found}")
    except (EdgeExitError, ImportError) as error:
        say(error=str(error))


# ---------------------------------------------------------------- the checks


def userland(here: Installation) -> Finding:
    """Whether this is a Linux whose programs have 64 bit, which today's wheels are for."""
    if here.system != "linux":
        return failed(f"{here.system}: boards and their sensors are Linux", "run it on Linux")
    arch, bits, runtime = shown(here.architecture), here.pointer_bits, here.best
    judge = _judge(here)
    if here.architecture not in runtime.machines:
        return judge(f"no runtime is built for {bits}-bit {arch}", "take an aarch64 machine")
    if bits == 64:
        return ok(f"64 bit, {arch}")
    if here.userland_bits == 64:
        return judge(
            "a 32-bit Python on a 64-bit system", "make the environment with /usr/bin/python3"
        )
    kernel = f"32-bit programs on a 64-bit kernel, which calls itself {arch}"
    seen = kernel if "64" in arch else f"a 32-bit system ({arch})"
    if here.has_runtime:
        return warning(f"{seen}: int8 is computed without XNNPACK", _64)
    return failed(f"{seen}: no wheels of LiteRT exist for it", f"{runtime.install}; or {_64}")


def _judge(here: Installation) -> Callable[[str, str], Finding]:
    """What is missing for a wheel does no harm where a runtime loads all the same."""
    return warning if here.has_runtime else failed


def python(here: Installation) -> Finding:
    """Whether wheels of the runtime exist for this Python."""
    pythons = here.best.pythons
    versions = dict.fromkeys(".".join(map(str, version)) for version in pythons)
    version = ".".join(map(str, here.python)) + here.abi_flags
    seen = f"{here.implementation} {version}"
    is_served = (
        here.implementation == "cpython"
        and not here.abi_flags
        and pythons[0] <= here.python <= pythons[1]
    )
    if is_served:
        return ok(seen)
    step = _64 if here.pointer_bits == 32 else "python3.13 -m venv .venv"
    return _judge(here)(f"{seen}: wheels exist for CPython {' to '.join(versions)}", step)


def libc(here: Installation) -> Finding:
    """Whether the C library is new enough for the runtime's wheel."""
    needed = _needed_libc(here.tags) or here.best.libc
    wanted = f"{'the wheel' if here.tags else here.best.name} needs {needed[0]}.{needed[1]}"
    step = "install a newer system (Raspberry Pi OS bookworm has glibc 2.36)"
    if here.libc is None:
        return _judge(here)(f"not glibc (musl?); {wanted} of that", step)
    seen = f"glibc {here.libc[0]}.{here.libc[1]}"
    if here.libc < needed:
        return _judge(here)(f"{seen}, {wanted}", step)
    return ok(f"{seen}; {wanted}")


def _needed_libc(tags: tuple[str, ...]) -> tuple[int, int] | None:
    """The glibc that a wheel's tags ask for; of several platforms the easiest."""
    found = []
    for tag in tags:
        for match in re.finditer(r"manylinux_(\d{1,3})_(\d{1,3})_", tag):
            found.append((int(match[1]), int(match[2])))
        found += [version for name, version in _OLD_TAGS.items() if f"{name}_" in tag]
    return min(found) if found else None


def runtime(here: Installation) -> Finding:
    """Whether a TFLite runtime is there and can be imported."""
    names = [
        f"{known.name} {shown(here.installed[known.name])}"
        for known in RUNTIMES
        if known.name in here.installed
    ]
    trial, install = here.trial, here.best.install
    again = install.replace("install ", "install --force-reinstall ")
    if trial is None:
        return unknown(f"{names[0]} (not tried)") if names else failed("none is installed", install)
    if trial.runtime is None:
        if trial.numpy is None:
            return failed("numpy comes first, and does not load", "see numpy")
        if trial.died:
            return failed(f"importing {' or '.join(names) or 'it'}: Python {trial.died}", again)
        return failed(trial.error or "nothing is known", again if names else install)
    if not trial.runtime.startswith(here.best.name):
        return warning(
            f"{trial.runtime}: no longer made, and computes int8 without XNNPACK", install
        )
    return ok(trial.runtime)


def numpy(here: Installation) -> Finding:
    """Whether numpy loads, and fits to the runtime."""
    version = here.trial.numpy if here.trial else here.installed.get("numpy")
    if version is None:
        died = here.trial and here.trial.died and f"Python {here.trial.died}"
        reason = here.trial and (here.trial.error or died)
        seen = f"it does not load: {reason}" if reason else "it is not installed"
        return failed(seen, "python3 -m pip install --force-reinstall numpy")
    uses_tflite = TFLITE.name in here.installed and LITERT.name not in here.installed
    if uses_tflite and not version.startswith(("0.", "1.")):
        return failed(
            f"{version}, and {TFLITE.name} was built for numpy 1",
            'python3 -m pip install "numpy<2"',
        )
    return ok(version)


def xnnpack(here: Installation) -> Finding:
    """Whether XNNPACK's kernels compute, or the runtime's slower built-in ones."""
    trial = here.trial
    if trial is None or trial.runtime is None:
        return unknown("nobody tried")
    if trial.delegate is None:
        silent = "this runtime does not say" if trial.selftest else "the self-test came to no end"
        return unknown(silent)
    if trial.delegate != "XNNPACK":
        step = _64 if here.pointer_bits == 32 else here.best.install
        return warning(f"{trial.delegate} compute the shipped example", step)
    return ok("it computes all of the shipped example")


def self_test(here: Installation) -> Finding:
    """Whether this machine answers as the one that made the shipped bundle."""
    trial = here.trial
    if trial is None or trial.runtime is None:
        return unknown("nobody tried")
    if trial.selftest is not None:
        return ok(trial.selftest)
    step = "try another version of the runtime; edgeexit run shows it again"
    return failed(f"Python {trial.died}" if trial.died else trial.error or "it never ended", step)


def camera(here: Installation) -> Finding | None:
    """Whether the camera's library, which only the system has, works beside what is here."""
    if here.camera is None:
        return None
    version = f"{CAMERA} {shown(here.installed.get(CAMERA, ''))}"
    if not here.camera:
        return ok(version)
    numpy_version = here.trial.numpy if here.trial else here.installed.get("numpy")
    if "numpy" in here.camera:
        # Debian 12's picamera2 was compiled for numpy 1, and wheels bring numpy 2.
        return failed(
            f"{version} clashes with numpy {numpy_version or 'here'}: {here.camera}",
            'pip install "numpy<2" on bookworm; or from the laptop: edgeexit setup HOST --camera',
        )
    return failed(
        f"{version} does not load: {here.camera}", "sudo apt install --reinstall python3-picamera2"
    )


CHECKS: dict[str, Callable[[Installation], Finding | None]] = {
    "userland": userland,
    "python": python,
    "libc": libc,
    "runtime": runtime,
    "numpy": numpy,
    "xnnpack": xnnpack,
    "self-test": self_test,
    "camera": camera,
}

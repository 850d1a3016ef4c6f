"""
What can be put on a board: which Python, which runtime, which wheels; or plainly why nothing fits.

Callers see Plan and plan, which are pure. Hidden here: the tests that a Python of the board has to
pass for one of the runtimes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from edgeexit.errors import StorageError, Unsupported, printable
from edgeexit.remote.probe import Board, Python
from edgeexit.runtimes import RUNTIMES, Runtime

_APT = {"numpy": "python3-numpy", "pillow": "python3-pil", "psutil": "python3-psutil"}
_FEATURES = {"aarch64": "asimd", "armv7l": "neon", "x86_64": "sse4_1"}
_64 = "install a 64-bit system (Raspberry Pi OS 64-bit, bookworm or newer)"
_OLD = "install a newer system (Raspberry Pi OS bookworm has Python 3.11, trixie 3.13)"
# Packed and unpacked wheels, side by side, and room to spare (measured: 38 MB and 122 MB).
NEEDED_BYTES, NEEDED_FILES = 300_000_000, 6000
# No board's clock is right that is further away from this machine's.
_CLOCK_S = 86400.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """
    What to put on a board: *machine* and *libc* as wheels spell them, *requirements* as pip does.

    The environment sees the system's packages if *sees_system*; those in *borrowed* are only
    there. *notes* are told to the user.
    """

    python: Python
    runtime: str
    machine: str
    libc: tuple[int, int]
    requirements: tuple[str, ...]
    borrowed: tuple[str, ...] = ()
    sees_system: bool = False
    notes: tuple[str, ...] = ()


def plan(board: Board, *, camera: bool = False, now_s: float | None = None) -> Plan:
    """
    What fits to *board*: the best runtime, and the first of its Pythons that this one takes.

    *camera*: the environment sees the system's packages, for picamera2. *now_s* is this machine's
    clock. Unsupported if nothing fits, StorageError if its folder takes nothing, each with the
    step that mends it.
    """
    if board.system != "Linux":
        raise Unsupported(f"{board.system}: boards are Linux", hint="run Linux on it")
    if not board.pythons:
        raise Unsupported(
            f"no Python 3 on this board ({board.os})",
            hint="sudo apt install -y python3, on the board",
        )
    reasons: list[_Misfit] = []
    for runtime in RUNTIMES:
        for python in board.pythons:
            found = _fits(board, python, runtime)
            if found is None:
                _check_folder(board)
                return _planned(board, python, runtime, camera=camera, now_s=now_s)
            reasons.append(found)
    # The nearest miss says most: what passed most of the tests.
    raise max(reasons, key=lambda reason: reason.passed)


class _Misfit(Unsupported):
    """Why a Python of a board does not take a runtime, and how many tests it *passed* before."""

    def __init__(self, passed: int, message: str, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.passed = passed


def _fits(board: Board, python: Python, runtime: Runtime) -> _Misfit | None:
    for passed, test in enumerate(_TESTS):
        told = test(board, python, runtime)
        if told is not None:
            return _Misfit(passed, *told)
    return None


Told = tuple[str, str] | None


def _processor(board: Board, python: Python, runtime: Runtime) -> Told:
    if board.machine in runtime.machines:
        return None
    return f"no runtime is built for {board.machine}", "take an aarch64 or x86_64 board"


def _bits(board: Board, python: Python, runtime: Runtime) -> Told:
    if python.bits == runtime.bits:
        return None
    if python.bits == 32 and board.machine in ("aarch64", "x86_64"):
        return f"32-bit programs on a 64-bit kernel ({board.os})", _64
    return f"a {python.bits}-bit Python on {board.machine}", _64


def _libc_fits(board: Board, python: Python, runtime: Runtime) -> Told:
    wanted = f"{runtime.name} needs glibc {runtime.libc[0]}.{runtime.libc[1]}"
    if python.libc is None:
        return (
            f"{board.os} has no glibc (musl?); {wanted}",
            "install a glibc system (Raspberry Pi OS, Debian, Ubuntu, Armbian)",
        )
    if python.libc < runtime.libc:
        return f"glibc {python.libc[0]}.{python.libc[1]}; {wanted}", _OLD
    return None


def _version(board: Board, python: Python, runtime: Runtime) -> Told:
    first, last = runtime.pythons
    said = f"{python.implementation} {'.'.join(map(str, python.version))}{python.flags}"
    wanted = ".".join(map(str, first))
    if last != first:
        wanted += f" to {'.'.join(map(str, last))}"
    if python.implementation != "cpython" or python.flags:
        return f"{said}; {runtime.name} needs plain CPython {wanted}", "sudo apt install -y python3"
    if first <= python.version[:2] <= last:
        return None
    if runtime.bits == 32:
        return f"32-bit Python {python.minor}; {runtime.name} has only {wanted}", _64
    too_old = python.version[:2] < first
    return f"Python {python.minor}; edgeexit needs {wanted}", _OLD if too_old else (
        f"install Python {'.'.join(map(str, last))} beside it"
    )


def _vectors(board: Board, python: Python, runtime: Runtime) -> Told:
    wanted = _FEATURES[runtime.machines[board.machine]]
    # Arm's 64-bit kernels list "asimd" for 32-bit programs as "neon".
    if not board.features or wanted in board.features or "asimd" in board.features:
        return None
    return f"the processor has no {wanted}, which {runtime.name} computes with", _64


def _environments(board: Board, python: Python, runtime: Runtime) -> Told:
    if python.has_venv:
        return None
    return f"{python.path} has no module venv", "sudo apt install -y python3-venv, on the board"


def _loans(board: Board, python: Python, runtime: Runtime) -> Told:
    absent = [name for name in runtime.borrowed if name not in python.system]
    if not absent:
        return None
    names = " ".join(_APT[name] for name in absent)
    return (
        f"a 32-bit system without {', '.join(absent)}, of which no 32-bit wheels exist",
        f"sudo apt install -y {names}, on the board; or {_64}",
    )


_TESTS: tuple[Callable[[Board, Python, Runtime], Told], ...] = (
    _processor,
    _bits,
    _libc_fits,
    _version,
    _vectors,
    _environments,
    _loans,
)


def _check_folder(board: Board) -> None:
    """StorageError if the folder that will be ours takes nothing."""
    elsewhere = (
        "name a folder that can be written in EDGEEXIT_HOME on the board (in /etc/environment)"
    )
    home = board.home
    if not home.startswith("/") or not home.isprintable() or "/../" in f"{home}/":
        raise StorageError(
            f"{printable(home)[:100] or 'HOME'}: is no absolute path", hint=elsewhere
        )
    full = "remove what is not needed (du -xh --max-depth=2 / shows what is large)"
    if board.refusal is not None:
        raise StorageError(
            f"{board.place}: cannot write: {board.refusal}",
            hint=full if "space" in board.refusal else elsewhere,
        )
    if not board.can_run:
        raise StorageError(
            f"{board.place}: programs there may not be run (mounted noexec?)", hint=elsewhere
        )
    if board.current is not None:
        return
    if board.free_bytes is not None and board.free_bytes < NEEDED_BYTES:
        raise StorageError(
            f"{home}: {board.free_bytes / 1e6:.0f} MB free, expected {NEEDED_BYTES / 1e6:.0f}",
            hint=f"{full}, or {elsewhere}",
        )
    if board.free_files is not None and board.free_files < NEEDED_FILES:
        raise StorageError(
            f"{home}: room for {board.free_files} more files, expected {NEEDED_FILES}", hint=full
        )


def _planned(
    board: Board, python: Python, runtime: Runtime, *, camera: bool, now_s: float | None
) -> Plan:
    numpy, notes = runtime.numpy, []
    if runtime is not RUNTIMES[0]:
        notes.append(f"{runtime.name}: no longer made, and computes int8 without XNNPACK")
    if camera:
        numpy = _numpy_of(python, numpy)
    if board.clock_s is not None and now_s is not None and abs(board.clock_s - now_s) > _CLOCK_S:
        days = (board.clock_s - now_s) / _CLOCK_S
        notes.append(
            f"the board's clock is {abs(days):.0f} days {'ahead' if days > 0 else 'behind'}: "
            "sudo timedatectl set-ntp true"
        )
    return Plan(
        python=python,
        runtime=runtime.name,
        machine=runtime.machines[board.machine],
        libc=python.libc or runtime.libc,
        requirements=(runtime.requirement, numpy),
        borrowed=runtime.borrowed,
        sees_system=camera or bool(runtime.borrowed),
        notes=tuple(notes),
    )


def _numpy_of(python: Python, numpy: str) -> str:
    """
    The numpy that works with the system's picamera2.

    Its helpers were compiled for the system's numpy: those for 1.x fail under 2.x with "numpy.dtype
    size changed", those for 2.x do not exist for Pythons that 1.x was made for.
    """
    if "picamera2" not in python.system:
        raise Unsupported(
            f"{python.path} has no picamera2, which --camera is for",
            hint="sudo apt install -y --no-install-recommends python3-picamera2, on the board",
        )
    is_new = python.system.get("numpy", "1").partition(".")[0] not in ("0", "1")
    return "numpy>=2" if is_new else "numpy>=1.24,<2"

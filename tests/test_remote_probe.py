"""What a board says of itself is read whatever stands around it, and judged plainly."""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.errors import DeviceError, EdgeExitError, StorageError, Unsupported
from edgeexit.remote.fitting import NEEDED_BYTES, Plan, plan
from edgeexit.remote.probe import BEGIN, END, SCRIPT, Board, Python, parse
from edgeexit.runtimes import RUNTIMES

NEON = frozenset({"asimd", "crc32"})
DEBIAN_12 = {"numpy": "1.24.2", "pillow": "9.4.0", "psutil": "5.9.4", "picamera2": "0.3.12"}
DEBIAN_13 = {"numpy": "2.2.4", "pillow": "11.1.0", "psutil": "7.0.0", "picamera2": "0.3.30"}

PI_4 = Board(features=NEON, free_bytes=20_000_000_000)
PI_32 = Board(
    machine="aarch64",
    os="Raspbian GNU/Linux 12 (bookworm)",
    pythons=(Python(bits=32, system=DEBIAN_12),),
    features=frozenset({"neon"}),
)


def with_python(**changes: Any) -> Board:
    return Board(features=NEON, pythons=(Python(**changes),))


# name: what stands there, what is chosen
FITTING: dict[str, tuple[Board, tuple[str, str, str]]] = {
    "Raspberry Pi OS bookworm, 64 bit": (PI_4, ("ai-edge-litert", "aarch64", "3.11")),
    "Raspberry Pi OS trixie, 64 bit": (
        with_python(version=(3, 13, 5), libc=(2, 41)),
        ("ai-edge-litert", "aarch64", "3.13"),
    ),
    "a PC": (
        Board(machine="x86_64", features=frozenset({"sse4_1", "avx2"})),
        ("ai-edge-litert", "x86_64", "3.11"),
    ),
    "an old system with a Python 3.14 of its own": (
        Board(pythons=(Python(version=(3, 9, 2)), Python(version=(3, 14, 0), libc=(2, 31)))),
        ("ai-edge-litert", "aarch64", "3.14"),
    ),
    "32-bit programs on a 64-bit kernel": (PI_32, ("tflite-runtime", "armv7l", "3.11")),
    "a 32-bit system": (
        Board(machine="armv7l", pythons=PI_32.pythons),
        ("tflite-runtime", "armv7l", "3.11"),
    ),
    "a 64-bit Python beside a 32-bit one": (
        Board(pythons=(Python(bits=32), Python(path="/opt/python3", version=(3, 12, 0)))),
        ("ai-edge-litert", "aarch64", "3.12"),
    ),
}


@pytest.mark.parametrize("name", FITTING)
def test_the_best_runtime_that_fits_is_chosen(name: str) -> None:
    board, (runtime, machine, python) = FITTING[name]

    found = plan(board)

    assert (found.runtime, found.machine, found.python.minor) == (runtime, machine, python)


# name: what stands there, which refusal, words of the message, words of the hint
REFUSED: dict[str, tuple[Board, type[EdgeExitError], str, str]] = {
    "macOS": (Board(system="Darwin"), Unsupported, "Darwin", "Linux"),
    "no Python": (Board(pythons=()), Unsupported, "no Python 3", "apt install -y python3"),
    "Python 3.9": (
        with_python(version=(3, 9, 2), libc=(2, 31)),
        Unsupported,
        "Python 3.9; edgeexit needs 3.11 to 3.14",
        "newer system",
    ),
    "Python of tomorrow": (with_python(version=(3, 15, 0)), Unsupported, "3.15", "Python 3.14"),
    "PyPy": (with_python(implementation="pypy"), Unsupported, "pypy 3.11.2", "apt install"),
    "free-threaded Python": (
        with_python(version=(3, 13, 1), flags="t"),
        Unsupported,
        "3.13.1t",
        "apt install",
    ),
    "musl": (with_python(libc=None), Unsupported, "musl", "glibc system"),
    "glibc of buster's elder brother": (
        with_python(libc=(2, 24)),
        Unsupported,
        "glibc 2.24; ai-edge-litert needs glibc 2.27",
        "newer system",
    ),
    "32-bit programs, Python 3.13": (
        Board(pythons=(Python(bits=32, version=(3, 13, 5), system=DEBIAN_13),)),
        Unsupported,
        "32-bit Python 3.13; tflite-runtime has only 3.11",
        "64-bit system",
    ),
    "32-bit programs without numpy": (
        Board(pythons=(Python(bits=32, system={"pillow": "9.4.0", "psutil": "5.9.4"}),)),
        Unsupported,
        "without numpy",
        "python3-numpy",
    ),
    "a Pi Zero W": (
        Board(machine="armv6l", pythons=(Python(bits=32),)),
        Unsupported,
        "no runtime is built for armv6l",
        "aarch64",
    ),
    "RISC-V": (Board(machine="riscv64"), Unsupported, "riscv64", "aarch64"),
    "32-bit PC programs": (
        Board(machine="x86_64", os="Debian 12", pythons=(Python(bits=32),)),
        Unsupported,
        "32-bit programs on a 64-bit kernel (Debian 12)",
        "64-bit system",
    ),
    "a PC of 2005": (
        Board(machine="x86_64", features=frozenset({"sse2"})),
        Unsupported,
        "sse4_1",
        "64-bit",
    ),
    "no venv": (with_python(has_venv=False), Unsupported, "no module venv", "python3-venv"),
    "full disk": (Board(free_bytes=40_000_000), StorageError, "40 MB free", "remove what"),
    "no inodes": (Board(free_files=12), StorageError, "12 more files", "remove what"),
    "read-only home": (
        Board(refusal="Read-only file system"),
        StorageError,
        "/home/pi: cannot write: Read-only file system",
        "EDGEEXIT_HOME",
    ),
    "noexec home": (Board(can_run=False), StorageError, "noexec", "EDGEEXIT_HOME"),
    "a relative HOME": (Board(home="pi/x"), StorageError, "pi/x: is no absolute", "EDGEEXIT"),
    "no HOME": (Board(home=""), StorageError, "no absolute path", "EDGEEXIT_HOME"),
    "a HOME that climbs": (Board(home="/home/../etc"), StorageError, "absolute", "EDGEEXIT"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fits_nowhere_is_refused_with_the_reason_and_the_step(name: str) -> None:
    board, kind, message, hint = REFUSED[name]

    with pytest.raises(kind) as refusal:
        plan(board)

    assert message in str(refusal.value)
    assert hint in str(refusal.value.hint)


def test_a_board_that_runs_edgeexit_already_needs_no_second_room() -> None:
    assert plan(Board(free_bytes=NEEDED_BYTES // 10, current={"id": "0" * 16})).runtime


@pytest.mark.parametrize(
    ("system", "numpy"), [(DEBIAN_12, "numpy>=1.24,<2"), (DEBIAN_13, "numpy>=2")]
)
def test_a_camera_board_gets_the_numpy_that_its_picamera2_was_built_for(
    system: Mapping[str, str], numpy: str
) -> None:
    board = with_python(system=system)

    found = plan(board, camera=True)

    assert found.sees_system
    assert numpy in found.requirements
    assert not plan(board).sees_system


def test_a_camera_board_without_picamera2_is_told_how_to_get_it() -> None:
    with pytest.raises(Unsupported, match="no picamera2") as refusal:
        plan(PI_4, camera=True)

    assert "python3-picamera2" in str(refusal.value.hint)


@pytest.mark.parametrize(
    ("clock_s", "said"), [(0.0, "20000 days behind"), (1.728e9 + 86400 * 3, "3 days ahead")]
)
def test_a_wrong_clock_is_noted_and_stops_nothing(clock_s: float, said: str) -> None:
    found = plan(Board(clock_s=clock_s), now_s=1.728e9)

    assert any(said in note for note in found.notes)
    assert not plan(Board(clock_s=1.728e9 + 100), now_s=1.728e9).notes


BOOLEANS = st.booleans()
ANY_PYTHON = st.builds(
    Python,
    version=st.tuples(st.integers(2, 4), st.integers(0, 20), st.integers(0, 20)),
    bits=st.sampled_from([32, 64]),
    libc=st.none() | st.tuples(st.integers(2, 3), st.integers(0, 60)),
    has_venv=BOOLEANS,
    flags=st.sampled_from(["", "t", "d"]),
    system=st.sampled_from([{}, DEBIAN_12, DEBIAN_13]),
)
ANY_BOARD = st.builds(
    Board,
    machine=st.sampled_from(["aarch64", "x86_64", "armv7l", "armv8l", "armv6l", "ppc64le"]),
    pythons=st.lists(ANY_PYTHON, max_size=3).map(tuple),
    features=st.sampled_from([frozenset(), NEON, frozenset({"neon"}), frozenset({"sse4_1"})]),
    free_bytes=st.none() | st.integers(0, 1 << 40),
    can_run=BOOLEANS,
)


@given(board=ANY_BOARD, camera=BOOLEANS)
def test_every_board_gets_a_plan_that_its_wheels_were_built_for_or_a_reason(
    board: Board, camera: bool
) -> None:
    try:
        found: Plan = plan(board, camera=camera)
    except (Unsupported, StorageError) as refusal:
        assert refusal.hint
        return

    runtime = next(r for r in RUNTIMES if r.name == found.runtime)
    assert runtime.pythons[0] <= found.python.version[:2] <= runtime.pythons[1]
    assert found.libc >= runtime.libc
    assert found.python.bits == runtime.bits
    assert board.can_run


# ---------------------------------------------------------------- reading


RECORDED = f"""
{BEGIN}
system=Linux
machine=aarch64
os="Debian GNU/Linux 12 (bookworm)"
clock=1763765000
home=/home/pi/.local/share/edgeexit
place=/home/pi
writable=yes
runs=42
current={{"format": 1, "id": "0123456789abcdef"}}
python={{"path": "/usr/bin/python3.11", "version": [3, 11, 2], "implementation": "cpython", \
"flags": "", "bits": 64, "venv": true, "system": {{"numpy": "1.24.2"}}, "libc": "glibc 2.36", \
"free_bytes": 21000000000, "files": 1900000, "free_files": 1800000, "memory": "3884180 kB", \
"features": "fp asimd evtstrm crc32 cpuid"}}
{END}
"""


def test_a_recorded_answer_is_read_to_the_last_word() -> None:
    assert parse(RECORDED) == Board(
        os="Debian GNU/Linux 12 (bookworm)",
        clock_s=1763765000.0,
        free_bytes=21_000_000_000,
        free_files=1_800_000,
        memory_mb=3884180 / 1024,
        features=frozenset({"fp", "asimd", "evtstrm", "crc32", "cpuid"}),
        pythons=(Python(path="/usr/bin/python3.11", system={"numpy": "1.24.2"}),),
        current={"format": 1, "id": "0123456789abcdef"},
    )


def test_banners_and_noise_around_the_answer_change_nothing() -> None:
    banner = "\x1b[31mWelcome!\x07\nsystem=Plan 9\npython={}\n" * 50

    assert parse(f"{banner}{RECORDED}{banner}") == parse(RECORDED)


HOSTILE = [
    ("python=", 'python={"path": 7}'),
    ("python=", "python=" + "[" * 100_000),
    ('"version": [3, 11, 2]', '"version": [3, 11]'),
    ('"version": [3, 11, 2]', '"version": ["3", 11, 2]'),
    ('"path": "/usr/bin/python3.11"', '"path": "; rm -rf /"'),
    ('"path": "/usr/bin/python3.11"', '"path": "/usr/bin/\\u001b[2Jpython"'),
    ('"free_bytes": 21000000000', '"free_bytes": 1e999'),
]


@pytest.mark.parametrize(("old", "new"), HOSTILE)
def test_a_python_that_answers_nonsense_is_none(old: str, new: str) -> None:
    assert parse(RECORDED.replace(old, new)).pythons == ()


@pytest.mark.parametrize(
    ("old", "new", "fact", "value"),
    [
        ("clock=1763765000", "clock=-1", "clock_s", None),
        ("clock=1763765000", "clock=" + "9" * 4000, "clock_s", None),
        ('"free_bytes": 21000000000', '"free_bytes": -1', "free_bytes", None),
        ('"free_bytes": 21000000000', '"free_bytes": "much"', "free_bytes", None),
        ('"files": 1900000', '"files": 0', "free_files", None),
        ("machine=aarch64", "machine=\x1b[2J", "machine", "\\x1b[2J"),
        ("writable=yes", "writable=no sh: 1: x: No such file", "refusal", "No such file"),
        ("runs=42", "runs=126", "can_run", False),
        ('{"format": 1, "id"', '{"format": 1, "id', "current", None),
    ],
)  # fmt: skip
def test_facts_that_cannot_be_are_not_known(old: str, new: str, fact: str, value: object) -> None:
    assert getattr(parse(RECORDED.replace(old, new)), fact) == value


@pytest.mark.parametrize(
    "text",
    ["", "This account is currently not available.\n", RECORDED.replace(END, "Killed"), "\0" * 99],
)
def test_what_is_no_answer_is_a_device_error_that_quotes_it(text: str) -> None:
    with pytest.raises(DeviceError, match="does not answer") as refusal:
        parse(text)

    assert str(refusal.value).isprintable()


@given(st.text(max_size=400), st.integers(0, len(RECORDED)), st.integers(0, 200))
def test_no_damage_to_an_answer_is_a_bug(noise: str, at: int, length: int) -> None:
    try:
        board = parse(RECORDED[:at] + noise + RECORDED[at + length :])
        plan(board)
    except EdgeExitError as refusal:
        assert refusal.exit_code in (4, 5, 11)


# ---------------------------------------------------------------- the script itself

SHELLS = [name for name in ("dash", "bash", "busybox") if shutil.which(name)]


def ask(shell: str, home: Path, path: str | None = None) -> Board:
    """Run the script as a board's login would, with HOME there and PATH."""
    argv = [shutil.which(shell) or shell, *(["sh"] if shell == "busybox" else []), "-s"]
    done = subprocess.run(
        argv,
        input=SCRIPT,
        capture_output=True,
        text=True,
        env={"HOME": str(home), "PATH": path or os.environ["PATH"]},
        timeout=60,
    )
    assert done.stderr == ""
    return parse(done.stdout)


@pytest.mark.parametrize("shell", SHELLS)
def test_this_machine_is_read_as_it_is_and_nothing_is_left_there(
    shell: str, tmp_path: Path
) -> None:
    board = ask(shell, tmp_path)

    assert board.machine == os.uname().machine
    assert board.home == f"{tmp_path}/.local/share/edgeexit"
    assert (board.place, board.refusal, board.can_run) == (str(tmp_path), None, True)
    assert board.free_bytes
    assert board.pythons
    assert all(Path(python.path).exists() for python in board.pythons)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_nothing_is_told_with_the_systems_reason(tmp_path: Path) -> None:
    board = ask("sh", Path("/proc/self"))

    assert board.place == "/proc/self"
    assert board.refusal
    with pytest.raises(StorageError, match="/proc/self: cannot write"):
        plan(board)


def test_what_stands_there_already_is_read(tmp_path: Path) -> None:
    current = tmp_path / ".local/share/edgeexit/env/current"
    current.mkdir(parents=True)
    (current / "setup.json").write_text('{"format": 1,\n "id": "0123456789abcdef"}\n')

    assert ask("sh", tmp_path).current == {"format": 1, "id": "0123456789abcdef"}


def ask_apart(home: Path, prepare: str) -> Board:
    """Run the script where *prepare* has mounted something first."""
    home.mkdir()
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f"{prepare} && exec sh -s"],
        input=SCRIPT,
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "HOME": str(home)},
        timeout=60,
    )
    if not done.stdout:
        pytest.skip(f"this machine lets nobody mount: {done.stderr}")
    return parse(done.stdout)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")


@as_root
@pytest.mark.parametrize(
    ("option", "refusal", "message"),
    [("noexec", None, "noexec"), ("ro", "Read-only file system", "cannot write: Read-only")],
)
def test_a_mount_that_forbids_programs_or_writing_is_seen(
    option: str, refusal: str | None, message: str, tmp_path: Path
) -> None:
    home = tmp_path / "home"

    board = ask_apart(home, f"mount -t tmpfs -o {option},size=1m x {home}")

    assert (board.can_run, board.refusal) == (False, refusal)
    assert board.free_bytes == 1 << 20
    with pytest.raises(StorageError, match=message):
        plan(board)


@as_root
def test_a_board_without_python_is_read_all_the_same(tmp_path: Path) -> None:
    hide = "for p in /usr/bin/python3.*; do mount --bind /dev/null $p; done"

    board = ask_apart(tmp_path / "home", hide)

    assert board.machine == os.uname().machine
    assert (board.pythons, board.free_bytes) == ((), None)

"""
What the program that setup sends leaves on a board, however it ends.

It is run here as ssh would run it: by a bare Python, with the order as its argument; the wheels
are tiny, and the edgeexit in them only says that its self-test is well.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from wheels import make_wheel

from edgeexit.files import file_digest
from edgeexit.remote import onboard

PROGRAM = Path(onboard.__file__)
PYTHON = getattr(sys, "_base_executable", sys.executable)
CLI = """
import json, pathlib, sys, time
def script():
    here = pathlib.Path(__file__).parent
    if (here / "wait").exists():
        time.sleep(60)
    if (here / "broken").exists():
        sys.exit("Error: logits differ by 7 here, expected at most 2")
    assert sys.argv[1] == "run" and sys.argv[3] == "--json"
    print(json.dumps({"selftest": "ok", "version": VERSION}))
"""


@pytest.fixture(scope="session")
def installer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of `installer`, from the registry."""
    folder = tmp_path_factory.mktemp("installer")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, "installer"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"needs the package registry: {done.stderr[-200:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def edgeexit(folder: Path, version: str, more: dict[str, str] | None = None) -> Path:
    """A wheel of something that is called edgeexit, with *more* files in it."""
    files = {
        "edgeexit/__init__.py": "",
        "edgeexit/cli.py": CLI.replace("VERSION", repr(version)),
        "edgeexit/_data/examples/fashion.edgeexit/bundle.json": "{}",
        **(more or {}),
    }
    scripts = {"edgeexit": "edgeexit.cli:script"}
    return make_wheel(folder, "edgeexit", version, files=files, scripts=scripts)


class Board:
    """HOME of a board, with blobs put there as an upload does."""

    def __init__(self, folder: Path, installer: Path) -> None:
        self.home, self.source = folder / "home", folder / "source"
        self.env, self.blobs = self.home / "env", self.home / "blobs"
        self.blobs.mkdir(parents=True)
        self.installer = self.put(installer)

    def put(self, wheel: Path) -> dict[str, str]:
        sha256 = file_digest(wheel)
        shutil.copy(wheel, self.blobs / sha256)
        return {"name": wheel.name, "sha256": sha256}

    def order(self, version: str, **changes: Any) -> dict[str, Any]:
        """The order for edgeexit *version*, its wheels uploaded; ids tell versions apart."""
        wheels = [self.put(edgeexit(self.source, version))]
        name = wheels[0]["sha256"][:16]
        return {
            "do": "install",
            "home": str(self.home),
            "id": name,
            "wheels": wheels,
            "installer": self.installer,
            "sees_system": False,
            "camera": False,
            "again": False,
            "setup": {
                "format": 1,
                "id": name,
                "wheels": wheels,
                "installer": self.installer,
            },
            **changes,
        }

    def run(self, order: dict[str, Any], *wrapper: str) -> dict[str, Any] | None:
        """The answer to *order*; None if the program did not live to give one."""
        done = subprocess.run(
            [*wrapper, PYTHON, "-I", "-", json.dumps(order)],
            input=PROGRAM.read_text(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        lines = done.stdout.strip().splitlines()
        assert lines or done.returncode, done.stderr
        return json.loads(lines[-1]) if lines else None

    def version(self) -> str | None:
        """What runs by env/current, None if nothing does."""
        program = self.env / "current" / "bin" / "edgeexit"
        if not program.exists():
            return None
        done = subprocess.run([program, "run", "x", "--json"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return str(json.loads(done.stdout)["version"])

    def environments(self) -> set[str]:
        return {p.name for p in self.env.iterdir() if re.fullmatch(r"[0-9a-f]{16}", p.name)}


@pytest.fixture
def board(tmp_path: Path, installer: Path) -> Board:
    return Board(tmp_path, installer)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file below, by its name."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_ino, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


def test_an_environment_appears_works_and_a_second_call_changes_nothing(board: Board) -> None:
    order = board.order("1.0")

    first = board.run(order)
    before = tree(board.env / order["id"])
    second = board.run(order)

    assert first == {
        "result": {
            "built": True,
            "changed": True,
            "removed": [],
            "selftest": {"selftest": "ok", "version": "1.0"},
        }
    }
    assert second is not None
    assert (second["result"]["built"], second["result"]["changed"]) == (False, False)
    assert tree(board.env / order["id"]) == before
    assert board.version() == "1.0"
    assert (board.env / "current" / "setup.json").read_text().startswith('{"format": 1')
    # A script must go on when current points elsewhere.
    head = (board.env / "current/bin/edgeexit").read_bytes().splitlines()[0]
    assert head == f"#!{board.env}/{order['id']}/bin/python".encode()


def test_the_one_before_is_kept_and_older_ones_go_with_their_wheels(board: Board) -> None:
    orders = [board.order(f"{n}.0") for n in (1, 2, 3)]

    answers = [board.run(order) for order in orders]

    assert answers[2] is not None
    assert answers[2]["result"]["removed"] == [orders[0]["id"]]
    assert board.environments() == {orders[1]["id"], orders[2]["id"]}
    assert (board.env / "previous").readlink() == Path(orders[1]["id"])
    assert board.version() == "3.0"
    held = {path.name for path in board.blobs.iterdir()}
    assert orders[0]["wheels"][0]["sha256"] not in held
    assert orders[1]["wheels"][0]["sha256"] in held


@pytest.mark.parametrize("damage", ["", "[]", '{"wheels": 5}'])
def test_the_damage_of_one_before_stops_no_setup(board: Board, damage: str) -> None:
    first, second = board.order("1.0"), board.order("2.0")
    board.run(first)
    (board.env / first["id"] / "setup.json").write_text(damage)

    answer = board.run(second)

    assert answer is not None
    assert answer["result"]["changed"]
    assert board.version() == "2.0"


def test_blobs_that_setup_did_not_bring_are_never_removed(board: Board) -> None:
    other = board.blobs / ("a" * 64)
    other.write_text("a segment of a deployment")

    for n in (1, 2, 3):
        board.run(board.order(f"{n}.0"))

    assert other.exists()


def test_what_a_process_runs_from_is_not_collected(board: Board) -> None:
    first = board.order("1.0")
    board.run(first)
    (package,) = (board.env / first["id"]).glob("lib/python*/site-packages/edgeexit")
    (package / "wait").touch()
    process = subprocess.Popen([board.env / "current/bin/edgeexit", "run", "x", "--json"])
    try:
        for n in (2, 3, 4):
            board.run(board.order(f"{n}.0"))

        assert first["id"] in board.environments()
        refused = board.run(
            {"do": "uninstall", "home": str(board.home), "everything": True, "dry": False}
        )
        assert refused is not None
        assert refused["error"]["exit_code"] == 8
        assert f"process {process.pid} runs" in refused["error"]["message"]
    finally:
        process.kill()
        process.wait()
    board.run(board.order("4.0"))
    assert first["id"] not in board.environments()


def test_an_environment_whose_self_test_fails_does_not_replace_the_one_in_use(
    board: Board,
) -> None:
    board.run(board.order("1.0"))
    bad = board.order("2.0")
    bad["wheels"] = [board.put(edgeexit(board.source, "2.0", {"edgeexit/broken": ""}))]

    answer = board.run(bad)

    assert answer is not None
    assert "logits differ by 7 here" in answer["error"]["message"]
    assert board.version() == "1.0"


def test_a_damaged_environment_is_told_and_made_anew(board: Board) -> None:
    order = board.order("1.0")
    board.run(order)
    (module,) = (board.env / order["id"]).glob("lib/python*/site-packages/edgeexit/cli.py")
    module.write_text("import nothing_of_the_kind\n")

    checked = board.run({**order, "do": "check"})
    assert checked is not None
    assert "nothing_of_the_kind" in checked["error"]["message"]
    again = board.run({**order, "again": True})

    assert again is not None
    assert again["result"]["built"]
    assert board.version() == "1.0"
    assert board.run({**order, "do": "check"}) == {
        "result": {"selftest": again["result"]["selftest"]}
    }


def test_a_camera_board_sees_the_systems_packages_and_says_if_the_cameras_do_not_load(
    board: Board,
) -> None:
    answer = board.run(board.order("1.0", sees_system=True, camera=True))

    assert answer is not None
    assert "No module named 'picamera2'" in answer["result"]["camera"]
    config = (board.env / "current/pyvenv.cfg").read_text()
    assert "include-system-site-packages = true" in config
    assert board.version() == "1.0"


@pytest.mark.parametrize("harm", ["lib", "bin/python", "lib/python*/site-packages/edgeexit/_data"])
def test_whatever_is_missing_in_an_environment_the_answer_is_an_error_and_again_mends_it(
    harm: str, board: Board
) -> None:
    order = board.order("1.0")
    board.run(order)
    (victim,) = (board.env / order["id"]).glob(harm)
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()

    checked = board.run({**order, "do": "check"})
    again = board.run({**order, "again": True})

    assert checked is not None
    assert checked["error"]["exit_code"] >= 4
    assert again is not None
    assert again["result"]["built"]
    assert board.version() == "1.0"


def test_a_wheel_that_did_not_stay_as_it_came_is_refused_and_forgotten(board: Board) -> None:
    order = board.order("1.0")
    blob = board.blobs / order["wheels"][0]["sha256"]
    blob.write_bytes(blob.read_bytes()[:-1])

    answer = board.run(order)

    assert answer is not None
    assert answer["error"]["exit_code"] == 11
    assert "did not stay on the board" in answer["error"]["message"]
    assert not blob.exists()
    assert board.environments() == set()
    assert list(board.env.glob(".*")) == []


def test_two_setups_at_once_are_one_after_the_other(board: Board) -> None:
    orders = [board.order("1.0"), board.order("2.0")]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(board.run, orders))

    assert all(answer is not None and "result" in answer for answer in answers)
    assert board.environments() == {order["id"] for order in orders}
    assert board.version() in ("1.0", "2.0")


# ---------------------------------------------------------------- however it ends

strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
CALLS = "rename,symlink,symlinkat,unlink,rmdir,mkdir,fsync,sync"


def calls(board: Board, order: dict[str, Any], log: Path) -> dict[str, int]:
    """How often each of CALLS is made while *order* is carried out."""
    board.run(order, "strace", "-f", "-e", f"trace={CALLS}", "-o", str(log))
    made: dict[str, int] = {}
    for name in re.findall(r"^\d+\s+(\w+)\(", log.read_text(), re.MULTILINE):
        made[name] = made.get(name, 0) + 1
    return made


@strace
def test_killed_at_any_step_the_old_one_runs_or_the_new_and_the_next_call_ends_it(
    tmp_path: Path, installer: Path
) -> None:
    board = Board(tmp_path, installer)
    board.run(board.order("1.0"))
    order = board.order("2.0")
    shutil.copytree(board.home, tmp_path / "before", symlinks=True)
    made = calls(board, order, tmp_path / "log")
    assert made["rename"] >= 3
    points = [(name, n) for name, count in made.items() for n in _spread(count)]
    for name, n in points:
        shutil.rmtree(board.home)
        shutil.copytree(tmp_path / "before", board.home, symlinks=True)
        killed = board.run(
            order, "strace", "-f", "-qq", "-o", os.devnull, "-e", "trace=none",
            "-e", f"inject={name}:signal=KILL:when={n}",
        )  # fmt: skip

        place = f"{name} {n}"
        assert board.version() in ("1.0", "2.0"), place
        answer = board.run(order)
        assert answer is not None, place
        assert "result" in answer, (place, killed)
        assert board.version() == "2.0", place
        left = {p.name for p in board.env.iterdir()} - board.environments()
        assert left == {"current", "previous", "lock", "wheels.json"}, place


def _spread(count: int, most: int = 4) -> list[int]:
    """The first, the last, and some of the calls in between."""
    step = max(1, (count - 1) / (most - 1))
    return sorted({round(1 + k * step) for k in range(most) if 1 + k * step <= count} | {count})


def fill(ballast: Path) -> None:
    """Take all the room that is left."""
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_disk_that_fills_up_leaves_what_was_there(tmp_path: Path, installer: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "x", folder], check=True)
    except subprocess.CalledProcessError:
        pytest.skip("this machine lets nobody mount")
    try:
        board = Board(folder, installer)
        board.run(board.order("1.0"))
        order = board.order("2.0")
        fill(folder / "ballast")

        answer = board.run(order)

        assert answer is not None
        assert answer["error"]["exit_code"] == 11
        assert "No space left" in answer["error"]["message"]
        assert board.version() == "1.0"
        assert [p.name for p in board.env.iterdir() if p.name.endswith((".part", ".old"))] == []
        (folder / "ballast").unlink()
        assert board.run(order) is not None
        assert board.version() == "2.0"
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# ---------------------------------------------------------------- uninstalling


@pytest.fixture
def furnished(board: Board) -> Iterator[Board]:
    """A board with everything that edgeexit makes, and things of others in between."""
    board.run(board.order("1.0"))
    release = board.home / "apps/fashion/releases/0123456789abcdef"
    release.mkdir(parents=True)
    (release / "bundle.json").write_text("{}")
    (board.home / "apps/fashion/current").symlink_to("releases/0123456789abcdef")
    (board.home / "results" / ("b" * 16)).mkdir(parents=True)
    for mine in ("env/notes.txt", "apps/my-app/main.py", "blobs/photo.jpg", "results/july/a.csv"):
        (board.home / mine).parent.mkdir(parents=True, exist_ok=True)
        (board.home / mine).write_text("mine")
    (board.home / "env" / ("c" * 16)).mkdir()
    outside = board.home.parent / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (release / "link").symlink_to(outside)
    yield board
    assert (outside / "kept").exists()


MINE = {"env/notes.txt", "apps/my-app/main.py", "blobs/photo.jpg", "results/july/a.csv"}


def files(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}


def uninstall(board: Board, *, everything: bool, dry: bool = False) -> dict[str, Any]:
    order = {"do": "uninstall", "home": str(board.home), "everything": everything, "dry": dry}
    answer = board.run(order)
    assert answer is not None
    result: dict[str, Any] = answer["result"]
    return result


def test_uninstall_takes_the_environments_and_leaves_the_rest(furnished: Board) -> None:
    result = uninstall(furnished, everything=False)

    assert {name.partition("/")[0] for name, _ in result["removed"]} == {"env", "blobs"}
    assert {path.name for path in furnished.blobs.iterdir()} == {"photo.jpg"}
    assert result["left"] == ["env"]
    assert files(furnished.home) >= MINE
    assert (furnished.home / "apps/fashion/releases").is_dir()
    assert not (furnished.env / "current").is_symlink()


def test_uninstall_of_all_takes_nothing_that_is_not_edgeexits(furnished: Board) -> None:
    foretold = uninstall(furnished, everything=True, dry=True)
    assert furnished.version() == "1.0"

    result = uninstall(furnished, everything=True)

    assert result["removed"] == foretold["removed"]
    assert files(furnished.home) == MINE
    assert result["left"] == ["apps", "blobs", "env", "results"]


def test_uninstall_of_all_removes_the_folder_when_nothing_else_is_in_it(board: Board) -> None:
    board.run(board.order("1.0"))
    # What deploy and profile leave, also where they were killed.
    blob = "a" * 64
    for name in ("results/lock", f"blobs/{blob}.7.part", f"blobs/{blob}.part", "blobs/.probe"):
        (board.home / name).parent.mkdir(exist_ok=True)
        (board.home / name).touch()
    (board.home / "deploy.lock").touch()

    uninstall(board, everything=True)

    assert not board.home.exists()
    assert uninstall(board, everything=True)["removed"] == []


def test_uninstall_does_not_follow_a_link_out_of_the_folder(board: Board, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    board.run(board.order("1.0"))
    board.env.rename(elsewhere)
    board.env.symlink_to(elsewhere)

    result = uninstall(board, everything=True)

    assert (elsewhere / "current").is_symlink()
    assert "env" in result["left"]

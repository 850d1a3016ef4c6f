import os
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote

import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.errors import UsageError
from edgeexit.machine import ENVIRONMENT, Machine, command_file, finite, this_machine

TEXT = st.characters(codec="utf-8")


def test_only_the_root_is_the_live_machine(tmp_path: Path) -> None:
    assert Machine().is_live
    assert Machine("/").is_live
    assert not Machine(tmp_path).is_live


def test_this_machine_is_the_tree_that_the_environment_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert this_machine().is_live
    monkeypatch.setenv(ENVIRONMENT, "")
    assert this_machine().is_live
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert this_machine().root == tmp_path


def test_what_is_absent_or_refuses_says_nothing(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("absent", "folder", "folder/absent/deeper", "a\0b", "x" * 300):
        assert machine.text(name) is None
        assert machine.line(name) is None
        assert machine.number(name) is None
    for name in ("absent", "a\0b", "x" * 300):
        assert not machine.exists(name)
    assert machine.glob("nothing*/here") == []


def test_lines_are_stripped_of_blanks_and_of_the_device_trees_nuls(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    trees.put(machine, {"model": "Raspberry Pi 4\0", "blank": " \n\0", "two": "a\nb\n"})
    assert machine.line("model") == "Raspberry Pi 4"
    assert machine.line("blank") is None
    assert machine.line("two") == "a\nb"


def test_bytes_that_are_no_text_do_not_stop_the_reading(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe 7")
    assert Machine(tmp_path).text("bytes") == "�� 7"


def test_an_endless_file_is_cut(tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    assert len(Machine(tmp_path).text("endless") or "") == 1 << 20


@given(st.text(max_size=30))
def test_a_text_spells_a_finite_number_or_none(text: str) -> None:
    value = finite(text)
    assert value is None or abs(value) < 1e15


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "1e15", "", "0x10", "1 2"])
def test_what_is_no_finite_number_is_none(text: str) -> None:
    assert finite(text) is None


def test_numbers_may_have_blanks_around_them() -> None:
    assert finite(" 48686\n") == 48686
    assert finite(None) is None


def test_names_are_found_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    names = [f"sys/hwmon{n}/temp{k}" for n in (0, 2, 9, 10, 11) for k in (1, 12)]
    trees.put(machine, dict.fromkeys(reversed(names), "1"))
    assert machine.glob("sys/hwmon*/temp*") == names


@given(st.lists(st.text("ab01", min_size=1, max_size=5), unique=True, min_size=1, max_size=6))
def test_the_order_of_names_does_not_depend_on_the_disk(names: list[str]) -> None:
    orders = []
    for written in (names, names[::-1]):
        with tempfile.TemporaryDirectory() as folder:
            for name in written:
                (Path(folder) / name).touch()
            orders.append(Machine(folder).glob("*"))
    assert orders[0] == orders[1]
    assert sorted(orders[0]) == sorted(names)


@given(st.lists(st.text(TEXT, min_size=1, max_size=10), min_size=1, max_size=4))
def test_a_commands_output_has_one_file_name_in_the_tree(argv: list[str]) -> None:
    folder, _, file = command_file(argv).partition("/")
    assert folder == "commands"
    assert "/" not in file
    assert unquote(file) == " ".join(argv)


def test_a_tree_replays_commands_and_runs_none(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    trees.put(machine, commands={"vcgencmd get_throttled": "throttled=0x0\n"})
    assert machine.run(["vcgencmd", "get_throttled"]) == "throttled=0x0\n"
    assert machine.run(["uname", "-m"]) is None


def test_a_live_command_says_what_it_prints() -> None:
    script = "import os, sys; print(os.environ['LC_ALL']); print('no', file=sys.stderr)"
    assert Machine().run([sys.executable, "-c", script]) == "C\n"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["no-such-program-anywhere"],
        ["/absent/program"],
        ["a\0b"],
        [sys.executable, "-c", "raise SystemExit(3)"],
        [sys.executable, "-c", "input()"],
    ],
)
def test_a_live_command_that_fails_says_nothing(argv: list[str]) -> None:
    assert Machine().run(argv) is None


def test_a_command_that_hangs_is_stopped() -> None:
    assert Machine().run(["sleep", "60"], timeout_s=0.05) is None


def test_a_name_of_a_number_may_vanish_between_looking_and_reading(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    trees.put(machine, {"sys/a": "1"})
    names = machine.glob("sys/*")
    os.unlink(tmp_path / "sys/a")  # noqa: PTH108
    assert [machine.number(name) for name in names] == [None]


def test_a_root_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEEXIT_SYSROOT", str(tmp_path / "absent"))
    with pytest.raises(UsageError, match=r"EDGEEXIT_SYSROOT: .*absent: no such folder"):
        this_machine()
    monkeypatch.setenv("EDGEEXIT_SYSROOT", str(tmp_path))
    assert this_machine().root == tmp_path

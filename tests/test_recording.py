import io
import os
import tarfile
from pathlib import Path

import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import this_device
from edgeexit.errors import DeviceError, StorageError, UsageError
from edgeexit.files import read_json
from edgeexit.machine import Machine, command_file
from edgeexit.meters import find_meters
from edgeexit.recording import COMMANDS, FILES, INDEX, REMOVED, _Secrets, record
from edgeexit.state import Reading, machine_facts, read_state

MACHINE_ID = "4f6c2a0e3b8d4c1f9a7e5d2b1c0a9f8e"


def felt(machine: Machine) -> dict[str, object]:
    """All of a reading that belongs to the machine, not to the moment or to this process."""
    found: Reading = read_state(machine)
    return {
        key: getattr(found, key)
        for key in found.__dataclass_fields__
        if key not in ("at_ns", "own_ms")
    }


def replayed(path: Path, into: Path) -> Machine:
    """The recording *path*, unpacked if need be."""
    if path.is_dir():
        return Machine(path)
    with tarfile.open(path) as archive:
        archive.extractall(into, filter="data")
    (top,) = into.iterdir()
    return Machine(top)


@pytest.mark.parametrize("kind", ["tree", "tree.tar.gz"])
@pytest.mark.parametrize("name", trees.BOARDS)
def test_a_replayed_recording_says_the_same(tmp_path: Path, name: str, kind: str) -> None:
    board = trees.tree(tmp_path / "board", name)
    made = record(board, tmp_path / kind)
    again = replayed(made.path, tmp_path / "unpacked")
    assert felt(again) == felt(board)
    assert machine_facts(again) == machine_facts(board)
    assert this_device(again) == this_device(board) == made.device == name


@pytest.mark.parametrize("name", trees.BOARDS)
def test_meters_find_the_same_in_a_recording(tmp_path: Path, name: str) -> None:
    from edgeexit.device import find_device

    board = trees.tree(tmp_path / "board", name)
    again = Machine(record(board, tmp_path / "again").path)
    device = find_device(name)

    def found(machine: Machine) -> list[tuple[str, str, bool]]:
        return [(f.spec, f.title, f.info is not None) for f in find_meters(machine, device)]

    assert found(again) == found(board)


def test_recording_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    board = trees.tree(tmp_path / "board", "rpi5")
    record(board, tmp_path / "a" / "x.tar.gz")
    record(board, tmp_path / "b" / "x.tar.gz")
    assert (tmp_path / "a/x.tar.gz").read_bytes() == (tmp_path / "b/x.tar.gz").read_bytes()


def test_this_machine_can_be_recorded(tmp_path: Path) -> None:
    made = record(Machine(), tmp_path / "here")
    here, again = machine_facts(Machine()), machine_facts(Machine(made.path))
    assert again == here
    assert made.size_bytes == sum(p.stat().st_size for p in made.path.rglob("*") if p.is_file())
    assert sorted(str(p.relative_to(made.path)) for p in made.path.rglob("*") if p.is_file()) == [
        *made.names
    ]


def test_the_index_says_what_a_tree_is(tmp_path: Path) -> None:
    made = record(trees.tree(tmp_path / "board", "rpi4"), tmp_path / "out")
    index = read_json(made.path / INDEX)
    assert index.get("format", int) == 1
    assert index.get("device", str) == "rpi4"
    assert index.get("board", str) == "Raspberry Pi 4 Model B Rev 1.4"
    assert "EDGEEXIT_SYSROOT" in index.get("emulated", str)
    assert index.list_of("removed", str) == list(REMOVED)


# ---------------------------------------------------------------- what is left out


def talkative(folder: Path, name: str) -> Machine:
    """A board whose files and commands say all that is private, in every place that is read."""
    gossip = (
        f"{trees.SERIAL} {trees.SERIAL.upper()}\0 {trees.MAC} {trees.MAC.replace(':', '-')}\n"
        f"{MACHINE_ID} /home/alice/swapfile {trees.HOST_NAME} user@{trees.HOST_NAME}.local\n"
    )
    machine = trees.tree(folder, name, files={"etc/machine-id": f"{MACHINE_ID}\n"})
    files = {pattern: gossip for pattern in FILES if "*" not in pattern}
    del files["sys/devices/system/cpu/online"], files["proc/stat"]
    files["proc/cpuinfo"] = (machine.text("proc/cpuinfo") or "") + f"Serial\t\t: {trees.SERIAL}\n"
    trees.put(machine, files, {" ".join(argv): gossip for argv in COMMANDS})
    return machine


@pytest.mark.parametrize("name", ["rpi4", "host"])
def test_nothing_private_is_in_a_recording(tmp_path: Path, name: str) -> None:
    made = record(talkative(tmp_path / "board", name), tmp_path / "out")
    private = (trees.SERIAL, trees.MAC, trees.MAC.replace(":", "-"), MACHINE_ID, "alice")
    for place in made.names:
        text = (made.path / place).read_text().lower()
        for secret in private:
            assert secret not in text, place
        if place.startswith(("etc/", "commands/")):
            assert trees.HOST_NAME not in text, place
    assert "removed" in (made.path / command_file(["uname", "-m"])).read_text()
    assert "/home/removed" in (made.path / "proc/swaps").read_text()


def test_files_that_name_a_machine_are_not_opened(tmp_path: Path) -> None:
    made = record(trees.tree(tmp_path / "board", "host"), tmp_path / "out")
    for word in ("serial", "uuid", "address", "hostname", "machine-id", "proc/version", "cmdline"):
        assert not [name for name in made.names if word in name]


def test_a_serial_line_goes_and_the_board_stays(tmp_path: Path) -> None:
    made = record(trees.tree(tmp_path / "board", "rpi4"), tmp_path / "out")
    text = (made.path / "proc/cpuinfo").read_text()
    assert "Serial" not in text
    assert "Revision\t: c03114" in text
    assert "Model\t\t: Raspberry Pi 4 Model B Rev 1.4" in text


@pytest.mark.parametrize("host", ["raspberrypi", "performance", "cpu", "ondemand", "rock-5b"])
def test_a_host_name_that_is_an_ordinary_word_spoils_nothing(tmp_path: Path, host: str) -> None:
    files = {"etc/hostname": f"{host}\n", "proc/sys/kernel/hostname": f"{host}\n"}
    board = trees.tree(tmp_path / "board", "rpi4", files=files)
    again = Machine(record(board, tmp_path / "out").path)
    assert felt(again) == felt(board)
    assert again.text("proc/device-tree/compatible") == board.text("proc/device-tree/compatible")


@pytest.mark.parametrize("serial", ["0", "None", "00000"])
def test_a_serial_number_of_nobody_spoils_nothing(tmp_path: Path, serial: str) -> None:
    files = {"sys/class/dmi/id/product_serial": f"{serial}\n"}
    board = trees.tree(tmp_path / "board", "host", files=files)
    assert felt(Machine(record(board, tmp_path / "out").path)) == felt(board)


@given(st.binary(max_size=60))
def test_scrubbing_is_done_after_once(data: bytes) -> None:
    secrets = _Secrets(Machine("/absent"))
    once = secrets.removed("etc/os-release", data)
    assert secrets.removed("etc/os-release", once) == once


@given(
    st.binary(max_size=20).filter(lambda b: not b[-1:].isalnum()),
    st.lists(st.integers(0, 255), min_size=6, max_size=6),
    st.sampled_from(":-"),
)
def test_every_mac_address_goes(before: bytes, numbers: list[int], between: str) -> None:
    mac = between.join(f"{n:02x}" for n in numbers).encode()
    found = _Secrets(Machine("/absent")).removed("etc/x", before.rstrip(b":-") + b" " + mac + b"\n")
    assert mac not in found or mac == b"00:00:00:00:00:00"


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["there", "there.tar.gz"])
def test_nothing_is_overwritten(tmp_path: Path, name: str) -> None:
    board = trees.tree(tmp_path / "board", "rpi4")
    (tmp_path / "there").mkdir()
    (tmp_path / "there.tar.gz").symlink_to("nowhere")
    with pytest.raises(UsageError, match="exists, and a recording overwrites nothing"):
        record(board, tmp_path / name)
    assert list((tmp_path / "there").iterdir()) == []


def test_an_empty_tree_is_no_machine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DeviceError, match="holds none of the files of a machine"):
        record(Machine(tmp_path / "empty"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_takes_nothing_is_a_storage_error(tmp_path: Path) -> None:
    board = trees.tree(tmp_path / "board", "rpi4")
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StorageError):
        record(board, tmp_path / "locked/out")


def test_a_tar_file_names_no_user_and_holds_only_plain_files(tmp_path: Path) -> None:
    made = record(trees.tree(tmp_path / "board", "rpi5"), tmp_path / "my-pi.v2.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(made.path.read_bytes())) as archive:
        for entry in archive:
            assert entry.isfile()
            assert (entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime) == (
                0,
                0,
                "",
                "",
                0,
            )
            assert entry.name.startswith("my-pi.v2/")


def test_a_sensor_that_refuses_is_left_out(tmp_path: Path) -> None:
    board = trees.tree(tmp_path / "board", "rpi4")
    zone = "sys/class/thermal/thermal_zone0/temp"
    trees.put(board, {zone: None})
    board.path(zone).symlink_to("/proc/self/mem")
    made = record(board, tmp_path / "out")
    assert zone not in made.names

import json
import re
from pathlib import Path

import pytest
import trees
from hypothesis import given
from hypothesis import strategies as st

from edgeexit import device, meters
from edgeexit.errors import BadFile, EdgeExitError, UsageError
from edgeexit.files import Table, read_toml
from edgeexit.machine import ENVIRONMENT, Machine
from edgeexit.names import data_folder

TEXTS = {
    "Raspberry Pi Zero 2 W Rev 1.0": "rpi-zero2w",
    "Raspberry Pi 3 Model B Plus Rev 1.3": "rpi3b+",
    "Raspberry Pi 3 Model B Rev 1.2": "host",
    "Raspberry Pi 4 Model B Rev 1.4": "rpi4",
    "Raspberry Pi 5 Model B Rev 1.0": "rpi5",
    "Raspberry Pi 500 Rev 1.0": "host",
    "Raspberry Pi Compute Module 4 Rev 1.0": "cm4",
    "Raspberry Pi Compute Module 4S Rev 1.0": "host",
    "Raspberry Pi Compute Module 5 Rev 1.0": "cm5",
    "Radxa ROCK 5B": "rock5b",
    "Xunlong Orange Pi 5": "orangepi5",
    "Xunlong Orange Pi 5 Plus": "host",
    "NVIDIA Jetson Orin Nano Developer Kit": "jetson-orin-nano",
    "NVIDIA Jetson Orin NX": "host",
    "NVIDIA Jetson Nano Developer Kit": "jetson-nano",
    "NVIDIA Jetson Nano 2GB Developer Kit": "host",
    "BeagleBoard.org BeaglePlay": "beagleplay",
    "QEMU Virtual Machine": "host",
}
BOARDS = (
    *("rpi-zero2w", "rpi3b+", "rpi4", "rpi5", "cm4", "cm5", "rock5b", "orangepi5"),
    *("jetson-orin-nano", "jetson-nano", "beagleplay", "host"),
)


def board(root: Path, model: str) -> Machine:
    machine = Machine(root)
    trees.put(machine, {"proc/device-tree/model": model + "\0"})
    return machine


# ---------------------------------------------------------------- the shipped boards


def test_the_named_boards_are_there() -> None:
    assert set(BOARDS) <= set(device.device_names())


@pytest.mark.parametrize("name", device.device_names())
def test_every_shipped_device_reads(name: str) -> None:
    found = device.find_device(name)
    assert found.name == name
    assert found.title
    assert all(fact.source for fact in found.facts.values())
    assert found.meter in (None, device.NO_METER, *meters.METERS)
    assert found.core_count is None or all(core < found.core_count for core in found.pin)
    json.dumps(found.to_document(), allow_nan=False)


@pytest.mark.parametrize("name", device.device_names())
def test_what_nobody_looked_up_is_not_verified(name: str) -> None:
    for fact in device.find_device(name).facts.values():
        assert not (fact.verified and "not looked up" in fact.source)


def test_two_kinds_of_cores_are_pinned_to_the_fast_ones() -> None:
    for name in device.device_names():
        found = device.find_device(name)
        if len(found.cores) > 1:
            counts = [int(kind.partition("x")[0]) for kind in found.cores]
            assert found.pin == tuple(range(sum(counts[:-1]), sum(counts)))
            assert "A76" in found.cores[-1]


def test_the_readme_lists_every_device_and_every_fact() -> None:
    text = (data_folder("devices") / "README.md").read_text()
    for name in device.device_names():
        row = re.search(rf"(?m)^\| `{re.escape(name)}` \|.*$", text)
        assert row is not None, name
        for pattern in device.find_device(name).models:
            assert f"`{pattern}`" in row[0]
    for key in device._FACTS:
        assert f"`{key}`" in text


# ---------------------------------------------------------------- which one a machine is


@pytest.mark.parametrize(("model", "name"), TEXTS.items())
def test_a_board_is_known_by_its_model_text(tmp_path: Path, model: str, name: str) -> None:
    assert device.this_device(board(tmp_path, model)) == name


@pytest.mark.parametrize("model", TEXTS)
def test_no_model_text_is_claimed_by_two_boards(tmp_path: Path, model: str) -> None:
    from fnmatch import fnmatchcase

    claims = {
        name
        for name in device.device_names()
        for pattern in device.find_device(name).models
        if fnmatchcase(model, pattern)
    }
    assert len(claims) <= 1


@pytest.mark.parametrize("name", trees.BOARDS)
def test_each_rebuilt_tree_is_its_board(tmp_path: Path, name: str) -> None:
    assert device.this_device(trees.tree(tmp_path, name)) == name


def test_a_machine_without_model_text_is_the_host(tmp_path: Path) -> None:
    found = device.identify(Machine(tmp_path))
    assert (found.name, found.model) == ("host", None)
    assert found.why == "this machine has no model text"


def test_a_pi_in_a_container_is_known_by_its_cpuinfo(tmp_path: Path) -> None:
    machine = trees.tree(tmp_path, "rpi4", files={"proc/device-tree": None})
    assert device.board_model(machine) == "Raspberry Pi 4 Model B Rev 1.4"
    assert device.this_device(machine) == "rpi4"


def test_a_pc_is_called_as_its_maker_does(tmp_path: Path) -> None:
    found = device.identify(trees.tree(tmp_path, "host"))
    assert found.model == "LENOVO 20L7001TGE"
    assert found.why.startswith("no board's pattern matches")


def test_without_a_machine_the_one_in_the_environment_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.tree(tmp_path, "beagleplay")
    monkeypatch.setenv(ENVIRONMENT, str(tmp_path))
    assert device.this_device() == "beagleplay"


# ---------------------------------------------------------------- reading a TOML


def good() -> dict[str, object]:
    return dict(read_toml(data_folder("devices") / "rpi4.toml").values)


def fact(value: object, source: str = "models", **more: object) -> dict[str, object]:
    return {"value": value, "source": source, "verified": True, **more}


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        device.find_device("rpi44")
    assert caught.value.hint == "did you mean 'rpi4'?"


def test_a_toml_file_describes_a_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'format = 2\nname = "mine"\ntitle = "My board"\nmodels = []\n'
        '[measure]\nthreads = 2\npin = [1, 3]\n[sources]\nbench = "my bench"\n[facts]\n'
        'core_w = { value = 2, source = "bench", verified = true, note = "one run" }\n'
    )
    found = device.find_device(str(path))
    assert (found.title, found.threads, found.pin) == ("My board", 2, (1, 3))
    assert found.modelled_core_w == found.core_w == 2.0
    assert found.facts["core_w"] == device.Fact(
        value=2.0, source="my bench", verified=True, note="one run"
    )
    with pytest.raises(UsageError, match="no such file"):
        device.find_device(str(tmp_path / "other.toml"))


def test_a_file_must_be_called_as_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.toml").write_text((data_folder("devices") / "rpi4.toml").read_text())
    monkeypatch.setattr(device, "data_folder", lambda _kind: tmp_path)
    with pytest.raises(BadFile, match="expected 'b' as in the file's name, found 'rpi4'"):
        device.find_device("b")


def test_the_modelled_core_takes_its_share_of_the_step() -> None:
    found = device.find_device("rpi4")
    assert found.idle_w is not None and found.busy_w is not None
    assert found.modelled_core_w == pytest.approx((found.busy_w - found.idle_w) / 4)
    assert device.find_device("beagleplay").modelled_core_w is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format: found 1, this version reads 2"),
        ({"modles": []}, "modles: unknown key"),
        ({"models": "rpi"}, "models: expected list"),
        ({"name": "../../x"}, "name: expected letters, digits, + . _ -, found '../../x'"),
        ({"name": ""}, "name: expected letters"),
        ({"notes": [1]}, "notes.0: expected str"),
        ({"facts": {"clock": fact(1)}}, "facts.clock: unknown key, expected one of soc"),
        ({"facts": {"idle_w": fact(float("nan"))}}, "idle_w.value: expected a positive number"),
        ({"facts": {"idle_w": fact(float("inf"))}}, "idle_w.value: expected a positive number"),
        ({"facts": {"idle_w": fact(-1.0)}}, "idle_w.value: expected a positive number"),
        ({"facts": {"clock_mhz": fact(1.5e3)}}, "clock_mhz.value: expected int"),
        ({"facts": {"clock_mhz": fact(True)}}, "clock_mhz.value: expected int"),
        ({"facts": {"ram_mb": fact(["1"])}}, "ram_mb.value.0: expected int"),
        ({"facts": {"ram_mb": fact([0])}}, "ram_mb.value: expected a positive number"),
        ({"facts": {"cores": fact(["four"])}}, "expected such as '4x Cortex-A72'"),
        ({"facts": {"cores": fact(["0x Cortex-A72"])}}, "expected such as '4x Cortex-A72'"),
        ({"facts": {"meter": fact("INA 219")}}, "expected a kind of meter or 'none'"),
        ({"facts": {"idle_w": fact(1.0, "nowhere")}}, "'nowhere' is not among [sources] (has:"),
        ({"facts": {"idle_w": {"value": 1.0}}}, "idle_w.source: missing"),
        ({"facts": {"idle_w": fact(1.0, verified="yes")}}, "verified: expected bool"),
        ({"facts": {"idle_w": fact(1.0, sauce="x")}}, "sauce: unknown key"),
        ({"facts": {"idle_w": fact(5), "busy_w": fact(5)}}, "busy_w: expected more than idle_w"),
        ({"measure": {"threads": 0}}, "measure.threads: expected 1 to 256"),
        ({"measure": {"cores": [1]}}, "measure.cores: unknown key"),
        ({"measure": {"pin": [4]}}, "measure.pin: expected different numbers of cores"),
        ({"measure": {"pin": [1, 1]}}, "measure.pin: expected different numbers of cores"),
        ({"measure": {"pin": [-1]}}, "measure.pin: expected different numbers of cores"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(BadFile) as caught:
        device.Device.from_table(Table({**good(), **change}, "x.toml"))
    assert str(caught.value).startswith("x.toml: ")
    assert message in str(caught.value)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=4,
)


@given(key=st.sampled_from(sorted(device._FACTS)), value=ANYTHING)
def test_a_fact_is_read_or_refused_never_a_crash(key: str, value: object) -> None:
    table = Table({**good(), "facts": {key: fact(value)}}, "x.toml")
    try:
        found = device.Device.from_table(table)
    except EdgeExitError as error:
        assert "x.toml: facts" in str(error) or "x.toml: measure" in str(error)
    else:
        assert found.facts[key].source


@given(key=st.sampled_from(["name", "title", "models", "notes", "measure", "sources"]), v=ANYTHING)
def test_a_key_is_read_or_refused_never_a_crash(key: str, v: object) -> None:
    try:
        device.Device.from_table(Table({**good(), key: v}, "x.toml"))
    except EdgeExitError as error:
        assert "x.toml" in str(error)

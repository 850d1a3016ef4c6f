import json
from pathlib import Path

import pytest

from edgeexit import device
from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table, read_toml
from edgeexit.names import data_folder

TEXTS = {
    "Raspberry Pi Zero 2 W Rev 1.0": "rpi-zero2w",
    "Raspberry Pi 3 Model B Plus Rev 1.3": "rpi3b+",
    "Raspberry Pi 3 Model B Rev 1.2": "host",
    "Raspberry Pi 4 Model B Rev 1.4": "rpi4",
    "Raspberry Pi 5 Model B Rev 1.0": "rpi5",
    "Raspberry Pi 500 Rev 1.0": "host",
    "Raspberry Pi Compute Module 4 Rev 1.0": "host",
    "Radxa ROCK 5B": "rock5b",
    "NVIDIA Jetson Orin Nano Developer Kit": "jetson-orin-nano",
    "QEMU Virtual Machine": "host",
}


def board(root: Path, model: str) -> Path:
    folder = root / "proc/device-tree"
    folder.mkdir(parents=True)
    (folder / "model").write_bytes(model.encode() + b"\0")
    return root


@pytest.mark.parametrize("name", device.device_names())
def test_every_shipped_device_reads(name: str) -> None:
    found = device.find_device(name)
    assert found.name == name
    assert found.title
    assert all(fact.source for fact in found.facts.values())


def test_the_named_boards_are_there() -> None:
    wanted = {"host", "rpi3b+", "rpi4", "rpi5", "rpi-zero2w", "jetson-orin-nano", "rock5b"}
    assert wanted <= set(device.device_names())


@pytest.mark.parametrize(("model", "name"), TEXTS.items())
def test_a_board_is_known_by_its_model_text(tmp_path: Path, model: str, name: str) -> None:
    assert device.this_device(board(tmp_path, model)) == name


def test_a_machine_without_model_text_is_the_host(tmp_path: Path) -> None:
    assert device.this_device(tmp_path) == "host"


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        device.find_device("rpi44")
    assert caught.value.hint == "did you mean 'rpi4'?"


def test_a_toml_file_describes_a_device(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('format = 1\nname = "mine"\ntitle = "My board"\nmodels = []\n')
    assert device.find_device(str(path)).title == "My board"
    with pytest.raises(UsageError, match="no such file"):
        device.find_device(str(tmp_path / "other.toml"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: found 2"),
        ({"modles": []}, "modles: unknown key"),
        ({"models": "rpi"}, "models: expected list"),
        ({"power": {"idle_w": float("nan"), "busy_w": 2.0}}, "power.source: missing"),
        (
            {"power": {"idle_w": float("nan"), "busy_w": 2.0, "source": "x", "verified": True}},
            "power.idle_w: expected a positive number, found nan",
        ),
        ({"memory": {"ram_mb": ["1"], "source": "x", "verified": True}}, "ram_mb.0: expected int"),
    ],
)
def test_a_wrong_description_is_refused(change: dict[str, object], message: str) -> None:
    good = read_toml(data_folder("devices") / "rpi4.toml").values
    with pytest.raises(BadFile) as caught:
        device.Device.from_table(Table({**good, **change}, "x.toml"))
    assert message in str(caught.value)


def test_environment_reads_a_recorded_board(tmp_path: Path) -> None:
    root = board(tmp_path, "Raspberry Pi 4 Model B Rev 1.4")
    files = {
        "proc/cpuinfo": "processor\t: 0\nCPU part\t: 0xd08\n",
        "proc/meminfo": "MemTotal:        3884000 kB\nMemAvailable:    3000000 kB\n",
        "proc/loadavg": "0.25 0.10 0.05 1/200 4242\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "ondemand\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "1500398\n",
        "sys/class/thermal/thermal_zone0/temp": "48686\n",
        "sys/class/thermal/thermal_zone1/temp": "garbage\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    found = device.environment(root)

    assert found["board"] == "Raspberry Pi 4 Model B Rev 1.4"
    assert found["cpu"] == "0xd08"
    assert found["governor"] == "ondemand"
    assert found["clock_mhz"] == pytest.approx(1500.398)
    assert found["temperature_c"] == pytest.approx(48.686)
    assert found["load_1m"] == 0.25
    assert found["memory_total_mb"] == 3793


def test_environment_of_this_machine_and_of_an_empty_one_is_json(tmp_path: Path) -> None:
    here, nowhere = device.environment(), device.environment(tmp_path)
    json.dumps([here, nowhere], allow_nan=False)
    assert here.keys() == nowhere.keys()
    assert nowhere["temperature_c"] is None

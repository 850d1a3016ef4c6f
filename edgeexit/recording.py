"""
Pack what a board says of itself into a tree that can be replayed anywhere, and donated.

Callers see record and Recording. The tree holds the files and command outputs that edgeexit reads
of any machine (FILES and COMMANDS: an allow-list, nothing else is opened), as plain files below a
folder or in a .tar.gz. Replay it with EDGEEXIT_SYSROOT=FOLDER.

What would name one single machine or person is left out: REMOVED says what, and how.
"""

import gzip
import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from edgeexit import __version__
from edgeexit.device import board_model, this_device
from edgeexit.errors import DeviceError, UsageError, storage
from edgeexit.files import json_bytes, new_folder, write_file
from edgeexit.machine import Machine, command_file
from edgeexit.state import emulation

FORMAT = 1
INDEX = "recording.json"
_PACKED = (".tar.gz", ".tgz")
_MOST_FILES = 4000
_MOST_BYTES = 1 << 16

_CPU = "sys/devices/system/cpu"
_HWMON = "sys/class/hwmon/hwmon*"
_IIO = "sys/bus/iio/devices/iio:device*"
_OLD_JETSON = "sys/bus/i2c/drivers/ina3221x/*/iio*device*"
FILES = (
    *(f"proc/{name}" for name in ("cpuinfo", "meminfo", "loadavg", "stat", "uptime", "swaps")),
    *(f"proc/pressure/{name}" for name in ("cpu", "memory", "io")),
    "proc/self/status",
    *("proc/sys/kernel/osrelease", "proc/sys/kernel/ostype", "proc/sys/vm/swappiness"),
    *("proc/device-tree/model", "proc/device-tree/compatible"),
    "proc/device-tree/chosen/power/max_current",
    *("etc/os-release", "etc/debian_version", "etc/rpi-issue", "etc/nv_tegra_release"),
    "run/systemd/timesync/synchronized",
    *(f"{_CPU}/{name}" for name in ("online", "possible", "present", "isolated", "smt/active")),
    f"{_CPU}/cpu0/regs/identification/midr_el1",
    f"{_CPU}/cpu[0-9]*/topology/*_list",
    f"{_CPU}/cpu[0-9]*/cpu_capacity",
    f"{_CPU}/cpu0/cache/index*/[lst]*e*",
    f"{_CPU}/cpufreq/boost",
    f"{_CPU}/cpufreq/policy*/[acrs]*",
    f"{_CPU}/cpufreq/policy*/stats/time_in_state",
    "sys/class/thermal/thermal_zone*/type",
    "sys/class/thermal/thermal_zone*/temp",
    "sys/class/thermal/thermal_zone*/trip_point_*",
    "sys/class/thermal/cooling_device*/type",
    "sys/class/thermal/cooling_device*/*_state",
    f"{_HWMON}/name",
    *(f"{_HWMON}/{kind}[0-9]*" for kind in ("in", "curr", "power", "energy", "temp", "fan", "pwm")),
    f"{_HWMON}/shunt*_resistor",
    *(f"{_HWMON}/{name}" for name in ("update_interval", "samples")),
    f"{_HWMON}/device/of_node/shunt-resistor",
    "sys/bus/i2c/devices/*/hwmon/hwmon*/name",
    f"{_IIO}/name",
    f"{_IIO}/in_*",
    f"{_IIO}/sampling_frequency",
    f"{_OLD_JETSON}/name",
    f"{_OLD_JETSON}/rail_name_*",
    f"{_OLD_JETSON}/in_*",
    "sys/class/powercap/*/name",
    "sys/class/powercap/*/enabled",
    "sys/class/powercap/*/*energy*",
    *(
        f"sys/class/power_supply/*/{name}"
        for name in ("type", "scope", "status", "online", "present", "capacity", "*_now", "*_full")
    ),
    "sys/class/devfreq/*/*_freq",
    "sys/class/devfreq/*/governor",
    *("sys/class/dmi/id/sys_vendor", "sys/class/dmi/id/product_name"),
    "sys/devices/platform/*/soc:firmware/get_throttled",
)
COMMANDS = (
    ("uname", "-m"),
    ("getconf", "LONG_BIT"),
    ("getconf", "GNU_LIBC_VERSION"),
    ("vcgencmd", "version"),
    ("vcgencmd", "get_throttled"),
    ("vcgencmd", "measure_clock", "arm"),
    ("vcgencmd", "measure_temp"),
    ("vcgencmd", "measure_volts", "core"),
    ("vcgencmd", "get_config", "arm_freq"),
    ("vcgencmd", "get_config", "temp_soft_limit"),
    ("vcgencmd", "pmic_read_adc"),
    ("nvpmodel", "-q"),
    ("timedatectl", "show", "-p", "NTPSynchronized", "--value"),
)
REMOVED = (
    "serial numbers: the Serial line of cpuinfo goes, elsewhere they become 'removed'",
    "MAC addresses: anything of that form becomes 00:00:00:00:00:00",
    "the machine id and, where a program or a person could have written it, the host name",
    "names of home folders: /home/removed",
)
_MAC = re.compile(rb"(?<![0-9A-Fa-f:-])([0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}(?![0-9A-Fa-f:-])")
_HOME = re.compile(rb"/home/[^/\s\0\"']+")
_SERIAL_LINE = re.compile(rb"(?m)^Serial\s*:.*\n?")
_SERIALS = (
    "proc/device-tree/serial-number",
    "sys/class/dmi/id/product_serial",
    "sys/class/dmi/id/board_serial",
    "sys/class/dmi/id/chassis_serial",
    "sys/class/dmi/id/product_uuid",
    "etc/machine-id",
)
_HOST_NAMES = ("proc/sys/kernel/hostname", "etc/hostname")
# The kernel's other files have fixed words, which a host may happen to be called.
_MAY_NAME_HOST = ("etc/", "commands/", "proc/swaps", INDEX)
# "0" and "None" are serial numbers, too, to makers who do not care.
_SHORTEST_SERIAL = 6


@dataclass(frozen=True, kw_only=True)
class Recording:
    """Where a tree was written, of which *device*, the names in it, sorted, and its bytes."""

    path: Path
    device: str
    names: tuple[str, ...]
    size_bytes: int


def record(machine: Machine, path: Path) -> Recording:
    """
    Record *machine* into the new folder *path*, or a tar file if it ends in .tar.gz or .tgz.

    UsageError if *path* exists, DeviceError if the machine says nothing at all.
    """
    if path.exists() or path.is_symlink():
        raise UsageError(
            f"{path}: exists, and a recording overwrites nothing", hint="name another with -o"
        )
    secrets = _Secrets(machine)
    tree = dict(_gathered(machine, secrets))
    if not any(name.startswith(("proc/", "sys/")) for name in tree):
        raise DeviceError(f"{machine.root}: holds none of the files of a machine")
    device, board = this_device(machine), board_model(machine)
    index = {
        "format": FORMAT,
        "made_by": __version__,
        "device": device,
        "board": secrets.removed(INDEX, board.encode()).decode(errors="replace") if board else None,
        "emulated": emulation(machine),
        "removed": list(REMOVED),
    }
    tree[INDEX] = json_bytes(index)
    if path.name.endswith(_PACKED):
        write_file(path, _packed(tree, path.name.partition(".t")[0] or "tree"))
    else:
        with new_folder(path) as folder, storage(path):
            for name, data in tree.items():
                place = folder / name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
    return Recording(
        path=path,
        device=device,
        names=tuple(sorted(tree)),
        size_bytes=sum(map(len, tree.values())),
    )


def _gathered(machine: Machine, secrets: "_Secrets") -> Iterator[tuple[str, bytes]]:
    """(name in the tree, scrubbed bytes) of all that the machine says."""
    names = dict.fromkeys(name for pattern in FILES for name in machine.glob(pattern))
    for name in list(names)[:_MOST_FILES]:
        data = _bytes(machine.path(name))
        if data is not None:
            yield name, secrets.removed(name, _shortened(name, data))
    for argv in COMMANDS:
        said = machine.run(argv)
        if said is not None:
            name = command_file(argv)
            yield name, secrets.removed(name, said.encode()[:_MOST_BYTES])


def _bytes(path: Path) -> bytes | None:
    # Sensors vanish, refuse and time out; what cannot be read is absent in the tree, too.
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            return file.read(_MOST_BYTES)
    except OSError:
        return None


# Of these only the lines that begin so: the others count interrupts or tell of this process.
_LINES = {"proc/stat": b"cpu", "proc/self/status": b"Cpus_allowed_list"}


def _shortened(name: str, data: bytes) -> bytes:
    if name not in _LINES:
        return data
    return b"".join(line for line in data.splitlines(True) if line.startswith(_LINES[name]))


class _Secrets:
    """What names this one machine, and how it is taken out of what the machine says."""

    def __init__(self, machine: Machine) -> None:
        serials = {machine.line(name) for name in _SERIALS}
        serials |= set(re.findall(r"(?m)^Serial\s*: *(\S+)", machine.text("proc/cpuinfo") or ""))
        hosts = {machine.line(name) for name in _HOST_NAMES}
        if machine.is_live:
            hosts.add(os.uname().nodename)
        self._serials = _word({s for s in serials if s and len(s) >= _SHORTEST_SERIAL})
        self._hosts = _word({h for h in hosts if h})

    def removed(self, name: str, data: bytes) -> bytes:
        """The content *data* of *name* without them."""
        data = _SERIAL_LINE.sub(b"", data)
        data = _MAC.sub(b"00:00:00:00:00:00", data)
        data = _HOME.sub(b"/home/removed", data)
        data = self._serials.sub(b"removed", data)
        return self._hosts.sub(b"removed", data) if name.startswith(_MAY_NAME_HOST) else data


def _word(words: set[str]) -> re.Pattern[bytes]:
    """Any of *words*, but not as a part of a longer one."""
    texts = sorted((re.escape(word.encode(errors="replace")) for word in words), reverse=True)
    any_of = b"|".join(texts) or rb"(?!)"
    return re.compile(rb"(?i)(?<![\w-])(?:" + any_of + rb")(?![\w-])")


def _packed(tree: dict[str, bytes], top: str) -> bytes:
    """A .tar.gz of *tree* below *top*; equal trees give equal bytes, and name no user."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0, filename="") as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in sorted(tree):
            entry = tarfile.TarInfo(f"{top}/{name}")
            entry.size = len(tree[name])
            archive.addfile(entry, io.BytesIO(tree[name]))
    return buffer.getvalue()

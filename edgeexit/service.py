"""
`edgeexit run` as a service of systemd: the unit's text, and putting it in its place.

Callers see Service, install, uninstall and state. Hidden here: how systemd quotes, which limits
a unit of the system and one of a user can have, and which of them a camera needs lifted. The
unit is started again for ever, with growing waits where systemd knows them: a board in the field
has nobody to type "reset-failed".
"""

import os
import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeexit.errors import DeviceError, UsageError, printable
from edgeexit.files import write_file

# Longer than a camera is tried before `run` gives up by itself, with a reason.
WATCHDOG_S = 180
SYSTEM_FOLDER = Path("/etc/systemd/system")
# Below these a sandboxed service sees nothing unless it is named.
_HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]+")
_NAME = re.compile(r"[A-Za-z0-9_.+-]{1,64}")
# The first systemd that knows RestartSteps.
_KNOWS_STEPS = 254


@dataclass(frozen=True, kw_only=True)
class Service:
    """
    What a unit is made from.

    *arguments* is the whole command, its program an absolute path. *home* is the board's folder.
    A unit of the system runs as *user*, or as one that exists only while it runs (None); with
    *is_user_unit* it is the calling user's own, which needs no root and has fewer limits.
    *devices* are the device classes that the source needs, *readable* what must be seen below
    hidden folders. *cores* is how many the board has.
    """

    name: str
    arguments: tuple[str, ...]
    home: Path
    user: str | None = None
    is_user_unit: bool = False
    devices: tuple[str, ...] = ()
    readable: tuple[Path, ...] = ()
    has_network: bool = False
    memory_max: str = "75%"
    cores: int = 4
    systemd: int = 252

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(
                f"service {self.name[:60]!r}: not a name that a unit can have",
                hint="letters, digits and _ . + - are allowed",
            )
        if not re.fullmatch(r"\d{1,3}%|\d{1,9}[KMG]?", self.memory_max):
            raise UsageError(f"memory limit {self.memory_max!r}: expected 75% or 400M")

    @property
    def unit(self) -> str:
        """The unit's name."""
        return f"edgeexit-{self.name}.service"

    def text(self) -> str:
        """The unit file. UsageError for text that no unit can hold."""
        parts = [
            f"# Written by edgeexit; your own changes: systemctl edit {self.unit}",
            *("[Unit]", f"Description=edgeexit run: {_value(self.name)}"),
            "# Start it again for ever. If the board should restart instead: StartLimitBurst=10,",
            "# StartLimitIntervalSec=10min and StartLimitAction=reboot.",
            "StartLimitIntervalSec=0",
            *("", "[Service]", *self._process()),
            *("", "# What it may take", *self._limits()),
            *("", "# What it may do", *(self._fence() if self.is_user_unit else self._walls())),
            *("", "[Install]"),
            f"WantedBy={'default' if self.is_user_unit else 'multi-user'}.target",
        ]
        return "\n".join(parts) + "\n"

    def _process(self) -> list[str]:
        lines = [
            "# Ready once the self-test passed; fed after each answered frame, never by a timer.",
            "Type=notify",
            "NotifyAccess=main",
            f"WatchdogSec={WATCHDOG_S}",
            f"ExecStart={' '.join(map(_argument, self.arguments))}",
            f"Environment={_quoted(f'EDGEEXIT_HOME={self.home}')}",
            # Arenas of glibc, one a thread, are what grows on a small board.
            "Environment=MALLOC_ARENA_MAX=2 PYTHONDONTWRITEBYTECODE=1",
            "Restart=always",
            "RestartSec=2",
        ]
        if self.systemd >= _KNOWS_STEPS:
            lines += ["RestartSteps=6", "RestartMaxDelaySec=60"]
        # 143: SIGTERM came and the frame under way was answered.
        lines += ["SuccessExitStatus=143", "KillMode=mixed", "TimeoutStartSec=120"]
        return [*lines, "TimeoutStopSec=10"]

    def _limits(self) -> list[str]:
        return [
            f"MemoryMax={self.memory_max}",
            "MemorySwapMax=0",
            "TasksMax=64",
            # One core is left for whoever logs in to look.
            f"CPUQuota={100 * max(1, self.cores - 1)}%",
            "LimitCORE=0",
            "LimitNOFILE=256",
        ]

    def _fence(self) -> list[str]:
        """What a user's own service manager can forbid without root."""
        # libcamera hears of cameras through netlink.
        families = "AF_UNIX" + " AF_NETLINK" * bool(self.devices)
        families += " AF_INET AF_INET6" * self.has_network
        return [
            "NoNewPrivileges=yes",
            f"RestrictAddressFamilies={families}",
            "RestrictRealtime=yes",
            "RestrictSUIDSGID=yes",
            "LockPersonality=yes",
            "SystemCallArchitectures=native",
            "SystemCallFilter=@system-service",
            "SystemCallFilter=~@privileged",
            "SystemCallErrorNumber=EPERM",
            "UMask=0077",
        ]

    def _walls(self) -> list[str]:
        who = ["DynamicUser=yes"] if self.user is None else [f"User={_value(self.user)}"]
        lines = [*who, *self._fence()]
        lines += ["CapabilityBoundingSet=", "AmbientCapabilities=", "RemoveIPC=yes"]
        lines += ["RestrictNamespaces=yes", "KeyringMode=private"]
        lines += ["ProtectSystem=strict", "ProtectHome=tmpfs", "PrivateTmp=yes"]
        lines += [f"BindReadOnlyPaths={_bound(path)}" for path in self._seen()]
        lines += ["ProtectProc=invisible", "ProtectKernelTunables=yes", "ProtectKernelModules=yes"]
        lines += ["ProtectKernelLogs=yes", "ProtectControlGroups=yes", "ProtectClock=yes"]
        lines += ["ProtectHostname=yes"]
        if not self.has_network:
            lines += ["PrivateNetwork=yes", "IPAddressDeny=any"]
        if self.devices:
            lines += ["DevicePolicy=closed", "SupplementaryGroups=video"]
            return lines + [f"DeviceAllow={device} rw" for device in self.devices]
        return [*lines, "PrivateDevices=yes", "MemoryDenyWriteExecute=yes"]

    def _seen(self) -> list[Path]:
        found = dict.fromkeys([self.home, *self.readable])
        return [path for path in found if str(path).startswith(tuple(f"{h}/" for h in _HIDDEN))]


def _value(text: str) -> str:
    if not text.isprintable():
        raise UsageError(f"a unit cannot hold {text!r}")
    return text.replace("%", "%%")


def _quoted(word: str, *, dollar: str = "$") -> str:
    """*word* as one word of an assignment, as systemd.syntax(7) reads it."""
    if _PLAIN.fullmatch(word):
        return word
    escaped = _value(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", dollar)
    return f'"{escaped}"'


def _argument(word: str) -> str:
    """The same of a command line, where a dollar has to be doubled."""
    return _quoted(word, dollar="$$")


def _bound(path: Path) -> str:
    if set(str(path)) & set(':"\\'):
        raise UsageError(f"{path}: a unit cannot name a path with a colon, quote or backslash")
    # The minus: a path that is not there must not keep the service from starting.
    return _quoted(f"-{path}")


# ---------------------------------------------------------------- systemd


def folder_of(is_user_unit: bool) -> Path:
    """Where the unit files of the system, or of this user, are."""
    if not is_user_unit:
        return SYSTEM_FOLDER
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def systemd_version() -> int:
    """The version of this machine's systemd. DeviceError if it has none."""
    said = _systemctl(["--version"], is_user_unit=False)
    match = re.match(r"systemd (\d+)", said)
    return int(match[1]) if match else 0


def install(service: Service, *, start: bool = True) -> Path:
    """
    Write *service*'s unit, enable it and (re)start it; the path of the unit.

    UsageError without the right to; DeviceError if no systemd runs (nothing is written then), or
    if it refuses: the unit stays, to be looked at.
    """
    folder = folder_of(service.is_user_unit)
    _check_right(folder, service.is_user_unit)
    _check_manager(service.is_user_unit)
    path = folder / service.unit
    write_file(path, service.text().encode(), mode=0o644)
    _systemctl(["daemon-reload"], service.is_user_unit)
    _systemctl(["enable", service.unit], service.is_user_unit)
    if start:
        _systemctl(["restart", service.unit], service.is_user_unit)
    return path


def uninstall(unit: str, *, is_user_unit: bool) -> bool:
    """Stop, disable and remove *unit*; False if there was none."""
    path = folder_of(is_user_unit) / unit
    if not path.exists():
        return False
    _check_right(path.parent, is_user_unit)
    _check_manager(is_user_unit)
    _systemctl(["disable", "--now", unit], is_user_unit)
    path.unlink()
    _systemctl(["daemon-reload"], is_user_unit)
    return True


def installed(*, is_user_unit: bool) -> list[str]:
    """The names of the services that edgeexit has installed."""
    paths = sorted(folder_of(is_user_unit).glob("edgeexit-*.service"))
    return [path.stem.removeprefix("edgeexit-") for path in paths]


_FACTS = ("ActiveState", "SubState", "Result", "NRestarts", "StatusText", "ExecMainStatus")


def state(unit: str, *, is_user_unit: bool) -> dict[str, str]:
    """What systemd says of *unit*."""
    _check_manager(is_user_unit)
    said = _systemctl(["show", unit, f"--property={','.join(_FACTS)}"], is_user_unit)
    pairs = (line.partition("=") for line in said.splitlines())
    return {key: printable(value) for key, _, value in pairs if key in _FACTS}


def _check_right(folder: Path, is_user_unit: bool) -> None:
    if is_user_unit or os.access(folder, os.W_OK):
        return
    raise UsageError(
        f"{folder}: only root may change the system's services",
        hint="use sudo, or --user-unit for a service of your own",
    )


def _check_manager(is_user_unit: bool) -> None:
    """A systemctl may be there without a systemd that it could speak to: in a container, say."""
    try:
        _systemctl(["show", "--property=Version"], is_user_unit)
    except DeviceError as error:
        whose = "of this user " if is_user_unit else ""
        raise DeviceError(
            f"no systemd {whose}answers here: {error}",
            hint="log in over ssh as that user (not by su), or: loginctl enable-linger"
            if is_user_unit
            else "edgeexit run --app NAME SOURCE runs without one, until it is ended",
        ) from error


def _systemctl(words: Sequence[str], is_user_unit: bool) -> str:
    argv = ["systemctl", *(["--user"] if is_user_unit else []), *words]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, errors="replace", timeout=150, check=False
        )
    except FileNotFoundError as error:
        raise DeviceError("this machine has no systemd (no systemctl)") from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{shlex.join(argv)}: no answer for 150 s") from error
    if done.returncode:
        reason = printable(" ".join(done.stderr.split())[-500:]) or f"exit code {done.returncode}"
        unit = words[-1]
        raise DeviceError(
            f"{shlex.join(argv)}: {reason}",
            hint=f"{'journalctl --user' if is_user_unit else 'journalctl'} -n 20 -u {unit}"
            if unit.endswith(".service")
            else None,
        )
    return done.stdout

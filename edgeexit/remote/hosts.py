"""
The boards that one may name: hosts.toml, names on the command line, and pinned host keys.

Callers see Host, Hosts and chosen. Hidden here: the file's format and its limits, that comments
in it survive, and that two commands may change it at once.

Formats of hosts.toml: 1 (host, user, port, device, labels, host_key).
"""

import base64
import binascii
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table, read_bytes, read_toml, write_file
from edgeexit.locks import hold
from edgeexit.names import unknown

FORMAT = 1
ENVIRONMENT = "EDGEEXIT_HOSTS"
MAX_HOSTS = 10_000
MAX_FILE_BYTES = 4 << 20

# What may stand where: a name ends up in hints that people paste into a shell.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ADDRESS = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9._:%-]{0,252}")
_USER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+\\@-]{0,63}")


@dataclass(frozen=True, kw_only=True)
class Host:
    """
    One board: where it is and what it is.

    *address* may be an alias of the user's ssh config; what is None comes from there. *host_key*
    is "ALGORITHM BASE64" and, if there, the only key that this board may show.
    """

    name: str
    address: str
    user: str | None = None
    port: int | None = None
    device: str | None = None
    labels: tuple[str, ...] = ()
    host_key: str | None = None

    @property
    def destination(self) -> str:
        """What one types behind `ssh`: [user@]address, with the port as "-p PORT" before it."""
        where = f"{self.user}@{self.address}" if self.user else self.address
        return where if self.port is None else f"-p {self.port} {where}"


def fingerprint(host_key: str) -> str:
    """The fingerprint of "ALGORITHM BASE64" as OpenSSH shows it: SHA256 and 43 characters."""
    digest = hashlib.sha256(_key_blob(host_key)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _key_blob(host_key: str) -> bytes:
    algorithm, _, text = host_key.partition(" ")
    try:
        blob = base64.b64decode(text, validate=True)
        (length,) = struct.unpack_from(">I", blob)
    except (binascii.Error, ValueError, struct.error):
        raise ValueError("expected an algorithm and base64") from None
    if blob[4 : 4 + length] != algorithm.encode() or len(blob) <= 4 + length:
        raise ValueError("the algorithm and the key do not fit together")
    return blob


def parse_address(text: str) -> tuple[str | None, str, int | None]:
    """User, address and port of "[user@]address[:port]"; an IPv6 address with a port in [ ]."""
    user, _, rest = text.rpartition("@")
    address: str = rest
    port_text: str | None = None
    if match := re.fullmatch(r"\[([^\]]*)\](?::(.*))?", rest):
        address, port_text = match[1], match[2]
    elif rest.count(":") == 1:
        address, _, port_text = rest.partition(":")
    port = None if port_text is None else 0
    if port_text and port_text.isascii() and port_text.isdigit() and len(port_text) < 6:
        port = int(port_text)
    host = Host(name="host", address=address, user=user or None, port=port)
    checked(host)
    return host.user, host.address, host.port


def checked(host: Host, refuse: Callable[[str], Exception] = UsageError, where: str = "") -> Host:
    """*host*, unless something in it cannot be right: that is refused with *refuse*."""
    rules: list[tuple[str, str | None, re.Pattern[str]]] = [
        ("name", host.name, _NAME),
        ("host", host.address, _ADDRESS),
        ("user", host.user, _USER),
        ("device", host.device, _NAME),
        *(("label", label, _NAME) for label in host.labels),
    ]
    for what, text, rule in rules:
        if text is not None and not rule.fullmatch(text):
            # pi:raspberry@... would put a password on the screen and into logs.
            shown = "this" if what == "user" else repr(text[:80])
            raise refuse(f"{where}{what}: {shown} is no {_WORDS[what]}")
    if host.port is not None and not 0 < host.port < 65536:
        raise refuse(f"{where}port: expected 1 to 65535")
    if host.host_key is not None:
        try:
            _key_blob(host.host_key)
        except ValueError as error:
            raise refuse(f"{where}host_key: {error}") from None
    return host


_WORDS = {
    "name": "name (letters, digits, '.', '_' and '-'; at most 64)",
    "host": "host name or address",
    "user": "user name",
    "device": "device name",
    "label": "label (letters, digits, '.', '_' and '-'; at most 64)",
}


def _host(name: str, table: Table) -> Host:
    table.only("host", "user", "port", "device", "labels", "host_key")
    optional: dict[str, Any] = {
        key: table.get(key, kind)
        for key, kind in (("user", str), ("port", int), ("device", str), ("host_key", str))
        if key in table
    }
    labels = tuple(table.list_of("labels", str)) if "labels" in table else ()
    host = Host(name=name, address=table.get("host", str), labels=labels, **optional)
    return checked(host, BadFile, f"{table.where}: ")


@dataclass(frozen=True)
class Hosts:
    """The boards of one hosts.toml, in file order; add and remove change the file at once."""

    path: Path
    all: tuple[Host, ...]

    @classmethod
    def read(cls, path: Path | None = None) -> "Hosts":
        """
        The boards in *path*, or $EDGEEXIT_HOSTS, or ./hosts.toml; a file that is absent has none.

        BadFile names the key that is wrong.
        """
        path = path or Path(os.environ.get(ENVIRONMENT) or "hosts.toml")
        if not os.path.lexists(path):  # a link to nothing is no absent file
            return cls(path, ())
        read_bytes(path, limit_bytes=MAX_FILE_BYTES)
        document = read_toml(path)
        document.only("format", "hosts")
        document.expect_format(FORMAT)
        tables = document.table("hosts") if "hosts" in document else Table({}, document.where)
        if len(tables.values) > MAX_HOSTS:
            raise BadFile(f"{path}: {len(tables.values)} hosts, expected at most {MAX_HOSTS}")
        for name in tables.values:
            if not _NAME.fullmatch(name):  # before it stands in the place of an error
                raise BadFile(f"{path}: hosts: {name[:80]!r} is no {_WORDS['name']}")
        return cls(path, tuple(_host(name, tables.table(name)) for name in tables.values))

    def find(self, name: str) -> Host:
        """The board called *name*; UsageError with the nearest name if there is none."""
        for host in self.all:
            if host.name == name:
                return host
        error = unknown(name, [host.name for host in self.all], "host")
        is_address = "." in name or not _NAME.fullmatch(name)
        error.hint = error.hint or (
            "an address is named as USER@ADDRESS; edgeexit hosts list shows the names"
            if is_address
            else f"edgeexit hosts add {name} USER@ADDRESS; edgeexit hosts list shows the names"
        )
        raise error

    def labelled(self, labels: Iterable[str]) -> list[Host]:
        """The boards that carry any of *labels*; UsageError for a label that none carries."""
        wanted = set(labels)
        known = {label for host in self.all for label in host.labels}
        for label in sorted(wanted - known):
            error = unknown(label, known, "label")
            error.hint = error.hint or f"edgeexit hosts add NAME --label {label}"
            raise error
        return [host for host in self.all if wanted & set(host.labels)]

    def add(self, host: Host) -> "Hosts":
        """Write *host* into the file, in the place of the board of its name if there is one."""
        checked(host)
        return self._changed(lambda hosts: hosts.__setitem__(host.name, _entry(host)))

    def remove(self, name: str) -> "Hosts":
        """Take the board *name* out of the file; UsageError if there is none."""
        self.find(name)
        return self._changed(lambda hosts: hosts.pop(name, None))

    def _changed(self, change: Callable[[Any], object]) -> "Hosts":
        import tomlkit
        from tomlkit.exceptions import TOMLKitError

        # The file is read again under the lock: another command may have added a board.
        lock = self.path.with_name(f".{self.path.name}.lock")
        with hold(lock, str(self.path), wait=True):
            Hosts.read(self.path)
            try:
                text = read_bytes(self.path).decode() if self.path.exists() else ""
                document = tomlkit.parse(text)
                document.setdefault("format", FORMAT)
                if "hosts" not in document:
                    document["hosts"] = tomlkit.table(is_super_table=True)
                change(document["hosts"])
                data = tomlkit.dumps(document).encode()
            except TOMLKitError as error:
                raise BadFile(f"{self.path}: cannot be changed: {error}") from error
            write_file(self.path, data, mode=0o600)
            lock.unlink(missing_ok=True)
        return Hosts.read(self.path)


def _entry(host: Host) -> Any:
    import tomlkit

    entry = tomlkit.table()
    entry["host"] = host.address
    for key in ("user", "port", "device", "labels", "host_key"):
        value = getattr(host, key)
        if value not in (None, ()):
            entry[key] = list(value) if key == "labels" else value
    return entry


def chosen(names: Sequence[str], labels: Sequence[str], hosts: Hosts | None = None) -> list[Host]:
    """
    The boards called *names* and those that carry any of *labels*, each once.

    A name may be "user@host[:port]", which need not be in *hosts* (default: Hosts.read()); the
    key that is pinned there for this very address counts all the same.
    """
    hosts = hosts or Hosts.read()
    found = [_ad_hoc(name, hosts) if "@" in name else hosts.find(name) for name in names]
    if labels:
        found += hosts.labelled(labels)
    if not found:
        raise UsageError(
            "no board named",
            hint="NAME or USER@ADDRESS (deploy and rollback: --host NAME), or --label LABEL",
        )
    return list({host.name: host for host in found}.values())


def _ad_hoc(text: str, hosts: Hosts) -> Host:
    user, address, port = parse_address(text)
    for host in hosts.all:
        if (host.user, host.address, host.port or 22) == (user, address, port or 22):
            return host
    return Host(name=text, address=address, user=user, port=port)

"""`edgeexit service`: let systemd keep `edgeexit run` going."""

import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.fleet import meant
from edgeexit.errors import DeviceError, UsageError, printable

if TYPE_CHECKING:
    from edgeexit.service import Service

# What to do where there is none.
_NONE = {
    "app": "edgeexit deploy BUNDLE --host ... brings one",
    "service": "edgeexit service install SOURCE makes one",
}
_APP = click.option("--app", metavar="NAME", help="the deployed app (default: the only one here)")
_USER = click.option(
    "--user-unit", is_flag=True, help="a service of your own: no root, less fenced"
)
_HOST = click.option("--host", metavar="HOST", help="do it on that board, over ssh")


@click.group("service", short_help="let systemd keep `run` going: install, status, uninstall")
def command() -> None:
    """
    Let systemd keep `edgeexit run` going on this board.

    \b
    sudo edgeexit service install camera:
    edgeexit service install --user-unit --app fashion watch:/srv/incoming
    edgeexit service show camera: -- --rate 5       # the unit's text, nothing is installed
    edgeexit service status
    sudo edgeexit service uninstall
    edgeexit service install --host rpi4 camera:    # over ssh, by sudo there

    The service answers by the app's current release and takes up a new one when it is deployed.
    It is ready once the release's self-test has passed, and started again if no frame is answered
    for three minutes. It can write nothing but its journal, and sees no network.
    """


def _making(function: Any) -> Any:
    options = [
        click.argument("source"),
        click.argument("options", nargs=-1, type=click.UNPROCESSED),
        _APP,
        _USER,
        click.option("--user", metavar="NAME", help="run as NAME (default: the releases' owner)"),
        click.option(
            "--memory-max",
            default="75%",
            show_default=True,
            metavar="SIZE",
            help="killed and started again above it: a share of the memory, or such as 400M",
        ),
        click.option("--network", is_flag=True, help="let a source of your own use the network"),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@command.command("install")
@_making
@_HOST
@click.option("--no-start", is_flag=True, help="only write and enable it")
def install(host: str | None, no_start: bool, **making: Any) -> None:
    """
    Install the service for a live SOURCE; what follows -- are options of `run`.

    Installing again replaces it. The service shows and logs changes of the class alone: a card
    wears out by being written to.
    """
    if host is not None:
        _remotely(host, ["install", *_words(making, no_start)], making["user_unit"])
        return
    from edgeexit import service

    made = _make(**making)
    if not made.is_user_unit and os.geteuid() != 0:
        raise UsageError(
            "only root may change the system's services; --user-unit needs no root",
            hint=_sudo(made, _words(making, no_start)),
        )
    path = service.install(made, start=not no_start)
    click.echo(f"{path}: {'enabled' if no_start else 'running'}")
    for line in _advice(made):
        click.echo(f"Note: {line}", err=True)


@command.command("show")
@_making
def show(**making: Any) -> None:
    """Print the unit that install would write."""
    click.echo(_make(**making).text(), nl=False)


@command.command("uninstall")
@_APP
@_USER
@_HOST
def uninstall(app: str | None, user_unit: bool, host: str | None) -> None:
    """Stop the service and remove its unit; releases stay."""
    if host is not None:
        _remotely(
            host, ["uninstall", *(["--app", app] if app else []), *_flag(user_unit)], user_unit
        )
        return
    from edgeexit import service

    unit = _unit(app, user_unit)
    if service.uninstall(unit, is_user_unit=user_unit):
        click.echo(f"{unit}: removed")
    else:
        click.echo(f"{unit}: was not installed")


@command.command("status")
@_APP
@_USER
@_HOST
@click.option("--json", "as_json", is_flag=True, help="one JSON object")
def status(app: str | None, user_unit: bool, host: str | None, as_json: bool) -> None:
    """Say how the service is. The exit code is 5 if it does not run."""
    if host is not None:
        words = ["status", *(["--app", app] if app else []), *_flag(user_unit)]
        _remotely(host, words + ["--json"] * as_json, is_user_unit=True)
        return
    from edgeexit import service

    unit = _unit(app, user_unit)
    facts = service.state(unit, is_user_unit=user_unit)
    if as_json:
        from edgeexit.cli.answers import echo_json

        echo_json({"unit": unit, **facts})
    else:
        click.echo(f"{unit}: {facts.get('ActiveState', '?')} ({facts.get('SubState', '?')})")
        if facts.get("StatusText"):
            click.echo(f"  {facts['StatusText']}")
        click.echo(f"  started again {facts.get('NRestarts', '?')} times")
    if facts.get("ActiveState") != "active":
        journal = "journalctl --user" if user_unit else "journalctl"
        active, last = facts.get("ActiveState", "unknown"), facts.get("Result", "?")
        raise DeviceError(
            f"{unit}: {active}, last result {last}",
            hint=f"{journal} -n 20 -u {unit}",
        )


def _flag(user_unit: bool) -> list[str]:
    return ["--user-unit"] * user_unit


def _words(making: dict[str, Any], no_start: bool) -> list[str]:
    """The words that say the same again, on a board or after sudo."""
    words = [word for key in ("app", "user") if making[key] for word in (f"--{key}", making[key])]
    words += ["--memory-max", making["memory_max"], *_flag(making["user_unit"])]
    words += ["--network"] * making["network"] + ["--no-start"] * no_start
    options = making["options"]
    return [*words, making["source"], *(["--", *options] if options else [])]


def _home() -> Path:
    """The board's folder; after sudo that of whoever called it."""
    from edgeexit.names import HOME, board_home

    caller = os.environ.get("SUDO_USER")
    if caller and os.geteuid() == 0 and not os.environ.get(HOME):
        import pwd

        try:
            home = Path(pwd.getpwnam(caller).pw_dir) / board_home().relative_to(Path.home())
        except (KeyError, ValueError):
            return board_home()
        return home if home.is_dir() else board_home()
    return board_home()


def _app(app: str | None, found: Sequence[str], what: str) -> str:
    from edgeexit.names import unknown

    if app is not None:
        if app not in found:
            raise unknown(app, found, what)
        return app
    if len(found) != 1:
        listed = ", ".join(map(printable, found)) or "none"
        raise UsageError(
            f"{len(found)} {what}s here ({listed}), expected one",
            hint="name one with --app" if found else _NONE[what],
        )
    return found[0]


def _unit(app: str | None, user_unit: bool) -> str:
    from edgeexit.service import installed

    name = app or _app(None, installed(is_user_unit=user_unit), "service")
    return f"edgeexit-{name}.service"


def _make(
    source: str,
    options: tuple[str, ...],
    app: str | None,
    user_unit: bool,
    user: str | None,
    memory_max: str,
    network: bool,
) -> "Service":
    from edgeexit.cli.run import command as run
    from edgeexit.releases import applications
    from edgeexit.service import Service, systemd_version
    from edgeexit.sources import FOREIGN, SOURCES, find

    home = _home().resolve()
    name = _app(app, applications(home), "app")
    found = find(source)
    if found is None:
        raise UsageError(
            f"{printable(source)}: not a live source",
            hint="such as camera: or v4l2:/dev/video0 or watch:/srv/incoming",
        )
    kind = None if found.kind == FOREIGN else SOURCES[found.kind]
    readable = [*map(Path, (sys.prefix, sys.base_prefix)), Path(__file__).resolve().parents[1]]
    if kind is not None and kind.is_path:
        path = Path(found.address)
        if not path.is_absolute():
            raise UsageError(
                f"{found}: a service starts in no folder of yours, expected a whole path",
                hint=f"{found.kind}:{path.resolve()}",
            )
        readable.append(path)
    words = [*options, "--app", name, *([] if "--changes" in options else ["--changes"]), source]
    # What `run` would refuse is refused now.
    run.make_context("edgeexit run", list(words))
    return Service(
        name=name,
        arguments=(*_program(home), "run", *words),
        home=home,
        user=None if user_unit else user or _owner(home),
        is_user_unit=user_unit,
        devices=() if kind is None else kind.devices,
        readable=tuple(readable),
        has_network=network,
        memory_max=memory_max,
        cores=os.cpu_count() or 1,
        systemd=systemd_version(),
    )


def _program(home: Path) -> list[str]:
    """The edgeexit of the board's folder, which setup exchanges, else this one."""
    program = home / "env" / "current" / "bin" / "edgeexit"
    return [str(program)] if program.exists() else [sys.executable, "-P", "-m", "edgeexit"]


def _owner(home: Path) -> str | None:
    """Who the releases belong to; None (a user made up for the service) if that is root."""
    import pwd

    number = home.stat().st_uid
    try:
        return pwd.getpwuid(number).pw_name if number else None
    except KeyError as error:
        raise UsageError(
            f"{home}: belongs to user {number}, who has no name", hint="--user"
        ) from error


def _sudo(made: "Service", words: list[str]) -> str:
    program = [*_program(made.home), "service", "install", *words]
    return shlex.join(["sudo", "env", f"EDGEEXIT_HOME={made.home}", *program])


def _advice(made: "Service") -> list[str]:
    told = []
    controllers = Path("/sys/fs/cgroup/cgroup.controllers")
    if controllers.exists() and "memory" not in controllers.read_text().split():
        told.append(
            "this kernel enforces no memory limit: on a Raspberry Pi put cgroup_enable=memory "
            "into cmdline.txt and reboot"
        )
    if made.is_user_unit:
        told.append("it ends when you log out, unless: loginctl enable-linger")
    return told


def _remotely(host: str, words: list[str], is_user_unit: bool) -> None:
    """Let the board's own edgeexit do it; its exit code is ours."""
    import asyncio

    (board,) = meant([host])
    from edgeexit.remote.service import ask

    done = asyncio.run(ask(board, words, as_root=not is_user_unit))
    for text, is_error in ((done.out.decode(errors="replace"), False), (done.err, True)):
        for line in text.splitlines():
            said = re.sub("^Error: ", f"Error: {board.name}: ", line)
            click.echo(printable(said), err=is_error)
    if done.code:
        click.get_current_context().exit(done.code)

"""`edgeexit profile`: measure what each exit costs on this machine, or on a board over ssh."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import StatusLine, finite, percentage, require_remote
from edgeexit.errors import DeviceError, Disturbed, EdgeExitError, UsageError

if TYPE_CHECKING:
    from edgeexit.blocks import Mode
    from edgeexit.bundle import Bundle
    from edgeexit.collect import Limits
    from edgeexit.profile import Profile
    from edgeexit.remote.hosts import Host


def _core_list(
    context: click.Context, option: click.Parameter, value: str | None
) -> tuple[int, ...] | None:
    """Callback of an option: "0,4-7" is (0, 4, 5, 6, 7)."""
    if value is None:
        return None
    found: set[int] = set()
    for part in value.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal() or len(part) > 9:
            raise click.BadParameter(f"{value!r} is no list such as 0,4-7.", context, option)
        found |= set(range(int(first), int(last or first) + 1))
    if not found:
        raise click.BadParameter(f"{value!r} names no core.", context, option)
    return tuple(sorted(found))


@click.command("profile", short_help="measure latency and energy of each exit on a device")
@click.argument("bundle_path", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--device", "device_name", help="a name from devices/ (default: what this machine is)"
)
@click.option(
    "--host",
    "host_name",
    metavar="NAME|USER@ADDRESS",
    help="measure on this board over ssh (default: this machine if it is the device, else the "
    "one of hosts.toml that is)",
)
@click.option(
    "--mode",
    default="burst",
    show_default=True,
    help="burst: back to back from a cold start; sustained: heated to a steady state first; "
    "paced: one input at a time, see --rate",
)
@click.option("--rate", type=float, callback=finite, help="inputs a second in paced mode (5)")
@click.option("--threads", type=click.IntRange(1, 256), help="default: the device's, else 1")
@click.option(
    "--cores",
    callback=_core_list,
    help="cores to use, such as 4-7 or 0,2 (default: the device's, else any)",
)
@click.option("--processes", default=10, show_default=True, type=int, help="fresh ones, at least 5")
@click.option(
    "--precision",
    default="1%",
    show_default=True,
    callback=percentage,
    help="half-width of the intervals at which enough is measured",
)
@click.option(
    "--time-cap",
    "time_cap_s",
    default=50.0,
    show_default=True,
    type=float,
    callback=finite,
    help="seconds of timing at most, all processes together",
)
@click.option(
    "--meter",
    default="none",
    show_default=True,
    help="also joules: KIND[:ADDR][,shunt=0.1], command:'...', ssh:HOST/..., see edgeexit meters",
)
@click.option("--resume", is_flag=True, help="go on with a measurement that was stopped")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="default: ./profile-DEVICE.json"
)
@click.option("--all", "everything", is_flag=True, help="a row for every set of kept exits too")
@click.option("--html", type=click.Path(path_type=Path), help="also one page with plots")
@click.option("--json", "as_json", is_flag=True, help="print the profile instead of a table")
def command(
    bundle_path: Path | None,
    device_name: str | None,
    host_name: str | None,
    mode: str,
    rate: float | None,
    threads: int | None,
    cores: tuple[int, ...] | None,
    processes: int,
    precision: float,
    time_cap_s: float,
    meter: str,
    resume: bool,
    output: Path | None,
    everything: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """
    Measure what it costs to leave at each exit of BUNDLE (default: the only one here).

    \b
    edgeexit profile --device host
    edgeexit profile --device rpi4         # here, or over ssh: see edgeexit hosts
    edgeexit profile --host pi@raspberrypi.local
    edgeexit profile fashion.edgeexit --mode sustained --threads 4 --time-cap 300
    edgeexit profile --mode paced --rate 5 --meter ina219:0x40,shunt=0.1
    edgeexit profile --resume              # after Ctrl-C, a crash, a full disk, a broken link

    Every set of exits that could pay is cut out and timed through the call that `run` makes;
    raw values go to ./profile-DEVICE.json with a verdict: clean, or what was wrong. Leave the
    machine alone meanwhile. --meter names one of the machine that is measured. Exit code 6: not
    clean; 5: the board, the link or the meter failed (if the meter, latencies are kept).
    """
    from edgeexit import names, page, report
    from edgeexit.blocks import CLEAN, PACED, Mode
    from edgeexit.bundle import load_bundle
    from edgeexit.collect import Limits
    from edgeexit.files import check_output, json_bytes, write_file

    host = board_for(device_name, host_name)
    bundle = load_bundle(bundle_path or names.only_bundle_here())

    def path_for(device: str) -> Path:
        """Where the profile of *device* goes; refused if it, or the page, cannot go there."""
        path = output or Path(f"profile-{device}.json")
        for target in filter(None, (path, html)):
            check_output(target, *bundle.path.iterdir())
        if html is not None and html.resolve() == path.resolve():
            raise UsageError(
                f"{html}: is where the profile goes", hint="name another file with --html"
            )
        return path

    order = _Order(
        bundle=bundle,
        device=device_name,
        mode=Mode(name=mode, rate_hz=5.0 if mode == PACED and rate is None else rate),
        threads=threads,
        cores=cores,
        limits=Limits(processes=processes, precision=precision, time_cap_s=time_cap_s),
        meter=None if meter == "none" else meter,
        resume=resume,
        path_for=path_for,
    )
    path, found = _measured_here(order) if host is None else _measured_there(order, host)
    if html is not None:
        write_file(html, page.profile_page(found).encode())
    if as_json:
        click.echo(json_bytes(found.to_document()), nl=False)
    else:
        click.echo(report.profile_table(found, everything=everything))
    click.echo(f"wrote {path}", err=True)
    if found.energy_failure is not None:
        raise DeviceError(found.energy_failure, hint="the latencies are kept; see: edgeexit meters")
    if found.verdict.status != CLEAN:
        kinds = ", ".join(dict.fromkeys(reason.kind for reason in found.verdict.reasons))
        status = found.verdict.status
        hint = _HINTS[status].format(there="" if host is None else f" --host {host.name}")
        raise Disturbed(f"{path}: {status.upper()} ({kinds})", hint=hint)


_HINTS = {
    "disturbed": "edgeexit doctor{there} tells what can be mended; then measure again",
    "not converged": "give it more time, such as --time-cap 300, or ask for less with --precision",
    "emulated": "measure on the board itself",
}


@dataclass(frozen=True, kw_only=True)
class _Order:
    """What shall be measured; where None stands, the device says. *path_for* as in command."""

    bundle: "Bundle"
    device: str | None
    mode: "Mode"
    threads: int | None
    cores: tuple[int, ...] | None
    limits: "Limits"
    meter: str | None
    resume: bool
    path_for: Callable[[str], Path]


def board_for(device_name: str | None, host_name: str | None) -> "Host | None":
    """
    The host to measure on: *host_name*, or the one of hosts.toml that is a *device_name*.

    None for this machine: where nothing is named, or it is that device. UsageError if several
    hosts are such boards, DeviceError if none is.
    """
    from edgeexit import device, instrument
    from edgeexit.remote.hosts import Hosts, chosen

    if host_name is not None:
        return chosen([host_name], [])[0]
    if device_name is None:
        return None
    try:
        instrument.check_device(device_name)
    except DeviceError as error:
        kind, hosts = device.find_device(device_name), Hosts.read()
        found = [host for host in hosts.all if host.device == kind.name]
        if not found:
            error.hint = (
                f"to do it over ssh: edgeexit hosts add NAME USER@ADDRESS --device {kind.name}"
            )
            raise
    else:
        return None
    if len(found) == 1:
        return found[0]
    names = ", ".join(host.name for host in found)
    raise UsageError(
        f"device {kind.name!r}: {len(found)} hosts in {hosts.path} are such boards: {names}",
        hint=f"name one of them, such as --host {found[0].name}",
    )


def _measured_here(order: _Order) -> "tuple[Path, Profile]":
    from edgeexit import children, device, instrument, report
    from edgeexit.errors import StorageError

    asked = order.device or device.this_device()
    kind = device.find_device(asked)
    path = order.path_for(kind.name)
    book = path.with_name(f"{path.name}.part")
    _warn_of(children.running("edgeexit.timing"), "")
    try:
        with StatusLine() as line:
            found = instrument.measure(
                order.bundle,
                asked,
                mode=order.mode,
                threads=order.threads or kind.threads,
                cores=kind.pin if order.cores is None else order.cores,
                limits=order.limits,
                meter=order.meter,
                notebook=book,
                resume=order.resume,
                on_step=(lambda step: line.show(report.live_line(step))) if line.is_shown else None,
                save=lambda profile: profile.save(path),
            )
    except (KeyboardInterrupt, DeviceError, StorageError):
        # Ctrl-C, a process that died or a full disk stopped what had begun.
        if book.is_file():
            click.echo(f"{book}: kept; the same command with --resume goes on", err=True)
        raise
    return path, found


def _measured_there(order: _Order, host: "Host") -> "tuple[Path, Profile]":
    import asyncio

    from edgeexit import report

    require_remote("measuring on a board")
    from edgeexit.remote import profiling

    began = False
    path = Path()

    def met(board: profiling.Board) -> None:
        nonlocal path
        path = order.path_for(board.device)
        _warn_of(board.measuring, f"{host.name}: ")

    try:
        with StatusLine() as line:

            def step(progress: Any) -> None:
                nonlocal began
                began = True
                line.show(f"{host.name}: {report.live_line(progress)}")

            def sent(done: int, total: int) -> None:
                line.show(f"{host.name}: {done / 1e6:.1f} of {total / 1e6:.1f} MB are there")

            found = asyncio.run(
                profiling.measure(
                    host,
                    order.bundle,
                    order.device,
                    mode=order.mode,
                    threads=order.threads,
                    cores=order.cores,
                    limits=order.limits,
                    meter=order.meter,
                    resume=order.resume,
                    save=lambda profile: profile.save(path),
                    on_board=met,
                    on_bytes=sent,
                    on_step=step,
                )
            )
    except (KeyboardInterrupt, EdgeExitError):
        if began:
            click.echo(f"{host.name}: keeps it; the same command with --resume goes on", err=True)
        raise
    return path, found


def _warn_of(rivals: list[int], where: str) -> None:
    if rivals:
        click.echo(
            f"warning: {where}process {rivals[0]} is measuring, too: each will disturb the other",
            err=True,
        )

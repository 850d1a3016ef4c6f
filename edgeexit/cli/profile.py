"""`edgeexit profile`: measure what each exit costs on this machine."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from edgeexit.cli import finite, percentage


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
    edgeexit profile fashion.edgeexit --mode sustained --threads 4 --time-cap 300
    edgeexit profile --mode paced --rate 5 --meter ina219:0x40,shunt=0.1
    edgeexit profile --resume              # after Ctrl-C, a crash or a full disk

    Every set of exits that could pay is cut out and timed through the call that `run` makes;
    raw values go to ./profile-DEVICE.json with a verdict: clean, or what was wrong. Leave the
    machine alone meanwhile. Exit code 6: not clean; 5: the meter failed (latencies are kept).
    """
    from edgeexit import device, instrument, names, page, report
    from edgeexit.blocks import CLEAN, PACED, Mode
    from edgeexit.bundle import load_bundle
    from edgeexit.collect import Limits
    from edgeexit.errors import DeviceError, Disturbed, UsageError
    from edgeexit.files import check_output, json_bytes, write_file

    asked = device_name or device.this_device()
    name, kind = instrument.check_device(asked), device.find_device(asked)
    bundle = load_bundle(bundle_path or names.only_bundle_here())
    path = output or Path(f"profile-{name}.json")
    for target in filter(None, (path, html)):
        check_output(target, *bundle.path.iterdir())
    if html is not None and html.resolve() == path.resolve():
        raise UsageError(f"{html}: is where the profile goes", hint="name another file with --html")
    limits = Limits(processes=processes, precision=precision, time_cap_s=time_cap_s)
    if mode == PACED and rate is None:
        rate = 5.0
    book = path.with_name(f"{path.name}.part")
    rivals = instrument.measuring_now()
    if rivals:
        click.echo(
            f"warning: process {rivals[0]} is measuring, too: each will disturb the other", err=True
        )
    with _live(report.live_line) as show, _resumable(book):
        found = instrument.measure(
            bundle,
            asked,
            mode=Mode(name=mode, rate_hz=rate),
            threads=threads or kind.threads,
            cores=kind.pin if cores is None else cores,
            limits=limits,
            meter=None if meter == "none" else meter,
            notebook=book,
            resume=resume,
            on_step=show,
            save=lambda profile: profile.save(path),
        )
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
        raise Disturbed(f"{path}: {status.upper()} ({kinds})", hint=_HINTS[status])


@contextmanager
def _resumable(book: Path) -> Iterator[None]:
    """Say how to go on when Ctrl-C, a process that died or a full disk stops what has begun."""
    from edgeexit.errors import DeviceError, StorageError

    try:
        yield
    except (KeyboardInterrupt, DeviceError, StorageError):
        if book.is_file():
            click.echo(f"{book}: kept; the same command with --resume goes on", err=True)
        raise


_HINTS = {
    "disturbed": "edgeexit doctor tells what can be mended; then measure again",
    "not converged": "give it more time, such as --time-cap 300, or ask for less with --precision",
    "emulated": "measure on the board itself",
}


class _live:  # noqa: N801
    """One line on the terminal that is written anew between rounds; silent elsewhere."""

    def __init__(self, line: Any) -> None:
        self._line = line
        self._is_shown = sys.stderr is not None and sys.stderr.isatty()
        self._width = 0

    def __enter__(self) -> Any:
        return self._show if self._is_shown else None

    def _show(self, progress: Any) -> None:
        text = self._line(progress)[: click.get_current_context().terminal_width or 110]
        click.echo("\r" + text.ljust(self._width), err=True, nl=False)
        self._width = len(text)

    def __exit__(self, *_: object) -> None:
        if self._width:
            click.echo("\r" + " " * self._width + "\r", err=True, nl=False)

"""`edgeexit attach`: a plain network goes in, one with untrained exits comes out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from edgeexit.cli import require_host
from edgeexit.cli.steps import Steps
from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeexit.host.attach import Row


@click.command("attach", short_help="give a plain network exits, and show where they can go")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--arch",
    metavar="MODULE:FACTORY",
    help="the code that builds the network; needed for a plain state_dict and foreign code",
)
@click.option("--at", metavar="NAME,NAME", help="exits behind these modules, as --list names them")
@click.option(
    "--exits",
    type=click.IntRange(min=1),
    help="how many exits to add before the final one, at equal shares of the MACs; default: 3",
)
@click.option(
    "--head",
    metavar="KIND",
    default="average",
    show_default=True,
    help="average: mean and one linear layer; pooled: maximum and mean in 4x4 places and one "
    "linear layer; convs: stride-2 convolutions and one linear layer",
)
@click.option(
    "--widths",
    metavar="N,N",
    multiple=True,
    help="channels of the stride-2 convolutions of the head convs: once for all exits, or once "
    "for each in the order of --at; default: down to 4x4 places, no wider than the map",
)
@click.option("--list", "is_list", is_flag=True, help="only show where exits can go")
@click.option(
    "--calibration",
    metavar="SET",
    help="what a plain state_dict does not say: its classes and preprocessing",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="default: MODEL-exits.pt")
@click.option("--again", is_flag=True, help="replace what is there")
@click.option("--measure/--no-measure", default=True, help="time the exits as int8 on this machine")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def command(
    model: Path,
    arch: str | None,
    at: str | None,
    exits: int | None,
    head: str,
    widths: tuple[str, ...],
    is_list: bool,
    calibration: str | None,
    out: Path | None,
    again: bool,
    measure: bool,
    as_json: bool,
) -> None:
    """
    Give the plain network in MODEL (a checkpoint or state_dict) new, untrained exits.

    The network itself stays as it is; `edgeexit train` teaches the exits afterwards. A model
    file with --arch runs that module's code.

    \b
    edgeexit attach model.pt --list                     # where exits can go, and what it costs
    edgeexit attach model.pt                            # three exits -> model-exits.pt
    edgeexit attach model.pt --at layer1,layer3 --head pooled
    edgeexit attach model.pt --at layer1,layer3 --head convs --widths 32,64 --widths 64
    edgeexit attach weights.pth --arch my_net:make --calibration my-set
    """
    require_host("attach")
    from edgeexit.files import json_bytes
    from edgeexit.host.attach import attach_exits, list_taps

    steps = Steps()
    given: dict[str, Any] = {
        "arch": arch,
        "calibration": calibration,
        "is_measured": measure,
        "on_step": steps,
    }
    if is_list:
        source = click.get_current_context().get_parameter_source("head")
        if at or exits or widths or out or source is not ParameterSource.DEFAULT:
            unused = "--at, --exits, --head, --widths and -o"
            raise UsageError(f"--list only shows places: leave out {unused}")
        rows = list_taps(model, **given)
        if as_json:
            click.echo(json_bytes({"taps": [row.to_document() for row in rows]}), nl=False)
            return
        click.echo(_table(rows))
        return
    names = None if at is None else [name.strip() for name in at.split(",")]
    channels = [_channels(text) for text in widths] or None
    result = attach_exits(
        model, out, at=names, exits=exits, head=head, widths=channels, again=again, **given
    )
    flag = f" --arch {arch}" if arch else ""
    following = f"edgeexit train {result.path}{flag} --regime frozen --data FOLDER"
    if as_json:
        document = {
            "path": str(result.path),
            "head": result.head,
            "exits": [row.to_document() for row in result.rows],
            "next": following,
        }
        click.echo(json_bytes(document), nl=False)
        return
    click.echo(f"{printable(str(result.path))}: {len(result.rows)} exits, heads: {result.head}\n")
    click.echo(_table(result.rows))
    click.echo(f"\nThe new exits know nothing yet. Next:\n  {printable(following)}")


def _channels(text: str) -> list[int]:
    """The numbers in "32,64"."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--widths {text}: expected whole numbers, as in 32,64") from None


def _table(rows: "Sequence[Row]") -> str:
    total = rows[-1].latency_ms
    lines: list[tuple[str, ...]] = [
        ("exit", "at", "output", "MACs", "of all", "head", "int8 ms", "of all")
    ]
    for row in rows:
        shape = "" if row.shape is None else "x".join(map(str, row.shape[1:]))
        ms = row.latency_ms
        lines.append(
            (
                row.exit or "-",
                row.at or "(the network's own)",
                shape,
                f"{row.macs:,}",
                f"{row.share:.1%}",
                "" if row.head_macs is None else f"{row.head_macs:,}",
                "-" if ms is None else f"{ms[0]:.3f} [{ms[1]:.3f}, {ms[2]:.3f}]",
                "-" if ms is None or total is None else f"{ms[0] / total[0]:.0%}",
            )
        )
    if all(row.latency_ms is None for row in rows):
        lines = [line[:6] for line in lines]
    if not any(row.exit for row in rows[:-1]):  # a list: nothing has been attached
        lines = [(*line[1:5], *line[6:]) for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    left = {"exit", "at", "output"}
    heads = lines[0]
    return "\n".join(
        "  ".join(
            f"{cell:<{width}}" if head in left else f"{cell:>{width}}"
            for cell, width, head in zip(map(printable, line), widths, heads, strict=True)
        ).rstrip()
        for line in lines
    )

"""edgeexit search: try many ways to prune, and show which ones no other beats."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import finite, require_host
from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from edgeexit.host.study.folder import Row
    from edgeexit.host.study.search import Found

HEADS = ("trial", "kept exits", "best exit", "final exit", "chain", "MMACs", "ms", "ratio", "what")


def _show_space(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value:
        return
    from edgeexit.host.study.space import DEFAULT

    click.echo(DEFAULT, nl=False)
    ctx.exit()


@click.command("search", short_help="try many ways to prune, and keep the best ones")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("space", metavar="[SPACE.toml]", type=click.Path(path_type=Path), required=False)
@click.option(
    "--trials", type=click.IntRange(1, 100_000), default=20, show_default=True, help="in all"
)
@click.option(
    "--jobs", type=click.IntRange(1, 256), default=1, show_default=True, help="trials at a time"
)
@click.option(
    "--data",
    metavar="FOLDER|FILE.npz",
    help="training samples; default: what the network was trained on",
)
@click.option(
    "--calibration",
    metavar="SET|FOLDER|FILE.npz",
    help="samples for activation ranges; default: the set that the checkpoint names",
)
@click.option("--arch", metavar="MODULE:FACTORY", help="the code of a network of your own")
@click.option(
    "--max-drop",
    metavar="POINTS",
    type=click.FloatRange(0, 100),
    callback=finite,
    help="look for the fastest network that loses no more than this; else for every trade-off",
)
@click.option("-o", "--out", type=click.Path(path_type=Path), help="default: ./NAME-search")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
@click.option(
    "--show-space",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_space,
    help="print the default SPACE.toml",
)
def command(
    model: Path,
    space: Path | None,
    trials: int,
    jobs: int,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Search for smaller, faster forms of the checkpoint MODEL.

    What is varied says SPACE.toml (docs/formats.md, "Search space"). Every trial prunes, trains,
    converts to int8 and races against the unpruned network on this machine; held-out training
    samples judge. Ctrl-C stops; the same command goes on, also in several terminals at once.

    \b
    edgeexit search model.pt --trials 30 --jobs 2
    edgeexit search model.pt space.toml --max-drop 0.5 -o small/
    """
    require_host("search")
    _require_optuna()
    from edgeexit.files import json_bytes
    from edgeexit.host.study.search import search
    from edgeexit.host.study.space import read_space

    def on_row(row: "Row", count: int) -> None:
        click.echo(_line(row, count, trials), err=True)

    target = Path(f"{model.stem}-search") if out is None else out
    try:
        found = search(
            model, read_space(space), target, trials=trials, jobs=jobs, on_row=on_row, **options
        )
    except KeyboardInterrupt as error:
        click.echo("\nStopped. The same command goes on from there.", err=True)
        raise click.Abort from error
    if as_json:
        click.echo(json_bytes(_document(found)), nl=False)
        return
    click.echo(_text(found))


def _require_optuna() -> None:
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise UsageError(
            "search needs optuna; not installed here", hint='pip install "edgeexit[torch]"'
        )


def _line(row: "Row", ended: int, trials: int) -> str:
    head = f"trial {row.number} ({ended}/{max(trials, ended)})"
    if row.result is None or row.result.refused is not None or row.state != "done":
        return f"{head}  {row.state}: {printable(row.reason)}  {printable(row.what)}"
    cells = _cells(row)
    names = ("best exit", "final exit", "chain", "MMACs", "ratio")
    figures = "  ".join(f"{n} {cells[HEADS.index(n)]}" for n in names if cells[HEADS.index(n)])
    return f"{head}  {figures}  {printable(row.what)}"


def _cells(row: "Row") -> list[str]:
    """A row under HEADS."""
    result = row.result
    assert result is not None
    best, chain = result.best, result.chain
    ratio, ms = best.ratio, best.ms
    return [
        "-" if row.number < 0 else str(row.number),
        "+".join(map(printable, row.kept)),
        f"{best.accuracy:.2%} ({printable(best.name)})",
        f"{result.final.accuracy:.2%}",
        "" if chain is None else f"{chain.accuracy:.2%}",
        f"{result.macs / 1e6:.3f}",
        _pair(ms, None if chain is None else chain.ms),
        _pair(None if ratio is None else ratio[0], None if chain is None else chain.ratio),
        printable(row.what),
    ]


def _pair(best: float | None, chain: float | None) -> str:
    if best is None or chain is None:
        return ""
    return f"{best:.3f} / {chain:.3f}"


def _text(found: "Found") -> str:
    from edgeexit.report import text_table

    before = found.before.result
    assert before is not None
    rows = [_cells(row) for row in (found.before, *found.front)]
    shown = [k for k in range(len(HEADS)) if any(row[k] for row in rows)]
    aims = {
        "expected": "cost: mean latency of the chain, its accuracy beside it",
        "best-exit": "cost: latency to leave at the best exit, its accuracy beside it",
        "macs": "cost: MACs to leave at the best exit, its accuracy beside it",
    }
    counts = {
        state: sum(row.state == state for row in found.rows)
        for state in ("done", "refused", "failed", "running")
    }
    lines = [
        text_table([HEADS[k] for k in shown], [[row[k] for k in shown] for row in rows]),
        "",
        f"{len(found.front)} of {counts['done']} trials are beaten by no other "
        f"({aims[found.cost]}); {counts['refused']} refused, {counts['failed']} failed.",
        f"Right of {before.samples} held-out training samples"
        + (", as float." if before.yardstick_ms is None else ", as int8."),
    ]
    if before.yardstick_ms is not None:
        lines += [
            "ms, ratio: to leave at the best exit / mean of the chain; ratios are to the "
            "unpruned network's final exit alone,",
            f"raced in the same run, 1 thread, on {printable(before.cpu or 'this machine')}.",
        ]
    if found.gains < len(found.front):
        lines.append(
            f"The unpruned network itself is no less accurate and costs no more than "
            f"{len(found.front) - found.gains} of them."
        )
    drop = 1.0 if found.max_drop is None else found.max_drop
    within = f"{drop:g} point{'' if drop == 1 else 's'}"
    if found.best is None:
        lines.append(f"No trial is within {within} of the unpruned network.")
    else:
        lines.append(
            f"Least cost within {within} of the unpruned: trial {found.best.number}, "
            f"{printable(str(found.best.checkpoint))}"
        )
    return "\n".join(lines)


def _document(found: "Found") -> dict[str, Any]:
    return {
        "folder": str(found.folder),
        "cost": found.cost,
        "max_drop": found.max_drop,
        "before": _plain(found.before),
        "front": [row.number for row in found.front],
        "best": None if found.best is None else found.best.number,
        "trials": [_plain(row) for row in found.rows],
    }


def _plain(row: "Row") -> dict[str, Any]:
    return {
        "trial": row.number,
        "state": row.state,
        "reason": row.reason,
        "values": dict(row.values),
        "kept": list(row.kept),
        "job": None if row.folder is None else str(row.folder),
        "checkpoint": None if row.checkpoint is None else str(row.checkpoint),
        "result": None if row.result is None else row.result.to_document(),
    }

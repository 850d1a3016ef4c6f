"""`edgeexit train`: a recipe or a checkpoint goes in, a trained checkpoint comes out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import require_host
from edgeexit.cli.fitting import Bars
from edgeexit.errors import EdgeExitError, UsageError, printable

if TYPE_CHECKING:
    from edgeexit.host.assess import Assessment
    from edgeexit.host.comparison import Comparison


@click.command("train", short_help="train a multi-exit network, from a recipe or further")
@click.argument("source", metavar="RECIPE.toml|MODEL.pt", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path),
    help="default: RECIPE with .pt, or MODEL-trained.pt",
)
@click.option(
    "--arch",
    metavar="MODULE:FACTORY",
    help="the code that builds the network, if it is code of your own",
)
@click.option("--again", is_flag=True, help="train anew, replacing what is there")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
@click.option(
    "--regime",
    help="joint (default), frozen (heads only), mixed, or prototypes (heads out of class means)",
)
@click.option(
    "--data", metavar="PATH", help="class folders, an .npz, or MNIST-like; default: as before"
)
@click.option("--epochs", type=click.IntRange(1, 100_000), help="default: by the regime")
@click.option(
    "--learning-rate",
    type=click.FloatRange(1e-9, 100),
    help="its peak; default: by the regime",
)
@click.option("--batch", type=click.IntRange(2, 65_536), help="default: 128")
@click.option(
    "--holdout",
    type=click.IntRange(1, 10_000_000),
    help="samples that judge the epochs; default: as before, else a tenth",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="default: 0")
@click.option("--flip/--no-flip", default=None, help="mirror pictures at random")
@click.option("--shift", type=click.IntRange(0, 1024), help="move pictures by up to so many pixels")
@click.option(
    "--calibration",
    metavar="SET",
    help="the calibration set that goes with the network; default: the one it names",
)
@click.option(
    "--recover",
    is_flag=True,
    help="only bring back what int8 costs: even out channels, correct biases, fine-tune as int8",
)
@click.option("--measure/--no-measure", default=True, help="show accuracy and latency as int8")
def command(
    source: Path,
    out: Path | None,
    arch: str | None,
    again: bool,
    as_json: bool,
    recover: bool,
    measure: bool,
    **said: Any,
) -> None:
    """
    Train the network that a recipe (TOML) describes, or a checkpoint further.

    The epoch that is best on held-out samples is kept. Ctrl-C stops; the same command goes on
    after the last whole epoch. The options below --json are for a checkpoint; a recipe says all
    this itself.

    \b
    edgeexit train examples/fashion.toml                        # -> examples/fashion.pt
    edgeexit train model.pt --regime frozen --data pictures/    # -> model-trained.pt
    edgeexit train model.pt --recover                           # -> model-recovered.pt
    """
    import json

    require_host("train")
    if recover:
        _recover(source, out, arch, again, as_json, said)
        return
    from edgeexit.host.train import Choices, train

    display = Bars()
    try:
        result = train(
            source, out, arch=arch, again=again, choices=Choices(**said), on_step=display
        )
    except KeyboardInterrupt as error:
        click.echo(f"\nStopped after {display.whole_epochs} whole epochs.", err=True)
        click.echo("The same command goes on from there.", err=True)
        raise click.Abort from error
    finally:
        display.close()
    worth = _worth(source, result.path, arch, said) if measure else None
    if as_json:
        document = result.to_document()
        if worth is not None:
            document["worth"] = worth.to_document()
        click.echo(json.dumps(document, indent=1))
        return
    if result.was_done:
        click.echo(f"{result.path} is there already, made by this recipe; --again trains anew.")
    epochs = f"epoch {result.best_epoch} of {result.epochs}" if result.epochs else "class means"
    click.echo(f"{result.path}: {epochs}")
    if worth is not None:
        click.echo(worth.text())
    else:
        for name, accuracy in result.accuracies.items():
            click.echo(f"  {name:<12} {100 * accuracy:6.2f} % of the held-out samples right")
    flag = f" --arch {arch}" if arch else ""
    click.echo(f"Next: edgeexit convert {printable(str(result.path))}{flag}")


def _worth(
    source: Path, result: Path, arch: str | None, said: dict[str, Any]
) -> "Assessment | Comparison | None":
    """What was trained, as int8; beside what it was if it was a checkpoint before."""
    from edgeexit.cli.fitting import assessed, compared
    from edgeexit.host.recipe import DataPart

    # The checkpoint that was written remembers its samples and how they were split.
    given = (DataPart(path=said["data"]), said["calibration"], arch)
    try:
        if source.suffix == ".toml":
            return assessed(result, *given)
        return compared(source, result, *given)
    except EdgeExitError as error:
        click.echo(f"Not measured: {error}", err=True)
        return None


def _recover(
    source: Path,
    out: Path | None,
    arch: str | None,
    again: bool,
    as_json: bool,
    said: dict[str, Any],
) -> None:
    import json
    from dataclasses import replace

    from edgeexit.host.recipe import DataPart
    from edgeexit.host.recover import FINE_TUNE, recover_checkpoint

    if source.suffix == ".toml" or said["regime"] is not None:
        raise UsageError(
            "--recover: expected a checkpoint and no --regime",
            hint="train first; then: edgeexit train MODEL.pt --recover",
        )
    numbers = ("epochs", "learning_rate", "batch", "seed")
    bars = Bars()
    try:
        result = recover_checkpoint(
            source,
            source.with_name(f"{source.stem}-recovered.pt") if out is None else out,
            arch=arch,
            again=again,
            data=DataPart(path=said["data"], holdout=said["holdout"]),
            part=replace(FINE_TUNE, **{k: said[k] for k in numbers if said[k] is not None}),
            moves={k: said[k] for k in ("flip", "shift") if said[k] is not None},
            calibration=said["calibration"],
            on_attempt=lambda name: click.echo(f"int8, {name} ...", err=True),
            on_step=bars,
        )
    finally:
        bars.close()
    if as_json:
        click.echo(json.dumps(result.to_document(), indent=1))
        return
    click.echo(f"{result.path}\n{result.recovery.text()}")

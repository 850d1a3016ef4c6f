"""`edgeexit train`: a recipe or a checkpoint goes in, a trained checkpoint comes out."""

from pathlib import Path
from typing import Any

import click

from edgeexit.cli import require_host
from edgeexit.cli.fitting import Bars


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
@click.option("--regime", help="joint (default), frozen (heads only) or mixed")
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
def command(
    source: Path,
    out: Path | None,
    arch: str | None,
    again: bool,
    as_json: bool,
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
    """
    import json

    require_host("train")
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
    if as_json:
        click.echo(json.dumps(result.to_document(), indent=1))
        return
    if result.was_done:
        click.echo(f"{result.path} is there already, made by this recipe; --again trains anew.")
    click.echo(f"{result.path}: epoch {result.best_epoch} of {result.epochs}")
    for name, accuracy in result.accuracies.items():
        click.echo(f"  {name:<12} {100 * accuracy:6.2f} % of the held-out samples right")

"""`edgeexit train`: a recipe goes in, a checkpoint comes out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli import progress

if TYPE_CHECKING:
    from edgeexit.host.train import Step


@click.command("train", short_help="train a multi-exit network from a recipe")
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="default: RECIPE with .pt")
@click.option("--arch", help="package.module:factory, if the recipe names code of your own")
@click.option("--again", is_flag=True, help="train anew, replacing what is there")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
def command(recipe: Path, out: Path | None, arch: str | None, again: bool, as_json: bool) -> None:
    """
    Train the network that RECIPE (TOML) describes, all exits together.

    The epoch that is best on held-out samples is kept. Ctrl-C stops; the same command goes on
    after the last whole epoch.

    \b
    edgeexit train examples/fashion.toml     # -> examples/fashion.pt
    """
    import json

    from edgeexit.host.train import train

    display = _Display()
    try:
        result = train(recipe, out, arch=arch, again=again, on_step=display)
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


class _Display:
    """One bar for each epoch, one line when it ends."""

    def __init__(self) -> None:
        self._bar: Any = None
        self.whole_epochs = 0

    def __call__(self, step: "Step") -> None:
        if step.accuracies is not None:
            self.close()
            self.whole_epochs = step.epoch
            figures = "  ".join(f"{k} {100 * v:.2f} %" for k, v in step.accuracies.items())
            best = "  (best so far)" if step.is_best else ""
            click.echo(f"epoch {step.epoch}/{step.epochs}  {figures}{best}", err=True)
            return
        if self._bar is None:
            label = f"epoch {step.epoch}/{step.epochs}"
            self._bar = progress(length=step.batches, label=label, show_pos=True)
            self._bar.__enter__()
        self._bar.update(1)

    def close(self) -> None:
        """End the bar under way, if there is one."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

"""edgeexit prune: a trained network goes in, a smaller one comes out, exits still attached."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.fitting import Bars
from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from edgeexit.host.prune.engine import Progress, Pruning
    from edgeexit.host.prune.recipe import PruneRecipe

AXES = ("criterion", "block_criterion", "allocator", "schedule", "scope", "selector", "phase")


def _list(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    """Print every name that the options take."""
    if not value:
        return
    from edgeexit.host.prune.composition import known_names

    for what, names in known_names().items():
        click.echo(f"{what:<16} {', '.join(names)}")
    ctx.exit()


@click.command("prune", short_help="make a trained network smaller, its exits attached")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), help="default: MODEL-pruned.pt, beside it"
)
@click.option("--recipe", type=click.Path(path_type=Path), help="a TOML that says everything")
@click.option("--method", help="a named composition to start from; see --list")
@click.option("--criterion", help="how filters or weights are scored")
@click.option("--block-criterion", help="how blocks are scored")
@click.option("--allocator", help="how many go from which layer")
@click.option("--schedule", help="how much goes in which step")
@click.option("--steps", type=click.IntRange(1, 1000), help="of the schedule")
@click.option("--scope", help="all, backbone-then-exits, or exits-only")
@click.option("--selector", help="filters, blocks, everything, or random-child")
@click.option("--phase", help="a training before removal")
@click.option(
    "--target",
    metavar="WHAT=SHARE",
    help="the share that remains: macs=0.5, params=0.3, latency=0.6, weights=0.1",
)
@click.option("--round-to", type=click.IntRange(1, 1024), help="widths become multiples of it")
@click.option(
    "--data",
    metavar="FOLDER|FILE.npz",
    help="training samples; default: what the network was trained on",
)
@click.option("--epochs", type=click.IntRange(0), help="of fine-tuning after each step (1)")
@click.option("--final-epochs", type=click.IntRange(0), help="after the last step (5)")
@click.option("--learning-rate", type=float, help="of both (0.05)")
@click.option("--batch", type=click.IntRange(2, 65_536), help="samples of one step (128)")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="of every random choice (0)")
@click.option(
    "--calibration",
    metavar="NAME|FOLDER|FILE.npz",
    help="samples for the int8 comparison; default: the set that the checkpoint names",
)
@click.option("--arch", metavar="MODULE:FACTORY", help="the code of a network of your own")
@click.option("--again", is_flag=True, help="prune anew, replacing what is there")
@click.option("--measure/--no-measure", default=True, help="int8 latencies before and after")
@click.option("--json", "as_json", is_flag=True, help="print the result as one JSON document")
@click.option(
    "--list",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list,
    help="print the names of all methods and axes",
)
def command(
    model: Path,
    out: Path | None,
    arch: str | None,
    again: bool,
    calibration: str | None,
    measure: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """
    Prune the checkpoint MODEL and fine-tune it; exits stay attached.

    A method is a composition of axes; every axis can be named by itself. Filters and blocks are
    removed physically; the target weights=SHARE only zeroes single weights, which makes a file
    smaller when compressed and nothing faster. Ctrl-C stops; the same command goes on.

    \b
    edgeexit prune model.pt --method everything --target macs=0.5
    edgeexit prune model.pt --criterion taylor --allocator global --target latency=0.6
    edgeexit prune model.pt --recipe examples/fashion-pruned.toml -o small.pt
    edgeexit prune --list
    """
    import json

    recipe = _recipe(options)
    target = model.with_name(f"{model.stem}-pruned.pt") if out is None else out
    result = pruning(model, recipe, target, arch, calibration, again)
    comparison = None
    if measure:
        from edgeexit.cli.fitting import compared

        comparison = compared(model, result.path, recipe.data, calibration, arch)
    if as_json:
        document = result.to_document()
        document["comparison"] = None if comparison is None else comparison.to_document()
        click.echo(json.dumps(document, indent=1))
        return
    if result.was_done:
        click.echo(f"{result.path} is there already, made by this pruning; --again does it anew.")
    before, after = result.macs
    weights = result.parameters
    click.echo(
        f"{result.path}: {after / 1e6:.2f} of {before / 1e6:.2f} MMAC, "
        f"{weights[1]:,} of {weights[0]:,} parameters"
    )
    last = result.history[-1] if result.history else {}
    if "weights_gone" in last:
        click.echo(
            f"{last['weights_gone']:.1%} of the single weights are zero, compressed "
            f"{last['compressed_bytes']:,} bytes: a smaller download, no lower latency."
        )
    worse = _worse(result)
    if worse:
        click.echo(worse)
    click.echo(comparison.text() if comparison is not None else _accuracies(result.accuracies))
    flag = f" --arch {arch}" if arch else ""
    click.echo(f"Next: edgeexit convert {printable(str(result.path))}{flag}")


def pruning(
    model: Path,
    recipe: "PruneRecipe",
    out: Path,
    arch: str | None,
    calibration: str | None,
    again: bool = False,
) -> "Pruning":
    """Prune *model* into *out* and show how it goes; Ctrl-C says how to go on."""
    from edgeexit.host.prune.engine import prune
    from edgeexit.host.purpose import Purpose

    purpose = Purpose.of_samples(calibration)
    display = _Display()
    try:
        return prune(model, recipe, out, arch=arch, purpose=purpose, again=again, on_step=display)
    except KeyboardInterrupt as error:
        click.echo(f"\nStopped after {display.steps} whole steps.", err=True)
        click.echo("The same command goes on from there.", err=True)
        raise click.Abort from error
    finally:
        display.close()


def _worse(result: "Pruning") -> str | None:
    """A line if training made a network worse than the removal before it had left it."""
    steps = [
        row["step"]
        for row in result.history
        if all(
            row["accuracies"][name] < accuracy
            for name, accuracy in row.get("removed_accuracies", row["accuracies"]).items()
        )
    ]
    if not steps:
        return None
    listed = ", ".join(map(str, steps))
    return (
        f"After step {listed} the fine-tuning left every exit worse than the removal had: try a "
        "lower --learning-rate, more epochs or more samples."
    )


def _accuracies(accuracies: tuple[dict[str, float], dict[str, float]]) -> str:
    lines = ["held-out samples right, float:"]
    for name, value in accuracies[0].items():
        lines.append(f"  {name:<12} {100 * value:6.2f} % -> {100 * accuracies[1][name]:6.2f} %")
    return "\n".join(lines)


def _recipe(options: dict[str, Any]) -> "PruneRecipe":
    """The recipe that the options describe; they change what --recipe says."""
    from edgeexit.host.prune.composition import Composition, Target
    from edgeexit.host.prune.methods import METHODS
    from edgeexit.host.prune.recipe import PruneRecipe, default_training, read_prune_recipe
    from edgeexit.host.recipe import DataPart
    from edgeexit.names import choose

    method, path = options["method"], options["recipe"]
    if path is not None and method is not None:
        raise UsageError(
            "--recipe and --method: found both, expected one", hint="a recipe may say method = ..."
        )
    if path is not None:
        recipe = read_prune_recipe(path)
    else:
        composition = choose(method, METHODS, "method") if method else Composition()
        recipe = PruneRecipe(
            where="prune",
            composition=composition,
            finetune=default_training(1),
            final=default_training(5),
        )
    changes = {key: options[key] for key in (*AXES, "steps", "round_to") if options[key]}
    if options["target"] is not None:
        changes["target"] = Target.parse(options["target"])
    recipe = replace(recipe, composition=replace(recipe.composition, **changes))
    if options["data"] is not None:
        recipe = replace(recipe, data=DataPart(path=options["data"]))
    if options["learning_rate"] is not None and not 1e-9 <= options["learning_rate"] <= 100:
        raise UsageError(
            f"--learning-rate: found {options['learning_rate']:g}, expected 1e-09 to 100"
        )
    for key, epochs in (("finetune", options["epochs"]), ("final", options["final_epochs"])):
        part = getattr(recipe, key)
        if epochs is not None:
            part = replace(part or default_training(1), epochs=epochs) if epochs else None
        if part is not None and options["learning_rate"] is not None:
            part = replace(part, learning_rate=options["learning_rate"])
        for name in ("seed", "batch"):
            if part is not None and options[name] is not None:
                part = replace(part, **{name: options[name]})
        recipe = replace(recipe, **{key: part})
    return recipe


class _Display:
    """A bar for each epoch, a line for each step."""

    def __init__(self) -> None:
        self._bars = Bars()
        self.steps = 0

    def __call__(self, progress: "Progress") -> None:
        if progress.fit is not None:
            is_final = progress.action == "final"
            self._bars(
                progress.fit, "final" if is_final else f"{_step(progress, 1)}  {progress.action}"
            )
        elif progress.row is not None:
            self.close()
            self.steps = progress.done
            click.echo(_line(progress), err=True)
        else:
            self.close()
            click.echo(f"{_step(progress, 1)}  {progress.action} ...", err=True)

    def close(self) -> None:
        """End the bar under way."""
        self._bars.close()


def _step(progress: "Progress", ahead: int) -> str:
    return f"step {progress.done + ahead}" + (f"/{progress.total}" if progress.total else "")


def _line(progress: "Progress") -> str:
    row = progress.row or {}
    done = [
        f"{word} {row[key]}"
        for key, word in (("block", "without"), ("filters", "filters -"))
        if row.get(key)
    ]
    if "weights_gone" in row:
        done.append(f"{row['weights_gone']:.1%} of the weights zero")
    removed = row["removed_accuracies"]
    exits = "  ".join(
        f"{k} {100 * removed[k]:.2f} -> {100 * v:.2f} %" for k, v in row["accuracies"].items()
    )
    what = ", ".join(done) or "nothing removed"
    return (
        f"{_step(progress, 0)}  {what}: {row['macs'] / 1e6:.2f} MMAC, "
        f"{row['parameters']:,} parameters  {exits}"
    )

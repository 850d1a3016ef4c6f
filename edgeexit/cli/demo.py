"""`edgeexit demo`: the main job on the shipped example."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from edgeexit.cli.steps import Steps
from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle
    from edgeexit.demo import Demo


@click.command("demo", short_help="profile, tune and run the shipped example")
@click.option(
    "--from-checkpoint",
    is_flag=True,
    help="convert the shipped checkpoint first (needs the host side and a checkout)",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="keep bundle, policy and profile in this folder (default: nothing is kept)",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object instead of tables")
def command(from_checkpoint: bool, output: Path | None, as_json: bool) -> None:
    """
    Do the whole job on the shipped Fashion-MNIST network and its pruned form, on this machine.

    \b
    edgeexit demo                          # shipped bundle: profile -> tune -> run
    edgeexit demo --from-checkpoint        # convert first
    edgeexit demo --json -o here/

    Measures every figure in this run; accuracies are of the `report` split, which nothing was
    chosen on.
    """
    import tempfile

    from edgeexit import demo

    if output is not None and output.exists() and (output.is_file() or any(output.iterdir())):
        raise UsageError(f"{output}: not an empty folder", hint="choose a new one")
    steps = Steps()
    with tempfile.TemporaryDirectory(prefix="edgeexit-demo-") as temporary:
        folder = output or Path(temporary)
        if from_checkpoint:
            bundles = _converted(folder, steps)
            found = demo.run_demo(*bundles, on_step=steps)
        else:
            names = (demo.BUNDLE, demo.PRUNED_BUNDLE)
            copies = [demo.copy_of_shipped_bundle(folder, name) for name in names]
            records = [demo.shipped_record(n) for n in (demo.RECORD, demo.PRUNED_RECORD)]
            found = demo.run_demo(
                copies[0], copies[1], logits=(records[0], records[1]), on_step=steps
            )
        if output is not None:
            profile = found.dense.profile
            profile.save(output / f"profile-{profile.device}.json")
            found.pruned.profile.save(output / f"profile-pruned-{profile.device}.json")
    if as_json:
        from edgeexit.files import json_bytes

        click.echo(json_bytes(found.to_document()), nl=False)
        return
    click.echo(_text(found))


def _converted(folder: Path, steps: Steps) -> "tuple[Bundle, Bundle]":
    from edgeexit import demo

    checkpoints = [demo.example(name) for name in ("fashion.pt", "fashion-pruned.pt")]
    try:
        import edgeexit.host.convert as road
    except ImportError as error:
        raise UsageError(
            f"--from-checkpoint needs the host side, which is not installed here: {error}",
            hint='pip install "edgeexit[torch]" (see README, "Install"), or leave the option out',
        ) from error
    dense = road.convert(checkpoints[0], folder / demo.BUNDLE, on_step=steps)
    pruned = road.convert(
        checkpoints[1],
        folder / demo.PRUNED_BUNDLE,
        on_step=lambda name, done: steps(f"pruned: {name}", done),
    )
    return dense, pruned


def _text(found: "Demo") -> str:
    from edgeexit import report

    pictures = report.text_table(
        ["picture", "answer", "confidence", "exit", "ms"],
        [
            [
                picture.path.name,
                picture.prediction.class_name
                + (
                    ""
                    if picture.prediction.class_name == picture.expected
                    else f" (is: {picture.expected})"
                ),
                f"{picture.prediction.confidence:.3f}",
                picture.prediction.exit_name,
                report.milliseconds(picture.prediction.latency_ns / 1e6),
            ]
            for picture in found.pictures
        ],
    )
    race, best = found.race, found.best_static_exit
    full, pruned = found.dense.full.accuracy, found.pruned
    rows = [
        ["full network, every exit computed", f"{full:.2%}", "full"],
        ["same network without exits", f"{full:.2%}", "static"],
        [f"best static network ({best} alone)", f"{found.best_static.accuracy:.2%}", "best_static"],
        ["early exit, this policy", f"{found.dense.tuned.accuracy:.2%}", "policy"],
        ["pruned network, every exit", f"{pruned.full.accuracy:.2%}", "pruned_full"],
        ["pruned, early exit, its policy", f"{pruned.tuned.accuracy:.2%}", "pruned_policy"],
    ]
    rivals = report.text_table(
        ["", "accuracy", "mean ms", "policy faster by", "pruned faster by"],
        [
            [
                name,
                accuracy,
                report.milliseconds(race.latency_ms(key)),
                "" if "policy" in key else f"{race.speed_up('policy', key):.2f}x",
                "" if key == "pruned_policy" else f"{race.speed_up('pruned_policy', key):.2f}x",
            ]
            for name, accuracy, key in rows
        ],
    )
    return "\n\n".join(
        [
            report.profile_table(found.dense.profile),
            report.policy_table(found.dense.policy, found.dense.worth),
            f"The pruned network's profile: {printable(str(found.pruned.profile.verdict))}",
            pictures,
            f"On {found.dense.tuned.samples} report samples, all six taking turns in one process:",
            rivals,
        ]
    )

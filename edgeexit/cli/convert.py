"""edgeexit convert: a model file goes in, a bundle of segments comes out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.steps import Steps
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle

FEW = 0.9  # of an exit's answers are the float network's: fewer deserve a warning


@click.command("convert", short_help="turn a model file into a bundle of int8 segments")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), help="default: ./NAME.edgeexit")
@click.option(
    "--calibration",
    metavar="NAME|FOLDER|FILE.npz",
    help="samples for activation ranges; default: the set that the file names",
)
@click.option(
    "--prune",
    metavar="RECIPE.toml",
    type=click.Path(path_type=Path),
    help="prune first, into MODEL-pruned.pt beside it (see edgeexit prune)",
)
@click.option(
    "--scheme",
    metavar="NAME|auto|FILE.json|MODULE:ATTRIBUTE",
    help="int8 (default), float, dynamic, float16, int8-matmul, int16x8; auto: the fastest of "
    "them; or a quantizer's recipe",
)
@click.option("--device", "device_name", help="with --scheme auto: measure on this kind of board")
@click.option(
    "--host",
    "host_name",
    metavar="NAME|USER@ADDRESS",
    help="with --scheme auto: measure on this board over ssh (default: this machine)",
)
@click.option(
    "--arch",
    metavar="MODULE:FACTORY",
    help="the code that builds the network; needed for a plain state_dict and foreign code",
)
@click.option(
    "--exits",
    metavar="NAME,NAME",
    help="outputs or inner tensors to answer at, earliest first; default: all outputs",
)
@click.option(
    "--labels",
    metavar="FILE.txt",
    type=click.Path(path_type=Path),
    help="class names, one a line, where the file has none",
)
@click.option(
    "--preprocess",
    metavar="FILE.toml",
    type=click.Path(path_type=Path),
    help="how samples become inputs, where the file does not say",
)
@click.option("--via", metavar="ROAD", help="of a .pt: the road by onnx2tf or tensorflow")
@click.option("--trust-pickle", is_flag=True, help="allow files that run code when opened")
@click.option("--allow-external-data", is_flag=True, help="read weights in files beside MODEL")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def command(
    model: Path,
    out: Path | None,
    calibration: str | None,
    prune: Path | None,
    scheme: str | None,
    device_name: str | None,
    host_name: str | None,
    arch: str | None,
    exits: str | None,
    labels: Path | None,
    preprocess: Path | None,
    via: str | None,
    trust_pickle: bool,
    allow_external_data: bool,
    as_json: bool,
) -> None:
    """
    Turn the model file MODEL into a bundle of segments, one per exit.

    Each step is checked on real samples: the lowered network against the framework that it
    comes from, the chain of segments against the uncut network. A model file with --arch runs
    that module's code; a .pt2, TorchScript or Keras file with --trust-pickle its own.

    \b
    edgeexit convert model.pt                            # -> ./model.edgeexit
    edgeexit convert model.pt --calibration pictures/    # class subfolders
    edgeexit convert model.pt --scheme float -o reference.edgeexit
    edgeexit convert vit.pt --scheme auto                # the fastest on this machine
    edgeexit convert vit.pt --scheme auto --device rpi4  # on a board, see edgeexit hosts
    edgeexit convert model.pt --scheme recipe.json       # of ai-edge-quantizer
    edgeexit convert model.pt --prune smaller.toml       # prune on the way
    edgeexit convert net.tflite --exits map1,map2,final --calibration SET
    edgeexit convert net.keras --calibration SET         # or a SavedModel's folder
    edgeexit convert net.pt2 --trust-pickle --calibration SET

    Schemes: int8, all of it (for convolutional networks); int8-matmul, layers with weights alone
    (for transformers); dynamic, int8 weights, the rest made int8 while it runs; float16, weights
    alone; int16x8, accurate and very slow. auto measures all but the last and takes the fastest
    that at every exit gives 99 % of the float network's answers, or loses at most half a point of
    accuracy, on samples that gave no activation ranges; of those within 3 % the smallest.
    """
    from edgeexit.cli.schemes import measuring
    from edgeexit.host.convert import convert
    from edgeexit.host.schemes import WARNINGS

    measure = measuring(scheme, device_name, host_name)
    if scheme in WARNINGS:
        click.echo(f"warning: {scheme}: {WARNINGS[scheme]}", err=True)
    if prune is not None:
        out = Path(f"{model.stem}.edgeexit") if out is None else out
        model = _pruned(model, prune, arch, calibration)
    steps = Steps()
    bundle = convert(
        model,
        out,
        calibration,
        scheme,
        arch,
        steps,
        exits=() if exits is None else _listed(exits),
        labels=labels,
        preprocess=preprocess,
        via=via,
        is_pickle_trusted=trust_pickle,
        is_external_allowed=allow_external_data,
        measure=measure,
    )
    click.echo(_document(bundle, steps) if as_json else _table(bundle, steps))
    for exit, share in bundle.provenance["float_agreement"].items():
        if share < FEW:
            click.echo(
                f"warning: exit {exit}: in {bundle.scheme} only {share:.1%} of its answers are the "
                "float network's: try --scheme float, and other calibration samples",
                err=True,
            )


def _listed(exits: str) -> list[str]:
    names = [name.strip() for name in exits.split(",")]
    if not all(names):
        raise UsageError(
            f"--exits {exits!r}: a name is empty", hint="for all outputs leave --exits out"
        )
    return names


def _pruned(model: Path, recipe: Path, arch: str | None, calibration: str | None) -> Path:
    from edgeexit.cli import require_host
    from edgeexit.cli.prune import pruning
    from edgeexit.host.prune.recipe import read_prune_recipe

    require_host("convert --prune")
    out = model.with_name(f"{model.stem}-pruned.pt")
    return pruning(model, read_prune_recipe(recipe), out, arch, calibration).path


def _peak_bytes() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _document(bundle: "Bundle", steps: Steps) -> str:
    from edgeexit.files import json_bytes

    document: dict[str, Any] = {
        "bundle": str(bundle.path),
        "digest": bundle.digest,
        "scheme": bundle.scheme,
        "exits": list(bundle.exits),
        "segment_bytes": [segment.bytes for segment in bundle.segments],
        "model_bytes": bundle.files[bundle.model].bytes,
        "ranges": bundle.provenance["ranges"],
        "float_agreement": bundle.provenance["float_agreement"],
        "outside_xnnpack": bundle.provenance["outside_xnnpack"],
        "scheme_choice": bundle.provenance.get("scheme_choice"),
        "transposes": bundle.provenance["transposes"],
        "heads": bundle.provenance.get("heads"),
        "seconds": {name: round(value, 3) for name, value in steps.seconds.items()},
        "peak_bytes": _peak_bytes(),
    }
    return json_bytes(document).decode().rstrip()


def _table(bundle: "Bundle", steps: Steps) -> str:
    from edgeexit.cli.schemes import choice_table

    origin = bundle.provenance
    lines = [
        f"{bundle.path}: {len(bundle.exits)} exits, {len(bundle.class_names)} classes, "
        f"{bundle.scheme}",
        "",
        f"{'exit':<16} {'bytes':>10}  {'answers as float':>16}",
    ]
    for segment in bundle.segments:
        share = origin["float_agreement"].get(segment.exit)  # a ready int8 file was never float
        shown = "-" if share is None else f"{share:.1%}"
        lines.append(f"{segment.exit:<16} {segment.bytes:>10,}  {shown:>16}")
    used = origin["ranges"]
    tried = ", ".join(f"{name} {value:.1%}" for name, value in used["held_out_agreement"].items())
    slow = ", ".join(f"{count} {name}" for name, count in origin["outside_xnnpack"].items())
    turned = origin["transposes"]
    lines += [
        "",
        f"activation ranges    {used['chosen']}, {used['count']} samples of {used['samples']}"
        + (f" ({tried})" if tried else ""),
        f"outside XNNPACK      {slow or 'none'}",
        f"transpositions       {turned['count']}, {turned['at_seams']} of them at seams",
        f"time, peak memory    {sum(steps.seconds.values()):.1f} s, {_peak_bytes() / 1e6:.0f} MB",
    ]
    if heads := origin.get("heads"):
        right = ", ".join(f"{k} {v:.1%}" for k, v in heads["held_out_accuracy"].items())
        lines.append(
            f"fitted exits         {len(heads['at'])}, on {heads['fitted_on']} samples; right on "
            f"{heads['held_out']} others: {right}"
        )
    if "scheme_choice" in origin:
        lines += ["", *choice_table(origin["scheme_choice"])]
    return "\n".join(lines)

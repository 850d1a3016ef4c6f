"""`edgeexit inspect`: what a bundle holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.errors import printable

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle
    from edgeexit.tflite import TensorSpec


@click.command("inspect", short_help="show what a bundle holds")
@click.argument("bundle", required=False, type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def command(bundle: Path | None, as_json: bool) -> None:
    """Show the segments, preprocessing, origin and policies of BUNDLE (default: the only one)."""
    from edgeexit.bundle import load_bundle
    from edgeexit.files import json_bytes
    from edgeexit.names import only_bundle_here

    loaded = load_bundle(only_bundle_here() if bundle is None else bundle)
    document = _document(loaded)
    if as_json:
        click.echo(json_bytes(document), nl=False)
        return
    click.echo(_text(loaded, document))


def _document(bundle: "Bundle") -> dict[str, Any]:
    from edgeexit.files import read_json

    segments = [
        {
            "file": segment.file,
            "exit": segment.exit,
            "bytes": segment.bytes,
            "operators": _operators(bundle, segment.file),
            "inputs": [spec.to_document() for spec in segment.inputs],
            "outputs": [spec.to_document() for spec in segment.outputs],
        }
        for segment in bundle.segments
    ]
    policies = {
        device: read_json(bundle.policy_path(device)).values for device in bundle.policy_devices()
    }
    return {
        "path": str(bundle.path),
        "name": bundle.name,
        "digest": bundle.digest,
        "made_by": bundle.made_by,
        "scheme": bundle.scheme,
        "parent": None
        if bundle.parent is None
        else {"digest": bundle.parent.digest, "exits": list(bundle.parent.exits)},
        "exits": list(bundle.exits),
        "class_names": list(bundle.class_names),
        "preprocess": bundle.preprocess.to_document(),
        "input": bundle.input.to_document(),
        "segments": segments,
        "model_bytes": bundle.files[bundle.model].bytes,
        "calibration_set": dict(bundle.calibration_set) if bundle.calibration_set else None,
        "provenance": dict(bundle.provenance),
        "policies": policies,
    }


def _operators(bundle: "Bundle", file: str) -> int | None:
    """How many operators the segment in *file* has; None where no schema tells it."""
    from edgeexit.errors import DeviceError
    from edgeexit.tflite import read_model

    try:
        return len(read_model(bundle.read_file(file), file).operators)
    except DeviceError:
        return None


def _shape(spec: "TensorSpec") -> str:
    return f"{spec.dtype} {'x'.join(map(str, spec.shape))}"


def _text(bundle: "Bundle", document: dict[str, Any]) -> str:
    names = bundle.class_names
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    lines = [
        f"{bundle.path}: {bundle.name}, {bundle.scheme}, made by {bundle.made_by}",
        f"digest      {bundle.digest}",
        f"input       {_shape(bundle.input)}",
        f"classes     {len(names)}: {shown}",
        "preprocess  "
        + ", ".join(f"{key} {value}" for key, value in document["preprocess"].items()),
    ]
    chosen = bundle.calibration_set
    lines.append(f"calibration set  {chosen['name'] if chosen else 'none'}")
    served = {bundle.digest}
    if bundle.parent is not None:
        lines.append(
            f"cut out of  {bundle.parent.digest}, which has {', '.join(bundle.parent.exits)}"
        )
        served.add(bundle.parent.digest)
    rows = [("exit", "bytes", "ops", "hands over")]
    for segment, entry in zip(bundle.segments, document["segments"], strict=True):
        handed = ", ".join(map(_shape, segment.outputs[1:])) or "-"
        rows.append((segment.exit, str(segment.bytes), str(entry["operators"] or "?"), handed))
    rows.append(("uncut", str(document["model_bytes"]), "", ""))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines.append("")
    lines += [
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    ]
    lines.append("")
    for device, policy in document["policies"].items():
        state = "" if policy.get("bundle") in served else "  (of another bundle)"
        lines.append(
            f"policy {device}: {policy.get('measure')}, keeps {policy.get('kept')}, "
            f"thresholds {policy.get('thresholds')}{state}"
        )
    if len(bundle.exits) == 1:
        lines.append("a static network: one exit, so there is no policy to choose")
    elif not document["policies"]:
        lines.append("no policy: every input runs the full network (edgeexit tune makes one)")
    if bundle.provenance:
        lines.append("")
    lines += [f"{key}: {value}" for key, value in bundle.provenance.items()]
    return "\n".join(map(printable, lines))

"""`edgeexit calibration`: make, check and list sets of labelled samples."""

from pathlib import Path

import click

from edgeexit.cli import progress
from edgeexit.errors import UsageError


@click.group("calibration", short_help="make and check sets of labelled samples")
def command() -> None:
    """
    Make, check and list calibration sets.

    A set holds labelled samples in four disjoint splits: ranges, tuning, certificate, report.
    """


def _numbers(text: str, option: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {text!r}: expected numbers with commas between") from error


@command.command("make")
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="new folder")
@click.option("--group-by", help="regular expression with one (group), or a CSV of id,group")
@click.option("--seed", default=0, show_default=True, help="another seed, another split")
@click.option("--size", help="HxW for a folder of pictures, default 224x224")
@click.option("--color", default="rgb", show_default=True, help="gray, rgb or bgr")
@click.option("--resize", default="stretch", show_default=True, help="stretch, crop or letterbox")
@click.option("--mean", default="0", show_default=True, help="per channel, after scaling to 0..1")
@click.option("--std", default="1", show_default=True, help="per channel, after scaling to 0..1")
@click.option("--classes", help="class names with commas between, in the order of the labels")
@click.option("--license", "license_text", default="", help="licence of the samples")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def make(
    source: Path,
    out: Path,
    group_by: str | None,
    seed: int,
    size: str | None,
    color: str,
    resize: str,
    mean: str,
    std: str,
    classes: str | None,
    license_text: str,
    as_json: bool,
) -> None:
    """
    Split SOURCE into a new set.

    SOURCE is a folder of class subfolders with pictures, or an .npz with samples, labels and
    perhaps ids. An .npz of pictures keeps its size; the picture options are for folders.
    """
    import re

    from edgeexit.calibration import make_set
    from edgeexit.files import json_bytes
    from edgeexit.labelled import pictures_in
    from edgeexit.preprocess import Preprocess

    preprocess = None
    if not source.exists():
        raise UsageError(f"{source}: no such file or folder")
    if source.is_dir():
        match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size or "224x224")
        if match is None:
            raise UsageError(f"--size {size!r}: expected HxW, for example 96x96")
        preprocess = Preprocess(
            kind="image",
            size=(int(match[1]), int(match[2])),
            resize=resize,
            color=color,
            scale=1 / 255,
            mean=_numbers(mean, "--mean"),
            std=_numbers(std, "--std"),
        )
    elif size is not None:
        raise UsageError("--size: is for folders of pictures", hint="an .npz keeps its own size")
    count = len(pictures_in(source)) if source.is_dir() else 0
    with progress(length=count, label="pictures") as bar:
        report = make_set(
            source,
            out,
            preprocess=preprocess,
            class_names=classes.split(",") if classes else None,
            group_by=group_by,
            seed=seed,
            license=license_text,
            progress=bar.update,
        )
    if as_json:
        click.echo(json_bytes(report.to_document()), nl=False)
        return
    click.echo(f"{report.folder}: {sum(report.counts.values())} samples, {report.groups} groups")
    for split, number in report.counts.items():
        click.echo(f"  {split:<12}{number:>7}")
    if report.copies:
        click.echo(f"  {report.copies} exact copies, each kept in the split of its original")
    if report.near:
        click.echo(f"  {len(report.near)} near-duplicates across splits; give --group-by? e.g.")
        for first, second in report.near[:5]:
            click.echo(f"    {first}  {second}")


@command.command("check")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def check(name: str, as_json: bool) -> None:
    """Verify every digest of the set NAME (a shipped name or a folder)."""
    from edgeexit.errors import BadFile
    from edgeexit.files import json_bytes
    from edgeexit.samples import find_set

    found = find_set(name)
    counts: dict[str, int] = {}
    absent: list[str] = []
    owner: dict[bytes, str] = {}
    for split, entry in found.splits.items():
        if not (found.folder / entry.file).is_file():
            absent.append(split)
            continue
        samples = found.split(split)
        counts[split] = len(samples)
        for digest in samples.digests():
            if owner.setdefault(digest.tobytes(), split) != split:
                raise BadFile(
                    f"{found.folder}: a sample stands in {owner[digest.tobytes()]} and in {split}"
                )
    if not counts:
        raise BadFile(f"{found.folder}: holds no samples")
    if as_json:
        document = {"name": found.name, "digest": found.digest, "counts": counts, "absent": absent}
        click.echo(json_bytes(document), nl=False)
        return
    click.echo(f"{found.name}: sound, {len(found.class_names)} classes, digest {found.digest[:16]}")
    for split in found.splits:
        click.echo(f"  {split:<12}{counts.get(split, 'not here'):>9}")


@command.command("list")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def list_sets(as_json: bool) -> None:
    """List the sets that come with edgeexit."""
    from edgeexit.files import json_bytes
    from edgeexit.samples import find_set, shipped_sets

    sets = [find_set(name) for name in shipped_sets()]
    if as_json:
        document = {
            found.name: {split: entry.count for split, entry in found.splits.items()}
            for found in sets
        }
        click.echo(json_bytes(document), nl=False)
        return
    for found in sets:
        counts = ", ".join(f"{split} {entry.count}" for split, entry in found.splits.items())
        click.echo(f"{found.name}: {len(found.class_names)} classes; {counts}")


@command.command("fashion-mnist")
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="folder of the published files, default: Debian's dataset-fashion-mnist",
)
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), help="new folder")
def fashion_mnist(source: Path | None, out: Path) -> None:
    """Rebuild the shipped set from the published files, byte for byte."""
    from edgeexit.calibration import FASHION_FOLDER, make_fashion_mnist

    folder = FASHION_FOLDER if source is None else source
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder", hint="apt install dataset-fashion-mnist")
    made = make_fashion_mnist(folder, out)
    click.echo(f"{out}: {sum(split.count for split in made.splits.values())} samples")

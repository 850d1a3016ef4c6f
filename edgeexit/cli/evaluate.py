"""`edgeexit evaluate`: accuracy, exit rates and latency on labelled samples; makes records."""

from pathlib import Path

import click

from edgeexit.cli import progress
from edgeexit.errors import UsageError


@click.command("evaluate", short_help="measure accuracy, exit rates and latency on samples")
@click.argument("words", metavar="[BUNDLE] DATA...", nargs=-1, required=True)
@click.option(
    "--policy", default="auto", show_default=True, help="auto, none, or the path of a policy file"
)
@click.option(
    "--record",
    "record_path",
    type=click.Path(path_type=Path),
    help="also write the logits of every exit to this .npz (what tune works on)",
)
@click.option("--threads", default=1, show_default=True, type=click.IntRange(1, 256))
@click.option("--json", "as_json", is_flag=True, help="print one JSON document instead of tables")
def command(
    words: tuple[str, ...], policy: str, record_path: Path | None, threads: int, as_json: bool
) -> None:
    """
    Classify labelled DATA with BUNDLE (default: the only one here) and count.

    \b
    edgeexit evaluate fashion.edgeexit fashion-mnist:report --policy auto
    edgeexit evaluate fashion.edgeexit fashion-mnist:tuning+certificate --record r.npz
    edgeexit evaluate pictures/            # one subfolder for each class

    DATA is SET:SPLIT (several splits joined with "+"), a folder with one subfolder for each
    class, or an .npz with samples and labels; several DATA are taken together. The first word
    is the bundle if it is a bundle's folder.
    """
    from edgeexit import names, report
    from edgeexit.bundle import MANIFEST, load_bundle
    from edgeexit.evaluate import evaluate, joined, record
    from edgeexit.files import json_bytes
    from edgeexit.samples import find_set, is_set, load_samples

    first = Path(words[0])
    named = first.suffix == ".edgeexit" or (first / MANIFEST).is_file()
    texts = words[1:] if named else words
    if not texts:
        raise UsageError("no DATA", hint="say for example fashion-mnist:report")
    bundle = load_bundle(first if named else names.only_bundle_here())
    sources: list[str] = []
    for text in texts:
        stem, colon, splits = text.rpartition(":")
        many = colon and not Path(text).exists()
        sources += [f"{stem}:{split}" for split in splits.split("+")] if many else [text]
    # Pictures have the shape that preprocessing says; the bundle's input is always channels last.
    shape = bundle.input.shape if bundle.preprocess.kind == "array" else None
    parts = [load_samples(text, bundle.preprocess, bundle.class_names, shape) for text in sources]
    sets = {text.rpartition(":")[0] for text in sources}
    origin = find_set(next(iter(sets))) if len(sets) == 1 and is_set(next(iter(sets))) else None
    whole = joined(parts)
    passes = 1 if record_path is None else 2
    with progress(length=len(whole) * passes, label="evaluate") as bar:
        found = evaluate(
            bundle,
            whole,
            None if policy == "none" else policy,
            threads=threads,
            on_step=bar.update,
        )
        if record_path is not None:
            record(
                bundle,
                parts,
                set_name=origin.name if origin else "",
                set_digest=origin.digest if origin else "",
                threads=threads,
                on_step=bar.update,
            ).save(record_path)
    if as_json:
        click.echo(json_bytes(found.to_document()), nl=False)
        return
    click.echo(report.evaluation_table(found))
    if record_path is not None:
        click.echo(f"wrote {record_path}", err=True)

"""`edgeexit compare`: two profiles beside each other."""

from pathlib import Path

import click

from edgeexit.cli import percentage
from edgeexit.errors import Disturbed


def _allowed(context: click.Context, option: click.Parameter, text: str | None) -> float | None:
    share = percentage(context, option, text)
    if share is not None and not 0 <= share < 1:
        raise click.BadParameter(f"{text!r}: expected 0% .. 99%, such as 3%.", context, option)
    return share


@click.command("compare", short_help="compare two profiles, exit by exit")
@click.argument("a", metavar="A.json", type=click.Path(path_type=Path))
@click.argument("b", metavar="B.json", type=click.Path(path_type=Path))
@click.option(
    "--fail-if-slower",
    "allowed",
    metavar="SHARE",
    callback=_allowed,
    help="exit code 6 if B is slower by more than this (3% or 0.03), and not by chance",
)
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def command(a: Path, b: Path, allowed: float | None, as_json: bool) -> None:
    """
    Compare the profile B with the profile A: ratio, interval and chance for each exit.

    \b
    edgeexit compare profile-rpi4.json after/profile-rpi4.json
    edgeexit compare before.json after.json --fail-if-slower 3%

    Exits are matched by their names. Chances hold for all exits together. If the yardstick loop
    ran at another speed in B, ratios are taken in turns of it.
    """
    from edgeexit import report
    from edgeexit.compare import compare
    from edgeexit.files import json_bytes
    from edgeexit.profile import Profile

    found = compare(Profile.load(a), Profile.load(b))
    if as_json:
        click.echo(json_bytes(found.to_document()), nl=False)
    else:
        click.echo(report.comparison_table(found))
    if allowed is None:
        return
    unsure = found.unsure(allowed)
    if unsure:
        click.echo(report.unsure_line(found, unsure, allowed), err=True)
    if found.slower(allowed):
        raise Disturbed(
            f"more than {allowed:.3g} slower is not allowed: {found.summary()}",
            hint="if nothing was changed, measure both again, one right after the other",
        )

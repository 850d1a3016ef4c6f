"""`edgeexit uninstall`: take edgeexit off boards again."""

from typing import TYPE_CHECKING

import click

from edgeexit.errors import UsageError, printable

if TYPE_CHECKING:
    from edgeexit.remote.fan import Row


@click.command("uninstall", short_help="take edgeexit off a board again")
@click.argument("names", metavar="HOST...", nargs=-1)
@click.option("--label", "labels", metavar="LABEL", multiple=True, help="all boards that carry it")
@click.option(
    "--all", "everything", is_flag=True, help="also deployments, uploads and results there"
)
@click.option("--dry-run", "dry", is_flag=True, help="only list what would go")
@click.option("--yes", "-y", is_flag=True, help="do not ask before --all")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
def command(
    names: tuple[str, ...],
    labels: tuple[str, ...],
    everything: bool,
    dry: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """
    Remove from HOST what `setup` put there; with --all also what `deploy` and `profile` left.

    \b
    edgeexit uninstall rpi4
    edgeexit uninstall rpi4 --all --dry-run
    edgeexit uninstall --label lab --all --yes

    Only edgeexit's own files below ~/.local/share/edgeexit go; what else lies there stays. A board
    on which something of it runs is refused (exit code 8).
    """
    import asyncio

    from edgeexit.files import json_bytes
    from edgeexit.remote import fan
    from edgeexit.remote.hosts import chosen
    from edgeexit.remote.setup import take_away

    hosts = chosen(names, labels)

    def run(is_dry: bool) -> "list[Row]":
        return asyncio.run(
            fan.fan_out(hosts, lambda host: take_away(host, everything=everything, dry=is_dry))
        )

    if everything and not dry and not yes:
        if as_json:
            raise UsageError("--all with --json asks nobody", hint="add --yes")
        _show(run(True), "would remove")
        click.confirm("Remove all of that?", abort=True, err=True)
    rows = run(dry)
    if as_json:
        click.echo(json_bytes(fan.to_document(rows)), nl=False)
    else:
        _show(rows, "would remove" if dry else "removed")
    code = fan.exit_code(rows)
    if code:
        raise click.exceptions.Exit(code)


def _show(rows: "list[Row]", verb: str) -> None:
    for row in rows:
        if row.error is not None:
            click.echo(printable(f"{row.host}: failed: {row.error.removeprefix(f'{row.host}: ')}"))
            if row.hint:
                click.echo(f"Hint: {row.host}: {printable(row.hint)}", err=True)
            continue
        removed = row.facts["removed"]
        size_mb = sum(size for _, size in removed) / 1e6
        click.echo(printable(f"{row.host}: {verb} {len(removed)} items, {size_mb:.1f} MB"))
        for name, size in removed:
            click.echo(printable(f"    {name}  {size / 1e6:.1f} MB"))
        for name in row.facts["left"]:
            click.echo(printable(f"    left alone: {row.facts['home']}/{name}"))

"""`edgeexit uninstall`: take edgeexit off boards again."""

import sys
from collections.abc import Mapping
from typing import Any

import click

from edgeexit.cli.fleet import Live, fleet_options, meant, work_on
from edgeexit.errors import UsageError

# Of each folder.
_MOST_NAMED = 4


@click.command("uninstall", short_help="take edgeexit off a board again")
@click.argument("names", metavar="HOST...", nargs=-1)
@click.option(
    "--label", "labels", metavar="LABEL", multiple=True, help="all boards with it; again for more"
)
@click.option(
    "--all", "everything", is_flag=True, help="also deployments, uploads and results there"
)
@click.option("--dry-run", "dry", is_flag=True, help="only list what would go")
@click.option("--yes", "-y", is_flag=True, help="do not ask before --all")
@click.option("--json", "as_json", is_flag=True, help="print one JSON document")
@fleet_options
def command(
    names: tuple[str, ...],
    labels: tuple[str, ...],
    everything: bool,
    dry: bool,
    yes: bool,
    as_json: bool,
    **fleet: Any,
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
    hosts = meant(names, labels)
    from edgeexit.remote.setup import take_away

    def work(is_dry: bool, verb: str, **options: Any) -> None:
        work_on(
            hosts,
            lambda host: take_away(host, everything=everything, dry=is_dry),
            lambda facts: _told(facts, verb),
            Live(len(hosts)),
            head={},
            as_json=as_json,
            **options,
        )

    if everything and not dry and not yes:
        if as_json:
            raise UsageError("--all with --json asks nobody", hint="add --yes")
        if sys.stdin is None or not sys.stdin.isatty():
            raise UsageError(
                "--all asks first, and there is no terminal to ask",
                hint="--all --dry-run lists what would go; add --yes",
            )
        work(True, "would remove", **fleet)
        click.confirm("Remove all of that?", abort=True, err=True)
    work(dry, "would remove" if dry else "removed", **fleet)


def _told(facts: Mapping[str, Any], verb: str) -> str:
    removed = facts["removed"]
    size_mb = sum(size for _, size in removed) / 1e6
    folders: dict[str, list[str]] = {}
    for name, _ in removed:
        folders.setdefault(name.partition("/")[0], []).append(name)
    shown = ", ".join(
        ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)} in {folder}"
        for folder, names in folders.items()
    )
    told = f"{verb} {shown} ({size_mb:.1f} MB)" if removed else "nothing of edgeexit's there"
    left = f"; left alone: {', '.join(facts['left'])}" if facts["left"] else ""
    return f"{told}{left} in {facts['home']}"

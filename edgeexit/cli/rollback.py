"""`edgeexit rollback`: make boards run what they ran before."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.fleet import Live, board_options, fleet_options, meant, work_on

if TYPE_CHECKING:
    from edgeexit.remote.fan import Outcome
    from edgeexit.remote.hosts import Host


@click.command("rollback", short_help="make boards run what they ran before")
@board_options
@click.option("--app", required=True, help="which application, see edgeexit deploy --status")
@fleet_options
@click.option("--json", "as_json", is_flag=True, help="print one document instead of rows")
def command(
    names: tuple[str, ...],
    labels: tuple[str, ...],
    is_here: bool,
    app: str,
    limit: int,
    canary: int,
    max_failures: str | None,
    as_json: bool,
) -> None:
    """
    Make the boards run the release of APP that they ran before the current one.

    \b
    edgeexit rollback --app fashion --host rpi4
    edgeexit rollback --app fashion --label lab
    edgeexit rollback --app fashion --here

    Needs nothing but the board: the release before is still there. A second rollback takes the
    first one back. The exit code is 0, what all failures have in common, or 5.
    """
    hosts = meant(names, labels, is_here)

    async def work(host: "Host") -> "Outcome":
        if is_here:
            from edgeexit.agent.delivery import rollback_here
            from edgeexit.remote.fan import Outcome

            return Outcome(facts=rollback_here(app))
        from edgeexit.remote.delivery import rollback

        return await rollback(host, app)

    work_on(
        hosts,
        work,
        _words,
        Live(len(hosts)),
        head={"app": app},
        as_json=as_json,
        limit=limit,
        canary=canary,
        max_failures=max_failures,
    )


def _words(facts: Mapping[str, Any]) -> str:
    return f"{facts['app']} {facts['release']} (was {facts['was']})"

"""`edgeexit deploy`: make a bundle what boards run, and tell what they do."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeexit.cli.fleet import Live, board_options, fleet_options, meant, work_on
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.remote.fan import Outcome
    from edgeexit.remote.hosts import Host


@click.command("deploy", short_help="make a bundle what boards run")
@click.argument("bundle_path", metavar="[BUNDLE]", required=False, type=click.Path(path_type=Path))
@board_options
@click.option("--app", help="what the boards call it (default: the bundle folder's name)")
@fleet_options
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="releases that stay besides the one that runs",
)
@click.option("--force", is_flag=True, help="also where the self-test failed before, and again")
@click.option("--dry-run", is_flag=True, help="only tell what would change")
@click.option("--status", "is_status", is_flag=True, help="tell what runs where, change nothing")
@click.option("--json", "as_json", is_flag=True, help="print one document instead of rows")
def command(
    bundle_path: Path | None,
    names: tuple[str, ...],
    labels: tuple[str, ...],
    is_here: bool,
    app: str | None,
    limit: int,
    canary: int,
    max_failures: str | None,
    keep: int,
    force: bool,
    dry_run: bool,
    is_status: bool,
    as_json: bool,
) -> None:
    """
    Make BUNDLE (default: the only one here) what the boards run, its policies included.

    \b
    edgeexit deploy fashion.edgeexit --host rpi4
    edgeexit deploy --label lab --canary 1 --max-failures 10%
    edgeexit deploy --status --label lab   # what runs where
    edgeexit deploy --here                 # on this machine

    A board gets what it has not, runs the self-test, and only then changes to the new release at
    once; what ran before stays for edgeexit rollback. Boards that run it already are left alone, so
    the same command again goes on with those that failed. The exit code is 0, what all failures
    have in common, or 5; 8: another deploy is under way there.
    """
    if is_status:
        if bundle_path is not None or force or dry_run:
            raise UsageError(
                "--status only looks: leave BUNDLE, --force and --dry-run out",
                hint="edgeexit deploy --status --app NAME --host HOST",
            )
        hosts = meant(names, labels, is_here)
        _work_on_status(hosts, app, is_here, limit=limit, as_json=as_json)
        return

    from edgeexit.agent.parcel import pack
    from edgeexit.files import json_bytes
    from edgeexit.names import only_bundle_here

    parcel = pack(bundle_path or only_bundle_here(), app)
    size_bytes = parcel.manifest.size_bytes
    head = {"app": parcel.app, "release": parcel.manifest.id, "bytes": size_bytes}
    if dry_run and not (names or labels or is_here):
        devices = ", ".join(parcel.devices) or "none"
        text = f"{parcel.app}: release {parcel.manifest.id}, {size_bytes / 1e6:.1f} MB"
        click.echo(
            json_bytes({"format": 1, **head, "devices": list(parcel.devices)}).decode().rstrip()
            if as_json
            else f"{text}, policies for: {devices}"
        )
        return
    hosts = meant(names, labels, is_here)
    live = Live(len(hosts))

    async def work(host: "Host") -> "Outcome":
        if is_here:
            from edgeexit.agent.delivery import deploy_here
            from edgeexit.remote.fan import Outcome

            facts = deploy_here(parcel, keep=keep, force=force, dry_run=dry_run)
            return Outcome(facts=facts, changed=facts["changed"])
        from edgeexit.remote.delivery import deploy

        return await deploy(
            host, parcel, keep=keep, force=force, dry_run=dry_run, on_step=live.step
        )

    work_on(
        hosts,
        work,
        _would if dry_run else _done,
        live,
        head={**head, "dry_run": dry_run},
        as_json=as_json,
        limit=limit,
        canary=canary,
        max_failures=max_failures,
    )


def _work_on_status(
    hosts: "list[Host]", app: str | None, is_here: bool, *, limit: int, as_json: bool
) -> None:
    async def work(host: "Host") -> "Outcome":
        if is_here:
            from edgeexit.agent.delivery import status_here
            from edgeexit.remote.fan import Outcome

            return Outcome(facts=status_here(app), changed=False)
        from edgeexit.remote.delivery import status

        return await status(host, app)

    work_on(hosts, work, _runs, Live(len(hosts)), head={}, as_json=as_json, limit=limit)


def _done(facts: Mapping[str, Any]) -> str:
    """The words of a row after a deploy."""
    parts = [f"{facts['app']} {facts['release']}"]
    if not facts["changed"]:
        return parts[0]
    if facts["was"] not in (None, facts["release"]):
        parts[0] += f" (was {facts['was']})"
    parts.append(f"self-test: {(facts['selftest'] or {}).get('summary') or 'ok'}")
    parts.append(f"policy {facts['policy'] or 'none'}")
    if "sent_bytes" in facts:
        parts.append(f"sent {facts['sent_bytes'] / 1e6:.1f} MB")
    return ", ".join(parts)


def _would(facts: Mapping[str, Any]) -> str:
    """The words of a row before one."""
    name = f"{facts['app']} {facts['release']}"
    return f"would run {name} (now {facts['was'] or 'nothing'})" if facts["changed"] else name


def _runs(facts: Mapping[str, Any]) -> str:
    """The words of a row of --status."""
    runtime = f"{facts['runtime']} {facts['runtime_version']}" if facts["runtime"] else "no runtime"
    apps = [_app(app) for app in facts["apps"]] or ["nothing deployed"]
    return ", ".join([facts["device"], runtime, f"edgeexit {facts['edgeexit']}", *apps])


def _app(found: Mapping[str, Any]) -> str:
    text = f"{found['app']} {found['current'] or 'nothing'}"
    if found["current"] in found["bad"]:
        text += f" BAD ({found['bad'][found['current']]})"
    return text + (f" (before: {found['previous']})" if found["previous"] else "")

"""
Bringing a bundle to boards, taking it back, and asking what runs there.

Callers see deploy, rollback and status: work for fan.fan_out, each on one board by one order; and
*summary*, which tells an outcome in words. The board decides and acts (agent.delivery); hidden
here: only what it needs is sent, while it waits, over the same connection.
"""

from collections.abc import Callable, Mapping
from typing import Any

from edgeexit.agent.parcel import Parcel
from edgeexit.errors import BadFile
from edgeexit.remote.fan import Outcome
from edgeexit.remote.hosts import Host
from edgeexit.remote.link import Item, connect

OnStep = Callable[[str, str], None]
"""Called with the board's name and what goes on there, in a few words."""


async def deploy(
    host: Host,
    parcel: Parcel,
    *,
    keep: int = 1,
    force: bool = False,
    dry_run: bool = False,
    on_step: OnStep = lambda host, step: None,
) -> Outcome:
    """
    Make *parcel* what runs on *host*; unchanged where it does. Facts: as agent.delivery.deploy.

    With *dry_run* nothing changes, and the outcome tells what would.
    """
    content = {entry.sha256: entry for entry in parcel.manifest.files}
    sent = 0
    async with connect(host) as link:

        async def bring(need: Mapping[str, Any]) -> Mapping[str, Any]:
            nonlocal sent
            wanted = need.get("blobs")
            if not isinstance(wanted, list) or not set(map(str, wanted)) <= set(content):
                raise BadFile(f"{host.name}: asks for files that are none of {parcel.path}")
            total = sum(content[sha256].size_bytes for sha256 in wanted)
            come = 0

            def came(count: int) -> None:
                nonlocal come
                come += count
                on_step(host.name, f"{come / max(total, 1):4.0%} of {total / 1e6:.1f} MB")

            items = [
                Item(
                    content=parcel.path / content[sha256].path,
                    sha256=sha256,
                    size_bytes=content[sha256].size_bytes,
                )
                for sha256 in wanted
            ]
            sent = (await link.upload(items, on_bytes=came)).sent_bytes
            return {"uploaded": True}

        result = await link.agent(
            "deploy",
            parcel.order(keep=keep, force=force, dry_run=dry_run),
            on_progress=lambda said: on_step(host.name, str(said.get("step", ""))),
            on_need=bring,
        )
    warnings = list(result.get("warnings", []))
    if host.device not in (None, result.get("device")):
        warnings.append(f"hosts.toml calls it a {host.device}, it is a {result.get('device')}")
    facts = {**result, "warnings": warnings, "sent_bytes": sent}
    return Outcome(facts=facts, changed=result.get("changed") is True)


async def rollback(host: Host, app: str) -> Outcome:
    """Make the release before the current one run again on *host*."""
    async with connect(host) as link:
        return Outcome(facts=await link.agent("rollback", {"app": app}))


async def status(host: Host, app: str | None = None) -> Outcome:
    """What runs on *host*: the facts of agent.delivery.status."""
    async with connect(host) as link:
        facts = await link.agent("status", {} if app is None else {"app": app})
        return Outcome(facts=facts, changed=False)

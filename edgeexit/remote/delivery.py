"""
Bringing a bundle to boards, taking it back, and asking what runs there.

Callers see deploy, rollback and status: work for fan.fan_out, each on one board by one order. The
board decides and acts (agent.delivery); hidden here: only what it needs is sent, while it waits,
over the same connection; and an answer that is none is refused.
"""

from collections.abc import Callable, Mapping
from typing import Any

from edgeexit.agent.parcel import Parcel
from edgeexit.errors import DeviceError
from edgeexit.files import Table
from edgeexit.remote.broken import understood
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
                raise DeviceError(f"{host.name}: asks for files that are none of {parcel.path}")
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
    said = _checked(host, result, _DEPLOYED)
    warnings = list(map(str, said.get("warnings", list)))
    if host.device not in (None, result["device"]):
        warnings.append(f"hosts.toml calls it a {host.device}, it is a {result['device']}")
    facts = {**result, "warnings": warnings, "sent_bytes": sent}
    return Outcome(facts=facts, changed=said.get("changed", bool))


async def rollback(host: Host, app: str) -> Outcome:
    """Make the release before the current one run again on *host*."""
    async with connect(host) as link:
        result = await link.agent("rollback", {"app": app})
    _checked(host, result, _ROLLED_BACK)
    return Outcome(facts=result)


async def status(host: Host, app: str | None = None) -> Outcome:
    """What runs on *host*: the facts of agent.delivery.status."""
    async with connect(host) as link:
        result = await link.agent("status", {} if app is None else {"app": app})
    said = _checked(host, result, {**_BOARD, "apps": list})
    with understood(host):
        for table in said.tables("apps"):
            _check(table, _APP)
    return Outcome(facts=result, changed=False)


# What a board's answer must hold, or whoever shows it would stumble; with "?" it may be null.
_BOARD = {"device": str, "runtime?": str, "runtime_version?": str, "edgeexit": str}
_DEPLOYED = {
    **_BOARD,
    **{"app": str, "release": str, "was?": str, "changed": bool, "policy?": str},
    **{"selftest?": dict, "warnings": list},
}
_ROLLED_BACK = {"app": str, "release": str, "was?": str}
_APP = {"app": str, "current?": str, "previous?": str, "bad": dict}


def _checked(host: Host, result: Mapping[str, Any], kinds: Mapping[str, type]) -> Table:
    """The *result* as a table that holds what *kinds* say."""
    table = Table(result, host.name)
    with understood(host):
        _check(table, kinds)
    return table


def _check(table: Table, kinds: Mapping[str, type]) -> None:
    for key, kind in kinds.items():
        name = key.removesuffix("?")
        if name == key or table.values.get(name, "") is not None:
            table.get(name, kind)

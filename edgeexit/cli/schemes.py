"""What `edgeexit convert --scheme auto` needs: who measures the candidates, and their table."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgeexit.cli import require_remote
from edgeexit.cli.profile import board_for
from edgeexit.errors import UsageError

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle
    from edgeexit.profile import Profile
    from edgeexit.remote.hosts import Host


def measuring(
    scheme: str | None, device_name: str | None, host_name: str | None
) -> "Callable[[Bundle], Profile] | None":
    """Who measures candidates: this machine, or the board that is named; None if nobody need."""
    from edgeexit.host import contest
    from edgeexit.host.schemes import AUTO

    if scheme != AUTO:
        if device_name is not None or host_name is not None:
            option = "--device" if device_name is not None else "--host"
            raise UsageError(
                f"{option}: nothing is measured for --scheme {scheme or 'int8'}",
                hint=f"say --scheme {AUTO}",
            )
        return None
    host = board_for(device_name, host_name)
    if host is None:
        return contest.here(device_name) if device_name is not None else contest.here()
    require_remote("measuring on a board")
    return _there(host, device_name)


def _there(host: "Host", device_name: str | None) -> "Callable[[Bundle], Profile]":
    import asyncio

    from edgeexit.blocks import Mode
    from edgeexit.host import contest
    from edgeexit.remote import profiling

    def measure(bundle: "Bundle") -> "Profile":
        return asyncio.run(
            profiling.measure(
                host,
                bundle,
                device_name,
                mode=Mode(),
                threads=None,
                cores=None,
                limits=contest.LIMITS,
                meter=None,
                resume=False,
                save=lambda profile: None,
            )
        )

    return measure


def choice_table(choice: dict[str, Any]) -> list[str]:
    """The lines that show why a scheme was picked; *choice* as Choice.to_document makes it."""
    held, rule, known = choice["held_out"], choice["rule"], choice["float_accuracy"]
    lines = [
        f"scheme               {choice['scheme']}, {choice['why']}",
        f"                     on {choice['device']}; a scheme is taken if at every exit "
        f"{rule['agreement']:.0%} of its answers",
        f"                     are the float network's, or {100 * rule['points']:g} point of "
        "accuracy is lost at most",
        f"                     ({held['count']} samples of {held['samples']} that gave no ranges)",
        "",
        f"{'scheme':<12} {'exit':<12} {'as float':>9} {'accuracy':>9}   ms (95 % interval)",
    ]
    disturbed = []
    for row in choice["candidates"]:
        if "refused" in row:
            lines.append(f"{row['scheme']:<12} {row['refused']}")
            continue
        name = row["scheme"]
        for exit, share in row["agreement"].items():
            ms = row["ms"][exit]
            right = "" if row["accuracy"] is None else f"{row['accuracy'][exit]:.1%}"
            lines.append(
                f"{name:<12} {exit:<12} {share:>9.1%} {right:>9}   "
                f"{ms['value']:.4f} ({ms['low']:.4f} to {ms['high']:.4f})"
            )
            name = ""
        slow = ", ".join(f"{count} {kind}" for kind, count in row["outside_xnnpack"].items())
        lines.append(
            f"{'':<12} {row['times_fastest']:.2f} times the fastest, {row['model_bytes']:,} bytes"
            + (f", outside XNNPACK: {slow}" if slow else "")
            + ("" if row["is_right"] else "; too many answers differ")
            + (" <- taken" if row["scheme"] == choice["scheme"] else "")
        )
        if row["verdict"] not in ("clean", "not converged"):
            disturbed.append(f"{row['scheme']} ({row['verdict']})")
    if known is not None:
        lines.append(
            f"{'':<12} accuracy in float: " + ", ".join(f"{v:.1%}" for v in known.values())
        )
    if disturbed:
        lines.append(
            f"the machine was not itself while these were measured: {', '.join(disturbed)}"
        )
    return lines

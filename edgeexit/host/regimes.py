"""
The training regimes: which parts of a network move in which part of a training.

Callers see REGIMES, Phase and plan.
"""

from dataclasses import dataclass

from edgeexit.errors import BadFile
from edgeexit.host.recipe import TrainingPart
from edgeexit.names import choose


@dataclass(frozen=True, kw_only=True)
class Phase:
    """
    One part of a regime: a *share* of its epochs, and what moves: "all", "backbone" or "heads".

    "backbone" is all that the final exit needs, with its loss alone; "heads" are the parts that
    one early exit alone needs, with everything else, batch statistics too, as it is.
    """

    name: str
    moves: str
    share: float = 1.0


# "mixed": Kubaty et al. 2025, "How to train your multi-exit model?"; shares [1/2, 0, 1/2] are
# its backbone-then-all without the heads' own phase.
REGIMES: dict[str, tuple[Phase, ...]] = {
    "joint": (Phase(name="all", moves="all"),),
    "frozen": (Phase(name="heads", moves="heads"),),
    "mixed": (
        Phase(name="backbone", moves="backbone", share=0.5),
        Phase(name="heads", moves="heads", share=0.1),
        Phase(name="all", moves="all", share=0.4),
    ),
}


def plan(part: TrainingPart, where: str) -> list[tuple[Phase, int]]:
    """
    The phases of the regime with their epochs, which sum up to part.epochs.

    *where* names the table of *part* in errors.
    """
    phases = choose(part.regime, REGIMES, "training regime")
    shares = list(part.phase_shares) or [phase.share for phase in phases]
    if len(shares) != len(phases) or not sum(shares):
        raise BadFile(
            f"{where}.phase_shares: found {shares}, the regime {part.regime} has "
            f"{len(phases)} phases: {', '.join(phase.name for phase in phases)}"
        )
    used = [(phase, share) for phase, share in zip(phases, shares, strict=True) if share]
    if 0 < part.epochs < len(used):
        raise BadFile(
            f"{where}.epochs: found {part.epochs}, the regime {part.regime} has {len(used)} phases"
        )
    # Each phase has one epoch; the rest is dealt out to whoever is furthest behind its share.
    counts = [1] * len(used)
    wanted = [part.epochs * share / sum(shares) for _, share in used]
    for _ in range(part.epochs - len(used)):
        behind = [want - count for want, count in zip(wanted, counts, strict=True)]
        counts[behind.index(max(behind))] += 1
    dealt = zip(used, counts, strict=True)
    return [(phase, count) for (phase, _), count in dealt] if part.epochs else []

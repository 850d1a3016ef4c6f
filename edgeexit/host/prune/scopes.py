"""
Which part of a network is pruned when: one pool, the backbone before its exits, exits alone.
"""

from dataclasses import dataclass, replace

from edgeexit.host.graph import Graph
from edgeexit.host.recipe import TrainingPart


@dataclass(frozen=True, kw_only=True)
class Stage:
    """
    One part of a scope: which layers it may change, and what its fine-tuning moves.

    With *fresh_heads* the early exits' heads start anew. A *best_effort* stage goes as far
    towards the target as its layers let it, instead of refusing.
    """

    name: str
    parts: str
    regime: str | None = None
    phase_shares: tuple[float, ...] = ()
    fresh_heads: bool = False
    best_effort: bool = False

    @property
    def pool(self) -> str:
        """The name of its pool of single weights."""
        return {"all": "all", "backbone": "backbone", "heads": "exits"}[self.parts]

    def layers(self, graph: Graph) -> set[str]:
        """The layers that the stage may change, and that its target counts."""
        early = {name for exit_name in graph.exits[:-1] for name in graph.heads[exit_name]}
        parts = {"all": set(graph.layers), "backbone": set(graph.layers) - early, "heads": early}
        return parts[self.parts]

    def training(self, part: TrainingPart) -> TrainingPart:
        """*part* with what the stage trains."""
        if self.regime is None:
            return part
        return replace(part, regime=self.regime, phase_shares=self.phase_shares)


# Görmez & Koyuncu's two strategies: everything as one pool; or the backbone first, with its own
# loss alone, then new heads on the frozen backbone.
SCOPES: dict[str, tuple[Stage, ...]] = {
    "all": (Stage(name="all", parts="all"),),
    "backbone-then-exits": (
        Stage(name="backbone", parts="backbone", regime="mixed", phase_shares=(1.0, 0.0, 0.0)),
        Stage(name="exits", parts="heads", regime="frozen", fresh_heads=True, best_effort=True),
    ),
    "exits-only": (Stage(name="exits", parts="heads", regime="frozen"),),
}

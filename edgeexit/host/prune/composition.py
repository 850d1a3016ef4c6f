"""
One way to prune, as plain data: criterion x allocator x schedule x scope x selector, and a target.

Callers see Composition, Target and from_table. docs/formats.md ("Pruning recipe") is the
description for people. Hidden here: that a combination which cannot work is refused before any
work starts.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table
from edgeexit.host.prune.allocators import ALLOCATORS
from edgeexit.host.prune.criteria import CRITERIA
from edgeexit.host.prune.phases import PHASES
from edgeexit.host.prune.schedules import SCHEDULES, planned
from edgeexit.host.prune.scopes import SCOPES
from edgeexit.host.prune.selectors import SELECTORS
from edgeexit.names import choose

OF_FILTERS = ("linearise", "rank_cap", "stability")
TARGETS = ("macs", "params", "latency", "weights")


@dataclass(frozen=True, kw_only=True)
class Target:
    """
    The *share* (0..1) of *what* may remain in the scope: "macs", "params", "latency" (measured
    int8 milliseconds of the layers), or "weights", single weights that are not zero.
    """

    what: str
    share: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """From "macs=0.5"; UsageError for anything else."""
        what, equals, number = text.partition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not equals or what not in TARGETS or not 0 < 1 - share < 1:
            raise UsageError(
                f"--target: found {text!r}, expected WHAT=SHARE with WHAT of "
                f"{', '.join(TARGETS)} and the share that remains, above 0 and below 1",
                hint="for example macs=0.5",
            )
        return cls(what=what, share=share)


@dataclass(frozen=True, kw_only=True)
class Composition:
    """
    How to prune. The names are those of CRITERIA, ALLOCATORS, SCHEDULES, SELECTORS, PHASES.

    With the target "weights" single weights are set to zero and nothing gets faster; with the
    others filters and blocks are removed. *coupled*: also channels on shortcuts, else only those
    inside of blocks. *round_to*: widths become multiples of it. *rank_cap*: no layer loses more
    filters than its gradients' effective rank allows. *stability*: the first removal waits until
    the structure that it would choose no longer changes from epoch to epoch (EPI). *samples* of
    the training half are scored; *protect* names layers that stay whole. *linearise*:
    activations whose units are nearly always in one state are removed and layers folded where
    MACs fall (NEPENTHE). *foresight*: all steps are scored before any training (SNIP); pruned
    weights may then *come_back* (FORCE).
    """

    target: Target = field(default_factory=lambda: Target(what="macs", share=0.5))
    criterion: str = "taylor"
    block_criterion: str = "cka"
    allocator: str = "global"
    schedule: str = "geometric"
    schedule_options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    scope: str = "all"
    selector: str = "filters"
    coupled: bool = True
    phase: str | None = None
    phase_options: dict[str, Any] = field(default_factory=dict)
    phase_epochs: int = 1
    round_to: int = 8
    rank_cap: bool = False
    stability: bool = False
    samples: int = 512
    protect: tuple[str, ...] = ()
    linearise: bool = False
    foresight: bool = False
    come_back: bool = False

    def __post_init__(self) -> None:
        criterion = choose(self.criterion, CRITERIA, "criterion")
        block_criterion = choose(self.block_criterion, CRITERIA, "block criterion")
        choose(self.allocator, ALLOCATORS, "allocator")
        self.gone()
        choose(self.selector, SELECTORS, "selector")
        choose(self.scope, SCOPES, "scope")
        if self.phase is not None:
            choose(self.phase, PHASES, "phase")
        if self.is_unstructured and criterion.entries is None:
            raise self._cannot("criterion", "scores no single weights", "entries")
        if not self.is_unstructured and self.selector != "blocks" and criterion.units is None:
            raise self._cannot("criterion", "scores no filters", "units")
        if self.selector != "filters" and block_criterion.blocks is None:
            raise self._cannot("block_criterion", "scores no blocks", "blocks")
        if self.allocator == "latency" and self.target.what != "latency":
            raise UsageError(
                f"target {self.target.what}=...: the allocator latency needs latency=..., "
                "for which latencies are measured"
            )
        if self.is_unstructured and self.selector != "filters":
            raise UsageError("target weights=...: single weights have no blocks to select from")
        asked = {"phase": self.phase, **{k: getattr(self, k) for k in OF_FILTERS}}
        for key, value in asked.items():
            if value and self.is_unstructured:
                raise UsageError(f"target weights=...: {key} is for filters and blocks only")
        if (self.foresight or self.come_back) and not self.is_unstructured:
            raise UsageError(
                f"target {self.target.what}=...: foresight and come_back are for weights=... only"
            )

    def _cannot(self, key: str, what: str, attribute: str) -> UsageError:
        able = [n for n, c in CRITERIA.items() if getattr(c, attribute) is not None]
        return UsageError(f"{key} {getattr(self, key)!r} {what} (those that do: {', '.join(able)})")

    @property
    def is_unstructured(self) -> bool:
        """Whether single weights are zeroed instead of filters and blocks removed."""
        return self.target.what == "weights"

    def gone(self) -> list[float]:
        """The share of the target's cost that is gone after each step of the schedule."""
        share = 1 - self.target.share
        return planned(self.schedule, share, self.steps, self.schedule_options)

    def to_document(self) -> dict[str, Any]:
        """As plain values, for metadata and digests."""
        document = {name: getattr(self, name) for name in self.__dataclass_fields__}
        document["target"] = {self.target.what: self.target.share}
        document["protect"] = list(self.protect)
        if not self.schedule_options:
            del document["schedule_options"]
        return document


def known_names() -> dict[str, list[str]]:
    """What each axis can be called, for --list."""
    from edgeexit.host.prune.methods import METHODS

    able = {
        "criterion": [n for n, c in CRITERIA.items() if c.units is not None],
        "block criterion": [n for n, c in CRITERIA.items() if c.blocks is not None],
        "for weights=...": [n for n, c in CRITERIA.items() if c.entries is not None],
    }
    axes: dict[str, Iterable[str]] = {
        "allocator": ALLOCATORS,
        "schedule": SCHEDULES,
        "scope": SCOPES,
        "selector": SELECTORS,
        "phase": PHASES,
        "target": TARGETS,
    }
    methods = {
        "method": [name for name, one in METHODS.items() if not one.is_unstructured],
        "zeros only": [name for name, one in METHODS.items() if one.is_unstructured],
    }
    return {**methods, **able, **{what: list(names) for what, names in axes.items()}}


def from_table(table: Table, base: Composition) -> Composition:
    """*base* changed by what the recipe's [prune] *table* says; BadFile if it is not understood."""
    table.only(*Composition.__dataclass_fields__, "method")
    changes: dict[str, Any] = {}
    for key in ("criterion", "block_criterion", "allocator", "schedule", "scope", "selector"):
        if key in table:
            changes[key] = table.get(key, str)
    for key in ("coupled", "rank_cap", "stability", "linearise", "foresight", "come_back"):
        if key in table:
            changes[key] = table.get(key, bool)
    ranges = {"steps": 1000, "round_to": 1024, "samples": 1_000_000, "phase_epochs": 100_000}
    for key, most in ranges.items():
        if key in table:
            value = table.get(key, int)
            if not 1 <= value <= most:
                raise BadFile(f"{table.where}.{key}: found {value}, expected 1 to {most}")
            changes[key] = value
    if "phase" in table:
        changes["phase"] = table.get("phase", str) or None
    for key in ("phase_options", "schedule_options"):
        if key in table:
            changes[key] = dict(table.get(key, dict))
    if "protect" in table:
        changes["protect"] = tuple(table.list_of("protect", str))
    if "target" in table:
        target = table.table("target")
        target.only(*TARGETS)
        if len(target.values) != 1:
            raise BadFile(f"{target.where}: expected one of {', '.join(TARGETS)}")
        (what,) = target.values
        share = target.get(what, float)
        if not 0 < 1 - share < 1:  # also no 1e-300
            raise BadFile(f"{target.where}.{what}: found {share:g}, expected above 0 and below 1")
        changes["target"] = Target(what=what, share=share)
    return replace(base, **changes)

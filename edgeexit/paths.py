"""
Which paths through a bundle a profile times: every choice of exits that could pay, each file once.

Callers see paths and kept_sets. Hidden here: many choices of exits lead over the same files
(leaving at the first exit does not depend on which later ones are kept), and timing the same
bytes twice would tell nothing.
"""

import itertools
from collections.abc import Iterable, Sequence

from edgeexit.blocks import Case, Kept
from edgeexit.bundle import Bundle
from edgeexit.files import digest_of

ALL_SUBSETS_UP_TO = 4


def kept_sets(exits: Sequence[str]) -> list[Kept]:
    """
    The sets of kept exits that a profile measures, largest first.

    Up to four exits: every one that keeps the final exit. More: all exits, which with the exits
    alone is what edgeexit.parts needs to price the others, and every second one, which tells how
    well that holds. In both cases also each exit alone: the smaller networks without any exit.
    """
    final = exits[-1]
    if len(exits) > ALL_SUBSETS_UP_TO:
        found = [tuple(exits), tuple(reversed(exits[::-1][::2]))]
    else:
        sizes = range(len(exits) - 1, -1, -1)
        found = [(*s, final) for size in sizes for s in itertools.combinations(exits[:-1], size)]
    return list(dict.fromkeys([*found, *((name,) for name in exits)]))


def paths(bundle: Bundle, sets: Iterable[Sequence[str]] | None = None) -> tuple[Case, ...]:
    """
    The paths to time for *bundle*: each exit of each of *sets* (None: kept_sets of its exits).

    Paths whose files up to the exit are byte for byte the same are one Case, the others in its
    `also`. The final exit alone is always there, because costs are told as shares of it.
    UsageError for unknown or no names.
    """
    wanted = kept_sets(bundle.exits) if sets is None else [tuple(kept) for kept in sets]
    seen: set[Kept] = set()
    found: dict[tuple[str, ...], list[tuple[Kept, str]]] = {}
    for names in (*wanted, bundle.exits[-1:]):
        chain = bundle.chain(names)
        kept = tuple(link.exit for link in chain)
        if kept in seen:
            continue
        seen.add(kept)
        digests: tuple[str, ...] = ()
        for link in chain:
            digests = (*digests, digest_of(link.load()))
            found.setdefault(digests, []).append((kept, link.exit))
    return tuple(
        Case(kept=first[0], exit=first[1], also=tuple(rest)) for first, *rest in found.values()
    )

"""
Trainings that prepare a removal, by name.

Callers see PHASES, Facts and Phase. A phase is an Influence on a Fit: after it, chosen() are the
units to remove, scores() ranks all that it looked at, distances() orders blocks; close() takes
its hooks off.
"""

from collections.abc import Callable

from edgeexit.host.prune.growing import Growing
from edgeexit.host.prune.identity import BlockIdentity
from edgeexit.host.prune.phase import Facts, Phase
from edgeexit.host.prune.polarized import Polarized

PHASES: dict[str, Callable[[Facts], Phase]] = {
    "greg-1": lambda facts: Growing(facts, "greg-1", picks=False),
    "greg-2": lambda facts: Growing(facts, "greg-2", picks=True),
    "polarization": lambda facts: Polarized(facts, "polarization"),
    "block-identity": lambda facts: BlockIdentity(facts, "block-identity"),
}

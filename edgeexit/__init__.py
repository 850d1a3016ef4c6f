"""
Early-exit networks on small ARM boards.

The package's face: load_bundle, Runner, Policy, Prediction. They are imported on first use,
so that `edgeexit --help` starts without numpy.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeexit.bundle import Bundle, load_bundle
    from edgeexit.policy import Policy
    from edgeexit.runtime import Prediction, Runner

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "edgeexit.bundle",
    "load_bundle": "edgeexit.bundle",
    "Policy": "edgeexit.policy",
    "Prediction": "edgeexit.runtime",
    "Runner": "edgeexit.runtime",
}

__all__ = ["Bundle", "Policy", "Prediction", "Runner", "load_bundle"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgeexit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)

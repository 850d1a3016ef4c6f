"""
What a board says of itself before anything is asked of it.

Callers see hello, the answer of `edgeexit agent hello`, and facts, its quick part, which loads no
numpy. Nothing here would name one single board (no serial numbers, addresses or host names), and
a broken runtime is a fact, not a failure: it is tried out in a process of its own.
"""

import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from edgeexit import __version__, children
from edgeexit.agent import Talk
from edgeexit.device import identify
from edgeexit.files import Table
from edgeexit.installation import this_installation, try_runtime
from edgeexit.machine import Machine, this_machine
from edgeexit.names import board_home
from edgeexit.state import emulation, machine_facts, read_state

# The version of the result: 1.
SCHEMA = 1


def hello(order: Table, _: Talk) -> Mapping[str, Any]:
    """
    facts, and what a trial of the runtime said (installation.Trial), null if `quick` is ordered.
    """
    order.only("quick")
    is_quick = order.find("quick", bool, False)
    return facts(this_machine()) | {"trial": None if is_quick else asdict(try_runtime())}


def facts(machine: Machine) -> dict[str, Any]:
    """
    What *machine* is and how it feels, ready for JSON.

    Keys: schema, edgeexit; device (which board it is) and model (why: the firmware's text);
    machine (state.machine_facts), state (state.Reading), emulated (why its times mean nothing,
    else null); runtime and its version, null if none is installed; home and free_bytes there;
    clock_s (seconds since 1970); measuring (numbers of processes that measure just now).
    """
    known, home = identify(machine), board_home()
    installed = this_installation(machine, is_quick=True).installed
    runtime = next((name for name in installed if name != "numpy"), None)
    return {
        "schema": SCHEMA,
        "edgeexit": __version__,
        "device": known.name,
        "model": known.model,
        "machine": machine_facts(machine),
        "state": asdict(read_state(machine)),
        "emulated": emulation(machine),
        "runtime": runtime,
        "runtime_version": installed.get(runtime or ""),
        "home": str(home),
        "free_bytes": _free_bytes(home),
        "clock_s": round(time.time()),
        "measuring": children.running("edgeexit.timing"),
    }


def _free_bytes(home: Path) -> int | None:
    """Bytes that this user may still write where *home* is or will be."""
    place = next((folder for folder in (home, *home.parents) if folder.is_dir()), None)
    try:
        return None if place is None else shutil.disk_usage(place).free
    except OSError:
        return None

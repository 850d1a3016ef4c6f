"""
Processes of our own: a fresh interpreter that runs one of the package's modules or a few lines.

Callers see command, environment and running. Hidden here: a checkout that is not installed is found
through PYTHONPATH, and nothing of the current folder is ever imported.
"""

import os
import sys
from pathlib import Path

_PACKAGE_HOME = Path(__file__).resolve().parent.parent


def command(*arguments: str) -> list[str]:
    """The command line of a fresh interpreter: ("-m", module) or ("-c", code, argument...)."""
    # -P: the current folder's modules must not be imported.
    return [sys.executable, "-P", *arguments]


def environment() -> dict[str, str]:
    """The environment in which such a process finds the package that it was started from."""
    known = os.environ.get("PYTHONPATH", "")
    paths = os.pathsep.join(filter(None, [str(_PACKAGE_HOME), known]))
    return {**os.environ, "PYTHONPATH": paths}


def running(module: str) -> list[int]:
    """
    The numbers of the processes on this machine that run *module* by `python -m`.

    Nobody where the system does not let itself be asked: a /proc that shows no process at all.
    """
    import psutil

    try:
        return [
            process.info["pid"]
            for process in psutil.process_iter(["pid", "cmdline"])
            if module in (process.info["cmdline"] or ())
        ]
    except (psutil.Error, OSError, IndexError):  # psutil looks at the last of all numbers
        return []

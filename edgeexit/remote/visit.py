"""
What a board says when one looks in: who we are there, which Python and which edgeexit it has.
"""

from typing import Any

import edgeexit
from edgeexit.errors import DeviceError, printable
from edgeexit.remote.fan import Outcome
from edgeexit.remote.hosts import Host
from edgeexit.remote.link import Link, connect
from edgeexit.remote.talk import last_line

_MARK = "edgeexit-python:"
_PYTHON = f"import platform;print('\\n{_MARK}'+platform.python_version())"


async def look_in(host: Host) -> Outcome:
    """
    Facts about *host*: user, key (pinned or known_hosts), python, edgeexit, device.

    edgeexit and device are None where it is not installed. DeviceError if nobody answers, the
    key is not the known one, we are not let in, or there is no Python 3.
    """
    async with connect(host) as link:
        facts: dict[str, Any] = {
            "user": link.user,
            "key": "pinned" if host.host_key else "known_hosts",
            "python": await _python(link),
            "edgeexit": None,
            "device": None,
        }
        warnings = []
        if await link.program() is not None:
            said = await link.agent("hello", {"quick": True})
            facts |= {"edgeexit": link.version, "device": printable(str(said.get("device")))}
            if host.device not in (None, facts["device"]):
                warnings.append(f"hosts.toml calls it a {host.device}, it is a {facts['device']}")
            if link.version != edgeexit.__version__:
                warnings.append(
                    f"edgeexit {link.version} there, {edgeexit.__version__} here: "
                    f"edgeexit setup {host.name}"
                )
        else:
            warnings.append(f"edgeexit is not installed there yet: edgeexit setup {host.name}")
        return Outcome(facts={**facts, "warnings": warnings})


async def _python(link: Link) -> str:
    done = await link.run(["python3", "-I", "-c", _PYTHON])
    lines = done.out.decode(errors="replace").splitlines()
    found = [line.removeprefix(_MARK) for line in lines if line.startswith(_MARK)]
    if done.code != 0 or not found:
        raise DeviceError(
            f"{link.host.name}: no python3 there ({last_line(done.err)})",
            hint="on the board: sudo apt install python3",
        )
    return printable(found[-1][:40])

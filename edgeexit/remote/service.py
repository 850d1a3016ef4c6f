"""
`edgeexit service` on a board: asked over ssh, as root by sudo where that needs no password.
"""

import shlex
from collections.abc import Sequence

from edgeexit.errors import DeviceError
from edgeexit.names import HOME
from edgeexit.remote.hosts import Host
from edgeexit.remote.link import Done, connect

# What a shell says of a program that is not there.
_NOT_FOUND = 127


async def ask(host: Host, words: Sequence[str], *, as_root: bool) -> Done:
    """
    What `edgeexit service WORDS` says on *host*; any exit code is an answer.

    DeviceError without setup or sudo, or if sudo wants a password there: the hint is then the
    line that does it by hand.
    """
    async with connect(host) as link:
        home, program = await link.home(), await link.program()
        if program is None:
            raise link.absent()
        named = ["env", f"{HOME}={home}", program, "service", *words]
        asked = ["sudo", "-n", *named] if as_root and link.user != "root" else named
        refused = (await link.run(["sudo", "-n", "true"])).code if asked[0] == "sudo" else 0
        if refused == _NOT_FOUND:
            raise DeviceError(
                f"{host.name}: no sudo there, and {link.user} is not root",
                hint="--user-unit needs no root; or log in as root",
            )
        if refused:
            target = f"{link.user}@{host.address}"
            port = [] if host.port in (None, 22) else ["-p", str(host.port)]
            line = shlex.join(["ssh", "-t", *port, target, shlex.join(["sudo", *named])])
            raise DeviceError(f"{host.name}: sudo wants a password there", hint=line)
        return await link.run(asked, timeout_s=300)

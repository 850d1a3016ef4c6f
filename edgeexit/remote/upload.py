"""
Content-addressed upload into HOME/blobs of a board, over sftp, resumed and verified there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from edgeexit.errors import DeviceError

if TYPE_CHECKING:
    from edgeexit.remote.link import Item, Link, Uploaded


async def upload(
    link: "Link", files: Sequence["Item"], on_bytes: Callable[[int], None]
) -> "Uploaded":
    """As Link.upload."""
    from edgeexit.remote.link import Uploaded

    home = await link.home()
    sent = skipped = 0
    async with link.sftp() as sftp:
        await sftp.makedirs(f"{home}/blobs", exist_ok=True)
        for item in files:
            path = f"{home}/blobs/{item.sha256}"
            if await sftp.exists(path):
                skipped += 1
                on_bytes(item.size_bytes)
                continue
            data = item.content.read_bytes() if isinstance(item.content, Path) else item.content
            async with sftp.open(f"{path}.part", "wb") as file:
                await file.write(data)
            sent += len(data)
            on_bytes(len(data))
            done = await link.run(["sha256sum", f"{path}.part"])
            if done.out.split()[:1] != [item.sha256.encode()]:
                raise DeviceError(f"{link.host.name}: {item.sha256}: arrived altered")
            await sftp.posix_rename(f"{path}.part", path)
    return Uploaded(sent_bytes=sent, skipped=skipped)

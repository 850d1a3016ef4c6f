"""
A TCP proxy on loopback that treats a link badly: cuts it, stalls it, slows it, alters bytes.

It runs in a thread with an event loop of its own, so that commands under test need not know.
Bytes are counted from the client to the server, over all connections since `count` was set to 0.
"""

import asyncio
import contextlib
import threading
from types import TracebackType


class FaultyLink:
    """
    A proxy to 127.0.0.1:*target_port* at *port*; the faults may be changed at any time.

    cut_after: bytes after which every connection is broken. stall_after: bytes after which nothing
    moves any more, in either direction. rate: bytes per second, upwards. corrupt_at: the byte
    that arrives altered. All are None for a sound link.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.count = 0
        self.connections = 0
        self.cut_after: int | None = None
        self.stall_after: int | None = None
        self.rate: float | None = None
        self.corrupt_at: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> "FaultyLink":
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def cut(self) -> None:
        """Break every connection now."""
        self._loop.call_soon_threadsafe(self._cut)

    def _cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        except OSError:
            writer.transport.abort()
            return
        mine = {writer, far_writer}
        self._writers |= mine
        tasks = [
            asyncio.ensure_future(self._up(reader, far_writer)),
            asyncio.ensure_future(self._down(far_reader, writer)),
        ]
        try:
            # Python 3.11 logs the end of a handler that was cancelled as an error.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._writers -= mine
            for end in mine:
                end.transport.abort()

    async def _up(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(8192):
            if self.rate is not None:
                await asyncio.sleep(len(data) / self.rate)
            begin, self.count = self.count, self.count + len(data)
            if self.corrupt_at is not None and begin <= self.corrupt_at < self.count:
                place = self.corrupt_at - begin
                data = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
            if self.cut_after is not None and self.count > self.cut_after:
                writer.write(data[: max(0, self.cut_after - begin)])
                await writer.drain()
                return
            await self._stalled()
            writer.write(data)
            await writer.drain()

    async def _down(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(8192):
            await self._stalled()
            writer.write(data)
            await writer.drain()

    async def _stalled(self) -> None:
        while self.stall_after is not None and self.count > self.stall_after:
            await asyncio.sleep(0.05)

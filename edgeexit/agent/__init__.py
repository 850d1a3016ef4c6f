"""
What a board answers over ssh: one line with an order in, JSON lines out.

Callers see Talk, Answer and serve. There is no daemon: `edgeexit agent SUB` is a command that ends
when its work does, or when its stdin does, because then the link is gone and nobody would look at
what it makes. Hidden here: only protocol lines reach stdout, whatever libraries print; a reader
that stopped reading holds nothing up; every end, a signal or a bug too, is a line that can be read.
"""

import json
import os
import queue
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from edgeexit import __version__
from edgeexit.errors import BadFile, UsageError
from edgeexit.files import Table, parse_json

# The version of the protocol: 1.
PROTOCOL = 1

MOST_LINE_BYTES = 4 << 20
ORDER_TIMEOUT_S = 60.0
# A pipe takes lines up to this length whole or not at all (PIPE_BUF).
_MOST_PROGRESS_BYTES = 4096
_AGAIN_S = 2.0
_ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Refusal = tuple[str, str | None, int]
"""The one-line message, the hint and the exit code of an exception."""


class Talk:
    """
    The conversation with whoever gave the order, while it is carried out.

    The end of stdin, SIGINT, SIGTERM and SIGHUP are a KeyboardInterrupt in whatever runs then.
    """

    def __init__(self, order_fd: int, out_fd: int) -> None:
        self._in, self._out = order_fd, out_fd
        self._lines: queue.Queue[bytes | None] = queue.Queue()
        self._is_over = threading.Event()

    def progress(self, **facts: Any) -> None:
        """Tell how far the work is, if anybody reads and the line is at most 4 KiB long."""
        data = _line({"progress": facts})
        # A link that stands still must not hold the work up.
        if len(data) > _MOST_PROGRESS_BYTES or not select.select([], [self._out], [], 0)[1]:
            return
        try:
            os.write(self._out, data)
        except BrokenPipeError as error:
            raise KeyboardInterrupt from error

    def need(self, **facts: Any) -> Table:
        """Ask for what the work cannot do without, and wait for the line that answers."""
        try:
            _write(self._out, _line({"need": facts}))
        except BrokenPipeError as error:
            raise KeyboardInterrupt from error
        return _parsed(self._lines.get(), "answer")

    def order(self) -> Table:
        """The first line. UsageError if it does not come, BadFile if it is no JSON object."""
        try:
            return _parsed(self._lines.get(timeout=ORDER_TIMEOUT_S), "order")
        except queue.Empty:
            raise UsageError(f"order: none within {ORDER_TIMEOUT_S:g} s") from None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Read stdin and heed signals within the block; afterwards nothing interrupts any more."""
        for number in _ENDINGS:
            signal.signal(number, signal.default_int_handler)
        threading.Thread(target=self._listen, daemon=True).start()
        try:
            yield
        finally:
            for number in _ENDINGS:
                signal.signal(number, signal.SIG_IGN)
            self._is_over.set()

    def _listen(self) -> None:
        data = b""
        with suppress(OSError):
            while part := os.read(self._in, 1 << 16):
                *lines, data = (data + part).split(b"\n")
                for line in lines:
                    self._lines.put(line)
                if len(data) > MOST_LINE_BYTES:
                    self._lines.put(None)
                    data = b""
        # Python drops an interrupt that falls into a destructor: it is sent until the work ends.
        while not self._is_over.is_set():
            # To the main thread, not to the process: there it also ends a call that waits.
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            self._is_over.wait(_AGAIN_S)


Answer = Callable[[Table, Talk], Mapping[str, Any]]
"""
What a subcommand does: from the order to the result, a JSON object.

It raises an EdgeExitError to refuse, and meets KeyboardInterrupt when the link goes: it then
leaves behind only what a later order can go on from.
"""


def serve(
    find: Callable[[], Answer],
    explain: Callable[[BaseException], Refusal],
    *,
    order_fd: int = 0,
    out_fd: int = 1,
) -> int:
    """
    Greet, read one order from *order_fd*, let the answer that *find* gives work, and say its end.

    Returns the exit code: 0 with a result line, else that of the error line, as *explain* tells it.
    """
    out = os.dup(out_fd)
    # A library that prints must not speak into the protocol.
    sys.stdout.flush()
    os.dup2(2, out_fd)
    with suppress(BrokenPipeError):
        _write(out, _line({"agent": PROTOCOL, "edgeexit": __version__}))
    talk, code = Talk(order_fd, out), 0
    try:
        with talk.listening():
            answer = find()
            end = _line({"result": answer(talk.order(), talk)})
    except BaseException as error:
        message, hint, code = explain(error)
        end = _line({"error": {"message": message, "hint": hint, "exit_code": code}})
    with suppress(BrokenPipeError):
        _write(out, end)
    os.close(out)
    return code


def _parsed(line: bytes | None, where: str) -> Table:
    if line is None:
        raise BadFile(f"{where}: a line of more than {MOST_LINE_BYTES} bytes")
    return parse_json(line, where)


def _line(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, allow_nan=False).encode() + b"\n"


def _write(out: int, data: bytes) -> None:
    while data:
        data = data[os.write(out, data) :]

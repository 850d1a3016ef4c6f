"""UNTESTED on a real meter: watts of an RDTech UM24C, UM25C or UM34C over Bluetooth, 2 Hz.

    sudo rfcomm bind 0 MAC; python3 um25c.py /dev/rfcomm0
    edgeexit: --meter command:'python3 um25c.py /dev/rfcomm0',timeout=20

The meter answers the byte 0xf0 with 130 bytes, of which 6 to 9 are milliwatts, big-endian; that is
how sigrok.org/wiki/RDTech_UM_series and github.com/rfinnie/rdserialtool describe it. It measures
about twice a second: a window needs 20 s. The values come late by the Bluetooth link, some 0.1 s.
"""

import os
import select
import struct
import sys
import termios
import time
import tty

ANSWER_BYTES = 130
PERIOD_S = 0.5
SILENCE_S = 10.0


def watts(answer: bytes) -> float | None:
    """The power in a meter's *answer*; None if it is no whole answer."""
    if len(answer) != ANSWER_BYTES:
        return None
    return struct.unpack_from(">I", answer, 6)[0] / 1000


def ask(device: int) -> bytes:
    """One answer, or as much of it as came within two seconds."""
    termios.tcflush(device, termios.TCIFLUSH)
    os.write(device, b"\xf0")
    answer = b""
    deadline = time.monotonic() + 2.0
    while len(answer) < ANSWER_BYTES and time.monotonic() < deadline:
        ready, _, _ = select.select([device], [], [], max(0.0, deadline - time.monotonic()))
        if ready:
            answer += os.read(device, ANSWER_BYTES - len(answer))
    return answer


def main() -> None:
    """Print watts until the meter is gone."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: um25c.py /dev/rfcomm0")
    device = os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY)
    tty.setraw(device)
    heard_s = tick_s = time.monotonic()
    while True:
        value = watts(ask(device))
        now_s = time.monotonic()
        if value is not None:
            heard_s = now_s
            print(f"{value:.3f}", flush=True)
        if now_s - heard_s > SILENCE_S:
            raise SystemExit(f"{sys.argv[1]}: no answer for {SILENCE_S:g} s")
        tick_s = max(tick_s + PERIOD_S, now_s)
        time.sleep(max(0.0, tick_s - time.monotonic()))


if __name__ == "__main__":
    main()

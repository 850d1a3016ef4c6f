"""UNTESTED on a real meter: watts of an FNIRSI FNB48, FNB48S, FNB58 or C1, 25 Hz.

    python3 fnb58.py [/dev/hidraw0]        edgeexit: --meter command:'python3 fnb58.py'

These USB meters are HID devices that give 100 samples a second, four in a report; a line is the
mean of a report. What is known of their reports (kinds, offsets, units, checksum) comes from
github.com/baryluk/fnirsi-usb-power-data-logger, which was worked out from FNB48s; the checksum is
confirmed by the requests themselves. Linux only; reading /dev/hidraw* needs a udev rule or root.
"""

import os
import select
import struct
import sys
import time
from pathlib import Path

# Vendor and product as the kernel spells them in HID_ID.
METERS = {
    "0003:00000483:0000003A": "FNB48",
    "0003:00000483:0000003B": "C1",
    "0003:00002E3C:00005558": "FNB58",
    "0003:00002E3C:00000049": "FNB48S",
}
REPORT_BYTES = 64
DATA = 0x04
SAMPLE_BYTES = 15
SILENCE_S = 5.0


def checksum(data: bytes) -> int:
    """CRC-8 of a report's bytes between the first and the last: polynomial 0x39 from 0x42."""
    value = 0x42
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value << 1 ^ 0x39) & 0xFF if value & 0x80 else value << 1
    return value


def request(kind: int) -> bytes:
    """The report that asks for something: 0x81 and 0x82 begin, 0x83 goes on."""
    body = bytes([kind]) + bytes(REPORT_BYTES - 3)
    return b"\xaa" + body + bytes([checksum(body)])


def watts(report: bytes) -> float | None:
    """Mean power of the four samples in *report*; None if it holds none or is damaged."""
    if len(report) != REPORT_BYTES or report[:2] != bytes([0xAA, DATA]):
        return None
    if checksum(report[1:-1]) != report[-1]:
        return None
    samples = (struct.unpack_from("<II", report, 2 + k * SAMPLE_BYTES) for k in range(4))
    return sum(volts * amps for volts, amps in samples) / 4 * 1e-10


def find(wanted: str | None) -> tuple[Path, str]:
    """The device of the meter that is plugged in (or called *wanted*), and what it is."""
    for entry in sorted(Path("/sys/class/hidraw").glob("hidraw*")):
        text = (entry / "device/uevent").read_text()
        found = [line.partition("=")[2] for line in text.splitlines() if line.startswith("HID_ID=")]
        path = Path("/dev") / entry.name
        if found and found[0].upper() in METERS and wanted in (None, str(path)):
            return path, METERS[found[0].upper()]
    raise SystemExit("no FNIRSI meter found: is its PC port (not only the measured one) connected?")


def main() -> None:
    """Print watts until the meter is unplugged."""
    path, name = find(sys.argv[1] if len(sys.argv) > 1 else None)
    is_new = name in ("FNB58", "FNB48S")
    device = os.open(path, os.O_RDWR)
    # hidraw takes the number of the report first: 0, because they are not numbered.
    for kind in (0x81, 0x82, 0x82 if is_new else 0x83):
        os.write(device, b"\0" + request(kind))
    asked_s = heard_s = time.monotonic()
    while True:
        ready, _, _ = select.select([device], [], [], 1.0)
        now_s = time.monotonic()
        if ready:
            value = watts(os.read(device, REPORT_BYTES))
            if value is not None:
                heard_s = now_s
                print(f"{value:.5f}", flush=True)
        # The newer ones go on for a while, the older ones want to be asked for every report.
        if now_s - asked_s >= (1.0 if is_new else 0.003):
            os.write(device, b"\0" + request(0x83))
            asked_s = now_s
        if now_s - heard_s > SILENCE_S:
            raise SystemExit(f"{path}: no data for {SILENCE_S:g} s")


if __name__ == "__main__":
    main()

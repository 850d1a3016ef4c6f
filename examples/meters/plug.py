"""UNTESTED on a real plug (tested against its documented answers): watts of a smart plug, 1 Hz.

    python3 plug.py shelly 192.168.1.20        edgeexit: --meter command:'python3 plug.py shelly IP'

shelly: a Shelly of the second generation or later (Plus, Pro, Gen3, ...): /rpc/Switch.GetStatus.
shelly1: one of the first: /status. tasmota: any plug with that firmware: /cm?cmnd=Status 8; set
WattRes 3 there, because it prints whole watts by default. Numbers are watts at the socket: the
losses of the power supply are inside. A window needs 40 s.
"""

import json
import sys
import time
import urllib.error
import urllib.request

# Kind -> path, and the way to the watts in the answer.
KINDS = {
    "shelly": ("/rpc/Switch.GetStatus?id=0", ("apower",)),
    "shelly1": ("/status", ("meters", 0, "power")),
    "tasmota": ("/cm?cmnd=Status%208", ("StatusSNS", "ENERGY", "Power")),
}
PERIOD_S = 1.0
MOST_FAILURES = 10
MOST_BYTES = 1 << 20


def watts(kind: str, answer: bytes) -> float:
    """The power in a plug's *answer*."""
    found = json.loads(answer)
    for step in KINDS[kind][1]:
        found = found[step]
    return float(found)


def main() -> None:
    """Print watts until the plug is gone."""
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        raise SystemExit(f"usage: plug.py {'|'.join(KINDS)} HOST[:PORT]")
    kind, host = sys.argv[1:]
    url = f"http://{host}{KINDS[kind][0]}"
    failures = 0
    tick_s = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(url, timeout=2) as reply:
                value = watts(kind, reply.read(MOST_BYTES))
        except (OSError, urllib.error.URLError, ValueError, LookupError, TypeError) as error:
            failures += 1
            print(f"{url}: {type(error).__name__}: {error}", file=sys.stderr)
            if failures > MOST_FAILURES:
                raise SystemExit(f"{url}: does not answer as a {kind} plug") from error
        else:
            failures = 0
            print(f"{value:.3f}", flush=True)
        tick_s = max(tick_s + PERIOD_S, time.monotonic())
        time.sleep(max(0.0, tick_s - time.monotonic()))


if __name__ == "__main__":
    main()

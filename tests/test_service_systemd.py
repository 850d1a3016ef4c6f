"""
The unit under a real systemd, which boots in a container with all of its fences.

Needs root, systemd and systemd-nspawn (Debian: systemd-container); nothing is installed, the
container's /usr is this machine's, read-only.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_runtime import SAMPLES
from test_serve import activate, bring

from edgeexit.releases import Releases

CHECKOUT = Path(__file__).resolve().parents[1]
INIT = Path("/usr/lib/systemd/systemd")
PROBE = """#!/bin/bash
exec > /out/log 2>&1
export EDGEEXIT_HOME=/srv/edgeexit
edgeexit() {{ {python} -P -m edgeexit "$@"; }}
say() {{ echo "$1=$2" >> /out/facts; }}
show() {{ systemctl show -p "$1" --value edgeexit-tiny; }}
wait_for() {{ for k in $(seq 300); do [ "$(show $1)" = "$2" ] && return; sleep 0.1; done; }}
mkdir -p /etc/systemd/system/edgeexit-tiny.service.d
printf '[Service]\\nWatchdogSec=3\\nTimeoutStopSec=3\\n' \\
    > /etc/systemd/system/edgeexit-tiny.service.d/quick.conf
edgeexit service install replay:/srv/a.npy,fps=20,times=1000000; say install $?
edgeexit service status; say status $?
pid=$(show MainPID)
say uid $(stat -c %u /proc/$pid)
say seccomp $(sed -n 's/^Seccomp:[^0-9]*//p' /proc/$pid/status)
say privileges $(sed -n 's/^CapBnd:[^0-9a-f]*//p' /proc/$pid/status)
ln -s releases/$(cat /srv/next) /srv/edgeexit/apps/tiny/new
mv -T /srv/edgeexit/apps/tiny/new /srv/edgeexit/apps/tiny/current
sleep 5
say healthy $(show NRestarts)
say same_process $([ $pid = $(show MainPID) ] && echo yes)
kill -STOP $pid
wait_for NRestarts 1
wait_for ActiveState active
say restarts $(show NRestarts)
say again $(show ActiveState)
began=$(date +%s%N)
systemctl stop edgeexit-tiny; say stop $?
say stop_ms $((($(date +%s%N) - began) / 1000000))
say result $(show Result)
journalctl -u edgeexit-tiny --no-pager -o cat > /out/journal
edgeexit service uninstall; say uninstall $?
"""
BOOT = """[Service]
Type=simple
Environment=PATH=/usr/bin:/bin
ExecStart=-/probe
ExecStopPost=/bin/systemctl poweroff --no-block
"""


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None or os.geteuid() != 0 or not INIT.exists():
        pytest.skip(f"LOUDLY: no {program}, no root or no systemd: the unit never runs for real")
    return found


def make_root(folder: Path) -> Path:
    root = folder / "root"
    for name in ("etc/systemd/system/multi-user.target.wants", "out", "srv", "usr", "var/log"):
        (root / name).mkdir(parents=True)
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "home", "var/tmp", "mnt"):
        (root / name).mkdir()
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    shutil.copy("/etc/passwd", root / "etc/passwd")
    shutil.copy("/etc/group", root / "etc/group")
    (root / "etc/os-release").symlink_to("../usr/lib/os-release")
    (root / "etc/machine-id").write_text("")
    units = root / "etc/systemd/system"
    (units / "probe.service").write_text(BOOT)
    (units / "multi-user.target.wants/probe.service").symlink_to("../probe.service")
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    (root / "probe").write_text(PROBE.format(python=sys.executable))
    (root / "probe").chmod(0o755)
    return root


@pytest.mark.slow
def test_systemd_starts_watches_and_ends_the_service(tmp_path: Path) -> None:
    nspawn = need("systemd-nspawn")
    root = make_root(tmp_path)
    releases = Releases(root / "srv/edgeexit", "tiny")
    one, two = (bring(releases, tmp_path / "made", note) for note in "ab")
    activate(releases, one)
    (root / "srv/next").write_text(two)
    np.save(root / "srv/a.npy", SAMPLES)
    seen = dict.fromkeys(map(str, (CHECKOUT, sys.prefix, sys.base_prefix, "/usr")))
    # Where cgroups are of the old kind, the container's have to be, too.
    is_old = Path("/sys/fs/cgroup/systemd").is_dir()
    hierarchy = {"SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "0"} if is_old else {}
    done = subprocess.run(
        [
            *(nspawn, "-D", str(root), "--register=no", "--keep-unit", "--private-network"),
            *(f"--bind-ro={path}" for path in seen),
            str(INIT),
        ],
        env={**os.environ, **hierarchy},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=180,
        check=False,
    )
    log = (root / "out/log").read_text() if (root / "out/log").exists() else done.stdout.decode()
    assert (root / "out/facts").exists(), log[-2000:]
    pairs = (line.partition("=") for line in (root / "out/facts").read_text().splitlines())
    facts: dict[str, Any] = {key: value for key, _, value in pairs}
    journal = (root / "out/journal").read_text()

    assert facts["install"] == facts["status"] == facts["stop"] == facts["uninstall"] == "0", log
    assert int(facts["uid"]) > 60000, "a user that systemd made up"
    assert facts["seccomp"] == "2"
    assert int(facts["privileges"], 16) == 0
    assert (facts["healthy"], facts["same_process"]) == ("0", "yes"), "the watchdog was fed"
    assert f"release {two} runs now, {one} did before" in journal
    assert "Watchdog timeout" in journal
    assert (facts["restarts"], facts["again"]) == ("1", "active"), json.dumps(facts)
    assert int(facts["stop_ms"]) < 5000
    assert facts["result"] == "success"

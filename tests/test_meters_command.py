"""A program as a meter: whatever it prints, the answer is a value or a refusal, in time."""

import http.server
import importlib.util
import itertools
import math
import os
import pty
import select
import shlex
import struct
import sys
import threading
import time
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.device import find_device
from edgeexit.errors import DeviceError, EdgeExitError, UsageError
from edgeexit.machine import Machine
from edgeexit.meters import EnergyMeter, Sample, open_meter
from edgeexit.meters.command import ENERGIES, POWERS, Values

HOST = find_device("host")
EXAMPLES = Path(__file__).parent.parent / "examples" / "meters"


def meter(script: str, options: str = "") -> EnergyMeter:
    """The meter that the shell *script* is."""
    # A spec's quotes are plain: what is inside is taken as it stands.
    return open_meter(f"command:sh -c {shlex.quote(script)}{options}", Machine(), HOST)


def taken(script: str, options: str = "", count: int = 3) -> list[Sample]:
    found = meter(script, options)
    try:
        return list(itertools.islice(found.samples(), count))
    finally:
        found.close()


def forever(line: str) -> str:
    return f"while :; do echo {shlex.quote(line)}; sleep 0.01; done"


@pytest.mark.parametrize(
    ("line", "options", "power_mw"),
    [
        ("5.125", "", 5125),
        ("  5.125 W  ", "", 5125),
        ("5.125W", "", 5125),
        ("5125", ",unit=mW", 5125),
        ("power=5.125 voltage=5.02", ",key=power", 5125),
        ("voltage: 5.02 V, power: 5.125 W", ",key=power", 5125),
        ("xpower=1 power = 5.125", ",key=power", 5125),
        ('{"volts": "a", "watts": 5.125}', "", 5125),
        ('{"t": 1, "watts": 5.125}', ",key=watts", 5125),
        ('{"StatusSNS": {"ENERGY": {"Power": "5.125"}}}', ",key=StatusSNS.ENERGY.Power", 5125),
        ('{"a.b": 5.125, "a": {"b": 1}}', ",key=a.b", 5125),
        ("12:00:01,5.02,5.125", ",column=3", 5125),
        ("12:00:01; 5.02; 5.125", ",column=3", 5125),
        ("1657568326.775 0 5.0 5.125", ",column=4", 5125),
    ],
)
def test_a_line_is_understood(line: str, options: str, power_mw: float) -> None:
    samples = taken(forever(line), options + ",rate=100", 2)

    assert [s.power_mw for s in samples] == [power_mw, power_mw]
    assert samples[0].at_ns < samples[1].at_ns <= time.monotonic_ns()


def test_a_column_is_found_by_its_name_in_the_header() -> None:
    script = f"echo time,volts,watts; {forever('1,5.0,2.5')}"

    assert taken(script, ",column=watts,rate=100", 1)[0].power_mw == 2500


@pytest.mark.parametrize(("unit", "in_mj"), ENERGIES.items())
def test_joules_are_a_counter(unit: str, in_mj: float) -> None:
    script = "i=100; while :; do echo $i; i=$((i+1)); sleep 0.01; done"
    first, second = taken(script, f",unit={unit},rate=100", 2)

    assert first.power_mw is None
    assert second.energy_mj is not None
    assert first.energy_mj is not None
    assert second.energy_mj - first.energy_mj == pytest.approx(in_mj, rel=0.001)


def test_a_counter_that_falls_is_refused() -> None:
    with pytest.raises(DeviceError, match="counter fell from 9000 mJ to 1000 mJ"):
        taken(
            "while :; do echo 9; sleep 0.02; echo 9; sleep 0.02; echo 1; sleep 0.02; done",
            ",unit=J,rate=50",
            99,
        )


def test_the_info_says_what_is_known_and_no_more() -> None:
    found = meter("while :; do echo 1; sleep 0.02; done", ",delay=0.5,boundary=the 5 V line")
    found.close()
    info = found.info

    assert (info.kind, info.label, info.boundary) == ("command", "external", "the 5 V line")
    assert 5 < info.rate_hz <= 50
    assert info.details["delay_s"] == 0.5
    assert info.details["program"] == "sh"


def test_the_rate_is_seen_past_a_hurried_start() -> None:
    found = meter("echo 1; sleep 0.005; echo 1; sleep 0.005; while :; do echo 1; sleep 0.05; done")
    found.close()

    assert 8 < found.info.rate_hz <= 20


def test_a_known_delay_is_taken_off_the_time_stamps() -> None:
    now_ns = time.monotonic_ns()
    sample = taken(forever("1"), ",delay=30,rate=100", 1)[0]

    assert -30 < (sample.at_ns - now_ns) / 1e9 < -20


def test_lines_that_arrive_together_are_one_sample() -> None:
    samples = taken("while :; do printf '1\\n3\\n'; sleep 0.03; done", ",rate=30", 4)

    assert 2000 in [s.power_mw for s in samples]


def test_a_program_that_buffers_its_output_is_refused() -> None:
    with pytest.raises(DeviceError, match="in bursts") as refusal:
        taken(
            "while :; do printf '1\\n2\\n3\\n4\\n5\\n6\\n7\\n8\\n'; sleep 0.03; done",
            ",rate=30",
            99,
        )

    assert "stdbuf" in str(refusal.value.hint)


@pytest.mark.parametrize(
    "line", ["nan", "inf", "-1", "hello", "5.1 mW", "1_000", "{", '{"a": 1, "b": 2}', "5,125"]
)
def test_a_program_that_prints_no_values_is_refused(line: str) -> None:
    with pytest.raises(DeviceError, match=r"lines hold no value, such as"):
        taken(f"while :; do echo {shlex.quote(line)}; done")


def test_a_few_strange_lines_are_skipped_and_many_are_not() -> None:
    good = "for i in 1 2 3 4 5 6 7 8 9; do echo 1; sleep 0.003; done; echo nan;"
    bad = "echo 1; sleep 0.003; echo nan; sleep 0.003;"

    assert len(taken(f"while :; do {good} done", ",rate=100", 60)) == 60
    with pytest.raises(DeviceError, match="lines hold no value"):
        taken(f"while :; do {bad} done", ",rate=100", 60)


def test_a_program_that_ends_is_said_with_its_last_words() -> None:
    with pytest.raises(DeviceError, match="ended with code 3: no such meter"):
        taken("echo 1; sleep 0.02; echo no such meter >&2; exit 3", ",rate=10")
    with pytest.raises(DeviceError, match="program ended") as refusal:
        taken("echo 1", ",rate=10")
    assert "every=" in str(refusal.value.hint)
    with pytest.raises(DeviceError, match="signal 9"):
        taken("echo 1; sleep 0.02; kill -9 $$", ",rate=10")


def test_a_program_that_hangs_is_not_waited_for() -> None:
    began = time.monotonic()
    with pytest.raises(DeviceError, match=r"no value for 0\.3 s"):
        taken("echo 1; sleep 1000", ",timeout=0.3,rate=10")

    assert time.monotonic() - began < 30


def test_a_program_without_line_ends_is_refused() -> None:
    with pytest.raises(DeviceError, match="without a line end"):
        taken("cat /dev/zero")


def test_an_endless_complaint_takes_no_memory() -> None:
    assert len(taken(f"yes no >&2 & {forever('1')}", ",rate=100", 5)) == 5


def test_a_program_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    taken(f"sleep 1000 & echo $! > {note}; trap '' TERM; {forever('1')}", ",rate=100", 1)
    pid = int(note.read_text())

    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.02)
    pytest.fail("the program's child lives on")


def test_a_program_run_for_each_value() -> None:
    samples = taken("echo starting; echo 2.5", ",every=0.02", 3)

    assert [s.power_mw for s in samples] == [2500] * 3
    steps_ms = (samples[2].at_ns - samples[0].at_ns) / 1e6
    assert steps_ms >= 35


def test_a_run_that_fails_now_and_then_is_left_out(tmp_path: Path) -> None:
    count = tmp_path / "count"
    script = f"echo >> {count}; [ $(wc -l < {count}) -eq 2 ] && exit 1; echo 1"

    assert len(taken(script, ",every=0.02", 3)) == 3


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("exit 1", "ended with code 1"),
        ("sleep 1000", "did not end within 0.2 s"),
        ("true", "the program ended"),
        ("echo x", "the program ended"),
    ],
)
def test_runs_that_fail_are_refused_at_once(script: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        taken(script, ",every=0.02,timeout=0.2")


def test_runs_that_fail_for_good_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="ended with code 1"):
        taken(f"[ -e {tmp_path}/x ] && exit 1; touch {tmp_path}/x; echo 1", ",every=0.01", 9)


@pytest.mark.parametrize(
    "spec",
    [
        "command",
        "command:'sh",
        'command:sh "a',
        "command:true,unit=horses",
        "command:true,label=measured",
        "command:true,column=0",
        "command:true,column=",
        "command:true,column=1,key=a",
        "command:true,key=",
        "command:true,every=0",
        "command:true,every=nan",
        "command:true,every=1,rate=1",
        "command:true,every=1,column=watts",
        "command:true,timeout=1e9",
        "command:true,delay=-1",
        "command:true,colour=red",
    ],
)
def test_a_wrong_spec_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError):
        open_meter(spec, Machine(), HOST)


def test_a_program_that_is_not_there_is_a_device_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot start 'no-such-meter'"):
        open_meter("command:no-such-meter --watts", Machine(), HOST)
    with pytest.raises(DeviceError, match="cannot start"):
        open_meter(f"command:{tmp_path}", Machine(), HOST)


def test_there_is_no_shell(tmp_path: Path) -> None:
    with pytest.raises(EdgeExitError):
        open_meter(f"command:echo 1 > {tmp_path}/made; sleep 1", Machine(), HOST)

    assert not (tmp_path / "made").exists()


def test_python_programs_print_at_once() -> None:
    script = "import time; [print(1) or time.sleep(0.02) for _ in iter(int, 1)]"
    found = open_meter(f"command:{sys.executable} -c {shlex.quote(script)}", Machine(), HOST)
    try:
        assert len(list(itertools.islice(found.samples(), 3))) == 3
    finally:
        found.close()


def example(name: str) -> ModuleType:
    """A program of examples/meters as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "last"), [(0x81, 0x8E), (0x82, 0x96), (0x83, 0x9E)])
def test_an_fnb58_is_asked_as_its_own_software_does(kind: int, last: int) -> None:
    """The three requests are known as whole reports: so is how the checksum is made."""
    request = example("fnb58").request(kind)

    assert (len(request), request[0], request[1], request[-1]) == (64, 0xAA, kind, last)


def test_an_fnb58s_report_is_read_and_a_damaged_one_is_not() -> None:
    fnb58 = example("fnb58")
    body = b"\x04" + b"".join(
        struct.pack("<IIHHBH", 510_000, 100_000 * amps, 0, 0, 1, 250) for amps in (1, 1, 2, 2)
    )
    body += b"\0" * (62 - len(body))
    report = b"\xaa" + body + bytes([fnb58.checksum(body)])

    assert fnb58.watts(report) == pytest.approx(5.1 * 1.5)
    assert fnb58.watts(report[:9] + b"\x55" + report[10:]) is None
    assert fnb58.watts(fnb58.request(0x83)) is None
    assert fnb58.watts(report[:63]) is None


def test_a_um25c_is_read_over_its_serial_line() -> None:
    """A pseudo terminal answers as the meter does: 130 bytes for each 0xf0."""
    ours, theirs = pty.openpty()
    stop = threading.Event()

    def answer() -> None:
        while not stop.is_set():
            if select.select([ours], [], [], 0.05)[0] and b"\xf0" in os.read(ours, 10):
                os.write(ours, struct.pack(">HHHI120x", 0x0963, 5100, 8000, 4080))

    thread = threading.Thread(target=answer)
    thread.start()
    spec = f"command:{sys.executable} {EXAMPLES}/um25c.py {os.ttyname(theirs)},rate=2"
    try:
        found = open_meter(spec, Machine(), HOST)
        assert next(found.samples()).power_mw == 4080
        found.close()
    finally:
        stop.set()
        thread.join()
        os.close(ours)
        os.close(theirs)
    assert found.info.details["program"].endswith("um25c.py")


PLUGS = {
    "shelly": ("/rpc/Switch.GetStatus?id=0", '{"id":0,"output":true,"apower":4.8,"voltage":230.1}'),
    "shelly1": ("/status", '{"meters":[{"power":4.8,"is_valid":true,"total":439237}]}'),
    "tasmota": (
        "/cm?cmnd=Status%208",
        '{"StatusSNS":{"Time":"2022-01-11T21:57:38","ENERGY":{"Power":4.8,"Voltage":233}}}',
    ),
}


@pytest.mark.parametrize("kind", PLUGS)
def test_a_plug_is_read_over_http(kind: str) -> None:
    path, text = PLUGS[kind]

    class Plug(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == path else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Plug) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            port = server.server_address[1]
            spec = f"command:{sys.executable} {EXAMPLES}/plug.py {kind} 127.0.0.1:{port},rate=1"
            found = open_meter(spec, Machine(), HOST)
            try:
                assert next(found.samples()).power_mw == 4800
            finally:
                found.close()
        finally:
            server.shutdown()
            thread.join()
    assert "127.0.0.1" not in str(found.info)


@pytest.mark.parametrize("name", ["fnb58", "um25c", "plug"])
def test_an_example_that_nobody_tried_on_the_real_thing_says_so_first(name: str) -> None:
    assert "UNTESTED on a real" in (EXAMPLES / f"{name}.py").read_text().splitlines()[0]


@settings(max_examples=300, deadline=None)
@given(
    line=st.text(max_size=60) | st.from_regex(r"[-+0-9.eE_]+ ?[a-zA-Z]{0,3}", fullmatch=True),
    key=st.sampled_from([None, "p", "a.b", "="]),
    column=st.sampled_from([None, "1", "2", "x"]),
    unit=st.sampled_from([*POWERS, *ENERGIES]),
)
def test_any_line_is_a_sound_value_or_none(
    line: str, key: str | None, column: str | None, unit: str
) -> None:
    options = (
        {"unit": unit} | ({"key": key} if key else {}) | ({"column": column} if column else {})
    )
    value = Values(options, "command").value(line)

    assert value is None or (math.isfinite(value) and value >= 0)


def test_a_comma_parts_values_but_is_no_decimal_point() -> None:
    values = Values({"key": "power"}, "command")

    assert values.value("voltage=5.02,power=5.125,current=1") == 5125
    assert values.value("power=5,125") is None


@given(value=st.floats(0, 1e9), unit=st.sampled_from(list(POWERS)))
def test_a_plain_number_is_the_value_in_its_unit(value: float, unit: str) -> None:
    found = Values({"unit": unit}, "command").value(f"{value} {unit}")

    assert found == pytest.approx(value * POWERS[unit])

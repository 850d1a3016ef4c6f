"""The Raspberry Pi 5's rails: text from the firmware, paired by name, refused when cut."""

import struct
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.device import find_device
from edgeexit.errors import DeviceError, UsageError
from edgeexit.meters import find_meters, open_meter, pmic
from edgeexit.meters.pmic import (
    INPUT_OFFSET_MW,
    INPUT_SLOPE,
    Pmic,
    Unsound,
    estimated_input_mw,
    firmware_text,
    parse_sweep,
)
from tests.trees import PMIC, put, tree

RPI5 = find_device("rpi5")
ASK = "vcgencmd pmic_read_adc"


def opened(folder: Path, text: str | None = PMIC, spec: str = "pmic") -> Pmic:
    meter = open_meter(spec, tree(folder, "rpi5", commands={ASK: text}), RPI5)
    assert isinstance(meter, Pmic)
    return meter


def exact_mw(text: str) -> Fraction:
    """Another reading of the text, rail by rail, with exact fractions."""
    amperes, volts = {}, {}
    for line in text.split("\n"):
        name, _, value = line.strip().partition(" ")
        if name.endswith("_A"):
            amperes[name[:-2]] = Fraction(value.partition("=")[2].rstrip("A"))
        elif name.endswith("_V"):
            volts[name[:-2]] = Fraction(value.partition("=")[2].rstrip("V"))
    return 1000 * sum((amperes[name] * volts[name] for name in amperes), Fraction(0))


def test_the_reading_is_the_sum_of_volts_times_amperes_of_twelve_rails(tmp_path: Path) -> None:
    meter = opened(tmp_path)

    assert meter.read() == float(exact_mw(PMIC))
    assert meter.read() == pytest.approx(1827.047, abs=0.001)
    assert len(meter.info.details["rails"]) == 12
    assert "EXT5V" not in meter.info.details["rails"]
    assert meter.info.details["supply_v"] == 5.12936


def test_it_is_partial_and_the_estimate_of_the_input_is_no_reading(tmp_path: Path) -> None:
    info = opened(tmp_path).info

    assert info.label == "partial"
    assert "USB" in info.boundary
    assert info.details["input_estimate"]["slope"] == INPUT_SLOPE
    assert "jfikar/RPi5-power" in info.details["input_estimate"]["source"]
    assert estimated_input_mw(10_000) == 1.1451 * 10_000 + 587.9 == 11451 + INPUT_OFFSET_MW


LINES = PMIC.splitlines()
RAILS = [line.split()[0] for line in LINES]


@given(
    st.permutations(LINES),
    st.lists(st.integers(0, 999), min_size=len(LINES), max_size=len(LINES)),
    st.lists(st.sampled_from(["", " ", "\t  "]), min_size=len(LINES), max_size=len(LINES)),
)
def test_rails_are_paired_by_name_whatever_their_order_and_indices(
    lines: list[str], indices: list[int], blanks: list[str]
) -> None:
    changed = [
        f"{blank}{line[: line.index('(')].strip()}({index}){line[line.index(')') + 1 :]}"
        for line, index, blank in zip(lines, indices, blanks, strict=True)
    ]

    assert parse_sweep("\r\n".join(changed)).power_mw == parse_sweep(PMIC).power_mw


@given(
    st.dictionaries(
        st.from_regex(r"[A-Z0-9][A-Z0-9_]{0,9}", fullmatch=True),
        st.tuples(st.integers(0, 2 * 10**9), st.integers(0, 6 * 10**8)),
        min_size=1,
        max_size=16,
    )
)
def test_any_rails_add_up_exactly(rails: dict[str, tuple[int, int]]) -> None:
    lines = []
    for index, (name, (amperes, volts)) in enumerate(rails.items()):
        lines.append(f"{name}_A current({index})={amperes / 10**8:.8f}A")
        lines.append(f"{name}_V volt({index + 50})={volts / 10**8:.8f}V")

    expected = Fraction(sum(a * v for a, v in rails.values()), 10**13)

    assert parse_sweep("\n".join(lines)).power_mw == float(expected)


def test_rails_that_read_zero_are_readings(tmp_path: Path) -> None:
    zero = PMIC.replace("=0.81262990A", "=0.00000000A")

    assert opened(tmp_path, zero).read() == float(exact_mw(zero))


def test_a_board_without_such_a_chip_is_told_so(tmp_path: Path) -> None:
    machine = tree(tmp_path, "rpi4")

    with pytest.raises(DeviceError, match="Command not registered") as refusal:
        open_meter("pmic", machine, find_device("rpi4"))
    assert "Raspberry Pi 5" in str(refusal.value.hint)
    found = [one for one in find_meters(machine, find_device("rpi4")) if one.spec == "pmic"]
    assert found[0].reason


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "not there"),
        ("", "no rail at all"),
        ('error=2 error_msg="Invalid arguments"\n', "Invalid arguments"),
        ("\n".join(LINES[:-5]), "current without its voltage"),
        (PMIC + LINES[0], "stands twice"),
        (PMIC.replace("=0.81262990A", "=nanA"), "VDD_CORE_A"),
        (PMIC.replace("=0.81262990A", "=1e99A"), "VDD_CORE_A"),
        (PMIC.replace("=0.81262990A", "=0.81262990V"), "VDD_CORE_A"),
        (PMIC.replace("VDD_CORE_A current", "VDD_CORE_A volt"), "VDD_CORE_A"),
        ("\x1b[2Jhello", "expected a rail"),
        ("EXT5V_V volt(24)=5.12936000V\n", "no rail at all"),
    ],
)
def test_a_text_that_is_no_sweep_is_refused_in_one_line(
    text: str | None, why: str, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match=why) as refusal:
        opened(tmp_path, text)

    assert "\n" not in str(refusal.value)
    assert "\x1b" not in str(refusal.value)


@pytest.mark.parametrize("cut", range(1, len(PMIC) - 1, 37))
def test_however_a_text_is_cut_no_rail_goes_missing_unseen(cut: int, tmp_path: Path) -> None:
    """A sum that lacks a rail would be lower and look like a saving."""
    meter = opened(tmp_path)
    put(tree(tmp_path, "rpi5"), commands={ASK: PMIC[:cut]})
    whole = float(exact_mw(PMIC))

    # Only the last two lines, which have volts alone, may be cut off.
    assert meter.read() == (whole if PMIC[:cut].count("\n") >= 24 and PMIC[cut] == "\n" else None)


def test_one_cut_text_is_a_missing_sample_and_ten_are_the_end(tmp_path: Path) -> None:
    meter = opened(tmp_path)
    machine = tree(tmp_path, "rpi5", commands={ASK: PMIC[:700]})
    assert [meter.read() for _ in range(9)] == [None] * 9
    put(machine, commands={ASK: PMIC})
    assert meter.read() is not None
    put(machine, commands={ASK: None})
    assert [meter.read() for _ in range(9)] == [None] * 9

    with pytest.raises(DeviceError, match="unsound 10 times in a row: it fails"):
        meter.read()


def test_a_firmware_that_refuses_mid_run_is_the_end_at_once(tmp_path: Path) -> None:
    meter = opened(tmp_path)
    tree(tmp_path, "rpi5", commands={ASK: 'error=1 error_msg="busy"\n'})

    with pytest.raises(DeviceError, match="busy"):
        meter.read()


def test_the_rate_is_what_the_firmware_can_give(tmp_path: Path) -> None:
    assert opened(tmp_path).info.rate_hz == 10
    with pytest.raises(UsageError, match=r"rate: expected a number from 0\.01 to 40"):
        opened(tmp_path, spec="pmic,rate=100")


@given(st.text(max_size=200))
def test_any_text_is_a_sweep_or_a_refusal(text: str) -> None:
    try:
        sweep = parse_sweep(text)
    except (Unsound, DeviceError):
        return
    assert sweep.rails


# ---------------------------------------------------------------- the firmware's mailbox


class Firmware:
    """Answers like /dev/vcio: the kernel passes one property message to the firmware and back."""

    def __init__(self, answer: bytes, code: int = 0x80000000, error: int = 0) -> None:
        self.answer, self.code, self.error, self.asked = answer, code, error, b""

    def ioctl(self, descriptor: int, request: int, message: bytearray, mutate: bool) -> int:
        assert (descriptor, request, mutate) == (7, 0xC0086400, True)
        size, code, tag, room, length, error = struct.unpack_from("<6I", message)
        assert size == len(message)
        assert (code, tag, room, length, error) == (0, 0x00030080, 1024, 0, 0)
        assert bytes(message[-4:]) == bytes(4)
        self.asked = bytes(message[24:-4]).rstrip(b"\0")
        message[24:-4] = self.answer.ljust(1024, b"\0")
        struct.pack_into("<I", message, 4, self.code)
        struct.pack_into("<I", message, 20, self.error)
        return 0


def test_the_mailbox_gives_the_same_text_without_a_process() -> None:
    firmware = Firmware(PMIC.encode()[:1023])

    text = firmware_text(7, "pmic_read_adc", firmware.ioctl)

    assert firmware.asked == b"pmic_read_adc"
    assert text == PMIC[:1023]


@pytest.mark.parametrize(("code", "error"), [(0x80000001, 0), (0, 0), (0x80000000, 1)])
def test_a_mailbox_that_refuses_says_nothing(code: int, error: int) -> None:
    assert firmware_text(7, "x", Firmware(b"half", code, error).ioctl) is None


def test_a_mailbox_that_fails_says_nothing() -> None:
    def failing(*_: object) -> int:
        raise OSError(5, "Input/output error")

    assert firmware_text(7, "x", failing) is None


@pytest.mark.parametrize("door", ["vcio", "vcio_gencmd"])
def test_where_there_is_a_mailbox_it_is_asked(
    door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [PMIC, PMIC.replace("=0.81262990A", "=0.00000000A"), "cut"]
    monkeypatch.setattr(pmic, "firmware_text", lambda *_: answers.pop(0))
    machine = tree(tmp_path, "rpi5", files={f"dev/{door}": ""}, commands={ASK: None})
    meter = open_meter("pmic", machine, RPI5)
    assert isinstance(meter, Pmic)

    assert meter.info.instrument.endswith("vcio")
    assert meter.read() == pytest.approx(1827.047 - 812.6299 * 0.8606585, abs=0.001)
    assert meter.read() is None
    meter.close()
    meter.close()


def test_without_a_mailbox_the_door_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="dev/vcio: cannot be opened"):
        opened(tmp_path, spec="pmic,via=vcio")

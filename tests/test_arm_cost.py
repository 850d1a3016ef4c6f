"""The gate on instructions: what is compared, what is refused, and what the machine is made of."""

import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import arm
import pytest
from profiles import added_cost, built_profile

sys.path.insert(0, str(arm.CHECKOUT / "bench" / "arm"))

import cost
import machine
from cost import BUDGET, CPUS, CUTTING, NETS, PAIRS, UNCUT, OverBudget
from root import CannotBuild

from edgeexit.blocks import CLEAN, EMULATED
from edgeexit.bundle import load_bundle
from edgeexit.compare import compare
from edgeexit.errors import BadFile
from edgeexit.page import profile_page
from edgeexit.parts import fit
from edgeexit.profile import Profile
from edgeexit.report import profile_table
from edgeexit.runtime import Runner
from edgeexit.verdict import NO_EXITS, judge

EXAMPLES = arm.CHECKOUT / "examples"
SLOW, QUICK = CPUS


def counts(**exits: int) -> dict[str, dict[str, dict[str, int]]]:
    return {SLOW: {"net": exits}}


BEFORE = counts(exit0=100_000, exit1=500_000)


# ---------------------------------------------------------------- the gate


def test_growth_of_more_than_a_percent_is_refused_and_named() -> None:
    with pytest.raises(OverBudget) as error:
        cost.check(BEFORE, counts(exit0=100_000, exit1=505_500), ["net"])

    assert "cortex-a72, net, exit1: 500,000 -> 505,500 instructions (+1.10%)" in str(error.value)
    assert "exit0" not in str(error.value)
    assert "--update" in str(error.value.hint)


def test_growth_of_less_is_silent() -> None:
    assert cost.check(BEFORE, counts(exit0=100_900, exit1=500_000), ["net"]) == []


def test_shrinkage_is_told_and_is_no_error() -> None:
    told = cost.check(BEFORE, counts(exit0=100_000, exit1=494_500), ["net"])

    assert len(told) == 1
    assert "exit1: 500,000 -> 494,500 instructions (-1.10%)" in told[0]


def test_an_exit_that_was_not_counted_is_refused() -> None:
    with pytest.raises(OverBudget, match="exit1: 500,000 instructions in the budget, not counted"):
        cost.check(BEFORE, counts(exit0=100_000), ["net"])


def test_a_net_that_was_not_counted_is_refused() -> None:
    with pytest.raises(OverBudget, match="net, exit0: 100,000 instructions in the"):
        cost.check(BEFORE, {SLOW: {}}, ["net"])


def test_a_net_in_neither_is_refused() -> None:
    with pytest.raises(OverBudget, match="other: neither counted nor in the budget"):
        cost.check(BEFORE, BEFORE, ["net", "other"])


def test_an_exit_without_a_budget_is_refused() -> None:
    with pytest.raises(OverBudget, match="exit2: 9 instructions, not in the budget"):
        cost.check(BEFORE, counts(exit0=100_000, exit1=500_000, exit2=9), ["net"])


def test_a_processor_without_a_budget_is_refused() -> None:
    with pytest.raises(OverBudget, match="cortex-a76, net, exit0: 5 instructions, not in the"):
        cost.check(BEFORE, {"cortex-a76": {"net": {"exit0": 5}}}, ["net"])


def test_what_was_not_asked_for_is_not_compared() -> None:
    grown = {SLOW: {"net": {"exit0": 100_000, "exit1": 500_000}, "other": {"exit0": 7}}}

    assert cost.check(BEFORE, grown, ["net"]) == []


def test_runs_are_as_far_apart_as_their_worst_exit() -> None:
    other = counts(exit0=100_000, exit1=500_400)

    assert cost.apart([BEFORE, other, BEFORE]) == {SLOW: pytest.approx(0.0008)}
    assert cost.apart([BEFORE]) == {SLOW: 0.0}


def test_runs_that_differ_by_more_than_a_thousandth_are_refused() -> None:
    cost.check_apart([BEFORE, counts(exit0=100_000, exit1=500_400)])
    with pytest.raises(OverBudget, match="cortex-a72: two runs are"):
        cost.check_apart([BEFORE, counts(exit0=100_000, exit1=500_550)])


@pytest.mark.parametrize("net", CUTTING)
def test_a_chain_may_cost_only_so_much_more_than_the_uncut_network(net: str) -> None:
    def found(ratio: float) -> dict[str, dict[str, dict[str, int]]]:
        chain = {"exit0": 1, "exit1": round(1_000_000 * ratio), "without exits": 5_000_000}
        return {SLOW: {net: chain, net + UNCUT: {"exit1": 1_000_000}}}

    cost.check_cutting(found(CUTTING[net] - 0.001))
    assert cost.cutting(found(1.01)) == {SLOW: {net: 1.01}}
    with pytest.raises(OverBudget, match=f"cortex-a72, {net}: chain over uncut"):
        cost.check_cutting(found(CUTTING[net] + 0.001))


# ---------------------------------------------------------------- files


def test_what_the_machine_says_is_read_line_by_line() -> None:
    said = (
        '{"net": "a", "exits": {"exit0": 12, "without exits": 10}}\n'
        '{"net": "b", "exits": {"exit0": 5}}\n'
    )

    assert cost.parse(said) == {"a": {"exit0": 12, "without exits": 10}, "b": {"exit0": 5}}


@pytest.mark.parametrize(
    "said",
    [
        "",
        "Traceback (most recent call last):\n",
        '{"net": "a", "exits": {"exit0": 0}}\n',
        '{"net": "a", "exits": {"exit0": 1.5}}\n',
        '{"net": "a", "exits": {"exit0": true}}\n',
        '{"net": "a", "exits": {}}\n',
        '{"net": "a", "exits": [1]}\n',
        '{"net": "a"}\n',
        '{"net": "a", "exits": {"exit0": 12}}\n{"net": "b", "exits": {"exi',
    ],
)
def test_counts_that_cannot_be_are_refused(said: str) -> None:
    with pytest.raises(BadFile):
        cost.parse(said)


def test_an_update_keeps_what_was_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"

    cost.write_budget({SLOW: {"one": {"exit0": 1}, "two": {"exit0": 2}}}, path)
    cost.write_budget({SLOW: {"two": {"exit0": 3}}, "cortex-a76": {"one": {"exit0": 4}}}, path)

    assert cost.read_budget(path) == {
        SLOW: {"one": {"exit0": 1}, "two": {"exit0": 3}},
        "cortex-a76": {"one": {"exit0": 4}},
    }
    assert cost.read_budget(tmp_path / "absent.json") == {}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"format": 2, "unit": "", "instructions": {}}', "format"),
        ('{"format": 1, "unit": ""}', "instructions"),
        ('{"format": 1, "unit": "", "instructions": {"a72": {"net": {"exit0": 1.5}}}}', "exit0"),
        ('{"format": 1, "unit": "", "instructions": {"a72": {"net": {"exit0": 0}}}}', "exit0"),
        ('{"format": 1, "unit": "", "instructions": {"a72": 3}}', "a72"),
    ],
)
def test_a_damaged_budget_is_refused_with_the_place(tmp_path: Path, text: str, place: str) -> None:
    path = tmp_path / "budget.json"
    path.write_text(text)

    with pytest.raises(BadFile, match=place):
        cost.read_budget(path)


def test_the_budget_holds_every_net_and_agrees_with_itself() -> None:
    """Later exits cost more, pruned and int8 networks less, and dot products save instructions."""
    budget = cost.read_budget()

    assert set(budget) == set(CPUS)
    for cpu in CPUS:
        assert set(budget[cpu]) == set(NETS)
        for net, exits in budget[cpu].items():
            early = [n for name, n in exits.items() if name != "without exits"]
            assert early == sorted(early), net
        for small, large in PAIRS:
            ours, theirs = budget[cpu][small], budget[cpu][large]
            assert all(ours[name] <= theirs[name] * 1.001 for name in theirs)
        assert set(cost.cutting(budget)[cpu]) == set(CUTTING)
    cost.check_cutting(budget)
    slow, quick = budget[SLOW], budget[QUICK]
    assert all(quick["resnet8"][exit] < n / 2 for exit, n in slow["resnet8"].items())


def test_the_budget_is_what_its_command_would_write(tmp_path: Path) -> None:
    path = tmp_path / "budget.json"

    cost.write_budget(cost.read_budget(), path)

    assert path.read_bytes() == BUDGET.read_bytes()


# ---------------------------------------------------------------- nets


def test_an_uncut_bundle_answers_as_the_chain_does_with_one_segment(tmp_path: Path) -> None:
    chain = load_bundle(EXAMPLES / "fashion.edgeexit")

    cost.write_uncut(chain, tmp_path / "fashion-uncut.edgeexit")

    uncut = load_bundle(tmp_path / "fashion-uncut.edgeexit")
    assert uncut.exits == chain.exits[-1:]
    with Runner(chain, None) as ours, Runner(uncut, None) as theirs:
        assert len(theirs.segments) == 1
        for sample in chain.selftest().samples:
            assert (ours(sample).logits == theirs(sample).logits).all()


def test_shipped_nets_are_copied_and_uncut_ones_are_made_of_them(tmp_path: Path) -> None:
    cost.make_nets(["fashion", "fashion-uncut"], tmp_path)

    assert load_bundle(tmp_path / "fashion.edgeexit").exits == ("exit0", "exit1", "exit2")
    assert load_bundle(tmp_path / "fashion-uncut.edgeexit").exits == ("exit2",)


# ---------------------------------------------------------------- a clock without scatter


def exact_profile(factor: float = 1.0) -> Profile:
    """A profile in which every call of a case takes exactly the same time."""
    profile = built_profile(luck=0, spread=0)
    processes = [
        replace(
            process,
            blocks=tuple(
                replace(block, mean_ns=factor * block.mean_ns, yardstick_ns=250e3)
                for block in process.blocks
            ),
        )
        for process in profile.processes
    ]
    return replace(profile, processes=tuple(processes))


def test_times_without_any_scatter_are_clean_and_exact() -> None:
    profile = exact_profile()

    profile = replace(profile, verdict=judge(profile))

    assert profile.verdict.status == CLEAN
    for case in profile.cases:
        found = profile.latency(case)
        assert found.low == found.value == found.high == pytest.approx(added_cost(case))
    head = fit(profile).head_ns("exit0")
    assert head is not None
    assert head.value == pytest.approx(30e3)
    assert "0.0%" in profile_table(profile)
    assert b"exit0" in profile_page(profile).encode()


def test_times_without_any_scatter_can_be_compared() -> None:
    same = compare(exact_profile(), exact_profile())
    slower = compare(exact_profile(), exact_profile(1.006))

    assert "no difference" in same.summary()
    assert [row.name for row in slower.slower(0.005)] == ["exit0", "exit1", "exit2", NO_EXITS]


def test_a_machine_that_is_not_there_is_told_whatever_its_times_are() -> None:
    verdict = judge(replace(exact_profile(), emulated="qemu-system's virt board"))

    assert verdict.status == EMULATED


# ---------------------------------------------------------------- the machine


def test_modules_are_loaded_behind_those_they_need(tmp_path: Path) -> None:
    needs = {"virtio": "virtio_ring", "virtio_ring": "", "virtio-net": "net_failover,virtio"}
    for name, what in needs.items():
        file = tmp_path / "kernel" / f"{name}.ko"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"\x7fELF\0license=GPL\0depends=" + what.encode() + b"\0intree=Y\0")

    order = machine._load_order(["virtio_net", "virtio", "ext4"], tmp_path)

    assert [path.stem for path in order] == ["virtio_ring", "virtio", "virtio-net"]


def test_the_first_file_system_is_an_archive_that_the_kernel_reads(tmp_path: Path) -> None:
    (tmp_path / "virtio_blk.ko").write_bytes(b"\0depends=\0module")

    data = machine._initramfs(b"busybox!", tmp_path)

    files, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        head = [int(data[at + 6 + 8 * k : at + 14 + 8 * k], 16) for k in range(13)]
        name = data[at + 110 : at + 110 + head[11] - 1].decode()
        start = at + 110 + head[11]
        start += -start % 4
        if name == "TRAILER!!!":
            break
        files[name] = (head[1], data[start : start + head[6]])
        at = start + head[6]
        at += -at % 4
    assert files["bin/busybox"] == (0o100755, b"busybox!")
    assert files["init"][1].startswith(b"#!/bin/busybox sh")
    assert files["modules/order"][1] == b"virtio_blk.ko"
    assert files["dev/console"][0] == 0o20600


def test_without_qemu_no_machine_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "QEMU", "qemu-that-is-not-there")

    with pytest.raises(CannotBuild, match="qemu-that-is-not-there is missing") as error:
        machine.Machine(SLOW, tmp_path / "board")

    assert "qemu-system-arm" in str(error.value.hint)
    assert not (tmp_path / "board").exists()


def counted(nets: Path, cpu: str, folder: Path) -> dict[str, dict[str, dict[str, int]]]:
    with arm.or_skip():
        return cost.count([cpu], nets, folder)


def test_the_shipped_network_costs_what_the_budget_says(tmp_path: Path) -> None:
    """The gate itself, on the quicker processor: 20 seconds of one core once its disk is made."""
    nets = tmp_path / "nets"
    nets.mkdir()
    cost.make_nets(["fashion"], nets)

    found = counted(nets, QUICK, tmp_path)

    assert cost.check(cost.read_budget(), found, ["fashion"]) == []


@pytest.mark.slow
def test_counts_repeat_and_are_what_profile_measures(tmp_path: Path) -> None:
    """
    Two boots agree within 0.1 %, and `edgeexit profile` in the machine finds the same.

    The profile says that it is emulated, whatever its figures look like.
    """
    nets = tmp_path / "nets"
    nets.mkdir()
    cost.make_nets(["fashion"], nets)
    runs = [counted(nets, SLOW, tmp_path) for _ in range(2)]
    profile = cost.profile(SLOW, nets, "fashion", tmp_path)

    cost.check_apart(runs)
    assert cost.check(cost.read_budget(), runs[0], ["fashion"]) == []
    assert profile.verdict.status == EMULATED
    measured = profile.costs_ns(profile.exits)
    assert measured == pytest.approx(
        [runs[0][SLOW]["fashion"][e] for e in profile.exits], rel=0.005
    )


@pytest.mark.slow
def test_a_job_that_fails_or_does_not_end_is_told_with_its_last_words(tmp_path: Path) -> None:
    with arm.or_skip():
        board = machine.Machine(QUICK, tmp_path / "board")
    files = tmp_path / "files"
    files.mkdir()
    (files / "job").write_text("#!/bin/sh\necho early\necho sorry >&2\nexit 3\n")
    (files / "job").chmod(0o755)
    lines: list[str] = []

    with pytest.raises(machine.MachineFailed, match=r"the job failed.*sorry"):
        board.batch(files, on_line=lines.append)
    with pytest.raises(machine.MachineFailed, match="no end after 0 s"):
        board.batch(files, timeout_s=0.2)

    assert lines == ["early"]
    assert _running(str(tmp_path)) == []


@pytest.mark.slow
def test_no_machine_outlives_its_process(tmp_path: Path) -> None:
    with arm.or_skip():
        machine.Machine(SLOW, tmp_path / "warm")  # makes the layers
    program = f"""
        import sys
        from pathlib import Path
        sys.path.insert(0, {str(Path(machine.__file__).parent)!r})
        from machine import Machine
        with Machine({SLOW!r}, Path({str(tmp_path / "m")!r})).login():
            print("up", flush=True)
            sys.stdin.read()
    """
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"up\n"
        qemu = _running(str(tmp_path))
        assert len(qemu) == 1
        child.send_signal(signal.SIGKILL)
    end = time.monotonic() + 5
    while _running(str(tmp_path)) and time.monotonic() < end:
        time.sleep(0.05)
    assert _running(str(tmp_path)) == []


def _running(word: str) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            argv = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if argv[0].endswith(machine.QEMU.encode()) and any(word.encode() in a for a in argv):
            found.append(int(path.parent.name))
    return found

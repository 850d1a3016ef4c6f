"""Facts about doing the same on many boards: who begins when, rows, the exit code."""

import asyncio
import io
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeexit.cli import guarded
from edgeexit.cli.fleet import Live, work_on
from edgeexit.errors import BadFile, DeviceError, StorageError, UsageError
from edgeexit.remote import fan
from edgeexit.remote.fan import Outcome, Row, fan_out
from edgeexit.remote.hosts import Host

FATES: dict[str, BaseException | None] = {
    "ok": None,
    "device": DeviceError("h0: gone", hint="switch it on"),
    "disk": StorageError("full"),
    "file": BadFile("odd"),
    "bug": ZeroDivisionError("division by zero"),
}


def boards(number: int) -> list[Host]:
    return [Host(name=f"h{k}", address="127.0.0.1") for k in range(number)]


def fated(fates: list[str], begun: list[str]) -> Callable[[Host], Awaitable[Outcome]]:
    """Work in which board k meets fate k, and which notes who began."""

    async def work(host: Host) -> Outcome:
        begun.append(host.name)
        await asyncio.sleep(0)
        error = FATES[fates[int(host.name[1:])]]
        if error is not None:
            raise error
        return Outcome(facts={"version": "1"}, changed=host.name != "h1")

    return work


def test_a_board_that_fails_stops_nobody_and_rows_come_in_order_of_the_boards() -> None:
    rows = asyncio.run(fan_out(boards(4), fated(["ok", "ok", "device", "bug"], [])))

    assert [row.status for row in rows] == ["done", "unchanged", "failed", "failed"]
    assert (rows[2].error, rows[2].hint, rows[2].exit_code) == ("h0: gone", "switch it on", 5)
    assert (rows[3].exit_code, "a bug in edgeexit" in (rows[3].error or "")) == (1, True)
    assert rows[0].facts == {"version": "1"}


@given(
    st.lists(st.sampled_from(list(FATES)), max_size=30),
    st.integers(1, 9),
    st.integers(0, 9),
    st.none() | st.integers(0, 9),
)
def test_who_begins_obeys_canary_and_failures(
    fates: list[str], limit: int, canary: int, most: int | None
) -> None:
    begun: list[str] = []
    seen: list[Row] = []
    hosts = boards(len(fates))

    work = fated(fates, begun)
    rows = asyncio.run(
        fan_out(hosts, work, limit=limit, canary=canary, max_failures=most, on_row=seen.append)
    )

    failed = [row for row in rows if row.status == "failed"]
    assert [row.host for row in rows] == [host.name for host in hosts]
    assert sorted(row.host for row in seen) == sorted(host.name for host in hosts)
    assert {row.host for row in rows if row.status != "skipped"} == set(begun)
    assert len(begun) == len(set(begun))
    if canary and canary < len(fates) and any(fate != "ok" for fate in fates[:canary]):
        assert set(begun) <= {host.name for host in hosts[:canary]}
    elif most is None:
        assert len(begun) == len(fates)
    else:
        # What was under way when the last failure allowed came may fail as well.
        assert len(failed) <= most + limit
        assert len(begun) == len(fates) or len(failed) > most


def test_no_more_boards_than_the_limit_are_worked_on_at_a_time() -> None:
    now = most = 0

    async def work(host: Host) -> Outcome:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.01)
        now -= 1
        return Outcome()

    asyncio.run(fan_out(boards(20), work, limit=3))

    assert most == 3


def test_the_canaries_are_through_before_another_board_begins() -> None:
    log: list[str] = []

    async def work(host: Host) -> Outcome:
        log.append(f"begin {host.name}")
        await asyncio.sleep(0.01)
        log.append(f"end {host.name}")
        return Outcome()

    asyncio.run(fan_out(boards(6), work, canary=2))

    assert max(log.index("end h0"), log.index("end h1")) < min(
        log.index(f"begin h{k}") for k in range(2, 6)
    )


def test_rows_come_as_boards_end() -> None:
    seen: list[str] = []

    async def work(host: Host) -> Outcome:
        await asyncio.sleep(0.05 if host.name == "h0" else 0)
        return Outcome()

    asyncio.run(fan_out(boards(3), work, on_row=lambda row: seen.append(row.host)))

    assert seen == ["h1", "h2", "h0"]


def test_what_showing_a_row_raises_is_raised_as_it_was() -> None:
    def closed(row: Row) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        asyncio.run(fan_out(boards(3), fated(["ok"] * 3, []), on_row=closed))


STRANGE: dict[str, Mapping[str, object]] = {
    "a word is missing": {},
    "of another kind": {"version": 1, "warnings": 5},
}


@pytest.mark.parametrize("strange", STRANGE)
def test_an_answer_that_cannot_be_told_fails_alone(
    strange: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def work(host: Host) -> Outcome:
        good = {"version": "1", "warnings": ["old\x1b[2J"]}
        return Outcome(facts=good if host.name == "h0" else {"": 0, **STRANGE[strange]})

    def command() -> None:
        words = lambda facts: f"has {facts['version']}"  # noqa: E731
        work_on(boards(2), work, words, Live(2), head={}, as_json=False, limit=1)

    assert guarded(command) == 1
    captured = capsys.readouterr()
    rows = captured.out.splitlines()
    assert len(rows) == 2
    assert "h0  done" in rows[0] and "has 1" in rows[0]
    assert "h1  failed" in rows[1] and "a bug in edgeexit" in rows[1]
    assert "warning: h0: old\\x1b[2J" in captured.err


@pytest.mark.parametrize("is_terminal", [True, False])
def test_on_a_terminal_one_line_tells_what_goes_on_and_leaves_nothing(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", screen)

    with Live(2) as live:
        live.step("a", "upload\x1b[2J")
        live.step("b", "x" * 500)
        live.ended("b")

    shown = screen.getvalue()
    if not is_terminal:
        assert shown == ""
        return
    first, second, wiped, _ = shown.split("\r")[1:]
    assert first.rstrip() == "0/2 boards a: upload\\x1b[2J"
    assert second.startswith("0/2 boards a: upload\\x1b[2J, b: xxx") and len(second) == 110
    assert wiped == " " * 110


def test_ctrl_c_cancels_what_is_under_way_and_waits_for_it() -> None:
    cleaned: list[str] = []

    async def work(host: Host) -> Outcome:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(host.name)
        return Outcome()

    async def given_up() -> None:
        task = asyncio.create_task(fan_out(boards(9), work, limit=4))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    began = time.monotonic()
    asyncio.run(given_up())

    assert sorted(cleaned) == ["h0", "h1", "h2", "h3"]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("fates", "code"),
    [
        (["ok", "ok"], 0),
        (["ok", "device"], 5),
        (["disk", "disk", "ok"], 11),
        (["disk", "file"], 5),
        ([], 0),
    ],
)
def test_the_exit_code_is_the_failures_own_if_they_agree(fates: list[str], code: int) -> None:
    rows = asyncio.run(fan_out(boards(len(fates)), fated(fates, [])))

    assert fan.exit_code(rows) == code


def test_boards_that_never_began_do_not_change_the_code_of_those_that_failed() -> None:
    rows = asyncio.run(fan_out(boards(9), fated(["disk"] + ["ok"] * 8, []), canary=1))

    assert fan.exit_code(rows) == 11
    assert [row.status for row in rows] == ["failed"] + ["skipped"] * 8


@pytest.mark.parametrize(
    ("text", "boards", "most"), [("0", 50, 0), ("3", 50, 3), ("10%", 50, 5), ("10%", 9, 0)]
)
def test_failures_are_counted_or_a_share(text: str, boards: int, most: int) -> None:
    assert fan.failures_allowed(text, boards) == most


@pytest.mark.parametrize("text", ["", "%", "-1", "1.5", "101%", "ten", "٣", "1e3"])
def test_another_number_of_failures_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        fan.failures_allowed(text, 9)


def test_the_document_is_json_and_each_row_a_printable_line() -> None:
    rows = [
        Row(host="a", status="done", facts={"version": "1", "": "told"}, seconds=1.23456),
        Row(host="long", status="failed", error="long: no\x1b[2J\nmore", exit_code=5),
    ]

    document = json.loads(json.dumps(fan.to_document(rows)))
    lines = [fan.line(row, 4) for row in rows]

    assert document["exit_code"] == 5
    assert document["boards"][0]["seconds"] == 1.235
    assert lines == [
        "a     done          1.2 s  version 1, told",
        "long  failed        0.0 s  no\\x1b[2J more",
    ]

"""The notebook of a measurement: what is finished survives, whatever happens."""

import errno
import fcntl
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.blocks import Block
from edgeexit.errors import BadFile, Busy, EdgeExitError, StorageError, UsageError
from edgeexit.locks import hold
from edgeexit.notebook import FORMAT, Notebook
from edgeexit.sitting import Sitting
from edgeexit.state import Reading

PLAN = {"bundle": "abc", "cases": [[1], [2]], "threads": 1}
CASES = 2
SITTING = Sitting(warmup_ns=((900, 200), (800, 300)), settled=(1, 1), delegate="XNNPACK")
SECOND = json.dumps({"seed": 17, "began_ns": 1000, "sitting": SITTING.to_document()})


def block(case: int, at_ns: int) -> Block:
    return Block(
        case=case,
        at_ns=at_ns,
        calls=7,
        mean_ns=200.5,
        cpu_ns=190.0,
        yardstick_ns=50.0,
        calls_ns=(201, 207),
    )


def write(path: Path, processes: int = 3, rounds: int = 2) -> None:
    with Notebook(path, PLAN, CASES) as book:
        book.started(Reading(at_ns=5, temperature_c=40.5))
        for process in range(processes):
            book.opened(process, 1000 * process, SITTING)
            for number in range(rounds):
                at_ns = 1000 * process + 100 * number
                reading = Reading(at_ns=at_ns, clocks_mhz=(1500.0,), throttled=0)
                book.round([block(1, at_ns), block(0, at_ns + 50)], reading)
            book.ended(1000 * process + 900)


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "p.json.part"
    write(path)
    with Notebook(path, PLAN, CASES, resume=True) as book:
        assert [process.seed for process in book.finished] == [0, 1, 2]
        process = book.finished[1]
        assert [b.case for b in process.blocks] == [1, 0, 1, 0]
        assert process.blocks[0] == block(1, 1000)
        assert (process.began_ns, process.ended_ns) == (1000, 1900)
        assert process.warmup_ns == SITTING.warmup_ns
        assert process.readings[0].clocks_mhz == (1500.0,)
        assert book.delegate == "XNNPACK"
        assert book.before == Reading(at_ns=5, temperature_c=40.5)
        book.opened(3, 4000, SITTING)
        book.round([block(0, 4000), block(1, 4001)], None)
    with Notebook(path, PLAN, CASES, resume=True) as book:
        assert [process.seed for process in book.finished] == [0, 1, 2, 3]
        book.remove()
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1))
def test_a_notebook_cut_anywhere_gives_back_every_finished_round(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    path = tmp_path_factory.mktemp("cut") / "p.json.part"
    write(path)
    data = path.read_bytes()
    cut = data[: int(share * len(data))]
    path.write_bytes(cut)
    rounds = sum(b'"round"' in line for line in cut.splitlines(keepends=True) if line[-1:] == b"\n")
    if b"\n" not in cut:
        with pytest.raises(BadFile, match="empty"), Notebook(path, PLAN, CASES, resume=True):
            pass
        return
    with Notebook(path, PLAN, CASES, resume=True) as book:
        assert sum(len(process.blocks) for process in book.finished) == 2 * rounds
        # What follows is not glued to the torn line.
        book.opened(9, 9000, SITTING)
        book.round([block(0, 9000), block(1, 9001)], None)
    with Notebook(path, PLAN, CASES, resume=True) as book:
        assert book.finished[-1].seed == 9


def test_a_process_that_has_not_timed_every_case_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "p.part"
    with Notebook(path, PLAN, CASES) as book:
        book.opened(0, 0, SITTING)
        book.round([block(0, 1)], None)
    with Notebook(path, PLAN, CASES, resume=True) as book:
        assert book.finished == ()


def test_an_unfinished_measurement_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "p.part"
    write(path)
    with pytest.raises(UsageError, match="not finished") as caught, Notebook(path, PLAN, CASES):
        pass
    assert "--resume" in (caught.value.hint or "")
    with (
        pytest.raises(UsageError, match="with other threads"),
        Notebook(path, {**PLAN, "threads": 2}, CASES, resume=True),
    ):
        pass
    with (
        pytest.raises(UsageError, match="no unfinished"),
        Notebook(tmp_path / "q.part", PLAN, CASES, resume=True),
    ):
        pass


def test_two_measurements_into_one_file_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.part"
    with (
        Notebook(path, PLAN, CASES),
        pytest.raises(Busy),
        Notebook(path, PLAN, CASES, resume=True),
    ):
        pass


def test_who_is_refused_takes_nobodys_lock_away(tmp_path: Path) -> None:
    path = tmp_path / "p.part"
    with Notebook(path, PLAN, CASES):
        for _ in range(3):
            with pytest.raises(Busy), Notebook(path, PLAN, CASES):
                pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.part"]


def test_a_lock_that_was_removed_meanwhile_is_taken_anew(tmp_path: Path) -> None:
    # Between opening the file and locking it, the holder may end and remove it.
    path, real = tmp_path / "lock", fcntl.flock
    removed = []

    def remove_first(handle: int, how: int) -> None:
        if not removed:
            removed.append(path.unlink())
        real(handle, how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", remove_first)
        with hold(path, "it"), pytest.raises(Busy), hold(path, "it"):
            pass


def test_a_pipe_in_the_notebooks_place_does_not_hang(tmp_path: Path) -> None:
    path = tmp_path / "p.part"
    os.mkfifo(path)
    for resume in (False, True):
        with (
            pytest.raises(UsageError, match="plain file"),
            Notebook(path, PLAN, CASES, resume=resume),
        ):
            pass


def test_a_full_disk_is_a_storage_error_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.part"
    real, left = os.write, 2500

    def write_some(handle: int, data: bytes) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(handle, data[:left])
        left -= done
        return done

    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(StorageError, match="No space left"):
        write(path, processes=50)
    monkeypatch.setattr(os, "write", real)
    with Notebook(path, PLAN, CASES, resume=True) as book:
        assert len(book.finished) >= 2
        book.opened(50, 0, SITTING)


@pytest.mark.parametrize("room", [0, 20])
def test_a_disk_that_is_full_from_the_start_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    real, left = os.write, room

    def write_some(handle: int, data: bytes) -> int:
        nonlocal left
        if left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        done = real(handle, data[:left])
        left -= done
        return done

    monkeypatch.setattr(os, "write", write_some)
    with pytest.raises(StorageError, match="No space"), Notebook(tmp_path / "p", PLAN, CASES):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"round": [[9, 1, 1, 1.0, 1.0, 1.0, []]], "reading": null}', "case: expected 0"),
        ('{"round": [[0, 1, 1, 1.0, 1.0]], "reading": null}', "expected 7 values"),
        ('{"round": [[0, 1, 1, -1.0, 1.0, 1.0, []]], "reading": null}', "more than 0"),
        ('{"round": [[0, 1, 1, NaN, 1.0, 1.0, []]], "reading": null}', "NaN"),
        ('{"round": [7], "reading": null}', "expected list"),
        ('{"seed": 1, "began_ns": 1, "sitting": {}}', "missing"),
        ('{"ended_ns": -5}', "ended_ns: expected nanoseconds from 2000"),
        (SECOND.replace("17", "-17"), "seed: expected 0"),
        (SECOND.replace("1000", str(1 << 63)), "began_ns: expected nanoseconds"),
        (SECOND.replace("[1, 1]", "[1, 9]"), "settled: expected places"),
        (SECOND.replace("seed", "sead"), "expected one of round, reading"),
        ("[]", "expected"),
        ("nonsense", "line 15"),
    ],
)
def test_a_hostile_line_is_refused_with_its_place(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "p.part"
    write(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(BadFile, match=message), Notebook(path, PLAN, CASES, resume=True):
        pass


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_junk_never_ends_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("junk") / "p.part"
    head = json.dumps({"notebook": FORMAT, "plan": PLAN}).encode() + b"\n"
    for content in (data, head + data + b"\n"):
        path.write_bytes(content)
        try:
            with Notebook(path, PLAN, CASES, resume=True):
                pass
        except EdgeExitError:
            pass

"""
What damaged networks do to us: nothing, wherever in a file the damage is.

Digests fit, so the runtime is really reached. Whatever a file does to it, the process of the
user lives, says one line, ends with a documented code and writes nowhere else.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mutants import REACHED, Seed, mutants, replace_file
from small import small_bundle
from tiny import TinyModel, tiny_model

from edgeexit import cli
from edgeexit.bundle import load_bundle
from edgeexit.errors import BadFile, Unsupported
from edgeexit.tflite import read_model

# A damaged file, one that cannot be taken, segments that do not make the whole, other answers.
REFUSALS = {3, 4, 9, 10}
PARTS = 2


def met(folder: Path, count: int, key: int) -> list[dict[str, Any]]:
    """What came of *count* mutants."""
    program = str(Path(__file__).with_name("mutants.py"))
    done = subprocess.run(
        [sys.executable, program, str(folder), str(count), str(key)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]]) -> None:
    for one in found:
        assert one["status"] == 0, f"the process died or hung: {one}"
        assert not one["changed"], f"something was written: {one}"
        # What a mutant of a ready .tflite takes need not be what the user said of it.
        is_said_too = one["name"].startswith("convert")
        assert set(one["codes"]) <= {0, *REFUSALS, *([2] if is_said_too else [])}, one
        for code, said in zip(one["codes"], one["errors"], strict=True):
            lines = [line for line in said.splitlines() if line.startswith("Error: ")]
            assert len(lines) == (code != 0), one
            assert "Traceback" not in said, one
    # Not vacuous: that many were in the runtime's hands, and of each kind there were some.
    reached = [one for one in found if set(REACHED) & set(one["ends"])]
    assert len(reached) > len(found) / 3
    ends = Counter(end for one in found for end in one["ends"])
    assert min(ends["reading"], ends["refused"], ends["passed"]) > len(found) / 50, ends


@pytest.mark.parametrize("part", range(PARTS))
def test_a_thousand_mutants(part: int, tmp_path: Path) -> None:
    found = met(tmp_path, 1000 // PARTS, part)
    assert len(found) > 0.9 * 1000 / PARTS
    check(found)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(20))
def test_ten_thousand_mutants(part: int, tmp_path: Path) -> None:
    check(met(tmp_path, 500, 100 + part))


@pytest.mark.parametrize("quantized", [True, False])
def test_a_file_that_ends_early_is_refused(quantized: bool) -> None:
    data = tiny_model(quantized=quantized).data
    for percent in range(100):
        with pytest.raises((BadFile, Unsupported)):
            read_model(data[: len(data) * percent // 100])


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (tiny_model(size=(12, 11)), r"segments\[0\]: input 'input' is no earlier segment's output"),
        (
            tiny_model(classes=5),
            r"segments\[0\]: outputs\[0\]: expected the logits of exit 'exit0'",
        ),
        (tiny_model(exits=1), "no tensor named 'logits1' .*, which bundle.json names"),
    ],
)
def test_a_model_that_is_not_the_manifests_is_not_cut_anew(
    other: TinyModel, words: str, tmp_path: Path
) -> None:
    bundle = small_bundle(tmp_path)
    replace_file(bundle.path, "model.tflite", other.data)
    with pytest.raises(BadFile, match=words):
        load_bundle(bundle.path).chain(["exit0", "exit2"])


def test_mutants_are_the_same_every_time_and_differ_from_each_other() -> None:
    seed = Seed("tiny", tiny_model().data)
    first, second = list(mutants(seed, 50)), list(mutants(seed, 50))
    assert first == second
    assert len({*first, seed.data}) > 45
    assert first != list(mutants(seed, 50, key=1))


def test_every_number_that_is_exchanged_lies_in_the_file() -> None:
    data = tiny_model().data
    meant, frame = Seed("tiny", data).numbers
    assert len(meant) > 300
    assert len(frame) > 100
    assert all(0 <= at < len(data) for at, _ in (*meant, *frame))

"""One figure from one chart: the same bytes each time, nothing left out, refusals before work."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from populations import SYNTHETIC_COSTS, synthetic

from edgeexit import plot
from edgeexit.advisor import Advice, Point
from edgeexit.decision import Costs, Family, Record
from edgeexit.errors import StorageError, UsageError
from edgeexit.plot import Chart, chart, check_plot, draw
from edgeexit.ranking import rankings

EXITS = ("exit0", "exit1", "exit2", "exit3")
RECORD = synthetic(300, 1)
# Exits come in one after another; row 6 is the deployed one.
FAMILY = Family(
    name="shared", thresholds=np.array([[np.inf] * 3, *([t] * 3 for t in np.linspace(1, 0.1, 12))])
)
ADVICE = Advice(
    points=tuple(
        Point(samples=n, saved=s, low=s - 0.1, high=s + 0.1, draws=3, is_predicted=n > 300)
        for n, s in ((100, 0.1), (300, 0.2), (1000, 0.3))
    ),
    present=300,
)


def made(**changed: object) -> Chart:
    given = {"ms": SYNTHETIC_COSTS.at, "certified": 8, "position": 6, "level": 0.02}
    family, record, exits = (
        changed.pop(name, default)
        for name, default in (("family", FAMILY), ("record", RECORD), ("exits", EXITS))
    )
    return chart(family, record, exits, **{**given, **changed})


def words(path: Path) -> set[str]:
    """What the drawn file says: the svg keeps each text as a comment beside its outlines."""
    return set(re.findall(r"<!-- (.*?) -->", path.read_text()))


# ---------------------------------------------------------------- the chart


def test_a_chart_holds_what_the_family_does_to_the_record() -> None:
    shown = made()
    policy = FAMILY.policy(6)

    taken = policy.exits(RECORD)
    assert shown.accuracy[6] == pytest.approx(RECORD.correct[np.arange(300), taken].mean())
    assert shown.exit_rates.tolist() == (np.bincount(taken, minlength=4) / 300).tolist()
    (front,) = shown.fronts
    assert front.costs[6] == pytest.approx(policy.mean_cost(RECORD, SYNTHETIC_COSTS))
    # The last exit as a static network is the network without exits.
    assert front.statics[-1] == pytest.approx(SYNTHETIC_COSTS.full)
    assert shown.reference == shown.accuracy[0] == shown.static_accuracy[-1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"position": 9},
        {"certified": 13},
        {"first": 7},
        {"exits": EXITS[:3]},
        {"ms": None},
        {"record": RECORD.take(np.array([], int))},
    ],
)
def test_a_chart_of_what_does_not_fit_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"^chart: "):
        made(**wrong)


# ---------------------------------------------------------------- the file


def test_equal_charts_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("one.svg", "other.svg", "one.png"):
        draw(made(title="fashion on pi4"), tmp_path / name)

    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
    ElementTree.parse(tmp_path / "one.svg")
    with Image.open(tmp_path / "one.png") as picture:
        assert picture.size[0] > 1000
    assert "<dc:date>" not in (tmp_path / "one.svg").read_text()


def test_every_part_is_there_and_says_its_unit(tmp_path: Path) -> None:
    real = rankings(RECORD.confidence, RECORD.correct, EXITS)
    shown = made(
        title="fashion on pi4", mj=SYNTHETIC_COSTS.at, energy="energy, modelled", real=real,
        advice=ADVICE,
    )  # fmt: skip

    draw(shown, tmp_path / "all.svg")

    found = words(tmp_path / "all.svg")
    for text in (
        *("fashion on pi4", "mean latency per answer [ms]", "energy, modelled [mJ]"),
        *("accuracy on 300 samples [%]", "certified region", "not certified", "one exit, static"),
        *("reference less 2 points", "deployed policy, 95 % interval", "share of samples [%]"),
        *("mean confidence of the bin [%]", "AUROC of confidence against correctness"),
        *("float", "int8", "certificate samples", "predicted", "now: 300", *EXITS),
    ):
        assert text in found, text


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    draw(made(level=None, measure="peak", certified=12), tmp_path / "few.svg")

    found = words(tmp_path / "few.svg")
    assert "mean confidence of the bin (peak)" in found
    assert not {"float", "predicted", "not certified", "as sure as right"} & found
    assert not any("mJ" in text or "reference less" in text for text in found)


def test_names_are_shown_as_they_are_and_never_read_as_formulas(tmp_path: Path) -> None:
    exits = ("$x_", "a" * 40, "出口", "\x1b[31m")

    draw(made(exits=exits, title="$\\frac$ & <b>"), tmp_path / "odd.svg")
    draw(made(exits=exits), tmp_path / "odd.png")

    found = words(tmp_path / "odd.svg")
    assert "$x_" in found
    assert "a" * 15 + "…" in found
    assert not any("\x1b" in text for text in found)


def test_many_exits_and_one_sample_and_constant_confidence_can_be_drawn(tmp_path: Path) -> None:
    count = 20
    record = Record(
        np.full((1, count), 0.5, np.float32),
        np.zeros((1, count), int),
        np.zeros(1, int),
        np.zeros(1, int),
    )
    costs = Costs(np.ones(count), np.ones(count) / 10, np.zeros(count))
    family = Family(name="none", thresholds=np.full((1, count - 1), np.inf))
    names = [f"exit{k}" for k in range(count)]

    shown = made(
        family=family, record=record, exits=names, ms=costs, certified=0, position=0
    )  # fmt: skip
    draw(shown, tmp_path / "many.svg")

    assert all(row.auroc is None for row in shown.int8)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["out.pdf", "out", "out.svg.gz"])
def test_another_suffix_is_refused_before_anything_is_drawn(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"expected \.png or \.svg"):
        check_plot(tmp_path / name)


def test_without_the_library_the_hint_is_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

    with pytest.raises(UsageError, match="needs matplotlib") as caught:
        check_plot(tmp_path / "out.svg")
    assert caught.value.hint == 'pip install "edgeexit[plot]"'


def test_a_folder_that_cannot_be_written_is_refused_before_the_work() -> None:
    with pytest.raises((StorageError, UsageError)):
        check_plot("/proc/out.svg")


def test_ctrl_c_while_drawing_waits_for_its_end_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside of the library it came out as a ValueError, as if edgeexit had a bug."""
    drawn = []

    def press(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        drawn.append("a panel")

    monkeypatch.setattr(plot, "_histogram", press)
    with pytest.raises(KeyboardInterrupt):
        draw(made(), tmp_path / "x.svg")

    assert drawn == ["a panel"]
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_library_is_loaded_only_to_draw() -> None:
    code = "import sys, edgeexit.plot; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

"""Papers' sections of docs/results.md: made of the result file alone, absent without it."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import run
from seeds import gormez, kinds

NET = kinds.Net(depth=8, blocks=(1, 2))
SETTING = replace(gormez.SMALL, net=NET, seeds=2)
MACHINE = {"cpu": "a board", "cores": 4, "date": "2026-01-01"}


def made_up(s1: list[list[float]], s2: list[list[float]]) -> dict[str, Any]:
    """A result file with these accuracies (seeds, exits) and curves that cross at 2.5 MMACs."""
    costs, flat = [1e6, 4e6], {"low": [0.4, 0.5], "high": [0.6, 0.7]}
    history = [{"step": 1, "weights_gone": 0.5, "macs": 6_000_000, "accuracies": {"a": 0.5}}]
    better = [{**history[0], "accuracies": {"a": 0.75}}]
    timed = {"accuracy": [0.5, 0.6, 0.7], "measured": {"ms": [0.1, 0.2, 0.3]}}
    saved = {"share": 0.123, "accuracy": 0.55, "each": [0.1, 0.2]}
    return {
        "command": "python bench/seeds/gormez.py",
        "machine": MACHINE,
        "setting": asdict(SETTING),
        "splits": {"training": {"pictures": 8000}, "test": {"pictures": 9806}},
        "accuracy": {"dense": [[0.5, 0.6, 0.7]] * 2, "s1": s1, "s2": s2},
        "ordering": gormez.ordering(s1, s2),
        "zeros": {made: [0.878, 0.878] for made in gormez.TITLES},
        "head_zeros": {made: [[0.6, 0.7, 0.1]] * 2 for made in gormez.TITLES},
        "exit_macs": {made: [1e6, 2e6, 4e6] for made in gormez.TITLES},
        "parameters": 85_744,
        "bands": {made: {"costs": costs, "mean": [0.5, 0.6], **flat} for made in gormez.TITLES},
        "crossings": [[2.5e6, 0.55]],
        "savings": {"s1": saved, "s2": None},
        "int8": {made: [timed, timed] for made in gormez.TITLES},
        "filters_macs": {made: [[12_000_000, 6_000_000]] * 2 for made in ("s1", "s2")},
        "criteria": {
            "weights": {"random": [history, history], "magnitude": [better, better]},
            "filters": {"random": [history, history], "l1": [better, history]},
        },
    }


@pytest.mark.parametrize(
    ("s2_last", "said"),
    [
        (0.8, "at exit 3 S2 is better (2 of 2 seeds as published). The published order holds."),
        (0.6, "S2 is not better (0 of 2 seeds as published). The published order does not hold."),
    ],
)
def test_the_page_says_whether_the_published_order_holds(s2_last: float, said: str) -> None:
    text = gormez.page(made_up([[0.6, 0.7, 0.7]] * 2, [[0.5, 0.6, s2_last]] * 2))
    assert said in text
    assert "S1 saves at most 12.3% against S2, at 55.0% accuracy" in text
    assert "The paper: S1 saves up to 15%." in text
    assert "cross at 2.50 million MACs (55.0%)" in text
    assert "only the signs can be compared" in text
    assert "| magnitude | 75.0 [25.0 (25.0 .. 25.0)] |" in text
    assert "| l1 | 62.5 [12.5 (0.0 .. 25.0)] | 50.0 (50.0 .. 50.0) % |" in text


def test_a_table_without_its_file_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "CHECKOUT", tmp_path)
    assert run.page() == run.HEAD
    found = made_up([[0.6, 0.7, 0.7]] * 2, [[0.5, 0.6, 0.8]] * 2)
    (tmp_path / "seeds-gormez-full.json").write_text(json.dumps(found))
    text = run.page()
    assert "two strategies: the paper's schedule\n" in text
    assert "two strategies: small setting\n" not in text
    assert "`python bench/seeds/gormez.py` on a board, 4 cores, 2026-01-01." in text


def test_equal_results_are_drawn_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    found = made_up([[0.6, 0.7, 0.7]] * 2, [[0.5, 0.6, 0.8]] * 2)
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    monkeypatch.setattr(run, "CHECKOUT", tmp_path)
    (tmp_path / "seeds-gormez.json").write_text(json.dumps(found))
    drawn = tmp_path / "docs" / "img" / gormez.image(found["setting"])
    run.draw()
    first = drawn.read_bytes()
    run.draw()
    assert drawn.read_bytes() == first
    assert drawn.name in run.page()
    assert b"S1, all at once" in first

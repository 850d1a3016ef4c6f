"""Papers' sections of docs/results.md: made of the result file alone, absent without it."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import run
from seeds import everything, gormez, kinds

NET = kinds.Net(depth=8, blocks=(1, 2))
SETTING = replace(gormez.SMALL, net=NET, seeds=2)
VERDICT = "DISTURBED: other programs"
MACHINE = {"cpu": "a board", "cores": 4, "date": "2026-01-01"}


def made_up(s1: list[list[float]], s2: list[list[float]]) -> dict[str, Any]:
    """A result file with these accuracies (seeds, exits) and curves that cross at 2.5 MMACs."""
    costs, flat = [1e6, 4e6], {"low": [0.4, 0.5], "high": [0.6, 0.7]}
    history = [{"step": 1, "weights_gone": 0.5, "macs": 6_000_000, "accuracies": {"a": 0.5}}]
    better = [{**history[0], "accuracies": {"a": 0.75}}]
    timed = {"accuracy": [0.5, 0.6, 0.7], "measured": {"ms": [0.1, 0.2, 0.3], "verdict": VERDICT}}
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
    assert "Profiles behind the milliseconds: 6 disturbed." in text
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


# ---------------------------------------------------------------- Pruning Everything


def pruned_results(lost: dict[str, float]) -> dict[str, Any]:
    """Steps' results in which each variant at 75 % loses so much of 0.9."""
    timed = {"accuracy": [0.5, 0.6, 0.7], "measured": {"ms": [0.1, 0.2, 0.3], "verdict": VERDICT}}
    robust = {kind: [0.5, 0.6, 0.7] for kind in ("clean", "fgsm", "noise", "blur")}
    results: dict[str, Any] = {"data": {"training": {"pictures": 8000}, "test": {"pictures": 9806}}}
    for seed in range(SHORT.seeds):
        results[f"{seed}/dense"] = {"holdout_accuracies": {"exit0": 0.5, "exit1": 0.95}}
        for variant, goal in everything.made_nets():
            name = f"{seed}/{variant}-{goal}" if goal else f"{seed}/{variant}"
            share = {"": 1.0, "75": 0.25, "86": 0.13}[goal]
            if goal:
                before = 0.25 if goal == "86" else 1.0
                shares = [(before + share) / 2, share]
                history = [
                    {"macs": part * 1e8, "accuracies": {"a": 0.1, "b": 0.8 + k / 100}, "child": c}
                    for k, (part, c) in enumerate(zip(shares, ("blocks", "filters"), strict=True))
                ]
                results[name] = {"history": history, "macs": [before * 1e8, share * 1e8]}
            results[f"{name}-answers"] = {
                "accuracy": [0.5, 0.6, 0.9 - (lost[variant] if goal else 0.0)],
                "dense_macs": {"exit0": 1e7, "exit1": 2e7, "final": share * 1e8},
                "parameters": 1000,
            }
            results[f"{name}-robust"] = robust
            results[f"{name}-int8"] = {"accuracy": timed["accuracy"]}
            results[f"{name}-timed"] = {"measured": timed["measured"]}
    return results


SHORT = replace(everything.SMALL, seeds=2)


@pytest.mark.parametrize(("ours", "said"), [(0.005, "within"), (0.02, "more than")])
def test_the_choice_is_judged_beside_its_rivals(ours: float, said: str, tmp_path: Path) -> None:
    lost = {
        "everything": ours,
        "blocks": 0.03,
        "filters": 0.01,
        "random": 0.015,
        "random-scores": 0.04,
    }
    found = {"setting": asdict(SHORT), **everything.figures(SHORT, pruned_results(lost))}
    text = everything.page(found)
    assert f"{100 * ours:.2f} points at three quarters of the MACs: {said} the one point" in text
    lead = f"{100 * (0.03 - ours):.2f}"
    assert f"Points ahead there: {lead} ({lead} .. {lead}) of blocks alone" in text
    assert f"CKA loses less in {2 if ours < 0.015 else 0} of 2 seeds" in text
    assert "| blocks alone, 75 % gone | 75.0 (75.0 .. 75.0) |" in text
    # Only where a step has two children does it say how often the block went.
    taken = {
        line.split(" | ")[0].removeprefix("| "): line.split(" | ")[-1].removesuffix(" |")
        for line in text.splitlines()
        if line.endswith("|") and " 75 % gone | 75.0" in line
    }
    assert taken == {
        f"{title}, 75 % gone": "1 (1 .. 1)" if name in everything.CHOOSING else ""
        for name, title in everything.TITLES.items()
        if name != "dense"
    }
    assert "87.0 (87.0 .. 87.0)" in text
    path = found["paths"]["everything"][0]
    assert [share for share, _ in path] == pytest.approx([1.0, 0.625, 0.25, 0.19, 0.13])
    assert path[0][1] == 0.95
    pytest.importorskip("matplotlib")
    everything.draw(found, tmp_path)
    assert everything.image(found["setting"]) in text
    assert b"filters alone" in (tmp_path / everything.image(found["setting"])).read_bytes()


def test_the_coin_replaces_the_choice_and_nothing_else() -> None:
    """CKA and the coin choose between children scored alike; the other control scores by chance."""
    plans = everything.variants(SHORT)
    differs = {
        name: {key for key in plan if plan[key] != plans["everything"].get(key)}
        for name, plan in plans.items()
    }
    assert differs["random"] == {"selector"}
    assert differs["random-scores"] == {"criterion", "block_criterion"}
    assert set(plans) == set(everything.STEPS) == set(everything.TITLES) - {"dense"}
    assert {name for name, _ in everything.made_nets()} == set(everything.TITLES)


@pytest.mark.parametrize("setting", [everything.SMALL, everything.FULL])
def test_every_plan_is_understood_and_full_ones_fall_as_published(
    setting: everything.Setting,
) -> None:
    pytest.importorskip("torch")
    from edgeexit.files import Table
    from edgeexit.host.prune.recipe import prune_recipe

    plain = kinds.Step(name="0/start", run=lambda job: {})
    for step in everything._seed_steps(replace(setting, seeds=1), plain, 0):
        if "recipe" in step.task:
            read = prune_recipe(Table({"format": 1, **step.task["recipe"]}, step.name))
            assert read.finetune is not None and read.final is not None
            at = [drop * read.final.epochs for drop in read.final.drops]
            full = setting is everything.FULL
            assert at == pytest.approx([100, 150] if full else [])
            assert read.final.schedule == ("steps" if full else "one-cycle")
            assert read.finetune.drops == ()


@pytest.mark.parametrize("setting", [gormez.SMALL, gormez.FULL])
def test_what_is_dense_falls_as_in_the_code_that_made_the_papers_network(
    setting: gormez.Setting,
) -> None:
    pytest.importorskip("torch")
    from edgeexit.files import Table
    from edgeexit.host.recipe import training_part

    for step in gormez._seed_steps(setting, 0):
        if "training" in step.task:
            part = training_part(Table(dict(step.task["training"]), step.name))
            at = [drop * part.epochs for drop in part.drops]
            assert at == pytest.approx([35, 60, 85] if setting is gormez.FULL else [])
    told = {"parameters": 1, "splits": {k: {"pictures": 9} for k in ("training", "test")}}
    text = gormez._told({"setting": asdict(setting), **told})
    assert ("after 35 %, 60 %, 85 % of the dense" in text) == (setting is gormez.FULL)


def test_the_second_goal_counts_from_the_dense_network() -> None:
    """What the first goal overshot is not taken twice: 86.37 % of the dense MACs go."""
    plain = kinds.Step(name="0/start", run=lambda job: {})
    made = {step.name: step for step in everything._seed_steps(SHORT, plain, 0)}
    for variant in everything.DEEPER:
        deep = made[f"0/{variant}-86"]
        assert deep.task["macs_left"] == pytest.approx(0.1363)
        assert f"0/{variant}-75" in deep.needs
        assert made[f"0/{variant}-75"].task["macs_left"] is None

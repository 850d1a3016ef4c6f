"""The table of EGP and NEPENTHE: its steps on a tiny network, and what its page says of numbers."""

import copy
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from seeds import gormez, kinds, nepenthe, steps  # noqa: E402
from test_seeds_steps import data, listed  # noqa: E402, F401

from edgeexit.host.checkpoint import load_checkpoint  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402

pytestmark = pytest.mark.host

TINY = kinds.Plain(
    factory="resnet", kwargs={"stem": [4], "widths": [4, 8], "blocks": [2, 1], "exits": []}
)
SETTING = replace(
    nepenthe.small(),
    nets={
        "tiny": nepenthe.Subject(
            title="Tiny net", net=TINY, learning_rate=0.05, finetune_rate=0.02, blocks=2
        )
    },
    pictures=160,
    ranges=20,
    test=100,
    dense=1,
    iterations=2,
    epochs=1,
    samples=64,
    seen=80,
    seeds=1,
    batch=32,
)
VERDICT = "DISTURBED: other programs"


def is_converted(step: steps.Step) -> bool:
    return step.name.endswith(("-int8", "-timed"))


@pytest.fixture(scope="module")
def ran(
    data: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Any], Path]:
    """Results of all steps but the int8 ones, which are made up: their names are the table's."""
    table = nepenthe.table(SETTING, data=data, listed=listed(data))
    work = tmp_path_factory.mktemp("nepenthe")
    some = [step for step in table.steps if not is_converted(step)]
    done = steps.run_steps(replace(table, steps=some), work)
    results = {name: document["result"] for name, document in done.items()}
    for step in table.steps:
        if step.name.endswith("-int8"):
            results[step.name] = {"accuracy": [0.5], "bytes": 1}
        elif step.name.endswith("-timed"):
            blocks = step.name.endswith("blocks-timed")
            ms = {"ms": [0.2 if blocks else 0.4], "verdict": VERDICT}
            results[step.name] = {"measured": ms}
    return results, work


def test_rivals_have_as_many_zeros_in_the_same_layers(ran: tuple[dict[str, Any], Path]) -> None:
    results, _ = ran
    zeros = {}
    kept = {*TINY.linear_layers, *TINY.only_ways}
    for made in nepenthe.GUARDED:
        layers = results[f"tiny/0/{made}-answers"]["layers"]
        zeros[made] = sum(row["zeros"] for row in layers.values())
        assert all(layers[name]["zeros"] == 0 for name in kept)
        pool = sum(row["weights"] for name, row in layers.items() if name not in kept)
        assert zeros[made] == pytest.approx(0.75 * pool, abs=1)
    assert len(set(zeros.values())) == 1
    assert TINY.linear_layers == ["heads.3.linear"]
    assert "blocks.2.first.0" in kept
    assert "blocks.1.first.0" not in kept


def test_every_activation_is_told_before_and_after(ran: tuple[dict[str, Any], Path]) -> None:
    results, _ = ran
    for made in ("dense", *nepenthe.WEIGHTS):
        states = results[f"tiny/0/{made}-states"]
        # The stem's, and two of each block.
        assert len(states["layers"]) == 1 + 2 * 3
        assert set(nepenthe.ESTIMATORS) < set(states["bits"])
        assert all(0 <= bits <= 1 for row in states["bits"].values() for bits in row)


def test_blocks_are_compared_where_the_accuracy_is_nearest(
    ran: tuple[dict[str, Any], Path],
) -> None:
    results, work = ran
    wanted = results["tiny/0/folded-answers"]["accuracy"][-1]
    found = {
        f"tiny/0/blocks-kl-{k}": results[f"tiny/0/blocks-kl-{k}-answers"]["accuracy"][-1]
        for k in (1, 2)
    }
    chosen = results["tiny/0/blocks"]["chosen"]
    assert abs(found[chosen] - wanted) == min(abs(one - wanted) for one in found.values())
    assert results["tiny/0/blocks"]["weights"] == results[chosen]["weights"]
    macs = [
        analyse(load_checkpoint(work / f"tiny/0/{made}/model.pt").model, kinds.INPUT_SHAPE).macs()
        for made in ("dense", "blocks-kl-1", "blocks-kl-2")
    ]
    assert macs[0] > macs[1] > macs[2]
    assert results["tiny/0/folded"]["macs"][0] == macs[0]


def test_the_page_tells_numbers_and_who_saved(
    ran: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    results, _ = ran
    found = {"setting": asdict(SETTING), **nepenthe.figures(SETTING, results)}
    folds = found["nets"]["tiny"]["folds"][0]
    text = nepenthe.page(found)
    if not folds["folded"]:
        assert "EGP, folded leaves the MACs and leaves the milliseconds (1.000 and 1.000" in text
    assert "blocks removed lowers the MACs and lowers the milliseconds" in text
    assert "NEPENTHE's estimator is our reading" in text
    assert "| EGP | 90.64 | 140.19 | 7.62 |" in text
    assert "Profiles behind the milliseconds: 3 disturbed." in text
    dearer = copy.deepcopy(found)
    dearer["nets"]["tiny"]["int8"]["folded"][0]["measured"]["ms"] = [0.8]
    assert "and raises the milliseconds" in nepenthe.page(dearer)
    pytest.importorskip("matplotlib")
    nepenthe.draw(found, tmp_path)
    name = nepenthe.image(found["setting"], "tiny")
    assert name in text
    assert b"NEPENTHE, our reading" in (tmp_path / name).read_bytes()


def test_what_is_folded_is_trained_with_its_zeros(
    data: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """A network whose first layer is always on: it is folded, and zeros stay zero."""
    net = kinds.Plain(factory="vit", kwargs={"width": 8, "heads": 2, "blocks": 1, "exits": []})
    part = {"batch": 32, "learning_rate": 0.02, "seed": 0, "epochs": 1}
    table = nepenthe.table(SETTING, data=data, listed=listed(data))
    some = [
        table.steps[0],
        kinds.plain_step("start", net, seed=0),
        kinds.train_step(
            "dense",
            "start",
            net,
            pictures=160,
            augmentation={"flip": True},
            training=part,
        ),
    ]

    def linear(job: steps.Job) -> dict[str, Any]:
        from edgeexit.host.checkpoint import save_again

        checkpoint = load_checkpoint(job.of("dense") / "model.pt")
        mlp = checkpoint.model.blocks[0].mlp
        with torch.no_grad():
            mlp[0].bias.fill_(20.0)
            checkpoint.model.blocks[0].attention.out.weight[:4] = 0.0
        save_again(job.folder / "model.pt", checkpoint, checkpoint.model)
        return {}

    some.append(steps.Step(name="linear", needs=("dense",), run=linear))
    some.append(
        kinds.fold_step(
            "folded", "linear", net, pictures=160, seen=80, tolerance=0.0, training=part
        )
    )
    done = steps.run_steps(replace(table, steps=some), tmp_path)
    found = done["folded"]["result"]
    assert found["folded"] == [["blocks.0.mlp.0", "blocks.0.mlp.2"]]
    assert found["linear"] == ["blocks.0.mlp.1"]
    assert found["macs"][1] < found["macs"][0]
    model = load_checkpoint(tmp_path / "folded/model.pt").model
    assert not model.blocks[0].attention.out.weight[:4].any()
    assert analyse(model, kinds.INPUT_SHAPE).macs() == found["macs"][1]


def test_plans_of_residual_networks_stay_as_they_were() -> None:
    """What finished steps of the other tables are held against."""
    step = kinds.start_step(gormez.SMALL.net, seed=1)
    assert step.name == "1/start"
    assert step.task == {
        "net": {"depth": 20, "blocks": (1, 3, 4, 5, 7, 8), "shortcut": "B", "head": "pooled"},
        "seed": 1,
    }


def test_the_budget_of_the_small_setting_is_told() -> None:
    """Steps name every network once, and cost what is guessed for them."""
    names = [
        step.name
        for place, _, seed in nepenthe._runs(nepenthe.small())
        for step in nepenthe._run_steps(nepenthe.small(), place, seed)
    ]
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"resnet18", "mobilenet", "vit"}

"""
Nascimento et al., "Pruning Everything, Everywhere, All at Once" (arXiv 2506.04513).

    python bench/seeds/everything.py [--full] [--seeds N] [--steps] [--data DIR] [--work DIR]

A pretrained ResNet-56, given exits behind its first two stages, loses a block or as many filters
in each step: whichever child is more similar to its parent (CKA) lives on, until three quarters of
the MACs are gone, and then as many as the paper's 86.37 %. Beside it, at equal MACs: blocks
alone, filters alone, a coin in place of CKA between the same two children, and CKA between
children that were scored at random. Accuracy, MACs, int8 milliseconds of every exit, and
robustness before and after. Without --full a part of CIFAR-10 and short recoveries, sized for two
cores. Killed, it goes on where it was.
"""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from cifar import DATA, LISTED, LOSSLESS_TESTS, Cifar
from seeds import kinds
from seeds.curves import Curve, band, common_costs
from seeds.page import figure, grid, spread, verdicts
from seeds.steps import Step, Table, command, main, of_settings

NAME = "seeds-everything"
PAPER = "Nascimento et al., 2506.04513"
FIRST, SECOND = 0.25, 1 - 0.8637  # the shares of the MACs that are left
PAPER_LOST = 0.66  # points, at 78.80 % of the MACs, blocks alone (Pons et al., 2405.17081)
TITLES = {
    "dense": "dense",
    "everything": "block or filters, by CKA",
    "blocks": "blocks alone",
    "filters": "filters alone",
    "random": "block or filters at random",
    "random-scores": "block or filters by CKA, both scored at random",
}
CHOOSING = ("everything", "random", "random-scores")  # those of which a step has two children
DEEPER = ("everything", "filters")  # blocks alone cannot lose the paper's 86.37 %
LEFT = {"": 1.0, "75": FIRST, "86": SECOND}  # goal -> the share of the MACs
# For the estimate alone: steps to the first goal and on to the second. As many filters as a block
# has take fewer MACs than it does.
STEPS = {
    "everything": (34, 17),
    "blocks": (20, 0),
    "filters": (0, 0),
    "random": (27, 0),
    "random-scores": (34, 0),
}
TRIED = {"kl": 1, "l1": 0, "random": 0}  # criterion -> forward passes for each part it scores


@dataclass(frozen=True, kw_only=True)
class Setting:
    """
    What is trained how long. *pictures* of the training half are used, a tenth of them held out.

    The new exits are trained for *head_epochs*; each step is followed by *epochs*, each of the
    two goals by *final* more; *course* and *final_course* are the keys of a recipe that say how the
    learning rate goes there. *criterion* scores filters and *block_criterion* blocks, on
    *samples* pictures; filters alone go in *filter_steps*. *robust* test pictures are made worse.
    """

    net: kinds.Net
    pictures: int
    ranges: int
    test: int | None
    head_epochs: int
    epochs: int
    final: int
    criterion: str
    block_criterion: str
    samples: int
    filter_steps: int
    robust: int
    seeds: int
    time_cap_s: float
    batch: int = 128
    precision: str = "float32"
    learning_rate: float = 0.01
    fgsm: float = 2 / 255
    noise: float = 0.05
    blur: float = 0.7
    course: Mapping[str, Any] = field(default_factory=lambda: {"warmup": 0.1})
    final_course: Mapping[str, Any] = field(default_factory=lambda: {"warmup": 0.1})


NET = kinds.Net(depth=56, blocks=(9, 18), shortcut="A")
SMALL = Setting(
    net=NET,
    pictures=5_000,
    ranges=1_000,
    test=None,
    head_epochs=4,
    epochs=1,
    final=12,
    criterion="l1",
    block_criterion="kl",
    samples=128,
    filter_steps=12,
    robust=2_000,
    seeds=2,
    time_cap_s=20.0,
    batch=64,
    precision="bfloat16",
)
FULL = Setting(
    net=NET,
    pictures=48_129,
    ranges=1_000,
    test=None,
    head_epochs=20,
    epochs=10,
    final=190,
    criterion="kl",
    block_criterion="kl",
    samples=5_000,
    filter_steps=20,
    robust=LOSSLESS_TESTS,
    seeds=3,
    time_cap_s=60.0,
    # As the authors' code: 0.01, a tenth of it from epoch 100 on, and again from 150 on.
    course={"schedule": "steps", "warmup": 0.0},
    final_course={"schedule": "steps", "drops": [100 / 190, 150 / 190], "warmup": 0.0},
)


# ---------------------------------------------------------------- the steps


def table(setting: Setting, *, name: str = NAME, data: Path = DATA, listed: str = LISTED) -> Table:
    """The steps of all seeds, and what is made of them."""
    cifar = Cifar(data, listed=listed)
    steps = [
        kinds.data_step(cifar, training=setting.pictures, ranges=setting.ranges, test=setting.test)
    ]
    for seed in range(setting.seeds):
        steps += _seed_steps(setting, kinds.pretrained_step(cifar, setting.net, seed=seed), seed)
    return Table(
        name=name,
        facts={"setting": asdict(setting)},
        steps=steps,
        figures=lambda results, work: figures(setting, results),
    )


def variants(setting: Setting) -> dict[str, dict[str, Any]]:
    """The compositions that are compared: name -> keys of a [prune] table, but the target."""
    both = {
        "criterion": setting.criterion,
        "block_criterion": setting.block_criterion,
        "samples": setting.samples,
        "coupled": False,
        "round_to": 1,
    }
    steps = {"schedule": "geometric", "steps": setting.filter_steps}
    return {
        "everything": {**both, "selector": "everything"},
        "blocks": {**both, "selector": "blocks"},
        "filters": {**both, "selector": "filters", **steps},
        "random": {**both, "selector": "random-child"},
        "random-scores": {
            **both,
            "selector": "everything",
            "criterion": "random",
            "block_criterion": "random",
        },
    }


def made_nets() -> list[tuple[str, str]]:
    """(variant, goal) of every network that is compared; dense has none."""
    found = [("dense", "")]
    for name in list(TITLES)[1:]:
        found += [(name, "75")] + ([(name, "86")] if name in DEEPER else [])
    return found


def _place(variant: str, goal: str) -> str:
    return f"{variant}-{goal}" if goal else variant


def _passes(setting: Setting, plan: Mapping[str, Any]) -> float:
    """Forward passes of the dense network to score all that a step of *plan* may remove."""
    blocks = (setting.net.depth - 2) // 2
    filters = blocks / 3 * (16 + 32 + 64)  # the first layer of each block has them
    # What lies before a filter is not computed again: half of a pass.
    tried = {"blocks": float(TRIED[plan["block_criterion"]] * blocks)}
    tried["filters"] = TRIED[plan["criterion"]] * filters / 2
    return tried.get(plan["selector"], sum(tried.values()))


def _seed_steps(setting: Setting, start: Step, seed: int) -> list[Step]:
    net, pictures = setting.net, setting.pictures
    tested = LOSSLESS_TESTS if setting.test is None else setting.test
    part = {"seed": seed, "batch": setting.batch, "learning_rate": setting.learning_rate}
    part |= {"weight_decay": 1e-4, "precision": setting.precision}
    steps = [
        start,
        kinds.train_step(
            f"{seed}/dense",
            start.name,
            net,
            pictures=pictures,
            augmentation={"flip": True, "shift": 4},
            training={**part, "regime": "frozen", "epochs": setting.head_epochs},
        ),
    ]
    for variant, plan in variants(setting).items():
        goals = [("75", "dense", 0.6)]
        if variant in DEEPER:
            goals.append(("86", f"{variant}-75", 0.2))
        for goal, source, mean_cost in goals:
            count = plan.get("steps", STEPS[variant][goal == "86"])
            trained = count * setting.epochs * mean_cost + setting.final * LEFT[goal]
            scored = count * _passes(setting, plan) * mean_cost**2
            steps.append(
                kinds.prune_step(
                    f"{seed}/{variant}-{goal}",
                    f"{seed}/{source}",
                    net,
                    pictures=pictures,
                    epochs=trained + scored * setting.samples / pictures * kinds.FORWARD,
                    extra_s=10.0 + 4.0 * count,
                    recipe={
                        "prune": {**plan, "target": {"macs": FIRST}},
                        "finetune": {**part, "epochs": setting.epochs, **setting.course},
                        "final": {**part, "epochs": setting.final, **setting.final_course},
                    },
                    macs_left=SECOND if goal == "86" else None,
                )
            )
    for variant, goal in made_nets():
        name = f"{seed}/{_place(variant, goal)}"
        asked = [
            kinds.answers_step(f"{name}-answers", name, net, pictures=tested),
            kinds.robustness_step(
                f"{name}-robust",
                name,
                net,
                pictures=setting.robust,
                fgsm=setting.fgsm,
                noise=setting.noise,
                blur=setting.blur,
            ),
            *kinds.int8_steps(name, pictures=tested, time_cap_s=setting.time_cap_s),
        ]
        for step in asked:
            # What is exported for a board takes seconds for each layer, and for each MAC.
            spent = step.extra_s * (1.0 if step.is_timing else (1 + LEFT[goal]) / 2)
            steps.append(replace(step, gmacs=step.gmacs * LEFT[goal], extra_s=spent))
    return steps


# ---------------------------------------------------------------- what comes out


def figures(setting: Setting, results: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows, out of the steps' *results*: a row for each network."""
    rows = {}
    for variant, goal in made_nets():
        name = _place(variant, goal)
        seeds = range(setting.seeds)
        pruned = [results[f"{seed}/{name}"] for seed in seeds] if goal else []
        answers = [results[f"{seed}/{name}-answers"] for seed in seeds]
        whole = [results[f"{seed}/dense-answers"] for seed in seeds]
        rows[name] = {
            "variant": variant,
            "goal": goal,
            "accuracy": [one["accuracy"] for one in answers],
            "macs": [_final_macs(one) for one in answers],
            "removed": [
                1 - _final_macs(one) / _final_macs(dense)
                for one, dense in zip(answers, whole, strict=True)
            ],
            "lost": [
                dense["accuracy"][-1] - one["accuracy"][-1]
                for one, dense in zip(answers, whole, strict=True)
            ],
            "parameters": [one["parameters"] for one in answers],
            "robust": [results[f"{seed}/{name}-robust"] for seed in seeds],
            "int8": [kinds.int8_of(results, f"{seed}/{name}") for seed in seeds],
            "children": [[row.get("child") for row in one["history"]] for one in pruned],
        }
    paths = {
        variant: [_path(results, variant, seed) for seed in range(setting.seeds)]
        for variant in variants(setting)
    }
    return {"splits": results["data"], "rows": rows, "paths": paths}


def _path(results: Mapping[str, Any], variant: str, seed: int) -> list[tuple[float, float]]:
    """
    (share of the MACs left, held-out accuracy of the final exit) after each step, dense first.

    The final trainings at the goals are not in it.
    """
    goals = ["75", "86"] if variant in DEEPER else ["75"]
    first = results[f"{seed}/{variant}-75"]
    dense = list(results[f"{seed}/dense"]["holdout_accuracies"].values())[-1]
    points = [(1.0, dense)]
    for goal in goals:
        for row in results[f"{seed}/{variant}-{goal}"]["history"]:
            share = row["macs"] / first["macs"][0]
            if share < points[-1][0]:
                points.append((share, list(row["accuracies"].values())[-1]))
    return points


def _final_macs(answers: Mapping[str, Any]) -> int:
    """MACs to the final exit, the heads of the others left out."""
    return int(list(answers["dense_macs"].values())[-1])


# ---------------------------------------------------------------- the page


def page(found: Mapping[str, Any]) -> str:
    """The section of docs/results.md, without its first line."""
    setting, splits = found["setting"], found["splits"]
    net = setting["net"]
    told = (
        f"A pretrained ResNet-{net['depth']} (shortcuts of option {net['shortcut']}) with exits "
        f"after blocks {', '.join(map(str, net['blocks']))} and the final one. "
        f"{splits['training']['pictures']:,} training pictures of CIFAR-10, a tenth of them held "
        f"out; accuracies are class means on {splits['test']['pictures']:,} lossless test "
        f"pictures, {_seeds_told(setting['seeds'])}. {setting['epochs']} "
        f"epochs after each step and {setting['final']} at each goal (paper: 10 for either child, "
        f"then 190, in every step), maps in {setting['precision']}, {_course(setting)}; children "
        "are compared before they recover, by the CKA of all exits on training pictures. Filters "
        f"are scored by {setting['criterion']}, blocks by {setting['block_criterion']} (paper: KL "
        "for both). "
        "The pretrained network has seen the pictures held out here; the test pictures it has "
        "not.\n"
    )
    return "\n".join(
        [
            told,
            grid(_accuracies(found)),
            _claim(found),
            f"![held-out accuracy along the steps](img/{image(setting)})\n",
            "Milliseconds of the int8 network to each exit, with the heads before it, and its "
            "accuracy there:\n",
            grid(_latencies(found)),
            verdicts(net for row in found["rows"].values() for net in row["int8"]),
            f"Robustness of the final exit on {setting['robust']:,} test pictures: the sign of the "
            f"gradient times {255 * setting['fgsm']:.0f}/255 (FGSM), normal noise of "
            f"{setting['noise']}, a Gaussian blur of {setting['blur']} pixels.\n",
            grid(_robustness(found)),
        ]
    )


def _seeds_told(count: int) -> str:
    return f"mean of {count} seeds (least .. largest)" if count > 1 else "1 seed"


def _course(setting: Mapping[str, Any]) -> str:
    """How the learning rate goes, beside the authors' code."""
    theirs = "a tenth of the learning rate after 100 and again after 150 of the 190"
    if setting.get("final_course", {}).get("drops"):
        return f"{theirs}, as there"
    return f"one cycle of the learning rate in each (there: {theirs})"


def _title(row: Mapping[str, Any]) -> str:
    """The variant and its goal."""
    title = TITLES[row["variant"]]
    if row["goal"]:
        title += f", {'75' if row['goal'] == '75' else '86.37'} % gone"
    return title


def _accuracies(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [
        [
            "",
            "MACs gone, %",
            "top-1 %, final exit",
            "points lost",
            "parameters",
            "steps",
            "blocks taken",
        ]
    ]
    for row in found["rows"].values():
        taken = [children.count("blocks") for children in row["children"]]
        final = [accuracy[-1] for accuracy in row["accuracy"]]
        rows.append(
            [
                _title(row),
                spread(row["removed"]),
                spread(final),
                spread(row["lost"], digits=2) if row["goal"] else "",
                f"{np.mean(row['parameters']):,.0f}",
                spread([len(one) for one in row["children"]], 1, 0) if row["goal"] else "",
                spread(taken, 1, 0) if row["variant"] in CHOOSING else "",
            ]
        )
    return rows


def _claim(found: Mapping[str, Any]) -> str:
    rows = found["rows"]
    ours = rows["everything-75"]
    lost = float(np.mean(ours["lost"]))
    said = (
        f"The choice loses {100 * lost:.2f} points at three quarters of the MACs: "
        f"{'within' if lost <= 0.01 else 'more than'} the one point allowed (blocks alone in the "
        f"paper before: {PAPER_LOST} at 78.80 %). "
    )
    leads = []
    for other in list(TITLES)[2:]:
        lead = np.array(rows[f"{other}-75"]["lost"]) - np.array(ours["lost"])
        leads.append(f"{spread(lead.tolist(), digits=2)} of {TITLES[other]}")
    won = sum(np.array(rows["random-75"]["lost"]) > np.array(ours["lost"]))
    return (
        f"{said}Points ahead there: {'; '.join(leads)}. What is left differs by a block or less. "
        "The paper's claim is the choice: beside a coin between the same two kinds of children, "
        f"whose filters and blocks are scored alike, CKA loses less in {won} of "
        f"{len(ours['lost'])} seed{'s' * (len(ours['lost']) > 1)}.\n"
    )


def _latencies(found: Mapping[str, Any]) -> list[list[str]]:
    count = len(found["setting"]["net"]["blocks"]) + 1
    head = [f"exit {k}: {what}" for k in range(1, count + 1) for what in ("ms", "int8 top-1 %")]
    rows = [["", *head]]
    for row in found["rows"].values():
        cells = []
        for k in range(count):
            cells.append(spread([one["measured"]["ms"][k] for one in row["int8"]], 1, 3))
            cells.append(spread([one["accuracy"][k] for one in row["int8"]]))
        rows.append([_title(row), *cells])
    return rows


def _robustness(found: Mapping[str, Any]) -> list[list[str]]:
    kinds_of = ("clean", "fgsm", "noise", "blur")
    rows = [["top-1 %", *kinds_of]]
    for row in found["rows"].values():
        cells = [spread([one[kind][-1] for one in row["robust"]]) for kind in kinds_of]
        rows.append([_title(row), *cells])
    return rows


def image(setting: Mapping[str, Any]) -> str:
    """The name of the figure of a *setting*."""
    return f"{NAME}-{setting['pictures']}.svg"


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Draw accuracy against MACs along the steps into *folder*; needs the extra `plot`."""
    lines = {}
    for variant, seeds in found["paths"].items():
        # Cheapest first, as a curve runs.
        curves = [Curve(*np.array(points[::-1]).T) for points in seeds]
        lines[TITLES[variant]] = band(curves, common_costs(curves))
    figure(
        folder / image(found["setting"]),
        lines,
        title=f"{PAPER}: ResNet-{found['setting']['net']['depth']}, CIFAR-10",
        cost="share of the MACs that is left",
        accuracy="held-out accuracy of the final exit after each step",
    )


# ---------------------------------------------------------------- the command


if __name__ == "__main__":
    make = of_settings(table, NAME, SMALL, FULL)
    sys.exit(main(command(__doc__ or "", "bench/seeds/everything.py", make)))

"""
Görmez & Koyuncu, "Pruning Early Exit Networks" (arXiv 2207.03644): S1 against S2.

    python bench/seeds/gormez.py [--full] [--seeds N] [--steps] [--data DIR] [--work DIR]

S1 trains a ResNet with its exits and prunes all of it; S2 trains and prunes the network first,
then puts new exits onto the frozen rest and prunes those. Both set single weights to zero, 20
times the least tenth of what is left, by magnitude over all layers of the pool. Beside them: the
same two with filters removed, as int8 with milliseconds of every exit, and every criterion
against random. Without --full a smaller network on a part of CIFAR-10, sized for two cores.
Killed, it goes on where it was.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from cifar import DATA, LISTED, LOSSLESS_TESTS, Cifar
from seeds import kinds
from seeds.curves import Band, Curve, band, common_costs, crossings, saving, sweep
from seeds.page import figure, grid, spread, verdicts
from seeds.steps import Step, Table, command, main, of_settings

NAME = "seeds-gormez"
PAPER = "Görmez & Koyuncu, 2207.03644"
# Read off the authors' poster, ± 0.5 points: all samples leave at exit k of a ResNet-56.
PAPER_ACCURACY = {
    "dense": (0.597, 0.648, 0.780, 0.820, 0.880, 0.909, 0.923),
    "s1": (0.608, 0.664, 0.778, 0.809, 0.854, 0.866, 0.827),
    "s2": (0.525, 0.600, 0.715, 0.745, 0.830, 0.855, 0.875),
}
PAPER_SAVING = 0.15
TITLES = {"dense": "dense, with exits", "s1": "S1, all at once", "s2": "S2, ordered"}
# Shallow-Deep Networks, whose heads these are: weights grow up to these (Kaya et al. 2019).
EXIT_WEIGHTS = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.0)
WEIGHT_CRITERIA = ("random", "magnitude", "snip", "force")
FILTER_CRITERIA = (
    *("random", "l1", "l2", "bn-gamma", "bn-statistics", "taylor", "kl", "state-entropy"),
    "crop-s",
)
RANDOM = "random"
SCORED = 128  # pictures that a criterion sees in each step: KL takes every filter out once
_KL_S = 40.0  # a step of KL, for the estimate


@dataclass(frozen=True, kw_only=True)
class Setting:
    """
    What is trained how long. *pictures* of the training half are used, a tenth of them held out.

    *dense* epochs before any pruning; S2 fine-tunes *half* epochs in each step of both halves,
    S1 twice that in each of its steps. Of the filters' twins each step has *filter_epochs*, and
    both end on *filter_final* of S2's heads; each criterion has *criterion_epochs* in each step.
    *course* are the keys of a recipe that say how the learning rate goes while dense.
    """

    net: kinds.Net
    pictures: int
    ranges: int
    test: int | None
    dense: int
    steps: int
    half: int
    filter_steps: int
    filter_epochs: int
    filter_final: int
    criterion_steps: int
    criterion_epochs: int
    seeds: int
    time_cap_s: float
    batch: int = 128
    precision: str = "float32"
    learning_rate: float = 0.1
    finetune_rate: float = 0.02
    course: Mapping[str, Any] = field(default_factory=dict)


# The paper's exits stand after blocks 4, 8, 12, 16, 20, 24 and 27 of 27: a third of that, rounded.
SMALL = Setting(
    net=kinds.Net(depth=20, blocks=(1, 3, 4, 5, 7, 8)),
    pictures=8_000,
    ranges=1_000,
    test=None,
    dense=16,
    steps=20,
    half=1,
    filter_steps=4,
    filter_epochs=2,
    filter_final=4,
    criterion_steps=3,
    criterion_epochs=1,
    seeds=3,
    time_cap_s=30.0,
    precision="bfloat16",
)
FULL = Setting(
    net=kinds.Net(depth=56, blocks=(4, 8, 12, 16, 20, 24)),
    pictures=48_129,
    ranges=1_000,
    test=None,
    dense=100,
    steps=20,
    half=5,
    filter_steps=4,
    filter_epochs=10,
    filter_final=20,
    criterion_steps=4,
    criterion_epochs=3,
    seeds=3,
    time_cap_s=60.0,
    # Shallow-Deep Networks' code, whose network the paper takes.
    course={"schedule": "steps", "drops": [0.35, 0.6, 0.85], "warmup": 0.0},
)


# ---------------------------------------------------------------- the steps


def table(setting: Setting, *, name: str = NAME, data: Path = DATA, listed: str = LISTED) -> Table:
    """The steps of all seeds, and what is made of them."""
    cifar = Cifar(data, listed=listed)
    steps = [
        kinds.data_step(cifar, training=setting.pictures, ranges=setting.ranges, test=setting.test)
    ]
    for seed in range(setting.seeds):
        steps += _seed_steps(setting, seed)
    return Table(
        name=name,
        facts={"setting": asdict(setting)},
        steps=steps,
        figures=lambda results, work: figures(setting, results, work),
    )


def _seed_steps(setting: Setting, seed: int) -> list[Step]:
    net, pictures = setting.net, setting.pictures
    tested = LOSSLESS_TESTS if setting.test is None else setting.test
    part = {"seed": seed, "batch": setting.batch, "weight_decay": 5e-4}
    part["precision"] = setting.precision
    whole = {**part, "epochs": setting.dense, "learning_rate": setting.learning_rate}
    whole |= setting.course
    weights = EXIT_WEIGHTS[-net.exits :]

    def dense(name: str, **training: Any) -> Step:
        return kinds.train_step(
            f"{seed}/{name}-dense",
            f"{seed}/start",
            net,
            pictures=pictures,
            augmentation={"flip": True, "shift": 4},
            training={**whole, **training},
        )

    def pruned(
        name: str,
        source: str,
        epochs: float,
        finetune: int,
        final: int = 0,
        extra_s: float = 0.0,
        **plan: Any,
    ) -> Step:
        rate = {**part, "learning_rate": setting.finetune_rate, "warmup": 0.1}
        recipe: dict[str, Any] = {"prune": plan, "finetune": {**rate, "epochs": finetune}}
        if final:
            recipe["final"] = {**rate, "epochs": final}
        return kinds.prune_step(
            f"{seed}/{name}",
            f"{seed}/{source}-dense",
            net,
            pictures=pictures,
            epochs=epochs,
            recipe=recipe,
            extra_s=10.0 + 2.0 * plan["steps"] + extra_s,
        )

    count, half, third = setting.steps, setting.half, kinds.FORWARD
    share = 0.9**count
    zeros: dict[str, Any] = {"target": {"weights": share}, "steps": count}
    narrow: dict[str, Any] = {"target": {"macs": 0.5}, "steps": setting.filter_steps, "round_to": 8}
    backbone = setting.filter_steps * setting.filter_epochs
    heads = setting.filter_epochs + setting.filter_final
    steps = [
        kinds.start_step(net, seed=seed),
        dense("s1", regime="joint", exit_weights=list(weights), ramp=True),
        dense("s2", regime="mixed", phase_shares=[1.0, 0.0, 0.0]),
        pruned("s1", "s1", 2 * count * half, 2 * half, method="gormez-all", **zeros),
        pruned("s2", "s2", count * half * (1 + third), half, method="gormez-ordered", **zeros),
        # S2's heads are one linear layer each: there are no filters in them, so they have one
        # fine-tuning instead of a step for each, and the final one. S1 gets as many epochs.
        pruned(
            "s1-filters",
            "s1",
            backbone + heads,
            setting.filter_epochs,
            heads,
            method="gormez-all-filters",
            **narrow,
        ),
        pruned(
            "s2-filters",
            "s2",
            backbone + third * heads,
            setting.filter_epochs,
            setting.filter_final,
            method="gormez-ordered-filters",
            **narrow,
        ),
    ]
    for made in ("s1-dense", "s1", "s2"):
        steps.append(
            kinds.answers_step(f"{seed}/{made}-answers", f"{seed}/{made}", net, pictures=tested)
        )
    for made in ("s1-dense", "s1-filters", "s2-filters"):
        steps += kinds.int8_steps(f"{seed}/{made}", pictures=tested, time_cap_s=setting.time_cap_s)
    each, times = setting.criterion_epochs, setting.criterion_steps
    for kind, names, plan in (
        ("weights", WEIGHT_CRITERIA, {**zeros, "steps": times}),
        ("filters", FILTER_CRITERIA, {**narrow, "steps": times}),
    ):
        for criterion in names:
            scored = {**plan, "criterion": criterion, "schedule": "geometric", "samples": SCORED}
            extra_s = _KL_S * times if criterion == "kl" else 0.0
            name, epochs = f"{kind}-{criterion}", times * each
            steps.append(pruned(name, "s1", epochs, each, extra_s=extra_s, **scored))
    return steps


# ---------------------------------------------------------------- what comes out


def figures(setting: Setting, results: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """All that the page shows, out of the steps' *results*."""
    seeds = range(setting.seeds)
    answers = {
        made: [results[f"{seed}/{step}-answers"] for seed in seeds]
        for made, step in (("dense", "s1-dense"), ("s1", "s1"), ("s2", "s2"))
    }
    accuracy = {made: [one["accuracy"] for one in rows] for made, rows in answers.items()}
    curves = {
        made: [
            sweep(
                kinds.answers_of(work / f"{seed}/{step}-answers"),
                kinds.as_curve_costs(results[f"{seed}/{step}-answers"]),
            )
            for seed in seeds
        ]
        for made, step in (("dense", "s1-dense"), ("s1", "s1"), ("s2", "s2"))
    }
    return {
        "splits": results["data"],
        "accuracy": accuracy,
        "ordering": ordering(accuracy["s1"], accuracy["s2"]),
        "zeros": {made: [one["zeros"] for one in rows] for made, rows in answers.items()},
        "head_zeros": {made: [_head_zeros(one) for one in rows] for made, rows in answers.items()},
        "exit_macs": {
            made: np.mean([kinds.as_curve_costs(one) for one in rows], axis=0).round().tolist()
            for made, rows in answers.items()
        },
        "parameters": answers["dense"][0]["parameters"],
        **compared(curves),
        "int8": {
            made: [kinds.int8_of(results, f"{seed}/{step}") for seed in seeds]
            for made, step in (("dense", "s1-dense"), ("s1", "s1-filters"), ("s2", "s2-filters"))
        },
        "filters_macs": {
            made: [results[f"{seed}/{made}-filters"]["macs"] for seed in seeds]
            for made in ("s1", "s2")
        },
        "criteria": {
            kind: {
                name: [results[f"{seed}/{kind}-{name}"]["history"] for seed in seeds]
                for name in names
            }
            for kind, names in (("weights", WEIGHT_CRITERIA), ("filters", FILTER_CRITERIA))
        },
    }


def _head_zeros(answers: Mapping[str, Any]) -> list[float]:
    """The share of zeros in the linear layer of each exit, earliest first."""
    heads = [row for name, row in answers["layers"].items() if name.endswith("linear")]
    final = [row for name, row in answers["layers"].items() if name.startswith("backbone.heads")]
    ordered = [row for row in heads if row not in final] + final
    return [row["zeros"] / row["weights"] for row in ordered]


def ordering(s1: Sequence[Sequence[float]], s2: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """
    Exit by exit whether the published order holds: S1 ahead at all but the final exit, S2 there.

    *s1* and *s2* are accuracies (seeds, exits).
    """
    leads = np.array(s1) - np.array(s2)
    exits = leads.shape[1]
    rows = []
    for k in range(exits):
        sign = -1 if k == exits - 1 else 1
        rows.append(
            {
                "exit": k + 1,
                "published": "s1" if sign > 0 else "s2",
                "lead_of_s1": leads[:, k].tolist(),
                "holds_on_average": bool(sign * leads[:, k].mean() >= 0),
                "holds_in_seeds": int((sign * leads[:, k] >= 0).sum()),
            }
        )
    return rows


def compared(curves: Mapping[str, Sequence[Curve]]) -> dict[str, Any]:
    """Bands of the curves, where S1's and S2's cross, and what each saves at most."""
    bands = {}
    for made, some in curves.items():
        own = band(some, common_costs(some))
        bands[made] = {key: np.round(getattr(own, key), 6).tolist() for key in vars(own)}
    shared = common_costs([*curves["s1"], *curves["s2"]])
    crossed = crossings(band(curves["s1"], shared), band(curves["s2"], shared))
    savings = {
        ours: None if found is None else asdict(found)
        for ours, found in (
            ("s1", saving(curves["s1"], curves["s2"])),
            ("s2", saving(curves["s2"], curves["s1"])),
        )
    }
    return {"bands": bands, "crossings": crossed, "savings": savings}


# ---------------------------------------------------------------- the page


def page(found: Mapping[str, Any]) -> str:
    """The section of docs/results.md, without its first line."""
    setting = found["setting"]
    parts = [
        _told(found),
        grid(_per_exit(found)),
        _order_told(found),
        f"![accuracy against expected MACs](img/{image(setting)})\n",
        _curves_told(found),
        "The structured twins: filters removed to half the MACs, converted to int8, every exit "
        "timed with the heads before it. Means over the seeds (least .. largest).\n",
        grid(_twins(found)),
        verdicts(net for nets in found["int8"].values() for net in nets),
        "Every criterion against random, from S1's dense network: accuracy on the held-out tenth, "
        "mean over the exits and the seeds, and in brackets points ahead of random (least .. "
        "largest over the seeds). "
        f"{setting['criterion_epochs']} epochs in each step; widths stay multiples of 8.\n",
        grid(_criteria(found, "weights")),
        grid(_criteria(found, "filters")),
    ]
    return "\n".join(parts)


def image(setting: Mapping[str, Any]) -> str:
    """The name of the figure of a *setting*."""
    return f"{NAME}-{setting['net']['depth']}.svg"


def _told(found: Mapping[str, Any]) -> str:
    setting, splits = found["setting"], found["splits"]
    net = setting["net"]
    places = ", ".join(map(str, net["blocks"]))
    epochs = setting["dense"] + 2 * setting["steps"] * setting["half"]
    drops = " %, ".join(f"{100 * drop:.0f}" for drop in setting.get("course", {}).get("drops", ()))
    course = f"a tenth after {drops} % of the dense epochs as SDN's code has it, then " * bool(
        drops
    )
    twins = setting["dense"] + setting["filter_steps"] * setting["filter_epochs"]
    twins += setting["filter_epochs"] + setting["filter_final"]
    return (
        f"ResNet-{net['depth']}, shortcuts of option {net['shortcut']}, exits after blocks "
        f"{places} and the final one, SDN's 4x4 heads; {found['parameters']:,} parameters. "
        f"{splits['training']['pictures']:,} training pictures of CIFAR-10, a tenth of them held "
        f"out; accuracies are class means on {splits['test']['pictures']:,} lossless test "
        f"pictures, {setting['seeds']} seeds. {epochs} epochs for either strategy: "
        f"{setting['dense']} dense, then {2 * setting['half']} in each of {setting['steps']} steps "
        f"for S1, {setting['half']} in each step of both halves for S2; {twins} epochs for either "
        f"twin. Not known from the paper, so ours: optimiser (SGD, {course}one cycle, learning "
        f"rate {setting['learning_rate']}, then {setting['finetune_rate']}, maps in "
        f"{setting['precision']}), epochs, exit weights "
        "(SDN's while dense, then all 1) and the grid of thresholds.\n"
        + (
            ""
            if net["depth"] == 56
            else "The paper's network is ResNet-56 on all of CIFAR-10: only the signs can be "
            "compared.\n"
        )
    )


def _per_exit(found: Mapping[str, Any]) -> list[list[str]]:
    count = len(found["ordering"])
    rows = [["top-1 %, all leave at exit", *map(str, range(1, count + 1)), "zeros"]]
    for made, title in TITLES.items():
        cells = [spread(column) for column in zip(*found["accuracy"][made], strict=True)]
        rows.append([title, *cells, f"{np.mean(found['zeros'][made]):.3f}"])
        if count == len(PAPER_ACCURACY[made]):
            paper = [f"{100 * value:.1f}" for value in PAPER_ACCURACY[made]]
            rows.append([f"paper: {title}", *paper, "0.000" if made == "dense" else "0.88"])
    leads = [spread(row["lead_of_s1"]) for row in found["ordering"]]
    rows.append(["S1 ahead of S2, points", *leads, ""])
    for made in ("s1", "s2"):
        zeros = [
            f"{np.mean(column):.2f}" for column in zip(*found["head_zeros"][made], strict=True)
        ]
        rows.append([f"zeros in {made.upper()}'s heads", *zeros, ""])
    macs = [f"{value / 1e6:.2f}" for value in found["exit_macs"]["dense"]]
    rows.append(["million MACs to there, dense", *macs, ""])
    return rows


def _order_told(found: Mapping[str, Any]) -> str:
    rows, seeds = found["ordering"], found["setting"]["seeds"]
    early, last = rows[:-1], rows[-1]
    holds = [row for row in early if row["holds_on_average"]]
    said = (
        f"Published: S1 is better at exits 1 to {len(early)}, S2 at exit {last['exit']}. Here S1 "
        f"is better on average at {len(holds)} of these {len(early)} exits"
    )
    broken = [str(row["exit"]) for row in early if not row["holds_on_average"]]
    said += f" (not at {', '.join(broken)})" if broken else ""
    said += (
        f", and at exit {last['exit']} S2 is "
        f"{'better' if last['holds_on_average'] else 'not better'} "
        f"({last['holds_in_seeds']} of {seeds} seeds as published). "
    )
    kept = len(holds) == len(early) and last["holds_on_average"]
    return said + (
        "The published order holds.\n" if kept else "The published order does not hold.\n"
    )


def _curves_told(found: Mapping[str, Any]) -> str:
    crossed = [
        f"{cost / 1e6:.2f} million MACs ({accuracy:.1%})" for cost, accuracy in found["crossings"]
    ]
    said = "One threshold on the largest probability, swept; MACs of weights that are not zero. "
    said += f"The mean curves cross at {', '.join(crossed)}. " if crossed else ""
    said += "" if crossed else "The mean curves do not cross. "
    for ours, theirs in (("s1", "s2"), ("s2", "s1")):
        most = found["savings"][ours]
        if most is None:
            said += f"There is no accuracy that both reach for {ours.upper()} to save at. "
            continue
        said += (
            f"{ours.upper()} saves at most {most['share']:.1%} against {theirs.upper()}, at "
            f"{most['accuracy']:.1%} accuracy (seeds by themselves: "
            f"{', '.join(f'{one:.1%}' for one in most['each'])}). "
        )
    return said + f"The paper: S1 saves up to {PAPER_SAVING:.0%}.\n"


def _twins(found: Mapping[str, Any]) -> list[list[str]]:
    count = len(found["ordering"])
    rows = [["", *(f"exit {k}" for k in range(1, count + 1))]]
    for made, title in TITLES.items():
        nets = found["int8"][made]
        right = zip(*(net["accuracy"] for net in nets), strict=True)
        times = zip(*(net["measured"]["ms"] for net in nets), strict=True)
        accuracy = [spread(column) for column in right]
        ms = [spread(column, 1, 3) for column in times]
        rows.append([f"{title}: int8 top-1 %", *accuracy])
        rows.append([f"{title}: ms", *ms])
    return rows


def _criteria(found: Mapping[str, Any], kind: str) -> list[list[str]]:
    scored = found["criteria"][kind]
    histories = {
        name: np.array([[_mean_accuracy(row) for row in history] for history in seeds])
        for name, seeds in scored.items()
    }
    steps = scored[RANDOM][0]
    if kind == "weights":
        rows = [["single weights, zeros", *(f"{row['weights_gone']:.1%}" for row in steps)]]
    else:
        whole = found["filters_macs"]["s1"][0][0]
        shares = [f"step {row['step']}" for row in steps]
        rows = [["filters", *shares, f"MACs left of {whole / 1e6:.1f} million"]]
    for name, values in histories.items():
        cells = []
        for k in range(values.shape[1]):
            ahead = values[:, k] - histories[RANDOM][:, k]
            lead = "" if name == RANDOM else f" [{spread(ahead.tolist())}]"
            cells.append(f"{100 * values[:, k].mean():.1f}{lead}")
        if kind == "filters":
            left = [history[-1]["macs"] / whole for history in scored[name]]
            cells.append(spread(left) + " %")
        rows.append([name, *cells])
    return rows


def _mean_accuracy(row: Mapping[str, Any]) -> float:
    return float(np.mean(list(row["accuracies"].values())))


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Draw the curves with their bands into *folder*; needs the extra `plot`."""
    lines = {}
    for made in ("s1", "s2", "dense"):
        one = {key: np.array(values) for key, values in found["bands"][made].items()}
        lines[TITLES[made]] = Band(**one).scaled(1e-6)
    figure(
        folder / image(found["setting"]),
        lines,
        title=f"{PAPER}: ResNet-{found['setting']['net']['depth']}, CIFAR-10",
        cost="expected million MACs an answer (weights that are not zero)",
        accuracy="accuracy, class mean",
        marks=[(cost / 1e6, accuracy) for cost, accuracy in found["crossings"]],
        is_logarithmic=True,
    )


# ---------------------------------------------------------------- the command


if __name__ == "__main__":
    make = of_settings(table, NAME, SMALL, FULL)
    sys.exit(main(command(__doc__ or "", "bench/seeds/gormez.py", make)))

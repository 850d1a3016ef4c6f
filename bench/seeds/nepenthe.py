"""
Liao et al., NEPENTHE (arXiv 2404.16890) and EGP (2308.06619): fewer layers by state entropy.

    python bench/seeds/nepenthe.py [--full] [--seeds N] [--steps] [--data DIR] [--work DIR]

From one dense network the smallest weights go, half of what is left in each iteration: shared out
over the layers by EGP's budget with EGP's estimator of state entropy, and with NEPENTHE's (our
reading: its code is not public); over all layers at once; and at random. What becomes linear is
folded where MACs fall. Beside it, at the nearest accuracy: blocks removed. Entropies, MACs and
int8 milliseconds before and after, on a CIFAR ResNet-18, a MobileNetV2-like net and a small vision
transformer. Without --full narrow nets on a part of CIFAR-10, sized for two cores. Killed, it goes
on where it was.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from cifar import DATA, LISTED, LOSSLESS_TESTS, Cifar
from seeds import kinds
from seeds.curves import Curve, band, common_costs
from seeds.page import figure, grid, spread, verdicts
from seeds.steps import Step, Table, command, main, of_settings

NAME = "seeds-nepenthe"
PAPER = "Liao et al., 2404.16890"
# As the LaCoOT paper (arXiv 2406.08933) reports them for ResNet-18 on CIFAR-10: top-1 %, million
# MACs, milliseconds on a GPU.
PAPER_ROWS = {
    "dense": (91.77, 140.19, 7.90),
    "Layer Folding": (88.76, 147.53, 9.89),
    "EGP": (90.64, 140.19, 7.62),
    "NEPENTHE": (89.26, 140.19, 7.71),
    "EASIER": (90.35, 140.19, 7.07),
    "LaCoOT, blocks removed": (90.99, 64.69, 4.78),
}
# Single weights by their size, but for the control: how many go from which layer.
WEIGHTS = {
    "egp": ("EGP", {"allocator": "egp", "criterion": "magnitude"}),
    "nepenthe": ("NEPENTHE, our reading", {"allocator": "nepenthe", "criterion": "magnitude"}),
    "magnitude": ("magnitude over all layers", {"allocator": "global", "criterion": "magnitude"}),
    "random": ("random weights", {"allocator": "global", "criterion": "random"}),
    "published": ("EGP without our guard", {"allocator": "egp", "criterion": "magnitude"}),
}
GUARDED = ("egp", "nepenthe", "magnitude", "random")  # these choose from the same layers
BLOCKS = {"kl": "blocks by KL", "random": "random blocks"}
RANDOM = "random"
BLOCK_CRITERION = "kl"
ESTIMATORS = ("egp", "nepenthe")
LINEAR_BITS = 0.05  # a layer of at most so much mean state entropy counts as linear
SAME = 0.02  # milliseconds or MACs nearer to the dense network's than this are called the same
BATCH = 128
TIMED = {"dense": "dense", "folded": "EGP, folded", "blocks": "blocks removed"}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """
    One network: *title*, how it is trained, and how many *blocks* are taken at most.

    The learning rates are those for batches of BATCH; others have theirs in proportion.
    """

    title: str
    net: kinds.Plain
    learning_rate: float
    finetune_rate: float
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Setting:
    """
    What is trained how long. *pictures* of the training half are used, a tenth of them held out.

    *dense* epochs before any pruning, *epochs* after each of the *iterations*, each block, and
    each folding. Entropies are told on *seen* training pictures, weights and blocks are chosen on
    *samples*.
    """

    nets: Mapping[str, Subject]
    pictures: int
    ranges: int
    test: int | None
    dense: int
    iterations: int
    epochs: int
    samples: int
    seen: int
    seeds: int
    time_cap_s: float
    batch: int = BATCH
    weight_decay: float = 1e-4


def _nets(width: int) -> dict[str, Subject]:
    """The three networks; *width* is that of the ResNet's first stage (the paper's: 64)."""
    from edgeexit.host.zoo import ZOO

    widths = [width << stage for stage in range(4)]
    resnet = {"stem": [width], "widths": widths, "blocks": [2, 2, 2, 2], "exits": []}
    return {
        "resnet18": Subject(
            title=f"ResNet-18, widths {widths[0]} to {widths[-1]}",
            net=kinds.Plain(factory="resnet", kwargs=resnet),
            learning_rate=0.1,
            finetune_rate=0.02,
            blocks=5,
        ),
        "mobilenet": Subject(
            title="MobileNetV2-like net",
            net=kinds.Plain(
                factory="mobilenet", kwargs={**ZOO["mobilenet"].kwargs, "exits": []}, slower=4.0
            ),
            learning_rate=0.1,
            finetune_rate=0.02,
            blocks=5,
        ),
        "vit": Subject(
            title="small vision transformer (GELU)",
            net=kinds.Plain(factory="vit", kwargs={"exits": []}, slower=2.0),
            learning_rate=0.05,
            finetune_rate=0.01,
            blocks=5,
        ),
    }


def small() -> Setting:
    """Two cores, somewhat over an hour."""
    return Setting(
        nets=_nets(16),
        pictures=3_600,
        ranges=500,
        test=3_000,
        dense=12,
        iterations=3,
        epochs=2,
        samples=256,
        seen=1_000,
        seeds=2,
        time_cap_s=15.0,
        batch=64,
    )


def full() -> Setting:
    """The paper's epochs, iterations and widths of the ResNet."""
    return Setting(
        nets=_nets(64),
        pictures=48_129,
        ranges=1_000,
        test=None,
        dense=160,
        iterations=9,
        epochs=160,
        samples=5_000,
        seen=10_000,
        seeds=3,
        time_cap_s=60.0,
    )


# ---------------------------------------------------------------- the steps


def table(setting: Setting, *, name: str = NAME, data: Path = DATA, listed: str = LISTED) -> Table:
    """The steps of all networks and seeds, and what is made of them."""
    cifar = Cifar(data, listed=listed)
    steps = [
        kinds.data_step(cifar, training=setting.pictures, ranges=setting.ranges, test=setting.test)
    ]
    for place, _net, seed in _runs(setting):
        steps += _run_steps(setting, place, seed)
    return Table(
        name=name,
        facts={"setting": asdict(setting)},
        steps=steps,
        figures=lambda results, work: figures(setting, results),
    )


def _runs(setting: Setting) -> Iterator[tuple[str, str, int]]:
    """(folder, network, seed) of each run; seeds first, so that one seed of all is done early."""
    for seed in range(setting.seeds):
        for name in setting.nets:
            yield f"{name}/{seed}", name, seed


def _run_steps(setting: Setting, place: str, seed: int) -> list[Step]:
    subject = setting.nets[place.partition("/")[0]]
    net, pictures = subject.net, setting.pictures
    tested = LOSSLESS_TESTS if setting.test is None else setting.test
    part = {"seed": seed, "batch": setting.batch, "weight_decay": setting.weight_decay}
    scale = setting.batch / BATCH
    dense = {**part, "epochs": setting.dense, "learning_rate": scale * subject.learning_rate}
    again = {**part, "epochs": setting.epochs, "learning_rate": scale * subject.finetune_rate}
    again["warmup"] = 0.1

    def pruned(name: str, source: str, epochs: float, **plan: Any) -> Step:
        return kinds.prune_step(
            f"{place}/{name}",
            f"{place}/{source}",
            net,
            pictures=pictures,
            epochs=epochs,
            extra_s=2.0 * plan["steps"],
            recipe={"prune": {**plan, "samples": setting.samples}, "finetune": again},
        )

    steps = [
        kinds.plain_step(f"{place}/start", net, seed=seed),
        kinds.train_step(
            f"{place}/dense",
            f"{place}/start",
            net,
            pictures=pictures,
            augmentation={"flip": True, "shift": 4},
            training=dense,
        ),
    ]
    count = setting.iterations
    zeros = {"target": {"weights": 0.5**count}, "steps": count, "schedule": "geometric"}
    for name, (_, plan) in WEIGHTS.items():
        kept = net.linear_layers + (net.only_ways if name in GUARDED else [])
        whole = {**zeros, **plan, "protect": sorted(set(kept))}
        steps.append(pruned(name, "dense", count * setting.epochs, **whole))
    for criterion in BLOCKS:
        for number in range(1, subject.blocks + 1):
            source = "dense" if number == 1 else f"blocks-{criterion}-{number - 1}"
            left = 1 - (number - 0.5) / (subject.blocks + 1)
            one = {"target": {"macs": 0.999}, "steps": 1, "selector": "blocks"}
            name, epochs = f"blocks-{criterion}-{number}", setting.epochs * left
            steps.append(pruned(name, source, epochs, **one, block_criterion=criterion))
    steps.append(
        kinds.fold_step(
            f"{place}/folded",
            f"{place}/egp",
            net,
            pictures=pictures,
            seen=setting.seen,
            tolerance=LINEAR_BITS,
            training=again,
        )
    )
    taken = [f"blocks-{criterion}-{k}" for criterion in BLOCKS for k in _numbers(subject)]
    for made in ("dense", *WEIGHTS, "folded", *taken):
        name = f"{place}/{made}"
        steps.append(kinds.answers_step(f"{name}-answers", name, net, pictures=tested))
    for made in ("dense", *WEIGHTS):
        name = f"{place}/{made}"
        steps.append(kinds.states_step(f"{name}-states", name, net, seen=setting.seen))
    candidates = [f"{place}/blocks-{BLOCK_CRITERION}-{k}" for k in _numbers(subject)]
    steps.append(kinds.nearest_step(f"{place}/blocks", f"{place}/folded", candidates))
    for made in TIMED:
        steps += kinds.int8_steps(f"{place}/{made}", pictures=tested, time_cap_s=setting.time_cap_s)
    return steps


def _numbers(subject: Subject) -> range:
    return range(1, subject.blocks + 1)


# ---------------------------------------------------------------- what comes out


def figures(setting: Setting, results: Mapping[str, Any]) -> dict[str, Any]:
    """All that the page shows, out of the steps' *results*: a row of seeds for each network."""
    places: dict[str, list[str]] = {name: [] for name in setting.nets}
    for place, name, _ in _runs(setting):
        places[name].append(place)
    return {
        "splits": results["data"],
        "nets": {name: _net_figures(setting, name, results, at) for name, at in places.items()},
    }


def _net_figures(
    setting: Setting, name: str, results: Mapping[str, Any], places: Sequence[str]
) -> dict[str, Any]:
    """What came out for one network; lists are over the seeds."""
    numbers = _numbers(setting.nets[name])
    chosen = [results[f"{place}/blocks"]["chosen"] for place in places]
    answers = {
        made: [results[f"{place}/{made}-answers"] for place in places]
        for made in ("dense", *WEIGHTS, "folded")
    }
    answers["blocks"] = [results[f"{one}-answers"] for one in chosen]
    return {
        "accuracy": {made: _final(rows) for made, rows in answers.items()},
        "macs": {made: [_macs(one) for one in rows] for made, rows in answers.items()},
        "parameters": answers["dense"][0]["parameters"],
        "used": {made: [_used(one) for one in rows] for made, rows in answers.items()},
        "holdout": {
            "dense": [_last(results[f"{place}/dense"]["holdout_accuracies"]) for place in places]
        }
        | {
            made: [
                [_last(row["accuracies"]) for row in results[f"{place}/{made}"]["history"]]
                for place in places
            ]
            for made in WEIGHTS
        },
        "gone": [row["weights_gone"] for row in results[f"{places[0]}/egp"]["history"]],
        "states": {
            made: [results[f"{place}/{made}-states"] for place in places]
            for made in ("dense", *WEIGHTS)
        },
        "folds": [results[f"{place}/folded"] for place in places],
        "blocks": {
            criterion: {
                key: [
                    [read(results[f"{place}/blocks-{criterion}-{k}-answers"]) for k in numbers]
                    for place in places
                ]
                for key, read in (("accuracy", lambda one: one["accuracy"][-1]), ("macs", _macs))
            }
            for criterion in BLOCKS
        },
        "taken": [int(one.rpartition("-")[2]) for one in chosen],
        "int8": {
            made: [kinds.int8_of(results, f"{place}/{made}") for place in places] for made in TIMED
        },
    }


def _final(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    return [one["accuracy"][-1] for one in answers]


def _macs(answers: Mapping[str, Any]) -> int:
    """MACs that are computed, zeros and all."""
    return int(list(answers["dense_macs"].values())[-1])


def _used(answers: Mapping[str, Any]) -> int:
    """Parameters that are not zero."""
    return int(answers["parameters"] - sum(row["zeros"] for row in answers["layers"].values()))


def _last(accuracies: Mapping[str, float]) -> float:
    return list(accuracies.values())[-1]


# ---------------------------------------------------------------- the page


def page(found: Mapping[str, Any]) -> str:
    """The section of docs/results.md, without its first line."""
    parts = [_told(found), grid(_costs(found)), _claims(found)]
    parts.append(
        verdicts(
            one for net in found["nets"].values() for row in net["int8"].values() for one in row
        )
    )
    parts.append(
        "Held-out accuracy after each iteration, all at the same number of zeros; in brackets "
        "points ahead of random weights (least .. largest over the seeds):\n"
    )
    parts.append(grid(_iterations(found)))
    for name in found["nets"]:
        parts.append(f"![accuracy against weights left](img/{image(found['setting'], name)})\n")
    parts.append(
        "Mean state entropy in bits over the activations, and how many of them are at or under "
        f"{LINEAR_BITS} bits, by either estimator (EGP's leaves out neurons that never switch, "
        "NEPENTHE's, as we read it, counts them and leaves out exact zeros):\n"
    )
    parts.append(grid(_entropies(found)))
    parts.append("Activation by activation, in forward order, by NEPENTHE's estimator:\n")
    parts += [grid(_by_activation(found, name)) for name in found["nets"]]
    parts.append(
        "Blocks one after another, accuracy on the test pictures after each, and points ahead of "
        "random blocks:\n"
    )
    parts.append(grid(_blocks(found)))
    parts.append(
        "The authors' ResNet-18 on CIFAR-10 as arXiv 2406.08933 reports it (64 to 512 wide; "
        "milliseconds on a GPU):\n"
    )
    rows = [["", "top-1 %", "million MACs", "ms"]]
    rows += [[name, *(f"{value:.2f}" for value in row)] for name, row in PAPER_ROWS.items()]
    parts.append(grid(rows))
    return "\n".join(parts)


def image(setting: Mapping[str, Any], net: str) -> str:
    """The name of the figure of a *setting* and one of its networks."""
    return f"{NAME}-{net}-{setting['pictures']}.svg"


def _told(found: Mapping[str, Any]) -> str:
    setting, splits = found["setting"], found["splits"]
    epochs = setting["epochs"]
    nets = "; ".join(
        f"{subject['title']}: {found['nets'][name]['parameters']:,} parameters, "
        f"{np.mean(found['nets'][name]['macs']['dense']) / 1e6:.1f} million MACs"
        for name, subject in setting["nets"].items()
    )
    return (
        f"{nets}. {splits['training']['pictures']:,} training pictures of CIFAR-10, a tenth of "
        f"them held out; accuracies are class means on {splits['test']['pictures']:,} lossless "
        f"test pictures, mean of {setting['seeds']} seeds (least .. largest). {setting['dense']} "
        f"epochs dense, then {setting['iterations']} iterations of {epochs} epochs, each of which "
        "sets half of what is left to zero (paper: 160 epochs, 9 iterations of 160). They choose "
        "from the layers with an activation behind them inside of the blocks that can also go as "
        "a whole: elsewhere an emptied layer may cut the network in two, as EGP without this guard "
        f"shows. {epochs} epochs after each block and after folding, too. EGP's budget and "
        "estimator are those of its published code; NEPENTHE's estimator is our reading of its "
        "text and reviews. Ours: one weight of a layer always stays, one cycle of the learning "
        f"rate, entropies over all pictures at once; an activation of at most {LINEAR_BITS} bits "
        "(NEPENTHE's estimator) is taken out only where two layers then fold exactly into one of "
        "fewer MACs. Blocks: the one whose absence changes the answers least (KL) goes, then the "
        "next; compared where their accuracy is nearest to that of EGP, folded.\n"
    )


def _costs(found: Mapping[str, Any]) -> list[list[str]]:
    head = ["", "top-1 %", "million MACs", "parameters not zero", f"at or under {LINEAR_BITS} bits"]
    rows = [[*head, "folds", "int8 top-1 %", "int8 ms"]]
    for name, net in found["nets"].items():
        for made, title in TIMED.items():
            whole = len(net["states"]["dense"][0]["layers"])
            linear = {
                "dense": [_linear(one) for one in net["states"]["dense"]],
                "folded": [_linear(one) for one in net["states"]["egp"]],
            }.get(made)
            folds = [len(one["folded"]) for one in net["folds"]]
            taken = f" ({spread(net['taken'], 1, 1)} of them)" if made == "blocks" else ""
            rows.append(
                [
                    f"{found['setting']['nets'][name]['title']}: {title}{taken}",
                    spread(net["accuracy"][made]),
                    spread(net["macs"][made], 1e-6, 2),
                    f"{np.mean(net['used'][made]):,.0f}",
                    "" if linear is None else f"{spread(linear, 1, 1)} of {whole}",
                    spread(folds, 1, 1) if made == "folded" else "",
                    spread([one["accuracy"][-1] for one in net["int8"][made]]),
                    spread(_ms(net, made), 1, 3),
                ]
            )
    return rows


def _ms(net: Mapping[str, Any], made: str) -> list[float]:
    return [one["measured"]["ms"][-1] for one in net["int8"][made]]


def _linear(states: Mapping[str, Any], estimator: str = "nepenthe") -> int:
    return sum(bits <= LINEAR_BITS for bits in states["bits"][estimator])


def _claims(found: Mapping[str, Any]) -> str:
    """What folding saved and what blocks saved, network by network."""
    said = []
    for name, net in found["nets"].items():
        parts = []
        for made in ("folded", "blocks"):
            macs = _ratio(net["macs"][made], net["macs"]["dense"])
            ms = _ratio(_ms(net, made), _ms(net, "dense"))
            parts.append(
                f"{TIMED[made]} {_change(macs)} the MACs and {_change(ms)} the milliseconds "
                f"({macs:.3f} and {ms:.3f} of the dense network's) at "
                f"{100 * np.mean(net['accuracy'][made]):.1f} %"
            )
        replaced = [len(one["linear"]) for one in net["folds"]]
        rest = [one["linear_accuracy"] for one in net["folds"]]
        said.append(
            f"{found['setting']['nets'][name]['title']}: {'; '.join(parts)} (dense: "
            f"{100 * np.mean(net['accuracy']['dense']):.1f} %, EGP before folding: "
            f"{100 * np.mean(net['accuracy']['egp']):.1f} %). With all activation modules at or "
            f"under {LINEAR_BITS} bits taken out, {spread(replaced, 1, 1)} of them, and no "
            f"training, EGP is at {spread(rest)} %."
        )
    said.append(
        "In the papers EGP and NEPENTHE leave the MACs as they are and the milliseconds within "
        "4 %; removed blocks (LaCoOT) leave 0.46 of the MACs and 0.61 of the milliseconds."
    )
    return "\n".join(f"- {one}" for one in said) + "\n"


def _ratio(ours: Sequence[float], dense: Sequence[float]) -> float:
    return float(np.mean(ours) / np.mean(dense))


def _change(ratio: float) -> str:
    if abs(ratio - 1) <= SAME:
        return "leaves"
    return "lowers" if ratio < 1 else "raises"


def _iterations(found: Mapping[str, Any]) -> list[list[str]]:
    gone = next(iter(found["nets"].values()))["gone"]
    rows = [["held-out top-1 %, zeros:", "0", *(f"{share:.1%}" for share in gone), "test"]]
    for name, net in found["nets"].items():
        control = np.array(net["holdout"][RANDOM])
        for made, (title, _) in WEIGHTS.items():
            values = np.array(net["holdout"][made])
            cells = []
            for k in range(values.shape[1]):
                lead = spread((values[:, k] - control[:, k]).tolist())
                mean = f"{100 * values[:, k].mean():.1f}"
                has_control = made in GUARDED and made != RANDOM
                cells.append(f"{mean} [{lead}]" if has_control else mean)
            rows.append(
                [
                    f"{found['setting']['nets'][name]['title']}: {title}",
                    f"{100 * np.mean(net['holdout']['dense']):.1f}",
                    *cells,
                    spread(net["accuracy"][made]),
                ]
            )
    return rows


def _entropies(found: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "EGP's mean", "at or under", "NEPENTHE's mean", "at or under", "activations"]]
    for name, net in found["nets"].items():
        titles = {"dense": "dense"} | {made: title for made, (title, _) in WEIGHTS.items()}
        for made, title in titles.items():
            states, cells = net["states"][made], []
            for estimator in ESTIMATORS:
                means = [float(np.mean(one["bits"][estimator])) for one in states]
                cells.append(spread(means, 1, 3))
                cells.append(spread([_linear(one, estimator) for one in states], 1, 1))
            count = str(len(states[0]["layers"]))
            rows.append([f"{found['setting']['nets'][name]['title']}: {title}", *cells, count])
    return rows


def _by_activation(found: Mapping[str, Any], name: str) -> list[list[str]]:
    states = found["nets"][name]["states"]
    count = len(states["dense"][0]["layers"])
    rows = [[found["setting"]["nets"][name]["title"], *(str(k + 1) for k in range(count))]]
    for made, seeds in states.items():
        bits = np.mean([one["bits"]["nepenthe"] for one in seeds], axis=0)
        title = WEIGHTS[made][0] if made in WEIGHTS else made
        rows.append([title, *(f"{value:.2f}" for value in bits)])
    return rows


def _blocks(found: Mapping[str, Any]) -> list[list[str]]:
    most = max(subject["blocks"] for subject in found["setting"]["nets"].values())
    rows = [["top-1 %, blocks gone:", *map(str, range(1, most + 1)), "MACs left, %"]]
    for name, net in found["nets"].items():
        control = np.array(net["blocks"][RANDOM]["accuracy"])
        for criterion, title in BLOCKS.items():
            values = np.array(net["blocks"][criterion]["accuracy"])
            cells = [""] * most
            for k in range(values.shape[1]):
                lead = spread((values[:, k] - control[:, k]).tolist())
                mean = f"{100 * values[:, k].mean():.1f}"
                cells[k] = mean if criterion == RANDOM else f"{mean} [{lead}]"
            left = np.array(net["blocks"][criterion]["macs"]) / net["macs"]["dense"][0]
            shares = " / ".join(f"{100 * share:.0f}" for share in left.mean(axis=0))
            title = f"{found['setting']['nets'][name]['title']}: {title}"
            rows.append([title, *cells, shares])
    return rows


def draw(found: Mapping[str, Any], folder: Path) -> None:
    """Draw accuracy against the weights that are left into *folder*; needs the extra `plot`."""
    for name, net in found["nets"].items():
        left = np.array([1.0, *(1 - share for share in net["gone"])])[::-1]
        lines = {}
        for made, (title, _) in WEIGHTS.items():
            rows = zip(net["holdout"]["dense"], net["holdout"][made], strict=True)
            curves = [Curve(left, np.array([dense, *after])[::-1]) for dense, after in rows]
            lines[title] = band(curves, common_costs(curves))
        title = found["setting"]["nets"][name]["title"]
        figure(
            folder / image(found["setting"], name),
            lines,
            title=f"{PAPER}: {title}, CIFAR-10",
            cost="share of the weights of the layers chosen from that is left",
            accuracy="held-out accuracy",
            is_logarithmic=True,
        )


# ---------------------------------------------------------------- the command


if __name__ == "__main__":
    make = of_settings(table, NAME, small(), full())
    sys.exit(main(command(__doc__ or "", "bench/seeds/nepenthe.py", make)))

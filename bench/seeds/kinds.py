"""
The kinds of steps that papers' tables are made of, each a short call of edgeexit's own functions.

Callers see Net and Plain (which networks there are), data_step, start_step, plain_step,
pretrained_step, dense_step, attach_step, train_step, prune_step, nearest_step, fold_step,
answers_step, states_step, robustness_step, int8_step, timed_step, and the last two as int8_steps;
answers_of, int8_of and as_curve_costs, which read what came out; and counted. Trainings and
prunings keep their own state files, so a killed one loses an epoch at most. Nothing here knows a
paper.
"""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from cifar import CLASSES, NORMAL, SIDE, Cifar
from numpy.typing import NDArray
from seeds.curves import class_mean
from seeds.steps import Job, Step

from edgeexit.decision import Costs, Record
from edgeexit.errors import UsageError
from edgeexit.files import digest_of, npz_bytes, read_npz, write_file
from edgeexit.samples import Samples

if TYPE_CHECKING:
    from edgeexit.host.graph import Graph

INPUT_SHAPE = (1, 3, SIDE, SIDE)
BATCH = 250
BUNDLE = "model.edgeexit"
RECORD, PROFILE = "record.npz", "profile.json"
# What a sample costs beside its forward: the backward in a training, nothing in a test.
FORWARD = 1 / 3


# ---------------------------------------------------------------- data


def data_step(cifar: Cifar, *, training: int, ranges: int, test: int | None) -> Step:
    """
    training.npz, ranges.npz (the training pictures behind those) and test.npz, lossless alone.

    *test* None: all of them.
    """

    def run(job: Job) -> dict[str, Any]:
        splits = {
            "training": cifar.pictures("train", training),
            "ranges": cifar.pictures("train", ranges, behind=training),
            "test": cifar.pictures("test", test),
        }
        for name, found in splits.items():
            arrays = {"samples": found.samples, "labels": found.labels, "ids": found.ids}
            write_file(job.folder / f"{name}.npz", npz_bytes(arrays))
        return {
            name: {"pictures": len(found), "digest": found.digest} for name, found in splits.items()
        }

    task = {"training": training, "ranges": ranges, "test": test}
    return Step(name="data", task=task, run=run, extra_s=10.0)


def _samples(path: Path) -> Samples:
    arrays = read_npz(path)
    return Samples(
        samples=arrays.get("samples"),
        labels=arrays.get("labels"),
        ids=arrays.get("ids"),
        name=path.stem,
    )


# ---------------------------------------------------------------- networks


class Costed(Protocol):
    """A network whose *gmacs* are known: MACs of one picture's forward, in billions."""

    @property
    def gmacs(self) -> float:
        """Billions of MACs."""


@dataclass(frozen=True, kw_only=True)
class Net:
    """
    A plain ResNet with an exit behind each of some *blocks* (numbers from 1), and the final one.

    *gmacs* are its MACs, heads included, in billions.
    """

    depth: int
    blocks: tuple[int, ...]
    shortcut: str = "B"
    head: str = "pooled"

    @property
    def exits(self) -> int:
        """How many exits there are, the final one included."""
        return len(self.blocks) + 1

    @property
    def gmacs(self) -> float:
        """Billions of MACs: what its 3x3 convolutions take; the rest is a percent."""
        per_stage = (self.depth - 2) // 3 * 16 * 16 * 9 * SIDE * SIDE
        return (3 * per_stage + 16 * 3 * 9 * SIDE * SIDE) / 1e9


@dataclass(frozen=True, kw_only=True)
class Plain:
    """
    A network of the zoo without early exits: a name of its FACTORIES, and their *kwargs*.

    *slower*: how much longer its MACs take than those of 3x3 convolutions, for the estimate alone.
    """

    factory: str
    kwargs: dict[str, Any]
    slower: float = 1.0

    def build(self) -> Any:
        """A new one; torch's generator decides its weights."""
        from edgeexit.host.zoo import FACTORIES

        return FACTORIES[self.factory](**self.kwargs)

    @property
    def gmacs(self) -> float:
        """Billions of MACs of 3x3 convolutions that would take as long."""
        return self.slower * self._graph.macs() / 1e9

    @cached_property
    def linear_layers(self) -> list[str]:
        """Its layers without an activation behind them: state entropy says nothing of these."""
        import torch

        from edgeexit.host.prune.states import state_entropy

        probe = [(torch.zeros(INPUT_SHAPE), torch.zeros(1, dtype=torch.int64))]
        found = state_entropy(self.build(), self._graph, probe)
        return [name for name in self._graph.layers if name not in found]

    @property
    def only_ways(self) -> list[str]:
        """Its layers outside of blocks that can go: emptied, one may cut the network in two."""
        inside = {name for block in self._graph.blocks.values() for name in block.layers}
        return [name for name in self._graph.layers if name not in inside]

    @cached_property
    def _graph(self) -> "Graph":
        from edgeexit.host.graph import analyse

        return analyse(self.build(), INPUT_SHAPE)


def plain_step(name: str, net: Plain, *, seed: int) -> Step:
    """The untrained network, as it is."""

    def run(job: Job) -> dict[str, Any]:
        import torch

        torch.manual_seed(seed)
        model = net.build()
        _write(job.folder / "model.pt", model, net.factory, net.kwargs)
        return _weights(model)

    task = {"factory": net.factory, "kwargs": net.kwargs, "seed": seed}
    return Step(name=name, task=task, run=run, extra_s=3.0)


def start_step(net: Net, *, seed: int) -> Step:
    """The untrained network with its exits; every strategy of the seed starts from it."""

    def run(job: Job) -> dict[str, Any]:
        import torch

        from edgeexit.host.zoo import resnet

        kwargs: dict[str, Any] = {"depth": net.depth, "exits": [], "shortcut": net.shortcut}
        torch.manual_seed(seed)
        return _with_exits(job, net, resnet(**kwargs), kwargs)

    return Step(name=f"{seed}/start", task={"net": asdict(net), "seed": seed}, run=run, extra_s=3.0)


def pretrained_step(cifar: Cifar, net: Net, *, seed: int) -> Step:
    """The pretrained plain network with untrained exits of *net*, whose shortcuts it must have."""

    def run(job: Job) -> dict[str, Any]:
        model, kwargs = cifar.pretrained(net.depth)
        if kwargs["shortcut"] != net.shortcut:
            raise UsageError(f"{job.step.name}: pretrained with option {kwargs['shortcut']}")
        return _with_exits(job, net, model, kwargs)

    task = {"net": asdict(net), "seed": seed}
    return Step(name=f"{seed}/start", task=task, run=run, extra_s=3.0)


def dense_step(cifar: Cifar, name: str, depth: int) -> Step:
    """The pretrained plain network of *depth*, without early exits."""

    def run(job: Job) -> dict[str, Any]:
        model, kwargs = cifar.pretrained(depth)
        _write(job.folder / "model.pt", model, "resnet", kwargs)
        return _weights(model)

    return Step(name=name, task={"depth": depth}, run=run, extra_s=2.0)


def attach_step(
    name: str, source: str, *, at: Sequence[str], head: str, widths: Sequence[Sequence[int]]
) -> Step:
    """The network of the step *source* with untrained exits behind the modules *at*."""

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.host.attach import attach_exits

        out = job.folder / "model.pt"
        found = attach_exits(
            job.of(source) / "model.pt",
            out,
            at=at,
            head=head,
            widths=widths,
            is_measured=False,
            again=True,
        )
        macs = [{"macs": row.macs, "head_macs": row.head_macs} for row in found.rows]
        return {"exits": macs, **_weights_of(out)}

    task = {"at": list(at), "head": head, "widths": [list(row) for row in widths]}
    return Step(name=name, needs=(source,), task=task, run=run, extra_s=5.0)


def _with_exits(job: Job, net: Net, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Write the plain *model*, and model.pt with its exits, into the step's folder."""
    from edgeexit.host.attach import attach_exits
    from edgeexit.host.checkpoint import load_checkpoint

    plain = job.folder / "plain.pt"
    _write(plain, model, "resnet", kwargs)
    attach_exits(
        plain,
        job.folder / "model.pt",
        at=[f"blocks.{block - 1}" for block in net.blocks],
        head=net.head,
        is_measured=False,
        again=True,
    )
    found = load_checkpoint(job.folder / "model.pt")
    return {"exits": list(found.exits), **_weights(found.model)}


def _write(path: Path, model: Any, factory: str, kwargs: dict[str, Any]) -> None:
    from edgeexit.host.checkpoint import save_checkpoint

    save_checkpoint(
        path,
        model=model,
        arch=f"edgeexit.host.zoo:{factory}",
        kwargs=kwargs,
        input_shape=INPUT_SHAPE,
        class_names=CLASSES,
        preprocess=NORMAL,
    )


def train_step(
    name: str,
    source: str,
    net: Costed,
    *,
    pictures: int,
    augmentation: Mapping[str, Any],
    training: Mapping[str, Any],
    data: Mapping[str, Any] | None = None,
    cost: float = 1.0,
) -> Step:
    """
    Train the network of the step *source*; *augmentation*, *training* and *data* as in a recipe.

    *pictures* is how many there are, the held-out ones included, and *cost* what the network
    takes beside *net*: for the estimate alone.
    """
    given = {} if data is None else {"data": dict(data)}

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.host.train import train

        recipe = job.folder / "recipe.toml"
        tables = {
            "model": {"checkpoint": str(job.of(source) / "model.pt")},
            "data": {"path": str(job.of("data") / "training.npz"), **(data or {})},
            "augmentation": augmentation,
            "training": training,
        }
        write_file(recipe, _toml(tables).encode())
        out = job.folder / "model.pt"
        found = train(recipe, out, on_step=lambda step: job.tell(_epoch(step)))
        return {
            "holdout_accuracies": found.accuracies,
            "best_epoch": found.best_epoch,
            "epochs": found.epochs,
            **_weights_of(out),
        }

    return Step(
        name=name,
        needs=("data", source),
        task={**given, "augmentation": dict(augmentation), "training": dict(training)},
        gmacs=cost * net.gmacs * pictures * training["epochs"],
        extra_s=5.0,
        run=run,
    )


def prune_step(
    name: str,
    source: str,
    net: Costed,
    *,
    pictures: int,
    epochs: float,
    extra_s: float,
    recipe: Mapping[str, Any],
    macs_left: float | None = None,
) -> Step:
    """
    Prune the network of the step *source*, fine-tuning as the *recipe* (its tables) says.

    With *macs_left* the target is that share of the MACs that the pruning of *source* began with.
    Where the recipe has a table [data], it is that of the training pictures, else as recorded.
    *epochs* of the whole network it comes to, and *extra_s* besides, for the estimate alone.
    """

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.files import Table
        from edgeexit.host.prune.engine import Progress, prune
        from edgeexit.host.prune.recipe import prune_recipe

        def told(progress: Progress) -> None:
            row = progress.row
            if row is None:
                job.tell()
            else:
                job.tell(f"{row['stage']} step {row['step']}: {_shares(row['accuracies'])}")

        out = job.folder / "model.pt"
        plan = dict(recipe["prune"])
        if macs_left is not None:
            first, now = job.result_of(source)["macs"]
            plan["target"] = {"macs": macs_left * first / now}
        tables = {"format": 1, **recipe, "prune": plan}
        if "data" in recipe:
            tables["data"] = {"path": str(job.of("data") / "training.npz"), **recipe["data"]}
        found = prune(
            job.of(source) / "model.pt",
            prune_recipe(Table(tables, name)),
            out,
            on_step=told,
        )
        return {
            "holdout_accuracies": found.accuracies[1],
            "history": list(found.history),
            "macs": list(found.macs),
            "parameters": list(found.parameters),
            **_weights_of(out),
        }

    return Step(
        name=name,
        needs=("data", source),
        task={"recipe": dict(recipe), "macs_left": macs_left},
        gmacs=net.gmacs * pictures * epochs,
        extra_s=extra_s,
        run=run,
    )


def nearest_step(name: str, like: str, sources: Sequence[str]) -> Step:
    """
    The network of that one of *sources* whose accuracy is nearest that of the step *like*.

    Accuracies of the final exit on the test pictures: each must have a step "...-answers". The
    first of equally near ones is taken.
    """
    answers = {source: f"{source}-answers" for source in (like, *sources)}

    def run(job: Job) -> dict[str, Any]:
        found = {one: job.result_of(step)["accuracy"][-1] for one, step in answers.items()}
        chosen = min(sources, key=lambda source: abs(found[source] - found[like]))
        write_file(job.folder / "model.pt", (job.of(chosen) / "model.pt").read_bytes())
        return {"chosen": chosen, **_weights_of(job.folder / "model.pt")}

    return Step(name=name, needs=(*sources, *answers.values()), run=run)


def fold_step(
    name: str,
    source: str,
    net: Costed,
    *,
    pictures: int,
    seen: int,
    tolerance: float,
    training: Mapping[str, Any],
) -> Step:
    """
    Fold the layers of the step *source*'s network that are linear enough, where MACs then fall.

    Activations of at most *tolerance* bits on *seen* training pictures; what was folded is
    trained again, with the zeros kept, as *training* says on the *pictures*. Also how many
    activations could go, and the accuracy on the test pictures with all of them gone, untrained.
    """

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.host import surgery
        from edgeexit.host.checkpoint import load_checkpoint, save_again
        from edgeexit.host.folding import fold_linear, linearise
        from edgeexit.host.graph import analyse
        from edgeexit.host.prune.states import dead_units, linearisable, silence

        checkpoint = load_checkpoint(job.of(source) / "model.pt")
        whole, batches = checkpoint.model, _batches(job, seen)
        graph = analyse(whole, INPUT_SHAPE)
        names = linearisable(whole, graph, batches, tolerance)
        without = copy.deepcopy(whole)
        silence(without, graph, dead_units(without, graph, batches))
        for one in names:
            linearise(without, one)
        test = _samples(job.of("data") / "test.npz")
        right = _float_logits(without, test, job).argmax(axis=2)[:, -1] == test.labels
        model, entries, done = fold_linear(whole, INPUT_SHAPE, batches, tolerance)
        if entries:
            _train_again(job, checkpoint, model, training)
        joined = surgery.joined([*checkpoint.surgery, *entries])
        save_again(job.folder / "model.pt", checkpoint, model, surgery=joined)
        return {
            **done,
            "linear": names,
            "linear_accuracy": class_mean(right, test.labels),
            "macs": [graph.macs(), analyse(model, INPUT_SHAPE).macs()],
            **_weights(model),
        }

    return Step(
        name=name,
        needs=("data", source),
        task={"seen": seen, "tolerance": tolerance, "training": dict(training)},
        gmacs=net.gmacs * pictures * training["epochs"],
        extra_s=10.0,
        run=run,
    )


def _train_again(job: Job, checkpoint: Any, model: Any, training: Mapping[str, Any]) -> None:
    """Train *model*, a form of *checkpoint*'s, in place; what is zero stays zero."""
    from edgeexit.files import Table
    from edgeexit.host.fit import Fit
    from edgeexit.host.graph import analyse
    from edgeexit.host.prune.engine import training_half
    from edgeexit.host.prune.masks import Masks, pool
    from edgeexit.host.recipe import DataPart, training_part

    material, _ = training_half(checkpoint, job.step.name, DataPart())
    masks = Masks.of(model, pool(analyse(model, INPUT_SHAPE), "all"), from_zeros=True)
    part = training_part(Table(dict(training), job.step.name))
    fit = Fit(model, material, part, where=job.step.name, influence=masks)
    while not fit.is_done:
        fit.run_epoch(lambda step: job.tell(_epoch(step)))
    fit.take_best()


def _batches(job: Job, count: int) -> list[tuple[Any, Any]]:
    """The first *count* training pictures as the network takes them, with their labels."""
    import torch

    from edgeexit.host.feed import to_input
    from edgeexit.preprocess import real_values

    some = _samples(job.of("data") / "training.npz")[:count]
    batches = []
    for start in range(0, len(some), BATCH):
        part = some[start : start + BATCH]
        inputs = to_input(real_values(part.samples, NORMAL), NORMAL)
        batches.append((inputs, torch.from_numpy(part.labels)))
    return batches


def _epoch(step: Any) -> str:
    """What to show at an epoch's end, nothing in between."""
    if step.accuracies is None:
        return ""
    return f"epoch {step.epoch}/{step.epochs}: {_shares(step.accuracies)}"


def _shares(accuracies: Mapping[str, float]) -> str:
    return " / ".join(f"{share:.1%}" for share in accuracies.values())


def _toml(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """A recipe's text: numbers, texts, booleans and lists of numbers only."""
    lines = ["format = 1"]
    for name, table in tables.items():
        lines.append(f"[{name}]")
        lines += [
            f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in table.items()
        ]
    return "\n".join(lines) + "\n"


def _weights_of(path: Path) -> dict[str, Any]:
    from edgeexit.host.checkpoint import load_checkpoint

    return _weights(load_checkpoint(path).model)


def _weights(model: Any) -> dict[str, Any]:
    """The digest of a network's numbers, which unlike a file's says nothing of where it lies."""
    parts = [
        name.encode() + tensor.contiguous().numpy().tobytes()
        for name, tensor in model.state_dict().items()
    ]
    return {"weights": digest_of(b"".join(parts))}


# ---------------------------------------------------------------- answers


def answers_step(name: str, source: str, net: Costed, *, pictures: int) -> Step:
    """
    What the float network of the step *source* answers to the test pictures, and what it costs.

    MACs are counted with the weights that are not zero; "dense" ones with all.
    """

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.host.checkpoint import load_checkpoint

        test = _samples(job.of("data") / "test.npz")
        checkpoint = load_checkpoint(job.of(source) / "model.pt")
        logits = _float_logits(checkpoint.model, test, job)
        costs, dense, layers = counted(checkpoint.model)
        total = sum(row["weights"] for row in layers.values())
        return {
            "accuracy": _save(job.folder, logits, test),
            "backbone_macs": costs.backbone.tolist(),
            "head_macs": costs.head.tolist(),
            "dense_macs": dense,
            "zeros": sum(row["zeros"] for row in layers.values()) / total,
            "parameters": sum(p.numel() for p in checkpoint.model.parameters()),
            "layers": layers,
        }

    gmacs = net.gmacs * pictures * FORWARD
    return Step(name=name, needs=("data", source), gmacs=gmacs, run=run)


def _float_logits(model: Any, test: Samples, job: Job) -> NDArray[np.float32]:
    """Logits of every exit, float32 (N, E, C)."""
    import torch

    from edgeexit.host.feed import to_input
    from edgeexit.host.model import exit_outputs
    from edgeexit.preprocess import real_values

    rows = []
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(test), BATCH):
            real = real_values(test.samples[start : start + BATCH], NORMAL)
            outputs = exit_outputs(model, to_input(real, NORMAL))
            rows.append(torch.stack(list(outputs.values()), dim=1).numpy())
            job.tell()
    return np.concatenate(rows)


def counted(model: Any) -> tuple[Costs, dict[str, int], dict[str, dict[str, int]]]:
    """
    Costs in MACs whose weights are not zero; dense MACs to reach each exit; layers' zeros.
    """
    from edgeexit.host.graph import analyse

    graph = analyse(model, INPUT_SHAPE)
    names = graph.exits
    backbone, head = np.zeros(len(names)), np.zeros(len(names))
    layers = {}
    for name, macs in graph.layer_macs().items():
        weight = model.get_parameter(f"{name}.weight").detach()
        zeros = int((weight == 0).sum())
        layers[name] = {"weights": weight.numel(), "zeros": zeros}
        used = macs * (1 - zeros / weight.numel())
        first = names.index(graph.layers[name].exits[0])
        owner = next((k for k, exit in enumerate(names) if name in graph.heads[exit]), None)
        if owner is None:
            backbone[first] += used
        else:
            head[owner] += used
    costs = Costs(backbone, head, np.zeros(len(names)))
    return costs, graph.exit_macs(), layers


def _save(folder: Path, logits: NDArray[Any], test: Samples) -> list[float]:
    """Keep what answers_of reads; the class-mean accuracy of each exit."""
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=2, keepdims=True)
    sure = 1 / np.exp(exact).sum(axis=2)
    predicted = logits.argmax(axis=2)
    arrays = {
        "confidence": sure.astype(np.float32),
        "predicted": predicted,
        "label": test.labels,
        "ids": test.ids,
    }
    write_file(folder / "answers.npz", npz_bytes(arrays))
    right = predicted == test.labels[:, None]
    return [class_mean(right[:, k], test.labels) for k in range(right.shape[1])]


def states_step(name: str, source: str, net: Costed, *, seen: int) -> Step:
    """
    The state entropy before each activation of the step *source*'s network, in forward order.

    In bits, by every estimator, over the first *seen* training pictures.
    """

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.host.checkpoint import load_checkpoint
        from edgeexit.host.graph import analyse
        from edgeexit.host.prune.states import ESTIMATORS, state_entropy

        model = load_checkpoint(job.of(source) / "model.pt").model
        found = state_entropy(model, analyse(model, INPUT_SHAPE), _batches(job, seen))
        places = {id(states): states for states in found.values()}.values()
        return {
            "layers": [list(states.layers) for states in places],
            "bits": {name: [states.entropy(name) for states in places] for name in ESTIMATORS},
        }

    gmacs = net.gmacs * seen * FORWARD
    return Step(name=name, needs=("data", source), task={"seen": seen}, gmacs=gmacs, run=run)


def answers_of(folder: Path) -> Record:
    """What a step of answers kept, as max_prob sees it."""
    arrays = read_npz(folder / "answers.npz")
    columns = [arrays.get(key) for key in ("confidence", "predicted", "label", "ids")]
    return Record(*columns)


# ---------------------------------------------------------------- robustness


def robustness_step(
    name: str, source: str, net: Costed, *, pictures: int, fgsm: float, noise: float, blur: float
) -> Step:
    """
    Accuracy of every exit on the first *pictures* test pictures, as they are and made worse.

    *fgsm* is the largest change of a pixel by the sign of the final exit's gradient (Goodfellow
    et al. 2015), *noise* the deviation of normal noise, both in units of 0..1; *blur* the
    deviation of a Gaussian in pixels. Pixels stay within 0..1.
    """

    def run(job: Job) -> dict[str, Any]:
        import torch

        from edgeexit.host.checkpoint import load_checkpoint

        test = _samples(job.of("data") / "test.npz")[:pictures]
        model = load_checkpoint(job.of(source) / "model.pt").model.eval()
        random = torch.Generator().manual_seed(0)
        worse: dict[str, Callable[[Any, Any], Any]] = {
            "clean": lambda pixels, labels: pixels,
            "fgsm": lambda pixels, labels: _attacked(model, pixels, labels, fgsm),
            "noise": lambda pixels, labels: (
                pixels + noise * torch.randn(pixels.shape, generator=random)
            ),
            "blur": lambda pixels, labels: _blurred(pixels, blur),
        }
        found = {}
        for kind, change in worse.items():
            rows = []
            for start in range(0, len(test), BATCH):
                some = torch.from_numpy(test.samples[start : start + BATCH]).permute(0, 3, 1, 2)
                labels = torch.from_numpy(test.labels[start : start + BATCH])
                pixels = change(some.float() / 255, labels).clamp(0, 1)
                with torch.inference_mode():
                    rows.append(_answers(model, pixels))
                job.tell()
            right = np.concatenate(rows) == test.labels[:, None]
            found[kind] = [class_mean(right[:, k], test.labels) for k in range(right.shape[1])]
        return found

    task = {"pictures": pictures, "fgsm": fgsm, "noise": noise, "blur": blur}
    gmacs = net.gmacs * pictures * (4 * FORWARD + 1)
    return Step(name=name, needs=("data", source), task=task, gmacs=gmacs, run=run)


def _normalised(pixels: Any) -> Any:
    """Pixels (N, 3, H, W) of 0..1 as the network takes them."""
    import torch

    mean, std = (torch.tensor(values)[:, None, None] for values in (NORMAL.mean, NORMAL.std))
    return (pixels - mean) / std


def _answers(model: Any, pixels: Any) -> NDArray[np.int64]:
    """The class that every exit answers, (N, E)."""
    import torch

    from edgeexit.host.model import exit_outputs

    outputs = exit_outputs(model, _normalised(pixels)).values()
    return np.asarray(torch.stack([one.argmax(1) for one in outputs], dim=1).numpy())


def _attacked(model: Any, pixels: Any, labels: Any, most: float) -> Any:
    """Every pixel moved by *most* in the direction in which the final exit's loss grows."""
    import torch
    from torch.nn.functional import cross_entropy

    from edgeexit.host.model import exit_outputs

    moved = pixels.clone().requires_grad_()
    final = list(exit_outputs(model, _normalised(moved)).values())[-1]
    (gradient,) = torch.autograd.grad(cross_entropy(final, labels), moved)
    return pixels + most * gradient.sign()


def _blurred(pixels: Any, deviation: float) -> Any:
    """A Gaussian over 5x5 pixels, borders repeated."""
    import torch
    from torch.nn.functional import conv2d, pad

    row = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * deviation**2))
    kernel = torch.outer(row, row) / row.sum() ** 2
    padded = pad(pixels, (2, 2, 2, 2), mode="replicate")
    return conv2d(padded, kernel.expand(3, 1, 5, 5).contiguous(), groups=3)


# ---------------------------------------------------------------- int8


def int8_step(name: str, source: str, *, pictures: int) -> Step:
    """
    Convert the network of the step *source*; its accuracies as int8 on the test pictures.

    The logits behind them stay beside the bundle, in record.npz.
    """

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.evaluate import record
        from edgeexit.host.convert import convert

        test = _samples(job.of("data") / "test.npz")
        target = job.folder / BUNDLE
        ranges = job.of("data") / "ranges.npz"
        bundle = convert(job.of(source) / "model.pt", target, ranges)
        job.tell("converted")
        found = record(bundle, [test], on_step=lambda _: job.tell())
        found.save(job.folder / RECORD)
        right = found.correct()
        return {
            "accuracy": [class_mean(right[:, k], test.labels) for k in range(right.shape[1])],
            "bytes": (target / "model.tflite").stat().st_size,
        }

    return Step(name=name, needs=("data", source), extra_s=30.0 + 0.003 * pictures, run=run)


def timed_step(name: str, source: str, *, time_cap_s: float, is_whole: bool = False) -> Step:
    """
    Time every exit of the int8 network of the step *source* with the instrument.

    With *is_whole* also every set of exits that tune may keep, and each exit alone.
    """

    def run(job: Job) -> dict[str, Any]:
        from edgeexit.bundle import load_bundle
        from edgeexit.collect import Limits
        from edgeexit.instrument import measure

        bundle = load_bundle(job.of(source) / BUNDLE)
        notebook = job.folder / "notebook.jsonl"
        profile = measure(
            bundle,
            "host",
            limits=Limits(processes=10, precision=0.005, time_cap_s=time_cap_s, block_ms=4.0),
            sets=None if is_whole else [bundle.exits, bundle.exits[-1:]],
            notebook=notebook,
            resume=notebook.exists(),
            on_step=lambda _: job.tell(),
            save=lambda profile: profile.save(job.folder / PROFILE),
        )
        cases = [profile.case(bundle.exits, exit) for exit in bundle.exits]
        latencies = [profile.latency(case) for case in cases if case is not None]
        if len(latencies) != len(cases):
            raise UsageError(f"{name}: an exit was not measured")
        return {
            "measured": {
                "ms": [one.value / 1e6 for one in latencies],
                "ms_low": [one.low / 1e6 for one in latencies],
                "ms_high": [one.high / 1e6 for one in latencies],
                "verdict": str(profile.verdict),
                "runtime": profile.runtime,
            },
        }

    return Step(
        name=name,
        needs=(source,),
        task={"time_cap_s": time_cap_s, **({"is_whole": True} if is_whole else {})},
        extra_s=20.0 + time_cap_s,
        is_timing=True,
        run=run,
    )


def int8_steps(source: str, *, pictures: int, time_cap_s: float) -> list[Step]:
    """The network of the step *source* as int8, and timed."""
    return [
        int8_step(f"{source}-int8", source, pictures=pictures),
        timed_step(f"{source}-timed", f"{source}-int8", time_cap_s=time_cap_s),
    ]


def int8_of(results: Mapping[str, Any], source: str) -> dict[str, Any]:
    """What came out of the int8_steps of *source*."""
    return {**results[f"{source}-int8"], **results[f"{source}-timed"]}


def as_curve_costs(result: Mapping[str, Any]) -> NDArray[np.float64]:
    """What leaving at each exit costs in MACs, float64 (E,), all heads on the way included."""
    backbone, head = np.array(result["backbone_macs"]), np.array(result["head_macs"])
    costs = Costs(backbone, head, np.zeros(len(head)))
    return np.asarray(costs.at(np.ones(len(head), bool)))

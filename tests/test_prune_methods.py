"""Methods: every named composition, on a small network, does what its paper says of it."""

import itertools
import math
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.host import latency_table, surgery  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint  # noqa: E402
from edgeexit.host.graph import Graph, analyse  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.prune import removal, states  # noqa: E402
from edgeexit.host.prune.composition import Composition, Target  # noqa: E402
from edgeexit.host.prune.criteria import CRITERIA  # noqa: E402
from edgeexit.host.prune.engine import Progress, Pruning, prune  # noqa: E402
from edgeexit.host.prune.evidence import Criterion, Evidence  # noqa: E402
from edgeexit.host.prune.methods import METHODS  # noqa: E402
from edgeexit.host.prune.phase import magnitudes  # noqa: E402
from edgeexit.host.prune.phases import PHASES  # noqa: E402
from edgeexit.host.prune.selectors import SELECTORS, Child, filters_of  # noqa: E402
from edgeexit.host.prune.similarity import all_features, cka  # noqa: E402
from edgeexit.host.recipe import TrainingPart  # noqa: E402
from tests import prune_nets  # noqa: E402
from tests.prune_nets import PART, SHAPE  # noqa: E402

pytestmark = pytest.mark.host

DOCS = Path(__file__).parents[1] / "docs" / "methods.md"
# What the small network needs in place of a composition's own numbers: no more.
SMALL: dict[str, Any] = {"round_to": 1, "samples": 128}
CHANGES: dict[str, dict[str, Any]] = {
    "gormez-all": {"steps": 3},
    "gormez-ordered": {"steps": 3},
    "gormez-all-filters": {"steps": 2},
    "gormez-ordered-filters": {"steps": 2},
    "nepenthe": {"steps": 2},
    "hybrid": {"steps": 3},
    "effective-rank": {"steps": 1},
    "force": {"steps": 6, "target": Target(what="weights", share=0.3)},
    "iter-snip": {"steps": 6, "target": Target(what="weights", share=0.3)},
    "halp": {"steps": 2},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune_nets.save_samples(tmp_path_factory.mktemp("methods") / "samples.npz")


@pytest.fixture(scope="module")
def dense(samples: Path) -> Path:
    """The checkpoint that every method is applied to."""
    torch.set_num_threads(1)
    return prune_nets.save_net(samples.with_name("net.pt"), samples)


@dataclass
class Ran:
    """What a pruning gave, and its state *after* each step and right after each *cut*."""

    result: Pruning
    after: list[dict[str, Any]] = field(default_factory=list)
    cut: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> tuple[dict[str, Any], ...]:
        return self.result.history

    @property
    def model(self) -> nn.Module:
        return load_checkpoint(self.result.path).model


def network(state: Mapping[str, Any]) -> nn.Module:
    """The network of a pruning's state file."""
    model = prune_nets.new_net()
    surgery.replay(model, state["net"]["surgery"], "state")
    model.load_state_dict(state["model"])
    return model.eval()


def run(
    net: Path,
    samples: Path,
    out: Path,
    plan: Composition,
    part: TrainingPart | None = PART,
    arch: str | None = None,
) -> Ran:
    """Prune *net* by *plan*, and keep what the state file says on the way."""
    kept: dict[str, list[dict[str, Any]]] = {"after": [], "cut": []}

    def watch(progress: Progress) -> None:
        fit = progress.fit
        is_first = fit is not None and (fit.epoch, fit.batch, fit.accuracies) == (1, 1, None)
        which = "after" if progress.action == "done step" else "cut"
        if which == "after" or (progress.action == "fine-tune" and is_first):
            state = torch.load(out.with_name(out.name + ".state"), weights_only=True)
            kept[which].append({key: state[key] for key in ("model", "net")})

    recipe = prune_nets.recipe(samples, plan, finetune=part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(removal, "analyse", analysed)
        return Ran(prune(net, recipe, out, arch=arch, again=True, on_step=watch), **kept)


Runs = Callable[..., Ran]


@pytest.fixture(scope="module")
def runs(dense: Path, samples: Path) -> Runs:
    """Run a method once per set of changes."""
    torch.set_num_threads(1)
    known: dict[str, Ran] = {}

    def ran(name: str, part: TrainingPart | None = PART, **changes: Any) -> Ran:
        key = f"{name} {part} {changes}"
        if key not in known:
            plan = replace(METHODS[name], **{**SMALL, **CHANGES.get(name, {}), **changes})
            out = samples.with_name(f"out{len(known)}.pt")
            with pytest.MonkeyPatch.context() as patch:
                if plan.target.what == "latency":
                    tell_times_by_widths(patch)
                known[key] = run(dense, samples, out, plan, part)
        return known[key]

    return ran


def tell_times_by_widths(patch: pytest.MonkeyPatch) -> None:
    """Instead of measuring: a layer takes 1 us, and 20 ns for each pair of channels."""

    def timed(grid: Any, seed: int) -> list[tuple[float, ...]]:
        _, inputs, outputs = grid
        return [tuple(1000.0 + 20 * i * o for i, o in itertools.product(inputs, outputs))]

    patch.setattr(latency_table, "timed", timed)
    patch.setattr(
        removal, "measure_table", partial(latency_table.measure_table, widths=range(1, 17))
    )


def zeros(state: Mapping[str, Any]) -> dict[str, float]:
    """Weight tensor -> the share of it that is out of use."""
    masks = state["net"]["masks"]
    return {name: float((~keep).double().mean()) for name, keep in masks.items()}


def graph_of(model: nn.Module) -> Graph:
    """As analyse, which takes its time; equal networks are looked at once."""
    return analysed(model, SHAPE)


GRAPHS: dict[tuple[str, bytes], Graph] = {}


def analysed(model: nn.Module, input_shape: tuple[int, ...]) -> Graph:
    state = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    key = (str(model), state)
    if key not in GRAPHS:
        GRAPHS[key] = analyse(model, input_shape)
    return GRAPHS[key]


def batches(samples: Path, indices: str = "training") -> list[tuple[torch.Tensor, torch.Tensor]]:
    material = prune_nets.material(samples)
    chosen = getattr(material, indices)
    return [(material.inputs(chosen), material.labels(chosen))]


def evidence(model: nn.Module, samples: Path) -> Evidence:
    graph = graph_of(model)
    weights = [1.0] * len(graph.exits)
    return Evidence(model=model, graph=graph, batches=batches(samples), weights=weights, seed=0)


def loss(model: nn.Module, samples: Path) -> float:
    """The exits' mean cross entropy on the training samples."""
    with torch.no_grad():
        ((inputs, labels),) = batches(samples)
        outputs = exit_outputs(model.eval(), inputs).values()
        return float(np.mean([nn.functional.cross_entropy(one, labels) for one in outputs]))


# ---------------------------------------------------------------- every method


@pytest.mark.parametrize("name", METHODS)
def test_it_meets_its_target_and_no_exit_is_lost(
    name: str, runs: Runs, dense: Path, samples: Path
) -> None:
    ran = runs(name)
    plan = replace(METHODS[name], **CHANGES.get(name, {}))
    result, share = ran.result, plan.target.share
    again = load_checkpoint(result.path)
    ((inputs, _),) = batches(samples, "holdout")

    assert again.exits == load_checkpoint(dense).exits
    # What was written answers like what was trained.
    found, wanted = (exit_outputs(m.eval(), inputs) for m in (again.model, network(ran.after[-1])))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    graph = graph_of(again.model)
    assert result.macs[1] == graph.macs()
    assert set(graph.layers) <= set(graph_of(prune_nets.new_net()).layers)
    if plan.target.what == "weights":
        stages = {row["stage"]: row for row in ran.rows}
        for row in stages.values():
            assert row["weights_gone"] == pytest.approx(1 - share, abs=2e-3)
        assert result.macs[1] == result.macs[0], "zeros are multiplied like other numbers"
    elif plan.target.what == "macs":
        assert result.macs[1] <= share * result.macs[0]
        assert result.parameters[1] < result.parameters[0]
    # It has learned, and was not ruined: four classes.
    assert max(result.accuracies[1].values()) > 0.35


def test_filters_go_no_further_than_they_must(runs: Runs) -> None:
    for name in ("gormez-all-filters", "hybrid", "nepenthe", "crop", "greg-1"):
        result = runs(name).result
        assert result.macs[1] > 0.9 * METHODS[name].target.share * result.macs[0], name


# ---------------------------------------------------------------- Görmez & Koyuncu


HEAD = ("heads.2.convs.0.0.weight", "heads.2.linear.weight")


def test_all_at_once_is_one_pool_in_which_the_smallest_weights_go(
    runs: Runs, samples: Path
) -> None:
    before = prune_nets.trained(samples)
    masks = runs("gormez-all").cut[0]["net"]["masks"]
    gone = torch.cat([before[name][~keep].abs() for name, keep in masks.items()])
    kept = torch.cat([before[name][keep].abs() for name, keep in masks.items()])

    assert set(masks) == {f"{layer}.weight" for layer in graph_of(prune_nets.new_net()).layers}
    assert gone.max() <= kept.min(), "one threshold for every layer, exit heads among them"
    assert all(share > 0 for share in zeros(runs("gormez-all").after[-1]).values())


def test_twenty_tenths_of_the_weights_stay(runs: Runs) -> None:
    for name in ("gormez-all", "gormez-ordered"):
        assert METHODS[name].steps == 20
        assert 1 - METHODS[name].target.share == pytest.approx(0.878, abs=5e-4)
        model = runs(name).model
        weights = torch.cat([p.flatten() for n, p in model.named_parameters() if p.ndim > 1])
        assert float((weights == 0).double().mean()) == pytest.approx(0.878, abs=2e-3)


def test_ordered_leaves_the_exits_alone_until_the_backbone_is_done(
    runs: Runs, samples: Path
) -> None:
    ran, before = runs("gormez-ordered"), prune_nets.trained(samples)
    assert [row["stage"] for row in ran.rows] == ["backbone"] * 3 + ["exits"] * 3
    heads = [name for name in before if name.startswith("heads.2.")]
    backbone = [name for name in before if name not in heads]
    for state in ran.after[:3]:
        assert all(torch.equal(state["model"][name], before[name]) for name in heads)
        assert not set(HEAD) & set(state["net"]["masks"])
    done = ran.after[2]["model"]
    assert not torch.equal(done["stem.0.0.weight"], before["stem.0.0.weight"])
    for state in ran.after[3:]:
        assert all(torch.equal(state["model"][name], done[name]) for name in backbone)
    # The exits begin anew, random: what they knew of the dense backbone is gone.
    new = ran.cut[3]["model"]
    assert all(not torch.equal(new[name], before[name]) for name in HEAD)
    assert not torch.equal(ran.after[-1]["model"][HEAD[1]], new[HEAD[1]])


def test_ordered_leaves_its_exits_sparser_than_all_at_once_does(runs: Runs) -> None:
    together, ordered = (zeros(runs(name).after[-1]) for name in ("gormez-all", "gormez-ordered"))
    sizes = {
        name: keep.numel() for name, keep in runs("gormez-all").after[-1]["net"]["masks"].items()
    }
    shares = [
        sum(one[name] * sizes[name] for name in HEAD) / sum(sizes[name] for name in HEAD)
        for one in (together, ordered)
    ]
    assert shares[1] == pytest.approx(0.878, abs=2e-3)
    assert shares[0] < shares[1] - 0.03


def test_filters_of_the_ordered_strategy_go_from_one_part_at_a_time(
    runs: Runs, samples: Path
) -> None:
    ran = runs("gormez-ordered-filters")
    first, second, last = prune_nets.new_net(), network(ran.after[1]), ran.model
    assert widths(first, "heads.2.convs") == widths(second, "heads.2.convs")
    assert widths(last, "heads.2.convs") < widths(second, "heads.2.convs")
    assert widths(last, "blocks") == widths(second, "blocks") < widths(first, "blocks")


def widths(model: nn.Module, part: str) -> int:
    """Output channels of all convolutions of *part* together."""
    modules = model.get_submodule(part).modules()
    return sum(one.out_channels for one in modules if isinstance(one, nn.Conv2d))


# ---------------------------------------------------------------- Pruning Everything, CKA


def test_everything_keeps_the_child_that_is_more_like_its_parent(
    runs: Runs, samples: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = runs("everything").rows
    for row in rows:
        assert row["child"] == max(row["similarity"], key=lambda kind: row["similarity"][kind])
        assert {"blocks": "block", "filters": "filters"}[row["child"]] in row
    # The child that was not chosen: built by asking for the other one.
    chosen = SELECTORS["everything"].choose
    other = replace(SELECTORS["everything"])
    object.__setattr__(
        other,
        "choose",
        lambda children, seed: next(c for c in children if c is not chosen(children, seed)),
    )
    monkeypatch.setitem(SELECTORS, "everything", other)
    plan = replace(METHODS["everything"], **SMALL, target=Target(what="macs", share=0.99))
    second = network(run(dense, samples, tmp_path / "other.pt", plan, None).after[0])
    first = network(runs("everything").cut[0])
    counts = [filters_of(graph_of(model)) for model in (first, second)]
    assert counts[0] == counts[1] < filters_of(graph_of(prune_nets.new_net()))
    # On samples that neither has seen, by an average over exits that nobody weighted.
    parent, graph = prune_nets.net(samples), graph_of(prune_nets.net(samples))
    held = batches(samples, "holdout")
    before = all_features(parent, graph, held)
    similar = []
    for model in (first, second):
        after = all_features(model, graph, held)
        similar.append(np.mean([cka(before[name], after[name]) for name in before]))
    assert similar[0] > similar[1] + 0.02


def test_a_coin_keeps_what_cka_would_not_at_equal_filters(runs: Runs) -> None:
    """The control of the choice: the same two children at every step, similarities told."""
    kept = set()
    for seed in range(3):
        plan = {"selector": "random-child", "target": Target(what="macs", share=0.8)}
        rows = runs("everything", replace(PART, epochs=0, seed=seed), **plan).rows
        coin = SELECTORS["random-child"]
        for step, row in enumerate(rows):
            children = [Child(kind=kind, similarity=0.0) for kind in row["similarity"]]
            assert row["child"] == coin.choose(children, [seed, 3, 0, step]).kind
            assert {"blocks": "block", "filters": "filters"}[row["child"]] in row
            likest = max(row["similarity"], key=lambda kind: row["similarity"][kind])
            kept.add(row["child"] == likest)
    assert kept == {True, False}


def test_the_block_that_the_exits_would_miss_least_goes(
    runs: Runs, samples: Path, tmp_path: Path
) -> None:
    ran = runs("cka-blocks")
    blocks = CRITERIA["cka"].blocks
    assert blocks is not None
    scores = blocks(evidence(prune_nets.net(samples), samples))
    assert ran.rows[0]["block"] == min(scores, key=lambda name: scores[name])
    shapes = {name: p.shape for name, p in prune_nets.new_net().named_parameters()}
    left = dict(ran.model.named_parameters())
    assert len(left) < len(shapes)
    assert all(p.shape == shapes[name] for name, p in left.items()), "nothing is narrower"
    # Its weights made ten times as large, to be divided again behind: the features are the same.
    large = prune_nets.net(samples)
    block = large.get_submodule(ran.rows[0]["block"])
    with torch.no_grad():
        for conv, norm, *_ in (block.first, block.second):
            conv.weight *= 10
            norm.running_mean *= 10
            norm.running_var *= 100
    path = prune_nets.save_net(tmp_path / "large.pt", samples, large)
    plan = replace(METHODS["cka-blocks"], **SMALL, target=Target(what="macs", share=0.99))
    again = run(path, samples, tmp_path / "out.pt", plan, None)
    assert again.rows[0]["block"] == ran.rows[0]["block"]


# ---------------------------------------------------------------- NEPENTHE


def test_nepenthe_takes_most_from_the_least_relevant_layer_and_empties_none(
    runs: Runs, samples: Path
) -> None:
    model = prune_nets.net(samples)
    graph = graph_of(model)
    relevance = states.relevance(model, graph, batches(samples))
    ran = runs("nepenthe")
    first, last = (graph_of(network(ran.after[k])) for k in (0, -1))
    may = {n: g for n, g in graph.groups.items() if len(g.producers) == 1}
    lost = {name: 1 - first.groups[name].size / group.size for name, group in may.items()}
    least = min(may, key=lambda name: relevance[name])
    assert lost[least] == max(lost.values()) > 0
    assert all(last.groups[name].size >= 1 for name in graph.groups)
    assert last.groups["stem.0.0"].size == graph.groups["stem.0.0"].size, "shortcuts stay"


def test_of_single_weights_too_the_least_relevant_layer_loses_most(
    runs: Runs, samples: Path
) -> None:
    model = prune_nets.net(samples)
    relevance = states.relevance(model, graph_of(model), batches(samples))
    ran = runs("nepenthe-weights")
    gone = zeros(ran.cut[0])
    assert set(gone) == {f"{layer}.weight" for layer in relevance}, "logits stay whole"
    least = min(relevance, key=lambda name: relevance[name])
    assert gone[f"{least}.weight"] == max(gone.values()) > 0.9
    # Half of what is left, three times.
    shares = [row["weights_gone"] for row in ran.rows]
    assert shares == [pytest.approx(1 - 0.5**k, abs=1e-3) for k in (1, 2, 3)]


def test_nepenthe_folds_what_becomes_linear_only_where_that_saves(
    tmp_path: Path, samples: Path
) -> None:
    path = prune_nets.save_linear_net(tmp_path / "linear.pt")
    plan = replace(METHODS["nepenthe"], **SMALL, steps=1, target=Target(what="macs", share=0.98))
    arch = prune_nets.LINEAR
    (row,) = run(path, samples, tmp_path / "out.pt", plan, None, arch).rows
    # Always on: the first pair costs less as one layer, the second one would cost more.
    assert row["folded"] == [["wide", "narrow"]]
    assert row["linear_but_kept"] == 1
    model = load_checkpoint(tmp_path / "out.pt", arch=arch).model
    assert isinstance(model.get_submodule("also_on"), nn.ReLU)
    assert graph_of(model).macs() == row["macs"] < graph_of(prune_nets.LinearNet()).macs()


# ---------------------------------------------------------------- schedules


def test_hybrid_shoots_seven_tenths_of_its_target_first(runs: Runs) -> None:
    ran = runs("hybrid")
    total = ran.result.macs[0]
    shares = [row["macs"] / total for row in ran.rows]
    assert 0.6 < shares[0] <= 1 - 0.7 * 0.5
    steps = [1.0, *shares]
    gone = [one - other for one, other in itertools.pairwise(steps)]
    assert all(0 <= step < gone[0] / 2 for step in gone[1:])
    assert shares[-1] <= 0.5


def test_the_indicator_waits_until_the_structure_no_longer_changes(
    dense: Path, samples: Path, tmp_path: Path
) -> None:
    epochs: list[str] = []

    def watch(progress: Progress) -> None:
        if progress.fit is not None and progress.fit.accuracies is not None:
            epochs.append(progress.action)

    plan = replace(METHODS["early-indicator"], **SMALL)
    still = replace(PART, learning_rate=1e-6)
    recipe = prune_nets.recipe(samples, plan, finetune=still)
    prune(dense, recipe, tmp_path / "out.pt", on_step=watch)
    # A window of five structures, then one more to hold against them.
    assert epochs == ["phase"] * 6 + ["fine-tune"]


# ---------------------------------------------------------------- phases


def spied(monkeypatch: pytest.MonkeyPatch, name: str) -> list[dict[str, Any]]:
    """What each phase *name* said when it was closed, before anything was removed."""
    seen: list[dict[str, Any]] = []
    real = PHASES[name]

    def make(facts: Any) -> Any:
        phase = real(facts)
        distances = phase.distances

        def tell() -> dict[str, float]:
            sizes = {n: magnitudes(facts.model, g) for n, g in facts.graph.groups.items()}
            told = {"scores": phase.scores(), "chosen": phase.chosen()}
            seen.append({**told, "facts": facts, "sizes": sizes})
            return distances()

        phase.distances = tell
        return phase

    monkeypatch.setitem(PHASES, name, make)
    return seen


@pytest.mark.parametrize("name", ["greg-1", "greg-2"])
def test_greg_pushes_units_down_before_it_takes_them(
    name: str,
    runs: Runs,
    samples: Path,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = spied(monkeypatch, name)
    plan = replace(METHODS[name], **SMALL, phase_epochs=8)
    ran = run(dense, samples, tmp_path / "out.pt", plan)
    (told,) = seen
    graph = graph_of(prune_nets.new_net())
    left = graph_of(network(ran.cut[0]))
    for group, units in told["chosen"].items():
        assert left.groups[group].size == graph.groups[group].size - len(units)
        sizes = told["sizes"][group]
        pushed = np.isin(np.arange(len(sizes)), units)
        assert sizes[pushed].max() < 0.2 * sizes[~pushed].mean()
    # The same training without growth, then the same removal: magnitude alone.
    none = {"limit": 1e-6, "pick_limit": 1e-9}
    without = runs(name, phase_epochs=8, phase_options=none)
    assert loss(network(ran.cut[0]), samples) < 0.5 * loss(network(without.cut[0]), samples)


def test_polarized_gates_are_open_or_closed_and_the_closed_ones_go(
    samples: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = spied(monkeypatch, "polarization")
    plan = replace(METHODS["polarization"], **SMALL, phase_epochs=8)
    ran = run(dense, samples, tmp_path / "out.pt", plan)
    (told,) = seen
    gates = np.concatenate(list(told["scores"].values()))
    assert np.mean((gates < 0.05) | (gates > 0.95)) > 0.9
    # As many close as were asked for, and those go: not the ones that magnitude would take.
    asked = told["facts"].units
    closed = {name: np.flatnonzero(scores < 0.5) for name, scores in told["scores"].items()}
    count = sum(map(len, asked.values()))
    assert abs(sum(map(len, closed.values())) - count) <= 0.1 * count
    left = graph_of(network(ran.cut[0])).groups
    for name, units in closed.items():
        assert len(told["scores"][name]) - left[name].size >= len(units), name
    assert sum(len(told["scores"][n]) - left[n].size for n in closed) <= 1.2 * count
    assert any(set(closed[name]) != set(asked[name]) for name in closed)


def test_lacoot_makes_blocks_near_identities_that_are_missed_less(
    runs: Runs, samples: Path
) -> None:
    ran, without = runs("lacoot"), runs("lacoot", phase_options={"weight": 0.0})
    found = [one.cut[0]["net"]["distances"] for one in (ran, without)]
    assert set(found[0]) == set(graph_of(prune_nets.new_net()).blocks)
    assert sum(found[0].values()) < 0.7 * sum(found[1].values())
    assert ran.rows[0]["block"] == min(found[0], key=lambda name: found[0][name])
    for k in (0, 1):
        costs = [loss(network(one.cut[k]), samples) for one in (ran, without)]
        assert costs[0] < 0.7 * costs[1], "right after a removal"


# ---------------------------------------------------------------- single weights


@pytest.mark.parametrize("name", ["force", "iter-snip"])
def test_force_may_bring_weights_back_and_iter_snip_may_not(
    name: str, dense: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = replace(METHODS[name], **SMALL, **CHANGES[name])
    seen: list[dict[str, torch.Tensor]] = []
    real = CRITERIA[plan.criterion].entries
    assert real is not None

    def entries(given: Evidence) -> dict[str, torch.Tensor]:
        assert given.masks is not None
        seen.append({key: mask.clone() for key, mask in given.masks.items()})
        # All steps are scored on the dense weights, before any training.
        assert torch.equal(
            given.model.get_parameter("stem.0.0.weight"),
            prune_nets.trained(samples)["stem.0.0.weight"],
        )
        return dict(real(given))

    monkeypatch.setitem(CRITERIA, plan.criterion, Criterion(entries=entries))
    ran = run(dense, samples, tmp_path / "out.pt", plan, None)
    rounds = [*seen, ran.after[0]["net"]["masks"]]
    kept = [sum(int(m.sum()) for m in one.values()) for one in rounds]
    total = sum(m.numel() for m in rounds[0].values())
    # The published density: exp(t / T * log k).
    assert kept == [pytest.approx(total * 0.3 ** (t / 6), abs=1) for t in range(7)]
    back = sum(
        int((after[key] & ~before[key]).sum())
        for before, after in itertools.pairwise(rounds)
        for key in before
    )
    assert (back > 0) == (name == "force")


def test_random_masks_have_the_densities_of_erk(runs: Runs, samples: Path) -> None:
    ran = runs("random-erk")
    masks = ran.cut[0]["net"]["masks"]
    shapes = {name: keep.shape for name, keep in masks.items()}
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    full: set[str] = set()
    while True:  # as in the paper's code: what would be denser than dense stays whole
        rest = 0.2 * sum(sizes.values()) - sum(sizes[name] for name in full)
        epsilon = rest / sum(raw[name] * sizes[name] for name in raw if name not in full)
        over = {name for name in raw if name not in full and epsilon * raw[name] > 1}
        if not over:
            break
        full |= over
    for name, keep in masks.items():
        wanted = 1.0 if name in full else epsilon * raw[name]
        assert float(keep.double().mean()) == pytest.approx(wanted, abs=1 / sizes[name] + 1e-9)
    # Chance, not magnitude: what stays is no larger than what goes.
    before = prune_nets.trained(samples)
    ratios = [
        float(before[n][keep].abs().mean() / before[n][~keep].abs().mean())
        for n, keep in masks.items()
        if sizes[n] > 500 and n not in full
    ]
    assert len(ratios) > 3
    assert all(0.75 < ratio < 1.33 for ratio in ratios)


# ---------------------------------------------------------------- filters


def test_no_layer_loses_more_filters_than_its_gradients_allow(
    dense: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs
) -> None:
    ranks: list[dict[str, int]] = []
    real = removal.effective_rank

    def noted(given: Evidence) -> dict[str, int]:
        ranks.append(real(given))
        return ranks[-1]

    monkeypatch.setattr(removal, "effective_rank", noted)
    plan = replace(METHODS["effective-rank"], **SMALL, **CHANGES["effective-rank"])
    capped = graph_of(network(run(dense, samples, tmp_path / "out.pt", plan, None).after[0]))
    free = graph_of(network(runs("effective-rank", None, rank_cap=False).after[0]))
    (rank,) = ranks
    assert all(capped.groups[name].size >= rank[name] for name in rank)
    assert any(free.groups[name].size < rank[name] for name in rank), "the cap made a difference"


def test_crop_keeps_gradients_flowing_where_magnitude_does_not(
    samples: Path, tmp_path: Path
) -> None:
    flows: dict[str, list[float]] = {"crop": [], "l1": [], "taylor": []}
    different = False
    for seed in range(2):
        torch.manual_seed(seed + 10)
        new = prune_nets.zoo.resnet(**prune_nets.KWARGS)
        path = prune_nets.save_net(tmp_path / f"new{seed}.pt", samples, new)
        kept = {}
        own = METHODS["crop"].criterion
        for name, criterion in (("crop", own), ("l1", "l1"), ("taylor", "taylor")):
            plan = replace(METHODS["crop"], **SMALL, criterion=criterion, allocator="uniform")
            ran = run(path, samples, tmp_path / f"{name}{seed}.pt", plan, None)
            kept[name] = ran.model
            flows[name].append(flow(ran.model, samples))
        one, other = (kept[n].get_parameter("stem.0.0.weight") for n in ("crop", "l1"))
        different |= one.shape != other.shape or not torch.equal(one, other)
    assert different
    assert np.mean(flows["crop"]) > 1.1 * np.mean(flows["taylor"])
    assert np.mean(flows["crop"]) > 1.3 * np.mean(flows["l1"])


def flow(model: nn.Module, samples: Path) -> float:
    """The squared norm of the loss's gradient, by the layers' weights."""
    ((inputs, labels),) = batches(samples)
    outputs = exit_outputs(model.eval(), inputs).values()
    total = torch.stack([nn.functional.cross_entropy(one, labels) for one in outputs]).sum()
    weights = [p for p in model.parameters() if p.ndim > 1]
    return float(sum(slope.square().sum() for slope in torch.autograd.grad(total, weights)))


def test_halp_meets_a_share_of_the_tables_milliseconds(runs: Runs) -> None:
    ran = runs("halp")
    table = latency_table.LatencyTable.from_document(ran.after[-1]["net"]["table"], "table")
    before, after = (table.total(graph_of(m)) for m in (prune_nets.new_net(), ran.model))
    assert 0.55 * before < after <= 0.6 * before
    # The table speaks of this network's layers, at the widths they began with.
    assert set(table.layers) == set(graph_of(prune_nets.new_net()).layers)


def test_at_equal_numbers_per_layer_criteria_beat_chance(
    dense: Path, samples: Path, tmp_path: Path
) -> None:
    losses = {}
    for name, seed in (("l1", 0), ("taylor", 0), ("kl", 0), *(("random", k) for k in range(3))):
        plan = replace(
            Composition(criterion=name, allocator="uniform", schedule="one-shot"),
            **SMALL,
            target=Target(what="macs", share=0.6),
        )
        part = replace(PART, epochs=0, seed=seed)
        ran = run(dense, samples, tmp_path / f"{name}{seed}.pt", plan, part)
        losses[name, seed] = loss(ran.model, samples)
    chance = np.mean([value for (name, _), value in losses.items() if name == "random"])
    assert all(losses[name, 0] < 0.7 * chance for name in ("l1", "taylor", "kl")), losses


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("name", "changes", "action", "number"),
    [
        ("gormez-ordered", {}, "fine-tune", 50),
        ("polarization", {}, "phase", 20),
        ("everything", {}, "fine-tune", 18),
        (
            "everything",
            {"selector": "random-child", "target": Target(what="macs", share=0.3)},
            "fine-tune",
            18,
        ),
    ],
)
def test_an_interrupted_pruning_goes_on_to_the_same_bytes(
    name: str,
    changes: dict[str, Any],
    action: str,
    number: int,
    dense: Path,
    samples: Path,
    tmp_path: Path,
    runs: Runs,
) -> None:
    whole = runs(name, **changes).result.path.read_bytes()
    count = 0

    def stop(progress: Progress) -> None:
        nonlocal count
        count += progress.action == action
        if count == number:
            raise KeyboardInterrupt

    plan = replace(METHODS[name], **{**SMALL, **CHANGES.get(name, {}), **changes})
    recipe, out = prune_nets.recipe(samples, plan), tmp_path / "out.pt"
    with pytest.raises(KeyboardInterrupt):
        prune(dense, recipe, out, on_step=stop)
    assert not out.exists()
    assert not prune(dense, recipe, out).was_done
    assert out.read_bytes() == whole


# ---------------------------------------------------------------- to a board


# Where seven of eight weights are gone, torch itself is often undecided.
@pytest.mark.parametrize(("name", "least"), [("everything", 0.9), ("gormez-all", 0.85)])
def test_what_was_pruned_becomes_a_bundle_that_agrees_with_the_uncut_model(
    name: str, least: float, runs: Runs, samples: Path, tmp_path: Path
) -> None:
    pytest.importorskip("litert_torch")
    from edgeexit.host.convert import convert

    ran = runs(name)
    # It compares the chain of segments with the uncut int8 model, byte by byte, and refuses.
    bundle = convert(ran.result.path, tmp_path / "net.edgeexit", samples)
    everywhere, sure = agreements(bundle, ran.model, samples)
    assert everywhere > least
    assert sure > 0.95


def test_attached_exits_stay_through_pruning_to_the_bundle(samples: Path, tmp_path: Path) -> None:
    pytest.importorskip("litert_torch")
    from edgeexit.host.attach import attach_exits
    from edgeexit.host.convert import convert

    plain = prune_nets.save_plain(tmp_path / "plain.pt", samples)
    attach_exits(plain, tmp_path / "exits.pt", at=["blocks.1"], is_measured=False)
    plan = replace(
        METHODS["cka-blocks"],
        **SMALL,
        target=Target(what="macs", share=0.9),
        protect=("backbone.blocks.0.first.0", "backbone.blocks.3.first.0"),
    )
    ran = run(tmp_path / "exits.pt", samples, tmp_path / "fewer.pt", plan)
    # The block that the new exit sits on goes; the exit moves to what comes before.
    assert [row["block"] for row in ran.rows] == ["backbone.blocks.1"]
    plan = replace(METHODS["gormez-all-filters"], **SMALL, steps=1)
    ran = run(tmp_path / "fewer.pt", samples, tmp_path / "out.pt", plan)
    assert ran.rows[0]["filters"] > 0
    again = load_checkpoint(tmp_path / "out.pt")
    assert len(again.exits) == 2
    bundle = convert(tmp_path / "out.pt", tmp_path / "net.edgeexit", samples)
    everywhere, sure = agreements(bundle, again.model, samples)
    assert everywhere > 0.9
    assert sure > 0.95


def agreements(bundle: Any, model: nn.Module, samples: Path) -> tuple[float, float]:
    """
    How often the runner's answers are torch's, over exits and held-out samples.

    Over all of them, and over those half of each exit's of which torch is surer.
    """
    from edgeexit.runtime import Runner

    material = prune_nets.material(samples)
    chosen = material.holdout[:100]
    expected = exit_outputs(model.eval(), material.inputs(chosen)).values()
    logits = np.stack([one.detach().numpy() for one in expected])
    least, most = np.sort(logits)[:, :, -2:].transpose(2, 0, 1)
    is_sure = most - least >= np.median(most - least, axis=1, keepdims=True)
    with Runner(bundle, policy=None) as runner:
        found = np.stack([runner.logits(one) for one in material.data.samples[chosen]], 1)
    is_same = found.argmax(2) == logits.argmax(2)
    return float(is_same.mean()), float(is_same[is_sure].mean())


# ---------------------------------------------------------------- what the table says


def commands() -> list[list[str]]:
    """The commands that docs/methods.md gives, split into words."""
    text = DOCS.read_text()
    pieces = [piece for piece in text.split("`") if piece.startswith("edgeexit prune model.pt")]
    return [shlex.split(piece) for piece in pieces]


def test_every_method_has_a_row_and_every_command_there_is_understood() -> None:
    from edgeexit.cli import prune as cli

    named = set()
    for words in commands():
        context = cli.command.make_context("prune", words[2:])
        options = dict(context.params)
        for key in ("model", "out", "arch", "again", "calibration", "measure", "as_json"):
            options.pop(key)
        plan = cli._recipe(options).composition
        if options["method"]:
            named.add(options["method"])
            allowed = {k for k in ("target", "scope", "selector") if options[k]}
            changed = {
                k for k in vars(plan) if getattr(plan, k) != getattr(METHODS[options["method"]], k)
            }
            assert changed <= allowed
    assert named == set(METHODS)


def test_every_name_of_every_axis_has_its_source() -> None:
    from edgeexit.host.prune.composition import known_names

    text = DOCS.read_text()
    missing = [
        name
        for names in known_names().values()
        for name in names
        if f"`{name}`" not in text and f" {name}`" not in text
    ]
    assert not missing

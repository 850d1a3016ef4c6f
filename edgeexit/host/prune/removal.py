"""
One removal: what may go, how many, which, and taking it out.

Callers see Removal. Its five axes are dict look-ups by the composition's names. Hidden here: that
an allocator's share becomes a cost, and that the smallest share which meets the target is found
by bisection over costs foretold by the graph, before anything is touched.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgeexit.errors import OutOfReach, UsageError
from edgeexit.host import folding, surgery
from edgeexit.host.checkpoint import Checkpoint
from edgeexit.host.fit import lay_out
from edgeexit.host.graph import analyse
from edgeexit.host.latency_table import LatencyTable, measure_table
from edgeexit.host.material import Material
from edgeexit.host.model import exit_outputs
from edgeexit.host.prune import states
from edgeexit.host.prune.allocators import ALLOCATORS, ESTIMATOR_OF, Bill, largest_share
from edgeexit.host.prune.composition import Composition
from edgeexit.host.prune.criteria import CRITERIA
from edgeexit.host.prune.evidence import EntryScores, Evidence
from edgeexit.host.prune.masks import Masks, compressed_bytes, iterate, pool
from edgeexit.host.prune.saliency import effective_rank
from edgeexit.host.prune.schedules import planned
from edgeexit.host.prune.scopes import Stage
from edgeexit.host.prune.selectors import (
    SELECTORS,
    Child,
    equalise,
    equalise_latency,
    filters_of,
)
from edgeexit.host.prune.similarity import exits_cka
from edgeexit.names import unknown

SCORED_BATCH = 64
LINEAR_BITS = 0.05  # mean state entropy of an activation's units that counts as one state
SURE = 0.9  # an exit answers a sample when its probability is at least this: for exit rates only


class Removal:
    """
    A network that is being made smaller by *plan*, and what is known of it.

    *entries* is its surgery so far, *masks* the single weights in use (weight tensor -> bool),
    *table* the measured latencies if the target counts them. *scores* and *distances* come from
    a phase and then stand for the criteria's. *at* (stage, step) makes each step's samples its
    own. *where* names the recipe in messages.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Composition,
        material: Material,
        *,
        where: str,
        weights: Sequence[float],
        seed: int,
    ) -> None:
        self.model, self.input_shape = checkpoint.model, checkpoint.input_shape
        self.plan, self.material, self.where = plan, material, where
        self._look()
        self.weights = list(weights) or [1.0] * len(self.graph.exits)
        self.seed = seed
        self.at = (0, 0)
        self.entries: list[surgery.Entry] = []
        self.masks: dict[str, torch.Tensor] = {}
        self.scores: dict[str, NDArray[np.float64]] = {}
        self.distances: dict[str, float] = {}
        self.table: LatencyTable | None = None
        for name in plan.protect:
            if name not in self.graph.layers:
                raise unknown(name, self.graph.layers, "layer to protect")

    def _look(self) -> None:
        """Analyse the network as it is now, laid out in memory as a training lays it out."""
        lay_out(self.model, torch.zeros(self.input_shape))
        self.graph = analyse(self.model, self.input_shape)

    def cut(self, stage: Stage, goal: float, share: float) -> dict[str, Any]:
        """
        One step: at most the cost *goal* remains, or of single weights *share*.

        Returns what was done, as plain values. OutOfReach if a layer would have to be emptied.
        """
        if self.plan.is_unstructured:
            return self._zero(stage, share)
        rules: dict[tuple[str, ...], Callable[[Stage, float], dict[str, Any]]] = {
            ("filters",): self._cut_filters,
            ("blocks",): lambda stage, _goal: self._cut_block(stage),
            ("blocks", "filters"): self._cut_either,
        }
        # A head is no deeper than it must be: only its filters can go.
        kinds = SELECTORS["filters" if stage.parts == "heads" else self.plan.selector].kinds
        row = rules[kinds](stage, goal)
        return row | (self._linearise() if self.plan.linearise else {})

    def state(self) -> dict[str, Any]:
        """Everything but the weights, for torch.save."""
        return {
            "surgery": self.entries,
            "masks": self.masks,
            "distances": self.distances,
            "table": None if self.table is None else self.table.to_document(),
        }

    def load(self, state: Mapping[str, Any], where: str) -> None:
        """Go on from what state gave: the weights are loaded by the caller between the two."""
        surgery.replay(self.model, state["surgery"], f"{where}: surgery")
        self.entries, self.masks = list(state["surgery"]), dict(state["masks"])
        self.distances = dict(state["distances"])
        if state["table"] is not None:
            self.table = LatencyTable.from_document(state["table"], where)
        self._look()

    # ------------------------------------------------------------ costs

    def cost(self, stage: Stage, kept: Mapping[str, int] | None = None) -> float:
        """What the target counts, of the stage's layers, when *kept* units of each group stay."""
        layers = stage.layers(self.graph)
        if self.plan.target.what == "macs":
            costs = self.graph.layer_macs(kept)
            others = sum(cost for cost, _ in self.graph.others) if stage.parts == "all" else 0
            return float(sum(costs[n] for n in layers) + others)
        if self.plan.target.what == "params":
            return float(self.graph.parameters(kept or {}, layers))
        if self.plan.target.what == "latency":
            assert self.table is not None
            widths = self.graph.widths(kept or {})
            return sum(
                self.table.milliseconds(self.graph.layers[n], widths[n][1], widths[n][0])
                for n in layers
            )
        return self._used_weights(layers)

    def _used_weights(self, layers: set[str]) -> float:
        """Single weights of *layers* that are in use."""
        used = 0
        for name in layers:
            mask = self.masks.get(f"{name}.weight")
            weight = self.model.get_parameter(f"{name}.weight")
            used += weight.numel() if mask is None else int(mask.sum())
        return float(used)

    # ------------------------------------------------------------ choosing and removing

    def evidence(self) -> Evidence:
        """Scored samples: drawn from the training samples anew for each step."""
        random = np.random.default_rng([self.seed, 2, *self.at])
        training = self.material.training
        chosen = random.permutation(training)[: self.plan.samples]
        batches = [
            (self.material.inputs(some), self.material.labels(some))
            for some in np.array_split(chosen, -(-len(chosen) // SCORED_BATCH))
        ]
        return Evidence(
            model=self.model,
            graph=self.graph,
            batches=batches,
            weights=self.weights,
            seed=self.seed + self.at[1],
        )

    def _operate(self, model: nn.Module, chosen: Mapping[str, NDArray[np.int64]]) -> surgery.Entry:
        entry = surgery.remove_units(model, self.graph, chosen)
        try:
            with torch.no_grad():
                exit_outputs(model.eval(), torch.zeros(self.input_shape))
        except Exception as error:  # a forward of the user's may raise anything
            said = next(iter(str(error).splitlines()), type(error).__name__)
            raise UsageError(
                f"{self.where}: the network's forward has widths of its own and refuses "
                f"narrower layers: {said[:160]}",
                hint="protect the layers in question, or write forward without numbers of channels",
            ) from error
        return entry

    def measure(self) -> None:
        """Measure the layers' latencies once, if the target counts them."""
        if self.plan.target.what == "latency" and self.table is None:
            self.table = measure_table(self.graph, self.model, self.input_shape)

    def _accept(self, model: nn.Module, entries: Sequence[surgery.Entry]) -> None:
        self.model = model
        self.entries = surgery.joined([*self.entries, *entries])
        self._look()

    # -- filters

    def groups(self, stage: Stage) -> list[str]:
        """The groups that may lose units in this stage."""
        layers = stage.layers(self.graph) - set(self.plan.protect)
        return [
            name
            for name, group in self.graph.groups.items()
            if set(group.producers) <= layers
            and (self.plan.coupled or len(group.producers) == 1 or group.block is not None)
        ]

    def _bills(self, names: Sequence[str], scores: Mapping[str, NDArray[Any]]) -> list[Bill]:
        caps = effective_rank(self.evidence()) if self.plan.rank_cap else {}
        relevance: Mapping[str, float] = {}
        if self.plan.allocator in ESTIMATOR_OF:
            relevance = self._relevance(self.evidence())
        bills = []
        for name in names:
            group = self.graph.groups[name]
            layer = self.graph.layers[group.producers[0]]
            is_judged = name in scores and (not relevance or layer.name in relevance)
            if not is_judged:
                continue  # what cannot be judged stays whole
            kernel = tuple(self.model.get_parameter(f"{layer.name}.weight").shape[2:])
            bills.append(
                Bill(
                    name=name,
                    size=group.size,
                    least=min(self.plan.round_to, group.size),
                    inputs=layer.inputs if layer.kind != "depthwise" else 1,
                    kernel=kernel,
                    weights_per_unit=self._weights_per_unit(name),
                    scores=scores[name],
                    relevance=relevance.get(layer.name),
                    cap=None if name not in caps else max(group.size - caps[name], 0),
                    milliseconds=self._curve(name),
                    round_to=self.plan.round_to,
                )
            )
        return bills

    def _relevance(self, evidence: Evidence) -> dict[str, float]:
        """What the allocator weighs layers by; only for those of ESTIMATOR_OF."""
        estimator = ESTIMATOR_OF[self.plan.allocator]
        return states.relevance(self.model, self.graph, evidence.batches, estimator)

    def _weights_per_unit(self, name: str) -> float:
        group = self.graph.groups[name]
        total = 0
        for (module, side), places in group.places.items():
            weight = self.model.get_submodule(module).get_parameter("weight")
            axis = 1 if side == "in" else 0
            total += weight.numel() // weight.shape[axis] * places.shape[1]
        return max(float(total), 2.0)

    def _curve(self, name: str) -> NDArray[np.float64] | None:
        if self.table is None:
            return None
        return self.table.curve(self.graph, name)

    def _cut_filters(self, stage: Stage, goal: float) -> dict[str, Any]:
        if self.cost(stage) <= goal:
            return {"filters": 0}
        chosen = self.choice(stage, goal)
        gone = sum(len(units) * len(self.graph.groups[n].producers) for n, units in chosen.items())
        entry = self._operate(self.model, chosen)
        self._accept(self.model, [entry])
        return {"filters": gone}

    def unit_scores(self) -> dict[str, NDArray[np.float64]]:
        """Group -> (size,): the last phase's scores, or the criterion's now."""
        if self.scores:
            return self.scores
        criterion = CRITERIA[self.plan.criterion]
        assert criterion.units is not None
        return criterion.units(self.evidence())

    def structure(self, stage: Stage, goal: float) -> dict[str, int]:
        """How many units of each group would stay if *goal* were to be met now."""
        names = self.groups(stage)
        return self._kept(self._bills(names, self.unit_scores()), stage, goal)

    def choice(self, stage: Stage, goal: float) -> dict[str, NDArray[np.int64]]:
        """The units whose removal just meets *goal*: the smallest share that does."""
        scores = self.unit_scores()
        names = self.groups(stage)
        bills = self._bills(names, scores)
        kept = self._kept(bills, stage, goal)
        return {
            name: np.argsort(scores[name], kind="stable")[: self.graph.groups[name].size - count]
            for name, count in kept.items()
            if count < self.graph.groups[name].size
        }

    def _kept(self, bills: Sequence[Bill], stage: Stage, goal: float) -> dict[str, int]:
        allocate = ALLOCATORS[self.plan.allocator]
        units = sum(bill.size for bill in bills)
        most = largest_share(self.plan.allocator, bills)

        def at(share: float) -> dict[str, int]:
            gone = allocate(bills, min(share, most))
            return {bill.name: self._rounded(bill, bill.size - gone[bill.name]) for bill in bills}

        fewest = at(most)
        least = self.cost(stage, fewest)
        if stage.best_effort and least > goal:
            return fewest
        if not units or least > goal:
            now = self.cost(stage)
            what, asked = self.plan.target.what, self.plan.target.share
            raise OutOfReach(
                f"{self.where}: {what}={asked:g}: with these axes {least / now:.3f} of what the "
                f"{stage.name} stage has now must remain, or a layer would be empty",
                hint="a larger share, a smaller round_to, fewer protected layers, "
                "coupled = true, or the selector everything",
            )
        low, high = 0.0, most
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (low, middle) if self.cost(stage, at(middle)) <= goal else (middle, high)
        return at(high)

    def _rounded(self, bill: Bill, count: int) -> int:
        """*count* as a multiple of round_to, never more than there are or less than must stay."""
        to = self.plan.round_to
        return max(min(int(count / to + 0.5) * to, bill.size), bill.size - bill.room, 1)

    # -- blocks, and either

    def _block_scores(self, stage: Stage) -> dict[str, float]:
        criterion = CRITERIA[self.plan.block_criterion]
        assert criterion.blocks is not None
        layers = stage.layers(self.graph) - set(self.plan.protect)
        scores = self.distances or criterion.blocks(self.evidence())
        return {
            name: score
            for name, score in scores.items()
            if name in self.graph.blocks
            and set(self.graph.blocks[name].layers) <= layers
            and not self.graph.blocks[name].merges
        }

    def _cut_block(self, stage: Stage) -> dict[str, Any]:
        scores = self._block_scores(stage)
        if not scores:
            raise self._no_block(stage)
        name = min(scores, key=lambda block: (scores[block], block))
        entry = surgery.remove_block(self.model, self.graph, name)
        self._accept(self.model, [entry])
        return {"block": name}

    def _no_block(self, stage: Stage) -> OutOfReach:
        return OutOfReach(
            f"{self.where}: no further block of the {stage.name} stage can go, and "
            f"{self.plan.target.what}={self.plan.target.share:g} is not reached",
            hint="a larger share, or the selector everything or filters",
        )

    def _cut_either(self, stage: Stage, goal: float) -> dict[str, Any]:
        """
        The block child or the filter child, whichever the selector keeps.

        Compared at equal filters removed, or at equal milliseconds if the target counts these.
        Where no block can go any more, filters alone meet *goal*.
        """
        evidence = self.evidence()
        criterion = CRITERIA[self.plan.criterion]
        assert criterion.units is not None
        names = self.groups(stage)
        scores = {k: v for k, v in criterion.units(evidence).items() if k in names}
        blocks = self._block_scores(stage)
        children: dict[str, tuple[nn.Module, list[surgery.Entry], dict[str, Any]]] = {}
        if blocks:
            name = min(blocks, key=lambda block: (blocks[block], block))
            model = copy.deepcopy(self.model)
            entry = surgery.remove_block(model, self.graph, name)
            children["blocks"] = (model, [entry], {"block": name})
            chosen = self._as_much_as(name, scores)
        else:
            chosen = self.choice(stage, goal)
        if chosen:
            model = copy.deepcopy(self.model)
            entry = self._operate(model, chosen)
            gone = sum(
                len(units) * self.graph.groups[n].places[producer, "out"].shape[1]
                for n, units in chosen.items()
                for producer in self.graph.groups[n].producers
            )
            children["filters"] = (model, [entry], {"filters": gone})
        if not children:
            raise self._no_block(stage)
        rates = self._exit_rates(evidence)
        similar = [
            Child(
                kind=kind,
                similarity=exits_cka(self.model, child, self.graph, evidence.batches, rates),
            )
            for kind, (child, _, _) in children.items()
        ]
        kind = SELECTORS[self.plan.selector].choose(similar, [self.seed, 3, *self.at]).kind
        model, entries, facts = children[kind]
        self._accept(model, entries)
        return {"child": kind, **facts, "similarity": {c.kind: c.similarity for c in similar}}

    def _as_much_as(
        self, block: str, scores: Mapping[str, NDArray[Any]]
    ) -> dict[str, NDArray[np.int64]] | None:
        """Units that are as many filters, or as many milliseconds, as *block*; None if none are."""
        layers, seed = self.graph.blocks[block].layers, self.seed + self.at[1]
        if self.table is None:
            return equalise(self.graph, scores, filters_of(self.graph, layers), seed=seed)
        table, graph = self.table, self.graph
        widths = graph.widths({})
        lost_ms = sum(table.milliseconds(n, widths[n][1], widths[n][0]) for n in layers)

        def saved_ms(gone: Mapping[str, int]) -> float:
            kept = {name: graph.groups[name].size - count for name, count in gone.items()}
            return table.total(graph) - table.total(graph, kept)

        return equalise_latency(graph, scores, lost_ms, saved_ms, seed=seed)

    def _exit_rates(self, evidence: Evidence) -> list[float]:
        """Share of the scored samples that each exit would answer when *SURE*."""
        taken = torch.zeros(0, dtype=torch.int64)
        self.model.eval()
        with torch.no_grad():
            for inputs, _ in evidence.batches:
                logits = list(exit_outputs(self.model, inputs).values())
                sure = torch.stack([one.softmax(1).amax(1) >= SURE for one in logits])
                sure[-1] = True
                taken = torch.cat([taken, sure.to(torch.int64).argmax(0)])
        counts = torch.bincount(taken, minlength=len(self.graph.exits)).double()
        return [float(rate) for rate in counts / counts.sum()]

    # -- single weights

    def used(self, names: Sequence[str]) -> Masks:
        """The single weights of the tensors *names* that are in use, as a training's influence."""
        weights = {name: self.model.get_parameter(name) for name in names}
        keeps = {n: self.masks.get(n, torch.ones(w.shape).bool()) for n, w in weights.items()}
        return Masks(self.model, keeps)

    def _zero(self, stage: Stage, share: float) -> dict[str, Any]:
        names = [
            name
            for name in pool(self.graph, stage.pool)
            if name.removesuffix(".weight") not in self.plan.protect
        ]
        evidence, relevance = self.evidence(), None
        if self.plan.allocator in ESTIMATOR_OF:
            found = self._relevance(evidence)
            relevance = {f"{layer}.weight": value for layer, value in found.items()}
            names = [name for name in names if name in relevance]
        masks = self.used(names)
        score = CRITERIA[self.plan.criterion].entries
        assert score is not None

        def saliency(keeps: Mapping[str, torch.Tensor], some: Sequence[Any]) -> EntryScores:
            return score(replace(evidence, batches=list(some), masks=keeps))

        if self.plan.foresight:
            shares = planned(
                self.plan.schedule, 1 - share, self.plan.steps, self.plan.schedule_options
            )
            come_back = self.plan.come_back
            iterate(masks, saliency, shares, evidence.batches, come_back=come_back)
        else:
            masks.thin(
                saliency(masks.keeps, evidence.batches),
                1 - share,
                allocator=self.plan.allocator,
                relevance=relevance,
            )
        self.masks.update(masks.keeps)
        return {"weights_gone": masks.gone, "compressed_bytes": compressed_bytes(self.model)}

    def _linearise(self) -> dict[str, Any]:
        model, entries, done = folding.fold_linear(
            self.model, self.input_shape, self.evidence().batches, LINEAR_BITS
        )
        if entries:
            self._accept(model, entries)
        return done

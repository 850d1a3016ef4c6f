"""
Criteria that try it: how far the answers, or the features, move when a part is gone.

Callers see kl, kl_blocks and cka_blocks through CRITERIA. A unit is gone when nobody reads it
any more (its columns in all consumers are zero), a block when identity stands in its place:
exactly what removal does. Hidden here: the network runs as its exported graph, and a unit's
trial recomputes only what lies behind its consumers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from edgeexit.host.exported import export
from edgeexit.host.graph import Group
from edgeexit.host.model import exit_outputs
from edgeexit.host.prune.evidence import BlockScores, Evidence, UnitScores, evaluating
from edgeexit.host.prune.similarity import all_features, weighted_cka
from edgeexit.host.quiet import quietly

# Samples whose values are all kept at a time.
CHUNK = 64


def kl(evidence: Evidence) -> UnitScores:
    """
    KL divergence of the answers without the unit from those with it, in nats per sample.

    CURL (Luo & Wu 2020): mean over samples of sum_c q_c (log q_c - log p_c), p the network's
    probabilities, q those without the unit; mean over the exits that need it, weighted as in
    the loss. Comparable over the whole network. One softmax, on logits.
    """
    groups = evidence.graph.groups
    sums = {name: torch.zeros(group.size, dtype=torch.float64) for name, group in groups.items()}
    total = 0
    traces: dict[tuple[int, ...], _Trace] = {}
    with torch.no_grad(), evaluating(evidence.model):
        for inputs in _chunks(evidence):
            shape = tuple(inputs.shape)
            if shape not in traces:
                traces[shape] = _Trace(evidence.model, shape)
            trace = traces[shape]
            before = trace.run(inputs)
            for name, group in groups.items():
                shares = evidence.shares(group.exits)
                for unit in range(group.size):
                    after = trace.without(group, unit)
                    sums[name][unit] += _divergence(before, after, shares)
            total += len(inputs)
    return {name: (score / total).numpy() for name, score in sums.items()}


def kl_blocks(evidence: Evidence) -> BlockScores:
    """The same divergence, without the block: kl's scores and these can be compared."""
    sums = dict.fromkeys(evidence.graph.blocks, 0.0)
    total = 0
    with torch.no_grad(), evaluating(evidence.model):
        for inputs in _chunks(evidence):
            before = exit_outputs(evidence.model, inputs)
            for name, block in evidence.graph.blocks.items():
                with bypassed(evidence.model, name):
                    after = exit_outputs(evidence.model, inputs)
                shares = evidence.shares(block.exits)
                sums[name] += float(_divergence(before, after, shares))
            total += len(inputs)
    return {name: score / total for name, score in sums.items()}


def cka_blocks(evidence: Evidence) -> BlockScores:
    """
    1 - CKA of what the exits' heads read with and without the block (arXiv 2405.17081).

    Mean over the exits that need the block, weighted as in the loss.
    """
    batches = evidence.samples()
    before = all_features(evidence.model, evidence.graph, batches)
    scores = {}
    for name, block in evidence.graph.blocks.items():
        with bypassed(evidence.model, name):
            after = all_features(evidence.model, evidence.graph, batches)
        shares = evidence.shares(block.exits)
        scores[name] = sum(shares.values()) - weighted_cka(before, after, shares)
    return scores


@contextmanager
def bypassed(model: nn.Module, block: str) -> Iterator[None]:
    """Inside, the module *block* is replaced by identity."""
    parent, _, leaf = block.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(block)
    setattr(owner, leaf, nn.Identity())
    try:
        yield
    finally:
        setattr(owner, leaf, module)


def _chunks(evidence: Evidence) -> Iterator[torch.Tensor]:
    for inputs, _ in evidence.samples():
        yield from torch.split(inputs, CHUNK)


Logits = dict[str, torch.Tensor]


def _divergence(before: Logits, after: Logits, shares: dict[str, float]) -> torch.Tensor:
    """Sum over samples of KL(after || before), exits weighted by *shares*."""
    total = torch.zeros((), dtype=torch.float64)
    for name, share in shares.items():
        if after[name] is not before[name]:
            p = before[name].double().log_softmax(1)
            q = after[name].double().log_softmax(1)
            total += share * (q.exp() * (q - p)).sum()
    return total


class _Trace:
    """The exported graph for one input shape, with every value of the samples last run."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        program = export(model, shape)
        if any(_is_mutable(node) for node in program.graph.nodes):
            with quietly():
                program = program.run_decompositions({})
        signature = program.graph_signature
        named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        names = {key: name.removeprefix("model.") for key, name in named.items()}
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        constants = {
            key: program.constants[name]
            for key, name in signature.inputs_to_lifted_tensor_constants.items()
        }
        self.nodes = list(program.graph.nodes)
        self.interpreter = fx.Interpreter(program.graph_module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}
        self.tensors: dict[str, fx.Node] = {}
        for node in self.nodes:
            if node.op != "placeholder":
                continue
            if node.name in names:
                self.tensors[names[node.name]] = node
                self.values[node] = state[names[node.name]].detach()
            elif node.name in constants:
                self.values[node] = constants[node.name]
            else:
                self.input = node
        (output,) = [node for node in self.nodes if node.op == "output"]
        spec = program.call_spec.out_spec
        self.exits: dict[str, fx.Node] = torch.utils._pytree.tree_unflatten(
            list(output.args[0]), spec
        )
        self.behind: dict[str, list[fx.Node]] = {}

    def run(self, inputs: torch.Tensor) -> Logits:
        """Logits of every exit for *inputs*; all values are kept for trials."""
        self.values[self.input] = inputs
        self._compute(self.values, [node for node in self.nodes if node.op == "call_function"])
        return {name: self.values[node] for name, node in self.exits.items()}

    def without(self, group: Group, unit: int) -> Logits:
        """Logits without the *unit*, for the samples of the last run."""
        values = dict(self.values)
        for consumer in group.consumers:
            node = self.tensors[f"{consumer}.weight"]
            weight = values[node].clone()
            weight[:, torch.from_numpy(group.places[consumer, "in"][unit])] = 0
            values[node] = weight
        if group.name not in self.behind:
            self.behind[group.name] = self._behind(group.consumers)
        self._compute(values, self.behind[group.name])
        return {name: values[node] for name, node in self.exits.items()}

    def _compute(self, values: dict[fx.Node, Any], nodes: Sequence[fx.Node]) -> None:
        self.interpreter.env = values
        for node in nodes:
            values[node] = self.interpreter.run_node(node)

    def _behind(self, layers: Sequence[str]) -> list[fx.Node]:
        """What depends on the weights of *layers*, in the order of execution."""
        reached = {self.tensors[f"{layer}.weight"] for layer in layers}
        found = []
        for node in self.nodes:
            if node.op == "call_function" and any(n in reached for n in node.all_input_nodes):
                reached.add(node)
                found.append(node)
        return found


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return bool(schema is not None and schema.is_mutable)

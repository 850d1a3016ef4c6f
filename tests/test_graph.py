"""What depends on what: costs against the papers' tables, channels through any permutation."""

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from edgeexit.errors import Unsupported
from edgeexit.host import zoo
from edgeexit.host.graph import Graph, analyse, parameters
from edgeexit.host.model import attach

pytestmark = pytest.mark.host

CIFAR = (1, 3, 32, 32)


def mmac(graph: Graph) -> float:
    return round(graph.macs() / 1e6, 2)


@pytest.mark.parametrize(
    ("depth", "shortcut", "expected"),
    [
        (32, "B", 69.12),
        (44, "B", 97.44),
        (56, "B", 125.75),
        (110, "B", 253.15),
        (32, "A", 68.86),
        (44, "A", 97.17),
        (56, "A", 125.49),
        (110, "A", 252.89),
    ],
)
def test_macs_of_cifar_resnets(depth: int, shortcut: str, expected: float) -> None:
    net = zoo.resnet(depth=depth, exits=[], shortcut=shortcut)

    assert mmac(analyse(net, CIFAR)) == expected


def test_exits_of_the_shallow_deep_resnet56_cost_what_its_table_says() -> None:
    net = zoo.resnet(depth=56, exits=[4, 8, 12, 16, 20, 24])

    costs = [round(cost / 1e6, 2) for cost in analyse(net, CIFAR).exit_macs().values()]

    assert costs == [19.32, 38.19, 56.02, 74.89, 92.72, 111.59, 125.75]


@pytest.mark.parametrize("name", ["resnet20", "vit", "mobilenet", "dscnn", "conv1d"])
def test_what_all_exits_cost_and_what_the_heads_cost_is_the_whole(name: str) -> None:
    net = zoo.ZOO[name]
    graph = analyse(net(), net.input_shape)
    costs = graph.layer_macs()
    early = {n for e in graph.exits[:-1] for n in graph.heads[e]}

    assert graph.macs() == graph.exit_macs()[graph.exits[-1]] + sum(costs[n] for n in early)
    assert list(graph.exit_macs().values()) == sorted(graph.exit_macs().values())


def test_parameters_of_the_layers_are_those_of_the_module() -> None:
    net = zoo.ZOO["resnet8"]()
    graph = analyse(net, CIFAR)
    others = sum(p.numel() for p in net.parameters() if p.ndim == 1)

    assert graph.parameters({}) + others == parameters(net)


def test_blocks_are_the_modules_with_a_shortcut_of_equal_shape() -> None:
    resnet = analyse(zoo.ZOO["resnet20"](), CIFAR)
    mobilenet = analyse(zoo.ZOO["mobilenet"](), CIFAR)

    changing = {f"blocks.{k}" for k in (3, 6)}
    assert set(resnet.blocks) == {f"blocks.{k}" for k in range(9)} - changing
    # MobileNetV2 has a shortcut wherever stride is 1 and the width stays.
    assert list(mobilenet.blocks) == [f"blocks.{k}" for k in (0, 2, 4, 5, 7)]


def test_a_row_of_layers_without_shortcut_is_no_block() -> None:
    assert not analyse(zoo.ZOO["dscnn"](), (1, 1, 49, 10)).blocks


def test_a_block_between_two_exits_says_that_they_would_merge() -> None:
    net = zoo.resnet(size=[8, 8], widths=[8, 16], stem=[8], blocks=[3, 3], exits=[1, 2, 5])

    blocks = analyse(net, (1, 3, 8, 8)).blocks

    assert blocks["blocks.1"].merges == ("exit0", "exit1")
    assert blocks["blocks.5"].merges == ("exit2", "exit3")
    assert not blocks["blocks.0"].merges
    assert not blocks["blocks.2"].merges
    assert not blocks["blocks.4"].merges


def test_layers_know_which_exits_need_them() -> None:
    graph = analyse(zoo.ZOO["resnet8"](), CIFAR)

    assert graph.layers["stem.0.0"].exits == ("exit0", "exit1", "exit2")
    assert graph.layers["blocks.1.first.0"].exits == ("exit1", "exit2")
    assert graph.heads == {
        "exit0": ("heads.1.linear",),
        "exit1": ("heads.2.linear",),
        "exit2": ("heads.3.linear",),
    }


def test_a_flattened_map_gives_each_channel_all_its_places() -> None:
    net = zoo.resnet(
        channels=1, size=[8, 8], stem=[8], widths=[8], blocks=[1], exits=[0], heads=[[6]]
    )

    group = analyse(net, (1, 1, 8, 8)).groups["heads.0.convs.0.0"]

    places = group.places["heads.0.linear", "in"]
    # The head flattens channels last: channel c of place p stands at p * 6 + c.
    assert places.tolist() == [[place * 6 + c for place in range(16)] for c in range(6)]
    assert group.head == "exit0"


def test_channels_on_a_shortcut_go_together_and_inner_ones_alone() -> None:
    graph = analyse(zoo.ZOO["resnet8"](), CIFAR)

    assert graph.groups["stem.0.0"].producers == ("stem.0.0", "blocks.0.second.0")
    inner = graph.groups["blocks.0.first.0"]
    assert inner.producers == ("blocks.0.first.0",)
    assert inner.consumers == ("blocks.0.second.0",)
    assert inner.norms == ("blocks.0.first.1",)
    assert inner.block == "blocks.0"


def test_depthwise_channels_go_with_the_ones_that_they_filter() -> None:
    group = analyse(zoo.ZOO["mobilenet"](), CIFAR).groups["blocks.2.units.0.0"]

    assert group.producers == ("blocks.2.units.0.0", "blocks.2.units.1.0")


def test_what_attention_mixes_is_left_alone() -> None:
    graph = analyse(zoo.ZOO["vit"](), CIFAR)

    assert set(graph.groups) == {f"blocks.{k}.mlp.0" for k in range(6)}
    assert graph.others  # the products of queries and keys cost, too


def test_padded_shortcuts_tie_channels_of_neighbouring_stages() -> None:
    graph = analyse(zoo.resnet(depth=8, shortcut="A", exits=[]), CIFAR)

    stem = graph.groups["stem.0.0"]
    assert "blocks.1.second.0" in stem.producers
    # Channel 0 of the first stage is channel 8 of the second and 24 of the third.
    assert stem.places["blocks.1.second.0", "out"][0].tolist() == [8]
    assert stem.places["blocks.2.second.0", "out"][0].tolist() == [24]


class Hostile(nn.Module):
    """What no rule covers: weights used twice, channels shifted by a constant, a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.shifted = nn.Conv2d(4, 6, 1)
        self.mixed = nn.Conv2d(6, 6, 1)
        self.free = nn.Conv2d(6, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x))
        x = self.shifted(x) + 1.0
        x = self.mixed(x).softmax(1)
        x = self.grouped(pad(self.free(x), (1, 1, 1, 1)))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def test_what_no_rule_covers_is_frozen() -> None:
    assert not analyse(Hostile(), (1, 4, 6, 6)).groups


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(x)
        return logits if float(logits.sum()) > 0 else -logits


def test_a_forward_that_branches_on_values_is_refused() -> None:
    with pytest.raises(Unsupported, match="cannot be traced"):
        analyse(Branching(), (1, 3))


def test_exits_that_were_attached_are_found() -> None:
    backbone = zoo.resnet(size=[8, 8], widths=[8, 16], stem=[8], blocks=[2, 2], exits=[])

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = backbone

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.net(x)[-1]
            return logits

    net = attach(Plain(), ["net.blocks.1"], input_shape=(1, 3, 8, 8))
    graph = analyse(net, (1, 3, 8, 8))

    assert graph.exits == ("exit0", "exit1")
    assert len(graph.heads["exit0"]) == 1
    assert "backbone.net.blocks.1" in graph.blocks

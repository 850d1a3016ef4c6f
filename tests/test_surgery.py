"""Taking parts out: removing is exactly zeroing, and what is written down replays."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from edgeexit.errors import BadFile, UsageError
from edgeexit.host import zoo
from edgeexit.host.checkpoint import load_checkpoint, save_checkpoint
from edgeexit.host.graph import Graph, analyse
from edgeexit.host.model import exit_outputs
from edgeexit.host.surgery import joined, remove_block, remove_units, replay
from edgeexit.preprocess import Preprocess

pytestmark = pytest.mark.host


def unsettled(net: nn.Module, seed: int = 0) -> nn.Module:
    """*net* with batch statistics and gains that differ from channel to channel."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return net.eval()


def small_resnet(**changes: Any) -> nn.Module:
    wanted = dict(channels=1, size=[8, 8], stem=[8], widths=[8, 16], blocks=[2, 2], exits=[1, 2])
    return zoo.resnet(**{**wanted, **changes})


NETS = {
    "resnet": (small_resnet, (1, 1, 8, 8)),
    "flattened": (lambda: small_resnet(exits=[0, 2], heads=[[6, 4], []]), (1, 1, 8, 8)),
    "padded": (lambda: small_resnet(shortcut="A"), (1, 1, 8, 8)),
    "mobilenet": (
        lambda: zoo.mobilenet(
            channels=1,
            stem=8,
            stem_stride=1,
            last=16,
            stages=[[1, 8, 1, 1], [2, 8, 2, 2], [3, 12, 2, 1]],
            exits=[2],
        ),
        (1, 1, 8, 8),
    ),
    "dscnn": (lambda: zoo.dscnn(width=8), (1, 1, 16, 10)),
    "conv1d": (lambda: zoo.conv1d(widths=[8, 8, 12], exits=[1]), (1, 6, 32)),
    "vit": (lambda: zoo.vit(size=[8, 8], width=16, heads=2, blocks=2, exits=[1]), (1, 3, 8, 8)),
}


def zeroed(net: nn.Module, graph: Graph, chosen: dict[str, np.ndarray]) -> nn.Module:
    """*net* with the units *chosen* zeroed in every producer and norm."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, units in chosen.items():
            for (module_name, side), places in graph.groups[name].places.items():
                module = net.get_submodule(module_name)
                if side != "in":
                    where = torch.from_numpy(places[units].reshape(-1))
                    module.weight[where] = 0
                    if module.bias is not None:
                        module.bias[where] = 0
    return net


def answers(net: nn.Module, shape: tuple[int, ...]) -> list[torch.Tensor]:
    inputs = torch.randn((3, *shape[1:]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return list(exit_outputs(net.eval(), inputs).values())


@pytest.mark.parametrize("name", NETS)
@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_removing_units_is_zeroing_them_and_costs_what_was_foretold(name: str, seed: int) -> None:
    make, shape = NETS[name]
    net = unsettled(make(), seed)
    graph = analyse(net, shape)
    rng = np.random.default_rng(seed)
    chosen = {
        group.name: rng.choice(group.size, int(rng.integers(0, group.size)), replace=False)
        for group in graph.groups.values()
    }
    expected = answers(zeroed(net, graph, chosen), shape)
    factory_net = make()

    entry = remove_units(net, graph, chosen)

    for one, other in zip(answers(net, shape), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    kept = {name: graph.groups[name].size - len(units) for name, units in chosen.items()}
    after = analyse(net, shape)
    assert graph.macs(kept) == after.macs()
    assert graph.exit_macs(kept) == after.exit_macs()
    assert graph.parameters(kept) == after.parameters({})
    replay(factory_net, [entry], "surgery")
    factory_net.load_state_dict(net.state_dict())
    for one, other in zip(answers(factory_net, shape), answers(net, shape), strict=True):
        assert torch.equal(one, other)


def test_a_removed_block_is_a_block_whose_last_norm_is_zero() -> None:
    net = unsettled(small_resnet(exits=[2]))
    silent = copy.deepcopy(net)
    with torch.no_grad():
        for weight in silent.get_submodule("blocks.1.second.1").parameters():
            weight.zero_()

    remove_block(net, analyse(net, (1, 1, 8, 8)), "blocks.1")

    for one, other in zip(answers(net, (1, 1, 8, 8)), answers(silent, (1, 1, 8, 8)), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_one_block_of_resnet56_is_4_72_mmac_and_all_leave_21_20_percent() -> None:
    net = zoo.resnet(depth=56, exits=[])
    shape = (1, 3, 32, 32)
    whole = analyse(net, shape)
    remove_block(net, whole, "blocks.4")
    one_less = analyse(net, shape)
    assert round((whole.macs() - one_less.macs()) / 1e6, 2) == 4.72
    assert round(100 * (1 - one_less.macs() / whole.macs()), 2) == 3.75
    # Two blocks a stage are the floor of "Pruning Everything".
    floor = zoo.resnet(depth=14, exits=[])
    assert round(100 * (1 - analyse(floor, shape).macs() / whole.macs()), 2) == 78.80


def test_an_exit_on_a_removed_block_moves_to_what_comes_before() -> None:
    net = unsettled(small_resnet(blocks=[3, 2], exits=[2]))
    before = answers(net, (1, 1, 8, 8))
    shorter = copy.deepcopy(net)

    remove_block(shorter, analyse(shorter, (1, 1, 8, 8)), "blocks.1")

    after = answers(shorter, (1, 1, 8, 8))
    assert [one.shape for one in after] == [one.shape for one in before]
    with torch.no_grad():
        inputs = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(1))
        moved = net.heads["2"](net.blocks[0](net.stem(inputs)))
    assert torch.equal(after[0], moved)


def test_a_block_between_two_exits_stays() -> None:
    net = small_resnet(blocks=[3, 2], exits=[1, 2])
    graph = analyse(net, (1, 1, 8, 8))

    with pytest.raises(UsageError, match="stands between the exits exit0 and exit1"):
        remove_block(net, graph, "blocks.1")
    with pytest.raises(UsageError, match=r"'blocks.2.first' is no block that can be removed"):
        remove_block(net, graph, "blocks.2.first")


def test_a_group_is_never_emptied() -> None:
    net = small_resnet()
    graph = analyse(net, (1, 1, 8, 8))

    with pytest.raises(UsageError, match="all 8 channels would be removed"):
        remove_units(net, graph, {"blocks.0.first.0": np.arange(8)})


def test_runs_of_channel_entries_become_one() -> None:
    entries = [
        {"channels": {"a": [4, 4], "b": [4]}},
        {"channels": {"a": [4, 3]}},
        {"remove": "c"},
        {"channels": {"b": [2]}},
    ]

    assert joined(entries) == [
        {"channels": {"a": [4, 3], "b": [4]}},
        {"remove": "c"},
        {"channels": {"b": [2]}},
    ]


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ("text", "expected a list"),
        ([["remove", "blocks.0"]], r"\[0\]: expected one of"),
        ([{"remove": "blocks.0", "linear": "x"}], "expected one of"),
        ([{"exec": "x"}], "found 'exec'"),
        ([{"remove": "nowhere"}], "no module 'nowhere'"),
        ([{"remove": ""}], "no module ''"),
        ([{"remove": 3}], "no module 3"),
        ([{"remove": "blocks.0.first.0"}], "is no block"),
        ([{"linear": "blocks.0.first.0"}], "is no activation"),
        (
            [{"channels": {"blocks.0.first.0": [8, 9]}}],
            r"found \[8, 9\], expected at most \[8, 8\]",
        ),
        ([{"channels": {"blocks.0.first.0": [8, 0]}}], "each 1 or more"),
        ([{"channels": {"blocks.0.first.0": [8]}}], "expected at most"),
        ([{"channels": {"blocks.0.first.0": [8, True]}}], "expected at most"),
        ([{"channels": {"blocks.0.first.0": "all"}}], "expected at most"),
        ([{"channels": {"blocks.0.first": [8, 4]}}], "has no channels"),
        ([{"channels": []}], "expected module -> widths"),
        ([{"fold": ["blocks.0.first.0"]}], "expected the names of two layers"),
        ([{"fold": ["blocks.0.first.0", "blocks.0.first.1"]}], "fold"),
    ],
)
def test_a_forged_surgery_is_refused(entries: Any, says: str) -> None:
    with pytest.raises(BadFile, match=says):
        replay(small_resnet(), entries, "net.pt: surgery")


def pruned_file(tmp_path: Any) -> Any:
    kwargs = dict(channels=1, size=[8, 8], stem=[8], widths=[8, 16], blocks=[2, 2], exits=[1, 2])
    net = unsettled(zoo.resnet(**kwargs))
    graph = analyse(net, (1, 1, 8, 8))
    entries = [remove_units(net, graph, {"blocks.0.first.0": np.array([1, 5])})]
    entries.append(remove_block(net, analyse(net, (1, 1, 8, 8)), "blocks.3"))
    path = tmp_path / "pruned.pt"
    save_checkpoint(
        path,
        model=net,
        arch="edgeexit.host.zoo:resnet",
        kwargs=kwargs,
        input_shape=[1, 1, 8, 8],
        class_names=[str(k) for k in range(10)],
        preprocess=Preprocess(
            kind="image",
            size=(8, 8),
            color="gray",
            scale=1 / 255,
            mean=(0.4,),
            std=(0.3,),
            layout="nchw",
        ),
        surgery=entries,
    )
    return path, net, entries


def test_a_pruned_checkpoint_is_plain_data_and_answers_the_same(tmp_path: Any) -> None:
    path, net, entries = pruned_file(tmp_path)

    loaded = load_checkpoint(path)

    assert list(loaded.surgery) == entries
    shape = (1, 1, 8, 8)
    for one, other in zip(answers(loaded.model, shape), answers(net, shape), strict=True):
        assert torch.equal(one, other)
    torch.load(path, weights_only=True)


def test_weights_that_do_not_reproduce_the_probe_are_refused(tmp_path: Any) -> None:
    path, _, _ = pruned_file(tmp_path)
    document = torch.load(path, weights_only=True)
    document["state_dict"]["blocks.0.first.0.weight"] *= 1.1
    torch.save(document, path)

    with pytest.raises(BadFile, match="answers its probe differently"):
        load_checkpoint(path)


@pytest.mark.parametrize("probe", [None, {}, {"inputs": 3, "logits": {}}, "text"])
def test_a_pruned_checkpoint_without_a_sound_probe_is_refused(tmp_path: Any, probe: Any) -> None:
    path, _, _ = pruned_file(tmp_path)
    document = torch.load(path, weights_only=True)
    document["probe"] = probe
    torch.save(document, path)

    with pytest.raises(BadFile, match="probe: missing or not fitting"):
        load_checkpoint(path)

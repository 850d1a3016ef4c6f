"""Tap points lie where one tensor is handed over, and exits at the shares they are meant for."""

from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edgeexit.errors import UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.taps import Tap, choose_taps, tap_points  # noqa: E402
from tests import user_net  # noqa: E402

pytestmark = pytest.mark.host

SHAPE = (1, 3, 12, 12)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def names(taps: list[Tap]) -> list[str]:
    return [tap.name for tap in taps]


def test_taps_of_a_resnet_are_its_pooled_stem_and_its_blocks() -> None:
    taps = tap_points(user_net.ResNet18(), SHAPE)

    blocks = ["layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0"]
    assert names(taps) == ["maxpool", *blocks]
    assert taps[0].shape == (1, 8, 6, 6)
    assert taps[3].shape == (1, 16, 3, 3)


def test_taps_of_a_mobilenet_lie_behind_every_block() -> None:
    taps = tap_points(user_net.MobileNetV2(), SHAPE)

    assert {f"features.{k}" for k in range(7)} <= set(names(taps))
    assert "features.7" not in names(taps)  # only the last layer is behind it
    # Inside of a block with a shortcut there are two paths.
    assert not [name for name in names(taps) if name.startswith(("features.3.", "features.5."))]


def test_a_tap_hands_over_one_tensor() -> None:
    assert names(tap_points(user_net.Dense(), SHAPE)) == ["first", "transition"]


def test_a_network_without_inner_layers_has_no_taps() -> None:
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 4))

    assert tap_points(flat, SHAPE) == []


@pytest.mark.parametrize("name", ["resnet8", "mobilenet", "vit", "dscnn", "conv1d"])
def test_costs_rise_towards_the_end_and_count_what_lies_before(name: str) -> None:
    net = zoo.ZOO[name]
    model = net()
    before = [weight.requires_grad for weight in model.parameters()]

    taps = tap_points(model, net.input_shape)

    macs = [tap.macs for tap in taps]
    assert macs == sorted(set(macs))
    assert 0 < taps[0].share < taps[-1].share < 1
    graph = analyse(model, net.input_shape)
    total = graph.exit_macs()[graph.exits[-1]]
    for tap in taps:
        assert tap.share == tap.macs / total
    assert [weight.requires_grad for weight in model.parameters()] == before
    if name == "resnet8":  # by hand: 3x3 of the stem, then two 3x3 on 16 channels
        assert macs[:2] == [27 * 16 * 1024, 27 * 16 * 1024 + 2 * 144 * 16 * 1024]


# ---------------------------------------------------------------- where they should go


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=9, unique=True),
    st.integers(1, 9),
)
@settings(max_examples=25, deadline=None)
def test_no_other_choice_lies_nearer_to_equal_shares(shares: list[float], count: int) -> None:
    taps = [Tap(name=str(s), shape=(1, 2), macs=1, share=s) for s in sorted(shares)]
    if count > len(taps):
        with pytest.raises(UsageError, match="places"):
            choose_taps(taps, count)
        return
    step = 0.9 / count if count >= 6 else 1 / (count + 1)

    def off(chosen: Any) -> float:
        return sum((tap.share - (k + 1) * step) ** 2 for k, tap in enumerate(chosen))

    chosen = choose_taps(taps, count)

    assert off(chosen) == pytest.approx(min(map(off, combinations(taps, count))))
    assert chosen == sorted(chosen, key=lambda tap: tap.share)
    assert len(set(names(chosen))) == count


def test_six_exits_lie_where_shallow_deep_networks_have_them() -> None:
    taps = tap_points(zoo.ZOO["resnet56"](), (1, 3, 32, 32))

    for tap, share in zip(choose_taps(taps, 6), (0.15, 0.3, 0.45, 0.6, 0.75, 0.9), strict=True):
        assert tap.share == pytest.approx(share, abs=0.02)

"""Every zoo net is a multi-exit network that can be built without memory and from its kwargs."""

import pytest

torch = pytest.importorskip("torch")

from edgeexit.errors import Unsupported  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.zoo import FACTORIES, ZOO, resnet, vit  # noqa: E402

pytestmark = pytest.mark.host
SMALL = [name for name in ZOO if not name.endswith("-224")]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", SMALL)
def test_every_net_gives_logits_at_every_exit(name: str) -> None:
    net = ZOO[name]().eval()

    with torch.no_grad():
        outputs = exit_outputs(net, torch.randn(2, *ZOO[name].input_shape[1:]))

    assert list(outputs) == ["exit0", "exit1", "exit2"]
    assert {logits.shape[0] for logits in outputs.values()} == {2}


@pytest.mark.parametrize("name", ZOO)
def test_every_net_is_built_on_no_memory_from_its_kwargs(name: str) -> None:
    entry = ZOO[name]

    with torch.device("meta"):
        net = FACTORIES[entry.arch.partition(":")[2]](**entry.kwargs)

    assert all(tensor.is_meta for tensor in net.state_dict().values())


@pytest.mark.parametrize(("size", "channels"), [((28, 28), 1), ((33, 17), 3), ((96, 96), 4)])
def test_resnet_takes_any_size_and_channel_count(size: tuple[int, int], channels: int) -> None:
    net = resnet(depth=8, size=size, channels=channels, heads=[[8, 8], [8]]).eval()

    with torch.no_grad():
        outputs = net(torch.zeros(1, channels, *size))

    assert [tuple(logits.shape) for logits in outputs] == [(1, 10)] * 3


def test_an_exit_may_stand_right_behind_the_stem() -> None:
    net = resnet(stem=[4, 8], widths=[8], blocks=[2], exits=[0], heads=[[4]], size=[8, 8])

    assert list(net.heads) == ["0", "2"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"depth": 21},
        {"exits": [9]},
        {"exits": [2, 1]},
        {"widths": [10**9]},
        {"widths": ["wide"]},
        {"blocks": [200, 200], "widths": [8, 8]},
        {"blocks": [1]},
        {"heads": [[4]]},
        {"stem": []},
    ],
)
def test_resnet_refuses_arguments_out_of_range(kwargs: dict[str, object]) -> None:
    with pytest.raises(Unsupported):
        resnet(**kwargs)


def test_vit_refuses_patches_that_do_not_fit() -> None:
    with pytest.raises(Unsupported, match="patch"):
        vit(size=[30, 32], patch=4)

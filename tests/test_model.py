"""The multi-exit contract, and the exits that a plain backbone gets."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from edgeexit.errors import Unsupported, UsageError  # noqa: E402
from edgeexit.host.model import attach, exit_outputs  # noqa: E402
from edgeexit.host.zoo import vit  # noqa: E402

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Backbone(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(1, 4, 3, padding=1)
        self.second = torch.nn.Conv2d(4, 8, 3, 2, 1)
        self.last = torch.nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(x.mean((2, 3)))


def test_attach_gives_a_backbone_exits_and_leaves_its_own_answer() -> None:
    backbone = Backbone().eval()
    net = attach(backbone, ["first", "second"], input_shape=[1, 1, 8, 8]).eval()
    image = torch.randn(2, 1, 8, 8)

    with torch.no_grad():
        outputs = exit_outputs(net, image)
        assert torch.equal(outputs["exit2"], backbone(image))

    assert [tuple(logits.shape) for logits in outputs.values()] == [(2, 3)] * 3


def test_attached_exits_survive_export() -> None:
    net = attach(Backbone(), ["first"], input_shape=[1, 1, 8, 8]).eval()
    image = torch.randn(1, 1, 8, 8)

    exported = torch.export.export(net, (image,)).module()

    with torch.no_grad():
        for one, other in zip(net(image), exported(image), strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_attach_takes_tokens() -> None:
    backbone = vit(blocks=2, exits=[], width=8, heads=2, size=[8, 8])

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = backbone

        def forward(self, x: Any) -> Any:
            return self.net(x)[-1]

    net = attach(Plain(), ["net.blocks.0"], input_shape=[1, 3, 8, 8])

    assert len(net.eval()(torch.zeros(1, 3, 8, 8))) == 2


def test_attach_refuses_wrong_places() -> None:
    shape = [1, 1, 8, 8]
    with pytest.raises(UsageError, match="no module named 'frist'"):
        attach(Backbone(), ["frist"], input_shape=shape)
    with pytest.raises(UsageError, match="different"):
        attach(Backbone(), ["first", "first"], input_shape=shape)


@pytest.mark.parametrize("outputs", ["text", (), [3], [torch.zeros(1, 2, 3)], {}])
def test_other_outputs_are_no_multi_exit_network(outputs: object) -> None:
    class Odd(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return outputs

    with pytest.raises(Unsupported):
        exit_outputs(Odd(), torch.zeros(1))


def test_exits_are_named_by_the_keys_of_a_dict() -> None:
    class Named(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return {"early": x, "late": x + 1}

    assert list(exit_outputs(Named(), torch.zeros(1, 2))) == ["early", "late"]

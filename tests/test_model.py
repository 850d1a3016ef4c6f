"""The multi-exit contract, and the exits that a plain backbone gets."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from edgeexit.errors import Unsupported, UsageError  # noqa: E402
from edgeexit.host.model import attach, exit_outputs  # noqa: E402
from edgeexit.host.zoo import conv1d, vit  # noqa: E402

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


def test_sequences_are_averaged_over_places_and_tokens_over_themselves() -> None:
    sequences = conv1d(exits=[])
    tokens = vit(blocks=2, exits=[], width=8, heads=2, size=[8, 8])

    one = attach(sequences, ["stem.2", "blocks.0"], input_shape=[1, 6, 128])
    other = attach(tokens, ["stem.conv", "blocks.0"], input_shape=[1, 3, 8, 8])

    kinds = [type(head).__name__ for net in (one, other) for head in net.heads]
    assert kinds == ["SequenceHead", "SequenceHead", "ExitHead", "TokenHead"]


@pytest.mark.parametrize(
    ("head", "widths", "kind"),
    [
        ("average", None, "ExitHead"),
        ("pooled", None, "PooledHead"),
        ("convs", [[4, 6], [5]], "ExitHead"),
    ],
)
def test_a_kind_of_head_is_chosen_by_name(head: str, widths: Any, kind: str) -> None:
    net = attach(
        Backbone(), ["first", "second"], input_shape=[1, 1, 8, 8], head=head, widths=widths
    )

    assert {type(one).__name__ for one in net.heads} == {kind}
    assert len(net.eval()(torch.zeros(2, 1, 8, 8))) == 3
    convs = sum(isinstance(part, torch.nn.Conv2d) for part in net.heads.modules())
    assert convs == sum(map(len, widths or []))


def test_heads_do_not_fit_everywhere() -> None:
    class Odd(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Linear(2, 2)

    def refused(kind: type[Exception], words: str, at: list[str], **given: Any) -> None:
        with pytest.raises(kind, match=words):
            attach(Odd(), at, input_shape=[1, 1, 8, 8], **given)

    refused(Unsupported, "takes no part", ["unused"])
    refused(UsageError, "earliest first: first, second", ["second", "first"])
    refused(UsageError, "kind of exit head", ["first"], head="nonsense")
    refused(UsageError, "expected at least one", ["first"], head="convs")
    refused(UsageError, "expected none", ["first"], widths=[[4]])
    refused(UsageError, "expected none", ["last"], head="convs", widths=[[4]])
    refused(UsageError, "one for each exit", ["first"], widths=[[], []])
    with pytest.raises(UsageError) as found:
        attach(Backbone(), ["last"], input_shape=[1, 1, 8, 8], head="convs", widths=[[4]])
    assert "only a map" in str(found.value.hint)
    with pytest.raises(Unsupported, match="3 exits already"):
        attach(vit(blocks=3, exits=[1, 2]), ["stem"], input_shape=[1, 3, 32, 32])


def test_a_backbone_without_memory_gets_heads_of_the_same_shapes() -> None:
    with torch.device("meta"):
        empty = Backbone()

    net = attach(empty, ["first"], input_shape=[1, 1, 8, 8], head="pooled", device="meta")

    real = attach(Backbone(), ["first"], input_shape=[1, 1, 8, 8], head="pooled")
    assert all(weight.is_meta for weight in net.parameters())
    assert [w.shape for w in net.parameters()] == [w.shape for w in real.parameters()]

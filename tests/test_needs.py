"""What an exit needs: found by autograd, the same that the exported graph says."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.needs import needs  # noqa: E402
from edgeexit.host.zoo import ZOO  # noqa: E402
from tests.fit_nets import bits, changed, made  # noqa: E402

pytestmark = pytest.mark.host


@pytest.mark.parametrize("name", ["zoo", "attached", "foreign"])
def test_early_heads_are_those_of_the_graph(name: str) -> None:
    model = made(name)

    found = needs(model, torch.zeros(1, 1, 8, 8)).head_modules()

    heads = analyse(model, (1, 1, 8, 8)).heads
    kinds = nn.Conv2d | nn.Linear
    layers = {n for n in found if isinstance(model.get_submodule(n), kinds)}
    assert layers == {layer for exit in list(heads)[:-1] for layer in heads[exit]}


def test_looking_at_a_network_leaves_it_as_it_was() -> None:
    model = made("dropout")
    model.train()
    model.final.bias.requires_grad_(False)
    before = bits(model)

    found = needs(model, torch.zeros(1, 1, 8, 8))

    assert not changed(model, before)
    assert model.training
    assert model.head[0].training
    assert not model.final.bias.requires_grad
    assert found.parameters["body.weight"] == {"exit0", "exit1"}
    assert found.parameters["unused.weight"] == frozenset()
    assert {"head", "head.0", "head.1", "head.2"} == found.head_modules()


@pytest.mark.parametrize("name", ["resnet8", "mobilenet", "vit", "dscnn", "conv1d"])
def test_the_heads_of_every_kind_of_zoo_net_are_found(name: str) -> None:
    model = ZOO[name]()

    found = needs(model, torch.zeros(ZOO[name].input_shape))

    last = list(model.heads)[-1]
    names = {n for n, _ in model.named_parameters()}
    wanted = {n for n in names if n.startswith("heads.") and not n.startswith(f"heads.{last}.")}
    assert wanted
    assert found.head_parameters() == wanted
    # In a row of blocks, whatever an exit needs, all later ones need too.
    for part in names - {n for n in names if n.startswith("heads.")}:
        exits = found.parameters[part]
        assert exits == set(found.exits[found.exits.index(min(exits)) :])


def test_a_head_on_a_detached_map_leaves_the_backbone_to_others() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(2))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            x = self.first(x)
            return [self.heads[0](x.detach()), self.heads[1](self.second(x))]

    found = needs(Detached(), torch.zeros(1, 4))

    assert found.parameters["first.weight"] == {"exit1"}
    assert found.head_parameters() == {"heads.0.weight", "heads.0.bias"}

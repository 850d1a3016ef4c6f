"""What an exit needs: found by autograd, the same that the exported graph says."""

import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.needs import needs  # noqa: E402
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

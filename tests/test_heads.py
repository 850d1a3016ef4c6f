"""Exit heads: the pooled one lowers exactly; class means are the nearest-mean classifier."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeexit.errors import Unsupported, UsageError

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit import tflite  # noqa: E402
from edgeexit.host import lower, zoo  # noqa: E402
from edgeexit.host.answers import RealSamples, check_parity, tflite_logits  # noqa: E402
from edgeexit.host.convert import check_chain  # noqa: E402
from edgeexit.host.heads import (  # noqa: E402
    init_from_class_means,
    logits_layers,
    prototype_heads,
)
from edgeexit.host.layers import ConvUnit, ExitHead, PooledHead  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.schemes import int8  # noqa: E402
from edgeexit.host.torch_answers import torch_logits  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402
from tests import host_nets  # noqa: E402

SMALL = {"channels": 1, "classes": 4, "size": [8, 8], "stem": [8], "widths": [8, 16]}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


class Pooled(torch.nn.Module):
    """Pooled heads on a map of *size* and on one of 2x2, and a plain head on the latter."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.first = ConvUnit(1, 8)
        self.second = torch.nn.Sequential(*(ConvUnit(8, 8, stride=2) for _ in range(3)))
        small = tuple(-(-side // 8) for side in size)
        pooled = [PooledHead(8, size, 5), PooledHead(8, small, 5)]
        self.heads = torch.nn.ModuleList([*pooled, ExitHead(8, small, 5)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.first(x)
        z = self.second(y)
        return self.heads[0](y), self.heads[1](z), self.heads[2](z)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=25, deadline=None)
def test_a_pooled_head_sees_every_place_once_or_more(height: int, width: int) -> None:
    head = PooledHead(2, (height, width), 3)
    assert head.linear.in_features == 2 * min(4, height) * min(4, width)
    x = torch.randn(1, 2, height, width, requires_grad=True)
    head(x).sum().backward()
    assert bool((x.grad != 0).all())


def test_a_pooled_head_mixes_as_the_paper_does() -> None:
    head = PooledHead(3, (8, 12), 5)
    x = torch.randn(2, 3, 8, 12)
    with torch.no_grad():
        head.mix.fill_(0.3)
        cells = x.reshape(2, 3, 4, 2, 4, 3)
        mixed = 0.3 * cells.amax((3, 5)) + 0.7 * cells.mean((3, 5))
        wanted = head.linear(mixed.permute(0, 2, 3, 1).flatten(1))
        torch.testing.assert_close(head(x), wanted)
    head(x).sum().backward()
    assert float(head.mix.grad) != 0.0


def test_pooled_and_prototype_heads_reach_int8_and_the_cut_exactly() -> None:
    size = (14, 12)  # windows that overlap, and windows that do not
    torch.manual_seed(0)
    preprocess = Preprocess(
        kind="image", size=size, color="gray", scale=1 / 255, mean=(0.4,), std=(0.3,), layout="nchw"
    )
    reals = RealSamples(host_nets.pictures(64, size=size), preprocess)
    model = host_nets.settled(Pooled(size), reals)
    with torch.no_grad():
        model.heads[0].mix.fill_(0.7)
    inputs = torch.stack([torch.from_numpy(real).permute(2, 0, 1) for real in reals])
    prototype_heads(model, ["exit1", "exit2"], [(inputs, torch.arange(64) % 5)])
    lowered = lower.from_torch(model, (1, 1, *size), preprocess)
    check_parity(
        torch_logits(model, reals), tflite_logits(lowered.data, lowered.exits, reals), reals
    )
    kinds = [op.kind for op in tflite.read_model(lowered.data, "lowered").operators]
    assert kinds.count("FULLY_CONNECTED") == 3  # one for each exit, prototypes or not
    quantized = int8(lowered, reals)
    check_chain(quantized.data, quantized.exits, reals)
    assert min(quantized.agreement.values()) > 0.8


def batches_of(count: int = 96, classes: int = 4, seed: int = 0) -> list:
    """Pictures whose class is where they are bright, as batches of 32."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    images = random.normal(0, 0.5, (count, 1, 8, 8)).astype(np.float32)
    for k, label in enumerate(labels):
        images[k, 0, 2 * label : 2 * label + 2] += 2.0
    parts = range(0, count, 32)
    return [
        (torch.from_numpy(images[s : s + 32]), torch.from_numpy(labels[s : s + 32])) for s in parts
    ]


def small_net(**changes) -> torch.nn.Module:
    torch.manual_seed(1)
    net = zoo.resnet(**{**SMALL, "blocks": [1, 1], "exits": [0, 1], "heads": [[8], []], **changes})
    net.train()
    with torch.no_grad():
        for inputs, _ in batches_of():
            net(inputs)
    return net.eval()


def features_of(model: torch.nn.Module, layer: str, inputs: torch.Tensor) -> np.ndarray:
    seen = []
    handle = model.get_submodule(layer).register_forward_hook(
        lambda _module, given, _output: seen.append(given[0])
    )
    with torch.no_grad():
        model(inputs)
    handle.remove()
    return seen[0].double().numpy()


def test_the_logits_of_each_exit_are_traced_to_their_layer() -> None:
    found = logits_layers(small_net(), torch.zeros(1, 1, 8, 8))
    assert found == {f"exit{k}": f"heads.{k}.linear" for k in range(3)}


@given(st.integers(0, 1000))
@settings(max_examples=10, deadline=None)
def test_a_prototype_head_answers_with_the_nearest_class_mean(seed: int) -> None:
    model, batches = small_net(), batches_of(seed=seed)
    layers = logits_layers(model, batches[0][0][:1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prototype_heads(model, ["exit0", "exit1"], batches)
    labels = torch.cat([part for _, part in batches]).numpy()
    unseen = batches_of(seed=seed + 1)[0][0]
    with torch.no_grad():
        logits = exit_outputs(model, unseen)
    for exit in ("exit0", "exit1"):
        known = np.concatenate([features_of(model, layers[exit], x) for x, _ in batches])
        means = np.stack([known[labels == k].mean(0) for k in range(4)])
        new = features_of(model, layers[exit], unseen)
        distances = np.square(new[:, None] - means).sum(2)
        np.testing.assert_array_equal(logits[exit].argmax(1).numpy(), distances.argmin(1))
        # Differences of logits are one positive multiple of differences of squared distances.
        ours = (logits[exit] - logits[exit][:, :1]).double().numpy()[:, 1:]
        theirs = (distances[:, :1] - distances)[:, 1:]
        scale = float((ours * theirs).sum() / np.square(theirs).sum())
        assert scale > 0
        np.testing.assert_allclose(ours, scale * theirs, atol=1e-3 * np.abs(ours).max())
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {f"{layers[e]}.{p}" for e in ("exit0", "exit1") for p in ("weight", "bias")}


def test_class_means_know_what_random_heads_do_not() -> None:
    model, batches = small_net(), batches_of()
    unseen, labels = (torch.cat(parts) for parts in zip(*batches_of(seed=9), strict=True))
    with torch.no_grad():
        guess = (exit_outputs(model, unseen)["exit0"].argmax(1) == labels).double().mean()
    init_from_class_means(model, ["exit0"], batches)
    with torch.no_grad():
        logits = exit_outputs(model, unseen)["exit0"]
    assert guess < 0.6
    assert (logits.argmax(1) == labels).double().mean() > 0.9
    # The scale is such that confidences are neither flat nor absurd.
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert loss < torch.nn.functional.cross_entropy(0.3 * logits, labels)
    assert 0.7 < logits.softmax(1).amax(1).mean() < 0.99


def test_the_mode_of_the_network_is_left_as_it_was() -> None:
    model = small_net().train()
    before = model.stem[0][1].running_mean.clone()
    prototype_heads(model, ["exit0"], batches_of())
    assert model.training
    torch.testing.assert_close(model.stem[0][1].running_mean, before, rtol=0, atol=0)


def test_what_cannot_have_class_means_is_refused() -> None:
    model, batches = small_net(), batches_of()
    with pytest.raises(UsageError, match="exit9"):
        prototype_heads(model, ["exit9"], batches)
    with pytest.raises(UsageError, match="no samples"):
        prototype_heads(model, ["exit0"], [])
    one_class = [(inputs, torch.ones_like(labels)) for inputs, labels in batches]
    with pytest.raises(UsageError, match="no sample of class 0 among 96"):
        prototype_heads(model, ["exit0"], one_class)
    with pytest.raises(UsageError, match="outside of"):
        prototype_heads(model, ["exit0"], [(batches[0][0], batches[0][1] + 4)])
    backwards = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4), torch.nn.Tanh())
    with pytest.raises(Unsupported, match="linear layer"):
        prototype_heads(backwards, ["exit0"], batches)

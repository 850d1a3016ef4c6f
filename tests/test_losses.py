"""Losses: the laws of the papers that they come from."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.host.losses import equilibrium, exit_loss, ramped  # noqa: E402
from edgeexit.host.needs import needs  # noqa: E402
from edgeexit.host.recipe import TrainingPart  # noqa: E402

pytestmark = pytest.mark.host

PART = TrainingPart(epochs=1, learning_rate=0.1)


class Chain(nn.Module):
    """N blocks in a row with a head after each, as the laws of gradient scaling assume."""

    def __init__(self, exits: int, scaled: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(exits))
        self.heads = nn.ModuleList(nn.Linear(4, 3) for _ in range(exits))
        self.scaled = scaled

    def forward(self, x: Any) -> list[Any]:
        logits, count = [], len(self.blocks)
        for i, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True)):
            x = torch.tanh(block(x))
            if self.scaled:
                x = Scaled.apply(x, 1 / (count - i))
            logits.append(head(x))
            if self.scaled:
                x = Scaled.apply(x, float(count - i - 1))
        return logits


class Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: Any, scale: float) -> Any:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return ctx.scale * gradient, None


@settings(max_examples=20, deadline=None)
@given(
    exits=st.integers(1, 5),
    seed=st.integers(0, 1000),
    distillation=st.sampled_from([0.0, 0.5]),
    data=st.data(),
)
def test_equilibrium_is_the_scaling_of_the_paper(
    exits: int, seed: int, distillation: float, data: st.DataObject
) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 2), min_size=exits, max_size=exits))
    torch.manual_seed(seed)
    ours, papers = Chain(exits, False), Chain(exits, True)
    papers.load_state_dict(ours.state_dict())
    inputs, labels = torch.randn(6, 4), torch.randint(0, 3, (6,))
    part = replace(PART, distillation=distillation)

    for model in (ours, papers):
        exit_loss(model(inputs), labels, weights, part).backward()
    equilibrium(ours, needs(ours, inputs).parameters)

    for (name, one), other in zip(ours.named_parameters(), papers.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-6), name


@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=5),
    epochs=st.integers(1, 50),
)
def test_the_ramp_grows_to_the_weights_and_spares_the_final_exit(
    weights: list[float], epochs: int
) -> None:
    rows = [ramped(weights, epoch, epochs) for epoch in range(1, epochs + 1)]

    assert rows[-1] == weights
    for earlier, later in pairwise(rows):
        assert all(a <= b for a, b in zip(earlier, later, strict=True))
        assert earlier[-1] == weights[-1]
    assert all(a <= w for row in rows for a, w in zip(row, weights, strict=True))


def test_the_ramp_is_the_one_of_the_paper() -> None:
    # tau_max 0.15, 0.9 in epoch 3 of 10: 0.01 + 0.3 * tau_max.
    assert ramped([0.15, 0.9, 1.0], 3, 10) == pytest.approx([0.055, 0.28, 1.0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), temperature=st.floats(0.5, 10))
def test_distillation_is_at_rest_where_student_and_teacher_agree(
    seed: int, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, 4, generator=generator)
    student, teacher = (logits.clone().requires_grad_() for _ in range(2))
    labels = torch.randint(0, 4, (5,), generator=generator)
    part = replace(PART, distillation=1.0, distillation_temperature=temperature)

    both = exit_loss([student, teacher], labels, [1.0, 1.0], part)
    alone = exit_loss([student, teacher], labels, [1.0, 1.0], PART)
    pulls = torch.autograd.grad(both - alone, [student, teacher], allow_unused=True)

    assert torch.allclose(pulls[0], torch.zeros_like(logits), atol=1e-5)
    assert float(torch.zeros(()) if pulls[1] is None else pulls[1].abs().max()) < 1e-6


def test_a_temperature_keeps_the_size_of_the_pull() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(64, 10, requires_grad=True), torch.randn(64, 10)
    labels = torch.zeros(64, dtype=torch.int64)
    pulls = []
    for temperature in (50.0, 100.0):
        part = replace(PART, distillation=1.0, distillation_temperature=temperature)
        loss = exit_loss([student, teacher], labels, [1.0, 1.0], part)
        loss = loss - exit_loss([student, teacher], labels, [1.0, 1.0], PART)
        pulls.append(torch.autograd.grad(loss, student)[0])

    # Hinton et al. 2015, equation 4: in the limit (z - v) / classes for logits of mean zero.
    centred = [t - t.mean(1, keepdim=True) for t in (student.detach(), teacher)]
    limit = (centred[0] - centred[1]) / 10 / 64
    far, near = (float((pull - limit).norm() / limit.norm()) for pull in pulls)
    assert near < 0.02
    assert far / near == pytest.approx(2, rel=0.1)

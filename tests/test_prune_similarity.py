"""Linear CKA keeps its laws; exits are compared where their heads read the backbone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from edgeexit.errors import UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.graph import Graph, analyse  # noqa: E402
from edgeexit.host.prune.similarity import cka, exit_features, exits_cka  # noqa: E402
from edgeexit.host.surgery import remove_block, remove_units  # noqa: E402
from tests.host_nets import ConvNet  # noqa: E402

pytestmark = pytest.mark.host

SHAPE = (1, 1, 8, 8)
SEEDS = st.integers(0, 10_000)
SIZES = st.tuples(st.integers(2, 40), st.integers(1, 12), st.integers(1, 12))
LAWS = settings(max_examples=25, deadline=None)


def matrix(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape))


def orthogonal(seed: int, size: int) -> torch.Tensor:
    return torch.linalg.qr(matrix(seed + 1, size, size))[0]


# ---------------------------------------------------------------- the laws


@LAWS
@given(seed=SEEDS, sizes=SIZES)
def test_features_are_perfectly_similar_to_themselves(seed, sizes) -> None:
    x = matrix(seed, sizes[0], sizes[1])

    assert cka(x, x) == pytest.approx(1.0, abs=1e-9)


@LAWS
@given(seed=SEEDS, sizes=SIZES, scale=st.floats(1e-6, 1e6), shift=st.floats(-10, 10))
def test_rotation_scale_and_shift_change_nothing(seed, sizes, scale, shift) -> None:
    n, p, q = sizes
    x, y = matrix(seed, n, p), matrix(seed, n, q)
    moved = scale * (x @ orthogonal(seed, p)) + shift

    assert cka(x, moved) == pytest.approx(1.0, abs=1e-6)
    assert cka(moved, y) == pytest.approx(cka(x, y), abs=1e-6)


@LAWS
@given(seed=SEEDS, sizes=SIZES)
def test_it_is_symmetric_and_lies_between_0_and_1(seed, sizes) -> None:
    n, p, q = sizes
    x, y = matrix(seed, n, p), matrix(seed, n, q)

    assert 0.0 <= cka(x, y) <= 1.0
    assert cka(x, y) == pytest.approx(cka(y, x), abs=1e-9)


@LAWS
@given(seed=SEEDS, sizes=SIZES)
def test_the_order_of_samples_and_of_features_does_not_matter(seed, sizes) -> None:
    n, p, q = sizes
    x, y = matrix(seed, n, p), matrix(seed, n, q)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(n), rng.permutation(p)

    assert cka(x[rows][:, columns], y[rows]) == pytest.approx(cka(x, y), abs=1e-9)


def test_a_general_linear_map_does_change_it() -> None:
    x = matrix(0, 200, 6)
    stretched = x @ torch.diag(torch.tensor([100.0, 1, 1, 1, 1, 1]).double())

    assert torch.linalg.matrix_rank(stretched) == 6
    assert cka(x, stretched) < 0.6


def test_it_equals_its_definition_whichever_way_it_is_computed() -> None:
    for n, p, q in ((50, 4, 7), (5, 40, 30)):  # few features; more features than samples
        x, y = (part - part.mean(0) for part in (matrix(1, n, p), matrix(2, n, q)))
        norm = torch.linalg.matrix_norm
        expected = norm(x.T @ y) ** 2 / (norm(x.T @ x) * norm(y.T @ y))

        assert cka(x, y) == pytest.approx(float(expected), rel=1e-12)


def test_it_is_computed_in_float64_from_float32() -> None:
    x = 1e4 + matrix(3, 100, 5)

    assert cka(x.float(), 1e-3 * x.float()) == pytest.approx(1.0, abs=1e-6)


def test_dead_features_are_like_nothing_but_dead_features() -> None:
    x, dead = matrix(0, 20, 3), torch.full((20, 4), 0.1)

    assert cka(x, dead) == cka(dead, x) == 0.0
    assert cka(dead, torch.zeros(20, 2)) == 1.0


@pytest.mark.parametrize("shapes", [((4, 2), (5, 2)), ((1, 2), (1, 2)), ((4,), (4, 2))])
def test_matrices_that_cannot_be_compared_are_refused(shapes) -> None:
    with pytest.raises(UsageError, match="expected two matrices"):
        cka(*(matrix(0, *shape) for shape in shapes))


def test_features_of_a_diverged_network_are_refused() -> None:
    x = matrix(0, 4, 2)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(UsageError, match="not finite"):
            cka(x, torch.full((4, 2), bad))


# ---------------------------------------------------------------- at the exits


def resnet() -> torch.nn.Module:
    torch.manual_seed(0)
    net = zoo.resnet(
        channels=1,
        classes=3,
        size=[8, 8],
        stem=[8],
        widths=[8, 12],
        blocks=[3, 2],
        exits=[2],
        heads=[[4]],
    )
    return net.eval()


@pytest.fixture(scope="module")
def graph() -> Graph:
    return analyse(resnet(), SHAPE)


def batches(count: int = 40) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return [(part, torch.zeros(len(part))) for part in inputs.split(16)]


def test_features_are_what_the_heads_read_averaged_over_places(graph) -> None:
    model, (inputs, _) = resnet(), batches()[0]
    with torch.no_grad():
        first = model.stem(inputs)
        for block in model.blocks[:2]:
            first = block(first)
        last = first
        for block in model.blocks[2:]:
            last = block(last)

    features = exit_features(model, graph, inputs)

    assert list(features) == ["exit0", "exit1"]
    torch.testing.assert_close(features["exit0"], first.mean((2, 3)))
    torch.testing.assert_close(features["exit1"], last.mean((2, 3)))


def test_exits_of_any_shape_of_network_have_features() -> None:
    model = ConvNet().eval()

    features = exit_features(model, analyse(model, (1, 1, 12, 12)), torch.randn(3, 1, 12, 12))

    assert {name: tuple(one.shape) for name, one in features.items()} == {
        "small": (3, 8),
        "middle": (3, 12),
        "final": (3, 16),
    }


def test_a_copy_is_perfectly_similar_and_the_mode_is_left_as_it_was(graph) -> None:
    model = resnet().train()

    assert exits_cka(model, resnet(), graph, batches(), [0.5, 0.5]) == pytest.approx(1.0)
    assert all(module.training for module in model.modules())


def test_each_exit_counts_by_its_rate(graph) -> None:
    model, child = resnet(), resnet()
    remove_block(child, graph, "blocks.4")  # behind the first exit

    both, early, late = (
        exits_cka(model, child, graph, batches(), rates) for rates in ([1, 1], [1, 0], [0, 1])
    )

    assert early == pytest.approx(1.0)
    assert late < 1.0 - 1e-6
    assert both == pytest.approx((early + late) / 2)
    assert exits_cka(model, child, graph, batches(), [30, 10]) == pytest.approx(
        0.75 * early + 0.25 * late
    )


def test_a_thinner_child_can_be_compared(graph) -> None:
    model, little, much = resnet(), resnet(), resnet()
    stage = next(name for name, group in graph.groups.items() if "exit0" in group.exits)
    remove_units(little, graph, {stage: np.arange(1)})
    remove_units(much, graph, {stage: np.arange(6)})

    alike = [exits_cka(model, child, graph, batches(), [1, 1]) for child in (little, much)]

    assert 1.0 > alike[0] > alike[1] > 0.0


@pytest.mark.parametrize("rates", [[1.0], [0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_exit_rates_that_make_no_sense_are_refused(graph, rates) -> None:
    with pytest.raises(UsageError, match="exit rates"):
        exits_cka(resnet(), resnet(), graph, batches(), rates)

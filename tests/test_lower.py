"""Facts about lowering torch networks to one float .tflite."""

import numpy as np
import pytest

from edgeexit.errors import BadFile, ParityError, Unsupported

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit import tflite  # noqa: E402
from edgeexit.host import answers, lower, zoo  # noqa: E402
from edgeexit.host.ends import as_given  # noqa: E402
from edgeexit.host.model import attach  # noqa: E402
from edgeexit.host.torch_answers import torch_logits  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402
from tests import host_nets  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net():
    return host_nets.conv_net()


@pytest.fixture(scope="module")
def lowered(net):
    return lower.from_torch(net[0], (1, 1, 12, 12), host_nets.GRAY)


def test_every_exit_answers_as_in_torch_under_its_own_name(net, lowered) -> None:
    model, reals = net
    expected = torch_logits(model, reals)
    found = answers.tflite_logits(lowered.data, lowered.exits, reals)

    errors = answers.check_parity(expected, found, reals)

    assert list(lowered.exits) == ["small", "middle", "final"]
    assert max(errors.values()) < 1e-5


def test_a_network_trained_channels_last_is_lowered_as_it_answers() -> None:
    # Several weights of one shape: the converter must not take one for another.
    torch.manual_seed(0)
    reals = answers.RealSamples(host_nets.pictures(60), host_nets.GRAY)
    net = zoo.resnet(channels=1, classes=5, size=[12, 12], stem=[8], widths=[8], blocks=[3])
    model = host_nets.settled(net, reals).to(memory_format=torch.channels_last)
    strides = [weight.stride() for weight in model.parameters()]

    found = lower.from_torch(model, (1, 1, 12, 12), host_nets.GRAY)

    expected = torch_logits(model, reals)
    answers.check_parity(expected, answers.tflite_logits(found.data, found.exits, reals), reals)
    assert [weight.stride() for weight in model.parameters()] == strides


def test_a_plain_backbone_with_attached_exits_is_lowered_as_it_answers() -> None:
    torch.manual_seed(0)
    backbone = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2, 1), torch.nn.ReLU()),
        torch.nn.Sequential(torch.nn.Conv2d(8, 16, 3, 2, 1), torch.nn.ReLU()),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
    )
    reals = answers.RealSamples(host_nets.pictures(100), host_nets.GRAY)
    model = host_nets.settled(attach(backbone, ["0", "1"], input_shape=(1, 1, 12, 12)), reals)

    found = lower.from_torch(model, (1, 1, 12, 12), host_nets.GRAY)
    expected = torch_logits(model, reals)
    errors = answers.check_parity(
        expected, answers.tflite_logits(found.data, found.exits, reals), reals
    )

    assert len(found.exits) == 3
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize(
    ("is_positive", "pool"),
    [
        (True, {"stride": 2}),
        (False, {"stride": 2}),
        (False, {"stride": 3, "ceil_mode": True, "padding": (0, 1)}),
    ],
)
def test_padded_maximum_pooling_is_lowered_without_infinities(is_positive: bool, pool) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 8, 3, 1, 1),
        torch.nn.ReLU() if is_positive else torch.nn.Identity(),
        torch.nn.MaxPool2d(3, **{"padding": 1, **pool}),
        torch.nn.Flatten(),
        torch.nn.LazyLinear(5),
    )
    if not is_positive:
        model[0].bias.data -= 3  # all below zero: a padded zero would win everywhere
    reals = answers.RealSamples(host_nets.pictures(60), host_nets.GRAY)
    model = host_nets.settled(model, reals)

    found = lower.from_torch(model, (1, 1, 12, 12), host_nets.GRAY)

    expected = torch_logits(model, reals)
    answers.check_parity(expected, answers.tflite_logits(found.data, found.exits, reals), reals)
    tensors = tflite.read_model(found.data).tensors
    kept = [t.constant for t in tensors if t.constant is not None and t.dtype == "float32"]
    assert len(kept) >= 4
    assert all(np.isfinite(data.view(np.float32)).all() for data in kept)


def test_maps_stay_channels_last_and_pooling_costs_no_transposition(lowered) -> None:
    model = tflite.read_model(lowered.data)

    assert model.tensors[model.inputs[0]].shape == (1, 12, 12, 1)
    assert not {op.kind for op in model.operators} & {"TRANSPOSE", "RESHAPE"}


class Ears(torch.nn.Module):
    """Convolutions along one axis, one of them for each channel apart, with two exits."""

    exit_names = ("early", "final")

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.stem = nn.Sequential(nn.Conv1d(6, 12, 5, 2, 2), nn.BatchNorm1d(12), nn.ReLU())
        apart = nn.Conv1d(12, 12, 3, 1, 1, groups=12, bias=False)
        mixed = nn.Conv1d(12, 16, 1, bias=False)
        self.rest = nn.Sequential(
            *(apart, nn.BatchNorm1d(12), nn.ReLU6()), *(mixed, nn.BatchNorm1d(16), nn.ReLU())
        )
        self.heads = nn.ModuleList([nn.Linear(12, 4), nn.Linear(16, 4)])

    def forward(self, x):
        early = self.stem(x)
        maps = (early, self.rest(early))
        return [head(m.mean(-1)) for head, m in zip(self.heads, maps, strict=True)]


class Words(torch.nn.Module):
    """Norms over the last axis and over two, with and without weights of their own."""

    def __init__(self) -> None:
        super().__init__()
        nn = torch.nn
        self.norms = nn.ModuleList(
            [
                nn.LayerNorm(16),
                nn.LayerNorm(16, elementwise_affine=False),
                nn.LayerNorm((6, 16), eps=1e-3),
                nn.LayerNorm(16, bias=False),
            ]
        )
        self.own = nn.ParameterList([torch.ones(16), torch.zeros(16)])
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        for norm in self.norms:
            x = x + torch.nn.functional.gelu(norm(x))
        # Called so, the traced operator has three and four arguments, and no eps among them.
        x = x + torch.layer_norm(x, (16,), self.own[0])
        x = x + torch.layer_norm(x, (16,), *self.own)
        return self.head(x.mean(1))


def answered_alike(model, reals, shape: tuple[int, ...]) -> list[str]:
    """The operators of the lowered *model*, which answers as it does in torch."""
    torch.manual_seed(1)
    for weight in model.parameters():  # norms start with ones and zeros, which vanish
        weight.data += 0.2 * torch.randn_like(weight)
    model = host_nets.settled(model, reals)

    found = lower.from_torch(model, shape, reals.preprocess)

    expected = torch_logits(model, reals)
    answers.check_parity(expected, answers.tflite_logits(found.data, found.exits, reals), reals)
    return [operator.kind for operator in tflite.read_model(found.data).operators]


def series(*shape: int) -> answers.RealSamples:
    values = np.random.default_rng(0).normal(size=(60, *shape)).astype(np.float32)
    return answers.RealSamples(values, Preprocess(kind="array", layout="as-is"))


def test_convolutions_along_one_axis_take_in_their_norms_and_stay_channels_last() -> None:
    kinds = answered_alike(Ears(), series(6, 32), (1, 6, 32))

    assert not {"MUL", "ADD", "RELU", "RELU6"} & set(kinds)
    assert kinds.count("TRANSPOSE") == 1  # the input's own
    assert kinds.count("RESHAPE") == 1


def test_layer_norms_are_plain_arithmetic() -> None:
    kinds = answered_alike(Words(), series(6, 16), (1, 6, 16))

    assert kinds.count("MEAN") == 6 * 2 + 1
    assert "SQUARED_DIFFERENCE" not in kinds


def test_names_are_short_unique_and_free_of_class_paths(lowered) -> None:
    names = [tensor.name for tensor in tflite.read_model(lowered.data).tensors]

    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 8
    assert {"input", "small", "middle", "final"} <= set(names)
    assert b"torch" not in lowered.data


def test_lowering_says_nothing_and_leaves_the_streams_alone(capfd) -> None:
    lower.from_torch(host_nets.Rows(), (1, 8), host_nets.ROW)
    print("still here")  # noqa: T201

    assert capfd.readouterr().out == "still here\n"


def test_an_exit_may_be_called_like_an_inner_tensor() -> None:
    class Named(host_nets.Rows):
        def forward(self, x):
            return dict(zip(("t0", "input"), super().forward(x), strict=True))

    lowered = lower.from_torch(Named(), (1, 8), host_nets.ROW)

    assert lowered.exits == {"t0": "t0", "input": "input"}


def test_operators_that_reach_no_exit_are_dropped() -> None:
    class Wasteful(host_nets.Rows):
        def forward(self, x):
            torch.tanh(self.body(x)).sum()
            return super().forward(x)

    kinds = [
        [op.kind for op in tflite.read_model(lowered.data).operators]
        for lowered in (
            lower.from_torch(net, (1, 8), host_nets.ROW)
            for net in (host_nets.Rows(torch.tanh), Wasteful(torch.tanh))
        )
    ]

    assert kinds[0] == kinds[1]


@pytest.mark.parametrize(
    ("between", "word"),
    [
        (torch.lgamma, "aten.lgamma"),
        (lambda x: torch.fft.fft(x).real, "complex"),
        (lambda x: torch.sort(x)[0], "SORT"),
        (lambda x: x if x.sum() > 0 else -x, "traced"),
        (lambda x: x + torch.rand_like(x), "rand_like"),
    ],
    ids=["no lowering", "complex", "no kernel", "branch", "random"],
)
def test_an_operator_that_tflite_lacks_is_refused_by_name(between, word: str) -> None:
    with pytest.raises(Unsupported, match=word):
        lower.from_torch(host_nets.Rows(between), (1, 8), host_nets.ROW)


def test_exits_with_different_numbers_of_classes_are_refused() -> None:
    with pytest.raises(Unsupported, match="exits"):
        lower.from_torch(host_nets.Rows(classes=(3, 4)), (1, 8), host_nets.ROW)


def test_a_network_with_two_inputs_is_refused() -> None:
    class Two(host_nets.Rows):
        def forward(self, x, y):
            return super().forward(x + y)

    with pytest.raises(Unsupported, match=r"2 inputs \(x, y\)"):
        lower.from_torch(Two(), (1, 8), host_nets.ROW)


@pytest.mark.parametrize(
    "reshape", [lambda x: x[:, None], lambda x: x[:, :0], lambda x: x.double()]
)
def test_outputs_that_are_no_logits_are_refused(reshape) -> None:
    class Odd(host_nets.Rows):
        def forward(self, x):
            return [reshape(logits) for logits in super().forward(x)]

    with pytest.raises(Unsupported, match=r"exit '?exit0"):
        lower.from_torch(Odd(), (1, 8), host_nets.ROW)


def test_a_wrong_input_shape_is_named() -> None:
    with pytest.raises(BadFile, match=r"input of shape \[1, 9\]"):
        lower.from_torch(host_nets.Rows(), (1, 9), host_nets.ROW)


def test_two_exits_that_are_one_tensor_are_refused() -> None:
    class Same(host_nets.Rows):
        def forward(self, x):
            first = super().forward(x)[0]
            return [first, first]

    with pytest.raises(Unsupported):
        lower.from_torch(Same(), (1, 8), host_nets.ROW)


LOGITS = {"a": np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)}


def test_a_difference_over_the_tolerance_is_a_parity_error() -> None:
    peak = np.abs(LOGITS["a"]).max()
    reals = host_nets.rows(60)
    below = {"a": LOGITS["a"] + np.float32(0.5e-4) * peak}
    above = {"a": LOGITS["a"] + np.float32(2e-4) * peak}

    assert answers.check_parity(LOGITS, below, reals)["a"] == pytest.approx(0.5e-4, rel=0.01)
    with pytest.raises(ParityError, match="exit 'a'"):
        answers.check_parity(LOGITS, above, reals)
    with pytest.raises(ParityError, match="exit 'a'"):
        answers.check_parity(LOGITS, {"a": LOGITS["a"] * np.float32("nan")}, reals)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_answers_that_hardly_differ_prove_nothing(noise: float) -> None:
    constant = {"a": (1 + noise * LOGITS["a"]).astype(np.float32)}

    with pytest.raises(ParityError, match="1 distinct answers"):
        answers.check_parity(constant, constant, host_nets.rows(60))


def test_a_few_samples_need_only_as_many_distinct_answers() -> None:
    few = {"a": LOGITS["a"][:7]}

    assert answers.check_parity(few, few, host_nets.rows(7)) == {"a": 0.0}


def test_torch_answers_that_are_not_finite_are_refused() -> None:
    model = host_nets.Rows()
    model.heads[1].weight.data[0, 0] = float("inf")

    with pytest.raises(BadFile, match="exit 'exit1'"):
        torch_logits(model, host_nets.rows(4))


@pytest.mark.parametrize("period", [2, 5, 10])
def test_every_beginning_of_a_spread_order_sees_all_classes(period: int) -> None:
    labels = np.arange(500) % period
    first = labels[answers.spread(500)[:100]]

    assert sorted(answers.spread(500)) == list(range(500))
    assert np.bincount(first).min() >= 0.8 * 100 / period


ENDS = {
    "one logit": lambda z: z,
    "one logit, flat": lambda z: z[:, 0],
    "one sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("case", ENDS)
def test_one_logit_an_exit_comes_out_as_two_classes(case: str) -> None:
    net, reals = host_nets.conv_net(classes=1, count=60)

    class Ended(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x):
            return {name: ENDS[case](logits) for name, logits in self.net(x).items()}

    found = lower.from_torch(Ended(), (1, 1, 12, 12), host_nets.GRAY)

    assert set(found.endings.values()) == {"one probability" if "sigm" in case else "one logit"}
    logits = answers.tflite_logits(found.data, found.exits, reals)
    for name, z in torch_logits(net, reals).items():
        assert (logits[name][:, 0] == 0).all()
        assert np.allclose(logits[name][:, 1:], z, atol=1e-5)
    given = as_given(logits, found.endings)
    answers.check_parity(torch_logits(Ended(), reals), given, reals)

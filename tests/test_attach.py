"""Exits for plain networks: the right places, the right share, and the whole road to a policy."""

import json
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.calibration import make_set  # noqa: E402
from edgeexit.cli import entry  # noqa: E402
from edgeexit.errors import BadFile, Unsupported, UsageError  # noqa: E402
from edgeexit.host import attach as attach_module  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.attach import Tap, attach_exits, choose_taps, list_taps, tap_points  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.surgery import remove_block, remove_units  # noqa: E402
from edgeexit.preprocess import Preprocess, real_values  # noqa: E402

pytestmark = pytest.mark.host

# What a user has: plain networks in the manner of torchvision, and their weights.
USER_CODE = '''
import torch
from torch import nn


class Basic(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet18(nn.Module):
    def __init__(self, widths=(8, 16, 24, 32), classes=4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = widths[0]
        for number, outputs in enumerate(widths, start=1):
            stage = nn.Sequential(
                Basic(inputs, outputs, 1 if number == 1 else 2), Basic(outputs, outputs, 1)
            )
            setattr(self, f"layer{number}", stage)
            inputs = outputs
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Inverted(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        inner = inputs * expansion
        self.shortcut = stride == 1 and inputs == outputs
        layers = []
        if expansion != 1:
            layers += [nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6()]
        layers += [
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        self.conv = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.conv(x) if self.shortcut else self.conv(x)


def unit(inputs, outputs, kernel):
    conv = nn.Conv2d(inputs, outputs, kernel, 1, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


class MobileNetV2(nn.Module):
    def __init__(self, classes=4):
        super().__init__()
        layers = [unit(3, 8, 3)]
        inputs = 8
        for expansion, outputs, count, stride in [
            (1, 8, 1, 1), (4, 12, 2, 2), (4, 16, 2, 2), (4, 24, 1, 1)
        ]:
            for k in range(count):
                layers.append(Inverted(inputs, outputs, stride if k == 0 else 1, expansion))
                inputs = outputs
        layers.append(unit(24, 48, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(48, classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean([2, 3]))


class Dense(nn.Module):
    """Every layer sees all before it: only the transition is on the main path."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, 1, 1)
        self.second = nn.Conv2d(4, 4, 3, 1, 1)
        self.third = nn.Conv2d(8, 4, 3, 1, 1)
        self.transition = nn.Conv2d(12, 6, 1)
        self.last = nn.Conv2d(6, 6, 3, 2, 1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x):
        a = torch.relu(self.first(x))
        b = torch.relu(self.second(a))
        c = torch.relu(self.third(torch.cat([a, b], 1)))
        x = torch.relu(self.transition(torch.cat([a, b, c], 1)))
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


class Tuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ResNet18()
        self.both = Both()

    def forward(self, x):
        return self.net(self.both(x)[0])


class Both(nn.Module):
    def forward(self, x):
        return x, x
'''
COLOUR = Preprocess(
    kind="image",
    size=(12, 12),
    color="rgb",
    scale=1 / 255,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    layout="nchw",
)
SHAPE = (1, 3, 12, 12)
CLASSES = ["0", "1", "2", "3"]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def user_net() -> Any:
    namespace: dict[str, Any] = {}
    exec(compile(USER_CODE, "user_net.py", "exec"), namespace)
    return namespace


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise with a bright quarter that tells the class, clearly or faintly."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    samples = rng.integers(0, 120, (count, 12, 12, 3))
    for k, label in enumerate(labels):
        row, column = divmod(int(label), 2)
        quarter = (slice(6 * row, 6 * row + 6), slice(6 * column, 6 * column + 6))
        samples[k][quarter] += rng.integers(15, 120)
    return samples.astype(np.uint8), labels


def saved(path: Path, model: Any, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "arch": "edgeexit.host.zoo:resnet",
        "input_shape": SHAPE,
        "class_names": CLASSES,
        "preprocess": COLOUR,
    }
    save_checkpoint(path, model=model, **(values | changes))
    return path


PLAIN = {
    "classes": 4,
    "size": [12, 12],
    "stem": [4],
    "widths": [4, 8],
    "blocks": [2, 2],
    "exits": [],
}


def plain(path: Path, **changes: Any) -> Path:
    kwargs = PLAIN | changes
    return saved(path, zoo.resnet(**kwargs), kwargs=kwargs)


# ---------------------------------------------------------------- where exits can go


def names(taps: list[Tap]) -> list[str]:
    return [tap.name for tap in taps]


def test_taps_of_a_resnet_are_its_pooled_stem_and_its_blocks(user_net: Any) -> None:
    taps = tap_points(user_net["ResNet18"](), SHAPE)

    blocks = ["layer1.0", "layer1", "layer2.0", "layer2", "layer3.0", "layer3", "layer4.0"]
    assert names(taps) == ["maxpool", *blocks]
    assert taps[0].shape == (1, 8, 6, 6)
    assert taps[3].shape == (1, 16, 3, 3)


def test_taps_of_a_mobilenet_lie_behind_every_block(user_net: Any) -> None:
    taps = tap_points(user_net["MobileNetV2"](), SHAPE)

    assert {f"features.{k}" for k in range(7)} <= set(names(taps))
    assert "features.7" not in names(taps)  # only the last layer is behind it
    # Inside of a block with a shortcut there are two paths.
    assert not [name for name in names(taps) if name.startswith(("features.3.", "features.5."))]


def test_a_tap_hands_over_one_tensor(user_net: Any) -> None:
    assert names(tap_points(user_net["Dense"](), SHAPE)) == ["first", "transition"]


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


# ---------------------------------------------------------------- the file


@pytest.mark.parametrize("head", ["average", "pooled", "convs"])
def test_the_network_stays_what_it_was(here: Path, head: str) -> None:
    before = load_checkpoint(plain(here / "net.pt"))

    found = attach_exits("net.pt", at=["blocks.1", "stem"], head=head, is_measured=False)

    after = load_checkpoint(found.path)
    image = torch.randn(2, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(after.model(image)[-1], before.model(image)[0])
    assert found.path == Path("net-exits.pt")
    assert after.attached is not None
    assert after.attached["at"] == ["stem", "blocks.1"]  # earliest first
    assert after.exits == ("exit0", "exit1", "exit2")
    assert [row.at for row in found.rows] == ["stem", "blocks.1", None]
    assert after.class_names == before.class_names
    assert after.preprocess == before.preprocess


def test_equal_arguments_give_equal_bytes(here: Path) -> None:
    plain(here / "net.pt")
    torch.manual_seed(1)
    one = attach_exits("net.pt", "one.pt", is_measured=False).path.read_bytes()
    torch.manual_seed(2)
    drawn = torch.random.get_rng_state()

    other = attach_exits("net.pt", "other.pt", is_measured=False).path.read_bytes()

    assert one == other
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_what_was_said_of_the_plain_network_is_not_said_of_this_one(here: Path) -> None:
    metadata = {"recipe_digest": "x", "holdout_accuracies": {"exit0": 1.0}, "seed": 3, "holdout": 5}
    net = saved(here / "net.pt", zoo.resnet(**PLAIN), kwargs=PLAIN, metadata=metadata)

    after = load_checkpoint(attach_exits(net, is_measured=False).path)

    digest = load_checkpoint(net).digest
    assert after.metadata == {"seed": 3, "holdout": 5, "attached_to": digest}


def test_a_thinned_plain_network_takes_exits(here: Path) -> None:
    model = zoo.resnet(**PLAIN).eval()
    entries = [remove_block(model, analyse(model, SHAPE), "blocks.1")]
    graph = analyse(model, SHAPE)
    entries.append(remove_units(model, graph, {next(iter(graph.groups)): np.array([0, 2])}))
    saved(here / "net.pt", model, kwargs=PLAIN, surgery=entries)

    found = attach_exits("net.pt", at=["stem", "blocks.2"], is_measured=False)

    after = load_checkpoint(found.path)
    image = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(after.model(image)[-1], model(image)[0])
    assert after.surgery == ()
    document = torch.load(found.path, weights_only=True)
    del document["probe"]
    torch.save(document, "without.pt")
    with pytest.raises(BadFile, match="probe"):
        load_checkpoint("without.pt")


# ---------------------------------------------------------------- refusals


def test_refusals_name_what_is_wrong(here: Path, user_net: Any) -> None:
    plain(here / "net.pt")
    plain(here / "exits.pt", exits=[1])
    foreign = {"arch": "user_net:Tuples", "kwargs": {}}
    (here / "user_net.py").write_text(USER_CODE)
    saved(here / "foreign.pt", user_net["Tuples"](), **foreign)
    torch.save(zoo.resnet(**PLAIN).state_dict(), "bare.pth")
    one_layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(432, 4))
    (here / "flat_net.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(432, 4))\n"
    )
    saved(here / "flat.pt", one_layer, arch="flat_net:make", kwargs={})

    def refused(kind: type[Exception], words: str, model: str = "net.pt", **given: Any) -> str:
        with pytest.raises(kind, match=words) as refusal:
            attach_exits(model, **{"is_measured": False, **given})
        return str(refusal.value.hint)

    assert "did you mean 'blocks.1'" in refused(UsageError, "no module named", at=["block.1"])
    refused(UsageError, "different names", at=["stem", "stem"])
    refused(UsageError, "no layer lies between", at=["stem", "stem.0"])
    refused(UsageError, "both", at=["stem"], exits=1)
    refused(UsageError, "4 places", exits=5)
    refused(UsageError, "0 places", "flat.pt", arch="flat_net:make")
    refused(UsageError, "kind of exit head", head="nonsense")
    refused(UsageError, "2 exits already", "exits.pt")
    refused(UsageError, "no such file", "absent.pt")
    tuples = {"arch": "user_net:Tuples"}
    refused(Unsupported, "gives tuple", "foreign.pt", at=["both"], **tuples)
    assert "--arch user_net:Tuples" in refused(BadFile, "names code outside", "foreign.pt")
    assert "--calibration" in refused(UsageError, "which network", "bare.pth")
    refused(UsageError, "which classes", "bare.pth", arch="flat_net:make")
    refused(UsageError, "calibration set", "bare.pth", arch="flat_net:make", calibration="absent")
    attach_exits("net.pt", is_measured=False)
    assert "--again" in refused(UsageError, "is there already")
    attach_exits("net.pt", is_measured=False, again=True)
    with pytest.raises(Unsupported, match="no exit makes sense"):
        list_taps("flat.pt", arch="flat_net:make", is_measured=False)
    assert not list(here.glob("flat-exits*"))


def test_a_network_with_exits_is_only_listed(here: Path) -> None:
    plain(here / "exits.pt", exits=[1])

    rows = list_taps("exits.pt", is_measured=False)

    assert [row.at for row in rows] == ["stem", "blocks.0", "blocks.1", "blocks.2", None]


# ---------------------------------------------------------------- the command


def test_the_list_is_measured_in_at_most_twelve_places(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain(here / "net.pt", blocks=[8, 8])
    seen: list[int] = []

    def int8_bundle(model: Any, **given: Any) -> Any:
        assert len(given["reals"]) >= 16
        return SimpleNamespace(exits=exit_outputs(model, torch.zeros(given["input_shape"])))

    def measured(bundle: Any, on_step: Callable[[float], object]) -> dict[str, Any]:
        on_step(1.0)
        seen.append(len(bundle.exits))
        return {name: (k + 1.0, k + 0.5, k + 1.5) for k, name in enumerate(bundle.exits)}

    monkeypatch.setattr(attach_module, "int8_bundle", int8_bundle)
    monkeypatch.setattr(attach_module, "measured", measured)

    assert entry(["attach", "net.pt", "--list", "--json"]) == 0

    taps = json.loads(capsys.readouterr().out)["taps"]
    times = [tap["latency_ms"] for tap in taps if tap["latency_ms"]]
    assert seen == [13]
    assert len(taps) == 17
    assert len(times) == 13
    assert times == sorted(times)
    assert taps[-1]["latency_ms"][0] == 13.0


def test_the_table_shows_shares_and_the_next_command(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain(here / "net.pt")

    assert entry(["attach", "net.pt", "--no-measure", "--exits", "2"]) == 0

    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if line.startswith("exit")]
    assert [row[1] for row in rows] == ["at", "blocks.0", "blocks.2", "(the"]
    assert rows[-1][-1] == "100.0%"
    assert "ms" not in shown.split()
    assert "edgeexit train net-exits.pt --regime frozen --data" in shown


@pytest.mark.parametrize("option", [["--at", "stem"], ["--exits", "2"], ["-o", "x.pt"]])
def test_listing_attaches_nothing(
    here: Path, option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    plain(here / "net.pt")

    assert entry(["attach", "net.pt", "--list", "--no-measure", *option]) == 2
    assert "--list only shows" in capsys.readouterr().err


def learnt(model: Any, samples: np.ndarray, labels: np.ndarray) -> Any:
    """*model* after a few steps: what a user comes with."""
    inputs = torch.from_numpy(real_values(samples, COLOUR)).permute(0, 3, 1, 2)
    wanted = torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = slice(100 * (step % 6), 100 * (step % 6) + 100)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs[batch]), wanted[batch]).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    ("name", "is_bare"),
    [("ResNet18", True), pytest.param("MobileNetV2", False, marks=pytest.mark.slow)],
)
def test_five_commands_lead_from_a_plain_network_to_a_tuned_bundle(
    here: Path,
    user_net: Any,
    capsys: pytest.CaptureFixture[str],
    name: str,
    is_bare: bool,
) -> None:
    (here / "user_net.py").write_text(USER_CODE)
    samples, labels = pictures(600, seed=0)
    np.savez(here / "training.npz", samples=samples, labels=labels)
    others, their_labels = pictures(800, seed=1)
    np.savez(here / "others.npz", samples=others, labels=their_labels)
    make_set(here / "others.npz", here / "quarters", preprocess=COLOUR)
    torch.manual_seed(0)
    model = learnt(user_net[name](), samples, labels)
    arch = ["--arch", f"user_net:{name}"]
    if is_bare:
        torch.save(model.state_dict(), here / "net.pt")
        extra = ["--calibration", "quarters", "--no-measure"]
    else:
        saved(here / "net.pt", model, arch=arch[1], kwargs={}, calibration_set="quarters")
        extra = ["--head", "pooled"]

    for command in (
        ["attach", "net.pt", *arch, *extra, "--exits", "2"],
        ["train", "net-exits.pt", *arch, "--regime", "frozen", "--data", "training.npz"],
        ["convert", "net-exits-trained.pt", *arch],
        ["profile", "--device", "host", "--time-cap", "2"],
        ["tune", "--max-accuracy-drop", "0.1"],
    ):
        assert entry(command) == 0, capsys.readouterr().err

    policy = json.loads((here / "net-exits-trained.edgeexit/policies/host.json").read_text())
    assert policy["kept"]
    trained = load_checkpoint("net-exits-trained.pt", arch=arch[1])
    image = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(trained.model(image)[-1], model(image))
    accuracies = trained.metadata["holdout_accuracies"]
    assert min(accuracies.values()) > 0.5  # of four classes

"""`edgeexit attach`: the network stays what it was, and the road leads on to a policy."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.calibration import make_set  # noqa: E402
from edgeexit.cli import entry  # noqa: E402
from edgeexit.errors import BadFile, Disturbed, Unsupported, UsageError  # noqa: E402
from edgeexit.host import attach as attach_module  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.attach import attach_exits, list_taps  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.model import exit_outputs  # noqa: E402
from edgeexit.host.surgery import remove_block, remove_units  # noqa: E402
from edgeexit.preprocess import Preprocess, real_values  # noqa: E402
from tests import user_net  # noqa: E402

pytestmark = pytest.mark.host

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


def test_heads_are_as_wide_as_one_says(here: Path) -> None:
    plain(here / "net.pt")
    given: dict[str, Any] = {"at": ["stem", "blocks.1"], "head": "convs", "is_measured": False}

    each = attach_exits("net.pt", "each.pt", widths=[[6, 10], [12]], **given)
    one = attach_exits("net.pt", "one.pt", widths=[[6]], **given)
    given["at"] = given["at"][::-1]
    turned = attach_exits("net.pt", "turned.pt", widths=[[12], [6, 10]], **given)

    for found, wanted in (
        (each, [[6, 10], [12]]),
        (one, [[6], [6]]),
        (turned, [[6, 10], [12]]),  # each list belongs to the exit that was named with it
    ):
        again = load_checkpoint(found.path)
        assert again.attached is not None
        assert again.attached["widths"] == wanted
        made = [
            [layer.out_channels for layer in head.modules() if isinstance(layer, torch.nn.Conv2d)]
            for head in again.model.heads
        ]
        assert made == wanted


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--head", "convs", "--widths", "6,0"], "widths: found 6, 0, expected at most 8 numbers"),
        (["--head", "convs", "--widths", "4097"], "numbers from 1 to 4096"),
        (["--head", "convs", "--widths", "1,1,1,1,1,1,1,1,1"], "expected at most 8 numbers"),
        (["--head", "convs", "--widths", ",".join(["4096"] * 8)], "weights, expected at most"),
        (["--head", "convs", "--widths", "6,x"], "--widths 6,x: expected whole numbers"),
        (["--head", "convs", *["--widths", "6"] * 3], "widths: found 3 lists, expected 2"),
        (["--widths", "6"], "widths: a head of the kind 'average' has none"),
        (["--list", "--widths", "6"], "--list only shows places"),
        (["--list", "--head", "nonsense"], "--list only shows places"),
    ],
)
def test_widths_that_do_not_fit_are_one_line(
    here: Path, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plain(here / "net.pt")
    places = [] if "--list" in args else ["--at", "stem,blocks.1"]
    assert entry(["attach", "net.pt", "--no-measure", *places, *args]) == 2
    assert said in capsys.readouterr().err
    assert not (here / "net-exits.pt").exists()


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


def test_refusals_name_what_is_wrong(here: Path) -> None:
    plain(here / "net.pt")
    plain(here / "exits.pt", exits=[1])
    foreign = {"arch": "user_net:Tuples", "kwargs": {}}
    shutil.copy(user_net.__file__, here / "user_net.py")
    saved(here / "foreign.pt", user_net.Tuples(), **foreign)
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
    refused(UsageError, "expected less", at=["blocks.3"])
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
    capsys: pytest.CaptureFixture[str],
    name: str,
    is_bare: bool,
) -> None:
    shutil.copy(user_net.__file__, here / "user_net.py")
    samples, labels = pictures(600, seed=0)
    np.savez(here / "training.npz", samples=samples, labels=labels)
    others, their_labels = pictures(800, seed=1)
    np.savez(here / "others.npz", samples=others, labels=their_labels)
    make_set(here / "others.npz", here / "quarters", preprocess=COLOUR)
    torch.manual_seed(0)
    model = learnt(getattr(user_net, name)(), samples, labels)
    arch = ["--arch", f"user_net:{name}"]
    if is_bare:
        torch.save(model.state_dict(), here / "net.pt")
        extra = ["--calibration", "quarters"]
    else:
        saved(here / "net.pt", model, arch=arch[1], kwargs={}, calibration_set="quarters")
        extra = ["--head", "pooled"]

    # Measuring before and after takes most of a minute; the slow one does it.
    quick = ["--no-measure"] if is_bare else []
    for command in (
        ["attach", "net.pt", *arch, *extra, *quick, "--exits", "2"],
        ["train", "net-exits.pt", *arch, "--regime", "frozen", "--data", "training.npz", *quick],
        ["convert", "net-exits-trained.pt", *arch],
        ["profile", "--device", "host", "--time-cap", "2"],
        ["tune", "--max-accuracy-drop", "0.1", "--accept-disturbed"],
    ):
        # So short a profile on a machine that also tests is hardly ever clean.
        fine = (0, Disturbed.exit_code) if command[0] == "profile" else (0,)
        assert entry(command) in fine, capsys.readouterr().err

    policy = json.loads((here / "net-exits-trained.edgeexit/policies/host.json").read_text())
    assert policy["kept"]
    trained = load_checkpoint("net-exits-trained.pt", arch=arch[1])
    image = torch.randn(3, 3, 12, 12)
    with torch.no_grad():
        assert torch.equal(trained.model(image)[-1], model(image))
    accuracies = trained.metadata["holdout_accuracies"]
    assert min(accuracies.values()) > 0.5  # of four classes

"""Altered, hostile and misplaced files of the pruning commands: one line, a code, nothing lost."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import nn  # noqa: E402

from edgeexit.cli import entry  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.checkpoint import save_checkpoint  # noqa: E402
from edgeexit.host.prune.engine import Progress, prune  # noqa: E402
from edgeexit.host.prune.recipe import read_prune_recipe  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402

pytestmark = pytest.mark.host

KWARGS: dict[str, Any] = {
    "channels": 1,
    "classes": 4,
    "size": [8, 8],
    "stem": [8],
    "widths": [8],
    "blocks": [2],
    "exits": [0],
}
PREPROCESS = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.3,), layout="nchw"
)
RECIPE = """
format = 1
[data]
path = "{}"
[prune]
criterion = "l1"
round_to = 2
steps = 1
target = {{ macs = 0.8 }}
[finetune]
epochs = 2
batch = 32
learning_rate = 0.01
"""


class Stop(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, its pictures, a recipe, the network pruned by it, and a state on the way."""
    where = tmp_path_factory.mktemp("bad")
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (80, 8, 8, 1), dtype=np.uint8)
    np.savez(where / "data.npz", samples=samples, labels=np.arange(80) % 4)
    (where / "recipe.toml").write_text(RECIPE.format(where / "data.npz"))
    torch.manual_seed(0)
    save_checkpoint(
        where / "net.pt",
        model=zoo.resnet(**KWARGS),
        arch="edgeexit.host.zoo:resnet",
        kwargs=KWARGS,
        input_shape=[1, 1, 8, 8],
        class_names=list("abcd"),
        preprocess=PREPROCESS,
    )

    def stop(progress: Progress) -> None:
        if progress.fit is not None and progress.fit.epoch == 2:
            raise Stop

    recipe = read_prune_recipe(where / "recipe.toml")
    with pytest.raises(Stop):
        prune(where / "net.pt", recipe, where / "parts.pt", on_step=stop)
    prune(where / "net.pt", recipe, where / "small.pt")
    return where


def told(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """What the refused command says: one line, perhaps a hint, never a traceback."""
    assert entry([str(argument) for argument in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "bug in edgeexit" not in captured.err
    assert sum(line.startswith("Error: ") for line in captured.err.splitlines()) == 1
    return captured.err


def altered(source: Path, target: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    document = torch.load(source, weights_only=True)
    change(document)
    torch.save(document, target)
    return target


def probe(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda d: d["probe"].__setitem__(key, value(d["probe"][key]))


def put(key: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda d: d.__setitem__(key, value)


CHECKPOINTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "no probe": put("probe", None),
    "a scalar": probe("inputs", lambda x: torch.tensor(1.0)),
    "complex": probe("inputs", lambda x: x.to(torch.complex64)),
    "integers": probe("inputs", lambda x: x.long()),
    "NaN": probe("inputs", lambda x: x * float("nan")),
    "giant": probe("inputs", lambda x: torch.zeros(1).expand(2, 1, 30000, 30000)),
    "sparse": probe("inputs", lambda x: x.float().to_sparse()),
    "no logits": probe("logits", lambda x: 3),
    "logits of text": probe("logits", lambda x: dict.fromkeys(x, "x")),
    "NaN behind numbers": probe("logits", lambda x: {**x, "exit1": x["exit1"] * float("nan")}),
    "one logit": probe("logits", lambda x: {k: v[:1, :1] for k, v in x.items()}),
    "surgery 0": put("surgery", 0),
    "surgery of text": put("surgery", "remove"),
    "a tensor in the metadata": put("metadata", {"x": torch.zeros(1)}),
    "an endless name": put("surgery", [{"remove": "x" * 100_000}]),
    "a head": lambda d: (
        d["surgery"].append({"remove": "heads.0"}),
        [d["state_dict"].pop(k) for k in list(d["state_dict"]) if k.startswith("heads.0.")],
    ),
}


@pytest.mark.parametrize("what", CHECKPOINTS)
def test_an_altered_pruned_network_is_a_bad_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    forged = altered(folder / "small.pt", tmp_path / "forged.pt", CHECKPOINTS[what])

    said = told(capsys, 3, "attach", forged, "--list", "--no-measure")

    assert "forged.pt: " in said
    assert len(said) < 3000


def test_no_surgery_may_be_written_as_none(folder: Path, tmp_path: Path) -> None:
    plain = altered(folder / "net.pt", tmp_path / "plain.pt", put("surgery", None))

    assert entry(["attach", str(plain), "--list", "--no-measure"]) == 0


def bomb(data: bytes) -> bytes:
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as old,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for one in old.infolist():
            new.writestr(one.filename, old.read(one))
        new.writestr("archive/data/999", b"\0" * (8 << 20))
    return packed.getvalue()


STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": put("edgeexit_pruning", 99),
    "a stage below 0": put("stage", -1),
    "an infinite stage": put("stage", float("inf")),
    "a step too far": put("step", 99),
    "an unknown training": put("pending", "weird"),
    "a phase that is not there": put("pending", "phase"),
    "a NaN cost": put("start_cost", float("nan")),
    "nothing before": put("before", {}),
    "no history": put("history", []),
    "a history of numbers": put("history", [3]),
    "unknown units": put("units", {"nope": [1]}),
    "masks of nothing": lambda d: d["net"].__setitem__("masks", {"a": 3}),
    "a fit of nothing": put("fit", {}),
    "an optimizer of numbers": lambda d: d["fit"].__setitem__("optimizer", 3),
    "NaN weights": lambda d: d["model"]["stem.0.0.weight"].fill_(float("nan")),
}


@pytest.mark.parametrize("what", [*STATES, "half", "bomb", "pickle"])
def test_an_altered_state_is_refused_and_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    state, source = tmp_path / "out.pt.state", folder / "parts.pt.state"
    data = source.read_bytes()
    if what in STATES:
        altered(source, state, STATES[what])
    elif what == "pickle":
        torch.save({"edgeexit_pruning": Path}, state)
    else:
        state.write_bytes(bomb(data) if what == "bomb" else data[: len(data) // 2])
    before = state.read_bytes()

    said = told(
        capsys,
        3,
        *("prune", folder / "net.pt", "--recipe", folder / "recipe.toml", "--no-measure"),
        *("-o", tmp_path / "out.pt"),
    )

    assert "out.pt.state: " in said
    assert "Hint: remove " in said
    assert state.read_bytes() == before
    assert not (tmp_path / "out.pt").exists()


def test_the_unaltered_state_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.pt.state").write_bytes((folder / "parts.pt.state").read_bytes())

    prune(folder / "net.pt", read_prune_recipe(folder / "recipe.toml"), tmp_path / "out.pt")

    assert (tmp_path / "out.pt").read_bytes() == (folder / "small.pt").read_bytes()


@pytest.mark.parametrize("command", ["prune", "train", "attach"])
@pytest.mark.parametrize("name", ["net.pt", "data.npz", "folder", "", "link.pt", "recipe.toml"])
def test_what_is_read_is_never_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, name: str
) -> None:
    own = tmp_path / "own"
    (own / "folder").mkdir(parents=True)
    for one in ("net.pt", "data.npz", "recipe.toml"):
        (own / one).write_bytes((folder / one).read_bytes())
    (own / "link.pt").symlink_to(own / "net.pt")
    data, recipe = ["--data", own / "data.npz"], ["--recipe", own / "recipe.toml"]
    more = {"prune": [*data, *recipe], "train": data, "attach": []}[command]
    if (name == "recipe.toml" and command != "prune") or (name, command) == ("data.npz", "attach"):
        pytest.skip("not read by this command")
    before = {path: path.read_bytes() for path in own.iterdir() if path.is_file()}
    out = own / name if name else ""

    told(capsys, 2, command, own / "net.pt", *more, "--no-measure", "--again", "-o", out)

    assert {path: path.read_bytes() for path in own.iterdir() if path.is_file()} == before


def test_a_folder_that_takes_no_file_is_known_at_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune", folder / "net.pt", "--recipe", folder / "recipe.toml"]

    assert "cannot write" in told(capsys, 11, *arguments, "-o", "/proc/edgeexit/out.pt")


def test_samples_that_judge_are_not_for_training(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "set.toml").write_text("format = 1\n")
    (tmp_path / "report.npz").write_bytes((folder / "data.npz").read_bytes())

    for data in (tmp_path / "report.npz", tmp_path):
        said = told(
            capsys,
            2,
            *("prune", folder / "net.pt", "--data", data, "--no-measure"),
            *("-o", tmp_path / "out.pt"),
        )
        assert "not for training" in said


def test_a_scope_of_exits_needs_exits(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kwargs = {**KWARGS, "exits": []}
    save_checkpoint(
        tmp_path / "one.pt",
        model=zoo.resnet(**kwargs),
        arch="edgeexit.host.zoo:resnet",
        kwargs=kwargs,
        input_shape=[1, 1, 8, 8],
        class_names=list("abcd"),
        preprocess=PREPROCESS,
    )

    said = told(
        capsys,
        2,
        *("prune", tmp_path / "one.pt", "--recipe", folder / "recipe.toml"),
        *("--scope", "backbone-then-exits", "-o", tmp_path / "out.pt"),
    )

    assert "has no early exit" in said


@pytest.mark.parametrize("target", ["macs=1e-300", "macs=nan", "params=1", "weights=-1", "=0.5"])
def test_a_share_that_leaves_nothing_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    said = told(
        capsys, 2, "prune", folder / "net.pt", "--target", target, "-o", tmp_path / "out.pt"
    )

    assert "expected WHAT=SHARE" in said


class Narrow(nn.Module):
    """A forward that knows a width by heart and says so in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        x = self.first(x).relu().mean((2, 3))
        if x.shape[1] != 8:
            raise KeyError("width")
        return self.last(x)


class Deep(nn.Module):
    """A 3-d convolution over pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 8, (1, 3, 3), padding=(0, 1, 1))
        self.last = nn.Linear(8, 4)

    def forward(self, x: Any) -> Any:
        return self.last(self.first(x[:, :, None]).relu().mean((2, 3, 4)))


@pytest.mark.parametrize(("factory", "code"), [("Narrow", 2), ("Deep", 0)])
def test_a_network_with_ideas_of_its_own(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    factory: str,
    code: int,
) -> None:
    arch = f"{__name__}:{factory}"
    save_checkpoint(
        tmp_path / "own.pt",
        model=globals()[factory](),
        arch=arch,
        kwargs={},
        input_shape=[1, 1, 8, 8],
        class_names=list("abcd"),
        preprocess=PREPROCESS,
    )
    arguments = ["prune", str(tmp_path / "own.pt"), "--recipe", str(folder / "recipe.toml")]
    more = ["--arch", arch, "--no-measure", "-o", str(tmp_path / "out.pt")]

    assert entry([*arguments, *more]) == code
    assert ("widths of its own" in capsys.readouterr().err) == bool(code)

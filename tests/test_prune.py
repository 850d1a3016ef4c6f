"""`edgeexit prune`: what it promises, what it refuses, and that an interruption loses nothing."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeexit.bundle import load_bundle  # noqa: E402
from edgeexit.cli import entry  # noqa: E402
from edgeexit.cli.prune import _worse  # noqa: E402
from edgeexit.errors import BadFile, Busy, EdgeExitError, OutOfReach, UsageError  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from edgeexit.host.graph import analyse  # noqa: E402
from edgeexit.host.prune.composition import Composition, Target  # noqa: E402
from edgeexit.host.prune.engine import Progress, Pruning, prune  # noqa: E402
from edgeexit.host.prune.recipe import PruneRecipe, read_prune_recipe  # noqa: E402
from edgeexit.host.recipe import DataPart, TrainingPart  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402

pytestmark = pytest.mark.host

KWARGS: dict[str, Any] = {
    "channels": 1,
    "classes": 4,
    "size": [8, 8],
    "stem": [8],
    "widths": [8, 16],
    "blocks": [2, 2],
    "exits": [1, 2],
}
PREPROCESS = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.3,), layout="nchw"
)
PART = TrainingPart(epochs=1, learning_rate=0.05, batch=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of three exits (untrained) with its training data, 200 noisy pictures."""
    where = tmp_path_factory.mktemp("prune")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    base = rng.integers(0, 256, (4, 8, 8, 1))
    samples = np.clip(base[labels] + rng.normal(0, 60, (200, 8, 8, 1)), 0, 255).astype(np.uint8)
    np.savez(where / "data.npz", samples=samples, labels=labels)
    torch.manual_seed(0)
    save(where / "net.pt", zoo.resnet(**KWARGS))
    return where


def save(path: Path, net: Any, **changes: Any) -> None:
    facts: dict[str, Any] = {
        "arch": "edgeexit.host.zoo:resnet",
        "kwargs": KWARGS,
        "input_shape": [1, 1, 8, 8],
        "class_names": list("abcd"),
        "preprocess": PREPROCESS,
    }
    save_checkpoint(path, model=net, **{**facts, **changes})


def recipe(folder: Path, **changes: Any) -> PruneRecipe:
    plan = {"criterion": "l1", "steps": 2, "round_to": 2, "samples": 32, **changes}
    return PruneRecipe(
        where="recipe",
        composition=Composition(**plan),
        data=DataPart(path=str(folder / "data.npz")),
        finetune=PART,
        final=PART,
    )


def command(folder: Path, *arguments: str) -> list[str]:
    return [
        "prune",
        str(folder / "net.pt"),
        *("--data", str(folder / "data.npz"), "--round-to", "2", "--no-measure"),
        *arguments,
    ]


def test_the_target_is_met_and_every_exit_stays(folder: Path, tmp_path: Path) -> None:
    before = load_checkpoint(folder / "net.pt")

    result = prune(folder / "net.pt", recipe(folder), tmp_path / "out.pt")

    after = load_checkpoint(tmp_path / "out.pt")
    assert after.exits == before.exits
    graph = analyse(after.model, after.input_shape)
    assert graph.macs() <= 0.5 * analyse(before.model, before.input_shape).macs()
    assert result.macs[1] == graph.macs()
    assert not (tmp_path / "out.pt.state").exists()
    # What it was fine-tuned on is remembered, so that nothing is tuned or judged on it.
    assert after.training_bloom is not None
    # Whole widths of two, and a probe that the load has just reproduced.
    assert all(group.size % 2 == 0 for group in graph.groups.values())
    assert after.metadata["pruning"]["composition"]["criterion"] == "l1"


def test_a_protected_layer_keeps_its_width(folder: Path, tmp_path: Path) -> None:
    plan = recipe(folder, protect=("blocks.1.first.0",), target=Target(what="macs", share=0.7))

    prune(folder / "net.pt", plan, tmp_path / "out.pt")

    net = load_checkpoint(tmp_path / "out.pt").model
    assert net.get_submodule("blocks.1.first.0").out_channels == 8


class Stop(Exception):
    pass


def test_an_interrupted_pruning_goes_on_and_ends_the_same(folder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole.pt", tmp_path / "parts.pt"
    told: list[str] = []

    def count(progress: Progress) -> None:
        told.append(progress.action)

    prune(folder / "net.pt", recipe(folder), whole, on_step=count)
    # Stop it at every fourth thing that it tells, again and again.
    limit = 4

    def stop(progress: Progress) -> None:
        nonlocal limit
        limit -= 1
        if limit < 0:
            limit = len(told) // 2
            raise Stop

    stops = 0
    while not parts.exists():
        try:
            prune(folder / "net.pt", recipe(folder), parts, on_step=stop)
        except Stop:
            stops += 1
            assert stops < 50

    assert stops >= 2
    assert parts.read_bytes() == whole.read_bytes()


def test_killed_while_fine_tuning_it_goes_on(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    arguments = [*command(folder, "--epochs", "400"), "--final-epochs", "0", "-o", str(out)]
    state = tmp_path / "out.pt.state"
    with subprocess.Popen(
        [sys.executable, "-m", "edgeexit", *arguments], stderr=subprocess.DEVNULL
    ) as child:
        end = time.monotonic() + 60
        while not state.exists() and time.monotonic() < end:
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)
    assert state.exists()
    assert not out.exists()

    with pytest.raises(UsageError, match="an interrupted pruning with another recipe") as found:
        prune(folder / "net.pt", recipe(folder), out)
    assert f"remove {state}" in str(found.value.hint)
    assert state.exists()
    prune(folder / "net.pt", recipe(folder), out, again=True)
    assert not state.exists()


def test_a_finished_pruning_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    first = prune(folder / "net.pt", recipe(folder), out)
    second = prune(folder / "net.pt", recipe(folder), out)

    assert second.was_done
    assert second.history == first.history
    with pytest.raises(UsageError, match="was not made by this pruning"):
        prune(folder / "net.pt", recipe(folder, steps=1), out)


def test_a_damaged_state_is_refused_and_kept(folder: Path, tmp_path: Path) -> None:
    state = tmp_path / "out.pt.state"
    state.write_bytes(b"PK\x03\x04 not really")

    with pytest.raises(BadFile, match="not a sound pruning state"):
        prune(folder / "net.pt", recipe(folder), tmp_path / "out.pt")
    assert state.exists()


def test_a_ratio_that_would_empty_a_layer_is_out_of_reach(folder: Path, tmp_path: Path) -> None:
    plan = recipe(folder, target=Target(what="macs", share=0.01), round_to=4)

    with pytest.raises(OutOfReach, match="or a layer would be empty"):
        prune(folder / "net.pt", plan, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_blocks_end_before_an_exit_would_lose_its_own(folder: Path, tmp_path: Path) -> None:
    plan = recipe(folder, selector="blocks", target=Target(what="macs", share=0.3))

    with pytest.raises(OutOfReach, match="no further block"):
        prune(folder / "net.pt", plan, tmp_path / "out.pt")


def test_a_loss_that_becomes_nan_is_told_and_the_step_kept(folder: Path, tmp_path: Path) -> None:
    wild = TrainingPart(epochs=3, learning_rate=100.0, batch=32)
    plan = PruneRecipe(
        where="recipe",
        composition=Composition(criterion="l1", steps=1, round_to=2),
        data=DataPart(path=str(folder / "data.npz")),
        finetune=wild,
    )

    with pytest.raises(UsageError, match="became"):
        prune(folder / "net.pt", plan, tmp_path / "out.pt")
    assert (tmp_path / "out.pt.state").exists()


class Stubborn(torch.nn.Module):
    """A forward that knows its number of channels by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3, padding=1)
        self.head = torch.nn.Linear(8 * 64, 4)

    def forward(self, x: Any) -> Any:
        return self.head(torch.relu(self.conv(x)).view(-1, 512))


def test_a_forward_with_widths_of_its_own_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stubborn.py").write_text("from tests_prune_stub import Stubborn as make\n")
    (tmp_path / "tests_prune_stub.py").write_text(
        f"from {__name__} import Stubborn\n"
        if "." in __name__
        else "from test_prune import Stubborn\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save(tmp_path / "net.pt", Stubborn(), arch="stubborn:make", kwargs={})

    with pytest.raises(UsageError, match="widths of its own"):
        prune(
            tmp_path / "net.pt",
            recipe(folder),
            tmp_path / "out.pt",
            arch="stubborn:make",
        )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--criterion", "l3"], 2, "no criterion named 'l3'"),
        (["--criterion", "magnitude"], 2, "scores no filters"),
        (["--criterion", "bn-gamma", "--target", "weights=0.5"], 2, "scores no single weights"),
        (["--allocator", "lottery"], 2, "no allocator named 'lottery'"),
        (["--schedule", "never"], 2, "no schedule named"),
        (["--scope", "heads"], 2, "no scope named"),
        (["--selector", "best"], 2, "no selector named"),
        (["--phase", "lunar"], 2, "no phase named"),
        (["--method", "gormez"], 2, "did you mean"),
        (["--target", "macs"], 2, "expected WHAT=SHARE"),
        (["--target", "macs=1.5"], 2, "expected WHAT=SHARE"),
        (["--target", "macs=nan"], 2, "expected WHAT=SHARE"),
        (["--target", "joules=0.5"], 2, "expected WHAT=SHARE"),
        (["--learning-rate", "nan"], 2, "--learning-rate"),
        (["--data", "/nowhere"], 2, "no such file or folder"),
        (["--recipe", "/nowhere.toml"], 2, "nowhere.toml"),
        (["--target", "macs=0.001"], 7, "or a layer would be empty"),
    ],
)
def test_wrong_words_are_refused_in_a_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    says: str,
) -> None:
    out = tmp_path / "out.pt"

    assert entry([*command(folder, "--epochs", "0"), *arguments, "-o", str(out)]) == code

    told = capsys.readouterr().err
    assert says in told
    assert "Traceback" not in told
    assert not out.exists()


RECIPE = """
format = 1
[prune]
method = "hybrid"
target = { params = 0.4 }
protect = ["stem.0.0"]
[finetune]
epochs = 2
learning_rate = 0.1
"""


def test_a_recipe_changes_the_method_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE)

    found = read_prune_recipe(path)

    assert found.composition.schedule == "hybrid"
    assert found.composition.target == Target(what="params", share=0.4)
    assert found.composition.protect == ("stem.0.0",)
    assert found.finetune is not None
    assert found.finetune.epochs == 2
    assert found.final is None


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('method = "hybrid"', 'methods = "hybrid"', "methods"),
        ('method = "hybrid"', 'method = "hybird"', "did you mean 'hybrid'"),
        ("params = 0.4", "params = 0", "expected above 0"),
        ("params = 0.4", "params = 0.4, macs = 0.5", "expected one of"),
        ("params = 0.4", "sparsity = 0.4", "sparsity"),
        ("format = 1", "format = 2", "format"),
        ("epochs = 2", "epochs = 0", "epochs"),
        ("epochs = 2", "epoch = 2", "epoch"),
        ('protect = ["stem.0.0"]', 'protect = "stem.0.0"', "protect"),
        ('protect = ["stem.0.0"]', "steps = 0", "expected 1 to 1000"),
        ('protect = ["stem.0.0"]', "round_to = true", "round_to"),
        ("[finetune]", "[fine-tune]", "fine-tune"),
        ("[prune]", "[prune", "recipe.toml"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, old: str, new: str, says: str) -> None:
    path = tmp_path / "recipe.toml"
    assert old in RECIPE
    path.write_text(RECIPE.replace(old, new))

    with pytest.raises(EdgeExitError) as found:
        read_prune_recipe(path)

    assert isinstance(found.value, BadFile | UsageError)
    assert says in f"{found.value} {found.value.hint}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schedule": "cosine"}, "schedule of the learning rate"),
        ({"drops": (0.5,)}, "recipe: {key}.drops: the schedule one-cycle has none"),
        ({"regime": "none"}, "training regime"),
        ({"head_init": "none"}, "way to start exit heads"),
        ({"phase_shares": (1.0, 1.0)}, "recipe: {key}.phase_shares: found"),
        ({"exit_weights": (1.0,)}, "recipe: {key}.exit_weights: found 1"),
        ({"batch": 60_000}, "recipe: {key}.batch: found 60000"),
    ],
)
@pytest.mark.parametrize("key", ["finetune", "final"])
def test_a_training_that_cannot_be_is_refused_before_anything_is_done(
    folder: Path, tmp_path: Path, key: str, change: dict[str, Any], says: str
) -> None:
    wrong = replace(recipe(folder), **{key: replace(PART, **change)})

    def never(progress: Progress) -> None:
        raise AssertionError(progress)

    with pytest.raises((BadFile, UsageError), match=says.format(key=key)):
        prune(folder / "net.pt", wrong, tmp_path / "out.pt", on_step=never)
    assert not list(tmp_path.glob("out.pt*"))


def test_a_layer_to_protect_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no layer to protect named"):
        prune(folder / "net.pt", recipe(folder, protect=("stem.9",)), tmp_path / "out.pt")


def test_json_says_what_was_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.pt"

    code = entry(
        [*command(folder, "--epochs", "0", "--final-epochs", "0"), "--json", "-o", str(out)]
    )

    assert code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["checkpoint"] == str(out)
    assert len(document["history"]) == 3
    assert document["macs"][1] <= 0.5 * document["macs"][0]
    assert document["comparison"] is None


def test_every_name_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry(["prune", "--list"]) == 0

    told = capsys.readouterr().out
    for word in ("everything", "taylor", "erk", "geometric", "exits-only", "polarization"):
        assert word in told


def test_convert_prunes_on_the_way(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = tmp_path / "net.pt"
    net.write_bytes((folder / "net.pt").read_bytes())
    plan = tmp_path / "smaller.toml"
    plan.write_text(
        "format = 1\n"
        f'[data]\npath = "{folder / "data.npz"}"\n'
        '[prune]\ncriterion = "l1"\nsteps = 1\nround_to = 2\n'
        "[finetune]\nepochs = 1\nlearning_rate = 0.05\nbatch = 32\n"
    )
    out = tmp_path / "net.edgeexit"
    arguments = ["--prune", str(plan), "--calibration", str(folder / "data.npz"), "-o", str(out)]

    assert entry(["convert", str(net), *arguments]) == 0

    bundle = load_bundle(out)
    made = bundle.provenance["pruning"]
    assert made["composition"]["criterion"] == "l1"
    assert made["after"]["macs"] <= 0.5 * made["before"]["macs"]
    assert load_checkpoint(tmp_path / "net-pruned.pt").surgery


def test_a_bare_state_dict_is_pruned_with_the_set_that_says_what_it_is_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from edgeexit.host.zoo import resnet\n\n\n"
        "def make():\n"
        f"    return resnet(**{KWARGS | {'classes': 10, 'size': [28, 28]}!r})\n"
    )
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    net = zoo.resnet(**{**KWARGS, "classes": 10, "size": [28, 28]})
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (64, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", samples=samples, labels=np.arange(64) % 10)

    code = entry(
        [
            *("prune", "bare.pt", "--arch", "mine:make", "--calibration", "fashion-mnist"),
            *("--data", "data.npz", "--criterion", "l1", "--round-to", "2", "--steps", "1"),
            *("--epochs", "0", "--final-epochs", "0", "--no-measure"),
        ]
    )

    assert code == 0
    found = load_checkpoint(tmp_path / "bare-pruned.pt", arch="mine:make")
    assert len(found.class_names) == 10
    assert found.surgery


@pytest.mark.parametrize("changes", [{"phase": "greg-1"}, {"stability": True}])
def test_heads_of_one_layer_are_trained_anew_where_nothing_can_be_removed(
    folder: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plan = recipe(folder, scope="backbone-then-exits", steps=1, schedule="one-shot", **changes)

    result = prune(folder / "net.pt", plan, tmp_path / "out.pt")

    assert [row["stage"] for row in result.history] == ["backbone", "exits"]
    assert result.history[-1]["filters"] == 0


def test_exits_alone_that_have_nothing_to_remove_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OutOfReach, match="must remain"):
        prune(folder / "net.pt", recipe(folder, scope="exits-only"), tmp_path / "out.pt")


def test_two_prunings_into_one_file_do_not_mix(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"

    def meddle(progress: Progress) -> None:
        if progress.action == "score":
            with pytest.raises(Busy, match=r"another process holds a pruning into out\.pt"):
                prune(folder / "net.pt", recipe(folder), out)

    prune(folder / "net.pt", recipe(folder), out, on_step=meddle)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.pt"]


def test_classes_in_another_order_are_refused(folder: Path, tmp_path: Path) -> None:
    with np.load(folder / "data.npz") as found:
        np.savez(tmp_path / "data.npz", **found, class_names=np.array(list("bacd")))

    with pytest.raises(BadFile, match="class_names: found b, a, c, d, expected a, b, c, d"):
        prune(folder / "net.pt", recipe(tmp_path), tmp_path / "out.pt")


@pytest.mark.parametrize(("removed", "is_told"), [(0.9, True), (0.2, False)])
def test_a_training_that_leaves_every_exit_worse_is_told(removed: float, is_told: bool) -> None:
    row = {
        "step": 1,
        "accuracies": {"a": 0.5, "b": 0.3},
        "removed_accuracies": {"a": 0.6, "b": removed},
    }
    result = Pruning(
        path=Path("out.pt"),
        history=(row,),
        macs=(2, 1),
        parameters=(2, 1),
        accuracies=({}, {}),
        was_done=False,
    )

    assert (_worse(result) is not None) == is_told


class Wordless(Stubborn):
    """A forward that raises without a word once its layers are narrower."""

    def forward(self, x: Any) -> Any:
        maps = torch.relu(self.conv(x))
        if maps.shape[1] != 8:
            raise ValueError
        return self.head(maps.flatten(1))


def test_a_forward_that_raises_without_a_word_is_refused_with_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wordless.py").write_text("from test_prune import Wordless as make\n")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save(tmp_path / "net.pt", Wordless(), arch="wordless:make", kwargs={})

    with pytest.raises(UsageError, match="narrower layers: ValueError"):
        prune(tmp_path / "net.pt", recipe(folder), tmp_path / "out.pt", arch="wordless:make")

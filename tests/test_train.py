"""Training: recipes are read strictly, an interruption changes nothing, the best epoch is kept."""

import gzip
import json
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

torch = pytest.importorskip("torch")

from edgeexit.cli.train import command  # noqa: E402
from edgeexit.errors import BadFile, UsageError  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from edgeexit.host.feed import augment, recognised, split_holdout, training_samples  # noqa: E402
from edgeexit.host.fit import Fit  # noqa: E402
from edgeexit.host.model import attach  # noqa: E402
from edgeexit.host.needs import needs  # noqa: E402
from edgeexit.host.recipe import Augmentation, DataPart, read_recipe  # noqa: E402
from edgeexit.host.train import Choices, Step, seen, train  # noqa: E402
from edgeexit.host.zoo import conv1d, resnet  # noqa: E402
from edgeexit.overlap import Bloom, sample_digests  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402

pytestmark = pytest.mark.host

RECIPE = """
format = 1
[model]
arch = "edgeexit.host.zoo:resnet"
input_shape = [1, 1, 8, 8]
[model.kwargs]
channels = 1
classes = 3
size = [8, 8]
stem = [4]
widths = [4, 8]
blocks = [1, 1]
[data]
kind = "idx"
path = "DATA"
holdout = 30
class_names = ["dark", "middle", "bright"]
[preprocess]
kind = "image"
size = [8, 8]
color = "gray"
scale = 0.00392156862745098
mean = [0.5]
std = [0.25]
layout = "nchw"
[augmentation]
flip = true
shift = 1
[training]
epochs = 3
batch = 16
seed = 5
learning_rate = 0.05
distillation = 0.5
"""

GRAY = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_idx(folder: Path, count: int = 120) -> np.ndarray:
    """Pictures whose class is their brightness, in the files of the MNIST family."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, count).astype(np.uint8)
    images = (labels[:, None, None] * 90 + random.integers(0, 60, (count, 8, 8))).astype(np.uint8)
    folder.mkdir(exist_ok=True)
    header = b"\0\0\x08\x03" + struct.pack(">3I", *images.shape)
    packed = gzip.compress(header + images.tobytes())
    (folder / "train-images-idx3-ubyte.gz").write_bytes(packed)
    header = b"\0\0\x08\x01" + struct.pack(">I", count)
    (folder / "train-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return images


def recipe_in(folder: Path, change: Callable[[str], str] = lambda text: text) -> Path:
    write_idx(folder / "data")
    path = folder / "tiny.toml"
    path.write_text(change(RECIPE.replace("DATA", str(folder / "data"))))
    return path


def test_training_writes_a_checkpoint_that_knows_where_it_comes_from(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)

    result = train(recipe)

    found = load_checkpoint(tmp_path / "tiny.pt")
    assert result.path == tmp_path / "tiny.pt"
    assert list(result.accuracies) == ["exit0", "exit1"]
    assert found.metadata["recipe_digest"] == read_recipe(recipe).digest
    assert found.metadata["seed"] == 5
    assert found.metadata["holdout_accuracies"] == result.accuracies
    assert found.class_names == ("dark", "middle", "bright")
    images = write_idx(tmp_path / "data")[..., np.newaxis]
    assert found.training_bloom is not None
    assert Bloom.from_bytes(found.training_bloom).hits(sample_digests(images)).all()
    assert not (tmp_path / "tiny.pt.state").exists()


def test_an_interrupted_training_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    whole = tmp_path / "whole.pt"
    train(recipe, whole)
    broken = tmp_path / "broken.pt"

    def stop(step: Step) -> None:
        if step.epoch == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, broken, on_step=stop)
    assert not broken.exists()
    epochs: list[int] = []
    train(recipe, broken, on_step=lambda step: epochs.append(step.epoch))

    assert set(epochs) == {3}
    assert broken.read_bytes() == whole.read_bytes()


def test_a_finished_training_is_not_redone(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    first = train(recipe)
    steps: list[Step] = []

    second = train(recipe, on_step=steps.append)

    assert second.was_done
    assert second.accuracies == first.accuracies
    assert not steps
    train(recipe, again=True, on_step=steps.append)
    assert steps


def test_another_recipes_files_are_not_replaced(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    train(recipe)
    (tmp_path / "other.pt.state").write_bytes(b"torn")
    with pytest.raises(BadFile, match="training state"):
        train(recipe, tmp_path / "other.pt")
    recipe_in(tmp_path, lambda text: text.replace("seed = 5", "seed = 6"))

    with pytest.raises(UsageError, match="not made by this recipe"):
        train(recipe)


def test_initial_weights_are_taken(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    train(recipe, tmp_path / "first.pt")
    shape = "input_shape = [1, 1, 8, 8]"
    first = f'{shape}\ninitial_weights = "{tmp_path / "first.pt"}"'
    recipe_in(
        tmp_path,
        lambda text: (
            text.replace(shape, first)
            .replace("epochs = 3", "epochs = 1")
            .replace("learning_rate = 0.05", "learning_rate = 1e-9")
        ),
    )

    train(recipe, tmp_path / "second.pt")

    one, other = (load_checkpoint(tmp_path / name).model for name in ("first.pt", "second.pt"))
    for name, weight in one.named_parameters():
        assert torch.allclose(weight, other.get_parameter(name), atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("format = 1", "format = 2", "format"),
        ("[training]", "[training]\nspeed = 3", "speed: unknown key"),
        ("epochs = 3", "epochs = 0", "epochs: found 0"),
        ("epochs = 3", "epochs = 1.5", "epochs"),
        ("learning_rate = 0.05", "learning_rate = nan", "finite"),
        ("learning_rate = 0.05", "", "learning_rate: missing"),
        ("flip = true", "flip = 1", "flip"),
        ("[1, 1, 8, 8]", "[1, 3, 8, 8]", "preprocess makes"),
        ("[1, 1, 8, 8]", "[8]", "input_shape"),
        ("seed = 5", "exit_weights = [1.0, -1.0]", "exit_weights"),
        ("seed = 5", "exit_weights = [1.0]", "the network has 2 exits"),
        ("seed = 5", "phase_shares = [0.0]", "phase_shares: found"),
        ("seed = 5", "phase_shares = [1.0, 1.0]", "has 1 phases"),
        ("seed = 5", "distillation_temperature = 0", "distillation_temperature: found 0"),
        ("seed = 5", "patience = -1", "patience: found -1"),
        ("seed = 5", "ramp = 1", "ramp"),
        ("holdout = 30", "holdout = 0", "holdout: found 0"),
        ("[data]", "[data]\nseed = -1", "seed: found -1"),
        ("seed = 5", "seed = 1979-05-27", "expected text, numbers"),
        ('"dark", "middle"', '"dark", "dark"', "class_names"),
        ("edgeexit.host.zoo:resnet", "os:system", "names code outside"),
        ("edgeexit.host.zoo:resnet", "edgeexit.host.train:train", "no network"),
        ("blocks = [1, 1]", "blocks = [1]", "kwargs"),
        ("blocks = [1, 1]", "nonsense = 1", "kwargs"),
    ],
)
def test_a_wrong_recipe_is_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    recipe = recipe_in(tmp_path, lambda text: text.replace(old, new))

    with pytest.raises(BadFile, match=words):
        train(recipe)

    assert not list(tmp_path.glob("tiny.pt*"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('kind = "idx"', 'kind = "tape"', "kind of training data"),
        ("seed = 5", 'regime = "jiont"', "training regime"),
        ("seed = 5", 'head_init = "zeros"', "way to start exit heads"),
        ("holdout = 30", "holdout = 120", "cannot hold out"),
        ("batch = 16", "batch = 100", "batch"),
        ("classes = 3", "classes = 4", "expected \\[1, 3\\]"),
        ("learning_rate = 0.05", "learning_rate = 100\nweight_decay = 1", "the loss became"),
        ("data", "nowhere", "no such file"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(
    tmp_path: Path, old: str, new: str, words: str
) -> None:
    def change(text: str) -> str:
        return text.replace("/data", "/nowhere") if old == "data" else text.replace(old, new)

    with pytest.raises(UsageError, match=words):
        train(recipe_in(tmp_path, change))


def test_initial_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    train(recipe_in(tmp_path), tmp_path / "first.pt")
    shape = "input_shape = [1, 1, 8, 8]"
    first = f'{shape}\ninitial_weights = "{tmp_path / "first.pt"}"'
    recipe = recipe_in(
        tmp_path, lambda text: text.replace(shape, first).replace("[4, 8]", "[4, 12]")
    )

    with pytest.raises(UsageError, match="another network"):
        train(recipe)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"no gzip at all",
        lambda data: gzip.compress(gzip.decompress(data)[:-1]),
        lambda data: gzip.compress(b"\0\0\x0d\x01" + bytes(8)),
        lambda data: gzip.compress(b"\0\0\x08\x03" + struct.pack(">3I", *[2**32 - 1] * 3)),
    ],
)
def test_damaged_data_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    recipe = read_recipe(recipe_in(tmp_path))
    path = tmp_path / "data" / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(BadFile):
        training_samples(recipe.data, recipe.model.preprocess, recipe.model.input_shape)


def test_an_npz_of_sensor_windows_trains_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 60)
    samples = random.normal(labels[:, None, None], 1, (60, 2, 16)).astype(np.float32)
    np.savez(tmp_path / "windows.npz", samples=samples, labels=labels)
    (tmp_path / "windows.toml").write_text(
        f"""
        format = 1
        [model]
        arch = "edgeexit.host.zoo:conv1d"
        input_shape = [1, 2, 16]
        kwargs = {{channels = 2, classes = 2, widths = [4, 4], exits = [0]}}
        [data]
        kind = "npz"
        path = "{tmp_path / "windows.npz"}"
        holdout = 10
        class_names = ["low", "high"]
        [preprocess]
        kind = "array"
        scale = 1.0
        mean = [0.0]
        std = [1.0]
        layout = "as-is"
        [augmentation]
        noise = 0.1
        [training]
        epochs = 1
        batch = 8
        learning_rate = 0.05
        """
    )

    assert train(tmp_path / "windows.toml").path.exists()


def test_the_holdout_is_fixed_by_the_seed_and_disjoint() -> None:
    kept, held = split_holdout(100, 20, seed=3)

    assert len(held) == 20
    assert sorted([*kept, *held]) == list(range(100))
    assert np.array_equal(split_holdout(100, 20, seed=3)[1], held)
    assert not np.array_equal(split_holdout(100, 20, seed=4)[1], held)


IDENTITY = Preprocess(kind="image", size=(6, 6), color="gray", scale=1.0)


def test_flips_and_shifts_move_whole_pictures() -> None:
    picture = np.arange(36, dtype=np.uint8).reshape(1, 6, 6, 1)
    many = np.repeat(picture, 200, axis=0)

    moved = augment(many, IDENTITY, Augmentation(flip=True, shift=1), np.random.default_rng(0))

    # The four pixels in the middle are shifted by at most one, and never mixed up.
    kinds = {tuple(image[2:4, 2:4, 0].ravel() - image[2, 2, 0]) for image in moved}
    assert kinds == {(0, 1, 6, 7), (0, -1, 6, 5)}
    assert len({image.tobytes() for image in moved}) == 18


def test_erasing_and_noise_touch_the_share_they_should() -> None:
    many = np.full((400, 6, 6, 1), 9, np.uint8)

    erased = augment(many, IDENTITY, Augmentation(erase=0.5), np.random.default_rng(0))
    noisy = augment(many, IDENTITY, Augmentation(noise=0.5), np.random.default_rng(0))

    touched = (erased == 0).any(axis=(1, 2, 3))
    assert 0.4 < touched.mean() < 0.6
    assert (erased[touched] == 9).any(axis=(1, 2, 3)).all()
    assert 0.45 < noisy.std() < 0.55


def test_the_command_prints_one_document(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)

    said = [str(recipe), "--no-measure"]
    done = CliRunner().invoke(command, [*said, "--json"], catch_exceptions=False)
    again = CliRunner().invoke(command, said, catch_exceptions=False)

    document: dict[str, Any] = json.loads(done.stdout)
    assert document["checkpoint"] == str(tmp_path / "tiny.pt")
    assert list(document["holdout_accuracies"]) == ["exit0", "exit1"]
    assert "epoch 3/3 (all)" in done.stderr
    assert "is there already" in again.stdout


def test_ctrl_c_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgeexit.host.train.train", interrupted)

    result = CliRunner().invoke(command, [str(recipe_in(tmp_path))])

    assert result.exit_code == 1
    assert "The same command goes on" in result.stderr


def test_a_checkpoint_of_another_origin_is_not_replaced(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    found = load_checkpoint(train(recipe).path)
    save_checkpoint(
        tmp_path / "mine.pt",
        model=found.model,
        arch=found.arch,
        kwargs=found.kwargs,
        input_shape=found.input_shape,
        class_names=found.class_names,
        preprocess=found.preprocess,
    )

    with pytest.raises(UsageError, match="not made by this recipe"):
        train(recipe, tmp_path / "mine.pt")


def test_a_killed_training_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, lambda text: text.replace("epochs = 3", "epochs = 4"))
    whole, killed = tmp_path / "whole.pt", tmp_path / "killed.pt"
    train(recipe, whole)
    code = f"""
import os, signal, torch
from pathlib import Path
from edgeexit.host.train import train
torch.set_num_threads(1)
def kill(step):
    if step.epoch == 3 and step.batch == 2:
        os.kill(os.getpid(), signal.SIGKILL)
train(Path({str(recipe)!r}), Path({str(killed)!r}), on_step=kill)
"""

    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)

    assert done.returncode == -signal.SIGKILL
    assert not killed.exists()
    epochs: list[int] = []
    train(recipe, killed, on_step=lambda step: epochs.append(step.epoch))
    assert set(epochs) == {3, 4}
    assert killed.read_bytes() == whole.read_bytes()


@contextmanager
def noting_fits() -> Iterator[list[Fit]]:
    """Every Fit that is made meanwhile."""
    found: list[Fit] = []
    plain = Fit.__init__

    def noted(self: Fit, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        found.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "__init__", noted)
        yield found


def test_a_loss_that_diverges_leaves_the_last_whole_epoch(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)

    def spoil(step: Step) -> None:
        if step.epoch == 2:
            for group in fits[0].optimizer.param_groups:
                group["lr"] = 1e30

    with noting_fits() as fits, pytest.raises(UsageError, match=r"in epoch 2") as caught:
        train(recipe, on_step=spoil)

    assert caught.value.hint is not None
    assert not (tmp_path / "tiny.pt").exists()
    epochs: list[int] = []
    train(recipe, on_step=lambda step: epochs.append(step.epoch))
    assert set(epochs) == {2, 3}


# ---------------------------------------------------------------- checkpoints trained further


def trained(folder: Path) -> Path:
    """A checkpoint of the recipe above."""
    return train(recipe_in(folder)).path


def test_a_checkpoint_is_trained_further_and_stays_as_it_was(tmp_path: Path) -> None:
    start = trained(tmp_path)
    before = start.read_bytes()

    result = train(start, choices=Choices(regime="frozen", epochs=2, batch=16))

    assert start.read_bytes() == before
    assert result.path == tmp_path / "tiny-trained.pt"
    old, new = load_checkpoint(start), load_checkpoint(result.path)
    assert (new.arch, new.kwargs, new.preprocess) == (old.arch, old.kwargs, old.preprocess)
    assert new.metadata["trained_from"] == old.digest
    assert new.metadata["regime"] == "frozen"
    heads = needs(old.model, torch.zeros(old.input_shape)).head_parameters()
    other = new.model.state_dict()
    moved = {k for k, v in old.model.state_dict().items() if not torch.equal(v, other[k])}
    assert moved
    assert moved <= heads


def test_samples_held_out_once_are_held_out_again(tmp_path: Path) -> None:
    start = trained(tmp_path)
    known = load_checkpoint(start).metadata["data"]
    assert known == {
        "kind": "idx",
        "path": str(tmp_path / "data"),
        "count": 120,
        "holdout": 30,
        "seed": 5,
        "augmentation": {"flip": True, "shift": 1, "erase": 0.0, "noise": 0.0},
    }

    train(start, choices=Choices(epochs=1, batch=16, seed=77))

    again = load_checkpoint(tmp_path / "tiny-trained.pt").metadata
    assert again["data"] == known
    assert again["seed"] == 77
    train(start, tmp_path / "c.pt", choices=Choices(epochs=1, batch=16, holdout=20, flip=False))
    other = load_checkpoint(tmp_path / "c.pt").metadata["data"]
    assert (other["holdout"], other["seed"]) == (20, 5)
    assert other["augmentation"] == known["augmentation"] | {"flip": False}


def test_other_samples_are_split_anew(tmp_path: Path) -> None:
    start = trained(tmp_path)
    write_idx(tmp_path / "more", 150)

    choices = Choices(data=str(tmp_path / "more"), epochs=1, batch=16, seed=8)
    train(start, choices=choices)

    found = load_checkpoint(tmp_path / "tiny-trained.pt")
    assert found.metadata["data"]["holdout"] == 15
    assert found.metadata["data"]["seed"] == 8
    bloom = Bloom.from_bytes(found.training_bloom or b"")
    for folder, count in (("data", 120), ("more", 150)):
        images = write_idx(tmp_path / folder, count)[..., np.newaxis]
        assert bloom.hits(sample_digests(images)).all()


def test_attached_exits_are_trained_and_survive(tmp_path: Path) -> None:
    kwargs = {
        "channels": 1,
        "classes": 3,
        "size": [8, 8],
        "stem": [4],
        "widths": [4, 8],
        "blocks": [1, 1],
        "exits": [],
    }
    torch.manual_seed(0)
    plain = resnet(**kwargs)  # type: ignore[arg-type]
    model = attach(plain, ["blocks.0"], input_shape=(1, 1, 8, 8))
    save_checkpoint(
        tmp_path / "with.pt",
        model=model,
        arch="edgeexit.host.zoo:resnet",
        kwargs=kwargs,
        input_shape=[1, 1, 8, 8],
        class_names=["dark", "middle", "bright"],
        preprocess=GRAY,
        attached={"at": ["blocks.0"], "head": "average", "widths": [[]]},
    )
    write_idx(tmp_path / "data")
    choices = Choices(regime="frozen", data=str(tmp_path / "data"), epochs=3, batch=16)
    inits: list[str] = []

    def noted(step: Step) -> None:
        inits.append(fits[-1].part.head_init)

    with noting_fits() as fits:
        result = train(tmp_path / "with.pt", choices=choices, on_step=noted)
        assert set(inits) == {"class-means"}
        train(result.path, choices=replace(choices, epochs=1))

    found = load_checkpoint(result.path)
    assert found.attached == {"at": ["blocks.0"], "head": "average", "widths": [[]]}
    assert found.metadata["data"]["holdout"] == 12
    for name, value in plain.state_dict().items():
        assert torch.equal(found.model.state_dict()[f"backbone.{name}"], value)
    assert fits[-1].part.head_init == "random"


def test_an_interrupted_training_of_a_checkpoint_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    start = trained(tmp_path)
    choices = Choices(regime="mixed", epochs=6, batch=16, learning_rate=0.01)
    train(start, tmp_path / "whole.pt", choices=choices)

    def stop(step: Step) -> None:
        if step.epoch == 5:
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(start, tmp_path / "broken.pt", choices=choices, on_step=stop)
    train(start, tmp_path / "broken.pt", choices=choices)

    assert (tmp_path / "broken.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert train(start, tmp_path / "broken.pt", choices=choices).was_done
    with pytest.raises(UsageError, match="was not made by"):
        train(start, tmp_path / "broken.pt", choices=replace(choices, epochs=7))


def test_a_checkpoint_is_not_replaced_by_its_own_training(tmp_path: Path) -> None:
    start = trained(tmp_path)

    with pytest.raises(UsageError, match="would be overwritten"):
        train(start, start, choices=Choices(epochs=1))


def test_a_recipe_may_start_from_a_checkpoint(tmp_path: Path) -> None:
    start = trained(tmp_path)
    recipe = tmp_path / "further.toml"
    text = f"""
        format = 1
        [model]
        checkpoint = "{start}"
        [training]
        regime = "mixed"
        phase_shares = [0.0, 1.0, 1.0]
        epochs = 2
        batch = 16
        learning_rate = 0.01
        ramp = true
        equilibrium = true
        """
    recipe.write_text(text)

    phases: list[str] = []
    result = train(recipe, on_step=lambda step: phases.append(step.phase))

    assert result.path == tmp_path / "further.pt"
    assert list(dict.fromkeys(phases)) == ["heads", "all"]
    old, new = load_checkpoint(start).metadata, load_checkpoint(result.path).metadata
    assert new["data"] == old["data"]
    assert train(recipe).was_done
    train(recipe_in(tmp_path, lambda t: t.replace("seed = 5", "seed = 9")), start, again=True)
    with pytest.raises(UsageError, match="not made by this recipe"):
        train(recipe)

    for old_text, new_text, words in (
        ("checkpoint =", 'arch = "x"\ncheckpoint =', "arch: unknown key"),
        ("[training]", "[preprocess]\n[training]", "preprocess: unknown key"),
        ("[training]", '[data]\nclass_names = ["a", "b"]\n[training]', "class_names: unknown"),
    ):
        recipe.write_text(text.replace(old_text, new_text))
        with pytest.raises(BadFile, match=words):
            train(recipe)


@pytest.mark.parametrize("kind", ["folder", "npz", "idx", "idx.gz"])
def test_the_kind_of_data_is_recognised(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "data"
    images = write_idx(folder)
    labels = np.frombuffer((folder / "train-labels-idx1-ubyte").read_bytes()[8:], np.uint8)
    path = folder
    if kind == "npz":
        path = tmp_path / "data.npz"
        np.savez(path, samples=images[..., np.newaxis], labels=labels.astype(np.int64))
    if kind == "folder":
        path = tmp_path / "pictures"
        for k, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = path / ("dark", "middle", "bright")[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{k}.png")
    if kind == "idx":
        packed = folder / "train-images-idx3-ubyte.gz"
        (folder / "train-images-idx3-ubyte").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    part = DataPart(path=str(path), class_names=("dark", "middle", "bright"))

    found = training_samples(part, GRAY, (1, 1, 8, 8))

    assert recognised(path) == kind.removesuffix(".gz")
    counts = [images[labels == k].sum() for k in range(3)]
    assert [found.samples[found.labels == k].sum() for k in range(3)] == counts


def test_calibration_sets_are_not_trained_on(tmp_path: Path) -> None:
    for path in ("fashion-mnist:report", "fashion-mnist:tuning"):
        for kind in (None, "folder", "npz"):
            part = DataPart(path=path, kind=kind, class_names=("a", "b"))
            with pytest.raises(UsageError, match="no such file or folder"):
                training_samples(part, GRAY, (1, 1, 8, 8))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (["--regime", "frosen"], "did you mean 'frozen'"),
        (["--data", "nowhere"], "no such file or folder"),
        (["--calibration", "fashon-mnist"], "calibration set named"),
        (["--batch", "200"], "but there are 90 training samples"),
        (["--holdout", "120"], "cannot hold out 120"),
    ],
)
def test_wrong_choices_are_refused(tmp_path: Path, said: list[str], words: str) -> None:
    start = trained(tmp_path)

    result = CliRunner().invoke(command, [str(start), *said])

    assert isinstance(result.exception, UsageError)
    assert words in f"{result.exception} {result.exception.hint}"
    assert not (tmp_path / "tiny-trained.pt").exists()


def test_the_command_trains_a_checkpoint(tmp_path: Path) -> None:
    start = trained(tmp_path)
    said = ["--regime", "frozen", "--epochs", "2", "--batch", "16", "--no-flip", "--json"]
    said.append("--no-measure")

    done = CliRunner().invoke(command, [str(start), *said], catch_exceptions=False)

    assert json.loads(done.stdout)["checkpoint"] == str(tmp_path / "tiny-trained.pt")
    assert "epoch 2/2 (heads)" in done.stderr


def test_prototypes_are_set_and_nothing_is_trained(tmp_path: Path) -> None:
    start = trained(tmp_path)
    said = [str(start), "--regime", "prototypes", "--no-measure"]

    done = CliRunner().invoke(command, said, catch_exceptions=False)

    old, new = load_checkpoint(start), load_checkpoint(tmp_path / "tiny-trained.pt")
    state = new.model.state_dict()
    moved = {k for k, v in old.model.state_dict().items() if not torch.equal(v, state[k])}
    assert moved == {"heads.1.linear.weight", "heads.1.linear.bias"}
    assert new.metadata["regime"] == "prototypes"
    assert new.metadata["holdout_accuracies"]["exit0"] > 0.6
    assert "tiny-trained.pt: class means" in done.stdout
    wrong = CliRunner().invoke(command, [*said, "--epochs", "3"])
    assert "nothing is trained" in str(wrong.exception)


def test_a_recipe_makes_its_own_choices(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a recipe says itself"):
        train(recipe_in(tmp_path), choices=Choices(epochs=3))


def test_arrays_cannot_be_flipped(tmp_path: Path) -> None:
    data = np.random.default_rng(0).normal(size=(40, 2, 16)).astype(np.float32)
    np.savez(tmp_path / "w.npz", samples=data, labels=np.arange(40) % 2)
    kwargs = {"channels": 2, "classes": 2, "widths": [4, 4], "exits": [0]}
    save_checkpoint(
        tmp_path / "w.pt",
        model=conv1d(**kwargs),  # type: ignore[arg-type]
        arch="edgeexit.host.zoo:conv1d",
        kwargs=kwargs,
        input_shape=[1, 2, 16],
        class_names=["a", "b"],
        preprocess=Preprocess(kind="array", layout="as-is"),
    )
    choices = Choices(data=str(tmp_path / "w.npz"), epochs=1, batch=8, flip=True)

    with pytest.raises(UsageError, match="only be given noise"):
        train(tmp_path / "w.pt", choices=choices)
    with pytest.raises(UsageError, match="where are the training samples"):
        train(tmp_path / "w.pt", choices=replace(choices, data=None))
    assert train(tmp_path / "w.pt", choices=replace(choices, flip=None)).path.exists()


def test_a_plain_state_dict_is_trained_with_a_set_that_says_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_code.py").write_text(
        "from edgeexit.host.zoo import resnet\n"
        "def make():\n"
        "    return resnet(channels=1, classes=10, size=[28, 28], stem=[2, 2], widths=[2, 4],"
        " blocks=[1, 1])\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    import my_code

    torch.save(my_code.make().state_dict(), tmp_path / "bare.pt")
    random = np.random.default_rng(0)
    pictures = random.integers(0, 256, (60, 28, 28, 1), dtype=np.uint8)
    np.savez("d.npz", samples=pictures, labels=np.arange(60) % 10)
    choices = Choices(data="d.npz", epochs=1, batch=8, calibration="fashion-mnist")

    result = train(tmp_path / "bare.pt", arch="my_code:make", choices=choices)

    found = load_checkpoint(result.path, arch="my_code:make")
    assert found.calibration_set == "fashion-mnist"
    assert len(found.class_names) == 10


def test_a_full_filter_gives_way_to_the_new_samples() -> None:
    few = np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1)
    many = np.random.default_rng(0).integers(0, 256, (4000, 1, 2, 2), dtype=np.uint8)
    before = seen(few, None)

    assert seen(few, before) == before
    both = Bloom.from_bytes(seen(many[:100], before))
    assert both.hits(sample_digests(few)).all()
    assert both.hits(sample_digests(many[:100])).all()
    assert seen(many, before) == seen(many, None)

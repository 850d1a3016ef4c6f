"""Training: recipes are read strictly, an interruption changes nothing, the best epoch is kept."""

import gzip
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

from edgeexit.cli.train import command  # noqa: E402
from edgeexit.errors import BadFile, UsageError  # noqa: E402
from edgeexit.host.checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from edgeexit.host.feed import augment, split_holdout, training_samples  # noqa: E402
from edgeexit.host.recipe import Augmentation, read_recipe  # noqa: E402
from edgeexit.host.train import Step, train  # noqa: E402
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

    done = CliRunner().invoke(command, [str(recipe), "--json"], catch_exceptions=False)
    again = CliRunner().invoke(command, [str(recipe)], catch_exceptions=False)

    document: dict[str, Any] = json.loads(done.stdout)
    assert document["checkpoint"] == str(tmp_path / "tiny.pt")
    assert list(document["holdout_accuracies"]) == ["exit0", "exit1"]
    assert "epoch 3/3" in done.stderr
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

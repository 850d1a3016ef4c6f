"""Checkpoints: what is written can be read, what is hostile or damaged is refused in one line."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeexit.calibration import make_set  # noqa: E402
from edgeexit.errors import BadFile, UsageError  # noqa: E402
from edgeexit.host.checkpoint import (  # noqa: E402
    load_checkpoint,
    save_again,
    save_checkpoint,
)
from edgeexit.host.model import attach  # noqa: E402
from edgeexit.host.purpose import Purpose  # noqa: E402
from edgeexit.host.zoo import resnet  # noqa: E402
from edgeexit.overlap import Bloom, sample_digests  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402

pytestmark = pytest.mark.host

KWARGS = {
    "channels": 1,
    "classes": 3,
    "stem": [4],
    "widths": [4, 8],
    "blocks": [1, 1],
    "size": [8, 8],
}
PREPROCESS = Preprocess(kind="image", size=(8, 8), color="gray", scale=1 / 255)
ARCH = "edgeexit.host.zoo:resnet"


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def saved(path: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "model": resnet(**KWARGS),
        "arch": ARCH,
        "kwargs": KWARGS,
        "input_shape": [1, 1, 8, 8],
        "class_names": ["a", "b", "c"],
        "preprocess": PREPROCESS,
        "calibration_set": "some-set",
    }
    save_checkpoint(path, **(values | changes))
    return path


def altered(path: Path, **changes: Any) -> Path:
    """A sound checkpoint with some of its keys replaced."""
    saved(path)
    document = torch.load(path, weights_only=True) | changes
    torch.save(document, path)
    return path


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    net = resnet(**KWARGS).eval()
    samples = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8, 1)
    seen = Bloom.of(sample_digests(samples))
    path = saved(tmp_path / "n.pt", model=net, training_digests=seen.to_bytes(), metadata={"s": 1})

    found = load_checkpoint(path)

    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        for one, other in zip(net(image), found.model(image), strict=True):
            assert torch.equal(one, other)
    assert found.exits == ("exit0", "exit1")
    assert found.class_names == ("a", "b", "c")
    assert found.input_shape == (1, 1, 8, 8)
    assert found.preprocess == PREPROCESS
    assert found.calibration_set == "some-set"
    assert found.training_bloom == seen.to_bytes()
    assert found.metadata == {"s": 1}
    assert not found.model.training


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    net = resnet(**KWARGS)

    one, other = saved(tmp_path / "a.pt", model=net), saved(tmp_path / "b.pt", model=net)

    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    "arch",
    ["subprocess:check_output", "os:system", "mine:net", "torch.hub:load"],
)
def test_a_file_may_not_name_foreign_code(tmp_path: Path, arch: str) -> None:
    path = altered(tmp_path / "n.pt", arch=arch, kwargs={"args": ["touch", "/tmp/never"]})

    with pytest.raises(BadFile) as refusal:
        load_checkpoint(path)

    assert refusal.value.hint is not None
    assert f"--arch {arch}" in refusal.value.hint


@pytest.mark.parametrize(
    "arch",
    ["edgeexit.host.train:train", "edgeexit.files:write_file", "edgeexit.host.zoo:ZOO", "edgeexit"],
)
def test_a_file_may_only_name_factories_of_edgeexit(tmp_path: Path, arch: str) -> None:
    with pytest.raises(BadFile, match="no network of edgeexit"):
        load_checkpoint(altered(tmp_path / "n.pt", arch=arch))


def test_foreign_code_is_followed_when_the_user_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_net_code.py").write_text(
        "from edgeexit.host.zoo import resnet\n"
        f"def make(): return resnet(**{KWARGS!r})\n"
        "def nothing(): return 3\n"
        "def broken(): raise KeyError('x')\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    path = altered(tmp_path / "n.pt", arch="my_net_code:make", kwargs={})

    assert load_checkpoint(path, arch="my_net_code:make").arch == "my_net_code:make"
    with pytest.raises(UsageError, match="names arch"):
        load_checkpoint(path, arch="my_net_code:other")
    plain = tmp_path / "plain.pt"
    torch.save(resnet(**KWARGS).state_dict(), plain)
    with pytest.raises(UsageError, match="which classes"):
        load_checkpoint(plain, arch="my_net_code:make")
    purpose = Purpose(class_names=("a", "b", "c"), preprocess=PREPROCESS)
    found = load_checkpoint(plain, arch="my_net_code:make", purpose=purpose)
    assert found.input_shape == (1, 1, 8, 8)
    assert found.exits == ("exit0", "exit1")
    for wrong in ("nothing", "broken", "number", "absent"):
        with pytest.raises(UsageError):
            load_checkpoint(plain, arch=f"my_net_code:{wrong}", purpose=purpose)


def test_a_plain_state_dict_needs_an_arch(tmp_path: Path) -> None:
    path = tmp_path / "plain.pt"
    torch.save(resnet(**KWARGS).state_dict(), path)

    with pytest.raises(UsageError) as refusal:
        load_checkpoint(path)

    assert "--arch" in str(refusal.value.hint)


def test_a_pickled_network_is_refused_with_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save(resnet(**KWARGS), path)

    with pytest.raises(BadFile, match="would run code") as refusal:
        load_checkpoint(path)

    assert "save_checkpoint(" in str(refusal.value.hint)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path / "n.pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])

    with pytest.raises(BadFile):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"edgeexit": 2},
        {"edgeexit": "1"},
        {"edgeexit": True},
        {"arch": 3},
        {"kwargs": {"depth": 10**12}},
        {"kwargs": {"widths": [10**9, 4, 4]}},
        {"kwargs": {"nonsense": 1}},
        {"kwargs": {"widths": None}},
        {"kwargs": KWARGS | {"classes": 4}},
        {"state_dict": {}},
        {"state_dict": {"stem.0.0.weight": "text"}},
        {"state_dict": 3},
        {"input_shape": [1, 3, 8, 8]},
        {"input_shape": [2, 1, 8, 8]},
        {"input_shape": [1, 1, 10**9, 10**9]},
        {"class_names": ["a", "b"]},
        {"class_names": ["a", "a", "b"]},
        {"preprocess": {"kind": "image"}},
        {"training_digests": torch.zeros(3, dtype=torch.uint8)},
        {"training_digests": torch.zeros(3)},
        {"calibration_set": 3},
    ],
)
def test_wrong_contents_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadFile):
        load_checkpoint(altered(tmp_path / "n.pt", **changes))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    state = resnet(**KWARGS).state_dict()
    state["stem.0.0.weight"][0] = value

    with pytest.raises(BadFile, match="NaN or infinity"):
        load_checkpoint(altered(tmp_path / "n.pt", state_dict=state))
    with pytest.raises(BadFile, match="NaN or infinity"):
        saved(tmp_path / "m.pt", model=None, state_dict=state)
    assert not (tmp_path / "m.pt").exists()


def test_weights_that_claim_more_than_the_file_holds_are_refused(tmp_path: Path) -> None:
    state = resnet(**KWARGS).state_dict()
    state["stem.0.0.weight"] = torch.zeros(1).expand(4, 1, 3, 3)

    with pytest.raises(BadFile, match="in full"):
        load_checkpoint(altered(tmp_path / "n.pt", state_dict=state))


def test_an_archive_that_grows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))

    with pytest.raises(BadFile, match="unpacked"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {}, torch.zeros(3)])
def test_other_things_in_a_pt_file_are_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / "other.pt"
    torch.save(content, path)

    with pytest.raises(BadFile):
        load_checkpoint(path)


def test_an_absent_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_checkpoint(tmp_path / "absent.pt")


def test_save_needs_weights_and_plain_values(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither"):
        saved(tmp_path / "n.pt", model=None)
    with pytest.raises(UsageError, match="plain values"):
        saved(tmp_path / "n.pt", metadata={"x": io.BytesIO()})


def test_a_text_file_is_no_checkpoint_and_nothing_unsafe_is_advised(tmp_path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("format = 1\n")
    with pytest.raises(BadFile, match="is no PyTorch file") as caught:
        load_checkpoint(path)
    assert "edgeexit train" in str(caught.value.hint)


PLAIN = KWARGS | {"exits": []}
ATTACHED = {"at": ["stem", "blocks.0"], "head": "average", "widths": [[], []]}


def with_exits(path: Path, **changes: Any) -> Path:
    """A checkpoint of a plain ResNet with two exits attached; *changes* replace its keys."""
    given = ATTACHED | changes
    net = attach(
        resnet(**PLAIN),
        ATTACHED["at"],
        input_shape=[1, 1, 8, 8],
        head=ATTACHED["head"],
        widths=ATTACHED["widths"],
    )
    saved(path, model=net, kwargs=PLAIN, attached=ATTACHED)
    document = torch.load(path, weights_only=True) | {"attached": given}
    torch.save(document, path)
    return path


@pytest.mark.parametrize(
    ("head", "widths"), [("average", [[], []]), ("convs", [[4], [3, 5]]), ("pooled", [[], []])]
)
def test_attached_exits_come_back(tmp_path: Path, head: str, widths: list[list[int]]) -> None:
    at = ["stem", "blocks.0"]
    net = attach(resnet(**PLAIN), at, input_shape=[1, 1, 8, 8], head=head, widths=widths).eval()
    attached = {"at": at, "head": head, "widths": widths}
    path = saved(tmp_path / "n.pt", model=net, kwargs=PLAIN, attached=attached)

    found = load_checkpoint(path)

    image = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for one, other in zip(net(image), found.model(image), strict=True):
            assert torch.equal(one, other)
    assert found.exits == ("exit0", "exit1", "exit2")
    assert found.attached == attached


def test_exits_attached_to_foreign_code_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import torch\n"
        "from edgeexit.host.zoo import resnet\n"
        f"def make(): return resnet(**{PLAIN!r})\n"
        "def without_memory():\n"
        "    with torch.device('meta'): return make()\n"
        "class Half(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        with torch.device('meta'): self.net = make()\n"
        "        self.scale = torch.nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x): return self.net(x * self.scale)[0]\n"
    )
    (tmp_path / "my_plain_code.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    net = attach(resnet(**PLAIN), ATTACHED["at"], input_shape=[1, 1, 8, 8]).eval()
    image = torch.randn(1, 1, 8, 8)
    for factory, prefix in (("make", ""), ("without_memory", ""), ("Half", "net.")):
        arch = f"my_plain_code:{factory}"
        at = [prefix + name for name in ATTACHED["at"]]
        state = {
            name.replace("backbone.", f"backbone.{prefix}"): tensor
            for name, tensor in net.state_dict().items()
        }
        if prefix:
            state["backbone.scale"] = torch.ones(1)
        path = saved(
            tmp_path / "n.pt",
            model=None,
            state_dict=state,
            arch=arch,
            kwargs={},
            attached=ATTACHED | {"at": at},
        )

        found = load_checkpoint(path, arch=arch)

        with torch.no_grad():
            for one, other in zip(net(image), found.model(image), strict=True):
                assert torch.equal(one, other)


def test_a_foreign_network_that_stays_without_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_empty_code.py").write_text(
        "import torch\n"
        "class Empty(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        lost = torch.zeros(1, device='meta')\n"
        "        self.register_buffer('lost', lost, persistent=False)\n"
        "        self.layer = torch.nn.Linear(64, 3)\n"
        "    def forward(self, x): return self.layer(x.flatten(1)) + self.lost\n"
    )
    monkeypatch.chdir(tmp_path)
    state = torch.nn.ModuleDict({"layer": torch.nn.Linear(64, 3)}).state_dict()
    path = saved(
        tmp_path / "n.pt", model=None, state_dict=state, arch="my_empty_code:Empty", kwargs={}
    )

    with pytest.raises(UsageError, match="leaves lost without memory"):
        load_checkpoint(path, arch="my_empty_code:Empty")


@pytest.mark.parametrize(
    "changes",
    [
        {"at": ["stem"]},
        {"at": ["stem", "nowhere"]},
        {"at": ["stem", ""]},
        {"at": ["stem", "stem"]},
        {"at": ["blocks.0", "stem"]},
        {"at": ["stem", "heads"]},
        {"at": ["stem", 3]},
        {"at": "stem"},
        {"at": [], "widths": []},
        {"at": ["stem"] * 1000, "widths": [[]] * 1000},
        {"head": "nonsense"},
        {"head": 3},
        {"head": "convs"},
        {"widths": [[]]},
        {"widths": [[8], []]},
        {"widths": [[10**9], [1]], "head": "convs"},
        {"widths": [[0], [1]], "head": "convs"},
        {"widths": [[True], [1]], "head": "convs"},
        {"widths": [[1.5], [1]], "head": "convs"},
        {"widths": [[4096] * 8, [4096] * 8], "head": "convs"},
        {"widths": [[1] * 9, [1]], "head": "convs"},
        {"widths": None},
        {"more": 1},
        {"surgery": 3},
        {"surgery": [{"remove": "nowhere"}]},
        {"surgery": [{"remove": "blocks.0"}]},
    ],
)
def test_wrong_attached_exits_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(BadFile, match=r"attached|state_dict"):
        load_checkpoint(with_exits(tmp_path / "n.pt", **changes))


def test_exits_cannot_be_attached_to_a_network_that_has_some(tmp_path: Path) -> None:
    with pytest.raises(BadFile, match="2 exits already"):
        load_checkpoint(altered(tmp_path / "n.pt", attached=ATTACHED))


def test_a_changed_network_keeps_what_its_checkpoint_says(tmp_path: Path) -> None:
    seen = Bloom.of(sample_digests(np.zeros((3, 8, 8, 1), np.uint8)))
    first = saved(
        tmp_path / "a.pt",
        training_digests=seen.to_bytes(),
        metadata={"seed": 1, "epochs": 2, "best_epoch": 3},
    )
    old = load_checkpoint(first)
    other = resnet(**KWARGS)

    save_again(tmp_path / "b.pt", old, other, metadata={"epochs": 5, "best_epoch": None})

    new = load_checkpoint(tmp_path / "b.pt")
    assert new.metadata == {"seed": 1, "epochs": 5}
    kept = ("arch", "kwargs", "input_shape", "class_names", "preprocess", "calibration_set")
    for name in (*kept, "training_bloom", "attached"):
        assert getattr(new, name) == getattr(old, name)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, new.model.state_dict()[name])


def test_saving_an_unchanged_network_again_gives_equal_bytes(tmp_path: Path) -> None:
    path = with_exits(tmp_path / "a.pt")
    found = load_checkpoint(path)
    save_again(tmp_path / "b.pt", found, found.model)

    save_again(tmp_path / "c.pt", load_checkpoint(tmp_path / "b.pt"), found.model)

    assert (tmp_path / "b.pt").read_bytes() == (tmp_path / "c.pt").read_bytes()


@pytest.mark.parametrize("kind", ["image", "array"])
def test_a_set_says_what_a_plain_state_dict_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rng = np.random.default_rng(0)
    samples = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
    if kind == "array":
        samples = rng.standard_normal((60, 1, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "source.npz", samples=samples, labels=np.arange(60) % 3)
    monkeypatch.chdir(tmp_path)
    preprocess = PREPROCESS if kind == "image" else Preprocess(kind="array", layout="as-is")
    for folder in ("here", "calibration/there", "elsewhere/far"):
        make_set(tmp_path / "source.npz", tmp_path / folder, preprocess=preprocess)
    (tmp_path / f"my_{kind}_code.py").write_text(
        f"from edgeexit.host.zoo import resnet\ndef make(): return resnet(**{KWARGS!r})\n"
    )
    torch.save(resnet(**KWARGS).state_dict(), "plain.pt")

    for given, kept in (("here", "here"), ("there", "there"), ("elsewhere/far", "elsewhere/far")):
        purpose = Purpose.of_set(given)
        found = load_checkpoint("plain.pt", arch=f"my_{kind}_code:make", purpose=purpose)

        assert found.input_shape == (1, 1, 8, 8)
        assert found.class_names == ("0", "1", "2")
        assert found.preprocess == preprocess
        assert found.calibration_set == kept
    assert Purpose.of_set("./here").calibration_set == "here"

"""Facts about the road from a checkpoint to a bundle, and about everything that it refuses."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from edgeexit.calibration import make_set
from edgeexit.cli import convert as cli
from edgeexit.cli import entry
from edgeexit.cli.steps import Steps
from edgeexit.errors import (
    BadFile,
    EdgeExitError,
    ParityError,
    StorageError,
    Unsupported,
    UsageError,
)
from edgeexit.preprocess import Preprocess

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.host import answers, zoo  # noqa: E402
from edgeexit.host.checkpoint import save_checkpoint  # noqa: E402
from edgeexit.host.convert import convert  # noqa: E402
from edgeexit.host.gates import Asked, open_model  # noqa: E402
from edgeexit.host.purpose import read_labels  # noqa: E402
from edgeexit.host.torch_answers import torch_logits  # noqa: E402
from edgeexit.runtime import Runner  # noqa: E402
from tests import host_nets  # noqa: E402

SIZE = (16, 16)
CLASSES = [f"class {k}" for k in range(4)]
ARCH = "edgeexit.host.zoo:resnet"
KWARGS = {"depth": 8, "channels": 1, "classes": 4, "size": SIZE, "widths": (4, 8, 8), "stem": (4,)}
PREPROCESS = Preprocess(
    kind="image", size=SIZE, color="gray", scale=1 / 255, mean=(0.4,), std=(0.3,), layout="nchw"
)


def save(path: Path, **changes) -> Path:
    """A checkpoint of a settled ResNet-8; *changes* replace arguments of save_checkpoint."""
    torch.manual_seed(0)
    model = host_nets.settled(
        zoo.resnet(**KWARGS),
        answers.RealSamples(host_nets.pictures(80, size=SIZE), PREPROCESS),
    )
    given = {
        "model": model,
        "arch": ARCH,
        "kwargs": {**KWARGS, "size": [*SIZE], "widths": [4, 8, 8], "stem": [4]},
        "input_shape": (1, 1, *SIZE),
        "class_names": CLASSES,
        "preprocess": PREPROCESS,
    }
    save_checkpoint(path, **{**given, **changes})
    return path


def save_samples(path: Path, count: int = 80, **arrays) -> Path:
    given = {
        "samples": host_nets.pictures(count, size=SIZE),
        "labels": np.arange(count) % 4,
        **arrays,
    }
    np.savez(path, **given)
    return path


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("convert")
    save(folder / "net.pt")
    save_samples(folder / "some.npz")
    return folder


@pytest.fixture(scope="module")
def bundle(work):
    return convert(work / "net.pt", work / "net.edgeexit", work / "some.npz")


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_checkpoint_becomes_a_bundle_whose_runner_agrees_with_torch(bundle, work) -> None:
    model = torch.load(work / "net.pt", weights_only=True)
    assert len(bundle.exits) == 3
    assert bundle.class_names == tuple(CLASSES)
    assert bundle.calibration_set is None
    assert len(bundle.ranges_digests) == 80
    assert bundle.provenance["arch"] == model["arch"]
    network = zoo.resnet(**KWARGS)
    network.load_state_dict(model["state_dict"])
    reals = answers.RealSamples(host_nets.pictures(40, size=SIZE, seed=9), PREPROCESS)
    expected = list(torch_logits(network, reals).values())
    with Runner(bundle, policy=None) as runner:
        found = np.stack([runner.logits(sample) for sample in reals.samples], axis=1)
    for k in range(3):
        assert (found[k].argmax(axis=1) == expected[k].argmax(axis=1)).mean() >= 0.8


def test_the_float_scheme_runs_through_the_same_runner(work) -> None:
    result = convert(work / "net.pt", work / "float.edgeexit", work / "some.npz", scheme="float")

    assert result.input.dtype == "float32"
    with Runner(result, policy=None) as runner:
        assert runner(host_nets.pictures(1, size=SIZE)[0]).logits.shape == (4,)


def test_two_conversions_in_different_surroundings_give_the_same_bytes(bundle, work) -> None:
    other = work / "elsewhere"
    other.mkdir()
    save_samples(other / "some.npz")
    (other / "net.pt").write_bytes((work / "net.pt").read_bytes())
    script = "import os, sys; os.umask(0o077); from edgeexit.cli import entry; sys.exit(entry())"
    done = subprocess.run(
        [sys.executable, "-c", script, "convert", "net.pt", "--calibration", "some.npz", "--json"],
        cwd=other,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["digest"] == bundle.digest
    assert files_of(other / "net.edgeexit") == files_of(bundle.path)
    steps = ["load", "lower", "compare with torch", "quantize", "cut and compare", "write"]
    assert list(document["seconds"]) == steps
    assert [line[:20].strip() for line in done.stderr.splitlines() if line.endswith(" s")] == steps


def test_the_table_shows_each_exit_and_the_ranges_that_won(bundle) -> None:
    text = cli._table(bundle, Steps())

    assert all(name in text for name in bundle.exits)
    assert f"{bundle.provenance['ranges']['chosen']}, 80 samples of some" in text
    assert "outside XNNPACK      none" in text


def _nan(folder: Path) -> dict:
    model = zoo.resnet(**KWARGS)
    next(iter(model.parameters())).data.fill_(float("nan"))
    state = {"edgeexit": 1, "arch": ARCH, "kwargs": KWARGS, "state_dict": model.state_dict()}
    return _forged(folder, **state)


def _forged(folder: Path, **changes) -> dict:
    document = torch.load(folder / "net.pt", weights_only=True)
    torch.save({**document, **changes}, folder / "bad.pt")
    return {"model_path": folder / "bad.pt"}


def _truncated(folder: Path) -> dict:
    (folder / "bad.pt").write_bytes((folder / "net.pt").read_bytes()[:-300])
    return {"model_path": folder / "bad.pt"}


def _pickled(folder: Path) -> dict:
    torch.save(torch.nn.Linear(2, 2), folder / "bad.pt")
    return {"model_path": folder / "bad.pt"}


def _plain(folder: Path) -> dict:
    torch.save(zoo.resnet(**KWARGS).state_dict(), folder / "bad.pt")
    return {"model_path": folder / "bad.pt"}


def _samples(folder: Path, **arrays) -> dict:
    return {"calibration": save_samples(folder / "bad.npz", **arrays)}


REFUSED = {
    "model absent": (lambda f: {"model_path": f / "none.pt"}, UsageError),
    "model truncated": (_truncated, BadFile),
    "wrong format": (lambda f: _forged(f, edgeexit=99), BadFile),
    "NaN weights": (_nan, BadFile),
    "pickled module": (_pickled, BadFile),
    "plain state_dict": (_plain, UsageError),
    "state_dict with arch, no set": (lambda f: {**_plain(f), "arch": ARCH}, EdgeExitError),
    "foreign code": (lambda f: _forged(f, arch="subprocess:check_output"), BadFile),
    "wrong input shape": (lambda f: _forged(f, input_shape=[1, 3, 16, 16]), BadFile),
    "classes miscounted": (lambda f: _forged(f, class_names=["a", "b"]), EdgeExitError),
    "no set named": (lambda f: {"calibration": None}, UsageError),
    "unknown set": (lambda f: {"calibration": "fashion-mnits"}, UsageError),
    "one split": (lambda f: {"calibration": "fashion-mnist:report"}, UsageError),
    "unknown scheme": (lambda f: {"scheme": "int4"}, UsageError),
    "no samples": (lambda f: _samples(f, samples=np.zeros((0, 16, 16, 1), np.uint8)), BadFile),
    "too few samples": (lambda f: _samples(f, count=5), BadFile),
    "sample shape": (lambda f: _samples(f, samples=np.zeros((80, 7), np.uint8)), BadFile),
    "sample dtype": (
        lambda f: _samples(f, samples=np.zeros((80, 16, 16, 1), np.complex64)),
        EdgeExitError,
    ),
    "more classes": (lambda f: _samples(f, labels=np.arange(80) % 9), EdgeExitError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(case: str, work, tmp_path) -> None:
    make, kind = REFUSED[case]
    (tmp_path / "net.pt").write_bytes((work / "net.pt").read_bytes())
    given = {"model_path": tmp_path / "net.pt", "calibration": work / "some.npz", **make(tmp_path)}

    with pytest.raises(kind) as refusal:
        convert(out=tmp_path / "out.edgeexit", **given)

    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code in (2, 3, 4)
    assert not list(tmp_path.glob("*out*"))


def test_few_answers_as_floats_are_a_warning(work, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "FEW", 1.01)
    given = ["convert", str(work / "net.pt"), "--calibration", str(work / "some.npz")]

    assert entry(given) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert [line.split(":")[1] for line in told] == [" exit exit0", " exit exit1", " exit exit2"]


def test_answers_that_prove_nothing_stop_the_conversion(work, tmp_path) -> None:
    state = zoo.resnet(**KWARGS).state_dict()
    for name, tensor in state.items():
        if "linear.weight" in name:
            tensor.zero_()
    save(tmp_path / "flat.pt", model=None, state_dict=state)

    with pytest.raises(ParityError, match="prove nothing"):
        convert(tmp_path / "flat.pt", tmp_path / "out.edgeexit", work / "some.npz")
    assert not (tmp_path / "out.edgeexit").exists()


def test_a_set_says_what_a_plain_state_dict_is_for(tmp_path, monkeypatch) -> None:
    reals = host_nets.rows(2000)
    np.savez(tmp_path / "rows.npz", samples=reals.samples, labels=np.arange(2000) % 3)
    make_set(tmp_path / "rows.npz", tmp_path / "rows", preprocess=host_nets.ROW)
    torch.manual_seed(0)
    torch.save(host_nets.Rows().state_dict(), tmp_path / "bare.pt")
    monkeypatch.chdir(tmp_path)

    bundle = convert("bare.pt", calibration="rows", arch="tests.host_nets:Rows")

    assert bundle.class_names == ("0", "1", "2")
    assert bundle.calibration_set is not None


def test_a_checkpoint_that_speaks_for_itself_is_not_contradicted(work, tmp_path) -> None:
    (tmp_path / "own.txt").write_text("\n".join(CLASSES))
    (tmp_path / "other.txt").write_text("\n".join(reversed(CLASSES)))
    path = work / "net.pt"

    own = open_model(path, Asked(labels=read_labels(tmp_path / "own.txt")))
    assert own.class_names == tuple(CLASSES)
    with pytest.raises(UsageError, match="says otherwise than --labels"):
        open_model(path, Asked(labels=read_labels(tmp_path / "other.txt")))
    with pytest.raises(UsageError, match="says otherwise than --preprocess"):
        open_model(path, Asked(preprocess=replace(own.preprocess, scale=0.5)))


def test_a_foreign_folder_is_never_replaced(work, tmp_path) -> None:
    (tmp_path / "out.edgeexit").mkdir()
    (tmp_path / "out.edgeexit" / "thesis.txt").write_text("mine")

    with pytest.raises(UsageError, match="not a bundle"):
        convert(work / "net.pt", tmp_path / "out.edgeexit", work / "some.npz")


def test_an_operator_without_counterpart_is_named(work, tmp_path, monkeypatch) -> None:
    (tmp_path / "odd_net.py").write_text(
        "import torch\n"
        "from edgeexit.host import zoo\n"
        "class Odd(torch.nn.Module):\n"
        "    def __init__(self):\n"
        f"        super().__init__(); self.net = zoo.resnet(**{KWARGS!r})\n"
        "    def forward(self, x):\n"
        "        return [torch.lgamma(y.abs() + 1) for y in self.net(x)]\n"
    )
    monkeypatch.chdir(tmp_path)
    state = {f"net.{k}": v for k, v in zoo.resnet(**KWARGS).state_dict().items()}
    _forged_from(work / "net.pt", tmp_path / "odd.pt", state)

    with pytest.raises(Unsupported, match="lgamma"):
        convert("odd.pt", calibration=work / "some.npz", arch="odd_net:Odd")
    assert not list(tmp_path.glob("*.edgeexit"))


def _forged_from(source: Path, target: Path, state: dict) -> None:
    document = torch.load(source, weights_only=True)
    torch.save({**document, "arch": "odd_net:Odd", "kwargs": {}, "state_dict": state}, target)


def test_a_full_disk_leaves_nothing_half_written(work, tmp_path, monkeypatch) -> None:
    # A limit on the length of a file stands in for the disk: writing fails in the same place.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut short, for all
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step: str, done: float) -> None:
        if step == "write":
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))

    try:
        with pytest.raises(StorageError):
            convert(
                work / "net.pt",
                tmp_path / "out.edgeexit",
                work / "some.npz",
                scheme="float",
                on_step=fill,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_network_with_one_logit_an_exit_answers_for_two_classes(tmp_path) -> None:
    torch.manual_seed(0)
    reals = answers.RealSamples(host_nets.pictures(80, size=SIZE), PREPROCESS)
    kwargs = {**KWARGS, "classes": 1}
    model = host_nets.settled(zoo.resnet(**kwargs), reals)
    plain = {**kwargs, "size": [*SIZE], "widths": [4, 8, 8], "stem": [4]}
    names = ["off", "on"]
    save(tmp_path / "net.pt", model=model, kwargs=plain, class_names=names)
    some = save_samples(tmp_path / "some.npz", labels=np.arange(80) % 2)

    result = convert(tmp_path / "net.pt", tmp_path / "net.edgeexit", some)

    z = torch_logits(model, reals)
    with Runner(result, policy=None) as runner:
        found = np.stack([runner.logits(sample) for sample in reals.samples], axis=1)
    for logits, wanted in zip(found, z.values(), strict=True):
        assert (logits[:, 0] == 0).all()
        assert np.abs(logits[:, 1] - wanted[:, 0]).max() <= 0.1 * np.ptp(wanted)
    with pytest.raises(BadFile, match=r"\[1, 2\], expected \[1, 4\] for 4 class_names"):
        save(tmp_path / "many.pt", model=model, kwargs=plain)

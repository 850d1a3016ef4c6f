"""Facts about torch programs (.pt2) and TorchScript: trusted or refused, and their own answers."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from edgeexit.cli import entry
from edgeexit.errors import BadFile, Unsupported, UsageError
from edgeexit.host import apart
from edgeexit.host.answers import check_parity, tflite_logits
from edgeexit.host.gates import Asked, open_model

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.host import program_child  # noqa: E402
from edgeexit.host.torch_answers import torch_logits  # noqa: E402
from tests import host_nets  # noqa: E402

CLASSES = tuple(f"class {k}" for k in range(5))
TRUSTED = Asked(labels=CLASSES, preprocess=host_nets.GRAY, is_pickle_trusted=True)


class TwoInputs(torch.nn.Module):
    def forward(self, x, y):
        return [x + y]


@pytest.fixture(scope="module")
def net():
    return host_nets.conv_net(count=60)


@pytest.fixture(scope="module")
def files(net, tmp_path_factory) -> Path:
    """The settled net as .pt2 (any batch), as TorchScript, and in ways that are refused."""
    folder = tmp_path_factory.mktemp("programs")
    model, one = net[0], torch.zeros(1, 1, 12, 12)
    two = torch.zeros(2, 1, 12, 12)
    batch = {"x": {0: torch.export.Dim("batch", max=64)}}
    wide = {"x": {3: torch.export.Dim("width", min=8, max=64)}}
    kinds = {
        "net.pt2": (model, (two,), batch),
        "pair.pt2": (model, (two,), None),
        "wide.pt2": (host_nets.ConvNet().eval(), (one,), wide),
        "inputs.pt2": (TwoInputs(), (one, one), None),
    }
    for name, (module, inputs, dynamic) in kinds.items():
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic)
        torch.export.save(program, folder / name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch would rather have .pt2
        torch.jit.trace(model, (one,), strict=False).save(folder / "script.pt")
    (folder / "short.pt2").write_bytes((folder / "net.pt2").read_bytes()[:5000])
    return folder


@pytest.mark.parametrize("name", ["net.pt2", "script.pt", "net.pth"])
def test_nothing_opens_it_before_it_is_trusted(files, name, monkeypatch) -> None:
    if name == "net.pth":
        (files / name).write_bytes((files / "net.pt2").read_bytes())
    monkeypatch.setattr(apart, "run", lambda *_, **__: pytest.fail("it was opened"))

    with pytest.raises(BadFile, match="holds a program") as caught:
        open_model(files / name, Asked(labels=CLASSES, preprocess=host_nets.GRAY))
    assert "--trust-pickle" in (caught.value.hint or "")
    assert len((caught.value.hint or "").splitlines()) == 4
    assert entry(["convert", str(files / name)]) == 3


def test_a_trusted_program_is_lowered_in_a_child(files, net, monkeypatch) -> None:
    model, reals = net
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("it was opened here"))
    opened = open_model(files / "net.pt2", TRUSTED)
    lowered = opened.lower()

    assert opened.input_shape == (1, 1, 12, 12)
    assert list(lowered.exits) == ["small", "middle", "final"]
    found = tflite_logits(lowered.data, lowered.exits, reals)
    check_parity(torch_logits(model, reals), found, reals)


def test_what_sigterm_ends_leaves_nothing_behind(files, tmp_path) -> None:
    here, temporary = tmp_path / "here", tmp_path / "temporary"
    for folder in (here, temporary):
        folder.mkdir()
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    rows = [f"{key} = {json.dumps(v)}" for key, v in host_nets.GRAY.to_document().items()]
    (tmp_path / "gray.toml").write_text("\n".join(rows))
    np.savez(tmp_path / "some.npz", samples=host_nets.pictures(20))
    given = ["--labels", "../labels.txt", "--preprocess", "../gray.toml", "--trust-pickle"]
    given += ["--calibration", "../some.npz"]
    program = subprocess.Popen(
        [sys.executable, "-m", "edgeexit", "convert", str(files / "net.pt2"), *given],
        cwd=here,
        env={**os.environ, "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(temporary.iterdir()):
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.001)
    program.terminate()

    assert program.wait(60) == 143
    program.stderr.close()
    assert not list(temporary.iterdir())
    assert not list(here.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net.pt2", "script.pt"])
def test_it_becomes_a_bundle(files, net, tmp_path, name) -> None:
    (tmp_path / "labels.txt").write_text("\n".join(CLASSES))
    (tmp_path / "net.toml").write_text(
        'kind = "image"\nsize = [12, 12]\ncolor = "gray"\nscale = 0.00392156862745098\n'
        'mean = [0.4]\nstd = [0.3]\nlayout = "nchw"\n'
    )
    np.savez(tmp_path / "some.npz", samples=net[1].samples)
    told = ["--labels", "labels.txt", "--preprocess", "net.toml", "--calibration", "some.npz"]
    command = [sys.executable, "-P", "-m", "edgeexit", "convert", str(files / name), *told]
    command += ["--trust-pickle", "--json", "-o", "out.edgeexit"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["exits"] == ["small", "middle", "final"]


def handed(files: Path, name: str, folder: Path, **changes) -> dict:
    """Lay *name* into *folder* as the gate does; returns what the child is told."""
    (folder / program_child.GIVEN).write_bytes((files / name).read_bytes())
    told = {"preprocess": host_nets.GRAY.to_document(), "input_shape": None, "exits": []}
    return {"where": name, **told, **changes}


def test_torchscript_answers_as_the_network_that_it_was_traced_from(files, net, tmp_path) -> None:
    model, reals = net
    told = handed(files, "script.pt", tmp_path, exits=["middle", "final"])
    np.save(tmp_path / program_child.SAMPLES, reals.samples)

    found = program_child.lower(tmp_path, **told)
    keys = program_child.answer(tmp_path, **told)

    own = torch_logits(model, reals)
    answers = np.load(tmp_path / program_child.ANSWERS)
    data = (tmp_path / program_child.LITE).read_bytes()
    logits = tflite_logits(data, found["exits"], reals)
    assert list(found["exits"]) == list(keys) == ["middle", "final"]
    for name, key in keys.items():
        np.testing.assert_allclose(answers[key], own[name], atol=1e-5)
    check_parity({name: own[name] for name in keys}, logits, reals)


@pytest.mark.parametrize(
    ("name", "changes", "kind", "told"),
    [
        ("pair.pt2", {}, Unsupported, "input 'x' takes 2 samples at once"),
        ("wide.pt2", {}, Unsupported, r"input 'x' has the shape \[1, 1, 12, .*expected fixed"),
        ("inputs.pt2", {}, Unsupported, r"takes 2 inputs \(x, y\)"),
        (
            "script.pt",
            {"preprocess": host_nets.ROW.to_document()},
            UsageError,
            "does not say the shape",
        ),
    ],
)
def test_what_has_no_one_shape_is_refused_by_name(
    files, tmp_path, name, changes, kind, told
) -> None:
    with pytest.raises(kind, match=told):
        program_child.lower(tmp_path, **handed(files, name, tmp_path, **changes))


def test_another_exit_is_refused_with_those_that_there_are(files, tmp_path) -> None:
    told = handed(files, "net.pt2", tmp_path, exits=["finale"])
    with pytest.raises(UsageError, match="finale"):
        program_child.lower(tmp_path, **told)


def test_a_damaged_program_is_one_line(files, tmp_path) -> None:
    with pytest.raises(BadFile, match=r"short\.pt2: torch does not read it") as caught:
        program_child.lower(tmp_path, **handed(files, "short.pt2", tmp_path))
    assert "\n" not in str(caught.value)

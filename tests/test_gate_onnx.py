"""ONNX files come in: whole, by name, in the right order; or are refused in one line."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gate_venvs import CHECKOUT, gate_python, onnx_export, run_in

from edgeexit import cut
from edgeexit.bundle import load_bundle
from edgeexit.errors import BadFile, UsageError
from edgeexit.files import digest_of
from edgeexit.host import gates
from edgeexit.host.answers import RealSamples, tflite_logits
from edgeexit.host.gates.onnx import _layout
from edgeexit.host.onnx_child import external_path
from edgeexit.preprocess import Preprocess

SIZE = 16
PICTURES = Preprocess(
    kind="image", size=(SIZE, SIZE), scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)


# ---------------------------------------------------------------- without onnx2tf


def test_on_an_older_python_the_next_step_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08")
    monkeypatch.setattr(gates, "sys", SimpleNamespace(version_info=(3, 11)))

    with pytest.raises(UsageError, match=r"needs Python 3\.12 or newer, this is 3\.11") as refused:
        gates.open_model(tmp_path / "net.onnx", gates.Asked())

    assert refused.value.hint is not None
    assert 'pip install "edgeexit[onnx]"' in refused.value.hint


def test_the_extra_asks_for_nothing_on_an_older_python() -> None:
    """Without a marker pip would install an onnx2tf of years ago there."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]

    for wanted in project["optional-dependencies"]["onnx"]:
        requirement, _, marker = wanted.partition(";")
        assert "==" in requirement
        assert marker.strip() == "python_version >= '3.12'"


def test_external_data_lies_below_the_model(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "deep").mkdir(parents=True)
    inside, outside = home / "deep" / "weights.bin", tmp_path / "secret"
    inside.write_bytes(b"1234")
    outside.write_bytes(b"5678")
    (home / "also.bin").symlink_to(inside)
    (home / "leak.bin").symlink_to(outside)
    (home / "away").symlink_to(tmp_path)
    (home / "loop").symlink_to("loop")

    assert external_path(home, "deep/weights.bin", "net") == inside
    assert external_path(home, "deep/../also.bin", "net") == inside
    for location in (
        *("", "deep", ".", "nothing.bin", "../secret", "deep/../../secret", str(outside)),
        *(str(inside), "leak.bin", "away/secret", "loop", "deep/weights.bin\0", "x" * 5000),
    ):
        with pytest.raises(BadFile, match="net: external data"):
            external_path(home, location, "net")


def test_pictures_lie_channels_first_unless_only_the_other_fits() -> None:
    assert _layout((1, 3, SIZE, SIZE), PICTURES) == "nchw"
    assert _layout((1, SIZE, SIZE, 3), PICTURES) == "nhwc"
    assert _layout((1, 7, 7, 7), PICTURES) == "nchw"
    assert _layout((1, 3), Preprocess(kind="array", layout="as-is")) == "nchw"


def test_lowering_reaches_no_network() -> None:
    code = """
import socket
from edgeexit.host.onnx_child import _forbid_network
_forbid_network()
for name, arguments in (("create_connection", [("127.0.0.1", 9)]), ("getaddrinfo", ["a", 1])):
    try:
        getattr(socket, name)(*arguments)
    except PermissionError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "a conversion needs no network\n" * 2


@pytest.mark.host
def test_the_other_road_names_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeexit.host.gates.onnx import from_torch

    monkeypatch.delenv("EDGEEXIT_ONNX_PYTHON", raising=False)
    with pytest.raises(UsageError, match=r"\$EDGEEXIT_ONNX_PYTHON is not set") as refused:
        from_torch(None, (1, 3, 4, 4), PICTURES)  # type: ignore[arg-type]

    assert "edgeexit[onnx]" in (refused.value.hint or "")


# ---------------------------------------------------------------- with it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks, samples, labels and preprocessing; external data of one lies outside."""
    home = tmp_path_factory.mktemp("onnx") / "inner"
    home.mkdir()
    run_in("onnx", CHECKOUT / "tests" / "onnx_nets.py", home, cwd=home)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (80, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    pixels = np.clip(coarse + rng.integers(-20, 21, coarse.shape), 0, 255).astype(np.uint8)
    np.savez(home / "samples.npz", samples=pixels)
    (home / "labels.txt").write_text("a\nb\nc\nd\ne\n")
    rows = [f"{k} = {json.dumps(v)}" for k, v in PICTURES.to_document().items()]
    (home / "preprocess.toml").write_text("\n".join(rows))
    return home


def convert(folder: Path, name: str, *more: str, check: bool = True):
    told = ("--calibration", "samples.npz", "--labels", "labels.txt")
    told += ("--preprocess", "preprocess.toml", "--json", *more)
    command = ("-m", "edgeexit", "convert", f"{name}.onnx", *told)
    return run_in("onnx", *command, cwd=folder, check=check)


def float_answers(path: Path, count: int = 20) -> dict[str, np.ndarray]:
    """What a float bundle answers, here, to samples that no conversion saw."""
    bundle = load_bundle(path)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (count, SIZE, SIZE, 3)).astype(np.uint8)
    exits = {segment.exit: segment.outputs[0].name for segment in bundle.segments}
    data = (path / bundle.model).read_bytes()
    return tflite_logits(data, exits, RealSamples(pixels, bundle.preprocess))


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, np.ndarray]:
    convert(folder, "plain", "--scheme", "float", "-o", "plain-float.edgeexit")
    return float_answers(folder / "plain-float.edgeexit")


@pytest.mark.slow
def test_permuted_outputs_come_in_order_and_the_file_stays_as_it_is(folder: Path) -> None:
    before = {path: digest_of(path.read_bytes()) for path in folder.iterdir() if path.is_file()}

    made = json.loads(convert(folder, "plain", "-o", "plain-int8.edgeexit").stdout)

    bundle = load_bundle(folder / "plain-int8.edgeexit")
    assert list(bundle.exits) == made["exits"] == ["first", "second", "final"]
    assert bundle.scheme == "int8"
    assert bundle.input.shape == (1, SIZE, SIZE, 3)
    assert bundle.provenance["onnx"] == {"producer": "", "ir": 8, "opset": 17}
    assert bundle.provenance["versions"]["onnx2tf"] == "2.6.9"
    assert made["transposes"] == {"count": 0, "at_seams": 0}
    assert made["outside_xnnpack"] == {}
    after = {path: digest_of(path.read_bytes()) for path in folder.iterdir() if path.is_file()}
    assert after == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "exits"),
    [
        ("any_batch", ["first", "second", "final"]),
        ("channels_last", ["first", "second", "final"]),
        ("odd_names", ["exit_1", "input", "/head/out:0"]),
        ("old", ["first", "second", "final"]),
        ("softmax", ["first", "shares"]),
    ],
)
def test_the_same_network_written_otherwise_answers_the_same(
    folder: Path, plain: dict[str, np.ndarray], name: str, exits: list[str]
) -> None:
    made = json.loads(convert(folder, name, "--scheme", "float").stdout)

    found = float_answers(folder / f"{name}.edgeexit")
    assert made["exits"] == exits
    wanted = [plain[exit] for exit in ("first", "second", "final") if exit in plain]
    wanted = [wanted[0], wanted[-1]] if name == "softmax" else wanted
    for exit, logits in zip(exits, wanted, strict=True):
        np.testing.assert_allclose(found[exit], logits, atol=1e-4 * np.abs(logits).max())


@pytest.mark.slow
def test_exits_may_be_inner_tensors(folder: Path, plain: dict[str, np.ndarray]) -> None:
    made = convert(folder, "one_output", "--scheme", "float", "--exits", "second,final")

    assert json.loads(made.stdout)["exits"] == ["second", "final"]
    found = float_answers(folder / "one_output.edgeexit")
    for exit, logits in found.items():
        np.testing.assert_allclose(logits, plain[exit], atol=1e-4 * np.abs(plain[exit]).max())


@pytest.mark.slow
def test_data_in_another_file_is_taken_in_when_allowed(folder: Path) -> None:
    refused = convert(folder, "beside", check=False)
    assert refused.returncode == 2
    assert "--allow-external-data" in refused.stderr

    convert(folder, "beside", "--scheme", "float", "--allow-external-data")
    convert(folder, "plain", "--scheme", "float", "-o", "whole.edgeexit")

    models = [folder / f"{name}.edgeexit" / "model.tflite" for name in ("beside", "whole")]
    assert models[0].read_bytes() == models[1].read_bytes()

    leading_out = convert(folder, "outside", "--allow-external-data", check=False)
    assert leading_out.returncode == 3
    assert "leads out of the model's folder" in leading_out.stderr


REFUSED = {
    "any_height": (4, "input 'image' has the shape [1, 3, height, 16], expected one fixed size"),
    "eight": (4, "expected a batch of 1"),
    "two_inputs": (4, "the network has 2 inputs (image, more), expected one"),
    "bytes": (4, "input 'pixels' takes uint8, expected float"),
    "not_a_number": (3, "tensor 'first_w' holds NaN"),
    "odd_operator": (4, "DET"),
    "own_operator": (4, "operator Acme is of the domain 'com.acme'"),
    "newer": (4, "written in version 99 of ONNX's format, expected "),
    "newer_operators": (4, "its operators are of opset 99, expected "),
    "cyclic": (3, "damaged ONNX file"),
    "branch": (4, "operator If (control flow) cannot be cut"),
    "number": (4, "output 'class' gives int64, expected float logits"),
    "truncated": (3, "no sound ONNX file"),
    "text": (3, "ONNX file"),
    "empty": (3, "ONNX file"),
    "absent": (2, "absent.onnx"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_come_in_is_refused_in_one_line(folder: Path, name: str) -> None:
    code, words = REFUSED[name]

    done = convert(folder, name, check=False)

    assert done.returncode == code, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert words in line
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (folder / f"{name}.edgeexit").exists()


@pytest.mark.slow
def test_an_unknown_exit_is_named_with_its_neighbours(folder: Path) -> None:
    done = convert(folder, "plain", "--exits", "frist,final", check=False)

    assert done.returncode == 2
    assert "no tensor in plain.onnx named 'frist'" in done.stderr
    assert "did you mean 'first'?" in done.stderr


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.parametrize(("via", "extra"), [("onnx2tf", "onnx"), ("tensorflow", "onnx-tensorflow")])
def test_all_roads_from_torch_lead_to_the_same_network(
    tmp_path: Path, via: str, extra: str
) -> None:
    paths = [str(CHECKOUT), str(onnx_export())]
    environment = {
        **os.environ,
        f"EDGEEXIT_{extra.rpartition('-')[2].upper()}_PYTHON": str(gate_python(extra)),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-m", "edgeexit", "convert", "--scheme", "float"]
    command.append(str(CHECKOUT / "examples" / "fashion.pt"))
    for name, more in (("usual", []), ("other", ["--via", via])):
        subprocess.run(
            [*command, "-o", f"{name}.edgeexit", *more], cwd=tmp_path, env=environment, check=True
        )

    usual, other = (load_bundle(tmp_path / f"{name}.edgeexit") for name in ("usual", "other"))
    assert usual.exits == other.exits
    assert other.provenance["via"] == via
    pixels = np.random.default_rng(2).integers(0, 256, (30, 28, 28, 1)).astype(np.uint8)
    answers = []
    for bundle in (usual, other):
        data = (bundle.path / bundle.model).read_bytes()
        exits = {segment.exit: segment.outputs[0].name for segment in bundle.segments}
        answers.append(tflite_logits(data, exits, RealSamples(pixels, bundle.preprocess)))
        assert cut.transposes(data, exits) == (0, 0)
    for exit in usual.exits:
        peak = np.abs(answers[0][exit]).max()
        np.testing.assert_allclose(answers[1][exit], answers[0][exit], atol=1e-4 * peak)

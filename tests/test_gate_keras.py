"""Facts about Keras files and SavedModels: their own answers, by name, or one line of refusal."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from gate_venvs import CHECKOUT, run_in

from edgeexit.bundle import load_bundle
from edgeexit.errors import BadFile, UsageError
from edgeexit.host.answers import RealSamples, check_parity, tflite_logits
from edgeexit.host.ends import ENDINGS
from edgeexit.host.gates import Asked, open_model
from edgeexit.host.gates.keras import _copy
from edgeexit.samples import load_samples

PICTURES = CHECKOUT / "calibration/fashion-mnist/tuning.npz"

# ---------------------------------------------------------------- without TensorFlow


@pytest.mark.skipif(find_spec("tensorflow") is not None, reason="TensorFlow is here")
@pytest.mark.parametrize("name", ["net.keras", "saved"])
def test_where_tensorflow_is_missing_the_extra_is_named(tmp_path, name) -> None:
    (tmp_path / "net.keras").write_bytes(b"PK")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(b"")

    with pytest.raises(UsageError, match="a SavedModel needs what is not installed") as caught:
        open_model(tmp_path / name, Asked())
    assert 'pip install "edgeexit[tensorflow]"' in (caught.value.hint or "")


def test_what_is_no_archive_is_refused_before_tensorflow_starts(tmp_path) -> None:
    (tmp_path / "net.keras").write_bytes(b"\x89HDF\r\n\x1a\n")
    (tmp_path / "out").mkdir()

    with pytest.raises(BadFile, match="is no Keras 3 file"):
        _copy(tmp_path / "net.keras", tmp_path / "out")


def test_the_digest_of_a_folder_is_that_of_its_files(tmp_path) -> None:
    digests = []
    for turn, weights in enumerate((b"1", b"1", b"2")):
        saved, out = tmp_path / f"saved{turn}", tmp_path / f"out{turn}"
        (saved / "variables").mkdir(parents=True)
        (saved / "saved_model.pb").write_bytes(b"graph")
        (saved / "variables" / "data").write_bytes(weights)
        digests.append(_copy(saved, out)[1])
        assert (out / "net" / "variables" / "data").read_bytes() == weights

    assert digests[0] == digests[1] != digests[2]


# ---------------------------------------------------------------- with TensorFlow, without torch


@pytest.fixture(scope="module")
def nets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("keras")
    run_in("tensorflow", Path(__file__).with_name("keras_nets.py"), folder, PICTURES, cwd=folder)
    return folder


def convert(nets: Path, name: str, out: Path, *options: str, code: int = 0) -> str:
    """What `edgeexit convert` prints: its document, or the line of its refusal."""
    done = run_in(
        "tensorflow",
        *("-m", "edgeexit", "convert", nets / name, "--calibration", "fashion-mnist"),
        *("-o", out, "--json", *options),
        cwd=nets,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def own_answers(nets: Path, name: str) -> dict[str, np.ndarray]:
    with np.load(nets / "answers.npz") as answers:
        found = {key: answers[key] for key in answers.files}
    return {
        key.partition("/")[2]: rows for key, rows in found.items() if key.startswith(f"{name}/")
    }


@pytest.mark.slow
def test_the_environment_has_never_seen_torch(nets) -> None:
    code = "import importlib.util as u; assert not u.find_spec('torch'); import tensorflow"
    run_in("tensorflow", "-c", code, cwd=nets)


@pytest.mark.slow
def test_a_model_with_three_outputs_becomes_a_bundle_that_knows_its_classes(nets, tmp_path) -> None:
    """Outputs come in the order of depth, not of the file; the int8 bundle answers as Keras."""
    out = tmp_path / "net.edgeexit"
    document = json.loads(convert(nets, "net.keras", out))
    data = ("fashion-mnist:report", "--policy", "none", "--json")
    told = run_in("tensorflow", "-m", "edgeexit", "evaluate", out, *data, cwd=tmp_path)
    ran = run_in("tensorflow", "-m", "edgeexit", "run", "--json", "--bundle", out, cwd=tmp_path)

    counted = json.loads(told.stdout)
    assert document["exits"] == counted["exits"] == ["early", "mid", "final"]
    assert min(document["float_agreement"].values()) > 0.95
    assert counted["accuracy"] > 0.6
    assert json.loads(ran.stdout)["differing"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "outputs"),
    [
        ("net.keras", (), {"early": "early", "mid": "mid", "final": "final"}),
        ("net.keras", ("--exits", "early,final"), {"early": "early", "final": "final"}),
        ("soft.keras", (), {"soft_early": "1", "soft_mid": "2", "soft_final": "0"}),
        ("subclassed.keras", ("--arch", "keras_nets:Subclassed"), {"exit0": "0", "exit1": "1"}),
        ("saved", (), {"early": "early", "mid": "mid", "final": "final"}),
    ],
)
def test_every_output_answers_as_keras_does_under_its_own_name(
    nets, tmp_path, name, options, outputs
) -> None:
    shutil.copy(Path(__file__).with_name("keras_nets.py"), nets)
    convert(nets, name, tmp_path / "net.edgeexit", "--scheme", "float", *options)

    bundle = load_bundle(tmp_path / "net.edgeexit")
    data = (bundle.path / bundle.model).read_bytes()
    samples = load_samples("fashion-mnist:tuning", bundle.preprocess, bundle.class_names)
    reals = RealSamples(samples.samples[:60], bundle.preprocess)
    own = own_answers(nets, {"saved": "net"}.get(name, name.removesuffix(".keras")))
    end = ENDINGS["probabilities" if name == "soft.keras" else "logits"]
    found = tflite_logits(data, {exit: exit for exit in bundle.exits}, reals)
    assert list(found) == list(outputs)
    check_parity(
        {exit: own[output] for exit, output in outputs.items()},
        {exit: end(rows) for exit, rows in found.items()},
        reals,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("lambda.keras", 3, "holds Python code"),
        ("forged.keras", 2, "holds Popen, which is none of Keras' own"),
        ("sizes.keras", 4, "input 'picture' has the shape [None, None, None, 1]"),
        ("two.keras", 4, "takes 2 inputs (picture, other)"),
        ("operator.keras", 4, "operator tf.Cumprod cannot be lowered"),
        ("own.keras", 2, "holds Twice, which is none of Keras' own"),
        ("writes", 3, "reaches beyond the network (WriteFile)"),
    ],
)
def test_the_rest_is_refused_in_one_line_and_does_nothing(nets, tmp_path, name, code, told) -> None:
    out = tmp_path / "net.edgeexit"
    error, *hint = convert(nets, name, out, code=code).splitlines()

    assert told in error
    assert len(hint) <= 1
    assert not out.exists()
    assert not (nets / "written").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [("lambda.keras", ("--trust-pickle",)), ("own.keras", ("--arch", "own:Twice"))],
)
def test_what_the_user_vouches_for_comes_in(nets, tmp_path, name, options) -> None:
    document = json.loads(convert(nets, name, tmp_path / "net.edgeexit", *options))
    assert len(document["exits"]) == 2

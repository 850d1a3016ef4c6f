"""
The device side with tflite-runtime, the last runtime for 32-bit programs.

A Python with tflite-runtime 2.14.0, numpy 1.26 and nothing of LiteRT runs `edgeexit` on bundles
that were made here. Its kernels round differently: answers must agree, logits need not be equal.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from device_pythons import CHECKOUT, device_python, run
from small import made_profile, pictures, policy_with
from test_runtime import GRAY, SAMPLES
from tiny import tiny_model

import edgeexit.interpreter
from edgeexit.bundle import Bundle, load_bundle, write_bundle
from edgeexit.cli import entry
from edgeexit.dissect import dissect
from edgeexit.errors import DeviceError
from edgeexit.evaluate import Record, record
from edgeexit.policy import DROPPED, NEVER
from edgeexit.recut import recut
from edgeexit.runtime import Runner
from edgeexit.selftest import run_selftest

PACKAGES = ("tflite-runtime==2.14.0", "numpy==1.26.4", "click", "pillow", "psutil")
EXAMPLE = CHECKOUT / "examples" / "fashion.edgeexit"
# What input and logits are stored as, for each way to quantize.
SCHEMES = {"int8": "int8", "float": "float32", "dynamic": "float32", "int16x8": "int16"}
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return device_python(tmp_path_factory.mktemp("tflite"), PACKAGES)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """edgeexit's folder on the board: what was tried out once is not tried again."""
    return str(tmp_path_factory.mktemp("home"))


def bundle_of(folder: Path, scheme: str, **options: bool) -> Bundle:
    model = tiny_model(scheme=scheme, **options)  # type: ignore[arg-type]
    return write_bundle(
        folder / f"{scheme}.edgeexit",
        name=scheme,
        model_data=model.data,
        exits=model.exits,
        class_names=list("abcd"),
        preprocess=GRAY,
        selftest=SAMPLES,
        scheme=scheme,
        provenance={},
    )


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle for each scheme, and labelled samples for them."""
    folder = tmp_path_factory.mktemp("bundles")
    for scheme in SCHEMES:
        bundle_of(folder, scheme)
    np.savez(folder / "samples.npz", samples=SAMPLES, labels=np.arange(len(SAMPLES)) % 4)
    return folder


def board(
    python: Path, home: str, folder: Path, *commands: list[str]
) -> "list[subprocess.CompletedProcess[str]]":
    """What became of each of these `edgeexit` commands, all of them in one process there."""
    script = (
        "import contextlib, io, json\nfrom edgeexit.cli import entry\ndone = []\n"
        f"for argv in {list(commands)!r}:\n"
        "    out, err = (io.TextIOWrapper(io.BytesIO()) for _ in range(2))\n"
        "    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):\n"
        "        code = entry(argv)\n"
        "    texts = []\n"
        "    for stream in (out, err):\n"
        "        stream.flush()\n"
        "        texts.append(stream.buffer.getvalue().decode())\n"
        "    done.append([code, *texts])\n"
        "print(json.dumps(done))"
    )
    found = run(python, "-c", script, folder=folder, EDGEEXIT_HOME=home)
    assert found.returncode == 0, found.stderr[-2000:]
    return [
        subprocess.CompletedProcess(argv, *told)
        for argv, told in zip(commands, json.loads(found.stdout.splitlines()[-1]), strict=True)
    ]


def test_the_versions_are_those_that_are_meant(python: Path) -> None:
    code = (
        "import importlib.util as u, numpy\n"
        "from edgeexit.interpreter import runtime_name\n"
        "print(numpy.__version__, runtime_name(), u.find_spec('ai_edge_litert'))"
    )

    assert run(python, "-c", code).stdout.split("\n")[0] == "1.26.4 tflite-runtime 2.14.0 None"


def test_the_shipped_example_runs_and_says_how_far_it_agrees(python: Path, home: str) -> None:
    bundle, pictures = str(EXAMPLE), str(CHECKOUT / "examples" / "images")
    policy = str(Path(home) / "policy.json")
    policy_with(load_bundle(EXAMPLE), (0.9, 0.8)).save(policy)
    tested, told, there = board(
        python,
        home,
        CHECKOUT,
        ["run", bundle, "--json"],
        ["run", bundle, "--policy", policy],
        ["run", bundle, pictures, "--policy", policy, "--json"],
    )
    here = run(Path(sys.executable), "-m", "edgeexit", *there.args)

    said = json.loads(tested.stdout)
    assert (said["selftest"], said["runtime"]) == ("ok", "tflite-runtime 2.14.0")
    assert not said["same_kernels"]
    assert 0 < said["largest_difference"] <= 2
    assert set(said["agreement"].values()) == {1.0}
    assert "other kernels than where it was converted; equal answers: exit0 100.0%" in told.stdout
    assert "decided alike by the policy: 100.0%" in told.stdout
    answers = [
        [(answer["class"], answer["exit"]) for answer in map(json.loads, out.splitlines())]
        for out in (there.stdout, here.stdout)
    ]
    assert answers[0] == answers[1]
    assert len({exit for _, exit in answers[0]}) > 1


def test_every_scheme_runs_there_and_its_logits_are_recorded(
    python: Path, home: str, bundles: Path
) -> None:
    names = {scheme: f"{scheme}.edgeexit" for scheme in SCHEMES}
    commands = [
        words
        for scheme, name in names.items()
        for words in (
            ["run", name, "--json"],
            ["evaluate", name, "samples.npz", "--record", f"{scheme}.npz", "--json"],
            ["inspect", name, "--json"],
        )
    ]
    done = board(python, home, bundles, *commands)

    assert [one.returncode for one in done] == [0] * len(done), [one.stderr for one in done]
    for place, (scheme, dtype) in enumerate(SCHEMES.items()):
        tested, counted, shown = (json.loads(one.stdout) for one in done[3 * place : 3 * place + 3])
        assert set(tested["agreement"].values()) == {1.0}
        assert counted["samples"] == len(SAMPLES)
        assert [segment["operators"] for segment in shown["segments"]] == [None] * 3
        record = Record.load(bundles / f"{scheme}.npz")
        assert (record.logits.dtype.name, record.runtime) == (dtype, "tflite-runtime 2.14.0")
        wanted = load_bundle(bundles / names[scheme]).selftest().logits
        assert (record.logits.argmax(axis=2) == wanted.argmax(axis=2)).all()


def test_what_it_would_compute_wrongly_is_refused(python: Path, home: str, tmp_path: Path) -> None:
    """Float values and weights with a scale for each class; LiteRT knows what to do with them."""
    wrong = bundle_of(tmp_path, "dynamic", heads_per_channel=True)
    (done,) = board(python, home, tmp_path, ["run", wrong.path.name])

    assert run_selftest(wrong).differing == 0
    assert done.returncode == 4
    assert "tflite-runtime 2.14.0 computes FULLY_CONNECTED wrongly" in done.stderr


def test_what_needs_the_schema_is_refused_in_one_line_with_the_next_step(
    python: Path, home: str, bundles: Path
) -> None:
    bundle = load_bundle(bundles / "int8.edgeexit")
    policy_with(bundle, (DROPPED, NEVER)).save(bundles / "drops.json")
    done = board(
        python,
        home,
        bundles,
        ["run", "int8.edgeexit", "samples.npz", "--policy", "drops.json"],
        ["profile", "int8.edgeexit", "--time-cap", "5"],
    )

    for refused in done:
        error, hint = (line for line in refused.stderr.splitlines() if line[:4] in ("Erro", "Hint"))
        assert refused.returncode == 5
        assert error.startswith(
            "Error: taking networks apart and cutting them needs ai-edge-litert"
        )
        assert hint.startswith("Hint: python3 -m pip install ai-edge-litert; or cut elsewhere")


def test_a_bundle_that_was_cut_down_elsewhere_runs(
    python: Path, home: str, bundles: Path, capsys: Captured
) -> None:
    recut(load_bundle(bundles / "int16x8.edgeexit"), ("exit0", "exit2"), bundles / "cut.edgeexit")
    (done,) = board(python, home, bundles, ["run", "cut.edgeexit", "--json"])

    assert set(json.loads(done.stdout)["agreement"]) == {"exit0", "exit2"}


def test_its_doctor_says_what_is_different(python: Path, home: str) -> None:
    (done,) = board(python, home, CHECKOUT, ["doctor", "--meter", "none", "--json"])
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"]}

    assert found["runtime"]["status"] == found["xnnpack"]["status"] == "warning"
    assert "tflite-runtime 2.14.0: no longer made" in found["runtime"]["seen"]
    assert found["numpy"]["status"] == found["self-test"]["status"] == "ok"
    assert "equal answers: exit0 100.0%" in found["self-test"]["seen"]


def test_numpy_2_is_told_with_the_step_back(python: Path, home: str, tmp_path: Path) -> None:
    place = Path(np.__file__).parent
    for part in (place, place.with_name("numpy.libs")):
        (tmp_path / part.name).symlink_to(part)
    done = run(
        python,
        *("-m", "edgeexit", "run", str(EXAMPLE)),
        PYTHONPATH=str(tmp_path),
        EDGEEXIT_HOME=home,
    )

    assert done.returncode == 5
    error = next(line for line in done.stderr.splitlines() if line.startswith("Error"))
    assert f"tflite-runtime 2.14.0 does not work with numpy {np.__version__}" in error
    assert 'pip install "numpy<2"' in done.stderr


@pytest.mark.parametrize(
    ("bits", "step"),
    [
        (32, "python3 -m pip install --no-deps tflite-runtime==2.14.0"),
        (64, "python3 -m pip install ai-edge-litert"),
    ],
)
def test_without_a_runtime_the_size_of_a_pointer_says_which_one_to_install(
    bits: int, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pip's markers would say aarch64 for 32-bit programs under a 64-bit kernel."""
    monkeypatch.setattr("edgeexit.interpreter.pointer_bits", lambda: bits)
    monkeypatch.setattr("edgeexit.interpreter.importlib.import_module", _absent)
    edgeexit.interpreter._runtime.cache_clear()
    try:
        with pytest.raises(DeviceError, match=f"no TFLite runtime for these {bits}-bit") as caught:
            edgeexit.interpreter.runtime_name()
    finally:
        edgeexit.interpreter._runtime.cache_clear()

    assert caught.value.hint == step


def _absent(name: str) -> None:
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_passes_every_command_of_a_board(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    """With LiteRT: record, profile (its process's own part), policy, verification, re-cut, run."""
    monkeypatch.chdir(tmp_path)
    bundle = bundle_of(tmp_path, scheme)
    lots = []
    with Runner(bundle, None) as runner:
        for seed, split in enumerate(("tuning", "certificate")):
            lot = pictures(400, f"small:{split}", seed=seed)
            labels = np.array([runner(sample).label for sample in lot.samples])
            lots.append(replace(lot, labels=labels))
    found = record(bundle, lots)
    found.save("r.npz")
    dissection = dissect(bundle, SAMPLES)
    made_profile(bundle_digest=bundle.digest).save("profile-host.json")
    files = ["--record", "r.npz", "--profile", "profile-host.json", "--ledger", "ledger.json"]
    goal = ["--device", "host", "--max-accuracy-drop", "0.05"]

    assert found.logits.dtype == bundle.input.dtype == SCHEMES[scheme]
    assert len(dissection.segments) == len(bundle.exits)
    assert entry(["tune", bundle.path.name, *files, *goal, "-o", "cut.edgeexit"]) == 0
    assert entry(["verify", bundle.path.name, *files]) == 0
    for name in (bundle.path.name, "cut.edgeexit"):
        assert entry(["inspect", name, "--json"]) == 0
        assert entry(["run", name, "--json"]) == 0
        said = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (said["selftest"], said["differing"]) == ("ok", 0)

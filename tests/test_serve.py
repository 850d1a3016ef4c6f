"""A board's app runs its current release, and takes up another one between two frames."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image
from test_runtime import SAMPLES, make_bundle

from edgeexit.bundle import Bundle
from edgeexit.cli import entry
from edgeexit.errors import SelfTestError, UsageError
from edgeexit.manifest import Manifest
from edgeexit.releases import Releases
from edgeexit.runtime import Runner
from edgeexit.serve import LOOK_EVERY_S, Served

Captured = pytest.CaptureFixture[str]
HERE = Path(__file__).parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEEXIT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    return tmp_path / "home"


def bring(releases: Releases, folder: Path, note: str) -> str:
    """Install a release of the tiny bundle that differs by *note*."""
    folder.mkdir(parents=True, exist_ok=True)
    bundle = make_bundle(folder, provenance={"note": note})
    manifest = Manifest.from_folder(bundle.path)
    for file in manifest.files:
        releases.add(file, bundle.path / file.path)
    release = releases.install(manifest)
    shutil.rmtree(bundle.path)
    return release


def activate(releases: Releases, release: str) -> None:
    releases.activate(release, lambda path: None)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += 2 * LOOK_EVERY_S
        return self.now


def serve(
    releases: Releases, said: list[str], make: Callable[[Bundle], Runner] | None = None
) -> Served[Runner]:
    def usual(bundle: Bundle) -> Runner:
        return Runner(bundle, None, preload=True)

    return Served(releases, make or usual, tell=said.append, clock=Clock())


def test_another_release_is_taken_up_at_the_border_of_a_frame(home: Path, tmp_path: Path) -> None:
    releases, said = Releases(home, "tiny"), []
    one, two = (bring(releases, tmp_path, note) for note in "ab")
    activate(releases, one)
    served = serve(releases, said)
    first = served.now
    assert (served.release, served.renew()) == (one, False)

    activate(releases, two)
    assert served.renew()
    assert (served.release, served.now is first) == (two, False)
    assert served.now(SAMPLES[0]).class_name
    assert said == [f"tiny: release {two} runs now, {one} did before"]
    assert not served.renew()
    releases.rollback()
    assert served.renew()
    assert served.release == one
    served.close()


@pytest.mark.parametrize("fault", ["altered", "self-test", "policy"])
def test_a_release_that_cannot_be_used_changes_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    releases, said = Releases(home, "tiny"), []
    one, two = (bring(releases, tmp_path, note) for note in "ab")
    activate(releases, one)
    made: list[Bundle] = []

    def make(bundle: Bundle) -> Runner:
        made.append(bundle)
        if len(made) > 1 and fault == "policy":
            raise UsageError("no policy to slide along")
        return Runner(bundle, None)

    served = serve(releases, said, make)
    activate(releases, two)
    if fault == "altered":
        path = home / "apps" / "tiny" / "releases" / two / "model.tflite"
        path = path if path.exists() else next(path.parent.rglob("*.tflite"))
        path.write_bytes(path.read_bytes()[:-1] + b"\0")
    if fault == "self-test":

        def refuse(*_: object) -> None:
            raise SelfTestError("logits differ by 9")

        monkeypatch.setattr("edgeexit.serve.run_selftest", refuse)

    for _ in range(3):
        assert not served.renew()
    assert served.release == one
    assert served.now(SAMPLES[0]).class_name
    if fault != "altered":
        assert len(said) == 1, "it is told once and not tried again"
        assert f"release {two}: " in said[0]
        assert f"{one} goes on" in said[0]
    served.close()


def test_a_tampered_release_is_refused_at_the_start_and_the_previous_one_runs(
    home: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    releases = Releases(home, "tiny")
    one, two = (bring(releases, tmp_path, note) for note in "ab")
    activate(releases, one)
    activate(releases, two)
    path = home / "apps" / "tiny" / "releases" / two / "bundle.json"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    Image.fromarray(SAMPLES[0][..., 0]).save(tmp_path / "a.png")

    assert entry(["run", "--app", "tiny", str(tmp_path / "a.png"), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["label"] >= 0
    warnings = [line for line in captured.err.splitlines() if two in line]
    assert len(warnings) == 1
    assert warnings[0].startswith("Note: tiny: ")


def test_run_app_without_input_is_the_self_test(
    home: Path, tmp_path: Path, capsys: Captured
) -> None:
    releases = Releases(home, "tiny")
    activate(releases, bring(releases, tmp_path, "a"))

    assert entry(["run", "--app", "tiny"]) == 0
    assert "self-test ok: 6 samples" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--app", "absent", "a.png"], 2, "no app on this board named 'absent'"),
        (["--app", "../x", "a.png"], 2, "not a name that a folder can have"),
        (["--app", "tiny", "--bundle", "b"], 2, "leave one out"),
        (["--app", "tiny", "b.edgeexit"], 2, "leave one out"),
    ],
)
def test_wrong_apps(
    home: Path, tmp_path: Path, capsys: Captured, words: list[str], code: int, said: str
) -> None:
    releases = Releases(home, "tiny")
    activate(releases, bring(releases, tmp_path, "a"))

    assert entry(["run", *words]) == code
    assert said in capsys.readouterr().err


def test_a_deploy_reaches_a_run_under_way_and_its_camera_stays_open(
    home: Path, tmp_path: Path
) -> None:
    releases = Releases(home, "tiny")
    one, two = (bring(releases, tmp_path, note) for note in "ab")
    activate(releases, one)
    spec = f"cameras:counted:{tmp_path}"
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgeexit", "run", "--app", "tiny", spec, "--json"],
            stdout=subprocess.PIPE,
            stderr=errors,
        )
    assert process.stdout is not None
    try:
        process.stdout.readline()
        activate(releases, two)
        until_s = time.monotonic() + 20
        while f"release {two} runs now" not in (tmp_path / "errors").read_text():
            assert time.monotonic() < until_s
            process.stdout.readline()
        for _ in range(20):
            last = json.loads(process.stdout.readline())
        process.send_signal(signal.SIGTERM)
        process.stdout.read()
        assert process.wait(5) == 143
    finally:
        process.kill()
        process.stdout.close()
        process.wait()

    assert last["label"] >= 0
    assert (tmp_path / "opened").read_text() == "1"


@pytest.mark.parametrize("swaps", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_memory_does_not_grow_by_exchanging_releases(
    home: Path, tmp_path: Path, swaps: int
) -> None:
    releases = Releases(home, "tiny")
    ids = [bring(releases, tmp_path, note) for note in "ab"]
    activate(releases, ids[0])
    served = serve(releases, [])
    link = home / "apps" / "tiny" / "current"
    me, seen = psutil.Process(), []
    for number in range(swaps):
        # As activation does it, without its fsyncs.
        link.with_name("next").symlink_to(f"releases/{ids[(number + 1) % 2]}")
        link.with_name("next").replace(link)
        assert served.renew()
        served.now(SAMPLES[0])
        if number in (swaps // 3, swaps - 1):
            seen.append((me.memory_info().rss, me.num_fds()))
    served.close()

    assert seen[1][0] - seen[0][0] < 4 << 20
    assert seen[1][1] == seen[0][1]

"""The wheels that a board gets are the right ones, the same every time, and made without it."""

import importlib.metadata
import io
import json
import os
import zipfile
from pathlib import Path

import pytest
from test_wheel import CHECKOUT
from wheels import make_wheel

from edgeexit.errors import BadFile, DeviceError, UsageError
from edgeexit.files import file_digest
from edgeexit.remote import wheelhouse
from edgeexit.remote.wheelhouse import Target, Wheel, own_wheel, wheels_for

PI = Target(
    python="3.11",
    machine="aarch64",
    libc=(2, 36),
    requirements=("ai-edge-litert>=2.1,<2.4", "numpy>=1.24"),
)
DEPENDENCIES = ("click", "psutil", "pillow", "installer")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    """edgeexit's own wheel, built once: building takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("ours")))
        return own_wheel()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgeexit" / "wheels"


@pytest.fixture
def no_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry that nobody answers for; whatever this machine's pip has besides is hidden."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")


@pytest.fixture
def source(tmp_path: Path, ours: Wheel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that PI needs, and some that it must not take."""
    monkeypatch.setattr(wheelhouse, "own_wheel", lambda on_step: ours)
    folder = tmp_path / "source"
    for name in DEPENDENCIES:
        make_wheel(folder, name, "20.0" if name != "installer" else "1.0")
    arm = "cp311-cp311-manylinux_2_27_aarch64"
    make_wheel(folder, "ai-edge-litert", "2.3.0", tag=arm, requires=("numpy",))
    make_wheel(folder, "ai-edge-litert", "2.3.0", tag=arm.replace("aarch64", "x86_64"))
    make_wheel(folder, "ai-edge-litert", "3.0.0", tag=arm)
    make_wheel(folder, "numpy", "1.26.4", tag=arm)
    make_wheel(folder, "numpy", "2.4.6", tag=arm.replace("2_27", "2_36"))
    make_wheel(folder, "numpy", "3.0.0", tag=arm.replace("2_27", "2_41"))
    return folder


def test_a_folder_of_wheels_serves_a_board_without_any_registry(
    source: Path, no_registry: None
) -> None:
    found = wheels_for(PI, source=source)

    assert {w.package: w.version for w in found.installed} == {
        "ai-edge-litert": "2.3.0",
        "click": "20.0",
        "edgeexit": wheelhouse.edgeexit.__version__,
        "numpy": "2.4.6",
        "pillow": "20.0",
        "psutil": "20.0",
    }
    assert found.installer.package == "installer"
    assert all(w.sha256 == file_digest(w.path) for w in found.all)
    assert all(w.size_bytes == w.path.stat().st_size for w in found.all)
    assert all("x86_64" not in w.name for w in found.all)


@pytest.mark.parametrize(("libc", "numpy"), [((2, 27), "1.26.4"), ((2, 41), "3.0.0")])
def test_no_wheel_is_newer_than_the_boards_glibc(
    libc: tuple[int, int], numpy: str, source: Path
) -> None:
    target = Target(**{**vars(PI), "libc": libc})

    assert wheels_for(target, source=source).version("numpy") == numpy


def test_a_pinned_numpy_is_the_one_that_comes(source: Path) -> None:
    requirements = ("ai-edge-litert>=2.1,<2.4", "numpy>=1.24,<2")
    target = Target(**{**vars(PI), "requirements": requirements})

    assert wheels_for(target, source=source).version("numpy") == "1.26.4"


def test_what_the_board_has_itself_is_left_out(source: Path) -> None:
    arm = "cp311-cp311-manylinux_2_34_armv7l"
    make_wheel(source, "tflite-runtime", "2.14.0", tag=arm, requires=("numpy<2",))
    target = Target(
        python="3.11",
        machine="armv7l",
        libc=(2, 36),
        requirements=("tflite-runtime==2.14.0", "numpy>=1.24,<2"),
        borrowed=("numpy", "pillow", "psutil"),
    )

    found = wheels_for(target, source=source)

    assert {w.package for w in found.installed} == {"tflite-runtime", "click", "edgeexit"}


def test_what_is_missing_in_the_folder_is_named_with_the_command_that_fetches_it(
    source: Path, no_registry: None, cache: Path
) -> None:
    next(source.glob("psutil-*")).unlink()

    with pytest.raises(UsageError, match="psutil") as refusal:
        wheels_for(PI, source=source)

    hint = str(refusal.value.hint)
    assert "pip download" in hint
    assert "--platform manylinux_2_28_aarch64" in hint
    assert "'psutil>=" in hint
    assert [path for path in cache.iterdir() if path.name.endswith(".part")] == []


def test_no_such_folder_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        wheels_for(PI, source=tmp_path / "nowhere")


def test_without_a_registry_the_error_shows_the_way_by_a_folder(
    source: Path, no_registry: None
) -> None:
    with pytest.raises(DeviceError, match="registry cannot be reached") as refusal:
        wheels_for(PI)

    assert "--wheels DIR" in str(refusal.value.hint)


def test_wheels_that_no_registry_has_are_an_error_of_their_own(
    source: Path, no_registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))

    with pytest.raises(DeviceError, match=r"no wheels for Python 3\.12 on aarch64, glibc 2\.36"):
        wheels_for(Target(**{**vars(PI), "python": "3.12"}))


def test_a_set_is_kept_and_nobody_is_asked_again(
    source: Path, no_registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    first = wheels_for(PI)
    monkeypatch.setenv("PIP_FIND_LINKS", os.devnull)
    make_wheel(source, "click", "21.0")

    assert wheels_for(PI) == first
    with pytest.raises(DeviceError):
        wheels_for(PI, refresh=True)
    monkeypatch.setenv("PIP_FIND_LINKS", str(source))
    assert wheels_for(PI, refresh=True).version("click") == "21.0"


def test_a_kept_file_that_was_altered_is_fetched_again(source: Path) -> None:
    first = wheels_for(PI, source=source)
    victim = next(w.path for w in first.all if w.package == "click")
    sound = victim.read_bytes()
    victim.write_bytes(sound[:-1] + b"\0")

    assert wheels_for(PI, source=source) == first
    assert victim.read_bytes() == sound


# ---------------------------------------------------------------- edgeexit's own wheel


def test_the_checkouts_wheel_is_the_same_every_time(ours: Wheel) -> None:
    found = own_wheel()

    assert found.sha256 == ours.sha256
    with zipfile.ZipFile(found.path) as archive:
        assert archive.read("edgeexit/doctor.py") == (CHECKOUT / "edgeexit/doctor.py").read_bytes()


@pytest.fixture
def installed(tmp_path: Path, ours: Wheel) -> importlib.metadata.Distribution:
    """edgeexit as an installer leaves it: unpacked, with a RECORD of what lies where."""
    site = tmp_path / "site"
    with zipfile.ZipFile(ours.path) as archive:
        archive.extractall(site)
    (info,) = site.glob("*.dist-info")
    (info / "INSTALLER").write_text("pip\n")
    with (info / "RECORD").open("a") as record:
        record.write(f"{info.name}/INSTALLER,,\n../bin/edgeexit,,\n")
        record.write("edgeexit/__pycache__/doctor.cpython-311.pyc,,\n")
    return importlib.metadata.Distribution.at(info)


def test_an_installed_edgeexit_is_packed_into_a_wheel_with_the_same_files(
    installed: importlib.metadata.Distribution, ours: Wheel
) -> None:
    name, data = wheelhouse._packed(installed)

    assert name == ours.name
    with zipfile.ZipFile(io.BytesIO(data)) as mine, zipfile.ZipFile(ours.path) as theirs:
        record = next(n for n in mine.namelist() if n.endswith("/RECORD"))
        assert set(mine.namelist()) == set(theirs.namelist())
        assert all(mine.read(n) == theirs.read(n) for n in mine.namelist() if n != record)
        rows = mine.read(record).decode().splitlines()
        assert len(rows) == len(set(rows)) == len(mine.namelist())
    assert wheelhouse._packed(installed) == (name, data)


@pytest.mark.parametrize("harm", ["alter", "remove"])
def test_an_installation_that_somebody_changed_is_not_passed_on(
    harm: str, installed: importlib.metadata.Distribution
) -> None:
    victim = Path(str(installed.locate_file("edgeexit/doctor.py")))
    if harm == "alter":
        victim.write_text("print('hello')\n")
    else:
        victim.unlink()

    with pytest.raises(BadFile, match=r"edgeexit/doctor\.py") as refusal:
        wheelhouse._packed(installed)

    assert "reinstall" in str(refusal.value.hint)


def test_the_list_of_a_kept_set_tells_what_it_was_made_for(source: Path, cache: Path) -> None:
    wheels_for(PI, source=source)
    (listed,) = cache.glob("*/wheels.json")
    document = json.loads(listed.read_text())

    assert document["format"] == wheelhouse.FORMAT
    assert "manylinux_2_36_aarch64" in document["platforms"]
    assert "ai-edge-litert>=2.1,<2.4" in document["requirements"]
    assert not any("torch" in line for line in document["requirements"])

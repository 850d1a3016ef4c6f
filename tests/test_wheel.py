"""What the wheel holds and asks for: small, complete for the demo, and nothing of the host side."""

import os
import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from importlib.util import find_spec
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "pyproject.toml").is_file() or find_spec("hatchling") is None,
    reason="needs the checkout and hatchling",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )
    (found,) = folder.glob("*.whl")
    return found


def test_the_wheel_holds_the_demo_and_is_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    data = "edgeexit/_data/"
    assert f"{data}examples/fashion.edgeexit/bundle.json" in names
    assert f"{data}examples/fashion-record.npz" in names
    assert f"{data}examples/images/expected.json" in names
    assert f"{data}calibration/fashion-mnist/report.npz" in names
    assert f"{data}calibration/fashion-mnist/certificate.npz" not in names
    assert f"{data}devices/rpi4.toml" in names
    assert not [name for name in names if name.startswith("tests") or name.endswith(".pt")]
    assert wheel.stat().st_size <= 4_000_000


def test_without_extras_it_asks_for_few_packages_and_no_converter(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = [name for name in archive.namelist() if name.endswith("METADATA")]
        metadata = Parser().parsestr(archive.read(path).decode())
    needed = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]

    assert len(needed) <= 6
    assert not [line for line in needed if "torch" in line or "tensorflow" in line]
    assert metadata["Requires-Python"] == ">=3.11"


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.11", "3.13"])
def test_a_clean_environment_runs_the_demo(wheel: Path, tmp_path: Path, version: str) -> None:
    """Needs the package registry and both interpreters."""
    found = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python"))
    python = str(found[-1]) if found else f"python{version}"
    home = tmp_path / "venv"
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        venv.create(home, with_pip=True)
    else:
        subprocess.run([python, "-m", "venv", str(home)], check=True)
    subprocess.run([home / "bin" / "pip", "install", "-q", str(wheel)], check=True)
    size = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    done = subprocess.run(
        [home / "bin" / "edgeexit", "demo", "--json"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )

    assert size <= 230_000_000
    assert '"accuracy_policy"' in done.stdout

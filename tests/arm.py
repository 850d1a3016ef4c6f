"""What tests on real ARM code share: skipping where it cannot run, and nets made once for all."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT / "bench" / "arm"))

from root import CannotBuild, layer  # noqa: E402
from test_layers import imports, modules  # noqa: E402

SMALL = (
    *("resnet8", "resnet20", "resnet32", "resnet44", "resnet56"),
    *("mobilenet", "vit", "dscnn", "conv1d"),
)
# They carry what others make and decide nothing about it.
PLUMBING = {"", "children", "errors", "files", "locks", "names"}
LARGE = ("mobilenet-224", "resnet18-224")


@contextmanager
def or_skip() -> Iterator[None]:
    """Skip the test, with the reason, where no ARM system can be made or started."""
    try:
        yield
    except CannotBuild as error:
        pytest.skip(f"no ARM code here: {error}")


def nets(names: Sequence[str]) -> Path:
    """
    A folder with NAME.edgeexit of these nets of the zoo, re-cuts of them and NAME.npy, samples.

    Converting takes minutes: it is done once for every state of the sources that it depends on.
    """
    if not (CHECKOUT.parent / "shared" / "data").is_dir():
        pytest.skip("needs the speech samples in ../shared/data")

    def build(folder: Path) -> None:
        maker = Path(__file__).with_name("arm_nets.py")
        subprocess.run([sys.executable, str(maker), str(folder), *names], check=True)

    return layer("nets", [_converter(), *names], build)


def _converter() -> str:
    """A digest of all that decides what a converted net is."""
    known = modules()
    reached: set[str] = set()
    waiting = {"host.convert", "host.zoo", "host.checkpoint", "recut"}
    while waiting:
        reached |= waiting
        named = {name.removeprefix("edgeexit.") for m in waiting for name in imports(known[m])}
        named |= {name.rpartition(".")[0] for name in named}
        waiting = (named & set(known)) - reached - PLUMBING
    sources = [known[name] for name in sorted(reached)]
    sources += [Path(__file__).with_name("arm_nets.py"), CHECKOUT / "bench/nets.py"]
    sources += [CHECKOUT / "requirements.lock", CHECKOUT / "calibration/fashion-mnist/set.toml"]
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

"""Assessing: a network in memory becomes the bundle that convert would make, and is measured."""

from pathlib import Path

import numpy as np
import pytest

from edgeexit.errors import UsageError

pytestmark = pytest.mark.host
torch = pytest.importorskip("torch")
pytest.importorskip("litert_torch")

from edgeexit.bundle import Bundle  # noqa: E402
from edgeexit.host import zoo  # noqa: E402
from edgeexit.host.answers import RealSamples  # noqa: E402
from edgeexit.host.assess import int8_bundle, measured  # noqa: E402
from edgeexit.host.checkpoint import save_checkpoint  # noqa: E402
from edgeexit.host.convert import convert  # noqa: E402
from edgeexit.preprocess import Preprocess  # noqa: E402
from tests import host_nets  # noqa: E402

PREPROCESS = Preprocess(
    kind="image", size=(8, 8), color="gray", scale=1 / 255, mean=(0.5,), std=(0.25,), layout="nchw"
)
KWARGS = {
    "channels": 1,
    "classes": 3,
    "size": [8, 8],
    "stem": [8],
    "widths": [8, 16],
    "blocks": [1, 1],
}
CLASSES = ("dark", "middle", "bright")


def net(seed: int = 0) -> tuple[torch.nn.Module, RealSamples]:
    torch.manual_seed(seed)
    reals = RealSamples(host_nets.pictures(64, size=(8, 8)), PREPROCESS)
    return host_nets.settled(zoo.resnet(**KWARGS), reals), reals


def bundle_of(model: torch.nn.Module, reals: RealSamples, folder: Path) -> Bundle:
    return int8_bundle(
        model,
        input_shape=(1, 1, 8, 8),
        preprocess=PREPROCESS,
        class_names=CLASSES,
        reals=reals,
        folder=folder,
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Bundle, torch.nn.Module, RealSamples]:
    model, reals = net()
    return bundle_of(model, reals, tmp_path_factory.mktemp("assess") / "net"), model, reals


def test_the_bundle_is_the_one_that_convert_makes(made, tmp_path) -> None:
    bundle, model, reals = made
    save_checkpoint(
        tmp_path / "net.pt",
        model=model,
        arch="edgeexit.host.zoo:resnet",
        kwargs=KWARGS,
        input_shape=(1, 1, 8, 8),
        class_names=CLASSES,
        preprocess=PREPROCESS,
    )
    np.savez(tmp_path / "some.npz", samples=reals.samples, labels=np.arange(64) % 3)
    converted = convert(tmp_path / "net.pt", tmp_path / "net.edgeexit", tmp_path / "some.npz")
    assert bundle.model_data() == converted.model_data()
    assert bundle.segments == converted.segments


def test_every_exit_is_measured_and_later_ones_cost_more(made) -> None:
    bundle = made[0]
    found = measured(bundle, seconds=0.6, processes=2)
    assert list(found) == list(bundle.exits)
    for value, low, high in found.values():
        assert 0 < low <= value <= high < 1000
    first, last = found[bundle.exits[0]], found[bundle.exits[-1]]
    assert first[0] < last[0]


def test_too_few_samples_for_ranges_are_refused(made, tmp_path) -> None:
    with pytest.raises(UsageError, match="5 samples for activation ranges"):
        bundle_of(made[1], made[2].first(5), tmp_path / "net")
    assert not (tmp_path / "net").exists()

"""
CIFAR-10 as `shared/data` holds it: pictures out of lossless mosaics, every digest checked.

Callers see Cifar, what a network for these pictures is told (CLASSES, NORMAL), and pretrained
networks. Pictures that were JPEG copies are left out. The digests stand in MANIFEST.tsv beside the
data, and LISTED pins that list: whoever measures, measures on the same pictures.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import CHECKOUT
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgeexit.errors import BadFile, UsageError
from edgeexit.files import digest_of, parse_npz, read_bytes
from edgeexit.preprocess import Preprocess
from edgeexit.samples import Samples

if TYPE_CHECKING:
    from torch import nn

DATA = CHECKOUT.parent / "shared" / "data"
LISTED = "ba42468f98ac0dcaefdbeffa69fafe6f35228ba3a0e2f141b786e310e6d12d81"
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SIDE, COLUMNS, IN_MOSAIC = 32, 40, 1000
LOSSLESS_TESTS = 9_806  # of the test half's pictures, those that never were a JPEG
NORMAL = Preprocess(
    kind="image",
    size=(SIDE, SIDE),
    color="rgb",
    scale=1 / 255,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    layout="nchw",
)
# Their digests begin as their names end.
RESNETS = {
    20: "resnet20-12fca82f.th",
    32: "resnet32-d509ac18.th",
    44: "resnet44-014dd654.th",
    56: "resnet56-4bfd9763.th",
}
_MOST_BYTES = 64 << 20


class Cifar:
    """
    The data set in the folder *data*/cifar10; *listed* is the digest of its part of the manifest.

    UsageError if it is not there, BadFile if the manifest is another one.
    """

    def __init__(self, data: Path = DATA, *, listed: str = LISTED) -> None:
        self.data = data
        where = data / "MANIFEST.tsv"
        if not where.is_file():
            raise UsageError(
                f"{where}: no such file: CIFAR-10 lies in the folder shared/data beside the "
                "checkout",
                hint="put it there, or name its folder with --data",
            )
        lines = read_bytes(where).decode(errors="replace").splitlines()
        rows = [line.split("\t") for line in lines]
        self.digests = {r[0]: r[2] for r in rows if r[0].startswith("cifar10/") and len(r) > 2}
        found = manifest_digest(self.digests)
        if found != listed:
            raise BadFile(
                f"{where}: cifar10: lists other files (digest {found[:12]}) than this bench was "
                f"made with ({listed[:12]})",
                hint="get the data again",
            )

    def pictures(self, split: str, count: int | None = None, *, behind: int = 0) -> Samples:
        """
        The *count* lossless pictures (None: all) of *split* behind the first *behind*.

        Ids are "train-00017": the split and the picture's number in it. UsageError if there are
        too few or a file is absent, BadFile if a file has another digest than the manifest's.
        """
        labels, lossless = self._labels(split)
        usable = np.flatnonzero(lossless)
        chosen = usable[behind:] if count is None else usable[behind : behind + count]
        if not len(chosen) or (count is not None and len(chosen) < count):
            raise UsageError(
                f"{self.data}: {split}: {len(usable)} lossless pictures, "
                f"{count or 1} behind the first {behind} are asked for"
            )
        first, last = chosen[0] // IN_MOSAIC, chosen[-1] // IN_MOSAIC
        mosaics = np.concatenate([self._mosaic(split, k) for k in range(first, last + 1)])
        return Samples(
            samples=mosaics[chosen - first * IN_MOSAIC],
            labels=labels[chosen].astype(np.int64),
            ids=np.array([f"{split}-{number:05d}" for number in chosen]),
            name=f"cifar10:{split}",
        )

    def pretrained(self, depth: int) -> "tuple[nn.Module, dict[str, Any]]":
        """
        The pretrained ResNet of *depth* 20, 32, 44 or 56, in eval mode, and its zoo arguments.

        UsageError if the file is absent, BadFile if its digest is not the one in its name.
        """
        import torch

        from edgeexit.host.zoo import resnet

        name = RESNETS[depth]
        path = self.data / "cifar_resnets" / name
        data = read_bytes(path, limit_bytes=_MOST_BYTES)
        if not digest_of(data).startswith(path.stem.partition("-")[2]):
            raise BadFile(f"{path}: digest {digest_of(data)[:8]}, expected the one in its name")
        given = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)["state_dict"]
        kwargs: dict[str, Any] = {"depth": depth, "exits": [], "shortcut": "A"}
        model = resnet(**kwargs)
        own = model.state_dict()
        # Its tensors stand in the file in the order of ours.
        names = [name for name in own if not name.endswith("num_batches_tracked")]
        for name, tensor in zip(names, given.values(), strict=True):
            assert own[name].shape == tensor.shape, name
            own[name] = tensor
        model.load_state_dict(own)
        return model.eval(), kwargs

    def _checked(self, name: str) -> bytes:
        path = self.data / name
        if name not in self.digests:
            raise UsageError(f"{path}: the manifest lists no such file")
        data = read_bytes(path, limit_bytes=_MOST_BYTES)
        if digest_of(data) != self.digests[name]:
            raise BadFile(
                f"{path}: digest {digest_of(data)[:12]}, expected {self.digests[name][:12]}",
                hint="get the data again",
            )
        return data

    def _labels(self, split: str) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        name = f"cifar10/{split}_labels.npz"
        arrays = parse_npz(self._checked(name), str(self.data / name))
        return arrays.get("labels", kinds="iu", ndim=1), arrays.get("source", kinds="iu") > 0

    def _mosaic(self, split: str, number: int) -> NDArray[np.uint8]:
        """The pictures of one mosaic, uint8 (1000, 32, 32, 3), row by row."""
        name = f"cifar10/{split}_{number:02d}.webp"
        try:
            with Image.open(io.BytesIO(self._checked(name))) as mosaic:
                pixels = np.asarray(mosaic.convert("RGB"))
        except UnidentifiedImageError as error:
            raise BadFile(f"{self.data / name}: not a picture") from error
        rows = pixels.shape[0] // SIDE
        grid = pixels.reshape(rows, SIDE, COLUMNS, SIDE, 3).swapaxes(1, 2)
        return grid.reshape(-1, SIDE, SIDE, 3)[:IN_MOSAIC]


def manifest_digest(digests: dict[str, str]) -> str:
    """The digest of a list of files with their digests."""
    return digest_of("".join(f"{name} {digests[name]}\n" for name in sorted(digests)).encode())

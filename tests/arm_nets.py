"""
Nets of the zoo as bundles with samples, for tests on ARM: `python tests/arm_nets.py FOLDER NET...`

Random weights with the batch statistics of real samples (bench/nets.py). Of every net there are
NAME.edgeexit, NAME.npy with 50 real samples, and re-cuts NAME-EXITS.edgeexit: what the middle
exit leaves behind, and the middle exit alone.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))

from nets import bundle_of, real_samples

from edgeexit.recut import recut


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        bundle = bundle_of(name, folder)
        first, middle, last = bundle.exits
        for kept in ((first, last), (middle,)):
            recut(bundle, kept, folder / f"{name}-{'+'.join(kept)}.edgeexit")
        np.save(folder / f"{name}.npy", real_samples(name, 50))
        for rest in (f"{name}.pt", f"{name}.npz"):
            (folder / rest).unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])

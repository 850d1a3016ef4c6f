"""
Use a bundle from your own program: python examples/embed.py BUNDLE.edgeexit PICTURE...

A Runner serves one thread; make one for each thread. A sample is a uint8 picture (H, W, C) of
any size (or a float array, for bundles that take arrays): preprocessing is in the bundle.
"""

import sys
from collections.abc import Iterator

import numpy as np
from PIL import Image

import edgeexit


def pictures(paths: list[str]) -> Iterator[np.ndarray]:
    """Your camera goes here."""
    for path in paths:
        yield np.asarray(Image.open(path).convert("RGB"))


def main(bundle_path: str, paths: list[str]) -> None:
    """Print one line a picture."""
    bundle = edgeexit.load_bundle(bundle_path)
    with edgeexit.Runner(bundle, policy="auto") as runner:
        for path, answer in zip(paths, runner.stream(pictures(paths)), strict=True):
            print(
                f"{path}: {answer.class_name} ({answer.confidence:.2f}), "
                f"left at exit {answer.exit} after {answer.latency_ns / 1e6:.3f} ms"
            )


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])

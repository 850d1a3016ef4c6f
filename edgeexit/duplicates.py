"""
Find pictures that look almost the same although they stand in different splits.

Callers see near_duplicates. Hidden here: a 64-bit difference hash is compared only among
pictures that share one of its four 16-bit parts, so that 100,000 pictures take seconds.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Two hashes that differ in at most 3 bits agree in at least one of 4 parts.
MAX_BITS = 3
# Mean difference of 16x16 thumbnails, in levels of 255, below which pictures count as one.
MAX_LEVELS = 3.0
# Pictures with an equal part are ordered by brightness; each is compared with so many others.
WINDOW = 24
_ONES = np.array([k.bit_count() for k in range(1 << 16)], np.uint8)


def near_duplicates(samples: NDArray[np.uint8], splits: NDArray[np.int64]) -> list[tuple[int, int]]:
    """
    Pairs of positions, sorted, of near-equal pictures in different splits.

    *samples* is uint8 (N, H, W, C), *splits* int64 (N,). A difference hash ("dHash": is each
    pixel of a 9x8 thumbnail brighter than its neighbour) nominates, thumbnails confirm. Shifted,
    mirrored or turned copies are not found, nor all of a crowd of more than 24 alike.
    """
    parts, small = _hashes(samples)
    brightness = small.mean(axis=1)
    pairs: set[tuple[int, int]] = set()
    for part in range(4):
        order = np.lexsort((brightness, parts[:, part]))
        for step in range(1, min(WINDOW, len(order) - 1) + 1):
            left, right = order[:-step], order[step:]
            near = (parts[left, part] == parts[right, part]) & (splits[left] != splits[right])
            left, right = left[near], right[near]
            bits = _ONES[parts[left] ^ parts[right]].sum(axis=1)
            levels = np.abs(small[left] - small[right]).mean(axis=1)
            same = (bits <= MAX_BITS) & (levels <= MAX_LEVELS)
            pairs.update(
                (min(a, b), max(a, b))
                for a, b in zip(left[same].tolist(), right[same].tolist(), strict=True)
            )
    return sorted(pairs)


def _hashes(samples: NDArray[np.uint8]) -> tuple[NDArray[np.uint16], NDArray[np.float32]]:
    """Hash parts uint16 (N, 4) and thumbnails float32 (N, 256)."""
    bits = np.empty((len(samples), 8, 8), np.bool_)
    small = np.empty((len(samples), 256), np.float32)
    for k, sample in enumerate(samples):
        image = Image.fromarray(sample[..., 0] if sample.shape[2] == 1 else sample).convert("L")
        tiny = np.asarray(image.resize((9, 8), Image.Resampling.BOX))
        bits[k] = tiny[:, 1:] > tiny[:, :-1]
        small[k] = np.asarray(image.resize((16, 16), Image.Resampling.BOX)).reshape(-1)
    packed = np.packbits(bits.reshape(len(samples), 64), axis=1)
    return np.ascontiguousarray(packed).view(np.uint16), small

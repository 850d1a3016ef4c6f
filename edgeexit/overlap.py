"""
Has the network seen these samples before? Digests of samples, and a Bloom filter over them.

Callers see sample_digests, Bloom and refuse_overlap. A checkpoint keeps its training samples'
digests as a Bloom filter of at most 100 kB whatever their number; thresholds chosen on
training samples would promise too much. Surprising: beyond 60,000 samples the filter keeps only
those whose digest ends in zero bits (half of them, a quarter, ...) instead of filling up: a
few samples told apart well find an overlap that many told apart badly would miss.
"""

import hashlib
import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeexit.errors import BadFile, UsageError

DIGEST_BYTES = 16
MAX_BITS = 98_304 * 8
# In a smaller table the probes of two digests coincide too often.
MIN_BITS = 512 * 8
# 13 bits and 9 probes a sample: 2 false hits in 1,000 queries.
BITS_PER_SAMPLE = 13
PROBES = 9
SIGNIFICANCE = 1e-9
_HEADER = struct.Struct("<4sBBHIQQ")  # magic, version, probes, shift, bits, kept, seen
_MAGIC = b"EEBF"


def sample_digests(samples: NDArray[Any]) -> NDArray[np.uint8]:
    """SHA-256 over dtype, shape and bytes of each of *samples* (N, ...), cut to uint8 (N, 16)."""
    samples = np.ascontiguousarray(samples, samples.dtype.newbyteorder("<"))
    prefix = hashlib.sha256(f"{samples.dtype.str}{samples.shape[1:]}".encode())
    digests = bytearray()
    for sample in samples:
        one = prefix.copy()
        one.update(sample.data)
        digests += one.digest()[:DIGEST_BYTES]
    return np.frombuffer(bytes(digests), np.uint8).reshape(-1, DIGEST_BYTES)


class Bloom:
    """
    A set of sample digests in at most 96 KiB: never forgets one, sometimes sees one too many.

    Equal digests give equal bytes in any order of adding. Probe i of a digest is bit
    (a + i * b) mod bits, a and b being the digest's halves as little-endian integers, b made
    odd (Kirsch and Mitzenmacher, "Less hashing, same performance", 2006).
    """

    def __init__(self, expected: int) -> None:
        """An empty filter for about *expected* digests (more make it less sharp)."""
        self._shift = 0
        while (max(expected, 1) >> self._shift) * BITS_PER_SAMPLE > MAX_BITS:
            self._shift += 1
        kept = max(expected, 1) >> self._shift
        self._probes = PROBES
        self._bits = min(MAX_BITS, max(MIN_BITS, -(-kept * BITS_PER_SAMPLE // 64) * 64))
        self._table = np.zeros(self._bits, np.bool_)
        self.seen = 0

    @classmethod
    def of(cls, digests: NDArray[np.uint8]) -> "Bloom":
        """The filter of *digests*, uint8 (N, 16)."""
        bloom = cls(len(digests))
        bloom.add(digests)
        return bloom

    def add(self, digests: NDArray[np.uint8]) -> None:
        """Remember *digests*, uint8 (N, 16)."""
        tested = digests[self.testable(digests)]
        for first in range(0, len(tested), 1 << 16):
            self._table[self._places(tested[first : first + (1 << 16)])] = True
        self.seen += len(digests)

    def testable(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of *digests* belong to the share that this filter keeps, bool (N,)."""
        ends = np.ascontiguousarray(_checked(digests)[:, 12:16]).view("<u4").reshape(-1)
        return np.asarray(ends >> np.uint32(32 - self._shift) == 0 if self._shift else ends >= 0)

    def hits(self, digests: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Which of *digests* were perhaps added, bool (N,); False where not testable."""
        found = self.testable(digests)
        found[found] = self._table[self._places(digests[found])].all(axis=1)
        return found

    @property
    def false_positive_rate(self) -> float:
        """The chance that a testable digest that was never added is a hit."""
        return float(self._table.mean()) ** self._probes

    @property
    def kept_share(self) -> float:
        """The share of all digests that this filter can test: 1, 1/2, 1/4, ..."""
        return 0.5**self._shift

    def _places(self, digests: NDArray[np.uint8]) -> NDArray[np.uint64]:
        halves = np.ascontiguousarray(digests).view("<u8").astype(np.uint64, copy=False)
        steps = np.arange(self._probes, dtype=np.uint64)
        probes = halves[:, :1] + steps * (halves[:, 1:] | np.uint64(1))
        return np.asarray(probes % np.uint64(self._bits))

    def to_bytes(self) -> bytes:
        """A header of 28 bytes and the bits; equal filters give equal bytes."""
        header = _HEADER.pack(
            _MAGIC, 1, self._probes, self._shift, self._bits, int(self._table.sum()), self.seen
        )
        return header + np.packbits(self._table).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "Bloom filter") -> "Bloom":
        """Read what to_bytes wrote; anything else is BadFile."""
        if len(data) < _HEADER.size or data[:4] != _MAGIC:
            raise BadFile(f"{where}: not a filter of sample digests")
        _, version, probes, shift, bits, ones, seen = _HEADER.unpack_from(data)
        if version != 1:
            raise BadFile(f"{where}: format {version}, this version reads 1")
        body = np.frombuffer(data, np.uint8, offset=_HEADER.size)
        sound = MIN_BITS <= bits <= MAX_BITS and bits % 8 == 0 and bits == 8 * len(body)
        if not (sound and 1 <= probes <= 32 and shift <= 31):
            raise BadFile(f"{where}: {len(data)} bytes, expected {_HEADER.size + bits // 8}")
        bloom = cls(0)
        bloom._probes, bloom._shift, bloom._bits = probes, shift, bits
        bloom._table, bloom.seen = np.unpackbits(body).astype(np.bool_), seen
        if int(bloom._table.sum()) != ones:
            raise BadFile(f"{where}: {int(bloom._table.sum())} bits set, expected {ones}")
        return bloom


def _checked(digests: NDArray[np.uint8]) -> NDArray[np.uint8]:
    if digests.dtype != np.uint8 or digests.ndim != 2 or digests.shape[1] != DIGEST_BYTES:
        raise BadFile(f"sample digests: {digests.dtype} {digests.shape}, expected uint8 (N, 16)")
    return digests


def overlap_count(bloom: Bloom, digests: NDArray[np.uint8]) -> tuple[int, int, float]:
    """
    (hits, tested, chance) for the distinct ones of *digests*, uint8 (N, 16).

    chance is the probability of so many hits or more if none of them was ever added: the upper
    tail of the binomial distribution with the filter's false-positive rate.
    """
    distinct = np.unique(_checked(digests), axis=0)
    tested = int(bloom.testable(distinct).sum())
    hits = int(bloom.hits(distinct).sum())
    return hits, tested, binomial_tail(hits, tested, bloom.false_positive_rate)


def refuse_overlap(bloom: Bloom, digests: NDArray[np.uint8], *, what: str, seen_in: str) -> None:
    """
    UsageError if chance cannot explain how many of *digests* the filter knows.

    *what* names the samples ("fashion-mnist:tuning"), *seen_in* the earlier use ("training").
    Refused when chance is below 1e-9. So a sound set is refused once in a thousand million
    times; against 60,000 training samples, a set of 100 (2,000; 10,000) distinct samples is
    surely refused from 8 (21; 52) shared ones, and often from fewer.
    """
    hits, tested, chance = overlap_count(bloom, digests)
    if hits and chance < SIGNIFICANCE:
        extra = max(1, round(hits - tested * bloom.false_positive_rate))
        raise UsageError(
            f"{what}: about {extra} of {tested} samples were already used for {seen_in}",
            hint="choose a set of samples that the network has never seen",
        )


def binomial_tail(at_least: int, count: int, rate: float) -> float:
    """P(X >= at_least) for X ~ Binomial(count, rate), summed term by term from logarithms."""
    if at_least <= 0:
        return 1.0
    if at_least > count or rate <= 0.0:
        return 0.0
    if rate >= 1.0:
        return 1.0
    total = 0.0
    for k in range(at_least, count + 1):
        term = math.exp(
            math.lgamma(count + 1)
            - math.lgamma(k + 1)
            - math.lgamma(count - k + 1)
            + k * math.log(rate)
            + (count - k) * math.log1p(-rate)
        )
        total += term
        if k > count * rate and term < total * 1e-12:
            break
    return min(total, 1.0)

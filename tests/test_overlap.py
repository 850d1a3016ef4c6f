"""Samples seen in training are recognised, and samples that merely look busy are not refused."""

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeexit.errors import BadFile, UsageError
from edgeexit.overlap import (
    Bloom,
    binomial_tail,
    overlap_count,
    refuse_overlap,
    sample_digests,
)


def digests(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def test_equal_samples_have_equal_digests_and_shape_and_dtype_count() -> None:
    samples = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)

    both = sample_digests(np.concatenate([samples, samples]))

    assert both.shape == (4, 16)
    assert both.dtype == np.uint8
    assert (both[:2] == both[2:]).all()
    assert (both[0] != both[1]).any()
    assert (sample_digests(samples.reshape(2, 4, 3)) != both[:2]).any()
    assert (sample_digests(samples.view(np.int8)) != both[:2]).any()
    big_endian = samples.astype(">f4")
    assert (sample_digests(big_endian) == sample_digests(samples.astype("<f4"))).all()


@pytest.mark.parametrize("count", [0, 1, 1_000, 60_000, 200_000])
def test_a_filter_forgets_nothing_and_stays_small(count: int) -> None:
    bloom = Bloom.of(digests(count, 0))

    assert len(bloom.to_bytes()) <= 100_000
    assert (bloom.hits(digests(count, 0)) == bloom.testable(digests(count, 0))).all()
    assert bloom.testable(digests(count, 0)).sum() >= 0.9 * count * bloom.kept_share
    assert bloom.false_positive_rate < 0.003
    strangers = digests(50_000, 1)
    assert bloom.hits(strangers).sum() <= 0.004 * bloom.testable(strangers).sum() + 3


def test_a_filter_survives_bytes_and_order() -> None:
    known = digests(500, 0)
    backwards = Bloom(500)
    backwards.add(known[250:][::-1])
    backwards.add(known[:250])

    data = Bloom.of(known).to_bytes()

    assert backwards.to_bytes() == data
    assert Bloom.from_bytes(data).to_bytes() == data
    assert Bloom.from_bytes(data).hits(known).all()


def test_a_damaged_filter_is_refused() -> None:
    data = Bloom.of(digests(500, 0)).to_bytes()
    flipped = data[:-1] + bytes([data[-1] ^ 1])

    for bad in (b"", data[:20], data[:-1], data + b"\0", b"X" + data[1:], flipped):
        with pytest.raises(BadFile):
            Bloom.from_bytes(bad, "model.pt: training_digests")


@pytest.mark.parametrize(("training", "count", "shared"), [(60_000, 2_000, 21), (60_000, 100, 8)])
def test_the_documented_overlap_is_refused(training: int, count: int, shared: int) -> None:
    seen = digests(training, 0)
    bloom = Bloom.of(seen)
    mixed = np.concatenate([seen[:shared], digests(count - shared, 1)])

    with pytest.raises(UsageError, match="already used for training"):
        refuse_overlap(bloom, mixed, what="mine:tuning", seen_in="training")


@pytest.mark.parametrize("seed", range(1, 6))
def test_strangers_are_not_refused(seed: int) -> None:
    bloom = Bloom.of(digests(60_000, 0))

    refuse_overlap(bloom, digests(5_000, seed), what="mine", seen_in="training")


def test_repeating_one_false_hit_proves_nothing() -> None:
    bloom = Bloom.of(digests(60_000, 0))
    strangers = digests(5_000, 1)
    unlucky = strangers[bloom.hits(strangers)][:1]

    hits, tested, chance = overlap_count(bloom, np.repeat(unlucky, 50, axis=0))

    assert (hits, tested) == (1, 1)
    assert chance > 1e-4


def test_the_binomial_tail_is_exact_on_small_cases() -> None:
    assert binomial_tail(0, 5, 0.5) == 1.0
    assert binomial_tail(6, 5, 0.5) == 0.0
    assert binomial_tail(2, 3, 0.5) == pytest.approx(0.5)
    assert binomial_tail(3, 3, 0.1) == pytest.approx(1e-3)


def test_foreign_digests_are_refused() -> None:
    with pytest.raises(BadFile, match=r"expected uint8 \(N, 16\)"):
        Bloom.of(np.zeros((3, 8), np.uint8))

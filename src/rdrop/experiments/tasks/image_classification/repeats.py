"""Finds images that stand in two splits, by the bytes in which they are stored."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.tasks.image_classification.sources import Source

MOST_IMAGES = 100_000
MOST_BYTES = 2**30
"""Above either, nothing is compared: every run would wait for it."""


def count_repeated(
    first: Source, first_rows: NDArray[np.int64], second: Source, second_rows: NDArray[np.int64]
) -> int | None:
    """Counts the rows of `second` whose image is stored byte for byte as one of `first`; None: too many to compare."""
    if len(first_rows) + len(second_rows) > MOST_IMAGES:
        return None
    first_sizes, second_sizes = first.sizes(first_rows), second.sizes(second_rows)
    # Only images of the same size are read.
    first_alike, second_alike = np.isin(first_sizes, second_sizes), np.isin(second_sizes, first_sizes)
    if first_sizes[first_alike].sum() + second_sizes[second_alike].sum() > MOST_BYTES:
        return None
    known = set(_digests(first, first_rows[first_alike]))
    return sum(digest in known for digest in _digests(second, second_rows[second_alike]))


def are_the_same(first: Source, second: Source, size: int) -> bool:
    """Whether two sets of `size` images are the same, in any order; of sets that are too large to compare, no."""
    if 2 * size > MOST_IMAGES:
        return False
    sizes, others = (np.sort(source.sizes(np.arange(size))) for source in (first, second))
    if sizes.sum() + others.sum() > MOST_BYTES or not np.array_equal(sizes, others):
        return False
    return Counter(_digests(first, range(size))) == Counter(_digests(second, range(size)))


def _digests(images: Source, rows: Iterable[int]) -> Iterator[bytes]:
    return (hashlib.blake2b(images.stored(int(row)), digest_size=16).digest() for row in rows)

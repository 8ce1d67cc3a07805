"""Splits that are held out of the training data: none lacks a class that has an example for each of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def with_every_class(drawn: Mapping[str, Rows], labels: NDArray[np.int64], seed: int) -> dict[str, Rows]:
    """Returns `drawn`, the rows of each split, if no class is missing in one that could be there; else stratified ones.

    `labels` `(N,)` are the classes of all rows. A class could be in each split if it has as many examples as there are
    splits. The stratified splits have the sizes of those drawn; all rows are sorted.
    """
    enough = np.flatnonzero(np.bincount(labels) >= len(drawn))
    if all(np.isin(enough, labels[rows]).all() for rows in drawn.values()):
        return dict(drawn)
    sizes = {name: len(rows) for name, rows in drawn.items()}
    split_of = _stratified(labels, [*sizes.values()], seed)
    _exchange(split_of, labels, enough)
    return {name: np.flatnonzero(split_of == number) for number, name in enumerate(sizes)}


def _stratified(labels: NDArray[np.int64], sizes: list[int], seed: int) -> NDArray[np.int64]:
    """Returns the number of the split of each row, `(N,)`: of every class its share, to about one example.

    The rows are shuffled and put in the order of their classes; along them the splits take turns, evenly.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    turns = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    split_of = np.empty(len(labels), dtype=np.int64)
    split_of[by_class] = np.repeat(np.arange(len(sizes)), sizes)[np.argsort(turns, kind="stable")]
    return split_of


def _exchange(split_of: NDArray[np.int64], labels: NDArray[np.int64], enough: NDArray[np.int64]) -> None:
    """Lets an example of a class in `enough` that a split lacks change places with one of the split's largest class."""
    splits = int(split_of.max()) + 1
    for label in enough:
        for split in range(splits):
            own = labels[split_of == split]
            if label in own:
                continue
            counts = np.bincount(own)
            if counts.max() < 2:
                continue  # the split has fewer examples than there are classes
            giver = np.bincount(split_of[labels == label], minlength=splits).argmax()
            given = np.flatnonzero((split_of == giver) & (labels == label))[0]
            returned = np.flatnonzero((split_of == split) & (labels == counts.argmax()))[0]
            split_of[given], split_of[returned] = split, giver

"""Order and chance as pure functions: what an update sees depends on where it is, never on what ran before it.

That is why a checkpoint stores no generator's state, why a resumed run ends in the same bits, and why evaluation cannot
disturb training.
"""

import hashlib
import random
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from rdrop.experiments.recipe import Recipe


def data_order(step: int, recipe: Recipe, train_size: int) -> tuple[int, NDArray[np.int64]]:
    """The epoch and the indices of the update after `step` updates.

    Each epoch is a new permutation of all examples; what is left of it after the last whole batch is not used.
    """
    epoch, place = divmod(step, updates_per_epoch(recipe, train_size))
    return epoch, permutation(recipe.seed, epoch, train_size)[place * recipe.batch_size :][: recipe.batch_size]


@lru_cache(maxsize=1)
def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng(derived_seed(seed, "order", epoch)).permutation(size)


def updates_per_epoch(recipe: Recipe, train_size: int) -> int:
    return train_size // recipe.batch_size


def seed_all(*key: int | str) -> None:
    """Seeds the global generators of Python, numpy and torch (all devices) from `key`, and from nothing else."""
    seed = derived_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derived_seed(*key: int | str) -> int:
    """A seed for each key, unrelated for keys that differ: 63 bits of the SHA-256 of `key`."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1

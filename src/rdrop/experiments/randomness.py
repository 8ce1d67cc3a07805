"""Chance as a pure function: what an update draws depends on where it is, never on what ran before it.

That is why a checkpoint stores no generator's state, why a resumed run ends in the same bits, and why evaluation cannot
disturb training.
"""

import hashlib
import random

import numpy as np
import torch


def seed_all(*key: int | str) -> None:
    """Seeds the global generators of Python, numpy and torch (all devices) from `key`, and from nothing else."""
    seed = derived_seed(*key)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:  # the same for the CPU; for the devices that are not there it would note who called, a millisecond each time
        torch.default_generator.manual_seed(seed)


def derived_seed(*key: int | str) -> int:
    """A seed for each key, unrelated for keys that differ: 63 bits of the SHA-256 of `key`."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8]) >> 1

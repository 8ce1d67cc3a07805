"""The terms of the loss as the Trainer logs them."""

from typing import Any

import torch
from torch import Tensor


class TermMeans:
    """Sums of the logged terms since the last log. Each term is the mean over the updates that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._updates: dict[str, set[int]] = {}

    def add(self, update: int, **terms: Tensor) -> None:
        """Adds a micro-batch's part of the terms of one update."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._updates.setdefault(name, set()).add(update)

    def pop(self, accelerator: Any) -> dict[str, float]:
        """Returns the means over all processes, and forgets them."""
        means = {
            name: accelerator.gather(total.reshape(1)).mean().item() / len(self._updates[name])
            for name, total in self._sums.items()
        }
        self._sums, self._updates = {}, {}
        return means

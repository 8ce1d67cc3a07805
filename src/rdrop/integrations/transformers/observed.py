"""Means that are logged, labels that count, a divergence: what the updates of a training have shown so far."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from rdrop.integrations.requirements import ENOUGH_UPDATES, warn_of_no_divergence


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


class LabelsSeen:
    """Whether labels count at all. The counts stay on the accelerator until something is logged."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        """How many counted since the first update, until it is known that some do; None if it was not seen."""
        self._updates_without: Tensor | int = 0
        self._updates_without_unlabeled: Tensor | int = 0
        self._is_warned = self._is_warned_of_unlabeled = False

    def add(self, count: Tensor, update: int, epoch: float | None) -> None:
        """Adds the labels that count in an update, `update` updates after the first, over all processes.

        Raises `ValueError` once an epoch has gone by in which none did.
        """
        if update == 0:
            self._total = torch.zeros_like(count)
        if epoch and epoch >= 1:
            self.require_some(update)
        elif self._total is not None:
            self._total += count
        self._updates_without += count == 0

    def add_unlabeled(self, count: Tensor) -> None:
        """Adds the positions that count in the examples without labels of an update."""
        self._updates_without_unlabeled += count == 0

    def require_some(self, updates: int) -> None:
        """Refuses a training all of whose labels are ignored, once: after its first epoch, or where it ends before."""
        total, self._total = self._total, None
        if total is not None and total == 0:
            raise ValueError(
                f"no label in {updates} updates counts: all are -100, so the model has learned nothing. "
                "See what the data collator leaves of the labels, and whether truncation cuts off the part with them"
            )

    def warn(self, updates: int) -> None:
        """Warns, once each, of updates without a label, or without an unlabeled position, that counts."""
        some_count = self._total is None or self._total > 0  # else all is refused in the end
        if some_count and not self._is_warned and (without := int(self._updates_without)):
            self._is_warned = True
            warnings.warn(
                f"{without} of {updates} updates had no label that counts: all were -100, and nothing "
                "was learned from their examples. See what the data collator leaves of the labels, and whether "
                "truncation cuts off the part with them",
                stacklevel=3,
            )
        if not self._is_warned_of_unlabeled and (without := int(self._updates_without_unlabeled)):
            self._is_warned_of_unlabeled = True
            warnings.warn(
                f"{without} of {updates} updates had no position of unlabeled_dataset that counts: all "
                "were -100. Label with 0 every position whose predictions are to be compared",
                stacklevel=3,
            )


class DivergenceSeen:
    """Whether the passes have differed in any update."""

    def __init__(self) -> None:
        self._updates: set[int] | None = set()
        """The regularized ones, while no divergence was seen."""
        self._is_warned = False

    def add(self, update: int) -> None:
        """Notes a regularized update."""
        if self._updates is not None:
            self._updates.add(update)

    def warn(self, divergence: float) -> None:
        """Warns, once, of regularized updates without any; `divergence` is the mean since the last log."""
        if divergence:
            self._updates = None
        elif self._updates is not None and len(self._updates) >= ENOUGH_UPDATES and not self._is_warned:
            self._is_warned = True
            warn_of_no_divergence(len(self._updates))

"""Examples without labels in the Hugging Face Trainer: which of them stand beside an update, and which positions count.

R-Drop learns from them by the divergence alone. Their order is a function of the update, so a resumed training goes on
with it, and needs nothing in a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rdrop.integrations.targets import Batch
from rdrop.passes import find_batch_size
from rdrop.terms import IGNORE_INDEX


@dataclass(frozen=True)
class UnlabeledOrder:
    """Endless permutations of `size` examples, one after the other, of which every update takes the next ones.

    A micro-batch has `batch_size` of them; an update `per_update` micro-batches in each of `processes`.
    """

    size: int
    batch_size: int
    per_update: int
    process: int
    processes: int
    seed: int

    def of_update(self, number: int) -> list[list[int]]:
        """Returns the indices of this process's micro-batches of update `number`, counted from 0."""
        parts = range(number * self.per_update, (number + 1) * self.per_update)
        starts = [(part * self.processes + self.process) * self.batch_size for part in parts]
        return [[self._at(place) for place in range(start, start + self.batch_size)] for start in starts]

    def _at(self, place: int) -> int:
        epoch, place = divmod(place, self.size)
        if epoch not in self._permutations:
            self._permutations.clear()
            digest = hashlib.sha256(f"unlabeled {self.seed} {epoch}".encode()).digest()
            draw = torch.Generator().manual_seed(int.from_bytes(digest[:4]))  # of which it takes 32 bits
            self._permutations[epoch] = torch.randperm(self.size, generator=draw).tolist()
        return self._permutations[epoch][place]

    _permutations: dict[int, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)


class UnlabeledBatches:
    """Collates the micro-batches of an order, ahead of their update where the data loader has workers."""

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any], order: UnlabeledOrder, **loader: Any) -> None:
        self._dataset, self._collate, self._order, self._loader = dataset, collate, order, loader
        self._batches: Iterator[Any] = iter(())
        self._next: int | None = None

    def of_update(self, number: int) -> list[Batch]:
        """Returns this process's micro-batches of update `number`, counted from 0."""
        if number != self._next:
            batches = (indices for update in count(number) for indices in self._order.of_update(update))
            seed = torch.Generator().manual_seed(self._order.seed + self._order.process)  # dropout's stays as it is
            self._batches = iter(
                DataLoader(
                    self._dataset, batch_sampler=batches, collate_fn=self._collate, generator=seed, **self._loader
                )
            )
        self._next = number + 1
        return [dict(batch) for batch in islice(self._batches, self._order.per_update)]


def with_labels(unlabeled: Batch, labeled: Batch, names: Sequence[str], *, decoder_reads: bool) -> Batch:
    """Returns a batch with labels that only say which of its positions count: -100 where one does not, else 0.

    Labels of the `labeled` batch that are one for each example make every example count. Else the unlabeled batch has
    its own, of which nothing is read but where they are -100; unless `decoder_reads` them, as its input.
    """
    filled = dict(unlabeled)
    for name in [name for name in names if isinstance(labeled.get(name), Tensor)]:
        labels, own = labeled[name], unlabeled.get(name)
        if labels.dim() <= 2 and (labels.is_floating_point() or labels.shape[1:].numel() == 1):
            filled[name] = labels.new_zeros(find_batch_size(unlabeled), *labels.shape[1:])
        elif own is not None:
            filled[name] = own if decoder_reads else torch.where(own == IGNORE_INDEX, own, 0)
        else:
            raise ValueError(
                f"a batch of unlabeled_dataset has no {name!r}, and those of the labeled one, {tuple(labels.shape)}, "
                "are several for an example: which positions of an unlabeled one count is not known. Give it "
                f"{name!r}, 0 at every position to compare and -100 elsewhere, as at padding; nothing else is read "
                "of them"
            )
    return filled

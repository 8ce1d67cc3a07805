"""Which examples each update sees: a pure function of the recipe and of where the training is.

That is why a checkpoint stores no place in a data loader: `DataOrder.at(step)` is the same whatever ran before.
"""

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.randomness import derived_seed
from rdrop.experiments.recipe import Recipe

Indices = NDArray[np.int64]


class OrderError(ValueError):
    """Batches that cannot be made: key, value, rule."""


class DataOrder:
    """The batches of every epoch, of `batch_size` examples or of `batch_tokens` tokens.

    By examples, an epoch is a new permutation of all examples; what is left of it after the last whole batch is not
    used, and a batch that is cut has its longest examples first, so that its parts have little padding. By tokens,
    examples of similar length make a batch (length bucketing), padded to `batch_tokens` at most; the batches are made
    once, and an epoch is a new permutation of them. A batch is cut into `parts` (accumulation steps times processes) of
    at least one example: a last one with fewer, of the shortest examples, is not used.

    `exact_updates_per_epoch` counts what is left of an epoch too, so that twice the batch has half of them.
    `lengths` are those of the `size` training examples, in tokens. Raises `OrderError` where no such batch can be made.
    """

    def __init__(self, recipe: Recipe, size: int, lengths: Indices | None, *, parts: int = 1) -> None:
        self.size = size
        self._batch_size, self._cut = recipe.batch_size, _CutByLength(lengths, parts)
        self._batches: list[Indices] = []
        if recipe.batch_size is not None:
            self.updates_per_epoch = _batches_of_examples(recipe.batch_size, size, parts)
            self.exact_updates_per_epoch = size / recipe.batch_size
            self._epochs = _Epochs(recipe.seed, "order", size)
            return
        if lengths is None:
            raise OrderError(
                f"batch_tokens (={recipe.batch_tokens}): {recipe.task} has no tokens; set batch_size instead"
            )
        assert recipe.batch_tokens is not None  # the recipe has one of the two
        self._batches = batches_of_tokens(lengths, recipe.batch_tokens, recipe.seed, parts=parts)
        self.updates_per_epoch = len(self._batches)
        self.exact_updates_per_epoch = float(self.updates_per_epoch)
        self._epochs = _Epochs(recipe.seed, "order", len(self._batches))

    def at(self, step: int) -> tuple[int, Indices]:
        """The epoch and the indices of the update after `step` updates."""
        epoch, place = divmod(step, self.updates_per_epoch)
        if self._batch_size is None:
            return epoch, self._batches[self._epochs.permutation(epoch)[place]]
        return epoch, self._cut(self._epochs.permutation(epoch)[place * self._batch_size :][: self._batch_size])


class UnlabeledOrder:
    """Which of the `size` examples without labels an update has beside its batch, `per_update` of them.

    `lengths` and `parts` are as in `DataOrder`.
    """

    def __init__(self, seed: int, size: int, lengths: Indices | None, per_update: int, *, parts: int) -> None:
        if not parts <= per_update <= size:
            raise OrderError(
                f"data.unlabeled_batch (={per_update}) must be at least accumulation times the number of processes "
                f"(={parts}), and at most the number of unlabeled examples (={size})"
            )
        self._per_update, self._updates_per_epoch = per_update, size // per_update
        self._cut = _CutByLength(lengths, parts)
        self._epochs = _Epochs(seed, "unlabeled", size)

    def at(self, step: int) -> tuple[int, Indices]:
        """Their epoch, which is not that of the labeled ones, and their indices."""
        epoch, place = divmod(step, self._updates_per_epoch)
        return epoch, self._cut(self._epochs.permutation(epoch)[place * self._per_update :][: self._per_update])


class _CutByLength:
    """Orders a batch that is cut into `parts` by length, so that they are length-bucketed.

    The update is the same, but for its dropout masks: its loss is a sum over examples, and the batch's are those drawn.
    """

    def __init__(self, lengths: Indices | None, parts: int) -> None:
        self._lengths = lengths if parts > 1 else None

    def __call__(self, batch: Indices) -> Indices:
        if self._lengths is None:
            return batch
        return batch[np.argsort(-self._lengths[batch], kind="stable")]


class _Epochs:
    """Draws for each epoch a permutation of `size` things, and keeps the last one asked for."""

    def __init__(self, seed: int, what: str, size: int) -> None:
        self._seed, self._what, self._size = seed, what, size
        self._last: tuple[int, Indices] | None = None

    def permutation(self, epoch: int) -> Indices:
        if self._last is None or self._last[0] != epoch:
            generator = np.random.default_rng(derived_seed(self._seed, self._what, epoch))
            self._last = epoch, generator.permutation(self._size)
        return self._last[1]


def batches_of_tokens(lengths: Indices, batch_tokens: int, seed: int, *, parts: int = 1) -> list[Indices]:
    """Buckets every example once by length: a batch's longest length times its size is <= `batch_tokens`.

    `seed` decides which of the examples of one length share a batch.
    """
    shuffled = np.random.default_rng(derived_seed(seed, "batches")).permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]  # the longest first: a remainder is cheap
    if len(order) and lengths[order[0]] > batch_tokens:
        raise OrderError(
            f"batch_tokens (={batch_tokens}) must be at least the tokens of the longest training example, number "
            f"{order[0]} with {lengths[order[0]]}; raise it, or have the task cut or skip such examples"
        )
    batches = []
    start = 0
    while start < len(order):
        size = max(int(batch_tokens // max(lengths[order[start]], 1)), 1)
        batches.append(order[start : start + size])
        start += size
    if batches and len(batches[-1]) < parts:
        batches.pop()
    smallest = min(map(len, batches), default=0)
    if smallest < parts:
        raise OrderError(
            f"batch_tokens (={batch_tokens}) makes batches of {smallest} examples, fewer than accumulation times "
            f"processes (={parts}): raise it, or lower accumulation"
        )
    return batches


def _batches_of_examples(batch_size: int, size: int, parts: int) -> int:
    if batch_size > size:
        raise OrderError(
            f"batch_size (={batch_size}) must be at most the number of training examples (={size}): lower it; for a "
            "baseline with twice the batch, to half of them, or leave that arm out (--no-double-batch)"
        )
    if batch_size < parts:
        raise OrderError(
            f"batch_size (={batch_size}) must be at least accumulation times the number of processes (={parts})"
        )
    return size // batch_size

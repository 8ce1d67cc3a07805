"""The forward and the evaluation of a model that maps a sequence to a sequence, for the tasks that write text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rdrop.experiments.tasks.share import Share
from rdrop.experiments.tasks.task import Batch
from rdrop.experiments.tasks.token_sequences import batches_by_length

IGNORE_INDEX = -100
MOST_SOURCES = 500
"""Of so many examples of a large valid split the use of the source is measured."""


def encoder_decoder_sizes(model: Any) -> dict[str, Any]:
    """Returns the arguments of a configuration whose encoder and decoder have the same sizes, those of a recipe."""
    sizes = {"layers": model.layers, "attention_heads": model.heads, "ffn_dim": model.intermediate_size}
    return {f"{half}_{name}": size for half in ("encoder", "decoder") for name, size in sizes.items()}


def forward_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Computes the logits `(N, T, V)` of a batch with `input_ids`, `attention_mask` and `decoder_input_ids`."""
    names = ("input_ids", "attention_mask", "decoder_input_ids")
    logits: Tensor = model(**{name: batch[name] for name in names}, use_cache=False).logits
    return logits


@torch.no_grad()
def search_and_loss(
    model: nn.Module,
    forward: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[list[int]],
    batch_of: Callable[[list[int]], Batch],
    search: Callable[[list[int]], list[list[int]]] | None,
    share: Share,
) -> tuple[dict[int, list[int]], float, int]:
    """Searches an output for each row of the batches, and adds up the loss of their labels.

    Loss and search take turns, batch by batch: a stop signal is noticed in the forward of the loss.

    Returns: the output of each row (none without a search); the sum of the loss; the number of labels.
    """
    device = next(model.parameters()).device

    def of_batch(rows: list[int]) -> tuple[float, int, dict[int, list[int]]]:
        batch = {name: tensor.to(device) for name, tensor in batch_of(rows).items()}
        loss, count = _loss(model, forward, batch)
        return loss, count, {} if search is None else dict(zip(rows, search(rows), strict=True))

    found: dict[int, list[int]] = {}
    total, tokens = 0.0, 0
    for loss, count, outputs in share.map(of_batch, list(batches)):
        total, tokens = total + loss, tokens + count
        found |= outputs
    return found, total, tokens


@torch.no_grad()
def source_use(
    model: nn.Module,
    forward: Callable[[nn.Module, Batch], Tensor],
    batch_of: Callable[[list[int], list[int]], Batch],
    lengths: NDArray[np.int64],
    batch_size: int,
    share: Share,
) -> dict[str, float]:
    """Measures by how many nats the mean loss of a label rises where each example gets the source of another one.

    It is 0 for a model of the targets alone, whatever its loss. Of the first `MOST_SOURCES` examples: two forwards
    over them. Who gets whose source is the same at each call.

    `batch_of(rows, sources)` makes a batch of the targets of some examples with the sources of others; `lengths` are
    those of all targets. Returns `{"source_use": ...}`; nothing for a single example, which has no other.
    """
    size = min(len(lengths), MOST_SOURCES)
    if size < 2:
        return {}
    order = np.random.default_rng(0).permutation(size)
    other = np.empty_like(order)
    other[order] = np.roll(order, 1)  # one cycle through all: none gets its own
    device = next(model.parameters()).device

    def of_batch(rows: list[int]) -> tuple[float, float, int]:
        losses = []
        for sources in (rows, other[rows].tolist()):
            batch = {name: tensor.to(device) for name, tensor in batch_of(rows, sources).items()}
            loss, count = _loss(model, forward, batch)
            losses.append(loss)
        return losses[0], losses[1], count

    rise, labels = 0.0, 0
    for own, of_another, count in share.map(of_batch, list(batches_by_length(lengths, range(size), batch_size))):
        rise = rise - own + of_another
        labels += count
    return {"source_use": rise / labels}


def _loss(model: nn.Module, forward: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> tuple[float, int]:
    """Returns the summed loss of a batch's labels, and their number."""
    labels = batch["labels"].flatten()
    logits = forward(model, batch).flatten(0, 1).float()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
    return total, int((labels != IGNORE_INDEX).sum())

"""The forward and the evaluation of a model that maps a sequence to a sequence, for the tasks that write text."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdrop.experiments.tasks.task import Batch

IGNORE_INDEX = -100


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
    batches: Iterable[tuple[list[int], Batch]],
    search: Callable[[list[int]], list[list[int]]] | None,
) -> tuple[dict[int, list[int]], float, int]:
    """Searches an output for each row of the batches, and adds up the loss of their labels.

    Loss and search take turns, batch by batch: a stop signal is noticed in the forward of the loss.

    Returns: the output of each row (none without a search); the sum of the loss; the number of labels.
    """
    device = next(model.parameters()).device
    found: dict[int, list[int]] = {}
    total, tokens = 0.0, 0
    for rows, batch in batches:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        labels = batch["labels"].flatten()
        logits = forward(model, batch).flatten(0, 1).float()
        total += F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum").item()
        tokens += int((labels != IGNORE_INDEX).sum())
        if search is not None:
            found |= zip(rows, search(rows), strict=True)
    return found, total, tokens

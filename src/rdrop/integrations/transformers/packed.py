"""Packed rows of transformers: one row of several sequences, each of which attends to itself alone ("padding-free").

The passes of such a batch are more sequences of the same row: repeated as rows, its sequences would no longer be found.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rdrop.integrations.targets import Batch, Target
from rdrop.integrations.transformers.forward import Fused, same_randomness
from rdrop.terms import IGNORE_INDEX

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Where each sequence of the row begins, and where the last one ends."""

SEQUENCE = "seq_idx"
"""Which sequence each position is of."""


def is_packed(model: nn.Module, inputs: Batch) -> bool:
    """Whether the batch is one row whose sequences the model finds by their boundaries, or by their positions."""
    row = inputs.get("input_ids", inputs.get("inputs_embeds"))
    rows = len(row) if isinstance(row, Tensor) else 1
    if BOUNDARIES[0] in inputs:
        if rows != 1:
            raise ValueError(
                f"the batch has {BOUNDARIES[0]}, by which the sequences of one row are found, and {rows} rows: put "
                "them into one, as DataCollatorWithFlattening does, or leave the boundaries out"
            )
        return True
    flash = "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    return flash and rows == 1 and "position_ids" in inputs and "attention_mask" not in inputs


def repeat_packed(inputs: Batch, passes: int) -> Batch:
    """Returns the row `(1, S)` as one of `(1, passes * S)`, which has every sequence `passes` times."""
    size = _length(inputs)
    repeated: Batch = {**inputs, "use_cache": False}  # with a cache, transformers does not look for sequences
    for name, part in inputs.items():
        if name in BOUNDARIES:
            repeated[name] = torch.cat([part, *(part[1:] + number * size for number in range(1, passes))])
        elif name == SEQUENCE:
            count = part.max() + 1
            repeated[name] = torch.cat([part + number * count for number in range(passes)], 1)
        elif isinstance(part, Tensor) and part.dim() > 0:
            repeated[name] = torch.cat([part] * passes, _positions_of(name, part, size))
    if isinstance(repeated.get("labels"), Tensor):  # nothing predicts the first token of a pass
        repeated["labels"][..., ::size] = IGNORE_INDEX
    return repeated


def by_pass(outputs: Any, passes: int) -> Any:
    """Returns what a model returns of a repeated row with every tensor `(1, passes * S, ...)` as `(passes, S, ...)`."""
    if isinstance(outputs, Tensor):
        is_row = outputs.dim() > 1 and len(outputs) == 1 and outputs.shape[1] % passes == 0
        return outputs.view(passes, -1, *outputs.shape[2:]) if is_row else outputs
    changed = copy.copy(outputs)
    for name, part in outputs.items():
        if isinstance(part, Tensor):
            changed[name] = by_pass(part, passes)
    return changed


def cut_packed(inputs: Batch, parts: int) -> list[Batch]:
    """Returns the row as up to `parts` rows of about equal length, cut between sequences."""
    size, begins = _length(inputs), _begins(inputs)

    def nearest(position: float) -> int:
        return min(begins, key=lambda begin: abs(begin - position))

    cuts = sorted({0, size, *(nearest(size * number / parts) for number in range(1, parts))})
    return [_positions(inputs, start, stop) for start, stop in pairwise(cuts)]


def fullest_sequence(inputs: Batch, target: Target) -> tuple[Batch, Target]:
    """Returns the sequence with the most labels that count, a row of one."""
    spans = list(pairwise([*_begins(inputs), _length(inputs)]))
    labels = [target.labels[:, start:stop] for start, stop in spans]
    counts = [(some != IGNORE_INDEX).sum() for some in labels]
    number = int(torch.stack(counts).argmax())
    return _positions(inputs, *spans[number]), replace(target, labels=labels[number])


def _positions(inputs: Batch, start: int, stop: int) -> Batch:
    """Returns the positions of some whole sequences as a row of their own."""
    row, size = dict(inputs), _length(inputs)
    for name, part in inputs.items():
        if name in BOUNDARIES:
            row[name] = part[(part >= start) & (part <= stop)] - start
        elif isinstance(part, Tensor) and part.dim() > 0:
            row[name] = part.narrow(_positions_of(name, part, size), start, stop - start)
    if SEQUENCE in row:
        row[SEQUENCE] = row[SEQUENCE] - row[SEQUENCE][..., :1]
    labels = inputs.get("labels")
    if start > 0 and isinstance(labels, Tensor) and (labels[..., start] != IGNORE_INDEX).any():
        raise ValueError(
            f"labels[..., {start}] of a packed row counts, and is that of the first token of a sequence, which nothing "
            "in this sequence predicts: set it to -100, as the collators of transformers and TRL do"
        )
    return row


def require_separate_passes(model: nn.Module, fused: Fused, repeated: Batch, passes: int) -> None:
    """Raises a ValueError where the last pass of a repeated row sees the others; runs the model twice, in evaluation.

    The first time as it is, then with the others reversed, which must not change what the model says of the last one.
    """
    last = _length(repeated) - _length(repeated) // passes
    tokens = {name: repeated[name] for name in ("input_ids", "inputs_embeds") if isinstance(repeated.get(name), Tensor)}
    others = {name: torch.cat([part[:, :last].flip(1), part[:, last:]], 1) for name, part in tokens.items()}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), same_randomness():
            first, second = (_states(model, fused, inputs)[:, last:] for inputs in (repeated, repeated | others))
    finally:
        for module, training in modes.items():
            module.training = training
    if (second - first).float().norm() > 1e-3 * first.float().norm():
        attention = getattr(fused.inner.config, "_attn_implementation", None)
        raise ValueError(
            f"{type(fused.inner).__name__} does not keep the sequences of a packed row apart (with attention "
            f"{attention!r}), so a pass would see the others. Use an attention that does (flash_attention_2), or a "
            "collator that pads; in TRL packing=False and padding_free=False, or packing_strategy='wrapped'"
        )


def _states(model: nn.Module, fused: Fused, inputs: Batch) -> Tensor:
    """Returns what the output layer gets, where that can be known; else the logits."""
    if fused.reason() is None:
        return fused.run(lambda: model(**inputs))[0][0]
    return model(**inputs).logits  # type: ignore[no-any-return]


def _length(inputs: Batch) -> int:
    row = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not isinstance(row, Tensor):
        raise ValueError(f"a packed batch without input_ids and inputs_embeds has no row to repeat; it has {[*inputs]}")
    return row.shape[1]


def _begins(inputs: Batch) -> list[int]:
    """Returns where the sequences of the row begin."""
    if BOUNDARIES[0] in inputs:
        return inputs[BOUNDARIES[0]][:-1].tolist()  # type: ignore[no-any-return]
    positions = inputs["position_ids"].reshape(-1, _length(inputs))[0]
    return [0, *((positions.diff() != 1).nonzero().flatten() + 1).tolist()]


def _positions_of(name: str, part: Tensor, size: int) -> int:
    """Returns which dimension of a tensor is the positions': `(1, S, ...)`, or `(3, 1, S)` for `position_ids`."""
    if part.dim() > 1 and len(part) == 1 and part.shape[1] == size:
        return 1
    if name == "position_ids" and part.shape[-1] == size:
        return part.dim() - 1
    raise ValueError(
        f"batch[{name!r}] {tuple(part.shape)} of a packed row has no dimension of its {size} positions behind one of "
        "1 row: what belongs to which pass is not known. Use a collator that pads"
    )

"""The arguments of both losses: what they must be, and the one message for each that is not.

Whatever depends on values is checked on CPU, outside `torch.compile`: an accelerator is never waited for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .terms import (
    OF_SOFTMAXES,
    SUM_TOLERANCE,
    Divergence,
    TaskLoss,
    at_least_float32,
    binary_cross_entropy,
    cross_entropy,
    squared_error,
)

if TYPE_CHECKING:
    from .kernels import Implementation

Reduction = Literal["mean", "sum", "none"]


def checked_alpha(alpha: Any) -> float:
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise TypeError(f"alpha (={alpha!r}) must be a number >= 0") from None
    if not 0 <= value < math.inf:  # a compiled graph has no isfinite of a number that changes
        raise ValueError(f"alpha (={value}) must be a finite number >= 0")
    return value


def check_options(label_smoothing: float, reduction: Reduction, num_items: int | Tensor | None) -> None:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing (={label_smoothing}) must be in [0, 1)")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction (={reduction!r}) must be 'mean', 'sum' or 'none'")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides the mean: it needs reduction='mean', not {reduction!r}")


def require_tensors(**arguments: Any) -> None:
    """Refuses a list, an array or None in the place of a tensor."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, and is of type {type(value).__name__}")


def refuse_transforms(*tensors: Tensor | None) -> None:
    """Refuses a tensor inside a transform of `torch.func`, and one with a forward-mode tangent, which would be lost."""
    if torch.compiler.is_compiling():
        return
    unpack: Any = forward_ad.unpack_dual
    is_transformed: Any = torch._C._functorch.is_functorch_wrapped_tensor
    for tensor in filter(torch.is_tensor, tensors):
        if is_transformed(tensor) or unpack(tensor).tangent is not None:
            raise NotImplementedError(
                "the R-Drop loss has no forward-mode derivative and no rules for torch.func (grad, vmap, jacrev, jvp, "
                "...): take its gradient by loss.backward() or torch.autograd.grad, outside of them, or write the "
                "formula of rdrop_loss's docstring in plain PyTorch"
            )


def number_of_passes(name: str, rows: Tensor, labels: Tensor, call: str) -> int:
    """Returns m of the argument `name`, `(m*N, ...)`, and labels `(N, ...)`; `call` shows how both are made."""
    shapes = f"{name} {tuple(rows.shape)} and labels {tuple(labels.shape)}"
    if rows.shape[0] == labels.shape[0] > 0:
        raise ValueError(
            f"{shapes}: as many rows as labels is one pass, and R-Drop compares m >= 2. Repeat the inputs, not the "
            f"labels: {call}"
        )
    passes = rows.shape[0] // labels.shape[0] if labels.shape[0] else 2
    if rows.shape[0] != passes * labels.shape[0] or passes < 2:
        raise ValueError(
            f"{shapes}: the first dimension of {name} must be m >= 2 times that of labels: {name} of "
            "repeat_batch(x, m), labels of x"
        )
    return passes


PASS = "pass"
"""How an error says to take another loss, in a function that takes `task_loss` and `divergence`."""


def check_classes(
    task_loss: TaskLoss | None, divergence: Divergence, name: str, given: Tensor, classes: int, how: str = PASS
) -> None:
    """Refuses a softmax over fewer than two classes; `name` and `given` are the argument that has them."""
    if classes < 2 and (task_loss is cross_entropy or divergence in OF_SOFTMAXES):
        raise ValueError(
            f"{name} {tuple(given.shape)} for {classes} class{'es' * (classes != 1)}: a softmax needs two, since that "
            f"of one is always 1 and its loss 0 for ever. For yes or no {how} task_loss=binary_cross_entropy, "
            "divergence=bernoulli_kl; for numbers task_loss=squared_error, divergence=squared_difference"
        )


def check_options_of_classes(task_loss: TaskLoss, label_smoothing: float, weight: Tensor | None) -> None:
    """Refuses what only a cross-entropy has."""
    if task_loss is not cross_entropy and (label_smoothing or weight is not None):
        raise ValueError(
            "label_smoothing and weight belong to the cross-entropy; with another task_loss, put them into the "
            "callable: task_loss=lambda logits, labels: ..."
        )


OPERATIONS_OF_CHANNELS = ("Convolution", "MkldnnConvolution", "Upsample", "NativeBatchNorm", "CudnnConvolution")
PASSED_THROUGH = ("Cat", "Clone", "ToCopy", "Slice", "Mul", "Div")


def check_classes_last(logits: Tensor) -> None:
    """Refuses logits `(m*N, V, ..., V)` of a convolution, whose classes come first; of other shapes the shape tells."""
    if logits.dim() < 3 or logits.shape[1] != logits.shape[-1] or torch.compiler.is_compiling():
        return
    node = logits.grad_fn
    while node is not None and node.name().startswith(PASSED_THROUGH):
        node = node.next_functions[0][0]
    if node is not None and node.name().startswith(OPERATIONS_OF_CHANNELS):
        raise ValueError(
            f"logits {tuple(logits.shape)} come from a convolution, which has the classes in dimension 1, and here "
            "they are the last dimension: pass logits.movedim(1, -1)"
        )


def check_labels(
    task_loss: TaskLoss, labels: Tensor, valid: Tensor, classes: int, *, read_by_kernel: bool = False
) -> None:
    """Refuses labels `(N, ...)` or `(N, ..., K)` that are not what `task_loss` learns from; a callable takes any.

    Values are checked on CPU. An accelerator is not waited for: there wrong ones give a wrong or infinite loss.
    Probabilities that are `read_by_kernel` are not read here: of wrong ones it makes NaN.
    """
    if task_loss is cross_entropy and labels.dim() == valid.dim():
        check_class_labels(labels, valid, classes)
    elif task_loss is cross_entropy:
        check_probabilities(labels, read=not read_by_kernel)
    elif task_loss is binary_cross_entropy and values_may_be_read(labels):
        rule = "must be in [0, 1]: 1 for yes, 0 for no. Where some are not known, pass a task_loss that leaves them out"
        _refuse(~((labels >= 0) & (labels <= 1)), labels, valid.dim(), rule)
    elif task_loss is squared_error and labels.is_floating_point() and values_may_be_read(labels):
        _refuse(~labels.isfinite(), labels, valid.dim(), "must be a finite number")


def check_finite_weight(name: str, weight: Tensor) -> None:
    """Refuses a class weight `(V,)` that is NaN or infinite, naming its class; its values are read on a CPU only."""
    if values_may_be_read(weight) and not weight.isfinite().all():
        wrong = int((~weight.isfinite()).nonzero()[0])
        raise ValueError(f"{name} of class {wrong} (={weight[wrong].item()}) must be a finite number")


def check_class_labels(labels: Tensor, valid: Tensor, classes: int, how: str = PASS) -> None:
    if labels.is_floating_point():
        raise ValueError(
            f"labels {tuple(labels.shape)} of {labels.dtype} cannot be class indices; for numbers {how} "
            "task_loss=squared_error, divergence=squared_difference"
        )
    if values_may_be_read(labels):
        outside = valid & ((labels < 0) | (labels >= classes))
        if outside.any():
            counted = labels[valid]
            rule = f"is outside [0, {classes}), the classes of the logits, and is not ignore_index"
            if counted.min() == 1 and counted.max() == classes:
                rule += ": classes count from 0, and these from 1"
            _refuse(outside, labels, valid.dim(), rule)


def check_probabilities(labels: Tensor, *, read: bool, how: str = PASS) -> None:
    """Refuses labels `(N, ..., V)` that are no floating tensor and, where they are to be `read`, no distributions."""
    instead = f"for zeros and ones {how} task_loss=binary_cross_entropy, divergence=bernoulli_kl"
    if not labels.is_floating_point():
        raise ValueError(
            f"labels {tuple(labels.shape)} of {labels.dtype} have as many dimensions as the logits: class indices "
            f"have one fewer, probabilities are floating point; {instead}"
        )
    if read and values_may_be_read(labels):
        _refuse(~((labels >= 0) & (labels <= 1)), labels, labels.dim() - 1, f"is no probability; {instead}")
        total = labels.sum(-1, dtype=torch.float64)
        wrong = ((total - 1).abs() > SUM_TOLERANCE).nonzero()
        if len(wrong):
            row = wrong[0].tolist()
            found = f"labels at example {place(row)} add up to {total[tuple(row)].item():.6g}"
            raise ValueError(f"{found}, and probabilities to 1; {instead}")


def _refuse(wrong: Tensor, labels: Tensor, dims: int, rule: str) -> None:
    """Raises a ValueError about the first label that is wrong; `dims` of its dimensions are examples and positions."""
    if wrong.any():
        row = wrong.nonzero()[0].tolist()
        where = place(row[:dims]) + "".join(f", class {column}" for column in row[dims:])
        value = labels[tuple(row)].item()
        raise ValueError(f"label {f'{value:.6g}' if isinstance(value, float) else value} at example {where} {rule}")


def kernel_for(implementation: Implementation, logits: Tensor, passes: int, why_not: str | None = None) -> str | None:
    """Returns the name of the kernel that computes these logits, None for the reference.

    `why_not` is a reason that is known before: why no kernel computes what is asked for.
    """
    if implementation not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f"implementation (={implementation!r}) must be 'auto', 'reference', 'cpu' or 'triton'")
    if implementation == "reference" or (implementation == "auto" and why_not):
        return None
    from . import kernels  # here, so that who never needs a kernel loads none

    name = kernels.KERNEL_OF_DEVICE.get(logits.device.type) if implementation == "auto" else implementation
    if name is None:
        return None
    why_not = why_not or kernels.why_not(name, logits, passes)
    if why_not is None:
        return name
    if implementation == "auto":
        kernels.warn_if_missing(name)
        return None
    raise ValueError(f"implementation={implementation!r} cannot compute this loss: {why_not}")


OVERFLOWS = 1e15
"""Logits of this size, squared by a regression or further apart than that, are why a loss is infinite."""


# ---------------------------------------------------------------------------------------------- the reduction


def divisors(
    reduction: Reduction, num_items: int | Tensor | None, labels: Tensor, valid: Tensor, weight: Tensor | None
) -> tuple[int | Tensor, int | Tensor]:
    """Returns what the sums over positions are divided by: that of the task loss, that of the divergence.

    With class weights the task loss is the weighted mean of `F.cross_entropy`: divided by the weights of its labels.
    """
    if reduction != "mean":
        return 1, 1
    if num_items is not None:
        _check_num_items(num_items, valid)
        total = num_items.reshape(()) if isinstance(num_items, Tensor) else num_items
        return total, total
    count = valid.sum()
    if weight is None:
        return count, count
    of_labels = at_least_float32(weight)[labels.masked_fill(~valid, 0)]
    return of_labels.masked_fill(~valid, 0.0).sum(), count


def divide(total: Tensor, count: int | Tensor) -> Tensor:
    """Returns `total / count`; nothing divided by no valid position is 0."""
    if isinstance(count, Tensor):
        return total / torch.where(count == 0, 1, count)
    return total / (count or 1)


def _check_num_items(num_items: int | Tensor, valid: Tensor) -> None:
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items, of shape {tuple(num_items.shape)}, must be one number")
    if torch.compiler.is_compiling() or (isinstance(num_items, Tensor) and num_items.device.type != "cpu"):
        return
    value = float(num_items)
    if not 0 <= value < math.inf:
        raise ValueError(f"num_items (={value:g}) must be >= 0 and finite")
    if value == 0 and values_may_be_read(valid) and valid.any():
        raise ValueError(
            f"num_items (=0) must be the number of valid positions in the whole update; this batch alone has "
            f"{int(valid.sum())}"
        )


# ---------------------------------------------------------------------------------------------- what is not finite


class NonfiniteLossError(ValueError):
    """A loss is NaN or infinite: at which example, and from which logit."""


def values_may_be_read(tensor: Tensor) -> bool:
    """Whether reading a value neither stops an accelerator's queue nor breaks the graph of `torch.compile`."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def place(row: Sequence[int]) -> str:
    return str(row[0]) if len(row) == 1 else f"{row[0]}, position {', '.join(map(str, row[1:]))}"


def check_rows(
    passes: Tensor,
    valid: Tensor,
    labels: Tensor | None,
    *,
    name: str = "logit",
    row: Sequence[int] = (),
    probable: Tensor | None = None,
    may_mask: bool = True,
    nan: str = "the model or its input already is",
    infinite: str = "the model overflowed",
) -> None:
    """Raises an error about the first logit that no loss can come from, in `(m, ..., V)` where `valid` `(...)`.

    `row` stands before the places in `...`; `probable` `(..., V)` are the classes with some probability beside the
    labels, by smoothing or by soft labels; `may_mask` is whether -inf masks a class, as in a softmax; `nan` and
    `infinite` are what the caller knows of the cause.
    """
    masked = passes == -torch.inf
    bad_label = torch.zeros_like(masked[0])
    if labels is not None:
        at_label = bad_label.scatter(-1, labels.masked_fill(~valid, 0)[..., None], True)
        bad_label = at_label & masked.any(0)
    for found, what in (
        (passes.isnan().any(0), f"is NaN: {nan}"),
        ((passes == torch.inf).any(0), f"is +inf: {infinite}"),
        (masked.any(0) & (not may_mask), "is -inf, and only of a softmax does that mask a class"),
        (
            masked.any(0) & ~masked.all(0),
            "is -inf in some passes only, where the KL divergence is infinite: mask the same classes in every pass",
        ),
        (bad_label, "is -inf and the label: its cross-entropy is infinite"),
        (
            masked.any(0) & (False if probable is None else probable),
            "is -inf, and soft labels or label smoothing give its class probability: its cross-entropy is infinite",
        ),
    ):
        places = (found & valid[..., None]).nonzero()
        if len(places):
            *inner, column = places[0].tolist()
            where = f"{name} at example {place([*row, *inner])}, class {column}"
            raise NonfiniteLossError(f"{where} {what} ({len(places)} such logits)")


def are_finite(tasks: Tensor, divergences: Tensor, reduction: Reduction) -> bool:
    """Whether the terms are, and where they are added up their sum."""
    terms = (tasks, divergences) if reduction == "none" else (tasks.sum() + divergences.sum(),)
    return all(bool(term.isfinite().all()) for term in terms)


def not_finite(
    tasks: Tensor, divergences: Tensor, logits_at: Callable[[Any], Tensor], labels: Tensor | None = None
) -> str:
    """Returns the message for terms that are not finite although every logit is within its conventions."""
    for name, values in (("task loss", tasks), ("divergence", divergences)):
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row = bad[0].tolist()
            logits = logits_at(row)
            what = f"{name} is {values[tuple(row)].item()} at example {place(row)}"
            label = 0.0 if labels is None else labels[tuple(row)].abs().amax().item()
            if label > OVERFLOWS:
                return f"{what}, from a label as large as {label:.3g}: the loss overflows {values.dtype}"
            size = logits[logits.isfinite()].abs().amax().item() if logits.isfinite().any() else 0.0
            if size > OVERFLOWS:
                return f"{what}, from logits as large as {size:.3g}: the loss overflows {values.dtype}"
            return (
                f"{what}, from logits within their conventions: label smoothing or soft labels give probability to a "
                "class masked with -inf, or a callable returned it"
            )
    largest = f"task losses of up to {tasks.max().item():.3g} and divergences of up to {divergences.max().item():.3g}"
    return f"the sum over the positions overflows {tasks.dtype}: {largest}, from logits that are as large"

"""START HERE. The R-Drop loss of Liang et al. (NeurIPS 2021, arXiv 2106.14448) for any model and any training loop.

One alphabet throughout: m passes, N examples, V classes; `...` are the positions inside an example (none for a
classifier, T for a sequence). A *position* is one prediction: it has one label and one row of V logits in each pass.

Everything here stays per position until the single reduction at the end of `rdrop_loss`. That is why alpha means the
same at any batch size, sequence length, number of accumulation steps, processes or classes.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .arguments import (
    NonfiniteLossError,
    Reduction,
    are_finite,
    check_classes,
    check_classes_last,
    check_finite_weight,
    check_labels,
    check_options,
    check_options_of_classes,
    check_rows,
    checked_alpha,
    divide,
    divisors,
    kernel_for,
    not_finite,
    number_of_passes,
    refuse_transforms,
    require_tensors,
    values_may_be_read,
)
from .terms import (
    IGNORE_INDEX,
    OF_SOFTMAXES,
    Divergence,
    LossTerms,
    TaskLoss,
    at_least_float32,
    bernoulli_kl,
    binary_cross_entropy,
    cross_entropy,
    squared_difference,
    squared_error,
    symmetric_kl,
)

if TYPE_CHECKING:
    from .kernels import Implementation


def rdrop_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    divergence: Divergence = symmetric_kl,
    task_loss: TaskLoss = cross_entropy,
    task_passes: Sequence[int] | None = None,
    implementation: Implementation = "auto",
    overwrite_logits: bool = False,
) -> LossTerms:
    """Computes the task loss of all passes plus alpha / 2 times their mean pairwise symmetric KL divergence.

    For two passes and the defaults this is, accurately and with gradients into both passes::

        first, second = logits.chunk(2)  # (N, V) each, labels (N,)
        p, q = first.log_softmax(-1), second.log_softmax(-1)
        task_loss = (F.cross_entropy(first, labels) + F.cross_entropy(second, labels)) / 2
        kl = (F.kl_div(q, p, log_target=True, reduction="none") + F.kl_div(p, q, log_target=True, reduction="none")) / 2
        divergence = kl.sum(-1)[labels != ignore_index].mean()
        loss = task_loss + alpha / 2 * divergence

    `alpha` is the paper's; the loss is exactly half the paper's, so that `alpha=0` is the plain loss on its usual
    scale and a learning rate keeps its meaning. With alpha 0 the divergence is still reported, without gradient.

    Example::

        logits = model(repeat_batch(x))  # one forward of [x; x]: two dropout masks
        loss, task_loss, divergence = rdrop_loss(logits, labels, alpha=1.0)
        loss.backward()

    Args:
        logits: `(m*N, ..., V)`, the output for `repeat_batch(x, m)`: all of pass 1, then all of pass 2, ...; classes
            last. Any floating dtype; computed in float32 at least.
        labels: of the batch before it was repeated, which is how the number of passes m >= 2 is known: `(N, ...)` class
            indices; or `(N, ..., V)` probabilities (cross-entropy) or zeros and ones (binary cross-entropy); or `(N,)`
            or `(N, V)` numbers (regression).
        alpha: the paper's weight of the divergence, >= 0: translation 5, summarization 0.7, language modeling 1,
            GLUE 0.1 to 1, ViT 0.6.
        label_smoothing, weight: as in `F.cross_entropy`. They act on the cross-entropy, never on the divergence.
        ignore_index: positions with this class label count in neither term; their logits never matter, NaN included.
            Numbers and probabilities always count.
        reduction: "mean" over valid positions (with `weight`, the task loss is the weighted mean, as in
            `F.cross_entropy`); "sum"; or "none", terms of shape `(N, ...)` with 0 at ignored positions.
        num_items: the number of valid positions in the whole update, over its accumulation steps; over several
            processes whose gradients are averaged (DDP), all their positions divided by the number of processes.
            Divides the sum of both terms; needs `reduction="mean"`.
        divergence: `symmetric_kl`, `bernoulli_kl`, `squared_difference`, `kl_from_first`, `detached_kl`, or any
            callable from `(m, N, ..., V)` to `(N, ...)`.
        task_loss: `cross_entropy`, `binary_cross_entropy`, `squared_error`, or any callable from `(M, ..., V)` and
            labels `(M, ...)` to `(M, ...)`. At ignored positions both callables see zero logits and label 0.
        task_passes: the passes, counted from 0, whose mean is the task loss; None: all of them. `(0,)` is SimCut. `()`
            is for unlabeled data: the divergence alone, and a label only says whether its position counts.
        implementation: "auto", the fastest that can compute these arguments; or "reference", "cpu" or "triton", which
            fails where it cannot (docs/speed.md).
        overwrite_logits: lets a kernel leave the gradient in the logits' memory, for logits that serve nothing else
            (docs/speed.md has the conditions).

    Returns:
        `LossTerms(loss, task_loss, divergence)`. A batch without a valid position gives 0 with zero gradients.

    Raises:
        ValueError: shapes that do not fit, an argument out of range, a softmax over one class; a class label outside
            `[0, V)`, probabilities that do not add up to 1, zeros and ones outside `[0, 1]`, a number that is not
            finite; or, at a valid position, a NaN, a +inf, a -inf in some passes only (the KL is infinite), a label
            masked with -inf. What depends on values is checked on CPU; an accelerator is never waited for: there, and
            under `torch.compile`, the loss is wrong or not finite, and `check_logits` says where.

    Source: paper section 2; m passes: section 4.4. Closed form of the divergence: `symmetric_kl`.
    """
    alpha = checked_alpha(alpha)
    check_options(label_smoothing, reduction, num_items)
    require_tensors(logits=logits, labels=labels)
    refuse_transforms(logits, labels, weight)
    check_options_of_classes(task_loss, label_smoothing, weight)
    if logits.dim() == labels.dim() == 1 and not (task_loss is cross_entropy and divergence in OF_SOFTMAXES):
        logits, labels = logits[:, None], labels[:, None]  # one number each, its dimension left out
    passes = _split(logits, labels)
    is_empty = len(labels) == 0
    task_passes = _chosen_task_passes(task_passes, len(passes), alpha, is_empty=is_empty)
    of_labels = task_loss
    if is_empty:  # which does not tell m
        passes = logits.reshape(max(2, 1 + max(task_passes, default=0)), *labels.shape[:1], *logits.shape[1:])
    indices = labels.dim() == logits.dim() - 1
    if indices and not labels.is_floating_point():
        labels = labels.long()
    are_numbers = labels.is_floating_point() or task_loss in (squared_error, binary_cross_entropy)
    if indices and not (task_passes and are_numbers):
        valid = labels != ignore_index
    else:
        valid = labels.new_ones(passes.shape[1:-1], dtype=torch.bool)
    check_classes_last(logits)
    _check_divergence(task_loss, divergence)
    check_classes(task_loss if task_passes else None, divergence, "logits", logits, logits.shape[-1])
    if not task_passes:  # labels only say which positions count: class 0 is as good as any
        labels, indices = torch.zeros_like(valid, dtype=torch.long), True
        of_labels, label_smoothing, weight = cross_entropy, 0.0, None
    else:
        _check_weight(weight, classes=logits.shape[-1])
    if overwrite_logits:
        _check_overwritable(logits)
    of_classes: dict[str, Any] = (
        {"label_smoothing": label_smoothing, "weight": weight} if of_labels is cross_entropy else {}
    )
    why_not = _why_no_kernel(of_labels, divergence, labels, weight)
    kernel = kernel_for(implementation, logits, len(passes), why_not)
    if task_passes:
        check_labels(task_loss, labels, valid, logits.shape[-1], read_by_kernel=kernel is not None)

    task_divisor, divisor = divisors(reduction, num_items, labels, valid, weight if indices else None)
    losses = None
    if kernel is None:
        tasks, divergences = _reference_terms(
            of_labels, of_classes, divergence, passes, labels, valid, alpha, task_passes=task_passes, indices=indices
        )
    else:
        from . import kernels

        name = kernels.DIVERGENCES[OF_SOFTMAXES.index(divergence)]
        options = {**of_classes, "divergence": name, "implementation": kernel}
        targets = kernels.marked(labels, valid) if indices else labels
        if len(task_passes) < len(passes):
            tasks, divergences = _kernel_terms_apart(passes, targets, task_passes, alpha, options)
        elif overwrite_logits and _gradient_wanted(logits):
            ones = torch.ones(valid.shape, dtype=torch.float32, device=logits.device)
            scales = divide(ones, task_divisor), alpha / 2 * divide(ones, divisor)
            losses, tasks, divergences = kernels.overwriting_loss(
                logits, targets, *scales, passes=len(passes), **options
            )
        else:
            tasks, divergences = kernels.row_terms(logits, targets, passes=len(passes), **options)
            divergences = divergences if alpha > 0 else divergences.detach()
    tasks, divergences = tasks.masked_fill(~valid, 0.0), divergences.masked_fill(~valid, 0.0)
    if values_may_be_read(logits) and not are_finite(tasks, divergences, reduction):
        if task_passes:
            check_labels(task_loss, labels, valid, logits.shape[-1])
        check_rows(
            passes,
            valid,
            labels if indices and task_passes and not are_numbers else None,
            probable=_probable(task_loss, labels, valid, label_smoothing, weight) if task_passes else None,
            may_mask=task_loss not in (squared_error, binary_cross_entropy),
        )
        raise NonfiniteLossError(not_finite(tasks, divergences, lambda row: passes[:, *row], labels))

    if reduction != "none":
        tasks, divergences = divide(tasks.sum(), task_divisor), divide(divergences.sum(), divisor)
    if losses is not None:
        loss = losses if reduction == "none" else losses.sum()
    else:
        loss = tasks + alpha / 2 * divergences if alpha > 0 else tasks.clone()
    return LossTerms(loss, tasks.detach(), divergences.detach())


def check_logits(
    logits: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    task_loss: TaskLoss = cross_entropy,
    divergence: Divergence | None = None,
) -> None:
    """Raises a ValueError that names the first label or logit that makes the R-Drop loss non-finite, if there is one.

    On CPU `rdrop_loss` does this itself. Call it after a non-finite loss on an accelerator: it waits for the device,
    and computes the loss again on the CPU. `logits` `(m*N, ..., V)` and the others as in `rdrop_loss`. Where V is 1, or
    left out, the labels are numbers. `divergence` None is the one that goes with `task_loss`.
    """
    if task_loss is cross_entropy and (logits.dim() == labels.dim() == 1 or logits.shape[-1] == 1):
        task_loss = squared_error
    if divergence is None:
        divergence = _divergence_with(task_loss)
    rdrop_loss(
        logits.detach().cpu(),
        labels.cpu(),
        alpha=1.0,
        label_smoothing=label_smoothing,
        weight=None if weight is None else weight.detach().cpu(),
        ignore_index=ignore_index,
        task_loss=task_loss,
        divergence=divergence,
        implementation="reference",
    )


def _divergence_with(task_loss: TaskLoss) -> Divergence:
    if task_loss is squared_error:
        return squared_difference
    return bernoulli_kl if task_loss is binary_cross_entropy else symmetric_kl


def _probable(
    task_loss: TaskLoss, labels: Tensor, valid: Tensor, label_smoothing: float, weight: Tensor | None
) -> Tensor | None:
    """Returns which classes the cross-entropy gives some probability beside the labels, `(N, ..., V or 1)`."""
    if task_loss is not cross_entropy:
        return None
    smoothed = valid[..., None] & (label_smoothing > 0)
    probable = labels > 0 if labels.is_floating_point() else torch.zeros_like(smoothed)
    return (probable | smoothed) if weight is None else (probable | smoothed) & (weight > 0)


# ---------------------------------------------------------------------------------------------- the terms


def _reference_terms(
    task_loss: TaskLoss,
    of_classes: dict[str, Any],
    divergence: Divergence,
    passes: Tensor,
    labels: Tensor,
    valid: Tensor,
    alpha: float,
    *,
    task_passes: tuple[int, ...],
    indices: bool,
) -> tuple[Tensor, Tensor]:
    """Computes task loss and divergence per position, `(N, ...)`, in plain PyTorch."""
    passes = at_least_float32(passes)
    if indices:
        passes = passes.masked_fill(~valid[None, ..., None], 0.0)
        labels = labels.masked_fill(~valid, 0)
    if task_passes:
        tasks = _mean_task_loss(task_loss, of_classes, _chosen(passes, task_passes), labels)
    else:
        tasks = passes.new_zeros(valid.shape)
    with nullcontext() if alpha > 0 else torch.no_grad():
        divergences = _one_value_per_position(divergence(passes), valid.shape, "divergence", divergence)
    return tasks, divergences


def _kernel_terms_apart(
    passes: Tensor, targets: Tensor, task_passes: tuple[int, ...], alpha: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Computes the same with a kernel, one call for each term: the task loss has fewer passes than the divergence."""
    from . import kernels

    with nullcontext() if alpha > 0 else torch.no_grad():
        _, divergences = kernels.row_terms(passes.flatten(0, 1), targets, passes=len(passes), **options)
    if not task_passes:
        return torch.zeros_like(divergences), divergences
    repeated = targets.expand(len(task_passes), *targets.shape)
    rows = _chosen(passes, task_passes).flatten(0, 1)
    tasks, _ = kernels.row_terms(rows, repeated.flatten(0, 1), passes=1, **options)
    return tasks.view(len(task_passes), *divergences.shape).mean(0), divergences


def _chosen(passes: Tensor, which: tuple[int, ...]) -> Tensor:
    """Returns the passes `which`, in ascending order: a view where they are neighbors."""
    first, last = which[0], which[-1]
    if last - first + 1 == len(which):
        return passes[first : last + 1]
    return torch.stack([passes[index] for index in which])


def _mean_task_loss(task_loss: TaskLoss, of_classes: dict[str, Any], passes: Tensor, labels: Tensor) -> Tensor:
    """Computes the mean over the passes of the task loss, whose options are `of_classes`: `(N, ...)`."""
    m, n = passes.shape[:2]
    repeated = labels.expand(m, *labels.shape).flatten(0, 1)
    expected = torch.Size((m * n, *passes.shape[2:-1]))
    values = task_loss(passes.flatten(0, 1), repeated, **of_classes)
    values = _one_value_per_position(values, expected, "task_loss", task_loss)
    return values.view(m, n, *values.shape[1:]).mean(0)


def _one_value_per_position(values: Tensor, expected: torch.Size, argument: str, function: Any) -> Tensor:
    if values.shape != expected:
        name = getattr(function, "__name__", repr(function))
        raise ValueError(
            f"{argument}={name} returned shape {tuple(values.shape)}; it must return one value per position, "
            f"{tuple(expected)}: reduce over the last dimension only"
        )
    return values


def _why_no_kernel(task_loss: TaskLoss, divergence: Divergence, labels: Tensor, weight: Tensor | None) -> str | None:
    if task_loss is not cross_entropy or divergence not in OF_SOFTMAXES:
        return "it computes cross_entropy with symmetric_kl, detached_kl or kl_from_first, nothing else"
    if labels.requires_grad or (weight is not None and weight.requires_grad):
        return "it has no gradient in the class weights or in the labels"
    return None


def _gradient_wanted(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling()


# ---------------------------------------------------------------------------------------------- the arguments


def _split(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns `(m*N, ..., V)` as `(m, N, ..., V)`, m from the labels' first dimension."""
    shapes = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, not {logits.dtype}")
    if logits.dim() < 2 or labels.dim() not in (logits.dim() - 1, logits.dim()):
        raise ValueError(f"{shapes}: expected logits (m*N, ..., V) with the classes last, and labels (N, ...)")
    passes = number_of_passes("logits", logits, labels, "rdrop_loss(model(repeat_batch(x)), labels, ...)")
    if logits.shape[1 : labels.dim()] != labels.shape[1:]:
        raise ValueError(f"{shapes}: they differ after the first dimension; expected (m*N, ..., V) and (N, ...)")
    return logits.reshape(passes, labels.shape[0], *logits.shape[1:])


def _chosen_task_passes(
    task_passes: Sequence[int] | None, passes: int, alpha: float, *, is_empty: bool
) -> tuple[int, ...]:
    """Returns the passes that carry the task loss, ascending."""
    if task_passes is None:
        return tuple(range(passes))
    try:
        chosen = tuple(sorted(operator.index(index) for index in task_passes))
    except TypeError:
        raise ValueError(f"task_passes (={task_passes!r}) must be a sequence of pass numbers, such as (0,)") from None
    if len(set(chosen)) < len(chosen) or any(index < 0 or (index >= passes and not is_empty) for index in chosen):
        raise ValueError(
            f"task_passes (={task_passes!r}) must be different pass numbers from 0 to {passes - 1}: these logits have "
            f"{passes} passes"
        )
    if not chosen and alpha == 0:
        raise ValueError("task_passes=() leaves the divergence alone, which needs alpha > 0: this loss would be 0")
    return chosen


def _check_divergence(task_loss: TaskLoss, divergence: Divergence) -> None:
    """Refuses the softmax of logits that no softmax is trained on: it means nothing, and is constant for one output."""
    if divergence not in OF_SOFTMAXES:
        return
    for other, own in ((binary_cross_entropy, bernoulli_kl), (squared_error, squared_difference)):
        if task_loss is other:
            raise ValueError(
                f"divergence={divergence.__name__} compares softmax distributions, which the logits of "
                f"task_loss={other.__name__} are not; pass divergence={own.__name__}"
            )


def _check_weight(weight: Tensor | None, *, classes: int) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor) or weight.shape != (classes,):
        given = tuple(weight.shape) if isinstance(weight, Tensor) else repr(weight)
        raise ValueError(f"weight (={given}) must be a tensor ({classes},): one number for each class of the logits")
    check_finite_weight("weight", weight)


def _check_overwritable(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    for found, what in (
        (logits.is_leaf and logits.requires_grad, "are a leaf: their gradient belongs in logits.grad, not in them"),
        (logits._is_view(), "are a view: the tensor they are part of would be overwritten too"),
        (not logits.is_contiguous(), "are not contiguous"),
        (
            logits.dtype == torch.float16,
            "are float16: without the loss scale, which backward brings, their gradient would vanish in that dtype",
        ),
    ):
        if found:
            raise ValueError(f"overwrite_logits=True: the logits {what}. Give others, or leave overwrite_logits=False")

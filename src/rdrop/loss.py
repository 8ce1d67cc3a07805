"""START HERE. The R-Drop loss of Liang et al. (NeurIPS 2021, arXiv 2106.14448) for any model and any training loop.

One alphabet throughout: m passes, N examples, V classes; `...` are the positions inside an example (none for a
classifier, T for a sequence). A *position* is one prediction: it has one label and one row of V logits in each pass.

Everything here stays per position until the single reduction at the end of `rdrop_loss`. That is why alpha means the
same at any batch size, sequence length, number of accumulation steps, processes or classes.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor], Tensor]
"""`(m, N, ..., V)`, the logits of m passes, to `(N, ...)`: how far they disagree, one value per position."""

TaskLoss = Callable[[Tensor, Tensor], Tensor]
"""`(M, ..., V)` logits and `(M, ...)` labels to `(M, ...)`: what the model is trained with, one value per position."""

Reduction = Literal["mean", "sum", "none"]

Implementation = Literal["auto", "reference", "cpu", "triton"]
KERNEL_OF_DEVICE = {"cpu": "cpu", "cuda": "triton"}
"""What "auto" takes where it can, by the type of the device; elsewhere the reference."""


class LossTerms(NamedTuple):
    """What `rdrop_loss` returns: `loss = task_loss + alpha / 2 * divergence`. Only `loss` carries gradient."""

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor


# ---------------------------------------------------------------------------------------------- divergences


def symmetric_kl(passes: Tensor) -> Tensor:
    """`(KL(p||q) + KL(q||p)) / 2` of the softmax distributions, mean over pairs of passes: `(m, ..., V)` to `(...)`.

    For two passes this computes ::

        p, q = passes.log_softmax(-1)
        ((p.exp() - q.exp()) * (p - q)).sum(-1) / 2

    with its own backward, in O(m) work per class for m passes, and keeps five digits in float32 where that line loses
    them all: rows that nearly agree, logits of 1e4, vocabularies masked with -inf. Never negative.

    A class at -inf in every pass contributes 0; a class at -inf in some passes only makes the value non-finite.
    Differentiable once.

    With `e_a = log p_a - mean_b log p_b`, the mean over pairs is `sum_a (p_a - pbar) . e_a / (m - 1)`, and its gradient
    in the logits of pass a is `(p_a * (e_a - p_a . e_a) + p_a - pbar) / (m - 1)`.
    """
    _require_two_passes(passes)
    value: Tensor = _SymmetricKL.apply(_at_least_float32(passes), torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return value


def bernoulli_kl(passes: Tensor) -> Tensor:
    """`symmetric_kl` of K independent yes/no predictions, averaged over them: `(m, ..., K)` logits to `(...)`.

    For multi-label classification, beside `binary_cross_entropy`. For two passes this computes ::

        p, q = passes.sigmoid()
        ((p - q) * (passes[0] - passes[1])).mean(-1) / 2

    The mean over the K labels is that of the binary cross-entropy, so alpha does not depend on K.
    """
    return symmetric_kl(torch.stack([passes, torch.zeros_like(passes)], -1)).mean(-1)


def squared_difference(passes: Tensor) -> Tensor:
    """Mean over pairs of passes of their squared difference, averaged over the K outputs: `(m, ..., K)` to `(...)`.

    For regression, beside `squared_error`, as the paper does for STS-B. For two passes this computes
    `(passes[0] - passes[1]).square().mean(-1)`; for m, twice the unbiased variance over the passes.
    """
    if passes.shape[0] < 2:
        raise ValueError(f"passes {tuple(passes.shape)} must have m >= 2 passes in the first dimension")
    return 2 * (passes - passes[0]).var(0).mean(-1)


def kl_from_first(passes: Tensor) -> Tensor:
    """`KL(p||q)` from pass 1 to each other pass, mean over those: `(m, ..., V)` logits to `(...)`.

    For SimCut, whose first pass is the clean one. For two passes this computes ::

        p, q = passes.log_softmax(-1)
        (p.exp() * (p - q)).sum(-1)

    with gradients into both, accurate where the passes nearly agree; classes at -inf as in `symmetric_kl`, which it
    equals to second order. Differentiable once. No kernel computes it: `symmetric_kl` is faster.

    With `r_a = log p_a - log p_1`, the gradient in the logits of pass a is `(p_a - p_1) / (m - 1)`, and in those of
    pass 1 `-p_1 * (rbar - p_1 . rbar)`, where rbar is the mean of the r_a over the other passes.
    """
    _require_two_passes(passes)
    value: Tensor = _KLFromFirst.apply(_at_least_float32(passes), torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return value


class _KLFromFirst(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient_wanted: bool) -> Tensor:
        p = _softmax(logits)
        log_ratio = _log_ratio_to_first(logits, p)[1:]
        surplus = torch.where(log_ratio.abs() < 1, p[0] * torch.expm1(log_ratio.clamp(-1, 1)), p[1:] - p[0])
        mean_log_ratio = log_ratio.mean(0)
        if gradient_wanted:
            expected = (p[0] * mean_log_ratio).sum(-1, keepdim=True)
            of_first = -p[0] * (mean_log_ratio - expected)
            ctx.save_for_backward(torch.cat([of_first[None], surplus / len(log_ratio)]))
        # p_a - p_1 sums to 0 over the classes: with it a term is p_1 (exp(r) - 1 - r) >= 0, which cancels for small r.
        terms = torch.where(log_ratio.abs() < 0.05, p[0] * _exp_beyond_tangent(log_ratio), surplus - p[0] * log_ratio)
        return terms.clamp_min(0).sum(-1).mean(0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative("kl_from_first")
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[None, ..., None], None


def _exp_beyond_tangent(r: Tensor) -> Tensor:
    """`exp(r) - 1 - r` for |r| < 0.05, to rounding in float64."""
    series = torch.ones_like(r)
    for n in range(8, 2, -1):
        series = 1 + r / n * series
    return r.square() / 2 * series


class _SymmetricKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, gradient_wanted: bool) -> Tensor:
        p = _softmax(logits)
        log_ratio = _log_ratio_to_first(logits, p)  # log p_a - log p_1
        excess = log_ratio - log_ratio.mean(0)
        # p_a - mean_b p_b. Where the passes nearly agree that difference cancels; expm1 against the largest does not.
        largest, smallest = log_ratio.amax(0), log_ratio.amin(0)
        below_largest = torch.expm1(log_ratio - largest)
        surplus = torch.where(
            largest - smallest < 1,
            p.amax(0) * (below_largest - below_largest.mean(0)),
            p - p.mean(0),
        )
        pairs = logits.shape[0] - 1
        if gradient_wanted:
            expected = (p * excess).sum(-1, keepdim=True)
            ctx.save_for_backward((p * (excess - expected) + surplus) / pairs)
        # The sum over passes is >= 0 at every class; rounding can miss that by an ulp of a vanishing term.
        return (surplus * excess).sum(0).clamp_min(0).sum(-1) / pairs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[None, ..., None], None


def _require_two_passes(passes: Tensor) -> None:
    if passes.dim() < 2 or passes.shape[0] < 2:
        raise ValueError(f"passes {tuple(passes.shape)} must be (m, ..., V) with m >= 2 passes in the first dimension")


def refuse_second_derivative(name: str = "symmetric_kl") -> None:
    """For the backward of a formula that has no graph of its own."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # backward(create_graph=True)
        raise RuntimeError(
            f"{name} can be differentiated once only: its gradient is a formula of its own, without a graph. "
            "For second derivatives (create_graph=True) pass a divergence written in plain PyTorch"
        )


def _softmax(logits: Tensor) -> Tensor:
    """Not torch's: on CPU its running sum is off by 2e-5 at V = 250,000."""
    p = (logits - logits.amax(-1, keepdim=True)).exp()
    return p / p.sum(-1, keepdim=True)


def _log_ratio_to_first(logits: Tensor, p: Tensor) -> Tensor:
    """`log p_a - log p_1`, accurate also where the passes nearly agree: `(m, ..., V)`, 0 for pass 1.

    The difference of the logits is taken before anything else, with its rounding error, and relative to its value at a
    class that is likely: what is left is as small as the disagreement itself, and rounds no worse.
    """
    outside = (logits == -torch.inf).all(0)
    anchor = p.sum(0).argmax(-1, keepdim=True).expand(*logits.shape[:-1], 1)
    high = logits - logits[0]
    taken = high - logits
    low = (logits - (high - taken)) - (logits[0] + taken)  # logits - logits[0] == high + low, exactly (Knuth's TwoSum)
    difference = (high - high.gather(-1, anchor)) + (low - low.gather(-1, anchor))
    difference = difference.masked_fill(outside, 0.0)
    # log of the ratio of the normalizers: by log1p of a small sum where the passes are close, else as it stands.
    growth = p[0] * torch.expm1(difference.clamp(max=60.0))
    close = (difference.amax(-1, keepdim=True) < 60) & (growth.abs().sum(-1, keepdim=True) < 0.5)
    near = torch.log1p(growth.sum(-1, keepdim=True).clamp(-0.5, 0.5))
    log_normalizer = (logits - logits.gather(-1, anchor)).logsumexp(-1, keepdim=True)
    return difference - torch.where(close, near, log_normalizer - log_normalizer[0])


# ---------------------------------------------------------------------------------------------- task losses


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """`F.cross_entropy(..., reduction="none")` with the classes last: `(M, ..., V)` and `(M, ...)` to `(M, ...)`.

    Labels are class indices `(M, ...)`, or probabilities `(M, ..., V)`. For indices it is written with logsumexp:
    on CPU the running sum inside `F.cross_entropy` puts its gradient off by 2e-5 at V = 250,000.
    """
    if labels.dim() == logits.dim():
        rows, targets = logits.flatten(0, -2), labels.flatten(0, -2).to(logits.dtype)
        values = F.cross_entropy(rows, targets, weight=weight, label_smoothing=label_smoothing, reduction="none")
        return values.view(logits.shape[:-1])
    logits = logits - logits.detach().amax(-1, keepdim=True)  # for the gradient, whose rounding grows with the logits
    log_normalizer = logits.logsumexp(-1)
    values = log_normalizer - logits.gather(-1, labels[..., None]).squeeze(-1)
    if weight is not None:
        weight = weight.to(logits.dtype)
        values = values * weight[labels]
    if label_smoothing:
        uniform = log_normalizer - logits.mean(-1)
        if weight is not None:
            uniform = log_normalizer * weight.mean() - (logits * weight).mean(-1)
        values = (1 - label_smoothing) * values + label_smoothing * uniform
    return values


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`F.binary_cross_entropy_with_logits`, averaged over the K labels: twice `(M, ..., K)` to `(M, ...)`."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").mean(-1)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """`F.mse_loss`, averaged over the K outputs: twice `(M, ..., K)` (labels `(M, ...)` if K = 1) to `(M, ...)`."""
    if labels.dim() == logits.dim() - 1 and logits.shape[-1] == 1:
        labels = labels[..., None]
    if labels.shape != logits.shape:  # mse_loss would broadcast them
        raise ValueError(
            f"squared_error compares numbers one by one: labels {tuple(labels.shape)} must be of the shape of the "
            f"logits, {tuple(logits.shape)}"
        )
    return F.mse_loss(logits, labels.to(logits.dtype), reduction="none").mean(-1)


# ---------------------------------------------------------------------------------------------- the loss


def rdrop_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    divergence: Divergence = symmetric_kl,
    task_loss: TaskLoss = cross_entropy,
    task_passes: Sequence[int] | None = None,
    implementation: Implementation = "auto",
    overwrite_logits: bool = False,
) -> LossTerms:
    """The task loss of all passes plus alpha / 2 times their mean pairwise symmetric KL divergence.

    For two passes and the defaults this computes, accurately and with gradients into both passes::

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
            last. Any floating dtype; computed in float32 at least. The number of passes m >= 2 is the ratio
            of the first dimensions of `logits` and `labels`.
        labels: of the batch as it was before repeating: `(N, ...)` class indices; or `(N, ..., V)` probabilities
            (cross-entropy) or zeros and ones (binary cross-entropy); or `(N,)` or `(N, V)` numbers (regression).
        alpha: the paper's weight of the divergence, >= 0: translation 5, summarization 0.7, language modeling 1,
            GLUE 0.1 to 1, ViT 0.6.
        label_smoothing, weight: as in `F.cross_entropy`. They act on the cross-entropy, never on the divergence.
        ignore_index: positions with this label count in neither term; their logits never matter, NaN included.
        reduction: "mean" over valid positions (with `weight`, the task loss is the weighted mean, as in
            `F.cross_entropy`); "sum"; or "none", terms of shape `(N, ...)` with 0 at ignored positions.
        num_items: for gradient accumulation and several processes: the number of valid positions in the whole
            update. Divides the sum of both terms; needs `reduction="mean"`.
        divergence: `symmetric_kl` (default), `bernoulli_kl`, `squared_difference`, `kl_from_first`, or any callable
            from `(m, N, ..., V)` to `(N, ...)`.
        task_loss: `cross_entropy` (default), `binary_cross_entropy`, `squared_error`, or any callable from
            `(M, ..., V)` and labels `(M, ...)` to `(M, ...)`. Ignored positions reach neither callable: both see
            zero logits and label 0 there.
        task_passes: the passes, counted from 0, whose mean is the task loss; None: all of them. `(0,)` is SimCut: only
            the first pass, the clean one, learns from the labels. `()` is for unlabeled data: the divergence alone
            is the loss, and a label only says whether its position counts, any value but `ignore_index`. The
            divergence, and what `alpha` means, are the same for all of them.
        implementation: "auto" takes the fastest that can compute these arguments here: for `cross_entropy` of class
            indices with `symmetric_kl` a compiled kernel, else the PyTorch "reference". "cpu" (float32 and bfloat16
            logits) and "triton" (float16 too) ask for one kernel, and fail where it cannot run. The values are the
            same to rounding.
        overwrite_logits: lets a kernel leave the gradient in the logits' own memory: no second V-sized buffer, and
            the gradient computed while the rows are in cache. Use it where the logits serve nothing else: after the
            call their content is undefined, and so is that of every tensor that shares their memory. Needs contiguous
            logits that are neither a leaf nor a view. `backward` can run once. What autograd can see of a wrong use
            is an error in `backward`: an operation that kept the logits (a `tanh` that returned them, another loss
            before this one), or a differentiable use after. No effect where no gradient is wanted, on the reference,
            under `torch.compile` and with some passes in `task_passes` only.

    Returns:
        `LossTerms(loss, task_loss, divergence)`. A batch without a valid position gives 0 with zero gradients.

    Raises:
        ValueError: shapes that do not fit, an argument out of range, a label outside `[0, V)`; or, at a valid
            position, a NaN, a +inf, a -inf in some passes only (the KL is infinite), a label masked with -inf.
            What depends on values is checked on CPU; an accelerator is never waited for: there, and under
            `torch.compile`, the loss is not finite, and `check_logits` says where.

    Source: paper section 2; m passes: section 4.4. Closed form of the divergence: `symmetric_kl`.
    """
    alpha = _checked_alpha(alpha)
    per_position = _task_loss(task_loss, label_smoothing, weight)
    _check_divergence(task_loss, divergence)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction (={reduction!r}) must be 'mean', 'sum' or 'none'")
    if num_items is not None and reduction != "mean":
        raise ValueError(f"num_items divides the mean: it needs reduction='mean', not {reduction!r}")

    if (
        logits.dim() == labels.dim() == 1 and per_position.func is not cross_entropy
    ):  # regression, last dimension left out
        logits, labels = logits[:, None], labels[:, None]
    passes = _split_passes(logits, labels)
    learning = _learning_passes(task_passes, passes.shape[0], alpha)
    indices = labels.dim() == logits.dim() - 1
    if indices and not labels.is_floating_point():
        labels = labels.long()
    valid = (
        labels != ignore_index if indices else torch.ones(passes.shape[1:-1], dtype=torch.bool, device=logits.device)
    )
    if not learning:  # labels only say which positions count: class 0 is as good as any
        labels, weight, per_position = (
            torch.zeros_like(labels, dtype=torch.long),
            None,
            _task_loss(cross_entropy, 0, None),
        )
    elif per_position.func is cross_entropy:
        _check_labels(labels, valid, num_classes=logits.shape[-1], indices=indices)
        _check_weight(weight, num_classes=logits.shape[-1])

    if overwrite_logits:
        _check_overwritable(logits)
    kernel = _kernel(implementation, per_position, divergence, logits, passes=passes.shape[0], indices=indices)
    task_count, count = _counts(reduction, num_items, labels, valid, weight if indices else None)
    losses = None
    if kernel is None:
        tasks, disagreements = _reference_terms(
            per_position, divergence, passes, labels, valid, alpha, learning=learning, indices=indices
        )
    else:
        from . import kernels

        options = {**per_position.keywords, "implementation": kernel}
        targets = labels.masked_fill(~valid, kernels.IGNORED)
        if len(learning) < passes.shape[0]:
            tasks, disagreements = _kernel_terms_apart(logits, targets, learning, alpha, options)
        elif overwrite_logits and _gradient_wanted(logits):
            ones = torch.ones(valid.shape, device=logits.device)
            scales = _divide(ones, task_count), alpha / 2 * _divide(ones, count)
            losses, tasks, disagreements = kernels.overwriting_loss(
                logits, targets, *scales, passes=passes.shape[0], **options
            )
        else:
            tasks, disagreements = kernels.row_terms(logits, targets, passes=passes.shape[0], **options)
            disagreements = disagreements if alpha > 0 else disagreements.detach()
    if _values_may_be_read(logits) and not (tasks.sum() + disagreements.sum()).isfinite():
        _check_rows(passes, valid, labels if indices and learning else None)
        raise ValueError(_not_finite(tasks, disagreements))

    tasks, disagreements = tasks.masked_fill(~valid, 0.0), disagreements.masked_fill(~valid, 0.0)
    if reduction != "none":
        tasks, disagreements = _divide(tasks.sum(), task_count), _divide(disagreements.sum(), count)
    if losses is not None:
        loss = losses if reduction == "none" else losses.sum()
    else:
        loss = tasks + alpha / 2 * disagreements if alpha > 0 else tasks
    return LossTerms(loss, tasks.detach(), disagreements.detach())


def _reference_terms(
    task_loss: partial[Tensor],
    divergence: Divergence,
    passes: Tensor,
    labels: Tensor,
    valid: Tensor,
    alpha: float,
    *,
    learning: tuple[int, ...],
    indices: bool,
) -> tuple[Tensor, Tensor]:
    """Task loss and divergence per position, `(N, ...)`, in plain PyTorch."""
    passes = _at_least_float32(passes)
    if indices:
        passes = passes.masked_fill(~valid[None, ..., None], 0.0)
        labels = labels.masked_fill(~valid, 0)
    if learning:
        tasks = _task_loss_of_passes(task_loss, _chosen(passes, learning), labels)
    else:
        tasks = passes.new_zeros(valid.shape)
    with torch.set_grad_enabled(torch.is_grad_enabled() and alpha > 0):
        disagreements = _one_value_per_position(divergence(passes), valid.shape, "divergence", divergence)
    return tasks, disagreements


def _kernel_terms_apart(
    logits: Tensor, targets: Tensor, learning: tuple[int, ...], alpha: float, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The same with a kernel, where the task loss has fewer passes than the divergence: a call for each of the two."""
    from . import kernels

    n = targets.shape[0]
    passes = logits.shape[0] // n if n else 2
    with torch.set_grad_enabled(torch.is_grad_enabled() and alpha > 0):
        _, disagreements = kernels.row_terms(logits, targets, passes=passes, **options)
    if not learning:
        return torch.zeros_like(disagreements), disagreements
    rows = _chosen(logits.reshape(passes, n, *logits.shape[1:]), learning).flatten(0, 1)
    repeated = targets.expand(len(learning), *targets.shape)
    tasks, _ = kernels.row_terms(rows, repeated.flatten(0, 1), passes=1, **options)
    return tasks.view_as(repeated).mean(0), disagreements


def _chosen(passes: Tensor, which: tuple[int, ...]) -> Tensor:
    """The passes `which`, in ascending order: a view where they are neighbors."""
    first, last = which[0], which[-1]
    if last - first + 1 == len(which):
        return passes[first : last + 1]
    return torch.stack([passes[index] for index in which])


def _task_loss(task_loss: TaskLoss, label_smoothing: float, weight: Tensor | None) -> partial[Tensor]:
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing (={label_smoothing}) must be in [0, 1)")
    if task_loss is cross_entropy:
        return partial(cross_entropy, label_smoothing=label_smoothing, weight=weight)
    if label_smoothing or weight is not None:
        raise ValueError(
            "label_smoothing and weight belong to the cross-entropy; with another task_loss, put them into the "
            "callable: task_loss=lambda logits, labels: ..."
        )
    return partial(task_loss)


def _task_loss_of_passes(task_loss: partial[Tensor], passes: Tensor, labels: Tensor) -> Tensor:
    """Mean over the passes of the task loss: `(N, ...)`."""
    m, n = passes.shape[:2]
    repeated = labels.expand(m, *labels.shape).flatten(0, 1)
    expected = torch.Size((m * n, *passes.shape[2:-1]))
    values = _one_value_per_position(task_loss(passes.flatten(0, 1), repeated), expected, "task_loss", task_loss.func)
    return values.view(m, n, *values.shape[1:]).mean(0)


def _kernel(
    implementation: Implementation,
    task_loss: partial[Tensor],
    divergence: Divergence,
    logits: Tensor,
    *,
    passes: int,
    indices: bool,
) -> str | None:
    """The kernel that computes these arguments, by name; None for the reference."""
    if implementation not in ("auto", "reference", "cpu", "triton"):
        raise ValueError(f"implementation (={implementation!r}) must be 'auto', 'reference', 'cpu' or 'triton'")
    if implementation == "reference":
        return None
    weight = task_loss.keywords.get("weight")
    why_not = None
    if task_loss.func is not cross_entropy or divergence is not symmetric_kl or not indices:
        why_not = "it computes cross_entropy of class indices with symmetric_kl, nothing else"
    elif weight is not None and weight.requires_grad:
        why_not = "it has no gradient in the class weights"
    name = KERNEL_OF_DEVICE.get(logits.device.type) if implementation == "auto" else implementation
    if name is None or (implementation == "auto" and why_not):
        return None
    from . import kernels  # here, so that who never needs a kernel loads none

    why_not = why_not or kernels.why_not(name, logits, passes)
    if why_not is None:
        return name
    if implementation == "auto":
        kernels.say_if_missing(name)
        return None
    raise ValueError(f"implementation={implementation!r} cannot compute this loss: {why_not}")


def _gradient_wanted(logits: Tensor) -> bool:
    return torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling()


# ---------------------------------------------------------------------------------------------- the arguments


def _check_overwritable(logits: Tensor) -> None:
    if torch.compiler.is_compiling():
        return
    for found, what in (
        (logits.is_leaf and logits.requires_grad, "are a leaf: their gradient belongs in logits.grad, not in them"),
        (logits._is_view(), "are a view: the tensor they are part of would be overwritten too"),
        (not logits.is_contiguous(), "are not contiguous"),
    ):
        if found:
            raise ValueError(f"overwrite_logits=True needs logits of their own, and these {what}")


def check_logits(logits: Tensor, labels: Tensor, *, ignore_index: int = -100) -> None:
    """Raises a ValueError that names the first row and class that make the R-Drop loss non-finite, if there is one.

    `rdrop_loss` calls it on CPU when a term is not finite. Call it yourself after a non-finite loss on an accelerator:
    it waits for the device. `logits` `(m*N, ..., V)` and `labels` as in `rdrop_loss`.
    """
    passes = _split_passes(logits, labels)
    indices = labels.dim() == logits.dim() - 1
    valid = labels != ignore_index if indices else torch.ones_like(passes[0, ..., 0], dtype=torch.bool)
    _check_rows(passes, valid, labels.long() if indices and not labels.is_floating_point() else None)


def _check_rows(passes: Tensor, valid: Tensor, labels: Tensor | None) -> None:
    masked = passes == -torch.inf
    bad_label = torch.zeros_like(masked[0])
    if labels is not None:
        at_label = bad_label.scatter(-1, labels.masked_fill(~valid, 0)[..., None], True)
        bad_label = at_label & masked.any(0)
    for found, what in (
        (passes.isnan().any(0), "is NaN: the model or its input already is"),
        ((passes == torch.inf).any(0), "is +inf: the model overflowed"),
        (
            masked.any(0) & ~masked.all(0),
            "is -inf in some passes only, where the KL divergence is infinite: mask the same classes in every pass",
        ),
        (bad_label, "is -inf and the label: its cross-entropy is infinite"),
    ):
        places = (found & valid[..., None]).nonzero()
        if len(places):
            *row, column = places[0].tolist()
            raise ValueError(f"logit at example {_place(row)}, class {column} {what} ({len(places)} such logits)")


def _place(row: list[int]) -> str:
    return str(row[0]) if len(row) == 1 else f"{row[0]}, position {', '.join(map(str, row[1:]))}"


def _not_finite(tasks: Tensor, disagreements: Tensor) -> str:
    name, values = ("task loss", tasks) if not tasks.isfinite().all() else ("divergence", disagreements)
    row = (~values.isfinite()).nonzero()[0].tolist()
    return (
        f"{name} is {values[tuple(row)].item()} at example {_place(row)}, from logits within their conventions: label "
        "smoothing or soft labels give probability to a class masked with -inf, or a callable returned it"
    )


def _checked_alpha(alpha: float) -> float:
    try:
        value = float(alpha)
    except (TypeError, ValueError):
        raise TypeError(f"alpha (={alpha!r}) must be a number >= 0") from None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"alpha (={value}) must be a finite number >= 0")
    return value


def _check_divergence(task_loss: TaskLoss, divergence: Divergence) -> None:
    """The softmax of logits that no softmax is trained on means nothing; of a single output it is constant."""
    if divergence is not symmetric_kl and divergence is not kl_from_first:
        return
    for other, own in ((binary_cross_entropy, bernoulli_kl), (squared_error, squared_difference)):
        if task_loss is other:
            raise ValueError(
                f"divergence={divergence.__name__} compares softmax distributions, which the logits of "
                f"task_loss={other.__name__} are not; pass divergence={own.__name__}"
            )


def _learning_passes(task_passes: Sequence[int] | None, passes: int, alpha: float) -> tuple[int, ...]:
    """The passes that carry the task loss, ascending."""
    if task_passes is None:
        return tuple(range(passes))
    try:
        chosen = tuple(sorted(operator.index(index) for index in task_passes))
    except TypeError:
        raise ValueError(f"task_passes (={task_passes!r}) must be a sequence of pass numbers, such as (0,)") from None
    if len(set(chosen)) < len(chosen) or any(not 0 <= index < passes for index in chosen):
        raise ValueError(
            f"task_passes (={task_passes!r}) must be different pass numbers from 0 to {passes - 1}: these logits have "
            f"{passes} passes"
        )
    if not chosen and alpha == 0:
        raise ValueError("task_passes=() leaves the divergence alone, which needs alpha > 0: this loss would be 0")
    return chosen


def _split_passes(logits: Tensor, labels: Tensor) -> Tensor:
    """`(m*N, ..., V)` to `(m, N, ..., V)`, m from the labels' first dimension."""
    shapes = f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)}"
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, not {logits.dtype}")
    if logits.dim() < 2 or labels.dim() not in (logits.dim() - 1, logits.dim()):
        raise ValueError(f"{shapes}: expected logits (m*N, ..., V) with the classes last, and labels (N, ...)")
    rows, examples = logits.shape[0], labels.shape[0]
    if rows == examples and rows > 0:
        raise ValueError(
            f"{shapes}: as many rows as labels is one pass, and R-Drop compares m >= 2. "
            "Repeat the inputs, not the labels: rdrop_loss(model(repeat_batch(x)), labels, ...)"
        )
    passes = rows // examples if examples else 2
    if rows != passes * examples or passes < 2:
        raise ValueError(
            f"{shapes}: the first dimension of logits must be m >= 2 times that of labels: "
            "logits of repeat_batch(x, m), labels of x"
        )
    if logits.shape[1 : labels.dim()] != labels.shape[1:]:
        raise ValueError(f"{shapes}: they differ after the first dimension; expected (m*N, ..., V) and (N, ...)")
    return logits.reshape(passes, examples, *logits.shape[1:])


def _check_labels(labels: Tensor, valid: Tensor, *, num_classes: int, indices: bool) -> None:
    if not indices:
        if not labels.is_floating_point():
            raise ValueError(
                f"labels {tuple(labels.shape)} of {labels.dtype} have as many dimensions as the logits: class indices "
                "have one fewer, probabilities are floating point; for zeros and ones pass "
                "task_loss=binary_cross_entropy, divergence=bernoulli_kl"
            )
        return
    if labels.is_floating_point():
        raise ValueError(
            f"labels {tuple(labels.shape)} of {labels.dtype} cannot be class indices; for numbers pass "
            "task_loss=squared_error, divergence=squared_difference"
        )
    if not _values_may_be_read(labels):
        return
    outside = valid & ((labels < 0) | (labels >= num_classes))
    if outside.any():
        row = outside.nonzero()[0].tolist()
        raise ValueError(
            f"label {labels[tuple(row)].item()} at example {_place(row)} is outside [0, {num_classes}), the classes of "
            "the logits, and is not ignore_index"
        )


def _check_weight(weight: Tensor | None, *, num_classes: int) -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor) or weight.shape != (num_classes,):
        given = tuple(weight.shape) if isinstance(weight, Tensor) else repr(weight)
        raise ValueError(
            f"weight (={given}) must be a tensor ({num_classes},): one number for each class of the logits"
        )


def _check_num_items(num_items: int | Tensor, valid: Tensor) -> None:
    if isinstance(num_items, Tensor) and num_items.numel() != 1:
        raise ValueError(f"num_items, of shape {tuple(num_items.shape)}, must be one number")
    if torch.compiler.is_compiling() or (isinstance(num_items, Tensor) and num_items.device.type != "cpu"):
        return
    value = float(num_items)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"num_items (={value:g}) must be >= 0 and finite")
    if value == 0 and _values_may_be_read(valid) and valid.any():
        raise ValueError(
            f"num_items (=0) must be the number of valid positions in the whole update; this batch alone has "
            f"{int(valid.sum())}"
        )


def _one_value_per_position(values: Tensor, expected: torch.Size, argument: str, function: Any) -> Tensor:
    if values.shape != expected:
        name = getattr(function, "__name__", repr(function))
        raise ValueError(
            f"{argument}={name} returned shape {tuple(values.shape)}; it must return one value per position, "
            f"{tuple(expected)}: reduce over the last dimension only"
        )
    return values


def _values_may_be_read(tensor: Tensor) -> bool:
    """Reading a value would stop an accelerator's queue, and would break the graph under `torch.compile`."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _label_weights(weight: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
    """The normalizer of the weighted mean of `F.cross_entropy`: the sum of the class weights of the valid labels."""
    return weight[labels].masked_fill(~valid, 0.0).sum()


def _counts(
    reduction: Reduction, num_items: int | Tensor | None, labels: Tensor, valid: Tensor, weight: Tensor | None
) -> tuple[int | Tensor, int | Tensor]:
    """What the sums of the task loss and of the divergence over positions are divided by."""
    if reduction != "mean":
        return 1, 1
    if num_items is not None:
        _check_num_items(num_items, valid)
        total = num_items.reshape(()) if isinstance(num_items, Tensor) else num_items
        return total, total
    count = valid.sum()
    return count if weight is None else _label_weights(weight, labels.masked_fill(~valid, 0), valid), count


def _divide(total: Tensor, count: int | Tensor) -> Tensor:
    """`total / count`; nothing divided by no valid position is 0."""
    if isinstance(count, Tensor):
        return total / torch.where(count == 0, 1, count)
    return total / max(count, 1)

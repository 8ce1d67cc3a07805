"""The terms of the R-Drop loss, one value per position: how far passes disagree, and what a model is trained with.

One alphabet throughout: m passes, N examples, V classes; `...` are the positions inside an example (none for a
classifier, T for a sequence).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Callable[[Tensor], Tensor]
"""`(m, N, ..., V)`, the logits of m passes, to `(N, ...)`: how far they disagree, one value per position."""

TaskLoss = Callable[[Tensor, Tensor], Tensor]
"""`(M, ..., V)` logits and `(M, ...)` labels to `(M, ...)`: what the model is trained with, one value per position."""

IGNORE_INDEX = -100
"""The class label of a position that counts for nothing, as in `F.cross_entropy`."""

SUM_TOLERANCE = 0.01
"""How far probabilities may be from adding up to 1: bfloat16 rounds each by 0.4 %."""


class LossTerms(NamedTuple):
    """The result of both losses: `loss = task_loss + alpha / 2 * divergence`. Only `loss` carries gradient."""

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor


# ---------------------------------------------------------------------------------------------- divergences


def symmetric_kl(passes: Tensor) -> Tensor:
    """Computes `(KL(p||q) + KL(q||p)) / 2` of softmaxes, mean over pairs of passes: `(m, ..., V)` to `(...)`.

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
    return _by_formula("symmetric_kl", passes)


def bernoulli_kl(passes: Tensor) -> Tensor:
    """Computes `symmetric_kl` of K independent yes/no predictions, averaged over them: `(m, ..., K)` logits to `(...)`.

    For multi-label classification, beside `binary_cross_entropy`. For two passes this computes ::

        p, q = passes.sigmoid()
        ((p - q) * (passes[0] - passes[1])).mean(-1) / 2

    The mean over the K labels is that of the binary cross-entropy, so alpha does not depend on K.
    """
    return symmetric_kl(torch.stack([passes, torch.zeros_like(passes)], -1)).mean(-1)


def squared_difference(passes: Tensor) -> Tensor:
    """Computes the squared difference of two passes, mean over pairs and the K outputs: `(m, ..., K)` to `(...)`.

    For regression, beside `squared_error`, as the paper does for STS-B. For two passes this computes
    `(passes[0] - passes[1]).square().mean(-1)`; for m, twice the unbiased variance over the passes.
    """
    if passes.shape[0] < 2:
        raise ValueError(f"passes {tuple(passes.shape)} must have m >= 2 passes in the first dimension")
    return 2 * (passes - passes[0]).var(0).mean(-1)


def detached_kl(passes: Tensor) -> Tensor:
    """Computes `symmetric_kl` with its targets held fixed: each pass is drawn to the others as they are.

    For two passes this computes ::

        p, q = passes.log_softmax(-1)
        ((p.exp().detach() * (p.detach() - q)).sum(-1) + (q.exp().detach() * (q.detach() - p)).sum(-1)) / 2

    as CR-CTC does (Yao et al., ICLR 2025, arXiv 2410.05101), as accurate as `symmetric_kl`. The value is the same; of
    the gradient in the logits of pass a, `(p_a - pbar) / (m - 1)` is left. Differentiable once.
    """
    return _by_formula("detached_kl", passes)


def kl_from_first(passes: Tensor) -> Tensor:
    """Computes `KL(p||q)` from pass 1 to each other pass, mean over those: `(m, ..., V)` logits to `(...)`.

    For SimCut, whose first pass is the clean one. For two passes this computes ::

        p, q = passes.log_softmax(-1)
        (p.exp() * (p - q)).sum(-1)

    with gradients into both, accurate where the passes nearly agree; classes at -inf as in `symmetric_kl`, which it
    equals to second order. Differentiable once.

    With `r_a = log p_a - log p_1`, the gradient in the logits of pass a is `(p_a - p_1) / (m - 1)`, and in those of
    pass 1 `-p_1 * (rbar - p_1 . rbar)`, where rbar is the mean of the r_a over the other passes.
    """
    return _by_formula("kl_from_first", passes)


def _kl_from_first_and_gradient(logits: Tensor, *, gradient_wanted: bool = True) -> tuple[Tensor, Tensor | None]:
    p, log_p = _softmax_and_log(logits)
    log_ratio = _log_ratio_to_first(logits, p, log_p)[1:]
    surplus = torch.where(log_ratio.abs() < 1, p[0] * torch.expm1(log_ratio.clamp(-1, 1)), p[1:] - p[0])
    mean_log_ratio = log_ratio.mean(0)
    gradient = None
    if gradient_wanted:
        of_first = -_times_deviation(p[0], mean_log_ratio)
        gradient = torch.cat([of_first[None], surplus / len(log_ratio)])
    # p_a - p_1 sums to 0 over the classes: with it a term is p_1 (exp(r) - 1 - r) >= 0, which cancels for small r.
    terms = torch.where(log_ratio.abs() < 0.05, p[0] * _exp_beyond_tangent(log_ratio), surplus - p[0] * log_ratio)
    return terms.clamp_min(0).sum(-1).mean(0), gradient


def _times_deviation(p: Tensor, values: Tensor) -> Tensor:
    """Returns p times what the values are above their mean under p.

    They are taken relative to the one at the likeliest class: of values of 1e4 the sum of p alone, 1 up to rounding,
    would leave three digits.
    """
    values = values - values.gather(-1, p.argmax(-1, keepdim=True))
    return p * (values - (p * values).sum(-1, keepdim=True))


def _exp_beyond_tangent(r: Tensor) -> Tensor:
    """Returns `exp(r) - 1 - r` for |r| < 0.05, to rounding in float64."""
    series = torch.ones_like(r)
    for n in range(8, 2, -1):
        series = 1 + r / n * series
    return r.square() / 2 * series


def symmetric_kl_and_gradient(
    logits: Tensor, *, gradient_wanted: bool = True, targets_fixed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Returns `symmetric_kl` of `(m, ..., V)` logits and, if wanted, its gradient in them; neither has a graph.

    With `targets_fixed` the gradient is that of `detached_kl`.
    """
    p, log_p = _softmax_and_log(logits)
    log_ratio = _log_ratio_to_first(logits, p, log_p)  # log p_a - log p_1
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
    gradient = None
    if gradient_wanted:
        gradient = (surplus if targets_fixed else _times_deviation(p, excess) + surplus) / pairs
    # The sum over passes is >= 0 at every class; rounding can miss that by an ulp of a vanishing term.
    return (surplus * excess).sum(0).clamp_min(0).sum(-1) / pairs, gradient


_FORMULAS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "symmetric_kl": symmetric_kl_and_gradient,
    "detached_kl": partial(symmetric_kl_and_gradient, targets_fixed=True),
    "kl_from_first": _kl_from_first_and_gradient,
}
OF_SOFTMAXES = (symmetric_kl, detached_kl, kl_from_first)
"""The divergences that compare softmax distributions: those that kernels compute."""


class _ByFormula(torch.autograd.Function):
    """A divergence, by its name, whose gradient is computed with its value."""

    @staticmethod
    def forward(ctx: Any, passes: Tensor, name: str, gradient_wanted: bool) -> Tensor:
        value, gradient = _FORMULAS[name](passes, gradient_wanted=gradient_wanted)
        ctx.name = name
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        refuse_second_derivative(ctx.name)
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[None, ..., None], None, None


def _by_formula(name: str, passes: Tensor) -> Tensor:
    if passes.dim() < 2 or passes.shape[0] < 2:
        raise ValueError(f"passes {tuple(passes.shape)} must be (m, ..., V) with m >= 2 passes in the first dimension")
    value: Tensor = _ByFormula.apply(at_least_float32(passes), name, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return value


def refuse_second_derivative(name: str, instead: str = "pass a divergence written in plain PyTorch") -> None:
    """Raises a RuntimeError in the backward of `name`, whose gradient has no graph, if one of it is asked for."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # backward(create_graph=True)
        raise RuntimeError(
            f"{name} can be differentiated once only: its gradient is a formula of its own, without a graph. "
            f"For second derivatives (create_graph=True) {instead}"
        )


def at_least_float32(tensor: Tensor) -> Tensor:
    """Returns the tensor in float32 if it is float16 or bfloat16, else as it is."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _softmax_and_log(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the softmax and its log; of a class that has nearly all of it, the log is what the others leave.

    Not by torch, whose running sum on a CPU is off by 2e-5 at V = 250,000.
    """
    top = logits.argmax(-1, keepdim=True)
    relative = logits - logits.gather(-1, top)
    weights = relative.exp()
    others = weights.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    return weights / (1 + others), relative - torch.log1p(others)


def _log_ratio_to_first(logits: Tensor, p: Tensor, log_p: Tensor) -> Tensor:
    """Returns `log p_a - log p_1`, accurate also where the passes nearly agree: `(m, ..., V)`, 0 for pass 1.

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
    # The log of the ratio of the normalizers is that of 1 and a small sum where the passes are close. Elsewhere hardly
    # any ratio is small, and each pass by itself loses less: its logits are taken relative to its own largest.
    of_anchor = p[0].gather(-1, anchor[0]) / p.gather(-1, anchor)
    of_small = p[0] * torch.expm1(difference.clamp(max=1.0))
    growth = torch.where(difference >= 1, p * of_anchor - p[0], of_small)  # p_1 (exp(difference) - 1)
    close = growth.abs().sum(-1, keepdim=True) < 0.5
    near = torch.log1p(growth.sum(-1, keepdim=True).clamp(-0.5, 0.5))
    return torch.where(close, difference - near, (log_p - log_p[0]).masked_fill(outside, 0.0))


# ---------------------------------------------------------------------------------------------- task losses


def cross_entropy(
    logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, weight: Tensor | None = None
) -> Tensor:
    """Computes `F.cross_entropy(..., reduction="none")`, classes last: `(M, ..., V)` and `(M, ...)` to `(M, ...)`.

    Labels are class indices `(M, ...)`, or probabilities `(M, ..., V)`. It is written with logsumexp: on CPU the
    running sum inside `F.cross_entropy` puts its gradient off by 2e-5 at V = 250,000. And a class at -inf adds nothing
    where its probability or its weight is 0.
    """
    logits = logits - logits.detach().amax(-1, keepdim=True)  # for the gradient, whose rounding grows with the logits
    log_normalizer = logits.logsumexp(-1)
    weight = None if weight is None else weight.to(logits.dtype)
    if labels.dim() == logits.dim():
        target = (1 - label_smoothing) * labels.to(logits.dtype) + label_smoothing / logits.shape[-1]
        target = target if weight is None else target * weight
        return log_normalizer * target.sum(-1) - (target * logits.masked_fill(target == 0, 0.0)).sum(-1)
    values = log_normalizer - logits.gather(-1, labels[..., None]).squeeze(-1)
    if weight is not None:
        values = values * weight[labels]
    if label_smoothing:
        uniform = log_normalizer - logits.mean(-1)
        if weight is not None:
            uniform = log_normalizer * weight.mean() - (logits.masked_fill(weight == 0, 0.0) * weight).mean(-1)
        values = (1 - label_smoothing) * values + label_smoothing * uniform
    return values


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes `F.binary_cross_entropy_with_logits`, mean over the K labels: twice `(M, ..., K)` to `(M, ...)`.

    Labels may be `(M, ...)` where K is 1.
    """
    labels = _like("binary_cross_entropy", logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes `F.mse_loss`, mean over the K outputs: twice `(M, ..., K)` to `(M, ...)`.

    Labels may be `(M, ...)` where K is 1.
    """
    return F.mse_loss(logits, _like("squared_error", logits, labels), reduction="none").mean(-1)


def _like(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    if labels.dim() == logits.dim() - 1 and logits.shape[-1] == 1:
        labels = labels[..., None]
    if labels.shape != logits.shape:  # torch would broadcast them
        raise ValueError(
            f"{name} compares numbers one by one: labels {tuple(labels.shape)} must be of the shape of the "
            f"logits, {tuple(logits.shape)}"
        )
    return labels.to(logits.dtype)

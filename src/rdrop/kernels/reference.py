"""The row operators in plain PyTorch: what `linear_rdrop_loss` calls, chunk by chunk, where no kernel can run.

The signatures of the package's docstring. The body of an operator is below autograd, so the gradient is written down;
that of the divergence is the one `symmetric_kl` keeps for its backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..terms import cross_entropy, symmetric_kl, symmetric_kl_and_gradient


def forward(
    logits: Tensor, labels: Tensor, weight: Tensor | None, label_smoothing: float, passes: int
) -> tuple[Tensor, Tensor]:
    """Returns task loss and divergence `(N, T)` of `(m*N, T, V)` logits, in float32 at least."""
    rows = _as_passes(logits, passes)
    return _mean_cross_entropy(rows, labels, weight, label_smoothing), symmetric_kl(rows)


def forward_backward_(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    passes: int,
    grad_task: Tensor,
    grad_divergence: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the same, and leaves the gradient of `grad_task * task + grad_divergence * divergence` in the logits."""
    rows = _as_passes(logits, passes)
    task = _mean_cross_entropy(rows, labels, weight, label_smoothing)
    divergence, of_divergence = symmetric_kl_and_gradient(rows)
    assert of_divergence is not None
    gradient = _cross_entropy_gradient(rows, labels, weight, label_smoothing).mul_(grad_task[..., None] / passes)
    gradient.addcmul_(of_divergence, grad_divergence[..., None].to(rows.dtype))
    logits.view_as(gradient).copy_(gradient)
    return task, divergence


def _as_passes(logits: Tensor, passes: int) -> Tensor:
    rows = logits.view(passes, -1, *logits.shape[1:])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _mean_cross_entropy(rows: Tensor, labels: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    repeated = labels.expand(len(rows), *labels.shape)
    return cross_entropy(rows, repeated, label_smoothing=label_smoothing, weight=weight).mean(0)


def _cross_entropy_gradient(rows: Tensor, labels: Tensor, weight: Tensor | None, label_smoothing: float) -> Tensor:
    """Returns the gradient of each row's own cross-entropy: `(m, N, T, V)`."""
    probabilities = (rows - rows.amax(-1, keepdim=True)).exp_()
    probabilities /= probabilities.sum(-1, keepdim=True)
    classes = rows.shape[-1]
    weight = rows.new_ones(classes) if weight is None else weight.to(rows.dtype)
    uniform = label_smoothing / classes * weight
    if labels.is_floating_point():
        target = torch.addcmul(uniform, labels.to(rows.dtype), weight, value=1 - label_smoothing)
        return probabilities.mul_(target.sum(-1, keepdim=True)).sub_(target)
    at_label = (1 - label_smoothing) * weight[labels]
    gradient = probabilities.mul_((at_label + uniform.sum())[..., None]).sub_(uniform)
    at_label = at_label.expand(rows.shape[:-1])
    return gradient.scatter_add_(-1, labels.expand(rows.shape[:-1])[..., None], -at_label[..., None])

"""The row kernels as torch operators: autograd, torch.compile, fake tensors; and the loss that overwrites its logits.

The contract is in the package's docstring.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..terms import OF_SOFTMAXES, refuse_second_derivative
from . import cpu, triton
from .constants import assume_constant_result

IGNORED = -1
Implementation = Literal["auto", "reference", "cpu", "triton"]
KERNEL_OF_DEVICE: dict[str, Implementation] = {"cpu": "cpu", "cuda": "triton"}
"""What "auto" takes where it can, by the type of the device; elsewhere the reference."""
DIVERGENCES = tuple(divergence.__name__ for divergence in OF_SOFTMAXES)
"""Those the kernels compute; they know them by their places here."""
_IMPLEMENTATIONS: dict[str, Any] = {"cpu": cpu, "triton": triton}


# ---------------------------------------------------------------------------------------------- which can run


def available() -> dict[str, str | None]:
    """Returns each implementation's name, and None if it can run here or the reason why not."""
    return {name: module.why_not() for name, module in _IMPLEMENTATIONS.items()}


def why_not(implementation: str, logits: Tensor, passes: int) -> str | None:
    """Returns why `implementation` cannot compute these logits; None if it can."""
    reason: str | None = _why_not_here(implementation)
    if reason is None and type(logits) not in (Tensor, torch.nn.Parameter):
        reason = f"the logits are a {type(logits).__name__}"
    return reason or _IMPLEMENTATIONS[implementation].why_not_for(logits, passes)


@assume_constant_result
def _why_not_here(implementation: str) -> str | None:
    reason: str | None = _IMPLEMENTATIONS[implementation].why_not()
    return reason


@assume_constant_result
def warn_if_missing(implementation: str) -> None:
    """Writes one line into the log, once, where `implementation` was not built or does not load."""
    reason = _why_not_here(implementation)
    if reason is not None:
        _warn_once(reason)


@cache
def _warn_once(reason: str) -> None:
    logging.getLogger("rdrop").warning(
        "rdrop_loss runs on its PyTorch reference, several times slower than its compiled kernel: %s", reason
    )


# ---------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("rdrop::rows_forward", mutates_args=())
def rows_forward(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    passes: int,
    divergence: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the forward of the package's docstring."""
    terms, statistics = _terms_like(labels), _statistics_like(labels, passes)
    arguments = logits, labels, weight, label_smoothing, passes, DIVERGENCES.index(divergence), statistics
    _IMPLEMENTATIONS[implementation].launch(*arguments, terms=terms)
    return *terms, statistics


@torch.library.custom_op("rdrop::rows_backward", mutates_args=())
def rows_backward(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    passes: int,
    divergence: str,
    implementation: str,
    statistics: Tensor,
    grad_task: Tensor,
    grad_divergence: Tensor,
) -> Tensor:
    """Computes the gradient of the package's docstring."""
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    arguments = logits, labels, weight, label_smoothing, passes, DIVERGENCES.index(divergence), statistics
    upstream = grad_task, grad_divergence
    _IMPLEMENTATIONS[implementation].launch(*arguments, gradient=gradient, upstream=upstream)
    return gradient


@torch.library.custom_op("rdrop::rows_forward_backward_", mutates_args=("logits",))
def rows_forward_backward_(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    passes: int,
    divergence: str,
    implementation: str,
    grad_task: Tensor,
    grad_divergence: Tensor,
) -> tuple[Tensor, Tensor]:
    """Computes both, the gradient in the place of the logits."""
    terms, statistics = _terms_like(labels), _statistics_like(labels, passes)
    arguments = logits, labels, weight, label_smoothing, passes, DIVERGENCES.index(divergence), statistics
    upstream = grad_task, grad_divergence
    _IMPLEMENTATIONS[implementation].launch(*arguments, terms=terms, gradient=logits, upstream=upstream)
    return terms


def _terms_like(labels: Tensor) -> tuple[Tensor, Tensor]:
    term = labels.new_empty(labels.shape[:2], dtype=torch.float32)
    return term, torch.empty_like(term)


def _statistics_like(labels: Tensor, passes: int) -> Tensor:
    return labels.new_empty((*labels.shape[:2], 1 + 4 * passes), dtype=torch.float64)


@rows_forward.register_fake
def _(logits, labels, weight, label_smoothing, passes, divergence, implementation):  # type: ignore[no-untyped-def]
    return *_terms_like(labels), _statistics_like(labels, passes)


@rows_backward.register_fake
def _(logits, labels, *arguments):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape)


@rows_forward_backward_.register_fake
def _(logits, labels, *arguments):  # type: ignore[no-untyped-def]
    return _terms_like(labels)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, weight, *ctx.options = inputs
    ctx.save_for_backward(logits, labels, weight, output[2])
    ctx.set_materialize_grads(False)


def _rows_gradient(
    ctx: Any, grad_task: Tensor | None, grad_divergence: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_divergence is None:  # alpha 0: a divergence of the caller's own would change nothing
        refuse_second_derivative("the loss by a kernel", "pass implementation='reference'")
    refuse_second_derivative(ctx.options[2])
    logits, labels, weight, statistics = ctx.saved_tensors
    nothing = labels.new_zeros(labels.shape[:2], dtype=torch.float32)
    gradient = rows_backward(
        logits,
        labels,
        weight,
        *ctx.options,
        statistics,
        nothing if grad_task is None else grad_task,
        nothing if grad_divergence is None else grad_divergence,
    )
    return gradient, *(None,) * 6


rows_forward.register_autograd(_rows_gradient, setup_context=_keep_for_backward)


# ---------------------------------------------------------------------------------------------- for rdrop_loss


def row_terms(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None,
    label_smoothing: float,
    passes: int,
    divergence: str = "symmetric_kl",
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Returns task loss and divergence per position, `(N, ...)`, of `(m*N, ..., V)` logits.

    Labels are class indices or IGNORED, `(N, ...)`, or probabilities, `(N, ..., V)`.
    """
    rows = _as_rows(logits)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    tasks, divergences, _ = rows_forward(
        rows, _labels_as_rows(labels, logits), weight, label_smoothing, passes, divergence, implementation
    )
    places = labels.shape[:1] + logits.shape[1:-1]
    return tasks.view(places), divergences.view(places)


def marked(labels: Tensor, valid: Tensor) -> Tensor:
    """Returns class labels with IGNORED where they are not valid; a label that happens to be that stays an error."""
    return labels.masked_fill(labels == IGNORED, IGNORED - 1).masked_fill(~valid, IGNORED)


def _as_rows(tensor: Tensor) -> Tensor:
    """Returns `(n, ..., V)` as `(n, T, V)`: a view, where strides allow."""
    return tensor[:, None] if tensor.dim() == 2 else tensor.flatten(1, -2)


def _labels_as_rows(labels: Tensor, logits: Tensor) -> Tensor:
    """Returns labels `(N, ...)` as `(N, T)`, and `(N, ..., V)` as `(N, T, V)`."""
    return _as_rows(labels) if labels.dim() == logits.dim() else _as_rows(labels[..., None])[..., 0]


def overwriting_loss(
    logits: Tensor,
    labels: Tensor,
    grad_task: Tensor,
    grad_divergence: Tensor,
    *,
    weight: Tensor | None,
    label_smoothing: float,
    passes: int,
    divergence: str = "symmetric_kl",
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `grad_task * task + grad_divergence * divergence`, task loss and divergence, `(N, ...)` each.

    Only the first is differentiable; its gradient is in the logits' memory when this returns.
    """
    losses, tasks, divergences, _ = _OverwritingLoss.apply(  # type: ignore[no-untyped-call]
        logits, labels, weight, label_smoothing, passes, divergence, implementation, grad_task, grad_divergence
    )
    return losses, tasks, divergences


class _OverwritingLoss(torch.autograd.Function):
    """The logits are an output too, marked dirty: autograd then knows that what they were is gone.

    An operation that kept them for its own backward fails there by their version; one that takes them afterwards sends
    its gradient here, where it is refused.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weight: Tensor | None,
        label_smoothing: float,
        passes: int,
        divergence: str,
        implementation: str,
        grad_task: Tensor,
        grad_divergence: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tasks, divergences = rows_forward_backward_(
            _as_rows(logits),
            _labels_as_rows(labels, logits),
            weight,
            label_smoothing,
            passes,
            divergence,
            implementation,
            _labels_as_rows(grad_task, logits),
            _labels_as_rows(grad_divergence, logits),
        )
        tasks, divergences = tasks.view(grad_task.shape), divergences.view(grad_task.shape)
        ctx.mark_dirty(logits)
        ctx.mark_non_differentiable(tasks, divergences)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, (tasks + divergences).isfinite())
        ctx.passes, ctx.divergence, ctx.spent = passes, divergence, False
        return grad_task * tasks + grad_divergence * divergences, tasks, divergences, logits

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative(ctx.divergence)
        if others[2] is not None:
            raise RuntimeError(
                "logits overwritten by rdrop_loss were used in another differentiable computation, which saw the "
                "gradient in their place: compute it before, from a copy, or leave overwrite_logits=False"
            )
        if ctx.spent:
            raise RuntimeError(
                "the gradient that overwrite_logits left in the logits was handed out by an earlier backward: for "
                "retain_graph=True leave overwrite_logits=False"
            )
        ctx.spent = True
        gradient, is_finite = (tensor.detach() for tensor in ctx.saved_tensors)
        if upstream is not None and not ((upstream == 1) & is_finite).all():
            upstream = upstream.masked_fill(~is_finite, math.nan)  # there the kernel has left the logits
            gradient.unflatten(0, (ctx.passes, -1)).mul_(upstream[None, ..., None])
        torch.autograd.graph.increment_version(gradient)
        return (None if upstream is None else gradient, *(None,) * 8)

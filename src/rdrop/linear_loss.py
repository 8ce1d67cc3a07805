"""The R-Drop loss from hidden states: a few positions' logits at a time, turned into their gradient where they lie.

The projection's gradients need the logits' gradient, not the logits. A chunk of positions is projected, its logits are
overwritten by their gradient (`rows_forward_backward_`), and the two products with it are added up; then the next chunk
takes the same memory. Positions that are ignored are left out before the projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import (
    NonfiniteLossError,
    Reduction,
    are_finite,
    check_class_labels,
    check_classes,
    check_finite_weight,
    check_options,
    check_probabilities,
    check_rows,
    checked_alpha,
    divide,
    divisors,
    kernel_for,
    not_finite,
    number_of_passes,
    place,
    refuse_transforms,
    require_tensors,
    values_may_be_read,
)
from .kernels import operators, reference
from .kernels.constants import assume_constant_result
from .kernels.operators import IGNORED
from .terms import IGNORE_INDEX, LossTerms, cross_entropy, refuse_second_derivative, symmetric_kl

if TYPE_CHECKING:
    from .kernels import Implementation

CHUNK_BYTES = {"cpu": 64 << 20}
"""Default size of a chunk of logits: the processor's matrix products are at full speed, and it is a few rows still."""
ACCELERATOR_CHUNK_BYTES = 256 << 20

_CLASSES_AT_ONCE = 8192
"""Of the weight gradient, where its products must be widened before they are added up."""

_ANOTHER_LOSS = "use rdrop_loss(F.linear(hidden, weight, bias), labels, ...) with"
_INSTEAD = "use rdrop_loss of F.linear(...) with a divergence written in plain PyTorch"

_WAITS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()
"""An accelerator is asked once how many positions are valid: no part of a CUDA graph (tag of torch >= 2.9)."""


# ---------------------------------------------------------------------------------------------- the loss


def linear_rdrop_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    alpha: float,
    label_smoothing: float = 0.0,
    ignore_index: int = IGNORE_INDEX,
    class_weight: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: int | Tensor | None = None,
    implementation: Implementation = "auto",
    chunk_positions: int | None = None,
) -> LossTerms:
    """Computes `rdrop_loss` of a linear layer's output, without the output.

    This is ::

        rdrop_loss(F.linear(hidden, weight, bias), labels, alpha=alpha, ..., weight=class_weight)

    and never stores more than one chunk of the `(m*N, ..., V)` logits. Where a gradient is wanted it is computed here,
    with the value: `backward` only scales it. Extra memory: the gradients, and one chunk.

    Example::

        hidden = model.body(repeat_batch(x))  # (2N, T, D)
        loss, task_loss, divergence = linear_rdrop_loss(hidden, model.head.weight, labels, model.head.bias, alpha=5.0)
        loss.backward()

    Args:
        hidden: `(m*N, ..., D)`, what the output layer gets for `repeat_batch(x, m)`: all of pass 1, then all of pass 2.
            The number of passes m >= 2 is the ratio of the first dimensions of `hidden` and `labels`.
        weight: `(V, D)`, as `torch.nn.Linear` has it; an embedding's weight where the two are tied.
        labels: of the batch as it was before repeating: `(N, ...)` class indices, or `(N, ..., V)` probabilities, which
            are read a chunk at a time.
        bias: `(V,)`. May hold -inf: a class masked in every pass.
        alpha, label_smoothing, ignore_index, num_items: as in `rdrop_loss`. Ignored positions are not projected.
        class_weight: `(V,)`, `weight` of `rdrop_loss`.
        reduction: "mean", "sum" or "none" as in `rdrop_loss`. With "none" the gradient depends on what `backward`
            brings for each position: it is computed there, from logits computed once more (a third more work), as
            often as asked. With "mean" and "sum" `backward` can run once.
        implementation: "auto", "reference", "cpu" or "triton", as in `rdrop_loss`: who turns a chunk of logits into
            both terms and their gradient.
        chunk_positions: how many positions are projected at a time, m rows of V logits each. By default what fits in
            64 MB on CPU, 256 MB on an accelerator; at least one.

    The logits are computed in the dtype of `hidden` and `weight`, under `torch.autocast` in its dtype: the dtype of the
    matrix products. Instead of float16, whose range does not hold a small gradient before a loss scale reaches it, and
    of bfloat16 on a CPU without products for it, that is float32. The weight and bias gradients are added up in float32
    whatever their dtype. An operand in another dtype is copied once.

    On an accelerator the number of valid positions is read once, which waits for `labels`.

    Returns:
        `LossTerms(loss, task_loss, divergence)`, float32 (float64 for float64 logits). A batch without a valid position
        gives 0 with zero gradients.

    Raises:
        ValueError: as `rdrop_loss`; what depends on values is checked on CPU, outside `torch.compile`. Elsewhere a
            position without a finite loss makes the loss and all gradients NaN.
        RuntimeError: in a second `backward` through one graph (reduction "mean" and "sum"), and for second derivatives.

    Source: as `rdrop_loss`.
    """
    alpha = checked_alpha(alpha)
    check_options(label_smoothing, reduction, num_items)
    if chunk_positions is not None and chunk_positions < 1:
        raise ValueError(f"chunk_positions (={chunk_positions}) must be >= 1")
    require_tensors(hidden=hidden, weight=weight, labels=labels)
    refuse_transforms(hidden, weight, bias)
    passes = _check_shapes(hidden, weight, labels, bias, class_weight)
    indices = labels.dim() < hidden.dim()
    if indices and not labels.is_floating_point():
        labels = labels.long()
    places = labels.shape if indices else labels.shape[:-1]
    valid = labels != ignore_index if indices else labels.new_ones(places, dtype=torch.bool)
    check_classes(cross_entropy, symmetric_kl, "weight", weight, weight.shape[0], _ANOTHER_LOSS)
    if indices:
        check_class_labels(labels, valid, weight.shape[0], _ANOTHER_LOSS)
    else:
        check_probabilities(labels, read=False, how=_ANOTHER_LOSS)
    dtype = _products_dtype(hidden, weight)
    kernel = kernel_for(implementation, weight.detach().new_empty((passes, 1, 0), dtype=dtype), passes) or "reference"

    rows = hidden.reshape(passes, valid.numel(), hidden.shape[-1])
    targets = operators.marked(labels.long(), valid).flatten() if indices else labels.flatten(0, -2)
    chunk = chunk_positions or _default_chunk(passes * weight.shape[0], dtype, hidden.device.type)
    problem = (rows, weight, bias, targets, class_weight, label_smoothing, kernel, dtype, chunk)
    task_divisor, divisor = divisors(reduction, num_items, labels, valid, class_weight if indices else None)
    wanted = [
        tensor is not None and torch.is_grad_enabled() and tensor.requires_grad for tensor in (rows, weight, bias)
    ]
    loss = None
    if reduction == "none" or not any(wanted):
        tasks, divergences = linear_forward(*problem)
    else:
        ones = torch.ones(len(targets), dtype=_terms_dtype(dtype), device=targets.device)
        scales = divide(ones, task_divisor), alpha / 2 * divide(ones, divisor)
        loss, tasks, divergences, *_ = linear_forward_backward(*problem, *scales, *wanted)

    tasks, divergences = tasks.view(places), divergences.view(places)
    if values_may_be_read(tasks) and not are_finite(tasks, divergences, reduction):
        if not indices:
            check_probabilities(labels, read=True, how=_ANOTHER_LOSS)
        logits_at = partial(
            _checked_logits, rows.view(passes, *places, rows.shape[-1]), weight, bias, labels, indices, dtype
        )
        raise NonfiniteLossError(not_finite(tasks, divergences, logits_at))
    if reduction != "none":
        tasks, divergences = divide(tasks.sum(), task_divisor), divide(divergences.sum(), divisor)
    if loss is None:
        loss = tasks + alpha / 2 * divergences if alpha > 0 else tasks.clone()
    return LossTerms(loss, tasks.detach(), divergences.detach())


def chunk_bytes(device: str) -> int:
    """Returns how much memory a chunk of logits takes by default, on a type of device."""
    return CHUNK_BYTES.get(device, ACCELERATOR_CHUNK_BYTES)


# ---------------------------------------------------------------------------------------------- operators
#
# Arguments common to both, for P positions:
#
#     hidden         (m, P, D)
#     weight, bias   (V, D); (V,) or None
#     labels         (P,) int64, IGNORED where the position counts for nothing; or (P, V) probabilities
#     class_weight, label_smoothing, implementation    as in the package's docstring, and "reference"
#     dtype          of the matrix products, the logits and their gradient
#     chunk          positions projected at a time


class _Chunk(NamedTuple):
    positions: Tensor  # (C,) which
    hidden: Tensor  # (m*C, D), a copy of theirs
    labels: Tensor  # (C, 1), or (C, 1, V)
    logits: Tensor  # (m*C, 1, V)


@torch.library.custom_op("rdrop::linear_forward", mutates_args=(), tags=_WAITS)
def linear_forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    implementation: str,
    dtype: torch.dtype,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """Computes task loss and divergence `(P,)`. Differentiable once, by computing everything again."""
    tasks, divergences = _zero_terms(labels, dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in _chunks(hidden, weight, bias, labels, dtype, chunk):
            terms = _forward(part, class_weight, label_smoothing, hidden.shape[0], implementation)
            tasks[part.positions], divergences[part.positions] = terms
    return tasks, divergences


@torch.library.custom_op("rdrop::linear_forward_backward", mutates_args=(), tags=_WAITS)
def linear_forward_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    class_weight: Tensor | None,
    label_smoothing: float,
    implementation: str,
    dtype: torch.dtype,
    chunk: int,
    grad_task: Tensor,
    grad_divergence: Tensor,
    hidden_wanted: bool,
    weight_wanted: bool,
    bias_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes `(grad_task * task + grad_divergence * divergence).sum()`, both terms `(P,)`, and the sum's gradients.

    Only the sum is differentiable. A gradient that is not wanted is empty; one for a float16 tensor is float32.
    """
    passes, _, features = hidden.shape
    tasks, divergences = _zero_terms(labels, dtype)
    hidden_gradient, weight_gradient, bias_gradient = _empty_gradients(
        hidden, weight, bias, (hidden_wanted, weight_wanted, bias_wanted), dtype
    )
    hidden_gradient.zero_()
    bias_gradient.zero_()
    matrix = weight.to(dtype)
    first = True
    with torch.autocast(hidden.device.type, enabled=False):
        for part in _chunks(hidden, matrix, bias, labels, dtype, chunk):
            scales = (scale[part.positions, None] for scale in (grad_task, grad_divergence))
            task, divergence = _forward_backward_(part, class_weight, label_smoothing, passes, implementation, *scales)
            tasks[part.positions], divergences[part.positions] = task, divergence
            gradient = part.logits[:, 0]  # now
            lost = ~(task + divergence).isfinite().repeat(passes)[:, None]  # kernels leave such rows as they were
            if hidden_wanted:
                product = torch.mm(gradient, matrix).masked_fill_(lost, torch.nan)
                hidden_gradient[:, part.positions] = product.view(passes, -1, features).to(hidden_gradient.dtype)
            if weight_wanted:
                _add_product(weight_gradient, gradient.t(), part.hidden.masked_fill_(lost, torch.nan), first=first)
            if bias_wanted:
                bias_gradient += gradient.sum(0, dtype=bias_gradient.dtype)
            first = False
    if first:
        weight_gradient.zero_()
    loss = (grad_task * tasks + grad_divergence * divergences).sum()
    bias_gradient += 0 * loss  # NaN where the loss is not finite
    return (
        loss,
        tasks,
        divergences,
        hidden_gradient,
        weight_gradient.to(_kept_dtype(weight.dtype)),
        bias_gradient if bias is None else bias_gradient.to(_kept_dtype(bias.dtype)),
    )


def _chunks(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, dtype: torch.dtype, size: int
) -> Iterator[_Chunk]:
    """Yields the valid positions, `size` at a time, with their logits; all in the same memory."""
    passes, _, features = hidden.shape
    matrix = weight.to(dtype).t()
    shift = None if bias is None else bias.to(dtype)
    if labels.is_floating_point():
        valid = torch.arange(len(labels), device=labels.device)
    else:
        (valid,) = (labels != IGNORED).nonzero(as_tuple=True)
    memory = hidden.new_empty((min(size, len(valid)) * passes, weight.shape[0]), dtype=dtype)
    for start in range(0, len(valid), size):
        positions = valid[start : start + size]
        rows = hidden[:, positions].to(dtype).reshape(-1, features)
        logits = memory[: len(rows)]
        if shift is None:
            torch.mm(rows, matrix, out=logits)
        else:
            torch.addmm(shift, rows, matrix, out=logits)
        # All probabilities count: a slice of them copies nothing.
        some = labels[start : start + size] if labels.is_floating_point() else labels[positions]
        yield _Chunk(positions, rows, some[:, None], logits[:, None])


def _forward(part: _Chunk, weight: Tensor | None, label_smoothing: float, passes: int, name: str) -> list[Tensor]:
    arguments = part.logits, part.labels, weight, label_smoothing, passes
    terms = (
        reference.forward(*arguments)
        if name == "reference"
        else operators.rows_forward(*arguments, "symmetric_kl", name)
    )
    return [term[:, 0] for term in terms[:2]]


def _forward_backward_(
    part: _Chunk, weight: Tensor | None, label_smoothing: float, passes: int, name: str, *scales: Tensor
) -> list[Tensor]:
    arguments = part.logits, part.labels, weight, label_smoothing, passes
    if name == "reference":
        terms = reference.forward_backward_(*arguments, *scales)
    else:
        terms = operators.rows_forward_backward_(*arguments, "symmetric_kl", name, *scales)
    return [term[:, 0] for term in terms]


def _add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Adds `left @ right` to `total`, which the first time is memory without content."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, beta=0 if first else 1, out=total)
        return
    for start in range(0, len(total), _CLASSES_AT_ONCE):
        some = slice(start, start + _CLASSES_AT_ONCE)
        product = torch.mm(left[some], right)
        if first:
            total[some] = product
        else:
            total[some] += product


def _terms_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a gradient that waits for its upstream: float16 needs the loss scale before it rounds."""
    return torch.float32 if dtype == torch.float16 else dtype


def _zero_terms(labels: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    zeros = labels.new_zeros(len(labels), dtype=_terms_dtype(dtype))
    return zeros, zeros.clone()


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool], dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns memory for the gradients; those of the parameters in the dtype they are added up in."""
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    dtypes = _kept_dtype(hidden.dtype), _terms_dtype(dtype), _terms_dtype(dtype)
    gradients = (
        hidden.new_empty(shape if yes else (0,), dtype=dtype)
        for shape, dtype, yes in zip(shapes, dtypes, wanted, strict=True)
    )
    return tuple(gradients)  # type: ignore[return-value]


@linear_forward.register_fake
def _(hidden, weight, bias, labels, class_weight, label_smoothing, implementation, dtype, chunk):  # type: ignore[no-untyped-def]
    return _zero_terms(labels, dtype)


@linear_forward_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    hidden, weight, bias, labels, class_weight, label_smoothing, implementation, dtype, chunk, grad_task, _, *wanted
):
    of_hidden, of_weight, of_bias = _empty_gradients(hidden, weight, bias, wanted, dtype)
    return (
        grad_task.new_empty(()),
        *_zero_terms(labels, dtype),
        of_hidden,
        of_weight.to(_kept_dtype(weight.dtype)),
        of_bias if bias is None else of_bias.to(_kept_dtype(bias.dtype)),
    )


def _keep_problem(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.label_smoothing, ctx.implementation, ctx.dtype, ctx.chunk = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _compute_again(ctx: Any, grad_task: Tensor | None, grad_divergence: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_rdrop_loss", _INSTEAD)
    labels = ctx.saved_tensors[3]
    nothing = labels.new_zeros(len(labels), dtype=_terms_dtype(ctx.dtype))
    *_, of_hidden, of_weight, of_bias = linear_forward_backward(
        *ctx.saved_tensors,
        ctx.label_smoothing,
        ctx.implementation,
        ctx.dtype,
        ctx.chunk,
        nothing if grad_task is None else grad_task,
        nothing if grad_divergence is None else grad_divergence,
        *ctx.needs_input_grad[:3],
    )
    return (
        *_as_inputs(ctx.saved_tensors[:3], (of_hidden, of_weight, of_bias), ctx.needs_input_grad[:3]),
        *(None,) * 6,
    )


def _as_inputs(
    inputs: tuple[Tensor | None, ...], gradients: tuple[Tensor, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    return tuple(
        gradient.to(tensor.dtype) if yes and tensor is not None else None
        for tensor, gradient, yes in zip(inputs, gradients, wanted, strict=True)
    )


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]
    ctx.wanted = inputs[-3:]
    ctx.set_materialize_grads(False)
    ctx.spent = False


def _hand_out_gradients(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_rdrop_loss", _INSTEAD)
    if upstream is None:
        return (None,) * 14
    if ctx.spent:
        raise RuntimeError(
            "the gradient of linear_rdrop_loss was handed out by an earlier backward through this graph: to go through "
            "it more than once (retain_graph=True), use reduction='none' and reduce its loss yourself"
        )
    in_place = not torch.compiler.is_compiling()  # the compiler sees for itself what memory it may use again
    ctx.spent = in_place
    gradients = (
        _scaled(gradient, upstream, in_place=in_place).to(dtype) if yes else None
        for gradient, dtype, yes in zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    )
    return *gradients, *(None,) * 11


def _scaled(gradient: Tensor, upstream: Tensor, *, in_place: bool) -> Tensor:
    if not in_place:
        return gradient * upstream
    gradient = gradient.detach()
    if upstream.device.type == "cpu" and upstream == 1:
        return gradient
    return gradient.mul_(upstream)


linear_forward.register_autograd(_compute_again, setup_context=_keep_problem)
linear_forward_backward.register_autograd(_hand_out_gradients, setup_context=_keep_gradients)


# ---------------------------------------------------------------------------------------------- the arguments


def _check_shapes(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, class_weight: Tensor | None
) -> int:
    """Returns the number of passes, if everything fits."""
    both = f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}"
    if not (hidden.is_floating_point() and weight.is_floating_point()):
        raise ValueError(f"hidden ({hidden.dtype}) and weight ({weight.dtype}) must be floating point")
    if hidden.dim() < 2 or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{both}: expected (m*N, ..., D) and (V, D), with one D")
    for name, vector in (("bias", bias), ("class_weight", class_weight)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise ValueError(
                f"{name} {tuple(vector.shape)} and weight {tuple(weight.shape)}: expected (V,) and (V, D), with one V"
            )
    for name, tensor in (("class_weight", class_weight), ("labels", labels)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} requires a gradient, which linear_rdrop_loss does not compute: detach it")
    if class_weight is not None:
        check_finite_weight("class_weight", class_weight)
    shapes = f"hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)}"
    inner = hidden.shape[1:-1]
    if labels.dim() == 0 or labels.shape[1:] not in (inner, (*inner, weight.shape[0])):
        raise ValueError(
            f"{shapes}: expected (m*N, ..., D) and (N, ...), or of {weight.shape[0]} probabilities (N, ..., V), equal "
            "between the first and the last"
        )
    call = "linear_rdrop_loss(model.body(repeat_batch(x)), weight, labels, ...)"
    return number_of_passes("hidden", hidden, labels, call)


def _products_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    device = hidden.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        dtype = torch.float64 if torch.float64 in (hidden.dtype, weight.dtype) else dtype
    elif hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    else:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one, or use torch.autocast")
    slow = dtype == torch.bfloat16 and device == "cpu" and not _cpu_multiplies_bfloat16()
    return torch.float32 if dtype == torch.float16 or slow else dtype


@assume_constant_result
def _cpu_multiplies_bfloat16() -> bool:
    """Whether PyTorch has such a product of its own; another takes ten times as long as float32."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _default_chunk(logits_per_position: int, dtype: torch.dtype, device: str) -> int:
    return max(1, chunk_bytes(device) // max(1, logits_per_position * dtype.itemsize))


def _checked_logits(
    passes: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, indices: bool, dtype: torch.dtype, row: Any
) -> Tensor:
    """Returns the logits of one position, `(m, V)`, or raises an error where they are why its loss is infinite."""
    rows = passes.detach()[:, *row].to(dtype)  # (m, D)
    if not rows.isfinite().all():
        raise NonfiniteLossError(
            f"hidden at example {place(row)} holds a NaN or an infinity: the model or its input already does"
        )
    with torch.autocast(passes.device.type, enabled=False):
        logits = F.linear(rows, weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype))
    check_rows(
        logits,
        torch.tensor(True),
        labels[tuple(row)].long() if indices else None,
        name="the logit of hidden",
        row=row,
        nan="weight or bias holds one, or infinities that meet",
        infinite="weight or bias holds one, or the product overflows",
    )
    return logits

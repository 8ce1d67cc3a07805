"""Measures what the loss costs from hidden states.

Each form projects N pairs of hidden states of D features to V classes, computes the loss (label smoothing 0.1, alpha 5,
no label ignored unless its name says so) and the gradients in the hidden states and the weight. Memory includes both
gradients; hidden states and weight themselves are not counted. Everything is compared with `F.linear` and eager
`F.cross_entropy` of the same 2N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rdrop import linear_rdrop_loss
from rdrop.bench import peers, rows
from rdrop.bench.measure import DTYPES, Call, Conditions, Prepare, measure, record
from rdrop.bench.records import Record
from rdrop.bench.rows import ALPHA, COMPARED_WITH, SMOOTHING, Form, compiled
from rdrop.terms import IGNORE_INDEX

SIZES = ((1024, 512, 32_768), (512, 768, 50_265), (256, 1024, 128_256))
PADDING = 0.3


class _Parameter(torch.autograd.Function):
    """The weight as an optimizer's step leaves it: without a gradient; the one it gets is dropped."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, weight: Tensor) -> Tensor:
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


class _NoLoss(torch.autograd.Function):
    """A number whose gradient in the logits is there already: the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return logits.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (logits,) = ctx.saved_tensors
        return logits  # type: ignore[no-any-return]


def forms(weight: Tensor, conditions: Conditions) -> dict[str, Form]:
    """Returns the forms by name, in the order of the tables. Each takes hidden states `(2N, D)` and labels `(N,)`."""

    def parameter() -> Tensor:
        anchor = torch.zeros((), requires_grad=True)
        return _Parameter.apply(anchor, weight)  # type: ignore[no-any-return, no-untyped-call]

    def after_linear(loss: Form, through: Callable[..., Any] = lambda whole: whole) -> Form:
        whole = through(lambda hidden, weight, labels: loss(F.linear(hidden, weight), labels))
        return lambda hidden, labels: whole(hidden, parameter(), labels)

    def products(hidden: Tensor, labels: Tensor) -> Tensor:
        """Computes the three matrix products that any form without padding needs, and nothing else."""
        return _NoLoss.apply(F.linear(hidden, parameter()))  # type: ignore[no-any-return, no-untyped-call]

    def torch_linear_cross_entropy(hidden: Tensor, labels: Tensor) -> Tensor:
        """Computes plain cross-entropy of the same rows by PyTorch, in chunks, which exclude label smoothing."""
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden, parameter(), labels.repeat(2), options=options)

    def ours(hidden: Tensor, labels: Tensor, alpha: float = ALPHA) -> Tensor:
        return linear_rdrop_loss(
            hidden,
            parameter(),
            labels,
            alpha=alpha,
            label_smoothing=SMOOTHING,
            implementation=conditions.kernel,
        ).loss

    def ours_padded(hidden: Tensor, labels: Tensor) -> Tensor:
        padding = torch.arange(len(labels), device=labels.device) % 10 < 10 * PADDING
        return ours(hidden, labels.masked_fill(padding, IGNORE_INDEX))

    table: dict[str, Form] = {
        "cross_entropy": after_linear(rows.cross_entropy),
        "cross_entropy_compiled": after_linear(rows.cross_entropy, compiled),
        "official": after_linear(rows.official),
        "tidy": after_linear(rows.tidy),
        "tidy_compiled": after_linear(rows.tidy, compiled),
        "torch_linear_cross_entropy": torch_linear_cross_entropy,
        "ours": ours,
        "ours_30_percent_padding": ours_padded,
        "ours_cross_entropy": partial(ours, alpha=0.0),
        "products": products,
    }
    if conditions.device == "cuda":
        table |= peers.from_hidden(parameter, SMOOTHING)
    if not hasattr(F, "linear_cross_entropy"):  # torch < 2.13
        del table["torch_linear_cross_entropy"]
    return conditions.chosen(table, COMPARED_WITH)


def measure_linear(pairs: int, features: int, classes: int, conditions: Conditions) -> list[Record]:
    """Returns one record for each form."""
    hidden, weight, labels = problem(pairs, features, classes, conditions)
    table = forms(weight, conditions)
    calls: dict[str, Prepare] = {name: partial(_prepare, form, hidden, labels) for name, form in table.items()}
    measured = measure(calls, conditions)
    what = "forward and backward from hidden states"
    size = {"pairs": pairs, "features": features, "classes": classes}
    return [record("linear", name, what, measured[name], conditions, **size) for name in calls]


def problem(pairs: int, features: int, classes: int, conditions: Conditions) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden states `(2N, D)`, weight `(V, D)` and labels `(N,)`."""
    device, dtype = torch.device(conditions.device), DTYPES[conditions.dtype]
    g = torch.Generator(device).manual_seed(0)
    first = torch.randn(pairs, features, generator=g, device=device)
    second = first + 0.2 * torch.randn(pairs, features, generator=g, device=device)
    weight = 3 * torch.randn(classes, features, generator=g, device=device) / features**0.5
    labels = torch.randint(0, classes, (pairs,), generator=g, device=device)
    return torch.cat([first, second]).to(dtype), weight.to(dtype), labels


def _prepare(form: Form, hidden: Tensor, labels: Tensor) -> Call:
    leaf = hidden.detach().requires_grad_()
    return lambda: form(leaf, labels).backward()  # type: ignore[no-untyped-call]

"""Measures what the loss costs from logits.

Each form computes the loss of N pairs of rows (label smoothing 0.1, alpha 5, one label in ten ignored) and its gradient
in the logits, on fresh logits each time; the logits themselves are not counted as memory. Everything is compared with
eager `F.cross_entropy` of the same 2N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rdrop import kernels, kl_from_first, rdrop_loss
from rdrop.bench import peers
from rdrop.bench.measure import DTYPES, SOFT_LABELS, Call, Conditions, Prepare, measure, record
from rdrop.bench.records import Record
from rdrop.terms import IGNORE_INDEX

SIZES = ((1024, 32_768), (512, 50_265), (256, 128_256))
COMPARED_WITH = ("cross_entropy",)
ALPHA, SMOOTHING = 5.0, 0.1

Form = Callable[[Tensor, Tensor], Tensor]
"""`(2N, V)` logits of two passes and `(N,)` labels, or `(N, V)` probabilities, to the loss."""


# ---------------------------------------------------------------------------------------------- the forms


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes plain cross-entropy of the same rows, without R-Drop: what everything else is compared with."""
    return F.cross_entropy(logits, labels.repeat(2), label_smoothing=SMOOTHING)


def official(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes the loss as it is usually written: two cross-entropies, two `kl_div` with softmax targets."""
    first, second = logits.chunk(2)
    task = sum(F.cross_entropy(rows, labels, label_smoothing=SMOOTHING) for rows in (first, second)) / 2
    valid = labels != IGNORE_INDEX
    forward = F.kl_div(F.log_softmax(first, -1), F.softmax(second, -1), reduction="none")
    backward = F.kl_div(F.log_softmax(second, -1), F.softmax(first, -1), reduction="none")
    forward, backward = (kl.masked_fill(~valid[:, None], 0.0).sum() for kl in (forward, backward))
    return task + ALPHA / 2 * (forward + backward) / 2 / valid.sum()


def tidy(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes the loss from one `log_softmax`, with `kl_div` between logarithms."""
    log_p = logits.log_softmax(-1)
    uniform = -log_p.mean(-1)
    valid = labels != IGNORE_INDEX
    targets = labels.masked_fill(~valid, 0).repeat(2)
    nll = -log_p.gather(-1, targets[:, None])[:, 0]
    task = ((1 - SMOOTHING) * nll + SMOOTHING * uniform).masked_fill(~valid.repeat(2), 0.0).sum() / 2
    p, q = log_p.chunk(2)
    kl = F.kl_div(p, q, log_target=True, reduction="none") + F.kl_div(q, p, log_target=True, reduction="none")
    return (task + ALPHA / 2 * (kl.sum(-1) / 2).masked_fill(~valid, 0.0).sum()) / valid.sum()


def simcut(logits: Tensor, labels: Tensor) -> Tensor:
    """Computes SimCut's loss as it is usually written: the first pass learns, and the second is drawn to it."""
    clean, cut = logits.chunk(2)
    task = F.cross_entropy(clean, labels, label_smoothing=SMOOTHING)
    valid = labels != IGNORE_INDEX
    kl = F.kl_div(F.log_softmax(cut, -1), F.log_softmax(clean, -1), log_target=True, reduction="none")
    return task + ALPHA / 2 * kl.masked_fill(~valid[:, None], 0.0).sum() / valid.sum()


def ours(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return rdrop_loss(logits, labels, alpha=ALPHA, label_smoothing=SMOOTHING, **options).loss


def ours_cross_entropy(logits: Tensor, labels: Tensor, *, implementation: str) -> Tensor:
    """Computes plain cross-entropy by the same kernel, in place: the floor of ours in place."""
    targets = labels.repeat(2)
    valid = targets != IGNORE_INDEX
    scale = (1 / valid.sum()).expand(len(targets))
    losses, *_ = kernels.overwriting_loss(
        logits,
        targets.masked_fill(~valid, kernels.IGNORED),
        scale,
        torch.zeros_like(scale),
        weight=None,
        label_smoothing=SMOOTHING,
        passes=1,
        implementation=implementation,
    )
    return losses.sum()


def compiled(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns the form through `torch.compile`, which takes seconds to load and is not loaded before the first call."""
    once = cache(lambda: torch.compile(form))
    return lambda *tensors: once()(*tensors)


def forms(conditions: Conditions) -> dict[str, Form]:
    """Returns the forms by name, in the order of the tables; "copy" is added by `measure_rows`."""
    kernel = conditions.kernel
    table: dict[str, Form] = {
        "cross_entropy": cross_entropy,
        "cross_entropy_compiled": compiled(cross_entropy),
        "official": official,
        "tidy": tidy,
        "tidy_compiled": compiled(tidy),
        "ours_reference": partial(ours, implementation="reference"),
        "ours": partial(ours, implementation=kernel),
        "ours_overwriting": partial(ours, implementation=kernel, overwrite_logits=True),
        "ours_cross_entropy": partial(ours_cross_entropy, implementation=kernel),
        "simcut": simcut,
        "ours_simcut": partial(ours, task_passes=(0,), divergence=kl_from_first, implementation=kernel),
    }
    table |= {f"{name}{SOFT_LABELS}": table[name] for name in ("ours", "ours_overwriting")}
    if conditions.dtype == "float16":  # refuses overwritten logits
        table = {name: form for name, form in table.items() if not name.startswith("ours_overwriting")}
    if conditions.device == "cuda":
        table |= peers.from_logits(SMOOTHING)
    return conditions.chosen(table, COMPARED_WITH)


# ---------------------------------------------------------------------------------------------- measuring


class _Model(torch.autograd.Function):
    """Stands for the model below: gives its logits, drops their gradient, costs nothing."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


def measure_rows(pairs: int, classes: int, conditions: Conditions) -> list[Record]:
    """Returns one record for each form, and one of a copy of the logits, the yardstick of bandwidth."""
    logits, labels = problem(pairs, classes, conditions)
    chosen = forms(conditions)
    mixed = _mixed(labels, classes) if any(name.endswith(SOFT_LABELS) for name in chosen) else labels
    calls: dict[str, Prepare] = {
        name: partial(_prepare, form, logits, mixed if name.endswith(SOFT_LABELS) else labels)
        for name, form in chosen.items()
    }
    copy = logits.clone()
    calls["copy"] = lambda: partial(copy.copy_, logits)
    measured = measure(calls, conditions)
    row_bytes = 2 * classes * logits.element_size()
    valid = int((labels != IGNORE_INDEX).sum())
    moved = {
        "copy": 2 * pairs * row_bytes,
        # What must be read and written once. A row that the caches do not hold is read twice.
        "ours_overwriting": (2 * valid + (pairs - valid)) * row_bytes,
        "ours_cross_entropy": (2 * valid + (pairs - valid)) * row_bytes,
    }
    return [
        record(
            "rows",
            name,
            "a copy of the logits" if name == "copy" else "forward and backward from logits",
            measured[name],
            conditions,
            pairs=pairs,
            classes=classes,
            moved_bytes=moved.get(name),
        )
        for name in calls
    ]


def problem(pairs: int, classes: int, conditions: Conditions) -> tuple[Tensor, Tensor]:
    """Returns logits `(2N, V)` whose passes differ as dropout makes them differ, and labels `(N,)`."""
    device = torch.device(conditions.device)
    g = torch.Generator(device).manual_seed(0)
    first = 3 * torch.randn(pairs, classes, generator=g, device=device)
    second = first + 0.5 * torch.randn(pairs, classes, generator=g, device=device)
    logits = torch.cat([first, second]).to(DTYPES[conditions.dtype])
    labels = torch.randint(0, classes, (pairs,), generator=g, device=device)
    labels[::10] = IGNORE_INDEX
    return logits, labels


def _mixed(labels: Tensor, classes: int) -> Tensor:
    """Returns probabilities `(N, V)` as mixup makes them: those of two examples. All count."""
    one_hot = F.one_hot(labels.clamp_min(0), classes).float()
    return 0.7 * one_hot + 0.3 * one_hot.flip(0)


def _prepare(form: Form, logits: Tensor, labels: Tensor) -> Call:
    fresh = _Model.apply(torch.zeros((), requires_grad=True), logits)  # type: ignore[no-untyped-call]
    return lambda: form(fresh, labels).backward()  # type: ignore[no-untyped-call]

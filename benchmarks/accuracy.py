"""How accurate is the loss? Random cases against float64: `python benchmarks/accuracy.py --cases 10000`.

`--implementation cpu` measures a kernel in place of the PyTorch reference, in the dtypes it has; `linear` measures
`linear_rdrop_loss`, from hidden states and a weight whose product is exactly the logits. `--divergence` is one of
`rdrop.terms.OF_SOFTMAXES`.

Each case draws a family of logits, a dtype, m, V (log-uniform, 2 to 262,144), labels, and options. The reference is the
definition, written down in float64 from the same (rounded) logits. The worst position of all counts:

* divergence: |value - reference| / reference.
* its gradient: norm of the error over all passes and classes of the position's logits, over the norm of the reference.
  Elements below the smallest normal number of the logits' dtype count as that number.
* task loss: |value - reference| / max(reference, 1): where the model is confident, a float32 cross-entropy has an
  absolute error of 1e-7, not a relative one.
* gradient of the loss: norm of the error over the norm of the reference, at least 0.01, for the same reason.

For `--divergence` other than symmetric_kl, divergences and norms below 1e-10 count as that: their definition subtracts
terms of order 1, which float64 does to 1e-16.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rdrop import detached_kl, kernels, kl_from_first, linear_rdrop_loss, rdrop_loss, symmetric_kl
from rdrop.linear_loss import linear_forward
from rdrop.terms import OF_SOFTMAXES, Divergence, LossTerms

DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "reference": (torch.float32, torch.bfloat16, torch.float16),
    "cpu": (torch.float32, torch.bfloat16),
    "linear": (torch.float32, torch.bfloat16, torch.float16),
}
ALPHA = 5.0


@dataclass(frozen=True)
class Case:
    family: str
    logits: Tensor  # (m*N, V), in the dtype under test
    labels: Tensor  # (N,), or (N, V) probabilities
    label_smoothing: float
    weight: Tensor | None
    divergence: Divergence = symmetric_kl


@dataclass
class Errors:
    """The worst of one family and dtype."""

    cases: int = 0
    divergence: float = 0.0
    divergence_gradient: float = 0.0
    task_loss: float = 0.0
    loss_gradient: float = 0.0
    negative: int = 0
    not_finite: int = 0


def _ordinary(z: Tensor, m: int, g: torch.Generator) -> Tensor:
    return 3 * torch.randn(m, *z.shape, generator=g, dtype=z.dtype)


def _nearly_equal(z: Tensor, m: int, g: torch.Generator) -> Tensor:
    delta = 10 ** -(1 + 4 * torch.rand((), generator=g, dtype=z.dtype))
    return 3 * z + delta * torch.randn(m, *z.shape, generator=g, dtype=z.dtype)


def _nearly_equal_but_the_tail(z: Tensor, m: int, g: torch.Generator) -> Tensor:
    """The likely classes agree to 1e-4; classes of probability 1e-9 and less differ by a lot."""
    tail = torch.rand(z.shape, generator=g, dtype=z.dtype) < 0.5
    noise = torch.randn(m, *z.shape, generator=g, dtype=z.dtype)
    return torch.where(tail, z - 25 + 2 * noise, z + 1e-4 * noise)


def _shifted(z: Tensor, m: int, g: torch.Generator) -> Tensor:
    """Each pass adds its own constant to all logits, which a softmax does not see."""
    constants = 20 * torch.randn(m, z.shape[0], 1, generator=g, dtype=z.dtype)
    return 3 * z + constants + 1e-2 * torch.randn(m, *z.shape, generator=g, dtype=z.dtype)


def _peaked(z: Tensor, m: int, g: torch.Generator) -> Tensor:
    lead = 5 + 20 * torch.rand(z.shape[0], 1, generator=g, dtype=z.dtype)
    top = F.one_hot(z.argmax(-1), z.shape[-1]).to(z.dtype)
    return z + lead * top + 0.5 * torch.randn(m, *z.shape, generator=g, dtype=z.dtype)


def _extreme(z: Tensor, m: int, g: torch.Generator) -> Tensor:
    return 2e4 * (torch.rand(m, *z.shape, generator=g, dtype=z.dtype) - 0.5)


def _masked(z: Tensor, m: int, g: torch.Generator) -> Tensor:
    keep = torch.rand(z.shape, generator=g, dtype=z.dtype) < 0.5
    keep[:, 0] = True
    return _ordinary(z, m, g).masked_fill(~keep, -math.inf)


FAMILIES: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "ordinary": _ordinary,
    "nearly equal": _nearly_equal,
    "nearly equal but the tail": _nearly_equal_but_the_tail,
    "shifted": _shifted,
    "peaked": _peaked,
    "logits to 1e4": _extreme,
    "half the classes -inf": _masked,
}


def random_cases(count: int, seed: int, dtypes: tuple[torch.dtype, ...]) -> Iterator[Case]:
    """Families and dtypes in turn; everything else drawn."""
    turns = itertools.cycle(itertools.product(FAMILIES, dtypes))
    for index, (family, dtype) in zip(range(count), turns, strict=False):
        g = torch.Generator().manual_seed(seed * 1_000_003 + index)
        m = int(torch.randint(2, 5, (), generator=g))
        classes = int(2 ** (1 + 17 * torch.rand((), generator=g)))
        n = max(1, min(8, 100_000 // (m * classes)))
        z = torch.randn(n, classes, generator=g, dtype=torch.float64)
        logits = FAMILIES[family](z, m, g).to(dtype)
        finite = (logits > -math.inf).all(0)
        labels = torch.multinomial(finite.double(), 1, generator=g).squeeze(-1)
        if torch.rand((), generator=g) < 0.3:
            labels[torch.rand(n, generator=g) < 0.3] = -100
        weight = torch.rand(classes, generator=g) + 0.1 if torch.rand((), generator=g) < 0.3 else None
        smoothing = 0.1 if family != "half the classes -inf" and torch.rand((), generator=g) < 0.5 else 0.0
        yield Case(family, logits.flatten(0, 1), labels, smoothing, weight)


def definition(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Task loss and divergence, `(N,)` each, as papers write them, from float64 logits; 0 at ignored positions."""
    n = len(case.labels)
    soft = case.labels.is_floating_point()
    valid = torch.ones(n, dtype=torch.bool) if soft else case.labels != -100
    weight = None if case.weight is None else case.weight.double()
    labels = torch.cat([case.labels.to(logits.dtype) if soft else case.labels] * (len(logits) // n))
    task = F.cross_entropy(
        logits,
        labels,
        weight=weight,
        label_smoothing=case.label_smoothing,
        reduction="none",
    )
    log_p = logits.log_softmax(-1).unflatten(0, (-1, n))
    support = log_p[0] > -math.inf
    # Where a class is outside every support, 0 * (-inf - -inf) is 0 by convention, and must not reach a gradient.
    log_p = log_p.where(support, 0.0)
    p = log_p.exp().where(support, 0.0)
    if case.divergence is kl_from_first:
        pairs = [_kl(p[0], p[a], log_p[a] - log_p[0]) for a in range(1, len(p))]
    elif case.divergence is detached_kl:
        target, log_target = p.detach(), log_p.detach()
        ordered = itertools.permutations(range(len(p)), 2)
        pairs = [(target[a] * (log_target[a] - log_p[b])).sum(-1) for a, b in ordered]
    else:
        both = itertools.combinations(range(len(p)), 2)
        pairs = [((p[a] - p[b]) * (log_p[a] - log_p[b])).sum(-1) / 2 for a, b in both]
    divergence = torch.stack(pairs).mean(0)
    return task.unflatten(0, (-1, n)).mean(0), divergence.masked_fill(~valid, 0.0)


def _kl(p: Tensor, q: Tensor, log_ratio: Tensor) -> Tensor:
    """Computes KL(p||q) with what sums to 0 added, q - p: of -p * log_ratio alone, a sum of 1e-10 has five digits."""
    added = torch.where(log_ratio.abs() < 1, p * log_ratio.clamp(-1, 1).expm1(), q - p)
    return (added - p * log_ratio).sum(-1)


def _relative(error: Tensor, reference: Tensor, floor: float) -> float:
    return float((error / reference.clamp_min(floor)).max())


def _norms(gradient: Tensor, positions: int) -> Tensor:
    """`(m*N, V)` to `(N,)`: the norm over the passes and classes of each position."""
    return gradient.unflatten(0, (-1, positions)).transpose(0, 1).flatten(1).norm(dim=-1)


Terms = Callable[[Tensor], tuple[LossTerms, Tensor, Tensor]]
"""Of `(m*N, V)` logits: what `rdrop_loss` returns per position; the loss of all, and the divergence alone per position
with 0 where ignored, both differentiable.
"""


def _terms_from_logits(case: Case, logits: Tensor, implementation: str) -> tuple[LossTerms, Tensor, Tensor]:
    n = len(case.labels)
    valid = case.labels != -100
    options = {"label_smoothing": case.label_smoothing, "weight": case.weight, "divergence": case.divergence}
    terms = rdrop_loss(logits, case.labels, alpha=ALPHA, implementation=implementation, reduction="none", **options)
    if implementation == "reference":
        divergences = case.divergence(logits.unflatten(0, (-1, n)).masked_fill(~valid[:, None], 0.0))
    else:
        labels = case.labels.masked_fill(~valid, kernels.IGNORED)
        options = {"weight": None, "label_smoothing": 0.0, "passes": len(logits) // n}
        options["divergence"] = kernels.DIVERGENCES[OF_SOFTMAXES.index(case.divergence)]
        divergences = kernels.row_terms(logits, labels, implementation=implementation, **options)[1]
    return terms, terms.loss.sum(), divergences


def _terms_from_hidden(case: Case, logits: Tensor) -> tuple[LossTerms, Tensor, Tensor]:
    """Row i of the hidden states picks column i of the weight, which is row i of the logits; a mask is in the bias."""
    hidden = torch.eye(len(logits), dtype=logits.dtype)
    masked = logits[0] == -math.inf
    bias = torch.zeros_like(logits[0]).masked_fill(masked, -math.inf) if masked.any() else None
    weight = logits.masked_fill(logits == -math.inf, 0.0).t()
    options = {"alpha": ALPHA, "label_smoothing": case.label_smoothing, "class_weight": case.weight}
    options["chunk_positions"] = 1 + len(logits[0]) % 4
    terms, total = (
        linear_rdrop_loss(hidden, weight, case.labels, bias, reduction=reduction, **options)
        for reduction in ("none", "sum")
    )
    labels = case.labels.masked_fill(case.labels == -100, kernels.IGNORED)
    kernel = "reference" if kernels.available()["cpu"] else "cpu"
    products = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    rows = hidden.unflatten(0, (-1, len(labels)))
    divergences = linear_forward(rows, weight, bias, labels, None, 0.0, kernel, products, 3)[1]
    return terms, total.loss, divergences


def _with_one_mask(case: Case) -> Case:
    """The mask of the first row in every row, as a bias masks."""
    masked = case.logits[0] == -math.inf
    logits = case.logits.masked_fill(case.logits == -math.inf, 0.0).masked_fill(masked, -math.inf)
    labels = case.labels.masked_fill((case.labels != -100) & masked[case.labels.clamp_min(0)], 0)
    return replace(case, logits=logits, labels=labels)


def _terms_of(case: Case, implementation: str) -> Terms:
    if implementation == "linear":
        return partial(_terms_from_hidden, case)
    return partial(_terms_from_logits, case, implementation=implementation)


def measure(case: Case, errors: Errors, implementation: str) -> None:
    if implementation == "linear":
        case = _with_one_mask(case)
    n = len(case.labels)
    logits = case.logits.clone().requires_grad_()
    terms, loss, divergences = _terms_of(case, implementation)(logits)
    (loss_gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (divergence_gradient,) = torch.autograd.grad(divergences.sum(), logits)

    exact = case.logits.double().requires_grad_()
    task, divergence = definition(case, exact)
    (exact_task_gradient,) = torch.autograd.grad(task.sum(), exact)
    (exact_divergence_gradient,) = torch.autograd.grad(divergence.sum(), exact)
    exact_loss_gradient = exact_task_gradient + ALPHA / 2 * exact_divergence_gradient

    tiny = max(torch.finfo(logits.dtype).smallest_normal, 1e-30) * math.sqrt(logits.numel() / n)
    lowest, floor = (1e-30, tiny) if case.divergence is symmetric_kl else (1e-10, max(tiny, 1e-10))
    divergence_error = (terms.divergence.double() - divergence.detach()).abs()
    task_error = (terms.task_loss.double() - task.detach()).abs()
    gradient_error = _norms(divergence_gradient.double() - exact_divergence_gradient, n)
    loss_gradient_error = _norms(loss_gradient.double() - exact_loss_gradient, n)
    for name, figure in (
        ("divergence", _relative(divergence_error, divergence.detach(), lowest)),
        ("divergence_gradient", _relative(gradient_error, _norms(exact_divergence_gradient, n), floor)),
        ("task_loss", _relative(task_error, task.detach(), 1.0)),
        ("loss_gradient", _relative(loss_gradient_error, _norms(exact_loss_gradient, n), 1e-2)),
    ):
        setattr(errors, name, max(getattr(errors, name), figure))
    errors.cases += 1
    errors.negative += int((terms.divergence < 0).any())
    errors.not_finite += int(not (terms.loss.isfinite().all() and loss_gradient.isfinite().all()))


def run(
    count: int, seed: int = 0, implementation: str = "reference", divergence: Divergence = symmetric_kl
) -> dict[tuple[str, torch.dtype], Errors]:
    dtypes = DTYPES[implementation]
    table = {key: Errors() for key in itertools.product(FAMILIES, dtypes)}
    for case in random_cases(count, seed, dtypes):
        measure(replace(case, divergence=divergence), table[case.family, case.logits.dtype], implementation)
    return table


COLUMNS = (
    "logits",
    "dtype",
    "cases",
    "divergence",
    "its gradient",
    "task loss",
    "loss gradient",
    "negative",
    "not finite",
)


def rows_of(table: dict[tuple[str, torch.dtype], Errors]) -> list[dict[str, str]]:
    """As they stand in docs/accuracy.md and in the record."""
    rows = []
    for (family, dtype), e in table.items():
        figures = (f"{figure:.1e}" for figure in (e.divergence, e.divergence_gradient, e.task_loss, e.loss_gradient))
        cells = (family, str(dtype).removeprefix("torch."), e.cases, *figures, e.negative, e.not_finite)
        rows.append(dict(zip(COLUMNS, map(str, cells), strict=True)))
    return rows


def markdown_table(rows: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    return "\n".join(lines + [f"| {' | '.join(row[column] for column in COLUMNS)} |" for row in rows])


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cases", type=int, default=1000)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--implementation", choices=DTYPES, default="reference")
    arguments.add_argument("--divergence", choices=kernels.DIVERGENCES, default="symmetric_kl")
    arguments.add_argument("--record", type=Path, help="where to write the figures as JSON")
    options = arguments.parse_args()
    divergence = OF_SOFTMAXES[kernels.DIVERGENCES.index(options.divergence)]
    if options.implementation == "linear" and divergence is not symmetric_kl:
        arguments.error("linear_rdrop_loss has symmetric_kl alone")
    rows = rows_of(run(options.cases, options.seed, options.implementation, divergence))
    print(markdown_table(rows))
    record = {
        "command": f"python benchmarks/accuracy.py --cases {options.cases} --seed {options.seed} "
        f"--implementation {options.implementation} --divergence {options.divergence}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, CPU",
        "torch": torch.__version__,
        "cases": options.cases,
        "rows": rows,
    }
    if options.record:
        options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

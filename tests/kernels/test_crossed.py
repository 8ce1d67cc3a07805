"""Every option of the loss with every other, by every implementation, on even, ragged and very ragged rows.

Rule: the error against float64 is at most that of the PyTorch reference on the same logits, and a rounding.
"""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from benchmarks.accuracy import Case, definition
from torch import Tensor

from rdrop import kernels, linear_rdrop_loss, rdrop_loss

IGNORED, ALPHA = -100, 5.0
EVEN, RAGGED, VERY_RAGGED = (4, 64), (5, 37), (7, 131)  # N, V
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}


@dataclass(frozen=True)
class Options:
    m: int
    label_smoothing: float
    weighted: bool
    masked: bool  # a third of the classes at -inf
    ignored: bool  # an example, and what stands there is NaN
    reduction: str
    num_items: int | None = None


def every_combination() -> list[Options]:
    """Label smoothing gives probability to a masked class, which makes the loss infinite: not together."""
    flags = (False, True)
    crossed = itertools.product((2, 3), (0.0, 0.1), flags, flags, flags, ("mean", "sum", "none"))
    options = [Options(*each) for each in crossed if not (each[1] and each[3])]
    return options + [replace(o, num_items=11) for o in options if o.reduction == "mean"]


def case_of(n: int, v: int, options: Options, dtype: torch.dtype) -> Case:
    g = torch.Generator().manual_seed(n * v + options.m)
    rows = 3 * torch.randn(n, v, generator=g)
    logits = rows + 0.5 * torch.randn(options.m, n, v, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    if options.masked:
        logits[..., 1::3] = -math.inf
        labels = labels // 3 * 3
    if options.ignored:
        labels[1] = IGNORED
        logits[:, 1] = math.nan
    weight = torch.rand(v, generator=g) + 0.1 if options.weighted else None
    return Case("", logits.flatten(0, 1).to(dtype), labels, options.label_smoothing, weight)


def reduced(task: Tensor, divergence: Tensor, case: Case, options: Options) -> Tensor:
    """The definition of the loss from its terms per position."""
    if options.reduction == "none":
        return task + ALPHA / 2 * divergence
    valid = case.labels != IGNORED
    count = 1 if options.reduction == "sum" else options.num_items or valid.sum()
    weights = count
    if case.weight is not None and options.reduction == "mean" and options.num_items is None:
        weights = case.weight.double()[case.labels[valid]].sum()
    return task.sum() / weights + ALPHA / 2 * divergence.sum() / count


def scale_of(options: Options, n: int) -> Tensor:
    return torch.linspace(-1, 2, n) if options.reduction == "none" else torch.tensor(1.7)


def in_float64(case: Case, options: Options) -> list[Tensor]:
    n = len(case.labels)
    exact = case.logits.double().nan_to_num(0.0, neginf=-math.inf).requires_grad_()
    loss = reduced(*definition(case, exact), case, options)
    (gradient,) = torch.autograd.grad((loss * scale_of(options, n).double()).sum(), exact)
    return [loss.detach(), gradient]


def computed(case: Case, options: Options, implementation: str, *, overwrite: bool = False) -> list[Tensor]:
    leaf = case.logits.clone().requires_grad_()
    loss = rdrop_loss(
        leaf * 1,
        case.labels,
        alpha=ALPHA,
        label_smoothing=case.label_smoothing,
        weight=case.weight,
        reduction=options.reduction,
        num_items=options.num_items,
        implementation=implementation,
        overwrite_logits=overwrite,
    ).loss
    (gradient,) = torch.autograd.grad((loss * scale_of(options, len(case.labels))).sum(), leaf)
    return [loss.detach(), gradient]


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm().clamp_min(0.1)) for a, b in zip(found, exact, strict=True)]


def assert_no_worse_than_the_reference(shape: tuple[int, int], options: Options, dtype: torch.dtype, name: str) -> None:
    case = case_of(*shape, options, dtype)
    exact = in_float64(case, options)
    allowed = errors(computed(case, options, "reference"), exact)
    for overwrite in (False, True) if dtype != torch.float16 else (False,):
        found = computed(case, options, name, overwrite=overwrite)
        for error, of_reference in zip(errors(found, exact), allowed, strict=True):
            # Of an upstream gradient that a reduction brings late, the overwritten gradient is rounded twice.
            twice = 4 if overwrite and dtype != torch.float32 else 1
            assert error <= of_reference + twice * TOLERANCE[dtype], (options, overwrite, error, of_reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [EVEN, RAGGED, VERY_RAGGED], ids=["even", "ragged", "very ragged"])
def test_the_cpu_kernel_with_every_combination_of_options(shape, dtype):
    if reason := kernels.available()["cpu"]:
        pytest.skip(reason)
    for options in every_combination():
        assert_no_worse_than_the_reference(shape, options, dtype, "cpu")


def a_few_combinations() -> list[Options]:
    """Every eleventh: in an interpreter all of them take minutes."""
    return every_combination()[::11]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "chosen", [a_few_combinations, pytest.param(every_combination, marks=pytest.mark.long)], ids=["few", "every"]
)
def test_the_triton_kernel_with_combinations_of_options(chosen, dtype):
    if reason := kernels.available()["triton"]:
        pytest.skip(reason)
    shapes = itertools.cycle((EVEN, RAGGED, VERY_RAGGED))
    for options, shape in zip(chosen(), shapes, strict=False):
        assert_no_worse_than_the_reference(shape, options, dtype, "triton")


@pytest.mark.parametrize("implementation", ["cpu", "triton"])
def test_nothing_depends_on_what_fresh_memory_holds(implementation):
    """Statistics, terms and gradients of every mode are written before they are read, ignored positions included."""
    if reason := kernels.available()[implementation]:
        pytest.skip(reason)
    chosen = [o for o in a_few_combinations() if o.ignored]
    assert chosen
    for options, overwrite in itertools.product(chosen, (False, True)):
        case = case_of(*RAGGED, options, torch.float32)
        plain = computed(case, options, implementation, overwrite=overwrite)
        torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
        try:
            filled = computed(case, options, implementation, overwrite=overwrite)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(plain, filled, strict=True)), (options, overwrite)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_nothing_of_linear_rdrop_loss_depends_on_what_fresh_memory_holds(implementation, reduction):
    if reason := kernels.available().get(implementation):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=g) for shape in ((10, 13), (37, 13), (37,)))
    labels = torch.tensor([3, IGNORED, 36, 0, 5])

    def gradients() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        options = {"alpha": ALPHA, "reduction": reduction, "implementation": implementation, "chunk_positions": 3}
        loss = linear_rdrop_loss(leaves[0], leaves[1], labels, leaves[2], **options).loss
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    plain = gradients()
    torch.use_deterministic_algorithms(True)
    try:
        filled = gradients()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, filled, strict=True))
    expected = rdrop_loss(F.linear(hidden, weight, bias), labels, alpha=ALPHA, reduction=reduction).loss
    torch.testing.assert_close(plain[0], expected, rtol=1e-5, atol=1e-5)

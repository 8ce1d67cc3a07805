"""Accuracy of the loss against float64, for each implementation by one rule.

The full table is `python benchmarks/accuracy.py --cases 10000`.
"""

import pytest
import torch
from benchmarks.accuracy import DTYPES, FAMILIES, Case, Errors, definition, measure, run
from tests.outcomes import in_parts

from rdrop import detached_kl, kernels, kl_from_first, symmetric_kl

# In float16, rounding the exact gradient takes up to 2^-11 of an entry, or of the smallest normal number where the
# entry is below it: a row with entries of both kinds can be off by the root of 2 times as much.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 2**-11 * 2**0.5}
# For logits of 1e4: log-ratios of that size are weighed in float32, which keeps this much of the gradient.
EXTREME, EXTREME_IN_KERNELS = 5e-5, 2e-3


def assert_accurate(implementation: str, family: str, dtype: torch.dtype, errors: Errors) -> None:
    assert errors.cases > 0
    assert errors.negative == 0
    assert errors.not_finite == 0
    assert errors.divergence <= 1e-5
    assert errors.task_loss <= 1e-5
    limit = ROUNDING[dtype]
    if family == "logits to 1e4":
        limit = max(limit, EXTREME if implementation == "reference" else EXTREME_IN_KERNELS)
    assert errors.divergence_gradient <= limit
    assert errors.loss_gradient <= limit


@pytest.mark.parametrize("implementation", DTYPES)
@pytest.mark.parametrize(("count", "seed"), [(525, 0), *in_parts(10_500)])
def test_random_cases_against_float64(implementation, count, seed, record_property):
    if reason := kernels.available().get(implementation):
        pytest.skip(reason)
    table = run(count, seed, implementation)
    record_property("cases", sum(errors.cases for errors in table.values()))
    assert len(table) == len(DTYPES[implementation]) * len(FAMILIES)
    for (family, dtype), errors in table.items():
        assert_accurate(implementation, family, dtype, errors)


@pytest.mark.parametrize("divergence", [detached_kl, kl_from_first])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize(("count", "seed"), [(210, 0), *in_parts(2_100)])
def test_the_other_divergences_of_softmaxes_are_as_exact(implementation, divergence, count, seed, record_property):
    if reason := kernels.available().get(implementation):
        pytest.skip(reason)
    table = run(count, seed, implementation, divergence)
    record_property("cases", sum(errors.cases for errors in table.values()))
    for (family, dtype), errors in table.items():
        assert_accurate(implementation, family, dtype, errors)


@pytest.mark.parametrize("divergence", [symmetric_kl, detached_kl, kl_from_first])
@pytest.mark.parametrize(
    "passes",
    [
        [[-5000.7, 100.1, 4000.3], [4000.4, -3000.9, 3961.7]],  # certain of two classes
        [[4000.0, 3977.0, 3910.0], [4000.0, 3905.0, 3975.0]],  # certain of one, and the others leave little
    ],
)
def test_passes_that_are_certain_of_a_class_lose_no_digits(divergence, passes):
    logits = torch.tensor(passes)[:, None].requires_grad_()
    exact = logits.detach().double().requires_grad_()
    value = divergence(logits)
    labels = torch.zeros(1, dtype=torch.long)
    wanted = definition(Case("certain", exact, labels, 0.0, None, divergence), exact.flatten(0, 1))[1]
    torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=0)
    (gradient,), (wanted_gradient,) = (
        torch.autograd.grad(own.sum(), of) for own, of in ((value, logits), (wanted, exact))
    )
    assert (gradient - wanted_gradient).norm() <= 1e-6 * wanted_gradient.norm()


@pytest.mark.parametrize("divergence", [symmetric_kl, detached_kl, kl_from_first])
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("gap", [20.0, 59.0, 61.0, 90.0])  # exp(90) is beyond float32
def test_an_unlikely_class_that_one_pass_rules_out_costs_no_digits(implementation, divergence, gap):
    if reason := kernels.available().get(implementation):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 30_000, generator=g) + 1e-4 * torch.randn(2, 3, 30_000, generator=g)
    logits[0, :, -1] -= gap
    case = Case("ruled out", logits.flatten(0, 1), torch.zeros(3, dtype=torch.long), 0.0, None, divergence)
    errors = Errors()
    measure(case, errors, implementation)
    assert errors.divergence <= 2e-6
    assert errors.divergence_gradient <= 2e-6

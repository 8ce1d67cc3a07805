"""What only the Triton kernel has: blocks smaller than a row, sums that move from class to class, float16.

Its promises are held by tests/kernels/test_rows.py, with every other implementation's.
"""

import itertools
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from benchmarks.accuracy import FAMILIES, Case, Errors, measure, random_cases
from tests.kernels.test_rows import (
    assert_no_worse_than_the_reference,
    in_float64,
    is_near,
    random_case,
    terms_and_gradient,
)
from tests.outcomes import in_parts
from tests.test_accuracy import assert_accurate

from rdrop import detached_kl, kernels, kl_from_first, symmetric_kl
from rdrop.kernels import triton
from rdrop.terms import OF_SOFTMAXES

pytestmark = pytest.mark.skipif(triton.why_not() is not None, reason=str(triton.why_not()))


@pytest.fixture
def small_blocks(monkeypatch):
    """32 classes at a time."""
    monkeypatch.setattr(triton, "DEFAULT_SHAPE", triton.DEFAULT_SHAPE._replace(max_block=32))


@pytest.mark.parametrize("dtype", triton.DTYPES)
@pytest.mark.parametrize("classes", [2, 32, 33, 101])
def test_error_is_the_references_for_even_and_ragged_rows(small_blocks, classes, dtype):
    cases = itertools.product((2, 3), ((0.0, False), (0.1, False), (0.1, True)))
    for m, (smoothing, weighted) in cases:
        case = random_case(3, classes, m, smoothing=smoothing, weighted=weighted, dtype=dtype, seed=classes)
        assert_no_worse_than_the_reference(case, "triton")


@pytest.mark.parametrize("dtype", triton.DTYPES)
@pytest.mark.parametrize("classes", [32, 101])
def test_soft_labels_are_as_exact_as_class_indices(small_blocks, classes, dtype):
    for m, (smoothing, weighted) in ((2, (0.0, False)), (3, (0.1, True))):
        case = random_case(3, classes, m, smoothing=smoothing, weighted=weighted, dtype=dtype, seed=classes, soft=True)
        assert_no_worse_than_the_reference(case, "triton")


def test_passes_may_be_more_than_2_to_the_31_logits_apart():
    """The memory between them is never touched, and so never taken."""
    apart = torch.empty(2 * 2**30 + 32, dtype=torch.bfloat16).as_strided((3, 32), (2**30, 1))
    logits = apart.copy_(torch.randn(3, 32)).clone(memory_format=torch.contiguous_format)
    options = {"weight": None, "label_smoothing": 0.1, "passes": 3, "implementation": "triton"}
    found, expected = (kernels.row_terms(passes, torch.tensor([3]), **options) for passes in (apart, logits))
    assert found == expected


def test_error_is_the_references_for_a_vocabulary_and_for_many_passes():
    assert_no_worse_than_the_reference(random_case(1, 50_265, smoothing=0.1, dtype=torch.bfloat16), "triton")
    assert_no_worse_than_the_reference(random_case(1, 3000, 5, smoothing=0.1, weighted=True), "triton")


def first_position(case: Case) -> Case:
    rows = case.logits.unflatten(0, (-1, len(case.labels)))[:, 0]
    return Case(case.family, rows, case.labels[:1], case.label_smoothing, case.weight)


@pytest.mark.parametrize(("count", "seed"), [(84, 1), *in_parts(10_500)])
def test_random_cases_against_float64(count, seed, record_property):
    """The smaller of them, and one position of each: the interpreter is slow."""
    _assert_accurate(symmetric_kl, count, seed, record_property)


@pytest.mark.parametrize("divergence", [detached_kl, kl_from_first])
@pytest.mark.parametrize(("count", "seed"), [(84, 1), *in_parts(1_050)])
def test_random_cases_of_the_other_divergences(divergence, count, seed, record_property):
    _assert_accurate(divergence, count, seed, record_property)


def _assert_accurate(divergence, count, seed, record_property):
    table = {key: Errors() for key in itertools.product(FAMILIES, triton.DTYPES)}
    for case in random_cases(count, seed, triton.DTYPES):
        if case.logits.shape[-1] <= 4096:
            measure(
                replace(first_position(case), divergence=divergence), table[case.family, case.logits.dtype], "triton"
            )
    record_property("cases", sum(errors.cases for errors in table.values()))
    for (family, dtype), errors in table.items():
        assert_accurate("triton", family, dtype, errors)


@pytest.mark.parametrize("divergence", OF_SOFTMAXES)
@pytest.mark.parametrize("order", ["rising", "falling", "masked first"])
def test_the_order_of_the_classes_costs_no_digits(small_blocks, order, divergence):
    # Rising: every block brings a likelier class, and all sums move to it. Masked first: no class to begin from.
    g = torch.Generator().manual_seed(0)
    first = (3 * torch.randn(1, 200, generator=g)).sort(descending=order == "falling").values
    rows = first + 1e-3 * torch.randn(3, 1, 200, generator=g) + torch.tensor([0.0, 7.0, -40.0])[:, None, None]
    if order == "masked first":
        rows[..., :70] = -math.inf
    case = Case("", rows.flatten(0, 1), torch.tensor([150]), 0.0, None, divergence)
    _, value, gradient = terms_and_gradient(case, implementation="triton")
    _, exact_value, exact_gradient = in_float64(case)
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-6)
    assert is_near(case, "triton").all()


WHY_NOT = """
from rdrop.kernels import available
print(available()["triton"])
"""


def test_without_a_gpu_and_without_the_interpreter_it_says_what_is_missing():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", WHY_NOT]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "there is no CUDA device; on a CPU it runs, slowly, with TRITON_INTERPRET=1" in said


def test_without_the_package_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    assert triton.why_not.__wrapped__() == "the package triton is not installed: pip install triton"


def test_asking_for_it_with_logits_on_a_device_it_does_not_have_says_why(monkeypatch):
    monkeypatch.setattr(triton, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match="implementation='triton' cannot compute this loss: the logits are on cpu"):
        terms_and_gradient(random_case(), implementation="triton")

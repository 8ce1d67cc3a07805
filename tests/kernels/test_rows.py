"""The kernels of `rdrop_loss` by one suite: every implementation keeps every promise of the reference.

Random logits of every family, 1,000 of them, are in tests/test_accuracy.py.
"""

import itertools
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.accuracy import Case, definition, run
from tests.test_accuracy import assert_accurate
from torch import Tensor
from torch.library import opcheck

from rdrop import detached_kl, kernels, kl_from_first, rdrop_loss, symmetric_kl
from rdrop.kernels import cpu, operators
from rdrop.terms import OF_SOFTMAXES

IGNORED = -100
KERNELS = ("cpu", "triton")


@pytest.fixture(params=KERNELS)
def kernel(request):
    if reason := kernels.available()[request.param]:
        pytest.skip(reason)
    return request.param


def random_case(
    n=6, classes=40, m=2, *, smoothing=0.0, weighted=False, dtype=torch.float32, seed=0, soft=False
) -> Case:
    """With `soft`, labels are probabilities: of two classes each, as mixup makes them, and of all for the last."""
    g = torch.Generator().manual_seed(seed)
    rows = 3 * torch.randn(n, classes, generator=g)
    logits = (rows + 0.5 * torch.randn(m, n, classes, generator=g)).flatten(0, 1).to(dtype)
    labels = torch.randint(0, classes, (n,), generator=g)
    if n > 2:
        labels[1] = IGNORED
    weight = torch.rand(classes, generator=g) + 0.1 if weighted else None
    if soft:
        labels = mixed(labels.clamp_min(0), classes)
        labels[-1] = torch.randn(classes, generator=g).softmax(-1)
    return Case("ordinary", logits, labels, smoothing, weight)


def mixed(labels: Tensor, classes: int) -> Tensor:
    one_hot = torch.nn.functional.one_hot(labels, classes).float()
    return 0.7 * one_hot + 0.3 * one_hot.roll(1, 0)


def loss_of(case: Case, logits: Tensor, **options):
    options = {"label_smoothing": case.label_smoothing, "weight": case.weight, "divergence": case.divergence} | options
    return rdrop_loss(logits, **{"labels": case.labels, "alpha": 5.0} | options)


def terms_and_gradient(case: Case, **options) -> tuple[Tensor, Tensor, Tensor]:
    logits = case.logits.clone().requires_grad_()
    terms = loss_of(case, logits, reduction="none", **options)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logits)
    return terms.task_loss, terms.divergence, gradient


def in_float64(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    exact = case.logits.double().requires_grad_()
    task, divergence = definition(case, exact)
    (gradient,) = torch.autograd.grad((task + 2.5 * divergence).sum(), exact)
    return task.detach(), divergence.detach(), gradient


def errors_of(terms, exact) -> list[float]:
    """Of task loss, divergence and gradient, each relative to its largest entry, at least 0.1."""
    return [
        float((a.double() - b).abs().max() / b.abs().max().clamp_min(0.1)) for a, b in zip(terms, exact, strict=True)
    ]


def is_near(case: Case, kernel: str) -> Tensor:
    """Whether each position was computed by a path in float32."""
    labels = case.labels.masked_fill(case.labels == IGNORED, kernels.IGNORED)[:, None]
    passes = len(case.logits) // len(labels)
    name = kernels.DIVERGENCES[OF_SOFTMAXES.index(case.divergence)]
    statistics = operators.rows_forward(case.logits[:, None], labels, None, 0.0, passes, name, kernel)[2]
    return statistics[:, 0, 0] < (2 if kernel == "cpu" else 1)


# ------------------------------------------------------------------------------------------------ accuracy


def assert_no_worse_than_the_reference(case: Case, kernel: str) -> None:
    exact = in_float64(case)
    ours, reference = (errors_of(terms_and_gradient(case, implementation=i), exact) for i in (kernel, "reference"))
    tolerances = (1e-6, 1e-6, 1e-6 if case.logits.dtype == torch.float32 else 1e-4)
    for error, reference_error, tolerance in zip(ours, reference, tolerances, strict=True):
        assert error <= reference_error + tolerance


@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)  # the others: tests/kernels/test_triton.py
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 64, 255, 257, 1000, 4096])
def test_error_is_the_references_for_every_number_of_classes(kernel, classes, dtype):
    for m, smoothing, weighted in itertools.product((2, 3, 5), (0.0, 0.1), (False, True)):
        case = random_case(4, classes, m, smoothing=smoothing, weighted=weighted, dtype=dtype, seed=classes)
        assert_no_worse_than_the_reference(case, kernel)


@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)  # the others: tests/kernels/test_triton.py
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("classes", [50_265, 128_257])
def test_error_is_the_references_for_vocabularies(kernel, classes, dtype):
    for m, weighted in ((2, False), (3, True)):
        case = random_case(2, classes, m, smoothing=0.1, weighted=weighted, dtype=dtype)
        assert_no_worse_than_the_reference(case, kernel)


@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)  # the others: tests/kernels/test_triton.py
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("classes", [2, 3, 16, 33, 257, 4099])
def test_soft_labels_are_as_exact_as_class_indices(kernel, classes, dtype):
    for m, (smoothing, weighted) in itertools.product((2, 3), ((0.0, False), (0.1, False), (0.0, True), (0.1, True))):
        case = random_case(4, classes, m, smoothing=smoothing, weighted=weighted, dtype=dtype, seed=classes, soft=True)
        assert_no_worse_than_the_reference(case, kernel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", [detached_kl, kl_from_first])
def test_the_other_divergences_with_every_option_of_the_cross_entropy(kernel, divergence, dtype):
    shapes = ((2, 2), (17, 3)) if kernel == "triton" else itertools.product((2, 3, 16, 17, 257), (2, 3, 5))
    for (classes, m), soft in itertools.product(shapes, (False, True)):
        case = random_case(4, classes, m, smoothing=0.1, weighted=True, dtype=dtype, seed=classes, soft=soft)
        assert_no_worse_than_the_reference(replace(case, divergence=divergence), kernel)


@pytest.mark.parametrize("divergence", [detached_kl, kl_from_first])
def test_the_other_divergences_in_the_memory_of_the_logits(kernel, divergence):
    case = replace(random_case(6, 33, 3, smoothing=0.1), divergence=divergence)
    leaf = case.logits.requires_grad_()
    results = []
    for options in ({"overwrite_logits": True}, {}, {"implementation": "reference"}):
        loss = loss_of(case, leaf * 1, **{"implementation": kernel} | options).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task_passes", [(0,), (1, 2), ()], ids=["SimCut", "two of three", "unlabeled"])
@pytest.mark.parametrize("divergence", [symmetric_kl, detached_kl, kl_from_first])
def test_any_divergence_where_some_passes_learn(kernel, divergence, task_passes):
    case = replace(random_case(6, 33, 3), divergence=divergence)
    leaf = case.logits.requires_grad_()
    results = []
    for implementation in (kernel, "reference"):
        terms = loss_of(case, leaf, implementation=implementation, task_passes=task_passes)
        results.append((*(term.detach() for term in terms), *torch.autograd.grad(terms.loss, leaf)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("divergence", [detached_kl, kl_from_first])
@pytest.mark.parametrize("offset", [0.0, 1e3, 60.0], ids=["near", "with an offset", "far"])
@pytest.mark.parametrize("masked", [False, True])
def test_the_other_divergences_agree_with_float64_on_every_path(kernel, divergence, offset, masked):
    case = random_case(4, 40, 3)
    logits, labels = case.logits.unflatten(0, (3, 4)).clone(), case.labels
    logits[1] += offset if offset != 60 else 60 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    if masked:
        logits[..., ::3] = -math.inf
        labels = labels.where(labels % 3 != 0, 1)
    case = replace(case, logits=logits.flatten(0, 1), labels=labels, divergence=divergence)
    assert is_near(case, kernel)[2:].all() == (offset != 60)
    found, exact = terms_and_gradient(case, implementation=kernel), in_float64(case)
    assert all(error < 1e-5 for error in errors_of(found, exact)), errors_of(found, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "weighted": True}], ids=["plain", "smoothed and weighted"])
def test_probabilities_of_one_class_are_its_index(kernel, dtype, options):
    case = random_case(5, 37, 3, dtype=dtype, **options)
    case = replace(case, labels=case.labels.clamp_min(0))
    soft = replace(case, labels=torch.nn.functional.one_hot(case.labels, 37).to(dtype))
    options = {"implementation": kernel}
    for found, expected in zip(terms_and_gradient(soft, **options), terms_and_gradient(case, **options), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("offset", [0.0, 1e3, 60.0])
@pytest.mark.parametrize("masked", [False, True])
def test_soft_labels_agree_with_float64_on_every_path(kernel, offset, masked):
    case = random_case(4, 40, 2, soft=True)
    logits, labels = case.logits.unflatten(0, (2, 4)).clone(), case.labels.clone()
    logits[1] += offset if offset != 60 else 60 * torch.randn(40, generator=torch.Generator().manual_seed(3))
    if masked:  # classes of probability 0 add nothing
        logits[..., ::3] = -math.inf
        labels[:, ::3] = 0.0
        labels[:, 1] += 1 - labels.sum(-1)
    case = replace(case, logits=logits.flatten(0, 1), labels=labels)
    finite = replace(case, logits=logits.flatten(0, 1).clamp_min(-1e9))  # F.cross_entropy makes NaN of 0 * -inf
    task, divergence, gradient = in_float64(finite if masked else case)
    assert max(errors_of(terms_and_gradient(case, implementation=kernel), (task, divergence, gradient))) < 2e-6


def test_probability_of_a_masked_class_is_explained(kernel):
    case = random_case(4, 40, soft=True)
    logits = case.logits.masked_fill(torch.arange(40) == 3, -math.inf)
    with pytest.raises(
        ValueError,
        match=r"logit at example 3, class 3 is -inf, and soft labels or label smoothing give its class probability",
    ):
        loss_of(case, logits, implementation=kernel)


@pytest.mark.parametrize("row", [[2.0, 0.0, 0.0], [-0.5, 1.0, 0.5], [math.nan, 0.5, 0.5], [0.9, 0.0, 0.0]])
@pytest.mark.parametrize("overwrite", [False, True])
def test_rows_that_are_no_probabilities_are_named(kernel, row, overwrite):
    labels, logits = torch.tensor([[0.2, 0.3, 0.5], row]), torch.randn(4, 3, requires_grad=True) * 1
    with pytest.raises(ValueError, match=r"labels? .*at example 1.*probabilit"):
        rdrop_loss(logits, labels, alpha=1.0, implementation=kernel, overwrite_logits=overwrite)
    with pytest.raises(ValueError, match=r"labels \(2, 3\) of torch.int64 have as many dimensions as the logits"):
        rdrop_loss(logits, labels.long(), alpha=1.0, implementation=kernel)


@pytest.mark.parametrize("instructions", cpu.INSTRUCTIONS)
def test_every_instruction_set_is_accurate(instructions, monkeypatch):
    if reason := kernels.available()["cpu"]:
        pytest.skip(reason)
    if instructions not in cpu.instruction_sets():
        pytest.skip(f"this processor has no {instructions}")
    monkeypatch.setenv("RDROP_CPU_INSTRUCTIONS", instructions)
    for divergence in OF_SOFTMAXES:
        for (family, dtype), errors in run(140, seed=1, implementation="cpu", divergence=divergence).items():
            assert_accurate("cpu", family, dtype, errors)
    for classes in (2, 3, 15, 17, 1000):
        assert_no_worse_than_the_reference(random_case(4, classes, 3, smoothing=0.1, weighted=True), "cpu")
        for dtype in cpu.DTYPES:
            soft = random_case(4, classes, smoothing=0.1, weighted=True, dtype=dtype, soft=True)
            assert_no_worse_than_the_reference(soft, "cpu")


def test_an_instruction_set_the_processor_lacks_is_refused(monkeypatch):
    if reason := kernels.available()["cpu"]:
        pytest.skip(reason)
    monkeypatch.setenv("RDROP_CPU_INSTRUCTIONS", "abacus")
    with pytest.raises(ValueError, match=r"RDROP_CPU_INSTRUCTIONS \(='abacus'\) must be one of \('plain'"):
        terms_and_gradient(random_case(), implementation="cpu")


@pytest.mark.parametrize("offset", [0.0, 30.0, 3e4])
@pytest.mark.parametrize("disagreement", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("masked", [False, True])
def test_every_path_agrees_with_float64(kernel, offset, disagreement, masked):
    # Offsets need the compensated path, large disagreements and logits of 3e4 the float64 one.
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 100, generator=g) + disagreement * torch.randn(2, 3, 100, generator=g)
    rows[1] += offset
    if masked:
        rows[..., 7:50] = -math.inf
    case = Case("", rows.flatten(0, 1), torch.tensor([0, 1, 99]), 0.0, None)
    task, divergence, gradient = terms_and_gradient(case, implementation=kernel)
    exact_task, exact_divergence, exact_gradient = in_float64(case)
    torch.testing.assert_close(task.double(), exact_task, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(divergence.double(), exact_divergence, rtol=3e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize("divergence", OF_SOFTMAXES)
@pytest.mark.parametrize("top", [5.0, 4.5])
def test_a_likeliest_class_that_is_an_outlier_costs_no_digits(kernel, divergence, top):
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(1, 1000, generator=g) + 1e-3 * torch.randn(2, 1, 1000, generator=g)
    rows[:, :, 0] = torch.tensor([[top], [top + 0.5]])  # the likeliest, by far from most of the probability
    case = Case("", rows.flatten(0, 1), torch.tensor([3]), 0.0, None, divergence)
    assert top == 5.0 or not is_near(case, kernel).any()
    _, value, gradient = terms_and_gradient(case, implementation=kernel)
    _, exact, exact_gradient = in_float64(case)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", OF_SOFTMAXES)
def test_a_class_on_the_border_of_an_outlier_costs_no_digits(kernel, divergence):
    shifts = torch.linspace(0.02, 1.2, 40 if kernel == "triton" else 1000)
    for classes, sign in itertools.product((3, 10, 17, 20), (1, -1)):
        rows = torch.zeros(2, len(shifts), classes)
        rows[:, :, 0] = 1e-3
        rows[1, :, 1:] += sign * shifts[:, None]
        labels = torch.zeros(len(shifts), dtype=torch.long)
        case = Case("", rows.flatten(0, 1), labels, 0.0, None, divergence)
        value = terms_and_gradient(case, implementation=kernel)[1]
        torch.testing.assert_close(value.double(), divergence(rows.double()), rtol=1e-5, atol=0)


@pytest.mark.parametrize("divergence", OF_SOFTMAXES)
def test_classes_that_gain_a_factor_of_e_to_the_39_do_not_overflow(kernel, divergence):
    rows = torch.zeros(2, 1, 600)
    rows[1:, :, 1:] = 39.0
    case = Case("", rows.flatten(0, 1), torch.tensor([5]), 0.0, None, divergence)
    value = terms_and_gradient(case, implementation=kernel)[1]
    torch.testing.assert_close(value.double(), in_float64(case)[1], rtol=1e-5, atol=0)


def test_bfloat16_logits_of_which_some_are_100_000_times_smaller_cost_no_digits(kernel):
    g = torch.Generator().manual_seed(0)
    small, large = 2**-16 * torch.rand(50, 3, generator=g), torch.full((50, 3), 0.75)
    large[torch.arange(50), torch.randint(3, (50,), generator=g)] += 2**-8  # large - small has more than 24 bits
    case = Case("", torch.cat([small, large]).bfloat16(), torch.zeros(50, dtype=torch.long), 0.0, None)
    divergence = terms_and_gradient(case, implementation=kernel)[1]
    torch.testing.assert_close(divergence.double(), in_float64(case)[1], rtol=1e-6, atol=0)


def test_the_labels_entry_of_a_bfloat16_gradient_is_rounded_once(kernel):
    case = random_case(64, 50, dtype=torch.bfloat16)
    valid = (case.labels != IGNORED).repeat(2)
    entries = torch.arange(len(case.logits))[valid], case.labels.repeat(2)[valid]
    gradient = terms_and_gradient(case, implementation=kernel)[2][entries]
    nearest = in_float64(case)[2][entries].to(torch.bfloat16)
    assert (gradient == nearest).double().mean() > 0.98  # the rest are ties but for a float32 rounding


def test_bfloat16_gradients_keep_their_digits_where_the_passes_nearly_agree(kernel):
    rows = 3 * torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    logits = torch.cat([rows, rows]).bfloat16()
    logits[:4, ::10] = torch.nextafter(logits[:4, ::10], torch.tensor(math.inf, dtype=torch.bfloat16))
    leaf = logits.clone().requires_grad_()
    labels = torch.arange(4)
    options = {"weight": None, "label_smoothing": 0.0, "passes": 2, "implementation": kernel}
    (gradient,) = torch.autograd.grad(kernels.row_terms(leaf, labels, **options)[1].sum(), leaf)
    exact = logits.double().requires_grad_()
    divergence = definition(Case("", logits, labels, 0.0, None), exact)[1]
    (exact_gradient,) = torch.autograd.grad(divergence.sum(), exact)
    assert (gradient.double() - exact_gradient).norm() <= 3e-3 * exact_gradient.norm()


# ------------------------------------------------------------------------------------------------ promises


@pytest.mark.parametrize("kernel", ["cpu"], indirect=True)
def test_the_number_of_threads_changes_no_bit(kernel):
    case = random_case(48, 5000, smoothing=0.1)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(terms_and_gradient(case, implementation=kernel))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_cpu_kernel_takes_as_many_threads_as_torch(threads, monkeypatch):
    if reason := kernels.available()["cpu"]:
        pytest.skip(reason)
    given = []
    rows_of = cpu._library().rdrop_rows
    library = SimpleNamespace(rdrop_rows=lambda rows: given.append(rows._obj.threads) or rows_of(rows))
    monkeypatch.setattr(cpu, "_library", lambda: library)
    monkeypatch.setattr(cpu, "instructions", lambda: "plain")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        terms_and_gradient(random_case(), implementation="cpu")
    finally:
        torch.set_num_threads(before)
    assert given == [threads, threads]  # forward and backward


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads there")
@pytest.mark.parametrize("threads", [1, 3])
def test_as_many_threads_run_as_torch_was_given(threads):
    if reason := kernels.available()["cpu"]:
        pytest.skip(reason)
    logits, labels = torch.randn(200, 1, 20_000), torch.zeros(100, 1, dtype=torch.long)
    started, done = {0}, threading.Event()  # how many threads beside those of before were seen at one moment

    def watch() -> None:
        known.update(os.listdir("/proc/self/task"))
        while not done.is_set():
            started.add(len(set(os.listdir("/proc/self/task")) - known))

    known: set[str] = set()
    watcher, before = threading.Thread(target=watch), torch.get_num_threads()
    torch.set_num_threads(threads)
    watcher.start()
    end = time.monotonic() + 100
    try:
        while not known:
            time.sleep(0.001)
        for call in itertools.count(1):  # a watcher that has to wait for a core needs many calls to see one
            operators.rows_forward(logits, labels, None, 0.0, 2, "symmetric_kl", "cpu")
            if call >= 20 and (max(started) >= threads - 1 or time.monotonic() > end):
                break
    finally:
        done.set()
        watcher.join()
        torch.set_num_threads(before)
    assert max(started) == threads - 1


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_identical_passes_have_exactly_the_plain_gradient(kernel, dtype):
    case = random_case(5, 77, dtype=dtype)
    logits = case.logits[:5].repeat(2, 1)
    case = Case("", logits, case.labels, 0.1, None)
    _, divergence, with_alpha = terms_and_gradient(case, implementation=kernel)
    assert not divergence.any()
    assert torch.equal(with_alpha, terms_and_gradient(case, implementation=kernel, alpha=0.0)[2])


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf])
def test_ignored_rows_are_never_read_and_get_zero_gradient(kernel, content, overwrite):
    case = random_case(6, 33)
    expected = terms_and_gradient(case, implementation=kernel)[2]
    case.logits.view(2, 6, 33)[:, 1] = content
    leaf = case.logits.clone().requires_grad_()
    terms = loss_of(case, leaf * 1, reduction="sum", implementation=kernel, overwrite_logits=overwrite)
    (gradient,) = torch.autograd.grad(terms.loss, leaf)
    assert torch.equal(gradient, expected)


def test_rows_of_a_larger_tensor_are_taken_as_they_lie(kernel):
    # The shift of a causal language model: (m*N, T - 1, V) inside (m*N, T, V) has two strides, and is no copy.
    whole = torch.randn(4, 6, 33, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.randint(0, 33, (2, 5), generator=torch.Generator().manual_seed(1))
    gradients = []
    for rows in (whole[:, :-1], whole[:, :-1].contiguous(), whole[:, :-1].mT.contiguous().mT):
        loss = rdrop_loss(rows, labels, alpha=5.0, implementation=kernel).loss
        gradients.append(torch.autograd.grad(loss, whole)[0])
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])
    assert not gradients[0][:, -1].any()


def test_forward_keeps_nothing_of_the_logits_size_but_the_logits(kernel):
    case, kept = random_case(8, 4096), []
    logits = case.logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss_of(case, logits, implementation=kernel)
    large = [t for t in kept if t.numel() >= 4096]
    assert large
    assert {t.data_ptr() for t in large} == {logits.data_ptr()}


@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_shapes_and_reductions_are_the_references(kernel, positions, reduction):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(8, *positions, 9, generator=g).requires_grad_()
    labels = torch.randint(0, 9, (4, *positions), generator=g)
    labels[1] = IGNORED
    results = []
    for implementation in (kernel, "reference"):
        terms = rdrop_loss(logits, labels, alpha=5.0, reduction=reduction, implementation=implementation)
        (gradient,) = torch.autograd.grad(terms.loss.sum(), logits)
        results.append((*(t.detach() for t in terms), gradient))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ignore_index", [-100, 0, -1])
def test_any_ignore_index(kernel, ignore_index):
    case = random_case(6, 9)
    labels = case.labels.masked_fill(case.labels == IGNORED, ignore_index)
    ours, reference = (
        rdrop_loss(case.logits, labels, alpha=1.0, ignore_index=ignore_index, implementation=i).loss
        for i in (kernel, "reference")
    )
    torch.testing.assert_close(ours, reference)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "logit at example 2, class 4 is NaN"),
        (math.inf, r"logit at example 2, class 4 is \+inf"),
        (-math.inf, "logit at example 2, class 4 is -inf in some passes only"),
    ],
)
@pytest.mark.parametrize("in_pass", [0, 1])
@pytest.mark.parametrize("divergence", OF_SOFTMAXES)
def test_a_logit_that_makes_the_loss_infinite_is_named(kernel, value, message, in_pass, overwrite, divergence):
    case = replace(random_case(6, 9), divergence=divergence)
    logits = case.logits.clone()
    logits[6 * in_pass + 2, 4] = value
    with pytest.raises(ValueError, match=message):
        loss_of(case, logits.requires_grad_() * 1, implementation=kernel, overwrite_logits=overwrite)


@pytest.mark.parametrize("in_pass", [0, 1])
@pytest.mark.parametrize("divergence", OF_SOFTMAXES)
def test_a_nan_where_the_other_pass_is_masked_is_named(kernel, in_pass, divergence):
    case = replace(random_case(2, 9), divergence=divergence)
    logits = case.logits.clone()
    logits[[0, 2], 4] = torch.tensor([-math.inf, -math.inf])
    logits[2 * in_pass, 4] = math.nan
    labels = case.labels.where(case.labels != 4, 3)
    with pytest.raises(ValueError, match="logit at example 0, class 4 is NaN"):
        loss_of(case, logits, labels=labels, implementation=kernel)


@pytest.mark.parametrize("label", [9, -7])
def test_a_label_no_check_has_seen_gives_nan_and_reads_nothing_outside(kernel, label):
    labels = torch.tensor([[0], [label]])
    logits = torch.randn(4, 1, 9)
    task, _, statistics = operators.rows_forward(logits, labels, None, 0.0, 2, "symmetric_kl", kernel)
    assert task.isnan().flatten().tolist() == [False, True]
    ones = torch.ones(2, 1)
    gradient = operators.rows_backward(logits, labels, None, 0.0, 2, "symmetric_kl", kernel, statistics, ones, ones)
    assert gradient[1::2].isnan().all()
    assert gradient[::2].isfinite().all()


def test_one_pass_is_cross_entropy(kernel):
    case = random_case(6, 33, 1, smoothing=0.1, weighted=True)
    labels = case.labels.masked_fill(case.labels == IGNORED, kernels.IGNORED)
    logits = case.logits.clone().requires_grad_()
    task, divergence = kernels.row_terms(
        logits, labels, weight=case.weight, label_smoothing=0.1, passes=1, implementation=kernel
    )
    assert not divergence.any()
    expected = torch.nn.functional.cross_entropy(
        logits, case.labels, weight=case.weight, label_smoothing=0.1, reduction="none"
    )
    torch.testing.assert_close(task, expected)
    ours, torchs = (torch.autograd.grad(values.sum(), logits)[0] for values in (task, expected))
    torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------ overwriting


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [0.0, 5.0])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("m", [2, 3])
def test_overwriting_gives_the_same_loss_and_gradient(kernel, reduction, alpha, dtype, m):
    case = random_case(6, 33, m, smoothing=0.1, weighted=True, dtype=dtype)
    upstream = torch.linspace(0.5, 2, 6) if reduction == "none" else torch.tensor(3.0)
    results = []
    for overwrite in (False, True):
        leaf = case.logits.clone().requires_grad_()
        options = {"alpha": alpha, "reduction": reduction, "implementation": kernel, "overwrite_logits": overwrite}
        terms = loss_of(case, leaf * 1, **options)
        (gradient,) = torch.autograd.grad(terms.loss, leaf, upstream)
        results.append((*(t.detach() for t in terms), gradient))
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(results[1], results[0], **tolerance)


def test_overwriting_returns_the_logits_own_memory_as_their_gradient(kernel):
    case = random_case(6, 33)
    leaf = case.logits.clone().requires_grad_()
    logits = leaf * 1
    seen = []
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    address = logits.data_ptr()
    loss_of(case, logits, implementation=kernel, overwrite_logits=True).loss.backward()
    assert seen in ([address], [])  # a hook from before belongs to the logits as they were
    assert torch.equal(leaf.grad, logits.detach())


def test_a_loss_that_is_not_finite_leaves_no_logits_in_the_place_of_its_gradient(kernel):
    """Of values that are not read before the kernel, as on a GPU: probabilities that do not sum to 1."""
    leaf = torch.randn(4, 4, requires_grad=True)
    soft = torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.25, 0.25, 0.25, 0.25]])
    options = {"weight": None, "label_smoothing": 0.0, "passes": 2, "implementation": kernel}
    losses, *_ = kernels.overwriting_loss(leaf * 1.0, soft, torch.ones(2), torch.ones(2), **options)
    assert losses.isfinite().tolist() == [False, True]
    losses.sum().backward()
    assert leaf.grad.isfinite().all(1).tolist() == [False, True, False, True]


def test_overwriting_leaves_the_logits_where_no_gradient_is_wanted(kernel):
    case = random_case(6, 33)
    logits = case.logits.clone()
    loss_of(case, logits, implementation=kernel, overwrite_logits=True)
    with torch.no_grad():
        loss_of(case, logits.requires_grad_() * 1, implementation=kernel, overwrite_logits=True)
    assert torch.equal(logits, case.logits)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda z: z, "are a leaf"),
        (lambda z: (z * 1)[:, 1:], "are a view"),
        (lambda z: (z * 1).view(12, 33), "are a view"),
        (lambda z: torch.empty_strided((12, 33), (1, 12)).copy_(z), "are not contiguous"),
        (lambda z: z.half(), "are float16"),  # which a loss scale of backward comes too late for
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_logits_that_cannot_be_overwritten_are_refused(wrong, message, implementation):
    logits = wrong(random_case(6, 33).logits.requires_grad_())
    with pytest.raises(ValueError, match=f"overwrite_logits=True: the logits {message}.* Give others"):
        rdrop_loss(logits, torch.zeros(6).long(), alpha=1.0, implementation=implementation, overwrite_logits=True)


def test_an_operation_that_kept_the_overwritten_logits_is_an_error(kernel):
    case = random_case(6, 33)
    logits = case.logits.requires_grad_().tanh()  # its backward needs what it returned
    loss = loss_of(case, logits, implementation=kernel, overwrite_logits=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_another_loss_of_the_overwritten_logits_is_an_error_before_and_after(kernel):
    case = random_case(6, 33)
    logits = case.logits.requires_grad_() * 1
    before = logits.square().mean()
    loss = loss_of(case, logits, implementation=kernel, overwrite_logits=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + before).backward()

    logits = case.logits * 1
    loss = loss_of(case, logits, implementation=kernel, overwrite_logits=True).loss
    with pytest.raises(RuntimeError, match="were used in another differentiable computation"):
        (loss + logits.square().mean()).backward()


def test_overwriting_twice_is_an_error(kernel):
    case = random_case(6, 33)
    logits = case.logits.requires_grad_() * 1
    first = loss_of(case, logits, implementation=kernel, overwrite_logits=True).loss
    loss_of(case, logits, implementation=kernel, overwrite_logits=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


def test_a_second_backward_through_overwritten_logits_is_an_error(kernel):
    case = random_case(6, 33)
    loss = loss_of(case, case.logits.requires_grad_() * 1, implementation=kernel, overwrite_logits=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="handed out by an earlier backward"):
        loss.backward()


# ------------------------------------------------------------------------------------------------ a torch operator


def operator_arguments(kernel: str, *, requires_grad: bool, divergence: str = "symmetric_kl") -> tuple:
    logits = torch.randn(4, 3, 9, generator=torch.Generator().manual_seed(0), requires_grad=requires_grad)
    labels = torch.tensor([[0, kernels.IGNORED, 2], [3, 4, 8]])
    return logits, labels, torch.linspace(0.5, 2, 9), 0.1, 2, divergence, kernel


@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_every_output_is_written_ignored_positions_too(kernel, divergence):
    arguments = operator_arguments(kernel, requires_grad=False, divergence=divergence)
    torch.use_deterministic_algorithms(True)  # memory that nobody has written to is NaN
    try:
        task, value, statistics = operators.rows_forward(*arguments)
    finally:
        torch.use_deterministic_algorithms(False)
    assert task.isfinite().all()
    assert value.isfinite().all()
    assert statistics.isfinite().all()
    assert (statistics[0, 1] == 0).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, from inside opcheck
@pytest.mark.parametrize("divergence", kernels.DIVERGENCES)
def test_operators_pass_torchs_own_check(kernel, divergence):
    ones = torch.ones(2, 3)
    opcheck(operators.rows_forward, operator_arguments(kernel, requires_grad=True, divergence=divergence))
    arguments = operator_arguments(kernel, requires_grad=False, divergence=divergence)
    statistics = operators.rows_forward(*arguments)[2]
    opcheck(operators.rows_backward, (*arguments, statistics, ones, ones))
    opcheck(operators.rows_forward_backward_, (*arguments, ones, ones))
    soft = (arguments[0].requires_grad_(), torch.full((2, 3, 9), 1 / 9), *arguments[2:])
    opcheck(operators.rows_forward, soft)


def test_operators_of_meta_tensors_have_shapes_and_compute_nothing(kernel):
    logits, labels, weight, *options = operator_arguments(kernel, requires_grad=False)
    expected = operators.rows_forward(logits, labels, weight, *options)
    logits, labels, weight = (tensor.to("meta") for tensor in (logits, labels, weight))
    outputs = operators.rows_forward(logits, labels, weight, *options)
    assert [(t.shape, t.dtype, t.device.type) for t in outputs] == [(t.shape, t.dtype, "meta") for t in expected]
    ones = torch.ones(2, 3, device="meta")
    gradient = operators.rows_backward(logits, labels, weight, *options, outputs[2], ones, ones)
    assert (gradient.shape, gradient.dtype, gradient.is_meta) == (logits.shape, logits.dtype, True)


def test_a_loss_of_meta_tensors_is_computed_by_the_reference_without_values():
    logits = torch.randn(4, 3, 9, device="meta", requires_grad=True)
    loss = rdrop_loss(logits, torch.zeros(2, 3, dtype=torch.long, device="meta"), alpha=5.0).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.is_meta
    assert gradient.shape == logits.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_gpu_is_never_waited_for(overwrite):
    case = random_case(6, 33)
    logits, labels = case.logits.cuda().requires_grad_(), case.labels.cuda()
    options = {"alpha": 5.0, "implementation": "triton", "overwrite_logits": overwrite}
    rdrop_loss(logits * 1, labels, **options).loss.backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        rdrop_loss(logits * 1, labels, **options).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, from inside torch
@pytest.mark.parametrize("divergence", [symmetric_kl, kl_from_first])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("overwrite", [False, True])
def test_compiled_in_one_graph_equals_eager(kernel, dynamic, overwrite, divergence):
    def loss(z: Tensor, y: Tensor) -> Tensor:
        options = {"implementation": kernel, "overwrite_logits": overwrite, "divergence": divergence}
        return rdrop_loss(z * 1, y, alpha=5.0, label_smoothing=0.1, **options).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for n in (4, 6):
        case = random_case(n, 33)
        logits = case.logits.requires_grad_()
        results = []
        for function in (compiled, loss):
            value = function(logits, case.labels)
            results.append((value.detach(), *torch.autograd.grad(value, logits)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("divergence", [symmetric_kl, kl_from_first])
@pytest.mark.parametrize("overwrite", [False, True])
def test_differentiating_twice_is_refused(kernel, overwrite, divergence):
    case = random_case()
    logits = case.logits.requires_grad_()
    options = {"implementation": kernel, "overwrite_logits": overwrite, "divergence": divergence}
    loss = loss_of(case, logits * 1, **options).loss
    with pytest.raises(RuntimeError, match=f"{divergence.__name__} can be differentiated once only"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_autocast_changes_nothing(kernel):
    case = random_case()
    with torch.autocast("cpu", torch.bfloat16):
        inside = loss_of(case, case.logits, implementation=kernel)
    assert inside == loss_of(case, case.logits, implementation=kernel)


# ------------------------------------------------------------------------------------------------ which one runs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"implementation": "gpu"}, r"implementation \(='gpu'\) must be 'auto', 'reference', 'cpu' or 'triton'"),
        ({"implementation": "cpu", "divergence": lambda z: z.var(0).sum(-1)}, "nothing else"),
        ({"implementation": "cpu", "weight": torch.ones(40, requires_grad=True)}, "no gradient in the class weights"),
        ({"implementation": "cpu", "labels": torch.full((6, 40), 1 / 40, requires_grad=True)}, "or in the labels"),
    ],
)
def test_asking_for_what_cannot_run_says_why(options, message):
    case = random_case()
    with pytest.raises(ValueError, match=message):
        loss_of(case, case.logits, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z.double(), r"the logits are torch.float64; it computes float32(,| and) bfloat16"),
        (lambda z: z.to("meta"), "the logits are on meta"),
        (lambda z: z.repeat(33, 1), r"66 passes are more than its (32|8)"),
    ],
)
def test_asking_for_logits_a_kernel_does_not_have_says_why(kernel, change, message):
    case = random_case()
    with pytest.raises(ValueError, match=message):
        rdrop_loss(change(case.logits), case.labels.to(change(case.logits).device), alpha=1.0, implementation=kernel)


def test_auto_is_the_kernel_where_it_can_run_and_the_reference_elsewhere(kernel, monkeypatch):
    calls = []
    monkeypatch.setattr(cpu, "launch", lambda *a, real=cpu.launch, **more: calls.append(1) or real(*a, **more))
    case = random_case()
    for logits, expected in ((case.logits, 1), (case.logits.bfloat16(), 1), (case.logits.double(), 0)):
        calls.clear()
        loss_of(case, logits)
        assert len(calls) == expected


def test_without_the_library_the_reference_runs_and_one_line_says_so(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "rows.so")
    caches = (cpu.why_not, operators._warn_once)
    for cache in caches:
        cache.cache_clear()
    try:
        case = random_case()
        with caplog.at_level(logging.WARNING, logger="rdrop"):
            values = [loss_of(case, case.logits) for _ in range(2)]
        assert values[0] == values[1] == loss_of(case, case.logits, implementation="reference")
        assert len(caplog.records) == 1
        assert "rows.so was not built" in caplog.text
        with pytest.raises(ValueError, match=r"implementation='cpu' cannot compute this loss: rows.so was not built"):
            loss_of(case, case.logits, implementation="cpu")
    finally:
        for cache in caches:
            cache.cache_clear()


def test_a_library_of_another_version_is_not_called_and_the_log_says_how_to_get_this_one(monkeypatch, caplog):
    if reason := kernels.available()["cpu"]:
        pytest.skip(reason)
    version = cpu._VERSION
    monkeypatch.setattr(cpu, "_VERSION", version + 1)
    caches = (cpu.why_not, operators._warn_once)
    for cache in caches:
        cache.cache_clear()
    try:
        case = random_case(soft=True)
        with caplog.at_level(logging.WARNING, logger="rdrop"):
            value = loss_of(case, case.logits)
        assert value == loss_of(case, case.logits, implementation="reference")
        assert f"rows.so has version {version}, this code needs {version + 1}: install again" in caplog.text
    finally:
        for cache in caches:
            cache.cache_clear()


def build(folder: Path, **environment: str) -> Path:
    root = Path(__file__).parents[2]
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", folder / "lib", "--build-temp", folder / "temp"]
    subprocess.run(command, cwd=root, env=os.environ | environment, check=True, capture_output=True)
    return folder / "lib" / "rdrop" / "kernels" / "rows.so"


def test_without_a_compiler_the_build_succeeds_without_the_library(tmp_path):
    assert not build(tmp_path, CC="/bin/false", CXX="/bin/false").exists()


@pytest.mark.long
def test_with_a_compiler_the_build_makes_the_library(tmp_path):
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    assert build(tmp_path).exists()


@pytest.mark.long
@pytest.mark.parametrize("compiler", [True, False])
def test_the_wheel_of_a_clean_copy_has_the_library_where_there_is_a_compiler(tmp_path, compiler):
    if compiler and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    root, copy = Path(__file__).parents[2], tmp_path / "copy"
    leave = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    shutil.copytree(root / "src", copy / "src", ignore=leave)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(root / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", tmp_path, copy]
    environment = os.environ | ({} if compiler else {"CC": "/bin/false", "CXX": "/bin/false"})
    subprocess.run(command, env=environment, check=True, capture_output=True)
    [wheel] = tmp_path.glob("*.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert ("rdrop/kernels/rows.so" in files) == compiler
    assert "rdrop/bench/suite.py" in files
    assert "-py3-none-" in wheel.name  # one for every version of Python

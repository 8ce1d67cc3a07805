"""`linear_rdrop_loss` is `rdrop_loss` of `F.linear`, promise by promise, by every implementation."""

import itertools
import re
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import opcheck

import rdrop
from rdrop import LossTerms, bernoulli_kl, binary_cross_entropy, kernels, linear_rdrop_loss, rdrop_loss
from rdrop import linear_loss as linear
from rdrop.kernels import cpu
from rdrop.kernels.constants import assume_constant_result

IGNORED = -100
IMPLEMENTATIONS = ("reference", "cpu", pytest.param("triton", marks=pytest.mark.long))  # slow in its interpreter
EVEN, RAGGED, VERY_RAGGED = (4, 16, 64), (5, 13, 37), (7, 3, 131)  # N, D, V


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    if request.param != "reference" and (reason := kernels.available()[request.param]):
        pytest.skip(reason)
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return request.param


@dataclass(frozen=True)
class Problem:
    hidden: Tensor  # (m*N, ..., D)
    weight: Tensor  # (V, D)
    labels: Tensor  # (N, ...)
    bias: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Problem":
        bias = None if self.bias is None else self.bias.to(dtype)
        return Problem(self.hidden.to(dtype), self.weight.to(dtype), self.labels, bias)

    def leaves(self) -> "Problem":
        hidden, weight, bias = (
            None if tensor is None else tensor.detach().clone().requires_grad_()
            for tensor in (self.hidden, self.weight, self.bias)
        )
        return Problem(hidden, weight, self.labels, bias)

    def parameters(self) -> list[Tensor]:
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]


def problem(n=5, d=13, v=37, m=2, *, positions=(), bias=True, ignored=True, dtype=torch.float32, seed=0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, *positions, d, generator=g) + 0.3 * torch.randn(m, n, *positions, d, generator=g)
    labels = torch.randint(0, v, (n, *positions), generator=g)
    if ignored:
        labels[1] = IGNORED
    weight = 2 * torch.randn(v, d, generator=g) / d**0.5
    shift = torch.randn(v, generator=g) if bias else None
    return Problem(hidden.flatten(0, 1), weight, labels, shift).to(dtype)


def fused(p: Problem, **options) -> LossTerms:
    return linear_rdrop_loss(p.hidden, p.weight, p.labels, p.bias, **{"alpha": 5.0} | options)


def unfused(p: Problem, *, class_weight=None, implementation="reference", chunk_positions=None, **options) -> LossTerms:
    logits = F.linear(p.hidden, p.weight, p.bias)
    options = {"alpha": 5.0, "weight": class_weight, "implementation": implementation} | options
    return rdrop_loss(logits, p.labels, **options)


def terms_and_gradients(loss, p: Problem, upstream: Tensor | float = 1.0, **options) -> list[Tensor]:
    p = p.leaves()
    terms = loss(p, **options)
    gradients = torch.autograd.grad((terms.loss * upstream).sum(), p.parameters())
    return [*(term.detach() for term in terms), *gradients]


def relative_errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm() / b.norm().clamp_min(0.1)) for a, b in zip(found, exact, strict=True)]


# ------------------------------------------------------------------------------------------------ the definition


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [EVEN, RAGGED, VERY_RAGGED], ids=["even", "ragged", "very ragged"])
@pytest.mark.parametrize("m", [2, 3])
def test_no_worse_than_rdrop_loss_of_the_linear_layer(implementation, dtype, shape, m):
    n, d, v = shape
    class_weight = torch.linspace(0.5, 2, v)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3 if dtype == torch.bfloat16 else 5e-4
    upstream = torch.linspace(-1, 2, n)
    for smoothing, weighted, bias, reduction in itertools.product(
        (0.0, 0.1), (False, True), (False, True), ("mean", "sum", "none")
    ):
        p = problem(n, d, v, m, bias=bias, dtype=dtype)
        options = {
            "label_smoothing": smoothing,
            "class_weight": class_weight if weighted else None,
            "reduction": reduction,
        }
        scale = upstream if reduction == "none" else 1.7
        exact = terms_and_gradients(unfused, p.to(torch.float64), scale, **options)
        allowed = relative_errors(terms_and_gradients(unfused, p, scale, **options), exact)
        options["implementation"] = implementation
        for chunk in (1, 3, n + 1, None):
            ours = terms_and_gradients(fused, p, scale, chunk_positions=chunk, **options)
            errors = relative_errors(ours, exact)
            for error, of_reference in zip(errors, allowed, strict=True):
                assert error <= of_reference + tolerance, (options, bias, chunk, errors, allowed)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
def test_exact_in_float64_for_any_number_of_position_dimensions(reduction, positions):
    p = problem(m=3, positions=positions, dtype=torch.float64)
    options = {"label_smoothing": 0.1, "reduction": reduction}
    ours = terms_and_gradients(fused, p, 0.3, chunk_positions=2, **options)
    for found, expected in zip(ours, terms_and_gradients(unfused, p, 0.3, **options), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_soft_labels_are_no_worse_than_those_of_rdrop_loss(implementation, dtype, reduction):
    for m, smoothing, class_weight in ((2, 0.0, None), (3, 0.1, torch.linspace(0.5, 2, 37))):
        p = problem(4, 13, 37, m, positions=(2,), dtype=dtype)
        p = replace(p, labels=torch.randn(4, 2, 37, generator=torch.Generator().manual_seed(1)).softmax(-1))
        options = {"label_smoothing": smoothing, "class_weight": class_weight, "reduction": reduction}
        exact = terms_and_gradients(unfused, p.to(torch.float64), 1.7, **options)
        allowed = relative_errors(terms_and_gradients(unfused, p, 1.7, **options), exact)
        for chunk in (3, None):
            options |= {"implementation": implementation, "chunk_positions": chunk}
            errors = relative_errors(terms_and_gradients(fused, p, 1.7, **options), exact)
            for error, of_reference in zip(errors, allowed, strict=True):
                assert error <= of_reference + (2e-6 if dtype == torch.float32 else 4e-3), (m, chunk, errors, allowed)


def test_gradcheck_in_float64():
    p = problem(3, 4, 6, 3, dtype=torch.float64).leaves()

    def loss(*parameters: Tensor) -> Tensor:
        hidden, weight, bias = parameters
        return fused(Problem(hidden, weight, p.labels, bias), reduction="none", label_smoothing=0.1).loss

    assert torch.autograd.gradcheck(loss, p.parameters())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_triton_computes_what_the_reference_does(reduction):
    if reason := kernels.available()["triton"]:
        pytest.skip(reason)
    p = problem(3, 4, 37)
    ours, expected = (
        terms_and_gradients(fused, p, 0.3, implementation=i, reduction=reduction, chunk_positions=2)
        for i in ("triton", "reference")
    )
    torch.testing.assert_close(ours, expected)


def test_alpha_zero_is_plain_linear_cross_entropy(implementation):
    p = problem().leaves()
    terms = fused(p, alpha=0.0, implementation=implementation)
    expected = F.cross_entropy(F.linear(p.hidden, p.weight, p.bias), p.labels.repeat(2))
    torch.testing.assert_close(terms.loss, expected)
    ours, plain = (torch.autograd.grad(loss, p.parameters()) for loss in (terms.loss, expected))
    torch.testing.assert_close(ours, plain)
    assert terms.divergence > 0


@pytest.mark.parametrize("num_items", [11, torch.tensor(11)])
def test_num_items_divides_both_terms(implementation, num_items):
    p = problem()
    ours = terms_and_gradients(fused, p, num_items=num_items, implementation=implementation)
    torch.testing.assert_close(ours, terms_and_gradients(unfused, p, num_items=num_items), rtol=1e-5, atol=1e-6)


def test_only_the_loss_carries_gradient():
    for reduction in ("mean", "none"):
        loss, task_loss, divergence = fused(problem().leaves(), reduction=reduction)
        assert loss.requires_grad
        assert not task_loss.requires_grad
        assert not divergence.requires_grad


def test_chunks_change_nothing_but_rounding(implementation):
    p = problem(40, 16, 50)
    whole, single = (
        terms_and_gradients(fused, p, chunk_positions=chunk, implementation=implementation) for chunk in (40, 1)
    )
    torch.testing.assert_close(whole, single, rtol=1e-5, atol=1e-6)


def test_many_chunks_do_not_wear_out_a_bfloat16_weight_gradient(implementation):
    p = problem(400, 8, 10, ignored=False, dtype=torch.bfloat16)
    exact = terms_and_gradients(unfused, p.to(torch.float64))
    ours = terms_and_gradients(fused, p, chunk_positions=1, implementation=implementation)
    assert ours[4].dtype == torch.bfloat16
    assert relative_errors(ours, exact)[4] < 4e-3  # one rounding; added up in bfloat16 it would be ten times that


# ------------------------------------------------------------------------------------------------ memory


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("gradient", [True, False])
def test_no_allocation_is_larger_than_a_chunk_or_the_weight(implementation, reduction, gradient):
    n, d, v, chunk = 128, 4, 512, 8
    p = problem(n, d, v)
    p = p.leaves() if gradient else p
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        terms = fused(p, chunk_positions=chunk, reduction=reduction, implementation=implementation)
        if gradient:
            terms.loss.sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    chunk_bytes = 2 * chunk * v * 4
    assert chunk_bytes <= largest <= 2 * chunk_bytes  # float64 statistics, the reference's temporaries
    assert largest <= 2 * n * v * 4 / 8  # the logits


def test_the_chunk_follows_from_its_bytes():
    assert linear._default_chunk(2 * 32_768, torch.float32, "cpu") == (64 << 20) // (2 * 32_768 * 4)
    assert linear._default_chunk(2 * 32_768, torch.bfloat16, "cuda") == (256 << 20) // (2 * 32_768 * 2)
    assert linear._default_chunk(1 << 40, torch.float32, "cpu") == 1


def test_what_is_frozen_gets_no_gradient_and_costs_none(implementation):
    full = terms_and_gradients(fused, problem(), implementation=implementation)[3:]
    for frozen in itertools.product([False, True], repeat=3):
        p = problem().leaves()
        for parameter, is_frozen in zip(p.parameters(), frozen, strict=True):
            parameter.requires_grad_(not is_frozen)
        terms = fused(p, implementation=implementation)
        if all(frozen):
            assert not terms.loss.requires_grad
            continue
        terms.loss.backward()
        for parameter, is_frozen, gradient in zip(p.parameters(), frozen, full, strict=True):
            assert parameter.grad is None if is_frozen else torch.equal(parameter.grad, gradient)
    *_, of_hidden, of_weight, of_bias = linear.linear_forward_backward(*operator_arguments(wanted=(False, True, False)))
    assert (of_hidden.numel(), of_weight.shape, of_bias.numel()) == (0, (7, 4), 0)


def test_without_gradient_only_the_values_are_computed(implementation, monkeypatch):
    expected = fused(problem().leaves(), implementation=implementation)
    monkeypatch.setattr(linear, "linear_forward_backward", None)
    torch.testing.assert_close(
        fused(problem(), implementation=implementation), LossTerms(*(t.detach() for t in expected))
    )
    with torch.no_grad():
        fused(problem().leaves(), implementation=implementation)


# ------------------------------------------------------------------------------------------------ who shares what


def test_a_tied_embedding_gets_both_gradients(implementation):
    embedding = torch.nn.Embedding(37, 13)
    tokens, labels = torch.randint(0, 37, (10, 3)), problem(positions=(3,)).labels
    gradients = []
    for loss in (fused, unfused):
        embedding.weight.grad = None
        p = Problem(embedding(tokens).tanh(), embedding.weight, labels)
        loss(p, implementation=implementation).loss.backward()
        gradients.append(embedding.weight.grad)
    torch.testing.assert_close(*gradients)


def test_inputs_need_not_be_contiguous(implementation):
    p = problem(positions=(3,))
    hidden = p.hidden.movedim(-1, 0).contiguous().movedim(0, -1)  # as of a convolution
    weight, bias = p.weight.t().contiguous().t(), torch.stack([p.bias, p.bias], 1)[:, 0]
    labels = p.labels.t().contiguous().t()
    assert not any(tensor.is_contiguous() for tensor in (hidden, weight, bias, labels))
    strided = [tensor.requires_grad_() for tensor in (hidden, weight, bias)]
    terms = linear_rdrop_loss(hidden, weight, labels, bias, alpha=5.0, implementation=implementation)
    expected = terms_and_gradients(fused, p, implementation=implementation)
    torch.testing.assert_close([*terms, *torch.autograd.grad(terms.loss, strided)], expected)


def test_gradients_accumulate_over_micro_batches(implementation):
    p = problem(6, ignored=False)
    halves = p.leaves()
    for half in (slice(0, 3), slice(3, 6)):
        part = replace(halves, hidden=halves.hidden.unflatten(0, (2, 6))[:, half].flatten(0, 1), labels=p.labels[half])
        fused(part, num_items=6, implementation=implementation).loss.backward()
    expected = terms_and_gradients(fused, p, implementation=implementation)[3:]
    torch.testing.assert_close([parameter.grad for parameter in halves.parameters()], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden_dtype", [torch.float32, "autocast"])
def test_autocast_is_no_worse_than_autocast_of_the_linear_layer(implementation, dtype, hidden_dtype):
    p = problem(8, 16, 40)
    p = replace(p, hidden=p.hidden.to(dtype if hidden_dtype == "autocast" else hidden_dtype))
    exact = terms_and_gradients(unfused, p.to(torch.float64))
    with torch.autocast("cpu", dtype=dtype):
        reference = terms_and_gradients(unfused, p)
        ours = terms_and_gradients(fused, p, chunk_positions=3, implementation=implementation)
        values = fused(p, chunk_positions=3, implementation=implementation)
    torch.testing.assert_close(list(values), ours[:3])
    assert [gradient.dtype for gradient in ours[3:]] == [p.hidden.dtype, torch.float32, torch.float32]
    for error, of_reference in zip(relative_errors(ours, exact), relative_errors(reference, exact), strict=True):
        assert error <= of_reference + 1e-3


def test_autocast_does_not_lower_the_products_of_float64():
    p = problem(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = terms_and_gradients(fused, p)
    torch.testing.assert_close(ours, terms_and_gradients(unfused, p))


def test_a_loss_scale_saves_a_float16_gradient_that_would_round_to_zero(implementation):
    p = problem(8, 16, 40, ignored=False, dtype=torch.float16)
    options = {"alpha": 1.0, "num_items": 1 << 28}
    exact = terms_and_gradients(unfused, p.to(torch.float64), 1.0, **options)
    scaled = terms_and_gradients(fused, p, float(1 << 28), implementation=implementation, **options)
    for found, expected in zip(scaled[3:], exact[3:], strict=True):
        assert expected.abs().max() < 2**-24  # less than float16 holds
        torch.testing.assert_close(found.double() / (1 << 28), expected, rtol=5e-3, atol=1e-10)


# ------------------------------------------------------------------------------------------------ ignored positions


def test_what_an_ignored_position_holds_never_matters(implementation):
    p = problem(positions=(3,))
    p.labels[0, 1] = IGNORED
    spoiled = replace(p, hidden=p.hidden.clone())
    spoiled.hidden.unflatten(0, (2, -1))[:, p.labels == IGNORED] = torch.nan
    clean = terms_and_gradients(fused, p, implementation=implementation)
    dirty = terms_and_gradients(fused, spoiled, implementation=implementation)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert not clean[3].unflatten(0, (2, -1))[:, p.labels == IGNORED].any()


def test_ignored_positions_are_not_projected(implementation):
    p = problem(64, positions=(), ignored=False)
    p.labels[8:] = IGNORED
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        fused(p.leaves(), implementation=implementation).loss.backward()
    rows = {
        event.input_shapes[1][0] for event in profile.events() if event.name == "aten::addmm" and event.input_shapes
    }
    assert rows <= {2 * 8, 37}  # hidden rows of the projection, classes of the weight gradient
    assert 16 in rows


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n", [0, 3])
def test_without_a_valid_position_the_loss_is_zero_with_zero_gradients(implementation, reduction, n):
    p = problem(n, ignored=False)
    p.labels[:] = IGNORED
    terms = terms_and_gradients(fused, p, reduction=reduction, implementation=implementation)
    assert terms[0].shape == ((n,) if reduction == "none" else ())
    assert not any(tensor.any() for tensor in terms)
    assert [tensor.shape for tensor in terms[3:]] == [parameter.shape for parameter in p.parameters()]


def test_ignore_index_is_any_label():
    p = problem()
    other = replace(p, labels=p.labels.masked_fill(p.labels == IGNORED, 3))
    expected = fused(replace(p, labels=other.labels.masked_fill(other.labels == 3, IGNORED)))
    torch.testing.assert_close(fused(other, ignore_index=3), expected)


# ------------------------------------------------------------------------------------------------ backward


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_second_backward_says_what_to_do(reduction):
    p = problem().leaves()
    loss = fused(p, reduction=reduction).loss
    loss.backward(torch.tensor(2.0), retain_graph=True)
    with pytest.raises(RuntimeError, match="reduction='none' and reduce its loss yourself"):
        loss.backward()


def test_reduction_none_can_go_backward_as_often_as_asked(implementation):
    p = problem().leaves()
    loss = fused(p, reduction="none", implementation=implementation).loss
    first, second = (torch.autograd.grad(loss.sum(), p.parameters(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_second_derivatives_are_refused(reduction):
    p = problem().leaves()
    loss = fused(p, reduction=reduction).loss.sum()
    with pytest.raises(RuntimeError, match="linear_rdrop_loss can be differentiated once only"):
        torch.autograd.grad(loss, p.parameters(), create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(implementation, reduction):
    options = {"reduction": reduction, "implementation": implementation, "label_smoothing": 0.1}

    def loss(p: Problem) -> Tensor:
        return linear_rdrop_loss(p.hidden * 2, p.weight, p.labels, p.bias, alpha=5.0, **options).loss.sum() / 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    p = problem(positions=(3,)).leaves()
    eager, found = loss(p), compiled(p)
    torch.testing.assert_close(found, eager)
    expected = torch.autograd.grad(eager, p.parameters())
    for _ in range(2):  # the compiled graph keeps what it needs
        torch.testing.assert_close(torch.autograd.grad(found, p.parameters(), retain_graph=True), expected)


@pytest.mark.skipif(cpu.why_not() is not None, reason="the reference raises an error")
@pytest.mark.parametrize("label", [-1, -2, 37])
def test_a_label_that_no_check_has_seen_makes_loss_and_gradient_nan(label):
    p = problem().leaves()
    labels = p.labels.index_fill(0, torch.tensor([0]), label)
    compiled = torch.compile(lambda: fused(replace(p, labels=labels)).loss, backend="eager")
    loss = compiled()
    loss.backward()
    assert loss.isnan()
    assert p.hidden.grad.isnan().any()
    assert p.weight.grad.isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_that_is_scaled_in_place_leaves_the_task_loss_as_it_is(reduction):
    loss, task_loss, _ = fused(problem(), alpha=0.0, reduction=reduction)
    before = task_loss.clone()
    loss /= 4
    assert torch.equal(task_loss, before)


def test_compiles_under_autocast():
    def loss(p: Problem) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return fused(p).loss

    p = problem().leaves()
    torch.testing.assert_close(torch.compile(loss, fullgraph=True, backend="aot_eager")(p), loss(p))


def operator_arguments(
    *, wanted=None, leaves=False, implementation="reference", dtype=torch.float32
) -> tuple[object, ...]:
    p = problem(3, 4, 7, dtype=dtype)
    p = p.leaves() if leaves else p
    labels = p.labels.masked_fill(p.labels == IGNORED, kernels.IGNORED)
    hidden = p.hidden.detach().unflatten(0, (2, 3)).requires_grad_(leaves)
    common = (hidden, p.weight, p.bias, labels, torch.ones(7), 0.1, implementation)
    common += (torch.float32, 2)
    return common if wanted is None else (*common, torch.ones(3), torch.ones(3), *wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operators_keep_what_torch_asks_of_operators(implementation, dtype):
    options = {"leaves": True, "implementation": implementation, "dtype": dtype}
    opcheck(linear.linear_forward, operator_arguments(**options))
    # Its gradient can be handed out once, and the check of autograd asks more than once.
    opcheck(
        linear.linear_forward_backward,
        operator_arguments(wanted=(True, True, True), **options),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_of_meta_tensors_has_shapes_and_computes_nothing(reduction):
    p = problem(positions=(3,))
    hidden, weight, bias = (tensor.to("meta").requires_grad_() for tensor in p.parameters())
    loss = linear_rdrop_loss(hidden, weight, p.labels.to("meta"), bias, alpha=5.0, reduction=reduction).loss
    gradients = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
    assert loss.is_meta
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in p.parameters()]


# ------------------------------------------------------------------------------------------------ which implementation


def test_without_a_kernel_the_reference_computes(monkeypatch, caplog):
    expected = fused(problem(), implementation="reference")
    monkeypatch.setattr(cpu, "why_not", lambda: "it was not built here")
    assert fused(problem()) == expected
    assert "it was not built here" in caplog.text
    with pytest.raises(ValueError, match="implementation='cpu' cannot compute this loss: it was not built here"):
        fused(problem(), implementation="cpu")


def test_float64_runs_on_the_reference_and_the_kernel_says_why_not():
    assert fused(problem(dtype=torch.float64)).loss.dtype == torch.float64
    with pytest.raises(ValueError, match=r"cannot compute this loss: the logits are torch\.float64"):
        fused(problem(dtype=torch.float64), implementation="cpu")


def test_importing_rdrop_loads_no_kernel():
    script = "import sys, rdrop; assert 'rdrop.kernels' not in sys.modules; assert callable(rdrop.linear_rdrop_loss)"
    without_compiler = "assert 'rdrop.kernels' in sys.modules; assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", f"{script}; {without_compiler}"], check=True)
    with pytest.raises(AttributeError, match="has no attribute 'linear'"):
        rdrop.linear  # noqa: B018


def test_a_constant_is_marked_as_torch_marks_it():
    assert vars(assume_constant_result(lambda: 1)) == vars(torch.compiler.assume_constant_result(lambda: 1)) != {}


# ------------------------------------------------------------------------------------------------ errors

NAN, INFINITY = float("nan"), float("inf")


def changed(**tensors) -> Problem:
    return replace(problem(), **tensors)


@pytest.mark.parametrize(
    ("p", "options", "message"),
    [
        (problem(), {"alpha": -1.0}, "alpha (=-1.0) must be a finite number >= 0"),
        (problem(), {"label_smoothing": 1.0}, "label_smoothing (=1.0) must be in [0, 1)"),
        (problem(), {"reduction": "max"}, "reduction (='max') must be 'mean', 'sum' or 'none'"),
        (problem(), {"reduction": "sum", "num_items": 3}, "num_items divides the mean"),
        (problem(), {"num_items": -1}, "num_items (=-1) must be >= 0"),
        (problem(), {"chunk_positions": 0}, "chunk_positions (=0) must be >= 1"),
        (problem(), {"implementation": "cuda"}, "implementation (='cuda') must be 'auto'"),
        (problem(), {"class_weight": torch.ones(4)}, "class_weight (4,) and weight (37, 13): expected (V,) and (V, D)"),
        (problem(), {"class_weight": torch.ones(37) / 0}, "class_weight of class 0 (=inf) must be a finite number"),
        (problem(), {"class_weight": torch.ones(37).requires_grad_()}, "class_weight requires a gradient"),
        (changed(bias=torch.ones(4)), {}, "bias (4,) and weight (37, 13): expected (V,) and (V, D), with one V"),
        (changed(weight=torch.ones(37, 12)), {}, "hidden (10, 13) and weight (37, 12): expected (m*N, ..., D)"),
        (changed(weight=torch.ones(37)), {}, "hidden (10, 13) and weight (37,): expected (m*N, ..., D)"),
        (
            changed(hidden=torch.ones(10, 13).long()),
            {},
            "hidden (torch.int64) and weight (torch.float32) must be float",
        ),
        (changed(weight=torch.ones(37, 13).double()), {}, "hidden is torch.float32 and weight torch.float64: cast one"),
        (changed(labels=torch.zeros(5, 2).long()), {}, "hidden (10, 13) and labels (5, 2): expected (m*N, ..., D)"),
        (changed(labels=torch.zeros(10).long()), {}, "hidden (10, 13) and labels (10,): as many rows as labels is one"),
        (
            changed(labels=torch.zeros(4).long()),
            {},
            "the first dimension of hidden must be m >= 2 times that of labels",
        ),
        (changed(labels=torch.zeros(5)), {}, "labels (5,) of torch.float32 cannot be class indices"),
        (changed(labels=torch.tensor([0, 1, 2, 37, 0])), {}, "label 37 at example 3 is outside [0, 37)"),
        (changed(labels=torch.tensor([NAN, 1, 2, 3, 0])), {}, "labels (5,) of torch.float32 cannot be class indices"),
        (changed(labels=torch.ones(5, 37)), {}, "labels at example 0 add up to 37, and probabilities to 1"),
        (changed(labels=torch.ones(5, 37).long()), {}, "labels (5, 37) of torch.int64 have as many dimensions as the"),
        (changed(labels=torch.ones(5, 37).requires_grad_()), {}, "labels requires a gradient"),
        (changed(labels=torch.ones(5, 36)), {}, "expected (m*N, ..., D) and (N, ...), or of 37 probabilities"),
        (changed(weight=torch.ones(1, 13), bias=None), {}, "weight (1, 13) for 1 class: a softmax needs two"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(p, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fused(p, **options)


def with_entry(tensor: Tensor, place: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[place] = value
    return tensor


P = problem()


@pytest.mark.parametrize(
    ("p", "options", "message"),
    [
        (changed(hidden=with_entry(P.hidden, (8, 2), NAN)), {}, "hidden at example 3 holds a NaN or an infinity"),
        (changed(weight=with_entry(P.weight, (4, 2), NAN)), {}, "hidden at example 0, class 4 is NaN"),
        (changed(bias=with_entry(P.bias, (4,), INFINITY)), {}, "hidden at example 0, class 4 is +inf"),
        (
            changed(
                weight=with_entry(P.weight, (4, 2), 3e38),
                hidden=with_entry(P.hidden * (torch.arange(13) != 2), (7, 2), -1e3),
            ),
            {},
            "example 2, class 4 is -inf in some passes only, where the KL divergence is infinite",
        ),
        (
            changed(bias=with_entry(P.bias, (int(P.labels[0]),), -INFINITY)),
            {},
            "is -inf and the label: its cross-entropy is infinite",
        ),
        (
            changed(weight=P.weight * 0, bias=with_entry(torch.full((37,), 3e38), (int(P.labels[0]),), -3e38)),
            {},
            "overflows torch.float32",
        ),
        (
            changed(bias=with_entry(P.bias, ((int(P.labels[0]) + 1) % 37,), -INFINITY)),
            {"label_smoothing": 0.1},
            "task loss is inf at example 0, from logits within their conventions: label smoothing",
        ),
    ],
)
@pytest.mark.parametrize("gradient", [True, False])
def test_what_is_not_finite_is_named(implementation, p, options, message, gradient):
    with pytest.raises(ValueError, match=re.escape(message)):
        fused(p.leaves() if gradient else p, implementation=implementation, chunk_positions=2, **options)


def test_a_class_masked_in_every_pass_counts_for_nothing(implementation):
    p = problem(ignored=False)
    p = replace(p, labels=p.labels.clamp(max=35), bias=with_entry(p.bias, (36,), -INFINITY))
    smaller = replace(p, weight=p.weight[:36], bias=p.bias[:36])
    ours, expected = (terms_and_gradients(fused, each, implementation=implementation) for each in (p, smaller))
    torch.testing.assert_close(ours[:4], expected[:4])
    torch.testing.assert_close(ours[4][:36], expected[4])
    assert not ours[4][36].any()


def test_where_values_are_not_read_a_loss_that_is_not_finite_makes_the_gradients_nan(implementation, monkeypatch):
    monkeypatch.setattr(linear, "values_may_be_read", lambda tensor: False)
    p = replace(P, hidden=with_entry(P.hidden, (8, 2), INFINITY)).leaves()
    loss = fused(p, implementation=implementation).loss
    loss.backward()
    assert loss.isnan()
    assert p.hidden.grad[[3, 8]].isnan().all()
    assert p.weight.grad.isnan().all()
    assert p.bias.grad.isnan().all()


def test_labels_of_a_byte_and_of_eight_bits_are_what_they_are_in_sixty_four():
    """-100 is 156 in uint8, and 200 classes are more than int8 counts."""
    hidden, weight = torch.randn(8, 3), torch.randn(200, 3)
    for labels in (torch.tensor([156, 1, 2, 156], dtype=torch.uint8), torch.tensor([1, 2, 3, -100], dtype=torch.int8)):
        found = linear_rdrop_loss(hidden, weight, labels, alpha=1.0)
        expected = linear_rdrop_loss(hidden, weight, labels.long(), alpha=1.0)
        assert torch.equal(torch.stack(found), torch.stack(expected))


def test_class_weights_of_a_linear_loss_in_half_precision_are_added_up_in_single():
    hidden, weight, labels = torch.randn(4000, 3), torch.randn(3, 3), torch.arange(2000) % 3
    class_weight = torch.tensor([1.0, 30.0, 200.0])
    found = linear_rdrop_loss(hidden, weight, labels, alpha=1.0, class_weight=class_weight.half())
    expected = linear_rdrop_loss(hidden, weight, labels, alpha=1.0, class_weight=class_weight)
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_the_remedies_of_a_linear_loss_name_a_call_that_works():
    hidden, weight = torch.randn(8, 3), torch.randn(1, 3)
    how = "use rdrop_loss(F.linear(hidden, weight, bias), labels, ...) with task_loss="
    with pytest.raises(ValueError, match=re.escape(f"For yes or no {how}binary_cross_entropy")):
        linear_rdrop_loss(hidden, weight, torch.zeros(4, dtype=torch.long), alpha=1.0)
    labels = torch.tensor([[1.0], [0.0], [1.0], [0.0]])
    options = {"task_loss": binary_cross_entropy, "divergence": bernoulli_kl}
    assert rdrop_loss(F.linear(hidden, weight, None), labels, alpha=1.0, **options).loss > 0
    with pytest.raises(ValueError, match=re.escape(f"for numbers {how}squared_error")):
        linear_rdrop_loss(hidden, torch.randn(4, 3), torch.zeros(4), alpha=1.0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch itself
def test_a_forward_mode_derivative_of_a_linear_loss_is_refused():
    weight, labels = torch.randn(5, 3), torch.arange(4)
    hidden = torch.randn(8, 3)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(lambda hidden: linear_rdrop_loss(hidden, weight, labels, alpha=1.0).loss, (hidden,), (hidden,))

"""The loss against its definition, its promises one by one, and every sentence its errors say."""

import itertools
import re
import shutil
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rdrop import (
    LossTerms,
    alpha_at,
    bernoulli_kl,
    binary_cross_entropy,
    check_logits,
    cross_entropy,
    detached_kl,
    kernels,
    kl_from_first,
    rdrop_loss,
    squared_difference,
    squared_error,
    symmetric_kl,
)
from rdrop.kernels import cpu

IGNORED = -100


def random_logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kl_by_the_book(a: Tensor, b: Tensor) -> Tensor:
    """(KL(p||q) + KL(q||p)) / 2 with torch's own kl_div: `(..., V)` twice to `(...)`."""
    log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
    forward = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    return (forward + F.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)) / 2


def mean_over_pairs(function, passes: Tensor) -> Tensor:
    return torch.stack([function(a, b) for a, b in itertools.combinations(passes, 2)]).mean(0)


def gradient_of(function, tensor: Tensor) -> Tensor:
    leaf = tensor.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


# ------------------------------------------------------------------------------------------------ the definition


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("positions", [(), (3,), (2, 3)])
def test_loss_and_gradient_are_the_papers_halved(m, smoothing, weighted, positions):
    n, classes, alpha = 4, 7, 5.0
    logits = random_logits(m * n, *positions, classes)
    labels = torch.randint(0, classes, (n, *positions), generator=torch.Generator().manual_seed(1))
    labels[1] = IGNORED
    weight = torch.linspace(0.5, 2, classes, dtype=torch.float64) if weighted else None

    def expected(z: Tensor) -> Tensor:
        passes = z.unflatten(0, (m, n))
        task = [
            F.cross_entropy(p.reshape(-1, classes), labels.reshape(-1), weight=weight, label_smoothing=smoothing)
            for p in passes
        ]
        divergence = mean_over_pairs(kl_by_the_book, passes)[labels != IGNORED].mean()
        return torch.stack(task).mean() + alpha / 2 * divergence

    def ours(z: Tensor) -> Tensor:
        return rdrop_loss(z, labels, alpha=alpha, label_smoothing=smoothing, weight=weight).loss

    torch.testing.assert_close(ours(logits), expected(logits))
    torch.testing.assert_close(gradient_of(ours, logits), gradient_of(expected, logits))


def test_two_rows_worked_out_by_hand():
    # p = (3/4, 1/4), q = (1/4, 3/4): KL(p||q) = KL(q||p) = 1/2 log 3; label 0: CE = log 4/3 and log 4.
    logits = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    loss, task_loss, divergence = rdrop_loss(logits, torch.tensor([0]), alpha=4.0)
    log = torch.tensor([4 / 3, 4.0, 3.0]).log()
    torch.testing.assert_close(task_loss, (log[0] + log[1]) / 2)
    torch.testing.assert_close(divergence, log[2] / 2)
    torch.testing.assert_close(loss, task_loss + 2 * divergence)


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradcheck_in_float64_for_the_logits_of_every_pass(m, smoothing):
    labels = torch.tensor([0, IGNORED, 4])
    weight = torch.linspace(0.5, 2, 5, dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        return rdrop_loss(z, labels, alpha=5.0, label_smoothing=smoothing, weight=weight).loss

    assert torch.autograd.gradcheck(loss, random_logits(3 * m, 5).requires_grad_())


@pytest.mark.parametrize("divergence", [symmetric_kl, bernoulli_kl, squared_difference, kl_from_first])
@pytest.mark.parametrize("m", [2, 3, 4])
def test_gradcheck_of_each_divergence(divergence, m):
    assert torch.autograd.gradcheck(divergence, random_logits(m, 3, 5).requires_grad_())


def test_symmetric_kl_for_m_passes_is_the_mean_over_pairs():
    passes = random_logits(5, 6, 9)
    torch.testing.assert_close(symmetric_kl(passes), mean_over_pairs(kl_by_the_book, passes))


def test_kl_from_first_is_the_mean_kl_from_the_first_pass_to_the_others():
    passes = random_logits(4, 6, 9)
    log_p = passes.log_softmax(-1)
    kl = [F.kl_div(log_q, log_p[0], log_target=True, reduction="none").sum(-1) for log_q in log_p[1:]]
    torch.testing.assert_close(kl_from_first(passes), torch.stack(kl).mean(0))


@pytest.mark.parametrize("m", [2, 3])
def test_detached_kl_is_symmetric_kl_with_every_target_held_fixed(m):
    passes = random_logits(m, 4, 5).requires_grad_()
    fixed = passes.detach()
    pairs = [(a, b) for a in range(m) for b in range(m) if a != b]
    expected = sum(F.kl_div(passes[a].log_softmax(-1), fixed[b].softmax(-1), reduction="sum") for a, b in pairs)
    expected = expected / len(pairs)
    value = detached_kl(passes)
    torch.testing.assert_close(value, symmetric_kl(passes))
    torch.testing.assert_close(value.sum(), expected)
    found, wanted = (torch.autograd.grad(loss, passes)[0] for loss in (value.sum(), expected))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("distance", [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
def test_kl_from_first_is_accurate_where_the_passes_agree_and_finite_where_they_do_not(distance):
    first = random_logits(50, 1000, dtype=torch.float32)
    near = torch.stack([first, first + distance * random_logits(50, 1000, seed=1, dtype=torch.float32)])
    torch.testing.assert_close(kl_from_first(near).double(), kl_from_first(near.double()), rtol=4e-6, atol=0)
    ours, exact = (gradient_of(lambda z: kl_from_first(z).sum(), passes) for passes in (near, near.double()))
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-8)
    far = torch.tensor([[[0.0, 200.0, -300.0]], [[150.0, -200.0, 10.0]]])
    torch.testing.assert_close(kl_from_first(far), torch.tensor([350.0]))
    assert gradient_of(lambda z: kl_from_first(z).sum(), far).isfinite().all()


def test_kl_from_first_leaves_out_a_class_masked_in_every_pass():
    passes = random_logits(2, 3, 5)
    masked = torch.cat([passes, torch.full((2, 3, 2), float("-inf"), dtype=torch.float64)], -1)
    torch.testing.assert_close(kl_from_first(masked), kl_from_first(passes))
    gradient = gradient_of(lambda z: kl_from_first(z).sum(), masked)
    torch.testing.assert_close(gradient[..., :5], gradient_of(lambda z: kl_from_first(z).sum(), passes))
    assert not gradient[..., 5:].any()


def test_bernoulli_kl_is_the_mean_over_labels_of_the_two_class_kl():
    passes = random_logits(3, 4, 6)
    two_classes = torch.stack([passes.sigmoid(), 1 - passes.sigmoid()], -1).log()
    torch.testing.assert_close(bernoulli_kl(passes), mean_over_pairs(kl_by_the_book, two_classes).mean(-1))


def test_squared_difference_is_the_mean_over_pairs():
    passes = random_logits(4, 5, 2)
    expected = mean_over_pairs(lambda a, b: (a - b).square().mean(-1), passes)
    torch.testing.assert_close(squared_difference(passes), expected)


def test_multi_label_is_bce_plus_bernoulli_kl():
    logits, labels = random_logits(6, 4), torch.randint(0, 2, (3, 4)).double()
    terms = rdrop_loss(logits, labels, alpha=2.0, task_loss=binary_cross_entropy, divergence=bernoulli_kl)
    expected = F.binary_cross_entropy_with_logits(logits, labels.repeat(2, 1))
    torch.testing.assert_close(terms.task_loss, expected)
    torch.testing.assert_close(terms.loss, expected + bernoulli_kl(logits.unflatten(0, (2, 3))).mean())


@pytest.mark.parametrize("shape", [(6, 1), (6,)])
def test_regression_is_mse_plus_squared_difference(shape):
    logits, labels = random_logits(*shape), random_logits(3, seed=1)
    terms = rdrop_loss(logits, labels, alpha=3.0, task_loss=squared_error, divergence=squared_difference)
    first, second = logits.flatten().chunk(2)
    task = F.mse_loss(logits.flatten(), labels.repeat(2))
    torch.testing.assert_close(terms.loss, task + 3.0 / 2 * (first - second).square().mean())


def test_regression_takes_whole_number_labels():
    logits, labels = random_logits(6, 1), torch.tensor([1, 2, 5])
    terms = rdrop_loss(logits, labels, alpha=0.0, task_loss=squared_error, divergence=squared_difference)
    torch.testing.assert_close(terms.task_loss, F.mse_loss(logits.flatten(), labels.repeat(2).double()))


def test_soft_labels_are_those_of_cross_entropy():
    logits, labels = random_logits(6, 4), random_logits(3, 4, seed=1).softmax(-1)
    terms = rdrop_loss(logits, labels, alpha=1.0, label_smoothing=0.1)
    expected = F.cross_entropy(logits, labels.repeat(2, 1), label_smoothing=0.1)
    torch.testing.assert_close(terms.task_loss, expected)


@pytest.mark.parametrize("task_passes", [None, (0,), (0, 2), ()])
@pytest.mark.parametrize("positions", [(), (2, 3)])
def test_soft_labels_of_the_kernel_are_those_of_the_reference(task_passes, positions):
    if reason := kernels.available()["cpu"]:
        pytest.skip(reason)
    logits = random_logits(9, *positions, 4, dtype=torch.float32)
    labels = random_logits(3, *positions, 4, seed=1, dtype=torch.float32).softmax(-1)
    for reduction in ("mean", "none"):
        options = {"alpha": 1.0, "label_smoothing": 0.1, "task_passes": task_passes, "reduction": reduction}

        def loss(z: Tensor, implementation: str, options=options) -> Tensor:
            return rdrop_loss(z, labels, implementation=implementation, **options).loss

        torch.testing.assert_close(loss(logits, "cpu"), loss(logits, "reference"))
        found, expected = (gradient_of(lambda z, i=i: loss(z, i).sum(), logits) for i in ("cpu", "reference"))
        torch.testing.assert_close(found, expected)


def test_any_callable_is_a_divergence_or_a_task_loss():
    logits, labels = random_logits(6, 4), torch.tensor([0, 1, 2])

    def total_variation(passes: Tensor) -> Tensor:
        first, second = passes.softmax(-1)
        return (first - second).abs().sum(-1) / 2

    def focal(z: Tensor, y: Tensor) -> Tensor:
        surprise = F.cross_entropy(z, y, reduction="none")
        return (1 - (-surprise).exp()) ** 2 * surprise

    terms = rdrop_loss(logits, labels, alpha=2.0, divergence=total_variation, task_loss=focal)
    torch.testing.assert_close(terms.task_loss, focal(logits, labels.repeat(2)).mean())
    torch.testing.assert_close(terms.divergence, total_variation(logits.unflatten(0, (2, 3))).mean())
    torch.testing.assert_close(terms.loss, terms.task_loss + terms.divergence)


@pytest.mark.parametrize("alpha", [0.0, 2.0])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_partial_of_cross_entropy_is_a_task_loss_as_any_other_callable(implementation, alpha):
    logits, labels = random_logits(6, 4), torch.tensor([0, IGNORED, 2])
    options = {"weight": torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), "label_smoothing": 0.1}
    found, expected = (
        rdrop_loss(logits, labels, alpha=alpha, task_loss=task_loss, implementation=implementation)
        for task_loss in (partial(cross_entropy, **options), lambda z, y: cross_entropy(z, y, **options))
    )
    assert found == expected
    plain = F.cross_entropy(logits, labels.repeat(2), reduction="sum", **options) / 4
    torch.testing.assert_close(found.task_loss, plain)


def test_weights_and_smoothing_go_into_the_callable_as_the_error_says():
    logits, labels, weight = random_logits(6, 4), torch.tensor([0, 1, 2]), torch.rand(4).double()
    with pytest.raises(ValueError, match="put them into the callable"):
        rdrop_loss(logits, labels, alpha=1.0, task_loss=partial(cross_entropy), weight=weight)
    for task_loss in (partial(cross_entropy, weight=weight), lambda z, y: cross_entropy(z, y, weight=weight)):
        terms = rdrop_loss(logits, labels, alpha=1.0, task_loss=task_loss, reduction="sum")
        torch.testing.assert_close(
            terms.task_loss, F.cross_entropy(logits, labels.repeat(2), weight, reduction="sum") / 2
        )


@pytest.mark.parametrize("divergence", [bernoulli_kl, squared_difference])
def test_numbers_whose_last_dimension_is_left_out_have_a_divergence_without_labels(divergence):
    outputs, numbers = random_logits(6), torch.tensor([0.5, float(IGNORED), 2.0])
    short, long = (
        rdrop_loss(logits, labels, alpha=2.0, divergence=divergence, task_passes=())
        for logits, labels in ((outputs, numbers), (outputs[:, None], numbers[:, None]))
    )
    assert short == long
    torch.testing.assert_close(short.divergence, divergence(outputs.view(2, 3, 1)).mean())


# ------------------------------------------------------------------------------------------------ alpha and reductions


def test_alpha_zero_is_plain_cross_entropy():
    logits, labels = random_logits(8, 5), torch.tensor([0, 1, IGNORED, 4])
    repeated = labels.repeat(2)
    terms = rdrop_loss(logits, labels, alpha=0.0)
    torch.testing.assert_close(terms.loss, F.cross_entropy(logits, repeated))
    ours = gradient_of(lambda z: rdrop_loss(z, labels, alpha=0.0).loss, logits)
    torch.testing.assert_close(ours, gradient_of(lambda z: F.cross_entropy(z, repeated), logits))


def test_alpha_zero_still_reports_the_divergence():
    logits, labels = random_logits(6, 5), torch.tensor([0, 1, 4])
    off, on = rdrop_loss(logits, labels, alpha=0.0), rdrop_loss(logits, labels, alpha=1.0)
    assert off.divergence == on.divergence > 0


def test_only_the_loss_carries_gradient():
    logits = random_logits(4, 3).requires_grad_()
    terms = rdrop_loss(logits, torch.tensor([0, 1]), alpha=1.0)
    assert isinstance(terms, LossTerms)
    assert terms.loss.requires_grad
    assert not terms.task_loss.requires_grad
    assert not terms.divergence.requires_grad


def test_the_strength_of_alpha_does_not_follow_the_batch():
    logits, labels = random_logits(6, 5).unflatten(0, (2, 3)), torch.tensor([0, 1, 4])
    once = rdrop_loss(logits.flatten(0, 1), labels, alpha=5.0)
    tiled = rdrop_loss(logits.repeat(1, 7, 1).flatten(0, 1), labels.repeat(7), alpha=5.0)
    for a, b in zip(once, tiled, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("weighted", [False, True])
def test_reductions_agree(weighted):
    logits, labels = random_logits(8, 5), torch.tensor([0, 1, IGNORED, 4])
    options = {"alpha": 5.0, "weight": torch.linspace(0.5, 2, 5, dtype=torch.float64) if weighted else None}
    none = rdrop_loss(logits, labels, reduction="none", **options)
    total = rdrop_loss(logits, labels, reduction="sum", **options)
    mean = rdrop_loss(logits, labels, reduction="mean", **options)
    for name in LossTerms._fields:
        assert getattr(none, name).shape == labels.shape
        assert getattr(none, name)[2] == 0
        torch.testing.assert_close(getattr(none, name).sum(), getattr(total, name))
    torch.testing.assert_close(total.divergence / 3, mean.divergence)
    normalizer = options["weight"][labels[labels >= 0]].sum() if weighted else 3
    torch.testing.assert_close(total.task_loss / normalizer, mean.task_loss)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_microbatches_with_num_items_add_up_to_the_whole_batch(as_tensor):
    logits = random_logits(2 * 8, 6, 5).unflatten(0, (2, 8))
    labels = torch.randint(0, 5, (8, 6), generator=torch.Generator().manual_seed(1))
    labels[torch.arange(6) >= torch.tensor([6, 1, 3, 2, 5, 4, 1, 1])[:, None]] = IGNORED  # ragged lengths
    count = (labels != IGNORED).sum()
    num_items = count if as_tensor else int(count)

    def whole(z: Tensor) -> Tensor:
        return rdrop_loss(z.flatten(0, 1), labels, alpha=5.0, label_smoothing=0.1).loss

    def in_parts(z: Tensor) -> Tensor:
        options = {"alpha": 5.0, "label_smoothing": 0.1, "num_items": num_items}
        parts = zip(z.split(2, dim=1), labels.split(2), strict=True)
        return torch.stack([rdrop_loss(p.flatten(0, 1), y, **options).loss for p, y in parts]).sum()

    torch.testing.assert_close(in_parts(logits), whole(logits))
    torch.testing.assert_close(gradient_of(in_parts, logits), gradient_of(whole, logits))


@pytest.mark.parametrize("num_items", [0.4, torch.tensor(0.4)])
def test_a_sum_of_class_weights_below_one_divides_as_it_stands(num_items):
    logits, labels = random_logits(2, 4, 3), torch.tensor([0, 1, 2, 0])
    weight = torch.full((3,), 0.1)
    found = rdrop_loss(logits.flatten(0, 1), labels, alpha=0.0, weight=weight, num_items=num_items).task_loss
    torch.testing.assert_close(found, rdrop_loss(logits.flatten(0, 1), labels, alpha=0.0, weight=weight).task_loss)


def test_padding_changes_nothing():
    logits, labels = random_logits(2, 3, 4, 5), torch.randint(0, 5, (3, 4))
    padded = torch.cat([logits, random_logits(2, 3, 9, 5, seed=2)], 2)
    padded_labels = torch.cat([labels, torch.full((3, 9), IGNORED)], 1)
    for a, b in zip(
        rdrop_loss(logits.flatten(0, 1), labels, alpha=5.0),
        rdrop_loss(padded.flatten(0, 1), padded_labels, alpha=5.0),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------------------------------------ the passes that learn


@pytest.fixture(params=["reference", "cpu"])
def implementation(request):
    if request.param != "reference" and (reason := kernels.available()[request.param]):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize(
    ("m", "task_passes", "alpha"),
    [(2, (0,), 5.0), (2, (1,), 0.0), (2, (), 5.0), (3, (0,), 5.0), (3, (2, 1), 0.0), (3, (0, 2), 5.0)],
)
def test_task_passes_are_the_passes_of_the_task_loss(m, task_passes, alpha, implementation):
    logits = random_logits(m * 4, 3, 7)
    labels = torch.randint(0, 7, (4, 3), generator=torch.Generator().manual_seed(1))
    labels[1, 1:] = IGNORED
    weight = torch.linspace(0.5, 2, 7, dtype=torch.float64)

    def expected(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        passes = z.unflatten(0, (m, 4))
        options = {"weight": weight, "label_smoothing": 0.1}
        tasks = [F.cross_entropy(passes[k].flatten(0, 1), labels.flatten(), **options) for k in task_passes]
        task = torch.stack(tasks).mean() if tasks else torch.zeros((), dtype=torch.float64)
        divergence = mean_over_pairs(kl_by_the_book, passes)[labels != IGNORED].mean()
        return task + alpha / 2 * divergence, task, divergence

    def ours(z: Tensor, **options) -> LossTerms:
        z = z.to(dtype)
        options = {"alpha": alpha, "weight": weight.to(dtype), "label_smoothing": 0.1} | options
        return rdrop_loss(z, labels, task_passes=task_passes, implementation=implementation, **options)

    dtype = torch.float64 if implementation == "reference" else torch.float32
    for a, b in zip(ours(logits), expected(logits), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)
    gradient = gradient_of(lambda z: ours(z).loss, logits)
    torch.testing.assert_close(gradient, gradient_of(lambda z: expected(z)[0], logits), rtol=1e-4, atol=1e-6)
    assert not gradient.unflatten(0, (m, 4))[:, 1, 1:].any()


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("task_passes", [(0,), (2,), (0, 2), (1, 2), ()])
def test_an_empty_batch_is_one_of_as_many_passes_as_are_asked_for(task_passes, implementation):
    logits = torch.zeros(0, 4, 5, requires_grad=True)
    labels = torch.zeros(0, 4, dtype=torch.long)
    terms = rdrop_loss(logits, labels, alpha=1.0, task_passes=task_passes, implementation=implementation)
    terms.loss.backward()
    assert [term.item() for term in terms] == [0, 0, 0]
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("task_passes", [(0,), (), [2, 0]])
def test_gradcheck_of_some_passes_learning(task_passes):
    labels = torch.tensor([0, IGNORED, 4])
    logits = random_logits(9, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: rdrop_loss(z, labels, alpha=5.0, task_passes=task_passes).loss, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_passes_learning_is_the_default_to_the_bit(dtype):
    logits, labels = random_logits(9, 5, dtype=dtype), torch.tensor([0, IGNORED, 4])
    for task_passes in ((0, 1, 2), [2, 0, 1], range(3)):
        ours, default = (
            gradient_of(lambda z, chosen=chosen: rdrop_loss(z, labels, alpha=5.0, task_passes=chosen).loss, logits)
            for chosen in (task_passes, None)
        )
        assert ours.equal(default)


@pytest.mark.parametrize("task_passes", [(0, 2), ()])
def test_the_triton_kernel_has_the_same_passes_learn(task_passes):
    if reason := kernels.available()["triton"]:
        pytest.skip(reason)
    logits, labels = random_logits(6, 5, dtype=torch.float32), torch.tensor([IGNORED, 4])
    results = []
    for implementation in ("triton", "reference"):
        leaf = logits.clone().requires_grad_()
        terms = rdrop_loss(leaf, labels, alpha=5.0, task_passes=task_passes, implementation=implementation)
        results.append((*terms[1:], *torch.autograd.grad(terms.loss, leaf)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task_passes", [(0,), ()])
def test_reductions_agree_where_some_passes_learn(task_passes, implementation):
    logits, labels = random_logits(8, 5, dtype=torch.float32), torch.tensor([0, 1, IGNORED, 4])
    options = {"alpha": 5.0, "task_passes": task_passes, "implementation": implementation}
    none = rdrop_loss(logits, labels, reduction="none", **options)
    total = rdrop_loss(logits, labels, reduction="sum", **options)
    parts = [
        rdrop_loss(logits.unflatten(0, (2, 4))[:, rows].flatten(0, 1), labels[rows], num_items=3, **options)
        for rows in (slice(0, 1), slice(1, 4))
    ]
    for name in LossTerms._fields:
        assert getattr(none, name)[2] == 0
        torch.testing.assert_close(getattr(none, name).sum(), getattr(total, name))
        torch.testing.assert_close(getattr(parts[0], name) + getattr(parts[1], name), getattr(total, name) / 3)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_without_task_passes_a_label_only_says_whether_its_position_counts(reduction, implementation):
    logits = random_logits(8, 5, dtype=torch.float32)
    logits[:, 0] = float("-inf")  # not a label's class: there are no labels
    options = {"alpha": 4.0, "task_passes": (), "reduction": reduction, "implementation": implementation}
    weighted = {"weight": torch.tensor([0.0, 1, 2, 3, 4]), "label_smoothing": 0.1}
    losses = [
        rdrop_loss(logits, labels, **options, **more)
        for labels in (
            torch.tensor([0, 3, IGNORED, 2]),
            torch.tensor([999, -1, IGNORED, 0]),
            torch.tensor([1.0, 0, IGNORED, 0]),
        )
        for more in ({}, weighted)
    ]
    for terms in losses:
        assert not terms.task_loss.any()
        assert all(a.equal(b) for a, b in zip(terms, losses[0], strict=True))
        torch.testing.assert_close(terms.loss, 2 * terms.divergence)
    kept = rdrop_loss(logits, torch.tensor([1, 7, 7, 7]), **options, ignore_index=7)
    assert kept.divergence.any()


@pytest.mark.parametrize("divergence", [squared_difference, bernoulli_kl, kl_from_first])
def test_any_divergence_goes_without_labels(divergence):
    logits = random_logits(6, 4)
    terms = rdrop_loss(logits, torch.zeros(3), alpha=2.0, divergence=divergence, task_passes=())
    torch.testing.assert_close(terms.loss, divergence(logits.unflatten(0, (2, 3))).mean())


def test_regression_may_learn_from_one_pass():
    logits, labels = random_logits(6), random_logits(3, seed=1)
    options = {"alpha": 3.0, "task_loss": squared_error, "divergence": squared_difference}
    terms = rdrop_loss(logits, labels, task_passes=(0,), **options)
    torch.testing.assert_close(terms.task_loss, F.mse_loss(logits[:3], labels))
    assert terms.divergence == rdrop_loss(logits, labels, **options).divergence


def test_logits_are_not_overwritten_where_some_passes_learn():
    leaf, labels = random_logits(8, 5, dtype=torch.float32).requires_grad_(), torch.tensor([0, 1, IGNORED, 4])
    logits = leaf * 1
    terms = rdrop_loss(logits, labels, alpha=5.0, task_passes=(0,), overwrite_logits=True)
    assert logits.equal(leaf)
    (gradient,) = torch.autograd.grad(terms.loss, leaf)
    assert gradient.equal(gradient_of(lambda z: rdrop_loss(z, labels, alpha=5.0, task_passes=(0,)).loss, leaf))


@pytest.mark.parametrize("examples", [0, 3])
@pytest.mark.parametrize("task_passes", [(0,), ()])
def test_a_batch_without_a_valid_position_is_zero_whichever_passes_learn(examples, task_passes, implementation):
    logits = random_logits(2 * examples, 5, dtype=torch.float32).requires_grad_()
    labels = torch.full((examples,), IGNORED)
    terms = rdrop_loss(logits, labels, alpha=5.0, task_passes=task_passes, implementation=implementation)
    assert terms == (0, 0, 0)
    terms.loss.backward()
    assert not logits.grad.any()


# ------------------------------------------------------------------------------------------------ conventions


@pytest.mark.parametrize("content", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_content_of_an_ignored_row_never_matters(content, reduction):
    logits, labels = random_logits(6, 5), torch.tensor([3, IGNORED, 1])
    spoiled = logits.clone()
    spoiled[1] = content

    def loss(z: Tensor) -> Tensor:
        return rdrop_loss(z, labels, alpha=5.0, label_smoothing=0.1, reduction=reduction).loss.sum()

    assert loss(spoiled) == loss(logits)
    gradient = gradient_of(loss, spoiled)
    assert torch.equal(gradient, gradient_of(loss, logits))
    assert torch.equal(gradient[[1, 4]], torch.zeros(2, 5, dtype=gradient.dtype))


def test_ignored_positions_reach_no_callable():
    logits, labels = random_logits(6, 5), torch.tensor([3, IGNORED, 1])
    logits[1] = float("nan")

    def divergence(passes: Tensor) -> Tensor:
        assert passes.isfinite().all()
        return (passes[0] - passes[1]).square().mean(-1)

    terms = rdrop_loss(logits, labels, alpha=1.0, divergence=divergence)
    assert terms.loss.isfinite()


@pytest.mark.parametrize("examples", [0, 1, 3])
@pytest.mark.parametrize("num_items", [None, 0, torch.tensor(0)])
def test_a_batch_without_a_valid_position_is_zero_with_a_graph(examples, num_items):
    logits = random_logits(2 * examples, 5).requires_grad_()
    labels = torch.full((examples,), IGNORED)
    terms = rdrop_loss(logits, labels, alpha=5.0, num_items=num_items)
    assert terms == (0, 0, 0)
    terms.loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_one_row_batch():
    logits = random_logits(2, 5)
    terms = rdrop_loss(logits, torch.tensor([3]), alpha=1.0)
    torch.testing.assert_close(terms.divergence, kl_by_the_book(logits[0], logits[1]))


def test_a_class_masked_in_every_pass_is_as_if_it_were_not_there():
    logits, labels, keep = random_logits(6, 7), torch.tensor([0, 3, 5]), torch.tensor([0, 3, 5, 6])
    masked = torch.full_like(logits, float("-inf"))
    masked[:, keep] = logits[:, keep]
    dense = torch.tensor([0, 1, 2])  # the labels' places among the classes kept
    for a, b in zip(rdrop_loss(masked, labels, alpha=5.0), rdrop_loss(logits[:, keep], dense, alpha=5.0), strict=True):
        torch.testing.assert_close(a, b)
    gradient = gradient_of(lambda z: rdrop_loss(z, labels, alpha=5.0).loss, masked)
    torch.testing.assert_close(
        gradient[:, keep], gradient_of(lambda z: rdrop_loss(z, dense, alpha=5.0).loss, logits[:, keep])
    )
    assert not gradient[:, [1, 2, 4]].any()


def test_identical_passes_have_no_divergence_and_only_the_task_gradient():
    rows, labels = random_logits(3, 50, dtype=torch.float32), torch.tensor([0, 1, 2])
    logits = torch.cat([rows, rows])
    assert rdrop_loss(logits, labels, alpha=5.0).divergence == 0
    with_alpha, without = (gradient_of(lambda z, a=a: rdrop_loss(z, labels, alpha=a).loss, logits) for a in (5.0, 0.0))
    assert torch.equal(with_alpha, without)


def test_gradient_is_finite_where_the_usual_form_gives_nan():
    # Logit gaps past 104: softmax underflows, kl_div's gradient is 0 * inf.
    logits = torch.tensor([[0.0, 200.0, -300.0], [150.0, -200.0, 10.0]])
    gradient = gradient_of(lambda z: rdrop_loss(z, torch.tensor([1]), alpha=5.0).loss, logits)
    exact = gradient_of(lambda z: rdrop_loss(z, torch.tensor([1]), alpha=5.0).loss, logits.double())
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-30)


# ------------------------------------------------------------------------------------------------ where it runs


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    logits, labels = random_logits(6, 40).to(dtype), torch.tensor([0, 20, 39])
    terms = rdrop_loss(logits, labels, alpha=5.0)
    assert terms.loss.dtype == torch.float32
    torch.testing.assert_close(terms.loss, rdrop_loss(logits.float(), labels, alpha=5.0).loss)
    gradient = gradient_of(lambda z: rdrop_loss(z, labels, alpha=5.0).loss, logits)
    assert gradient.dtype == dtype
    exact = gradient_of(lambda z: rdrop_loss(z, labels, alpha=5.0).loss, logits.double())
    torch.testing.assert_close(gradient, exact.to(dtype))


def test_autocast_changes_nothing():
    logits, labels = random_logits(6, 9, dtype=torch.float32), torch.tensor([0, 4, 8])
    with torch.autocast("cpu", torch.bfloat16):
        inside = rdrop_loss(logits, labels, alpha=5.0, label_smoothing=0.1)
    outside = rdrop_loss(logits, labels, alpha=5.0, label_smoothing=0.1)
    assert inside == outside
    assert inside.loss.dtype == torch.float32


def test_non_contiguous_logits():
    dense = random_logits(6, 9)
    strided = random_logits(9, 12).t()[::2]
    strided.copy_(dense)
    assert not strided.is_contiguous()
    labels = torch.tensor([0, 4, 8])
    assert rdrop_loss(strided, labels, alpha=5.0) == rdrop_loss(dense, labels, alpha=5.0)
    torch.testing.assert_close(
        gradient_of(lambda z: rdrop_loss(z.t()[::2], labels, alpha=5.0).loss, random_logits(9, 12)).t()[1::2],
        torch.zeros(6, 9, dtype=torch.float64),
    )


def compiled_and_eager(backend: str):
    logits = random_logits(8, 3, 9, dtype=torch.float32).requires_grad_()
    labels = torch.randint(0, 9, (4, 3), generator=torch.Generator().manual_seed(0))
    labels[1] = IGNORED

    def loss(z: Tensor) -> Tensor:
        return rdrop_loss(z, labels, alpha=5.0, label_smoothing=0.1).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for function in (compiled, loss):
        value = function(logits)
        (gradient,) = torch.autograd.grad(value, logits)
        yield value.detach(), gradient


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, from inside torch
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_equals_eager(backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler for its CPU backend, and there is none")
    compiled, eager = compiled_and_eager(backend)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, from inside torch
@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.float32, {"implementation": "reference"}),
        (torch.float32, {"task_passes": (0,), "divergence": kl_from_first}),
        (torch.float32, {"task_loss": binary_cross_entropy, "divergence": bernoulli_kl}),
    ],
    ids=["kernel", "float64", "reference", "simcut", "multi-label"],
)
def test_compiled_with_an_alpha_that_rises_equals_eager(dtype, options, fullgraph):
    labels = torch.rand(4, 5).round() if "task_loss" in options else torch.arange(4)

    def loss(logits: Tensor, alpha: float) -> Tensor:
        return rdrop_loss(logits, labels, alpha=alpha, **options).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=fullgraph)
    logits = random_logits(8, 5, dtype=dtype).requires_grad_()
    for step in range(4):
        alpha = alpha_at(step, 4, 4.0, "quadratic")
        expected, found = (torch.autograd.grad(how(logits, alpha), logits)[0] for how in (loss, compiled))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_meta_tensors_give_shapes_without_values():
    logits, labels = torch.empty(6, 5, device="meta"), torch.empty(3, dtype=torch.long, device="meta")
    assert rdrop_loss(logits, labels, alpha=1.0, reduction="none").loss.shape == (3,)


def test_differentiating_twice_is_refused():
    logits = random_logits(2, 3).requires_grad_()
    loss = rdrop_loss(logits, torch.tensor([0]), alpha=1.0).loss
    with pytest.raises(RuntimeError, match="symmetric_kl can be differentiated once only"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_the_remedy_for_a_second_derivative_of_the_plain_loss_works():
    logits, labels = random_logits(2, 3, dtype=torch.float32).requires_grad_(), torch.tensor([0])

    def gradient(**options: Any) -> Tensor:
        loss = rdrop_loss(logits, labels, alpha=0.0, **options).loss
        return torch.autograd.grad(loss, logits, create_graph=True)[0]

    if kernels.available()["cpu"] is None:
        with pytest.raises(RuntimeError, match="pass implementation='reference'"):
            gradient()
    assert torch.autograd.grad(gradient(implementation="reference").square().sum(), logits)[0].norm() > 0


@pytest.mark.parametrize("labels", [None, [0], 0])
def test_what_is_no_tensor_is_refused(labels):
    with pytest.raises(TypeError, match=f"labels must be a tensor, and is of type {type(labels).__name__}"):
        rdrop_loss(random_logits(2, 3), labels, alpha=1.0)


def test_the_loss_leaves_its_inputs_alone():
    logits, labels = random_logits(4, 3), torch.tensor([0, IGNORED])
    before = logits.clone(), labels.clone()
    rdrop_loss(logits, labels, alpha=1.0)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])


# ------------------------------------------------------------------------------------------------ what errors say


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ((4, 5), (4,), r"logits \(4, 5\) and labels \(4,\): as many rows as labels is one pass.*repeat_batch"),
        ((5, 5), (2,), r"logits \(5, 5\) and labels \(2,\): the first dimension of logits must be m >= 2 times"),
        ((2, 5), (4,), r"logits \(2, 5\) and labels \(4,\): the first dimension of logits must be m >= 2 times"),
        ((4, 3, 5), (2, 4), r"logits \(4, 3, 5\) and labels \(2, 4\): they differ after the first dimension"),
        ((4, 5, 3), (2,), r"expected logits \(m\*N, \.\.\., V\) with the classes last"),
        ((4,), (2,), r"logits \(4,\) and labels \(2,\): expected logits \(m\*N, \.\.\., V\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        rdrop_loss(torch.zeros(logits), torch.ones(labels, dtype=torch.long), alpha=1.0)


@pytest.mark.parametrize("alpha", [None, "strong"])
def test_alpha_that_is_no_number_is_named(alpha):
    with pytest.raises(TypeError, match=r"alpha \(=.*\) must be a number >= 0"):
        rdrop_loss(torch.zeros(4, 3), torch.tensor([0, 1]), alpha=alpha)


@pytest.mark.parametrize("labels", [(2,), (2, 1)])
def test_numbers_are_never_broadcast_to_several_outputs(labels):
    with pytest.raises(ValueError, match=r"labels .* must be of the shape of the logits, \(4, 4\)|they differ after"):
        rdrop_loss(
            torch.zeros(4, 4), torch.ones(labels), alpha=1.0, task_loss=squared_error, divergence=squared_difference
        )


@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8, torch.bool])
def test_class_indices_may_have_any_whole_dtype(dtype, implementation):
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    expected = rdrop_loss(logits, labels, alpha=1.0, implementation=implementation)
    assert rdrop_loss(logits, labels.to(dtype), alpha=1.0, implementation=implementation) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, r"alpha \(=-1.0\) must be a finite number >= 0"),
        ({"alpha": float("nan")}, r"alpha \(=nan\) must be"),
        ({"label_smoothing": 1.5}, r"label_smoothing \(=1.5\) must be in \[0, 1\)"),
        ({"reduction": "avg"}, r"reduction \(='avg'\) must be 'mean', 'sum' or 'none'"),
        ({"reduction": "sum", "num_items": 3}, r"num_items divides the mean"),
        ({"num_items": -3}, r"num_items \(=-3\) must be >= 0 and finite"),
        ({"num_items": torch.tensor(float("nan"))}, r"num_items \(=nan\) must be >= 0 and finite"),
        ({"num_items": torch.ones(2)}, r"num_items, of shape \(2,\), must be one number"),
        ({"num_items": 0}, r"num_items \(=0\) must be the number of valid positions .* this batch alone has 2"),
        ({"weight": torch.tensor([1.0, float("nan"), 1.0])}, r"^weight of class 1 \(=nan\) must be a finite number$"),
        ({"weight": torch.ones(2)}, r"weight \(=\(2,\)\) must be a tensor \(3,\): one number for each class"),
        ({"weight": [1.0, 1.0, 1.0]}, r"weight \(=\[1.0, 1.0, 1.0\]\) must be a tensor \(3,\)"),
        ({"task_loss": binary_cross_entropy}, r"symmetric_kl compares softmax .* pass divergence=bernoulli_kl"),
        ({"task_loss": squared_error}, r"symmetric_kl compares softmax .* pass divergence=squared_difference"),
        ({"task_loss": squared_error, "label_smoothing": 0.1}, "belong to the cross-entropy"),
        ({"divergence": lambda z: z.sum()}, r"divergence=<lambda> returned shape \(\); it must return one value per"),
        ({"task_loss": lambda z, y: z}, r"task_loss=<lambda> returned shape \(4, 3\); it must return one value per"),
    ],
)
def test_arguments_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rdrop_loss(torch.zeros(4, 3), torch.tensor([0, 1]), **{"alpha": 1.0} | options)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ((3, 1, 4), float("nan"), "logit at example 1, position 1, class 4 is NaN"),
        ((0, 2, 0), float("inf"), "logit at example 0, position 2, class 0 is +inf"),
        ((2, 0, 3), float("-inf"), "logit at example 0, position 0, class 3 is -inf in some passes only"),
    ],
)
def test_a_logit_that_makes_the_loss_infinite_is_named(where, value, message):
    logits, labels = random_logits(4, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    logits[where] = value
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        rdrop_loss(logits, labels, alpha=1.0)


def test_a_masked_label_is_named():
    logits = random_logits(4, 3)
    logits[:, 2] = float("-inf")
    with pytest.raises(ValueError, match=r"example 1, class 2 is -inf and the label: its cross-entropy is infinite"):
        rdrop_loss(logits, torch.tensor([0, 2]), alpha=1.0)


def test_label_smoothing_over_masked_classes_is_explained():
    logits = random_logits(4, 3)
    logits[:, 2] = float("-inf")
    with pytest.raises(ValueError, match="logit at example 0, class 2 is -inf, and soft labels or label smoothing"):
        rdrop_loss(logits, torch.tensor([0, 1]), alpha=1.0, label_smoothing=0.1)


@pytest.mark.parametrize("label", [5, -1])
def test_a_label_out_of_range_is_named(label):
    with pytest.raises(ValueError, match=rf"label {label} at example 1 is outside \[0, 5\)"):
        rdrop_loss(random_logits(4, 5), torch.tensor([0, label]), alpha=1.0)


def test_float_labels_for_classes_are_explained():
    with pytest.raises(ValueError, match=r"cannot be class indices; for numbers pass task_loss=squared_error"):
        rdrop_loss(random_logits(4, 5), torch.tensor([0.0, 1.0]), alpha=1.0)


def test_zeros_and_ones_for_classes_are_explained():
    with pytest.raises(ValueError, match=r"as many dimensions as the logits.*task_loss=binary_cross_entropy"):
        rdrop_loss(random_logits(4, 5), torch.ones(2, 5, dtype=torch.long), alpha=1.0)


REGRESSION = {"task_loss": squared_error, "divergence": squared_difference}
YES_OR_NO = {"task_loss": binary_cross_entropy, "divergence": bernoulli_kl}
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_number_to_learn_that_is_not_finite_is_named(value, column):
    labels = torch.tensor([1.0, 2.0, value])
    where = "example 2, class 0" if column else "example 2"
    with pytest.raises(ValueError, match=rf"label {value} at {where} must be a finite number"):
        rdrop_loss(random_logits(6, 1), labels[:, None] if column else labels, alpha=1.0, **REGRESSION)


@pytest.mark.parametrize("column", [False, True])
def test_an_output_of_a_regression_that_is_not_finite_is_named(column):
    logits, labels = random_logits(8, 1), torch.zeros(4)
    logits[3] = NAN
    with pytest.raises(ValueError, match="logit at example 3, class 0 is NaN"):
        rdrop_loss(logits, labels[:, None] if column else labels, alpha=1.0, **REGRESSION)


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.long])
def test_a_number_that_looks_like_ignore_index_counts(shape, dtype):
    labels = torch.tensor([0, IGNORED, 0, 0], dtype=dtype).view(shape)
    assert rdrop_loss(torch.zeros(8, 1), labels, alpha=1.0, **REGRESSION).loss == 2500


def test_a_number_that_looks_like_ignore_index_counts_for_a_callable_too():
    options = {"task_loss": lambda z, y: (z[..., 0] - y).abs(), "divergence": squared_difference}
    assert rdrop_loss(torch.zeros(8, 1), torch.tensor([0.0, IGNORED, 0, 0]), alpha=1.0, **options).loss == 25


@pytest.mark.parametrize("value", [-1.0, -1, IGNORED, 2.0, NAN, INFINITY])
def test_yes_and_no_outside_zero_and_one_are_named(value):
    labels = torch.tensor([[1, 0, 1], [0, 1, value]])  # whole numbers, where the value is one
    with pytest.raises(ValueError, match=rf"label {value:g} at example 1, class 2 must be in \[0, 1\]: 1 for yes"):
        rdrop_loss(torch.zeros(4, 3), labels, alpha=1.0, **YES_OR_NO)


def test_a_task_loss_of_ones_own_may_leave_out_labels_that_are_not_known():
    def known(logits, labels):
        values = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0), reduction="none")
        return (values * (labels >= 0)).sum(-1)

    labels = torch.tensor([[1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    loss = rdrop_loss(torch.zeros(4, 3), labels, alpha=1.0, task_loss=known, divergence=bernoulli_kl).loss
    assert loss.item() == pytest.approx(2 * 0.693147, abs=1e-5)


def test_yes_and_no_of_one_output_may_leave_out_the_last_dimension():
    logits, labels = random_logits(6, 1), torch.tensor([0.0, 1.0, 1.0])
    expected = rdrop_loss(logits, labels[:, None], alpha=1.0, **YES_OR_NO)
    assert rdrop_loss(logits, labels, alpha=1.0, **YES_OR_NO) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [1.0, 1.0, 0.0],
            "labels at example 1 add up to 2, and probabilities to 1; for zeros and ones pass task_loss=b",
        ),
        ([0.0, 0.0, 0.0], "labels at example 1 add up to 0, and probabilities to 1"),
        ([-0.5, 1.0, 0.5], "label -0.5 at example 1, class 0 is no probability"),
        ([NAN, 0.5, 0.5], "label nan at example 1, class 0 is no probability"),
    ],
)
def test_rows_that_are_no_probabilities_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        rdrop_loss(random_logits(4, 3), torch.tensor([[0.2, 0.3, 0.5], row]), alpha=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_may_be_rounded(dtype):
    labels = random_logits(50, 1000, dtype=torch.float32).softmax(-1).to(dtype)
    rdrop_loss(random_logits(100, 1000, dtype=torch.float32), labels, alpha=1.0)


@pytest.mark.parametrize("options", [{}, {"task_passes": ()}, {"task_loss": lambda z, y: z.sum(-1)}])
def test_a_softmax_over_one_class_is_refused(options):
    with pytest.raises(ValueError, match=r"logits \(8, 1\) for 1 class: a softmax needs two.*its loss 0 for ever"):
        rdrop_loss(random_logits(8, 1), torch.zeros(4, dtype=torch.long), alpha=1.0, **options)


def test_classes_that_count_from_one_are_recognized():
    with pytest.raises(ValueError, match=r"label 3 at example 1 is outside \[0, 3\).*count from 0, and these from 1"):
        rdrop_loss(random_logits(6, 3), torch.tensor([1, 3, 2]), alpha=1.0)


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("row", [[3e38, -3e38, 0.0], [2e38, -1e38, 0.0], [0.0, torch.finfo().min, 0.0]])
@pytest.mark.parametrize("implementation", ["auto", "reference"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_finite_logits_give_a_finite_loss_or_say_that_it_overflows(label, row, implementation, smoothing):
    logits = torch.tensor([row] * 6)
    logits[4] = 0.0
    options = {"alpha": 1.0, "label_smoothing": smoothing, "implementation": implementation}
    try:
        found = rdrop_loss(logits, torch.full((3,), label), **options).loss
    except ValueError as error:
        found = str(error)
    assert "overflows torch.float32" in found if isinstance(found, str) else found.isfinite()


def test_a_position_that_is_finite_does_not_become_an_error_by_the_sum_over_all():
    logits, labels = torch.tensor([[2e38, -1e38, 0.0]] * 4), torch.tensor([1, 1])
    assert rdrop_loss(logits, labels, alpha=1.0, reduction="none").loss.isfinite().all()
    with pytest.raises(
        ValueError, match=r"the sum over the positions overflows torch.float32: task losses of up to 3e"
    ):
        rdrop_loss(logits, labels, alpha=1.0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own, from inside torch
@pytest.mark.skipif(cpu.why_not() is not None, reason="the reference raises an error")
@pytest.mark.parametrize("label", [-1, -2, 5])
def test_a_label_that_no_check_has_seen_makes_the_loss_nan_unless_it_is_ignored(label):
    @torch.compile(backend="eager")
    def loss(labels: Tensor, ignore_index: int) -> Tensor:
        return rdrop_loss(logits, labels, alpha=1.0, ignore_index=ignore_index).loss

    logits, labels = random_logits(4, 5, dtype=torch.float32), torch.tensor([0, label])
    assert loss(labels, IGNORED).isnan()
    assert loss(labels, label).isfinite()


def test_what_a_callable_makes_of_an_ignored_position_never_matters():
    def log_of_logit(logits: Tensor, labels: Tensor) -> Tensor:
        return logits.gather(-1, labels[:, None])[:, 0].abs().log()  # of the zeros there: -inf

    logits = random_logits(6, 5).requires_grad_()
    loss = rdrop_loss(logits, torch.tensor([0, IGNORED, 2]), alpha=1.0, task_loss=log_of_logit).loss
    loss.backward()
    rows = [0, 2, 3, 5]
    kept = logits.detach()[rows].requires_grad_()
    expected = rdrop_loss(kept, torch.tensor([0, 2]), alpha=1.0, task_loss=log_of_logit).loss
    expected.backward()
    assert torch.equal(loss, expected)
    assert torch.equal(logits.grad[rows], kept.grad)
    assert not logits.grad[[1, 4]].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_loss_that_is_scaled_in_place_leaves_the_terms_as_they_are(alpha, reduction):
    loss, task_loss, divergence = rdrop_loss(random_logits(4, 5), torch.arange(2), alpha=alpha, reduction=reduction)
    before = task_loss.clone(), divergence.clone()
    loss /= 4
    assert torch.equal(task_loss, before[0])
    assert torch.equal(divergence, before[1])


def test_check_logits_names_labels_too():
    with pytest.raises(ValueError, match="label nan at example 1 must be a finite number"):
        check_logits(random_logits(4, 1), torch.tensor([0.0, NAN]))
    with pytest.raises(ValueError, match=r"label 7 at example 0 is outside \[0, 5\)"):
        check_logits(random_logits(4, 5), torch.tensor([7, IGNORED]))


def test_check_logits_is_silent_on_good_logits():
    logits = random_logits(4, 5)
    logits[:, 3] = float("-inf")
    check_logits(logits, torch.tensor([0, IGNORED]))


def test_check_logits_names_the_class_that_soft_labels_or_smoothing_make_infinite():
    logits = random_logits(4, 5)
    check_logits(logits, several := torch.tensor([[1.0, 1, 0, 0, 0]] * 2), task_loss=binary_cross_entropy)
    with pytest.raises(ValueError, match=r"labels at example 0 add up to 2, and probabilities to 1"):
        check_logits(logits, several)
    logits[:, 4] = float("-inf")
    message = "logit at example 0, class 4 is -inf, and soft labels or label smoothing give its class probability"
    with pytest.raises(ValueError, match=message):
        check_logits(logits, torch.full((2, 5), 0.2))
    with pytest.raises(ValueError, match=message):
        check_logits(logits, torch.tensor([0, 1]), label_smoothing=0.1)
    check_logits(logits, torch.tensor([IGNORED, IGNORED]), label_smoothing=0.1)
    check_logits(logits, torch.tensor([[0.5, 0.5, 0, 0, 0]] * 2))


@pytest.mark.parametrize(
    ("task_loss", "divergence"), [(squared_error, squared_difference), (binary_cross_entropy, bernoulli_kl)]
)
def test_only_a_softmax_masks_a_class_with_minus_infinity(task_loss, divergence):
    logits = random_logits(4, 2)
    logits[:, 1] = float("-inf")
    losses = {"task_loss": task_loss, "divergence": divergence}
    labels = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    for check in (
        lambda: rdrop_loss(logits, labels, alpha=1.0, **losses),
        lambda: check_logits(logits, labels, **losses),
    ):
        with pytest.raises(ValueError, match="logit at example 0, class 1 is -inf, and only of a softmax does that"):
            check()


def test_check_logits_names_numbers_that_overflow():
    logits = torch.tensor([1.0, 1e30, 1.0, 1e30])
    with pytest.raises(ValueError, match=r"task loss is inf at example 1, from logits as large as 1e\+30"):
        check_logits(logits, torch.zeros(2), task_loss=squared_error)


def test_check_logits_takes_the_weight_of_a_masked_class():
    logits = random_logits(4, 3)
    logits[:, 2] = float("-inf")
    labels, options = torch.tensor([0, 1]), {"label_smoothing": 0.1, "weight": torch.tensor([1.0, 1.0, 0.0])}
    assert rdrop_loss(logits, labels, alpha=1.0, **options).loss.isfinite()
    check_logits(logits, labels, **options)


def test_symmetric_kl_of_one_pass_is_an_error():
    with pytest.raises(ValueError, match=r"passes \(1, 4\) must be \(m, ..., V\) with m >= 2"):
        symmetric_kl(torch.zeros(1, 4))


def test_cross_entropy_of_every_kind_is_torchs():
    logits, labels = random_logits(5, 3, 4), torch.randint(0, 4, (5, 3))
    weight = torch.linspace(0.5, 2, 4, dtype=torch.float64)
    for smoothing, w in itertools.product((0.0, 0.2), (None, weight)):
        expected = F.cross_entropy(
            logits.transpose(1, 2), labels, weight=w, label_smoothing=smoothing, reduction="none"
        )
        torch.testing.assert_close(cross_entropy(logits, labels, label_smoothing=smoothing, weight=w), expected)


@pytest.mark.parametrize("size", [(3,), (3, 3)])
def test_logits_of_a_convolution_whose_classes_come_first_are_refused_where_all_sizes_agree(
    size: tuple[int, ...],
) -> None:
    """Three classes at 3 or 3 x 3 positions: the shapes fit either way."""
    convolution = torch.nn.Conv1d(2, 3, 1) if len(size) == 1 else torch.nn.Conv2d(2, 3, 1)
    x, labels = torch.randn(4, 2, *size), torch.zeros(4, *size, dtype=torch.long)
    logits = convolution(torch.cat([x, x]))
    for first in (logits, torch.cat([convolution(x), convolution(x)])):
        with pytest.raises(ValueError, match=r"come from a convolution.* pass logits.movedim\(1, -1\)"):
            rdrop_loss(first, labels, alpha=1.0)
    loss = rdrop_loss(logits.movedim(1, -1), labels, alpha=1.0).loss
    assert torch.isclose(loss, torch.nn.functional.cross_entropy(logits, torch.cat([labels, labels])))


# ------------------------------------------------------------------------------------------------ half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_class_weights_in_half_precision_are_added_up_in_single(dtype):
    """The sum of 2,000 weights is beyond float16, and of many more beyond what bfloat16 counts exactly."""
    logits, labels = random_logits(4000, 3, dtype=torch.float32), torch.arange(2000) % 3
    weight = torch.tensor([1.0, 30.0, 200.0])
    expected = rdrop_loss(logits, labels, alpha=1.0, weight=weight)
    found = rdrop_loss(logits, labels, alpha=1.0, weight=weight.to(dtype))
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_torch_default_dtype_does_not_reach_the_loss():
    logits, labels = random_logits(8, 5, dtype=torch.float32), torch.arange(4)
    expected = rdrop_loss(logits, labels, alpha=1.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        overwritten = rdrop_loss(logits.clone().requires_grad_().mul(1.0), labels, alpha=1.0, overwrite_logits=True)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(torch.stack(overwritten).detach(), torch.stack(expected), rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------ forward mode


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch itself
@pytest.mark.parametrize("implementation", ["auto", "reference"])
def test_a_forward_mode_derivative_is_refused_and_never_zero(implementation):
    logits, labels = random_logits(8, 5, dtype=torch.float32), torch.arange(4)

    def loss(logits: Tensor) -> Tensor:
        return rdrop_loss(logits, labels, alpha=1.0, implementation=implementation).loss

    with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
        torch.func.jvp(loss, (logits,), (logits,))
    with pytest.raises(NotImplementedError, match=r"take its gradient by loss\.backward"):
        torch.func.jacfwd(loss)(logits)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.vmap):
        with pytest.raises(NotImplementedError, match=r"no rules for torch.func .* by loss.backward"):
            transform(loss)(logits[None] if transform is torch.func.vmap else logits)


def test_check_logits_takes_the_numbers_of_a_regression():
    check_logits(random_logits(8, 1), torch.tensor([3, 7, 1, 9]))
    check_logits(random_logits(8), torch.tensor([3.0, 7.0, 1.0, 9.0]))
    with pytest.raises(ValueError, match="logit at example 1, class 0 is NaN"):
        check_logits(torch.tensor([0.0, torch.nan, 0.0, 0.0]), torch.tensor([3.0, 7.0]))

"""What a model is trained with, without a trainer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gradient_agreement import CASES, build
from torch import Tensor, nn

from rdrop import cross_entropy, linear_rdrop_loss, rdrop_loss, repeat_batch, squared_difference, squared_error
from rdrop.integrations.requirements import own_loss_is_known, require_randomness, why_gradient_is_wrong
from rdrop.integrations.targets import HEADS, Target, count_positions, head_of, targets_of

LABELS = torch.tensor([[0, 2, -100], [1, -100, -100]])
WEIGHT = torch.tensor([0.5, 2.0, 1.0])


def logits_of(passes: int = 2) -> Tensor:
    return torch.randn(passes * 2, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_the_plain_loss_is_torchs_summed(weight: Tensor | None, smoothing: float) -> None:
    logits = logits_of(1)
    expected = F.cross_entropy(
        logits.flatten(0, 1), LABELS.flatten(), weight=weight, label_smoothing=smoothing, reduction="sum"
    )
    target = Target(LABELS, class_weight=weight)
    assert torch.equal(target.plain_loss(logits, smoothing), expected)
    torch.testing.assert_close(target.task_losses(logits, smoothing).sum(), expected)
    assert target.plain_loss(logits.bfloat16(), smoothing).dtype == torch.float32


def test_the_plain_loss_refuses_labels_as_the_other_does() -> None:
    for labels, logits, message in (
        (torch.tensor([0, 3]), torch.zeros(2, 3), r"label 3 at example 1 is outside \[0, 3\)"),
        (torch.tensor([0, 0]), torch.zeros(2, 1), "for 1 class: a softmax needs two"),
    ):
        with pytest.raises(ValueError, match=message):
            Target(labels).plain_loss(logits)
    numbers = Target(torch.tensor([[float("nan")]]), task_loss=squared_error, divergence=squared_difference)
    with pytest.raises(ValueError, match="label nan at example 0, class 0 must be a finite number"):
        numbers.plain_loss(torch.zeros(1, 1))


def test_counts_are_those_of_the_weighted_mean() -> None:
    assert Target(LABELS).count().tolist() == [3, 3]
    assert Target(LABELS, class_weight=WEIGHT).count().tolist() == [3, 3.5]
    assert count_positions(torch.zeros(4, 5)) == 4
    target = Target(LABELS, class_weight=WEIGHT)
    terms = target.weighed_by(target.count()).rdrop_loss(logits_of(), alpha=2.0, num_items=3)
    expected = rdrop_loss(logits_of(), LABELS, alpha=2.0, weight=WEIGHT)
    torch.testing.assert_close(terms.loss, expected.loss)


def test_counts_of_class_weights_in_half_precision_do_not_overflow() -> None:
    labels, weight = torch.arange(3000) % 3, torch.tensor([1.0, 30.0, 200.0])
    found = Target(labels, class_weight=weight.half())
    assert found.count().tolist() == [3000, 231_000]
    scaled = found.weighed_by(torch.tensor([3000.0, 0.01])).class_weight
    assert scaled is not None
    assert scaled.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_few_bits_are_those_of_sixty_four(dtype: torch.dtype) -> None:
    labels = torch.tensor([156, 1, 2, 156]) if dtype == torch.uint8 else torch.tensor([-100, 1, 2, -100])
    assert Target(labels.to(dtype)).count().tolist() == Target(labels).count().tolist()
    assert count_positions(labels.to(dtype)) == count_positions(labels)


def test_functional_dropout_under_a_head_of_zeros_is_named_as_a_cause() -> None:
    with pytest.raises(ValueError, match=r"If it calls F.dropout, a head that starts at zero hides it: use nn.Dropout"):
        require_randomness(nn.Linear(3, 2), [torch.zeros(4, 2)], 2)


def test_from_hidden_states_it_is_the_same_loss() -> None:
    layer, hidden = nn.Linear(4, 3), torch.randn(4, 3, 4)
    target = Target(LABELS, class_weight=WEIGHT)
    terms = target.linear_rdrop_loss(hidden, layer.weight, layer.bias, alpha=2.0)
    assert terms == linear_rdrop_loss(hidden, layer.weight, LABELS, layer.bias, alpha=2.0, class_weight=WEIGHT)


@pytest.mark.parametrize("name", CASES)
def test_a_model_of_transformers_says_what_it_is_trained_with(name: str) -> None:
    case = CASES[name]
    model: Any = case.model().double()
    batch = case.batches[0]
    assert head_of(model) in HEADS
    outputs = model(**batch)
    for target in targets_of(model, batch):
        assert target.logits(outputs).shape[:-1] == target.labels.shape[: target.labels.dim() - 1] or (
            target.logits(outputs).shape[:-1] == target.labels.shape
        )
    if not case.label_smoothing:
        own_loss_is_known(model, outputs, targets_of(model, batch))


def test_another_model_is_refused_with_what_to_say() -> None:
    assert head_of(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match=r"Linear is none of the model classes.*one Target\(labels, ...\) per output"):
        targets_of(nn.Linear(2, 2), {})


def test_what_r_drop_needs_is_seen_without_a_trainer() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    outputs = model(repeat_batch(torch.randn(2, 4)))
    with pytest.raises(ValueError, match="nothing is random in Sequential while it trains"):
        require_randomness(model, [outputs], 2)
    require_randomness(model, [outputs + torch.randn_like(outputs)], 2)
    require_randomness(nn.Sequential(nn.Dropout(0.1)), [outputs], 2)
    assert why_gradient_is_wrong(build(CASES["causal LM"])) is None


def test_one_softmax_is_what_a_kernel_computes() -> None:
    assert Target(LABELS).is_one_softmax
    assert not Target(LABELS, task_loss=lambda z, y: cross_entropy(z, y)).is_one_softmax


def test_logits_with_virtual_tokens_in_front_are_refused_with_the_reason() -> None:
    logits = torch.randn(2, 8, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"each of \(8,\) positions, and labels \(2, 3\).*Prompt tuning .*take LoRA"):
        Target(LABELS).logits({"logits": logits})

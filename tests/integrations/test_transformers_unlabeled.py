"""`unlabeled_dataset` of the Trainer: the divergence alone of examples without labels, exact, in their own order."""

import re
from typing import Any

import pytest
import torch
from datasets import Dataset
from gradient_agreement import (
    ALPHA,
    CASES,
    arguments,
    bert_classifier,
    build,
    gradients_of,
    loss_by_hand,
    train,
    worst_difference,
)
from torch import Tensor

from rdrop.integrations.transformers import RDropTrainer
from rdrop.integrations.transformers.unlabeled import UnlabeledOrder

CLASSIFY, TAG = CASES["sequence classification"], CASES["token classification"]
HEADS = ("sequence classification", "multi-label", "regression", "question answering", "multiple choice")
POSITIONS = ("token classification", "causal LM, Llama", "sequence to sequence")
LABELS = ("labels", "start_positions", "end_positions")


def logged(trainer: Any, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def without_labels(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: part for name, part in batch.items() if name not in LABELS} for batch in batches]


def all_count(case: Any, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The same batches where every example has a label, for the loss by hand."""
    zeroed = [{name: torch.zeros_like(part) for name, part in batch.items() if name in LABELS} for batch in batches]
    return [batch | labels for batch, labels in zip(batches, zeroed, strict=True)]


def gradient_by_hand(case: Any, labeled: Any, unlabeled: Any, passes: int = 2) -> Any:
    model = build(case, passes)
    loss, *_ = loss_by_hand(case, model, labeled, alpha=ALPHA, passes=passes)
    _, _, divergence = loss_by_hand(case, model, unlabeled, alpha=ALPHA, passes=passes)
    (loss + ALPHA / 2 * divergence).backward()
    return gradients_of(model), divergence


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", [*HEADS, *POSITIONS])
def test_the_gradient_has_the_divergence_of_the_unlabeled_beside_the_loss(
    name: str, accumulation: int, folder: str
) -> None:
    """Ragged batches; where a model predicts for each position, labels say which of them count."""
    case = CASES[name]
    labeled, others = case.batches[:accumulation], case.batches[2 : 2 + accumulation]
    given = without_labels(others) if name in HEADS else others
    settings = {"gradient_accumulation_steps": accumulation}
    found = train(RDropTrainer, build(case), labeled, folder, settings, alpha=ALPHA, unlabeled_dataset=given)
    counted = all_count(case, others) if name in HEADS else others
    expected, divergence = gradient_by_hand(case, labeled, counted)
    assert worst_difference(found.gradients[0], expected) < 1e-12
    assert logged(found, "unlabeled_divergence") == [pytest.approx(divergence.item())]


@pytest.mark.parametrize("method", [{"micro_batches": 2}, {"passes": 3}], ids=["micro-batches", "three passes"])
def test_micro_batches_and_passes_of_the_unlabeled_are_exact(method: Any, folder: str) -> None:
    passes = method.get("passes", 2)
    labeled, others = TAG.batches[:1], TAG.batches[1:2]
    found = train(RDropTrainer, build(TAG, passes), labeled, folder, alpha=ALPHA, unlabeled_dataset=others, **method)
    expected, _ = gradient_by_hand(TAG, labeled, others, passes)
    assert worst_difference(found.gradients[0], expected) < 1e-12


def test_what_labels_say_but_for_minus_100_is_not_read(folder: str) -> None:
    others = [batch | {"labels": batch["labels"].masked_fill(batch["labels"] > 0, 2)} for batch in TAG.batches[1:2]]
    one, other = (
        train(RDropTrainer, build(TAG), TAG.batches[:1], folder, alpha=ALPHA, unlabeled_dataset=given).gradients[0]
        for given in (others, TAG.batches[1:2])
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


NO_LABELS = [
    ("sequence classification", -1),  # as in GLUE's test splits
    ("sequence classification", -100),
    ("regression", float("nan")),
    ("multi-label", -1.0),
    ("question answering", -1),
]


@pytest.mark.parametrize(("name", "label"), NO_LABELS)
def test_labels_of_examples_with_one_prediction_are_not_read(name: str, label: float, folder: str) -> None:
    case = CASES[name]
    without = without_labels(case.batches[1:2])
    odd = {part: torch.full_like(value, label) for part, value in case.batches[1].items() if part in LABELS}
    one, other = (
        train(RDropTrainer, build(case), case.batches[:1], folder, alpha=ALPHA, unlabeled_dataset=given).gradients[0]
        for given in (without, [without[0] | odd])
    )
    assert all(torch.equal(one[part], other[part]) for part in one)


def test_unlabeled_examples_none_of_which_counts_are_told(folder: str) -> None:
    others = [TAG.batches[1] | {"labels": torch.full_like(TAG.batches[1]["labels"], -100)}]
    with pytest.warns(UserWarning, match="1 of 1 updates had no position of unlabeled_dataset that counts"):
        train(RDropTrainer, build(TAG), TAG.batches[:1], folder, alpha=ALPHA, unlabeled_dataset=others)


def test_unlabeled_batches_shrink_with_the_labeled_ones_where_memory_ends(folder: str) -> None:
    """A device that holds ten rows of a forward: of two passes, batches of 5."""
    rows: list[int] = []

    def forward(module: Any, inputs: Any, named: dict[str, Tensor]) -> None:
        if module.training and len(named["input_ids"]) > 10:
            raise RuntimeError("CUDA out of memory. (as a device would say)")
        rows.append(len(named["input_ids"]))

    model = build(CLASSIFY)
    model.register_forward_pre_hook(forward, with_kwargs=True)
    row = {name: part[0] for name, part in CLASSIFY.batches[0].items()}
    trainer = RDropTrainer(
        model=model,
        args=arguments(folder, max_steps=1, per_device_train_batch_size=8, auto_find_batch_size=True),
        train_dataset=[row] * 16,
        unlabeled_dataset=without_labels([row]) * 16,
        alpha=1.0,
    )
    trainer.train()
    assert max(rows) <= 10
    assert rows[-2:] == [2 * trainer._train_batch_size] * 2


def test_an_update_cut_short_has_all_its_unlabeled_batches(folder: str) -> None:
    """Of three batches, two an update: the second update has one labeled batch and two unlabeled ones."""
    settings = {"gradient_accumulation_steps": 2, "max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}
    others = without_labels(CLASSIFY.batches[:2])
    found = train(
        RDropTrainer, build(CLASSIFY), CLASSIFY.batches[:3], folder, settings, alpha=ALPHA, unlabeled_dataset=others
    )
    first, second = logged(found, "unlabeled_divergence")
    assert first == pytest.approx(second)


# ------------------------------------------------------------------------------------------------------ the order


def test_every_example_is_seen_once_before_any_is_seen_again_whatever_the_cut() -> None:
    sizes = {"size": 7, "seed": 3}
    alone = UnlabeledOrder(batch_size=3, per_update=1, process=0, processes=1, **sizes)
    seen = [index for update in range(7) for [batch] in [alone.of_update(update)] for index in batch]
    assert [sorted(seen[start : start + 7]) for start in (0, 7, 14)] == [list(range(7))] * 3
    assert seen[:7] != seen[7:14]
    both = [UnlabeledOrder(batch_size=1, per_update=3, process=rank, processes=2, **sizes) for rank in (0, 1)]
    together = [[batch[rank] for batch in zip(*(one.of_update(0) for one in both), strict=True)] for rank in (0, 1)]
    interleaved = [index for pair in zip(*together, strict=True) for [index] in pair]
    assert interleaved == seen[:6]


def resumable(folder: str, workers: int = 0, **method: Any) -> Any:
    torch.manual_seed(0)
    rows = [{"input_ids": [2 + i % 9] * 4, "attention_mask": [1] * 4, "labels": i % 3} for i in range(6)]
    settings = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 2,
        "remove_unused_columns": True,
        "dataloader_num_workers": workers,
    }
    unlabeled = Dataset.from_list(
        [{"input_ids": [2 + i] * 4, "attention_mask": [1] * 4, "text": "x"} for i in range(5)]
    )
    return RDropTrainer(
        model=bert_classifier(num_labels=3, hidden_dropout_prob=0.2),
        args=arguments(folder, **settings),
        train_dataset=Dataset.from_list(rows),
        alpha=3.0,
        unlabeled_dataset=unlabeled,
        unlabeled_batch_size=3,
        **method,
    )


@pytest.mark.parametrize("every", [1, 2])
def test_training_with_unlabeled_examples_resumes_to_the_same_bits(every: int, folder: str) -> None:
    whole, resumed = resumable(folder, every=every), resumable(folder, every=every)
    whole.train()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    assert len(logged(whole, "unlabeled_divergence")) == 6 // every
    assert logged(resumed, "unlabeled_divergence") == logged(whole, "unlabeled_divergence")
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))


def test_workers_of_the_loader_change_nothing(folder: str) -> None:
    alone = resumable(folder)
    alone.train()
    helped = resumable(folder, workers=1)
    helped.train()
    assert all(torch.equal(a, b) for a, b in zip(alone.model.parameters(), helped.model.parameters(), strict=True))


def test_plain_training_does_not_see_the_unlabeled(folder: str) -> None:
    class NeverRead(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            raise AssertionError("read")

    plain = train(RDropTrainer, build(CLASSIFY), CLASSIFY.batches, folder, {"max_steps": 2}, alpha=0.0)
    given = NeverRead(CLASSIFY.batches)
    with_them = train(
        RDropTrainer, build(CLASSIFY), CLASSIFY.batches, folder, {"max_steps": 2}, alpha=0.0, unlabeled_dataset=given
    )
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), with_them.model.parameters(), strict=True))
    assert logged(with_them, "unlabeled_divergence") == []


# ------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"unlabeled_dataset": []}, "unlabeled_dataset (a list) must have one example or more, a length and an index"),
        ({"unlabeled_dataset": iter(CLASSIFY.batches)}, "(a list_iterator) must have one example or more"),
        ({"unlabeled_batch_size": 2}, "unlabeled_batch_size (=2) must be an integer >= 1, for the examples of"),
        ({"unlabeled_dataset": CLASSIFY.batches, "unlabeled_batch_size": 0}, "unlabeled_batch_size (=0) must be an"),
    ],
)
def test_unlabeled_examples_that_cannot_be_taken_are_refused(method: Any, message: str, folder: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        train(RDropTrainer, build(CLASSIFY), CLASSIFY.batches, folder, alpha=1.0, **method)


def test_positions_that_are_not_known_to_count_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"Give it 'labels', 0 at every position to compare and -100 elsewhere"):
        train(
            RDropTrainer,
            build(TAG),
            TAG.batches,
            folder,
            alpha=1.0,
            unlabeled_dataset=without_labels(TAG.batches),
        )


def test_an_optimizer_that_steps_in_backward_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RDropTrainer, "_steps_in_backward", lambda self: "optim='lomo'")
    with pytest.raises(ValueError, match="unlabeled_dataset must be left out with optim='lomo', whose every backward"):
        train(RDropTrainer, build(CLASSIFY), CLASSIFY.batches, folder, alpha=1.0, unlabeled_dataset=CLASSIFY.batches)

"""Examples without labels: R-Drop learns from them by the divergence alone, plain training does not see them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.experiments.signals import send
from tests.experiments.tiny_runs import POSITIONS, RECIPE, VOCABULARY, TinyNetwork, TinyTask, final_state
from torch import Tensor, nn

from rdrop import rdrop_loss, repeat_batch
from rdrop.experiments.launch import cli
from rdrop.experiments.randomness import seed_all
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.task import Batch, load_task
from rdrop.experiments.tasks.text_classification.recipes import TEXT_CLASSIFICATION
from rdrop.experiments.training import trainer
from rdrop.experiments.training.checkpoints import load
from rdrop.experiments.training.optimization import build_optimizer, learning_rate_at
from rdrop.experiments.training.order import DataOrder, UnlabeledOrder
from rdrop.experiments.training.preemption import Preempted
from rdrop.experiments.training.trainer import TrainingError, train

SIZE, PER_UPDATE = 20, 6


class SemiSupervised(TinyTask):
    unlabeled_per_update = PER_UPDATE

    def __init__(self, recipe: Any) -> None:
        super().__init__(recipe)
        generator = torch.Generator().manual_seed(1)
        self.more = torch.randint(VOCABULARY, (SIZE, POSITIONS), generator=generator)
        self.counts = torch.zeros_like(self.more)  # class 0, which nothing may learn
        self.counts[: SIZE // 2, 3:] = -100

    def unlabeled_size(self) -> int:
        return SIZE

    def unlabeled_lengths(self) -> None:
        return None

    def unlabeled_batch(self, indices: list[int], epoch: int) -> Batch:
        return {"inputs": self.more[indices], "labels": self.counts[indices]}


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_task", SemiSupervised)


def final_weights(folder: Path) -> dict[str, Tensor]:
    model = TinyNetwork(0.0)
    load(folder / "checkpoints", RECIPE.updates).restore_model(model)
    return model.state_dict()


def test_an_update_is_the_loss_of_the_labeled_and_the_divergence_of_the_others_bit_for_bit(tmp_path: Path) -> None:
    recipe = RECIPE.replace(accumulation=1)
    train(recipe, tmp_path)

    task = SemiSupervised(recipe)
    order = UnlabeledOrder(recipe.seed, SIZE, None, PER_UPDATE, parts=1)
    seed_all(recipe.seed, "model")
    model = task.build_model().train()
    optimizer = build_optimizer(recipe, model)
    for step in range(recipe.updates):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        _, rows = DataOrder(recipe, task.train_size(), None).at(step)
        _, others = order.at(step)
        seed_all(recipe.seed, "step", step, 0, 0)
        labels = task.targets[rows]
        logits = model(repeat_batch(task.inputs[rows]))
        count = (labels != -100).sum()
        rdrop_loss(logits, labels, alpha=2.0, label_smoothing=0.1, num_items=count).loss.backward()
        seed_all(recipe.seed, "step", step, 1, 0)
        logits = model(repeat_batch(task.more[others]))
        _, _, divergence = rdrop_loss(logits, task.counts[others], alpha=2.0)
        loss = rdrop_loss(logits, task.counts[others], alpha=2.0, task_passes=()).loss
        assert loss == divergence  # times alpha / 2
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    found, expected = final_weights(tmp_path), model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_plain_training_does_not_see_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(RECIPE.replace(alpha=0.0), tmp_path / "with")
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    train(RECIPE.replace(alpha=0.0), tmp_path / "without")
    assert final_state(tmp_path / "with") == final_state(tmp_path / "without")


def test_they_are_seen_by_the_updates_that_use_r_drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    unlabeled_batch = SemiSupervised.unlabeled_batch

    def noted(task: SemiSupervised, indices: list[int], epoch: int) -> Batch:
        seen.append(indices)
        return unlabeled_batch(task, indices, epoch)

    monkeypatch.setattr(SemiSupervised, "unlabeled_batch", noted)
    train(RECIPE.replace(every=2), tmp_path)  # updates 2, 4, 6 and 8 of eight
    del seen[0]  # the fingerprint's
    assert [len(indices) for indices in seen] == [PER_UPDATE // RECIPE.accumulation] * 4 * RECIPE.accumulation


def test_each_is_seen_once_an_epoch_and_the_order_is_a_pure_function() -> None:
    order = UnlabeledOrder(5, SIZE, None, PER_UPDATE, parts=1)
    epochs = [order.at(step) for step in range(6)]
    assert [epoch for epoch, _ in epochs] == [0, 0, 0, 1, 1, 1]
    first = [row for _, rows in epochs[:3] for row in rows]
    assert len(set(first)) == 3 * PER_UPDATE
    assert UnlabeledOrder(5, SIZE, None, PER_UPDATE, parts=1).at(4)[1].tolist() == epochs[4][1].tolist()
    assert UnlabeledOrder(6, SIZE, None, PER_UPDATE, parts=1).at(4)[1].tolist() != epochs[4][1].tolist()


def test_an_update_does_not_depend_on_how_they_are_cut(tmp_path: Path) -> None:
    fixed = {"model.fixed": True}
    for accumulation in (1, 2):
        train(RECIPE.replace(accumulation=accumulation, **fixed), tmp_path / str(accumulation))
    one, two = final_weights(tmp_path / "1"), final_weights(tmp_path / "2")
    assert max((one[name] - two[name]).abs().max().item() for name in one) <= 1e-6
    rows = [RunFolder(tmp_path / name).metrics() for name in ("1", "2")]
    assert rows[0][0]["divergence"] == pytest.approx(rows[1][0]["divergence"], rel=1e-5)


@pytest.mark.parametrize("member", ["unlabeled_size", "unlabeled_lengths", "unlabeled_batch", "unlabeled_per_update"])
def test_a_task_that_half_learns_from_unlabeled_examples_is_refused(
    member: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would train without them, and say nothing."""
    monkeypatch.delattr(SemiSupervised, member)
    with pytest.raises(
        TrainingError, match=f"SemiSupervised has no {member}: a task that learns from examples without"
    ):
        train(RECIPE, tmp_path)


def test_a_stopped_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    train(RECIPE, tmp_path / "whole")

    def stop(progress: trainer.Progress) -> None:
        if progress.step == 5:
            send()

    with pytest.raises(Preempted):
        train(RECIPE, tmp_path / "stopped", on_progress=stop)
    train(RECIPE, tmp_path / "stopped")
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


def test_a_run_is_not_resumed_with_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Preempted):
        train(RECIPE, tmp_path, on_progress=lambda progress: send())
    original = SemiSupervised.unlabeled_batch
    monkeypatch.setattr(
        SemiSupervised, "unlabeled_batch", lambda task, indices, epoch: original(task, indices[::-1], epoch)
    )
    with pytest.raises(TrainingError, match="the training data are not those with which"):
        train(RECIPE, tmp_path)


@pytest.mark.parametrize("per_update", [1, SIZE + 1])
def test_too_few_or_too_many_an_update_is_refused(
    per_update: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SemiSupervised, "unlabeled_per_update", per_update)
    with pytest.raises(
        TrainingError, match=rf"data\.unlabeled_batch \(={per_update}\) must be at least .* \(=2\), .*20"
    ):
        train(RECIPE, tmp_path)


# --------------------------------------------------------------------------------------------------- a file of texts


def texts(path: Path, lines: list[str]) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def semi_supervised(tmp_path: Path, unlabeled: list[str], **changes: object) -> Any:
    labeled = texts(tmp_path / "train.csv", ["text,label", *(f"text {i},{'ab'[i % 2]}" for i in range(40))])
    file = texts(tmp_path / "more.csv", unlabeled)
    data = {"data.tiny": False, "data.train": labeled, "data.unlabeled": file, "data.unlabeled_batch": 4}
    return TEXT_CLASSIFICATION.tiny().replace(**(data | changes))


def test_a_file_of_texts_needs_no_label_column_and_reads_none(tmp_path: Path) -> None:
    task = load_task(semi_supervised(tmp_path, ["id,text", "1,one text", "2,another"]))
    assert (task.unlabeled_size(), task.train_size()) == (2, 32)  # type: ignore[attr-defined]
    batch = task.unlabeled_batch([1], 0)  # type: ignore[attr-defined]
    assert batch["labels"].tolist() == [0]
    labeled = load_task(semi_supervised(tmp_path, ["text,label", "one text,z", "another,z"]))  # no class of the others
    assert torch.equal(labeled.unlabeled_batch([1], 0)["input_ids"], batch["input_ids"])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["text", "one", " ", "two"], r"more\.csv:3: the row is empty; delete it"),
        (["id,text", "1,one", "2, ", "3,two"], r"more\.csv:3: the text is empty"),
        (["words", "one"], r"more\.csv:1: .*text"),
        (["text,text2", "one,two"], r"more\.csv: one of .*train\.csv and this file has a second text"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused(tmp_path: Path, lines: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_task(semi_supervised(tmp_path, lines))


def test_few_labels_of_a_file_and_all_its_texts_without_them(tmp_path: Path) -> None:
    given = {"data.labels": 6, "data.unlabeled": "all", "batch_size": 4}
    task, other = (load_task(semi_supervised(tmp_path, ["text"], **given).replace(seed=seed)) for seed in (0, 1))
    whole = load_task(semi_supervised(tmp_path, ["text"], **{"data.unlabeled": None}))
    assert (task.train_size(), task.unlabeled_size()) == (6, whole.train_size())  # type: ignore[attr-defined]
    labels = task.train_batch(list(range(6)), 0)["labels"]
    assert labels.bincount().tolist() == [3, 3]
    assert not task.unlabeled_batch([0, 5], 0)["labels"].any()  # type: ignore[attr-defined]
    assert len(task._tests) == len(other._tests)  # type: ignore[attr-defined]
    rows = [task.train_batch(list(range(6)), 0)["input_ids"], other.train_batch(list(range(6)), 0)["input_ids"]]
    assert rows[0].shape != rows[1].shape or not torch.equal(*rows)
    with pytest.raises(DataError, match=r"has 32 examples to train on, and data\.labels=33"):
        load_task(semi_supervised(tmp_path, ["text"], **given | {"data.labels": 33}))
    with pytest.raises(DataError, match=r"has 2 classes, and data\.labels=1 leaves some without an example; raise it"):
        load_task(semi_supervised(tmp_path, ["text"], **given | {"data.labels": 1, "batch_size": 1}))


def test_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "load_task", load_task)
    labeled = texts(tmp_path / "train.csv", ["text,label", *(f"text {i},{'ab'[i % 2]}" for i in range(40))])
    more = texts(tmp_path / "more.csv", ["text", *(f"text {i}" for i in range(30))])
    own = ["tiny=true", "data.tiny=false", "--train", labeled, "--unlabeled", more, "data.unlabeled_batch=8"]
    short = ["updates=4", "evaluate_every=4", "warmup_steps=1"]
    runs = ["--runs", str(tmp_path / "runs"), "--seeds", "1", "--no-double-batch"]
    assert cli.run(["compare", "text-classification", *own, *short, *runs]) == 0
    assert "R-Drop" in capsys.readouterr().out
    recipes = [RunFolder(path.parent).recipe() for path in (tmp_path / "runs").rglob("result.json")]
    assert [recipe["data"]["unlabeled"] for recipe in recipes] == [more, more]

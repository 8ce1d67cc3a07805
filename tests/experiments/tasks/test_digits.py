"""The digits: which images a run sees, and a network that has something for R-Drop to act on."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rdrop.dropout import dropout_sources
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.tasks.digits.recipes import DIGITS, DigitsRecipe
from rdrop.experiments.tasks.digits.task import Digits, stratified_draw
from rdrop.experiments.tasks.task import load_task
from rdrop.experiments.training.trainer import train

SMALL = DIGITS.replace(
    **{"data.train_labels": 40, "data.valid_size": 30, "data.test_size": 50, "data.shift": 0},
    **{"model.layers": 1, "model.hidden_size": 16, "model.intermediate_size": 16, "model.heads": 2},
)


def rows(recipe: DigitsRecipe) -> dict[str, list[int]]:
    return {name: split.tolist() for name, split in Digits(recipe).splits.items()}


def test_the_splits_are_disjoint_and_have_their_sizes() -> None:
    splits = rows(DIGITS)
    data = DIGITS.data
    assert [len(splits[name]) for name in ("train", "valid", "test")] == [
        data.train_labels,
        data.valid_size,
        data.test_size,
    ]
    assert len({row for split in splits.values() for row in split}) == sum(map(len, splits.values()))


def test_the_seed_draws_the_labels_and_leaves_the_scored_images_alone() -> None:
    first, second = rows(SMALL), rows(SMALL.replace(seed=1))
    assert first["train"] != second["train"]
    assert first["valid"] == second["valid"]
    assert first["test"] == second["test"]
    assert rows(SMALL.replace(**{"data.split_seed": 1}))["test"] != first["test"]


def test_nothing_but_seed_and_data_decides_the_labels() -> None:
    changed = SMALL.replace(alpha=0.0, batch_size=16, updates=90, **{"model.layers": 2, "model.dropout": 0.3})
    assert rows(changed) == rows(SMALL)


def test_training_images_move_by_whole_pixels_and_no_further_than_asked() -> None:
    still, moving = Digits(SMALL.replace(**{"data.shift": 0})), Digits(SMALL.replace(**{"data.shift": 2}))
    images = still.train_batch(list(range(40)), 0)["pixel_values"]
    padded = F.pad(images, (2, 2, 2, 2), value=-1.0)
    places = set()
    for epoch in range(3):
        for whole, moved in zip(padded, moving.train_batch(list(range(40)), epoch)["pixel_values"], strict=True):
            found = {(y, x) for y in range(5) for x in range(5) if torch.equal(whole[:, y : y + 8, x : x + 8], moved)}
            assert found
            places |= found
    assert len(places) == 25


def test_how_an_image_moves_depends_on_seed_epoch_and_index_alone() -> None:
    task = Digits(SMALL.replace(**{"data.shift": 2}))
    together = task.train_batch([3, 5, 8], 1)["pixel_values"]
    assert torch.equal(task.train_batch([5], 1)["pixel_values"][0], together[1])
    assert not torch.equal(task.train_batch([3, 5, 8], 2)["pixel_values"], together)


@pytest.mark.parametrize("size", [1, 10, 37, 400])
def test_labels_are_drawn_evenly_over_the_classes(size: int) -> None:
    labels = np.arange(1000) % 10
    drawn = stratified_draw(np.arange(500), labels, size, seed=0)
    counts = np.bincount(labels[drawn], minlength=10)
    assert len(set(drawn.tolist())) == size
    assert max(counts) - min(counts) <= 1


def test_a_class_that_is_rare_gives_all_it_has() -> None:
    labels = np.array([0] * 3 + [1] * 97)
    assert np.bincount(labels[stratified_draw(np.arange(100), labels, 50, seed=0)]).tolist() == [3, 47]


def test_batches_are_images_in_minus_one_to_one_with_their_labels() -> None:
    task = Digits(SMALL)
    batch = task.train_batch([3, 1], epoch=0)
    assert batch["pixel_values"].shape == (2, 1, 8, 8)
    assert batch["pixel_values"].min() >= -1
    assert batch["pixel_values"].max() <= 1
    again = task.train_batch([1, 3], epoch=5)
    assert torch.equal(again["pixel_values"].flip(0), batch["pixel_values"])
    assert torch.equal(again["labels"].flip(0), batch["labels"])


def test_the_recipe_builds_the_network_it_says() -> None:
    recipe = SMALL.replace(**{"model.dropout": 0.25, "model.attention_dropout": 0.35, "model.layers": 3})
    task = load_task(recipe)
    model = task.build_model().train()
    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (3, 16, 2)
    assert task.logits(model, task.train_batch([0, 1, 2], epoch=0)).shape == (3, 10)
    rates = {source.rate for source in dropout_sources(model) if source.active}
    assert rates == {0.25, 0.35}


def test_attention_dropout_alone_makes_two_passes_differ() -> None:
    task = Digits(SMALL.replace(**{"model.dropout": 0.0, "model.attention_dropout": 0.5}))
    model = task.build_model().train()
    batch = task.train_batch([0, 0], epoch=0)
    first, second = task.logits(model, batch)
    assert not torch.equal(first, second)


class Nowhere(DigitsRecipe):
    TASK = "rdrop.experiments.tasks.digits.task:Numbers"


def test_a_recipe_whose_task_is_not_there_is_told_so() -> None:
    with pytest.raises(RecipeError, match=r"Nowhere.TASK .*digits.task:Numbers'\) is not there"):
        load_task(Nowhere.parse(SMALL.saved()))


def test_both_losses_learn_the_labeled_images(tmp_path: Path) -> None:
    recipe = SMALL.replace(updates=60, warmup_steps=6, evaluate_every=20, batch_size=20, learning_rate=1e-2)
    for alpha in (0.0, 1.0):
        result = train(recipe.replace(alpha=alpha), tmp_path / str(alpha))
        losses = [row["task_loss"] for row in RunFolder(tmp_path / str(alpha)).metrics() if row["kind"] == "train"]
        assert losses[-1] < losses[0]
        assert result["metric"] == "accuracy"
        assert set(result["valid"]) == set(result["test"]) == {"accuracy", "loss", "ece"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_compiled_model_trains_as_it_does_uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "kernels"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    recipe = SMALL.replace(updates=2, warmup_steps=0, evaluate_every=2, batch_size=20)
    losses = {}
    for compiled in (False, True):
        train(recipe.replace(compile=compiled), tmp_path / str(compiled))
        [row] = (row for row in RunFolder(tmp_path / str(compiled)).metrics() if row["kind"] == "train")
        losses[compiled] = row["task_loss"]
        assert row["divergence"] > 0  # two passes of the compiled model have two masks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert losses[True] == pytest.approx(losses[False], rel=0.1)  # the masks are others


def test_classes_without_a_label_and_a_model_that_says_one_class_are_noted() -> None:
    task = Digits(SMALL.replace(batch_size=9, **{"data.train_labels": 9, "data.valid_size": 100}))
    assert list(task.notes) == ["classes of train"]
    assert "no example of '" in task.notes["classes of train"]
    model = task.build_model().eval()
    torch.nn.init.zeros_(model.classifier.weight)
    torch.nn.init.constant_(model.classifier.bias, 0.0)
    model.classifier.bias.data[3] = 1.0
    task.evaluate(model, "valid")
    assert list(task.notes) == ["classes of train"]
    scores = task.evaluate(model, "test")
    assert task.notes["predictions on test"].startswith("all 50 are '3'")
    confidence = np.e / (np.e + 9)
    assert scores["ece"] == pytest.approx(abs(scores["accuracy"] - confidence), abs=1e-6)

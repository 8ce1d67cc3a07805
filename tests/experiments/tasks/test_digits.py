"""The digits: which images a run sees, and a network that has something for R-Drop to act on."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tests.experiments.signals import send
from tests.experiments.tiny_runs import final_state

from rdrop.dropout import dropout_sources
from rdrop.experiments.randomness import derived_seed, seed_all
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.tasks.digits.recipes import DIGITS_VIT, OF_THE_TRANSFORMER, DigitsRecipe
from rdrop.experiments.tasks.digits.task import Digits, read_digits
from rdrop.experiments.tasks.splits import stratified_draw
from rdrop.experiments.tasks.task import load_task
from rdrop.experiments.training.checkpoints import load
from rdrop.experiments.training.optimization import build_optimizer, learning_rate_at
from rdrop.experiments.training.order import DataOrder, UnlabeledOrder
from rdrop.experiments.training.preemption import Preempted
from rdrop.experiments.training.trainer import train

SMALL = DIGITS_VIT.replace(
    **{"data.train_labels": 40, "data.valid_size": 30, "data.test_size": 50, "data.shift": 0},
    **{"model.layers": 1, "model.hidden_size": 16, "model.intermediate_size": 16, "model.heads": 2},
)


def rows(recipe: DigitsRecipe) -> dict[str, list[int]]:
    return {name: split.tolist() for name, split in Digits(recipe).splits.items()}


def test_the_splits_are_disjoint_and_have_their_sizes() -> None:
    splits = rows(DIGITS_VIT)
    data = DIGITS_VIT.data
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


def test_each_view_moves_an_image_in_its_own_way_and_the_first_as_always() -> None:
    task = Digits(SMALL.replace(**{"data.shift": 2, "data.unlabeled": "all"}))
    for batch in (task.train_batch, task.unlabeled_batch):
        rows = list(range(20))
        views = [batch(rows, 1, view)["pixel_values"] for view in range(3)]
        assert torch.equal(views[0], batch(rows, 1)["pixel_values"])
        assert torch.equal(views[1][[3, 5]], batch([3, 5], 1, 1)["pixel_values"])
        assert not any(torch.equal(views[a], views[b]) for a, b in ((0, 1), (0, 2), (1, 2)))
        assert not torch.equal(batch(rows, 2, 1)["pixel_values"], views[1])
        assert torch.equal(batch(rows, 1)["labels"], batch(rows, 1, 2)["labels"])


def test_the_bits_of_a_shifted_batch_are_those_of_earlier_versions() -> None:
    recipe = SMALL.replace(**{"data.shift": 1})
    task, rows = Digits(recipe), [0, 7, 19]
    generator = np.random.default_rng(derived_seed(recipe.seed, "shift", 3))
    moves = generator.integers(0, 3, (40, 2))[rows].tolist()
    padded = F.pad(Digits(SMALL).train_batch(rows, 0)["pixel_values"], (1, 1, 1, 1), value=-1.0)
    expected = torch.stack([image[:, y : y + 8, x : x + 8] for image, (y, x) in zip(padded, moves, strict=True)])
    assert torch.equal(task.train_batch(rows, 3)["pixel_values"], expected)


def test_unlabeled_images_are_all_that_are_not_scored_and_carry_no_label() -> None:
    task = Digits(SMALL.replace(**{"data.unlabeled": "all"}))
    pool = task.unlabeled_size()
    assert (Digits(SMALL).unlabeled_size(), pool) == (0, 1797 - 30 - 50)
    batch = task.unlabeled_batch(list(range(pool)), 0)
    assert not batch["labels"].any()

    def images(values: torch.Tensor) -> set[bytes]:
        return {image.numpy().tobytes() for image in values}

    everything = images(batch["pixel_values"])
    assert len(everything) == pool
    assert images(task.train_batch(list(range(40)), 0)["pixel_values"]) < everything
    for split in ("valid", "test"):
        assert not images(task._images[task.splits[split]]) & everything


def test_views_without_shifts_are_refused_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match=r'^views="each": needs data\.shift above 0'):
        SMALL.replace(views="each")
    assert SMALL.replace(views="each", **{"data.shift": 1}).method.label() == "R-Drop (alpha 1, a view per pass)"


MLP = SMALL.replace(
    **{"model.kind": "mlp", "model.layers": 2, "model.hidden_size": 24, "model.dropout": 0.25, "data.shift": 1},
    **dict.fromkeys(f"model.{key}" for key in OF_THE_TRANSFORMER),
)


def test_the_mlp_has_its_hidden_layers_and_dropout_after_each() -> None:
    task = load_task(MLP)
    model = task.build_model().train()
    assert [tuple(weight.shape) for weight in model.parameters() if weight.dim() == 2] == [(24, 64), (24, 24), (10, 24)]
    assert [source.rate for source in dropout_sources(model) if source.active] == [0.25, 0.25]
    assert task.logits(model, task.train_batch([0, 1, 2], epoch=0)).shape == (3, 10)
    assert task.evaluate(model.eval(), "valid").keys() == {"loss", "accuracy", "ece"}


@pytest.mark.parametrize("key", OF_THE_TRANSFORMER)
def test_keys_of_the_other_kind_of_model_are_refused(key: str) -> None:
    given = SMALL.value(f"model.{key}")
    with pytest.raises(RecipeError, match=rf"^model\.{key}=.*: must be null for model\.kind"):
        MLP.replace(**{f"model.{key}": given})
    with pytest.raises(RecipeError, match=rf"^model\.{key}=null: must be given for model\.kind"):
        SMALL.replace(**{f"model.{key}": None})


SEMI_SUPERVISED = MLP.replace(
    views="each", updates=6, warmup_updates=0, evaluate_every=3, checkpoint_every=2, batch_size=8,
    **{"data.unlabeled": "all", "data.unlabeled_batch": 12},
)  # fmt: skip


def test_an_update_with_unlabeled_images_and_a_view_per_pass_is_the_loss_by_hand(tmp_path: Path) -> None:
    recipe = SEMI_SUPERVISED.replace(updates=2, evaluate_every=2, checkpoint_every=2, alpha_schedule="quadratic")
    train(recipe, tmp_path)

    task = Digits(recipe)
    seed_all(recipe.seed, "model")
    model = task.build_model().train()
    optimizer = build_optimizer(recipe, model)
    for step, alpha in enumerate((0.25, 1.0)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        epoch, rows = DataOrder(recipe, task.train_size(), None).at(step)
        first, second = (task.train_batch(rows.tolist(), epoch, view) for view in (0, 1))
        seed_all(recipe.seed, "step", step, 0, 0)
        logits = model(torch.cat([first["pixel_values"], second["pixel_values"]]))
        p, q = logits.chunk(2)
        tasks = (F.cross_entropy(p, first["labels"]) + F.cross_entropy(q, second["labels"])) / 2
        (tasks + alpha / 2 * divergence_by_hand(p, q)).backward()
        epoch, rows = UnlabeledOrder(recipe.seed, task.unlabeled_size(), None, 12, parts=1).at(step)
        first, second = (task.unlabeled_batch(rows.tolist(), epoch, view) for view in (0, 1))
        seed_all(recipe.seed, "step", step, 1, 0)
        p, q = model(torch.cat([first["pixel_values"], second["pixel_values"]])).chunk(2)
        (alpha / 2 * divergence_by_hand(p, q)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    trained = Digits(recipe).build_model()
    load(tmp_path / "checkpoints", 2).restore_model(trained)
    for (name, found), expected in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6, msg=name)


def divergence_by_hand(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    return ((p.exp() * (p - q)).sum(-1) + (q.exp() * (q - p)).sum(-1)).mean() / 2


@pytest.mark.parametrize("changes", [{}, {"every": 2, "accumulation": 2}, {"dropout": [0.1, 0.4]}])
def test_a_stopped_run_with_views_of_unlabeled_images_ends_in_the_same_bits(tmp_path: Path, changes: dict) -> None:
    recipe = SEMI_SUPERVISED.replace(**changes)
    train(recipe, tmp_path / "whole")
    with pytest.raises(Preempted):
        train(recipe, tmp_path / "stopped", on_progress=lambda progress: send() if progress.step == 3 else None)
    train(recipe, tmp_path / "stopped")
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")


def test_plain_training_does_not_see_the_unlabeled_images(tmp_path: Path) -> None:
    recipe = SEMI_SUPERVISED.replace(method=SEMI_SUPERVISED.method.plain())
    train(recipe, tmp_path / "with")
    train(recipe.replace(**{"data.unlabeled": None}), tmp_path / "without")
    assert final_state(tmp_path / "with") == final_state(tmp_path / "without")


def test_views_alone_are_enough_for_r_drop_to_act_on_a_model_without_dropout(tmp_path: Path) -> None:
    recipe = SEMI_SUPERVISED.replace(updates=3, **{"model.dropout": 0.0})
    train(recipe, tmp_path)
    rows = RunFolder(tmp_path).metrics()
    assert all(row["divergence"] > 0 for row in rows if row["kind"] == "train")
    with pytest.raises(RecipeError, match="all passes would be the same"):
        recipe.replace(views="same")


def test_how_an_image_moves_depends_on_seed_epoch_and_index_alone() -> None:
    task = Digits(SMALL.replace(**{"data.shift": 2}))
    together = task.train_batch([3, 5, 8], 1)["pixel_values"]
    assert torch.equal(task.train_batch([5], 1)["pixel_values"][0], together[1])
    assert not torch.equal(task.train_batch([3, 5, 8], 2)["pixel_values"], together)


def test_the_images_and_classes_are_scikit_learns() -> None:
    images, classes = read_digits()
    expected = load_digits()
    assert np.array_equal(images, expected.images)
    assert np.array_equal(classes, expected.target)


@pytest.mark.parametrize("size", [1, 10, 37, 400])
def test_labels_are_drawn_evenly_over_the_classes(size: int) -> None:
    labels = np.arange(1000) % 10
    drawn = stratified_draw(np.arange(500), labels, size, seed=0)
    counts = np.bincount(labels[drawn], minlength=10)
    assert len(set(drawn.tolist())) == size
    assert max(counts) - min(counts) <= 1


def test_the_draw_is_that_of_earlier_versions() -> None:
    """Each in the order of a permutation, those that are the first of their class before those that are the second."""
    labels = np.random.default_rng(3).integers(0, 7, 300)
    shuffled = np.random.default_rng(5).permutation(np.arange(250))
    classes = labels[shuffled]
    ranks = np.array([np.count_nonzero(classes[:place] == label) for place, label in enumerate(classes)])
    expected = shuffled[np.argsort(ranks, kind="stable")[:60]]
    assert stratified_draw(np.arange(250), labels, 60, seed=5).tolist() == expected.tolist()


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

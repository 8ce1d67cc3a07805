"""All recipes together: the paper's data sets are there, each can be replayed, and a stopped run loses nothing."""

import json
from pathlib import Path

import pytest
from tests.experiments.tiny_runs import final_state

from rdrop.experiments.recipes import PUBLISHED, RECIPES, TASKS, load_recipe
from rdrop.experiments.training.trainer import Progress, train

# 6 data sets of translation, 1 of summarization, 8 of GLUE, 1 of language modeling, 2 of image classification.
PAPER = {
    "IWSLT14 De-En": ["iwslt14-de-en", "iwslt14-en-de"],
    "IWSLT14 En-Es": ["iwslt14-en-es", "iwslt14-es-en"],
    "IWSLT17 En-Fr": ["iwslt17-en-fr", "iwslt17-fr-en"],
    "IWSLT17 En-Zh": ["iwslt17-en-zh", "iwslt17-zh-en"],
    "WMT14 En-De": ["wmt14-en-de"],
    "WMT14 En-Fr": ["wmt14-en-fr"],
    "CNN/DailyMail": ["cnn-dailymail"],
    **{
        f"GLUE {task}": [f"glue-{task}", f"glue-{task}-roberta-large"]
        for task in ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
    },
    "WikiText-103": ["wikitext-103", "wikitext-103-adaptive"],
    "CIFAR-100": ["cifar-100-vit-b16", "cifar-100-vit-l16"],
    "ImageNet": ["imagenet-vit-b16", "imagenet-vit-l16"],
}


def test_the_paper_s_18_data_sets_are_recipes_with_its_figures() -> None:
    assert len(PAPER) == 18
    for names in PAPER.values():
        for name in names:
            assert name in RECIPES
            assert PUBLISHED[name], name


def test_what_is_published_belongs_to_a_recipe_and_says_where_it_stands() -> None:
    assert set(PUBLISHED) <= set(RECIPES)
    for rows in PUBLISHED.values():
        for row in rows:
            assert row.source
            assert row.baseline is not None or row.rdrop is not None


def test_every_task_has_recipes_and_one_for_one_s_own_data() -> None:
    tasks = {task.replace("_", "-") for task in TASKS}
    assert {recipe.task for recipe in RECIPES.values()} == tasks
    assert tasks <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_saved_recipe_is_the_recipe(name: str, tmp_path: Path) -> None:
    for recipe in (RECIPES[name], RECIPES[name].tiny()):
        path = tmp_path / "recipe.json"
        path.write_text(recipe.to_json())
        assert load_recipe(path) == recipe
        assert json.loads(recipe.to_json())["name"] in (name, f"{name}-tiny")


def test_no_two_recipes_are_the_same_run() -> None:
    recipes = [recipe for found in RECIPES.values() for recipe in (found, found.tiny())]
    assert len({recipe.digest() for recipe in recipes}) == len(recipes)


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_of_each_recipe_stopped_in_the_middle_ends_in_the_same_bits(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name].tiny().replace(updates=6, warmup_steps=1, evaluate_every=3, checkpoint_every=2)
    train(recipe, tmp_path / "whole")

    def stop(progress: Progress) -> None:
        if progress.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "stopped", on_progress=stop)
    train(recipe, tmp_path / "stopped")
    assert final_state(tmp_path / "stopped") == final_state(tmp_path / "whole")

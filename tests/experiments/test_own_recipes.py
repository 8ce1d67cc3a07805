"""Recipes and tasks of somebody else's package, run by the name of the module that holds them."""

import json
import sys
from pathlib import Path

import pytest

from rdrop.experiments import metrics, recipes
from rdrop.experiments.launch import cli
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import find_recipe
from rdrop.experiments.run_folder import find_runs

MODULE = '''
from typing import Literal

import torch
from torch import nn

from rdrop import cross_entropy, symmetric_kl
from rdrop.experiments import metrics
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.recipe import ModelSection, Recipe
from rdrop.experiments.recipe.settings import Count, Probability, Section

metrics.add(metrics.Metric("errors", "wrong signs", higher_is_better=False, decimals=1))


class SignsData(Section):
    size: Count


class SignsModel(ModelSection):
    dropout: Probability


class SignsRecipe(Recipe):
    """The sign of a sum."""

    TASK = f"{__name__}:Signs"
    task: Literal["signs"]
    data: SignsData
    model: SignsModel


class Signs:
    metric = "errors"
    task_loss, divergence = staticmethod(cross_entropy), staticmethod(symmetric_kl)

    def __init__(self, recipe):
        self.recipe, self.notes = recipe, {}
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(recipe.data.size, 4, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def build_model(self):
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(self.recipe.model.dropout), nn.Linear(8, 2))

    def train_size(self):
        return len(self.x)

    def train_lengths(self):
        return None

    def train_batch(self, indices, epoch):
        return {"x": self.x[indices], "labels": self.y[indices]}

    def special_ids(self):
        return frozenset()

    def unknown_id(self):
        return None

    def logits(self, model, batch):
        return model(batch["x"])

    def labels(self, batch):
        return batch["labels"]

    def evaluate(self, model, split):
        with torch.no_grad():
            logits = model(self.x)
        errors = (logits.argmax(-1) != self.y).sum().item()
        return {"loss": nn.functional.cross_entropy(logits, self.y).item(), "errors": float(errors)}


RECIPE = SignsRecipe(
    name="signs", task="signs", method=Method(alpha=1.0), updates=20, batch_size=10, learning_rate=0.05,
    schedule="constant", warmup_updates=0, weight_decay=0.0, evaluate_every=10, checkpoint_every=10,
    data=SignsData(size=40), model=SignsModel(dropout=0.2),
)
NUMBER = 3
'''


@pytest.fixture
def name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the present folder, and afterwards no trace of it."""
    (tmp_path / "their_signs.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(recipes, "_CLASSES", dict(recipes._CLASSES))
    monkeypatch.setattr(metrics, "METRICS", dict(metrics.METRICS))
    monkeypatch.delitem(sys.modules, "their_signs", raising=False)
    return "their_signs:RECIPE"


def test_an_own_recipe_is_listed_compared_checked_and_reported(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", name]) == 0
    assert "data.size" in capsys.readouterr().out
    assert cli.run(["compare", name, "updates=10", "--seeds", "2", "--no-double-batch"]) == 0
    assert "wrong signs" in capsys.readouterr().out
    assert {run.recipe["task"] for run in find_runs("runs") if run.recipe} == {"signs"}
    assert cli.run(["check", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kernels"] is not None
    assert found["model"] == "Sequential"  # that of the task, not what the check wraps around it


def test_a_report_needs_the_runs_of_an_own_task_and_not_its_code(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", name]) == 0
    monkeypatch.delitem(metrics.METRICS, "errors")
    monkeypatch.delitem(sys.modules, "their_signs")
    assert cli.run(["report"]) == 0
    assert "wrong signs" in capsys.readouterr().out


def test_the_saved_recipe_of_an_own_task_is_read_once_its_own_is_known(name: str) -> None:
    recipe = find_recipe(name)
    Path("recipe.json").write_text(recipe.to_json())
    assert find_recipe("recipe.json") == recipe
    recipes._CLASSES.pop("signs")
    with pytest.raises(RecipeError, match=r"for a task of your own, name its recipe as package\.module:NAME"):
        find_recipe("recipe.json")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("their_sines:RECIPE", r"cannot be imported: No module named 'their_sines'; write package.module:NAME"),
        ("their_signs:RECIPES", r"RECIPES of their_signs is not there; it must be a Recipe"),
        ("their_signs:NUMBER", r"NUMBER of their_signs is a int; it must be a Recipe"),
    ],
)
@pytest.mark.usefixtures("name")
def test_what_is_no_recipe_is_named(wrong: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", wrong]) == 2
    with pytest.raises(RecipeError, match=message):
        find_recipe(wrong)


def test_a_task_with_the_name_of_another_is_refused(name: str) -> None:
    Path("taken.py").write_text(MODULE.replace('"signs"', '"digits"'))
    with pytest.raises(RecipeError, match='task="digits": its task digits has another class of recipes'):
        find_recipe("taken:RECIPE")

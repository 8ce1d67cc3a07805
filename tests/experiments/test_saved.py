"""Runs of earlier versions: they are read, compared, reported and resumed as what they were."""

import json
import shutil
from pathlib import Path

import pytest

from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.launch import cli
from rdrop.experiments.launch.plan import Run
from rdrop.experiments.recipe.settings import added
from rdrop.experiments.recipes import RECIPES, load_recipe
from rdrop.experiments.run_folder import RunFolder, find_runs, saved
from rdrop.experiments.tasks.digits.recipes import DigitsData, DigitsRecipe
from rdrop.experiments.training.trainer import train

FORMAT_1 = Path(__file__).parent / "format_1"
FILES = sorted(FORMAT_1.rglob("recipe.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_a_recipe_of_format_1_is_the_run_that_it_was(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.digest() == path.parent.name
    assert saved.upgraded(json.loads(path.read_text())) == recipe.saved() == saved.upgraded(recipe.saved())


def test_the_keys_and_tasks_of_format_1_have_their_names_of_today() -> None:
    texts = next(load_recipe(path) for path in FILES if "text-classification" in str(path))
    language = next(load_recipe(path) for path in FILES if "language-modelling" in str(path))
    assert (texts.value("data.unlabeled"), texts.value("data.unlabeled_batch")) == ("texts.jsonl", 2)
    assert (language.name, language.task) == ("language-modeling-tiny", "language-modeling")


def test_finished_runs_of_format_1_are_compared_and_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(FORMAT_1 / "finished", runs)
    digits = next(c for c in comparisons(find_runs(runs)) if c.name == "digits-vit-tiny")
    assert [arm.label for arm in digits.arms] == ["baseline", "R-Drop (alpha 1)", "baseline, twice the batch"]
    assert digits.seeds == (0, 1)
    assert digits.gaps() == ()
    assert cli.run(["report", str(runs)]) == 0
    assert "left out" not in capsys.readouterr().out
    assert "digits-tiny" in (runs / "report.html").read_text()


def test_a_stopped_run_of_format_1_goes_on(tmp_path: Path) -> None:
    shutil.copytree(FORMAT_1 / "stopped", tmp_path / "runs")
    recipe = load_recipe(FORMAT_1 / "stopped/digits-tiny/79153e5ba043/recipe.json")
    run = Run.of("stopped", recipe, tmp_path / "runs")
    result = train(recipe, run.folder)
    assert (result["resumed"], result["updates"]) == (1, 20)
    assert [row["step"] for row in RunFolder(run.folder).metrics() if row["kind"] == "valid"] == [10, 20]


def test_a_run_begun_under_an_earlier_name_stays_in_its_folder(tmp_path: Path) -> None:
    recipe = RECIPES["language-modeling"].tiny()
    assert Run.of("", recipe, tmp_path).folder == tmp_path / "language-modeling-tiny" / recipe.digest()
    (tmp_path / "language-modelling-tiny" / recipe.digest()).mkdir(parents=True)
    assert Run.of("", recipe, tmp_path).folder == tmp_path / "language-modelling-tiny" / recipe.digest()


class GrownData(DigitsData):
    views: str = added("same", "A key that earlier versions did not have.")


class GrownRecipe(DigitsRecipe):
    data: GrownData


def test_a_key_that_was_added_means_its_old_behavior_where_it_is_missing() -> None:
    before = RECIPES["digits-vit"].saved()
    grown = GrownRecipe.parse(before)
    assert grown.data.views == "same"
    assert grown.saved() == before, "the same run as before the key was there"
    other = grown.replace(**{"data.views": "each"})
    assert other.saved()["data"] == {**before["data"], "views": "each"}
    assert other.digest() != grown.digest()
    assert GrownRecipe.parse(other.saved()) == other


def test_the_vision_transformer_of_the_digits_keeps_its_runs_under_its_new_name(tmp_path: Path) -> None:
    today = RECIPES["digits-vit"]
    of_format_2 = {**today.saved(), "format": 2, "name": "digits"}
    folder = tmp_path / "digits" / today.digest()
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(json.dumps(of_format_2))
    assert load_recipe(folder / "recipe.json") == today
    assert RunFolder(folder).recipe() == today.saved()
    assert Run.of("", today, tmp_path).folder == folder
    assert saved.upgraded({**of_format_2, "name": "digits-tiny"})["name"] == "digits-vit-tiny"
    assert saved.upgraded(RECIPES["digits"].saved())["name"] == "digits", "of today's format it is the recipe of today"
    assert RECIPES["digits"].digest() != today.digest()

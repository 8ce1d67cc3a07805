"""The recipes by name, what is published about each, and how one is found: in this project, in a file, in your code."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.published import Published
from rdrop.experiments.recipe.settings import RecipeError, nearest_name, typed
from rdrop.experiments.run_folder import saved

TASKS = (
    "translation",
    "summarization",
    "text_classification",
    "language_modeling",
    "image_classification",
    "digits",
)
"""The folders of the tasks, in the order in which they are listed.

The `recipes` of each has `RECIPES` and, by the name of the recipe, `PUBLISHED` and the `DATASETS` of which nothing is
published; and, if it has any, the `ARMS` of a recipe that brings its own.
"""
LARGEST_FILE_BYTES = 2**20


def _collect() -> tuple[
    dict[str, Recipe], dict[str, tuple[Published, ...]], dict[str, str], dict[str, tuple[str, ...]]
]:
    recipes: dict[str, Recipe] = {}
    arms: dict[str, tuple[str, ...]] = {}
    published: dict[str, tuple[Published, ...]] = {}
    datasets: dict[str, str] = {}
    for name in TASKS:
        module = import_module(f"rdrop.experiments.tasks.{name}.recipes")
        own: tuple[Recipe, ...] = module.RECIPES
        reported: Mapping[str, tuple[Published, ...]] = module.PUBLISHED
        recipes |= {recipe.name: recipe for recipe in own}
        published |= reported
        datasets |= {name: rows[0].dataset for name, rows in reported.items()} | module.DATASETS
        arms |= getattr(module, "ARMS", {})
    return recipes, published, datasets, arms


RECIPES, PUBLISHED, DATASETS, ARMS = _collect()
_CLASSES = {recipe.task: type(recipe) for recipe in RECIPES.values()}
"""The class that reads a saved recipe, by its task. One's own joins when its recipe is found by name."""


WHAT_IS_LEARNED = (
    *("hub", "hub_config", "glue", "source", "target", "labels", "train_pairs", "train_lines"),
    *("train_name", "test_name", "folds", "layout"),
)
"""The keys of `data` with another value of which a known data set is another: scores are not those of the published."""


def class_of(task: str) -> type[Recipe]:
    """Returns the class of the recipes of a task; of one's own that is not loaded, what all recipes have in common."""
    return _CLASSES.get(task, Recipe)


def find_recipe(name: str) -> Recipe:
    """Returns the recipe of that name; or one saved in a file, `.../recipe.json`; or your own, `package.module:NAME`.

    Your own module is looked for where Python looks, and in the present folder.
    """
    if name.endswith(".json"):
        return load_recipe(name)
    if ":" in name:
        return _import_recipe(name)
    name = saved.current_name(name)
    if name not in RECIPES:
        nearest = nearest_name(name, RECIPES)
        hint = "rdrop list shows all" if nearest is None else f"the nearest is {nearest}"
        rule = (
            f"no such recipe; {hint} (a saved one is a path that ends in .json, one of your own is written "
            "package.module:NAME)"
        )
        raise RecipeError("recipe", rule, value=name, nearest=nearest)
    return RECIPES[name]


def load_recipe(path: str | Path) -> Recipe:
    """Returns the recipe saved at `path`, e.g. `runs/digits/0123456789ab/recipe.json`, by any version of rdrop.

    A missing key is an error. A recipe of your own task needs its class: find it by `find_recipe` first.
    """
    try:
        return _parse(_read_json(Path(path)))
    except RecipeError as error:
        located = RecipeError(error.key, error.rule, value=error.value, nearest=error.nearest)
        located.args = (f"{path}: {error}",)
        raise located from None


def dataset_of(recipe: Mapping[str, Any]) -> str:
    """Returns what a run learned from, as a reader names it; `recipe` is what its recipe.json says.

    The data set of the recipe; of data of one's own, the file, the folder or the hub's name; else the recipe's name.
    """
    name, data = str(recipe["name"]), recipe.get("data")
    known = DATASETS.get(name.removesuffix("-tiny"))
    if not isinstance(data, Mapping):
        return known or name
    if data.get("tiny"):
        return "synthetic examples"
    # A data set that is known may lie in a folder; files of one's own take its place.
    for key in ("train",) if known else ("train", "folder", "hub"):
        if data.get(key):
            return str(data[key]).rstrip("/").rsplit("/", 1)[-1]
    entry = RECIPES.get(name.removesuffix("-tiny"))
    if known is None or entry is None:
        return known or name
    keys = [key for key in WHAT_IS_LEARNED if key in data and f"data.{key}" in entry.descriptions()]
    other = [typed(key, data[key]) for key in keys if data[key] != entry.value(f"data.{key}")]
    return f"{known} ({', '.join(other)})" if other else known


def _import_recipe(name: str) -> Recipe:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(module), attribute, None)
    except (ImportError, ValueError) as error:
        rule = f"cannot be imported: {error}; write package.module:NAME, of a module that Python finds from {here}"
        raise RecipeError("recipe", rule, value=name) from error
    if not isinstance(found, Recipe):
        kind = "is not there" if found is None else f"is a {type(found).__name__}"
        rule = f"{attribute} of {module} {kind}; it must be a Recipe (rdrop.experiments.recipe)"
        raise RecipeError("recipe", rule, value=name)
    known = _CLASSES.setdefault(found.task, type(found))
    if known is not type(found):
        rule = f"its task {found.task} has another class of recipes, {known.__module__}.{known.__name__}; rename it"
        raise RecipeError("task", rule, value=found.task)
    return found


def _parse(fields: dict[str, object]) -> Recipe:
    version = fields.get("format", 1)
    if not isinstance(version, int) or not 1 <= version <= saved.FORMAT:
        rule = f"this version of rdrop reads recipes of the formats 1 to {saved.FORMAT}; take the version that saved it"
        raise RecipeError("format", rule, value=version)
    fields = saved.upgraded(fields)
    task = fields.get("task")
    if not isinstance(task, str) or task not in _CLASSES:
        rule = (
            f"must be one of {', '.join(_CLASSES)}; for a task of your own, name its recipe as package.module:NAME, "
            "in evaluate by --recipe package.module:NAME"
        )
        raise RecipeError("task", rule, value=task)
    return _CLASSES[task].parse(fields)


def _read_json(path: Path) -> dict[str, object]:
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise RecipeError("recipe", f"a recipe has at most {LARGEST_FILE_BYTES} bytes")
        if not path.is_file():  # reading it may never end
            raise RecipeError("recipe", "is no file, but a folder, a pipe, a socket or a device; name a file")
        fields = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise RecipeError("recipe", error.strerror or str(error)) from None
    except UnicodeDecodeError:
        raise RecipeError("recipe", "is not UTF-8 text") from None
    except ValueError as error:  # an integer of thousands of digits is one too
        if isinstance(error, RecipeError):
            raise
        raise RecipeError("recipe", f"is not JSON: {error}") from None
    except RecursionError:
        raise RecipeError("recipe", "is nested too deeply") from None
    if not isinstance(fields, dict):
        raise RecipeError("recipe", "must be a JSON object of keys and values")
    return fields


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields: dict[str, object] = {}
    for key, value in pairs:
        if key in fields:
            raise RecipeError(key, "given twice", value=value)
        fields[key] = value
    return fields

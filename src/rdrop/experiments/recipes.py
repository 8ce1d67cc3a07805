"""The catalog: every recipe by its name, and what is published about it."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from rdrop.experiments.published import Published
from rdrop.experiments.recipe import Recipe, RecipeError, load_recipe, nearest_name

MODULES = (
    "translation",
    "summarization",
    "text_classification",
    "language_modeling",
    "image_classification",
    "digits",
)
"""One a task, in the order in which they are listed.

Each has `RECIPES` and, by the name of the recipe, `PUBLISHED` and the `DATASETS` of which nothing is published.
"""


def _collect() -> tuple[dict[str, Recipe], dict[str, tuple[Published, ...]], dict[str, str]]:
    recipes: dict[str, Recipe] = {}
    published: dict[str, tuple[Published, ...]] = {}
    datasets: dict[str, str] = {}
    for name in MODULES:
        module = import_module(f"rdrop.experiments.tasks.{name}.recipes")
        own: tuple[Recipe, ...] = module.RECIPES
        reported: Mapping[str, tuple[Published, ...]] = module.PUBLISHED
        recipes |= {recipe.name: recipe for recipe in own}
        published |= reported
        datasets |= {name: rows[0].dataset for name, rows in reported.items()} | module.DATASETS
    return recipes, published, datasets


RECIPES, PUBLISHED, DATASETS = _collect()


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or the one saved in that file, whose name ends in `.json`."""
    if name.endswith(".json"):
        return load_recipe(name)
    if name not in RECIPES:
        nearest = nearest_name(name, RECIPES)
        rule = f"no such recipe; the nearest is {nearest} (a saved one is a path that ends in .json)"
        raise RecipeError("recipe", rule, value=name, nearest=nearest)
    return RECIPES[name]


def dataset_of(recipe: Mapping[str, Any]) -> str:
    """What a run learned from, as a reader names it; `recipe` is what its recipe.json says.

    The data set of the catalog; of data of one's own, the file, the folder or the hub's name; else the recipe's name.
    """
    name, data = str(recipe["name"]), recipe.get("data")
    known = DATASETS.get(name.removesuffix("-tiny"))
    if not isinstance(data, Mapping):
        return known or name
    if data.get("tiny"):
        return "made-up examples"
    # A catalogd data set may lie in a folder; files of one's own take its place.
    for key in ("train",) if known else ("train", "folder", "hub"):
        if data.get(key):
            return str(data[key]).rstrip("/").rsplit("/", 1)[-1]
    return known or name

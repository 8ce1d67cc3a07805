"""The catalogue: every recipe by its name, and what is published about it."""

from collections.abc import Mapping
from importlib import import_module

from rdrop.experiments.published import Published
from rdrop.experiments.recipe import Recipe, RecipeError, load_recipe, nearest_name

MODULES = (
    "translation",
    "summarization",
    "text_classification",
    "language_modelling",
    "image_classification",
    "digits",
)
"""One a task, in the order in which they are listed. Each has `RECIPES`, and `PUBLISHED` by the name of the recipe."""


def _collect() -> tuple[dict[str, Recipe], dict[str, tuple[Published, ...]]]:
    recipes: dict[str, Recipe] = {}
    published: dict[str, tuple[Published, ...]] = {}
    for name in MODULES:
        module = import_module(f"{__name__}.{name}")
        own: tuple[Recipe, ...] = module.RECIPES
        reported: Mapping[str, tuple[Published, ...]] = module.PUBLISHED
        recipes |= {recipe.name: recipe for recipe in own}
        published |= reported
    return recipes, published


RECIPES, PUBLISHED = _collect()


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or the one saved in that file, whose name ends in `.json`."""
    if name.endswith(".json"):
        return load_recipe(name)
    if name not in RECIPES:
        nearest = nearest_name(name, RECIPES)
        rule = f"no such recipe; the nearest is {nearest} (a saved one is a path that ends in .json)"
        raise RecipeError("recipe", rule, value=name, nearest=nearest)
    return RECIPES[name]

"""The catalogue: every recipe by its name."""

from rdrop.experiments.recipe import Recipe, RecipeError, load_recipe, nearest_name
from rdrop.experiments.recipes.digits import DIGITS

RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in (DIGITS,)}


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or the one saved in that file, whose name ends in `.json`."""
    if name.endswith(".json"):
        return load_recipe(name)
    if name not in RECIPES:
        nearest = nearest_name(name, RECIPES)
        rule = f"no such recipe; the nearest is {nearest} (a saved one is a path that ends in .json)"
        raise RecipeError("recipe", rule, value=name, nearest=nearest)
    return RECIPES[name]

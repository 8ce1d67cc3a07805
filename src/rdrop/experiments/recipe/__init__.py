"""The recipe: all that determines a run. The contents page; `rdrop.experiments.recipes` has the recipes by name."""

from importlib import import_module
from typing import Any

from rdrop.experiments.recipe.method import Method as Method
from rdrop.experiments.recipe.recipe import SYNTHETIC as SYNTHETIC
from rdrop.experiments.recipe.recipe import DataFiles as DataFiles
from rdrop.experiments.recipe.recipe import DecodingSection as DecodingSection
from rdrop.experiments.recipe.recipe import ModelSection as ModelSection
from rdrop.experiments.recipe.recipe import NewOrPretrainedModel as NewOrPretrainedModel
from rdrop.experiments.recipe.recipe import Recipe as Recipe
from rdrop.experiments.recipe.recipe import override as override
from rdrop.experiments.recipe.recipe import with_excluded as with_excluded
from rdrop.experiments.recipe.settings import Count as Count
from rdrop.experiments.recipe.settings import Probability as Probability
from rdrop.experiments.recipe.settings import RecipeError as RecipeError
from rdrop.experiments.recipe.settings import Section as Section
from rdrop.experiments.recipe.settings import Seed as Seed
from rdrop.experiments.recipe.settings import nearest_name as nearest_name


def __getattr__(name: str) -> Any:
    """`load_recipe` stands beside the recipes now, which need this module."""
    if name != "load_recipe":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}s"), name)

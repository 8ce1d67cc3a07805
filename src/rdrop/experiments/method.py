"""Moved to `rdrop.experiments.recipe.method`."""

from rdrop.experiments.recipe.method import *  # noqa: F403

"""Moved to `rdrop.experiments.recipe.published`."""

from rdrop.experiments.recipe.published import *  # noqa: F403

"""Moved to `rdrop.experiments.recipe.settings`."""

from rdrop.experiments.recipe.settings import *  # noqa: F403

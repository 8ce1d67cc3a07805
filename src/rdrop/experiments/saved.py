"""Moved."""

from rdrop.experiments.run_folder.saved import *  # noqa: F403

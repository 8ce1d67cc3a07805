"""Moved."""

from rdrop.experiments.run_folder.predictions import *  # noqa: F403

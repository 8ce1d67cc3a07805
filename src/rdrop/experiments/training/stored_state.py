"""A state.json of a checkpoint that is not what a run writes, though its manifest knows it, is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rdrop.experiments.run_folder import what_is_damaged_in_state
from rdrop.experiments.training.checkpoints import STATE, CheckpointError


def require_whole_state(checkpoint: Path) -> None:
    """Raises `CheckpointError` if an entry of a checkpoint's state.json is of another kind than it should be."""
    problem = what_is_damaged_in_state(checkpoint / STATE)
    if problem is not None:
        raise CheckpointError(problem)


@contextmanager
def damaged_state_named(folder: Path) -> Iterator[None]:
    """Raises that error in the place of what such an entry leads to where the checkpoints in `folder` are used."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
        for file in sorted(folder.glob(f"step-*/{STATE}"), reverse=True):
            require_whole_state(file.parent)
        raise

"""The weights of a finished run as the start of another: Bi-SimCut, or any training in two stages."""

from __future__ import annotations

import hashlib

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.run_folder import ResultsError, source
from rdrop.experiments.tasks.task import NamesItsIds, Task
from rdrop.experiments.training import checkpoints
from rdrop.experiments.training.stored_state import damaged_state_named


def vocabulary_digest(task: Task) -> str | None:
    """Returns 12 hexadecimal digits of what the ids of vocabulary and classes mean; None if the task does not say."""
    if not isinstance(task, NamesItsIds):
        return None
    return hashlib.sha256("\0".join(task.names_of_ids()).encode()).hexdigest()[:12]


def start_from(recipe: Recipe, task: Task, model: checkpoints.Stored) -> dict[str, str]:
    """Copies the weights that `init_from` names into `model`; returns a note on where they are from.

    Raises:
        ResultsError: there is no such run, it has learned from what this one is scored on, or its ids stand for other
            tokens or classes.
        CheckpointError: its weights are damaged, deleted, or those of another model.
    """
    if recipe.init_from is None:
        return {}
    run = source.find_source(recipe.init_from, recipe.seed)
    assert run.result is not None  # it is finished
    own, theirs = vocabulary_digest(task), run.result.get("vocabulary")
    if own is None:
        rule = f"must be null: {recipe.task} does not say what its ids mean"
        raise ResultsError(f"init_from (={recipe.init_from}) {rule}")
    source.require_same_split(recipe.saved(), run)
    if own != theirs:
        was = "does not say what its ids mean" if theirs is None else "has another vocabulary or other classes"
        raise ResultsError(
            f"init_from (={recipe.init_from}): {run.path} {was}, so its weights mean something else here. Train it "
            "again with this version, on the same data and with the same seed"
        )
    best_step, averaged_steps = run.result["best_step"], run.result["averaged_steps"]
    with damaged_state_named(run.path / "checkpoints"):
        checkpoints.restore_final(run.path / "checkpoints", best_step, averaged_steps, model)
    return {source.NOTE: source.described(run)}

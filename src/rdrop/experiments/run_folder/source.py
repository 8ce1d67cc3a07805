"""The run from whose weights another starts (`init_from`): which it is, and whether it is still the same one.

This module needs the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rdrop.experiments.run_folder.folder import ResultsError, RunRecord, find_runs
from rdrop.experiments.run_folder.whole import what_is_damaged, what_is_damaged_in_result
from rdrop.experiments.shown import shell_word

SOURCES = ("hub", "hub_config", "folder", "train")
"""The keys of `data` that say where the training examples are from."""
SPLITS = ("split_seed", "folds", "valid_size", "test_size", "stratified")
"""Those that say what is held out of them; a recipe has some of them."""

NOTE = "started from"
"""Under this name the notes of a run say what `described` says of its source."""


def find_source(init_from: str, seed: int) -> RunRecord:
    """Returns the finished run in the folder; the one with this seed, if the folder holds several.

    Raises `ResultsError` if there is none, or more than one.
    """
    path = Path(init_from)
    if not path.is_dir():
        raise ResultsError(f"init_from (={path}) is no folder; name that of a finished run, or of several")
    found = [(run, run.result) for run in find_runs(path) if run.problem is None]
    finished = [run for run, result in found if result is not None and _damage(run.path, run.recipe, result) is None]
    if len(finished) == 1 and finished[0].path == path:
        return finished[0]
    fitting = [run for run in finished if run.result is not None and run.result["recipe"]["seed"] == seed]
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        damaged = [what for run, result in found if result and (what := _damage(run.path, run.recipe, result))]
        raise ResultsError(
            f"init_from (={path}) holds no finished run with seed {seed}; train it first, or name one run's folder"
            + (f". Left out: {damaged[0]}" if damaged else "")
        )
    raise ResultsError(
        f"init_from (={path}) holds {len(fitting)} finished runs with seed {seed}; name the folder of one: "
        f"{', '.join(str(run.path) for run in fitting)}"
    )


def require_same_split(recipe: Mapping[str, Any], source: RunRecord) -> None:
    """Raises `ResultsError` if the source has learned from examples that a run of the recipe is scored on.

    That is so where the examples are drawn from the same files in another way.
    """
    assert source.result is not None  # it is finished
    theirs = source.result["recipe"]
    own_data, their_data = recipe["data"], theirs["data"]
    if any(own_data.get(key) != their_data.get(key) for key in SOURCES):
        return
    other = [f"data.{key}" for key in SPLITS if own_data.get(key) != their_data.get(key)]
    if not other and own_data.get("folds") is not None and recipe["seed"] != theirs["seed"]:
        other = ["seed"]  # which says what fold it is
    if other:
        raise ResultsError(
            f"init_from (={recipe['init_from']}): {source.path} splits the same data in another way, so it has learned "
            f"from examples that this run is scored on. Start from a run with the same {' and '.join(other)}"
        )


def _damage(path: Path, recipe: Mapping[str, Any] | None, result: Mapping[str, Any]) -> str | None:
    return what_is_damaged(path, recipe or {}, result) or what_is_damaged_in_result(path, result, for_weights=True)


def weights_files(init_from: str | None, seed: int) -> list[Path]:
    """Returns the files of the weights that a run of the seed starts from; none where they are not there."""
    try:
        result = None if init_from is None else find_source(init_from, seed)
    except (ResultsError, OSError):
        return []
    if result is None or result.result is None:
        return []
    steps = result.result["averaged_steps"] or [result.result["best_step"]]
    return [result.path / "checkpoints" / f"step-{step:08d}" / "model.safetensors" for step in steps]


def described(source: RunRecord) -> str:
    """Returns which run it is and which of its weights another starts from, in one line."""
    assert source.result is not None  # it is finished
    recipe, averaged = source.result["recipe"], source.result["averaged_steps"]
    update = f"the mean of {len(averaged)} weights" if averaged else f"update {source.result['best_step']}"
    return f"{recipe['name']}, seed {recipe['seed']}, {update} ({source.result['digest']})"


def require_same_source(init_from: str | None, seed: int, notes: Mapping[str, Any], folder: Path) -> None:
    """Raises `ResultsError` if the run in `folder` started from other weights than `init_from` holds now.

    A source that is gone is no error: what was trained from it stands for itself.
    """
    known = notes.get(NOTE)
    if init_from is None or known is None:
        return
    try:
        now = described(find_source(init_from, seed))
    except (ResultsError, OSError):
        return
    if now != known:
        raise ResultsError(
            f"{folder}: this run started from {known}, and init_from (={init_from}) holds {now} now. Choose another "
            f"name= or --runs, or delete the run to train it from the new weights: rm -r {shell_word(folder)}"
        )

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

NOTE = "started from"
"""Under this name the notes of a run say what `described` says of its source."""


def find_source(init_from: str, seed: int) -> RunRecord:
    """Returns the finished run in the folder; the one with this seed, if the folder holds several.

    Raises `ResultsError` if there is none, or more than one.
    """
    path = Path(init_from)
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


def _damage(path: Path, recipe: Mapping[str, Any] | None, result: Mapping[str, Any]) -> str | None:
    return what_is_damaged(path, recipe or {}, result) or what_is_damaged_in_result(path, result, for_weights=True)


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

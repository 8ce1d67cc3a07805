"""Finished runs scored again: on another test file, or with another search. Nothing is trained, nothing written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from rdrop.experiments.comparison.finished_runs import FinishedRun
from rdrop.experiments.randomness import seed_all
from rdrop.experiments.recipe import DataFiles, Recipe, override
from rdrop.experiments.recipe.settings import RecipeError, read_settings
from rdrop.experiments.recipes import load_recipe
from rdrop.experiments.run_folder import RECIPE, RESULT, ResultsError, data_files, remedy, what_is_damaged_in_result
from rdrop.experiments.tasks.files import MissingDataError
from rdrop.experiments.tasks.share import Share
from rdrop.experiments.tasks.task import KnowsConstant, SharesEvaluation, load_task
from rdrop.experiments.training import checkpoints
from rdrop.experiments.training.beginning import LATE
from rdrop.experiments.training.fingerprint import fingerprint
from rdrop.experiments.training.stored_state import damaged_state_named

NOTES_ON_TRAINING = ("started from", "epochs", "batch", "alpha", "has begun", "diverged")
"""Those that a new score leaves true; the task writes the others again.

That a model began to learn late says nothing of its scores, and is left out; that it has not begun does.
"""
SCORING_KEYS = (
    "data.folder",
    "data.train",
    "data.valid",
    "data.unlabeled",
    "data.test",
    "data.test_name",
    "data.counts",
    "data.codes",
    "data.reference_columns",
    "model.name",
)
"""Files may have moved: that those of the training are what they were is seen by their fingerprint.

So has a pre-trained model: its tokenizer shows in the fingerprint, and the weights are those of the run.
"""


def rescore(run: FinishedRun, settings: Iterable[str] = ()) -> dict[str, Any]:
    """Scores the run's weights on the test split again: its result with other `test`, and the `notes` on the scores.

    `test_file` is the file that was scored in the place of examples which the run had held out, else None.

    Without settings these are its own again. `settings` change the recipe as in `override`, but only what training did
    not see: `SCORING_KEYS`, and the keys of `decoding`. The training data are loaded as in the run: vocabulary and
    classes come from them, and what was held out of them stays so.

    Raises:
        RecipeError: a setting that would have trained another model.
        DataError: the data are not what they should be.
        CheckpointError: the weights are damaged, not there any more, or those of another model.
        ResultsError: the data that a setting does not change are not those of the run, or a score is not finite.
    """
    problem = what_is_damaged_in_result(run.path, run.result, for_weights=True)
    if problem is not None:
        raise ResultsError(problem)
    own = load_recipe(run.path / RECIPE)
    then, was = data_files.of_data(run.result.get("files", {}), run.result["recipe"]), own.saved()["data"]
    places = [key for key, name in was.items() if "" in data_files.below(then, name).values()]
    recipe, test = scoring_recipe(own, settings, places)
    data = recipe.saved()["data"]
    if changed := data_files.changed_in_place(then, was, data):
        others = " To score other examples, give them a file of its own: --test FILE."
        raise ResultsError(
            f"{', '.join(changed)}: changed after {run.path} had been trained and scored with it. Put back what it "
            f"held.{others if 'data.test' in own.descriptions() else ''}"
        )
    where = _keys_of_places(recipe.data, places)
    now: dict[str, str] = {}
    try:
        with data_files.noting(now, data):
            task = load_task(recipe, test)
    except (MissingDataError, FileNotFoundError) as error:
        raise MissingDataError(f"{error}. Where files of the run have moved, say where they are by {where}.") from error
    is_other = any(
        data_files.is_other_when_moved(then, was.get(key), now, data.get(key))
        for key in {"folder", "train", *(key for key in places if f"data.{key}" not in SCORING_KEYS)}
    )
    if is_other or run.result.get("data") not in (None, fingerprint(task)):
        raise ResultsError(
            f"{run.path}: the training data are not those of the run: other examples, vocabulary or classes, so that "
            f"the weights would mean something else. Put them back, or name where they are now by {where}."
        )
    state = PartialState(cpu=not torch.accelerator.is_available())
    if isinstance(task, SharesEvaluation):
        task.share = Share(state.process_index, state.num_processes)
    model = task.build_model().to(state.device).eval()
    best_step, averaged_steps = run.result["best_step"], run.result["averaged_steps"]
    with damaged_state_named(run.path / "checkpoints"):
        checkpoints.restore_final(run.path / "checkpoints", best_step, averaged_steps, model)
    seed_all(recipe.seed, "evaluate", run.result["updates"])
    scores = task.evaluate(model, "test")
    _require_finite(scores, run.path)
    if run.result["metric"] not in scores:
        file = run.path / RESULT
        raise ResultsError(f"{file}: {run.result['metric']!r} is no score of {recipe.task}. {remedy(file)}")
    constant = task.constant_scores() if isinstance(task, KnowsConstant) else {}
    of_training = {name: note for name, note in run.notes.items() if name in NOTES_ON_TRAINING}
    if str(of_training.get("has begun", "")).startswith(LATE):
        del of_training["has begun"]
    notes = of_training | task.notes
    return run.result | {"test": scores, "constant": constant, "notes": notes, "test_file": test}


def _keys_of_places(data: object, places: Iterable[str]) -> str:
    """Returns the settings by which files that have moved are named; `places` are those of the files of the run."""
    has_own = getattr(data, "train", None) is not None
    keys = ["train", "valid", "test", "codes", "unlabeled"] if has_own else ["folder", "unlabeled"]
    keys += [key for key in places if key not in keys]
    given = [key for key in keys if getattr(data, key, None) not in (None, "all")]
    return (
        " and ".join(f"data.{key}={'FOLDER' if key == 'folder' else 'FILE'}" for key in given) or "data.folder=FOLDER"
    )


def scoring_recipe(recipe: Recipe, settings: Iterable[str], places: Iterable[str] = ()) -> tuple[Recipe, str | None]:
    """Changes the recipe of a run by settings that leave the trained model what it is; refuses others.

    `places` are the keys of the section `data` that name files which the run has read: a task of one's own may have
    other keys for them than those of `SCORING_KEYS`.

    A test file for a run that had none is no change of its recipe, which would put what was held out back into the
    training data; it is returned beside it.
    """
    settings = list(settings)
    read_settings(settings, recipe.descriptions())  # each is a setting, and given once
    test = None
    if isinstance(recipe.data, DataFiles) and recipe.data.test is None:
        for setting in [setting for setting in settings if setting.startswith("data.test=")]:
            settings.remove(setting)
            value = read_settings([setting], ["data.test"])["data.test"]
            if value is None:
                raise RecipeError("data.test", "names the file to score", value="null")
            test = value if isinstance(value, str) else setting.removeprefix("data.test=")
    changed = override(recipe, settings)
    keys = dict.fromkeys([*SCORING_KEYS, *(f"data.{key}" for key in places)])
    for setting in settings:
        key, _, text = setting.partition("=")
        if key not in keys and not key.startswith("decoding."):
            own = recipe.descriptions()
            or_search = " or a key of decoding" if any(name.startswith("decoding.") for name in own) else ""
            rule = f"belongs to the training; to score, change {', '.join(k for k in keys if k in own)}{or_search}"
            raise RecipeError(key, rule, value=text)
    return changed, test


def _require_finite(scores: Mapping[str, float], path: Path) -> None:
    wrong = [f"{name} is {value}" for name, value in scores.items() if not math.isfinite(value)]
    if wrong:
        raise ResultsError(f"{path}: on these data {' and '.join(wrong)}. Look at the data.")

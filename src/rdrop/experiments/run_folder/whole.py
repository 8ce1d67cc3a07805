"""Tells whether the files of a run are whole: the one check for all who read them.

It says what is wrong in one sentence, and what to do, which works when it is followed word for word. A file that is
deleted is written anew when the run is trained again: it goes on from its checkpoints, so nothing is lost with it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rdrop.experiments.run_folder import saved
from rdrop.experiments.run_folder.folder import RECIPE, RESULT, ResultsError, RunFolder, read_file, remedy

_Test = Callable[[object], bool]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_object(value: object) -> bool:
    return isinstance(value, Mapping)


def _is_scores(value: object) -> bool:
    return isinstance(value, Mapping) and all(score is None or _is_number(score) for score in value.values())


def _is_texts(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, value.values()))


def _is_counts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_count, value))


def _is_numbers(value: object) -> bool:
    return isinstance(value, Mapping) and all(map(_is_number, value.values()))


def _or_null(test: _Test) -> _Test:
    return lambda value: value is None or test(value)


_OF_RECIPE: dict[str, tuple[_Test, str]] = {
    "name": (_is_text, "a text"),
    "seed": (_is_count, "a whole number"),
    "method": (_is_object, "an object"),
    "batch_size": (_or_null(_is_count), "a whole number or null"),
    "batch_tokens": (_or_null(_is_count), "a whole number or null"),
}
_OF_RECIPE_IF_PRESENT: dict[str, tuple[_Test, str]] = {
    "task": (_is_text, "a text"),
    "data": (_is_object, "an object"),
    "model": (_is_object, "an object"),
}
_OF_RESULT: dict[str, tuple[_Test, str]] = {
    "recipe": (_is_object, "an object"),
    "metric": (_is_text, "a text"),
    "finished": (_is_text, "a text"),
    "valid": (_is_scores, "an object of numbers"),
    "test": (_is_scores, "an object of numbers"),
    "cost": (_is_scores, "an object of numbers"),
    "machine": (_is_object, "an object"),
    "versions": (_is_object, "an object"),
}
_IF_PRESENT: dict[str, tuple[_Test, str]] = {
    "best_step": (_is_count, "a whole number"),
    "updates": (_is_count, "a whole number"),
    "averaged_steps": (_is_counts, "a list of whole numbers"),
    "notes": (_is_texts, "an object of texts"),
    "metrics": (_is_object, "an object"),
    "constant": (_or_null(_is_scores), "an object of numbers or null"),
    "digest": (_is_text, "a text"),
    "data": (_or_null(_is_text), "a text or null"),
    "files": (_is_texts, "an object of texts"),
    "vocabulary": (_or_null(_is_text), "a text or null"),
    "resumed": (_is_count, "a whole number"),
}
_OF_CHECKPOINT: dict[str, tuple[_Test, str]] = {
    "state": (_is_object, "an object"),
    "model_aliases": (_is_texts, "an object of texts"),
    "optimizer_numbers": (
        lambda value: isinstance(value, Mapping) and all(key.partition(".")[0].isdecimal() for key in value),
        "an object whose keys begin with the number of a parameter",
    ),
}
_OF_STATE: dict[str, tuple[_Test, str]] = {
    "step": (_is_count, "a whole number"),
    "evaluated_step": (_is_count, "a whole number"),
    "best_step": (_or_null(_is_count), "a whole number or null"),
    "best_score": (_or_null(_is_number), "a number or null"),
    "scores_since_best": (_is_count, "a whole number"),
    "averaged_steps": (_is_counts, "a list of whole numbers"),
    "seconds": (_is_number, "a number"),
    "resumed": (_is_count, "a whole number"),
    "data": (_is_text, "a text"),
    "files": (_is_texts, "an object of texts"),
    "start": (_is_texts, "an object of texts"),
    "processes": (_or_null(_is_count), "a whole number or null"),
    "sums": (_is_numbers, "an object of numbers"),
    "counts": (_is_numbers, "an object of numbers"),
}
"""Each may be missing: checkpoints of before have fewer."""
_FOR_WEIGHTS = ("best_step", "updates", "averaged_steps", "digest")
"""What needs the weights again, to score them or to start from them, asks for these; results of before do without."""


def what_is_damaged(path: Path, recipe: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the content of a finished run's files, and what to do; None if nothing is."""
    return (
        _wrong_entry(path / RECIPE, recipe, _of_recipe(recipe))
        or _no_batch(path, recipe)
        or what_is_damaged_in_result(path, result)
        or _other_recipe(path, recipe, result)
    )


def is_whole_recipe(recipe: Mapping[str, Any]) -> bool:
    """Whether the recipe of a run, finished or not, has what a comparison reads."""
    return (_wrong_entry(Path(RECIPE), recipe, _of_recipe(recipe)) or _no_batch(Path(), recipe)) is None


def what_is_damaged_in_result(path: Path, result: Mapping[str, Any], *, for_weights: bool = False) -> str | None:
    """Returns the same of result.json alone; `for_weights`: also if it does not say which weights were scored."""
    present = {key: rule for key, rule in _IF_PRESENT.items() if key in result or (for_weights and key in _FOR_WEIGHTS)}
    problem = _wrong_entry(path / RESULT, result, _OF_RESULT | present)
    if problem is None and result["metric"] not in result["test"]:
        what = f"'test' has no {result['metric']!r}, which is its 'metric'"
        return f"{path / RESULT}: {what}. {remedy(path / RESULT)}"
    return problem


def what_is_damaged_in_state(file: Path) -> str | None:
    """Returns the same of the state.json of a checkpoint, whose manifest says nothing of its content."""
    try:
        stored = json.loads(read_file(file))
    except (OSError, ValueError, RecursionError, ResultsError) as error:
        return f"{file}: cannot be read ({error}). {remedy(file)}"
    if not isinstance(stored, Mapping):
        return f"{file}: is no object. {remedy(file)}"
    problem = _wrong_entry(file, stored, _OF_CHECKPOINT)
    if problem is not None:
        return problem
    state = stored["state"]
    problem = _wrong_entry(file, state, {key: rule for key, rule in _OF_STATE.items() if key in state})
    if problem is None and (state.get("best_step") is None) != (state.get("best_score") is None):
        return f"{file}: only one of 'best_step' and 'best_score' is null. {remedy(file)}"
    if problem is None and not all(state.get("counts", {}).get(key) for key in state.get("sums", {})):
        return f"{file}: 'counts' does not say how many numbers 'sums' is of. {remedy(file)}"
    return problem


def read_result(folder: RunFolder) -> dict[str, Any] | None:
    """Returns the result of a run, or None while it is unfinished. Raises `ResultsError` if its files are damaged."""
    result = folder.result()
    if result is None:
        return None
    if (folder.path / RECIPE).exists():
        problem = what_is_damaged(folder.path, folder.recipe(), result)
    else:
        problem = what_is_damaged_in_result(folder.path, result)
    if problem is not None:
        raise ResultsError(problem)
    folder.metrics()
    return result


def _of_recipe(recipe: Mapping[str, Any]) -> dict[str, tuple[_Test, str]]:
    return _OF_RECIPE | {key: rule for key, rule in _OF_RECIPE_IF_PRESENT.items() if key in recipe}


def _wrong_entry(file: Path, entries: Mapping[str, Any], rules: Mapping[str, tuple[_Test, str]]) -> str | None:
    for key, (is_right, kind) in rules.items():
        if key not in entries:
            return f"{file}: {key!r} is missing. {remedy(file)}"
        if not is_right(entries[key]):
            return f"{file}: {key!r} is not what it should be, {kind}. {remedy(file)}"
    return None


def _no_batch(path: Path, recipe: Mapping[str, Any]) -> str | None:
    if recipe["batch_size"] or recipe["batch_tokens"]:
        return None
    return f"{path / RECIPE}: neither 'batch_size' nor 'batch_tokens' is above 0. {remedy(path / RECIPE)}"


def _digest(recipe: Mapping[str, Any]) -> str | None:
    try:
        return saved.digest(recipe)
    except (AttributeError, KeyError, TypeError, ValueError):  # no recipe at all
        return None


def _other_recipe(path: Path, recipe: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    if result["recipe"] == recipe:
        return None
    differing = ", ".join(saved.differing_keys(recipe, result["recipe"]))
    what = f"{path / RESULT}: it is the result of another recipe, which differs in {differing} from recipe.json"
    for file, own in ((path / RECIPE, result["recipe"]), (path / RESULT, recipe)):
        if _digest(own) == path.name:  # a run's folder has the name of its recipe, so the other one is wrong
            return f"{what}. {remedy(file)}"
    return f"{what}. Move the folder away, and train the recipe that you want again."

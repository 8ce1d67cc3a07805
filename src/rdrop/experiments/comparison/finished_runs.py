"""The finished runs among the records of a run directory, checked once so that no reader has to ask again."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError

from rdrop.experiments import metrics
from rdrop.experiments.metrics import MetricError
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.run_folder import RunRecord

_RECIPE_TYPES = {
    "name": str, "seed": int, "method": dict, "batch_size": (int, NoneType), "batch_tokens": (int, NoneType),
}  # fmt: skip
_RESULT_TYPES = {
    "metric": str, "finished": str, "test": dict, "valid": dict, "cost": dict,
    "machine": dict, "versions": dict,
}  # fmt: skip


@dataclass(frozen=True)
class FinishedRun:
    """A run whose recipe and result are there, belong together and have what a comparison reads."""

    path: Path
    recipe: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]]
    method: Method

    @property
    def batch(self) -> int:
        """Examples or tokens per update."""
        return int(self.recipe["batch_size"] or self.recipe["batch_tokens"])

    @property
    def seed(self) -> int:
        return int(self.recipe["seed"])


@dataclass(frozen=True)
class UnusableRun:
    """A run folder that no comparison can use, and why."""

    path: Path
    problem: str


def split_usable(records: Iterable[RunRecord]) -> tuple[list[FinishedRun], list[UnusableRun]]:
    """The finished runs, and the folders that are unfinished or damaged, each in the order given."""
    checked = [_check(record) for record in records]
    return (
        [run for run in checked if isinstance(run, FinishedRun)],
        [run for run in checked if isinstance(run, UnusableRun)],
    )


def is_finite_number(value: object) -> bool:
    """Whether an entry of a file can be computed with; null, text, NaN and what float64 cannot hold cannot."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _check(record: RunRecord) -> FinishedRun | UnusableRun:
    if record.problem is not None or record.recipe is None or record.result is None:
        problem = record.problem or "recipe.json or result.json is missing."
        return UnusableRun(record.path, problem.removeprefix(f"{record.path}: "))
    mismatch = (
        _wrong_entry("recipe.json", record.recipe, _RECIPE_TYPES)
        or _wrong_entry("result.json", record.result, _RESULT_TYPES)
        or _no_batch(record.recipe)
        or _other_recipe(record.recipe, record.result)
        or _unknown_metric(record.result)
    )
    if mismatch:
        return UnusableRun(record.path, mismatch)
    try:
        method = Method.model_validate(record.recipe["method"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(("method", *map(str, first["loc"])))
        return UnusableRun(
            record.path, f"recipe.json: {key}: {first['msg']}. The file is damaged; run the recipe again."
        )
    return FinishedRun(record.path, record.recipe, record.result, record.metrics, method)


def _wrong_entry(file: str, entries: Mapping[str, Any], types: Mapping[str, Any]) -> str | None:
    for key, kind in types.items():
        if key not in entries:
            return f"{file}: {key!r} is missing. It is damaged, or of another version of rdrop; run the recipe again."
        if not isinstance(entries[key], kind):
            return f"{file}: {key!r} is not what it should be. The file is damaged; run the recipe again."
    return None


def _unknown_metric(result: Mapping[str, Any]) -> str | None:
    try:
        metrics.add_rows(result.get("metrics", {}))
        for name in (result["metric"], *result["test"]):
            metrics.find(name)
    except MetricError as error:
        return f"result.json: {error}"
    return None


def _no_batch(recipe: Mapping[str, Any]) -> str | None:
    if recipe["batch_size"] or recipe["batch_tokens"]:
        return None
    return "recipe.json: neither 'batch_size' nor 'batch_tokens' is above 0. The file is damaged; run the recipe again."


def _other_recipe(recipe: Mapping[str, Any], result: Mapping[str, Any]) -> str | None:
    if result.get("recipe") == recipe:
        return None
    return "result.json was made by another recipe than recipe.json. Move the folder away and run the recipe again."

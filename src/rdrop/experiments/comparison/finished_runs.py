"""The finished runs among the records of a run directory, checked once so that no reader has to ask again."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rdrop.experiments import metrics
from rdrop.experiments.metrics import MetricError
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.run_folder import RECIPE, RESULT, RunRecord, remedy, what_is_damaged


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

    @property
    def notes(self) -> Mapping[str, Any]:
        """Returns what a reader should know beside the scores; empty where a version without notes wrote the result."""
        found = self.result.get("notes")
        return found if isinstance(found, Mapping) else {}


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
    damage = what_is_damaged(record.path, record.recipe, record.result) or unknown_metric(record.path, record.result)
    if damage is not None:
        return UnusableRun(record.path, damage.removeprefix(f"{record.path}{os.sep}"))
    try:
        method = Method.model_validate(record.recipe["method"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(("method", *map(str, first["loc"])))
        return UnusableRun(record.path, f"{RECIPE}: {key}: {first['msg']}. {remedy(record.path / RECIPE)}")
    return FinishedRun(record.path, record.recipe, record.result, record.metrics, method)


def unknown_metric(path: Path, result: Mapping[str, Any]) -> str | None:
    """Returns what is wrong where a score of the result is in no table of metrics."""
    try:
        metrics.add_rows(result.get("metrics", {}))
        for name in (result["metric"], *result["test"]):
            metrics.find(name)
    except MetricError as error:
        return f"{path / RESULT}: {error}. {remedy(path / RESULT)}"
    return None

"""The runs of a run directory that a comparison uses, checked once so that no reader has to ask again."""

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
from rdrop.experiments.run_folder import RECIPE, RESULT, RunRecord, is_whole_recipe, remedy, what_is_damaged


@dataclass(frozen=True)
class _EndedRun:
    path: Path
    recipe: dict[str, Any]
    method: Method

    @property
    def batch(self) -> int:
        """Examples or tokens per update."""
        return int(self.recipe["batch_size"] or self.recipe["batch_tokens"])

    @property
    def seed(self) -> int:
        return int(self.recipe["seed"])


@dataclass(frozen=True)
class FinishedRun(_EndedRun):
    """A run whose recipe and result are there, belong together and have what a comparison reads."""

    result: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def notes(self) -> Mapping[str, Any]:
        """Returns what a reader should know beside the scores; empty where a version without notes wrote the result."""
        found = self.result.get("notes")
        return found if isinstance(found, Mapping) else {}


@dataclass(frozen=True)
class LostRun(_EndedRun):
    """A run that has diverged and has no score."""

    why: str
    """What ended it."""


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


def lost_runs(records: Iterable[RunRecord]) -> list[LostRun]:
    """Returns the runs that have diverged without a score. `split_usable` has them among those that are unusable."""
    found = []
    for record in records:
        if record.failure is None or record.recipe is None or not is_whole_recipe(record.recipe):
            continue
        method = _method(record.recipe)
        if isinstance(method, Method):
            why = record.failure.removeprefix("diverged: ").partition(". ")[0]
            found.append(LostRun(record.path, record.recipe, method, why))
    return found


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
    method = _method(record.recipe)
    if isinstance(method, str):
        return UnusableRun(record.path, f"{RECIPE}: {method}. {remedy(record.path / RECIPE)}")
    return FinishedRun(record.path, record.recipe, method, record.result, record.metrics)


def _method(recipe: Mapping[str, Any]) -> Method | str:
    """Returns the section of the recipe, or what is wrong with it."""
    try:
        return Method.model_validate(recipe["method"])
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(('method', *map(str, first['loc'])))}: {first['msg']}"


def unknown_metric(path: Path, result: Mapping[str, Any]) -> str | None:
    """Returns what is wrong where a score of the result is in no table of metrics."""
    try:
        metrics.add_rows(result.get("metrics", {}))
        for name in (result["metric"], *result["test"]):
            metrics.find(name)
    except MetricError as error:
        return f"{path / RESULT}: {error}. {remedy(path / RESULT)}"
    return None

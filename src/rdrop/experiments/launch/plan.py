"""The runs of a comparison, in order, and the command that trains each."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdrop.experiments.recipe import Recipe, override
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import find_recipe
from rdrop.experiments.run_folder import RunFolder, saved


@dataclass(frozen=True)
class Run:
    """A recipe, what a reader calls it, and the folder of its run."""

    label: str
    recipe: Recipe
    folder: Path

    @classmethod
    def of(cls, label: str, recipe: Recipe, root: Path) -> Run:
        digest = recipe.digest()
        folder = root / recipe.name / digest
        earlier = root / saved.first_name(recipe.name) / digest  # where a version before a renaming has begun it
        return cls(label, recipe, earlier if earlier.exists() else folder)

    def result(self) -> dict[str, Any] | None:
        """The content of result.json, or None while the run is not finished."""
        return RunFolder(self.folder).result()

    def failure(self) -> str | None:
        """Why the run cannot go on, or None if nothing is known against it."""
        return RunFolder(self.folder).failure()


def plan_comparison(recipe: Recipe, seeds: Iterable[int], root: Path, *, larger_batch: bool) -> list[Run]:
    """Baseline, R-Drop and (with `larger_batch`) a baseline whose batch has as many examples as R-Drop's has passes.

    The arms of one seed follow each other, so that a comparison that is stopped has whole seeds to show. Raises
    `RecipeError` if the recipe asks for no R-Drop.
    """
    if recipe.method.is_plain:
        raise RecipeError("alpha", "a comparison needs R-Drop, alpha > 0; alpha=0 is its baseline anyway", value=0)
    arms = [recipe.replace(method=recipe.method.plain()), recipe]
    if larger_batch:
        arms.append(with_larger_batch(arms[0]))
    return [
        Run.of(f"{_label(arm, recipe)}, seed {seed}", arm.replace(seed=seed), root) for seed in seeds for arm in arms
    ]


def with_larger_batch(baseline: Recipe) -> Recipe:
    """Returns plain training at R-Drop's compute: its batch has as many examples as R-Drop's has passes."""
    unit = "batch_size" if baseline.batch_tokens is None else "batch_tokens"
    try:
        return baseline.replace(**{unit: getattr(baseline, unit) * baseline.method.passes})
    except RecipeError as error:
        times = baseline.method.passes
        rule = f"{error.rule}; this is the baseline with {times} times the batch; --no-double-batch omits it"
        raise RecipeError(error.key, rule, value=error.value, nearest=error.nearest) from None


@dataclass(frozen=True)
class Command:
    """The command line of a run: the recipe that is changed, where runs go, and the trackers that are told."""

    recipe: str
    """As on the command line: a name, a path, or package.module:NAME."""
    runs: Path
    trackers: tuple[str, ...] = ()

    def arguments(self, run: Run) -> list[str]:
        """Returns the arguments of `rdrop` that train this run, in any process, on any machine with these files."""
        trackers = [part for name in self.trackers for part in ("--tracker", name)]
        settings = settings_between(find_recipe(self.recipe), run.recipe)
        return ["train", self.recipe, *settings, "--runs", str(self.runs), *trackers]


def settings_between(recipe: Recipe, changed: Recipe) -> list[str]:
    """Returns the settings by which `override` makes the one recipe of the other, as they are typed."""
    is_tiny = changed.name == f"{recipe.name}-tiny"
    start = recipe.tiny() if is_tiny else recipe
    settings = ["tiny=true"] if is_tiny else []
    old, new = start.model_dump(mode="json"), changed.model_dump(mode="json")
    for key in saved.differing_keys(old, new):
        section, _, name = key.rpartition(".")
        value = (new[section] if section else new | new["method"])[name]
        settings.append(f"{key}={value if _is_read_as_text(value) else json.dumps(value)}")
    if override(recipe, settings) != changed:
        raise RecipeError("recipe", f"{changed.name} cannot be made from {recipe.name} by settings")
    return settings


def _is_read_as_text(value: object) -> bool:
    """Whether a setting may have the value as it is, without the quotes of JSON."""
    if not isinstance(value, str):
        return False
    try:
        json.loads(value)
    except (ValueError, RecursionError):
        return True
    return False


def _label(arm: Recipe, recipe: Recipe) -> str:
    return arm.method.label(_batch(arm) // _batch(recipe))


def _batch(recipe: Recipe) -> int:
    size = recipe.batch_size or recipe.batch_tokens
    assert size is not None  # the recipe has one of the two
    return size

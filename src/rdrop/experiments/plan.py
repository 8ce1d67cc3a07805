"""The runs of a comparison, in order, and training those that are not finished."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from rdrop.experiments.progress import Display, show_progress
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder, saved
from rdrop.experiments.training.trackers import require_trackers


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


class StoppedError(Exception):
    """Training was stopped from outside, by Ctrl-C for example. `status` is the exit status the shell expects."""

    def __init__(self, finished: int, runs: int, cause: KeyboardInterrupt) -> None:
        super().__init__(f"stopped, with {finished} of {runs} runs finished")
        self.status: int = getattr(cause, "exit_code", 130)


class FailedRunError(Exception):
    """A run that could not start, or could not go on."""


def plan_comparison(recipe: Recipe, seeds: Iterable[int], root: Path, *, larger_batch: bool) -> list[Run]:
    """Baseline, R-Drop and (with `larger_batch`) a baseline whose batch has as many examples as R-Drop's has passes.

    The arms of one seed follow each other, so that a comparison that is stopped has whole seeds to show. Raises
    `RecipeError` if the recipe asks for no R-Drop.
    """
    if recipe.method.is_plain:
        raise RecipeError("alpha", "a comparison needs R-Drop, alpha > 0; alpha=0 is its baseline anyway", value=0)
    arms = [recipe.replace(method=recipe.method.plain()), recipe]
    if larger_batch:
        arms.append(_with_larger_batch(arms[0]))
    return [
        Run.of(f"{_label(arm, recipe)}, seed {seed}", arm.replace(seed=seed), root) for seed in seeds for arm in arms
    ]


def train_all(runs: list[Run], console: Console, *, trackers: Sequence[str] = ()) -> None:
    """Trains the runs that are not finished, showing the progress.

    Raises:
        TrackerError: before anything is loaded.
        StoppedError: what is finished stays finished, and the run that was on goes on from its checkpoint next time.
        FailedRunError: the same, but first the cause must be removed.
    """
    require_trackers(trackers)
    waiting = [run for run in runs if run.result() is None]
    if len(waiting) < len(runs):
        console.print(f"{len(runs) - len(waiting)} of {len(runs)} runs finished already", highlight=False)
    try:
        with show_progress(console, [run.recipe for run in runs], [run.recipe for run in waiting]) as display:
            for number, run in enumerate(waiting, start=len(runs) - len(waiting) + 1):
                display.start(run.label, run.recipe)
                result = _train(run, display, trackers)
                if len(runs) > 1:
                    display.finish(f"{number:>{len(str(len(runs)))}}/{len(runs)}  {run.label}: {summary(result)}")
    except KeyboardInterrupt as cause:
        finished = sum(run.result() is not None for run in runs)
        raise StoppedError(finished, len(runs), cause) from None


def _train(run: Run, display: Display, trackers: Sequence[str]) -> dict[str, Any]:
    from rdrop.experiments.training import checkpoints, trainer

    quiet_transformers()
    try:
        return trainer.train(run.recipe, run.folder, on_progress=display.update, trackers=trackers)
    except (trainer.TrainingError, checkpoints.CheckpointError) as cause:
        raise FailedRunError(f"{run.label}: {cause}") from cause


def quiet_transformers() -> None:
    """Its bars would break ours, and that a classifier on top is new is no news."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def summary(result: dict[str, Any], *, cost: bool = True) -> str:
    """The outcome of a run in one line: "test accuracy 87.3 %, trained in 14 s"."""
    from rdrop.experiments.comparison.wording import NumberStyle, words

    metric = result["metric"]
    style = NumberStyle.of(metric, [])
    unit = " %" if style.percent else ""
    seconds = result["cost"]["train_seconds"] if cost else None
    trained = "" if seconds is None else f", trained in {seconds:.0f} s"
    return f"test {words(metric)} {style.score(result['test'][metric])}{unit}{trained}"


def _with_larger_batch(baseline: Recipe) -> Recipe:
    unit = "batch_size" if baseline.batch_tokens is None else "batch_tokens"
    try:
        return baseline.replace(**{unit: getattr(baseline, unit) * baseline.method.passes})
    except RecipeError as error:
        times = baseline.method.passes
        rule = f"{error.rule}; this is the baseline with {times} times the batch; --no-double-batch omits it"
        raise RecipeError(error.key, rule, value=error.value, nearest=error.nearest) from None


def _label(arm: Recipe, recipe: Recipe) -> str:
    return arm.method.label(_batch(arm) // _batch(recipe))


def _batch(recipe: Recipe) -> int:
    size = recipe.batch_size or recipe.batch_tokens
    assert size is not None  # the recipe has one of the two
    return size

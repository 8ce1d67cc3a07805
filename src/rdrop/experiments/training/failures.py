"""Errors of a training: what it refuses, and what it says where a number is not finite."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rdrop.experiments.metrics import MetricError
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.run_folder import FAILURE
from rdrop.experiments.training.objective import ObjectiveError
from rdrop.experiments.training.order import OrderError
from rdrop.experiments.training.sharding import ShardingError

DOMINATES = 1000
"""How many times the task loss the weighted divergence is where it, and not the learning rate, made an update fail."""
SHOWN_EXAMPLES = 8
"""Of the batch in which a run diverged, in the message."""


class TrainingError(RuntimeError):
    """A run that cannot start, or cannot go on: what, at which step, and how to fix it."""


class RefusedError(TrainingError):
    """A recipe that does not fit its task, its data or its machine, however often it is tried."""


class DivergedError(TrainingError):
    """A run in which a number is not finite. Its folder says so: trained again, it would end at the same step."""

    def __init__(self, step: int, what: str, advice: str, batch: dict[str, Any] | None = None) -> None:
        seen = "" if batch is None else f" {_batch_in_words(batch)}"
        super().__init__(f"{what}.{seen} {advice}")
        self.step, self.batch = step, batch


@contextmanager
def refusals() -> Iterator[None]:
    """Turns what data order, method, metrics and sharding refuse into a `RefusedError`."""
    try:
        yield
    except (OrderError, ObjectiveError, MetricError, ShardingError) as error:
        raise RefusedError(str(error)) from error


def advice(recipe: Recipe, step: int, measured: Mapping[str, float] | None = None) -> str:
    """Returns what to do where the update after `step` failed; `measured` are its loss and what the loss is made of."""
    by_alpha = _advice_on_alpha(recipe, measured or {})
    if by_alpha is not None:
        return by_alpha
    clip = "set clip_norm" if recipe.clip_norm is None else f"clip_norm (={recipe.clip_norm:g})"
    exact = "" if recipe.precision == "fp32" else f", set precision (={recipe.precision}) to fp32"
    return (
        f"The weights are still those of step {step}. Lower learning_rate (={recipe.learning_rate:g}) "
        f"or {clip}{exact}, and look at the data."
    )


def _batch_in_words(batch: dict[str, Any]) -> str:
    examples = batch["examples"]
    shown = ", ".join(map(str, examples[:SHOWN_EXAMPLES]))
    more = f", ... ({len(examples)}, all of them in {FAILURE})" if len(examples) > SHOWN_EXAMPLES else ""
    return f"Its batch has the training examples {shown}{more}, counted from 0, of epoch {batch['epoch']}."


def _advice_on_alpha(recipe: Recipe, measured: Mapping[str, float]) -> str | None:
    """Returns what to do where an update failed by the weight of the divergence; None where it is not that."""
    alpha, task_loss = measured.get("alpha", 0.0), measured.get("task_loss", math.nan)
    weighted = alpha / 2 * measured.get("divergence", 0.0)
    if not weighted > DOMINATES * abs(task_loss):  # as of NaN
        return None
    terms = f"alpha / 2 times the divergence is {weighted:.3g}, and the task loss {task_loss:.3g}"
    own = recipe.method.alpha
    here = "" if alpha == own else f", {alpha:.3g} in this update"
    return f"Lower alpha (={own:g}{here}): {terms}."

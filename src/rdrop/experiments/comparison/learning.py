"""Whether a run learned anything at all: one that did not says little of its method, and must not hide in a mean."""

from __future__ import annotations

from rdrop.experiments import metrics
from rdrop.experiments.comparison.finished_runs import FinishedRun, is_finite_number

SOURCE_USE = "source_use"
LEAST_SOURCE_USE = 0.05
"""Nats by which a token's loss rises at least with the source of another sentence, if the model reads its source."""


def has_learned(run: FinishedRun) -> bool | None:
    """Whether the run's test score is better than that of the best constant prediction; None where that is not known.

    The compared score decides, or the loss where a constant has no such score (a correlation, for instance). A run that
    has measured how much it uses its source is judged by that instead.
    """
    use = source_use(run)
    if use is not None:
        return use >= LEAST_SOURCE_USE
    test = run.result["test"]
    constant = run.result.get("constant")
    if not isinstance(constant, dict):
        return None
    metric = next((name for name in (run.result["metric"], "loss") if is_finite_number(constant.get(name))), None)
    if metric is None or not is_finite_number(test.get(metric)):
        return None
    gain = test[metric] - constant[metric]
    return bool(gain > 0 if metrics.find(metric).higher_is_better else gain < 0)


def source_use(run: FinishedRun) -> float | None:
    """Returns the `source_use` that the result says, or the last row of metrics.jsonl that says it."""
    places = (run.result, run.result["test"], *reversed(run.metrics))
    found = (place.get(SOURCE_USE) for place in places)
    return next((float(value) for value in found if is_finite_number(value)), None)

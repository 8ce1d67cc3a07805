"""Whether a run learned anything at all: one that did not says little of its method, and must not hide in a mean."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rdrop.experiments import metrics
from rdrop.experiments.comparison.finished_runs import FinishedRun, is_finite_number

SOURCE_USE = "source_use"
LEAST_SOURCE_USE = 0.05
"""Nats by which a token's loss rises at least with the source of another sentence, if the model reads its source."""

CORRELATIONS = ("pearson", "spearman")
"""Scores that no constant has, and that do not ask where the predictions lie."""

LEAST_CORRELATION = 0.1
"""Of a run that has learned something. The threshold is ours."""

TIMES_THE_CONSTANT = 10
"""A run has diverged whose valid loss is so many times that of the best constant prediction.

Overfitting alone hardly does that: of two classes, half of the answers would have to be wrong by a margin of 14 nats.
"""


def has_learned(run: FinishedRun) -> bool | None:
    """Whether the run's test score or loss is better than the best constant prediction's; None where that is not known.

    One of the two is enough: where nine of ten examples are of one class, a model that tells them apart may well be no
    more often right than a constant; and so is a correlation, which a constant prediction has not. A run that has
    measured how much it uses its source is judged by that instead.
    """
    use = source_use(run)
    if use is not None:
        return use >= LEAST_SOURCE_USE
    test = run.result["test"]
    constant = run.result.get("constant")
    if not isinstance(constant, dict):
        return None
    known = [
        metrics.find(name).higher_is_better == (test[name] > constant[name]) and test[name] != constant[name]
        for name in (run.result["metric"], "loss")
        if is_finite_number(constant.get(name)) and is_finite_number(test.get(name))
    ]
    own = test.get(run.result["metric"])
    if run.result["metric"] in CORRELATIONS and is_finite_number(own):
        known.append(own >= LEAST_CORRELATION)
    return any(known) if known else None


def source_use(run: FinishedRun) -> float | None:
    """Returns the `source_use` that the result says, or the last row of metrics.jsonl that says it."""
    places = (run.result, run.result["test"], *reversed(run.metrics))
    found = (place.get(SOURCE_USE) for place in places)
    return next((float(value) for value in found if is_finite_number(value)), None)


def how_diverged(run: FinishedRun) -> str | None:
    """Returns how far the valid loss of a run ended above what no training needs; None where it did not."""
    return how_rows_diverged([*run.metrics, {"kind": "valid", **run.result["valid"]}], run.result.get("constant"))


def how_rows_diverged(rows: Iterable[Mapping[str, Any]], constant: Any) -> str | None:
    """Says by the last two of the `valid` rows of metrics.jsonl whether training has diverged, though all was finite.

    The last row is that of the scored weights, the one before it of the last update. Their loss is held against that of
    the best constant prediction, or where a task knows none against the first.
    """
    losses: list[Any] = [row.get("loss") for row in rows if row.get("kind") == "valid"]
    reference = constant.get("loss") if isinstance(constant, Mapping) else None
    name = "that of the best constant prediction"
    if not is_finite_number(reference):
        reference, name = next(filter(is_finite_number, losses), None), "its first"
    worst = max(filter(is_finite_number, losses[-2:]), default=None)
    if reference is None or worst is None or not worst > TIMES_THE_CONSTANT * reference > 0:
        return None
    return f"the valid loss ended at {worst:,.4g}, and {name} is {reference:,.3g}"

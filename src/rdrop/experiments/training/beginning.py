"""Whether a training has begun: one that ignores its inputs looks like any other in its loss.

There are two ways not to begin. A run is delayed if it uses its inputs a little, and a little more each time: too much
alpha too early does that, or too high a learning rate. It has collapsed if it uses them not at all, and not more than
before, though its loss falls: it learns how often each token or class comes, and the learning rate was too high for
more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from rdrop.experiments.comparison.finished_runs import is_finite_number
from rdrop.experiments.comparison.learning import LEAST_SOURCE_USE, SOURCE_USE
from rdrop.experiments.recipe import Recipe

LEAST = {SOURCE_USE: LEAST_SOURCE_USE, "prediction_spread": 0.1}
"""The signs that a task measures, and from what value on a model has begun."""
NOTHING = 0.001
"""What is below is no use of the inputs at all."""
LATE = "late"
"""How the note on a run begins that has begun later than it should."""
LEAST_PROGRESS = 0.2
"""The share of the updates in which no run is expected to have begun."""


def has_begun(signs: Mapping[str, Any]) -> bool:
    """Whether a model uses its inputs, by the signs of a score of the valid split; also where there are none."""
    return not any(_is_below(signs.get(sign), least) for sign, least in LEAST.items())


def _is_below(value: object, least: float) -> bool:
    return isinstance(value, (int, float)) and is_finite_number(value) and value < least


def complaints(rows: Iterable[Mapping[str, Any]], recipe: Recipe, constant: Mapping[str, float]) -> list[str | None]:
    """Says of each score of the valid split but the first whether training should have begun and has not, and why.

    `rows` are the `valid` rows of metrics.jsonl, `constant` the scores of the best constant prediction. None where the
    model has begun, or has half of the errors of that prediction; and where it is too early to tell: within the
    warm-up, and in the first fifth of the updates.
    """
    return [
        None if _is_early(last, recipe) or _tells_apart(last, constant) else _complaint(before, last, recipe)
        for before, last in pairwise(rows)
    ]


def new_warning(rows: Iterable[Mapping[str, Any]], recipe: Recipe, constant: Mapping[str, float]) -> str | None:
    """Returns why training has not begun by the last score, once in a training: the rows tell what was said before."""
    *earlier, last = complaints(rows, recipe, constant) or [None]
    return None if any(earlier) else last


def note_on_beginning(
    rows: Sequence[Mapping[str, Any]], recipe: Recipe, constant: Mapping[str, float]
) -> dict[str, str]:
    """Returns a word for the reader of a result where training has not begun, or late."""
    found = complaints(rows, recipe, constant)
    if not any(found):
        return {}
    if found[-1] is not None:
        return {"has begun": f"no: {_complaint(rows[-2], rows[-1], recipe, has_ended=True)}"}
    last = max(place for place, complaint in enumerate(found) if complaint is not None)
    begun = rows[last + 2]["step"]  # of the first score there is no complaint
    return {"has begun": f"{LATE}, by the score after {begun} of {rows[-1]['step']} updates"}


def _is_early(last: Mapping[str, Any], recipe: Recipe) -> bool:
    return bool(last["step"] < max(recipe.warmup_updates, LEAST_PROGRESS * recipe.total_updates))


def _tells_apart(last: Mapping[str, Any], constant: Mapping[str, float]) -> bool:
    """Whether a model gets classes right that no constant prediction does, however alike their probabilities are."""
    name = "accuracy"
    return name in last and name in constant and bool(1 - last[name] <= (1 - constant[name]) / 2)


def _complaint(
    before: Mapping[str, Any], last: Mapping[str, Any], recipe: Recipe, *, has_ended: bool = False
) -> str | None:
    if has_begun(last):
        return None
    sign = next(name for name, least in LEAST.items() if _is_below(last.get(name), least))
    return f"{_seen(sign, last[sign], last['step'])}; {_remedy(sign, before, last, recipe, has_ended)}"


def _seen(sign: str, value: float, step: int) -> str:
    if sign == SOURCE_USE:
        return (
            f"the model does not use its sources after {step} updates: with those of other examples the valid loss "
            + (f"changes by {value:+.3f} nats" if abs(value) >= NOTHING else "is the same")
        )
    return (
        f"the model predicts nearly the same for all valid examples after {step} updates: its predictions (of classes "
        f"the probabilities) spread {100 * value:.1f} % as far as the labels do; {100 * LEAST[sign]:.0f} % is a "
        "beginning"
    )


def _remedy(sign: str, before: Mapping[str, Any], last: Mapping[str, Any], recipe: Recipe, has_ended: bool) -> str:
    rate, warmup = f"learning_rate (={recipe.learning_rate:g})", f"warmup_updates (={recipe.warmup_updates})"
    is_growing = last[sign] > before.get(sign, 0.0)
    # The source use is a difference of two losses: when it is this small, so are the errors of its measurement.
    if abs(last[sign]) < NOTHING and not (is_growing and sign != SOURCE_USE):
        falls = " though the valid loss falls" if last["loss"] < before["loss"] else ""
        return f"it has collapsed{falls}: lower {rate} or raise {warmup}"
    grows = " and this grows" if is_growing else ""
    longer = f"train longer than {recipe.updates} updates"
    if has_ended and recipe.patience is not None and last["step"] < recipe.total_updates:
        longer = f"raise patience (={recipe.patience}), which ended training after {last['step']} updates"
    alpha = [] if recipe.method.is_plain else [f"lower alpha (={recipe.method.alpha:g})"]
    if alpha and recipe.method.alpha_schedule != "quadratic":
        alpha = [f"delay alpha (alpha_schedule=quadratic) or {alpha[0]}"]
    remedies = [*alpha, f"lower {rate}", longer] if sign == SOURCE_USE else [longer, f"change {rate}", *alpha]
    return f"it is slow to begin{grows}: {', '.join(remedies[:-1])}, or {remedies[-1]}"

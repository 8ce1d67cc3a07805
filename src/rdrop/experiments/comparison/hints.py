"""Hints beside a verdict, from the curves of finished runs: whether a comparison was long enough to be judged.

Each function looks at one thing and returns a sentence, or None where it does not apply. The thresholds are ours.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rdrop.experiments import metrics
from rdrop.experiments.comparison.arms import Arm, is_of_rdrop
from rdrop.experiments.comparison.finished_runs import FinishedRun, LostRun, is_finite_number
from rdrop.experiments.comparison.learning import has_learned
from rdrop.experiments.comparison.wording import counted, words
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.settings import typed
from rdrop.experiments.shown import shell_line

PAGE = "docs/when-it-helps.md"
LEAST_SCORES = 6
"""Scores of the valid split that a curve must have to be judged."""
TURNED_UP = 0.05
"""A valid loss has turned up where it ends this share of its fall above its lowest."""
RISING = 0.03
"""A score still rises where its last three values add this share of all that was gained."""
FAR_ABOVE = 0.25
"""A training loss is far above another where it has made up this share less of the way down."""
EARLY = 0.5
"""Plain training is at its best early where its weights are from this share of its updates or less."""
NO_DIVERGENCE = 1e-4
"""A divergence is 0 where it stays below this share of the task loss of the same updates."""
_LENGTHS = ("updates", "epochs")
_PLAIN = "alpha=0"


def hints(baseline: Arm | None, arms: Sequence[Arm], metric: str, *, pays: bool) -> list[str]:
    """Returns the hints that apply to a comparison of these arms by `metric`, in the order of their weight.

    `pays`: whether an R-Drop arm is shown to be better than the baseline.
    """
    rdrop = [arm for arm in arms if not arm.method.is_plain]
    if not rdrop:
        return []
    found = [no_divergence(arm) for arm in rdrop]
    if baseline is not None:
        learning, early = still_learning(baseline, metric), best_early(baseline, arms)
        found += [learning, None if pays or early else nothing_to_regularize(baseline)]
        found += [alpha_too_large(arm, baseline, metric) for arm in rdrop]
        found.append(None if learning else early)  # a training is not too long and too short
    return [hint for hint in (*found, cross_validation(arms)) if hint is not None]


def nothing_to_regularize(baseline: Arm) -> str | None:
    """Says that plain training does not overfit: its valid loss never turned up on any seed.

    One that its patience has ended cannot be made longer.
    """
    curves = [_curve(run, "valid", "loss") for run in baseline.runs]
    if not curves or _end_early(baseline) or any(len(curve) < LEAST_SCORES or _turned_up(curve) for curve in curves):
        return None
    return (
        f"The valid loss of {baseline.phrase} never turned up: it has not overfitted, so there is little to regularize "
        f"yet. Train longer before you judge ({PAGE})."
    )


def _turned_up(losses: Sequence[float]) -> bool:
    lowest = min(losses)
    return losses[-1] - lowest > TURNED_UP * (losses[0] - lowest)


def still_learning(baseline: Arm, metric: str) -> str | None:
    """Says that plain training has not converged: its valid score still rises at the end, on most seeds.

    One that its patience has ended cannot be made longer.
    """
    if _end_early(baseline):
        return None
    curves = [_curve(run, "valid", metric) for run in baseline.runs]
    rising = [len(curve) >= LEAST_SCORES and _rises(curve, metric) for curve in curves]
    if sum(rising) * 2 <= len(rising):
        return None
    course = "rises" if metrics.find(metric).higher_is_better else "falls"
    return (
        f"The valid {words(metric)} of {baseline.phrase} still {course} at the end: it is still learning. "
        f"Train longer before you judge ({PAGE})."
    )


def _rises(scores: Sequence[float], metric: str) -> bool:
    sign = 1 if metrics.find(metric).higher_is_better else -1
    gains = [sign * score for score in scores]
    before, last = max(gains[:-3]), max(gains[-3:])
    return last - before > RISING * (last - gains[0])


def no_divergence(arm: Arm) -> str | None:
    """Says that the passes of an R-Drop arm never differed."""
    runs = [run for run in arm.runs if has_learned(run) is not False]
    rows = [row for run in runs for row in run.metrics if is_finite_number(row.get("divergence"))]
    if not rows or any(row["divergence"] > NO_DIVERGENCE * _number(row.get("task_loss")) for row in rows):
        return None
    has_views = arm.method.views == "each"
    inputs = "let their inputs differ: views=each for images, a cutoff and its cutoff_ratio for texts"
    remedy = "augment them more" if has_views else inputs
    return (
        f"The divergence of {arm.label} stays at 0: its passes hardly differ, so R-Drop does nothing. Raise the "
        f"dropout rate, or {remedy} ({PAGE})."
    )


def alpha_too_large(arm: Arm, baseline: Arm, metric: str) -> str | None:
    """Says that R-Drop keeps a model from learning: its training loss ends far above, and its valid score no better."""
    own, plain = _mean_score(arm, metric), _mean_score(baseline, metric)
    if own is None or plain is None or metrics.find(metric).is_better(own, plain):
        return None
    start, low, high = _mean_loss(baseline, 0), _mean_loss(baseline, -1), _mean_loss(arm, -1)
    if any(len(_curve(run, "train", "task_loss")) < LEAST_SCORES for run in (*baseline.runs, *arm.runs)):
        return None
    if start is None or low is None or high is None or not start > low or high - low <= FAR_ABOVE * (start - low):
        return None
    or_rise = ", or let it rise (alpha_schedule=quadratic)" if arm.method.alpha_schedule == "constant" else ""
    return (
        f"The training loss of {arm.label} ends at {high:.3g}, far above {low:.3g} of {baseline.phrase}: alpha is too "
        f"large. Lower it{or_rise} ({PAGE})."
    )


def best_early(baseline: Arm, arms: Sequence[Arm]) -> str | None:
    """Says that plain training is past its best early on most seeds, where no arm trains plainly for less long.

    The best of a run that learned nothing is chance.
    """
    if baseline.has_failed_runs:
        return None
    lengths = [_planned_updates(run) for run in baseline.runs]
    bests = [(run.result.get("averaged_steps") or [run.result.get("best_step")])[-1] for run in baseline.runs]
    shares = [best / length for best, length in zip(bests, lengths, strict=True) if best and length]
    early = sum(share <= EARLY for share in shares)
    if len(shares) < len(baseline.runs) or early * 2 <= len(shares):
        return None
    recipe = baseline.recipe
    if any(arm.method.is_plain and _is_shorter(arm.recipe, recipe) for arm in arms):
        return None
    given = " ".join(shell_line(["--arm", settings]) for settings in _with_a_shorter(baseline, arms))
    return (
        f"The weights of {baseline.phrase} are from the first {100 * EARLY:.0f} % of its planned updates on {early} of "
        f"{counted(len(shares), 'seed')}. A training that is planned to be shorter, so that its learning rate falls in "
        f"time, may do as well as R-Drop for less. Set it beside, in `rdrop compare`: {given} ({PAGE})."
    )


def _with_a_shorter(baseline: Arm, arms: Sequence[Arm]) -> list[str]:
    """Returns the settings of the arms that `--arm` must name, as it replaces all but the recipe and its baseline: the
    other plain ones, where the comparison was designed those of R-Drop too, and half of the baseline.
    """
    subject = next((arm for arm in reversed(arms) if not arm.method.is_plain), baseline)
    own, reference = _flat(baseline.first), _flat(subject.first)
    first = _settings(own, reference)
    others = [arm for arm in arms if arm is not subject and (arm.method.is_plain or first != _PLAIN)]
    beside = [_settings(_flat(arm.first), reference) for arm in others]
    halves = {key: _half(own[key]) for key in (*_LENGTHS, "warmup_updates") if own.get(key)}
    return [*(settings for settings in beside if settings != _PLAIN), _settings(own | halves, reference)]


def _settings(arm: Mapping[str, Any], reference: Mapping[str, Any]) -> str:
    """Returns the settings that make an arm of the reference, both given by `_flat`."""
    is_plain = not arm["alpha"]
    found = [_PLAIN] if is_plain else []
    for key in {**arm, **reference}:
        value, other = (side.get(key, Recipe.left_out(key)) for side in (arm, reference))
        if value != other and not (is_plain and is_of_rdrop(key)):
            number = int(value) if isinstance(value, float) and value.is_integer() else value
            found.append(shlex.quote(typed(key, number)))  # as `--arm` reads its words
    return " ".join(found)


def _flat(run: FinishedRun | LostRun) -> dict[str, Any]:
    """Returns the settings of a run by their keys: `alpha`, `updates`, `model.dropout`."""
    found = run.method.model_dump(mode="json")
    for key, value in run.recipe.items():
        if isinstance(value, Mapping) and key != "method":
            found |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif key not in ("format", "name", "task", "method", "seed"):
            found[key] = value
    return found


def _planned_updates(run: FinishedRun) -> float | None:
    """Returns the length of the training had nothing ended it early; None where epochs are not told by the scores."""
    updates, epochs = run.recipe.get("updates"), run.recipe.get("epochs")
    if updates or not epochs or run.recipe.get("evaluate_every") is not None:
        return updates or None
    scored = [row["step"] for row in run.metrics if row.get("kind") == "valid"]  # after every epoch
    return epochs * min(scored) if scored else None


def _end_early(arm: Arm) -> bool:
    """Whether most runs of an arm were ended before their planned length, by their patience."""
    lengths = [(run.result.get("updates"), _planned_updates(run)) for run in arm.runs]
    early = [int(made) < round(planned) for made, planned in lengths if made and planned]
    return 2 * sum(early) > len(lengths)


def _is_shorter(recipe: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(recipe[key] < other[key] for key in _LENGTHS if recipe.get(key) and other.get(key))


def _half(length: float) -> float:
    return length / 2 if isinstance(length, float) else max(1, length // 2)


def cross_validation(arms: Sequence[Arm]) -> str | None:
    """Says that each seed is scored on a part of its own."""
    runs = [run for arm in arms for run in arm.runs]
    folds = [count for run in runs if (count := folds_of(run)) is not None]
    if not folds:
        return None
    seeds, number = {run.seed for run in runs}, max(folds)
    parts = len({seed % number for seed in seeds})
    own = "a part of its own, of" if parts == len(seeds) else "one part of"
    found = [
        f"Cross-validation: each seed is scored on {own} {number} (data.folds), and {counted(len(seeds), 'seed')} are "
        "compared. Scores of different parts are of different examples."
    ]
    if parts < len(seeds):
        found.append(f"The seeds that differ by a multiple of {number} are scored on the same part.")
    if parts < number:
        found.append(f"{number - parts} of the parts are not scored.")
    return " ".join([*found, "Trainings share most of theirs, so the intervals are somewhat too narrow."])


def folds_of(run: FinishedRun) -> int | None:
    """Returns into how many parts the examples were cut, one a seed for its test; None: all seeds share the test."""
    data = run.recipe.get("data")
    is_of_a_file = run.result.get("test_file") is not None  # its weights were scored again
    folds = data.get("folds") if isinstance(data, Mapping) and not is_of_a_file else None
    return folds if isinstance(folds, int) else None


def _curve(run: FinishedRun, kind: str, key: str) -> list[float]:
    """Returns the finite values of a key, in the order of the updates."""
    return [float(row[key]) for row in run.metrics if row.get("kind") == kind and is_finite_number(row.get(key))]


def _number(value: Any) -> float:
    """Returns the value where it is a finite number, else 0."""
    return float(value) if is_finite_number(value) else 0.0


def _mean_loss(arm: Arm, place: int) -> float | None:
    """Returns the mean task loss of a training row, the first (0) or the last (-1), over the seeds."""
    losses = [curve[place] for run in arm.runs if (curve := _curve(run, "train", "task_loss"))]
    return fmean(losses) if losses else None


def _mean_score(arm: Arm, metric: str) -> float | None:
    scores = arm.scores(metric, "valid").values()
    return fmean(scores) if scores else None

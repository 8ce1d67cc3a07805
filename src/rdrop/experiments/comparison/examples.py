"""Two arms compared test example by test example, from the predictions that their runs keep.

The seeds say whether a method is better when it is trained again. The examples say whether the models that were
trained differ on this test set: a paired bootstrap draws the examples again, with replacement, the same for both arms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.comparison.finished_runs import FinishedRun, is_finite_number
from rdrop.experiments.run_folder import ResultsError
from rdrop.experiments.run_folder.predictions import Predictions, read_predictions

RESAMPLES = 1000
_AT_ONCE = 100
_MOST_CLASSES = 50  # of a score that needs the whole confusion matrix

Array = NDArray[np.float64]


class Score(NamedTuple):
    """A score as a function of sums over the examples, so that it can be computed of any number of resamples."""

    terms: Array
    """`(N, S)`: what each example adds to the S sums."""
    of_sums: Callable[[Array], Array]
    """From sums `(B, S)` to scores `(B,)`."""

    def value(self) -> float:
        """Returns the score of the examples as they are."""
        return float(self.of_sums(self.terms.sum(axis=0)[None])[0])


@dataclass(frozen=True)
class KeptExamples:
    """The predictions of several runs for the same test examples, and what could not be used of others."""

    metric: str
    of_run: Mapping[Path, Predictions]
    problems: tuple[str, ...] = ()

    def has(self, run: FinishedRun) -> bool:
        return run.path in self.of_run


@dataclass(frozen=True)
class ExampleDifference:
    """The outcome of a paired bootstrap over the test examples, for the models of two arms."""

    seeds: tuple[int, ...]
    examples: int
    interval: tuple[float, float]
    """95 % interval of the difference, averaged over the seeds: arm minus reference."""
    of_seeds: tuple[tuple[float, float], ...]
    """The same of the two models of each seed alone."""

    @property
    def differing_seeds(self) -> tuple[int, ...]:
        """The seeds whose two models differ on this test set: their interval excludes zero."""
        pairs = zip(self.seeds, self.of_seeds, strict=True)
        return tuple(seed for seed, (low, high) in pairs if not low <= 0 <= high)


class ChangedExample(NamedTuple):
    """One test example on which two arms differ, and by how much in the example's own score."""

    example: str
    expected: str
    reference_says: str
    arm_says: str
    reference_score: float
    arm_score: float


def kept_examples(runs: Iterable[FinishedRun], metric: str) -> KeptExamples:
    """Reads the predictions of the runs, and leaves out what is damaged or of another test score or other examples."""
    of_run: dict[Path, Predictions] = {}
    problems = []
    expected: list[Any] | None = None
    for run in runs:
        try:
            predictions = read_predictions(run.path)
        except ResultsError as error:
            problems.append(str(error))
            continue
        score = run.result["test"].get(metric)
        if predictions is None or score_of(predictions, metric) is None or not is_finite_number(score):
            continue
        if not _gives(predictions, metric, score):
            problems.append(f"{run.path}: they do not give the test {metric} of its result")
            continue
        own = _what_is_asked(predictions)
        if expected is None:
            expected = own
        if own == expected:
            of_run[run.path] = predictions
        else:
            what = "its test examples are not those of the other runs, so its scores cannot be compared with theirs"
            problems.append(f"{run.path}: {what}")
    return KeptExamples(metric, of_run, tuple(problems))


def _gives(predictions: Predictions, metric: str, score: float) -> bool:
    """Whether the score of the result is that of these predictions."""
    found = score_of(predictions, metric)
    return found is not None and bool(np.isclose(found.value(), score, rtol=1e-4, atol=1e-6))


def _what_is_asked(predictions: Predictions) -> list[Any]:
    return [(row["example"], row.get("label"), row.get("references")) for row in predictions.rows]


# -------------------------------------------------------------------------------------------------------- the scores


def score_of(predictions: Predictions, metric: str) -> Score | None:
    """Returns the metric of the predictions as a `Score`; None for one that is no function of sums, or not kept."""
    if not predictions.rows:
        return None
    match predictions.kind:
        case "classes":
            return _score_of_classes(predictions, metric)
        case "numbers" if metric == "pearson":
            columns = (_column(predictions, key) for key in ("predicted", "label"))
            predicted, labels = (column - column.mean() for column in columns)  # a large mean would cost their digits
            products = (predicted * labels, predicted**2, labels**2)
            return Score(np.stack([np.ones_like(labels), predicted, labels, *products], axis=1), _pearson)
        case "texts":
            first = predictions.rows[0]
            if metric in first.get("scores", {}):
                return _mean_of(np.array([row["scores"][metric] for row in predictions.rows], dtype=np.float64))
            if metric in first.get("bleu", {}):
                return Score(np.array([row["bleu"][metric] for row in predictions.rows], dtype=np.float64), _bleu)
    return None


def _score_of_classes(predictions: Predictions, metric: str) -> Score | None:
    predicted, labels = _column(predictions, "predicted"), _column(predictions, "label")
    if metric == "accuracy":
        return _mean_of((predicted == labels).astype(np.float64))
    if metric == "loss":
        return _mean_of(_column(predictions, "loss"))
    count = len(predictions.classes)
    scores = {"f1": _f1_of_class_1, "f1_macro": _f1_macro, "mcc": _mcc}
    if metric not in scores or count > _MOST_CLASSES:
        return None
    cells = np.eye(count * count)[(labels * count + predicted).astype(np.int64)]
    return Score(cells, lambda sums: scores[metric](sums.reshape(-1, count, count)))


def _column(predictions: Predictions, key: str) -> Array:
    return np.array([row[key] for row in predictions.rows], dtype=np.float64)


def _mean_of(values: Array) -> Score:
    return Score(np.stack([values, np.ones_like(values)], axis=1), lambda sums: sums[:, 0] / sums[:, 1])


def _f1(confusion: Array) -> Array:
    """Computes the F1 of each class from confusions `(B, label, predicted)`; 0 of a class that nobody has or says."""
    right = np.diagonal(confusion, axis1=1, axis2=2)
    total = confusion.sum(axis=1) + confusion.sum(axis=2)
    found: Array = np.divide(2 * right, total, out=np.zeros_like(right), where=total > 0)
    return found


def _f1_of_class_1(confusion: Array) -> Array:
    return _f1(confusion)[:, 1]


def _f1_macro(confusion: Array) -> Array:
    occurs = confusion.sum(axis=1) + confusion.sum(axis=2) > 0
    found: Array = _f1(confusion).sum(axis=1) / occurs.sum(axis=1)
    return found


def _mcc(confusion: Array) -> Array:
    """Computes the Matthews correlation of several classes: the correlation of one-hot labels and predictions."""
    labels, predicted = confusion.sum(axis=2), confusion.sum(axis=1)
    total, right = confusion.sum(axis=(1, 2)), np.trace(confusion, axis1=1, axis2=2)
    above = right * total - (labels * predicted).sum(axis=1)
    below = np.sqrt((total**2 - (predicted**2).sum(axis=1)) * (total**2 - (labels**2).sum(axis=1)))
    found: Array = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


def _pearson(sums: Array) -> Array:
    n, x, y, xy, xx, yy = sums.T
    above = n * xy - x * y
    below = np.sqrt(np.maximum(n * xx - x**2, 0) * np.maximum(n * yy - y**2, 0))
    found: Array = np.divide(above, below, out=np.zeros_like(above), where=below > 0)
    return found


def _bleu(sums: Array) -> Array:
    return np.array([_bleu_score(own) for own in sums])


def _bleu_score(counts: Array, *, of_sentence: bool = False) -> float:
    """Computes the BLEU of summed counts, as sacreBLEU does; of one sentence without the n-grams that it lacks."""
    # Only a translation needs it.
    from sacrebleu.metrics.bleu import BLEU

    sys_len, ref_len, *of_ngrams = map(int, counts)
    score = BLEU.compute_bleu(
        of_ngrams[:4], of_ngrams[4:], sys_len, ref_len, smooth_method="exp", effective_order=of_sentence
    )
    return float(score.score)


# ------------------------------------------------------------------------------------------------------ the bootstrap


def example_difference(
    kept: KeptExamples, arm: Sequence[FinishedRun], reference: Sequence[FinishedRun]
) -> ExampleDifference | None:
    """Draws the test examples again, 1,000 times, and returns how far the difference of the two arms varies.

    Of each arm count the seeds of which both keep their predictions; None without any.
    """
    pairs = _pairs(kept, arm, reference)
    if not pairs:
        return None
    of_runs = [score_of(kept.of_run[run.path], kept.metric) for runs in pairs.values() for run in runs]
    scores = [score for score in of_runs if score is not None]  # all of them: the others were left out when read
    resampled = resampled_scores(scores)
    differences = resampled[::2] - resampled[1::2]
    of_seeds = tuple(_interval(own) for own in differences)
    return ExampleDifference(tuple(pairs), len(scores[0].terms), _interval(differences.mean(axis=0)), of_seeds)


def resampled_scores(scores: Sequence[Score]) -> Array:
    """Returns the scores `(R, B)` of R runs on each of B resamples of their N examples, which are the same for all."""
    size = len(scores[0].terms)
    draw = np.random.default_rng(0)
    parts = []
    for _ in range(RESAMPLES // _AT_ONCE):
        drawn = draw.integers(size, size=(_AT_ONCE, size))
        times = np.stack([np.bincount(own, minlength=size) for own in drawn]).astype(np.float64)
        parts.append([score.of_sums(times @ score.terms) for score in scores])
    return np.concatenate(parts, axis=1)


def _interval(values: Array) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _pairs(
    kept: KeptExamples, arm: Sequence[FinishedRun], reference: Sequence[FinishedRun]
) -> dict[int, tuple[FinishedRun, FinishedRun]]:
    of_arm, of_reference = ({run.seed: run for run in runs if kept.has(run)} for runs in (arm, reference))
    return {seed: (of_arm[seed], of_reference[seed]) for seed in sorted(of_arm.keys() & of_reference.keys())}


# -------------------------------------------------------------------------------------------------- what has changed


def churn(kept: KeptExamples, runs: Sequence[FinishedRun]) -> float | None:
    """Returns how often the models of two seeds predict different classes, as a share of the test examples.

    It is the mean over all pairs of seeds; None with fewer than two, and where no classes are predicted.
    """
    predictions = [kept.of_run[run.path] for run in runs if kept.has(run)]
    if len(predictions) < 2 or predictions[0].kind != "classes":
        return None
    of_runs = [_column(own, "predicted") for own in predictions]
    return float(np.mean([np.mean(first != second) for first, second in combinations(of_runs, 2)]))


def changed_examples(
    kept: KeptExamples, arm: Sequence[FinishedRun], reference: Sequence[FinishedRun], most: int
) -> tuple[list[ChangedExample], list[ChangedExample]]:
    """Returns the examples on which the arm gains most and on which it loses most, at most so many of each."""
    pairs = _pairs(kept, arm, reference)
    if not pairs:
        return [], []
    of_arm, of_reference = ([kept.of_run[runs[side].path] for runs in pairs.values()] for side in (0, 1))
    arm_scores, reference_scores = (
        np.mean([_score_of_each(own, kept.metric) for own in of_side], axis=0) for of_side in (of_arm, of_reference)
    )
    gains = arm_scores - reference_scores
    order = np.argsort(-gains, kind="stable")

    def changed(row: int) -> ChangedExample:
        first = of_arm[0]
        return ChangedExample(
            first.rows[row]["example"],
            _expected(first.rows[row], first),
            _says([own.rows[row] for own in of_reference], first),
            _says([own.rows[row] for own in of_arm], first),
            float(reference_scores[row]),
            float(arm_scores[row]),
        )

    best = [changed(row) for row in order[:most].tolist() if gains[row] > 0]
    worst = [changed(row) for row in order[::-1][:most].tolist() if gains[row] < 0]
    return best, worst


def _score_of_each(predictions: Predictions, metric: str) -> Array:
    """Returns the score of each example alone, higher is better: right or wrong, error below zero, ROUGE or BLEU."""
    if predictions.kind == "classes":
        return np.array([row["predicted"] == row["label"] for row in predictions.rows], dtype=np.float64)
    if predictions.kind == "numbers":
        errors: Array = -np.abs(_column(predictions, "predicted") - _column(predictions, "label"))
        return errors
    if metric in predictions.rows[0].get("scores", {}):
        return np.array([row["scores"][metric] for row in predictions.rows], dtype=np.float64)
    return np.array([_bleu_score(np.array(row["bleu"][metric]), of_sentence=True) for row in predictions.rows])


def _expected(row: Mapping[str, Any], predictions: Predictions) -> str:
    if predictions.kind == "classes":
        return str(predictions.classes[row["label"]])
    return f"{row['label']:g}" if predictions.kind == "numbers" else str(row["references"][0])


def _says(rows: Sequence[Mapping[str, Any]], predictions: Predictions) -> str:
    """Returns what the runs of an arm predict, in words: the classes by their number of runs, the mean number, or the
    text of the first seed.
    """
    match predictions.kind:
        case "classes":
            counts = Counter(predictions.classes[row["predicted"]] for row in rows).most_common()
            return ", ".join(name if len(rows) == 1 else f"{name} ({count})" for name, count in counts)
        case "numbers":
            return f"{np.mean([row['predicted'] for row in rows]):.3g}"
    return str(rows[0]["predicted"])

"""The scores of classifiers and of predicted numbers, by the name they have in a result."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from rdrop.experiments.tasks.class_scores import calibration_error, constant_class_scores, top_class_confidence


def score_texts(names: Iterable[str], outputs: NDArray[Any], labels: NDArray[Any]) -> dict[str, float]:
    """Scores logits `(N, V)` or predicted numbers `(N, 1)` against `labels` `(N,)`; all scores are at most 1.

    accuracy    share of right classes
    f1          F1 of class 1 of two; f1_macro: the mean of those of the classes that occur or are predicted
    mcc         Matthews correlation coefficient
    ece         expected calibration error
    pearson     correlation of the numbers; spearman: of their ranks
    """
    found = {}
    for name in names:
        if name in ("pearson", "spearman"):
            found[name] = _correlation(name, outputs[:, 0].astype(np.float64), labels.astype(np.float64))
        elif name == "ece":
            found[name] = calibration_error(top_class_confidence(outputs), outputs.argmax(-1) == labels)
        else:
            found[name] = _of_classes(name, outputs.argmax(-1), labels)
    return found


def constant_scores(names: Iterable[str], labels: NDArray[Any]) -> dict[str, float]:
    """Returns the loss and the scores of the best constant prediction of `labels` `(N,)`; a correlation has none."""
    if labels.dtype.kind == "f":
        return {"loss": float(labels.var(dtype=np.float64))}
    constants = [np.full_like(labels, label) for label in np.unique(labels)]
    best = {name: max(_of_classes(name, constant, labels) for constant in constants) for name in names}
    return constant_class_scores(labels) | best


def _of_classes(name: str, predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    match name:
        case "accuracy":
            return float(accuracy_score(labels, predicted))
        case "f1":
            return float(f1_score(labels, predicted, zero_division=0.0))
        case "f1_macro":
            return float(f1_score(labels, predicted, average="macro", zero_division=0.0))
        case "mcc":
            return float(matthews_corrcoef(labels, predicted))
    raise ValueError(f"no such score: {name}")


def _correlation(name: str, predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> float:
    if np.ptp(predicted) == 0:  # undefined; a model that says the same of all texts has learned nothing
        return 0.0
    return float((pearsonr if name == "pearson" else spearmanr)(predicted, labels).statistic)

"""Scores of predicted classes that every task with classes reports, and what a reader should know beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

BINS = 15
SHOWN_CLASSES, LONGEST_NAME = 8, 60  # in a note


def top_class_confidence(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns the probability that the softmax of logits `(N, V)` gives to the most likely class, `(N,)`."""
    wide = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of infinite logits it is NaN
        confidence: NDArray[np.float64] = 1 / np.exp(wide - wide.max(axis=-1, keepdims=True)).sum(axis=-1)
    return confidence


def calibration_error(confidence: NDArray[np.float64], is_right: NDArray[np.bool_]) -> float:
    """Returns the expected calibration error (ECE), as a fraction of 1: how far confidence is from accuracy.

    The N predictions are put into `BINS` bins of equal width by their confidence, the probability of the class that is
    predicted. The error is the mean over the predictions of |accuracy of the bin - mean confidence of the bin|, as in
    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Each bin has its upper end and not its lower one.
    Of a diverged model, which is certain of nothing, it is NaN.
    """
    if not np.isfinite(confidence).all():
        return math.nan
    bins = np.ceil(confidence * BINS).astype(np.int64)
    return float(np.abs(np.bincount(bins, weights=is_right - confidence)).sum() / len(confidence))


def prediction_spread(predictions: NDArray[np.floating], labels: NDArray[Any]) -> dict[str, float]:
    """Measures how far predictions differ between examples, as a share of how far the labels do.

    `predictions` are logits `(N, V)` for classes `labels` `(N,)`, or numbers `(N, K)` for numbers `(N, K)`. The share
    is one of standard deviations, over all V probabilities or K numbers: 0 for a model that says the same of every
    example, 1 for one that says the labels. Returns `{"prediction_spread": ...}`; nothing where all labels are equal.
    """
    values = predictions.astype(np.float64)
    if labels.dtype.kind == "f":
        spread = labels.astype(np.float64).var(axis=0).sum()
    else:
        values = np.exp(values - values.max(axis=-1, keepdims=True))
        values /= values.sum(axis=-1, keepdims=True)
        spread = 1 - ((np.bincount(labels) / len(labels)) ** 2).sum()  # the variances of the labels, one-hot
    return {} if np.ptp(labels) == 0 else {"prediction_spread": float(np.sqrt(values.var(axis=0).sum() / spread))}


def constant_class_scores(labels: NDArray[np.integer]) -> dict[str, float]:
    """Returns the loss and the accuracy of the best constant prediction of `labels` `(N,)`.

    The loss is that of predicting the share of each class, the accuracy that of always saying the commonest class.
    """
    shares = np.bincount(labels) / len(labels)
    shares = shares[shares > 0]
    return {"loss": float(-(shares * np.log(shares)).sum()), "accuracy": float(shares.max())}


def notes_on_classes(classes: Sequence[str], labels: Mapping[str, NDArray[np.int64]]) -> dict[str, str]:
    """Returns a note for each split, such as "valid", whose `labels` `(N,)` lack some of the classes."""
    notes = {}
    for split, of_split in labels.items():
        present = np.unique(of_split)
        missing = np.setdiff1d(np.arange(len(classes)), present)
        if len(present) == 1:
            says = "scores of it say nothing" if split != "train" else "nothing else can be learned"
            notes[f"classes of {split}"] = f"all {len(of_split)} examples are {shown_name(classes[present[0]])}: {says}"
        elif len(missing):
            notes[f"classes of {split}"] = f"no example of {_listed([classes[label] for label in missing])}"
    return notes


def note_on_predictions(
    split: str, classes: Sequence[str], predicted: NDArray[np.int64], labels: NDArray[np.int64]
) -> dict[str, str]:
    """Returns a note if a model says the same class of all examples of a split that has several; else nothing."""
    if np.ptp(labels) == 0 or np.ptp(predicted) > 0:
        return {}
    name = shown_name(classes[int(predicted[0])])
    return {f"predictions on {split}": f"all {len(predicted)} are {name}: the model does not tell the classes apart"}


def shown_name(name: str) -> str:
    """Returns the name of a class as a note quotes it, the beginning of a long one."""
    return repr(name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME]}...")


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(shown_name, names[:SHOWN_CLASSES]))
    return shown if len(names) <= SHOWN_CLASSES else f"{shown} and {len(names) - SHOWN_CLASSES} more of the classes"

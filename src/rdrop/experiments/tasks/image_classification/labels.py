"""Checks labels and names of classes: what would be learned as a class, and is a slip, is a `DataError`."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.spelling import MISSING_AS_SPELLED, is_missing, label_key


def require_labels(labels: NDArray[Any], images: int, where: str, *, classes: int | None = None) -> None:
    """Refuses labels that are not one integer from 0 for each image, below `classes` where these are declared."""
    require_label_for_each(images, labels.shape, labels.dtype, where)
    limit = classes or len(labels)  # more classes than images is a slip
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise DataError(
            f"{where}: label {wrong[0]} is {labels[wrong[0]]}; labels are from 0 to {limit - 1}, so correct it"
        )


def require_label_for_each(images: int, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> None:
    """Refuses an array of labels that is not one integer for each image, before it is read."""
    if len(shape) != 1 or dtype.kind not in "iu":
        what = f"must be integers of shape (N,), not {dtype} of shape {shape}"
        raise DataError(f"{where}: {what}; convert it{_conversion(shape, dtype)}")
    if shape[0] != images:
        raise DataError(f"{where}: has {shape[0]} labels for {images} images; each image needs its own")


def _conversion(shape: tuple[int, ...], dtype: np.dtype[Any]) -> str:
    """Says how labels of other types and shapes become class indices, where there is one way."""
    if len(shape) == 2:
        return ": labels[:, 0]" if shape[1] == 1 else ": labels.argmax(1), if each row has a single one"
    if dtype.kind in "US":
        return ": numpy.unique(labels, return_inverse=True)[1]"
    if dtype.kind in "fb":
        return ": labels.astype('int64'), if all are whole numbers"
    return ""


def require_classes_in_use(labels: NDArray[np.int64], classes: Sequence[str], where: str, *, declared: bool) -> None:
    """Refuses training labels `(N,)` of fewer than two classes and, where no list declares them, numbers left out."""
    used = np.unique(labels)
    if len(used) < 2:
        name = classes[used[0]]
        raise DataError(f"{where}: all {len(labels)} images are of the class {name!r}; give two classes or more")
    if not declared and len(used) < len(classes):
        missing = np.setdiff1d(np.arange(len(classes)), used)[0]
        raise DataError(
            f"{where}: no image has the label {missing}, and the highest is {used[-1]}; number the classes from 0 "
            "without gaps, e.g. labels = numpy.unique(labels, return_inverse=True)[1]"
        )


def require_names_that_can_be_shown(names: Sequence[str], where: str) -> None:
    """Refuses names of folders that are not UTF-8 or would do something to a terminal."""
    for name in names:
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
            raise DataError(f"{where}: the folder {name!a} has characters that cannot be shown; rename it")


def require_one_spelling(names: Sequence[str], where: str) -> None:
    """Refuses two names of classes that look the same, and one that stands for a missing value."""
    first: dict[str, str] = {}
    for name in names:
        if is_missing(name) and name not in MISSING_AS_SPELLED:  # a class may be called "None"
            raise DataError(
                f"{where}: the class {name!a} is called as programs write a missing value; give its images a class, "
                "leave them out, or rename it"
            )
        other = first.setdefault(label_key(name), name)
        if other != name:
            raise DataError(
                f"{where}: {other!a} and {name!a} are one class in two spellings; put their images together"
            )

"""The splits of a data set: their names, what is held out where one is missing, and what they may not share."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import chain, combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.tasks.files import AnyPath, DataError, have_same_content

SPLITS = ("train", "valid", "test")
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
"""What the hub calls them."""

FEW = 100
"""Examples of valid or test below which their scores say little: one of them is a point of accuracy."""

Rows = NDArray[np.int64]

WHERE_REPEATED = {
    "train": "trained on too",
    "unlabeled": "unlabeled examples too",
    "valid": "in valid too, which chooses the checkpoint",
}


def hold_out(size: int, missing: Collection[str], seed: int) -> dict[str, Rows]:
    """Draws 10 % of `range(size)` for each `missing` one of "valid" and "test"; "train" is the rest. All are sorted.

    Either has the same rows whether or not the other is missing.
    """
    if not missing:
        return {"train": np.arange(size)}
    require_ten(size, "examples")
    order, tenth = np.random.default_rng(seed).permutation(size), size // 10
    drawn = {"valid": order[:tenth], "test": order[tenth : 2 * tenth]}
    rows = {split: np.sort(own) for split, own in drawn.items() if split in missing}
    return {"train": np.setdiff1d(order, np.concatenate([*rows.values()]))} | rows


def fold_rows(
    size: int, folds: int, seed: int, split_seed: int, labels: NDArray[np.int64] | None = None
) -> dict[str, Rows]:
    """Cuts `range(size)` into `folds` parts for a cross-validation: part `seed` modulo `folds` is "test", the next one
    "valid", the others are "train". All are sorted.

    So of `folds` seeds in a row each tests other examples, and all are tested. `split_seed` draws the parts; with the
    classes `labels` `(N,)` of all rows, each has of every class its share, to about one example.
    """
    if size < folds:
        raise DataError(f"data.folds (={folds}) must be at most the number of examples (={size})")
    sizes = [len(part) for part in np.array_split(np.arange(size), folds)]
    part_of = _stratified(np.zeros(size, np.int64) if labels is None else labels, sizes, split_seed)
    test, valid = seed % folds, (seed + 1) % folds
    return {
        "train": np.flatnonzero((part_of != test) & (part_of != valid)),
        "valid": np.flatnonzero(part_of == valid),
        "test": np.flatnonzero(part_of == test),
    }


def require_ten(size: int, unit: str) -> None:
    if size < 10:
        raise DataError(f"{size} {unit} are too few to hold out 10 %; give 10 or more, or data.valid and data.test")


def require_count(where: str, found: int, expected: int | None, unit: str, key: str = "data.counts") -> None:
    """Raises `DataError` unless a split has as many examples as the recipe's `key` says; None: any number."""
    if expected is not None and found != expected:
        raise DataError(
            f"{where}: has {found} {unit} and must have {expected}; get it again, or set {key}=null if it is meant to "
            "differ"
        )


def require_different_files(files: Mapping[str, Sequence[AnyPath]], *, of_folder: bool = False) -> None:
    """Raises `DataError` if two splits have the same files, by whatever path, or copies of them.

    `of_folder`: they are those of one folder, which must have all.
    """
    because = {
        "train": "which is trained on: its score would be one of what was learned",
        "valid": "which chooses the checkpoint: its score would be one of what was chosen",
    }
    for (first, ones), (split, own) in combinations(files.items(), 2):
        if len(own) == len(ones) and all(map(have_same_content, ones, own)):
            reason = because.get(first, "which is scored too")
            another = f"give data.{split} another file, or none, and 10 % of the training file are held out"
            remedy = f"put the examples of {split} there" if of_folder else another
            raise DataError(f"{own[0]}: is {split}, and has the same content as {ones[0]}, {reason}; {remedy}")


def notes_on_repeats(splits: Mapping[str, Iterable[Hashable]], unit: str) -> dict[str, str]:
    """Returns a note for each other split that has examples of "test", with their number; and for "valid" in "train".

    Texts that differ in case and space alone count as the same. Those that are trained on are gone through once, and
    may be too large for memory.
    """
    scored = {split: [*map(_as_read, splits[split])] for split in ("test", "valid") if split in splits}
    wanted = set(chain.from_iterable(scored.values()))
    notes = {}
    for split, where in WHERE_REPEATED.items():
        found = wanted.intersection(scored.get(split) or map(_as_read, splits.get(split, ())))
        for own, examples in scored.items():
            count = sum(example in found for example in examples)
            if count and (own == "test" or split == "train"):
                notes[f"{own} {unit} that are {where}"] = f"{count} of {len(examples)}"
    return notes


def _as_read(example: Hashable) -> Hashable:
    if isinstance(example, tuple):
        return tuple(map(_as_read, example))
    return " ".join(example.split()).casefold() if isinstance(example, str) else example


def note_on_few(sizes: Mapping[str, int], unit: str) -> dict[str, str]:
    """Returns a note if "valid" or "test" is so small that its scores say little; `sizes` are those of the splits."""
    does = {"valid": "choose the checkpoint", "test": "score it"}
    few = [f"{sizes[split]} {unit} of {split} {what}" for split, what in does.items() if sizes[split] < FEW]
    return {"few examples": f"{' and '.join(few)}; below {FEW}, luck is larger than most gains"} if few else {}


def with_every_class(drawn: Mapping[str, Rows], labels: NDArray[np.int64], seed: int) -> dict[str, Rows]:
    """Returns `drawn`, the rows of each split, if no class is missing in one that could be there; else stratified ones.

    `labels` `(N,)` are the classes of all rows. A class could be in each split if it has as many examples as there are
    splits. The stratified splits have the sizes of those drawn; all rows are sorted.
    """
    enough = np.flatnonzero(np.bincount(labels) >= len(drawn))
    if all(np.isin(enough, labels[rows]).all() for rows in drawn.values()):
        return dict(drawn)
    sizes = {name: len(rows) for name, rows in drawn.items()}
    split_of = _stratified(labels, [*sizes.values()], seed)
    _exchange(split_of, labels, enough)
    return {name: np.flatnonzero(split_of == number) for number, name in enumerate(sizes)}


def stratified_draw(pool: Rows, labels: NDArray[np.int64], size: int, seed: int) -> Rows:
    """Draws `size` members of `pool` at random by `seed`, the same number of each class to within one.

    `labels` are the classes of all rows, of which the pool names some. A class that is rarer gives all it has.
    """
    shuffled = np.random.default_rng(seed).permutation(pool)
    classes = labels[shuffled]
    by_class = np.argsort(classes, kind="stable")
    counts = np.bincount(classes)
    rank_in_class = np.empty(len(pool), dtype=np.int64)
    rank_in_class[by_class] = np.arange(len(pool)) - np.repeat(np.cumsum(counts) - counts, counts)
    return shuffled[np.argsort(rank_in_class, kind="stable")[:size]]


def few_labels(pool: Rows, labels: NDArray[Any], size: int | None, seed: int, where: str) -> Rows:
    """Returns the rows of `data.labels` examples of the pool, sorted: drawn by class, or of numbers at random.

    All of them where that is null. Raises `DataError` where there are not as many, or more classes than that.
    """
    if size is None:
        return pool
    if size > len(pool):
        raise DataError(f"{where}: has {len(pool)} examples to train on, and data.labels={size}; lower it, or set null")
    if labels.dtype.kind == "f":
        return np.sort(np.random.default_rng(seed).permutation(pool)[:size])
    classes = len(np.unique(labels[pool]))
    if size < classes:
        raise DataError(
            f"{where}: has {classes} classes, and data.labels={size} leaves some without an example; raise it"
        )
    return np.sort(stratified_draw(pool, labels, size, seed))


def _stratified(labels: NDArray[np.int64], sizes: list[int], seed: int) -> NDArray[np.int64]:
    """Returns the number of the split of each row, `(N,)`: of every class its share, to about one example.

    The rows are shuffled and put in the order of their classes; along them the splits take turns, evenly.
    """
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    turns = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    split_of = np.empty(len(labels), dtype=np.int64)
    split_of[by_class] = np.repeat(np.arange(len(sizes)), sizes)[np.argsort(turns, kind="stable")]
    return split_of


def _exchange(split_of: NDArray[np.int64], labels: NDArray[np.int64], enough: NDArray[np.int64]) -> None:
    """Lets an example of a class in `enough` that a split lacks change places with one of the split's largest class."""
    splits = int(split_of.max()) + 1
    for label in enough:
        for split in range(splits):
            own = labels[split_of == split]
            if label in own:
                continue
            counts = np.bincount(own)
            if counts.max() < 2:
                continue  # the split has fewer examples than there are classes
            giver = np.bincount(split_of[labels == label], minlength=splits).argmax()
            given = np.flatnonzero((split_of == giver) & (labels == label))[0]
            returned = np.flatnonzero((split_of == split) & (labels == counts.argmax()))[0]
            split_of[given], split_of[returned] = split, giver

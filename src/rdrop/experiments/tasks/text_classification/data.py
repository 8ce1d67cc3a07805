"""Texts with their labels, from files, a folder or the hub: train, valid and test, with the names of the classes.

Of GLUE the test split is the official dev set, whose labels are published, and valid is 10 % of train.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.tasks.files import DataError, MissingDataError, find_file, hub_text, load_hub
from rdrop.experiments.tasks.spelling import DECIMAL_COMMA, MISSING_AS_SPELLED, NUMBER, is_blank, is_missing, label_key
from rdrop.experiments.tasks.splits import (
    Rows,
    fold_rows,
    hold_out,
    require_count,
    require_different_files,
    with_every_class,
)
from rdrop.experiments.tasks.tables import TABLES, read_table, require_columns
from rdrop.experiments.tasks.text_classification.glue import GLUE, SCORE_RANGE
from rdrop.experiments.tasks.text_classification.tiny import write_tiny_texts

if TYPE_CHECKING:
    from rdrop.experiments.tasks.text_classification.recipes import TextClassificationData

SHOWN_CLASSES = 10  # in an error
SECOND_TEXT = "text2"
"""The column of own files that may be absent; one by another name was asked for."""
ALL = "all"
"""In the place of a file without labels: the training examples, also those with a label."""


@dataclass(frozen=True)
class LabeledTexts:
    first: list[str]
    second: list[str] | None
    labels: NDArray[Any]
    """Class indices, int64; or numbers, float32."""

    def take(self, rows: NDArray[np.int64]) -> LabeledTexts:
        second = None if self.second is None else [self.second[row] for row in rows]
        return LabeledTexts([self.first[row] for row in rows], second, self.labels[rows])

    def examples(self) -> list[tuple[str, ...]]:
        """Returns the texts of each example."""
        return list(zip(self.first, *filter(None, (self.second,)), strict=True))

    def __len__(self) -> int:
        return len(self.first)


@dataclass(frozen=True)
class Splits:
    train: LabeledTexts
    valid: LabeledTexts
    test: LabeledTexts
    mismatched: LabeledTexts | None
    """MNLI's second dev set, of other genres than the training texts."""
    unlabeled: LabeledTexts | None
    """Texts to learn from by the divergence alone. Their labels are all 0 and say nothing."""
    classes: tuple[str, ...]
    """The name of each class; empty where labels are numbers."""


@dataclass(frozen=True)
class _Columns:
    """The names that the column of each role may have."""

    text: tuple[str, ...]
    text2: tuple[str, ...]
    label: tuple[str, ...]
    text2_may_lack: bool
    may_be_empty: bool
    keys: dict[str, str] = field(default_factory=dict)
    """Which keys of the recipe name them."""
    are_own: bool = False
    """Whether they are those of own files, where a text "nan" is what a program wrote for one that is missing."""


@dataclass(frozen=True)
class _Table:
    """One file as it was read."""

    name: str
    where: Sequence[str]
    first: list[str]
    second: list[str] | None
    labels: list[str]


def load_labeled_texts(data: TextClassificationData, test: str | None = None, seed: int = 0) -> Splits:
    """Loads the examples that `data` names; those of `test` from that file. `seed` chooses the part of `data.folds`.

    Raises `DataError`: which file and line, what is wrong, how to fix it.
    """
    tables = _tables(data)
    if data.counts is not None and data.train is None:
        _require_counts(list(tables.values()), data.counts)
    missing = {"valid", "test"} - tables.keys()
    if test is not None:
        if data.train is not None:
            require_different_files({"train": [data.train], "test": [test]})
        tables["test"] = _read_file(Path(test), _columns(data, "test"))
        tables.pop("mismatched", None)
    train = tables["train"]
    has_file = data.unlabeled not in (None, ALL)
    unlabeled = _read_file(Path(str(data.unlabeled)), _without_label(_columns(data, "unlabeled"))) if has_file else None
    classes = _class_spellings(train, data)
    for table in [*tables.values(), *([] if unlabeled is None else [unlabeled])]:
        if (table.second is None) != (train.second is None):
            raise DataError(f"{table.name}: one of {train.name} and this file has a second text; give it to both")
    labeled = {}
    for name, table in tables.items():
        labels = _numbers(table, data) if data.regression else _indices(table, classes, data)
        labeled[name] = LabeledTexts(table.first, table.second, labels)
    rows = _drawn(labeled["train"], missing, data, seed)
    splits = {name: labeled["train"].take(drawn) for name, drawn in rows.items()}
    splits |= {name: own for name, own in labeled.items() if name != "train"}
    if data.regression:
        for name in ("train", "valid", "test"):
            if np.ptp(splits[name].labels) == 0:
                source = name if name in tables else "train"
                _require_numbers_apart(tables[source], labeled[source].labels)
                raise DataError(f"{tables[source].name}: the labels of the {name} split are all equal; give it others")
    without_labels = None if unlabeled is None else _with_zeros(unlabeled, data)
    if data.unlabeled == ALL:
        without_labels = replace(splits["train"], labels=np.zeros_like(splits["train"].labels))
    return Splits(
        splits["train"],
        splits["valid"],
        splits["test"],
        splits.get("mismatched"),
        without_labels,
        tuple(spellings[0] for spellings in classes),
    )


def _drawn(whole: LabeledTexts, missing: set[str], data: TextClassificationData, seed: int) -> dict[str, Rows]:
    """Draws the rows of the splits that have no file of their own."""
    labels = None if data.regression else whole.labels
    if data.folds is not None:
        if missing != {"valid", "test"}:
            raise DataError(
                f"data.folds (={data.folds}) draws valid and test, but these data have files of their own; give "
                "all examples as one file by data.train, or set data.folds=null"
            )
        return fold_rows(len(whole), data.folds, seed, data.split_seed, labels)
    rows = hold_out(len(whole), missing, data.split_seed)
    if data.stratified and labels is not None:
        return with_every_class(rows, labels, data.split_seed)
    return rows


# ---------------------------------------------------------------------------------------------------------- reading


def _tables(data: TextClassificationData) -> dict[str, _Table]:
    """Reads the files of the splits, train first."""
    if data.tiny:
        with TemporaryDirectory() as folder:
            write_tiny_texts(Path(folder), data)
            return _read_all(_files_in(folder, data), data)
    if data.train is not None:
        named = (("train", data.train), ("valid", data.valid), ("test", data.test))
        files = [(name, Path(path)) for name, path in named if path is not None]
        require_different_files({name: [path] for name, path in files})
        return _read_all(files, data)
    if data.folder is not None:
        files = _files_in(data.folder, data)
        require_different_files({name: [path] for name, path in files}, of_folder=True)
        return _read_all(files, data)
    if data.hub is not None:
        return {name: _read_hub(data.hub, split, data) for name, split in _hub_splits(data)}
    layout = "CoLA/train.tsv and its like" if data.glue else "train.csv, valid.csv and test.csv"
    raise DataError(f"no data: set data.train to a file, data.folder to a folder with {layout}, or data.hub")


def _names_of_splits(dev: Sequence[str]) -> tuple[str, ...]:
    return ("train", "test", "mismatched")[: 1 + len(dev)]


def _files_in(folder: str, data: TextClassificationData) -> list[tuple[str, Path]]:
    if data.glue is None:
        return [
            (split, find_file(folder, *(f"{name}{kind}" for name in names for kind in TABLES), only=True))
            for split, names in (("train", ("train",)), ("valid", ("valid", "dev")), ("test", ("test",)))
        ]
    glue = GLUE[data.glue]
    if not (Path(folder) / glue.folder).is_dir():
        raise MissingDataError(
            f"{folder}: has no folder {glue.folder}; set data.folder to the one with GLUE's folders in it"
        )
    names = ("train", *glue.dev)
    files = [find_file(Path(folder) / glue.folder, f"{name}.tsv") for name in names]
    return list(zip(_names_of_splits(glue.dev), files, strict=True))


def _hub_splits(data: TextClassificationData) -> list[tuple[str, str]]:
    if data.glue is not None:
        dev = GLUE[data.glue].hub_dev
        return list(zip(_names_of_splits(dev), ("train", *dev), strict=True))
    assert data.hub_splits is not None  # the recipe has seen to it
    names = {1: ("train",), 2: ("train", "test"), 3: ("train", "valid", "test")}[len(data.hub_splits)]
    return list(zip(names, data.hub_splits, strict=True))


def _read_all(files: Iterable[tuple[str, Path]], data: TextClassificationData) -> dict[str, _Table]:
    return {name: _read_file(path, _columns(data, name)) for name, path in files}


def _columns(data: TextClassificationData, split: str = "train") -> _Columns:
    """The keys of the recipe name the columns of all files: those of train, so others are to have the same."""
    if data.glue is not None:
        glue = GLUE[data.glue]
        return _Columns(glue.text, glue.text2, glue.label, text2_may_lack=False, may_be_empty=glue.may_be_empty)
    assert data.text_column is not None  # the recipe has seen to it, here and below
    assert data.label_column is not None
    text2 = () if data.text2_column is None else (data.text2_column,)
    keys = {data.text_column: "data.text_column", data.label_column: "data.label_column"}
    keys |= dict.fromkeys(text2, "data.text2_column")
    may_lack = data.text2_column in (None, SECOND_TEXT)
    keys = keys if split == "train" else {}
    return _Columns((data.text_column,), text2, (data.label_column,), may_lack, False, keys, are_own=data.hub is None)


def _without_label(columns: _Columns) -> _Columns:
    return replace(columns, label=())


def _with_zeros(table: _Table, data: TextClassificationData) -> LabeledTexts:
    zeros = np.zeros(len(table.first), dtype=np.float32 if data.regression else np.int64)
    return LabeledTexts(table.first, table.second, zeros)


def _read_file(path: Path, columns: _Columns) -> _Table:
    rows = read_table(path, [], optional=[*columns.text, *columns.text2, *columns.label])
    present = rows[0].values.keys()
    chosen: list[str | None] = []
    for names, may_lack in ((columns.text, False), (columns.text2, columns.text2_may_lack), (columns.label, False)):
        found = [name for name in names if name in present]
        if names and not found and not may_lack:
            text2 = () if columns.text2_may_lack else columns.text2[:1]
            others = [name for name in (*columns.text[:1], *text2, *columns.label[:1]) if name != names[0]]
            read_table(path, names[:1], optional=others, keys=columns.keys)  # names the column that is most like it
        chosen.append(found[0] if found else None)
    for row in rows:  # only rows of JSON can differ
        if row.values.keys() != present:
            raise DataError(
                f"{row.where}: has other columns than the first row ({', '.join(present)}); give it the same"
            )
    texts = [None if name is None else [row.values[name] for row in rows] for name in chosen]
    table = _Table(str(path), [row.where for row in rows], texts[0], texts[1], texts[2] or [])  # type: ignore[arg-type]
    _require_labels(table)
    return _checked(table, columns)


def _read_hub(hub: str, split: str, data: TextClassificationData) -> _Table:
    from datasets import ClassLabel  # with all that reads data from the hub

    columns = _columns(data)
    found = load_hub(hub, data.hub_config, split)
    name = f"{hub} ({data.hub_config or 'no configuration'}), {split}"
    values: list[list[str] | None] = []
    for names, may_lack in ((columns.text, False), (columns.text2, columns.text2_may_lack), (columns.label, False)):
        chosen = next((column for column in names if column in found.column_names), None)
        if names and chosen is None and not may_lack:
            require_columns(found.column_names, name, names[-1:], columns.keys)
        values.append(None if chosen is None else _hub_values(found, chosen, name, ClassLabel))
    first, second, labels = values
    assert first is not None
    assert labels is not None
    table = _Table(name, _HubRows(name, len(first)), first, second, labels)
    is_declared = any(isinstance(found.features.get(column), ClassLabel) for column in columns.label)
    _require_labels(table, but=MISSING_AS_SPELLED if is_declared else ())
    return _checked(table, columns)


class _HubRows(Sequence[str]):
    def __init__(self, name: str, size: int) -> None:
        self._name, self._size = name, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, row: Any) -> Any:
        return f"{self._name}:{row + 1}"


def _hub_values(found: Any, column: str, name: str, class_label: type) -> list[str]:
    feature, values = found.features[column], list(found[column])
    if None in values:
        raise DataError(f"{name}:{values.index(None) + 1}: {column} has no value; choose another column or split")
    if isinstance(feature, class_label):
        if min(values) < 0:
            raise DataError(f"{name}:{values.index(min(values)) + 1}: has no label; choose a split that has labels")
        return [feature.names[value] for value in values]  # type: ignore[attr-defined]
    return [hub_text(value, f"{name}:{row}", column) for row, value in enumerate(values, start=1)]


def _checked(table: _Table, columns: _Columns) -> _Table:
    for texts, what in ((table.first, "the text"), (table.second or (), "the second text")):
        for where, text in zip(table.where, texts, strict=False):
            one = " or, to read the first one alone, set data.text2_column=null" if texts is table.second else ""
            if not columns.may_be_empty and is_blank(text):
                raise DataError(f"{where}: {what} is empty; delete the example{one}")
            if columns.are_own and is_missing(text):
                word = "if it is a word, end it with a full stop"
                raise DataError(f"{where}: {what} is missing ({text[:60]!r}); delete the example{one} ({word})")
    return table


def _require_labels(table: _Table, but: Collection[str] = ()) -> None:
    """Refuses labels that are missing; where classes are declared, one may be called "None"."""
    for where, label in zip(table.where, table.labels, strict=False):
        if is_missing(label) and label not in but:
            raise DataError(
                f"{where}: the label is missing ({label!r}); give the example one, or delete it (if this is the name "
                "of a class, write another, e.g. 'unknown')"
            )


def _require_counts(tables: Sequence[_Table], counts: Sequence[int]) -> None:
    if len(tables) != len(counts):
        raise DataError(f"data.counts has {len(counts)} numbers for {len(tables)} files; give one for each, or null")
    for table, count in zip(tables, counts, strict=True):
        require_count(table.name, len(table.first), count, "examples")


# ----------------------------------------------------------------------------------------------------------- labels


def _class_spellings(train: _Table, data: TextClassificationData) -> tuple[tuple[str, ...], ...]:
    """Returns how each class may be written, its name first."""
    if data.regression:
        return ()
    if data.glue is not None:
        return GLUE[data.glue].classes
    _require_one_spelling(train)
    names = sorted(set(train.labels))
    if len(names) < 2:
        raise DataError(f"{train.name}: all labels are {names[0]!r}; a classifier needs two classes or more")
    if len(names) > len(train.labels) / 2:
        raise DataError(
            f"{train.name}: has {len(names)} different labels in {len(train.labels)} examples; for numbers to predict "
            "set data.regression=true, else check data.label_column"
        )
    return tuple((name,) for name in names)


def _require_one_spelling(table: _Table) -> None:
    first: dict[str, int] = {}
    for row, label in enumerate(table.labels):
        known = first.setdefault(label_key(label), row)
        if table.labels[known] != label:
            raise DataError(
                f"{table.where[row]}: the label {label[:60]!a} is another spelling of {table.labels[known][:60]!a} "
                f"({table.where[known]}); write both alike or, if they are two classes, give them different names"
                + ("; for numbers to predict set data.regression=true" if _is_number(label) else "")
            )


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _indices(table: _Table, classes: tuple[tuple[str, ...], ...], data: TextClassificationData) -> NDArray[np.int64]:
    index = {spelling: number for number, spellings in enumerate(classes) for spelling in spellings}
    try:
        return np.array([index[label] for label in table.labels], dtype=np.int64)
    except KeyError:
        row = next(row for row, label in enumerate(table.labels) if label not in index)
    known = ", ".join(name for name, *_ in classes[:SHOWN_CLASSES]) + (", ..." if len(classes) > SHOWN_CLASSES else "")
    same = next((name for name, *_ in classes if label_key(name) == label_key(table.labels[row])), None)
    if same is not None and not data.glue:
        raise DataError(
            f"{table.where[row]}: the label {table.labels[row][:60]!a} is another spelling of {same[:60]!a}, which the "
            "training examples have; write it alike"
        )
    whose = "GLUE's classes" if data.glue else "those of the training examples"
    raise DataError(
        f"{table.where[row]}: the label {table.labels[row][:60]!r} is not among {whose} ({known}); correct it"
    )


def _require_numbers_apart(table: _Table, numbers: NDArray[np.float32]) -> None:
    """Refuses labels that are one number in float32, in which they are learned, and not as they are written."""
    written = sorted({Decimal(label.strip()) for label in table.labels})
    if np.ptp(numbers) == 0 and len(written) > 1:
        raise DataError(
            f"{table.name}: the labels are from {written[0]} to {written[-1]}, which float32 does not tell apart; "
            f"subtract {written[0]} from all"
        )


def _numbers(table: _Table, data: TextClassificationData) -> NDArray[np.float32]:
    largest = float(np.finfo(np.float32).max)
    low, high = SCORE_RANGE if data.glue else (-largest, largest)
    numbers = np.empty(len(table.labels), dtype=np.float32)
    for row, label in enumerate(table.labels):
        if DECIMAL_COMMA.fullmatch(label.strip()):
            raise DataError(
                f"{table.where[row]}: the label {label[:60]!r} has a comma, and a number has a decimal point, as 0.8; "
                "export the file with decimal points, or write them in this column"
            )
        if not NUMBER.fullmatch(label.strip()):
            raise DataError(
                f"{table.where[row]}: the label {label[:60]!r} is not a number as 1, -0.5 or 1e3; correct it"
            )
        if not low <= float(label) <= high:
            raise DataError(
                f"{table.where[row]}: the label {label[:60]!r} must be from {low:g} to {high:g}; correct it"
            )
        numbers[row] = float(label)
    return numbers

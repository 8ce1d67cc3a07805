"""Documents with their summaries: from files, a folder or the hub to the examples of each split."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rdrop.experiments.recipe import nearest_name
from rdrop.experiments.tasks.files import DataError, Row, find_file, load_hub, read_table, tenths

if TYPE_CHECKING:
    from rdrop.experiments.tasks.summarization.recipes import SummarizationData

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
"""What the file of a split may be called."""
SUFFIXES = (".jsonl", ".csv", ".tsv")
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}

TINY_SIZES = {"train": 64, "valid": 16, "test": 16}
TINY_WORDS = ("budget", "meeting", "report", "contract", "travel", "invoice", "server", "lunch")


@dataclass(frozen=True, slots=True)
class Example:
    document: str
    summaries: tuple[str, ...]
    """The summary to learn from, then other references to score against."""


Examples = dict[str, list[Example]]
"""By split: "train", "valid", "test"."""


def load_examples(data: "SummarizationData") -> Examples:
    """All splits, from the first source that is set. Raises `DataError` with the file and the line."""
    if data.tiny:
        return _made_up(data)
    if data.train is not None:
        return _from_files(data)
    if data.folder is not None:
        return _from_folder(data, Path(data.folder))
    if data.hub is not None:
        return _from_hub(data, data.hub)
    raise DataError(
        "no data: set data.train to a file of your own (.csv, .tsv or .jsonl), data.folder to a folder of them, or "
        "data.hub to a data set of the Hugging Face hub"
    )


def _from_files(data: "SummarizationData") -> Examples:
    """Splits that have no file of their own get their tenth of the training file."""
    assert data.train is not None
    rows = _read(data.train, data, "train")
    given = {"valid": data.valid, "test": data.test}
    examples = {split: _read(path, data, split) for split, path in given.items() if path is not None}
    missing = [split for split in given if split not in examples]
    if missing:
        parts = dict(zip(SPLITS, tenths(len(rows), data.split_seed), strict=True))
        examples |= {split: [rows[index] for index in parts[split]] for split in missing}
        taken = set(np.concatenate([parts[split] for split in missing]).tolist())
        rows = [row for index, row in enumerate(rows) if index not in taken]
    return {"train": rows} | examples


def _from_folder(data: "SummarizationData", folder: Path) -> Examples:
    examples = {}
    for split, names in SPLIT_NAMES.items():
        path = find_file(folder, *(name + suffix for name in names for suffix in SUFFIXES))
        examples[split] = _read(path, data, split)
        _require_count(data, split, len(examples[split]), str(path))
    return examples


def _from_hub(data: "SummarizationData", hub: str) -> Examples:
    examples = {}
    for split, hub_split in HUB_SPLITS.items():
        found = load_hub(hub, data.hub_config, hub_split)
        where = f"{hub}, split {hub_split}"
        _require_count(data, split, len(found), where)
        columns = [data.document_column, data.summary_column, *_references(data, split)]
        texts = [_hub_column(found, column, where) for column in columns]
        examples[split] = [
            _example(Row(f"{where}, row {number}", dict(zip(columns, row, strict=True))), data, split)
            for number, row in enumerate(zip(*texts, strict=True))
        ]
    return examples


def _hub_column(found: Any, column: str, where: str) -> Iterable[str]:
    if column not in found.column_names:
        nearest = nearest_name(column, found.column_names)
        raise DataError(
            f"{where}: has no column {column!r} (the nearest is {nearest!r}), only {', '.join(found.column_names)}; "
            "set data.document_column and data.summary_column"
        )
    texts: Iterable[str] = found[column]
    return texts


def _read(path: str | Path, data: "SummarizationData", split: str) -> list[Example]:
    columns = [data.document_column, data.summary_column, *_references(data, split)]
    return [_example(row, data, split) for row in read_table(path, columns)]


def _references(data: "SummarizationData", split: str) -> Sequence[str]:
    return data.reference_columns if split == "test" else ()


def _example(row: Row, data: "SummarizationData", split: str) -> Example:
    columns = (data.document_column, data.summary_column, *_references(data, split))
    for column in columns:
        if not isinstance(row.values[column], str) or not row.values[column].strip():
            raise DataError(f"{row.where}: there is no text in the column {column!r}; give it one, or delete the row")
    document, *summaries = (row.values[column].strip() for column in columns)
    return Example(document, tuple(summaries))


def _require_count(data: "SummarizationData", split: str, count: int, where: str) -> None:
    if data.counts is None:
        return
    expected = dict(zip(SPLITS, data.counts, strict=True))[split]
    if count != expected:
        raise DataError(
            f"{where}: has {count} examples, and {split} must have {expected}; get the data set again, or set "
            "data.counts=null if it is meant to be another"
        )


def _made_up(data: "SummarizationData") -> Examples:
    """A topic among other words, whose summary is the topic: written to files and read as any folder."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split, size in TINY_SIZES.items():
            lines = [json.dumps(_made_up_row(data, generator)) for _ in range(size)]
            Path(folder, f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return _from_folder(data.model_copy(update={"counts": None}), Path(folder))


def _made_up_row(data: "SummarizationData", generator: np.random.Generator) -> dict[str, str]:
    topic, person = generator.choice(TINY_WORDS, 2, replace=False)
    row = dict.fromkeys((data.summary_column, *data.reference_columns), f"{topic} for {person}")
    return row | {data.document_column: f"Please see the {topic} that I wrote about the {person} yesterday.\nThanks"}

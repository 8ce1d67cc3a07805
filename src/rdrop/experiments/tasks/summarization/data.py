"""Documents with their summaries: from files, a folder or the hub to the examples of each split."""

import ast
import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdrop.experiments.recipe.settings import nearest_name
from rdrop.experiments.tasks.files import DataError, find_file, hub_text, load_hub
from rdrop.experiments.tasks.spelling import is_blank, is_missing
from rdrop.experiments.tasks.splits import HUB_SPLITS, SPLITS, hold_out, require_count, require_different_files
from rdrop.experiments.tasks.summarization.tiny import write_tiny_documents
from rdrop.experiments.tasks.tables import TableRow, read_table

if TYPE_CHECKING:
    from rdrop.experiments.tasks.summarization.recipes import SummarizationData

SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "val", "dev"), "test": ("test",)}
"""What the file of a split may be called."""


@dataclass(frozen=True, slots=True)
class Example:
    document: str
    summaries: tuple[str, ...]
    """The summary to learn from, then other references to score against."""


Examples = dict[str, list[Example]]
"""By split: "train", "valid", "test"."""


def load_examples(data: "SummarizationData", test: str | None = None) -> Examples:
    """Loads all splits, from the first source that is set; `test` from that file.

    Raises `DataError` with the file and the line.
    """
    examples = _load(data)
    if test is None:
        return examples
    if data.train is not None:
        require_different_files({"train": [data.train], "test": [test]})
    return examples | {"test": _read(test, data, "test")}


def _load(data: "SummarizationData") -> Examples:
    if data.tiny:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny_documents(Path(folder), data)
            return _from_folder(data.model_copy(update={"counts": None}), Path(folder))
    if data.train is not None:
        return _from_files(data, data.train)
    if data.folder is not None:
        return _from_folder(data, Path(data.folder))
    if data.hub is not None:
        return _from_hub(data, data.hub)
    raise DataError(
        "no data: set data.train to a file of your own (.csv, .tsv or .jsonl), data.folder to a folder of them, or "
        "data.hub to a data set of the Hugging Face hub"
    )


def _from_files(data: "SummarizationData", train: str) -> Examples:
    """Reads own files. A split without one is held out of the training file."""
    own = {split: path for split, path in (("valid", data.valid), ("test", data.test)) if path is not None}
    require_different_files({split: [path] for split, path in ({"train": train} | own).items()})
    examples = _read(train, data, "train")
    rows = hold_out(len(examples), {"valid", "test"} - own.keys(), data.split_seed)
    splits = {split: [examples[row] for row in drawn] for split, drawn in rows.items()}
    return splits | {split: _read(path, data, split) for split, path in own.items()}


def _from_folder(data: "SummarizationData", folder: Path) -> Examples:
    files = {
        split: find_file(folder, *(name + kind for name in names for kind in (".jsonl", ".csv", ".tsv")), only=True)
        for split, names in SPLIT_NAMES.items()
    }
    require_different_files({split: [path] for split, path in files.items()}, of_folder=True)
    examples = {}
    for split, path in files.items():
        examples[split] = _read(path, data, split)
        require_count(str(path), len(examples[split]), _count(data, split), "examples")
    return examples


def _from_hub(data: "SummarizationData", hub: str) -> Examples:
    examples = {}
    for split, hub_split in HUB_SPLITS.items():
        found = load_hub(hub, data.hub_config, hub_split)
        where = f"{hub}, split {hub_split}"
        require_count(where, len(found), _count(data, split), "examples")
        columns = [data.document_column, data.summary_column, *_references(data, split)]
        texts = [_hub_column(found, column, where) for column in columns]
        examples[split] = [
            _example(_hub_row(f"{where}:{number}", dict(zip(columns, row, strict=True)), data), data, split)
            for number, row in enumerate(zip(*texts, strict=True), start=1)
        ]
    return examples


def _count(data: "SummarizationData", split: str) -> int | None:
    return None if data.counts is None else data.counts[SPLITS.index(split)]


def _hub_column(found: Any, column: str, where: str) -> Iterable[object]:
    if column not in found.column_names:
        nearest = nearest_name(column, found.column_names)
        hint = "" if nearest is None else f" (the nearest is {nearest!r})"
        raise DataError(
            f"{where}: has no column {column!r}{hint}, only {', '.join(found.column_names)}; set data.document_column "
            "and data.summary_column"
        )
    values: Iterable[object] = found[column]
    return values


def _hub_row(where: str, values: dict[str, Any], data: "SummarizationData") -> TableRow:
    """Returns the texts of a row, which may have several summaries."""
    summaries = values[data.summary_column]
    if not isinstance(summaries, list) or not summaries:
        summaries = [summaries]
    values = values | {data.summary_column: summaries[0]}
    texts = {column: hub_text(value, where, column) for column, value in values.items()}
    others = [hub_text(summary, where, data.summary_column) for summary in summaries[1:]]
    return TableRow(where, texts, {data.summary_column: others})


def _read(path: str | Path, data: "SummarizationData", split: str) -> list[Example]:
    columns = [data.document_column, data.summary_column, *_references(data, split)]
    keys = {data.document_column: "data.document_column", data.summary_column: "data.summary_column"}
    # They name the columns of all files: those of train, so others are to have the same.
    rows = read_table(path, columns, lists=[data.summary_column], keys=keys if split == "train" else {})
    return [_example(row, data, split) for row in rows]


def _references(data: "SummarizationData", split: str) -> Sequence[str]:
    return data.reference_columns if split == "test" else ()


def _example(row: TableRow, data: "SummarizationData", split: str) -> Example:
    columns = (data.document_column, data.summary_column, *_references(data, split))
    texts = [(column, row.values[column]) for column in columns]
    texts += [(data.summary_column, summary) for summary in row.more.get(data.summary_column, ())]
    texts[1:] = [(column, each) for column, text in texts[1:] for each in _listed(text, f"{row.where}: {column}")]
    for column, text in texts:
        if not isinstance(text, str) or is_blank(text):
            raise DataError(f"{row.where}: there is no text in the column {column!r}; give it one, or delete the row")
        if is_missing(text):
            raise DataError(f"{row.where}: {column} is missing ({text!r}); give it a text, or delete the row")
    document, *summaries = (text.strip() for _, text in texts)
    return Example(document, tuple(summaries))


def _listed(text: Any, where: str) -> list[Any]:
    """Returns the texts of a list that stands in a cell as Python or JSON writes it; of any other text, the text."""
    if not isinstance(text, str) or text[:2] not in ("['", '["') or text[-1] != "]":
        return [text]
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            continue
        if all(isinstance(each, str) for each in found) and (read is json.loads or repr(found) == text):
            return list(found)
        raise DataError(  # NumPy sets no commas, and Python makes one text of those that stand side by side
            f'{where} is a list that cannot be read for certain ({text[:40]!r}); write it as JSON, ["one", "two"]'
        )
    return [text]

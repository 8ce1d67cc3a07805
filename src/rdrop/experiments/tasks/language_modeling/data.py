"""The text of each split, as lines: from files, a folder or the hub."""

import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rdrop.experiments.tasks.files import DataError, find_file, hub_text, load_hub, read_lines
from rdrop.experiments.tasks.language_modeling.tiny import write_tiny_lines
from rdrop.experiments.tasks.spelling import is_blank
from rdrop.experiments.tasks.splits import HUB_SPLITS, SPLITS, require_count, require_different_files, require_ten

if TYPE_CHECKING:
    from rdrop.experiments.tasks.language_modeling.recipes import LanguageModelingData

SPLITS_OF_LAYOUT = {"splits": SPLITS, "valid-test": ("valid", "test"), "one-text": ("input",)}
"""What is read, in the order of `data.lines`."""
FILE_NAMES = {
    "train": ("wiki.train.tokens", "train.txt"),
    "valid": ("wiki.valid.tokens", "valid.txt"),
    "test": ("wiki.test.tokens", "test.txt"),
    "input": ("input.txt",),
}
HUB_COLUMN = "text"

Texts = dict[str, list[str]]
"""By split: "train", "valid", "test"."""


def load_lines(data: "LanguageModelingData", test: str | None = None) -> Texts:
    """Loads all splits, from the first source that is set; `test` from that file.

    Raises `DataError` with the file and the line.
    """
    texts = _load(data)
    if test is not None:
        if data.train is not None:
            require_different_files({"train": [data.train], "test": [test]})
        texts["test"] = read_lines(test)
    if data.train_lines is not None:
        texts["train"] = texts["train"][: data.train_lines]
    for split, lines in texts.items():
        if all(map(is_blank, lines)):
            what = "to train on" if split == "train" else f"of {split}"
            raise DataError(f"the {len(lines)} lines {what} are all empty; give them text")
    return texts


def place_of(line: str, split: str, data: "LanguageModelingData", test: str | None = None) -> str:
    """Returns the file and the number of a line of a split for a message; of texts that are in no file, the split."""
    if split == "test" and test is not None:
        paths: list[str | Path] = [test]
    elif data.tiny:
        paths = []
    elif data.train is not None:
        paths = [{"train": None, "valid": data.valid, "test": data.test}[split] or data.train]
    else:
        names = SPLITS_OF_LAYOUT[data.layout] if data.folder is not None else ()
        paths = [find_file(Path(data.folder or ""), *FILE_NAMES[name]) for name in names]
    for path in paths:
        lines = read_lines(path)
        if line in lines:
            return f"{path}:{lines.index(line) + 1}"
    return split


def _load(data: "LanguageModelingData") -> Texts:
    if data.tiny:
        with tempfile.TemporaryDirectory() as folder:
            write_tiny_lines(Path(folder), {split: FILE_NAMES[split][0] for split in SPLITS_OF_LAYOUT[data.layout]})
            return _from_folder(data.model_copy(update={"lines": None}), Path(folder))
    if data.train is not None:
        return _from_files(data.train, data)
    if data.folder is not None:
        return _from_folder(data, Path(data.folder))
    if data.hub is not None:
        return _from_hub(data, data.hub)
    raise DataError(
        "no data: set data.train to a text file of your own, data.folder to a folder of them, or data.hub to a data "
        "set of the Hugging Face hub"
    )


def _from_files(train: str, data: "LanguageModelingData") -> Texts:
    """Reads own files. A split without one is held out of the training file."""
    own = {split: path for split, path in (("valid", data.valid), ("test", data.test)) if path is not None}
    require_different_files({split: [path] for split, path in ({"train": train} | own).items()})
    lines = read_lines(train)
    rows = hold_out_neighbors(len(lines), {"valid", "test"} - own.keys(), data.split_seed)
    texts = {split: [lines[row] for row in drawn] for split, drawn in rows.items()}
    return texts | {split: read_lines(path) for split, path in own.items()}


def hold_out_neighbors(size: int, missing: Collection[str], seed: int) -> dict[str, list[int]]:
    """Holds out of `range(size)` as `splits.hold_out` does, but neighbors: a text is not drawn line by line."""
    if not missing:
        return {"train": list(range(size))}
    require_ten(size, "lines")
    edges = np.linspace(0, size, 11).astype(int).tolist()
    runs = [range(edges[place], edges[place + 1]) for place in np.random.default_rng(seed).permutation(10)]
    rows = {split: list(run) for split, run in zip(("valid", "test"), runs, strict=False) if split in missing}
    return {"train": sorted(set(range(size)).difference(*rows.values()))} | rows


def _from_folder(data: "LanguageModelingData", folder: Path) -> Texts:
    files = {split: find_file(folder, *FILE_NAMES[split]) for split in SPLITS_OF_LAYOUT[data.layout]}
    require_different_files({split: [path] for split, path in files.items()}, of_folder=True)
    texts = {}
    for split, path in files.items():
        texts[split] = read_lines(path)
        _require_count(data, split, len(texts[split]), str(path))
    return _laid_out(texts, data.layout)


def _from_hub(data: "LanguageModelingData", hub: str) -> Texts:
    texts = {}
    for split in SPLITS_OF_LAYOUT[data.layout]:
        hub_split = HUB_SPLITS.get(split, "train")
        where = f"{hub}, split {hub_split}"
        found = load_hub(hub, data.hub_config, hub_split)
        if HUB_COLUMN not in found.column_names:
            raise DataError(
                f"{where}: has no column {HUB_COLUMN!r}, only {', '.join(found.column_names)}; set data.train"
            )
        texts[split] = [_line(text, f"{where}:{row}") for row, text in enumerate(found[HUB_COLUMN], start=1)]
        _require_count(data, split, len(texts[split]), where)
    return _laid_out(texts, data.layout)


def _line(text: object, where: str) -> str:
    """Returns the line that a row of the hub is, with or without its newline."""
    line = hub_text(text, where, HUB_COLUMN).removesuffix("\n")
    if "\n" in line:
        raise DataError(f"{where}: has a newline inside; a row must be one line: set data.train to a file of them")
    return line


def _laid_out(texts: Texts, layout: str) -> Texts:
    if layout == "splits":
        return texts
    whole = texts["valid" if layout == "valid-test" else "input"]
    size = len(whole)
    if size < 20:
        raise DataError(f"{size} lines are too few to keep some for valid and test; give 20 or more")
    if layout == "valid-test":
        return {"train": whole[: size * 9 // 10], "valid": whole[size * 9 // 10 :], "test": texts["test"]}
    return {
        "train": whole[: size * 18 // 20],
        "valid": whole[size * 18 // 20 : size * 19 // 20],
        "test": whole[size * 19 // 20 :],
    }


def _require_count(data: "LanguageModelingData", split: str, count: int, where: str) -> None:
    expected = dict(zip(SPLITS_OF_LAYOUT[data.layout], data.lines, strict=True))[split] if data.lines else None
    require_count(where, count, expected, "lines", "data.lines")

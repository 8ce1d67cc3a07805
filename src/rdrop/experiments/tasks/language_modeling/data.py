"""The text of each split, as lines: from files, a folder or the hub."""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rdrop.experiments.tasks.files import DataError, find_file, load_hub, read_lines

if TYPE_CHECKING:
    from rdrop.experiments.tasks.language_modeling.recipes import LanguageModelingData

SPLITS = ("train", "valid", "test")
SPLITS_OF_LAYOUT = {"splits": SPLITS, "valid-test": ("valid", "test"), "one-text": ("input",)}
"""What is read, in the order of `data.lines`."""
FILE_NAMES = {
    "train": ("wiki.train.tokens", "train.txt"),
    "valid": ("wiki.valid.tokens", "valid.txt"),
    "test": ("wiki.test.tokens", "test.txt"),
    "input": ("input.txt",),
}
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test", "input": "train"}
HUB_COLUMN = "text"

TINY_LINES = {"train": 160, "valid": 160, "test": 20, "input": 200}
TINY_WORDS = ("the", "old", "cat", "saw", "a", "red", "house", "by", "some", "river", "and", "then", "went", "home")

Texts = dict[str, list[str]]
"""By split: "train", "valid", "test"."""


def load_texts(data: "LanguageModelingData") -> Texts:
    """All splits, from the first source that is set. Raises `DataError` with the file and the line."""
    texts = _load(data)
    if data.train_lines is not None:
        texts["train"] = texts["train"][: data.train_lines]
    return texts


def _load(data: "LanguageModelingData") -> Texts:
    if data.tiny:
        return _made_up(data)
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
    """A split that has no file of its own gets its tenth of the training file."""
    lines = read_lines(train)
    given = {
        split: read_lines(path) for split, path in (("valid", data.valid), ("test", data.test)) if path is not None
    }
    if len(given) == 2:
        return {"train": lines} | given
    tenths = contiguous_tenths(len(lines), data.split_seed)
    held_out = {split: tenths[place] for place, split in enumerate(("valid", "test")) if split not in given}
    taken = {number for tenth in held_out.values() for number in tenth}
    texts: Texts = {split: [lines[number] for number in tenth] for split, tenth in held_out.items()}
    return {"train": [line for number, line in enumerate(lines) if number not in taken]} | given | texts


def contiguous_tenths(size: int, seed: int) -> list[range]:
    """`range(size)` in ten runs of neighbors, in an order that `seed` decides: a text is not drawn line by line."""
    if size < 10:
        raise DataError(f"{size} lines cannot be split into tenths; give 10 or more, or data.valid and data.test")
    edges = np.linspace(0, size, 11).astype(int).tolist()
    return [range(edges[place], edges[place + 1]) for place in np.random.default_rng(seed).permutation(10)]


def _from_folder(data: "LanguageModelingData", folder: Path) -> Texts:
    texts = {}
    for split in SPLITS_OF_LAYOUT[data.layout]:
        path = find_file(folder, *FILE_NAMES[split])
        texts[split] = read_lines(path)
        _require_count(data, split, len(texts[split]), str(path))
    return _laid_out(texts, data.layout)


def _from_hub(data: "LanguageModelingData", hub: str) -> Texts:
    texts = {}
    for split in SPLITS_OF_LAYOUT[data.layout]:
        where = f"{hub}, split {HUB_SPLITS[split]}"
        found = load_hub(hub, data.hub_config, HUB_SPLITS[split])
        if HUB_COLUMN not in found.column_names:
            raise DataError(
                f"{where}: has no column {HUB_COLUMN!r}, only {', '.join(found.column_names)}; set data.train"
            )
        texts[split] = [_line(text, f"{where}, row {number}") for number, text in enumerate(found[HUB_COLUMN])]
        _require_count(data, split, len(texts[split]), where)
    return _laid_out(texts, data.layout)


def _line(text: str, where: str) -> str:
    """A row of the hub is a line, with or without its newline."""
    line = text.removesuffix("\n")
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
    if data.lines is None:
        return
    expected = dict(zip(SPLITS_OF_LAYOUT[data.layout], data.lines, strict=True))[split]
    if count != expected:
        raise DataError(
            f"{where}: has {count} lines and must have {expected}; get the data set again, or set data.lines=null if "
            "it is meant to be another"
        )


def _made_up(data: "LanguageModelingData") -> Texts:
    """Sentences in which a word mostly decides the next: written to files and read as any folder."""
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        for split in SPLITS_OF_LAYOUT[data.layout]:
            lines = [_made_up_line(generator) for _ in range(TINY_LINES[split])]
            Path(folder, FILE_NAMES[split][0]).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return _from_folder(data.model_copy(update={"lines": None}), Path(folder))


def _made_up_line(generator: np.random.Generator) -> str:
    first = int(generator.integers(len(TINY_WORDS)))
    steps = generator.choice((1, 2), size=8, p=(0.8, 0.2)).cumsum()
    return " ".join(TINY_WORDS[(first + int(step)) % len(TINY_WORDS)] for step in steps)

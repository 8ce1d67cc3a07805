"""Synthetic texts in the layout of the real ones: one word tells the class, or by how often it is there the score."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rdrop.experiments.tasks.text_classification.glue import GLUE

if TYPE_CHECKING:
    from rdrop.experiments.tasks.text_classification.recipes import TextClassificationData

SIZES = {"train": 160, "valid": 40, "test": 40}
FILLERS = ("one", "sees", "the", "old", "house", "near", "a", "river", "and", "goes")
SIGNALS = ("good", "bad", "plain")
WORDS, LONGEST = 5, 12  # the fewest is the highest score


def write_tiny_texts(folder: Path, data: TextClassificationData) -> None:
    """Writes GLUE's folder of the task, or `train.csv`, `valid.csv` and `test.csv`; the same ones every time."""
    if data.glue is None:
        for name, size in SIZES.items():
            _write(folder / f"{name}.csv", [data.text_column or "", data.label_column or ""], data, size)
        return
    glue = GLUE[data.glue]
    (folder / glue.folder).mkdir()
    for number, name in enumerate(("train", *glue.dev)):
        columns = [*glue.text[:1], *glue.text2[:1], glue.label[0]]
        _write(folder / glue.folder / f"{name}.tsv", columns, data, SIZES["test" if number else "train"])


def _write(path: Path, columns: list[str], data: TextClassificationData, size: int) -> None:
    generator = np.random.default_rng([size, len(path.stem)])
    labels = [spellings[-1] for spellings in GLUE[data.glue].classes] if data.glue else list(SIGNALS[:2])
    with path.open("w", encoding="utf-8", newline="\n") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", lineterminator="\n")
        writer.writerow(columns)
        for row in range(size):
            signal = row % (WORDS + 1 if data.regression else len(labels))
            texts = [_text(signal, generator, data.regression) for _ in columns[:-1]]
            writer.writerow([*texts, f"{signal:.3f}" if data.regression else labels[signal]])


def _text(signal: int, generator: np.random.Generator, regression: bool) -> str:
    told = [SIGNALS[0]] * signal if regression else [SIGNALS[signal]]
    size = generator.integers(WORDS, LONGEST + 1)
    words = [*told, *generator.choice(FILLERS, size=size - len(told))]
    return " ".join(generator.permutation(words))

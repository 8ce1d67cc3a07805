"""Synthetic sentences in the layout of the real ones."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rdrop.experiments.tasks.translation.recipes import TranslationData

SIZES = {"train": 200, "valid": 20, "test": 20}
SYLLABLES = ("ba", "ko", "li", "mu", "ne", "pa", "ri", "so", "tu", "ve", "wo", "za")


def file_names(data: TranslationData) -> dict[str, str]:
    """Returns the name that the files of each split begin with."""
    return {"train": data.train_name, "valid": data.valid_name, "test": data.test_name}


def write_tiny_pairs(folder: Path, data: TranslationData) -> None:
    """Writes a folder in the layout of `data.folder`. A translation is the words in reverse order, each doubled."""
    draw = random.Random(data.split_seed)
    for split, name in file_names(data).items():
        sentences = [draw.choices(SYLLABLES, k=draw.randint(2, 6)) for _ in range(SIZES[split])]
        translations = [[word + word for word in reversed(sentence)] for sentence in sentences]
        for language, lines in ((data.source, sentences), (data.target, translations)):
            text = "".join(" ".join(words) + "\n" for words in lines)
            (folder / f"{name}.{language}").write_text(text, encoding="utf-8")

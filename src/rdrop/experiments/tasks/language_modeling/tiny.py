"""Synthetic sentences in which a word mostly decides the next."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

SIZES = {"train": 160, "valid": 160, "test": 20, "input": 200}
WORDS = ("the", "old", "cat", "saw", "a", "red", "house", "by", "some", "river", "and", "then", "went", "home")


def write_tiny_lines(folder: Path, names: Mapping[str, str]) -> None:
    """Writes a file for each of `names`, which are by split; the same ones every time."""
    generator = np.random.default_rng(0)
    for split, name in names.items():
        lines = [_line(generator) for _ in range(SIZES[split])]
        (folder / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _line(generator: np.random.Generator) -> str:
    first = int(generator.integers(len(WORDS)))
    steps = generator.choice((1, 2), size=8, p=(0.8, 0.2)).cumsum()
    return " ".join(WORDS[(first + int(step)) % len(WORDS)] for step in steps)

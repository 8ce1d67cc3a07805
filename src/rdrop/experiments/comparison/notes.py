"""The notes that runs leave beside their scores, told once for a whole comparison, in the terminal and on the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.wording import listed

SHOWN_TEXTS = 3
"""Of one note, where it is another in different runs."""
NUMBER = re.compile(r"(?<![\w.,'\"=])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w'\"])")
"""A number that a note counts or measures: no part of a name, and no class in quotes, nor the value of a key."""


def noted(comparison: Comparison) -> list[str]:
    """Says once what a reader should know beside the scores, a line a note; of which arms and seeds, unless of all.

    Those of an arm that differ only in their numbers are one, with the least and the greatest of each.
    """
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for arm in comparison.arms:
        alike: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for run in arm.runs:
            for name, text in run.notes.items():
                alike.setdefault((name, NUMBER.sub("0", str(text))), []).append((str(text), run.seed))
        for (name, _), told in alike.items():
            texts, seeds = zip(*told, strict=True)
            found.setdefault(name, {}).setdefault(_merged(texts), {})[arm.label] = list(seeds)
    lines = []
    for name, by_text in found.items():
        shown = [f"{name}: {text}{_whose(seeds, comparison)}" for text, seeds in by_text.items()]
        lines += shown[:SHOWN_TEXTS]
        if len(shown) > SHOWN_TEXTS:
            lines.append(f"{name}: {len(shown) - SHOWN_TEXTS} more such notes, on other runs")
    return lines


def _merged(texts: Sequence[str]) -> str:
    """Returns texts that differ only in their numbers as one: "3 to 5 of 40"."""
    places = [sorted(set(numbers), key=_value) for numbers in zip(*map(NUMBER.findall, texts), strict=True)]
    shown = iter(place[0] if len(place) == 1 else f"{place[0]} to {place[-1]}" for place in places)
    return NUMBER.sub(lambda _: next(shown), texts[0])


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _whose(noted: Mapping[str, list[int]], comparison: Comparison) -> str:
    """Returns in brackets of which arms and seeds a note is; empty if it is of all."""
    whole = {arm.label: list(arm.seeds) for arm in comparison.arms}
    if noted == whole:
        return ""
    parts = [
        label if seeds == whole[label] else f"{label}, {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}"
        for label, seeds in noted.items()
    ]
    return f" [{'; '.join(parts)}]"

"""The notes that runs leave beside their scores, told once for a whole comparison, in the terminal and on the page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.wording import listed

SHOWN_TEXTS = 2
"""Of one note, where it is another in different runs."""
NUMBER = re.compile(r"(?<![\w.,'\"=])[+-]?\d+(?:,\d{3})*(?:\.\d+)?(?![\w'\"])")
"""A number that a note counts or measures: no part of a name, and no class in quotes, nor the value of a key."""


def noted(comparison: Comparison) -> list[str]:
    """Says once what a reader should know beside the scores, a line a note; of which arms and seeds, unless of all.

    Notes that differ only in their numbers are one line, with the least and the greatest of each.
    """
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for arm in comparison.arms:
        for run in arm.runs:
            for name, text in run.notes.items():
                found.setdefault(name, {}).setdefault(str(text), {}).setdefault(arm.label, []).append(run.seed)
    lines = []
    for name, texts in found.items():
        alike: dict[str, list[str]] = {}
        for text in texts:
            alike.setdefault(NUMBER.sub("0", text), []).append(text)
        shown = [
            f"{name}: {_merged(group)}{_whose(_joined(texts[text] for text in group), comparison)}"
            for group in alike.values()
        ]
        lines += shown[:SHOWN_TEXTS]
        if len(shown) > SHOWN_TEXTS:
            lines.append(f"{name}: {len(shown) - SHOWN_TEXTS} more such notes, on other runs")
    return lines


def _merged(texts: list[str]) -> str:
    """Returns texts that differ only in their numbers as one: "3 to 5 of 40"."""
    places = [sorted(set(numbers), key=_value) for numbers in zip(*map(NUMBER.findall, texts), strict=True)]
    shown = iter(place[0] if len(place) == 1 else f"{place[0]} to {place[-1]}" for place in places)
    return NUMBER.sub(lambda _: next(shown), texts[0])


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _joined(parts: Iterable[Mapping[str, list[int]]]) -> dict[str, list[int]]:
    seeds: dict[str, list[int]] = {}
    for part in parts:
        for label, own in part.items():
            seeds[label] = sorted(seeds.get(label, []) + own)
    return seeds


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

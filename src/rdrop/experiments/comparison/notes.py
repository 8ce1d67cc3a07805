"""The notes that runs leave beside their scores, told once for a whole comparison, in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping

from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.wording import listed

SHOWN_TEXTS = 3
"""Of one note, where it is another in different runs."""


def noted(comparison: Comparison) -> list[str]:
    """Says once what a reader should know beside the scores, a line a note; of which arms and seeds, unless of all."""
    found: dict[str, dict[str, dict[str, list[int]]]] = {}
    for arm in comparison.arms:
        for run in arm.runs:
            for name, text in run.notes.items():
                found.setdefault(name, {}).setdefault(str(text), {}).setdefault(arm.label, []).append(run.seed)
    lines = []
    for name, texts in found.items():
        shown = [f"{name}: {text}{_whose(seeds, comparison)}" for text, seeds in texts.items()]
        lines += shown[:SHOWN_TEXTS]
        if len(shown) > SHOWN_TEXTS:
            lines.append(f"{name}: {len(shown) - SHOWN_TEXTS} more such notes, on other runs")
    return lines


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

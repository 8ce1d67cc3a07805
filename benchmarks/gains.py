"""What R-Drop adds to each baseline, against the number of training pairs: docs/plots/pairs.svg, from the records.

`python -m benchmarks.experiments pages` draws it; a test holds that it is what the records give.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from rdrop.bench.plots import INK, OTHERS, OURS, PAPER, RULE, SETTINGS, svg
from rdrop.experiments.comparison.comparison import Comparison

PLOT = Path(__file__).resolve().parents[1] / "docs/plots/pairs.svg"
PREFIX = "multi30k-en-de-"
"""Of the names of the comparisons that differ in the number of pairs."""
LEFT_OUT = ("multi30k-en-de-2000",)
"""In which two runs did not learn in time; of 2,000 pairs the comparison with the longer warmup is drawn."""
LOOKS = {
    "baseline": (OURS, "solid", "o"),
    "baseline, twice the batch": (OTHERS, "dashed", "o"),
    "baseline, twice the updates": (INK, "none", "s"),
}
"""Color, line and marker for each baseline that is drawn: none with another dropout rate."""


class Gain(NamedTuple):
    """By how much R-Drop's mean test score is above that of one baseline, and the 95 % interval of that."""

    pairs: int
    mean: float
    low: float
    high: float


def gains(found: Mapping[str, Comparison]) -> dict[str, list[Gain]]:
    """Returns the gains over each baseline, by the baseline's name, fewest pairs first."""
    over: dict[str, list[Gain]] = {}
    for name, comparison in found.items():
        if not name.startswith(PREFIX) or name in LEFT_OUT:
            continue
        for contest in comparison.contests:
            if contest.reference.label not in LOOKS:
                continue
            pairs = contest.arm.runs[0].recipe["data"]["train_pairs"]
            low, high = contest.difference.interval
            over.setdefault(contest.reference.label, []).append(Gain(pairs, contest.difference.mean, low, high))
    return {label: sorted(over[label]) for label in LOOKS if label in over}


def draw(found: Mapping[str, Comparison]) -> str:
    """The SVG: a point for each number of pairs and baseline, with its interval, and a line at no gain."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(6.2, 3.2), layout="constrained")
        figure.patch.set_facecolor(PAPER)
        axes = figure.subplots()
        axes.axhline(0, color=INK, linewidth=0.8)
        sizes: set[int] = set()
        for place, (label, points) in enumerate(gains(found).items()):
            color, line, marker = LOOKS[label]
            sizes.update(point.pairs for point in points)
            axes.errorbar(
                [point.pairs * (1 + 0.03 * place) for point in points],  # beside each other, not one upon another
                [point.mean for point in points],
                [[point.mean - point.low for point in points], [point.high - point.mean for point in points]],
                color=color,
                linestyle=line,
                marker=marker,
                markersize=4,
                capsize=3,
                label=f"R-Drop minus {label}",
            )
        axes.set_xscale("log")
        axes.set_xticks(sorted(sizes), [f"{size:,}" for size in sorted(sizes)])
        axes.set_xticks([], minor=True)
        axes.set_title("difference in test BLEU, 95 % interval", loc="left", fontsize=9, color=INK)
        axes.set_xlabel("training pairs of Multi30k", color=INK)
        axes.grid(axis="y", linewidth=0.5, color=RULE)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return svg(figure)

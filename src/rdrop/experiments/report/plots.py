"""The figures of the report as SVG for an HTML page.

The text stays text and the colors are CSS variables of the page, so a figure follows its fonts and its light and dark
colors. The same input gives the same bytes, and no two figures of a page share an id.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.finished_runs import is_finite_number
from rdrop.experiments.comparison.paired import PairedDifference
from rdrop.experiments.comparison.wording import NumberStyle, ratio, words
from rdrop.experiments.report.html import Markup

# Drawn in a color that stands for a CSS variable, which replaces it in the finished SVG.
INK, _FAINT = "#010101", "#020202"
_VARIABLES = {INK: "--ink", _FAINT: "--rule"}

_WIDTH_INCHES, _HEIGHT_INCHES = 5.2, 3.1
SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}


class ArmStyle(NamedTuple):
    """The look of an arm in every figure: a CSS variable for its color, a dash pattern and a marker as well."""

    variable: str
    dashes: tuple[float, ...]
    marker: str

    @property
    def linestyle(self) -> tuple[float, tuple[float, ...]] | str:
        return (0.0, self.dashes) if self.dashes else "solid"

    @property
    def stand_in(self) -> str:
        """The color to draw with; `finished_svg` puts the variable in its place."""
        return STAND_INS[self.variable]


_BASELINE = ArmStyle("--baseline", (4.0, 2.0), "o")
_LARGER_BATCH = (
    ArmStyle("--larger", (1.2, 1.5), "s"),
    ArmStyle("--larger", (5.0, 1.5, 1.0, 1.5), "P"),
)
# Four colors and five dash patterns repeat together only after twenty arms.
_RDROP_VARIABLES = ("--rdrop-1", "--rdrop-2", "--rdrop-3", "--rdrop-4")
_RDROP_DASHES: tuple[tuple[float, ...], ...] = ((), (7.0, 1.5), (3.0, 1.2), (7.0, 1.5, 1.0, 1.5), (1.0, 1.0))
_RDROP_MARKERS = "oD^vX"
STAND_INS = {
    variable: f"#{number:02x}{number:02x}{number:02x}"
    for number, variable in enumerate(("--baseline", "--larger", *_RDROP_VARIABLES), start=16)
}


class Curve(NamedTuple):
    """A quantity over training: the rows of metrics.jsonl it stands in, its key there, its name on the axis, and
    whether the axis begins at zero.
    """

    kind: str
    key: str
    axis: str
    from_zero: bool = False


def arm_styles(comparison: Comparison) -> list[ArmStyle]:
    """One style for each arm, in their order: gray for the baseline, an accent for R-Drop, another for the rest."""
    larger, rdrop, styles = 0, 0, []
    for arm in comparison.arms:
        if arm is comparison.baseline:
            styles.append(_BASELINE)
        elif arm.method.is_plain:
            styles.append(_LARGER_BATCH[larger % len(_LARGER_BATCH)])
            larger += 1
        else:
            styles.append(ArmStyle(_RDROP_VARIABLES[rdrop % 4], _RDROP_DASHES[rdrop % 5], _RDROP_MARKERS[rdrop % 5]))
            rdrop += 1
    return styles


def curve_of(arm: Arm, curve: Curve, factor: float = 1.0) -> tuple[list[int], np.ndarray[Any, np.dtype[np.float64]]]:
    """The steps any run of the arm has a value for, and the values as (runs, steps); NaN where a run has none."""
    of_runs = [
        {
            row["step"]: factor * row[curve.key]
            for row in run.metrics
            if row["kind"] == curve.kind and is_finite_number(row.get(curve.key))
        }
        for run in arm.runs
    ]
    steps = sorted({step for of_run in of_runs for step in of_run})
    return steps, np.array([[of_run.get(step, math.nan) for step in steps] for of_run in of_runs])


def draw_curves(comparison: Comparison, curve: Curve, style: NumberStyle, name: str) -> Markup | None:
    """Every seed as a thin line and the mean over the seeds as a thick one; None where no run has a value."""
    drawn = [(arm_style, *curve_of(arm, curve, style.factor)) for arm, arm_style in _with_styles(comparison)]
    if not any(steps for _, steps, _ in drawn):
        return None
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure, axes = _figure(curve.axis)
        opacity = min(0.4, 1.2 / len(drawn))
        for arm_style, steps, values in drawn:
            color = arm_style.stand_in
            mark = "o" if len(steps) == 1 else None  # a single score is no line
            for of_run in values if len(values) > 1 else ():
                axes.plot(steps, of_run, marker=mark, markersize=3, color=color, linewidth=0.8, alpha=opacity)
            if steps:
                # The mean exists only where every seed has a value: a mean over changing seeds would jump.
                mean, line = values.mean(axis=0), arm_style.linestyle
                axes.plot(steps, mean, marker=mark, color=color, linestyle=line, linewidth=1.9)
        axes.set_xlabel("updates")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 2.5, 5, 10]))
        if curve.from_zero:
            axes.set_ylim(bottom=0)
        return finished_svg(figure, name)


def draw_scores(comparison: Comparison, style: NumberStyle, name: str) -> Markup | None:
    """A row an arm: its test score on every seed and their mean, and in words the mean and the time of training.

    None where no arm has a score.
    """
    rows = [
        (arm, arm_style, [style.factor * value for value in arm.scores(comparison.metric, "test").values()])
        for arm, arm_style in _with_styles(comparison)
    ]
    everything = [value for _, _, values in rows for value in values]
    if not everything:
        return None
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure, axes = _figure("", height=0.9 + 0.5 * len(rows))
        low, high = min(everything), max(everything)
        room = (high - low) or 1.0
        axes.set_xlim(low - 0.04 * room, high + 0.4 * room)
        axes.set_ylim(-len(rows) + 0.55, 0.95)
        for place, (arm, arm_style, values) in enumerate(rows):
            color, at = arm_style.stand_in, -float(place)
            _write(axes, 0, at + 0.28, arm.label)
            axes.plot(values, [at] * len(values), arm_style.marker, color=color, markersize=4, alpha=0.35)
            if values:
                mean = sum(values) / len(values)
                axes.plot([mean], [at], arm_style.marker, color=color, markersize=9)
                _write(axes, 0.84, at - 0.1, style.score(mean / style.factor), ha="right")
                _write(axes, 1, at - 0.1, ratio(comparison.cost_ratio(arm, "train_seconds")), ha="right")
        _write(axes, 0.84, 0.6, "mean", ha="right")
        _write(axes, 1, 0.6, "time", ha="right")
        if comparison.baseline is not None and rows[0][2]:
            plain = sum(rows[0][2]) / len(rows[0][2])
            line: dict[str, Any] = {
                "color": _BASELINE.stand_in,
                "linewidth": 1.2,
                "linestyle": _BASELINE.linestyle,
                "zorder": 0,
            }
            for place in range(len(rows)):
                axes.plot([plain, plain], [-place - 0.25, -place + 0.18], **line)
        axes.grid(visible=False)
        axes.spines["left"].set_visible(False)
        axes.set_yticks([])
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axes.set_xlabel(f"test {style.heading(comparison.metric)}", x=0, ha="left")
        return finished_svg(figure, name)


def draw_differences(comparison: Comparison, style: NumberStyle, name: str) -> Markup | None:
    """The difference from the baseline on each seed, and on the right its mean with the 95 % interval; None where no
    arm shares a seed with the baseline.
    """
    baseline = comparison.baseline
    if baseline is None:
        return None
    pairs = [
        (arm_style, comparison.difference(arm, baseline))
        for arm, arm_style in _with_styles(comparison)
        if arm is not baseline
    ]
    seeds = sorted({seed for _, difference in pairs for seed in difference.seeds})
    if not seeds:
        return None
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        figure, axes = _figure(
            f"difference in test {words(comparison.metric)}{',' if style.percent else ''}{style.points}"
        )
        # The means stand apart at the right, in as much room as a few seeds take.
        room = max(1.0, len(seeds) / 6)
        at_mean = len(seeds) - 0.4 + room
        axes.axhline(0, color=_BASELINE.stand_in, linewidth=1.4, linestyle=_BASELINE.linestyle)
        axes.axvline(at_mean - room, color=_FAINT, linewidth=0.8)
        for place, (arm_style, difference) in zip(_places(len(pairs)), pairs, strict=True):
            at_seeds = [seeds.index(seed) + 0.22 * place for seed in difference.seeds]
            _draw_seeds(axes, at_seeds, difference, arm_style, style.factor)
            _draw_mean(axes, at_mean + 0.5 * room * place, difference, arm_style, style.factor)
        axes.set_xlim(-0.6, at_mean + room)
        every = math.ceil(len(seeds) / 12)
        labeled = range(0, len(seeds), every)
        axes.set_xticks([*labeled, at_mean], [*(str(seeds[place]) for place in labeled), "mean"])
        axes.set_xlabel("seed", x=(at_mean - room + 0.6) / 2 / (at_mean + room + 0.6))
        return finished_svg(figure, name)


def _write(axes: Axes, x: float, y: float, text: str, ha: str = "left") -> None:
    """Writes at `x`, a share of the width, and `y`, a place on the axis; it takes no room from what is drawn."""
    axes.text(x, y, text, ha=ha, fontsize=9, transform=axes.get_yaxis_transform()).set_in_layout(False)


def _draw_seeds(axes: Axes, at: list[float], difference: PairedDifference, arm_style: ArmStyle, factor: float) -> None:
    heights = [factor * value for value in difference.per_seed]
    axes.vlines(at, 0, heights, color=arm_style.stand_in, linewidth=1.0, alpha=0.5)
    axes.plot(at, heights, arm_style.marker, color=arm_style.stand_in, markersize=5)


def _draw_mean(axes: Axes, at: float, difference: PairedDifference, arm_style: ArmStyle, factor: float) -> None:
    if difference.mean is None:
        return
    bar = None if difference.half_width is None else factor * difference.half_width
    axes.errorbar(
        at, factor * difference.mean, bar, color=arm_style.stand_in, marker=arm_style.marker, markersize=7,
        capsize=4, linewidth=1.9, capthick=1.6,
    )  # fmt: skip


def _with_styles(comparison: Comparison) -> Iterable[tuple[Arm, ArmStyle]]:
    return zip(comparison.arms, arm_styles(comparison), strict=True)


def _places(count: int) -> Sequence[float]:
    """Returns where the arms stand beside each other, from -1 to 1."""
    return [0.0] if count == 1 else [float(place) for place in np.linspace(-1, 1, count)]


def _figure(title: str, height: float = _HEIGHT_INCHES) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    axes.set_title(title, loc="left")
    axes.grid(axis="y")
    axes.tick_params(length=3)
    return figure, axes


def finished_svg(figure: Figure, name: str) -> Markup:
    written = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the text is drawn by the browser, with its fonts
        # Without a date in it, the same input gives the same bytes.
        figure.savefig(written, format="svg", metadata={"Date": None})
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'^<svg [^>]*viewBox="([^"]*)"[^>]*>', _OPENING, svg)
    svg = re.sub(r'(?<=\bid=")|(?<=url\(#)|(?<=href="#)', f"{name}-", svg)
    svg = re.sub(r"(?<=font-family: )[^;\"]+", "var(--sans)", svg)
    for stand_in, variable in (_VARIABLES | {color: variable for variable, color in STAND_INS.items()}).items():
        svg = svg.replace(stand_in, f"var({variable})")
    return Markup(svg)


# The page names the figure (aria-label of the wrapper), so a screen reader need not spell out every tick.
_OPENING = r'<svg viewBox="\1" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" aria-hidden="true" focusable="false">'  # noqa: E501

"""The figures of a comparison with their legend, captions and text alternatives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.wording import NumberStyle, counted, ratio, words
from rdrop.experiments.report.html import Markup, element, joined
from rdrop.experiments.report.plots import (
    ArmStyle,
    Curve,
    arm_styles,
    curve_of,
    draw_curves,
    draw_differences,
    draw_scores,
)


class _Plot(NamedTuple):
    """A curve to draw, the printing of its values (None: raw), and what the caption tells the reader to look for."""

    curve: Curve
    style: NumberStyle
    name: str
    title: str
    look_for: str


def figures(comparison: Comparison, name: str) -> Markup:
    """The difference per seed and the course of training, as one grid; `name` starts the ids of the page's section."""
    drawn = [
        _differences(comparison, f"{name}-seeds"),
        *(_curves(comparison, plot, name) for plot in _plots(comparison)),
    ]
    return joined((_legend(comparison), element("div", *drawn, class_="figures")))


def overview(comparison: Comparison, name: str) -> Markup | None:
    """The scores of all arms beside what each costs, where the comparison was designed around one of them."""
    if comparison.subject is None:
        return None
    section = comparison.sections[0]
    said = [
        f"{row.arm.label}: {section.style.spread(row.mean, row.sd)}, "
        f"time {ratio(comparison.cost_ratio(row.arm, 'train_seconds'))}."
        for row in section.rows
    ]
    drawn = _figure(
        draw_scores(comparison, section.style, f"{name}-scores"),
        f"Test {section.style.heading(comparison.metric)} and time of training, by arm.",
        "Small: each seed; large: the mean, which stands at the right. Dashed: the mean of the baseline. Time is that "
        "of the whole training, against the baseline's.",
        " ".join(said),
    )
    return None if drawn is None else element("div", drawn, class_="overview")


def _plots(comparison: Comparison) -> list[_Plot]:
    raw = NumberStyle(percent=False, decimals=3)
    score = NumberStyle.of(comparison.metric, [])
    better = "higher" if comparison.higher_is_better else "lower"
    by_loss = [run.recipe.get("select_by") == "loss" for arm in comparison.arms for run in arm.runs]
    best = "best point" if not any(by_loss) else "lowest loss" if all(by_loss) else "best point, or lowest loss,"
    return [
        _Plot(
            Curve("valid", comparison.metric, f"valid {score.heading(comparison.metric)}"),
            score,
            "score",
            f"Validation {words(comparison.metric)}.",
            f"Single pass, {better} is better. The checkpoint at each run's {best} is scored on test, "
            "or the mean of the last ones.",
        ),
        _Plot(
            Curve("train", "task_loss", "training task loss", from_zero=True),
            raw,
            "train",
            "Training loss.",
            "The task loss alone, without the divergence, so that the arms share one scale.",
        ),
        _Plot(
            Curve("valid", "loss", "valid loss"),
            raw,
            "valid",
            "Validation loss.",
            "Plain loss of a single pass. A curve that turns upward while the training loss falls is overfitting.",
        ),
        _Plot(
            Curve("train", "divergence", "divergence between the passes", from_zero=True),
            raw,
            "divergence",
            "Divergence.",
            "How far the passes over one example disagree. Plain training has one pass and no such curve; "
            "a curve at zero means that dropout does not act.",
        ),
        _Plot(
            Curve("valid", "source_use", "rise of the valid loss, nats"),
            raw,
            "source-use",
            "Use of the source.",
            "By how much the valid loss of a label rises with the source of another example. At zero the model writes "
            "without reading: it has not begun, whatever its loss.",
        ),
        _Plot(
            Curve("valid", "prediction_spread", "spread of the predictions", from_zero=True),
            raw,
            "spread",
            "Spread of the predictions.",
            "How far predictions on valid differ between examples, as a share of how far the labels do. At zero the "
            "model says the same of every example: it has not begun.",
        ),
    ]


def _differences(comparison: Comparison, name: str) -> Markup | None:
    style = comparison.sections[0].style
    svg = draw_differences(comparison, style, name)
    better = "Above" if comparison.higher_is_better else "Below"
    return _figure(
        svg,
        "Difference on each seed.",
        f"Arm minus baseline on test; at the right the mean with its 95 % interval. {better} the dashed zero line is "
        "better; an interval that crosses it shows no difference.",
        " ".join(_spelled_differences(comparison, style)),
    )


def _spelled_differences(comparison: Comparison, style: NumberStyle) -> list[str]:
    baseline = comparison.baseline
    if baseline is None:
        return []
    sentences = []
    for arm in comparison.challengers:
        difference = comparison.difference(arm, baseline)
        per_seed = ", ".join(
            f"seed {seed} {style.difference(value)}"
            for seed, value in zip(difference.seeds, difference.per_seed, strict=True)
        )
        sentences.append(
            f"{arm.label}: mean {style.difference(difference.mean)}{style.points}, "
            f"95 % interval {style.interval(difference.interval)}; {per_seed}."
        )
    return sentences


def _curves(comparison: Comparison, plot: _Plot, name: str) -> Markup | None:
    svg = draw_curves(comparison, plot.curve, plot.style, f"{name}-{plot.name}")
    return _figure(svg, plot.title, plot.look_for, " ".join(_spelled_curves(comparison, plot)))


def _spelled_curves(comparison: Comparison, plot: _Plot) -> list[str]:
    sentences = []
    for arm in comparison.arms:
        steps, values = curve_of(arm, plot.curve)
        complete = np.flatnonzero(np.isfinite(values).all(axis=0)).tolist() if steps else []
        if complete:
            first, last = (float(values[:, place].mean()) for place in (complete[0], complete[-1]))
            sentences.append(
                f"{arm.label}, mean over {counted(len(arm.runs), 'seed')}: {plot.style.score(first)} at update "
                f"{steps[complete[0]]}, {plot.style.score(last)} at update {steps[complete[-1]]}."
            )
    return sentences


def _figure(svg: Markup | None, title: str, look_for: str, alternative: str) -> Markup | None:
    if svg is None:
        return None
    return element(
        "figure",
        element("div", svg, role="img", aria_label=f"{title} {alternative}"),
        element("figcaption", element("b", title), f" {look_for}"),
    )


def _legend(comparison: Comparison) -> Markup:
    entries = (
        element("li", _key(style), arm.label)
        for arm, style in zip(comparison.arms, arm_styles(comparison), strict=True)
    )
    note = element("li", "thick: mean over the seeds, thin: single seeds", class_="note")
    return element("ul", *entries, note, class_="legend", aria_label="Legend of the figures")


def _key(style: ArmStyle) -> Markup:
    dashes = " ".join(f"{2 * length:g}" for length in style.dashes) or None
    line = element("line", x1="1", y1="6", x2="33", y2="6", stroke_dasharray=dashes)
    return element(
        "svg",
        line,
        viewBox="0 0 34 12",
        class_="key",
        aria_hidden="true",
        style=f"stroke: var({style.variable}); stroke-width: 2.5",
    )

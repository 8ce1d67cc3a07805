"""Bars from records, as SVG: `python -m rdrop.bench.plots RECORDS.jsonl ... --output FOLDER`, a file a benchmark.

The text stays text. Colors are CSS variables, with a second set for readers whose page is dark. The same records give
the same bytes.
"""

from __future__ import annotations

import argparse
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rdrop.bench.records import Record, comparisons, read
from rdrop.bench.table import Line, compare, layout_of, number

# Drawn in a color that stands for a CSS variable, which replaces it in the finished SVG.
INK, RULE, OTHERS, OURS, PAPER = "#010101", "#020202", "#030303", "#040404", "#050505"
LIGHT = {INK: "#1f2328", RULE: "#d1d9e0", OTHERS: "#8c959f", OURS: "#0a6cbd", PAPER: "#ffffff"}
DARK = {INK: "#f0f6fc", RULE: "#3d444d", OTHERS: "#7d8590", OURS: "#4aa3f0", PAPER: "#0d1117"}
_VARIABLES = {INK: "ink", RULE: "rule", OTHERS: "others", OURS: "ours", PAPER: "paper"}

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rdrop",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.facecolor": PAPER,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "axes.axisbelow": True,
}
_OPACITIES = (1.0, 0.7, 0.45)
_LEFT_OUT = ("copy", "ours_reference")


def draw(all_records: Sequence[Sequence[Record]]) -> Figure:
    """Draws comparisons of one benchmark: a form a row, a bar a comparison; time on the left, memory on the right."""
    layout = layout_of(all_records[0])
    columns = [{line.form: line for line in compare(records)} for records in all_records]
    forms = [form for form in layout.words if form not in _LEFT_OUT and any(form in column for column in columns)]
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(9.0, 0.9 + 0.15 * len(forms) * (1 + len(columns))), layout="constrained")
        figure.patch.set_facecolor(PAPER)
        if len(all_records) > len(_OPACITIES):
            many, most = len(all_records), len(_OPACITIES)
            raise ValueError(f"{many} comparisons are more than a figure has room for, {most}: give those of one dtype")
        time, memory = figure.subplots(1, 2, sharey=True)
        labels = [layout.size(records[0]) for records in all_records]
        _bars(time, forms, columns, labels, lambda line: line.time_ratio)
        _bars(memory, forms, columns, labels, lambda line: line.memory_ratio)
        time.set_yticks(range(len(forms)), [layout.words[form].replace("`", "") for form in forms])
        time.invert_yaxis()
        for axes, what, base in ((time, "time", layout.time_base), (memory, "memory", layout.memory_base)):
            axes.set_title(f"{what}, 1 = {layout.words[base].replace('`', '')}", loc="left", fontsize=8.5)
        if len(labels) > 1:
            figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        return figure


def _bars(
    axes: Axes,
    forms: Sequence[str],
    columns: Sequence[dict[str, Line]],
    labels: Sequence[str],
    ratio_of: Callable[[Line], float | None],
) -> None:
    height = 0.8 / len(columns)
    for place, (column, label, opacity) in enumerate(zip(columns, labels, _OPACITIES, strict=False)):
        ratios = {row: ratio_of(column[form]) for row, form in enumerate(forms) if form in column}
        measured = {row: ratio for row, ratio in ratios.items() if ratio is not None}
        at = [row + height * (place - (len(columns) - 1) / 2) for row in measured]
        colors = [OURS if forms[row].startswith("ours") else OTHERS for row in measured]
        bars = axes.barh(at, list(measured.values()), 0.9 * height, color=colors, alpha=opacity, label=label)
        axes.bar_label(bars, [number(ratio) for ratio in measured.values()], padding=2, fontsize=7)
    axes.axvline(1, color=INK, linewidth=0.8)
    axes.margins(x=0.12)
    axes.grid(axis="x", linewidth=0.5)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def svg(figure: Figure) -> str:
    written = io.StringIO()
    with matplotlib.rc_context(SETTINGS):
        figure.savefig(written, format="svg", metadata={"Date": None})
    text = written.getvalue()
    text = re.sub(r"\s*<metadata\b.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"(?<=font-family: )[^;\"]+", "sans-serif", text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var(--{variable})")
    style = f":root {{{_values(LIGHT)}}} @media (prefers-color-scheme: dark) {{:root {{{_values(DARK)}}}}}"
    head, rest = text.split(">", 1)
    return "\n".join(line.rstrip() for line in f"{head}>\n <style>{style}</style>{rest}".splitlines()) + "\n"


def _values(colors: dict[str, str]) -> str:
    return "; ".join(f"--{_VARIABLES[stand_in]}: {color}" for stand_in, color in colors.items())


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("records", type=Path, nargs="+")
    arguments.add_argument("--output", type=Path, default=Path())
    options = arguments.parse_args()
    found = comparisons(r for path in options.records for r in read(path))
    options.output.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(records[0]["benchmark"] for records in found):
        drawn = draw([records for records in found if records[0]["benchmark"] == name])
        (options.output / f"{name}.svg").write_text(svg(drawn), encoding="utf-8")


if __name__ == "__main__":
    main()

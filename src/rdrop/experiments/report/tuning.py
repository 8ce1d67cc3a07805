"""The page on a search: the grid as a picture, what was chosen, and the comparison on fresh seeds."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rdrop.experiments import metrics
from rdrop.experiments.comparison.looks import record_looks
from rdrop.experiments.comparison.tuning import Tried, Tuning, cells, headings, spelled
from rdrop.experiments.comparison.wording import NumberStyle, words
from rdrop.experiments.report.html import Markup, element
from rdrop.experiments.report.page import document, glossary, section
from rdrop.experiments.report.plots import INK, SETTINGS, STAND_INS, finished_svg
from rdrop.experiments.run_folder import ResultsError, read_file, write_atomically

_COLUMN_INCHES, _ROW_INCHES = 1.0, 0.62
_FAINTEST, _STRONGEST = 0.06, 0.62
"""Opacity of the worst and of the best cell: the number in it stays readable in light and dark."""


def write_tuning(tuning: Tuning, runs: Path) -> Path:
    """Writes the page and, beside it, the record of the search; returns the path of the page.

    Another search of the recipe keeps its own. The folder remembers that the verdict was shown.
    """
    record_looks(runs, [tuning.fresh.look()])
    pages = (runs / f"{tuning.name}-tuning{'' if number == 1 else f'-{number}'}.html" for number in count(1))
    page = next(page for page in pages if _search_of(page) in (None, tuning.search))
    record = json.dumps(tuning.record(), indent=2, ensure_ascii=False) + "\n"
    write_atomically(page.with_suffix(".json"), record.encode())
    write_atomically(page, _page(tuning, runs).encode())
    return page


def _search_of(page: Path) -> object:
    """Returns the search that has its record beside this page; None without one."""
    record = page.with_suffix(".json")
    if not record.exists():
        return None
    try:
        return json.loads(read_file(record)).get("search", "")
    except (ValueError, AttributeError, RecursionError, ResultsError):  # no record: it is left where it is
        return ""


def draw_grid(tuning: Tuning, name: str) -> Markup:
    """Draws the mean valid score of each setting: a column for plain training and one for each value of the method's
    keys, a row for each value of the others. What was chosen has a frame.
    """
    columns = _columns(tuning)
    other_keys = tuple(key for key in tuning.keys if key not in tuning.method_keys)
    rows = list(dict.fromkeys(_place(t, other_keys) for t in tuning.tried))
    means = [t.mean for t in tuning.tried if t.mean is not None and t.problem is None]
    style = NumberStyle.of(tuning.metric, [])
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": name}):
        size = (_width_inches(len(columns)), 0.9 + _ROW_INCHES * len(rows))
        figure = Figure(figsize=size, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        for tried in tuning.tried:
            x = 0 if tried.is_plain else columns.index(_place(tried, tuning.method_keys))
            _draw_cell(axes, x, rows.index(_place(tried, other_keys)), tried, tuning, means, style)
        _label(axes, columns, rows, tuning.method_keys, other_keys)
        axes.set_title(f"valid {style.heading(tuning.metric)}, mean over the search's seeds", loc="left")
        return finished_svg(figure, name)


def _draw_cell(
    axes: Axes, x: int, y: int, tried: Tried, tuning: Tuning, means: list[float], style: NumberStyle
) -> None:
    is_chosen = tried in (tuning.best_rdrop, tuning.best_plain)
    mean = tried.mean if tried.problem is None else None
    color = STAND_INS["--baseline" if tried.is_plain else "--rdrop-1"]
    opacity = 0.0
    if mean is not None:
        worst, best = min(means), max(means)
        if not metrics.find(tuning.metric).higher_is_better:
            worst, best = best, worst
        share = (mean - worst) / (best - worst) if best != worst else 1.0
        opacity = _FAINTEST + share * (_STRONGEST - _FAINTEST)
    axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, facecolor=color, alpha=opacity, linewidth=0))
    if is_chosen:
        axes.add_patch(Rectangle((x - 0.47, y - 0.45), 0.94, 0.9, fill=False, edgecolor=INK, linewidth=1.8))
    text = "failed" if mean is None else style.score(mean)
    if mean is not None and len(tried.scores) < len(tuning.seeds):
        text += f"\n{len(tried.scores)} of {len(tuning.seeds)} seeds"
    text += " \N{DAGGER}" if tried.not_begun else ""
    axes.text(x, y, text, ha="center", va="center", fontweight="bold" if is_chosen else "normal")


def _label(
    axes: Axes, columns: list[str], rows: list[str], method_keys: tuple[str, ...], other_keys: tuple[str, ...]
) -> None:
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(", ".join(method_keys) or "method")
    if other_keys:
        axes.set_ylabel(", ".join(other_keys))
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _place(tried: Tried, keys: tuple[str, ...]) -> str:
    shown = [spelled(tried.values[key]) for key in keys if key in tried.values]
    return "\n".join(shown) or ("R-Drop" if keys == () and not tried.is_plain else "")


def _page(tuning: Tuning, runs: Path) -> str:
    return document(
        f"R-Drop tuning: {tuning.name}",
        element(
            "header",
            element("h1", "R-Drop and plain training, each at its best"),
            element("p", f"{tuning.name}: a search, and what fresh seeds say of it", class_="sub"),
        ),
        element(
            "section",
            element("h2", "The search", id="search"),
            *(element("p", sentence, class_="verdict") for sentence in tuning.sentences_of_search()),
            element(
                "figure",
                element(
                    "div", draw_grid(tuning, "grid"), role="img", aria_label=_described(tuning), style=_no_wider(tuning)
                ),
                element("figcaption", "A frame: what was chosen. The stronger the color, the better the score."),
            ),
            _table(tuning),
            class_="comparison",
        ),
        section(tuning.fresh, {}, "c1", runs, runs),
        glossary(),
    )


def _columns(tuning: Tuning) -> list[str]:
    return ["plain", *dict.fromkeys(_place(t, tuning.method_keys) for t in tuning.tried if not t.is_plain)]


def _width_inches(columns: int) -> float:
    return 1.4 + _COLUMN_INCHES * columns


def _no_wider(tuning: Tuning) -> str:
    """A small grid keeps the size of the page's letters."""
    return f"max-width: {_width_inches(len(_columns(tuning))):.1f}in"


def _described(tuning: Tuning) -> str:
    return f"Valid {words(tuning.metric)} of each setting; the table below has the numbers."


def _table(tuning: Tuning) -> Markup:
    head = (element("th", text, scope="col") if text else element("td") for text in headings(tuning))
    rows = [_row(*cells(tuning, tried)) for tried in tuning.ranked()]
    table = element("table", element("thead", element("tr", *head)), element("tbody", *rows))
    return element("div", table, class_="scroll", role="region", aria_label="All settings", tabindex="0")


def _row(name: str, *values: str) -> Markup:
    return element("tr", element("th", name, scope="row"), *(element("td", value) for value in values))

"""The page a reader of the paper wants: for each task a table of data sets, published rows and our own side by side.

Published figures come from the catalog of recipes, ours from the finished runs; each of ours links to its comparison
in report.html, with settings, curves, seeds and cost. The page needs no network; its one script sorts a table by the
column that is clicked, and without it everything is there, in the catalog's order.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rdrop.experiments import metrics
from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.comparison import Comparison, comparisons
from rdrop.experiments.comparison.designs import read_designs
from rdrop.experiments.comparison.wording import counted
from rdrop.experiments.recipe.published import Published
from rdrop.experiments.recipes import PUBLISHED, RECIPES, dataset_of
from rdrop.experiments.report.html import Markup, element, joined
from rdrop.experiments.report.settings import distinguishing_settings, titled
from rdrop.experiments.run_folder import find_runs, write_atomically

HEADINGS = ("dataset", "split", "metric", "value", "model", "method", "from")
SCRIPT = """
document.querySelectorAll("th button").forEach(button => button.addEventListener("click", () => {
  const heading = button.closest("th"), body = heading.closest("table").tBodies[0];
  const column = heading.cellIndex, down = heading.ariaSort === "ascending";
  const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  heading.parentElement.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
  heading.ariaSort = down ? "descending" : "ascending";
  const rows = [...body.rows].sort((a, b) => compare(key(a), key(b)));
  body.append(...(down ? rows.reverse() : rows));
}));
"""


@dataclass(frozen=True)
class Entry:
    """One value of a table: who reports it, of what, with which method."""

    dataset: str
    split: str
    metric: str
    value: str
    sort_value: float
    model: str
    method: str
    source: str
    link: str | None = None
    """Where the run can be looked at; None for what is published."""

    def markup(self) -> Markup:
        source = self.source if self.link is None else element("a", self.source, href=self.link)
        return element(
            "tr",
            element("th", self.dataset, scope="row"),
            element("td", self.split),
            element("td", self.metric),
            element("td", self.value, data_sort=f"{self.sort_value:.6g}"),
            element("td", self.model),
            element("td", self.method),
            element("td", source),
            class_="published" if self.link is None else "ours",
        )


def write_results(runs: Path, out: Path | None = None) -> Path:
    """Write the page on all finished comparisons below `runs`; returns its path, `runs/results.html` by default."""
    out = out or runs / "results.html"
    write_atomically(out, _page(comparisons(find_runs(runs), designs=read_designs(runs))).encode())
    return out


def rows_of_task(task: str, found: list[Comparison]) -> list[Entry]:
    """The rows of a task in the order of the catalog: of each recipe first what is published, then ours.

    Our own comparisons of recipes with another name than the catalog's follow.
    """
    own: dict[str, list[Entry]] = {}
    # By its place report.html numbers the section of a comparison.
    for place, (comparison, setting) in enumerate(zip(found, distinguishing_settings(found), strict=True), start=1):
        if _task_of(comparison) == task:
            title = titled(comparison.name, setting)
            own.setdefault(comparison.name, []).extend(_own_rows(comparison, title, f"report.html#c{place}"))
    names = [name for name, recipe in RECIPES.items() if recipe.task == task]
    rows: list[Entry] = []
    for name in dict.fromkeys([*names, *own]):
        if name in names:
            for published in PUBLISHED.get(name, ()):
                # One baseline may stand beside several methods.
                rows += [row for row in _published_rows(published) if row not in rows]
        rows += own.get(name, [])
    return rows


def _task_of(comparison: Comparison) -> str:
    return str(comparison.arms[0].recipe.get("task"))


def _published_rows(published: Published) -> Iterator[Entry]:
    source = f"published: {published.source}"
    figures = (
        (published.baseline, "baseline", ""),
        (published.rdrop, published.method, " (headline result)" if published.headline else ""),
    )
    for value, method, mark in figures:
        if value is not None:
            yield Entry(
                published.dataset,
                published.split,
                published.metric + _direction(published.higher_is_better),
                f"{value:g}",
                value,
                published.model,
                method,
                source + mark,
            )


def _own_rows(comparison: Comparison, title: str, link: str) -> Iterator[Entry]:
    """Yields a row for each metric of test and arm; the loss is a metric only where it is what is compared."""
    dataset = dataset_of(comparison.arms[0].recipe)
    for section in comparison.sections:
        if section.split == "test" and (section.metric == comparison.metric or not section.metric.endswith("loss")):
            style, metric = section.style, metrics.find(section.metric)
            for row in section.rows:
                if row.mean is not None:
                    yield Entry(
                        dataset,
                        section.split,
                        style.heading(section.metric) + _direction(metric.higher_is_better),
                        style.spread(row.mean, row.sd),
                        style.factor * row.mean,
                        _model(row.arm),
                        row.arm.label,
                        f"ours: {title}, {counted(len(row.scores), 'seed')}",
                        link,
                    )


def _direction(higher_is_better: bool | None) -> str:
    return " (lower is better)" if higher_is_better is False else ""


def _model(arm: Arm) -> str:
    """Returns the model's name where it was pre-trained, and its size."""
    run = arm.runs[0]
    count = run.result["cost"].get("parameters")
    size = f"{count / 1e6:.3g} M parameters" if isinstance(count, int) else ""
    name = run.recipe.get("model", {}).get("name")
    return ", ".join(part for part in (Path(str(name)).name if name else "", size) if part)


def _page(found: list[Comparison]) -> str:
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_policy()),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", "R-Drop: published and measured"),
        element("style", Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))),
    )
    tasks = [recipe.task for recipe in RECIPES.values()] + sorted(map(_task_of, found))
    sections = [
        _section(task.replace("-", " ").capitalize(), rows)
        for task in dict.fromkeys(tasks)
        if (rows := rows_of_task(task, found))
    ]
    body = element("body", _header(found), *sections, element("script", Markup(SCRIPT)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _policy() -> str:
    """The browser runs this one script and nothing else."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _header(found: list[Comparison]) -> Markup:
    return element(
        "header",
        element("h1", "R-Drop: published and measured"),
        element("p", f"{counted(len(found), 'comparison')} of our own", class_="sub"),
        element(
            "p",
            "Published rows say where they stand; “headline result” marks those that the paper is known by. Our rows "
            "are means over all seeds that were run, with the standard deviation, on the test split. For GLUE and "
            "ImageNet, whose test labels are not public, that is the dev or valid split of the literature. A smaller "
            "model or data set than the paper's can be compared with its own baseline only. Each of our rows links to "
            "its comparison in the report, with settings, curves, cost and the folder of every run.",
            class_="note",
        ),
    )


def _section(title: str, rows: Iterable[Entry]) -> Markup:
    headings = (element("th", element("button", heading, type="button"), scope="col") for heading in HEADINGS)
    table = element(
        "table",
        element("thead", element("tr", *headings)),
        element("tbody", joined(row.markup() for row in rows)),
        class_="sortable",
    )
    box = element("div", table, class_="scroll", role="region", aria_label=title, tabindex="0")
    return element("section", element("h3", title), box)

"""The table of `rdrop list`: every recipe, what is published about its data set, and what the runs at hand scored."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.published import Published
from rdrop.experiments.recipes import DATASETS, PUBLISHED, RECIPES, dataset_of
from rdrop.experiments.run_folder import find_runs

ARROW = "\N{RIGHTWARDS ARROW}"
NOT_KNOWN = "\N{EM DASH}"
CAPTION = (
    f"\nBaseline {ARROW} R-Drop; scores of the test split, unless another is named. `rdrop list RECIPE` shows its keys."
)
WIDE = 118
"""Columns of a terminal from which on figures stand beside their metric, not below."""


def catalog(runs: Path, width: int) -> Table:
    """A row a recipe, by task, for a terminal of `width` columns.

    "ours" are the means of the finished comparisons below `runs`, if there are any.
    """
    is_wide = width >= WIDE
    between = " " if is_wide else "\n"
    name_width, dataset_width, model_width, own_width = (25, 14, 16, None) if is_wide else (23, 13, 13, 11)
    own = _scores_of_finished_runs(runs, between) if runs.is_dir() else {}
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1 if is_wide else 0),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
        caption=CAPTION,
        caption_justify="left",
    )
    for heading in ("recipe", "dataset", "model", "published"):
        table.add_column(heading, overflow="fold")
    table.add_column("ours", overflow="fold", max_width=own_width)
    task = None
    for name, recipe in RECIPES.items():
        if recipe.task != task:
            task = recipe.task
            table.add_section()
            table.add_row(Text(task.replace("-", " "), "italic"))
        table.add_row(
            Text(_broken(name, name_width), "bold"),
            textwrap.fill(DATASETS.get(name, "your own"), dataset_width, break_on_hyphens=False),
            _broken(_model(recipe), model_width),
            Text("\n".join(_published(row, between) for row in PUBLISHED.get(name, ()))),
            Text("\n".join(own.get(name, ()))),
        )
    return table


def _broken(name: str, width: int) -> str:
    """The name in lines of at most `width`, broken after its hyphens and spaces."""
    lines = [""]
    for part in re.findall(r"[^- ]+[- ]?", name):
        if len(lines[-1]) + len(part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _model(recipe: Recipe) -> str:
    """Returns the model as the paper names it; else the pre-trained one, without its owner."""
    published = PUBLISHED.get(recipe.name)
    if published:
        return published[0].model
    name = recipe.model_dump()["model"].get("name")
    return Path(name).name if name else "from scratch"


def _published(published: Published, between: str) -> str:
    metric = published.metric if published.split == "test" else f"{published.split} {published.metric}"
    figures = (NOT_KNOWN if value is None else f"{value:g}" for value in (published.baseline, published.rdrop))
    method = "" if published.method == "R-Drop" else f"{between}({published.method.removeprefix('R-Drop ')})"
    return f"{metric}{between}{f' {ARROW} '.join(figures)}{method}"


def _scores_of_finished_runs(runs: Path, between: str) -> dict[str, list[str]]:
    """Returns, by recipe, the mean test score of the baseline and of its first R-Drop arm, a line for each comparison.

    Those of one name are told apart by the settings in which they differ. Without the comparisons on other data than
    the recipe's: their scores do not belong beside what is published.
    """
    # Statistics take a second to import, and without any run the list needs none.
    from rdrop.experiments.comparison.comparison import comparisons
    from rdrop.experiments.comparison.designs import read_designs
    from rdrop.experiments.comparison.paired import mean
    from rdrop.experiments.comparison.wording import words
    from rdrop.experiments.report.settings import distinguishing_settings, titled

    found: dict[str, list[str]] = {}
    all_of_runs = comparisons(find_runs(runs), designs=read_designs(runs))
    for comparison, setting in zip(all_of_runs, distinguishing_settings(all_of_runs), strict=True):
        rdrop = [arm for arm in comparison.challengers if arm.runs and not arm.method.is_plain]
        rdrop = [arm for arm in rdrop if comparison.subject in (None, arm)][:1]
        dataset = dataset_of(comparison.arms[0].recipe)
        if comparison.baseline is not None and dataset == DATASETS.get(comparison.name, dataset):
            style = comparison.sections[0].style
            arms = (comparison.baseline, *rdrop)
            means = [mean(tuple(arm.scores(comparison.metric, "test").values())) for arm in arms]
            figures = f" {ARROW} ".join(style.score(value) for value in (*means, None)[:2])
            line = titled(f"{words(comparison.metric)}{between}{figures}", setting)
            found.setdefault(comparison.name, []).append(line)
    return found

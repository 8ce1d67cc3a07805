"""The table of `rdrop list`: every recipe, what is published about its data set, and what the runs at hand scored."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from rdrop.experiments.compare import Arm, Comparison, comparisons
from rdrop.experiments.paired import mean
from rdrop.experiments.published import Published
from rdrop.experiments.recipes import PUBLISHED, RECIPES
from rdrop.experiments.results import find_runs
from rdrop.experiments.wording import words

ARROW = "\N{RIGHTWARDS ARROW}"
CAPTION = f"Baseline {ARROW} R-Drop. *: as recalled, not checked. `rdrop list RECIPE` shows its keys."


def catalogue(runs: Path) -> Table:
    """A row a recipe, by task; "ours" are the means of the finished comparisons below `runs`, if there are any."""
    own = {comparison.name: comparison for comparison in comparisons(find_runs(runs) if runs.is_dir() else [])}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, caption=CAPTION, caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    table.add_column("model", overflow="fold", min_width=11)
    table.add_column("published", no_wrap=True)
    table.add_column("ours", no_wrap=True)
    task = None
    for name, recipe in RECIPES.items():
        if recipe.task != task:
            task = recipe.task
            table.add_section()
            table.add_row(Text(words(task.replace("-", "_")), "italic"))
        published = PUBLISHED.get(name, ())
        model = published[0].model if published else ""
        table.add_row(Text(name, "bold"), model, "\n".join(map(_published, published)), _own(own.get(name)))
    return table


def _published(published: Published) -> str:
    baseline, rdrop = ("" if value is None else f"{value:g}" for value in (published.baseline, published.rdrop))
    method = "" if published.method == "R-Drop" else f" ({published.method.removeprefix('R-Drop ')})"
    return f"{published.metric} {baseline} {ARROW} {rdrop}{method}{' *' if published.recalled else ''}"


def _own(comparison: Comparison | None) -> str:
    if comparison is None or comparison.baseline is None:
        return ""
    style = comparison.results()[0].style
    scores = [style.score(_mean(arm, comparison.metric)) for arm in (comparison.baseline, *_rdrop(comparison))]
    return f" {ARROW} ".join(scores)


def _rdrop(comparison: Comparison) -> list[Arm]:
    return [arm for arm in comparison.challengers if not arm.method.is_plain][:1]


def _mean(arm: Arm, metric: str) -> float | None:
    return mean(tuple(arm.scores(metric, "test").values()))

"""The table of `rdrop list`: every recipe, what is published about its data set, and what the runs at hand scored."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from rdrop.experiments.published import Published
from rdrop.experiments.recipes import PUBLISHED, RECIPES
from rdrop.experiments.results import find_runs

ARROW = "\N{RIGHTWARDS ARROW}"
CAPTION = f"Baseline {ARROW} R-Drop. *: as recalled, not checked. `rdrop list RECIPE` shows its keys."


def catalogue(runs: Path) -> Table:
    """A row a recipe, by task; "ours" are the means of the finished comparisons below `runs`, if there are any."""
    own = _scores_of_finished_runs(runs) if runs.is_dir() else {}
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
            table.add_row(Text(task.replace("-", " "), "italic"))
        published = PUBLISHED.get(name, ())
        model = published[0].model if published else ""
        table.add_row(Text(name, "bold"), model, "\n".join(map(_published, published)), own.get(name, ""))
    return table


def _published(published: Published) -> str:
    baseline, rdrop = ("" if value is None else f"{value:g}" for value in (published.baseline, published.rdrop))
    method = "" if published.method == "R-Drop" else f" ({published.method.removeprefix('R-Drop ')})"
    return f"{published.metric} {baseline} {ARROW} {rdrop}{method}{' *' if published.recalled else ''}"


def _scores_of_finished_runs(runs: Path) -> dict[str, str]:
    """By the name of the recipe: the mean test score of the baseline and of its first R-Drop arm."""
    # Statistics take a second to import, and without any run the list needs none.
    from rdrop.experiments.compare import comparisons
    from rdrop.experiments.paired import mean

    found = {}
    for comparison in comparisons(find_runs(runs)):
        rdrop = [arm for arm in comparison.challengers if not arm.method.is_plain][:1]
        if comparison.baseline is not None:
            style = comparison.results()[0].style
            of_arms = (tuple(arm.scores(comparison.metric, "test").values()) for arm in (comparison.baseline, *rdrop))
            found[comparison.name] = f" {ARROW} ".join(style.score(mean(scores)) for scores in of_arms)
    return found

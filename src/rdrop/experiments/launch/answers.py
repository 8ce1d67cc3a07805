"""Show in the terminal what the commands answer: keys, scores, comparisons, a search, and where the pages are."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rdrop.experiments.comparison.designs import read_designs
from rdrop.experiments.distributed import is_first_process
from rdrop.experiments.launch.plan import Run
from rdrop.experiments.launch.terminal import Terminal
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.run_folder import RunRecord

if TYPE_CHECKING:
    from rdrop.experiments.comparison.comparison import Comparison
    from rdrop.experiments.comparison.finished_runs import UnusableRun
    from rdrop.experiments.comparison.tuning import Tuning


def progress_console() -> Console:
    return Terminal(stderr=True, quiet=not is_first_process())


def keys_of(recipe: Recipe) -> Table:
    table = _table("key", "its value, and what it means")
    for key, description in recipe.descriptions().items():
        table.add_row(Text(key, "bold"), Text(json.dumps(recipe.value(key)), "bold"))
        table.add_row("", description)
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in headings[:-1]:
        table.add_column(heading, no_wrap=True)
    table.add_column(headings[-1])
    return table


def kernel_line(missing: dict[str, str | None]) -> str:
    """Which implementations of the loss are here; for the others, why not."""
    words = [f"{name}: {'present' if reason is None else reason}" for name, reason in missing.items()]
    return textwrap.fill("kernels     " + "; ".join(words), width=79, subsequent_indent=" " * 12)


def title_of(recipe: Mapping[str, Any]) -> str:
    return f"{recipe['name']}, alpha {recipe['method']['alpha']:g}, seed {recipe['seed']}"


def show_result(run: Run) -> None:
    result = run.result()
    assert result is not None  # it has just been trained
    show_scores(result, ("valid", "test"))
    Terminal().print(f"{_scored_weights(result)} {run.folder}".lstrip(), soft_wrap=True)


def _scored_weights(result: Mapping[str, Any]) -> str:
    *others, last = result.get("averaged_steps") or [None]
    if last is None and result.get("best_step") is None:  # of a version that did not say
        return ""
    if last is None:
        by_loss = " by its loss" if result["recipe"].get("select_by") == "loss" else ""
        return f"The weights of update {result['best_step']}, the best on the valid split{by_loss}."
    if not others:
        return f"The weights of update {last}."
    return f"The mean of the weights of updates {', '.join(map(str, others))} and {last}."


def show_scores(result: Mapping[str, Any], splits: Sequence[str]) -> None:
    """A row a metric, the main one first; below, what a reader should know beside the numbers."""
    from rdrop.experiments.comparison.wording import NumberStyle

    table = _table("", *splits)
    for metric in sorted(result["test"], key=lambda name: name != result["metric"]):
        style = NumberStyle.of(metric, [])
        # Some are of the test split alone.
        table.add_row(style.heading(metric), *(style.score(result[split].get(metric)) for split in splits))
    console = Terminal()
    console.print(title_of(result["recipe"]), style="bold")
    console.print(table)
    for name, note in result.get("notes", {}).items():
        console.print(f"{name}: {note}", soft_wrap=True)


def show_comparisons(
    records: list[RunRecord], root: Path, *, of: Set[Path] | None = None, are_new_scores: bool = False
) -> list[Comparison]:
    """Shows the comparisons of the records, or those with one of the runs `of`, and returns all.

    These have all seeds and arms that are there, as on the page: which of them were asked for is no reason to leave
    others out. `root` is the folder that remembers the arms and the verdicts; of scores that no run has there is no
    verdict.
    """
    from rdrop.experiments.comparison.comparison import comparisons
    from rdrop.experiments.comparison.finished_runs import split_usable
    from rdrop.experiments.comparison.looks import read_looks
    from rdrop.experiments.comparison.terminal_table import terminal_table
    from rdrop.experiments.report.settings import distinguishing_settings, titled

    console = Terminal()
    found = comparisons(records, () if are_new_scores else read_looks(root), read_designs(root))
    for comparison, setting in zip(found, distinguishing_settings(found), strict=True):
        if of is not None and of.isdisjoint(run.path for run in comparison.runs):
            continue
        if are_new_scores:
            comparison = replace(comparison, are_new_scores=True)
        console.print(terminal_table(comparison, titled(comparison.name, setting)))
        # Of more contests than two, a screen would not do; the page has all.
        _show_words([comparison.verdict()], comparison.remarks(contests=2), comparison)
    show_unusable([run for run in split_usable(records)[1] if of is None or run.path in of], console)
    return found


def show_tuning(tuning: Tuning, runs: Path) -> None:
    from rdrop.experiments.comparison.terminal_table import terminal_table
    from rdrop.experiments.comparison.tuning import terminal_table as table_of_search
    from rdrop.experiments.report.tuning import write_tuning

    console = Terminal()
    console.print(table_of_search(tuning))
    console.print(terminal_table(tuning.fresh))
    _show_words(tuning.sentences(), tuning.fresh.remarks(), tuning.fresh)
    console.print(f"The page with the grid and the comparison: {write_tuning(tuning, runs)}", soft_wrap=True)


def _show_words(verdicts: Iterable[str], remarks: Iterable[str], comparison: Comparison) -> None:
    """Shows what is said below the table of a comparison: the verdict and what belongs to it, then the notes."""
    from rdrop.experiments.comparison.notes import noted

    console = Terminal()
    console.print()
    for sentence in verdicts:
        console.print(sentence, style="bold")
    for remark in remarks:
        console.print(remark)
    for hint in comparison.hints():
        console.print(f"Hint: {hint}", style="yellow")
    console.print()
    notes = noted(comparison)
    for note in notes:
        console.print(note)
    if notes:
        console.print()


def show_unusable(unusable: Iterable[UnusableRun], console: Console) -> None:
    for run in unusable:
        console.print(f"left out: {run.path}: {run.problem}", style="yellow", soft_wrap=True)


def write_pages(runs: Path) -> None:
    from rdrop.experiments.report.page import write_report
    from rdrop.experiments.report.published_page import write_results

    console = Terminal()
    console.print(f"The page with curves, settings and cost: {write_report(runs)}", soft_wrap=True)
    console.print(f"Beside the published figures: {write_results(runs)}", soft_wrap=True)

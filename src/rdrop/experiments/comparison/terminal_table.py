"""A comparison as one table for the terminal, 80 columns wide."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.paired import PairedDifference
from rdrop.experiments.comparison.sections import Section
from rdrop.experiments.comparison.wording import CHURN_STYLE, NumberStyle, counted, ratio, wins_ties_losses


def terminal_table(comparison: Comparison, title: str | None = None) -> Table:
    """Per metric and arm: mean ± sd over the seeds, difference from the baseline with its 95 % interval, wins, ties
    and losses over the paired seeds, and the cost of a step in time and memory against the baseline.

    With a subject, the differences are the subject's from each other arm, as in the verdict.
    """
    table = Table(
        title=Text(f"{title or comparison.name}: {counted(len(comparison.seeds), 'seed')}", style="bold"),
        title_justify="left",
        caption=Text(_caption(comparison)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
    # The two columns that may wrap give way, the wider one first, where the terminal is narrow; nothing is cut off.
    table.add_column("", overflow="fold")
    for heading in ("mean ± sd", "diff.", "95 % interval", "W/T/L", "time", "memory"):
        table.add_column(heading, justify="right", no_wrap=heading != "95 % interval", overflow="fold")
    for number, section in enumerate(comparison.sections):
        _add_section(table, comparison, section, with_cost=number == 0)
    _add_churn(table, comparison)
    return table


def _add_section(table: Table, comparison: Comparison, section: Section, *, with_cost: bool) -> None:
    style = section.style
    table.add_row(Text(f"{section.split} {style.heading(section.metric)}", style="bold"))
    for row in section.rows:
        cells = [style.spread(row.mean, row.sd), *_difference_cells(row.difference, style)]
        table.add_row(Text(row.arm.marked_label), *cells, *(_cost_ratios(comparison, row.arm) if with_cost else ()))
    table.add_section()


def _add_churn(table: Table, comparison: Comparison) -> None:
    found = comparison.churn()
    if found:
        table.add_row(Text("test churn %", style="bold"))
        for label, value in found.items():
            table.add_row(Text(label), CHURN_STYLE.score(value))
        table.add_section()


def _difference_cells(difference: PairedDifference | None, style: NumberStyle) -> list[str]:
    if difference is None:
        return ["", "", ""]
    return [style.difference(difference.mean), style.interval(difference.interval), wins_ties_losses(difference)]


def _cost_ratios(comparison: Comparison, arm: Arm) -> list[str]:
    # The arms of a design may differ in the number of updates.
    time = "step_milliseconds" if comparison.subject is None else "train_seconds"
    return [ratio(comparison.cost_ratio(arm, key)) for key in (time, "peak_extra_bytes")]


def _caption(comparison: Comparison) -> str:
    what = "arm minus baseline" if comparison.subject is None else "last arm minus this one"
    lines = ["", f"diff.: {what}, paired by seed; W/T/L: seeds better, equal, worse"]
    if comparison.subject is not None:
        lines.append("time: of the whole training")
    if comparison.side_by_side() > 1:
        lines.append(f"time and memory: of up to {comparison.side_by_side()} runs side by side, each slower for it")
    if comparison.churn():
        lines.append("churn: test examples on which two seeds of an arm disagree")
    if any(arm.has_failed_runs for arm in comparison.arms):
        lines.append("\N{DAGGER}: with runs that did not learn or diverged, which the verdict names")
    return "\n".join((*lines, *map(str, comparison.gaps())))

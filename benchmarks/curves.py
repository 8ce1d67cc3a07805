"""The course of training as plots: where R-Drop passes its baseline, what overfits, when a model reads its source.

    python -m benchmarks.curves add crossing RUNS --command "rdrop compare ..."
    python -m benchmarks.curves pages

`add` puts the curves of the finished runs below RUNS into benchmarks/results/curves.jsonl, one run a line with its
recipe, machine, versions and date; runs of the same figure are replaced. `pages` draws crossing.svg, overfitting.svg
and start.svg in docs/plots, and writes what they show, in words, between `<!-- curves: NAME -->` and
`<!-- /curves: NAME -->` of docs/results.md. A test holds that both are what the records give.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rdrop.bench.plots import INK, OTHERS, OURS, PAPER, RULE, SETTINGS, svg
from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.comparison.designs import read_designs
from rdrop.experiments.run_folder import find_runs

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks/results/curves.jsonl"
PAGE, PLOTS = ROOT / "docs/results.md", ROOT / "docs/plots"
PART = re.compile(r"(<!-- curves: ([\w.-]+) -->\n).*?(<!-- /curves: \2 -->)", re.DOTALL)
BEGUN = 0.3
"""Nats by which a token's loss rises with the source of another sentence, from which on a run counts as begun."""


class Panel(NamedTuple):
    """One quantity of the valid split over the updates."""

    key: str
    title: str


FIGURES = {
    "crossing": (Panel("loss", "valid loss"), Panel("bleu", "valid BLEU")),
    "overfitting": (Panel("loss", "valid loss"), Panel("accuracy", "valid accuracy")),
    "start": (Panel("source_use", "use of the source, nats a token"),),
}


class Course(NamedTuple):
    """A quantity of an arm: the steps at which every seed was scored, and its values there, a row a seed."""

    steps: list[int]
    values: list[list[float]]

    @property
    def mean(self) -> list[float]:
        return [statistics.fmean(column) for column in zip(*self.values, strict=True)]


def read(figure: str) -> list[dict[str, Any]]:
    """The records of one figure, in the order of arms and seeds."""
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    return [record for record in map(json.loads, lines) if record["figure"] == figure]


def add(figure: str, runs: Path, command: str) -> None:
    """The finished runs below `runs`, in place of the figure's earlier ones."""
    keys = ("kind", "step", *(panel.key for panel in FIGURES[figure]))
    new = []
    for comparison in comparisons(find_runs(runs), designs=read_designs(runs)):
        for arm in comparison.arms:
            for run in arm.runs:
                rows = [{key: row[key] for key in keys if key in row} for row in run.metrics if row["kind"] == "valid"]
                facts = {
                    key: run.result[key] for key in ("digest", "recipe", "machine", "versions", "finished", "test")
                }
                new.append(
                    {"figure": figure, "arm": arm.label, "seed": run.seed, "command": command, **facts, "rows": rows}
                )
    kept = [record for name in FIGURES if name != figure for record in read(name)]
    RECORDS.write_text("".join(json.dumps(record) + "\n" for record in kept + new), encoding="utf-8")


def courses(records: Sequence[dict[str, Any]], panel: Panel) -> dict[str, Course]:
    """One a arm, in the order of the records."""
    found: dict[str, list[dict[int, float]]] = {}
    for record in records:
        of_run = {row["step"]: row[panel.key] for row in record["rows"] if panel.key in row}
        found.setdefault(record["arm"], []).append(of_run)
    drawn = {}
    for arm, of_runs in found.items():
        steps = sorted(set.intersection(*(set(of_run) for of_run in of_runs)))
        drawn[arm] = Course(steps, [[of_run[step] for step in steps] for of_run in of_runs])
    return drawn


def crossing(ours: Course, baseline: Course, *, higher_is_better: bool = True) -> int | None:
    """Returns the first step from which on the mean of `ours` stays ahead; None if it is not ahead at the end."""
    first = None
    for step, own, other in zip(ours.steps, ours.mean, baseline.mean, strict=True):
        ahead = own > other if higher_is_better else own < other
        first = (step if first is None else first) if ahead else None
    return first


def begun(course: Course) -> list[int | None]:
    """Returns for each seed the first step with a use of the source of `BEGUN` or more; None for a run without one."""
    return [
        next((step for step, value in zip(course.steps, values, strict=True) if value >= BEGUN), None)
        for values in course.values
    ]


# ---------------------------------------------------------------------------------------------------- plots and words


def draw(figure: str) -> str:
    """The SVG of a figure: each seed a thin line, the mean a thick one, an arm a color and a dash pattern."""
    records, panels = read(figure), FIGURES[figure]
    with matplotlib.rc_context(SETTINGS):
        drawn = Figure(figsize=(max(4.6 * len(panels), 6.2), 3.2), layout="constrained")
        drawn.patch.set_facecolor(PAPER)
        for axes, panel in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw_panel(axes, panel, courses(records, panel))
        handles, labels = drawn.axes[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        return svg(drawn)


def _draw_panel(axes: Axes, panel: Panel, found: dict[str, Course]) -> None:
    looks = {"baseline": (OTHERS, "solid"), "plain": (OTHERS, "dashed")}
    ours = iter([(OURS, "solid"), (OURS, "dashed"), (OURS, "dotted")])
    for arm, course in found.items():
        color, line = looks["baseline"] if arm == "baseline" else looks["plain"] if "baseline" in arm else next(ours)
        for values in course.values:
            axes.plot(course.steps, values, color=color, linestyle=line, linewidth=0.6, alpha=0.35)
        axes.plot(course.steps, course.mean, color=color, linestyle=line, linewidth=2.0, label=arm)
    axes.set_title(panel.title, loc="left", fontsize=9, color=INK)
    axes.set_xlabel("updates", color=INK)
    axes.grid(axis="y", linewidth=0.5, color=RULE)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def words(figure: str) -> str:
    """What a figure shows, with its origin; where there is no record yet, that."""
    records = read(figure)
    if not records:
        return "(There is no record yet.)"
    return f"{_shown(figure, records)}\n\n{_origin(records)}"


def _shown(figure: str, records: Sequence[dict[str, Any]]) -> str:
    found = courses(records, FIGURES[figure][-1])
    if figure == "start":
        lines = ["| arm | update at which each seed has begun | test BLEU of each |", "|---|---|---|"]
        for arm, course in found.items():
            steps = ", ".join("never" if step is None else str(step) for step in begun(course))
            scores = ", ".join(f"{record['test']['bleu']:.1f}" for record in records if record["arm"] == arm)
            lines.append(f"| {arm} | {steps} | {scores} |")
        return "\n".join(lines)
    losses = courses(records, FIGURES[figure][0])
    if figure == "overfitting":
        lines = [
            "| arm | lowest valid loss of each seed | mean | at updates | mean at the end |",
            "|---|---|---|---|---|",
        ]
        for arm, course in losses.items():
            lowest = [min(zip(values, course.steps, strict=True)) for values in course.values]
            mean = statistics.fmean(loss for loss, _ in lowest)
            each = ", ".join(f"{loss:.2f}" for loss, _ in lowest)
            met = [step for _, step in lowest]
            lines.append(f"| {arm} | {each} | {mean:.2f} | {min(met)} to {max(met)} | {course.mean[-1]:.2f} |")
        return "\n".join(lines)
    lowest, last = _lowest(losses["baseline"]), found["baseline"].steps[-1]
    said = [f"The baseline's mean valid loss is lowest at update {lowest} of {last}. Mean valid BLEU:"]
    plain = [arm for arm in found if arm.startswith("baseline")]
    beside = [(arm, other) for arm in found if arm not in plain for other in plain]
    beside += [(arm, plain[0]) for arm in plain[1:]]
    said += ["", *(f"* {arm}: {_beside(found[arm], found[other], other)}" for arm, other in beside)]
    return "\n".join(said)


def _beside(ours: Course, theirs: Course, name: str) -> str:
    """Where the mean of `ours` is ahead of that of `theirs`, by how much at the end, and how far it was behind."""
    gaps = [own - other for own, other in zip(ours.mean, theirs.mean, strict=True)]
    step = crossing(ours, theirs)
    where = f"not ahead of the {name} at the end" if step is None else f"ahead of the {name} from update {step} on"
    said = f"{where} ({gaps[-1]:+.1f} at the last)"
    behind, at = min(zip(gaps, ours.steps, strict=True))
    return f"{said}; before that behind by up to {-behind:.1f}, at {at}" if behind < 0 and step is not None else said


def _lowest(course: Course) -> int:
    return min(zip(course.mean, course.steps, strict=True), default=(math.nan, 0))[1]


def _origin(records: Sequence[dict[str, Any]]) -> str:
    seeds = ", ".join(map(str, sorted({record["seed"] for record in records})))
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(record["command"] for record in records))
    torch = " and ".join(dict.fromkeys(f"torch {record['versions']['torch']}" for record in records))
    dates = " and ".join(sorted({record["finished"][:10] for record in records}))
    return f"Seeds {seeds}, each a thin line; {commands}; {records[0]['machine']['device']}; {torch}; {dates}."


def rewritten(page: str) -> str:
    """The text of a page with its parts made from the records."""
    return PART.sub(lambda part: f"{part[1]}{words(part[2])}\n{part[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("figure", choices=FIGURES)
    adding.add_argument("runs", type=Path)
    adding.add_argument("--command", required=True)
    commands.add_parser("pages")
    options = parser.parse_args()
    if options.what == "add":
        add(options.figure, options.runs, options.command)
    for figure in FIGURES:
        if read(figure):
            (PLOTS / f"{figure}.svg").write_text(draw(figure), encoding="utf-8")
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()

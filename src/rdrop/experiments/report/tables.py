"""The tables of the report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.contest import Contest
from rdrop.experiments.comparison.examples import ChangedExample, changed_examples, example_difference
from rdrop.experiments.comparison.finished_runs import FinishedRun, UnusableRun
from rdrop.experiments.comparison.learning import has_learned, how_diverged
from rdrop.experiments.comparison.notes import noted
from rdrop.experiments.comparison.sections import ArmScores, Section
from rdrop.experiments.comparison.statistics import difference_shown
from rdrop.experiments.comparison.wording import (
    CHURN_STYLE,
    NOT_KNOWN,
    NumberStyle,
    counted,
    p_value,
    ratio,
    wins_ties_losses,
)
from rdrop.experiments.report.html import Markup, element, joined
from rdrop.experiments.report.settings import settings_of_arms, shown
from rdrop.experiments.run_folder.predictions import excerpt

PLANNED_SEEDS = (10, 20, 40)
"""For which the page says what difference they would show, beside the number that there is."""
SHOWN_EXAMPLES = 10
"""Of those that changed, in each direction."""
_MIB = 2**20


def scores(comparison: Comparison) -> Markup:
    """Shows mean ± sd of every arm, and its paired difference from the baseline with what is to be known of it.

    With a subject: the difference of the subject from each other arm.
    """
    has_quarters = any(row.interquartile_mean is not None for section in comparison.sections for row in section.rows)
    headings = (
        *("", "mean ± sd"),
        *(["interquartile mean"] if has_quarters else []),
        *("difference", "95 % interval", "p", "wins / ties / losses", "probability of improvement"),
    )
    around = comparison.subject is not None
    what, whose = ("last arm minus this one", "the last") if around else ("arm minus baseline", "the")
    caption = (
        f"Scores over {counted(len(comparison.seeds), 'seed')}: mean ± standard deviation. Difference: {what}, paired "
        f"by seed. p: sign-flip test, corrected. Wins: seeds on which {whose} arm is better."
    )
    if any(arm.has_failed_runs for arm in comparison.arms):
        caption += " \N{DAGGER}: with runs that did not learn, or diverged."
    bodies = [_score_rows(section, len(headings), has_quarters) for section in comparison.sections]
    bodies += _churn_rows(comparison, len(headings))
    return _table("Result", headings, bodies, caption=caption, class_="results")


def _score_rows(section: Section, width: int, has_quarters: bool) -> Markup:
    title = f"{section.split.capitalize()} {section.style.heading(section.metric)}"
    rows = [_row(row.arm.marked_label, *_score_cells(row, section.style, has_quarters)) for row in section.rows]
    return joined((_group(title, width), *rows))


def _score_cells(row: ArmScores, style: NumberStyle, has_quarters: bool) -> list[str]:
    cells = [style.spread(row.mean, row.sd), *([style.score(row.interquartile_mean)] if has_quarters else [])]
    if row.difference is None:
        return [*cells, "", "", "", "", ""]
    return [
        *cells,
        style.difference(row.difference.mean),
        style.interval(row.difference.interval),
        p_value(row.p_value),
        wins_ties_losses(row.difference),
        NOT_KNOWN if row.improvement is None else f"{row.improvement:.2f}",
    ]


def _churn_rows(comparison: Comparison, width: int) -> list[Markup]:
    found = comparison.churn()
    rows = [_row(label, CHURN_STYLE.score(value), *[""] * (width - 2)) for label, value in found.items()]
    return [joined((_group("Test churn %", width), *rows))] if rows else []


def _group(title: str, width: int) -> Markup:
    return element("tr", element("th", title, scope="rowgroup", colspan=str(width)))


def seeds(comparison: Comparison) -> Markup | None:
    """Shows the difference that so many seeds would show, by the spread that was seen; None where none was."""
    spreads = [(own, own.difference.spread) for own in comparison.contests if own.difference.spread is not None]
    if not spreads:
        return None
    style = comparison.sections[0].style
    now = {len(contest.difference.seeds) for contest, _ in spreads}
    counts = sorted({*now, *PLANNED_SEEDS})
    rows = [
        _row(
            f"{contest.arm.label} against {contest.reference.phrase}",
            *(style.difference(_shown_by(contest, spread, count)).lstrip("+") for count in counts),
        )
        for contest, spread in spreads
    ]
    return _table(
        "Seeds",
        ("seeds", *map(str, counts)),
        [joined(rows)],
        caption=(
            f"The difference in test {style.heading(comparison.metric)} that so many seeds show with 80 % power: in 80 "
            "of 100 comparisons with a true difference of that size, if the differences spread as they did here. "
            f"{NOT_KNOWN}: so few can show none."
        ),
    )


def _shown_by(contest: Contest, spread: float, seeds: int) -> float | None:
    is_later = seeds > len(contest.difference.seeds)
    return difference_shown(spread, seeds, contest.tests_of_later if is_later else contest.tests)


def notes(comparison: Comparison) -> Markup | None:
    """Lists what a reader should know beside the scores, as the terminal does."""
    lines = noted(comparison)
    if not lines:
        return None
    listed = element("ul", *(element("li", line) for line in lines), class_="note")
    return joined((element("p", "Notes on the scores:", class_="note"), listed))


_WAITING = "data_wait_share"


def costs(comparison: Comparison) -> Markup:
    """Medians over the seeds, and their ratio to the baseline's."""
    measures: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("step_milliseconds", "time per update, ms", lambda value: f"{value:,.1f}"),
        ("train_seconds", "training, s", lambda value: f"{value:,.1f}"),
        (_WAITING, "of it waiting for data", lambda value: f"{value:.1%}"),
        ("peak_extra_bytes", "peak extra memory, MiB", lambda value: f"{value / _MIB:,.0f}"),
    )
    if all(arm.cost(_WAITING) is None for arm in comparison.arms):  # runs of versions that did not measure it
        measures = tuple(measure for measure in measures if measure[0] != _WAITING)
    rows = []
    for arm in comparison.arms:
        cells = []
        for key, _, spelled in measures:
            cost = arm.cost(key)
            against = "" if arm is comparison.baseline or key == _WAITING else ratio(comparison.cost_ratio(arm, key))
            measured = NOT_KNOWN if cost is None else spelled(cost)
            cells.append(joined((measured, element("span", f" {against}", class_="ratio"))))
        rows.append(_row(arm.label, *cells))
    together = comparison.side_by_side()
    return _table(
        "Cost",
        ("", *(heading for _, heading, _ in measures)),
        [joined(rows)],
        caption=(
            "Medians over the seeds, with the ratio to the baseline. Evaluation and checkpoints are not counted. "
            "Memory is what training took above what was in use before its first step."
            + (f" Up to {together} runs shared the machine, which makes each slower." if together > 1 else "")
        ),
    )


def settings(comparison: Comparison) -> Markup:
    """The recipe without its seed: first what tells the arms apart, then what they share."""
    of_arms = settings_of_arms(comparison)
    differing = {key: values for key, values in of_arms.items() if any(value != values[0] for value in values)}
    rows = [
        element(
            "tr",
            element("th", element("code", key), scope="row"),
            *(element("td", element("code", shown(value))) for value in values),
        )
        for key, values in differing.items()
    ]
    apart = _table(
        "Settings that differ",
        ("differs", *(arm.label for arm in comparison.arms)),
        [joined(rows)],
        caption=(
            "What tells the arms apart. The seed is each run's own; plain training (alpha 0) makes one pass "
            "and uses neither passes nor every."
        ),
        class_="settings",
    )
    shared = {key: shown(values[0]) for key, values in of_arms.items() if key not in differing}
    return joined((apart if differing else None, element("p", "Shared by all arms:", class_="note"), _facts(shared)))


def environment(comparison: Comparison) -> Markup:
    """Versions and machine; where the runs differ, every value with the number of runs that had it."""
    runs = [run for arm in comparison.arms for run in arm.runs]
    facts = {}
    for group in ("machine", "versions"):
        for key in dict.fromkeys(key for run in runs for key in run.result.get(group, {})):
            facts[key] = _counts(Counter(shown(run.result.get(group, {}).get(key)) for run in runs))
    facts["parameters of the model"] = _counts(Counter(_parameters(run) for run in runs))
    return _facts(facts)


def _facts(facts: Mapping[str, str]) -> Markup:
    """Names and values, in two columns."""
    pairs = (
        element("div", element("dt", element("code", name)), element("dd", element("code", value)))
        for name, value in facts.items()
    )
    return element("dl", *pairs, class_="facts")


def _counts(values: Counter[str]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({counted(count, 'run')})" for value, count in values.items())


def _parameters(run: FinishedRun) -> str:
    count = run.result["cost"].get("parameters")
    return f"{count:,}" if isinstance(count, int) else NOT_KNOWN


def runs(comparison: Comparison, root: Path, place: Path) -> Markup:
    """Lists every run of the comparison with its scores, its difference from the baseline's run and its folder.

    The folder is named as seen from `root`, and linked as seen from `place`, where the page is.
    """
    style = comparison.sections[0].style
    headings = [
        "seed", f"test {style.heading(comparison.metric)}", "difference", "by examples", "valid", "weights of update",
        "resumed", "digest", "folder",
    ]  # fmt: skip
    return _table(
        "Runs",
        headings,
        [_runs_of_arm(comparison, arm, style, root, place, len(headings)) for arm in comparison.arms],
        caption=(
            "by examples: the 95 % interval of that difference over test examples drawn anew (paired bootstrap); "
            "weights of update: whose weights were scored, those that were the best on valid; "
            "of several updates, the mean of their weights; "
            "resumed: how often the run was taken up again after a stop."
        ),
        class_="runs",
    )


def _runs_of_arm(comparison: Comparison, arm: Arm, style: NumberStyle, root: Path, place: Path, width: int) -> Markup:
    metric, baseline = comparison.metric, comparison.baseline
    test, valid = arm.scores(metric, "test"), arm.scores(metric, "valid")
    differences: dict[int, float] = {}
    by_examples: dict[int, tuple[float, float]] = {}
    if baseline is not None and arm is not baseline:
        pairs = comparison.difference(arm, baseline)
        differences = dict(zip(pairs.seeds, pairs.per_seed, strict=True))
        resampled = example_difference(comparison.kept, arm.runs, baseline.runs)
        by_examples = {} if resampled is None else dict(zip(resampled.seeds, resampled.of_seeds, strict=True))
    rows = [
        element(
            "tr",
            element("th", _marked_seed(run), scope="row"),
            element("td", style.score(test.get(run.seed))),
            element("td", "" if arm is baseline else style.difference(differences.get(run.seed))),
            element("td", "" if arm is baseline else style.interval(by_examples.get(run.seed))),
            element("td", style.score(valid.get(run.seed))),
            element("td", _scored_updates(run)),
            element("td", _plain(run.result.get("resumed"))),
            element("td", element("code", _plain(run.result.get("digest")))),
            element("td", element("a", element("code", _below(run.path, root)), href=_address(run.path, place))),
        )
        for run in arm.runs
    ]
    rows += [
        element(
            "tr",
            element("th", f"{run.seed} (diverged)", scope="row"),
            element("td", run.why, colspan=str(width - 2)),
            element("td", element("a", element("code", _below(run.path, root)), href=_address(run.path, place))),
        )
        for run in arm.lost
    ]
    return joined((_group(arm.label, width), *rows))


def _marked_seed(run: FinishedRun) -> str:
    if how_diverged(run) is not None:
        return f"{run.seed} (diverged)"
    return f"{run.seed} (did not learn)" if has_learned(run) is False else str(run.seed)


def changed(comparison: Comparison) -> Markup | None:
    """Shows on which test examples each R-Drop arm gains and loses most; None where no predictions are kept."""
    baseline = comparison.baseline
    tables = []
    for contest in comparison.contests:
        if contest.reference is baseline:
            gained, lost = changed_examples(comparison.kept, contest.arm.runs, contest.reference.runs, SHOWN_EXAMPLES)
            if gained or lost:
                kinds = {predictions.kind for predictions in comparison.kept.of_run.values()}
                tables.append(_changed_table(contest.arm.label, gained, lost, are_errors=kinds == {"numbers"}))
    return joined(tables) if tables else None


def _changed_table(label: str, gained: list[ChangedExample], lost: list[ChangedExample], *, are_errors: bool) -> Markup:
    score = "error" if are_errors else "score"
    headings = ("test example", "expected", "baseline says", f"{label} says", f"baseline's {score}", f"its {score}")
    groups = ((f"{label} gains most", gained), (f"{label} loses most", lost))
    bodies = [
        joined((_group(title, len(headings)), *(_changed_row(own, are_errors=are_errors) for own in examples)))
        for title, examples in groups
        if examples
    ]
    return _table(f"Changed examples, {label}", headings, bodies, class_="examples")


def _changed_row(own: ChangedExample, *, are_errors: bool) -> Markup:
    said = (own.expected, own.reference_says, own.arm_says)
    found = (own.reference_score, own.arm_score)
    scores = (f"{abs(score) if are_errors else score:.3g}" for score in found)
    return _row(own.example, *map(excerpt, said), *scores)


def _scored_updates(run: FinishedRun) -> str:
    averaged = run.result.get("averaged_steps")
    return (
        ", ".join(map(str, averaged))
        if isinstance(averaged, list) and averaged
        else _plain(run.result.get("best_step"))
    )


def unusable_runs(unusable: list[UnusableRun], root: Path) -> Markup | None:
    """The folders without a score that a comparison could use, and why; None without any."""
    if not unusable:
        return None
    rows = [
        element("tr", element("th", element("code", _below(run.path, root)), scope="row"), element("td", run.problem))
        for run in unusable
    ]
    return element(
        "section",
        element("h3", "Unfinished and damaged runs", id="unusable"),
        element("p", "No comparison above has a score of these folders."),
        _table("Unfinished and damaged runs", ("folder", "state"), [joined(rows)], class_="settings"),
        aria_labelledby="unusable",
    )


def _table(
    label: str, head: Iterable[str], bodies: Iterable[Markup], *, caption: str | None = None, class_: str | None = None
) -> Markup:
    headings = (element("th", text, scope="col") if text else element("td") for text in head)
    return element(
        "div",
        element(
            "table",
            None if caption is None else element("caption", element("span", caption)),
            element("thead", element("tr", *headings)),
            *(element("tbody", rows) for rows in bodies),
            class_=class_,
        ),
        class_="scroll",
        # A keyboard reaches what is scrolled out of sight only if the box can have the focus, and so needs a name.
        role="region",
        aria_label=label,
        tabindex="0",
    )


def _row(name: str, *cells: str) -> Markup:
    return element("tr", element("th", name, scope="row"), *(element("td", cell) for cell in cells))


def _plain(value: Any) -> str:
    return NOT_KNOWN if value is None else str(value)


def _below(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _address(folder: Path, place: Path) -> str:
    """The folder as a link of a page that lies in the folder `place`."""
    return quote(Path(os.path.relpath(folder, place)).as_posix()) + "/"

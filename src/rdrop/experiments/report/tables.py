"""The tables of the report."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rdrop.experiments.comparison.comparison import Arm, Comparison, MetricSection
from rdrop.experiments.comparison.finished_runs import FinishedRun, UnusableRun
from rdrop.experiments.comparison.paired import PairedDifference, mean, sd
from rdrop.experiments.comparison.wording import NOT_KNOWN, NumberStyle, counted, ratio, wins_ties_losses
from rdrop.experiments.report.html import Markup, element, joined
from rdrop.experiments.report.settings import settings_of_arms, shown

_MIB = 2**20


def results(comparison: Comparison) -> Markup:
    """Mean ± sd of every arm, and its paired difference from the baseline."""
    return _table(
        "Result",
        ("", "mean ± sd", "difference", "95 % interval", "wins / ties / losses"),
        [_result_rows(section) for section in comparison.results()],
        caption=(
            f"Scores over {counted(len(comparison.seeds), 'seed')}: mean ± standard deviation. "
            "Difference: arm minus baseline, paired by seed. Wins: seeds on which the arm is better."
        ),
        class_="results",
    )


def _result_rows(section: MetricSection) -> Markup:
    style = section.style
    title = f"{section.split.capitalize()} {style.heading(section.metric)}"
    rows = [_row(arm.label, *_result_cells(arm, difference, section, style)) for arm, difference in section.rows]
    return joined((element("tr", element("th", title, scope="rowgroup", colspan="5")), *rows))


def _result_cells(
    arm: Arm, difference: PairedDifference | None, section: MetricSection, style: NumberStyle
) -> list[str]:
    scores = tuple(arm.scores(section.metric, section.split).values())
    cells = [style.spread(mean(scores), sd(scores))]
    if difference is None:
        return [*cells, "", "", ""]
    return [
        *cells,
        style.difference(difference.mean),
        style.interval(difference.interval),
        wins_ties_losses(difference),
    ]


def notes(comparison: Comparison) -> Markup | None:
    """Lists what a reader should know beside the scores; where runs differ, every value with the number of its runs."""
    of_runs = [_notes_of(run) for arm in comparison.arms for run in arm.runs]
    facts = {
        key: _counts(Counter(shown(own[key]) if key in own else NOT_KNOWN for own in of_runs))
        for key in dict.fromkeys(key for own in of_runs for key in own)
    }
    return joined((element("p", "Notes on the scores:", class_="note"), _facts(facts, wide=True))) if facts else None


def _notes_of(run: FinishedRun) -> Mapping[str, Any]:
    """Empty where a version of before notes wrote the result."""
    found = run.result.get("notes")
    return found if isinstance(found, Mapping) else {}


def costs(comparison: Comparison) -> Markup:
    """Medians over the seeds, and their ratio to the baseline's."""
    measures: tuple[tuple[str, str, Callable[[float], str]], ...] = (
        ("step_milliseconds", "time per update, ms", lambda value: f"{value:,.1f}"),
        ("train_seconds", "training, s", lambda value: f"{value:,.1f}"),
        ("peak_extra_bytes", "peak extra memory, MiB", lambda value: f"{value / _MIB:,.0f}"),
    )
    rows = []
    for arm in comparison.arms:
        cells = []
        for key, _, spelled in measures:
            cost = arm.cost(key)
            against = "" if arm is comparison.baseline else ratio(comparison.cost_ratio(arm, key))
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


def _facts(facts: Mapping[str, str], *, wide: bool = False) -> Markup:
    """Names and values, in two columns unless they are `wide`."""
    pairs = (
        element("div", element("dt", element("code", name)), element("dd", element("code", value)))
        for name, value in facts.items()
    )
    return element("dl", *pairs, class_="facts wide" if wide else "facts")


def _counts(values: Counter[str]) -> str:
    if len(values) == 1:
        return next(iter(values))
    return ", ".join(f"{value} ({counted(count, 'run')})" for value, count in values.items())


def _parameters(run: FinishedRun) -> str:
    count = run.result["cost"].get("parameters")
    return f"{count:,}" if isinstance(count, int) else NOT_KNOWN


def runs(comparison: Comparison, root: Path, place: Path) -> Markup:
    """Every run of the comparison with its scores, its difference from the baseline's run and its folder.

    The folder is named as seen from `root`, and linked as seen from `place`, where the page is.
    """
    style = comparison.results()[0].style
    return _table(
        "Runs",
        (
            "seed", f"test {style.heading(comparison.metric)}", "difference", "valid", "weights of update",
            "resumed", "digest", "folder",
        ),
        [_runs_of_arm(comparison, arm, style, root, place) for arm in comparison.arms],
        caption=(
            "weights of update: whose weights were scored, those with the best valid score; "
            "of several updates, the mean of their weights; "
            "resumed: how often the run was taken up again after a stop."
        ),
        class_="runs",
    )  # fmt: skip


def _runs_of_arm(comparison: Comparison, arm: Arm, style: NumberStyle, root: Path, place: Path) -> Markup:
    metric, baseline = comparison.metric, comparison.baseline
    test, valid = arm.scores(metric, "test"), arm.scores(metric, "valid")
    differences = {}
    if baseline is not None and arm is not baseline:
        pairs = comparison.difference(arm, baseline)
        differences = dict(zip(pairs.seeds, pairs.per_seed, strict=True))
    rows = [
        element(
            "tr",
            element("th", str(run.seed), scope="row"),
            element("td", style.score(test.get(run.seed))),
            element("td", "" if arm is baseline else style.difference(differences.get(run.seed))),
            element("td", style.score(valid.get(run.seed))),
            element("td", _scored_updates(run)),
            element("td", _plain(run.result.get("resumed"))),
            element("td", element("code", _plain(run.result.get("digest")))),
            element("td", element("a", element("code", _below(run.path, root)), href=_address(run.path, place))),
        )
        for run in arm.runs
    ]
    return joined((element("tr", element("th", arm.label, scope="rowgroup", colspan="8")), *rows))


def _scored_updates(run: FinishedRun) -> str:
    averaged = run.result.get("averaged_steps")
    return (
        ", ".join(map(str, averaged))
        if isinstance(averaged, list) and averaged
        else _plain(run.result.get("best_step"))
    )


def unusable_runs(unusable: list[UnusableRun], root: Path) -> Markup | None:
    """The folders that took no part in any comparison, and why; None without any."""
    if not unusable:
        return None
    rows = [
        element("tr", element("th", element("code", _below(run.path, root)), scope="row"), element("td", run.problem))
        for run in unusable
    ]
    return element(
        "section",
        element("h3", "Unfinished and damaged runs", id="unusable"),
        element("p", "These folders took no part in any comparison above."),
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

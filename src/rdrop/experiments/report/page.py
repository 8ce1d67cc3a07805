"""Run folders in, one self-contained HTML page out: verdicts, result tables, figures, cost, settings and every run.

The page needs no server, no network, no script and no font of its own; it follows light and dark, a phone's width and
paper. The same folders give the same bytes at the same place. What is written in the files is escaped, whatever it
says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rdrop.experiments.comparison.comparison import Comparison, comparisons
from rdrop.experiments.comparison.designs import read_designs
from rdrop.experiments.comparison.finished_runs import FinishedRun, UnusableRun, split_usable
from rdrop.experiments.comparison.looks import read_looks, record_looks
from rdrop.experiments.comparison.wording import counted
from rdrop.experiments.report import figures as report_figures
from rdrop.experiments.report import tables as report_tables
from rdrop.experiments.report.html import Markup, element, joined
from rdrop.experiments.report.settings import distinguishing_settings, titled
from rdrop.experiments.run_folder import ResultsError, StorageError, find_runs, write_atomically

# The browser itself refuses whatever would be loaded or run.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_NOT_REMEMBERED = (
    "The folder of the runs cannot be written, so it does not remember that these verdicts were seen, and later ones "
    "on more seeds are not corrected for it."
)


def write_report(runs: Path, out: Path | None = None) -> Path:
    """Writes the page on all runs at or below the folder `runs`; returns its path, `runs/report.html` by default.

    The folder remembers that these verdicts were shown, in looks.jsonl. Where that cannot be written the page says so.
    Raises `ResultsError` if `runs` is not a folder or no run has ever been started in it.
    """
    records = find_runs(runs)
    if not records:
        raise ResultsError(f"{runs} holds no run. `rdrop compare digits --runs {runs}` makes some.")
    out = out or runs / "report.html"
    finished, unusable = split_usable(records)
    found = comparisons(records, read_looks(runs), read_designs(runs))
    try:
        record_looks(runs, (comparison.look() for comparison in found))
        is_remembered = True
    except StorageError:
        is_remembered = False
    write_atomically(out, _page(found, finished, unusable, runs, out.parent, is_remembered).encode())
    return out


def _page(
    found: list[Comparison],
    finished: list[FinishedRun],
    unusable: list[UnusableRun],
    root: Path,
    place: Path,
    is_remembered: bool,
) -> str:
    names = [f"c{number}" for number in range(1, len(found) + 1)]
    settings = distinguishing_settings(found)
    return document(
        f"R-Drop report: {', '.join(dict.fromkeys(c.name for c in found)) or 'no finished run'}",
        _header(found, settings, names, finished, unusable),
        *(section(c, setting, name, root, place) for c, setting, name in zip(found, settings, names, strict=True)),
        report_tables.unusable_runs(unusable, root),
        None if is_remembered else element("p", _NOT_REMEMBERED, class_="note"),
        glossary(),
        element("footer", _versions_line(finished)),
    )


def document(title: str, *children: Markup | None) -> str:
    """Returns a whole page that needs nothing but itself."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))),
    )
    # "95" must not stand at the end of one line and its "%" on the next.
    unbroken = element("body", *children).replace("95 %", "95\N{NO-BREAK SPACE}%")
    return f"<!DOCTYPE html>\n{element('html', head, Markup(unbroken), lang='en')}\n"


def _header(
    found: list[Comparison],
    settings: list[dict[str, object]],
    names: list[str],
    finished: list[FinishedRun],
    unusable: list[UnusableRun],
) -> Markup:
    counts = [counted(len(finished), "finished run"), counted(len(found), "comparison")]
    if unusable:
        counts.append(f"{counted(len(unusable), 'run')} unfinished or damaged")
    if finished:
        counts.append(f"last finished {_moment(max(run.result['finished'] for run in finished))}")
    contents = [
        element("li", element("a", titled(c.name, setting), href=f"#{name}"))
        for c, setting, name in zip(found, settings, names, strict=True)
    ]
    return element(
        "header",
        element("h1", "R-Drop against plain training"),
        element("p", " · ".join(counts), class_="sub"),
        element("nav", element("ul", *contents, class_="contents"), aria_label="Comparisons")
        if len(found) > 1
        else None,
    )


def section(comparison: Comparison, setting: dict[str, object], name: str, root: Path, place: Path) -> Markup:
    """`place` is the folder of the page, from which its links lead to the folders of the runs."""
    first, *others = comparison.verdict().split("\n")
    return element(
        "section",
        element("h2", titled(comparison.name, setting), id=f"{name}-title"),
        element("p", first, class_="verdict first"),
        report_figures.overview(comparison, name),
        *(element("p", sentence, class_="verdict") for sentence in others),
        *_remarks(comparison),
        _list(comparison.hints(), "hints"),
        _list(_warnings(comparison), "warnings"),
        element("h3", "Result"),
        report_tables.scores(comparison),
        report_tables.notes(comparison),
        _titled("How many seeds would show it", report_tables.seeds(comparison)),
        element("h3", "Figures"),
        report_figures.figures(comparison, name),
        _titled("Which test examples changed", report_tables.changed(comparison)),
        element("h3", "Cost"),
        report_tables.costs(comparison),
        element("h3", "Settings"),
        report_tables.settings(comparison),
        element("h3", "Versions and machine"),
        report_tables.environment(comparison),
        element("h3", "Runs"),
        report_tables.runs(comparison, root, place),
        class_="comparison",
        id=name,
        aria_labelledby=f"{name}-title",
    )


def _moment(finished: str) -> str:
    """`2026-11-22T20:00:04Z` as a reader writes it; anything else as it is."""
    return f"{finished[:-1].replace('T', ' ')} UTC" if finished.endswith("Z") else finished


def _titled(title: str, content: Markup | None) -> Markup | None:
    return None if content is None else joined((element("h3", title), content))


def _remarks(comparison: Comparison) -> list[Markup | None]:
    """Returns the remarks as a list; what is said of each of many contests can be unfolded."""
    shown = comparison.remarks(contests=2)
    folded = _list([remark for remark in comparison.remarks() if remark not in shown], "remarks")
    more = element("details", element("summary", "More on each of these differences"), folded) if folded else None
    return [_list(shown, "remarks"), more]


def _list(sentences: list[str], class_: str) -> Markup | None:
    return element("ul", *(element("li", s) for s in sentences), class_=class_) if sentences else None


def _warnings(comparison: Comparison) -> list[str]:
    sentences = [f"L{str(gap)[1:]}." for gap in comparison.gaps()]
    if comparison.repeats:
        folders = ", ".join(run.path.name for run in comparison.repeats)
        sentences.append(f"An arm and seed was run more than once; the latest run counts and these do not: {folders}.")
    runs = [run for arm in comparison.arms for run in arm.runs]
    for key, consequence in (
        ("machine", "times and memory are not comparable between them"),
        ("versions", "a difference may come from them"),
    ):
        if _differ([run.result.get(key, {}) for run in runs]):
            sentences.append(f"The runs were not all made with the same {key}: {consequence}.")
    rdrop_arms = sum(bool(arm.runs) and not arm.method.is_plain for arm in comparison.arms)
    if rdrop_arms > 1 and comparison.subject is None:  # a subject was chosen before
        sentences.append(
            f"{rdrop_arms} R-Drop arms stand against one baseline. p is corrected for that, but each interval is for "
            "itself alone, and the best of them looks better than it is. Choose one on valid, then confirm it with "
            "new seeds."
        )
    return sentences


def _differ(facts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether two runs name different values of one thing; an earlier version did not write all of them."""
    names = {name for of_run in facts for name in of_run}
    return any(len({str(of_run[name]) for of_run in facts if name in of_run}) > 1 for name in names)


def glossary() -> Markup:
    terms = {
        "Seed": "Decides initial weights, order of the data and dropout masks. Arms are compared seed by seed.",
        "Difference": "The arm's score minus the baseline's with the same seed, averaged over the seeds both have.",
        "95 % interval": (
            "The t interval of that average: in repetitions with new seeds, 95 of 100 such intervals hold the true "
            "mean difference. It covers the luck of the seed, not that of the choice of data."
        ),
        "p": (
            "The exact sign-flip test: if the arms did not differ, each seed's difference could as well have had the "
            "other sign. p is the share of all sign patterns with a mean difference at least as large. The p values "
            "behind the verdict are corrected for one another by Holm's method, and those of all other scores likewise."
        ),
        "Better, worse": (
            "Said where the 95 % interval excludes zero and the corrected p is at most 0.05, which takes six seeds or "
            "more. Of 100 comparisons without a difference, at most 5 are told apart at the first look."
        ),
        "80 % power": (
            "So many seeds find a difference of that size in 80 of 100 repetitions, by the same rule, if the "
            "differences between seeds spread as they did here. A spread from few seeds is itself uncertain."
        ),
        "Interquartile mean": "The mean without the lowest and the highest quarter of the seeds, from eight seeds on.",
        "Probability of improvement": (
            "How likely a run of the arm is better than a run of the baseline, each with any seed; 0.5 where neither "
            "is. Where the table says last arm minus this one, it is the last arm's over this one."
        ),
        "By examples": (
            "A paired bootstrap: test examples drawn anew, with replacement, the same for both arms. It says whether "
            "these models differ on this test set, and nothing of models from other seeds."
        ),
        "Loss, ECE, churn": (
            "The loss of a class is its negative log-likelihood (NLL). ECE is how far the confidence of predictions is "
            "from their accuracy. Churn is the share of test examples on which two seeds of an arm disagree."
        ),
        "Did not learn": (
            "A run neither whose test score nor whose test loss is better than that of the best constant prediction, "
            "or that translates as well from the source of another sentence. It stays in all statistics."
        ),
        "Test and valid": (
            "Valid chose the checkpoint, so its scores flatter every arm a little. "
            "Test scored the chosen checkpoint, or the mean of the last ones, once."
        ),
        "Task loss": "The loss of plain training, without the divergence: the same quantity for every arm.",
        "Divergence": (
            "How far the passes over one example disagree, per position, before it is weighted with alpha. With "
            "unlabeled examples: their mean and that of the labeled ones, added."
        ),
        "Twice the batch": (
            "Plain training that spends the compute of R-Drop's second pass on twice the examples. R-Drop at every "
            "second or fifth update costs less than that."
        ),
    }
    pairs = [joined((element("dt", term), element("dd", meaning))) for term, meaning in terms.items()]
    return element("section", element("h3", "How to read this page"), element("dl", *pairs, class_="terms"))


def _versions_line(finished: list[FinishedRun]) -> str:
    made_by = sorted({str(run.result.get("versions", {}).get("rdrop", "unknown")) for run in finished})
    return f"Trained with rdrop {', '.join(made_by)}." if made_by else "No run has finished."

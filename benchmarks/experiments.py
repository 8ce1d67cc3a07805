"""The records of our experiments, and the tables of README.md and docs/results.md from them.

    python benchmarks/experiments.py add RUNS --command "rdrop compare digits --seeds 8"
    python benchmarks/experiments.py pages

`add` puts the result of every finished run below RUNS into benchmarks/results/experiments.jsonl, one a line, with the
command that made it; a run of the same recipe that is there already is replaced. Which arms belong together, where the
runs alone do not say it, and their churn go into benchmarks/results/arms.jsonl, one comparison a line. `pages` writes
each part of a page between `<!-- results: NAME -->` and `<!-- /results: NAME -->` again, and what one arm is above
another between `<!-- contrast: NAME; ARM; OTHER ARM -->` and `<!-- /contrast -->`, and draws the plot of
benchmarks/gains.py; a test holds that they are what the records give. A verdict that a page has had is a look:
benchmarks/results/looks.jsonl remembers its runs, and the p of a later one on more seeds is corrected for it. A
comparison that no page has is not complete: its runs wait in the records for the seeds that were planned.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks import gains

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.comparison import Comparison, comparisons
from rdrop.experiments.comparison.designs import Design, read_designs
from rdrop.experiments.comparison.looks import read_looks, record_looks
from rdrop.experiments.comparison.wording import CHURN_STYLE, p_value, p_words, ratio, wins_ties_losses
from rdrop.experiments.run_folder import RunRecord, find_runs, saved

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
RECORDS = RESULTS / "experiments.jsonl"
ARMS = RESULTS / "arms.jsonl"
PAGES = (ROOT / "README.md", ROOT / "docs/results.md")
PART = re.compile(r"(<!-- results: ([\w.-]+) -->\n).*?(<!-- /results: \2 -->)", re.DOTALL)
CONTRAST = re.compile(r"(<!-- contrast: ([\w.-]+); ([^;]+?); ([^;]+?) -->).*?(<!-- /contrast -->)", re.DOTALL)


def read() -> list[dict[str, Any]]:
    records = (
        [json.loads(line) for line in RECORDS.read_text(encoding="utf-8").splitlines()] if RECORDS.exists() else []
    )
    return [record | {"recipe": saved.upgraded(record["recipe"])} for record in records]


def add(runs: Path, command: str) -> None:
    """The finished runs below `runs`, in place of those of the same recipe."""
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    places, known = {record["digest"]: _place(record["recipe"]) for record in read()}, {}
    for line in lines:  # as it was written, whatever the format of its recipe
        known[json.loads(line)["digest"]] = line
    for run in find_runs(runs):
        if run.result is not None:
            places[run.result["digest"]] = _place(run.result["recipe"])
            known[run.result["digest"]] = json.dumps(run.result | {"command": command})
    ordered = sorted(known, key=lambda digest: places[digest])
    RECORDS.write_text("".join(known[digest] + "\n" for digest in ordered), encoding="utf-8")
    add_arms(runs)


def read_arms() -> dict[str, dict[str, Any]]:
    """By the name of the recipe: the arms of a designed comparison, its subject, and the churn of each arm."""
    lines = ARMS.read_text(encoding="utf-8").splitlines() if ARMS.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def add_arms(runs: Path) -> None:
    """The designed comparisons below `runs`, in place of those of the same recipe."""
    found, records = read_arms(), find_runs(runs)
    for design in read_designs(runs):
        for comparison in comparisons(records, designs=[design]):
            if comparison.subject_label is not None:
                line = {"name": comparison.name, "arms": dict(design.arms), "subject": design.subject}
                was = found.get(comparison.name, {"arms": {}, "churn": {}})
                same = {arm: churn for arm, churn in was["churn"].items() if was["arms"][arm] == design.arms.get(arm)}
                found[comparison.name] = line | {"churn": same | comparison.churn()}
    ordered = sorted(found.values(), key=lambda line: line["name"])
    ARMS.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in ordered), encoding="utf-8")


def _place(recipe: dict[str, Any]) -> tuple[object, ...]:
    return recipe["name"], recipe["seed"], recipe["method"]["alpha"]


def recorded_comparisons() -> dict[str, Comparison]:
    """By the name of the recipe, of which the records have one comparison each."""
    runs = [RunRecord(Path(record["digest"]), record["recipe"], record, []) for record in read()]
    designs = [Design(line["arms"], line["subject"]) for line in read_arms().values()]
    return {comparison.name: comparison for comparison in comparisons(runs, read_looks(RESULTS), designs)}


def shown() -> set[str]:
    """Names of the comparisons that a page has."""
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    return {match[2] for text in texts for pattern in (PART, CONTRAST) for match in pattern.finditer(text)}


def complete_comparisons() -> dict[str, Comparison]:
    """Those that a page has, by name: the others wait for the rest of their seeds."""
    names = shown()
    return {name: comparison for name, comparison in recorded_comparisons().items() if name in names}


def rewritten(page: str, found: dict[str, Comparison]) -> str:
    """The text of a page with its parts made from the records."""
    page = PART.sub(lambda part: f"{part[1]}{result(found[part[2]])}\n{part[3]}", page)
    return CONTRAST.sub(lambda part: f"{part[1]}{contrast(found[part[2]], part[3], part[4])}{part[5]}", page)


def result(comparison: Comparison) -> str:
    """The table, what it shows in words, and where it is from."""
    if comparison.subject is not None:  # its table says it all
        said = " ".join(comparison.corrections())
        return f"{table_around(comparison, comparison.subject)}\n\n{said}\n\n{origin(comparison)}"
    others = comparison.other_tests
    corrected = [f"The other p values of the table are corrected for {others}."] if others > 1 else []
    said = " ".join([*comparison.verdict().split("\n"), *comparison.remarks(), *corrected])
    return f"{table(comparison)}\n\n{said}\n\n{origin(comparison)}"


def contrast(comparison: Comparison, arm: str, other: str) -> str:
    """What the compared test score of `arm` is above that of `other`, where no table sets the two beside each other."""
    arms = {found.label: found for found in comparison.arms}
    difference, style = comparison.difference(arms[arm], arms[other]), comparison.sections[0].style
    wins = difference.wins_ties_losses[0]
    return (
        f"{style.difference(difference.mean)} ({style.interval(difference.interval)}, {wins} of "
        f"{len(difference.seeds)} seeds, {p_words(difference.p_value)})"
    )


def table_around(comparison: Comparison, subject: Arm) -> str:
    """A row an arm, with every metric on test, and what the subject's score is above or below it."""
    sections = [section for section in comparison.sections if section.split == "test"]
    against = {contest.reference.label: contest for contest in comparison.contests}
    churn = read_arms().get(comparison.name, {}).get("churn", {})
    metric = sections[0].style.heading(comparison.metric)
    columns = [*(section.style.heading(section.metric) for section in sections), *(["churn %"] if churn else [])]
    columns += [f"the last arm's {metric} minus this (95 %)", "p", "time"]
    rows = [f"| test | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for place, arm in enumerate(comparison.arms):
        cells = [section.style.spread(section.rows[place].mean, section.rows[place].sd) for section in sections]
        cells += [CHURN_STYLE.score(churn.get(arm.label))] if churn else []
        if arm is subject:
            cells += ["", ""]
        else:
            contest, style = against[arm.label], sections[0].style
            interval = style.interval(contest.difference.interval)
            cells += [f"{style.difference(contest.difference.mean)} ({interval})", p_value(contest.p_value)]
        cells.append(ratio(comparison.cost_ratio(arm, "train_seconds")))
        name = f"**{arm.marked_label}**" if arm is subject else arm.marked_label
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def table(comparison: Comparison) -> str:
    """Every metric on test, a row an arm; the main one first."""
    rows = ["| test | | difference | 95 % interval | p | wins/ties/losses | time |", "|---|---|---|---|---|---|---|"]
    for section in comparison.sections:
        if section.split != "test":
            continue
        style = section.style
        for row in section.rows:
            cells = [f"{style.heading(section.metric)}, {row.arm.marked_label}", style.spread(row.mean, row.sd)]
            if row.difference is None:
                cells += ["", "", "", ""]
            else:
                cells += [style.difference(row.difference.mean), style.interval(row.difference.interval)]
                cells += [p_value(row.p_value), wins_ties_losses(row.difference)]
            is_main = section.metric == comparison.metric
            cells.append(ratio(comparison.cost_ratio(row.arm, "step_milliseconds")) if is_main else "")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def origin(comparison: Comparison) -> str:
    results = [run.result for arm in comparison.arms for run in arm.runs]
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(found["command"] for found in results))
    machines = " and ".join(dict.fromkeys(_machine(found["machine"]) for found in results))
    versions = " and ".join(dict.fromkeys(f"torch {found['versions']['torch']}" for found in results))
    dates = sorted({found["finished"][:10] for found in results})
    seeds = ", ".join(map(str, comparison.seeds))
    time = "time per update" if comparison.subject is None else "time of the whole training"
    return (
        f"Seeds {seeds}; mean ± standard deviation, {time} against the baseline's. {commands}; {machines}; "
        f"{versions}; {' and '.join(dates)}."
    )


def _machine(machine: dict[str, Any]) -> str:
    return f"{machine['device']}, {machine['threads']} thread{'' if machine['threads'] == 1 else 's'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("runs", type=Path)
    adding.add_argument("--command", required=True)
    commands.add_parser("pages")
    options = parser.parse_args()
    if options.what == "add":
        add(options.runs, options.command)
    found = recorded_comparisons()
    record_looks(RESULTS, (found[name].look() for name in sorted(shown())))
    for page in PAGES:
        page.write_text(rewritten(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    gains.PLOT.write_text(gains.draw(complete_comparisons()), encoding="utf-8")


if __name__ == "__main__":
    main()

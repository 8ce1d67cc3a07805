"""A search for settings as its reader sees it: what was tried, what was chosen, and what fresh seeds say of the choice.

The best of a search looks better than it is, because its seeds chose it. So the search has seeds of its own, ranks on
the valid split, and the comparison of what it chose is made on other seeds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from rdrop.experiments import metrics
from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.paired import PairedDifference, mean, paired_difference, sd
from rdrop.experiments.comparison.wording import NumberStyle, counted, words


@dataclass(frozen=True)
class Tried:
    """A setting of the grid, and its scores on the valid split by seed."""

    values: Mapping[str, Any]
    """Of the keys of the grid that it has: plain training has none of the method's."""
    is_plain: bool
    scores: Mapping[int, float]
    problem: str | None = None
    """Why one of its runs has no score; it is not chosen then."""
    not_begun: tuple[int, ...] = ()
    """The seeds whose run had not begun to learn at its end, by its predictions for valid."""

    @property
    def mean(self) -> float | None:
        return mean(tuple(self.scores.values()))

    @property
    def name(self) -> str:
        """Returns what a reader calls it: "R-Drop, alpha 1, model.dropout 0.3"."""
        method = "plain training" if self.is_plain else "R-Drop"
        return ", ".join((method, *(f"{key} {spelled(value)}" for key, value in self.values.items())))


@dataclass(frozen=True)
class Tuning:
    """A search, and the comparison on fresh seeds of what it chose."""

    name: str
    metric: str
    keys: tuple[str, ...]
    """Of the grid: those of the method first."""
    method_keys: tuple[str, ...]
    seeds: tuple[int, ...]
    """Of the search."""
    tried: tuple[Tried, ...]
    best_rdrop: Tried
    best_plain: Tried
    fresh: Comparison
    search: str
    """The same for the same settings on as many seeds of the search."""

    @property
    def style(self) -> NumberStyle:
        """Returns how scores and differences on the valid split are printed."""
        return NumberStyle.of(self.metric, [self.difference_in_search()])

    def ranked(self) -> list[Tried]:
        """Returns what was tried, the best first; those that were dropped early or failed come last."""
        sign = -1 if metrics.find(self.metric).higher_is_better else 1
        return sorted(self.tried, key=lambda t: (t.problem is not None, -len(t.scores), sign * (t.mean or 0.0)))

    def difference_in_search(self) -> PairedDifference:
        """The best R-Drop minus the best plain training, on valid, over the seeds that chose both."""
        return paired_difference(
            self.best_rdrop.scores, self.best_plain.scores, metrics.find(self.metric).higher_is_better
        )

    def difference_on_fresh_seeds(self) -> PairedDifference:
        """The same two, on valid, over the seeds that chose nothing."""
        baseline, rdrop = self.fresh.arms[:2]
        return self.fresh.difference(rdrop, baseline, split="valid")

    def sentences(self) -> list[str]:
        """Returns what the search says, and the verdict of the fresh seeds on test."""
        return [*self.sentences_of_search(), *self.fresh.verdict().split("\n")]

    def sentences_of_search(self) -> list[str]:
        """Returns what was tried, what was chosen, and what was left of the gain on fresh seeds."""
        plain = sum(tried.is_plain for tried in self.tried)
        halved = any(len(tried.scores) < len(self.seeds) and tried.problem is None for tried in self.tried)
        failed = [tried for tried in self.tried if tried.problem is not None]
        said = [
            f"{counted(len(self.tried), 'setting')} tried: {len(self.tried) - plain} of R-Drop, {plain} of plain "
            f"training, ranked by valid {words(self.metric)} on {counted(len(self.seeds), 'seed')} from "
            f"{self.seeds[0]}{'; the worse half was dropped early, with the seeds it had' if halved else ''}."
        ]
        said += [f"Not ranked: {tried.name}: {tried.problem}" for tried in failed]
        said.append(f"Chosen: {self._with_ties(self.best_rdrop)}; {self._with_ties(self.best_plain)}.")
        for best in (self.best_rdrop, self.best_plain):
            if best.not_begun:
                seeds = f"{len(best.not_begun)} of {counted(len(best.scores), 'seed')}"
                said.append(
                    f"{best.name} had not begun to learn on {seeds} of the search: train longer, or search again."
                )
        if any(tried.not_begun for tried in self.tried):
            said.append("\N{DAGGER}: a run of the setting had not begun to learn at its end.")
        return [*said, self._what_was_left()]

    def _with_ties(self, best: Tried) -> str:
        rivals = (tried for tried in self.tried if tried is not best and tried.is_plain == best.is_plain)
        equal = sum(
            tried.problem is None and tried.scores.keys() == best.scores.keys() and tried.mean == best.mean
            for tried in rivals
        )
        return f"{best.name} (the first of {equal + 1} with this score)" if equal else best.name

    def _what_was_left(self) -> str:
        in_search, on_fresh, style = self.difference_in_search(), self.difference_on_fresh_seeds(), self.style
        seeds = counted(len(on_fresh.seeds), "fresh seed")
        if in_search.mean is None or on_fresh.mean is None:
            return "How much of the search's gain was left cannot be said: a score is missing."
        sign = 1 if metrics.find(self.metric).higher_is_better else -1  # a gain is above 0 in every metric
        found, left = sign * in_search.mean, sign * on_fresh.mean
        shown = f"{style.difference(found)}{style.points} in the search, {style.difference(left)} on {seeds}"
        line = f"R-Drop's gain in valid {words(self.metric)}: {shown}"
        if found <= 0:
            return f"{line}; the search had found no gain."
        interval = on_fresh.interval
        if interval is None or interval[0] <= 0 <= interval[1]:
            why = "there is no spread to tell" if interval is None else "the 95 % interval on fresh seeds holds 0"
            return f"{line}; how much of it was left cannot be said: {why}."
        share = left / found
        if share > 1:
            return f"{line}: all of it was left."
        return f"{line}: {100 * share:.0f} % of it was left." if share > 0 else f"{line}: none of it was left."

    def record(self) -> dict[str, Any]:
        """Returns the search as one JSON object."""
        results = [run.result for arm in self.fresh.arms for run in arm.runs]
        return {
            "name": self.name,
            "search": self.search,
            "metric": self.metric,
            "seeds": list(self.seeds),
            "tried": [
                {"values": dict(t.values), "plain": t.is_plain, "valid": dict(t.scores), "problem": t.problem}
                for t in self.tried
            ],
            "chosen": {"rdrop": dict(self.best_rdrop.values), "plain": dict(self.best_plain.values)},
            "fresh": [
                {
                    "arm": arm.label,
                    "valid": arm.scores(self.metric, "valid"),
                    "test": arm.scores(self.metric, "test"),
                    "train_seconds": arm.cost("train_seconds"),
                }
                for arm in self.fresh.arms
            ],
            "finished": max(result["finished"] for result in results),
            "versions": results[0]["versions"],
            "machine": results[0]["machine"],
            "says": self.sentences(),
        }


def headings(tuning: Tuning) -> tuple[str, ...]:
    """Returns the headings of a table of what was tried: a column for each key of the grid, then valid and seeds."""
    return ("", *tuning.keys, f"valid {NumberStyle.of(tuning.metric, []).heading(tuning.metric)}", "seeds")


def cells(tuning: Tuning, tried: Tried) -> tuple[str, ...]:
    """Returns the row of a setting below `headings`."""
    scores = tuple(tried.scores.values())
    score = NumberStyle.of(tuning.metric, []).spread(mean(scores), sd(scores)) if tried.problem is None else "failed"
    values = (spelled(tried.values[key]) if key in tried.values else "" for key in tuning.keys)
    mark = " \N{DAGGER}" if tried.not_begun else ""
    return (f"{'plain training' if tried.is_plain else 'R-Drop'}{mark}", *values, score, str(len(scores)))


def terminal_table(tuning: Tuning) -> Table:
    """Returns a table of what was tried, the best first; what was chosen is bold."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in headings(tuning):
        table.add_column(heading, justify="left" if not heading else "right", overflow="fold")
    for tried in tuning.ranked():
        chosen = tried in (tuning.best_rdrop, tuning.best_plain)
        table.add_row(*map(Text, cells(tuning, tried)), style="bold" if chosen else None)
    return table


def spelled(value: object) -> str:
    """Returns a value of a setting as a reader writes it: 0.3, [0.1, 0.3], text."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else json.dumps(value)

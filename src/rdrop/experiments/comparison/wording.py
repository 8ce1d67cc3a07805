"""Scores, differences and verdicts as a reader meets them, in the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from rdrop.experiments import metrics
from rdrop.experiments.comparison.paired import Outcome, PairedDifference

NOT_KNOWN = "—"
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class NumberStyle:
    """The style in which the numbers of one metric are printed: percent or raw, and the decimals."""

    percent: bool
    decimals: int

    @classmethod
    def of(cls, metric: str, differences: Iterable[PairedDifference]) -> NumberStyle:
        """Returns a style whose decimals the narrowest interval supports: one or two digits of its half width."""
        row = metrics.find(metric)
        half_widths = [d.half_width * (100 if row.percent else 1) for d in differences if d.half_width]
        if not half_widths:
            return cls(row.percent, row.decimals)
        # The Particle Data Group's rule: two digits of an uncertainty up to 3.54, one of a larger one.
        needed = math.ceil(math.log10(3.55 / min(half_widths)))
        return cls(row.percent, min(max(needed, 1), 6))

    @property
    def factor(self) -> float:
        """Returns what a value in the files is multiplied by before it is shown."""
        return 100.0 if self.percent else 1.0

    @property
    def points(self) -> str:
        """The unit of a difference, with the space before it; empty for a raw metric."""
        return " points" if self.percent else ""

    def heading(self, metric: str) -> str:
        return f"{words(metric)} %" if self.percent else words(metric)

    def score(self, value: float | None) -> str:
        return NOT_KNOWN if value is None else _minus(f"{self.factor * value:.{self.decimals}f}")

    def spread(self, mean: float | None, sd: float | None) -> str:
        """The mean, with the standard deviation where there is one."""
        return self.score(mean) if sd is None else f"{self.score(mean)} ± {self.score(sd)}"

    def difference(self, value: float | None) -> str:
        if value is None:
            return NOT_KNOWN
        text = f"{self.factor * value:+.{self.decimals}f}"
        return _minus(text) if float(text) else text.lstrip("+-")

    def interval(self, bounds: tuple[float, float] | None) -> str:
        return NOT_KNOWN if bounds is None else f"{self.difference(bounds[0])} to {self.difference(bounds[1])}"


def words(metric: str) -> str:
    """Returns what a reader calls the metric: `rougeL` is "ROUGE-L"."""
    return metrics.find(metric).label


def counted(count: int, noun: str) -> str:
    """ "1 seed", "5 seeds"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def ratio(value: float | None) -> str:
    """A cost against the baseline's, as "×1.93"."""
    return NOT_KNOWN if value is None else f"{TIMES}{value:.2f}"


def wins_ties_losses(difference: PairedDifference) -> str:
    counts = difference.wins_ties_losses
    return NOT_KNOWN if counts is None or not difference.seeds else "/".join(map(str, counts))


def verdict(difference: PairedDifference, metric: str, style: NumberStyle, arm: str, reference: str) -> str:
    """One sentence on what the paired seeds show, and no more than they show."""
    n = len(difference.seeds)
    amount = f"{words(metric)} {style.difference(difference.mean)}{style.points}"
    match difference.outcome:
        case Outcome.NO_SEEDS:
            sentence = f"Nothing to compare: {arm} and {reference} have no scored seed in common."
        case Outcome.EQUAL:
            sentence = f"No difference between {arm} and {reference}: {words(metric)} is equal on all {n} seeds."
        case Outcome.UNDECIDED if n == 1:
            sentence = (
                f"One seed shows nothing: {arm} against {reference} is {amount} on seed {difference.seeds[0]}, "
                "and an interval needs at least two seeds."
            )
        case Outcome.UNDECIDED:
            sentence = (
                f"Nothing shown: {arm} against {reference} is {amount} on each of {n} seeds, "
                "and equal differences have no spread to build an interval from."
            )
        case Outcome.NOT_SHOWN:
            sentence = f"No difference shown between {arm} and {reference}: {amount} {_evidence(difference, style)}."
        case Outcome.BETTER | Outcome.WORSE as outcome:
            sentence = f"{arm} is {outcome.value} than {reference}: {amount} {_evidence(difference, style)}."
    return sentence[0].upper() + sentence[1:]


def _evidence(difference: PairedDifference, style: NumberStyle) -> str:
    counts = difference.wins_ties_losses
    wins = 0 if counts is None else counts[0]
    return f"(95 % interval {style.interval(difference.interval)}, better on {wins} of {len(difference.seeds)} seeds)"


def _minus(text: str) -> str:
    return text.replace("-", MINUS)

"""Numbers as a reader meets them, in the terminal and on the page: scores, differences, counts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rdrop.experiments import metrics
from rdrop.experiments.comparison.paired import PairedDifference

NOT_KNOWN = "—"
LONG_NUMBER = 1e7
"""From here on a number is printed with an exponent."""
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
        if not half_widths or not math.isfinite(min(half_widths)):
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
        return NOT_KNOWN if value is None else _minus(f"{self.factor * value:{self._format(value)}}")

    def spread(self, mean: float | None, sd: float | None) -> str:
        """The mean, with the standard deviation where there is one."""
        return self.score(mean) if sd is None else f"{self.score(mean)} ± {self.score(sd)}"

    def difference(self, value: float | None) -> str:
        if value is None:
            return NOT_KNOWN
        text = f"{self.factor * value:+{self._format(value)}}"
        return _minus(text) if float(text) else text.lstrip("+-")

    def _format(self, value: float) -> str:
        return f".{self.decimals}f" if abs(self.factor * value) < LONG_NUMBER else ".3g"

    def interval(self, bounds: tuple[float, float] | None) -> str:
        return NOT_KNOWN if bounds is None else f"{self.difference(bounds[0])} to {self.difference(bounds[1])}"


CHURN_STYLE = NumberStyle(percent=True, decimals=1)


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
    return "/".join(map(str, difference.wins_ties_losses)) if difference.seeds else NOT_KNOWN


def p_value(value: float | None) -> str:
    """Returns a p value with two digits: "0.031"."""
    if value is None:
        return NOT_KNOWN
    return "< 0.0001" if value < 0.0001 else f"{value:.2g}"


def p_words(value: float | None) -> str:
    """Returns a p value in a sentence: "p = 0.031"."""
    text = p_value(value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def listed(numbers: Sequence[int]) -> str:
    """Returns "6", "6 and 8", "6, 8 and 10"."""
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _minus(text: str) -> str:
    return text.replace("-", MINUS)

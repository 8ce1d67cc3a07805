"""The sections of a result table: one metric of one split, with every arm."""

from __future__ import annotations

from typing import NamedTuple

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.paired import PairedDifference, mean, sd
from rdrop.experiments.comparison.statistics import interquartile_mean
from rdrop.experiments.comparison.wording import NumberStyle

SEEDS_WITH_QUARTERS = 8
"""From so many seeds on, a mean without the lowest and the highest quarter is shown."""


class ArmScores(NamedTuple):
    """An arm in one metric of one split, and its difference from the baseline (None: there is nothing to pair).

    In a comparison with a subject: the difference of the subject from this arm.
    """

    arm: Arm
    scores: tuple[float, ...]
    difference: PairedDifference | None
    p_value: float | None
    """Of the difference, after all corrections; None also where nothing is tested."""
    improvement: float | None
    """The probability of improvement that goes with the difference."""

    @property
    def mean(self) -> float | None:
        return mean(self.scores)

    @property
    def sd(self) -> float | None:
        return sd(self.scores)

    @property
    def interquartile_mean(self) -> float | None:
        """None with fewer than eight seeds, of which a quarter is too little to leave out."""
        return interquartile_mean(self.scores) if len(self.scores) >= SEEDS_WITH_QUARTERS else None


class Section(NamedTuple):
    """One metric of one split: every arm, in the order of the comparison."""

    split: str
    metric: str
    rows: tuple[ArmScores, ...]

    @property
    def differences(self) -> tuple[PairedDifference, ...]:
        return tuple(row.difference for row in self.rows if row.difference is not None)

    @property
    def style(self) -> NumberStyle:
        return NumberStyle.of(self.metric, self.differences)

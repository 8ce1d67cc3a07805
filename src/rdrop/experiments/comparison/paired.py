"""Two ways of training over the same seeds: the statistics of their paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from rdrop.experiments.comparison.statistics import sign_flip_p

CONFIDENCE = 0.95
# Scores are float64 averages: differences closer than this, relative to the scores, are the same number.
ROUNDING = 1e-12


@dataclass(frozen=True)
class PairedDifference:
    """Scores of an arm and of its reference on the seeds that both have, in the order of `seeds`.

    Every difference is arm minus reference.
    """

    seeds: tuple[int, ...]
    arm: tuple[float, ...]
    reference: tuple[float, ...]
    higher_is_better: bool

    def of(self, seeds: Set[int]) -> PairedDifference:
        """Returns the difference on those of the seeds alone."""
        own, others = (dict(zip(self.seeds, scores, strict=True)) for scores in (self.arm, self.reference))
        return paired_difference({seed: own[seed] for seed in seeds & own.keys()}, others, self.higher_is_better)

    @property
    def per_seed(self) -> tuple[float, ...]:
        return tuple(self._round(a - r, a, r) for a, r in zip(self.arm, self.reference, strict=True))

    @property
    def mean(self) -> float | None:
        """The mean difference; None without a common seed."""
        return mean(self.per_seed)

    @property
    def spread(self) -> float | None:
        """The standard deviation of the differences; None with fewer than two seeds, and where all are the same."""
        return None if len(self.seeds) < 2 or self._all_the_same() else sd(self.per_seed)

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95 % t interval of the mean difference: t(0.975, n - 1) * sd / sqrt(n).

        None where `spread` is: an interval of width zero would claim a certainty that n equal numbers do not give.
        """
        if self.spread is None:
            return None
        n = len(self.seeds)
        return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * self.spread / math.sqrt(n)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % t interval of the mean difference; None where `half_width` is."""
        if self.mean is None or self.half_width is None:
            return None
        return self.mean - self.half_width, self.mean + self.half_width

    @property
    def p_value(self) -> float | None:
        """The p value of the exact sign-flip test, not corrected for other tests; None with fewer than two seeds."""
        return sign_flip_p(self.per_seed) if len(self.seeds) > 1 else None

    @property
    def wins_ties_losses(self) -> tuple[int, int, int]:
        """Counts the seeds on which the arm is better than, equal to and worse than its reference."""
        gains = self._gains()
        return sum(g > 0 for g in gains), sum(g == 0 for g in gains), sum(g < 0 for g in gains)

    def _gains(self) -> tuple[float, ...]:
        return self.per_seed if self.higher_is_better else tuple(-d for d in self.per_seed)

    def _all_the_same(self) -> bool:
        size = max(map(abs, (*self.arm, *self.reference)))
        return bool(np.ptp(self.per_seed) <= 4 * ROUNDING * size)

    @staticmethod
    def _round(difference: float, *operands: float) -> float:
        return 0.0 if abs(difference) <= ROUNDING * max(map(abs, operands)) else difference


def paired_difference(
    arm: Mapping[int, float], reference: Mapping[int, float], higher_is_better: bool
) -> PairedDifference:
    """Pair two mappings from seed to score over the seeds that both have."""
    seeds = tuple(sorted(arm.keys() & reference.keys()))
    return PairedDifference(
        seeds, tuple(arm[seed] for seed in seeds), tuple(reference[seed] for seed in seeds), higher_is_better
    )


def mean(values: tuple[float, ...]) -> float | None:
    """The arithmetic mean; None of nothing."""
    return float(np.mean(values)) if values else None


def sd(values: tuple[float, ...]) -> float | None:
    """The sample standard deviation (n - 1 in the denominator); None with fewer than two values."""
    with np.errstate(over="ignore"):  # perplexities of 1e200
        return float(np.std(values, ddof=1)) if len(values) > 1 else None

"""Statistics that hold with few seeds: the sign-flip test, corrections for many tests, power, robust averages.

The rule by which an arm is called better, and whose power is computed here, stands in `is_shown`. The terms are those
of the sign-flip protocol for few runs (arXiv 2511.19794), of rliable (probability of improvement, interquartile mean)
and of deep-significance (power analysis).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import nctdtr, stdtrit

LEVEL = 0.05
"""How often, at most, two arms without a difference are told apart."""
POWER = 0.8
"""How often a difference is to be shown by as many seeds as `seeds_needed` says."""
MOST_SEEDS = 1000

_MOST_EXACT = 40
_RANDOM_FLIPS = 100_000
# A sum of differences that equals the observed one up to rounding is as extreme as it.
_ROUNDING = 1e-10
# Power is simulated up to this number of seeds. From there on the sign-flip test agrees with the t test to one point.
_MOST_SIMULATED = 14
_DRAWS, _DRAWS_AT_ONCE = 4000, 500

Array = NDArray[np.float64]


def sign_flip_p(differences: Sequence[float]) -> float:
    """Returns the two-sided p value of the sign-flip (permutation) test that the differences scatter around zero.

    If the arms do not differ, each difference could as well have had the other sign. p is the share of all sign
    patterns whose sum is at least as far from zero as the sum that was observed. n differences cannot give less than
    2 / 2**n. The value is exact up to 40 differences that are not zero; for more it is an estimate from 100,000 random
    patterns, always the same ones.
    """
    values = np.array([value for value in differences if value != 0], dtype=np.float64)
    if not len(values):
        return 1.0
    least = abs(values.sum()) - _ROUNDING * np.abs(values).sum()
    if least <= 0:
        return 1.0
    if len(values) > _MOST_EXACT:
        signs = np.random.default_rng(0).choice((-1.0, 1.0), size=(_RANDOM_FLIPS, len(values)))
        return float((1 + np.count_nonzero(np.abs(signs @ values) >= least)) / (1 + _RANDOM_FLIPS))
    # Each pattern is one of the first half with one of the second, so the sums of the halves are enough.
    first, second = _signed_sums(values[::2]), np.sort(_signed_sums(values[1::2]))
    above = len(second) - np.searchsorted(second, least - first)
    return float(2 * above.sum() / 2 ** len(values))


def _signed_sums(values: Array) -> Array:
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate((sums - value, sums + value))
    return sums


def holm(p_values: Sequence[float]) -> list[float]:
    """Returns the p values of several tests after Holm's correction, in the order given.

    With them, the chance that any of the tests finds a difference where there is none stays below the level.
    """
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def is_shown(interval: tuple[float, float] | None, p_value: float | None) -> bool:
    """Whether a difference is shown: the 95 % t interval excludes zero and the corrected sign-flip p is at most 0.05.

    The interval alone trusts few differences to be normal; p alone says nothing of the size.
    """
    if interval is None or p_value is None:
        return False
    return p_value <= LEVEL and (interval[0] > 0 or interval[1] < 0)


def least_seeds(tests: int = 1) -> int:
    """Returns the least number of seeds that can show a difference, if p is multiplied with the number of `tests`."""
    return math.ceil(math.log2(2 * tests / LEVEL))


def power(effect: float, seeds: int, tests: int = 1) -> float:
    """Returns the probability that so many seeds show a difference, in its own direction.

    `effect` is the true mean difference, at least 0, over the standard deviation of the differences, which are taken
    to be normal. p is multiplied with `tests`, as Holm's correction does it to the smallest of them. Up to 14 seeds
    the rule is simulated, always with the same draws; beyond, it is the power of the t test at the level over `tests`.
    """
    if seeds < least_seeds(tests):
        return 0.0
    if seeds > _MOST_SIMULATED:
        return _power_of_t_test(effect, seeds, LEVEL / tests)
    differences = effect + _normal_draws(seeds)
    means = differences.mean(axis=1)
    half_widths = _t_quantile(seeds, LEVEL) * differences.std(axis=1, ddof=1) / math.sqrt(seeds)
    likely = differences[means > half_widths]
    shown = 0
    for start in range(0, len(likely), _DRAWS_AT_ONCE):
        part = likely[start : start + _DRAWS_AT_ONCE]
        as_extreme = np.abs(part @ _sign_patterns(seeds).T) >= (1 - _ROUNDING) * np.abs(part.sum(axis=1))[:, None]
        shown += int(np.count_nonzero(as_extreme.mean(axis=1) <= LEVEL / tests))
    return shown / len(differences)


def seeds_needed(difference: float, spread: float, tests: int = 1) -> int | None:
    """Returns how many seeds would show a difference with 80 % power; None for more than 1,000, and without a spread.

    `spread` is the standard deviation of the differences between the arms over the seeds; `tests` as in `power`.
    """
    if difference == 0 or spread == 0:
        return None
    effect = abs(difference) / spread
    # The t test alone has at least the power of the whole rule, so no smaller number needs to be tried.
    enough = (n for n in range(2, MOST_SEEDS + 1) if _power_of_t_test(effect, n, LEVEL / tests) >= POWER)
    first = next(enough, None)
    if first is None:
        return None
    candidates = range(max(first, least_seeds(tests)), MOST_SEEDS + 1)
    return next((n for n in candidates if power(effect, n, tests) >= POWER), None)


def difference_shown(spread: float, seeds: int, tests: int = 1) -> float | None:
    """Returns the smallest true difference that so many seeds show with 80 % power; None where they can show none."""
    effect = _effect_shown(seeds, tests)
    return None if effect is None else effect * spread


@lru_cache(maxsize=1024)
def _effect_shown(seeds: int, tests: int) -> float | None:
    if seeds < least_seeds(tests):
        return None
    low, high = 0.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (low, middle) if power(middle, seeds, tests) >= POWER else (middle, high)
    return high


def _power_of_t_test(effect: float, seeds: int, level: float) -> float:
    found = float(nctdtr(seeds - 1, effect * math.sqrt(seeds), _t_quantile(seeds, level)))
    return 1.0 if math.isnan(found) else 1 - found  # scipy gives NaN where nothing is left below the quantile


def _t_quantile(seeds: int, level: float) -> float:
    return float(stdtrit(seeds - 1, 1 - level / 2))


def _normal_draws(seeds: int) -> Array:
    return np.random.default_rng(seeds).normal(size=(_DRAWS, seeds))


@lru_cache(maxsize=32)
def _sign_patterns(seeds: int) -> Array:
    """Half of all patterns, the others being their mirror images."""
    numbers = np.arange(2 ** (seeds - 1))
    return np.where((numbers[:, None] >> np.arange(seeds)) & 1, -1.0, 1.0)


def interquartile_mean(values: Sequence[float]) -> float:
    """Returns the mean without the lowest and the highest quarter: a run that went wrong does not move it."""
    cut = len(values) // 4
    return float(np.mean(sorted(values)[cut : len(values) - cut]))


def probability_of_improvement(arm: Sequence[float], reference: Sequence[float], higher_is_better: bool) -> float:
    """Returns how likely a run of the arm is better than a run of the reference, each with a seed of its own.

    It is the share of all pairs of runs in which it is better; an equal pair counts half.
    """
    gains: Any = np.sign(np.subtract.outer(np.asarray(arm), np.asarray(reference)))
    return float((1 + (gains if higher_is_better else -gains)).mean() / 2)

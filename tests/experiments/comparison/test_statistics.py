"""The statistics keep their promises: few false findings, the predicted power, and values that are known by hand."""

import math
from itertools import product

import numpy as np
import pytest
from scipy import stats

from rdrop.experiments.comparison.paired import paired_difference
from rdrop.experiments.comparison.statistics import (
    LEVEL,
    difference_shown,
    holm,
    interquartile_mean,
    is_shown,
    least_seeds,
    power,
    probability_of_improvement,
    seeds_needed,
    sign_flip_p,
)

COMPARISONS = 1000

# ------------------------------------------------------------------------------------------------- the sign-flip test


@pytest.mark.parametrize("seeds", range(1, 12))
def test_p_is_the_share_of_sign_patterns_that_are_as_extreme(seeds):
    differences = np.random.default_rng(seeds).normal(0.4, 1, seeds)
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=seeds)]
    assert sign_flip_p(differences) == np.mean([total >= abs(differences.sum()) - 1e-12 for total in sums])


@pytest.mark.parametrize("seeds", [1, 3, 5, 6, 20, 40])
def test_p_of_differences_with_one_sign_is_the_least_there_is(seeds):
    assert sign_flip_p([0.1 + 0.01 * seed for seed in range(seeds)]) == 2 / 2**seeds


def test_p_does_not_depend_on_sign_scale_and_order():
    differences = [0.3, -0.1, 0.2, 0.25, 0.05, -0.02]
    p = sign_flip_p(differences)
    assert sign_flip_p([-value for value in differences]) == p
    assert sign_flip_p([1e-9 * value for value in differences]) == p
    assert sign_flip_p(differences[::-1]) == p


def test_a_tie_is_no_evidence_for_either_sign():
    assert sign_flip_p([0.1, 0.2, 0.3, 0.0, 0.0]) == sign_flip_p([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip_p([0.0, 0.0]) == sign_flip_p([]) == sign_flip_p([0.1, -0.1]) == 1


def test_sums_that_are_equal_up_to_rounding_are_equally_extreme():
    # In binary 0.1 + 0.2 - 0.3 is not 0. Of 8 patterns, those of the sums 0.6 and 0 are: 2 of the first, 2 of the last.
    assert sign_flip_p([0.1, 0.2, 0.3]) == 0.25
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1


def test_p_agrees_with_the_permutation_test_of_scipy():
    differences = np.random.default_rng(3).normal(0.5, 1, 12)
    theirs = stats.permutation_test((differences,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_p(differences) == pytest.approx(theirs.pvalue)


def test_p_of_many_differences_is_estimated_and_always_the_same():
    differences = np.random.default_rng(0).normal(0.3, 1, 60)
    assert sign_flip_p(differences) == sign_flip_p(differences)
    assert sign_flip_p(differences) == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.01)
    assert 0 < sign_flip_p(np.ones(60)) < 1e-4


# ------------------------------------------------------------------------------------------------------- corrections


def test_holm_agrees_with_the_hand_computation():
    # Sorted 0.01, 0.02, 0.03, 0.5; times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.5; none may be below the one before it.
    assert holm([0.5, 0.01, 0.03, 0.02]) == pytest.approx([0.5, 0.04, 0.06, 0.06])
    assert holm([0.04, 0.03]) == pytest.approx([0.06, 0.06])
    assert holm([0.7, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]
    assert holm([]) == []


@pytest.mark.parametrize(("tests", "least"), [(1, 6), (2, 7), (3, 7), (4, 8), (10, 9)])
def test_least_seeds_is_the_first_number_whose_smallest_p_is_below_the_level(tests, least):
    assert least_seeds(tests) == least
    assert tests * sign_flip_p([1.0] * least) <= LEVEL < tests * sign_flip_p([1.0] * (least - 1))


def shown(differences, tests=1):
    """-1 and 1 where the arm is called worse and better, 0 where nothing is shown."""
    pairs = dict(enumerate(differences.tolist()))
    difference = paired_difference(pairs, dict.fromkeys(pairs, 0.0), higher_is_better=True)
    found = is_shown(difference.interval, tests * sign_flip_p(differences))
    return int(math.copysign(found, difference.mean))


def most_by_chance(share, trials=COMPARISONS):
    """The number of findings that is exceeded once in a thousand times if each has this probability."""
    return int(stats.binom.ppf(0.999, trials, share))


WITHOUT_A_DIFFERENCE = {
    "normal": lambda draw, size: draw.normal(size=size),
    "of skewed scores": lambda draw, size: draw.exponential(size=size) - draw.exponential(size=size),
    "heavy tails": lambda draw, size: draw.standard_t(2, size=size),
    "tied": lambda draw, size: draw.integers(-1, 2, size=size).astype(float),
    "of counts": lambda draw, size: (draw.binomial(9, 0.8, size=size) - draw.binomial(9, 0.8, size=size)) / 9,
}


@pytest.mark.parametrize("seeds", [6, 10, 20])
@pytest.mark.parametrize("kind", WITHOUT_A_DIFFERENCE)
def test_of_arms_without_a_difference_at_most_five_percent_are_told_apart(kind, seeds):
    draws = WITHOUT_A_DIFFERENCE[kind](np.random.default_rng(seeds), (COMPARISONS, seeds))
    found = [shown(differences) for differences in draws]
    assert np.count_nonzero(found) <= most_by_chance(0.05)
    assert found.count(1) <= most_by_chance(0.025)


@pytest.mark.parametrize("seeds", [6, 10, 20])
@pytest.mark.parametrize("sign", [-1, 1])
def test_of_skewed_differences_with_mean_zero_at_most_five_percent_are_called_better(sign, seeds):
    draws = sign * (np.random.default_rng(seeds).gamma(4, size=(COMPARISONS, seeds)) - 4)  # skewness 1
    assert [shown(differences) for differences in draws].count(1) <= most_by_chance(0.05)


def test_the_limits_that_the_documentation_names_are_those_of_the_rule():
    """What no test on so few seeds can know: failures that they do not contain, and a strong lean to one side."""
    draw = np.random.default_rng(1)
    size = (COMPARISONS, 10)
    rare_failures = np.where(draw.random(size) < 0.1, -9.0, 1.0) + draw.normal(size=size)
    assert [shown(own) for own in rare_failures].count(1) / COMPARISONS == pytest.approx(0.28, abs=0.05)
    leaning = 1 - draw.exponential(size=size)
    assert [shown(own) for own in leaning].count(1) / COMPARISONS == pytest.approx(0.09, abs=0.03)


@pytest.mark.parametrize("seeds", [3, 5])
def test_below_six_seeds_nothing_is_ever_called_better(seeds):
    assert {shown(np.full(seeds, 1.0) + 0.001 * np.arange(seeds)), power(100.0, seeds)} == {0}


def test_with_holm_the_best_of_five_arms_is_called_better_in_at_most_five_percent():
    draw = np.random.default_rng(5)
    found = 0
    for _ in range(COMPARISONS):
        differences = draw.normal(size=(5, 10)) - draw.normal(size=10)  # five arms against one baseline
        corrected = holm([sign_flip_p(own) for own in differences])
        of_arms = [shown(own, p / sign_flip_p(own)) for own, p in zip(differences, corrected, strict=True)]
        found += 1 in of_arms
    assert found <= most_by_chance(0.05)


# ------------------------------------------------------------------------------------------------------------- power


@pytest.mark.parametrize("tests", [1, 2, 4])
@pytest.mark.parametrize(("seeds", "effect"), [(6, 1.8), (8, 1.2), (10, 0.5), (10, 1.0), (14, 0.8), (20, 0.7)])
def test_power_is_as_predicted_within_five_points(seeds, effect, tests):
    draws = np.random.default_rng(1000 + seeds).normal(effect, 1, (COMPARISONS, seeds))
    observed = [shown(differences, tests) for differences in draws].count(1) / COMPARISONS
    assert power(effect, seeds, tests) == pytest.approx(observed, abs=0.05)


@pytest.mark.parametrize("tests", [1, 3])
@pytest.mark.parametrize("effect", [0.8, 1.5])
def test_as_many_seeds_as_are_said_to_be_needed_show_it_eight_times_of_ten(effect, tests):
    seeds = seeds_needed(0.02 * effect, 0.02, tests)
    draws = np.random.default_rng(7).normal(effect, 1, (COMPARISONS, seeds))
    observed = [shown(differences, tests) for differences in draws].count(1) / COMPARISONS
    assert observed >= 0.75
    assert power(effect, seeds - 1, tests) < 0.8 <= power(effect, seeds, tests)


@pytest.mark.parametrize("seeds", [12, 13, 14])
def test_power_holds_where_many_tests_leave_few_patterns(seeds):
    draws = np.random.default_rng(3000 + seeds).normal(1.3, 1, (COMPARISONS, seeds))
    observed = [shown(differences, 60) for differences in draws].count(1) / COMPARISONS
    assert power(1.3, seeds, 60) == pytest.approx(observed, abs=0.05)


def test_a_bound_that_is_no_number_shows_nothing():
    assert not is_shown((math.nan, math.inf), 0.0)
    assert is_shown((-2.0, -1.0), 0.0)


def test_no_number_of_seeds_is_promised_where_none_below_a_thousand_is_enough():
    assert seeds_needed(0.001, 1.0) is None
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(0.5, 0.0) is None


def test_a_sure_difference_needs_as_many_seeds_as_can_show_one():
    assert [seeds_needed(-100.0, 1.0, tests) for tests in (1, 2, 4)] == [6, 7, 8]


@pytest.mark.parametrize("seeds", [6, 10, 14, 20, 100])
def test_the_difference_that_seeds_show_needs_these_seeds(seeds):
    difference = difference_shown(0.03, seeds)
    assert power(difference / 0.03, seeds) == pytest.approx(0.8, abs=0.01)
    assert seeds_needed(1.01 * difference, 0.03) <= seeds
    assert difference_shown(0.03, 5) is None


# ------------------------------------------------------------------------------------------- averages and comparisons


def test_the_interquartile_mean_leaves_out_the_lowest_and_the_highest_quarter():
    assert interquartile_mean([-100, 1, 2, 3, 4, 5, 6, 1000]) == 3.5
    assert interquartile_mean([1, 2, 3, 4, 5, 6, 7, 8, 9, 99]) == stats.trim_mean([1, 2, 3, 4, 5, 6, 7, 8, 9, 99], 0.25)


def test_the_probability_of_improvement_counts_pairs_of_runs_and_half_of_the_equal_ones():
    # Pairs (arm, reference): (2, 1) and (3, 1) and (3, 2) are better, (2, 2) is equal; of 4.
    assert probability_of_improvement([2, 3], [1, 2], True) == 3.5 / 4
    assert probability_of_improvement([2, 3], [1, 2], False) == 0.5 / 4
    arm, reference = np.random.default_rng(0).normal(size=(2, 9))
    u = stats.mannwhitneyu(arm, reference).statistic
    assert probability_of_improvement(arm, reference, True) == pytest.approx(u / 81)

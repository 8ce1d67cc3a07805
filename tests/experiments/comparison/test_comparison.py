"""The statistics of a comparison, how runs are put into arms, and what the verdict and the terminal table say."""

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
from pydantic import ValidationError
from rich.console import Console
from scipy import stats
from tests.experiments.run_folders import write_run, write_three_arms

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.comparison.contest import Outcome, judged
from rdrop.experiments.comparison.designs import Design, arm_digest
from rdrop.experiments.comparison.finished_runs import split_usable
from rdrop.experiments.comparison.learning import has_learned, how_diverged
from rdrop.experiments.comparison.notes import noted
from rdrop.experiments.comparison.paired import paired_difference
from rdrop.experiments.comparison.sentences import verdict
from rdrop.experiments.comparison.statistics import seeds_needed
from rdrop.experiments.comparison.terminal_table import terminal_table
from rdrop.experiments.comparison.wording import MINUS, TIMES, NumberStyle, ratio, words
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder, find_runs
from rdrop.experiments.run_folder.predictions import Predictions, write_predictions

HIGHER = True


def by_seed(*scores):
    return dict(enumerate(scores))


def compared(runs):
    return comparisons(find_runs(runs))


def only(runs):
    (comparison,) = compared(runs)
    return comparison


def labels(comparison):
    return [arm.label for arm in comparison.arms]


def contest(*differences, contests=1, looks=(), higher_is_better=True):
    """An arm against a reference with these differences over the seeds, judged with as many more of them."""
    return judged_by_scores(by_seed(*differences), by_seed(*[0] * len(differences)), contests, looks, higher_is_better)


def judged_by_scores(arm, reference, contests=1, looks=(), higher_is_better=True):
    difference = paired_difference(arm, reference, higher_is_better)
    seen = [[frozenset(difference.seeds[:seeds])] * contests for seeds in looks]
    return judged([(*ARMS, difference)] * contests, seen)[0]


ARMS = (Arm("R-Drop (alpha 1)", Method(alpha=1.0), 32, ()), Arm("baseline", Method(alpha=0.0), 32, ()))


# The statistics.


def test_interval_agrees_with_the_hand_computation():
    # Differences 1, 2, 3, 4, 5: mean 3, sd sqrt(2.5), t(0.975, 4) = 2.776445, half width 2.776445 * sqrt(2.5 / 5).
    difference = paired_difference(by_seed(11, 12, 13, 14, 15), by_seed(10, 10, 10, 10, 10), HIGHER)
    assert difference.per_seed == (1, 2, 3, 4, 5)
    assert difference.mean == 3
    assert difference.half_width == pytest.approx(1.963243, abs=1e-6)
    assert difference.interval == pytest.approx((1.036757, 4.963243), abs=1e-6)


def test_interval_agrees_with_the_paired_t_test_of_scipy():
    arm, reference = (0.779, 0.768, 0.772, 0.77), (0.739, 0.751, 0.724, 0.733)
    theirs = stats.ttest_rel(arm, reference).confidence_interval(0.95)
    assert paired_difference(by_seed(*arm), by_seed(*reference), HIGHER).interval == pytest.approx(tuple(theirs))


def test_two_seeds_give_the_wide_interval_of_one_degree_of_freedom():
    # Differences 1 and 3: mean 2, sd sqrt(2), t(0.975, 1) = 12.7062, half width 12.7062.
    difference = paired_difference(by_seed(1, 3), by_seed(0, 0), HIGHER)
    assert difference.interval == pytest.approx((-10.706205, 14.706205), abs=1e-6)
    assert contest(1, 3).outcome is Outcome.TOO_FEW


def test_seeds_are_paired_by_number_and_not_by_position():
    difference = paired_difference({2: 0.5, 0: 0.1, 7: 0.9}, {0: 0.0, 2: 0.3, 5: 0.8}, HIGHER)
    assert difference.seeds == (0, 2)
    assert difference.per_seed == pytest.approx((0.1, 0.2))


def test_one_seed_has_a_difference_but_no_interval():
    difference = paired_difference(by_seed(0.8), by_seed(0.7), HIGHER)
    assert difference.mean == pytest.approx(0.1)
    assert difference.interval is difference.p_value is difference.spread is None
    assert contest(0.1).outcome is Outcome.UNDECIDED


def test_no_common_seed_is_said_and_nothing_is_computed():
    difference = paired_difference({0: 0.8}, {1: 0.7}, HIGHER)
    assert difference.mean is None
    assert difference.interval is None
    assert judged_by_scores({0: 0.8}, {1: 0.7}).outcome is Outcome.NO_SEEDS


def test_equal_differences_give_no_interval_of_width_zero():
    # In binary 0.3 - 0.2 and 0.4 - 0.3 differ in the last bits; that is no spread either.
    difference = paired_difference(by_seed(0.3, 0.4, 0.8), by_seed(0.2, 0.3, 0.7), HIGHER)
    assert len(set(difference.per_seed)) > 1
    assert difference.interval is difference.spread is None
    assert judged_by_scores(by_seed(*[0.3, 0.4, 0.8] * 3), by_seed(*[0.2, 0.3, 0.7] * 3)).outcome is Outcome.UNDECIDED


def test_equal_scores_are_ties_and_no_difference():
    difference = paired_difference(by_seed(0.7, 0.8), by_seed(0.7, 0.8), HIGHER)
    assert difference.wins_ties_losses == (0, 2, 0)
    assert contest(0, 0).outcome is Outcome.EQUAL


def test_a_difference_of_rounding_is_a_tie():
    difference = paired_difference(by_seed(0.1 + 0.2, 0.5), by_seed(0.3, 0.4), HIGHER)
    assert difference.wins_ties_losses == (1, 1, 0)


@pytest.mark.parametrize(
    ("higher_is_better", "counts", "outcome"),
    [(True, (0, 1, 7), Outcome.WORSE), (False, (7, 1, 0), Outcome.BETTER)],
)
def test_direction_decides_wins_and_verdict_but_not_the_difference(higher_is_better, counts, outcome):
    found = contest(-2, -3, -3, -2, -2, -3, -3, 0, higher_is_better=higher_is_better)
    assert found.difference.mean == -2.25
    assert found.difference.wins_ties_losses == counts
    assert found.outcome is outcome


def test_interval_that_touches_zero_shows_nothing():
    # By hand: seven differences 0 and one d have the t statistic 1, whatever d is.
    assert contest(0.8, 0, 0, 0, 0, 0, 0, 0).outcome is Outcome.NOT_SHOWN


# The rule.


@pytest.mark.parametrize(("seeds", "outcome"), [(2, Outcome.TOO_FEW), (5, Outcome.TOO_FEW), (6, Outcome.BETTER)])
def test_six_seeds_are_the_least_that_can_show_a_difference(seeds, outcome):
    found = contest(*(1 + 0.001 * seed for seed in range(seeds)))
    assert (found.outcome, found.least_seeds) == (outcome, 6)
    assert found.p_value == 2 / 2**seeds


def test_an_interval_that_excludes_zero_is_not_enough():
    # Two of eight signs differ, by so little that the t interval hardly notices; four contests make p too large.
    found = contest(1, 1.1, 1.2, 1.3, 1.4, -0.02, -0.01, 1.1, contests=4)
    assert found.difference.interval[0] > 0
    assert found.difference.p_value < 0.05 < found.p_value
    assert found.outcome is Outcome.NOT_SHOWN


def test_a_small_p_is_not_enough():
    # All signs agree, and still the t interval of differences with such an outlier includes zero.
    found = contest(0.1, 0.1, 0.1, 0.1, 0.1, 5)
    assert found.p_value <= 0.05
    assert found.difference.interval[0] < 0
    assert found.outcome is Outcome.NOT_SHOWN


def test_contests_are_corrected_for_one_another_by_holm():
    strong, weak = (paired_difference(by_seed(*own), by_seed(*[0] * 8), HIGHER) for own in (range(1, 9), range(-1, 7)))
    both = judged([(*ARMS, strong), (*ARMS, weak)])
    assert [own.p_value for own in both] == [2 * strong.p_value, weak.p_value]
    assert [own.contests for own in both] == [2, 2]


def test_the_least_seeds_are_fewer_where_the_others_leave_them_by_holm():
    """Of two, a weak one leaves the other the whole correction, and a strong one leaves none."""
    short = paired_difference(by_seed(1, 2, 3, 4, 5), by_seed(0, 0, 0, 0, 0), HIGHER)
    mixed = paired_difference(by_seed(5, 1, -4, 2, 1, -2), by_seed(*[0] * 6), HIGHER)
    for other, least in ((range(1, 10), 6), (range(-4, 5), 7)):
        beside = paired_difference(by_seed(*other), by_seed(*[0] * 9), HIGHER)
        for own, expected in ((short, Outcome.TOO_FEW), (mixed, (Outcome.NOT_SHOWN, Outcome.TOO_FEW)[least - 6])):
            first = judged([(*ARMS, own), (*ARMS, beside)])[0]
            assert (first.least_seeds, first.outcome) == (least, expected)
    alone = judged([(*ARMS, mixed), (*ARMS, paired_difference(by_seed(1), by_seed(0), HIGHER))])[0]
    assert (alone.contests, alone.least_seeds) == (1, 6)  # the other has no p


def test_more_contests_and_looks_need_more_seeds():
    assert contest(*range(1, 7), contests=2).least_seeds == 7
    assert contest(*range(1, 7), contests=2).outcome is Outcome.TOO_FEW
    looked = contest(1, 2, 3, 4, 0, 5, 6, 7, looks=[6])  # six with a tie show nothing
    assert looked.least_seeds == 7
    assert looked.p_value == 2 * 2 / 2**7
    again = contest(1, 2, 3, 4, 0, 5, 6, 0, 7, 8, looks=[6, 8])
    assert (again.looks, again.tests) == ((6, 8), 4)
    assert again.p_value == 4 * 2 / 2**8


def test_the_seeds_that_are_promised_are_corrected_for_the_present_look():
    found = contest(*range(-3, 7), contests=2)
    assert (found.outcome, found.tests, found.tests_of_later) == (Outcome.NOT_SHOWN, 2, 4)
    difference = found.difference
    assert found.seeds_needed == seeds_needed(difference.mean, difference.spread, 4)
    too_few = contest(1, 2, 3, 5, -1)  # shows nothing, whoever looks
    assert (too_few.tests, too_few.tests_of_later) == (1, 1)


def test_the_later_of_two_contests_needs_fewer_seeds_than_both_together():
    """By Holm's method only the smaller p is doubled."""
    strong, weak = (
        paired_difference(by_seed(*own), by_seed(*[0] * len(own)), HIGHER) for own in ([*range(1, 9)], [*range(1, 7)])
    )
    both = judged([(*ARMS, strong), (*ARMS, weak)])
    assert [own.p_value for own in both] == [2 * 2 / 2**8, 2 / 2**6]
    assert [own.outcome for own in both] == [Outcome.BETTER, Outcome.BETTER]


def test_a_contest_without_common_seeds_takes_no_part_in_the_correction():
    nothing = paired_difference({}, {}, HIGHER)
    strong = paired_difference(by_seed(*range(1, 9)), by_seed(*[0] * 8), HIGHER)
    found = judged([(*ARMS, nothing), (*ARMS, strong)])
    assert (found[0].p_value, found[1].p_value) == (None, strong.p_value)


# Runs into arms.


def test_three_arms_stand_in_the_order_baseline_rdrop_larger_batch(tmp_path):
    write_three_arms(tmp_path)
    comparison = only(tmp_path)
    assert labels(comparison) == ["baseline", "R-Drop (alpha 1)", "baseline, twice the batch"]
    baseline, rdrop, larger = comparison.arms
    # Differences of R-Drop: 4.0, 4.4, 2.1, 3.7, 3.9 points, so mean 3.62 and sd 0.8871 (n - 1).
    difference = comparison.difference(rdrop, baseline)
    assert difference.mean == pytest.approx(0.0362)
    assert difference.half_width == pytest.approx(2.776445 * 0.00887130 / math.sqrt(5), rel=1e-5)
    assert comparison.difference(larger, baseline).wins_ties_losses == (4, 0, 1)


@pytest.mark.parametrize(
    "change",
    [{"updates": 800}, {"learning_rate": 0.01}, {"data": {"train_labels": 100}}, {"name": "other"}, {"metric": "f1"}],
)
def test_runs_that_differ_in_anything_else_are_not_compared(tmp_path, change):
    score = {"test": {"f1": 0.7}, "valid": {"f1": 0.7}} if "metric" in change else {}
    write_run(tmp_path / "a", 0.7)
    write_run(tmp_path / "b", 0.8, alpha=1.0, **change, **score)
    assert sorted(labels(comparison) for comparison in compared(tmp_path)) == [["R-Drop (alpha 1)"], ["baseline"]]


def test_the_comparison_does_not_depend_on_the_order_of_the_folders(tmp_path):
    write_three_arms(tmp_path)
    records = find_runs(tmp_path)
    assert comparisons(records) == comparisons(records[::-1])


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({"alpha": 0.5}, "R-Drop (alpha 0.5)"),
        ({"alpha": 1.0, "passes": 3}, "R-Drop (alpha 1, 3 passes)"),
        ({"alpha": 5, "every": 10}, "R-Drop (alpha 5, every 10 updates)"),
        ({"batch_size": 64}, "baseline, twice the batch"),
    ],
)
def test_arms_are_named_for_a_reader(tmp_path, changes, label):
    write_run(tmp_path, 0.7)
    write_run(tmp_path, 0.8, **changes)
    assert labels(only(tmp_path)) == ["baseline", label]


def test_what_is_trained_in_another_way_is_another_arm():
    """Every combination of the keys of the method."""
    values = {
        "alpha": (0.5, 1.0),
        "alpha_schedule": ("constant", "linear"),
        "passes": (2, 3),
        "every": (1, 2),
        "dropout": (None, [0.1, 0.3]),
        "cutoff": (None, "token", "span", "feature", "embedding", "unknown"),
        "cutoff_ratio": (0.0, 0.05, 0.1),
        "views": ("same", "each"),
        "task_passes": ("all", "first"),
        "divergence": ("symmetric", "from-first"),
        "fused": (False, True),
        "encoder_once": (False, True),
    }
    assert set(values) == set(Method.model_fields)
    methods = []
    for chosen in product(*values.values()):
        with suppress(RecipeError):  # keys that do not fit together
            methods.append(method_of(dict(zip(values, chosen, strict=True))))
    assert len(methods) > 300
    assert len({method.label() for method in methods}) == len({method.arm() for method in methods}) == len(methods)


def method_of(keys):
    try:
        return Method(**keys)
    except ValidationError as error:
        raise error.errors()[0]["ctx"]["error"] from None


def test_plain_training_ignores_passes_and_every(tmp_path):
    write_run(tmp_path, 0.7, seed=0, passes=2)
    write_run(tmp_path, 0.8, seed=1, passes=3, every=5)
    (arm,) = only(tmp_path).arms
    assert arm.seeds == (0, 1)


def test_three_passes_are_compared_with_three_times_the_batch(tmp_path):
    write_run(tmp_path, 0.7)
    write_run(tmp_path, 0.8, alpha=1.0, passes=3)
    write_run(tmp_path, 0.75, batch_size=96)
    assert labels(only(tmp_path))[-1] == "baseline, three times the batch"


def test_a_larger_batch_with_its_own_rdrop_arm_is_also_a_baseline(tmp_path):
    for batch_size in (32, 64):
        for alpha in (0.0, 1.0):
            write_run(tmp_path, 0.7, alpha=alpha, batch_size=batch_size)
    smaller, larger = compared(tmp_path)
    assert labels(smaller) == ["baseline", "R-Drop (alpha 1)", "baseline, twice the batch"]
    assert labels(larger) == ["baseline", "R-Drop (alpha 1)"]


def test_unrelated_batch_sizes_are_not_compared(tmp_path):
    write_run(tmp_path, 0.7, batch_size=32)
    write_run(tmp_path, 0.7, batch_size=48)
    assert [labels(comparison) for comparison in compared(tmp_path)] == [["baseline"], ["baseline"]]


def test_of_two_runs_of_one_seed_the_later_counts_and_the_other_is_listed(tmp_path):
    old = write_run(tmp_path / "a", 0.7, finished="2026-01-01T00:00:00Z")
    new = write_run(tmp_path / "b", 0.8, finished="2026-01-02T00:00:00Z")
    comparison = only(tmp_path)
    assert [run.path for run in comparison.arms[0].runs] == [new]
    assert [run.path for run in comparison.repeats] == [old]


def test_a_seed_missing_in_one_arm_is_left_out_and_named(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path, 0.7 + 0.01 * seed, seed=seed)
    for seed in (0, 2):
        write_run(tmp_path, 0.8, alpha=1.0, seed=seed)
    comparison = only(tmp_path)
    assert comparison.difference(comparison.arms[1], comparison.arms[0]).seeds == (0, 2)
    assert comparison.gaps() == (("R-Drop (alpha 1)", (1,), "no finished run"),)


@pytest.mark.parametrize("score", ["NaN", "Infinity", None, 10**400])
def test_a_score_that_is_no_finite_number_is_left_out_and_named(tmp_path, score):
    for seed in (0, 1):
        write_run(tmp_path, 0.7, seed=seed)
        write_run(tmp_path, 0.8, alpha=1.0, seed=seed, **({"test": {"accuracy": score}} if seed else {}))
    comparison = only(tmp_path)
    assert comparison.difference(comparison.arms[1], comparison.arms[0]).seeds == (0,)
    assert comparison.gaps() == (("R-Drop (alpha 1)", (1,), "test accuracy is not a finite number"),)


@pytest.mark.parametrize(
    "changes", [{"test": {"accuracy": "0.8"}}, {"constant": [1]}, {"constant": {"accuracy": "0.5"}}]
)
def test_a_result_whose_scores_are_no_numbers_is_damaged(tmp_path, changes):
    write_run(tmp_path, 0.7)
    damaged = write_run(tmp_path, 0.7, seed=1, **changes)
    finished, unusable = split_usable(find_runs(tmp_path))
    assert len(finished) == 1
    [only_one] = unusable
    assert only_one.path == damaged
    assert "is not what it should be, an object of numbers" in only_one.problem


def test_cost_is_the_ratio_of_medians(tmp_path):
    for seed, (plain, double) in enumerate([(10, 20), (12, 21), (90, 24)]):
        write_run(tmp_path, 0.7, seed=seed, cost={"step_milliseconds": plain})
        write_run(tmp_path, 0.7, seed=seed, alpha=1.0, cost={"step_milliseconds": double, "peak_extra_bytes": None})
    comparison = only(tmp_path)
    assert comparison.cost_ratio(comparison.arms[1], "step_milliseconds") == 21 / 12
    assert comparison.cost_ratio(comparison.arms[1], "peak_extra_bytes") is None


@pytest.mark.parametrize(("mebibytes", "ratio"), [(31, None), (32, 2.0)])
def test_a_memory_that_the_first_run_of_a_process_decides_has_no_ratio(tmp_path, mebibytes, ratio):
    for alpha, times in ((0.0, 1), (1.0, 2)):
        write_run(tmp_path, 0.7, alpha=alpha, cost={"peak_extra_bytes": times * mebibytes * 2**20})
    comparison = only(tmp_path)
    assert comparison.cost_ratio(comparison.arms[1], "peak_extra_bytes") == ratio


def test_unfinished_and_damaged_runs_take_no_part_and_are_named(tmp_path):
    write_run(tmp_path, 0.7)
    unfinished = write_run(tmp_path, 0.7, seed=1, unfinished=True)
    no_metric = write_run(tmp_path, 0.7, seed=2, metric=None)
    other_recipe = write_run(tmp_path, 0.7, seed=3)
    (other_recipe / "recipe.json").write_text((unfinished / "recipe.json").read_text())
    half = write_run(tmp_path, 0.7, seed=4)
    (half / "result.json").write_text('{"format": 1, "rec')
    no_seed = write_run(tmp_path, 0.7, seed=5)
    recipe = json.loads((no_seed / "recipe.json").read_text())
    (no_seed / "recipe.json").write_text(json.dumps({k: v for k, v in recipe.items() if k != "seed"}))

    assert only(tmp_path).seeds == (0,)
    problems = {run.path: run.problem for run in split_usable(find_runs(tmp_path))[1]}
    assert problems.keys() == {unfinished, no_metric, other_recipe, half, no_seed}
    assert "unfinished" in problems[unfinished]
    assert "result.json: 'metric' is not what it should be" in problems[no_metric]
    assert "the result of another recipe" in problems[other_recipe]
    assert "not valid JSON" in problems[half]
    assert "recipe.json: 'seed' is missing. It is damaged, or of another version of rdrop" in problems[no_seed]


def test_nothing_finished_is_no_comparison():
    assert comparisons([]) == []


# The words.


def said(arm, reference, higher_is_better=True, metric="accuracy", **judging):
    found = judged_by_scores(by_seed(*arm), by_seed(*reference), higher_is_better=higher_is_better, **judging)
    return verdict(found, metric, NumberStyle.of(metric, [found.difference]))


def test_verdict_better_has_points_interval_p_and_seeds():
    assert said((0.779, 0.768, 0.772, 0.77, 0.781, 0.77), (0.739, 0.724, 0.751, 0.733, 0.742, 0.74)) == (
        "R-Drop (alpha 1) is better than the baseline: accuracy +3.5 points "
        "(95 % interval +2.6 to +4.4, p = 0.031, better on 6 of 6 seeds)."
    )


def test_verdict_worse_is_said_as_plainly():
    assert said((0.5, 0.51, 0.52, 0.5, 0.51, 0.5), (0.6, 0.62, 0.61, 0.6, 0.6, 0.61)).startswith(
        f"R-Drop (alpha 1) is worse than the baseline: accuracy {MINUS}10.0 points"
    )


def test_verdict_lower_is_better_stays_in_raw_units():
    assert said(
        (23.9, 24.1, 24.0, 24.2, 23.8, 24.0), (25.9, 26.0, 26.1, 26.0, 25.9, 26.0), higher_is_better=False,
        metric="perplexity",
    ).startswith(f"R-Drop (alpha 1) is better than the baseline: perplexity {MINUS}1.98 (95 % interval")  # fmt: skip


def test_verdict_not_shown_gives_the_interval_that_includes_zero():
    sentence = said((0.71, 0.70, 0.74, 0.7, 0.72, 0.71), (0.70, 0.72, 0.71, 0.71, 0.7, 0.71))
    assert sentence.startswith("No difference shown between R-Drop (alpha 1) and the baseline: accuracy +0.5 points")
    assert "better on 3 of 6 seeds" in sentence


def test_verdict_of_too_few_seeds_says_how_many_are_the_least_and_does_not_call_it_better():
    sentence = said((0.779, 0.768, 0.772), (0.739, 0.724, 0.751))
    assert sentence == (
        "Too few seeds: R-Drop (alpha 1) against the baseline is accuracy +3.5 points (95 % interval +0.4 to +6.6, "
        "p = 0.25), better on 3 of 3 seeds; 6 are the least that can show a difference."
    )
    assert "is better" not in sentence
    assert "7 are the least" in said((0.779, 0.768, 0.772), (0.739, 0.724, 0.751), contests=2)


def test_verdict_of_one_seed_claims_nothing():
    assert said((0.8,), (0.7,)) == (
        "One seed shows nothing: R-Drop (alpha 1) against the baseline is accuracy +10.0 points on seed 0, "
        "and 6 are the least that can show a difference."
    )


def test_verdict_of_equal_differences_claims_nothing():
    assert "equal differences have no spread" in said((0.8, 0.9), (0.7, 0.8))


def test_verdict_of_equal_scores():
    assert said((0.8, 0.9), (0.8, 0.9)) == (
        "Too few seeds: accuracy of R-Drop (alpha 1) and the baseline is equal on all 2 seeds; 6 are the least that "
        "can show a difference."
    )
    assert said([0.8] * 6, [0.8] * 6) == (
        "No difference between R-Drop (alpha 1) and the baseline: accuracy is equal on all 6 seeds."
    )


def test_verdict_without_a_common_seed():
    assert said((), (0.8,)).startswith("Nothing to compare")


def write_seeds(runs, seeds, gain=0.03, tie=None):
    """So many seeds of the baseline and of R-Drop, which is better by about `gain`, but equal with the seed `tie`."""
    for seed in range(seeds):
        write_run(runs, 0.7 + 0.001 * seed, seed=seed)
        write_run(runs, 0.7 + 0.001 * seed if seed == tie else 0.7 + gain + 0.003 * (seed % 3), alpha=1.0, seed=seed)


def test_verdict_sets_rdrop_against_the_larger_batch_too(tmp_path):
    write_seeds(tmp_path, 8)
    for seed in range(8):
        write_run(tmp_path, 0.71 + 0.002 * (seed % 2), batch_size=64, seed=seed)
    against_baseline, against_larger = only(tmp_path).verdict().split("\n")
    assert "R-Drop (alpha 1) is better than the baseline:" in against_baseline
    assert "R-Drop (alpha 1) is better than the baseline with twice the batch:" in against_larger


def test_of_few_seeds_no_sentence_says_better(tmp_path):
    write_three_arms(tmp_path)
    comparison = only(tmp_path)
    for sentence in [*comparison.verdict().split("\n"), *comparison.remarks()]:
        assert "is better" not in sentence
    assert comparison.verdict().count("7 are the least that can show a difference") == 2


@pytest.mark.parametrize(
    ("alpha", "sentence"), [(0.0, "only the baseline has finished"), (1.0, "no run of the baseline (alpha 0)")]
)
def test_verdict_names_the_arm_that_is_missing(tmp_path, alpha, sentence):
    write_run(tmp_path, 0.7, alpha=alpha)
    assert sentence in only(tmp_path).verdict()


def test_verdict_of_two_plain_arms_compares_the_batches(tmp_path):
    for seed in range(6):
        write_run(tmp_path, 0.7 + 0.01 * seed, seed=seed)
        write_run(tmp_path, 0.9 - 0.01 * seed, seed=seed, batch_size=64)
    assert only(tmp_path).verdict().startswith("The baseline with twice the batch is better than the baseline:")


def test_decimals_follow_the_width_of_the_interval():
    # Half widths by hand: 12.7062 * |a - b| / 2 for two differences a and b.
    narrow = paired_difference(by_seed(0.50010, 0.50012), by_seed(0.5, 0.5), HIGHER)
    assert NumberStyle.of("accuracy", [narrow]).interval(narrow.interval) == f"{MINUS}0.002 to +0.024"
    wide = paired_difference(by_seed(0.6, 0.7), by_seed(0.5, 0.5), HIGHER)
    assert NumberStyle.of("accuracy", [wide]).interval(wide.interval) == f"{MINUS}48.5 to +78.5"


def test_zero_has_no_sign():
    assert NumberStyle(percent=True, decimals=1).difference(-0.0001) == "0.0"


def test_what_was_not_measured_is_a_dash():
    assert ratio(None) == NumberStyle(percent=True, decimals=1).score(None) == "—"


# What stands beside the verdict.


def remark(runs, start, looks=()):
    """The one remark that begins so, or None."""
    (comparison,) = comparisons(find_runs(runs), looks)
    found = [sentence for sentence in comparison.remarks() if sentence.startswith(start)]
    assert len(found) <= 1
    return found[0] if found else None


def test_several_contests_say_that_p_is_corrected_and_one_does_not(tmp_path):
    write_seeds(tmp_path / "two", 6)
    assert remark(tmp_path, "p is corrected") is None
    for seed in range(6):
        write_run(tmp_path / "three", 0.71 + 0.002 * (seed % 2), batch_size=64, seed=seed)
    assert remark(tmp_path, "p is corrected").startswith("p is corrected for 2 comparisons by Holm's method")


def test_a_verdict_without_any_p_says_nothing_of_its_correction(tmp_path):
    for alpha, batch in ((0.0, 32), (1.0, 32), (0.0, 64)):
        write_run(tmp_path, 0.7 + alpha / 100, alpha=alpha, batch_size=batch)
    assert only(tmp_path).verdict().startswith("One seed shows nothing")
    assert remark(tmp_path, "p is corrected") is None


def test_seeds_that_were_added_after_a_look_are_said_and_corrected_for(tmp_path):
    write_seeds(tmp_path, 6, tie=3)
    first = only(tmp_path).look()
    assert remark(tmp_path, "Seeds were added", [first]) is None  # the same look again
    write_seeds(tmp_path / "more", 10, tie=3)
    assert remark(tmp_path, "Seeds were added") is None
    assert remark(tmp_path, "Seeds were added", [first]) == (
        "Seeds were added after the verdict on 6 seeds had been seen. Each look is a chance for a false verdict, so p "
        "is doubled for each look before this one. However many there are, the chance that one of them is wrong about "
        "equal arms stays below 10 %."
    )
    (comparison,) = comparisons(find_runs(tmp_path), [first])
    assert comparison.contests[0].p_value == 2 * only(tmp_path).contests[0].p_value
    assert comparison.sections[0].rows[1].p_value == comparison.contests[0].p_value


def test_an_arm_that_is_added_after_a_look_makes_no_p_smaller(tmp_path):
    write_seeds(tmp_path / "first", 6, tie=3)
    first = only(tmp_path).look()
    write_seeds(tmp_path / "more", 9, tie=3)
    (before,) = comparisons(find_runs(tmp_path), [first])
    for seed in range(9):
        write_run(tmp_path / "arm", 0.71 + 0.002 * (seed % 2), batch_size=64, seed=seed)
    (after,) = comparisons(find_runs(tmp_path), [first])
    assert after.contests[0].p_value > before.contests[0].p_value == 2 * 2 / 2**8
    assert remark(tmp_path, "Seeds were added", [first]) == (
        "Seeds were added after the verdict on 6 seeds had been seen. Each look is a chance for a false verdict, so p "
        "is doubled for each look before this one, in the comparisons of which they had shown nothing. However many "
        "there are, the chance that one of them is wrong about equal arms stays below 10 %, had no arm been added."
    )


def test_seeds_added_after_a_verdict_that_had_shown_the_same_are_no_further_try(tmp_path):
    write_seeds(tmp_path, 6)
    first = only(tmp_path).look()
    write_seeds(tmp_path / "more", 10)
    assert remark(tmp_path, "Seeds were added", [first]) is None
    (comparison,) = comparisons(find_runs(tmp_path), [first])
    assert comparison.contests[0].p_value == only(tmp_path).contests[0].p_value


def test_the_seeds_that_would_show_the_difference_are_said_where_nothing_is_shown_yet(tmp_path):
    write_seeds(tmp_path, 3)
    assert remark(tmp_path, "With this spread") == (
        "With this spread, 6 seeds would show a difference of 3.2 points between R-Drop (alpha 1) and the baseline "
        "(80 % power; 3 seeds tell the spread only roughly)."
    )
    write_seeds(tmp_path / "more", 6)
    assert remark(tmp_path, "With this spread") is None


@pytest.mark.parametrize(("folds", "said"), [(5, True), (6, False)])
def test_of_more_seeds_than_folds_it_is_said_how_many_have_a_part_of_their_own(tmp_path, folds, said):
    for seed, gain in enumerate((0.03, 0.033, 0.036)):
        for alpha in (0.0, 1.0):
            write_run(tmp_path, 0.7 + alpha * gain, alpha=alpha, seed=seed, data={"folds": folds})
    found = remark(tmp_path, "With this spread, 6 seeds")
    assert ("; 5 have a part of their own)" in found) == said


def test_more_seeds_than_a_thousand_are_not_counted(tmp_path):
    for seed, difference in enumerate((0.1, -0.1, 0.1, -0.0999, 0.05, -0.05)):
        write_run(tmp_path, 0.7, seed=seed)
        write_run(tmp_path, 0.7 + difference, alpha=1.0, seed=seed)
    assert remark(tmp_path, "With this spread").startswith("With this spread, more than 1,000 seeds would show")


def test_from_eight_seeds_on_the_interquartile_mean_and_the_probability_of_improvement_are_said(tmp_path):
    write_seeds(tmp_path, 7)
    assert remark(tmp_path, "Interquartile") is None
    write_seeds(tmp_path / "more", 8)
    assert remark(tmp_path, "Interquartile") == (
        "Interquartile mean of test accuracy %: baseline 70.35; R-Drop (alpha 1) 73.23. Probability of improvement "
        "over the baseline: R-Drop (alpha 1) 1.00."
    )


def test_p_values_of_the_other_scores_are_corrected_together(tmp_path):
    for seed in range(6):
        for alpha in (0.0, 1.0):
            better = alpha * (0.1 + 0.01 * seed)
            scores = {"accuracy": 0.7 + better, "loss": 1 - better, "ece": 0.2 - better, "f1": 0.5 + better}
            write_run(tmp_path, 0.7, alpha=alpha, seed=seed, test=scores)
    p_values = {(own.split, own.metric): own.rows[1].p_value for own in only(tmp_path).sections}
    assert p_values == {
        ("test", "accuracy"): 2 / 64, ("valid", "accuracy"): None,
        ("test", "loss"): 6 / 64, ("test", "ece"): 6 / 64, ("test", "f1"): 6 / 64,
    }  # fmt: skip


# Runs that did not learn.


@pytest.mark.parametrize(
    ("test", "constant", "learned"),
    [
        ({"accuracy": 0.5, "loss": 0.69}, {"accuracy": 0.5, "loss": 0.69}, False),
        ({"accuracy": 0.89, "loss": 0.28}, {"accuracy": 0.9, "loss": 0.33}, True),  # one class in ten
        ({"accuracy": 0.51, "loss": 0.9}, {"accuracy": 0.5, "loss": 0.69}, True),
        ({"accuracy": 0.0, "loss": 1.0}, {"loss": 1.0}, False),  # a constant has no such score, so the loss decides
        ({"accuracy": 0.0, "loss": 0.9}, {"loss": 1.0}, True),
        ({"accuracy": 0.9}, {}, None),
        ({"accuracy": 0.9}, {"loss": 1.0}, None),
        ({"accuracy": 0.9}, None, None),
        ({"accuracy": 0.9, "loss": "NaN"}, {"loss": 1.0}, None),
    ],
)
def test_a_run_learned_if_it_is_better_than_a_constant(tmp_path, test, constant, learned):
    write_run(tmp_path, 0.7, test=test, constant=constant)
    assert has_learned(only(tmp_path).arms[0].runs[0]) is learned


@pytest.mark.parametrize(("correlation", "learned"), [(0.9, True), (0.05, False), (-0.9, False)])
def test_a_regression_learned_if_its_predictions_correlate_wherever_they_lie(tmp_path, correlation, learned):
    """The squared error is above that of the mean label: the predictions are of another scale."""
    test = {"pearson": correlation, "loss": 8.3}
    write_run(tmp_path, 0.7, metric="pearson", test=test, constant={"loss": 2.1})
    assert has_learned(only(tmp_path).arms[0].runs[0]) is learned


@pytest.mark.parametrize(("source_use", "learned"), [(-0.01, False), (0.01, False), (1.5, True), ("NaN", None)])
def test_a_translation_learned_if_it_is_better_with_its_source_than_with_another_one(tmp_path, source_use, learned):
    write_run(tmp_path / "a", 0.7, source_use=source_use)
    assert has_learned(only(tmp_path / "a").arms[0].runs[0]) is learned
    rows = write_run(tmp_path / "b", 0.7) / "metrics.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"kind": "valid", "step": 400, "source_use": source_use}) + "\n")
    assert has_learned(only(tmp_path / "b").arms[0].runs[0]) is learned


def test_a_run_that_does_not_read_its_source_is_named_by_that(tmp_path):
    for seed in range(2):
        write_run(tmp_path, 0.8, seed=seed, source_use=1.0)
        write_run(tmp_path, 0.8, seed=seed, alpha=1.0, source_use=0.01 if seed else 1.0)
    assert only(tmp_path).verdict().split("\n")[1:] == [
        "1 of 2 R-Drop (alpha 1) runs did not learn (seed 1): they hardly read their sources."
    ]


@pytest.mark.parametrize("gain", [0.0, 0.1])
def test_arms_without_a_run_that_learned_have_no_verdict(tmp_path, gain):
    for seed in range(7):  # each says one class of everything; of which class there are more, is another matter
        write_run(tmp_path, 0.4, seed=seed, constant={"accuracy": 0.5 + gain})
        write_run(tmp_path, 0.4 + gain + 0.001 * seed * (gain > 0), seed=seed, alpha=1.0, constant={"accuracy": 0.6})
    comparison = only(tmp_path)
    assert comparison.verdict().split("\n")[0] == (
        "Nothing to compare: no run of R-Drop (alpha 1) or of the baseline learned anything."
    )
    assert not any("seeds would show" in remark for remark in comparison.remarks())


def test_perplexities_beyond_any_measure_are_told(tmp_path):
    for seed in range(2):
        for alpha in (0.0, 1.0):
            scores = {"perplexity": 1e200 * (1 + seed + alpha * seed), "loss": 5.0}
            write_run(tmp_path, 0.5, seed=seed, alpha=alpha, metric="perplexity", valid=scores, test=scores)
    assert "1.5e+200" in printed(only(tmp_path))


def test_runs_that_did_not_learn_are_named_and_stay_in_the_statistics(tmp_path):
    constant = {"accuracy": 0.5, "loss": 0.7}
    for seed in range(3):
        write_run(tmp_path, 0.8, seed=seed, constant=constant)
        write_run(tmp_path, 0.5 if seed == 1 else 0.85, seed=seed, alpha=1.0, constant=constant)
    comparison = only(tmp_path)
    assert comparison.verdict().split("\n")[1:] == [
        "1 of 3 R-Drop (alpha 1) runs did not learn (seed 1): no better than a constant prediction."
    ]
    assert comparison.sections[0].rows[1].mean == pytest.approx((0.5 + 0.85 * 2) / 3)
    text = printed(comparison)
    assert "R-Drop (alpha 1) †" in text
    assert "†: with runs that did not learn" in text
    assert "baseline †" not in text


# Runs that diverged, though every number was finite.


@pytest.mark.parametrize(
    ("last", "scored", "constant", "seen"),
    [
        (7262.0, 0.5, {"loss": 2.3}, "the valid loss ended at 7,262, and that of the best constant prediction is 2.3"),
        (0.6, 24.6, {"loss": 2.3}, "the valid loss ended at 24.6, and that of the best constant prediction is 2.3"),
        (22.0, 0.5, {"loss": 2.3}, None),  # a classifier that overfits
        (7262.0, 0.5, {}, "the valid loss ended at 7,262, and its first is 0.7"),
        (7262.0, 0.5, None, "the valid loss ended at 7,262, and its first is 0.7"),
        (6.0, 0.5, {}, None),
        ("NaN", 0.5, {"loss": 2.3}, None),
        (7262.0, 0.5, {"loss": 0.0}, None),  # a test split of one class
    ],
)
def test_a_run_diverged_if_it_ended_far_above_a_constant_or_its_first_score(tmp_path, last, scored, constant, seen):
    folder = write_run(tmp_path, 0.7, constant=constant, valid={"accuracy": 0.7, "loss": scored})
    rows = [{"kind": "valid", "step": step, "loss": loss} for step, loss in ((100, 0.7), (200, 9000.0), (300, last))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert how_diverged(only(tmp_path).arms[0].runs[0]) == seen


def test_runs_that_diverged_are_named_and_stay_in_the_statistics(tmp_path):
    diverged = {"accuracy": 0.86, "loss": 7262.0}
    for seed in range(3):
        write_run(tmp_path, 0.8, seed=seed, constant={"loss": 2.3})
        of_seed = {"valid": diverged} if seed else {}
        write_run(tmp_path, 0.85, seed=seed, alpha=1.0, constant={"loss": 2.3}, **of_seed)
    comparison = only(tmp_path)
    assert comparison.verdict().split("\n")[1:] == [
        "2 of 3 R-Drop (alpha 1) runs diverged (seeds 1 and 2): the valid loss ended at 7,262, and that of the best "
        "constant prediction is 2.3 (seed 1). Lower learning_rate (=0.001), or lengthen the warm-up."
    ]
    assert comparison.sections[0].rows[1].mean == pytest.approx(0.85)
    text = printed(comparison)
    assert "R-Drop (alpha 1) †" in text
    assert "†: with runs that did not learn or diverged" in text
    assert "baseline †" not in text


# Runs that diverged in a number that is not finite, and have no score.


def write_failure(runs, seed, **changes):
    folder = write_run(runs, 0.0, seed=seed, unfinished=True, **changes)
    RunFolder(folder).write_failure(12, "step 12: loss is nan. Its batch has the examples 0, 1. Lower alpha (=9).")
    return folder


def write_ten_seeds(runs, gains, failed=(), failed_baseline=()):
    """Ten seeds on which R-Drop is ahead by `gains`; those of `failed` have no score."""
    for seed in range(10):
        for alpha, score, lost in ((0.0, 0.7, failed_baseline), (1.0, 0.7 + gains[seed], failed)):
            if seed in lost:
                write_failure(runs, seed, alpha=alpha)
            else:
                write_run(runs, score, seed=seed, alpha=alpha)


GAINS = (0.02, 0.021, 0.022, 0.023, 0.024, 0.025, 0.026, 0.02, 0.02, 0.02)


def test_an_arm_that_diverged_on_some_seeds_is_not_better_on_the_others(tmp_path):
    write_ten_seeds(tmp_path, GAINS, failed=(7, 8, 9))
    comparison = only(tmp_path)
    assert comparison.contests[0].outcome is Outcome.SURVIVORS
    assert comparison.verdict().split("\n") == [
        "Nothing shown: R-Drop (alpha 1) diverged on 3 seeds (7, 8 and 9) and has no score there. On the others R-Drop "
        "(alpha 1) against the baseline is accuracy +2.30 points (95 % interval +2.10 to +2.50, p = 0.016, better on 7 "
        "of 7 seeds).",
        "3 of 10 R-Drop (alpha 1) runs diverged (seeds 7, 8 and 9): step 12: loss is nan (seed 7).",
    ]
    text = printed(comparison)
    assert comparison.arms[1].marked_label == "R-Drop (alpha 1) †"
    assert "left out of R-Drop (alpha 1): seeds 7, 8, 9 (diverged, without a score)" in text
    assert "no finished run" not in text


def test_an_arm_that_diverged_on_all_seeds_keeps_its_row_and_the_verdict_names_it(tmp_path):
    write_ten_seeds(tmp_path, GAINS, failed=range(10))
    write_run(tmp_path, 0.75, seed=0, batch_size=64)
    comparison = only(tmp_path)
    assert [arm.label for arm in comparison.arms] == ["baseline", "R-Drop (alpha 1)", "baseline, twice the batch"]
    assert comparison.arms[1].seeds == ()
    assert comparison.verdict().split("\n") == [
        "Nothing to compare: R-Drop (alpha 1) and the baseline have no scored seed in common.",
        "Nothing to compare: R-Drop (alpha 1) and the baseline with twice the batch have no scored seed in common.",
        "10 of 10 R-Drop (alpha 1) runs diverged (seeds 0, 1, 2, 3, 4, 5, 6, 7, 8 and 9): step 12: loss is nan "
        "(seed 0).",
    ]
    assert re.search(r"^R-Drop \(alpha 1\) † +— ", printed(comparison), re.MULTILINE)


def test_an_arm_that_diverged_on_all_seeds_was_not_added_after_a_verdict(tmp_path):
    write_ten_seeds(tmp_path, GAINS)
    for seed in range(10):
        write_failure(tmp_path, seed, alpha=4.0)
    (again,) = comparisons(find_runs(tmp_path), [only(tmp_path).look()])
    assert again.added_arms == ()


def test_without_a_baseline_too_the_arms_that_diverged_are_named(tmp_path):
    for seed in range(2):
        write_run(tmp_path, 0.7, seed=seed, alpha=1.0)
        write_failure(tmp_path, seed, alpha=4.0)
    assert only(tmp_path).verdict().split("\n") == [
        "Nothing to compare: no run of the baseline (alpha 0) has finished.",
        "2 of 2 R-Drop (alpha 4) runs diverged (seeds 0 and 1): step 12: loss is nan (seed 0).",
    ]


def test_an_arm_beside_a_design_that_diverged_on_all_seeds_is_told_too(tmp_path):
    digests = {}
    for alpha, label in ((0.0, "baseline"), (1.0, "R-Drop")):
        digests[label] = arm_digest(RunFolder(write_run(tmp_path, 0.7, alpha=alpha)).recipe())
    write_failure(tmp_path, 0, alpha=4.0)
    designed, beside = comparisons(find_runs(tmp_path), designs=[Design(digests, "R-Drop")])
    assert [arm.label for arm in designed.arms] == ["baseline", "R-Drop"]
    assert [arm.marked_label for arm in beside.arms] == ["baseline", "R-Drop (alpha 1)", "R-Drop (alpha 4) †"]


def test_a_baseline_that_diverged_on_all_seeds_is_named(tmp_path):
    write_ten_seeds(tmp_path, GAINS, failed_baseline=range(10))
    first, *_, last = only(tmp_path).verdict().split("\n")
    assert first == "Nothing to compare: R-Drop (alpha 1) and the baseline have no scored seed in common."
    assert last.startswith("10 of 10 baseline runs diverged")


def test_runs_that_all_diverged_are_no_comparison(tmp_path):
    write_ten_seeds(tmp_path, GAINS, failed=range(10), failed_baseline=range(10))
    assert comparisons(find_runs(tmp_path)) == []


@pytest.mark.parametrize("lost", ["baseline", "baseline, longer", "R-Drop"])
def test_an_arm_of_a_design_that_diverged_on_all_seeds_keeps_its_place(tmp_path, lost):
    arms = {"baseline": {"alpha": 0.0}, "baseline, longer": {"alpha": 0.0, "updates": 800}, "R-Drop": {"alpha": 1.0}}
    digests = {}
    for (label, changes), seed in product(arms.items(), range(2)):
        write = write_failure if label == lost else partial(write_run, score=0.7 + 0.01 * seed)
        digests[label] = arm_digest(RunFolder(write(tmp_path, seed=seed, **changes)).recipe())
    (comparison,) = comparisons(find_runs(tmp_path), designs=[Design(digests, "R-Drop")])
    assert [arm.marked_label for arm in comparison.arms] == [f"{arm} †" if arm == lost else arm for arm in arms]
    assert comparison.baseline is comparison.arms[0]
    assert comparison.subject is comparison.arms[2]
    assert f"2 of 2 {lost} runs diverged (seeds 0 and 1)" in comparison.verdict()
    assert lost in printed(comparison)


def test_an_arm_may_be_better_where_only_the_other_diverged_or_both_did(tmp_path):
    write_ten_seeds(tmp_path, GAINS, failed=(9,), failed_baseline=(7, 8, 9))
    comparison = only(tmp_path)
    assert comparison.contests[0].outcome is Outcome.BETTER
    assert "3 of 10 baseline runs diverged (seeds 7, 8 and 9)" in comparison.verdict()
    assert "1 of 10 R-Drop (alpha 1) runs diverged (seed 9)" in comparison.verdict()


def test_an_arm_is_worse_whatever_its_lost_seeds_would_have_given(tmp_path):
    write_ten_seeds(tmp_path, [-gain for gain in GAINS], failed=(9,))
    assert only(tmp_path).contests[0].outcome is Outcome.WORSE


def test_a_seed_that_was_trained_again_after_it_had_diverged_counts(tmp_path):
    write_ten_seeds(tmp_path, GAINS)
    for run in find_runs(tmp_path):
        RunFolder(run.path).write_failure(12, "step 12: loss is nan. Lower alpha (=9).")
    comparison = only(tmp_path)
    assert comparison.contests[0].outcome is Outcome.BETTER
    assert comparison.gaps() == ()


@pytest.mark.parametrize("damage", [{"task": []}, {"name": None}, {"seed": None}, {"method": 3}, {"batch_size": None}])
def test_a_failure_with_a_damaged_recipe_hides_no_other_run(tmp_path, damage):
    write_ten_seeds(tmp_path, GAINS, failed=(9,))
    (failed,) = (run for run in find_runs(tmp_path) if run.failure is not None)
    (failed.path / "recipe.json").write_text(json.dumps(failed.recipe | damage))
    comparison = only(tmp_path)
    assert comparison.contests[0].outcome is Outcome.BETTER
    assert [gap.reason for gap in comparison.gaps()] == ["no finished run"]


# Arms that came after a verdict.


def added_to(tmp_path, looked_at, **added):
    for seed in range(7):
        write_run(tmp_path, 0.7, seed=seed)
        write_run(tmp_path, 0.72 + seed / 1000, seed=seed, alpha=1.0)
    (comparison,) = comparisons(find_runs(tmp_path))
    look = frozenset(run.path.name for arm in comparison.arms for run in arm.runs if run.seed in looked_at)
    for seed in range(7):
        write_run(tmp_path, 0.71, seed=seed, **added)
    (comparison,) = comparisons(find_runs(tmp_path), [look])
    return comparison


def test_an_arm_that_was_added_after_a_verdict_is_named(tmp_path):
    comparison = added_to(tmp_path, range(7), alpha=4.0)
    assert comparison.corrections() == [
        "p is corrected for 2 comparisons by Holm's method.",
        "Added after a verdict on the other arms had been seen: R-Drop (alpha 4). Each arm is a further chance, so all "
        "verdicts together may be wrong about equal arms more often than in 5 %.",
    ]


@pytest.mark.parametrize("looked_at", [range(0), range(5)])
def test_an_arm_was_not_added_where_no_verdict_could_have_shown_something(tmp_path, looked_at):
    comparison = added_to(tmp_path, looked_at, alpha=4.0)
    assert comparison.added_arms == ()
    assert "all arms were planned before the first verdict" in comparison.corrections()[0]


# The terminal table.


def printed(comparison, width=80):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(terminal_table(comparison))
    return capture.get()


def row_of(arm, text):
    return " ".join(next(line for line in text.splitlines() if line.startswith(arm)).split())


def test_table_fits_80_columns_with_nothing_cut(tmp_path):
    write_three_arms(tmp_path)
    text = printed(only(tmp_path))
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert row_of("R-Drop", text) == f"R-Drop (alpha 1) 77.4 ± 0.6 +3.6 +2.5 to +4.7 5/0/0 {TIMES}1.99 {TIMES}1.50"


def test_a_narrow_terminal_breaks_lines_and_cuts_nothing(tmp_path):
    write_three_arms(tmp_path)
    text = printed(only(tmp_path), width=60)
    assert max(map(len, text.splitlines())) <= 60
    assert "…" not in text


def test_table_of_one_seed_has_dashes_for_what_is_not_known(tmp_path):
    write_run(tmp_path, 0.7, cost={})
    write_run(tmp_path, 0.8, alpha=1.0, cost={})
    assert row_of("R-Drop", printed(only(tmp_path))) == "R-Drop (alpha 1) 80.0 +10.0 — 1/0/0 — —"


def test_table_names_the_seeds_left_out(tmp_path):
    write_run(tmp_path, 0.7, seed=0)
    write_run(tmp_path, 0.7, seed=1)
    write_run(tmp_path, 0.8, seed=0, alpha=1.0)
    assert "left out of R-Drop (alpha 1): seed 1 (no finished run)" in printed(only(tmp_path))


def test_table_does_not_obey_markup_in_names(tmp_path):
    rows = own_metric("[bold]x")
    write_run(tmp_path, 0.7, name="[red]digits[/red]", metric="[bold]x", metrics=rows, test={"[bold]x": 1}, valid={})
    text = printed(only(tmp_path))
    assert "[red]digits[/red]" in text
    assert "[bold]x" in text


def own_metric(name, **row):
    """The row of a metric of somebody's own task, as its results carry it."""
    usual = {"name": name, "label": name, "higher_is_better": True, "percent": False, "decimals": 3}
    return {name: usual | row}


@pytest.mark.parametrize(("higher_is_better", "wins"), [(True, (2, 0, 0)), (False, (0, 0, 2))])
def test_the_results_of_an_own_task_say_which_direction_of_its_metric_is_better(tmp_path, higher_is_better, wins):
    name = f"own_{higher_is_better}"
    rows = own_metric(name, higher_is_better=higher_is_better, label="our score")
    for seed in (0, 1):
        for alpha in (0.0, 1.0):
            write_run(tmp_path, 0.7, seed=seed, alpha=alpha, metric=name, metrics=rows, test={name: alpha + seed / 9})
    section = only(tmp_path).sections[0]
    assert section.differences[0].wins_ties_losses == wins
    assert "our score" in printed(only(tmp_path))


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"metric": "length", "test": {"length": 3}}, "metric 'length' is not in the table"),
        ({"test": {"accuracy": 0.7, "length": 3}}, "metric 'length' is not in the table"),
        ({"metrics": {"length": {"name": "length"}}}, "metric 'length': .*missing"),
        ({"metrics": {"x": {"name": "y", "label": "y"}}}, "metric 'x': not a row of the table"),
        ({"metrics": {"loss": {"name": "loss", "label": "gain"}}}, "metric 'loss' is in the table as"),
    ],
)
def test_a_run_whose_metric_nobody_defined_is_left_out(tmp_path, entries, problem):
    write_run(tmp_path, 0.7, **entries)
    found, unusable = split_usable(find_runs(tmp_path))
    assert not found
    assert re.search(problem, unusable[0].problem)


@pytest.mark.parametrize(
    ("metric", "wins"),
    [
        *(
            (metric, (1, 0, 0))
            for metric in ("rouge1", "rouge2", "f1", "f1_macro", "mcc", "spearman", "bleu_tokenized")
        ),
        *((metric, (0, 0, 1)) for metric in ("loss", "perplexity")),
    ],
)
def test_a_metric_beside_the_main_one_has_wins_in_its_own_direction(tmp_path, metric, wins):
    for alpha in (0.0, 1.0):
        write_run(tmp_path, 0.7, alpha=alpha, test={"accuracy": 0.7, metric: 0.5 + alpha / 10})
    (section,) = [section for section in only(tmp_path).sections if section.metric == metric]
    assert section.differences[0].wins_ties_losses == wins


@pytest.mark.parametrize(
    ("metric", "spelled"),
    [("f1_macro", "F1 macro"), ("rougeL", "ROUGE-L"), ("bleu_tokenized_split", "BLEU tokenized split")],
)
def test_a_metric_is_spelled_as_the_field_spells_it(metric: str, spelled: str) -> None:
    assert words(metric) == spelled


def test_twice_the_batch_belongs_to_a_recipe_in_epochs_with_twice_its_epochs(tmp_path):
    for name, batch, epochs, patience in (
        ("a", 32, 20.0, 3),
        ("b", 64, 40.0, 6),
        ("c", 64, 20.0, 6),
        ("d", 64, 40.0, 3),
    ):
        folder = write_run(tmp_path / name, 0.7, batch_size=batch)
        for file in ("recipe.json", "result.json"):
            content = json.loads((folder / file).read_text())
            content.get("recipe", content).update(updates=None, epochs=epochs, evaluate_every=None, patience=patience)
            (folder / file).write_text(json.dumps(content))
    found = comparisons(find_runs(tmp_path))
    assert sorted([arm.label for arm in comparison.arms] for comparison in found) == [
        ["baseline"],
        ["baseline"],
        ["baseline", "baseline, twice the batch"],
    ]


@pytest.mark.parametrize("epochs", [1.4, 1.5, 0.7, 3.0])
def test_three_times_the_batch_belongs_to_a_recipe_in_epochs_whatever_their_number(tmp_path, epochs):
    for name, alpha, batch, times in (("a", 0.0, 32, 1), ("b", 1.0, 32, 1), ("c", 0.0, 96, 3)):
        folder = write_run(tmp_path / name, 0.7, alpha=alpha, batch_size=batch, passes=3)
        for file in ("recipe.json", "result.json"):
            content = json.loads((folder / file).read_text())
            recipe = content.get("recipe", content)
            recipe.update(updates=None, epochs=times * epochs, evaluate_every=None, average_last=4 * times)
            (folder / file).write_text(json.dumps(content))
    assert labels(only(tmp_path)) == ["baseline", "R-Drop (alpha 1, 3 passes)", "baseline, three times the batch"]


def test_new_scores_are_not_said_to_be_of_the_predictions_that_the_runs_keep(tmp_path):
    for seed, (alpha, predicted) in product(range(6), ((0.0, (1, 0)), (1.0, (1, 1)))):
        folder = write_run(tmp_path, sum(predicted) / 2, alpha=alpha, seed=seed)
        of_all = {"label": 1, "confidence": 0.9, "loss": 0.5}
        rows = [of_all | {"example": str(place), "predicted": own} for place, own in enumerate(predicted)]
        write_predictions(folder, Predictions("classes", rows, ("no", "yes")))
    comparison = only(tmp_path)
    assert any(sentence.startswith("On this test set") for sentence in comparison.remarks())
    assert not any(s.startswith("On this test set") for s in replace(comparison, are_new_scores=True).remarks())


def test_notes_stand_below_the_table_once_with_the_arms_and_seeds_they_are_of(tmp_path):
    repeated = {"test texts that are trained on too": "3 of 40"}
    constant = {"predictions on test": "all 40 are 'yes': the model does not tell the classes apart"}
    for seed in (0, 1, 2):
        write_run(tmp_path, 0.7, seed=seed, notes=repeated | constant)
        more = constant if seed == 1 else {}
        write_run(tmp_path, 0.7, alpha=1.0, seed=seed, notes=repeated | more | {"started from": f"seed {seed}"})
        write_run(tmp_path, 0.7, batch_size=64, seed=seed, notes=repeated)
    (comparison,) = comparisons(find_runs(tmp_path))
    assert noted(comparison) == [
        "test texts that are trained on too: 3 of 40",
        f"predictions on test: {constant['predictions on test']} [baseline; R-Drop (alpha 1), seed 1]",
        "started from: seed 0 to 2 [R-Drop (alpha 1)]",
    ]
    for seed, name in enumerate(("one", "two", "three", "four"), start=3):
        write_run(tmp_path, 0.7, alpha=1.0, seed=seed, notes={"started from": name})
    (comparison,) = comparisons(find_runs(tmp_path))
    assert noted(comparison)[-2:] == [
        "started from: two [R-Drop (alpha 1), seed 4]",
        "started from: 2 more such notes, on other runs",
    ]


def test_notes_that_differ_only_in_numbers_are_one_line_with_the_range_of_each(tmp_path):
    for seed, (done, share, label) in enumerate(((900, -0.5, 1), (1020, 0.25, 1), (80, 4.0, 2))):
        notes = {"epochs": f"20 of 480 examples: {done:,} updates, {share} %, alpha (={seed}), run-{seed}"}
        write_run(tmp_path / "a", 0.7, seed=seed, notes={"predictions on test": f"all 40 are '{label}'"})
        write_run(tmp_path / "a", 0.7, alpha=1.0, seed=seed, notes=notes)
    (comparison,) = comparisons(find_runs(tmp_path / "a"))
    assert noted(comparison) == [
        "predictions on test: all 40 are '1' [baseline, seeds 0 and 1]",
        "predictions on test: all 40 are '2' [baseline, seed 2]",
        "epochs: 20 of 480 examples: 900 updates, -0.5 %, alpha (=0), run-0 [R-Drop (alpha 1), seed 0]",
        "epochs: 20 of 480 examples: 1,020 updates, 0.25 %, alpha (=1), run-1 [R-Drop (alpha 1), seed 1]",
        "epochs: 20 of 480 examples: 80 updates, 4.0 %, alpha (=2), run-2 [R-Drop (alpha 1), seed 2]",
    ]
    for seed, done in enumerate((900, 1020, 80)):
        notes = {"epochs": f"480 examples: {done:,} updates, -{seed} %"}
        write_run(tmp_path / "b", 0.7, seed=seed)
        write_run(tmp_path / "b", 0.7, alpha=1.0, seed=seed, notes=notes)
    (comparison,) = comparisons(find_runs(tmp_path / "b"))
    assert noted(comparison) == ["epochs: 480 examples: 80 to 1,020 updates, -2 to -0 % [R-Drop (alpha 1)]"]


def test_notes_of_two_arms_are_not_one_range(tmp_path):
    """What alpha rose to is told apart by the alpha of the arm: "2 to 9 of 4 to 10" would say that 9 may be of 4."""
    for alpha, seed, reached in ((4.0, 0, 2), (4.0, 1, 3), (10.0, 0, 7), (10.0, 1, 9)):
        notes = {"alpha": f"rose to {reached} of {alpha:g}"}
        write_run(tmp_path, 0.7, alpha=alpha, seed=seed, notes=notes)
    (comparison,) = comparisons(find_runs(tmp_path))
    assert noted(comparison) == [
        "alpha: rose to 2 to 3 of 4 [R-Drop (alpha 4)]",
        "alpha: rose to 7 to 9 of 10 [R-Drop (alpha 10)]",
    ]

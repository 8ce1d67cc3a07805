"""What the curves of finished runs say: each hint where it applies, and where it does not."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.finished_runs import FinishedRun, LostRun
from rdrop.experiments.comparison.hints import (
    alpha_too_large,
    best_early,
    cross_validation,
    hints,
    no_divergence,
    nothing_to_regularize,
    still_learning,
)
from rdrop.experiments.launch.plan import plan_arms
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.recipes import find_recipe

OVERFITS = [2.0, 1.5, 1.2, 1.0, 1.1, 1.2, 1.3, 1.4]
FALLS = [2.0, 1.5, 1.2, 1.0, 0.9, 0.85, 0.82, 0.81]
CONVERGED = [0.5, 0.7, 0.8, 0.81, 0.8, 0.81, 0.8, 0.81]
RISES = [0.5, 0.55, 0.6, 0.65, 0.7, 0.74, 0.78, 0.82]


def run(alpha: float, seed: int = 0, *, score: float = 0.8, notes: Any = None, data: Any = None, **curves: Any) -> Any:
    valid = {"loss": curves.pop("valid_loss", OVERFITS), "accuracy": curves.pop("accuracy", CONVERGED)}
    train = {"task_loss": [2.0, 1.0, 0.5, 0.3, 0.2, 0.1], "divergence": [0.0, 0.1, 0.05]} | curves
    rows = [
        {
            "kind": kind,
            "step": 10 * place,
            **{key: values[place - 1] for key, values in of.items() if place <= len(values)},
        }
        for kind, of in (("valid", valid), ("train", train))
        for place in range(1, 1 + max(map(len, of.values())))
    ]
    recipe = {"name": "digits", "seed": seed, "batch_size": 32, "data": data or {}}
    result = {"valid": {"accuracy": score}, "test": {"accuracy": score}, "notes": notes or {}}
    return FinishedRun(Path(f"{alpha}-{seed}"), recipe, Method(alpha=alpha), result, rows)


def arm(alpha: float, *runs: FinishedRun) -> Arm:
    method = Method(alpha=alpha)
    return Arm(method.label(), method, 32, runs)


def test_a_valid_loss_that_never_turned_up_says_that_there_is_little_to_regularize() -> None:
    assert nothing_to_regularize(arm(0.0, run(0.0, valid_loss=FALLS), run(0.0, 1, valid_loss=FALLS))) == (
        "The valid loss of the baseline never turned up: it has not overfitted, so there is little to regularize yet. "
        "Train longer before you judge (docs/when-it-helps.md)."
    )


@pytest.mark.parametrize("losses", [OVERFITS, FALLS[:5], [], [2.0, float("nan"), 1.0]])
def test_a_valid_loss_that_turned_up_on_a_seed_or_is_hardly_known_says_nothing(losses: list[float]) -> None:
    assert nothing_to_regularize(arm(0.0, run(0.0, valid_loss=FALLS), run(0.0, 1, valid_loss=losses))) is None


def test_a_valid_score_that_rises_at_the_end_says_that_it_is_still_learning() -> None:
    said = still_learning(arm(0.0, run(0.0, accuracy=RISES), run(0.0, 1, accuracy=RISES)), "accuracy")
    assert said == (
        "The valid accuracy of the baseline still rises at the end: it is still learning. Train longer before you "
        "judge (docs/when-it-helps.md)."
    )
    said = still_learning(arm(0.0, run(0.0, valid_loss=[*FALLS[:3], 0.8, 0.6, 0.4])), "loss")
    assert said is not None
    assert "The valid loss of the baseline still falls at the end" in said


@pytest.mark.parametrize(
    "others", [[CONVERGED], [CONVERGED, CONVERGED], [RISES[:5]], [[0.8] * 8], [[0.5, 0.9, *[0.6] * 6]]]
)
def test_a_converged_score_of_most_seeds_says_nothing_of_still_learning(others: list[list[float]]) -> None:
    runs = [run(0.0, seed, accuracy=scores) for seed, scores in enumerate(others)]
    assert still_learning(arm(0.0, *runs), "accuracy") is None
    assert still_learning(arm(0.0, *runs, run(0.0, 9, accuracy=RISES)), "accuracy") is None


def test_a_divergence_of_zero_says_that_r_drop_does_nothing() -> None:
    assert no_divergence(arm(1.0, run(1.0, divergence=[0.0, 1e-6, 0.0]), run(1.0, 1, divergence=[0.0]))) == (
        "The divergence of R-Drop (alpha 1) stays at 0: its passes hardly differ, so R-Drop does nothing. Raise the "
        "dropout rate, or let their inputs differ: views=each for images, a cutoff and its cutoff_ratio for texts "
        "(docs/when-it-helps.md)."
    )


def test_passes_that_have_views_and_do_not_differ_are_not_advised_to_have_them() -> None:
    views = Arm("R-Drop", Method(alpha=1.0, views="each"), 32, (run(1.0, divergence=[0.0]),))
    assert "Raise the dropout rate, or augment them more (" in str(no_divergence(views))


def test_a_divergence_is_measured_by_the_task_loss_of_its_time() -> None:
    assert no_divergence(arm(1.0, run(1.0, task_loss=[10.0, 0.01], divergence=[1e-4, 9e-4]))) is None


@pytest.mark.parametrize("divergence", [[0.0, 0.001], [0.1, 0.0], []])
def test_a_divergence_that_rose_once_or_is_not_known_says_nothing(divergence: list[float]) -> None:
    assert no_divergence(arm(1.0, run(1.0, divergence=divergence))) is None


def with_best(run: FinishedRun, step: int, **recipe: Any) -> FinishedRun:
    return replace(run, recipe=run.recipe | recipe, result=run.result | {"best_step": step})


@pytest.mark.parametrize(
    ("lengths", "settings"),
    [
        ({"updates": 100, "warmup_updates": 9}, "updates=50 warmup_updates=4"),
        ({"updates": None, "epochs": 5.0, "warmup_updates": 0}, "epochs=2.5"),  # an epoch is 10 updates
        ({"updates": None, "epochs": 15.0, "evaluate_every": None}, "epochs=7.5"),
    ],
)
def test_a_baseline_past_its_best_early_is_told_of_a_shorter_one_which_ends_the_hint(
    lengths: dict[str, Any], settings: str
) -> None:
    baseline = arm(0.0, *(with_best(run(0.0, seed), 10 * (1 + seed), **lengths) for seed in (0, 1)))
    said = best_early(baseline, [baseline])
    assert said is not None
    assert f"Set it beside, in `rdrop compare`: --arm 'alpha=0 {settings}' (docs/when-it-helps.md)." in said
    recipe = find_recipe("digits").replace(**{"alpha": 1.0, "epochs": None} | lengths)
    _, shorter, _ = plan_arms(recipe, [f"alpha=0 {settings}"], larger_batch=False).arms.values()
    planned = {key: value for key, value in shorter.saved().items() if key in lengths}
    other = arm(0.0, *(with_best(run(0.0, seed), 10, **planned) for seed in (0, 1)))
    assert best_early(baseline, [baseline, other]) is None


def test_a_baseline_past_its_best_early_on_most_seeds_is_told_on_how_many() -> None:
    baseline = arm(0.0, *(with_best(run(0.0, seed), step, updates=100) for seed, step in enumerate((10, 50, 60))))
    said = best_early(baseline, [baseline])
    assert said is not None
    assert "are from the first 50 % of its planned updates on 2 of 3 seeds." in said


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [((10, 60), {"updates": 100}), ((10, 10), {"epochs": 5.0, "evaluate_every": 7}), ((None, 10), {"updates": 100})],
)
def test_a_baseline_whose_best_is_late_on_half_of_the_seeds_or_not_known_says_nothing_of_a_shorter_one(
    steps: tuple[Any, ...], lengths: dict[str, Any]
) -> None:
    baseline = arm(0.0, *(with_best(run(0.0, seed), step, **lengths) for seed, step in enumerate(steps)))
    assert best_early(baseline, [baseline]) is None


def arms_given(said: str) -> list[str]:
    """The settings of each `--arm`, as a shell reads them."""
    return shlex.split(said.partition("`rdrop compare`: ")[2].partition(" (docs")[0])[1::2]


def test_the_hint_of_a_shorter_baseline_keeps_the_larger_batch_that_arms_would_replace() -> None:
    recipe = find_recipe("text-classification").replace(epochs=20.0, patience=3, **{"model.name": "minilm"})
    plain, _, larger = plan_arms(recipe, larger_batch=True).arms.values()
    arms = [
        Arm(label, of.method, of.batch_size or 0, (with_best(run(0.0), 20, **of.saved()),))
        for label, of in (("baseline", plain), ("baseline, twice the batch", larger))
    ]
    said = best_early(arms[0], arms)
    assert said is not None
    given = arms_given(said)
    assert given == ["alpha=0 batch_size=16 epochs=40 patience=6", "alpha=0 epochs=10"]
    found = plan_arms(recipe, given, larger_batch=True).arms
    assert larger in found.values()
    assert len(found) == 4


@pytest.mark.parametrize("is_lost", [False, True])
def test_the_hint_of_a_shorter_baseline_keeps_the_arms_that_a_recipe_brings(is_lost: bool) -> None:
    recipe = find_recipe("digits")
    planned = plan_arms(recipe, larger_batch=True).arms
    arms = [
        Arm(label, of.method, of.batch_size or 0, (replace(with_best(run(0.0), 20, **of.saved()), method=of.method),))
        for label, of in planned.items()
    ]
    if is_lost:
        lost = [(LostRun(Path(arm.label), arm.recipe, arm.method, "loss is nan"),) for arm in arms]
        arms[1:] = [replace(arm, runs=(), lost=own) for arm, own in zip(arms[1:], lost[1:], strict=True)]
    said = best_early(arms[0], arms)
    assert said is not None
    given = arms_given(said)
    assert given[-1] == "alpha=0 updates=500 warmup_updates=50 model.dropout=0.5"
    again = plan_arms(recipe, given, larger_batch=True).arms
    assert set(again) > set(planned)
    assert all(again[label] == of for label, of in planned.items())


def test_a_baseline_that_learned_nothing_is_not_advised_to_be_shorter() -> None:
    constant = {"accuracy": 0.8}
    learned, failed = (
        [
            replace(own, result=own.result | {"metric": "accuracy", "constant": constant, "test": {"accuracy": score}})
            for own in runs
        ]
        for score, runs in ((0.9, two_runs()), (0.8, two_runs()))
    )
    assert best_early(arm(0.0, *learned), []) is not None
    assert best_early(arm(0.0, *failed), []) is None


def two_runs() -> list[FinishedRun]:
    return [with_best(run(0.0, seed), 10, updates=100) for seed in (0, 1)]


def test_weights_that_are_a_mean_of_the_last_are_of_the_end() -> None:
    runs = [with_best(run(0.0, seed), 10, updates=100) for seed in (0, 1)]
    averaged = [replace(own, result=own.result | {"averaged_steps": [40, 60, 80, 100]}) for own in runs]
    assert best_early(arm(0.0, *runs), []) is not None
    assert best_early(arm(0.0, *averaged), []) is None


def test_the_settings_of_a_shorter_baseline_can_be_typed() -> None:
    """Large numbers have no exponent, and a warm-up that inverse-sqrt needs does not vanish."""
    lengths = {"updates": 3_000_001, "warmup_updates": 1, "batch_size": 1_048_576}
    baseline = arm(0.0, with_best(run(0.0), 10, **lengths))
    larger = Arm("baseline, twice the batch", Method(alpha=0.0), 2_097_152, (
        with_best(run(0.0), 10, **lengths | {"batch_size": 2_097_152}),
    ))  # fmt: skip
    rdrop = replace(arm(1.0, with_best(run(1.0), 10, **lengths)), batch=1_048_576)
    said = best_early(baseline, [baseline, rdrop, larger])
    assert said is not None
    assert "--arm 'alpha=0 batch_size=2097152' --arm 'alpha=0 updates=1500000'" in said


def test_settings_with_blanks_are_quoted_as_an_arm_reads_them() -> None:
    recipe = find_recipe("digits-vit").replace(updates=100, warmup_updates=10)
    plain = recipe.replace(method=recipe.method.plain())
    started = plain.replace(init_from="my runs/first")
    arms = [
        Arm(label, of.method, 32, (replace(with_best(run(0.0), 10, **of.saved()), method=of.method),))
        for label, of in (("baseline", plain), ("started", started), ("R-Drop", recipe))
    ]
    said = best_early(arms[0], arms)
    assert said is not None
    given = arms_given(said)
    assert started in plan_arms(recipe, given, larger_batch=True).arms.values()


def test_a_training_that_is_past_its_best_is_not_advised_to_be_longer_nor_one_that_still_learns_to_be_shorter() -> None:
    early = arm(0.0, *(with_best(run(0.0, seed, valid_loss=FALLS), 10, updates=100) for seed in (0, 1)))
    (said,) = hints(early, [early, arm(1.0, run(1.0))], "accuracy", pays=False)
    assert "planned to be shorter" in said
    learning = arm(
        0.0, *(with_best(run(0.0, seed, valid_loss=FALLS, accuracy=RISES), 10, updates=100) for seed in (0, 1))
    )
    (said,) = hints(learning, [learning, arm(1.0, run(1.0))], "accuracy", pays=False)
    assert "Train longer" in said


def test_a_training_that_its_patience_has_ended_is_not_advised_to_be_longer() -> None:
    for made, advised in ((80, False), (100, True)):
        runs = [with_best(run(0.0, seed, valid_loss=FALLS, accuracy=RISES), 70, updates=100) for seed in (0, 1)]
        baseline = arm(0.0, *(replace(own, result=own.result | {"updates": made}) for own in runs))
        assert (nothing_to_regularize(baseline) is not None) == advised
        assert (still_learning(baseline, "accuracy") is not None) == advised


SLOW = [2.0, 1.9, 1.8, 1.6, 1.4, 1.2]


def test_a_training_loss_far_above_the_baseline_s_says_that_alpha_is_too_large() -> None:
    baseline, rdrop = arm(0.0, run(0.0)), arm(5.0, run(5.0, task_loss=SLOW, score=0.7))
    assert alpha_too_large(rdrop, baseline, "accuracy") == (
        "The training loss of R-Drop (alpha 5) ends at 1.2, far above 0.1 of the baseline: alpha is too large. Lower "
        "it, or let it rise (alpha_schedule=quadratic) (docs/when-it-helps.md)."
    )
    rises = replace(rdrop, method=Method(alpha=5.0, alpha_schedule="quadratic"))
    assert str(alpha_too_large(rises, baseline, "accuracy")).endswith("Lower it (docs/when-it-helps.md).")


@pytest.mark.parametrize(
    "changes",
    [
        *({"task_loss": [2.0, 1.0, 0.8, 0.6, 0.5, 0.4], "score": 0.7}, {"task_loss": SLOW, "score": 0.9}),
        *({"task_loss": []}, {"task_loss": SLOW[1:], "score": 0.7}),  # of so few values nothing is said
    ],
)
def test_a_training_loss_a_little_above_or_a_better_valid_score_says_nothing_of_alpha(changes: dict[str, Any]) -> None:
    assert alpha_too_large(arm(5.0, run(5.0, **changes)), arm(0.0, run(0.0)), "accuracy") is None


def test_folds_are_said_with_what_they_mean() -> None:
    said = cross_validation([arm(0.0, run(0.0, data={"folds": 5}), run(0.0, 1, data={"folds": 5}))])
    assert said is not None
    assert said.startswith("Cross-validation: each seed is scored on a part of its own, of 5 (data.folds), and 2 seeds")
    assert "2 seeds are compared. Scores of different parts are of different examples. 3 of the parts are not" in said
    assert cross_validation([arm(0.0, run(0.0, data={"folds": None}), run(0.0, 1))]) is None
    scored = run(0.0, data={"folds": 5})
    assert cross_validation([arm(0.0, replace(scored, result=scored.result | {"test_file": "new.csv"}))]) is None


def test_seeds_beyond_the_folds_are_said_to_share_parts() -> None:
    said = cross_validation([arm(0.0, *(run(0.0, seed, data={"folds": 4}) for seed in (0, 1, 4)))])
    assert said is not None
    assert said.startswith("Cross-validation: each seed is scored on one part of 4 (data.folds), and 3 seeds are comp")
    assert (
        "The seeds that differ by a multiple of 4 are scored on the same part. 2 of the parts are not scored." in said
    )


def test_a_note_of_the_runs_is_not_said_a_second_time_as_a_hint() -> None:
    few = {"few examples": "10 texts in test score it"}
    arms = [arm(0.0, run(0.0, notes=few)), arm(1.0, run(1.0, score=0.9, notes=few))]
    assert hints(arms[0], arms, "accuracy", pays=False) == []


def test_a_comparison_that_can_be_judged_has_no_hint_and_plain_training_alone_has_none() -> None:
    baseline, rdrop = arm(0.0, run(0.0)), arm(1.0, run(1.0, score=0.9))
    assert hints(baseline, [baseline, rdrop], "accuracy", pays=False) == []
    learning = arm(0.0, run(0.0, valid_loss=FALLS, accuracy=RISES))
    assert hints(learning, [learning], "accuracy", pays=False) == []
    flat = arm(1.0, run(1.0, divergence=[0.0]))
    assert not any("overfitted" in said for said in hints(learning, [learning, flat], "accuracy", pays=True))
    found = hints(learning, [learning, flat], "accuracy", pays=False)
    assert [sentence.split(" of ")[0] for sentence in found] == [
        "The divergence",
        "The valid accuracy",
        "The valid loss",
    ]

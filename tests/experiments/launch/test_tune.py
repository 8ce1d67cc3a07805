"""The search chooses on valid, by seeds of its own; what it chose is compared on others; nothing is run twice."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rdrop.experiments.comparison.comparison import Arm, Comparison
from rdrop.experiments.comparison.finished_runs import FinishedRun
from rdrop.experiments.comparison.tuning import Tried, Tuning
from rdrop.experiments.comparison.wording import MINUS
from rdrop.experiments.launch import cli
from rdrop.experiments.launch.plan import Run
from rdrop.experiments.launch.tune import FIRST_SEED, MOST_IN_FULL, make_grid, plan_fresh, search, split_grid
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipes import find_recipe
from rdrop.experiments.run_folder import TUNING, RunFolder, find_runs
from rdrop.experiments.tasks.digits.recipes import DIGITS_VIT
from rdrop.experiments.training import trainer

BEST = {"alpha": 1.0, "model.dropout": 0.3}


def valid_score(recipe: Recipe) -> float:
    """R-Drop is best at alpha 1 with dropout 0.3, plain training with 0.1; the search's seeds flatter the former."""
    alpha, dropout = recipe.method.alpha, recipe.value("model.dropout")
    luck = 0.03 if alpha == 1.0 and recipe.seed >= FIRST_SEED else 0.0
    if alpha == 0:
        return 0.8 - abs(dropout - 0.1) / 10 + recipe.seed % 7 / 1000
    return 0.81 - abs(alpha - 1.0) / 100 - abs(dropout - 0.3) / 10 + luck + recipe.seed % 5 / 1000


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Training takes no time and scores by `valid_score`; on test it is the worse, the better it is on valid."""
    recipes: list[Recipe] = []

    def train(recipe: Recipe, folder: Path, **_: Any) -> dict[str, Any]:
        recipes.append(recipe)
        valid = valid_score(recipe)
        result = {
            "format": 1, "recipe": recipe.saved(), "digest": recipe.digest(), "finished": "2026-01-01T00:00:00Z",
            "metric": "accuracy", "higher_is_better": True, "updates": recipe.updates, "best_step": recipe.updates,
            "averaged_steps": [], "valid": {"accuracy": valid, "loss": 0.5},
            "test": {"accuracy": 1 - valid, "loss": 0.5},
            "cost": {"train_seconds": 1.0, "step_milliseconds": 1.0, "peak_extra_bytes": 1000, "parameters": 10},
            "machine": {}, "versions": {"rdrop": "0"}, "resumed": 0,
        }  # fmt: skip
        RunFolder(folder).write_recipe(recipe.saved())
        RunFolder(folder).write_result(result)
        return result

    monkeypatch.setattr(trainer, "train", train)
    return recipes


def test_a_setting_that_had_not_begun_is_marked_and_named_where_it_is_chosen(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = trainer.train

    def slow(recipe: Recipe, folder: Path, **options: Any) -> dict[str, Any]:
        result = train(recipe, folder, **options)
        if recipe.method.alpha == 1 and recipe.seed == 1001:
            RunFolder(folder).write_result(result | {"notes": {"has begun": "no: it is slow to begin"}})
        return result

    monkeypatch.setattr(trainer, "train", slow)
    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "R-Drop, alpha 1, model.dropout 0.3 had not begun to learn on 1 of 3 seeds of the search: train" in shown
    assert shown.count("R-Drop \N{DAGGER}") == 2  # with either dropout rate
    assert "\N{DAGGER}: a run of the setting had not begun to learn at its end." in shown
    page = (tmp_path / "digits-vit-tuning.html").read_text()
    assert "\N{DAGGER}: a run of the setting had not begun to learn at its end." in page


COMMAND = ["tune", "digits-vit", "alpha=0.3,1,3", "model.dropout=0.1,0.3", "--tune-seeds", "3", "--seeds", "6"]


def test_the_best_of_each_side_on_valid_are_compared_on_fresh_seeds(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    searched = [recipe for recipe in trained if recipe.seed >= FIRST_SEED]
    assert len(searched) == (3 * 2 + 2) * 3
    assert {recipe.seed for recipe in searched} == {1000, 1001, 1002}
    fresh = [recipe for recipe in trained if recipe.seed < FIRST_SEED]
    batch = DIGITS_VIT.batch_size
    assert batch is not None
    arms = {(recipe.method.alpha, recipe.value("model.dropout"), recipe.batch_size) for recipe in fresh}
    assert arms == {(0.0, 0.1, batch), (1.0, 0.3, batch), (0.0, 0.1, 2 * batch)}
    assert len(fresh) == 3 * 6

    shown = " ".join(capsys.readouterr().out.split())
    assert "8 settings tried: 6 of R-Drop, 2 of plain training, ranked by valid accuracy on 3 seeds from 1000." in shown
    assert "Chosen: R-Drop, alpha 1, model.dropout 0.3; plain training, model.dropout 0.1." in shown
    assert (
        "R-Drop's gain in valid accuracy: +3.9 points in the search, +0.9 on 6 fresh seeds: 24 % of it was left."
        in shown
    )
    record = json.loads((tmp_path / "digits-vit-tuning.json").read_text())
    assert record["chosen"] == {"rdrop": BEST, "plain": {"model.dropout": 0.1}}
    assert [arm["arm"] for arm in record["fresh"]] == [
        "baseline, dropout 0.1", "R-Drop (alpha 1)", "baseline, twice the batch, dropout 0.1",
    ]  # fmt: skip


def test_a_setting_is_known_by_what_was_typed(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` is an alpha of 4 with a schedule; here the constant 4 is the better by 0.1."""
    scores = {("constant", True): 0.8, ("quadratic", True): 0.7}
    monkeypatch.setitem(
        globals(), "valid_score", lambda recipe: scores.get((recipe.method.alpha_schedule, recipe.method.alpha > 0), 0)
        if recipe.method.alpha else 0.75,
    )  # fmt: skip
    assert (
        cli.run(["tune", "digits-vit", "alpha=4,auto", "--tune-seeds", "1", "--seeds", "6", "--runs", str(tmp_path)])
        == 0
    )
    shown = " ".join(capsys.readouterr().out.split())
    assert "Chosen: R-Drop, alpha 4; plain training." in shown
    assert "R-Drop's gain in valid accuracy: +5.0 points in the search, +5.0 on 6 fresh seeds" in shown
    record = json.loads((tmp_path / "digits-vit-tuning.json").read_text())
    assert [(tried["values"], tried["valid"]) for tried in record["tried"]] == [
        ({"alpha": 4}, {"1000": 0.8}), ({"alpha": "auto"}, {"1000": 0.7}), ({}, {"1000": 0.75}),
    ]  # fmt: skip


def test_progress_shows_the_score_that_chooses_and_ties_are_said(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "valid_score", lambda recipe: 0.75)
    command = ["tune", "digits-vit", "alpha=1,2,3", "--tune-seeds", "1", "--seeds", "2", "--runs", str(tmp_path)]
    assert cli.run(command) == 0
    out, progress = capsys.readouterr()
    of_search = [line for line in progress.splitlines() if "seed 1000" in line]
    assert len(of_search) == 4
    assert all("valid accuracy 75.0 %" in line and "test" not in line for line in of_search)
    assert all("test accuracy 25.0 %" in line for line in progress.splitlines() if "seed 0" in line)
    assert "Chosen: R-Drop, alpha 1 (the first of 3 with this score); plain training." in " ".join(out.split())


def test_the_report_compares_the_two_sides_as_the_search_does(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They differ in the dropout rate, so the runs alone do not say that they belong together."""
    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    of_search = " ".join(capsys.readouterr().out.split())
    assert cli.run(["report", str(tmp_path)]) == 0
    of_report = " ".join(capsys.readouterr().out.split())
    for reference in ("the baseline with dropout 0.1", "the baseline with twice the batch and dropout 0.1"):
        said = f"Too few seeds: R-Drop (alpha 1) against {reference} is accuracy "
        assert said in of_search
        assert said in of_report


def test_nothing_is_run_twice_and_the_page_is_the_same(trained: list[Recipe], tmp_path: Path) -> None:
    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    page, count = (tmp_path / "digits-vit-tuning.html").read_text(), len(trained)
    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    assert len(trained) == count
    assert (tmp_path / "digits-vit-tuning.html").read_text() == page
    # The fresh runs are those of a comparison by the same settings.
    compared = ["compare", "digits-vit", "alpha=1", "model.dropout=0.3", "--seeds", "6", "--no-double-batch"]
    assert cli.run([*compared, "--runs", str(tmp_path)]) == 0
    assert len(trained) == count + 6  # the baseline with that dropout


def test_another_search_has_a_page_of_its_own(trained: list[Recipe], tmp_path: Path) -> None:
    def pages() -> dict[str, str]:
        return {page.name: page.read_text() for page in tmp_path.glob("*-tuning*")}

    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    first = pages()
    assert sorted(first) == ["digits-vit-tuning.html", "digits-vit-tuning.json"]
    other = ["tune", "digits-vit", "alpha=0.5,2", "--tune-seeds", "2", "--seeds", "2", "--runs", str(tmp_path)]
    assert cli.run(other) == 0
    both = pages()
    assert both == first | {name: both[name] for name in ("digits-vit-tuning-2.html", "digits-vit-tuning-2.json")}
    assert cli.run([*other[:-4], "--seeds", "3", "--runs", str(tmp_path)]) == 0  # the same on more fresh seeds
    assert pages().keys() == both.keys()
    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    assert pages()["digits-vit-tuning.html"] == first["digits-vit-tuning.html"]


def test_keys_of_unlabeled_examples_are_those_of_rdrop(trained: list[Recipe], tmp_path: Path) -> None:
    recipe = find_recipe("digits-100")
    grid = make_grid(recipe, {"data.unlabeled_batch": ["32", "16"], "learning_rate": ["0.001", "0.002"]})
    assert (len(grid.rdrop), len(grid.plain)) == (4, 2)
    arms = plan_fresh(grid.rdrop[0], grid.plain[1], [0], tmp_path, larger_batch=True)
    assert [label for label in arms if label.startswith("baseline")] == [
        "baseline, learning rate 0.002",
        "baseline, twice the batch, learning rate 0.002",
    ]


@pytest.mark.parametrize("lost", [(1.0, 32), (0.0, 64), (0.0, 32)])
def test_an_arm_that_diverged_on_all_fresh_seeds_is_said_beside_the_others(
    lost: tuple[float, int],
    trained: list[Recipe],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scored = trainer.train

    def train(recipe: Recipe, folder: Path, **options: Any) -> dict[str, Any]:
        if recipe.seed < FIRST_SEED and (recipe.method.alpha, recipe.batch_size) == lost:
            RunFolder(folder).write_recipe(recipe.saved())
            RunFolder(folder).write_failure(12, "step 12: loss is nan. Lower alpha.")
            raise trainer.DivergedError(12, "step 12: loss is nan", "Lower alpha.")
        return scored(recipe, folder, **options)

    monkeypatch.setattr(trainer, "train", train)
    assert cli.run(["tune", "digits-vit", "alpha=0.5,1", "--tune-seeds", "1", "--seeds", "2", "--runs", str(tmp_path)])
    shown = " ".join(capsys.readouterr().out.split())
    assert "diverged (seeds 0 and 1): step 12: loss is nan (seed 0)." in shown
    record = json.loads((tmp_path / "digits-vit-tuning.json").read_text())
    assert [bool(arm["test"]) for arm in record["fresh"]].count(False) == 1


@pytest.mark.parametrize(("metric", "sign"), [("accuracy", 1), ("loss", -1)])
def test_a_gain_is_above_0_in_every_metric(metric: str, sign: int, tmp_path: Path) -> None:
    def arm(label: str, alpha: float, scores: tuple[float, ...]) -> Arm:
        runs = []
        for seed, score in enumerate(scores):
            recipe = DIGITS_VIT.replace(seed=seed, alpha=alpha)
            result = {"valid": {metric: score}, "test": {metric: score}, "metric": metric}
            runs.append(FinishedRun(tmp_path / f"{seed}-{alpha}", recipe.saved(), recipe.method, result, []))
        return Arm(label, runs[0].method, 32, tuple(runs))

    fresh = Comparison("digits", metric, (arm("baseline", 0, (0.5, 0.5)), arm("R-Drop", 1, (0.5 - sign * 0.1,) * 2)))
    rdrop, plain = (
        Tried({}, is_plain, dict.fromkeys((1000, 1001), 0.5 + gain))
        for is_plain, gain in ((False, sign * 0.2), (True, 0.0))
    )
    tuning = Tuning("digits", metric, (), (), (1000, 1001), (rdrop, plain), rdrop, plain, fresh, "")
    said = tuning.sentences_of_search()[-1]
    assert re.search(rf": \+[20.]+( points)? in the search, {MINUS}[10.]+ on 2 fresh seeds", said), said


def test_the_report_leaves_the_runs_of_the_search_out(trained: list[Recipe], tmp_path: Path) -> None:
    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    assert len(find_runs(tmp_path)) == 18
    assert len(find_runs(tmp_path / TUNING)) == 24


def test_the_page_shows_the_grid_as_a_picture(trained: list[Recipe], tmp_path: Path) -> None:
    assert cli.run([*COMMAND, "--runs", str(tmp_path)]) == 0
    page = (tmp_path / "digits-vit-tuning.html").read_text()
    picture = page[page.index("<svg") : page.index("</svg>")]
    for text in ("plain", ">0.3<", ">1<", ">3<", "model.dropout"):
        assert text in picture
    assert "<script" not in page
    assert page.count('class="verdict') >= 4


def test_a_large_grid_is_halved_over_the_seeds(trained: list[Recipe], tmp_path: Path) -> None:
    recipe = DIGITS_VIT
    fixed, values = split_grid(["alpha=0.2,0.4,0.6,0.8,1,1.2,1.4,1.6,1.8,2", "updates=500"])
    assert fixed == ["updates=500"]
    grid = make_grid(recipe, values)
    assert len(grid.rdrop) > MOST_IN_FULL
    rungs: list[int] = []

    def train(runs: Sequence[Run]) -> list[Any]:
        rungs.append(sum(run.recipe.method.alpha > 0 for run in runs))
        for run in runs:
            if run.result() is None:
                trainer.train(run.recipe, run.folder)
        return []

    tried, rdrop, *_ = search(grid, 3, tmp_path, train)
    assert rungs == [10 * 1, 5 * 2, 3 * 3]
    assert rdrop.values == {"alpha": 1}
    assert sorted(len(entry.scores) for entry in tried.values() if not entry.is_plain) == [1] * 5 + [2] * 2 + [3] * 3
    assert [len(entry.scores) for entry in tried.values() if entry.is_plain] == [3]


@pytest.mark.parametrize("status", [1, 3])
def test_a_setting_of_which_a_run_failed_is_not_chosen(
    status: int,
    trained: list[Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = trainer.train

    def failing(recipe: Recipe, folder: Path, **options: Any) -> dict[str, Any]:
        if recipe.method.alpha == 1.0 and recipe.seed == FIRST_SEED + 1:
            error = trainer.TrainingError("no room for it")
            raise trainer.DivergedError(4, "step 4: loss is nan", "Lower it.") if status == 3 else error
        return train(recipe, folder, **options)

    monkeypatch.setattr(trainer, "train", failing)
    # That a setting diverges is a finding; that a run fails otherwise is a failure.
    assert cli.run(["tune", "digits-vit", "alpha=1,3", "--seeds", "1", "--runs", str(tmp_path)]) == status % 3
    shown = " ".join(capsys.readouterr().out.split())
    assert "Chosen: R-Drop, alpha 3" in shown
    what = {1: "no room for it", 3: "step 4: loss is nan. Lower it."}[status]
    assert f"Not ranked: R-Drop, alpha 1: {what}" in shown


@pytest.mark.parametrize("valid", [{"accuracy": None}, {"accuracy": "NaN"}, {}])
def test_a_run_of_the_search_without_a_score_leaves_its_setting_out(
    valid: dict[str, Any], trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "digits-vit", "alpha=1,3", "--seeds", "1", "--runs", str(tmp_path)]
    assert cli.run(command) == 0
    (recipe,) = (r for r in trained if r.method.alpha == 1.0 and r.seed == FIRST_SEED + 1)
    (file,) = tmp_path.rglob(f"{recipe.digest()}/result.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"valid": valid}))
    capsys.readouterr()
    assert cli.run(command) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Not ranked: R-Drop, alpha 1: " in shown
    assert str(file.parent) in shown.replace(" ", "")


def test_a_damaged_run_on_fresh_seeds_is_named(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["tune", "digits-vit", "alpha=1,3", "--seeds", "1", "--runs", str(tmp_path)]
    assert cli.run(command) == 0
    recipe = next(r for r in trained if r.method.is_plain and r.seed < FIRST_SEED)
    (file,) = tmp_path.rglob(f"{recipe.digest()}/result.json")
    file.write_text("{")
    capsys.readouterr()
    assert cli.run(command) != 0
    assert f"rm {file}" in capsys.readouterr().err.replace("\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["alpha=1"], "a search needs several values of a key, e.g. alpha=0.3,1,3"),
        (["alpha=0,1"], "a search tries plain training anyway; leave 0 out"),
        (["seed=1,2"], "a search has its own; say how many with --tune-seeds and --seeds"),
        (["alpha=1,2", "seed=5"], "a search has its own; say how many with --tune-seeds and --seeds"),
        (["alpha=1,2", "alpha=3"], "alpha: given twice: 1,2 and 3; give all values at once"),
        (["alpah=1,2"], "no such key; the nearest is alpha"),
        (["alpha=1,2", "--seeds", "1000,"], "1000 is a seed of the search"),
        (["alpha=1,2", "--tune-seeds", "0"], "--tune-seeds"),
        (["alpha=1,2", "data.split_seed=0,1"], "is the same in both arms that a search compares"),
        (["alpha=1,2", "model.hidden_size=16,32"], "is the same in both arms that a search compares"),
        (["alpha=1,2", "batch_size=160", "data.train_labels=200"], "--no-double-batch omits it"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_trained(
    arguments: list[str], words: str, trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["tune", "digits-vit", *arguments, "--runs", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert trained == []


def test_a_search_over_folds_which_would_choose_on_test_examples_is_refused(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.csv").write_text("text,label\n" + "good,1\nbad,0\n" * 50)
    arguments = ["tune", "text-classification", "--train", str(tmp_path / "train.csv"), "alpha=1,2"]
    assert cli.run([*arguments, "data.folds=10", "--runs", str(tmp_path)]) == 2
    assert "data.folds=10: a search would choose on examples that other seeds are tested on" in " ".join(
        capsys.readouterr().err.split()
    )
    assert trained == []


@pytest.mark.parametrize(
    ("in_search", "on_fresh", "words"),
    [
        (0.04, (0.01, 0.0101), "+4.0 points in the search, +1.0 on 2 fresh seeds: 25 % of it was left."),
        (0.02, (0.03, 0.0301), ": all of it was left."),
        (0.02, (-0.01, -0.0101), "\N{MINUS SIGN}1.0 on 2 fresh seeds: none of it was left."),
        (-0.02, (0.03, 0.0301), "; the search had found no gain."),
        (0.02, (0.0, 0.2), "; how much of it was left cannot be said: the 95 % interval on fresh seeds holds 0."),
        (0.02, (0.03, 0.03), "; how much of it was left cannot be said: there is no spread to tell."),
    ],
)
def test_what_was_left_of_the_gain_is_said_in_words(
    in_search: float, on_fresh: tuple[float, float], words: str, trained: list[Recipe], tmp_path: Path
) -> None:
    def finished(seed: int, alpha: float, valid: float) -> FinishedRun:
        recipe = DIGITS_VIT.replace(seed=seed, alpha=alpha)
        trainer.train(recipe, tmp_path / f"{seed}-{alpha}")
        (record,) = find_runs(tmp_path / f"{seed}-{alpha}")
        assert record.recipe is not None
        assert record.result is not None
        result = record.result | {"valid": {"accuracy": valid}}
        return FinishedRun(record.path, record.recipe, recipe.method, result, [])

    arms = [
        Arm(label, DIGITS_VIT.method, 32, tuple(finished(seed, alpha, 0.8 + gain) for seed, gain in enumerate(gains)))
        for label, alpha, gains in (("baseline", 0.0, (0.0, 0.0)), ("R-Drop", 1.0, on_fresh))
    ]
    rdrop, plain = (
        Tried({}, is_plain, dict.fromkeys((1000, 1001), 0.8 + gain))
        for is_plain, gain in ((False, in_search), (True, 0.0))
    )
    fresh = Comparison("digits", "accuracy", tuple(arms))
    tuning = Tuning("digits", "accuracy", (), (), (1000, 1001), (rdrop, plain), rdrop, plain, fresh, "")
    assert tuning.sentences_of_search()[-1].endswith(words)


@pytest.mark.parametrize(
    ("setting", "values"),
    [
        ("dropout=[0.1,0.3],[0.1,0.1]", ["[0.1,0.3]", "[0.1,0.1]"]),
        ('data.folder="a,b",c', ['"a,b"', "c"]),
        ("cutoff=null,token", ["null", "token"]),
    ],
)
def test_a_comma_within_brackets_or_quotes_is_part_of_a_value(setting: str, values: list[str]) -> None:
    assert list(split_grid([setting])[1].values()) == [values]


def test_a_search_end_to_end_in_a_small_form(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["tiny=true", "updates=4", "warmup_updates=0", "evaluate_every=2", "alpha=1,2", "model.dropout=0.1,0.2"]
    command = ["tune", "digits-vit", *small, "--tune-seeds", "1", "--seeds", "1", "--runs", str(tmp_path)]
    assert cli.run(command) == 0
    first = capsys.readouterr().out
    assert "6 settings tried" in first
    assert (tmp_path / "digits-vit-tiny-tuning.html").exists()
    assert cli.run(command) == 0
    again, progress = capsys.readouterr()
    assert again == first
    assert "6 of 6 runs finished already" in progress

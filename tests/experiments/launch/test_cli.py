"""The command line: one line and the right exit status for every mistake; runs are neither repeated nor lost."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import count
from pathlib import Path
from types import NoneType
from typing import Any

import pytest
from accelerate.utils import LoggerType
from rich.console import Console
from tests.experiments import tiny_runs

from rdrop.experiments.launch import check, cli
from rdrop.experiments.launch.plan import plan_comparison
from rdrop.experiments.launch.progress import SECONDS_BETWEEN_LINES, Bars, Lines, show_progress, time_left
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import find_recipe
from rdrop.experiments.report.page import write_report
from rdrop.experiments.run_folder import RunFolder, find_runs
from rdrop.experiments.tasks.digits.recipes import DIGITS_VIT
from rdrop.experiments.training import trainer

KEYS = list(DIGITS_VIT.descriptions())
NOT_A_NUMBER = ("", "abc", "true", "[1]", "{}", '"1"', "NaN", "Infinity", "-Infinity", "1e999", "0x10", "1_0", "-1")
WRONG_VALUES = {
    int: (*NOT_A_NUMBER, "1.0", "0.5", "1e3", "null", "99999999999999999999", "9" * 5000),
    float: (*NOT_A_NUMBER, ".5", "1.", "0,1", "1e", "[" * 2000, "9" * 400),
    str: ("", "null", "3", "true", "../runs", "a/b", "-x", ".x", "a b", "Cosine", "fp16", "\ud800", "x" * 101),
    bool: ("", "null", "1", "True", "yes", '"true"', "[]", "0.5"),
    NoneType: ("", "abc", "true", "-1", '"1"', "[2]", "NaN", "[" * 2000),
}


MEANT = {
    "name": ("Cosine", "fp16"),
    "init_from": ("", "abc", '"1"', "[" * 2000),  # what is read as text may name a folder
    "evaluate_every": ("null",),  # once an epoch
    "checkpoint_every": ("null",),
}
"""Of the values that are wrong for a type, those that a key takes."""


def wrong_values() -> Iterator[tuple[str, str]]:
    for key in KEYS:
        kind = type(DIGITS_VIT.value(key))
        for value in WRONG_VALUES[kind]:
            if value not in MEANT.get(key, ()):
                yield key, f"{key}={value}"


def wrong_keys() -> Iterator[tuple[str, str]]:
    for key in KEYS:
        value = json.dumps(DIGITS_VIT.value(key))
        for wrong in (key[1:], key[:-1], key + "s", key.upper(), f"data.{key}", f"{key}.{key}", key.replace("_", "-")):
            if wrong not in KEYS:
                yield wrong, f"{wrong}={value}"
        yield key, key
        yield key, f"{key}:{value}"


MUTATED = [*wrong_values(), *wrong_keys()]


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: Any, **__: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(trainer, "train", train)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    """Training takes no time, scores by the seed and the method, and is noted here."""
    recipes: list[Recipe] = []

    def train(
        recipe: Recipe, folder: Path, *, on_progress: Callable[[trainer.Progress], None], trackers: Sequence[str]
    ) -> dict[str, Any]:
        recipes.append(recipe)
        on_progress(trainer.Progress(recipe.updates, recipe.updates, 0.5, {"accuracy": 0.75, "loss": 0.5}, 0.01))
        return finish(recipe, folder)

    monkeypatch.setattr(trainer, "train", train)
    monkeypatch.setattr(cli, "write_pages", lambda runs: None)
    return recipes


def finish(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """With R-Drop all seeds are better but the sixth, which is equal: six show nothing, and nine do."""
    gain = 0.05 + recipe.seed / 1000 if recipe.method.alpha and recipe.seed != 5 else 0.0
    accuracy = 0.7 + recipe.seed / 100 + gain
    result = {
        "format": 1, "recipe": recipe.saved(), "digest": recipe.digest(),
        "finished": "2026-01-01T00:00:00Z", "metric": "accuracy", "best_step": recipe.updates,
        "valid": {"accuracy": accuracy, "loss": 0.5}, "test": {"accuracy": accuracy, "loss": 0.5},
        "cost": {"train_seconds": 1.0, "step_milliseconds": 1.0, "peak_extra_bytes": 1000, "parameters": 10},
        "machine": {}, "versions": {}, "resumed": 0,
    }  # fmt: skip
    RunFolder(folder).write_recipe(recipe.saved())
    RunFolder(folder).write_result(result)
    return result


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on the standard error, without its `rdrop: `."""
    error = capsys.readouterr().err
    assert error.startswith("rdrop: ")
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return error.removeprefix("rdrop: ").strip()


@pytest.mark.usefixtures("no_training")
def test_every_mutated_setting_is_refused_by_one_line_that_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(MUTATED) >= 500
    for key, setting in MUTATED:
        assert cli.run(["train", "digits-vit", setting, "--runs", str(tmp_path)]) == 2, setting
        line = complaint(capsys)
        assert key[:50] in line, setting
        assert len(line) < 400, setting
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("command", ["train", "compare", "check", "list"])
def test_every_command_refuses_a_wrong_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([command, "digits-vit", "alhpa=1"]) == 2
    assert complaint(capsys) == "alhpa=1: no such key; the nearest is alpha"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "digits"], "No such command 'trian'"),
        (["train"], "Missing argument 'RECIPE'"),
        (["train", "digits-vit", "--seed", "3"], "No such option: --seed. A setting of the recipe is written without "),
        (
            ["train", "digits-vit", "--seeds", "3"],
            "No such option: --seeds. A setting of the recipe is written without ",
        ),
        (
            ["compare", "digits", "--alpha=1"],
            "option: --alpha. A setting of the recipe is written without hyphens: alpha=",
        ),
        (["compare", "digits", "--batch-size", "8"], "without hyphens: batch_size=..."),
        (["compare", "digits", "--seed", "8"], "--seeds"),
        (["compare", "digits", "--what", "8"], "No such option: --what"),
        (["compare", "digits", "--arm", "alpha=0 dropout=0.3"], "leave it out; the rate of the model is model.dropout"),
        (["train", "digit"], 'recipe="digit": no such recipe; the nearest is digits'),
        (["train", "alpha=1"], "no such recipe; rdrop list shows all"),
        (["list", "nope"], "no such recipe; rdrop list shows all"),
        (["check", "digits", "device=cpu"], 'device="cpu": no such key; rdrop list RECIPE shows all'),
        (["check", "digits", "nonsense"], "nonsense: a setting is written key=value; rdrop list RECIPE shows the keys"),
        (["train", "nowhere/recipe.json"], "nowhere/recipe.json: recipe: No such file or directory"),
        (["compare", "digits-vit", "--seeds", "0"], "'0' is neither a number of seeds, such as 5, nor a list"),
        (["compare", "digits-vit", "--seeds", "1,1"], "nor a list of different ones"),
        (["compare", "digits-vit", "--seeds", "two"], "'two' is neither"),
        (["compare", "digits-vit", "--seeds", "-3"], "'-3' is neither"),
        (["compare", "digits-vit", "--seeds", "-1,2"], "'-1,2' is neither"),
        (["compare", "digits-vit", "--seeds", "1_0"], "'1_0' is neither"),
        (["compare", "digits-vit", "--seeds", "1,4294967296"], "seed=4294967296: must be less than 4294967296"),
        (["compare", "digits-vit", "--seeds", "9" * 30], "is neither"),
        (["train", "digits", "--runs", "a", "--runs=b"], "--runs: given 2 times; it is taken once"),
        (["bench", "--rows", "1", "--rows", "2"], "No such option: --rows"),
        (["train", "digits", "--alpha", "1", "--alpha", "2"], "written without hyphens: alpha=..."),
        (["evaluate", "runs", "--test", "a", "--test", "b", "--test", "c"], "--test: given 3 times; it is taken once"),
        (["compare", "digits-vit", "alpha=0"], "alpha=0: a comparison needs R-Drop, alpha > 0"),
        (["compare", "digits-vit", "seed=3"], "seed: a comparison has several; say which with --seeds"),
        (
            ["compare", "digits-vit", "batch_size=160", "data.train_labels=200"],
            "2 times the batch; --no-double-batch omits it",
        ),
        (
            ["report", "nowhere"],
            "nowhere does not exist. Give the folder that holds the runs; `rdrop compare digits` makes",
        ),
    ],
)
@pytest.mark.usefixtures("no_training")
def test_a_wrong_command_is_one_line_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    assert words in complaint(capsys)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["train", "text-classification"], "--train"),
        (["tune", "text-classification", "alpha=1,2"], "--train"),
        (["evaluate", "runs"], "--test"),
    ],
)
def test_a_file_in_the_place_of_a_setting_is_told_its_option(
    arguments: list[str], option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my reviews.csv"
    file.touch()
    assert cli.run([*arguments, str(file)]) == 2
    assert complaint(capsys).endswith(f"a setting is written key=value; give it as {option} '{file}'")


def test_a_recipes_keys_can_be_read_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    recipe = find_recipe("glue-stsb-minilm")
    assert cli.run(["list", recipe.name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = " ".join(" ".join(lines).split())
    for key, description in recipe.descriptions().items():
        assert f"{key} {json.dumps(recipe.value(key))} {description}" in listed  # nothing is cut off
    assert len(lines) < 5 * len(recipe.descriptions())  # no column of one word a line


def test_markup_in_a_wrong_setting_is_shown_as_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "digits-vit", "[bold]=1"]) == 2
    assert "[bold]=1" in complaint(capsys)


def test_the_arms_of_a_seed_follow_each_other_and_differ_in_the_method_alone(
    trained: list[Recipe], tmp_path: Path
) -> None:
    assert cli.run(["compare", "digits-vit", "alpha=0.5", "--seeds", "3,7", "--runs", str(tmp_path)]) == 0
    batch = DIGITS_VIT.batch_size
    arms = [(0.0, batch), (0.5, batch), (0.0, 2 * batch)]
    assert [(r.seed, r.method.alpha, r.batch_size) for r in trained] == [
        (seed, *arm) for seed in (3, 7) for arm in arms
    ]
    assert len({r.replace(seed=0, alpha=1.0, batch_size=batch).digest() for r in trained}) == 1


@pytest.mark.parametrize(
    ("arms", "seeds"),
    [(["--no-double-batch"], 6), ([], 7), ([part for n in "23456" for part in ("--arm", f"alpha={n}")], 8)],
)
def test_by_default_there_are_as_many_seeds_as_can_show_a_difference(
    trained: list[Recipe], tmp_path: Path, arms: list[str], seeds: int
) -> None:
    assert cli.run(["compare", "digits-vit", *arms, "--runs", str(tmp_path)]) == 0
    assert sorted({recipe.seed for recipe in trained}) == list(range(seeds))
    contests = len(trained) // seeds - 1
    assert 2 / 2**seeds * contests <= 0.05 < 2 / 2 ** (seeds - 1) * contests


def test_the_larger_batch_has_as_many_examples_as_rdrop_has_passes(tmp_path: Path) -> None:
    plan = plan_comparison(DIGITS_VIT.replace(passes=3, batch_size=10), [0], tmp_path, larger_batch=True)
    assert plan[-1].recipe.batch_size == 30
    assert plan[-1].label == "baseline, three times the batch, seed 0"


def test_a_larger_batch_in_epochs_averages_the_weights_of_as_many_updates(tmp_path: Path) -> None:
    """It has a score after each of its epochs, which have half the updates, and so twice as many scores."""
    of_epochs = DIGITS_VIT.replace(updates=None, epochs=20.0, evaluate_every=None, average_last=4, patience=3)
    larger = plan_comparison(of_epochs, [0], tmp_path, larger_batch=True)[-1].recipe
    assert (larger.epochs, larger.average_last, larger.patience) == (40.0, 8, 6)
    one = plan_comparison(of_epochs.replace(average_last=1), [0], tmp_path, larger_batch=True)[-1].recipe
    assert one.average_last == 1  # none are averaged
    by_updates = of_epochs.replace(evaluate_every=50)
    assert plan_comparison(by_updates, [0], tmp_path, larger_batch=True)[-1].recipe.average_last == 4


def test_rdrop_cutoff_and_simcut_stand_in_one_table_against_one_baseline(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    simcut = ["alpha=6", "cutoff=embedding", "cutoff_ratio=0.05", "task_passes=first", "divergence=from-first"]
    for settings in ([], ["cutoff=unknown", "cutoff_ratio=0.05"], simcut, ["every=2"], ["dropout=[0.1,0.3]"]):
        assert cli.run(["compare", "digits-vit", *settings, "--seeds", "1", "--runs", str(tmp_path)]) == 0
    alpha = DIGITS_VIT.method.alpha
    assert [recipe.method.alpha for recipe in trained] == [0, alpha, 0, alpha, 6, alpha, alpha]  # both baselines once
    capsys.readouterr()
    assert cli.run(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("digits-vit: 1 seed") == 1
    for arm in ("R-Drop (", "R-Drop + unknown cutoff (", "SimCut ("):
        assert f"{arm}alpha" in shown


def test_seeds_and_arms_that_are_there_are_not_left_out_of_a_verdict_that_asks_for_others(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else whoever picks seeds or an alpha after a look has a verdict that is not corrected for the picking."""
    assert cli.run(["compare", "digits-vit", "alpha=0.5", "--seeds", "8", "--runs", str(tmp_path)]) == 0
    capsys.readouterr()
    assert cli.run(["compare", "digits-vit", "alpha=0.5", "--seeds", "0,2,3", "--runs", str(tmp_path)]) == 0
    assert "digits-vit: 8 seeds" in capsys.readouterr().out
    assert cli.run(["compare", "digits-vit", "alpha=2", "--seeds", "9,10", "--runs", str(tmp_path)]) == 0
    of_compare = capsys.readouterr().out
    assert "digits-vit: 10 seeds" in of_compare
    assert "p is corrected for 4 comparisons" in " ".join(of_compare.split())
    assert cli.run(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == of_compare


def test_a_comparison_shows_table_and_verdict(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", "digits-vit", "--seeds", "8", "--runs", str(tmp_path)]) == 0
    out, progress = capsys.readouterr()
    said = " ".join(out.replace(f" (alpha {DIGITS_VIT.method.alpha:g})", "").split())
    assert "R-Drop is better than the baseline" in said
    assert "p is corrected for 2 comparisons" in said
    assert progress.splitlines()[0] == " 1/24  baseline, seed 0: test accuracy 70.0 %, trained in 1 s"
    assert len(progress.splitlines()) == len(trained) == 24


@pytest.mark.usefixtures("trained")
def test_seeds_may_be_added_and_the_verdict_says_that_somebody_had_looked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "digits-vit", "--no-double-batch", "--runs", str(tmp_path), "--seeds"]
    assert cli.run([*command, "6"]) == 0
    assert "Seeds were added" not in capsys.readouterr().out
    write_report(tmp_path)
    assert cli.run([*command, "9"]) == 0
    out, progress = capsys.readouterr()
    assert "12 of 18 runs finished already" in progress
    assert "Seeds were added after the verdict on 6 seeds had been seen." in " ".join(out.split())


def test_finished_runs_are_not_repeated(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "digits-vit", "--runs", str(tmp_path), "--seeds"]
    assert cli.run([*command, "2"]) == 0
    table = capsys.readouterr().out
    assert cli.run([*command, "2"]) == 0
    again, progress = capsys.readouterr()
    assert len(trained) == 6
    assert again == table
    assert progress == "6 of 6 runs finished already\n"
    assert cli.run([*command, "1,2"]) == 0
    assert [recipe.seed for recipe in trained[6:]] == [2, 2, 2]


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(
    trained: list[Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train, calls = trainer.train, count(1)

    def interrupted(*arguments: Any, **options: Any) -> dict[str, Any]:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(trainer, "train", interrupted)
    command = ["compare", "digits-vit", "--seeds", "2", "--runs", str(tmp_path)]
    assert cli.run(command) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"rdrop: stopped, with 2 of 6 runs finished; go on with: rdrop {' '.join(command)}"
    assert cli.run(command) == 0
    assert len(trained) == 6
    assert len({recipe.digest() for recipe in trained}) == 6


def test_a_run_stopped_by_sigterm_has_its_own_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def preempted(*_: Any, **__: Any) -> None:
        raise trainer.Preempted(15, 10, tmp_path)

    monkeypatch.setattr(trainer, "train", preempted)
    assert cli.run(["train", "digits-vit", "--runs", str(tmp_path)]) == 143
    assert "0 of 1 runs finished" in complaint(capsys)


def test_a_run_that_cannot_go_on_is_one_line_and_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any, **__: Any) -> None:
        raise trainer.TrainingError("the recipe does not fit its task. Lower updates.")

    monkeypatch.setattr(trainer, "train", failing)
    assert cli.run(["train", "digits-vit", "--runs", str(tmp_path)]) == 1
    alpha = f"{DIGITS_VIT.method.alpha:g}"
    assert complaint(capsys) == f"digits-vit, alpha {alpha}, seed 0: the recipe does not fit its task. Lower updates."


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_tracker_that_cannot_be_used_is_named_before_anything_is_loaded(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    given = [command, "digits-vit", "tiny=true", "--runs", str(tmp_path), "--tracker", "tensorboard", "--tracker"]
    assert cli.run([*given, "foo"]) == 2
    said, known = complaint(capsys).split("Accelerate knows ")
    assert said == "--tracker foo: no such tracker; "
    assert {"comet_ml", "tensorboard", "wandb"} <= set(known.split(", "))
    assert cli.run([*given, "comet_ml"]) == 2
    assert complaint(capsys) == (
        f"--tracker comet_ml: Accelerate does not find it; pip install comet-ml, or take another of {known}"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_tracker_that_is_here_is_told_of_the_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    command = ["train", "digits-vit", "tiny=true", "updates=2", "warmup_steps=0", "--runs", str(tmp_path)]
    assert cli.run([*command, "--tracker", "tensorboard"]) == 0
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_two_processes_show_and_write_once(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rdrop"]
    settings = [
        "tiny=true",
        "updates=2",
        "warmup_steps=0",
        "--seeds",
        "1",
        "--no-double-batch",
        "--runs",
        str(tmp_path),
    ]
    command = [sys.executable, *launcher, "compare", "digits-vit", *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Nothing to compare: no run") == done.stdout.count("report.html") == 1
    assert done.stderr.count("1/2  baseline, seed 0: test accuracy") == 1
    assert done.stderr.count("2/2  R-Drop") == 1
    assert [run.result["machine"]["processes"] for run in find_runs(tmp_path) if run.result] == [2, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "digits-vit-tiny",
        "looks.jsonl",
        "report.html",
        "results.html",
    ]


def test_a_damaged_result_is_named_and_not_trained_over(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits-vit" / DIGITS_VIT.digest()
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{")
    assert cli.run(["train", "digits-vit", "--runs", str(tmp_path)]) == 2
    assert str(folder / "result.json") in complaint(capsys)
    assert trained == []


def test_check_tells_whether_rdrop_can_act(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["model.layers=1", "model.hidden_size=8", "model.heads=2", "model.intermediate_size=8"]
    assert cli.run(["check", "digits-vit", *small]) == 0
    assert "R-Drop can act" in capsys.readouterr().out
    without = ["alpha=0", "model.dropout=0", "model.attention_dropout=0"]
    assert cli.run(["check", "digits-vit", *small, *without, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert [finding["code"] for finding in found["findings"]] == ["no-dropout"]


@pytest.mark.parametrize("recipe", [["digits"], ["image-classification", "tiny=true", "model.zero_head=false"]])
def test_check_says_that_views_alone_make_passes_differ(recipe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["views=each", "model.dropout=0"]
    settings += ["model.attention_dropout=0", "data.flip=true"] if len(recipe) > 1 else []
    assert cli.run(["check", *recipe, *settings, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(finding["code"], finding["severity"]) for finding in found["findings"]] == [("no-dropout", "note")]
    assert found["divergence"] > 0


def test_check_measures_two_views_where_each_pass_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    def divergence(views: str) -> float:
        assert cli.run(["check", "digits", f"views={views}", "--json"]) == 0
        return float(json.loads(capsys.readouterr().out)["divergence"])

    assert divergence("each") > 1.5 * divergence("same")


def test_check_cuts_the_inputs_where_training_does(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["text-classification", "tiny=true", "model.dropout=0", "model.attention_dropout=0"]
    assert cli.run(["check", *tiny, "cutoff=token", "cutoff_ratio=0.2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(finding["code"], finding["severity"]) for finding in found["findings"]] == [("no-dropout", "note")]
    assert found["divergence"] > 0
    assert cli.run(["check", "digits", "views=same", "cutoff=token", "cutoff_ratio=0.2"]) == 2
    assert "must be null: digits has no tokens to cut" in complaint(capsys)


def test_check_measures_the_passes_by_their_own_dropout_rates(capsys: pytest.CaptureFixture[str]) -> None:
    def divergence(*settings: str) -> float:
        assert cli.run(["check", "digits-vit", *settings, "--json"]) == 0
        return float(json.loads(capsys.readouterr().out)["divergence"])

    assert divergence("dropout=[0.5,0.5]") > 1.5 * divergence("dropout=[0.1,0.1]")


@pytest.mark.parametrize(
    ("recipe", "settings", "name"),
    [
        ("glue-stsb", ["dropout=[0.1,0.5]"], "squared difference"),
        ("glue-stsb", ["cutoff=token", "cutoff_ratio=0.5"], "squared difference"),
        ("glue-rte", ["cutoff=token", "cutoff_ratio=0.5", "divergence=from-first"], "KL from the first pass"),
        ("glue-rte", ["cutoff=token", "cutoff_ratio=0.5"], "symmetric KL"),
    ],
)
def test_check_measures_the_divergence_that_training_uses(
    recipe: str, settings: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["check", recipe, "tiny=true", *settings]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("divergence")]
    assert f"({name} of two passes of this batch" in line
    assert float(line.split()[1]) > 0


@pytest.mark.parametrize("setting", ["views=each", "encoder_once=true", "fused=true"])
def test_what_the_task_cannot_do_is_refused_with_status_2(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", "glue-rte", "tiny=true", setting, "--runs", str(tmp_path)]) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err


def test_the_arms_that_a_recipe_brings_are_those_of_its_entry_whatever_it_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def arms(*settings: str) -> list[str]:
        given = ["compare", *settings, "--seeds", "1", "--commands", "--runs", str(tmp_path)]
        assert cli.run(given) == 0
        return sorted(line.replace(" name=mine", "") for line in capsys.readouterr().out.splitlines())

    assert arms("digits", "name=mine") == arms("digits")
    assert len(arms("digits")) == 6
    assert len(arms("digits-vit", "name=digits")) == 3


def test_check_refuses_views_of_a_task_that_does_not_change_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_runs.RECIPE.replace(views="each")
    monkeypatch.setattr(check, "load_task", tiny_runs.TinyTask)
    with pytest.raises(RecipeError, match='views="each": must be "same"'):
        check.check_recipe(recipe)


def test_report_shows_the_finished_runs_and_names_the_others(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", "digits-vit", "--seeds", "2", "--runs", str(tmp_path)]) == 0
    table = capsys.readouterr().out
    unfinished = tmp_path / "digits-vit" / "unfinished"
    RunFolder(unfinished).write_recipe(DIGITS_VIT.saved())
    assert cli.run(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(table)
    assert f"left out: {unfinished}: unfinished" in shown


@pytest.mark.usefixtures("trained")
def test_two_comparisons_of_one_name_are_told_apart_by_their_titles(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in ("80", "81"):
        given = ["compare", "digits-vit", f"data.train_labels={size}", "--seeds", "1", "--runs", str(tmp_path)]
        assert cli.run([*given, "--no-double-batch"]) == 0
    capsys.readouterr()
    assert cli.run(["report", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for size in ("80", "81"):
        assert f"digits-vit (data.train_labels = {size}): 1 seed " in shown


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize("command", [["compare", "digits-vit", "--seeds", "1", "--runs"], ["report"]])
def test_a_comparison_shows_the_notes_on_its_scores(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["compare", "digits-vit", "--seeds", "1", "--runs", str(tmp_path)]) == 0
    for run in find_runs(tmp_path):
        assert run.result is not None
        RunFolder(run.path).write_result(run.result | {"notes": {"classes of test": "no example of '7'"}})
    capsys.readouterr()
    assert cli.run([*command, str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("classes of test: no example of '7'\n") == 1


def test_a_saved_recipe_replays_the_run(
    trained: list[Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["train", "digits-vit", "alpha=0.5", "seed=3", "--runs", str(tmp_path / "a")]) == 0
    saved = next((tmp_path / "a").rglob("recipe.json"))
    assert cli.run(["train", str(saved), "--runs", str(tmp_path / "b")]) == 0
    assert trained[0] == trained[1]
    assert (tmp_path / "b" / saved.relative_to(tmp_path / "a")).exists()
    assert "accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("averaged", "said"),
    [
        ([], f"The weights of update {DIGITS_VIT.updates}, the best on the valid split."),
        ([20], "The weights of update 20."),
        ([10, 20], "The mean of the weights of updates 10 and 20."),
        ([10, 20, 30], "The mean of the weights of updates 10, 20 and 30."),
    ],
)
def test_a_run_says_whose_weights_were_scored_and_the_notes_on_its_scores(
    averaged: list[int], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "digits-vit" / DIGITS_VIT.digest()
    notes = {"decoded by": "ctranslate2 4", "signature of bleu": "nrefs:1|case:lc"}
    RunFolder(folder).write_result(finish(DIGITS_VIT, folder) | {"averaged_steps": averaged, "notes": notes})
    assert cli.run(["train", "digits-vit", "--runs", str(tmp_path)]) == 0
    *_, first, second, last = capsys.readouterr().out.splitlines()
    assert (first, second) == ("decoded by: ctranslate2 4", "signature of bleu: nrefs:1|case:lc")
    assert last == f"{said} {folder}"


def test_list_shows_every_key_of_a_recipe_with_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "digits-vit", "alpha=0.625"]) == 0
    shown = capsys.readouterr().out
    assert "0.625" in shown
    assert all(f" {key} " in shown for key in KEYS)


@pytest.mark.parametrize(
    ("text", "seeds"), [("1", [0]), ("3", [0, 1, 2]), ("7,", [7]), ("3,5", [3, 5]), ("5,3,", [5, 3])]
)
def test_seeds_are_a_number_of_them_or_a_list(text: str, seeds: list[int]) -> None:
    assert cli.parse_seeds(text) == seeds


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 0
    assert "Usage: rdrop" in capsys.readouterr().out


def test_list_and_help_import_neither_torch_nor_plotting(tmp_path: Path) -> None:
    # The package's contents page imports torch; the stand-in shows what the command itself asks for.
    program = """
import sys, types
package = types.ModuleType("rdrop")
package.__path__ = [sys.argv[1]]
sys.modules["rdrop"] = package
from rdrop.experiments.launch.cli import run
assert run(["list"]) == run(["list", "digits-vit"]) == run(["--help"]) == 0
heavy = {"torch", "transformers", "accelerate", "matplotlib", "numpy", "scipy", "sklearn"} & set(sys.modules)
assert not heavy, heavy
"""
    package = Path(__file__).parents[3] / "src/rdrop"
    command = [sys.executable, "-c", program, str(package)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)  # where there are no runs
    assert (done.returncode, done.stderr) == (0, "")


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert capsys.readouterr().out == f"rdrop {version('rdrop-torch')}\n"


@pytest.mark.parametrize("missing", ["typer", "rich", "pydantic"])
def test_without_the_extra_the_command_says_how_to_install_it(missing: str) -> None:
    program = f"import sys, runpy; sys.modules[{missing!r}] = None; runpy.run_module('rdrop', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"rdrop: the command needs {missing}, which is not installed; "
        "in a clone of the repository: pip install '.[experiments]'\n"
    )


def test_bars_show_the_run_and_all_runs_in_80_columns() -> None:
    console = Console(record=True, force_terminal=True, width=80)
    recipes = [DIGITS_VIT.replace(seed=seed) for seed in range(3)]
    with show_progress(console, recipes, recipes[1:]) as display:
        assert isinstance(display, Bars)
        label = "baseline, twice the batch, seed 1"
        display.start(label, recipes[1])
        display.update(label, trainer.Progress(10, recipes[1].updates, 0.5, {"accuracy": 0.75, "loss": 0.6}, 0.01))
        console.print(display.live.get_renderable())
        display.finish(label, "2/3  baseline, twice the batch, seed 1: done")
    lines = console.export_text().splitlines()
    assert any("all runs" in line and "1/3" in line and line.rstrip().endswith("left") for line in lines)
    assert any("baseline, twice the batch, seed 1" in line and f"10/{recipes[1].updates}" in line for line in lines)
    assert any("100 updates/s, loss 0.5, valid accuracy 0.75" in line for line in lines)
    assert any(line.startswith("2/3  baseline") for line in lines)


def test_each_of_several_runs_has_a_bar_and_a_speed() -> None:
    console = Console(record=True, force_terminal=True, width=80)
    recipes = [DIGITS_VIT.replace(seed=seed) for seed in range(4)]
    with show_progress(console, recipes, recipes) as display:
        assert isinstance(display, Bars)
        for number, recipe in enumerate(recipes[:3]):
            display.start(f"seed {number}", recipe)
        display.update("seed 1", trainer.Progress(400, 800, 0.5, None, 0.01))
        display.finish("seed 0", "1/4  seed 0: done")
        console.print(display.live.get_renderable())
    lines = console.export_text().splitlines()[-5:]
    assert "all runs" in lines[0]
    assert "1/4" in lines[0]
    assert [line.split("━")[0].strip() for line in lines[1:3]] == ["seed 1", "seed 2"]
    assert "400/800" in lines[1]
    assert lines[3] == "seed 1: 100 updates/s, loss 0.5"
    assert lines[4] == "seed 2: loading the data, building the model"


def test_lines_are_sparse() -> None:
    console = Console(record=True, width=80)
    times = iter([0.0, 1.0, SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LINES, SECONDS_BETWEEN_LINES + 1])
    display = Lines(console, clock=lambda: next(times))
    display.start("baseline, seed 0", DIGITS_VIT)
    for step in (1, 2, 3):
        display.update("baseline, seed 0", trainer.Progress(step, 400, 0.5, None, 0.01))
    assert console.export_text() == "baseline, seed 0: 2/400, 4 s left, 100 updates/s, loss 0.5\n"


@pytest.mark.parametrize(
    ("updates", "words"),
    [(0, "0 s"), (99, "99 s"), (180, "3 min"), (5900, "98 min"), (9000, "2.5 h"), (360_000, "100.0 h")],
)
def test_the_time_left_is_that_of_the_updates_left(updates: int, words: str) -> None:
    assert time_left(trainer.Progress(100, 100 + updates, 0.5, None, 1.0)) == words

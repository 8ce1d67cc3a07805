"""Arms that differ in more than method and batch: how they are asked for, named, remembered and compared."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.experiments.run_folders import result_of, write_run, write_three_arms

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.comparison import Comparison, comparisons
from rdrop.experiments.comparison.contest import Outcome
from rdrop.experiments.comparison.designs import FILE, Design, arm_digest, read_designs, record_designs
from rdrop.experiments.comparison.terminal_table import terminal_table
from rdrop.experiments.comparison.wording import TIMES
from rdrop.experiments.launch import cli, plan
from rdrop.experiments.launch.plan import plan_arms
from rdrop.experiments.recipe import Method, Recipe
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import ARMS, RECIPES
from rdrop.experiments.report.page import write_report
from rdrop.experiments.run_folder import ResultsError, RunFolder, find_runs
from rdrop.experiments.tasks.digits.recipes import DIGITS, DIGITS_VIT
from rdrop.experiments.training import trainer

ARM_TEXTS = (
    "alpha=0 updates=4x warmup_updates=4x",
    "alpha=0 model.dropout=0.3",
    "alpha=0 select_by=loss",
    "model.dropout=0 model.attention_dropout=0 views=each data.shift=1",
)
LABELS = (
    "baseline",
    "baseline, four times the updates",
    "baseline, dropout 0.3",
    "baseline, stopped at its best valid loss",
)
SUBJECT = "R-Drop (alpha 1)"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("alpha=0 updates=4x warmup_updates=4x", "baseline, four times the updates"),
        ("alpha=0 updates=3200", "baseline, four times the updates"),
        ("alpha=0 updates=1200", "baseline, 1200 updates"),
        ("alpha=0 updates=2x warmup_updates=80 evaluate_every=50", "baseline, twice the updates, evaluate every 50"),
        ("alpha=0 updates=2x warmup_updates=50", "baseline, twice the updates, warmup updates 50"),
        ("alpha=0 batch_size=2x model.dropout=0.3", "baseline, twice the batch, dropout 0.3"),
        ("alpha=0 model.attention_dropout=0.3", "baseline, attention dropout 0.3"),
        ("alpha=0 model.dropout=0 model.attention_dropout=0", "baseline, no dropout"),
        ("alpha=0 select_by=loss patience=3", "baseline, patience 3, stopped at its best valid loss"),
        ("alpha=0 schedule=linear learning_rate=0.5x", "baseline, learning rate 0.0005, linear schedule"),
        ("alpha=0 clip_norm=null", "baseline, no clip norm"),
        ("views=each", "R-Drop (alpha 1, a view per pass)"),
        ("views=each data.unlabeled=all", "R-Drop (alpha 1, a view per pass), unlabeled"),
        (
            "views=each data.unlabeled=all data.unlabeled_batch=32 model.dropout=0 model.attention_dropout=0",
            "R-Drop (alpha 1, a view per pass), unlabeled, no dropout, 32 unlabeled per update",
        ),
        ("alpha=4 alpha_schedule=quadratic updates=0.5x", "R-Drop (alpha 4, quadratic), 400 updates"),
    ],
)
def test_an_arm_is_named_by_what_it_differs_in(text: str, label: str) -> None:
    found = plan_arms(DIGITS_VIT, [text], larger_batch=True)
    assert set(found.arms) == {"baseline", SUBJECT, label}
    assert found.subject == SUBJECT


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha=0 data.train_labels=100", r"^data\.train_labels=100: is the same in all arms; they may differ in"),
        ("alpha=0 seed=3", r"^seed=3: is the same in all arms"),
        ("alpha=0 model.layers=3", r"^model\.layers=3: is the same in all arms"),
        ("alpha=0 views=each", r'^views="each": means nothing to an arm of plain training'),
        ("alpha=0 data.unlabeled=all", r'^data\.unlabeled="all": means nothing to an arm of plain training'),
        ("alpha=1", r"^arm: R-Drop \(alpha 1\) is an arm already: the recipe and its baseline always are$"),
        ("alpha=0", r"^arm: baseline is an arm already: the recipe and its baseline always are$"),
        ("updates=0.3331x", r'^updates="0.3331x"|^updates=.*0.3331x of 800 is not a whole number'),
        ("precision=2x", r'^precision="2x": is the same in all arms'),
        ("epochs=2x", r'^epochs="2x": the recipe has updates=\d+: write updates=2x$'),
        ("batch_tokens=2x", r'^batch_tokens="2x": the recipe has batch_size=\d+: write batch_size=2x$'),
        ("schedule=2x", r'^schedule="2x": is no number in the recipe that 2x could be a multiple of'),
        ("alhpa=0", r"^alhpa=0: no such key; the nearest is alpha"),
        ("alpha", r"^alpha: a setting is written key=value"),
        ("alpha=0 'x", r"^arm=.*: cannot be read \(No closing quotation\): quote values as in a shell"),
    ],
)
def test_an_arm_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        plan_arms(DIGITS_VIT, [text], larger_batch=True)


def test_an_arm_given_twice_in_other_words_is_refused() -> None:
    twice = ["alpha=0 updates=2x", f"alpha=0 updates={2 * DIGITS_VIT.total_updates}"]
    with pytest.raises(RecipeError, match=r"^arm: baseline, twice the updates is an arm already; leave it out once$"):
        plan_arms(DIGITS_VIT, twice, larger_batch=True)


def test_an_arm_may_start_from_the_weights_of_another_run() -> None:
    arms = plan_arms(DIGITS_VIT, ["alpha=0 init_from=runs/both", "init_from=runs/both"], larger_batch=False).arms
    assert list(arms) == [
        "baseline",
        "baseline, started from both",
        "R-Drop (alpha 1), started from both",
        "R-Drop (alpha 1)",
    ]
    assert arms["R-Drop (alpha 1), started from both"] == DIGITS_VIT.replace(init_from="runs/both")


def test_arms_of_one_name_are_told_apart_by_their_settings() -> None:
    texts = [
        "init_from=a/both",
        "init_from=b/both",
        "alpha=0 learning_rate=0.00100000001",
        "alpha=0 learning_rate=0.00100000002",
    ]
    arms = plan_arms(DIGITS_VIT.replace(learning_rate=0.002), texts, larger_batch=False).arms
    assert list(arms) == [
        "baseline",
        "R-Drop (alpha 1), started from both",
        "R-Drop (alpha 1), started from both, init_from=b/both",
        "baseline, learning rate 0.001",
        "baseline, learning rate 0.001, learning_rate=0.00100000002",
        "R-Drop (alpha 1)",
    ]


def test_a_multiple_is_a_whole_number_whatever_binary_fractions_make_of_it() -> None:
    recipe = DIGITS_VIT.replace(updates=3000)
    arms = plan_arms(recipe, ["alpha=0 updates=1.1x"], larger_batch=False).arms
    assert arms["baseline, 3300 updates"].updates == 3300


def test_an_arm_may_say_in_updates_how_long_it_is_where_the_recipe_has_epochs() -> None:
    recipe = DIGITS_VIT.replace(updates=None, epochs=20.0)
    arms = plan_arms(recipe, ["alpha=0 updates=500"], larger_batch=False).arms
    assert [(arm.updates, arm.epochs) for arm in arms.values()] == [(None, 20.0), (500, None), (None, 20.0)]


def test_an_arm_of_twice_the_batch_is_the_one_that_stands_without_arms() -> None:
    """As many updates and scores, where the recipe counts them in epochs."""
    for scored in (None, 50):
        recipe = DIGITS_VIT.replace(updates=None, epochs=20.0, patience=3, average_last=2, evaluate_every=scored)
        standard = plan_arms(recipe, larger_batch=True).arms["baseline, twice the batch"]
        assert (
            plan_arms(recipe, ["alpha=0 batch_size=2x"], larger_batch=False).arms["baseline, twice the batch"]
            == standard
        )
    arms = plan_arms(recipe, ["alpha=0 batch_size=2x epochs=20"], larger_batch=False).arms
    assert arms["baseline, twice the batch"].epochs == 20.0


def test_a_plain_arm_is_spoken_of_as_part_of_a_sentence() -> None:
    phrases = {
        "baseline, twice the updates": "the baseline with twice the updates",
        "baseline, started from both": "the baseline, started from both",
        "baseline, dropout 0.3, stopped at its best valid loss": (
            "the baseline with dropout 0.3, stopped at its best valid loss"
        ),
    }
    assert {label: Arm(label, Method(alpha=0), 8, ()).phrase for label in phrases} == phrases


def test_without_arms_there_are_the_baseline_the_recipe_and_the_larger_batch() -> None:
    found = plan_arms(DIGITS_VIT, larger_batch=True)
    assert list(found.arms) == ["baseline", SUBJECT, "baseline, twice the batch"]
    assert found.designs() == []
    assert list(plan_arms(DIGITS_VIT, larger_batch=False).arms) == ["baseline", SUBJECT]


@pytest.mark.parametrize("name", ARMS)
def test_a_recipe_may_bring_arms_of_its_own_and_all_of_them_can_be(name: str) -> None:
    found = plan_arms(RECIPES[name], larger_batch=True)
    assert len(found.arms) == len(ARMS[name]) + 1
    assert next(iter(found.arms.values())).method.is_plain
    assert found.arms[found.subject] == RECIPES[name]
    without = plan_arms(RECIPES[name], larger_batch=False)
    assert set(found.arms) - set(without.arms) == {label for label in found.arms if "the batch" in label}
    given = plan_arms(RECIPES[name], ["alpha=0 updates=3x"], larger_batch=True)
    assert list(given.arms) == ["baseline", "baseline, three times the updates", found.subject]


def test_an_arm_of_the_recipe_that_the_settings_rule_out_says_how_to_go_on() -> None:
    with pytest.raises(RecipeError, match=r"this is the arm .* that digits brings, in whose place --arm puts others"):
        plan_arms(DIGITS.replace(views="same", **{"data.shift": 0}), larger_batch=True)


def finish_all(runs: Path, found: plan.Plan, seeds: range, gains: dict[str, float]) -> None:
    for label, recipe in found.arms.items():
        for seed in seeds:
            own = recipe.replace(seed=seed)
            folder = RunFolder(runs / own.name / own.digest())
            folder.write_recipe(own.saved())
            flat = own.model_dump() | own.method.model_dump() | {"warmup_steps": 0}
            score = 0.8 + gains.get(label, 0.0) + 0.001 * ((seed * 7) % 5)
            folder.write_result(result_of(flat, own.digest(), score) | {"recipe": own.saved()})


def designed(runs: Path, *texts: str, recipe: Recipe = DIGITS_VIT, seeds: range = range(8)) -> Comparison:
    found = plan_arms(recipe, texts, larger_batch=True)
    finish_all(runs, found, seeds, {SUBJECT: 0.03, "baseline, dropout 0.3": 0.01})
    record_designs(runs, found.designs())
    (comparison,) = comparisons(find_runs(runs), designs=read_designs(runs))
    return comparison


def test_the_arms_of_a_design_are_one_comparison_whose_verdict_is_about_its_subject(tmp_path: Path) -> None:
    comparison = designed(tmp_path, "alpha=0 model.dropout=0.3", "alpha=4", "alpha=0 updates=2x")
    assert [arm.label for arm in comparison.arms] == [
        "baseline", "baseline, dropout 0.3", "baseline, twice the updates", "R-Drop (alpha 4)", SUBJECT,
    ]  # fmt: skip
    assert comparison.baseline is comparison.arms[0]
    against = {contest.reference.label: contest.outcome for contest in comparison.contests}
    assert all(contest.arm.label == SUBJECT for contest in comparison.contests)
    assert against == dict.fromkeys([arm.label for arm in comparison.arms[:-1]], Outcome.UNDECIDED)
    assert "the baseline with dropout 0.3" in comparison.verdict()


def test_the_time_of_a_design_is_that_of_the_whole_training(tmp_path: Path) -> None:
    comparison = designed(tmp_path, "alpha=0 updates=4x")
    for run in comparison.arms[1].runs:
        run.result["cost"] |= {"train_seconds": 4 * run.result["cost"]["train_seconds"]}
    console = Console(width=200, file=io.StringIO())
    console.print(terminal_table(comparison))
    text = console.file.getvalue()
    [row, *_] = (line for line in text.splitlines() if line.startswith("baseline, four times the updates"))
    assert f"{TIMES}4.00" in row
    assert "time: of the whole training" in text


def test_a_design_s_rows_have_the_differences_of_its_verdict(tmp_path: Path) -> None:
    comparison = designed(tmp_path, "alpha=0 model.dropout=0.3", "alpha=4", "alpha=0 updates=2x")
    *others, last = comparison.sections[0].rows
    contests = {contest.reference.label: contest for contest in comparison.contests}
    assert {row.arm.label: (row.difference, row.p_value) for row in others} == {
        label: (contest.difference, contest.p_value) for label, contest in contests.items()
    }
    assert (last.arm.label, last.difference) == (SUBJECT, None)
    console = Console(width=200, file=io.StringIO())
    console.print(terminal_table(comparison))
    assert "diff.: last arm minus this one" in console.file.getvalue()


def undecided(runs: Path) -> Comparison:
    """Makes a design of four contests, of which the last shows no difference."""
    designed(runs, "alpha=0 model.dropout=0.3", "alpha=0 updates=2x", "alpha=4")
    for file in runs.rglob("result.json"):
        result = json.loads(file.read_text())
        if result["recipe"]["method"]["alpha"] == 4:
            result["test"]["accuracy"] += 0.04 * (result["recipe"]["seed"] % 2)
            file.write_text(json.dumps(result))
    (comparison,) = comparisons(find_runs(runs), designs=read_designs(runs))
    return comparison


def test_the_remarks_on_each_contest_can_be_left_out_where_there_are_many(tmp_path: Path) -> None:
    comparison = undecided(tmp_path)
    assert any(remark.startswith("With this spread") for remark in comparison.remarks())
    brief = comparison.remarks(contests=2)
    assert brief[0].startswith("p is corrected for 4 comparisons")
    assert not any(remark.startswith("With this spread") for remark in brief)
    assert comparison.remarks(contests=4) == comparison.remarks()


def test_a_design_s_page_unfolds_the_remarks_and_warns_of_no_choice(tmp_path: Path) -> None:
    comparison = undecided(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    folded = page.partition("<details>")[2].partition("</details>")[0]
    left_out = set(comparison.remarks()) - set(comparison.remarks(contests=2))
    assert folded.count("<li>") == len(left_out) > 0
    assert "stand against one baseline" not in page


def test_without_the_design_the_same_runs_are_the_comparisons_that_they_were(tmp_path: Path) -> None:
    designed(tmp_path, "alpha=0 model.dropout=0.3", "alpha=0 updates=2x")
    (tmp_path / FILE).unlink()
    found = comparisons(find_runs(tmp_path), designs=read_designs(tmp_path))
    assert sorted([arm.label for arm in comparison.arms] for comparison in found) == [
        ["baseline"], ["baseline"], ["baseline", SUBJECT],
    ]  # fmt: skip


def test_old_folders_are_compared_as_ever_and_runs_of_no_design_beside_one_too(tmp_path: Path) -> None:
    write_three_arms(tmp_path)
    before = comparisons(find_runs(tmp_path))
    assert comparisons(find_runs(tmp_path), designs=read_designs(tmp_path)) == before
    write_run(tmp_path, 0.7, updates=800, seed=3)
    found = plan_arms(DIGITS_VIT, ["alpha=0 model.dropout=0.3"], larger_batch=True)
    finish_all(tmp_path, found, range(2), {})
    record_designs(tmp_path, found.designs())
    after = comparisons(find_runs(tmp_path), designs=read_designs(tmp_path))
    assert [comparison for comparison in after if comparison in before] == before
    assert len(after) == len(before) + 2


def test_a_design_without_its_baseline_compares_nothing(tmp_path: Path) -> None:
    designed(tmp_path, "alpha=0 model.dropout=0.3")
    for run in find_runs(tmp_path):
        if run.recipe["method"]["alpha"] == 0 and run.recipe["model"]["dropout"] == 0.1:
            shutil.rmtree(run.path)
    (comparison,) = comparisons(find_runs(tmp_path), designs=read_designs(tmp_path))
    assert comparison.baseline is None
    assert comparison.verdict().startswith("Nothing to compare")


def test_two_designs_of_one_baseline_and_subject_are_one_with_the_arms_of_both(tmp_path: Path) -> None:
    designed(tmp_path, "alpha=0 model.dropout=0.3")
    comparison = designed_again(tmp_path, "alpha=0 updates=2x")
    assert [arm.label for arm in comparison.arms] == [
        "baseline", "baseline, dropout 0.3", "baseline, twice the updates", SUBJECT,
    ]  # fmt: skip
    assert len((tmp_path / FILE).read_text().splitlines()) == 2


def test_two_arms_of_one_name_that_were_asked_for_apart_both_stay() -> None:
    """Twice the updates, with as long a warmup and with twice as long a one."""
    arms = [{"baseline": "b0", "twice": digest, "R-Drop": "r0"} for digest in ("111111aa", "222222bb", "111111aa")]
    first, *others = (Design(of, "R-Drop") for of in arms)
    for other in others:
        first = first.with_arms_of(other)
    assert dict(first.arms) == {"baseline": "b0", "twice": "111111aa", "twice (222222)": "222222bb", "R-Drop": "r0"}


def designed_again(runs: Path, text: str) -> Comparison:
    found = plan_arms(DIGITS_VIT, [text], larger_batch=True)
    new = plan.Plan(
        {label: arm for label, arm in found.arms.items() if label == "baseline, twice the updates"}, "", False
    )
    finish_all(runs, new, range(8), {})
    record_designs(runs, found.designs())
    record_designs(runs, found.designs())  # the same again is not a line more
    (comparison,) = comparisons(find_runs(runs), designs=read_designs(runs))
    return comparison


def test_a_design_is_found_from_the_folder_of_the_recipe_and_of_a_run_too(tmp_path: Path) -> None:
    designed(tmp_path, "alpha=0 model.dropout=0.3")
    found = read_designs(tmp_path)
    (recipe,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert len(found) == 1
    assert read_designs(recipe) == read_designs(next(recipe.iterdir())) == found


@pytest.mark.parametrize(
    "line", ["", "{}", '{"arms": [], "subject": "a"}', '{"arms": {"b": "1"}, "subject": "a"}', "[1]"]
)
def test_a_line_that_is_no_design_is_named(tmp_path: Path, line: str) -> None:
    record_designs(tmp_path, [Design({"baseline": "0" * 12, "R-Drop": "1" * 12}, "R-Drop")])
    (tmp_path / FILE).write_text((tmp_path / FILE).read_text() + line + "\n")
    with pytest.raises(ResultsError, match=r"arms\.jsonl:2: is no list of arms .*Delete the line"):
        read_designs(tmp_path)
    (tmp_path / FILE).write_text('{"arms": {"baseline"')  # cut off by a crash
    assert read_designs(tmp_path) == []
    design = Design({"baseline": "0" * 12, "R-Drop": "1" * 12}, "R-Drop")
    record_designs(tmp_path, [design])
    assert read_designs(tmp_path) == [design]


def test_the_name_of_an_arm_is_the_digest_of_its_run_with_seed_0() -> None:
    assert arm_digest(DIGITS.replace(seed=7).saved()) == DIGITS.digest()


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Recipe]:
    recipes: list[Recipe] = []

    def train(recipe: Recipe, folder: Path, **options: Any) -> dict[str, Any]:
        recipes.append(recipe)
        run = RunFolder(folder)
        run.write_recipe(recipe.saved())
        score = 0.8 + 0.002 * recipe.seed + (0.03 if recipe.method.alpha else 0.0)
        flat = recipe.model_dump() | recipe.method.model_dump() | {"warmup_steps": 0}
        run.write_result(result_of(flat, recipe.digest(), score) | {"recipe": recipe.saved()})
        return run.result() or {}

    monkeypatch.setattr(trainer, "train", train)
    return recipes


def test_compare_trains_the_arms_that_are_asked_for_and_reports_them(
    tmp_path: Path, trained: list[Recipe], capsys: pytest.CaptureFixture[str]
) -> None:
    arms = [part for text in ARM_TEXTS[:3] for part in ("--arm", text)]
    command = ["compare", "digits-vit", *arms, "--seeds", "2", "--runs", str(tmp_path)]
    assert cli.run([*command, "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 5
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "rdrop"
        assert cli.run(arguments) == 0  # each trains its run
    assert len(trained) == 10
    capsys.readouterr()
    assert cli.run(command) == 0
    assert len(trained) == 10, "the runs of the printed commands are those of the comparison"
    out = " ".join(capsys.readouterr().out.split())
    assert all(label.split(", ")[-1] in out for label in LABELS)
    assert out.count("digits-vit: 2 seeds") == 1
    assert cli.run(["report", str(tmp_path)]) == 0
    page = (tmp_path / "report.html").read_text()
    assert all(label in page for label in (*LABELS, SUBJECT))
    assert write_report(tmp_path).read_text() == page
    [overview] = re.findall(r'<div class="overview">.*?</figure>', page, re.DOTALL)
    assert page.index("verdict first") < page.index(overview) < page.index("<table")
    for label in (*LABELS, SUBJECT):
        assert re.search(rf"{re.escape(label)}: 8[03]\.\d.*? time {TIMES}", overview), label
        assert f">{label}</text>" in overview


def test_an_arm_of_other_data_is_one_line_on_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "digits-vit", "--arm", ARM_TEXTS[3], "--runs", str(tmp_path)]
    assert cli.run(command) == 2
    assert "data.shift=1: is the same in all arms" in capsys.readouterr().err
    assert not tmp_path.joinpath(FILE).exists()


def test_the_lines_of_the_file_are_json_with_the_names_that_readers_see(tmp_path: Path, trained: list[Recipe]) -> None:
    assert cli.run(["compare", "digits-vit", "--arm", ARM_TEXTS[1], "--seeds", "1", "--runs", str(tmp_path)]) == 0
    (line,) = (tmp_path / FILE).read_text().splitlines()
    found = json.loads(line)
    assert list(found["arms"]) == ["baseline", "baseline, dropout 0.3", SUBJECT]
    assert found["subject"] == SUBJECT
    assert set(found["arms"].values()) == {recipe.digest() for recipe in trained}

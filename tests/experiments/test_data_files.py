"""A data file that is edited: no result of the earlier content is taken for one of the new."""

import json
import os
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.experiments.run_folders import write_run
from tests.experiments.tasks.test_pretrained import bert, saved, tokenizer

from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.comparison.designs import Design, arm_digest
from rdrop.experiments.launch import cli
from rdrop.experiments.recipe import override
from rdrop.experiments.recipes import RECIPES
from rdrop.experiments.report.settings import distinguishing_settings, titled
from rdrop.experiments.run_folder import find_runs
from rdrop.experiments.run_folder.data_files import below, changed, contents_of, noting
from rdrop.experiments.tasks.digits.recipes import DigitsRecipe
from rdrop.experiments.tasks.task import load_task

SHORT = ["tiny=true", "data.tiny=false", "updates=2", "warmup_updates=1", "evaluate_every=2", "checkpoint_every=1"]


OF_ITS_OWN = [f"model.{key}=null" for key in ("vocabulary", "layers", "hidden_size", "heads", "intermediate_size")]


def write_rows(path: Path, factor: int = 1) -> Path:
    """Texts with a number each."""
    path.write_text("text,label\n" + "".join(f"{'long ' * (row % 7)}text,{factor * row}\n" for row in range(40)))
    return path


def run(what: str, file: Path, *more: str) -> int:
    given = ["data.regression=true", "--train", str(file), "--runs", str(file.parent / "runs")]
    return cli.run([what, "text-classification", *SHORT, *given, *more])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def read(task: str, **data: object) -> dict[str, str]:
    """The content of what is read for a task with this data."""
    recipe = override(RECIPES[task], ["tiny=true", "data.tiny=false"])
    recipe = recipe.replace(**{f"data.{key}": value for key, value in data.items()})
    found: dict[str, str] = {}
    with noting(found, recipe.saved()["data"]):
        load_task(recipe)
    return found


def test_the_content_of_a_file_counts_and_not_its_time(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv")
    found = read("text-classification", train=str(file), regression=True)
    assert [*found] == [str(file)]
    write_rows(file)
    assert changed(found) == []
    write_rows(file, factor=-1)
    assert changed(found) == [str(file)]
    file.unlink()
    assert changed(found) == []  # gone: the result stands for itself


def test_of_files_with_a_common_beginning_those_that_are_read_count(tmp_path: Path) -> None:
    for language in ("en", "de"):
        (tmp_path / f"my [corpus].{language}").write_text("".join(f"this is word number {row}\n" for row in range(40)))
    (tmp_path / "my [corpus]").mkdir()  # is not read, and neither is the next
    found = read("translation", train=str(tmp_path / "my [corpus]"), source="en", target="de")
    assert sorted(found) == [str(tmp_path / f"my [corpus].{language}") for language in ("de", "en")]
    (tmp_path / "my [corpus].fr").write_text("autre")
    assert changed(found) == []
    (tmp_path / "my [corpus].de").write_text("other\n" * 40)
    assert changed(found) == [str(tmp_path / "my [corpus].de")]


def test_of_images_the_names_in_each_folder_count_also_behind_a_link(tmp_path: Path) -> None:
    noise = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(20):
            pixels = noise.integers(256, size=(8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / name / f"{number}.png")
    (tmp_path / "photos").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "own" / name)
    photos = str(tmp_path / "photos")
    found = read("image-classification", train=photos, valid_size=6, test_size=6)
    assert sorted(found) == [photos, f"{photos}/cat", f"{photos}/dog"]
    (tmp_path / "own/cat/.DS_Store").touch()
    (tmp_path / "own/dog/.#1.png").symlink_to("nobody")
    assert changed(found) == []
    (tmp_path / "own/dog/1.png").unlink()
    assert changed(found) == [f"{photos}/dog"]


def test_a_run_is_not_taken_for_one_of_the_edited_file_and_the_remedy_trains_it_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("train", file, "alpha=0") == 0
    (before,) = find_runs(tmp_path / "runs")
    write_rows(file, factor=100)
    capsys.readouterr()
    for command in ("train", "compare"):
        more = ["alpha=0"] if command == "train" else ["--seeds", "1", "--no-double-batch"]
        assert run(command, file, *more) == 2
        text = said(capsys)
        assert f"{file}: changed after a run had been trained with it" in text
    remedy = shlex.split(text.partition("train it anew: ")[2])
    assert remedy == ["rm", "-r", str(before.path)]
    shutil.rmtree(remedy[2])
    assert run("train", file, "alpha=0") == 0
    (after,) = find_runs(tmp_path / "runs")
    assert before.result is not None
    assert after.result is not None
    assert after.result["test"]["loss"] > 100 * before.result["test"]["loss"]


def test_a_run_is_not_taken_for_one_from_another_pretrained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, model = write_rows(tmp_path / "rows.csv"), tmp_path / "model"
    for seed in (0, 1):
        torch.manual_seed(seed)
        saved(model, bert(), tokenizer(["text", "long"]))
        (model / "README.md").write_text(f"of seed {seed}")  # decides nothing
        if seed == 0:
            assert run("train", file, "alpha=0", *OF_ITS_OWN, "--model", str(model)) == 0
            capsys.readouterr()
    assert run("compare", file, *OF_ITS_OWN, "--model", str(model), "--seeds", "1", "--no-double-batch") == 2
    text = said(capsys)
    assert f"{model / 'model.safetensors'}: changed after a run had been trained with it" in text
    assert "README" not in text

    moved = model.rename(tmp_path / "moved")
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 2
    assert "model.name" in said(capsys)
    assert cli.run(["evaluate", str(tmp_path / "runs"), f"model.name={moved}"]) == 0


def test_an_unfinished_run_does_not_go_on_with_an_edited_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("train", file, "alpha=0") == 0
    (only,) = find_runs(tmp_path / "runs")
    (only.path / "result.json").unlink()
    write_rows(file, factor=2)
    for command in (["train", "alpha=0"], ["compare", "--seeds", "1", "--no-double-batch"], ["compare", "--commands"]):
        assert run(command[0], file, *command[1:]) == 2
        assert f"{file}: changed after a run had been trained with it, fully or in part" in said(capsys)
    write_rows(file)
    assert run("train", file, "alpha=0") == 0


def test_a_run_is_not_scored_again_on_other_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("train", file, "alpha=0") == 0
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 0
    write_rows(file, factor=2)
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 2
    assert f"{file}: changed after " in said(capsys)
    file.write_text(file.read_text().replace("text,label", "review,label"))
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 2
    assert f"{file}: changed after " in said(capsys)  # and not that a key of the recipe should name another column


def test_a_run_is_not_scored_again_on_an_edited_test_file_but_on_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, test = write_rows(tmp_path / "rows.csv"), write_rows(tmp_path / "test.csv", factor=3)
    assert run("train", file, "alpha=0", "--test", str(test)) == 0
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 0
    write_rows(test, factor=-100)
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 2
    text = said(capsys)
    assert f"{test}: changed after " in text
    assert "give them a file of its own: --test FILE" in text
    other = test.rename(tmp_path / "other.csv")
    write_rows(test, factor=3)
    assert cli.run(["evaluate", str(tmp_path / "runs"), "--test", str(other)]) == 0


def test_a_setting_that_a_recipe_leaves_out_is_shown_as_what_it_means(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv")
    for settings in (["select_by=loss"], ["select_by=score"]):
        assert run("train", file, "alpha=0", *settings) == 0
    found = comparisons(find_runs(tmp_path / "runs"))
    titles = {titled(c.name, setting) for c, setting in zip(found, distinguishing_settings(found), strict=True)}
    assert {title.partition(" (")[2] for title in titles} == {"select_by = loss)", "select_by = score)"}


def test_what_a_recipe_leaves_out_is_what_versions_did_before_the_key() -> None:
    left_out = DigitsRecipe.left_out
    assert (left_out("select_by"), left_out("method.views"), left_out("alpha_schedule")) == (
        "score",
        "same",
        "constant",
    )
    assert (left_out("model.kind"), left_out("alpha"), left_out("nobody.has_this")) == ("vit", None, None)


def test_runs_of_two_contents_of_a_file_are_two_comparisons_whose_titles_differ(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("train", file, "alpha=0") == 0
    write_rows(file, factor=2)
    assert run("train", file, "alpha=1") == 0
    found = comparisons(find_runs(tmp_path / "runs"))
    assert [len(comparison.arms) for comparison in found] == [1, 1]
    titles = [titled(c.name, setting) for c, setting in zip(found, distinguishing_settings(found), strict=True)]
    assert all(f" (content of {file} = " in title for title in titles), titles
    assert titles[0] != titles[1]


def test_an_edited_file_of_a_folder_of_data_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "mails"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        rows = (
            json.dumps({"document": f"{split} {row} says a lot.", "summary": f"{split} {row}"}) for row in range(20)
        )
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    command = ["train", "summarization", *SHORT, "alpha=0", "--data", str(folder), "--runs", str(tmp_path / "runs")]
    assert cli.run(command) == 0
    for split in ("test", "train"):
        file = folder / f"{split}.jsonl"
        before = file.read_text()
        file.write_text(before.replace("a lot", "little"))
        assert cli.run(command) == 2
        assert f"{file}: changed after a run" in said(capsys)
        assert cli.run(["evaluate", str(tmp_path / "runs")]) == 2
        assert f"{file}: changed after" in said(capsys)
        file.write_text(before)
    moved = folder.rename(tmp_path / "moved")
    assert cli.run(["evaluate", str(tmp_path / "runs"), f"data.folder={moved}"]) == 0
    (moved / "train.jsonl").write_text(before.replace("a lot", "little"))
    assert cli.run(["evaluate", str(tmp_path / "runs"), f"data.folder={moved}"]) == 2
    assert "the training data are not those of the run" in said(capsys)


def test_runs_of_other_unlabeled_examples_are_no_seeds_of_one_arm_and_none_is_lost(tmp_path: Path) -> None:
    for seed, content in enumerate("abc"):
        for alpha in (0.0, 1.0):
            files, data = {"a.csv": "t", "b.csv": content}, {"train": "a.csv", "unlabeled": "b.csv"}
            write_run(tmp_path, 0.7, seed=seed, alpha=alpha, files=files, data=data)
    (found,) = comparisons(find_runs(tmp_path))
    assert [(arm.label, arm.seeds) for arm in found.arms] == [
        ("baseline", (0, 1, 2)),
        ("R-Drop (alpha 1), unlabeled", (0,)),
        ("R-Drop (alpha 1), unlabeled, of content 2", (1,)),
        ("R-Drop (alpha 1), unlabeled, of content 3", (2,)),
    ]


def test_runs_of_a_version_that_recorded_no_content_stay_in_their_comparison(tmp_path: Path) -> None:
    for seed in range(3):
        for alpha in (0.0, 1.0):
            recorded = {"files": {"a.csv": "t"}} if seed else {}
            write_run(tmp_path, 0.7, seed=seed, alpha=alpha, data={"train": "a.csv"}, **recorded)
    (found,) = comparisons(find_runs(tmp_path))
    assert [arm.seeds for arm in found.arms] == [(0, 1, 2)] * 2
    write_run(tmp_path, 0.7, seed=3, files={"a.csv": "other"}, data={"train": "a.csv"})  # of which were the first then?
    assert [[arm.seeds for arm in found.arms] for found in comparisons(find_runs(tmp_path))] == [
        [(0,), (0,)],
        [(3,)],
        [(1, 2), (1, 2)],
    ]


def test_a_designed_comparison_is_of_one_content_too(tmp_path: Path) -> None:
    for seed, content in ((0, "t"), (1, "other")):
        for alpha, updates in ((0.0, 400), (0.0, 800), (1.0, 400)):
            data = {"train": "a.csv"}
            write_run(tmp_path, 0.7, seed=seed, alpha=alpha, updates=updates, data=data, files={"a.csv": content})
    runs = find_runs(tmp_path)
    digests = {
        (run.recipe["method"]["alpha"], run.recipe["updates"]): arm_digest(run.recipe) for run in runs if run.recipe
    }
    arms = {"baseline": digests[0.0, 400], "longer": digests[0.0, 800], "R-Drop": digests[1.0, 400]}
    found = comparisons(runs, designs=[Design(arms, "R-Drop")])
    assert [[arm.seeds for arm in comparison.arms] for comparison in found] == [[(1,)] * 3, [(0,)] * 3]


def test_a_designed_comparison_is_of_one_file_of_unlabeled_examples_too(tmp_path: Path) -> None:
    of_labels, of_all = {"train": "a.csv"}, {"train": "a.csv", "unlabeled": "b.csv"}
    for seed, content in ((0, "u"), (1, "other")):
        for alpha, updates, data in (
            (0.0, 400, of_labels),
            (0.0, 800, of_labels),
            (1.0, 400, of_labels),
            (1.0, 400, of_all),
        ):
            files = {"a.csv": "t"} if data is of_labels else {"a.csv": "t", "b.csv": content}
            write_run(tmp_path, 0.7, seed=seed, alpha=alpha, updates=updates, data=data, files=files)
    runs = find_runs(tmp_path)
    names = {(0.0, 400, False): "baseline", (0.0, 800, False): "longer", (1.0, 400, False): "R-Drop"}
    arms = {
        names.get((run.recipe["method"]["alpha"], run.recipe["updates"], "unlabeled" in run.recipe["data"]), "all"): (
            arm_digest(run.recipe)
        )
        for run in runs
        if run.recipe
    }
    in_order = {name: arms[name] for name in ("baseline", "longer", "R-Drop", "all")}
    found = comparisons(runs, designs=[Design(in_order, "all")])
    both = (0, 1)
    assert sorted([arm.seeds for arm in comparison.arms] for comparison in found) == [
        [both, both, both, (0,)],
        [both, both, both, (1,)],
    ]
    assert [setting["content of b.csv"] for setting in distinguishing_settings(found)] == ["other", "u"]


@pytest.mark.parametrize("content", ["[" * 100_000, "null", None])
def test_a_hostile_result_does_not_keep_the_files_of_other_runs_from_being_compared(
    tmp_path: Path, content: str | None
) -> None:
    if content is None:
        os.mkfifo(tmp_path / "result.json")  # to read it would never end
    else:
        (tmp_path / "result.json").write_text(content)
    assert contents_of(tmp_path) == {}


def test_a_search_checks_all_of_its_runs_before_it_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("tune", file, "alpha=1,5", "--tune-seeds", "1", "--seeds", "1", "--no-double-batch") == 0
    write_rows(file, factor=2)
    assert run("tune", file, "alpha=1,5", "--tune-seeds", "1", "--seeds", "1", "--no-double-batch") == 2
    assert "changed after 5 runs had been trained with it" in said(capsys)


def test_moved_data_are_those_of_the_run_if_they_hold_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("train", file, "alpha=0") == 0
    moved = file.rename(tmp_path / "moved.csv")
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 2
    assert "Where files of the run have moved, say where they are by data.train=FILE" in said(capsys)
    assert cli.run(["evaluate", str(tmp_path / "runs"), f"data.train={moved}"]) == 0
    write_rows(moved, factor=2)
    assert cli.run(["evaluate", str(tmp_path / "runs"), f"data.train={moved}"]) == 2


def test_what_is_wrong_in_a_file_to_score_is_not_said_to_come_of_moved_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", write_rows(tmp_path / "rows.csv"), "alpha=0") == 0
    other = tmp_path / "other.csv"
    other.write_text("review,label\na,b\n", encoding="utf-8")
    capsys.readouterr()
    assert cli.run(["evaluate", str(tmp_path / "runs"), "--test", str(other)]) == 2
    assert said(capsys).endswith("only 'review', 'label'; rename it")


def test_what_a_name_of_the_data_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    german = str(tmp_path / "pool.de")
    read = dict.fromkeys(["pool.csv", "pool/cat", "./pool", "pool2.csv", german], "content")
    assert below(read, "pool") == {"pool.csv": ".csv", "pool/cat": "/cat", "./pool": "", german: ".de"}
    assert below(read, ".").keys() == read.keys()
    assert below(read, None) == below(read, 3) == below(read, "") == {}


@pytest.mark.parametrize("path", ["/dev/zero", "a\0b", "nowhere", "\ud800"])
def test_a_result_that_names_no_file_makes_nothing_be_read(path: str) -> None:
    assert changed({path: "0123456789abcdef"}) == []

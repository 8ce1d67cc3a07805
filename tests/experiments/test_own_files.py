"""A data file of the user's own that is edited: no result of the earlier content is taken for one of the new."""

import shlex
import shutil
from pathlib import Path

import pytest

from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.launch import cli
from rdrop.experiments.report.settings import distinguishing_settings, titled
from rdrop.experiments.run_folder import find_runs
from rdrop.experiments.run_folder.own_files import changed, digests

SHORT = ["tiny=true", "data.tiny=false", "updates=2", "warmup_updates=1", "evaluate_every=2", "checkpoint_every=1"]


def write_rows(path: Path, factor: int = 1) -> Path:
    """Texts with a number each."""
    path.write_text("text,label\n" + "".join(f"{'long ' * (row % 7)}text,{factor * row}\n" for row in range(40)))
    return path


def run(what: str, file: Path, *more: str) -> int:
    given = ["data.regression=true", "--train", str(file), "--runs", str(file.parent / "runs")]
    return cli.run([what, "text-classification", *SHORT, *given, *more])


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_the_content_of_a_file_counts_and_not_its_name_or_time(tmp_path: Path) -> None:
    first, copy = write_rows(tmp_path / "a.csv"), write_rows(tmp_path / "b.csv")
    assert digests({"train": str(first)}) == digests({"train": str(copy)})
    recorded = digests({"train": str(first), "valid": None, "unlabeled": "all", "text_column": "text"})
    assert [*recorded] == ["train"]
    write_rows(first, factor=-1)
    assert changed(recorded, {"train": str(first)}) == [f"{first} (data.train)"]
    assert changed(recorded, {"train": str(copy)}) == []
    first.unlink()
    assert changed(recorded, {"train": str(first)}) == []  # gone: the result stands for itself


def test_two_files_that_are_named_by_their_common_beginning_count_both(tmp_path: Path) -> None:
    for language in ("en", "de"):
        (tmp_path / f"my [corpus].{language}").write_text("a b\n")
    named = {"train": str(tmp_path / "my [corpus]")}
    recorded = digests(named)
    (tmp_path / "my [corpus].de").write_text("a c\n")
    assert changed(recorded, named) == [f"{named['train']} (data.train)"]


def test_of_a_folder_the_names_and_sizes_of_its_files_count(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for name in ("cat", "dog"):
        (photos / name).mkdir(parents=True)
        (photos / name / "1.png").write_bytes(b"12")
    recorded = digests({"train": str(photos)})
    moved = photos.rename(tmp_path / "moved")
    assert changed(recorded, {"train": str(moved)}) == []
    (moved / "dog/1.png").rename(moved / "cat/2.png")
    assert changed(recorded, {"train": str(moved)}) != []


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
        assert f"{file} (data.train): has changed since this run was trained with it" in text
    remedy = shlex.split(text.partition("train it anew: ")[2])
    assert remedy == ["rm", "-r", str(before.path)]
    shutil.rmtree(remedy[2])
    assert run("train", file, "alpha=0") == 0
    (after,) = find_runs(tmp_path / "runs")
    assert before.result is not None
    assert after.result is not None
    assert after.result["test"]["loss"] > 100 * before.result["test"]["loss"]


def test_an_unfinished_run_does_not_go_on_with_an_edited_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("train", file, "alpha=0") == 0
    (only,) = find_runs(tmp_path / "runs")
    (only.path / "result.json").unlink()
    write_rows(file, factor=2)
    assert run("train", file, "alpha=0") == 1
    assert f"{file} (data.train): has changed since {only.path} began with it" in said(capsys)
    write_rows(file)
    assert run("train", file, "alpha=0") == 0


def test_a_run_is_not_scored_again_on_other_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("train", file, "alpha=0") == 0
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 0
    write_rows(file, factor=2)
    assert cli.run(["evaluate", str(tmp_path / "runs")]) == 2
    assert "the training data are not those of the run" in said(capsys)


def test_runs_of_two_contents_of_a_file_are_two_comparisons_whose_titles_differ(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.csv")
    assert run("train", file, "alpha=0") == 0
    write_rows(file, factor=2)
    assert run("train", file, "alpha=1") == 0
    found = comparisons(find_runs(tmp_path / "runs"))
    assert [len(comparison.arms) for comparison in found] == [1, 1]
    titles = [titled(c.name, setting) for c, setting in zip(found, distinguishing_settings(found), strict=True)]
    assert all(" (content of data.train = " in title for title in titles), titles
    assert titles[0] != titles[1]

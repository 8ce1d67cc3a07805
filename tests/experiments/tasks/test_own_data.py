"""From a file of one's own to the table, in one command: `rdrop compare TASK --train FILE`, for every task."""

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest

from rdrop.experiments.launch import cli
from rdrop.experiments.recipe import override
from rdrop.experiments.recipes import RECIPES
from rdrop.experiments.run_folder import find_runs
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.task import load_task
from rdrop.experiments.training.fingerprint import fingerprint


def sentences() -> Iterator[str]:
    for who, what, whom in product(
        ("the cat", "a dog", "my house"), ("sees", "finds", "likes"), ("a bird", "the river")
    ):
        yield f"{who} {what} {whom}"


def write_pairs(folder: Path) -> Path:
    path = folder / "pairs.tsv"
    path.write_text("source\ttarget\n" + "".join(f"{line}\t{line[::-1]}\n" for line in sentences()), encoding="utf-8")
    return path


def write_documents(folder: Path) -> Path:
    rows = ({"document": f"{line}. {line} again.", "summary": line} for line in sentences())
    path = folder / "mails.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_labeled_texts(folder: Path) -> Path:
    path = folder / "reviews.csv"
    rows = (f'"{line}","{"animal" if "bird" in line else "place"}"\n' for line in sentences())
    path.write_text("text,label\n" + "".join(rows), encoding="utf-8")
    return path


def write_text(folder: Path) -> Path:
    path = folder / "novel.txt"
    path.write_text("".join(f"{line}.\n" for line in [*sentences()] * 3), encoding="utf-8")
    return path


def write_images(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    path = folder / "photos.npz"
    np.savez(path, images=draw.integers(0, 256, (80, 16, 16, 3), dtype=np.uint8), labels=np.arange(80) % 2)
    return path


TASKS = {
    "translation": write_pairs,
    "summarization": write_documents,
    "text-classification": write_labeled_texts,
    "language-modeling-from-scratch": write_text,
    "image-classification": write_images,
}
SHORT = ["tiny=true", "data.tiny=false", "updates=2", "warmup_updates=1", "evaluate_every=2"]


@pytest.mark.parametrize("task", [task for task in TASKS if task != "image-classification"])
def test_a_file_of_windows_trains_as_the_same_file_of_linux(task: str, tmp_path: Path) -> None:
    file = TASKS[task](tmp_path)
    windows = file.with_name(f"windows{file.suffix}")
    windows.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    loaded = [load_task(override(RECIPES[task], [*SHORT, f"data.train={path}"])) for path in (file, windows)]
    assert fingerprint(loaded[0]) == fingerprint(loaded[1])


PAIR = {"en": "a b c d", "de": "e f g h"}
HUB: dict[str, tuple[dict[str, object], str, str]] = {
    "translation": ({"translation": PAIR}, "translation", "has no pair"),
    "summarization": ({"document": "a text", "summary": "text"}, "summary", "has no value"),
    "text-classification": ({"text": "a text", "label": "x"}, "text", "has no value"),
    "language-modeling-from-scratch": ({"text": "a line"}, "text", "has no value"),
}
"""A row of the hub for each task, one of its columns, and what is said where that is null."""
LISTS = {
    "translation": (PAIR | {"de": ["e", "f"]}, "de"),
    "summarization": ({"document": ["a", "b"], "summary": "text"}, "document"),
    "text-classification": ({"text": "a text", "label": ["x"]}, "label"),
    "language-modeling-from-scratch": ({"text": ["a", "b"]}, "text"),
}
"""The same with a list in one of the columns."""


def load_from_hub(task: str, rows: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *where, **options: datasets.Dataset.from_list(rows))
    languages = ["data.source=en", "data.target=de"] if task == "translation" else []
    load_task(override(RECIPES[task], [*SHORT, "data.hub=org/name", *languages]))


@pytest.mark.parametrize("task", HUB)
def test_what_is_no_text_in_a_data_set_of_the_hub_is_named_by_row_and_column(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, column, what = HUB[task]
    for missing in (0, 3):
        rows = [row | {column: None} if number == missing else row for number in range(20)]
        with pytest.raises(DataError, match=rf"^org/name.*:{missing + 1}: {column} {what}; "):
            load_from_hub(task, rows, monkeypatch)
    lists, column = LISTS[task]
    with pytest.raises(DataError, match=rf"^org/name.*:1: {column} must be text or a number, and is a list; choose"):
        load_from_hub(task, [lists] * 20, monkeypatch)


@pytest.mark.parametrize("task", [task for task in TASKS if task != "image-classification"])
def test_what_chooses_the_checkpoint_does_not_score_it(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = TASKS[task](tmp_path)
    part, copy = (file.with_name(f"{name}{file.suffix}") for name in ("part", "copy"))
    for path in (part, copy):
        path.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    command = ["train", task, *SHORT, "--train", str(file), "--valid", str(part), "--test", str(copy)]
    assert cli.run([*command, "--runs", str(tmp_path / "runs")]) == 2
    assert f"is test, and has the same content as {part}, which chooses the checkpoint" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize("task", [task for task in TASKS if task not in ("translation", "image-classification")])
def test_a_folder_of_one_file_three_times_is_refused(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = TASKS[task](tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    for split in ("train", "valid", "test"):
        (folder / f"{split}{file.suffix}").write_bytes(file.read_bytes())
    command = ["train", task, *SHORT, "--data", str(folder), "--runs", str(tmp_path / "runs")]
    assert cli.run(command) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "which is trained on: its score would be one of what was learned; put the examples of valid there" in said


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("other_path", ["itself", "link", "copy"])
def test_the_training_file_is_not_scored(
    task: str, split: str, other_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = TASKS[task](tmp_path)
    other = file.with_name(f"{other_path}{file.suffix}") if other_path != "itself" else file
    if other_path == "link":
        other.symlink_to(file)
    elif other_path == "copy":
        other.write_bytes(file.read_bytes())
    command = ["train", task, *SHORT, "--train", str(file), f"--{split}", str(other), "--runs", str(tmp_path / "runs")]
    assert cli.run(command) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert split in said
    assert "train" in said
    assert not (tmp_path / "runs").exists() or not [*(tmp_path / "runs").rglob("result.json")]


@pytest.mark.parametrize(
    ("task", "write", "metric"),
    [
        ("translation", write_pairs, "BLEU"),
        ("summarization", write_documents, "ROUGE-L"),
        ("text-classification", write_labeled_texts, "accuracy"),
        ("language-modeling-from-scratch", write_text, "perplexity"),
        ("image-classification", write_images, "accuracy"),
    ],
)
def test_one_command_goes_from_an_own_file_to_the_table(
    task: str, write: Callable[[Path], Path], metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, runs = write(tmp_path), tmp_path / "runs"
    short = ["tiny=true", "data.tiny=false", "updates=2", "warmup_steps=1", "evaluate_every=2"]
    given = ["--train", str(file), "--seeds", "1", "--no-double-batch", "--runs", str(runs)]
    assert cli.run(["compare", task, *short, *given]) == 0
    shown = capsys.readouterr().out
    assert metric in shown
    assert "R-Drop (alpha" in shown
    said = " ".join(shown.split())
    assert "One seed shows nothing" in said or "learned anything" in said
    recipes = [run.recipe for run in find_runs(runs) if run.result is not None and run.recipe is not None]
    assert [recipe["data"]["train"] for recipe in recipes] == [str(file)] * 2
    assert sorted(recipe["method"]["alpha"] > 0 for recipe in recipes) == [False, True]
    assert (runs / "report.html").is_file()

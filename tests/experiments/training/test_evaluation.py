"""Finished runs scored again: the same weights give the same scores; other data, other scores; nothing changes."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.experiments.tasks import test_own_data

from rdrop.experiments.comparison.finished_runs import FinishedRun, split_usable
from rdrop.experiments.launch import cli
from rdrop.experiments.recipe import Recipe, override
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import RECIPES, load_recipe
from rdrop.experiments.run_folder import ResultsError, RunFolder, find_runs
from rdrop.experiments.tasks.decoding.search import Search
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.image_classification.data import load_splits
from rdrop.experiments.tasks.language_modeling.data import load_lines
from rdrop.experiments.tasks.summarization.data import load_examples
from rdrop.experiments.tasks.text_classification.data import load_labeled_texts
from rdrop.experiments.tasks.translation.data import load_pairs
from rdrop.experiments.tasks.translation.recipes import TRANSLATION
from rdrop.experiments.tasks.translation.tiny import write_tiny_pairs
from rdrop.experiments.training.checkpoints import CheckpointError
from rdrop.experiments.training.evaluation import NOTES_ON_TRAINING, rescore
from rdrop.experiments.training.trainer import train

DIGITS_VIT = RECIPES["digits-vit"].tiny()
WORDS = ["ein", "zwei", "drei", "vier", "acht", "neun", "zehn", "elf", "alle", "null"]


def finished(path: Path) -> FinishedRun:
    (run,), _ = split_usable(find_runs(path))
    return run


def pairs_file(path: Path, start: int, count: int) -> str:
    """Sentences of four words, whose translation is the words the other way round."""
    pairs = [(WORDS[i % 10], WORDS[(i // 10 + i) % 10]) for i in range(start, start + count)]
    path.write_text(
        "source\ttarget\n" + "".join(f"{a} {a} {b} {b}\t{b} {b} {a} {a}\n" for a, b in pairs), encoding="utf-8"
    )
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("files")
    sizes = {"train": (0, 80), "valid": (3, 8), "test": (40, 8), "other": (60, 12)}
    return {name: pairs_file(folder / f"{name}.tsv", *size) for name, size in sizes.items()}


@pytest.fixture(scope="module")
def averaged(files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    """A translation run that is scored with the mean of its last two weights."""
    path = tmp_path_factory.mktemp("averaged")
    train(averaged_recipe(files, files["test"]), path)
    return finished(path)


def averaged_recipe(files: dict[str, str], test: str) -> Recipe:
    own = {"data.tiny": False, "data.train": files["train"], "data.valid": files["valid"], "data.test": test}
    return TRANSLATION.tiny().replace(average_last=2, evaluate_every=5, **own)


def test_the_same_weights_have_the_same_scores(averaged: FinishedRun, tmp_path: Path) -> None:
    assert len(averaged.result["averaged_steps"]) == 2
    assert rescore(averaged) == averaged.result | {"test_file": None}
    result = train(DIGITS_VIT.replace(updates=20, evaluate_every=5), tmp_path)
    assert rescore(finished(tmp_path)) == result | {"test_file": None}


def test_another_test_file_has_the_scores_of_the_run_that_was_tested_on_it(
    averaged: FinishedRun, files: dict[str, str], tmp_path: Path
) -> None:
    other = train(averaged_recipe(files, files["other"]), tmp_path)["test"]
    assert rescore(averaged, [f"data.test={files['other']}"])["test"] == other
    assert other["loss"] != averaged.result["test"]["loss"]


def write_pairs(path: Path, recipe: Any, split: str) -> Path:
    pairs = load_pairs(recipe.data)[split]
    path.write_text("source\ttarget\n" + "".join(f"{source}\t{target}\n" for source, target in pairs))
    return path


def write_documents(path: Path, recipe: Any, split: str) -> Path:
    examples = load_examples(recipe.data)[split]
    rows = ({"document": example.document, "summary": example.summaries[0]} for example in examples)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def write_labeled_texts(path: Path, recipe: Any, split: str) -> Path:
    splits = load_labeled_texts(recipe.data)
    texts = getattr(splits, split)
    rows = (f"{text}\t{splits.classes[label]}\n" for text, label in zip(texts.first, texts.labels, strict=True))
    path.write_text("text\tlabel\n" + "".join(rows))
    return path


def write_lines(path: Path, recipe: Any, split: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in load_lines(recipe.data)[split]))
    return path


def write_images(path: Path, recipe: Any, split: str) -> Path:
    images, rows = load_splits(recipe.data)[split]
    np.savez(path, images=np.stack([np.asarray(images.read(row)) for row in rows]), labels=images.labels[rows])
    return path


@pytest.mark.parametrize("valid_is_given", [False, True])
@pytest.mark.parametrize(
    ("name", "write_train", "write_split", "ending"),
    [
        ("translation", test_own_data.write_pairs, write_pairs, ".tsv"),
        ("summarization", test_own_data.write_documents, write_documents, ".jsonl"),
        ("text-classification", test_own_data.write_labeled_texts, write_labeled_texts, ".tsv"),
        ("language-modeling-from-scratch", test_own_data.write_text, write_lines, ".txt"),
        ("image-classification", test_own_data.write_images, write_images, ".npz"),
    ],
)
def test_what_was_held_out_of_the_training_file_stays_so_when_a_file_is_scored(
    name: str,
    write_train: Callable[[Path], Path],
    write_split: Callable[[Path, Any, str], Path],
    ending: str,
    valid_is_given: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The file has the examples that were held out, so the scores must be those that the run has."""
    runs, train_file = tmp_path / "runs", write_train(tmp_path)
    short = ["tiny=true", "data.tiny=false", "updates=2", "warmup_steps=1", "evaluate_every=2"]
    recipe = override(RECIPES[name], [*short, f"data.train={train_file}"])
    own = ["--train", train_file]
    if valid_is_given:
        own += ["--valid", write_split(tmp_path / f"valid{ending}", recipe, "valid")]
    command = ["compare", name, *short, *own, "--seeds", "1", "--no-double-batch", "--runs", runs]
    assert cli.run([*map(str, command)]) == 0
    records = find_runs(runs)
    test = write_split(tmp_path / f"test{ending}", load_recipe(records[0].path / "recipe.json"), "test")
    out, _ = shown([runs, "--test", test, "--json"], capsys)
    scores = {found["run"]: found["scores"] for found in json.loads(out)}
    assert scores == {str(run.path): (run.result or {})["test"] for run in records}


@pytest.mark.parametrize("source", ["tiny", "folder"])
def test_a_run_of_any_source_is_scored_on_a_file(source: str, tmp_path: Path) -> None:
    recipe = TRANSLATION.tiny()
    if source == "folder":
        write_tiny_pairs(tmp_path, recipe.data)
        recipe = recipe.replace(**{"data.tiny": False, "data.folder": str(tmp_path)})
    result = train(recipe.replace(updates=2, warmup_steps=1), tmp_path / "run")
    test = write_pairs(tmp_path / "test.tsv", recipe, "test")
    assert rescore(finished(tmp_path / "run"), [f"data.test={test}"])["test"] == result["test"]


def test_another_search_is_used_and_leaves_the_loss(averaged: FinishedRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from rdrop.experiments.tasks.translation import task as translation

    searches: list[Search] = []
    decoder_of = translation.decoder_of
    monkeypatch.setattr(
        translation, "decoder_of", lambda model, search: searches.append(search) or decoder_of(model, search)
    )
    scores = rescore(averaged, ["decoding.beams=2"])["test"]
    assert [search.beams for search in searches] == [2]
    assert scores["loss"] == averaged.result["test"]["loss"]


def test_the_notes_are_on_the_new_scores(averaged: FinishedRun, capsys: pytest.CaptureFixture[str]) -> None:
    of_training = {name: note for name, note in averaged.notes.items() if name in NOTES_ON_TRAINING}
    assert of_training  # they stay; the others are written again
    other = replace(averaged, result=averaged.result | {"notes": of_training | {"decoded by": "another version"}})
    assert rescore(other)["notes"] == averaged.result["notes"]
    for begun, is_said in (("late, by the score after 4 of 8 updates", False), ("no: it is slow to begin", True)):
        other = replace(averaged, result=averaged.result | {"notes": of_training | {"has begun": begun}})
        assert (rescore(other)["notes"].get("has begun") == begun) == is_said
    out, _ = shown([averaged.path], capsys)
    for name, note in averaged.result["notes"].items():
        assert f"{name}: {note}\n" in out


@pytest.mark.parametrize(
    "setting", ["alpha=1", "seed=1", "updates=9", "data.vocabulary=61", "model.layers=2", "name=x"]
)
def test_what_belongs_to_the_training_is_refused(averaged: FinishedRun, setting: str) -> None:
    key = setting.partition("=")[0]
    with pytest.raises(RecipeError, match=rf"^{key}=.*belongs to the training; to score, change .*data\.test"):
        rescore(averaged, [setting])


def test_training_data_that_have_moved_are_named_where_they_are(
    averaged: FinishedRun, files: dict[str, str], tmp_path: Path
) -> None:
    moved = tmp_path / "moved.tsv"
    moved.write_bytes(Path(files["train"]).read_bytes())
    assert rescore(averaged, [f"data.train={moved}"])["test"] == averaged.result["test"]


@pytest.mark.parametrize(
    "change", [lambda lines: lines[:-1], lambda lines: [*lines[:-1], "neun zehn\telf"], lambda lines: lines[::-1]]
)
def test_other_training_data_are_refused_because_the_weights_would_mean_something_else(
    averaged: FinishedRun, files: dict[str, str], change: Callable[[list[str]], list[str]], tmp_path: Path
) -> None:
    run = FinishedRun(tmp_path, averaged.recipe, averaged.method, averaged.result, [])
    heading, *lines = Path(files["train"]).read_text(encoding="utf-8").splitlines()
    other = tmp_path / "train.tsv"
    other.write_text("\n".join([heading, *change(lines)]) + "\n", encoding="utf-8")
    recipe = json.loads((averaged.path / "recipe.json").read_text())
    recipe["data"]["train"] = str(other)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ResultsError, match=r"the training data are not those of the run.*by data\.train=FILE"):
        rescore(run)


# ------------------------------------------------------------------------------------------------ the command line


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Baseline and R-Drop, one seed each, and a run that was not finished."""
    path = tmp_path_factory.mktemp("compared")
    for alpha in (0.0, 1.0):
        recipe = DIGITS_VIT.replace(alpha=alpha, updates=20, evaluate_every=10)
        train(recipe, path / recipe.name / recipe.digest())
    (path / "other").mkdir()
    (path / "other" / "recipe.json").write_text(DIGITS_VIT.to_json())
    return path


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shown(command: Sequence[Any], capsys: pytest.CaptureFixture[str], status: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert cli.run(["evaluate", *map(str, command)]) == status
    found = capsys.readouterr()
    return found.out, found.err


def test_several_runs_are_compared_and_the_look_at_their_scores_is_all_that_is_written(
    compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(compared)
    out, err = shown([compared], capsys)
    assert "test accuracy %" in out
    assert "R-Drop (alpha 1)" in out
    assert "1/2" in err
    assert "2/2" in err
    assert f"left out: {compared / 'other'}: unfinished" in err
    looks = compared / "looks.jsonl"
    assert len(looks.read_text().splitlines()) == 1
    shown([compared], capsys)
    assert len(looks.read_text().splitlines()) == 1
    looks.unlink()
    assert contents(compared) == before


def test_a_run_that_diverged_has_its_place_beside_the_new_scores(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared, tmp_path, dirs_exist_ok=True)
    lost = DIGITS_VIT.replace(alpha=1.0, updates=20, evaluate_every=10, seed=1)
    folder = RunFolder(tmp_path / lost.name / lost.digest())
    folder.write_recipe(lost.saved())
    folder.write_failure(12, "step 12: loss is nan. Lower alpha (=1).")
    out, err = shown([tmp_path], capsys)
    assert "left out of R-Drop (alpha 1): seed 1 (diverged, without a score)" in out
    assert "1 of 2 R-Drop (alpha 1) runs diverged (seed 1): step 12: loss is nan." in out
    assert err.count(f"left out: {folder.path}") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("x.csv: there is no such file"), 2),
        (RecipeError("model.name", "is gone", value="x"), 2),
        (ResultsError("the training data are not those of the run"), 2),
        (CheckpointError("the weights are damaged"), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_run_that_cannot_be_scored_is_named_and_the_others_are(
    error: Exception, status: int, compared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(run.path for run in split_usable(find_runs(compared))[0])
    bad: list[Path] = []

    def score(run: FinishedRun, settings: Sequence[str]) -> dict[str, Any]:
        if run.path in bad:
            raise error
        return dict(run.result)

    monkeypatch.setattr("rdrop.experiments.launch.evaluate.rescore", score)
    for number in (0, 1):
        bad[:] = paths[number : number + 1]
        out, err = shown([compared, "--json"], capsys, status)
        assert [Path(found["run"]) for found in json.loads(out)] == [path for path in paths if path not in bad]
        assert str(error) in err
    assert "accuracy" in shown([compared], capsys, status)[0]
    bad[:] = paths
    out, err = shown([compared], capsys, status)
    assert out == ""
    is_said_once = isinstance(error, (DataError, RecipeError))
    assert err.count(str(error)) == (1 if is_said_once else 2)


def test_one_run_as_json(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = compared / DIGITS_VIT.name / DIGITS_VIT.replace(alpha=0.0, updates=20, evaluate_every=10).digest()
    out, _ = shown([run, "--json"], capsys)
    assert json.loads(out) == [{"run": str(run), "scores": finished(run).result["test"]}]
    table, _ = shown([run], capsys)
    assert "accuracy %" in table


def test_of_several_processes_the_first_shows(
    compared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert shown([compared], capsys) == ("", "")


@pytest.mark.long
def test_two_processes_score_as_one_does(compared: Path) -> None:
    run = compared / DIGITS_VIT.name / DIGITS_VIT.replace(alpha=0.0, updates=20, evaluate_every=10).digest()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "rdrop"]
    command = [sys.executable, *launcher, "evaluate", str(run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [{"run": str(run), "scores": finished(run).result["test"]}]


def test_mistakes_are_one_line(compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, status, said in (
        ([tmp_path], 2, f"rdrop: {tmp_path} holds no finished run."),
        ([tmp_path / "none"], 2, f"rdrop: {tmp_path / 'none'} does not exist."),
        ([compared / "other"], 2, "unfinished, last row at step 0. Run it again to resume it."),
        ([compared, "alpha=2"], 2, "rdrop: alpha="),
        ([compared, 'data.test="x'], 2, "rdrop: data.test="),
        ([compared, "--test", "x.npz"], 2, "rdrop: data.test="),
        ([compared, "data.test=x.npz", "--test", "y.npz"], 2, "given twice"),
    ):
        out, err = shown(command, capsys, status)
        assert out == ""
        assert said in err.splitlines()[-1], command


def test_weights_that_are_not_there_any_more(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compared / DIGITS_VIT.name, copy)
    for checkpoints in copy.glob("*/checkpoints"):
        shutil.rmtree(checkpoints)
    _, err = shown([copy], capsys, status=1)
    assert "model.safetensors: No such file" in err.splitlines()[-1]


def test_the_runs_of_a_comparison_are_named_by_arm_and_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "digits", "updates=2", "evaluate_every=2", "warmup_updates=1", "model.hidden_size=8"]
    assert (
        cli.run(
            [
                *command,
                "alpha_schedule=constant",
                "--arm",
                "alpha=0 batch_size=2x",
                "--seeds",
                "2",
                "--runs",
                str(tmp_path),
            ]
        )
        == 0
    )
    _, progress = shown([tmp_path], capsys)
    assert [line.split(": test")[0] for line in progress.splitlines() if ": test" in line] == [
        "1/6  digits, baseline, seed 0",
        "2/6  digits, baseline, twice the batch, seed 0",
        "3/6  digits, R-Drop (alpha 10, a view per pass), unlabeled, seed 0",
        "4/6  digits, baseline, seed 1",
        "5/6  digits, baseline, twice the batch, seed 1",
        "6/6  digits, R-Drop (alpha 10, a view per pass), unlabeled, seed 1",
    ]


def test_a_batch_that_holds_all_examples_is_said_to_be_the_largest(tmp_path: Path) -> None:
    recipe = TRANSLATION.tiny().replace(updates=1, warmup_updates=1, evaluate_every=1, batch_size=None, batch_tokens=60)
    results = [train(recipe.replace(batch_tokens=tokens), tmp_path / str(tokens)) for tokens in (100_000, 200_000, 60)]
    assert ["batch" in result["notes"] for result in results] == [True, True, False]
    assert results[0]["test"] == results[1]["test"]

"""The cache of tokens: the same training from it as without it, whole or not there, one maker for many readers."""

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipes import find_recipe
from rdrop.experiments.tasks import token_cache
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.task import load_task
from rdrop.experiments.tasks.token_cache import cached
from rdrop.experiments.tasks.translation import task as translation
from rdrop.experiments.tasks.translation.recipes import TRANSLATION, TranslationRecipe
from rdrop.experiments.tasks.translation.task import Translation
from rdrop.experiments.training.fingerprint import fingerprint

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
CODES = "#version: 0.2\no n\nt w\ne e\nv e\n"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(token_cache.FOLDER_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "CACHED_FROM", 1)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def recipe(tmp_path: Path) -> TranslationRecipe:
    generator = np.random.default_rng(0)
    for split, size in (("train", 60), ("valid", 5), ("test", 5)):
        for side in ("source", "target"):
            lines = (" ".join(generator.choice(WORDS, generator.integers(1, 9))) for _ in range(size))
            (tmp_path / f"{split}.{side}").write_text("\n".join(lines) + "\n")
    (tmp_path / "codes").write_text(CODES)
    return TRANSLATION.replace(**{"data.folder": str(tmp_path), "data.vocabulary": 40})


def entries(cache: Path) -> list[Path]:
    return sorted(path for path in cache.glob("*") if path.is_dir())


def seen(task: Any) -> object:
    """All that a training sees of its data."""
    batch = task.train_batch(list(range(task.train_size())), 0)
    return {name: value.tolist() for name, value in batch.items()}, task.train_lengths().tolist(), task.notes


@pytest.mark.parametrize("codes", [None, "codes"])
def test_a_training_is_the_same_without_the_cache_into_it_and_out_of_it(
    recipe: TranslationRecipe, monkeypatch: pytest.MonkeyPatch, codes: str | None
) -> None:
    recipe = recipe.replace(**{"data.codes": codes, "data.tokenized": True})
    into = Translation(recipe)
    monkeypatch.setattr(token_cache, "CACHED_FROM", 61)
    without = Translation(recipe)
    monkeypatch.setattr(token_cache, "CACHED_FROM", 60)
    monkeypatch.setattr(translation, "build_subwords", None)  # it could not make them
    out_of = Translation(recipe)
    assert seen(into) == seen(without) == seen(out_of)
    assert fingerprint(into) == fingerprint(without) == fingerprint(out_of)
    assert into.names_of_ids() == without.names_of_ids() == out_of.names_of_ids()


def tiny(name: str, **settings: Any) -> Callable[[Path], Recipe]:
    return lambda folder: find_recipe(name).tiny().replace(**settings)


OTHERS = {
    "texts": tiny("glue-sst2"),
    "pairs of texts": tiny("glue-rte"),
    "summaries": tiny("cnn-dailymail"),
    "words": tiny("wikitext-103"),
    "characters": tiny("tinyshakespeare"),
}
"""A recipe for each task but translation, and for each kind of vocabulary; the folder is for a model."""


@pytest.mark.parametrize("name", OTHERS)
def test_another_task_is_the_same_without_the_cache_into_it_and_out_of_it(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    recipe = OTHERS[name](tmp_path)
    into = load_task(recipe)
    kept = entries(cache)
    assert kept
    monkeypatch.setattr(token_cache, "CACHED_FROM", 10**6)
    without = load_task(recipe)
    monkeypatch.setattr(token_cache, "CACHED_FROM", 1)
    monkeypatch.setattr(token_cache, "_make", None)  # it could make nothing
    out_of = load_task(recipe)
    assert seen(into) == seen(without) == seen(out_of)
    assert fingerprint(into) == fingerprint(without) == fingerprint(out_of)
    assert entries(cache) == kept


def test_pairs_of_test_that_are_trained_on_are_counted_from_the_cache_too(
    recipe: TranslationRecipe, tmp_path: Path
) -> None:
    for side in ("source", "target"):
        train, test = tmp_path / f"train.{side}", tmp_path / f"test.{side}"
        test.write_text("".join(train.read_text().splitlines(keepends=True)[7:9]))
    notes = [Translation(recipe).notes for _ in range(2)]
    assert [note["test pairs that are trained on too"] for note in notes] == ["2 of 2"] * 2


def test_other_text_or_other_settings_are_another_entry(recipe: TranslationRecipe, cache: Path, tmp_path: Path) -> None:
    coded = {"data.tokenized": True, "data.codes": "codes"}
    for changes in ({}, {"data.vocabulary": 39}, {"data.lowercase": True}, coded):
        Translation(recipe.replace(**changes))
    assert len(entries(cache)) == 4
    (tmp_path / "train.source").write_text((tmp_path / "train.source").read_text().replace("one", "two"))
    Translation(recipe)
    assert len(entries(cache)) == 5
    Translation(recipe.replace(seed=1, alpha=3.0))
    assert len(entries(cache)) == 5


def test_a_part_of_the_pairs_is_another_entry_for_each_draw(recipe: TranslationRecipe, cache: Path) -> None:
    tasks = [Translation(recipe.replace(**{"data.train_pairs": 30, "seed": seed})) for seed in (0, 1, 0)]
    assert len(entries(cache)) == 2
    assert seen(tasks[0]) == seen(tasks[2]) != seen(tasks[1])


def test_a_cut_file_of_the_cache_is_refused_with_a_remedy_that_works(recipe: TranslationRecipe, cache: Path) -> None:
    first = seen(Translation(recipe))
    (entry,) = entries(cache)
    os.truncate(entry / "source" / "ids.int32", 8)
    with pytest.raises(DataError, match=f"^{entry}: is damaged; delete it, and it is made again$"):
        Translation(recipe)
    for path in sorted(entry.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    entry.rmdir()
    assert seen(Translation(recipe)) == first


def test_what_is_wrong_with_the_text_is_said_and_nothing_is_kept(recipe: TranslationRecipe, cache: Path) -> None:
    source = Path(str(recipe.data.folder)) / "train.source"
    lines = source.read_text().splitlines()
    lines[40] = " "
    source.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"train\.source:41: the line is empty"):
        Translation(recipe)
    assert entries(cache) == []


def test_one_makes_what_several_want_at_once(cache: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("text")

    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(cached({"a": 1}, make))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(found) == 4
    assert set(found) == set(entries(cache))


def test_a_process_that_waits_for_another_one_says_so_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "SILENT_SECONDS", 0.01)
    has_begun, may_end = threading.Event(), threading.Event()

    def make(folder: Path) -> None:
        has_begun.set()
        assert may_end.wait(60)

    maker = threading.Thread(target=cached, args=({"a": 1}, make))
    maker.start()
    assert has_begun.wait(60)
    said = []

    def say(message: str, **_: object) -> None:
        said.append(message)
        may_end.set()

    monkeypatch.setattr(warnings, "warn", say)
    folder = cached({"a": 1}, make)
    maker.join()
    assert said == [f"waiting for another process that reads and encodes the same texts, into {folder}"]


def test_what_a_killed_maker_left_is_made_anew(cache: Path) -> None:
    folder = cached({"a": 1}, lambda folder: None)
    folder.rename(folder.with_name(f"{folder.name}.making"))
    (folder.with_name(f"{folder.name}.making") / "half").write_text("")
    assert cached({"a": 1}, lambda folder: (folder / "whole").write_text("")) == folder
    assert {path.name for path in folder.iterdir()} == {"whole", "sizes.json"}
    assert entries(cache) == [folder]


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RDROP_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"file/tokens/\w+: .*; set RDROP_CACHE to a folder that can be written"):
        cached({}, lambda folder: None)


def test_the_cache_of_the_user_is_where_the_system_keeps_such_things(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RDROP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert token_cache.cache_folder() == Path("/somewhere/rdrop")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert token_cache.cache_folder() == Path.home() / ".cache/rdrop"

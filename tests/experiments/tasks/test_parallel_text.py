"""Parallel text: every pair of the real files, and a misplaced line refused by name."""

import json
import lzma
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from tests.real_data import real_data

from rdrop.experiments.tasks.files import DataError, read_lines
from rdrop.experiments.tasks.token_sequences import TokenSequences, in_parts, usable
from rdrop.experiments.tasks.translation import data as parallel_text
from rdrop.experiments.tasks.translation.data import Pairs, load_pairs
from rdrop.experiments.tasks.translation.recipes import (
    IWSLT14_DE_EN,
    IWSLT14_DE_EN_40K,
    IWSLT17_EN_ZH,
    MULTI30K_EN_DE,
    MULTI30K_FR_EN,
    TRANSLATION,
    WMT14_EN_DE,
    TranslationRecipe,
)


def in_folder(recipe: TranslationRecipe, name: str) -> TranslationRecipe:
    return recipe.replace(**{"data.folder": str(real_data(name))})


def loaded(recipe: TranslationRecipe, **changes: object) -> dict[str, list[tuple[str, str]]]:
    return {split: list(pairs) for split, pairs in load_pairs(recipe.replace(**changes).data).items()}


# ---------------------------------------------------------------------------------------------------- real files


def test_multi30k_has_the_lines_of_its_manifest_first_and_last_right() -> None:
    splits = loaded(in_folder(MULTI30K_EN_DE, "multi30k"))
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 29_000, "valid": 1_014, "test": 1_000}
    assert splits["train"][0] == (
        "Two young, White males are outside near many bushes.",
        "Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",
    )
    assert splits["valid"][-1] == (
        "Two women wearing red and a man coming out of a port-a-potty.",
        "Zwei Frauen in Rot und ein Mann, der aus einer transportablen Toilette kommt.",
    )
    assert splits["test"][-1] == (
        "A girl at the shore of a beach with a mountain in the distance.",
        "Ein Mädchen an einer Küste mit einem Berg im Hintergrund.",
    )


def test_multi30k_turns_around() -> None:
    assert loaded(in_folder(MULTI30K_FR_EN, "multi30k"))["train"][-1] == (
        "Un homme en short et chemise hawaïenne se penche par dessus le bastingage d'un bateau, avec le brouillard et "
        "les montagnes en arrière-plan.",
        "A man in shorts and a Hawaiian shirt leans over the rail of a pilot boat, with fog and mountains in the "
        "background.",
    )


def test_iwslt14_40k_has_the_lines_of_its_manifest_first_and_last_right() -> None:
    splits = loaded(in_folder(IWSLT14_DE_EN_40K, "iwslt14-de-en"))
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 40_270, "valid": 7_283, "test": 6_750}
    assert splits["train"][0] == (
        "und sie sagte , dass es ein ziemlich langweiliger film ist .",
        "and she said that it &apos;s a rather boring movie .",
    )
    assert splits["valid"][0][0] == "es ist diese pyramide ."
    assert splits["test"][-1][1] == "thank you ."


def test_a_line_too_few_is_refused_with_file_and_line(tmp_path: Path) -> None:
    recipe = in_folder(MULTI30K_EN_DE, "multi30k")
    for file in real_data("multi30k").glob("*.gz"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lines = read_lines(tmp_path / "val.de.gz")
    del lines[500]
    (tmp_path / "val.de.gz").unlink()
    (tmp_path / "val.de").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"val\.en\.gz:1014: this line has no partner, .*val\.de has 1013 lines"):
        loaded(recipe, **{"data.folder": str(tmp_path)})


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    recipe = in_folder(MULTI30K_EN_DE, "multi30k")
    for file in real_data("multi30k").glob("*.gz"):
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(content[:9000] if file.name == "val.de.gz" else content)
    with pytest.raises(DataError, match=r"val\.de\.gz:\d+: the compressed file is cut off or damaged"):
        loaded(recipe, **{"data.folder": str(tmp_path)})


# -------------------------------------------------------------------------------------------------------- folders


def write_folder(folder: Path, sizes: Sequence[int] = (5, 3, 2), ending: str = "", names: Sequence[str] = ()) -> None:
    folder.mkdir(exist_ok=True)
    for name, size in zip(names or ("train", "valid", "test"), sizes, strict=True):
        for language in ("source", "target"):
            text = "".join(f"{language} {name} Number {i}\n" for i in range(size))
            (folder / f"{name}{ending}.{language}").write_text(text, encoding="utf-8")


def test_a_folder_has_two_files_a_split_in_any_of_the_spellings(tmp_path: Path) -> None:
    write_folder(tmp_path / "plain")
    write_folder(tmp_path / "tok", ending=".tok")
    for path in list((tmp_path / "tok").iterdir())[:3]:
        with lzma.open(f"{path}.xz", "wb") as stream:
            stream.write(path.read_bytes())
        path.unlink()
    first, second = (loaded(TRANSLATION, **{"data.folder": str(tmp_path / name)}) for name in ("plain", "tok"))
    assert first == second
    assert first["valid"][2] == ("source valid Number 2", "target valid Number 2")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "valid.target").unlink()
    with pytest.raises(DataError, match=r"has no valid\.target or valid\.tok\.target"):
        loaded(TRANSLATION, **{"data.folder": str(tmp_path)})


def test_another_test_set_of_the_folder_can_be_chosen(tmp_path: Path) -> None:
    write_folder(tmp_path, names=("train", "valid", "test_2017"))
    splits = loaded(TRANSLATION, **{"data.folder": str(tmp_path), "data.test_name": "test_2017"})
    assert splits["test"][0][0] == "source test_2017 Number 0"


def test_lowercase_is_of_all_that_is_read(tmp_path: Path) -> None:
    write_folder(tmp_path)
    splits = loaded(TRANSLATION, **{"data.folder": str(tmp_path), "data.lowercase": True})
    assert splits["test"][0] == ("source test number 0", "target test number 0")


def test_a_wrong_number_of_lines_is_refused_with_both_unless_the_recipe_allows_any(tmp_path: Path) -> None:
    write_folder(tmp_path)
    changes: dict[str, object] = {"data.folder": str(tmp_path), "data.counts": [5, 4, 2]}
    with pytest.raises(DataError, match=r"valid\.source: has 3 lines and must have 4; .*counts=null"):
        loaded(TRANSLATION, **changes)
    assert len(loaded(TRANSLATION, **(changes | {"data.counts": None}))["valid"]) == 3


def test_an_empty_line_is_refused_by_name(tmp_path: Path) -> None:
    write_folder(tmp_path)
    (tmp_path / "valid.target").write_text("a\n \nb\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"valid\.target:2: the line is empty"):
        loaded(TRANSLATION, **{"data.folder": str(tmp_path)})


def test_without_any_source_the_error_says_what_to_give() -> None:
    with pytest.raises(DataError, match=r"no data: set data\.train to a table with the columns source and target"):
        loaded(TRANSLATION)


# ------------------------------------------------------------------------------------------------------ own files


def write_table(path: Path, size: int) -> str:
    rows = [("source", "target"), *((f"source {i}", f"target {i}") for i in range(size))]
    if path.suffix == ".jsonl":
        lines = [json.dumps({"source": source, "target": target, "more": 1}) for source, target in rows[1:]]
    else:
        lines = [("\t" if path.suffix == ".tsv" else ",").join(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("ending", ["tsv", "csv", "jsonl"])
def test_a_table_is_split_the_same_for_all_seeds(tmp_path: Path, ending: str) -> None:
    own = {"data.train": write_table(tmp_path / f"pairs.{ending}", 40)}
    splits = loaded(TRANSLATION, **own)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 32, "valid": 4, "test": 4}
    assert {pair for pairs in splits.values() for pair in pairs} == {(f"source {i}", f"target {i}") for i in range(40)}
    assert loaded(TRANSLATION, seed=5, **own) == splits
    assert loaded(TRANSLATION, **own, **{"data.split_seed": 1}) != splits


def test_a_file_for_a_split_leaves_its_rows_in_train(tmp_path: Path) -> None:
    own = {"data.train": write_table(tmp_path / "a.tsv", 40), "data.test": write_table(tmp_path / "b.csv", 3)}
    splits = loaded(TRANSLATION, **own)
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 36, "valid": 4, "test": 3}
    own["data.valid"] = write_table(tmp_path / "c.csv", 2)
    own["data.train"] = write_table(tmp_path / "few.tsv", 6)
    assert {split: len(pairs) for split, pairs in loaded(TRANSLATION, **own).items()} == {
        "train": 6,
        "valid": 2,
        "test": 3,
    }


def test_two_parallel_files_are_given_by_the_name_before_the_language(tmp_path: Path) -> None:
    write_folder(tmp_path, sizes=(20, 3, 2))
    splits = loaded(TRANSLATION, **{"data.train": str(tmp_path / "train"), "data.test": str(tmp_path / "test")})
    assert {split: len(pairs) for split, pairs in splits.items()} == {"train": 18, "valid": 2, "test": 2}
    assert splits["test"][1] == ("source test Number 1", "target test Number 1")


@pytest.mark.parametrize("name", ["train.source", "trian", "nowhere/train"])
def test_parallel_files_that_are_not_both_there_are_named_with_how_to_name_them(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, sizes=(20, 3, 2))
    both = rf"{name}\.source and \S*{name}\.target are not both there.* by data\.source and data\.target$"
    with pytest.raises(DataError, match=both):
        loaded(TRANSLATION, **{"data.train": str(tmp_path / name)})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source\ttarget\na\tb\na\t \n", r"own\.tsv:3: target is missing \(' '\)"),
        ("source\ttarget\na\tb\na\t#N/A\n", r"own\.tsv:3: target is missing \('#N/A'\)"),
        ("source\ttarget\na\n", r"own\.tsv:2: the row has 1 fields and the header 2"),
        ("source\ttarge\na\tb\n", r"own\.tsv:1: has no column 'target' \(the nearest is 'targe'\)"),
        (
            "ein Hund\ta dog\nzwei\ttwo\n",
            r"own\.tsv:1: has no column 'source', only .*; if this line is an example.*x09target'",
        ),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.tsv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        loaded(TRANSLATION, **{"data.train": str(tmp_path / "own.tsv")})


# --------------------------------------------------------------------------------------------------------- the hub

Request = tuple[str, str | None, str, dict[str, str] | None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What was asked of `datasets.load_dataset`, which gives two pairs a split, one of them with an empty side."""
    requests: list[Request] = []

    def load_dataset(path: str, name: str | None, *, split: str, data_files: dict[str, str] | None) -> Any:
        requests.append((path, name, split, data_files))
        pairs = [{"de": f"Der {split}", "en": f"The {split}", "zh": "那"}, {"de": "leer", "en": None, "zh": ""}]
        return datasets.Dataset.from_dict({"translation": pairs})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return requests


def test_wmt14_comes_from_the_hub_by_its_configuration(hub: list[Request]) -> None:
    splits = loaded(WMT14_EN_DE, **{"data.counts": None})
    assert hub == [("wmt/wmt14", "de-en", split, None) for split in ("train", "validation", "test")]
    assert splits["valid"] == [("The validation", "Der validation"), ("", "leer")]


@pytest.mark.parametrize(
    ("recipe", "place"),
    [
        (IWSLT14_DE_EN, "bbaaaa/iwslt14-de-en-preprocess@refs/convert/parquet/de-en"),
        (IWSLT17_EN_ZH, "IWSLT/iwslt2017@refs/convert/parquet/iwslt2017-en-zh"),
    ],
)
def test_iwslt_comes_from_the_parquet_branch(hub: list[Request], recipe: TranslationRecipe, place: str) -> None:
    loaded(recipe, **{"data.counts": None})
    assert hub == [
        ("parquet", None, split, {split: f"hf://datasets/{place}/{split}/*.parquet"})
        for split in ("train", "validation", "test")
    ]


def test_the_hubs_counts_are_checked(hub: list[Request]) -> None:
    with pytest.raises(DataError, match=r"iwslt14-de-en-preprocess \(de-en\) train: has 2 lines and must have 160239"):
        loaded(IWSLT14_DE_EN)


def test_a_language_that_the_hub_lacks_is_named(hub: list[Request]) -> None:
    with pytest.raises(DataError, match=r"has no column 'cs', only 'de', 'en', 'zh'; set data\.source"):
        loaded(WMT14_EN_DE, **{"data.counts": None, "data.target": "cs"})


def test_parquet_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "validation", "test"):
        folder = tmp_path / "hub" / "de-en" / split
        folder.mkdir(parents=True)
        table = datasets.Dataset.from_dict({"de": [f"Der {split}", "zwei"], "en": [f"The {split}", "two"]})
        table.to_parquet(folder / "0000.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(parallel_text, "PARQUET", str(tmp_path / "hub/{config}/{split}/*.parquet"))
    splits = loaded(IWSLT14_DE_EN, **{"data.counts": [2, 2, 2]})
    assert splits["valid"] == [("der validation", "the validation"), ("zwei", "two")]


# ------------------------------------------------------------------------------------------------------ token ids


def test_token_sequences_are_the_lists_they_were_made_of() -> None:
    sequences = [[i % 7] * (i % 4) for i in range(12_000)]
    tokens = TokenSequences(iter(sequences))
    assert len(tokens) == 12_000
    assert [tokens[i] for i in range(len(tokens))] == sequences
    assert tokens.lengths.tolist() == list(map(len, sequences))


def test_in_parts_loses_nothing() -> None:
    assert list(in_parts(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(in_parts([], 2)) == []


def test_pairs_are_skipped_by_length_and_ratio_and_all_are_counted() -> None:
    source, target = np.array([0, 4, 3, 10, 11, 4, 9]), np.array([3, 4, 7, 10, 9, 6, 0])
    used, counts = usable(source, target, max_length=10, max_ratio=1.5)
    assert used.tolist() == [1, 3, 5]
    assert counts == {"read": 7, "used": 3, "skipped_empty": 2, "skipped_too_long": 1, "skipped_uneven": 1}
    used, counts = usable(source, target, max_length=100, max_ratio=None)
    assert used.tolist() == [1, 2, 3, 4, 5]
    assert counts["read"] == counts["used"] + sum(n for name, n in counts.items() if name.startswith("skipped"))


def test_pairs_can_be_read_as_often_as_one_likes() -> None:
    pairs = Pairs("here", [("A", "b")], lambda row, side: "here", lowercase=True)
    assert list(pairs) == list(pairs) == [("a", "b")]

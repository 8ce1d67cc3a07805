"""The predictions that a run keeps: of every task, as many as test has examples, enough to compute the scores again."""

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from scipy.stats import pearsonr

from rdrop.experiments.randomness import seed_all
from rdrop.experiments.recipes import RECIPES
from rdrop.experiments.run_folder import ResultsError
from rdrop.experiments.run_folder import predictions as kept
from rdrop.experiments.run_folder.predictions import (
    FILE,
    LONGEST_EXAMPLE,
    Predictions,
    class_rows,
    excerpt,
    number_predictions,
    read_predictions,
    text_predictions,
    write_predictions,
)
from rdrop.experiments.tasks.task import KeepsPredictions, KnowsConstant, Task, load_task
from rdrop.experiments.training.trainer import train

CLASSES = Predictions("classes", class_rows("ab", np.array([[2.0, 0.0], [0.0, 1.0]]), np.array([0, 0])), ("no", "yes"))
NUMBERS = number_predictions(["a"], np.array([3.14159265358979]), np.array([3.0]))
TEXTS = text_predictions(["ä b"], ["ein Text"], [["one", "two"]], scores=[{"rougeL": 12.5}])


@pytest.mark.parametrize("predictions", [CLASSES, NUMBERS, TEXTS], ids=lambda predictions: predictions.kind)
def test_what_is_read_is_what_was_written(predictions: Predictions, tmp_path: Path) -> None:
    write_predictions(tmp_path, predictions)
    assert read_predictions(tmp_path) == predictions


def test_equal_predictions_are_equal_bytes_and_readable_without_rdrop(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_predictions(tmp_path / name, CLASSES)
    packed = [(tmp_path / name / FILE).read_bytes() for name in ("a", "b")]
    assert packed[0] == packed[1]
    head, first, _ = map(json.loads, gzip.decompress(packed[0]).decode().splitlines())
    assert head == {"format": 1, "kind": "classes", "classes": ["no", "yes"]}
    # By hand: softmax of (2, 0) is 0.880797 and 0.119203, and -log 0.880797 is 0.126928.
    assert first == {"example": "a", "label": 0, "predicted": 0, "confidence": 0.880797, "loss": 0.126928}


def test_a_run_without_predictions_has_none(tmp_path: Path) -> None:
    assert read_predictions(tmp_path) is None


def packed(*lines: object) -> bytes:
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


HEAD = {"format": 1, "kind": "numbers", "classes": []}
ROW = {"example": "a", "label": 1.0, "predicted": 2.0}
CLASS_HEAD = {"format": 1, "kind": "classes", "classes": ["no", "yes"]}
CLASS_ROW = {"example": "a", "label": 0, "predicted": 1, "confidence": 0.9, "loss": 2.3}
TEXT_HEAD = {"format": 1, "kind": "texts", "classes": []}
TEXT_ROW = {"example": "a", "references": ["b"], "predicted": "c"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        packed(HEAD, ROW)[:-9],
        packed(HEAD, ROW)[:20] + b"\0" + packed(HEAD, ROW)[21:],
        gzip.compress(b"[1, 2"),
        gzip.compress(b"\xff\xfe\n"),
        packed(),
        packed([1]),
        packed(HEAD | {"kind": "other"}, ROW),
        packed(HEAD | {"format": 2}, ROW),
        packed(HEAD, ROW | {"label": "1"}),
        packed(HEAD, {"example": "a"}),
        packed(HEAD, 3),
        packed(HEAD | {"kind": "texts"}, ROW),
        gzip.compress(b'{"format": 1, "kind": "numbers", "classes": []}\nNaN\n'),
        packed(CLASS_HEAD, CLASS_ROW | {"label": 2}),
        packed(CLASS_HEAD, CLASS_ROW | {"predicted": -1}),
        packed(TEXT_HEAD, TEXT_ROW | {"references": []}),
        packed(TEXT_HEAD, TEXT_ROW | {"scores": {"rouge1": "1"}}),
        packed(TEXT_HEAD, TEXT_ROW | {"scores": 3}),
        packed(TEXT_HEAD, TEXT_ROW | {"bleu": {"bleu": [1, 2]}}),
    ],
    ids=lambda content: f"{len(content)} bytes",  # their own would hold the time, which gzip writes into them
)
def test_a_damaged_file_is_an_error_that_says_what_to_do(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(ResultsError, match=rf"{FILE}: .* Delete it: the run is compared without its predictions"):
        read_predictions(tmp_path)


def test_a_file_that_unpacks_to_more_than_any_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_BYTES", 1000)
    (tmp_path / FILE).write_bytes(gzip.compress(b" " * 10_000))
    with pytest.raises(ResultsError, match="more than 1000 bytes"):
        read_predictions(tmp_path)


def test_an_excerpt_is_one_line_of_limited_length() -> None:
    assert excerpt(" a\n b\tc ") == "a b c"
    assert len(excerpt("word " * 1000)) == LONGEST_EXAMPLE
    assert excerpt("word " * 1000).endswith("…")


# ---------------------------------------------------------------------------------------------------- of every task

TINY = {
    "digits": "classes",
    "cifar-10-4k": "classes",
    "glue-rte": "classes",
    "glue-mnli": "classes",
    "glue-stsb": "numbers",
    "cnn-dailymail": "texts",
    "iwslt14-de-en": "texts",
}


@cache
def evaluated(name: str) -> tuple[Any, dict[str, float]]:
    """A task of a tiny recipe, and the test scores of its untrained model."""
    recipe = RECIPES[name].tiny()
    task = load_task(recipe)
    seed_all(0, "model")
    return task, task.evaluate(task.build_model().eval(), "test")


@pytest.mark.parametrize(("name", "kind"), TINY.items())
def test_kept_predictions_give_the_scores_of_the_result(name: str, kind: str, tmp_path: Path) -> None:
    task, scores = evaluated(name)
    assert isinstance(task, KeepsPredictions)
    assert task.predictions is not None
    write_predictions(tmp_path, task.predictions)
    predictions = read_predictions(tmp_path)
    assert predictions is not None
    assert predictions.kind == kind
    column = {key: [row[key] for row in predictions.rows] for key in predictions.rows[0]}
    if kind == "classes":
        right = np.equal(column["label"], column["predicted"])
        assert right.mean() == pytest.approx(scores["accuracy"])
        assert np.mean(column["loss"]) == pytest.approx(scores["loss"], rel=1e-4)
        assert set(column["label"]) <= set(range(len(predictions.classes)))
    elif kind == "numbers":
        assert pearsonr(column["predicted"], column["label"]).statistic == pytest.approx(scores["pearson"], abs=1e-4)
    elif "bleu" in scores:
        for form in ("bleu", "bleu_tokenized_split"):
            counts = np.sum([row[form] for row in column["bleu"]], axis=0).tolist()
            found = BLEU.compute_bleu(counts[2:6], counts[6:], counts[0], counts[1])
            assert found.score == pytest.approx(scores[form])
    else:
        for metric in ("rouge1", "rouge2", "rougeL"):
            assert np.mean([row[metric] for row in column["scores"]]) == pytest.approx(scores[metric])


def test_predictions_stand_in_the_order_of_the_split() -> None:
    """Texts are scored by length; what is kept is in the order of the file."""
    task, _ = evaluated("glue-rte")
    labels = [row["label"] for row in task.predictions.rows]
    assert labels == task._labels["test"].tolist()
    assert [row["example"].split(" / ")[0] for row in task.predictions.rows] == [
        excerpt(text) for text in task._tests.first
    ]


def test_a_finished_run_keeps_its_predictions_in_little_space(tmp_path: Path) -> None:
    result = train(RECIPES["digits-vit"].tiny(), tmp_path)
    predictions = read_predictions(tmp_path)
    assert predictions is not None
    assert np.mean([row["label"] == row["predicted"] for row in predictions.rows]) == result["test"]["accuracy"]
    assert (tmp_path / FILE).stat().st_size < 30 * len(predictions.rows)


# ------------------------------------------------------------------------------------------------ constant predictions


@pytest.mark.parametrize("name", [*(name for name, kind in TINY.items() if kind != "texts"), "wikitext-103"])
def test_the_constant_has_scores_that_the_run_has_too(name: str) -> None:
    task, scores = evaluated(name)
    assert isinstance(task, KnowsConstant)
    assert task.constant_scores().keys() <= scores.keys()
    assert "loss" in task.constant_scores()


@pytest.mark.parametrize("name", ["cnn-dailymail", "iwslt14-de-en"])
def test_a_task_that_writes_text_has_no_constant_to_be_compared_with(name: str) -> None:
    task: Task = evaluated(name)[0]
    assert not isinstance(task, KnowsConstant)


def test_a_constant_class_scores_as_computed_by_hand() -> None:
    from rdrop.experiments.tasks.text_classification.scores import constant_scores

    found = constant_scores(("accuracy", "f1", "mcc"), np.array([1, 1, 1, 0]))
    # Always 1: accuracy 3/4, F1 = 2 * 3 / (2 * 3 + 1); the entropy of (1/4, 3/4) in nats.
    assert found == pytest.approx({"loss": 0.562335, "accuracy": 0.75, "f1": 6 / 7, "mcc": 0.0}, abs=1e-6)
    assert constant_scores(("pearson",), np.array([1.0, 2.0, 3.0], dtype=np.float32)) == pytest.approx({"loss": 2 / 3})


def test_the_constant_of_a_language_model_is_the_unigram_model_of_its_test_text() -> None:
    task, _ = evaluated("wikitext-103")
    tokens = task._tokens["test"]
    _, counts = np.unique(tokens.ids, return_counts=True)
    bits = -np.sum(counts * np.log(counts / len(tokens.ids)))
    assert task.constant_scores()["perplexity"] == pytest.approx(np.exp(bits / tokens.units))

"""Arms compared example by example: the scores of resamples, what the bootstrap promises, and what has changed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.significance import PairedTest
from scipy.stats import pearsonr
from sklearn.metrics import f1_score, matthews_corrcoef

from rdrop.experiments.comparison import examples
from rdrop.experiments.comparison.examples import (
    RESAMPLES,
    changed_examples,
    churn,
    example_difference,
    kept_examples,
    resampled_scores,
    score_of,
)
from rdrop.experiments.comparison.finished_runs import FinishedRun
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.run_folder.predictions import (
    FILE,
    Predictions,
    number_predictions,
    read_predictions,
    write_predictions,
)
from rdrop.experiments.tasks.translation.scores import BleuScorer

DRAW = np.random.default_rng(0)
ANIMALS = ("cat", "dog", "elk")


def of_classes(predicted: Sequence[int], labels: Sequence[int], classes: Sequence[str] = ANIMALS) -> Predictions:
    rows = [
        {"example": f"picture {n}", "label": int(label), "predicted": int(own), "confidence": 0.9, "loss": 0.5}
        for n, (own, label) in enumerate(zip(predicted, labels, strict=True))
    ]
    return Predictions("classes", rows, tuple(classes))


def of_numbers(predicted: Sequence[float], labels: Sequence[float]) -> Predictions:
    rows = [
        {"example": f"pair {n}", "label": float(label), "predicted": float(own)}
        for n, (own, label) in enumerate(zip(predicted, labels, strict=True))
    ]
    return Predictions("numbers", rows)


def of_translations(hypotheses: Sequence[str], references: Sequence[str]) -> Predictions:
    counts = BleuScorer("en", tokenized=False).counts_of_each(hypotheses, references)
    rows = [
        {"example": f"source {n}", "references": [reference], "predicted": own, "bleu": of_each}
        for n, (own, reference, of_each) in enumerate(zip(hypotheses, references, counts, strict=True))
    ]
    return Predictions("texts", rows)


def run(folder: Path, seed: int, predictions: Predictions | None, metric: str = "accuracy", **test: float) -> Any:
    if predictions is not None:
        write_predictions(folder, predictions)
        score = score_of(predictions, metric)
        test = {metric: score.value() if score else 0.0} | test
    return FinishedRun(folder, {"seed": seed}, Method(alpha=0.0), {"test": test}, [])


# -------------------------------------------------------------------------------------------------------- the scores


@pytest.mark.parametrize("metric", ["accuracy", "f1", "f1_macro", "mcc"])
@pytest.mark.parametrize("classes", [2, 4])
def test_a_score_of_sums_is_the_score_of_the_resample(metric: str, classes: int) -> None:
    labels, predicted = DRAW.integers(classes, size=(2, 60))
    chosen = DRAW.integers(60, size=60)
    score = score_of(of_classes(predicted, labels, [str(n) for n in range(classes)]), metric)
    assert score is not None
    found = score.of_sums(score.terms[chosen].sum(axis=0)[None])[0]
    theirs = {
        "accuracy": lambda y, p: np.mean(y == p),
        "f1": lambda y, p: f1_score(y, p, labels=[1], average="macro"),
        "f1_macro": lambda y, p: f1_score(y, p, average="macro"),
        "mcc": matthews_corrcoef,
    }[metric]
    assert found == pytest.approx(theirs(labels[chosen], predicted[chosen]))


def test_a_correlation_of_sums_is_the_correlation() -> None:
    labels = DRAW.normal(3, 1, 50)
    predicted = labels + DRAW.normal(0, 1, 50)
    score = score_of(of_numbers(predicted, labels), "pearson")
    assert score is not None
    assert score.value() == pytest.approx(pearsonr(predicted, labels).statistic)


@pytest.mark.parametrize(
    ("predictions", "metric"),
    [
        (of_classes([0], [0]), "nonsense"),
        (of_numbers([1.0], [1.0]), "spearman"),
        (of_translations(["a"], ["a"]), "rougeL"),
        (Predictions("classes", [], ANIMALS), "accuracy"),
    ],
)
def test_a_score_that_is_no_function_of_sums_is_none(predictions: Predictions, metric: str) -> None:
    assert score_of(predictions, metric) is None


# ------------------------------------------------------------------------------------------------------ the bootstrap


def sentences(count: int, errors: float) -> tuple[list[str], list[str]]:
    words = np.array(
        ["the", "a", "dog", "cat", "house", "runs", "sees", "old", "small", "green", "tree", "quickly", "today", "near"]
    )
    references = [list(words[DRAW.integers(len(words), size=DRAW.integers(6, 14))]) for _ in range(count)]
    hypotheses = [
        [word if DRAW.random() > errors else str(words[DRAW.integers(len(words))]) for word in own]
        for own in references
    ]
    return [" ".join(own) for own in hypotheses], [" ".join(own) for own in references]


def worsened(hypotheses: Sequence[str], errors: float) -> list[str]:
    return [" ".join(word if DRAW.random() > errors else "tree" for word in own.split()) for own in hypotheses]


def test_the_bleu_of_kept_counts_is_sacrebleu_s_where_nothing_of_four_words_matches() -> None:
    own, references = ["the cat", "a dog sat there"], ["the cat", "the dog sat here"]
    counts = [np.array(row["bleu"]["bleu"]) for row in of_translations(own, references).rows]
    of_all = examples._bleu_score(np.sum(counts, axis=0))
    assert 0 < of_all == pytest.approx(BLEU().corpus_score(own, [references]).score)
    of_one = BLEU(effective_order=True).sentence_score(own[1], references[1:])
    assert examples._bleu_score(counts[1], of_sentence=True) == pytest.approx(of_one.score)


@pytest.mark.parametrize("errors", [0.002, 0.1])
def test_the_bootstrap_of_bleu_agrees_with_that_of_sacrebleu(errors: float, tmp_path: Path) -> None:
    better, references = sentences(200, errors=0.2)
    worse = worsened(better, errors)
    test = PairedTest(
        [("worse", worse), ("better", better)], {"BLEU": BLEU(references=[references])}, None, test_type="bs"
    )
    theirs = test()[1]["BLEU"]
    of_systems = [of_translations(own, references) for own in (worse, better)]
    for own, score in zip(resampled_scores([score_of(own, "bleu") for own in of_systems]), theirs, strict=True):
        assert own.mean() == pytest.approx(score.mean, abs=0.3)
        assert np.diff(np.quantile(own, (0.025, 0.975)))[0] / 2 == pytest.approx(score.ci, rel=0.15)
    runs = [run(tmp_path / name, 0, own, "bleu") for name, own in zip("ab", of_systems, strict=True)]
    found = example_difference(kept_examples(runs, "bleu"), runs[1:], runs[:1])
    assert found is not None
    assert (found.interval[0] > 0) == (theirs[1].p_value < 0.05)


def test_models_that_err_equally_often_are_told_apart_in_five_percent() -> None:
    told_apart, trials = 0, 200
    for _ in range(trials):
        models = [score_of(of_classes(DRAW.random(200) < 0.2, np.zeros(200, dtype=int)), "accuracy") for _ in range(2)]
        of_arm, of_reference = resampled_scores([score for score in models if score])
        low, high = np.quantile(of_arm - of_reference, (0.025, 0.975))
        told_apart += not low <= 0 <= high
    assert told_apart <= 0.05 * trials + 3.1 * (0.05 * 0.95 * trials) ** 0.5


def test_the_interval_is_of_the_mean_over_the_seeds_and_each_seed_has_its_own(tmp_path: Path) -> None:
    """By the normal approximation: a share p of N examples that change sides has the variance p / N."""
    labels = np.zeros(1000, dtype=int)
    arm = [run(tmp_path / f"a{seed}", seed, of_classes(DRAW.random(1000) < 0.1, labels)) for seed in (0, 1, 2)]
    reference = [run(tmp_path / f"b{seed}", seed, of_classes(DRAW.random(1000) < 0.2, labels)) for seed in (1, 2, 3)]
    found = example_difference(kept_examples([*arm, *reference], "accuracy"), arm, reference)
    assert found is not None
    assert (found.seeds, found.examples) == ((1, 2), 1000)
    middle = np.mean([a.result["test"]["accuracy"] for a in arm[1:]])
    middle -= np.mean([b.result["test"]["accuracy"] for b in reference[:2]])
    assert np.mean(found.interval) == pytest.approx(middle, abs=0.003)
    widths = [high - low for low, high in found.of_seeds]
    assert widths == pytest.approx([2 * 1.96 * (0.25 / 1000) ** 0.5] * 2, rel=0.15)
    assert found.interval[1] - found.interval[0] == pytest.approx(widths[0] / 2**0.5, rel=0.15)


def test_the_same_runs_give_the_same_interval(tmp_path: Path) -> None:
    runs = [run(tmp_path / name, 0, of_classes(DRAW.integers(3, size=50), [0] * 50)) for name in "ab"]
    kept = kept_examples(runs, "accuracy")
    assert example_difference(kept, runs[:1], runs[1:]) == example_difference(kept, runs[:1], runs[1:])


def test_without_kept_predictions_nothing_is_said(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", 0, None, accuracy=0.5), run(tmp_path / "b", 0, of_classes([1], [1]))]
    kept = kept_examples(runs, "accuracy")
    assert kept.problems == ()
    assert example_difference(kept, runs[1:], runs[:1]) is None
    assert changed_examples(kept, runs[1:], runs[:1], 5) == ([], [])


# ----------------------------------------------------------------------------------------------- what cannot be used


@pytest.mark.parametrize("score", [0.5, 10**400, float("nan")])
def test_predictions_of_another_score_are_not_used(score: float, tmp_path: Path) -> None:
    other = run(tmp_path, 0, of_classes([0, 1], [0, 1]))
    other.result["test"]["accuracy"] = score
    kept = kept_examples([other], "accuracy")
    assert not kept.has(other)
    is_score = score == 0.5
    said = f"{other.path}: they do not give the test accuracy of its result"
    assert kept.problems == ((said,) if is_score else ())


@pytest.mark.parametrize(("mean", "spread"), [(2019.0, 0.01), (200_000.0, 0.5)])
def test_numbers_that_differ_by_little_of_their_size_keep_their_correlation(
    mean: float, spread: float, tmp_path: Path
) -> None:
    labels, predicted = (np.float32(mean + spread * DRAW.standard_normal(100)) for _ in range(2))
    rows = number_predictions([f"pair {n}" for n in range(100)], labels, predicted)
    expected = float(np.corrcoef(labels.astype(np.float64), predicted.astype(np.float64))[0, 1])
    kept = [run(tmp_path / name, 0, rows, "pearson") for name in "ab"]
    assert kept[0].result["test"]["pearson"] == pytest.approx(expected, abs=1e-6)
    write_predictions(tmp_path, rows)
    assert read_predictions(tmp_path) == rows
    assert kept_examples(kept, "pearson").problems == ()


def test_runs_with_other_test_examples_are_left_out_and_named(tmp_path: Path) -> None:
    first, second = run(tmp_path / "a", 0, of_classes([0], [0])), run(tmp_path / "b", 1, of_classes([0, 1], [0, 1]))
    kept = kept_examples([first, second], "accuracy")
    assert (kept.has(first), kept.has(second)) == (True, False)
    said = "its test examples are not those of the other runs, so its scores cannot be compared with theirs"
    assert kept.problems == (f"{second.path}: {said}",)


def test_a_damaged_file_is_named_and_the_others_are_used(tmp_path: Path) -> None:
    first, second = (run(tmp_path / name, 0, of_classes([0, 1], [0, 0])) for name in "ab")
    (first.path / FILE).write_bytes(b"nothing")
    kept = kept_examples([first, second], "accuracy")
    assert kept.has(second)
    assert FILE in kept.problems[0]


# -------------------------------------------------------------------------------------------------- what has changed


def test_churn_is_the_mean_disagreement_of_two_seeds(tmp_path: Path) -> None:
    # Seeds 0 and 1 differ on 1 of 4 examples, 0 and 2 on 2, 1 and 2 on 3.
    said = ([0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 0, 0])
    runs = [run(tmp_path / str(seed), seed, of_classes(own, [0] * 4)) for seed, own in enumerate(said)]
    kept = kept_examples(runs, "accuracy")
    assert churn(kept, runs) == pytest.approx((1 + 2 + 3) / 4 / 3)
    assert churn(kept, runs[:1]) is None


def test_numbers_and_texts_have_no_churn(tmp_path: Path) -> None:
    runs = [run(tmp_path / str(seed), seed, of_numbers([1, seed, 2], [1, 2, 4]), "pearson") for seed in (0, 1)]
    assert churn(kept_examples(runs, "pearson"), runs) is None


def test_the_examples_that_changed_most_come_first_with_what_each_arm_says(tmp_path: Path) -> None:
    reference = [
        run(tmp_path / f"r{n}", n, of_classes(own, [0, 1, 2, 0])) for n, own in enumerate(([1, 1, 2, 1], [2, 1, 2, 0]))
    ]
    arm = [
        run(tmp_path / f"a{n}", n, of_classes(own, [0, 1, 2, 0])) for n, own in enumerate(([0, 1, 1, 1], [0, 1, 2, 1]))
    ]
    kept = kept_examples([*reference, *arm], "accuracy")
    gained, lost = changed_examples(kept, arm, reference, most=2)
    assert [own.example for own in gained] == ["picture 0"]
    assert gained[0][1:] == ("cat", "dog (1), elk (1)", "cat (2)", 0.0, 1.0)
    assert [own.example for own in lost] == ["picture 3", "picture 2"]
    assert lost[1][1:] == ("elk", "elk (2)", "dog (1), elk (1)", 1.0, 0.5)
    assert len(changed_examples(kept, arm, reference, most=1)[1]) == 1


def test_changed_numbers_have_their_error_and_changed_texts_their_own_score(tmp_path: Path) -> None:
    numbers = [
        run(tmp_path / f"n{n}", 0, of_numbers(own, [1, 2, 3]), "pearson")
        for n, own in enumerate(([1, 2, 5], [1, 2.5, 3]))
    ]
    gained, lost = changed_examples(kept_examples(numbers, "pearson"), numbers[1:], numbers[:1], most=5)
    assert [own[1:] for own in gained] == [("3", "5", "3", -2.0, 0.0)]
    assert [own[1:] for own in lost] == [("2", "2", "2.5", 0.0, -0.5)]
    texts = [
        run(tmp_path / f"t{n}", 0, of_translations([own, "a b"], ["the cat sat down", "a b"]), "bleu")
        for n, own in enumerate(("the", "the cat sat down"))
    ]
    gained, lost = changed_examples(kept_examples(texts, "bleu"), texts[1:], texts[:1], most=5)
    assert lost == []
    assert gained[0][:4] == ("source 0", "the cat sat down", "the", "the cat sat down")
    assert gained[0].arm_score == pytest.approx(100)
    assert gained[0].reference_score < 20


def test_resamples_are_drawn_in_parts_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    score = score_of(of_classes(DRAW.integers(2, size=40), [0] * 40), "accuracy")
    assert score is not None
    whole = resampled_scores([score, score])
    assert whole.shape == (2, RESAMPLES)
    assert (whole[0] == whole[1]).all()
    assert examples._AT_ONCE * 50_000 * 8 < 2**26

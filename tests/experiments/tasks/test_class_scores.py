"""Scores of predicted classes: calibration as it is defined, and what is noted beside the numbers."""

import math

import numpy as np
import pytest

from rdrop.experiments.comparison.wording import NumberStyle
from rdrop.experiments.tasks.class_scores import (
    calibration_error,
    note_on_predictions,
    notes_on_classes,
    prediction_spread,
    top_class_confidence,
)


def test_confidence_is_the_softmax_of_the_top_class_whatever_the_size_of_the_logits() -> None:
    logits = np.array([[0.0, 0.0], [np.log(3), 0.0], [9e4, -9e4], [-np.inf, 5.0]], dtype=np.float32)
    np.testing.assert_allclose(top_class_confidence(logits), [0.5, 0.75, 1.0, 1.0], rtol=1e-7)


def test_the_calibration_error_is_the_gap_of_each_of_15_bins_weighted_by_its_size() -> None:
    confidence = np.array([0.95, 0.97, 0.99, 0.61, 0.65])  # the last of 15 bins, three times, and the tenth
    is_right = np.array([True, True, False, True, False])
    by_hand = 3 / 5 * abs(2 / 3 - 0.97) + 2 / 5 * abs(1 / 2 - 0.63)
    assert calibration_error(confidence, is_right) == pytest.approx(by_hand)


def test_gaps_of_opposite_sign_do_not_cancel_between_bins_but_do_within_one() -> None:
    assert calibration_error(np.array([0.5, 0.9]), np.array([True, False])) == pytest.approx((0.5 + 0.9) / 2)


def test_the_calibration_error_of_a_diverged_model_is_no_number() -> None:
    confidence = top_class_confidence(np.array([[1.0, 2.0], [np.inf, 0.0]]))
    assert math.isnan(calibration_error(confidence, np.array([True, False])))
    assert calibration_error(np.array([0.75, 0.75, 0.75, 0.75]), np.array([1, 1, 1, 0], dtype=bool)) == 0


def test_a_model_that_is_certain_and_right_has_no_calibration_error() -> None:
    assert calibration_error(np.ones(7), np.ones(7, dtype=bool)) == 0
    assert calibration_error(np.ones(4), np.array([True, False, False, False])) == 0.75


def test_a_calibration_error_is_shown_in_percent() -> None:
    style = NumberStyle.of("ece", [])
    assert style.heading("ece") == "ECE %"
    assert style.score(0.041) == "4.1"


def test_a_split_that_lacks_classes_is_noted_and_others_are_not() -> None:
    labels = {"train": np.array([0, 1, 2, 2]), "valid": np.array([1, 1]), "test": np.array([0, 1])}
    notes = notes_on_classes(("cat", "dog", "owl"), labels)
    assert notes == {
        "classes of valid": "all 2 examples are 'dog': scores of it say nothing",
        "classes of test": "no example of 'owl'",
    }
    many = notes_on_classes([str(name) for name in range(30)], {"test": np.arange(10)})
    assert many["classes of test"].endswith("'16', '17' and 12 more of the classes")


def test_a_model_that_says_one_class_of_everything_is_noted() -> None:
    classes, labels = ("cat", "dog"), np.array([0, 1, 1])
    assert note_on_predictions("test", classes, np.array([1, 1, 1]), labels) == {
        "predictions on test": "all 3 are 'dog': the model does not tell the classes apart"
    }
    assert note_on_predictions("test", classes, np.array([1, 0, 1]), labels) == {}
    assert note_on_predictions("test", classes, np.array([1, 1]), np.array([1, 1])) == {}
    (long,) = note_on_predictions("test", ["x" * 900_000, "b"], np.array([0, 0]), np.array([0, 1])).values()
    assert len(long) < 200


def test_predictions_that_are_all_alike_have_no_spread_and_certain_right_ones_have_all() -> None:
    labels = np.array([0, 1, 1, 2])
    assert prediction_spread(np.ones((4, 3)), labels) == {"prediction_spread": 0.0}
    certain = 50.0 * np.eye(3)[labels]
    assert prediction_spread(certain, labels)["prediction_spread"] == pytest.approx(1.0)
    numbers = np.array([[1.0], [3.0]], dtype=np.float32)
    assert prediction_spread(2.0 + 0.5 * (numbers - 2.0), numbers)["prediction_spread"] == pytest.approx(0.5)


def test_where_all_labels_are_equal_no_spread_is_measured() -> None:
    assert prediction_spread(np.eye(2), np.array([1, 1])) == {}

"""Which examples an update sees: all of them, length bucketing, the same wherever training resumes."""

import numpy as np
import pytest
from tests.experiments.tiny_runs import RECIPE

from rdrop.experiments.training.order import DataOrder, OrderError, UnlabeledOrder, batches_of_tokens

LENGTHS = np.array([3, 9, 1, 4, 4, 7, 2, 9, 5, 3, 6, 1])
BY_TOKENS = RECIPE.replace(batch_size=None, batch_tokens=18, accumulation=1)


def test_a_batch_padded_to_its_longest_example_stays_within_the_tokens() -> None:
    batches = batches_of_tokens(LENGTHS, 18, seed=0)
    assert sorted(np.concatenate(batches)) == list(range(len(LENGTHS)))
    assert all(LENGTHS[batch].max() * len(batch) <= 18 for batch in batches)
    assert [sorted(LENGTHS[batch]) for batch in batches] == [[9, 9], [6, 7], [4, 4, 5], [1, 1, 2, 3, 3]]


def test_the_seed_decides_which_of_equal_length_meet() -> None:
    equal = np.full(8, 2)
    drawn = {str([batch.tolist() for batch in batches_of_tokens(equal, 4, seed)]) for seed in range(4)}
    assert len(drawn) == 4
    assert str([batch.tolist() for batch in batches_of_tokens(equal, 4, 0)]) in drawn


def test_an_epoch_of_token_batches_has_every_example_once_in_an_order_of_its_own() -> None:
    order = DataOrder(BY_TOKENS, len(LENGTHS), LENGTHS)
    assert order.updates_per_epoch == 4
    epochs = [[order.at(step) for step in range(4 * epoch, 4 * epoch + 4)] for epoch in range(6)]
    for number, epoch in enumerate(epochs):
        assert [place for place, _ in epoch] == [number] * 4
        assert sorted(np.concatenate([rows for _, rows in epoch])) == list(range(len(LENGTHS)))
    assert len({tuple(rows[0] for _, rows in epoch) for epoch in epochs}) > 1


def test_the_batch_of_a_step_does_not_depend_on_what_was_asked_before() -> None:
    forward = DataOrder(BY_TOKENS, len(LENGTHS), LENGTHS)
    seen = [forward.at(step)[1].tolist() for step in range(12)]
    backward = DataOrder(BY_TOKENS.replace(updates=100, alpha=0.0), len(LENGTHS), LENGTHS)
    assert [backward.at(step)[1].tolist() for step in reversed(range(12))] == seen[::-1]


def test_a_rest_too_small_to_be_cut_is_not_used() -> None:
    batches = batches_of_tokens(np.array([4, 4, 4, 4, 1]), 8, seed=0, parts=2)
    assert [len(batch) for batch in batches] == [2, 2]


def test_the_parts_of_a_batch_of_examples_have_like_lengths_and_the_batch_stays_the_same() -> None:
    by_examples = RECIPE.replace(batch_size=4, accumulation=2)
    whole, cut = (DataOrder(by_examples, len(LENGTHS), LENGTHS, parts=parts) for parts in (1, 2))
    for step in range(9):
        rows = cut.at(step)[1]
        assert sorted(rows) == sorted(whole.at(step)[1])
        longer, shorter = np.split(LENGTHS[rows], 2)
        assert longer.min() >= shorter.max()
    drawn = DataOrder(by_examples, len(LENGTHS), None, parts=2)
    assert [drawn.at(step)[1].tolist() for step in range(9)] == [whole.at(step)[1].tolist() for step in range(9)]


def test_the_parts_of_a_batch_without_labels_have_like_lengths_too() -> None:
    whole, cut = (UnlabeledOrder(0, len(LENGTHS), LENGTHS, 6, parts=parts) for parts in (1, 3))
    for step in range(4):
        rows = cut.at(step)[1]
        assert sorted(rows) == sorted(whole.at(step)[1])
        assert LENGTHS[rows].tolist() == sorted(LENGTHS[rows], reverse=True)


@pytest.mark.parametrize(
    ("changes", "lengths", "parts", "message"),
    [
        (
            {"batch_tokens": 8},
            LENGTHS,
            1,
            r"batch_tokens \(=8\) must be at least .* example, number [17] with 9",
        ),
        (
            {},
            LENGTHS,
            3,
            r"batch_tokens \(=18\) makes batches of 2 examples, fewer than .* \(=3",
        ),
        ({}, None, 1, r"batch_tokens \(=18\): tiny has no tokens; set batch_size instead"),
        (
            {"batch_tokens": None, "batch_size": 13},
            LENGTHS,
            1,
            r"batch_size \(=13\) must be at most .* \(=12\)",
        ),
        (
            {"batch_tokens": None, "batch_size": 2},
            LENGTHS,
            4,
            r"batch_size \(=2\) must be at least .* \(=4",
        ),
    ],
)
def test_batches_that_cannot_be_made_are_refused(changes: dict, lengths: np.ndarray, parts: int, message: str) -> None:
    with pytest.raises(OrderError, match=message):
        DataOrder(BY_TOKENS.replace(**changes), len(LENGTHS), lengths, parts=parts)

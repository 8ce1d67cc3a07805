"""Held-out splits: those that were drawn, unless a class that could be in each is missing in one."""

import numpy as np
import pytest

from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.splits import fold_rows, note_on_few, notes_on_repeats, with_every_class


def drawn(size: int, held_out: int, seed: int = 0) -> dict[str, np.ndarray]:
    valid, test, train = np.split(np.random.default_rng(seed).permutation(size), [held_out, 2 * held_out])
    return {"train": train, "valid": valid, "test": test}


def test_splits_that_lack_no_class_stay_as_they_were_drawn() -> None:
    labels = np.arange(100) % 2
    rows = drawn(100, 10)
    assert all(with_every_class(rows, labels, 0)[name] is own for name, own in rows.items())


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rare", [3, 4, 6, 20])
def test_a_class_with_an_example_for_each_split_is_in_each(rare: int, seed: int) -> None:
    labels = np.zeros(1000, dtype=np.int64)
    labels[np.random.default_rng(seed).choice(1000, rare, replace=False)] = 1
    found = with_every_class(drawn(1000, 100, seed), labels, seed)
    assert {name: len(own) for name, own in found.items()} == {"train": 800, "valid": 100, "test": 100}
    assert sorted(np.concatenate([*found.values()]).tolist()) == [*range(1000)]
    assert all(labels[own].sum() > 0 for own in found.values())


def test_stratified_splits_have_of_each_class_their_share_to_about_one() -> None:
    labels = np.repeat(np.arange(4), [500, 300, 197, 3])
    rows = {"train": np.arange(0, 800), "valid": np.arange(800, 900), "test": np.arange(900, 1000)}  # by class: no draw
    found = with_every_class(rows, labels, 0)
    for name, share in (("train", 0.8), ("valid", 0.1), ("test", 0.1)):
        counts = np.bincount(labels[found[name]], minlength=4)
        assert np.abs(counts - share * np.array([500, 300, 197, 3])).max() <= 2
        assert counts.min() >= 1


def test_what_is_stratified_depends_on_the_seed_alone() -> None:
    labels = np.array([1] * 3 + [0] * 97)
    rows = {"train": np.arange(20, 100), "valid": np.arange(10), "test": np.arange(10, 20)}
    first, again, other = (with_every_class(rows, labels, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["test"], other["test"])


def test_a_split_that_is_too_small_for_all_classes_has_as_many_as_it_can() -> None:
    labels = np.arange(60) % 20
    found = with_every_class(drawn(60, 5), labels, 0)
    assert [len(found[name]) for name in ("train", "valid", "test")] == [50, 5, 5]
    assert len(np.unique(labels[found["valid"]])) == len(np.unique(labels[found["test"]])) == 5


def test_as_many_seeds_as_folds_test_every_example_once_and_choose_by_every_example_once() -> None:
    folds = [fold_rows(53, 5, seed, split_seed=0) for seed in range(5)]
    for split in ("valid", "test"):
        assert sorted(np.concatenate([fold[split] for fold in folds]).tolist()) == [*range(53)]
    for fold in folds:
        assert sorted(np.concatenate([*fold.values()]).tolist()) == [*range(53)]
        assert {len(fold["valid"]), len(fold["test"])} <= {10, 11}
    assert all(np.array_equal(folds[2][name], own) for name, own in fold_rows(53, 5, 7, split_seed=0).items())
    assert not np.array_equal(folds[0]["test"], fold_rows(53, 5, 0, split_seed=1)["test"])


def test_each_fold_has_of_every_class_its_share() -> None:
    labels = np.repeat(np.arange(3), [60, 30, 10])
    for seed in range(10):
        counts = np.bincount(labels[fold_rows(100, 10, seed, 0, labels)["test"]], minlength=3)
        assert np.abs(counts - [6, 3, 1]).max() <= 1


def test_more_folds_than_examples_are_refused() -> None:
    with pytest.raises(DataError, match="must be at most the number of examples"):
        fold_rows(4, 5, 0, 0)


def test_fewer_than_100_examples_of_valid_or_test_are_noted_and_100_are_not() -> None:
    assert note_on_few({"train": 5, "valid": 100, "test": 100}, "texts") == {}
    assert note_on_few({"train": 800, "valid": 99, "test": 100}, "texts") == {
        "few examples": "99 texts of valid choose the checkpoint; below 100, luck is larger than most gains"
    }
    assert note_on_few({"train": 80, "valid": 10, "test": 12}, "texts") == {
        "few examples": "10 texts of valid choose the checkpoint and 12 texts of test score it; below 100, luck is "
        "larger than most gains"
    }


def test_texts_that_differ_in_case_and_space_alone_are_the_same() -> None:
    splits = {"train": [("Good  film", "It is"), ("bad", "no")], "test": [("good film ", "it IS"), ("new", "one")]}
    assert notes_on_repeats(splits, "texts") == {"test texts that are trained on too": "1 of 2"}
    assert notes_on_repeats({"train": [1, 2], "test": [2]}, "rows") == {"test rows that are trained on too": "1 of 1"}

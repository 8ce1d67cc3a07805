"""Which verdicts were shown before: what is remembered, what counts as a look at fewer seeds, what damage says."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rdrop.experiments.comparison.looks import FILE, Look, earlier_looks, read_looks, record_looks
from rdrop.experiments.comparison.paired import paired_difference
from rdrop.experiments.comparison.statistics import is_shown, sign_flip_p
from rdrop.experiments.run_folder import ResultsError

ARMS = ("R-Drop (alpha 1)", "baseline")


def look(*seeds: int, comparison: str = "c", arms: tuple[str, ...] = ARMS) -> Look:
    return Look(comparison, dict.fromkeys(arms, seeds))


def test_a_look_is_remembered_once(tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0, 1, 2), look(0, comparison="other")])
    record_looks(tmp_path, [look(0, 1, 2)])
    record_looks(tmp_path, [look(0, 1, 2, 3)])
    assert read_looks(tmp_path) == [look(0, 1, 2), look(0, comparison="other"), look(0, 1, 2, 3)]


def test_without_a_look_there_is_no_file(tmp_path: Path) -> None:
    record_looks(tmp_path, [])
    assert not (tmp_path / FILE).exists()
    assert read_looks(tmp_path) == []


def test_looks_at_fewer_of_the_seeds_count_and_no_others() -> None:
    looks = [
        look(0, 1, 2),
        look(0, 1, 2, 3),
        look(0, 1, 2, 3),
        look(0, 1, 2, 3, 4),  # the present one
        look(7, 8),  # other seeds
        look(0, 1, comparison="other"),
        look(0, 1, arms=("R-Drop (alpha 2)", "baseline")),
    ]
    assert earlier_looks(looks, "c", ARMS, (0, 1, 2, 3, 4)) == [3, 4]
    assert earlier_looks(looks, "c", ARMS[::-1], (0, 1, 2)) == []


def test_seeds_count_as_seen_only_where_both_arms_had_them() -> None:
    uneven = Look("c", {ARMS[0]: (0, 1), ARMS[1]: (0, 1, 2, 3)})
    assert earlier_looks([uneven], "c", ARMS, (0, 1, 2, 3)) == [2]
    assert earlier_looks([uneven], "c", ARMS, (0, 1)) == []


@pytest.mark.parametrize(
    "line", ["{", "[]", "{}", '{"comparison": "c", "seeds": [1]}', '{"comparison":"c","seeds":{"a":["x"]}}']
)
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0)])
    with (tmp_path / FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ResultsError, match=rf"{FILE}:2: is no look at a comparison .* Delete the line"):
        read_looks(tmp_path)


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0)])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"comparison": "c", "se')
    assert read_looks(tmp_path) == [look(0)]


def test_eight_looks_at_growing_seeds_call_better_at_most_as_often_as_one() -> None:
    """Two equal arms, looked at with 6, 8, ... 20 seeds until one look says better, p times the number of looks."""
    trials, better = 1000, 0
    for differences in np.random.default_rng(0).normal(size=(trials, 20)):
        for number, seeds in enumerate(range(6, 21, 2), start=1):
            seen = dict(enumerate(differences[:seeds].tolist()))
            difference = paired_difference(seen, dict.fromkeys(seen, 0.0), higher_is_better=True)
            if is_shown(difference.interval, number * sign_flip_p(difference.per_seed)) and difference.mean > 0:
                better += 1
                break
    assert better <= stats.binom.ppf(0.999, trials, 0.05)

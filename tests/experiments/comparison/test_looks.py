"""Which verdicts were shown before: what is remembered, what counts as a look at fewer seeds, what damage says."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rdrop.experiments.comparison.looks import FILE, Look, earlier_looks, read_looks, record_looks
from rdrop.experiments.comparison.paired import paired_difference
from rdrop.experiments.comparison.statistics import is_shown, sign_flip_p
from rdrop.experiments.run_folder import ResultsError


def look(*seeds: int, arms: str = "ab") -> Look:
    return frozenset(f"{arm}{seed}" for arm in arms for seed in seeds)


def pairs(*seeds: int) -> dict[int, tuple[str, str]]:
    return {seed: (f"a{seed}", f"b{seed}") for seed in seeds}


def test_a_look_is_remembered_once(tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0, 1, 2), look(0, arms="xy")])
    record_looks(tmp_path, [look(0, 1, 2)])
    record_looks(tmp_path, [look(0, 1, 2, 3)])
    assert read_looks(tmp_path) == [look(0, 1, 2), look(0, arms="xy"), look(0, 1, 2, 3)]


def test_without_a_look_there_is_no_file(tmp_path: Path) -> None:
    record_looks(tmp_path, [])
    assert not (tmp_path / FILE).exists()
    assert read_looks(tmp_path) == []


def test_looks_at_fewer_of_the_seeds_count_and_no_others() -> None:
    looks = [
        look(0, 1, 2),
        look(0, 1, 2, 3),
        look(0, 1, 2, 3, arms="abc"),  # another arm in the comparison, the same seeds
        look(0, 1, 2, 3, 4),  # the present one
        look(7, 8),  # other seeds
        look(0, 1, arms="ac"),  # another arm
    ]
    assert earlier_looks(looks, pairs(0, 1, 2, 3, 4)) == [3, 4]
    assert earlier_looks(looks, pairs(0, 1, 2)) == []


def test_a_seed_was_seen_only_where_both_arms_had_it() -> None:
    uneven = look(0, 1, arms="a") | look(0, 1, 2, 3, arms="b")
    assert earlier_looks([uneven], pairs(0, 1, 2, 3)) == [2]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"runs": 3}', '{"runs": null}'])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0)])
    with (tmp_path / FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ResultsError, match=rf"{FILE}:2: is no look at a verdict .* Delete the line"):
        read_looks(tmp_path)


def test_a_line_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0)])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"runs": ["a')
    assert read_looks(tmp_path) == [look(0)]


def told_apart_at_a_look(differences: NDArray[np.float64], *, corrected: bool) -> bool:
    """Whether one of the looks at 6, 8, ... 20 seeds shows a difference."""
    for number, seeds in enumerate(range(6, 21, 2), start=1):
        seen = dict(enumerate(differences[:seeds].tolist()))
        difference = paired_difference(seen, dict.fromkeys(seen, 0.0), higher_is_better=True)
        p_value = sign_flip_p(difference.per_seed) * (number if corrected else 1)
        if is_shown(difference.interval, p_value):
            return True
    return False


def test_eight_looks_tell_equal_arms_apart_in_five_percent_and_without_the_correction_in_thirteen() -> None:
    trials = np.random.default_rng(0).normal(size=(1000, 20))
    corrected, uncorrected = (
        sum(told_apart_at_a_look(own, corrected=corrected) for own in trials) for corrected in (True, False)
    )
    assert corrected <= stats.binom.ppf(0.999, len(trials), 0.05)
    assert uncorrected / len(trials) == pytest.approx(0.13, abs=0.03)

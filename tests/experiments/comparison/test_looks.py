"""Which verdicts were shown before: what is remembered, what counts as a look at fewer seeds, what damage says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from rdrop.experiments.comparison.arms import Arm
from rdrop.experiments.comparison.contest import Contest, Outcome, judged
from rdrop.experiments.comparison.looks import FILE, Look, read_looks, record_looks, seeds_seen
from rdrop.experiments.comparison.paired import paired_difference
from rdrop.experiments.comparison.statistics import is_shown, sign_flip_p
from rdrop.experiments.recipe.method import Method
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


def test_a_look_at_all_runs_counts_in_the_folder_of_a_recipe_too(tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0, 1)])
    record_looks(tmp_path / "digits", [look(0, 1), look(0, 1, 2)])
    assert read_looks(tmp_path / "digits") == [look(0, 1), look(0, 1, 2)]
    assert len((tmp_path / "digits" / FILE).read_text().splitlines()) == 1


def test_without_a_look_there_is_no_file(tmp_path: Path) -> None:
    record_looks(tmp_path, [])
    assert not (tmp_path / FILE).exists()
    assert read_looks(tmp_path) == []


ARMS = (Arm("R-Drop (alpha 1)", Method(alpha=1.0), 32, ()), Arm("baseline", Method(alpha=0.0), 32, ()))
NOTHING = (1.0, -1.1, 1.2, -0.9, 1.3, -1.4, 1.1, -1.0, 0.9)
"""Differences that show nothing, whoever looks."""


def contests(*differences: Sequence[float], looks: Sequence[Sequence[int]]) -> tuple[Contest, ...]:
    """Contests with these differences over the seeds; `looks` have the first so many seeds of each contest."""
    scores = [dict(enumerate(map(float, own))) for own in differences]
    entries = [(*ARMS, paired_difference(own, dict.fromkeys(own, 0.0), higher_is_better=True)) for own in scores]
    return judged(entries, [[frozenset(range(seeds)) for seeds in look] for look in looks])


def test_the_seeds_of_a_contest_were_seen_where_both_of_its_runs_were() -> None:
    looks = [
        look(0, 1),
        look(0, 1, 2, 3),
        look(0, 1, 2, 3, arms="abc"),  # another arm in the comparison
        look(0, 1, arms="a") | look(0, 1, 2, arms="b"),
        look(7, 8),  # other seeds
        look(0, 1, arms="ac"),  # another arm
    ]
    ours = [seeds for (seeds,) in seeds_seen(looks, [pairs(0, 1, 2)])]
    assert ours == [{0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1}, set(), set()]


def test_looks_at_fewer_seeds_count_once_and_the_present_one_does_not() -> None:
    (found,) = contests(NOTHING, looks=[[6], [7], [7], [9]])
    assert found.looks == (6, 7)
    (alone,) = contests(NOTHING, looks=[])
    assert found.p_value == min(1, 3 * alone.p_value)


def test_looks_at_too_few_seeds_to_show_anything_do_not_count() -> None:
    assert contests(NOTHING, looks=[[2], [5]])[0].looks == ()
    assert contests(NOTHING, looks=[[5], [6]])[0].looks == (6,)


def test_a_look_counts_by_the_contests_it_had_not_by_those_added_since() -> None:
    first, second = contests(NOTHING, NOTHING, looks=[[6, 0]])  # one contest, which six seeds can decide
    assert (first.looks, second.looks) == ((6,), ())
    assert [own.looks for own in contests(NOTHING, NOTHING, looks=[[6, 6]])] == [(), ()]  # two: seven are needed
    assert [own.looks for own in contests(NOTHING, NOTHING, looks=[[7, 7]])] == [(7,), (7,)]


def test_no_look_counts_after_one_that_has_shown_the_same() -> None:
    shown_at_six = (1.0, 1.1, 1.2, 0.9, 1.3, 1.4, 1.2, 1.1)
    assert contests(shown_at_six, looks=[[6], [7]])[0].looks == ()
    shown_at_seven = (1.0, 1.1, 1.2, 0.9, 1.3, 0.0, 1.2, 1.1, 1.0)  # a tie among six: p is 0.06
    found = contests(shown_at_seven, looks=[[6], [8]])[0]
    assert (found.looks, found.outcome) == ((6,), Outcome.BETTER)


def test_a_look_that_has_shown_the_contrary_counts() -> None:
    turned = (-0.1, -0.1, -0.11, -0.12, -0.1, -0.1, 9.0, 8.0, 9.0)
    assert contests(turned[:6], looks=[])[0].outcome is Outcome.WORSE
    assert contests(turned, looks=[[6]])[0].looks == (6,)


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"runs": 3}', '{"runs": null}'])
def test_a_damaged_line_is_named(line: str, tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0)])
    with (tmp_path / FILE).open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ResultsError, match=rf"{FILE}:2: is no look at a verdict .* Delete the line"):
        read_looks(tmp_path)


def test_a_line_that_a_crash_cut_off_is_left_out_also_when_others_follow(tmp_path: Path) -> None:
    record_looks(tmp_path, [look(0)])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"runs": ["a')
    assert read_looks(tmp_path) == [look(0)]
    record_looks(tmp_path, [look(0), look(1)])
    record_looks(tmp_path, [look(2)])
    assert read_looks(tmp_path) == [look(0), look(1), look(2)]


def told_apart_at_a_look(differences: NDArray[np.float64], looks: Sequence[int], *, corrected: bool) -> bool:
    """Whether a look at so many seeds shows a difference: before the first that does so, all count."""
    for earlier, seeds in enumerate(looks):
        seen = dict(enumerate(differences[:seeds].tolist()))
        difference = paired_difference(seen, dict.fromkeys(seen, 0.0), higher_is_better=True)
        p_value = sign_flip_p(difference.per_seed) * (2**earlier if corrected else 1)
        if is_shown(difference.interval, p_value):
            return True
    return False


@pytest.mark.parametrize(("looks", "uncorrected"), [(range(6, 21, 2), 0.13), ((8, 12, 16, 20), 0.12), ((12, 24), 0.09)])
def test_looks_tell_equal_arms_apart_in_seven_percent_and_without_the_correction_in_more(
    looks: Sequence[int], uncorrected: float
) -> None:
    trials = np.random.default_rng(0).normal(size=(1000, max(looks)))
    found, without = (
        sum(told_apart_at_a_look(own, looks, corrected=corrected) for own in trials) / len(trials)
        for corrected in (True, False)
    )
    assert found <= stats.binom.ppf(0.999, len(trials), 0.07) / len(trials)
    assert without == pytest.approx(uncorrected, abs=0.03)

"""The plots of training from their records: where two means cross, when a run has begun, and what the page says."""

import re

import pytest
from benchmarks import curves
from benchmarks.curves import Course, begun, courses, crossing


def course(*values: float) -> Course:
    return Course(list(range(100, 100 + 100 * len(values), 100)), [list(values)])


@pytest.mark.parametrize(
    ("ours", "baseline", "expected"),
    [
        ((1, 2, 5, 6), (2, 3, 4, 5), 300),
        ((3, 2, 5, 6), (2, 3, 4, 5), 300),  # ahead at first, then behind: only what lasts counts
        ((3, 4, 5, 6), (2, 3, 4, 5), 100),
        ((1, 4, 5, 4), (2, 3, 4, 5), None),
        ((2, 3), (2, 3), None),
    ],
)
def test_two_means_cross_where_one_is_ahead_to_the_end(ours, baseline, expected):
    assert crossing(course(*ours), course(*baseline)) == expected
    assert crossing(course(*(-x for x in ours)), course(*(-x for x in baseline)), higher_is_better=False) == expected


def test_the_words_say_who_was_behind_before_the_means_cross():
    said = curves._beside(course(1, 2, 5, 7), course(2, 3.5, 4, 5), "arm")
    assert said == "ahead of the arm from update 300 on (+2.0 at the last); before that behind by up to 1.5, at 200"
    said = curves._beside(course(3, 4), course(2, 3), "arm")
    assert said == "ahead of the arm from update 100 on (+1.0 at the last)"
    said = curves._beside(course(3, 2), course(2, 3), "arm")
    assert said == "not ahead of the arm at the end (-1.0 at the last)"


def test_a_run_has_begun_at_the_first_score_with_a_use_of_the_source():
    runs = Course([50, 100, 150], [[0.0, 0.2, 0.4], [0.3, 0.1, 0.5], [0.0, 0.01, 0.02]])
    assert begun(runs) == [150, 50, None]


def test_the_mean_stands_where_every_seed_has_a_score():
    panel = curves.FIGURES["crossing"][1]
    rows = [{"kind": "valid", "step": step, "bleu": step / 10} for step in (100, 200, 300)]
    found = courses([{"arm": "a", "rows": rows}, {"arm": "a", "rows": rows[1:]}, {"arm": "b", "rows": rows}], panel)
    assert found["a"] == Course([200, 300], [[20.0, 30.0], [20.0, 30.0]])
    assert list(found) == ["a", "b"]


def test_plots_and_page_are_what_the_records_give():
    text = curves.PAGE.read_text(encoding="utf-8")
    assert curves.rewritten(text) == text
    for figure in curves.FIGURES:
        if curves.read(figure):
            committed = (curves.PLOTS / f"{figure}.svg").read_text(encoding="utf-8")
            drawn = [re.findall(r"<text [^>]*>([^<]*)</text>", svg) for svg in (committed, curves.draw(figure))]
            assert drawn[0] == drawn[1] != []
            assert f"plots/{figure}.svg" in text


def test_every_record_names_command_machine_versions_and_date():
    for figure in curves.FIGURES:
        for record in curves.read(figure):
            assert record["command"].startswith("rdrop ")
            assert record["machine"]["device"]
            assert record["versions"]["torch"]
            assert record["finished"]

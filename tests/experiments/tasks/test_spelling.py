"""What a reader sees of a string: blank texts, missing labels, labels that are one and labels that are two."""

import pytest

from rdrop.experiments.tasks.spelling import NUMBER, is_blank, is_missing, label_key, note_on_case


@pytest.mark.parametrize(
    "text", ["", " \t", "\u2028", "\u200b", "\ufeff \u00a0", "\u00ad\u200d\ufe0f", "\u3164\u2800", "\u0301"]
)
def test_what_shows_nothing_is_blank(text: str) -> None:
    assert is_blank(text)


@pytest.mark.parametrize("text", ["x", " . ", "\u200bя", "👍", "漢", "0", "\ue000", "\u0915\u093f"])
def test_what_shows_something_is_not_blank(text: str) -> None:
    assert not is_blank(text)


@pytest.mark.parametrize(
    "label",
    [
        "",
        " ",
        "\u200b",
        "nan",
        "NaN",
        "NAN",
        "-nan",
        "NA",
        "na",
        "N/A",
        "null",
        "NULL",
        "None",
        "<NA>",
        "#N/A",
        " nan ",
        "\\N",
        "(null)",
        "-nan(ind)",
        "#VALUE!",
        "#DIV/0!",
        "1.#IND",
        "-1.#QNAN",
        "nan\u200b",
        "\uff2e\uff21",
        "NONE",
        "nil",
        "[null]",
        "<null>",
        '"nan"',
        "''",
        "[]",
        "NA_character_",
        "n.a.",
        "#NV",
        "#N/D",
        "#\u041d/\u0414",
        "#WERT!",
        "#SPILL!",
        "#¿NOMBRE?",
        "#¡DIV/0!",
        "#DĚLENÍ_NULOU!",
        "#YOK",
        "Err:502",
    ],
)
def test_what_programs_write_for_nothing_is_a_missing_label(label: str) -> None:
    assert is_missing(label)


@pytest.mark.parametrize(
    "label", ["none", "Na", "no", "0", "unknown", "nano", "nullable", "-", "--", "?", ".", "#MeToo", "1.5"]
)
def test_an_answer_is_no_missing_label(label: str) -> None:
    assert not is_missing(label)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1", "1.0"),
        ("0", "0.000"),
        ("0", "-0.0"),
        ("10", "1e1"),
        ("1", "\uff11"),
        ("-1", "\u22121"),
        ("e-mail", "e\u2011mail"),
        ("isn't", "isn\u2019t"),
        ("good", "good "),
        ("very good", "very  good"),
        ("very good", "very\u00a0good"),
        ("caf\u00e9", "cafe\u0301"),
        ("good", "go\u200bod"),
        ("good", "\ufeffgood"),
        ("❤", "❤\ufe0f"),
        ("ﬁne", "fine"),
        *(("pos", f"po{unseen}s") for unseen in "\u180b\u17b4\U000e0100\u034f\u2065"),
        *(("po s", f"po{blank}s ") for blank in "\u3164\u2800\u115f\uffa0"),
        ("pos", "pos\u3164"),
        ("C", "\u0421"),
        ("1", "1,0"),
        ("1.5", "1,5"),
        ("1000", "1,000"),
        ("1000.5", "1 000,5"),
    ],
)
def test_two_spellings_are_one_label(first: str, second: str) -> None:
    assert label_key(first) == label_key(second)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("1", "10"),
        ("1", "-1"),
        ("12345678901234567890", "12345678901234567891"),
        ("good", "Good"),
        ("e", "é"),
        ("1_0", "10"),
        ("a b", "ab"),
        ("1" * 30 + "2", "1" * 30 + "3"),
        ("5e1234567", "50e1234566"),
        ("5e1234567", "5e1234568"),
        ("1,2", "1,2,3"),
    ],
)
def test_two_labels_are_two(first: str, second: str) -> None:
    assert label_key(first) != label_key(second)


def test_classes_that_differ_in_case_alone_are_noted() -> None:
    assert note_on_case(["Good", "bad", "good"]) == {
        "names of classes": "'Good' and 'good' are different classes by case alone"
    }
    assert note_on_case(["\u0412", "\u0432"]) != {}
    assert note_on_case(["Good", "bad"]) == {}


def test_a_number_is_written_in_ascii_digits_without_underscores() -> None:
    for number in ("1", "-0.5", "+.5", "1.", "1e3", "1E-05"):
        assert NUMBER.fullmatch(number), number
    for other in ("1_000", "\uff11", "\u0661", "nan", "inf", "0x1", "1,5", "", "1e", "²"):
        assert not NUMBER.fullmatch(other), other

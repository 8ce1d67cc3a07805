"""Subwords: text that comes back as it was, and the splits of subword-nmt."""

import random
from pathlib import Path

import pytest
from tests.real_data import real_data

from rdrop.experiments.tasks.files import DataError, read_lines
from rdrop.experiments.tasks.tokenizing import LONGEST_WORD, with_short_words
from rdrop.experiments.tasks.translation.subwords import (
    END,
    PAD,
    SPECIAL_TOKENS,
    START,
    UNKNOWN,
    CodedSubwords,
    LearnedSubwords,
    read_codes,
)

LINES = [
    'A man (on the left), "smiling", waits.',
    "Ein Mann (links), „lächelnd“, wartet.",
    "port-a-potty 3.5 km/h; it's  two spaces",
    "The men are waiting; the man is not.",
]


@pytest.fixture(scope="module")
def iwslt() -> Path:
    return real_data("iwslt14-de-en")


@pytest.mark.parametrize("tokenized", [False, True])
def test_learned_subwords_give_the_text_back(tokenized: bool) -> None:
    subwords = LearnedSubwords(LINES, 120, tokenized=tokenized)
    assert subwords.decode(subwords.encode(LINES)) == LINES


@pytest.mark.parametrize("tokenized", [False, True])
def test_a_word_of_hundreds_of_kilobytes_is_learned_from_in_pieces_and_comes_back_whole(tokenized: bool) -> None:
    long_word = "x" + "".join(random.Random(0).choices("abcd", k=LONGEST_WORD - 1)) * 6
    (cut,) = with_short_words([f"before {long_word} after"])
    assert max(map(len, cut.split())) == LONGEST_WORD
    assert cut.replace(" ", "") == f"before{long_word}after"
    assert [*with_short_words([*LINES, "y" * LONGEST_WORD])] == [*LINES, "y" * LONGEST_WORD]
    subwords = LearnedSubwords([*LINES, long_word], 120, tokenized=tokenized)
    assert subwords.decode(subwords.encode([long_word])) == [long_word]


def test_the_same_lines_in_another_order_give_the_same_subwords() -> None:
    lines = [" ".join(random.Random(i).choices(LINES[0].split() + LINES[1].split(), k=9)) for i in range(200)]
    first = LearnedSubwords(lines, 90, tokenized=False)
    second = LearnedSubwords(random.Random(0).sample(lines, len(lines)), 90, tokenized=False)
    assert first.encode(lines) == second.encode(lines)
    assert first.size == second.size <= 90


def test_the_first_ids_are_the_special_tokens_and_text_cannot_name_them() -> None:
    assert (START, PAD, END, UNKNOWN) == (0, 1, 2, 3)
    lines = [*LINES, "</s> <pad> <unk> <s>"]
    subwords = LearnedSubwords(lines, 120, tokenized=False)
    ids = subwords.encode(lines)[-1]
    assert min(ids) >= len(SPECIAL_TOKENS)
    assert subwords.decode([ids]) == ["</s> <pad> <unk> <s>"]


def test_special_tokens_are_not_in_the_text() -> None:
    subwords = LearnedSubwords(LINES, 120, tokenized=False)
    (ids,) = subwords.encode(["the man"])
    assert subwords.decode([[START, *ids, UNKNOWN, END, PAD]]) == ["the man"]


def test_a_character_that_was_never_seen_is_unknown() -> None:
    subwords = LearnedSubwords(LINES, 120, tokenized=False)
    assert UNKNOWN in subwords.encode(["the 字 man"])[0]


def test_punctuation_is_apart_in_plain_text_and_part_of_a_word_in_tokenized_text() -> None:
    lines = ["it &apos;s", "it &apos;s"] * 20
    assert len(LearnedSubwords(lines, 500, tokenized=True).encode(["it &apos;s"])[0]) == 2
    assert len(LearnedSubwords(lines, 500, tokenized=False).encode(["it &apos;s"])[0]) == 6  # it ▁ & apos ; s


@pytest.mark.parametrize("language", ["de", "en"])
def test_codes_split_as_subword_nmt_does(iwslt: Path, language: str) -> None:
    plain = read_lines(iwslt / f"test.tok.{language}.xz")[:2500]
    split = read_lines(iwslt / f"test.bpe.{language}.xz")[:2500]
    subwords = CodedSubwords(iwslt / "bpe.10k.codes.xz", plain)
    tokens = [[subwords.token(i) for i in ids] for ids in subwords.encode(plain)]
    assert [" ".join(line) for line in tokens] == split
    assert subwords.decode(subwords.encode(plain)) == plain


def test_codes_know_the_tokens_of_the_training_lines_most_frequent_first(tmp_path: Path) -> None:
    codes = tmp_path / "codes"
    codes.write_text("#version: 0.2\na b\nab c</w>\n", encoding="utf-8")
    subwords = CodedSubwords(codes, ["abc abc abc ab", "b"])
    assert [subwords.token(i) for i in range(4, subwords.size)] == ["abc", "b", "a@@"]
    # "ab" is a and b, for its b ends the word; "abx" has a letter, "abab" a token, that was never seen
    assert subwords.encode(["abc ab", "abx", "", "abab"]) == [[4, 6, 5], [UNKNOWN, UNKNOWN], [], [UNKNOWN, 6, 5]]
    assert subwords.decode([[4, 6, 5, END], []]) == ["abc ab", ""]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a b\n", r"codes:1: must be '#version: 0\.2', not 'a b'"),
        ("#version: 0.2\na b\na  b\n", "codes:3: must be two tokens with a space between them, not 'a  b'"),
        ("#version: 0.2\nab\n", "codes:2: must be two tokens"),
        ("", "codes:1: the file is empty"),
    ],
)
def test_what_is_no_codes_file_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "codes").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_codes(tmp_path / "codes")

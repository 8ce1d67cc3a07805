"""BLEU: values that can be worked out by hand, and each form under its own name."""

import pytest

from rdrop.experiments.tasks.translation.scores import BleuScorer, has_words, split_hyphens


def test_bleu_is_the_geometric_mean_of_the_precisions() -> None:
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples, 1 of 2 quadruples are right; the lengths are equal
    scores = BleuScorer("en", tokenized=False)(["a b c d e"], ["a b c d f"])
    assert scores["bleu"] == pytest.approx(100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))


def test_a_translation_too_short_is_penalized() -> None:
    scores = BleuScorer("en", tokenized=False)(["a b c d"], ["a b c d e"])
    assert scores["bleu"] == pytest.approx(100 * 2.718281828 ** (1 - 5 / 4))


def test_hyphens_between_letters_are_split_and_no_others() -> None:
    assert split_hyphens("a well-known fact - yes") == "a well ##AT##-##AT## known fact - yes"
    assert split_hyphens("a-b -c d-") == "a ##AT##-##AT## b -c d-"


def test_splitting_hyphens_raises_the_score() -> None:
    hypothesis, reference = "that is a well-known old thing", "that is a well-done old thing"
    scores = BleuScorer("en", tokenized=True)([hypothesis], [reference])
    # split: that is a well ##AT##-##AT## [known|done] old thing, with 7/8, 5/7, 3/6 and 2/5 right
    assert scores["bleu_tokenized_split"] == pytest.approx(100 * (7 / 8 * 5 / 7 * 3 / 6 * 2 / 5) ** (1 / 4))
    assert scores["bleu_tokenized_split"] > scores["bleu_tokenized"]


def test_only_the_split_form_forgives_another_case() -> None:
    scores = BleuScorer("de", tokenized=False)(["Der Hund läuft im Park"], ["der Hund läuft im Park"])
    assert scores["bleu_tokenized_split"] == pytest.approx(100)
    assert scores["bleu"] < 100


def test_tokenized_text_is_detokenized_for_the_plain_form() -> None:
    scorer = BleuScorer("en", tokenized=True)
    hypothesis, reference = "it &apos;s good , very good", "it &apos;s good , very bad"
    scores = scorer([hypothesis], [reference])
    plain = BleuScorer("en", tokenized=False)(["it's good, very good"], ["it's good, very bad"])
    assert scores["bleu"] == pytest.approx(plain["bleu"])
    assert set(scores) == {"bleu", "bleu_tokenized", "bleu_tokenized_split"}


def test_chinese_is_scored_by_characters() -> None:
    scores = BleuScorer("zh", tokenized=False)(["我爱你们。"], ["我爱我们。"])
    # 4 of 5 characters; 我爱 and 们。 of 4 pairs; no triple, which smoothing counts as 1/2 of 3, then 1/4 of 2
    assert scores["bleu"] == pytest.approx(100 * (4 / 5 * 2 / 4 * 1 / 6 * 1 / 8) ** (1 / 4))


@pytest.mark.parametrize(
    ("language", "reference"), [("ja", "犬が走る。"), ("th", "หมาวิ่ง"), ("km", "ឆ្កែរត់"), ("lo", "ໝາແລ່ນ")]
)
def test_languages_without_spaces_are_scored_by_characters(language: str, reference: str) -> None:
    scorer = BleuScorer(language, tokenized=False)
    one_short = scorer([reference[:-1]], [reference])["bleu"]
    assert one_short == pytest.approx(100 * 2.718281828 ** (1 - len(reference) / (len(reference) - 1)))
    assert "tok:char" in scorer.signatures["bleu"]


@pytest.mark.parametrize("text", ["我爱你们。", "いぬがはしる。", "イヌ", "หมาวิ่ง", "我爱PyTorch。"])
def test_text_without_spaces_has_no_words_unless_the_language_says_so(text: str) -> None:
    assert not has_words("target", [text, text, "two words"])
    assert has_words("target", [text, "two words"])
    assert all(has_words(language, [text]) for language in ("zh", "ja", "th", "lo", "km", "my"))


@pytest.mark.parametrize("text", ["Ja.", "안녕", "我 爱 你们", "да", "نعم", ""])
def test_one_word_and_divided_text_are_words(text: str) -> None:
    assert has_words("target", [text])


def test_every_form_has_its_signature() -> None:
    scorer = BleuScorer("zh", tokenized=False)
    scorer(["你"], ["我"])
    assert "tok:zh" in scorer.signatures["bleu"]
    assert "case:mixed" in scorer.signatures["bleu"]
    assert "tok:none" in scorer.signatures["bleu_tokenized_split"]
    assert "case:lc" in scorer.signatures["bleu_tokenized_split"]


@pytest.mark.parametrize("tokenized", [False, True])
def test_of_text_in_lower_case_the_signatures_say_so_and_the_scores_are_the_same(tokenized: bool) -> None:
    hypothesis, reference = "it &apos;s a well-known old thing .", "it &apos;s a well-done old thing ."
    cased, lower = (BleuScorer("en", tokenized=tokenized, lowercase=lowercase) for lowercase in (False, True))
    assert lower([hypothesis], [reference]) == cased([hypothesis], [reference])
    assert all("case:lc" in signature for signature in lower.signatures.values())
    assert "case:mixed" in cased.signatures["bleu"]


def test_empty_translations_score_zero() -> None:
    assert BleuScorer("en", tokenized=True)(["", ""], ["a b", "c"]) == {
        "bleu": 0.0,
        "bleu_tokenized": 0.0,
        "bleu_tokenized_split": 0.0,
    }

"""ROUGE, as the field reports it: F1 of the rouge-score package, with Porter's stemmer, in 0..100; of any script.

"rougeL" is rouge-score's rougeLsum, the summary-level form that papers call ROUGE-L: the longest common subsequence of
each sentence of the reference with the whole summary. A sentence ends at a newline, and nowhere else.
"""

import unicodedata
from collections.abc import Mapping, Sequence

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer, Tokenizer

from rdrop.experiments.tasks.spelling import UNSPACED

KINDS = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeLsum"}
"""Our names, and rouge-score's."""


class WordsOfAnyScript(Tokenizer):  # type: ignore[misc]  # rouge-score has no types
    """Splits text into its words: runs of letters and digits, in lower case.

    Of text in ASCII they are exactly rouge-score's own, which drops all other letters. A character of a script without
    spaces, such as Chinese or Thai, is a word of its own. Words in ASCII are stemmed, others are not.
    """

    def __init__(self) -> None:
        self._english = DefaultTokenizer(use_stemmer=True)
        self._table = _Characters()

    def tokenize(self, text: str) -> list[str]:
        if text.isascii():
            return list(self._english.tokenize(text))
        words = unicodedata.normalize("NFC", text.lower()).translate(self._table).split()
        return [word for each in words for word in (self._english.tokenize(each) if each.isascii() else [each])]


class _Characters(dict[int, str]):
    """Maps each character to what becomes of it, found when it is first met: letters, marks and digits are kept."""

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        if UNSPACED.match(letter):
            kept = f" {letter} "
        elif letter in "\u200c\u200d":  # joiners within words of Persian or Hindi
            kept = ""
        else:
            category = unicodedata.category(letter)
            kept = letter if category[0] in "LM" or category in ("Nd", "Nl") else " "  # of "m²" rouge-score has "m"
        self[code] = kept
        return kept


def has_words(references: Sequence[Sequence[str]]) -> bool:
    """Whether ROUGE finds words in most of the first references: a summary of "?!" scores 0 against anything."""
    tokenize = WordsOfAnyScript().tokenize
    return 2 * sum(bool(tokenize(own[0])) for own in references) > len(references)


def rouge(summaries: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the mean over the summaries, each against the best of its references, for each kind by itself.

        rouge(["the cat sat"], [["the cat"]])  # {"rouge1": 80.0, "rouge2": 66.7, "rougeL": 80.0}

    A summary without a letter or digit scores 0.
    """
    return mean_rouge(rouge_of_each(summaries, references))


def rouge_of_each(summaries: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Scores each summary by itself, against the best of its references for each kind."""
    scorer = RougeScorer(list(KINDS.values()), tokenizer=WordsOfAnyScript())
    found = [scorer.score_multi(own, summary) for summary, own in zip(summaries, references, strict=True)]
    return [{name: 100 * score[kind].fmeasure for name, kind in KINDS.items()} for score in found]


def mean_rouge(of_each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each kind over the summaries that `rouge_of_each` has scored."""
    return {name: sum(scores[name] for scores in of_each) / len(of_each) for name in KINDS}

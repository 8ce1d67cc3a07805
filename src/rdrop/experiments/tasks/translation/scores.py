"""BLEU in the forms that papers print, by sacreBLEU, each under a name of its own.

`bleu`                  sacreBLEU of the text as it is written: the form to compare with other papers
`bleu_tokenized`        of the words as they came, apart by spaces: what multi-bleu.perl gives
`bleu_tokenized_split`  of the lower-cased words, compounds split at their hyphens: the form of R-Drop's figures
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from sacrebleu.metrics.bleu import BLEU
from sacremoses import MosesDetokenizer

from rdrop.experiments.tasks.spelling import UNSPACED

HYPHEN = re.compile(r"(\S)-(\S)")
NGRAM = 4
"""Words of the longest n-grams that BLEU compares: where no reference has so many, a perfect translation scores 0."""
TOKENIZERS = {"zh": "zh", **dict.fromkeys(("ja", "th", "lo", "km", "my"), "char")}
"""SacreBLEU's tokenizers for languages that are written without spaces."""


class BleuScorer:
    """Scores of text in `language`; `tokenized`: its words are apart by spaces, and escaped, as Moses leaves them.

    `lowercase`: the references came in lower case, as the translations do; the signatures say so.

    Chinese (`zh`), Japanese (`ja`), Thai (`th`), Lao (`lo`), Khmer (`km`) and Burmese (`my`) are scored by characters.

    Text as it is written has the first and the last form, the last on the tokens that sacreBLEU makes of it. Of
    tokenized text the first form is that of Moses's detokenizer, on both sides.
    """

    def __init__(self, language: str, *, tokenized: bool, lowercase: bool = False) -> None:
        written = BLEU(tokenize=TOKENIZERS.get(language, "13a"), lowercase=lowercase)
        tokens = BLEU(tokenize="none", lowercase=lowercase, force=True)  # force: it would warn of tokenized text
        split = BLEU(tokenize="none", lowercase=True, force=True)
        self._forms: dict[str, tuple[BLEU, Callable[[str], str]]] = {}
        if tokenized:
            moses = MosesDetokenizer(lang=language)
            self._forms["bleu"] = written, lambda line: moses.detokenize(line.split(" "))
            self._forms["bleu_tokenized"] = tokens, str
            self._forms["bleu_tokenized_split"] = split, split_hyphens
        else:
            self._forms["bleu"] = written, str
            self._forms["bleu_tokenized_split"] = split, lambda line: split_hyphens(written.tokenizer(line))
        self.signatures: dict[str, str] = {}
        """sacreBLEU's signature of each form, once something was scored."""

    def __call__(self, hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        """Each form of BLEU of the corpus, in 0..100; one reference for each hypothesis."""
        scores = {}
        for name, (bleu, prepared) in self._forms.items():
            result = bleu.corpus_score(
                [prepared(line) for line in hypotheses], [[prepared(line) for line in references]]
            )
            scores[name] = float(result.score)
            self.signatures[name] = str(bleu.get_signature())
        return scores

    def too_short(self, name: str, references: Sequence[str]) -> int:
        """Counts the references with fewer words than `NGRAM`, to which this form of BLEU adds little."""
        bleu, prepared = self._forms[name]
        return sum(len(bleu.tokenizer(prepared(line)).split()) < NGRAM for line in references)

    def counts_of_each(self, hypotheses: Sequence[str], references: Sequence[str]) -> list[dict[str, list[int]]]:
        """Counts for each sentence and form what BLEU adds up over a corpus.

        They are the length of the hypothesis and of the reference, then how many n-grams of 1 to 4 words match, then
        how many there are.
        """
        counted = []
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            found = {}
            for name, (bleu, prepared) in self._forms.items():
                score = bleu.corpus_score([prepared(hypothesis)], [[prepared(reference)]])
                found[name] = [score.sys_len, score.ref_len, *score.counts, *score.totals]
            counted.append(found)
        return counted


def has_words(language: str, references: Sequence[str]) -> bool:
    """Whether a `BleuScorer` finds words in them: not in text without spaces, unless it knows that of the language."""
    undivided = sum(len(line.split()) == 1 and UNSPACED.search(line) is not None for line in references)
    return language in TOKENIZERS or 2 * undivided <= len(references)


def split_hyphens(line: str) -> str:
    """Writes "a well-known fact" as "a well ##AT##-##AT## known fact": more words can match, so the score rises."""
    return HYPHEN.sub(r"\1 ##AT##-##AT## \2", line)

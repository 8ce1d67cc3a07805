"""ROUGE, as the field reports it: F1 of the rouge-score package, with Porter's stemmer, in 0..100.

"rougeL" is rouge-score's rougeLsum, the summary-level form that papers call ROUGE-L: the longest common subsequence of
each sentence of the reference with the whole summary. A sentence ends at a newline, and nowhere else.
"""

from collections.abc import Mapping, Sequence

from rouge_score.rouge_scorer import RougeScorer

KINDS = {"rouge1": "rouge1", "rouge2": "rouge2", "rougeL": "rougeLsum"}
"""Our names, and rouge-score's."""


def rouge(summaries: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns the mean over the summaries, each against the best of its references, for each kind by itself.

        rouge(["the cat sat"], [["the cat"]])  # {"rouge1": 80.0, "rouge2": 66.7, "rougeL": 80.0}

    A summary without a letter or digit scores 0.
    """
    return mean_rouge(rouge_of_each(summaries, references))


def rouge_of_each(summaries: Sequence[str], references: Sequence[Sequence[str]]) -> list[dict[str, float]]:
    """Scores each summary by itself, against the best of its references for each kind."""
    scorer = RougeScorer(list(KINDS.values()), use_stemmer=True)
    found = [scorer.score_multi(own, summary) for summary, own in zip(summaries, references, strict=True)]
    return [{name: 100 * score[kind].fmeasure for name, kind in KINDS.items()} for score in found]


def mean_rouge(of_each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the mean of each kind over the summaries that `rouge_of_each` has scored."""
    return {name: sum(scores[name] for scores in of_each) / len(of_each) for name in KINDS}

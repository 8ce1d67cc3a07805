"""The scores that the literature reports for a recipe's data set, beside which our own runs stand."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """One published comparison: a metric of a data set without and with R-Drop, and where it is stated."""

    dataset: str
    """As the paper names it, without the split: "IWSLT14 De-En"."""
    metric: str
    """As a reader says it: "BLEU", "ROUGE-L", "accuracy", "perplexity"."""
    model: str
    """As the paper names it, without the method: "Transformer"."""
    baseline: float | None
    rdrop: float | None
    source: str
    """Where the figures stand: "Liang et al. 2021, table 1"."""
    method: str = "R-Drop"
    """What `rdrop` was made with: "R-Drop + Cutoff", "SimCut"."""
    higher_is_better: bool = True
    split: str = "test"
    """What was scored, as the literature calls it: "test", "dev", "valid"."""
    headline: bool = False
    """Whether `rdrop` is one of the results that the paper is known by."""

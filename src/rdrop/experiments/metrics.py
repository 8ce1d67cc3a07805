"""The table of metrics: what a reader calls each score, how its numbers are written, and which direction is better.

A scorer and this table are all that a new metric touches. A metric of your own task joins by `add`, where the task is
defined; the results of its runs carry its row, so that a report can be made where your code is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


class MetricError(ValueError):
    """A score that is not in the table, or a row of the table that cannot be."""


@dataclass(frozen=True)
class Metric:
    """One score of a split, by the name that it has in a result."""

    name: str
    label: str
    """As a reader says it, in the middle of a sentence: "accuracy", "ROUGE-L"."""
    higher_is_better: bool = True
    percent: bool = False
    """Whether it is a fraction of 1 that is shown in percent; its differences are points then."""
    decimals: int = 3
    """Shown where no interval says how many are meant; of percent, those of the percentage."""

    def is_better(self, score: float, other: float) -> bool:
        """Whether `score` is better than `other`."""
        return score > other if self.higher_is_better else score < other


def _share(name: str, label: str, *, higher_is_better: bool = True) -> Metric:
    return Metric(name, label, higher_is_better, percent=True, decimals=1)


METRICS: dict[str, Metric] = {}


def add(*metrics: Metric) -> None:
    """Adds metrics to the table; the same row twice is one.

    Raises `MetricError` for a name that stands there with another meaning.
    """
    for metric in metrics:
        if METRICS.setdefault(metric.name, metric) != metric:
            raise MetricError(f"metric {metric.name!r} is in the table as {METRICS[metric.name]}; take another name")


def find(name: str) -> Metric:
    """Returns the metric of that name. Raises `MetricError` for one that is not in the table."""
    if name not in METRICS:
        raise MetricError(
            f"metric {name!r} is not in the table, which has {', '.join(METRICS)}; where your task is defined, add it: "
            f"rdrop.experiments.metrics.add(Metric({name!r}, 'its name for a reader', higher_is_better=...))"
        )
    return METRICS[name]


def rows(names: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the rows of these metrics as a result carries them."""
    return {name: asdict(find(name)) for name in names}


def add_rows(carried: Mapping[str, Any]) -> None:
    """Adds the rows that a result carries. Raises `MetricError` for what is no row, or contradicts the table."""
    for name, row in carried.items():
        try:
            metric = Metric(**row)
        except TypeError as error:
            raise MetricError(f"metric {name!r}: {error}") from None
        types = {"name": str, "label": str, "higher_is_better": bool, "percent": bool, "decimals": int}
        if metric.name != name or not all(isinstance(getattr(metric, key), kind) for key, kind in types.items()):
            raise MetricError(f"metric {name!r}: not a row of the table")
        add(metric)


add(
    Metric("loss", "loss", higher_is_better=False),
    _share("accuracy", "accuracy"),
    _share("accuracy_mismatched", "accuracy mismatched"),
    _share("f1", "F1"),
    _share("f1_macro", "F1 macro"),
    _share("mcc", "MCC"),
    _share("pearson", "pearson"),
    _share("spearman", "spearman"),
    _share("ece", "ECE", higher_is_better=False),
    Metric("perplexity", "perplexity", higher_is_better=False, decimals=2),
    Metric("bleu", "BLEU", decimals=2),
    Metric("bleu_tokenized", "BLEU tokenized", decimals=2),
    Metric("bleu_tokenized_split", "BLEU tokenized split", decimals=2),
    Metric("rouge1", "ROUGE-1", decimals=2),
    Metric("rouge2", "ROUGE-2", decimals=2),
    Metric("rougeL", "ROUGE-L", decimals=2),
)

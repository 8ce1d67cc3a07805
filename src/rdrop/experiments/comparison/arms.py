"""The arms of a comparison: ways of training, each with its finished runs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import NamedTuple

from rdrop.experiments.comparison.finished_runs import FinishedRun, is_finite_number
from rdrop.experiments.comparison.learning import has_learned
from rdrop.experiments.recipe.method import Method


@dataclass(frozen=True)
class Arm:
    """One way of training: the finished runs that differ in the seed alone, one a seed, in the order of the seeds."""

    label: str
    method: Method
    batch: int
    """Examples or tokens per update; all runs that are compared count the same."""
    runs: tuple[FinishedRun, ...]

    @property
    def marked_label(self) -> str:
        """The label, with a dagger if some of the runs are known to have learned nothing."""
        return f"{self.label} \N{DAGGER}" if self.seeds_without_learning else self.label

    @property
    def phrase(self) -> str:
        """The label as part of a sentence."""
        return f"the {self.label.replace(', ', ' with ')}" if self.method.is_plain else self.label

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def seeds_without_learning(self) -> tuple[int, ...]:
        """The seeds whose run is known to have learned nothing; runs that cannot be judged are not among them."""
        return tuple(run.seed for run in self.runs if has_learned(run) is False)

    def scores(self, metric: str, split: str) -> dict[int, float]:
        """Returns the score of each seed whose score is a finite number."""
        found = {run.seed: run.result[split].get(metric) for run in self.runs}
        return {seed: float(score) for seed, score in found.items() if is_finite_number(score)}

    def cost(self, key: str) -> float | None:
        """Returns the median over the seeds of one entry of result.json's `cost`; None where no run measured it."""
        measured = [run.result["cost"][key] for run in self.runs if is_finite_number(run.result["cost"].get(key))]
        return float(statistics.median(measured)) if measured else None


class Gap(NamedTuple):
    """Seeds that cannot be compared because this arm has no score for them."""

    arm: str
    seeds: tuple[int, ...]
    reason: str

    def __str__(self) -> str:
        noun = "seed" if len(self.seeds) == 1 else "seeds"
        return f"left out of {self.arm}: {noun} {', '.join(map(str, self.seeds))} ({self.reason})"

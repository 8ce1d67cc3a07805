"""The arms of a comparison: ways of training, each with its finished runs, and what a reader calls them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rdrop.experiments.comparison.finished_runs import FinishedRun, LostRun, is_finite_number
from rdrop.experiments.comparison.learning import has_learned, how_diverged
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.method import Method, times

ARM_KEYS = (
    *("updates", "epochs", "warmup_updates", "warmup_share", "batch_size", "batch_tokens", "accumulation"),
    *("optimizer", "learning_rate", "schedule", "weight_decay", "clip_norm", "label_smoothing"),
    *("evaluate_every", "select_by", "patience", "average_last", "init_from"),
    *("data.unlabeled", "data.unlabeled_batch"),
)
"""The keys in which arms may differ, beside those of the method and the dropout rates of the model."""


def may_tell_arms_apart(key: str) -> bool:
    """Whether arms of one comparison may differ in the key: the data that are scored and the network are the same."""
    return key in Method.model_fields or key in ARM_KEYS or bool(re.fullmatch(r"model\..*dropout", key))


def is_of_rdrop(key: str) -> bool:
    """Whether the key means nothing to plain training."""
    return key in Method.model_fields or key in ("data.unlabeled", "data.unlabeled_batch")


@dataclass(frozen=True)
class Arm:
    """One way of training: the runs that differ in the seed alone, one a seed, in the order of the seeds."""

    label: str
    method: Method
    batch: int
    """Examples or tokens per update; all runs that are compared count the same."""
    runs: tuple[FinishedRun, ...]
    """The finished ones."""
    lost: tuple[LostRun, ...] = ()
    """Those that have diverged without a score."""

    @property
    def first(self) -> FinishedRun | LostRun:
        """The first of its runs, a finished one if there is any."""
        return self.runs[0] if self.runs else self.lost[0]

    @property
    def recipe(self) -> dict[str, Any]:
        """The saved recipe of its first run."""
        return self.first.recipe

    @property
    def failures(self) -> dict[int, str]:
        """The ends of the runs that have no score, by the seed."""
        return {run.seed: run.why for run in self.lost}

    @property
    def marked_label(self) -> str:
        """The label, with a dagger if some of the runs are known to have learned nothing, or have diverged."""
        return f"{self.label} \N{DAGGER}" if self.has_failed_runs else self.label

    @property
    def phrase(self) -> str:
        """The label as part of a sentence."""
        if not self.method.is_plain:
            return self.label
        name, *details = self.label.split(", ")
        qualities = [detail for detail in details if not detail.startswith(_PARTICIPLES)]
        return ", ".join(filter(None, (f"the {_with(name, qualities)}", *(d for d in details if d not in qualities))))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def seeds_without_learning(self) -> tuple[int, ...]:
        """The seeds whose run is known to have learned nothing; runs that cannot be judged are not among them."""
        return tuple(run.seed for run in self.runs if has_learned(run) is False)

    @property
    def diverged(self) -> dict[int, str]:
        """The seeds whose run has diverged, and how far its valid loss came or what ended it."""
        finished = {run.seed: seen for run in self.runs if (seen := how_diverged(run)) is not None}
        return {**finished, **self.failures}

    @property
    def has_failed_runs(self) -> bool:
        return bool(self.seeds_without_learning or self.diverged)

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


_PARTICIPLES = ("stopped", "chosen", "started", "from")


def label_of(arm: Recipe, reference: Recipe) -> str:
    """Returns the reader's name for an arm by what its recipe differs in: "baseline, twice the updates, dropout 0.3".

    An arm that learns from examples without labels is always called so.
    """
    names = [arm.method.label(), *([] if arm.method.is_plain else unlabeled_words(arm.saved()))]
    return ", ".join([*names, *_differences(arm, reference)])


def unlabeled_words(recipe: dict[str, Any]) -> list[str]:
    """Returns "unlabeled" where an arm of R-Drop with this saved recipe has examples without labels."""
    data = recipe.get("data")
    return ["unlabeled"] if isinstance(data, dict) and data.get("unlabeled") is not None else []


def _differences(arm: Recipe, reference: Recipe) -> Iterator[str]:
    keys = [key for key in arm.descriptions() if key not in Method.model_fields and key != "seed"]
    keys = [key for key in keys if not (arm.method.is_plain and is_of_rdrop(key))]
    changed = {key: arm.value(key) for key in keys if arm.value(key) != reference.value(key)}
    for unit in ("batch_size", "batch_tokens"):
        if changed.get(unit) and reference.value(unit):
            same = as_many_updates(reference, changed[unit] / reference.value(unit))
            changed = {key: value for key, value in changed.items() if same.get(key) != value}
    stretch = arm.updates / reference.updates if arm.updates and reference.updates else 1.0
    if changed.get("warmup_updates") == reference.warmup_updates * stretch:
        del changed["warmup_updates"]  # the same course of the learning rate, stretched
    rates = arm.model.dropout_rates()
    if rates and not any(rates.values()) and any(key in changed for key in (f"model.{name}" for name in rates)):
        changed = {key: value for key, value in changed.items() if key.removeprefix("model.") not in rates}
        yield "no dropout"
    for key, value in changed.items():
        yield from _words(key, value, reference.value(key))


def as_many_updates(recipe: Recipe, times: float) -> dict[str, Any]:
    """Returns what else changes with a batch that many times as large, for as many updates and scores."""
    changes: dict[str, Any] = {}
    if recipe.epochs is not None:
        changes["epochs"] = recipe.epochs * times
    if recipe.evaluate_every is None:  # it is scored after each of its epochs, which are shorter
        if recipe.patience is not None:
            changes["patience"] = max(1, round(recipe.patience * times))
        if recipe.average_last > 1:
            changes["average_last"] = max(1, round(recipe.average_last * times))
    return changes


def _words(key: str, value: Any, other: Any) -> Iterator[str]:
    name = key.rpartition(".")[2].replace("_", " ")
    match key:
        case "updates" | "epochs" | "batch_size" | "batch_tokens" if value and other and value % other == 0:
            yield f"{times(int(value // other))} the {name.removesuffix(' size').removesuffix(' tokens')}"
        case "updates" | "epochs" if value is None:
            return  # the other one says how long
        case "updates" | "epochs":
            yield f"{str(value).removesuffix('.0')} {name}"
        case "select_by":
            yield "stopped at its best valid loss" if value == "loss" else "chosen by its valid score"
        case "init_from":
            yield "from new weights" if value is None else f"started from {Path(value).name}"
        case "schedule":
            yield f"{value} schedule"
        case "data.unlabeled":
            if value is not None and other is not None:
                yield f"of {value}"
        case "data.unlabeled_batch":
            yield f"{value} unlabeled per update"
        case _ if value is None:
            yield f"no {name}"
        case _:
            yield f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _with(name: str, qualities: list[str]) -> str:
    if not qualities:
        return name
    *first, last = qualities
    return f"{name} with {', '.join(first)} and {last}" if first else f"{name} with {last}"

"""Finished runs in, comparisons out: every arm against its baseline over the seeds that both have.

Runs belong together when their recipes agree on everything except the seed and `ARM_KEYS`. An arm is what the runs of
one column share. Plain training (`alpha=0`) makes one pass whatever the other keys of the method say, so these do not
tell two baselines apart. For a baseline of batch B (examples or tokens) the comparison also holds plain training with
`m * B` an update, where m is 2 or the number of passes of an R-Drop arm: what the compute of the extra passes could
have bought.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from rdrop.experiments.comparison.finished_runs import FinishedRun, is_finite_number, sort_out
from rdrop.experiments.comparison.paired import PairedDifference, paired_difference
from rdrop.experiments.comparison.wording import LARGE_METRICS, PERCENT_METRICS, NumberStyle, verdict
from rdrop.experiments.run_folder import RunRecord

ARM_KEYS = (
    *("alpha", "passes", "every", "dropout", "cutoff", "cutoff_ratio", "task_passes", "divergence"),
    *("fused", "encoder_once", "batch_size", "batch_tokens"),
)
_LOWER_IS_BETTER = frozenset(("loss", "perplexity", "ece"))
_HIGHER_IS_BETTER = (PERCENT_METRICS | LARGE_METRICS) - _LOWER_IS_BETTER
_MODES = {"fused": "fused", "encoder_once": "encoder once"}
_BATCH_WORDS = {2: "twice", 3: "three times", 4: "four times"}


class Method(NamedTuple):
    """The part of a recipe that tells the arms of one comparison apart."""

    alpha: float
    passes: int
    every: int
    details: tuple[str, ...]
    """What else is not as in plain R-Drop, in words."""
    name: str
    batch: int
    """Examples or tokens per update; all runs that are compared count the same."""

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> Method:
        batch = recipe["batch_size"] or recipe["batch_tokens"]
        if recipe["alpha"] == 0:
            return cls(0.0, 1, 1, (), "baseline", batch)
        return cls(recipe["alpha"], recipe["passes"], recipe["every"], _details(recipe), _name(recipe), batch)

    @property
    def is_plain(self) -> bool:
        return self.alpha == 0

    def label(self, baseline_batch: int) -> str:
        """The arm's name for a reader, e.g. "R-Drop (alpha 1)" or "baseline, twice the batch"."""
        if self.is_plain:
            times = self.batch // baseline_batch
            return "baseline" if times == 1 else f"baseline, {_BATCH_WORDS.get(times, f'{times} times')} the batch"
        details = [f"alpha {self.alpha:g}"]
        if self.passes != 2:
            details.append(f"{self.passes} passes")
        if self.every != 1:
            details.append(f"every {self.every} steps")
        return f"{self.name} ({', '.join([*details, *self.details])})"


def _name(recipe: Mapping[str, Any]) -> str:
    if recipe["cutoff"] is None:
        return "R-Drop"
    if recipe["cutoff"] == "embedding" and recipe["task_passes"] == "first":
        return "SimCut"
    return f"R-Drop + {recipe['cutoff']} cutoff"


def _details(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    details = []
    if recipe["cutoff"] is not None:
        details.append(f"cutoff {recipe['cutoff_ratio']:g}")
    if recipe["task_passes"] == "first" and _name(recipe) != "SimCut":
        details.append("task loss of the first pass")
    if recipe["divergence"] != "symmetric":
        details.append("KL from the first pass")
    if recipe["dropout"] is not None:
        details.append(f"dropout {' and '.join(f'{rate:g}' for rate in recipe['dropout'])}")
    return (*details, *(word for key, word in _MODES.items() if recipe[key]))


@dataclass(frozen=True)
class Arm:
    """One way of training: the finished runs that differ in the seed alone, one a seed, in the order of the seeds."""

    label: str
    method: Method
    runs: tuple[FinishedRun, ...]

    @property
    def phrase(self) -> str:
        """The label as part of a sentence."""
        return f"the {self.label.replace(', ', ' with ')}" if self.method.is_plain else self.label

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(run.seed for run in self.runs)

    def scores(self, metric: str, split: str) -> dict[int, float]:
        """Seed -> score, for the runs whose score is a finite number."""
        found = {run.seed: run.result[split].get(metric) for run in self.runs}
        return {seed: float(score) for seed, score in found.items() if is_finite_number(score)}

    def cost(self, key: str) -> float | None:
        """The median over the seeds of one entry of result.json's `cost`; None where no run measured it."""
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


class MetricSection(NamedTuple):
    """One metric of one split: every arm with its difference from the baseline (None: there is nothing to pair)."""

    split: str
    metric: str
    rows: tuple[tuple[Arm, PairedDifference | None], ...]

    @property
    def differences(self) -> tuple[PairedDifference, ...]:
        return tuple(difference for _, difference in self.rows if difference is not None)

    @property
    def style(self) -> NumberStyle:
        return NumberStyle.of(self.metric, self.differences)


@dataclass(frozen=True)
class Comparison:
    """The arms trained by one recipe, the baseline first.

    Without a finished plain run of the recipe's batch size there is no `baseline`, and nothing is compared. `repeats`
    are further runs of an arm and seed that already has a later one; they are listed, never averaged in.
    """

    name: str
    metric: str
    higher_is_better: bool
    arms: tuple[Arm, ...]
    repeats: tuple[FinishedRun, ...] = ()

    @property
    def baseline(self) -> Arm | None:
        first = self.arms[0]
        return first if first.method.is_plain and first.label == "baseline" else None

    @property
    def challengers(self) -> tuple[Arm, ...]:
        """Every arm except the baseline."""
        return self.arms if self.baseline is None else self.arms[1:]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that at least one arm has."""
        return tuple(sorted({seed for arm in self.arms for seed in arm.seeds}))

    def direction(self, metric: str) -> bool | None:
        """Whether higher is better in this metric; None where that is not known.

        A word of its name tells: "bleu_tokenized" is BLEU, "task_loss" is a loss.
        """
        if metric == self.metric:
            return self.higher_is_better
        words = metric.split("_")
        if not _LOWER_IS_BETTER.isdisjoint(words):
            return False
        return None if _HIGHER_IS_BETTER.isdisjoint(words) else True

    def results(self) -> tuple[MetricSection, ...]:
        """The result table: the compared metric on test, then on valid, then the other metrics on test."""
        found = {metric: None for arm in self.arms for run in arm.runs for metric in run.result["test"]}
        others = [("test", metric) for metric in found if metric != self.metric]
        return tuple(
            MetricSection(split, metric, tuple((arm, self._against_baseline(arm, metric, split)) for arm in self.arms))
            for split, metric in [("test", self.metric), ("valid", self.metric), *others]
        )

    def _against_baseline(self, arm: Arm, metric: str, split: str) -> PairedDifference | None:
        if self.baseline is None or arm is self.baseline:
            return None
        return self.difference(arm, self.baseline, metric, split)

    def difference(self, arm: Arm, reference: Arm, metric: str | None = None, split: str = "test") -> PairedDifference:
        """`arm` minus `reference`, paired over the seeds for which both have a finite score."""
        metric = metric or self.metric
        return paired_difference(arm.scores(metric, split), reference.scores(metric, split), self.direction(metric))

    def cost_ratio(self, arm: Arm, key: str) -> float | None:
        """The arm's median cost over the baseline's; None where either was not measured."""
        own, plain = arm.cost(key), None if self.baseline is None else self.baseline.cost(key)
        return own / plain if own is not None and plain else None

    def contests(self) -> tuple[tuple[Arm, Arm], ...]:
        """The pairs (arm, reference) worth a sentence: each R-Drop arm against the baseline, then against plain
        training with the larger batch; without any R-Drop arm, the larger batch against the baseline.
        """
        if self.baseline is None:
            return ()
        plain = [arm for arm in self.challengers if arm.method.is_plain]
        rdrop = [arm for arm in self.challengers if not arm.method.is_plain]
        references = [self.baseline, *plain]
        return tuple((arm, reference) for reference in references for arm in rdrop) or tuple(
            (arm, self.baseline) for arm in plain
        )

    def verdict(self) -> str:
        """What the comparison shows, in plain language: a sentence for each contest, one a line."""
        if self.baseline is None:
            return "Nothing to compare: no run of the baseline (alpha 0) has finished."
        if not self.challengers:
            return "Nothing to compare: only the baseline has finished runs."
        style = self.results()[0].style
        return "\n".join(
            verdict(self.difference(arm, reference), self.metric, style, arm.phrase, reference.phrase)
            for arm, reference in self.contests()
        )

    def gaps(self) -> tuple[Gap, ...]:
        """The seeds left out of a comparison, by the arm that lacks them and why."""
        return tuple(gap for arm in self.arms for gap in self._gaps_of(arm) if gap.seeds)

    def _gaps_of(self, arm: Arm) -> tuple[Gap, Gap]:
        scored = arm.scores(self.metric, "test")
        absent = tuple(seed for seed in self.seeds if seed not in arm.seeds)
        not_finite = tuple(seed for seed in arm.seeds if seed not in scored)
        return (
            Gap(arm.label, absent, "no finished run"),
            Gap(arm.label, not_finite, f"test {self.metric} is not a finite number"),
        )


def comparisons(records: Iterable[RunRecord]) -> list[Comparison]:
    """Group the finished runs into comparisons, in the order of their recipes' names.

    Unfinished and damaged runs take no part; `rdrop.experiments.comparison.finished_runs.sort_out` names them.
    """
    families: dict[str, list[FinishedRun]] = {}
    for run in sort_out(records)[0]:
        families.setdefault(_family(run), []).append(run)
    return [found for key in sorted(families) for found in _comparisons_of_family(families[key])]


def _family(run: FinishedRun) -> str:
    """What all runs of one comparison share, as text that sorts by the recipe's name."""
    shared = {key: value for key, value in run.recipe.items() if key not in {"seed", *ARM_KEYS}}
    score = [run.result["metric"], run.result["higher_is_better"]]
    return json.dumps([run.recipe["name"], score, shared], sort_keys=True)


def _comparisons_of_family(family: list[FinishedRun]) -> Iterable[Comparison]:
    runs: dict[Method, list[FinishedRun]] = {}
    for run in family:
        runs.setdefault(Method.of(run.recipe), []).append(run)

    shown: set[Method] = set()
    for batch in sorted({method.batch for method in runs}):
        own = [method for method in runs if method.batch == batch]
        # A larger plain batch that a smaller one already shows as its "twice the batch" is not told twice.
        if shown.issuperset(own):
            continue
        multiples = {2, *(method.passes for method in own if not method.is_plain)}
        larger = [m for m in runs if m.is_plain and m.batch in {k * batch for k in multiples}]
        methods = sorted(own) + sorted(larger)
        shown.update(methods)
        yield _comparison(batch, {method: runs[method] for method in methods})


def _comparison(batch: int, runs: Mapping[Method, list[FinishedRun]]) -> Comparison:
    arms, repeats = [], []
    for method, of_method in runs.items():
        # The latest run of a seed counts, whatever order the folders were read in.
        latest = {run.seed: run for run in sorted(of_method, key=lambda run: (run.result["finished"], str(run.path)))}
        arms.append(Arm(method.label(batch), method, tuple(latest[seed] for seed in sorted(latest))))
        repeats += [run for run in of_method if latest[run.seed] is not run]
    first = arms[0].runs[0]
    return Comparison(
        first.recipe["name"],
        first.result["metric"],
        first.result["higher_is_better"],
        tuple(arms),
        tuple(sorted(repeats, key=lambda run: str(run.path))),
    )

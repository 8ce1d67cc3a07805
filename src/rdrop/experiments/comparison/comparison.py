"""Finished runs in, comparisons out: every arm against its baseline over the seeds that both have.

Runs belong together when their recipes agree on everything except the seed, the method and the size of the batch. An
arm is what the runs of one column share. Plain training (`alpha=0`) makes one pass whatever the other keys of the
method say, so these do not tell two baselines apart. For a baseline of batch B (examples or tokens) the comparison also
holds plain training with `m * B` an update, where m is 2 or the number of passes of an R-Drop arm: what the compute of
the extra passes could have bought.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from rdrop.experiments import metrics
from rdrop.experiments.comparison.finished_runs import FinishedRun, is_finite_number, split_usable
from rdrop.experiments.comparison.paired import PairedDifference, paired_difference
from rdrop.experiments.comparison.wording import NumberStyle, verdict
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.run_folder import RunRecord

BATCH_KEYS = ("batch_size", "batch_tokens")


@dataclass(frozen=True)
class Arm:
    """One way of training: the finished runs that differ in the seed alone, one a seed, in the order of the seeds."""

    label: str
    method: Method
    batch: int
    """Examples or tokens per update; all runs that are compared count the same."""
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
    arms: tuple[Arm, ...]
    repeats: tuple[FinishedRun, ...] = ()

    @property
    def higher_is_better(self) -> bool:
        return metrics.find(self.metric).higher_is_better

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
        return paired_difference(
            arm.scores(metric, split), reference.scores(metric, split), metrics.find(metric).higher_is_better
        )

    def cost_ratio(self, arm: Arm, key: str) -> float | None:
        """The arm's median cost over the baseline's; None where either was not measured."""
        own, plain = arm.cost(key), None if self.baseline is None else self.baseline.cost(key)
        return own / plain if own is not None and plain else None

    def side_by_side(self) -> int:
        """The most runs that shared the machine while one of these was trained, as time and memory depend on it."""
        found = [run.result["machine"].get("side_by_side", 1) for arm in self.arms for run in arm.runs]
        return max([1, *(count for count in found if isinstance(count, int))])

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
        """Returns what the comparison shows, in plain language: a sentence for each contest, one a line."""
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

    Unfinished and damaged runs take no part; `rdrop.experiments.comparison.finished_runs.split_usable` names them.
    """
    families: dict[str, list[FinishedRun]] = {}
    for run in split_usable(records)[0]:
        families.setdefault(_family(run), []).append(run)
    return [found for key in sorted(families) for found in _comparisons_of_family(families[key])]


def _family(run: FinishedRun) -> str:
    """Returns what all runs of one comparison share, as text that sorts by the recipe's name."""
    shared = {key: value for key, value in run.recipe.items() if key not in {"seed", "method", *BATCH_KEYS}}
    return json.dumps([run.recipe["name"], run.result["metric"], shared], sort_keys=True)


def _comparisons_of_family(family: list[FinishedRun]) -> Iterable[Comparison]:
    runs: dict[_Key, list[FinishedRun]] = {}
    for run in family:
        runs.setdefault(_Key(run.method.arm(), run.batch), []).append(run)

    shown: set[_Key] = set()
    for batch in sorted({key.batch for key in runs}):
        own = [key for key in runs if key.batch == batch]
        # A larger plain batch that a smaller one already shows as its "twice the batch" is not told twice.
        if shown.issuperset(own):
            continue
        multiples = {2, *(key.method.passes for key in own if not key.method.is_plain)}
        larger = [key for key in runs if key.method.is_plain and key.batch in {k * batch for k in multiples}]
        keys = [*sorted(own, key=_Key.order), *sorted(larger, key=_Key.order)]
        shown.update(keys)
        yield _comparison(batch, {key: runs[key] for key in keys})


class _Key(NamedTuple):
    """Returns what the runs of one arm share."""

    method: Method
    batch: int

    def order(self) -> tuple[object, ...]:
        return (*self.method.order(), self.batch)


def _comparison(batch: int, runs: Mapping[_Key, list[FinishedRun]]) -> Comparison:
    arms, repeats = [], []
    for key, of_arm in runs.items():
        # The latest run of a seed counts, whatever order the folders were read in.
        latest = {run.seed: run for run in sorted(of_arm, key=lambda run: (run.result["finished"], str(run.path)))}
        label = key.method.label(key.batch // batch)
        arms.append(Arm(label, key.method, key.batch, tuple(latest[seed] for seed in sorted(latest))))
        repeats += [run for run in of_arm if latest[run.seed] is not run]
    first = arms[0].runs[0]
    return Comparison(
        first.recipe["name"],
        first.result["metric"],
        tuple(arms),
        tuple(sorted(repeats, key=lambda run: str(run.path))),
    )

"""Finished runs in, comparisons out: every arm against its baseline over the seeds that both have.

Runs belong together when their recipes agree on everything except the seed, the method and the size of the batch, or
where a design says so (`designs`). An arm is what the runs of one column share. Plain training (`alpha=0`) makes one
pass whatever the other keys of the method say, so these do not tell two baselines apart. For a baseline of batch B
(examples or tokens) the comparison also holds plain training with `m * B` an update, where m is 2 or the number of
passes of an R-Drop arm: what the compute of the extra passes could have bought.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rdrop.experiments import metrics
from rdrop.experiments.comparison import hints, sentences
from rdrop.experiments.comparison.arms import Arm, Gap, unlabeled_words
from rdrop.experiments.comparison.contest import Contest, Outcome, judged
from rdrop.experiments.comparison.designs import Design, arm_digest
from rdrop.experiments.comparison.examples import KeptExamples, churn, example_difference, kept_examples
from rdrop.experiments.comparison.finished_runs import (
    FinishedRun,
    LostRun,
    is_finite_number,
    lost_runs,
    split_usable,
)
from rdrop.experiments.comparison.looks import Look, seeds_seen
from rdrop.experiments.comparison.paired import PairedDifference, paired_difference
from rdrop.experiments.comparison.sections import ArmScores, Section
from rdrop.experiments.comparison.statistics import least_seeds, probability_of_improvement
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.run_folder import RunRecord, data_files

BATCH_KEYS = ("batch_size", "batch_tokens")

_TestRow = tuple[str, str]  # a metric and the label of an arm
_Run = FinishedRun | LostRun


LEAST_BYTES = 2**25
"""Extra memory below which a ratio says nothing: the first run of a process takes some 20 MB more than the next."""


@dataclass(frozen=True)
class Comparison:
    """The arms trained by one recipe, the baseline first.

    Without a plain run of the recipe's batch size, finished or diverged, there is no `baseline`, and nothing is
    compared. `repeats` are further runs of an arm and seed that already has a later one; they are listed, never
    averaged in.
    """

    name: str
    metric: str
    arms: tuple[Arm, ...]
    repeats: tuple[FinishedRun, ...] = ()
    looks: tuple[Look, ...] = ()
    """The verdicts that were shown before, on any runs."""
    baseline_label: str = "baseline"
    subject_label: str | None = None
    """The arm that is judged against each of the others; None: every R-Drop arm, against plain training."""
    are_new_scores: bool = False
    """Whether the scores are those of `rdrop evaluate`, of which the runs keep no predictions."""

    @property
    def higher_is_better(self) -> bool:
        return metrics.find(self.metric).higher_is_better

    @property
    def baseline(self) -> Arm | None:
        first = self.arms[0]
        return first if first.method.is_plain and first.label == self.baseline_label else None

    @property
    def subject(self) -> Arm | None:
        """The arm of the recipe itself, where the comparison was designed around it."""
        return next((arm for arm in self.arms if arm.label == self.subject_label), None)

    @property
    def challengers(self) -> tuple[Arm, ...]:
        """Every arm except the baseline."""
        return self.arms if self.baseline is None else self.arms[1:]

    @property
    def runs(self) -> tuple[FinishedRun, ...]:
        """All runs, also those that a later one of the same arm and seed replaces."""
        return (*(run for arm in self.arms for run in arm.runs), *self.repeats)

    @property
    def paths(self) -> frozenset[Path]:
        """The folders of all runs, also of those that have no score."""
        return frozenset(run.path for run in (*self.runs, *(run for arm in self.arms for run in arm.lost)))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that at least one arm has finished."""
        return tuple(sorted({seed for arm in self.arms for seed in arm.seeds}))

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """The compared metric on test, then on valid, then the other metrics on test.

        The p values of the verdict are corrected for one another, and those of all other rows of test likewise. Valid
        chose the checkpoint, so nothing is tested on it.
        """
        p_values = self._p_of_verdict | self._p_of_others
        parts = [("test", self.metric), ("valid", self.metric)]
        parts += [("test", metric) for metric in self._test_metrics() if metric != self.metric]
        return tuple(
            Section(split, metric, tuple(self._scores(arm, metric, split, p_values) for arm in self.arms))
            for split, metric in parts
        )

    def _test_metrics(self) -> list[str]:
        return list(dict.fromkeys(metric for arm in self.arms for run in arm.runs for metric in run.result["test"]))

    def _scores(self, arm: Arm, metric: str, split: str, p_values: Mapping[_TestRow, float | None]) -> ArmScores:
        scores = tuple(arm.scores(metric, split).values())
        if self.baseline is None or arm is self._center:
            return ArmScores(arm, scores, None, None, None)
        own, reference = (arm, self.baseline) if self.subject is None else (self.subject, arm)
        difference = self.difference(own, reference, metric, split)
        p_value = p_values.get((metric, arm.label)) if split == "test" else None
        ours, theirs = (tuple(side.scores(metric, split).values()) for side in (own, reference))
        improvement = probability_of_improvement(ours, theirs, difference.higher_is_better) if ours and theirs else None
        return ArmScores(arm, scores, difference, p_value, improvement)

    @property
    def _center(self) -> Arm | None:
        """The arm that the others are set beside, row by row: the subject, or the baseline."""
        return self.subject or self.baseline

    @cached_property
    def _p_of_verdict(self) -> dict[_TestRow, float | None]:
        center = self._center
        beside = [(own.reference if own.arm is center else own.arm, own) for own in self.contests]
        return {(self.metric, arm.label): own.p_value for arm, own in beside if center in (own.arm, own.reference)}

    @cached_property
    def _p_of_others(self) -> dict[_TestRow, float | None]:
        center = self._center
        if self.baseline is None or center is None:
            return {}
        rows = [(metric, arm) for metric in self._test_metrics() for arm in self.arms if arm is not center]
        others = [(metric, arm) for metric, arm in rows if (metric, arm.label) not in self._p_of_verdict]
        pairs = [(*((arm, center) if self.subject is None else (center, arm)), metric) for metric, arm in others]
        of_others = zip(others, self._judged(pairs), strict=True)
        return {(metric, arm.label): contest.p_value for (metric, arm), contest in of_others}

    def difference(self, arm: Arm, reference: Arm, metric: str | None = None, split: str = "test") -> PairedDifference:
        """`arm` minus `reference`, paired over the seeds for which both have a finite score."""
        metric = metric or self.metric
        return paired_difference(
            arm.scores(metric, split), reference.scores(metric, split), metrics.find(metric).higher_is_better
        )

    def cost_ratio(self, arm: Arm, key: str) -> float | None:
        """The arm's median cost over the baseline's; None where either was not measured, or is too small to be told."""
        own, plain = arm.cost(key), None if self.baseline is None else self.baseline.cost(key)
        if own is None or not plain or (key == "peak_extra_bytes" and min(own, plain) < LEAST_BYTES):
            return None
        return own / plain

    def side_by_side(self) -> int:
        """The most runs that shared the machine while one of these was trained, as time and memory depend on it."""
        found = [run.result["machine"].get("side_by_side", 1) for arm in self.arms for run in arm.runs]
        return max([1, *(count for count in found if isinstance(count, int))])

    @cached_property
    def contests(self) -> tuple[Contest, ...]:
        """The contests worth a sentence: each R-Drop arm against the baseline, then against plain training with the
        larger batch; without any R-Drop arm, the larger batch against the baseline. Of a design: its subject against
        each of the others. They are judged together.
        """
        if self.baseline is None:
            return ()
        if self.subject is not None:
            others = [arm for arm in self.arms if arm is not self.subject]
            return self._judged([(self.subject, reference, self.metric) for reference in others])
        plain = [arm for arm in self.challengers if arm.method.is_plain]
        rdrop = [arm for arm in self.challengers if not arm.method.is_plain]
        pairs = [(arm, reference, self.metric) for reference in (self.baseline, *plain) for arm in rdrop]
        return self._judged(pairs or [(arm, self.baseline, self.metric) for arm in plain])

    def _judged(self, pairs: Iterable[tuple[Arm, Arm, str]]) -> tuple[Contest, ...]:
        """Judges arms together, each against its reference in a metric of test."""
        entries = [(arm, reference, self.difference(arm, reference, metric)) for arm, reference, metric in pairs]
        return judged(entries, seeds_seen(self.looks, [self._run_names(*entry) for entry in entries]))

    @staticmethod
    def _run_names(arm: Arm, reference: Arm, difference: PairedDifference) -> dict[int, tuple[str, str]]:
        names, others = ({run.seed: run.path.name for run in side.runs} for side in (arm, reference))
        return {seed: (names[seed], others[seed]) for seed in difference.seeds}

    def look(self) -> Look:
        """Returns what is remembered when this verdict is shown."""
        return frozenset(run.path.name for arm in self.arms for run in arm.runs)

    @cached_property
    def kept(self) -> KeptExamples:
        """The predictions of test that the runs keep. Runs of folds have no test examples in common."""
        if self.are_new_scores:
            return KeptExamples(self.metric, {})
        runs = [run for arm in self.arms for run in arm.runs if hints.folds_of(run) is None]
        return kept_examples(runs, self.metric)

    def churn(self) -> dict[str, float]:
        """Returns by the label of the arm how often two of its seeds disagree, for the arms where that is known."""
        found = {arm.label: churn(self.kept, arm.runs) for arm in self.arms}
        return {label: value for label, value in found.items() if value is not None}

    def verdict(self) -> str:
        """Says what the comparison shows, a sentence a line: for each contest, and for each arm with failed runs."""
        style = self.sections[0].style
        found = [sentences.verdict(contest, self.metric, style) for contest in self.contests]
        if self.baseline is None:
            found = ["Nothing to compare: no run of the baseline (alpha 0) has finished."]
        elif not self.challengers:
            found = ["Nothing to compare: only the baseline has finished runs."]
        failed = [said(arm) for arm in self.arms for said in (sentences.without_learning, sentences.diverged_runs)]
        return "\n".join([*found, *filter(None, failed)])

    def corrections(self) -> list[str]:
        """Says for what the p values of the verdict are corrected, and for what they are not."""
        return sentences.corrections(self.contests, self.added_arms)

    @property
    def added_arms(self) -> tuple[Arm, ...]:
        """The arms that had no part in the first verdict on others that could have shown something."""
        for look in self.looks:
            seeds = {arm.label: sum(run.path.name in look for run in arm.runs) for arm in self.arms}
            if sum(count >= least_seeds() for count in seeds.values()) > 1:
                return tuple(arm for arm in self.arms if arm.runs and not seeds[arm.label])
        return ()

    def remarks(self, contests: int | None = None) -> list[str]:
        """Says what a reader of the verdict should know beside it, a sentence or two an entry.

        With `contests`: where there are more than that, what would be said of each is left out.
        """
        found = self.corrections()
        found += filter(None, [sentences.robust_averages(self.sections[0], self.subject)])
        if contests is None or len(self.contests) <= contests:
            found += self._remarks_on_contests
        return [*found, *(f"Predictions left out: {problem}" for problem in self.kept.problems)]

    @cached_property
    def _remarks_on_contests(self) -> tuple[str, ...]:
        style = self.sections[0].style
        found = [*filter(None, (sentences.seeds_needed(contest, style) for contest in self.contests))]
        for contest in self.contests:
            on_examples = example_difference(self.kept, contest.arm.runs, contest.reference.runs)
            if on_examples is not None:
                found.append(sentences.on_these_examples(contest, on_examples, self.metric, style))
        return tuple(found)

    def hints(self) -> list[str]:
        """Says what the curves and the data tell about whether this comparison can be judged, and what to change."""
        pays = any(own.outcome is Outcome.BETTER and own.reference is self.baseline for own in self.contests)
        return hints.hints(self.baseline, self.arms, self.metric, pays=pays)

    @property
    def other_tests(self) -> int:
        """The number of p values of test, beside the verdict's, that are corrected for one another."""
        return sum(p_value is not None for p_value in self._p_of_others.values())

    def gaps(self) -> tuple[Gap, ...]:
        """The seeds left out of a comparison, by the arm that lacks them and why."""
        return tuple(gap for arm in self.arms for gap in self._gaps_of(arm) if gap.seeds)

    def _gaps_of(self, arm: Arm) -> tuple[Gap, ...]:
        scored = arm.scores(self.metric, "test")
        absent = tuple(seed for seed in self.seeds if seed not in (*arm.seeds, *arm.failures))
        not_finite = tuple(seed for seed in arm.seeds if seed not in scored)
        return (
            Gap(arm.label, absent, "no finished run"),
            Gap(arm.label, tuple(arm.failures), "diverged, without a score"),
            Gap(arm.label, not_finite, f"test {self.metric} is not a finite number"),
        )


def comparisons(
    records: Iterable[RunRecord], looks: Iterable[Look] = (), designs: Iterable[Design] = ()
) -> list[Comparison]:
    """Groups the finished runs into comparisons, in the order of their recipes' names.

    `looks` are the verdicts on these runs that were shown before. The arms of `designs` are compared as these say; a
    comparison all of whose runs stand in one of them is not told twice. Unfinished and damaged runs take no part;
    `rdrop.experiments.comparison.finished_runs.split_usable` names them. Those that have diverged without a score are
    a part of their arm, which may have no others.
    """
    records = list(records)
    finished, lost = split_usable(records)[0], lost_runs(records)
    designed = list(_designed(finished, lost, designs))
    told = {path for comparison in designed for path in comparison.paths}
    families: dict[tuple[str, str, str], list[FinishedRun]] = {}
    for run in finished:
        families.setdefault((run.recipe["name"], run.result["metric"], _family(run)), []).append(run)
    lost_of_families: dict[str, list[LostRun]] = {}
    for lost_run in lost:
        lost_of_families.setdefault(_family(lost_run), []).append(lost_run)
    found = [
        comparison
        for key in sorted(families)
        for runs in _by_content(families[key])
        for comparison in _comparisons_of_family(runs, lost_of_families.get(key[-1], ()))
        if not told.issuperset(comparison.paths)
    ]
    if designed:
        found = sorted([*designed, *found], key=lambda comparison: comparison.name)
    seen = tuple(looks)
    return [replace(comparison, looks=seen) for comparison in found]


def _designed(
    finished: Iterable[FinishedRun], lost: Iterable[LostRun], designs: Iterable[Design]
) -> Iterator[Comparison]:
    """Yields the comparisons of the designs that have finished runs: plain training first, the subject last."""
    by_arm: dict[str, list[_Run]] = {}
    ended: list[_Run] = [*finished, *lost]
    for run in ended:
        by_arm.setdefault(arm_digest(run.recipe), []).append(run)
    for design in designs:
        runs_of_arms = {label: by_arm[digest] for label, digest in design.arms.items() if digest in by_arm}
        of_design = [run for own in runs_of_arms.values() for run in own if isinstance(run, FinishedRun)]
        for runs in (own for of_labels in _by_content(of_design) for own in _by_unlabeled_content(of_labels)):
            paths = {run.path for run in runs}
            of_arms: dict[str, list[_Run]] = {}
            for label, of_arm in runs_of_arms.items():
                if of_content := [run for run in of_arm if run.path in paths or isinstance(run, LostRun)]:
                    of_arms[label] = of_content
            order = sorted(of_arms, key=lambda label: (label == design.subject, not of_arms[label][0].method.is_plain))
            comparison = _comparison({label: of_arms[label] for label in order})
            yield replace(comparison, baseline_label=design.baseline, subject_label=design.subject)


def _family(run: _Run) -> str:
    """Returns what all runs of one comparison share."""
    shared = {key: value for key, value in run.recipe.items() if key not in {"seed", "method", *BATCH_KEYS}}
    if is_finite_number(shared.get("epochs")):
        shared["epochs"] = _a_unit(shared["epochs"], run.batch)  # as many updates: twice the batch has twice the epochs
    if shared.get("evaluate_every") is None:  # and twice the scores, one after each
        if is_finite_number(shared.get("patience")):
            shared["patience"] = _a_unit(shared["patience"], run.batch)
        if is_finite_number(shared.get("average_last")) and shared["average_last"] > 1:
            shared["average_last"] = _a_unit(shared["average_last"], run.batch)
    return json.dumps(shared, sort_keys=True)


def _by_content(runs: list[FinishedRun]) -> list[list[FinishedRun]]:
    """Returns the runs by what the files of their data held."""
    found: dict[str, list[FinishedRun]] = {}
    for run, content in zip(runs, _contents(runs), strict=True):
        found.setdefault(content, []).append(run)
    return [found[content] for content in sorted(found)]


def _by_unlabeled_content(runs: list[FinishedRun]) -> list[list[FinishedRun]]:
    """Returns the runs by what their files of unlabeled examples held; a run that learns from none is with all."""
    contents = _unlabeled_contents(runs)
    return [
        [run for run, own in zip(runs, contents, strict=True) if own in ("", content)]
        for content in sorted({content for content in contents if content}) or [""]
    ]


def _unlabeled_contents(runs: list[FinishedRun]) -> list[str]:
    """Returns what the file of unlabeled examples held that each run learned from; of those without one, ""."""
    learners = [run for run in runs if not run.method.is_plain and _unlabeled_file(run) is not None]
    found = dict(zip((run.path for run in learners), _contents(learners, unlabeled=True), strict=True))
    return [found.get(run.path, "") for run in runs]


def _contents(runs: list[FinishedRun], *, unlabeled: bool = False) -> list[str]:
    """Returns what the files of each run's data held, without those of unlabeled examples or of these alone.

    Runs of a version that did not record it are taken to have had the content of the others, if that is one.
    """
    known = {_content(run, unlabeled) for run in runs if "files" in run.result}
    of_before = min(known) if len(known) == 1 else "?"
    return [_content(run, unlabeled) if "files" in run.result else of_before for run in runs]


def _content(run: FinishedRun, unlabeled: bool) -> str:
    files = data_files.of_data(run.result["files"], run.recipe)
    rests = data_files.below(files, _unlabeled_file(run))
    of_unlabeled = {path for path, rest in rests.items() if rest[:1] != "."}  # it is a file or a folder
    return json.dumps([(path, files[path]) for path in sorted(files) if (path in of_unlabeled) == unlabeled])


def _unlabeled_file(run: FinishedRun) -> object:
    name = run.recipe.get("data", {}).get("unlabeled")
    return None if name == "all" else name


def _a_unit(length: float, batch: int) -> float:
    """Returns the length by example or token of the batch, so that 1.4 / 32 is what 3 * 1.4 / 96 is."""
    return float(f"{length / batch:.12g}")


def _comparisons_of_family(family: list[FinishedRun], lost: Iterable[LostRun]) -> Iterable[Comparison]:
    runs: dict[_Key, list[_Run]] = {}
    for run, unlabeled in zip(family, _unlabeled_contents(family), strict=True):
        runs.setdefault(_Key(run.method.arm(), run.batch, unlabeled), []).append(run)
    finished = set(runs)
    for lost_run in lost:  # of what content its unlabeled examples were is not known
        without = _Key(lost_run.method.arm(), lost_run.batch, "")
        for key in [key for key in finished if key._replace(unlabeled="") == without] or [without]:
            runs.setdefault(key, []).append(lost_run)

    shown: set[_Key] = set()
    for batch in sorted({key.batch for key in runs}):
        own = [key for key in runs if key.batch == batch]
        # A larger plain batch that a smaller one already shows as its "twice the batch" is not told twice.
        if shown.issuperset(own):
            continue
        multiples = {2, *(key.method.passes for key in own if not key.method.is_plain)}
        larger = [key for key in runs if key.method.is_plain and key.batch in {k * batch for k in multiples}]
        keys = [*sorted(own, key=_Key.order), *sorted(larger, key=_Key.order)]
        if finished.isdisjoint(keys):
            continue
        shown.update(keys)
        arms: dict[str, list[_Run]] = {}
        for key in keys:
            label = key.label(batch, runs[key][0].recipe)
            numbered = (f"{label}, of content {number}" for number in count(2))
            arms[label if label not in arms else next(other for other in numbered if other not in arms)] = runs[key]
        yield _comparison(arms)


class _Key(NamedTuple):
    """The settings that the runs of one arm share."""

    method: Method
    batch: int
    unlabeled: str
    """What the files of unlabeled examples held, if it learns from any."""

    def label(self, batch: int, recipe: dict[str, Any]) -> str:
        """Returns what a reader calls the arm in the comparison of this size of the batch."""
        label = self.method.label(self.batch // batch)
        return label if self.method.is_plain else ", ".join([label, *unlabeled_words(recipe)])

    def order(self) -> tuple[object, ...]:
        return (*self.method.order(), self.batch, self.unlabeled)


def _comparison(runs: Mapping[str, list[_Run]]) -> Comparison:
    """Makes the comparison of arms by their labels, in this order."""
    arms, repeats = [], []
    for label, of_arm in runs.items():
        finished = [run for run in of_arm if isinstance(run, FinishedRun)]
        # The latest run of a seed counts, whatever order the folders were read in.
        latest = {run.seed: run for run in sorted(finished, key=lambda run: (run.result["finished"], str(run.path)))}
        own = tuple(latest[seed] for seed in sorted(latest))
        lost = {run.seed: run for run in of_arm if isinstance(run, LostRun) and run.seed not in latest}
        lost_in_order = tuple(lost[seed] for seed in sorted(lost))
        arms.append(Arm(label, of_arm[0].method.arm(), of_arm[0].batch, own, lost_in_order))
        repeats += [run for run in finished if latest[run.seed] is not run]
    first = next(run for arm in arms for run in arm.runs)
    return Comparison(
        first.recipe["name"],
        first.result["metric"],
        tuple(arms),
        tuple(sorted(repeats, key=lambda run: str(run.path))),
    )

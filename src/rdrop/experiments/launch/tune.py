"""The search for the best settings of R-Drop and of plain training, and the comparison of the two on fresh seeds.

    rdrop tune RECIPE alpha=0.3,1,3 model.dropout=0.1,0.3

A key with several values is one of the grid. R-Drop is tried with every combination, plain training with every one of
the keys that are not the method's: R-Drop must beat the best plain training. The runs of the search are in a folder
of their own, which `rdrop report` leaves out: their seeds chose the settings, so they say nothing about them.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rdrop.experiments import metrics
from rdrop.experiments.comparison.arms import Arm, is_of_rdrop, label_of, may_tell_arms_apart
from rdrop.experiments.comparison.comparison import Comparison
from rdrop.experiments.comparison.designs import Design, arm_digest
from rdrop.experiments.comparison.finished_runs import is_finite_number, lost_runs, split_usable
from rdrop.experiments.comparison.looks import Look
from rdrop.experiments.comparison.tuning import Tried, Tuning, spelled
from rdrop.experiments.launch.outcomes import FailedRunsError, Failure
from rdrop.experiments.launch.plan import Run, with_larger_batch
from rdrop.experiments.recipe import Method, Recipe, override
from rdrop.experiments.recipe.settings import RecipeError, read_settings
from rdrop.experiments.run_folder import TUNING, ResultsError, find_runs
from rdrop.experiments.run_folder.saved import current_key

FIRST_SEED = 1000
OWN_SEEDS = "a search has its own; say how many with --tune-seeds and --seeds"
MOST_IN_FULL = 8
"""Settings of R-Drop, or of plain training, that are all tried on all seeds; of more, the worse half goes early."""

Train = Callable[[Sequence[Run]], list[Failure]]


@dataclass(frozen=True)
class Candidate:
    """A setting of the grid."""

    recipe: Recipe
    values: Mapping[str, Any]
    """As they were given: `alpha=auto` and `alpha=4` are two settings of one alpha."""


@dataclass(frozen=True)
class Grid:
    """All settings that are tried."""

    recipe: Recipe
    """What they change."""
    keys: tuple[str, ...]
    method_keys: tuple[str, ...]
    rdrop: tuple[Candidate, ...]
    plain: tuple[Candidate, ...]


def split_grid(settings: Iterable[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Returns the settings with one value, and the values of those with several: `alpha=0.3,1,3`.

    A comma within brackets or quotes is part of a value: `dropout=[0.1,0.3],[0.1,0.1]` has two.
    """
    fixed: dict[str, str] = {}
    grid: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    for setting in settings:
        typed, _, text = setting.partition("=")
        key, values = current_key(typed), _split(text)
        if key in given:
            raise RecipeError(key, f"given twice: {given[key]} and {text}; give all values at once")
        given[key] = text
        if len(values) == 1:
            fixed[key] = setting
        else:
            grid[key] = values
    return [*fixed.values()], grid


def make_grid(recipe: Recipe, grid: Mapping[str, list[str]]) -> Grid:
    """Returns every combination of the values, for R-Drop and for plain training.

    Raises `RecipeError` where a combination cannot be, or there is nothing to choose from.
    """
    if not grid:
        raise RecipeError("alpha", "a search needs several values of a key, e.g. alpha=0.3,1,3")
    if "seed" in grid:
        raise RecipeError("seed", OWN_SEEDS)
    if getattr(recipe.data, "folds", None) is not None or "data.folds" in grid:
        rule = "a search would choose on examples that other seeds are tested on; leave it out, or set it to null"
        raise RecipeError("data.folds", rule, value=grid.get("data.folds", getattr(recipe.data, "folds", None)))
    for key in grid:
        if key in recipe.descriptions() and not may_tell_arms_apart(key):
            rule = "is the same in both arms that a search compares; set one value, or search once for each"
            raise RecipeError(key, rule, value=grid[key])
    method_keys = tuple(key for key in grid if is_of_rdrop(key))
    other_keys = tuple(key for key in grid if key not in method_keys)
    rdrop = _candidates(recipe, grid, (*method_keys, *other_keys))
    for candidate in rdrop:
        if candidate.recipe.method.is_plain:
            rule = "a search tries plain training anyway; leave 0 out, and have an alpha above 0"
            raise RecipeError("alpha", rule, value=0)
    plain = recipe.replace(method=recipe.method.plain())
    return Grid(
        recipe, (*method_keys, *other_keys), method_keys, tuple(rdrop), tuple(_candidates(plain, grid, other_keys))
    )


class Found(NamedTuple):
    """The outcome of a search."""

    tried: Mapping[str, Tried]
    """By the digest of the recipe, R-Drop before plain training."""
    rdrop: Candidate
    plain: Candidate
    failures: tuple[Failure, ...]
    """Of the runs of the search."""


def search(grid: Grid, seeds: int, root: Path, train: Train) -> Found:
    """Trains the settings of the grid on the search's seeds; returns what each scored and the best of each side.

    Raises `FailedRunsError` if no setting of R-Drop, or none of plain training, has all its scores.
    """
    failures: dict[Path, Failure] = {}
    in_race = {True: list(grid.plain), False: list(grid.rdrop)}
    in_full = {side: len(candidates) <= MOST_IN_FULL for side, candidates in in_race.items()}
    for count in _rungs(seeds):
        runs = [
            run
            for side, candidates in in_race.items()
            for candidate in candidates
            for run in _runs_of(candidate, seeds if in_full[side] else count, root)
        ]
        failures |= {failure.folder: failure for failure in train(runs)}
        for side, candidates in in_race.items():
            if not in_full[side] and count < seeds:
                ranked = _ranked(candidates, count, root)
                in_race[side] = ranked[: -(-len(candidates) // 2)]
    tried = {
        candidate.recipe.digest(): _tried(candidate, seeds, root, failures, is_plain=side)
        for side, candidates in ((False, grid.rdrop), (True, grid.plain))
        for candidate in candidates
    }
    best = {side: _ranked(candidates, seeds, root)[:1] for side, candidates in in_race.items()}
    if not best[False] or not best[True]:
        raise FailedRunsError(list(failures.values()))
    return Found(tried, best[False][0], best[True][0], tuple(failures.values()))


def of_equal_cost(plain: Candidate, rdrop: Candidate) -> Recipe:
    """Returns plain training whose batch has as many examples as R-Drop's has passes."""
    method = Method(alpha=0.0, passes=rdrop.recipe.method.passes)
    return with_larger_batch(plain.recipe.replace(method=method))


def plan_fresh(rdrop: Candidate, plain: Candidate, seeds: Iterable[int], root: Path, *, larger_batch: bool) -> Arms:
    """Returns the arms that are compared: the best plain training, the best R-Drop, plain training of its cost."""
    differences = label_of(plain.recipe, rdrop.recipe).removeprefix(plain.recipe.method.label())
    arms = {plain.recipe.method.label() + differences: plain.recipe, label_of(rdrop.recipe, rdrop.recipe): rdrop.recipe}
    if larger_batch:
        larger = of_equal_cost(plain, rdrop)
        arms[larger.method.label(larger.method.passes) + differences] = larger
    return {
        label: [Run.of(f"{label}, seed {seed}", recipe.replace(seed=seed), root) for seed in seeds]
        for label, recipe in arms.items()
    }


Arms = dict[str, list[Run]]


def designs(arms: Arms) -> list[Design]:
    """Returns what the folder of the runs must remember for the two sides to be compared, which may differ in much."""
    recipes = {label: runs[0].recipe for label, runs in arms.items()}
    (_, plain), (subject, rdrop), *_ = recipes.items()
    if rdrop.replace(method=plain.method, seed=plain.seed) == plain:
        return []  # the runs alone say that they belong together
    others = {label: arm_digest(recipe.saved()) for label, recipe in recipes.items() if label != subject}
    return [Design({**others, subject: arm_digest(rdrop.saved())}, subject)]


def tuning_of(grid: Grid, seeds: int, found: Found, arms: Arms, looks: Iterable[Look] = ()) -> Tuning:
    """Returns the search with the comparison of the finished runs of the `arms`; `looks` as in `comparisons`."""
    compared = []
    for label, runs in arms.items():
        records = [record for run in runs if run.folder.is_dir() for record in find_runs(run.folder)]
        (finished, unusable), lost = split_usable(records), lost_runs(records)
        if not (finished or lost):
            reasons = "".join(f": {run.path}: {run.problem}" for run in unusable[:1])
            raise FailedRunsError([Failure(label, runs[0].folder, f"no seed has finished{reasons}", 1)])
        ended = [*finished, *lost]
        compared.append(Arm(label, ended[0].method, ended[0].batch, tuple(finished), tuple(lost)))
    metric = next((run.result["metric"] for arm in compared for run in arm.runs), None)
    if metric is None:
        raise FailedRunsError([Failure(arm.label, arm.first.path, "no seed has finished", 1) for arm in compared])
    return Tuning(
        name=grid.recipe.name,
        metric=metric,
        keys=grid.keys,
        method_keys=grid.method_keys,
        seeds=tuple(range(FIRST_SEED, FIRST_SEED + seeds)),
        tried=tuple(found.tried.values()),
        best_rdrop=found.tried[found.rdrop.recipe.digest()],
        best_plain=found.tried[found.plain.recipe.digest()],
        fresh=Comparison(
            f"{grid.recipe.name} on fresh seeds",
            metric,
            tuple(compared),
            looks=tuple(looks),
            baseline_label=compared[0].label,
        ),
        search=hashlib.sha256(" ".join([str(seeds), *sorted(found.tried)]).encode()).hexdigest()[:12],
    )


def _candidates(recipe: Recipe, grid: Mapping[str, list[str]], keys: Sequence[str]) -> list[Candidate]:
    found: dict[str, Candidate] = {}
    for texts in itertools.product(*(grid[key] for key in keys)):
        settings = [f"{key}={text}" for key, text in zip(keys, texts, strict=True)]
        changed = override(recipe, settings)
        values = read_settings(settings, recipe.descriptions())
        found.setdefault(changed.digest(), Candidate(changed, values))
    return list(found.values())


def _runs_of(candidate: Candidate, seeds: int, root: Path) -> Iterator[Run]:
    words = [f"{key} {spelled(value)}" for key, value in candidate.values.items()]
    method = "baseline" if candidate.recipe.method.is_plain else "R-Drop"
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        label = ", ".join((method, *words, f"seed {seed}"))
        yield Run.of(label, candidate.recipe.replace(seed=seed), root / TUNING)


def _tried(candidate: Candidate, seeds: int, root: Path, failures: Mapping[Path, Failure], *, is_plain: bool) -> Tried:
    """Reads the valid scores of a setting, as far as it was trained."""
    scores, problem, not_begun = {}, None, []
    for run in _runs_of(candidate, seeds, root):
        if run.folder in failures:
            problem = failures[run.folder].what
        elif (result := run.result()) is not None:
            score = _valid_score(result)
            if score is None:
                problem = f"{run.folder}: it has no finite {result['metric']} on valid"
            else:
                scores[run.recipe.seed] = score
                if str(result.get("notes", {}).get("has begun", "")).startswith("no"):
                    not_begun.append(run.recipe.seed)
    return Tried(candidate.values, is_plain, scores, problem, tuple(not_begun))


def _ranked(candidates: Sequence[Candidate], seeds: int, root: Path) -> list[Candidate]:
    """Returns the settings that have all of the first `seeds` scores, the best mean first."""
    means, better = {}, True
    for candidate in candidates:
        results = _results(candidate, seeds, root)
        scores = [score for result in results if (score := _valid_score(result)) is not None]
        if len(scores) == seeds:
            means[candidate.recipe.digest()] = sum(scores) / seeds
            better = metrics.find(results[0]["metric"]).higher_is_better
    whole = [candidate for candidate in candidates if candidate.recipe.digest() in means]
    return sorted(whole, key=lambda candidate: means[candidate.recipe.digest()], reverse=better)


def _valid_score(result: Mapping[str, Any]) -> float | None:
    score = result["valid"].get(result["metric"])
    return float(score) if is_finite_number(score) else None


def _results(candidate: Candidate, seeds: int, root: Path) -> list[dict[str, Any]]:
    """Returns the results of the finished runs; a damaged one is none, and a failure that has been told."""
    found = []
    for run in _runs_of(candidate, seeds, root):
        with suppress(ResultsError):
            result = run.result()
            if result is not None:
                found.append(result)
    return found


def _rungs(seeds: int) -> list[int]:
    """1, 2, 4, ... and at last all seeds."""
    return [*itertools.takewhile(lambda count: count < seeds, (2**power for power in range(20))), seeds]


def _split(text: str) -> list[str]:
    parts, depth, quoted = [""], 0, False
    for place, character in enumerate(text):
        if character == '"' and text[place - 1 : place] != "\\":
            quoted = not quoted
        depth += 0 if quoted else (character in "[{") - (character in "]}")
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    return parts

"""The arms of a comparison, its runs in order, and the command that trains each."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdrop.experiments.comparison.arms import ARM_KEYS, as_many_updates, is_of_rdrop, label_of, may_tell_arms_apart
from rdrop.experiments.comparison.designs import Design, arm_digest
from rdrop.experiments.comparison.finished_runs import unknown_metric
from rdrop.experiments.recipe import Recipe, override, with_excluded
from rdrop.experiments.recipe.settings import RecipeError, read_settings, typed
from rdrop.experiments.recipes import ARMS, find_recipe
from rdrop.experiments.run_folder import RESULT, ResultsError, RunFolder, read_result, remedy, saved
from rdrop.experiments.run_folder.source import require_same_source

IN_PLACE_OF = {
    "updates": "epochs",
    "epochs": "updates",
    "batch_size": "batch_tokens",
    "batch_tokens": "batch_size",
}
"""The number that a recipe has where it does not have this one."""


@dataclass(frozen=True)
class Run:
    """A recipe, what a reader calls it, and the folder of its run."""

    label: str
    recipe: Recipe
    folder: Path

    @classmethod
    def of(cls, label: str, recipe: Recipe, root: Path) -> Run:
        digest = recipe.digest()
        folder = root / recipe.name / digest
        earlier = root / saved.first_name(recipe.name) / digest  # where a version before a renaming has begun it
        return cls(label, recipe, earlier if earlier.exists() else folder)

    def result(self) -> dict[str, Any] | None:
        """The content of result.json, or None while the run is not finished.

        Raises `ResultsError` if it is damaged, or of a run that started from other weights than `init_from` holds now.
        """
        result = read_result(RunFolder(self.folder))
        differing = [] if result is None else saved.differing_keys(self.recipe.saved(), result["recipe"])
        if differing:
            file = self.folder / RESULT
            what = f"it is the result of another recipe, which differs in {', '.join(differing)}"
            raise ResultsError(f"{file}: {what}. {remedy(file)}")
        if result is not None:
            unknown = unknown_metric(self.folder, result)
            if unknown is not None:
                raise ResultsError(unknown)
            require_same_source(self.recipe.init_from, self.recipe.seed, result.get("notes", {}), self.folder)
        return result

    def failure(self) -> str | None:
        """Why the run cannot go on, or None if nothing is known against it."""
        return RunFolder(self.folder).failure()


@dataclass(frozen=True)
class Plan:
    """The arms of a comparison by the reader's name for each: the baseline first."""

    arms: dict[str, Recipe]
    subject: str
    """The arm of the recipe that was asked for."""
    is_standard: bool
    """Whether the runs alone say that they belong together: the recipe, its baseline and that with a larger batch."""

    @property
    def least_seeds(self) -> int:
        """The least number of seeds that can show a difference between the recipe and each of the other arms."""
        from rdrop.experiments.comparison.statistics import least_seeds  # it imports scipy, which --help need not

        return least_seeds(len(self.arms) - 1)

    def runs(self, seeds: Iterable[int], root: Path) -> list[Run]:
        """Returns all runs, seed by seed, so that a comparison that is stopped has whole seeds to show."""
        return [
            Run.of(f"{label}, seed {seed}", recipe.replace(seed=seed), root)
            for seed in seeds
            for label, recipe in self.arms.items()
        ]

    def designs(self) -> list[Design]:
        """Returns what the folder of the runs must remember for the arms to be compared."""
        if self.is_standard:
            return []
        arms = {label: arm_digest(recipe.saved()) for label, recipe in self.arms.items() if label != self.subject}
        return [Design({**arms, self.subject: arm_digest(self.arms[self.subject].saved())}, self.subject)]


def plan_arms(recipe: Recipe, arms: Sequence[str] = (), *, larger_batch: bool, entry: str | None = None) -> Plan:
    """Returns the arms to compare: the recipe, its baseline, and what there is beside these two.

    That is what `arms` say: each is the settings of one, relative to the recipe, as `"alpha=0 updates=4x"`. Without
    any, it is what the recipe itself brings (`recipes.ARMS`, whose first is the baseline), by the name in the catalogue
    (`entry`) whatever it is called now; else, with `larger_batch`, a baseline whose batch has as many examples as
    R-Drop's has passes. `larger_batch=False` also leaves out such an arm of the recipe.

    Raises `RecipeError` if the recipe asks for no R-Drop, or an arm cannot be.
    """
    if recipe.method.is_plain:
        raise RecipeError("alpha", "a comparison needs R-Drop, alpha > 0; alpha=0 is its baseline anyway", value=0)
    plain = recipe.replace(method=recipe.method.plain())
    own = () if arms else ARMS.get((entry or recipe.name).removesuffix("-tiny"), ())
    if not arms and not own:
        standard = {"baseline": plain, label_of(recipe, recipe): recipe}
        if larger_batch:
            larger = with_larger_batch(plain)
            standard[larger.method.label(recipe.method.passes)] = larger
        return Plan(standard, label_of(recipe, recipe), is_standard=True)
    if own:
        own = tuple(text for text in own if larger_batch or "batch_" not in text)
        recipes = [_arm_of_its_own(recipe, text) for text in own]
    else:
        recipes = [plain, *(read_arm(recipe, text) for text in arms)]
    found: dict[str, Recipe] = {}
    for arm in (*recipes, recipe):
        label = label_of(arm, recipe)
        if arm in found.values():
            always = ": the recipe and its baseline always are" if arm in (plain, recipe) else "; leave it out once"
            raise RecipeError("arm", f"{label} is an arm already{always}")
        if label in found:  # of folders that have one name, or numbers that are alike in six digits
            label = ", ".join([label, *settings_between(found[label], arm)])
        found[label] = arm
    return Plan(found, label_of(recipe, recipe), is_standard=False)


def read_arm(recipe: Recipe, text: str) -> Recipe:
    """Returns the recipe of an arm: `"alpha=0 updates=4x model.dropout=0.3"`, where 4x is four times the recipe's."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise RecipeError("arm", f"cannot be read ({error}): quote values as in a shell", value=text) from None
    changes = {}
    for key, value in read_settings(words, recipe.descriptions()).items():
        name = saved.current_key(key)
        if name in changes:
            raise RecipeError(name, "given twice, by two of its names", value=value)
        if name in recipe.descriptions() and not may_tell_arms_apart(name):
            rule = f"is the same in all arms; they may differ in the method, the dropout rates, {', '.join(ARM_KEYS)}"
            raise RecipeError(key, rule, value=value)
        changes[name] = _multiplied(name, value, recipe)
    changes = with_excluded(changes)
    for unit in ("batch_size", "batch_tokens"):
        own, value = recipe.value(unit), changes.get(unit)
        if own and type(value) is int and not changes.keys() & {"updates", "epochs"}:
            same = as_many_updates(recipe, value / own)
            if changes.get("evaluate_every") is not None:  # it is not scored by its epochs
                same = {key: new for key, new in same.items() if key == "epochs"}
            changes = {**same, **changes}
    if changes.get("alpha") != 0:
        return recipe.replace(**changes)
    for key in changes:
        if is_of_rdrop(key) and key != "alpha":
            instead = "; the rate of the model is model.dropout" if key == "dropout" else ""
            rule = f"means nothing to an arm of plain training (alpha=0); leave it out{instead}"
            raise RecipeError(key, rule, value=changes[key])
    del changes["alpha"]
    return recipe.replace(method=recipe.method.plain()).replace(**changes)


def _multiplied(key: str, value: object, recipe: Recipe) -> object:
    """Returns the value of an arm's setting: of "4x" four times the recipe's."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x", value) if isinstance(value, str) else None
    if match is None or key not in recipe.descriptions():
        return value
    own, other = recipe.value(key), IN_PLACE_OF.get(key)
    if own is None and other is not None:
        raise RecipeError(key, f"the recipe has {other}={recipe.value(other)}: write {other}={value}", value=value)
    if isinstance(own, bool) or not isinstance(own, int | float):
        raise RecipeError(key, f"is no number in the recipe that {value} could be a multiple of", value=value)
    product = round(float(match[1]) * own, 9)  # 1.1 * 3000 is 3300.0000000000005
    if isinstance(own, float):
        return product
    if not product.is_integer():
        raise RecipeError(key, f"{value} of {own} is not a whole number", value=value)
    return int(product)


def _arm_of_its_own(recipe: Recipe, text: str) -> Recipe:
    try:
        return read_arm(recipe, text)
    except RecipeError as error:
        rule = f'{error.rule}; this is the arm "{text}" that {recipe.name} brings, in whose place --arm puts others'
        raise RecipeError(error.key, rule, value=error.value, nearest=error.nearest) from None


def plan_comparison(recipe: Recipe, seeds: Iterable[int], root: Path, *, larger_batch: bool) -> list[Run]:
    """Returns the runs of the arms that `plan_arms` gives."""
    return plan_arms(recipe, larger_batch=larger_batch).runs(seeds, root)


def with_larger_batch(baseline: Recipe) -> Recipe:
    """Returns plain training at R-Drop's compute: its batch has as many examples as R-Drop's has passes."""
    unit = "batch_size" if baseline.batch_tokens is None else "batch_tokens"
    times = baseline.method.passes
    try:
        return baseline.replace(**{unit: getattr(baseline, unit) * times}, **as_many_updates(baseline, times))
    except RecipeError as error:
        rule = f"{error.rule}; this is the baseline with {times} times the batch; --no-double-batch omits it"
        raise RecipeError(error.key, rule, value=error.value, nearest=error.nearest) from None


@dataclass(frozen=True)
class Command:
    """The command line of a run: the recipe that is changed, where runs go, and the trackers that are told."""

    recipe: str
    """As on the command line: a name, a path, or package.module:NAME."""
    runs: Path
    trackers: tuple[str, ...] = ()

    def arguments(self, run: Run) -> list[str]:
        """Returns the arguments of `rdrop` that train this run, in any process, on any machine with these files."""
        trackers = [part for name in self.trackers for part in ("--tracker", name)]
        settings = settings_between(find_recipe(self.recipe), run.recipe)
        return ["train", self.recipe, *settings, "--runs", str(self.runs), *trackers]


def settings_between(recipe: Recipe, changed: Recipe) -> list[str]:
    """Returns the settings by which `override` makes the one recipe of the other, as they are typed."""
    is_tiny = changed.name == f"{recipe.name}-tiny"
    start = recipe.tiny() if is_tiny else recipe
    settings = ["tiny=true"] if is_tiny else []
    old, new = start.model_dump(mode="json"), changed.model_dump(mode="json")
    for key in saved.differing_keys(old, new):
        section, _, name = key.rpartition(".")
        settings.append(typed(key, (new[section] if section else new | new["method"])[name]))
    if override(recipe, settings) != changed:
        raise RecipeError("recipe", f"{changed.name} cannot be made from {recipe.name} by settings")
    return settings

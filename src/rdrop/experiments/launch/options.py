"""Options that several commands take, and what their texts mean."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from rdrop.experiments.distributed import in_several_processes
from rdrop.experiments.recipe import Recipe, override
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import find_recipe
from rdrop.experiments.shown import shell_line

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A name from `rdrop list`, or a saved recipe.json.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe: alpha=1 data.train_labels=100"),
]
DataFolder = Annotated[
    str | None, typer.Option("--data", metavar="FOLDER", help="Local files in the recipe's layout: data.folder.")
]
TrainFile = Annotated[str | None, typer.Option("--train", metavar="FILE", help="Your own data: data.train.")]
ValidFile = Annotated[str | None, typer.Option("--valid", metavar="FILE", help="Chooses the checkpoint: data.valid.")]
TestFile = Annotated[str | None, typer.Option("--test", metavar="FILE", help="Scores it, once: data.test.")]
UnlabeledFile = Annotated[
    str | None, typer.Option("--unlabeled", metavar="FILE", help="Examples without labels: data.unlabeled.")
]
ModelName = Annotated[str | None, typer.Option("--model", metavar="NAME", help="A hub id or a folder: model.name.")]
Trackers = Annotated[
    list[str] | None, typer.Option("--tracker", metavar="NAME", help="tensorboard, wandb, ...; may be given twice.")
]
RunsFolder = Annotated[Path, typer.Option("--runs", metavar="DIR", help="Where the folders of the runs are.")]
NoDoubleBatch = Annotated[
    bool, typer.Option("--no-double-batch", help="Without the baseline of twice the batch, R-Drop's compute.")
]
Jobs = Annotated[
    str,
    typer.Option("--jobs", metavar="N|auto", help="Runs at a time, a process each; a GPU each, if there are several."),
]
DEFAULT_RUNS = Path("runs")
MOST_SEEDS = 1000
SEEDS = re.compile(r"\d{1,10}(,\d{1,10})*,?", re.ASCII)


def chosen_recipe(name: str, settings: list[str] | None, *, model: str | None, **files: str | None) -> Recipe:
    """The recipe with the settings, and with the options, which are settings by a shorter name."""
    recipe = find_recipe(name)
    require_no_file(settings or [], "--train" if "data.train" in recipe.descriptions() else None)
    return override(recipe, [*(settings or []), *settings_of(model=model, **files)])


def require_no_file(settings: Iterable[str], option: str | None) -> None:
    """Refuses a file in the place of a setting, which was meant for `option`."""
    for setting in settings:
        if option is not None and "=" not in setting and os.path.exists(setting):
            rule = f"a setting is written key=value; give it as {shell_line([option, setting])}"
            raise RecipeError(setting, rule)


def settings_of(**given: str | None) -> list[str]:
    keys = {"data": "data.folder", "model": "model.name"}
    return [
        f"{keys.get(name, f'data.{name}')}={json.dumps(value)}" for name, value in given.items() if value is not None
    ]


def parse_seeds(text: str) -> list[int]:
    """`"5"` is the seeds 0 to 4, `"3,5"` these two, `"3,"` the one. Anything else is a usage error."""
    if SEEDS.fullmatch(text):
        numbers = [int(number) for number in text.split(",") if number]
        seeds = numbers if "," in text else list(range(min(numbers[0], MOST_SEEDS + 1)))
        if 0 < len(set(seeds)) == len(seeds) <= MOST_SEEDS:
            return seeds
    raise typer.BadParameter(
        f"{text!r} is neither a number of seeds, such as 5, nor a list of different ones, such as 0,1,2",
        param_hint="--seeds",
    )


def parse_jobs(text: str) -> int | None:
    """`"3"` is three runs at a time; None, for `"auto"`, as many as the machine has room for."""
    if text == "auto":
        return None
    if re.fullmatch(r"[1-9]\d{0,2}", text, re.ASCII):
        if int(text) > 1 and in_several_processes():
            raise typer.BadParameter("torchrun has started the processes of one run; leave it out", param_hint="--jobs")
        return int(text)
    raise typer.BadParameter(f"{text!r} is neither a number of runs, such as 2, nor auto", param_hint="--jobs")

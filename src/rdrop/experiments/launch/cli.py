"""The command line: `rdrop list | train | compare | tune | evaluate | report | check | bench`.

What needs torch or draws plots is imported in the command that needs it, so that the others answer at once. A command
raises; `run` turns what it raised into one line on the standard error and an exit status: 0 done, 1 a negative answer
or a run that failed, 2 a mistake in the command, 3 a run that diverged, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rdrop.experiments.comparison.designs import read_designs, record_designs
from rdrop.experiments.launch.jobs import (
    DIVERGED_STATUS,
    FailedRunsError,
    Failure,
    MistakeError,
    StoppedError,
    find_places,
    train_all,
    train_supervised,
)
from rdrop.experiments.launch.plan import Command, Run, plan_arms
from rdrop.experiments.launch.terminal import Terminal, escaped_warnings
from rdrop.experiments.recipe import Recipe, override
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import RECIPES, find_recipe
from rdrop.experiments.run_folder import TUNING, ResultsError, RunLockedError, RunRecord, find_runs
from rdrop.experiments.run_folder.data_files import require_unchanged
from rdrop.experiments.shown import escaped, shell_line
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.training.trackers import TrackerError

if TYPE_CHECKING:
    from rdrop.experiments.comparison.comparison import Comparison
    from rdrop.experiments.comparison.finished_runs import UnusableRun
    from rdrop.experiments.comparison.tuning import Tuning

# typer imports click or brings its own, by version. This is the UsageError of the one it uses.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
)

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
_OLD_SPELLING = re.compile(r"^--unlabelled(?==|$)")
SEEDS = re.compile(r"\d{1,10}(,\d{1,10})*,?", re.ASCII)


def run(arguments: Sequence[str]) -> int:
    """Runs one command line and returns its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal without Unicode shows "?" for "±", and does not crash
            stream.reconfigure(errors="replace")
    current = [_OLD_SPELLING.sub("--unlabeled", argument) for argument in arguments]
    try:
        _require_once(current)
        with escaped_warnings():
            return int(_command()(current or ["--help"], prog_name="rdrop", standalone_mode=False) or 0)
    except UsageError as error:
        return _fail(_advice_on_setting(error) or error.format_message(), status=2)
    except (RecipeError, ResultsError, DataError, TrackerError, RunLockedError) as error:
        return _fail(str(error), status=2)
    except MistakeError as error:
        return _fail(str(error), error.status)
    except StoppedError as error:
        again = "the same command" if "RANK" in os.environ else shell_line(["rdrop", *arguments])
        return _fail(f"{error}; go on with: {again}", status=error.status)
    except FailedRunsError as error:
        for failure in error.failures:
            _fail(str(failure), error.status)
        return error.status
    except OSError as error:
        return _fail(str(error), status=1)


def _require_once(arguments: Sequence[str]) -> None:
    """Refuses an option that is given more often than its command takes it: of two files one would be read."""
    command = _command().commands.get(next(iter(arguments), None))
    options = [] if command is None else command.params
    once = [
        option for option in options if not getattr(option, "multiple", False) and not getattr(option, "is_flag", False)
    ]
    given = [argument.partition("=")[0] for argument in itertools.takewhile(lambda other: other != "--", arguments)]
    for name in (name for option in once for name in option.opts if name.startswith("--")):
        if given.count(name) > 1:
            raise typer.BadParameter(f"given {given.count(name)} times; it is taken once", param_hint=name)


def _advice_on_setting(error: Exception) -> str | None:
    """Returns what to type where a key of a recipe was typed as an option: `--alpha 1`, `--batch-size=32`."""
    option = getattr(error, "option_name", None)
    if option is None or any(other.startswith(option) for other in getattr(error, "possibilities", None) or ()):
        return None
    name = str(option).lstrip("-").replace("-", "_")
    keys = {key for recipe in RECIPES.values() for key in recipe.descriptions()}
    found = next((key for key in (name, name.removesuffix("s")) if key in keys), None)
    return found and f"No such option: {option}. A setting of the recipe is written without hyphens: {found}=..."


@cache
def _command() -> Any:  # a group of the click that typer uses
    return typer.main.get_command(app)


def _fail(message: str, status: int) -> int:
    line = re.sub(r"\s*[\r\n]\s*", " ", message.strip())  # spaces in a line may be those of a path or a label
    Terminal(stderr=True).print(Text.assemble(("rdrop: ", "bold red"), escaped(line)), soft_wrap=True)
    return status


def _show_version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"rdrop {version('rdrop-torch')}\n")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """R-Drop (regularized dropout): train with and without it, and see whether it helped."""


@app.command("list")
def list_recipes(
    recipe: Annotated[str | None, typer.Argument(metavar="RECIPE", help="Show the keys of this one.")] = None,
    settings: Settings = None,
    runs: RunsFolder = DEFAULT_RUNS,
) -> None:
    """Show the recipes, with what is published and what the finished runs scored; or the keys of one recipe."""
    from rdrop.experiments.report.recipe_table import catalog

    console = Terminal()
    console.print(
        catalog(runs, console.width) if recipe is None else _keys(override(find_recipe(recipe), settings or []))
    )


@app.command()
def train(
    recipe: RecipeName,
    settings: Settings = None,
    data: DataFolder = None,
    train: TrainFile = None,
    valid: ValidFile = None,
    test: TestFile = None,
    unlabeled: UnlabeledFile = None,
    model: ModelName = None,
    tracker: Trackers = None,
    runs: RunsFolder = DEFAULT_RUNS,
    side_by_side: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Train one recipe and score it on the test split. A run that was stopped goes on; a finished one stands."""
    chosen = _chosen(recipe, settings, data=data, train=train, valid=valid, test=test, unlabeled=unlabeled, model=model)
    run = Run.of(_label_of(chosen.saved()), chosen, runs)
    if side_by_side:  # `rdrop.experiments.launch.jobs` started this process
        raise typer.Exit(train_supervised(run, side_by_side, tracker or ()))
    failures = train_all([run], _progress_console(), trackers=tracker or ())
    if failures:
        raise FailedRunsError(failures)
    if _is_first_process():
        _show_result(run)


@app.command()
def compare(
    recipe: RecipeName,
    settings: Settings = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N|A,B,...",
            help="How many seeds, from 0; or which ones. Not given: the fewest that can show a difference between "
            "the arms of this command; with further arms in the folder it takes more.",
        ),
    ] = None,
    data: DataFolder = None,
    train: TrainFile = None,
    valid: ValidFile = None,
    test: TestFile = None,
    unlabeled: UnlabeledFile = None,
    model: ModelName = None,
    tracker: Trackers = None,
    runs: RunsFolder = DEFAULT_RUNS,
    no_double_batch: NoDoubleBatch = False,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"KEY=VALUE ..."',
            help='An arm beside the recipe and its baseline, in place of twice the batch: "alpha=0 updates=4x" is '
            "plain training for four times as long. May be given several times.",
        ),
    ] = None,
    jobs: Jobs = "1",
    commands: Annotated[
        bool, typer.Option("--commands", help="Train nothing: print a command for each run that is not finished.")
    ] = False,
) -> None:
    """Train the recipe with and without R-Drop over several seeds, and show whether R-Drop helped.

    All arms of a seed have the same data and order of data and, unless an arm says otherwise, as many updates. Finished
    runs are not repeated.

    Several such commands on one folder share the work.
    """
    if any(setting.startswith("seed=") for setting in settings or []):
        raise RecipeError("seed", "a comparison has several; say which with --seeds, e.g. --seeds 3,4,5")
    chosen = _chosen(recipe, settings, data=data, train=train, valid=valid, test=test, unlabeled=unlabeled, model=model)
    arms = plan_arms(chosen, arm or (), larger_batch=not no_double_batch, entry=find_recipe(recipe).name)
    plan = arms.runs(parse_seeds(str(arms.least_seeds) if seeds is None else seeds), runs)
    if arms.designs() and _is_first_process():
        record_designs(runs, arms.designs())
    command = Command(recipe, runs, tuple(tracker or ()))
    if commands:
        require_unchanged(run.folder for run in plan)
        damaged = []
        for run in plan:
            try:
                is_settled = run.result() is not None or run.failure() is not None
            except ResultsError as error:
                damaged.append(Failure.of(run, str(error), 2))
                continue
            if not is_settled:
                sys.stdout.write(shell_line(["rdrop", *command.arguments(run)]) + "\n")
        if damaged:
            raise FailedRunsError(damaged)
        return
    console = _progress_console()
    places = find_places(parse_jobs(jobs), console)
    failures = train_all(plan, console, trackers=tracker or (), places=places, command=command)
    failed = {failure.folder for failure in failures}
    if _is_first_process() and len(failed) < len(plan):
        _show_comparisons(find_runs(runs), runs, of={run.folder for run in plan} - failed)
        _write_page(runs)
    if failures:
        raise FailedRunsError(failures)


@app.command()
def tune(
    recipe: RecipeName,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE[,VALUE]", help="What is tried, and what is changed: alpha=0.3,1,3 updates=400"
        ),
    ] = None,
    tune_seeds: Annotated[int, typer.Option(min=1, max=100, help="Seeds of the search, from 1000.")] = 3,
    seeds: Annotated[str, typer.Option(metavar="N|A,B,...", help="Fresh seeds that compare what was chosen.")] = "10",
    data: DataFolder = None,
    train: TrainFile = None,
    valid: ValidFile = None,
    test: TestFile = None,
    unlabeled: UnlabeledFile = None,
    model: ModelName = None,
    tracker: Trackers = None,
    runs: RunsFolder = DEFAULT_RUNS,
    no_double_batch: NoDoubleBatch = False,
    jobs: Jobs = "1",
) -> None:
    """Find the best settings of R-Drop and of plain training on valid; compare the two on seeds they have not seen.

    Plain training is tried with the same values of the keys that are not R-Drop's own. Finished runs are not repeated.
    """
    from rdrop.experiments.comparison.looks import read_looks
    from rdrop.experiments.launch import tune as tuning

    if any(setting.startswith("seed=") for setting in settings or []):
        raise RecipeError("seed", tuning.OWN_SEEDS)
    fixed, grid = tuning.split_grid(settings or [])
    fresh = parse_seeds(seeds)
    if max(fresh) >= tuning.FIRST_SEED:
        raise typer.BadParameter(
            f"{max(fresh)} is a seed of the search, which has those from 1000", param_hint="--seeds"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise typer.BadParameter("a search runs in one process, or in several by --jobs; not under torchrun")
    chosen = _chosen(recipe, fixed, data=data, train=train, valid=valid, test=test, unlabeled=unlabeled, model=model)
    candidates = tuning.make_grid(chosen, grid)
    if not no_double_batch:
        for plain, rdrop in itertools.product(candidates.plain, candidates.rdrop):
            tuning.of_equal_cost(plain, rdrop)  # which may be refused, and before anything is trained
    console = _progress_console()
    places = find_places(parse_jobs(jobs), console)

    def train_in(root: Path) -> tuning.Train:
        command = Command(recipe, root, tuple(tracker or ()))
        return lambda plan: train_all(plan, console, trackers=tracker or (), places=places, command=command)

    begun = [run for root in (runs, runs / TUNING) if root.is_dir() for run in find_runs(root)]
    require_unchanged(dict.fromkeys(run.path for run in begun if (run.recipe or {}).get("name") == chosen.name))
    found = tuning.search(candidates, tune_seeds, runs, train_in(runs / TUNING))
    arms = tuning.plan_fresh(found.rdrop, found.plain, fresh, runs, larger_batch=not no_double_batch)
    if designs := tuning.designs(arms):
        record_designs(runs, designs)
    # Seed by seed, so that a comparison that is stopped has whole seeds to show.
    failures = train_in(runs)([run for of_seed in zip(*arms.values(), strict=True) for run in of_seed])
    try:
        tuned = tuning.tuning_of(candidates, tune_seeds, found, arms, read_looks(runs))
    except FailedRunsError as error:
        raise FailedRunsError([*failures, *error.failures]) from None
    _show_tuning(tuned, runs)
    # That a setting diverges is a finding of the search, which the table shows.
    failures += [failure for failure in found.failures if failure.status != DIVERGED_STATUS]
    if failures:
        raise FailedRunsError(failures)


@app.command()
def evaluate(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="The folder of a finished run, or of several.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="decoding.beams=1, data.test_name=...: what training did not see."),
    ] = None,
    data: DataFolder = None,
    test: Annotated[str | None, typer.Option("--test", metavar="FILE", help="Another test file: data.test.")] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Of runs of your own task: its recipe, package.module:NAME.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program to read.")] = False,
) -> None:
    """Score the test split again with the weights of finished runs: on another file, with another search.

    Several runs are compared, as in `compare`, by the new scores. It writes no file; without a change, a verdict is
    remembered as one that was looked at. Processes that torchrun started share the examples.
    """
    if recipe is not None:
        find_recipe(recipe)  # which imports the class that reads the recipes of its task
    from rdrop.experiments.comparison.looks import record_looks

    _require_no_file(settings or [], "--test")
    changes = [*(settings or []), *_options(data=data, test=test)]
    scored, failures = _rescored(runs, changes)
    if not _is_first_process():
        pass  # of several, which have all scores
    elif as_json:
        found = [{"run": str(run.path), "scores": run.result["test"]} for run in scored if run.result is not None]
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif len(scored) == 1 and scored[0].result is not None:
        _show_scores(scored[0].result, ("test",))
    else:
        lost = [record for record in find_runs(runs) if record.failure is not None]
        of = {run.path for run in scored}
        shown = _show_comparisons([*scored, *lost], runs, of=of, are_new_scores=bool(changes))
        if not changes:
            record_looks(runs, (comparison.look() for comparison in shown))
    if failures:
        raise FailedRunsError(failures)


@app.command()
def report(runs: Annotated[Path, typer.Argument(metavar="RUNS")] = DEFAULT_RUNS) -> None:
    """Show the comparisons among the finished runs below RUNS, and write RUNS/report.html and RUNS/results.html."""
    _show_comparisons(find_runs(runs), runs)
    _write_page(runs)


@app.command()
def check(
    recipe: RecipeName = "digits",
    settings: Settings = None,
    data: DataFolder = None,
    train: TrainFile = None,
    model: ModelName = None,
    as_json: Annotated[bool, typer.Option("--json", help="For a program to read.")] = False,
) -> None:
    """Tell whether R-Drop can act on the recipe's model: are the passes different? Exit status 1 if they are not."""
    from rdrop import kernels
    from rdrop.experiments.launch.check import check_recipe
    from rdrop.experiments.launch.jobs import quiet_transformers

    quiet_transformers()
    found = check_recipe(_chosen(recipe, settings, data=data, train=train, model=model))
    missing = kernels.available()
    if as_json:
        sys.stdout.write(json.dumps({**found.as_dict(), "kernels": missing}, indent=2) + "\n")
    else:
        sys.stdout.write(escaped(f"{found}\n{_kernel_line(missing)}\n"))
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def bench(
    benchmarks: Annotated[list[str] | None, typer.Argument(metavar="[logits|hidden|steps]")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="N, positions of a batch; not in steps.")] = None,
    classes: Annotated[int | None, typer.Option(min=2, help="V.")] = None,
    features: Annotated[int | None, typer.Option(min=1, help="D, the width of hidden states.")] = None,
    batch: Annotated[int | None, typer.Option(min=2, help="Examples of a training step.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens of the longest example of a step.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of the encoder, and of the decoder, in steps.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda, where there is one, unless set.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or, on a GPU, float16.")] = "float32",
    threads: Annotated[int | None, typer.Option(min=1, help="As many as torch takes, unless set.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In each, every form runs once.")] = 5,
    clock: Annotated[str, typer.Option(help="wall or, for a busy machine, processor.")] = "wall",
    form: Annotated[list[str] | None, typer.Option(help="These only, beside what they are compared with.")] = None,
    no_compile: Annotated[bool, typer.Option("--no-compile", help="Without compiled forms.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Append the records, one JSON a line.")] = None,
) -> None:
    """Measure time and memory of the loss beside other forms of it: from logits, from hidden states, in whole steps."""
    import torch

    from rdrop.bench.measure import BenchError, Conditions
    from rdrop.bench.suite import Sizes, run

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    threads = threads or torch.get_num_threads()
    sizes = Sizes(pairs, classes, features, batch, length, layers)
    command = shlex.join(["rdrop", *sys.argv[1:]])
    try:
        conditions = Conditions(device, dtype, threads, rounds, clock, tuple(form or ()), not no_compile, command)
        run(benchmarks or (), sizes, conditions, Terminal(), output)
    except BenchError as error:
        raise typer.BadParameter(str(error)) from error


def _is_first_process() -> bool:
    """Whether this process shows and writes: the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _progress_console() -> Console:
    return Terminal(stderr=True, quiet=not _is_first_process())


def _chosen(name: str, settings: list[str] | None, *, model: str | None, **files: str | None) -> Recipe:
    """The recipe with the settings, and with the options, which are settings by a shorter name."""
    recipe = find_recipe(name)
    _require_no_file(settings or [], "--train" if "data.train" in recipe.descriptions() else None)
    return override(recipe, [*(settings or []), *_options(model=model, **files)])


def _require_no_file(settings: Iterable[str], option: str | None) -> None:
    """Refuses a file in the place of a setting, which was meant for `option`."""
    for setting in settings:
        if option is not None and "=" not in setting and os.path.exists(setting):
            rule = f"a setting is written key=value; give it as {shell_line([option, setting])}"
            raise RecipeError(setting, rule)


def _options(**given: str | None) -> list[str]:
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
        if int(text) > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise typer.BadParameter("torchrun has started the processes of one run; leave it out", param_hint="--jobs")
        return int(text)
    raise typer.BadParameter(f"{text!r} is neither a number of runs, such as 2, nor auto", param_hint="--jobs")


def _keys(recipe: Recipe) -> Table:
    table = _table("key", "its value, and what it means")
    for key, description in recipe.descriptions().items():
        table.add_row(Text(key, "bold"), Text(json.dumps(recipe.value(key)), "bold"))
        table.add_row("", description)
    return table


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for heading in headings[:-1]:
        table.add_column(heading, no_wrap=True)
    table.add_column(headings[-1])
    return table


def _kernel_line(missing: dict[str, str | None]) -> str:
    """Which implementations of the loss are here; for the others, why not."""
    words = [f"{name}: {'present' if reason is None else reason}" for name, reason in missing.items()]
    return textwrap.fill("kernels     " + "; ".join(words), width=79, subsequent_indent=" " * 12)


def _rescored(runs: Path, settings: list[str]) -> tuple[list[RunRecord], list[Failure]]:
    """The finished runs below `runs`, with new scores of the test split in the place of the old; and those without any.

    Raises `FailedRunsError` if none could be scored; where all say the same of the command, that error.
    """
    from rdrop.experiments.comparison.comparison import comparisons
    from rdrop.experiments.comparison.finished_runs import split_usable
    from rdrop.experiments.launch.jobs import quiet_transformers
    from rdrop.experiments.launch.progress import summary
    from rdrop.experiments.training.checkpoints import CheckpointError
    from rdrop.experiments.training.evaluation import rescore

    records = find_runs(runs)
    finished, unusable = split_usable(records)
    if not finished:
        reasons = " ".join(f"{run.path}: {run.problem}" for run in unusable[:1])
        raise ResultsError(f"{runs} holds no finished run. {reasons}".rstrip())
    compared = comparisons(records, designs=read_designs(runs))
    in_order = [(run.path, arm.label) for of in compared for arm in of.arms for run in arm.runs]
    arms, places = dict(in_order), {path: place for place, (path, _) in enumerate(in_order)}
    finished.sort(key=lambda run: (run.recipe["name"], run.seed, places.get(run.path, len(places)), run.path))
    console = Terminal(stderr=True, quiet=not _is_first_process())
    _show_unusable(unusable, console)
    quiet_transformers()
    scored, failures = [], []
    mistakes: dict[str, Exception] = {}
    for number, run in enumerate(finished, start=1):
        name, arm = run.recipe["name"], arms.get(run.path, run.method.label())
        label = f"{name}, {arm}, seed {run.seed}"
        try:
            result = rescore(run, settings)
        except (CheckpointError, ResultsError) as error:
            failures.append(Failure(label, run.path, str(error), 1 if isinstance(error, CheckpointError) else 2))
            continue
        except (DataError, RecipeError) as error:  # of this run alone, or of the command
            failures.append(Failure(label, run.path, f"{run.path}: {error}", 2))
            mistakes[str(error)] = error
            continue
        scored.append(RunRecord(run.path, run.recipe, result, run.metrics))
        console.print(f"{number:>{len(str(len(finished)))}}/{len(finished)}  {label}: {summary(result, cost=False)}")
    if scored:
        return scored, failures
    if len(mistakes) == 1:
        raise mistakes.popitem()[1]
    raise FailedRunsError(failures)


def _label_of(recipe: Mapping[str, Any]) -> str:
    return f"{recipe['name']}, alpha {recipe['method']['alpha']:g}, seed {recipe['seed']}"


def _show_result(run: Run) -> None:
    result = run.result()
    assert result is not None  # it has just been trained
    _show_scores(result, ("valid", "test"))
    Terminal().print(f"{_scored_weights(result)} {run.folder}".lstrip(), soft_wrap=True)


def _scored_weights(result: Mapping[str, Any]) -> str:
    *others, last = result.get("averaged_steps") or [None]
    if last is None and result.get("best_step") is None:  # of a version that did not say
        return ""
    if last is None:
        by_loss = " by its loss" if result["recipe"].get("select_by") == "loss" else ""
        return f"The weights of update {result['best_step']}, the best on the valid split{by_loss}."
    if not others:
        return f"The weights of update {last}."
    return f"The mean of the weights of updates {', '.join(map(str, others))} and {last}."


def _show_scores(result: Mapping[str, Any], splits: Sequence[str]) -> None:
    """A row a metric, the main one first; below, what a reader should know beside the numbers."""
    from rdrop.experiments.comparison.wording import NumberStyle

    table = _table("", *splits)
    for metric in sorted(result["test"], key=lambda name: name != result["metric"]):
        style = NumberStyle.of(metric, [])
        # Some are of the test split alone.
        table.add_row(style.heading(metric), *(style.score(result[split].get(metric)) for split in splits))
    console = Terminal()
    console.print(_label_of(result["recipe"]), style="bold")
    console.print(table)
    for name, note in result.get("notes", {}).items():
        console.print(f"{name}: {note}", soft_wrap=True)


def _show_comparisons(
    records: list[RunRecord], root: Path, *, of: Set[Path] | None = None, are_new_scores: bool = False
) -> list[Comparison]:
    """Shows the comparisons of the records, or those with one of the runs `of`, and returns all.

    These have all seeds and arms that are there, as on the page: which of them were asked for is no reason to leave
    others out. `root` is the folder that remembers the arms and the verdicts; of scores that no run has there is no
    verdict.
    """
    from rdrop.experiments.comparison.comparison import comparisons
    from rdrop.experiments.comparison.finished_runs import split_usable
    from rdrop.experiments.comparison.looks import read_looks
    from rdrop.experiments.comparison.terminal_table import terminal_table
    from rdrop.experiments.report.settings import distinguishing_settings, titled

    console = Terminal()
    found = comparisons(records, () if are_new_scores else read_looks(root), read_designs(root))
    for comparison, setting in zip(found, distinguishing_settings(found), strict=True):
        if of is not None and of.isdisjoint(run.path for run in comparison.runs):
            continue
        if are_new_scores:
            comparison = replace(comparison, are_new_scores=True)
        console.print(terminal_table(comparison, titled(comparison.name, setting)))
        # Of more contests than two, a screen would not do; the page has all.
        _show_words([comparison.verdict()], comparison.remarks(contests=2), comparison)
    _show_unusable([run for run in split_usable(records)[1] if of is None or run.path in of], console)
    return found


def _show_tuning(tuning: Tuning, runs: Path) -> None:
    from rdrop.experiments.comparison.terminal_table import terminal_table
    from rdrop.experiments.comparison.tuning import terminal_table as table_of_search
    from rdrop.experiments.report.tuning import write_tuning

    console = Terminal()
    console.print(table_of_search(tuning))
    console.print(terminal_table(tuning.fresh))
    _show_words(tuning.sentences(), tuning.fresh.remarks(), tuning.fresh)
    console.print(f"The page with the grid and the comparison: {write_tuning(tuning, runs)}", soft_wrap=True)


def _show_words(verdicts: Iterable[str], remarks: Iterable[str], comparison: Comparison) -> None:
    """Shows what is said below the table of a comparison: the verdict and what belongs to it, then the notes."""
    from rdrop.experiments.comparison.notes import noted

    console = Terminal()
    console.print()
    for sentence in verdicts:
        console.print(sentence, style="bold")
    for remark in remarks:
        console.print(remark)
    for hint in comparison.hints():
        console.print(f"Hint: {hint}", style="yellow")
    console.print()
    notes = noted(comparison)
    for note in notes:
        console.print(note)
    if notes:
        console.print()


def _show_unusable(unusable: Iterable[UnusableRun], console: Console) -> None:
    for run in unusable:
        console.print(f"left out: {run.path}: {run.problem}", style="yellow", soft_wrap=True)


def _write_page(runs: Path) -> None:
    from rdrop.experiments.report.page import write_report
    from rdrop.experiments.report.published_page import write_results

    console = Terminal()
    console.print(f"The page with curves, settings and cost: {write_report(runs)}", soft_wrap=True)
    console.print(f"Beside the published figures: {write_results(runs)}", soft_wrap=True)

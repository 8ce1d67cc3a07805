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
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from rdrop.experiments.comparison.designs import record_designs
from rdrop.experiments.distributed import in_several_processes, is_first_process
from rdrop.experiments.launch.answers import (
    kernel_line,
    keys_of,
    progress_console,
    show_comparisons,
    show_result,
    show_scores,
    show_tuning,
    title_of,
    write_pages,
)
from rdrop.experiments.launch.jobs import train_all
from rdrop.experiments.launch.options import (
    DEFAULT_RUNS,
    DataFolder,
    Jobs,
    ModelName,
    NoDoubleBatch,
    RecipeName,
    RunsFolder,
    Settings,
    TestFile,
    Trackers,
    TrainFile,
    UnlabeledFile,
    ValidFile,
    chosen_recipe,
    parse_jobs,
    parse_seeds,
    require_no_file,
    settings_of,
)
from rdrop.experiments.launch.outcomes import DIVERGED_STATUS, FailedRunsError, Failure, MistakeError, StoppedError
from rdrop.experiments.launch.places import find_places
from rdrop.experiments.launch.plan import Command, Run, plan_arms
from rdrop.experiments.launch.terminal import Terminal, escaped_warnings
from rdrop.experiments.recipe import override
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import RECIPES, find_recipe
from rdrop.experiments.run_folder import TUNING, ResultsError, RunLockedError, find_runs
from rdrop.experiments.run_folder.data_files import require_unchanged
from rdrop.experiments.shown import escaped, shell_line
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.training.trackers import TrackerError

# typer imports click or brings its own, by version. This is the UsageError of the one it uses.
UsageError: type[typer.BadParameter] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
)

_OLD_SPELLING = re.compile(r"^--unlabelled(?==|$)")


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
        catalog(runs, console.width) if recipe is None else keys_of(override(find_recipe(recipe), settings or []))
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
    chosen = chosen_recipe(
        recipe, settings, data=data, train=train, valid=valid, test=test, unlabeled=unlabeled, model=model
    )
    run = Run.of(title_of(chosen.saved()), chosen, runs)
    if side_by_side:  # `processes.py` started this process
        from rdrop.experiments.launch.child import train_supervised

        raise typer.Exit(train_supervised(run, side_by_side, tracker or ()))
    failures = train_all([run], progress_console(), trackers=tracker or ())
    if failures:
        raise FailedRunsError(failures)
    if is_first_process():
        show_result(run)


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
    chosen = chosen_recipe(
        recipe, settings, data=data, train=train, valid=valid, test=test, unlabeled=unlabeled, model=model
    )
    arms = plan_arms(chosen, arm or (), larger_batch=not no_double_batch, entry=find_recipe(recipe).name)
    plan = arms.runs(parse_seeds(str(arms.least_seeds) if seeds is None else seeds), runs)
    if arms.designs() and is_first_process():
        record_designs(runs, arms.designs())
    command = Command(recipe, runs, tuple(tracker or ()))
    if commands:
        _print_commands(plan, command)
        return
    console = progress_console()
    places = find_places(parse_jobs(jobs), console)
    failures = train_all(plan, console, trackers=tracker or (), places=places, command=command)
    failed = {failure.folder for failure in failures}
    if is_first_process() and len(failed) < len(plan):
        show_comparisons(find_runs(runs), runs, of={run.folder for run in plan} - failed)
        write_pages(runs)
    if failures:
        raise FailedRunsError(failures)


def _print_commands(plan: Sequence[Run], command: Command) -> None:
    """Prints the command of each run that is not settled. Raises `FailedRunsError` for results that are damaged."""
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
    if in_several_processes():
        raise typer.BadParameter("a search runs in one process, or in several by --jobs; not under torchrun")
    chosen = chosen_recipe(
        recipe, fixed, data=data, train=train, valid=valid, test=test, unlabeled=unlabeled, model=model
    )
    candidates = tuning.make_grid(chosen, grid)
    if not no_double_batch:
        for plain, rdrop in itertools.product(candidates.plain, candidates.rdrop):
            tuning.of_equal_cost(plain, rdrop)  # which may be refused, and before anything is trained
    console = progress_console()
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
    show_tuning(tuned, runs)
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
    from rdrop.experiments.launch.evaluate import rescored

    require_no_file(settings or [], "--test")
    changes = [*(settings or []), *settings_of(data=data, test=test)]
    scored, failures = rescored(runs, changes)
    if not is_first_process():
        pass  # of several, which have all scores
    elif as_json:
        found = [{"run": str(run.path), "scores": run.result["test"]} for run in scored if run.result is not None]
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    elif len(scored) == 1 and scored[0].result is not None:
        show_scores(scored[0].result, ("test",))
    else:
        lost = [record for record in find_runs(runs) if record.failure is not None]
        of = {run.path for run in scored}
        shown = show_comparisons([*scored, *lost], runs, of=of, are_new_scores=bool(changes))
        if not changes:
            record_looks(runs, (comparison.look() for comparison in shown))
    if failures:
        raise FailedRunsError(failures)


@app.command()
def report(runs: Annotated[Path, typer.Argument(metavar="RUNS")] = DEFAULT_RUNS) -> None:
    """Show the comparisons among the finished runs below RUNS, and write RUNS/report.html and RUNS/results.html."""
    show_comparisons(find_runs(runs), runs)
    write_pages(runs)


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
    from rdrop.experiments.launch.this_process import quiet_transformers

    quiet_transformers()
    found = check_recipe(chosen_recipe(recipe, settings, data=data, train=train, model=model))
    missing = kernels.available()
    if as_json:
        sys.stdout.write(json.dumps({**found.as_dict(), "kernels": missing}, indent=2) + "\n")
    else:
        sys.stdout.write(escaped(f"{found}\n{kernel_line(missing)}\n"))
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

"""`rdrop evaluate`: new scores of the test split with the weights of finished runs."""

from __future__ import annotations

from pathlib import Path

from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.comparison.designs import read_designs
from rdrop.experiments.comparison.finished_runs import split_usable
from rdrop.experiments.launch.answers import progress_console, show_unusable
from rdrop.experiments.launch.outcomes import FailedRunsError, Failure
from rdrop.experiments.launch.progress import summary
from rdrop.experiments.launch.this_process import quiet_transformers
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import ResultsError, RunRecord, find_runs
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.training.checkpoints import CheckpointError
from rdrop.experiments.training.evaluation import rescore


def rescored(runs: Path, settings: list[str]) -> tuple[list[RunRecord], list[Failure]]:
    """The finished runs below `runs`, with new scores of the test split in the place of the old; and those without any.

    Raises `FailedRunsError` if none could be scored; where all say the same of the command, that error.
    """

    records = find_runs(runs)
    finished, unusable = split_usable(records)
    if not finished:
        reasons = " ".join(f"{run.path}: {run.problem}" for run in unusable[:1])
        raise ResultsError(f"{runs} holds no finished run. {reasons}".rstrip())
    compared = comparisons(records, designs=read_designs(runs))
    in_order = [(run.path, arm.label) for of in compared for arm in of.arms for run in arm.runs]
    arms, places = dict(in_order), {path: place for place, (path, _) in enumerate(in_order)}
    finished.sort(key=lambda run: (run.recipe["name"], run.seed, places.get(run.path, len(places)), run.path))
    console = progress_console()
    show_unusable(unusable, console)
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
            where = "" if str(error).startswith(str(run.path)) else f"{run.path}: "
            failures.append(Failure(label, run.path, f"{where}{error}", 2))
            mistakes[str(error)] = error
            continue
        scored.append(RunRecord(run.path, run.recipe, result, run.metrics))
        console.print(f"{number:>{len(str(len(finished)))}}/{len(finished)}  {label}: {summary(result, cost=False)}")
    if scored:
        return scored, failures
    if len(mistakes) == 1:
        raise mistakes.popitem()[1]
    raise FailedRunsError(failures)

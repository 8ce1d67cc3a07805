"""Two processes that want the same runs: each run is trained once, and ends as if there had been one process.

Run as a script, this file is the host of the pairs: it imports everything once and forks, so that a pair costs
milliseconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from tests.experiments.tiny_runs import RECIPE, TinyTask, final_state

from rdrop.experiments.launch import jobs
from rdrop.experiments.launch.jobs import train_all
from rdrop.experiments.launch.plan import Run, plan_comparison
from rdrop.experiments.run_folder.lock import RunLockedError
from rdrop.experiments.training import trainer

PAIRS = 20
REFUSED = 2


@pytest.fixture(scope="module")
def hosted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared")
    done = subprocess.run(
        [sys.executable, "-m", "tests.experiments.training.test_shared_folder", str(folder)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_of_two_that_train_one_folder_one_does_and_it_ends_as_one_alone(hosted: Path) -> None:
    expected = final_state(hosted / "whole")
    statuses = json.loads((hosted / "pairs.json").read_text())
    assert len(statuses) == PAIRS
    for number, pair in enumerate(statuses):
        assert set(pair) <= {0, REFUSED}
        assert 0 in pair
        assert final_state(hosted / f"pair-{number}") == expected
        assert sorted(path.name for path in (hosted / f"pair-{number}").iterdir()) == [
            "checkpoints", "metrics.jsonl", "recipe.json", "result.json",
        ]  # fmt: skip
    assert any(REFUSED in pair for pair in statuses)


def test_two_comparisons_with_the_same_baseline_train_it_once_and_both_end_whole(hosted: Path) -> None:
    assert json.loads((hosted / "comparisons.json").read_text()) == [0, 0]
    for run in {run.folder: run for plan in comparisons(hosted) for run in plan}.values():
        rows = [(row["kind"], row["step"]) for row in jobs_rows(run)]
        assert len(rows) == len(set(rows)) > 0
        assert run.result() is not None
    trained = (hosted / "trained.txt").read_text().split()
    assert len(trained) == len(set(trained)) == 6  # two alphas and one baseline, two seeds


def jobs_rows(run: Run) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]


def comparisons(folder: Path) -> list[list[Run]]:
    return [
        plan_comparison(RECIPE.replace(alpha=alpha), [0, 1], folder / "shared", larger_batch=False)
        for alpha in (1.0, 2.0)
    ]


# ------------------------------------------------------------------------------------------------------- the host


def host(folder: Path) -> None:
    trainer.load_task = TinyTask  # type: ignore[assignment]
    trainer.train(RECIPE, folder / "whole")
    pairs = [both([lambda n=n: train_alone(folder / f"pair-{n}")] * 2) for n in range(PAIRS)]  # type: ignore[misc]
    (folder / "pairs.json").write_text(json.dumps(pairs))

    jobs.SECONDS_BETWEEN_LOOKS = 0.02
    train = trainer.train

    def noted(*arguments: object, **options: object) -> dict[str, object]:
        result = train(*arguments, **options)  # type: ignore[arg-type]
        with open(folder / "trained.txt", "a") as file:
            file.write(f"{result['digest']}\n")
        return result

    trainer.train = noted  # type: ignore[assignment]
    statuses = both([lambda plan=plan: train_plan(plan) for plan in comparisons(folder)])  # type: ignore[misc]
    (folder / "comparisons.json").write_text(json.dumps(statuses))


def train_alone(folder: Path) -> int:
    try:
        trainer.train(RECIPE, folder)
    except RunLockedError:
        return REFUSED
    return 0


def train_plan(plan: list[Run]) -> int:
    return len(train_all(plan, Console(quiet=True)))


def both(programs: list[Callable[[], int]]) -> list[int]:
    """Runs programs that start when all of them are there, and returns their exit statuses."""
    waiting, start = os.pipe()
    children = [fork(program, waiting, start) for program in programs]
    os.close(waiting)
    os.close(start)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def fork(program: Callable[[], int], waiting: int, start: int) -> int:
    child = os.fork()
    if not child:
        status = 99
        try:
            os.close(start)
            os.read(waiting, 1)  # returns when nobody can write any more
            status = program()
        finally:
            os._exit(status)
    return child


if __name__ == "__main__":
    host(Path(sys.argv[1]))

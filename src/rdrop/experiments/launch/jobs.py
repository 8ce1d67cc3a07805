"""Training the runs of a plan: one after the other in this process, or several at a time, each in one of its own.

A run trains with as many threads as it would alone: what the environment says, OMP_NUM_THREADS above all.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence

from rich.console import Console

from rdrop.experiments.distributed import in_several_processes
from rdrop.experiments.launch.outcomes import DIVERGED_STATUS, Failure, Outcome, StoppedError, Workers
from rdrop.experiments.launch.plan import Command, Run
from rdrop.experiments.launch.processes import Processes
from rdrop.experiments.launch.progress import Display, show_progress, summary
from rdrop.experiments.launch.this_process import ThisProcess
from rdrop.experiments.run_folder import TUNING, ResultsError, RunFolder
from rdrop.experiments.run_folder.data_files import require_unchanged
from rdrop.experiments.run_folder.lock import RunLockedError, holder_of
from rdrop.experiments.training.trackers import require_trackers

SECONDS_BETWEEN_LOOKS = 2.0
"""At the runs that another process trains, when nothing else is left to do."""


def train_all(
    runs: Sequence[Run],
    console: Console,
    *,
    trackers: Sequence[str] = (),
    places: Sequence[Mapping[str, str]] = ({},),
    command: Command | None = None,
) -> list[Failure]:
    """Trains the runs that are not finished, showing the progress, and returns those that failed.

    `places` has, for each run that may train at a time, what its environment says more; several need the `command` by
    which a run is started. A run that another process trains is left to it; at the end it is waited for, and taken over
    if that process ends without finishing it. A single run that another process trains is refused.

    Raises:
        TrackerError: before anything is loaded.
        ResultsError: files of the data have changed since some of the runs began.
        RunLockedError: the only run is being trained elsewhere.
        StoppedError: what is finished stays finished, and what was on goes on from its checkpoint next time.
        RecipeError, DataError, OSError, MistakeError: what the other runs would meet too.
    """
    require_trackers(trackers)
    require_unchanged(run.folder for run in runs)
    session = _Session(runs)
    if session.finished:
        console.print(f"{session.finished} of {len(runs)} runs finished already", highlight=False)
    try:
        with show_progress(console, [run.recipe for run in runs], [run.recipe for run in session.waiting]) as display:
            if len(places) > 1 and command is not None and session.waiting:
                with Processes(places, command, display) as workers:
                    session.train(workers, display)
            else:
                goes_on = len(runs) > 1 and not in_several_processes()
                session.train(ThisProcess(display, trackers, goes_on=goes_on), display)
    except KeyboardInterrupt as cause:
        status = getattr(cause, "exit_code", 130)
        raise StoppedError(sum(_is_finished(run) for run in runs), len(runs), status) from None
    return session.failures


class _Session:
    """The runs that wait, those that other processes have, and those that failed."""

    workers: Workers
    display: Display

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.shares = len(runs) > 1 and not in_several_processes()
        self.elsewhere: list[Run] = []
        self.failures: list[Failure] = []
        self.waiting = deque(run for run in runs if not self.is_settled(run))
        self.finished = len(runs) - len(self.waiting) - len(self.failures)

    def train(self, workers: Workers, display: Display) -> None:
        self.workers, self.display = workers, display
        while self.waiting or self.workers.running or self.elsewhere:
            while self.waiting and self.workers.free:
                self.start(self.waiting.popleft())
            if self.workers.running:
                for outcome in self.workers.wait():
                    self.take(outcome)
            elif self.elsewhere and not self.waiting:
                self.look_elsewhere()

    def start(self, run: Run) -> None:
        if self.is_settled(run):  # by another process since
            if _is_finished(run):
                self.show_finished(run)
            return
        if self.shares and holder_of(run.folder) is not None:
            self.elsewhere.append(run)
            return
        self.display.start(run.label, run.recipe)
        self.workers.start(run)

    def take(self, outcome: Outcome) -> None:
        run = outcome.run
        if outcome.kind == "finished":
            self.show_finished(run)
            return
        self.display.drop(run.label)
        if outcome.failure is not None:
            self.failures.append(outcome.failure)
            if len(self.runs) > 1:
                self.display.say(f"failed: {outcome.failure}")
        elif self.shares:
            self.elsewhere.append(run)
        else:
            raise RunLockedError(outcome.holder)

    def look_elsewhere(self) -> None:
        """Waits for what other processes train; a run that its process leaves unfinished is ours."""
        self.display.wait(f"waiting for {len(self.elsewhere)} of the runs, which other processes train")
        time.sleep(SECONDS_BETWEEN_LOOKS)
        left, self.elsewhere = self.elsewhere, []
        for run in left:
            if holder_of(run.folder) is not None:
                self.elsewhere.append(run)
            elif not self.is_settled(run):
                self.waiting.append(run)
            elif _is_finished(run):
                self.show_finished(run)

    def is_settled(self, run: Run) -> bool:
        """Whether nothing is left to train: the run is finished, or it is known, and noted, that it cannot be."""
        try:
            if run.result() is not None:
                RunFolder(run.folder).restore_recipe(run.recipe.saved())
                return True
            known = run.failure()
        except ResultsError as error:
            self.failures.append(Failure.of(run, str(error), 2))
            return True
        if known is not None:
            again = f"It is not trained again; to try it, delete {run.folder / 'failed.json'}"
            self.failures.append(Failure.of(run, f"{known} {again}", DIVERGED_STATUS))
        return known is not None

    def show_finished(self, run: Run) -> None:
        self.finished += 1
        result = run.result()
        assert result is not None
        number = f"{self.finished:>{len(str(len(self.runs)))}}/{len(self.runs)}"
        split = "valid" if TUNING in run.folder.parts else "test"  # test chooses nothing, so a search does not show it
        said = f"{number}  {run.label}: {summary(result, split=split)}"
        self.display.finish(run.label, said if len(self.runs) > 1 else None)


def _is_finished(run: Run) -> bool:
    try:
        return run.result() is not None
    except ResultsError:
        return False

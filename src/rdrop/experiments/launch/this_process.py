"""Train runs in this process, one after the other."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rdrop.experiments.launch.outcomes import DIVERGED_STATUS, FailedRunsError, Failure, Outcome
from rdrop.experiments.launch.plan import Run
from rdrop.experiments.launch.progress import Display
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import NO_ROOM, ResultsError
from rdrop.experiments.run_folder.lock import LockLostError, RunLockedError
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.training.progress import Progress
from rdrop.experiments.training.trackers import TrackerError

MISTAKES = (RecipeError, DataError, TrackerError, OSError)
"""What the other runs would meet too: the command is wrong, the data are, or the disk is full. But a file of the run's
own that cannot be read or written, on a disk that has room, ends this run alone."""


class ThisProcess:
    """Trains one run at a time, here. `goes_on`: the next run is trained even after an error that nobody foresaw."""

    def __init__(self, display: Display, trackers: Sequence[str], *, goes_on: bool) -> None:
        self._display, self._trackers, self._goes_on = display, trackers, goes_on
        self._run: Run | None = None

    @property
    def free(self) -> bool:
        return self._run is None

    @property
    def running(self) -> bool:
        return self._run is not None

    def start(self, run: Run) -> None:
        self._run = run

    def wait(self) -> list[Outcome]:
        run, self._run = self._run, None
        assert run is not None
        try:
            train_run(run, lambda progress: self._display.update(run.label, progress), trackers=self._trackers)
        except RunLockedError as error:
            return [Outcome(run, "busy", holder=str(error))]
        except FailedRunsError as error:
            return [Outcome(run, "failed", error.failures[0])]
        except MISTAKES:
            raise
        except Exception as error:
            if not self._goes_on:
                raise
            self._display.say(traceback.format_exc())
            return [Outcome(run, "failed", Failure.of(run, f"{type(error).__name__}: {error}", 1))]
        return [Outcome(run, "finished")]


def train_run(run: Run, on_progress: Callable[[Progress], None], **options: Any) -> dict[str, Any]:
    """Trains a run in this process; what ends this run alone is a `FailedRunsError`."""
    from rdrop.experiments.training import checkpoints, failures, trainer

    quiet_transformers()
    try:
        return trainer.train(run.recipe, run.folder, on_progress=on_progress, **options)
    except failures.DivergedError as cause:
        raise FailedRunsError([Failure.of(run, str(cause), DIVERGED_STATUS)]) from cause
    except failures.RefusedError as cause:
        raise FailedRunsError([Failure.of(run, str(cause), 2)]) from cause
    except (failures.TrainingError, LockLostError) as cause:
        raise FailedRunsError([Failure.of(run, str(cause), 1)]) from cause
    except (checkpoints.CheckpointError, ResultsError) as cause:
        raise FailedRunsError([Failure.of(run, str(cause), 2)]) from cause
    except OSError as cause:
        if not _is_of_the_run(cause, run):
            raise
        raise FailedRunsError([Failure.of(run, str(cause), 1)]) from cause


def _is_of_the_run(error: OSError, run: Run) -> bool:
    """Whether it is about a file in the folder of the run, and not about a disk that is full for all."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if cause.errno in NO_ROOM or not isinstance(cause.filename, str | os.PathLike):
        return False
    return Path(cause.filename).absolute().is_relative_to(run.folder.absolute()) and run.folder.is_dir()


def quiet_transformers() -> None:
    """Silences transformers: its bars would break ours, and that a classifier on top is new is no news."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]

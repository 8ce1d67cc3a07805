"""Training runs in a child process, which `processes.py` has started: it tells its parent, and ends with it."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rdrop.experiments.launch.outcomes import FailedRunsError
from rdrop.experiments.launch.plan import Run
from rdrop.experiments.launch.this_process import MISTAKES, train_run
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.run_folder.lock import RunLockedError
from rdrop.experiments.training.progress import Progress

SECONDS_BETWEEN_EVENTS = 0.2
LAST_RESORT_SECONDS = 60.0
"""After which a child whose parent is gone, and that does not stop, ends without saving."""


def train_supervised(run: Run, side_by_side: int, trackers: Sequence[str]) -> int:
    """Trains the run as a child of `Processes`, then those that it is given, and returns the exit status."""
    parent = _Parent()
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no event

    def tell(**event: Any) -> None:
        with suppress(
            BrokenPipeError
        ):  # the parent is gone, and `_Parent` stops what is trained: saved, not in mid-air
            events.write(json.dumps(event) + "\n")
            events.flush()

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        tell(warning=str(message))

    warnings.showwarning = show_warning
    while True:
        status = _train_and_tell(run, side_by_side, trackers, tell)
        parent.is_training = False  # before it is told: it may let this process end at once
        if status != 0:
            return status
        tell(finished=True)
        following = parent.next_run(type(run.recipe))
        if following is None:
            return 0
        run = following


def _train_and_tell(run: Run, side_by_side: int, trackers: Sequence[str], tell: Callable[..., None]) -> int:
    told_at = 0.0

    def on_progress(progress: Progress) -> None:
        nonlocal told_at
        is_last = progress.step == progress.updates
        if is_last or progress.warning is not None or time.monotonic() - told_at >= SECONDS_BETWEEN_EVENTS:
            told_at = time.monotonic()
            tell(progress=asdict(progress))

    try:
        train_run(run, on_progress, trackers=trackers, side_by_side=side_by_side)
    except RunLockedError as error:
        tell(busy=str(error))
        return 2
    except FailedRunsError as error:
        tell(failed=error.failures[0].what)
        return error.status
    except MISTAKES as error:
        status = 1 if isinstance(error, OSError) else 2
        tell(mistake=str(error), status=status)
        return status
    return 0


class _Parent:
    """The process that started this one: it sends further runs, a line each; what is trained ends with it."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.is_training = True
        """Whether there is a run to be stopped when the parent is gone."""
        self._is_gone = False
        threading.Thread(target=self._listen, name="life of the parent", daemon=True).start()

    def next_run(self, kind: type[Recipe]) -> Run | None:
        """Waits for the next run; None if there is none."""
        line = self._lines.get()
        if line is None:
            return None
        self.is_training = True
        if self._is_gone:  # since it sent that
            return None
        told = json.loads(line)
        return Run(told["label"], kind.parse(told["recipe"]), Path(told["folder"]))

    def _listen(self) -> None:
        rest = b""
        while some := os.read(sys.stdin.fileno(), 1 << 16):  # no buffered reader: its lock would be held at the end
            *whole, rest = (rest + some).split(b"\n")
            for line in whole:
                self._lines.put(line)
        self._is_gone = True
        self._lines.put(None)
        if self.is_training:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LAST_RESORT_SECONDS)
            os._exit(128 + signal.SIGTERM)

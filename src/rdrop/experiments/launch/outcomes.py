"""The end of a run's training: finished, in another process, failed; and the errors that end all of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from rdrop.experiments.launch.plan import Run

DIVERGED_STATUS = 3


class StoppedError(Exception):
    """Training was stopped from outside, by Ctrl-C for example. `status` is the exit status the shell expects."""

    def __init__(self, finished: int, runs: int, status: int) -> None:
        super().__init__(f"stopped, with {finished} of {runs} runs finished")
        self.status = status


class Failure(NamedTuple):
    """A run that could not start, or could not go on, and the exit status that says so."""

    label: str
    folder: Path
    what: str
    status: int

    @classmethod
    def of(cls, run: Run, what: str, status: int) -> Failure:
        return cls(run.label, run.folder, what, status)

    def __str__(self) -> str:
        return f"{self.label}: {self.what}"


class FailedRunsError(Exception):
    """Runs that could not start, or could not go on; the others are finished."""

    def __init__(self, failures: Sequence[Failure]) -> None:
        super().__init__("; ".join(map(str, failures)))
        self.failures = tuple(failures)
        statuses = {failure.status for failure in failures}
        self.status = statuses.pop() if len(statuses) == 1 else 1


class MistakeError(Exception):
    """An error of a child process about its command, its data or the disk, which the other runs share."""

    def __init__(self, what: str, status: int) -> None:
        super().__init__(what)
        self.status = status


class Outcome(NamedTuple):
    """The end of a run's training. `busy`: another process has it."""

    run: Run
    kind: Literal["finished", "busy", "failed"]
    failure: Failure | None = None
    holder: str = ""
    """Who has it, in a sentence."""


class Workers(Protocol):
    """Train runs: `start` as long as one is `free`, then `wait` for what happens."""

    @property
    def free(self) -> bool: ...
    @property
    def running(self) -> bool: ...
    def start(self, run: Run) -> None: ...
    def wait(self) -> list[Outcome]: ...

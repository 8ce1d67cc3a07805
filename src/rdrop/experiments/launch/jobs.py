"""Training the runs of a plan: one after the other in this process, or several at a time, each in one of its own.

A child process is `rdrop train ...` with two pipes to its parent. On its standard output it tells how far it is, a JSON
object a line. Its standard input says nothing and is open as long as the parent lives: when it ends, however the parent
ended, the child stops as on SIGTERM, saved. A child has a session of its own, so that Ctrl-C in the terminal reaches
the parent alone, which passes it on once.

A run trains with as many threads as it would alone: what the environment says, OMP_NUM_THREADS above all.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Literal, NamedTuple, Protocol

from rich.console import Console

from rdrop.experiments.launch.plan import Command, Run
from rdrop.experiments.launch.progress import Display, show_progress, summary
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import NO_ROOM, TUNING, ResultsError, RunFolder
from rdrop.experiments.run_folder.data_files import require_unchanged
from rdrop.experiments.run_folder.lock import LockLostError, RunLockedError, holder_of
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.training.progress import Progress
from rdrop.experiments.training.trackers import TrackerError, require_trackers

DIVERGED_STATUS = 3
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
SECONDS_BETWEEN_LOOKS = 2.0
"""At the runs that another process trains, when nothing else is left to do."""
SECONDS_BETWEEN_EVENTS = 0.2
LAST_RESORT_SECONDS = 60.0
"""After which a child whose parent is gone, and that does not stop, ends without saving."""

_MISTAKES = (RecipeError, DataError, TrackerError, OSError)
"""What the other runs would meet too: the command is wrong, the data are, or the disk is full. But a file of the run's
own that cannot be read or written, on a disk that has room, ends this run alone."""


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


# ---------------------------------------------------------------------------------------------------- the plan's runs


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
                goes_on = len(runs) > 1 and not _in_several_processes()
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
        self.shares = len(runs) > 1 and not _in_several_processes()
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


def _in_several_processes() -> bool:
    """Whether torchrun has started several processes, which must all do the same."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


# -------------------------------------------------------------------------------------------------- in this process


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
        except _MISTAKES:
            raise
        except Exception as error:
            if not self._goes_on:
                raise
            self._display.say(traceback.format_exc())
            return [Outcome(run, "failed", Failure.of(run, f"{type(error).__name__}: {error}", 1))]
        return [Outcome(run, "finished")]


def train_run(run: Run, on_progress: Callable[[Progress], None], **options: Any) -> dict[str, Any]:
    """Trains a run in this process; what ends this run alone is a `FailedRunsError`."""
    from rdrop.experiments.training import checkpoints, trainer

    quiet_transformers()
    try:
        return trainer.train(run.recipe, run.folder, on_progress=on_progress, **options)
    except trainer.DivergedError as cause:
        raise FailedRunsError([Failure.of(run, str(cause), DIVERGED_STATUS)]) from cause
    except trainer.RefusedError as cause:
        raise FailedRunsError([Failure.of(run, str(cause), 2)]) from cause
    except (trainer.TrainingError, LockLostError) as cause:
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


# -------------------------------------------------------------------------------------- several processes: the parent


class Child(NamedTuple):
    """A process that trains a run."""

    run: Run
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    said: dict[str, Any]


class Processes:
    """Trains a run in each of several places, a process each, which goes on with the next run when one has finished.

    What ends in any other way ends its process too, and the next run in that place gets a new one.
    """

    def __init__(self, places: Sequence[Mapping[str, str]], command: Command, display: Display) -> None:
        self._places, self._command, self._display = places, command, display
        self._children: dict[int, Child] = {}
        self._idle: dict[int, Child] = {}
        """Processes that have finished a run and wait for another one."""
        self._events: queue.Queue[tuple[subprocess.Popen[bytes], dict[str, Any] | None]] = queue.Queue()
        self._warnings: set[str] = set()
        self._noted: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Processes:
        """Lets Ctrl-C and SIGTERM stop all processes from here on, each saved; a second one kills them."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._note_signal) for signum in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._children:
            self._stop()
        for child in self._idle.values():
            _release(child)
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @property
    def free(self) -> bool:
        return len(self._children) < len(self._places)

    @property
    def running(self) -> bool:
        return bool(self._children)

    def start(self, run: Run) -> None:
        place = next(place for place in range(len(self._places)) if place not in self._children)
        idle = self._idle.pop(place, None)
        if idle is not None:
            if _hand_over(idle, run):
                self._children[place] = idle._replace(run=run, said={})
                return
            _release(idle)
        arguments = [*self._command.arguments(run), "--side-by-side", str(len(self._places))]
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the child has ended
        process = subprocess.Popen(
            [sys.executable, "-m", "rdrop", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, **self._places[place]},
            start_new_session=True,
        )
        self._children[place] = Child(run, process, errors, {})
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def wait(self) -> list[Outcome]:
        """Returns what has ended in the next moment."""
        outcomes = self._take_events()
        if self._noted:
            raise _Interrupted(self._noted[0])
        for child in self._children.values():
            if "mistake" in child.said:
                raise MistakeError(child.said["mistake"], child.said["status"])
        return outcomes

    def _note_signal(self, signum: int, _frame: FrameType | None) -> None:
        self._noted.append(signum)
        if not self._children:
            raise _Interrupted(signum)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with suppress(ValueError):  # a line that was cut off by a kill
                self._events.put((process, json.loads(line)))
        process.stdout.close()
        process.wait()
        self._events.put((process, None))

    def _take_events(self) -> list[Outcome]:
        outcomes = []
        try:
            process, event = self._events.get(timeout=SECONDS_BETWEEN_EVENTS)
            while True:
                outcomes += self._outcome_of(process, event)
                process, event = self._events.get_nowait()
        except queue.Empty:
            return outcomes

    def _outcome_of(self, process: subprocess.Popen[bytes], event: dict[str, Any] | None) -> list[Outcome]:
        """Returns how a run ended, if this event is its end: None is that of the process."""
        place = next((place for place, child in self._children.items() if child.process is process), None)
        if place is None:  # it had no run any more
            return []
        child = self._children[place]
        if event is None:
            return [] if "mistake" in child.said else [self._ended(self._children.pop(place))]
        if "finished" in event:
            self._idle[place] = self._children.pop(place)
            return [Outcome(child.run, "finished")]
        self._note(child, event)
        return []

    def _note(self, child: Child, event: dict[str, Any]) -> None:
        if "progress" in event:
            self._display.update(child.run.label, Progress(**event["progress"]))
        elif "warning" in event:
            if event["warning"] not in self._warnings:
                self._warnings.add(event["warning"])
                self._display.say(event["warning"])
        else:
            child.said.update(event)

    def _ended(self, child: Child) -> Outcome:
        run, status = child.run, child.process.returncode
        assert child.process.stdin is not None
        child.process.stdin.close()
        child.errors.seek(0)
        last = [line for line in child.errors.read().decode(errors="replace").splitlines() if line.strip()][-1:]
        child.errors.close()
        if status == 0:
            return Outcome(run, "finished")
        if "busy" in child.said:
            return Outcome(run, "busy", holder=child.said["busy"])
        if status == DIVERGED_STATUS or "failed" in child.said:
            return Outcome(
                run, "failed", Failure.of(run, f"{child.said.get('failed', '')} (exit status {status})", status)
            )
        how = f"exit status {status}" if status > 0 else f"killed by {signal.Signals(-status).name}"
        why = "; the system does this when memory runs out" if status == -signal.SIGKILL else ""
        return Outcome(run, "failed", Failure.of(run, f"{how}{why}{''.join(f': {line}' for line in last)}", 1))

    def _stop(self) -> None:
        """Asks all to save and stop, and waits for them; at a further signal it kills them."""
        heard = len(self._noted)
        for child in self._children.values():
            child.process.terminate()
        self._display.wait("stopping: what is on is being saved; Ctrl-C ends it at once")
        while any(child.process.poll() is None for child in self._children.values()):
            if len(self._noted) > heard:
                for child in self._children.values():
                    child.process.kill()
            self._take_events()  # who has finished after all waits for a next run, and is released with the idle ones
        self._children.clear()


def _hand_over(idle: Child, run: Run) -> bool:
    """Gives a waiting process its next run. False if it is gone."""
    assert idle.process.stdin is not None
    idle.errors.seek(0)
    idle.errors.truncate()  # what it has said of the run before explains nothing of this one
    line = json.dumps({"label": run.label, "recipe": run.recipe.saved(), "folder": str(run.folder)}) + "\n"
    try:
        idle.process.stdin.write(line.encode())
        idle.process.stdin.flush()
    except OSError:
        return False
    return True


def _release(idle: Child) -> None:
    """Lets a waiting process end."""
    assert idle.process.stdin is not None
    with suppress(OSError):
        idle.process.stdin.close()
    idle.process.wait()
    idle.errors.close()


class _Interrupted(KeyboardInterrupt):
    def __init__(self, signum: int) -> None:
        self.exit_code = 128 + signum


# --------------------------------------------------------------------------------------- several processes: a child


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
    except _MISTAKES as error:
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


# ------------------------------------------------------------------------------------------------ how many at a time


def find_places(jobs: int | None, console: Console) -> list[dict[str, str]]:
    """Returns, for each run that may train at a time, what its environment says more: its GPU, or its threads.

    `jobs` None decides by the machine: a run on each GPU; without any, as many as there is room for by
    OMP_NUM_THREADS, which is 2 unless it is set. Says so where runs would share cores.
    """
    if jobs == 1:
        return [{}]
    gpus = _visible_gpus()
    cores = _cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    added: dict[str, str] = {}
    if jobs is None and not gpus and not threads.isdigit():
        threads = "2"
        added = {"OMP_NUM_THREADS": threads}
    if jobs is None:
        jobs = len(gpus) or max(1, cores // max(1, int(threads)))
        if jobs == 1:
            return [{}]
        each = "a GPU each" if gpus else f"OMP_NUM_THREADS={threads} each"
        console.print(f"{jobs} runs at a time, {each}", highlight=False)
    elif not gpus:
        own = int(threads) if threads.isdigit() else cores
        if jobs * own > cores:
            console.print(
                f"{jobs} runs at a time, with {own} threads each, share {cores} cores and slow each other down. "
                f"OMP_NUM_THREADS={max(1, cores // jobs)} before the command gives each cores of its own; runs with "
                "another number of threads differ in the last bits.",
                highlight=False,
                soft_wrap=True,
            )
    return [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else added for place in range(jobs)]


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

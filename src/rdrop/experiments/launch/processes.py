"""Training several runs at a time, each in a process of its own, as their parent sees it.

A child process is `rdrop train ...` with two pipes to its parent. On its standard output it tells how far it is, a JSON
object a line. Its standard input brings it further runs, a line each, and is open as long as the parent lives: when it
ends, however the parent ended, the child stops as on SIGTERM, saved. A child has a session of its own, so that Ctrl-C
in the terminal reaches the parent alone, which passes it on once.
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
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType, TracebackType
from typing import IO, Any, NamedTuple

from rdrop.experiments.launch.child import SECONDS_BETWEEN_EVENTS
from rdrop.experiments.launch.outcomes import DIVERGED_STATUS, Failure, MistakeError, Outcome
from rdrop.experiments.launch.plan import Command, Run
from rdrop.experiments.launch.progress import Display
from rdrop.experiments.training.progress import Progress

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

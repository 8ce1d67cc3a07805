"""Stopping on request: SIGTERM and SIGINT (Ctrl-C) are noted when they come and acted on where nothing is lost."""

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(KeyboardInterrupt):
    """A run was asked to stop and has saved its state, or has just finished; the same call resumes it or returns its
    result.

    A KeyboardInterrupt, so that `except Exception` around several runs does not go on with the next one.
    `exit_code` is the shell's for the signal: 130 for SIGINT, 143 for SIGTERM.
    """

    def __init__(self, signum: int, step: int, checkpoint: Path, *, finished: bool = False) -> None:
        self.signum, self.step, self.checkpoint = signum, step, checkpoint
        by = f"stopped by {signal.Signals(signum).name}"
        saved = f"at step {step}, saved in {checkpoint}. The same command continues from there."
        super().__init__(f"{by} when the run had finished; its result is saved." if finished else f"{by} {saved}")

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


class StopRequestedError(Exception):
    """Raised by `StopSignals.poll`; never leaves the training loop."""


class StopSignals:
    """Within this context a first signal is noted, for `poll` and in `asked`; a second interrupts at once, as usual.

    `any_process` tells each process whether one of them was asked to stop, so that all stop at the same place. The
    previous handlers come back at the end. Outside the main thread, where Python allows no handlers, nothing is caught.
    """

    def __init__(self, any_process: Callable[[bool], bool], processes: int) -> None:
        self.signum: int = signal.SIGTERM
        self._any_process, self._processes = any_process, processes
        self.asked = False
        """Whether this process was asked to stop."""
        self._previous: dict[int, Any] = {}

    def poll(self, *_: object) -> None:
        """Raises `StopRequestedError` if a process was asked to stop. Takes any arguments, to serve as a hook."""
        if self._any_process(self.asked):
            raise StopRequestedError

    def poll_alone(self) -> None:
        """Polls while one process waits for what only it needs; of several, the others are not there to agree."""
        if self._processes == 1:
            self.poll()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._restore()

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self.signum, self.asked = signum, True
        self._restore()

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

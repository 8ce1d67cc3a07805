"""Signals that have arrived when the next line runs."""

import signal
import time
from typing import Any

import pytest

from rdrop.experiments.run_folder import RunFolder


def send(signum: int = signal.SIGTERM) -> None:
    """Sends a training its first signal, and returns when its handler has run.

    Where other threads are alive, Python may run a handler a moment after the signal, and two signals at once as one.
    """
    noting = signal.getsignal(signum)
    signal.raise_signal(signum)
    while signal.getsignal(signum) == noting:  # the first signal brings the previous handlers back
        time.sleep(0.001)


def stop_when_the_result_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets each training be asked to stop after its last poll."""
    write = RunFolder.write_result

    def asked_to_stop(folder: RunFolder, result: dict[str, Any]) -> None:
        send()
        write(folder, result)

    monkeypatch.setattr(RunFolder, "write_result", asked_to_stop)

"""Signals that have arrived when the next line runs."""

import signal
import time


def send(signum: int = signal.SIGTERM) -> None:
    """Sends a training its first signal, and returns when its handler has run.

    Where other threads are alive, Python may run a handler a moment after the signal, and two signals at once as one.
    """
    noting = signal.getsignal(signum)
    signal.raise_signal(signum)
    while signal.getsignal(signum) == noting:  # the first signal brings the previous handlers back
        time.sleep(0.001)

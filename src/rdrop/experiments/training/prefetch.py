"""The batches of the next updates are made while the present one runs: an accelerator does not wait for its data."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from queue import SimpleQueue
from types import TracebackType
from typing import Generic, TypeVar

Value = TypeVar("Value")

AHEAD = 3
"""Steps whose values are there, or being made, while one is used: a slow read is made up for before anybody waits."""
SECONDS_BETWEEN_LOOKS = 0.2
PATIENCE_SECONDS = 5.0
"""How long a context that ends waits for the value that is being made; a read may have stalled."""


class Prefetched(Generic[Value]):
    """`at(step)` is `function(step)`; within the context it is made in a thread, and those of the next steps follow.

    `function` must depend on nothing but the step: whether a value was made ahead cannot be seen in it. It is never
    called twice at once, nor for a step from `end` on. What it raises, `at` raises when it comes to that step. A call
    that never returns keeps neither the context nor the process from ending.
    """

    def __init__(self, function: Callable[[int], Value], end: int) -> None:
        self._function, self._end = function, end
        self._asked: SimpleQueue[tuple[int, Future[Value]] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._ahead: deque[tuple[int, Future[Value]]] = deque()

    def at(self, step: int, while_waiting: Callable[[], object] = lambda: None) -> Value:
        """Returns the value of a step; `while_waiting` is called now and then until it is there, and may raise."""
        if self._thread is None:
            return self._function(step)
        if self._ahead and self._ahead[0][0] != step:
            self._cancel()
        self._ask_up_to(step)
        value = self._ahead[0][1]
        while not value.done() and not wait([value], SECONDS_BETWEEN_LOOKS).done:
            while_waiting()
        self._ahead.popleft()
        self._ask_up_to(min(step + AHEAD, self._end - 1), first=step + 1)
        return value.result()

    def __enter__(self) -> Prefetched[Value]:
        self._asked = SimpleQueue()
        self._thread = threading.Thread(target=self._make, args=(self._asked,), name="rdrop-batches", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._cancel()
        self._asked.put(None)
        if self._thread is not None and kind is not KeyboardInterrupt:  # by which a second Ctrl-C ends at once
            self._thread.join(PATIENCE_SECONDS)
        self._thread = None

    def _ask_up_to(self, last: int, first: int | None = None) -> None:
        """Asks for what is not asked for yet: the steps from `first`, which is `last` unless given."""
        first = last if first is None else first
        for step in range(first + len(self._ahead), last + 1):
            value: Future[Value] = Future()
            self._ahead.append((step, value))
            self._asked.put((step, value))

    def _cancel(self) -> None:
        while self._ahead:
            self._ahead.pop()[1].cancel()

    def _make(self, asked: SimpleQueue[tuple[int, Future[Value]] | None]) -> None:
        while (task := asked.get()) is not None:
            step, value = task
            if value.set_running_or_notify_cancel():
                try:
                    value.set_result(self._function(step))
                except BaseException as error:
                    value.set_exception(error)

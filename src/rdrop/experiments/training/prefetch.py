"""The batches of the next update are made while the present one runs: an accelerator does not wait for its data."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Prefetched(Generic[Value]):
    """`at(step)` is `function(step)`; within the context it is made in a thread, and that of the step after follows.

    `function` must depend on nothing but the step: whether a value was made ahead cannot be seen in it. It is never
    called twice at once, nor for a step from `end` on. What it raises, `at` raises when it comes to that step.
    """

    def __init__(self, function: Callable[[int], Value], end: int) -> None:
        self._function, self._end = function, end
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: tuple[int, Future[Value]] | None = None

    def at(self, step: int) -> Value:
        if self._thread is None:
            return self._function(step)
        ahead, self._ahead = self._ahead, None
        is_ahead = ahead is not None and ahead[0] == step
        value = (ahead[1] if ahead is not None and is_ahead else self._thread.submit(self._function, step)).result()
        if step + 1 < self._end:
            self._ahead = step + 1, self._thread.submit(self._function, step + 1)
        return value

    def __enter__(self) -> Prefetched[Value]:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rdrop-batches")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread = self._ahead = None

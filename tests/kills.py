"""Runs that are killed at a chosen moment, each in a fork of a process that has imported everything once.

A moment is a call of something that is watched: it kills the process before the n-th of them. So a kill costs
milliseconds, and is no matter of time.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Watch = Callable[[str], object]
"""Told of every moment by its name."""


def kill_and_resume(
    folder: Path, kill_at: list[str], run: Callable[[Path, Watch], object], resume: Callable[[Path], object]
) -> None:
    """Runs `folder/whole`, then kills and resumes a run in `folder/killed-N` for each moment N, and prints its name.

    `kill_at` has the numbers of the moments, those below 0 counted from the last; or is ["all"].
    """
    report = os.memfd_create("moments")
    assert fork(lambda: run(folder / "whole", lambda moment: os.write(report, f"{moment}\n".encode()))) == 0
    moments = os.pread(report, 10**6, 0).decode().split()
    for at in range(len(moments)) if kill_at == ["all"] else [int(at) % len(moments) for at in kill_at]:
        killed = folder / f"killed-{at:04d}"
        assert fork(lambda killed=killed, at=at: run(killed, killer(at))) == -signal.SIGKILL, (at, moments[at])  # type: ignore[misc]
        assert fork(lambda killed=killed: resume(killed)) == 0, (at, moments[at])  # type: ignore[misc]
        sys.stdout.write(f"{moments[at]}\n")


def killer(at: int) -> Watch:
    """Returns a watch that kills this process at its moment `at`, counted from 0."""
    moments: list[str] = []

    def watch(moment: str) -> None:
        if len(moments) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        moments.append(moment)

    return watch


def watch_calls(places: Iterable[tuple[Any, str]], watch: Watch) -> None:
    """Lets the functions of these names, each in its module or class, tell `watch` of every call before it is made."""
    for place, name in places:
        setattr(place, name, _watched(name, getattr(place, name), watch))


def _watched(name: str, function: Callable[..., Any], watch: Watch) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        watch(name)
        return function(*arguments, **keywords)

    return call


def fork(job: Callable[[], object]) -> int:
    """Runs the job in a child; returns its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            job()
            status = 0
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

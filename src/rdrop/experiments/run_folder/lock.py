"""A run folder belongs to one process: a lock that names it, shows that it lives, and is taken over when it does not.

    runs/<recipe name>/<digest>/lock.json    only while a process trains the run

The file is there from its first byte to its last or not at all. Its time of change is renewed by a thread of the
process. A holder on this machine is gone when no process has its id and its time of start. A holder on another machine
(another container counts as one) is gone when its lock has not been renewed for `SILENCE_SECONDS`.

A lock is changed by one process at a time: the one that has locked, in the same way, the guard named after the holder
that is to go. Two that find one stale lock cannot both take it.

This module needs the standard library only.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rdrop.experiments.shown import shell_word

FILE = "lock.json"
MOST_BYTES = 4096
"""Of the file."""
HEARTBEAT_SECONDS = 15.0
UNKNOWN = ""
"""The start of a process that is there and not shown."""
SILENCE_SECONDS = 180.0
"""After so long without a heartbeat, a holder on another machine is taken for gone."""


class RunLockedError(Exception):
    """A run folder that another process has."""


class LockLostError(RuntimeError):
    """This process stood still so long that another has taken its run folder over."""


@dataclass(frozen=True)
class Holder:
    """The process that has a run folder, as it stands in the lock."""

    token: str
    """Of this lock alone; no other, of no process, has the same."""
    host: str
    machine: str
    """What must be equal for process ids to be comparable: the boot of the machine, and the container."""
    pid: int
    started: str
    """When the process started, so that another with its id is not taken for it."""
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


class RunLock:
    """The lock of a run folder, held by this process from `acquire` to `release`."""

    def __init__(self, path: Path, holder: Holder) -> None:
        self._path, self._holder = path, holder
        self._beat_at = time.time()
        self._lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="heartbeat of the run's lock", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(cls, folder: Path) -> tuple[RunLock, Holder | None]:
        """Returns the lock of a run folder, and the dead process from which it was taken over, if it was.

        Raises `RunLockedError` if another process has it, and `OSError` if the folder cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        holder = _this_process()
        predecessor = _lock(folder / FILE, holder)
        _remove_leftovers(folder)
        return cls(folder / FILE, holder), predecessor

    def release(self) -> None:
        self._over.set()
        self._thread.join()
        # Where another is taking it over, or its disk is gone, it is stale as soon as this process is.
        with contextlib.suppress(RunLockedError, OSError):
            try:
                _exchange(self._path, self._holder, None)
            except OSError:  # a full disk has no room for the guard; while this process lives, nobody else takes it
                found = _read(self._path)
                if found is not None and found[0].token == self._holder.token:
                    self._path.unlink()

    def require_held(self) -> None:
        """Raises `LockLostError` if another process has taken the run over. It costs nothing, so ask often."""
        if time.time() - self._beat_at > 2 * HEARTBEAT_SECONDS:  # the machine slept, or the process was stopped
            self._beat()
        if self._lost:
            found = _read(self._path)
            raise LockLostError(
                f"{self._path.parent} has been taken over by {found[0] if found else 'another process'}, because this "
                f"one gave no sign for {SILENCE_SECONDS:.0f} s. Nothing that was saved is lost."
            )

    def _keep_alive(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            self._beat()

    def _beat(self) -> None:
        self._beat_at = time.time()
        try:
            found = _read(self._path)
            self._lost = found is None or found[0].token != self._holder.token
            if not self._lost:
                os.utime(self._path)
        except OSError:
            pass  # a disk that stalls now may answer at the next beat


def holder_of(folder: Path) -> Holder | None:
    """Returns the living process that has a run folder, if there is one."""
    found = _read(folder / FILE)
    return found[0] if found is not None and _is_alive(*found, clock=time.time) else None


def _lock(path: Path, mine: Holder) -> Holder | None:
    """Puts `mine` into a lock, and returns the stale holder that had it, if there was one."""
    while not _create(path, mine):
        found = _read(path)
        if found is None:
            continue
        if _is_alive(*found, clock=lambda: _time_of_file_system(path.parent)):
            raise RunLockedError(_refusal(path, *found))
        if _exchange(path, found[0], mine):
            return found[0]
    return None


def _exchange(path: Path, old: Holder, new: Holder | None) -> bool:
    """Replaces `old` by `new` (None: by nothing) if the lock is still that of `old`; returns whether it was."""
    guard = path.with_name(f"{path.name}.{old.token}")
    _lock(guard, new or old)
    try:
        found = _read(path)
        if found is None or found[0].token != old.token:
            return False
        if new is None:
            path.unlink()
        else:
            os.replace(_write_temporary(path, new), path)
        return True
    finally:
        guard.unlink(missing_ok=True)


def _create(path: Path, mine: Holder) -> bool:
    temporary = _write_temporary(path, mine)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        return _create_without_links(path, temporary.read_bytes())
    finally:
        temporary.unlink()
    return True


def _create_without_links(path: Path, content: bytes) -> bool:
    try:
        with open(path, "xb", buffering=0) as file:
            file.write(content)
    except FileExistsError:
        return False
    return True


def _write_temporary(path: Path, mine: Holder) -> Path:
    temporary = path.with_name(f"{path.name}.{mine.token}.tmp")
    temporary.write_bytes(json.dumps(asdict(mine), indent=2).encode() + b"\n")
    return temporary


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # of a pipe nothing is read


def _read(path: Path) -> tuple[Holder, float] | None:
    """Returns who has a lock and when it was last renewed; None if nobody has."""
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            renewed = os.fstat(file.fileno())
            content = file.read(MOST_BYTES)
    except FileNotFoundError:
        return None
    try:
        holder = Holder(**json.loads(content))
        types = [type(value) for value in asdict(holder).values()]
        is_name = types[0] is str and holder.token.isalnum()  # of the guard, a file beside the lock
        if types == [str, str, str, int, str, str] and is_name and 0 < holder.pid < 2**31:
            return holder, renewed.st_mtime
    except (ValueError, TypeError, RecursionError):
        pass
    # Damaged, or half written where there are no hard links. Its silence tells when it may be taken over.
    unknown = Holder(f"{renewed.st_ino}-{renewed.st_mtime_ns}", "an unknown host", "", 0, "", "an unknown time")
    return unknown, renewed.st_mtime


def _is_alive(holder: Holder, renewed: float, *, clock: Callable[[], float]) -> bool:
    if holder.machine == _machine():
        start = _start_of(holder.pid)
        if start != UNKNOWN:
            return start == holder.started
    return clock() - renewed < SILENCE_SECONDS


def _refusal(path: Path, holder: Holder, renewed: float) -> str:
    line = f"{path.parent} is being trained by {holder}"
    if holder.machine == _machine() and _start_of(holder.pid) == holder.started:
        return f"{line}. Wait for it or stop it: kill {holder.pid}"
    if renewed > _time_of_file_system(path.parent) + SILENCE_SECONDS:  # its clock has been set back
        return f"{line}. Its last heartbeat is dated in the future. If that process is gone: rm {shell_word(path)}"
    return f"{line}. If that process is gone, the run is free {SILENCE_SECONDS:.0f} s after its last heartbeat."


def _this_process() -> Holder:
    return Holder(
        token=uuid.uuid4().hex,
        host=platform.node() or "this host",
        machine=_machine(),
        pid=os.getpid(),
        started=_start_of(os.getpid()) or UNKNOWN,
        since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{platform.node()} {uuid.getnode():x}"


def _start_of(pid: int) -> str | None:
    """Returns when a process of this machine started, in the words of the system; None if there is no such process.

    `UNKNOWN` for one that the system does not show: of another user, where processes are hidden.
    """
    is_there: str | None = None  # what is known of it where nothing is shown: it may have ended since
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # another user's
        is_there = UNKNOWN
    try:
        # The name of the program, in parentheses, may hold anything.
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2]
        state, *fields = status.split()
        return None if state in "ZX" else fields[18]
    except OSError:
        try:
            shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        except OSError:  # there is no ps
            return UNKNOWN
        return shown.stdout.strip() or is_there


def _time_of_file_system(folder: Path) -> float:
    """Returns the time on the clock that dates the files here, which may be a server's."""
    probe = folder / f"{FILE}.{uuid.uuid4().hex}.tmp"
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    """Removes what processes that were killed in the middle of locking have left."""
    for path in folder.glob(f"{FILE}.*"):
        found = _read(path)
        if found is not None and not _is_alive(*found, clock=lambda: _time_of_file_system(folder)):
            path.unlink(missing_ok=True)

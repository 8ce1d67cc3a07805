"""Time and peak memory of several calls, side by side in one run, and the record that is kept of them.

Rounds are interleaved: in each, every call runs once, so that a busy machine is as busy for all. Memory is the highest
in use during a call above that before it: on a GPU the allocator's count, on a CPU the resident set of the process.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from rdrop import __version__, kernels
from rdrop.bench.records import Record
from rdrop.kernels import cpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
COMPILED = "_compiled"
"""How the names of the forms end that go through `torch.compile`."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

SOFT_LABELS = "_soft_labels"
"""How the names of the forms end whose labels are probabilities."""

ON_REQUEST = ("ours_reference", "simcut", "ours_simcut")
"""Forms that are measured when they are named only: the reference, which is made to be exact and read and takes most of
the time, and those of another divergence.
"""

T = TypeVar("T")
Call = Callable[[], object]
Prepare = Callable[[], Call]
"""Makes what one call uses up, and returns the call; only the call is measured."""


class BenchError(ValueError):
    """A measurement that cannot be made here; the message says what to change."""


@dataclass(frozen=True)
class Conditions:
    """The conditions of a measurement.

    Args:
        clock: "wall", or "processor": the time all threads of this process were on a core, which other processes hardly
            change. A GPU is timed by its own events.
        forms: which of a benchmark's forms, besides those it compares with; empty: all but those ON_REQUEST and of
            soft labels.
        compiled: whether those that go through `torch.compile` are among all.
        command: what the records name as their origin.
        say: is told what is being measured.
    """

    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    rounds: int = 5
    clock: str = "wall"
    forms: tuple[str, ...] = ()
    compiled: bool = True
    command: str = ""
    say: Callable[[str], None] = lambda _: None

    def __post_init__(self) -> None:
        if self.device not in kernels.KERNEL_OF_DEVICE:
            raise BenchError(f"device (={self.device!r}) must be one of {tuple(kernels.KERNEL_OF_DEVICE)}")
        if self.dtype not in DTYPES:
            raise BenchError(f"dtype (={self.dtype!r}) must be one of {tuple(DTYPES)}")
        if self.clock not in CLOCKS:
            raise BenchError(f"clock (={self.clock!r}) must be one of {tuple(CLOCKS)}")
        if self.rounds < 1 or self.threads < 1:
            raise BenchError(f"rounds (={self.rounds}) and threads (={self.threads}) must be >= 1")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BenchError("device='cuda': torch sees no CUDA device here; take device='cpu'")
        if self.device == "cpu" and self.dtype == "float16":
            raise BenchError("dtype='float16' has no kernel on a CPU; take 'float32' or 'bfloat16'")
        if reason := kernels.available()[self.kernel]:
            raise BenchError(f"there is no compiled kernel to measure on device={self.device!r}: {reason}")

    @property
    def kernel(self) -> kernels.Implementation:
        return kernels.KERNEL_OF_DEVICE[self.device]

    def chosen(self, table: Mapping[str, T], compared_with: Collection[str]) -> dict[str, T]:
        """Returns the forms that are to be measured, in the order of the table."""
        if self.forms:
            wanted = {*self.forms, *compared_with}
        else:
            left_out = SOFT_LABELS if self.compiled else (SOFT_LABELS, COMPILED)
            wanted = {name for name in table if not name.endswith(left_out)}.difference(ON_REQUEST)
        return {name: form for name, form in table.items() if name in wanted}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Runs the block with as many threads as asked for, and memory that can be measured."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        _return_freed_memory(True)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            _return_freed_memory(False)


@dataclass(frozen=True)
class Measurement:
    """The seconds of each round, empty where memory did not suffice, and the peak memory in bytes, None if unknown."""

    seconds: list[float]
    peak_extra_bytes: int | None


def measure(calls: Mapping[str, Prepare], conditions: Conditions) -> dict[str, Measurement]:
    """Warms each call up, runs it once for its memory, then `rounds` times in turn with the others.

    The first call of all compiles and imports what it needs, whose memory is not the loss's.
    """
    memory: dict[str, int | None] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, prepare in calls.items():
        conditions.say(f"warming up {name}")
        try:
            prepare()()
            memory[name] = _peak_extra_bytes(prepare(), conditions.device)
        except torch.OutOfMemoryError:
            conditions.say(f"{name} does not fit into memory")
    _return_freed_memory(False)
    for number in range(conditions.rounds):
        conditions.say(f"round {number + 1} of {conditions.rounds}")
        for name in memory:
            seconds[name].append(_seconds(calls[name](), conditions))
    _return_freed_memory(True)
    return {name: Measurement(seconds[name], memory.get(name)) for name in calls}


def _seconds(call: Call, conditions: Conditions) -> float:
    if conditions.device == "cuda":
        return _device_seconds(call)
    clock = CLOCKS[conditions.clock]
    start = clock()
    call()
    return clock() - start


def _device_seconds(call: Call) -> float:
    """Returns the time between two events.

    The device is kept busy first, so that it need not wait for the host to launch kernels."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda._sleep(20_000_000)  # type: ignore[no-untyped-call]  # clock cycles: about 10 ms
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _peak_extra_bytes(call: Call, device: str) -> int | None:
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory the allocator kept from earlier calls would hide this one's
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _resident_bytes("VmRSS")
    except (OSError, AttributeError):  # not Linux, or not glibc
        return None
    call()
    return _resident_bytes("VmHWM") - before


def _return_freed_memory(at_once: bool) -> None:
    """Whether blocks of 64 kB and more are the system's again as soon as they are freed, by glibc. Then what is
    resident is what is in use, not what a heap holds between its blocks; but each block takes the time to be cleared.
    Otherwise they are kept, up to 32 MB each, which is where a process of large tensors arrives by itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 16 if at_once else 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 1 << 17 if at_once else 64 << 20)


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


# ---------------------------------------------------------------------------------------------- records


def record(benchmark: str, form: str, what: str, measured: Measurement, conditions: Conditions, **size: Any) -> Record:
    """Returns one measurement with all that is needed to make it again."""
    median, p20, p80 = _quantiles(measured.seconds)
    return {
        "benchmark": benchmark,
        "form": form,
        "what": f"{form}: {what}",
        "unit": "s",
        "clock": conditions.clock if conditions.device == "cpu" else "device",
        "median": median,
        "p20": p20,
        "p80": p80,
        "rounds": len(measured.seconds),
        "peak_extra_bytes": measured.peak_extra_bytes,
        **size,
        "dtype": conditions.dtype,
        "threads": conditions.threads,
        **origin(conditions.device),
        "command": conditions.command,
    }


def origin(device: str = "cpu") -> Record:
    """Returns where and when a record is made: the device by its name, versions, commit and time."""
    return {
        "device": _device_name(device),
        "versions": _versions(device),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _quantiles(seconds: list[float]) -> tuple[float | None, ...]:
    """Returns the median and the quantiles 0.2 and 0.8."""
    if not seconds:
        return None, None, None
    of = torch.tensor(seconds, dtype=torch.float64)
    return tuple(float(of.quantile(q)) for q in (0.5, 0.2, 0.8))


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{cpu.processor()} ({platform.machine()}, {os.cpu_count()} cores, {cpu.instructions()})"


def _versions(device: str) -> dict[str, str]:
    versions = {"rdrop": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if device == "cuda":
        import triton

        versions |= {"triton": triton.__version__, "cuda": str(torch.version.cuda)}
    return versions


def _commit() -> str | None:
    """Returns the commit of the checkout, with "-dirty" where the source differs; None where it is installed."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "src/rdrop/bench/measure.py").exists() or shutil.which("git") is None:
        return None
    commit, changes = (
        subprocess.run(["git", "-C", root, *command], capture_output=True, text=True, check=False).stdout.strip()
        for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "--", "src"))
    )
    return (commit + ("-dirty" if changes else "")) or None

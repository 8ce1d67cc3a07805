"""Counts what a run costs: its time and its memory, over the updates alone."""

import ctypes
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch
from torch import nn

from rdrop.experiments.training.sharding import own_part

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class CostMeter:
    """Entered around every update, so that evaluation and checkpoints count for nothing::

    with meter:
        ...  # one update
    """

    def __init__(self, device: torch.device, seconds_before: float = 0.0, restored_bytes: int = 0) -> None:
        self.train_seconds = seconds_before  # of all sessions of the run
        self._restored_bytes = restored_bytes  # of an optimizer's state, which a run that is not resumed makes later
        self._step_seconds: list[float] = []  # of this session
        self._waited = 0.0
        self._memory = _memory_gauge(device)
        self._baseline_bytes: int | None = None
        self._peak_bytes: int | None = None

    def __enter__(self) -> None:
        if self._baseline_bytes is None:
            self._memory.return_what_is_free()
            self._baseline_bytes = self._memory.in_use()
        self._memory.reset_peak()
        self._started = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            return
        elapsed = time.perf_counter() - self._started
        self.train_seconds += elapsed
        self._step_seconds.append(elapsed)
        peak = self._memory.peak()
        if peak is not None:
            self._peak_bytes = max(peak, self._peak_bytes or 0)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Entered, within an update, around what waits for the examples: while it does, nothing is computed."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def sample_memory(self) -> None:
        """Called where memory is highest, between forward and backward: some gauges know no peak but what they see."""
        self._memory.sample()

    def report(self, model: nn.Module) -> dict[str, Any]:
        """The `cost` of `result.json`; median and peak are those of this session, null if it made no update."""
        return {
            "train_seconds": self.train_seconds,
            "step_milliseconds": statistics.median(self._step_seconds) * 1e3 if self._step_seconds else None,
            "data_wait_share": self._waited / sum(self._step_seconds) if self._step_seconds else None,
            "peak_extra_bytes": self._extra_bytes(),
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        }

    def _extra_bytes(self) -> int | None:
        if self._peak_bytes is None or self._baseline_bytes is None:
            return None
        return max(self._peak_bytes - self._baseline_bytes, 0) + self._restored_bytes


def bytes_of_state(optimizer: torch.optim.Optimizer) -> int:
    """Returns the bytes of the state that an optimizer has in this process, such as the moments of Adam."""
    tensors = [value for of_one in optimizer.state.values() for value in of_one.values() if torch.is_tensor(value)]
    return sum(part.numel() * part.element_size() for part in map(own_part, tensors))


class _NoGauge:
    """Memory that cannot be measured."""

    def return_what_is_free(self) -> None: ...

    def reset_peak(self) -> None: ...

    def sample(self) -> None: ...

    def in_use(self) -> int | None:
        return None

    def peak(self) -> int | None:
        return None


class _CudaGauge(_NoGauge):
    """Counts what torch's allocator has handed out."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def return_what_is_free(self) -> None:
        gc.collect()  # what an earlier run left behind would be counted

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def in_use(self) -> int:
        return torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)


class _LinuxGauge(_NoGauge):
    """The resident set's high-water mark, which the kernel lets a process reset."""

    def return_what_is_free(self) -> None:
        """Returns freed memory to the system: what an earlier run left to the C library would be used unseen."""
        gc.collect()
        with suppress(OSError, AttributeError):  # a C library that is not glibc
            ctypes.CDLL(None).malloc_trim(0)

    def reset_peak(self) -> None:
        _CLEAR_REFS.write_text("5")

    def in_use(self) -> int:
        return _status_bytes("VmRSS")

    def peak(self) -> int:
        return _status_bytes("VmHWM")


class _SamplingGauge(_NoGauge):
    """The largest resident set among the samples: a lower bound."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._highest = 0

    def reset_peak(self) -> None:
        self._highest = self.in_use()

    def sample(self) -> None:
        self._highest = max(self._highest, self.in_use())

    def in_use(self) -> int:
        return int(self._process.memory_info().rss)

    def peak(self) -> int:
        self.sample()
        return self._highest


def _memory_gauge(device: torch.device) -> _NoGauge:
    if device.type == "cuda":
        return _CudaGauge(device)
    if device.type != "cpu":
        return _NoGauge()
    with suppress(OSError):
        gauge = _LinuxGauge()
        gauge.reset_peak()
        return gauge
    return _SamplingGauge()


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024

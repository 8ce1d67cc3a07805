"""The CPU implementation: `rows.cpp`, compiled into the package at install, called through ctypes.

ctypes releases the GIL during the call. The library's threads are started for the call and joined before it returns:
there is no pool to survive a fork, and no second OpenMP beside torch's.
"""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("rows.so")
DTYPES = (torch.float32, torch.bfloat16)
MAX_PASSES = 32
INSTRUCTIONS = ("plain", "avx2", "avx512")
_VERSION = 3


class _Rows(ctypes.Structure):
    """Mirrors `RdropRows` in rows.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "gradient", "labels", "probabilities")),
        *((name, ctypes.c_void_p) for name in ("weight", "statistics")),
        *((name, ctypes.c_void_p) for name in ("task", "divergence", "grad_task", "grad_divergence")),
        *((name, ctypes.c_int64) for name in ("positions", "inner", "classes")),
        *((name, ctypes.c_int64) for name in ("logits_outer_stride", "logits_inner_stride")),
        *((name, ctypes.c_int64) for name in ("gradient_outer_stride", "gradient_inner_stride")),
        ("label_smoothing", ctypes.c_double),
        *((name, ctypes.c_int32) for name in ("passes", "bfloat16", "forward", "backward", "threads", "instructions")),
        ("divergence_kind", ctypes.c_int32),
    )


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.rdrop_rows.argtypes = (ctypes.POINTER(_Rows),)
    library.rdrop_rows.restype = None
    return library


@cache
def why_not() -> str | None:
    """Returns why the library cannot be used here; None if it can."""
    if not LIBRARY.exists():
        return (
            f"{LIBRARY.name} was not built: installing found no C++ compiler, or it failed (pip install -v shows "
            "how); with one present, install again"
        )
    try:
        version = _library().rdrop_rows_version()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY} does not load: {error}; install again"
    if version != _VERSION:
        return f"{LIBRARY} has version {version}, this code needs {_VERSION}: install again"
    return None


def why_not_for(logits: Tensor, passes: int) -> str | None:
    """Returns why these logits cannot be given to the library; None if they can."""
    if logits.device.type != "cpu":
        return f"the logits are on {logits.device}"
    if logits.dtype not in DTYPES:
        return f"the logits are {logits.dtype}; it computes float32 and bfloat16"
    if passes > MAX_PASSES:
        return f"{passes} passes are more than its {MAX_PASSES}"
    return None


def instruction_sets() -> tuple[str, ...]:
    """Returns those of `INSTRUCTIONS` this processor has, the best last."""
    return INSTRUCTIONS[: _library().rdrop_rows_instructions() + 1]


def instructions() -> str:
    """Returns the processor's best instruction set, or, for tests, what the variable RDROP_CPU_INSTRUCTIONS names."""
    present = instruction_sets()
    name = os.environ.get("RDROP_CPU_INSTRUCTIONS", present[-1])
    if name not in present:
        raise ValueError(f"RDROP_CPU_INSTRUCTIONS (={name!r}) must be one of {present} here")
    return name


def processor() -> str:
    """Names the processor as the operating system does."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # another system than Linux, or a sandbox: no reason to lose a result
        cpuinfo = ""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    return next(filter(None, [*names, platform.processor()]), "CPU")


def launch(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    label_smoothing: float,
    passes: int,
    divergence: int,
    statistics: Tensor,
    *,
    terms: tuple[Tensor, Tensor] | None = None,
    gradient: Tensor | None = None,
    upstream: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Runs the library. `divergence` is the place in DIVERGENCES (operators.py).

    `terms` asks for the forward, `gradient` for the backward of `upstream`.
    """
    kept: list[Tensor] = []

    def pointer(tensor: Tensor, dtype: torch.dtype = torch.float32) -> int:
        kept.append(tensor.detach().to(dtype).contiguous())
        return kept[-1].data_ptr()

    outer, inner, _ = logits.stride()
    rows = _Rows(
        logits=logits.data_ptr(),
        weight=None if weight is None else pointer(weight),
        statistics=pointer(statistics, torch.float64),
        positions=labels.shape[0] * labels.shape[1],
        inner=logits.shape[1],
        classes=logits.shape[2],
        logits_outer_stride=outer,
        logits_inner_stride=inner,
        label_smoothing=label_smoothing,
        passes=passes,
        bfloat16=logits.dtype == torch.bfloat16,
        forward=terms is not None,
        backward=gradient is not None,
        threads=torch.get_num_threads(),
        instructions=INSTRUCTIONS.index(instructions()),
        divergence_kind=divergence,
    )
    if labels.is_floating_point():
        rows.probabilities = pointer(labels)
    else:
        rows.labels = pointer(labels, torch.int64)
    if terms is not None:
        rows.task, rows.divergence = map(pointer, terms)
    if gradient is not None and upstream is not None:
        rows.grad_task, rows.grad_divergence = map(pointer, upstream)
        rows.gradient = gradient.data_ptr()
        rows.gradient_outer_stride, rows.gradient_inner_stride, _ = gradient.stride()
    if rows.positions:
        _library().rdrop_rows(ctypes.byref(rows))

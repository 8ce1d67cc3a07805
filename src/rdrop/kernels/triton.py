"""The GPU implementation: `rows_triton.py`, compiled by Triton at its first call for each dtype and number of passes.

Nothing here waits for the device. With the environment variable TRITON_INTERPRET=1, set before triton is first
imported, the same kernel runs on the CPU in NumPy: slow, for tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .constants import assume_constant_result

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_PASSES = 8


class Shape(NamedTuple):
    """The most classes that are read at a time, and how many of them a warp takes."""

    max_block: int
    classes_per_warp: int


# 8 classes a thread: 16 bytes of bfloat16 at once; two passes then take 94 to 112 registers on sm_90.
DEFAULT_SHAPE = Shape(max_block=2048, classes_per_warp=256)
SHAPES: dict[str, Shape] = {}
"""Those that were found to be faster on a card, by its name: `python -m benchmarks.gpu` measures them."""


@cache
def _kernels() -> ModuleType:
    from . import rows_triton  # here, so that without triton this module still says why it cannot run

    return rows_triton


@cache
def why_not() -> str | None:
    """Returns why the kernel cannot be used here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed: pip install triton"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"the device has compute capability {major}.{minor}; Triton needs 7.0" if major < 7 else None
    if _interpreted():
        return None
    return "there is no CUDA device; on a CPU it runs, slowly, with TRITON_INTERPRET=1 in the environment"


@assume_constant_result
def _interpreted() -> bool:
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(_kernels().rows, InterpretedFunction)


def why_not_for(logits: Tensor, passes: int) -> str | None:
    """Returns why these logits cannot be given to the kernel; None if they can."""
    if logits.device.type != "cuda" and not (logits.device.type == "cpu" and _interpreted()):
        return f"the logits are on {logits.device}"
    if logits.dtype not in DTYPES:
        return f"the logits are {logits.dtype}; it computes float32, bfloat16 and float16"
    if passes > MAX_PASSES:
        return f"{passes} passes are more than its {MAX_PASSES}"
    return None


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
    """Runs one program for each position. `terms` asks for the forward, `gradient` for the backward of `upstream`."""
    positions = labels.shape[0] * labels.shape[1]
    if not positions:
        return
    examples, classes = labels.shape[0], logits.shape[2]
    soft = labels.is_floating_point()
    out = logits if gradient is None else gradient
    shape = shape_on(logits.device)
    block = _block(classes, shape)
    warps = max(1, block // shape.classes_per_warp)
    # What one thread loads at once is 16 bytes, where Triton sees that each row begins and ends at a multiple of them.
    next_to = logits.data_ptr() % 16 == 0 and not any(n % 16 for n in (classes, *logits.stride()[:2]))
    if weight is not None:
        weight = weight.detach().float().contiguous()
    on_device = torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
    with on_device:
        _kernels().rows[(positions,)](
            logits.detach(),
            out.detach(),
            None if soft else labels.contiguous(),
            labels.detach().contiguous() if soft else None,
            weight,
            None if weight is None else weight.sum(),
            statistics,
            *(terms or (None, None)),
            *((None, None) if upstream is None else (scale.detach().float().contiguous() for scale in upstream)),
            label_smoothing,
            classes,
            logits.shape[1],
            logits.stride(0),
            logits.stride(1),
            examples * logits.stride(0),
            out.stride(0),
            out.stride(1),
            examples * out.stride(0),
            M=passes,
            DIVERGENCE=divergence if passes > 1 else 0,  # one pass has none
            FORWARD=terms is not None,
            BACKWARD=gradient is not None,
            DENSE=soft or label_smoothing > 0,
            BLOCK=block,
            FAR_BLOCK=max(32, block // 4),
            PARTIAL=block * logits.element_size() // 16 if next_to else min(32 * warps, block),
            NEXT=next_to,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def shape_on(device: torch.device) -> Shape:
    """Returns the shape of the programs on this card."""
    return SHAPES.get(_card(device), DEFAULT_SHAPE) if device.type == "cuda" else DEFAULT_SHAPE


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _block(classes: int, shape: Shape) -> int:
    """Returns how many classes are read at a time, a power of two."""
    return min(shape.max_block, max(32, 1 << (classes - 1).bit_length()))

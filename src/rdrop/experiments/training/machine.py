"""Describes where a run takes place: device and versions, as they stand in `result.json`."""

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from rdrop import __version__, kernels
from rdrop.kernels import cpu

LIBRARIES = (
    *("torch", "accelerate", "transformers", "tokenizers", "numpy", "safetensors", "scikit-learn"),
    *("sacrebleu", "rouge-score"),
)


def machine(device: torch.device, processes: int) -> dict[str, Any]:
    """Device, threads of each process, processes, and what computes the loss there."""
    return {
        "device": _name(device),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "kernel": _kernel(device),
    }


def _name(device: torch.device) -> str:
    """Names what decides how numbers are rounded there: of a CPU also the instructions that PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} ({platform.machine()})"
    return f"{cpu.processor()} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


def _kernel(device: torch.device) -> str:
    name = kernels.KERNEL_OF_DEVICE.get(device.type)
    return name if name is not None and kernels.available()[name] is None else "reference"


def versions() -> dict[str, str | None]:
    """Returns the versions of rdrop, Python and the libraries that decide a run's numbers; null: not installed."""
    return {"rdrop": __version__, "python": platform.python_version()} | {name: _version(name) for name in LIBRARIES}


@cache
def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None

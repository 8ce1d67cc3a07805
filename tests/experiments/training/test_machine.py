"""What a result says of the machine: also what computed the loss, without which times mean little."""

import platform
from pathlib import Path

import pytest
import torch

from rdrop import kernels
from rdrop.experiments.training.machine import machine
from rdrop.kernels import cpu


@pytest.mark.parametrize(
    ("device", "missing", "kernel"),
    [
        ("cpu", {"cpu": None, "triton": "no GPU"}, "cpu"),
        ("cpu", {"cpu": "not built", "triton": None}, "reference"),
        ("meta", {"cpu": None, "triton": None}, "reference"),
    ],
)
def test_the_kernel_is_the_one_that_the_loss_takes(
    device: str, missing: dict[str, str | None], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "available", lambda: missing)
    found = machine(torch.device(device), processes=3)
    assert found["kernel"] == kernel
    assert (found["processes"], found["threads"]) == (3, torch.get_num_threads())
    assert found["device"].startswith(device if device == "meta" else cpu.processor())


def test_of_a_cpu_the_processor_and_the_instructions_are_named() -> None:
    found = machine(torch.device("cpu"), processes=1)["device"]
    assert found == f"{cpu.processor()} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"
    known = [line.split(":")[1].strip() for line in lines_of("/proc/cpuinfo") if line.startswith("model name")]
    assert all(name in found for name in known)


def lines_of(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []

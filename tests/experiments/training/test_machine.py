"""What a result says of the machine: also what computed the loss, without which times mean little."""

import pytest
import torch

from rdrop import kernels
from rdrop.experiments.training.machine import machine


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
    assert found["device"].startswith(device)

"""Two processes with DDP do what one process does with the same data."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradient_agreement import worst_difference
from two_processes import TRAININGS, all_updates

HERE = Path(__file__).parent


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def test_two_processes_are_one_process(tmp_path: Path) -> None:
    """R-Drop; plain training of a model that ignores the count of labels; R-Drop in unequal micro-batches, where every
    forward is joint; plain training of a model that divides by the count; fused R-Drop.
    """
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "two_processes.py"), str(tmp_path)]
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)

    together = torch.load(tmp_path / "result.pt")
    alone = all_updates(accumulation=4, folder=str(tmp_path))
    for training, two, one in zip(TRAININGS, together, alone, strict=True):
        assert worst_difference(two["gradients"], one["gradients"]) < 1e-6, training
        assert two["logs"] == pytest.approx(one["logs"], rel=1e-6), training
    assert set(together[0]["logs"]) == {"loss", "task_loss", "divergence"}

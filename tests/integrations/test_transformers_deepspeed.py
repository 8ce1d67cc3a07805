"""DeepSpeed with `RDropTrainer` on two CPU processes, where it is installed: pip install deepspeed."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradient_agreement import CASES, build, train
from sharded import OF_DEEPSPEED
from tests.several_processes import environments

from rdrop.integrations.transformers import RDropTrainer

HERE = Path(__file__).parent


def test_an_update_of_zero_is_that_of_the_loss_by_hand(tmp_path: Path) -> None:
    """ZeRO 0, 1, 2 and 3, ragged batches in two accumulation steps; and plain training."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not among the extras: pip install deepspeed")
    command = [sys.executable, str(HERE / "sharded.py"), str(tmp_path)]
    with environments(2) as ranks:
        of_cpu = {"DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes = [subprocess.Popen(command, env=rank | of_cpu, **pipes) for rank in ranks]  # type: ignore[call-overload]
        try:
            outputs = [process.communicate()[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    found = torch.load(tmp_path / "result.pt")
    assert len(found) == len(OF_DEEPSPEED)
    assert max(found.values()) < 1e-6, found


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"micro_batches": 2}, r"micro_batches \(=2\) must be 1 with DeepSpeed, whose every backward is a step"),
        (
            {"unlabeled_dataset": [1]},
            "unlabeled_dataset must be left out with DeepSpeed, whose every backward",
        ),
        ({"on_nonfinite": "skip"}, 'must be "stop" with DeepSpeed, which changes the weights during backward'),
    ],
)
def test_what_needs_more_than_one_backward_is_refused_with_deepspeed(
    method: dict[str, object], message: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = RDropTrainer.create_accelerator_and_postprocess

    def with_deepspeed(self: RDropTrainer) -> None:
        create(self)
        self.is_deepspeed_enabled = True

    monkeypatch.setattr(RDropTrainer, "create_accelerator_and_postprocess", with_deepspeed)
    case = CASES["token classification"]
    with pytest.raises(ValueError, match=message):
        train(RDropTrainer, build(case), case.batches, folder, alpha=1.0, **method)

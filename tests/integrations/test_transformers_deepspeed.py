"""DeepSpeed with `RDropTrainer` on two CPU processes, where it is installed: pip install deepspeed."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gradient_agreement import CASES, build, train
from sharded import OF_DEEPSPEED
from tests.several_processes import outputs_of
from torch import nn

from rdrop.integrations.targets import Target
from rdrop.integrations.transformers import RDropTrainer
from rdrop.integrations.transformers.checks import why_not_fused

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found_by_two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two processes have found, one thing after the other: to start them takes most of the time."""
    tmp_path = tmp_path_factory.mktemp("deepspeed")
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not among the extras: pip install deepspeed")
    outputs_of(2, str(HERE / "sharded.py"), str(tmp_path), DS_ACCELERATOR="cpu", LOCAL_SIZE="2")
    return torch.load(tmp_path / "result.pt")


def test_an_update_of_zero_is_that_of_the_loss_by_hand(found_by_two: Any) -> None:
    """ZeRO 0, 1, 2 and 3, ragged batches in two accumulation steps; and plain training."""
    found, _ = found_by_two
    assert len(found) == len(OF_DEEPSPEED)
    assert max(found.values()) < 1e-6, found


def test_deepspeed_evaluates_as_the_stock_trainer_and_resumes_to_the_same_bits(found_by_two: Any) -> None:
    """ZeRO 1."""
    _, (loss, of_stock, is_resumed_the_same) = found_by_two
    assert loss == of_stock
    assert is_resumed_the_same


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


@pytest.mark.parametrize(
    ("deepspeed", "fsdp", "is_refused"), [(True, None, True), (False, 1, True), (False, 2, False), (False, None, False)]
)
def test_the_output_layer_is_at_hand_without_shards_and_with_those_of_fsdp2(
    deepspeed: bool, fsdp: int | None, is_refused: bool
) -> None:
    state = SimpleNamespace(fsdp_plugin=fsdp and SimpleNamespace(fsdp_version=fsdp))
    trainer = SimpleNamespace(
        is_deepspeed_enabled=deepspeed, is_fsdp_enabled=fsdp is not None, accelerator=SimpleNamespace(state=state)
    )
    target = Target(torch.zeros(2, 3, dtype=torch.long))
    reason = why_not_fused(trainer, nn.Linear(1, 1), [target], outputs_wanted=False)
    said = "DeepSpeed and FSDP 1 have the whole output layer at hand only while it runs"
    assert reason == (said if is_refused else None)

"""Runs whose weights are sharded by FSDP2: the updates of DDP, the same files, and the same bits after a stop.

Run as a script, this file is one of two processes: `test_sharding.py FOLDER` trains there, one run after another.
"""

import os
import sys
from collections import Counter
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from tests.experiments.signals import send
from tests.experiments.tiny_runs import RECIPE, TinyNetwork, TinyTask, final_state
from tests.several_processes import fsdp_on_cpus, outputs_of
from torch import nn
from transformers import BartConfig, BartForConditionalGeneration

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.training import sharding, trainer
from rdrop.experiments.training.checkpoints import MODEL, OPTIMIZER, load
from rdrop.experiments.training.optimization import build_optimizer
from rdrop.experiments.training.preemption import Preempted
from rdrop.experiments.training.sharding import ShardingError
from rdrop.experiments.training.trainer import TrainingError, train

WHOLE = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
BY_SIZE = {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "60"}
STOPS = ("forward 1", "forward 12", "evaluate 2")


class Untied(TinyTask):
    def build_model(self) -> nn.Module:
        model = TinyNetwork(self.recipe.model.dropout)
        model.output.weight = nn.Parameter(model.output.weight.detach().clone())
        return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes have trained, one run after the other: to start them takes most of the time."""
    folder = tmp_path_factory.mktemp("sharded")
    outputs_of(2, __file__, str(folder))
    return folder


@pytest.mark.parametrize("name", ["whole", "wrapped"])
def test_a_sharded_run_makes_the_updates_of_a_run_that_is_not(runs: Path, name: str) -> None:
    sharded, plain = (RunFolder(runs / f"{name}{ending}") for ending in ("", " plain"))
    for row, other in zip(sharded.metrics(), plain.metrics(), strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"kind", "seconds"}:
            assert row[key] == pytest.approx(other[key], rel=1e-5), key
    for file in (MODEL, OPTIMIZER):
        one, two = (tensors_of(run.path / "checkpoints/step-00000008" / file) for run in (sharded, plain))
        assert one.keys() == two.keys()
        assert max((one[key] - two[key]).abs().max().item() for key in one) <= 1e-6
    (result, other_result) = (run.result() for run in (sharded, plain))
    assert result is not None
    assert other_result is not None
    assert result["averaged_steps"] == other_result["averaged_steps"] == ([] if name == "whole" else [6, 8])
    assert result["test"] == pytest.approx(other_result["test"], rel=1e-5)
    assert result["machine"] == other_result["machine"] | {"sharded": "FSDP2"}
    assert result["cost"]["parameters"] == other_result["cost"]["parameters"]


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    with safetensors.safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_sharded_run_that_was_stopped_ends_in_the_bits_of_the_whole_one(runs: Path) -> None:
    expected = final_state(runs / "whole")
    for stop in STOPS:
        assert final_state(runs / stop) == expected, stop


def test_a_sharded_run_goes_on_without_sharding(runs: Path) -> None:
    ends = [load(runs / name / "checkpoints", 8).weights() for name in ("goes on plain", "whole plain")]
    assert max((ends[0][name] - ends[1][name]).abs().max().item() for name in ends[0]) <= 1e-6


def test_tied_weights_in_two_units_are_refused_before_anything_is_trained(runs: Path) -> None:
    remedy = "put them into one unit, by --fsdp_auto_wrap_policy NO_WRAP"
    assert (runs / "refusal").read_text() == f"FSDP would untie embedding.weight and output.weight: {remedy}"
    assert not list((runs / "refused").rglob("step-*"))


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        ({"FSDP_VERSION": "1"}, {}, "^FSDP of version 1 is not for experiments: add --fsdp_version 2$"),
        ({}, {"fused": True}, r"^fused \(=true\) must be false: it was not tried with FSDP$"),
        ({}, {"compile": True}, r"^compile \(=true\) must be false: it was not tried with FSDP$"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {}, "^--fsdp_activation_checkpointing must be false: .* masks"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "^accelerate launch asks for DeepSpeed, which experiments do not"),
        (
            {},
            {},
            "^--use_fsdp is for several processes, each with an accelerator of its own: ",
        ),
    ],
)
def test_what_would_be_wrong_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, str],
    changes: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # the plugin sets it
    for variable, value in (WHOLE | settings).items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(TrainingError, match=message):
        train(RECIPE.replace(**changes), tmp_path)


def test_encoder_decoders_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {f"{half}_{name}": 1 for half in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    model = BartForConditionalGeneration(BartConfig(vocab_size=8, d_model=2, max_position_embeddings=8, **sizes))
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(AcceleratorState(), "distributed_type", sharding.DistributedType.FSDP)
    with pytest.raises(ShardingError, match=r"^FSDP is not for BartForConditionalGeneration: a search runs"):
        sharding.shard(accelerator, model, build_optimizer(RECIPE, model))


# ------------------------------------------------------------------------------------------------- one of two processes


def trained(folder: Path, settings: dict[str, str], *, task: Any = TinyTask, recipe: Recipe = RECIPE) -> None:
    AcceleratorState._reset_state()
    PartialState._reset_state()
    for variable in WHOLE | BY_SIZE:
        os.environ.pop(variable, None)
    os.environ |= settings
    trainer.load_task = task
    with fsdp_on_cpus() if settings else nullcontext():
        train(recipe, folder)


def stopped(folder: Path, stop: str) -> None:
    seen: Counter[str] = Counter()

    def listen(event: str) -> None:
        seen[event] += 1
        if f"{event} {seen[event]}" == stop and os.environ["RANK"] == "1":
            send()

    TinyTask.on_event = staticmethod(listen)  # type: ignore[assignment]
    with suppress(Preempted):
        trained(folder, WHOLE)
        raise AssertionError(f"was not stopped at {stop}")
    TinyTask.on_event = staticmethod(lambda event: None)  # type: ignore[assignment]


def host(folder: Path) -> None:
    trained(folder / "whole", WHOLE)
    trained(folder / "whole plain", {})
    sgd = RECIPE.replace(optimizer="sgd", average_last=2)
    trained(folder / "wrapped", WHOLE | BY_SIZE, task=Untied, recipe=sgd)
    trained(folder / "wrapped plain", {}, task=Untied, recipe=sgd)
    for stop in STOPS:
        stopped(folder / stop, stop)
        trained(folder / stop, WHOLE)
    stopped(folder / "goes on plain", STOPS[1])
    trained(folder / "goes on plain", {})
    try:
        trained(folder / "refused", WHOLE | BY_SIZE)  # its tied weights would be in two units
    except TrainingError as error:
        (folder / "refusal").write_text(str(error))


if __name__ == "__main__":
    host(Path(sys.argv[1]))

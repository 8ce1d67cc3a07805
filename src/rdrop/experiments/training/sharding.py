"""Weights sharded over the processes by FSDP2, for a model that does not fit one card.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 8 -m rdrop train ...

Accelerate's own plugin says how (its other `--fsdp_...` settings), and shards the model. A checkpoint keeps weights and
moments whole, in the same files as without sharding: `Whole` is how it sees a sharded model and its optimizer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from rdrop.experiments.recipe import Recipe

OTHER_WAYS = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "PARALLELISM_CONFIG": "a parallelism config"}
"""What else `accelerate launch` can ask for, by its variable."""


class ShardingError(ValueError):
    """A way to train in several processes that is not here, or that does not fit the recipe or the model."""


def asked_plugin(recipe: Recipe) -> FullyShardedDataParallelPlugin | None:
    """Returns Accelerate's plugin with the settings of `accelerate launch`, if it was asked for FSDP.

    Raises `ShardingError` for what cannot be exact.
    """
    for variable, name in OTHER_WAYS.items():
        if _is_on(f"ACCELERATE_USE_{variable}"):
            raise ShardingError(
                f"accelerate launch asks for {name}, which experiments do not have: choose several GPUs (--multi_gpu), "
                "or FSDP (--use_fsdp --fsdp_version 2)"
            )
    if not _is_on("ACCELERATE_USE_FSDP"):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise ShardingError(f"FSDP of version {version} is not for experiments: add --fsdp_version 2")
    for key, value in (("fused", recipe.method.fused), ("compile", recipe.compile)):
        if value:
            raise ShardingError(f"{key} (=true) must be false: it was not tried with FSDP")
    # Every process makes the whole model on the CPU before it is sharded: what is loaded later has a place to go.
    plugin = FullyShardedDataParallelPlugin(cpu_ram_efficient_loading=False)
    if plugin.activation_checkpointing:
        raise ShardingError(
            "--fsdp_activation_checkpointing must be false: Accelerate's draws other dropout masks when it computes a "
            "layer again, so the gradient would be wrong"
        )
    return plugin


def shard(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Shards the model, which is on the CPU, in place; returns it, and the optimizer with the shards as parameters."""
    if accelerator.distributed_type != DistributedType.FSDP:
        raise ShardingError(
            "--use_fsdp is for several processes, each with an accelerator of its own: Accelerate shards nothing here"
        )
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ShardingError(
            f"FSDP is not for {name}: a search runs its encoder and its decoder apart, and the weights are at hand "
            "only while the whole model runs"
        )
    tied = _tied_names(model)
    try:
        model, prepared = accelerator.prepare(model, optimizer)
    except Exception as error:  # torch's and Accelerate's, of many kinds
        why = " ".join(str(error).split())
        remedy = "another --fsdp_auto_wrap_policy, or NO_WRAP, may do"
        raise ShardingError(f"FSDP cannot shard this {name} ({why}); {remedy}") from error
    untied = [names for names in tied if names not in _tied_names(model)]
    if untied:
        raise ShardingError(
            f"FSDP would untie {' and '.join(untied[0])}: put them into one unit, by --fsdp_auto_wrap_policy NO_WRAP"
        )
    optimizer = prepared.optimizer
    if isinstance(optimizer, torch.optim.SGD):
        for group in optimizer.param_groups:
            group["fused"] = False  # torch has no fused SGD of shards
    return model, optimizer


@dataclass(frozen=True)
class Whole:
    """Shows a sharded model or optimizer to a checkpoint: whole, and on the CPU."""

    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], object]

    def gathered(self) -> Whole:
        """Returns it with its present state, which a process may then read alone. All processes must call this."""
        state = self.state_dict()
        return replace(self, state_dict=lambda: state)


def whole_model(model: nn.Module) -> Whole:
    """All processes must read the state: they gather it, and the first one has it."""

    def state_dict() -> dict[str, Any]:
        whole: dict[int, Tensor] = {}  # tied weights are one tensor here too
        state = model.state_dict(keep_vars=True)
        for tensor in state.values():
            if id(tensor) not in whole:
                whole[id(tensor)] = _gathered(tensor.detach())
        return {name: whole[id(tensor)] for name, tensor in state.items()}

    def load_state_dict(state: dict[str, Any]) -> None:
        own = model.state_dict()
        model.load_state_dict({name: _shard_of(tensor, own.get(name)) for name, tensor in state.items()})

    return Whole(state_dict, load_state_dict)


def whole_optimizer(optimizer: torch.optim.Optimizer) -> Whole:
    """Shows an optimizer as `whole_model` does a model: its memory of past gradients."""

    def state_dict() -> dict[str, Any]:
        state: dict[str, Any] = optimizer.state_dict()
        moments = {  # in an order that all processes have: that of what was loaded is each one's own
            index: {key: tree_map_only(Tensor, _gathered, value) for key, value in sorted(memory.items())}
            for index, memory in sorted(state["state"].items())
        }
        return state | {"state": moments}

    def load_state_dict(state: dict[str, Any]) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        shards = {
            index: {key: _shard_of(value, parameters[index]) for key, value in memory.items()}
            for index, memory in state["state"].items()
        }
        optimizer.load_state_dict(state | {"state": shards})

    return Whole(state_dict, load_state_dict)


def whole_tensor(tensor: Tensor) -> Tensor:
    """Returns a tensor that may be sharded as a whole; all processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """Returns this process's shard; all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Returns the names of each weight that has several."""
    names: dict[int, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(weight), []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _gathered(tensor: Tensor) -> Tensor:
    whole = whole_tensor(tensor)
    return whole.cpu() if torch.distributed.get_rank() == 0 else whole.new_empty(0)


def _shard_of(value: Any, like: Any) -> Any:
    """Returns this process's shard of a tensor, if the other one, for which it is, is sharded and has its shape."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"

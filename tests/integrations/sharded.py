"""FSDP2 and DeepSpeed on CPUs, which accelerate has for accelerators only: an update's gradient beside that by hand.

`two_processes.py` trains with FSDP2. By itself this file is one process of two that train with DeepSpeed.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from gradient_agreement import (
    ALPHA,
    CASES,
    ENCODER_DECODERS,
    build,
    cast,
    gradients_of,
    loss_by_hand,
    train,
    worst_difference,
)
from torch import Tensor, nn

from rdrop.integrations.transformers import RDropSeq2SeqTrainer, RDropTrainer

WRAPPED, WHOLE = "TRANSFORMER_BASED_WRAP", "NO_WRAP"
TAG, LLAMA = "token classification", "causal LM, Llama"
OF_FSDP2: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama, layers wrapped, unequal micro-batches": (LLAMA, WRAPPED, {"micro_batches": 3}),
    "GPT-2, tied weights, layers wrapped": ("causal LM", WRAPPED, {}),
    "BERT, with unlabeled examples": (TAG, WHOLE, {"unlabeled_dataset": CASES[TAG].batches}),
    "ViT": ("image classification", WHOLE, {}),
    "BERT, alpha 0": (TAG, WHOLE, {"alpha": 0.0}),
}
"""By what it is: the case, how FSDP wraps it, the method."""

OF_DEEPSPEED = [
    *((name, stage, {}) for stage in (0, 1, 2) for name in (TAG, LLAMA, "sequence to sequence")),
    (TAG, 3, {}),
    (TAG, 1, {"alpha": 0.0}),
]
"""The case, the stage of ZeRO, the method."""


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    own = AcceleratorState.__init__

    def start(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = start
    try:
        yield
    finally:
        AcceleratorState.__init__ = own


def trained(name: str, model: nn.Module, batches: Any, folder: str, settings: Any, method: Any) -> Any:
    trainer_class = RDropSeq2SeqTrainer if CASES[name].head in ENCODER_DECODERS else RDropTrainer
    return train(trainer_class, model, batches, folder, settings, **({"alpha": ALPHA} | method))


def gradient_by_hand(name: str, batches: Any, method: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    model, alpha = build(CASES[name], dtype=dtype), method.get("alpha", ALPHA)
    loss, *_ = loss_by_hand(CASES[name], model, batches, alpha=alpha, passes=2 if alpha else 1)
    if others := method.get("unlabeled_dataset"):
        loss = loss + alpha / 2 * loss_by_hand(CASES[name], model, others, alpha=alpha, passes=2)[2]
    loss.backward()
    return gradients_of(model)


def differences_of_fsdp2(folder: str) -> dict[str, float]:
    """Of two accumulated batches in each of two processes, ragged and of unequal size; float64."""
    found = {}
    for what, (name, wrap, method) in OF_FSDP2.items():
        config = {"version": 2, "auto_wrap_policy": wrap}
        settings = {"fsdp": True, "fsdp_config": config, "gradient_accumulation_steps": 2}
        batches = CASES[name].batches
        with fsdp_on_cpus():
            run = trained(name, build(CASES[name]), batches, folder, settings, method)
        gradients = {weight: gradient.full_tensor() for weight, gradient in run.gradients[0].items()}
        found[what] = worst_difference(gradients, gradient_by_hand(name, batches, method, torch.float64))
    return found


def refusal_of_fsdp2(folder: str) -> str:
    settings = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": WRAPPED}}
    try:
        with fsdp_on_cpus():
            trained(LLAMA, build(CASES[LLAMA]), CASES[LLAMA].batches[:2], folder, settings, {"fused": True})
    except ValueError as error:
        return str(error)
    return "none"


def differences_of_deepspeed(folder: str) -> dict[str, float]:
    """Of one step of SGD with rate 1, in float32, whose weights change by the gradient."""
    import deepspeed  # noqa: F401

    # An operator that would be compiled here, for processes of one machine.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    found = {}
    for name, stage, method in OF_DEEPSPEED:
        config = {
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        }
        settings = {"deepspeed": config, "optim": "sgd", "learning_rate": 1.0, "gradient_accumulation_steps": 2}
        batches = [cast(batch, torch.float32) for batch in CASES[name].batches]
        model = build(CASES[name], dtype=torch.float32)
        before = {weight: part.detach().clone() for weight, part in model.named_parameters()}
        trained(name, model, batches, folder, settings, method)
        expected = gradient_by_hand(name, batches, method, torch.float32)
        after = dict(model.named_parameters())
        gradients = {weight: before[weight] - after[weight].detach() for weight in expected}
        found[f"{name}, ZeRO {stage}, {method or 'R-Drop'}"] = worst_difference(gradients, expected)
    return found


if __name__ == "__main__":
    result = differences_of_deepspeed(sys.argv[1])
    if os.environ["RANK"] == "0":
        torch.save(result, f"{sys.argv[1]}/result.pt")

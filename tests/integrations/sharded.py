"""FSDP2 and DeepSpeed on CPUs, which accelerate has for accelerators only: an update's gradient beside that by hand.

`two_processes.py` trains with FSDP2. By itself this file is one process of two that train with DeepSpeed.
"""

import os
import sys
from typing import Any

import torch
from gradient_agreement import (
    ALPHA,
    CASES,
    ENCODER_DECODERS,
    arguments,
    build,
    cast,
    gradients_of,
    llama_config,
    loss_by_hand,
    only_item,
    train,
    worst_difference,
)
from tests.several_processes import fsdp_on_cpus
from torch import Tensor, nn
from transformers import LlamaForCausalLM, Trainer

from rdrop.integrations.transformers import RDropSeq2SeqTrainer, RDropTrainer

WRAPPED, WHOLE = "TRANSFORMER_BASED_WRAP", "NO_WRAP"
TAG, LLAMA = "token classification", "causal LM, Llama"
OF_FSDP2: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama, layers wrapped, unequal micro-batches": (LLAMA, WRAPPED, {"micro_batches": 3}),
    "Llama, layers wrapped, from hidden states": (LLAMA, WRAPPED, {"fused": True}),
    "Llama, from hidden states, unequal micro-batches": (LLAMA, WHOLE, {"fused": True, "micro_batches": 3}),
    "GPT-2, tied weights, layers wrapped, from hidden states": ("causal LM", WRAPPED, {"fused": True}),
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

OF_SGD = {"optim": "sgd", "learning_rate": 1.0}


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


def of_fsdp2(wrap: str) -> dict[str, Any]:
    return {
        "fsdp": True,
        "fsdp_config": {"version": 2, "auto_wrap_policy": wrap, "state_dict_type": "SHARDED_STATE_DICT"},
    }


def differences_of_fsdp2(folder: str) -> dict[str, float]:
    """Of two accumulated batches in each of two processes, ragged and of unequal size; float64."""
    found = {}
    for what, (name, wrap, method) in OF_FSDP2.items():
        settings = of_fsdp2(wrap) | {"gradient_accumulation_steps": 2}
        batches = CASES[name].batches
        with fsdp_on_cpus():
            run = trained(name, build(CASES[name]), batches, folder, settings, method)
        gradients = {weight: gradient.full_tensor() for weight, gradient in run.gradients[0].items()}
        found[what] = worst_difference(gradients, gradient_by_hand(name, batches, method, torch.float64))
    return found


def evaluated_and_resumed(folder: str, settings: Any) -> tuple[float, float, bool]:
    """The loss in evaluation, ours and the stock Trainer's of the same weights; whether a resumed training has the bits
    of the whole one.
    """
    batches = CASES[LLAMA].batches

    def trainer() -> Any:
        torch.manual_seed(0)
        model = LlamaForCausalLM(llama_config(attention_dropout=0.3, attn_implementation="eager"))
        saving = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, **OF_SGD}
        args = arguments(folder, **(saving | settings))
        data = {"train_dataset": batches, "eval_dataset": batches, "data_collator": only_item}
        return RDropTrainer(model=model, args=args, alpha=ALPHA, **data)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-1")
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    is_same = all(torch.equal(whole_of(one), whole_of(other)) for one, other in pairs)
    ours = whole.evaluate()["eval_loss"]
    whole.__class__ = Trainer
    return ours, whole.evaluate()["eval_loss"], is_same


def evaluated_and_resumed_by_fsdp2(folder: str) -> tuple[float, float, bool]:
    with fsdp_on_cpus():
        return evaluated_and_resumed(f"{folder}/fsdp", of_fsdp2(WRAPPED))


def whole_of(weight: Any) -> Tensor:
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


def differences_of_deepspeed(folder: str) -> dict[str, float]:
    """Of one step of SGD with rate 1, in float32, whose weights change by the gradient."""
    import deepspeed  # noqa: F401

    # An operator that would be compiled here, for processes of one machine.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    found = {}
    for name, stage, method in OF_DEEPSPEED:
        settings = {
            "deepspeed": deepspeed_config(stage),
            "optim": "sgd",
            "learning_rate": 1.0,
            "gradient_accumulation_steps": 2,
        }
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
    settings = {"deepspeed": deepspeed_config(1)}
    result = differences_of_deepspeed(sys.argv[1]), evaluated_and_resumed(f"{sys.argv[1]}/zero", settings)
    if os.environ["RANK"] == "0":
        torch.save(result, f"{sys.argv[1]}/result.pt")

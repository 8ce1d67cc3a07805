"""One process of two that train together; `test_transformers_processes.py` starts both."""

import os
import re
import runpy
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from gradient_agreement import ALPHA, CASES, Gradients, PassScale, build, llama_config, train
from other_trainers import weights_of_all
from reward_agreement import update_of_rewards
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sft_agreement import drawn, update_of_experts, update_of_lora, with_stand_in
from sharded import differences_of_fsdp2, evaluated_and_resumed_by_fsdp2
from torch import Tensor, nn
from transformers import DataCollatorWithFlattening, LlamaForCausalLM

from rdrop.integrations.sentence_transformers import RDropBinaryCrossEntropyLoss
from rdrop.integrations.transformers import RDropTrainer
from rdrop.integrations.transformers.nonfinite import NonfiniteUpdateWarning

EXAMPLES = Path(__file__).parents[2] / "examples"
LOGGED = ("loss", "task_loss", "divergence", "unlabeled_divergence")


def one_update(case_name: str, method: dict[str, Any], accumulation: int, folder: str) -> dict[str, Any]:
    """Gradients and logs of one update over all four ragged micro-batches of a case."""
    case = CASES[case_name]
    # DDP looks for parameters outside the graph of the model's outputs where the output layer is left out.
    settings = {"gradient_accumulation_steps": accumulation, "ddp_find_unused_parameters": "fused" in method}
    model = build(case)
    if "fused" not in method:
        run_forwards_jointly(model)
    trained = train(RDropTrainer, model, case.batches, folder, settings, **method)
    return results_of(trained)


def run_forwards_jointly(model: nn.Module) -> None:
    """Lets every forward wait for one of the other process, as a model with sharded parameters does."""
    group: list[Any] = []

    def wait(*_: Any) -> None:
        if dist.is_initialized():
            group[:] = group or [dist.new_group(timeout=timedelta(seconds=20))]
            dist.all_reduce(torch.zeros(1), group=group[0])

    model.register_forward_pre_hook(wait)


TRAININGS = (
    ("token classification", {"alpha": ALPHA}),
    ("token classification", {"alpha": 0.0}),
    ("token classification", {"alpha": ALPHA, "micro_batches": 3}),  # of batches of 1, 2 and 3 rows
    ("causal LM, Llama", {"alpha": 0.0}),
    ("causal LM, Llama", {"alpha": ALPHA, "fused": True, "micro_batches": 2}),
)


def update_with_unlabeled(accumulation: int, folder: str) -> dict[str, Any]:
    """Of four labeled micro-batches, with four of one unlabeled example each beside them."""
    case = CASES["token classification"]
    examples = [{name: part[:1, :4] for name, part in batch.items()} for batch in CASES["token classification"].batches]
    settings = {"gradient_accumulation_steps": accumulation, "ddp_find_unused_parameters": False}
    method = {"alpha": ALPHA, "micro_batches": 2, "unlabeled_dataset": examples}
    trained = train(RDropTrainer, build(case), case.batches, folder, settings, **method)
    return results_of(trained)


def update_of_packed_rows(accumulation: int, folder: str) -> dict[str, Any]:
    """Of four packed rows, two of which hold one sequence and two of which hold two."""
    pack = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    texts = [{"input_ids": [2 + (3 * place + length) % 9 for place in range(length)]} for length in (5, 3, 2, 6, 4, 7)]
    rows = [dict(pack(some, return_tensors="pt")) for some in (texts[:1], texts[1:3], texts[3:4], texts[4:])]
    model = with_stand_in(drawn(LlamaForCausalLM(llama_config())))
    settings = {"gradient_accumulation_steps": accumulation, "ddp_find_unused_parameters": False}
    return results_of(train(RDropTrainer, model, rows, folder, settings, alpha=ALPHA))


def results_of(trained: Any) -> dict[str, Any]:
    logs = {name: row[name] for row in trained.state.log_history for name in LOGGED if name in row}
    gradients: dict[str, Tensor] = {n.removeprefix("module."): g for n, g in trained.gradients[0].items()}
    return {"logs": logs, "gradients": gradients}


def update_of_cross_encoder(accumulation: int, folder: str) -> dict[str, Any]:
    """Of four pairs, one in each micro-batch, whose mean the library's trainer makes of them."""
    example = runpy.run_path(str(EXAMPLES / "cross_encoder.py"), run_name="example")
    place = Path(folder) / "cross-encoder"
    place.mkdir(exist_ok=True)
    if os.environ.get("RANK", "0") == "0":  # the other saves nothing
        example["new_model"](place)
    if dist.is_initialized():
        dist.barrier()
    model = drawn(CrossEncoder(str(place)))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    stand_in = model[0].stand_in = PassScale(2)
    first = next(module for module in model.modules() if isinstance(module, nn.Embedding))
    first.register_forward_hook(lambda module, inputs, output: stand_in(output))
    gradients = Gradients()
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, "max_steps": 1}
    quiet = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1}
    trainer = CrossEncoderTrainer(
        model=model,
        args=CrossEncoderTrainingArguments(
            folder, max_grad_norm=0, save_strategy="no", ddp_find_unused_parameters=False, **settings, **quiet
        ),
        train_dataset=Dataset.from_list(example["PAIRS"][:4]),
        loss=RDropBinaryCrossEntropyLoss(model, alpha=ALPHA),
        callbacks=[gradients],
    )
    trainer.train()
    return results_of(SimpleNamespace(state=trainer.state, gradients=gradients.updates))


OTHERS = {
    "sentence-transformers": update_of_cross_encoder,
    "with unlabeled examples": update_with_unlabeled,
    "packed rows": update_of_packed_rows,
    "TRL's, LoRA with checkpointing": update_of_lora,
    "TRL's, with a router's loss": update_of_experts,
    "TRL's reward modeling": update_of_rewards,
}


def all_updates(accumulation: int, folder: str) -> list[dict[str, Any]]:
    trained = [one_update(name, method, accumulation, folder) for name, method in TRAININGS]
    return [*trained, *(update(accumulation, folder) for update in OTHERS.values())]


def left_out_by_both(folder: str) -> bool:
    """Whether both processes leave out an update whose loss is infinite in one of them, its gradient finite in both."""
    case = CASES["token classification"]
    model = build(case)
    before = [weight.detach().clone() for weight in model.parameters()]
    infinite = torch.inf if os.environ["RANK"] == "1" else 0.0

    class Infinite(RDropTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) + infinite

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        settings = {"ddp_find_unused_parameters": False}
        train(Infinite, model, case.batches, folder, settings, on_nonfinite="skip", alpha=1.0)
    said = [str(warning.message) for warning in caught if warning.category is NonfiniteUpdateWarning]
    assert re.fullmatch(r"update 1 has a loss of inf .* in process 1 of 2: this update is left out", *said), said
    return all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


if __name__ == "__main__":
    result = all_updates(accumulation=2, folder=sys.argv[1])
    assert left_out_by_both(sys.argv[1])
    others = weights_of_all()
    sharded = [of(sys.argv[1]) for of in (differences_of_fsdp2, evaluated_and_resumed_by_fsdp2)]
    if os.environ["RANK"] == "0":
        torch.save(others, f"{sys.argv[1]}/others.pt")
        torch.save(result, f"{sys.argv[1]}/result.pt")
        torch.save(sharded, f"{sys.argv[1]}/sharded.pt")

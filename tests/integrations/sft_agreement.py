"""Supervised fine-tuning of a tiny model with TRL, and its R-Drop loss written out by hand, sequence by sequence."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from gradient_agreement import HEADS_OF_EXPERTS, Gradients, PassScale, PassScaleOfRows, gradients_of, softmax_terms
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import SFTConfig

from rdrop.integrations.trl import RDropSFTTrainer

os.environ["CI"] = "1"  # TRL then sends no word of its use

ALPHA = 50.0
ASKED, ANSWERED = [f"q{i}" for i in range(6)], [f"a{i}" for i in range(6)]
WORDS = ["<pad>", "<end>", *ASKED, *ANSWERED]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content + ' <end> ' }}"
    "{% endgeneration %}{% else %}{{ message.content + ' ' }}{% endif %}{% endfor %}"
)
TURNS = (("q0 q1", "a1 a2 a3"), ("q2 q3 q4 q5", "a0"), ("q1", "a5 a4"), ("q5 q2 q0", "a2 a2 a1 a3"), ("q3", "a4"))


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
    made.chat_template = TEMPLATE
    return made


# ------------------------------------------------------------------------------------------------- what is learned


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def whole(asked: str, answered: str) -> list[int]:
    return ids_of(f"{asked} {answered} <end>")


def answers_alone(ids: list[int]) -> list[int]:
    """Returns the labels where only answers, and the end after them, are learned."""
    return [index if WORDS[index].startswith(("a", "<end>")) else -100 for index in ids]


@dataclass(frozen=True)
class Sft:
    """A data set for TRL, its settings, and by hand the sequences and labels that they mean."""

    rows: list[dict[str, Any]]
    labels: Callable[[list[int]], list[int]] = list
    settings: dict[str, Any] = field(default_factory=dict)
    cut: Callable[[list[list[int]]], list[list[int]]] = list

    def sequences(self) -> list[tuple[list[int], list[int]]]:
        return [(ids, self.labels(ids)) for ids in self.cut([whole(*turn) for turn in TURNS])]


def chunks_of_eight(sequences: list[list[int]]) -> list[list[int]]:
    tokens = [token for sequence in sequences for token in sequence]
    return [tokens[start : start + 8] for start in range(0, len(tokens), 8)]


TEXTS = [{"text": f"{asked} {answered}"} for asked, answered in TURNS]
PAIRS = [{"prompt": asked + " ", "completion": answered + " "} for asked, answered in TURNS]
TALKS = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
    for asked, answered in TURNS
]
BEST_FIT = {"packing": True, "packing_strategy": "bfd", "max_length": 12, "per_device_train_batch_size": 1}
SFT = {
    "plain text": Sft(TEXTS),
    "completions": Sft(PAIRS, answers_alone),
    "assistant turns": Sft(TALKS, answers_alone, {"assistant_only_loss": True}),
    "packed, wrapped": Sft(
        TEXTS, settings={"packing": True, "packing_strategy": "wrapped", "max_length": 8}, cut=chunks_of_eight
    ),
    "packed, best fit": Sft(TEXTS, settings=BEST_FIT),
    "packed, best fit, completions": Sft(PAIRS, answers_alone, BEST_FIT),
    "padding-free": Sft(PAIRS, answers_alone, {"padding_free": True, "max_length": None}),
}


# ------------------------------------------------------------------------------------------------------- the model


def with_stand_in(model: Any, passes: int = 2, stand_in: PassScale | None = None) -> Any:
    stand_in = PassScaleOfRows(passes) if stand_in is None else stand_in
    model.stand_in = stand_in
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, inputs, output: stand_in(output))
    return model


OF_EVERY_MODEL = {
    **HEADS_OF_EXPERTS,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def llama(**settings: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(OF_EVERY_MODEL | settings)))


COEFFICIENT = 0.5
"""Of the router's loss."""


def experts(**settings: Any) -> Any:
    sizes = OF_EVERY_MODEL | {"num_local_experts": 2, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.01}
    sizes["experts_implementation"] = "eager"  # the other is not for float64
    return drawn(MixtralForCausalLM(MixtralConfig(**(sizes | settings))))


def drawn(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Draws weights with which the model reacts to its input."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape).to(dtype) * 0.3
    return model.to(dtype)


def lora(**settings: Any) -> LoraConfig:
    return LoraConfig(**({"target_modules": "all-linear", "r": 2, "task_type": "CAUSAL_LM"} | settings))


def adapted(passes: int = 2) -> Any:
    """With both factors of LoRA at random: the second is 0 as it comes, and the first has no gradient then."""
    model = get_peft_model(with_stand_in(llama(), passes), lora())
    trained = [parameter.requires_grad for parameter in model.parameters()]
    drawn(model)
    for parameter, is_trained in zip(model.parameters(), trained, strict=True):
        parameter.requires_grad_(is_trained)
    return model


# ------------------------------------------------------------------------------------------- TRL, and the loss by hand


def config(folder: str, **settings: Any) -> SFTConfig:
    quiet = {
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 0,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.01,
        "max_length": 64,
        "activation_checkpointing": False,
    }
    return SFTConfig(folder, **(quiet | settings))


def tune(trainer_class: type, model: Any, case: Sft, folder: str, settings: Any = None, **method: Any) -> Any:
    """The trainer after training; its gradients are `trainer.gradients`, one entry per update."""
    gradients = Gradients()
    callbacks: list[TrainerCallback] = [gradients]
    trainer = trainer_class(
        model=model,
        args=config(folder, **(case.settings | (settings or {}))),
        train_dataset=Dataset.from_list(case.rows),
        processing_class=tokenizer(),
        callbacks=callbacks,
        **method,
    )
    trainer.train()
    trainer.gradients = gradients.updates
    return trainer


def by_hand(model: Any, case: Sft, passes: int = 2, alpha: float = ALPHA) -> dict[str, Tensor]:
    """Returns the gradient of one update over all sequences, each run alone, and never packed or padded."""
    model.train()
    task_loss, divergence, count = torch.zeros(()), torch.zeros(()), 0
    for ids, labels in case.sequences():
        logits = model(input_ids=torch.tensor([ids] * passes)).logits[:, :-1]
        predicted = torch.tensor(labels[1:])
        counted = predicted != -100
        task, apart = softmax_terms(logits[:, counted], predicted[counted], 0.0)
        task_loss, divergence = task_loss + task, divergence + apart
        count += int(counted.sum())
    loss = (task_loss + alpha / 2 * divergence) / count
    assert alpha / 2 * divergence > 0.05 * loss * count
    loss.backward()
    return gradients_of(model)


def rdrop(model: Any, case: Sft, folder: str, settings: Any = None, **method: Any) -> Any:
    return tune(RDropSFTTrainer, model, case, folder, settings, **({"alpha": ALPHA} | method))


def update_of_lora(accumulation: int, folder: str) -> dict[str, Any]:
    """Returns gradients and logs of one update of LoRA, with checkpointing, over four ragged examples."""
    case = replace(SFT["completions"], rows=PAIRS[:4])
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    settings |= {"activation_checkpointing": True, "ddp_find_unused_parameters": False}
    return results_of(rdrop(adapted(), case, folder, settings, fused=True))


def update_of_experts(accumulation: int, folder: str) -> dict[str, Any]:
    """Returns gradients and logs of one update over four ragged examples, with a router's loss."""
    case = replace(SFT["completions"], rows=PAIRS[:4])
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    settings |= {"router_aux_loss_coef": COEFFICIENT, "ddp_find_unused_parameters": True}
    trained = rdrop(with_stand_in(experts()), case, folder, settings, fused=True)
    return results_of(trained)


def results_of(trained: Any) -> dict[str, Any]:
    names = ("loss", "task_loss", "divergence", "auxiliary_loss", "num_tokens")
    logs = {name: row[name] for row in trained.state.log_history for name in names if name in row}
    return {"logs": logs, "gradients": {n.removeprefix("module."): g for n, g in trained.gradients[0].items()}}

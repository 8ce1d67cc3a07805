"""What R-Drop costs in TRL's supervised fine-tuning: `python -m benchmarks.sft RECORDS.jsonl`.

A step is forward, loss, backward and AdamW of a Llama with random weights, as `SFTTrainer` takes it on B examples and
on 2B, and `RDropSFTTrainer` on B, its own work and the metrics included. Time is compared with SFT on 2B, the least
that two passes can cost; memory (of gradients and activations, not of weights) with SFT on B. All in one run, in turn.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("CI", "1")  # TRL then sends no word of its use

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from rdrop.bench.measure import Call, Conditions, measure, record
from rdrop.bench.records import append
from rdrop.integrations.transformers.trainer import CHECKED_MICRO_BATCHES
from rdrop.integrations.trl import RDropSFTTrainer
from rdrop.terms import IGNORE_INDEX

SIZE = {"pairs": 8, "length": 128, "layers": 4, "features": 256, "classes": 32_768}

Batch = dict[str, Tensor]


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": SIZE["classes"], "hidden_size": SIZE["features"], "intermediate_size": 3 * SIZE["features"]}
    heads = {"num_attention_heads": 4, "num_hidden_layers": SIZE["layers"], "pad_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(attention_dropout=0.1, bos_token_id=None, **sizes, **heads)).train()


def batch(examples: int) -> Batch:
    """Completions whose prompt is a quarter of them, from half of the longest to all of it."""
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(SIZE["length"] // 2, SIZE["length"] + 1, (examples, 1), generator=draw)
    places = torch.arange(SIZE["length"])
    mask = places < lengths
    tokens = torch.randint(2, SIZE["classes"], mask.shape, generator=draw).masked_fill(~mask, 0)
    labels = tokens.masked_fill(~mask | (places < lengths // 4), IGNORE_INDEX)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def trainer_of(trainer_class: type, llama: LlamaForCausalLM, **method: Any) -> Any:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    with tempfile.TemporaryDirectory() as folder:
        quiet = {"use_cpu": True, "bf16": False, "report_to": [], "activation_checkpointing": False}
        return trainer_class(
            model=llama,
            args=SFTConfig(folder, **quiet),
            train_dataset=Dataset.from_list([{"input_ids": [2, 3]}]),
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"),
            **method,
        )


def step_of(trainer: Any, optimizer: torch.optim.Optimizer, examples: Batch) -> Call:
    """Returns a step as after the first ones, in which the trainer looks at the model."""
    trainer.current_gradient_accumulation_steps = 1

    def gradient(of: Batch) -> None:
        batches, counts = trainer.get_batch_samples(iter([of]), 1, torch.device("cpu"))
        trainer.training_step(trainer.model, dict(batches[0]), counts)

    def step() -> None:
        gradient(examples)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    few = {name: part[:2] for name, part in examples.items()}
    for _ in range(CHECKED_MICRO_BATCHES):
        gradient(few)
    optimizer.zero_grad(set_to_none=True)
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    llama = model()
    optimizer = torch.optim.AdamW(llama.parameters(), lr=1e-5)
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "sft": (partial(trainer_of, SFTTrainer, llama), 1),
        "sft_twice_the_batch": (partial(trainer_of, SFTTrainer, llama), 2),
        "rdrop": (partial(trainer_of, RDropSFTTrainer, llama, alpha=1.0), 1),
        "rdrop_micro_batches": (partial(trainer_of, RDropSFTTrainer, llama, alpha=1.0, micro_batches=2), 1),
    }
    steps = {name: step_of(make(), optimizer, batch(times * SIZE["pairs"])) for name, (make, times) in ways.items()}
    command = f"python -m benchmarks.sft {options.records} --rounds {options.rounds}"
    conditions = Conditions(rounds=options.rounds, clock="processor", command=command)
    with conditions.in_force():
        measured = measure({name: lambda step=step: step for name, step in steps.items()}, conditions)  # type: ignore[misc]
    facts = {"model": "Llama", "parameters": sum(part.numel() for part in llama.parameters()), **SIZE}
    what = "one step of supervised fine-tuning with AdamW"
    found = [record("sft", name, what, measured[name], conditions, **facts) for name in steps]
    for r in found:
        r["versions"] |= {"trl": trl.__version__, "transformers": transformers.__version__}
    append(found, options.records)
    for r in found:
        print(f"{r['form']}: {r['median']:.2f} s, {r['peak_extra_bytes'] / 1e6:.0f} MB")


if __name__ == "__main__":
    main()

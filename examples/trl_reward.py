"""R-Drop in TRL's reward modeling: the divergence is between the odds that two passes give an answer over the other.

    python examples/trl_reward.py

Needs pip install '.[trl]' in the clone, and takes its words from trl_sft.py. A small model from scratch learns that the
larger of two numbers is preferred. The metrics are TRL's, of both passes: its num_tokens counts each token twice.
"""

import random
import tempfile
from itertools import combinations
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig, RewardTrainer
from trl_sft import NUMBERS, WORDS, words_as_tokens

from rdrop import bernoulli_kl
from rdrop.integrations.requirements import require_randomness

PAIRS = [{"chosen": larger, "rejected": smaller} for smaller, larger in combinations(NUMBERS, 2)]
random.Random(0).shuffle(PAIRS)


class RDropRewardTrainer(RewardTrainer):
    def __init__(self, *args: Any, alpha: float, **options: Any) -> None:
        self.alpha = alpha
        super().__init__(*args, **options)
        if alpha > 0 and self.args.disable_dropout:
            raise ValueError("R-Drop needs the dropout that TRL switches off: RewardConfig(disable_dropout=False)")

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **options: Any) -> Any:
        if not model.training or self.alpha == 0:
            return super().compute_loss(model, inputs, return_outputs, **options)
        # A batch has all chosen answers, then all rejected ones: two passes are chosen twice, then rejected twice.
        halves = {name: part.chunk(1 if name == "margin" else 2) for name, part in inputs.items()}
        twice = {name: torch.cat([half for half in parts for _ in range(2)]) for name, parts in halves.items()}
        task_loss, outputs = super().compute_loss(model, twice, return_outputs=True, **options)
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        odds = chosen - rejected - twice.get("margin", 0)  # (2N,): the logit that the chosen one is better
        if self.state.global_step == 0:
            require_randomness(self.accelerator.unwrap_model(model), [odds], passes=2)
        loss = task_loss + self.alpha / 2 * bernoulli_kl(odds.view(2, -1, 1)).mean()
        return (loss, outputs) if return_outputs else loss


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForSequenceClassification:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    of_words = {"vocab_size": len(WORDS), "pad_token_id": tokenizer.pad_token_id, "num_labels": 1}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(attention_dropout=0.1, **of_words, **sizes))


def train(alpha: float, updates: int = 60) -> dict[str, float]:
    tokenizer = words_as_tokens()
    learning = {"max_steps": updates, "per_device_train_batch_size": 32, "learning_rate": 3e-3, "save_strategy": "no"}
    on_cpu = {"use_cpu": True, "bf16": False, "dataloader_pin_memory": False, "activation_checkpointing": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = RDropRewardTrainer(
            model=small_llama(tokenizer),
            args=RewardConfig(folder, disable_dropout=False, disable_tqdm=True, **learning, **on_cpu),
            train_dataset=Dataset.from_list(PAIRS[:58]),
            eval_dataset=Dataset.from_list(PAIRS[58:]),
            processing_class=tokenizer,
            alpha=alpha,
        )
        trainer.train()
        return trainer.evaluate()


if __name__ == "__main__":
    for alpha in (0.0, 1.0):
        print(f"alpha {alpha:g}: accuracy {train(alpha)['eval_accuracy']:.3f} on pairs not seen")

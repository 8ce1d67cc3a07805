"""Reward modeling of a tiny model with TRL, as the example does it, and its R-Drop loss written out by hand."""

import runpy
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from gradient_agreement import Gradients, PassScale
from sft_agreement import ALPHA, OF_EVERY_MODEL, TURNS, config, drawn, ids_of, results_of, tokenizer, with_stand_in
from torch import Tensor
from transformers import LlamaConfig, LlamaForSequenceClassification
from trl import RewardConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.append(str(EXAMPLES))  # one of them imports the other
REWARD = runpy.run_path(str(EXAMPLES / "trl_reward.py"))
RDropRewardTrainer = REWARD["RDropRewardTrainer"]
CHOICES = [{"chosen": asked, "rejected": answered, "margin": 0.25} for asked, answered in TURNS[:4]]


class ScaleOfPairs(PassScale):
    """The stand-in where rows are the chosen answers of both passes, then the rejected ones."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        first, second, third, fourth = x.chunk(4)
        first, third, second, fourth = super().forward(torch.cat([first, third, second, fourth])).chunk(4)
        return torch.cat([first, second, third, fourth])


def reward_model(stand_in: PassScale) -> Any:
    model = LlamaForSequenceClassification(LlamaConfig(**(OF_EVERY_MODEL | {"num_labels": 1})))
    return with_stand_in(drawn(model), stand_in=stand_in)


def margins_loss_by_hand(model: Any, pairs: list[dict[str, Any]]) -> Tensor:
    losses = []
    for pair in pairs:
        chosen, rejected = (
            model.train()(input_ids=torch.tensor([ids_of(f"{pair[name]} <end>")] * 2)).logits.squeeze(-1)
            for name in ("chosen", "rejected")
        )
        odds = chosen - rejected - pair["margin"]
        p, q = odds.sigmoid()
        there = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        back = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
        losses.append(-F.logsigmoid(odds).mean() + ALPHA / 2 * (there + back) / 2)
    return torch.stack(losses).mean()


def reward_trainer(trainer_class: Any, model: Any, folder: str, settings: Any, **options: Any) -> Any:
    names = ("use_cpu", "report_to", "save_strategy", "max_grad_norm", "max_steps", "activation_checkpointing")
    quiet = {name: getattr(config(folder), name) for name in names}
    data = Dataset.from_list(CHOICES)
    return trainer_class(
        model=model,
        args=RewardConfig(
            folder, **(quiet | {"bf16": False, "disable_tqdm": True, "disable_dropout": False} | settings)
        ),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        **options,
    )


def rewarded(folder: str, settings: Any) -> Any:
    """The trainer after one update of four pairs; its gradients are `trainer.gradients`, one entry per update."""
    gradients = Gradients()
    model = reward_model(ScaleOfPairs(2))
    trainer = reward_trainer(RDropRewardTrainer, model, folder, settings, callbacks=[gradients], alpha=ALPHA)
    trainer.train()
    trainer.gradients = gradients.updates
    return trainer


def update_of_rewards(accumulation: int, folder: str) -> dict[str, Any]:
    """Returns gradients and logs of one update over four pairs, one in each micro-batch."""
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation}
    return results_of(rewarded(folder, settings | {"ddp_find_unused_parameters": False, "logging_steps": 1}))

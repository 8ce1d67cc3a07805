"""The optimizer of a recipe, and the learning rate of each update as a pure function of its step."""

import math

import torch
from torch import nn

from rdrop.experiments.recipe import Recipe


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Returns the learning rate of the update after `step` updates: linearly to the peak, then the schedule."""
    if step < recipe.warmup_updates:
        return recipe.learning_rate * (step + 1) / recipe.warmup_updates
    if recipe.schedule == "inverse-sqrt":
        return recipe.learning_rate * math.sqrt(recipe.warmup_updates / (step + 1))
    progress = (step - recipe.warmup_updates) / max(recipe.total_updates - recipe.warmup_updates, 1)
    factors = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return recipe.learning_rate * factors[recipe.schedule]


def build_optimizer(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """Builds the recipe's optimizer; weight decay acts on matrices and embeddings, not on biases and norms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Fused: on a CPU, a small model's optimizer step would else cost a tenth of the whole update.
    if recipe.optimizer == "adamw":
        betas = (recipe.beta1, recipe.beta2)
        return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=betas, eps=recipe.epsilon, fused=True)
    nesterov = recipe.optimizer == "nag"
    return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=recipe.beta1, nesterov=nesterov, fused=True)

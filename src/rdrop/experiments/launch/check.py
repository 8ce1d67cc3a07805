"""`rdrop check`: whether R-Drop can act on the model of a recipe, with passes as training makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rdrop.check import CheckReport, Finding, check_rdrop
from rdrop.experiments.randomness import seed_all
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.tasks.task import Augments, Batch, Task, load_task
from rdrop.experiments.training.objective import joined_views
from rdrop.terms import symmetric_kl

EXAMPLES = 8
OF_EQUAL_INPUTS = ("identical-passes", "shared-masks")
"""Errors that say only that dropout does not tell two passes of one input apart."""


def check_recipe(recipe: Recipe) -> CheckReport:
    """Checks a new model of the recipe with its first examples; with `views=each` the passes have views of their own.

    Raises `RecipeError` for `views=each` where the task does not change its inputs at random.
    """
    task = load_task(recipe)
    seed_all(recipe.seed, "model")
    own = task.build_model().train()
    model = own if hasattr(own, "config") else AsTrained(task, own)
    indices = list(range(min(EXAMPLES, task.train_size())))
    report = replace(check_rdrop(model, task.train_batch(indices, epoch=0)), model=type(own).__name__)
    if recipe.method.is_plain or recipe.method.views == "same":
        return report
    if not (isinstance(task, Augments) and task.augments):
        rule = f'must be "same": {recipe.task} does not change its inputs at random'
        raise RecipeError("views", rule, value="each")
    batch = joined_views([task.train_batch(indices, 0, view) for view in range(2)])
    findings = tuple(map(_with_views, report.findings))
    return replace(report, findings=findings, divergence=_divergence(task, own, batch))


def _with_views(finding: Finding) -> Finding:
    """Returns what is left of a finding on two passes of one input where each pass has an input of its own."""
    if finding.code == "no-dropout":
        message = "The model has no active dropout: the two passes differ only by their views (views=each)."
        return replace(finding, severity="note", message=message, remedy="None needed, if that is meant.", modules=())
    if finding.code in OF_EQUAL_INPUTS:
        message = f"The two passes differ only by their views (views=each). With one view for both: {finding.message}"
        return replace(finding, severity="warning", message=message)
    return finding


@torch.no_grad()
def _divergence(task: Task, model: nn.Module, two_views: Batch) -> float:
    first, second = task.logits(model, two_views).float().chunk(2)
    return symmetric_kl(torch.stack([first, second])).mean().item()


class AsTrained(nn.Module):
    """A task's model that is called as the task calls it."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, **batch: Any) -> Tensor:
        return self.task.logits(self.model, batch)

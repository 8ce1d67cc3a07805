"""`rdrop check`: whether R-Drop can act on the model of a recipe, with passes as training makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rdrop.check import CheckReport, Finding, check_rdrop
from rdrop.experiments.randomness import seed_all
from rdrop.experiments.recipe import Method, Recipe
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.tasks.task import Augments, Batch, Task, load_task
from rdrop.experiments.training.objective import joined_views, logits_of_passes
from rdrop.terms import kl_from_first

EXAMPLES = 8
OF_EQUAL_INPUTS = ("identical-passes", "shared-masks")
"""Errors that say only that dropout does not tell two passes of one input apart."""


def check_recipe(recipe: Recipe) -> CheckReport:
    """Checks a new model of the recipe with its first examples, the passes made as in training: views, what is cut.

    Raises `RecipeError` for `views=each` where the task does not change its inputs at random, and for a cutoff where
    there are no tokens.
    """
    task = load_task(recipe)
    seed_all(recipe.seed, "model")
    own = task.build_model().train()
    model = own if hasattr(own, "config") else AsTrained(task, own)
    indices = list(range(min(EXAMPLES, task.train_size())))
    report = replace(check_rdrop(model, task.train_batch(indices, epoch=0)), model=type(own).__name__)
    method = recipe.method
    if method.is_plain or (method.views == "same" and method.cutoff is None and method.dropout is None):
        return report
    batch = task.train_batch(indices, 0)
    if method.views == "each":
        if not (isinstance(task, Augments) and task.augments):
            rule = f'must be "same": {recipe.task} does not change its inputs at random'
            raise RecipeError("views", rule, value="each")
        batch = joined_views([task.train_batch(indices, 0, view) for view in range(method.passes)])
    if method.cutoff is not None and not task.special_ids():
        raise RecipeError("cutoff", f"must be null: {recipe.task} has no tokens to cut", value=method.cutoff)
    name = "KL from the first pass" if method.divergence == "from-first" else task.divergence.__name__.replace("_", " ")
    measured = _divergence(task, own, method, batch)
    report = replace(report, divergence=measured, divergence_name=name.replace("kl", "KL"))
    if method.dropout is not None and method.views == "same":
        return report
    by = "their views (views=each)" if method.cutoff is None else f"what is cut (cutoff={method.cutoff})"
    return replace(report, findings=tuple(_with_own_inputs(finding, by) for finding in report.findings))


def _with_own_inputs(finding: Finding, by: str) -> Finding:
    """Returns what is left of a finding on two passes of one input where the inputs differ `by` something."""
    if finding.code == "no-dropout":
        message = f"The model has no active dropout: the two passes differ only by {by}."
        return replace(finding, severity="note", message=message, remedy="None needed, if that is meant.", modules=())
    if finding.code in OF_EQUAL_INPUTS:
        message = f"The two passes differ only by {by}. With one input for both: {finding.message}"
        return replace(finding, severity="warning", message=message)
    return finding


@torch.no_grad()
def _divergence(task: Task, model: nn.Module, method: Method, batch: Batch) -> float:
    """Computes the mean of the divergence that training uses; `batch` has the views of all, where each has its own."""
    try:
        logits = logits_of_passes(method, task, model, lambda inputs: task.logits(model, inputs), batch)
    except ValueError as error:
        raise RecipeError("cutoff", str(error), value=method.cutoff) from error
    divergence = kl_from_first if method.divergence == "from-first" else task.divergence
    return divergence(logits.float().view(method.passes, -1, *logits.shape[1:])).mean().item()


class AsTrained(nn.Module):
    """A task's model that is called as the task calls it."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        super().__init__()
        self.task, self.model = task, model

    def forward(self, **batch: Any) -> Tensor:
        return self.task.logits(self.model, batch)

"""The examples of each update, in the parts that this process computes, and those without labels."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from rdrop.experiments.recipe import Recipe
from rdrop.experiments.tasks.task import Batch, LearnsFromUnlabeled, Task
from rdrop.experiments.training.failures import TrainingError
from rdrop.experiments.training.objective import joined_views
from rdrop.experiments.training.order import DataOrder, Indices, UnlabeledOrder


class Microbatch(NamedTuple):
    """The examples of one forward and backward pass."""

    batch: Batch
    is_labeled: bool


class Feed:
    """The microbatches of each update, a pure function of the step.

    `recipe` is the one given, with its lengths in updates: the order of the data says how many an epoch has.
    """

    def __init__(self, recipe: Recipe, task: Task, process: int, processes: int) -> None:
        self._task, self._process, self._processes = task, process, processes
        self._parts = recipe.accumulation * processes
        self.order = DataOrder(recipe, task.train_size(), task.train_lengths(), parts=self._parts)
        self.recipe = recipe.in_updates(self.order.exact_updates_per_epoch)
        self._unlabeled_order = _order_unlabeled(recipe, task, self._parts)

    def microbatches(self, step: int) -> list[Microbatch]:
        """Returns this process's part of the update's batch, in `accumulation` parts, on the CPU; then the same of the
        examples without labels. Called in a thread.
        """
        epoch, indices = self.order.at(step)
        of_task = self._task.train_batch
        parts = [Microbatch(self._views(of_task, part, epoch, step), True) for part in self._own_parts(indices)]
        if self._unlabeled_order is not None and self.recipe.method.acts_at(step):
            assert isinstance(self._task, LearnsFromUnlabeled)
            epoch, indices = self._unlabeled_order.at(step)
            of_task = self._task.unlabeled_batch
            parts += [Microbatch(self._views(of_task, part, epoch, step), False) for part in self._own_parts(indices)]
        return parts

    def examples(self, step: int) -> dict[str, Any]:
        """Returns which examples the update after `step` updates has: the epoch, and the indices of the examples."""
        epoch, indices = self.order.at(step)
        batch: dict[str, Any] = {"epoch": epoch, "examples": indices.tolist()}
        if self._unlabeled_order is not None and self.recipe.method.acts_at(step):
            batch["unlabeled"] = self._unlabeled_order.at(step)[1].tolist()
        return batch

    def _views(self, batch: Callable[..., Batch], indices: list[int], epoch: int, step: int) -> Batch:
        """Returns the examples at `indices`, once; or once for each pass, where each has a view of its own."""
        views = self.recipe.method.views_at(step)
        if views == 1:
            return batch(indices, epoch)
        return joined_views([batch(indices, epoch, view) for view in range(views)])

    def _own_parts(self, indices: Indices) -> list[list[int]]:
        parts = np.array_split(indices, self._parts)
        return [part.tolist() for part in parts[self._process :: self._processes]]


def _order_unlabeled(recipe: Recipe, task: Task, parts: int) -> UnlabeledOrder | None:
    """Returns the order of the examples without labels, where the task has some."""
    members = ("unlabeled_size", "unlabeled_lengths", "unlabeled_batch", "unlabeled_per_update")
    missing = [name for name in members if not hasattr(task, name)]
    if 0 < len(missing) < len(members):
        raise TrainingError(
            f"{type(task).__name__} has no {' and no '.join(missing)}: a task that learns from examples without "
            f"labels has {', '.join(members)}"
        )
    if not isinstance(task, LearnsFromUnlabeled) or not task.unlabeled_size():
        return None
    size, lengths = task.unlabeled_size(), task.unlabeled_lengths()
    return UnlabeledOrder(recipe.seed, size, lengths, task.unlabeled_per_update, parts=parts)

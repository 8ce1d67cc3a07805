"""The method as a recipe asks for it: from a batch to the loss of one microbatch, with one pass or several.

    plain        one pass: alpha 0, and the updates that `every` leaves out
    one forward  of the repeated batch, cut as the views say (R-Drop, Cutoff, SimCut); or of a batch in which every
                 pass has augmented inputs of its own already
    several      a forward for each pass, at its own dropout rate
    fused        one forward without the output layer: the loss from hidden states

All are sums over positions divided by `num_items`, so that an update does not depend on how it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rdrop.dropout import acting_sources, dropout_rate
from rdrop.experiments.recipe import Method, Recipe
from rdrop.experiments.tasks.task import Augments, Batch, Task
from rdrop.integrations.requirements import why_gradient_is_wrong
from rdrop.integrations.targets import Target
from rdrop.integrations.transformers.forward import EncoderOnce, Fused, same_randomness
from rdrop.passes import find_batch_size, repeat_batch, rows_of, split_passes
from rdrop.terms import LossTerms, cross_entropy, kl_from_first, symmetric_kl
from rdrop.views import perturb_batch, task_passes_of, views_of


class ObjectiveError(ValueError):
    """A method that cannot be used with this task or model: key, value, rule."""


class Objective:
    """`terms` is the loss of one microbatch. `forward` runs the model that is trained and returns its logits."""

    def __init__(self, recipe: Recipe, task: Task, model: nn.Module, forward: Callable[[Batch], Tensor]) -> None:
        self._recipe, self._method, self._task, self._model = recipe, recipe.method, task, model
        self._forward = forward
        method = recipe.method
        self._views = views_of(method.cutoff, method.cutoff_ratio, method.task_passes, method.passes)
        self._divergence = kl_from_first if method.divergence == "from-first" else task.divergence
        self._fused = Fused(model) if method.fused else None
        self._encoder_once = EncoderOnce(model, method.passes) if method.encoder_once else None
        self._is_seen_exact = not (method.fused or method.encoder_once)  # until the first microbatch has shown it
        self._require_fitting_task()

    def labels(self, batch: Batch, step: int) -> Tensor:
        """Returns the labels of the examples, once each, however many views of them the batch of the update has."""
        labels = self._task.labels(batch)
        return labels[: len(labels) // self._method.views_at(step)]

    def terms(self, batch: Batch, step: int, num_items: Tensor) -> LossTerms:
        """Returns the terms of the update after `step` updates, in fp32. Only `loss` carries gradient.

        `batch` has all views of its examples where each pass has its own (`joined_views`).
        """
        target = self._target(batch, step)
        if not self._method.acts_at(step):
            try:
                loss = target.plain_loss(self._forward(batch), self._recipe.label_smoothing) / num_items
            except ValueError as error:
                raise ObjectiveError(str(error)) from error
            return LossTerms(loss, loss.detach(), torch.zeros_like(loss))
        self._require_exact(batch)
        if self._fused is not None:
            return self._fused_terms(self._fused, batch, target, self._options(step, num_items))
        task_passes = None if self._method.task_passes == "all" else task_passes_of(self._views)
        return self._terms(batch, target, task_passes, self._options(step, num_items))

    def unlabeled_terms(self, batch: Batch, step: int, num_items: Tensor) -> LossTerms:
        """Returns the divergence alone, of examples without labels, in an update that uses R-Drop."""
        return self._terms(batch, self._target(batch, step), (), self._options(step, num_items))

    def _options(self, step: int, num_items: Tensor) -> dict[str, Any]:
        alpha = self._method.alpha_at(step, self._recipe.total_updates)
        return {"alpha": alpha, "label_smoothing": self._recipe.label_smoothing, "num_items": num_items}

    def _target(self, batch: Batch, step: int) -> Target:
        return Target(self.labels(batch, step), task_loss=self._task.task_loss, divergence=self._divergence)

    def _terms(
        self, batch: Batch, target: Target, task_passes: tuple[int, ...] | None, options: dict[str, Any]
    ) -> LossTerms:
        logits = self._logits(batch)
        try:
            return target.rdrop_loss(logits, task_passes=task_passes, **options)
        except ValueError as error:  # on CPU, rdrop_loss names the logit that is not finite
            raise (ObjectiveError if logits.isfinite().all() else FloatingPointError)(str(error)) from error

    def _logits(self, batch: Batch) -> Tensor:
        return logits_of_passes(self._method, self._task, self._model, self._forward, batch, self._encoder_once)

    def _fused_terms(self, fused: Fused, batch: Batch, target: Target, options: dict[str, Any]) -> LossTerms:
        (hidden, bias), _ = fused.run(lambda: self._logits(batch))
        try:
            with self._autocast():  # the output layer is a part of the forward pass
                return target.linear_rdrop_loss(hidden, fused.layer.weight, bias, **options)
        except ValueError as error:  # on CPU, it names the position whose loss is not finite
            raise FloatingPointError(str(error)) from error

    def _require_exact(self, batch: Batch) -> None:
        """Once: whether `fused` and `encoder_once` change nothing, by one example through the model that is trained."""
        if self._is_seen_exact:
            return
        example = rows_of(batch, 0, 1, batch_size=find_batch_size(batch))
        repeated = repeat_batch(example, self._method.passes, batch_size=1)

        def forward() -> Tensor:
            with self._autocast():
                return self._task.logits(self._model, repeated)

        if self._encoder_once is not None:
            _require_exact("encoder_once", self._encoder_once.reason_seen(forward))
        if self._fused is not None:
            with same_randomness():
                logits = forward()
            _require_exact("fused", self._fused.reason_seen(logits, forward))
        self._is_seen_exact = True

    def _autocast(self) -> torch.autocast:
        device = next(self._model.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self._recipe.precision == "bf16")

    # ------------------------------------------------------------------------------------------- does it fit the task

    def _require_fitting_task(self) -> None:
        recipe, method, task, model = self._recipe, self._method, self._task, self._model
        if recipe.label_smoothing and task.task_loss is not cross_entropy:
            raise ObjectiveError(
                f"label_smoothing (={recipe.label_smoothing}) must be 0: {recipe.task} has no cross-entropy"
            )
        if method.is_plain:
            return
        if method.divergence == "from-first" and task.divergence is not symmetric_kl:
            raise ObjectiveError(
                f'divergence (="from-first") must be "symmetric": {recipe.task} has a divergence of its own'
            )
        if method.cutoff is not None and not task.special_ids():
            raise ObjectiveError(f"cutoff (={method.cutoff!r}) must be null: {recipe.task} has no tokens to cut")
        if method.cutoff == "unknown" and task.unknown_id() is None:
            raise ObjectiveError(
                "cutoff (='unknown') needs an unknown token, and the vocabulary has none; take 'embedding'"
            )
        if method.views == "each" and not (isinstance(task, Augments) and task.augments):
            raise ObjectiveError(f'views (="each") must be "same": {recipe.task} does not change its inputs at random')
        if method.fused and (task.task_loss is not cross_entropy or task.divergence is not symmetric_kl):
            raise ObjectiveError(f"fused (=true) must be false: the loss of {recipe.task} is not that of one softmax")
        model.train()
        for key, way in (("fused", self._fused), ("encoder_once", self._encoder_once)):
            _require_exact(key, None if way is None else way.reason())
        self._require_randomness()

    def _require_randomness(self) -> None:
        asked = f"alpha (={self._method.alpha}) asks for R-Drop, but"
        inputs_differ = self._method.views == "each" or any(view.cuts for view in self._views)
        if not inputs_differ and not acting_sources(self._model):
            raise ObjectiveError(
                f"{asked} the model has no dropout: all passes would be the same. Set a dropout rate of the model "
                "above 0, or alpha=0 for plain training."
            )
        why = why_gradient_is_wrong(self._model)
        if why is not None:
            raise ObjectiveError(f"{asked} {why}")


def logits_of_passes(
    method: Method,
    task: Task,
    model: nn.Module,
    forward: Callable[[Batch], Tensor],
    batch: Batch,
    encoder_once: EncoderOnce | None = None,
) -> Tensor:
    """Runs all passes of a batch of N examples as the method makes them, and returns their logits `(m N, ..., V)`.

    `batch` has the views of all passes where each has its own (`joined_views`). `forward` runs the model.
    """
    if method.dropout is not None:
        count = len(method.dropout)
        inputs = split_passes(batch, count) if method.views == "each" else [batch] * count
        passes = []
        for rate, of_pass in zip(method.dropout, inputs, strict=True):
            with dropout_rate(model, rate):
                passes.append(forward(of_pass))
        return torch.cat(passes)
    if method.views == "each":
        return forward(batch)
    views = views_of(method.cutoff, method.cutoff_ratio, method.task_passes, method.passes)
    special_ids, unknown_id = task.special_ids(), task.unknown_id()
    repeated, perturbed = perturb_batch(batch, views, special_ids=special_ids, unknown_id=unknown_id)
    with perturbed(model):
        if encoder_once is not None:
            return encoder_once.run(lambda: forward(repeated))  # type: ignore[no-any-return]
        return forward(repeated)


def joined_views(views: Sequence[Batch]) -> Batch:
    """Returns the views of a batch as one: all examples as the first pass has them, then as the second, ..."""
    return {
        name: torch.cat([view[name] for view in views]) if isinstance(value, Tensor) and value.dim() > 0 else value
        for name, value in views[0].items()
    }


def _require_exact(key: str, reason: str | None) -> None:
    if reason is not None:
        raise ObjectiveError(f"{key} (=true) must be false: {reason}")

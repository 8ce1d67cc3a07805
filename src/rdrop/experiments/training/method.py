"""The method as a recipe asks for it: from a batch to the loss of one microbatch, with one pass or several.

    plain        one pass: alpha 0, and the updates that `every` leaves out
    one forward  of the repeated batch, cut as the views say (R-Drop, Cutoff, SimCut)
    several      a forward for each pass, at its own dropout rate
    fused        one forward without the output layer: the loss from hidden states

All are sums over positions divided by `num_items`, so that an update does not depend on how it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from rdrop.check import check_rdrop
from rdrop.dropout import dropout_rate, dropout_sources
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.tasks.task import Batch, Task
from rdrop.integrations.transformers.forward import (
    EncoderOnce,
    WithoutHead,
    output_layer,
    why_encoder_stays,
    why_head_stays,
)
from rdrop.linear_loss import linear_rdrop_loss
from rdrop.loss import LossTerms, cross_entropy, kl_from_first, rdrop_loss, symmetric_kl
from rdrop.views import perturb_batch, task_passes_of, views_of

IGNORE_INDEX = -100
SAME_LOSS = {"fp32": 1e-4, "bf16": 2e-2}  # relative, of one microbatch, from hidden states and from logits


class MethodError(ValueError):
    """What the recipe asks for cannot be done with this task or model: key, value, rule."""


class Objective:
    """`terms` is the loss of one microbatch. `forward` runs the model that is trained and returns its logits."""

    def __init__(self, recipe: Recipe, task: Task, model: nn.Module, forward: Callable[[Batch], Tensor]) -> None:
        self._recipe, self._method, self._task, self._model = recipe, recipe.method, task, model
        self._forward = forward
        method = recipe.method
        self._views = views_of(method.cutoff, method.cutoff_ratio, method.task_passes, method.passes)
        self._divergence = kl_from_first if method.divergence == "from-first" else task.divergence
        self._require_fitting_task()
        self._encoder = EncoderOnce(model.get_encoder(), method.passes) if method.encoder_once else nullcontext()  # type: ignore[operator]
        self._without_head = WithoutHead(output_layer(model)) if method.fused else None
        self._fused_is_exact = False  # until the first microbatch has shown it

    def terms(self, batch: Batch, step: int, num_items: Tensor) -> LossTerms:
        """Of the update after `step` updates, in fp32. Only `loss` carries gradient."""
        if not self._method.acts_at(step):
            return plain_loss(
                self._forward(batch),
                self._task.labels(batch),
                self._task,
                label_smoothing=self._recipe.label_smoothing,
                num_items=num_items,
            )
        if self._without_head is not None:
            self._require_exact_fused(batch, num_items)
            return self._fused(batch, num_items)
        return self._from_logits(batch, num_items)

    def unlabeled_terms(self, batch: Batch, num_items: Tensor) -> LossTerms:
        """Of examples without labels, in an update that uses R-Drop: the divergence alone, by the same weight."""
        return self._divergence_and_task_loss(batch, num_items, task_passes=())

    def _from_logits(self, batch: Batch, num_items: Tensor) -> LossTerms:
        task_passes = None if self._method.task_passes == "all" else task_passes_of(self._views)
        return self._divergence_and_task_loss(batch, num_items, task_passes)

    def _divergence_and_task_loss(
        self, batch: Batch, num_items: Tensor, task_passes: tuple[int, ...] | None
    ) -> LossTerms:
        recipe, method = self._recipe, self._method
        logits = self._one_forward(batch) if method.dropout is None else self._forward_each(batch, method.dropout)
        try:
            return rdrop_loss(
                logits,
                self._task.labels(batch),
                alpha=method.alpha,
                label_smoothing=recipe.label_smoothing,
                num_items=num_items,
                divergence=self._divergence,
                task_loss=self._task.task_loss,
                task_passes=task_passes,
            )
        except ValueError as error:  # on CPU, rdrop_loss names the logit that is not finite
            raise (MethodError if logits.isfinite().all() else FloatingPointError)(str(error)) from error

    def _one_forward(self, batch: Batch) -> Tensor:
        special_ids, unknown_id = self._task.special_ids(), self._task.unknown_id()
        repeated, perturbed = perturb_batch(batch, self._views, special_ids=special_ids, unknown_id=unknown_id)
        with perturbed(self._model), self._encoder:
            return self._forward(repeated)

    def _forward_each(self, batch: Batch, rates: Sequence[float]) -> Tensor:
        passes = []
        for rate in rates:
            with dropout_rate(self._model, rate):
                passes.append(self._forward(batch))
        return torch.cat(passes)

    def _fused(self, batch: Batch, num_items: Tensor) -> LossTerms:
        assert self._without_head is not None
        recipe, method = self._recipe, self._method
        with self._without_head:
            instead_of_logits = self._one_forward(batch)
        hidden, bias = self._without_head.taken(SimpleNamespace(logits=instead_of_logits))
        try:
            return linear_rdrop_loss(
                hidden,
                self._without_head.layer.weight,
                self._task.labels(batch),
                bias,
                alpha=method.alpha,
                label_smoothing=recipe.label_smoothing,
                num_items=num_items,
            )
        except ValueError as error:  # on CPU, it names the position whose loss is not finite
            raise FloatingPointError(str(error)) from error

    def _require_exact_fused(self, batch: Batch, num_items: Tensor) -> None:
        """Once: whether the model's logits are what its output layer gives, by the loss with the same dropout masks."""
        if self._fused_is_exact:
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        losses = []
        for way in (self._from_logits, self._fused):
            with torch.random.fork_rng(devices), torch.no_grad():
                losses.append(way(batch, num_items).loss.item())
        if abs(losses[0] - losses[1]) > SAME_LOSS[self._recipe.precision] * max(abs(losses[0]), 1e-3):
            raise MethodError(
                f"fused (=true): from hidden states the loss is {losses[1]:.6g}, from logits {losses[0]:.6g}; this "
                "model changes its logits after the output layer. Set fused=false"
            )
        self._fused_is_exact = True

    # ------------------------------------------------------------------------------------------- does it fit the task

    def _require_fitting_task(self) -> None:
        recipe, method, task, model = self._recipe, self._method, self._task, self._model
        if recipe.label_smoothing and task.task_loss is not cross_entropy:
            raise MethodError(
                f"label_smoothing (={recipe.label_smoothing}) must be 0: {recipe.task} has no cross-entropy"
            )
        if method.is_plain:
            return
        if method.divergence == "from-first" and task.divergence is not symmetric_kl:
            raise MethodError(
                f'divergence (="from-first") must be "symmetric": {recipe.task} has a divergence of its own'
            )
        if method.cutoff is not None and not task.special_ids():
            raise MethodError(f"cutoff (={method.cutoff!r}) must be null: {recipe.task} has no tokens to cut")
        if method.cutoff == "unknown" and task.unknown_id() is None:
            raise MethodError(
                "cutoff (='unknown') needs an unknown token, and the vocabulary has none; take 'embedding'"
            )
        if method.fused and (task.task_loss is not cross_entropy or task.divergence is not symmetric_kl):
            raise MethodError(f"fused (=true) must be false: the loss of {recipe.task} is not that of one softmax")
        for key, why in (("fused", why_head_stays), ("encoder_once", why_encoder_stays)):
            reason = _reason(why, model) if getattr(recipe.method, key) else None
            if reason is not None:
                raise MethodError(f"{key} (=true) must be false: {reason}")
        self._require_randomness()

    def _require_randomness(self) -> None:
        # Layerdrop is left out: the passes of one forward share its coin.
        sources = dropout_sources(self._model.train())
        acts = any(source.active and source.kind != "layerdrop" for source in sources)
        if not acts and not any(view.cuts for view in self._views):
            raise MethodError(
                f"alpha (={self._method.alpha}) asks for R-Drop, but the model has no dropout: all passes would "
                "be the same. Set a dropout rate of the model above 0, or alpha=0 for plain training."
            )
        for finding in check_rdrop(self._model).findings:
            if finding.severity == "error" and finding.code != "no-dropout":
                asked = f"alpha (={self._method.alpha}) asks for R-Drop"
                raise MethodError(f"{asked}, but {finding.message}. {finding.remedy}")


def _reason(why: Callable[[nn.Module], str | None], model: nn.Module) -> str | None:
    return why(model.train()) if isinstance(model, PreTrainedModel) else "the model is none of transformers"


def plain_loss(
    logits: Tensor, labels: Tensor, task: Task, *, label_smoothing: float, num_items: int | Tensor
) -> LossTerms:
    """For a classifier, `F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=...) / num_items`.

    A logit at a position without a label never matters, not even a NaN.
    """
    logits = logits.float()
    valid = labels != IGNORE_INDEX if has_class_indices(logits, labels) else None
    if valid is not None:
        logits, labels = logits.masked_fill(~valid[..., None], 0.0), labels.masked_fill(~valid, 0)
    if task.task_loss is cross_entropy and valid is not None:
        targets = labels.masked_fill(~valid, IGNORE_INDEX).flatten()
        total = F.cross_entropy(logits.flatten(0, -2), targets, reduction="sum", label_smoothing=label_smoothing)
    elif task.task_loss is cross_entropy:
        total = cross_entropy(logits, labels, label_smoothing=label_smoothing).sum()
    else:
        values = task.task_loss(logits, labels)
        total = (values if valid is None else values.masked_fill(~valid, 0.0)).sum()
    loss = total / num_items
    return LossTerms(loss, loss.detach(), torch.zeros_like(loss))


def has_class_indices(logits: Tensor, labels: Tensor) -> bool:
    return not labels.is_floating_point() and labels.dim() == logits.dim() - 1


def count_positions(labels: Tensor) -> Tensor:
    """Positions with something to learn: labels that are not -100; of targets `(N, ..., K)`, the `(N, ...)`."""
    if labels.is_floating_point():
        return torch.tensor(len(labels) if labels.dim() == 1 else labels.shape[:-1].numel(), device=labels.device)
    return (labels != IGNORE_INDEX).sum()

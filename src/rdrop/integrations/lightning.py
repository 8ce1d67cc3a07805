"""R-Drop in Lightning: a callback with the loss, exact to the label over accumulation steps and processes.

Lightning divides a loss by the number of batches, and DDP by the number of processes. A mean over the labels of each
batch is then a mean of means, in which a label of a short batch weighs more. Here a batch gives a sum, and the gradient
is divided once per update, by the labels of the whole update, before Lightning clips it.
"""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from rdrop.alpha import AlphaSchedule, alpha_at, course_of
from rdrop.arguments import checked_alpha
from rdrop.integrations.requirements import (
    ENOUGH_UPDATES,
    require_randomness,
    warn_of_no_divergence,
    warn_where_alpha_stopped,
    why_gradient_is_wrong,
)
from rdrop.integrations.targets import Target
from rdrop.passes import repeat_batch

MEANT = "rdrop_loss itself, with its mean over each batch"
_IN_TRAINING_ONLY = "it is for training_step; in validation and test use the plain loss of one pass, F.cross_entropy"


class RDropCallback(L.Callback):  # type: ignore[misc, unused-ignore]  # where Lightning is not installed
    """Repeats the batch, computes the loss and divides the gradient by the labels of the whole update.

    ::

        class Tagger(L.LightningModule):
            def __init__(self):
                self.rdrop = RDropCallback(alpha=1.0)

            def configure_callbacks(self):
                return [self.rdrop]

            def training_step(self, batch, batch_idx):
                logits = self(self.rdrop.repeat(batch["tokens"]))
                return self.rdrop.loss(logits, batch["labels"])

    The optimizer's gradient is that of `rdrop_loss` of the whole update, whatever `accumulate_grad_batches`, the
    number of processes and the labels in each batch are. Its `task_loss`, `divergence` and `alpha` are logged.
    Validation and prediction are the module's own.

    Args:
        alpha: as in `rdrop_loss`. 0 is plain training, with one pass. "auto" stands for 4, "quadratic".
        alpha_schedule: the course of alpha over the planned updates (`alpha_at`): "constant", "linear", "quadratic". A
            function of the update alone, so a resumed training goes on with it as long as it is planned as before.
        passes: dropout masks per example, 2 or more.

    Raises:
        ValueError: as training begins, where the result would be wrong: nothing random in the module, gradient
            checkpointing that draws other masks, a strategy other than one device and DDP, several optimizers, manual
            optimization, an alpha that rises over a number of updates that is not known.
    """

    def __init__(
        self, *, alpha: float | Literal["auto"], alpha_schedule: AlphaSchedule = "constant", passes: int = 2
    ) -> None:
        if passes < 2:
            raise ValueError(f"passes (={passes}) must be 2 or more; alpha=0 is plain training, with one pass")
        alpha, self.alpha_schedule = course_of(alpha, alpha_schedule)
        self.alpha = checked_alpha(alpha)
        alpha_at(0, 1, self.alpha, self.alpha_schedule)  # is there such a schedule?
        self.passes = passes
        self._trainer: L.Trainer | None = None
        self._sums = torch.zeros(3)
        self._called = self._called_in_update = self._random = False
        self._updates = self._regularized = 0
        self._divergence: Tensor = torch.zeros(())  # added up over the updates, read when they have ended

    def repeat(self, batch: Any) -> Any:
        """Returns `repeat_batch(batch, passes)`; with alpha 0 the batch as it is."""
        return repeat_batch(batch, self.passes) if self.alpha > 0 else batch

    def loss(self, logits: Tensor, target: Tensor | Target, *, label_smoothing: float = 0.0) -> Tensor:
        """Computes the loss to return from `training_step`: a sum over the labels that count, not yet a mean.

        What you add to it will be divided by the labels of the update too.

        Args:
            logits: `(passes*N, ..., V)` of the repeated batch; with alpha 0 `(N, ..., V)`.
            target: the labels of the batch as it was, as in `rdrop_loss`; or a `Target`, for another task loss and
                divergence.
            label_smoothing: as in `rdrop_loss`.
        """
        if self._trainer is None:
            raise ValueError(
                "this RDropCallback is not one of the Trainer's, so nobody divides the gradient: return it from "
                "configure_callbacks of the module, or pass it to Trainer(callbacks=[...]). If it is one, loss was "
                f"called before training began, as in the sanity check: {_IN_TRAINING_ONLY}"
            )
        if not self._trainer.training:
            raise ValueError(f"loss of RDropCallback was called outside of training: {_IN_TRAINING_ONLY}")
        if self._called:
            raise ValueError(
                "a second loss for the same batch: the labels of the update would be counted twice. Call loss once in "
                "training_step (an optimizer that calls it several times, as L-BFGS does, cannot be used)"
            )
        self._called = self._called_in_update = True
        target = target if isinstance(target, Target) else Target(target)
        if target.class_weight is not None or target.task_divisor is not None:
            raise ValueError(
                "class weights divide the task loss by their sum, a loss per example by the examples, and the "
                "divergence is divided by the positions; here both are divided by one number: use "
                f"{MEANT}, or a task loss with the weights in it"
            )
        if self.alpha > 0:
            if not self._random:
                require_randomness(self._trainer.lightning_module, [logits], self.passes)
                self._random = True
            self._check_passes(logits, target)
            loss, task_loss, divergence = target.rdrop_loss(
                logits, alpha=self._alpha_of_update(), reduction="sum", label_smoothing=label_smoothing
            )
        else:
            loss = target.plain_loss(logits, label_smoothing)
            task_loss, divergence = loss.detach(), loss.new_zeros(())
        positions, _ = target.count()
        self._sums = self._sums.to(loss.device) + torch.stack([positions, task_loss, divergence]).float()
        return loss

    def _alpha_of_update(self) -> float:
        assert self._trainer is not None
        return alpha_at(self._trainer.global_step, self._updates, self.alpha, self.alpha_schedule)

    def _check_passes(self, logits: Tensor, target: Target) -> None:
        if len(logits) != self.passes * len(target.labels):
            raise ValueError(
                f"{len(logits)} rows of logits for {len(target.labels)} of labels: with passes={self.passes} the model "
                f"must see {self.passes * len(target.labels)} rows. Give it rdrop.repeat(batch), once, and the loss "
                "the labels of the batch as it was"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called by Lightning."""
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise ValueError(
                f"{type(trainer.strategy).__name__} keeps gradients where a callback cannot divide them: use one "
                f"device or strategy='ddp', or {MEANT}"
            )
        if len(trainer.optimizers) > 1:
            raise ValueError(
                f"the module has {len(trainer.optimizers)} optimizers, and which labels an update of each has learned "
                f"from is not known: use one, or {MEANT}"
            )
        if not pl_module.automatic_optimization:
            raise ValueError(
                "the module optimizes by hand (automatic_optimization=False), so it clips, scales and steps before "
                f"this callback can divide the gradient: use {MEANT}, or with num_items"
            )
        if self.alpha > 0 and (wrong := why_gradient_is_wrong(pl_module)):
            raise ValueError(wrong)
        if self.alpha > 0 and self.alpha_schedule != "constant":
            updates = trainer.estimated_stepping_batches
            self._updates = 0 if updates == float("inf") else int(updates)
        self._trainer, self._random, self._called_in_update = trainer, False, False
        self._alpha_of_update()
        self._sums = torch.zeros(3)
        self._regularized, self._divergence = 0, torch.zeros((), device=pl_module.device)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called by Lightning."""
        self._called = False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called by Lightning."""
        self._trainer = None
        if self.alpha > 0 and self._regularized >= ENOUGH_UPDATES and not self._divergence:
            warn_of_no_divergence(self._regularized)
        warn_where_alpha_stopped(trainer.global_step, self._updates, self.alpha, self.alpha_schedule)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Called by Lightning when the gradient of an update is complete, before it is clipped."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients and not self._called_in_update:
            raise ValueError(
                "training_step did not call loss of this RDropCallback, so how many labels the update has is unknown. "
                "Return rdrop.loss(logits, labels) from it"
            )
        sums = trainer.strategy.reduce(self._sums.to(pl_module.device), reduce_op="sum")
        count, task_loss, divergence = sums[0].clamp(min=1), sums[1], sums[2]
        batches = trainer.accumulate_grad_batches * trainer.world_size  # what Lightning and DDP have divided by
        for gradient in gradients:
            gradient.div_(count).mul_(batches)
        self._sums = torch.zeros_like(sums)
        if not self._called_in_update:  # every training_step of the update returned None
            return
        self._called_in_update = False
        pl_module.log("task_loss", task_loss / count)
        if self.alpha > 0:
            self._regularized, self._divergence = self._regularized + 1, self._divergence + divergence.abs()
            pl_module.log("divergence", divergence / count)
            pl_module.log("alpha", self._alpha_of_update())

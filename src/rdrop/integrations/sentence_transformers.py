"""R-Drop for the cross-encoders of sentence-transformers: its two losses for pairs with a label, with an alpha.

Each is the library's own loss on the pairs repeated, with a criterion that knows they are. While the model evaluates,
and with alpha 0, nothing is repeated and the criterion is the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from sentence_transformers.cross_encoder import CrossEncoder
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, CrossEntropyLoss
from torch import Tensor, nn
from transformers import TrainerCallback

from rdrop.alpha import AlphaSchedule, alpha_at, course_of
from rdrop.arguments import checked_alpha
from rdrop.integrations.requirements import require_randomness, warn_where_alpha_stopped, why_gradient_is_wrong
from rdrop.loss import rdrop_loss
from rdrop.terms import LossTerms, bernoulli_kl

Columns = list[list[Any]]


class _OfPairs(nn.Module):
    """Written before a loss of the library, repeats its pairs and replaces its criterion."""

    _criterion: ClassVar[str]
    """The name under which the loss has it."""

    def __init__(
        self,
        model: CrossEncoder,
        *,
        alpha: float | Literal["auto"],
        alpha_schedule: AlphaSchedule = "constant",
        passes: int = 2,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        plain = getattr(self, self._criterion)
        self.schedule = _AlphaCallback(alpha, alpha_schedule)
        setattr(self, self._criterion, _OnRepeated(plain, self._terms_of(plain), model, self.schedule, passes))

    def _terms_of(self, plain: Any) -> Callable[..., LossTerms]:
        """Returns `rdrop_loss` with the task loss that `plain` is, and its divergence."""
        raise NotImplementedError

    def forward(self, inputs: Columns, labels: Tensor, prompt: str | None = None, task: str | None = None) -> Tensor:
        """Called by the trainer."""
        inputs, labels = getattr(self, self._criterion).repeat(inputs, labels)
        loss: Tensor = super().forward(inputs, labels, prompt=prompt, task=task)
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Returns what the model card says of the loss."""
        of_library: dict[str, Any] = getattr(super(), "get_config_dict", dict)()
        settings: dict[str, Any] = getattr(self, self._criterion).settings
        return of_library | settings


class RDropCrossEntropyLoss(_OfPairs, CrossEntropyLoss):  # type: ignore[misc, unused-ignore]  # where it is not installed
    """Computes `rdrop_loss` of a cross-encoder with several labels, for `CrossEncoderTrainer(loss=...)`.

    ::

        loss = RDropCrossEntropyLoss(model, alpha=1.0)
        trainer = CrossEncoderTrainer(model=model, train_dataset=pairs, loss=loss, callbacks=[loss.schedule])

    Args:
        model: the `CrossEncoder`, whose dropout must be on.
        alpha: as in `rdrop_loss`. 0 is the library's loss. "auto" stands for 4 with the schedule "quadratic".
        alpha_schedule: the course of alpha over the planned updates (`alpha_at`): "constant", "linear", "quadratic". A
            loss does not know its update, so one that rises wants `CrossEncoderTrainer(callbacks=[loss.schedule])`.
        passes: dropout masks per pair, 2 or more.
        options: those of `sentence_transformers.cross_encoder.losses.CrossEntropyLoss`.

    Raises:
        ValueError: in the first training step, if nothing in the model is random, if backward would see other masks, or
            if alpha rises and nobody tells the update.
    """

    _criterion = "ce_loss"

    def _terms_of(self, plain: Any) -> Callable[..., LossTerms]:
        def terms(logits: Tensor, labels: Tensor, *, alpha: float) -> LossTerms:
            settings = {name: getattr(plain, name) for name in ("weight", "ignore_index", "label_smoothing")}
            return rdrop_loss(logits, labels, alpha=alpha, **settings)

        return terms


class RDropBinaryCrossEntropyLoss(_OfPairs, BinaryCrossEntropyLoss):  # type: ignore[misc, unused-ignore]
    """Computes `rdrop_loss` of a cross-encoder with one label, for `CrossEncoderTrainer(loss=...)`.

    The task loss is binary cross-entropy, the divergence `bernoulli_kl`. Arguments and errors are those of
    `RDropCrossEntropyLoss`; the options those of `sentence_transformers.cross_encoder.losses.BinaryCrossEntropyLoss`.
    """

    _criterion = "bce_with_logits_loss"

    def _terms_of(self, plain: Any) -> Callable[..., LossTerms]:
        if plain.weight is not None:
            raise ValueError("a weight per pair of one batch cannot fit the next batch: leave weight out")

        def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
            labels = labels.view_as(logits).to(logits)
            return F.binary_cross_entropy_with_logits(
                logits, labels, pos_weight=plain.pos_weight, reduction="none"
            ).mean(-1)

        return partial(rdrop_loss, task_loss=task_loss, divergence=bernoulli_kl)


class _AlphaCallback(TrainerCallback):
    """Tells a loss the alpha of the update, by the trainer's count of updates, which a resumed training has too."""

    def __init__(self, alpha: float | Literal["auto"], schedule: AlphaSchedule) -> None:
        nominal, self.schedule = course_of(alpha, schedule)
        self.nominal = checked_alpha(nominal)
        alpha_at(0, 1, self.nominal, self.schedule)  # is there such a schedule?
        self._alpha: float | None = None

    @property
    def alpha(self) -> float:
        """The weight of the divergence in this update."""
        if self.nominal == 0 or self.schedule == "constant":
            return self.nominal
        if self._alpha is None:
            raise ValueError(
                f"alpha_schedule (={self.schedule!r}) follows the updates, and nobody tells this loss which it is: "
                'pass callbacks=[loss.schedule] to CrossEncoderTrainer, or take alpha_schedule="constant"'
            )
        return self._alpha

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer as an update begins."""
        self._alpha = alpha_at(state.global_step, state.max_steps, self.nominal, self.schedule)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called by the trainer."""
        self._alpha = None
        warn_where_alpha_stopped(state.global_step, state.max_steps, self.nominal, self.schedule)


class _OnRepeated(nn.Module):
    """The criterion of a loss: R-Drop while the model trains, else the plain criterion."""

    def __init__(
        self,
        plain: nn.Module,
        terms: Callable[..., LossTerms],
        model: CrossEncoder,
        schedule: _AlphaCallback,
        passes: int,
    ) -> None:
        super().__init__()
        if plain.reduction != "mean":
            raise ValueError(f"reduction={plain.reduction!r}: only the mean over the pairs of a batch is known here")
        if passes < 2:
            raise ValueError(f"passes (={passes}) must be 2 or more; alpha=0 is plain training, with one pass")
        self.plain, self.terms = plain, terms
        self.schedule, self.passes = schedule, passes
        self._model = [model]  # in a list, so that its parameters do not count as those of the criterion
        self._checked = False

    @property
    def settings(self) -> dict[str, Any]:
        return {"alpha": self.schedule.nominal, "alpha_schedule": self.schedule.schedule, "passes": self.passes}

    @property
    def acts(self) -> bool:
        return self._model[0].training and self.schedule.alpha > 0

    def repeat(self, inputs: Columns, labels: Tensor) -> tuple[Columns, Tensor]:
        if not self.acts:
            return inputs, labels
        return [list(column) * self.passes for column in inputs], torch.cat([labels] * self.passes)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        if not self.acts:
            loss: Tensor = self.plain(logits, labels)
            return loss
        if not self._checked:
            if wrong := why_gradient_is_wrong(self._model[0]):
                raise ValueError(wrong)
            require_randomness(self._model[0], [logits], self.passes)
            self._checked = True
        return self.terms(logits, labels[: len(labels) // self.passes], alpha=self.schedule.alpha).loss

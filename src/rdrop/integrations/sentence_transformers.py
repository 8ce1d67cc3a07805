"""R-Drop for the cross-encoders of sentence-transformers: its two losses for pairs with a label, with an alpha.

Each is the library's own loss on the pairs repeated, with a criterion that knows they are. While the model evaluates,
and with alpha 0, nothing is repeated and the criterion is the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.cross_encoder import CrossEncoder
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss, CrossEntropyLoss
from torch import Tensor, nn

from rdrop.arguments import checked_alpha
from rdrop.integrations.requirements import require_randomness, why_gradient_is_wrong
from rdrop.loss import rdrop_loss
from rdrop.terms import LossTerms, bernoulli_kl

Columns = list[list[Any]]


class RDropCrossEntropyLoss(CrossEntropyLoss):  # type: ignore[misc, unused-ignore]  # where it is not installed
    """Computes `rdrop_loss` of a cross-encoder with several labels, for `CrossEncoderTrainer(loss=...)`.

    ::

        loss = RDropCrossEntropyLoss(model, alpha=1.0)
        trainer = CrossEncoderTrainer(model=model, train_dataset=pairs, loss=loss)

    Args:
        model: the `CrossEncoder`, whose dropout must be on.
        alpha: as in `rdrop_loss`. 0 is the library's loss.
        passes: dropout masks per pair, 2 or more.
        options: those of `sentence_transformers.cross_encoder.losses.CrossEntropyLoss`.

    Raises:
        ValueError: in the first training step, if nothing in the model is random, or if backward would see other masks.
    """

    ce_loss: Any

    def __init__(self, model: CrossEncoder, *, alpha: float, passes: int = 2, **options: Any) -> None:
        super().__init__(model, **options)
        plain = self.ce_loss
        settings = {name: getattr(plain, name) for name in ("weight", "ignore_index", "label_smoothing")}
        self.ce_loss = _OnRepeated(plain, partial(rdrop_loss, **settings), model, alpha, passes)

    def forward(self, inputs: Columns, labels: Tensor, prompt: str | None = None, task: str | None = None) -> Tensor:
        """Called by the trainer."""
        inputs, labels = self.ce_loss.repeat(inputs, labels)
        loss: Tensor = super().forward(inputs, labels, prompt=prompt, task=task)
        return loss


class RDropBinaryCrossEntropyLoss(BinaryCrossEntropyLoss):  # type: ignore[misc, unused-ignore]
    """Computes `rdrop_loss` of a cross-encoder with one label, for `CrossEncoderTrainer(loss=...)`.

    The task loss is binary cross-entropy, the divergence `bernoulli_kl`. Arguments and errors are those of
    `RDropCrossEntropyLoss`; the options those of `sentence_transformers.cross_encoder.losses.BinaryCrossEntropyLoss`.
    """

    bce_with_logits_loss: Any

    def __init__(self, model: CrossEncoder, *, alpha: float, passes: int = 2, **options: Any) -> None:
        super().__init__(model, **options)
        plain = self.bce_with_logits_loss
        if plain.weight is not None:
            raise ValueError("a weight per pair of one batch cannot fit the next batch: leave weight out")

        def task_loss(logits: Tensor, labels: Tensor) -> Tensor:
            labels = labels.view_as(logits).to(logits)
            return F.binary_cross_entropy_with_logits(
                logits, labels, pos_weight=plain.pos_weight, reduction="none"
            ).mean(-1)

        terms = partial(rdrop_loss, task_loss=task_loss, divergence=bernoulli_kl)
        self.bce_with_logits_loss = _OnRepeated(plain, terms, model, alpha, passes)

    def forward(self, inputs: Columns, labels: Tensor, prompt: str | None = None, task: str | None = None) -> Tensor:
        """Called by the trainer."""
        inputs, labels = self.bce_with_logits_loss.repeat(inputs, labels)
        loss: Tensor = super().forward(inputs, labels, prompt=prompt, task=task)
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        """Returns what the model card says of the loss."""
        criterion = self.bce_with_logits_loss
        config: dict[str, Any] = super().get_config_dict()  # type: ignore[no-untyped-call, unused-ignore]
        return config | {"alpha": criterion.alpha, "passes": criterion.passes}


class _OnRepeated(nn.Module):
    """The criterion of a loss: R-Drop while the model trains, else the plain criterion."""

    def __init__(
        self, plain: nn.Module, terms: Callable[..., LossTerms], model: CrossEncoder, alpha: float, passes: int
    ) -> None:
        super().__init__()
        if plain.reduction != "mean":
            raise ValueError(f"reduction={plain.reduction!r}: only the mean over the pairs of a batch is known here")
        if passes < 2:
            raise ValueError(f"passes (={passes}) must be 2 or more; alpha=0 is plain training, with one pass")
        self.plain, self.terms = plain, terms
        self.alpha, self.passes = checked_alpha(alpha), passes
        self._model = [model]  # in a list, so that its parameters do not count as those of the criterion
        self._checked = False

    @property
    def acts(self) -> bool:
        return self.alpha > 0 and self._model[0].training

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
        return self.terms(logits, labels[: len(labels) // self.passes], alpha=self.alpha).loss

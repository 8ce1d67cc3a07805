"""Updates of the Hugging Face Trainer whose loss and gradient are finite; others are not applied.

    class MyTrainer(FiniteUpdates, Trainer): ...

The stock Trainer applies a gradient that is NaN, and logs 0.0, or an earlier loss, in place of a loss that is. Here the
loss of an update and the norm of its gradient are read together, once, before the optimizer's step. Where one is not
finite in any process, training stops in all of them, or the update is left out.
"""

from __future__ import annotations

import math
import warnings
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from transformers import Trainer

OnNonfinite = Literal["stop", "skip"]

MOST_IN_A_ROW = 20
"""Updates left out one after the other, after which "skip" stops too: the next batch will not help either."""


class NonfiniteUpdateError(RuntimeError):
    """The loss or the gradient of an update is not finite: which, the likely cause, and what to do."""


class NonfiniteUpdateWarning(UserWarning):
    """An update was left out, the first of a training."""


class FiniteUpdates(Trainer):
    """Applies no update whose loss or gradient is not finite. Put it before the Trainer among the bases.

    Args:
        on_nonfinite: "stop" raises before the weights have changed, with the true values in the log; "skip" leaves the
            update out, and logs how many were, as `skipped_updates`; `train_loss`, the mean of the whole training, is
            that of the others. The running statistics of batch normalization are put back in both. The step of the
            learning rate is counted, in float16 only once the scale has fallen to 1. After `MOST_IN_A_ROW` of them in a
            row it stops too. In float16 the loss scale leaves updates out that overflow at its first values; they are
            counted, and are no reason to stop until the scale has fallen to 1.

    Raises:
        NonfiniteUpdateError: from `train`.
        ValueError: at construction, for "skip" where the optimizer's step is a part of backward.
    """

    def __init__(self, *args: Any, on_nonfinite: OnNonfinite = "stop", **kwargs: Any) -> None:
        if on_nonfinite not in get_args(OnNonfinite):
            raise ValueError(f'on_nonfinite (={on_nonfinite!r}) must be "stop" or "skip"')
        self.on_nonfinite = on_nonfinite
        self._forget()
        super().__init__(*args, **kwargs)
        if on_nonfinite == "skip" and (name := self._steps_in_backward()):
            raise ValueError(
                f'on_nonfinite (="skip") must be "stop" with {name}, which changes the weights during backward: by the '
                "time the gradient is known, it has been applied"
            )

    def _forget(self) -> None:
        self._loss_of_update: Tensor | None = None
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._nonfinite_at = ""
        """What more is known of the place of a loss that is not finite, in parentheses; whoever computes it may say."""
        self._sum_of_losses, self._summed_losses = 0.0, 0
        """Of the updates that were not left out, over all processes."""
        self._skipped_since_log = 0
        self._skipped_in_a_row = 0
        self._has_warned = False

    def _steps_in_backward(self) -> str | None:
        if self.is_deepspeed_enabled:
            return "DeepSpeed"
        optimizer = str(getattr(self.args.optim, "value", self.args.optim))
        return f"optim={optimizer!r}" if "lomo" in optimizer or "layerwise" in optimizer else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains as the Trainer does, its `logging_nan_inf_filter` off: it hides losses, and waits for the device."""
        filtered, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.logging_nan_inf_filter = filtered

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Called by `train`; and again, with a smaller batch, where `auto_find_batch_size` ran out of memory."""
        self._forget()
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[no-untyped-call, unused-ignore]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self._loss_of_update is None:
            self._statistics = _running_statistics(self.model)
        loss: Tensor = super().training_step(*args, **kwargs)
        before = self._loss_of_update
        self._loss_of_update = loss.detach() if before is None else before + loss.detach()
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Returns the norm, and looks at it: this is called once an update, after clipping, before the step."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        loss, self._loss_of_update = self._loss_of_update, None
        if loss is None:
            raise TypeError(
                f"{type(self).__name__}.training_step does not call FiniteUpdates.training_step, so an update whose "
                "loss is not finite would be applied: start from super().training_step(...)"
            )
        self._judge(model, self._by_process(loss, norm))
        return norm

    def _by_process(self, loss: Tensor, norm: Any) -> list[list[float]]:
        """Returns loss and norm of every process: the one time in an update that the device is waited for."""
        if hasattr(norm, "full_tensor"):  # of sharded parameters
            norm = norm.full_tensor()
        norm = torch.as_tensor(0.0 if norm is None else norm)  # None: DeepSpeed has none yet
        pair = torch.stack([loss, norm.to(loss)])[None]
        if self.accelerator.num_processes > 1:
            pair = self.accelerator.gather(pair)
        values: list[list[float]] = pair.tolist()
        return values

    def _judge(self, model: nn.Module, by_process: list[list[float]]) -> None:
        losses, norms = map(list, zip(*by_process, strict=True))
        loss_is_finite, norm_is_finite = (all(map(math.isfinite, values)) for values in (losses, norms))
        scaler = self.accelerator.scaler
        is_scaled = loss_is_finite and scaler is not None and scaler.get_scale() > 1
        if (norm_is_finite and loss_is_finite) or is_scaled:
            self._sum_of_losses, self._summed_losses = self._sum_of_losses + sum(losses), self._summed_losses + 1
            if norm_is_finite:
                self._skipped_in_a_row = 0
            else:
                self._skipped_since_log += 1  # by the scaler
            return
        self._skipped_in_a_row += 1
        for buffer, before in self._statistics:
            buffer.copy_(before)
        found, self._nonfinite_at = self._in_words(losses, norms), ""
        if self.on_nonfinite == "stop" or self._skipped_in_a_row == MOST_IN_A_ROW:
            mean = sum(losses) / len(losses)
            self.log({"loss": mean, "grad_norm": norms[0], "nonfinite_update": self.state.global_step + 1})
            raise NonfiniteUpdateError(f"{found}. {self._advice(model)}")
        model.zero_grad(set_to_none=True)  # an optimizer passes over a parameter without a gradient
        self._skipped_since_log += 1
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"{found}: this update is left out", NonfiniteUpdateWarning, stacklevel=2)

    def _in_words(self, losses: list[float], norms: list[float]) -> str:
        bad = [index for index, pair in enumerate(zip(losses, norms, strict=True)) if not all(map(math.isfinite, pair))]
        process = f" in process {bad[0]} of {len(losses)}" if len(losses) > 1 else ""
        return (
            f"update {self.state.global_step + 1} has a loss of {losses[bad[0]]:.6g} and a gradient of norm "
            f"{norms[bad[0]]:.6g}{process}{self._nonfinite_at}"
        )

    def _advice(self, model: nn.Module) -> str:
        named = chain(model.named_parameters(), model.named_buffers())
        held = next((name for name, weight in named if not weight.isfinite().all()), None)
        if held is not None:
            return (
                f"The weights before it are not finite either ({held}): resume from an earlier checkpoint with a lower "
                f"learning_rate (={self.args.learning_rate:g}), or see what the model was loaded from"
            )
        if self.on_nonfinite == "skip":
            return f"The {MOST_IN_A_ROW - 1} updates before it were left out too; the weights are those of before them"
        if name := self._steps_in_backward():
            return f"{name} has applied it: resume from an earlier checkpoint"
        return (
            f"The weights are still those after {self.state.global_step} updates. Look at the inputs of this update, "
            f'lower learning_rate (={self.args.learning_rate:g}), or leave such updates out: on_nonfinite="skip"'
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Called once, at the end of `train`: one update without a finite loss would hide the mean of all others."""
        if self._has_warned and self._summed_losses:
            mean = self._sum_of_losses / (self._summed_losses * self.accelerator.num_processes)
            self._tr_loss.zero_()
            self._total_loss_scalar = mean * (self.state.global_step - self._initial_global_step)
        return super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call, unused-ignore]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            before = [row["skipped_updates"] for row in self.state.log_history if "skipped_updates" in row]
            skipped = (before[-1] if before else 0) + self._skipped_since_log
            self._skipped_since_log = 0
            if skipped:
                logs["skipped_updates"] = skipped
            if self.is_in_train:  # the Trainer has just taken the sum of its losses from itself
                self._tr_loss.zero_()  # and NaN - NaN is not 0
        super().log(logs, start_time)


def _running_statistics(model: nn.Module | None) -> list[tuple[Tensor, Tensor]]:
    """Returns the buffers that a forward of batch normalization changes, each with a copy of what is in it."""
    layers = [] if model is None else [layer for layer in model.modules() if isinstance(layer, _NormBase)]
    return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]

"""R-Drop in TRL's supervised fine-tuning: `SFTTrainer` with an alpha.

TRL computes the loss of a training step inside the model (its fused output layer), which has no second pass to compare
with. Here a regularized step is that of `RDropMixin`, on the targets of SFT; everything else is TRL's own: the data,
packing, plain steps, evaluation, the model card, and its metrics, of the first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Trainer

try:
    from trl import SFTTrainer
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rdrop.integrations.trl needs {error.name}, which is not installed; in a clone of the repository: "
        "pip install '.[trl]'",
        name=error.name,
    ) from error

from rdrop.integrations.targets import Batch, Target, next_token
from rdrop.integrations.transformers import RDropMixin
from rdrop.linear_loss import chunk_bytes
from rdrop.terms import IGNORE_INDEX


class RDropSFTTrainer(RDropMixin, SFTTrainer):  # type: ignore[misc, unused-ignore]  # where TRL is not installed
    """Trains with R-Drop as `trl.SFTTrainer` does without; `RDropMixin` has the arguments beside TRL's.

    Example::

        lora = LoraConfig(lora_dropout=0.1)
        RDropSFTTrainer(model=model, args=SFTConfig("out"), train_dataset=texts, peft_config=lora, alpha=1.0).train()

    Plain text, completions only, assistant turns only; packed either way, or not. The divergence is taken over the
    tokens that the loss is: what TRL masks counts in neither. Llama, Qwen and Gemma have no dropout of their own unless
    it is set: LoRA's, or `SFTConfig(model_init_kwargs={"attention_dropout": 0.1})` for a model given by its name.

    With `alpha=0`, in updates that `every` leaves out, and in evaluation, the loss is TRL's.

    Raises:
        ValueError: beside those of `RDropMixin`, for `loss_type="dft"` and `use_liger_kernel`; and at the first step,
            for a model that does not keep the sequences of a packed row apart.
    """

    _plain_trainer: ClassVar[type[Trainer]] = SFTTrainer

    def __init__(self, model: Any, args: Any = None, *more: Any, **options: Any) -> None:
        _check_config(args)
        if options.get("unlabeled_dataset") is not None:
            raise ValueError(
                "unlabeled_dataset is not for supervised fine-tuning, where a text is its own label: add it to "
                "train_dataset"
            )
        super().__init__(model, args, *more, **options)
        inner = self._inner_model()
        if hasattr(inner, "router_aux_loss_coef"):  # which the model's own loss reads; TRL changes its config alone
            inner.router_aux_loss_coef = self.router_aux_loss_coef

    def _targets_of_model(self, inputs: Batch) -> list[Target]:
        return next_token(None, inputs)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        self._seen = _Seen()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._is_regularized():
            self._add_metrics(self._seen, inputs)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the R-Drop loss in regularized steps; else TRL's."""
        if model.training:
            inputs = {**inputs, "use_cache": False} | ({"output_router_logits": True} if self.aux_loss_enabled else {})
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _plain_step(
        self, model: nn.Module, inputs: Batch, targets: list[Target], counts: Tensor, outputs_wanted: bool
    ) -> tuple[Tensor, Any]:
        if self._loss_is_overridden():
            return super()._plain_step(model, inputs, targets, counts, outputs_wanted)
        self.current_gradient_accumulation_steps = self._accumulation  # TRL divides the router's loss by it
        computed = SFTTrainer.compute_loss(self, model, inputs, outputs_wanted, counts[0, 0])
        loss, outputs = computed if outputs_wanted else (computed, None)
        terms = {"task_loss": loss.detach()}
        if self.aux_loss_enabled and self.label_smoother is None:  # else TRL's loss is of the logits alone
            part = loss.new_tensor(self.router_aux_loss_coef * self._metrics["train"]["aux_loss"][-1])
            terms = {
                "task_loss": loss.detach() - part / self._accumulation,
                "auxiliary_loss": part / self._accumulation,
            }
        self._term_means.add(self.state.global_step, **terms)
        return loss, outputs

    # ------------------------------------------------------------------------- TRL's metrics, of regularized steps

    def _scored(self, target: Target, rows: Tensor, project: Callable[[Tensor], Tensor]) -> None:
        if self._weight > 0:  # else a forward that only waits for other processes
            self._seen.add(target.labels, rows[: len(target.labels)].detach(), project)

    def _auxiliary(self, outputs: Any) -> Tensor | None:
        if self.aux_loss_enabled and self._weight > 0:
            self._seen.auxiliary.append(outputs["aux_loss"].detach())
        return super()._auxiliary(outputs)

    def _add_metrics(self, seen: _Seen, inputs: Batch) -> None:
        """Adds what TRL logs of a micro-batch, over all processes, to where its `log` looks for it."""
        mask = inputs.get("attention_mask")
        tokens = torch.tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        auxiliary = torch.stack(seen.auxiliary).mean() if seen.auxiliary else seen.sums.new_zeros(())
        local = torch.stack([*seen.sums, tokens.to(seen.sums), auxiliary.to(seen.sums)])
        rows = self.accelerator.gather(local[None])
        labels, entropy, correct, tokens, _ = rows.sum(0).tolist()
        metrics = self._metrics["train"]
        metrics["entropy"].append(entropy / labels if labels else 0.0)
        metrics["mean_token_accuracy"].append(correct / labels if labels else 0.0)
        self._total_train_tokens += int(tokens) // self._tp_size
        metrics["num_tokens"] = [self._total_train_tokens]
        if self.aux_loss_enabled:
            metrics["aux_loss"].append(rows[:, -1].mean().item())


def _check_config(config: Any) -> None:
    loss_type = getattr(config, "loss_type", "nll")
    if loss_type != "nll":
        raise ValueError(
            f"loss_type (={loss_type!r}) weighs each token by its own probability, for which R-Drop has no "
            "counterpart: set loss_type='nll'"
        )
    if getattr(config, "use_liger_kernel", False):
        raise ValueError(
            "use_liger_kernel replaces layers of the model, which was not tried with R-Drop: set it to False. The "
            "logits are not stored anyway"
        )


class _Seen:
    """Sums over the labels of a training step: how many, the entropy of the predictions, how many are right."""

    def __init__(self) -> None:
        self.sums = torch.zeros(3)
        self.auxiliary: list[Tensor] = []

    @torch.no_grad()
    def add(self, labels: Tensor, rows: Tensor, project: Callable[[Tensor], Tensor]) -> None:
        """Adds a micro-batch, a few positions at a time: their logits `project(rows)` are never stored together."""
        counted = labels != IGNORE_INDEX
        rows, labels = rows[counted], labels[counted]
        classes = project(rows[:0]).shape[-1]
        at_once = max(1, chunk_bytes(rows.device.type) // (4 * classes))
        self.sums = self.sums.to(rows.device)
        for start in range(0, len(rows), at_once):
            logits = project(rows[start : start + at_once]).float()
            entropy = torch.special.entr(logits.softmax(-1)).sum()
            correct = (logits.argmax(-1) == labels[start : start + at_once]).sum()
            self.sums += torch.stack([entropy.new_tensor(len(logits)), entropy, correct])

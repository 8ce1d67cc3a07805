"""Refuses, for `RDropMixin`, settings, trainers and batches with which R-Drop would act wrongly or not at all."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

from rdrop.alpha import alpha_at
from rdrop.arguments import checked_alpha
from rdrop.integrations.targets import CLASSIFIERS, Batch, Target, head_of
from rdrop.terms import cross_entropy


def check_method(trainer: Any) -> None:
    """Refuses settings of R-Drop that cannot be, and those that were given to the Trainer's arguments instead."""
    alpha_at(0, 1, checked_alpha(trainer.alpha), trainer.alpha_schedule)
    if not (isinstance(trainer.passes, int) and trainer.passes >= 2):
        raise ValueError(f"passes (={trainer.passes}) must be an integer >= 2; for plain training set alpha=0")
    for name, value in (("every", trainer.every), ("micro_batches", trainer.micro_batches)):
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name} (={value}) must be an integer >= 1")
    given = vars(trainer.args).get("alpha") if hasattr(trainer, "args") else None
    if given is not None and given != trainer.alpha:
        raise ValueError(
            f"args.alpha (={given}) is not read: R-Drop's alpha (={trainer.alpha:g}) is an attribute of the trainer. "
            f"Set trainer.alpha = {given}, and leave args as they are"
        )


def check_compute_loss(trainer: type, mixin: type, plain_trainer: type) -> None:
    """Refuses a class behind the mixin with a loss of its own, which would be replaced silently."""
    classes = trainer.__mro__[trainer.__mro__.index(mixin) + 1 :]
    owner = next(cls for cls in classes if "compute_loss" in vars(cls))
    if owner is not plain_trainer:
        raise TypeError(
            f"{owner.__name__}.compute_loss computes a loss of its own, which R-Drop would replace. Put RDropMixin "
            "before a trainer without one, and override rdrop_targets to say what the model is trained with"
        )


def check_trainer(trainer: Any) -> None:
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func would be ignored: R-Drop needs the loss per label, not one number. Override "
            "rdrop_targets and give it as Target(labels, task_loss=...)"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"{trainer.args.n_gpu} GPUs in one process (DataParallel) average the loss per GPU, not per label; start "
            "one process per GPU: torchrun --nproc-per-node=gpu ..."
        )
    if trainer.is_deepspeed_enabled and trainer.micro_batches > 1:
        raise ValueError(
            f"micro_batches (={trainer.micro_batches}) must be 1 with DeepSpeed, whose every backward is a step; "
            "raise gradient_accumulation_steps instead"
        )
    check_unlabeled(trainer)
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise ValueError("tensor, context and sequence parallelism are not supported: labels would be counted twice")


def check_unlabeled(trainer: Any) -> None:
    dataset, batch_size = trainer.unlabeled_dataset, trainer.unlabeled_batch_size
    if batch_size is not None and not (isinstance(batch_size, int) and batch_size >= 1 and dataset is not None):
        raise ValueError(
            f"unlabeled_batch_size (={batch_size}) must be an integer >= 1, for the examples of unlabeled_dataset "
            f"({'which is not given' if dataset is None else type(dataset).__name__})"
        )
    if dataset is None:
        return
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__") and len(dataset) > 0):
        raise ValueError(
            f"unlabeled_dataset (a {type(dataset).__name__}) must have one example or more, a length and an index: "
            "their order is drawn for every epoch. Load a stream first"
        )
    if name := trainer._steps_in_backward():
        raise ValueError(
            f"unlabeled_dataset must be left out with {name}, whose every backward is a step: examples without labels "
            "have a backward of their own"
        )


def check_label_smoothing(epsilon: float, model: Any, inputs: Batch, targets: Sequence[Target]) -> None:
    if "labels" not in inputs or any(target.task_loss is not cross_entropy for target in targets):
        raise ValueError(
            f"label_smoothing_factor (={epsilon}) is for class labels named 'labels'; "
            f"{type(model).__name__} is trained with something else here: set it to 0"
        )
    of_inputs = head_of(model) in (*CLASSIFIERS, "TOKEN_CLASSIFICATION")  # they make the decoder's inputs of their own
    if model.config.is_encoder_decoder and not of_inputs and "decoder_input_ids" not in inputs:
        raise ValueError(
            "with label_smoothing_factor the Trainer keeps the labels from the model, which then cannot derive its "
            f"decoder_input_ids: {_decoder_inputs_remedy(model)}"
        )


def _decoder_inputs_remedy(model: Any) -> str:
    """Returns how the data collator makes the decoder's inputs, as the model makes them of its labels."""
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return "put them into the batch, as DataCollatorForSeq2Seq(tokenizer, model=model) does"
    modules = [vars(sys.modules[cls.__module__]) for cls in type(model).__mro__]
    shift = next((module["shift_tokens_right"] for module in modules if "shift_tokens_right" in module), None)
    config = model.config.get_text_config()
    pad, start = (getattr(config, name, None) for name in ("pad_token_id", "decoder_start_token_id"))
    if shift is None or pad is None or start is None or len(inspect.signature(shift).parameters) != 3:
        return f"put them into the batch, as {type(model).__name__} makes them, or set label_smoothing_factor=0"
    return (
        f"put them into the batch in the data collator, by `from {shift.__module__} import shift_tokens_right` and "
        f'`batch["decoder_input_ids"] = shift_tokens_right(batch["labels"], {pad}, {start})`, as '
        f"{type(model).__name__} does; or set label_smoothing_factor=0"
    )


def why_not_fused(trainer: Any, model: nn.Module, targets: Sequence[Target], outputs_wanted: bool) -> str | None:
    """Returns why a loss needs the logits whatever the model is, None if it does not."""
    if len(targets) > 1 or not targets[0].is_one_softmax:
        return "rdrop_targets asks for more than cross_entropy and symmetric_kl of `logits`"
    if outputs_wanted:
        return "compute_loss is asked for the outputs too (return_outputs=True), and they would have no logits"
    is_fsdp_1 = trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1
    if trainer.is_deepspeed_enabled or is_fsdp_1:
        return "DeepSpeed and FSDP 1 have the whole output layer at hand only while it runs"
    if getattr(model, "static_graph", False):
        return "DDP with static_graph must see the whole loss inside the model's outputs"
    return None

"""R-Drop in the Hugging Face Trainer (transformers 5.6 and later).

    from rdrop.integrations.transformers import RDropTrainer

    RDropTrainer(model=model, args=args, train_dataset=train, alpha=1.0).train()

Read top to bottom: `Target` says what one output of a model is trained with, `HEADS` gives the targets of every
known model class, `RDropMixin` turns them into the loss of a training step. Evaluation and prediction are untouched.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    import transformers
    from transformers import PreTrainedModel, Seq2SeqTrainer, Trainer
    from transformers.models.auto import modeling_auto as auto
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"rdrop.integrations.transformers needs {error.name}, which is not installed; in a clone of the repository: "
        "pip install '.[transformers]'",
        name=error.name,
    ) from error

from rdrop.check import check_rdrop
from rdrop.dropout import dropout_sources
from rdrop.integrations.transformers.forward import (
    EncoderOnce,
    WithoutHead,
    agree,
    observed_forward,
    output_layer,
    rows_of,
    why_encoder_stays,
    why_head_stays,
    why_logits_are_not_linear,
    why_passes_differ_behind_encoder,
    without_labels,
)
from rdrop.linear_loss import ACCELERATOR_CHUNK_BYTES, CHUNK_BYTES, linear_rdrop_loss
from rdrop.loss import (
    Divergence,
    LossTerms,
    TaskLoss,
    bernoulli_kl,
    binary_cross_entropy,
    cross_entropy,
    rdrop_loss,
    squared_difference,
    squared_error,
    symmetric_kl,
)
from rdrop.passes import repeat_batch, split_passes

if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 6):
    raise ImportError(
        f"rdrop.integrations.transformers needs transformers 5.6 or later, whose Trainer scales accumulated losses as "
        f"this code expects; version {transformers.__version__} is installed: pip install 'transformers>=5.6,<6'"
    )

Batch = dict[str, Any]
IGNORED = -100
CHECKED_MICRO_BATCHES = 8


# ------------------------------------------------------------------------------- what a model is trained with


@dataclass(frozen=True)
class Target:
    """One output of a model and what it is trained with: what `rdrop_loss` needs besides the logits themselves.

    Args:
        labels: class indices `(N, ...)`, aligned with the logits, -100 where nothing is to be learned; or floating
            `(N, ..., K)`, for regression and multi-label classification, where every position counts.
        output: name of the logits `(N, ..., V)` in the model's output.
        task_loss, divergence: as in `rdrop_loss`.
        share: of this target in the loss; the shares of a model's targets add up to 1.
        class_weight: `(V,)`, as `weight` in `F.cross_entropy`: the task loss is the weighted mean.
    """

    labels: Tensor
    output: str = "logits"
    task_loss: TaskLoss = cross_entropy
    divergence: Divergence = symmetric_kl
    share: float = 1.0
    class_weight: Tensor | None = None

    def count(self) -> Tensor:
        """Positions that count, and the sum of their class weights: `(2,)`, the normalizers of the two terms."""
        if self.labels.is_floating_point():
            positions = torch.tensor(self.labels.shape[:-1].numel(), device=self.labels.device)
            return torch.stack([positions, positions]).float()
        ignored = self.labels == IGNORED
        positions = weights = (~ignored).sum()
        if self.class_weight is not None:
            per_label = self.class_weight.to(ignored.device)[self.labels.masked_fill(ignored, 0)]
            weights = per_label.masked_fill(ignored, 0.0).sum()
        return torch.stack([positions.float(), weights.float()])

    def task_losses(self, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The task loss of every position, 0 where ignored; of all passes, if `logits` holds several."""
        labels = repeat_batch(self.labels, len(logits) // len(self.labels), batch_size=len(self.labels))
        task_loss = self.task_loss
        if self.task_loss is cross_entropy:
            weight = None if self.class_weight is None else self.class_weight.to(logits.device)
            task_loss = partial(cross_entropy, label_smoothing=label_smoothing, weight=weight)
        if labels.is_floating_point():
            return task_loss(logits, labels)
        ignored = labels == IGNORED
        logits = logits.masked_fill(ignored[..., None], 0.0)  # what stands there, NaN included, must not matter
        return task_loss(logits, labels.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)


def _required(inputs: Batch, name: str) -> Tensor:
    if not isinstance(inputs.get(name), Tensor):
        raise ValueError(f"R-Drop trains on {name!r}, which this batch lacks; it has {sorted(inputs)}")
    tensor: Tensor = inputs[name]
    return tensor


def sequence_classification(config: Any, inputs: Batch) -> list[Target]:
    """One prediction per example: a class, a yes or no for each of K labels, or K numbers."""
    labels = _required(inputs, "labels")
    kind = config.problem_type
    if kind is None:  # the rule by which the models themselves decide
        indices = labels.dtype in (torch.long, torch.int)
        single = "single_label_classification" if indices else "multi_label_classification"
        kind = "regression" if config.num_labels == 1 else single
    if kind == "single_label_classification":
        return [Target(labels.reshape(-1))]
    rows = labels.reshape(-1, config.num_labels)
    rows = rows if rows.is_floating_point() else rows.float()
    if kind == "regression":
        return [Target(rows, task_loss=squared_error, divergence=squared_difference)]
    return [Target(rows, task_loss=binary_cross_entropy, divergence=bernoulli_kl)]


def aligned(config: Any, inputs: Batch) -> list[Target]:
    """One class per position, labels aligned with the logits: token classification, masked LM, encoder-decoders."""
    return [Target(_required(inputs, "labels"))]


def next_token(config: Any, inputs: Batch) -> list[Target]:
    """Causal LM: the logits at position t predict the label at t + 1."""
    if "shift_labels" in inputs:
        return [Target(inputs["shift_labels"])]
    return [Target(F.pad(_required(inputs, "labels")[..., 1:], (0, 1), value=IGNORED))]


def sequence_to_sequence(config: Any, inputs: Batch) -> list[Target]:
    """`aligned` for encoder-decoders; speech and vision models whose text half is a causal LM shift their labels."""
    return (aligned if config.is_encoder_decoder else next_token)(config, inputs)


def question_answering(config: Any, inputs: Batch) -> list[Target]:
    """Two softmaxes over the T positions of the sequence: where the answer starts and where it ends."""

    def position(name: str, length: int) -> Tensor:
        """As the models: below 0 means 0, beyond the sequence means ignored."""
        found = _required(inputs, name).reshape(-1).clamp(0, length)
        return found.masked_fill(found == length, IGNORED)

    length = inputs["inputs_embeds" if inputs.get("input_ids") is None else "input_ids"].shape[1]
    return [
        Target(position("start_positions", length), output="start_logits", share=0.5),
        Target(position("end_positions", length), output="end_logits", share=0.5),
    ]


def _class_names(*mappings: Mapping[str, Any]) -> frozenset[str]:
    """Of transformers' own lists of model classes, whose entries are a name or several."""
    entries = [entry for mapping in mappings for entry in mapping.values()]
    return frozenset(name for entry in entries for name in ([entry] if isinstance(entry, str) else entry))


LANGUAGE_MODELS: tuple[tuple[frozenset[str], Callable[[Any, Batch], list[Target]]], ...] = (
    (_class_names(auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES), sequence_to_sequence),
    (_class_names(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES), aligned),
    (_class_names(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), next_token),
)
"""Those of `HEADS` whose logits may be left out: `RDropMixin`'s `fused`."""

HEADS = (
    (
        _class_names(
            auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
            auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES,
        ),
        sequence_classification,
    ),
    (_class_names(auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES), aligned),
    (_class_names(auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES), question_answering),
    *LANGUAGE_MODELS,
)
"""Model classes, a subclass counting as its parent, and the targets of their loss; the first row that fits counts.

That a row fits is not taken on trust: in the first steps the model's own loss is compared with the one it predicts.
"""


_HOW_TO_SAY = (
    "subclass the trainer and override rdrop_targets(self, inputs) to return one Target(labels, ...) "
    "per output, e.g. [Target(inputs['labels'])] for one class per example or per position"
)


def targets_of(model: PreTrainedModel, inputs: Batch) -> list[Target]:
    """The targets of a model of a class in `HEADS`; `ValueError` for any other."""
    for name in [cls.__name__ for cls in type(model).__mro__]:
        for names, targets in HEADS:
            if name in names:
                return targets(model.config, inputs)
    raise ValueError(
        f"{type(model).__name__} is none of the model classes whose loss R-Drop knows. Say what it is trained with: "
        f"{_HOW_TO_SAY}"
    )


# ------------------------------------------------------------------------------------------------ the trainer


class RDropMixin(Trainer):
    """R-Drop for a Hugging Face trainer: write it before the trainer's class.

        class MyTrainer(RDropMixin, TheirTrainer): ...

        MyTrainer(model=model, args=args, train_dataset=train, alpha=1.0).train()

    A training step runs one forward of the batch repeated `passes` times and minimizes
    `task_loss + alpha / 2 * divergence` of `rdrop_loss`; both terms are means over the labels that count in the whole
    update, over its accumulation steps and processes. `task_loss` and `divergence` are logged beside `loss`.

    Args:
        alpha: the paper's weight of the divergence; 0 is plain training, by the stock Trainer's own loss wherever that
            is the mean over the whole update.
        passes: m >= 2, dropout masks per example.
        every: k >= 1; only every k-th optimizer update is regularized, the others are plain.
        micro_batches: k >= 1; a regularized step runs as k forwards and backwards, each of 1/k of the batch, repeated.
            The gradient is the same, and with `micro_batches=passes` a forward is no larger than that of a plain step.
            Processes exchange gradients in the last backward only.
        fused: compute the loss of a language model from its hidden states, never storing the logits, in regularized
            steps (`linear_rdrop_loss`). None: where that is exact and the logits would be large. True: always, and
            where it cannot be, a `ValueError` says why. False: never.
        encoder_once: run the encoder of an encoder-decoder on one pass and repeat its output. None: where nothing in
            the encoder is random, so that all passes agree. True and False as for `fused`.

    Raises:
        ValueError, TypeError: at construction, for what would make R-Drop act wrongly or not at all; at the first
            step, for a model in which nothing is random or whose loss is not the one `rdrop_targets` predicts.
    """

    # Our loss is a mean over the whole update already; releases before 5.20 need `training_step` below for that.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        alpha: float,
        passes: int = 2,
        every: int = 1,
        micro_batches: int = 1,
        fused: bool | None = None,
        encoder_once: bool | None = None,
        **kwargs: Any,
    ) -> None:
        _check_settings(alpha, passes, every, micro_batches)
        self.alpha, self.passes, self.every, self.micro_batches = float(alpha), passes, every, micro_batches
        self.fused, self.encoder_once = fused, encoder_once
        _check_compute_loss(type(self))
        super().__init__(*args, **kwargs)
        _check_trainer(self)
        self._begin()

    def rdrop_targets(self, inputs: Batch) -> list[Target]:
        """What the model is trained with on `inputs`, the batch before it is repeated. Override it for another loss.

        Overridden, it replaces the loss inside the model for training, plain steps included; evaluation still reports
        the model's own.
        """
        return targets_of(self._inner_model(), inputs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        return super().train(*args, **kwargs)

    def _begin(self) -> None:
        self._term_means = _TermMeans()
        self._checks_left = CHECKED_MICRO_BATCHES
        self._divides_by_count: bool | None = None  # whether the stock loss does; None: not known yet
        self._without_head: WithoutHead | None = None
        self._encoder_once: EncoderOnce | None = None
        self._why_not: dict[str, str] = {}  # reasons found by running the model, by argument

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The micro-batches of one update and `(targets, 2)` counts: `Target.count` summed over them and the processes.

        The Trainer hands the counts on, as `num_items_in_batch`, to `training_step` and `compute_loss`.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        self._accumulation = len(batches)
        counts = [torch.stack([target.count() for target in self.rdrop_targets(batch)]) for batch in batches]
        total = torch.stack([count.to(device) for count in counts]).sum(0)
        if self._processes() > 1:
            total = self.accelerator.gather(total[None]).sum(0)
        return batches, total

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> Tensor:
        *others, last = self._micro_batches_of(inputs)
        losses = []
        for micro_batch in others:
            with self.accelerator.no_sync(model):
                losses.append(self._training_step(model, micro_batch, num_items_in_batch))
        losses.append(self._training_step(model, last, num_items_in_batch))
        return torch.stack(losses).sum()

    def _micro_batches_of(self, inputs: Batch) -> list[Batch]:
        if self.micro_batches == 1 or not self._is_regularized():
            return [inputs]
        size = len(self.rdrop_targets(inputs)[0].labels)
        rows = torch.arange(size).tensor_split(min(self.micro_batches, size))
        return [rows_of(inputs, int(some[0]), int(some[-1]) + 1, batch_size=size) for some in rows]

    def _is_regularized(self) -> bool:
        return self.alpha > 0 and (self.state.global_step + 1) % self.every == 0

    def _training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any) -> Tensor:
        self.current_gradient_accumulation_steps = 1  # by which the Trainer would divide the loss once more
        self._loss_was_computed = False
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not self._loss_was_computed:
            raise TypeError(
                f"{type(self).__name__}.compute_loss does not call RDropMixin.compute_loss, so R-Drop is off. To add "
                "to the loss, start from super().compute_loss(...); to replace the task loss, override rdrop_targets"
            )
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """In training the R-Drop loss, or the plain one if this update is not regularized; else the stock Trainer's."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if num_items_in_batch is None:
            raise TypeError(
                "no counts of labels: get_batch_samples of this trainer does not call RDropMixin.get_batch_samples"
            )
        self._loss_was_computed = True
        inputs = dict(inputs)
        targets = self.rdrop_targets(inputs)
        if self._is_regularized():
            loss, outputs = self._regularized_step(model, inputs, targets, num_items_in_batch, return_outputs)
        else:
            loss, outputs = self._plain_step(model, inputs, targets, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _regularized_step(
        self, model: nn.Module, inputs: Batch, targets: list[Target], counts: Tensor, outputs_wanted: bool
    ) -> tuple[Tensor, Any]:
        label_smoothing = self._label_smoothing(inputs, targets)
        _check_not_packed(self._inner_model(), inputs)
        if self._checks_left == CHECKED_MICRO_BATCHES:
            _check_recomputation(self.model_wrapped)
        repeated = repeat_batch(inputs, self.passes, batch_size=len(targets[0].labels))
        with self._encoder_forward(inputs, targets):
            if self._is_fused(model, inputs, targets, outputs_wanted):
                outputs, terms = None, [self._fused_terms(model, repeated, targets[0], counts[0], label_smoothing)]
            else:
                outputs = model(**repeated)
                terms = [
                    self._loss_terms(_logits(outputs, target), target, count, label_smoothing)
                    for target, count in zip(targets, counts, strict=True)
                ]
                self._check_model(outputs, targets)
        shares = [[target.share * term for term in terms_] for target, terms_ in zip(targets, terms, strict=True)]
        loss, task_loss, divergence = (torch.stack(term).sum() for term in zip(*shares, strict=True))
        self._term_means.add(self.state.global_step, task_loss=task_loss, divergence=divergence)
        return loss, outputs

    def _loss_terms(self, logits: Tensor, target: Target, count: Tensor, label_smoothing: float) -> LossTerms:
        return rdrop_loss(
            logits,
            target.labels,
            alpha=self.alpha,
            label_smoothing=label_smoothing,
            weight=_class_weight(target, count),
            num_items=count[0] / self._processes(),
            task_loss=target.task_loss,
            divergence=target.divergence,
        )

    # ------------------------------------------------------------------------- less of the forward

    def _fused_terms(
        self, model: nn.Module, repeated: Batch, target: Target, count: Tensor, label_smoothing: float
    ) -> LossTerms:
        """The terms from the hidden states before the output layer, which projects nothing meanwhile."""
        assert self._without_head is not None
        with self._without_head:
            outputs = model(**without_labels(self._inner_model(), repeated))
        hidden, bias = self._without_head.taken(outputs)
        self._check_hidden(hidden, target)
        with self.accelerator.autocast():
            return linear_rdrop_loss(
                hidden,
                self._without_head.layer.weight,
                target.labels,
                bias,
                alpha=self.alpha,
                label_smoothing=label_smoothing,
                class_weight=_class_weight(target, count),
                num_items=count[0] / self._processes(),
            )

    def _is_fused(self, model: nn.Module, inputs: Batch, targets: list[Target], outputs_wanted: bool) -> bool:
        if self.fused is False:
            return False
        why_not = self._why_not.get("fused") or self._why_not_fused(model, targets, outputs_wanted)
        if why_not is None:
            if self.fused is None and not _logits_are_large(self._inner_model(), targets[0], self.passes):
                return False
            why_not = self._inspect_head(inputs, targets[0])
        if why_not is not None and self.fused:
            raise ValueError(
                f"fused=True: the loss of {type(self._inner_model()).__name__} cannot be computed from its hidden "
                f"states: {why_not}. Leave `fused` out to compute it from logits"
            )
        return why_not is None

    def _why_not_fused(self, model: nn.Module, targets: list[Target], outputs_wanted: bool) -> str | None:
        """As far as can be said without running the model."""
        inner = self._inner_model()
        if not any(cls.__name__ in names for cls in type(inner).__mro__ for names, _ in LANGUAGE_MODELS):
            return "it is no language model of transformers (causal, masked or encoder-decoder)"
        target, *others = targets
        usual = (target.output, target.task_loss, target.divergence) == ("logits", cross_entropy, symmetric_kl)
        if others or not usual:
            return "rdrop_targets asks for more than cross_entropy and symmetric_kl of `logits`"
        if outputs_wanted:
            return "compute_loss is asked for the outputs too (return_outputs=True), and they would have no logits"
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return "DeepSpeed and FSDP have the whole output layer at hand only while it runs"
        if getattr(model, "static_graph", False):
            return "DDP with static_graph must see the whole loss inside the model's outputs"
        return why_head_stays(inner)

    def _inspect_head(self, inputs: Batch, target: Target) -> str | None:
        """In the first micro-batches, by one example: is it exact, and is the model's own loss the one we compute?"""
        if self._without_head is not None and self._checks_left == 0:
            return None
        model, inner = self._unwrapped_model(), self._inner_model()
        example, its_target = _example(inputs, target)
        repeated = repeat_batch(example, self.passes, batch_size=1)
        outputs = observed_forward(model, inner, repeated)
        _logits(outputs, its_target)
        why_not = why_logits_are_not_linear(model, inner, repeated, outputs, self.accelerator.autocast)
        if why_not is not None:
            self._why_not["fused"] = why_not
            return why_not
        self._without_head = self._without_head or WithoutHead(output_layer(inner))
        if its_target.count()[0] == 0:
            return None
        if self._loss_is_overridden() or _own_loss_is_known(inner, outputs, [its_target]):
            self._checks_left = max(0, self._checks_left - 1)
        return None

    def _check_hidden(self, hidden: Tensor, target: Target) -> None:
        if not hidden.requires_grad:
            raise ValueError("the hidden states carry no gradient in training: every parameter below them is frozen")
        if self._checks_left > 0:
            _check_randomness(self.model, [hidden], self.passes)

    def _encoder_forward(self, inputs: Batch, targets: list[Target]) -> Any:
        """The context of a regularized forward: the encoder runs once in it, or as ever."""
        if self.encoder_once is False:
            return nullcontext()
        inner = self._inner_model()
        why_not = self._why_not.get("encoder_once") or why_encoder_stays(inner)
        if why_not is None and self._encoder_once is None:
            why_not = self._inspect_encoder(inputs, targets[0])
        if why_not is None:
            return self._encoder_once
        if self.encoder_once:
            raise ValueError(
                f"encoder_once=True: the encoder of {type(inner).__name__} must run for every pass: {why_not}. Leave "
                "`encoder_once` out to let it"
            )
        return nullcontext()

    def _inspect_encoder(self, inputs: Batch, target: Target) -> str | None:
        """By one example: do the passes agree behind the encoder?"""
        inner = self._inner_model()
        example, _ = _example(inputs, target)
        repeated = repeat_batch(example, self.passes, batch_size=1)
        why_not = why_passes_differ_behind_encoder(self._unwrapped_model(), inner, repeated, self.passes)
        if why_not is None:
            self._encoder_once = EncoderOnce(inner.get_encoder(), self.passes)
        else:
            self._why_not["encoder_once"] = why_not
        return why_not

    def _plain_step(self, model: nn.Module, inputs: Batch, targets: list[Target], counts: Tensor) -> tuple[Tensor, Any]:
        """One pass: the stock Trainer's loss where that is the mean over the whole update, else that mean."""
        label_smoothing = self._label_smoothing(inputs, targets)
        alone = self._accumulation == 1 and self._processes() == 1
        if not self._loss_is_overridden() and (alone or self._divides_by_count is not False):
            loss, outputs = self._stock_loss(model, inputs, counts[0, 0] if len(targets) == 1 else None)
            stock = alone or self._divides_by_count
        else:
            outputs, stock = model(**inputs), False
            self._check_model(outputs, targets)
        if not stock:
            loss = self._task_loss(outputs, targets, counts, label_smoothing)
        self._term_means.add(self.state.global_step, task_loss=loss.detach())
        return loss, outputs

    def _stock_loss(self, model: nn.Module, inputs: Batch, count: Tensor | None) -> tuple[Tensor, Any]:
        """The stock Trainer's loss, and once whether `count`, the labels of the whole update, divides it.

        Many models accept a count and ignore it. The signature does not tell; the graph of the loss does.
        """
        count = count if self.model_accepts_loss_kwargs else None
        if count is not None:
            count = count.clone().requires_grad_(self._divides_by_count is None)
        loss, outputs = super().compute_loss(model, dict(inputs), return_outputs=True, num_items_in_batch=count)
        if self._divides_by_count is None:
            self._divides_by_count = count is not None and _depends_on(loss, count)
        return loss, outputs

    def _task_loss(self, outputs: Any, targets: list[Target], counts: Tensor, label_smoothing: float) -> Tensor:
        means = [
            target.share * target.task_losses(_logits(outputs, target), label_smoothing).sum() / weight.clamp(min=1e-12)
            for target, (_, weight) in zip(targets, counts, strict=True)
        ]
        return torch.stack(means).sum() * self._processes()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._term_means.pop(self.accelerator))
        super().log(logs, start_time)

    def _processes(self) -> int:
        """Over how many processes the mean of an update is taken; their gradients are averaged afterwards."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def _unwrapped_model(self) -> Any:
        """The model without DDP and torch.compile around it."""
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _inner_model(self) -> PreTrainedModel:
        """The model without DDP, torch.compile and LoRA around it."""
        model = self._unwrapped_model()
        inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
        return inner

    def _loss_is_overridden(self) -> bool:
        return type(self).rdrop_targets is not RDropMixin.rdrop_targets

    def _label_smoothing(self, inputs: Batch, targets: Sequence[Target]) -> float:
        if self.label_smoother is None:
            return 0.0
        if "labels" not in inputs or any(target.task_loss is not cross_entropy for target in targets):
            raise ValueError(
                f"label_smoothing_factor (={self.label_smoother.epsilon}) is for class labels named 'labels'; "
                f"{type(self._inner_model()).__name__} is trained with something else here: set it to 0"
            )
        if self._inner_model().config.is_encoder_decoder and "decoder_input_ids" not in inputs:
            raise ValueError(
                "with label_smoothing_factor the Trainer keeps the labels from the model, which then cannot derive its "
                "decoder_input_ids: put them into the batch, as DataCollatorForSeq2Seq(tokenizer, model=model) does"
            )
        return float(self.label_smoother.epsilon)

    def _check_model(self, outputs: Any, targets: list[Target]) -> None:
        """In the first micro-batches: is anything random in the model, and is its loss the one we compute?"""
        if self._checks_left == 0 or any(target.count()[0] == 0 for target in targets):
            return
        if self.alpha > 0:
            _check_randomness(self.model, [_logits(outputs, target) for target in targets], self.passes)
        if self._loss_is_overridden() or _own_loss_is_known(self._inner_model(), outputs, targets):
            self._checks_left -= 1


class RDropTrainer(RDropMixin, Trainer):
    """`transformers.Trainer` with R-Drop; arguments of `RDropMixin`.

    RDropTrainer(model=model, args=args, train_dataset=train, alpha=1.0).train()
    """


class RDropSeq2SeqTrainer(RDropMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with R-Drop; arguments of `RDropMixin`.

    args = Seq2SeqTrainingArguments("out", label_smoothing_factor=0.1)
    collator = DataCollatorForSeq2Seq(tokenizer, model=model)
    RDropSeq2SeqTrainer(model=model, args=args, data_collator=collator, train_dataset=train, alpha=5.0).train()
    """


class _TermMeans:
    """Sums of the logged terms since the last log. Each term is the mean over the updates that have it."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._updates: dict[str, set[int]] = {}

    def add(self, update: int, **terms: Tensor) -> None:
        """A micro-batch's part of the terms of one update."""
        for name, value in terms.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
            self._updates.setdefault(name, set()).add(update)

    def pop(self, accelerator: Any) -> dict[str, float]:
        means = {
            name: accelerator.gather(total.reshape(1)).mean().item() / len(self._updates[name])
            for name, total in self._sums.items()
        }
        self._sums, self._updates = {}, {}
        return means


def _class_weight(target: Target, count: Tensor) -> Tensor | None:
    """`num_items` divides both terms, but a weighted mean is divided by the sum of the weights."""
    positions, weights = count
    return None if target.class_weight is None else target.class_weight.to(count.device) * positions / weights


def _logits_are_large(inner: Any, target: Target, passes: int) -> bool:
    """Whether they would fill more than the chunk of memory in which `linear_rdrop_loss` works through them."""
    weight = output_layer(inner).weight
    logits_bytes = passes * target.labels.numel() * len(weight) * weight.dtype.itemsize
    return bool(logits_bytes > CHUNK_BYTES.get(weight.device.type, ACCELERATOR_CHUNK_BYTES))


def _example(inputs: Batch, target: Target) -> tuple[Batch, Target]:
    """The example with the most labels that count."""
    size = len(target.labels)
    row = int((target.labels != IGNORED).view(size, -1).sum(1).argmax())
    example = rows_of(inputs, row, row + 1, batch_size=size)
    return example, replace(target, labels=target.labels[row : row + 1])


# ------------------------------------------------------------------------------------------------ the refusals


def _logits(outputs: Any, target: Target) -> Tensor:
    logits = outputs.get(target.output) if isinstance(outputs, Mapping) else None
    if logits is None:
        found = list(outputs) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}, not a mapping"
        raise ValueError(
            f"R-Drop compares `{target.output}`, and the model's output has none (it has {found}). Switch off what "
            "hides the logits: use_liger_kernel, a fused loss, return_dict=False"
        )
    if not logits.requires_grad:
        raise ValueError(
            f"`{target.output}` carries no gradient in training, so neither would the divergence: the loss was "
            "computed elsewhere (a fused head and loss), or every parameter is frozen"
        )
    return logits  # type: ignore[no-any-return]


def _depends_on(loss: Tensor, count: Tensor) -> bool:
    return torch.autograd.grad(loss, count, retain_graph=True, allow_unused=True)[0] is not None


def _check_settings(alpha: float, passes: int, every: int, micro_batches: int) -> None:
    try:
        math.isfinite(alpha)
    except TypeError:
        raise TypeError(f"alpha (={alpha!r}) must be a number >= 0") from None
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha (={alpha}) must be a finite number >= 0")
    if not (isinstance(passes, int) and passes >= 2):
        raise ValueError(f"passes (={passes}) must be an integer >= 2; for plain training set alpha=0")
    if not (isinstance(every, int) and every >= 1):
        raise ValueError(f"every (={every}) must be an integer >= 1")
    if not (isinstance(micro_batches, int) and micro_batches >= 1):
        raise ValueError(f"micro_batches (={micro_batches}) must be an integer >= 1")


def _check_compute_loss(trainer: type) -> None:
    """A loss of the class the mixin is put before would be replaced silently."""
    classes = trainer.__mro__[trainer.__mro__.index(RDropMixin) + 1 :]
    owner = next(cls for cls in classes if "compute_loss" in vars(cls))
    if owner is not Trainer:
        raise TypeError(
            f"{owner.__name__}.compute_loss computes a loss of its own, which R-Drop would replace. Put RDropMixin "
            "before a trainer without one, and override rdrop_targets to say what the model is trained with"
        )


def _check_trainer(trainer: RDropMixin) -> None:
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
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.non_data_parallel_size > 1:
        raise ValueError("tensor, context and sequence parallelism are not supported: labels would be counted twice")


def _check_not_packed(model: nn.Module, inputs: Batch) -> None:
    """Flash attention finds the sequences of a packed row only if that row is the whole batch."""
    flash = "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    by_position = "position_ids" in inputs and "attention_mask" not in inputs
    if "cu_seq_lens_q" in inputs or (flash and by_position):
        raise ValueError(
            "this batch is packed (padding-free), and repeated it would attend across its sequences; use a collator "
            "that pads, e.g. DataCollatorForLanguageModeling or DataCollatorWithPadding"
        )


def _check_recomputation(model: nn.Module) -> None:
    """Backward must see the dropout masks of the forward: the gradient is wrong otherwise, and nothing shows it."""
    for finding in check_rdrop(model).findings:
        if finding.code in ("checkpoint-rng", "compile-memory-budget"):
            raise ValueError(f"{finding.message} {finding.remedy}")


def _check_randomness(model: Any, logits: list[Tensor], passes: int) -> None:
    """By the modules first: dropout inside LoRA acts, although at the first step its outputs are still equal."""
    sources = dropout_sources(model)
    layerdrop = [source for source in sources if source.active and source.kind == "layerdrop"]
    if layerdrop:
        warnings.warn(
            f"layerdrop ({layerdrop[0]}) drops the same layers in every pass, because the passes share one forward: it "
            "adds nothing to the divergence, dropout inside the layers does",
            stacklevel=2,
        )
    if any(source.active and source.kind != "layerdrop" for source in sources):
        return
    if all(agree(split_passes(tensor.detach(), passes)) for tensor in logits):
        off = ", ".join(str(source) for source in sources[:4]) or "no dropout at all"
        raise ValueError(
            f"nothing is random in {type(model).__name__} while it trains ({off}), so all passes agree and R-Drop does "
            "nothing. Set dropout in the config before the model is built, e.g. from_pretrained(name, "
            "hidden_dropout_prob=0.1, attention_dropout=0.1; the names differ by model), or add LoRA with "
            "lora_dropout, or train with alpha=0"
        )


def _own_loss_is_known(model: nn.Module, outputs: Any, targets: list[Target]) -> bool:
    """Whether the model's own loss is the mean of the losses per position that we compute from its logits.

    Class weights, an auxiliary loss, labels aligned otherwise: all show as another number, unless all positions have
    the same loss, as a fresh head often gives. Then this batch cannot tell, and the next one must.
    """
    if outputs.get("loss") is None:
        raise ValueError(
            f"{type(model).__name__} returned no loss of its own. Say what it is trained with: {_HOW_TO_SAY}"
        )
    own = outputs["loss"].detach()
    expected, spread = torch.zeros_like(own), torch.zeros_like(own)
    for target in targets:
        values = target.task_losses(_logits(outputs, target).detach())
        passes = len(values) // len(target.labels)
        expected = expected + target.share * values.sum() / (passes * target.count()[1])
        counted = values[values > 0]
        if len(counted):
            spread = torch.maximum(spread, counted.max() - counted.min())
    tolerance = max(2e-5, 8 * torch.finfo(own.dtype).eps) * float(expected.abs() + 1e-3)
    if not torch.isclose(own, expected.to(own.dtype), rtol=0, atol=tolerance):
        raise ValueError(
            f"{type(model).__name__} reports a loss of {own.item():.6g}, where the loss known for its class is "
            f"{expected.item():.6g} for the same logits: it is trained with something else (class weights, an "
            f"auxiliary loss, labels aligned otherwise). Say with what: {_HOW_TO_SAY}"
        )
    return bool(spread > 4 * tolerance)

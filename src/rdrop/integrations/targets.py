"""Says what a model is trained with: a `Target` for each output, whichever trainer or loop turns it into a loss.

Needs torch alone; which classes of transformers have which targets is looked up when a model of theirs is asked about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdrop.arguments import check_classes, check_labels, check_options_of_classes, values_may_be_read
from rdrop.linear_loss import linear_rdrop_loss
from rdrop.loss import rdrop_loss
from rdrop.passes import repeat_batch
from rdrop.terms import (
    IGNORE_INDEX,
    Divergence,
    LossTerms,
    TaskLoss,
    at_least_float32,
    bernoulli_kl,
    binary_cross_entropy,
    cross_entropy,
    squared_difference,
    squared_error,
    symmetric_kl,
)

Batch = dict[str, Any]


class UnknownTargetError(ValueError):
    """The targets of a model are not known, or none that R-Drop can act on. Plain training needs none."""


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
        transform: what makes the logits `(N, ..., V)` of the model's output, where that is something else.
        task_divisor: what divides the sum of the task loss over a batch, where that is not the number of positions: of
            a loss per example, the number of examples. Such a loss stands at the first position of its example. Of a
            mean over ignored positions too, the number of all.
    """

    labels: Tensor
    output: str = "logits"
    task_loss: TaskLoss = cross_entropy
    divergence: Divergence = symmetric_kl
    share: float = 1.0
    class_weight: Tensor | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    task_divisor: Tensor | None = None

    def __post_init__(self) -> None:
        if not self.labels.is_floating_point():  # -100 is 156 in uint8
            object.__setattr__(self, "labels", self.labels.long())

    def count(self) -> Tensor:
        """Returns the positions that count, and the sum of their class weights: `(2,)`, what divides the two terms.

        In place of the second stands the `task_divisor`, where there is one.
        """
        positions = weights = count_positions(self.labels)
        if self.task_divisor is not None:
            weights = self.task_divisor
        elif self.class_weight is not None and not self.labels.is_floating_point():
            ignored = self.labels == IGNORE_INDEX
            per_label = at_least_float32(self.class_weight.to(ignored.device))[self.labels.masked_fill(ignored, 0)]
            weights = per_label.masked_fill(ignored, 0.0).sum()
        return torch.stack([positions.float(), weights.float()])

    def weighed_by(self, count: Tensor) -> Target:
        """Returns the target for losses that divide both terms by the positions `count[0]` of a whole update.

        A weighted mean is divided by the sum of the weights, `count[1]`, instead: the class weights make up for it; and
        for a `task_divisor`, the task loss. Where `count[1]` is 0 the sum stays as it is, as in `rdrop_loss`.
        """
        positions, weights = count
        divisor = torch.where(weights == 0, 1.0, weights)
        if self.task_divisor is not None:
            task_loss = self.task_loss
            return replace(self, task_loss=lambda logits, labels: task_loss(logits, labels) * positions / divisor)
        if self.class_weight is None:
            return self
        return replace(self, class_weight=at_least_float32(self.class_weight.to(count.device)) * positions / divisor)

    def logits(self, outputs: Any) -> Tensor:
        """Returns this target's logits of a model's output; `ValueError` where R-Drop could not act on them."""
        logits = outputs.get(self.output) if isinstance(outputs, Mapping) else None
        if logits is None:
            found = list(outputs) if isinstance(outputs, Mapping) else f"a {type(outputs).__name__}, not a mapping"
            raise ValueError(
                f"R-Drop compares `{self.output}`, and the model's output has none (it has {found}). Switch off what "
                "hides the logits: use_liger_kernel, a fused loss, return_dict=False"
            )
        if not logits.requires_grad:
            raise ValueError(
                f"`{self.output}` carries no gradient in training, so neither would the divergence: the loss was "
                "computed elsewhere (a fused head and loss), or every parameter is frozen"
            )
        if self.transform is not None:
            logits = self.transform(logits)
        positions, labeled = logits.shape[1:-1], self.labels.shape[1:]
        if self.task_loss is cross_entropy and not self.labels.is_floating_point() and positions != labeled:
            raise ValueError(
                f"`{self.output}` {tuple(logits.shape)} is one prediction for each of {tuple(positions)} positions, "
                f"and labels {tuple(self.labels.shape)} are for {tuple(labeled)}. Prompt tuning (PEFT's "
                "PromptTuningConfig, PromptEncoderConfig) puts virtual tokens in front of the sequence, for which "
                "there are no labels: take LoRA or prefix tuning. Logits with the classes first belong last: "
                "logits.movedim(1, -1)"
            )
        return logits

    def rdrop_loss(self, logits: Tensor, **options: Any) -> LossTerms:
        """Computes `rdrop_loss` of this target; `options` are its `alpha`, `num_items`, `label_smoothing`, ..."""
        own: Any = {"task_loss": self.task_loss, "divergence": self.divergence, "weight": self.class_weight}
        return rdrop_loss(logits, self.labels, **own, **options)

    def linear_rdrop_loss(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> LossTerms:
        """Computes the same from what the output layer gets, and its weight, where `is_one_softmax`."""
        return linear_rdrop_loss(hidden, weight, self.labels, bias, class_weight=self.class_weight, **options)

    @property
    def is_one_softmax(self) -> bool:
        """Whether its loss is `cross_entropy` with `symmetric_kl` of `logits`, as that of a language model."""
        plain = self.transform is None and self.task_divisor is None
        return plain and (self.output, self.task_loss, self.divergence) == ("logits", cross_entropy, symmetric_kl)

    def plain_loss(self, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Computes the task loss of one pass, without R-Drop, summed over the positions that count.

        For class labels `F.cross_entropy(logits.float(), labels, weight, label_smoothing=..., reduction="sum")`. A
        logit at a position without a label never matters, not even a NaN.

        Raises a ValueError as `rdrop_loss` does for labels; their values are looked at on a CPU only.
        """
        check_classes(self.task_loss, self.divergence, "logits", logits, logits.shape[-1])
        is_class = not self.labels.is_floating_point()
        valid = self.labels != IGNORE_INDEX if is_class else torch.ones_like(logits[..., 0], dtype=torch.bool)
        check_labels(self.task_loss, self.labels, valid, logits.shape[-1])
        check_options_of_classes(self.task_loss, label_smoothing, self.class_weight)
        logits = at_least_float32(logits)
        if self.task_loss is not cross_entropy or self.labels.is_floating_point():
            return self.task_losses(logits, label_smoothing).sum()
        labels = self.labels.long()
        logits = logits.masked_fill((labels == IGNORE_INDEX)[..., None], 0.0)
        options: Any = {"weight": self._weight_for(logits), "label_smoothing": label_smoothing, "reduction": "sum"}
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX, **options)

    def task_losses(self, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Computes the task loss of every position, 0 where ignored; of all passes, if `logits` holds several.

        At least in float32, whatever the logits are, as the language models of transformers compute theirs.
        """
        logits = at_least_float32(logits)
        labels = repeat_batch(self.labels, len(logits) // len(self.labels), batch_size=len(self.labels))
        task_loss = self.task_loss
        if self.task_loss is cross_entropy:
            task_loss = partial(cross_entropy, label_smoothing=label_smoothing, weight=self._weight_for(logits))
        if labels.is_floating_point():
            return task_loss(logits, labels)
        ignored = labels == IGNORE_INDEX
        logits = logits.masked_fill(ignored[..., None], 0.0)  # what stands there, NaN included, must not matter
        return task_loss(logits, labels.masked_fill(ignored, 0)).masked_fill(ignored, 0.0)

    def _weight_for(self, logits: Tensor) -> Tensor | None:
        return None if self.class_weight is None else self.class_weight.to(logits)


def count_positions(labels: Tensor) -> Tensor:
    """Returns how many positions have something to learn: those without label -100; of numbers `(N, ..., K)` all."""
    if labels.is_floating_point():
        return torch.tensor(len(labels) if labels.dim() == 1 else labels.shape[:-1].numel(), device=labels.device)
    return (labels.long() != IGNORE_INDEX).sum()


def ctc_target(
    transcripts: Tensor,
    lengths: Tensor,
    frames: int,
    *,
    blank: int,
    zero_infinity: bool = False,
    output: str = "logits",
) -> Target:
    """Returns the target of connectionist temporal classification: a loss per example, a divergence per frame.

    The task loss is the mean over the examples of `F.ctc_loss`, each divided by the length of its transcript
    (reduction "mean"); the divergence is the mean over the frames that count. With the sum over an example's frames and
    the loss of its whole transcript, as CR-CTC has it with weight w, alpha is `2 w T / L` for T frames and L labels.

    `transcripts` `(N, L)` are padded with a negative number or the blank; of the `frames` of the logits
    `(N, frames, V)` the first `lengths` `(N,)` count.
    """
    counted = (transcripts >= 0) & (transcripts != blank)

    def losses(logits: Tensor, labels: Tensor) -> Tensor:
        passes = len(logits) // len(transcripts)
        inside, labeled = (tensor.repeat(passes) for tensor in (lengths, counted.sum(-1)))
        of_all = transcripts[counted].repeat(passes)
        log_p = logits.log_softmax(-1).transpose(0, 1)
        with torch.backends.cudnn.flags(enabled=False):  # its CTC takes other arguments
            values = F.ctc_loss(log_p, of_all, inside, labeled, blank, "none", zero_infinity)
        return F.pad((values / labeled.clamp_min(1))[:, None], (0, frames - 1))

    labels = torch.zeros(len(transcripts), frames, dtype=torch.long, device=transcripts.device)
    beyond = torch.arange(frames, device=labels.device) >= lengths.to(labels.device)[:, None]
    examples = torch.tensor(len(transcripts), device=labels.device)
    return Target(labels.masked_fill(beyond, IGNORE_INDEX), output, losses, task_divisor=examples)


# ------------------------------------------------------------------------------------------------ of transformers


def sequence_classification(config: Any, inputs: Batch) -> list[Target]:
    """Returns one prediction per example: a class, a yes or no for each of K labels, or K numbers."""
    labels = _required(inputs, "labels")
    kind = config.problem_type
    is_one_class = labels.shape[1:].numel() == 1 and config.num_labels > 1
    if is_one_class and not labels.is_floating_point() and labels.dtype != torch.long:
        raise ValueError(
            f"labels {tuple(labels.shape)} of {labels.dtype} are not taken for classes by the models of transformers; "
            "give them as torch.long, as torch.tensor(int(label)) is"
        )
    if kind is None:  # the rule by which the models themselves decide
        indices = labels.dtype in (torch.long, torch.int)
        single = "single_label_classification" if indices else "multi_label_classification"
        kind = "regression" if config.num_labels == 1 else single
    if kind == "single_label_classification":
        _require_classes(config, labels, "(N,)", labels.shape[1:].numel() == 1, PROBLEM_TYPES)
        return [Target(labels.reshape(-1))]
    of_numbers = kind == "regression"
    wanted = "numbers" if of_numbers else "a number from 0 to 1 for each class"
    wanted = f"{wanted}, (N, {config.num_labels}). {PROBLEM_TYPES}"
    # For several labels the models' own loss is BCEWithLogitsLoss, which refuses integers.
    shape_fits = labels.shape[1:].numel() == config.num_labels and (of_numbers or labels.is_floating_point())
    _require(config, labels, wanted, shape_fits, torch.isfinite if of_numbers else _from_0_to_1)
    rows = labels.reshape(-1, config.num_labels)
    rows = rows if rows.is_floating_point() else rows.float()
    if of_numbers:
        return [Target(rows, task_loss=squared_error, divergence=squared_difference)]
    return [Target(rows, task_loss=binary_cross_entropy, divergence=bernoulli_kl)]


PROBLEM_TYPES = (
    "For one class per example give whole numbers and problem_type='single_label_classification'; for several, a float "
    "0 or 1 for each and 'multi_label_classification'; for numbers, floats and 'regression'"
)


def token_classification(config: Any, inputs: Batch) -> list[Target]:
    """Returns one class per token."""
    labels = _required(inputs, "labels")
    _require_classes(config, labels, "(N, T)", labels.dim() > 1)
    return [Target(labels)]


def _require_classes(config: Any, labels: Tensor, shape: str, shape_fits: bool, advice: str = "") -> None:
    if config.num_labels < 2:
        raise ValueError(
            f"num_labels (={config.num_labels}) with problem_type={config.problem_type!r} is a softmax over one class, "
            "whose loss is 0 for ever: set num_labels=2, or problem_type='regression'"
        )

    def is_class(labels: Tensor) -> Tensor:
        return _between(labels, 0, config.num_labels - 1).logical_or(labels == IGNORE_INDEX)

    wanted = f"whole numbers from 0 to {config.num_labels - 1}, {shape}, or -100 for none. {advice}"
    _require(config, labels, wanted, shape_fits and not labels.is_floating_point(), is_class)


def _require(config: Any, labels: Tensor, wanted: str, shape_fits: bool, fits: Callable[[Tensor], Tensor]) -> None:
    """Refuses labels of another kind than the config says. Values are looked at on a CPU only, which never waits."""
    example = 0
    if shape_fits:
        right = fits(labels) if values_may_be_read(labels) else None
        if right is None or right.all():
            return
        example = int((~right).nonzero()[0, 0])
    raise ValueError(
        f"labels {tuple(labels.shape)} of {labels.dtype}, of which example {example} has {labels[example].tolist()}, "
        f"do not fit problem_type={config.problem_type!r} with num_labels={config.num_labels}, which learns from "
        f"{wanted}".rstrip(". ")
    )


def _from_0_to_1(labels: Tensor) -> Tensor:
    return _between(labels, 0, 1)


def _between(labels: Tensor, low: int, high: int) -> Tensor:
    return (labels >= low) & (labels <= high)


def aligned(config: Any, inputs: Batch) -> list[Target]:
    """Returns one class per position, aligned with the logits: masked LM, encoder-decoders."""
    return [Target(_required(inputs, "labels"))]


def next_token(config: Any, inputs: Batch) -> list[Target]:
    """Returns the next token's class per position, for a causal LM: the logits at t predict the label at t + 1."""
    if "shift_labels" in inputs:
        return [Target(inputs["shift_labels"])]
    return [Target(F.pad(_required(inputs, "labels")[..., 1:], (0, 1), value=IGNORE_INDEX))]


def sequence_to_sequence(config: Any, inputs: Batch) -> list[Target]:
    """Returns `aligned` for encoder-decoders; speech and vision models whose text half is a causal LM shift labels."""
    return (aligned if config.is_encoder_decoder else next_token)(config, inputs)


def choice(config: Any, inputs: Batch) -> list[Target]:
    """Returns one class per example: which of its texts is right, or whether a sentence follows another."""
    return [Target(_required(inputs, "labels").reshape(-1))]


def question_answering(config: Any, inputs: Batch) -> list[Target]:
    """Returns two softmaxes over the T positions of the sequence: where the answer starts and where it ends."""

    def position(name: str, length: int) -> Tensor:
        """Reads a position as the models do: below 0 means 0, beyond the sequence means ignored."""
        found = _required(inputs, name).reshape(-1).clamp(0, length)
        return found.masked_fill(found == length, IGNORE_INDEX)

    length = inputs["inputs_embeds" if inputs.get("input_ids") is None else "input_ids"].shape[1]
    return [
        Target(position("start_positions", length), output="start_logits", share=0.5),
        Target(position("end_positions", length), output="end_logits", share=0.5),
    ]


def semantic_segmentation(config: Any, inputs: Batch) -> list[Target]:
    """Returns one class per pixel: the logits of a coarser grid, brought to the size of the labels `(N, H, W)`.

    SegFormer with one logit per pixel learns yes or no, and divides that loss by all pixels, the ignored ones too.
    """
    labels = _required(inputs, "labels")
    is_binary = config.num_labels == 1 and config.model_type == "segformer"
    if config.num_labels < 2 and not is_binary:
        raise ValueError(f"num_labels (={config.num_labels}) is a softmax over one class: set num_labels=2")
    if getattr(config, "use_auxiliary_head", False):
        raise UnknownTargetError(
            "config.use_auxiliary_head (=True) adds the loss of a second head, whose logits the model does not return: "
            "build the model without it, from_pretrained(name, use_auxiliary_head=False)"
        )

    def to_pixels(logits: Tensor) -> Tensor:
        wide = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
        return wide.movedim(1, -1)

    ignored = labels == getattr(config, "semantic_loss_ignore_index", IGNORE_INDEX)
    if not is_binary:
        return [Target(labels.masked_fill(ignored, IGNORE_INDEX), transform=to_pixels)]
    return [
        Target(
            labels.long().masked_fill(ignored | (labels < 0), IGNORE_INDEX),
            task_loss=partial(binary_cross_entropy),  # no more than a callable, so that whole numbers may be ignored
            divergence=bernoulli_kl,
            transform=to_pixels,
            task_divisor=torch.tensor(labels.numel(), device=labels.device),
        )
    ]


def replaced_token_detection(config: Any, inputs: Batch) -> list[Target]:
    """Returns yes or no for each token that the attention mask shows, as the classes of a softmax over 0 and the logit.

    Its cross-entropy is the binary one, and its symmetric KL that of two Bernoulli distributions.
    """
    labels = _required(inputs, "labels").long()
    mask = inputs.get("attention_mask")
    labels = labels if mask is None else labels.masked_fill(mask != 1, IGNORE_INDEX)
    return [Target(labels, transform=lambda logits: torch.stack([torch.zeros_like(logits), logits], -1))]


def connectionist(model: Any, inputs: Batch) -> list[Target]:
    """Returns the `ctc_target` of a speech model, whose frames are fewer than its inputs."""
    config = model.config
    if config.ctc_loss_reduction != "mean":
        raise UnknownTargetError(
            f"ctc_loss_reduction (={config.ctc_loss_reduction!r}) adds up over the examples of a batch, and R-Drop's "
            "terms are means over an update: set model.config.ctc_loss_reduction = 'mean'"
        )
    names = ("_get_feat_extract_output_lengths", "_get_subsampling_output_length")
    frames_of = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if frames_of is None:
        raise UnknownTargetError(f"{type(model).__name__} does not say how many frames its logits have. {SAY_WHAT}")
    given = _required(inputs, "input_features" if "input_features" in inputs else "input_values")
    mask = inputs.get("attention_mask")
    inside = torch.full((len(given),), given.shape[1], device=given.device) if mask is None else mask.sum(-1)
    lengths = frames_of(inside).long()
    frames = int(frames_of(torch.tensor([given.shape[1]])))
    transcripts = _required(inputs, "labels")
    options = {"blank": config.pad_token_id, "zero_infinity": config.ctc_zero_infinity}
    return [ctc_target(transcripts, lengths, frames, **options)]


def _required(inputs: Batch, name: str) -> Tensor:
    if not isinstance(inputs.get(name), Tensor):
        raise ValueError(f"R-Drop trains on {name!r}, which this batch lacks; it has {sorted(inputs)}")
    tensor: Tensor = inputs[name]
    return tensor


CLASSIFIERS = ("SEQUENCE_CLASSIFICATION", "IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "VIDEO_CLASSIFICATION")
LANGUAGE_MODELS = ("SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "CAUSAL_LM")

HEADS: Mapping[str, Callable[[Any, Batch], list[Target]]] = {
    **dict.fromkeys(CLASSIFIERS, sequence_classification),
    "TOKEN_CLASSIFICATION": token_classification,
    "QUESTION_ANSWERING": question_answering,
    **dict(zip(LANGUAGE_MODELS, (sequence_to_sequence, aligned, next_token), strict=True)),
    "SPEECH_SEQ_2_SEQ": sequence_to_sequence,
    "IMAGE_TEXT_TO_TEXT": sequence_to_sequence,
    "MULTIPLE_CHOICE": choice,
    "NEXT_SENTENCE_PREDICTION": choice,
    "SEMANTIC_SEGMENTATION": semantic_segmentation,
    "REPLACED_TOKEN_DETECTION": replaced_token_detection,
}
"""The targets of the model classes in transformers' list `MODEL_FOR_..._MAPPING_NAMES`, a subclass counting as its
parent; the first list that has the class counts.

That a class is in a list is not taken on trust: `own_loss_is_known` compares the model's own loss with the predicted.
"""

OF_THE_MODEL: Mapping[str, Callable[[Any, Batch], list[Target]]] = {"CTC": connectionist}
"""The same for targets that the model must be asked about, not its config alone."""

OWN_LISTS = {"REPLACED_TOKEN_DETECTION": ("ElectraForPreTraining", "FunnelForPreTraining")}
"""Heads that transformers has no list of."""

_MATCHED = (
    "assigns its predictions to the objects of an image anew in every pass, so that the same place of two passes may "
    "mean different objects: there are no two predictions to compare"
)
REFUSED: Mapping[str, str] = dict.fromkeys(
    ("OBJECT_DETECTION", "ZERO_SHOT_OBJECT_DETECTION", "UNIVERSAL_SEGMENTATION", "IMAGE_SEGMENTATION"), _MATCHED
)
"""Heads that R-Drop cannot act on, with the reason."""

SAY_WHAT = (
    "one Target(labels, ...) per output, e.g. [Target(inputs['labels'])] for one class per example or per position; in "
    "a trainer, override rdrop_targets(self, inputs) to return them"
)


def targets_of(model: nn.Module, inputs: Batch) -> list[Target]:
    """Returns the targets of a model of a class in `HEADS`; `UnknownTargetError` for any other."""
    head = head_of(model)
    if head is not None and head in OF_THE_MODEL:
        return OF_THE_MODEL[head](model, inputs)
    refused = _head_among(REFUSED, model)
    if refused is not None:
        raise UnknownTargetError(f"{type(model).__name__} {REFUSED[refused]}. Train it without R-Drop, alpha=0")
    if head is None:
        raise UnknownTargetError(
            f"{type(model).__name__} is none of the model classes whose loss R-Drop knows. Say what it is trained "
            f"with: {SAY_WHAT}"
        )
    return HEADS[head](model.config, inputs)


def router_loss(model: Any, outputs: Any) -> Tensor | None:
    """Returns the balancing loss of the router of a mixture of experts, as the model adds it to its own; else None.

    With `output_router_logits` the decoders of transformers (Mixtral, Qwen3-MoE) return it as `aux_loss`, and weigh it
    by `router_aux_loss_coef`, which those that read images keep in their `text_config`.
    """
    auxiliary = outputs.get("aux_loss") if isinstance(outputs, Mapping) else None
    text_config = getattr(getattr(model, "config", None), "text_config", None)
    weight = getattr(model, "router_aux_loss_coef", getattr(text_config, "router_aux_loss_coef", None))
    if not isinstance(auxiliary, Tensor) or weight is None:
        return None
    return float(weight) * auxiliary


def head_of(model: nn.Module) -> str | None:
    """Returns which of `HEADS` or `OF_THE_MODEL` a model has, None if none, or if it is none of transformers."""
    return _head_among((*HEADS, *OF_THE_MODEL), model)


def _head_among(heads: Iterable[str], model: nn.Module) -> str | None:
    if not is_of_transformers(model):
        return None
    for cls in type(model).__mro__:
        for head in heads:
            if cls.__name__ in _class_names(head):
                return head
    return None


def is_of_transformers(model: nn.Module) -> bool:
    return any(cls.__module__.partition(".")[0] == "transformers" for cls in type(model).__mro__)


@cache
def _class_names(head: str) -> frozenset[str]:
    """Returns the model classes of a list of transformers, whose entries are a name or several."""
    from transformers.models.auto import modeling_auto

    if head in OWN_LISTS:
        return frozenset(OWN_LISTS[head])
    entries = getattr(modeling_auto, f"MODEL_FOR_{head}_MAPPING_NAMES").values()
    return frozenset(name for entry in entries for name in ([entry] if isinstance(entry, str) else entry))

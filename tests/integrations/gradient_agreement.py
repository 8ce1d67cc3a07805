"""Tiny models, one or more for every head, and the R-Drop loss of each written out by hand in plain PyTorch.

Run it for the table of `docs/transformers.md`: python tests/integrations/gradient_agreement.py
"""

import logging
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    CLIPVisionConfig,
    ConvNextConfig,
    ConvNextForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainingArguments,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from rdrop.integrations.transformers import RDropSeq2SeqTrainer, RDropTrainer

ALPHA = 50.0  # large, so that the divergence's gradient cannot hide behind the task loss's
SHARE_OF_DIVERGENCE = 0.05  # in the loss, at least
VOCABULARY, PAD = 13, 0
LENGTHS = ((5, 3), (2, 6, 4), (3,), (7, 4))  # four micro-batches of ragged sequences, of unequal size too


# ------------------------------------------------------------------------------------------ models and batches


class PassScale(nn.Dropout):
    """Dropout's stand-in, the same in every forward: feature j of pass k is multiplied by `1 + 2 k sin(j)`.

    Features `(N, T, D)` or `(N, D, H, W)`. One factor for all of them would not survive a normalization.
    """

    def __init__(self, passes: int) -> None:
        super().__init__(p=0.1)
        self.passes = passes

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        is_image = x.dim() == 4
        features = x.shape[1 if is_image else -1]
        pattern = torch.arange(features, device=x.device).to(x.dtype).sin().view(-1, *[1, 1] * is_image)
        index = torch.arange(len(x), device=x.device) * self.passes // len(x)
        return x * (1 + pattern * (2 * index.to(x.dtype)).view(-1, *[1] * (x.dim() - 1)))


class PassScaleOfRows(PassScale):
    """The same for a packed row, whose passes follow each other along its positions."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) > 1:
            return super().forward(x)
        positions = x.shape[1]
        by_pass = x[0].unflatten(0, (self.passes, -1)) if positions % self.passes == 0 else x
        return super().forward(by_pass).reshape(x.shape)


def with_pass_scale(model: nn.Module, passes: int = 2) -> nn.Module:
    model.stand_in = PassScale(passes)
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m.num_embeddings == VOCABULARY]
    for module in embeddings or [model.base_model.embeddings]:  # T5 and BART have three, and call two
        module.register_forward_hook(scale_first)
        module.stand_in = [model.stand_in]  # in a list, so that it is no part of the module
    return model


def scale_first(module: Any, inputs: Any, output: Any) -> Any:
    """Swin's embeddings are the first of two outputs."""
    stand_in = module.stand_in[0]
    return (stand_in(output[0]), *output[1:]) if isinstance(output, tuple) else stand_in(output)


ENCODER_DECODERS = (
    *("MarianMTModel", "T5ForConditionalGeneration", "BartForConditionalGeneration"),
    "WhisperForConditionalGeneration",
)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


HEADS_OF_EXPERTS = SIZES | {"num_key_value_heads": 2}


def bert_config(**settings: Any) -> BertConfig:
    return BertConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **(SIZES | NO_DROPOUT | settings))


def marian_config(**settings: Any) -> MarianConfig:
    sizes = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in _MARIAN_HALF.items()}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    tokens = {"pad_token_id": PAD, "eos_token_id": 1, "decoder_start_token_id": 1, "forced_eos_token_id": None}
    return MarianConfig(
        vocab_size=VOCABULARY, d_model=8, max_position_embeddings=16, **(sizes | off | tokens | settings)
    )


_MARIAN_HALF = {"layers": 1, "ffn_dim": 16, "attention_heads": 2}


def gpt2_config(**settings: Any) -> GPT2Config:
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 1, "eos_token_id": 1}
    return GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=8, n_layer=1, n_head=2, **(off | ends | settings))


def llama_config(**settings: Any) -> LlamaConfig:
    return LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=16, **(SIZES | settings))


def t5_config() -> T5Config:
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=PAD,
    )


def bart_config() -> BartConfig:
    sizes = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in _MARIAN_HALF.items()}
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    tokens = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return BartConfig(vocab_size=VOCABULARY, d_model=8, max_position_embeddings=16, **(sizes | off | tokens))


def swin_config() -> SwinConfig:
    off = {"drop_path_rate": 0.0}
    sizes = {"image_size": 8, "patch_size": 2, "embed_dim": 8, "depths": [1], "num_heads": [2], "window_size": 4}
    return SwinConfig(num_channels=1, num_labels=3, **(sizes | off))


def convnext_config() -> ConvNextConfig:
    return ConvNextConfig(num_channels=1, num_labels=3, patch_size=2, hidden_sizes=[8, 8], depths=[1, 1], num_stages=2)


def whisper_config() -> WhisperConfig:
    sizes = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in _MARIAN_HALF.items()}
    lengths = {"num_mel_bins": 4, "max_source_positions": 4, "max_target_positions": 16}
    tokens = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    return WhisperConfig(vocab_size=VOCABULARY, d_model=8, **(sizes | lengths | tokens))


IMAGE_TOKEN = VOCABULARY - 1


def llava_config() -> LlavaConfig:
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **SIZES)
    return LlavaConfig(vision_config=vision, text_config=llama_config(), image_token_index=IMAGE_TOKEN)


def vit_config(**settings: Any) -> ViTConfig:
    return ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **(SIZES | settings))


def ragged(generator: torch.Generator, lengths: Iterable[int]) -> dict[str, Tensor]:
    lengths = torch.tensor(list(lengths))
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(2, VOCABULARY, mask.shape, generator=generator).masked_fill(~mask, PAD)
    return {"input_ids": ids, "attention_mask": mask.long()}


def batches_of(
    add_labels: Callable[[torch.Generator, dict[str, Tensor]], dict[str, Tensor]],
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [add_labels(generator, ragged(generator, lengths)) for lengths in LENGTHS]


def classes(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": torch.randint(0, 3, (len(batch["input_ids"]),), generator=generator)}


def yes_or_no(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": torch.randint(0, 2, (len(batch["input_ids"]), 3), generator=generator).double()}


def number(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": torch.randn(len(batch["input_ids"]), generator=generator, dtype=torch.float64)}


def numbers(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": torch.randn(len(batch["input_ids"]), 3, generator=generator, dtype=torch.float64)}


def tags(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = torch.randint(0, 3, batch["input_ids"].shape, generator=generator)
    return batch | {"labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


def spans(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    n, length = batch["input_ids"].shape
    start = torch.randint(0, length, (n,), generator=generator)
    end = torch.randint(0, length, (n,), generator=generator)
    start[0] = -1  # counts as 0
    end[0] = length + 2  # beyond the sequence: ignored
    return batch | {"start_positions": start, "end_positions": end}


def some_tokens(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    hidden = torch.rand(batch["input_ids"].shape, generator=generator) < 0.5
    hidden[0, 0] = True
    return batch | {"labels": batch["input_ids"].masked_fill(~hidden | (batch["attention_mask"] == 0), -100)}


def every_token(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def translation(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    target = every_token(generator, ragged(generator, [n % 4 + 2 for n in batch["attention_mask"].sum(1).tolist()]))
    labels = target["labels"]
    shifted = torch.cat([torch.ones_like(labels[:, :1]), labels[:, :-1].masked_fill(labels[:, :-1] == -100, PAD)], 1)
    return batch | {"labels": labels, "decoder_input_ids": shifted}


def text_to_text(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in translation(generator, batch).items() if key != "decoder_input_ids"}


def images(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    pixels = torch.randn(len(batch["input_ids"]), 1, 8, 8, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": classes(generator, batch)["labels"]}


def choices(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two texts for each example: its own, and that of the next one."""
    texts = {key: torch.stack([value, value.roll(1, 0).roll(1, 1)], 1) for key, value in batch.items()}
    return texts | {"labels": torch.randint(0, 2, (len(batch["input_ids"]),), generator=generator)}


def yes_or_no_of_one(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": torch.randint(0, 2, (len(batch["input_ids"]),), generator=generator)}


def speech(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    sound = torch.randn(len(batch["input_ids"]), 4, 8, generator=generator, dtype=torch.float64)
    return {"input_features": sound, "labels": every_token(generator, batch)["labels"]}


def images_and_text(generator: torch.Generator, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Example i has i images, of 4 tokens each, in front of its text."""
    n = len(batch["input_ids"])
    ids = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, 2)
    front = torch.full((n, 4 * n), PAD)
    for row in range(n):
        front[row, 4 * (n - row) :] = IMAGE_TOKEN
    ids = torch.cat([front, ids], 1)
    labels = ids.masked_fill((ids == IMAGE_TOKEN) | (ids == PAD), -100)
    pixels = torch.randn(n * (n - 1) // 2, 3, 8, 8, generator=generator, dtype=torch.float64)
    given = {"pixel_values": pixels} if len(pixels) else {}
    return given | {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels}


# ------------------------------------------------------------------------------------- the loss, written by hand

Rows = list[tuple[Tensor, Tensor]]
"""For every output of a model: logits `(m, P, V)` at the P valid positions, and their labels."""


def at_valid(logits: Tensor, labels: Tensor, passes: int) -> tuple[Tensor, Tensor]:
    valid = labels != -100
    return torch.stack([part[valid] for part in logits.chunk(passes)]), labels[valid]


def rows_aligned(output: Any, batch: dict[str, Tensor], passes: int) -> Rows:
    return [at_valid(output.logits, batch["labels"], passes)]


def rows_next_token(output: Any, batch: dict[str, Tensor], passes: int) -> Rows:
    return [at_valid(output.logits[:, :-1], batch["labels"][:, 1:], passes)]


def rows_dense(output: Any, batch: dict[str, Tensor], passes: int) -> Rows:
    logits = torch.stack(output.logits.chunk(passes))
    return [(logits, batch["labels"].view(logits.shape[1:]))]


def rows_spans(output: Any, batch: dict[str, Tensor], passes: int) -> Rows:
    length = batch["input_ids"].shape[1]
    start, end = (batch[name].clamp(min=0) for name in ("start_positions", "end_positions"))
    return [
        at_valid(output.start_logits, torch.where(start < length, start, -100), passes),
        at_valid(output.end_logits, torch.where(end < length, end, -100), passes),
    ]


def softmax_terms(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    task = [F.cross_entropy(one, labels, label_smoothing=label_smoothing, reduction="sum") for one in logits]
    both_ways = [
        F.kl_div(a.log_softmax(-1), b.log_softmax(-1), log_target=True, reduction="sum")
        + F.kl_div(b.log_softmax(-1), a.log_softmax(-1), log_target=True, reduction="sum")
        for a, b in combinations(logits, 2)
    ]
    return torch.stack(task).mean(), torch.stack(both_ways).mean() / 2


def bernoulli_terms(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    k = logits.shape[-1]
    task = [F.binary_cross_entropy_with_logits(one, labels.to(one), reduction="sum") / k for one in logits]
    two_classes = torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1)
    _, divergence = softmax_terms(two_classes.flatten(1, 2), torch.zeros(labels.numel(), dtype=torch.long), 0.0)
    return torch.stack(task).mean(), divergence / k


def squared_terms(logits: Tensor, labels: Tensor, label_smoothing: float) -> tuple[Tensor, Tensor]:
    k = logits.shape[-1]
    task = [F.mse_loss(one, labels.to(one), reduction="sum") / k for one in logits]
    apart = [F.mse_loss(a, b, reduction="sum") / k for a, b in combinations(logits, 2)]
    return torch.stack(task).mean(), torch.stack(apart).mean()


@dataclass(frozen=True)
class Case:
    head: str
    model: Callable[[], nn.Module]
    batches: list[dict[str, Tensor]]
    rows: Callable[[Any, dict[str, Tensor], int], Rows]
    terms: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]] = softmax_terms
    label_smoothing: float = 0.0


def bert_classifier(**settings: Any) -> BertForSequenceClassification:
    return BertForSequenceClassification(bert_config(**settings))


CASES = {
    "sequence classification": Case(
        "BertForSequenceClassification", lambda: bert_classifier(num_labels=3), batches_of(classes), rows_aligned
    ),
    "sequence classification, label smoothing": Case(
        "BertForSequenceClassification",
        lambda: bert_classifier(num_labels=3),
        batches_of(classes),
        rows_aligned,
        label_smoothing=0.1,
    ),
    "multi-label": Case(
        "BertForSequenceClassification",
        lambda: bert_classifier(num_labels=3, problem_type="multi_label_classification"),
        batches_of(yes_or_no),
        rows_dense,
        bernoulli_terms,
    ),
    "regression": Case(
        "BertForSequenceClassification",
        lambda: bert_classifier(num_labels=1),
        batches_of(number),
        rows_dense,
        squared_terms,
    ),
    "regression, 3 outputs": Case(
        "BertForSequenceClassification",
        lambda: bert_classifier(num_labels=3, problem_type="regression"),
        batches_of(numbers),
        rows_dense,
        squared_terms,
    ),
    "token classification": Case(
        "BertForTokenClassification",
        lambda: BertForTokenClassification(bert_config(num_labels=3)),
        batches_of(tags),
        rows_aligned,
    ),
    "question answering": Case(
        "BertForQuestionAnswering", lambda: BertForQuestionAnswering(bert_config()), batches_of(spans), rows_spans
    ),
    "multiple choice": Case(
        "BertForMultipleChoice", lambda: BertForMultipleChoice(bert_config()), batches_of(choices), rows_aligned
    ),
    "next sentence": Case(
        "BertForNextSentencePrediction",
        lambda: BertForNextSentencePrediction(bert_config()),
        batches_of(yes_or_no_of_one)[::-1],
        rows_aligned,
    ),
    "speech to text": Case(
        "WhisperForConditionalGeneration",
        lambda: WhisperForConditionalGeneration(whisper_config()),
        batches_of(speech),
        rows_aligned,
    ),
    "images and text": Case(
        "LlavaForConditionalGeneration",
        lambda: LlavaForConditionalGeneration(llava_config()),
        batches_of(images_and_text),
        rows_next_token,
    ),
    "masked LM": Case("BertForMaskedLM", lambda: BertForMaskedLM(bert_config()), batches_of(some_tokens), rows_aligned),
    "causal LM": Case(
        "GPT2LMHeadModel", lambda: GPT2LMHeadModel(gpt2_config()), batches_of(every_token), rows_next_token
    ),
    "causal LM, Llama": Case(
        "LlamaForCausalLM", lambda: LlamaForCausalLM(llama_config()), batches_of(every_token), rows_next_token
    ),
    "causal LM, label smoothing": Case(
        "LlamaForCausalLM",
        lambda: LlamaForCausalLM(llama_config()),
        batches_of(every_token),
        rows_next_token,
        label_smoothing=0.1,
    ),
    "sequence to sequence": Case(
        "T5ForConditionalGeneration",
        lambda: T5ForConditionalGeneration(t5_config()),
        batches_of(text_to_text),
        rows_aligned,
    ),
    "sequence to sequence, label smoothing": Case(
        "MarianMTModel",
        lambda: MarianMTModel(marian_config()),
        batches_of(translation),
        rows_aligned,
        label_smoothing=0.1,
    ),
    "sequence to sequence, BART": Case(
        "BartForConditionalGeneration",
        lambda: BartForConditionalGeneration(bart_config()),
        batches_of(text_to_text),
        rows_aligned,
    ),
    "image classification": Case(
        "ViTForImageClassification", lambda: ViTForImageClassification(vit_config()), batches_of(images), rows_aligned
    ),
    "image classification, Swin": Case(
        "SwinForImageClassification",
        lambda: SwinForImageClassification(swin_config()),
        batches_of(images),
        rows_aligned,
    ),
    "image classification, ConvNeXt": Case(
        "ConvNextForImageClassification",
        lambda: ConvNextForImageClassification(convnext_config()),
        batches_of(images),
        rows_aligned,
    ),
}


def build(case: Case, passes: int = 2, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = with_pass_scale(case.model(), passes).to(dtype)
    for parameter in model.parameters():  # as drawn, tiny models hardly react to anything
        parameter.data += torch.randn_like(parameter) * 0.3
    return model


def cast(batch: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def loss_by_hand(
    case: Case,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    *,
    alpha: float,
    passes: int,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss, task loss and divergence of one update; `passes=1` is the plain loss.

    A divergence that is too small beside the task loss would hide its own errors, so that is an AssertionError.
    """
    model.train()
    outputs = []
    for batch in batches:
        output = model(**{key: torch.cat([value] * passes) for key, value in batch.items()})
        outputs.append(case.rows(output, batch, passes))
    task_loss, divergence = torch.zeros(()), torch.zeros(())
    for micro_batches in zip(*outputs, strict=True):  # for every output of the model, all its micro-batches
        count = sum(len(labels) for _, labels in micro_batches)
        for logits, labels in micro_batches:
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            logits = logits.expand(2, *logits.shape[1:]) if passes == 1 else logits
            task, apart = case.terms(logits, labels, label_smoothing)
            task_loss = task_loss + task / count / len(outputs[0])
            divergence = divergence + apart / count / len(outputs[0])
    loss = task_loss + alpha / 2 * divergence
    assert passes == 1 or alpha / 2 * divergence > SHARE_OF_DIVERGENCE * loss, (task_loss.item(), divergence.item())
    return loss, task_loss, divergence


# ---------------------------------------------------------------------------------------------- one Trainer step


class Gradients(TrainerCallback):
    """The gradients of every update, as the optimizer is about to get them."""

    def __init__(self) -> None:
        self.updates: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.updates.append(gradients_of(model))


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def arguments(folder: str, seq2seq: bool = False, **settings: Any) -> TrainingArguments:
    """A "dataset" of ready micro-batches, one per step."""
    quiet = {
        "use_cpu": True,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "remove_unused_columns": False,
        "per_device_train_batch_size": 1,
        "max_grad_norm": 0,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 0.01,
    }
    return (Seq2SeqTrainingArguments if seq2seq else TrainingArguments)(folder, **(quiet | settings))


def only_item(items: list[Any]) -> Any:
    return dict(items[0])


def train(
    trainer_class: type,
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    folder: str,
    settings: Any = None,
    **method: Any,
) -> Any:
    """The trainer after training; its gradients are `trainer.gradients`, one entry per update."""
    gradients = Gradients()
    trainer = trainer_class(
        model=model,
        args=arguments(folder, issubclass(trainer_class, RDropSeq2SeqTrainer), **(settings or {})),
        train_dataset=batches,
        data_collator=only_item,
        callbacks=[gradients],
        **method,
    )
    trainer.train()
    trainer.gradients = gradients.updates
    return trainer


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Norm of the difference relative to the norm of the expected gradient, over all parameters together."""
    assert found.keys() == expected.keys()
    difference = torch.stack([(found[name] - expected[name]).double().norm() for name in expected]).norm()
    return float(difference / torch.stack([g.double().norm() for g in expected.values()]).norm())


def agreement(
    case: Case,
    accumulation: int,
    *,
    passes: int = 2,
    dtype: torch.dtype = torch.float64,
    autocast: bool = False,
    folder: str,
) -> float:
    """How far the gradient of one Trainer update is from the one computed by hand."""
    batches = [cast(batch, dtype) for batch in case.batches[:accumulation]]
    trainer_class = RDropSeq2SeqTrainer if case.head in ENCODER_DECODERS else RDropTrainer
    settings = {
        "gradient_accumulation_steps": accumulation,
        "label_smoothing_factor": case.label_smoothing,
        "bf16": autocast,
    }
    model = build(case, passes, dtype)
    trained = train(trainer_class, model, batches, folder, settings, alpha=ALPHA, passes=passes)
    model = build(case, passes, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, *_ = loss_by_hand(case, model, batches, alpha=ALPHA, passes=passes, label_smoothing=case.label_smoothing)
    loss.backward()
    return worst_difference(trained.gradients[0], gradients_of(model))


def main() -> None:
    logging.disable(logging.WARNING)
    sys.stdout.write(
        "| head | model | accumulation 1 | accumulation 4 | 3 passes | float32 |\n|---|---|---|---|---|---|\n"
    )
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            measured = [
                agreement(case, 1, folder=folder),
                agreement(case, 4, folder=folder),
                agreement(case, 4, passes=3, folder=folder),
                agreement(case, 4, dtype=torch.float32, folder=folder),
            ]
        row = [name, f"`{case.head}`", *(f"{value:.0e}" for value in measured)]
        sys.stdout.write(f"| {' | '.join(row)} |\n")


if __name__ == "__main__":
    main()

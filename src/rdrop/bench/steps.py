"""Measures what a training step costs.

A step is forward, loss, backward and AdamW, of a translation model (Marian, 6 + 6 layers of width 512) with a small and
a large vocabulary, and of an encoder classifier (BERT); dropout 0.1, label smoothing 0.1, alpha 5, ragged lengths.
Ours are steps of `RDropTrainer`, its own work included. Time is compared with a plain step on twice the batch, the
least that two passes can cost; memory (of gradients and activations, not of weights) with one on the batch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MarianConfig,
    MarianMTModel,
    Seq2SeqTrainingArguments,
)

from rdrop.bench.measure import DTYPES, Call, Conditions, measure, record
from rdrop.bench.records import Record
from rdrop.bench.rows import ALPHA, SMOOTHING, official
from rdrop.dropout import dropout_sources
from rdrop.integrations.transformers.trainer import CHECKED_MICRO_BATCHES, RDropSeq2SeqTrainer
from rdrop.passes import repeat_batch
from rdrop.terms import IGNORE_INDEX

COMPARED_WITH = ("plain", "plain_twice_the_batch")
VOCABULARIES = (10_000, 50_000)
BERT_VOCABULARY = 30_522

Batch = dict[str, Tensor]
Way = Callable[[], object]
"""Computes the gradients of one step."""


@dataclass(frozen=True)
class StepSize:
    """Examples of a batch before they are repeated, tokens of the longest, layers of each half, width of the model."""

    batch: int = 32
    length: int = 32
    layers: int = 6
    width: int = 512


# ---------------------------------------------------------------------------------------------- models and batches


def translation_model(classes: int, size: StepSize) -> nn.Module:
    heads = max(1, size.width // 64)
    config = MarianConfig(
        vocab_size=classes,
        d_model=size.width,
        encoder_layers=size.layers,
        decoder_layers=size.layers,
        encoder_ffn_dim=2 * size.width,
        decoder_ffn_dim=2 * size.width,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        dropout=0.1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        forced_eos_token_id=1,
        max_position_embeddings=max(512, size.length),
        scale_embedding=True,
    )
    return MarianMTModel(config)


def classification_model(size: StepSize) -> nn.Module:
    config = BertConfig(
        vocab_size=BERT_VOCABULARY,
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=max(1, size.width // 64),
        intermediate_size=4 * size.width,
        max_position_embeddings=max(512, size.length),
    )
    config.num_labels = 2
    return BertForSequenceClassification(config)


def ragged_tokens(size: StepSize, classes: int) -> tuple[Tensor, Tensor]:
    """Returns tokens and their mask: lengths from half of the longest to all of it."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(size.length // 2, size.length + 1, (size.batch, 1), generator=g)
    mask = torch.arange(size.length) < lengths
    return torch.randint(2, classes, mask.shape, generator=g).masked_fill(~mask, 0), mask


def translation_batch(classes: int, size: StepSize) -> Batch:
    tokens, mask = ragged_tokens(size, classes)
    before = F.pad(tokens[:, :-1], (1, 0))
    labels = tokens.flip(0).masked_fill(~mask.flip(0), IGNORE_INDEX)
    return {"input_ids": tokens, "attention_mask": mask.long(), "decoder_input_ids": before.flip(0), "labels": labels}


def classification_batch(size: StepSize) -> Batch:
    tokens, mask = ragged_tokens(size, BERT_VOCABULARY)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": torch.arange(size.batch) % 2}


# ---------------------------------------------------------------------------------------------- the ways of a step


def plain(model: nn.Module, batch: Batch) -> Tensor:
    logits, labels = model(**without_labels(batch)).logits, batch["labels"]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), label_smoothing=SMOOTHING)


def official_form(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(**repeat_batch(without_labels(batch))).logits
    return official(logits.flatten(0, -2), batch["labels"].flatten())


def without_labels(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name != "labels"}


def ours(model: nn.Module, batch: Batch, conditions: Conditions, **method: Any) -> Way:
    """Returns forward and backward of the Trainer, as after its first steps, in which it looks at the model."""
    with tempfile.TemporaryDirectory() as folder:
        args = Seq2SeqTrainingArguments(
            folder,
            use_cpu=conditions.device == "cpu",
            bf16=conditions.dtype == "bfloat16",
            report_to=[],
            label_smoothing_factor=SMOOTHING,
        )
        trainer = RDropSeq2SeqTrainer(model=model, args=args, alpha=ALPHA, **({"encoder_once": False} | method))

    def step(batch: Batch, counts: Any) -> Tensor:
        return trainer.training_step(model, batch, counts)

    few = {name: value[:2] for name, value in batch.items()}
    device = torch.device(conditions.device)
    for _ in range(CHECKED_MICRO_BATCHES):
        step(few, trainer.get_batch_samples(iter([few]), 1, device)[1])
    model.zero_grad(set_to_none=True)
    return partial(step, batch, trainer.get_batch_samples(iter([batch]), 1, device)[1])


def ways(model: nn.Module, batch: Batch, conditions: Conditions) -> dict[str, Way]:
    """Returns the ways by name, in the order of the tables."""
    trainer = partial(ours, model, batch, conditions)
    table: dict[str, Callable[[], Way]] = {
        "plain": lambda: partial(_backward, plain, model, batch, conditions),
        "plain_twice_the_batch": lambda: partial(_backward, plain, model, repeat_batch(batch), conditions),
        "official": lambda: partial(_backward, official_form, model, batch, conditions),
        "ours_from_logits": lambda: trainer(fused=False),
        "ours_from_logits_micro_batches": lambda: trainer(fused=False, micro_batches=2),
    }
    if isinstance(model, MarianMTModel):
        table |= {
            "ours_fused": lambda: trainer(fused=True),
            "ours_fused_micro_batches": lambda: trainer(fused=True, micro_batches=2),
            "ours_fused_encoder_without_dropout": lambda: _quiet(model.get_encoder(), trainer, fused=True),
            "ours_fused_encoder_once": lambda: _quiet(model.get_encoder(), trainer, fused=True, encoder_once=True),
        }
    return {name: build() for name, build in conditions.chosen(table, COMPARED_WITH).items()}


def _quiet(encoder: nn.Module, trainer: Callable[..., Way], **method: Any) -> Way:
    """Returns a step in which the encoder drops nothing."""
    with without_dropout(encoder):
        way = trainer(**method)

    def inside() -> object:
        with without_dropout(encoder):
            return way()

    return inside


def _backward(loss: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch, by: Conditions) -> None:
    with torch.autocast(by.device, DTYPES[by.dtype], enabled=by.dtype != "float32"):
        value = loss(model, batch)
    value.backward()  # type: ignore[no-untyped-call]


@contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    modules = dict(module.named_modules())
    sources = [source for source in dropout_sources(module) if source.rate > 0]
    for source in sources:
        setattr(modules[source.module], source.attribute, 0.0)
    try:
        yield
    finally:
        for source in sources:
            setattr(modules[source.module], source.attribute, source.rate)


# ---------------------------------------------------------------------------------------------- measuring


def measure_steps(classes: int | None, size: StepSize, conditions: Conditions) -> list[Record]:
    """Returns one record for each way, of the translation model with `classes` or, with None, of the classifier."""
    torch.manual_seed(0)
    device = torch.device(conditions.device)
    if classes is None:
        name, model, batch = "classification", classification_model(size), classification_batch(size)
    else:
        name, model, batch = "translation", translation_model(classes, size), translation_batch(classes, size)
    model.to(device).train()
    batch = {name: value.to(device) for name, value in batch.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    conditions.say("building")
    table = ways(model, batch, conditions)
    measured = measure(_steps(table, optimizer), conditions)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"model": name, "classes": classes or 2, "parameters": parameters}
    facts |= {"pairs": size.batch, "length": size.length, "layers": size.layers, "features": size.width}
    what = "one training step with AdamW"
    return [record("steps", way, what, measured[way], conditions, **facts) for way in table]


def _steps(table: Mapping[str, Way], optimizer: torch.optim.Optimizer) -> dict[str, Callable[[], Call]]:
    def step(way: Way) -> None:
        way()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {name: lambda way=way: partial(step, way) for name, way in table.items()}  # type: ignore[misc]

"""Encoders of transformers with a classifier on top, and their tokenizers: pre-trained, or small ones from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import processors
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.tasks import pretrained
from rdrop.experiments.tasks.tokenizing import learned_bpe

if TYPE_CHECKING:
    from rdrop.experiments.tasks.text_classification.recipes import TextClassificationModel

PAD, UNKNOWN, START, END, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"

RATE_NAMES = {
    "dropout": (
        *("hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_rate"),
        *("embedding_dropout", "embed_dropout", "embd_pdrop", "emb_pdrop"),
        *("mlp_dropout", "resid_pdrop", "resid_dropout", "residual_dropout"),
        # Before the output layer. Where one of these is None, transformers takes the rate of the hidden states.
        *("classifier_dropout", "classifier_dropout_prob", "classifier_dropout_rate", "cls_dropout"),
        *("seq_classif_dropout", "pooler_dropout", "summary_first_dropout", "summary_last_dropout"),
    ),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
}
"""What the configurations of transformers call each of our rates. One may have several of them."""


def learned_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Learns a lower-cased `learned_bpe` from `texts`, which frames them as BERT does."""
    tokenizer = learned_bpe(texts, vocabulary, [PAD, UNKNOWN, START, END, MASK], unknown=UNKNOWN, lowercase=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        pair=f"{START} $A {END} $B:1 {END}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (START, END)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        mask_token=MASK,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        split_special_tokens=True,  # "[SEP]" in a text is these five characters
    )


def pretrained_tokenizer(name: str) -> Any:
    """Loads the tokenizer of an encoder, which must have a padding token."""
    tokenizer = pretrained.pretrained_tokenizer(name, _pretrained_config(name))
    pretrained.require_padding(tokenizer, name)
    return tokenizer


def configuration(model: TextClassificationModel, tokenizer: Any, classes: Sequence[str], max_length: int) -> Any:
    """Returns the model's configuration with the recipe's rates and the names of the classes; none: one number."""
    if model.name is None:
        config: Any = _small_config(model, tokenizer, max_length)
    else:
        config = _pretrained_config(model.name)
    config.id2label = dict(enumerate(classes or ["LABEL_0"]))
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = "single_label_classification" if classes else "regression"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    pretrained.set_rates(config, model.rates(), RATE_NAMES)
    return config


def _pretrained_config(name: str) -> Any:
    return pretrained.pretrained_config(name, AutoModelForSequenceClassification, "text classifier")


def classifier(name: str | None, config: Any) -> nn.Module:
    """Loads the pre-trained weights in fp32 under a new output layer; without a name, all weights are new."""
    if name is None:
        return BertForSequenceClassification(config)
    return pretrained.pretrained_classifier(name, AutoModelForSequenceClassification, config)


@torch.no_grad()
def start_at(model: nn.Module, number: float, name: str | None) -> None:
    """Sets the bias of the output layer of a model of numbers, so that it begins by saying `number` of every text."""
    *_, output = (module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1)
    bias = getattr(output, "bias", None)
    if bias is None:
        rule = f"must be false: the output layer of {name or 'this model'} has no bias"
        raise RecipeError("model.start_at_mean", rule, value=True)
    bias.fill_(number)


def _small_config(model: TextClassificationModel, tokenizer: Any, max_length: int) -> BertConfig:
    sizes = (model.layers, model.hidden_size, model.heads, model.intermediate_size)
    layers, hidden_size, heads, intermediate_size = (size or 0 for size in sizes)  # the recipe: none is None
    return BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=max_length,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate_size,
        initializer_range=hidden_size**-0.5,  # BERT's 0.02 is for a width of 768
        pad_token_id=tokenizer.pad_token_id,
    )

"""Encoders of transformers with a classifier on top, and their tokenizers: pre-trained, or small ones from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rdrop.experiments.recipe import RecipeError
from rdrop.experiments.tasks.pretrained import loading, set_rates

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


def learned_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A lower-cased byte-level BPE of at most `vocabulary` entries, learned from `texts`, framed as BERT frames texts.

    It knows any text: the 256 bytes are always in it. The same texts give the same tokenizer, which BERT's own
    WordPiece does not promise: its trainer numbers the letters inside words in an order that changes from run to run.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # the first word is as any other
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, UNKNOWN, START, END, MASK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, split_special_tokens=True, trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        raise RecipeError("model.name", "its tokenizer must have a padding token", value=name)
    return tokenizer


def configuration(model: TextClassificationModel, tokenizer: Any, classes: Sequence[str], max_length: int) -> Any:
    """The model's configuration, with our dropout rates and the names of the classes; no classes: one number."""
    config = _pretrained_config(model.name) if model.name else _small_config(model, tokenizer, max_length)
    config.id2label = dict(enumerate(classes or ["LABEL_0"]))
    config.label2id = {name: index for index, name in config.id2label.items()}
    config.problem_type = "single_label_classification" if classes else "regression"
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    set_rates(config, model.rates(), RATE_NAMES)
    return config


def classifier(name: str | None, config: Any) -> nn.Module:
    """The pre-trained weights in fp32 under a new output layer; without a name, all weights are new."""
    if name is None:
        return BertForSequenceClassification(config)
    with loading(name):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    body = f"{model.base_model_prefix}."
    lost = sorted(key for key in report["missing_keys"] if key.startswith(body) and "pooler" not in key)
    if lost:
        raise RecipeError("model.name", f"its file has no weights for {len(lost)} tensors, e.g. {lost[0]}", value=name)
    encoder: nn.Module = model
    return encoder


def _pretrained_config(name: str) -> Any:
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise RecipeError("model.name", f"transformers has no text classifier of {config.model_type}", value=name)
    return config


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

"""Sequence-to-sequence models of transformers with their tokenizers: pre-trained ones, and small ones from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from rdrop.experiments.recipe import RecipeError
from rdrop.experiments.tasks.pretrained import loading

if TYPE_CHECKING:
    from rdrop.experiments.tasks.summarization.recipes import SummarizationModel

START, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"

RATE_NAMES = {
    "dropout": ("dropout", "dropout_rate"),
    "attention_dropout": ("attention_dropout",),
    "activation_dropout": ("activation_dropout",),
}
"""What the configurations of transformers call each of our rates."""

MATCH, COPY = 1.2, 1.5
"""How strongly the cross-attention of a new model prefers what matches, and passes it on: times the identity."""

# ---------------------------------------------------------------------------------------------------- from scratch


def learned_tokenizer(texts: Iterable[str], vocabulary: int, *, lowercase: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocabulary` entries, learned from `texts`. It ends every text with `</s>`.

    It knows any text: the 256 bytes and four special tokens are always in it. The same texts give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)  # the first word is as any other
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, PAD, END, UNKNOWN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    end = (END, tokenizer.token_to_id(END))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[end])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=START,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        split_special_tokens=True,  # "</s>" in a text is these four characters
    )


def small_config(model: SummarizationModel, tokenizer: Any, positions: int) -> BartConfig:
    """BART's architecture of the size that the recipe says, for the tokens of `learned_tokenizer`."""
    assert model.hidden_size is not None  # the recipe has seen to it
    return BartConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=positions,
        d_model=model.hidden_size,
        encoder_layers=model.layers,
        decoder_layers=model.layers,
        encoder_attention_heads=model.heads,
        decoder_attention_heads=model.heads,
        encoder_ffn_dim=model.intermediate_size,
        decoder_ffn_dim=model.intermediate_size,
        init_std=model.hidden_size**-0.5,  # BART's 0.02 is for a width of 1024; a small model would hardly attend
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )


def small_model(config: BartConfig) -> BartForConditionalGeneration:
    """A new model that begins as one which attends, from each place of the summary, to the same place of the document.

    From some thousand pairs a model that begins by attending to everything alike learns what subjects look like, and
    little of what its document says. All but the cross-attention and the decoder's positions begins as BART does.
    """
    model = BartForConditionalGeneration(config)
    encoder, decoder = model.model.encoder, model.model.decoder
    with torch.no_grad():
        decoder.embed_positions.weight.copy_(encoder.embed_positions.weight)
        for layer in decoder.layers:
            attention = layer.encoder_attn
            for projection, gain in ((attention.q_proj, MATCH), (attention.k_proj, MATCH), (attention.v_proj, COPY)):
                nn.init.eye_(projection.weight).mul_(gain)
            nn.init.eye_(attention.out_proj.weight).mul_(COPY)
    return model


# ----------------------------------------------------------------------------------------------------- pre-trained


def pretrained_tokenizer(name: str) -> Any:
    with loading(name):
        return AutoTokenizer.from_pretrained(name, split_special_tokens=True, trust_remote_code=False)


def pretrained_config(name: str) -> Any:
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if type(config) not in AutoModelForSeq2SeqLM._model_mapping:
        raise RecipeError("model.name", f"is a {config.model_type}, and not a sequence-to-sequence model", value=name)
    if config.decoder_start_token_id is None:
        raise RecipeError("model.name", "its configuration must have a decoder_start_token_id", value=name)
    return config


def seq2seq_model(name: str | None, config: Any) -> nn.Module:
    """The pre-trained weights in fp32, whatever type they are stored in; without a name, new ones."""
    if name is None:
        return small_model(config)
    with loading(name):
        model: nn.Module = AutoModelForSeq2SeqLM.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    return model


# ------------------------------------------------------------------------------------------------------------ both


def target_prefix(tokenizer: Any, config: Any) -> tuple[int, ...]:
    """What the tokenizer puts before every summary, such as BART's `<s>`."""
    ids: list[int] = tokenizer(text_target="")["input_ids"]
    return tuple(ids[: ids.index(config.eos_token_id)])


def shift_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """What the decoder reads to predict `labels` `(N, T)`: the token before each, `start` before the first.

    shift_right(tensor([[5, 6, 2], [7, 2, -100]]), start=0, pad=1)  # [[0, 5, 6], [0, 7, 2]]
    """
    before = torch.full_like(labels, start)
    before[:, 1:] = labels[:, :-1]
    return before.masked_fill(before == -100, pad)

"""Sequence-to-sequence models of transformers with their tokenizers: pre-trained ones, and small ones from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, PreTrainedTokenizerFast

from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.tasks import pretrained
from rdrop.experiments.tasks.sequence_to_sequence import IGNORE_INDEX, encoder_decoder_sizes
from rdrop.experiments.tasks.tokenizing import learned_bpe

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


def learned_tokenizer(texts: Sequence[str], vocabulary: int, *, lowercase: bool) -> PreTrainedTokenizerFast:
    """Learns a `learned_bpe` from `texts`, which ends every text with `</s>`."""
    tokenizer = learned_bpe(texts, vocabulary, [START, PAD, END, UNKNOWN], unknown=UNKNOWN, lowercase=lowercase)
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
    """Returns a configuration of BART with the sizes of the recipe, for the tokens of `learned_tokenizer`."""
    assert model.hidden_size is not None  # the recipe has seen to it
    return BartConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=positions,
        d_model=model.hidden_size,
        **encoder_decoder_sizes(model),
        init_std=model.hidden_size**-0.5,  # BART's 0.02 is for a width of 1024; a small model would hardly attend
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )


def small_model(config: BartConfig) -> BartForConditionalGeneration:
    """Builds a new model that at first attends, from each place of the summary, to the same place of the document.

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


def pretrained_config(name: str) -> Any:
    """Loads the configuration of a sequence-to-sequence model, which must say how a decoder starts."""
    config = pretrained.pretrained_config(name, AutoModelForSeq2SeqLM, "sequence-to-sequence model")
    if config.decoder_start_token_id is None:
        raise RecipeError("model.name", "its configuration must have a decoder_start_token_id", value=name)
    return config


def seq2seq_model(name: str | None, config: Any) -> nn.Module:
    """Loads the pre-trained weights in fp32; without a name, all weights are new."""
    if name is None:
        return small_model(config)
    return pretrained.pretrained_model(name, AutoModelForSeq2SeqLM, config)


# ------------------------------------------------------------------------------------------------------------ both


def target_prefix(tokenizer: Any, config: Any) -> tuple[int, ...]:
    """Returns what the tokenizer puts before every summary, such as BART's `<s>`; `config` says what ends one."""
    ids: list[int] = tokenizer(text_target="")["input_ids"]
    if config.eos_token_id not in ids:
        rule = (
            f"its config.json has eos_token_id {config.eos_token_id}, and its tokenizer writes an empty summary as "
            f"{ids}; put the number there that ends it"
        )
        raise RecipeError("model.name", rule, value=config.name_or_path)
    return tuple(ids[: ids.index(config.eos_token_id)])


def shift_right(labels: Tensor, start: int, pad: int) -> Tensor:
    """Returns what the decoder reads to predict `labels` `(N, T)`: the token before each, `start` before the first.

    shift_right(tensor([[5, 6, 2], [7, 2, -100]]), start=0, pad=1)  # [[0, 5, 6], [0, 7, 2]]
    """
    before = torch.full_like(labels, start)
    before[:, 1:] = labels[:, :-1]
    return before.masked_fill(before == IGNORE_INDEX, pad)

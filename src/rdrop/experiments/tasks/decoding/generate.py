"""Beam search for models of transformers that map a sequence to a sequence, on token ids.

CTranslate2 searches many times faster than transformers' own `generate`, and comes to the same result but for a few
sentences. So it is taken for the models it can take (Marian's and BART's architecture), and `generate` for all others.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BartForConditionalGeneration, GenerationConfig, MarianMTModel

Ids = Sequence[int]


@dataclass(frozen=True)
class Search:
    """What is searched for. A hypothesis is scored by its log-probability over its length to the `length_penalty`.

    The search for a sentence ends with as many finished hypotheses as there are beams. Of hypotheses with the same
    score either may be returned: the two decoders add up in a different order. Where `min_length` and
    `no_repeat_ngram` rule tokens out, CTranslate2 shares their probability among the others, and `generate` (as
    fairseq) does not: with several beams they then often differ, and `generate` searches.
    """

    beams: int
    length_penalty: float = 1.0
    min_length: int = 0
    """Tokens, without the end."""
    no_repeat_ngram: int = 0
    """Runs of so many tokens occur once at most. 0: no such rule."""
    never: tuple[int, ...] = ()
    """Ids that are not for output: padding, and what the model has no token for."""
    prefix: tuple[int, ...] = ()
    """What every output begins with, e.g. BART's `<s>`; it is not returned."""

    @property
    def rules_tokens_out(self) -> bool:
        """While there are several hypotheses to choose from. To forbid an empty output costs all of them the same."""
        return self.beams > 1 and (self.min_length > 1 or self.no_repeat_ngram > 0)


class Decoder(Protocol):
    name: str
    """What searches, with its version."""

    def __call__(self, sources: Sequence[Ids], max_length: int) -> list[list[int]]:
        """The best output for each source, whose ids are as the model reads them: with an end, without padding.

        At most `max_length` ids, without start, prefix and end.
        """


def decoder_of(model: nn.Module, search: Search) -> Decoder:
    """CTranslate2 with the present weights of `model` in float32; `generate`, with a warning, where that cannot be.

    A search that rules tokens out is for `generate`, which scores what is left as the literature does. Later changes of
    the weights are not seen. Random numbers are not used.
    """
    if search.rules_tokens_out:
        return TransformersDecoder(model, search)
    why = why_not_ctranslate2(model)
    if why is None:
        from rdrop.experiments.tasks.decoding.ctranslate2 import CTranslate2Decoder

        return CTranslate2Decoder(model, search)
    warnings.warn(f"decoding with transformers' generate, which is slow: {why}", RuntimeWarning, stacklevel=2)
    return TransformersDecoder(model, search)


def why_not_ctranslate2(model: nn.Module) -> str | None:
    """Why CTranslate2 cannot decode for this model; None where it can."""
    if importlib.util.find_spec("ctranslate2") is None:
        return "ctranslate2 is not installed (pip install ctranslate2)"
    if type(model) not in (MarianMTModel, BartForConditionalGeneration):
        return f"CTranslate2 is for MarianMTModel and BartForConditionalGeneration here, not for {type(model).__name__}"
    device = next(model.parameters()).device
    if device.type == "cpu":
        return None
    import ctranslate2

    if device.type != "cuda" or ctranslate2.get_cuda_device_count() <= (device.index or 0):
        return f"CTranslate2 cannot use the device {device}"
    return None


class TransformersDecoder:
    """The reference: transformers' `generate`, which runs on any sequence-to-sequence model."""

    def __init__(self, model: nn.Module, search: Search) -> None:
        import transformers

        self.name = f"transformers {transformers.__version__}"
        self._model: Any = model
        self._search = search

    @torch.no_grad()
    def __call__(self, sources: Sequence[Ids], max_length: int) -> list[list[int]]:
        model, config, search = self._model, self._model.config, self._search
        device = next(model.parameters()).device
        input_ids = pad_sequence([torch.tensor(ids) for ids in sources], True, config.pad_token_id).to(device)
        lengths = torch.tensor([len(ids) for ids in sources], device=device)
        begin = torch.tensor([config.decoder_start_token_id, *search.prefix], device=device)
        outputs = model.generate(
            input_ids=input_ids,
            attention_mask=(torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long(),
            decoder_input_ids=begin.expand(len(sources), -1),
            generation_config=GenerationConfig(  # type: ignore[no-untyped-call]
                num_beams=search.beams,
                do_sample=False,
                length_penalty=search.length_penalty,
                early_stopping=search.beams > 1,
                min_new_tokens=search.min_length or None,
                max_new_tokens=max_length,
                no_repeat_ngram_size=search.no_repeat_ngram,
                suppress_tokens=list(search.never) or None,
                pad_token_id=config.pad_token_id,
                eos_token_id=config.eos_token_id,
            ),
        )
        return [until_end(output, config.eos_token_id) for output in outputs[:, len(begin) :]]


def until_end(output: Tensor, end: int) -> list[int]:
    """The ids before the first `end`; all of them where there is none."""
    ids: list[int] = output.tolist()
    return ids[: ids.index(end)] if end in ids else ids

"""Beam search by transformers' own `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from rdrop.experiments.tasks.decoding.search import Ids, Search
from rdrop.experiments.tasks.token_sequences import padded


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
        # `generate` takes from it what a search leaves open: a minimum length, say, that another task had.
        start = config.decoder_start_token_id
        model.generation_config = GenerationConfig(decoder_start_token_id=start)  # type: ignore[no-untyped-call]
        device = next(model.parameters()).device
        input_ids = padded(sources, config.pad_token_id).to(device)
        lengths = torch.tensor([len(ids) for ids in sources], device=device)
        begin = torch.tensor([start, *search.prefix], device=device)
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
    """Returns the ids before the first `end`; all of them where there is none."""
    ids: list[int] = output.tolist()
    return ids[: ids.index(end)] if end in ids else ids

"""Beam search by CTranslate2, whose vocabulary here is the ids themselves, written as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ctranslate2
import torch
from ctranslate2.converters.transformers import _SUPPORTED_ACTIVATIONS, BartLoader
from ctranslate2.specs.transformer_spec import TransformerSpec
from torch import Tensor, nn

from rdrop.experiments.tasks.decoding.search import Ids, Search


class CTranslate2Decoder:
    """Beam search with the weights that `model` has now, on its device, in float32."""

    def __init__(self, model: nn.Module, search: Search) -> None:
        self.name = f"ctranslate2 {ctranslate2.__version__}"
        self._search = search
        device = next(model.parameters()).device
        with TemporaryDirectory(prefix="rdrop-") as folder:
            converted = Path(folder) / "model"
            converted.mkdir()
            spec = specification(model)
            spec.validate()
            spec.optimize(quantization="float32")
            spec.save(str(converted))
            self._translator = ctranslate2.Translator(
                str(converted),
                device.type,
                device_index=device.index or 0,
                compute_type="float32",
                intra_threads=torch.get_num_threads(),
            )

    def __call__(self, sources: Sequence[Ids], max_length: int) -> list[list[int]]:
        search = self._search
        prefix = [str(token) for token in search.prefix]
        results = self._translator.translate_batch(
            [[str(token) for token in ids] for ids in sources],
            [prefix] * len(sources) if prefix else None,
            beam_size=search.beams,
            length_penalty=search.length_penalty,
            no_repeat_ngram_size=search.no_repeat_ngram,
            suppress_sequences=[[str(token)] for token in search.never] or None,
            max_input_length=0,
            min_decoding_length=len(prefix) + search.min_length,
            max_decoding_length=len(prefix) + max_length,
        )
        return [[int(token) for token in result.hypotheses[0][len(prefix) :]] for result in results]


def specification(model: Any) -> TransformerSpec:
    """Describes a post-norm Transformer of Marian's or BART's architecture to CTranslate2.

    Its own converters are for checkpoints of the hub: that for Marian drops the last token of the vocabulary and
    starts from a zero embedding, neither of which a model trained here does.
    """
    config = model.config
    loader = _Loader()
    spec = TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.encoder_attention_heads,
        pre_norm=False,
        activation=_SUPPORTED_ACTIVATIONS[config.activation_function],
        layernorm_embedding=hasattr(model.model.encoder, "layernorm_embedding"),
    )
    loader.set_encoder(spec.encoder, model.model.encoder)
    loader.set_decoder(spec.decoder, model.model.decoder)
    loader.set_linear(spec.decoder.projection, model.lm_head)
    if model.final_logits_bias.any():
        spec.decoder.projection.bias = model.final_logits_bias.detach().flatten().cpu()
    vocabulary = [str(token) for token in range(config.vocab_size)]
    spec.register_source_vocabulary(vocabulary)
    spec.register_target_vocabulary(vocabulary)
    spec.config.decoder_start_token = str(config.decoder_start_token_id)
    spec.config.eos_token = str(config.eos_token_id)
    # CTranslate2 must have one; what it calls unknown is then any token like others.
    spec.config.unk_token = spec.config.bos_token = str(config.eos_token_id)
    return spec


class _Loader(BartLoader):  # type: ignore[misc]  # ctranslate2 has no types
    """Leaves the weights in CPU memory, from where CTranslate2 reads them by their addresses."""

    def set_linear(self, spec: Any, *args: Any, **kwargs: Any) -> None:
        super().set_linear(spec, *args, **kwargs)
        _to_cpu(spec)

    def set_layer_norm(self, spec: Any, module: nn.Module) -> None:
        super().set_layer_norm(spec, module)
        _to_cpu(spec)

    def set_embeddings(self, spec: Any, module: nn.Module) -> None:
        super().set_embeddings(spec, module)
        _to_cpu(spec)

    def set_position_encodings(self, spec: Any, module: nn.Module) -> None:
        super().set_position_encodings(spec, module)
        _to_cpu(spec)


def _to_cpu(spec: Any) -> None:
    for name, value in vars(spec).items():
        if isinstance(value, Tensor):
            setattr(spec, name, value.detach().cpu())

"""The decoder for a model that maps a sequence to a sequence.

CTranslate2 searches many times faster than transformers' own `generate`, and comes to the same result but for a few
sentences. So it is taken for the models it can take (Marian's and BART's architecture), and `generate` for all others.
"""

from __future__ import annotations

import importlib.util
import warnings

from torch import nn
from transformers import BartForConditionalGeneration, MarianMTModel

from rdrop.experiments.tasks.decoding.generate import TransformersDecoder
from rdrop.experiments.tasks.decoding.search import Decoder, Search


def decoder_of(model: nn.Module, search: Search) -> Decoder:
    """Returns CTranslate2 with the present weights of `model` in float32, or else `generate`, with a warning.

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
    """Returns the reason why CTranslate2 cannot decode for this model; None where it can."""
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

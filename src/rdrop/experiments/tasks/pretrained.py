"""Pre-trained models of transformers, as every task loads them: configuration, dropout rates, tokenizer, weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from rdrop.experiments.settings import RecipeError

LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Always 0: one forward of a repeated batch would drop the same layers in every pass."""


def set_rates(config: Any, rates: Mapping[str, float | None], names: Mapping[str, Sequence[str]]) -> None:
    """Puts the recipe's dropout rates into a configuration, and no layerdrop: the model is built from it.

    `names` says what configurations call each of our rates; one may have several of them. Raises `RecipeError` for a
    rate that the configuration does not have, and for one that it has and is not given.
    """
    for key, rate in rates.items():
        present = [name for name in names[key] if hasattr(config, name)]
        if present and rate is None:
            raise RecipeError(f"model.{key}", f"must be a rate: {config.model_type} has one", value=None)
        if not present and rate is not None:
            raise RecipeError(f"model.{key}", f"must be null: {config.model_type} has no such rate", value=rate)
        for name in present:
            setattr(config, name, rate)
    for name in LAYERDROP:
        if hasattr(config, name):
            setattr(config, name, 0.0)


def pretrained_config(name: str, model_class: Any, kind: str) -> Any:
    """Loads the configuration of a model that `model_class`, such as `AutoModelForCausalLM`, knows to be a `kind`."""
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if type(config) not in model_class._model_mapping:
        raise RecipeError("model.name", f"is a {config.model_type}, and not a {kind}", value=name)
    return config


def pretrained_tokenizer(name: str) -> Any:
    """Loads the tokenizer of a model. It takes a special token that a text spells, `</s>`, for its characters."""
    with loading(name):
        return AutoTokenizer.from_pretrained(name, split_special_tokens=True, trust_remote_code=False)


def pretrained_model(name: str, model_class: Any, config: Any, **options: Any) -> Any:
    """Loads the weights in fp32, whatever type they are stored in."""
    with loading(name):
        return model_class.from_pretrained(
            name, config=config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **options
        )


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what transformers raises while it loads the model `name` into a `RecipeError` of model.name."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        files = "config.json, safetensors, and its tokenizer or preprocessor_config.json"
        rule = f"cannot be loaded ({reason}); give a hub id, or a folder with {files}"
        raise RecipeError("model.name", rule, value=name) from error

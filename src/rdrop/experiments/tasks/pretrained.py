"""What every task does with transformers' configurations and pre-trained models: set dropout rates, fail in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError

from rdrop.experiments.recipe import RecipeError

LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Always 0: one forward of a repeated batch would drop the same layers in every pass."""


def set_rates(config: Any, rates: Mapping[str, float | None], names: Mapping[str, Sequence[str]]) -> None:
    """Puts our dropout rates into a configuration, and no layerdrop: transformers reads it when it builds the model.

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


@contextmanager
def loading(name: str) -> Iterator[None]:
    """What transformers raises while it loads the model `name`, as a `RecipeError` of model.name."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        files = "config.json, safetensors, and its tokenizer or preprocessor_config.json"
        rule = f"cannot be loaded ({reason}); give a hub id, or a folder with {files}"
        raise RecipeError("model.name", rule, value=name) from error

"""Pre-trained models of transformers, as every task loads them: configuration, dropout rates, tokenizer, weights."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.tasks.not_text import LFS_POINTER

LAYERDROP = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
"""Always 0: one forward of a repeated batch would drop the same layers in every pass."""

SPARE_ROWS, SPARE_SHARE = 128, 0.04
"""How many rows of an embedding may be without an entry of the tokenizer: some models have a round number of rows."""

OUTPUT_STD = 0.02
"""Of the weights of a new output layer, where the configuration has no `initializer_range`."""

OWN_SETTINGS = {"return_dict": True, "chunk_size_feed_forward": 0}
"""How a model gives its outputs and saves memory, whatever its config.json says; what it computes is the same."""

MOST_LAYERS = 1_000
"""Several times as many as any model has."""

IMPLEMENTATIONS = {
    "attn_implementation": (None, "eager", "sdpa"),
    "experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
    "attn_implementation_internal": (None,),
    "experts_implementation_internal": (None,),
}
"""What a config.json may ask for, as it is part of transformers. Of other names, some are fetched from the hub."""


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
    _require_files(name)
    with loading(name):
        settings, _ = PreTrainedConfig.get_config_dict(name)
    _require_sane(settings, name)
    with loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **OWN_SETTINGS)
    if type(config) not in model_class._model_mapping:
        raise RecipeError("model.name", f"is a {config.model_type}, and not a {kind}", value=name)
    return config


def _require_files(name: str) -> None:
    """Refuses a pipe, a socket or a device, which may never end, and an adapter: only that would be trained."""
    for entry in os.listdir(name) if os.path.isdir(name) else ():
        path = os.path.join(name, entry)
        if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
            raise RecipeError("model.name", f"has {entry!r}, which is no file; delete it", value=name)
    with loading(name):
        adapter = find_adapter_config_file(name)
    if adapter is not None:
        rule = (
            "has an adapter (adapter_config.json), and its own weights would not be trained; merge it into them with "
            "peft (merge_and_unload, then save_pretrained), or give a folder without that file"
        )
        raise RecipeError("model.name", rule, value=name)


def _require_sane(settings: Any, name: str) -> None:
    """Refuses a config.json that, at any depth, asks for a program or for layers without end.

    Of some kernels transformers fetches the program, and runs it. Layers are built one by one until memory ends.
    """
    if isinstance(settings, list):
        settings = dict(enumerate(settings))
    if not isinstance(settings, dict):
        return
    for key, value in settings.items():
        if str(key).strip("_") in IMPLEMENTATIONS and value not in IMPLEMENTATIONS[str(key).strip("_")]:
            rule = f"its config.json asks for {key} {str(value)[:80]!r}, which may fetch a program; delete that key"
            raise RecipeError("model.name", rule, value=name)
        if key == "quantization_config" and value is not None:
            raise RecipeError("model.name", "is quantized, and such weights are not trained; give others", value=name)
        if str(key).endswith(("layer", "layers")) and isinstance(value, (int, float)) and value > MOST_LAYERS:
            rule = (
                f"its config.json asks for {key} {min(value, 1e300):.0e}, and {MOST_LAYERS} is the most; get it again"
            )
            raise RecipeError("model.name", rule, value=name)
        _require_sane(value, name)


def pretrained_tokenizer(name: str, config: Any) -> Any:
    """Loads the tokenizer of a model with that configuration.

    It takes a special token that a text spells, such as `</s>`, for its characters. Raises `RecipeError` where it is
    not the model's own: of a folder that has none, transformers makes an empty one.
    """
    with loading(name):
        tokenizer = AutoTokenizer.from_pretrained(name, split_special_tokens=True, trust_remote_code=False)
    entries, rows = len(tokenizer), getattr(config.get_text_config(), "vocab_size", None)
    if entries - len(set(tokenizer.all_special_ids)) <= 1:
        rule = "has no tokenizer; put its files (tokenizer.json, or vocab.txt and the like) beside its config.json"
        raise RecipeError("model.name", rule, value=name)
    if rows is not None and rows - entries > max(SPARE_ROWS, SPARE_SHARE * rows):
        rule = f"its tokenizer has {entries} entries and its embedding {rows} rows; put the model's own tokenizer there"
        raise RecipeError("model.name", rule, value=name)
    return tokenizer


def require_padding(tokenizer: Any, name: str) -> None:
    """Raises `RecipeError` if the tokenizer has nothing to fill a batch with."""
    if tokenizer.pad_token_id is None:
        raise RecipeError("model.name", "its tokenizer must have a padding token", value=name)


def require_rows(model: nn.Module, name: str, largest: int) -> None:
    """Raises `RecipeError` if the embedding of a pre-trained model has no row for the `largest` id that it reads."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    rows = embedding.weight.shape[0]
    if largest >= rows:
        rule = (
            f"its tokenizer has ids up to {largest}, and its embedding has {rows} rows; put its own tokenizer there, "
            "or save the model after resize_token_embeddings"
        )
        raise RecipeError("model.name", rule, value=name)


@torch.no_grad()
def most_tokens(model: nn.Module, run: Callable[[int], object], longest: int) -> int:
    """Finds how many tokens a model on the CPU can read, at most `longest`; `run(n)` lets it read n of them."""
    training = model.training
    model.eval()
    readable, unreadable = 0, longest + 1
    middle = longest
    while unreadable - readable > 1:
        try:
            run(middle)
            readable = middle
        except (IndexError, RuntimeError, ValueError):
            unreadable = middle
        middle = (readable + unreadable) // 2
    model.train(training)
    return readable


@torch.no_grad()
def try_out(model: nn.Module, name: str, run: Callable[[], object]) -> None:
    """Calls `run` with the pre-trained model in eval mode: a config.json may be what no forward or search can do."""
    training = model.training
    model.eval()
    with loading(name):
        run()
    model.train(training)


def pretrained_model(name: str, model_class: Any, config: Any) -> nn.Module:
    """Loads the weights in fp32, whatever type they are stored in.

    Raises `RecipeError` where the file lacks weights of the model, has others, or has layers that it has not.
    """
    model, report = _loaded(name, model_class, config)
    _require_none_lost(name, _of_body(model, report["missing_keys"]))
    return model


def pretrained_classifier(name: str, model_class: Any, config: Any) -> nn.Module:
    """Loads the pre-trained weights in fp32 under a new output layer, also where the saved one is of as many classes.

    Raises `RecipeError` where the file lacks weights of the model, has others, or has layers that it has not.
    """
    model, report = _loaded(name, model_class, config, ignore_mismatched_sizes=True)
    output = _output_layer(model, model_class, config, name)
    mismatched = {key for key, *_ in report["mismatched_keys"]}
    _require_none_lost(name, (_of_body(model, report["missing_keys"]) | mismatched) - output)
    for key in sorted(output - mismatched - report["missing_keys"]):
        _draw(model.get_parameter(key), getattr(config, "initializer_range", None) or OUTPUT_STD)
    return model


def _loaded(name: str, model_class: Any, config: Any, **options: Any) -> tuple[nn.Module, Mapping[str, set[Any]]]:
    """Returns a model, and what its file has too little and too much as transformers reports it."""
    with loading(name):
        loaded: tuple[nn.Module, Mapping[str, set[Any]]] = model_class.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    model, report = loaded
    left_out = set(filter(None, (_layer_left_out(model, key) for key in report["unexpected_keys"])))
    if left_out:
        rule = (
            f"its file has more layers than its config.json asks for ({len(left_out)}, e.g. {min(left_out)}); get "
            "both files again, or save the smaller model with save_pretrained"
        )
        raise RecipeError("model.name", rule, value=name)
    for tensor, values in model.named_parameters():
        if not values.isfinite().all():
            raise RecipeError("model.name", f"its weights are NaN or infinite in {tensor}; get them again", value=name)
    return model, report


def _layer_left_out(model: nn.Module, key: str) -> str | None:
    """Returns the layer of a weight for which the model has no place, if it has a list of such layers; else None.

    Heads that are replaced, a pooler, and buffers of older versions have no place either, and mean no loss.
    """
    modules = dict(_body(model).named_modules())
    parts = key.removeprefix(f"{model.base_model_prefix}.").split(".")
    for end, part in enumerate(parts):
        if part.isdecimal() and ".".join(parts[:end]) in modules and ".".join(parts[: end + 1]) not in modules:
            return ".".join(parts[: end + 1])
    return None


def _body(model: nn.Module) -> nn.Module:
    """Returns the model without its head; the whole one, where transformers does not tell them apart."""
    body: nn.Module = model.base_model  # type: ignore[assignment]
    return body


def _of_body(model: nn.Module, keys: Iterable[str]) -> set[str]:
    start = "" if _body(model) is model else f"{model.base_model_prefix}."
    return {key for key in keys if key.startswith(start) and "pooler" not in key}


def _require_none_lost(name: str, lost: set[str]) -> None:
    if lost:
        rule = (
            f"its file has no weights of the shape that config.json says for {len(lost)} tensors, e.g. {min(lost)}; "
            "get both files again"
        )
        raise RecipeError("model.name", rule, value=name)


def _output_layer(model: nn.Module, model_class: Any, config: Any, name: str) -> set[str]:
    """Returns the parameters that have another shape where there is one class more."""
    wider = copy.deepcopy(config)
    wider.num_labels = config.num_labels + 1
    with loading(name), torch.device("meta"):
        shapes = {key: values.shape for key, values in model_class.from_config(wider).named_parameters()}
    return {key for key, values in model.named_parameters() if shapes[key] != values.shape}


def _draw(parameter: nn.Parameter, std: float) -> None:
    """Draws weights, and sets biases to 0, as the models of transformers begin."""
    if parameter.dim() > 1:
        nn.init.normal_(parameter, std=std)
    else:
        nn.init.zeros_(parameter)


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Turns what transformers raises while it loads the model `name` into a `RecipeError` of model.name."""
    try:
        yield
    except RecipeError:
        raise
    except (
        Exception
    ) as error:  # of the files, the hub, and a value in config.json that any line of the model stumbles on
        reason = " ".join(str(error).split())[:300]
        files = "config.json, safetensors, and its tokenizer or preprocessor_config.json"
        offline = "" if os.path.isdir(name) else "; without a network, HF_HUB_OFFLINE=1 ends the attempts at once"
        remedy = _fetch_of_pointers(name) or f"give a hub id, or a folder with {files}{offline}"
        raise RecipeError("model.name", f"cannot be loaded ({reason}); {remedy}", value=name) from error


def _fetch_of_pointers(name: str) -> str | None:
    """Returns how a folder gets the files that Git has only pointers of; None where it has none."""
    for entry in os.listdir(name) if os.path.isdir(name) else ():
        with suppress(OSError), open(os.path.join(name, entry), "rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                return f"{entry} is a pointer of Git LFS: call `git lfs pull` in that folder"
    return None

"""Lists the sources of dropout of a model, and runs it for a while at another rate."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

DropoutKind = Literal["dropout", "drop_path", "layerdrop"]

RATE_OF_A_DROPOUT_MODULE = ("p", "drop_prob", "prob", "rate", "drop_rate")


@dataclass(frozen=True)
class DropoutSource:
    """One place where a model drops something at random while it trains."""

    module: str
    """The module's name, as in `model.named_modules()`; empty for the model itself."""
    attribute: str
    """The attribute of the module that holds the rate, e.g. `p` or `attention_dropout`."""
    kind: DropoutKind
    """`dropout` drops elements, `drop_path` whole residual branches per row, `layerdrop` whole layers per forward."""
    rate: float
    """The probability of dropping."""
    active: bool
    """Whether it would drop in a forward now: rate above 0, module in training mode, more than one layer if an RNN."""

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}={self.rate:g}".lstrip(".")


def dropout_sources(model: nn.Module) -> list[DropoutSource]:
    """Returns every source of dropout of a model, switched off or on, in the order of `model.named_modules()`.

    Found: `nn.Dropout` and its relatives; modules of a class named `...Dropout`, `...DropPath`, `...DropBlock`,
    `...DropConnect` or `...StochasticDepth` whose rate is `p`, `prob`, `rate`, `drop_prob` or `drop_rate`; `dropout`
    of `nn.MultiheadAttention`, `nn.LSTM`, `nn.GRU` and `nn.RNN`; and every float attribute of a module with `dropout`
    or `layerdrop` in its name, which is how Hugging Face models keep the rates of functional dropout. Not found: rates
    that a forward takes from elsewhere (a literal, a scripted module).
    """
    return [
        DropoutSource(name, attribute, kind, rate, rate > 0 and module.training and not _is_single_layer_rnn(module))
        for name, module in model.named_modules()
        for attribute, kind, rate in _rates(module)
    ]


def acting_sources(model: nn.Module) -> list[DropoutSource]:
    """Returns the sources that drop now and draw for every row; layerdrop has one coin for a whole forward."""
    return [source for source in dropout_sources(model) if source.active and source.kind != "layerdrop"]


@contextmanager
def dropout_rate(model: nn.Module, p: float) -> Iterator[None]:
    """Runs every dropout of the model at rate `p` in the block; afterwards each has its own rate back.

    Example::

        with dropout_rate(model, 0.3):
            logits = model(x)

    A source whose own rate is 0 stays at 0: what a recipe has switched off stays off. Attention dropout follows,
    drop path and layerdrop keep their rates. The rates are restored after an exception too.

    Raises `ValueError` when `p` is not in [0, 1), when nothing drops (evaluation mode, or every rate is 0), and when
    gradient checkpointing would run part of the forward again, in backward, outside the block.
    """
    if not 0 <= p < 1:
        raise ValueError(f"a dropout rate must be in [0, 1), got p={p}")
    sources = [source for source in dropout_sources(model) if source.kind == "dropout" and source.rate > 0]
    if not any(source.active for source in sources):
        raise ValueError(
            f"no active dropout in {type(model).__name__}: call model.train(), and build the model with dropout rates "
            "above 0; check_rdrop(model) says which"
        )
    _refuse_gradient_checkpointing(model)
    modules = dict(model.named_modules())
    rates = [(modules[source.module], source.attribute, source.rate) for source in sources] + config_rates(model)
    try:
        for owner, attribute, _ in rates:
            setattr(owner, attribute, p)
        yield
    finally:
        for owner, attribute, own_rate in rates:
            setattr(owner, attribute, own_rate)


def single_layer_rnns(model: nn.Module) -> list[str]:
    """Returns the names of RNNs whose dropout never acts: it sits between layers, and they have one."""
    return [name for name, module in model.named_modules() if _is_single_layer_rnn(module) and module.dropout > 0]


def _rates(module: nn.Module) -> Iterator[tuple[str, DropoutKind, float]]:
    for attribute, value in vars(module).items():
        kind = _kind(module, attribute)
        is_rate = isinstance(value, float) or (attribute in RATE_OF_A_DROPOUT_MODULE and type(value) is int)
        if kind is not None and is_rate and 0 <= value <= 1:
            yield attribute, kind, float(value)
    # Speech encoders (wav2vec2, HuBERT) ask their config in every forward.
    layerdrop = getattr(getattr(module, "config", None), "layerdrop", None)
    if isinstance(layerdrop, float) and hasattr(module, "layers") and not hasattr(module, "layerdrop"):
        yield "config.layerdrop", "layerdrop", layerdrop


def _kind(module: nn.Module, attribute: str) -> DropoutKind | None:
    class_name = type(module).__name__
    if attribute in RATE_OF_A_DROPOUT_MODULE:
        if "DropPath" in class_name or "StochasticDepth" in class_name:
            return "drop_path"
        is_dropout = any(name in class_name for name in ("Dropout", "DropBlock", "DropConnect"))
        return "dropout" if is_dropout or isinstance(module, nn.modules.dropout._DropoutNd) else None
    if "layerdrop" in attribute:
        return "layerdrop"
    return "dropout" if "dropout" in attribute else None


def _is_single_layer_rnn(module: nn.Module) -> bool:
    return isinstance(module, nn.RNNBase) and module.num_layers == 1


def config_rates(model: nn.Module) -> list[tuple[Any, str, float]]:
    """Returns the dropout rates of the configs, which a few models (Falcon, GPT-J) read in every forward."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [
        (config, attribute, value)
        for config in configs.values()
        for attribute, value in getattr(config, "__dict__", {}).items()
        if ("dropout" in attribute or "pdrop" in attribute) and isinstance(value, float) and 0 < value < 1
    ]


def _refuse_gradient_checkpointing(model: nn.Module) -> None:
    checkpointed = [
        name
        for name, module in model.named_modules()
        if module.training
        and (getattr(module, "gradient_checkpointing", False) is True or hasattr(module, "checkpoint_fn"))
    ]
    if checkpointed and torch.is_grad_enabled():
        raise ValueError(
            f"gradient checkpointing is on ({checkpointed[0] or type(model).__name__}): backward would recompute the "
            "forward with the model's own dropout rates, not with p, and the gradient would be wrong; turn it off "
            "or keep the model's own rates"
        )

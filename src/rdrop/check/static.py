"""Finds what the modules of a model tell without being run."""

import sys
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from typing import Any

from torch import nn

from ..dropout import DropoutSource, config_rates, single_layer_rnns
from .report import Finding, Trial, some, unique


def static_findings(
    model: nn.Module, sources: Collection[DropoutSource], trial: Trial, *, compiled: bool
) -> Iterator[Finding]:
    """Yields all that the modules tell. Where a trial was made, what it has shown decides whether they are right."""
    yield from _eval_mode(model)
    yield from _no_dropout(model, sources, trial.passes_differ)
    yield from _frozen_dropout(model, sources)
    yield from _single_layer_rnn(model)
    yield from _checkpointing_without_rng(model, sources, trial.recomputed_differently)
    yield from _compile_memory_budget(compiled)
    yield from _layerdrop(sources)
    yield from _batch_norm(model)


def _eval_mode(model: nn.Module) -> Iterator[Finding]:
    if not model.training:
        yield Finding(
            "eval-mode",
            "error",
            f"{type(model).__name__} is in evaluation mode: nothing is dropped, the passes are equal.",
            "Call model.train(). Hugging Face's from_pretrained gives models in evaluation mode; trainers call it.",
        )


def _no_dropout(model: nn.Module, sources: Collection[DropoutSource], passes_differ: bool | None) -> Iterator[Finding]:
    if acting(model, sources):
        return
    if passes_differ:
        yield Finding(
            "unknown-randomness",
            "note",
            "No source of dropout is known in this model, yet the two passes differ: something else in it is random.",
            "Make sure that this randomness is meant to be what R-Drop regularizes against.",
        )
        return
    yield Finding(
        "no-dropout",
        "error",
        "No active dropout: the two passes are equal and their divergence is 0. "
        + _why_nothing_drops(model, sources)
        + (" Rates that are no attributes of modules show only with a batch." if passes_differ is None else ""),
        rates_remedy(model),
        tuple(unique(source.module for source in sources)),
    )


def acting(model: nn.Module, sources: Iterable[DropoutSource]) -> list[DropoutSource]:
    """Returns the sources that draw anew for every row. A model in evaluation mode is judged as if it were training."""
    idle = single_layer_rnns(model)
    return [
        source
        for source in sources
        if source.kind != "layerdrop"
        and (source.active if model.training else source.rate > 0 and source.module not in idle)
    ]


def _why_nothing_drops(model: nn.Module, sources: Iterable[DropoutSource]) -> str:
    rows = [source for source in sources if source.kind != "layerdrop"]
    off = [str(source) for source in rows if source.rate == 0]
    idle = [str(source) for source in rows if source.rate > 0]
    unused = [f"config.{attribute}={rate:g}" for _, attribute, rate in config_rates(model)]
    reasons = []
    if off:
        reasons.append(f"Rate 0: {some(off)}.")
    if idle:
        reasons.append(f"Not acting (evaluation mode, or an RNN of one layer): {some(idle)}.")
    if unused and not idle:
        reasons.append(
            f"{some(unused)} reached no module: a rate set in the config after the model is built has no effect."
        )
    return " ".join(reasons) or "No module of the model is known to drop anything."


def rates_remedy(model: nn.Module) -> str:
    """Returns how to switch dropout on, by the names that the model's own config has."""
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return "Build the model with dropout rates above 0 (0.1 is usual) and keep its modules in training mode."
    kind = type(config).__name__
    lora = "With LoRA, lora_dropout serves as well."
    names = [name for name, _ in _config_rates(config)]
    if names:
        return (
            f"Set {', '.join(f'{name}=0.1' for name in names)} in the {kind} before the model is built: "
            "from_pretrained(name, ...) takes them as keywords. In ViT, DeiT, ModernBERT, Llama, Qwen3, Gemma3 and "
            f"others the default is 0. {lora}"
        )
    inner = [
        f"config.{part}.{name} = 0.1"
        for part, value in vars(config).items()
        if hasattr(value, "model_type")
        for name, _ in _config_rates(value)
    ]
    if inner:
        return f"Set {', '.join(inner)} in the {kind} and build the model from it, (..., config=config). {lora}"
    return f"{kind} has no dropout rate to set. Put an nn.Dropout into the model, or train LoRA with lora_dropout=0.1."


RATE_IN_CONFIG = ("dropout", "pdrop", "drop_path", "drop_rate", "drop_prob")


def _config_rates(config: Any) -> Iterator[tuple[str, float]]:
    """Yields the names and values of the rates in a config; not those of a part that few models have."""
    for name, value in vars(config).items():
        is_rate = any(part in name for part in RATE_IN_CONFIG) and type(value) in (int, float)
        if is_rate and not name.startswith(("activation", "classifier", "summary", "mask_")):
            yield name, value


def _frozen_dropout(model: nn.Module, sources: Iterable[DropoutSource]) -> Iterator[Finding]:
    modules = dict(model.named_modules())
    frozen = unique(source.module for source in sources if source.rate > 0 and not modules[source.module].training)
    if frozen and model.training:
        yield Finding(
            "frozen-dropout",
            "warning",
            f"The model trains, but these modules with dropout are in evaluation mode: {some(frozen)}.",
            "If that is not meant, call model.train() after whatever called eval() on them.",
            tuple(frozen),
        )


def _single_layer_rnn(model: nn.Module) -> Iterator[Finding]:
    rnns = single_layer_rnns(model)
    if rnns:
        yield Finding(
            "single-layer-rnn",
            "warning",
            f"The dropout of these RNNs never acts, since it sits between layers and they have one: {some(rnns)}.",
            "Put an nn.Dropout after the RNN, or give it num_layers=2.",
            tuple(rnns),
        )


def _checkpointing_without_rng(
    model: nn.Module, sources: Iterable[DropoutSource], recomputed_differently: Collection[str]
) -> Iterator[Finding]:
    dropping = [source.module for source in acting(model, sources)]
    declared = [
        name
        for name, module in model.named_modules()
        if _drops_rng(module) and any(inner == name or inner.startswith(name + ".") or not name for inner in dropping)
    ]
    if declared or recomputed_differently:
        modules = unique(declared or recomputed_differently)
        yield Finding(
            "checkpoint-rng",
            "error",
            "Gradient checkpointing recomputes other activations in backward than the forward had (new dropout masks), "
            f"so the gradient is not that of the loss: {some(modules)}.",
            "Do not pass preserve_rng_state=False to the checkpoint function.",
            tuple(modules),
        )


def _drops_rng(module: nn.Module) -> bool:
    """Whether Hugging Face's or torch's `checkpoint_wrapper` gave it a checkpoint that loses the random state."""
    checkpoints = [value for value in vars(module).values() if isinstance(value, partial)]
    switched_off = getattr(module, "gradient_checkpointing", True) is False
    return not switched_off and any(call.keywords.get("preserve_rng_state") is False for call in checkpoints)


def _compile_memory_budget(compiled: bool) -> Iterator[Finding]:
    # Looked up, not imported: what nobody has imported nobody has configured, and importing it is slow.
    config = sys.modules.get("torch._functorch.config")
    budget = getattr(config, "activation_memory_budget", 1.0)
    if compiled and budget < 1:
        yield Finding(
            "compile-memory-budget",
            "error",
            f"The model is compiled with torch._functorch.config.activation_memory_budget={budget:g}: backward "
            "recomputes some dropout with other masks than the forward had.",
            "Set torch._functorch.config.activation_memory_budget = 1.0 and compile again.",
        )


def _layerdrop(sources: Iterable[DropoutSource]) -> Iterator[Finding]:
    dropping = [source for source in sources if source.kind == "layerdrop" and source.rate > 0]
    if dropping:
        yield Finding(
            "layerdrop",
            "warning",
            "Layerdrop tosses one coin for a whole forward, so the passes of one repeated batch share the layers they "
            f"skip: {some(map(str, dropping))}.",
            "Run one forward for each pass, sequential_passes(model, batch), or set it to 0.",
            tuple(source.module for source in dropping),
        )


def _batch_norm(model: nn.Module) -> Iterator[Finding]:
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not model.training)
    ]
    if norms:
        yield Finding(
            "batch-norm",
            "warning",
            "BatchNorm computes its statistics over the rows of both passes together, and updates its running "
            f"statistics once for the repeated batch: {some(norms)}.",
            "Usually harmless. To keep the passes independent, use GroupNorm or LayerNorm, or freeze the statistics "
            "(module.eval()).",
            tuple(norms),
        )

"""A language model of transformers that runs less of its forward: without its output layer, or its encoder once.

Either way one module inside the model gets another `forward` while the model runs. Whatever is around the model (DDP,
LoRA, autocast, torch.compile, gradient checkpointing) sees an ordinary forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from rdrop.dropout import dropout_sources
from rdrop.passes import find_batch_size, map_tensors, split_passes

Batch = dict[str, Any]
LABELS = ("labels", "shift_labels")


class WithoutHead:
    """A context in which the output layer `layer` of a language model keeps its input and projects nothing.

        with without_head:
            outputs = model(**without_labels(model, inputs))
        hidden, bias = without_head.taken(outputs)
        logits = F.linear(hidden, layer.weight, bias)  # what the model would return

    In place of the logits the model gets zeros, `(1, ..., 1, V)`, so that what it returns is what it adds to them
    (`final_logits_bias` of BART).
    """

    def __init__(self, layer: nn.Linear) -> None:
        self.layer = layer
        self._hidden: Tensor | None = None

    def __enter__(self) -> WithoutHead:
        self.layer.forward = self._keep  # type: ignore[method-assign, assignment]  # hides the method of the class
        return self

    def __exit__(self, *_: object) -> None:
        del self.layer.forward

    def taken(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """The hidden states of the last forward, kept here no longer, and the whole bias."""
        hidden, self._hidden = self._hidden, None
        if hidden is None:
            raise RuntimeError("the model did not run its output layer, as it did when this was checked")
        added = outputs.logits.detach().flatten()
        return hidden, added if self.layer.bias is None else self.layer.bias + added

    def _keep(self, hidden: Tensor) -> Tensor:
        self._hidden = hidden
        # DDP looks for the parameters in use in the graph of the outputs: these zeros come after all the layer reads.
        zero = hidden[:0].sum() + sum(parameter[:0].sum() for parameter in self.layer.parameters())
        return zero.expand(*[1] * (hidden.dim() - 1), self.layer.out_features)


class EncoderOnce:
    """A context in which `encoder`, called with a batch repeated `passes` times, runs on one pass and repeats the rest.

    Where nothing in the encoder is random its passes agree, so this changes neither the outputs nor the gradient.
    """

    def __init__(self, encoder: nn.Module, passes: int) -> None:
        self.encoder, self.passes = encoder, passes

    def __enter__(self) -> EncoderOnce:
        self.encoder.forward = self._once
        return self

    def __exit__(self, *_: object) -> None:
        del self.encoder.forward

    def _once(self, *args: Any, **kwargs: Any) -> Any:
        rows = find_batch_size((args, kwargs))
        size = rows // self.passes

        def first_pass(tensor: Tensor) -> Tensor:
            return tensor[:size] if tensor.dim() > 0 and len(tensor) == rows else tensor

        def every_pass(tensor: Tensor) -> Tensor:
            return torch.cat([tensor] * self.passes) if tensor.dim() > 0 and len(tensor) == size else tensor

        # tree_map, and not repeat_batch, because torch.compile can trace it
        args, kwargs = tree_map_only(Tensor, first_pass, (args, kwargs))
        return tree_map_only(Tensor, every_pass, type(self.encoder).forward(self.encoder, *args, **kwargs))


# ------------------------------------------------------------------------------------------------ where it is exact
#
# `inner` is the transformers model itself, `model` the same, with LoRA around it if there is. Every function says why
# the module cannot be left out, or None. Those that run the model run it on one example, `passes` times over, and leave
# nothing behind: no gradient, and the generators of random numbers as they were.


def output_layer(inner: Any) -> Any:
    return inner.get_output_embeddings()


def why_head_stays(inner: Any) -> str | None:
    """As far as the modules tell."""
    layer = output_layer(inner)
    if type(layer) is not nn.Linear:
        return f"the output layer is a {type(layer).__name__}, not a plain torch.nn.Linear"
    return _why_forward_stays(layer, "the output layer")


def why_encoder_stays(inner: Any) -> str | None:
    """As far as the modules tell."""
    if not (isinstance(inner, PreTrainedModel) and inner.config.is_encoder_decoder):
        return "the model is no encoder-decoder of transformers"
    encoder = inner.get_encoder()
    active = [source for source in dropout_sources(encoder) if source.active]
    if active:
        return f"dropout is on in the encoder ({active[0]})"
    return _why_forward_stays(encoder, "the encoder")


def _why_forward_stays(module: nn.Module, name: str) -> str | None:
    changed = "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    return f"{name} has hooks, or a forward that is not its class's" if changed else None


def why_logits_are_not_linear(model: nn.Module, inner: Any, repeated: Batch, outputs: Any, autocast: Any) -> str | None:
    """Whether `outputs` of `observed_forward` are the output layer's, plus a bias at most."""
    layer, logits = output_layer(inner), outputs.logits
    # Zeros show the bias that the model adds; the others are so far apart that a scale or a soft cap must show.
    zeros = layer.weight.new_zeros(layer.out_features)
    wide = torch.linspace(-100, 100, layer.out_features, device=zeros.device, dtype=zeros.dtype)
    hidden: list[Tensor] = []

    def probe(states: Tensor) -> Tensor:
        hidden.append(states)
        return torch.stack([zeros, wide]).view(*[1] * (states.dim() - 2), 2, -1)

    with _forward_of(layer, probe), _same_randomness(zeros.device):
        probed = model(**without_labels(inner, repeated)).logits
    if len(hidden) != 1 or hidden[0].shape[:-1] != logits.shape[:-1] or probed.numel() != 2 * len(zeros):
        return "the logits are not what the output layer gives, position by position"
    if probed.requires_grad:
        return "the model adds to its logits something that is trained, outside its output layer"
    bias, added = probed.flatten(0, -2)
    finite = bias.isfinite()  # -inf masks a class
    if not agree([wide[finite], (added - bias)[finite]], roundings=8):
        return "the model scales, caps or rearranges its logits"
    with autocast(), torch.no_grad():
        own = F.linear(hidden[0], layer.weight, layer.bias)
    if not agree([logits[..., finite].to(own.dtype), (own + bias)[..., finite].to(own.dtype)], roundings=8):
        return "the logits are not those of the output layer, or are others when the model gets no labels"
    return None


def why_passes_differ_behind_encoder(model: nn.Module, inner: Any, repeated: Batch, passes: int) -> str | None:
    """Whether something in the encoder is random that is no dropout module."""
    outputs = observed_forward(model, inner, repeated)
    encoded = outputs.get("encoder_last_hidden_state") if isinstance(outputs, Mapping) else None
    if encoded is None:
        return "the output has no encoder_last_hidden_state by which to see whether anything in the encoder is random"
    return None if agree(split_passes(encoded, passes)) else "something in the encoder is random"


def observed_forward(model: nn.Module, inner: Any, repeated: Batch) -> Any:
    device = next(inner.parameters()).device
    with _same_randomness(device):
        return model(**repeated)


def without_labels(inner: Any, inputs: Batch) -> Batch:
    """The inputs by which a model computes the same hidden states, and no loss."""
    kept = {name: value for name, value in inputs.items() if name not in LABELS}
    if inner.config.is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & kept.keys():
        kept["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    if "use_cache" in inspect.signature(inner.forward).parameters:
        kept.setdefault("use_cache", False)  # as the models decide for themselves when they get labels
    return kept


def rows_of(batch: Batch, start: int, stop: int, *, batch_size: int) -> Batch:
    """Rows `start` to `stop` of a batch; a tensor is batched when its first dimension is `batch_size`."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor[start:stop] if tensor.dim() > 0 and len(tensor) == batch_size else tensor

    return map_tensors(rows, dict(batch))


def agree(passes: Sequence[Tensor], roundings: int = 100) -> bool:
    """Up to rounding: a matrix product may round the same row differently at another place of the batch."""
    first = passes[0].float()
    tolerance = roundings * torch.finfo(passes[0].dtype).eps * first.abs().max()
    return all(bool((other.float() - first).abs().max() <= tolerance) for other in passes[1:])


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # hides the method of the class
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _same_randomness(device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type != "cpu" else [], device_type=device.type):
        yield

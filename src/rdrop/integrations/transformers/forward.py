"""A language model of transformers that runs less of its forward: `Fused`, without its output layer, and `EncoderOnce`.

Either way one module inside the model gets another `forward` while the model runs. Whatever is around the model (DDP,
LoRA, autocast, torch.compile, gradient checkpointing) sees an ordinary forward.

`reason` and `reason_seen` say why the module cannot be left out, or None. The first looks at the modules and costs
nothing. The second runs the model, on a repeated example or two, and leaves nothing behind: no gradient, and the
generators of random numbers as they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from rdrop.check.watch import random_states
from rdrop.dropout import dropout_sources
from rdrop.integrations.targets import Batch, Target, is_of_transformers
from rdrop.passes import agree, are_of_examples, find_batch_size, rows_of, split_passes
from rdrop.terms import IGNORE_INDEX

LABELS = ("labels", "shift_labels")
NONE_OF_TRANSFORMERS = "the model is none of transformers"


class Fused:
    """A language model whose output layer keeps its input and projects nothing: the loss comes from that input.

        (hidden, bias), outputs = fused.run(lambda: model(**without_labels(model, inputs)))
        logits = F.linear(hidden, whole(fused.layer.weight, hidden.dtype), bias)  # what the model would return

    In place of the logits the model gets zeros, `(1, ..., 1, V)`, so that what it returns is what it adds to them
    (`final_logits_bias` of BART).
    """

    refusal = (
        "the loss of {model} cannot be computed from its hidden states: {reason}. Leave `fused` out to compute it "
        "from logits"
    )

    def __init__(self, inner: Any) -> None:
        """Takes the transformers model itself, without DDP, torch.compile and LoRA around it."""
        self.inner = inner
        self._hidden: Tensor | None = None
        self._seen: str | None = None

    @cached_property
    def layer(self) -> Any:
        return self.inner.get_output_embeddings()

    def reason(self) -> str | None:
        if not is_of_transformers(self.inner):
            return NONE_OF_TRANSFORMERS
        if type(self.layer) is not nn.Linear and not (is_sharded(self.layer) and isinstance(self.layer, nn.Linear)):
            kind = f"{type(self.layer).__module__}.{type(self.layer).__qualname__}"
            return f"the output layer is a {kind}, not a plain torch.nn.Linear"
        return self._seen or _why_forward_stays(self.layer, "the output layer")

    def reason_seen(self, logits: Tensor, forward: Callable[[], Tensor]) -> str | None:
        """Returns why these `logits` of the model are not the output layer's plus a bias at most; None if they are.

        `forward` runs the model again, on the same batch without labels.
        """
        self._seen = self._why_not_linear(logits, forward)
        return self._seen

    def _why_not_linear(self, logits: Tensor, forward: Callable[[], Tensor]) -> str | None:
        # Zeros show the bias that the model adds; the others are so far apart that a scale or a soft cap must show.
        layer = self.layer
        zeros = torch.zeros(layer.out_features, device=logits.device, dtype=layer.weight.dtype)
        wide = torch.linspace(-100, 100, layer.out_features, device=zeros.device, dtype=zeros.dtype)
        own: list[Tensor] = []

        def probe(states: Tensor) -> Tensor:
            own.append(F.linear(states, layer.weight, layer.bias).detach())  # no_grad would stay in autocast's cache
            return torch.stack([zeros, wide]).view(*[1] * (states.dim() - 2), 2, -1)

        with _forward_of(layer, probe), same_randomness():
            probed = forward()
        if len(own) != 1 or own[0].shape != logits.shape or probed.numel() != 2 * len(zeros):
            return "the logits are not what the output layer gives, position by position"
        if probed.requires_grad:
            return "the model adds to its logits something that is trained, outside its output layer"
        bias, added = probed.flatten(0, -2)
        finite = bias.isfinite()  # -inf masks a class
        if not agree([wide[finite], (added - bias)[finite]], roundings=8):
            return "the model scales, caps or rearranges its logits"
        if not agree([part[..., finite].to(own[0].dtype) for part in (logits, own[0] + bias)], roundings=8):
            return "the logits are not those of the output layer, or are others when the model gets no labels"
        return None

    def run(self, forward: Callable[[], Any]) -> tuple[tuple[Tensor, Tensor], Any]:
        """Returns the hidden states and the whole bias of what would be the logits, and what `forward` returns.

        `forward` returns the logits, or outputs that have them.
        """
        with _forward_of(self.layer, self._keep):
            outputs = forward()
        added = (outputs if isinstance(outputs, Tensor) else outputs.logits).detach().flatten()
        hidden, self._hidden = self._hidden, None
        bias: Tensor | None = self.layer.bias if self.layer.bias is None else whole(self.layer.bias, added.dtype)
        if hidden is None:
            raise RuntimeError("the model did not run its output layer, as it did when this was checked")
        return (hidden, added if bias is None else bias + added), outputs

    def _keep(self, hidden: Tensor) -> Any:
        self._hidden = hidden
        # DDP looks for the parameters in use in the graph of the outputs: these zeros come after all the layer reads.
        zero = hidden[:0].sum() + sum(parameter[:0].sum() for parameter in self.layer.parameters())
        return zero.expand(*[1] * (hidden.dim() - 1), self.layer.out_features)


def is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 gathers the parameters of this very module before its forward."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule  # where torch was built with it

    return isinstance(module, FSDPModule)


def whole(parameter: Any, dtype: torch.dtype) -> Any:
    """Returns a parameter of which each process has a part (FSDP2) whole, in `dtype`; any other as it is.

    Its gradient becomes the mean of the processes', as FSDP makes that of all parameters.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial

    placements = [Partial("avg")] * parameter.device_mesh.ndim
    return parameter.to(dtype).full_tensor(grad_placements=placements)


class EncoderOnce:
    """An encoder that, called with a batch repeated `passes` times, runs on one pass and repeats the rest.

    Where nothing in the encoder is random its passes agree, so this changes neither the outputs nor the gradient.
    """

    refusal = "the encoder of {model} must run for every pass: {reason}. Leave `encoder_once` out to let it"

    def __init__(self, inner: Any, passes: int) -> None:
        self.is_of_transformers = is_of_transformers(inner)
        self.encoder: Any = None
        if self.is_of_transformers and inner.config.is_encoder_decoder:
            self.encoder = inner.get_encoder()
        self.passes = passes
        self._seen: str | None = None
        self._is_seen = False

    def reason(self) -> str | None:
        if not self.is_of_transformers:
            return NONE_OF_TRANSFORMERS
        if self.encoder is None:
            return "the model is no encoder-decoder of transformers"
        active = [source for source in dropout_sources(self.encoder) if source.active]
        if active:
            return f"dropout is on in the encoder ({active[0]})"
        return self._seen or _why_forward_stays(self.encoder, "the encoder")

    def reason_seen(self, forward: Callable[[], Any]) -> str | None:
        """Returns why the encoder's passes differ, by something that is no dropout module; None if they do not.

        The first call runs `forward`.
        """
        if not self._is_seen:
            encoded: list[Any] = []
            handle = self.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output))
            try:
                with same_randomness():
                    forward()
            finally:
                handle.remove()
            states = next((leaf for leaf in tree_leaves(encoded) if isinstance(leaf, Tensor)), None)
            if states is None:
                self._seen = "the model does not run it"
            elif not agree(split_passes(states, self.passes)):
                self._seen = "something in the encoder is random"
            self._is_seen = True
        return self._seen

    def run(self, forward: Callable[[], Any]) -> Any:
        """Returns what `forward` returns, its encoder run once."""
        with _forward_of(self.encoder, self._once):
            return forward()

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


def without_labels(inner: Any, inputs: Batch) -> Batch:
    """Returns the inputs by which a model computes the same hidden states, and no loss."""
    kept = {name: value for name, value in inputs.items() if name not in LABELS}
    if _derives_decoder_inputs(inner, inputs):
        kept["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(labels=inputs["labels"])
    if "use_cache" in inspect.signature(inner.forward).parameters:
        kept.setdefault("use_cache", False)  # as the models decide for themselves when they get labels
    return kept


def why_labels_stay(inner: Any, inputs: Batch) -> str | None:
    """Returns why `without_labels` would leave out what the hidden states come from; None if it would not."""
    if not _derives_decoder_inputs(inner, inputs) or hasattr(inner, "prepare_decoder_input_ids_from_labels"):
        return None
    return "the batch has no decoder_input_ids, and the model has no method that makes them of the labels"


def _derives_decoder_inputs(inner: Any, inputs: Batch) -> bool:
    given = {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys()
    return bool(inner.config.is_encoder_decoder) and not given


def fullest_example(inputs: Batch, target: Target) -> tuple[Batch, Target]:
    """Returns the example with the most labels that count, a batch of one; all, where the batch cannot be cut."""
    size = len(target.labels)
    if not all(are_of_examples(name, part, size) for name, part in inputs.items()):
        return inputs, target
    row = int((target.labels != IGNORE_INDEX).view(size, -1).sum(1).argmax())
    example = rows_of(inputs, row, row + 1, batch_size=size)
    return example, replace(target, labels=target.labels[row : row + 1])


@contextmanager
def same_randomness() -> Iterator[None]:
    """Leaves every generator as it was, whatever is drawn in the block; numpy's too, from which SpecAugment draws."""
    states = [*random_states()]
    try:
        yield
    finally:
        for restore in states:
            restore()


def _why_forward_stays(module: nn.Module, name: str) -> str | None:
    own = 1 if is_sharded(module) else 0  # FSDP2's, which gather and free the parameters around any forward
    changed = "forward" in vars(module) or max(map(len, (module._forward_hooks, module._forward_pre_hooks))) > own
    return f"{name} has hooks, or a forward that is not its class's" if changed else None


@contextmanager
def _forward_of(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # hides the method of the class
    try:
        yield
    finally:
        del module.forward

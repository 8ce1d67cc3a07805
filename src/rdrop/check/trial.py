"""Runs two forwards and a backward of a repeated batch, and reports what they show."""

import math
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..dropout import DropoutSource, dropout_sources
from ..passes import call_model, find_batch_size, map_tensors, repeat_batch
from ..terms import SUM_TOLERANCE, symmetric_kl
from .report import Finding, Trial, some
from .static import acting
from .watch import Watch, differ, unchanged

RESHAPES = (
    *("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "T", "Permute", "Expand", "Alias"),
    *("Clone", "ToCopy", "Slice", "Select"),
)


UNSEEN = 1e-6
"""How improbable it must be that masks were equal by chance, before they are called the same."""
MOST_FORWARDS = 400


class _Failure(Exception):  # noqa: N818 - it ends the trial, not the check
    def __init__(self, code: str, message: str, remedy: str) -> None:
        self.finding = Finding(code, "error", message, remedy)


def try_batch(model: nn.Module, batch: Any) -> Trial:
    obstacle = _obstacle(model)
    if obstacle:
        return Trial((_not_tried(obstacle),))
    with unchanged(model), _eagerly(), torch.inference_mode(False), torch.enable_grad():
        if not model.training:
            model.train()
        try:
            return _two_forwards(model, batch)
        except _Failure as failure:
            return Trial((failure.finding,))


def _two_forwards(model: nn.Module, batch: Any) -> Trial:
    repeated, rows = _repeated(batch)
    sources = acting(model, dropout_sources(model))
    dropping = {source.module for source in sources}
    with Watch(model, rows) as first:
        logits = _logits(model, batch, repeated, rows)
        _backward(first, logits)
    logits_differ, passes_differ, repeats = differ(*logits.detach().chunk(2)), set(first.passes_differ), True
    # A small batch at a low rate often draws equal masks: look again until that would be no chance.
    equal_by_chance, unseen = _chance_of_equal_masks(sources, rows // 2), 1.0
    for _ in range(MOST_FORWARDS):
        with Watch(model, rows) as again:
            next_logits = _logits(model, batch, repeated, rows)
        logits_differ = logits_differ or differ(*next_logits.detach().chunk(2))
        passes_differ |= again.passes_differ
        repeats = repeats and _same_samples(first, again, dropping)
        repeats = repeats and not differ(logits.detach(), next_logits.detach())
        unseen *= equal_by_chance
        acts = logits_differ or not dropping.isdisjoint(passes_differ)
        if (acts and not repeats) or unseen < UNSEEN or dropping.isdisjoint(first.samples):
            break
    findings = [*_non_finite(logits), *_probabilities(logits)]
    if acts and repeats:
        findings.append(_repeated_masks())
    elif acts and not logits_differ:
        findings.append(_equal_logits())
    elif dropping and not acts:
        findings.append(_identical_passes(dropping, first) if repeats else _shared_masks(dropping))
    if unseen >= UNSEEN and findings and findings[-1].code in BY_CHANCE and not dropping.isdisjoint(first.samples):
        findings[-1] = _too_few_rows(rows // 2, unseen)
    return Trial(tuple(findings), acts, tuple(first.recomputed_differently), _divergence(logits))


def _chance_of_equal_masks(sources: Iterable[DropoutSource], rows: int) -> float:
    """Returns at most how probable it is that a forward draws the same masks twice: one coin per row and source.

    Drop path tosses one; dropout tosses more, so its masks are equal more seldom still.
    """
    chance = 1.0
    for source in sources:
        chance *= (source.rate**2 + (1 - source.rate) ** 2) ** rows
    return chance if chance < 1 else 0.0  # without a source nothing is expected to differ


def _repeated(batch: Any) -> tuple[Any, int]:
    """Returns [x; x] cut off from the caller's graph, and its number of rows."""
    try:
        rows = 2 * find_batch_size(batch)
        if rows == 0:
            raise ValueError("it has no rows")
        return map_tensors(Tensor.detach, repeat_batch(batch)), rows
    except (TypeError, ValueError) as error:
        message = f"The batch cannot be repeated: {error}."
        raise _Failure("batch", message, "Give the batch as repeat_batch needs it.") from error


def _logits(model: nn.Module, batch: Any, repeated: Any, rows: int) -> Tensor:
    try:
        output = call_model(model, repeated)
    except Exception as error:
        raise _forward_failed(model, batch, error) from error
    logits = _find_logits(output, rows)
    if logits is None:
        raise _Failure(
            "no-logits",
            f"No logits in the output, a {type(output).__name__}.",
            "Return a tensor, or a tuple, mapping or object with `logits`.",
        )
    if logits.dim() == 0 or logits.shape[0] % rows:
        raise _Failure(
            "rows",
            f"The repeated batch has {rows} rows, the logits have shape {tuple(logits.shape)}: their first "
            "dimension does not go row by row, so the passes cannot be told apart.",
            "R-Drop needs inputs and logits with the batch in the first dimension (batch_first=True).",
        )
    return logits


def _find_logits(output: Any, rows: int) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "start_logits", "prediction_logits"):
        named = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(named, Tensor):
            return named
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point() and part.dim() > 0 and part.shape[0] % rows == 0:
            return part
    return None


def _backward(watch: Watch, logits: Tensor) -> None:
    if not logits.requires_grad:
        raise _Failure(
            "no-gradient",
            "The logits carry no gradient: nothing would be learned from them.",
            "Check that parameters require gradients, that the forward does not run under no_grad, and that the "
            "logits are those of the loss.",
        )
    try:
        watch.backward(logits)
    except Exception as error:
        raise _Failure(
            "backward-failed",
            f"The backward of the repeated batch raised {_described(error)}",
            "A training step would fail too: make it run on this batch first.",
        ) from error


def _same_samples(first: Watch, second: Watch, modules: Iterable[str]) -> bool:
    """Whether all that these modules returned in the second forward is what they returned in the first."""
    return not any(
        differ(one, other)
        for module in modules
        for one, other in zip(first.samples.get(module, []), second.samples.get(module, []), strict=False)
    )


def _divergence(logits: Tensor) -> float | None:
    if logits.dim() < 2 or logits.shape[-1] < 2:
        return None
    value = symmetric_kl(torch.stack(logits.detach().chunk(2))).mean().item()
    return value if value < float("inf") else None


def _non_finite(logits: Tensor) -> Iterator[Finding]:
    # -inf is how vocabularies are masked.
    bad = int((logits.isnan() | logits.isposinf()).sum())
    if bad:
        yield Finding(
            "non-finite-logits",
            "error",
            f"{bad} of {logits.numel()} logits are nan or +inf.",
            "Find their source first: learning rate, precision, a mask that hides a whole row.",
        )
    first, second = logits.isneginf().chunk(2)
    apart = int((first != second).sum())
    if apart:
        yield Finding(
            "non-finite-logits",
            "error",
            f"{apart} of {first.numel()} logits are -inf in one of two passes alone: there the KL is infinite.",
            "Mask the same classes in all passes.",
        )


def _probabilities(logits: Tensor) -> Iterator[Finding]:
    """Reads the graph, behind which a model may only reshape; a softmax is also known by its rows, however made."""
    last = _last_operation(logits)
    values, classes = logits.detach().float(), logits.shape[-1] if logits.dim() > 1 else 1
    sums_to_one = classes > 1 and values.min() >= 0 and ((values.sum(-1) - 1).abs() < SUM_TOLERANCE).all()
    if classes > 1 and (sums_to_one or last.startswith("Softmax")):
        yield Finding(
            "probabilities",
            "error",
            "The model ends in a softmax, and the loss takes the softmax of that: the task loss cannot fall below "
            f"{math.log(math.e + classes - 1) - 1:.2g}, and the passes hardly differ.",
            "Return the logits, which the softmax gets. Where probabilities are wanted, take their softmax afterwards.",
        )
    elif last.startswith(("Sigmoid", "Hardsigmoid")):
        yield Finding(
            "probabilities",
            "warning",
            "The model ends in a sigmoid, and binary_cross_entropy and bernoulli_kl take the sigmoid of its output.",
            "For yes and no return the logits, which the sigmoid gets. For a regression between 0 and 1 it is right.",
        )


def _last_operation(tensor: Tensor) -> str:
    """Returns autograd's name of what made the tensor, but for its shape and dtype."""
    node = tensor.grad_fn
    while node is not None and node.name().startswith(RESHAPES):
        node = node.next_functions[0][0]
    return "" if node is None else node.name()


def _repeated_masks() -> Finding:
    return Finding(
        "repeated-masks",
        "error",
        "Two forwards drew the same dropout masks: something in the forward seeds the random numbers.",
        "Remove torch.manual_seed (or set_rng_state) from the forward and from what it calls.",
    )


def _equal_logits() -> Finding:
    return Finding(
        "equal-logits",
        "note",
        "Dropout acts, but the logits of both passes are equal to within rounding, as with a head or LoRA adapter that "
        "starts at zero: the divergence is 0 for now and grows once training moves those weights.",
        "None needed. If it is still 0 after some steps, see whether the dropped activations reach the logits.",
    )


def _identical_passes(dropping: Collection[str], watch: Watch) -> Finding:
    never_ran = [name for name in dropping if name not in watch.samples]
    modules = sorted(never_ran or dropping)
    why = "never ran in the forward" if never_ran else "returned equal rows for both passes"
    return Finding(
        "identical-passes",
        "error",
        f"Dropout is active, yet the two passes are equal. These modules with dropout {why}: {some(modules)}.",
        "See whether the forward calls them, with rows of the batch in the first dimension.",
        tuple(modules),
    )


def _shared_masks(dropping: Collection[str]) -> Finding:
    return Finding(
        "shared-masks",
        "error",
        "All rows of a forward share one dropout mask, so the two passes of a repeated batch are equal; the next "
        f"forward draws another: {some(sorted(dropping))}.",
        "Run one forward for each pass: sequential_passes(model, batch).",
        tuple(sorted(dropping)),
    )


BY_CHANCE = ("repeated-masks", "identical-passes", "shared-masks")


def _too_few_rows(rows: int, chance: float) -> Finding:
    return Finding(
        "too-few-rows",
        "warning",
        f"The masks were equal in all forwards of this batch of {rows} example{'s' * (rows != 1)}, which at rates as "
        f"low as these happens by chance in up to {100 * chance:.2g} % of the trials: it cannot tell.",
        "Check with a larger batch, as training has it.",
    )


def _forward_failed(model: nn.Module, batch: Any, error: Exception) -> _Failure:
    try:
        call_model(model, batch)
        where = "the batch alone runs, so something in it or in the model does not follow its size"
    except Exception:
        where = "so did that of the batch alone"
    return _Failure(
        "forward-failed",
        f"The forward of the repeated batch failed ({where}): {_described(error)}",
        "Make model(**batch), model(*batch) or model(batch) run first; tensors that must not be repeated stay out of "
        "the batch.",
    )


def _not_tried(obstacle: str) -> Finding:
    return Finding(
        "not-tried",
        "warning",
        f"The batch was not tried, the model was only looked at: {obstacle}.",
        "Check the model with its batch where that does not hold: before it is sharded or scripted, after one forward.",
    )


def _obstacle(model: nn.Module) -> str | None:
    """Returns why the model cannot be run and then put back as it was, if it cannot."""
    tensors = [*model.parameters(), *model.buffers()]
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    if any(isinstance(module, sharded) for module in model.modules()) or any(hasattr(t, "ds_id") for t in tensors):
        return "its parameters are sharded (FSDP or DeepSpeed ZeRO)"
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "parts of it are scripted, where no hook can look"
    if any(is_lazy(tensor) for tensor in tensors):
        return "parameters of lazy modules have no shape yet"
    if any(tensor.is_meta for tensor in tensors):
        return "parameters are on the meta device"
    if any(tensor.is_inference() for tensor in tensors):
        return "parameters were made in inference mode and cannot be trained"
    return None


def _eagerly() -> AbstractContextManager[Any]:
    """Runs compiled parts eagerly in the block: hooks are seen, nothing is compiled again for the check."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

"""check_rdrop: can R-Drop act on this model and this batch?"""

import json
import sys
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..dropout import DropoutSource, config_rates, dropout_sources, single_layer_rnns
from ..passes import call_model, find_batch_size, map_tensors, repeat_batch
from ..terms import symmetric_kl
from .watch import Watch, differ, unchanged

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing `check_rdrop` found."""

    code: str
    """Stable, for programs: e.g. `no-dropout`. docs/check.md lists them all."""
    severity: Severity
    """`error`: R-Drop cannot act, or acts wrongly; `warning`: it acts, but know this; `note`: for the record."""
    message: str
    remedy: str
    modules: tuple[str, ...] = ()
    """The names of the modules concerned, as in `model.named_modules()`."""


@dataclass(frozen=True)
class CheckReport:
    """What `check_rdrop` found: `print(report)` is for people, `report.as_dict()` for programs."""

    model: str
    findings: tuple[Finding, ...]
    sources: tuple[DropoutSource, ...]
    divergence: float | None
    """`symmetric_kl` between the two passes, mean over all positions; None where there is nothing to measure."""

    @property
    def ok(self) -> bool:
        """Whether there is no error among the findings."""
        return not any(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The report in what JSON has: dicts, lists, strings, numbers, null."""
        report: dict[str, Any] = json.loads(json.dumps({"ok": self.ok, **asdict(self)}))
        return report

    def __str__(self) -> str:
        verdict = "can act" if self.ok else "cannot act as it should"
        counts = Counter(finding.severity for finding in self.findings)
        found = ", ".join(f"{counts[severity]} {severity}{'s' * (counts[severity] > 1)}" for severity in counts)
        return "\n\n".join(
            [
                f"R-Drop {verdict} on {self.model}: {found or 'nothing found'}",
                *map(_paragraph, self.findings),
                _measurements(self.sources, self.divergence),
            ]
        )


def check_rdrop(model: nn.Module, batch: Any = None) -> CheckReport:
    """Whether R-Drop can act on `model` and `batch`, and what stands in its way.

        report = check_rdrop(model, batch)
        print(report)
        assert report.ok

    Without a batch the model is only looked at, which costs next to nothing. With one, two forwards and one backward
    of the repeated batch run in training mode, with hooks on every submodule: does dropout draw different masks for
    the two passes, and new ones in the next forward; does gradient checkpointing draw the same masks again in backward;
    are the logits finite? The batch is called as in `sequential_passes`; the output is a tensor, or a tuple, mapping or
    object with `logits`. A forward that raises is a finding, not an exception.

    The model is never changed: parameters, buffers, gradients, flags, hooks and all random states are put back.
    With a batch that takes the memory of one copy of the parameters, besides that of one training step.

    Cannot be detected: faults in compiled code other than its memory budget, since the forwards here run eagerly; and
    gradient checkpointing that loses the random state when nothing after the dropout inside it is a module, unless the
    checkpoint is that of Hugging Face or of torch's `checkpoint_wrapper`.
    """
    compiled = _is_compiled(model)
    model = _unwrapped(model)
    sources = tuple(dropout_sources(model))
    trial = Trial() if batch is None else _try(model, batch)
    findings = [
        *_eval_mode(model),
        *_no_dropout(model, sources, trial.passes_differ),
        *_frozen_dropout(model, sources),
        *_single_layer_rnn(model),
        *_checkpointing_without_rng(model, sources, trial.recomputed_differently),
        *_compile_memory_budget(compiled),
        *_layerdrop(sources),
        *_batch_norm(model),
        *trial.findings,
    ]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return CheckReport(type(model).__name__, tuple(findings), sources, trial.divergence)


# ------------------------------------------------------------------------------------------- looking at the model


def _eval_mode(model: nn.Module) -> Iterator[Finding]:
    if not model.training:
        yield Finding(
            "eval-mode",
            "error",
            f"{type(model).__name__} is in evaluation mode: nothing is dropped, the passes are equal.",
            "Call model.train(). Hugging Face's from_pretrained gives models in evaluation mode; trainers call it.",
        )


def _no_dropout(model: nn.Module, sources: Collection[DropoutSource], passes_differ: bool | None) -> Iterator[Finding]:
    if _acting(model, sources):
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
        _rates_remedy(model),
        tuple(_unique(source.module for source in sources)),
    )


def _acting(model: nn.Module, sources: Iterable[DropoutSource]) -> list[DropoutSource]:
    """The sources that draw anew for every row. A model in evaluation mode is judged as if it were training."""
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
        reasons.append(f"Rate 0: {_some(off)}.")
    if idle:
        reasons.append(f"Not acting (evaluation mode, or an RNN of one layer): {_some(idle)}.")
    if unused and not idle:
        reasons.append(
            f"{_some(unused)} reached no module: a rate set in the config after the model is built has no effect."
        )
    return " ".join(reasons) or "The model has no dropout at all."


def _rates_remedy(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    if not hasattr(config, "model_type"):
        return "Build the model with dropout rates above 0 (0.1 is usual) and keep its modules in training mode."
    names = [
        name
        for name, value in vars(config).items()
        if ("dropout" in name or "pdrop" in name)
        and type(value) in (int, float)
        and not name.startswith(("activation", "classifier", "summary"))
    ]
    rates = ", ".join(f"{name}=0.1" for name in names) or "its dropout rates"
    return (
        f"Set {rates} in the {type(config).__name__} before the model is built: "
        "from_pretrained(name, ...) takes them as keywords. In ViT, DeiT, ModernBERT, Llama, Qwen3, Gemma3 and others "
        "the default is 0. With LoRA, lora_dropout serves as well."
    )


def _frozen_dropout(model: nn.Module, sources: Iterable[DropoutSource]) -> Iterator[Finding]:
    modules = dict(model.named_modules())
    frozen = _unique(source.module for source in sources if source.rate > 0 and not modules[source.module].training)
    if frozen and model.training:
        yield Finding(
            "frozen-dropout",
            "warning",
            f"The model trains, but these modules with dropout are in evaluation mode: {_some(frozen)}.",
            "If that is not meant, call model.train() after whatever called eval() on them.",
            tuple(frozen),
        )


def _single_layer_rnn(model: nn.Module) -> Iterator[Finding]:
    rnns = single_layer_rnns(model)
    if rnns:
        yield Finding(
            "single-layer-rnn",
            "warning",
            f"The dropout of these RNNs never acts, since it sits between layers and they have one: {_some(rnns)}.",
            "Put an nn.Dropout after the RNN, or give it num_layers=2.",
            tuple(rnns),
        )


def _checkpointing_without_rng(
    model: nn.Module, sources: Iterable[DropoutSource], recomputed_differently: Collection[str]
) -> Iterator[Finding]:
    dropping = [source.module for source in _acting(model, sources)]
    declared = [
        name
        for name, module in model.named_modules()
        if _drops_rng(module) and any(inner == name or inner.startswith(name + ".") or not name for inner in dropping)
    ]
    if declared or recomputed_differently:
        modules = _unique(declared or recomputed_differently)
        yield Finding(
            "checkpoint-rng",
            "error",
            "Gradient checkpointing recomputes other activations in backward than the forward had (new dropout masks), "
            f"so the gradient is not that of the loss: {_some(modules)}.",
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
            f"skip: {_some(map(str, dropping))}.",
            "Run one forward for each pass, sequential_passes(model, batch, dropout=(None, None)), or set it to 0.",
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
            f"statistics once for the repeated batch: {_some(norms)}.",
            "Usually harmless. To keep the passes independent, use GroupNorm or LayerNorm, or freeze the statistics "
            "(module.eval()).",
            tuple(norms),
        )


# ------------------------------------------------------------------------------------------------- trying a batch


@dataclass(frozen=True)
class Trial:
    """What two forwards and a backward showed; as it stands here, nothing was tried."""

    findings: tuple[Finding, ...] = ()
    passes_differ: bool | None = None
    recomputed_differently: tuple[str, ...] = ()
    divergence: float | None = None


class _Failure(Exception):  # noqa: N818 - it ends the trial, not the check
    def __init__(self, finding: Finding) -> None:
        self.finding = finding


def _try(model: nn.Module, batch: Any) -> Trial:
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
    dropping = {source.module for source in _acting(model, dropout_sources(model))}
    with Watch(model, rows) as first:
        logits = _logits(model, batch, repeated, rows)
        _backward(first, logits)
    with Watch(model, rows) as second:
        next_logits = _logits(model, batch, repeated, rows)
    # Either forward may show it: a small batch at a low rate can draw equal masks once.
    logits_differ = any(differ(*forward.detach().chunk(2)) for forward in (logits, next_logits))
    passes_differ = logits_differ or not dropping.isdisjoint(first.passes_differ | second.passes_differ)
    repeats = _same_samples(first, second, dropping) and not differ(logits.detach(), next_logits.detach())
    findings = [*_non_finite(logits)]
    if passes_differ and repeats:
        findings.append(_repeated_masks())
    elif passes_differ and not logits_differ:
        findings.append(_equal_logits())
    elif dropping and not passes_differ:
        findings.append(_identical_passes(dropping, first) if repeats else _shared_masks(dropping))
    return Trial(tuple(findings), passes_differ, tuple(first.recomputed_differently), _divergence(logits))


def _repeated(batch: Any) -> tuple[Any, int]:
    """[x; x] cut off from the caller's graph, and its number of rows."""
    try:
        rows = 2 * find_batch_size(batch)
        if rows == 0:
            raise ValueError("it has no rows")
        return map_tensors(Tensor.detach, repeat_batch(batch)), rows
    except (TypeError, ValueError) as error:
        raise _Failure(
            Finding(
                "batch", "error", f"The batch cannot be repeated: {error}.", "Give the batch as repeat_batch needs it."
            )
        ) from error


def _logits(model: nn.Module, batch: Any, repeated: Any, rows: int) -> Tensor:
    try:
        output = call_model(model, repeated)
    except Exception as error:
        raise _Failure(_forward_failed(model, batch, error)) from error
    logits = _find_logits(output, rows)
    if logits is None:
        raise _Failure(
            Finding(
                "no-logits",
                "error",
                f"No logits in the output, a {type(output).__name__}.",
                "Return a tensor, or a tuple, mapping or object with `logits`.",
            )
        )
    if logits.dim() == 0 or logits.shape[0] % rows:
        raise _Failure(
            Finding(
                "rows",
                "error",
                f"The repeated batch has {rows} rows, the logits have shape {tuple(logits.shape)}: their first "
                "dimension does not go row by row, so the passes cannot be told apart.",
                "R-Drop needs inputs and logits with the batch in the first dimension (batch_first=True).",
            )
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
            Finding(
                "no-gradient",
                "error",
                "The logits carry no gradient: nothing would be learned from them.",
                "Check that parameters require gradients, that the forward does not run under no_grad, and that the "
                "logits are those of the loss.",
            )
        )
    try:
        watch.backward(logits)
    except Exception as error:
        raise _Failure(
            Finding(
                "backward-failed",
                "error",
                f"The backward of the repeated batch raised {_described(error)}",
                "A training step would fail too: make it run on this batch first.",
            )
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
        f"Dropout is active, yet the two passes are equal. These modules with dropout {why}: {_some(modules)}.",
        "See whether the forward calls them, with rows of the batch in the first dimension.",
        tuple(modules),
    )


def _shared_masks(dropping: Collection[str]) -> Finding:
    return Finding(
        "shared-masks",
        "error",
        "All rows of a forward share one dropout mask, so the two passes of a repeated batch are equal; the next "
        f"forward draws another: {_some(sorted(dropping))}.",
        "Run one forward for each pass: sequential_passes(model, batch, dropout=(None, None)).",
        tuple(sorted(dropping)),
    )


def _forward_failed(model: nn.Module, batch: Any, error: Exception) -> Finding:
    try:
        call_model(model, batch)
        where = "the batch alone runs, so something in it or in the model does not follow its size"
    except Exception:
        where = "so did that of the batch alone"
    return Finding(
        "forward-failed",
        "error",
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


# ------------------------------------------------------------------------------------------------------- wrappers


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _is_compiled(model: nn.Module) -> bool:
    return any(
        "_orig_mod" in module._modules or vars(module).get("_compiled_call_impl") is not None
        for module in model.modules()
    )


def _obstacle(model: nn.Module) -> str | None:
    """Why the model cannot be run and then put back as it was, if it cannot."""
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
    """Compiled parts run eagerly: hooks are seen, nothing is compiled again for the check."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


# --------------------------------------------------------------------------------------------------------- wording


def _paragraph(finding: Finding) -> str:
    wrap = partial(textwrap.fill, width=79, break_long_words=False, break_on_hyphens=False)
    message = wrap(finding.message, initial_indent="  ", subsequent_indent="  ")
    remedy = wrap(finding.remedy, initial_indent="  Remedy: ", subsequent_indent="  ")
    return f"{finding.severity}: {finding.code}\n{message}\n{remedy}"


def _measurements(sources: Collection[DropoutSource], divergence: float | None) -> str:
    rates = Counter(f"{source.kind.replace('_', ' ')} {source.rate:g}" for source in sources if source.active)
    listed = ", ".join(f"{kind_and_rate} (x{count})" for kind_and_rate, count in rates.items())
    lines = [f"sources     {sum(rates.values())} of {len(sources)} active" + (f": {listed}" if listed else "")]
    if divergence is not None:
        lines.append(f"divergence  {divergence:.3g} (symmetric KL of two passes of this batch)")
    return "\n".join(lines)


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = [name or "the model itself" for name in names]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

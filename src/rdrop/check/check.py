"""`check_rdrop`: can R-Drop act on this model and this batch?"""

from typing import Any

from torch import nn

from ..dropout import dropout_sources
from .report import SEVERITIES, CheckReport, Trial
from .static import static_findings
from .trial import try_batch


def check_rdrop(model: nn.Module, batch: Any = None) -> CheckReport:
    """Whether R-Drop can act on `model` and `batch`, and what stands in its way.

        report = check_rdrop(model, batch)
        print(report)
        assert report.ok

    Without a batch the model is only looked at, which costs next to nothing. With one, two forwards and one backward
    of the repeated batch run in training mode, with hooks on every submodule (up to 400 forwards where a batch of few
    rows and low rates draw equal masks by chance): does dropout draw different masks for
    the two passes, and new ones in the next forward; does gradient checkpointing draw the same masks again in backward;
    are the logits finite? The batch is called as in `sequential_passes`; the output is a tensor, or a tuple, mapping or
    object with `logits`. A forward that raises is a finding, not an exception.

    The model is left as it was: parameters, buffers, gradients, flags, hooks, tensors and containers in attributes, and
    all random states are put back; what the forward changes inside objects of other classes is not. With a batch that
    takes the memory of one copy of the parameters, besides that of one training step.

    Cannot be detected: faults in compiled code other than its memory budget, since the forwards here run eagerly; and
    gradient checkpointing that loses the random state when nothing after the dropout inside it is a module, unless the
    checkpoint is that of Hugging Face or of torch's `checkpoint_wrapper`.
    """
    compiled = _is_compiled(model)
    model = _unwrapped(model)
    sources = tuple(dropout_sources(model))
    trial = Trial() if batch is None else try_batch(model, batch)
    findings = [*static_findings(model, sources, trial, compiled=compiled), *trial.findings]
    findings.sort(key=lambda finding: SEVERITIES.index(finding.severity))
    return CheckReport(type(model).__name__, tuple(findings), sources, trial.divergence)


def _unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside `torch.compile`, `DataParallel` and `DistributedDataParallel`."""
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

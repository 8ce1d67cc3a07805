"""Checks a model that trains: its passes must differ, backward must see their masks again, its loss must be known.

Each is looked at as training begins, whichever trainer or loop it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rdrop.alpha import AlphaSchedule, alpha_at
from rdrop.check import check_rdrop
from rdrop.check.static import rates_remedy
from rdrop.dropout import acting_sources, dropout_sources
from rdrop.integrations.targets import SAY_WHAT, Target
from rdrop.passes import agree, split_passes


def why_gradient_is_wrong(model: nn.Module) -> str | None:
    """Returns why backward would see other dropout masks than the forward, with the remedy; nothing else shows it."""
    for finding in check_rdrop(model).findings:
        if finding.severity == "error" and finding.code not in ("no-dropout", "eval-mode"):
            return f"{finding.message} {finding.remedy}"
    return None


def warn_of_batch_norm(model: nn.Module) -> None:
    """Warns where the statistics of batch normalization mix the passes, in the words of `check_rdrop`."""
    for finding in check_rdrop(model).findings:
        if finding.code == "batch-norm":
            warnings.warn(f"{finding.message} {finding.remedy}", stacklevel=2)


def warn_where_alpha_stopped(ended: int, planned: int, alpha: float, schedule: AlphaSchedule) -> None:
    """Warns where training ended after `ended` updates, before the last planned one, at which alpha is its value."""
    if alpha > 0 and schedule != "constant" and 0 < ended < planned:
        reached = alpha_at(ended - 1, planned, alpha, schedule)
        warnings.warn(
            f"training ended after {ended} of {planned} updates, when alpha had risen to {reached:.3g} of {alpha:g}: "
            f"alpha (={alpha:g}) is nominal",
            stacklevel=3,
        )


ENOUGH_UPDATES = 10
"""Updates after which a divergence of exactly 0 is no mere beginning, as with LoRA, whose own update starts at 0."""


def warn_of_no_divergence(updates: int) -> None:
    """Warns that all passes of so many updates agreed to the bit, although the model has dropout."""
    warnings.warn(
        f"the divergence was exactly 0 in all {updates} updates: the model has dropout, which never made its passes "
        "differ, so R-Drop does nothing. print(check_rdrop(model, batch)) says why",
        stacklevel=3,
    )


def require_randomness(model: nn.Module, outputs: Sequence[Tensor], passes: int) -> None:
    """Raises a ValueError if nothing is random in the model, by its modules or by the `outputs` of a repeated batch.

    By the modules first: dropout inside LoRA acts, although at the first step its outputs are still equal.
    """
    sources = dropout_sources(model)
    layerdrop = [source for source in sources if source.active and source.kind == "layerdrop"]
    if layerdrop:
        warnings.warn(
            f"layerdrop ({layerdrop[0]}) drops the same layers in every pass, because the passes share one forward: it "
            "adds nothing to the divergence, dropout inside the layers does",
            stacklevel=2,
        )
    if acting_sources(model):
        return
    if all(agree(split_passes(output.detach(), passes)) for output in outputs):
        off = ", ".join(str(source) for source in sources[:4]) or "no known dropout"
        unseen = "" if sources else ". If it calls F.dropout, a head that starts at zero hides it: use nn.Dropout"
        raise ValueError(
            f"nothing is random in {type(model).__name__} while it trains ({off}), so all passes agree and R-Drop does "
            f"nothing. {rates_remedy(model)} Or train with alpha=0{unseen}"
        )


def own_loss_is_known(
    model: nn.Module, outputs: Any, targets: Sequence[Target], auxiliary_loss: Tensor | None = None
) -> bool:
    """Whether the model's own loss is shown to be the mean of the losses per position that its targets predict.

    `auxiliary_loss` is what the model is known to add to it. Class weights, another addition, labels aligned otherwise:
    all show as another number, which is a ValueError, unless all positions have the same loss, as a fresh head often
    gives, or one has no finite loss. Then this batch cannot tell but the next can.
    """
    if outputs.get("loss") is None:
        raise ValueError(f"{type(model).__name__} returned no loss of its own. Say what it is trained with: {SAY_WHAT}")
    own = outputs["loss"].detach()
    expected, spread = torch.zeros_like(own), torch.zeros_like(own)
    for target in targets:
        values = target.task_losses(target.logits(outputs).detach())
        passes = len(values) // len(target.labels)
        expected = expected + target.share * values.sum() / (passes * target.count()[1])
        counted = values[values > 0]
        if len(counted):
            spread = torch.maximum(spread, counted.max() - counted.min())
    if auxiliary_loss is not None:
        expected = expected + auxiliary_loss.detach()
    if not expected.isfinite():
        return False
    # A loss that a model computes in 16 bits was seen to be off by up to 1.6 of their eps, whatever its head and size.
    tolerance = max(2e-5, 3 * torch.finfo(own.dtype).eps) * float(expected.abs() + 1e-3)
    if not torch.isclose(own, expected.to(own.dtype), rtol=0, atol=tolerance):
        raise ValueError(
            f"{type(model).__name__} reports a loss of {own.item():.6g}, where the loss known for its class is "
            f"{expected.item():.6g} for the same logits: it is trained with something else (class weights, an "
            f"auxiliary loss, labels aligned otherwise). Say with what: {SAY_WHAT}. What is added to that, such as a "
            "router's loss, let auxiliary_loss(self, outputs) return"
        )
    return bool(spread > 4 * tolerance)

"""R-Drop for PyTorch: the loss, and what it needs. The contents page: names grouped by file."""

from typing import TYPE_CHECKING

from .check import CheckReport, check_rdrop
from .dropout import dropout_rate
from .legacy import legacy_alpha
from .loss import check_logits, rdrop_loss
from .passes import repeat_batch, sequential_passes, split_passes
from .terms import (
    LossTerms,
    bernoulli_kl,
    binary_cross_entropy,
    cross_entropy,
    kl_from_first,
    squared_difference,
    squared_error,
    symmetric_kl,
)
from .views import CUTOFF, RDROP, SIMCUT, Cutoff, View, perturb_batch, task_passes_of, views_of

if TYPE_CHECKING:
    from .linear_loss import linear_rdrop_loss
else:

    def __getattr__(name: str) -> object:
        """Imports `linear_rdrop_loss` when first asked for: it registers operators, which takes torch a second."""
        if name != "linear_rdrop_loss":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .linear_loss import linear_rdrop_loss

        return linear_rdrop_loss


__version__ = "0.1.0"

__all__ = [
    "CUTOFF",
    "RDROP",
    "SIMCUT",
    "CheckReport",
    "Cutoff",
    "LossTerms",
    "View",
    "__version__",
    "bernoulli_kl",
    "binary_cross_entropy",
    "check_logits",
    "check_rdrop",
    "cross_entropy",
    "dropout_rate",
    "kl_from_first",
    "legacy_alpha",
    "linear_rdrop_loss",
    "perturb_batch",
    "rdrop_loss",
    "repeat_batch",
    "sequential_passes",
    "split_passes",
    "squared_difference",
    "squared_error",
    "symmetric_kl",
    "task_passes_of",
    "views_of",
]


def __dir__() -> list[str]:
    return __all__

"""R-Drop for PyTorch: the loss, and what it needs. The contents page: names grouped by file."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .alpha import alpha_at, legacy_alpha
    from .check import CheckReport, check_rdrop
    from .dropout import dropout_rate
    from .linear_loss import linear_rdrop_loss
    from .loss import check_logits, rdrop_loss
    from .passes import repeat_batch, sequential_passes, split_passes
    from .terms import (
        LossTerms,
        bernoulli_kl,
        binary_cross_entropy,
        cross_entropy,
        detached_kl,
        kl_from_first,
        squared_difference,
        squared_error,
        symmetric_kl,
    )
    from .views import CUTOFF, RDROP, SIMCUT, Cutoff, View, perturb_batch, task_passes_of, views_of

# The same, for Python: a name is imported when it is first asked for. Torch takes seconds, and the command `rdrop list`
# needs none of it.
_NAMES = {
    "alpha": ("alpha_at", "legacy_alpha"),
    "check": ("CheckReport", "check_rdrop"),
    "dropout": ("dropout_rate",),
    "linear_loss": ("linear_rdrop_loss",),
    "loss": ("check_logits", "rdrop_loss"),
    "passes": ("repeat_batch", "sequential_passes", "split_passes"),
    "terms": (
        *("LossTerms", "bernoulli_kl", "binary_cross_entropy", "cross_entropy", "detached_kl"),
        *("kl_from_first", "squared_difference", "squared_error", "symmetric_kl"),
    ),
    "views": ("CUTOFF", "RDROP", "SIMCUT", "Cutoff", "View", "perturb_batch", "task_passes_of", "views_of"),
}

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
    "alpha_at",
    "bernoulli_kl",
    "binary_cross_entropy",
    "check_logits",
    "check_rdrop",
    "cross_entropy",
    "detached_kl",
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


def __getattr__(name: str) -> object:
    if name in _NAMES:
        return import_module(f".{name}", __name__)
    for module, names in _NAMES.items():
        if name in names:
            globals()[name] = value = getattr(import_module(f".{module}", __name__), name)
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__

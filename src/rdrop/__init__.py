"""R-Drop for PyTorch: the loss, and what it needs. The contents page: names grouped by file, nothing else."""

from typing import TYPE_CHECKING, Any

from .check import CheckReport as CheckReport
from .check import check_rdrop as check_rdrop
from .dropout import dropout_rate as dropout_rate
from .legacy import legacy_alpha as legacy_alpha
from .loss import LossTerms as LossTerms
from .loss import bernoulli_kl as bernoulli_kl
from .loss import binary_cross_entropy as binary_cross_entropy
from .loss import check_logits as check_logits
from .loss import cross_entropy as cross_entropy
from .loss import kl_from_first as kl_from_first
from .loss import rdrop_loss as rdrop_loss
from .loss import squared_difference as squared_difference
from .loss import squared_error as squared_error
from .loss import symmetric_kl as symmetric_kl
from .passes import repeat_batch as repeat_batch
from .passes import sequential_passes as sequential_passes
from .passes import split_passes as split_passes
from .views import CUTOFF as CUTOFF
from .views import RDROP as RDROP
from .views import SIMCUT as SIMCUT
from .views import Cutoff as Cutoff
from .views import View as View
from .views import perturb_batch as perturb_batch
from .views import task_passes_of as task_passes_of
from .views import views_of as views_of

if TYPE_CHECKING:
    from .linear_loss import linear_rdrop_loss as linear_rdrop_loss
else:

    def __getattr__(name: str) -> Any:
        """`linear_rdrop_loss` is imported when first asked for: it registers operators, which takes torch a second."""
        if name != "linear_rdrop_loss":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from .linear_loss import linear_rdrop_loss

        return linear_rdrop_loss


__version__ = "0.1.0"

"""Fused kernels of the R-Drop loss: both terms and their gradient from logits, without a V-sized temporary.

`rdrop_loss` calls them where they can run; nobody else needs to. Nothing here knows of models or reductions.

THE CONTRACT. A *position* is one label and its rows of V logits in m passes. Arguments common to the three operators:

    logits (m*N, T, V)        all of pass 1, then all of pass 2, ...; any strides in the first two dimensions, the
                              classes of a row contiguous; a dtype the implementation has
    labels (N, T) int64       IGNORED (-1): both terms are 0, the rows are never read, their gradient is 0. Any other
                              label outside [0, V) makes the task loss NaN. Or
    labels (N, T, V) floating probabilities of the classes, computed in float32. One outside [0, 1], or a row that does
                              not add up to 1, makes the task loss NaN.
    weight (V,) or None       class weights, as in F.cross_entropy
    label_smoothing float     as in F.cross_entropy
    passes int                m; with 1 the task loss is the plain cross-entropy and the divergence 0
    divergence str            which one of `rdrop`: "symmetric_kl", "detached_kl" or "kl_from_first"
    implementation str        which module of this package computes: "cpu", "triton"

The operators, in torch.ops.rdrop:

    rows_forward(...) -> task (N, T), divergence (N, T), statistics
        task = mean over passes of rdrop.cross_entropy and the divergence, each per position, in float32, as
        accurate as the reference (benchmarks/accuracy.py). Differentiable once in `logits`, through rows_backward. A
        NaN, a +inf, a -inf in some passes only, or a -inf at the label make one of the two non-finite. `statistics` is
        what the implementation wants to find again in its backward: 1 + 4m numbers a position, layout its own.
    rows_backward(..., statistics, grad_task (N, T), grad_divergence (N, T)) -> gradient (m*N, T, V), contiguous
        of (grad_task * task + grad_divergence * divergence).sum() in the logits, in their dtype. The label's entry is
        rounded once, from float32. With grad_divergence 0 it is exactly the gradient of the cross-entropy alone.
    rows_forward_backward_(..., grad_task, grad_divergence) -> task, divergence
        both in a single pass over the rows, for coefficients known in advance: afterwards `logits` holds the gradient.
        Positions whose terms are not finite are left as they were, so that the caller can say what is wrong with them.

The result does not depend on the number of threads, to the bit.

An implementation is a module with `why_not()`, `why_not_for(logits, passes)`, and `launch(...)` of the common arguments
less `implementation`, the divergence by its place in DIVERGENCES, `statistics`, and the tensors it is to fill; see
`cpu.py`.
"""

from .operators import DIVERGENCES as DIVERGENCES
from .operators import IGNORED as IGNORED
from .operators import KERNEL_OF_DEVICE as KERNEL_OF_DEVICE
from .operators import Implementation as Implementation
from .operators import available as available
from .operators import marked as marked
from .operators import overwriting_loss as overwriting_loss
from .operators import row_terms as row_terms
from .operators import warn_if_missing as warn_if_missing
from .operators import why_not as why_not

"""Cross-entropies of other projects, as forms to be measured beside ours where they are installed and there is a GPU.

None of them computes R-Drop: each is plain cross-entropy of the same rows, the price that R-Drop's loss is held to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import NamedTuple

from torch import Tensor

from rdrop.terms import IGNORE_INDEX


class Peer(NamedTuple):
    """A function of another package, and whether it knows label smoothing."""

    place: str
    """As module:function."""
    smooths: bool


FROM_LOGITS = {
    "liger": Peer("liger_kernel.transformers.functional:liger_cross_entropy", smooths=True),
    "quack": Peer("quack.cross_entropy:cross_entropy", smooths=False),
}
FROM_HIDDEN = {
    "liger": Peer("liger_kernel.transformers.functional:liger_fused_linear_cross_entropy", smooths=True),
    "cut_cross_entropy": Peer("cut_cross_entropy:linear_cross_entropy", smooths=False),
}


def missing(peers: Mapping[str, Peer]) -> dict[str, str]:
    """Returns by name why each peer that cannot be measured here is left out."""
    return {name: why for name, peer in peers.items() if isinstance(why := _load(peer), str)}


def from_logits(smoothing: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Returns the peers that are here as forms: `(2N, V)` logits and `(N,)` labels to the mean loss."""
    return {name: partial(_of_logits, loss) for name, loss in _here(FROM_LOGITS, smoothing).items()}


def from_hidden(weight: Callable[[], Tensor], smoothing: float) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Returns the peers that are here as forms: `(2N, D)` hidden states and `(N,)` labels to the mean loss."""
    return {name: partial(_of_hidden, loss, weight) for name, loss in _here(FROM_HIDDEN, smoothing).items()}


def _of_logits(loss: Callable[..., Tensor], logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits, labels.repeat(2))


def _of_hidden(loss: Callable[..., Tensor], weight: Callable[[], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    return loss(hidden, weight(), labels.repeat(2))


def _here(peers: Mapping[str, Peer], smoothing: float) -> dict[str, Callable[..., Tensor]]:
    """Returns the functions that can be imported, with their options."""
    found: dict[str, Callable[..., Tensor]] = {}
    for name, peer in peers.items():
        loss = _load(peer)
        if not isinstance(loss, str):
            smoothed = {"label_smoothing": smoothing} if peer.smooths else {}
            found[name] = partial(loss, ignore_index=IGNORE_INDEX, **smoothed)
    return found


def _load(peer: Peer) -> Callable[..., Tensor] | str:
    """Returns the function, or why there is none."""
    module, _, name = peer.place.partition(":")
    try:
        return getattr(import_module(module), name)  # type: ignore[no-any-return]
    except Exception as error:  # what a package for GPUs raises where there is none is its own affair
        return f"{module} cannot be imported: {error}"

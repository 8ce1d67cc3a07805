"""Adaptive input and adaptive softmax (Baevski & Auli, ICLR 2019) around a body of transformers, and R-Drop for them.

The words are numbered by falling frequency and divided at the cutoffs: the most frequent ones are the short list, the
others clusters. The head is a softmax over the short list and the clusters, each tail one over the words of a cluster:

    P(word) = head(word)                          for a word of the short list
    P(word) = head(cluster) * tail(word)          for a word of a cluster

The logits of a position are those of the head, then those of each tail, side by side, `(..., H + S_1 + ... + S_K)`.
`Clusters` knows that layout, and computes from it the cross-entropy and the divergence of the whole distribution P.

**The divergence.** By the chain rule, for the distributions P and Q of two passes,

    KL(P||Q) = KL(head_P||head_Q) + sum_c head_P(c) KL(tail_c of P || tail_c of Q)

Each direction weights the tails with its own head, so the symmetric KL of the whole is *not* a weighted sum of the
tails' symmetric KLs. It is

    J(P, Q) = J(head) + 1/2 sum_c [ head_P(c) KL(P_c||Q_c) + head_Q(c) KL(Q_c||P_c) ]

and the mean over all pairs of m passes is, with `K_c(a)` the mean over the other passes b of KL(tail_c of a || of b),

    J = J(head) + sum_c mean over a of head_a(c) K_c(a)

Every term is >= 0, so nothing cancels between them. It needs every tail at every position, also where the
label is in the head: a sum over the cluster of the label alone is no divergence of P.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from rdrop import cross_entropy, kl_from_first, symmetric_kl
from rdrop.terms import refuse_second_derivative


@dataclass(frozen=True)
class Clusters:
    """`Clusters((20_000, 60_000), 267_735)`: a short list of 20,000 words and two clusters."""

    cutoffs: tuple[int, ...]
    vocabulary: int

    def __post_init__(self) -> None:
        edges = (0, *self.cutoffs, self.vocabulary)
        if not self.cutoffs or any(low >= high for low, high in pairwise(edges)):
            raise ValueError(
                f"cutoffs (={list(self.cutoffs)}) must be rising numbers above 0 and below the vocabulary "
                f"(={self.vocabulary})"
            )

    @property
    def bands(self) -> list[tuple[int, int]]:
        """First word and the one after the last, of the short list and of each cluster."""
        return list(pairwise((0, *self.cutoffs, self.vocabulary)))

    @property
    def sizes(self) -> list[int]:
        """Logits of the head and of each tail."""
        (_, short_list), *tails = self.bands
        return [short_list + len(tails), *[high - low for low, high in tails]]

    def split(self, logits: Tensor) -> tuple[Tensor, ...]:
        """Head, tails: views of the last dimension."""
        return torch.split(logits, self.sizes, -1)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        """`log P` of every word, `(..., vocabulary)`: for tests and generation; training does without."""
        head, *tails = (part.log_softmax(-1) for part in self.split(logits))
        short_list = self.cutoffs[0]
        of_clusters = [tail + head[..., short_list + i, None] for i, tail in enumerate(tails)]
        return torch.cat([head[..., :short_list], *of_clusters], -1)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """`-log P` of the labels, `(M, ...)`; a tail is looked at only where the label is in it."""
        head, *tails = self.split(logits)
        in_head = labels
        for i, (low, high) in enumerate(self.bands[1:]):
            in_head = torch.where((labels >= low) & (labels < high), self.cutoffs[0] + i, in_head)
        values = cross_entropy(head, in_head)
        for tail, (low, high) in zip(tails, self.bands[1:], strict=True):
            place = ((labels >= low) & (labels < high)).nonzero(as_tuple=True)
            values = values.index_put(place, cross_entropy(tail[place], labels[place] - low), accumulate=True)
        return values

    def divergence(self, passes: Tensor) -> Tensor:
        """The symmetric KL of P, mean over pairs of passes: `(m, ..., H + S_1 + ... + S_K)` to `(...)`.

        Some positions at a time, with their gradient: it needs no memory but the gradient's. Differentiable once.
        """
        rows = passes.reshape(len(passes), -1, passes.shape[-1])
        wanted = torch.is_grad_enabled() and passes.requires_grad
        value: Tensor = _InParts.apply(self.divergence_of_rows, rows, wanted)  # type: ignore[no-untyped-call]
        return value.view(passes.shape[1:-1])

    def divergence_of_rows(self, passes: Tensor) -> Tensor:
        """The same for `(m, N, H + S_1 + ... + S_K)`, all at once."""
        head, *tails = self.split(passes)
        of_clusters = head.log_softmax(-1)[..., self.cutoffs[0] :].exp()  # (m, ..., K)
        value = symmetric_kl(head)
        for i, tail in enumerate(tails):
            directed = torch.stack([kl_from_first(tail.roll(-a, 0)) for a in range(len(tail))])  # (m, ...): from pass a
            value = value + (of_clusters[..., i] * directed).mean(0)
        return value


class _InParts(torch.autograd.Function):
    """`function(rows)`, `(m, N, W)` to `(N,)`, where each value depends on its own rows only."""

    @staticmethod
    def forward(ctx: Any, function: Callable[[Tensor], Tensor], rows: Tensor, gradient_wanted: bool) -> Tensor:
        # On CPU what fits into its cache; on an accelerator what is worth a kernel's launch.
        at_once = max((2**17 if rows.device.type == "cpu" else 2**26) // rows[:, 0].numel(), 1)
        gradient = torch.empty_like(rows) if gradient_wanted else None
        values = []
        for start in range(0, rows.shape[1], at_once):
            part = rows[:, start : start + at_once].detach().requires_grad_(gradient_wanted)
            with torch.set_grad_enabled(gradient_wanted):
                value = function(part)
            if gradient is not None:
                (gradient[:, start : start + at_once],) = torch.autograd.grad(value, part, torch.ones_like(value))
            values.append(value.detach())
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        refuse_second_derivative("Clusters.divergence")
        (gradient,) = ctx.saved_tensors
        return None, gradient * upstream[None, :, None], None


class AdaptiveEmbedding(nn.Module):
    """Embeddings of width D for the short list and `D / factor**i` for cluster i, each projected to D."""

    def __init__(self, clusters: Clusters, hidden_size: int, factor: int) -> None:
        super().__init__()
        self.clusters = clusters
        widths = band_widths(len(clusters.bands), hidden_size, factor)
        sizes = [high - low for low, high in clusters.bands]
        self.bands = nn.ModuleList(nn.Embedding(size, width) for size, width in zip(sizes, widths, strict=True))
        # As the softmax wants them, so that it can share them: `hidden = embedded @ projection`.
        self.projections = nn.ParameterList(torch.empty(width, hidden_size) for width in widths)
        for words, projection in zip(self.words(), self.projections, strict=True):
            _initialize(words, projection)

    def words(self) -> list[nn.Parameter]:
        """The word vectors of each band, `(S_i, D / factor**i)`."""
        return [parameter for band in self.bands for parameter in band.parameters()]

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden: Tensor = self.projections[0].new_zeros(*input_ids.shape, self.projections[0].shape[1])
        for band, projection, (low, high) in zip(self.bands, self.projections, self.clusters.bands, strict=True):
            place = ((input_ids >= low) & (input_ids < high)).nonzero(as_tuple=True)
            # Also where there are none: DDP waits for the gradient of every parameter.
            hidden = hidden.index_put(place, (band(input_ids[place] - low) @ projection).to(hidden.dtype))
        return hidden


class AdaptiveSoftmax(nn.Module):
    """Hidden states to logits in the layout of `Clusters`: the head from all of D, tail i from `D / factor**i`.

    `tied_to` shares the word vectors of the short list and of every tail with the input, and the tails' projections.
    """

    def __init__(
        self, clusters: Clusters, hidden_size: int, factor: int, dropout: float, tied_to: AdaptiveEmbedding | None
    ) -> None:
        super().__init__()
        widths = band_widths(len(clusters.bands), hidden_size, factor)
        sizes = [high - low for low, high in clusters.bands]
        self.dropout = nn.Dropout(dropout)
        self.cluster_vectors = nn.Parameter(torch.empty(len(sizes) - 1, hidden_size))
        nn.init.normal_(self.cluster_vectors, std=hidden_size**-0.5)
        if tied_to is None:
            self.words = nn.ParameterList(torch.empty(size, width) for size, width in zip(sizes, widths, strict=True))
            self.projections = nn.ParameterList(torch.empty(width, hidden_size) for width in widths[1:])
            _initialize(self.words[0])
            for words, projection in zip(list(self.words)[1:], self.projections, strict=True):
                _initialize(words, projection)
        else:
            self.words = nn.ParameterList(tied_to.words())
            self.projections = nn.ParameterList(list(tied_to.projections)[1:])

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.dropout(hidden)
        short_list, *tails = self.words
        logits = [F.linear(hidden, torch.cat([short_list, self.cluster_vectors]))]
        for words, projection in zip(tails, self.projections, strict=True):
            logits.append(F.linear(self.dropout(F.linear(hidden, projection)), words))
        return torch.cat(logits, -1)


class AdaptiveLanguageModel(nn.Module):
    """A decoder of transformers, e.g. `GPT2Model`, whose token embedding is replaced, with the softmax on top."""

    def __init__(self, body: PreTrainedModel, clusters: Clusters, *, factor: int, dropout: float, tied: bool) -> None:
        super().__init__()
        hidden_size: int = body.config.hidden_size
        embedding = AdaptiveEmbedding(clusters, hidden_size, factor)
        body.set_input_embeddings(embedding)
        self.config = body.config
        self.body = body
        self.softmax = AdaptiveSoftmax(clusters, hidden_size, factor, dropout, embedding if tied else None)

    def forward(self, input_ids: Tensor, **inputs: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.softmax(self.body(input_ids=input_ids, **inputs).last_hidden_state))


def band_widths(bands: int, hidden_size: int, factor: int) -> list[int]:
    """Widths of the word vectors: `band_widths(3, 1024, 4) == [1024, 256, 64]`. Raises `ValueError` below 1."""
    widths = [hidden_size // factor**i for i in range(bands)]
    if widths[-1] < 1:
        raise ValueError(f"factor (={factor}) leaves no width for cluster {bands - 1} of hidden_size (={hidden_size})")
    return widths


def _initialize(words: Tensor, *projections: Tensor) -> None:
    """Word vectors of length about 1 whatever their width, and projections that keep it."""
    nn.init.normal_(words, std=words.shape[1] ** -0.5)
    for projection in projections:
        nn.init.xavier_uniform_(projection)

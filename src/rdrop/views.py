"""Views: passes whose input differs by more than dropout. Cutoff, SimCut and plain R-Drop as values of one idea.

A *view* is a pass with its input perturbation. A method is a tuple of views, one for each pass, and a divergence:

    RDROP    (View(), View())
    CUTOFF   (View(), View(Cutoff("token", 0.1)))
    SIMCUT   (View(), View(Cutoff("embedding", 0.05), carries_task_loss=False))

`perturb_batch` makes the inputs, `rdrop_loss` the loss; docs/views.md has an example of each.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, TypeGuard, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .passes import repeat_batch

CutoffKind = Literal["token", "span", "feature", "unknown", "embedding"]

B = TypeVar("B", bound=Mapping[str, Any])


@dataclass(frozen=True)
class Cutoff:
    """The part of the input that one pass does not get to see, drawn again for each example and each batch."""

    kind: CutoffKind
    """`token`: the embeddings of single tokens are zero, and attention leaves them out;
    `span`: the same for one run of neighboring tokens;
    `feature`: some dimensions of the embedding are zero in the whole example, special tokens included;
    `unknown`: tokens are replaced by the unknown token, in the decoder's input too;
    `embedding`: the embeddings of tokens are zero, in the decoder's input too; positions and attention stay."""
    ratio: float
    """The expected share of what is cut: of the tokens that may be cut, or of the embedding's dimensions."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(CutoffKind):
            raise ValueError(f"cutoff kind (={self.kind!r}) must be one of {', '.join(get_args(CutoffKind))}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"cutoff ratio (={self.ratio}) must be in [0, 1], the share that is cut, such as 0.05")


@dataclass(frozen=True)
class View:
    """One pass: what is cut from its input (None: nothing), and whether it carries the task loss."""

    cutoff: Cutoff | None = None
    carries_task_loss: bool = True

    @property
    def cuts(self) -> bool:
        return self.cutoff is not None and self.cutoff.ratio > 0


RDROP = (View(), View())
"""The passes differ by dropout alone."""

CUTOFF = (View(), View(Cutoff("token", 0.1)))
"""R-Drop + Cutoff for language understanding (Shen et al. 2020); for translation, `views_of("unknown", 0.05)`."""

SIMCUT = (View(), View(Cutoff("embedding", 0.05), carries_task_loss=False))
"""SimCut (Gao et al., NAACL 2022): only the clean pass learns from the labels. Its divergence is `kl_from_first`."""


def views_of(
    cutoff: CutoffKind | None = None,
    cutoff_ratio: float = 0.0,
    task_passes: Literal["all", "first"] = "all",
    passes: int = 2,
) -> tuple[View, ...]:
    """Returns the views that these settings name: the first pass clean, all others with the cutoff. None has no ratio.

    `RDROP == views_of()`, `CUTOFF == views_of("token", 0.1)`, `SIMCUT == views_of("embedding", 0.05, "first")`.
    """
    if task_passes not in ("all", "first"):
        raise ValueError(f"task_passes (={task_passes!r}) must be 'all' or 'first'")
    if operator.index(passes) < 2:
        raise ValueError(f"passes (={passes}) must be at least 2: the first is clean, the others are cut")
    other = View(None if cutoff is None else Cutoff(cutoff, cutoff_ratio), carries_task_loss=task_passes == "all")
    return (View(), *[other] * (passes - 1))


def task_passes_of(views: Sequence[View]) -> tuple[int, ...]:
    """Returns the passes that carry the task loss, as `rdrop_loss(task_passes=...)` wants them."""
    return tuple(index for index, view in enumerate(views) if view.carries_task_loss)


# ----------------------------------------------------------------------------------------------- perturbing a batch


def perturb_batch(
    batch: B, views: Sequence[View], *, special_ids: Collection[int] | None = None, unknown_id: int | None = None
) -> tuple[B, Perturbation]:
    """Returns `repeat_batch(batch, len(views))` in which each pass has its own cutoff, and what to leave out.

    Example::

        repeated, perturbed = perturb_batch(inputs, SIMCUT, special_ids=tokenizer.all_special_ids)
        with perturbed(model):
            logits = model(**repeated).logits
        loss = rdrop_loss(
            logits, labels, alpha=6.0, task_passes=task_passes_of(SIMCUT), divergence=kl_from_first
        ).loss

    Changed are `input_ids`, `attention_mask` and `decoder_input_ids`, by the kinds of `Cutoff`; labels and everything
    else are repeated only. What is zeroed in the embeddings happens in the forward, so it must run in the block:
    see `Perturbation`. Nothing is drawn for views without a cutoff: then this is `repeat_batch`, and any batch will do.

    Never cut: ids in `special_ids`, positions with 0 in `attention_mask` or `decoder_attention_mask`, the last token
    of `input_ids` that is attended to, and the first of `decoder_input_ids`.

    For passes in forwards of their own (`dropout_rate`), give one view at a time.

    Args:
        batch: a mapping as Hugging Face models take: `input_ids` `(N, S)`; if it has them, `attention_mask` `(N, S)`,
            `decoder_input_ids` and `decoder_attention_mask` `(N, T)`. An encoder-decoder model that makes its own
            decoder input from the labels would not see it cut: make it, e.g. by the model's
            `prepare_decoder_input_ids_from_labels(labels)`.
        views: one for each pass.
        special_ids: e.g. `tokenizer.all_special_ids`; `()` where there are none. Needed for every kind but `feature`.
        unknown_id: e.g. `tokenizer.unk_token_id`. Needed for `unknown`.

    Raises:
        ValueError: an argument that a cutoff needs is missing, or the batch has no such tensors.

    Random numbers come from torch's global generator of the batch's device; the device is not waited for.
    """
    repeated = repeat_batch(batch, len(views))
    kinds = {view.cutoff.kind for view in views if view.cutoff is not None and view.cuts}
    if not kinds:
        return repeated, Perturbation()
    _require_what_they_need(kinds, special_ids, unknown_id)
    specials = frozenset(special_ids or ())
    source = _side(repeated, "input_ids", "attention_mask", specials)
    sides = [source]
    if kinds & ON_BOTH_SIDES and "decoder_input_ids" in repeated:
        sides.append(_side(repeated, "decoder_input_ids", "decoder_attention_mask", specials))
    for index, view in enumerate(views):
        if view.cutoff is not None and view.cuts:
            for side in sides if view.cutoff.kind in ON_BOTH_SIDES else [source]:
                side.cut(side.rows_of(index, len(views)), view.cutoff, unknown_id)
    if kinds & OUT_OF_ATTENTION:
        repeated["attention_mask"] = source.attention_mask  # type: ignore[index]  # repeat_batch could rebuild it
    zeroings = tuple(_Zeroing(side) for side in sides if side.zeroes)
    return repeated, Perturbation(zeroings, lacks_decoder_input=bool(kinds & ON_BOTH_SIDES) and len(sides) == 1)


ON_BOTH_SIDES: frozenset[CutoffKind] = frozenset({"unknown", "embedding"})
OUT_OF_ATTENTION: frozenset[CutoffKind] = frozenset({"token", "span"})


def _require_what_they_need(
    kinds: Collection[CutoffKind], special_ids: Collection[int] | None, unknown_id: int | None
) -> None:
    if special_ids is None and set(kinds) != {"feature"}:
        raise ValueError(
            f"cutoff {', '.join(sorted(kinds))} needs special_ids, the tokens that are never cut: "
            "special_ids=tokenizer.all_special_ids, or () where there are none"
        )
    if unknown_id is None and "unknown" in kinds:
        raise ValueError(
            "cutoff unknown needs unknown_id, the token that replaces others: unknown_id=tokenizer.unk_token_id; "
            "a vocabulary without one can have its embeddings zeroed, cutoff 'embedding'"
        )


@dataclass(eq=False)
class _Side:
    """The ids of the encoder or of the decoder, repeated, and what is cut from them."""

    name: str
    ids: Tensor
    """`(m*N, ..., S)`, in memory of its own: a token is replaced in place."""
    attention_mask: Tensor
    may_be_cut: Tensor
    zeroed: Tensor
    """The positions whose embedding is zero."""
    features: list[tuple[slice, float]] = field(default_factory=list)
    """The rows some of whose dimensions are zero, and the share of the dimensions."""
    zeroes: bool = False

    def rows_of(self, index: int, passes: int) -> slice:
        n = self.ids.shape[0] // passes
        return slice(index * n, (index + 1) * n)

    def cut(self, rows: slice, cutoff: Cutoff, unknown_id: int | None) -> None:
        self.zeroes |= cutoff.kind != "unknown"
        if cutoff.kind == "feature":
            self.features.append((rows, cutoff.ratio))
            return
        draw = random_span if cutoff.kind == "span" else random_tokens
        chosen = draw(self.may_be_cut[rows], cutoff.ratio)
        if cutoff.kind == "unknown":
            assert unknown_id is not None
            self.ids[rows].masked_fill_(chosen, unknown_id)
        else:
            self.zeroed[rows] = chosen
        if cutoff.kind in OUT_OF_ATTENTION:
            self.attention_mask[rows].masked_fill_(chosen, 0)


def _side(repeated: Mapping[str, Any], name: str, mask_name: str, special_ids: frozenset[int]) -> _Side:
    ids = repeated.get(name) if isinstance(repeated, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() < 2 or ids.is_floating_point():
        what = f"a {type(repeated).__name__} without it" if ids is None else f"with {_shape(ids)}"
        raise ValueError(f"a cutoff needs token ids (N, S) as batch[{name!r}]; the batch is {what}")
    rows = repeated["input_ids"].shape[0]
    mask = repeated.get(mask_name)
    if mask is None:
        mask = torch.ones_like(ids)
    if ids.shape[0] != rows or not isinstance(mask, Tensor) or mask.shape != ids.shape:
        raise ValueError(
            f"batch[{name!r}] is {_shape(ids)} and batch[{mask_name!r}] {_shape(mask)} after repeating; a cutoff needs "
            f"both (N, S), with the {rows} rows of batch['input_ids']"
        )
    attended = mask != 0
    kept = _first(attended) if name == "decoder_input_ids" else _first(attended.flip(-1)).flip(-1)
    may_be_cut = attended & ~kept & ~_is_one_of(ids, special_ids)
    nothing = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    return _Side(name, ids, mask, may_be_cut, zeroed=nothing)


def _shape(value: object) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _first(attended: Tensor) -> Tensor:
    """Returns True at the first True of each row only."""
    return attended & (attended.cumsum(-1) == 1)


def _is_one_of(ids: Tensor, special_ids: frozenset[int]) -> Tensor:
    return torch.isin(ids, _on_device(special_ids, ids.device))


@cache
def _on_device(special_ids: frozenset[int], device: torch.device) -> Tensor:
    """Returns the ids, and keeps them, because sending them waits for an accelerator."""
    with torch.inference_mode(False):
        return torch.tensor(sorted(special_ids), dtype=torch.long, device=device)


def random_tokens(may_be_cut: Tensor, ratio: float) -> Tensor:
    """Chooses each of the tokens that may be cut with probability `ratio`: `(N, S)` bool to `(N, S)` bool."""
    return may_be_cut & (torch.rand(may_be_cut.shape, device=may_be_cut.device) < ratio)


def random_span(may_be_cut: Tensor, ratio: float) -> Tensor:
    """Chooses one run of neighbors among the tokens of each row that may be cut: `(N, S)` bool to `(N, S)` bool."""
    place = may_be_cut.cumsum(-1) - 1
    count = may_be_cut.sum(-1, keepdim=True)
    length = _random_count(count * ratio)
    room = count - length
    start = (torch.rand(room.shape, device=room.device) * (room + 1)).long().minimum(room)
    return may_be_cut & (place >= start) & (place < start + length)


def random_features(rows: int, dimensions: int, ratio: float, device: torch.device) -> Tensor:
    """Chooses a random set of dimensions for each row: `(rows, D)` bool."""
    place = torch.rand(rows, dimensions, device=device).argsort(-1).argsort(-1)
    return place < _random_count(torch.full((rows, 1), dimensions * ratio, device=device))


def _random_count(expected: Tensor) -> Tensor:
    """Draws whole numbers next to `expected` that are `expected` in the mean, so that short examples are cut too."""
    return (expected + torch.rand(expected.shape, device=expected.device)).floor().long()


# ------------------------------------------------------------------------------------------- zeroing the embeddings


@dataclass(frozen=True, eq=False)
class _Zeroing:
    """The positions that are left out when the ids of one side are embedded."""

    side: _Side
    drawn: dict[int, Tensor] = field(default_factory=dict)
    """The dimensions cut of embeddings of each width, so that ids looked up in parts lose the same."""

    def apply(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Returns `embedded` `(..., D)` of `ids` `(...)`, a view of the side's ids, with zeros in the cut places."""
        cut = self.seen_as(ids, self.side.zeroed)[..., None]
        if self.side.features:
            row = torch.arange(len(self.side.ids), device=ids.device).view(-1, *[1] * (self.side.ids.dim() - 1))
            cut = cut | self.features(embedded)[self.seen_as(ids, row.expand(self.side.ids.shape).contiguous())]
        return embedded.masked_fill(cut, 0.0)

    def features(self, embedded: Tensor) -> Tensor:
        """Returns the dimensions that are zero in each row: `(m*N, D)`."""
        width = embedded.shape[-1]
        if width not in self.drawn:
            cut = torch.zeros(len(self.side.ids), width, dtype=torch.bool, device=embedded.device)
            for rows, ratio in self.side.features:
                cut[rows] = random_features(rows.stop - rows.start, width, ratio, embedded.device)
            self.drawn[width] = cut
        return self.drawn[width]

    def seen_as(self, ids: Tensor, values: Tensor) -> Tensor:
        """Returns values for each of the side's ids, in the order in which the view `ids` shows these."""
        return values.as_strided(ids.shape, ids.stride(), ids.storage_offset())

    def is_of(self, ids: object) -> TypeGuard[Tensor]:
        return (
            isinstance(ids, Tensor)
            and ids.dtype == self.side.ids.dtype
            and ids.untyped_storage().data_ptr() == self.side.ids.untyped_storage().data_ptr()
        )


@dataclass(frozen=True, eq=False)
class Perturbation:
    """Call it with the model: in the block, its embeddings of the batch's token ids have zeros where they are cut.

    Example::

        with perturbed(model):
            logits = model(**repeated).logits

    The zeros are put in by hooks on the model's `nn.Embedding`s, which leave with the block, after an exception too;
    ids are recognized by their memory, in a view too. So the model may be wrapped (DDP),
    scale its embeddings, or share one between encoder and decoder, and adds its positions as ever. A compiled model has
    a graph break at each embedding, and must not have run without such a block before. Gradient checkpointing must not
    be around the embedding itself (that of Hugging Face is around layers): backward would embed again, outside the
    block.

    Raises:
        RuntimeError: at the end of the block, where the model never embedded one of these tensors (it copied it first,
            or embeds by something else): its input was not cut.
        ValueError: an encoder-decoder model makes its own decoder input, which is to be cut.
    """

    zeroings: tuple[_Zeroing, ...] = ()
    lacks_decoder_input: bool = False

    @contextmanager
    def __call__(self, model: nn.Module) -> Iterator[None]:
        if self.lacks_decoder_input and _is_encoder_decoder(model):
            raise ValueError(
                f"{type(model).__name__} makes its own decoder input, which would not be cut; put it into the batch: "
                'batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)'
            )
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        look_up = _LookUp(self.zeroings)
        begin, end = look_up.begin, look_up.end
        if "torch._dynamo" in sys.modules:  # else nothing is compiled, and importing it is slow
            begin, end = (torch.compiler.disable(hook) for hook in (begin, end))  # type: ignore[no-untyped-call]
        hooks: list[RemovableHandle] = []
        for module in embeddings if self.zeroings else []:
            hooks.append(module.register_forward_pre_hook(begin))
            hooks.append(module.register_forward_hook(end, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        never_embedded = [zeroing.side.name for zeroing in self.zeroings if zeroing not in look_up.done]
        if never_embedded:
            names = ", ".join(never_embedded)
            raise RuntimeError(
                f"no nn.Embedding of {type(model).__name__} looked up {names}: nothing was cut. Run "
                "the forward of the repeated batch inside the block, in a model that embeds these tensors, not copies. "
                "A compiled model that has run without such a block does not see it: call torch.compiler.reset() once, "
                "and run it in a block first. Cutoff 'unknown' needs nothing of the model"
            )


class _LookUp(TorchFunctionMode):
    """Within the forward of an `nn.Embedding`: puts the zeros into what it looks up for the ids of the batch.

    Not into what it returns: BART's positions are an `nn.Embedding` too, which is called with the ids for their shape.
    """

    def __init__(self, zeroings: Sequence[_Zeroing]) -> None:
        super().__init__()
        self.zeroings = zeroings
        self.done: set[_Zeroing] = set()
        self.depth = 0

    def begin(self, *_: object) -> None:
        self.depth += 1
        self.__enter__()  # type: ignore[no-untyped-call]

    def end(self, *_: object) -> None:
        if self.depth:  # 0: something before `begin` raised
            self.depth -= 1
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is nn.functional.embedding:
            for zeroing in self.zeroings:
                if zeroing.is_of(args[0]):
                    self.done.add(zeroing)
                    result = zeroing.apply(args[0], result)
        return result


def _is_encoder_decoder(model: nn.Module) -> bool:
    configs = [getattr(module, "config", None) for module in model.modules()]
    return any(getattr(config, "is_encoder_decoder", False) is True for config in configs)

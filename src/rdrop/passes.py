"""One batch, several passes: repeat it for one forward, split what comes back; or one forward for each pass.

A *pass* is one forward with one dropout mask. Rows are ordered pass by pass: two passes of `x` are `[x; x]`, so row `i`
of pass `k` is row `k * N + i`. Passes whose input differs too, by a cutoff, are in `views.py`.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .dropout import dropout_rate

T = TypeVar("T")

# The tensor that decides the batch size when the tensors of a batch disagree, most telling name first.
MAIN_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_values", "input_features", "labels")


# Tensors and lists with rows for the images, videos or sounds of a batch, however many each example has of them, in the
# order of the examples; a list of a part for each example; positions along several axes, `(3, N, T)`.
OF_MEDIA = (
    *("pixel_values", "pixel_values_videos", "pixel_attention_mask", "image_grid_thw", "video_grid_thw"),
    *("image_sizes", "image_sizes_videos", "second_per_grid_ts", "video_second_per_grid", "spatial_shapes"),
    *("image_position_ids", "video_position_ids", "num_frames_per_video"),  # Gemma 4
    *("image_merge_sizes", "video_merge_sizes", "video_compression_mask"),  # VideoLLaMA 3
    *("input_features", "feature_attention_mask", "input_features_mask", "audio_feature_lengths"),
    *("image_pixel_values", "image_attention_mask"),  # Phi-4
    *("audio_input_features", "audio_embed_sizes", "audio_attention_mask"),
)
LIST_OF_EXAMPLES = ("labels", "mask_labels", "class_labels")
POSITIONS = "position_ids"


def repeat_batch(batch: T, passes: int = 2, *, batch_size: int | None = None) -> T:
    """Returns the batch `passes` times over: every batched tensor becomes `torch.cat([tensor] * passes)`.

    Example::

        logits = model(repeat_batch(x))         # one forward, two dropout masks: (2N, ..., V)
        logits = model(**repeat_batch(inputs)).logits

    A list of images `(C, H, W)`, of any sizes, is the list `passes` times over. So is, in a mapping, a list `labels`,
    `mask_labels` or `class_labels` of a part for each example (object detection). Tensors of images, videos and sounds
    are repeated whole by their names (`pixel_values`, `image_grid_thw`, `image_sizes`, ...), since an example may have
    several or none; `position_ids` `(3, N, T)` along their second dimension.

    Goes through tensors, mappings (dict, OrderedDict, `BatchEncoding`, `ModelOutput`), lists, tuples, namedtuples and
    dataclasses, and gives the same types back. The input is not changed. Left as they are: 0-dimensional tensors,
    tensors that are not batched, and whatever is not a tensor, lists of strings as long as the batch included.

    A tensor is batched when its first dimension is the batch size. The batch size is `batch_size` if given, else what
    all tensors agree on, else the size of the main input (`input_ids`, `inputs_embeds`, `pixel_values`,
    `input_values`, `input_features` or `labels`, the first that is there). A tensor that is not batched but happens to
    be as long as the batch cannot be told apart: keep it out of `batch`. A list is one of images where it has two or
    more tensors, all of 3 dimensions with 1 or 3 in the first; the arguments of a model are a tuple.

    Raises `ValueError` when the batch size cannot be known, no tensor is batched, or one has the batch size in its
    second dimension, and for a list of mappings, or of one tensor that may be an image; `TypeError` for a
    `PackedSequence` or a nested tensor.
    """
    _require_passes(passes)
    _require_collated(batch)
    size = find_batch_size(batch) if batch_size is None else batch_size

    def repeat(part: Any) -> Any:
        if number_of_rows(part) != size:
            return part
        return part * passes if isinstance(part, list) else torch.cat([part] * passes)

    if size not in _named_rows(batch).values():
        raise ValueError(f"no tensor of the batch has batch_size={size} rows; there are:\n{_listing(batch)}")
    parts = _children(batch) if isinstance(batch, Mapping) else {}
    changed = {}
    for name, part in parts.items():
        again = _repeated_by_name(name, part, passes, size)
        again = map_batched(repeat, part) if again is None else again
        if again is not part:
            changed[name] = again
    if parts:
        return _rebuild(batch, parts, changed) if changed else batch
    return map_batched(repeat, batch)


def _require_collated(batch: object) -> None:
    """Refuses a list in which the first dimension of a tensor need not be that of the batch."""
    if isinstance(batch, list) and batch and all(isinstance(part, Mapping) for part in batch):
        raise ValueError("a list of mappings is one of examples: collate them first, torch.stack for each entry")
    if isinstance(batch, list) and len(batch) == 1 and is_images(batch * 2):
        raise ValueError(
            f"a list with one tensor {tuple(batch[0].shape)} may be one image, or the only argument of a model: give "
            "images as a tensor (N, C, H, W), and arguments as a tuple"
        )


def _repeated_by_name(name: Any, part: Any, passes: int, size: int) -> Any:
    """Returns an entry of a batch repeated as its name says, None if the name says nothing."""
    if name in OF_MEDIA and isinstance(part, Tensor) and part.dim() > 0:
        return torch.cat([part] * passes)
    if isinstance(part, list) and (name in OF_MEDIA or (name in LIST_OF_EXAMPLES and is_one_per_example(part, size))):
        return part * passes
    if isinstance(part, Tensor) and part.dim() > 2 and part.shape[1] == size:
        if name == POSITIONS:
            return torch.cat([part] * passes, dim=1)
        if part.shape[0] not in (1, size):
            raise ValueError(
                f"batch[{name!r}] {tuple(part.shape)} has the {size} examples of the batch in its second dimension, or "
                "is not batched: that cannot be told. Give it the batch as its first dimension, or keep it out of the "
                "batch"
            )
    return None


def is_one_per_example(part: object, size: int) -> bool:
    """Whether this is a list of a mapping or tensor for each of `size` examples, such as the objects in an image."""
    return isinstance(part, list) and len(part) == size and all(isinstance(one, (Mapping, Tensor)) for one in part)


def rows_of(batch: Mapping[str, Any], start: int, stop: int, *, batch_size: int) -> dict[str, Any]:
    """Returns rows `start` to `stop` of a batch; a tensor or list of images is batched when it has `batch_size`.

    Raises a ValueError where tensors have rows for images rather than for examples: whose they are is not known.
    """

    def cut(part: Any) -> Any:
        return part[start:stop] if number_of_rows(part) == batch_size else part

    rows = {}
    for name, part in batch.items():
        if not are_of_examples(name, part, batch_size):
            raise ValueError(
                f"batch[{name!r}] has {len(part)} rows for {batch_size} examples, and which of them belong to which "
                "example is not known: a batch with such images cannot be cut. Leave micro_batches at 1; smaller "
                "batches and more gradient accumulation need as little memory"
            )
        if name == POSITIONS and isinstance(part, Tensor) and part.dim() > 2 and part.shape[1] == batch_size:
            rows[name] = part[:, start:stop]
        elif name in LIST_OF_EXAMPLES and is_one_per_example(part, batch_size):
            rows[name] = part[start:stop]
        else:
            rows[name] = map_batched(cut, part)
    return rows


def are_of_examples(name: str, part: object, batch_size: int) -> bool:
    """Whether an entry of a batch is none of images, or has one row for each example."""
    is_media = name in OF_MEDIA and isinstance(part, (Tensor, list)) and number_of_rows(part) is not None
    return not is_media or number_of_rows(part) == batch_size


def split_passes(output: T, passes: int = 2) -> tuple[T, ...]:
    """Returns the `passes` outputs of a repeated batch, the inverse of `repeat_batch`, in the order of the passes.

    Example::

        first, second = split_passes(model(repeat_batch(x)))

    Every tensor `(passes * N, ...)` becomes views `(N, ...)`, without a copy; 0-dimensional tensors (a loss) and
    whatever is not a tensor (a key-value cache) are handed to each pass as they are.

    Raises `ValueError` when a first dimension cannot be divided by `passes`.
    """
    _require_passes(passes)
    batched = [(place, tensor) for place, tensor in named_tensors(output, "output") if tensor.dim() > 0]
    if not batched:
        raise ValueError(f"no batched tensor to split in the output, a {type(output).__name__}")
    for place, tensor in batched:
        if tensor.shape[0] % passes:
            raise ValueError(
                f"{place} has shape {tuple(tensor.shape)}: its first dimension cannot be divided into {passes} passes; "
                "split the output of a forward of repeat_batch(batch, passes) with the same number of passes"
            )

    def rows_of(index: int) -> Callable[[Tensor], Tensor]:
        def rows(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0:
                return tensor
            size = tensor.shape[0] // passes
            return tensor.narrow(0, index * size, size)

        return rows

    return tuple(map_tensors(rows_of(index), output) for index in range(passes))


def agree(passes: Sequence[Tensor], roundings: int = 100) -> bool:
    """Whether passes are equal up to rounding: a product may round the same row differently elsewhere in a batch.

    Of float16 and bfloat16 at most 8 roundings: their products are accumulated in float32, and a hundred roundings of
    bfloat16 are more than dropout changes.
    """
    if passes[0].dtype.itemsize < 4:
        roundings = min(roundings, 8)
    return all(near(passes[0], other, roundings * torch.finfo(passes[0].dtype).eps) for other in passes[1:])


def near(first: Tensor, second: Tensor, tolerance: float) -> bool:
    """Whether two tensors differ by at most `tolerance` of their size; NaN is near nothing.

    Their size is that of the largest element which differs, or of equal ones up to a hundred times as large. A mask
    (-inf, -1e9), the same in both, is no part of it: beside it every difference would be small.
    """
    if first.dtype.itemsize < 4:  # the smallest types know little arithmetic
        first, second = first.float(), second.float()
    moved = first != second
    if not moved.any():
        return True
    largest = torch.stack([first[moved].abs().amax(), second[moved].abs().amax()]).amax()
    sizes = first.abs()
    scale = torch.maximum(sizes.masked_fill(~(sizes <= 100 * largest), 0.0).amax(), largest)
    return bool(largest.isfinite() and (first - second)[moved].abs().amax() <= tolerance * scale)


def sequential_passes(
    model: nn.Module, batch: Any, *, dropout: Sequence[float | None] = (None, None)
) -> tuple[Any, ...]:
    """Runs one forward for each pass, pass `k` with dropout rate `dropout[k]`, and returns the tuple of the outputs.

    Example::

        first, second = sequential_passes(model, inputs, dropout=(0.1, 0.3))
        loss = rdrop_loss(torch.cat([first.logits, second.logits]), labels, alpha=1.0).loss

    For models whose passes must not share a forward (layerdrop): `None` keeps the model's own rates, so the default is
    two plain forwards. And for two dropout rates, which are as in `dropout_rate`: what is at 0 stays at 0,
    and the model has its own rates back afterwards. A mapping is called as `model(**batch)`, a tuple or list as
    `model(*batch)`, anything else as `model(batch)`.

    Under `DistributedDataParallel` two forwards before one backward fail with reentrant gradient checkpointing.
    """
    if len(dropout) < 2:
        raise ValueError(f"dropout must give a rate for each of at least 2 passes, got {dropout!r}")
    outputs = []
    for p in dropout:
        with nullcontext() if p is None else dropout_rate(model, p):
            outputs.append(call_model(model, batch))
    return tuple(outputs)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Returns `model(**batch)` of a mapping, `model(*batch)` of a tuple or list but of images, else `model(batch)`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and not is_images(batch):
        return model(*batch)
    return model(batch)


def is_images(part: object) -> bool:
    """Whether this is a list of two or more images, `(C, H, W)` each, C being 1 or 3."""
    return (
        isinstance(part, list)
        and len(part) > 1
        and all(isinstance(image, Tensor) and image.dim() == 3 and image.shape[0] in (1, 3) for image in part)
    )


def number_of_rows(part: Any) -> int | None:
    """Returns how many rows a tensor has, or how many images a list; None for a 0-dimensional tensor."""
    return None if isinstance(part, Tensor) and part.dim() == 0 else len(part)


def _is_tensor(part: object) -> bool:
    return isinstance(part, Tensor)


def _is_tensor_or_images(part: object) -> bool:
    return isinstance(part, Tensor) or is_images(part)


def map_tensors(function: Callable[[Tensor], Tensor], nest: T) -> T:
    """Returns the nest with `function` applied to every tensor; a part in which nothing changes is the same object."""
    return map_batched(function, nest, is_batched=_is_tensor)


def map_batched(
    function: Callable[[Any], Any], nest: T, is_batched: Callable[[object], bool] = _is_tensor_or_images
) -> T:
    """Returns the nest with `function` applied to every tensor and every list of images."""
    if is_batched(nest):
        return function(nest)  # type: ignore[no-any-return]
    children = _children(nest)
    changed = {key: new for key, old in children.items() if (new := map_batched(function, old, is_batched)) is not old}
    return _rebuild(nest, children, changed) if changed else nest


def named_tensors(
    nest: object, place: str, is_batched: Callable[[object], bool] = _is_tensor
) -> Iterator[tuple[str, Any]]:
    """Yields every tensor of a nest with its place as one would write it: `batch['input_ids']`, `batch[0].mask`."""
    if is_batched(nest):
        if isinstance(nest, Tensor) and nest.is_nested:
            raise TypeError(
                f"{place} is a nested tensor, which has no rows to repeat; pad it: tensor.to_padded_tensor(0)"
            )
        yield place, nest
        return
    for key, child in _children(nest, place).items():
        step = f"[{key!r}]" if isinstance(nest, (Mapping, list)) or isinstance(key, int) else f".{key}"
        yield from named_tensors(child, place + step, is_batched)


def _children(nest: object, place: str = "the batch") -> dict[Any, Any]:
    """Returns the parts of a container by key, index or field name; empty for everything that is no container."""
    if isinstance(nest, PackedSequence):
        raise TypeError(
            f"{place} is a PackedSequence, whose rows are interleaved; repeat the padded batch first, "
            "then pack it: pack_padded_sequence(repeat_batch(padded), repeat_batch(lengths), batch_first=True, "
            "enforce_sorted=False)"
        )
    if isinstance(nest, Mapping):
        return dict(nest.items())
    if isinstance(nest, (list, tuple)):
        return dict(zip(getattr(nest, "_fields", range(len(nest))), nest, strict=True))
    if _is_record(nest):
        names = [field.name for field in dataclasses.fields(nest)]  # type: ignore[arg-type]
        return {name: getattr(nest, name) for name in names if hasattr(nest, name)}
    return {}


def _is_record(nest: object) -> bool:
    return dataclasses.is_dataclass(nest) and not isinstance(nest, (type, Mapping))


def _rebuild(nest: Any, children: dict[Any, Any], changed: dict[Any, Any]) -> Any:
    """Returns a copy of the container `nest` in which the parts named in `changed` are replaced."""
    if isinstance(nest, tuple):
        values = tuple((children | changed).values())
        return nest._make(values) if hasattr(nest, "_make") else type(nest)(values)
    if isinstance(nest, Mapping) and not isinstance(nest, MutableMapping):
        raise TypeError(f"a {type(nest).__name__} cannot be rebuilt with other tensors; pass a dict")
    new = copy.copy(nest)
    for key, value in changed.items():
        if _is_record(nest):
            object.__setattr__(new, key, value)  # a frozen dataclass too
        else:
            new[key] = value
    return new


def find_batch_size(batch: object) -> int:
    """Returns the number of rows of a batch, by the rules of `repeat_batch`."""
    rows = _named_rows(batch)
    if not rows:
        raise ValueError(
            f"no batched tensor in the batch, a {type(batch).__name__}; "
            'lists and arrays must be tensors first (a tokenizer: return_tensors="pt")'
        )
    sizes = set(rows.values())
    if len(sizes) > 1:
        sizes = _main_input_sizes(rows)
    if len(sizes) != 1:
        raise ValueError(
            f"the tensors of the batch disagree about the batch size; pass batch_size=. There are:\n{_listing(batch)}"
        )
    return sizes.pop()


def _named_rows(batch: object) -> dict[str, int]:
    """The number of rows of every tensor and list of images, by its place."""
    parts = named_tensors(batch, "batch", _is_tensor_or_images)
    rows = {place: number_of_rows(part) for place, part in parts}
    return {place: count for place, count in rows.items() if count is not None}


def _main_input_sizes(rows: dict[str, int]) -> set[int]:
    for name in MAIN_INPUTS:
        sizes = {size for place, size in rows.items() if place.endswith((f"[{name!r}]", f".{name}"))}
        if sizes:
            return sizes
    return set()


def _listing(batch: object) -> str:
    return "\n".join(f"  {place}: {tuple(tensor.shape)}" for place, tensor in named_tensors(batch, "batch"))


def _require_passes(passes: int) -> None:
    if not isinstance(passes, int) or passes < 1:
        raise ValueError(f"passes must be an integer of at least 1, got {passes!r}")

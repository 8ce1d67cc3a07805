"""Repeating a batch, splitting the output, one forward for each pass."""

import dataclasses
from collections import OrderedDict, namedtuple
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rdrop.dropout import dropout_rate
from rdrop.passes import agree, call_model, repeat_batch, rows_of, sequential_passes, split_passes

Pair = namedtuple("Pair", ["source", "target"])


@dataclasses.dataclass
class Example:
    tokens: Tensor
    language: str
    mask: Tensor | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class FrozenExample:
    tokens: Tensor
    lengths: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", torch.full((len(self.tokens),), self.tokens.shape[1]))


def rows(n: int, width: int = 2) -> Tensor:
    return torch.arange(n * width).view(n, width)


# ---------------------------------------------------------------------------------------------------- repeat_batch


def test_repeated_rows_stand_pass_by_pass() -> None:
    assert repeat_batch(torch.tensor([1, 2])).tolist() == [1, 2, 1, 2]
    assert repeat_batch(torch.tensor([1, 2]), 3).tolist() == [1, 2, 1, 2, 1, 2]


def test_one_pass_is_the_batch_itself() -> None:
    assert repeat_batch(rows(3), 1).equal(rows(3))


@pytest.mark.parametrize(
    "batch",
    [
        {"x": rows(3), "name": "a"},
        OrderedDict(x=rows(3)),
        [rows(3), {"y": rows(3)}],
        (rows(3), None),
        Pair(rows(3), (rows(3), 7)),
        Example(rows(3), "de"),
        FrozenExample(rows(3)),
        {"nest": [Pair(Example(rows(3), "de"), {"z": rows(3)}), 0.5]},
        torch.return_types.max((rows(3), rows(3))),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_every_container_comes_back_as_its_own_type_and_the_input_is_untouched(batch: Any) -> None:
    before = repr(batch)
    repeated = repeat_batch(batch)
    assert type(repeated) is type(batch)
    assert repr(batch) == before
    for view in split_passes(repeated):
        assert repr(view) == before


def test_hugging_face_containers_come_back_as_their_own_type() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_outputs import SequenceClassifierOutput

    encoding = transformers.BatchEncoding({"input_ids": rows(3), "attention_mask": rows(3)})
    repeated = repeat_batch(encoding)
    assert isinstance(repeated, transformers.BatchEncoding)
    assert repeated["input_ids"].shape == repeated.input_ids.shape == (6, 2)
    assert encoding["input_ids"].shape == (3, 2)

    output = SequenceClassifierOutput(loss=torch.tensor(1.0), logits=rows(4), hidden_states=(rows(4), rows(4)))
    first, second = split_passes(output)
    assert isinstance(second, SequenceClassifierOutput)
    assert second.logits.equal(rows(4)[2:])
    assert second["logits"].equal(second.logits)
    assert second.hidden_states[1].shape == (2, 2)
    assert second.attentions is None
    assert first.loss is output.loss
    assert output.logits.shape == (4, 2)
    assert repeat_batch(first).logits.equal(repeat_batch(rows(4)[:2]))


def test_what_is_no_batched_tensor_is_left_as_it_is() -> None:
    texts, scale = ["ein", "zwei", "drei"], torch.tensor(2.0)
    settings = MappingProxyType({"beam": 4})
    repeated = repeat_batch({"x": rows(3), "texts": texts, "scale": scale, "settings": settings, "none": None})
    assert repeated["texts"] is texts
    assert repeated["scale"] is scale
    assert repeated["settings"] is settings
    assert repeated["none"] is None


def test_tensors_of_another_length_than_the_main_input_are_left_alone() -> None:
    batch = {"positions": rows(7), "nest": {"attention_mask": rows(3)}, "input_ids": rows(3)}
    repeated = repeat_batch(batch)
    assert repeated["positions"] is batch["positions"]
    assert repeated["nest"]["attention_mask"].shape == repeated["input_ids"].shape == (6, 2)


def test_input_ids_decide_before_labels() -> None:
    repeated = repeat_batch({"labels": torch.arange(11), "input_ids": rows(3)})
    assert repeated["labels"].shape == (11,)
    assert repeated["input_ids"].shape == (6, 2)


def test_batch_size_decides_before_everything_else() -> None:
    repeated = repeat_batch({"input_ids": rows(3), "other": rows(5)}, batch_size=5)
    assert repeated["input_ids"].shape == (3, 2)
    assert repeated["other"].shape == (10, 2)


def test_an_empty_batch_stays_empty() -> None:
    repeated = repeat_batch({"input_ids": torch.zeros(0, 4), "labels": torch.zeros(0)})
    assert repeated["input_ids"].shape == (0, 4)
    assert [view["labels"].shape for view in split_passes(repeated, 2)] == [(0,), (0,)]


def test_a_tensor_used_twice_is_repeated_in_both_places() -> None:
    shared = rows(3)
    repeated = repeat_batch({"input_ids": shared, "labels": shared})
    assert repeated["input_ids"].equal(repeated["labels"])
    assert len(shared) == 3


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sizes", [((8, 6), (8, 6)), ((8, 6), (4, 4), (5, 9))])
def test_a_list_of_images_is_twice_as_long(channels: int, sizes: tuple[tuple[int, int], ...]) -> None:
    images = [torch.randn(channels, *size) for size in sizes]
    repeated = repeat_batch(images)
    assert [id(image) for image in repeated] == [id(image) for image in images * 2]
    inputs = {"pixel_values": images, "labels": torch.arange(len(images))}
    for batch_size in (None, len(images)):
        repeated = repeat_batch(inputs, batch_size=batch_size)
        assert len(repeated["pixel_values"]) == len(repeated["labels"]) == 2 * len(images)
    assert repeat_batch((images, torch.zeros(len(images))))[1].shape == (2 * len(images),)


def test_a_model_gets_a_list_of_images_as_one_argument() -> None:
    images = [torch.zeros(3, 2, 2), torch.zeros(3, 4, 4)]
    model = nn.Identity()
    assert call_model(model, images) is images


def test_a_tuple_and_a_list_of_one_tensor_are_the_arguments_of_a_model() -> None:
    sequences = torch.randn(3, 5, 4)
    assert repeat_batch((sequences,))[0].shape == (6, 5, 4)
    assert repeat_batch([sequences[:2]])[0].shape == (4, 5, 4)
    assert [part.shape[0] for part in repeat_batch((sequences, sequences + 1))] == [6, 6]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([torch.zeros(3, 5, 4)], "may be one image, or the only argument of a model"),
        ([{"image": torch.zeros(3, 5, 4)}] * 2, "a list of mappings is one of examples: collate them first"),
    ],
)
def test_a_list_whose_tensors_may_be_those_of_one_example_is_refused(batch: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        repeat_batch(batch)


def test_images_of_several_or_no_examples_are_repeated_whole() -> None:
    """As Qwen-VL has them, in patches of any number, and LLaVA."""
    patches, grid = torch.randn(20, 4), torch.tensor([[1, 2, 2], [1, 4, 2], [1, 4, 2]])
    batch = {"input_ids": rows(2), "attention_mask": rows(2), "pixel_values": patches, "image_grid_thw": grid}
    repeated = repeat_batch(batch | {"second_per_grid_ts": [0.5, 1.0, 1.0]})
    assert repeated["input_ids"].shape == (4, 2)
    assert repeated["pixel_values"].equal(torch.cat([patches, patches]))
    assert repeated["image_grid_thw"].equal(torch.cat([grid, grid]))
    assert repeated["second_per_grid_ts"] == [0.5, 1.0, 1.0] * 2
    one = repeat_batch({"input_ids": rows(4), "pixel_values": torch.randn(1, 3, 8, 8), "image_sizes": torch.ones(1, 2)})
    assert (len(one["pixel_values"]), len(one["image_sizes"])) == (2, 2)


@pytest.mark.parametrize(
    "names",
    [
        ("pixel_values", "image_position_ids"),
        ("pixel_values_videos", "video_position_ids", "num_frames_per_video"),
        ("image_grid_thw", "image_merge_sizes"),
        ("video_grid_thw", "video_merge_sizes", "video_compression_mask"),
        ("image_pixel_values", "image_sizes", "image_attention_mask"),
        ("audio_input_features", "audio_embed_sizes", "audio_attention_mask"),
        ("feature_attention_mask", "audio_feature_lengths", "video_second_per_grid"),
    ],
    ids=", ".join,
)
def test_what_stands_beside_the_images_videos_or_sounds_is_repeated_with_them(names: tuple[str, ...]) -> None:
    """As in Gemma 4, VideoLLaMA 3, Phi-4 multimodal and Qwen2.5-Omni."""
    media = {name: torch.arange(5.0)[:, None] + row for row, name in enumerate(names)}
    repeated = repeat_batch({"input_ids": rows(2), "labels": rows(2)} | media)
    assert repeated["input_ids"].shape == (4, 2)
    assert all(repeated[name].equal(torch.cat([media[name]] * 2)) for name in names)
    for name in names:
        with pytest.raises(ValueError, match="cannot be cut"):
            rows_of({"input_ids": rows(2), name: media[name]}, 0, 1, batch_size=2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_positions_along_three_axes_are_repeated_along_the_second_dimension(size: int) -> None:
    positions = torch.arange(3 * size * 5).view(3, size, 5)
    repeated = repeat_batch({"input_ids": rows(size), "position_ids": positions})["position_ids"]
    assert repeated.equal(torch.cat([positions, positions], dim=1))


def test_objects_are_those_of_an_image_however_many_there_are() -> None:
    """Two boxes in each of two images are no rows of the batch."""
    labels = [{"boxes": torch.randn(2, 4), "class_labels": torch.arange(2)} for _ in range(2)]
    repeated = repeat_batch({"pixel_values": torch.randn(2, 3, 8, 8), "labels": labels})
    assert [id(one) for one in repeated["labels"]] == [id(one) for one in labels * 2]
    masks = [torch.randn(number, 8, 8) for number in (2, 5)]
    repeated = repeat_batch({"pixel_values": torch.randn(2, 3, 8, 8), "mask_labels": masks})
    assert [len(one) for one in repeated["mask_labels"]] == [2, 5, 2, 5]


def test_a_batch_in_the_second_dimension_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"batch\['states'\] \(7, 3, 2\) has the 3 examples of the batch in its second"
    ):
        repeat_batch({"input_ids": rows(3), "states": torch.zeros(7, 3, 2)})
    assert repeat_batch({"input_ids": rows(3), "mask": torch.zeros(1, 3, 3)})["mask"].shape == (1, 3, 3)


def test_rows_of_a_batch_are_cut_where_they_are_known() -> None:
    batch = {"input_ids": rows(4), "position_ids": torch.zeros(3, 4, 5), "labels": [{"boxes": rows(1)}] * 4}
    part = rows_of(batch, 1, 3, batch_size=4)
    assert (len(part["input_ids"]), part["position_ids"].shape, len(part["labels"])) == (2, (3, 2, 5), 2)
    with pytest.raises(
        ValueError, match=r"batch\['pixel_values'\] has 9 rows for 4 examples.*Leave micro_batches at 1"
    ):
        rows_of(batch | {"pixel_values": torch.zeros(9, 3)}, 1, 3, batch_size=4)


def test_the_gradient_of_both_passes_reaches_the_input() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    (repeat_batch(x) * torch.tensor([1.0, 1.0, 10.0, 10.0])[:, None]).sum().backward()
    assert x.grad is not None
    assert x.grad.equal(torch.full((2, 3), 11.0))


def test_channels_last_survives() -> None:
    images = torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert repeat_batch(images).is_contiguous(memory_format=torch.channels_last)


def test_disagreeing_tensors_are_listed_with_place_and_shape() -> None:
    with pytest.raises(ValueError, match="disagree about the batch size; pass batch_size=") as caught:
        repeat_batch({"query": rows(3), "documents": [Pair(rows(5), Example(rows(6), "de"))]})
    assert str(caught.value).endswith(
        "  batch['query']: (3, 2)\n"
        "  batch['documents'][0].source: (5, 2)\n"
        "  batch['documents'][0].target.tokens: (6, 2)"
    )


def test_two_main_inputs_of_different_length_are_not_guessed() -> None:
    with pytest.raises(ValueError, match=r"batch\['query'\]\['input_ids'\]: \(2, 2\)"):
        repeat_batch({"query": {"input_ids": rows(2)}, "documents": {"input_ids": rows(4)}})


@pytest.mark.parametrize(
    "batch", [{}, [], "text", {"input_ids": [[1, 2], [3, 4]]}, torch.tensor(1.0), SimpleNamespace(x=rows(2))]
)
def test_a_batch_without_batched_tensor_is_an_error(batch: Any) -> None:
    with pytest.raises(ValueError, match=f"no batched tensor in the batch, a {type(batch).__name__}"):
        repeat_batch(batch)


def test_a_batch_size_no_tensor_has_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"batch_size=4 rows; there are:\n  batch\['x'\]: \(3, 2\)"):
        repeat_batch({"x": rows(3)}, batch_size=4)


@pytest.mark.parametrize("passes", [0, -1, 2.0])
def test_passes_must_be_a_positive_integer(passes: Any) -> None:
    with pytest.raises(ValueError, match="passes must be an integer of at least 1"):
        repeat_batch(rows(2), passes)
    with pytest.raises(ValueError, match="passes must be an integer of at least 1"):
        split_passes(rows(2), passes)


def test_packed_and_nested_sequences_are_refused_with_the_way_out() -> None:
    padded, lengths = torch.arange(6.0).view(2, 3, 1), torch.tensor([3, 2])
    packed = pack_padded_sequence(padded, lengths, batch_first=True)
    with pytest.raises(TypeError, match=r"batch\['x'\] is a PackedSequence.*repeat the padded batch first") as raised:
        repeat_batch({"x": packed})
    remedy = str(raised.value).rpartition("then pack it: ")[2]
    found, counted = pad_packed_sequence(eval(remedy), batch_first=True)
    padded[1, 2] = 0.0
    assert (counted.tolist(), found.tolist()) == ([3, 2, 3, 2], [*padded.tolist(), *padded.tolist()])
    nested = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged)
    with pytest.raises(TypeError, match=r"batch\['y'\] is a nested tensor.*pad it"):
        repeat_batch({"x": rows(2), "y": nested}, batch_size=2)


def test_an_immutable_mapping_of_tensors_is_refused() -> None:
    with pytest.raises(TypeError, match="a mappingproxy cannot be rebuilt with other tensors; pass a dict"):
        repeat_batch(MappingProxyType({"x": rows(2)}))


# ---------------------------------------------------------------------------------------------------- split_passes


def test_splitting_gives_views_not_copies() -> None:
    logits = torch.zeros(4, 3)
    first, second = split_passes(logits)
    second += 1
    assert logits[2:].eq(1).all()
    assert first.eq(0).all()
    assert [view.data_ptr() for view in split_passes(logits)] == [logits.data_ptr(), logits[2:].data_ptr()]


def test_splitting_hands_scalars_and_caches_to_every_pass() -> None:
    cache = object()
    views = split_passes({"loss": torch.tensor(3.0), "logits": rows(6), "cache": cache}, 3)
    assert len(views) == 3
    assert all(view["loss"] == 3 and view["cache"] is cache for view in views)


def test_an_indivisible_output_names_place_and_shape() -> None:
    with pytest.raises(ValueError, match=r"output\['logits'\] has shape \(5, 2\).*divided into 2 passes"):
        split_passes({"logits": rows(5)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_is_no_rounding_in_any_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Dropout(0.1), nn.Linear(64, 8)).to(dtype)
    x = torch.randn(4, 16, dtype=dtype)
    assert not agree(split_passes(model(repeat_batch(x)), 2))
    model.eval()
    assert agree(split_passes(model(repeat_batch(x)), 2))


@pytest.mark.parametrize("mask", [-torch.inf, -1e9])
def test_a_mask_has_no_part_in_whether_passes_agree(mask: float) -> None:
    x = torch.randn(8, 5).index_fill(1, torch.tensor(0), mask)
    eps = torch.finfo(x.dtype).eps
    assert agree([x, x])
    assert agree([x, x * (1 + 4 * eps)])
    assert not agree([x, x.index_add(1, torch.tensor(1), torch.full((8, 1), 1e-3))])
    assert not agree([x, x.index_fill(1, torch.tensor(1), -torch.inf)])
    assert not agree([x, x.index_fill(1, torch.tensor(1), torch.nan)])
    nearly_zero = x.index_fill(1, torch.tensor(1), 0.02)  # among numbers of 1, whose rounding it has
    assert agree([nearly_zero, nearly_zero.index_add(1, torch.tensor(1), torch.full((8, 1), 4 * eps))])


def test_nothing_to_split_is_an_error() -> None:
    with pytest.raises(ValueError, match="no batched tensor to split in the output, a NoneType"):
        split_passes(None)


# ----------------------------------------------------------------------------------------------- sequential_passes


class Masks(nn.Module):
    """Returns what dropout leaves of ones, so that the rate can be read off."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.dropout(torch.ones_like(x))
        return dropped


def dropped_share(output: Tensor) -> float:
    return float((output == 0).float().mean())


def test_each_pass_has_its_own_rate() -> None:
    model = Masks()
    clean, light, heavy = sequential_passes(model, torch.zeros(100, 100), dropout=(0.0, 0.1, 0.9))
    assert dropped_share(clean) == 0
    assert dropped_share(light) == pytest.approx(0.1, abs=0.02)
    assert dropped_share(heavy) == pytest.approx(0.9, abs=0.02)
    assert model.dropout.p == 0.5


def test_none_keeps_the_own_rate() -> None:
    own, other = sequential_passes(Masks(0.5), torch.zeros(100, 100), dropout=(None, 0.1))
    assert dropped_share(own) == pytest.approx(0.5, abs=0.03)
    assert dropped_share(other) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("batch", [{"x": rows(2).float()}, (rows(2).float(),), [rows(2).float()], rows(2).float()])
def test_batches_are_called_as_keywords_positions_or_a_single_tensor(batch: Any) -> None:
    assert [output.shape for output in sequential_passes(Masks(), batch)] == [(2, 2), (2, 2)]


def test_without_rates_the_model_runs_as_it_is() -> None:
    first, second = sequential_passes(Masks(0.5), torch.zeros(100, 100))
    assert [dropped_share(first), dropped_share(second)] == pytest.approx([0.5, 0.5], abs=0.03)
    assert not torch.equal(first, second)


def test_one_rate_is_not_enough() -> None:
    with pytest.raises(ValueError, match=r"at least 2 passes, got \(0\.1,\)"):
        sequential_passes(Masks(), rows(2), dropout=(0.1,))


def test_the_rates_come_back_when_the_forward_raises() -> None:
    model = Masks(0.5)
    with pytest.raises(TypeError):
        sequential_passes(model, None, dropout=(0.1, 0.3))
    assert model.dropout.p == 0.5


def test_sequential_passes_give_the_gradient_of_both_rates() -> None:
    """The straight computation: the two forwards written out by hand under the same seed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    x = torch.randn(6, 4)
    torch.manual_seed(1)
    outputs = sequential_passes(model, x, dropout=(0.1, 0.3))
    torch.manual_seed(1)
    expected = []
    for p in (0.1, 0.3):
        with dropout_rate(model, p):
            expected.append(model(x))
    assert torch.cat(outputs).equal(torch.cat(expected))

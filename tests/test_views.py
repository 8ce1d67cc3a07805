"""Views: what a cutoff may touch, how much of it, that the model really does not see it, and the methods made of it."""

import copy
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rdrop import (
    CUTOFF,
    RDROP,
    SIMCUT,
    Cutoff,
    View,
    kl_from_first,
    perturb_batch,
    rdrop_loss,
    repeat_batch,
    task_passes_of,
    views_of,
)
from rdrop.views import random_features, random_span, random_tokens

KINDS = ("token", "span", "feature", "unknown", "embedding")
PAD, START, END, UNKNOWN = 0, 1, 2, 3
SPECIAL = (PAD, START, END)


def text_batch() -> dict[str, Tensor]:
    """Two sentences and their translations: both end or begin with a special token once, and with a word once."""
    return {
        "input_ids": torch.tensor([[5, 6, END, 7, 8, END], [9, 4, 5, PAD, PAD, PAD]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]]),
        "decoder_input_ids": torch.tensor([[START, 5, 6, 7], [4, 8, END, PAD]]),
        "labels": torch.tensor([[5, 6, 7, END], [8, END, -100, -100]]),
    }


def random_batch(examples: int = 4, seed: int = 0, targets: bool = False) -> dict[str, Tensor]:
    """Ragged sentences of words 4 .. 29 between special tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 30, (examples, 9), generator=generator)
    ids[:, 0] = START
    lengths = torch.tensor([9, 6, 7, 5]).repeat(examples)[:examples, None]
    places = torch.arange(9)
    ids = ids.where(places < lengths, PAD).where(places != lengths - 1, END)
    batch = {"input_ids": ids, "attention_mask": (places < lengths).long()}
    if targets:
        batch["decoder_input_ids"] = torch.randint(4, 30, (examples, 5), generator=generator)
        batch["decoder_input_ids"][:, 0] = START
    return batch


def cut_all(kind: Any, batch: dict[str, Tensor] | None = None, ratio: float = 1.0) -> tuple[dict[str, Tensor], Any]:
    batch = text_batch() if batch is None else batch
    return perturb_batch(batch, views_of(kind, ratio), special_ids=SPECIAL, unknown_id=UNKNOWN)


# ---------------------------------------------------------------------------------------------------- views as values


def test_the_methods_are_what_their_settings_name():
    assert views_of() == views_of(None, 0.1) == RDROP == (View(None, True), View(None, True))
    assert views_of("token", 0.1) == CUTOFF == (View(), View(Cutoff("token", 0.1)))
    assert views_of("embedding", 0.05, "first") == SIMCUT
    assert views_of("span", 0.1, passes=3) == (View(), View(Cutoff("span", 0.1)), View(Cutoff("span", 0.1)))


def test_the_passes_of_the_task_loss_are_counted_from_zero():
    assert task_passes_of(RDROP) == task_passes_of(CUTOFF) == (0, 1)
    assert task_passes_of(SIMCUT) == (0,)
    assert task_passes_of([View(carries_task_loss=False)] * 2) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cutoff("word", 0.1), r"cutoff kind \(='word'\) must be one of token, span, feature, unknown, emb"),
        (lambda: Cutoff("token", 1.5), r"cutoff ratio \(=1.5\) must be in \[0, 1\]"),
        (lambda: Cutoff("token", float("nan")), r"cutoff ratio \(=nan\) must be in \[0, 1\]"),
        (lambda: views_of("token", 0.1, "second"), r"task_passes \(='second'\) must be 'all' or 'first'"),
        (lambda: views_of("token", 0.1, passes=1), r"passes \(=1\) must be at least 2: the first is clean"),
    ],
)
def test_settings_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------------- what may be cut


def test_at_ratio_1_every_word_is_unknown_but_the_last_of_the_source_and_the_first_of_the_target():
    repeated, _ = cut_all("unknown")
    clean, cut = repeated["input_ids"].chunk(2)
    assert clean.equal(text_batch()["input_ids"])
    assert cut.tolist() == [[3, 3, END, 3, 3, END], [3, 3, 5, PAD, PAD, PAD]]
    assert repeated["decoder_input_ids"][2:].tolist() == [[START, 3, 3, 3], [4, 3, END, PAD]]
    assert repeated["attention_mask"].equal(text_batch()["attention_mask"].repeat(2, 1))


@pytest.mark.parametrize("kind", ["token", "span"])
def test_at_ratio_1_attention_leaves_every_word_out_but_the_last(kind):
    repeated, perturbed = cut_all(kind)
    assert repeated["attention_mask"][:2].equal(text_batch()["attention_mask"])
    assert repeated["attention_mask"][2:].tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]]
    [source] = perturbed.zeroings
    assert source.side.zeroed[2:].int().tolist() == [[1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert repeated["decoder_input_ids"].equal(text_batch()["decoder_input_ids"].repeat(2, 1))


def test_at_ratio_1_the_embedding_of_every_word_is_zero_but_attention_stays():
    repeated, perturbed = cut_all("embedding")
    source, target = (zeroing.side.zeroed for zeroing in perturbed.zeroings)
    assert not source[:2].any()
    assert source[2:].int().tolist() == [[1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert target[2:].int().tolist() == [[0, 1, 1, 1], [0, 1, 0, 0]]
    assert repeated["attention_mask"].equal(text_batch()["attention_mask"].repeat(2, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_the_batch_itself_never_change(kind):
    batch, untouched = text_batch(), text_batch()
    repeated, _ = cut_all(kind, batch)
    assert all(batch[name].equal(untouched[name]) for name in untouched)
    assert repeated["labels"].equal(untouched["labels"].repeat(2, 1))


def test_without_an_attention_mask_all_tokens_count_and_token_cutoff_makes_one():
    batch = {"input_ids": torch.tensor([[5, 6, 7]])}
    assert cut_all("token", batch)[0]["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert "attention_mask" not in cut_all("embedding", batch)[0]


def test_left_padding_and_a_boolean_mask():
    batch = {
        "input_ids": torch.tensor([[9, 9, 5, 6, 7]]),
        "attention_mask": torch.tensor([[False, False, True, True, True]]),
        "decoder_input_ids": torch.tensor([[9, 5, 6, 7]]),
        "decoder_attention_mask": torch.tensor([[0, 1, 1, 1]]),
    }
    repeated, _ = cut_all("unknown", batch)
    assert repeated["input_ids"][1].tolist() == [9, 9, 3, 3, 7]
    assert repeated["decoder_input_ids"][1].tolist() == [9, 5, 3, 3]
    assert cut_all("token", batch)[0]["attention_mask"][1].tolist() == [False, False, False, False, True]


@pytest.mark.parametrize("kind", ["token", "unknown", "embedding"])
def test_the_ratio_is_the_share_of_the_tokens_that_may_be_cut(kind):
    torch.manual_seed(0)
    batch = random_batch(examples=3000)
    repeated, perturbed = cut_all(kind, batch, ratio=0.1)
    may_be_cut = batch["input_ids"] > 3
    cut = repeated["input_ids"] != batch["input_ids"].repeat(2, 1)
    if kind != "unknown":
        cut = perturbed.zeroings[0].side.zeroed
    assert not cut[:3000].any()
    assert not cut[3000:][~may_be_cut].any()
    assert cut[3000:].sum() / may_be_cut.sum() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("length", [1, 3, 40])
def test_a_span_is_one_run_of_the_expected_length_anywhere(length):
    torch.manual_seed(0)
    may_be_cut = torch.zeros(5000, length + 4, dtype=torch.bool)
    may_be_cut[:, [place for place in range(length + 1) if place != 1]] = True  # a special token between words
    cut = random_span(may_be_cut, 0.3)
    assert not cut[~may_be_cut].any()
    words = cut[:, may_be_cut[0]]
    starts = words[:, 0].int() + (words[:, 1:] & ~words[:, :-1]).sum(-1)
    assert starts.max() == 1
    assert words.float().mean() == pytest.approx(0.3, abs=0.02)
    assert set(words.sum(-1).tolist()) <= {int(0.3 * length), int(0.3 * length) + 1}
    assert words.any(0).all()


def test_feature_cutoff_zeroes_the_same_dimensions_in_a_whole_example():
    torch.manual_seed(0)
    cut = random_features(4000, 25, 0.1, torch.device("cpu"))
    assert set(cut.sum(-1).tolist()) == {2, 3}
    assert cut.float().mean() == pytest.approx(0.1, abs=0.002)
    assert cut.float().mean(0).sub(0.1).abs().max() < 0.02
    model = Embedded()
    repeated, perturbed = perturb_batch({"input_ids": torch.arange(1, 13).view(3, 4)}, views_of("feature", 0.5))
    with perturbed(model):
        zero = model(**repeated) == 0
    assert not zero[:3].any()
    assert zero[3:].sum(-1).eq(4).all()
    assert zero[3:].equal(zero[3:, :1].expand(3, 4, 8))
    assert not zero[3].equal(zero[4])


def test_every_example_and_every_pass_is_cut_on_its_own():
    torch.manual_seed(0)
    ids = torch.arange(4, 44).expand(2, 40)
    repeated, _ = perturb_batch({"input_ids": ids}, views_of("unknown", 0.5, passes=3), special_ids=(), unknown_id=3)
    cut = repeated["input_ids"][2:] == UNKNOWN
    assert len({tuple(row.tolist()) for row in cut}) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_the_cutoff(kind):
    model, outputs = Embedded(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        repeated, perturbed = cut_all(kind, random_batch(), ratio=0.5)
        with perturbed(model):
            outputs.append(model(repeated["input_ids"]))
    assert outputs[0].equal(outputs[1])
    assert not outputs[0].equal(outputs[2])


def test_one_view_at_a_time_for_passes_in_forwards_of_their_own():
    repeated, _ = perturb_batch(text_batch(), CUTOFF[:1], special_ids=SPECIAL)
    assert repeated["input_ids"].equal(text_batch()["input_ids"])
    repeated, perturbed = perturb_batch(text_batch(), [View(Cutoff("token", 1.0))], special_ids=SPECIAL)
    assert repeated["attention_mask"].tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]]
    assert len(perturbed.zeroings[0].side.zeroed) == 2


def test_each_pass_may_have_another_cutoff():
    views = (View(Cutoff("feature", 0.5)), View(Cutoff("token", 1.0)), View())
    repeated, perturbed = perturb_batch(text_batch(), views, special_ids=SPECIAL)
    model = Embedded()
    with perturbed(model):
        zero = model(repeated["input_ids"]) == 0
    assert zero[:2].sum(-1).eq(4).all()
    assert zero[2:4].all(-1).int().tolist() == [[1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 0]]
    assert not zero[4:].any()


@pytest.mark.parametrize(
    ("batch", "arguments", "message"),
    [
        (text_batch(), {}, r"cutoff token needs special_ids, the tokens that are never cut: special_ids=tokenizer.all"),
        ({"inputs": torch.ones(2, 3)}, {"special_ids": ()}, r"token ids \(N, S\) as batch\['input_ids'\]; .*a dict"),
        (torch.ones(2, 3), {"special_ids": ()}, r"the batch is a Tensor without it"),
        ({"input_ids": torch.ones(2, 3)}, {"special_ids": ()}, r"with \(4, 3\) of torch.float32"),
        (
            {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.ones(2, 1, 3, 3)},
            {"special_ids": ()},
            r"batch\['attention_mask'\] \(4, 1, 3, 3\) of torch.float32 after repeating; a cutoff needs both \(N, S\)",
        ),
    ],
)
def test_a_batch_or_an_argument_that_a_cutoff_needs_is_named(batch, arguments, message):
    with pytest.raises(ValueError, match=message):
        perturb_batch(batch, CUTOFF, **arguments)


def test_a_vocabulary_without_unknown_token_is_shown_the_other_cutoff():
    with pytest.raises(ValueError, match=r"needs unknown_id.*'embedding'"):
        perturb_batch(text_batch(), views_of("unknown", 0.05), special_ids=SPECIAL)


def test_views_without_a_cutoff_take_any_batch():
    x = torch.ones(2, 3)
    repeated, perturbed = perturb_batch(x, RDROP)
    assert repeated.equal(x.repeat(2, 1))
    with perturbed(nn.Identity()):
        pass
    with pytest.raises(TypeError, match="a mappingproxy cannot be rebuilt"):
        perturb_batch(MappingProxyType(text_batch()), CUTOFF, special_ids=())


# ---------------------------------------------------------------------------------------------------- in the model


class Embedded(nn.Module):
    """Returns the embeddings it looked up: `(N, S, 8)`, nowhere zero of its own."""

    def __init__(self, look_up: Any = lambda embedding, ids: embedding(ids)) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        nn.init.uniform_(self.embedding.weight, 1.0, 2.0)
        self.look_up = look_up

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.look_up(self.embedding, input_ids)
        return embedded


def tiny_models() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    small |= {"intermediate_size": 16, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    pair = {"vocab_size": 30, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    pair |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "scale_embedding": True}
    pair |= {"max_position_embeddings": 16, "pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END}
    pair |= {"decoder_start_token_id": START, "forced_eos_token_id": None}
    t5 = {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 |= {"pad_token_id": PAD, "eos_token_id": END, "decoder_start_token_id": START}
    return {
        "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**small)),
        "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**small)),
        "marian": lambda: transformers.MarianMTModel(transformers.MarianConfig(**pair)),
        "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**pair)),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)),
    }


MODELS = ("bert", "roberta", "marian", "bart", "t5")


def tiny_model(name: str) -> Any:
    return tiny_models()[name]()


def last_states(output: Any) -> Tensor:
    """Of the encoder or the decoder: what the output layer sees, which may share its weights with the embedding."""
    states: Tensor = (output.get("decoder_hidden_states") or output.hidden_states)[-1]
    return states


def first_states(output: Any) -> Tensor:
    states: Tensor = (output.get("encoder_hidden_states") or output.hidden_states)[0]
    return states


@pytest.fixture(params=MODELS)
def named_model(request) -> Iterator[tuple[str, Any, dict[str, Tensor]]]:
    model = tiny_model(request.param).eval()
    batch = random_batch(targets=request.param in ("marian", "bart", "t5"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3)  # so that what is cut shows
        yield request.param, model, batch


def test_embedding_cutoff_is_an_embedding_of_zeros_with_positions_and_attention_as_ever(named_model):
    """The straight computation: a model whose own embedding has zeros for every word."""
    _, model, batch = named_model
    repeated, perturbed = cut_all("embedding", batch)
    with perturbed(model):
        output = model(**repeated, output_hidden_states=True)
    wordless = copy.deepcopy(model)
    wordless.get_input_embeddings().weight[4:] = 0
    expected = wordless(**batch, output_hidden_states=True)
    torch.testing.assert_close(first_states(output)[4:], first_states(expected))
    torch.testing.assert_close(last_states(output)[4:], last_states(expected))
    plain = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(last_states(output)[:4], last_states(plain))
    assert not torch.allclose(last_states(output)[4:], last_states(plain), atol=1e-3)


@pytest.mark.parametrize("kind", ["token", "span"])
def test_a_token_that_is_cut_is_as_if_its_place_held_another(kind, named_model):
    """The straight computation: other words in the places that attention leaves out."""
    name, model, batch = named_model
    torch.manual_seed(0)
    repeated, perturbed = cut_all(kind, batch, ratio=0.5)
    with perturbed(model):
        output = model(**repeated, output_hidden_states=True)
    cut = perturbed.zeroings[0].side.zeroed
    assert 0 < cut.sum() < (batch["input_ids"] > 3).sum()
    other = repeated | {"input_ids": repeated["input_ids"].masked_fill(cut, 29)}
    expected = model(**other, output_hidden_states=True)
    kept = torch.ones_like(last_states(output)[..., 0], dtype=torch.bool) if "decoder_input_ids" in batch else ~cut
    torch.testing.assert_close(last_states(output)[kept], last_states(expected)[kept])
    torch.testing.assert_close(output.logits, expected.logits)
    assert name not in ("bert", "roberta") or not last_states(output)[cut].equal(last_states(expected)[cut])


@pytest.mark.parametrize("kind", KINDS)
def test_the_clean_pass_is_clean_and_no_hook_stays(kind, named_model):
    _, model, batch = named_model
    repeated, perturbed = cut_all(kind, batch, ratio=0.5)
    with perturbed(model):
        cut = model(**repeated).logits
    torch.testing.assert_close(cut[:4], model(**batch).logits)
    assert not torch.allclose(cut[4:], cut[:4])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_ratio_0_is_plain_rdrop_to_the_bit(kind):
    model, batch = tiny_model("bert").train(), random_batch()
    labels = torch.tensor([0, 1, 1, 0])

    def terms(views, *, as_rdrop: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        model.zero_grad()
        if as_rdrop:
            logits, task_passes = model(**repeat_batch(batch)).logits, None
        else:
            repeated, perturbed = perturb_batch(batch, views, special_ids=SPECIAL, unknown_id=UNKNOWN)
            with perturbed(model):
                logits = model(**repeated).logits
            task_passes = task_passes_of(views)
        loss = rdrop_loss(logits, labels, alpha=2.0, task_passes=task_passes).loss
        loss.backward()
        return logits.detach(), loss.detach(), *[weight.grad.clone() for weight in model.parameters()]

    ours, plain = terms(views_of(kind, 0.0), as_rdrop=False), terms(None, as_rdrop=True)
    assert all(a.equal(b) for a, b in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    "look_up",
    [
        lambda embedding, ids: embedding(input=ids),
        lambda embedding, ids: embedding(ids.t()).transpose(0, 1),
        lambda embedding, ids: embedding(ids.flatten()).unflatten(0, ids.shape),
        lambda embedding, ids: torch.cat([embedding(ids[:, :2]), embedding(ids[:, 2:])], 1),
    ],
    ids=["by keyword", "time first", "flat", "in parts"],
)
@pytest.mark.parametrize("kind", ["embedding", "feature"])
def test_views_of_the_ids_are_recognized(look_up, kind):
    batch = {"input_ids": text_batch()["input_ids"]}
    model, plain = Embedded(look_up), Embedded()
    plain.load_state_dict(model.state_dict())
    outputs = []
    for each in (model, plain):
        torch.manual_seed(0)
        repeated, perturbed = cut_all(kind, batch, ratio=0.5)
        with perturbed(each):
            outputs.append(each(**repeated))
    assert outputs[0].eq(0).any()
    assert outputs[0].equal(outputs[1])


def test_choices_of_an_example_are_cut_each_on_its_own():
    """Multiple choice: ids `(N, choices, S)`, which the model makes `(N * choices, S)`."""
    torch.manual_seed(0)
    ids = torch.arange(4, 44).expand(2, 3, 40)
    repeated, perturbed = perturb_batch({"input_ids": ids}, views_of("embedding", 0.5), special_ids=())
    model = Embedded(lambda embedding, ids: embedding(ids.view(-1, ids.shape[-1])))
    with perturbed(model):
        zero = model(**repeated).eq(0).all(-1)
    assert not zero[:6].any()
    assert len({tuple(row.tolist()) for row in zero[6:]}) == 6
    assert not zero[:, -1].any()


@pytest.mark.parametrize(
    "forward",
    [
        lambda model, ids: None,
        lambda model, ids: model(ids.clone()),
        lambda model, ids: F.embedding(ids, model.embedding.weight),
    ],
    ids=["no forward", "a copy", "no nn.Embedding"],
)
def test_a_model_that_never_embeds_the_ids_is_an_error_and_no_hook_stays(forward):
    model = Embedded()
    repeated, perturbed = perturb_batch({"input_ids": torch.ones(2, 3).long()}, CUTOFF, special_ids=())
    with (
        pytest.raises(RuntimeError, match=r"no nn.Embedding of Embedded looked up input_ids: nothing was cut"),
        perturbed(model),
    ):
        forward(model, repeated["input_ids"])
    assert not model.embedding._forward_hooks


def test_an_exception_in_the_forward_comes_out_as_it_is_and_no_hook_stays():
    model = Embedded()
    _, perturbed = perturb_batch({"input_ids": torch.ones(2, 3).long()}, CUTOFF, special_ids=())
    with pytest.raises(KeyError, match="mine"), perturbed(model):
        raise KeyError("mine")
    assert not model.embedding._forward_hooks


@pytest.mark.parametrize("kind", ["unknown", "embedding"])
def test_a_decoder_input_that_the_model_makes_itself_is_an_error(kind):
    model, batch = tiny_model("marian"), random_batch()
    _, perturbed = cut_all(kind, batch)
    with pytest.raises(ValueError, match=r"MarianMTModel makes its own decoder input.*prepare_decoder_input_ids_from"):
        perturbed(model).__enter__()
    labels = torch.tensor([[5, 6, 7, END]] * 4)
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
    repeated, perturbed = cut_all(kind, batch)
    with perturbed(model):
        model(**repeated)


def test_layers_under_gradient_checkpointing_have_the_same_gradient():
    model, batch = tiny_model("bert").train(), random_batch()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model.zero_grad()
        repeated, perturbed = cut_all("embedding", batch, ratio=0.5)
        with perturbed(model):
            loss = model(**repeated).logits.square().sum()
        loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_checkpoint_around_the_embedding_fails_in_backward():
    model = Embedded(lambda embedding, ids: checkpoint(lambda x: embedding(x).square(), ids, use_reentrant=False))
    repeated, perturbed = cut_all("embedding", {"input_ids": text_batch()["input_ids"]})
    with perturbed(model):
        loss = model(**repeated).sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")  # torch.compile's
def test_a_compiled_model_is_cut_anew_each_time():
    model, ids = Embedded(), text_batch()["input_ids"]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    for _ in range(3):
        repeated, perturbed = cut_all("embedding", {"input_ids": ids}, ratio=0.5)
        with perturbed(compiled):
            zero = compiled(repeated["input_ids"]).eq(0).all(-1)
        assert zero.equal(perturbed.zeroings[0].side.zeroed)
    assert compiled(repeated["input_ids"]).equal(model(repeated["input_ids"]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")  # torch.compile's
def test_a_compiled_model_that_does_not_see_the_block_is_an_error():
    model, ids = Embedded(), text_batch()["input_ids"]
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(repeat_batch(ids))
    repeated, perturbed = cut_all("embedding", {"input_ids": ids})
    with pytest.raises(RuntimeError, match=r"looked up input_ids.*torch.compiler.reset\(\) once"), perturbed(compiled):
        compiled(repeated["input_ids"])
    torch.compiler.reset()
    with perturbed(compiled):
        assert compiled(repeated["input_ids"]).eq(0).any()


def test_a_model_under_ddp_is_cut_as_it_is_alone(tmp_path):
    import torch.distributed as dist

    batch = random_batch(targets=True)
    labels = torch.randint(4, 30, (4, 5), generator=torch.Generator().manual_seed(1))
    model = tiny_model("marian").train()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        results = []
        for trained in (model, nn.parallel.DistributedDataParallel(model)):
            torch.manual_seed(0)
            model.zero_grad()
            repeated, perturbed = perturb_batch(batch, views_of("embedding", 0.5, "first"), special_ids=SPECIAL)
            with perturbed(trained):
                logits = trained(**repeated).logits
            loss = rdrop_loss(logits, labels, alpha=3.0, task_passes=(0,)).loss
            loss.backward()
            results.append(
                [loss.detach(), *[weight.grad.clone() for weight in model.parameters() if weight.requires_grad]]
            )
    finally:
        dist.destroy_process_group()
    for alone, wrapped in zip(*results, strict=True):
        torch.testing.assert_close(alone, wrapped)


# ---------------------------------------------------------------------------------------------------- the methods


class BagOfWords(nn.Module):
    """Embeds, averages, classifies: small enough to be written out beside the formula."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 5, dtype=torch.float64)

    def forward(self, input_ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.embedding(input_ids).mean(1))
        return logits


def test_simcut_is_its_formula_in_plain_pytorch():
    """CE(clean) + 3 KL(clean || cut), gradients through both; ours takes alpha / 2, hence 6."""
    torch.manual_seed(0)
    model, ids, labels = BagOfWords(), random_batch()["input_ids"], torch.tensor([0, 4, 2, 2])
    repeated, perturbed = perturb_batch({"input_ids": ids}, views_of("embedding", 0.5, "first"), special_ids=SPECIAL)
    with perturbed(model):
        logits = model(**repeated)
    ours = rdrop_loss(logits, labels, alpha=2 * 3.0, task_passes=(0,), divergence=kl_from_first).loss
    ours.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]

    model.zero_grad()
    keep = ~perturbed.zeroings[0].side.zeroed[4:, :, None]
    clean = model.head(model.embedding.weight[ids].mean(1))
    cut = model.head((model.embedding.weight[ids] * keep).mean(1))
    kl = F.kl_div(cut.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="batchmean")
    expected = F.cross_entropy(clean, labels) + 3.0 * kl
    expected.backward()
    assert kl > 0
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradients, [weight.grad for weight in model.parameters()])


def test_a_word_that_is_cut_gets_no_gradient_from_that_pass():
    model = Embedded()
    ids = torch.tensor([[4, 5, 6]])
    repeated, perturbed = perturb_batch({"input_ids": ids}, views_of("embedding", 1.0), special_ids=())
    with perturbed(model):
        model(**repeated).sum().backward()
    assert model.embedding.weight.grad[4:7, 0].tolist() == [1.0, 1.0, 2.0]  # the last is never cut


def test_unlabeled_sentences_are_drawn_together():
    """Divergence alone: training without a label makes the passes agree."""
    torch.manual_seed(0)
    model, batch = BagOfWords(), {"input_ids": random_batch()["input_ids"]}
    views = (View(carries_task_loss=False), View(Cutoff("embedding", 0.5), carries_task_loss=False))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    divergences = []
    for _ in range(20):
        repeated, perturbed = perturb_batch(batch, views, special_ids=SPECIAL)
        with perturbed(model):
            logits = model(**repeated)
        counts = torch.zeros(4, dtype=torch.long)
        loss, task_loss, divergence = rdrop_loss(logits, counts, alpha=1.0, task_passes=task_passes_of(views))
        assert task_loss == 0
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        divergences.append(divergence.item())
    assert sum(divergences[-5:]) < sum(divergences[:5]) / 3


def test_random_tokens_takes_each_with_the_probability_of_the_ratio():
    torch.manual_seed(0)
    may_be_cut = torch.tensor([True, False, True]).expand(20000, 3)
    share = random_tokens(may_be_cut, 0.2).float().mean(0)
    assert share.tolist() == pytest.approx([0.2, 0.0, 0.2], abs=0.01)

"""Beam search: CTranslate2 against transformers' generate, on a model that has learned something."""

import copy
import importlib.util
import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    MarianMTModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rdrop.experiments.tasks.decoding.choice import decoder_of
from rdrop.experiments.tasks.decoding.ctranslate2 import CTranslate2Decoder
from rdrop.experiments.tasks.decoding.generate import TransformersDecoder
from rdrop.experiments.tasks.decoding.search import Search
from rdrop.experiments.tasks.token_sequences import TokenSequences
from rdrop.experiments.tasks.translation.recipes import TRANSLATION
from rdrop.experiments.tasks.translation.task import make_batch, marian_config

START, PAD, END = 0, 1, 2
VOCABULARY = 20
NEVER = (START, PAD, *range(VOCABULARY, 24))  # the model's vocabulary is rounded up


def sentences(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(4, VOCABULARY), k=draw.randint(1, 7)) for _ in range(count)]


SOURCES = [[*ids, END] for ids in sentences(60, seed=1)]


def taught(model: nn.Module) -> nn.Module:
    """The model after a few lessons in reversing: it is often right, and where not, it is in doubt."""
    pairs = sentences(400, seed=0)
    split = TokenSequences(pairs), TokenSequences([ids[::-1] for ids in pairs])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        batch = make_batch(split, range(step * 40 % 400, step * 40 % 400 + 40))
        labels = batch.pop("labels")
        logits = model(**batch).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def marian() -> nn.Module:
    torch.manual_seed(0)
    return taught(MarianMTModel(marian_config(TRANSLATION.tiny().model, VOCABULARY)))


@pytest.fixture(scope="module")
def bart() -> nn.Module:
    torch.manual_seed(0)
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", 1), ("attention_heads", 2), ("ffn_dim", 64))}  # fmt: skip
    ids = {"pad_token_id": PAD, "bos_token_id": START, "eos_token_id": END, "decoder_start_token_id": END}
    config = BartConfig(
        vocab_size=24, d_model=32, max_position_embeddings=64, forced_eos_token_id=None, dropout=0.0, **sizes, **ids
    )
    return taught(BartForConditionalGeneration(config))


def agreement(model: nn.Module, search: Search, sources: Sequence[Sequence[int]] = SOURCES) -> float:
    first, second = (decoder(model, search)(sources, 12) for decoder in (CTranslate2Decoder, TransformersDecoder))
    assert len(first) == len(second) == len(sources)
    return sum(ours == reference for ours, reference in zip(first, second, strict=True)) / len(sources)


@pytest.mark.parametrize("model", ["marian", "bart"])
@pytest.mark.parametrize(
    "search",
    [
        Search(1, never=NEVER),
        Search(4, never=NEVER),
        Search(4, length_penalty=0.6, never=NEVER),
        Search(4, length_penalty=2.0, never=NEVER),
        Search(1, min_length=4, never=NEVER),
        Search(1, no_repeat_ngram=2, never=NEVER),
    ],
    ids=["greedy", "beams", "short", "long", "min-length", "no-repeat"],
)
def test_both_decoders_find_the_same(request: pytest.FixtureRequest, model: str, search: Search) -> None:
    assert agreement(request.getfixturevalue(model), search) >= 0.95


@pytest.mark.parametrize("decoder", [CTranslate2Decoder, TransformersDecoder])
def test_rules_hold_in_a_beam_search(
    marian: nn.Module, decoder: type[CTranslate2Decoder | TransformersDecoder]
) -> None:
    outputs = decoder(marian, Search(4, min_length=5, no_repeat_ngram=2, never=NEVER))(SOURCES, 12)
    assert min(map(len, outputs)) == 5
    for output in outputs:
        pairs = list(pairwise(output))
        assert len(set(pairs)) == len(pairs)


@pytest.mark.parametrize(
    "saved", [{"min_length": 30}, {"repetition_penalty": 5.0}, {"forced_bos_token_id": 7}, {"do_sample": True}]
)
def test_what_a_model_was_saved_with_does_not_change_the_search(bart: nn.Module, saved: dict[str, Any]) -> None:
    search = Search(2, never=NEVER)
    own = TransformersDecoder(bart, search)(SOURCES, 12)
    copied: Any = copy.deepcopy(bart)
    copied.generation_config = GenerationConfig(decoder_start_token_id=END, **saved)
    assert TransformersDecoder(copied, search)(SOURCES, 12) == own


def test_the_start_that_is_prescribed_is_not_returned(bart: nn.Module) -> None:
    search = Search(2, never=NEVER, prefix=(7, 8))
    assert agreement(bart, search) >= 0.95
    free = CTranslate2Decoder(bart, Search(2, never=NEVER))(SOURCES, 12)
    assert CTranslate2Decoder(bart, search)(SOURCES, 12) != free


@pytest.mark.parametrize("decoder", [CTranslate2Decoder, TransformersDecoder])
def test_outputs_have_no_end_no_special_ids_and_no_more_than_the_length_asked_for(
    marian: nn.Module, decoder: type[CTranslate2Decoder | TransformersDecoder]
) -> None:
    outputs = decoder(marian, Search(4, never=NEVER))(SOURCES, 3)
    assert max(map(len, outputs)) == 3
    assert not {END, *NEVER} & {token for output in outputs for token in output}


@pytest.mark.parametrize("decoder", [CTranslate2Decoder, TransformersDecoder])
def test_neighbors_in_a_batch_change_nothing(
    marian: nn.Module, decoder: type[CTranslate2Decoder | TransformersDecoder]
) -> None:
    decode = decoder(marian, Search(4, never=NEVER))
    together = decode(SOURCES[:8], 12)
    assert [decode([source], 12)[0] for source in SOURCES[:8]] == together


def test_ctranslate2_is_taken_for_marian_and_keeps_the_weights_of_then(marian: nn.Module) -> None:
    decode = decoder_of(marian, Search(2, never=NEVER))
    assert decode.name.startswith("ctranslate2 ")
    before = decode(SOURCES, 12)
    saved = {name: value.clone() for name, value in marian.state_dict().items()}
    with torch.no_grad():
        for parameter in marian.parameters():
            parameter.add_(1.0)
    assert decode(SOURCES, 12) == before
    marian.load_state_dict(saved)


@pytest.mark.parametrize(
    ("search", "taken"),
    [
        (Search(beams=4, min_length=5), TransformersDecoder),
        (Search(beams=4, no_repeat_ngram=3), TransformersDecoder),
        (Search(beams=4, min_length=1), CTranslate2Decoder),  # all hypotheses lose the same
        (Search(beams=1, min_length=5, no_repeat_ngram=3), CTranslate2Decoder),  # nothing to choose from
        (Search(beams=4), CTranslate2Decoder),
    ],
)
def test_a_search_that_rules_tokens_out_is_made_as_in_the_literature(
    bart: nn.Module, search: Search, taken: type
) -> None:
    assert type(decoder_of(bart, search)) is taken


def test_decoding_draws_no_random_numbers(marian: nn.Module) -> None:
    state = torch.random.get_rng_state()
    decoder_of(marian, Search(2, never=NEVER))(SOURCES[:4], 12)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_without_ctranslate2_generate_decodes_and_says_so(marian: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="generate, which is slow: ctranslate2 is not installed"):
        decode = decoder_of(marian, Search(2, never=NEVER))
    assert decode.name.startswith("transformers ")
    assert decode(SOURCES[:4], 12) == CTranslate2Decoder(marian, Search(2, never=NEVER))(SOURCES[:4], 12)


def test_another_architecture_is_decoded_by_generate_and_it_says_so() -> None:
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=24, decoder_start_token_id=PAD, pad_token_id=PAD, **sizes))
    with pytest.warns(RuntimeWarning, match="not for T5ForConditionalGeneration"):
        decode = decoder_of(model.eval(), Search(1))
    assert len(decode(SOURCES[:2], 5)) == 2

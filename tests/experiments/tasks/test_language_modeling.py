"""Language modeling: the text of each split, its tokens, blocks and windows, the perplexity, and the models."""

import gzip
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.real_data import real_data
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from rdrop.dropout import dropout_sources
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.language_modeling import data as texts
from rdrop.experiments.tasks.language_modeling.adaptive import AdaptiveLanguageModel
from rdrop.experiments.tasks.language_modeling.data import hold_out_neighbors, load_lines
from rdrop.experiments.tasks.language_modeling.recipes import (
    FINE_TUNING,
    FROM_SCRATCH,
    PUBLISHED,
    RECIPES,
    TINYSHAKESPEARE,
    WIKITEXT_2_VALID,
    WIKITEXT_2_VALID_ADAPTIVE,
    WIKITEXT_103,
    WIKITEXT_103_ADAPTIVE,
    LanguageModelingRecipe,
)
from rdrop.experiments.tasks.language_modeling.task import (
    RATE_NAMES,
    LanguageModeling,
    Window,
    evaluation_windows,
)
from rdrop.experiments.tasks.language_modeling.tokens import (
    END,
    SymbolVocabulary,
    characters,
    encoded,
    learned_pieces,
    pretrained_pieces,
    words,
)
from rdrop.experiments.tasks.pretrained import set_rates
from rdrop.experiments.tasks.task import load_task
from rdrop.experiments.training.trainer import train


def own_file(folder: Path, text: str, name: str = "own.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def on_words(folder: Path, text: str, **changes: object) -> LanguageModelingRecipe:
    """A small model of the words of `text`, which is all three splits (with spaces that are no words)."""
    path, valid, test = (own_file(folder, text.replace("\n", f"{' ' * n}\n"), f"own{n}.txt") for n in range(3))
    small = {"model.layers": 1, "model.hidden_size": 16, "model.heads": 2, "model.intermediate_size": 16}
    given = {"data.train": path, "data.valid": valid, "data.test": test, "data.min_count": 1, "data.lines": None}
    sizes = {"data.block_size": 4, "data.context": 2}
    return WIKITEXT_2_VALID.replace(**{**given, **sizes, **small, **changes})


# ------------------------------------------------------------------------------------------------------- real files


def test_wikitext_has_its_lines_and_tokens_and_keeps_its_last_tenth_as_valid() -> None:
    recipe = WIKITEXT_2_VALID.replace(**{"data.folder": str(real_data("wikitext-2-valid-test"))})
    found = load_lines(recipe.data)
    assert {split: len(lines) for split, lines in found.items()} == {"train": 3384, "valid": 376, "test": 4358}
    assert found["train"][1] == " = Homarus gammarus = "
    assert found["test"][1] == " = Robert <unk> = "
    tokens = {split: sum(len(words(line)) for line in lines) for split, lines in found.items()}
    assert tokens["train"] + tokens["valid"] == 217_646
    assert tokens["test"] == 245_569


def test_tinyshakespeare_is_split_by_position() -> None:
    recipe = TINYSHAKESPEARE.replace(**{"data.folder": str(real_data("tinyshakespeare")), "data.train_lines": None})
    found = load_lines(recipe.data)
    assert {split: len(lines) for split, lines in found.items()} == {"train": 36_000, "valid": 2_000, "test": 2_000}
    assert sum(len(characters(line)) for lines in found.values() for line in lines) == 1_115_394
    assert found["train"][0] == "First Citizen:"
    assert found["test"][-1] == "Whiles thou art waking."
    assert load_lines(recipe.replace(**{"data.train_lines": 10}).data)["train"] == found["train"][:10]
    assert SymbolVocabulary(found["train"], characters).size == 65 + 2


def test_a_file_that_lost_a_line_is_named_with_both_counts(tmp_path: Path) -> None:
    source = Path(real_data("wikitext-2-valid-test"))
    for name in ("wiki.valid.tokens.gz", "wiki.test.tokens.gz"):
        (tmp_path / name).write_bytes((source / name).read_bytes())
    lines = gzip.decompress((source / "wiki.test.tokens.gz").read_bytes()).splitlines(keepends=True)
    (tmp_path / "wiki.test.tokens.gz").write_bytes(gzip.compress(b"".join(lines[:-1])))
    recipe = WIKITEXT_2_VALID.replace(**{"data.folder": str(tmp_path)})
    with pytest.raises(
        DataError, match=r"wiki\.test\.tokens\.gz: has 4357 lines and must have 4358; .*data\.lines=null"
    ):
        load_lines(recipe.data)
    assert len(load_lines(recipe.replace(**{"data.lines": None}).data)["test"]) == 4357


def test_damaged_copies_are_refused_by_file_and_line(tmp_path: Path) -> None:
    source = Path(real_data("tinyshakespeare"), "input.txt.gz").read_bytes()
    recipe = TINYSHAKESPEARE.replace(**{"data.folder": str(tmp_path)})
    (tmp_path / "input.txt.gz").write_bytes(source[: len(source) // 2])
    with pytest.raises(DataError, match=r"input\.txt\.gz:\d+: the compressed file is cut off"):
        load_lines(recipe.data)
    (tmp_path / "input.txt.gz").write_bytes(gzip.compress(gzip.decompress(source).replace(b"thou", b"th\xff", 1)))
    with pytest.raises(DataError, match=r"input\.txt\.gz:\d+: byte \d+ is not UTF-8"):
        load_lines(recipe.data)


# ---------------------------------------------------------------------------------------------------------- sources


def test_the_hub_gives_the_lines_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"train": ["", " = A = \n", " b c \n"] * 8, "validation": [" d \n"], "test": [" e \n", ""]}
    asked = []

    def load_hub(hub: str, config: str | None, split: str) -> Any:
        asked.append((hub, config, split))
        return datasets.Dataset.from_dict({"text": rows[split]})

    import datasets

    monkeypatch.setattr(texts, "load_hub", load_hub)
    found = load_lines(WIKITEXT_103.replace(**{"data.lines": [24, 1, 2]}).data)
    assert asked[0] == ("Salesforce/wikitext", "wikitext-103-v1", "train")
    assert found["train"][:3] == ["", " = A = ", " b c "]
    assert (found["valid"], found["test"]) == ([" d "], [" e ", ""])
    with pytest.raises(DataError, match="split train: has 24 lines and must have 1801350"):
        load_lines(WIKITEXT_103.data)
    rows["train"][4] = "two\nlines\n"
    with pytest.raises(DataError, match="split train:5: has a newline inside"):
        load_lines(WIKITEXT_103.data)


def test_without_files_of_their_own_valid_and_test_are_runs_of_neighboring_lines(tmp_path: Path) -> None:
    path = own_file(tmp_path, "".join(f"line {number}\n" for number in range(40)))
    data = FROM_SCRATCH.replace(**{"data.train": path}).data
    found = load_lines(data)
    numbers = {split: [int(line.split()[1]) for line in lines] for split, lines in found.items()}
    assert {split: len(own) for split, own in numbers.items()} == {"train": 32, "valid": 4, "test": 4}
    assert sorted(number for own in numbers.values() for number in own) == list(range(40))
    for split in ("valid", "test"):
        assert numbers[split] == list(range(numbers[split][0], numbers[split][0] + 4))
    assert load_lines(data) == found
    test = own_file(tmp_path, "a\n" * 40, "test.txt")
    given = load_lines(FROM_SCRATCH.replace(**{"data.train": path, "data.test": test}).data)
    assert (len(given["train"]), given["valid"], len(given["test"])) == (36, found["valid"], 40)
    assert hold_out_neighbors(40, ["test"], seed=0) != hold_out_neighbors(40, ["test"], seed=1)


def test_too_little_text_and_no_source_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data: set data\.train"):
        load_lines(FROM_SCRATCH.data)
    with pytest.raises(DataError, match="9 lines are too few to hold out 10 %"):
        load_lines(FROM_SCRATCH.replace(**{"data.train": own_file(tmp_path, "a\n" * 9)}).data)
    for split in ("train", "valid", "test"):
        files = {name: own_file(tmp_path, f"{name}\n" * 20, name) for name in ("train", "valid", "test")}
        files[split] = own_file(tmp_path, "\u200b\n" * 20, "blank.txt")
        with pytest.raises(DataError, match=f"the 20 lines (to|of) {split} (on )?are all empty"):
            load_lines(FROM_SCRATCH.replace(**{f"data.{name}": path for name, path in files.items()}).data)
    with pytest.raises(DataError, match=r"has no wiki\.train\.tokens or train\.txt"):
        load_lines(FROM_SCRATCH.replace(**{"data.folder": str(tmp_path)}).data)


# ----------------------------------------------------------------------------------------------------------- tokens


def test_words_are_numbered_by_their_count_and_rare_ones_are_unknown() -> None:
    vocabulary = SymbolVocabulary([" b a b ", "", "c b"], words, min_count=1)
    assert vocabulary.symbols == [END, "b", "a", "c", "<unk>"]  # 3, 3, 1, 1, 0
    tokens = encoded(vocabulary, ["b zebra", ""])
    assert (tokens.ids.tolist(), tokens.units) == ([1, 4, 0, 0], 4)
    assert SymbolVocabulary([" b a b ", "", "c b"], words, min_count=2).symbols == [END, "b", "<unk>"]
    assert (vocabulary.start_id, vocabulary.unknown_id, vocabulary.special_ids) == (0, 4, {0, 4})


def test_an_end_of_line_is_a_character() -> None:
    vocabulary = SymbolVocabulary(["ab", "b"], characters)
    assert vocabulary.symbols == ["\n", "b", "a", END, "<unk>"]
    assert vocabulary.encode(["ba"]) == [[1, 2, 0]]


def test_pieces_know_every_text_and_count_its_words() -> None:
    lines = ["the old house by the river", "", "the red house"] * 5
    pieces = learned_pieces(lines, 300)
    tokens = encoded(pieces, ["the old zoölogist", ""])
    assert tokens.units == 3 + 1 + 1
    assert pieces.unknown_id is None
    assert 257 < pieces.size <= 300
    assert tokens.ids.max() < pieces.size
    assert learned_pieces(lines, 300).encode(lines) == pieces.encode(lines)


def test_the_perplexity_of_pieces_of_a_text_without_spaces_is_by_character(tmp_path: Path) -> None:
    text = "".join(f"我們今天去學校看書{number}\n" for number in range(10, 50))
    recipe = FROM_SCRATCH.tiny().replace(**{"data.tiny": False, "data.train": own_file(tmp_path, text)})
    task = LanguageModeling(recipe)
    assert task.notes["perplexity"] == "by character, as the text has no spaces"
    assert task.constant_scores()["perplexity"] < 100
    assert (
        "perplexity" not in LanguageModeling(recipe.replace(**{"data.train": own_file(tmp_path, "a b\n" * 40)})).notes
    )


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_the_line_of_a_word_that_is_too_long_is_named(split: str, tmp_path: Path) -> None:
    word = f"{7**60000:x}"
    files = {}
    for name in ("train", "valid", "test"):
        long_line = f"a {word} b\n" if name == split else ""
        (tmp_path / f"{name}.txt").write_text("good film\n\n" * 20 + long_line + f"a good {name}\n" * 20)
        files[f"data.{name}"] = str(tmp_path / f"{name}.txt")
    recipe = FROM_SCRATCH.tiny().replace(**{"data.tiny": False, "data.vocabulary": 258}, **files)
    with pytest.raises(DataError, match=rf"^{tmp_path / split}\.txt:41: the longest word has {len(word)} characters, "):
        LanguageModeling(recipe)
    folder = recipe.replace(
        **{"data.folder": str(tmp_path)}, **dict.fromkeys(("data.train", "data.valid", "data.test"))
    )
    with pytest.raises(DataError, match=rf"^{tmp_path / split}\.txt:41: "):
        LanguageModeling(folder)


def test_words_too_long_for_a_perplexity_by_word_are_refused(tmp_path: Path) -> None:
    text = own_file(tmp_path, "".join(f"{number**150:x}\n" for number in range(10, 50)))
    recipe = FROM_SCRATCH.tiny().replace(**{"data.tiny": False, "data.train": text, "data.vocabulary": 258})
    with pytest.raises(
        DataError, match=r"a word of train \d+ tokens in the mean.*data.tokens=characters data.vocabulary=null"
    ):
        LanguageModeling(recipe)
    LanguageModeling(recipe.replace(**{"data.tokens": "characters", "data.vocabulary": None}))


def test_a_special_token_in_a_text_is_text(tmp_path: Path) -> None:
    line = "then <eos> and <|endoftext|> stop"
    spelled = SymbolVocabulary([line], words)
    assert spelled.encode([line])[0].count(spelled.start_id) == 1  # the end of the line
    pieces = learned_pieces([line] * 5, 300)
    assert pieces.start_id not in pieces.encode([line])[0]
    changes = {"model.name": save_gpt2(tmp_path), "data.block_size": 16, "data.context": 8}
    task = load_task(FINE_TUNING.replace(**changes, **{"data.train": own_file(tmp_path, f"{line}\n" * 30)}))
    inputs = task.train_batch(list(range(1, task.train_size())), epoch=0)["input_ids"]
    assert task.special_ids() == {0}
    assert not (inputs[:-1] == 0).any()  # the last block is padded


def test_the_notes_count_unknown_tokens(tmp_path: Path) -> None:
    valid = own_file(tmp_path, "a c b\n", "valid.txt")
    recipe = on_words(tmp_path, "a a b\na <unk> b\n", **{"data.valid": valid, "data.min_count": 2})
    assert LanguageModeling(recipe).notes == {"unknown tokens": "train 1, valid 1, test 1"}
    recipe = recipe.replace(**{"data.tokens": "bpe", "data.vocabulary": 300, "data.min_count": None})
    assert LanguageModeling(recipe).notes == {}


# -------------------------------------------------------------------------------------------------- blocks, windows


def test_blocks_predict_every_token_once_from_the_one_before(tmp_path: Path) -> None:
    task = LanguageModeling(on_words(tmp_path, "a b c d\ne f\n"))  # a b c d <eos> e f <eos>: 8 tokens
    task._tokens["train"] = SimpleNamespace(ids=np.array([11, 12, 13, 14, 10, 15], dtype=np.int32))
    task._vocabulary.start_id = 10
    assert task.train_size() == 2
    assert task.train_lengths().tolist() == [4, 2]
    batch = task.train_batch([1, 0], epoch=0)
    assert batch["input_ids"].tolist() == [[14, 10, 10, 10], [10, 11, 12, 13]]
    assert batch["labels"].tolist() == [[10, 15, -100, -100], [11, 12, 13, 14]]
    assert task.train_batch([1], epoch=3)["labels"].tolist() == [[10, 15]]


def test_windows_score_every_token_once_with_their_context() -> None:
    assert evaluation_windows(9, size=4, context=2) == [
        Window(0, 4, 0),
        Window(2, 6, 4),
        Window(4, 8, 6),
        Window(6, 9, 8),
    ]
    assert evaluation_windows(8, size=4, context=0) == [Window(0, 4, 0), Window(4, 8, 4)]
    assert evaluation_windows(3, size=4, context=2) == [Window(0, 3, 0)]


@pytest.mark.parametrize(("length", "size", "context"), [(1, 1, 0), (1000, 512, 400), (1023, 64, 63), (624, 512, 400)])
def test_no_window_is_longer_than_the_model_or_short_of_context(length: int, size: int, context: int) -> None:
    windows = evaluation_windows(length, size, context)
    scored = [place for window in windows for place in range(window.scored, window.stop)]
    assert scored == list(range(length))
    assert all(window.stop - window.start <= size for window in windows)
    assert all(window.scored - window.start == context for window in windows[1:])


class Memory(nn.Module):
    """Surer of word 0 the more it has seen: the loss tells how much context each token had."""

    def __init__(self, vocabulary: int, slope: float = 1.0) -> None:
        super().__init__()
        self.vocabulary, self.slope = vocabulary, nn.Parameter(torch.tensor(slope))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        seen = torch.arange(input_ids.shape[1], dtype=torch.float32).expand(input_ids.shape)
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        logits[..., 0] = self.slope * seen  # of the most frequent word, <eos>
        return SimpleNamespace(logits=logits)


def test_the_perplexity_by_hand(tmp_path: Path) -> None:
    """Seven ends of line, so every label is word 0, in a vocabulary of `<eos>` and `<unk>`."""
    task = LanguageModeling(on_words(tmp_path, "a\n"))
    task._vocabulary = SymbolVocabulary([""], words)
    task._tokens["test"] = encoded(task._vocabulary, [""] * 7)
    seen = [0, 1, 2, 3, 2, 3, 2]  # windows 0-4, 2-6, 4-7
    expected = sum(math.log(1 + math.exp(-places)) for places in seen) / 7
    scores = task.evaluate(Memory(2).eval(), "test")
    assert scores == pytest.approx({"loss": expected, "perplexity": math.exp(expected)}, rel=1e-6)


def test_the_perplexity_of_pieces_is_by_word(tmp_path: Path) -> None:
    path, valid, test = (own_file(tmp_path, "the old house\n" * lines, f"{lines}.txt") for lines in (30, 10, 20))
    given = {"data.train": path, "data.valid": valid, "data.test": test, "data.vocabulary": 258}
    task = LanguageModeling(FROM_SCRATCH.replace(**given))
    tokens = task._tokens["test"]
    uniform = Memory(task._vocabulary.size, slope=0.0)
    scores = task.evaluate(uniform.eval(), "test")
    assert len(tokens.ids) > tokens.units == 80
    assert scores["loss"] == pytest.approx(math.log(task._vocabulary.size), rel=1e-6)
    by_word = math.log(task._vocabulary.size) * len(tokens.ids) / 80
    assert math.log(scores["perplexity"]) == pytest.approx(by_word, rel=1e-6)


@pytest.mark.parametrize("recipe", [WIKITEXT_2_VALID, WIKITEXT_2_VALID_ADAPTIVE])
def test_a_model_never_looks_ahead_nor_depends_on_how_windows_are_batched(
    recipe: LanguageModelingRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = load_task(recipe.tiny())
    torch.manual_seed(0)
    model = task.build_model().eval()
    together = task.evaluate(model, "test")
    monkeypatch.setattr("rdrop.experiments.tasks.language_modeling.task.EVALUATION_LOGITS", 1)
    assert task.evaluate(model, "test") == pytest.approx(together, rel=1e-6)
    batch = task.train_batch([0], 0)
    changed = batch | {"input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 10:] = 0
    first, second = task.logits(model, batch), task.logits(model, changed)
    torch.testing.assert_close(first[:, :10], second[:, :10])
    assert not torch.allclose(first[:, 10:], second[:, 10:])


# ----------------------------------------------------------------------------------------------------------- models


def test_the_model_is_gpt2_with_the_rates_and_sizes_asked_for() -> None:
    rates = {"model.dropout": 0.25, "model.embedding_dropout": 0.3, "model.attention_dropout": 0.35}
    model = load_task(WIKITEXT_2_VALID.tiny().replace(**rates, **{"model.layers": 2})).build_model().train()
    config = model.config
    assert isinstance(model, GPT2LMHeadModel)
    assert (config.n_layer, config.n_embd, config.n_head, config.n_inner, config.n_positions) == (2, 32, 2, 64, 16)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.25, 0.3, 0.35}


def test_wikitext_103_is_of_the_published_size() -> None:
    task = load_task(WIKITEXT_103.tiny())
    task._model = WIKITEXT_103.model  # type: ignore[attr-defined]
    with torch.device("meta"):
        config = task.build_model().config  # type: ignore[operator]
    assert (config.n_layer, config.n_embd, config.n_head, config.n_inner) == (12, 768, 12, 3072)


def test_the_adaptive_model_has_all_its_rates() -> None:
    rates = {"model.dropout": 0.25, "model.embedding_dropout": 0.3, "model.attention_dropout": 0.35}
    recipe = WIKITEXT_2_VALID_ADAPTIVE.tiny().replace(**rates, **{"model.softmax_dropout": 0.4})
    task = load_task(recipe)
    model = task.build_model().train()
    assert isinstance(model, AdaptiveLanguageModel)
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.25, 0.3, 0.35, 0.4}
    assert task.divergence == task._clusters.divergence  # type: ignore[attr-defined]


def test_a_pretrained_model_comes_with_its_tokenizer_and_our_rates(tmp_path: Path) -> None:
    folder = save_gpt2(tmp_path)
    text = own_file(tmp_path, "the old house by the river\n" * 30)
    changes = {"model.name": folder, "data.train": text, "data.block_size": 16, "data.context": 8}
    recipe = FINE_TUNING.replace(**changes, **{"model.dropout": 0.2}, updates=4, warmup_steps=1, evaluate_every=4)
    task = load_task(recipe)
    model = task.build_model().train()
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.1, 0.2}
    result = train(recipe.replace(batch_size=4), tmp_path / "run")
    assert set(result["test"]) == {"loss", "perplexity"}
    with pytest.raises(RecipeError, match=r"data\.block_size=64: must be at most 32, the positions of"):
        load_task(recipe.replace(**{"data.block_size": 64}))


def save_gpt2(folder: Path) -> str:
    vocabulary = {"<|endoftext|>": 0, **{symbol: i for i, symbol in enumerate(pre_tokenizers.ByteLevel.alphabet(), 1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    path = folder / "gpt2"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(path)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ).save_pretrained(path)
    return str(path)


def test_a_model_that_reads_what_it_is_to_predict_is_refused_until_it_is_a_decoder(tmp_path: Path) -> None:
    folder = save_gpt2(tmp_path)  # whose tokenizer serves
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    RobertaForMaskedLM(
        RobertaConfig(vocab_size=257, max_position_embeddings=40, bos_token_id=0, eos_token_id=0, **sizes)
    ).save_pretrained(folder)
    text = own_file(tmp_path, "the old house by the river\n" * 30)
    recipe = FINE_TUNING.replace(**{"model.name": folder, "data.train": text, "data.block_size": 16, "data.context": 8})
    recipe = recipe.replace(**{"model.embedding_dropout": None})
    with pytest.raises(RecipeError, match=r"reads the tokens that it is to predict; .* set is_decoder to true in conf"):
        load_task(recipe).build_model()
    config = Path(folder) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"is_decoder": True}))
    assert load_task(recipe).build_model().config.is_decoder


@pytest.mark.parametrize(
    "kind", ["gpt_neo", "mpt", "biogpt", "modernbert-decoder", "gpt2", "llama", "opt", "gemma3_text"]
)
def test_no_rate_of_a_model_is_left_as_it_was(kind: str) -> None:
    config = AutoConfig.for_model(kind)
    present = [key for key, names in RATE_NAMES.items() if any(hasattr(config, name) for name in names)]
    set_rates(config, {key: 0.25 if key in present else None for key in RATE_NAMES}, RATE_NAMES)
    own = {name: value for name, value in config.to_dict().items() if "drop" in name and isinstance(value, float)}
    assert {value for name, value in own.items() if not name.startswith(NOT_OURS)} == {0.25}


def test_a_model_that_reads_images_too_is_trained_by_the_part_that_writes(tmp_path: Path) -> None:
    folder = save_gpt2(tmp_path)  # whose tokenizer serves
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 257, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32}
    images = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=images, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    rates = {"model.dropout": None, "model.embedding_dropout": None, "model.attention_dropout": 0.2}
    text_file = own_file(tmp_path, "the old house by the river\n" * 30)
    changes = {"model.name": folder, "data.train": text_file, "data.block_size": 16, "data.context": 8}
    recipe = FINE_TUNING.replace(**changes, **rates)
    model = load_task(recipe).build_model().train()
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.2}
    with pytest.raises(RecipeError, match=r"data\.block_size=64: must be at most 32, the positions of"):
        load_task(recipe.replace(**{"data.block_size": 64}))


LINES = ["old house", "", "house"]


def test_the_end_of_a_line_that_a_tokenizer_drops_is_no_unit_of_the_perplexity(tmp_path: Path) -> None:
    vocabulary = {token: number for number, token in enumerate(("<eos>", "<unk>", "A", "old", "house", "\n"))}

    def units(split: Any) -> int:
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = split
        own = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
        pieces = pretrained_pieces(own, 6, LINES)
        ids = pieces.encode(LINES)
        assert pieces.count_units(LINES, ids) == sum(map(len, ids))
        return pieces.count_units(LINES, ids)

    assert units(pre_tokenizers.WhitespaceSplit()) == 3
    kept = [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    assert units(pre_tokenizers.Sequence(kept)) == 6


NOT_OURS = ("layerdrop", "classifier", "summary", "activation")
"""Rates that are always 0, or of parts that a language model does not have."""


def test_a_rate_that_the_model_does_not_have_is_refused() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(RecipeError, match=r"model\.dropout=0\.1: must be null: llama has no such rate"):
        set_rates(config, {"dropout": 0.1, "embedding_dropout": None, "attention_dropout": 0.1}, RATE_NAMES)
    with pytest.raises(RecipeError, match=r"model\.attention_dropout=null: must be a rate: llama has one"):
        set_rates(config, {"dropout": None, "embedding_dropout": None, "attention_dropout": None}, RATE_NAMES)
    set_rates(config, {"dropout": None, "embedding_dropout": None, "attention_dropout": 0.3}, RATE_NAMES)
    assert LlamaForCausalLM(config).model.layers[0].self_attn.attention_dropout == 0.3


def test_a_model_that_is_not_there_is_an_error_of_its_name(tmp_path: Path) -> None:
    text = own_file(tmp_path, "a b\n" * 20)
    recipe = FINE_TUNING.replace(**{"data.train": text, "model.name": str(tmp_path / "none")})
    with pytest.raises(RecipeError, match=r"model\.name=.*cannot be loaded"):
        load_task(recipe)


# ---------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_trains_in_its_tiny_form_and_the_loss_falls(
    recipe: LanguageModelingRecipe, tmp_path: Path
) -> None:
    assert recipe.method.alpha == 1
    result = train(recipe.tiny(), tmp_path)
    losses = [row["task_loss"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "train"]
    assert losses[-1] < 0.9 * losses[0]
    assert (result["metric"], result["metrics"]["perplexity"]["higher_is_better"]) == ("perplexity", False)
    assert set(result["valid"]) == {"loss", "perplexity"}


def test_the_methods_variants_run_on_the_adaptive_model(tmp_path: Path) -> None:
    tiny = WIKITEXT_2_VALID_ADAPTIVE.tiny().replace(updates=2, warmup_steps=1, evaluate_every=2)
    for name, changes in {
        "plain": {"alpha": 0.0},
        "three passes": {"passes": 3},
        "two rates": {"dropout": [0.1, 0.3]},
        "cutoff": {"cutoff": "unknown", "cutoff_ratio": 0.1},
        "accumulation": {"accumulation": 2},
        "tokens": {"batch_size": None, "batch_tokens": 64},
    }.items():
        train(tiny.replace(**changes), tmp_path / name)


def test_the_best_checkpoint_is_the_one_of_the_lowest_perplexity(tmp_path: Path) -> None:
    result = train(TINYSHAKESPEARE.tiny(), tmp_path)
    rows = {row["step"]: row["perplexity"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "valid"}
    assert result["best_step"] == min(rows, key=rows.__getitem__)


def test_published_perplexities_are_those_of_the_paper_s_table_5() -> None:
    assert set(PUBLISHED) <= {recipe.name for recipe in RECIPES}
    assert all(not row.higher_is_better for rows in PUBLISHED.values() for row in rows)
    figures = {(row.model, row.split): (row.baseline, row.rdrop) for rows in PUBLISHED.values() for row in rows}
    assert figures[("Adaptive Input", "test")] == (18.87, 18.07)
    assert figures[("Transformer", "valid")] == (25.76, 23.97)


def test_wikitext_103_has_the_papers_blocks() -> None:
    by_name = {recipe.name: recipe for recipe in RECIPES}
    plain, adaptive = by_name["wikitext-103"], by_name["wikitext-103-adaptive"]
    assert (plain.batch_size, plain.data.block_size) == (384, 512)
    assert (adaptive.updates, adaptive.data.block_size) == (320_000, 3_072)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (WIKITEXT_103, {"data.tokens": None}, r"data\.tokens=null: must be given for a model from scratch"),
        (
            FINE_TUNING,
            {"data.tokens": "words"},
            r'data\.tokens="words": must be null: openai-community/gpt2 has its own',
        ),
        (FINE_TUNING, {"model.layers": 2}, r"model\.layers=2: must be null"),
        (WIKITEXT_103, {"model.layers": None}, r"model\.layers=null: must be given"),
        (WIKITEXT_103, {"model.dropout": None}, r"model\.dropout=null: must be a rate"),
        (WIKITEXT_103, {"model.heads": 5}, r"model\.hidden_size=768: must be divisible by model\.heads \(=5\)"),
        (WIKITEXT_103, {"data.min_count": None}, r"data\.min_count=null: must be given for words"),
        (WIKITEXT_103, {"data.vocabulary": 300}, r"data\.vocabulary=300: must be null with data\.tokens \(=words\)"),
        (
            WIKITEXT_103,
            {"data.tokens": "bpe", "data.min_count": None, "data.vocabulary": 256},
            r"data\.vocabulary=256: must be greater than or equal to 257",
        ),
        (WIKITEXT_103, {"data.context": 512}, r"data\.context=512: must be below data\.block_size \(=512\)"),
        (WIKITEXT_103, {"data.lines": [1]}, r"data\.lines=\[\.\.\.\]: must have 3 numbers"),
        (WIKITEXT_103, {"model.adaptive_factor": 4}, r"model\.adaptive_factor=4: must be null without"),
        (WIKITEXT_103_ADAPTIVE, {"model.adaptive_tied": None}, r"model\.adaptive_tied=null: must be given"),
        (WIKITEXT_103_ADAPTIVE, {"model.adaptive_cutoffs": [5, 4]}, r"must be rising numbers"),
        (WIKITEXT_103_ADAPTIVE, {"fused": True}, r"fused=true: must be false with model\.adaptive_cutoffs"),
        (WIKITEXT_103_ADAPTIVE, {"label_smoothing": 0.1}, r"label_smoothing=0\.1: must be 0"),
        (
            WIKITEXT_103_ADAPTIVE,
            {"cutoff": "token", "cutoff_ratio": 0.1},
            r'cutoff="token": must be null or "unknown"',
        ),
        (
            WIKITEXT_103_ADAPTIVE,
            {"data.tokens": "characters", "data.min_count": None},
            r"model\.adaptive_cutoffs=\[\.\.\.\]: must be null unless data\.tokens is words",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(
    recipe: LanguageModelingRecipe, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.replace(**changes)


def test_cutoffs_beyond_the_vocabulary_are_refused() -> None:
    recipe = WIKITEXT_2_VALID_ADAPTIVE.tiny().replace(**{"model.adaptive_cutoffs": [4, 16]})
    with pytest.raises(RecipeError, match=r"must end below the number of words in the vocabulary \(=16\)"):
        load_task(recipe)
    with pytest.raises(RecipeError, match=r"leaves no width for cluster 2"):
        load_task(WIKITEXT_2_VALID_ADAPTIVE.tiny().replace(**{"model.adaptive_factor": 8}))

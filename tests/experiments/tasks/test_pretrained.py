"""Pre-trained models that texts would not reach are refused: no tokenizer, another one, too few rows or positions."""

import json
from collections.abc import Callable, Iterable
from logging import StreamHandler
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)
from transformers.utils import logging

from rdrop.experiments.launch import cli
from rdrop.experiments.recipe import Recipe
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.recipes import RECIPES
from rdrop.experiments.tasks.pretrained import most_tokens
from rdrop.experiments.tasks.task import load_task

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
WORDS = ("good", "bad", "film", "book", "very", "a", "the", "is", "was", "it")
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
SHORT = ["tiny=true", "data.tiny=false", "updates=2", "warmup_updates=1", "evaluate_every=2"]

Refusal = Callable[[str, str], None]


def tokenizer(words: Iterable[str] = WORDS, **options: Any) -> PreTrainedTokenizerFast:
    """Words apart by spaces, between `<s>` and `</s>`."""
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys((*SPECIAL, *words)))}
    words_only = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    frame = [(token, vocabulary[token]) for token in ("<s>", "</s>")]
    words_only.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=frame)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words_only, **names, **options)  # type: ignore[no-untyped-call]


def bert(rows: int = 14, positions: int = 16, **options: Any) -> BertModel:
    return BertModel(BertConfig(vocab_size=rows, max_position_embeddings=positions, **SIZES, **options))


def gpt2(rows: int = 14) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=16, n_embd=16, n_layer=1, n_head=2, eos_token_id=2))


def bart(rows: int = 14) -> BartForConditionalGeneration:
    sizes = {
        f"{half}_{name}": 1 for half in ("encoder", "decoder") for name in ("layers", "attention_heads", "ffn_dim")
    }
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=rows, d_model=16, max_position_embeddings=32, **sizes, **ids)  # type: ignore[arg-type]
    return BartForConditionalGeneration(config)


def saved(folder: Path, model: Any, own: PreTrainedTokenizerFast | None) -> str:
    model.save_pretrained(folder)
    if own is not None:
        own.save_pretrained(folder)
    return str(folder)


def texts(size: int = 20) -> list[str]:
    return [" ".join(WORDS[(row + step) % len(WORDS)] for step in range(3 + row % 2)) for row in range(size)]


def recipe_of(task: str, folder: Path, model: str, lines: list[str] | None = None) -> Recipe:
    lines = lines or texts()
    train = folder / ("train.txt" if task == "language-modeling" else "train.jsonl")
    if task == "language-modeling":
        train.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        changes: dict[str, object] = {"data.block_size": 8, "data.context": 2}
    else:
        rows = (
            {"text": line, "label": str(row % 2), "document": line, "summary": line} for row, line in enumerate(lines)
        )
        train.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        changes = {"data.max_length": 16}
        if task == "summarization":
            changes = {"data.document_tokens": 16, "data.summary_tokens": 8, "decoding.max_length": 8}
    return RECIPES[task].replace(**changes, **{"data.train": str(train), "model.name": model})


MODELS: dict[str, Callable[..., Any]] = {"text-classification": bert, "language-modeling": gpt2, "summarization": bart}
EACH = pytest.mark.parametrize("task", MODELS)


@EACH
def test_a_model_with_its_own_tokenizer_is_taken(task: str, tmp_path: Path) -> None:
    """Also where its config.json asks for tuples, or for feed-forward layers in parts, into which few texts divide."""
    name = saved(tmp_path / "model", MODELS[task](), tokenizer())
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": False, "chunk_size_feed_forward": 3}))
    loaded = load_task(recipe_of(task, tmp_path, name))
    model = loaded.build_model()
    for index in (0, 1):
        loaded.logits(model, loaded.train_batch([index], 0))


@pytest.mark.parametrize(("config", "side"), [({"pad_token_id": 1}, "right"), ({}, "left")])
def test_a_classifier_whose_padding_changes_a_text_is_refused_and_the_remedy_mends_it(
    tmp_path: Path, config: dict[str, int], side: str
) -> None:
    torch.manual_seed(0)
    shape = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 1.0}
    model = GPT2ForSequenceClassification(GPT2Config(vocab_size=14, **({"pad_token_id": 0} | config), **shape))
    own = tokenizer(padding_side=side)
    recipe = recipe_of("text-classification", tmp_path, saved(tmp_path / "model", model, own))
    with pytest.raises(RecipeError, match=r"depend on the padding beside it: config\.json has .* a copy of the folder"):
        load_task(recipe).build_model()
    for file, key, value in (("config.json", "pad_token_id", 0), ("tokenizer_config.json", "padding_side", "right")):
        path = tmp_path / "model" / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    task = load_task(recipe)
    task.build_model()
    assert "padding" not in task.notes


def test_a_classifier_with_attention_dropout_alone_is_trained_with_it(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=14, pad_token_id=0, max_position_embeddings=16, **SIZES)
    name = saved(tmp_path / "model", LlamaForSequenceClassification(config), tokenizer())
    recipe = recipe_of("text-classification", tmp_path, name)
    with pytest.raises(RecipeError, match=r"^model\.dropout=0\.1: must be null: llama has no such rate"):
        load_task(recipe).build_model()
    model: Any = load_task(recipe.replace(**{"model.dropout": None})).build_model()
    assert model.model.layers[0].self_attn.attention_dropout == recipe.model.attention_dropout > 0


@EACH
def test_a_folder_without_tokenizer_files_is_refused(task: str, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", MODELS[task](rows=1000), None)
    with pytest.raises(RecipeError, match=r"^model\.name=.*: (has no tokenizer; put its files|cannot be loaded)"):
        load_task(recipe_of(task, tmp_path, name))


@EACH
def test_the_tokenizer_of_a_model_with_a_larger_vocabulary_is_refused(task: str, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", MODELS[task](rows=14 + 129), tokenizer())
    with pytest.raises(RecipeError, match=r"^model\.name=.*: its tokenizer has 14 entries and its embedding 143 rows"):
        load_task(recipe_of(task, tmp_path, name))
    load_task(recipe_of(task, tmp_path, saved(tmp_path / "round", MODELS[task](rows=128), tokenizer())))


BROKEN: dict[str, tuple[tuple[str, object], ...]] = {
    "text-classification": (("num_attention_heads", -1), ("num_hidden_layers", "x"), ("vocab_size", 5)),
    "language-modeling": (("n_head", -1), ("n_embd", "x"), ("pad_token_id", 10**30)),
    "summarization": (
        *(("decoder_attention_heads", -1), ("encoder_attention_heads", -1), ("decoder_layers", -1), ("d_model", [8])),
        *(("decoder_start_token_id", value) for value in (-1, 10**30)),
        *(("eos_token_id", value) for value in (None, -1, 0, 10**30, [2, 8])),
        *(("pad_token_id", value) for value in (None, -1)),
        ("is_encoder_decoder", None),
    ),
}
"""Values of a config.json, some of which only a forward or a search stumbles on."""
REFUSED = (
    r"(cannot be loaded \(.*\); give|its file has more layers"
    r"|its file has no weights of the shape that config\.json says for 1 tensors"
    r"|its config\.json has eos_token_id .* writes an empty summary as \[1, 2\]; put the number)"
)


@EACH
def test_a_configuration_with_which_nothing_can_be_computed_is_one_line_about_the_model(
    task: str, tmp_path: Path
) -> None:
    name = saved(tmp_path / "model", MODELS[task](), tokenizer())
    path, recipe = tmp_path / "model/config.json", recipe_of(task, tmp_path, name)
    good = json.loads(path.read_text())
    for key, value in BROKEN[task]:
        path.write_text(json.dumps(good | {key: value}))
        with pytest.raises(RecipeError, match=rf"^model\.name=.*: {REFUSED}") as found:
            load_task(recipe).build_model()
        assert "\n" not in str(found.value), key


@EACH
def test_weights_that_are_not_finite_are_refused(task: str, tmp_path: Path) -> None:
    model = MODELS[task]()
    with torch.no_grad():
        next(model.parameters())[3, 0] = torch.nan
    recipe = recipe_of(task, tmp_path, saved(tmp_path / "model", model, tokenizer()))
    with pytest.raises(RecipeError, match=r"^model\.name=.*its weights are NaN or infinite in "):
        load_task(recipe).build_model()


@EACH
def test_ids_beyond_the_embedding_are_refused(task: str, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", MODELS[task](rows=10), tokenizer())
    loaded = load_task(recipe_of(task, tmp_path, name))
    with pytest.raises(RecipeError, match=r"^model\.name=.*: its tokenizer has ids up to 13.* embedding has 10 rows"):
        loaded.build_model()


@EACH
def test_a_token_that_was_added_without_a_row_is_refused(task: str, tmp_path: Path) -> None:
    """It stands in no text: it fills a batch, or begins the text."""
    model, own = MODELS[task](), tokenizer()
    own.add_special_tokens({"bos_token" if task == "language-modeling" else "pad_token": "<new>"})
    recipe = recipe_of(task, tmp_path, saved(tmp_path / "model", model, own))
    with pytest.raises(RecipeError, match=r"^model\.name=.*ids up to 14, .* has 14 rows; .* resize_token_embeddings"):
        load_task(recipe).build_model()
    model.resize_token_embeddings(len(own))
    saved(tmp_path / "model", model, own)
    load_task(recipe).build_model()


@pytest.mark.parametrize("classes", [2, 5])
def test_the_output_layer_is_new_whatever_was_saved(classes: int, tmp_path: Path) -> None:
    before = RobertaForSequenceClassification(
        RobertaConfig(vocab_size=14, max_position_embeddings=18, pad_token_id=0, num_labels=classes, **SIZES)
    )
    nn.init.ones_(before.classifier.out_proj.bias)
    name = saved(tmp_path / "model", before, tokenizer())
    task = load_task(recipe_of("text-classification", tmp_path, name))
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model: Any = task.build_model()
        assert torch.equal(model.classifier.dense.weight, before.classifier.dense.weight)
        assert not model.classifier.out_proj.bias.any()
        drawn.append(model.classifier.out_proj.weight)
    assert drawn[0].shape == (2, 16)
    assert 0.01 < drawn[0].std() < 0.03
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], before.classifier.out_proj.weight[:2])


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    name = saved(tmp_path / "model", bert(), tokenizer())
    bert(positions=32).config.save_pretrained(name)
    with pytest.raises(
        RecipeError, match=r"^model\.name=.*: its file has no weights of the shape .* for 1 tensors, e\.g\. bert\.emb"
    ):
        load_task(recipe_of("text-classification", tmp_path, name)).build_model()


LAYERS = {
    "text-classification": "num_hidden_layers",
    "language-modeling": "n_layer",
    "summarization": "decoder_layers",
}


@EACH
@pytest.mark.parametrize(("layers", "problem"), [(0, "more layers"), (2, "no weights of the shape")])
def test_a_configuration_of_fewer_or_more_layers_than_the_file_has_is_refused(
    task: str, layers: int, problem: str, tmp_path: Path
) -> None:
    own = MODELS[task]()
    setattr(own.config, LAYERS[task], 1)
    name = saved(tmp_path / "model", own, tokenizer())
    recipe = recipe_of(task, tmp_path, name)
    load_task(recipe).build_model()
    setattr(own.config, LAYERS[task], layers)
    own.config.save_pretrained(name)
    with pytest.raises(RecipeError, match=rf"^model\.name=.*: its file has {problem} .*get both files again"):
        load_task(recipe).build_model()


def test_a_smaller_model_that_is_saved_is_taken(tmp_path: Path) -> None:
    """As the message says that the layers of the file are more."""
    name = saved(tmp_path / "model", bert(), tokenizer())
    config = BertConfig.from_pretrained(name)
    config.num_hidden_layers = 0
    BertModel.from_pretrained(name, config=config).save_pretrained(name)
    load_task(recipe_of("text-classification", tmp_path, name)).build_model()


@pytest.mark.parametrize("kind", [BertForPreTraining, BertForMaskedLM, BertForTokenClassification])
def test_a_head_and_a_pooler_that_the_task_does_not_use_may_be_in_the_file(kind: Any, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", kind(bert().config), tokenizer())
    load_task(recipe_of("text-classification", tmp_path, name)).build_model()


@EACH
def test_texts_most_of_whose_tokens_are_unknown_are_refused(task: str, tmp_path: Path) -> None:
    name = saved(tmp_path / "model", MODELS[task](), tokenizer())
    half = [f"{WORDS[row % 10]} {row} bad {row + 1}" for row in range(20)]
    load_task(recipe_of(task, tmp_path, name, half))
    most = [f"good {row} {row + 1}" for row in range(20)]
    with pytest.raises(RecipeError, match=r"^model\.name=.*: its tokenizer loses the texts? of .* tokens are unknown"):
        load_task(recipe_of(task, tmp_path, name, most))


@pytest.mark.parametrize("task", ["text-classification", "summarization"])
def test_texts_that_become_the_same_tokens_are_refused(task: str, tmp_path: Path) -> None:
    deaf = tokenizer()
    longest_first = sorted(WORDS, key=len, reverse=True)
    deaf.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(word, "") for word in longest_first])
    name = saved(tmp_path / "model", MODELS[task](), deaf)
    with pytest.raises(
        RecipeError,
        match=r"^model\.name=.*: its tokenizer loses the texts of train: 10 of 10 different ones become the ",
    ):
        load_task(recipe_of(task, tmp_path, name))
    own = saved(tmp_path / "own", MODELS[task](), tokenizer())
    mostly = [f"{WORDS[0]} {WORDS[0] if row else WORDS[1]} {WORDS[row % 10]} {WORDS[row // 10]}" for row in range(20)]
    key = "data.max_length" if task == "text-classification" else "data.document_tokens"
    for texts, length, what in (
        (None, 2, "is too little for the texts of train: 10 of 10 different ones become the same 2"),
        (None, 1, "leaves no room for the texts of train beside the special tokens"),
        (mostly, 4, r"is too little for the texts of \w+: \d+ of \d+ different ones become the same"),
    ):
        with pytest.raises(RecipeError, match=rf"^{key}={length}: {what}"):
            load_task(recipe_of(task, tmp_path, own, texts).replace(**{key: length}))


@pytest.mark.parametrize(
    ("model", "most"),
    [
        (lambda: bert(positions=16), 16),
        (lambda: RobertaModel(RobertaConfig(vocab_size=14, max_position_embeddings=18, pad_token_id=0, **SIZES)), 17),
    ],
)
def test_texts_longer_than_the_positions_are_refused_with_their_number(
    model: Callable[[], Any], most: int, tmp_path: Path
) -> None:
    name = saved(tmp_path / "model", model(), tokenizer())  # whose tokenizer knows no limit
    long = [" ".join(WORDS[(row + step) % 10] for step in range(30)) for row in range(20)]
    recipe = recipe_of("text-classification", tmp_path, name, long)
    with pytest.raises(
        RecipeError, match=rf"^data\.max_length=32: must be at most {most}, .*longest text has 32 tokens"
    ):
        load_task(recipe.replace(**{"data.max_length": 32})).build_model()
    load_task(recipe.replace(**{"data.max_length": most})).build_model()
    load_task(recipe_of("text-classification", tmp_path, name).replace(**{"data.max_length": 32})).build_model()


def test_token_types_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    names = ["input_ids", "token_type_ids", "attention_mask"]
    framed = tokenizer(model_input_names=names)
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    name = saved(tmp_path / "model", bert(type_vocab_size=1), framed)
    recipe = recipe_of("text-classification", tmp_path, name)
    load_task(recipe).build_model()
    with pytest.raises(RecipeError, match=r"^model\.name=.*: its tokenizer gives token types up to 1, and it knows 1"):
        load_task(recipe.replace(**{"data.text2_column": "summary"})).build_model()


@pytest.mark.parametrize("command", ["train", "check"])
def test_the_commands_end_with_2_and_name_the_key(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = saved(tmp_path / "model", bert(rows=1000), None)
    train = str(recipe_of("text-classification", tmp_path, name).value("data.train"))
    own = ["--train", train, "--model", name, *(["--runs", str(tmp_path / "runs")] if command == "train" else [])]
    assert cli.run([command, "text-classification", *own]) == 2
    assert "rdrop: model.name=" in capsys.readouterr().err.splitlines()[-1]


def test_check_prints_its_report_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = recipe_of("text-classification", tmp_path, saved(tmp_path / "model", bert(), tokenizer()))
    own = ["--train", recipe.value("data.train"), "--model", recipe.value("model.name")]
    said: list[str] = []
    handler = StreamHandler(SimpleNamespace(write=said.append, flush=lambda: None))
    logging.set_verbosity_warning()
    logging.enable_progress_bar()
    logging.add_handler(handler)
    capsys.readouterr()
    try:
        assert cli.run(["check", "text-classification", *own, "--json"]) == 0
    finally:
        logging.remove_handler(handler)
    shown = capsys.readouterr()
    assert json.loads(shown.out)["model"] == "BertForSequenceClassification"
    assert said == []
    assert shown.err == ""


def test_the_most_tokens_that_are_read_are_found_by_bisecting() -> None:
    asked = []

    def read(size: int) -> None:
        asked.append(size)
        if size > 512:
            raise IndexError(size)

    model = torch.nn.Linear(1, 1).train()
    assert most_tokens(model, read, 1000) == 512
    assert len(asked) < 15
    assert model.training
    assert most_tokens(model, read, 300) == 300

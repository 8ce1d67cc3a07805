"""Summarization: what is read, what the model sees, how summaries are written and scored."""

import csv
import json
import lzma
import random
import unicodedata
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rouge_score.rouge_scorer import RougeScorer
from tests.experiments.tasks.test_files import MUTATED_FILES, mutated, outcome, table, write
from tests.real_data import real_data
from torch import Tensor, nn

from rdrop import repeat_batch
from rdrop.dropout import dropout_sources
from rdrop.experiments.recipe.published import Published
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.pretrained import set_rates
from rdrop.experiments.tasks.summarization.data import Examples, load_examples
from rdrop.experiments.tasks.summarization.models import RATE_NAMES, learned_tokenizer, shift_right
from rdrop.experiments.tasks.summarization.recipes import (
    AESLC,
    CNN_DAILYMAIL,
    PUBLISHED,
    RECIPES,
    SUMMARIZATION,
    SummarizationRecipe,
)
from rdrop.experiments.tasks.summarization.scores import KINDS, WordsOfAnyScript, rouge
from rdrop.experiments.tasks.summarization.task import Summarization
from rdrop.experiments.tasks.task import load_task
from rdrop.experiments.training.trainer import train

TINY = AESLC.tiny()
Row = Mapping[str, str]


@pytest.fixture(scope="module")
def aeslc() -> SummarizationRecipe:
    return AESLC.replace(**{"data.folder": str(real_data("aeslc"))})


@pytest.fixture(scope="module")
def aeslc_examples(aeslc: SummarizationRecipe) -> Examples:
    return load_examples(aeslc.replace(**{"data.reference_columns": ["ann0", "ann1", "ann2"]}).data)


@pytest.fixture(scope="module")
def tiny() -> Summarization:
    return Summarization(TINY)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows(count: int, start: int = 0) -> list[Row]:
    return [{"document": f"Text {i} of\nthe file.", "summary": f"text {i}"} for i in range(start, start + count)]


def own(tmp_path: Path, **changes: object) -> SummarizationRecipe:
    """The tiny recipe for own files, with the sources of the tests in place of synthetic examples."""
    changes = {"data.tiny": False, "data.train": str(write_rows(tmp_path / "train.jsonl", rows(20)))} | changes
    columns = {"data.document_column": "document", "data.summary_column": "summary"}
    return SUMMARIZATION.tiny().replace(**(columns | changes))


# ------------------------------------------------------------------------------------------------------ the data


def test_aeslc_has_the_examples_of_its_manifest_first_and_last_right(aeslc_examples: Examples) -> None:
    assert [len(aeslc_examples[split]) for split in ("train", "valid", "test")] == [14_436, 1_960, 1_906]
    for split, file in (("train", "train"), ("valid", "dev"), ("test", "test")):
        lines = lzma.decompress((real_data("aeslc") / f"{file}.jsonl.xz").read_bytes()).decode().split("\n")
        for example, line in ((aeslc_examples[split][0], lines[0]), (aeslc_examples[split][-1], lines[-2])):
            row = json.loads(line)
            assert (example.document, example.summaries[0]) == (row["document"].strip(), row["subject"].strip())


def test_more_references_are_columns_of_the_test_split_only(aeslc_examples: Examples) -> None:
    first = aeslc_examples["test"][0].summaries
    assert (len(first), first[0], first[3]) == (4, "Huntley/question", "need copy of title policy")
    assert {len(example.summaries) for split in ("train", "valid") for example in aeslc_examples[split]} == {1}


def test_a_file_cut_short_is_refused_with_both_counts(aeslc: SummarizationRecipe, tmp_path: Path) -> None:
    lines = lzma.decompress((real_data("aeslc") / "train.jsonl.xz").read_bytes()).decode().split("\n")
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:1000]), encoding="utf-8")
    for split in ("dev", "test"):
        (tmp_path / f"{split}.jsonl.xz").write_bytes((real_data("aeslc") / f"{split}.jsonl.xz").read_bytes())
    data = aeslc.replace(**{"data.folder": str(tmp_path)}).data
    with pytest.raises(DataError, match=r"train\.jsonl: has 1000 examples and must have 14436"):
        load_examples(data)
    assert len(load_examples(data.model_copy(update={"counts": None}))["train"]) == 1000


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"document": "a b", "subject": " "}', "no text in the column 'subject'"),
        ('{"document": "a b", "subject": "nan"}', "subject is missing"),
        ('{"document": "#N/A", "subject": "a"}', "document is missing"),
        ('{"document": "", "subject": "a"}', "no text in the column 'document'"),
        ('{"document": "a b", "subjct": "a"}', "has no column 'subject' \\(the nearest is 'subjct'\\)"),
        ('{"document": "a b", "subject": 1.5', "not JSON"),
        ('{"document": "a b", "subject": null}', "must be text"),
        ("", "not JSON"),
    ],
)
def test_a_bad_row_is_refused_by_file_and_line(tmp_path: Path, broken: str, message: str) -> None:
    for split in ("train", "dev", "test"):
        good = f'{{"document": "a {split}", "subject": "a"}}'
        lines = [good, good, broken if split == "dev" else good, good]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = AESLC.replace(**{"data.folder": str(tmp_path), "data.counts": None}).data
    with pytest.raises(DataError, match=rf"dev\.jsonl:3: .*{message}"):
        load_examples(data)


def test_a_list_in_a_cell_is_read_as_the_list_that_it_is(tmp_path: Path) -> None:
    def loaded(*summaries: str) -> list[tuple[str, ...]]:
        rows = [[f"document {row}", summaries[row % len(summaries)]] for row in range(20)]
        with (tmp_path / "a.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["document", "summary"], *rows])
        found = load_examples(SUMMARIZATION.replace(**{"data.train": str(tmp_path / "a.csv")}).data)
        return sorted({example.summaries for examples in found.values() for example in examples})

    assert loaded(str(["it's good", "fine"]), '["née", "b"]') == [("it's good", "fine"), ("née", "b")]
    for text in ("[sic] a good film", "['quoted] and 'more']", "[1, 2]"):
        assert loaded(text) == [(text,)]
    for text in ("['movie 0 good' 'long movie 0']", '["one", 2]', '["a summary", null]', "['a', 1, 'b']"):
        with pytest.raises(DataError, match=r"a\.csv:2: summary is a list that cannot be read for certain"):
            loaded(text)


def test_splits_without_a_file_are_held_out_as_the_split_seed_draws(tmp_path: Path) -> None:
    first = load_examples(own(tmp_path).data)
    assert {split: len(examples) for split, examples in first.items()} == {"train": 16, "valid": 2, "test": 2}
    assert len({example.document for examples in first.values() for example in examples}) == 20
    assert load_examples(own(tmp_path, seed=5).data) == first
    assert load_examples(own(tmp_path, **{"data.split_seed": 1}).data) != first


def test_files_of_their_own_leave_the_training_file_whole(tmp_path: Path) -> None:
    valid = str(write_rows(tmp_path / "valid.jsonl", rows(3, start=100)))
    test = str(write_rows(tmp_path / "test.jsonl", rows(4, start=200)))
    sizes = []
    for changes in ({"data.valid": valid, "data.test": test}, {"data.valid": valid}):
        sizes.append({split: len(examples) for split, examples in load_examples(own(tmp_path, **changes).data).items()})
    assert sizes == [{"train": 20, "valid": 3, "test": 4}, {"train": 18, "valid": 3, "test": 2}]


def test_csv_with_newlines_and_tsv_are_read(tmp_path: Path) -> None:
    records = "".join(f'"Text {i}, with\na newline","text {i}\nsecond"\n' for i in range(10))
    (tmp_path / "a.csv").write_text("document,summary\n" + records, encoding="utf-8")
    (tmp_path / "b.tsv").write_text("summary\tdocument\n" + "s\td d\n" * 10, encoding="utf-8")
    data = own(tmp_path, **{"data.train": str(tmp_path / "a.csv"), "data.valid": str(tmp_path / "b.tsv")}).data
    examples = load_examples(data)
    assert examples["train"][0].document.endswith(", with\na newline")
    assert examples["train"][0].summaries[0].endswith("\nsecond")
    assert examples["valid"][0].document == "d d"


def test_mutated_own_files_are_loaded_or_refused_in_one_line(tmp_path: Path) -> None:
    chance = random.Random(4)
    refused = 0
    for index in range(MUTATED_FILES):
        kind, suffix = chance.choice([".csv", ".tsv", ".jsonl"]), chance.choice(["", ".gz", ".xz"])
        path = tmp_path / f"{index}{kind}{suffix}"
        write(path, mutated(table(kind, rows=chance.randrange(1, 30)), chance))
        columns = {"data.document_column": "text", "data.summary_column": "label"}
        examples, problem = outcome(load_examples, SUMMARIZATION.replace(**{"data.train": str(path), **columns}).data)
        refused += examples is None
        assert problem is None or "\n" not in problem
        if examples is not None:
            assert all(example.document.strip() and example.summaries[0].strip() for example in examples["train"])
            assert len(examples["valid"]) == len(examples["test"]) >= 1
    assert 0 < refused < MUTATED_FILES


def test_no_source_is_an_error_that_says_what_to_give() -> None:
    with pytest.raises(DataError, match=r"set data\.train .* data\.folder .* data\.hub"):
        load_examples(SUMMARIZATION.data)


def test_the_hub_is_read_by_datasets_from_the_layout_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the files of the hub's data set, as `hf download` leaves it."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub = tmp_path / "cnn_dailymail"
    for split, count in (("train", 3), ("validation", 2), ("test", 1)):
        columns = {"article": [f"Story {i}." for i in range(count)], "highlights": ["One .\nTwo ."] * count}
        path = hub / "3.0.0" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns | {"id": list("abc")[:count]}).to_parquet(str(path))
    data_files = "\n".join(
        f"  - split: {split}\n    path: 3.0.0/{split}-*" for split in ("train", "validation", "test")
    )
    card = f"---\nconfigs:\n- config_name: 3.0.0\n  data_files:\n{data_files}\n---\n"
    (hub / "README.md").write_text(card, encoding="utf-8")
    data = CNN_DAILYMAIL.replace(**{"data.hub": str(hub), "data.counts": [3, 2, 1]}).data
    examples = load_examples(data)
    assert [example.document for example in examples["train"]] == ["Story 0.", "Story 1.", "Story 2."]
    assert examples["valid"][1].summaries == ("One .\nTwo .",)
    with pytest.raises(DataError, match=r"split train: has 3 examples and must have 287113"):
        load_examples(data.model_copy(update={"counts": CNN_DAILYMAIL.data.counts}))
    with pytest.raises(DataError, match=r"split train: has no column 'articles' \(the nearest is 'article'\)"):
        load_examples(data.model_copy(update={"document_column": "articles"}))


# ----------------------------------------------------------------------------------------------- what the model sees


def test_the_decoder_reads_each_token_before_it_has_to_write_it() -> None:
    labels = torch.tensor([[5, 6, 2], [7, 2, -100]])
    assert shift_right(labels, start=0, pad=1).tolist() == [[0, 5, 6], [0, 7, 2]]


def test_a_batch_is_padded_masked_and_labeled(tmp_path: Path) -> None:
    pair = [{"document": "a", "summary": "b"}, {"document": "a a a", "summary": "b b"}]
    parts = {"pair.jsonl": pair, "a.jsonl": pair[:1], "b.jsonl": pair[1:]}
    path, valid, test = (str(write_rows(tmp_path / name, rows)) for name, rows in parts.items())
    task = Summarization(own(tmp_path, **{"data.train": path, "data.valid": valid, "data.test": test}))
    batch = task.train_batch([0, 1], epoch=0)
    start, pad, end = 0, 1, 2
    a, b = batch["input_ids"][0, 0].item(), batch["labels"][0, 0].item()
    assert batch["input_ids"].tolist() == [[a, end, pad, pad], [a, a, a, end]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[b, end, -100], [b, b, end]]
    assert batch["decoder_input_ids"].tolist() == [[start, b, end], [start, b, b]]
    assert task.train_lengths().tolist() == [4, 4] or task.train_lengths().tolist() == [2, 4]
    assert {start, pad, end} <= task.special_ids()
    assert task.unknown_id() == 3


def test_padding_changes_no_logit_and_a_repeated_batch_is_the_batch_twice(tiny: Summarization) -> None:
    torch.manual_seed(0)
    model = tiny.build_model().eval()
    short = min(range(tiny.train_size()), key=lambda index: tiny.train_lengths()[index])
    long = max(range(tiny.train_size()), key=lambda index: tiny.train_lengths()[index])
    alone = tiny.logits(model, tiny.train_batch([short], epoch=0))
    batch = tiny.train_batch([short, long], epoch=0)
    together = tiny.logits(model, batch)
    torch.testing.assert_close(together[0, : alone.shape[1]], alone[0])
    twice = tiny.logits(model, repeat_batch(batch))
    torch.testing.assert_close(twice, torch.cat([together, together]))


def test_long_documents_and_summaries_are_cut_and_keep_their_end(tmp_path: Path) -> None:
    changes = {"data.document_tokens": 4, "data.summary_tokens": 3, "decoding.max_length": 3}
    long = [{"document": f"{i} text of the file", "summary": f"{i} text of it"} for i in range(20)]
    path = write_rows(tmp_path / "long.jsonl", long)
    task = Summarization(own(tmp_path, **changes, **{"data.train": str(path)}))
    batch = task.train_batch(list(range(task.train_size())), epoch=3)
    assert batch["input_ids"].shape[1] == 4
    assert batch["labels"].shape[1] == 3
    assert (batch["input_ids"][:, -1] == 2).all()


def test_the_learned_tokenizer_repeats_and_knows_any_text() -> None:
    texts = ["The cat sat.", "the cat ran, twice", "</s> is text"] * 3
    first, second = (learned_tokenizer(texts, 300, lowercase=False) for _ in range(2))
    assert first.get_vocab() == second.get_vocab()
    assert len(first) <= 300
    text = "Ünïcode 漢字 \t\n </s> <pad>"
    ids = first(text)["input_ids"]
    assert ids[-1] == 2
    assert not {0, 1, 2, 3} & set(ids[:-1])
    assert first.decode(ids, skip_special_tokens=True).strip() == text
    lower = learned_tokenizer(texts, 300, lowercase=True)
    assert lower("THE Cat")["input_ids"] == lower("the cat")["input_ids"]


# ---------------------------------------------------------------------------------------------------- the model


def test_the_model_has_the_dropout_asked_for_and_no_layerdrop() -> None:
    changes = {"model.dropout": 0.25, "model.attention_dropout": 0.35, "model.activation_dropout": 0.45}
    model = load_task(TINY.replace(**changes)).build_model().train()
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.25, 0.35, 0.45}


def test_a_new_model_begins_by_preferring_what_stands_at_the_same_place() -> None:
    task = Summarization(TINY.replace(**{"model.hidden_size": 128, "data.summary_tokens": 8}))
    torch.manual_seed(0)
    model = task.build_model().eval()
    batch = task.train_batch(list(range(16)), epoch=0)
    logits = task.logits(model, batch)
    there = batch["input_ids"][:, None, : logits.shape[1]].expand(-1, logits.shape[1], -1)
    preference = logits.gather(2, there).mean(0)  # for the document's token at each place, by place of the summary
    same = preference.diagonal().mean()
    others = (preference.sum() - preference.diagonal().sum()) / (preference.numel() - len(preference))
    assert same > others + 0.5


def test_each_rate_alone_makes_two_passes_differ() -> None:
    for key in ("dropout", "attention_dropout", "activation_dropout"):
        changes = {"model.dropout": 0.0, "model.attention_dropout": 0.0, "model.activation_dropout": 0.0}
        task = Summarization(TINY.replace(**(changes | {f"model.{key}": 0.5})))
        first, second = task.logits(task.build_model().train(), task.train_batch([0, 0], epoch=0))
        assert not torch.equal(first, second), key


def test_a_rate_that_a_model_does_not_have_must_be_null_and_one_it_has_a_number() -> None:
    rates = {"dropout": 0.2, "attention_dropout": None, "activation_dropout": None}
    config = transformers.T5Config()
    set_rates(config, rates, RATE_NAMES)
    assert config.dropout_rate == 0.2
    with pytest.raises(RecipeError, match=r"model\.attention_dropout=0\.1: must be null: t5 has no such rate"):
        set_rates(config, rates | {"attention_dropout": 0.1}, RATE_NAMES)
    with pytest.raises(RecipeError, match=r"model\.attention_dropout=null: must be a rate: bart has one"):
        set_rates(transformers.BartConfig(), rates, RATE_NAMES)
    m2m = transformers.M2M100Config(encoder_layerdrop=0.3)
    set_rates(m2m, {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.0}, RATE_NAMES)
    assert (m2m.encoder_layerdrop, m2m.decoder_layerdrop) == (0, 0)


def saved_model(folder: Path, model: Any, *, begins: bool) -> Path:
    """A model with its tokenizer in a folder, as the hub has them; `begins`: summaries start with `<s>`, as BART's."""
    tokenizer = learned_tokenizer(["text of the file 1 2 3 4 5 6 7 8 9"], 300, lowercase=True)
    if begins:
        from tokenizers import processors

        template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
        tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def small_bart(**changes: Any) -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(vocab_size=300, max_position_embeddings=64, **(sizes | heads | changes))
    return transformers.BartForConditionalGeneration(config)


PRETRAINED = {
    "model.vocabulary": None,
    "model.lowercase": None,
    "model.layers": None,
    "model.hidden_size": None,
    "model.heads": None,
    "model.intermediate_size": None,
}


def test_a_pretrained_bart_is_trained_in_fp32_with_the_recipes_dropout_and_begins_as_bart_does(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "bart", small_bart(encoder_layerdrop=0.5), begins=True)
    changes = {"model.name": str(folder), "model.dropout": 0.3, "model.attention_dropout": 0.2, **PRETRAINED}
    task = Summarization(own(tmp_path, **changes))
    model = task.build_model().train()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.3, 0.2}
    batch = task.train_batch([0], epoch=0)
    assert batch["decoder_input_ids"][0, :2].tolist() == [2, 0]  # </s> <s>, as BART was pre-trained
    assert batch["labels"][0, 0] == 0
    for summary in task.summarize(model.eval(), "test"):
        assert "<s>" not in summary
    assert task.notes["decoded by"].startswith("transformers")  # the search has no_repeat_ngram=3


@pytest.mark.filterwarnings("ignore:decoding with transformers' generate")
def test_a_model_of_another_architecture_is_trained_and_scored_too(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=300, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=1
    )
    config.pad_token_id, config.eos_token_id = 1, 2
    folder = saved_model(tmp_path / "t5", transformers.T5ForConditionalGeneration(config), begins=False)
    changes = {
        "model.name": str(folder),
        "model.attention_dropout": None,
        "model.activation_dropout": None,
        "data.prefix": "summarize: ",
        **PRETRAINED,
    }
    result = train(own(tmp_path, updates=4, **changes), tmp_path / "run")
    assert set(result["test"]) == {"loss", "rouge1", "rouge2", "rougeL"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.document_tokens": 65}, r"data\.document_tokens=65: must be at most 64, the positions of"),
        ({"decoding.max_length": 63}, r"decoding\.max_length=65: must be at most 64"),
        ({"model.activation_dropout": None}, r"model\.activation_dropout=null: must be a rate"),
        ({"model.name": "no/such-model-here"}, r'model\.name="no/such-model-here": cannot be loaded'),
    ],
)
def test_what_a_pretrained_model_cannot_do_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = saved_model(tmp_path / "bart", small_bart(), begins=True)
    with pytest.raises(RecipeError, match=message):
        Summarization(own(tmp_path, **({"model.name": str(folder), **PRETRAINED} | changes)))


def test_a_model_that_maps_no_sequence_to_a_sequence_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    learned_tokenizer(["text"], 300, lowercase=True).save_pretrained(tmp_path / "bert")
    with pytest.raises(RecipeError, match="is a bert, and not a sequence-to-sequence model"):
        Summarization(own(tmp_path, **{"model.name": str(tmp_path / "bert"), **PRETRAINED}))


# -------------------------------------------------------------------------------------------------------- scores


def test_rouge_is_what_a_hand_counts() -> None:
    # "the cat sat" against "the cat": 2 of 3 and 2 of 2 words, 1 of 2 and 1 of 1 pairs.
    scores = rouge(["the cat sat"], [["the cat"]])
    assert scores == pytest.approx({"rouge1": 80.0, "rouge2": 100 * 2 / 3, "rougeL": 80.0})
    assert list(scores) == ["rouge1", "rouge2", "rougeL"]
    mean = rouge(["the cat sat", "x"], [["the cat"], ["y"]])
    assert mean["rouge1"] == pytest.approx(40.0)


ENGLISH = [
    "The U.S. economy grew 3.5% in 2014, don't you know?",
    "“Runners” were running — it\u2019s easily 10 m² wide…",
    "snake_case, hyphen-ated; e-mail@example.com!\nSecond line: studies, studied, studying",
    "",
    "?!",
]


def test_the_words_of_english_are_those_of_rouge_score() -> None:
    default = RougeScorer(list(KINDS.values()), use_stemmer=True)
    for text in ENGLISH:
        assert WordsOfAnyScript().tokenize(text) == default._tokenizer.tokenize(text)
    for summary, reference in product(ENGLISH, ENGLISH):
        expected = default.score(reference, summary)
        found = rouge([summary], [[reference]])
        assert found == {name: 100 * expected[kind].fmeasure for name, kind in KINDS.items()}


def test_aeslc_has_the_figures_of_rouge_score(aeslc_examples: Examples) -> None:
    default = RougeScorer(list(KINDS.values()), use_stemmer=True)
    subjects = [example.summaries for example in aeslc_examples["test"] if "".join(example.summaries).isascii()][:300]
    for written, *references in subjects:
        expected = default.score_multi(references, written)
        assert rouge([written], [references]) == {name: 100 * expected[kind].fmeasure for name, kind in KINDS.items()}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("Größe", "Grüße"),
        ("Открылся новый парк", "Закрылась старая школа"),
        ("άνοιξε ένα πάρκο", "έκλεισε το σχολείο"),
        ("افتتحت حديقة جديدة", "أغلقت مدرسة قديمة"),
        ("नया पार्क खुला", "पुराना स्कूल बंद"),
        ("새로운 공원이 열렸다", "오래된 학교가 닫혔다"),
        ("新公园开放", "旧学校关闭"),
        ("เปิดสวน", "ห้าม"),
        ("ꦥꦱꦂ", "ꦲꦮꦤ"),
        ("\u2163 \u2164", "\u2167"),
    ],
)
def test_words_of_any_script_are_scored(right: str, wrong: str) -> None:
    assert rouge([right], [[right]])["rouge1"] == rouge([right], [[right]])["rougeL"] == 100
    assert rouge([right], [[wrong]])["rouge1"] == 0
    assert rouge([right.lower()], [[right]])["rouge1"] == 100
    assert rouge([unicodedata.normalize("NFD", right)], [[unicodedata.normalize("NFC", right)]])["rouge1"] == 100


def test_scripts_without_spaces_are_scored_by_character_and_others_by_word() -> None:
    assert WordsOfAnyScript().tokenize("iPhone手机 2台") == ["iphon", "手", "机", "2", "台"]
    assert WordsOfAnyScript().tokenize("हिन्दी में") == ["हिन्दी", "में"]
    assert WordsOfAnyScript().tokenize("می\u200cرود") == ["میرود"]
    for text in ("\ua9a5\ua9b1", "\u1b13\u1b33", "\u1950\u1951", "\U00011700\U00011701", "ㄅㄆ"):
        assert WordsOfAnyScript().tokenize(text) == list(text)
    assert rouge(["新公园"], [["新学园"]])["rouge1"] == pytest.approx(200 / 3)


def test_summaries_without_words_are_refused(tmp_path: Path) -> None:
    marks = [{"document": f"text {number}", "summary": "?!"} for number in range(20)]
    with pytest.raises(DataError, match="most summaries have no letter and no digit, of which ROUGE is"):
        Summarization(own(tmp_path, **{"data.train": str(write_rows(tmp_path / "marks.jsonl", marks))}))


def test_a_list_of_references_is_learned_by_its_first_and_scored_by_its_best(tmp_path: Path) -> None:
    several = [{"document": f"text {n}", "summary": ["first", f"other {n}"] if n % 2 else "only"} for n in range(20)]
    recipe = own(tmp_path, **{"data.train": str(write_rows(tmp_path / "several.jsonl", several))})
    examples = load_examples(recipe.data)
    assert {example.summaries[:1] for example in examples["train"]} == {("first",), ("only",)}
    task = Summarization(recipe)
    assert sorted({len(own) for split in ("valid", "test") for own in task._references[split]}) == [1, 2]
    assert rouge(["other 3"], [["first", "other 3"]])["rouge1"] == 100
    for wrong in ([], ["a", " "], [1, None], [["a"]]):
        path = write_rows(tmp_path / "wrong.jsonl", [*several, {"document": "text", "summary": wrong}])
        with pytest.raises(DataError, match=r"wrong\.jsonl:21: .*'summary'"):
            load_examples(own(tmp_path, **{"data.train": str(path)}).data)


def test_rouge_stems_words_and_ignores_case_and_punctuation() -> None:
    assert rouge(["Meetings!"], [["meeting"]])["rouge1"] == 100


def test_rouge_takes_the_best_reference_for_each_kind() -> None:
    scores = rouge(["a b c"], [["c b a", "a b x y"]])
    assert scores["rouge1"] == pytest.approx(100.0)
    assert scores["rouge2"] == pytest.approx(100 * 2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))


def test_rouge_l_reads_a_newline_as_the_end_of_a_sentence() -> None:
    one_sentence, two_sentences = rouge(["c d a b"], [["a b c d"]]), rouge(["c d\na b"], [["a b\nc d"]])
    assert one_sentence["rougeL"] == pytest.approx(50.0)
    assert two_sentences["rougeL"] == pytest.approx(100.0)


def test_a_summary_of_nothing_scores_nothing() -> None:
    assert rouge(["", "..."], [["a"], ["a"]]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0}


class Parrot(nn.Module):
    """Logits that say the label with this probability."""

    def __init__(self, probability: float, classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(probability))
        self.classes = classes

    def of(self, labels: Tensor) -> Tensor:
        rest = (1 - self.weight) / (self.classes - 1)
        said = nn.functional.one_hot(labels.clamp(min=0), self.classes).bool()
        return torch.where(said, self.weight, rest).log()


def test_the_loss_is_the_mean_over_the_tokens_of_all_references(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Summarization(TINY.replace(**{"decoding.batch_size": 5}))
    monkeypatch.setattr(task, "logits", lambda model, batch: model.of(batch["labels"]))
    monkeypatch.setattr(task, "_decoder", lambda model: lambda sources, max_length: [[] for _ in sources])
    scores = task.evaluate(Parrot(0.25, 300), "valid")
    assert scores["loss"] == pytest.approx(-torch.tensor(0.25).log().item(), rel=1e-5)
    assert scores["rougeL"] == 0


def test_summaries_stand_in_the_order_of_their_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Summarization(TINY.replace(**{"decoding.batch_size": 3}))
    monkeypatch.setattr(task, "_decoder", lambda model: lambda sources, max_length: [ids[:-1] for ids in sources])
    torch.manual_seed(0)
    summaries = task.summarize(task.build_model().eval(), "test")
    examples = load_examples(TINY.data)["test"]
    documents = [example.document.lower() for example in examples]
    assert all(document.startswith(summary) for document, summary in zip(documents, summaries, strict=True))
    assert max(map(len, summaries)) > 10


def test_scoring_twice_gives_the_same_numbers(tiny: Summarization) -> None:
    torch.manual_seed(0)
    model = tiny.build_model().eval()
    assert tiny.evaluate(model, "test") == tiny.evaluate(model, "test")


def test_only_the_first_examples_of_the_valid_split_are_scored() -> None:
    task = Summarization(TINY.replace(**{"data.valid_examples": 3}))
    torch.manual_seed(0)
    model = task.build_model().eval()
    assert [len(task.summarize(model, split)) for split in ("valid", "test")] == [3, 16]


def test_a_valid_score_measures_the_use_of_the_source_and_a_test_score_does_not(tiny: Summarization) -> None:
    torch.manual_seed(0)
    model = tiny.build_model().eval()
    tiny.signs = {}
    tiny.evaluate(model, "test")
    assert tiny.signs == {}
    tiny.evaluate(model, "valid")
    assert abs(tiny.signs["source_use"]) < 0.5


# ------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_tiny_form_of_every_recipe_learns(recipe: SummarizationRecipe, tmp_path: Path) -> None:
    result = train(recipe.tiny(), tmp_path)
    losses = [row["loss"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "valid"]
    assert losses[-1] < losses[0]
    assert result["metric"] == "rougeL"
    assert set(result["test"]) == {"loss", "rouge1", "rouge2", "rougeL"}


def test_every_recipe_says_a_published_row_or_none_of_those_that_are_there() -> None:
    assert set(PUBLISHED) <= {recipe.name for recipe in RECIPES}
    rows = {row.metric: (row.baseline, row.rdrop) for row in PUBLISHED["cnn-dailymail"]}
    assert rows == {"ROUGE-1": (44.16, 44.51), "ROUGE-2": (21.28, 21.58), "ROUGE-L": (40.90, 41.24)}
    assert all(isinstance(row, Published) and row.source for row in PUBLISHED["cnn-dailymail"])


def test_cnn_dailymail_has_the_papers_settings() -> None:
    recipe = CNN_DAILYMAIL
    assert (recipe.method.alpha, recipe.label_smoothing, recipe.learning_rate, recipe.updates) == (
        0.7,
        0.1,
        3e-5,
        20_000,
    )
    assert recipe.batch_tokens == 1024 * 16 * 4
    decoding = recipe.decoding
    assert (decoding.beams, decoding.length_penalty, decoding.no_repeat_ngram) == (4, 2.0, 3)
    assert (decoding.min_length, decoding.max_length) == (55, 140)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (AESLC, {"model.name": "facebook/bart-base"}, r"model\.vocabulary=\d+: must be null: facebook/bart-base has"),
        (AESLC, {"model.layers": None}, r"model\.layers=null: must be given for a model from scratch"),
        (AESLC, {"model.heads": 5}, r"model\.hidden_size=\d+: must be divisible by model\.heads \(=5\)"),
        (AESLC, {"model.vocabulary": 100}, r"model\.vocabulary=100: must be greater than or equal to 260"),
        (AESLC, {"decoding.min_length": 90}, r"decoding\.min_length=90: must be at most decoding\.max_length"),
        (AESLC, {"data.summary_column": "document"}, r"data\.summary_column: the columns must differ"),
        (AESLC, {"data.counts": [1, 2]}, r"data\.counts"),
        (CNN_DAILYMAIL, {"model.name": None}, r"model\.vocabulary=null: must be given for a model from scratch"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    recipe: SummarizationRecipe, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe.replace(**changes)

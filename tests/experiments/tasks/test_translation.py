"""Translation: what the model sees, what it is, and how it is scored."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tests.real_data import real_data
from torch import nn

from rdrop import repeat_batch
from rdrop.dropout import dropout_sources
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.tasks.decoding import choice
from rdrop.experiments.tasks.files import DataError, read_lines
from rdrop.experiments.tasks.task import Batch, load_task
from rdrop.experiments.tasks.token_sequences import TokenSequences
from rdrop.experiments.tasks.translation.recipes import (
    IWSLT14_DE_EN,
    IWSLT14_DE_EN_40K,
    MULTI30K_EN_DE,
    PUBLISHED,
    RECIPES,
    TRANSLATION,
    WMT14_EN_DE,
    TranslationRecipe,
)
from rdrop.experiments.tasks.translation.subwords import END, PAD, UNKNOWN
from rdrop.experiments.tasks.translation.task import Translation, make_batch, marian_config
from rdrop.experiments.training.trainer import train
from rdrop.views import perturb_batch, views_of

TINY = TRANSLATION.tiny()


@pytest.fixture(scope="module")
def tiny() -> Translation:
    return Translation(TINY)


def own(tmp_path: Path, pairs: Sequence[tuple[str, str]], **changes: object) -> TranslationRecipe:
    """The tiny recipe on a file of one's own, in place of synthetic examples."""
    path = tmp_path / "own.tsv"
    path.write_text("source\ttarget\n" + "".join(f"{source}\t{target}\n" for source, target in pairs), encoding="utf-8")
    return TINY.replace(**({"data.tiny": False, "data.train": str(path)} | changes))


def built(recipe: TranslationRecipe) -> nn.Module:
    torch.manual_seed(0)
    return load_task(recipe).build_model()


# ---------------------------------------------------------------------------------------------------- the batches


def test_a_batch_is_padded_shifted_and_ended() -> None:
    split = TokenSequences([[5, 6, 7], [8]]), TokenSequences([[9], [10, 11]])
    batch = make_batch(split, [0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7, END], [8, END, PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[END, 9, PAD], [END, 10, 11]]
    assert batch["labels"].tolist() == [[9, END, -100], [10, 11, END]]


def test_a_batch_is_a_pure_function_of_its_indices(tiny: Translation) -> None:
    first, again = tiny.train_batch([3, 1], epoch=0), tiny.train_batch([3, 1], epoch=4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(len(tensor) == 2 for tensor in first.values())


def test_lengths_are_those_of_the_longer_side_with_its_end(tiny: Translation) -> None:
    lengths = tiny.train_lengths()
    assert len(lengths) == tiny.train_size() == 200
    for index in (0, 17, 199):
        batch = tiny.train_batch([index], epoch=0)
        assert lengths[index] == max(batch["input_ids"].shape[1], batch["labels"].shape[1])


def test_long_and_uneven_pairs_are_skipped_in_train_only_and_counted(tmp_path: Path) -> None:
    pairs = [("a b c", "d e f")] * 26 + [("a " * 30 + "b", "d " * 30 + "e")] * 2 + [("a b c d", "e")] * 2
    valid, test = tmp_path / "valid.tsv", tmp_path / "test.tsv"
    for path in (valid, test):
        path.write_text(f"source\ttarget\n{'a ' * 30}b\te d e f{path.stem[0]}\n", encoding="utf-8")
    files = {"data.valid": str(valid), "data.test": str(test)}
    limits = {"data.max_length": 20, "data.max_ratio": 3.0}
    task = Translation(own(tmp_path, pairs, **files, **limits))
    skipped = {"skipped_empty": 0, "skipped_too_long": 2, "skipped_uneven": 2}
    assert task.counts == {"read": 30, "used": 26} | skipped
    assert task.train_size() == 26
    assert task.train_lengths().max() <= 21
    assert "read 30, used 26, skipped_empty 0, skipped_too_long 2, skipped_uneven 2" in task.notes["train pairs"]
    assert len(task.translate(task.build_model().eval(), "test")) == 1


def test_a_sentence_to_be_scored_that_is_too_long_for_the_model_is_named(tmp_path: Path) -> None:
    pairs = [("a b c", "d e f")] * 20
    test = tmp_path / "test.tsv"
    test.write_text(f"source\ttarget\nx\ty\n{'a ' * 70}b\te\n", encoding="utf-8")
    with pytest.raises(
        DataError, match=r"test\.tsv:3: source has 71 tokens, but a sentence of test has 1 to 63; .*positions=72$"
    ):
        Translation(own(tmp_path, pairs, **{"data.test": str(test)}))


def test_translations_without_spaces_need_a_language_that_bleu_knows(tmp_path: Path) -> None:
    pairs = [(f"dog number {number}", f"{number}匹目の犬がいる。") for number in range(10)]
    recipe = own(tmp_path, pairs)
    with pytest.raises(DataError, match=r"own\.tsv \(valid\): most translations have no spaces.* one of zh, ja, th"):
        load_task(recipe)
    path = Path(str(recipe.data.train))
    path.write_text(path.read_text(encoding="utf-8").replace("target", "ja", 1), encoding="utf-8")
    task = Translation(recipe.replace(**{"data.target": "ja"}))
    task.evaluate(task.build_model(), "test")
    assert "tok:char" in task.notes["signature of bleu"]


def test_translations_too_short_for_bleu_are_refused_or_noted(tmp_path: Path) -> None:
    words = [(f"hund{number}", f"dog{number}") for number in range(20)]
    with pytest.raises(DataError, match=r"no translation that is scored has 4 words.*a perfect one would score 0"):
        Translation(own(tmp_path, words))
    test = tmp_path / "test.tsv"
    test.write_text("source\ttarget\nHund\tdog\nHunde\tdogs\nein Hund\ta dog\ndas ist ein Hund\tthat is a dog\n")
    sentences = [(f"das ist ein Hund {number}", f"that is a dog {number}") for number in range(20)]
    notes = Translation(own(tmp_path, sentences, **{"data.test": str(test)})).notes
    assert notes["short translations of test"] == "3 of 4 have fewer than 4 words, and BLEU says little of them"


def test_train_pairs_are_drawn_by_the_seed_and_the_scored_ones_stay(tmp_path: Path) -> None:
    pairs = [(f"ba{number}", f"ko{number} li mu ba") for number in range(60)]

    def texts(seed: int) -> tuple[list[str], list[str]]:
        task = Translation(own(tmp_path, pairs, seed=seed, **{"data.train_pairs": 20}))
        rows = [task.train_batch([row], epoch=0)["labels"][0, :-1].tolist() for row in range(task.train_size())]
        return task.subwords.decode(rows), task._references["test"]

    (first, scored), (again, _), (other, same) = texts(seed=0), texts(seed=0), texts(seed=1)
    assert len(first) == len(set(first)) == 20
    assert first == again != other
    assert scored == same
    assert not set(first) & set(scored)


def test_more_train_pairs_than_there_are_is_an_error_that_says_how_many(tmp_path: Path) -> None:
    recipe = own(tmp_path, [("ba", "ko")] * 30, **{"data.train_pairs": 25})
    with pytest.raises(DataError, match=r"has 24 pairs; set data\.train_pairs \(=25\) to at most that"):
        Translation(recipe)


def test_both_directions_are_the_pairs_and_the_same_turned_around(tmp_path: Path) -> None:
    pairs = [(f"ba{number}", f"ko{number} li mu ba") for number in range(20)]
    one, both = (Translation(own(tmp_path, pairs, **{"data.bidirectional": way})) for way in (False, True))
    size = one.train_size()
    assert both.train_size() == 2 * size
    for row in range(size):
        there, back = both.train_batch([row], epoch=0), both.train_batch([size + row], epoch=0)
        assert there["input_ids"].tolist() == one.train_batch([row], epoch=0)["input_ids"].tolist()
        assert back["input_ids"].tolist() == there["labels"].tolist()
        assert back["labels"].tolist() == there["input_ids"].tolist()
    assert both.names_of_ids() == one.names_of_ids()  # so that one may start the other
    assert [tokens.ids.tolist() for tokens in both._splits["test"]] == [
        tokens.ids.tolist() for tokens in one._splits["test"]
    ]


def test_limits_that_leave_nothing_are_an_error(tmp_path: Path) -> None:
    recipe = own(tmp_path, [("a b c d e f", "g h i j k l")] * 20, **{"data.max_length": 2})
    with pytest.raises(DataError, match=r"data\.max_length and data\.max_ratio skip every pair"):
        Translation(recipe)


def test_a_vocabulary_smaller_than_the_alphabet_is_refused(tmp_path: Path) -> None:
    recipe = own(tmp_path, [("abcdefgh", "ijklmnop")] * 20, **{"data.vocabulary": 10})
    with pytest.raises(RecipeError, match=r"data\.vocabulary=10: must be at least 2\d"):
        Translation(recipe)


def test_the_codes_of_the_folder_are_used(tmp_path: Path) -> None:
    folder = real_data("iwslt14-de-en")
    (tmp_path / "bpe.10k.codes.xz").write_bytes((folder / "bpe.10k.codes.xz").read_bytes())
    for name in ("train40k", "valid", "test"):
        for language in ("de", "en"):
            lines = read_lines(folder / f"{'valid' if name == 'train40k' else name}.tok.{language}.xz")[
                : 100 if name == "valid" else 200
            ]
            (tmp_path / f"{name}.tok.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    task = Translation(IWSLT14_DE_EN_40K.replace(**{"data.folder": str(tmp_path), "data.counts": None}))
    batch = task.train_batch([0], epoch=0)
    assert task.subwords.decode([batch["labels"][0, :-1].tolist()]) == ["it &apos;s that pyramid ."]
    assert batch["input_ids"].shape == (1, 7)  # es ist diese pyrami@@ de . </s>


# ------------------------------------------------------------------------------------------------------ the model


def test_the_models_have_the_parameters_of_their_papers() -> None:
    def parameters(recipe: TranslationRecipe, vocabulary: int) -> int:
        with torch.device("meta"):
            model = type(built(TINY))(marian_config(recipe.model, vocabulary))
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    assert parameters(IWSLT14_DE_EN, 10_152) == 36_741_120
    assert parameters(IWSLT14_DE_EN, 10_146 + 4) == 36_741_120  # rounded up to a multiple of 8, as fairseq does
    assert parameters(WMT14_EN_DE, 32_768) == 209_911_808
    assert parameters(MULTI30K_EN_DE, 10_000) == 2_605_056


def test_the_recipe_builds_the_network_it_says() -> None:
    rates = {"model.dropout": 0.25, "model.attention_dropout": 0.35, "model.activation_dropout": 0.45}
    model = built(TINY.replace(**rates, **{"model.layers": 3, "model.heads": 4}))
    config = model.config
    assert (config.encoder_layers, config.decoder_layers, config.d_model) == (3, 3, 32)
    assert (config.encoder_attention_heads, config.encoder_ffn_dim) == (4, 64)
    assert {source.rate for source in dropout_sources(model.train()) if source.active} == {0.25, 0.35, 0.45}
    assert config.encoder_layerdrop == config.decoder_layerdrop == 0.0
    assert model.lm_head.weight is model.model.shared.weight
    assert model.model.encoder.embed_tokens.weight is model.model.decoder.embed_tokens.weight
    assert not model.model.encoder.embed_positions.weight.requires_grad


@pytest.mark.parametrize("key", ["dropout", "attention_dropout", "activation_dropout"])
def test_each_rate_alone_makes_two_passes_differ(key: str) -> None:
    rates = dict.fromkeys(("model.dropout", "model.attention_dropout", "model.activation_dropout"), 0.0)
    task = Translation(TINY.replace(**(rates | {f"model.{key}": 0.5})))
    model = task.build_model().train()
    first, second = task.logits(model, repeat_batch(task.train_batch([0], epoch=0))).chunk(2)
    assert not torch.equal(first, second)


def test_padding_changes_no_logit(tiny: Translation) -> None:
    model = built(TINY).eval()
    together = tiny.train_batch(list(range(8)), epoch=0)
    logits = tiny.logits(model, together)
    assert logits.shape == (*together["labels"].shape, model.config.vocab_size)
    for index in range(8):
        alone = tiny.logits(model, tiny.train_batch([index], epoch=0))[0]
        torch.testing.assert_close(logits[index, : len(alone)], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["unknown", "embedding"])
def test_cutoffs_leave_padding_start_and_end_alone(tiny: Translation, kind: str) -> None:
    batch: Batch = tiny.train_batch(list(range(16)), epoch=0)
    views = views_of(kind, 0.9)  # type: ignore[arg-type]
    torch.manual_seed(0)
    special_ids, unknown_id = tiny.special_ids(), tiny.unknown_id()
    repeated, perturbed = perturb_batch(batch, views, special_ids=special_ids, unknown_id=unknown_id)
    for name in ("input_ids", "decoder_input_ids"):
        clean, cut = repeated[name].chunk(2)
        assert torch.equal(clean, batch[name])
        kept = (clean == PAD) | (clean == END)
        assert torch.equal(cut[kept], clean[kept])
        assert (cut == UNKNOWN).any() == (kind == "unknown")
    model = built(TINY).eval()
    with perturbed(model):
        first, second = tiny.logits(model, repeated).chunk(2)
    assert not torch.allclose(first, second)


# ---------------------------------------------------------------------------------------------------- the scores


def test_the_loss_is_that_of_a_token_without_smoothing(tiny: Translation) -> None:
    model = built(TINY).eval()
    loss = tiny.evaluate(model, "valid")["loss"]
    batch = make_batch(tiny._splits["valid"], range(20))
    logits = tiny.logits(model, batch)
    assert loss == pytest.approx(F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten()).item(), rel=1e-5)


def test_valid_translates_the_first_sentences_and_test_all_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Translation(TINY.replace(**{"data.valid_sentences": 7, "decoding.batch_size": 3, "decoding.beams": 2}))
    model = task.build_model().eval()
    given: list[tuple[list[str], int]] = []
    scorer = task._bleu

    def record(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        given.append((list(references), len(hypotheses)))
        return scorer(hypotheses, references)

    record.signatures = scorer.signatures  # type: ignore[attr-defined]
    record.counts_of_each = scorer.counts_of_each  # type: ignore[attr-defined]
    monkeypatch.setattr(task, "_bleu", record)
    few, all_of_it = task.evaluate(model, "valid"), task.evaluate(model, "test")
    assert given == [(task._references["valid"][:7], 7), (task._references["test"], 20)]
    assert set(few) == set(all_of_it) == {"loss", "bleu", "bleu_tokenized_split"}
    whole = Translation(TINY.replace(**{"data.valid_sentences": None}))
    assert few["loss"] == pytest.approx(whole.evaluate(model, "valid")["loss"], rel=1e-6)


def test_a_model_that_copies_its_reference_scores_100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Translation(own(tmp_path, [("Was ist das (dort)?", "What's that over there, port-a-potty?")] * 20))

    class Oracle:
        name = "oracle"

        def __call__(self, sources: Sequence[Sequence[int]], max_length: int) -> list[list[int]]:
            target = task._splits["test"][1][0]
            assert max_length >= len(target)
            return [target for _ in sources]

    monkeypatch.setattr(task, "_decoder", lambda model, beams: Oracle())
    scores = task.evaluate(task.build_model().eval(), "test")
    assert scores["bleu"] == scores["bleu_tokenized_split"] == pytest.approx(100)


def test_the_fallback_translates_too_and_the_notes_name_it(tiny: Translation, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(TINY).eval()
    tiny.translate(model, "test")
    assert tiny.notes["decoded by"].startswith("ctranslate2 ")
    monkeypatch.setattr(choice, "why_not_ctranslate2", lambda model: "a test")
    with pytest.warns(RuntimeWarning, match="transformers' generate, which is slow: a test"):
        assert len(tiny.translate(model, "test")) == 20
    assert tiny.notes["decoded by"].startswith("transformers ")


def test_the_notes_have_the_signatures(tiny: Translation) -> None:
    tiny.evaluate(built(TINY).eval(), "valid")
    assert "tok:13a" in tiny.notes["signature of bleu"]
    assert "case:lc" in tiny.notes["signature of bleu_tokenized_split"]


def test_evaluation_is_repeatable_and_leaves_the_model_alone(tiny: Translation) -> None:
    model = built(TINY).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tiny.evaluate(model, "valid") == tiny.evaluate(model, "valid")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stop_is_noticed_between_the_batches_of_a_search(tiny: Translation) -> None:
    model = built(TINY).eval()
    forwards: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: forwards.append(1))
    tiny.evaluate(model, "test")
    hook.remove()
    assert forwards


# ---------------------------------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=[recipe.name for recipe in RECIPES])
def test_every_recipe_trains_in_its_tiny_form(recipe: TranslationRecipe, tmp_path: Path) -> None:
    result = train(recipe.tiny(), tmp_path)
    losses = [row["task_loss"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert result["metric"] == recipe.data.metric
    assert result["metric"] in result["test"]


def test_the_task_is_learned(tmp_path: Path) -> None:
    pairs = [
        (" ".join(words), " ".join(words).upper())
        for words in [["ba", "ko"], ["li"], ["mu", "ba", "li", "ko"], ["ko"]] * 20
    ]
    recipe = own(tmp_path, pairs, updates=60, evaluate_every=12, select_by="loss", alpha=1.0)
    recipe = recipe.replace(**{"model.dropout": 0.1})
    result = train(recipe, tmp_path / "run")
    assert result["test"]["loss"] < 1.0
    first, *_, last = (row["source_use"] for row in RunFolder(tmp_path / "run").metrics() if row["kind"] == "valid")
    assert last == result["source_use"] > 0.3 > abs(first)


def test_published_rows_are_those_of_the_papers_tables() -> None:
    assert set(PUBLISHED) <= {recipe.name for recipe in RECIPES}
    rows = {name: [(row.baseline, row.rdrop) for row in own] for name, own in PUBLISHED.items()}
    assert rows["iwslt14-de-en"] == [(34.64, 37.25)]
    assert rows["iwslt14-en-de"] == [(28.57, 30.72)]
    assert rows["wmt14-en-de"] == [(29.12, 30.91)]
    assert rows["wmt14-en-fr"] == [(42.69, 43.95)]


def test_the_figures_of_simcut_are_beside_the_form_of_bleu_in_which_they_were_published() -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.name == "iwslt14-de-en-simcut")
    assert recipe.data.metric == "bleu_tokenized"
    assert {row.metric for row in PUBLISHED[recipe.name]} == {"BLEU tokenized"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.target": "source"}, r'data\.target="source": must be another language than data\.source'),
        ({"data.codes": "codes"}, r'data\.codes="codes": must be null where data\.tokenized is false'),
        ({"data.metric": "bleu_tokenized"}, r"data\.metric=.*where data\.tokenized is false"),
        ({"data.max_length": 64}, r"data\.max_length=64: must be below model\.positions \(=64\)"),
        ({"model.heads": 3}, r"model\.hidden_size=32: must be divisible by model\.heads \(=3\)"),
        ({"data.counts": [1, 2]}, r"data\.counts=\[\.\.\.\]"),
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TINY.replace(**changes)

"""Translation from scratch by the Transformer of Vaswani et al.: post-norm, sinusoidal positions, shared embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import MarianConfig, MarianMTModel

from rdrop import cross_entropy, symmetric_kl
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder.predictions import Predictions, text_predictions
from rdrop.experiments.tasks.decoding.choice import decoder_of
from rdrop.experiments.tasks.decoding.search import Decoder, Search
from rdrop.experiments.tasks.files import DataError, find_file
from rdrop.experiments.tasks.sequence_to_sequence import (
    IGNORE_INDEX,
    encoder_decoder_sizes,
    forward_logits,
    search_and_loss,
    source_use,
)
from rdrop.experiments.tasks.share import ALONE
from rdrop.experiments.tasks.splits import note_on_few, notes_on_repeats
from rdrop.experiments.tasks.task import Batch
from rdrop.experiments.tasks.token_cache import cached, file_digest, is_large, write_columns
from rdrop.experiments.tasks.token_sequences import (
    PART,
    Columns,
    TokenSequences,
    batches_by_length,
    in_parts,
    padded,
    usable,
)
from rdrop.experiments.tasks.tokenizing import mostly_unknown
from rdrop.experiments.tasks.translation.data import Pairs, load_pairs
from rdrop.experiments.tasks.translation.scores import NGRAM, TOKENIZERS, BleuScorer, has_words
from rdrop.experiments.tasks.translation.subwords import (
    END,
    PAD,
    SPECIAL_TOKENS,
    START,
    UNKNOWN,
    CodedSubwords,
    LearnedSubwords,
    Subwords,
)

if TYPE_CHECKING:
    from rdrop.experiments.tasks.translation.recipes import TranslationData, TranslationModel, TranslationRecipe

VOCABULARY_MULTIPLE = 8  # as fairseq: matrices of whole tiles
KEYS = "keys.npy"

Split = tuple[TokenSequences, TokenSequences]


class Translation:
    """The checkpoint is chosen by the BLEU of the first `data.valid_sentences` of the valid split, the loss is of all.

    What a reader should know of the data and the scores beside their numbers is in `notes`.
    """

    task_loss = staticmethod(cross_entropy)
    divergence = staticmethod(symmetric_kl)
    share = ALONE

    def __init__(self, recipe: TranslationRecipe, test: str | None = None) -> None:
        data = recipe.data
        self._data, self._model, self._decoding = data, recipe.model, recipe.decoding
        self.metric = data.metric
        pairs = load_pairs(data, test, seed=recipe.seed)
        train = encode_train(data, pairs["train"])
        self.subwords = train.subwords
        encoded = {split: encode_pairs(self.subwords, pairs[split]) for split in ("valid", "test")}
        self._splits = {"train": train.tokens} | encoded
        if data.bidirectional:
            self._splits["train"] = both_ways(*self._splits["train"])
        self._used, self.counts = usable(
            *(side.lengths for side in self._splits["train"]), max_length=data.max_length, max_ratio=data.max_ratio
        )
        if not len(self._used):
            raise DataError(f"{pairs['train'].where}: data.max_length and data.max_ratio skip every pair; raise them")
        for split in ("valid", "test"):
            self._require_known(pairs[split], split)
            self._require_scorable(pairs[split], split)
        self._sources = [source for source, _ in pairs["test"]]
        self._references = {split: [target for _, target in pairs[split]] for split in ("valid", "test")}
        for split, references in self._references.items():
            self._require_words(pairs[split].where, references)
        self._bleu = BleuScorer(data.target, tokenized=data.tokenized, lowercase=data.lowercase)
        self.predictions: Predictions | None = None
        self.signs: dict[str, float] = {}
        self.notes = {"train pairs": ", ".join(f"{name} {count}" for name, count in self.counts.items())}
        for split, references in self._references.items():
            scored = references[: data.valid_sentences] if split == "valid" else references
            self.notes |= self._note_on_short(pairs[split].where, split, scored)
        keys = {split: train.keys if split == "train" else keys_of(own) for split, own in pairs.items()}
        self.notes |= notes_on_repeats(keys, "pairs")
        self.notes |= note_on_few({split: len(own[0]) for split, own in self._splits.items()}, "pairs")
        """In words: how many pairs were read, used and skipped; after a score, BLEU's signatures and what decoded."""

    def build_model(self) -> nn.Module:
        return MarianMTModel(marian_config(self._model, self.subwords.size))

    def train_size(self) -> int:
        return len(self._used)

    def train_lengths(self) -> NDArray[np.int64]:
        source, target = self._splits["train"]
        lengths: NDArray[np.int64] = np.maximum(source.lengths, target.lengths)[self._used] + 1  # the end
        return lengths

    def train_batch(self, indices: list[int], epoch: int) -> Batch:
        return make_batch(self._splits["train"], self._used[indices].tolist())

    def special_ids(self) -> frozenset[int]:
        return frozenset(range(len(SPECIAL_TOKENS)))

    def names_of_ids(self) -> list[str]:
        return self.subwords.decode([[token] for token in range(self.subwords.size)])

    def unknown_id(self) -> int:
        return UNKNOWN

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return forward_logits(model, batch)

    def labels(self, batch: Batch) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Returns the loss of a reference's token and each form of BLEU. Valid has `decoding.valid_beams` beams."""
        is_valid = split == "valid"
        beams = self._decoding.valid_beams if is_valid else self._decoding.beams
        translated = self._data.valid_sentences if is_valid else None
        size = len(self._references[split])
        hypotheses, loss = self._translate(model, split, range(size)[:translated], beams)
        rest, rest_loss = self._translate(model, split, range(size)[len(hypotheses) :], beams=None)
        assert not rest
        scores = self._bleu(hypotheses, self._references[split][: len(hypotheses)])
        if is_valid:
            self.signs = self._signs(model)
        if split == "test":
            counts = self._counts_of_each(hypotheses, self._references[split])
            references = [[reference] for reference in self._references[split]]
            self.predictions = text_predictions(self._sources, hypotheses, references, bleu=counts)
        self.notes |= {f"signature of {name}": signature for name, signature in self._bleu.signatures.items()}
        total, tokens = loss[0] + rest_loss[0], loss[1] + rest_loss[1]
        return {"loss": total / tokens} | scores

    def _counts_of_each(self, hypotheses: list[str], references: list[str]) -> list[dict[str, list[int]]]:
        def of_rows(rows: list[int]) -> list[dict[str, list[int]]]:
            return self._bleu.counts_of_each([hypotheses[row] for row in rows], [references[row] for row in rows])

        parts = list(in_parts(range(len(hypotheses)), self._decoding.batch_size))
        return list(chain.from_iterable(self.share.map(of_rows, parts)))

    def _signs(self, model: nn.Module) -> dict[str, float]:
        pairs = self._splits["valid"]
        size, batch_of = self._decoding.batch_size, partial(make_batch, pairs)
        return source_use(model, self.logits, batch_of, pairs[1].lengths, size, self.share)

    def translate(self, model: nn.Module, split: str) -> list[str]:
        """Writes the translations of the test score: one of each sentence of the split, in its order."""
        return self._translate(model, split, range(len(self._references[split])), self._decoding.beams)[0]

    def _translate(
        self, model: nn.Module, split: str, rows: Sequence[int], beams: int | None
    ) -> tuple[list[str], tuple[float, int]]:
        """Returns translations of some rows (none where `beams` is None), and the summed loss with its tokens."""
        pairs = self._splits[split]
        search = None if beams is None or not rows else self._search(model, pairs[0], beams)
        batches = batches_by_length(pairs[0].lengths, rows, self._decoding.batch_size)
        found, total, tokens = search_and_loss(
            model, self.logits, batches, partial(make_batch, pairs), search, self.share
        )
        return self.subwords.decode([found[row] for row in rows if row in found]), (total, tokens)

    def _search(self, model: nn.Module, sources: TokenSequences, beams: int) -> Callable[[list[int]], list[list[int]]]:
        decoder = self._decoder(model, beams)

        def search(rows: list[int]) -> list[list[int]]:
            ended = [[*sources[row], END] for row in rows]
            return decoder(ended, self._longest_output(ended))

        return search

    def _decoder(self, model: nn.Module, beams: int) -> Decoder:
        # The tokens behind the vocabulary, up to the multiple, were never learned.
        nothing = range(self.subwords.size, rounded_up(self.subwords.size))
        search = Search(beams, self._decoding.length_penalty, never=(START, PAD, *nothing))
        decoder = decoder_of(model, search)
        self.notes["decoded by"] = decoder.name
        return decoder

    def _longest_output(self, sources: Sequence[Sequence[int]]) -> int:
        return min(2 * max(map(len, sources)) + 10, self._model.positions - 1)

    def _require_known(self, pairs: Pairs, split: str) -> None:
        for language, tokens in zip((self._data.source, self._data.target), self._splits[split], strict=True):
            lost = mostly_unknown(tokens.ids, (), UNKNOWN)
            if lost is not None:
                raise DataError(f"{pairs.where}: {language}: {lost} to the training text; give text in its letters")

    def _require_scorable(self, pairs: Pairs, split: str) -> None:
        longest = max(int(tokens.lengths.max()) for tokens in self._splits[split])
        for side, tokens in enumerate(self._splits[split]):
            for row in np.flatnonzero((tokens.lengths == 0) | (tokens.lengths >= self._model.positions)).tolist():
                remedy = f"shorten it, delete the pair, or set model.positions={longest + 1}"
                raise DataError(
                    f"{pairs.place(row, side)}: {(self._data.source, self._data.target)[side]} has "
                    f"{tokens.lengths[row]} tokens, but a sentence of {split} has 1 to {self._model.positions - 1}; "
                    f"{remedy if tokens.lengths[row] else 'delete the pair'}"
                )

    def _require_words(self, where: str, references: Sequence[str]) -> None:
        language = self._data.target
        if not has_words(language, references):
            raise DataError(
                f"{where}: most translations have no spaces, and BLEU would take each for one word, because "
                f"data.target (={language}) does not say which language they are in; name the column or the file "
                f"ending, and data.target, one of {', '.join(TOKENIZERS)}"
            )

    def _note_on_short(self, where: str, split: str, references: Sequence[str]) -> dict[str, str]:
        """Returns a note if most translations are shorter than what BLEU compares; refuses them if all are."""
        count = self._bleu.too_short(self.metric, references)
        if count == len(references):
            raise DataError(
                f"{where}: no translation that is scored has {NGRAM} words, of which BLEU is: a perfect one would "
                "score 0; give longer sentences"
            )
        said = f"{count} of {len(references)} have fewer than {NGRAM} words, and BLEU says little of them"
        return {f"short translations of {split}": said} if 2 * count > len(references) else {}


class EncodedTrain(NamedTuple):
    """The training pairs as the model reads them."""

    subwords: Subwords
    tokens: Split
    keys: Iterable[int]
    """A number for each pair, equal for equal ones: see `keys_of`."""


def encode_train(data: TranslationData, train: Pairs) -> EncodedTrain:
    """Makes the subwords of both languages, from the training text alone, and encodes it.

    What many pairs become is kept on disk and found there the next time.
    """
    if train.content is None or not is_large(len(train)):
        subwords = build_subwords(data, train)
        return EncodedTrain(subwords, encode_pairs(subwords, train), keys_of(train))
    codes = None if data.codes is None else _codes(data, data.codes)
    settings = (data.vocabulary, data.tokenized) if codes is None else file_digest(codes)
    content = {"pairs": train.content(), "lowercase": data.lowercase, "subwords": settings}
    versions = {"format": 1, "tokenizers": tokenizers.__version__}  # format: of what `_write_train` makes
    folder = cached(content | versions, partial(_write_train, data, train))
    return EncodedTrain(
        (LearnedSubwords if codes is None else CodedSubwords).load(folder),
        (TokenSequences.load(folder / "source"), TokenSequences.load(folder / "target")),
        np.load(folder / KEYS, allow_pickle=False),
    )


def _write_train(data: TranslationData, train: Pairs, folder: Path) -> None:
    subwords = build_subwords(data, train)
    subwords.save(folder)
    keys = np.empty(len(train), np.uint64)

    def parts() -> Iterator[Columns]:
        for start, some in zip(range(0, len(train), PART), in_parts(train), strict=True):
            keys[start : start + len(some)] = [*keys_of(some)]
            sources, targets = zip(*some, strict=True)
            yield {"source": subwords.encode(sources), "target": subwords.encode(targets)}

    write_columns(parts, folder)
    np.save(folder / KEYS, keys)


def keys_of(pairs: Iterable[tuple[str, str]]) -> Iterator[int]:
    """Yields 64 bits of a hash of each pair: of 10 million pairs two different ones share them once in 400,000 sets."""
    for pair in pairs:
        yield int.from_bytes(hashlib.blake2b("\n".join(pair).encode(), digest_size=8).digest())


def build_subwords(data: TranslationData, train: Pairs) -> Subwords:
    lines = _Lines(train)
    if data.codes is not None:
        return CodedSubwords(_codes(data, data.codes), lines)
    subwords = LearnedSubwords(lines, data.vocabulary, tokenized=data.tokenized)
    if subwords.size > data.vocabulary:
        raise RecipeError(
            "data.vocabulary",
            f"must be at least {subwords.size}: so many different characters and special tokens there are",
            value=data.vocabulary,
        )
    return subwords


def _codes(data: TranslationData, name: str) -> Path:
    return Path(name) if data.folder is None else find_file(data.folder, name)


class _Lines:
    """The sentences of pairs, as often as one likes."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self._pairs)


def encode_pairs(subwords: Subwords, pairs: Pairs) -> Split:
    source, target = (TokenSequences(_encoded(subwords, (pair[side] for pair in pairs))) for side in (0, 1))
    return source, target


def both_ways(source: TokenSequences, target: TokenSequences) -> Split:
    """Returns the pairs in both directions: those given, then the same with their sides exchanged."""
    rows = range(len(source))
    first, second = (
        TokenSequences(side[row] for side in sides for row in rows) for sides in ((source, target), (target, source))
    )
    return first, second


def _encoded(subwords: Subwords, lines: Iterable[str]) -> Iterator[list[int]]:
    for some in in_parts(lines):
        yield from subwords.encode(some)


def marian_config(model: TranslationModel, vocabulary: int) -> MarianConfig:
    """Returns the configuration of Vaswani's Transformer, which is transformers' Marian.

    It normalizes after each residual, and has nothing after the last layer.
    """
    return MarianConfig(
        vocab_size=rounded_up(vocabulary),
        d_model=model.hidden_size,
        **encoder_decoder_sizes(model),
        activation_function="relu",
        max_position_embeddings=model.positions,
        scale_embedding=True,
        dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        activation_dropout=model.activation_dropout,
        init_std=0.02,  # transformers' own; with fairseq's larger one, a post-norm model is slower to start
        bos_token_id=START,
        pad_token_id=PAD,
        eos_token_id=END,
        decoder_start_token_id=END,  # as in fairseq
        forced_eos_token_id=None,
    )


def rounded_up(vocabulary: int) -> int:
    return -(-vocabulary // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def make_batch(split: Split, rows: Sequence[int], sources: Sequence[int] | None = None) -> Batch:
    """Pads pairs at their ends. The decoder reads the target behind a `</s>`, to say it with a `</s>` behind it.

    `sources` are the rows of which the sources are taken; None: those of the targets.
    """
    targets = [split[1][row] for row in rows]
    input_ids = padded(([*split[0][row], END] for row in (rows if sources is None else sources)), PAD)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != PAD).long(),
        "decoder_input_ids": padded(([END, *ids] for ids in targets), PAD),
        "labels": padded(([*ids, END] for ids in targets), IGNORE_INDEX),
    }

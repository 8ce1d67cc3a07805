"""Summarization by a sequence-to-sequence model of transformers, scored by ROUGE."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdrop import cross_entropy, symmetric_kl
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder.predictions import Predictions, excerpt, text_predictions
from rdrop.experiments.tasks.decoding.choice import decoder_of
from rdrop.experiments.tasks.decoding.generate import TransformersDecoder
from rdrop.experiments.tasks.decoding.search import Decoder, Search
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.pretrained import (
    pretrained_tokenizer,
    require_padding,
    require_rows,
    set_rates,
    try_out,
)
from rdrop.experiments.tasks.sequence_to_sequence import IGNORE_INDEX, forward_logits, search_and_loss, source_use
from rdrop.experiments.tasks.share import ALONE
from rdrop.experiments.tasks.splits import note_on_few, notes_on_repeats
from rdrop.experiments.tasks.summarization.data import Example, load_examples
from rdrop.experiments.tasks.summarization.models import (
    RATE_NAMES,
    learned_tokenizer,
    pretrained_config,
    seq2seq_model,
    shift_right,
    small_config,
    target_prefix,
)
from rdrop.experiments.tasks.summarization.scores import has_words, mean_rouge, rouge_of_each
from rdrop.experiments.tasks.task import Batch
from rdrop.experiments.tasks.token_cache import columns_of, is_large, text_digest, tokenizer_content
from rdrop.experiments.tasks.token_sequences import Columns, TokenSequences, batches_by_length, in_parts, padded
from rdrop.experiments.tasks.tokenizing import require_content

if TYPE_CHECKING:
    from rdrop.experiments.tasks.summarization.recipes import SummarizationRecipe


class Summarization:
    """The checkpoint is chosen by the ROUGE-L of the first `data.valid_examples` of the valid split.

    What a reader should know of the scores beside their numbers is in `notes`.
    """

    metric = "rougeL"
    task_loss = staticmethod(cross_entropy)
    divergence = staticmethod(symmetric_kl)
    share = ALONE

    def __init__(self, recipe: SummarizationRecipe, test: str | None = None) -> None:
        self._data, self._model, self._decoding = recipe.data, recipe.model, recipe.decoding
        self.predictions: Predictions | None = None
        self.signs: dict[str, float] = {}
        examples = load_examples(recipe.data, test)
        examples["valid"] = examples["valid"][: recipe.data.valid_examples]
        self._tokenizer = self._build_tokenizer(examples["train"])
        self._config = self._build_config()
        self._documents = {split: self._tokenize_documents(own) for split, own in examples.items()}
        self._summaries = {split: self._tokenize_summaries(own) for split, own in examples.items()}
        for split, own in examples.items():
            self._require_content(split, own)
        self._tests = [excerpt(example.document) for example in examples["test"]]
        documents = {split: [example.document for example in own] for split, own in examples.items()}
        self.notes = notes_on_repeats(documents, "documents")
        self.notes |= note_on_few({split: len(own) for split, own in documents.items()}, "documents")
        self._references = {split: [example.summaries for example in examples[split]] for split in ("valid", "test")}
        for split, references in self._references.items():
            if not has_words(references):
                raise DataError(f"{split}: most summaries have no letter and no digit, of which ROUGE is; give others")

    def build_model(self) -> nn.Module:
        model = seq2seq_model(self._model.name, self._config)
        if self._model.name is not None:
            tokens = [*self._documents.values(), *self._summaries.values()]
            largest = max(self._tokenizer.pad_token_id, *(int(own.ids.max()) for own in tokens))
            require_rows(model, self._model.name, largest)
            try_out(model, self._model.name, lambda: self._write_a_little(model))
        return model

    def _write_a_little(self, model: nn.Module) -> None:
        self.logits(model, self.train_batch([0], 0))
        search = Search(beams=1, length_penalty=1.0, prefix=target_prefix(self._tokenizer, self._config))
        first = self._documents["train"][0]
        TransformersDecoder(model, search)([first, first[:1]], min(8, self._decoding.max_length))

    def train_size(self) -> int:
        return len(self._documents["train"])

    def train_lengths(self) -> NDArray[np.int64]:
        return np.maximum(self._documents["train"].lengths, self._summaries["train"].lengths)

    def train_batch(self, indices: list[int], epoch: int) -> Batch:
        return self._batch("train", indices)

    def special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def names_of_ids(self) -> list[str]:
        return [*self._tokenizer.convert_ids_to_tokens(range(len(self._tokenizer)))]

    def unknown_id(self) -> int | None:
        unknown: int | None = self._tokenizer.unk_token_id
        return unknown

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return forward_logits(model, batch)

    def labels(self, batch: Batch) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels

    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Returns the loss of a reference's token, and the ROUGE of the summaries that the model writes."""
        summaries, loss = self._summarize(model, split)
        scores = rouge_of_each(summaries, self._references[split])
        if split == "valid":
            self.signs = self._signs(model)
        if split == "test":
            self.predictions = text_predictions(self._tests, summaries, self._references[split], scores=scores)
        return {"loss": loss} | mean_rouge(scores)

    def _signs(self, model: nn.Module) -> dict[str, float]:
        lengths, size = self._summaries["valid"].lengths, self._decoding.batch_size
        return source_use(model, self.logits, partial(self._batch, "valid"), lengths, size, self.share)

    def summarize(self, model: nn.Module, split: str) -> list[str]:
        """Writes the summaries that are scored: one of each document of the split, in its order."""
        return self._summarize(model, split)[0]

    def _summarize(self, model: nn.Module, split: str) -> tuple[list[str], float]:
        decoder, documents = self._decoder(model), self._documents[split]
        batches = batches_by_length(documents.lengths, range(len(documents)), self._decoding.batch_size)
        found, total, tokens = search_and_loss(
            model,
            self.logits,
            batches,
            partial(self._batch, split),
            lambda rows: decoder([documents[row] for row in rows], self._decoding.max_length),
            self.share,
        )
        written = [found[row] for row in range(len(found))]
        texts: list[str] = self._tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts], total / tokens

    def _decoder(self, model: nn.Module) -> Decoder:
        search = Search(
            beams=self._decoding.beams,
            length_penalty=self._decoding.length_penalty,
            min_length=self._decoding.min_length,
            no_repeat_ngram=self._decoding.no_repeat_ngram,
            never=tuple(sorted(self.special_ids() - {self._config.eos_token_id})),
            prefix=target_prefix(self._tokenizer, self._config),
        )
        decoder = decoder_of(model, search)
        self.notes["decoded by"] = decoder.name
        return decoder

    def _batch(self, split: str, indices: list[int], sources: list[int] | None = None) -> Batch:
        """Makes a batch of the examples at `indices`; with the documents of those at `sources`, if there are any."""
        pad = self._tokenizer.pad_token_id
        sources = indices if sources is None else sources
        documents = padded((self._documents[split][index] for index in sources), pad)
        labels = padded((self._summaries[split][index] for index in indices), IGNORE_INDEX)
        lengths = torch.from_numpy(self._documents[split].lengths[sources])
        return {
            "input_ids": documents,
            "attention_mask": (torch.arange(documents.shape[1]) < lengths[:, None]).long(),
            "decoder_input_ids": shift_right(labels, start=self._config.decoder_start_token_id, pad=pad),
            "labels": labels,
        }

    def _build_tokenizer(self, train: Sequence[Example]) -> Any:
        model = self._model
        if model.name is not None:
            tokenizer = pretrained_tokenizer(model.name, pretrained_config(model.name))
            require_padding(tokenizer, model.name)
            return tokenizer
        assert model.vocabulary is not None  # the recipe has seen to it
        assert model.lowercase is not None
        texts = [text for example in train for text in (example.document, example.summaries[0])]
        return learned_tokenizer(texts, model.vocabulary, lowercase=model.lowercase)

    def _build_config(self) -> Any:
        lengths = {
            "data.document_tokens": self._data.document_tokens,
            "data.summary_tokens": self._data.summary_tokens,
            "decoding.max_length": self._decoding.max_length + 2,  # with what begins and ends a summary
        }
        name = self._model.name
        config: Any
        if name is None:
            config = small_config(self._model, self._tokenizer, positions=max(lengths.values()))
        else:
            config = pretrained_config(name)
            _require_positions(lengths, config, name)
        set_rates(config, self._model.rates(), RATE_NAMES)
        return config

    def _require_content(self, split: str, examples: Sequence[Example]) -> None:
        documents, summaries = self._documents[split], self._summaries[split]
        sides = (
            (documents, [example.document for example in examples], "document_tokens"),
            (summaries, [example.summaries[0] for example in examples], "summary_tokens"),
        )
        for tokens, texts, key in sides:
            limit = (f"data.{key}", getattr(self._data, key))
            require_content(
                tokens.ids, tokens.lengths, texts, self._tokenizer, split=split, model=self._model.name, limit=limit
            )

    def _tokenize_documents(self, examples: Sequence[Example]) -> TokenSequences:
        texts = [self._data.prefix + example.document for example in examples]
        return self._tokenize(texts, self._data.document_tokens, "text")

    def _tokenize_summaries(self, examples: Sequence[Example]) -> TokenSequences:
        texts = [example.summaries[0] for example in examples]
        return self._tokenize(texts, self._data.summary_tokens, "text_target")

    def _tokenize(self, texts: list[str], longest: int, kind: str) -> TokenSequences:
        def parts() -> Iterator[Columns]:
            for some in in_parts(texts):
                encoded = self._tokenizer(**{kind: some}, truncation=True, max_length=longest)
                yield {"input_ids": encoded["input_ids"]}

        content = tokenizer_content(self._tokenizer) if is_large(len(texts)) else None
        if content is not None:
            content |= {"kind": kind, "longest": longest, "texts": text_digest(texts)}
        return columns_of(parts, content)["input_ids"]


def _require_positions(lengths: dict[str, int], config: Any, name: str) -> None:
    for key, length in lengths.items():
        half = "encoder" if key == "data.document_tokens" else "decoder"  # they differ in LED
        positions = getattr(config, f"max_{half}_position_embeddings", getattr(config, "max_position_embeddings", None))
        if positions is not None and length > positions:  # relative positions have no last one
            raise RecipeError(key, f"must be at most {positions}, the positions of {name}", value=length)

"""Classes of texts, or numbers for them, by an encoder with a classifier on top: GLUE, and files of your own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rdrop import cross_entropy, squared_difference, squared_error, symmetric_kl
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder.predictions import Predictions, class_rows, number_predictions
from rdrop.experiments.tasks.class_scores import note_on_predictions, notes_on_classes, prediction_spread
from rdrop.experiments.tasks.pretrained import most_tokens, require_rows, try_out
from rdrop.experiments.tasks.share import ALONE
from rdrop.experiments.tasks.spelling import note_on_case
from rdrop.experiments.tasks.splits import few_labels, note_on_few, notes_on_repeats
from rdrop.experiments.tasks.task import Batch
from rdrop.experiments.tasks.text_classification.data import LabeledTexts, load_labeled_texts
from rdrop.experiments.tasks.text_classification.glue import GLUE
from rdrop.experiments.tasks.text_classification.models import (
    classifier,
    configuration,
    learned_tokenizer,
    pretrained_tokenizer,
    start_at,
)
from rdrop.experiments.tasks.text_classification.scores import constant_scores, score_texts
from rdrop.experiments.tasks.token_cache import columns_of, is_large, text_digest, tokenizer_content
from rdrop.experiments.tasks.token_sequences import PART, Columns, TokenSequences, padded
from rdrop.experiments.tasks.tokenizing import require_content
from rdrop.terms import Divergence, TaskLoss

if TYPE_CHECKING:
    from rdrop.experiments.tasks.text_classification.recipes import TextClassificationRecipe

EVALUATION_BATCH = 64
Inputs = dict[str, TokenSequences]


class TextClassification:
    """Texts are tokenized once, at the start; a batch is padded to the longest of its texts.

    `mismatched` is scored with the test split, as `accuracy_mismatched`: it is MNLI's second dev set.
    """

    task_loss: TaskLoss
    divergence: Divergence
    share = ALONE

    def __init__(self, recipe: TextClassificationRecipe, test: str | None = None) -> None:
        self.predictions: Predictions | None = None
        self.signs: dict[str, float] = {}
        data, self._model, self._max_length = recipe.data, recipe.model, recipe.data.max_length
        if data.regression:
            self.task_loss, self.divergence = squared_error, squared_difference
        else:
            self.task_loss, self.divergence = cross_entropy, symmetric_kl
        own_scores = ("pearson", "spearman") if data.regression else ("accuracy", "f1_macro")
        self._scores = GLUE[data.glue].scores if data.glue else own_scores
        self.metric = self._scores[0]
        self.unlabeled_per_update = data.unlabeled_batch

        splits = load_labeled_texts(data, test, recipe.seed)
        pool = np.arange(len(splits.train))
        labeled = few_labels(pool, splits.train.labels, data.labels, recipe.seed, "the training data")
        splits = replace(splits, train=splits.train.take(labeled))
        self.classes = splits.classes
        self._tokenizer = self._build_tokenizer(splits.train)
        texts = {"train": splits.train, "valid": splits.valid, "test": splits.test}
        if splits.mismatched is not None:
            texts["mismatched"] = splits.mismatched
        if splits.unlabeled is not None:
            texts["unlabeled"] = splits.unlabeled
        self._inputs = {name: self._tokenized(split) for name, split in texts.items()}
        for name, split in texts.items():
            self._require_content(name, split)
        self._labels = {name: _label_tensor(split.labels) for name, split in texts.items()}
        self._tests = splits.test
        self.notes = self._notes_on_data(texts)

    def _notes_on_data(self, texts: Mapping[str, LabeledTexts]) -> dict[str, str]:
        notes = notes_on_repeats({split: own.examples() for split, own in texts.items()}, "texts")
        notes |= note_on_few({split: len(own) for split, own in texts.items()}, "texts")
        if self.classes:
            labels = {split: own.labels for split, own in texts.items() if split != "unlabeled"}
            notes |= note_on_case(self.classes) | notes_on_classes(self.classes, labels)
        else:
            notes |= _note_on_scale(texts["train"].labels)
        return notes

    def build_model(self) -> nn.Module:
        name = self._model.name
        model = classifier(name, configuration(self._model, self._tokenizer, self.classes, self._max_length))
        if name is not None:
            self._require_room(model, name)
            try_out(model, name, lambda: self._require_padding_without_effect(model, name))
        if self._model.start_at_mean and not self.classes:
            start_at(model, float(self._labels["train"].mean()), name)
        return model

    def _require_padding_without_effect(self, model: nn.Module, name: str) -> None:
        """Refuses a model whose logits of a text depend on the longer ones beside it, if the folder can be mended."""
        lengths = self._inputs["train"]["input_ids"].lengths
        rows = [int(lengths.argmin()), int(lengths.argmax())]
        alone, beside = (self.logits(model, self._batch("train", own)) for own in (rows[:1], rows))
        if (alone[0] - beside[0]).abs().max() <= MOST_OF_PADDING * beside.abs().max():
            return
        own, pad, side = (
            cast(Any, model.config).pad_token_id,
            self._tokenizer.pad_token_id,
            self._tokenizer.padding_side,
        )
        if own == pad and side == "right":
            self.notes |= {"padding": f"{name} reads it, so that its scores depend on which texts share a batch"}
            return
        rule = (
            f"its logits of a text depend on the padding beside it: config.json has pad_token_id {own}, and the "
            f"tokenizer pads with {pad} on the {side}; in a copy of the folder, set pad_token_id to {pad} in "
            'config.json, and padding_side to "right" in tokenizer_config.json'
        )
        raise RecipeError("model.name", rule, value=name)

    def train_size(self) -> int:
        return len(self._labels["train"])

    def unlabeled_size(self) -> int:
        return len(self._labels.get("unlabeled", ()))

    def train_lengths(self) -> NDArray[np.int64]:
        return self._inputs["train"]["input_ids"].lengths

    def unlabeled_lengths(self) -> NDArray[np.int64]:
        return self._inputs["unlabeled"]["input_ids"].lengths

    def special_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.all_special_ids)

    def names_of_ids(self) -> list[str]:
        return [*self._tokenizer.convert_ids_to_tokens(range(len(self._tokenizer))), *self.classes]

    def unknown_id(self) -> int | None:
        unknown: int | None = self._tokenizer.unk_token_id
        return unknown

    def train_batch(self, indices: list[int], epoch: int) -> Batch:
        return self._batch("train", indices)

    def unlabeled_batch(self, indices: list[int], epoch: int) -> Batch:
        return self._batch("unlabeled", indices)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        return logits

    def labels(self, batch: Batch) -> Tensor:
        """Returns class indices `(N,)`, or the numbers to predict, `(N, 1)`."""
        labels: Tensor = batch["labels"]
        return labels

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        scores = self._evaluate(model, split)
        if split == "test" and "mismatched" in self._labels:
            scores["accuracy_mismatched"] = self._evaluate(model, "mismatched")["accuracy"]
        return scores

    def _evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        device = next(model.parameters()).device
        order = np.argsort(self._inputs[split]["input_ids"].lengths, kind="stable")  # length bucketing: little padding

        def of_batch(rows: NDArray[np.int64]) -> Tensor:
            batch = {name: value.to(device) for name, value in self._batch(split, rows.tolist()).items()}
            return self.logits(model, batch).float().cpu()

        batches = np.array_split(order, -(-len(order) // EVALUATION_BATCH))
        logits, labels = torch.cat(self.share.map(of_batch, batches)), self._labels[split][order]
        if split == "valid":
            self.signs = prediction_spread(logits.numpy(), labels.numpy())
        if split == "test":
            if self.classes:
                predicted = logits.argmax(-1).numpy()
                self.notes |= note_on_predictions(split, self.classes, predicted, labels.numpy())
            self.predictions = self._predictions(logits[np.argsort(order)].numpy())
        names, targets = ((*self._scores, "ece"), labels) if self.classes else (self._scores, labels[:, 0])
        return {
            "loss": self.task_loss(logits, labels).mean().item(),
            **score_texts(names, logits.numpy(), targets.numpy()),
        }

    def _predictions(self, outputs: NDArray[Any]) -> Predictions:
        examples = map(" / ".join, zip(self._tests.first, *filter(None, (self._tests.second,)), strict=True))
        if not self.classes:
            return number_predictions(examples, outputs[:, 0], self._tests.labels)
        return Predictions("classes", class_rows(examples, outputs, self._tests.labels), self.classes)

    def constant_scores(self) -> dict[str, float]:
        return constant_scores(self._scores, self._tests.labels)

    # ----------------------------------------------------------------------------------------------------- the tokens

    def _build_tokenizer(self, train: LabeledTexts) -> Any:
        if self._model.name is None:
            assert self._model.vocabulary is not None  # the recipe has seen to it
            return learned_tokenizer([*train.first, *(train.second or ())], self._model.vocabulary)
        tokenizer = pretrained_tokenizer(self._model.name)
        if self._max_length > tokenizer.model_max_length:
            rule = f"must be at most what {self._model.name} can read (={tokenizer.model_max_length})"
            raise RecipeError("data.max_length", rule, value=self._max_length)
        return tokenizer

    def _require_content(self, split: str, texts: LabeledTexts) -> None:
        inputs = self._inputs[split]["input_ids"]
        require_content(
            inputs.ids,
            inputs.lengths,
            texts.examples(),
            self._tokenizer,
            split=split,
            model=self._model.name,
            limit=("data.max_length", self._max_length),
        )

    def _require_room(self, model: nn.Module, name: str) -> None:
        """Refuses a pre-trained model that cannot read the texts: too few rows in an embedding, too few positions."""
        tokens = [inputs["input_ids"] for inputs in self._inputs.values()]
        require_rows(model, name, max(self._tokenizer.pad_token_id, *(int(own.ids.max()) for own in tokens)))
        config: Any = model.config
        kinds = [int(own["token_type_ids"].ids.max()) for own in self._inputs.values() if "token_type_ids" in own]
        if kinds and 0 < (getattr(config, "type_vocab_size", None) or 0) <= max(kinds):
            rule = f"its tokenizer gives token types up to {max(kinds)}, and it knows {config.type_vocab_size}"
            raise RecipeError("model.name", rule, value=name)
        longest_of_each = [own[int(own.lengths.argmax())] for own in tokens]
        longest = torch.tensor(max(longest_of_each, key=len))[None]
        known = getattr(config, "max_position_embeddings", None)
        # RoBERTa's positions begin after that of its padding.
        if known is None or longest.shape[1] < known - (config.pad_token_id or 0):
            return
        most = most_tokens(model, lambda size: model(input_ids=longest[:, :size]), longest.shape[1])
        if most < longest.shape[1]:
            rule = (
                f"must be at most {most}, which is what {name} can read; the longest text has {longest.shape[1]} tokens"
            )
            raise RecipeError("data.max_length", rule, value=self._max_length)

    def _tokenized(self, texts: LabeledTexts) -> Inputs:
        def parts() -> Iterator[Columns]:
            for start in range(0, len(texts), PART):
                part = slice(start, start + PART)
                second = None if texts.second is None else texts.second[part]
                yield self._tokenizer(
                    texts.first[part], second, truncation=True, max_length=self._max_length, return_attention_mask=False
                )

        content = tokenizer_content(self._tokenizer) if is_large(len(texts)) else None
        if content is not None:
            digests = [text_digest(column) for column in (texts.first, texts.second) if column is not None]
            content |= {"longest": self._max_length, "texts": digests}
        return columns_of(parts, content)

    def _batch(self, split: str, rows: list[int]) -> Batch:
        tokenizer = self._tokenizer
        padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        inputs = {name: [values[row] for row in rows] for name, values in self._inputs[split].items()}
        inputs["attention_mask"] = [[1] * len(ids) for ids in inputs["input_ids"]]
        batch: Batch = {
            name: padded(values, padding.get(name, 0), tokenizer.padding_side) for name, values in inputs.items()
        }
        return {**batch, "labels": self._labels[split][rows]}


def _label_tensor(labels: NDArray[Any]) -> Tensor:
    return torch.from_numpy(labels)[:, None] if labels.dtype == np.float32 else torch.from_numpy(labels)


MOST_OF_PADDING = 1e-3
"""Of the largest logit, which padding may change by rounding."""
LEAST_SPREAD, LARGEST_SPREAD = 0.03, 30.0
"""Standard deviations of the numbers to predict outside of which a note is made. The thresholds are ours."""


def _note_on_scale(labels: NDArray[np.generic]) -> dict[str, str]:
    """Returns a note where the numbers to predict spread far more, or far less, than what a new network gives."""
    spread = float(np.std(labels.astype(np.float64)))
    if not spread or LEAST_SPREAD <= spread <= LARGEST_SPREAD:
        return {}
    unit = f"{10.0 ** round(math.log10(spread)):,.12g}"
    return {
        "scale of the labels": f"their standard deviation is {spread:,.3g}, and the outputs of a new network differ by "
        f"about 1, so it may learn nothing: divide the labels by {unit}"
    }

"""Language modeling by a decoder-only Transformer of transformers, scored by perplexity."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, GPT2Model

from rdrop import cross_entropy, symmetric_kl
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.tasks.class_scores import constant_class_scores
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.language_modeling.adaptive import AdaptiveLanguageModel, Clusters, band_widths
from rdrop.experiments.tasks.language_modeling.data import load_lines, place_of
from rdrop.experiments.tasks.language_modeling.tokens import (
    WITHOUT_END,
    PieceVocabulary,
    SymbolVocabulary,
    Tokens,
    Vocabulary,
    characters,
    characters_alone,
    encoded,
    learned_pieces,
    pretrained_pieces,
    words,
)
from rdrop.experiments.tasks.pretrained import (
    loading,
    pretrained_config,
    pretrained_model,
    pretrained_tokenizer,
    require_rows,
    set_rates,
    try_out,
)
from rdrop.experiments.tasks.share import ALONE
from rdrop.experiments.tasks.splits import notes_on_repeats
from rdrop.experiments.tasks.task import Batch
from rdrop.experiments.tasks.tokenizing import mostly_unknown
from rdrop.terms import Divergence, TaskLoss

if TYPE_CHECKING:
    from rdrop.experiments.tasks.language_modeling.recipes import LanguageModelingRecipe

IGNORE_INDEX = -100
LONG_LINE = 20  # characters; shorter ones, such as headings, recur in any text
MOST_TOKENS_OF_A_WORD = 60
"""In the mean: above, the perplexity by word of a new model of 50,000 tokens is above 1e280."""
TRIED_TOKENS = 8  # of a pre-trained model's first forward
MOST_LEAKED = 1e-3
"""How far logits may move, as a share of their spread, when a later token changes: by rounding."""
EVALUATION_LOGITS = 2**25  # computed at once: 128 MB
LONGEST_EVALUATION_BATCH = 64

RATE_NAMES = {
    "dropout": (
        *("resid_pdrop", "resid_dropout", "hidden_dropout", "hidden_dropout_prob", "residual_dropout", "dropout"),
        "mlp_dropout",
    ),
    "embedding_dropout": ("embd_pdrop", "emb_pdrop", "embedding_dropout", "embed_dropout"),
    "attention_dropout": ("attn_pdrop", "attention_dropout", "attention_probs_dropout_prob"),
}
"""What the configurations of transformers' causal language models call each of our rates."""


class Window(NamedTuple):
    """The model predicts the tokens `start` to `stop` of a text; those from `scored` on count."""

    start: int
    stop: int
    scored: int


class LanguageModeling:
    """An example is a block of `data.block_size` neighboring tokens, each predicted from those before it in the block.

    The first of a block is predicted from the last of the block before. So an epoch predicts every token once.
    """

    metric = "perplexity"
    task_loss: TaskLoss
    divergence: Divergence
    share = ALONE

    def __init__(self, recipe: LanguageModelingRecipe, test: str | None = None) -> None:
        self._data, self._model, self._test = recipe.data, recipe.model, test
        self._config: Any = None if recipe.model.name is None else self._pretrained_config(recipe.model.name)
        texts = load_lines(recipe.data, test)
        self._vocabulary = self._build_vocabulary(texts["train"])
        self._tokens = {split: self._encoded(lines, split) for split, lines in texts.items()}
        long_lines = {split: [line for line in lines if len(line) >= LONG_LINE] for split, lines in texts.items()}
        unit = f"lines of {LONG_LINE} characters or more"
        self.notes = self._note_on_units() | self._unknown_tokens() | notes_on_repeats(long_lines, unit)
        self._clusters = self._build_clusters()
        self.task_loss = cross_entropy if self._clusters is None else self._clusters.cross_entropy
        self.divergence = symmetric_kl if self._clusters is None else self._clusters.divergence

    def build_model(self) -> nn.Module:
        model = self._model
        if model.name is not None:
            pretrained = pretrained_model(model.name, AutoModelForCausalLM, self._config)
            largest = max(self._vocabulary.start_id, *(int(tokens.ids.max()) for tokens in self._tokens.values()))
            require_rows(pretrained, model.name, largest)
            inputs = {"input_ids": self.train_batch([0], 0)["input_ids"][:, :TRIED_TOKENS]}
            try_out(pretrained, model.name, lambda: self._require_causal(pretrained, inputs["input_ids"]))
            return pretrained
        if self._clusters is None:
            return GPT2LMHeadModel(self._gpt2_config(self._vocabulary.size))
        assert model.adaptive_factor is not None  # the recipe has seen to it
        assert model.adaptive_tied is not None
        assert model.softmax_dropout is not None
        return AdaptiveLanguageModel(
            GPT2Model(self._gpt2_config(vocabulary=1)),  # its embedding is replaced
            self._clusters,
            factor=model.adaptive_factor,
            dropout=model.softmax_dropout,
            tied=model.adaptive_tied,
        )

    def _require_causal(self, model: nn.Module, ids: Tensor) -> None:
        """Refuses a model whose logits of a position depend on a later token: on the one to predict."""
        other = ids.clone()
        other[:, -1] = ids[:, -1] + 1 if int(ids[0, -1]) == 0 else ids[:, -1] - 1
        earlier, changed = (self.logits(model, {"input_ids": own})[:, :-1] for own in (ids, other))
        if earlier.numel() and (earlier - changed).abs().max() > MOST_LEAKED * earlier.std():
            rule = (
                "reads the tokens that it is to predict; give a causal model, or set is_decoder to true in config.json"
            )
            raise RecipeError("model.name", rule, value=self._model.name)

    def train_size(self) -> int:
        return -(-len(self._tokens["train"].ids) // self._data.block_size)

    def train_lengths(self) -> NDArray[np.int64]:
        lengths = np.full(self.train_size(), self._data.block_size, dtype=np.int64)
        lengths[-1] = len(self._tokens["train"].ids) - (len(lengths) - 1) * self._data.block_size
        return lengths

    def train_batch(self, indices: list[int], epoch: int) -> Batch:
        size, length = self._data.block_size, len(self._tokens["train"].ids)
        return self._batch("train", [Window(i * size, min((i + 1) * size, length), i * size) for i in indices])

    def special_ids(self) -> frozenset[int]:
        return self._vocabulary.special_ids

    def names_of_ids(self) -> list[str]:
        return self._vocabulary.symbols

    def unknown_id(self) -> int | None:
        return self._vocabulary.unknown_id

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    def labels(self, batch: Batch) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Returns `loss` by token, and the perplexity by word: `exp(loss * tokens / words)`.

        An end of line is a word. Where characters are the tokens, or the text has no spaces, it is by character.
        """
        device = next(model.parameters()).device
        tokens = self._tokens[split]

        def of_batch(windows: list[Window]) -> float:
            batch = {name: tensor.to(device) for name, tensor in self._batch(split, windows).items()}
            labels = batch.pop("labels")
            counted = labels != IGNORE_INDEX
            logits = self.logits(model, batch)[counted].float()
            return self.task_loss(logits, labels[counted]).sum(dtype=torch.float64).item()

        total = 0.0
        for loss in self.share.map(of_batch, list(self._evaluation_batches(len(tokens.ids)))):
            total += loss
        return {"loss": total / len(tokens.ids), "perplexity": _exp(total / tokens.units)}

    def constant_scores(self) -> dict[str, float]:
        """Returns the scores of the unigram model of the test split: the share of each token, whatever is before it."""
        tokens = self._tokens["test"]
        loss = constant_class_scores(tokens.ids)["loss"]
        return {"loss": loss, "perplexity": _exp(loss * len(tokens.ids) / tokens.units)}

    def _evaluation_batches(self, length: int) -> Iterator[list[Window]]:
        size = EVALUATION_LOGITS // (self._data.block_size * self._vocabulary.size)
        size = min(max(size, 1), LONGEST_EVALUATION_BATCH)
        windows = evaluation_windows(length, self._data.block_size, self._data.context)
        for first in range(0, len(windows), size):
            yield windows[first : first + size]

    def _batch(self, split: str, windows: list[Window]) -> Batch:
        """Returns `input_ids` and `labels` `(N, T)`: a label is the token after its input, or -100."""
        ids, start_id = self._tokens[split].ids, self._vocabulary.start_id
        longest = max(window.stop - window.start for window in windows)
        inputs = np.full((len(windows), longest), start_id, dtype=np.int64)  # what pads the end, nothing looks at
        labels = np.full((len(windows), longest), IGNORE_INDEX, dtype=np.int64)
        for row, (start, stop, scored) in enumerate(windows):
            inputs[row, : stop - start] = np.append(ids[start - 1] if start else start_id, ids[start : stop - 1])
            labels[row, scored - start : stop - start] = ids[scored:stop]
        return {"input_ids": torch.from_numpy(inputs), "labels": torch.from_numpy(labels)}

    def _encoded(self, lines: list[str], split: str) -> Tokens:
        tokens = encoded(self._vocabulary, lines)
        if len(tokens.ids) == 0:
            raise DataError(f"the {split} split has no tokens; give it text")
        lost = mostly_unknown(tokens.ids, self._vocabulary.special_ids, self._vocabulary.unknown_id)
        if lost is not None and self._model.name is not None:
            rule = f"its tokenizer loses the text of {split}: {lost}; give a model for such text"
            raise RecipeError("model.name", rule, value=self._model.name)
        if lost is not None and (self._data.min_count or 0) > 1:
            rule = f"leaves little of {split}: {lost}; lower it, give more text like it to train on, or set data.tokens"
            raise RecipeError("data.min_count", rule, value=self._data.min_count)
        if lost is not None:
            instead = "set data.tokens=bpe data.min_count=null data.vocabulary=8000"
            rule = f"leaves little of {split}: {lost}; give more text like it to train on, or {instead}"
            raise RecipeError("data.tokens", rule, value=self._data.tokens)
        if len(tokens.ids) > MOST_TOKENS_OF_A_WORD * tokens.units:
            line = max(lines, key=_longest_word)
            raise DataError(
                f"{place_of(line, split, self._data, self._test)}: the longest word has {_longest_word(line)} "
                f"characters, and a word of {split} {len(tokens.ids) // tokens.units} tokens in the mean, so that its "
                "perplexity would be beyond any number; divide the words by spaces, or train "
                "language-modeling-from-scratch with data.tokens=characters data.vocabulary=null"
            )
        return tokens

    def _note_on_units(self) -> dict[str, str]:
        if not isinstance(self._vocabulary, PieceVocabulary):
            return {}
        units = self._vocabulary.units
        by_character = "by character, as the text has no spaces" if units in (characters, characters_alone) else ""
        without = "without ends of lines, which the tokenizer drops" if units in WITHOUT_END.values() else ""
        note = "; ".join(filter(None, (by_character, without)))
        return {"perplexity": note} if note else {}

    def _unknown_tokens(self) -> dict[str, str]:
        """Counts them for a note: a text in which many words are one and the same is easier to predict."""
        unknown = self._vocabulary.unknown_id
        if unknown is None:
            return {}
        counts = (f"{split} {np.count_nonzero(tokens.ids == unknown)}" for split, tokens in self._tokens.items())
        return {"unknown tokens": ", ".join(counts)}

    def _build_vocabulary(self, train: list[str]) -> Vocabulary:
        data, name = self._data, self._model.name
        if name is not None:
            tokenizer = pretrained_tokenizer(name, self._config)
            with loading(name):
                return pretrained_pieces(tokenizer, self._config.get_text_config().vocab_size, train)
        if data.tokens == "bpe":
            assert data.vocabulary is not None  # the recipe has seen to it
            return learned_pieces(train, data.vocabulary)
        if data.tokens == "characters":
            return SymbolVocabulary(train, characters)
        assert data.min_count is not None
        return SymbolVocabulary(train, words, data.min_count)

    def _build_clusters(self) -> Clusters | None:
        model, cutoffs, size = self._model, self._model.adaptive_cutoffs, self._vocabulary.size
        if cutoffs is None:
            return None
        if cutoffs[-1] >= size:
            rule = f"must end below the number of words in the vocabulary (={size})"
            raise RecipeError("model.adaptive_cutoffs", rule, value=cutoffs)
        assert model.hidden_size is not None  # the recipe has seen to it
        assert model.adaptive_factor is not None
        try:
            band_widths(len(cutoffs) + 1, model.hidden_size, model.adaptive_factor)
        except ValueError as error:
            raise RecipeError("model.adaptive_factor", str(error), value=model.adaptive_factor) from None
        return Clusters(tuple(cutoffs), size)

    def _gpt2_config(self, vocabulary: int) -> GPT2Config:
        model = self._model
        sizes: dict[str, Any] = {
            "n_positions": self._data.block_size,
            "n_embd": model.hidden_size,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_inner": model.intermediate_size,
        }
        config = GPT2Config(vocab_size=vocabulary, **sizes, bos_token_id=None, eos_token_id=None, use_cache=False)
        set_rates(config, self._rates(), RATE_NAMES)
        return config

    def _pretrained_config(self, name: str) -> Any:
        config = pretrained_config(name, AutoModelForCausalLM, "causal language model")
        text: Any = config.get_text_config()  # of a model that reads images too, the part that writes
        longest = getattr(text, "max_position_embeddings", None)
        if longest is not None and self._data.block_size > longest:
            raise RecipeError(
                "data.block_size", f"must be at most {longest}, the positions of {name}", value=self._data.block_size
            )
        set_rates(text, self._rates(), RATE_NAMES)
        return config

    def _rates(self) -> dict[str, float | None]:
        return {name: getattr(self._model, name) for name in RATE_NAMES}


def evaluation_windows(length: int, size: int, context: int) -> list[Window]:
    """Lays windows of at most `size` tokens that score each of `length` tokens once, `context` or more before it.

    A token has fewer before it only where the text has no more.

        evaluation_windows(9, size=4, context=2)  # 0-4, 2-6 from 4, 4-8 from 6, 6-9 from 8
    """
    windows = [Window(0, min(size, length), 0)]
    while (scored := windows[-1].stop) < length:
        start = scored - context
        windows.append(Window(start, min(start + size, length), scored))
    return windows


def _longest_word(line: str) -> int:
    return max(map(len, line.split()), default=0)


def _exp(value: float) -> float:
    """Returns infinity where it overflows, which stops the run in words."""
    return math.exp(value) if value < 709 else math.inf

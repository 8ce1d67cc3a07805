"""Tokenizers of the tasks that read text: a byte-level BPE learned from the training texts; what becomes of texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, __version__, decoders, models, normalizers, pre_tokenizers, trainers

from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.tasks.token_cache import cached, is_large, text_digest

LEARNED = "tokenizer.json"
COMPARED = 10_000
"""Texts of which two that become the same are looked for."""
LONGEST_WORD = 10_000
"""In characters. What is longer, such as base64 in crawled text, is learned from in pieces: learning is quadratic in
the length of a word, and one of 900 kB would take minutes."""
_TOO_LONG = re.compile(rf"\S{{{LONGEST_WORD}}}(?=\S)")


def with_short_words(texts: Iterable[str]) -> Iterator[str]:
    """Yields the texts, with a space in words that are longer than `LONGEST_WORD` after each piece of that length."""
    for text in texts:
        yield _TOO_LONG.sub(r"\g<0> ", text) if len(text) > LONGEST_WORD else text


def learned_bpe(
    texts: Sequence[str],
    vocabulary: int,
    special_tokens: Sequence[str],
    *,
    unknown: str | None = None,
    lowercase: bool = False,
    add_prefix_space: bool = True,
) -> Tokenizer:
    """Learns a byte-level BPE of at most `vocabulary` entries, or of the special tokens and the 256 bytes alone.

    It knows any text: the bytes are always in it. The same texts give the same tokenizer, which BERT's own WordPiece
    does not promise: its trainer numbers the letters inside words in an order that changes from run to run. Of a word
    that is longer than `LONGEST_WORD` it learns the pieces. What it learned from many texts is kept on disk.
    `add_prefix_space` makes the first word one like any other.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=unknown))
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    learn = partial(tokenizer.train_from_iterator, trainer=trainer)
    if not is_large(len(texts)):
        learn(with_short_words(texts))
        return tokenizer
    settings = {"vocabulary": vocabulary, "special tokens": special_tokens, "untrained": tokenizer.to_str()}
    content = settings | {"texts": text_digest(texts), "longest word": LONGEST_WORD, "tokenizers": __version__}

    def make(folder: Path) -> None:
        learn(with_short_words(texts))
        tokenizer.save(str(folder / LEARNED))

    return Tokenizer.from_file(str(cached(content, make) / LEARNED))


def require_content(
    ids: NDArray[np.int32],
    lengths: NDArray[np.int64],
    texts: Iterable[Hashable],
    tokenizer: Any,
    *,
    split: str,
    model: str | None,
    limit: tuple[str, int],
) -> None:
    """Raises `RecipeError` if texts do not reach the model with what they say: unknown tokens, or those of others.

    `ids` are the tokens of all texts of a split in a row, `lengths` how many each has, cut to `limit`, a key of the
    recipe with its value. `model` is the pre-trained one that has the tokenizer.
    """
    key, longest = limit
    if lengths.max() > longest:  # tokenizers cut no special tokens, and then nothing
        raise RecipeError(key, f"leaves no room for the texts of {split} beside the special tokens", value=longest)
    lost, is_cut = mostly_unknown(ids, tokenizer.all_special_ids, _own_unknown_id(tokenizer)), False
    if lost is None:
        lost, is_cut = _mostly_the_same(ids, lengths, texts, longest)
    if lost is None:
        return
    if model is None or is_cut:
        raise RecipeError(key, f"is too little for the texts of {split}: {lost}", value=longest)
    rule = f"its tokenizer loses the texts of {split}: {lost}; give a model for such texts, with its own tokenizer"
    raise RecipeError("model.name", rule, value=model)


def _mostly_the_same(
    ids: NDArray[np.int32], lengths: NDArray[np.int64], texts: Iterable[Hashable], longest: int
) -> tuple[str | None, bool]:
    """Says how many different texts become the same tokens, if it is most of them; and whether the cut does it.

    The first `COMPARED` texts are compared.
    """
    tokens_of: dict[Hashable, bytes] = {}
    end = 0
    for text, length in zip(islice(texts, COMPARED), lengths.tolist(), strict=False):
        tokens_of[text] = ids[end : end + length].tobytes()
        end += length
    (same, count), *_ = Counter(tokens_of.values()).most_common(1)
    if len(tokens_of) < 2 or 2 * count <= len(tokens_of):
        return None, False
    length = len(same) // ids.itemsize
    return f"{count} of {len(tokens_of)} different ones become the same {length} tokens", length >= longest


def mostly_unknown(ids: NDArray[np.int32], special: Collection[int], unknown: int | None) -> str | None:
    """Says how many tokens are unknown, if it is more than half of those that are not special; else None."""
    if unknown is None:
        return None
    count = np.count_nonzero(ids == unknown)
    known = np.count_nonzero(~np.isin(ids, [*special, unknown]))
    return f"{count} of {count + known} tokens are unknown" if count > known else None


def _own_unknown_id(tokenizer: Any) -> int | None:
    """Returns the id of what a tokenizer does not know; None where another token has it too, or there is none."""
    unknown: int | None = tokenizer.unk_token_id
    names = ("bos", "eos", "sep", "cls", "pad", "mask")
    return None if unknown in (getattr(tokenizer, f"{name}_token_id", None) for name in names) else unknown

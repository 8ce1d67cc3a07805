"""Makes token ids of lines of text: words, characters, a byte-level BPE learned here, or a model's own tokenizer.

The end of a line is a token, or part of one, as it is part of the text: `<eos>` among words, a newline elsewhere.
Where a text spells a special token, `<eos>` or `<|endoftext|>`, it is text like any other; but `<unk>` is the unknown
word, as WikiText has it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.tasks.spelling import is_unspaced
from rdrop.experiments.tasks.token_cache import cached, columns_of, is_large, text_digest, tokenizer_content
from rdrop.experiments.tasks.token_sequences import Columns, in_parts
from rdrop.experiments.tasks.tokenizing import learned_bpe

END, UNKNOWN = "<eos>\n", "<unk>"  # no word ends with a newline: an `<eos>` that a text has is another symbol
LINES_AT_ONCE = 1000
IDS, UNITS = "ids", "units"
SYMBOLS = "symbols.json"

Ids = NDArray[np.int32]


@dataclass(frozen=True)
class Tokens:
    """A text as the model reads it."""

    ids: Ids
    units: int
    """What its perplexity counts: words and ends of lines; of a vocabulary of characters, characters."""


class Vocabulary(Protocol):
    size: int
    symbols: list[str]
    """What each id stands for."""
    start_id: int
    """The token before the first one of a text."""
    special_ids: frozenset[int]

    @property
    def unknown_id(self) -> int | None: ...

    @property
    def content(self) -> dict[str, object] | None:
        """All that `encode` depends on, beside the lines, as JSON; None where that is not known."""

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each line."""

    def count_units(self, lines: Sequence[str], ids: list[list[int]]) -> int: ...


def encoded(vocabulary: Vocabulary, lines: Sequence[str]) -> Tokens:
    """Encodes a text. What many lines become is kept on disk."""
    if not lines:
        return Tokens(np.zeros(0, np.int32), 0)

    def parts() -> Iterator[Columns]:
        for some in in_parts(lines, LINES_AT_ONCE):
            ids = vocabulary.encode(some)
            yield {IDS: ids, UNITS: [[vocabulary.count_units(some, ids)]]}

    content = vocabulary.content if is_large(len(lines)) else None
    columns = columns_of(parts, None if content is None else content | {"lines": text_digest(lines)})
    return Tokens(columns[IDS].ids, int(columns[UNITS].ids.sum(dtype=np.int64)))


def count_symbols(train: Sequence[str], symbols_of: Callable[[str], list[str]], min_count: int) -> list[str]:
    """Returns the symbols of a text by falling count, then by alphabet, with `END` and `UNKNOWN`."""
    counts: Counter[str] = Counter({END: 0, UNKNOWN: 0})
    for line in train:
        counts.update(symbols_of(line))
    for symbol in [symbol for symbol, count in counts.items() if count < min_count and symbol not in (END, UNKNOWN)]:
        counts[UNKNOWN] += counts.pop(symbol)
    return sorted(counts, key=lambda symbol: (-counts[symbol], symbol))


def _kept_symbols(train: Sequence[str], symbols_of: Callable[[str], list[str]], min_count: int) -> list[str]:
    def make(folder: Path) -> None:
        (folder / SYMBOLS).write_text(json.dumps(count_symbols(train, symbols_of, min_count)))

    content = {"symbols": symbols_of.__name__, "min_count": min_count, "lines": text_digest(train)}
    symbols: list[str] = json.loads((cached(content, make) / SYMBOLS).read_text())
    return symbols


class SymbolVocabulary:
    """Words or characters, numbered by falling count in the training text, then by alphabet; and `<unk>` for others."""

    def __init__(self, train: Sequence[str], symbols_of: Callable[[str], list[str]], min_count: int = 1) -> None:
        self._symbols_of = symbols_of
        self.symbols = (_kept_symbols if is_large(len(train)) else count_symbols)(train, symbols_of, min_count)
        self._ids = {symbol: number for number, symbol in enumerate(self.symbols)}
        self.size = len(self.symbols)
        self.start_id, self.unknown_id = self._ids[END], self._ids[UNKNOWN]
        self.special_ids = frozenset({self.start_id, self.unknown_id})

    @property
    def content(self) -> dict[str, object]:
        return {"symbols": self._symbols_of.__name__, "known": text_digest(self.symbols)}

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        return [[self._ids.get(symbol, self.unknown_id) for symbol in self._symbols_of(line)] for line in lines]

    def count_units(self, lines: Sequence[str], ids: list[list[int]]) -> int:
        return sum(map(len, ids))


def words(line: str) -> list[str]:
    return [*line.split(), END]


def characters(line: str) -> list[str]:
    return [*line, "\n"]


def words_alone(line: str) -> list[str]:
    return line.split()


def characters_alone(line: str) -> list[str]:
    return [*line]


WITHOUT_END: dict[Callable[[str], list[str]], Callable[[str], list[str]]] = {
    words: words_alone,
    characters: characters_alone,
}
"""What a perplexity is by where a tokenizer drops the end of a line, which then costs nothing."""


class PieceVocabulary:
    """A tokenizer's pieces. The perplexity is still by word, comparable with that of words if none is unknown there.

    `units` divides a line into what the perplexity is by, if that is not `words`.
    """

    def __init__(
        self,
        encode: Callable[[list[str]], list[list[int]]],
        *,
        ids: dict[str, int],
        size: int,
        start_id: int,
        special_ids: Iterable[int],
        unknown_id: int | None,
        content: dict[str, object] | None,
        units: Callable[[str], list[str]],
    ) -> None:
        self._encode, self.units = encode, units
        self.content = None if content is None else content | {"units": units.__name__}
        self.size, self.start_id = size, start_id
        self.symbols = sorted(ids, key=ids.__getitem__)
        self.special_ids, self.unknown_id = frozenset(special_ids), unknown_id

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        return self._encode([f"{line}\n" for line in lines])

    def count_units(self, lines: Sequence[str], ids: list[list[int]]) -> int:
        return sum(len(self.units(line)) for line in lines)


def units_of(train: Sequence[str]) -> Callable[[str], list[str]]:
    """Returns what a perplexity of such text is by: `words`, or `characters` where its script has no spaces."""
    return characters if is_unspaced(train) else words


def learned_pieces(train: Sequence[str], size: int) -> PieceVocabulary:
    """Learns a `learned_bpe` of at most `size` pieces."""
    tokenizer = learned_bpe([f"{line}\n" for line in train], size, [END], add_prefix_space=False)
    content = {"tokenizer": json.loads(tokenizer.to_str())}
    tokenizer.encode_special_tokens = True
    end: Any = tokenizer.token_to_id(END)
    return PieceVocabulary(
        lambda lines: [encoding.ids for encoding in tokenizer.encode_batch(lines)],
        ids=tokenizer.get_vocab(),
        size=tokenizer.get_vocab_size(),
        start_id=end,
        special_ids=[end],
        unknown_id=None,
        content=content,
        units=units_of(train),
    )


def pretrained_pieces(tokenizer: Any, size: int, train: Sequence[str]) -> PieceVocabulary:
    """Wraps a tokenizer of transformers, loaded with `split_special_tokens`, for a model with `size` logits."""
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ValueError("the tokenizer must have a token for the beginning or the end of a text")

    def encode(lines: list[str]) -> list[list[int]]:
        found: list[list[int]] = tokenizer(lines, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    units, (with_end, without) = units_of(train), encode(["A\n", "A"])
    return PieceVocabulary(
        encode,
        ids=tokenizer.get_vocab(),
        size=size,
        start_id=start,
        special_ids=tokenizer.all_special_ids,
        unknown_id=tokenizer.unk_token_id,
        content=tokenizer_content(tokenizer),
        units=WITHOUT_END[units] if with_end == without else units,
    )

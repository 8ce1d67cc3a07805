"""Subwords of source and target together: byte-pair encoding, learned from the training text or given as codes.

Both give one shared vocabulary, whose first four ids are `<s>`, `<pad>`, `</s>` and `<unk>`. Both are functions of the
text they are made from and of nothing else, so nothing is saved beside a run: its recipe makes them again. Those of a
large text are kept beside its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from rdrop.experiments.tasks.files import AnyPath, DataError, read_lines
from rdrop.experiments.tasks.token_sequences import in_parts
from rdrop.experiments.tasks.tokenizing import with_short_words

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")  # fairseq's order
START, PAD, END, UNKNOWN = range(4)
WORD_END = "</w>"
TOKENIZER, USED = "tokenizer.json", "used.npy"


class Subwords(Protocol):
    """Text to ids and back. Special ids are never in what `encode` gives, but for the unknown one."""

    size: int
    """Of the vocabulary, special tokens included."""

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each line."""

    def decode(self, sentences: Sequence[Sequence[int]]) -> list[str]:
        """Returns the text of each list of ids, without special tokens."""

    def save(self, folder: Path) -> None:
        """Writes what the `load` of the class reads."""


class LearnedSubwords:
    """Learns at most `size` tokens from `lines`; what they encode, they decode to the same text.

    A word begins with a space. In text that is written as usual, punctuation is a word of its own (`tokenized` false);
    in text whose words are apart already, as Moses leaves them, only spaces separate (`tokenized` true).
    """

    def __init__(self, lines: Iterable[str], size: int, *, tokenized: bool) -> None:
        words = pre_tokenizers.Metaspace()
        tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS[UNKNOWN]))
        tokenizer.pre_tokenizer = (
            words if tokenized else pre_tokenizers.Sequence([words, pre_tokenizers.Punctuation("isolated")])
        )
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
        tokenizer.train_from_iterator(with_short_words(lines), trainer)
        self._use(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> LearnedSubwords:
        """Reads those that `save` wrote."""
        self = cls.__new__(cls)
        self._use(Tokenizer.from_file(str(folder / TOKENIZER)))
        return self

    def save(self, folder: Path) -> None:
        self._tokenizer.save(str(folder / TOKENIZER))

    def _use(self, tokenizer: Tokenizer) -> None:
        tokenizer.encode_special_tokens = True  # "</s>" in a text is these four characters
        self._tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size()

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(lines)]

    def decode(self, sentences: Sequence[Sequence[int]]) -> list[str]:
        decoded: list[str] = self._tokenizer.decode_batch([list(ids) for ids in sentences], skip_special_tokens=True)
        return decoded


class CodedSubwords:
    """The merges of a subword-nmt codes file, and those of their tokens that are in `lines`, the most frequent first.

    Splits as `subword-nmt apply-bpe` does; a token that `lines` do not have is unknown, as in fairseq's dictionary.
    Words must be apart already, by spaces.
    """

    def __init__(self, codes: AnyPath, lines: Iterable[str]) -> None:
        """`lines` are gone through twice."""
        merges = read_codes(codes)
        letters = sorted({letter for line in lines for letter in line})
        known = (SPECIAL_TOKENS[UNKNOWN], *letters, *(letter + WORD_END for letter in letters))
        parts = (part for first, second in merges for part in (first, second, first + second))
        places = {token: place for place, token in enumerate(dict.fromkeys((*known, *parts)))}
        model = models.BPE(places, merges, end_of_word_suffix=WORD_END, unk_token=SPECIAL_TOKENS[UNKNOWN])
        tokenizer = Tokenizer(model)
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()

        counts = np.zeros(len(places), dtype=np.int64)
        for part in in_parts(lines):
            split = chain.from_iterable(_split(tokenizer, part))
            counts += np.bincount(np.fromiter(split, np.int64), minlength=len(counts))
        counts[0] = 0
        order = np.argsort(-counts, kind="stable")
        self._use(tokenizer, order[: np.count_nonzero(counts)])

    @classmethod
    def load(cls, folder: Path) -> CodedSubwords:
        """Reads those that `save` wrote."""
        self = cls.__new__(cls)
        self._use(Tokenizer.from_file(str(folder / TOKENIZER)), np.load(folder / USED, allow_pickle=False))
        return self

    def save(self, folder: Path) -> None:
        self._tokenizer.save(str(folder / TOKENIZER))
        np.save(folder / USED, self._used)

    def _use(self, tokenizer: Tokenizer, used: NDArray[np.int64]) -> None:
        """Numbers the tokens of which `used` has the places in the vocabulary of `tokenizer`."""
        self._tokenizer, self._used = tokenizer, used
        places = tokenizer.get_vocab()
        self._ids = np.full(len(places), UNKNOWN)
        self._ids[used] = np.arange(len(used)) + len(SPECIAL_TOKENS)
        tokens = sorted(places, key=places.__getitem__)
        self._tokens = [""] * len(SPECIAL_TOKENS) + [tokens[place] for place in used]
        self.size = len(self._tokens)

    def encode(self, lines: Sequence[str]) -> list[list[int]]:
        return [self._ids[places].tolist() if places else [] for places in _split(self._tokenizer, lines)]

    def decode(self, sentences: Sequence[Sequence[int]]) -> list[str]:
        return ["".join(self._tokens[i] for i in ids).replace(WORD_END, " ").rstrip(" ") for ids in sentences]

    def token(self, i: int) -> str:
        """Returns the token as subword-nmt writes it: `@@` behind what does not end a word."""
        token = self._tokens[i]
        return token.removesuffix(WORD_END) if token.endswith(WORD_END) else f"{token}@@"


def _split(tokenizer: Tokenizer, lines: Sequence[str]) -> Iterator[list[int]]:
    # The fast method gives other tokens: it does not know the suffix.
    return (encoding.ids for encoding in tokenizer.encode_batch(lines))


def read_codes(path: AnyPath) -> list[tuple[str, str]]:
    """Reads the merges of a file of subword-nmt's version 0.2, in their order."""
    first, *lines = read_lines(path)
    if first != "#version: 0.2":
        raise DataError(f"{path}:1: must be '#version: 0.2', not {first[:40]!r}; make the codes with subword-nmt")
    merges = []
    for number, line in enumerate(lines, start=2):
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            raise DataError(f"{path}:{number}: must be two tokens with a space between them, not {line[:40]!r}")
        merges.append((parts[0], parts[1]))
    return merges

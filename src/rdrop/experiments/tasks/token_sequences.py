"""The token ids of a whole data set: storage, padding, length bucketing, and which pairs are trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

PART = 10_000  # sentences that are converted at once
IDS, LENGTHS = "ids.int32", "lengths.npy"

T = TypeVar("T")

Columns = Mapping[str, Sequence[Sequence[int]]]
"""What some texts become, by name: a list of ids of each."""


class TokenSequences:
    """Many lists of ids in two arrays, 4 bytes a token: WMT has 2 billion."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        parts, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
        for some in in_parts(sequences):
            lengths.append(_lengths_of(some))
            parts.append(_joined(some))
        self._set(np.concatenate(parts), np.concatenate(lengths))

    @classmethod
    def joined(cls, parts: Sequence[TokenSequences]) -> TokenSequences:
        """Puts the lists of several one after the other."""
        self = cls.__new__(cls)
        self._set(np.concatenate([part.ids for part in parts]), np.concatenate([part.lengths for part in parts]))
        return self

    @classmethod
    def load(cls, path: Path) -> TokenSequences:
        """Opens what a `TokenWriter` wrote to `path`. The ids stay on disk until they are read."""
        self = cls.__new__(cls)
        self._set(np.memmap(path / IDS, dtype=np.int32, mode="r"), np.load(path / LENGTHS, allow_pickle=False))
        return self

    def _set(self, ids: NDArray[np.int32], lengths: NDArray[np.int64]) -> None:
        self.lengths: NDArray[np.int64] = lengths
        self.ids: NDArray[np.int32] = ids
        """Those of all lists, one after the other."""
        self._ends = np.cumsum(lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> list[int]:
        end = self._ends[index]
        ids: list[int] = self.ids[end - self.lengths[index] : end].tolist()
        return ids


class TokenWriter:
    """Writes lists of ids to the folder `path`, which it makes, without keeping them in memory."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self._path, self._lengths = path, [np.zeros(0, np.int64)]
        self._ids = (path / IDS).open("wb")

    def append(self, some: Sequence[Sequence[int]]) -> None:
        self._lengths.append(_lengths_of(some))
        _joined(some).tofile(self._ids)

    def close(self) -> None:
        self._ids.close()
        np.save(self._path / LENGTHS, np.concatenate(self._lengths))


def _lengths_of(some: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    return np.fromiter(map(len, some), dtype=np.int64, count=len(some))


def _joined(some: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    return np.fromiter(chain.from_iterable(some), dtype=np.int32)


def usable(
    source: NDArray[np.int64], target: NDArray[np.int64], *, max_length: int, max_ratio: float | None
) -> tuple[NDArray[np.int64], dict[str, int]]:
    """Returns which training pairs are used, by their numbers of tokens; and how many are skipped for which reason.

    A pair is skipped for the first of these that is true: a side is empty; the longer side has more than `max_length`
    tokens; it has more than `max_ratio` times as many as the shorter. `read` is the sum of all others.
    """
    shorter, longer = np.minimum(source, target), np.maximum(source, target)
    empty = shorter == 0
    too_long = ~empty & (longer > max_length)
    uneven = np.zeros_like(empty) if max_ratio is None else ~empty & ~too_long & (longer > max_ratio * shorter)
    used = np.flatnonzero(~(empty | too_long | uneven))
    counts = {"read": len(source), "used": len(used)}
    return used, counts | {
        "skipped_empty": int(empty.sum()),
        "skipped_too_long": int(too_long.sum()),
        "skipped_uneven": int(uneven.sum()),
    }


def in_parts(items: Iterable[T], size: int = PART) -> Iterator[list[T]]:
    """Yields the items in lists of `size`, the last of them shorter."""
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part


def padded(sequences: Iterable[Sequence[int] | NDArray[np.int32]], value: int, side: str = "right") -> Tensor:
    """Joins sequences of ids to `(N, longest)`, int64, filled with `value` at one side of the shorter ones."""
    rows = [torch.as_tensor(ids, dtype=torch.long) for ids in sequences]
    return pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def batches_by_length(lengths: NDArray[np.int64], rows: Iterable[int], size: int) -> Iterator[list[int]]:
    """Yields the rows in batches of `size`, the longest first: what does not fit into memory shows at once."""
    return in_parts(sorted(rows, key=lambda row: -lengths[row]), size)

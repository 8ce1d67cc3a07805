"""Parallel text: where the pairs of a translation task come from, and which of them are trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from itertools import compress, count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from rdrop.experiments.randomness import derived_seed
from rdrop.experiments.tasks.files import DataError, MissingDataError, ParallelText, find_file, hub_text, load_hub
from rdrop.experiments.tasks.spelling import is_missing
from rdrop.experiments.tasks.splits import HUB_SPLITS, hold_out, require_count, require_different_files
from rdrop.experiments.tasks.tables import TABLES, read_table
from rdrop.experiments.tasks.token_cache import file_digest
from rdrop.experiments.tasks.translation.tiny import file_names, write_tiny_pairs

if TYPE_CHECKING:
    from rdrop.experiments.tasks.translation.recipes import TranslationData

PARQUET = "hf://datasets/{hub}@refs/convert/parquet/{config}/{split}/*.parquet"
READ_AT_ONCE = 10_000

Pair = tuple[str, str]
Place = Callable[[int, int], str]
"""Where a side (0 or 1) of a pair is: `file:line`."""


class AnyPairs(Protocol):
    """Pairs in order, as often as one likes."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Pair]: ...


class Pairs:
    """Sentences in two languages, in order; as often as one likes, for a training set need not fit into memory.

    `content` is JSON that tells the pairs from any others, made when it is asked for; None where that takes their text.
    """

    def __init__(
        self,
        where: str,
        pairs: AnyPairs,
        place: Place,
        *,
        lowercase: bool,
        content: Callable[[], object] | None = None,
    ) -> None:
        self.where, self.place, self.content = where, place, content
        self._pairs, self._lowercase = pairs, lowercase

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pair]:
        if not self._lowercase:
            return iter(self._pairs)
        return ((source.lower(), target.lower()) for source, target in self._pairs)

    def take(self, rows: NDArray[np.int64], split: str) -> Pairs:
        """Returns some of the pairs, which are a `split`; `rows` ascend."""
        of_all = self.content

        def place(row: int, side: int) -> str:
            return self.place(int(rows[row]), side)

        def content() -> object:
            assert of_all is not None
            return [of_all(), hashlib.sha256(rows.tobytes()).hexdigest()]

        return Pairs(
            f"{self.where} ({split})",
            _Some(self._pairs, rows),
            place,
            lowercase=self._lowercase,
            content=None if of_all is None else content,
        )

    def in_memory(self) -> Pairs:
        """Returns the same pairs, read now."""
        return Pairs(self.where, list(self._pairs), self.place, lowercase=self._lowercase)


class _Some:
    """The pairs in ascending `rows` of others."""

    def __init__(self, pairs: AnyPairs, rows: NDArray[np.int64]) -> None:
        self._pairs, self._size = pairs, len(rows)
        self._is_wanted = np.isin(np.arange(len(pairs)), rows, assume_unique=True)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Pair]:
        return compress(self._pairs, self._is_wanted.tobytes())


class HubPairs:
    """The pairs of a data set of the hub, read from its file when they are asked for."""

    def __init__(self, dataset: Any, where: str, source: str, target: str) -> None:
        self._where, self._dataset, self._languages = where, dataset, (source, target)
        self._nested = "translation" in dataset.column_names
        self._check_columns()

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Pair]:
        source, target = self._languages
        number = 0
        pairs: Iterable[tuple[object, object]]
        for rows in self._dataset.iter(READ_AT_ONCE):
            if self._nested:
                pairs = (
                    (sides[source], sides[target]) for sides in map(self._sides, rows["translation"], count(number))
                )
            else:
                pairs = zip(rows[source], rows[target], strict=True)
            for first, second in pairs:
                number += 1
                yield self._text(first, source, number), self._text(second, target, number)

    def _sides(self, value: object, row: int) -> dict[str, object]:
        """Returns both sides of a row that has them in one column."""
        if not isinstance(value, dict):
            raise DataError(f"{self.place(row, 0)}: translation has no pair; delete the row, or choose another split")
        return value

    def _text(self, value: object, language: str, number: int) -> str:
        """Returns one side of a pair; null is an empty one."""
        return "" if value is None else hub_text(value, f"{self._where}:{number}", language)

    def place(self, row: int, side: int) -> str:
        return f"{self._where}:{row + 1}"

    def content(self) -> object:
        return [self._dataset._fingerprint, *self._languages]

    def _check_columns(self) -> None:
        names = list(self._sides(self._dataset[0]["translation"], 0)) if self._nested else self._dataset.column_names
        for language in self._languages:
            if language not in names:
                raise DataError(
                    f"{self._where}:1: has no column {language!r}, only {', '.join(map(repr, names))}; "
                    "set data.source and data.target to two of them"
                )


def load_pairs(data: TranslationData, test: str | None = None, *, seed: int = 0) -> dict[str, Pairs]:
    """Loads the three splits, from the first source that the recipe sets; `test` from that file. Raises `DataError`.

    `seed` draws the `data.train_pairs` that are trained on.
    """
    splits = _load(data)
    if data.train_pairs is not None:
        splits["train"] = _drawn(splits["train"], data.train_pairs, seed)
    if test is not None:
        if data.train is not None:
            require_different_files({"train": _own_files(data, data.train), "test": _own_files(data, test)})
        splits["test"] = _own_split(data, test, "test")
    return {split: pairs if split == "train" else pairs.in_memory() for split, pairs in splits.items()}


def _drawn(train: Pairs, size: int, seed: int) -> Pairs:
    if size > len(train):
        raise DataError(f"{train.where}: has {len(train)} pairs; set data.train_pairs (={size}) to at most that")
    order = np.random.default_rng(derived_seed(seed, "train pairs")).permutation(len(train))
    return train.take(np.sort(order[:size]), "train")


def _load(data: TranslationData) -> dict[str, Pairs]:
    if data.tiny:
        with TemporaryDirectory(prefix="rdrop-") as folder:
            write_tiny_pairs(Path(folder), data)
            return {split: pairs.in_memory() for split, pairs in _folder_pairs(data, folder).items()}
    if data.train is not None:
        return _own_pairs(data, data.train)
    if data.folder is not None:
        return _counted(data, _folder_pairs(data, data.folder))
    if data.hub is not None:
        return _counted(data, _hub_pairs(data, data.hub))
    raise DataError(
        f"no data: set data.train to a table with the columns {data.source} and {data.target}, or data.folder to a "
        f"folder with {data.train_name}.{data.source}, {data.train_name}.{data.target} and so on, or data.hub; "
        "docs/tasks/translation.md says where to get them"
    )


def _counted(data: TranslationData, splits: dict[str, Pairs]) -> dict[str, Pairs]:
    """Returns the splits, if they have as many pairs as the recipe says."""
    for pairs, expected in zip(splits.values(), data.counts or (), strict=data.counts is not None):
        require_count(pairs.where, len(pairs), expected, "lines")
    return splits


def _folder_pairs(data: TranslationData, folder: str) -> dict[str, Pairs]:
    languages = (data.source, data.target)
    files = {
        split: [find_file(folder, f"{name}.{language}", f"{name}.tok.{language}") for language in languages]
        for split, name in file_names(data).items()
    }
    require_different_files(files, of_folder=True)
    return {split: _parallel_files(data, *pair) for split, pair in files.items()}


def _parallel_files(data: TranslationData, source: Path, target: Path) -> Pairs:
    def place(row: int, side: int) -> str:
        return f"{(source, target)[side]}:{row + 1}"

    def content() -> object:
        return [file_digest(source), file_digest(target)]

    return Pairs(str(source), ParallelText(source, target), place, lowercase=data.lowercase, content=content)


def _own_pairs(data: TranslationData, train: str) -> dict[str, Pairs]:
    """Reads own files. A split without one is held out of the training file."""
    own = {split: path for split, path in (("valid", data.valid), ("test", data.test)) if path is not None}
    require_different_files({split: _own_files(data, path) for split, path in ({"train": train} | own).items()})
    whole = _own_split(data, train, "train")
    rows = hold_out(len(whole), {"valid", "test"} - own.keys(), data.split_seed)
    return {split: whole.take(drawn, split) for split, drawn in rows.items()} | {
        split: _own_split(data, path, split) for split, path in own.items()
    }


def _own_files(data: TranslationData, path: str) -> list[Path]:
    """Returns the file of a table, or the two files `path.<source>` and `path.<target>`."""
    if any(path.endswith((kind, f"{kind}.gz", f"{kind}.xz")) for kind in TABLES):
        return [Path(path)]
    folder, name = Path(path).parent, Path(path).name
    try:
        return [find_file(folder, f"{name}.{language}") for language in (data.source, data.target)]
    except DataError:
        kinds, both = ", ".join(TABLES), f"{path}.{data.source} and {path}.{data.target}"
        raise MissingDataError(
            f"{path}: is no table by its name ({kinds}), and {both} are not both there, nor with .gz or .xz; name a "
            "table, or what the names of the two files have in common, and their ends by data.source and data.target"
        ) from None


def _own_split(data: TranslationData, path: str, split: str) -> Pairs:
    files = _own_files(data, path)
    if len(files) == 2:
        return _parallel_files(data, *files)
    languages = (data.source, data.target)
    keys = {data.source: "data.source", data.target: "data.target"}
    # They name the columns of all files: those of train, so others are to have the same.
    rows = read_table(path, languages, keys=keys if split == "train" else {})
    for row in rows:
        for language in languages:
            if is_missing(text := row.values[language]):
                raise DataError(
                    f"{row.where}: {language} is missing ({text[:60]!r}); give it text, or delete the line (if it is a "
                    "word, end it with a full stop)"
                )
    pairs = [(row.values[data.source], row.values[data.target]) for row in rows]
    return Pairs(path, pairs, lambda row, side: rows[row].where, lowercase=data.lowercase)


def _hub_pairs(data: TranslationData, hub: str) -> dict[str, Pairs]:
    splits = {}
    for split, hub_split in HUB_SPLITS.items():
        if data.hub_parquet:
            files = PARQUET.format(hub=hub, config=data.hub_config or "default", split=hub_split)
            dataset = load_hub("parquet", None, hub_split, data_files={hub_split: files})
        else:
            dataset = load_hub(hub, data.hub_config, hub_split)
        where = f"{hub} ({data.hub_config}) {hub_split}"
        pairs = HubPairs(dataset, where, data.source, data.target)
        splits[split] = Pairs(where, pairs, pairs.place, lowercase=data.lowercase, content=pairs.content)
    return splits

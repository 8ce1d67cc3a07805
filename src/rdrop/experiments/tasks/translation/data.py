"""Parallel text: where the pairs of a translation task come from, and which of them are trained on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from rdrop.experiments.tasks.files import TABLES, DataError, find_file, load_hub, read_parallel, read_table, tenths

if TYPE_CHECKING:
    from rdrop.experiments.tasks.translation.recipes import TranslationData

SPLITS = ("train", "valid", "test")
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
PARQUET = "hf://datasets/{hub}@refs/convert/parquet/{config}/{split}/*.parquet"
TINY_SIZES = {"train": 200, "valid": 20, "test": 20}
READ_AT_ONCE = 10_000

Pair = tuple[str, str]


class Pairs:
    """Sentences in two languages, in order; as often as one likes, for a training set need not fit into memory."""

    def __init__(self, where: str, pairs: Sequence[Pair] | HubPairs, *, lowercase: bool) -> None:
        self.where = where
        self._pairs, self._lowercase = pairs, lowercase

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[Pair]:
        for source, target in self._pairs:
            yield (source.lower(), target.lower()) if self._lowercase else (source, target)


class HubPairs:
    """The pairs of a data set of the hub, read from its file when they are asked for."""

    def __init__(self, dataset: Any, where: str, source: str, target: str) -> None:
        self._dataset, self._languages = dataset, (source, target)
        self._nested = "translation" in dataset.column_names
        self._check_columns(where)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Pair]:
        source, target = self._languages
        for rows in self._dataset.iter(READ_AT_ONCE):
            pairs: Iterable[tuple[str | None, str | None]]
            if self._nested:
                pairs = ((row[source], row[target]) for row in rows["translation"])
            else:
                pairs = zip(rows[source], rows[target], strict=True)
            yield from ((first or "", second or "") for first, second in pairs)

    def _check_columns(self, where: str) -> None:
        names = list(self._dataset[0]["translation"]) if self._nested else self._dataset.column_names
        for language in self._languages:
            if language not in names:
                raise DataError(
                    f"{where}:1: has no column {language!r}, only {', '.join(map(repr, names))}; "
                    "set data.source and data.target to two of them"
                )


def load_pairs(data: TranslationData) -> dict[str, Pairs]:
    """The three splits, from the first source that the recipe sets. Raises `DataError`."""
    if data.tiny:
        with TemporaryDirectory(prefix="rdrop-") as folder:
            write_tiny_folder(folder, data)
            return _folder_pairs(data, folder)
    if data.train is not None:
        return _own_pairs(data, data.train)
    if data.folder is not None:
        return _checked(data, _folder_pairs(data, data.folder))
    if data.hub is not None:
        return _checked(data, _hub_pairs(data, data.hub))
    raise DataError(
        f"no data: set data.train to a table with the columns {data.source} and {data.target}, or data.folder to a "
        f"folder with {data.train_name}.{data.source}, {data.train_name}.{data.target} and so on, or data.hub; "
        "docs/tasks/translation.md says where to get them"
    )


def _checked(data: TranslationData, splits: dict[str, Pairs]) -> dict[str, Pairs]:
    """The splits, if they have as many pairs as the recipe says."""
    if data.counts is None:
        return splits
    for (split, pairs), wanted in zip(splits.items(), data.counts, strict=True):
        if len(pairs) != wanted:
            raise DataError(
                f"{pairs.where}: has {len(pairs)} lines, but {split} of this data set has {wanted}; get it again, or "
                "set data.counts=null if it is meant to differ"
            )
    return splits


def _folder_pairs(data: TranslationData, folder: str) -> dict[str, Pairs]:
    names = {"train": data.train_name, "valid": data.valid_name, "test": data.test_name}
    return {split: _parallel_files(data, Path(folder), name) for split, name in names.items()}


def _parallel_files(data: TranslationData, folder: Path, name: str) -> Pairs:
    source, target = (
        find_file(folder, f"{name}.{language}", f"{name}.tok.{language}") for language in (data.source, data.target)
    )
    return Pairs(str(source), read_parallel(source, target), lowercase=data.lowercase)


def _own_pairs(data: TranslationData, train: str) -> dict[str, Pairs]:
    """Own files. A split without one is a tenth of the training file, which the training then goes without."""
    pairs = _own_file(data, train)
    given = {"valid": data.valid, "test": data.test}
    missing = [split for split, path in given.items() if path is None]
    drawn = dict(zip(given, tenths(len(pairs), data.split_seed)[1:], strict=True)) if missing else {}
    held_out = {row for split in missing for row in drawn[split].tolist()}
    rest = [row for row in range(len(pairs)) if row not in held_out]
    splits = {"train": _part(data, train, pairs, rest)}
    for split, path in given.items():
        if path is None:
            splits[split] = _part(data, f"{train} (a tenth)", pairs, drawn[split].tolist())
        else:
            splits[split] = Pairs(path, _own_file(data, path), lowercase=data.lowercase)
    return splits


def _part(data: TranslationData, where: str, pairs: Sequence[Pair], rows: Sequence[int]) -> Pairs:
    return Pairs(where, [pairs[row] for row in rows], lowercase=data.lowercase)


def _own_file(data: TranslationData, path: str) -> list[Pair]:
    """A table with a column for each language, or the two files `path.<source>` and `path.<target>`."""
    if not any(path.endswith((kind, f"{kind}.gz", f"{kind}.xz")) for kind in TABLES):
        folder, name = Path(path).parent, Path(path).name
        return read_parallel(*(find_file(folder, f"{name}.{language}") for language in (data.source, data.target)))
    rows = read_table(path, (data.source, data.target))
    for row in rows:
        for language in (data.source, data.target):
            if not row.values[language].strip():
                raise DataError(f"{row.where}: {language} is empty; give it text, or delete the line")
    return [(row.values[data.source], row.values[data.target]) for row in rows]


def _hub_pairs(data: TranslationData, hub: str) -> dict[str, Pairs]:
    splits = {}
    for split, hub_split in HUB_SPLITS.items():
        if data.hub_parquet:
            files = PARQUET.format(hub=hub, config=data.hub_config or "default", split=hub_split)
            dataset = load_hub("parquet", None, hub_split, data_files={hub_split: files})
        else:
            dataset = load_hub(hub, data.hub_config, hub_split)
        where = f"{hub} ({data.hub_config}) {hub_split}"
        splits[split] = Pairs(where, HubPairs(dataset, where, data.source, data.target), lowercase=data.lowercase)
    return splits


# ------------------------------------------------------------------------------------------------- made-up examples

TINY_WORDS = ("ba", "ko", "li", "mu", "ne", "pa", "ri", "so", "tu", "ve", "wo", "za")


def write_tiny_folder(folder: str, data: TranslationData) -> None:
    """A folder in the layout of `data.folder`. The translation of a sentence is its words in reverse, each doubled."""
    draw = random.Random(data.split_seed)
    names = {"train": data.train_name, "valid": data.valid_name, "test": data.test_name}
    for split, size in TINY_SIZES.items():
        sentences = [draw.choices(TINY_WORDS, k=draw.randint(2, 6)) for _ in range(size)]
        translations = [[word + word for word in reversed(sentence)] for sentence in sentences]
        for language, lines in ((data.source, sentences), (data.target, translations)):
            text = "".join(" ".join(words) + "\n" for words in lines)
            (Path(folder) / f"{names[split]}.{language}").write_text(text, encoding="utf-8")

"""Data files, read exactly or refused: every line that is there is returned, or one `DataError` says where and why not.

A line ends at "\\n" and nowhere else. `str.splitlines` also ends it at U+2028, U+0085 and form feeds, which shifts one
side of a parallel file against the other. Nothing is skipped, repaired or guessed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdrop.experiments.recipe.settings import nearest_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

AnyPath = str | PathLike[str]

SPLITS = ("train", "valid", "test")
HUB_SPLITS = {"train": "train", "valid": "validation", "test": "test"}
"""What the hub calls them."""

COMPRESSED = ("", ".gz", ".xz")
TABLES = (".csv", ".tsv", ".jsonl")
LONGEST_LINE_BYTES = 10**6
SHOWN_NAMES = 8  # of the columns of a file, in an error


class DataError(ValueError):
    """Data that are not what they should be, in one line: `file:line: what; how to fix`."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One example of a table."""

    where: str
    """`file:line`, for errors."""
    values: dict[str, str]
    """The columns that were asked for; an optional one that the file lacks is not in it."""


def read_lines(path: AnyPath) -> list[str]:
    """Reads the lines of a UTF-8 file, without their "\\n"; decompressed, if the name ends in `.gz` or `.xz`.

    Raises `DataError` for a file that is missing, empty or cut off, and for a line that is not UTF-8, is longer than
    `LONGEST_LINE_BYTES`, or has a byte order mark, a carriage return or a zero byte.
    """
    lines: list[str] = []
    with _opened(path) as stream, _explained(path, lines):
        while raw := stream.readline(LONGEST_LINE_BYTES + 1):
            lines.append(_decoded(raw, path, len(lines) + 1))
    if not lines:
        raise DataError(f"{path}:1: the file is empty; it needs at least one line")
    return lines


def read_parallel(source: AnyPath, target: AnyPath) -> list[tuple[str, str]]:
    """Pairs line i of `source` with line i of `target`. Unequal counts and lines without text are errors."""
    first, second = read_lines(source), read_lines(target)
    if len(first) != len(second):
        longer, shorter = (source, target) if len(first) > len(second) else (target, source)
        least, most = sorted((len(first), len(second)))
        raise DataError(
            f"{longer}:{least + 1}: this line has no partner, {shorter} has {least} lines and this file {most}; line i "
            "of one file must be the translation of line i of the other"
        )
    for path, lines in ((source, first), (target, second)):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                raise DataError(f"{path}:{number}: the line is empty; delete it, and line {number} of the other file")
    return list(zip(first, second, strict=True))


def read_table(path: AnyPath, columns: Sequence[str], *, optional: Sequence[str] = ()) -> list[TableRow]:
    """Reads the rows of a `.csv`, `.tsv` or `.jsonl` file (also with `.gz` or `.xz`), in their order.

    The first line of a CSV or TSV file names the columns. CSV is quoted as spreadsheets do; in TSV no character is
    special but tab and newline, as in GLUE. A JSON line is an object, whose numbers keep their spelling as text.

    Raises `DataError`, also for a missing column (it names the nearest there is) and a row of another length.
    """
    lines = read_lines(path)
    match table_kind(path):
        case ".jsonl":
            return [_json_row(line, f"{path}:{number}", columns, optional) for number, line in enumerate(lines, 1)]
        case ".csv":
            records = _csv_records(lines, path)
        case _:
            records = ((number, line.split("\t")) for number, line in enumerate(lines, 1))
    _, header = next(records)
    places = _places(header, f"{path}:1", columns, optional)
    rows = [_row(fields, f"{path}:{number}", header, places) for number, fields in records]
    if not rows:
        raise DataError(f"{path}:1: there is only the line that names the columns; give it rows")
    return rows


def table_kind(path: AnyPath) -> str:
    """Returns `.csv`, `.tsv` or `.jsonl`: the format of the file, by its name."""
    plain = Path(path).with_suffix("") if Path(path).suffix in COMPRESSED else Path(path)
    kind = plain.suffix
    if kind not in TABLES:
        raise DataError(f"{path}: the name must end in {', '.join(TABLES)}, or one of them and .gz or .xz; rename it")
    return kind


def find_file(folder: AnyPath, *names: str) -> Path:
    """Finds the first of `names` that is in `folder`, each also tried with `.gz` and `.xz` at its end."""
    wanted = [f"{name}{suffix}" for name in names for suffix in COMPRESSED]
    for name in wanted:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: there is no such folder; set data.folder to the one with {names[0]}")
    raise DataError(f"{folder}: has no {' or '.join(names)}, nor one with .gz or .xz; put it there")


def hold_out(size: int, missing: Collection[str], seed: int) -> dict[str, NDArray[np.int64]]:
    """Draws 10 % of `range(size)` for each `missing` one of "valid" and "test"; "train" is the rest. All are sorted.

    Either has the same rows whether or not the other is missing.
    """
    import numpy as np  # here, because the command line imports this module for its error

    if not missing:
        return {"train": np.arange(size)}
    require_ten(size, "examples")
    order, tenth = np.random.default_rng(seed).permutation(size), size // 10
    drawn = {"valid": order[:tenth], "test": order[tenth : 2 * tenth]}
    rows = {split: np.sort(own) for split, own in drawn.items() if split in missing}
    return {"train": np.setdiff1d(order, np.concatenate([*rows.values()]))} | rows


def require_ten(size: int, unit: str) -> None:
    if size < 10:
        raise DataError(f"{size} {unit} are too few to hold out 10 %; give 10 or more, or data.valid and data.test")


def require_count(where: str, found: int, expected: int | None, unit: str, key: str = "data.counts") -> None:
    """Raises `DataError` unless a split has as many examples as the recipe's `key` says; None: any number."""
    if expected is not None and found != expected:
        raise DataError(
            f"{where}: has {found} {unit} and must have {expected}; get it again, or set {key}=null if it is meant to "
            "differ"
        )


def load_hub(hub: str, config: str | None, split: str, *, data_files: Mapping[str, str] | None = None) -> Any:
    """Calls `datasets.load_dataset(hub, config, split=split, data_files=data_files)`; failures are `DataError`s.

    Code from the hub is never run: of a data set that has a loading script, give the parquet files as `data_files`.
    """
    import datasets  # seconds to import

    name = hub if config is None else f"{hub} ({config})"
    try:
        return datasets.load_dataset(hub, config, split=split, data_files=data_files)
    except Exception as error:  # the network, the hub, the cache, the format: each library below has errors of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name}: the split {split} cannot be loaded ({reason}); check data.hub, data.hub_config and the network, "
            "or download it and set data.folder"
        ) from error


@contextmanager
def _opened(path: AnyPath) -> Iterator[io.BufferedReader]:
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        stream = openers.get(Path(path).suffix, open)(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path") from error
    with stream:
        # The readline of a GzipFile or LZMAFile is Python code; that of a BufferedReader around it is not.
        yield stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, 2**16)


@contextmanager
def _explained(path: AnyPath, lines: list[str]) -> Iterator[None]:
    """Turns what reading raises into a `DataError` at the line after `lines`."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        raise DataError(
            f"{path}:{len(lines) + 1}: the compressed file is cut off or damaged ({error}); get it again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}:{len(lines) + 1}: {error.strerror or error}; check the file") from error


def _decoded(raw: bytes, path: AnyPath, number: int) -> str:
    raw = raw.removesuffix(b"\n")
    try:
        if len(raw) <= LONGEST_LINE_BYTES and b"\r" not in raw and b"\0" not in raw and raw[:3] != BOM_UTF8:
            return raw.decode()
        what = _what_is_wrong(raw)
    except UnicodeDecodeError as error:
        what = f"byte {error.start + 1} is not UTF-8; convert the file, e.g. iconv -f latin1 -t utf-8"
    raise DataError(f"{path}:{number}: {what}")


def _what_is_wrong(raw: bytes) -> str:
    if len(raw) > LONGEST_LINE_BYTES:
        return f"the line is longer than {LONGEST_LINE_BYTES} bytes; split it, or check that this is a text file"
    if raw[:3] == BOM_UTF8:
        return "the line begins with a byte order mark; remove it, e.g. sed -i '1s/^\\xEF\\xBB\\xBF//'"
    if b"\0" in raw:
        return "the line has a zero byte; check that this is a text file in UTF-8"
    return "the line has a carriage return; convert the file, e.g. sed -i 's/\\r$//'"


def _csv_records(lines: list[str], path: AnyPath) -> Iterator[tuple[int, list[str]]]:
    """Yields each record with the number of its first line: a quoted field may have newlines."""
    reader = csv.reader((f"{line}\n" for line in lines), strict=True)
    while True:
        number = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f'{path}:{number}: not CSV ({error}); a field with a comma or a quote is written "like ""this"""'
            ) from error
        yield number, fields or [""]


def _places(header: list[str], where: str, columns: Sequence[str], optional: Sequence[str]) -> dict[str, int]:
    for column in (*columns, *optional):
        if header.count(column) > 1:
            raise DataError(f"{where}: the column {column} is there {header.count(column)} times; rename the others")
    _require_columns(header, where, columns)
    return {column: header.index(column) for column in (*columns, *optional) if column in header}


def _require_columns(names: Sequence[str], where: str, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in names:
            nearest = f" (the nearest is {nearest_name(column, names)!r})" if any(names) else ""
            shown = ", ".join(map(repr, names[:SHOWN_NAMES])) + (", ..." if len(names) > SHOWN_NAMES else "")
            raise DataError(f"{where}: has no column {column!r}{nearest}, only {shown[:500]}; add or rename it")


def _row(fields: list[str], where: str, header: list[str], places: Mapping[str, int]) -> TableRow:
    if fields == [""]:
        raise DataError(f"{where}: the line is empty; delete it")
    if len(fields) != len(header):
        what = f"the row has {len(fields)} fields and the header {len(header)}"
        raise DataError(f"{where}: {what}; give each column its field, or delete the line")
    return TableRow(where, {column: fields[place] for column, place in places.items()})


def _json_row(line: str, where: str, columns: Sequence[str], optional: Sequence[str]) -> TableRow:
    try:
        found = json.loads(
            line, object_pairs_hook=_without_duplicates, parse_int=str, parse_float=str, parse_constant=_refuse
        )
    except RecursionError:
        raise DataError(f"{where}: the JSON is nested too deeply; a row is one flat object") from None
    except ValueError as error:
        raise DataError(f"{where}: not JSON ({error}); a line is one object with its columns as keys") from error
    if not isinstance(found, dict):
        raise DataError(f"{where}: must be a JSON object with its columns as keys, not {line[:40]!r}; correct it")
    _require_columns(list(found), where, columns)
    return TableRow(where, {key: _json_text(found[key], key, where) for key in (*columns, *optional) if key in found})


def _json_text(value: object, key: str, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        raise DataError(f"{where}: the value of {key!r} must be text or a number; correct it, or delete the line")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: the value of {key!r} has half of a surrogate pair (\\ud800 to \\udfff); delete it"
        ) from None
    if "\0" in value:
        raise DataError(f"{where}: the value of {key!r} has a zero character; delete it")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number in JSON")

"""Data files, read exactly or refused: every line that is there is returned, or one `DataError` says where and why not.

A line ends at "\\n", or "\\r\\n" as on Windows and in what `csv.writer` writes, and nowhere else. `str.splitlines` also
ends it at U+2028, U+0085 and form feeds, which shifts one side of a parallel file against the other. A byte order mark
at the start of a file says that it is UTF-8, and is no text. Nothing is skipped, repaired or guessed.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import os
import re
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from numbers import Number
from os import PathLike
from pathlib import Path
from typing import Any

import psutil

from rdrop.experiments.recipe.settings import nearest_name
from rdrop.experiments.run_folder.data_files import note_read
from rdrop.experiments.shown import shell_line, shell_word
from rdrop.experiments.tasks.not_text import (
    HEAD_BYTES,
    LFS_POINTER,
    binary_kind,
    compressed_suffix,
    is_text,
    page_kind,
    readings,
)
from rdrop.experiments.tasks.spelling import is_blank

AnyPath = str | PathLike[str]

COMPRESSED = ("", ".gz", ".xz")
TABLES = (".csv", ".tsv", ".jsonl")
_AS_CSV = "save the sheet as CSV, in UTF-8, and give that file"
OTHER_KINDS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), _AS_CSV),
    ".json": "write each example as an object on a line of its own, and name the file .jsonl",
    ".parquet": "convert it, with pandas: pandas.read_parquet(...).to_csv('data.csv', index=False)",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".zst", ".7z"), "unpack it"),
}
"""What to do with a file that is no table, by the end of its name."""
LONGEST_LINE_BYTES = 2**30  # a text without newlines fits, a disk image does not
PIECE_BYTES = 2**20  # that are read at once
SEPARATOR_LINE = re.compile(r'"?sep=([,;|\t])"?')
SHOWN_NAMES = 8  # of the columns of a file, in an error


class DataError(ValueError):
    """Data that are not what they should be, in one line: `file:line: what; how to fix`."""


class MissingDataError(DataError):
    """A file or folder that is not there, or cannot be opened."""


@dataclass(frozen=True, slots=True)
class TableRow:
    """One example of a table."""

    where: str
    """`file:line`, for errors."""
    values: dict[str, str]
    """The columns that were asked for; an optional one that the file lacks is not in it."""
    more: dict[str, list[str]] = field(default_factory=dict)
    """The texts after the first, by column, where the value in a JSON file is a list of texts."""


def read_lines(path: AnyPath) -> list[str]:
    """Reads the lines of a UTF-8 file, without their ends; decompressed, if the name ends in `.gz` or `.xz`.

    Raises `DataError` for a file that is missing, empty or cut off, and for a line that is not UTF-8, is longer than
    `LONGEST_LINE_BYTES`, begins with a byte order mark after the first line, or has a carriage return or a zero byte.
    """
    lines: list[str] = []
    size, free = 0, psutil.virtual_memory().available
    with _fitting(path):
        for line in lines_of(path):
            size += sys.getsizeof(line)
            if 2 * size > free:  # what is made of the lines has to fit too
                raise MemoryError
            lines.append(line)
    return lines


@contextmanager
def _fitting(path: AnyPath) -> Iterator[None]:
    """Turns what is raised where memory ends into a `DataError`."""
    try:
        yield
    except MemoryError:
        raise DataError(f"{path}: its text does not fit into the memory that is free; give less of it") from None


def lines_of(path: AnyPath) -> Iterator[str]:
    """Yields what `read_lines` returns, a line at a time."""
    number = 0
    with opened(path) as stream, _explained(path, lambda: number + 1):
        while raw := _raw_line(stream):
            number += 1
            yield _decoded(raw, path, number)
    if not number:
        raise _empty(path)


def _raw_line(stream: io.BufferedReader) -> bytes:
    """Reads a line with its end; of one that cannot be text, or is too long, as much as shows that."""
    parts, size = [], 0
    while piece := stream.readline(PIECE_BYTES):
        parts.append(piece)
        size += len(piece)
        if piece.endswith(b"\n") or b"\0" in piece or size > LONGEST_LINE_BYTES + 2:
            break
    return b"".join(parts)


def count_lines(path: AnyPath) -> int:
    """Counts the lines of `read_lines` without reading what they say."""
    count, last = 0, b""
    with opened(path) as stream, _explained(path, lambda: count + 1):
        while block := stream.read(2**20):
            count, last = count + block.count(b"\n"), block[-1:]
    if not last:
        raise _empty(path)
    return count + (last != b"\n")


class ParallelText:
    """The pairs (line i of `source`, line i of `target`), read from the files each time they are gone through.

    Unequal counts are an error at once, a line that shows nothing when it is reached.
    """

    def __init__(self, source: AnyPath, target: AnyPath) -> None:
        self.files = source, target
        first, second = map(count_lines, self.files)
        if first != second:
            for side in (0, 1):
                for _ in self._lines(side):  # what is wrong with a file explains its count
                    pass
            longer, shorter = (source, target) if first > second else (target, source)
            least, most = sorted((first, second))
            raise DataError(
                f"{longer}:{least + 1}: this line has no partner, {shorter} has {least} lines and this file {most}; "
                "line i of one file must be the translation of line i of the other"
            )
        self._size = first

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for number, pair in enumerate(zip(self._lines(0), self._lines(1), strict=True), start=1):
            for path, line in zip(self.files, pair, strict=True):
                if is_blank(line):
                    raise DataError(
                        f"{path}:{number}: the line is empty; delete it, and line {number} of the other file"
                    )
            yield pair

    def _lines(self, side: int) -> Iterator[str]:
        """Yields the lines of a file; where a new one is to be made of it, the error says what the other then needs."""
        path, other = self.files[side], self.files[1 - side]
        try:
            yield from lines_of(path)
        except DataError as error:
            if shell_word(_mended(path)) not in str(error):
                raise
            copy = f"cp {shell_word(other)} {shell_word(_mended(other))}"
            raise DataError(
                f"{error}; if the two are named by what their names have in common, also: {copy}"
            ) from error


def read_table(
    path: AnyPath,
    columns: Sequence[str],
    *,
    optional: Sequence[str] = (),
    lists: Collection[str] = (),
    keys: Mapping[str, str] | None = None,
) -> list[TableRow]:
    """Reads the rows of a `.csv`, `.tsv` or `.jsonl` file (also with `.gz` or `.xz`), in their order.

    The first line of a CSV or TSV file names the columns; the one before it may say what separates them, as `sep=;`,
    which is Excel's. CSV is quoted as spreadsheets do; in TSV no character is special but tab and newline, as in GLUE.
    A JSON line is an object, whose numbers keep their spelling as text. In a column of `lists` its value may be a list
    of texts. `keys` are the keys of the recipe that name the columns.

    Raises `DataError`, also for a missing column (it names the nearest there is) and a row of another length.
    """
    with _fitting(path):
        return _rows(path, table_kind(path), columns, optional, lists, keys or {})


def _rows(
    path: AnyPath,
    kind: str,
    columns: Sequence[str],
    optional: Sequence[str],
    lists: Collection[str],
    keys: Mapping[str, str],
) -> list[TableRow]:
    lines = read_lines(path)
    page = page_kind(next(filter(None, map(str.strip, lines)), ""))
    if page is not None:
        raise DataError(f"{path}:1: the file is {page[0]}, and no table; {page[1]}")
    if kind == ".jsonl":
        return [
            _json_row(line, f"{path}:{number}", columns, optional, lists, keys) for number, line in enumerate(lines, 1)
        ]
    csv.field_size_limit(LONGEST_LINE_BYTES)  # its own is 131,072 characters
    mark, start = {".csv": ",", ".tsv": "\t"}[kind], 1
    declared = SEPARATOR_LINE.fullmatch(lines[0])
    if declared and (kind == ".csv" or declared[1] == mark):
        mark, start = declared[1], 2
    lines = lines[start - 1 :] or [""]
    _require_own_dialect(lines[0], mark, kind, path)
    if kind == ".csv":
        records = _csv_records(lines, path, start, mark)
    else:
        records = ((number, line.split("\t")) for number, line in enumerate(lines, start))
    _, header = next(records)
    if not any(column in header for column in (*columns, *optional)):
        naming = _naming(path, header, [*columns, *optional], mark, start)
        require_columns(header, f"{path}:{start}", columns, keys, naming)
    places = _places(header, f"{path}:{start}", columns, optional, keys)
    rows = [_row(fields, f"{path}:{number}", header, places) for number, fields in records]
    if not rows:
        raise DataError(f"{path}:{start}: there is only the line that names the columns; give it rows")
    return rows


def table_kind(path: AnyPath) -> str:
    """Returns `.csv`, `.tsv` or `.jsonl`: the format of the file, by its name."""
    plain = Path(path).with_suffix("") if Path(path).suffix in COMPRESSED else Path(path)
    kind = plain.suffix
    if kind not in TABLES:
        remedy = OTHER_KINDS.get(Path(path).suffix.lower(), "rename it")
        raise DataError(f"{path}: the name must end in {', '.join(TABLES)}, or one of them and .gz or .xz; {remedy}")
    return kind


def find_file(folder: AnyPath, *names: str, only: bool = False) -> Path:
    """Finds the first of `names` that is in `folder`, each also tried with `.gz` and `.xz` at its end.

    `only`: no other of them may be there too.
    """
    wanted = [Path(folder) / f"{name}{suffix}" for name in names for suffix in COMPRESSED]
    found = [path for path in wanted if path.is_file()]
    if only and len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name} are both there; move the one away that is not meant")
    if found:
        return found[0]
    if not Path(folder).is_dir():
        raise MissingDataError(f"{folder}: there is no such folder; set data.folder to the one with {names[0]}")
    raise MissingDataError(f"{folder}: has no {' or '.join(names)}, nor one with .gz or .xz; put it there")


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


def hub_text(value: object, where: str, column: str) -> str:
    """Returns what a row of the hub has in a column: text, or a number as it is written. Raises `DataError`."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):  # as in a JSON line
        return "true" if value else "false"
    if isinstance(value, Number):
        return str(value)
    if value is None:
        raise DataError(f"{where}: {column} has no value; choose another column or split")
    kind = type(value).__name__
    raise DataError(f"{where}: {column} must be text or a number, and is a {kind}; choose another column")


def have_same_content(path: AnyPath, other: AnyPath) -> bool:
    """Whether both are one file, or copies of it: as they are, compressed, or with other ends of lines."""
    return all(line == copy for line, copy in zip_longest(_raw_lines(path), _raw_lines(other)))


def _raw_lines(path: AnyPath) -> Iterator[bytes]:
    """Yields the lines without their ends, and without a byte order mark at the start, whatever is in them."""
    number = 0
    with opened(path) as stream, _explained(path, lambda: number + 1):
        while raw := _raw_line(stream):
            number += 1
            yield raw.rstrip(b"\r\n").removeprefix(BOM_UTF8 if number == 1 else b"")


def require_regular_file(path: AnyPath) -> None:
    """Refuses what is there and no file: reading a pipe or a device may never end."""
    if os.path.exists(path) and not os.path.isfile(path):  # as methods of Path these may raise
        kind = "a folder" if os.path.isdir(path) else "a pipe, a socket or a device"
        raise DataError(f"{path}: is {kind}, and not a file; move it away, or name a file")


@contextmanager
def opened(path: AnyPath) -> Iterator[io.BufferedReader]:
    """Opens a file for reading its bytes, decompressed if the name ends in `.gz` or `.xz`."""
    require_regular_file(path)
    note_read(path)
    openers: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open}
    try:
        stream = openers.get(Path(path).suffix, open)(path, "rb")
    except OSError as error:
        raise MissingDataError(f"{path}: {error.strerror or error}; check the path") from error
    with stream:
        # The readline of a GzipFile or LZMAFile is Python code; that of a BufferedReader around it is not.
        yield stream if isinstance(stream, io.BufferedReader) else io.BufferedReader(stream, 2**16)


@contextmanager
def _explained(path: AnyPath, line: Callable[[], int]) -> Iterator[None]:
    """Turns what reading raises into a `DataError` at that line."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        what = _what_is_stored(path) or f"the compressed file is cut off or damaged ({error}); get it again"
        raise DataError(f"{path}:{line()}: {what}") from error
    except OSError as error:
        raise DataError(f"{path}:{line()}: {error.strerror or error}; check the file") from error


def _what_is_stored(path: AnyPath) -> str | None:
    """Says what a file is that is not compressed as its name says; None for one that is, or is damaged."""
    with open(path, "rb") as stream:
        head = stream.read(HEAD_BYTES)
    suffix, found, kind = Path(path).suffix, compressed_suffix(head), binary_kind(head)
    if found == suffix or (kind is None and not is_text(head)):
        return None
    what, remedy = kind or ("text that is not compressed", "")
    if kind is None or found:
        remedy = _renaming(path, f"{_without_suffix(path)}{found}")
    return f"the file is {what}, and not {suffix} as its name says; {remedy}"


def _what_is_unpacked(path: AnyPath) -> str | None:
    """Says what a file is that is no text, by its first bytes; None where these do not show it."""
    with opened(path) as stream, _explained(path, lambda: 1):
        head = stream.read(HEAD_BYTES)
    kind, found = binary_kind(head), compressed_suffix(head)
    if kind is None:
        return None
    what, remedy = kind
    if found and _without_suffix(path) == str(path):
        remedy = _renaming(path, f"{path}{found}")
    return f"the file is {what}, and no text; {remedy}"


def _renaming(path: AnyPath, new: str) -> str:
    return f"rename it: mv -n {shell_word(path)} {shell_word(new)}"


def _without_suffix(path: AnyPath) -> str:
    """Returns the path without the `.gz` or `.xz` at its end."""
    return str(path)[:-3] if Path(path).suffix in COMPRESSED[1:] else str(path)


def _empty(path: AnyPath) -> DataError:
    return DataError(f"{path}:1: the file is empty; it needs at least one line")


def _decoded(raw: bytes, path: AnyPath, number: int) -> str:
    line = raw[:-1].removesuffix(b"\r") if raw.endswith(b"\n") else raw
    if number == 1:
        line = line.removeprefix(BOM_UTF8)
        if line.startswith(LFS_POINTER):
            raise DataError(f"{path}:1: the file is git-lfs's pointer to the one that is meant; get that: git lfs pull")
    if len(line) <= LONGEST_LINE_BYTES and b"\r" not in line and b"\0" not in line and line[:3] != BOM_UTF8:
        try:
            return line.decode()
        except UnicodeDecodeError:
            pass
    is_binary = _what_is_unpacked(path)
    if is_binary is not None:
        raise DataError(f"{path}:1: {is_binary}")
    what, command = _what_is_wrong(raw, line, number)
    raise DataError(f"{path}:{number}: {what}{'' if command is None else _filtered(path, command)}")


def _what_is_wrong(raw: bytes, line: bytes, number: int) -> tuple[str, str | None]:
    """Says what is wrong with a line, and with which shell command, that reads and writes a text, it is mended.

    `raw` is the line with its end, `line` without.
    """
    encodings = ((BOM_UTF32_LE, "utf-32"), (BOM_UTF32_BE, "utf-32"), (BOM_UTF16_LE, "utf-16"), (BOM_UTF16_BE, "utf-16"))
    of_mark = next((encoding for mark, encoding in encodings if number == 1 and raw.startswith(mark)), None)
    if of_mark is not None:
        return f"the file is {of_mark.upper()} and not UTF-8; give one made by: ", f"iconv -f {of_mark} -t utf-8"
    without_mark = _utf16_without_mark(line) if number == 1 else None
    if without_mark is not None:
        return "the file is UTF-16 and not UTF-8; give one made by: ", f"iconv -f {without_mark} -t utf-8"
    if len(line) > LONGEST_LINE_BYTES:
        return (
            f"the line is longer than {LONGEST_LINE_BYTES} bytes; split it, or check that this is a text file",
            None,
        )
    if line.startswith(BOM_UTF8):
        return (
            "the line begins with a byte order mark; give a file without, made by: ",
            r"LC_ALL=C sed $'s/^\xef\xbb\xbf//'",
        )
    if b"\0" in line:
        return (
            "the line has a zero byte, as no text has; get it again, or give a file without, made by: ",
            r"tr -d '\000'",
        )
    if b"\r" in line and number == 1 and not raw.endswith(b"\n"):
        return "lines end in carriage returns; give a file with newlines, made by: ", r"tr '\r' '\n'"
    if b"\r" in line:
        what = "the line has a carriage return; give a file without those at the ends of lines, with spaces for others"
        return f"{what}, made by: ", r"LC_ALL=C sed $'s/\r*$//; s/\r/ /g'"
    byte = _first_wrong_byte(raw)
    found = readings(raw.rstrip(b"\r\n"), byte - 1)
    if not found:
        return f"byte {byte} is not UTF-8, nor of another encoding that is known here; check that this is text", None
    shown = ", ".join(f"{word!r} by {encoding}" for encoding, word in found.items())
    encoding = next(iter(found))
    what = (
        f"byte {byte} is not UTF-8, and its word reads {shown}; take the encoding that reads right for {encoding} here"
    )
    return f"{what}, and give a file made by: ", f"iconv -f {encoding} -t utf-8"


def _utf16_without_mark(line: bytes) -> str | None:
    """Returns the kind of UTF-16 in which every second byte of the first line, the names of columns, is zero."""
    for encoding, zeros, others in (("utf-16le", line[1::2], line[::2]), ("utf-16be", line[::2], line[1::2])):
        if len(line) > 3 and not any(zeros) and b"\0" not in others:
            return encoding
    return None


def _first_wrong_byte(raw: bytes) -> int:
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.start + 1
    return 0


def _filtered(path: AnyPath, command: str) -> str:
    """Returns the shell command that writes the file to a new one, through another command, all of it or nothing."""
    new = _mended(path)
    file, part, target = (shell_word(name) for name in (path, f"{new}.part", new))
    program = {".gz": "gzip", ".xz": "xz"}.get(new.suffix)
    if program is None:
        return f"{command} < {file} > {part} && mv {part} {target}"
    return f"(set -o pipefail; {program} -dc {file} | {command} | {program} > {part}) && mv {part} {target}"


def _mended(path: AnyPath) -> Path:
    """Returns the name of the file that is made of one which cannot be read."""
    plain, suffix = Path(_without_suffix(path)), Path(path).suffix
    return plain.with_name(f"{plain.stem}-mended{plain.suffix}{suffix if suffix in COMPRESSED[1:] else ''}")


def _csv_records(lines: list[str], path: AnyPath, start: int, mark: str) -> Iterator[tuple[int, list[str]]]:
    """Yields each record with the number of its first line, from `start`: a quoted field may have newlines."""
    reader = csv.reader((f"{line}\n" for line in lines), delimiter=mark, strict=True)
    while True:
        number = reader.line_num + start
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(
                f'{path}:{number}: not CSV ({error}); a field with a comma or a quote is written "like ""this"""'
            ) from error
        yield number, fields or [""]


def _require_own_dialect(header: str, own: str, kind: str, path: AnyPath) -> None:
    """Refuses a table that another character separates, or whose TSV is quoted: no key of the recipe would help."""
    separated = [mark for mark in (own, ";", "\t", "|", ",") if len(next(csv.reader([header], delimiter=mark))) > 1]
    is_quoted = kind == ".tsv" and all(name[:1] == name[-1:] == '"' for name in header.split(own))
    if not separated or (separated[0] == own and not is_quoted):
        return
    mark = separated[0]
    name = "tabs" if mark == "\t" else repr(mark)
    what = f"the columns are separated by {name}{' and quoted' if is_quoted else ''}, and those of {kind} are not"
    rows = (
        "import csv, io, sys; csv.field_size_limit(2**30); text = io.TextIOWrapper(sys.stdin.buffer, 'utf-8-sig', "
        "newline=''); rows = csv.reader(text, delimiter=sys.argv[1]); "
    )
    ending, write = {
        ".csv": ("commas.csv", "csv.writer(sys.stdout).writerows(rows)"),
        ".tsv": (
            "tabs.tsv",
            "sys.stdout.writelines('\\t'.join(field.translate({9: 32, 10: 32, 13: 32}) for field in row) + '\\n' "
            "for row in rows)",
        ),
    }[kind]
    program = rows + write
    suffix = Path(path).suffix if Path(path).suffix in COMPRESSED else ""
    plain = Path(str(path).removesuffix(suffix))
    new = plain.with_name(f"{plain.stem}-{ending}")
    file, part = shell_word(path), shell_word(f"{new}.part")
    convert = f"PYTHONUTF8=1 python3 -c {shell_word(program)} {shell_word(mark)}"
    read = {".gz": "gzip -dc", ".xz": "xz -dc"}.get(suffix)
    command = f"{convert} < {file} > {part}"
    if read is not None:
        command = f"(set -o pipefail; {read} {file} | {convert} > {part})"
    raise DataError(f"{path}:1: {what}; give a file made by: {command} && mv {part} {shell_word(new)}")


def _places(
    header: list[str], where: str, columns: Sequence[str], optional: Sequence[str], keys: Mapping[str, str]
) -> dict[str, int]:
    for column in (*columns, *optional):
        if header.count(column) > 1:
            raise DataError(f"{where}: the column {column} is there {header.count(column)} times; rename the others")
    require_columns(header, where, columns, keys)
    return {column: header.index(column) for column in (*columns, *optional) if column in header}


def require_columns(
    names: Sequence[str], where: str, columns: Sequence[str], keys: Mapping[str, str], naming: str = ""
) -> None:
    """Raises `DataError` for the first of `columns` that is not among `names`; `keys` of the recipe name them.

    `naming` is the remedy for names that are none, but an example.
    """
    for column in columns:
        if column not in names:
            nearest = nearest_name(column, names)
            hint = "" if nearest is None else f" (the nearest is {nearest!r})"
            shown = ", ".join(map(repr, names[:SHOWN_NAMES])) + (", ..." if len(names) > SHOWN_NAMES else "")
            renaming = f"set {keys[column]} to the name it has here, or rename it" if column in keys else "rename it"
            remedies = [naming, renaming] if nearest is None else [renaming, naming]
            remedy = "; or ".join(filter(None, remedies))
            raise DataError(f"{where}: has no column {column!r}{hint}, only {shown[:500]}; {remedy}")


def _naming(path: AnyPath, example: Sequence[str], columns: Sequence[str], mark: str, start: int) -> str:
    """Says how to put a line with the names of its columns above an example; "" for one with too few fields.

    Which of more fields are meant, nobody but the user knows.
    """
    if len(example) < len(columns) or not any(example):
        return ""
    if len(example) > len(columns):
        names = " and ".join(map(repr, columns))
        return (
            f"if this line is an example, put a line above it that names all {len(example)} columns in their order, "
            f"those that are meant {names}, the others as you like"
        )
    above = [] if start == 1 else [f"sep={mark}"]
    lines = shell_line([*above, mark.join(columns)])
    rest = r"LC_ALL=C sed $'1s/^\xef\xbb\xbf//'" if start == 1 else "tail -n +2"
    command = _filtered(path, f"(printf '%s\\n' {lines}; {rest})")
    return f"if this line is an example, give a file with the names of its columns above it, in their order: {command}"


def _row(fields: list[str], where: str, header: list[str], places: Mapping[str, int]) -> TableRow:
    if fields == [""]:
        raise DataError(f"{where}: the line is empty; delete it")
    if len(fields) != len(header):
        what = f"the row has {len(fields)} fields and the header {len(header)}"
        raise DataError(f"{where}: {what}; give each column its field, or delete the line")
    if all(map(is_blank, fields)):
        raise DataError(f"{where}: the row is empty; delete it")
    return TableRow(where, {column: fields[place] for column, place in places.items()})


def _json_row(
    line: str,
    where: str,
    columns: Sequence[str],
    optional: Sequence[str],
    lists: Collection[str],
    keys: Mapping[str, str],
) -> TableRow:
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
    require_columns(list(found), where, columns, keys)
    values, more = {}, {}
    for key in (*columns, *optional):
        if key in lists and isinstance(found.get(key), list) and found[key]:
            values[key], *more[key] = (_json_text(text, key, where) for text in found[key])
        elif key in found:
            values[key] = _json_text(found[key], key, where)
    return TableRow(where, values, more)


def _json_text(value: object, key: str, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if not isinstance(value, str):
        what, unneeded = "", ""
        if value is None:
            what, unneeded = ", not null", " (a column that is not needed can be left out of all lines)"
        rule = f"must be text or a number{what}; correct it, or delete the line{unneeded}"
        raise DataError(f"{where}: the value of {key!r} {rule}")
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

"""Files of text, read exactly or refused: every line is returned, or one `DataError` says where and why not.

A line ends at "\\n", or "\\r\\n" as on Windows and in what `csv.writer` writes, and nowhere else. `str.splitlines` also
ends it at U+2028, U+0085 and form feeds, which shifts one side of a parallel file against the other. A byte order mark
at the start of a file says that it is UTF-8, and is no text. Nothing is skipped, repaired or guessed.
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import sys
import zlib
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from numbers import Number
from os import PathLike
from pathlib import Path
from typing import Any

import psutil

from rdrop.experiments.run_folder.data_files import note_read
from rdrop.experiments.shown import shell_word
from rdrop.experiments.tasks.not_text import (
    HEAD_BYTES,
    LFS_POINTER,
    binary_kind,
    compressed_suffix,
    is_text,
    readings,
)
from rdrop.experiments.tasks.spelling import is_blank

AnyPath = str | PathLike[str]

COMPRESSED = ("", ".gz", ".xz")
LONGEST_LINE_BYTES = 2**30  # a text without newlines fits, a disk image does not
PIECE_BYTES = 2**20  # that are read at once


class DataError(ValueError):
    """Data that are not what they should be, in one line: `file:line: what; how to fix`."""


class MissingDataError(DataError):
    """A file or folder that is not there, or cannot be opened."""


def read_lines(path: AnyPath) -> list[str]:
    """Reads the lines of a UTF-8 file, without their ends; decompressed, if the name ends in `.gz` or `.xz`.

    Raises `DataError` for a file that is missing, empty or cut off, and for a line that is not UTF-8, is longer than
    `LONGEST_LINE_BYTES`, begins with a byte order mark after the first line, or has a carriage return or a zero byte.
    """
    lines: list[str] = []
    size, free = 0, psutil.virtual_memory().available
    with fitting(path):
        for line in lines_of(path):
            size += sys.getsizeof(line)
            if 2 * size > free:  # what is made of the lines has to fit too
                raise MemoryError
            lines.append(line)
    return lines


@contextmanager
def fitting(path: AnyPath) -> Iterator[None]:
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
    raise DataError(f"{path}:{number}: {what}{'' if command is None else filtered(path, command)}")


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


def filtered(path: AnyPath, command: str) -> str:
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

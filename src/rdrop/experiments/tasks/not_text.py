"""Tells what a file is that is no text in UTF-8, by its bytes: a spreadsheet, an archive, a page, another encoding."""

from __future__ import annotations

import re
from unicodedata import category

HEAD_BYTES = 1024
"""Of the start of a file, that are looked at."""

_AS_CSV = "save the sheet as CSV, in UTF-8, and give that file"
_WITH_PANDAS = "convert it, with pandas: pandas.{}(...).to_csv('data.csv', index=False)"
_ITS_TEXT = "save the text that is in it, in UTF-8, and give that file"
_UNPACK = "unpack it"
_GZIP, _XZ = b"\x1f\x8b", b"\xfd7zXZ\0"
_SIGNATURES = {
    b"PK\x03\x04": ("a zip archive, as .xlsx and .ods are", f"{_AS_CSV}, or unpack it"),
    b"\xd0\xcf\x11\xe0\xa1\xb1": ("a file of old office programs, as .xls is", _AS_CSV),
    _GZIP: ("compressed by gzip", _UNPACK),
    _XZ: ("compressed by xz", _UNPACK),
    b"BZh": ("compressed by bzip2", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", _UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", _UNPACK),
    b"Rar!\x1a\x07": ("a rar archive", _UNPACK),
    b"PAR1": ("a Parquet file", _WITH_PANDAS.format("read_parquet")),
    b"ARROW1": ("an Arrow file", _WITH_PANDAS.format("read_feather")),
    b"\x89HDF": ("an HDF5 file", _WITH_PANDAS.format("read_hdf")),
    b"SQLite format 3\0": ("an SQLite database", "save its table as CSV"),
    b"\x93NUMPY": ("an array of NumPy", "write its rows as CSV"),
    b"\x80\x04": ("a pickle", "write its rows as CSV"),
    b"%PDF-": ("a PDF", _ITS_TEXT),
    b"\x89PNG": ("an image", _ITS_TEXT),
    b"\xff\xd8\xff": ("an image", _ITS_TEXT),
    b"GIF8": ("an image", _ITS_TEXT),
    b"\x7fELF": ("a program", "give a file of text"),
}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How the text begins that Git has in the place of a large file."""
_PAGES = {
    ("<!doctype html", "<html", "<head"): (
        "an HTML page, as servers send where they refuse",
        "download the file itself",
    ),
    ("<?xml",): ("XML", "write its rows as CSV"),
    ("{\\rtf",): ("a text with formats (RTF)", "save it as plain text, in UTF-8"),
}

ENCODINGS = ("cp1252", "cp1250", "cp1251", "koi8-r", "macintosh", "cp932", "gb18030", "big5", "cp949")
"""What texts were written in before UTF-8, by the names that Python and iconv share."""
SHOWN_LETTERS = 16


def binary_kind(head: bytes) -> tuple[str, str] | None:
    """Returns what a file with these first bytes is, if it is no text, and what to do with it."""
    return next((kind for signature, kind in _SIGNATURES.items() if head.startswith(signature)), None)


def compressed_suffix(head: bytes) -> str:
    """Returns `.gz` or `.xz` for a file with these first bytes, or nothing."""
    return ".gz" if head.startswith(_GZIP) else ".xz" if head.startswith(_XZ) else ""


def page_kind(first_line: str) -> tuple[str, str] | None:
    """Returns what a text is that was to be a table and begins so, and what to do with it."""
    start = first_line.lstrip().casefold()
    return next((kind for starts, kind in _PAGES.items() if start.startswith(starts)), None)


def is_text(head: bytes) -> bool:
    """Whether these first bytes of a file are UTF-8 without control characters; the last of them may be cut off."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            return False
        text = head[: error.start].decode()
    return bool(text) and not re.search(r"[\0-\x08\x0e-\x1f\x7f]", text)


def readings(line: bytes, place: int) -> dict[str, str]:
    """Returns what the word at that byte reads by each of the `ENCODINGS` in which the line can be.

    First come those by which it has letters and punctuation alone.
    """
    start = re.search(rb"[^\s,;\"'|]*$", line[:place])
    word = line[0 if start is None else start.start() :][: 4 * SHOWN_LETTERS]
    found: dict[str, str] = {}
    for encoding in ENCODINGS:
        try:
            line.decode(encoding)
        except UnicodeDecodeError:
            continue
        shown = re.split(r"[\s,;\"|]", word.decode(encoding, "ignore"))[0][:SHOWN_LETTERS]
        if shown.isprintable() and shown not in found.values():
            found[encoding] = shown
    return dict(sorted(found.items(), key=lambda item: sum(category(letter)[0] not in "LMP" for letter in item[1])))

"""Tables of examples: `.csv`, `.tsv` and `.jsonl` files, read exactly or refused."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rdrop.experiments.recipe.settings import nearest_name
from rdrop.experiments.shown import shell_line, shell_word
from rdrop.experiments.tasks.files import (
    COMPRESSED,
    LONGEST_LINE_BYTES,
    AnyPath,
    DataError,
    filtered,
    fitting,
    read_lines,
)
from rdrop.experiments.tasks.not_text import page_kind
from rdrop.experiments.tasks.spelling import is_blank

TABLES = (".csv", ".tsv", ".jsonl")
_AS_CSV = "save the sheet as CSV, in UTF-8, and give that file"
OTHER_KINDS = {
    **dict.fromkeys((".xlsx", ".xls", ".ods", ".numbers"), _AS_CSV),
    ".json": "write each example as an object on a line of its own, and name the file .jsonl",
    ".parquet": "convert it, with pandas: pandas.read_parquet(...).to_csv('data.csv', index=False)",
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".zst", ".7z"), "unpack it"),
}
"""What to do with a file that is no table, by the end of its name."""
SEPARATOR_LINE = re.compile(r'"?sep=([,;|\t])"?')
SHOWN_NAMES = 8  # of the columns of a file, in an error


@dataclass(frozen=True, slots=True)
class TableRow:
    """One example of a table."""

    where: str
    """`file:line`, for errors."""
    values: dict[str, str]
    """The columns that were asked for; an optional one that the file lacks is not in it."""
    more: dict[str, list[str]] = field(default_factory=dict)
    """The texts after the first, by column, where the value in a JSON file is a list of texts."""


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
    with fitting(path):
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
        if Path(path).is_dir():
            raise DataError(f"{path}: is a folder; give one file in it")
        remedy = OTHER_KINDS.get(Path(path).suffix.lower(), "rename it")
        raise DataError(f"{path}: the name must end in {', '.join(TABLES)}, or one of them and .gz or .xz; {remedy}")
    return kind


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
            are_names = nearest is not None or (column in keys and all(map(str.isidentifier, names)))
            remedies = [renaming, naming] if are_names else [naming, renaming]
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
    command = filtered(path, f"(printf '%s\\n' {lines}; {rest})")
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

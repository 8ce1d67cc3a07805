"""Data files: what is there is read, all of it and as it is; anything else is one error that names file and line."""

import csv
import gzip
import io
import json
import lzma
import random
import re
import shlex
import subprocess
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.outcomes import in_parts

from rdrop.experiments.tasks.files import (
    LONGEST_LINE_BYTES,
    DataError,
    ParallelText,
    find_file,
    have_same_content,
    load_hub,
    read_lines,
)
from rdrop.experiments.tasks.splits import hold_out
from rdrop.experiments.tasks.tables import TableRow, read_table

MUTATED_FILES = 500
UNUSUAL = "a\u2028b\x85c\x0cd\x0be\x1cf\u00a0"  # str.splitlines would make six lines of it


def write(path: Path, content: str | bytes) -> Path:
    raw = content if isinstance(content, bytes) else content.encode()
    path.write_bytes({".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)(raw))
    return path


def zipped() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("sheet.xml", "x")
    return content.getvalue()


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_a_line_ends_at_a_newline_and_nowhere_else(tmp_path: Path, suffix: str, end: str) -> None:
    between = end or "\n"
    path = write(tmp_path / f"a.txt{suffix}", f"{UNUSUAL}{between}{between}  x {end}")
    assert read_lines(path) == [UNUSUAL, "", "  x "]


def test_what_csv_writer_and_spreadsheets_write_is_read_as_it_was_given(tmp_path: Path) -> None:
    rows = [["text", "label"], ['he said "no"', "1"], ["two\nlines", "0"], ["one, two", "1"], ["", "0"]]
    for encoding, name in (("utf-8", "a.csv"), ("utf-8-sig", "excel.csv"), ("utf-8-sig", "excel.csv.gz")):
        written = io.StringIO(newline="")
        csv.writer(written).writerows(rows)
        assert written.getvalue().count("\r\n") == len(rows)
        path = write(tmp_path / name, written.getvalue().encode(encoding))
        found = read_table(path, ["text", "label"])
        assert [[row.values["text"], row.values["label"]] for row in found] == rows[1:]
        assert [row.where.rpartition(":")[2] for row in found] == ["2", "3", "5", "6"]


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"", 1, "the file is empty"),
        (b"good\nb\xe4d\n", 2, "byte 2 is not UTF-8"),
        (b"good\nb\x00d\n", 2, "zero byte"),
        (b"good\r\r\n", 1, "carriage return"),
        (b"good\n\rbad\n", 2, "carriage return"),
        (b"good\nbad\r", 2, "carriage return"),
        (b"good\n\xef\xbb\xbfbad\n", 2, "byte order mark"),
        (b"\xef\xbb\xbf\xef\xbb\xbfbad\n", 1, "byte order mark"),
        ("good\n".encode("utf-16"), 1, "the file is UTF-16"),
        ("good\n".encode("utf-32"), 1, "the file is UTF-32"),
        (b"good\rbad\r", 1, "lines end in carriage returns"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, line: int, what: str) -> None:
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{line}: .*{what}.*; "):
        read_lines(path)


def test_the_longest_line_is_read_and_a_longer_one_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LONGEST_LINE_BYTES == 2**30
    monkeypatch.setattr("rdrop.experiments.tasks.files.LONGEST_LINE_BYTES", 1000)
    lines = ["x" * 1000, "y"]
    for end in ("\n", "\r\n"):
        assert read_lines(write(tmp_path / "a.txt", end.join(lines))) == lines
    for content, line in ((b"x" * 1001 + b"\n", 1), (b"good\n" + b"\x80" * 3000, 2)):
        with pytest.raises(DataError, match=rf"a\.txt:{line}: the line is longer than 1000 bytes; split it"):
            read_lines(write(tmp_path / "a.txt", content))


def test_a_bomb_of_zeros_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "bomb.txt.gz"
    path.write_bytes(gzip.compress(bytes(2**26), 1))
    tracemalloc.start()
    with pytest.raises(DataError, match=r"bomb\.txt\.gz:1: the line has a zero byte"):
        read_lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**24


def test_fields_and_lines_of_megabytes_are_read(tmp_path: Path) -> None:
    text = "word " * 400_000
    for name, content in (
        ("a.csv", f'text,label\n"{text}",1\n'),
        ("b.csv", f'text,label,{text.replace(" ", "")}\n"{text}",1,\n'),
        ("a.tsv", f"text\tlabel\n{text}\t1\n"),
        ("a.jsonl", json.dumps({"text": text, "label": 1})),
    ):
        (row,) = read_table(write(tmp_path / name, content), ["text", "label"])
        assert row.values == {"text": text, "label": "1"}, name


WHOLE = 'text,label\n"née",1\n"two\nlines",0\n'
WRONG = {
    "line ends of Windows, twice": (WHOLE.replace("\n", "\r\r\n").encode(), WHOLE),
    "line ends of old Macs": (WHOLE.replace("\n", "\r").encode(), WHOLE),
    "a carriage return in a field": (WHOLE.replace("two\n", "two\r").encode(), WHOLE.replace("two\n", "two ")),
    "both": (WHOLE.replace("two\n", "two\r").replace("1\n", "1\r\n").encode(), WHOLE.replace("two\n", "two ")),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + WHOLE.encode(), WHOLE),
    "byte order marks within": (WHOLE.replace('"two', '\ufeff"two').encode(), WHOLE),
    "zero bytes": (WHOLE.replace("two", "t\0wo").encode(), WHOLE),
    "UTF-16": (WHOLE.encode("utf-16"), WHOLE),
    "UTF-16 without a mark": (WHOLE.encode("utf-16-le"), WHOLE),
    "UTF-16, big end first, without a mark": (WHOLE.encode("utf-16-be"), WHOLE),
    "UTF-32": (WHOLE.encode("utf-32"), WHOLE),
}


def follow(error: DataError, **changed: str) -> Path:
    """Runs the command of a message, with what stands `changed` there, and returns the file that it makes."""
    command = str(error).rpartition(" by: ")[2]
    for old, new in changed.items():
        command = command.replace(f" {old} ", f" {new} ")
    subprocess.run(["bash", "-c", command], check=True)
    (target,) = shlex.split(command.rstrip(")"))[-1:]
    return Path(target)


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["a b.csv", "it's.csv.gz", "a.csv.xz"])
def test_the_remedy_of_a_message_mends_the_file_when_followed_word_for_word(
    tmp_path: Path, wrong: str, name: str
) -> None:
    content, mended = WRONG[wrong]
    path = write(tmp_path / name, content)
    before = path.read_bytes()
    with pytest.raises(DataError) as found:
        read_lines(path)
    assert read_lines(follow(found.value)) == mended.removesuffix("\n").split("\n")
    assert path.read_bytes() == before


def test_a_mended_side_of_parallel_text_brings_the_other_side_with_it(tmp_path: Path) -> None:
    write(tmp_path / "it's a corpus.de", "ein H\xe4uschen\n".encode("cp1252"))
    write(tmp_path / "it's a corpus.en", "a cottage\n")
    with pytest.raises(DataError, match="for cp1252 here") as found:
        list(ParallelText(tmp_path / "it's a corpus.de", tmp_path / "it's a corpus.en"))
    command, _, copy = str(found.value).partition("; if the two are named by what their names have in common, also: ")
    for line in (command.rpartition(" by: ")[2], copy):
        subprocess.run(["bash", "-c", line], check=True)
    assert list(ParallelText(tmp_path / "it's a corpus-mended.de", tmp_path / "it's a corpus-mended.en")) == [
        ("ein H\xe4uschen", "a cottage")
    ]


@pytest.mark.parametrize(
    ("encoding", "word"),
    [
        ("cp1252", "“née”"),
        ("cp1250", "źdźbło"),
        ("cp1251", "фильм"),
        ("koi8-r", "фильм"),
        ("macintosh", "café"),
        ("cp932", "映画は良い"),
        ("gb18030", "电影很好"),
        ("big5", "電影很好"),
        ("cp949", "영화가"),
    ],
)
def test_the_reader_chooses_an_encoding_by_what_a_word_becomes(tmp_path: Path, encoding: str, word: str) -> None:
    text = f'text,label\r\n"{word}, a",1\r\n'
    path = write(tmp_path / "a.csv", text.encode(encoding))
    with pytest.raises(DataError, match=rf"a\.csv:2: byte \d+ is not UTF-8, .*'{word}' by {encoding}") as found:
        read_lines(path)
    first = re.search(r"reads right for (\S+) here", str(found.value))
    assert first is not None
    assert read_lines(follow(found.value, **{first[1]: encoding})) == text.split("\r\n")[:-1]


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_a_remedy_that_fails_leaves_nothing_to_take_for_the_whole(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.txt{suffix}", "ok \u201c\n".encode("cp1252") + b"and \x81, which cp1252 has not\n")
    before = path.read_bytes()
    with pytest.raises(DataError, match="for cp1252 here") as found:
        read_lines(path)
    with pytest.raises(subprocess.CalledProcessError):
        follow(found.value)
    assert path.read_bytes() == before
    assert not (tmp_path / f"a-mended.txt{suffix}").exists()


PLAIN = b"text,label\ngood,1\n"


def id_of(value: object) -> str | None:
    """Returns a test's id without the content of its file: zip and gzip write the time into it."""
    return "content" if isinstance(value, bytes) else None


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.csv", zipped(), r"a zip archive, as \.xlsx .*, and no text; save the sheet as CSV"),
        ("a.csv.gz", zipped(), r"a zip archive, as \.xlsx .*, and not \.gz as its name says; save the sheet as CSV"),
        ("a.csv", b"PAR1\x15\x04\0\x15", r"a Parquet file, .*; convert it, with pandas: pandas\.read_parquet"),
        ("a.csv", b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n", "a PDF, and no text; save the text"),
        ("a.csv", b"\x89PNG\r\n\x1a\n\0", "an image, and no text"),
        ("a.csv.gz", gzip.compress(gzip.compress(PLAIN)), "compressed by gzip, and no text; unpack it"),
        ("a.csv", b"\n<!DOCTYPE html>\n<title>Sign in</title>", "an HTML page, .*; download the file itself"),
        ("a.jsonl", b'<?xml version="1.0"?>', "XML, and no table; write its rows as CSV"),
        ("a.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git-lfs's pointer"),
    ],
    ids=id_of,
)
def test_what_is_no_table_is_told_by_its_content(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{re.escape(name)}:1: the file is {what}"):
        read_table(tmp_path / name, ["text"], keys={"text": "data.text_column"})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a b.csv", gzip.compress(PLAIN)),
        ("a.csv", lzma.compress(PLAIN)),
        ("a.csv.gz", PLAIN),
        ("a.csv.xz", PLAIN),
        ("a.csv.gz", lzma.compress(PLAIN)),
    ],
    ids=id_of,
)
def test_a_file_is_read_under_the_name_that_a_message_gives_it(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match="rename it: mv -n") as found:
        read_table(tmp_path / name, ["text"])
    command = str(found.value).rpartition(": ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    assert read_table(shlex.split(command)[-1], ["text"])[0].values == {"text": "good"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", b'sep=;\r\ntext;label\r\n"good, x";1\r\n'),
        ("a.csv", b'sep=,\ntext,label\n"good, x",1\n'),
        ("a.csv", b'"sep=\t"\ntext\tlabel\ngood, x\t1\n'),
        ("a.tsv", b"sep=\t\ntext\tlabel\ngood, x\t1\n"),
    ],
)
def test_the_line_that_names_the_separator_is_no_header(tmp_path: Path, name: str, content: bytes) -> None:
    path = write(tmp_path / name, content)
    (row,) = read_table(path, ["text", "label"])
    assert (row.values, row.where) == ({"text": "good, x", "label": "1"}, f"{path}:3")


def test_a_text_that_does_not_fit_into_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv.gz", b"text\n" + b"good film " * 20_000 + b"\n")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=300_000))
    with pytest.raises(DataError, match=r"a\.csv\.gz: its text does not fit into the memory that is free"):
        read_table(path, ["text"])


def test_a_list_of_texts_is_read_where_it_may_stand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x", "label": ["a", "b"]}\n{"text": "y", "label": "c"}\n')
    rows = read_table(path, ["text"], optional=["label"], lists=["label"])
    assert [(row.values["label"], row.more) for row in rows] == [("a", {"label": ["b"]}), ("c", {})]
    for wrong in ("[]", '["a", null]', '[["a"]]'):
        write(path, f'{{"text": "x", "label": {wrong}}}')
        with pytest.raises(DataError, match=r"a\.jsonl:1: the value of 'label' must be text or a number"):
            read_table(path, ["text", "label"], lists=["label"])


def test_copies_of_a_file_have_its_content(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x\n" * 10)
    (tmp_path / "link.txt").symlink_to(path)
    for copy in (
        path,
        tmp_path / "link.txt",
        tmp_path / "b" / ".." / "a.txt",
        write(tmp_path / "a.txt.gz", "x\n" * 10),
        write(tmp_path / "windows.txt", "\ufeff" + "x\r\n" * 9 + "x"),
    ):
        (tmp_path / "b").mkdir(exist_ok=True)
        assert have_same_content(path, copy)
    for other in ("x\n" * 9, "x\n" * 11, "x\n" * 9 + "y\n"):
        assert not have_same_content(path, write(tmp_path / "other.txt.xz", other))


@pytest.mark.parametrize("compress", [gzip.compress, lzma.compress])
def test_a_compressed_file_that_is_cut_off_is_refused(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    whole = compress(bytes(random.Random(0).choices(b"abc \n", k=5000)))
    path = tmp_path / f"a.{'gz' if compress is gzip.compress else 'xz'}"
    for size in range(1, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"a\.(gz|xz):\d+: the compressed file is cut off or damaged"):
            read_lines(path)


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: No such file or directory; check the path"):
        read_lines(tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder, and not a file"):
        read_lines(tmp_path)


def test_parallel_lines_are_paired(tmp_path: Path) -> None:
    source, target = write(tmp_path / "a.de", f"{UNUSUAL}\nzwei\n"), write(tmp_path / "a.en.gz", "one\ntwo")
    assert list(ParallelText(source, target)) == [(UNUSUAL, "one"), ("zwei", "two")]
    assert list(ParallelText(source, source)) == [(UNUSUAL, UNUSUAL), ("zwei", "zwei")]


@pytest.mark.parametrize(("longer", "shorter"), [("a.de", "a.en"), ("a.en", "a.de")])
def test_unequal_counts_name_the_first_line_without_a_partner(tmp_path: Path, longer: str, shorter: str) -> None:
    write(tmp_path / longer, "1\n2\n3\n4\n")
    write(tmp_path / shorter, "1\n2\n")
    with pytest.raises(
        DataError, match=f"{longer}:3: this line has no partner, .*{shorter} has 2 lines and this file 4"
    ):
        ParallelText(tmp_path / "a.de", tmp_path / "a.en")


@pytest.mark.parametrize("empty", ["", " \t", "\u2028"])
def test_a_parallel_line_without_text_is_an_error(tmp_path: Path, empty: str) -> None:
    source, target = write(tmp_path / "a.de", "1\n2\n"), write(tmp_path / "a.en", f"1\n{empty}\n")
    with pytest.raises(DataError, match=r"a\.en:2: the line is empty; delete it, and line 2 of the other file"):
        list(ParallelText(source, target))


def test_csv_is_quoted_as_spreadsheets_do_and_rows_keep_their_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id,text,label\n1,"a ""b"", c\nd",x\n2,plain,"y"\n')
    rows = read_table(path, ["label", "text"], optional=["text2"])
    assert [row.values for row in rows] == [{"label": "x", "text": 'a "b", c\nd'}, {"label": "y", "text": "plain"}]
    assert [row.where for row in rows] == [f"{path}:2", f"{path}:4"]


def test_in_tsv_a_quote_is_a_character(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv.xz", 'text\tlabel\nhe said "x\t1\n" \\t y"\t0\n')
    assert [row.values["text"] for row in read_table(path, ["text"])] == ['he said "x', '" \\t y"']


def test_json_numbers_keep_their_spelling(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.jsonl.gz", '{"text": "a\\nb\\u2028", "label": 1.50}\n{"label": true, "text": "", "x": null}\n'
    )
    rows = read_table(path, ["text"], optional=["label"])
    assert [row.values for row in rows] == [{"text": "a\nb\u2028", "label": "1.50"}, {"text": "", "label": "true"}]
    assert rows[1].where == f"{path}:2"


@pytest.mark.parametrize(
    ("name", "content", "line", "what"),
    [
        ("a.csv", "text,lable\nx,1\n", 1, r"has no column 'label' \(the nearest is 'lable'\), only 'text', 'lable'"),
        ("a.csv", "text,label,text\nx,1,y\n", 1, "the column text is there 2 times"),
        ("a.csv", "text,label\nx,1\ny\n", 3, "the row has 1 fields and the header 2"),
        ("a.csv", "text,label\nx,1\n\n", 3, "the line is empty"),
        ("a.csv", "text,label\nx,1\n, \n", 3, "the row is empty; delete it"),
        ("a.csv", 'text,label\nx,1\n"y,1\nz,0\n', 3, "not CSV"),
        ("a.csv", "text,label\n", 1, "only the line that names the columns"),
        ("a.tsv", "text\tlabel\nx\t1\t2\n", 2, "the row has 3 fields and the header 2"),
        ("a.tsv", "\nx\t1\n", 1, "has no column 'text', only ''"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text": "y", "lab', 2, "not JSON"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"txt": "y", "label": 1}', 2, "has no column 'text'.*nearest is 'txt'"),
        ("a.jsonl", '{"text": "x", "label": 1, "text": "y"}', 1, "a key is given twice"),
        ("a.jsonl", '{"text": "x", "label": NaN}', 1, "NaN is no number in JSON"),
        (
            "a.jsonl",
            '{"text": "x", "label": null}',
            1,
            r"not null; correct it, or delete the line \(a column that is not needed can be left out of all lines\)",
        ),
        ("a.jsonl", '{"text": "x", "label": {}}', 1, "'label' must be text or a number; correct it"),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', 1, "half of a surrogate pair"),
        ("a.jsonl", '{"text": "\\u0000", "label": 1}', 1, "zero character"),
        ("a.jsonl", '["text", "label"]', 1, "must be a JSON object"),
        ("a.jsonl", "[" * 100_000, 1, "nested too deeply"),
    ],
)
def test_a_table_that_is_not_what_it_should_be_is_refused(
    tmp_path: Path, name: str, content: str, line: int, what: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(DataError, match=f"^{re.escape(str(path))}:{line}: .*{what}"):
        read_table(path, ["text", "label"])


@pytest.mark.parametrize("name", ["a.txt", "a", "a.gz", "a.csv.zip", "a.csv.gz.gz"])
def test_a_table_of_an_unknown_kind_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"must end in \.csv, \.tsv, \.jsonl"):
        read_table(write(tmp_path / name, "text\nx\n"), ["text"])


def test_a_table_of_another_program_says_how_to_make_one(tmp_path: Path) -> None:
    for name, remedy in (
        ("a.xlsx", "save the sheet as CSV"),
        ("a.json", "an object on a line"),
        ("a.zip", "unpack it"),
    ):
        with pytest.raises(DataError, match=rf"must end in \.csv, .*; .*{remedy}"):
            read_table(write(tmp_path / name, "PK"), ["text"])


@pytest.mark.parametrize(
    ("name", "delimiter", "quoting"),
    [
        ("a b.csv", ";", csv.QUOTE_MINIMAL),
        ("a.csv.gz", ";", csv.QUOTE_ALL),
        ("a.csv", "\t", csv.QUOTE_MINIMAL),
        ("it's.csv.xz", "|", csv.QUOTE_MINIMAL),
        ("a.tsv", ",", csv.QUOTE_MINIMAL),
        ("a.tsv", "\t", csv.QUOTE_ALL),
        ("a.tsv.gz", ";", csv.QUOTE_MINIMAL),
    ],
)
def test_the_file_that_a_message_tells_to_make_of_another_dialect_is_read(
    tmp_path: Path, name: str, delimiter: str, quoting: Any
) -> None:
    rows = [["text", "label"], ['he said "née", twice; ok', "1"], ["two\nlines | and\ttabs", "0"]]
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=delimiter, quoting=quoting).writerows(rows)
    path = write(tmp_path / name, written.getvalue())
    with pytest.raises(DataError, match=r":1: the columns are separated by .*; give a file made by: ") as found:
        read_table(path, ["text", "label"], keys={"text": "data.text_column"})
    command = str(found.value).rpartition("made by: ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    (new,) = [*tmp_path.glob("*-commas.csv"), *tmp_path.glob("*-tabs.tsv")]
    assert new.suffix == (".tsv" if ".tsv" in name else ".csv")  # which a folder may ask for
    if new.suffix == ".tsv":
        rows[2][0] = "two lines | and tabs"
    assert [[row.values["text"], row.values["label"]] for row in read_table(new, ["text", "label"])] == rows[1:]


def test_a_long_field_and_a_byte_order_mark_survive_the_change_of_dialect(tmp_path: Path) -> None:
    rows = [["text", "label"], ["x" * 200_000, "1"], ["y", "0"]]
    written = io.StringIO(newline="")
    csv.writer(written, delimiter=";", quoting=csv.QUOTE_ALL).writerows(rows)
    path = write(tmp_path / "a.csv", "\ufeff" + written.getvalue())
    with pytest.raises(DataError, match="made by: ") as found:
        read_table(path, ["text", "label"])
    subprocess.run(["bash", "-c", str(found.value).rpartition("made by: ")[2]], check=True)
    new = tmp_path / "a-commas.csv"
    assert [[row.values["text"], row.values["label"]] for row in read_table(new, ["text", "label"])] == rows[1:]


def test_a_table_of_one_column_is_no_other_dialect(tmp_path: Path) -> None:
    for name, header in (("a.csv", '"a, b; c"'), ("a.tsv", "text"), ("a.csv", "text")):
        column = header.strip('"')
        assert read_table(write(tmp_path / name, f"{header}\nx\n"), [column])[0].values == {column: "x"}


def test_the_first_name_that_is_there_is_found(tmp_path: Path) -> None:
    write(tmp_path / "valid.tsv.gz", "x")
    dev = write(tmp_path / "dev.tsv.xz", "x")
    assert find_file(tmp_path, "dev.tsv", "valid.tsv") == dev
    with pytest.raises(DataError, match=r"has no train\.tsv or train\.csv, nor one with \.gz or \.xz"):
        find_file(tmp_path, "train.tsv", "train.csv")
    with pytest.raises(DataError, match="there is no such folder"):
        find_file(tmp_path / "none", "train.tsv")


def test_two_files_of_one_split_are_refused_where_only_one_may_be_there(tmp_path: Path) -> None:
    write(tmp_path / "valid.tsv", "x")
    assert find_file(tmp_path, "valid.tsv", "dev.tsv", only=True) == tmp_path / "valid.tsv"
    write(tmp_path / "dev.tsv.gz", "x")
    with pytest.raises(DataError, match=r"valid\.tsv and dev\.tsv\.gz are both there; move the one away"):
        find_file(tmp_path, "valid.tsv", "dev.tsv", only=True)


def test_held_out_rows_are_disjoint_whole_and_the_seed_s_own() -> None:
    rows = hold_out(105, ("valid", "test"), seed=3)
    assert {split: len(own) for split, own in rows.items()} == {"train": 85, "valid": 10, "test": 10}
    assert sorted(np.concatenate([*rows.values()])) == list(range(105))
    alone = hold_out(105, ["test"], seed=3)
    assert alone.keys() == {"train", "test"}
    assert np.array_equal(alone["test"], rows["test"])
    assert np.array_equal(alone["train"], np.sort([*rows["train"], *rows["valid"]]))
    assert not np.array_equal(hold_out(105, ["test"], seed=4)["test"], rows["test"])
    assert hold_out(9, (), seed=0)["train"].tolist() == list(range(9))
    with pytest.raises(DataError, match="9 examples are too few to hold out 10 %"):
        hold_out(9, ["test"], seed=0)


def test_what_datasets_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*arguments: object, **options: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"^org/set \(de\): the split train cannot be loaded \(no network\); check data.hub"
    ):
        load_hub("org/set", "de", "train")


# ---------------------------------------------------------------------------------------------------------- fuzzing

SENTENCES = ["the cat sat", 'he said "no"', "naïve Ünïcödé 文字", "one, two", "tab-less", "x" * 300]


def table(kind: str, rows: int) -> bytes:
    examples = [(SENTENCES[row % len(SENTENCES)], str(row % 3)) for row in range(rows)]
    if kind == ".jsonl":
        return "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in examples).encode()
    if kind == ".tsv":
        return "".join(f"{text}\t{label}\n" for text, label in [("text", "label"), *examples]).encode()
    quoted = ["text,label", *('"{}",{}'.format(text.replace('"', '""'), label) for text, label in examples)]
    return "".join(f"{line}\n" for line in quoted).encode()


def mutated(content: bytes, chance: random.Random) -> bytes:
    """One of the accidents that befall files."""
    place = chance.randrange(len(content))
    lines = content.split(b"\n")
    line = chance.randrange(len(lines))
    match chance.randrange(10):
        case 0:
            return content[:place]
        case 1:
            return content[:place] + bytes([chance.randrange(256)]) + content[place + 1 :]
        case 2:
            return (
                content[:place]
                + chance.choice([b"\0", b"\r", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"\t", b",", b"{"])
                + content[place:]
            )
        case 3:
            return b"\xef\xbb\xbf" + content
        case 4:
            return content.replace(b"\n", b"\r\n")
        case 5:
            return b"\n".join(lines[:line] + lines[line + 1 :])
        case 6:
            return b"\n".join([*lines[:line], b"", *lines[line:]])
        case 7:
            return b"\n".join([*lines[:line], lines[line] * 5000, *lines[line + 1 :]])
        case 8:
            return content.decode().encode(chance.choice(["utf-16", "utf-8-sig", "utf-32-le"]))
        case _:
            return b"" if chance.random() < 0.2 else content[place:]


@pytest.mark.parametrize(("files", "seed"), [(MUTATED_FILES, 12), *in_parts(5_000)])
def test_mutated_files_are_read_whole_or_refused_with_their_line(
    files: int, seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(seed)
    refused = 0
    for index in range(files):
        kind, suffix = chance.choice([".csv", ".tsv", ".jsonl"]), chance.choice(["", "", ".gz", ".xz"])
        content = table(kind, rows=chance.randrange(1, 30))
        path = tmp_path / f"{index}{kind}{suffix}"
        if suffix and chance.random() < 0.5:  # the file is damaged after it was compressed
            write(path, content)
            path.write_bytes(mutated_bytes(path.read_bytes(), chance))
        else:
            content = mutated(content, chance)
            write(path, content)
        lines, problem = outcome(read_lines, path)
        if lines is not None:  # nothing is lost, added or changed
            whole = content.removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").removesuffix(b"\n")
            assert "\n".join(lines).encode() == whole
        rows, table_problem = outcome(read_table, path, ["text", "label"])
        for message in (problem, table_problem):
            assert message is None or re.fullmatch(rf"{re.escape(str(path))}:\d+: .+; .+", message), message
        refused += rows is None
        if rows is not None:
            assert [row.values for row in rows] == [values for part in parts(rows, lines, kind) for values in part]
        path.unlink()
    assert files // 2 < refused < files
    record_property("files", files)
    record_property("of them refused", refused)


@pytest.mark.parametrize(("pairs", "seed"), [(100, 0), *in_parts(1_500)])
def test_two_mutated_files_are_paired_line_by_line_or_one_of_them_is_refused_with_its_line(
    pairs: int, seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(seed)
    refused = 0
    for _ in range(pairs):
        suffix = chance.choice(["", ".gz", ".xz"])
        rows = chance.randrange(1, 30)
        sides = ["".join(f"{SENTENCES[(row + side) % len(SENTENCES)]}\n" for row in range(rows)) for side in (0, 1)]
        contents = [mutated(side.encode(), chance) if chance.random() < 0.4 else side.encode() for side in sides]
        source, target = (write(tmp_path / f"{side}{suffix}", contents[side]) for side in (0, 1))
        found, problem = outcome(read_pairs, source, target)
        refused += found is None
        if found is None:
            place = rf"({re.escape(str(source))}|{re.escape(str(target))}):\d+: .+; .+"
            assert re.fullmatch(place, str(problem)), problem
            continue
        for side, lines in enumerate(zip(*found, strict=True)):
            whole = contents[side].removeprefix(b"\xef\xbb\xbf").replace(b"\r\n", b"\n").removesuffix(b"\n")
            assert "\n".join(lines).encode() == whole
            assert all(line.strip() for line in lines)
    assert pairs // 10 < refused < pairs
    record_property("files", 2 * pairs)
    record_property("pairs refused", refused)


def read_pairs(source: Path, target: Path) -> list[tuple[str, str]]:
    return list(ParallelText(source, target))


def outcome(read: Callable[..., Any], *arguments: object) -> tuple[Any, str | None]:
    """What was read, or the message of the `DataError`. Any other exception is a defect, and passes through."""
    try:
        return read(*arguments), None
    except DataError as error:
        return None, str(error)


def mutated_bytes(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    flipped = bytes([content[place] ^ (1 << chance.randrange(8))])
    return content[:place] if chance.random() < 0.5 else content[:place] + flipped + content[place + 1 :]


def parts(rows: list[TableRow], lines: list[str], kind: str) -> Iterator[list[dict[str, str]]]:
    """The rows again, each from its own lines alone: together these are all the lines after the header."""
    starts = [int(row.where.rpartition(":")[2]) - 1 for row in rows]
    assert starts[0] == (kind != ".jsonl")
    for start, end in pairwise([*starts, len(lines)]):
        own = "\n".join(lines[start:end])
        if kind == ".csv":
            yield list(csv.DictReader(io.StringIO(f"{lines[0]}\n{own}", newline="\n")))
        elif kind == ".tsv":
            yield [dict(zip(lines[0].split("\t"), own.split("\t"), strict=True))]
        else:
            yield [{key: str(value) for key, value in json.loads(own).items()}]

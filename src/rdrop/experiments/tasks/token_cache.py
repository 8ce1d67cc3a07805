"""Keeps what large training texts become on disk: the second run finds its tokens there.

    $RDROP_CACHE/tokens/<digest>/        whole, or not there; made by one process, read by any

The digest is of all that the tokens depend on: the text, the settings, the version of the library that splits words.
Of fewer than `CACHED_FROM` texts nothing is kept: they are encoded in a second or two.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from rdrop.experiments.run_folder.data_files import note_read
from rdrop.experiments.tasks.files import AnyPath, DataError, MissingDataError, require_regular_file
from rdrop.experiments.tasks.token_sequences import Columns, TokenSequences, TokenWriter, in_parts

FOLDER_VARIABLE = "RDROP_CACHE"
SIZES = "sizes.json"
CACHED_FROM = 100_000
SILENT_SECONDS = 5.0
"""How long a process waits for another one before it says so."""


def cache_folder() -> Path:
    """Returns `$RDROP_CACHE`, or else `rdrop` in the user's folder of caches."""
    own = os.environ.get(FOLDER_VARIABLE)
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rdrop"


def cached(content: Mapping[str, object], make: Callable[[Path], None]) -> Path:
    """Returns the folder that `make` writes for `content`, which is JSON; `make` is called if it is not there yet.

    A process that wants what another one is making waits for it. What a killed one left is made anew. Raises
    `DataError` where the cache cannot be written, or where files of it are gone or have another size.
    """
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_folder() / "tokens" / digest
    try:
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if not folder.exists():
                    _make(folder, make)
        sizes = (folder / SIZES).read_text()
    except OSError as error:
        raise DataError(
            f"{folder}: {error.strerror or error}; set {FOLDER_VARIABLE} to a folder that can be written and has room "
            "for 4 bytes a token"
        ) from error
    if sizes != _sizes(folder):
        raise DataError(f"{folder}: is damaged; delete it, and it is made again")
    return folder


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = FileLock(f"{folder}.lock")
    try:
        lock.acquire(timeout=SILENT_SECONDS)
    except Timeout:
        warnings.warn(f"waiting for another process that reads and encodes the same texts, into {folder}", stacklevel=4)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def is_large(texts: int) -> bool:
    """Whether what becomes of so many texts is kept on disk."""
    return texts >= CACHED_FROM


def columns_of(parts: Callable[[], Iterable[Columns]], content: dict[str, object] | None) -> dict[str, TokenSequences]:
    """Returns the columns that `parts` makes, each joined: those kept for `content`, or in memory where it is None."""
    if content is None:
        found: dict[str, list[TokenSequences]] = {}
        for part in parts():
            for name, some in part.items():
                found.setdefault(name, []).append(TokenSequences(some))
        return {name: TokenSequences.joined(own) for name, own in found.items()}
    made_by = {name: version(name) for name in ("tokenizers", "transformers")} | {"format": "1"}  # of what is written
    folder = cached({**content, **made_by}, partial(write_columns, parts))
    return {path.name: TokenSequences.load(path) for path in folder.iterdir() if path.is_dir()}


def write_columns(parts: Callable[[], Iterable[Columns]], folder: Path) -> None:
    """Writes each column to a folder of its name, where `TokenSequences.load` reads it."""
    writers: dict[str, TokenWriter] = {}
    for part in parts():
        for name, some in part.items():
            if name not in writers:
                writers[name] = TokenWriter(folder / name)
            writers[name].append(some)
    for writer in writers.values():
        writer.close()


def text_digest(texts: Iterable[str]) -> str:
    """Returns the SHA-256 of texts, one after the other; where one ends counts too."""
    digest = hashlib.sha256()
    for some in in_parts(texts):
        digest.update(np.fromiter(map(len, some), dtype="<i8", count=len(some)).tobytes())
        digest.update("".join(some).encode(errors="surrogatepass"))
    return digest.hexdigest()


def tokenizer_content(tokenizer: Any) -> dict[str, object] | None:
    """Describes a tokenizer of transformers by all that its ids depend on; None where that cannot be read."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return None
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    for last_used in ("truncation", "padding"):
        described.pop(last_used, None)
    names = ("truncation_side", "model_input_names", "split_special_tokens")
    settings = {name: getattr(tokenizer, name, None) for name in names}
    return {"tokenizer": described, "class": type(tokenizer).__name__} | settings


def file_digest(path: AnyPath) -> str:
    """Returns the SHA-256 of a file as it lies on disk."""
    require_regular_file(path)
    note_read(path)
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise MissingDataError(f"{path}: {error.strerror or error}; check the path") from error


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    unfinished = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        make(unfinished)
        (unfinished / SIZES).write_text(_sizes(unfinished))
        unfinished.rename(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _sizes(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SIZES)
    return json.dumps({str(path.relative_to(folder)): path.stat().st_size for path in files})

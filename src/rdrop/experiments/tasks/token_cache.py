"""Keeps what large training texts become on disk: the second run finds its tokens there.

    $RDROP_CACHE/tokens/<digest>/        whole, or not there; made by one process, read by any

The digest is of all that the tokens depend on: the text, the settings, the version of the library that splits words.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from filelock import FileLock

from rdrop.experiments.tasks.files import AnyPath, DataError

FOLDER_VARIABLE = "RDROP_CACHE"
SIZES = "sizes.json"


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
            with FileLock(f"{folder}.lock"):
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


def file_digest(path: AnyPath) -> str:
    """Returns the SHA-256 of a file as it lies on disk."""
    try:
        with Path(path).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the path") from error


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

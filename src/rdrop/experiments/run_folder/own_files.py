"""The user's own data files: whether they are still what a run was trained on.

This module needs the standard library only.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from rdrop.experiments.run_folder.folder import ResultsError
from rdrop.experiments.shown import shell_word

KEYS = ("train", "valid", "test", "unlabeled")
"""The keys of `data` that name the user's own files."""


def digests(data: Mapping[str, Any]) -> dict[str, str]:
    """Returns by the key 16 hexadecimal digits of what is in the user's own files, less those that are not there.

    `data` is that section of a recipe. A key may name a file, the beginning of the names of several (corpus.en and
    corpus.de by corpus), or a folder, of which the names and sizes of the files count.
    """
    named = {key: Path(data[key]) for key in KEYS if isinstance(data.get(key), str)}
    found = {key: _digest(path) for key, path in named.items()}
    return {key: digest for key, digest in found.items() if digest is not None}


def changed(recorded: Mapping[str, str], data: Mapping[str, Any], keys: Iterable[str] = KEYS) -> list[str]:
    """Returns the own files of the `keys` that are there, and have another content than the one that was recorded."""
    now = digests({key: data.get(key) for key in keys if key in recorded})
    return [f"{data[key]} (data.{key})" for key in now if now[key] != recorded[key]]


def require_unchanged(runs: Iterable[tuple[Path, Mapping[str, str], Mapping[str, Any]]]) -> None:
    """Raises `ResultsError` if own files have changed since runs were trained on them.

    `runs` has for each its folder, what `digests` returned then, and the section `data` of its recipe. A file that is
    gone is no error: the result stands for itself.
    """
    found = [(folder, what) for folder, recorded, data in runs if (what := changed(recorded, data))]
    if found:
        files = ", ".join(dict.fromkeys(file for _, what in found for file in what))
        of = "this run was" if len(found) == 1 else f"{len(found)} of these runs were"
        raise ResultsError(
            f"{files}: has changed since {of} trained with it, and results of both would be compared as if of one. Put "
            "the file back, give the new one another name, or choose another --runs; or delete what was trained to "
            f"train it anew: rm -r {' '.join(shell_word(folder) for folder, _ in found)}"
        )


def _digest(path: Path) -> str | None:
    if path.is_dir():
        names = sorted(Path(folder, file) for folder, _, files in os.walk(path) for file in files)
        listed = [f"{name.relative_to(path)} {name.stat().st_size}" for name in names]
        return hashlib.sha256("\0".join(listed).encode(errors="surrogateescape")).hexdigest()[:16]
    others = () if path.is_file() else path.parent.glob(f"{glob.escape(path.name)}.*")
    files = [path] if path.is_file() else sorted(file for file in others if file.is_file())
    stats = [file.stat() for file in files]
    parts = [_content(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16] if parts else None


@cache
def _content(path: str, size: int, changed_at: int) -> str:
    """A file is read once as long as its size and its time stay."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

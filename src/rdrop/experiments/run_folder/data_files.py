"""The local files that a run was read from, its data and the weights it starts from: whether they still hold the same.

This module needs the standard library only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from rdrop.experiments.run_folder.folder import RESULT, ResultsError, read_file
from rdrop.experiments.shown import shell_word

OF_MODELS = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""How the files of a pre-trained model end that decide what it computes, and how it reads text."""

Contents = Mapping[str, str]
"""By the path, as it was given: 16 hexadecimal digits of what a file holds; of a folder, of the names in it."""

_noted: ContextVar[set[str] | None] = ContextVar("noted", default=None)


def note_read(path: str | os.PathLike[str]) -> None:
    """Notes a file whose content, or a folder whose list of names, becomes a part of the data."""
    noted = _noted.get()
    if noted is not None:
        noted.add(os.fspath(path))


def model_folder(recipe: Mapping[str, Any]) -> str | None:
    """Returns the local folder that the saved recipe names as its pre-trained model."""
    name = recipe["model"].get("name") if isinstance(recipe.get("model"), Mapping) else None
    return name if isinstance(name, str) and os.path.isdir(name) else None


def note_model(recipe: Mapping[str, Any]) -> None:
    """Notes the files of the recipe's pre-trained model, if that is a local folder."""
    folder = model_folder(recipe)
    if folder is not None:
        for name in os.listdir(folder):
            if name.endswith(OF_MODELS):
                note_read(os.path.join(folder, name))


def names_of(recipe: Mapping[str, Any]) -> dict[str, object]:
    """Returns what the saved recipe says of places: its section `data`, and whose weights it starts from."""
    return {**recipe["data"], "model.name": model_folder(recipe), "init_from": recipe.get("init_from")}


def of_data(contents: Contents, recipe: Mapping[str, Any]) -> Contents:
    """Returns those files that the data were read from, and not the weights: each seed may start from its own."""
    model = recipe.get("model")
    starts = (model.get("name") if isinstance(model, Mapping) else None, recipe.get("init_from"))
    of_start = {path for name in starts for path in below(contents, name)}
    return {path: digest for path, digest in contents.items() if path not in of_start}


@contextmanager
def noting(contents: dict[str, str], data: Mapping[str, object]) -> Iterator[None]:
    """Puts into `contents`, when the block ends, what was noted in it of the files that `data` names."""
    token = _noted.set(set())
    try:
        yield
        found = {path: digest for path in sorted(_noted.get() or ()) if (digest := _content(path)) is not None}
        named = {path for value in data.values() for path in below(found, value)}
        contents.update({path: digest for path, digest in found.items() if path in named})
    finally:
        _noted.reset(token)


def changed(recorded: Contents) -> list[str]:
    """Returns the paths that hold something else now; what is gone is not one of them."""
    return [path for path, digest in recorded.items() if _content(path) not in (digest, None)]


def changed_in_place(recorded: Contents, was: Mapping[str, object], data: Mapping[str, object]) -> list[str]:
    """Returns the paths that hold something else now, less those for which `data` no longer says what it said then
    (`was`).
    """
    replaced = {path for key, name in was.items() if data.get(key) != name for path in below(recorded, name)}
    return [path for path in changed(recorded) if path not in replaced]


def is_other_when_moved(recorded: Contents, was: object, contents: Contents, name: object) -> bool:
    """Returns whether something that was read below `was` is not at the same place below `name`, as in `contents`."""
    now = {rest: contents[path] for path, rest in below(contents, name).items()}
    return any(now.get(rest, recorded[path]) != recorded[path] for path, rest in below(recorded, was).items())


def below(contents: Contents, name: object) -> dict[str, str]:
    """Returns the paths of what `name`, a value in `data`, stands for: a file, a folder, or the beginning of names.

    By the path: what follows `name` in it.
    """
    if not isinstance(name, str) or not name:
        return {}
    whole = os.path.abspath(name)
    absolute = {path: os.path.abspath(path) for path in contents}
    rests = {path: place.removeprefix(whole) for path, place in absolute.items() if place.startswith(whole)}
    return {path: rest for path, rest in rests.items() if whole == os.sep or rest[:1] in ("", ".", os.sep)}


def contents_of(folder: Path) -> Contents:
    """Returns what was recorded for the run in the folder, finished or begun; nothing where that cannot be read."""
    states = sorted(folder.glob("checkpoints/*/state.json"), reverse=True)  # the newest first, by their names
    for path in (folder / RESULT, *states):
        with suppress(OSError, ValueError, AttributeError, RecursionError):  # also a ResultsError
            found = json.loads(read_file(path))
            files = found.get("state", found).get("files")
            if isinstance(files, dict):
                return files
    return {}


def require_unchanged(runs: Iterable[Path]) -> None:
    """Raises `ResultsError` if files have changed since runs began with them. A file that is gone is no error."""
    found = [(run, what) for run in runs if (what := changed(contents_of(run)))]
    if found:
        files = ", ".join(dict.fromkeys(path for _, what in found for path in what))
        number = "a run" if len(found) == 1 else f"{len(found)} runs"
        folders = " ".join(shell_word(run) for run, _ in found)
        raise ResultsError(
            f"{files}: changed after {number} had been trained with it, fully or in part, and results of both contents "
            "would be compared as if of one. Put back what it held, give the new one another name, or choose another "
            f"--runs; or delete what was trained to train it anew: rm -r {folders}"
        )


def _content(path: str) -> str | None:
    try:
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                names = sorted(entry.name for entry in entries if entry.name[0] != ".")
            return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:16]
        stat = os.stat(path)
        return _digest(path, stat.st_size, stat.st_mtime_ns) if os.path.isfile(path) else None
    except (OSError, ValueError):  # no path at all: a result says what it likes
        return None


@cache
def _digest(path: str, size: int, changed_at: int) -> str:
    """A file is read once as long as its size and its time stay."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]

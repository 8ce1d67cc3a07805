"""The run folder: the one interface between training and reporting.

    runs/<recipe name>/<digest>/
      recipe.json      the complete recipe
      metrics.jsonl    one JSON object a line
      result.json      written last: its presence says the run is finished
      failed.json      of a run that cannot go on, whatever is tried: at which step, what, and with which examples
      lock.json        while a process trains the run: which
      checkpoints/     see `rdrop.experiments.training.checkpoints`

Every file is valid JSON. JSON has no NaN and no infinity, and a run that met one must say so: such a number is written
as the string "NaN", "Infinity" or "-Infinity", and read back as the float it was. No other string is changed.

This module needs the standard library only, so that a report can be made where nothing is trained.
"""

import errno
import json
import math
import os
import stat
import sys
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import disk_usage
from typing import Any

from rdrop.experiments.run_folder import lock, saved
from rdrop.experiments.run_folder.lock import RunLock
from rdrop.experiments.shown import shell_word

FORMAT = 1
"""The version of the layout; `result.json` carries it."""

RECIPE, METRICS, RESULT, FAILURE = "recipe.json", "metrics.jsonl", "result.json", "failed.json"
CUT_OFF = b" (cut off)"
"""The end of a line that a crash has cut off, once another follows it."""

TUNING = "_tuning"
"""The folder of the runs of `rdrop tune`'s search, below that of the others. No recipe has a name like it."""

CHECKPOINTS = "checkpoints"
PREDICTIONS = "predictions.jsonl.gz"
_FILES = (RECIPE, METRICS, RESULT, FAILURE, lock.FILE)
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""The errors of a disk that is full, for every run."""
_LARGEST_STEP = 2**53
"""More updates than any training has; it can be drawn."""

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class ResultsError(ValueError):
    """A file of a run folder that is not what it should be: which file, what is wrong, what to do."""


class RunTakenOverWarning(RuntimeWarning):
    """A run whose process is gone goes on in this one."""


class StorageError(OSError):
    """A write that failed: the path, the bytes it needed and the bytes that are free."""


class RunFolder:
    """Reads and writes the files of one run. Nothing is created before the first write."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @contextmanager
    def held(self) -> Iterator[RunLock]:
        """Keeps every other process from training this run. Raises `RunLockedError` if one does."""
        with explain_failed_write(self.path / lock.FILE, lock.MOST_BYTES):
            held, predecessor = RunLock.acquire(self.path)
        if predecessor is not None:
            message = f"{self.path}: taken over from {predecessor}, which is gone."
            warnings.warn(message, RunTakenOverWarning, stacklevel=3)
        try:
            # What a process that was killed was writing; of the lock, the lock takes care.
            for name in (RECIPE, METRICS, RESULT, FAILURE, PREDICTIONS):
                for leftover in self.path.glob(f"{name}.*.tmp"):
                    with suppress(OSError):  # it harms nobody
                        leftover.unlink()
            yield held
        finally:
            held.release()

    def write_recipe(self, recipe: dict[str, Any]) -> None:
        write_atomically(self.path / RECIPE, _to_json(recipe, indent=2))

    def restore_recipe(self, recipe: dict[str, Any]) -> None:
        """Writes the recipe of a run, if somebody deleted its file."""
        if not (self.path / RECIPE).exists():
            self.write_recipe(recipe)

    def recipe(self) -> dict[str, Any]:
        if not (self.path / RECIPE).exists():
            raise ResultsError(f"{self.path / RECIPE} is missing. Train the run again, which writes it; it goes on.")
        path = self.path / RECIPE
        return saved.upgraded(_parse_object(read_file(path), str(path), remedy(path), restore=False))

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds one line to `metrics.jsonl`, on the disk when this returns."""
        append_synced(self.path / METRICS, _to_json(row))

    def truncate_metrics(self, step: int) -> None:
        """Drops the rows after `step` (all of them for -1) and a half-written last line.

        A resumed run calls this with the step of its checkpoint, so that no row ever stands twice.
        """
        kept = [_to_json(row) for row in self.metrics() if row["step"] <= step]
        if (self.path / METRICS).exists():
            write_atomically(self.path / METRICS, b"".join(kept))

    def metrics(self) -> list[dict[str, Any]]:
        """All rows, oldest first."""
        return [_parse_row(line, where) for line, where in read_lines(self.path / METRICS)]

    def write_result(self, result: dict[str, Any]) -> None:
        write_atomically(self.path / RESULT, _to_json(result, indent=2))

    def result(self) -> dict[str, Any] | None:
        """The result, or None while the run is unfinished."""
        self.require_its_kinds()
        path = self.path / RESULT
        if not path.exists():
            return None
        result = _read_object(path)
        if result.get("format") != FORMAT:
            raise ResultsError(
                f"{path}: format is {result.get('format')!r} and this version of rdrop reads {FORMAT}. "
                f"Read it with the version that wrote it. {remedy(path)}"
            )
        if isinstance(result.get("recipe"), dict):
            result["recipe"] = saved.upgraded(result["recipe"])
        return result

    def require_its_kinds(self) -> None:
        """Raises `ResultsError` where a folder stands in the place of a file of the run, or a file in that of a folder.

        Asked before anything of the run is read or written, so that no other run meets it.
        """
        for name in _FILES:
            path = self.path / name
            if os.path.lexists(path) and not path.is_file():
                raise ResultsError(f"{path}: is no file, but {_kind(path)}. {remedy(path)}")
        folder = self.path / CHECKPOINTS
        steps = sorted(folder.glob("step-*")) if folder.is_dir() else []
        for path in (folder, *steps):
            if os.path.lexists(path) and not path.is_dir():
                raise ResultsError(f"{path}: is no folder, but {_kind(path)}. {remedy(path)}")

    def write_failure(self, step: int, what: str, batch: dict[str, Any] | None = None) -> None:
        """Records that the run cannot go on: training it again would end at the same step, with the same `batch`."""
        found = {"format": FORMAT, "step": step, "what": what, "batch": batch}
        write_atomically(self.path / FAILURE, _to_json(found, indent=2))

    def clear_failure(self) -> None:
        (self.path / FAILURE).unlink(missing_ok=True)

    def failure(self) -> str | None:
        """Returns why the run cannot go on, or None if nothing is known against it."""
        path = self.path / FAILURE
        if not path.exists():
            return None
        what = _read_object(path).get("what")
        if not isinstance(what, str):
            raise ResultsError(f"{path}: 'what' is not what it should be, a text. {remedy(path)}")
        return f"diverged: {what}"


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder. `problem` says what is missing or damaged; it is None for a whole, finished run.

    `failure` says why a run has diverged that has no score for it.
    """

    path: Path
    recipe: dict[str, Any] | None
    result: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    problem: str | None = None
    failure: str | None = None


def find_runs(root: str | os.PathLike[str]) -> list[RunRecord]:
    """Every run folder at or below `root`, in the order of their paths; but not those of a search, below `_tuning`.

    An unfinished or damaged folder is a record with a `problem`, not an error: one bad run must not hide the good ones.
    Raises `ResultsError` if `root` is not a folder.
    """
    if not Path(root).is_dir():
        what = "is not a folder" if os.path.lexists(root) else "does not exist"
        raise ResultsError(
            f"{root} {what}. Give the folder that holds the runs; `rdrop compare digits` makes some, in runs/."
        )
    return [_read_record(path) for path in _run_paths(Path(root))]


def read_file(path: Path) -> bytes:
    """Returns the content of a file of a run; `ResultsError` where there is a folder, a pipe, a socket or a device."""
    if not stat.S_ISREG(path.stat().st_mode):  # reading it may never end
        raise ResultsError(f"{path}: is no file, but {_kind(path)}. {remedy(path)}")
    return path.read_bytes()


def _kind(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    if path.is_dir():
        return "a folder"
    return "a file" if path.is_file() else "a pipe, a socket or a device"


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces `path` by `content`: a reader sees the old file or the new one, even after a crash, never a part.

    Several processes may do so at a time; the last one's content stays.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    with explain_failed_write(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(temporary, content)
        os.replace(temporary, path)
        sync_folder(path.parent)


def append_synced(path: Path, content: bytes) -> None:
    """Appends lines, on the disk when this returns. A last line that a crash has cut off is ended, and marked as that.

    It is not taken back: another process may be appending too.
    """
    with explain_failed_write(path, len(content)):
        path.parent.mkdir(parents=True, exist_ok=True)
        end = CUT_OFF + b"\n" if _is_cut_off(path) else b""
        write_synced(path, end + content, mode="ab")


def read_lines(path: Path) -> Iterator[tuple[bytes, str]]:
    """Yields each line of a file that is appended to, and where it is, but those that a crash has cut off.

    There are none where there is no file.
    """
    if path.exists():
        for number, line in enumerate(read_file(path).split(b"\n")[:-1], start=1):
            if not line.endswith(CUT_OFF):
                yield line, f"{path}:{number}"


def _is_cut_off(path: Path) -> bool:
    if not path.exists() or not path.stat().st_size:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def write_synced(path: Path, content: bytes, mode: str = "wb") -> None:
    """Writes or appends `content` and waits for the disk. A failed write leaves no part of it behind."""
    size_before = path.stat().st_size if mode == "ab" and path.exists() else 0
    # Unbuffered, so that closing the file after a failure has nothing left to write.
    with open(path, mode, buffering=0) as file:
        try:
            remaining = memoryview(content)
            while remaining:
                remaining = remaining[file.write(remaining) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size_before)
            if not size_before:
                path.unlink()
            raise


@contextmanager
def explain_failed_write(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turns an `OSError` of the block into a `StorageError` about `path`."""
    try:
        yield
    except OSError as error:
        existing = next(folder for folder in path.absolute().parents if folder.exists())
        if error.errno in NO_ROOM:
            remedy = "Free some space, or choose a folder that can be written."
        else:
            remedy = "Make it a folder that can be written, or choose another one."
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. It needs {needed_bytes} bytes; "
            f"{disk_usage(existing).free} bytes are free. {remedy}"
        ) from error


def sync_folder(path: Path) -> None:
    """Makes the names in a folder (a rename, a new file) survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remedy(file: Path) -> str:
    """Says how to get a whole file in the place of a damaged one; nothing is lost with it."""
    command = f"rm {'-r ' * (file.is_dir() and not file.is_symlink())}{shell_word(file)}"
    return (
        "It is damaged, or of another version of rdrop: delete it, then train the run again, which goes on from its "
        f"checkpoints: {command}"
    )


def _run_paths(root: Path) -> list[Path]:
    """Every folder with a file of a run, links to folders followed, each folder once."""
    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name != TUNING)
        if not {RECIPE, METRICS, RESULT}.isdisjoint(files):
            found.append(Path(folder))
    return sorted(found)


def _read_record(path: Path) -> RunRecord:
    folder = RunFolder(path)
    problems: list[str] = []
    recipe = _attempt(folder.recipe, problems)
    result = _attempt(folder.result, problems)
    metrics = _attempt(folder.metrics, problems) or []
    failure = None
    if not problems and result is None:
        failure = _attempt(folder.failure, problems)
        if not problems:
            problems += [f"{path}: {failure}" if failure else _unfinished(path, metrics[-1]["step"] if metrics else 0)]
    return RunRecord(path, recipe, result, metrics, " ".join(problems) or None, failure)


def _unfinished(path: Path, step: int) -> str:
    holder = lock.holder_of(path)
    if holder is not None:
        return f"{path}: unfinished, last row at step {step}. It is being trained by {holder}."
    return f"{path}: unfinished, last row at step {step}. Run it again to resume it."


def _attempt(read: Any, problems: list[str]) -> Any:
    try:
        return read()
    except (ResultsError, OSError) as error:
        problems.append(str(error))
        return None


def _parse_row(line: bytes, where: str) -> dict[str, Any]:
    row = _parse_object(line, where, "It is damaged: delete that line.")
    step = row.get("step")
    if not isinstance(row.get("kind"), str) or not isinstance(step, int) or not 0 <= step <= _LARGEST_STEP:
        raise ResultsError(
            f"{where}: a row needs a `kind` and a whole number as `step`. It is damaged: delete that line."
        )
    return row


def _read_object(path: Path) -> dict[str, Any]:
    return _parse_object(read_file(path), str(path), remedy(path))


def _parse_object(text: bytes, where: str, what_to_do: str, *, restore: bool = True) -> dict[str, Any]:
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_int=_whole_number)
    except (ValueError, RecursionError) as error:
        raise ResultsError(f"{where}: not valid JSON ({error}). {what_to_do}") from error
    if not isinstance(value, dict):
        raise ResultsError(f"{where}: expected a JSON object, got {type(value).__name__}. {what_to_do}")
    if not restore:
        return value
    # The numbers of a recipe are finite, and its texts are the user's: a column may be called "NaN".
    return {key: entry if key == "recipe" else _restore_floats(entry) for key, entry in value.items()}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _whole_number(digits: str) -> int | float:
    """An infinity for what float64 cannot hold: it can neither be compared nor drawn."""
    number = int(digits)
    if abs(number) <= sys.float_info.max:
        return number
    return math.inf if number > 0 else -math.inf


def _to_json(value: dict[str, Any], indent: int | None = None) -> bytes:
    text = json.dumps(_spell_floats(value), indent=indent, ensure_ascii=False, allow_nan=False)
    return text.encode() + b"\n"


def _spell_floats(value: Any) -> Any:
    """NaN and the infinities as strings, in any depth of dicts and lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return next(name for name, number in _NON_FINITE.items() if repr(number) == repr(value))
    return _map_nested(_spell_floats, value)


def _restore_floats(value: Any) -> Any:
    """The inverse of `_spell_floats`."""
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    return _map_nested(_restore_floats, value)


def _map_nested(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: function(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [function(entry) for entry in value]
    return value

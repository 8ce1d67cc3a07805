"""Checkpoints of the Hugging Face Trainer that are whole or absent, and verified before they are believed.

    class MyTrainer(DurableCheckpoints, RDropTrainer): ...

The stock Trainer writes a checkpoint file by file where it will be looked for, and loads what it finds. Killed in
between, it leaves a half one that the next start crashes on; a flipped bit is loaded without a word. Here:

* a save goes to a folder of its own beside the others, is flushed to the disk, gets a manifest with the size and
  SHA-256 of every file, and only then the name `checkpoint-N`; older ones are removed after that;
* a resume takes the newest checkpoint whose files are those of its manifest, and says which others it passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MANIFEST = "manifest.json"
SAVING, REPLACED = "_saving", "_replaced"
"""Folders in the run's: of a save that has not ended, and of a checkpoint while one of the same step takes its place.

The names begin with an underscore, so that `push_to_hub` leaves them out.
"""
_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_FORMAT = 1
_STATE = "trainer_state.json"
_NO_WEIGHTS = re.compile(
    r"(.*/)?((optimizer|scheduler|scaler|rng_state|training_args)[^/]*|[^/]*\.(json|txt|md|py|jinja))"
)
"""The names of files that hold no weights. Any other may: a `save_model` of yours writes what it likes."""


class CheckpointError(RuntimeError):
    """Checkpoints are there and the one that is wanted, or all of them, are not whole: which, why, and what to do."""


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over, or is taken without a manifest to verify it by."""


class DurableCheckpoints(Trainer):
    """Makes the checkpoints of a Trainer survive a kill at any instant. Put it before the Trainer among the bases.

    `train(resume_from_checkpoint=True)` takes the newest good checkpoint; with a path, the one that is named, if it is
    whole. A checkpoint without a manifest, which the stock Trainer has written, is taken only where it is named.

    Raises:
        CheckpointError: from `train`, and where the best model is loaded at the end; no weights are touched.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as the Trainer does, from a verified checkpoint where one is asked for."""
        run_dir = Path(str(self.args.output_dir))
        if self.args.should_save:
            _tidy(run_dir)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = self._first_decides(lambda: _newest_good(run_dir))
        elif isinstance(resume_from_checkpoint, str | os.PathLike):
            _require_good(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        saving, final = run_dir / SAVING, run_dir / name
        if self.args.should_save:
            shutil.rmtree(saving, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._output_dir_of_save: str | None = str(saving)
        self._is_push_due = False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._output_dir_of_save = None
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best == final or best.exists():
                self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(saving / name / _STATE))  # again: the name of the best is known only now
            seal(saving / name)
            _put_in_place(saving / name, final)
            saving.rmdir()
            _prune(run_dir, self.state.global_step, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self._is_push_due:
            self._push_from_checkpoint(str(final))
        self.accelerator.wait_for_everyone()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint to the Hub once it has its name: the upload reads its files in a thread."""
        if getattr(self, "_output_dir_of_save", None) is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._is_push_due = True

    def _get_output_dir(self, trial: Any) -> str:
        redirected: str | None = getattr(self, "_output_dir_of_save", None)
        return redirected or super()._get_output_dir(trial)

    def _load_best_model(self) -> None:
        _require_good(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    def _first_decides(self, choose: Callable[[], str | None]) -> str | None:
        """Returns the choice of the first process to all: they must not resume from different checkpoints."""
        if not (dist.is_available() and dist.is_initialized()):
            return choose()
        chosen: list[Any] = [None]
        if self.args.process_index == 0:
            try:
                chosen = [choose()]
            except (CheckpointError, OSError) as error:  # the others wait for the choice
                chosen = [error]
        dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], Exception):
            raise chosen[0]
        return chosen[0]  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------------------------------------ writing


def seal(checkpoint: Path) -> None:
    """Flushes every file of a checkpoint to the disk and writes its manifest last."""
    files = {str(path.relative_to(checkpoint)): _flushed(path) for path in _files(checkpoint)}
    manifest = checkpoint / MANIFEST
    manifest.write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
    _flush(manifest)
    for folder in {checkpoint, *(path.parent for path in _files(checkpoint))}:
        _flush(folder)


def _put_in_place(saved: Path, final: Path) -> None:
    """Gives a sealed checkpoint its name. One of that name is there until then, or is put back by `_tidy`."""
    run_dir = final.parent
    if final.exists():
        (run_dir / REPLACED).mkdir(exist_ok=True)
        shutil.rmtree(run_dir / REPLACED / final.name, ignore_errors=True)
        os.rename(final, run_dir / REPLACED / final.name)
    os.rename(saved, final)
    _flush(run_dir)
    shutil.rmtree(run_dir / REPLACED, ignore_errors=True)


def _prune(run_dir: Path, step: int, limit: int | None, best: str | None) -> None:
    """Removes checkpoints beyond `save_total_limit`, but neither that of `step`, just saved, nor the best.

    Those of later steps go first, which training has left behind when it went back to an earlier one; then the oldest.
    """
    if not limit or limit < 0:
        return
    found = sorted(_checkpoints(run_dir), key=lambda checkpoint: (checkpoint[0] <= step, checkpoint[0]))
    kept = {run_dir / f"{PREFIX_CHECKPOINT_DIR}-{step}", *([] if best is None else [Path(best)])}
    excess = max(len(found) - max(limit, len(kept)), 0)
    for path in [path for _, path in found if path not in kept][:excess]:
        shutil.rmtree(path, ignore_errors=True)


def _flushed(path: Path) -> dict[str, Any]:
    """Returns size and digest of a file that is on the disk now."""
    _flush(path)
    return _facts(path)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ reading


def why_damaged(checkpoint: Path) -> str | None:
    """Returns what of a checkpoint is not as its manifest says; None if it is whole. Files beside those are ignored."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        files, version = manifest["files"], manifest["format"]
        expected = {str(name): (int(facts["size"]), str(facts["sha256"])) for name, facts in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so this is not a checkpoint of DurableCheckpoints"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"its {MANIFEST} cannot be read ({error!r})"
    if version != _FORMAT:
        return f"its {MANIFEST} has the format {version!r}, and {_FORMAT} is the one that is known here"
    if _STATE not in expected:
        return f"its {MANIFEST} names no file with the trainer state"
    if all(map(_NO_WEIGHTS.fullmatch, expected)):
        return f"its {MANIFEST} names no file with the weights"
    for name, (size, digest) in expected.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, and had {size}"
        if _facts(path)["sha256"] != digest:
            return f"{name} has changed since it was written"
    return _what_is_no_state(checkpoint / _STATE)


def _what_is_no_state(file: Path) -> str | None:
    """Returns why the Trainer cannot read its state from a file; None if it can."""
    try:
        step = TrainerState.load_from_json(str(file)).global_step
    except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        return f"{file.name} is no state of a Trainer ({error!r})"
    return None if type(step) is int else f"{file.name} is no state of a Trainer (global_step is {step!r})"


def _newest_good(run_dir: Path) -> str | None:
    """Returns the newest whole checkpoint, with one warning for all that were passed over; None where there is none."""
    passed: list[str] = []
    for _, path in reversed(_checkpoints(run_dir)):
        why = why_damaged(path)
        if why is None:
            if passed:
                warnings.warn(f"resuming from {path}, because {'; '.join(passed)}", CheckpointWarning, stacklevel=3)
            return str(path)
        passed.append(f"{path}: {why}")
    if passed:
        raise CheckpointError(
            f"no checkpoint in {run_dir} is whole: {'; '.join(passed)}. Name one by its path to take it all the same, "
            "where it only lacks a manifest; or train without resume_from_checkpoint, into another folder"
        )
    raise CheckpointError(f"{run_dir} has no checkpoint to resume from; train without resume_from_checkpoint")


def _require_good(checkpoint: Path) -> None:
    """Raises `CheckpointError` for a damaged checkpoint; one without a manifest is taken with a warning."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a folder; resume_from_checkpoint names that of a checkpoint")
    why = why_damaged(checkpoint)
    if why is None:
        return
    if not (checkpoint / MANIFEST).exists():
        warnings.warn(f"{checkpoint} is taken unverified: {why}", CheckpointWarning, stacklevel=3)
        return
    good = [path for _, path in _checkpoints(checkpoint.parent) if why_damaged(path) is None]
    rest = f"{good[-1]} is the newest whole one beside it" if good else "there is no whole one beside it"
    raise CheckpointError(f"{checkpoint} is damaged: {why}; {rest}")


def _tidy(run_dir: Path) -> None:
    """Removes what a killed save left; puts back a checkpoint that it had set aside for one of the same step."""
    for path in (run_dir / REPLACED).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        if not (run_dir / path.name).exists():
            os.rename(path, run_dir / path.name)
    for name in (SAVING, REPLACED):
        shutil.rmtree(run_dir / name, ignore_errors=True)


def _checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Returns the checkpoints with their steps, the newest last."""
    found = [(_NAME.fullmatch(path.name), path) for path in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return sorted((int(match[1]), path) for match, path in found if match is not None)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)


def _facts(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}

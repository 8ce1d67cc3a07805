"""Durable checkpoints: whole or absent, verified before they are believed, and never code.

    checkpoints/step-00000040/
      model.safetensors        the model's state_dict; a tensor under several names (tied weights) is stored once
      optimizer.safetensors    the optimizer's tensors, named "<parameter index>.<key>"
      state.json               everything else: the caller's state, the other names of tied tensors
      manifest.json            size and SHA-256 of the three, written last

A checkpoint is written as `step-N.tmp`, flushed to the disk, and renamed; only then are older ones removed. So a crash
at any instant leaves the previous checkpoint or the new one. A flipped bit is found by its digest: safetensors alone
would load it without a word. Nothing here can execute what it reads.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
from torch import Tensor

from rdrop.experiments.run_folder import explain_failed_write, sync_folder, write_synced

MODEL, OPTIMIZER, STATE, MANIFEST = "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"

_FORMAT = 1
_FOLDER_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """Checkpoints are there and none can be used: which, why, and what to do."""


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over for an older one."""


class _DamagedError(Exception):
    """One checkpoint is not what its manifest says."""


class Stored(Protocol):
    """Has what a checkpoint keeps: a model or an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint, in memory: what was digested is what is restored.

    `state` is the dictionary given to `save`.
    """

    path: Path
    state: dict[str, Any]
    _files: dict[str, bytes]
    _stored: dict[str, Any]

    def restore_model(self, model: Stored) -> None:
        """Copies the weights into `model`; its names and shapes must be those of the saved one."""
        self._load_into(model, self.weights())

    def weights(self) -> dict[str, Tensor]:
        """The model's tensors, each once: tied ones under their first name."""
        return safetensors.torch.load(self._files[MODEL])

    def _load_into(self, model: Stored, tensors: dict[str, Tensor]) -> None:
        names: dict[str, str] = self._stored["model_aliases"]
        tensors = tensors | {alias: tensors[name] for alias, name in names.items()}
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise CheckpointError(f"{self.path} does not fit the model of this recipe: {error}") from error

    def restore_optimizer(self, optimizer: Stored) -> None:
        """Restores the optimizer's memory of past gradients. Its hyper-parameters stay those it was built with."""
        state: dict[int, dict[str, Any]] = {}
        numbers: dict[str, Any] = self._stored["optimizer_numbers"]
        for name, value in (numbers | safetensors.torch.load(self._files[OPTIMIZER])).items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = value
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def save(folder: Path, step: int, model: Stored, optimizer: Stored, state: dict[str, Any], *, keep: int) -> Path:
    """Writes `folder/step-<step>` and removes what is older than the `keep` newest.

    `state` is any JSON object. Its entries `best_step`, if it is not None, and `averaged_steps` name checkpoints that
    stay as long as this one does. Raises `StorageError` (path, bytes needed, bytes free) if it cannot be written: the
    previous checkpoints are then untouched and nothing of this one is left.
    """
    files = _serialize(model, optimizer, state)
    path = _path_of(folder, step)
    temporary = path.with_name(path.name + ".tmp")
    with explain_failed_write(path, sum(map(len, files.values()))):
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder.glob("step-*.tmp"))
        try:
            _write_folder(temporary, files)
            _remove([path])  # only a damaged one can be here: a run that resumed is past every good one
            os.replace(temporary, path)
        except OSError:
            _remove([temporary])
            raise
        sync_folder(folder)
    _prune(folder, newest_step=step, keep=keep)
    return path


def load_newest_good(folder: Path) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as written, and those it needs too; None if none was saved.

    If newer ones are damaged, one `CheckpointWarning` names them and the one used instead. If all are damaged,
    `CheckpointError`: starting again in silence would hide the loss.
    """
    damage: list[str] = []
    for step in sorted(_saved_steps(folder), reverse=True):
        try:
            checkpoint = _load(folder, step)
        except _DamagedError as error:
            damage.append(str(error))
            continue
        if damage:
            warnings.warn(f"{'; '.join(damage)}. Resuming from {checkpoint.path}.", CheckpointWarning, stacklevel=2)
        return checkpoint
    if damage:
        raise CheckpointError(f"no usable checkpoint: {'; '.join(damage)}. To start the run again, delete {folder}.")
    return None


def load(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of `step`, verified. Raises `CheckpointError` if it is missing or damaged."""
    try:
        return _read(_path_of(folder, step))
    except _DamagedError as error:
        raise CheckpointError(f"{error}. To start the run again, delete {folder.parent}.") from error


def restore_final(folder: Path, best_step: int, averaged_steps: list[int], model: Stored) -> None:
    """Copies the weights into `model` that a run is finally scored with: the mean of some, if it averages; the best."""
    if averaged_steps:
        restore_average(folder, averaged_steps, model)
    else:
        load(folder, best_step).restore_model(model)


def restore_average(folder: Path, steps: list[int], model: Stored) -> None:
    """Copies the mean of the weights of these checkpoints into `model`; what is no floating point, from the last."""
    last = load(folder, steps[-1])
    total = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in last.weights().items()}
    for step in steps[:-1]:  # one at a time: each has an optimizer too
        for name, tensor in load(folder, step).weights().items():
            if tensor.is_floating_point():
                total[name] += tensor.double()
    last._load_into(
        model, {name: tensor / len(steps) if tensor.is_floating_point() else tensor for name, tensor in total.items()}
    )


def _load(folder: Path, step: int) -> Checkpoint:
    checkpoint = _read(_path_of(folder, step))
    for other in _needed_steps(checkpoint.state) - {step}:
        _read(_path_of(folder, other))
    return checkpoint


def _path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _saved_steps(folder: Path) -> list[int]:
    if not folder.exists():
        return []
    return [int(match[1]) for path in folder.iterdir() if (match := _FOLDER_NAME.fullmatch(path.name))]


def _serialize(model: Stored, optimizer: Stored, state: dict[str, Any]) -> dict[str, bytes]:
    tensors, aliases = _separate_aliases(model.state_dict())
    entries = {
        f"{index}.{key}": value
        for index, memory in optimizer.state_dict()["state"].items()
        for key, value in memory.items()
    }
    moments = {name: value for name, value in entries.items() if isinstance(value, Tensor)}
    numbers = {name: value for name, value in entries.items() if not isinstance(value, Tensor)}
    return {
        MODEL: safetensors.torch.save(_on_cpu(tensors)),
        OPTIMIZER: safetensors.torch.save(_on_cpu(moments)),
        STATE: _json({"state": state, "model_aliases": aliases, "optimizer_numbers": numbers}),
    }


def _separate_aliases(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under its first name, and the first name of every other: safetensors refuses shared memory."""
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = names.setdefault(memory, name) if tensor.numel() else name
        if first == name:
            unique[name] = tensor
        else:
            aliases[name] = first
    return unique, aliases


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # A copy each: views of one buffer would count as shared memory.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _write_folder(path: Path, files: dict[str, bytes]) -> None:
    path.mkdir()
    for name, content in files.items():
        write_synced(path / name, content)
    write_synced(path / MANIFEST, _manifest(files))
    sync_folder(path)


def _read(path: Path) -> Checkpoint:
    try:
        files = {name: (path / name).read_bytes() for name in (MODEL, OPTIMIZER, STATE)}
        manifest = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise _DamagedError(f"{path} is damaged ({Path(error.filename).name}: {error.strerror})") from error
    # The manifest is made again and compared whole: no bit of it can flip unseen.
    if manifest != _manifest(files):
        raise _DamagedError(f"{path} is damaged ({_name_of_damage(manifest, files)} differs from what was written)")
    stored = json.loads(files[STATE])
    return Checkpoint(path, stored["state"], files, stored)


def _manifest(files: dict[str, bytes]) -> bytes:
    entries = {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }
    return _json({"format": _FORMAT, "files": entries})


def _name_of_damage(manifest: bytes, files: dict[str, bytes]) -> str:
    """The file whose digest is not in the manifest; the manifest itself if that is so of several, or of none."""
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    missing = [name for name, digest in digests.items() if digest.encode() not in manifest]
    return missing[0] if len(missing) == 1 else MANIFEST


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode() + b"\n"


def _prune(folder: Path, newest_step: int, keep: int) -> None:
    """Keeps the `keep` newest up to `newest_step` and what these need. Those after it are the damaged, passed over."""
    saved = sorted(step for step in _saved_steps(folder))
    newest = [step for step in saved if step <= newest_step][-keep:]
    needed = set(newest).union(*(_needed_steps(_state_in(_path_of(folder, step))) for step in newest))
    _remove(_path_of(folder, step) for step in saved if step not in needed)


def _needed_steps(state: dict[str, Any]) -> set[int]:
    """The checkpoints whose weights the final score may want."""
    return {step for step in (state.get("best_step"), *state.get("averaged_steps", [])) if step is not None}


def _state_in(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((path / STATE).read_bytes())["state"]
    except (OSError, ValueError, KeyError):
        return {}
    return state


def _remove(paths: Any) -> None:
    for path in paths:
        if path.exists():
            shutil.rmtree(path)

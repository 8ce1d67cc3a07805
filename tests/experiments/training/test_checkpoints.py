"""Checkpoints: whole or absent, every damage found, the previous one always there; and nothing here can run code."""

import ast
import errno
import json
import os
import random
import resource
import signal
import subprocess
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.experiments.tiny_runs import RECIPE, TinyNetwork, TinyTask, final_state
from torch import nn

import rdrop
from rdrop.experiments.run_folder import RunFolder, StorageError
from rdrop.experiments.training import checkpoints, trainer
from rdrop.experiments.training.checkpoints import CheckpointError, CheckpointWarning, load, load_newest_good, save

FILES = [checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.STATE, checkpoints.MANIFEST]


def trained(
    steps: int, kind: type[torch.optim.Optimizer] = torch.optim.AdamW
) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = TinyNetwork(0.0)
    optimizer = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    for _ in range(steps):
        advance(model, optimizer)
    return model, optimizer


def advance(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.arange(5)[None]).square().sum().backward()
    optimizer.step()


def save_steps(folder: Path, *steps: int, keep: int = 10) -> None:
    model, optimizer = trained(1)
    for step in steps:
        save(folder, step, model, optimizer, {"step": step}, keep=keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.NAdam])
def test_a_restored_run_goes_on_bit_for_bit(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    model, optimizer = trained(3, kind)
    save(tmp_path, 3, model, optimizer, {"note": "any JSON", "sums": {"loss": 0.1 + 0.2}}, keep=1)
    advance(model, optimizer)

    checkpoint = load_newest_good(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state == {"note": "any JSON", "sums": {"loss": 0.1 + 0.2}}
    restored, restored_optimizer = trained(0, kind)
    checkpoint.restore_model(restored)
    checkpoint.restore_optimizer(restored_optimizer)
    advance(restored, restored_optimizer)
    for expected, found in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    save(tmp_path, 1, model, optimizer, {}, keep=1)
    restored, _ = trained(0)
    load(tmp_path, 1).restore_model(restored)
    assert restored.output.weight is restored.embedding.weight
    assert torch.equal(restored.output.weight, model.output.weight)
    size = (tmp_path / "step-00000001" / checkpoints.MODEL).stat().st_size
    unique = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert unique < size < unique + 600


def test_weights_that_are_transposed_views_survive(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    model.weight.data = torch.arange(6.0).view(3, 2).t()
    save(tmp_path, 1, model, torch.optim.SGD(model.parameters()), {}, keep=1)
    restored = nn.Linear(3, 2)
    load(tmp_path, 1).restore_model(restored)
    assert torch.equal(restored.weight, model.weight)


def test_the_newest_stay_and_the_best_of_each(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for step, best in ((1, None), (2, 2), (3, 2), (4, 2), (5, 5), (6, 5)):
        save(tmp_path, step, model, optimizer, {"best_step": best}, keep=2)
        if step == 4:
            assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004"]
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_no_checkpoint_is_none_and_a_half_written_one_does_not_count(tmp_path: Path) -> None:
    assert load_newest_good(tmp_path / "nowhere") is None
    (tmp_path / "step-00000001.tmp").mkdir()
    assert load_newest_good(tmp_path) is None
    save_steps(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not fit the model of this recipe"):
        load(tmp_path, 1).restore_model(nn.Linear(2, 2))


# ----------------------------------------------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip_a_bit(path: Path, position: int = 77) -> None:
    content = bytearray(path.read_bytes())
    content[position // 8 % len(content)] ^= 1 << position % 8
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, empty, append, flip_a_bit, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_falls_back_with_one_warning_naming_both(tmp_path: Path, name: str, damage: Any) -> None:
    save_steps(tmp_path, 20, 40)
    damage(tmp_path / "step-00000040" / name)
    with pytest.warns(CheckpointWarning) as caught:
        checkpoint = load_newest_good(tmp_path)
    assert checkpoint is not None
    assert checkpoint.state == {"step": 20}
    (warning,) = caught
    assert "step-00000040 is damaged" in str(warning.message)
    assert name in str(warning.message)
    assert "Resuming from" in str(warning.message)
    assert "step-00000020" in str(warning.message)


def test_an_empty_folder_falls_back(tmp_path: Path) -> None:
    save_steps(tmp_path, 20)
    (tmp_path / "step-00000040").mkdir()
    with pytest.warns(CheckpointWarning, match=r"step-00000040 is damaged \(model.safetensors: No such file"):
        load_newest_good(tmp_path)


def test_a_checkpoint_whose_best_is_damaged_is_passed_over(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    for step, best in ((10, 10), (20, 20), (30, 20)):
        save(tmp_path, step, model, optimizer, {"best_step": best}, keep=3)
    flip_a_bit(tmp_path / "step-00000020" / checkpoints.MODEL)
    with pytest.warns(CheckpointWarning, match=r"Resuming from .*step-00000010"):
        load_newest_good(tmp_path)


def test_all_damaged_is_an_error_and_never_a_new_start(tmp_path: Path) -> None:
    save_steps(tmp_path, 20, 40)
    for path in tmp_path.iterdir():
        flip_a_bit(path / checkpoints.MODEL)
    with pytest.raises(CheckpointError, match=r"(?s)step-00000040 is damaged.*step-00000020 is damaged.*delete"):
        load_newest_good(tmp_path)


@pytest.mark.parametrize("flips", [60, pytest.param(1500, marks=pytest.mark.long)])
def test_every_flipped_bit_is_found(tmp_path: Path, flips: int, record_property: Callable[[str, object], None]) -> None:
    save_steps(tmp_path, 1)
    chance = random.Random(0)
    for _ in range(flips):
        path = tmp_path / "step-00000001" / chance.choice(FILES)
        position = chance.randrange(path.stat().st_size * 8)
        flip_a_bit(path, position)
        with pytest.raises(CheckpointError):
            load(tmp_path, 1)
        flip_a_bit(path, position)
    load(tmp_path, 1)
    record_property("flipped bits", flips)


def test_training_goes_on_from_the_older_checkpoint_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    trainer.train(RECIPE, tmp_path / "whole")
    trainer.train(RECIPE, tmp_path / "damaged")
    (tmp_path / "damaged" / "result.json").unlink()
    flip_a_bit(tmp_path / "damaged" / "checkpoints" / "step-00000008" / checkpoints.OPTIMIZER)
    with pytest.warns(CheckpointWarning):
        trainer.train(RECIPE, tmp_path / "damaged")
    assert final_state(tmp_path / "damaged") == final_state(tmp_path / "whole")


def change(content: dict[str, Any], **entries: object) -> dict[str, Any]:
    return content | {"state": content["state"] | entries}


WRONG_STATES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a step that is a text": lambda content: change(content, step="x"),
    "averaged steps that are null": lambda content: change(content, averaged_steps=None),
    "averaged steps that are texts": lambda content: change(content, averaged_steps=["x"]),
    "a best score without its step": lambda content: change(content, best_step=None, best_score=0.5),
    "a list in the place of the state": lambda content: content | {"state": []},
    "a list in the place of all": lambda content: [content],
    "sums without counts": lambda content: change(content, sums={"loss": 1.0}, counts={}),
    "aliases that are a list": lambda content: content | {"model_aliases": []},
    "numbers of no parameter": lambda content: content | {"optimizer_numbers": {"x": 1}},
    "nothing": lambda content: {},
}


@pytest.mark.parametrize("wrong", WRONG_STATES)
def test_a_state_of_other_types_is_named_and_once_it_is_deleted_the_run_ends_in_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    trainer.train(RECIPE, tmp_path / "whole")
    trainer.train(RECIPE, tmp_path / "damaged")
    (tmp_path / "damaged" / "result.json").unlink()
    newest = tmp_path / "damaged" / "checkpoints" / "step-00000008"
    state = newest / checkpoints.STATE
    state.write_text(json.dumps(WRONG_STATES[wrong](json.loads(state.read_text()))))
    files = {
        name: (newest / name).read_bytes() for name in (checkpoints.MODEL, checkpoints.OPTIMIZER, checkpoints.STATE)
    }
    (newest / checkpoints.MANIFEST).write_bytes(checkpoints._manifest(files))
    with pytest.raises(CheckpointError, match=f"^{state}: .*: rm {state}$") as found:
        trainer.train(RECIPE, tmp_path / "damaged")
    subprocess.run(str(found.value).rpartition(": ")[2], shell=True, check=True)
    with pytest.warns(CheckpointWarning):
        trainer.train(RECIPE, tmp_path / "damaged")
    assert final_state(tmp_path / "damaged") == final_state(tmp_path / "whole")


# -------------------------------------------------------------------------------------------- disks that refuse


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """The kernel refuses longer writes, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [0, 100, 1000, 1500])
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(tmp_path: Path, size: int) -> None:
    save_steps(tmp_path, 20)
    with (
        no_file_larger_than(size),
        pytest.raises(StorageError, match=r"step-00000040: File too large. It needs \d{4} bytes; \d+ bytes are free"),
    ):
        save_steps(tmp_path, 40, keep=1)
    assert names(tmp_path) == ["step-00000020"]
    assert load(tmp_path, 20).state == {"step": 20}


@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_a_write_refused_by_the_system_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save_steps(tmp_path, 20)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(StorageError, match="step-00000040: Read-only file system"):
        save_steps(tmp_path, 40, keep=1)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000020"]
    load(tmp_path, 20)


def test_a_run_whose_disk_was_full_resumes_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    trainer.train(RECIPE, tmp_path / "whole")

    def full_at_the_fourth_step(event: str) -> None:
        if RunFolder(tmp_path / "full").metrics()[-1:] and event == "evaluate":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY))

    monkeypatch.setattr(TinyTask, "on_event", staticmethod(full_at_the_fourth_step))
    with no_file_larger_than(10**6), pytest.raises(StorageError, match=r"metrics\.jsonl"):
        trainer.train(RECIPE, tmp_path / "full")
    monkeypatch.setattr(TinyTask, "on_event", staticmethod(lambda event: None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(RECIPE, tmp_path / "full")
    assert final_state(tmp_path / "full") == final_state(tmp_path / "whole")


# ------------------------------------------------------------------------------------------- no code from data


def test_state_is_strict_json(tmp_path: Path) -> None:
    model, optimizer = trained(1)
    with pytest.raises(ValueError, match="JSON"):
        save(tmp_path, 1, model, optimizer, {"best_score": float("nan")}, keep=1)
    save(tmp_path, 1, model, optimizer, {"best_score": 1.5}, keep=1)
    json.loads((tmp_path / "step-00000001" / checkpoints.STATE).read_bytes(), parse_constant=pytest.fail)


def test_the_tree_never_unpickles_and_never_runs_what_it_reads() -> None:
    forbidden_modules = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    forbidden_calls = {"eval", "exec", "torch.load", "torch.save", "yaml.load", "np.load", "numpy.load"}
    forbidden_methods = {"load_state", "save_state"}  # of accelerate: they unpickle
    for path in Path(rdrop.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & forbidden_modules, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in forbidden_modules, path
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                without_pickles = any(ast.unparse(keyword) == "allow_pickle=False" for keyword in node.keywords)
                assert called not in forbidden_calls or (called == "np.load" and without_pickles), path
                assert called.rpartition(".")[2] not in forbidden_methods, path
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("trust_remote_code", "False") == "False", path
                loaded = [called, *map(ast.unparse, node.args)]
                if any(name.endswith(".from_pretrained") for name in loaded):  # left out, transformers would ask
                    assert "trust_remote_code" in keywords, f"{path}:{node.lineno}"


def test_the_mean_of_the_last_weights_holds_no_more_than_two_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = trainer.train(RECIPE.replace(average_last=4), tmp_path)["averaged_steps"]
    loaded: list[weakref.ref[checkpoints.Checkpoint]] = []

    def watched(folder: Path, step: int) -> checkpoints.Checkpoint:
        assert sum(found() is not None for found in loaded) <= 1
        checkpoint = load(folder, step)
        loaded.append(weakref.ref(checkpoint))
        return checkpoint

    monkeypatch.setattr(checkpoints, "load", watched)
    checkpoints.restore_average(tmp_path / "checkpoints", steps, TinyNetwork(0.0))
    assert len(loaded) == len(steps) == 4

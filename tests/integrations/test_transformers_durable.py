"""Checkpoints of the Trainer that survive a kill at any instant, and are verified before they are loaded.

Run as a script, this file is the host of the killed runs: it imports everything once and forks a run for each kill. A
run is killed at its n-th step that could matter: before an update, before each file of a checkpoint is written, flushed
or renamed, and before a folder is removed.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tests.kills import Watch, kill_and_resume, watch_calls
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from rdrop.integrations.transformers import DurableCheckpoints, RDropTrainer, Target
from rdrop.integrations.transformers.durable import MANIFEST, CheckpointError, CheckpointWarning, seal, why_damaged

STEPS = 4


class TinyModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 3))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.layers(x)
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


class DurableTrainer(DurableCheckpoints, RDropTrainer):
    def rdrop_targets(self, inputs: dict[str, Any]) -> list[Target]:
        return [Target(inputs["labels"])]


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        return {"x": torch.randn(4, generator=generator), "labels": torch.tensor(index % 3)}


def trainer(folder: Path, kind: type[Trainer] = DurableTrainer, **changes: Any) -> Trainer:
    options = {"save_steps": 1, "save_total_limit": 2, "max_steps": STEPS, "per_device_train_batch_size": 4} | changes
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="steps", logging_steps=1, **options
    )
    torch.manual_seed(0)
    more = {"alpha": 1.0} if issubclass(kind, RDropTrainer) else {}
    return kind(model=TinyModel(), args=arguments, train_dataset=Data(), eval_dataset=Data(), **more)


def weights(folder: Path, step: int = STEPS) -> bytes:
    return (folder / f"checkpoint-{step}" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    trainer(folder).train()
    return folder


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished run: checkpoints 3 and 4."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_is_what_the_stock_trainer_writes_with_a_manifest_of_every_file(whole: Path, tmp_path: Path):
    trainer(tmp_path, RDropTrainerAlone).train()
    names = {path.name for path in (tmp_path / f"checkpoint-{STEPS}").iterdir()}
    assert {path.name for path in (whole / f"checkpoint-{STEPS}").iterdir()} == names | {MANIFEST}
    assert weights(whole) == weights(tmp_path)
    assert why_damaged(whole / f"checkpoint-{STEPS}") is None


class RDropTrainerAlone(RDropTrainer):
    rdrop_targets = DurableTrainer.rdrop_targets


def test_the_limit_keeps_the_newest_and_nothing_else_is_left(whole: Path):
    assert sorted(path.name for path in whole.iterdir()) == [f"checkpoint-{STEPS - 1}", f"checkpoint-{STEPS}"]


def test_the_limit_keeps_what_was_just_saved_where_training_went_back_to_an_earlier_one(run: Path):
    os.rename(run / f"checkpoint-{STEPS}", run / "checkpoint-9")
    flip_a_bit(run / "checkpoint-9" / "model.safetensors")
    with pytest.warns(CheckpointWarning, match="checkpoint-9: model.safetensors has changed"):
        trainer(run, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in run.iterdir()] == [f"checkpoint-{STEPS}"]
    assert why_damaged(run / f"checkpoint-{STEPS}") is None


def test_the_best_is_kept_under_its_final_name_and_loaded_at_the_end(tmp_path: Path):
    scores = iter([3.0, 1.0, 2.0, 4.0])

    class Scored(DurableTrainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            found = {"eval_loss": next(scores)}
            self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
            return found

    trained = trainer(tmp_path, Scored, load_best_model_at_end=True, eval_strategy="steps", eval_steps=1)
    trained.train()
    best, newest = tmp_path / "checkpoint-2", tmp_path / f"checkpoint-{STEPS}"
    assert trained.state.best_model_checkpoint == str(best)
    assert "_saving" not in (newest / "trainer_state.json").read_text()
    assert sorted(tmp_path.iterdir()) == [best, newest]
    kept = safetensors.torch.load_file(best / "model.safetensors")
    assert all(torch.equal(weight, kept[name]) for name, weight in trained.model.state_dict().items())

    flip_a_bit(best / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{best} is damaged: model.safetensors has changed"):
        trained._load_best_model()


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints", "every_save"])
def test_a_checkpoint_is_pushed_from_where_it_stays(strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The upload goes on in a thread after the call."""
    pushed: list[tuple[Path, bool]] = []

    def push(self: Trainer, checkpoint_folder: str) -> None:
        pushed.append((Path(checkpoint_folder), why_damaged(Path(checkpoint_folder)) is None))

    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    trainer(tmp_path, push_to_hub=True, hub_strategy=strategy, save_total_limit=None).train()
    assert pushed == [(tmp_path / f"checkpoint-{step}", True) for step in range(1, STEPS + 1)]
    assert all(why_damaged(folder) is None for folder, _ in pushed)


# ------------------------------------------------------------------------------------------------------- damaged ones


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_the_format(manifest: Path, version: int | None) -> None:
    content = json.loads(manifest.read_text())
    del content["format"]
    manifest.write_text(json.dumps(content | ({} if version is None else {"format": version})))


def resealed(checkpoint: Path, name: str, content: bytes | None) -> None:
    """Writes a file of a checkpoint anew, or removes it, and a manifest that says so."""
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    seal(checkpoint)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a flipped bit in the weights": lambda newest: flip_a_bit(newest / "model.safetensors"),
    "a flipped bit in the optimizer": lambda newest: flip_a_bit(newest / "optimizer.pt"),
    "a flipped bit in the manifest": lambda newest: flip_a_bit(newest / MANIFEST),
    "half a file": lambda newest: (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:100]),
    "an empty state": lambda newest: (newest / "trainer_state.json").write_bytes(b""),
    "a missing file": lambda newest: (newest / "rng_state.pth").unlink(),
    "a manifest that is a list": lambda newest: (newest / MANIFEST).write_text("[]"),
    "a manifest of nothing": lambda newest: (newest / MANIFEST).write_text('{"format": 1, "files": {}}'),
    "a manifest of another format": lambda newest: change_the_format(newest / MANIFEST, 9),
    "a manifest without a format": lambda newest: change_the_format(newest / MANIFEST, None),
    "a manifest without the weights": lambda newest: resealed(newest, "model.safetensors", None),
    "a manifest without the state": lambda newest: resealed(newest, "trainer_state.json", None),
    "a state that is a list": lambda newest: resealed(newest, "trainer_state.json", b"[]"),
    "a state of wrong types": lambda newest: resealed(newest, "trainer_state.json", b'{"global_step": "x"}'),
    "no manifest": lambda newest: (newest / MANIFEST).unlink(),
    "an empty folder": lambda newest: [path.unlink() for path in newest.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_one_warning_that_names_both(run: Path, whole: Path, damage: str):
    DAMAGES[damage](run / f"checkpoint-{STEPS}")
    with pytest.warns(CheckpointWarning) as caught:
        trainer(run).train(resume_from_checkpoint=True)
    (warning,) = [each for each in caught if each.category is CheckpointWarning]
    assert f"resuming from {run / f'checkpoint-{STEPS - 1}'}" in str(warning.message)
    assert f"{run / f'checkpoint-{STEPS}'}: " in str(warning.message)
    assert weights(run) == weights(whole)
    assert why_damaged(run / f"checkpoint-{STEPS}") is None


def test_where_none_is_whole_nothing_is_loaded(run: Path):
    for step in (STEPS - 1, STEPS):
        flip_a_bit(run / f"checkpoint-{step}" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*model.safetensors has changed"):
        trainer(run).train(resume_from_checkpoint=True)


def test_where_there_is_none_the_error_says_what_to_do(tmp_path: Path):
    with pytest.raises(CheckpointError, match="train without resume_from_checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_damaged_one_that_is_named_is_an_error_that_names_a_whole_one(run: Path):
    flip_a_bit(run / f"checkpoint-{STEPS}" / "model.safetensors")
    good = run / f"checkpoint-{STEPS - 1}"
    with pytest.raises(CheckpointError, match=f"{good} is the newest whole one beside it"):
        trainer(run).train(resume_from_checkpoint=str(run / f"checkpoint-{STEPS}"))
    trainer(run).train(resume_from_checkpoint=str(good))  # the remedy


def test_one_of_the_stock_trainer_is_taken_where_it_is_named_and_never_by_itself(tmp_path: Path):
    trainer(tmp_path, RDropTrainerAlone, max_steps=2).train()
    with pytest.raises(CheckpointError, match="Name one by its path to take it all the same"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.warns(CheckpointWarning, match="is taken unverified"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_files_that_a_callback_adds_later_do_not_matter(run: Path):
    (run / f"checkpoint-{STEPS}" / "note.txt").write_text("mine")
    with warnings.catch_warnings():
        warnings.simplefilter("error", CheckpointWarning)
        trainer(run, max_steps=STEPS + 1).train(resume_from_checkpoint=True)


def test_a_checkpoint_set_aside_by_a_killed_save_of_the_same_step_is_found(run: Path, whole: Path):
    (run / "_replaced").mkdir()
    for step in (STEPS - 1, STEPS):
        os.rename(run / f"checkpoint-{step}", run / "_replaced" / f"checkpoint-{step}")
    trained = trainer(run, max_steps=STEPS + 1)
    trained.train(resume_from_checkpoint=True)
    assert trained.state.log_history[-2]["step"] == STEPS + 1
    assert weights(run, STEPS) == weights(whole)


@pytest.mark.parametrize(
    ("file", "is_whole"),
    [("weights.npz", True), ("model-00001-of-2.safetensors", True), ("optimizer.pt", False), ("config.json", False)],
)
def test_weights_may_be_in_a_file_of_any_name_that_stands_for_nothing_else(file: str, is_whole: bool, tmp_path: Path):
    TrainerState().save_to_json(str(tmp_path / "trainer_state.json"))
    (tmp_path / file).write_bytes(b"a")
    seal(tmp_path)
    assert why_damaged(tmp_path) == (None if is_whole else f"its {MANIFEST} names no file with the weights")


def test_a_manifest_has_every_file_in_folders_too(tmp_path: Path):
    (tmp_path / "shards").mkdir()
    TrainerState().save_to_json(str(tmp_path / "trainer_state.json"))
    (tmp_path / "shards/0.bin").write_bytes(b"a")
    seal(tmp_path)
    assert why_damaged(tmp_path) is None
    (tmp_path / "shards/0.bin").write_bytes(b"b")
    assert why_damaged(tmp_path) == "shards/0.bin has changed since it was written"


# ------------------------------------------------------------------------------------------------------------- kills


def test_a_run_killed_at_five_moments_ends_in_the_bits_of_the_whole_one(tmp_path: Path):
    assert_resumed(tmp_path, ["2", "9", "23", "-9", "-2"])


@pytest.mark.long
def test_a_run_killed_at_every_moment_ends_in_the_bits_of_the_whole_one(
    tmp_path: Path, record_property: Callable[[str, object], None]
):
    kills = assert_resumed(tmp_path, ["all"])
    assert kills >= 60
    record_property("kills", kills)


def assert_resumed(folder: Path, kill_at: list[str]) -> int:
    command = [sys.executable, "-m", "tests.integrations.test_transformers_durable", str(folder), *kill_at]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    killed = sorted(folder.glob("killed-*"))
    for run in killed:
        assert weights(run) == weights(folder / "whole"), (run, done.stdout)
        left = {path.name for path in run.iterdir()} - {path.name for path in (folder / "whole").iterdir()}
        assert all(name.startswith("checkpoint-") for name in left), run  # one more, until the next save
    return len(killed)


MOMENTS = (
    (os, "fsync"),
    (os, "rename"),
    (shutil, "rmtree"),
    (Trainer, "save_model"),
    (Trainer, "_save_optimizer_and_scheduler"),
    (Trainer, "_save_rng_state"),
)


class Updates(TrainerCallback):
    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.watch("update")


def run_watched(folder: Path, watch: Watch) -> None:
    watch_calls(MOMENTS, watch)
    watched_trainer = trainer(folder)
    watched_trainer.add_callback(Updates(watch))
    watched_trainer.train()


def resume(folder: Path) -> None:
    """As a job that is queued again does: from a checkpoint, if there is one."""
    found = any(folder.glob("checkpoint-*")) or any(folder.glob("_replaced/checkpoint-*"))
    trainer(folder).train(resume_from_checkpoint=True if found else None)


def host(folder: Path, kill_at: list[str]) -> None:
    trainer(folder / "warm-up", max_steps=1).train()  # imports, once for all forks, what is imported late
    kill_and_resume(folder, kill_at, run_watched, resume)


if __name__ == "__main__":
    host(Path(sys.argv[1]), sys.argv[2:])

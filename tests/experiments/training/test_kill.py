"""kill -9 at any instant: the run resumes by itself and ends in the same bits.

Run as a script, this file is the host of the killed runs. It imports everything once and forks a run for each kill, so
that a kill costs milliseconds: `python test_kill.py FOLDER KILL_AT ... KEY=VALUE ...`. A run is killed at its n-th step
that could matter: before a batch, a forward, an evaluation, and before each flush, rename and removal of a file.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from tests.experiments import tiny_runs
from tests.experiments.signals import send
from tests.experiments.tiny_runs import RECIPE, TinyTask, final_state
from tests.kills import Watch, kill_and_resume, watch_calls

from rdrop.experiments.recipe import override
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.training import trainer
from rdrop.experiments.training.checkpoints import load_newest_good
from rdrop.experiments.training.preemption import Preempted

MOMENTS = ((os, "fsync"), (os, "replace"), (shutil, "rmtree"))


def test_a_run_killed_at_four_moments_ends_in_the_bits_of_the_whole_one(tmp_path: Path) -> None:
    killed, moments = killed_runs(tmp_path, ["7", "31", "58", "-3"])
    assert_resumed_exactly(tmp_path, killed, moments)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_at_every_moment_ends_in_the_bits_of_the_whole_one(
    precision: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    killed, moments = killed_runs(tmp_path, ["all"], f"precision={precision}", "updates=14")
    assert_resumed_exactly(tmp_path, killed, moments)
    during_writes = sum(moment not in ("forward", "evaluate") for moment in moments)
    assert len(killed) >= 100
    assert during_writes > len(moments) / 2
    record_property("kills", len(killed))
    record_property("of them during a write", during_writes)


def test_sigterm_saves_leaves_and_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    settings = ["updates=100000", "evaluate_every=10", "checkpoint_every=1000"]
    command = [sys.executable, tiny_runs.__file__, str(tmp_path / "stopped"), *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: len(RunFolder(tmp_path / "stopped").metrics()) > 4, process)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert Preempted.__name__ in errors
    saved = load_newest_good(tmp_path / "stopped" / "checkpoints")
    assert saved is not None
    step = saved.state["step"]
    assert 20 <= step < 100000

    # The rest, cut short: both runs to a few steps after the stop.
    recipe = RECIPE.replace(updates=100000, evaluate_every=10, checkpoint_every=1000)
    for name in ("stopped", "whole"):
        stop_at(recipe, tmp_path / name, step + 9)
    ends = [load_newest_good(tmp_path / name / "checkpoints") for name in ("stopped", "whole")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0].state["step"] == ends[1].state["step"] == step + 9
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (ends[0].path / name).read_bytes() == (ends[1].path / name).read_bytes()


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def stop_at(recipe: tiny_runs.TinyRecipe, folder: Path, step: int) -> None:
    def stop(progress: trainer.Progress) -> None:
        if progress.step == step:
            send()

    with pytest.raises(Preempted):
        trainer.train(recipe, folder, on_progress=stop)


def killed_runs(folder: Path, kill_at: list[str], *settings: str) -> tuple[list[Path], list[str]]:
    """The folders of the runs that were killed and resumed, and the moment at which each was killed."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.experiments.training.test_kill", str(folder), *kill_at, *settings],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(folder.glob("killed-*")), done.stdout.split()


def assert_resumed_exactly(folder: Path, killed: list[Path], moments: list[str]) -> None:
    assert len(killed) == len(moments) > 0
    expected = final_state(folder / "whole")
    for run in killed:
        assert final_state(run) == expected, run
        assert not list(run.rglob("*.tmp")), run


# ------------------------------------------------------------------------------------------------------- the host


def host(folder: Path, kill_at: list[str], recipe: tiny_runs.TinyRecipe) -> None:
    trainer.load_task = TinyTask  # type: ignore[assignment]
    trainer.train(recipe, folder / "warm-up")  # imports, once for all forks, what is imported late
    kill_and_resume(folder, kill_at, partial(run_watched, recipe), partial(trainer.train, recipe))


def run_watched(recipe: tiny_runs.TinyRecipe, folder: Path, watch: Watch) -> None:
    watch_calls(MOMENTS, watch)
    TinyTask.on_event = staticmethod(watch)  # type: ignore[assignment]
    trainer.train(recipe, folder)


if __name__ == "__main__":
    settings = [argument for argument in sys.argv[2:] if "=" in argument]
    host(Path(sys.argv[1]), [at for at in sys.argv[2:] if at not in settings], override(RECIPE, settings))

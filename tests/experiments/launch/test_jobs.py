"""Several runs at a time: the same bits, none is lost, none is left alone, and one that fails stops no other."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.experiments.signals import stop_when_the_result_is_written
from tests.experiments.tiny_runs import RECIPE, TinyTask, final_state

from rdrop.experiments import recipes
from rdrop.experiments.launch import cli, jobs
from rdrop.experiments.launch.jobs import train_all
from rdrop.experiments.launch.outcomes import FailedRunsError, StoppedError
from rdrop.experiments.launch.plan import Command, Run, plan_comparison, settings_between
from rdrop.experiments.launch.processes import Child, Processes
from rdrop.experiments.launch.progress import show_progress
from rdrop.experiments.recipe import Recipe, override
from rdrop.experiments.recipes import RECIPES
from rdrop.experiments.run_folder import RunFolder, find_runs
from rdrop.experiments.run_folder.lock import FILE, RunLockedError, holder_of
from rdrop.experiments.tasks.digits.recipes import DIGITS_VIT
from rdrop.experiments.training import trainer
from rdrop.experiments.training.order import DataOrder

ROOT = Path(__file__).parents[3]
TINY = "tests.experiments.tiny_runs:RECIPE"
ENDLESS = ["updates=1000000", "warmup_updates=0", "evaluate_every=100", "checkpoint_every=1000000"]
COMPARE = [sys.executable, "-m", "rdrop", "compare", TINY]


def plan(runs: Path, *settings: str) -> list[Run]:
    return plan_comparison(override(RECIPE, settings), [0], runs, larger_batch=True)


@contextmanager
def comparing(runs: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [*COMPARE, *arguments, "--seeds", "1", "--runs", str(runs), "--jobs", "2"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(condition: Callable[[], Any]) -> None:
    while not condition():  # pytest's timeout ends it
        time.sleep(0.05)


def wait_for_rows(runs: Sequence[Run]) -> list[int]:
    """Waits until each of the runs trains; returns their processes."""
    wait_until(lambda: all(RunFolder(run.folder).metrics() for run in runs))
    holders = [holder_of(run.folder) for run in runs]
    return [holder.pid for holder in holders if holder is not None]


def checkpoints(run: Run) -> list[Path]:
    return list((run.folder / "checkpoints").glob("step-*[0-9]"))


def test_two_at_a_time_end_in_the_same_bits_and_one_that_fails_stops_no_other(tmp_path: Path) -> None:
    alone, together = plan(tmp_path / "alone"), plan(tmp_path / "together")
    assert train_all(alone, Console(quiet=True)) == []
    damaged = together[1].folder / "checkpoints" / "step-00000002"
    damaged.mkdir(parents=True)
    (damaged / "manifest.json").write_text("{")
    with comparing(tmp_path / "together") as process:
        shown, said = process.communicate()
        assert process.returncode == 2
    last = said.splitlines()[-1]
    assert last.startswith(f"rdrop: {together[1].label}: ")
    assert str(damaged) in last
    assert last.endswith("(exit status 2)")
    for run, twin in ((together[0], alone[0]), (together[2], alone[2])):
        assert final_state(run.folder) == final_state(twin.folder)
        result = run.result()
        assert result is not None
        assert result["machine"].pop("side_by_side") == 2
        expected = twin.result()
        assert expected is not None
        assert result["machine"] == expected["machine"]  # the threads, above all
    assert "up to 2 runs side by side" in shown
    assert f"1/3  {together[0].label}: test" in said


def test_a_process_goes_on_with_the_next_run_and_one_that_died_waiting_is_replaced(tmp_path: Path) -> None:
    alone, runs = plan(tmp_path / "alone"), plan(tmp_path / "together")
    assert train_all(alone, Console(quiet=True)) == []
    console = Console(quiet=True)
    with (
        show_progress(console, [run.recipe for run in runs], []) as display,
        Processes([{}], Command(TINY, tmp_path / "together"), display) as workers,
    ):
        trained = []
        for run in runs:
            workers.start(run)
            while workers.running:
                assert [outcome.kind for outcome in workers.wait()] in ([], ["finished"])
            trained.append(workers._idle[0].process)
            if run is runs[1]:
                trained[-1].kill()
                trained[-1].wait()
    first, second, third = trained
    assert first is second
    assert third is not first
    assert third.returncode == 0
    for run, twin in zip(runs, alone, strict=True):
        assert final_state(run.folder) == final_state(twin.folder)


def test_ctrl_c_saves_all_and_the_same_command_goes_on(tmp_path: Path) -> None:
    runs = plan(tmp_path, *ENDLESS)
    with comparing(tmp_path, *ENDLESS) as process:
        processes = wait_for_rows(runs[:2])
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        assert process.returncode == 130
    assert "0 of 3 runs finished; go on with: rdrop compare" in said
    for run, pid in zip(runs, processes, strict=False):
        assert len(checkpoints(run)) >= 1
        assert holder_of(run.folder) is None
        assert not is_running(pid)


def test_a_second_ctrl_c_ends_at_once_what_does_not_stop(tmp_path: Path) -> None:
    runs = plan(tmp_path, *ENDLESS)
    with comparing(tmp_path, *ENDLESS) as process:
        processes = wait_for_rows(runs[:2])
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)  # so that it cannot save
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert any("Ctrl-C ends it at once" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        process.communicate()
        assert process.returncode == 130
    wait_until(lambda: not any(map(is_running, processes)))


def test_a_run_that_finishes_as_it_is_asked_to_stop_is_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_when_the_result_is_written(monkeypatch)
    runs = plan_comparison(RECIPE, [0, 1], tmp_path, larger_batch=False)
    with pytest.raises(StoppedError, match="1 of 4 runs finished") as stopped:
        train_all(runs, Console(quiet=True))
    assert stopped.value.status == 143


def test_a_child_that_waits_for_its_next_run_ends_with_the_others(tmp_path: Path) -> None:
    (run, *_) = plan(tmp_path)
    waits = (
        "import signal, sys, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(0.5); "
        "print('{\"finished\": true}', flush=True); sys.stdin.read()"
    )
    with (
        show_progress(Console(quiet=True), [run.recipe], []) as display,
        subprocess.Popen([sys.executable, "-c", waits], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
        tempfile.TemporaryFile() as errors,
        Processes([{}, {}], Command(TINY, tmp_path, ()), display) as workers,
    ):
        assert process.stdout is not None
        process.stdout.readline()  # it does not hear the signal from here on
        workers._children[0] = Child(run, process, errors, {})
        threading.Thread(target=workers._listen, args=(process,)).start()
    assert process.returncode == 0


@pytest.mark.parametrize("killed", ["parent", "child"])
def test_what_is_killed_takes_nobody_along_and_leaves_nobody_alone(tmp_path: Path, killed: str) -> None:
    runs = plan(tmp_path, *ENDLESS)
    with comparing(tmp_path, *ENDLESS) as process:
        processes = wait_for_rows(runs[:2])
        if killed == "parent":
            process.kill()
        else:
            os.kill(processes[0], signal.SIGKILL)
            wait_for_rows(runs[2:])  # its place is taken by the third
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate()
    if killed == "child":
        assert process.returncode == 143
        assert f"failed: {runs[0].label}: killed by SIGKILL" in said
    wait_until(lambda: not any(map(is_running, processes)))
    saved = runs[:2] if killed == "parent" else runs[1:]
    assert all(checkpoints(run) for run in saved)
    assert not [path for run in saved for path in run.folder.glob(FILE)]


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def test_the_lines_for_xargs_train_every_run_and_the_report_compares_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "many-runs.md").read_text()
    (line,) = [line for line in page.splitlines() if "| xargs" in line]
    line = line.replace("compare digits", f"compare {TINY} --seeds 2 --no-double-batch")
    program = tmp_path / "bin" / "rdrop"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rdrop "$@"\n')
    program.chmod(0o755)
    folder = tmp_path / "runs of mine"  # the quotes must hold
    line = line.replace("--runs runs", f"--runs {shlex.quote(str(folder))}")
    path = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(line, shell=True, cwd=ROOT, env=os.environ | {"PATH": path}, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [run.problem for run in find_runs(folder)] == [None] * 4

    monkeypatch.chdir(ROOT)
    capsys.readouterr()
    again = ["compare", TINY, "--seeds", "2", "--no-double-batch", "--runs", str(folder), "--commands"]
    assert cli.run(again) == 0
    assert capsys.readouterr().out == ""
    assert cli.run(["report", str(folder)]) == 0
    assert "tiny: 2 seeds" in capsys.readouterr().out


PRINTS_AND_TRAINS = """#!/bin/sh
if [ "$1" = compare ]; then
    for run in a b c; do echo "rdrop train digits --runs 'runs of mine/$run'"; done
else
    mkdir -p "$4"
fi
"""


@pytest.mark.parametrize("how", ["xargs", "parallel", "slurm"])
def test_the_lines_of_the_page_start_every_command_with_its_quotes(how: str, tmp_path: Path) -> None:
    if how == "parallel" and shutil.which("parallel") is None:
        pytest.skip("GNU parallel is not installed")
    program = tmp_path / "bin" / "rdrop"
    program.parent.mkdir()
    program.write_text(PRINTS_AND_TRAINS)
    program.chmod(0o755)
    page = (ROOT / "docs" / "many-runs.md").read_text()
    if how == "slurm":
        (tmp_path / "array.sh").write_text(page[page.index("#!/bin/bash") :].partition("```")[0])
        array = "for i in 1 2 3; do SLURM_ARRAY_TASK_ID=$i bash array.sh; done"
        (line,) = [line for line in page.splitlines() if line.startswith("rdrop compare translation") and ">" in line]
        line = f"{line} && {array}"
    else:
        (line,) = [line for line in page.splitlines() if f"| {how}" in line]
    environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
    subprocess.run(line, shell=True, cwd=tmp_path, env=environment, check=True)
    assert sorted(path.name for path in (tmp_path / "runs of mine").iterdir()) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["digits", "digits-vit", "translation", "text-classification"])
def test_a_command_makes_the_recipe_again_from_what_was_typed(name: str, tmp_path: Path) -> None:
    for settings in ([], ["tiny=true"], ["alpha=0.3", "seed=7"], ["name=a.b", "dropout=[0.1,0.3]"]):
        chosen = override(RECIPES[name], settings)
        for run in plan_comparison(chosen, [0, 3], tmp_path, larger_batch=True):
            kind, given, *changes, option, folder = Command(name, tmp_path).arguments(run)
            assert (kind, given, option, folder) == ("train", name, "--runs", str(tmp_path))
            assert override(RECIPES[name], changes) == run.recipe


def test_a_text_that_looks_like_a_number_stays_a_text() -> None:
    changed = DIGITS_VIT.replace(name="3")
    assert settings_between(DIGITS_VIT, changed) == ['name="3"']


def test_commands_print_what_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = plan_comparison(DIGITS_VIT.replace(alpha=0.5), [0, 1], tmp_path, larger_batch=False)
    RunFolder(runs[0].folder).write_result(result_of(runs[0].recipe))
    RunFolder(runs[1].folder).write_failure(3, "step 3: loss is nan")
    arguments = ["compare", "digits-vit", "alpha=0.5", "--seeds", "2", "--no-double-batch", "--runs", str(tmp_path)]
    assert cli.run([*arguments, "--tracker", "tensorboard", "--commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    tail = f"--runs {tmp_path} --tracker tensorboard"
    assert lines == [
        f"rdrop train digits-vit alpha=0.0 seed=1 {tail}",
        f"rdrop train digits-vit alpha=0.5 seed=1 {tail}",
    ]


# ------------------------------------------------------------------------------------------------ in this process


def fake(monkeypatch: pytest.MonkeyPatch, train: Callable[[Recipe, Path], None]) -> list[Recipe]:
    trained: list[Recipe] = []

    def noted(recipe: Recipe, folder: Path, **_: Any) -> dict[str, Any]:
        trained.append(recipe)
        train(recipe, folder)
        RunFolder(folder).write_result(result_of(recipe))
        return result_of(recipe)

    monkeypatch.setattr(trainer, "train", noted)
    return trained


def result_of(recipe: Recipe) -> dict[str, Any]:
    return {
        "format": 1, "recipe": recipe.saved(), "metric": "accuracy", "finished": "2026-01-01T00:00:00Z",
        "test": {"accuracy": 0.5}, "valid": {"accuracy": 0.5}, "cost": {"train_seconds": 1.0}, "machine": {},
        "versions": {},
    }  # fmt: skip


def test_a_run_that_diverges_is_recorded_shown_and_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = ["compare", TINY, "--seeds", "1", "--no-double-batch", "--runs", str(tmp_path)]
    overflow = trainer._Training.loss

    def diverging(self: Any, part: Any, step: int, num_items: Any) -> Any:
        terms = overflow(self, part, step, num_items)
        return terms._replace(loss=terms.loss * float("nan")) if self.recipe.method.alpha and step == 2 else terms

    monkeypatch.setattr(trainer._Training, "loss", diverging)
    assert cli.run(arguments) == 3
    shown, said = capsys.readouterr()
    assert "tiny: 1 seed" in shown  # the baseline was trained all the same
    assert said.splitlines()[-1].startswith("rdrop: R-Drop (alpha 2), seed 0: step 3: loss is nan")
    failed = plan_comparison(RECIPE, [0], tmp_path, larger_batch=False)[1].folder / "failed.json"
    known = json.loads(failed.read_text())
    assert known["step"] == 3
    task = TinyTask(RECIPE)
    epoch, examples = DataOrder(RECIPE, task.train_size(), task.train_lengths(), parts=RECIPE.accumulation).at(2)
    assert known["batch"] == {"epoch": epoch, "examples": examples.tolist()}
    assert f"Its batch has the training examples {', '.join(map(str, examples))}, counted from 0" in known["what"]
    assert cli.run(["report", str(tmp_path)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "diverged: step 3: loss is nan" in shown
    assert "Run it again" not in shown

    monkeypatch.setattr(trainer._Training, "loss", overflow)
    assert cli.run(arguments) == 3
    assert f"It is not trained again; to try it, delete {failed}" in capsys.readouterr().err
    failed.unlink()
    assert cli.run(arguments) == 0


def test_a_run_that_fails_stops_no_other_and_is_named_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(recipe: Recipe, _: Path) -> None:
        if recipe.method.alpha:
            raise trainer.TrainingError("no room for it")
        if recipe.seed == 1:
            raise ZeroDivisionError("nobody foresaw it")

    trained = fake(monkeypatch, train)
    runs = plan_comparison(DIGITS_VIT, [0, 1, 2], tmp_path, larger_batch=False)
    (runs[4].folder).mkdir(parents=True)
    (runs[4].folder / "result.json").write_text("{")
    console = Console(file=io.StringIO())
    failures = train_all(runs, console)
    assert [(failure.label, failure.status) for failure in failures] == [
        (runs[4].label, 2), (runs[1].label, 1), (runs[2].label, 1), (runs[3].label, 1), (runs[5].label, 1),
    ]  # fmt: skip
    assert "ZeroDivisionError: nobody foresaw it" in failures[2].what
    assert len(trained) == 5
    assert FailedRunsError(failures).status == 1


@pytest.mark.parametrize("is_seen", [True, False])
def test_a_run_that_another_has_is_waited_for_and_taken_over_if_it_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_seen: bool
) -> None:
    runs = plan_comparison(DIGITS_VIT, [0, 1], tmp_path, larger_batch=False)
    theirs = {runs[0].folder: "finishes", runs[1].folder: "leaves"}
    alive = set(theirs)
    asked: set[Path] = set() if not is_seen else set(theirs)

    def holder(folder: Path) -> str | None:
        """Who has a run; not yet, when it is asked for the first time, if that is not seen."""
        was_asked = folder in asked
        asked.add(folder)
        return "somebody" if folder in alive and was_asked else None

    def train(_: Recipe, folder: Path) -> None:
        if folder in alive:
            raise RunLockedError("held")

    def sleep(_: float) -> None:
        folder = sorted(alive)[0]
        alive.remove(folder)
        if theirs[folder] == "finishes":
            RunFolder(folder).write_result(result_of(runs[0].recipe))

    trained = fake(monkeypatch, train)
    monkeypatch.setattr(jobs, "holder_of", holder)
    monkeypatch.setattr(jobs.time, "sleep", sleep)
    assert train_all(runs, Console(quiet=True)) == []
    assert all(run.result() is not None for run in runs)
    tries = [Run.of("", recipe, tmp_path).folder for recipe in trained]
    assert tries == [run.folder for run in (runs[2:] if is_seen else runs)] + [runs[1].folder]


def test_a_single_run_that_another_process_has_is_refused_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Run.of("", DIGITS_VIT, tmp_path).folder
    with RunFolder(folder).held():
        assert cli.run(["train", "digits-vit", "--runs", str(tmp_path)]) == 2
    assert f"is being trained by process {os.getpid()} on" in capsys.readouterr().err


def test_runs_of_a_task_of_ones_own_are_scored_again_by_naming_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert train_all(plan_comparison(RECIPE, [0], tmp_path, larger_batch=False), Console(quiet=True)) == []
    monkeypatch.setattr(recipes, "_CLASSES", {})  # as in a new process
    capsys.readouterr()
    assert cli.run(["evaluate", str(tmp_path)]) == 2
    assert "--recipe package.module:NAME" in capsys.readouterr().err
    assert cli.run(["evaluate", str(tmp_path), "--recipe", TINY]) == 0
    assert "tiny: 1 seed" in capsys.readouterr().out


def test_the_spelling_of_the_first_version_is_understood(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["--unlabelled", "x.txt"], ["--unlabelled=x.txt"]):
        assert cli.run(["train", "digits-vit", *given]) == 2
        assert "data.unlabeled" in capsys.readouterr().err
    assert cli.run(["train", "--help"]) == 0
    assert "unlabelled" not in capsys.readouterr().out

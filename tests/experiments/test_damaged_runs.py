"""A run folder that is damaged: every command says which file and what to do, and what it says to do helps."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tests.experiments.tiny_runs import RECIPE, TinyTask

from rdrop.experiments.launch import cli
from rdrop.experiments.launch.jobs import train_all
from rdrop.experiments.launch.plan import Run, plan_comparison
from rdrop.experiments.run_folder import METRICS, RESULT, find_runs, lock
from rdrop.experiments.run_folder import RECIPE as RECIPE_FILE
from rdrop.experiments.training import trainer
from rdrop.experiments.training.checkpoints import CheckpointWarning

NAME = "tests.experiments.tiny_runs:RECIPE"
COMMANDS = {
    "train": ["train", NAME, "alpha=0", "--runs"],
    "compare": ["compare", NAME, "--seeds", "1", "--no-double-batch", "--runs"],
    "evaluate": ["evaluate", "--recipe", NAME],
    "report": ["report"],
    "list": ["list", "--runs"],
}
ENTRIES = ("recipe", "metric", "finished", "valid", "test", "cost", "machine", "versions")
OPTIONAL = ("best_step", "updates", "averaged_steps", "notes", "metrics", "constant", "digest", "data", "resumed")
WRONG: tuple[Any, ...] = ("text", 3, [], None, {"loss": "text"})
RIGHT = {
    "recipe": dict, "metric": str, "finished": str, "valid": dict, "test": dict, "cost": dict, "machine": dict,
    "versions": dict, "best_step": int, "updates": int, "averaged_steps": list, "notes": dict, "metrics": dict,
    "constant": (dict, type(None)), "digest": str, "data": (str, type(None)), "resumed": int,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The baseline and R-Drop of one seed, finished."""
    folder = tmp_path_factory.mktemp("whole")
    load_task, trainer.load_task = trainer.load_task, TinyTask  # type: ignore[assignment]
    try:
        assert train_all(plan_comparison(RECIPE, [0], folder, larger_batch=False), Console(quiet=True)) == []
    finally:
        trainer.load_task = load_task
    return folder


@pytest.fixture
def runs(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cli, "write_pages", lambda runs: None)  # it reads by the same check, and draws
    shutil.copytree(whole, tmp_path / "runs")
    return tmp_path / "runs"


def baseline(runs: Path) -> Path:
    return plan_comparison(RECIPE, [0], runs, larger_batch=False)[0].folder


def said_by(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Runs a command; returns its status, and all that it said with single spaces. A traceback is a failure."""
    capsys.readouterr()
    status = cli.run([*COMMANDS[name], str(runs)])
    return status, " ".join("".join(capsys.readouterr()).split())


def require_that_it_helps(remedy: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Follows a remedy word for word: the run can be trained, and the comparison leaves none out."""
    subprocess.run(["bash", "-c", remedy], check=True)
    assert said_by("train", runs, capsys)[0] == 0
    status, said = said_by("compare", runs, capsys)
    assert (status, "left out" in said) == (0, False)


def damaged_results() -> list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]]:
    without = [(f"no {key}", lambda result, key=key: {k: v for k, v in result.items() if k != key}) for key in ENTRIES]
    wrong = [
        (f"{key} is {value!r}", lambda result, key=key, value=value: result | {key: value})
        for key in (*ENTRIES, *OPTIONAL)
        for value in WRONG
        if not isinstance(value, RIGHT[key]) or value == {"loss": "text"}  # type: ignore[arg-type]
    ]
    other_metric = ("test without the metric", lambda result: result | {"test": {"other": 1.0}})
    return [pair for pair in [*without, *wrong, other_metric] if pair[0] not in HARMLESS]


HARMLESS = {f"{key} is {{'loss': 'text'}}" for key in ("machine", "versions", "metrics", "recipe", "notes")}
"""Objects whose entries no reader computes with; another recipe and another metric have tests of their own."""


def test_an_entry_that_is_missing_or_wrong_is_named_by_every_command_that_needs_the_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = baseline(runs) / RESULT
    content = json.loads(file.read_text())
    damages = damaged_results()
    assert len(damages) > 70
    for what, damage in damages:
        file.write_text(json.dumps(damage(content)))
        for name, expected in (("train", {2}), ("compare", {2}), ("report", {0}), ("list", {0}), ("evaluate", {0})):
            if name in ("list", "evaluate") and not what.endswith("'text'"):
                continue  # they ask the same check, and cost more
            status, said = said_by(name, runs, capsys)
            assert status in expected, (what, name, said)
            assert name == "list" or RESULT in said, (what, name)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"format": 1}', '{"format": 9}'])
@pytest.mark.parametrize("name", [RESULT, RECIPE_FILE])
def test_the_remedy_of_a_damaged_file_helps_when_followed_word_for_word(
    name: str, content: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    file = baseline(runs) / name
    before = json.loads((baseline(runs) / RESULT).read_text())
    file.write_text(content)
    for command in ("train", "compare", "report"):
        status, said = said_by(command, runs, capsys)
        assert status == (0 if command == "report" else 2), (command, said)
        assert str(file.relative_to(runs)) in said or name in said
    status, said = said_by("compare", runs, capsys)
    (remedy,) = re.findall(r"its checkpoints: (rm \S+)", said)
    require_that_it_helps(remedy, runs, capsys)
    after = json.loads((baseline(runs) / RESULT).read_text())
    assert [after[key] for key in ("test", "valid", "best_step")] == [
        before[key] for key in ("test", "valid", "best_step")
    ]


def test_a_result_of_another_seed_is_not_shown_as_that_of_the_run(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = baseline(runs) / RESULT
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"recipe": result["recipe"] | {"seed": 7}}))
    for name in ("train", "compare"):
        status, said = said_by(name, runs, capsys)
        assert status == 2
        assert "it is the result of another recipe, which differs in seed" in said


def test_a_damaged_row_is_named_and_deleting_its_line_helps(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = baseline(runs) / METRICS
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0], "{half\n", *lines[1:]]))
    for command in ("train", "compare"):
        status, said = said_by(command, runs, capsys)
        assert (status, f"{METRICS}:2: not valid JSON" in said) == (2, True)
    assert f"left out: {baseline(runs)}: {METRICS}:2: not valid JSON" in said_by("report", runs, capsys)[1].replace(
        f"{baseline(runs)}/", ""
    )
    file.write_text("".join(lines))
    assert "left out" not in said_by("report", runs, capsys)[1]


def remedy_in(said: str) -> str:
    """The command at the end of a message."""
    (found,) = set(re.findall(r"\brm (?:-r )?\S+", said))
    return str(found)


def a_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


def a_file(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.write_text("x")


def a_link_to_nothing(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to("nowhere")


@pytest.mark.filterwarnings("ignore:.* has no checkpoint, and there are rows")
@pytest.mark.parametrize(
    ("name", "put"),
    [
        *((name, put) for name in (lock.FILE, RESULT, RECIPE_FILE, METRICS) for put in (a_folder, a_link_to_nothing)),
        *(("checkpoints", put) for put in (a_file, a_link_to_nothing)),
        ("checkpoints/step-00000099", a_file),
    ],
)
def test_what_stands_in_the_place_of_a_file_or_folder_of_one_run_stops_no_other_and_its_remedy_helps(
    name: str, put: Callable[[Path], None], runs: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    run = baseline(runs)
    (run / RESULT).unlink()
    put(run / name)
    for command, expected in (("train", 2), ("compare", 2), ("report", 0), ("list", 0), ("evaluate", 0)):
        status, said = said_by(command, runs, capsys)
        assert status == expected, (command, said)
        assert "Free some space" not in said
        assert command == "list" or str(run / name) in said or name in said, (command, said)
        assert command not in ("compare", "evaluate", "report") or "alpha 2" in said, (command, said)
    status, said = said_by("compare", runs, capsys)
    require_that_it_helps(remedy_in(said), runs, capsys)


def test_a_file_of_one_run_that_cannot_be_read_or_written_ends_that_run_alone(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    for run in plan_comparison(RECIPE, [0], runs, larger_batch=False):
        (run.folder / RESULT).unlink()
    train = trainer.train

    def refused(recipe: Any, folder: Path, **options: Any) -> Any:
        if recipe.method.is_plain:
            raise PermissionError(errno.EACCES, "Permission denied", str(folder / "checkpoints"))
        return train(recipe, folder, **options)

    monkeypatch.setattr(trainer, "train", refused)
    status, said = said_by("compare", runs, capsys)
    assert (status, "Permission denied" in said, "R-Drop (alpha 2)" in said) == (1, True, True)


def test_the_commands_of_a_comparison_leave_a_damaged_run_out_and_name_it(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (baseline(runs) / RESULT).write_text("{")
    status = cli.run(["compare", NAME, "--seeds", "0,1", "--no-double-batch", "--commands", "--runs", str(runs)])
    printed = capsys.readouterr()
    assert status == 2
    assert printed.out.count("rdrop train") == 2
    assert str(baseline(runs) / RESULT) in printed.err.replace("\n", "")


WRONG_RECIPES = ({"learning_rate": "abc"}, {"seed": 7}, {"model": "x"})


@pytest.mark.parametrize(
    ("file", "changes", "is_finished"),
    [
        *((RECIPE_FILE, changes, is_finished) for changes in WRONG_RECIPES for is_finished in (True, False)),
        (RESULT, {"metric": "zonk", "test": {"zonk": 1.0}, "valid": {"zonk": 1.0}}, True),
        (RESULT, {"best_step": 10**400}, True),
        ("failed.json", {}, False),
        ("failed.json", {"what": {"a": 1}}, False),
    ],
)
def test_an_entry_of_the_wrong_kind_is_named_and_its_remedy_helps(
    file: str, changes: dict[str, Any], is_finished: bool, runs: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    run = baseline(runs)
    if not is_finished:
        (run / RESULT).unlink()
    content = json.loads((run / file).read_text()) if (run / file).exists() else {}
    (run / file).write_text(json.dumps(content | changes))
    status, said = said_by("compare", runs, capsys)
    assert (status, file in said, "R-Drop (alpha 2)" in said) == (2, True, True), said
    require_that_it_helps(remedy_in(said), runs, capsys)


def test_a_recipe_wrong_in_both_files_is_mended_by_one_remedy_after_the_other(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    result, recipe = baseline(runs) / RESULT, baseline(runs) / RECIPE_FILE
    wrong = json.loads(recipe.read_text())
    wrong["method"]["alpha"] = "x"
    recipe.write_text(json.dumps(wrong))
    result.write_text(json.dumps(json.loads(result.read_text()) | {"recipe": wrong}))
    for _ in range(2):
        status, said = said_by("train", runs, capsys)
        assert status == 2
        subprocess.run(["bash", "-c", remedy_in(said)], check=True)
    assert said_by("train", runs, capsys)[0] == 0


def test_a_result_that_says_not_whose_weights_it_has_is_shown_and_a_deleted_recipe_is_written_again(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = baseline(runs) / RESULT
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in whole.items() if key != "best_step"}))
    status, said = said_by("train", runs, capsys)
    assert (status, "The weights of" in said) == (0, False)
    (baseline(runs) / RECIPE_FILE).unlink()
    assert "recipe.json is missing. Train the run again, which writes it" in said_by("report", runs, capsys)[1]
    assert said_by("train", runs, capsys)[0] == 0
    assert "left out" not in said_by("report", runs, capsys)[1]


def test_one_run_without_weights_hides_no_other_from_evaluate(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for weights in (baseline(runs) / "checkpoints").glob("*/model.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    status, said = said_by("evaluate", runs, capsys)
    assert status == 1
    assert "seed 0: test loss" in said
    assert f"{baseline(runs) / 'checkpoints'}" in said
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    assert f"To start the run again, delete {baseline(runs)}." in said
    shutil.rmtree(baseline(runs))
    assert said_by("train", runs, capsys)[0] == 0
    assert said_by("evaluate", runs, capsys)[0] == 0


def test_a_result_by_a_score_that_the_task_has_not_is_named_when_it_is_scored_again(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = baseline(runs) / RESULT
    result = json.loads(file.read_text())
    file.write_text(json.dumps(result | {"metric": "rouge1", "test": {"rouge1": 1.0}}))
    status, said = said_by("evaluate", runs, capsys)
    assert (status, "R-Drop (alpha 2), seed 0: test loss" in said) == (2, True)
    assert f"{file}: 'rouge1' is no score of {result['recipe']['task']}." in said


def test_a_run_whose_checkpoints_are_all_damaged_is_status_2(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    (baseline(runs) / RESULT).unlink()
    for weights in (baseline(runs) / "checkpoints").glob("*/model.safetensors"):
        weights.write_bytes(b"")
    status, said = said_by("train", runs, capsys)
    assert status == 2
    assert "no usable checkpoint" in said
    assert f"delete {baseline(runs) / 'checkpoints'}" in said


def test_checkpoints_that_are_gone_are_not_passed_over_in_silence(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    result = json.loads((baseline(runs) / RESULT).read_text())
    (baseline(runs) / RESULT).unlink()
    shutil.rmtree(baseline(runs) / "checkpoints")
    with pytest.warns(
        CheckpointWarning, match=r"has no checkpoint, and there are rows up to step 8: the run .* starts again"
    ):
        again = trainer.train(RECIPE.replace(alpha=0.0), baseline(runs))
    assert again["test"] == result["test"]


def test_another_number_of_processes_than_before_is_said(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "load_task", TinyTask)
    training = trainer._Training
    resumed_state = training.resumed_state
    monkeypatch.setattr(
        training, "resumed_state", lambda self, found: resumed_state(self, trainer.replace(found, processes=2))
    )
    (baseline(runs) / RESULT).unlink()
    with pytest.warns(CheckpointWarning, match=r"was trained in 2 process\(es\) up to step 8 and goes on in 1"):
        trainer.train(RECIPE.replace(alpha=0.0), baseline(runs))


def test_linked_run_folders_are_found_and_a_circle_of_links_ends(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "mine").symlink_to(baseline(runs), target_is_directory=True)
    (tmp_path / "links" / "circle").symlink_to(tmp_path / "links", target_is_directory=True)
    (record,) = find_runs(tmp_path / "links")
    assert record.path == tmp_path / "links" / "mine"
    assert record.result is not None


@pytest.mark.parametrize("name", ["a[/x]", "[bold]ü\x1b[31m\u202ea\u2028"])
def test_a_path_is_shown_as_it_is_and_never_obeyed(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / name
    shutil.copytree(whole, runs)
    for command in COMMANDS:
        if command != "evaluate":
            status, said = said_by(command, runs, capsys)
            assert status == 0, (command, said)
            assert not {"\x1b", "\u202e", "\u2028"} & set(said)
    (Run.of("", RECIPE, runs).folder / RESULT).write_text("{")
    status, said = said_by("compare", runs, capsys)
    assert status == 2
    assert not {"\x1b", "\u202e", "\u2028"} & set(said)
    assert name.replace("\x1b", "\\x1b").replace("\u202e", "\\u202e").replace("\u2028", "\\u2028") in said

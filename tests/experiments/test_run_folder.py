"""The run folder's files: valid JSON, never half written, and readable when one of them is damaged."""

import ast
import errno
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rdrop.experiments import shown
from rdrop.experiments.run_folder import ResultsError, RunFolder, StorageError, find_runs, lock, saved
from rdrop.experiments.run_folder import folder as results

ROW = {"kind": "train", "step": 4, "epoch": 1.0, "seconds": 0.5, "loss": 0.25, "divergence": None}
RESULT = {"format": 1, "valid": {"accuracy": 0.9}}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_recipe({"format": 3, "name": "digits", "data": {"train_labels": 3}})
    folder.append_metrics(ROW)
    folder.write_result(RESULT)
    assert folder.recipe() == {"format": 3, "name": "digits", "data": {"train_labels": 3}}
    assert folder.metrics() == [ROW]
    assert folder.result() == RESULT


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_non_finite_number_is_valid_json_and_comes_back_as_itself(tmp_path: Path, number: float) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics(ROW | {"loss": number})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert isinstance(json.loads(text, parse_constant=pytest.fail)["loss"], str)
    assert repr(folder.metrics()[0]["loss"]) == repr(number)


def test_result_is_none_while_unfinished(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).result() is None


def test_truncate_drops_later_rows_and_a_half_written_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (2, 4, 6):
        folder.append_metrics(ROW | {"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "tra')
    assert [row["step"] for row in folder.metrics()] == [2, 4, 6]
    folder.truncate_metrics(4)
    folder.append_metrics(ROW | {"step": 5})
    assert [row["step"] for row in folder.metrics()] == [2, 4, 5]
    folder.truncate_metrics(-1)
    assert folder.metrics() == []


def test_a_damaged_line_in_the_middle_is_an_error_naming_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n\xff\xfe\n{"kind": "train", "step": 2}\n')
    with pytest.raises(ResultsError, match=r"metrics.jsonl:2: not valid JSON"):
        RunFolder(tmp_path).metrics()


@pytest.mark.parametrize("step", [10**400, 2**60, -1, "3", None])
def test_a_row_whose_step_is_no_number_of_updates_is_damaged(tmp_path: Path, step: object) -> None:
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": step}) + "\n")
    with pytest.raises(ResultsError, match=r"metrics.jsonl:1: a row needs a `kind` and a whole number as `step`"):
        RunFolder(tmp_path).metrics()


def test_a_result_of_another_format_is_refused(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_result({"format": 2})
    with pytest.raises(ResultsError, match="format is 2 and this version of rdrop reads 1"):
        RunFolder(tmp_path).result()


@pytest.mark.parametrize("content", [b"", b"[]", b'{"a": NaN}', b'{"a": 1', b"\x00", b"[" * 100_000, b'"x"'])
def test_find_runs_reports_damaged_and_unfinished_folders_beside_the_good_ones(tmp_path: Path, content: bytes) -> None:
    good, damaged, unfinished = (RunFolder(tmp_path / name) for name in ("a/1", "a/2", "b/3"))
    for folder in (good, damaged, unfinished):
        folder.write_recipe({"name": "digits"})
        folder.append_metrics(ROW)
    good.write_result(RESULT)
    (damaged.path / "result.json").write_bytes(content)

    records = find_runs(tmp_path)
    assert [record.path for record in records] == [good.path, damaged.path, unfinished.path]
    assert records[0].problem is None
    assert records[0].result == RESULT
    assert "result.json" in str(records[1].problem)
    assert records[1].result is None
    assert records[1].metrics == [ROW]
    assert "unfinished, last row at step 4" in str(records[2].problem)


def test_find_runs_reports_a_run_whose_recipe_is_gone(tmp_path: Path) -> None:
    RunFolder(tmp_path / "a").write_result(RESULT)
    (record,) = find_runs(tmp_path)
    assert "recipe.json" in str(record.problem)


def test_find_runs_of_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="does not exist"):
        find_runs(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="is not a folder"):
        find_runs(tmp_path / "file")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_result(RESULT)
    folder.append_metrics(ROW)
    monkeypatch.setattr(results.os, "fsync", _disk_full)
    with pytest.raises(StorageError, match=r"result.json: No space left.*needs \d+ bytes; \d+ bytes are free"):
        folder.write_result({"format": 1})
    with pytest.raises(StorageError, match=r"metrics.jsonl"):
        folder.append_metrics(ROW)
    assert folder.result() == RESULT
    assert folder.metrics() == [ROW]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "result.json"]


def test_processes_that_write_one_page_do_not_take_each_other_s_part(tmp_path: Path) -> None:
    """Each of 200 writes of two threads ends; what is there at the end is one of the two, whole."""
    pages = [bytes([letter]) * 10_000 for letter in b"ab"]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda number: results.write_atomically(tmp_path / "page", pages[number % 2]), range(200)))
    assert (tmp_path / "page").read_bytes() in pages
    assert os.listdir(tmp_path) == ["page"]


def test_what_a_killed_process_was_writing_is_removed_by_the_next_one_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "result.json.0123.tmp").write_text("{")
    (tmp_path / "predictions.jsonl.gz.0123.tmp").write_text("{")
    (tmp_path / "mine.tmp").write_text("{")
    with RunFolder(tmp_path).held():
        assert not list(tmp_path.glob("*.0123.tmp"))
    assert os.listdir(tmp_path) == ["mine.tmp"]


def test_a_leftover_that_cannot_be_removed_keeps_nobody_from_the_run(tmp_path: Path) -> None:
    (tmp_path / "result.json.0123.tmp").mkdir()
    for _ in range(2):
        with RunFolder(tmp_path).held():
            pass


def test_a_text_of_a_recipe_stays_the_text_that_it_is(tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path), {"format": 3, "name": "NaN", "data": {"text_column": "Infinity"}}
    run.write_recipe(recipe)
    run.write_result({"format": 1, "recipe": recipe, "test": {"loss": math.inf}})
    assert run.recipe() == recipe
    found = run.result()
    assert found is not None
    assert (found["recipe"], found["test"]) == (recipe, {"loss": math.inf})


def test_results_imports_the_standard_library_only() -> None:
    own = {f"rdrop.experiments.{name}" for name in ("shown.shell_word", "run_folder.saved", "run_folder.lock")}
    own |= {"rdrop.experiments.run_folder.lock.RunLock"}
    for module in (results, saved, lock, shown):
        tree = ast.parse(Path(module.__file__).read_text())
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {
            f"{getattr(node, 'module', None) or ''}.{alias.name}".strip(".") for node in imports for alias in node.names
        }
        assert {name.split(".")[0] for name in names - own} <= sys.stdlib_module_names


def _disk_full(_descriptor: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")

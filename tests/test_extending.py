"""docs/extending.md does what it says: its modules run from their folder, its changes run in a copy of the project."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import ANY

import pytest

from rdrop.experiments import recipes
from rdrop.experiments.launch import cli

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/extending.md").read_text(encoding="utf-8")
MODULES = re.findall(r"<!-- file: (\w+\.py) -->\n```python\n(.*?)```", PAGE, re.DOTALL)
PATCHES = re.findall(r"<!-- patch -->\n```diff\n(.*?)```", PAGE, re.DOTALL)
TASK_PLACE = re.search(r"<!-- in place of TASK -->\n```python\n(.*?\n)```", PAGE, re.DOTALL)[1]
TASK_LINES = re.search(r"<!-- append to the task -->\n```python\n(.*?)```", PAGE, re.DOTALL)[1]
COMMANDS_OF_A_COPY = """
import sys
from rdrop.experiments.launch import cli
for command in sys.stdin.read().splitlines():
    status = cli.run(command.split()[1:])
    assert status == 0, command
"""


def commands(mark: str) -> list[str]:
    blocks = re.findall(rf"<!-- {mark} -->\n```bash\n(.*?)```", PAGE, re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def write_sentences(folder: Path) -> None:
    names, verbs, places = ("Ada", "Bo", "Cleo", "Dan"), ("sleeps", "sings", "waits"), ("home", "work", "sea", "school")
    lines = [f"{n}/name {v}/other at/other {p}/place" for n, v, p in itertools.product(names, verbs, places)]
    (folder / "sentences.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def readers_folder(tmp_path, monkeypatch):
    for name, text in MODULES:
        (tmp_path / name).write_text(text, encoding="utf-8")
    write_sentences(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(recipes, "_CLASSES", {**recipes._CLASSES})
    yield tmp_path
    for name, _ in MODULES:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_modules_of_a_reader_run_as_the_page_says(readers_folder, capsys):
    for command in commands("run"):
        assert cli.run(shlex.split(command)[1:]) == 0, command
    shown = capsys.readouterr().out
    assert "R-Drop can act on Tagger:" in shown
    assert "tagging: 2 seeds" in shown
    assert "sentences all right" in shown


def test_a_file_that_a_task_of_ones_own_reads_is_known_by_its_content(readers_folder, capsys):
    def run(*arguments):
        status = cli.run([*arguments])
        return status, " ".join(capsys.readouterr().err.split())

    settings = ("tagging:TAGGING", "data.file=sentences.txt", "updates=4", "warmup_updates=1")
    compare = ("compare", *settings, "--no-double-batch", "--seeds", "1")
    evaluate = ("evaluate", "runs", "--recipe", "tagging:TAGGING")
    assert run(*compare) == (0, ANY)
    sentences = Path("sentences.txt").rename("moved.txt")

    status, said = run(*evaluate)
    assert status == 2
    assert "sentences.txt'. Where files of the run have moved, say where they are by data.file=FILE." in said
    assert run(*evaluate, "data.file=moved.txt")[0] == 0
    assert "to score, change data.file" in run(*evaluate, "model.dropout=0.1")[1]

    sentences.write_text(sentences.read_text().replace("home/place", "home/other"))
    status, said = run(*evaluate, "data.file=moved.txt")
    assert status == 2
    assert "the training data are not those of the run" in said
    sentences.rename("sentences.txt")
    for again in (evaluate, compare):
        status, said = run(*again)
        assert status == 2
        assert "sentences.txt: changed after" in said


def test_each_addition_to_the_project_touches_the_files_that_the_page_says(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    touched = [re.search(r"^\+\+\+ b/src/rdrop/experiments/(\S+)", patch, re.MULTILINE)[1] for patch in PATCHES]
    task, data_set, *metric, key_of_the_method = touched
    assert task == "recipes.py"  # beside the folder of the task
    assert data_set == "tasks/text_classification/recipes.py"
    assert metric == ["metrics.py", "tasks/digits/task.py"]
    assert key_of_the_method == "recipe/method.py"
    for patch in PATCHES:
        subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=patch, text=True, check=True)

    folder = tmp_path / "src/rdrop/experiments/tasks/tagging"
    folder.mkdir()
    (folder / "__init__.py").touch()
    text = re.sub(r"^    TASK = .*\n", TASK_PLACE, dict(MODULES)["tagging.py"], flags=re.MULTILINE)
    (folder / "recipes.py").write_text(f"{text}\n{TASK_LINES}", encoding="utf-8")
    write_sentences(tmp_path)

    run = subprocess.run(
        [sys.executable, "-c", COMMANDS_OF_A_COPY],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "src")},
        input="\n".join(commands("run in the patched copy")),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "IMDB" in run.stdout or "imdb" in run.stdout
    assert "Brier score" in run.stdout
    assert "R-Drop (alpha 1, from update 10 on)" in run.stdout
    assert "tagging, alpha 1, seed 0" in run.stdout

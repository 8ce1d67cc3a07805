"""What the terminal is shown: texts of files, paths and settings, and never what they would have it do."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text
from tests.experiments.run_folders import write_run, write_three_arms

from rdrop.experiments.comparison.designs import Design, arm_digest, record_designs
from rdrop.experiments.launch import cli
from rdrop.experiments.launch.progress import Bars
from rdrop.experiments.launch.terminal import Terminal
from rdrop.experiments.run_folder import RunFolder, find_runs, remedy
from rdrop.experiments.shown import shell_line, shell_word
from rdrop.experiments.tasks.digits.recipes import DIGITS_VIT

HOSTILE = "[/x] :smile: \x1b[31m\x1b]0;ran\x07\x9b1m\u202e\u2028it's \\"
RAW = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]")


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, on either stream, without a control character."""
    found = "".join(capsys.readouterr())
    assert RAW.findall(found) == []
    return found


@pytest.mark.parametrize("setting", ["data.train=a[/x].csv", "model.name=[/b]", "data.train=[bold]x", "data.train=:a:"])
def test_the_value_of_a_setting_is_listed_as_it_is(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["list", "text-classification", setting]) == 0
    assert json.dumps(setting.partition("=")[2]) in shown(capsys)


def test_a_text_is_shown_in_full_and_escaped_wherever_it_stands_in_what_is_printed() -> None:
    file = io.StringIO()
    console = Terminal(file=file, width=200)
    table = Table(title=HOSTILE, caption=Text(HOSTILE))
    table.add_column(HOSTILE)
    for cell in (HOSTILE, Text(HOSTILE), Group(HOSTILE, Text.assemble((HOSTILE, "bold"), HOSTILE))):
        table.add_row(cell)
    console.print(table, HOSTILE)
    console.print(Text(HOSTILE, "yellow"), style="bold")
    console.out(HOSTILE)
    found = file.getvalue()
    assert RAW.findall(found) == []
    assert found.count("[/x] :smile: \\x1b[31m\\x1b]0;ran") == 10


def test_the_colors_of_a_text_stay_where_they_were_when_it_is_escaped() -> None:
    file = io.StringIO()
    Terminal(file=file, force_terminal=True, color_system="standard").print(Text.assemble("\x9b", ("red", "red"), "!"))
    assert file.getvalue() == "\\x9b\x1b[31mred\x1b[0m!\n"


def test_the_bars_of_a_terminal_still_move_its_cursor_and_escape_the_label() -> None:
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=True, width=150, legacy_windows=False)
    bars = Bars(console, [DIGITS_VIT], [DIGITS_VIT])
    with bars.live:
        bars.start(HOSTILE, DIGITS_VIT)
        bars.say(HOSTILE)
    found = file.getvalue()
    assert "\x1b[?25l" in found  # the cursor is hidden
    assert "\x1b[31m" not in found
    assert RAW.findall(re.sub(r"\x1b\[[\d;?]*[A-Za-z]|\r", "", found)) == []


def test_a_report_escapes_labels_of_arms_names_of_recipes_and_labels_of_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    name = HOSTILE.replace("/", "")
    metric = {"name": "hostile", "label": HOSTILE, "higher_is_better": True, "percent": True, "decimals": 1}
    write_three_arms(tmp_path)
    for alpha in (0.0, 1.0):
        for seed in (0, 1):
            write_run(
                tmp_path,
                0.7,
                alpha=alpha,
                seed=seed,
                name=name,
                metric="hostile",
                test={"hostile": 0.7},
                valid={"hostile": 0.7},
                metrics={"hostile": metric},
            )
    digests = {run.recipe["method"]["alpha"]: arm_digest(run.recipe) for run in find_runs(tmp_path / name)}
    record_designs(tmp_path, [Design({f"{HOSTILE}0": digests[0.0], f"{HOSTILE}1": digests[1.0]}, f"{HOSTILE}1")])
    assert cli.run(["report", str(tmp_path)]) == 0
    lines = [line.partition("  ")[0] for line in shown(capsys).splitlines()]
    seen = "\\x1b[31m\\x1b]0;ran\\x9b1m\\u202e\\"
    assert f"[x] :smile: {seen}u2028it's \\: 2 seeds" in lines
    for metric in ("test", "valid"):  # then the heading, and the labels of two arms
        at = lines.index(f"{metric} [/x] :smile:")
        assert lines[at + 1 : at + 8 : 3] == [seen] * 3


def test_a_warning_of_a_command_is_escaped() -> None:
    program = (
        "import warnings\n"
        "from rdrop.experiments.launch import cli\n"
        "from rdrop.experiments.recipes import RECIPES\n"
        "cli.find_recipe = lambda name: warnings.warn(f'taken over from {name}')\n"
        "cli.override = lambda recipe, settings: RECIPES['digits-vit']\n"
        f"before = warnings.formatwarning; status = cli.run(['list', {HOSTILE!r}])\n"
        "assert (status, warnings.formatwarning) == (0, before)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert RAW.findall(done.stderr) == []
    assert "UserWarning: taken over from [/x] :smile: \\x1b[31m\\x1b]0;ran\\x07\\x9b1m\\u202e\\u2028it's" in done.stderr


def test_the_command_of_a_run_is_one_line_that_the_shell_reads_as_it_was_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / f"{HOSTILE}\n\t\udcff".replace("/", "")
    assert cli.run(["compare", "digits-vit", "--seeds", "1", "--commands", "--runs", str(runs)]) == 0
    lines = shown(capsys).splitlines()
    assert len(lines) == 3
    script = "\n".join(line.replace("rdrop ", "printf '%s\\0' ", 1) for line in lines)
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.split(b"\0")
    assert words.count(str(runs).encode(errors="surrogateescape")) == 3


def test_a_word_without_control_characters_is_quoted_as_ever() -> None:
    assert shell_line(["rdrop", "it's", "a b", "ä"]) == "rdrop 'it'\"'\"'s' 'a b' 'ä'"


def test_the_remedy_for_a_damaged_file_deletes_it_whatever_its_name(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / HOSTILE.replace("/", "")).path
    folder.mkdir()
    file = folder / "recipe.json"
    file.write_text("{")
    command = remedy(file).rpartition("checkpoints: ")[2]
    assert RAW.search(command) is None
    subprocess.run(["bash", "-c", command], check=True)
    assert not file.exists()
    assert shell_word(file) in command

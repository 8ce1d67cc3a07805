"""`rdrop bench` from the command line, on sizes that take seconds; and tables and plots of what it measured."""

import contextlib
import io
import re
import sys
from pathlib import Path

import pytest

import rdrop.bench
from rdrop.bench import peers
from rdrop.bench.measure import ON_REQUEST
from rdrop.bench.plots import draw, main, svg
from rdrop.bench.records import comparisons, read
from rdrop.bench.table import LAYOUTS, compare, markdown_table
from rdrop.experiments.launch import cli
from rdrop.kernels import available

pytestmark = pytest.mark.skipif(available()["cpu"] is not None, reason=str(available()["cpu"]))

SMALL = ["--pairs", "8", "--classes", "50", "--features", "16", "--batch", "4", "--length", "6", "--layers", "1"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The records of one run of everything, and what it printed."""
    path = tmp_path_factory.mktemp("bench") / "new" / "records.jsonl"
    command = ["bench", *SMALL, "--rounds", "2", "--no-compile", "--threads", "1", "--output", str(path)]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        monkeypatch.setattr(sys, "argv", ["rdrop", *command])
        monkeypatch.setenv("COLUMNS", "200")
        assert cli.run(command) == 0
    return path, printed.getvalue()


def test_everything_is_measured_in_one_run(measured):
    path, printed = measured
    found = comparisons(read(path))
    assert [(of[0]["benchmark"], of[0].get("model")) for of in found] == [
        ("rows", None),
        ("linear", None),
        ("steps", "translation"),
        ("steps", "classification"),
    ]
    named = {*ON_REQUEST, "ours_soft_labels", "ours_overwriting_soft_labels"}  # where they are asked for
    elsewhere = named | {*peers.FROM_LOGITS, *peers.FROM_HIDDEN}  # on a GPU
    for benchmark, records in zip(("rows", "linear", "steps"), found, strict=False):
        forms = {form for form in LAYOUTS[benchmark].words if not form.endswith("_compiled")} - elsewhere
        assert {r["form"] for r in records} == forms
    for heading in ("8 x 50", "8 x 16 x 50", "translation, V = 50", "classification"):
        assert heading in printed
    assert "rdrop_loss(..., overwrite_logits=True)" in printed


def test_a_record_names_the_command(measured):
    assert {r["command"].split(" --output")[0] for r in read(measured[0])} == {
        " ".join(["rdrop", "bench", *SMALL, "--rounds", "2", "--no-compile", "--threads", "1"])
    }


def test_a_mistake_is_one_line_and_status_2(capsys):
    assert cli.run(["bench", "weights"]) == 2
    said = capsys.readouterr().err
    assert "benchmark (='weights') must be one of ('logits', 'hidden', 'steps')" in said
    assert said.count("\n") == 1
    assert cli.run(["bench", "--rounds", "0"]) == 2


def records_by_hand():
    shared = {"benchmark": "rows", "pairs": 4, "classes": 10, "dtype": "float32", "clock": "wall", "p20": 1, "p80": 1}
    return [
        shared | {"form": "cross_entropy", "median": 2.0, "peak_extra_bytes": 100, "moved_bytes": None},
        shared | {"form": "ours_overwriting", "median": 0.5, "peak_extra_bytes": None, "moved_bytes": 60},
        shared | {"form": "official", "median": None, "peak_extra_bytes": None, "moved_bytes": None},
        shared | {"form": "copy", "median": 0.25, "peak_extra_bytes": 0, "moved_bytes": 40},
    ]


def test_ratios_are_to_cross_entropy_and_bandwidth_to_a_copy():
    lines = {line.form: line for line in compare(records_by_hand())}
    ours = lines["ours_overwriting"]
    assert (ours.time_ratio, ours.memory_ratio, ours.bandwidth_ratio) == (0.25, None, 120 / 160)
    assert lines["official"].time_ratio is None


def test_a_markdown_table_has_a_column_for_each_size():
    first, second = records_by_hand(), [r | {"pairs": 5} for r in records_by_hand()[:1]]
    assert markdown_table([first, second]).splitlines() == [
        "| loss from logits, forward and backward | 4 x 10: time, memory | 5 x 10: time, memory |",
        "|---|---|---|",
        "| `F.cross_entropy`, eager | 1.00, 1.00 | 1.00, 1.00 |",
        "| official form | out of memory |  |",
        "| `rdrop_loss(..., overwrite_logits=True)` | 0.25,  |  |",
    ]


def test_a_plot_has_the_ratios_as_text_and_follows_light_and_dark(measured, tmp_path, monkeypatch):
    path, _ = measured
    monkeypatch.setattr(sys, "argv", ["plots", str(path), "--output", str(tmp_path)])
    main()
    assert {file.name for file in tmp_path.iterdir()} == {"rows.svg", "linear.svg", "steps.svg"}
    found = comparisons(read(path))[0]
    drawn = (tmp_path / "rows.svg").read_text()
    texts = re.findall(r"<text [^>]*>([^<]*)</text>", drawn)
    for line in compare(found):
        if line.form != "copy":
            assert line.words.replace("`", "") in texts
            assert f"{line.time_ratio:.2f}" in texts
    assert "prefers-color-scheme: dark" in drawn
    assert re.search(r"#0[1-5]0[1-5]0[1-5]", drawn) is None
    assert drawn == svg(draw([found]))
    assert svg(draw([found] * 3)).count("<svg") == 1
    with pytest.raises(
        ValueError, match="4 comparisons are more than a figure has room for, 3: give those of one dtype"
    ):
        draw([found] * 4)


def test_the_benchmarks_know_nothing_of_the_experiments():
    for path in Path(rdrop.bench.__file__).parent.glob("*.py"):
        assert "experiments" not in path.read_text(encoding="utf-8"), path.name

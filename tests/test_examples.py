"""The examples run as they stand."""

import re
import runpy
from pathlib import Path

import jupytext
import matplotlib
import nbformat

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_raw_loop_learns_with_and_without_rdrop(capsys):
    runpy.run_path(str(EXAMPLES / "raw_loop.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "R-Drop can act on Sequential" in output
    scores = [float(score) for score in re.findall(r"0\.\d{3}(?=,|$)", output, re.MULTILINE)]
    assert len(scores) == 4
    assert min(scores) > 0.8


def test_the_quickstart_goes_from_a_table_of_texts_to_the_picture(tmp_path, monkeypatch, capsys):
    text = (EXAMPLES / "quickstart.py").read_text(encoding="utf-8")
    setting = "SEEDS, UPDATES = 5, 500"
    assert setting in text
    (tmp_path / "quickstart.py").write_text(text.replace(setting, "SEEDS, UPDATES = 2, 4"), encoding="utf-8")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    matplotlib.use("Agg")
    names = runpy.run_path(str(tmp_path / "quickstart.py"))
    assert len(names["comparison"].seeds) == 2
    assert "R-Drop (alpha 1) minus baseline: accuracy on test" in names["axes"].get_title(loc="left")
    matplotlib.pyplot.close(names["figure"])
    assert names["comparison"].verdict() in capsys.readouterr().out
    assert (names["folder"] / "runs" / "report.html").is_file()


def test_the_notebook_has_the_cells_of_its_script_and_shows_the_picture():
    script = jupytext.read(EXAMPLES / "quickstart.py")
    notebook = nbformat.read(EXAMPLES / "quickstart.ipynb", as_version=4)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == [
        (cell.cell_type, cell.source) for cell in script.cells
    ], "run: make notebook"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert "error" not in {output.output_type for output in outputs}
    assert any("image/png" in output.get("data", {}) for output in outputs)

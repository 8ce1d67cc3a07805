"""The page of published and measured figures, and `rdrop list`: both from the catalogue and the finished runs."""

import base64
import hashlib
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from run_folders import write_run, write_three_arms
from test_report import Page

from rdrop.experiments import catalogue, results_page
from rdrop.experiments.compare import comparisons
from rdrop.experiments.published import Published
from rdrop.experiments.results import find_runs

PUBLISHED = {
    "digits": (
        Published("Digits", "accuracy", "ViT", 80.0, 81.5, "Somebody 2021, table 3"),
        Published("Digits", "error", "ViT", None, 18.5, "Somebody 2021", recalled=True, higher_is_better=False),
    )
}


@pytest.fixture(autouse=True)
def _published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "PUBLISHED", PUBLISHED)
    monkeypatch.setattr(catalogue, "PUBLISHED", PUBLISHED)


def rows(runs: Path) -> list[tuple[str, ...]]:
    found = results_page.rows_of_task("digits", comparisons(find_runs(runs)))
    return [(row.dataset, row.metric, row.value, row.method, row.source) for row in found]


def test_published_rows_stand_beside_ours(tmp_path: Path) -> None:
    write_three_arms(tmp_path)
    assert rows(tmp_path) == [
        ("Digits", "accuracy", "80", "baseline", "published: Somebody 2021, table 3"),
        ("Digits", "accuracy", "81.5", "R-Drop", "published: Somebody 2021, table 3"),
        ("Digits", "error (lower is better)", "18.5", "R-Drop", "published: Somebody 2021, as recalled"),
        ("Digits", "accuracy %", "73.8 ± 1.0", "baseline", "ours: digits, 5 seeds"),
        ("Digits", "accuracy %", "77.4 ± 0.6", "R-Drop (alpha 1)", "ours: digits, 5 seeds"),
        ("Digits", "accuracy %", "74.1 ± 0.5", "baseline, twice the batch", "ours: digits, 5 seeds"),
    ]


def test_each_of_ours_links_to_its_comparison_in_the_report(tmp_path: Path) -> None:
    from rdrop.experiments.report import write_report

    write_run(tmp_path, 0.5, name="another", seed=1)
    write_three_arms(tmp_path)
    page, report = (Page(write(tmp_path).read_text()) for write in (results_page.write_results, write_report))
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links == {"report.html#c2"}
    [section] = [attributes for tag, attributes in report.elements if attributes.get("id") == "c2"]
    assert section["aria-labelledby"] == "c2-title"
    assert "digits" in report.visible[report.visible.index("another") :]


def test_the_page_runs_its_own_script_and_loads_nothing(tmp_path: Path) -> None:
    write_three_arms(tmp_path)
    text = results_page.write_results(tmp_path).read_text()
    [script] = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src &#x27;sha256-{digest}&#x27;" in text
    assert not re.findall(r"\b(?:src|href)=\"(?!report\.html#)[^\"]*", text)
    assert text == results_page.write_results(tmp_path).read_text()


def test_a_figure_sorts_by_its_value(tmp_path: Path) -> None:
    write_three_arms(tmp_path)
    page = Page(results_page.write_results(tmp_path).read_text())
    keys = [attributes["data-sort"] for tag, attributes in page.elements if "data-sort" in attributes]
    assert keys == ["80", "81.5", "18.5", "73.78", "77.4", "74.14"]


def test_without_any_run_the_published_rows_are_there(tmp_path: Path) -> None:
    assert len(rows(tmp_path)) == 3


def test_the_list_shows_what_is_published_and_our_own_mean(tmp_path: Path) -> None:
    write_three_arms(tmp_path)
    console = Console(width=100, record=True, file=StringIO())
    console.print(catalogue.catalogue(tmp_path))
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "digits ViT accuracy 80 → 81.5 73.8 → 77.4" in lines
    assert "error → 18.5 *" in lines


def test_the_list_needs_no_runs(tmp_path: Path) -> None:
    console = Console(width=100, record=True, file=StringIO())
    console.print(catalogue.catalogue(tmp_path / "none"))
    assert "digits" in console.export_text()

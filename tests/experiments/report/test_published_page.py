"""The page of published and measured figures, from the catalog and the finished runs."""

import base64
import hashlib
import html
import re
from pathlib import Path

import pytest
from tests.experiments.report.test_page import Page
from tests.experiments.run_folders import write_run, write_three_arms

from rdrop.experiments import recipes
from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.recipe.published import Published
from rdrop.experiments.report import published_page as results_page
from rdrop.experiments.run_folder import find_runs

PUBLISHED = {
    "digits-vit": (
        Published("Digits", "accuracy", "ViT", 80.0, 81.5, "Somebody 2021, table 3"),
        Published("Digits", "error", "ViT", None, 18.5, "Somebody 2021", higher_is_better=False),
    )
}


@pytest.fixture(autouse=True)
def _published(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "PUBLISHED", PUBLISHED)


def rows(runs: Path) -> list[tuple[str, ...]]:
    found = results_page.rows_of_task("digits", comparisons(find_runs(runs)))
    return [(row.dataset, row.metric, row.value, row.method, row.source) for row in found]


def test_published_rows_stand_beside_ours(tmp_path: Path) -> None:
    write_three_arms(tmp_path)
    assert rows(tmp_path) == [
        ("Digits", "accuracy", "80", "baseline", "published: Somebody 2021, table 3"),
        ("Digits", "accuracy", "81.5", "R-Drop", "published: Somebody 2021, table 3"),
        ("Digits", "error (lower is better)", "18.5", "R-Drop", "published: Somebody 2021"),
        ("Digits", "accuracy %", "73.8 ± 1.0", "baseline", "ours: digits-vit, 5 seeds"),
        ("Digits", "accuracy %", "77.4 ± 0.6", "R-Drop (alpha 1)", "ours: digits-vit, 5 seeds"),
        ("Digits", "accuracy %", "74.1 ± 0.5", "baseline, twice the batch", "ours: digits-vit, 5 seeds"),
    ]


def test_each_of_ours_links_to_its_comparison_in_the_report(tmp_path: Path) -> None:
    from rdrop.experiments.report.page import write_report

    write_run(tmp_path, 0.5, name="another", seed=1)
    write_three_arms(tmp_path)
    page, report = (Page(write(tmp_path).read_text()) for write in (results_page.write_results, write_report))
    links = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert links == {"report.html#c1", "report.html#c2"}
    assert '<a href="report.html#c2">ours: digits-vit, 5 seeds</a>' in results_page.write_results(tmp_path).read_text()
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


def test_runs_of_another_name_stand_with_their_task(tmp_path: Path) -> None:
    write_run(tmp_path, 0.5, name="mine")
    write_run(tmp_path, 0.6, name="digits-tiny")
    assert [(row[0], row[4]) for row in rows(tmp_path)[3:]] == [
        ("Digits", "ours: digits-vit-tiny, 1 seed"),
        ("mine", "ours: mine, 1 seed"),
    ]


def test_runs_of_a_task_that_the_catalog_lacks_have_a_table_too(tmp_path: Path) -> None:
    write_run(tmp_path, 0.5, name="mine", task="speech <b>")
    page = Page(results_page.write_results(tmp_path).read_text())
    assert "Speech <b>" in page.visible
    assert "ours: mine, 1 seed" in page.visible


def test_every_metric_of_the_test_split_has_a_row_and_the_loss_has_none(tmp_path: Path) -> None:
    scores = {"perplexity": 9.0, "bleu": 30.0, "ece": 0.07, "loss": 1.0}
    write_run(tmp_path, 9.0, metric="perplexity", test=scores)
    assert [row[1:3] for row in rows(tmp_path)[3:]] == [
        ("perplexity (lower is better)", "9.00"),
        ("BLEU", "30.00"),
        ("ECE % (lower is better)", "7.0"),
    ]


def test_a_baseline_of_several_methods_stands_once(monkeypatch: pytest.MonkeyPatch) -> None:
    both = tuple(Published("Digits", "accuracy", "ViT", 80.0, v, "A 2021", method=m) for v, m in ((81, "A"), (82, "B")))
    monkeypatch.setattr(results_page, "PUBLISHED", {"digits-vit": both})
    assert [row.value for row in results_page.rows_of_task("digits", [])] == ["80", "81", "82"]


def test_two_files_under_one_recipe_are_told_apart(tmp_path: Path) -> None:
    for file in ("reviews.csv", "mails.csv"):
        write_run(tmp_path, 0.5, data={"train": f"texts/{file}"})
    assert [(row[0], row[4]) for row in rows(tmp_path)[3:]] == [
        (file, f"ours: digits-vit (data.train = texts/{file}), 1 seed") for file in ("mails.csv", "reviews.csv")
    ]


# ----------------------------------------------------------------------------------------- with the real catalog


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "PUBLISHED", recipes.PUBLISHED)


def table_rows(page: Path) -> list[list[str]]:
    """The cells of every row of every table."""
    found = re.findall(r"<tr class=.*?</tr>", page.read_text(), re.DOTALL)
    return [[html.unescape(re.sub("<.*?>", "", cell)) for cell in re.split(r"</t[dh]>", row)[:-1]] for row in found]


@pytest.mark.usefixtures("real")
def test_the_headline_results_of_the_paper_are_there_and_marked_as_published(tmp_path: Path) -> None:
    headlines = [row for row in table_rows(results_page.write_results(tmp_path)) if "headline" in row[-1]]
    assert [(row[0], row[2], row[3], row[4], row[5]) for row in headlines] == [
        ("IWSLT14 De-En", "BLEU", "37.25", "Transformer", "R-Drop"),
        ("IWSLT14 De-En", "BLEU", "37.9", "Transformer", "R-Drop + Cutoff"),
        ("WMT14 En-De", "BLEU", "30.91", "Transformer", "R-Drop"),
        ("WMT14 En-Fr", "BLEU", "43.95", "Transformer", "R-Drop"),
        ("CNN/DailyMail", "ROUGE-1", "44.51", "BART", "R-Drop"),
        ("CNN/DailyMail", "ROUGE-2", "21.58", "BART", "R-Drop"),
        ("CNN/DailyMail", "ROUGE-L", "41.24", "BART", "R-Drop"),
        ("CIFAR-100", "accuracy", "93.29", "ViT-B/16", "R-Drop"),
    ]
    assert all(row[-1].startswith("published: Liang et al. 2021") for row in headlines)


@pytest.mark.usefixtures("real")
def test_published_rows_name_the_split_and_ours_are_of_test(tmp_path: Path) -> None:
    for name, task in (("wikitext-103", "language-modeling"), ("glue-rte", "text-classification")):
        write_run(tmp_path, 20.0, name=name, task=task)
    found = table_rows(results_page.write_results(tmp_path))
    splits = [(row[0], row[1], row[-1].split(":")[0]) for row in found if row[0] in ("WikiText-103", "RTE")]
    assert set(splits) == {
        ("RTE", "dev", "published"),
        ("RTE", "test", "ours"),
        ("WikiText-103", "valid", "published"),
        ("WikiText-103", "test", "published"),
        ("WikiText-103", "test", "ours"),
    }
    assert not any(re.search(r"\b(valid|test|dev)\b", row[0]) for row in found)

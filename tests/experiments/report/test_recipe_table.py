"""`rdrop list` in a terminal: nothing is cut off, splits are named, and ours stand beside what is published."""

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from tests.experiments.run_folders import write_run, write_three_arms

from rdrop.experiments.recipes import DATASETS, PUBLISHED, RECIPES, dataset_of
from rdrop.experiments.report.recipe_table import catalog


def listed(runs: Path, width: int) -> list[str]:
    console = Console(width=width, record=True, file=StringIO())
    console.print(catalog(runs, width))
    return console.export_text().splitlines()


def entries(lines: list[str]) -> dict[str, list[str]]:
    """By the name of the recipe its further cells, whose lines are joined again."""
    starts = [match.start() for match in re.finditer(r"\S+", lines[0])]
    found: list[list[str]] = []
    for line in lines[2:-2]:
        cells = [line[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)]
        if cells[0] and cells[1]:  # a task's own line has no data set
            found.append(cells)
        elif any(cells[1:]) or (found and found[-1][0].endswith("-")):
            found[-1] = [_joined(*parts) for parts in zip(found[-1], cells, strict=True)]
    return {name: cells for name, *cells in found}


def _joined(start: str, rest: str) -> str:
    return start + rest if start.endswith("-") else f"{start} {rest}".strip()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("with_runs", [False, True])
def test_every_recipe_has_all_its_columns(width: int, with_runs: bool, tmp_path: Path) -> None:
    if with_runs:
        write_three_arms(tmp_path)
        for alpha in (0.0, 1.0):
            scores = {"perplexity": 105.32 - alpha, "loss": 1.0}
            write_run(
                tmp_path, 105.32, name="wikitext-103", task="language-modeling", alpha=alpha,
                metric="perplexity", test=scores, valid=scores,
            )  # fmt: skip
    lines = listed(tmp_path, width)
    assert max(map(len, lines)) <= width
    assert "\N{HORIZONTAL ELLIPSIS}" not in "\n".join(lines)
    found = entries(lines)
    assert list(found) == list(RECIPES)
    for name, (dataset, model, published, ours) in found.items():
        assert dataset == DATASETS.get(name, "your own")
        assert model
        for row in PUBLISHED.get(name, ()):
            assert row.metric in published
            for value in (row.baseline, row.rdrop):
                assert value is None or f"{value:g}" in published
        assert bool(ours) == (with_runs and name in ("digits-vit", "wikitext-103"))
    assert found["glue-rte-minilm"][:2] == ["RTE", "all-MiniLM-L6-v2"]
    assert found["aeslc"][:2] == ["AESLC", "from scratch"]
    assert found["glue-mnli-roberta-large"][2] == "dev accuracy 90.2 \u2192 90.9"
    assert found["wikitext-103"][2] == "valid perplexity 25.76 \u2192 23.97 perplexity 26.62 \u2192 24.94"
    assert found["wmt14-en-de"][2] == "BLEU 29.12 \u2192 30.91"
    if with_runs:
        assert found["digits-vit"][3] == "accuracy 73.8 \u2192 77.4"
        assert found["wikitext-103"][3] == "perplexity 105.32 \u2192 104.32"


def test_two_comparisons_of_one_recipe_have_a_line_each_and_are_told_apart(tmp_path: Path) -> None:
    for shift, score in ((0, 0.5), (1, 0.6)):
        write_run(tmp_path, score, data={"shift": shift})
    expected = "accuracy 50.0 \u2192 \u2014 (data.shift = 0) accuracy 60.0 \u2192 \u2014 (data.shift = 1)"
    assert entries(listed(tmp_path, 120))["digits-vit"][3] == expected


def test_runs_on_other_data_do_not_stand_beside_the_published_figures(tmp_path: Path) -> None:
    write_run(tmp_path, 0.5, name="glue-rte", task="text-classification", data={"train": "mine.csv"})
    write_run(tmp_path, 0.6, name="text-classification", task="text-classification", data={"train": "mine.csv"})
    found = entries(listed(tmp_path, 120))
    assert found["glue-rte"][3] == ""
    assert found["text-classification"][3] == "accuracy 60.0 \u2192 \u2014"


@pytest.mark.parametrize(
    ("recipe", "dataset"),
    [
        ({"name": "glue-rte", "data": {"folder": "data/rte"}}, "RTE"),
        ({"name": "digits-vit-tiny", "data": {"shift": 1}}, "Digits"),
        ({"name": "glue-rte-tiny", "data": {"tiny": True}}, "synthetic examples"),
        ({"name": "glue-sst2", "data": {"folder": "glue", "labels": 100}}, "SST-2 (labels=100)"),
        ({"name": "cifar-100-vit-b16", "data": {"hub": "uoft-cs/cifar10"}}, "CIFAR-100 (hub=uoft-cs/cifar10)"),
        ({"name": "multi30k-en-de", "data": {"test_name": "test_2017"}}, "Multi30k En-De (test_name=test_2017)"),
        ({"name": "glue-rte", "data": {"train": "texts/mine.csv"}}, "mine.csv"),
        ({"name": "summarization", "data": {"train": None, "folder": "data/news/"}}, "news"),
        ({"name": "text-classification", "data": {"hub": "stanfordnlp/imdb"}}, "imdb"),
        ({"name": "mine", "data": {}}, "mine"),
        ({"name": "mine"}, "mine"),
    ],
)
def test_a_run_names_what_it_learned_from(recipe: dict[str, object], dataset: str) -> None:
    assert dataset_of(recipe) == dataset

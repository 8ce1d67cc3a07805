"""The README and the pages keep their promises: Python blocks run, commands and files exist."""

import ast
import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from benchmarks import experiments, gains
from torch import nn

import rdrop
from rdrop.experiments import recipes
from rdrop.experiments.comparison.looks import read_looks
from rdrop.experiments.comparison.paired import paired_difference
from rdrop.experiments.comparison.statistics import holm
from rdrop.experiments.comparison.wording import NumberStyle, listed, p_words
from rdrop.experiments.recipe.method import Method
from rdrop.integrations import transformers

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


def blocks(page: Path, language: str) -> list[str]:
    """Blocks marked as a file, or as part of one, are for a test of that page."""
    found = re.findall(
        rf"(<!-- (?:file|append).* -->\n)?^```{language}\n(.*?)^```",
        page.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    return [block for mark, block in found if not mark]


class Classifier(nn.Module):
    """The reader's own model: 10 features, 3 classes, called with a tensor or, by the Trainer, with keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def what_the_reader_has() -> dict[str, object]:
    """The names that blocks take for granted."""
    x = torch.randn(4, 10)
    return {"model": Classifier(), "x": x, "batch": x, "labels": torch.tensor([0, 1, 2, 0])}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = what_the_reader_has()
    for block in blocks(page, "python"):
        if "RDropTrainer" in block and "model = " not in block:
            names |= trainer_names(tmp_path)
        exec(compile(block, page.name, "exec"), names)


@pytest.mark.parametrize(
    ("page", "start", "end"),
    [
        ("report.md", "the keys\nof the method", "`batch_size`"),
        ("architecture.md", "| the method, one section |", "|\n"),
    ],
)
def test_a_page_that_lists_the_keys_of_the_method_has_all(page, start, end):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8").partition(start)[2].partition(end)[0]
    listed = set(re.findall(r"`(\w+)`", text))
    assert listed == set(Method.model_fields)


def trainer_names(folder: Path) -> dict[str, object]:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, num_labels=2
    )
    rows = [{"input_ids": [2 + i % 20] * 5, "attention_mask": [1] * 5, "labels": i % 2} for i in range(8)]
    args = transformers.TrainingArguments(
        str(folder / "out"), max_steps=1, use_cpu=True, report_to=[], save_strategy="no"
    )
    model = transformers.BertForSequenceClassification(config)
    return {"model": model, "args": args, "train_dataset": rows, "train": rows, "eval_dataset": rows}


def test_make_targets_named_anywhere_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        word
        for page in PAGES
        for line in re.findall(r"(?:^ *|`)make ([a-z -]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
        for word in shlex.split(line)[:1]
    }
    assert "test" in named
    assert named - targets == set()


def test_links_and_files_named_in_pages_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


def test_every_page_stands_in_the_sidebar_of_the_site_once():
    configuration = runpy.run_path(str(ROOT / "docs/conf.py"))
    listed = [page for pages in configuration["PAGES"].values() for page in pages] + [configuration["root_doc"]]
    files = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs").rglob("*.rst")]
    assert sorted(listed) == sorted(str(path.relative_to(ROOT).with_suffix("")) for path in files)


def test_every_public_name_stands_in_the_reference():
    reference = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.rst"))
    described = {name.rpartition(".")[2] for name in re.findall(r"^\.\. auto\w+:: ([\w.]+)", reference, re.MULTILINE)}
    for package in (rdrop, transformers):
        public = set(package.__all__) - {"__version__"}
        assert "RDropTrainer" in public or "rdrop_loss" in public
        assert public - described == set()


def test_no_docstring_opens_without_a_subject():
    """Its first line is a verb and its object, "Whether ..." or "Returns ...", or names the thing."""
    openings = re.compile(r"(What|Of|As|By|Where|In|How|That|Not|Its|To|From|With|For|On|At)\b")
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first, *_ = (ast.get_docstring(node) or "-").splitlines()
                if openings.match(first):
                    found.append(f"{path.relative_to(ROOT)}: {first}")
    assert found == []


def test_file_map_of_the_readme_is_the_tree():
    """Every room (a module, a package, a package of the experiments) stands in the map, and every one there is real."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").split("## File map", 1)[1].split("\n## ", 1)[0]
    named = set(re.findall(r"^\|(.*?)\|", text, re.MULTILINE)) - {" room ", "---"}
    rooms = {room for cell in named for room in re.findall(r"`([\w./]+)`", cell)}
    package = ROOT / "src/rdrop"
    modules = {path.name for path in package.glob("*.py") if not path.name.startswith("__")}
    packages = [
        path.parent for pattern in ("*/__init__.py", "experiments/*/__init__.py") for path in package.glob(pattern)
    ]
    assert rooms == modules | {f"{path.relative_to(package)}/" for path in packages}


def test_the_readme_has_the_papers_headline_results():
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    headlines = [row for rows in recipes.PUBLISHED.values() for row in rows if row.headline]
    assert {37.25, 37.90, 30.91, 43.95, 44.51, 21.58, 41.24} <= {row.rdrop for row in headlines}
    for row in headlines:
        assert row.baseline is not None
        scores = f"{row.rdrop:.2f} | {row.baseline:.2f}"
        assert f"| {row.dataset} | {row.metric} | {row.model} + {row.method} | {scores} |" in table


def test_nothing_names_a_path_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/\w")
    places = [path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    for path in [*PAGES, *places, *(ROOT / "examples").iterdir(), ROOT / "docs/conf.py", ROOT / "Makefile"]:
        found = pattern.search(path.read_text(encoding="utf-8"))
        assert found is None, f"{path.name}: {found}"


@pytest.mark.parametrize("page", experiments.PAGES, ids=lambda page: page.name)
def test_the_results_in_the_pages_are_those_of_the_records(page):
    text = page.read_text(encoding="utf-8")
    assert "digits" in [name for _, name, _ in experiments.PART.findall(text)]
    made = experiments.rewritten(text, experiments.recorded_comparisons())
    assert made == text, "run: python benchmarks/experiments.py pages"


def test_nobody_has_looked_at_a_verdict_that_no_page_has():
    """Runs of a comparison that is not complete wait in the records for the seeds that were planned."""
    seen = frozenset().union(*read_looks(experiments.RESULTS))
    for name, comparison in experiments.recorded_comparisons().items():
        assert name in experiments.shown() or not seen & comparison.look()


def test_the_plot_of_gains_is_that_of_the_records():
    svgs = gains.PLOT.read_text(encoding="utf-8"), gains.draw(experiments.complete_comparisons())
    drawn = [re.findall(r"<text [^>]*>([^<]*)</text>", svg) for svg in svgs]
    assert drawn[0] == drawn[1] != []


def test_gains_are_sorted_by_pairs_and_have_the_mean_in_their_interval():
    found = gains.gains(experiments.complete_comparisons())
    assert list(found) == ["baseline", "baseline, twice the batch", "baseline, twice the updates"]
    for points in found.values():
        assert [point.pairs for point in points] == sorted({point.pairs for point in points})
        assert all(point.low < point.mean < point.high for point in points)


def test_what_the_readme_says_of_the_demo_on_another_processor_is_in_its_record():
    record = json.loads((experiments.RESULTS / "digits-again.json").read_text(encoding="utf-8"))
    *others, own = record["test_accuracy"].values()
    differences = [paired_difference(own, other, True) for other in others]
    corrected = holm([difference.p_value for difference in differences])
    assert [p <= 0.05 and difference.interval[0] > 0 for difference, p in zip(differences, corrected, strict=True)] == [
        *[True] * 4,
        False,
    ]
    style, last = NumberStyle.of("accuracy", differences), differences[-1]
    said = f"{style.difference(last.mean)} ({style.interval(last.interval)}, {p_words(corrected[-1])})"
    assert f"of dropout {said}, which shows nothing" in " ".join((ROOT / "README.md").read_text("utf-8").split())


def test_every_recorded_experiment_stands_in_the_page_of_results_with_its_seeds():
    """Or the page says that it waits, with the seeds that it has, for those that were planned."""
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for name, comparison in experiments.recorded_comparisons().items():
        waits = f"`{name}`" in text and f"those of seeds {listed(comparison.seeds)} are in the" in text
        assert f"<!-- results: {name} -->" in text or waits
        assert len(comparison.seeds) >= (5 if name.startswith("digits") else 3), name
        assert comparison.gaps() == ()

"""Names that want to be markup: the pages have the elements and attributes that they have with plain ones, and no more.

A browser, where there is one, shows that none of it runs.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from tests.experiments.report.test_page import Page
from tests.experiments.run_folders import write_run

from rdrop.experiments.report.page import write_report
from rdrop.experiments.report.published_page import write_results
from rdrop.experiments.run_folder.predictions import Predictions, write_predictions

PLAIN = "plain"
HOSTILE = {
    "a script": "</title></style></script><script>document.title='ran'</script>",
    "an attribute": "\"'><img src=x onerror=\"document.title='ran'\">",
    "an address": "javascript:document.title='ran'",
    "an attribute of the same element": "x\" onmouseover=\"document.title='ran'\" autofocus onfocus='document.title=1'",
    "a comment": "--><!--<svg onload=document.title='ran'>",
    "references": "&lt;script&gt; &#60;script&#62; &quot; &amp",
    "a terminal's": "\x1b[31m\x1b]0;ran\x07 \u202e \u2028 \u6587",
}
FIRST = ("a script", "an attribute")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def runs_named(runs: Path, name: str) -> Path:
    """Two arms whose names, labels, files and notes are all `name`, and a damaged run."""
    folder_name = name.replace("/", "\u2215")
    for alpha in (0.0, 1.0):
        for seed in (0, 1):
            folder = write_run(
                runs / folder_name,
                0.7,
                alpha=alpha,
                seed=seed,
                name=folder_name,
                task=name,
                data={"train": f"{name}.tsv", name: name},
                model={"name": name, name: name},
                metric=name,
                metrics={
                    name: {"name": name, "label": name, "higher_is_better": True, "percent": False, "decimals": 3}
                },
                test={name: 0.7 + 0.1 * alpha + 0.01 * seed, "loss": 1.0},
                valid={name: 0.7},
                finished=name,
                digest=name,
                machine={name: name},
                versions={"rdrop": name, name: name},
                notes={name: name},
            )
            labels = [0, 1] * 10
            guessed = labels if alpha else [1 - labels[0], *labels[1:]]
            rows = [
                {"example": f"{name} {row}", "label": label, "predicted": guess, "confidence": 0.9, "loss": 0.5}
                for row, (label, guess) in enumerate(zip(labels, guessed, strict=True))
            ]
            write_predictions(folder, Predictions("classes", rows, (name, f"{name} 1")))
    damaged = write_run(runs / folder_name, 0.6, name=f"{folder_name} damaged")
    (damaged / "result.json").write_text(json.dumps({"format": name}))
    return runs


def pages_of(runs: Path) -> list[Path]:
    return [write_report(runs), write_results(runs)]


def skeleton(page: Page) -> Counter[tuple[str, tuple[str, ...]]]:
    """Its elements with the names of their attributes."""
    return Counter((tag, tuple(sorted(attributes))) for tag, attributes in page.elements)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[Page]:
    runs = runs_named(tmp_path_factory.mktemp("plain"), PLAIN)
    return [Page(page.read_text(encoding="utf-8")) for page in pages_of(runs)]


@pytest.mark.parametrize(
    "what", [*FIRST, *(pytest.param(what, marks=pytest.mark.long) for what in HOSTILE if what not in FIRST)]
)
def test_no_element_and_no_attribute_comes_from_a_name(what: str, plain: list[Page], tmp_path: Path) -> None:
    for file, expected in zip(pages_of(runs_named(tmp_path, HOSTILE[what])), plain, strict=True):
        page = Page(file.read_text(encoding="utf-8"))
        assert skeleton(page) == skeleton(expected)
        assert " ".join(HOSTILE[what].split()) in page.visible
        for _, attributes in page.elements:
            assert not any(name.startswith("on") for name in attributes)
            assert not str(attributes.get("href", "#")).lower().startswith("javascript:")


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
@pytest.mark.parametrize("what", HOSTILE)
def test_a_browser_runs_nothing_of_it(what: str, plain: list[Page], tmp_path: Path) -> None:
    assert BROWSER is not None
    for file, expected in zip(pages_of(runs_named(tmp_path, HOSTILE[what])), plain, strict=True):
        page = Page(shown_by_the_browser(file, tmp_path))
        title = page.text.partition("<title>")[2].partition("</title>")[0]
        assert title not in ("ran", "1")
        assert page.count("script") == expected.count("script")
        # A browser adds the body of each table, where it is not written.
        assert skeleton(page) - skeleton(expected) <= Counter({("tbody", ()): expected.count("table")})


@pytest.mark.long
@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium")
def test_the_browser_does_run_what_is_not_escaped(tmp_path: Path) -> None:
    for markup in (HOSTILE["a script"], HOSTILE["an attribute"]):
        (tmp_path / "page.html").write_text(f"<title>as it was</title><p>{markup}</p>")
        assert "<title>ran</title>" in shown_by_the_browser(tmp_path / "page.html", tmp_path)


def shown_by_the_browser(page: Path, folder: Path) -> str:
    """The document as it stands once its scripts have had their time."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-extensions", "--virtual-time-budget=2000"]
    profile = f"--user-data-dir={folder / 'profile'}"
    command = [str(BROWSER), *options, profile, "--dump-dom", page.absolute().as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout

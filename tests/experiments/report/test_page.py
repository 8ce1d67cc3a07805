"""The HTML page: complete, self-contained, deterministic, and not to be broken by what stands in the files."""

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote
from xml.etree import ElementTree

import numpy as np
import pytest
from tests.experiments.run_folders import VERSIONS, write_run, write_three_arms

from rdrop.experiments.comparison.comparison import comparisons
from rdrop.experiments.comparison.designs import Design, arm_digest, record_designs
from rdrop.experiments.report import page as page_module
from rdrop.experiments.report.html import Markup, element
from rdrop.experiments.report.page import write_report
from rdrop.experiments.report.plots import Curve, curve_of
from rdrop.experiments.run_folder import ResultsError, RunFolder, StorageError, find_runs
from rdrop.experiments.run_folder.predictions import Predictions, write_predictions

VOID = {"meta", "br"}
# `import rdrop` is the loss and so imports torch; a bare package in its place shows what the report itself needs.
REPORT_ALONE = """
import importlib.util, sys, types
package = types.ModuleType("rdrop")
package.__path__ = importlib.util.find_spec("rdrop").submodule_search_locations
sys.modules["rdrop"] = package
from rdrop.experiments.comparison import terminal_table as compare_table
from rdrop.experiments.report import page as report
"""


class Page(HTMLParser):
    """Reads the page as a browser does; fails on an element closed in the wrong place."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.text = text
        self.elements, self.words, self._open = [], [], []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.words.append(data)

    @property
    def visible(self):
        return " ".join(" ".join(self.words).split())

    def count(self, tag):
        return sum(name == tag for name, _ in self.elements)


def page_of(runs):
    return Page(write_report(runs).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def three_arms(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    write_three_arms(runs)
    write_run(runs, 0.7, unfinished=True, alpha=1.0, seed=5)
    return runs


@pytest.fixture(scope="module")
def page(three_arms):
    return page_of(three_arms)


def test_page_lies_beside_the_runs_unless_told_otherwise(three_arms, tmp_path):
    assert write_report(three_arms) == three_arms / "report.html"
    elsewhere = tmp_path / "new folder" / "page.html"
    assert write_report(three_arms, elsewhere) == elsewhere
    here, there = (Page(path.read_text()) for path in (three_arms / "report.html", elsewhere))
    assert there.visible == here.visible


def test_every_folder_of_a_run_is_a_link_from_wherever_the_page_lies(three_arms, tmp_path):
    folders = {run.path.resolve() for run in find_runs(three_arms) if run.result is not None}
    for out in (three_arms / "report.html", tmp_path / "new folder" / "page.html"):
        page = Page(write_report(three_arms, out).read_text())
        links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
        assert {(out.parent / unquote(link)).resolve() for link in links if not link.startswith("#")} == folders


def test_a_name_that_looks_like_an_address_is_a_folder(tmp_path):
    write_run(tmp_path, 0.7, name="javascript:alert(1)")
    links = [attributes["href"] for tag, attributes in page_of(tmp_path).elements if tag == "a"]
    assert [link.startswith("javascript%3Aalert") for link in links] == [True]


def test_same_runs_give_the_same_bytes_in_another_process(three_arms, tmp_path):
    here = write_report(three_arms, tmp_path / "here.html").read_bytes()
    program = "import pathlib; report.write_report(*map(pathlib.Path, sys.argv[1:]))"
    out = tmp_path / "again.html"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", REPORT_ALONE + program, three_arms, out], check=True, env=environment)
    assert out.read_bytes() == here


def test_page_shows_verdicts_results_cost_settings_versions_and_runs(page):
    for words in (
        "Too few seeds: R-Drop (alpha 1) against the baseline is accuracy +3.6 points (95 % interval +2.5 to +4.7, "
        "p = 0.12), better on 5 of 5 seeds; 7 are the least that can show a difference.",
        "R-Drop (alpha 1) against the baseline with twice the batch is accuracy +3.3 points",
        "With this spread, 7 seeds would show a difference of 3.6 points between R-Drop (alpha 1) and the baseline",
        "p is corrected for 2 comparisons by Holm's method",
        "Test accuracy %",
        "Valid accuracy %",
        "Test loss",
        "73.8 ± 1.0",
        "5/0/0",
        "24.2",
        "\N{MULTIPLICATION SIGN}1.99",
        "data.train_labels",
        "2.13.0+cpu",
        "205,834",
        "15 finished runs · 1 comparison · 1 run unfinished or damaged · last finished 2026-11-22 20:00:04 UTC",
        "unfinished, last row at step 400",
    ):
        assert words in page.visible


def test_every_run_is_listed_with_its_digest(three_arms, page):
    for record in find_runs(three_arms):
        assert str(record.path.relative_to(three_arms)) in page.visible


def test_page_loads_nothing_and_runs_nothing(three_arms, page):
    assert page.count("script") == page.count("link") == page.count("img") == 0
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    addresses = set(re.findall(r'(?:https?:)?//[^\s"\'<>)]+', page.text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    runs = {f"digits/{record.path.name}/" for record in find_runs(three_arms)}
    assert all(a["href"].startswith("#") or a["href"] in runs for _, a in page.elements if "href" in a)


def test_no_two_elements_share_an_id_and_every_reference_has_its_target(page):
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:url\(|href=")#([^)"]+)', page.text)
    references += re.findall(r'aria-labelledby="([^"]+)"', page.text)
    assert set(references) <= set(ids)


def test_figures_keep_text_as_text_and_take_their_colors_from_the_page(page):
    figures = re.findall(r'<svg viewBox="[^"]*" xmlns.*?</svg>', page.text, flags=re.DOTALL)
    assert len(figures) == 5
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        assert "updates" in "".join(tree.itertext()) or "seed" in "".join(tree.itertext())
        assert set(re.findall(r"#[0-9a-f]{6}\b", figure)) == set()
        assert "var(--rdrop-1)" in figure
        assert set(re.findall(r"font(?:-family)?: ([^;\"]+)", figure)) == {"var(--sans)"}


def test_every_color_variable_is_defined_for_light_dark_and_paper(page):
    used = set(re.findall(r"var\((--[a-z0-9-]+)\)", page.text))
    style = page.text.split("<style>")[1].split("</style>")[0]
    light, dark, paper = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    assert used <= set(re.findall(r"(--[a-z0-9-]+):", light))
    colors = set(re.findall(r"(--[a-z0-9-]+): #", light))
    assert colors == set(re.findall(r"(--[a-z0-9-]+): #", dark)) == set(re.findall(r"(--[a-z0-9-]+): #", paper))


def test_figures_and_tables_have_text_alternatives(page):
    figures = [a["aria-label"] for t, a in page.elements if a.get("role") == "img"]
    assert len(figures) == page.count("figure") == page.count("figcaption") == 5
    assert "R-Drop (alpha 1): mean +3.6 points, 95 % interval +2.5 to +4.7; seed 0 +4.0," in figures[0].replace(
        "\N{NO-BREAK SPACE}", " "
    )
    assert all("scope" in attributes for tag, attributes in page.elements if tag == "th")


def test_hostile_text_in_the_files_stays_text(tmp_path):
    evil = "<script>alert(1)</script><b>\"'&--></style>$x_{"
    for alpha in (0.0, 1.0):
        for seed in (0, 1):
            write_run(
                tmp_path / str(alpha),
                0.7,
                alpha=alpha,
                seed=seed,
                task=evil,
                data={evil: evil},
                metric=evil,
                metrics={
                    evil: {"name": evil, "label": evil, "higher_is_better": True, "percent": False, "decimals": 3}
                },
                test={evil: 0.7 + 0.1 * alpha + 0.01 * seed, "loss": 1.0},
                valid={evil: 0.7},
                finished=evil,
                digest=evil,
                machine={evil: evil},
                versions={"rdrop": evil},
                notes={evil: evil},
            )
    damaged = write_run(tmp_path, 0.7)
    (damaged / "result.json").write_text(json.dumps({"format": evil}))
    metrics = (tmp_path / "1.0").rglob("metrics.jsonl")
    for file in metrics:
        row = {"kind": "valid", "step": 1, evil: 0.5, "loss": 1.0}
        file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"step": 2}) + "\n")
    page = page_of(tmp_path)
    assert page.count("script") == 0
    assert page.visible.count(evil) > 10


def test_a_hostile_recipe_name_cannot_become_markup(tmp_path):
    write_run(tmp_path, 0.7, name="<img src=x onerror=alert(1)>")
    page = page_of(tmp_path)
    assert page.count("img") == 0
    assert "<img src=x onerror=alert(1)>" in page.visible


def with_predictions(folder, labels, predicted):
    """Puts predictions into the folder of a run, and their accuracy into its result."""
    classes = ("0", "<b>1</b>")
    rows = [
        {"example": f"image <i>{n}</i>", "label": label, "predicted": own, "confidence": 0.9, "loss": 0.5}
        for n, (label, own) in enumerate(zip(labels, predicted, strict=True))
    ]
    write_predictions(folder, Predictions("classes", rows, classes))
    result = json.loads((folder / "result.json").read_text())
    result["test"]["accuracy"] = sum(map(int.__eq__, labels, predicted)) / len(labels)
    (folder / "result.json").write_text(json.dumps(result))


def write_runs_with_predictions(runs, seeds):
    """Two arms that differ on image 0, where R-Drop is right, and on image 5 of seed 0, where the baseline is."""
    labels = [0, 1] * 20
    for seed in range(seeds):
        wrong = [1 - label for label in labels[:4]] + labels[4:]
        with_predictions(write_run(runs, 0.9, seed=seed), labels, wrong)
        better = [labels[0], *wrong[1:]]
        if seed == 0:
            better[5] = 0
        with_predictions(write_run(runs, 0.9, seed=seed, alpha=1.0), labels, better)


def test_the_examples_that_changed_are_shown_and_escaped(tmp_path):
    write_runs_with_predictions(tmp_path, 3)
    page = page_of(tmp_path)
    changed = page.visible.split("Which test examples changed")[1].split("Cost")[0]
    assert "R-Drop (alpha 1) gains most image <i>0</i> 0 <b>1</b> (3) 0 (3) 0 1 " in changed
    assert "R-Drop (alpha 1) loses most image <i>5</i> <b>1</b> <b>1</b> (3) <b>1</b> (2), 0 (1) 1 0.667" in changed
    assert {"i"} & {tag for tag, _ in page.elements} == set()


def test_the_examples_of_a_regression_have_their_errors(tmp_path):
    for alpha, predicted in ((0.0, [1.0, 2.0, 5.0, 4.0]), (1.0, [1.0, 2.5, 3.0, 4.0])):
        rows = [{"example": f"pair {n}", "label": n + 1.0, "predicted": own} for n, own in enumerate(predicted)]
        scores = {"pearson": float(np.corrcoef(predicted, [1, 2, 3, 4])[0, 1])}
        run = write_run(tmp_path, 0.9, alpha=alpha, metric="pearson", test=scores, valid=scores)
        write_predictions(run, Predictions("numbers", rows))
    changed = page_of(tmp_path).visible.split("Which test examples changed")[1].split("Cost")[0]
    assert "baseline's error its error" in changed
    assert "gains most pair 2 3 5 3 2 0 " in changed
    assert "loses most pair 1 2 2 2.5 0 0.5" in changed


def test_the_page_says_whether_the_models_differ_on_this_test_set(tmp_path):
    write_runs_with_predictions(tmp_path / "one", 1)
    assert "On this test set the two models of seed 0, R-Drop (alpha 1) and the baseline, do not differ" in (
        page_of(tmp_path / "one").visible
    )
    write_runs_with_predictions(tmp_path / "three", 3)
    page = page_of(tmp_path / "three").visible
    assert "the models of R-Drop (alpha 1) and the baseline differ on 0 of 3 seeds" in page
    assert "paired bootstrap over the 40 test examples" in page


def test_churn_stands_beside_the_scores(tmp_path):
    write_runs_with_predictions(tmp_path, 2)
    # Seeds of the baseline agree; those of R-Drop differ on image 5 of 40.
    assert "Test churn % baseline 0.0 R-Drop (alpha 1) 2.5" in page_of(tmp_path).visible


def test_without_predictions_nothing_is_said_of_examples(page):
    assert "Which test examples changed" not in page.visible
    assert "Test churn" not in page.visible
    assert "On this test set" not in page.visible


def test_damaged_predictions_are_named_and_the_page_is_made(tmp_path):
    write_runs_with_predictions(tmp_path, 2)
    next(tmp_path.rglob("predictions.jsonl.gz")).write_bytes(b"nothing")
    assert "Predictions left out: " in page_of(tmp_path).visible


def test_the_page_says_what_difference_more_seeds_would_show(page):
    seeds = page.visible.split("How many seeds would show it")[1].split("Figures")[0]
    assert "seeds 5 10 20 40" in seeds
    assert "R-Drop (alpha 1) against the baseline — 1.0 0.7 0.4" in seeds


def test_from_eight_seeds_on_the_table_has_the_interquartile_mean(page, tmp_path):
    assert "mean ± sd difference" in page.visible
    for seed in range(8):
        for alpha in (0.0, 1.0):
            write_run(tmp_path, 0.7 + 0.01 * seed + 0.02 * alpha, alpha=alpha, seed=seed)
    assert "mean ± sd interquartile mean difference" in page_of(tmp_path).visible


def test_a_run_that_did_not_learn_is_marked_in_the_tables(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, 0.7, seed=seed, constant={"accuracy": 0.1})
        write_run(tmp_path, 0.7 - 0.6 * seed, seed=seed, alpha=1.0, constant={"accuracy": 0.1})
    visible = page_of(tmp_path).visible
    assert "1 of 2 R-Drop (alpha 1) runs did not learn (seed 1)" in visible
    assert "R-Drop (alpha 1) † 40.0 ± 42.4" in visible
    assert "1 (did not learn) 10.0" in visible


def test_a_run_that_diverged_is_marked_in_the_tables(tmp_path):
    write_run(tmp_path, 0.7, constant={"loss": 2.3})
    write_run(tmp_path, 0.6, alpha=1.0, constant={"loss": 2.3}, valid={"accuracy": 0.6, "loss": 7262.0})
    visible = page_of(tmp_path).visible
    assert "1 of 1 R-Drop (alpha 1) run diverged (seed 0): the valid loss ended at 7,262" in visible
    assert "R-Drop (alpha 1) † 60.0" in visible
    assert "0 (diverged) 60.0" in visible


def write_seeds(runs, seeds):
    for seed in seeds:
        write_run(runs, 0.7 + 0.001 * seed, seed=seed)
        write_run(runs, 0.73 + 0.003 * (seed % 3) if seed else 0.7, alpha=1.0, seed=seed)


def test_a_verdict_that_was_shown_is_remembered_and_corrected_for_when_seeds_are_added(tmp_path):
    write_seeds(tmp_path, range(6))
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first  # to look twice at the same is one look
    write_seeds(tmp_path, range(6, 9))
    page = page_of(tmp_path).visible
    assert "Seeds were added after the verdict on 6 seeds had been seen" in page
    assert "p = 0.016, better on 8 of 9 seeds" in page  # twice 2 / 2**8: the first is a tie
    (tmp_path / "looks.jsonl").unlink()
    assert "p = 0.0078, better on 8 of 9 seeds" in page_of(tmp_path).visible


def test_a_folder_that_cannot_remember_a_look_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise StorageError("the disk is full")

    write_seeds(tmp_path, range(6))
    monkeypatch.setattr(page_module, "record_looks", full)
    assert "it does not remember that these verdicts were seen" in page_of(tmp_path).visible


def test_one_seed_is_shown_without_an_interval(tmp_path):
    write_run(tmp_path, 0.7)
    write_run(tmp_path, 0.8, alpha=1.0)
    assert "One seed shows nothing" in page_of(tmp_path).visible


def test_baseline_alone_has_curves_but_no_difference(tmp_path):
    write_run(tmp_path, 0.7)
    page = page_of(tmp_path)
    assert "only the baseline has finished runs" in page.visible
    assert page.count("figure") == 3
    assert "Difference on each seed" not in page.visible


def test_rdrop_without_a_baseline_is_shown(tmp_path):
    write_run(tmp_path, 0.7, alpha=1.0)
    assert "no run of the baseline (alpha 0) has finished" in page_of(tmp_path).visible


def test_runs_without_metrics_have_tables_but_no_curves(tmp_path):
    (write_run(tmp_path, 0.7) / "metrics.jsonl").unlink()
    (write_run(tmp_path, 0.8, alpha=1.0) / "metrics.jsonl").write_text("")
    assert page_of(tmp_path).count("figure") == 1


def test_only_unfinished_runs_are_listed(tmp_path):
    write_run(tmp_path, 0.7, unfinished=True)
    page = page_of(tmp_path)
    assert "0 finished runs" in page.visible
    assert "Unfinished and damaged runs" in page.visible


def test_no_run_at_all_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ResultsError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(ResultsError, match="does not exist"):
        write_report(tmp_path / "nowhere")


def test_what_was_not_measured_is_a_dash_and_never_zero(tmp_path):
    write_run(tmp_path, 0.7, cost={"step_milliseconds": None})
    write_run(tmp_path, 0.8, alpha=1.0, cost={})
    page = page_of(tmp_path)
    cost = page.visible.split("Cost")[1].split("Settings")[0]
    assert "baseline — — —" in cost
    assert "R-Drop (alpha 1) — — — — — —" in cost


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"machine": {"device": "cuda"}}, "not all made with the same machine"),
        ({"versions": {"torch": "1.0"}}, "not all made with the same versions"),
        ({"seed": 7}, "Left out of baseline: seed 7 (no finished run)."),
    ],
)
def test_what_weakens_a_comparison_is_said_above_it(tmp_path, changes, warning):
    write_run(tmp_path, 0.7)
    write_run(tmp_path, 0.8, alpha=1.0, **changes)
    assert warning in page_of(tmp_path).visible


def test_versions_that_an_earlier_rdrop_did_not_write_are_no_difference(tmp_path):
    write_run(tmp_path, 0.7)
    write_run(tmp_path, 0.8, alpha=1.0, versions=VERSIONS | {"sacrebleu": "2.6.0"})
    assert "not all made with the same" not in page_of(tmp_path).visible


def test_several_rdrop_arms_carry_the_warning_of_choosing_the_best(tmp_path):
    for alpha in (0.0, 0.5, 1.0):
        write_run(tmp_path, 0.7, alpha=alpha)
    assert "2 R-Drop arms stand against one baseline" in page_of(tmp_path).visible


def test_an_arm_without_a_score_is_no_choice_and_its_runs_are_listed(tmp_path):
    for alpha in (0.0, 1.0):
        write_run(tmp_path, 0.7, alpha=alpha)
    lost = write_run(tmp_path, 0.0, alpha=4.0, unfinished=True)
    RunFolder(lost).write_failure(12, "step 12: loss is nan. Lower alpha (=4).")
    page = page_of(tmp_path)
    assert "arms stand against one baseline" not in page.visible
    assert f"0 (diverged) step 12: loss is nan {lost.relative_to(tmp_path)}" in page.visible


def test_a_repeated_run_is_named(tmp_path):
    old = write_run(tmp_path / "a", 0.7, passes=2)
    write_run(tmp_path / "b", 0.7, passes=3, finished="2027-01-01T00:00:00Z")
    assert f"these do not: {old.name}" in page_of(tmp_path).visible


def test_comparisons_of_one_name_are_told_apart_by_their_settings(tmp_path):
    for labels in (100, 300):
        write_run(tmp_path, 0.7, data={"train_labels": labels})
    page = page_of(tmp_path)
    for title in ("digits-vit (data.train_labels = 100)", "digits-vit (data.train_labels = 300)"):
        assert page.visible.count(title) == 2  # in the contents and above its section


def test_comparisons_of_one_recipe_are_told_apart_by_their_arms(tmp_path):
    arms = {}
    for label, changes in {"plain": {"alpha": 0.0}, "longer": {"alpha": 0.0, "updates": 800}, "R": {}}.items():
        arms[label] = arm_digest(RunFolder(write_run(tmp_path, 0.7, **{"alpha": 1.0, **changes})).recipe())
    record_designs(tmp_path, [Design(arms, "R")])
    write_run(tmp_path, 0.7, alpha=2.0)
    page = page_of(tmp_path)
    for arms_of_one in ("R; longer; plain", "R-Drop (alpha 1); R-Drop (alpha 2); baseline"):
        assert page.visible.count(f"digits-vit (with = {arms_of_one})") == 2  # in the contents and above its section


def test_curves_leave_gaps_where_a_value_is_no_finite_number(tmp_path):
    folder = write_run(tmp_path, 0.7)
    rows = [{"kind": "valid", "step": step, "loss": loss} for step, loss in ((1, 0.5), (2, "NaN"), (3, None), (4, 0.3))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (comparison,) = comparisons(find_runs(tmp_path))
    steps, values = curve_of(comparison.arms[0], Curve("valid", "loss", ""))
    assert steps == [1, 4]
    assert values.tolist() == [[0.5, 0.3]]


@pytest.mark.parametrize(
    ("sign", "title"),
    [("source_use", "Use of the source."), ("prediction_spread", "Spread of the predictions.")],
)
def test_what_tells_whether_a_run_has_begun_is_drawn_where_it_was_measured(tmp_path, sign, title):
    folder = write_run(tmp_path / "with", 0.7)
    rows = [{"kind": "valid", "step": step, "loss": 1.0, sign: 0.1 * step} for step in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert title in page_of(tmp_path / "with").visible
    write_run(tmp_path / "without", 0.7)
    assert title not in page_of(tmp_path / "without").visible


def test_notes_on_the_scores_stand_below_them_once_where_all_runs_agree(tmp_path):
    for seed in (0, 1, 2):
        notes = {"decoded by": "ctranslate2 4" if seed else "transformers 5", "train pairs": "read 30, used 26"}
        write_run(tmp_path, 0.7, seed=seed, notes=notes)
    below = page_of(tmp_path).visible.split("Notes on the scores:")[1].split("Figures")[0]
    assert "decoded by: transformers 5 [baseline, seed 0]" in below
    assert "decoded by: ctranslate2 4 [baseline, seeds 1 and 2]" in below
    assert below.count("read 30, used 26") == 1


def test_without_notes_nothing_is_said_of_them(page):
    assert "Notes on the scores" not in page.visible


def test_a_run_says_whose_weights_were_scored(tmp_path):
    write_run(tmp_path, 0.7, seed=1, best_step=10, averaged_steps=[])
    write_run(tmp_path, 0.7, seed=2, best_step=10, averaged_steps=[15, 20])
    runs = page_of(tmp_path).visible.split("weights of update resumed digest folder")[1]
    assert "1 70.0 71.0 10 0 " in runs
    assert "2 70.0 71.0 15, 20 0 " in runs


def test_many_arms_and_seeds_still_make_a_page(tmp_path):
    for alpha in (0.0, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0):
        for seed in range(3):
            write_run(tmp_path, 0.7 + 0.001 * seed * alpha, alpha=alpha, seed=seed, updates=40)
    assert page_of(tmp_path).visible.count("R-Drop (alpha 10)") > 3


def test_report_imports_no_torch():
    program = 'assert not {"torch", "transformers"} & set(sys.modules)'
    subprocess.run([sys.executable, "-c", REPORT_ALONE + program], check=True)


def test_element_escapes_text_and_keeps_markup():
    inner = element("b", "1 < 2")
    assert element("p", "a & b ", inner, None, class_='x"y', aria_label=None) == (
        '<p class="x&quot;y">a &amp; b <b>1 &lt; 2</b></p>'
    )
    assert isinstance(inner, Markup)

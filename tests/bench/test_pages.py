"""The pages on speed, accuracy and reliability say what the committed records say."""

import re

import pytest
from benchmarks import pages

RECORDS, PARTS = (
    pages.cpu_records() + pages.soft_records() + pages.simcut_records() + pages.sft_records(),
    pages.parts(),
)
OF_BENCH = r"rdrop bench [^/]*( --output build/bench/\w+\.jsonl)"


@pytest.mark.parametrize(("page", "name"), [(page, name) for page, found in PARTS.items() for name in found])
def test_a_part_of_a_page_is_what_the_records_give(page, name):
    text = page.read_text(encoding="utf-8")
    assert f"<!-- {name} -->\n{PARTS[page][name]}\n<!-- /{name} -->" in text, "run: python -m benchmarks.pages"


@pytest.mark.parametrize("page", PARTS, ids=lambda page: page.name)
def test_a_page_has_no_part_that_nothing_writes(page):
    assert set(re.findall(r"<!-- (\w[^>]*) -->", page.read_text(encoding="utf-8"))) == set(PARTS[page])


@pytest.mark.parametrize("name", ["rows.svg", "linear.svg", "steps.svg"])
def test_a_plot_shows_the_ratios_of_the_records(name):
    text = (pages.PLOTS / name).read_text(encoding="utf-8")
    shown = re.findall(r"<text [^>]*>([^<]*)</text>", text)
    drawn = re.findall(r"<text [^>]*>([^<]*)</text>", pages.plots()[name])
    assert shown == drawn, "run: python -m benchmarks.pages"


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r['benchmark']}-{r['form']}-{r['classes']}-{r['dtype']}")
def test_a_committed_record_names_machine_date_versions_and_command(record):
    for key in ("device", "date", "versions", "commit", "command", "threads", "clock", "rounds"):
        assert record[key], key
    of_sft = "python -m benchmarks.sft benchmarks/results/sft.jsonl --rounds 3"
    assert record["command"] == of_sft or re.fullmatch(OF_BENCH, record["command"])
    assert record["p20"] <= record["median"] <= record["p80"]


def test_a_long_test_is_a_row_with_the_last_outcome_of_each_of_its_parts():
    origin = {"device": "a CPU", "versions": {"torch": "2"}, "date": "2026-11-29T08:00:00+00:00", "seconds": 30.0}
    parts = [("test_it_holds[1]", "failed", 3), ("test_it_holds[1]", "passed", 5), ("test_it_holds[2]", "failed", 7)]
    outcomes = [
        origin
        | {"test": f"tests/a/test_b.py::{name}", "outcome": outcome, "counted": {"kills": kills} if kills else {}}
        for name, outcome, kills in parts
    ]
    row = "| `a/test_b.py` | It holds | 12 kills | 1 of 2 | 1.0 | 2026-11-29 |"
    assert row in pages.long_tests_table(outcomes).splitlines()


def test_a_page_without_a_part_is_refused():
    with pytest.raises(ValueError, match="must have one part <!-- gpu -->"):
        pages.page_with("nothing", {"gpu": "text"})


def test_soft_labels_cost_at_most_twice_as_much_as_class_indices():
    seconds = {(r["form"], r["dtype"]): r["median"] for r in pages.soft_records()}
    soft = [key for key in seconds if key[0].endswith("_soft_labels")]
    assert len(soft) == 4
    for form, dtype in soft:
        assert seconds[form, dtype] <= 2 * seconds[form.removesuffix("_soft_labels"), dtype]


@pytest.mark.parametrize(
    "record", pages.large_records(), ids=lambda r: f"{r.get('what', r.get('size'))}-{r.get('start')}"
)
def test_a_committed_record_of_a_start_names_machine_date_versions_and_command(record):
    for key in ("device", "date", "versions", "commit", "command", "threads"):
        assert record[key], key
    assert record["command"].startswith("python -m benchmarks.large_data FOLDER --")


def test_the_second_start_on_ten_million_pairs_reads_in_less_than_ten_seconds_and_eight_bytes_a_token():
    pairs = {(r["size"], r["start"]): r for r in pages.large_records() if r["kind"] == "pairs"}
    least, most = (pairs[size, "second"] for size in (100_000, 10_000_000))
    assert sum(most["processor_seconds"][:2]) < 10
    assert most["peak_bytes"] - least["peak_bytes"] < 8 * (most["tokens"] - least["tokens"])


def test_commands_that_neither_train_nor_draw_take_less_than_a_second():
    commands = {r["what"]: r["processor_seconds"] for r in pages.large_records() if r["kind"] == "command"}
    drawn = commands.pop("rdrop report runs")
    assert len(commands) == 4
    assert max(commands.values()) < 1 < drawn


def test_figures_are_compared_with_what_they_name():
    facts = {"benchmark": "rows", "pairs": 1024, "classes": 32_768, "dtype": "float32"}
    records = [
        facts | {"form": "cross_entropy", "median": 4.0, "peak_extra_bytes": 100},
        facts | {"form": "ours_overwriting", "median": 1.0, "peak_extra_bytes": 5},
    ]
    time, memory = pages.FIGURES[:2]
    assert (pages.measured_figure(records, time), pages.measured_figure(records, memory)) == (0.25, 0.05)

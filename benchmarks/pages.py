"""The tables and plots of these pages from the committed records: `python -m benchmarks.pages`.

docs/speed.md, docs/accuracy.md and docs/reliability.md.

Each part of a page between `<!-- name -->` and `<!-- /name -->` is written again; a test holds that it is what the
records give. The records are in benchmarks/results. From `make bench`: rows.jsonl, soft.jsonl, simcut.jsonl,
linear.jsonl and steps.jsonl of a CPU; gpu.jsonl of a GPU, which may be missing. From `benchmarks/roofline.py`:
roofline.jsonl. From `benchmarks/large_data.py`: large.jsonl. From `benchmarks/sft.py`: sft.jsonl. From
`benchmarks/accuracy.py --record`: accuracy-reference.json, accuracy-cpu.json and accuracy-linear.json. From
`make test-long`: long.jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import accuracy
from benchmarks.large_data import KINDS
from benchmarks.roofline import CARDS, bound

from rdrop.bench.measure import SOFT_LABELS
from rdrop.bench.plots import draw, svg
from rdrop.bench.records import Record, comparisons, read
from rdrop.bench.table import compare, layout_of, markdown_table, number

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PLOTS = ROOT / "benchmarks/results", ROOT / "docs/plots"
SPEED, ACCURACY, RELIABILITY = (ROOT / "docs" / f"{name}.md" for name in ("speed", "accuracy", "reliability"))


def cpu_records() -> list[Record]:
    return [r for name in ("rows", "linear", "steps") for r in read(RESULTS / f"{name}.jsonl")]


def soft_records() -> list[Record]:
    return read(RESULTS / "soft.jsonl")


def simcut_records() -> list[Record]:
    return read(RESULTS / "simcut.jsonl")


def large_records() -> list[Record]:
    return read(RESULTS / "large.jsonl")


def sft_records() -> list[Record]:
    return read(RESULTS / "sft.jsonl")


def gpu_records() -> list[Record]:
    path = RESULTS / "gpu.jsonl"
    return read(path) if path.exists() else []


# ---------------------------------------------------------------------------------------------- parts of the page


def parts() -> dict[Path, dict[str, str]]:
    """Of each page, by the name they have in it."""
    return {
        SPEED: speed_parts(),
        ACCURACY: {f"accuracy {name}": _accuracy(name) for name in ("reference", "cpu", "linear")},
        RELIABILITY: {"long tests": long_tests_table(read(RESULTS / "long.jsonl"))},
    }


def speed_parts() -> dict[str, str]:
    records = cpu_records()
    found = {
        f"{benchmark} {dtype}": _table_with_origin(_of(records, benchmark=benchmark, dtype=dtype))
        for benchmark in ("rows", "linear")
        for dtype in ("float32", "bfloat16")
    }
    found["dtypes"] = _dtypes(records)
    found["steps"] = _table_with_origin(_of(records, benchmark="steps"))
    found["sft"] = _table_with_origin(comparisons(sft_records()))
    found["figures"] = figures_table(records)
    found["soft labels"] = _soft_labels(soft_records())
    found["simcut"] = _table_with_origin(comparisons(simcut_records()))
    found["gpu"] = _gpu(gpu_records())
    found["roofline"] = _roofline(read(RESULTS / "roofline.jsonl"))
    large = large_records()
    found["large data"] = _large_data([record for record in large if record["kind"] != "command"])
    found["commands"] = _commands([record for record in large if record["kind"] == "command"])
    return found


def _accuracy(implementation: str) -> str:
    record = json.loads((RESULTS / f"accuracy-{implementation}.json").read_text(encoding="utf-8"))
    origin = f"{record['machine']}; torch {record['torch']}; {record['date']}; by `{record['command']}`."
    return f"{accuracy.markdown_table(record['rows'])}\n\n{origin}"


def _of(records: Sequence[Record], **facts: object) -> list[list[Record]]:
    return comparisons(r for r in records if all(r.get(key) == value for key, value in facts.items()))


def _table_with_origin(found: list[list[Record]]) -> str:
    return f"{markdown_table(found)}\n\n{_origin(found)}"


def _origin(found: list[list[Record]]) -> str:
    """Where the figures are from, in a sentence."""
    first = found[0][0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    dates = sorted({r["date"][:10] for records in found for r in records})
    commands = dict.fromkeys(r["command"] for records in found for r in records)
    by = " and ".join(f"`{command}`" for command in commands)
    threads = "" if first["clock"] == "device" else f", {first['threads']} thread{'s' if first['threads'] > 1 else ''}"
    return (
        f"{first['device']}, {first['clock']} time{threads}, medians of {first['rounds']} interleaved rounds; "
        f"{versions}; {' and '.join(dates)}; by {by}."
    )


def _dtypes(records: Sequence[Record]) -> str:
    """Milliseconds in float32 and bfloat16 of what was measured in both."""
    rows = ["| milliseconds | float32 | bfloat16 |", "|---|---|---|"]
    for benchmark in ("rows", "linear"):
        in_dtype = {
            (layout_of(of_size).size(of_size[0]), of_size[0]["dtype"]): {line.form: line for line in compare(of_size)}
            for of_size in _of(records, benchmark=benchmark)
        }
        for (size, dtype), lines in in_dtype.items():
            if dtype != "bfloat16":
                continue
            for form, line in lines.items():
                if form.startswith("ours"):
                    other = in_dtype[size, "float32"][form]
                    rows.append(f"| {line.words}, {size} | {1e3 * other.median:.1f} | {1e3 * line.median:.1f} |")
    return "\n".join(rows)


def _soft_labels(records: Sequence[Record]) -> str:
    """Milliseconds with class indices and with probabilities, and their ratio, of the same run."""
    rows = ["| milliseconds | class indices | soft labels | ratio |", "|---|---|---|---|"]
    found = _of(records, benchmark="rows")
    for of_size in found:
        lines = {line.form: line for line in compare(of_size)}
        for form in ("ours", "ours_overwriting"):
            indices, soft = lines[form], lines[f"{form}{SOFT_LABELS}"]
            cells = f"{1e3 * indices.median:.1f} | {1e3 * soft.median:.1f} | {number(soft.median / indices.median)}"
            rows.append(f"| {indices.words}, {of_size[0]['dtype']} | {cells} |")
    return "\n".join(rows) + f"\n\n{_origin(found)}"


def _large_data(records: Sequence[Record]) -> str:
    """Processor seconds and memory of each start, by kind and size."""
    rows = [
        "| data | start | reading | up to the first update | memory | per further token |",
        "|---|---|---|---|---|---|",
    ]
    for record in sorted(records, key=lambda r: (KINDS.index(r["kind"]), r["size"], r["start"])):
        of_kind = [r for r in records if (r["kind"], r["start"]) == (record["kind"], record["start"])]
        least = min(of_kind, key=lambda r: int(r["size"]))
        tokens, per_token = "", ""
        if record["tokens"]:
            tokens = f", {record['tokens'] / 1e6:,.0f} million tokens"
            if record is not least:
                growth = record["peak_bytes"] - least["peak_bytes"]
                per_token = f"{growth / (record['tokens'] - least['tokens']):.1f} bytes"
        seconds = record["processor_seconds"]
        figures = (f"{seconds[1]:.1f} s", f"{sum(seconds):.1f} s", f"{record['peak_bytes'] / 1e9:.1f} GB", per_token)
        rows.append(f"| {record['size']:,} {record['kind']}{tokens} | {record['start']} | {' | '.join(figures)} |")
    return "\n".join(rows) + f"\n\n{_origin_of_starts(records)}"


def _commands(records: Sequence[Record]) -> str:
    rows = ["| command | processor time |", "|---|---|"]
    rows += [f"| `{record['what']}` | {record['processor_seconds']:.2f} s |" for record in records]
    return "\n".join(rows) + f"\n\n{_origin_of_starts(records)}"


def _origin_of_starts(records: Sequence[Record]) -> str:
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    dates = " and ".join(sorted({record["date"][:10] for record in records}))
    commands = " and ".join(f"`{command}`" for command in dict.fromkeys(record["command"] for record in records))
    return f"{first['device']}, processor time, 1 thread for torch; {versions}; {dates}; by {commands}."


def _gpu(records: list[Record]) -> str:
    if not records:
        return (
            "Not measured: no GPU was at hand. `make gpu` does it where there is one, in nine minutes and without a\n"
            "network: the kernel's values against float64, its time and memory in bfloat16 at 4,096 pairs beside\n"
            "cross-entropy, a copy of the logits and the peers that are installed (Liger, quack, cut cross-entropy),\n"
            "the best shape of its programs on the card and, with `DATA=FOLDER`, both arms of Multi30k for what time\n"
            "is left. `build/gpu/gpu.jsonl` then goes to `benchmarks/results`."
        )
    by_benchmark = [_of(records, benchmark=name) for name in ("rows", "linear", "steps")]
    return "\n\n".join(_table_with_origin(found) for found in by_benchmark if found)


def _roofline(records: Sequence[Record]) -> str:
    """The least times of R-Drop from 4,096 pairs of bfloat16 logits, by card and vocabulary, and what limits them."""
    rows = [
        "| V | card | copy | read twice from memory | at best from the cache | instructions | of a copy, at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for classes in (32_768, 50_265, 128_256):
        (record,) = (r for r in records if r["passes"] == 2 and r["aligned"] is (classes % 16 == 0))
        for name, card in CARDS.items():
            least = bound(record, card, 4096, classes)
            times = (least.copy, least.twice, least.memory, least.instructions)
            cells = " | ".join(f"{time:.2f} ms" for time in times)
            rows.append(f"| {classes:,} | {name} | {cells} | {least.share_of_copy:.0%} |")
    rows += ["", "| instructions for a class of a position | forward | gradient | registers |", "|---|---|---|---|"]
    for record in records:
        what = f"{'R-Drop, both passes' if record['passes'] == 2 else 'plain cross-entropy, one row'}"
        figures = f"{record['forward']:.0f} | {record['gradient']:.0f} | {record['registers']}"
        rows.append(f"| {what}{'' if record['aligned'] else ', V no multiple of 16'} | {figures} |")
    first = records[0]
    origin = f"Calculated, not measured, from code for sm_90 (triton {first['triton']}); {first['date'][:10]}"
    return "\n".join(rows) + f"\n\n{origin}; by `{first['command']}`."


# ---------------------------------------------------------------------------------------------- the long tests


def long_tests_table(outcomes: Sequence[Record]) -> str:
    """What each long test counted, over its parts, and how many of these passed; of a part its last outcome."""
    last = {outcome["test"]: outcome for outcome in outcomes}
    found: dict[tuple[str, str], list[Record]] = {}
    for test, outcome in sorted(last.items()):
        file, _, name = test.partition("::")
        # What counts nothing is many small tests of one file.
        sentence = _as_sentence(name.partition("[")[0]) if outcome["counted"] else ""
        found.setdefault((file.removeprefix("tests/"), sentence), []).append(outcome)
    rows = ["| file | test | counted | passed | minutes | date |", "|---|---|---|---|---|---|"]
    for (file, sentence), parts in found.items():
        passed = sum(part["outcome"] == "passed" for part in parts)
        minutes = sum(part["seconds"] for part in parts) / 60
        dates = " and ".join(sorted({part["date"][:10] for part in parts}))
        cells = (f"`{file}`", sentence, _counted(parts), f"{passed} of {len(parts)}", f"{minutes:.1f}", dates)
        rows.append(f"| {' | '.join(cells)} |")
    devices = " and ".join(dict.fromkeys(outcome["device"] for outcome in last.values()))
    versions = dict.fromkeys(
        ", ".join(f"{name} {version}" for name, version in outcome["versions"].items()) for outcome in last.values()
    )
    return "\n".join(rows) + f"\n\n{devices}, one thread; {' and '.join(versions)}; by `make test-long`."


def _as_sentence(name: str) -> str:
    words = name.removeprefix("test_").replace("_", " ")
    return words[:1].upper() + words[1:]


def _counted(parts: Sequence[Record]) -> str:
    totals: dict[str, float] = {}
    for part in parts:
        for what, count in part["counted"].items():
            totals[what] = totals.get(what, 0) + count
    return "; ".join(f"{count:,} {what}" for what, count in totals.items())


# ---------------------------------------------------------------------------------------------- performance targets


@dataclass(frozen=True)
class Figure:
    """A ratio of two records of one comparison, and the most it may be."""

    what: str
    benchmark: str
    form: str
    base: str
    key: str
    limit: float
    facts: dict[str, object]


_FIRST_ROWS = {"pairs": 1024, "classes": 32_768, "dtype": "float32"}
_FIRST_LINEAR = {"pairs": 1024, "features": 512, "classes": 32_768, "dtype": "float32"}
TIME, MEMORY = "median", "peak_extra_bytes"

FIGURES = (
    *(
        Figure(what, "rows", form, base, key, limit, _FIRST_ROWS)
        for what, form, base, key, limit in (
            ("from logits, in place: time to `F.cross_entropy`", "ours_overwriting", "cross_entropy", TIME, 0.20),
            ("the same: memory", "ours_overwriting", "cross_entropy", MEMORY, 0.02),
            ("from logits, kept: time to `F.cross_entropy`", "ours", "cross_entropy", TIME, 0.45),
            ("the same: memory", "ours", "cross_entropy", MEMORY, 0.35),
            ("from logits, in place: time to the official form", "ours_overwriting", "official", TIME, 1 / 25),
            ("from logits: time to plain cross-entropy by the same kernel", "ours_overwriting", "ours_cross_entropy",
             TIME, 1.2),
        )
    ),
    *(
        Figure(what, "linear", form, base, key, limit, _FIRST_LINEAR)
        for what, form, base, key, limit in (
            ("from hidden states: time to linear and `F.cross_entropy`", "ours", "cross_entropy", TIME, 0.78),
            ("the same, 30 % padding", "ours_30_percent_padding", "cross_entropy", TIME, 0.56),
            ("from hidden states: memory", "ours", "cross_entropy", MEMORY, 0.20),
            ("from hidden states: time to plain cross-entropy by the same technique", "ours", "ours_cross_entropy",
             TIME, 1.05),
        )
    ),
    *(
        Figure(f"{what}, V = {classes:,}", "steps", form, base, key, limit,
               {"model": "translation", "classes": classes})
        for classes in (10_000, 50_000)
        for what, form, base, key, limit in (
            ("whole step: time to a plain step on 2B", "ours_fused", "plain_twice_the_batch", TIME, 1.03),
            ("whole step: time to the official step", "ours_fused", "official", TIME, 0.67 if classes > 10_000 else 1),
            ("whole step, micro-batches: memory to a plain step on B", "ours_fused_micro_batches", "plain", MEMORY,
             1.2),
        )
    ),
)  # fmt: skip


def measured_figure(records: Sequence[Record], figure: Figure) -> float:
    [of_size] = _of(records, benchmark=figure.benchmark, **figure.facts)
    form, base = (next(r for r in of_size if r["form"] == name) for name in (figure.form, figure.base))
    return float(form[figure.key] / base[figure.key])


def figures_table(records: Sequence[Record]) -> str:
    rows = ["| ratio | at most | measured |", "|---|---|---|"]
    for figure in FIGURES:
        measured = measured_figure(records, figure)
        rows.append(f"| {figure.what} | {number(figure.limit)} | {number(measured)} |")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------- the page


def page_with(text: str, found: dict[str, str]) -> str:
    """The text of a page with these parts in the place of what it had."""
    for name, part in found.items():
        pattern = re.compile(rf"<!-- {name} -->.*?<!-- /{name} -->", re.DOTALL)
        text, count = pattern.subn(lambda _, name=name, part=part: f"<!-- {name} -->\n{part}\n<!-- /{name} -->", text)
        if count != 1:
            raise ValueError(f"the page must have one part <!-- {name} --> ... <!-- /{name} -->; it has {count}")
    return text


def plots() -> dict[str, str]:
    """SVG by file name: one of each benchmark, float32."""
    records = cpu_records()
    return {
        f"{name}.svg": svg(draw(_of(records, benchmark=name, dtype="float32"))) for name in ("rows", "linear", "steps")
    }


def main() -> None:
    for page, found in parts().items():
        page.write_text(page_with(page.read_text(encoding="utf-8"), found), encoding="utf-8")
    PLOTS.mkdir(exist_ok=True)
    for name, drawn in plots().items():
        (PLOTS / name).write_text(drawn, encoding="utf-8")
    for figure in FIGURES:
        measured = measured_figure(cpu_records(), figure)
        print(
            f"{'held  ' if measured <= figure.limit else 'MISSED'} {measured:6.3f} <= {figure.limit:.3f}  {figure.what}"
        )


if __name__ == "__main__":
    main()

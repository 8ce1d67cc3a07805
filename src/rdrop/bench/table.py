"""Records side by side: a table for the terminal, and one for a page of Markdown. Reads records, measures nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from rdrop.bench.records import Record


@dataclass(frozen=True)
class Layout:
    """The layout of one benchmark's table: the words of each form, in order, and what they are compared with."""

    heading: str
    words: dict[str, str]
    time_base: str
    memory_base: str
    size: Callable[[Record], str]


_CROSS_ENTROPY = "`F.cross_entropy`"
_TIDY = "tidy form"

LAYOUTS = {
    "rows": Layout(
        heading="loss from logits, forward and backward",
        words={
            "cross_entropy": f"{_CROSS_ENTROPY}, eager",
            "cross_entropy_compiled": f"{_CROSS_ENTROPY}, compiled",
            "official": "official form",
            "tidy": _TIDY,
            "tidy_compiled": f"{_TIDY}, compiled",
            "ours_reference": "`rdrop_loss`, reference",
            "ours": "`rdrop_loss`",
            "ours_soft_labels": "`rdrop_loss`, soft labels",
            "ours_overwriting": "`rdrop_loss(..., overwrite_logits=True)`",
            "ours_overwriting_soft_labels": "`rdrop_loss(..., overwrite_logits=True)`, soft labels",
            "ours_cross_entropy": "plain cross-entropy by our kernel, in place",
            "simcut": "SimCut, as usually written",
            "ours_simcut": "SimCut by `rdrop_loss`",
            "liger": "plain cross-entropy of Liger",
            "quack": "plain cross-entropy of quack, no label smoothing",
            "copy": "a copy of the logits",
        },
        time_base="cross_entropy",
        memory_base="cross_entropy",
        size=lambda r: f"{r['pairs']} x {r['classes']:,}",
    ),
    "linear": Layout(
        heading="loss from hidden states, forward and backward",
        words={
            "cross_entropy": f"`F.linear`, {_CROSS_ENTROPY}, eager",
            "cross_entropy_compiled": f"`F.linear`, {_CROSS_ENTROPY}, compiled",
            "torch_linear_cross_entropy": "`F.linear_cross_entropy`, no label smoothing",
            "official": "`F.linear`, official form",
            "tidy": f"`F.linear`, {_TIDY}",
            "tidy_compiled": f"`F.linear`, {_TIDY}, compiled",
            "ours": "`linear_rdrop_loss`",
            "ours_30_percent_padding": "`linear_rdrop_loss`, 30 % padding",
            "ours_cross_entropy": "plain cross-entropy by our technique",
            "products": "the three matrix products alone",
            "liger": "plain cross-entropy of Liger, from hidden states",
            "cut_cross_entropy": "cut cross-entropy, no label smoothing",
        },
        time_base="cross_entropy",
        memory_base="cross_entropy",
        size=lambda r: f"{r['pairs']} x {r['features']} x {r['classes']:,}",
    ),
    "steps": Layout(
        heading="training step",
        words={
            "plain": "plain, on B",
            "plain_twice_the_batch": "plain, on 2B",
            "official": "official form",
            "ours_from_logits": "`RDropTrainer`, from logits",
            "ours_from_logits_micro_batches": "the same, `micro_batches=2`",
            "ours_fused": "`RDropTrainer(fused=True)`",
            "ours_fused_micro_batches": "the same, `micro_batches=2`",
            "ours_fused_encoder_without_dropout": "the same, no dropout in the encoder",
            "ours_fused_encoder_once": "the same, `encoder_once=True`",
        },
        time_base="plain_twice_the_batch",
        memory_base="plain",
        size=lambda r: r["model"] + (f", V = {r['classes']:,}" if r["model"] == "translation" else ""),
    ),
    "sft": Layout(
        heading="step of supervised fine-tuning",
        words={
            "sft": "`SFTTrainer`, on B",
            "sft_twice_the_batch": "`SFTTrainer`, on 2B",
            "rdrop": "`RDropSFTTrainer`, on B",
            "rdrop_micro_batches": "the same, `micro_batches=2`",
        },
        time_base="sft_twice_the_batch",
        memory_base="sft",
        size=lambda r: f"{r['model']}, V = {r['classes']:,}",
    ),
}


@dataclass(frozen=True)
class Line:
    """A form beside what its benchmark compares with; None where that or the form itself was not measured."""

    form: str
    words: str
    median: float | None
    p20: float | None
    p80: float | None
    time_ratio: float | None
    peak_extra_bytes: int | None
    memory_ratio: float | None
    bandwidth_ratio: float | None
    """Bytes that a loss in place must read and write per second, against those of a copy."""


def layout_of(records: Sequence[Record]) -> Layout:
    return LAYOUTS[records[0]["benchmark"]]


def compare(records: Sequence[Record]) -> list[Line]:
    """Returns the forms of one comparison, in the order of their layout."""
    layout = layout_of(records)
    by_form = {r["form"]: r for r in records}
    time = by_form.get(layout.time_base, {}).get("median")
    memory = by_form.get(layout.memory_base, {}).get("peak_extra_bytes")
    bandwidth = _bandwidth(by_form.get("copy", {}))
    return [
        Line(
            form=form,
            words=words,
            median=r["median"],
            p20=r["p20"],
            p80=r["p80"],
            time_ratio=_ratio(r["median"], time),
            peak_extra_bytes=r["peak_extra_bytes"],
            memory_ratio=_ratio(r["peak_extra_bytes"], memory),
            bandwidth_ratio=_ratio(_bandwidth(r), bandwidth),
        )
        for form, words in layout.words.items()
        if (r := by_form.get(form))
    ]


def _bandwidth(r: Record) -> float | None:
    return _ratio(r.get("moved_bytes"), r.get("median"))


def _ratio(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base


# ---------------------------------------------------------------------------------------------- in words


def terminal_table(records: Sequence[Record]) -> Table:
    """Returns one comparison, a form a row; ratios to what the benchmark compares with."""
    layout, first = layout_of(records), records[0]
    table = Table(
        title=Text(f"{layout.heading}: {layout.size(first)}, {first['dtype']}", style="bold"),
        title_justify="left",
        caption=Text(_caption(layout, first)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("")
    on_gpu = first["clock"] == "device"
    for heading in ("time ms", "p20 to p80", "ratio", "peak MB", "ratio", *(["bandwidth"] if on_gpu else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in compare(records):
        time = ["out of memory", ""] if line.median is None else [_milliseconds(line.median), _spread(line)]
        memory = "" if line.peak_extra_bytes is None else f"{line.peak_extra_bytes / 1e6:,.0f}"
        ratios = [number(ratio) for ratio in (line.time_ratio, line.memory_ratio, line.bandwidth_ratio)]
        cells = [*time, ratios[0], memory, ratios[1], *(ratios[2:] if on_gpu else [])]
        style = "bold" if "rdrop" in line.words.lower() else ""
        table.add_row(Text(line.words.replace("`", ""), style=style), *cells)
    return table


def _caption(layout: Layout, r: Record) -> str:
    bases = [layout.words[form].replace("`", "") for form in (layout.time_base, layout.memory_base)]
    same = f"time and memory to {bases[0]}" if bases[0] == bases[1] else f"time to {bases[0]}, memory to {bases[1]}"
    lines = [f"ratios: {same}; medians of {r['rounds']} rounds, {r['clock']} time", r["device"]]
    if r["clock"] == "device":
        lines.append("bandwidth: the bytes a loss in place must move per second, to those of a copy")
    else:
        lines[0] += f", {r['threads']} thread{'s' if r['threads'] > 1 else ''}"
    return "\n".join(lines)


def markdown_table(all_records: Sequence[Sequence[Record]]) -> str:
    """Returns comparisons of one benchmark side by side: `time, memory` as ratios, a column each."""
    layout = layout_of(all_records[0])
    columns = [{line.form: line for line in compare(records)} for records in all_records]
    heads = [f"{layout.size(records[0])}: time, memory" for records in all_records]
    rows = [f"| {layout.heading} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    for form, words in layout.words.items():
        cells = [_cell(column.get(form)) for column in columns]
        if any(cells) and form != "copy":
            rows.append(f"| {words} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cell(line: Line | None) -> str:
    if line is None:
        return ""
    return "out of memory" if line.median is None else f"{number(line.time_ratio)}, {number(line.memory_ratio)}"


def number(ratio: float | None) -> str:
    """Returns two digits after the point: one would hide what a small ratio is made of, three would pretend."""
    return "" if ratio is None else f"{ratio:.2f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"


def _spread(line: Line) -> str:
    assert line.p20 is not None
    assert line.p80 is not None
    return f"{_milliseconds(line.p20)} to {_milliseconds(line.p80)}"

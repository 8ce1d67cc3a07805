"""`rdrop bench`: the benchmarks that are asked for, a table after each size, a record for each measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.status import Status

from rdrop.bench.measure import BenchError, Conditions
from rdrop.bench.records import Record, append
from rdrop.bench.table import LAYOUTS, terminal_table

BENCHMARKS = {"logits": "rows", "hidden": "linear", "steps": "steps"}
"""What is asked for, and what its records are called."""

Measuring = Callable[[Conditions], list[Record]]


@dataclass(frozen=True)
class Sizes:
    """The sizes that differ from the benchmarks' own.

    With `pairs`, `classes` or `features` one size is measured in place of three; in a step `features` is the width.
    """

    pairs: int | None = None
    classes: int | None = None
    features: int | None = None
    batch: int | None = None
    length: int | None = None
    layers: int | None = None


def run(
    benchmarks: Sequence[str], sizes: Sizes, conditions: Conditions, console: Console, output: Path | None = None
) -> list[Record]:
    """Measures, prints each table as soon as it is there, and appends its records to `output`."""
    benchmarks = benchmarks or tuple(BENCHMARKS)
    _check(benchmarks, conditions)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()  # a place that cannot be written is known before the minutes of measuring
    records = []
    with conditions.in_force(), Console(stderr=True).status("loading") as status:
        for title, measure in _measurements(benchmarks, sizes):
            found = measure(replace(conditions, say=partial(_say, status, title)))
            console.print(terminal_table(found))
            if output is not None:
                append(found, output)
            records += found
    return records


def _say(status: Status, title: str, what: str) -> None:
    status.update(f"{title}: {what}")


def _check(benchmarks: Sequence[str], conditions: Conditions) -> None:
    for name in benchmarks:
        if name not in BENCHMARKS:
            raise BenchError(f"benchmark (={name!r}) must be one of {tuple(BENCHMARKS)}")
    known = dict.fromkeys(form for name in benchmarks for form in LAYOUTS[BENCHMARKS[name]].words)
    for form in conditions.forms:
        if form not in known:
            raise BenchError(f"form (={form!r}) must be one of {tuple(known)}")
    if "steps" in benchmarks and conditions.dtype == "float16":
        raise BenchError("dtype='float16': training steps would need a loss scale; take 'bfloat16'")


def _measurements(benchmarks: Sequence[str], sizes: Sizes) -> Iterator[tuple[str, Measuring]]:
    """Yields what is measured, in words, and the measuring of it."""
    if "logits" in benchmarks:
        from rdrop.bench import rows

        for n, v in _chosen(rows.SIZES, (sizes.pairs, sizes.classes)):
            yield f"{n} x {v:,}", partial(rows.measure_rows, n, v)
    if "hidden" in benchmarks:
        from rdrop.bench import linear

        for n, d, v in _chosen(linear.SIZES, (sizes.pairs, sizes.features, sizes.classes)):
            yield f"{n} x {d} x {v:,}", partial(linear.measure_linear, n, d, v)
    if "steps" in benchmarks:
        try:
            from rdrop.bench import steps
        except ImportError as error:
            raise BenchError(f"training steps need the extra transformers ({error})") from error
        own = {"batch": sizes.batch, "length": sizes.length, "layers": sizes.layers, "width": sizes.features}
        size = steps.StepSize(**{name: value for name, value in own.items() if value is not None})
        for v in steps.VOCABULARIES if sizes.classes is None else (sizes.classes,):
            yield f"translation, V = {v:,}", partial(steps.measure_steps, v, size)
        yield "classification", partial(steps.measure_steps, None, size)


def _chosen(own: Sequence[tuple[int, ...]], wanted: tuple[int | None, ...]) -> Sequence[tuple[int, ...]]:
    """Returns the benchmark's own sizes; or one, its first, with what is wanted in its place."""
    if not any(wanted):
        return own
    return [tuple(value or default for value, default in zip(wanted, own[0], strict=True))]

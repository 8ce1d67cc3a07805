"""Keeps the records of measurements, one JSON object a line, and says which are compared with each other."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]

_OF_A_COMPARISON = (
    *("benchmark", "model", "pairs", "length", "layers", "features", "classes"),
    *("dtype", "device", "threads", "clock"),
)


def append(records: Iterable[Record], path: Path) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(r) + "\n" for r in records)


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def comparisons(records: Iterable[Record]) -> list[list[Record]]:
    """Returns the records of one benchmark, size, dtype and machine together, in their order.

    A later one of a form replaces an earlier one.
    """
    found: dict[tuple[Any, ...], dict[str, Record]] = {}
    for r in records:
        found.setdefault(tuple(r.get(key) for key in _OF_A_COMPARISON), {})[r["form"]] = r
    return [list(of_forms.values()) for of_forms in found.values()]

"""Keeps what the tests found, one JSON object a line, and leaves out those that have passed before.

`pytest -m long --keep=build/long.jsonl` can be stopped and started again. A line has the test, its outcome, how long
it took, what it counted (`record_property`), and where and when. A test is run again when a file has changed that it
may depend on: the package, what the tests share, the test's own file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from _pytest.mark import ParameterSet

from rdrop.bench.measure import origin

ROOT = Path(__file__).parents[1]


class Outcomes:
    """The plugin of one file of outcomes. Of several processes each leaves the same tests out, and one writes."""

    def __init__(self, file: Path, config: pytest.Config) -> None:
        self.file, self.writes = file, not hasattr(config, "workerinput")

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        passed = {(kept["test"], kept["sources"]) for kept in read(self.file) if kept["outcome"] == "passed"}
        left_out = [item for item in items if (item.nodeid, sources(item.path)) in passed]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.writes and (report.when == "call" or not report.passed):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            found = {
                "test": report.nodeid,
                "outcome": report.outcome,
                "seconds": round(report.duration, 1),
                "counted": dict(report.user_properties),
                "sources": sources(ROOT / report.nodeid.partition("::")[0]),
                **origin(),
            }
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")


def in_parts(count: int) -> list[ParameterSet]:
    """Returns the long form of a test with random cases, ten parts: how many cases each has, and its seed."""
    return [pytest.param(count // 10, seed, marks=pytest.mark.long) for seed in range(1, 11)]


def read(file: Path) -> list[dict[str, Any]]:
    """Returns the outcomes of a file, oldest first; none where there is no file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


@cache
def sources(test_file: Path) -> str:
    """Returns a digest of all files that the tests of `test_file` may depend on."""
    digest = hashlib.sha256()
    for path in sorted({*_shared(), test_file}):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _shared() -> Iterator[Path]:
    for folder in ("src/rdrop", "benchmarks", "tests"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".css") and not path.name.startswith("test_"):
                yield path

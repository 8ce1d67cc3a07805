"""The looks at a comparison: which seeds had finished whenever its verdict was shown.

    runs/looks.jsonl

Whoever adds seeds because the last verdict was not the hoped-for one gives chance another try. So the folder of the
runs remembers each verdict with its seeds, in one line, and a later verdict on more seeds is corrected for it. A look
is recorded when it happens: neither the seeds that were planned nor the times at which runs finished tell whether
somebody looked in between. The same verdict shown again is the same look.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rdrop.experiments.run_folder import ResultsError, append_synced

FILE = "looks.jsonl"


@dataclass(frozen=True)
class Look:
    """The seeds that each arm of a comparison had when its verdict was shown."""

    comparison: str
    """The identity of the comparison: `Comparison.identity`."""
    seeds: Mapping[str, tuple[int, ...]]
    """By the label of the arm."""


def read_looks(runs: Path) -> list[Look]:
    """Reads the looks at the comparisons below `runs`, oldest first. A line that a crash cut off is left out.

    Raises `ResultsError` for a file that is not what it should be.
    """
    path = runs / FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def record_looks(runs: Path, looks: Iterable[Look]) -> None:
    """Adds the looks that are not recorded yet."""
    known = read_looks(runs)
    shown = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    new = [look for look in looks if look not in known]
    rows = ({"comparison": look.comparison, "seeds": look.seeds, "shown": shown} for look in new)
    if new:
        append_synced(runs / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def earlier_looks(looks: Iterable[Look], comparison: str, arms: tuple[str, str], seeds: Iterable[int]) -> list[int]:
    """Returns how many seeds two arms had in common at each earlier look, ascending, where these were fewer.

    `seeds` are those that they have in common now; only looks at a part of them count.
    """
    now = set(seeds)
    of_both = (
        frozenset(look.seeds[arms[0]]) & frozenset(look.seeds[arms[1]])
        for look in looks
        if look.comparison == comparison and look.seeds.keys() >= set(arms)
    )
    return sorted(map(len, {earlier for earlier in of_both if earlier < now}))


def _parsed(line: bytes, where: str) -> Look:
    try:
        row = json.loads(line)
        seeds = {str(arm): tuple(map(int, own)) for arm, own in row["seeds"].items()}
        return Look(str(row["comparison"]), seeds)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ResultsError(
            f"{where}: is no look at a comparison ({type(error).__name__}: {error}). Delete the line: "
            "the verdict is then not corrected for that look."
        ) from error

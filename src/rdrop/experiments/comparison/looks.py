"""The looks at verdicts: which runs had finished whenever a verdict on them was shown.

    runs/looks.jsonl

Whoever adds seeds because the last verdict was not the hoped-for one gives chance another try. So the folder of the
runs remembers each verdict by the runs that it was about, in one line, and a later verdict on more seeds is corrected
for it (`contest.judged`). A look is recorded when it happens: neither the seeds that were planned nor the times at
which runs finished tell whether somebody looked in between. The same verdict shown again is the same look.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rdrop.experiments.run_folder import ResultsError, append_synced, read_lines

FILE = "looks.jsonl"

Look = frozenset[str]
"""The names of the run folders that a verdict was about."""

Pairs = Mapping[int, tuple[str, str]]
"""By the seed: the names of the two runs of a contest, one of its arm and one of its reference."""


def read_looks(runs: Path) -> list[Look]:
    """Reads the looks at the runs below the folder `runs`, oldest first.

    Those of the folders are read too that it lies in where it is a folder of the layout. Raises `ResultsError` for a
    file that is not what it should be.
    """
    folders = (*reversed(runs.resolve().parents[:2]), runs)
    lines = (line for folder in folders for line in read_lines(folder / FILE))
    return list(dict.fromkeys(_parsed(line, where) for line, where in lines))


def record_looks(runs: Path, looks: Iterable[Look]) -> None:
    """Adds the looks that are not recorded yet. Raises `StorageError` where that cannot be written."""
    known = set(read_looks(runs))
    shown = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    lines = [json.dumps({"runs": sorted(look), "shown": shown}) + "\n" for look in looks if look not in known]
    if lines:
        append_synced(runs / FILE, "".join(lines).encode())


def seeds_seen(looks: Iterable[Look], contests: Sequence[Pairs]) -> list[list[frozenset[int]]]:
    """Returns by the look, and in it by the contest, the seeds of the contest that the look was about."""
    return [
        [frozenset(seed for seed, names in pairs.items() if look.issuperset(names)) for pairs in contests]
        for look in looks
    ]


def _parsed(line: bytes, where: str) -> Look:
    try:
        return frozenset(map(str, json.loads(line)["runs"]))
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ResultsError(
            f"{where}: is no look at a verdict ({type(error).__name__}: {error}). Delete the line: later verdicts are "
            "then not corrected for that look."
        ) from error

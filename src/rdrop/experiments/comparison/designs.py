"""The designs of comparisons: which arms belong together where the runs alone do not say it.

    runs/arms.jsonl

Runs that agree on all but seed, method and batch are compared without a design. Arms that differ in more (a longer
plain training, another dropout rate) are compared if `rdrop compare` was asked for just these arms; the folder of the
runs remembers them, one comparison a line. An arm is named by the digest of its recipe with seed 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdrop.experiments.run_folder import ResultsError, append_synced, read_lines, saved

FILE = "arms.jsonl"


@dataclass(frozen=True)
class Design:
    """The arms of a comparison by the reader's name for each, the one that the others are set against first."""

    arms: Mapping[str, str]
    """The digest of each arm's recipe with seed 0 (`arm_digest`)."""
    subject: str
    """The arm that the verdict is about: it is judged against each of the others."""

    @property
    def baseline(self) -> str:
        return next(iter(self.arms))

    def with_arms_of(self, other: Design) -> Design:
        """Returns the design with the other's arms too; the subject stays last."""
        arms = {label: digest for label, digest in self.arms.items() if label != self.subject}
        for label, digest in other.arms.items():
            if digest not in self.arms.values():
                arms[f"{label} ({digest[:6]})" if label in self.arms else label] = digest
        return Design({**arms, self.subject: self.arms[self.subject]}, self.subject)

    @property
    def key(self) -> tuple[str, str]:
        """Returns what two designs of one comparison share: the recipes of the baseline and of the subject."""
        return self.arms[self.baseline], self.arms[self.subject]


def arm_digest(recipe: Mapping[str, Any]) -> str:
    """Returns the name of the arm of a saved recipe: what the digests of its runs would be without the seed."""
    return saved.digest({**recipe, "seed": 0})


def read_designs(runs: Path) -> list[Design]:
    """Reads the designs of the folder `runs`, or of those that it lies in where it is a folder of the layout.

    Two of the same baseline and subject are one with the arms of both. Raises `ResultsError` for a file that is not
    what it should be.
    """
    found: dict[tuple[str, str], Design] = {}
    for folder in (runs, *runs.resolve().parents[:2]):
        for design in _recorded(folder):
            known = found.get(design.key)
            found[design.key] = design if known is None else known.with_arms_of(design)
    return list(found.values())


def record_designs(runs: Path, designs: Iterable[Design]) -> None:
    """Adds the designs that are not recorded yet. Raises `StorageError` where that cannot be written."""
    known = _recorded(runs)
    lines = [_line(design) for design in designs if design not in known]
    if lines:
        runs.mkdir(parents=True, exist_ok=True)
        append_synced(runs / FILE, "".join(lines).encode())


def _recorded(runs: Path) -> list[Design]:
    return [_parsed(line, where) for line, where in read_lines(runs / FILE)]


def _line(design: Design) -> str:
    return json.dumps({"arms": dict(design.arms), "subject": design.subject}, ensure_ascii=False) + "\n"


def _parsed(line: bytes, where: str) -> Design:
    try:
        found = json.loads(line)
        design = Design({str(label): str(digest) for label, digest in found["arms"].items()}, str(found["subject"]))
        if design.subject not in design.arms:
            raise LookupError(f"no arm {design.subject!r}")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ResultsError(
            f"{where}: is no list of arms ({type(error).__name__}: {error}). Delete the line: its runs are then "
            "compared as their recipes say, until `rdrop compare` is given the arms again."
        ) from error
    return design

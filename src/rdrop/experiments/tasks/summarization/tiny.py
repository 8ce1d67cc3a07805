"""Synthetic mails in the layout of the real ones: a topic among other words, which is also the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rdrop.experiments.tasks.summarization.recipes import SummarizationData

SIZES = {"train": 64, "valid": 16, "test": 16}
TOPICS = ("budget", "meeting", "report", "contract", "travel", "invoice", "server", "lunch")


def write_tiny_documents(folder: Path, data: SummarizationData) -> None:
    """Writes `train.jsonl`, `valid.jsonl` and `test.jsonl`; the same ones every time."""
    generator = np.random.default_rng(0)
    for split, size in SIZES.items():
        lines = [json.dumps(_row(data, generator)) for _ in range(size)]
        Path(folder, f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _row(data: SummarizationData, generator: np.random.Generator) -> dict[str, str]:
    topic, person = generator.choice(TOPICS, 2, replace=False)
    row = dict.fromkeys((data.summary_column, *data.reference_columns), f"{topic} for {person}")
    return row | {data.document_column: f"Please see the {topic} that I wrote about the {person} yesterday.\nThanks"}

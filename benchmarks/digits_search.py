"""The search behind the settings of the recipe `digits`: `python -m benchmarks.digits_search RECORD.jsonl`.

Every setting is trained with the same seeds from 1000 on, which no comparison uses, and its scores on valid become one
line of the record. The test split is not looked at.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rdrop.experiments.launch import cli
from rdrop.experiments.run_folder import RunFolder, find_runs

SEEDS = range(1000, 1008)
PLAIN: dict[str, Any] = {"alpha": 0.0, "alpha_schedule": "constant", "views": "same"}
ON_LABELS: dict[str, Any] = {"data.unlabeled": None, "views": "same"}


def settings() -> Iterator[dict[str, Any]]:
    """Yields what is changed of the recipe: plain training, R-Drop on the labels, and with unlabeled images."""
    for alpha in (1.0, 4.0, 10.0):
        yield {"alpha": alpha, "model.dropout": 0.1}
    for alpha in (4.0, 10.0):
        yield {"alpha": alpha, "model.dropout": 0.0}
    yield ON_LABELS | {"alpha": 1.0, "model.dropout": 0.1}
    for dropout in (0.1, 0.3):
        yield ON_LABELS | {"alpha": 4.0, "model.dropout": dropout}
    for dropout in (0.1, 0.3, 0.5):
        yield PLAIN | {"model.dropout": dropout}
    for dropout in (0.1, 0.3):
        yield PLAIN | {"model.dropout": dropout, "batch_size": 40}
        for times in (2, 4):
            yield PLAIN | {"model.dropout": dropout, "updates": 1000 * times, "warmup_updates": 100 * times}


def train(changes: dict[str, Any], seed: int) -> dict[str, Any]:
    """Returns the result of one run."""
    changed = {"updates": 1000, "warmup_updates": 100, "checkpoint_every": 1000, "seed": seed} | changes
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
        if cli.run(["train", "digits", *settings, "--runs", folder]) != 0:
            raise SystemExit(f"{changes}, seed {seed} was not trained")
        [run] = find_runs(folder)
        result = RunFolder(run.path).result()
    assert result is not None
    return result


def main(record: Path) -> None:
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    known = [line["changes"] for line in done]
    for changes in settings():
        if changes in known:
            continue
        results = [train(changes, seed) for seed in SEEDS]
        line = {
            "changes": changes,
            "seeds": [*SEEDS],
            "valid": {name: [result["valid"][name] for result in results] for name in results[0]["valid"]},
            "updates": results[0]["updates"],
            "train_seconds": [round(result["cost"]["train_seconds"], 2) for result in results],
            "recipe": results[0]["recipe"],
            "finished": results[-1]["finished"],
            "machine": results[0]["machine"],
            "versions": results[0]["versions"],
        }
        with record.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))

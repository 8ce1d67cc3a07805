"""What docs/many-runs.md says of scores that two processes share is what its record says."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_ratio_of_the_record_and_it_is_at_most_0_6():
    record = json.loads((ROOT / "benchmarks/results/shared-evaluation.json").read_text(encoding="utf-8"))
    ratio = record["two"]["wall_seconds"] / record["one"]["wall_seconds"]
    said = re.search(r"two processes on two cores (\S+) of the time of one", (ROOT / "docs/many-runs.md").read_text())
    assert said is not None
    assert said[1] == f"{ratio:.2f}"
    assert ratio <= 0.6
    assert record["same_scores"]

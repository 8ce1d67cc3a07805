"""How long `make demo` takes with one run at a time and with two: `python -m benchmarks.side_by_side RECORD.json`.

Both comparisons are trained anew, one after the other, and must end in the same bits. The record says the load of the
machine before: the ratio means something on a quiet one only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from rdrop.experiments.run_folder import find_runs


def compare(arguments: list[str], jobs: int, runs: Path) -> float:
    """Trains the comparison into `runs`; returns the seconds it took."""
    command = [sys.executable, "-m", "rdrop", "compare", *arguments, "--jobs", str(jobs), "--runs", str(runs)]
    started = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def bits(runs: Path) -> dict[str, str]:
    """Returns by the folder of each run what it ended in: the digest of its rows, scores and last weights."""
    found = {}
    for run in find_runs(runs):
        assert run.result is not None
        rows = [{key: value for key, value in row.items() if key != "seconds"} for row in run.metrics]
        scores = [run.result[key] for key in ("best_step", "valid", "test")]
        digest = hashlib.sha256(json.dumps([rows, scores], sort_keys=True).encode())
        for path in sorted((run.path / "checkpoints").glob("step-*/model*")):
            digest.update(path.read_bytes())
        found[str(run.path.relative_to(runs))] = digest.hexdigest()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--seeds", type=int, default=12)
    options = parser.parse_args()
    arguments = ["digits", "--seeds", str(options.seeds)]
    load = os.getloadavg()[0]
    seconds, ends = {}, {}
    for jobs in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            seconds[jobs] = compare(arguments, jobs, Path(folder))
            ends[jobs] = bits(Path(folder))
            [result] = [run.result for run in find_runs(Path(folder))][:1]
    assert result is not None
    record = {
        "command": f"rdrop compare {' '.join(arguments)}",
        "runs": len(ends[1]),
        "seconds": {str(jobs): round(value, 1) for jobs, value in seconds.items()},
        "ratio": round(seconds[2] / seconds[1], 3),
        "same_bits": ends[1] == ends[2],
        "load_before": round(load, 2),
        "cores": os.cpu_count(),
        "machine": result["machine"],
        "versions": result["versions"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record))


if __name__ == "__main__":
    main()

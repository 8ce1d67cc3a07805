"""How long a score takes one process, and two that share it: `python -m benchmarks.shared_evaluation RECORD.json`.

The test split of Multi30k's recipe in short, with new weights: the loss and a beam search for each of 1,000 sentences.
By the wall clock the ratio means something on a quiet machine with two cores only. By the processor's clock, of the
slower of the two, it says how the work is divided. `--data` is Multi30k's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import PartialState

from rdrop.bench.measure import origin
from rdrop.experiments.randomness import seed_all
from rdrop.experiments.recipe import override
from rdrop.experiments.recipes import find_recipe
from rdrop.experiments.tasks.share import Share
from rdrop.experiments.tasks.task import SharesEvaluation, load_task

RECIPE = "multi30k-en-de-2k"


def of_one_process(data: str, rounds: int, file: Path) -> None:
    """Scores in this process, which may be one of several; writes the seconds of each round, and the scores."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    recipe = override(find_recipe(RECIPE), [f"data.folder={data}"])
    task = load_task(recipe)
    assert isinstance(task, SharesEvaluation)
    task.share = Share(state.process_index, state.num_processes)
    seed_all(0, "model")
    model = task.build_model().eval()
    found = []
    for _ in range(rounds):
        state.wait_for_everyone()
        started = time.perf_counter(), time.process_time()
        scores = task.evaluate(model, "test")
        found.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    file.with_name(f"{file.name}-{state.process_index}").write_text(json.dumps({"seconds": found, "scores": scores}))


def of_processes(processes: int, data: str, rounds: int) -> dict[str, object]:
    """Returns the median seconds of the slowest process by both clocks, and the scores, which all must agree on."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        program = ["-m", "benchmarks.shared_evaluation", str(Path(folder, "found")), "--data", data]
        command = [sys.executable, *launcher, *program, "--rounds", str(rounds), "--process"]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
    assert all(of_process["scores"] == found[0]["scores"] for of_process in found)
    slowest = [
        [max(of_process["seconds"][place][clock] for of_process in found) for place in range(rounds)]
        for clock in (0, 1)
    ]
    wall, processor = map(statistics.median, slowest)
    return {"wall_seconds": round(wall, 2), "processor_seconds": round(processor, 2), "scores": found[0]["scores"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("--data", default="../shared/data/multi30k")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        of_one_process(options.data, options.rounds, options.record)
        return
    load = round(os.getloadavg()[0], 2)
    one, two = (of_processes(processes, options.data, options.rounds) for processes in (1, 2))
    record = {
        "command": f"python -m benchmarks.shared_evaluation RECORD.json --rounds {options.rounds}",
        "recipe": RECIPE,
        "rounds": options.rounds,
        "one": one,
        "two": two,
        "same_scores": one["scores"] == two["scores"],
        "load_before": load,
        **origin(),
    }
    options.record.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()

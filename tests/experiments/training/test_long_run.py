"""A training of 10,000 updates takes no more memory at its end than at its beginning.

Run as a script, this file is that training: `python test_long_run.py FOLDER UPDATES`. It prints its resident memory.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
from tests.experiments.tiny_runs import RECIPE, TinyTask

from rdrop.experiments.training import trainer

UPDATES, WARM_UP, MIB = 10_000, 2_000, 2**20


@pytest.mark.long
def test_memory_does_not_grow_with_the_updates(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    command = [sys.executable, "-m", "tests.experiments.training.test_long_run", str(tmp_path), str(UPDATES)]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True)
    steps, resident_bytes = np.array(json.loads(done.stdout)).T
    grown = np.polyfit(steps, resident_bytes, 1)[0] * UPDATES
    record_property("updates", UPDATES)
    record_property("MiB grown", round(float(grown) / MIB, 2))
    assert grown <= MIB


def host(folder: Path, updates: int) -> None:
    trainer.load_task = TinyTask  # type: ignore[assignment]
    process, sizes = psutil.Process(), []

    def note(progress: trainer.Progress) -> None:
        if progress.step >= WARM_UP and progress.step % 100 == 0:
            sizes.append((progress.step, process.memory_info().rss))

    trainer.train(RECIPE.replace(updates=updates, evaluate_every=100, checkpoint_every=500), folder, on_progress=note)
    sys.stdout.write(json.dumps(sizes))


if __name__ == "__main__":
    host(Path(sys.argv[1]), int(sys.argv[2]))

"""torchrun starts a run again of which a process was killed: it ends in the bits of the run that was left alone.

Run as a script, this file is one process of such a run: `test_restarts.py FOLDER RANK:FORWARD ...`. The n-th of these
says which process dies after the n-th start, and at which of its forwards.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.experiments.tiny_runs import RECIPE, TinyTask, final_state

from rdrop.experiments.training import trainer

DEATHS = ("0:3", "1:4", "1:1", "0:2")


@pytest.mark.long
def test_a_run_restarted_by_torchrun_ends_in_the_bits_of_the_run_left_alone(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    start(tmp_path / "whole")
    start(tmp_path / "killed", *DEATHS)
    assert final_state(tmp_path / "killed") == final_state(tmp_path / "whole")
    left = [process.pid for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in process.info["cmdline"]]
    assert left == []
    record_property("restarts", len(DEATHS))


def start(folder: Path, *deaths: str) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", f"--max-restarts={len(deaths)}"]
    command = [sys.executable, *launcher, "-m", "tests.experiments.training.test_restarts", str(folder), *deaths]
    environment = os.environ | {"TORCH_GLOO_LAZY_INIT": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def host(folder: Path, deaths: list[str]) -> None:
    restarts, forwards = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), []
    rank, at = map(int, deaths[restarts].split(":")) if restarts < len(deaths) else (-1, 0)

    def die(event: str) -> None:
        forwards.append(event)
        if int(os.environ["RANK"]) == rank and forwards.count("forward") == at:
            os.kill(os.getpid(), signal.SIGKILL)

    TinyTask.on_event = staticmethod(die)  # type: ignore[assignment]
    trainer.load_task = TinyTask  # type: ignore[assignment]
    trainer.train(RECIPE, folder)


if __name__ == "__main__":
    host(Path(sys.argv[1]), sys.argv[2:])

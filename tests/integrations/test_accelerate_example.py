"""The Accelerate example runs as it stands, and its gradient is that of the whole batch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate")

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[1] / "examples" / "accelerate_loop.py"


def output_of(*command: str) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_the_example_learns_with_and_without_rdrop() -> None:
    output = output_of(sys.executable, "-W", "error", str(EXAMPLE))
    scores = re.findall(r"alpha (\d): accuracy on other sentences (\d\.\d+)", output)
    assert [alpha for alpha, _ in scores] == ["0", "1"]
    assert min(float(score) for _, score in scores) > 0.95  # chance is about 0.5


def test_the_gradient_of_two_processes_is_that_of_the_whole_batch() -> None:
    """Two ragged micro-batches each; one of the processes has no label at all."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    output = output_of(sys.executable, *launcher, str(HERE / "accelerate_agreement.py"))
    [(processes, difference)] = re.findall(r"processes (\d), difference (\S+)", output)
    assert processes == "2"
    assert float(difference) < 1e-12

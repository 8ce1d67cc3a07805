import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "hf_trainer.py"


def test_the_example_trains_and_scores_with_and_without_rdrop() -> None:
    run = subprocess.run([sys.executable, "-W", "error", str(EXAMPLE)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    scores = [line for line in run.stdout.splitlines() if line.startswith("alpha=")]
    assert [line.split(":")[0] for line in scores] == ["alpha=0", "alpha=1"]
    accuracies = [float(line.split("accuracy ")[1].split(",")[0]) for line in scores]
    assert min(accuracies) > 0.5  # chance is 0.1
    assert "divergence" in run.stdout

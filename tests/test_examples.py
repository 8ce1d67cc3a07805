"""The examples run as they stand."""

import re
import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_raw_loop_learns_with_and_without_rdrop(capsys):
    runpy.run_path(str(EXAMPLES / "raw_loop.py"), run_name="__main__")
    output = capsys.readouterr().out
    assert "R-Drop can act on Sequential" in output
    scores = [float(score) for score in re.findall(r"0\.\d{3}(?=,|$)", output, re.MULTILINE)]
    assert len(scores) == 4
    assert min(scores) > 0.8

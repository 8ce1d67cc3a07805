"""What bounds the Triton kernel: by hand, and from a few lines of machine code."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from benchmarks.roofline import Card, bound, loops

RECORD = {"passes": 2, "bytes_per_logit": 2, "warps": 8, "registers": 100, "forward": 50.0, "gradient": 70.0}
CODE = """
.L_x_0:
        /*0010*/                   LDG.E R0, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   FADD R0, R0, R1 ;
        /*0040*/                   FADD R0, R0, R1 ;
.L_x_1:
        /*0050*/                   MUFU.EX2 R0, R0 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
.L_x_2:
        /*0070*/                   MUFU.EX2 R0, R0 ;
        /*0080*/                   DADD R4, R4, R6 ;
        /*0090*/               @P1 BRA `(.L_x_2) ;
.L_x_3:
        /*00a0*/                   FADD R0, R0, R1 ;
        /*00b0*/               @P1 BRA `(.L_x_3) ;
"""


def test_a_loop_is_counted_without_what_its_branch_passes_over_and_without_other_loops() -> None:
    assert loops(CODE) == [4]


def test_a_second_reading_costs_what_the_rows_in_flight_do_not_leave_in_the_cache() -> None:
    rows = 2 * 1000 * 2  # bytes of a position
    # 104 registers for each of 256 threads: two programs at a time on a multiprocessor, ten of which hold 20 positions.
    card = Card(bytes_per_second=1e12, lane_instructions_per_second=1e12, multiprocessors=10, cache_bytes=5 * rows)
    least = bound(RECORD, card, positions=500, classes=1000)
    once = 500 * rows / 1e12 * 1e3
    assert (least.copy, least.twice, least.memory) == pytest.approx((2 * once, 3 * once, 2.75 * once))
    assert least.instructions == pytest.approx(500 * 1000 * 120 / 1e12 * 1e3)
    assert least.share_of_copy == pytest.approx(2 * once / least.instructions)


@pytest.mark.skipif(find_spec("triton") is None, reason="the package triton is not installed")
def test_the_kernel_compiles_for_a_gpu_that_is_not_there() -> None:
    program = "from benchmarks.roofline import count; print([count(m, aligned=True)['registers'] for m in (1, 2)])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert all(0 < registers <= 128 for registers in json.loads(said.stdout))  # two programs at a time

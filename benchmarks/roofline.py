"""What the Triton kernel asks of a card, counted without one: `python -m benchmarks.roofline`.

It compiles the kernel for sm_90 with the `ptxas` that comes with triton, and counts the machine instructions of its two
loops over the classes: of the statistics, and of the gradient. Divided by the classes of a thread, they are the issue
slots of a lane for each class of a position, all passes together. Code that a branch passes over is left out: the sums
move to another class a few times in a row. The records go to benchmarks/results/roofline.jsonl, and `benchmarks.pages`
makes a table of them and of the cards' data sheets.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rdrop.bench.measure import origin
from rdrop.bench.records import Record, append

RESULTS = Path(__file__).resolve().parent / "results/roofline.jsonl"
REGISTERS, LANES = 65_536, 128  # of a multiprocessor


@dataclass(frozen=True)
class Card:
    """What a data sheet says."""

    bytes_per_second: float
    lane_instructions_per_second: float  # half the float32 operations: a multiply-add is one instruction
    multiprocessors: int
    cache_bytes: float  # L2


CARDS = {
    "H100": Card(3.35e12, 67e12 / 2, 132, 50e6),
    "H200": Card(4.8e12, 67e12 / 2, 132, 50e6),
    "B200": Card(8.0e12, 75e12 / 2, 148, 126e6),
}


@dataclass(frozen=True)
class Bound:
    """The least milliseconds for N positions of m rows, their gradient in place of the logits."""

    copy: float
    twice: float  # memory, where every logit is read from it twice
    memory: float  # where the second reading finds in the cache what the rows in flight leave there, at best
    instructions: float

    @property
    def share_of_copy(self) -> float:
        return self.copy / max(self.memory, self.instructions)


def bound(record: Record, card: Card, positions: int, classes: int) -> Bound:
    logits = positions * record["passes"] * classes * record["bytes_per_logit"]
    threads = 32 * record["warps"]
    in_flight = card.multiprocessors * (REGISTERS // (threads * -(-record["registers"] // 8) * 8)) * logits / positions
    found = min(1.0, card.cache_bytes / in_flight)
    slots = positions * classes * (record["forward"] + record["gradient"])
    per_ms = card.bytes_per_second / 1e3
    return Bound(
        2 * logits / per_ms,
        3 * logits / per_ms,
        (3 - found) * logits / per_ms,
        slots / card.lane_instructions_per_second * 1e3,
    )


def count(passes: int, *, aligned: bool) -> dict[str, Any]:
    """Counts the kernel in bfloat16 with label smoothing; `aligned`: V is a multiple of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rdrop.kernels import rows_triton
    from rdrop.kernels.triton import DEFAULT_SHAPE

    block, warps = DEFAULT_SHAPE.max_block, DEFAULT_SHAPE.max_block // DEFAULT_SHAPE.classes_per_warp
    types = {"logits": "*bf16", "gradient": "*bf16", "labels": "*i64", "statistics": "*fp64", "label_smoothing": "fp32"}
    types |= dict.fromkeys(("task", "divergence", "grad_task", "grad_divergence"), "*fp32")
    constants: dict[str, Any] = dict.fromkeys(("probabilities", "weight", "total_weight"))
    constants |= {"M": passes, "DIVERGENCE": 0, "FORWARD": True, "BACKWARD": True, "DENSE": True}
    constants |= {"BLOCK": block, "FAR_BLOCK": block // 4, "PARTIAL": 32 * warps, "NEXT": aligned}
    names = rows_triton.rows.arg_names
    source = ASTSource(
        fn=rows_triton.rows,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(place,): constants[name] for place, name in enumerate(names) if name in constants},
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in constants and (aligned or types.get(name, "").startswith("*"))
        },
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "enable_fp_fusion": True}
    )
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        code = subprocess.run([tools / "nvdisasm", "-c", file.name], check=True, capture_output=True, text=True).stdout
        used = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], check=True, capture_output=True, text=True
        )
    (registers,) = re.findall(r"REG:(\d+)", used.stdout + used.stderr)
    forward, *_, gradient = loops(code)
    per_thread = block / (32 * warps)
    return {
        "forward": forward / per_thread,
        "gradient": gradient / per_thread,
        "registers": int(registers),
        "warps": warps,
        "triton": triton.__version__,
    }


def loops(code: str) -> list[int]:
    """Returns the instructions of one turn of each loop that computes an exponential in single precision only."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, code.splitlines()):
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?(.*?);", line):
            instructions.append(instruction[1])
    jumps = {
        place: labels[target[1]]
        for place, instruction in enumerate(instructions)
        if (target := re.match(r"BRA.*`\((\.L_\w+)\)", instruction)) and target[1] in labels
    }
    found = []
    for end, begin in jumps.items():
        body = instructions[begin : end + 1]
        exponentials = sum(one.startswith("MUFU.EX2") for one in body)
        if begin <= end and exponentials and not any(one.startswith(("DADD", "DFMA", "DMUL")) for one in body):
            passed_over = sum(to - at - 1 for at, to in jumps.items() if begin <= at < to <= end)
            found.append(end - begin + 1 - passed_over)
    return found


def main() -> None:
    records = []
    for passes in (2, 1):
        for aligned in (True, False):
            what = {"passes": passes, "aligned": aligned, "bytes_per_logit": 2, **count(passes, aligned=aligned)}
            records.append({**what, **origin(), "command": "python -m benchmarks.roofline"})
    RESULTS.unlink(missing_ok=True)
    append(records, RESULTS)


if __name__ == "__main__":
    main()

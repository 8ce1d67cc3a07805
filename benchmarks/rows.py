"""What the loss costs from logits: `python benchmarks/rows.py`, every form side by side in one run.

Each form computes the loss of N pairs of rows (label smoothing 0.1, alpha 5, one label in ten ignored) and its gradient
in the logits. Rounds are interleaved: in each, every form runs once, on fresh logits, so that a busy machine is as busy
for all. Times are of the processor (`--clock wall` for the clock on the wall), memory is the highest resident size
above that before the call, the logits themselves not counted. Figures are printed as ratios to eager `F.cross_entropy`
of the same 2N rows and appended to benchmarks/results/rows.jsonl, one JSON object a line.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rdrop import kernels, rdrop_loss

ALPHA, SMOOTHING, IGNORED = 5.0, 0.1, -100
SIZES = ((1024, 32_768), (512, 50_265), (256, 128_256))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = Path(__file__).with_name("results") / "rows.jsonl"
Form = Callable[[Tensor, Tensor], Tensor]


# ---------------------------------------------------------------------------------------------- the forms


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """No R-Drop: plain cross-entropy of the same rows, what everything else is compared with."""
    return F.cross_entropy(logits, labels.repeat(2), label_smoothing=SMOOTHING)


def official(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss as it is usually written: two cross-entropies, two `kl_div` with softmax targets."""
    first, second = logits.chunk(2)
    task = sum(F.cross_entropy(rows, labels, label_smoothing=SMOOTHING) for rows in (first, second)) / 2
    valid = labels != IGNORED
    forward = F.kl_div(F.log_softmax(first, -1), F.softmax(second, -1), reduction="none")
    backward = F.kl_div(F.log_softmax(second, -1), F.softmax(first, -1), reduction="none")
    forward, backward = (kl.masked_fill(~valid[:, None], 0.0).sum() for kl in (forward, backward))
    return task + ALPHA / 2 * (forward + backward) / 2 / valid.sum()


def tidy(logits: Tensor, labels: Tensor) -> Tensor:
    """One `log_softmax` for everything, `kl_div` between logarithms."""
    log_p = logits.log_softmax(-1)
    uniform = -log_p.mean(-1)
    valid = labels != IGNORED
    targets = labels.masked_fill(~valid, 0).repeat(2)
    nll = -log_p.gather(-1, targets[:, None])[:, 0]
    task = ((1 - SMOOTHING) * nll + SMOOTHING * uniform).masked_fill(~valid.repeat(2), 0.0).sum() / 2
    p, q = log_p.chunk(2)
    kl = F.kl_div(p, q, log_target=True, reduction="none") + F.kl_div(q, p, log_target=True, reduction="none")
    return (task + ALPHA / 2 * (kl.sum(-1) / 2).masked_fill(~valid, 0.0).sum()) / valid.sum()


def ours(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return rdrop_loss(logits, labels, alpha=ALPHA, label_smoothing=SMOOTHING, **options).loss


def reference(logits: Tensor, labels: Tensor) -> Tensor:
    return ours(logits, labels, implementation="reference")


def kernel(logits: Tensor, labels: Tensor) -> Tensor:
    return ours(logits, labels, implementation="cpu")


def kernel_overwriting(logits: Tensor, labels: Tensor) -> Tensor:
    return ours(logits, labels, implementation="cpu", overwrite_logits=True)


def kernel_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Plain cross-entropy by the same kernel in the same way: the floor of `kernel_overwriting`."""
    targets = labels.repeat(2)
    valid = targets != IGNORED
    scale = (1 / valid.sum()).expand(len(targets))
    options = {"weight": None, "label_smoothing": SMOOTHING, "passes": 1, "implementation": "cpu"}
    targets = targets.masked_fill(~valid, kernels.IGNORED)
    return kernels.overwriting_loss(logits, targets, scale, torch.zeros_like(scale), **options)[0].sum()


def forms(*, compiled: bool) -> dict[str, Form]:
    eager = (cross_entropy, official, tidy, reference, kernel, kernel_overwriting, kernel_cross_entropy)
    table: dict[str, Form] = {form.__name__: form for form in eager}
    if compiled:
        table |= {f"{form.__name__}_compiled": torch.compile(form) for form in (cross_entropy, tidy)}
    return table


# ---------------------------------------------------------------------------------------------- measuring


class _Model(torch.autograd.Function):
    """Stands for the model below: gives its logits, drops their gradient, costs nothing."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, logits: Tensor) -> Tensor:
        return logits.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        return None, None


CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def seconds(form: Form, logits: Tensor, labels: Tensor, clock: Callable[[], float]) -> float:
    fresh = _Model.apply(torch.zeros((), requires_grad=True), logits)
    start = clock()
    form(fresh, labels).backward()
    return clock() - start


def peak_extra_bytes(form: Form, logits: Tensor, labels: Tensor) -> int | None:
    """Highest resident size during the call above that before it; None where the system does not tell."""
    fresh = _Model.apply(torch.zeros((), requires_grad=True), logits)
    try:
        ctypes.CDLL(None).malloc_trim(0)  # memory the allocator kept from earlier forms would hide this one's
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
        before = _resident_bytes("VmRSS")
        form(fresh, labels).backward()
        return _resident_bytes("VmHWM") - before
    except (OSError, AttributeError):
        return None


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def measure(rows: int, classes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    g = torch.Generator().manual_seed(0)
    first = 3 * torch.randn(rows, classes, generator=g)
    logits = torch.cat([first, first + 0.5 * torch.randn(rows, classes, generator=g)]).to(DTYPES[options.dtype])
    labels = torch.randint(0, classes, (rows,), generator=g)
    labels[::10] = IGNORED
    table = forms(compiled=options.compile)
    times: dict[str, list[float]] = {name: [] for name in table}
    for form in table.values():  # compiles, loads, warms up
        seconds(form, logits, labels, CLOCKS[options.clock])
    memory = {name: peak_extra_bytes(form, logits, labels) for name, form in table.items()}
    for _ in range(options.rounds):
        for name, form in table.items():
            times[name].append(seconds(form, logits, labels, CLOCKS[options.clock]))
    return [record(name, times[name], memory[name], rows, classes, options) for name in table]


def record(
    name: str, times: list[float], memory: int | None, rows: int, classes: int, options: argparse.Namespace
) -> dict[str, Any]:
    p20, *_, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return {
        "what": f"{name}: forward and backward from logits, {options.clock} time",
        "form": name,
        "unit": "s",
        "median": statistics.median(times),
        "p20": p20,
        "p80": p80,
        "rounds": len(times),
        "peak_extra_bytes": memory,
        "rows": rows,
        "classes": classes,
        "dtype": options.dtype,
        "device": f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/rows.py", *sys.argv[1:]]),
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


# ---------------------------------------------------------------------------------------------- the table


def show(records: list[dict[str, Any]]) -> None:
    base = next(r for r in records if r["form"] == "cross_entropy")
    print(f"\n{base['rows']} pairs x {base['classes']} classes, {base['dtype']}, {base['threads']} threads")
    print(f"{'form':28} {'median s':>9} {'p20':>7} {'p80':>7} {'time':>7} {'MB':>7} {'memory':>7}   (ratios to eager)")
    for r in sorted(records, key=lambda r: -r["median"]):
        time_ratio = r["median"] / base["median"]
        memory = "      -       -"
        if r["peak_extra_bytes"] is not None and base["peak_extra_bytes"]:
            megabytes = r["peak_extra_bytes"] / 1e6
            memory = f"{megabytes:7.0f} {r['peak_extra_bytes'] / base['peak_extra_bytes']:7.3f}"
        print(f"{r['form']:28} {r['median']:9.4f} {r['p20']:7.4f} {r['p80']:7.4f} {time_ratio:7.3f} {memory}")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rows", type=int, nargs="+", default=[rows for rows, _ in SIZES], help="N, one per size")
    arguments.add_argument("--classes", type=int, nargs="+", default=[classes for _, classes in SIZES])
    arguments.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--clock", choices=CLOCKS, default="cpu")
    arguments.add_argument("--no-compile", dest="compile", action="store_false", help="leave out torch.compile's forms")
    arguments.add_argument("--output", type=Path, default=RESULTS)
    options = arguments.parse_args()
    if len(options.rows) != len(options.classes):
        arguments.error(f"{len(options.rows)} --rows and {len(options.classes)} --classes: give as many of each")
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for rows, classes in zip(options.rows, options.classes, strict=True):
        records = measure(rows, classes, options)
        show(records)
        with options.output.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)


if __name__ == "__main__":
    main()

"""All that is to be measured on a GPU, in under nine minutes and without a network: `python -m benchmarks.gpu FOLDER`.

The most valuable comes first, and each part writes its file as soon as it is done, so that a run that is cut off has
still given something. A part that fails or takes too long is recorded and does not stop the next ones.

    summary.json   the card, versions, and of each part: done, failed or out of time, in how many seconds
    checks.jsonl   the kernel on this card: values and gradients against float64, no wait for the device
    gpu.jsonl      the records of `rdrop bench`, for benchmarks/results
    shapes.jsonl   the kernel's time with other block sizes, and which is best: a row for `SHAPES` of kernels/triton.py
    multi30k.jsonl of each arm of a training: BLEU on valid, updates and target tokens a second, up to where it came
    PART.log       what a part printed

`--rehearse` does the same in small on a CPU, by Triton's interpreter; `--parts` names some of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ARMS = {
    "baseline": ("alpha=0", "precision=bf16"),
    "r-drop": ("alpha=5", "alpha_schedule=quadratic", "precision=bf16"),
}
"""Of the training at the end, beside the recipe's own settings: alpha rises late, as long as little is learned."""
BUDGET = 9 * 60
RESERVE = 10
"""Seconds that are kept for the files to be written."""


@dataclass(frozen=True)
class Part:
    """A process of its own: its arguments to Python, and the most seconds it may take; a rehearsal has no limits.

    Of what is left when it begins it takes one of `shares`: so both arms of a training have the same time.
    """

    name: str
    arguments: Sequence[str]
    seconds: float = math.inf
    shares: int = 1


def parts(folder: Path, *, rehearse: bool, data: Path | None = None) -> list[Part]:
    """Returns what is run, the most valuable first."""
    device = "cpu" if rehearse else "cuda"
    me = ["-m", "benchmarks.gpu", str(folder), *(["--rehearse"] if rehearse else []), "--do"]
    bench = ["-m", "rdrop", "bench", "--device", device, "--output", str(folder / "gpu.jsonl")]
    if rehearse:
        once = ["--classes", "64", "--rounds", "1", "--no-compile", "--threads", "1"]
        small = ["--pairs", "8", *once]
        steps = ["--batch", "2", "--length", "4", "--layers", "1", *once]
        return [
            Part("checks", [*me, "checks"]),
            Part("logits", [*bench, "logits", *small]),
            Part("hidden", [*bench, "hidden", *small, "--features", "16"]),
            Part("shapes", [*me, "shapes"]),
            Part("steps", [*bench, "steps", *steps]),
            *_trainings(
                folder,
                [
                    "tiny=true",
                    "batch_size=null",
                    "batch_tokens=64",
                    "updates=2",
                    "warmup_updates=1",
                    "evaluate_every=2",
                ],
            ),
        ]
    bf16 = ["--dtype", "bfloat16", "--pairs", "4096", "--rounds", "10"]
    hidden = [*bench, "hidden", *bf16, "--features", "4096", "--classes"]
    steps = ["--dtype", "bfloat16", "--rounds", "3", "--batch", "64", "--length", "64"]
    listed = [
        Part("checks", [*me, "checks"], 100),
        *(Part(f"logits-{v}", [*bench, "logits", *bf16, "--classes", str(v)], 55) for v in (128_256, 32_768, 50_265)),
        Part("hidden-128256", [*hidden, "128256"], 75),
        Part("shapes", [*me, "shapes"], 55),
        Part("steps", [*bench, "steps", *steps, "--classes", "50265"], 75),
        *(Part(f"hidden-{v}", [*hidden, str(v)], 35) for v in (32_768, 50_265)),
    ]
    return listed if data is None else [*listed, *_trainings(folder, [f"data.folder={data}"])]


def _trainings(folder: Path, changes: Sequence[str]) -> Iterator[Part]:
    for shares, (name, settings) in zip((2, 1), ARMS.items(), strict=True):
        runs = ["--runs", str(folder / "multi30k" / name)]
        arguments = ["-m", "rdrop", "train", "multi30k-en-de", *settings, *changes, *runs]
        yield Part(f"multi30k-{name}", arguments, BUDGET, shares)


def run(listed: Sequence[Part], folder: Path, *, budget: float = BUDGET, rehearse: bool = False) -> dict[str, Any]:
    """Runs the parts one after the other within the budget; returns and writes the summary after each."""
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + budget - RESERVE
    environment = os.environ | ({"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if rehearse else {})
    summary: dict[str, Any] = {"about": about(), "budget": budget, "parts": {}}
    for part in listed:
        left = None if rehearse else min(part.seconds, (end - time.monotonic()) / part.shares)
        summary["parts"][part.name] = _run_part(part, folder, left, environment)
        if part.name.startswith("multi30k"):
            write_trainings(folder)
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def _run_part(part: Part, folder: Path, seconds: float | None, environment: dict[str, str]) -> dict[str, Any]:
    if seconds is not None and seconds <= 0:
        return {"state": "out of time", "seconds": 0.0}
    started = time.monotonic()
    with (folder / f"{part.name}.log").open("w", encoding="utf-8") as log:
        try:
            status = subprocess.run(
                [sys.executable, *part.arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                env=environment,
                check=False,
            ).returncode
            state = "done" if status == 0 else f"failed with exit status {status}"
        except subprocess.TimeoutExpired:
            state = "out of time"
    return {"state": state, "seconds": round(time.monotonic() - started, 1)}


def write_trainings(folder: Path) -> None:
    """Writes what each arm has come to, finished or not: its last score of valid."""
    from rdrop.experiments.run_folder import RunFolder, find_runs

    rows = []
    for arm in (arm for arm in ARMS if (folder / "multi30k" / arm).is_dir()):
        for found in find_runs(folder / "multi30k" / arm):
            scores = [row for row in RunFolder(found.path).metrics() if row["kind"] == "valid"]
            if scores:
                last = scores[-1]
                speed = last["step"] / last["seconds"]
                tokens = speed * RunFolder(found.path).recipe()["batch_tokens"]
                rows.append({"arm": arm, **last, "updates_per_second": speed, "most_tokens_per_second": tokens})
    (folder / "multi30k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def about() -> dict[str, Any]:
    """Returns what the figures are of: the card, the versions of what computes, and which peers are not here."""
    import torch

    from rdrop.bench import peers

    found: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    found["peers left out"] = peers.missing(peers.FROM_LOGITS) | peers.missing(peers.FROM_HIDDEN)
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    return found


# -------------------------------------------------------------------------------------------------------- the checks


def checks(*, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Yields one row for each kind of logits: the errors of loss and gradient against float64, and what was refused."""
    import torch

    device = "cpu" if rehearse else "cuda"
    dtypes = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
    for dtype, classes, passes in itertools.product(dtypes, (33, 70) if rehearse else (1000, 50_265, 128_256), (2, 3)):
        row: dict[str, Any] = {"dtype": dtype, "classes": classes, "passes": passes}
        row |= _errors(device, getattr(torch, dtype), classes, passes)
        row["holds"] = row["loss_error"] < 1e-4 and row["gradient_error"] < dtypes[dtype]
        yield row
    for name in ("eager", "torch.compile", "autocast"):
        if not (rehearse and name == "torch.compile"):
            yield {"check": f"without a wait for the device, {name}", **_waits_for_nothing(name, device)}


def _problem(device: str, dtype: Any, classes: int, passes: int, positions: int = 6) -> tuple[Any, Any]:
    import torch

    generator = torch.Generator().manual_seed(classes + passes)
    first = 3 * torch.randn(positions, classes, generator=generator)
    noise = 0.5 * torch.randn(passes, positions, classes, generator=generator)
    labels = torch.randint(0, classes, (positions,), generator=generator)
    labels[1] = -100
    return (first + noise).flatten(0, 1).to(dtype).to(device), labels.to(device)


def _loss_and_gradient(logits: Any, labels: Any, implementation: str) -> tuple[Any, Any]:
    from rdrop import rdrop_loss

    leaf = logits.detach().clone().requires_grad_()
    loss = rdrop_loss(leaf, labels, alpha=5.0, label_smoothing=0.1, implementation=implementation).loss  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), leaf.grad


def _errors(device: str, dtype: Any, classes: int, passes: int) -> dict[str, float]:
    """Returns the relative error of the loss and the largest of the gradient, in units of its largest entry."""
    logits, labels = _problem(device, dtype, classes, passes)
    loss, gradient = _loss_and_gradient(logits, labels, "triton")
    exact, exact_gradient = _loss_and_gradient(logits.double().cpu(), labels.cpu(), "reference")
    difference = (gradient.double().cpu() - exact_gradient).abs().max() / exact_gradient.abs().max()
    return {
        "loss_error": float(abs(loss.double().cpu() - exact) / abs(exact)),
        "gradient_error": float(difference),
    }


def _waits_for_nothing(around: str, device: str) -> dict[str, Any]:
    """Returns how far loss and gradient are from those of the eager call, where torch refuses every wait for a GPU."""
    import torch

    logits, labels = _problem(device, torch.bfloat16, 64 if device == "cpu" else 32_768, 2)
    loss, gradient = _loss_and_gradient(logits, labels, "triton")
    call = torch.compile(_loss_and_gradient) if around == "torch.compile" else _loss_and_gradient
    with torch.autocast(device, torch.bfloat16, enabled=around == "autocast"):
        call(logits, labels, "triton")  # compiled now
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            own, own_gradient = call(logits, labels, "triton")
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    difference = float((own_gradient.float() - gradient.float()).abs().max() / gradient.float().abs().max())
    found = {"loss_difference": float(abs(own - loss) / abs(loss)), "gradient_difference": difference}
    return found | {"holds": found["loss_difference"] < 1e-4 and difference < 1e-2}


# -------------------------------------------------------------------------------------------------------- the shapes


MOST_WARPS = 32
"""Of a program: 1,024 threads."""


def shapes(*, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Yields the kernel's median time for each shape of its programs and size of vocabulary; then the best shape."""
    from rdrop.bench.measure import Conditions
    from rdrop.bench.rows import measure_rows
    from rdrop.kernels import triton

    conditions = Conditions(
        device="cpu" if rehearse else "cuda",
        dtype="float32" if rehearse else "bfloat16",
        rounds=1 if rehearse else 10,
        forms=("ours_overwriting",),
        compiled=False,
    )
    sizes = ((8, 64),) if rehearse else ((4096, 32_768), (4096, 128_256))
    blocks = ((32, 32), (64, 32)) if rehearse else itertools.product((1024, 2048, 4096, 8192), (128, 256, 512, 1024))
    totals: dict[triton.Shape, float] = {}
    before, triton.DEFAULT_SHAPE = triton.DEFAULT_SHAPE, triton.DEFAULT_SHAPE
    try:
        for shape in itertools.starmap(triton.Shape, blocks):
            if shape.max_block // shape.classes_per_warp > MOST_WARPS:
                continue
            triton.DEFAULT_SHAPE = shape
            triton.SHAPES.clear()
            for pairs, classes in sizes:
                found = {record["form"]: record for record in measure_rows(pairs, classes, conditions)}
                median = found["ours_overwriting"]["median"]
                yield {**shape._asdict(), "pairs": pairs, "classes": classes, "median": median}
                totals[shape] = totals.get(shape, 0.0) + (median or float("inf")) / pairs / classes
    finally:
        triton.DEFAULT_SHAPE = before
    best = min(totals, key=totals.__getitem__)
    yield {"best": best._asdict(), "row": f"{about().get('device', 'cpu')!r}: Shape{tuple(best)},"}


DOING: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"checks": checks, "shapes": shapes}


def do(name: str, folder: Path, *, rehearse: bool) -> bool:
    """Runs one of this file's own parts, a line of its file for each row as soon as it is there; whether all held."""
    held = True
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for row in DOING[name](rehearse=rehearse):
            file.write(json.dumps(row) + "\n")
            file.flush()
            held &= bool(row.get("holds", True))
    return held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--parts", nargs="+", metavar="PART")
    parser.add_argument("--data", type=Path, help="the folder of Multi30k, for the training at the end")
    parser.add_argument("--do", choices=DOING, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.do:
        sys.exit(0 if do(options.do, options.folder, rehearse=options.rehearse) else 1)
    listed = parts(options.folder, rehearse=options.rehearse, data=options.data)
    if options.parts:
        names = [part.name for part in listed]
        if unknown := set(options.parts).difference(names):
            parser.error(f"--parts: no {', '.join(sorted(unknown))}; there are {', '.join(names)}")
        listed = [part for part in listed if part.name in options.parts]
    summary = run(listed, options.folder, rehearse=options.rehearse)
    for name, found in summary["parts"].items():
        print(f"{found['seconds']:6.1f} s  {name}: {found['state']}")
    sys.exit(0 if all(found["state"] == "done" for found in summary["parts"].values()) else 1)


if __name__ == "__main__":
    main()

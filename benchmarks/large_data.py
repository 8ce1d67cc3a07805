"""How long starts take: `python -m benchmarks.large_data FOLDER [--pairs N ...] [--commands]`.

It makes the data in FOLDER: with `--pairs N` pairs of synthetic sentences, with `--lines` lines of text to model, with
`--texts` texts of two classes, with `--images` files of small images in 1,000 classes. Then two
processes, one after the other, load them as `rdrop train` does and make one update each. The first finds no cache. The
records, one line for each process, go to benchmarks/results/large.jsonl. 10 million pairs take about
half an hour and 12 GB of disk.

`--commands` times the commands that train nothing, from a short comparison in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rdrop.bench.measure import origin
from rdrop.bench.records import append

RESULTS = Path(__file__).resolve().parent / "results/large.jsonl"
WORDS, MEAN_LENGTH, LINES_AT_ONCE = 30_000, 12, 100_000
CLASSES, NAMES_OF_ONE_FILE = 1_000, 1_300  # a file system allows 65,000 names of one file
SPLITS = ("train", "valid", "test")
KINDS = ("pairs", "lines", "texts", "images")


def write_sentences(folder: Path, size: int, ending: str, seed: int, header: str = "", label: bool = False) -> None:
    """Writes `train`, `valid` and `test` with words drawn by Zipf's law, of letters that are the seed's own."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = generator.integers(2, 10, WORDS)
    words = np.array(["".join(generator.choice(letters, length)) for length in lengths], dtype=object)
    weights = 1 / np.arange(1, WORDS + 1)
    bounds = np.cumsum(weights / weights.sum())
    for split, count in zip(SPLITS, (size, 2_000, 2_000), strict=True):
        with (folder / f"{split}.{ending}").open("w") as file:
            file.write(header)
            for start in range(0, count, LINES_AT_ONCE):
                ends = np.cumsum(generator.integers(4, 2 * MEAN_LENGTH - 3, min(LINES_AT_ONCE, count - start)))
                drawn = words[np.searchsorted(bounds, generator.random(ends[-1])).clip(max=WORDS - 1)].tolist()
                for a, b in pairwise([0, *ends.tolist()]):
                    file.write(" ".join(drawn[a:b]) + (f"\t{'ab'[a % 2]}\n" if label else "\n"))


def write_pairs(folder: Path, pairs: int) -> None:
    for seed, side in enumerate(("source", "target")):
        write_sentences(folder, pairs, side, seed)


def write_lines(folder: Path, lines: int) -> None:
    write_sentences(folder, lines, "txt", 0)


def write_texts(folder: Path, texts: int) -> None:
    write_sentences(folder, texts, "tsv", 0, "text\tlabel\n", label=True)


def write_images(folder: Path, images: int) -> None:
    """Writes the class folders; each file has many names, so that they cost no more than their entries."""
    generator, of_class = np.random.default_rng(0), images // CLASSES
    for label in range(CLASSES):
        path = folder / f"class-{label:04}"
        path.mkdir(parents=True)
        for number in range(of_class):
            name, first = path / f"{number:05}.png", path / f"{number - number % NAMES_OF_ONE_FILE:05}.png"
            if name == first:
                Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(name)
            else:
                os.link(first, name)


def settings_of(kind: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Returns the recipe, and the settings of a small model on the data in the folder."""
    if kind == "images":
        return "cifar-10-4k", {"data.train": str(folder), "batch_size": 64}
    if kind == "lines":
        return "language-modeling-from-scratch", {"data.folder": str(folder), "model.layers": 1}
    if kind == "texts":
        sizes = {"vocabulary": 8000, "layers": 1, "hidden_size": 64, "heads": 2, "intermediate_size": 128}
        model = {f"model.{name}": value for name, value in ({"name": None} | sizes).items()}
        return "text-classification", {"data.folder": str(folder), "data.max_length": 64} | model
    data = {"data.folder": str(folder), "data.vocabulary": 8000, "batch_size": None, "batch_tokens": 4096}
    return "translation", data | {"model.hidden_size": 64, "model.intermediate_size": 128}


def start(kind: str, folder: Path) -> dict[str, Any]:
    """Loads the data as `rdrop train` does, and makes one update; returns seconds, and the most memory it took."""
    clocks = [(time.perf_counter(), time.process_time())]
    import torch

    from rdrop import rdrop_loss, repeat_batch
    from rdrop.experiments.recipes import find_recipe
    from rdrop.experiments.tasks.task import load_task
    from rdrop.experiments.training.order import DataOrder

    name, settings = settings_of(kind, folder)
    recipe = find_recipe(name).replace(**settings)
    clocks.append((time.perf_counter(), time.process_time()))
    task: Any = load_task(recipe)
    clocks.append((time.perf_counter(), time.process_time()))
    order = DataOrder(recipe, task.train_size(), task.train_lengths())
    epoch, rows = order.at(0)
    batch = task.train_batch(rows.tolist(), epoch)
    model = task.build_model().train()
    labels = task.labels(batch)
    loss = rdrop_loss(task.logits(model, repeat_batch(batch, 2)), labels, alpha=1.0, ignore_index=-100).loss
    loss.backward()
    assert torch.isfinite(loss)
    clocks.append((time.perf_counter(), time.process_time()))
    spans = [tuple(after - before for before, after in zip(*two, strict=True)) for two in pairwise(clocks)]
    wall, processor = ([span[clock] for span in spans] for clock in (0, 1))
    found = {"seconds": wall, "processor_seconds": processor, "examples": task.train_size()}
    tokens = {
        "pairs": lambda: sum(len(side.ids) for side in task._splits["train"]),
        "lines": lambda: len(task._tokens["train"].ids),
        "texts": lambda: len(task._inputs["train"]["input_ids"].ids),
    }
    return found | {
        "tokens": tokens[kind]() if kind in tokens else None,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure(kind: str, size: int, folder: Path, command: str) -> list[dict[str, Any]]:
    data, cache = folder / f"{kind}-{size}", folder / "cache"
    if not data.exists():
        {"pairs": write_pairs, "lines": write_lines, "texts": write_texts, "images": write_images}[kind](data, size)
    shutil.rmtree(cache, ignore_errors=True)
    records = []
    for which in ("first", "second"):
        arguments = [sys.executable, "-m", "benchmarks.large_data", str(data), "--start", kind]
        environment = os.environ | {"RDROP_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(arguments, env=environment, check=True, stdout=subprocess.PIPE, text=True)
        kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
        load = {"start": which, "kind": kind, "size": size, "cache_bytes": kept, "load_before": os.getloadavg()[0]}
        records.append(load | json.loads(done.stdout.splitlines()[-1]) | {"threads": 1, **origin(), "command": command})
        print(json.dumps(records[-1]))
    return records


def measure_commands(folder: Path, command: str) -> list[dict[str, Any]]:
    """Starts each command five times and takes the median, so the files are in the memory of the system."""
    program, runs = [sys.executable, "-m", "rdrop"], str(folder / "runs")
    short = ["updates=40", "warmup_steps=4", "evaluate_every=10"]
    subprocess.run([*program, "compare", "digits", "--seeds", "2", "--runs", runs, *short], check=True)
    records = []
    for arguments in (["--help"], ["list"], ["compare", "--help"], ["report", "--help"], ["report", runs]):
        wall, processor = [], []
        for _ in range(5):
            before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([*program, *arguments], check=True, stdout=subprocess.DEVNULL)
            wall.append(time.perf_counter() - started)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            processor.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        what = " ".join(["rdrop", *arguments]).replace(runs, "runs")
        seconds = {"seconds": statistics.median(wall), "processor_seconds": statistics.median(processor)}
        load = {"kind": "command", "what": what, "load_before": os.getloadavg()[0]}
        records.append(load | seconds | {"threads": 1, **origin(), "command": command})
        print(json.dumps(records[-1]))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, nargs="*", default=[])
    parser.add_argument("--commands", action="store_true")
    parser.add_argument("--start", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        print(json.dumps(start(arguments.start, arguments.folder)))
        return
    for kind in KINDS:
        for size in getattr(arguments, kind):
            command = shlex.join(["python", "-m", "benchmarks.large_data", "FOLDER", f"--{kind}", str(size)])
            append(measure(kind, size, arguments.folder, command), RESULTS)
    if arguments.commands:
        command = "python -m benchmarks.large_data FOLDER --commands"
        append(measure_commands(arguments.folder, command), RESULTS)


if __name__ == "__main__":
    main()

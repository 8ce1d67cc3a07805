"""Choose how many runs train at a time on this machine, and what each is given of it."""

from __future__ import annotations

import os

from rich.console import Console


def find_places(jobs: int | None, console: Console) -> list[dict[str, str]]:
    """Returns, for each run that may train at a time, what its environment says more: its GPU, or its threads.

    `jobs` None decides by the machine: a run on each GPU; without any, as many as there is room for by
    OMP_NUM_THREADS, which is 2 unless it is set. Says so where runs would share cores.
    """
    if jobs == 1:
        return [{}]
    gpus = _visible_gpus()
    cores = _cores()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    added: dict[str, str] = {}
    if jobs is None and not gpus and not threads.isdigit():
        threads = "2"
        added = {"OMP_NUM_THREADS": threads}
    if jobs is None:
        jobs = len(gpus) or max(1, cores // max(1, int(threads)))
        if jobs == 1:
            return [{}]
        each = "a GPU each" if gpus else f"OMP_NUM_THREADS={threads} each"
        console.print(f"{jobs} runs at a time, {each}", highlight=False)
    elif not gpus:
        own = int(threads) if threads.isdigit() else cores
        if jobs * own > cores:
            console.print(
                f"{jobs} runs at a time, with {own} threads each, share {cores} cores and slow each other down. "
                f"OMP_NUM_THREADS={max(1, cores // jobs)} before the command gives each cores of its own; runs with "
                "another number of threads differ in the last bits.",
                highlight=False,
                soft_wrap=True,
            )
    return [{"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else added for place in range(jobs)]


def _visible_gpus() -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Evaluation by several processes: each computes some of the batches, and all have the results of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed

Part = TypeVar("Part")
Found = TypeVar("Found")


class Share:
    """What one of several processes computes of an evaluation: every so many batches, those after it in turn.

    Each batch is computed as one process would, and the results have its order: sums over them are the same to the bit.
    `poll` is called by all processes at the same batches, and may raise in all of them.
    """

    def __init__(self, process: int = 0, processes: int = 1, poll: Callable[[], object] = lambda: None) -> None:
        self.process, self.processes, self.poll = process, processes, poll

    def map(self, function: Callable[[Part], Found], parts: Sequence[Part]) -> list[Found]:
        """Returns `[function(part) for part in parts]` in every process; a part is computed by one of them."""
        if self.processes == 1:
            return [function(part) for part in parts]
        own = []
        for turn in range(self.process, self.process + len(parts), self.processes):
            self.poll()
            if turn < len(parts):
                own.append(function(parts[turn]))
        found = self.gather(own)
        return [found[place % self.processes][place // self.processes] for place in range(len(parts))]

    def gather(self, own: list[Found]) -> list[list[Found]]:
        """Returns what each process has, in every process."""
        found: list[list[Found]] = [[] for _ in range(self.processes)]
        torch.distributed.all_gather_object(found, own)
        return found


ALONE = Share()

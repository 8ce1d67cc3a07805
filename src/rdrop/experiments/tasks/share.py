"""Evaluation by several processes: each computes some of the batches, and all have the results of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed

Part = TypeVar("Part")
Found = TypeVar("Found")


class Share:
    """A process's part of an evaluation that several processes share: one batch in every turn.

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
        for turn in range(-(-len(parts) // self.processes)):
            self.poll()
            place = turn * self.processes + self._at(turn, self.process)
            if place < len(parts):
                own.append(function(parts[place]))
        found = self.gather(own)
        turns = (divmod(place, self.processes) for place in range(len(parts)))
        return [found[self._at(turn, at)][turn] for turn, at in turns]

    def _at(self, turn: int, process: int) -> int:
        """The place of a process in a turn, and the process at a place: they alternate, for batches come by size."""
        return process if turn % 2 == 0 else self.processes - 1 - process

    def gather(self, own: list[Found]) -> list[list[Found]]:
        """Returns what each process has, in every process."""
        found: list[list[Found]] = [[] for _ in range(self.processes)]
        torch.distributed.all_gather_object(found, own)
        return found


ALONE = Share()

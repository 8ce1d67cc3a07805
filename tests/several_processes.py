"""The environment of processes that train together, as torchrun makes it, without its launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed import TCPStore


@contextmanager
def environments(processes: int) -> Iterator[list[dict[str, str]]]:
    """Yields the environment of each of several processes, which meet at a store of this one.

    The store chooses its port and has it before they start, so nothing else can take it in between.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(processes),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCH_GLOO_LAZY_INIT": "1",
        "OMP_NUM_THREADS": "1",
    }
    yield [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]

"""Processes that train together, started as torchrun starts them, without its launcher."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore


def outputs_of(processes: int, *command: str, **environment: str) -> list[str]:
    """Runs `python *command` in several processes at once and returns what each said; all must end well.

    They meet at a store of this process. It chooses its port and has it before they start, so nothing else can take it
    in between.
    """
    own_path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
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
        "PYTHONPATH": os.pathsep.join(own_path),
        **environment,
    }
    running = [
        subprocess.Popen(
            [sys.executable, *command],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        outputs = [process.communicate()[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * processes, "\n".join(outputs)
    return outputs


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """Lets Accelerate shard on CPUs too, which it does on accelerators only."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    own = AcceleratorState.__init__

    def start(self: Any, *args: Any, fsdp_plugin: Any = None, **options: Any) -> None:
        own(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = start
    try:
        yield
    finally:
        AcceleratorState.__init__ = own

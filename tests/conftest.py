"""What all tests need: a GPU's kernels where there is none, Ctrl-C, a quick garbage collector, and `--keep`.

Triton's interpreter must be chosen before triton is imported. A shell starts what it runs in the background with
SIGINT ignored, and so do their children.
"""

import gc
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# No test fails because the machine is busy, and none leaves a file.
settings.register_profile("rdrop", deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rdrop")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--keep", type=Path, metavar="FILE", help="keep outcomes in FILE, and leave out what has passed")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("keep"):
        from tests.outcomes import Outcomes

        config.pluginmanager.register(Outcomes(file, config))


def pytest_collection_finish() -> None:
    """Takes what the imports left out of the garbage collector: every training collects, and it would look at all."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def interpreter():
    """Mends Triton's interpreter to the end of the session."""
    from tests.interpreter import like_a_gpu

    with like_a_gpu():
        yield

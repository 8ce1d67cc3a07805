"""Fixtures of the tests that train with a Trainer."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module", autouse=True)
def imported_modules_are_not_collected_again() -> Iterator[None]:
    """The Trainer calls `gc.collect()` before it trains, which costs more than the training itself here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)

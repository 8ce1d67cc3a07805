"""The real data that some tests read: folders of published data sets below RDROP_DATA, by default ../shared/data."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("RDROP_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real_data(name: str) -> Path:
    """Returns the folder `name`. Where it is missing the test is skipped, or fails on CI."""
    folder = DATA / name
    if not folder.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"RDROP_DATA has no {name}: {folder} is no folder")
        pytest.skip(f"needs the {name} files of RDROP_DATA, and {folder} is no folder")
    return folder

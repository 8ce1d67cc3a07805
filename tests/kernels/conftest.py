"""All tests of the kernels have the mended interpreter of Triton."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _mended(interpreter):
    """Asks for the fixture of all tests."""

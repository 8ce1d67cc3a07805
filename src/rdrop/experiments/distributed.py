"""The place of this process among those that train one run, as torchrun or `accelerate launch` has told it."""

import os


def is_first_process() -> bool:
    """Whether this process shows and writes: the only one, or the first of those that train one run together."""
    return os.environ.get("RANK", "0") == "0"


def in_several_processes() -> bool:
    """Whether several processes train one run together, and must all do the same."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1

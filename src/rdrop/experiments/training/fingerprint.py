"""A fingerprint of training data: the weights of a run have a meaning with its vocabulary and classes alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
from torch import Tensor

from rdrop.experiments.tasks.task import Batch, LearnsFromUnlabeled, Task

EXAMPLES = 64


def fingerprint(task: Task) -> str:
    """Returns 12 hexadecimal digits of the number of training examples, and the tokens and classes of some of them.

    They are spread over all of the data, and so are those without labels. Only whole numbers count: pixels may differ
    in the last bit from one machine, or version of a library, to the next.
    """
    digest = hashlib.sha256(_bytes_of(task.train_size(), task.train_batch))
    if isinstance(task, LearnsFromUnlabeled) and task.unlabeled_size():
        digest.update(_bytes_of(task.unlabeled_size(), task.unlabeled_batch))
    return digest.hexdigest()[:12]


def _bytes_of(size: int, batch: Callable[[list[int], int], Batch]) -> bytes:
    rows = np.unique(np.linspace(0, size - 1, min(size, EXAMPLES)).round().astype(int)).tolist()
    found = [str(size).encode()]
    for name, value in sorted(batch(rows, 0).items()):
        if isinstance(value, Tensor) and not value.is_floating_point():
            found += [f"{name} {tuple(value.shape)}".encode(), value.long().numpy().tobytes()]
    return b"".join(found)

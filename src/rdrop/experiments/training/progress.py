"""How far a training is, as the loop tells it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """What `on_progress` is told after every update and every score."""

    step: int
    updates: int
    loss: float
    valid: dict[str, float] | None
    """The newest scores on the valid split."""
    seconds_per_step: float
    """Of this session, evaluation and checkpoints included: times the steps left, the time left."""

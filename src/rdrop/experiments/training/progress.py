"""Describes how far a training is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The state that `on_progress` gets after every update and every score."""

    step: int
    updates: int
    loss: float
    valid: dict[str, float] | None
    """The newest scores on the valid split."""
    seconds_per_step: float
    """Of this session, evaluation and checkpoints included: times the steps left, the time left."""
    warning: str | None = None
    """What should be said to whoever waits for this run; it is said once."""

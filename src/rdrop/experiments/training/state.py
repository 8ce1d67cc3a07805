"""The part of a checkpoint beside weights and optimizer."""

from dataclasses import dataclass, field

from rdrop.experiments.training.checkpoints import Checkpoint, CheckpointError


@dataclass
class RunState:
    """All that a checkpoint must know beside weights and optimizer: a JSON object."""

    step: int = 0
    """Updates done."""
    evaluated_step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    scores_since_best: int = 0
    averaged_steps: list[int] = field(default_factory=list)
    """The last scores whose weights the final score averages, if it does."""
    seconds: float = 0.0
    resumed: int = 0
    data: str = ""
    """The fingerprint of the training data."""
    files: dict[str, str] = field(default_factory=dict)
    """The content of the files that the data were read from."""
    start: dict[str, str] = field(default_factory=dict)
    """A note on the run whose weights this one started from."""
    processes: int | None = None
    """That made the updates so far; None in checkpoints of before."""
    sums: dict[str, float] = field(default_factory=dict)
    """Of what the next `train` row averages, with the counts."""
    counts: dict[str, int] = field(default_factory=dict)

    def note(self, measured: dict[str, float]) -> None:
        """Adds what an update measured to what the next `train` row averages."""
        for name, value in measured.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def means(self) -> dict[str, float]:
        """Returns the means of what was noted since the last row."""
        return {name: total / self.counts[name] for name, total in self.sums.items()}


def parse_state(checkpoint: Checkpoint) -> RunState:
    """Reads the state of a checkpoint. Raises `CheckpointError` for one that another version of rdrop has written."""
    try:
        return RunState(**checkpoint.state)
    except TypeError as error:
        raise CheckpointError(
            f"{checkpoint.path} was written by another version of rdrop ({error}). Resume it with that version, or "
            f"delete {checkpoint.path.parent} to start the run again."
        ) from error

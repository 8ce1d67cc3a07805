"""A task that trains in milliseconds and has what makes a loop go wrong: ragged labels, dropout, tied weights.

Run as a script it is one process of a distributed run: `python tiny_runs.py FOLDER key=value ...`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rdrop.experiments.recipe import ModelSection, Recipe, override
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.recipe.settings import Probability, Section
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.training import checkpoints, trainer
from rdrop.terms import cross_entropy, symmetric_kl

VOCABULARY, WIDTH, POSITIONS = 11, 8, 5


class TinyModel(ModelSection):
    dropout: Probability
    fixed: bool


class TinyRecipe(Recipe):
    data: Section
    model: TinyModel


RECIPE = TinyRecipe(
    name="tiny",
    task="tiny",
    method=Method(alpha=2.0),
    updates=8,
    batch_size=8,
    accumulation=2,
    learning_rate=0.05,
    schedule="linear",
    warmup_updates=2,
    weight_decay=0.1,
    clip_norm=1.0,
    label_smoothing=0.1,
    evaluate_every=2,
    checkpoint_every=3,
    data=Section(),
    model=TinyModel(dropout=0.3, fixed=False),
)


class TinyTask:
    """From a token, predict the next; some positions have no label. `on_event` hears of every forward and score."""

    metric = "loss"
    task_loss = staticmethod(cross_entropy)
    divergence = staticmethod(symmetric_kl)
    on_event: Callable[[str], None] = staticmethod(lambda event: None)

    def __init__(self, recipe: TinyRecipe) -> None:
        self.recipe = recipe
        self.notes: dict[str, str] = {}
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randint(VOCABULARY, (44, POSITIONS), generator=generator)
        self.targets = (self.inputs * 3 + 1) % VOCABULARY
        lengths = torch.randint(0, POSITIONS + 1, (44, 1), generator=generator)
        self.targets[torch.arange(POSITIONS) >= lengths] = -100

    def build_model(self) -> nn.Module:
        return TinyNetwork(self.recipe.model.dropout, self.recipe.model.fixed)

    def train_size(self) -> int:
        return 28

    def train_lengths(self) -> np.ndarray:
        return (self.targets[:28] != -100).sum(1).clamp(min=1).numpy()

    def special_ids(self) -> frozenset[int]:
        return frozenset()

    def unknown_id(self) -> None:
        return None

    def train_batch(self, indices: list[int], epoch: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[indices], "labels": self.targets[indices]}

    def logits(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        type(self).on_event("forward")
        logits: Tensor = model(batch["inputs"])
        return logits

    def labels(self, batch: dict[str, Any]) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        type(self).on_event("evaluate")
        torch.rand(3), model(self.inputs[:1])  # evaluation may draw random numbers; training must not notice
        rows = slice(28, 36) if split == "valid" else slice(36, 44)
        logits = model(self.inputs[rows])
        return {"loss": F.cross_entropy(logits.flatten(0, 1), self.targets[rows].flatten()).item()}


TinyRecipe.TASK = TinyTask  # so that it is a task of one's own, `tests.experiments.tiny_runs:RECIPE`


class TinyNetwork(nn.Module):
    def __init__(self, dropout: float, fixed: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.dropout = FixedDropout(dropout) if fixed else nn.Dropout(dropout)
        self.output = nn.Linear(WIDTH, VOCABULARY)
        self.output.weight = self.embedding.weight

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.dropout(self.embedding(inputs))
        logits: Tensor = self.output(self.dropout(self.hidden(hidden).tanh()))
        return logits


class FixedDropout(nn.Dropout):
    """Makes the second pass differ from the first, the same way however the batch is cut."""

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.training:
            return hidden
        first, second = hidden.chunk(2)
        return torch.cat([first, second * 1.5])


def final_state(folder: Path) -> dict[str, Any]:
    """All that must be the same bits in two runs of one recipe: weights, optimizer, rows and scores; not the clock."""
    run = RunFolder(folder)
    result = run.result()
    assert result is not None
    last = max((folder / "checkpoints").glob("step-*[0-9]"))
    files = {name: (last / name).read_bytes() for name in (checkpoints.MODEL, checkpoints.OPTIMIZER)}
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in run.metrics()]
    return {
        "files": files,
        "rows": rows,
        "scores": [result["best_step"], result["valid"], result["test"]],
        "best": (folder / "checkpoints" / f"step-{result['best_step']:08d}" / checkpoints.MODEL).read_bytes(),
    }


if __name__ == "__main__":
    trainer.load_task = TinyTask  # type: ignore[assignment]
    trainer.train(override(RECIPE, sys.argv[2:]), Path(sys.argv[1]))

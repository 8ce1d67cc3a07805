"""Handwritten digits (scikit-learn's 8 x 8 images) from few labels, by a small network."""

from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from rdrop import cross_entropy, symmetric_kl
from rdrop.experiments.randomness import derived_seed
from rdrop.experiments.run_folder.predictions import Predictions, class_rows
from rdrop.experiments.tasks.class_scores import (
    calibration_error,
    constant_class_scores,
    note_on_predictions,
    notes_on_classes,
    prediction_spread,
    top_class_confidence,
)
from rdrop.experiments.tasks.share import ALONE
from rdrop.experiments.tasks.splits import stratified_draw
from rdrop.experiments.tasks.task import Batch, WithoutTokens

if TYPE_CHECKING:
    from rdrop.experiments.tasks.digits.recipes import DigitsModel, DigitsRecipe

IMAGE_SIZE = 8
CLASSES = tuple("0123456789")
BRIGHTEST = 16.0  # load_digits counts ink from 0 to 16
BACKGROUND = -1.0  # no ink, as the model sees it
EVALUATION_BATCH = 250


class Digits(WithoutTokens):
    """Which images are scored is decided by `data.split_seed`; which are labeled for training, by the run's `seed`.

    So all seeds are scored on the same images, and the luck of the labeled few is part of what the seeds vary.
    """

    metric = "accuracy"
    task_loss = staticmethod(cross_entropy)
    divergence = staticmethod(symmetric_kl)
    share = ALONE

    def __init__(self, recipe: "DigitsRecipe") -> None:
        self.predictions: Predictions | None = None
        self.signs: dict[str, float] = {}
        self._model = recipe.model
        images, target = read_digits()
        self._images = torch.tensor(images / BRIGHTEST * 2 - 1, dtype=torch.float32)[:, None]  # (N, 1, 8, 8)
        self._labels = torch.tensor(target)

        data = recipe.data
        self._shift, self._seed = data.shift, recipe.seed
        order = np.random.default_rng(data.split_seed).permutation(len(self._labels))
        valid, test, pool = np.split(order, [data.valid_size, data.valid_size + data.test_size])
        train = stratified_draw(pool, target, data.train_labels, recipe.seed)
        self.augments = data.shift > 0
        self.unlabeled_per_update = data.unlabeled_batch
        self._unlabeled = torch.tensor(pool if data.unlabeled == "all" else pool[:0])
        self.splits = {name: torch.tensor(rows) for name, rows in (("train", train), ("valid", valid), ("test", test))}
        labels = {name: target[rows] for name, rows in self.splits.items()}
        self.notes: dict[str, str] = notes_on_classes(CLASSES, labels)

    def build_model(self) -> nn.Module:
        model = self._model
        if model.kind == "mlp":
            return MultilayerPerceptron(model.layers, model.hidden_size, model.dropout)
        return vision_transformer(model)

    def train_size(self) -> int:
        return len(self.splits["train"])

    def unlabeled_size(self) -> int:
        return len(self._unlabeled)

    def train_batch(self, indices: list[int], epoch: int, view: int = 0) -> Batch:
        rows = self.splits["train"][indices]
        moves = self._moves("shift", self.train_size(), epoch, view)[indices]
        return {"pixel_values": self._moved(self._images[rows], moves), "labels": self._labels[rows]}

    def unlabeled_batch(self, indices: list[int], epoch: int, view: int = 0) -> Batch:
        moves = self._moves("shift unlabeled", self.unlabeled_size(), epoch, view)[indices]
        images = self._moved(self._images[self._unlabeled[indices]], moves)
        return {"pixel_values": images, "labels": torch.zeros(len(indices), dtype=torch.long)}

    def _moves(self, what: str, size: int, epoch: int, view: int) -> NDArray[np.int64]:
        """Draws for each of `size` images how far it moves in this view of this epoch: `(size, 2)`, from 0."""
        key = (self._seed, what, epoch) if view == 0 else (self._seed, what, epoch, view)
        return np.random.default_rng(derived_seed(*key)).integers(0, 2 * self._shift + 1, (size, 2))

    def _moved(self, images: Tensor, moves: NDArray[np.int64]) -> Tensor:
        """Moves each image by its own whole pixels; what comes in is background."""
        most, size = self._shift, IMAGE_SIZE
        padded = F.pad(images, (most, most, most, most), value=BACKGROUND)
        places = padded.unfold(2, size, 1).unfold(3, size, 1)  # (N, 1, 2 * most + 1, 2 * most + 1, 8, 8)
        y, x = torch.from_numpy(moves).T
        return places[torch.arange(len(images)), :, y, x]

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        output = model(pixel_values=batch["pixel_values"])
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits

    def labels(self, batch: Batch) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        rows = self.splits[split]
        device = next(model.parameters()).device

        def of_batch(part: Tensor) -> Tensor:
            return self.logits(model, {"pixel_values": self._images[part].to(device)}).float().cpu()

        scores = torch.cat(self.share.map(of_batch, torch.split(rows, EVALUATION_BATCH)))
        labels = self._labels[rows]
        predicted = scores.argmax(-1)
        is_right = predicted == labels
        if split == "valid":
            self.signs = prediction_spread(scores.numpy(), labels.numpy())
        if split == "test":
            self.notes |= note_on_predictions(split, CLASSES, predicted.numpy(), labels.numpy())
            names = (f"image {row} of load_digits" for row in rows.tolist())
            self.predictions = Predictions("classes", class_rows(names, scores.numpy(), labels.numpy()), CLASSES)
        return {
            "loss": F.cross_entropy(scores, labels).item(),
            "accuracy": is_right.double().mean().item(),
            "ece": calibration_error(top_class_confidence(scores.numpy()), is_right.numpy()),
        }

    def constant_scores(self) -> dict[str, float]:
        return constant_class_scores(self._labels[self.splits["test"]].numpy())


class MultilayerPerceptron(nn.Module):
    """Layers of one width with ReLU and dropout after each, and an output layer: from pixels to logits."""

    def __init__(self, layers: int, width: int, dropout: float) -> None:
        super().__init__()
        sizes = [IMAGE_SIZE**2, *[width] * layers]
        hidden = [part for size in pairwise(sizes) for part in (nn.Linear(*size), nn.ReLU(), nn.Dropout(dropout))]
        self.layers = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, len(CLASSES)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Returns logits `(N, 10)` for images `(N, 1, 8, 8)`."""
        logits: Tensor = self.layers(pixel_values)
        return logits


def read_digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Returns what scikit-learn's `load_digits` does: images `(1797, 8, 8)` of 0 to 16, and their classes.

    Its file is read as it is: to import scikit-learn takes as long as half of a short run.
    """
    package = find_spec("sklearn")
    assert package is not None  # the extra "experiments" has it
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], "datasets/data/digits.csv.gz")
    rows = np.loadtxt(path, delimiter=",")
    return rows[:, :-1].reshape(-1, IMAGE_SIZE, IMAGE_SIZE), rows[:, -1].astype(np.int64)


def vision_transformer(model: "DigitsModel") -> nn.Module:
    """Returns a new Vision Transformer of this size."""
    from transformers import ViTConfig, ViTForImageClassification  # seconds, which the mlp need not wait for

    options: dict[str, Any] = {
        "patch_size": model.patch_size,
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.heads,
        "intermediate_size": model.intermediate_size,
        # Both are 0 by default, and R-Drop would have nothing to act on.
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.attention_dropout,
        "num_labels": len(CLASSES),
    }
    return ViTForImageClassification(ViTConfig(image_size=IMAGE_SIZE, num_channels=1, **options))

"""Image classification: a pre-trained image transformer that is fine-tuned, or a small ViT from scratch."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    PreTrainedConfig,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.image_processing_base import ImageProcessingMixin

from rdrop import cross_entropy, symmetric_kl
from rdrop.experiments.randomness import derived_seed
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder.predictions import Predictions, class_rows
from rdrop.experiments.tasks.class_scores import (
    calibration_error,
    constant_class_scores,
    note_on_predictions,
    prediction_spread,
    top_class_confidence,
)
from rdrop.experiments.tasks.image_classification.augmentation import augment, to_pixel_values, whole
from rdrop.experiments.tasks.image_classification.data import (
    Split,
    Unlabeled,
    load_splits,
    note_on_unlabeled,
    notes_on,
    require_light,
)
from rdrop.experiments.tasks.image_classification.images import read_unlabeled
from rdrop.experiments.tasks.image_classification.sources import Source
from rdrop.experiments.tasks.image_classification.tiny import write_tiny_images
from rdrop.experiments.tasks.pretrained import loading, pretrained_classifier, pretrained_config
from rdrop.experiments.tasks.share import ALONE
from rdrop.experiments.tasks.splits import few_labels, note_on_few
from rdrop.experiments.tasks.task import Batch, WithoutTokens

if TYPE_CHECKING:
    from rdrop.experiments.tasks.image_classification.recipes import ImageClassificationRecipe, ImageData, ImageModel

EVALUATION_BATCH = 100
DECODERS = min(16, os.cpu_count() or 1)  # threads: Pillow decodes and resizes without Python's lock

RATE_NAMES = {
    "dropout": (
        *("hidden_dropout_prob", "hidden_dropout_rate", "dropout_rate", "dropout", "resid_pdrop", "embd_pdrop"),
        *("classifier_dropout_prob", "classifier_dropout"),
    ),
    "attention_dropout": ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop"),
}
"""What the configurations of transformers call each of our rates, the one of ViT first. Both are 0 by default."""
SHAPE_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "patch_size": "patch_size",
}
HALF = (0.5, 0.5, 0.5)
"""Brings pixels from 0..1 to -1..1, as for ViT."""


class ImageClassification(WithoutTokens):
    """Labels are the classes of the images to train on, in their order: of class folders, that of their names.

    All passes of R-Drop see the same augmented image, as in the paper, and differ in dropout alone; or each has one of
    its own (`views`).
    """

    metric = "accuracy"
    task_loss = staticmethod(cross_entropy)
    divergence = staticmethod(symmetric_kl)
    share = ALONE

    def __init__(self, recipe: ImageClassificationRecipe, test: str | None = None) -> None:
        self.predictions: Predictions | None = None
        self.signs: dict[str, float] = {}
        # Of what Pillow warns of on the side, an image is read all the same, or refused in one line.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        self._seed, self._model = recipe.seed, recipe.model
        self.augments = recipe.data.is_augmented
        self._data = self._with_tiny_images(recipe.data) if recipe.data.tiny else recipe.data
        self.splits = load_splits(self._data, test)
        self.unlabeled_per_update = self._data.unlabeled_batch
        self._unlabeled = self._load_unlabeled()
        images, pool = self.splits["train"]
        rows = few_labels(pool, images.labels, self._data.labels, recipe.seed, images.where)
        self.splits["train"] = Split(images, rows)
        self.notes: dict[str, str] = notes_on(self.splits) | note_on_unlabeled(self.splits["test"], self._unlabeled)
        self.notes |= note_on_few({split: len(own.rows) for split, own in self.splits.items()}, "images")
        self.classes = self.splits["train"].images.classes
        self._config = _configuration(self._model, self._data.image_size, self.classes)
        self._mean, self._std = (HALF, HALF) if self._model.name is None else _normalization(self._model.name)
        self._options: dict[str, bool] = {}  # of the model's forward

    def _load_unlabeled(self) -> Unlabeled | None:
        """The images without labels; of all to train on before the labeled ones are drawn from them."""
        match self._data.unlabeled:
            case None:
                return None
            case "all":
                images, rows = self.splits["train"]
                return Unlabeled(images.source, rows)
            case path:
                source, size = read_unlabeled(Path(path))
                require_light(source, np.arange(size), path)
                return Unlabeled(source, np.arange(size))

    def _with_tiny_images(self, data: ImageData) -> ImageData:
        folder = tempfile.mkdtemp(prefix="rdrop-images-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        write_tiny_images(Path(folder), data.test_split)
        return data.model_copy(update={"folder": folder})

    def build_model(self) -> nn.Module:
        name = self._model.name
        if name is None:
            model: nn.Module = ViTForImageClassification(self._config)  # type: ignore[arg-type]
        else:
            model = pretrained_classifier(name, AutoModelForImageClassification, self._config)
            self._try_out(model, name)
        if self._model.zero_head:
            _zero(_head(model))
        return model

    @torch.no_grad()
    def _try_out(self, model: nn.Module, name: str) -> None:
        """Shows the model an image of our size. A transformer interpolates between its positions for another one."""
        size, own_size = self._data.image_size, getattr(self._config, "image_size", None)
        is_own_size = own_size in (None, size, [size, size], (size, size))
        if not is_own_size and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            self._options = {"interpolate_pos_encoding": True}
        image = torch.zeros(1, len(self._mean), size, size)
        if is_own_size:
            with loading(name):
                self.logits(model.eval(), {"pixel_values": image})
            return
        try:
            self.logits(model.eval(), {"pixel_values": image})
        except (ValueError, RuntimeError) as error:
            rule = f"{type(model).__name__} does not take images of this size ({error}); its own is {own_size}"
            raise RecipeError("data.image_size", rule, value=size) from error

    def train_size(self) -> int:
        return len(self.splits["train"].rows)

    def unlabeled_size(self) -> int:
        return 0 if self._unlabeled is None else len(self._unlabeled.rows)

    def train_batch(self, indices: list[int], epoch: int, view: int = 0) -> Batch:
        """Each image is drawn from (seed, epoch, index, view): it is the same in whichever batch it stands."""
        split = self.splits["train"]
        images = self._augmented(split.images.source, split.rows, "image", indices, epoch, view)
        return {"pixel_values": images, "labels": torch.from_numpy(split.images.labels[split.rows[indices]])}

    def unlabeled_batch(self, indices: list[int], epoch: int, view: int = 0) -> Batch:
        assert self._unlabeled is not None  # there is no order of no images
        source, rows = self._unlabeled
        images = self._augmented(source, rows, "unlabeled image", indices, epoch, view)
        return {"pixel_values": images, "labels": torch.zeros(len(indices), dtype=torch.long)}

    def _augmented(
        self, source: Source, rows: NDArray[np.int64], what: str, indices: list[int], epoch: int, view: int
    ) -> Tensor:
        data, of_view = self._data, () if view == 0 else (view,)

        def draw(index: int) -> Image.Image:
            image = source.read(int(rows[index]))
            generator = np.random.default_rng(derived_seed(self._seed, what, epoch, index, *of_view))
            return augment(image, data.image_size, data.crop, data.flip, data.smallest_crop, generator)

        # The threads live as long as the batch: nothing runs between batches, and nothing has to be closed.
        with ThreadPoolExecutor(DECODERS) as pool:
            return to_pixel_values(list(pool.map(draw, indices)), self._mean, self._std)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        logits: Tensor = model(pixel_values=batch["pixel_values"], **self._options).logits
        return logits

    def labels(self, batch: Batch) -> Tensor:
        labels: Tensor = batch["labels"]
        return labels

    @torch.no_grad()
    def evaluate(self, model: nn.Module, split: str) -> dict[str, float]:
        """Every image whole, resized to the square."""
        device = next(model.parameters()).device
        images, rows = self.splits[split]
        labels = torch.from_numpy(images.labels[rows])

        def of_batch(part: NDArray[np.int64]) -> Tensor:
            pixel_values = self._whole_images(Split(images, rows[part]), pool)
            return self.logits(model, {"pixel_values": pixel_values.to(device)}).float().cpu()

        batches = np.array_split(np.arange(len(rows)), -(-len(rows) // EVALUATION_BATCH))
        loss, predicted, confidence, kept, valid = 0.0, [], [], [], []
        with ThreadPoolExecutor(DECODERS) as pool:
            outputs = self.share.map(of_batch, batches)
        for part, logits in zip(batches, outputs, strict=True):
            loss += F.cross_entropy(logits, labels[part], reduction="sum").item()
            predicted.append(logits.argmax(-1))
            confidence.append(top_class_confidence(logits.numpy()))
            if split == "valid":
                valid.append(logits.numpy())
            if split == "test":
                names = map(images.name, rows[part].tolist())
                kept += class_rows(names, logits.numpy(), images.labels[rows[part]])
        says = torch.cat(predicted)
        is_right = says == labels
        if split == "valid":
            self.signs = prediction_spread(np.concatenate(valid), labels.numpy())
        if split == "test":
            self.notes |= note_on_predictions(split, self.classes, says.numpy(), labels.numpy())
            self.predictions = Predictions("classes", kept, self.classes)
        return {
            "loss": loss / len(rows),
            "accuracy": int(is_right.sum()) / len(rows),
            "ece": calibration_error(np.concatenate(confidence), is_right.numpy()),
        }

    def constant_scores(self) -> dict[str, float]:
        images, rows = self.splits["test"]
        return constant_class_scores(images.labels[rows])

    def _whole_images(self, split: Split, pool: ThreadPoolExecutor) -> Tensor:
        def read(row: int) -> Image.Image:
            return whole(split.images.read(row), self._data.image_size)

        return to_pixel_values(list(pool.map(read, split.rows.tolist())), self._mean, self._std)


def _configuration(model: ImageModel, image_size: int, classes: tuple[str, ...]) -> PreTrainedConfig:
    # Dropout is read when the model is built; setting it later has no effect.
    options: dict[str, Any] = {"id2label": dict(enumerate(classes))}
    options["label2id"] = {name: label for label, name in enumerate(classes)}
    if model.name is None:
        options |= {names[0]: getattr(model, key) for key, names in RATE_NAMES.items()}
        shape = {field: getattr(model, key) for key, field in SHAPE_FIELDS.items()}
        return ViTConfig(image_size=image_size, **shape, **options)
    config: PreTrainedConfig = pretrained_config(model.name, AutoModelForImageClassification, "classifier of images")
    fields = type(config)().to_dict()
    for key, names in RATE_NAMES.items():
        rate, present = getattr(model, key), [name for name in names if name in fields]
        if rate and not present:
            raise RecipeError(f"model.{key}", f"must be 0: a {config.model_type} model has no such rate", value=rate)
        options |= dict.fromkeys(present, rate)
    for field, value in options.items():
        setattr(config, field, value)
    return config


def _normalization(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation, of pixels from 0 to 1, with which its preprocessor_config.json prepares images."""
    with loading(name):
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
        if settings.get("do_flip_channel_order"):
            rule = "its preprocessor_config.json swaps red and blue (do_flip_channel_order), which is not supported"
            raise RecipeError("model.name", rule, value=name)
        mean, std = np.zeros(3), np.ones(3)
        if settings.get("do_normalize", True):
            mean, std = (np.array(settings.get(key), dtype=np.float64) for key in ("image_mean", "image_std"))
        if settings.get("include_top"):  # EfficientNet divides by it once more
            std = std * np.array(settings.get("image_std"), dtype=np.float64)
        # It computes (factor * byte - offset - mean) / std, and a byte is 255 times our pixel.
        factor = float(settings.get("rescale_factor", 1 / 255)) if settings.get("do_rescale", True) else 1.0
        offset = 1.0 if settings.get("rescale_offset") else 0.0
        mean, std = (mean + offset) / (255 * factor), std / (255 * factor)
    if not (mean.shape == std.shape == (3,) and np.isfinite(mean).all() and (std > 0).all()):
        rule = "its preprocessor_config.json has no image_mean and image_std, three numbers each"
        raise RecipeError("model.name", rule, value=name)
    return tuple(mean.tolist()), tuple(std.tolist())


def _head(model: nn.Module) -> nn.Linear:
    head = getattr(model, "classifier", None)
    if not isinstance(head, nn.Linear):
        rule = f"must be false: {type(model).__name__} has no output layer that is a plain torch.nn.Linear"
        raise RecipeError("model.zero_head", rule, value=True)
    return head


@torch.no_grad()
def _zero(head: nn.Linear) -> None:
    for parameter in head.parameters():
        parameter.zero_()

"""Image classification: ViT-B/16 and ViT-L/16 fine-tuned on CIFAR-100 and ImageNet, and a small ViT on few images.

The paper fine-tunes the ViT that is pre-trained on ImageNet-21k. Where the official repository and its users do not say
what was used, the settings are those with which the authors of ViT fine-tune it, or our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from rdrop.experiments.recipe import SYNTHETIC, DataFiles, NewOrPretrainedModel, Recipe
from rdrop.experiments.recipe.method import Method
from rdrop.experiments.recipe.published import Published
from rdrop.experiments.recipe.settings import Count, Probability, RecipeError, added


class ImageData(DataFiles):
    valid_split: str | None = Field(description="Split of the folder or hub that chooses. null: held out of train.")
    test_split: str | None = Field(
        description="Split of the folder or hub for the final score. null: held out of train."
    )
    valid_size: Count | None = Field(description="Images to hold out, where valid has no source. null: 10 %.")
    test_size: Count | None = Field(description="Images to hold out, where test has no source. null: 10 %.")
    stratified: bool = added(
        False,
        "Whether images are held out so that valid and test have every class that has enough of them: drawn again "
        "where one is missing.",
    )
    expected_train: Count | None = Field(description="Images that train of the folder or hub must have. null: any.")
    expected_test: Count | None = Field(description="Images that test of the folder or hub must have. null: any.")
    image_column: str = Field(description="Column of the hub's data set with the images.")
    label_column: str = Field(description="Its column with the classes, integers from 0.")
    labels: Count | None = added(
        None, "Labeled images to train on, drawn by `seed`, as many of each class to within one. null: all."
    )
    unlabeled: str | None = added(
        None,
        "Images without labels: a folder of them, or a place as `train` is; or all: those of train, whether they have "
        "a label or not. R-Drop learns from them by the divergence alone, plain training does not see them. null: "
        "there are none.",
    )
    unlabeled_batch: Count = added(64, "Images of `unlabeled` per update, beside those with labels. Unused without it.")
    image_size: Count = Field(description="Edge of the square that the model sees, in pixels.")
    crop: Literal["padded", "resized"] | None = Field(
        description="What is cut out at random for training: padded, the whole image moved by up to an eighth of its "
        "edge; resized, a part of any size, enlarged. null: nothing."
    )
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = Field(
        description="Least share of the image's area in a resized crop. Unused otherwise."
    )
    flip: bool = Field(description="Whether half of the images are mirrored for training.")

    @property
    def is_augmented(self) -> bool:
        """Whether training images change at random."""
        return self.crop is not None or self.flip


class ImageModel(NewOrPretrainedModel):
    SIZES: ClassVar[Mapping[str, int | bool]] = {**NewOrPretrainedModel.SIZES, "patch_size": 16}
    name: str | None = Field(
        None, description="A pre-trained model: id on the Hugging Face hub, or a folder. null: a ViT from scratch."
    )
    layers: Count | None = Field(None, description="Transformer layers. This and the next four: null with a name.")
    hidden_size: Count | None = Field(None, description="Width of the residual stream.")
    heads: Count | None = Field(None, description="Attention heads per layer.")
    intermediate_size: Count | None = Field(None, description="Width of the feed-forward layer.")
    patch_size: Count | None = Field(None, description="Edge of a square patch, in pixels.")
    dropout: Probability = Field(description="Rate after the embeddings, the attention and the feed-forward layer.")
    attention_dropout: Probability = Field(description="Rate on the attention probabilities.")
    zero_head: bool = Field(description="Whether the output layer starts at 0, so that all classes are equally likely.")


class ImageClassificationRecipe(Recipe):
    """Which class an image is of, with a pre-trained model or a small ViT."""

    TASK = "rdrop.experiments.tasks.image_classification.task:ImageClassification"
    task: Literal["image-classification"] = Field(description=Recipe.model_fields["task"].description)
    data: ImageData
    model: ImageModel

    def tiny(self) -> Self:
        return self._tiny(
            updates=30,
            batch_size=16,
            optimizer="adamw",  # plain gradient descent learns little in so few updates
            learning_rate=3e-3,
            warmup_updates=3,
            evaluate_every=15,
            checkpoint_every=15,
            **SYNTHETIC,
            **{"data.labels": None, "data.unlabeled": None},
            **{"data.image_size": 16},
            **{"data.valid_split": None, "data.expected_train": None, "data.expected_test": None},
            **{"data.valid_size": 24, "data.test_size": 24, "data.smallest_crop": 0.5},
            **{"model.name": None, "model.layers": 2, "model.hidden_size": 32, "model.heads": 2},
            **{"model.intermediate_size": 64, "model.patch_size": 4},
        )

    @model_validator(mode="after")
    def _sections_fit_together(self) -> Self:
        model = self.model
        if model.patch_size is not None and self.data.image_size % model.patch_size:
            rule = f"must divide data.image_size (={self.data.image_size})"
            raise RecipeError("model.patch_size", rule, value=model.patch_size)
        if self.method.views == "each" and not self.data.is_augmented:
            raise RecipeError(
                "views", "needs data.crop or data.flip: they are what tells two views apart", value="each"
            )
        if self.data.test_split is not None and self.data.test_split == self.data.valid_split:
            rule = "must be another split than data.valid_split: what chooses must not score"
            raise RecipeError("data.test_split", rule, value=self.data.test_split)
        return self


# Batch, optimizer, schedule, warmup, clipping, dropout and the output layer at 0: official settings, of ViT in general.
CIFAR_100_VIT_B16 = ImageClassificationRecipe(
    name="cifar-100-vit-b16",
    task="image-classification",
    method=Method(alpha=0.6),  # paper, for ViT
    updates=20_000,  # official repository, issue 25: what reproduces
    batch_size=512,  # official settings
    accumulation=4,  # our choice: a forward of 128 images, of R-Drop 256; the update is the same
    optimizer="sgd",  # official settings
    beta1=0.9,  # official settings
    beta2=0.999,  # unused
    epsilon=1e-8,  # unused
    learning_rate=8e-3,  # official repository, issue 25
    schedule="cosine",  # official settings
    warmup_updates=500,  # official settings
    weight_decay=0.0,  # our choice: ViT is fine-tuned without
    clip_norm=1.0,  # official settings
    label_smoothing=0.0,  # our choice: off
    precision="bf16",  # our choice: half the time and memory on today's GPUs
    evaluate_every=500,  # our choice: 5 epochs
    checkpoint_every=500,
    data=ImageData(
        hub="uoft-cs/cifar100",
        valid_split=None,  # there is none, and the official code chooses by test, which we do not
        test_split="test",
        valid_size=1000,  # 2 % of train: the official hold-out
        test_size=None,
        expected_train=50_000,
        expected_test=10_000,
        image_column="img",
        label_column="fine_label",
        image_size=224,  # official repository, issue 25
        crop="resized",  # official settings, these three
        smallest_crop=0.05,
        flip=False,
    ),
    model=ImageModel(
        name="google/vit-base-patch16-224-in21k",
        dropout=0.1,  # official settings; the library's ViT has 0, where R-Drop cannot act
        attention_dropout=0.0,  # official settings
        zero_head=True,  # official settings
    ),
)

VIT_L16 = {"accumulation": 8, "model.name": "google/vit-large-patch16-224-in21k"}  # a forward of 64 images

CIFAR_100_VIT_L16 = CIFAR_100_VIT_B16.replace(name="cifar-100-vit-l16", **VIT_L16)

IMAGENET_VIT_B16 = CIFAR_100_VIT_B16.replace(
    name="imagenet-vit-b16",
    learning_rate=0.03,  # our choice: within what ViT's authors search; the paper's is not known
    accumulation=8,  # three times the patches of 224 pixels
    evaluate_every=1000,  # our choice
    checkpoint_every=1000,
    **{
        "data.hub": "ILSVRC/imagenet-1k",
        "data.test_split": "validation",  # the literature's test set: the other labeled split
        "data.valid_size": 12_811,  # 1 % of train: the official hold-out
        "data.expected_train": 1_281_167,
        "data.expected_test": 50_000,
        "data.image_column": "image",
        "data.label_column": "label",
        "data.image_size": 384,  # ViT's own figures, which the paper's baselines equal, are at this size
    },
)

IMAGENET_VIT_L16 = IMAGENET_VIT_B16.replace(name="imagenet-vit-l16", **VIT_L16 | {"accumulation": 16})

IMAGE_CLASSIFICATION = CIFAR_100_VIT_B16.replace(  # your own images
    name="image-classification",
    updates=None,
    epochs=20.0,  # our choice, from here to precision: a first fine-tuning, 1,000 updates of 3,200 images
    batch_size=64,
    accumulation=1,
    optimizer="adamw",
    learning_rate=5e-5,
    warmup_updates=0,
    warmup_share=0.1,
    weight_decay=0.01,  # PyTorch's default for AdamW
    precision="fp32",  # any machine has it
    evaluate_every=None,  # an epoch, as checkpoint_every
    patience=5,
    select_by="loss",  # the score of a small valid split moves in large steps
    checkpoint_every=None,
    **{
        "data.hub": None,
        "data.valid_split": "valid",
        "data.test_split": "test",
        "data.valid_size": None,
        "data.stratified": True,
        "data.expected_train": None,
        "data.expected_test": None,
        "data.image_column": "image",  # the hub's usual names
        "data.label_column": "label",
        "data.smallest_crop": 0.25,  # our choice, these two: most of what a picture shows stays in it
        "data.flip": True,
        "model.attention_dropout": 0.1,  # our choice: more for the passes to differ in
    },
)

# Our choices: a baseline and an R-Drop run take minutes on one CPU thread, and learn well above chance.
CIFAR_10_4K = IMAGE_CLASSIFICATION.replace(
    name="cifar-10-4k",
    updates=2000,  # 64 epochs of 2,000 images
    epochs=None,
    learning_rate=1e-3,  # PyTorch's default for AdamW
    warmup_updates=200,  # a tenth of the updates
    warmup_share=0.0,
    evaluate_every=200,
    patience=None,
    select_by="score",
    checkpoint_every=500,
    **{
        "data.valid_split": None,
        "data.test_split": None,
        "data.valid_size": 1000,
        "data.test_size": 1000,  # 2,000 are left to train on
        "data.stratified": False,  # as its recorded runs: each split has hundreds of each class
        "data.expected_train": 4000,
        "data.image_size": 32,
        "data.crop": "padded",  # as usual for CIFAR from scratch
        "model.name": None,
        "model.layers": 4,
        "model.hidden_size": 128,
        "model.heads": 4,
        "model.intermediate_size": 256,
        "model.patch_size": 8,  # 16 patches: a quarter of the time of 4 pixels, which learned no faster
    },
)

RECIPES = (
    CIFAR_100_VIT_B16,
    CIFAR_100_VIT_L16,
    IMAGENET_VIT_B16,
    IMAGENET_VIT_L16,
    CIFAR_10_4K,
    IMAGE_CLASSIFICATION,
)

_SOURCE = "Liang et al. 2021, table 6"


def _imagenet(model: str, baseline: float, rdrop: float) -> Published:
    return Published("ImageNet", "accuracy", model, baseline, rdrop, _SOURCE, split="valid")


PUBLISHED = {
    "cifar-100-vit-b16": (Published("CIFAR-100", "accuracy", "ViT-B/16", 92.64, 93.29, _SOURCE, headline=True),),
    "cifar-100-vit-l16": (Published("CIFAR-100", "accuracy", "ViT-L/16", 93.44, 93.85, _SOURCE),),
    "imagenet-vit-b16": (_imagenet("ViT-B/16", 83.97, 84.38),),
    "imagenet-vit-l16": (_imagenet("ViT-L/16", 85.15, 85.57),),
}
DATASETS = {"cifar-10-4k": "CIFAR-10, 4,000 images"}

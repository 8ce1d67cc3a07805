"""Images: read as they are or refused by name, drawn repeatably, split so that the test set chooses nothing."""

import io
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tests.outcomes import in_parts
from tests.real_data import real_data
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification, ViTConfig, ViTForImageClassification

from rdrop.dropout import dropout_sources
from rdrop.experiments.recipe.settings import RecipeError
from rdrop.experiments.run_folder import RunFolder
from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.image_classification import task as image_task
from rdrop.experiments.tasks.image_classification.augmentation import (
    augment,
    padded_crop_box,
    resized_crop_box,
    to_pixel_values,
)
from rdrop.experiments.tasks.image_classification.data import load_splits, notes_on
from rdrop.experiments.tasks.image_classification.images import (
    CIFAR_100_RECORD,
    read_cifar_100,
    read_class_folders,
    read_images,
    read_npz,
)
from rdrop.experiments.tasks.image_classification.recipes import (
    CIFAR_10_4K,
    CIFAR_100_VIT_B16,
    IMAGE_CLASSIFICATION,
    IMAGENET_VIT_L16,
    PUBLISHED,
    RECIPES,
    ImageClassificationRecipe,
)
from rdrop.experiments.tasks.image_classification.task import ImageClassification
from rdrop.experiments.training.trainer import train

PROJECT = Path(__file__).parents[3]
SMALL = CIFAR_10_4K.replace(
    **{"data.valid_size": None, "data.test_size": None, "data.expected_train": None, "data.image_size": 8},
    **{
        "model.layers": 1,
        "model.hidden_size": 8,
        "model.heads": 2,
        "model.intermediate_size": 8,
        "model.patch_size": 4,
    },
)


@pytest.fixture(scope="module")
def cifar() -> Path:
    """The first 4,000 training images of CIFAR-10."""
    return real_data("cifar10-lossless-4k")


def write_image(
    path: Path, value: int | tuple[int, ...] = 9, *, mode: str = "RGB", size: tuple[int, int] = (8, 8)
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)
    return path


def write_classes(root: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        for index in range(count):
            write_image(root / name / f"{index:02d}.png", (index, 0, 9))
    return root


def write_npz(path: Path, size: int = 30, **members: Any) -> Path:
    pixels = np.arange(size, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), dtype=np.uint8)
    np.savez(path, **{"images": pixels, "labels": np.arange(size) % 3} | members)
    return path


def splits(recipe: ImageClassificationRecipe, **data: object) -> dict[str, Any]:
    return load_splits(recipe.replace(**{f"data.{key}": value for key, value in data.items()}).data)


def refusal(function: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- the real images


def test_all_4000_images_of_cifar_10_are_there_with_their_labels(cifar: Path) -> None:
    images = read_npz(cifar / "cifar10_train_first4000.npz")
    assert len(images) == 4000
    assert images.labels[:12].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3, 4, 7]
    assert np.bincount(images.labels).tolist() == [396, 366, 420, 384, 422, 393, 414, 385, 407, 413]
    with np.load(cifar / "cifar10_train_first4000.npz") as raw:
        for index in (0, 3999):
            assert np.array_equal(np.asarray(images.read(index)), raw["images"][index])


def test_the_4000_are_split_2000_1000_1000_by_the_split_seed_alone(cifar: Path) -> None:
    first = splits(CIFAR_10_4K, folder=str(cifar))
    assert {name: len(split.rows) for name, split in first.items()} == {"train": 2000, "valid": 1000, "test": 1000}
    assert len({row for split in first.values() for row in split.rows.tolist()}) == 4000
    again = splits(CIFAR_10_4K.replace(seed=7), train=str(cifar / "cifar10_train_first4000.npz"))
    assert all(np.array_equal(again[name].rows, first[name].rows) for name in first)
    assert not np.array_equal(splits(CIFAR_10_4K, folder=str(cifar), split_seed=1)["test"].rows, first["test"].rows)


def test_a_cut_off_copy_of_the_real_file_is_refused(cifar: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.npz"
    path.write_bytes((cifar / "cifar10_train_first4000.npz").read_bytes()[:1_000_000])
    assert str(path) in refusal(read_npz, path)


# ------------------------------------------------------------------------------------------------------- class folders


def test_classes_are_the_sub_folders_in_the_order_of_their_names(tmp_path: Path) -> None:
    images = read_class_folders(write_classes(tmp_path, {"dog": 2, "cat": 3, ".cache": 1}))
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    assert [images.read(index).getpixel((0, 0))[0] for index in range(5)] == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("name", "mode", "value", "seen"),
    [
        ("gray.png", "L", 7, (7, 7, 7)),
        ("alpha.png", "RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ("print.JPEG", "CMYK", (0, 0, 0, 0), (255, 255, 255)),
    ],
)
def test_every_image_comes_in_red_green_and_blue(
    tmp_path: Path, name: str, mode: str, value: Any, seen: tuple[int, ...]
) -> None:
    write_classes(tmp_path, {"b": 1})
    write_image(tmp_path / "a" / name, value, mode=mode)
    image = read_class_folders(tmp_path).read(0)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == seen


@pytest.mark.parametrize("broken", [b"", b"no image", None])
def test_a_broken_image_is_named_when_it_is_read(tmp_path: Path, broken: bytes | None) -> None:
    write_classes(tmp_path, {"a": 12, "b": 12})
    path = tmp_path / "b" / "05.png"
    path.write_bytes(path.read_bytes()[:-30] if broken is None else broken)
    task = ImageClassification(SMALL.replace(**{"data.train": str(tmp_path)}))
    rows = task.splits["train"].rows
    everything = [*range(task.train_size())]
    assert len(task.train_batch([i for i in everything if rows[i] != 17], epoch=0)["labels"]) >= 19
    message = refusal(lambda: [task.splits["train"].images.read(index) for index in range(24)])
    assert message.startswith(f"{path}: cannot be read as an image")


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda root: write_image(root / "loose.png"), "loose.png: is no folder"),
        (lambda root: (root / "a" / "notes.txt").write_text("x"), "notes.txt: is no image by its name"),
        (lambda root: (root / "c").mkdir(), "c: the class has no images"),
        (
            lambda root: (root / "a" / "deeper").mkdir(),
            "deeper: is a folder in the folder of a class; if these are splits",
        ),
    ],
)
def test_a_folder_that_is_not_class_folders_is_refused(
    tmp_path: Path, spoil: Callable[[Path], object], rule: str
) -> None:
    spoil(write_classes(tmp_path, {"a": 2, "b": 2}))
    assert rule in refusal(read_class_folders, tmp_path)


def test_one_class_is_no_classification(tmp_path: Path) -> None:
    assert "has 1 sub-folders" in refusal(read_class_folders, write_classes(tmp_path, {"a": 3}))


# ---------------------------------------------------------------------------------------------------------------- .npz


def test_an_npz_may_hold_gray_images(tmp_path: Path) -> None:
    images = read_npz(write_npz(tmp_path / "gray.npz", images=np.full((30, 5, 4), 9, dtype=np.uint8)))
    assert images.classes == ("0", "1", "2")
    assert images.read(0).size == (4, 5)
    assert images.read(0).getpixel((0, 0)) == (9, 9, 9)


@pytest.mark.parametrize(
    ("members", "rule"),
    [
        ({"images": np.zeros((30, 8, 8, 3))}, ":images: must be uint8"),
        ({"images": np.zeros((30, 8, 8, 4), dtype=np.uint8)}, ":images: must be uint8 of shape"),
        ({"images": np.zeros((0, 8, 8, 3), dtype=np.uint8), "labels": np.zeros(0, dtype=int)}, ":images: must be"),
        ({"labels": np.arange(29)}, ":labels: has 29 labels for 30 images"),
        ({"labels": np.zeros((30, 1), dtype=int)}, ":labels: must be integers of shape"),
        ({"labels": np.zeros(30)}, ":labels: must be integers"),
        ({"labels": np.array([0, 1, -1] + [0] * 27)}, ":labels: label 2 is -1"),
        ({"labels": np.array([0] * 29 + [255])}, ":labels: label 29 is 255; labels are from 0 to 29"),
        ({"labels": np.array(["a"] * 30)}, ":labels: must be integers"),
        ({"labels": np.array([None] * 30)}, ":labels: cannot be read (Object arrays cannot be loaded"),
    ],
)
def test_a_wrong_member_is_named_with_its_file(tmp_path: Path, members: dict[str, Any], rule: str) -> None:
    path = write_npz(tmp_path / "x.npz", **members)
    message = refusal(read_npz, path)
    assert message.startswith(f"{path}:")
    assert rule in message


def test_a_missing_member_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros(3), labels=np.zeros(3))
    assert "has no member 'images', only 'x', 'labels'" in refusal(read_npz, tmp_path / "x.npz")


def test_a_file_that_is_no_npz_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    for content in (b"", b"text", b"PK\x03\x04broken"):
        path.write_bytes(content)
        assert f"{path}: cannot be read as .npz" in refusal(read_npz, path)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    path.write_bytes(buffer.getvalue())
    assert "is no .npz file" in refusal(read_npz, path)


def test_a_damaged_byte_in_a_member_is_noticed(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz")
    raw = bytearray(path.read_bytes())
    raw[2000] ^= 1
    path.write_bytes(raw)
    assert f"{path}:images: cannot be read" in refusal(read_npz, path)


@pytest.mark.parametrize(("files", "seed"), [(300, 0), *in_parts(2_000)])
def test_a_damaged_npz_is_read_or_refused_and_never_crashes(
    files: int, seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    path, draw = write_npz(tmp_path / "x.npz", 4, images=np.zeros((4, 2, 2, 3), dtype=np.uint8)), random.Random(seed)
    raw = path.read_bytes()
    refusals = []
    for number in range(files):
        damaged = bytearray(raw[: draw.randrange(len(raw))] if number % 5 == 0 else raw)
        for _ in range(draw.randint(1, 3) if damaged else 0):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            read_npz(path)
        except DataError as error:
            refusals.append(str(error))
    assert len(refusals) > files / 2
    assert all(message.startswith(f"{path}:") for message in refusals)
    record_property("files", files)
    record_property("of them refused", len(refusals))


# ----------------------------------------------------------------------------------------- CIFAR-100's binary and hub


def cifar_100_bytes(labels: list[int]) -> bytes:
    """Records of coarse label, fine label, and 1,024 bytes each of red (its index), green (1) and blue (2)."""
    planes = [bytes([19, label]) + bytes([i]) * 1024 + b"\1" * 1024 + b"\2" * 1024 for i, label in enumerate(labels)]
    return b"".join(planes)


def test_cifar_100_in_its_binary_version_has_the_fine_labels(tmp_path: Path) -> None:
    path = tmp_path / "train.bin"
    path.write_bytes(cifar_100_bytes([99, 0, 42]))
    images = read_cifar_100(path)
    assert images.labels.tolist() == [99, 0, 42]
    assert len(images.classes) == 100
    assert images.read(2).getpixel((31, 31)) == (2, 1, 2)
    path.write_bytes(cifar_100_bytes([99])[:-1])
    assert f"{CIFAR_100_RECORD - 1} bytes" in refusal(read_cifar_100, path)
    path.write_bytes(cifar_100_bytes([3, 100]))
    assert "label 1 is 100; labels are from 0 to 99" in refusal(read_cifar_100, path)


def test_cifar_100_is_counted_and_its_test_set_chooses_nothing(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(cifar_100_bytes([*range(100)] * 2))
    (tmp_path / "test.bin").write_bytes(cifar_100_bytes([5] * 20))
    message = refusal(splits, CIFAR_100_VIT_B16, folder=str(tmp_path))
    assert f"{tmp_path / 'train.bin'}: has 200 images, and data.expected_train=50000" in message
    counts = {"expected_train": 200, "expected_test": 20, "valid_size": 4}
    found = splits(CIFAR_100_VIT_B16, folder=str(tmp_path), **counts)
    assert {name: (split.images.where[-9:], len(split.rows)) for name, split in found.items()} == {
        "train": ("train.bin", 196),
        "valid": ("train.bin", 4),
        "test": (f"{os.sep}test.bin", 20),
    }
    (tmp_path / "test.bin").unlink()
    assert "there is no test split beside it" in refusal(splits, CIFAR_100_VIT_B16, folder=str(tmp_path), **counts)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A hub with one data set in the columns of CIFAR-100; the calls that were made."""
    features = datasets.Features(
        {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["apple", "bear", "chair"])}
    )
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, **options: object) -> datasets.Dataset:
        calls.append((name, config, split))
        images = [Image.new("L", (8, 8), index) for index in range({"train": 30, "test": 6}[split])]
        labels = [index % 3 for index in range(len(images))]
        return datasets.Dataset.from_dict({"img": images, "fine_label": labels}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


HUB = CIFAR_100_VIT_B16.replace(**{"data.expected_train": 30, "data.expected_test": 6, "data.valid_size": 3})


def test_the_hub_is_asked_for_train_and_test_and_images_are_decoded_one_by_one(hub: list[tuple[Any, ...]]) -> None:
    found = splits(HUB)
    assert hub == [("uoft-cs/cifar100", None, "train"), ("uoft-cs/cifar100", None, "test")]
    assert found["train"].images.classes == ("apple", "bear", "chair")
    assert [len(found[name].rows) for name in ("train", "valid", "test")] == [27, 3, 6]
    assert found["test"].images.read(4).getpixel((0, 0)) == (4, 4, 4)
    assert found["test"].images.labels.tolist() == [0, 1, 2, 0, 1, 2]


def test_what_the_hub_lacks_is_named(hub: list[tuple[Any, ...]]) -> None:
    message = refusal(splits, HUB, label_column="label")
    assert "has no column 'label'; set data.label_column to one of img, fine_label" in message
    assert "uoft-cs/cifar100: the split validation cannot be loaded" in refusal(splits, HUB, test_split="validation")
    assert "has 30 images, and data.expected_train=50000" in refusal(splits, HUB, expected_train=50_000)


def test_texts_of_the_hub_are_names_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, config: str | None, *, split: str, **options: object) -> datasets.Dataset:
        images = [Image.new("L", (8, 8), 100 + index) for index in range({"train": 30, "test": 6}[split])]
        names = ["pear", "apple", "fig"]
        return datasets.Dataset.from_dict({"img": images, "fine_label": [names[i % 3] for i in range(len(images))]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = splits(HUB)
    assert found["train"].images.classes == ("apple", "fig", "pear")
    assert found["test"].images.labels.tolist() == [2, 0, 1, 2, 0, 1]


# -------------------------------------------------------------------------------------------------------------- splits


def test_own_images_without_splits_give_a_tenth_each_to_valid_and_test(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 10, "b": 10})
    for source in ("train", "folder"):
        found = splits(IMAGE_CLASSIFICATION, **{source: str(tmp_path)})
        assert [len(found[name].rows) for name in ("train", "valid", "test")] == [16, 2, 2]


def test_a_folder_of_splits_is_read_by_their_names(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    write_classes(tmp_path / "val", {"b": 3})
    write_npz(tmp_path / "test.npz", 5)
    message = refusal(splits, IMAGE_CLASSIFICATION, folder=str(tmp_path))
    assert message.startswith(f"{tmp_path / 'val'}: has 1 sub-folders")
    write_classes(tmp_path / "val", {"a": 1})
    message = refusal(splits, IMAGE_CLASSIFICATION, folder=str(tmp_path))
    assert "test.npz: the class '0' is not among those of the images to train on" in message
    (tmp_path / "test.npz").unlink()
    found = splits(IMAGE_CLASSIFICATION, folder=str(tmp_path))
    assert [len(found[name].rows) for name in ("train", "valid", "test")] == [18, 4, 2]
    assert found["valid"].images.labels.tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("dark", ["train", "test"])
def test_images_that_would_be_black_are_refused_in_any_form(dark: str, tmp_path: Path) -> None:
    """Masks of 0 and 1, or numbers from 0 to 1; those of digits, from 0 to 16, are read."""
    draw = np.random.default_rng(0)
    for highest in (1, 16):
        npz, folder = tmp_path / f"{highest}.npz", tmp_path / f"{highest}"
        images, labels = draw.integers(0, highest + 1, (30, 8, 8), dtype=np.uint8), np.arange(30) % 2
        np.savez(npz, images=images, labels=labels)
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            (folder / str(label)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / str(label) / f"{number}.png")
    for other, source in (("16", "1.npz"), ("16.npz", "1")):
        own = {"train": other, "test": other} | {dark: source}
        message = refusal(splits, IMAGE_CLASSIFICATION, **{name: str(tmp_path / path) for name, path in own.items()})
        assert message.startswith(f"{tmp_path / source}: no pixel of its ")
        assert message.endswith(" images is above 1, and white is 255; multiply them by 255")
    recipe = FEW.replace(**{"data.train": str(tmp_path / "16.npz"), "data.unlabeled": str(tmp_path / "1.npz")})
    with pytest.raises(DataError, match=r"1\.npz: no pixel of its 30 images is above 1"):
        ImageClassification(recipe)


def test_images_that_are_all_the_same_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.full((30, 8, 8), 9, dtype=np.uint8), labels=np.arange(30) % 2)
    message = refusal(splits, IMAGE_CLASSIFICATION, train=str(tmp_path / "x.npz"))
    assert message == f"{tmp_path / 'x.npz'}: all 24 images to train on are the same; give different ones"


def test_imagenets_validation_folder_is_the_test_split(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"n01": 10, "n02": 10})
    write_classes(tmp_path / "val", {"n01": 2, "n02": 2})
    found = splits(IMAGENET_VIT_L16, folder=str(tmp_path), expected_train=20, expected_test=4, valid_size=5)
    assert [len(found[name].rows) for name in ("train", "valid", "test")] == [15, 5, 4]
    assert found["valid"].images is found["train"].images
    assert found["test"].images.where == str(tmp_path / "val")


def test_what_chooses_never_scores(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    write_classes(tmp_path / "val", {"a": 2, "b": 2})
    message = refusal(splits, IMAGE_CLASSIFICATION, folder=str(tmp_path), test_split="validation")
    assert message.startswith(f"{tmp_path / 'val'}: is both valid and test")
    own = {"train": str(tmp_path / "train"), "valid": str(tmp_path / "val"), "test": str(tmp_path / "train")}
    assert "is both train and test" in refusal(splits, IMAGE_CLASSIFICATION, **own)


def test_a_slip_in_the_name_of_a_split_is_not_passed_over(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    write_classes(tmp_path / "tets", {"a": 10, "b": 10})
    assert "tets: is no split beside train; the nearest name is test" in refusal(
        splits, IMAGE_CLASSIFICATION, folder=str(tmp_path)
    )
    assert "give it as data.folder" in refusal(splits, IMAGE_CLASSIFICATION, train=str(tmp_path))


def test_a_split_that_is_packed_or_there_twice_is_not_passed_over(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    for name in ("valid.zip", "validation.tar.gz", "test.npy"):
        (tmp_path / name).touch()
        said = refusal(splits, IMAGE_CLASSIFICATION, folder=str(tmp_path))
        assert said == f"{tmp_path / name}: is no folder, .npz or .bin file; unpack or convert it, or move it away"
        (tmp_path / name).unlink()
    (tmp_path / "README.md").touch()
    for name in ("val", "valid"):
        write_classes(tmp_path / name, {"a": 2, "b": 2})
    assert f"{tmp_path / 'valid'} and val are one split" in refusal(splits, IMAGE_CLASSIFICATION, folder=str(tmp_path))


def test_one_file_among_class_folders_is_not_taken_for_all_images(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 10, "b": 10})
    np.savez(tmp_path / "features.npz", images=np.full((20, 8, 8), 200, np.uint8), labels=np.arange(20) % 2)
    assert "features.npz: is no folder" in refusal(splits, IMAGE_CLASSIFICATION, folder=str(tmp_path))


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    write_classes(tmp_path, {"bus": 10, "train": 10})
    assert splits(IMAGE_CLASSIFICATION, folder=str(tmp_path))["train"].images.classes == ("bus", "train")


def test_without_any_source_the_error_says_what_to_give() -> None:
    assert "set data.train or data.folder" in refusal(splits, IMAGE_CLASSIFICATION)
    assert "there is no such folder" in refusal(splits, IMAGE_CLASSIFICATION, folder="nowhere")
    assert "there is no such file or folder" in refusal(splits, IMAGE_CLASSIFICATION, train="nowhere")


def test_too_few_images_are_not_split(tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 4, "b": 4})
    few: tuple[tuple[dict[str, object], str], ...] = (
        ({"train": str(tmp_path)}, "10 %; give 10 or more, or data.valid and data.test"),
        ({"train": str(tmp_path), "valid_size": 4}, "10 %; give 10 or more, or data.test"),
        ({"folder": str(tmp_path)}, "10 %; give 10 or more, or valid images and test images"),
        (
            {"train": str(tmp_path), "valid_size": 4, "test_size": 4},
            "4 for valid and 4 for test; give more, or others for valid and test, or lower data.valid_size and "
            "data.test_size",
        ),
    )
    for changes, said in few:
        assert refusal(splits, IMAGE_CLASSIFICATION, **changes).endswith(f": 8 images are too few to hold out {said}")
    more = tmp_path / "more"
    more.mkdir()
    write_classes(more, {"a": 10, "b": 10})
    message = refusal(splits, IMAGE_CLASSIFICATION, train=str(more), valid_size=19)
    assert message.endswith(
        "19 for valid and 2 for test; give more, or others for valid and test, or lower data.valid_size"
    )


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.pkl").write_bytes(b"x")
    assert "must be a folder with a sub-folder for each class, or an .npz file" in refusal(
        read_images, tmp_path / "images.pkl"
    )


# ----------------------------------------------------------------------------------------- classes, and in which split


@pytest.mark.parametrize(
    ("labels", "rule"),
    [
        (np.zeros(30, dtype=int), "all 30 images are of the class '0'; give two classes or more"),
        (np.full(30, 3), "all 30 images are of the class '3'"),
        (np.array([0, 2] * 15), "no image has the label 1, and the highest is 2; number the classes from 0"),
    ],
)
def test_two_classes_or_more_are_learned_and_each_number_is_one(labels: np.ndarray, rule: str, tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz", labels=labels)
    assert rule in refusal(splits, IMAGE_CLASSIFICATION, train=str(path))


def test_0_and_70_are_refused_and_the_remedy_works(tmp_path: Path) -> None:
    labels = np.array([0, 70] * 50)
    path = write_npz(tmp_path / "x.npz", 100, labels=labels)
    message = refusal(splits, IMAGE_CLASSIFICATION, train=str(path))
    assert "numpy.unique(labels, return_inverse=True)[1]" in message
    write_npz(path, 100, labels=np.unique(labels, return_inverse=True)[1])
    assert splits(IMAGE_CLASSIFICATION, train=str(path))["train"].images.classes == ("0", "1")


def test_a_test_file_may_lack_classes_and_it_is_noted(tmp_path: Path) -> None:
    write_npz(tmp_path / "test.npz", 4, labels=np.full(4, 2), images=np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8))
    recipe = SMALL.replace(
        **{"data.train": str(write_npz(tmp_path / "x.npz")), "data.test": str(tmp_path / "test.npz")}
    )
    notes = ImageClassification(recipe).notes
    assert notes["classes of test"] == "all 4 examples are '2': scores of it say nothing"


@pytest.mark.parametrize("name", [b"b\xff", b"b\x1b[31m", b"b\nc", "b\u0085".encode()])
def test_a_class_whose_name_cannot_be_shown_is_refused(name: bytes, tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 3})
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    message = refusal(read_class_folders, tmp_path)
    assert message.startswith(f"{tmp_path}: the folder {os.fsdecode(name)!a} has characters that cannot be shown")


def test_a_file_name_of_other_bytes_than_utf_8_is_kept_with_its_prediction(tmp_path: Path) -> None:
    write_classes(tmp_path / "photos", {"a": 15, "b": 15})
    for label in ("a", "b"):
        path = tmp_path / "photos" / label / "00.png"
        os.rename(path, os.path.join(os.fsencode(path.parent), b"x\xff.png"))
    recipe = SMALL.replace(updates=2, warmup_updates=1, batch_size=8, **{"data.train": str(tmp_path / "photos")})
    train(recipe, tmp_path / "run")
    names = {ImageClassification(recipe).splits["train"].images.name(index) for index in range(30)}
    assert {"a/x\\udcff.png", "b/x\\udcff.png"} < names


@pytest.mark.parametrize(
    ("first", "second"),
    [("caf\u00e9", "cafe\u0301"), ("cat", "cat "), ("cat", "c\u200bat"), ("a b", "a  b"), ("c", "c\u3164")],
)
def test_two_folders_whose_names_look_the_same_are_refused(first: str, second: str, tmp_path: Path) -> None:
    message = refusal(read_class_folders, write_classes(tmp_path, {first: 2, second: 2}))
    assert "are one class in two spellings" in message
    assert all(ascii(name) in message for name in (first, second))


@pytest.mark.parametrize("name", ["nan", "#NV", "[null]"])
def test_a_folder_that_is_called_as_a_missing_value_is_refused(name: str, tmp_path: Path) -> None:
    message = refusal(read_class_folders, write_classes(tmp_path, {"a": 2, name: 2}))
    assert f"the class {name!a} is called as programs write a missing value" in message


def test_classes_that_differ_by_case_alone_are_noted(tmp_path: Path) -> None:
    task = ImageClassification(SMALL.replace(**{"data.train": str(write_classes(tmp_path, {"Cat": 15, "cat": 15}))}))
    assert task.notes["names of classes"] == "'Cat' and 'cat' are different classes by case alone"


def test_a_class_is_found_in_test_by_what_its_name_looks_like(tmp_path: Path) -> None:
    write_classes(tmp_path / "train", {"caf\u00e9": 10, "tea": 10})
    write_classes(tmp_path / "test", {"cafe\u0301": 2, "tea ": 2})
    found = splits(IMAGE_CLASSIFICATION, folder=str(tmp_path))
    assert found["test"].images.labels.tolist() == [0, 0, 1, 1]


def test_recorded_runs_keep_their_splits_and_their_names() -> None:
    assert not CIFAR_10_4K.data.stratified
    assert "stratified" not in CIFAR_10_4K.to_json()


def test_a_rare_class_is_in_each_split_that_it_can_be_in(tmp_path: Path) -> None:
    """5 of 200 images: at random most splits of 20 have none."""
    labels = np.zeros(200, dtype=int)
    labels[[3, 50, 90, 91, 199]] = 1
    path = write_npz(tmp_path / "x.npz", 200, labels=labels)
    for seed in range(20):
        found = splits(IMAGE_CLASSIFICATION, train=str(path), split_seed=seed)
        assert [len(found[name].rows) for name in ("train", "valid", "test")] == [160, 20, 20]
        assert len({row for split in found.values() for row in split.rows.tolist()}) == 200
        assert all(labels[found[name].rows].any() for name in found)


def test_a_class_that_cannot_be_in_each_split_is_noted(tmp_path: Path) -> None:
    labels = np.zeros(60, dtype=int)
    labels[[7, 9]] = 1
    path = write_npz(tmp_path / "x.npz", 60, labels=labels)
    notes = ImageClassification(SMALL.replace(**{"data.train": str(path)})).notes
    assert any(value == "all 6 examples are '0': scores of it say nothing" for value in notes.values())


@pytest.mark.parametrize("rare", [False, True])
def test_splits_are_drawn_as_before_without_the_key_and_where_no_class_is_missing(rare: bool, tmp_path: Path) -> None:
    labels = np.arange(60) // 58 if rare else np.arange(60) % 3
    path = write_npz(tmp_path / "x.npz", 60, labels=labels)
    order = np.random.default_rng(0).permutation(60)
    found = splits(IMAGE_CLASSIFICATION, train=str(path), stratified=not rare)
    for name, rows in (("valid", order[:6]), ("test", order[6:12]), ("train", order[12:])):
        assert found[name].rows.tolist() == sorted(rows.tolist())


# ------------------------------------------------------------------------------------------------- images in two splits


@pytest.mark.parametrize("kind", ["folders", "npz"])
def test_images_that_stand_in_two_splits_are_counted(kind: str, tmp_path: Path) -> None:
    """Of the test images, 3 are in train, of which one stands there twice."""
    noise = np.random.default_rng(0).integers(0, 256, (45, 8, 8, 3), dtype=np.uint8)
    train_images, test = [*range(30), 7], [4, 7, 29, 31, 32, 33]
    paths = {}
    for name, rows in (("train", train_images), ("valid", [40, 41, 42]), ("test", test)):
        labels = np.arange(len(rows)) % 2
        if kind == "npz":
            paths[name] = tmp_path / f"{name}.npz"
            np.savez(paths[name], images=noise[rows], labels=labels)
            continue
        paths[name] = tmp_path / name
        for place, (row, label) in enumerate(zip(rows, labels, strict=True)):
            (paths[name] / f"{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise[row]).save(paths[name] / f"{label}" / f"{name}-{place}.png")
    task = ImageClassification(SMALL.replace(**{f"data.{name}": str(path) for name, path in paths.items()}))
    assert task.notes.pop("few examples").startswith("3 images of valid")
    assert task.notes == {"test images that are trained on too": "3 of 6, byte for byte"}


def test_images_of_the_hub_that_stand_in_two_splits_are_counted(hub: list[tuple[Any, ...]]) -> None:
    assert notes_on(splits(HUB))["test images that are trained on too"].startswith(("5 of 6", "6 of 6"))


def test_a_copy_of_the_training_images_scores_nothing(tmp_path: Path) -> None:
    write_classes(tmp_path / "a", {"cat": 10, "dog": 10})
    write_classes(tmp_path / "b", {"dog": 10, "cat": 10})
    message = refusal(splits, IMAGE_CLASSIFICATION, train=str(tmp_path / "a"), test=str(tmp_path / "b"))
    assert message.startswith(f"{tmp_path / 'b'}: has the images of {tmp_path / 'a'}, which are train, and is test")
    write_npz(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes())
    assert "and is valid; give others" in refusal(
        splits, IMAGE_CLASSIFICATION, train=str(tmp_path / "a.npz"), valid=str(tmp_path / "b.npz")
    )


@pytest.mark.parametrize("limit", ["MOST_IMAGES", "MOST_BYTES"])
def test_too_many_images_to_compare_are_noted(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"rdrop.experiments.tasks.image_classification.repeats.{limit}", 20)
    task = ImageClassification(SMALL.replace(**{"data.train": str(write_npz(tmp_path / "x.npz"))}))
    assert task.notes["test images that are trained on too"].startswith("not counted: above 100,000 images or 1 GiB")


# -------------------------------------------------------------------------------------------------------- augmentation


def test_a_resized_crop_lies_inside_and_has_its_area_and_proportions() -> None:
    generator = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = resized_crop_box(300, 200, 0.25, generator)
        assert 0 <= left < right <= 300
        assert 0 <= top < bottom <= 200
        assert 0.24 < (right - left) * (bottom - top) / 60_000 <= 1
        assert 0.74 < (right - left) / (bottom - top) < 1.35


def test_a_crop_of_5_percent_and_more_without_flips_mirrors_nothing() -> None:
    """The official augmentation of ViT. Brightness grows to the right, and does so in every crop."""
    ramp = Image.fromarray(np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3)).copy())
    generator = np.random.default_rng(0)
    crops = [np.asarray(augment(ramp, 32, "resized", False, 0.05, generator))[16, :, 0].astype(int) for _ in range(300)]
    assert all((np.diff(crop) >= 0).all() for crop in crops)
    widths = [crop[-1] - crop[0] for crop in crops]
    assert min(widths) < 0.25 * 256
    assert max(widths) > 0.9 * 256


def test_where_no_crop_fits_it_is_the_largest_one_in_the_middle() -> None:
    generator = np.random.default_rng(0)
    assert resized_crop_box(1000, 100, 1.0, generator) == (433, 0, 566, 100)
    assert resized_crop_box(100, 1000, 1.0, generator) == (0, 433, 100, 566)
    assert resized_crop_box(1, 1, 0.05, generator) == (0, 0, 1, 1)


def test_a_padded_crop_moves_by_up_to_an_eighth_and_is_black_outside() -> None:
    generator = np.random.default_rng(0)
    boxes = {padded_crop_box(32, generator) for _ in range(2000)}
    assert {left for left, *_ in boxes} == {top for _, top, *_ in boxes} == {*range(-4, 5)}
    assert all(right - left == bottom - top == 32 for left, top, right, bottom in boxes)
    white = Image.new("RGB", (32, 32), (255, 255, 255))
    image = np.asarray(augment(white, 32, "padded", False, 1.0, np.random.default_rng(3)))
    left, top, *_ = padded_crop_box(32, np.random.default_rng(3))
    assert (image == 0).all(axis=-1).sum() == 32 * 32 - (32 - abs(left)) * (32 - abs(top))


def test_half_of_the_images_are_mirrored_if_asked() -> None:
    row = Image.fromarray(np.array([[[0] * 3, [255] * 3]] * 2, dtype=np.uint8))
    generator = np.random.default_rng(0)
    mirrored = [augment(row, 2, None, True, 1.0, generator).getpixel((0, 0)) == (255, 255, 255) for _ in range(1000)]
    assert 450 < sum(mirrored) < 550
    assert augment(row, 2, None, False, 1.0, generator).getpixel((0, 0)) == (0, 0, 0)


def test_pixels_are_normalized_by_channel() -> None:
    image = Image.fromarray(np.array([[[0, 51, 255]]], dtype=np.uint8))
    values = to_pixel_values([image, image], (0.5, 0.2, 0.0), (0.5, 0.1, 2.0))
    assert values.shape == (2, 3, 1, 1)
    torch.testing.assert_close(values[1].flatten(), torch.tensor([-1.0, 0.0, 0.5]))


def test_an_image_is_the_same_in_whichever_batch_it_stands_and_new_in_each_epoch(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(256, size=(30, 12, 9, 3), dtype=np.uint8)
    path = write_npz(tmp_path / "noise.npz", images=noise)
    for crop in ("resized", "padded"):
        recipe = SMALL.replace(**{"data.train": str(path), "data.crop": crop})
        task = ImageClassification(recipe)
        batch = task.train_batch([5, 3, 8, 1], epoch=2)
        parts = [task.train_batch([5], epoch=2), ImageClassification(recipe).train_batch([3, 8, 1], epoch=2)]
        for name in ("pixel_values", "labels"):
            assert torch.equal(batch[name], torch.cat([part[name] for part in parts]))
        assert not torch.equal(task.train_batch([5, 3, 8, 1], epoch=3)["pixel_values"], batch["pixel_values"])
        other = ImageClassification(recipe.replace(seed=1)).train_batch([5, 3, 8, 1], epoch=2)
        assert not torch.equal(other["pixel_values"], batch["pixel_values"])


def test_a_batch_is_the_same_however_many_threads_decode_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(256, size=(30, 12, 9, 3), dtype=np.uint8)
    one = ImageClassification(SMALL.replace(**{"data.train": str(write_npz(tmp_path / "noise.npz", images=noise))}))
    batches = []
    for threads in (1, 16):
        monkeypatch.setattr(image_task, "DECODERS", threads)
        batches.append(one.train_batch([*range(20)], epoch=1)["pixel_values"])
    assert torch.equal(*batches)


FEW = SMALL.replace(
    **{"data.crop": "padded", "data.valid_size": 5, "data.test_size": 5, "data.labels": 6, "data.unlabeled": "all"},
    **{"data.unlabeled_batch": 4, "batch_size": 4},
)


def noise_npz(path: Path, size: int = 30, **members: Any) -> str:
    noise = np.random.default_rng(0).integers(256, size=(size, 12, 9, 3), dtype=np.uint8)
    return str(write_npz(path, size, images=noise, **members))


def test_few_labels_are_drawn_by_the_seed_and_all_images_are_there_without_a_label(tmp_path: Path) -> None:
    path = noise_npz(tmp_path / "noise.npz")
    task = ImageClassification(FEW.replace(**{"data.train": path}))
    other = ImageClassification(FEW.replace(seed=1, **{"data.train": path}))
    whole = ImageClassification(FEW.replace(**{"data.train": path, "data.labels": None, "data.unlabeled": None}))
    assert (task.train_size(), task.unlabeled_size()) == (6, 20)
    assert (whole.train_size(), whole.unlabeled_size()) == (20, 0)
    pool = set(whole.splits["train"].rows.tolist())
    assert set(task.splits["train"].rows.tolist()) < pool
    assert set(task.splits["train"].rows.tolist()) != set(other.splits["train"].rows.tolist())
    assert task.splits["test"].rows.tolist() == other.splits["test"].rows.tolist()
    assert len(set(np.bincount(task.train_batch(list(range(6)), 0)["labels"]).tolist())) == 1
    batch = task.unlabeled_batch([3, 8], 1)
    assert not batch["labels"].any()
    assert torch.equal(task.unlabeled_batch([8], 1)["pixel_values"][0], batch["pixel_values"][1])
    assert not torch.equal(task.unlabeled_batch([3, 8], 1, 1)["pixel_values"], batch["pixel_values"])
    with pytest.raises(DataError, match=r"has 20 examples to train on, and data\.labels=21"):
        ImageClassification(FEW.replace(**{"data.train": path, "data.labels": 21}))


def test_unlabeled_images_of_ones_own_are_a_folder_class_folders_or_an_npz_and_need_no_labels(tmp_path: Path) -> None:
    given = {"data.train": noise_npz(tmp_path / "noise.npz")}
    flat = tmp_path / "flat"
    flat.mkdir()
    for number in range(3):
        write_image(flat / f"{number}.png")
    np.savez(tmp_path / "more.npz", images=np.full((7, 4, 4), 9, dtype=np.uint8))
    write_classes(tmp_path / "classes", {"x": 2, "y": 3, "z": 1})
    for place, size in (("flat", 3), ("more.npz", 7), ("classes", 6), ("noise.npz", 30)):
        task = ImageClassification(FEW.replace(**given, **{"data.unlabeled": str(tmp_path / place)}))
        assert task.unlabeled_size() == size
        assert task.unlabeled_batch([0, size - 1], 0)["pixel_values"].shape == (2, 3, 8, 8)
    assert task.notes["test images that are unlabeled examples too"] == "5 of 5, byte for byte"
    (flat / "sub").mkdir()
    for place, said in (("flat", "has images and folders"), ("none", "there is no such file or folder")):
        with pytest.raises(DataError, match=said):
            ImageClassification(FEW.replace(**given, **{"data.unlabeled": str(tmp_path / place)}))


def test_r_drop_learns_from_unlabeled_images_and_plain_training_does_not_see_them(tmp_path: Path) -> None:
    short = {"updates": 4, "warmup_updates": 0, "evaluate_every": 2, "checkpoint_every": 4, "batch_size": 3}
    recipe = FEW.replace(views="each", **short, **{"data.train": noise_npz(tmp_path / "noise.npz")})
    train(recipe, tmp_path / "r-drop")
    alone = recipe.replace(**{"data.unlabeled": None})
    train(alone, tmp_path / "labels")
    assert RunFolder(tmp_path / "r-drop").metrics()[0] != RunFolder(tmp_path / "labels").metrics()[0]
    losses = []
    for own in (recipe, alone):
        plain = own.replace(method=own.method.plain())
        folder = tmp_path / plain.digest()
        train(plain, folder)
        losses.append([row["loss"] for row in RunFolder(folder).metrics()])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("crop", ["padded", "resized"])
def test_each_view_is_another_augmentation_and_the_first_is_as_always(cifar: Path, crop: str) -> None:
    task = ImageClassification(CIFAR_10_4K.replace(**{"data.folder": str(cifar), "data.crop": crop}))
    shared, other = task.train_batch([5, 3, 8], 2), task.train_batch([5, 3, 8], 2, 1)
    assert torch.equal(task.train_batch([5, 3, 8], 2, 0)["pixel_values"], shared["pixel_values"])
    assert torch.equal(task.train_batch([3], 2, 1)["pixel_values"][0], other["pixel_values"][1])
    assert torch.equal(other["labels"], shared["labels"])
    assert not any(torch.equal(a, b) for a, b in zip(shared["pixel_values"], other["pixel_values"], strict=True))


def test_views_of_images_that_are_not_augmented_are_refused() -> None:
    assert ImageClassificationRecipe.parse(CIFAR_10_4K.replace(views="each").saved()).data.is_augmented
    with pytest.raises(RecipeError, match=r'^views="each": needs data\.crop or data\.flip'):
        CIFAR_10_4K.replace(views="each", **{"data.crop": None, "data.flip": False})


def test_without_crop_and_flip_training_images_are_the_images(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "x.npz")
    task = ImageClassification(SMALL.replace(**{"data.train": str(path), "data.crop": None, "data.flip": False}))
    rows = task.splits["train"].rows[[4, 0]]
    batch = task.train_batch([4, 0], epoch=0)
    torch.testing.assert_close(batch["pixel_values"][:, 0, 0, 0], torch.from_numpy(rows / 127.5 - 1).float())
    assert batch["labels"].tolist() == (rows % 3).tolist()


# --------------------------------------------------------------------------------------------------- model and scores


def test_a_vit_from_scratch_is_the_one_of_the_recipe(tmp_path: Path) -> None:
    changes = {"model.dropout": 0.25, "model.attention_dropout": 0.35, "model.layers": 3}
    task = ImageClassification(SMALL.replace(**changes, **{"data.train": str(write_npz(tmp_path / "x.npz"))}))
    model = task.build_model().train()
    assert (model.config.num_hidden_layers, model.config.image_size, model.config.patch_size) == (3, 8, 4)
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.25, 0.35}
    batch = task.train_batch([0, 0], epoch=0)
    assert torch.equal(task.logits(model, batch), torch.zeros(2, 3))  # the output layer starts at 0
    nn.init.normal_(model.classifier.weight)
    first, second = task.logits(model, batch)
    assert not torch.equal(first, second)


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A ViT of five classes at 16 pixels, as it would come from the hub."""
    folder = tmp_path / "pretrained"
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=5, **shape)).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 4]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def fine_tuning(pretrained: Path, tmp_path: Path, **changes: object) -> ImageClassification:
    recipe = IMAGE_CLASSIFICATION.replace(**{"model.name": str(pretrained), "data.image_size": 16, **changes})
    return ImageClassification(recipe.replace(**{"data.train": str(write_npz(tmp_path / "x.npz"))}))


@pytest.mark.parametrize(
    ("settings", "black", "white"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, -1, 1),
        ({"image_mean": [1] * 3, "image_std": [1] * 3, "rescale_factor": 1 / 127.5}, -1, 1),
        ({"do_normalize": False, "rescale_factor": 1 / 127.5, "rescale_offset": True}, -1, 1),
        ({"do_normalize": False}, 0, 1),
        ({"do_normalize": False, "do_rescale": False}, 0, 255),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "include_top": True}, -2, 2),
    ],
)
def test_pixels_are_prepared_as_the_processor_of_the_model_says(
    pretrained: Path, tmp_path: Path, settings: dict[str, Any], black: float, white: float
) -> None:
    (pretrained / "preprocessor_config.json").write_text(json.dumps(settings))
    task = fine_tuning(pretrained, tmp_path)
    for color, value in (("black", black), ("white", white)):
        pixels = to_pixel_values([Image.new("RGB", (1, 1), color)], task._mean, task._std)
        assert pixels.flatten().tolist() == pytest.approx([value] * 3, abs=1e-4)


def test_a_processor_that_swaps_colors_is_refused(pretrained: Path, tmp_path: Path) -> None:
    settings = {"do_normalize": False, "do_flip_channel_order": True}
    (pretrained / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(RecipeError, match=r"swaps red and blue \(do_flip_channel_order\), which is not supported"):
        fine_tuning(pretrained, tmp_path)


def test_a_pretrained_model_gets_dropout_a_new_output_layer_and_its_own_normalization(
    pretrained: Path, tmp_path: Path
) -> None:
    task = fine_tuning(pretrained, tmp_path, **{"model.dropout": 0.2, "model.attention_dropout": 0.3})
    model = task.build_model().train()
    assert {source.rate for source in dropout_sources(model) if source.active} == {0.2, 0.3}
    assert model.classifier.weight.shape == (3, 8)
    assert not model.classifier.weight.any()
    saved = ViTForImageClassification.from_pretrained(pretrained)
    assert torch.equal(saved.vit.embeddings.position_embeddings, model.vit.embeddings.position_embeddings)
    black = to_pixel_values([Image.new("RGB", (1, 1))], task._mean, task._std)
    torch.testing.assert_close(black.flatten(), torch.tensor([-0.1, -0.1, -0.075]))


def test_an_output_layer_of_as_many_classes_is_replaced(pretrained: Path, tmp_path: Path) -> None:
    before = ViTForImageClassification.from_pretrained(pretrained, num_labels=3, ignore_mismatched_sizes=True)
    before.save_pretrained(pretrained)
    model: Any = fine_tuning(pretrained, tmp_path, **{"model.zero_head": False}).build_model()
    assert not torch.equal(model.classifier.weight, before.classifier.weight)
    assert torch.equal(model.vit.layernorm.weight, before.vit.layernorm.weight)


def test_a_pretrained_model_interpolates_its_positions_for_another_image_size(pretrained: Path, tmp_path: Path) -> None:
    task = fine_tuning(pretrained, tmp_path, **{"data.image_size": 24})
    batch = task.train_batch([0, 1], epoch=0)
    assert batch["pixel_values"].shape == (2, 3, 24, 24)
    assert task.logits(task.build_model(), batch).shape == (2, 3)
    assert set(task.evaluate(task.build_model().eval(), "valid")) == {"loss", "accuracy", "ece"}


def test_a_model_that_cannot_be_had_as_asked_is_refused(pretrained: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.name=.*cannot be loaded"):
        fine_tuning(tmp_path / "nowhere", tmp_path)
    (pretrained / "model.safetensors").rename(pretrained / "pytorch_model.bin")
    with pytest.raises(RecipeError, match=r"model\.name=.*cannot be loaded.*safetensors"):
        fine_tuning(pretrained, tmp_path).build_model()
    (pretrained / "preprocessor_config.json").unlink()
    with pytest.raises(RecipeError, match=r"model\.name=.*preprocessor_config\.json"):
        fine_tuning(pretrained, tmp_path)


def test_dropout_that_a_model_does_not_have_is_refused(pretrained: Path, tmp_path: Path) -> None:
    config = ConvNextConfig(hidden_sizes=[4, 4], depths=[1, 1], num_stages=2, num_labels=5)
    ConvNextForImageClassification(config).save_pretrained(pretrained)
    with pytest.raises(RecipeError, match=r"model\.dropout=0\.1: must be 0: a convnext model has no such rate"):
        fine_tuning(pretrained, tmp_path)
    plain = {"alpha": 0.0, "model.dropout": 0.0, "model.attention_dropout": 0.0}
    task = fine_tuning(pretrained, tmp_path, **plain)
    assert task.logits(task.build_model(), task.train_batch([0], epoch=0)).shape == (1, 3)


def test_accuracy_and_loss_are_those_of_all_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image i has the gray value i and the class i % 3; a model that says class 1 with 2 to 1 to 1 odds."""
    monkeypatch.setattr("rdrop.experiments.tasks.image_classification.task.EVALUATION_BATCH", 4)
    write_npz(tmp_path / "test.npz", 10)
    data = {"data.train": str(write_npz(tmp_path / "x.npz")), "data.test": str(tmp_path / "test.npz")}
    task = ImageClassification(SMALL.replace(**data))
    seen = []

    class Fixed(nn.Linear):
        def forward(self, pixel_values: torch.Tensor) -> Any:  # type: ignore[override]
            seen.extend(((pixel_values[:, 0, 0, 0] + 1) * 127.5).round().int().tolist())
            return SimpleNamespace(logits=torch.tensor([[1.0, 2.0, 1.0]]).log().expand(len(pixel_values), 3))

    scores = task.evaluate(Fixed(1, 1), "test")
    assert seen == [*range(10)]
    assert scores["accuracy"] == 0.3  # 1, 4 and 7 of 0 to 9
    assert scores["loss"] == pytest.approx((7 * np.log(4) + 3 * np.log(2)) / 10)
    assert scores["ece"] == pytest.approx(0.5 - 0.3)
    assert task.notes["predictions on test"] == "all 10 are '1': the model does not tell the classes apart"


# ------------------------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_recipe_learns_in_its_tiny_form(recipe: ImageClassificationRecipe, tmp_path: Path) -> None:
    result = train(recipe.tiny(), tmp_path)
    losses = [row["task_loss"] for row in RunFolder(tmp_path).metrics() if row["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert result["metric"] == "accuracy"
    assert result["test"]["accuracy"] > 1 / 3  # there are three classes


def test_published_figures_belong_to_recipes() -> None:
    assert set(PUBLISHED) < {recipe.name for recipe in RECIPES}
    assert all(row.rdrop > row.baseline for rows in PUBLISHED.values() for row in rows)


@pytest.mark.parametrize(
    ("recipe", "changes", "rule"),
    [
        (
            CIFAR_100_VIT_B16,
            {"model.layers": 6},
            "model.layers=6: must be null: google/vit-base-patch16-224-in21k has its own",
        ),
        (CIFAR_100_VIT_B16, {"model.name": None}, "model.layers=null: must be given for a model from scratch"),
        (CIFAR_10_4K, {"model.heads": 5}, "model.hidden_size=.*: must be divisible by model.heads"),
        (CIFAR_10_4K, {"data.image_size": 33}, "model.patch_size=.*: must divide data.image_size"),
        (CIFAR_10_4K, {"data.test": "x"}, 'data.test="x": needs data.train'),
        (IMAGENET_VIT_L16, {"data.valid_split": "validation"}, "data.test_split=.*what chooses must not score"),
        (CIFAR_10_4K, {"data.smallest_crop": 0.0}, "data.smallest_crop=0.0: must be greater than 0"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    recipe: ImageClassificationRecipe, changes: dict[str, object], rule: str
) -> None:
    with pytest.raises(RecipeError, match=rule):
        recipe.replace(**changes)


def test_the_tiny_images_are_removed_with_their_task() -> None:
    task = ImageClassification(SMALL.tiny())
    folder = Path(re.sub(r".train$", "", task.splits["train"].images.where))
    assert folder.is_dir()
    del task
    assert not folder.exists()

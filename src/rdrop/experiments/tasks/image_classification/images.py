"""Image sets: a folder with one sub-folder for each class, an .npz file, CIFAR-100's binary file, a hub data set.

Of files in folders and on the hub only the names and labels are read at once, and an image when it is asked for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdrop.experiments.run_folder.data_files import note_read
from rdrop.experiments.tasks.files import DataError, MissingDataError, load_hub, require_regular_file
from rdrop.experiments.tasks.image_classification.labels import (
    require_labels,
    require_names_that_can_be_shown,
    require_one_spelling,
)
from rdrop.experiments.tasks.image_classification.npz import read_arrays, read_pixels, require_memory
from rdrop.experiments.tasks.image_classification.sources import Files, HubImages, Pixels, Source
from rdrop.experiments.tasks.spelling import label_key

SUFFIXES = frozenset(
    {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"}
)
CIFAR_100_CLASSES, CIFAR_EDGE = 100, 32
CIFAR_100_RECORD = 2 + 3 * CIFAR_EDGE**2  # coarse label, fine label, red, green, blue


@dataclass(frozen=True)
class ImageSet:
    where: str
    """The folder, file or data set, for errors."""
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """Of each image, its place in `classes`."""
    source: Source
    declares_classes: bool = True
    """Whether the classes are listed apart from the labels; else they are the numbers from 0 to the highest label."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> Image.Image:
        """Returns the image at an index, in RGB. Raises `DataError`; safe in several threads at once."""
        return self.source.read(index)

    def name(self, index: int) -> str:
        """Returns what a reader finds the image at an index by."""
        return self.source.name(index)

    def with_classes(self, classes: tuple[str, ...]) -> ImageSet:
        """Returns the same images, labeled by the places in another list, which must have all classes in use."""
        places = {label_key(name): place for place, name in enumerate(classes)}
        table = np.array([places.get(label_key(name), -1) for name in self.classes], dtype=np.int64)
        labels = table[self.labels]
        if len(labels) and labels.min() < 0:
            name = self.classes[self.labels[np.argmin(labels)]]
            raise DataError(
                f"{self.where}: the class {name!r} is not among those of the images to train on; correct it"
            )
        return replace(self, classes=classes, labels=labels)


def read_images(path: Path) -> ImageSet:
    """Reads a folder with a sub-folder for each class, or a file: `.npz`, or `.bin` as in CIFAR-100."""
    if os.path.isdir(path):  # as methods of Path these may raise
        return read_class_folders(path)
    if not os.path.exists(path):
        raise MissingDataError(f"{path}: there is no such file or folder; check the path, and that it may be read")
    match path.suffix:
        case ".npz":
            return read_npz(path)
        case ".bin":
            return read_cifar_100(path)
    raise DataError(f"{path}: must be a folder with a sub-folder for each class, or an .npz file")


def read_unlabeled(path: Path) -> tuple[Source, int]:
    """Reads images without labels, and their number: a folder of images, class folders, `.npz`, `.bin` as in CIFAR-100.

    What says the classes of labeled images is not read.
    """
    if os.path.isdir(path):
        folders = [Path(entry.path) for entry in entries_of(path) if os.path.isdir(entry.path)]
        if not folders:
            names = _images_of(path)
        elif len(folders) < len(entries_of(path)):
            raise DataError(f"{path}: has images and folders; give a folder of images, or of folders of images")
        else:
            names = [f"{folder.name}/{file}" for folder in folders for file in _images_of(folder)]
        return Files(path, names), len(names)
    if path.suffix == ".npz" and os.path.exists(path):
        pixels = read_pixels(path)
        return Pixels(pixels), len(pixels)
    found = read_images(path)
    return found.source, len(found)


def read_class_folders(root: Path) -> ImageSet:
    """Reads `root/CLASS/IMAGE`: the classes in the order of their names, and so the images of each."""
    entries = entries_of(root)
    for entry in entries:
        if not os.path.isdir(entry.path):
            raise DataError(
                f"{entry.path}: is no folder; a folder of images has one sub-folder for each class, nothing else"
            )
    if len(entries) < 2:
        raise DataError(f"{root}: has {len(entries)} sub-folders; it needs one for each class, two or more")
    classes = tuple(entry.name for entry in entries)
    require_names_that_can_be_shown(classes, str(root))
    require_one_spelling(classes, str(root))
    files = [_images_of(Path(entry.path)) for entry in entries]
    names = [f"{label}/{file}" for label, of_class in zip(classes, files, strict=True) for file in of_class]
    labels = np.repeat(np.arange(len(entries)), [len(of_class) for of_class in files])
    return ImageSet(str(root), classes, labels, Files(root, names))


def read_npz(path: Path) -> ImageSet:
    """Reads an .npz file with `images` (uint8, `(N, H, W, 3)` or, gray, `(N, H, W)`) and `labels` (from 0, `(N,)`).

    There are as many classes as the highest label plus one.
    """
    images, labels = read_arrays(path)
    return ImageSet(str(path), _numbers(labels.max() + 1), labels, Pixels(images), declares_classes=False)


def read_cifar_100(path: Path) -> ImageSet:
    """Reads `train.bin` or `test.bin` of CIFAR-100's binary version; the labels are the fine ones."""
    require_regular_file(path)
    note_read(path)
    try:
        size = path.stat().st_size
        if not size or size % CIFAR_100_RECORD:
            raise DataError(
                f"{path}: has {size} bytes, which is not a whole number of CIFAR-100's records of {CIFAR_100_RECORD}; "
                "get it again"
            )
        require_memory(size, str(path))
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise MissingDataError(f"{path}: {error.strerror or error}; check the file") from error
    records = content.reshape(-1, CIFAR_100_RECORD)
    labels = records[:, 1]
    require_labels(labels, len(labels), str(path), classes=CIFAR_100_CLASSES)
    pixels = records[:, 2:].reshape(-1, 3, CIFAR_EDGE, CIFAR_EDGE).transpose(0, 2, 3, 1)
    images = Pixels(np.ascontiguousarray(pixels))
    return ImageSet(str(path), _numbers(CIFAR_100_CLASSES), labels.astype(np.int64), images)


def read_hub(hub: str, config: str | None, split: str, image_column: str, label_column: str) -> ImageSet:
    """Reads a split of a data set on the hub, with a column of images and one of labels: texts, or integers from 0."""
    rows = load_hub(hub, config, split)
    where = f"{hub} ({split})"
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise DataError(f"{where}: has no column {column!r}; set data.{key} to one of {columns}")
    found = rows.select_columns([label_column])[:][label_column]
    if None in found:
        raise DataError(f"{where}:{found.index(None) + 1}: {label_column} has no value; choose another column or split")
    labels = np.asarray(found)
    names = getattr(rows.features[label_column], "names", None)
    if names is None and labels.dtype.kind == "U":
        names, labels = np.unique(labels, return_inverse=True)
    require_labels(labels, len(rows), f"{where}:{label_column}", classes=None if names is None else len(names))
    classes = _numbers(labels.max() + 1) if names is None else tuple(map(str, names))
    require_one_spelling(classes, f"{where}:{label_column}")
    images = HubImages(rows, image_column, where)
    return ImageSet(where, classes, labels.astype(np.int64), images, declares_classes=names is not None)


def _numbers(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))


def entries_of(folder: Path) -> list[os.DirEntry[str]]:
    """Returns what is in the folder, by name, without hidden files."""
    note_read(folder)
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        raise MissingDataError(f"{folder}: {error.strerror or error}; check the folder") from error


def _images_of(folder: Path) -> list[str]:
    """Returns the names of the images of a class."""
    entries = entries_of(folder)
    if not entries:
        raise DataError(f"{folder}: the class has no images; add some, or delete the folder")
    for entry in entries:
        if os.path.isdir(entry.path):
            raise DataError(
                f"{entry.path}: is a folder in the folder of a class; if these are splits, call them train, valid and "
                "test, in lower case, else move it away"
            )
        if os.path.splitext(entry.name)[1].lower() not in SUFFIXES:
            shown = " ".join(sorted(SUFFIXES))
            raise DataError(f"{entry.path}: is no image by its name ({shown}); move it away")
        if not _is_regular_file(entry):
            require_regular_file(Path(entry.path))
            raise DataError(f"{entry.path}: is a link to nothing; delete it")
    return [entry.name for entry in entries]


def _is_regular_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()  # from the listing: nothing more is asked of the disk, except of a link
    except OSError:  # a link that ends nowhere
        return False

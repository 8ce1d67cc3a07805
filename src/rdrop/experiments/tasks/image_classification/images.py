"""Image sets: a folder with one sub-folder for each class, an .npz file, CIFAR-100's binary file, a hub data set.

Of files in folders and on the hub only the names and labels are read at once, and an image when it is asked for.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdrop.experiments.tasks.files import DataError, load_hub

Pixels = NDArray[np.uint8]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
CIFAR_100_CLASSES, CIFAR_EDGE = 100, 32
CIFAR_100_RECORD = 2 + 3 * CIFAR_EDGE**2  # coarse label, fine label, red, green, blue

# All that Pillow raises for a file that is no image, or a damaged one.
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)

# All that zipfile and NumPy raise for a file that is no .npz, or a damaged one.
DAMAGED_NPZ = (OSError, EOFError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class ImageSet:
    where: str
    """The folder, file or data set, for errors."""
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    """Of each image, its place in `classes`."""
    read: Callable[[int], Image.Image]
    """The image at an index, in RGB. Raises `DataError`; safe in several threads at once."""
    name: Callable[[int], str] = "image {}".format
    """What a reader finds the image at an index by."""

    def __len__(self) -> int:
        return len(self.labels)

    def with_classes(self, classes: tuple[str, ...]) -> ImageSet:
        """The same images, labeled by the places in another list, which must have all classes that are in use."""
        places = {name: place for place, name in enumerate(classes)}
        table = np.array([places.get(name, -1) for name in self.classes], dtype=np.int64)
        labels = table[self.labels]
        if len(labels) and labels.min() < 0:
            name = self.classes[self.labels[np.argmin(labels)]]
            raise DataError(
                f"{self.where}: the class {name!r} is not among those of the images to train on; correct it"
            )
        return replace(self, classes=classes, labels=labels)


def read_images(path: Path) -> ImageSet:
    """A folder with a sub-folder for each class, or a file: `.npz`, or `.bin` as in CIFAR-100."""
    if path.is_dir():
        return read_class_folders(path)
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder; check the path")
    match path.suffix:
        case ".npz":
            return read_npz(path)
        case ".bin":
            return read_cifar_100(path)
    raise DataError(f"{path}: must be a folder with a sub-folder for each class, or an .npz file")


def read_class_folders(root: Path) -> ImageSet:
    """`root/CLASS/IMAGE`: the classes in the order of their names, and so the images of each."""
    entries = _entries(root)
    for entry in entries:
        if not entry.is_dir():
            raise DataError(
                f"{entry}: is no folder; a folder of images has one sub-folder for each class, nothing else"
            )
    if len(entries) < 2:
        raise DataError(f"{root}: has {len(entries)} sub-folders; it needs one for each class, two or more")
    names = [[file.name for file in _images_of(entry)] for entry in entries]
    files = [name for of_class in names for name in of_class]
    labels = np.repeat(np.arange(len(entries)), [len(of_class) for of_class in names])

    def read(index: int) -> Image.Image:
        path = entries[labels[index]] / files[index]
        try:
            with Image.open(path) as image:
                return image.convert("RGB")
        except DAMAGED as error:
            raise DataError(f"{path}: cannot be read as an image ({error}); replace or delete it") from error

    def name(index: int) -> str:
        return f"{entries[labels[index]].name}/{files[index]}"

    return ImageSet(str(root), tuple(entry.name for entry in entries), labels, read, name)


def read_npz(path: Path) -> ImageSet:
    """An .npz file with `images` (uint8, `(N, H, W, 3)` or, gray, `(N, H, W)`) and `labels` (integers from 0, `(N,)`).

    There are as many classes as the highest label plus one. Nothing in the file is executed: no pickles are read.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the file") from error
    with file, _archive(file, path) as archive:
        images, labels = (_member(archive, name, path) for name in ("images", "labels"))
    _require_images(images, f"{path}:images")
    _require_labels(labels, len(images), f"{path}:labels")
    names = tuple(map(str, range(int(labels.max()) + 1)))
    return _of_arrays(str(path), names, images, labels)


def read_cifar_100(path: Path) -> ImageSet:
    """`train.bin` or `test.bin` of CIFAR-100's binary version; the labels are the fine ones."""
    try:
        content = np.fromfile(path, dtype=np.uint8)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}; check the file") from error
    if not content.size or content.size % CIFAR_100_RECORD:
        raise DataError(
            f"{path}: has {content.size} bytes, which is not a whole number of CIFAR-100's records of "
            f"{CIFAR_100_RECORD}; get it again"
        )
    records = content.reshape(-1, CIFAR_100_RECORD)
    labels = records[:, 1]
    _require_labels(labels, len(labels), str(path), classes=CIFAR_100_CLASSES)
    pixels = records[:, 2:].reshape(-1, 3, CIFAR_EDGE, CIFAR_EDGE).transpose(0, 2, 3, 1)
    return _of_arrays(str(path), tuple(map(str, range(CIFAR_100_CLASSES))), np.ascontiguousarray(pixels), labels)


def read_hub(hub: str, config: str | None, split: str, image_column: str, label_column: str) -> ImageSet:
    """A split of a data set on the hub, with a column of images and one of labels, integers from 0."""
    rows = load_hub(hub, config, split)
    where = f"{hub} ({split})"
    for key, column in (("image_column", image_column), ("label_column", label_column)):
        if column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise DataError(f"{where}: has no column {column!r}; set data.{key} to one of {columns}")
    labels = np.asarray(rows.select_columns([label_column])[:][label_column])
    names = getattr(rows.features[label_column], "names", None)
    _require_labels(labels, len(rows), f"{where}:{label_column}", classes=len(names) if names else None)

    def read(index: int) -> Image.Image:
        try:
            image: Any = rows[index][image_column]
            return image.convert("RGB")  # type: ignore[no-any-return]
        except (*DAMAGED, AttributeError) as error:
            raise DataError(f"{where}:{index}: {image_column} cannot be read as an image ({error})") from error

    classes = tuple(names) if names else tuple(map(str, range(int(labels.max()) + 1)))
    return ImageSet(where, classes, labels.astype(np.int64), read)


def _of_arrays(where: str, classes: tuple[str, ...], images: Pixels, labels: NDArray[Any]) -> ImageSet:
    def read(index: int) -> Image.Image:
        return Image.fromarray(images[index]).convert("RGB")

    return ImageSet(where, classes, labels.astype(np.int64), read)


def _entries(folder: Path) -> list[Path]:
    """What is in the folder, by name, without hidden files."""
    try:
        return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror or error}; check the folder") from error


def _images_of(folder: Path) -> list[Path]:
    entries = _entries(folder)
    if not entries:
        raise DataError(f"{folder}: the class has no images; add some, or delete the folder")
    for entry in entries:
        if entry.suffix.lower() not in SUFFIXES:
            shown = " ".join(sorted(SUFFIXES))
            raise DataError(f"{entry}: is no image by its name ({shown}); move it away")
    return entries


def _archive(file: BinaryIO, path: Path) -> Any:
    try:
        archive = np.load(file, allow_pickle=False)  # given a path, it would leave a broken file open
    except DAMAGED_NPZ as error:
        raise DataError(f"{path}: cannot be read as .npz ({error}); get it again, or write it with savez") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"{path}: is no .npz file; write it with numpy.savez(path, images=..., labels=...)")
    return archive


def _member(archive: Any, name: str, path: Path) -> NDArray[Any]:
    if name not in archive.files:
        members = ", ".join(map(repr, archive.files)) or "nothing"
        raise DataError(f"{path}: has no member {name!r}, only {members}; write it with savez(path, images=, labels=)")
    try:
        member: NDArray[Any] = archive[name]
    except DAMAGED_NPZ as error:
        raise DataError(f"{path}:{name}: cannot be read ({error}); get the file again") from error
    return member


def _require_images(images: NDArray[Any], where: str) -> None:
    gray, color = images.ndim == 3, images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (gray or color) or not images.size:
        raise DataError(
            f"{where}: must be uint8 of shape (N, height, width, 3) or (N, height, width), not {images.dtype} of shape "
            f"{images.shape}; convert it"
        )


def _require_labels(labels: NDArray[Any], images: int, where: str, *, classes: int | None = None) -> None:
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where}: must be integers of shape (N,), not {labels.dtype} of shape {labels.shape}; convert it"
        )
    if len(labels) != images:
        raise DataError(f"{where}: has {len(labels)} labels for {images} images; each image needs its own")
    limit = classes or len(labels)  # more classes than images is a slip
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(wrong):
        raise DataError(
            f"{where}: label {wrong[0]} is {labels[wrong[0]]}; labels are from 0 to {limit - 1}, so correct it"
        )

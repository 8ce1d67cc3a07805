"""Finds and reads the images of a set: files in folders, an array, a data set of the hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rdrop.experiments.tasks.files import DataError, MissingDataError
from rdrop.experiments.tasks.image_classification.pixels import read_image_bytes, read_image_file

T = TypeVar("T")


class Source(Protocol):
    """N images by their index. All methods are safe in several threads at once; they raise `DataError`."""

    def read(self, index: int) -> Image.Image:
        """Returns the image in RGB."""

    def name(self, index: int) -> str:
        """Returns what a reader finds the image by."""

    def stored(self, index: int) -> bytes:
        """Returns the bytes that the image is kept as: those of its file, or its pixels."""

    def sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the number of these bytes of some images, as many as there are `rows`: found without reading them."""


class Files:
    """`root/NAME` for each of `names`."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self._root, self._names = root, names

    def read(self, index: int) -> Image.Image:
        return read_image_file(self._root / self._names[index])

    def name(self, index: int) -> str:
        return self._names[index].encode(errors="backslashreplace").decode()  # bytes that are not UTF-8

    def stored(self, index: int) -> bytes:
        return _of_file(self._root / self._names[index], Path.read_bytes)

    def sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        paths = (self._root / self._names[row] for row in rows.tolist())
        return np.array([_of_file(path, os.path.getsize) for path in paths], dtype=np.int64)


class Pixels:
    """An array, uint8 `(N, H, W, 3)` or `(N, H, W)`."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = images

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self._images[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"image {index}"

    def stored(self, index: int) -> bytes:
        pixels: NDArray[np.uint8] = self._images[index]
        return pixels.tobytes()

    def sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full(len(rows), self._images[0].nbytes)


class HubImages:
    """A column of images of a data set on the hub, where each is the content of a file, or the path of one."""

    def __init__(self, rows: Any, column: str, where: str) -> None:
        import datasets  # seconds to import

        try:
            # The files themselves: the library would decode them in any format that Pillow knows.
            self._rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        except Exception as error:  # pyarrow's, or the library's own
            kind = rows.features[column]
            raise DataError(f"{where}: {column} has no images, but {kind}; set data.image_column") from error
        self._column, self._where = column, where

    def read(self, index: int) -> Image.Image:
        found = self._content(index)
        return read_image_bytes(found, self._at(index)) if isinstance(found, bytes) else read_image_file(found)

    def name(self, index: int) -> str:
        return f"image {index}"

    def stored(self, index: int) -> bytes:
        found = self._content(index)
        return found if isinstance(found, bytes) else _of_file(found, Path.read_bytes)

    def sizes(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return self._sizes[rows]

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        import pyarrow.compute

        content = self._rows.with_format("arrow")[:][self._column]
        sizes = [pyarrow.compute.binary_length(chunk.field("bytes")) for chunk in content.chunks]
        found = np.array([size for chunk in sizes for size in chunk.to_pylist()], dtype=np.float64)
        for index in np.flatnonzero(np.isnan(found)):
            found[index] = len(self.stored(int(index)))
        return found.astype(np.int64)

    def _at(self, index: int) -> str:
        return f"{self._where}:{index + 1}:{self._column}"

    def _content(self, index: int) -> bytes | Path:
        try:
            image = self._rows[index][self._column] or {"bytes": None, "path": None}
            content, path = image["bytes"], image["path"]
        except Exception as error:  # a cache that was deleted
            reason = " ".join(str(error).split())
            raise DataError(f"{self._at(index)}: cannot be read ({reason}); download it again") from error
        if content is not None:
            return bytes(content)
        if path is None:
            raise DataError(f"{self._at(index)}: there is no image; choose another column or split")
        return Path(path)


def _of_file(path: Path, asked: Callable[[Path], T]) -> T:
    try:
        return asked(path)
    except OSError as error:
        raise MissingDataError(f"{path}: {error.strerror or error}; check the file") from error

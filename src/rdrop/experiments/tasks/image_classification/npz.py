"""Reads images and labels from an .npz file, once what its headers promise fits together and with what is there.

Before that nothing is unpacked: of 6 MB on the disk 6 GB can come. No pickles are read, so that nothing is executed.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from rdrop.experiments.run_folder.data_files import note_read
from rdrop.experiments.tasks.files import DataError, require_regular_file
from rdrop.experiments.tasks.image_classification.labels import require_label_for_each, require_labels

GIB = 2**30
IMAGES, LABELS = "images", "labels"


def read_arrays(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns `images`, uint8 `(N, H, W, 3)` or `(N, H, W)`, and `labels` `(N,)`, from 0. Raises `DataError`."""
    require_regular_file(path)
    with _opened(path) as archive:
        promised = {name: _header(archive, name, path) for name in (IMAGES, LABELS)}
        images, labels = promised[IMAGES], promised[LABELS]
        _require_pixels(images, f"{path}:{IMAGES}")
        require_label_for_each(images.shape[0], labels.shape, labels.dtype, f"{path}:{LABELS}")
        require_memory(images.size_bytes + labels.size_bytes, f"{path}:{IMAGES}")
        found = _member(archive, LABELS, path)
        require_labels(found, images.shape[0], f"{path}:{LABELS}")
        pixels = _member(archive, IMAGES, path)
    return pixels, found.astype(np.int64)


def read_pixels(path: Path) -> NDArray[np.uint8]:
    """Returns `images` alone, as `read_arrays` does; labels need not be there."""
    require_regular_file(path)
    with _opened(path) as archive:
        promised = _header(archive, IMAGES, path)
        _require_pixels(promised, f"{path}:{IMAGES}")
        require_memory(promised.size_bytes, f"{path}:{IMAGES}")
        return _member(archive, IMAGES, path)


def require_memory(needed: int, where: str) -> None:
    """Refuses to read `needed` bytes that are not free: this program, or another, would be ended by the system."""
    available = psutil.virtual_memory().available
    if needed > available:
        raise DataError(
            f"{where}: takes {needed / GIB:.1f} GiB of memory, and {available / GIB:.1f} are free; give smaller "
            "images, or a folder with a sub-folder for each class, whose images are read one by one"
        )


class _Header(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    note_read(path)
    try:
        with path.open("rb") as file:
            is_npy = file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
        if is_npy:
            raise DataError(f"{path}: is no .npz file; write it with numpy.savez(path, images=..., labels=...)")
        archive = zipfile.ZipFile(path)
    except DataError:
        raise
    except Exception as error:  # a damaged file has many ways to fail, and a file system others
        what = f"cannot be read as .npz ({_reason(error)}); get it again, or write it with savez"
        raise DataError(f"{path}: {what}") from error
    with archive:
        yield archive


def _header(archive: zipfile.ZipFile, name: str, path: Path) -> _Header:
    """Reads the shape and the type of a member, which must be those of as many bytes as it has."""
    entries = [entry for entry in archive.infolist() if entry.filename == f"{name}.npy"]
    if len(entries) != 1:
        others = ", ".join(repr(entry.filename.removesuffix(".npy")) for entry in archive.infolist()) or "nothing"
        what = f"has {len(entries)} members {name!r}" if entries else f"has no member {name!r}, only {others}"
        raise DataError(f"{path}: {what}; write it with savez(path, images=, labels=)")
    try:
        with archive.open(entries[0]) as file:
            version = np.lib.format.read_magic(file)
            if version != (1, 0):  # what savez writes for numbers; the others have headers of any length
                raise ValueError(f"a header of version {version}")
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            bytes_there = entries[0].file_size - file.tell()
        if dtype.hasobject:
            raise ValueError("Object arrays cannot be loaded: they are pickles")
        header = _Header(shape, dtype)
        if header.size_bytes != bytes_there:
            raise ValueError(f"its header promises {header.size_bytes} bytes, and {bytes_there} are there")
    except Exception as error:
        raise DataError(f"{path}:{name}: cannot be read ({_reason(error)}); get the file again") from error
    return header


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> NDArray[Any]:
    try:
        with archive.open(f"{name}.npy") as file:
            return np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # of zipfile, of each way to compress, of NumPy, of memory
        raise DataError(f"{path}:{name}: cannot be read ({_reason(error)}); get the file again") from error


def _require_pixels(images: _Header, where: str) -> None:
    is_gray, is_color = len(images.shape) == 3, len(images.shape) == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (is_gray or is_color) or not images.size_bytes:
        raise DataError(
            f"{where}: must be uint8 of shape (N, height, width, 3) or (N, height, width), not {images.dtype} of shape "
            f"{images.shape}; {_conversion(images)}"
        )


def _conversion(images: _Header) -> str:
    """Says how images of other types become uint8: `astype` alone would lose what they show."""
    if not images.size_bytes:
        return "it holds no pixel: write it again, with images"
    if len(images.shape) == 4 and images.shape[-1] == 1:
        return "convert it: images[..., 0]"
    if len(images.shape) == 4 and images.shape[-1] == 4:
        return "convert it: images[..., :3], if nothing is transparent"
    if images.dtype == np.uint16:
        return "convert it: (images >> 8).astype('uint8'), if white is 65535"
    if images.dtype.kind == "f":
        return "convert it: (images * 255).round().astype('uint8'), if white is 1"
    if images.dtype == np.bool_:
        return "convert it: images.astype('uint8') * 255"
    if len(images.shape) == 4 and images.shape[1] == 3:
        return "convert it: images.transpose(0, 2, 3, 1)"
    if len(images.shape) == 4 and images.shape[1] == 1:
        return "convert it: images[:, 0]"
    if images.dtype.kind in "iu" and images.dtype != np.uint8:
        return "convert it: images.astype('uint8'), if black is 0 and white 255"
    return "convert it, with 0 for black and 255 for white"


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

"""Reads an image file: 8 bits of red, green and blue that show what the file shows, or a `DataError` that says why not.

Nothing that a file says starts a program: it is opened as one of `FORMATS`, whatever its name is, and as nothing else.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rdrop.experiments.tasks.files import DataError, require_regular_file

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Without such a list Pillow hands PostScript, whatever the file's name is, to Ghostscript, which runs it."""

BACKGROUND = (128, 128, 128)
"""The gray that transparency is laid on: a black drawing can be seen on it, and so can a white one."""

MOST_PIXELS = 89_478_485  # Pillow's own limit: above it, it warns of a decompression bomb
LONGEST_EDGE = 65_535  # no JPEG has a longer one; and each row costs memory, however short it is

SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
OF_COLORS = {"RGB": 3, "RGBX": 3, "RGBA": 3, "RGBa": 3, "LA": 1, "La": 1}
"""How many of the channels of a mode are colors, of which light is high; the others are alpha."""
DARKEST = 16
"""Of 256 levels: what a 16-bit image must reach. One that does not is taken for 12 bits, or fewer, left unscaled."""

ORIENTATION = 0x0112  # in EXIF
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each orientation upright."""

# Tags of TIFF, and their values.
PAGE_KIND, BITS, PHOTOMETRIC, SAMPLE_FORMAT = 254, 258, 262, 339
SMALLER_OR_MASK, WHITE_IS_ZERO, SIGNED = 0b101, 0, 2
MOST_PAGES = 64  # that are looked at


def read_image_file(path: Path) -> Image.Image:
    """Returns the image in RGB. Raises `DataError`, which names the file and what in it cannot be shown."""
    require_regular_file(path)
    return _decoded(path, str(path))


def read_image_bytes(content: bytes, where: str) -> Image.Image:
    """Returns the image in RGB that `content`, the bytes of a file, holds. `where` names it in a `DataError`."""
    return _decoded(io.BytesIO(content), where)


class _ContentError(Exception):
    """An image of which too little would be left in 8 bits of red, green and blue: why, and how to fix it."""


def _decoded(file: Path | io.BytesIO, where: str) -> Image.Image:
    try:
        # Of a path, Pillow maps raw pixels into memory, and turns the size of a TIFF before the pixels.
        with (
            file.open("rb") if isinstance(file, Path) else file as stream,
            Image.open(stream, formats=FORMATS) as image,
        ):
            _require_size(image)
            tags = getattr(image, "tag_v2", {})
            if tags:
                _require_one_page(image)
            bits = _bits_of_a_channel(image, tags)
            _use_transparent_color(image, bits)
            image.load()
            return _upright(_rgb(_eight_bits(image, bits, tags)), image)
    except _ContentError as error:
        raise DataError(f"{where}: {error}") from error
    except UnidentifiedImageError as error:
        formats = f"{', '.join(FORMATS[:-1])} nor {FORMATS[-1]}"
        raise DataError(f"{where}: cannot be read as an image (neither {formats}); replace or delete it") from error
    except Exception as error:  # each format has a decoder, and each decoder errors of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(f"{where}: cannot be read as an image ({reason}); replace or delete it") from error


def _require_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MOST_PIXELS or max(width, height) > LONGEST_EDGE:
        raise _ContentError(
            f"has {width} x {height} pixels; at most {MOST_PIXELS} are read, {LONGEST_EDGE} on an edge: save it smaller"
        )


def _require_one_page(image: Image.Image) -> None:
    """Refuses a TIFF whose later pages are more than smaller copies and masks of the first."""
    try:
        for page in range(1, MOST_PAGES):
            image.seek(page)
            if not image.tag_v2.get(PAGE_KIND, 0) & SMALLER_OR_MASK:  # type: ignore[attr-defined]
                raise _ContentError("has several pages, and only one would be seen; save each as a file of its own")
    except EOFError:
        pass
    image.seek(0)


def _bits_of_a_channel(image: Image.Image, tags: Mapping[int, Any]) -> int:
    """Returns what a PNG or a TIFF has; 8 for all other formats, which Pillow scales by what they say is white."""
    if tags:
        return int(np.atleast_1d(tags.get(BITS, 1))[0])
    if image.format != "PNG":
        return 8
    _, _, bits = _stored_as(image).partition(";")  # "RGB;16B", "L;4"; "1", of 1 bit, is scaled as 8 bits are
    return int(bits.removesuffix("B") or 8)


def _stored_as(image: Image.Image) -> str:
    """Returns the raw mode of a PNG, which Pillow forgets when it has read the pixels."""
    return str(image.tile[0][3])  # type: ignore[attr-defined]


def _use_transparent_color(image: Image.Image, bits: int) -> None:
    """Scales the gray that a PNG calls transparent as Pillow scales the pixels, with which it compares it."""
    color = image.info.get("transparency")
    if image.format != "PNG" or color is None:
        return
    if image.mode == "L" and bits < 8:
        image.info["transparency"] = color * 255 // (2**bits - 1)
    elif image.mode == "RGB" and bits == 16:  # Pillow compares all 16 bits of it with 8 of the pixels
        raise _ContentError("has 16 bits and a transparent color; save it with an alpha channel, or without")


def _eight_bits(image: Image.Image, bits: int, tags: Mapping[int, Any]) -> Image.Image:
    """Returns an image of deeper gray in 8 bits, from black to white as before; any other as it is."""
    mode = image.mode
    if mode in SIXTEEN_BITS or (mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image)
        gray = _of_16_bits(values, 16 if image.format == "PPM" else bits, mode)
    elif mode == "F":
        values = np.asarray(image)
        gray = _of_fractions(values)
    elif mode == "I" or SIGNED in np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)):
        kind = "32-bit or signed integers" if mode == "I" else "signed integers"
        raise _ContentError(f"has {kind} (mode {mode}), whose white is not known; save it with 8 or 16 bits, unsigned")
    else:
        if bits == 16 and mode in OF_COLORS:
            highest = max(high for _, high in image.getextrema()[: OF_COLORS[mode]])  # type: ignore[misc]
            if highest or mode == "RGB":  # black on a transparent ground is a drawing
                _require_light(highest, bits, f"{mode};16")
        return image
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # of fewer bits, Pillow sees to it
        gray = 255 - gray
    shown, color = Image.fromarray(gray), image.info.get("transparency")
    if color is None:
        return shown
    return Image.merge("LA", (shown, Image.fromarray(np.where(values == color, 0, 255).astype(np.uint8))))


def _of_16_bits(values: NDArray[Any], bits: int, mode: str) -> NDArray[np.uint8]:
    """Returns the high 8 bits of each gray, as Pillow does of each color of 16 bits."""
    high = values >> (bits - 8)
    if values.min() < values.max():
        _require_light(int(high.max()), bits, mode)
    return high.astype(np.uint8)


def _require_light(highest: int, bits: int, mode: str) -> None:
    """Refuses an image of which no pixel reaches `DARKEST` of 256 levels."""
    if highest < DARKEST:
        raise _ContentError(
            f"has {bits} bits (mode {mode}) and no pixel above {(highest + 1) * 2 ** (bits - 8) - 1} of {2**bits - 1}, "
            "nearly black; multiply all images by one factor, so that white is the highest number, or save them with "
            "8 bits"
        )


def _of_fractions(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    low, high = float(values.min()), float(values.max())
    has = f"has floats from {low:g} to {high:g} (mode F)"
    scale = "scale all images by one rule, so that 0 is black and 1 white, or save them with 8 bits"
    if not 0 <= low <= high <= 1:  # as with NaN
        raise _ContentError(f"{has}, and only those from 0, black, to 1, white, are read; {scale}")
    gray = (values * np.float32(255)).round().astype(np.uint8)
    if low < high and gray.min() == gray.max():
        raise _ContentError(f"{has}, which is one gray in 8 bits; {scale}")
    return gray


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        return _on_background(image if image.mode == "RGBA" else image.convert("RGBA"))
    if image.mode == "LAB":
        raise _ContentError("has mode LAB, which is not read; save it in RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _on_background(image: Image.Image) -> Image.Image:
    flat = Image.new("RGB", image.size, BACKGROUND)
    flat.paste(image, mask=image.getchannel("A"))
    if _is_uniform(flat) and not _is_uniform(image):
        raise _ContentError(
            f"shows nothing when its transparency (mode {image.mode}) is laid on gray, {BACKGROUND}; save it on "
            "another color, without transparency"
        )
    return flat


def _is_uniform(image: Image.Image) -> bool:
    return all(low == high for low, high in image.getextrema())  # type: ignore[misc]


def _upright(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Returns `rgb` turned as EXIF in `image` says; as it is, where EXIF is damaged: the pixels are whole."""
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # these are read by another decoder, with errors of its own
        return rgb
    return rgb if turn is None else rgb.transpose(turn)

"""Image files of every kind: what a file shows is what is learned, or one line says why not; no file runs a program."""

import io
import os
import random
import socket
import stat
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
from PIL import Image

from rdrop.experiments.tasks.files import DataError
from rdrop.experiments.tasks.image_classification import images as image_sets
from rdrop.experiments.tasks.image_classification.images import (
    read_cifar_100,
    read_class_folders,
    read_hub,
    read_images,
    read_npz,
)
from rdrop.experiments.tasks.image_classification.pixels import FORMATS, read_image_bytes, read_image_file
from rdrop.experiments.tasks.image_classification.recipes import CIFAR_10_4K
from rdrop.experiments.training.trainer import train

PROJECT = Path(__file__).parents[3]

GRAY = (128, 128, 128)
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(FILE) (w) file closefile\nshowpage\n"


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(
    bits: int, color_type: int, size: tuple[int, int], rows: Sequence[bytes], transparent: bytes | None = None
) -> bytes:
    """A PNG as the specification has it: Pillow writes only some kinds."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0)),
            b"" if transparent is None else chunk(b"tRNS", transparent),
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
            chunk(b"IEND", b""),
        )
    )


def tiff(bits: int, photometric: int, size: tuple[int, int], pixels: bytes, sample_format: int = 1) -> bytes:
    """A TIFF of one gray strip."""
    short, long = 3, 4
    tags = [
        *((256, short, size[0]), (257, short, size[1]), (258, short, bits), (259, short, 1)),
        *((262, short, photometric), (273, long, 8), (277, short, 1), (278, short, size[1])),
        *((279, long, len(pixels)), (339, short, sample_format)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


def shown(content: bytes) -> list[tuple[int, ...]]:
    """The pixels, row by row."""
    image = read_image_bytes(content, "x.png")
    assert image.mode == "RGB"
    return [tuple(pixel) for pixel in np.asarray(image).reshape(-1, 3).tolist()]


def refusal(function: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def gray(*levels: int) -> list[tuple[int, int, int]]:
    return [(level, level, level) for level in levels]


# ----------------------------------------------------------------------------------------------------------- depths

WORDS = np.array([[0, 0x1234, 0x8000, 0xFFFF]], dtype=np.uint16)
HIGH_BYTES = gray(0, 0x12, 0x80, 0xFF)


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        pytest.param(encoded(Image.fromarray(WORDS), "PNG"), HIGH_BYTES, id="16-bit PNG"),
        pytest.param(encoded(Image.fromarray(WORDS), "TIFF"), HIGH_BYTES, id="16-bit TIFF"),
        pytest.param(encoded(Image.fromarray(WORDS.astype(">u2")), "TIFF"), HIGH_BYTES, id="16-bit big-endian TIFF"),
        pytest.param(b"P5 4 1 65535\n" + WORDS.astype(">u2").tobytes(), HIGH_BYTES, id="16-bit PGM"),
        pytest.param(b"P5 2 1 4095\n" + struct.pack(">HH", 0, 4095), gray(0, 255), id="12-bit PGM"),
        pytest.param(tiff(12, 1, (2, 1), b"\xff\xf0\x80"), gray(0xFF, 0x08), id="12-bit TIFF"),
        pytest.param(tiff(16, 0, (2, 1), struct.pack("<HH", 0, 0xFFFF)), gray(255, 0), id="TIFF, 16 bits, 0 is white"),
        pytest.param(tiff(8, 0, (2, 1), b"\x00\xff"), gray(255, 0), id="TIFF, 8 bits, 0 is white"),
        pytest.param(
            tiff(32, 1, (3, 1), struct.pack("<fff", 0.0, 0.2, 1.0), sample_format=3), gray(0, 51, 255), id="float TIFF"
        ),
        pytest.param(
            tiff(32, 0, (2, 1), struct.pack("<ff", 0.0, 1.0), sample_format=3), gray(255, 0), id="float, 0 is white"
        ),
        pytest.param(b"Pf\n2 1\n-1.0\n" + struct.pack("<ff", 0.2, 1.0), gray(51, 255), id="float PFM"),
        pytest.param(png(1, 0, (8, 1), [b"\xaa"]), gray(255, 0) * 4, id="1-bit PNG"),
        pytest.param(png(2, 0, (4, 1), [b"\x1b"]), gray(0, 85, 170, 255), id="2-bit PNG"),
        pytest.param(png(4, 0, (2, 1), [b"\x0f"]), gray(0, 255), id="4-bit PNG"),
        pytest.param(b"P4 8 1\n\x0f", gray(*[255] * 4, *[0] * 4), id="PBM, where 1 is black"),
        pytest.param(
            png(16, 2, (1, 1), [struct.pack(">HHH", 0x1234, 0, 0xFFFF)]), [(0x12, 0, 0xFF)], id="16-bit colors"
        ),
        pytest.param(png(16, 4, (1, 1), [struct.pack(">HH", 0x1234, 0xFFFF)]), gray(0x12), id="16-bit gray and alpha"),
        pytest.param(png(16, 4, (1, 1), [struct.pack(">HH", 0, 0xFFFF)]), gray(0), id="16-bit black and alpha"),
        pytest.param(encoded(Image.new("I;16", (2, 2)), "PNG"), gray(*[0] * 4), id="16 bits, all black"),
    ],
)
def test_depths_are_scaled_so_that_white_is_255(content: bytes, seen: list[tuple[int, ...]]) -> None:
    assert shown(content) == seen


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (encoded(Image.fromarray(WORDS // 16), "PNG"), r"has 16 bits (mode I;16) and no pixel above 4095 of 65535"),
        (png(16, 2, (2, 1), [struct.pack(">6H", *[4095] * 6)]), "(mode RGB;16) and no pixel above 4095 of 65535"),
        (png(16, 4, (1, 1), [struct.pack(">2H", 4095, 65535)]), "(mode RGBA;16) and no pixel above 4095 of 65535"),
        (png(16, 6, (1, 1), [struct.pack(">4H", 0, 9, 4095, 65535)]), "(mode RGBA;16) and no pixel above 4095 of"),
        (encoded(Image.fromarray(WORDS.astype(np.int32)), "TIFF"), "has 32-bit or signed integers (mode I)"),
        (tiff(32, 1, (1, 1), bytes(4)), "has 32-bit or signed integers (mode I)"),
        (tiff(16, 1, (1, 1), bytes(2), sample_format=2), "has 32-bit or signed integers (mode I)"),
        (tiff(8, 1, (1, 1), bytes(1), sample_format=2), "has signed integers (mode L)"),
        (encoded(Image.fromarray(np.float32([[0, 255]])), "TIFF"), "has floats from 0 to 255 (mode F)"),
        (encoded(Image.fromarray(np.float32([[-1, 1]])), "TIFF"), "has floats from -1 to 1 (mode F)"),
        (encoded(Image.fromarray(np.float32([[0, np.nan]])), "TIFF"), "has floats from nan to nan (mode F)"),
        (encoded(Image.fromarray(np.float32([[0, 1e-4]])), "TIFF"), "which is one gray in 8 bits"),
        (encoded(Image.new("LAB", (2, 2)), "TIFF"), "has mode LAB"),
    ],
)
def test_a_depth_whose_white_is_not_known_is_refused_with_its_mode(content: bytes, rule: str) -> None:
    message = refusal(read_image_bytes, content, "scan.tif")
    assert message.startswith("scan.tif: ")
    assert rule in message


def test_the_remedies_for_depths_work() -> None:
    """12 bits in 16: one factor for all, or 8 bits. Floats of another range: divided by their white."""
    twelve = WORDS // 16
    assert shown(encoded(Image.fromarray(twelve * 16), "PNG")) == HIGH_BYTES
    assert shown(encoded(Image.fromarray((twelve >> 4).astype(np.uint8)), "PNG")) == HIGH_BYTES
    assert shown(encoded(Image.fromarray(np.float32([[0, 255]]) / 255), "TIFF")) == gray(0, 255)


def test_16_bits_are_seen_as_8_bits_are(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 65536, (2, 24, 24), dtype=np.uint16)
    for label, pixels in zip("ab", noise, strict=True):
        for name, image in (("16", pixels), ("8", (pixels >> 8).astype(np.uint8))):
            (tmp_path / name / label).mkdir(parents=True)
            Image.fromarray(image).save(tmp_path / name / label / "0.png")
    deep, flat = read_class_folders(tmp_path / "16"), read_class_folders(tmp_path / "8")
    assert all(np.array_equal(deep.read(index), flat.read(index)) for index in range(2))


@pytest.mark.parametrize("case", ["grey-8bit/photos", "grey-16bit/photos", "transparent-icons/icons"])
def test_what_the_images_show_is_learned(case: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("RDROP_DATA", PROJECT / "../shared/data")).parent / "cases" / case
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there; the cases lie beside the data, and RDROP_DATA says where these are")
    sizes = {"layers": 1, "hidden_size": 16, "heads": 2, "intermediate_size": 16, "patch_size": 8}
    recipe = CIFAR_10_4K.replace(
        updates=40,
        warmup_steps=4,
        evaluate_every=40,
        batch_size=16,
        learning_rate=1e-2,
        **{f"model.{key}": value for key, value in sizes.items()},
        **{"data.train": str(folder), "data.valid_size": 20, "data.test_size": 20, "data.expected_train": None},
        **{"data.image_size": 24, "data.crop": None, "data.flip": False},
    )
    assert train(recipe, tmp_path)["test"]["accuracy"] == 1.0


# ----------------------------------------------------------------------------------------------------- transparency


def drawing_in_alpha(color: tuple[int, int, int]) -> bytes:
    alpha = np.array([[0, 255]], dtype=np.uint8)
    return encoded(Image.fromarray(np.dstack([np.full((1, 2, 3), color, dtype=np.uint8), alpha])), "PNG")


PALETTE = Image.frombytes("P", (2, 1), b"\0\1")
PALETTE.putpalette([1, 2, 3, 250, 251, 252])


@pytest.mark.parametrize(
    ("content", "seen"),
    [
        pytest.param(drawing_in_alpha((0, 0, 0)), [GRAY, (0, 0, 0)], id="black drawing in alpha"),
        pytest.param(drawing_in_alpha((255, 255, 255)), [GRAY, (255, 255, 255)], id="white drawing in alpha"),
        pytest.param(
            encoded(Image.fromarray(np.uint8([[[9, 0], [9, 255]]])), "PNG"), [GRAY, (9, 9, 9)], id="gray with alpha"
        ),
        pytest.param(
            encoded(Image.fromarray(np.uint8([[[9, 0], [9, 255]]])), "TIFF"), [GRAY, (9, 9, 9)], id="TIFF with alpha"
        ),
        pytest.param(encoded(PALETTE, "PNG", transparency=0), [GRAY, (250, 251, 252)], id="palette, one transparent"),
        pytest.param(
            encoded(PALETTE, "PNG", transparency=b"\x80\xff"), [(64, 65, 65), (250, 251, 252)], id="palette with alphas"
        ),
        pytest.param(encoded(PALETTE, "GIF", transparency=1), [(1, 2, 3), GRAY], id="GIF"),
        pytest.param(encoded(PALETTE, "GIF"), [(1, 2, 3), (250, 251, 252)], id="GIF without transparency"),
        pytest.param(png(1, 0, (8, 1), [b"\xaa"], b"\0\1"), [GRAY, (0, 0, 0)] * 4, id="1-bit PNG"),
        pytest.param(png(2, 0, (4, 1), [b"\x1b"], b"\0\1"), [*gray(0), GRAY, *gray(170, 255)], id="2-bit PNG"),
        pytest.param(png(8, 0, (2, 1), [b"\5\6"], b"\0\5"), [GRAY, (6, 6, 6)], id="8-bit PNG"),
        pytest.param(
            png(16, 0, (2, 1), [b"\x12\x34\xff\xff"], b"\x12\x34"), [GRAY, (255, 255, 255)], id="16-bit gray PNG"
        ),
        pytest.param(
            png(8, 2, (2, 1), [b"\1\2\3\4\5\6"], b"\0\1\0\2\0\3"), [GRAY, (4, 5, 6)], id="PNG with a transparent color"
        ),
        pytest.param(
            encoded(Image.fromarray(np.uint8([[[0, 0, 0, 0], [7, 8, 9, 255]]])), "WEBP", lossless=True),
            [GRAY, (7, 8, 9)],
            id="WebP",
        ),
        pytest.param(encoded(Image.new("RGBA", (1, 2)), "PNG"), [GRAY] * 2, id="nothing to be seen"),
    ],
)
def test_transparency_is_laid_on_gray(content: bytes, seen: list[tuple[int, ...]]) -> None:
    assert np.abs(np.subtract(shown(content), seen)).max() <= 1  # half-transparent colors are rounded


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(drawing_in_alpha(GRAY), id="a drawing in the same gray"),
        pytest.param(
            encoded(Image.fromarray(np.uint8([[[1, 2, 3, 0], [9, 8, 7, 0]]])), "PNG"), id="alpha is 0 throughout"
        ),
    ],
)
def test_an_image_of_which_nothing_is_left_is_refused(content: bytes) -> None:
    assert "shows nothing when its transparency (mode RGBA) is laid on gray" in refusal(read_image_bytes, content, "x")


def test_a_transparent_color_of_16_bits_is_refused() -> None:
    content = png(16, 2, (1, 1), [bytes(6)], bytes(6))
    assert "has 16 bits and a transparent color" in refusal(read_image_bytes, content, "x")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_an_opaque_8_bit_image_is_what_pillow_converts_it_to(mode: str, format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)).convert(mode)
    expected = np.asarray(noise.convert("RGB"))
    assert np.array_equal(np.asarray(read_image_bytes(encoded(noise, format), "x")), expected)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "BMP", "PPM", "GIF"])
def test_a_decoded_image_has_the_bits_of_pillow(format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
    content = encoded(noise, format)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(np.asarray(read_image_bytes(content, "x")), expected)


# ------------------------------------------------------------------------------------- colors, orientation and frames


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_the_colors_of_print_become_red_green_and_blue(format: str) -> None:
    assert set(shown(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), format))) == {(255, 0, 0)}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_is_turned_as_its_camera_says(format: str, orientation: int) -> None:
    """The corner that is white, when it is shown: EXIF says where row 0 and column 0 are to be seen."""
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_image_bytes(encoded(Image.fromarray(pixels), format, exif=exif), "x")
    assert image.size == ((32, 16) if orientation < 5 else (16, 32))
    corners = {"top left": (0, 0), "top right": (0, -1), "bottom right": (-1, -1), "bottom left": (-1, 0)}
    white = [name for name, (row, column) in corners.items() if np.asarray(image)[row, column].mean() > 200]
    seen = [
        "top left",
        "top right",
        "bottom right",
        "bottom left",
        "top left",
        "top right",
        "bottom right",
        "bottom left",
    ]
    assert white == [seen[orientation - 1]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_raw_pixels_of_a_file_are_turned_as_those_of_its_bytes(kind: Any, orientation: int, tmp_path: Path) -> None:
    """Pillow maps the pixels of a path into memory."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = (np.arange(32) * 2 ** (8 * np.dtype(kind).itemsize - 5)).astype(kind).reshape(4, 8)
    content = encoded(Image.fromarray(pixels), "TIFF", exif=exif)
    (tmp_path / "x.tif").write_bytes(content)
    seen = np.asarray(read_image_file(tmp_path / "x.tif"))
    assert np.array_equal(seen, np.asarray(read_image_bytes(content, "x")))
    turned = {5: (0, 31), 6: (24, 7), 7: (31, 0), 8: (7, 24)}[orientation]  # what is first and last, of 0 to 31
    assert (seen[0, 0, 0] >> 3, seen[-1, -1, 0] >> 3) == turned


def test_damaged_notes_of_a_camera_leave_the_pixels() -> None:
    content = encoded(Image.new("RGB", (8, 16), "red"), "PNG", exif=b"Exif\0\0MM\0*\xff")
    with pytest.raises(Exception, match=r".*"):
        Image.open(io.BytesIO(content)).getexif()
    assert set(shown(content)) == {(255, 0, 0)}


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_read(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert set(shown(content)) == {(255, 0, 0)}


def test_a_tiff_of_several_pages_is_refused_and_one_with_a_thumbnail_is_read() -> None:
    pages = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    content = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert "has several pages" in refusal(read_image_bytes, content, "scan.tif")
    thumbnail = Image.new("RGB", (4, 4), "blue")
    thumbnail.encoderinfo = {"tiffinfo": {254: 1}}
    content = encoded(pages[0], "TIFF", save_all=True, append_images=[thumbnail])
    assert set(shown(content)) == {(255, 0, 0)}


# ------------------------------------------------------------------------------------------- programs and broken files


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that Pillow takes for Ghostscript; the file it leaves when it has run."""
    trace, program = tmp_path / "ran", tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 10.0\ntouch {trace}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # what it has found before
    return trace


@pytest.mark.parametrize("name", ["00.png", "00.jpg", "00.gif", "00.tif"])
def test_no_picture_runs_a_program(ghostscript: Path, tmp_path: Path, name: str) -> None:
    with Image.open(io.BytesIO(POSTSCRIPT)) as image, pytest.raises(OSError, match=r".*"):
        image.load()
    assert ghostscript.exists(), "Pillow does not run this program any more: the test shows nothing"
    ghostscript.unlink()
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / name).write_bytes(POSTSCRIPT)
    images = read_class_folders(tmp_path / "photos")
    assert "cannot be read as an image (neither BMP, GIF," in refusal(images.read, 0)
    assert not ghostscript.exists()


def test_no_picture_of_the_hub_runs_a_program(ghostscript: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of(monkeypatch, [{"bytes": POSTSCRIPT, "path": "x.png"}] * 2)
    images = read_hub("org/name", None, "train", "image", "label")
    message = refusal(images.read, 1)
    assert message.startswith("org/name (train):2:image: cannot be read as an image (neither BMP,")
    assert not ghostscript.exists()


def seeds() -> dict[str, bytes]:
    draw = np.random.default_rng(0)
    noise = Image.fromarray(draw.integers(0, 256, (24, 20, 3), dtype=np.uint8))
    words = Image.fromarray(draw.integers(0, 65536, (20, 20), dtype=np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        **{format: encoded(noise, format) for format in FORMATS},
        **{f"{format} with EXIF": encoded(noise, format, exif=exif) for format in ("JPEG", "PNG", "WEBP", "TIFF")},
        **{
            f"{format} animated": encoded(noise, format, save_all=True, append_images=[noise])
            for format in ("GIF", "PNG")
        },
        **{f"TIFF {name}": encoded(noise, "TIFF", compression=name) for name in ("tiff_lzw", "jpeg", "tiff_deflate")},
        "TIFF group4": encoded(noise.convert("1"), "TIFF", compression="group4"),
        "PNG palette": encoded(noise.convert("P"), "PNG", transparency=3),
        "PNG alpha": encoded(noise.convert("RGBA"), "PNG"),
        "PNG 16": encoded(words, "PNG"),
        "TIFF 16": encoded(words, "TIFF"),
        "TIFF float": encoded(Image.fromarray(draw.random((20, 20), dtype=np.float32)), "TIFF"),
        "JPEG CMYK": encoded(noise.convert("CMYK"), "JPEG"),
        "JPEG progressive": encoded(noise, "JPEG", progressive=True),
    }


def damaged(raw: bytes, draw: random.Random) -> bytes:
    found = bytearray(raw[: draw.randrange(len(raw))] if draw.random() < 0.2 else raw)
    for _ in range(draw.choice((1, 1, 2, 4, 16)) if found else 0):
        place = draw.randrange(min(len(found), draw.choice((64, 400, len(raw)))))  # headers more often
        found[place] = draw.choice((0, 255, draw.randrange(256), found[place] ^ 1 << draw.randrange(8)))
    return bytes(found)


@pytest.mark.parametrize("name", seeds())
def test_a_damaged_image_is_read_or_refused_and_never_crashes(name: str) -> None:
    raw, draw = seeds()[name], random.Random(name)
    refusals = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run prints them
        for _ in range(120):
            try:
                assert read_image_bytes(damaged(raw, draw), "x.png").mode == "RGB"
            except DataError as error:
                refusals.append(str(error))
    assert refusals
    assert all(message.startswith("x.png: ") and "\n" not in message for message in refusals)


# ------------------------------------------------------------------------------------------ sizes and kinds of files


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header declares any size; its pixels would follow."""
    return png(8, 2, (width, height), [b""])


@pytest.mark.parametrize(
    "content",
    [
        huge_png(1, 80_000_000),
        huge_png(80_000_000, 1),
        huge_png(9_500, 9_500),
        huge_png(50_000, 50_000),
        b"P6 65535 65535 255\n",
        tiff(8, 1, (60_000, 60_000), b""),
        encoded(Image.new("RGB", (8, 8)), "GIF")[:6]
        + b"\xff\xff\xff\xff"
        + encoded(Image.new("RGB", (8, 8)), "GIF")[10:],
    ],
)
def test_an_image_larger_than_the_docs_say_is_refused_before_it_is_decoded(content: bytes) -> None:
    before = psutil.Process().memory_info().rss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = refusal(read_image_bytes, content, "x.png")
    assert "pixels" in message
    assert psutil.Process().memory_info().rss - before < 100e6


def test_pipes_sockets_and_links_that_end_nowhere_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    for label in ("a", "b"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        (tmp_path / "photos" / label / "0.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    path = tmp_path / "photos" / "b" / "1.png"
    os.mkfifo(path)
    assert refusal(read_class_folders, tmp_path / "photos") == (
        f"{path}: is a pipe, a socket or a device, and not a file; move it away, or name a file"
    )
    assert "is a pipe" in refusal(read_image_file, path)
    path.unlink()
    path.symlink_to("/dev/zero")
    assert "is a pipe, a socket or a device" in refusal(read_class_folders, tmp_path / "photos")
    for target in ("nowhere", "1.png"):
        path.unlink()
        path.symlink_to(target)
        assert f"{path}: is a link to nothing; delete it" in refusal(read_class_folders, tmp_path / "photos")
    path.unlink()
    path.symlink_to("0.png")
    assert len(read_class_folders(tmp_path / "photos")) == 3


def test_a_socket_among_the_images_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label in ("a", "b"):
        (tmp_path / label).mkdir()
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("a/0.png")
        assert "is a pipe, a socket or a device" in refusal(read_class_folders, tmp_path)


@pytest.mark.parametrize("name", ["train.npz", "train.bin"])
def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    assert "is a pipe, a socket or a device" in refusal(read_images, tmp_path / name)


# -------------------------------------------------------------------------------------------------------------- .npz


def write_bomb(path: Path, labels: np.ndarray, size: int = 200_000) -> Path:
    """600 MB of black in 600 kB, a member at a time."""
    buffer = io.BytesIO()
    np.save(buffer, labels)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("labels.npy", buffer.getvalue())
        with archive.open("images.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": (size, 32, 32, 3)}
            np.lib.format.write_array_header_1_0(member, header)
            for _ in range(0, size, 1000):
                member.write(bytes(1000 * 32 * 32 * 3))
    return path


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bomb(tmp_path_factory.mktemp("bomb") / "x.npz", np.arange(10))


def peak_bytes(function: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_images_are_not_unpacked_before_the_labels_have_been_compared(bomb: Path) -> None:
    assert bomb.stat().st_size < 1e6
    assert peak_bytes(lambda: refusal(read_npz, bomb)) < 10e6
    assert ":labels: has 10 labels for 200000 images" in refusal(read_npz, bomb)


def test_labels_are_looked_at_before_images_are_unpacked(tmp_path: Path) -> None:
    labels = np.zeros(20_000, dtype=np.int64)
    labels[7] = -1
    path = write_bomb(tmp_path / "x.npz", labels, 20_000)
    assert peak_bytes(lambda: refusal(read_npz, path)) < 10e6
    assert ":labels: label 7 is -1" in refusal(read_npz, path)


def test_what_does_not_fit_into_memory_is_refused(bomb: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    free = type("Memory", (), {"available": 50 * 2**20})
    monkeypatch.setattr(psutil, "virtual_memory", free)
    path = write_bomb(tmp_path / "x.npz", np.arange(20_000) % 2, 20_000)
    message = refusal(read_npz, path)
    assert message.startswith(f"{path}:images: takes 0.1 GiB of memory, and 0.0 are free")
    cifar = tmp_path / "train.bin"
    with cifar.open("wb") as file:
        file.truncate(3074 * 50_000)
    assert f"{cifar}: takes 0.1 GiB" in refusal(read_cifar_100, cifar)


def test_reading_takes_no_more_than_twice_what_the_file_declares(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    images = np.full((4000, 32, 32, 3), 9, dtype=np.uint8)
    np.savez_compressed(path, images=images, labels=np.arange(4000) % 2)
    assert peak_bytes(lambda: read_npz(path)) < 2 * images.nbytes


def test_a_header_that_promises_other_bytes_than_there_are_is_refused(tmp_path: Path) -> None:
    path, buffer = tmp_path / "x.npz", io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 1000, 1000, 3)}
    )
    labels = io.BytesIO()
    np.save(labels, np.zeros(10**6, dtype=np.uint8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", buffer.getvalue() + b"x")
        archive.writestr("labels.npy", labels.getvalue())
    assert f"{path}:images: cannot be read (its header promises 3000000000000 bytes, and 1 are there)" in refusal(
        read_npz, path
    )


def test_a_header_of_any_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 10**8) + b" " * 10**8)
        archive.writestr("labels.npy", b"")
    assert peak_bytes(lambda: refusal(read_npz, path)) < 10e6
    assert "a header of version (2, 0)" in refusal(read_npz, path)


@pytest.mark.parametrize(
    ("images", "remedy"),
    [
        (np.array([[[0, 0x80FF]]] * 30, dtype=np.uint16), lambda images: (images >> 8).astype("uint8")),
        (np.array([[[0, 0.5]]] * 30), lambda images: (images * 255).round().astype("uint8")),
        (np.array([[[False, True]]] * 30), lambda images: images.astype("uint8") * 255),
        (np.zeros((30, 3, 8, 9), dtype=np.uint8) + 9, lambda images: images.transpose(0, 2, 3, 1)),
        (np.full((30, 8, 9, 4), 9, dtype=np.uint8), lambda images: images[..., :3]),
        (np.full((30, 8, 9, 1), 9, dtype=np.uint8), lambda images: images[..., 0]),
        (np.full((30, 8, 9), 9), lambda images: images.astype("uint8")),
    ],
)
def test_the_remedy_for_arrays_of_another_type_works(
    images: np.ndarray, remedy: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    path, labels = tmp_path / "x.npz", np.arange(30) % 2
    np.savez(path, images=images, labels=labels)
    message = refusal(read_npz, path)
    assert message.startswith(f"{path}:images: ")
    np.savez(path, images=remedy(images), labels=labels)
    assert len(read_npz(path)) == 30


@pytest.mark.parametrize(
    ("labels", "remedy"),
    [
        (np.arange(30) % 2 * 1.0, lambda labels: labels.astype("int64")),
        (np.arange(30)[:, None] % 2, lambda labels: labels[:, 0]),
        (np.eye(2)[np.arange(30) % 2], lambda labels: labels.argmax(1)),
        (np.array(["no", "yes"] * 15), lambda labels: np.unique(labels, return_inverse=True)[1]),
    ],
)
def test_the_remedy_for_labels_of_another_type_works(
    labels: np.ndarray, remedy: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    path, images = tmp_path / "x.npz", np.full((30, 8, 9), 9, dtype=np.uint8)
    np.savez(path, images=images, labels=labels)
    assert refusal(read_npz, path).startswith(f"{path}:labels: must be integers")
    np.savez(path, images=images, labels=remedy(labels))
    assert read_npz(path).labels.tolist() == [0, 1] * 15


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    path, buffer = tmp_path / "x.npz", io.BytesIO()
    np.save(buffer, np.zeros(3))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("images.npy", buffer.getvalue())
    assert "has 2 members 'images'" in refusal(read_npz, path)


# --------------------------------------------------------------------------------------------------------------- hub


def hub_of(monkeypatch: pytest.MonkeyPatch, stored: list[Any], feature: Any = None) -> None:
    features = datasets.Features(
        {"image": feature or datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": stored, "label": [index % 2 for index in range(len(stored))]}
    found = datasets.Dataset.from_dict(rows, features=features)
    monkeypatch.setattr(image_sets, "load_hub", lambda *arguments: found)


def test_a_row_of_the_hub_without_an_image_or_a_label_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = {"bytes": encoded(Image.new("L", (2, 2)), "PNG"), "path": None}
    hub_of(monkeypatch, [picture, picture, None])
    images = read_hub("org/name", None, "train", "image", "label")
    assert refusal(images.read, 2).startswith("org/name (train):3:image: there is no image; choose another")
    found = datasets.Dataset.from_dict({"image": [picture] * 3, "label": [0, None, 1]})
    monkeypatch.setattr(image_sets, "load_hub", lambda *arguments: found)
    message = refusal(read_hub, "org/name", None, "train", "image", "label")
    assert message.startswith("org/name (train):2: label has no value; choose another")


@pytest.mark.parametrize("feature", [datasets.Image(), datasets.Value("binary")])
def test_an_image_of_the_hub_is_read_as_that_of_a_file_is(monkeypatch: pytest.MonkeyPatch, feature: Any) -> None:
    contents = [encoded(Image.fromarray(WORDS), "PNG"), drawing_in_alpha((0, 0, 0))]
    stored = (
        contents if isinstance(feature, datasets.Value) else [{"bytes": content, "path": None} for content in contents]
    )
    hub_of(monkeypatch, stored, feature)
    images = read_hub("org/name", None, "train", "image", "label")
    assert np.asarray(images.read(0)).reshape(-1, 3).tolist() == [list(pixel) for pixel in HIGH_BYTES]
    assert images.read(1).getpixel((1, 0)) == (0, 0, 0)


def test_an_image_that_the_hub_stores_as_a_file_is_read_from_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(drawing_in_alpha((0, 0, 0)))
    hub_of(monkeypatch, [{"bytes": None, "path": str(path)}] * 2)
    assert read_hub("org/name", None, "train", "image", "label").read(1).getpixel((0, 0)) == GRAY


def test_a_column_of_the_hub_that_has_no_images_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_of(monkeypatch, [0.5, 0.25], datasets.Value("float32"))
    message = refusal(read_hub, "org/name", None, "train", "image", "label")
    assert message.startswith("org/name (train): image has no images, but Value('float32')")
    hub_of(monkeypatch, [None, {"bytes": b"", "path": None}])
    images = read_hub("org/name", None, "train", "image", "label")
    assert "org/name (train):1:image: " in refusal(images.read, 0)
    assert "org/name (train):2:image: cannot be read as an image" in refusal(images.read, 1)

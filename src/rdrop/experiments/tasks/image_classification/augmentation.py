"""Images as a network sees them: cropped and flipped at random for training, whole for scoring, and normalized.

What is drawn comes from the generator that is given and from nothing else: an image looks the same in whichever batch
it stands.
"""

from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

BILINEAR = Image.Resampling.BILINEAR  # as the image processors of ViT, BEiT and DeiT resize

# The Inception crop, as TensorFlow and torchvision draw it.
NARROWEST, WIDEST = 3 / 4, 4 / 3
TRIES = 10

Box = tuple[int, int, int, int]
"""Left, top, right, bottom, in pixels."""


def augment(
    image: Image.Image,
    size: int,
    crop: Literal["padded", "resized"] | None,
    flip: bool,
    smallest_crop: float,
    generator: np.random.Generator,
) -> Image.Image:
    """`size` x `size` pixels of the image, cropped at random and then, in one of two cases, mirrored."""
    match crop:
        case "resized":
            box = resized_crop_box(image.width, image.height, smallest_crop, generator)
            image = image.resize((size, size), BILINEAR, box=box)
        case "padded":
            image = whole(image, size).crop(padded_crop_box(size, generator))  # black, where the box is outside
        case None:
            image = whole(image, size)
    if flip and generator.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def whole(image: Image.Image, size: int) -> Image.Image:
    """All of the image in `size` x `size` pixels, whatever its proportions: what ViT's image processor does."""
    return image if image.size == (size, size) else image.resize((size, size), BILINEAR)


def resized_crop_box(width: int, height: int, smallest: float, generator: np.random.Generator) -> Box:
    """A box of `smallest` to all of the area, its proportions from 3:4 to 4:3, evenly on the log scale.

    If `TRIES` boxes do not fit, it is the largest one in the middle that has such proportions.
    """
    for _ in range(TRIES):
        area = generator.uniform(smallest, 1) * width * height
        ratio = np.exp(generator.uniform(np.log(NARROWEST), np.log(WIDEST)))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * WIDEST)), min(height, round(width / NARROWEST))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def padded_crop_box(size: int, generator: np.random.Generator) -> Box:
    """A box of the image's own size, moved by up to an eighth of it each way: 4 of 32 pixels, as usual for CIFAR."""
    left, top = (int(shift) for shift in generator.integers(-(size // 8), size // 8 + 1, size=2))
    return left, top, left + size, top + size


def to_pixel_values(images: list[Image.Image], mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """`(pixels / 255 - mean) / std` of RGB images of one size: `(N, 3, H, W)`."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    channels_first = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return channels_first.div_(255).sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])

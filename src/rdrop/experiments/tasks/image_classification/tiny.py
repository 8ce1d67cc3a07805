"""Makes synthetic images for `tiny=true`: stripes of three directions with noise, as files in class folders."""

from pathlib import Path

import numpy as np
from PIL import Image

EDGE = 20  # no multiple of the model's 16 pixels, so that images are really resized
SIZES = {"train": 96, "test": 24}


def write_tiny_images(root: Path, test_split: str | None) -> None:
    """`root/train/CLASS/*.png` and, where there is a test split, `root/<test_split>/CLASS/*.png`."""
    generator = np.random.default_rng(0)
    for name, size in SIZES.items():
        split = test_split if name == "test" else name
        for index in range(size if split is not None else 0):
            kind, pixels = _stripes(index, generator)
            folder = root / str(split) / kind
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{index:03d}.png")


def _stripes(index: int, generator: np.random.Generator) -> tuple[str, np.ndarray]:
    row, column = np.mgrid[:EDGE, :EDGE]
    kinds = {"checks": row + column, "columns": column, "rows": row}
    kind = list(kinds)[index % len(kinds)]
    stripes = (kinds[kind] + generator.integers(4)) // 2 % 2
    noise = generator.integers(-40, 41, size=(EDGE, EDGE, 3))
    return kind, np.clip(stripes[..., None] * 150 + 50 + noise, 0, 255).astype(np.uint8)

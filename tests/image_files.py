"""Small pictures and files of them for the tests of data preparation."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def picture(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """A smooth uint8 RGB picture whose four corners differ: it survives JPEG, and shows a rotation."""
    coarse = np.random.RandomState(seed).randint(60, 190, (3, 4, 3)).astype(np.uint8)
    coarse[0, 0], coarse[0, -1] = (220, 30, 30), (30, 220, 30)
    coarse[-1, 0], coarse[-1, -1] = (30, 30, 220), (220, 220, 30)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def encoded(image: np.ndarray | Image.Image, kind: str = "JPEG", **options) -> bytes:
    """The picture as a file of some kind, by Pillow, at a quality that keeps it recognisable."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if kind in ("JPEG", "WEBP"):
        options.setdefault("quality", 95)
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


def rotated(image: np.ndarray, orientation: int) -> bytes:
    """A JPEG whose EXIF orientation (3: upside down, 6: a quarter) turns it back to `image`."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.rot90(image, {3: 2, 6: 1}[orientation])
    return encoded(np.ascontiguousarray(stored), exif=exif)


def write_tree(root: Path, classes: dict[str, int], height: int = 40, width: int = 60) -> Path:
    """A folder of JPEGs for every class, with that many images."""
    seed = 0
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            (root / name / f"{number:03d}.jpg").write_bytes(encoded(picture(height, width, seed)))
            seed += 1
    return root

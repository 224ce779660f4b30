"""Pictures that cost a JPEG decoder what photographs do, made from nothing, for benchmarks."""

from __future__ import annotations

import cv2
import numpy as np

# Grids of random colours, coarse to fine; the finer, the weaker, as in the spectrum of photographs.
_GRIDS = (4, 8, 16, 32, 64, 128)
_COARSE_CONTRAST = 60.0
_DECAY = 0.75
# Noise of a sensor, in grey levels; with it 256 x 256 pixels take about 29 KB at quality 95.
_GRAIN = 3.0


def synthetic_photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3), RGB: smooth shapes with detail at every scale, and grain."""
    picture = np.full((height, width, 3), 128, np.float32)
    for cells in _GRIDS:
        grid = rng.standard_normal((cells, cells, 3), np.float32)
        detail = cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
        picture += detail * _COARSE_CONTRAST * (_GRIDS[0] / cells) ** _DECAY
    picture += rng.standard_normal((height, width, 1), np.float32) * _GRAIN
    return np.clip(picture, 0, 255).astype(np.uint8)

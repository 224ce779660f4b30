"""Batches that a network can learn within a few updates; apart from the tests that need MXNet."""

from __future__ import annotations

import numpy as np

from engines.base import Batch


def bright_corners(
    count: int, rows: int, shape: tuple[int, int, int], classes: int, start: int = 0, pad: int = 0
) -> list[Batch]:
    """Noise of (rows, *shape) whose brightest corner tells the label; `start` continues an earlier call's batches."""
    made = []
    for index in range(start, start + count):
        rng = np.random.default_rng(index)
        labels = rng.integers(0, classes, rows)
        images = rng.integers(0, 128, (rows, *shape), dtype=np.uint8)
        for row, label in enumerate(labels):
            images[row, label % 3, label : label + 6] += 100
        made.append(Batch(images, labels, pad))
    return made

"""The loader alone: how many images a second it delivers, and how many devices that feeds (`--test-io`)."""

from __future__ import annotations

import sys
import time
from itertools import count
from typing import NamedTuple

from errors import UsageError
from training.loader import Loader

# Training speeds to compare with, images/s of one device, as published: NVIDIA's SE-ResNeXt-101 on an A100 (AMP),
# timm's seresnext50_32x4d on an RTX 3090 (AMP), NVIDIA's ResNet-50 for MXNet on an A100 (AMP).
DEVICE_SPEEDS = {
    "RTX 3090 training SE-ResNeXt-50": 614.0,
    "A100 training SE-ResNeXt-101": 855.0,
    "A100 training ResNet-50": 2180.0,
}


class LoaderFigures(NamedTuple):
    """What `measure_loader` saw: images that count, in so many seconds, by so many threads."""

    images: int
    seconds: float
    threads: int
    batch_size: int
    image_shape: tuple[int, int, int]
    skipped: int

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


def measure_loader(loader: Loader, seconds: float = 10.0) -> LoaderFigures:
    """Read batches, epoch after epoch, for at least `seconds`, and drop them.

    The clock starts when the first batch is there: start-up is not what a long run feels. Raises UsageError where
    no image counts.
    """
    images, begin, skipped = 0, None, loader.skipped
    for epoch in count():
        for batch in loader.batches(epoch):
            if begin is None:
                begin = time.perf_counter()
                continue
            images += batch.valid
            elapsed = time.perf_counter() - begin
            if elapsed >= seconds:
                if not images:
                    raise UsageError(f"{loader.records.path}: no image of it decodes; there is nothing to measure")
                return LoaderFigures(
                    images, elapsed, loader.threads, loader.batch_size, loader.image_shape, loader.skipped - skipped
                )
    raise AssertionError("epochs never end")


def describe(figures: LoaderFigures, device_speed: float | None = None) -> str:
    """The figures as text; `device_speed`: images/s of one device, None for a few published ones."""
    height, width = figures.image_shape[1:]
    speed = figures.images_per_second
    threads = "1 thread" if figures.threads == 1 else f"{figures.threads} threads"
    lines = [
        f"loader alone: {speed:,.0f} images/s ({figures.images:,} images of {width} x {height} pixels in "
        f"{figures.seconds:.1f} s, batches of {figures.batch_size}, {threads})"
    ]
    if figures.skipped:
        lines.append(f"{figures.skipped:,} images do not decode and were left out")
    speeds = DEVICE_SPEEDS if device_speed is None else {"the given speed": device_speed}
    for name, device in speeds.items():
        lines.append(f"feeds {speed / device:.1f} devices of {device:,.0f} images/s ({name})")
    return "\n".join(lines)


def report_io(loader: Loader, device_speed: float | None = None, seconds: float = 10.0) -> int:
    """Measure and print; returns the exit status."""
    print(f"reading {loader.records.path} for {seconds:g} s", file=sys.stderr)
    print(describe(measure_loader(loader, seconds), device_speed))
    return 0

"""What a running epoch shows on the screen: one bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import io
import sys
import time
from typing import TextIO

from tqdm import tqdm

from engines.base import Metrics

# Seconds between two plain lines: the output of a job stays readable and shows that it is alive.
PLAIN_INTERVAL = 10.0
BAR_FORMAT = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def say(text: str, file: TextIO | None = None) -> None:
    """Print a line (stderr by default) without tearing a bar that is being drawn."""
    tqdm.write(text, file=file or sys.stderr)


def describe(metrics: Metrics, lr: float, images_per_second: float, data_wait: float) -> str:
    """The figures of a training interval in one piece of text, for the screen and for the readable log.

    lr: learning rate. data_wait: fraction (0-1) of the time that was spent waiting for the loader.
    """
    parts = [
        f"{images_per_second:.4g} images/s" if images_per_second < 1000 else f"{images_per_second:.0f} images/s",
        f"loss {metrics.loss:.4f}",
        f"top-1 {metrics.top1:.2%}",
        f"top-5 {metrics.top5:.2%}",
        f"rate {lr:.4g}",
        f"waiting for data {data_wait:.0%}",
    ]
    return ", ".join(parts)


class Nowhere(io.TextIOBase):
    """A file for the progress of processes that somebody else speaks for."""

    def write(self, text: str) -> int:
        return len(text)


class EpochProgress:
    """Progress of one epoch, counted in batches.

    On a terminal a bar with the time left; elsewhere a line every `interval` seconds and one at the end.

    Args:
        total_batches: batches of the whole epoch.
        epoch: its number, from 1. epochs: how many the run has in all.
        initial: batches done before, when an interrupted epoch is continued.
        file: where to draw; stderr by default.
        interval: seconds between two plain lines.
    """

    def __init__(
        self,
        total_batches: int,
        epoch: int,
        epochs: int,
        initial: int = 0,
        *,
        file: TextIO | None = None,
        interval: float = PLAIN_INTERVAL,
    ) -> None:
        self.total = total_batches
        self.title = f"epoch {epoch}/{epochs}"
        self.initial = initial
        self.done = initial
        self.figures = ""
        self.file = file or sys.stderr
        self.interval = interval
        self.started = time.monotonic()
        self._shown_at = self.started
        self._shown_batch = -1
        self._bar = None
        if self.file.isatty():
            self._bar = tqdm(
                total=total_batches,
                initial=initial,
                desc=self.title,
                file=self.file,
                bar_format=BAR_FORMAT,
                dynamic_ncols=True,
                leave=True,
            )

    def update(
        self,
        batch: int,
        metrics: Metrics | None = None,
        lr: float = 0.0,
        images_per_second: float = 0.0,
        data_wait: float = 0.0,
    ) -> None:
        """`batch` batches of the epoch are done. Without `metrics` (not read) the old figures stay."""
        if metrics is not None:
            self.figures = describe(metrics, lr, images_per_second, data_wait)
        if self._bar is not None:
            self._bar.set_postfix_str(self.figures, refresh=False)
            self._bar.update(batch - self.done)
        self.done = batch
        if self._bar is None and time.monotonic() - self._shown_at >= self.interval:
            self._print_line()

    def seconds_left(self) -> float | None:
        """Time to the end of the epoch at the speed so far; None before the first batch."""
        if self.done <= self.initial:
            return None
        elapsed = time.monotonic() - self.started
        return elapsed * (self.total - self.done) / (self.done - self.initial)

    def close(self) -> None:
        """Leave the finished bar, or the last plain line, on the screen. Calling it twice does no harm."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
        elif self._shown_batch != self.done:
            self._print_line()

    def __enter__(self) -> EpochProgress:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _print_line(self) -> None:
        self._shown_at, self._shown_batch = time.monotonic(), self.done
        parts = [f"{self.title}: batch {self.done}/{self.total}"]
        if self.figures:
            parts.append(self.figures)
        left = self.seconds_left()
        if left is not None:
            parts.append(f"{tqdm.format_interval(left)} left")
        print(", ".join(parts), file=self.file, flush=True)

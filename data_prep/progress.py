"""Progress of long work: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 10.0


class Counter:
    """Shows how many of `total` units are done; `add` is called as work proceeds, `close` at its end."""

    def __init__(self, title: str, total: int | None, unit: str = "images", done: int = 0) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.done = self._first = done
        self._start = self._shown = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(desc=title, total=total, unit=f" {unit}", initial=done, file=sys.stderr)

    def add(self, count: int) -> None:
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif time.monotonic() - self._shown > _SECONDS_BETWEEN_LINES:
            self._shown = time.monotonic()
            of = f" of {self.total}" if self.total is not None else ""
            rate = (self.done - self._first) / (self._shown - self._start)
            print(f"{self.title}: {self.done}{of} {self.unit}, {rate:.0f} a second", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def progress(items: Iterable[Item], title: str, total: int | None = None, unit: str = "images") -> Iterator[Item]:
    """Pass `items` on, showing how many of them (`total`, or their length) were taken."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)
    counter = Counter(title, total, unit)
    try:
        for item in items:
            yield item
            counter.add(1)
    finally:
        counter.close()

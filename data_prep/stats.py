"""The command `stats`: mean and standard deviation of the channels over all pixels of a pack, by all cores."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from command_line import HelpFormatter, Parser
from data_prep import progress
from data_prep.recordio import RecordError, RecordFile
from data_prep.workers import chunked, default_workers, ordered_map
from errors import UsageError

_CHUNK = 64


@functools.lru_cache(maxsize=1)
def _open(path: str) -> RecordFile:
    return RecordFile(path)


def _sums(path: str, records: list[int]) -> tuple[int, np.ndarray]:
    """(pixels, (2, 3) sums and sums of squares, exact integers) of some records; runs in the workers."""
    from data_prep.decode import DecodeError, decode_image

    pixels, sums = 0, np.zeros((2, 3), np.int64)
    values = np.arange(256)
    for record in records:
        file = _open(path)
        try:
            image = decode_image(file.unpack(record)[1])
        except DecodeError as error:
            raise RecordError(f"{file.where(record)}: {error}") from None
        counts = np.stack([np.bincount(image[..., channel].ravel(), minlength=256) for channel in range(3)])
        pixels += image.shape[0] * image.shape[1]
        sums += np.stack([counts @ values, counts @ values**2])
    return pixels, sums


def channel_stats(path: Path, workers: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(mean, standard deviation) of R, G and B on the scale 0-255, and the number of pixels.

    Every pixel counts the same, so a larger image counts more. Sums are integers: the result does not depend on the
    number of workers.
    """
    with RecordFile(path) as file:
        count = len(file)
    if not count:
        raise UsageError(f"{path}: holds no images")
    pixels, sums = 0, np.zeros((2, 3), object)
    chunks = chunked(range(count), _CHUNK)
    results = ordered_map(functools.partial(_sums, str(path)), chunks, workers)
    for more, part in progress.progress(results, path.name, -(-count // _CHUNK), unit=f"x {_CHUNK} images"):
        pixels += more
        sums = sums + part
    mean = (sums[0] / pixels).astype(float)
    variance = (sums[1] / pixels).astype(float) - mean**2
    return mean, np.sqrt(np.maximum(variance, 0)), pixels


def main(argv: list[str] | None = None) -> int:
    """The command `stats`."""
    parser = Parser(
        "python -m data_prep stats", formatter_class=HelpFormatter,
        description="Print mean and standard deviation of the channels over all pixels of a pack; uses all cores.",
    )  # fmt: skip
    parser.add_argument("file", type=Path, help="the .rec file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--num-thread", type=int, default=default_workers(), help="worker processes")
    args = parser.parse_args(argv)
    mean, std, pixels = channel_stats(args.file, args.num_thread)
    if args.json:
        print(json.dumps({"mean": mean.tolist(), "std": std.tolist(), "pixels": pixels}))
        return 0
    print(f"{args.file}: {pixels} pixels; R, G, B")
    for name, values in (("mean", mean), ("std", std)):
        shown = ", ".join(f"{value:.3f}" for value in values)
        fractions = ", ".join(f"{value / 255:.4f}" for value in values)
        print(f"  {name:<4} {shown} of 255 ({fractions} of 1)")
    return 0
